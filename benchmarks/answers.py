r"""Does answers.py judge as people do? Counted on files of labelled cases.

    python benchmarks/answers.py                        the project's own cases, tests/answers.jsonl
    python benchmarks/answers.py mine.jsonl more.jsonl

A file has one case per line: {"prediction": text, "reference": text, "expected": true or false},
where a prediction is a whole response and a reference is what a problem file holds as its answer.
Per file: how many cases are judged as expected, without `math-verify` and, where it is installed,
with it; and the first 20 that are not. The last line printed is JSON.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import answers  # noqa: E402
import harness  # noqa: E402

MOST_SHOWN = 20
TAKEN_AS = {True: "equal", False: "different"}
KINDS = {"prediction": str, "reference": str, "expected": bool}


def load_cases(path: str) -> list[dict]:
    """The cases of a file; ValueError naming file and line for a line that is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: cannot read cases: {error}") from error
    cases = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                case = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: malformed JSON: {error}") from error
            if not isinstance(case, dict) or any(
                not isinstance(case.get(key), kind) for key, kind in KINDS.items()
            ):
                wanted = '"prediction" and "reference" (text) and "expected" (true or false)'
                raise ValueError(f"{path}:{number}: needs {wanted}")
            cases.append(case | {"line": number})
    if not cases:
        raise ValueError(f"{path}: no cases in this file")
    return cases


def judge(cases: list[dict], *, math_verify: bool) -> list[dict]:
    """The cases that are not judged as expected, with the answer that was extracted."""
    wrong, found = [], importlib.util.find_spec("math_verify") if math_verify else None
    with mock.patch.object(importlib.util, "find_spec", lambda name: found):
        for case in cases:
            answer = answers.extract_answer(case["prediction"])
            if answers.is_correct(answer, case["reference"]) != case["expected"]:
                wrong.append(case | {"answer": answer})
    return wrong


def report(path: str) -> dict:
    """Print what is wrong in a file; counts for the line of JSON."""
    cases = load_cases(path)
    counts = {"cases": len(cases)}
    ways = {"without": False}
    if importlib.util.find_spec("math_verify"):
        ways["with"] = True
    for way, math_verify in ways.items():
        wrong = judge(cases, math_verify=math_verify)
        counts[way] = len(cases) - len(wrong)
        print(f"{path}: {counts[way]} of {len(cases)} as expected, {way} math-verify")
        for case in wrong[:MOST_SHOWN]:
            end, reference = case["prediction"][-60:], case["reference"][-60:]
            said = f"{case['answer']!r:.60} of {end!r} against {reference!r}"
            print(f"  line {case['line']}: {said}: taken as {TAKEN_AS[not case['expected']]}")
        if len(wrong) > MOST_SHOWN:
            print(f"  and {len(wrong) - MOST_SHOWN} more")
    return counts


def main(argv: list[str] | None = None) -> int:
    """Report on every file; exit status 2 and one line on stderr for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [str(ROOT / "tests" / "answers.jsonl")]
    parser.add_argument("files", nargs="*", default=default, metavar="FILE", help="JSONL of cases")
    args = parser.parse_args(argv)
    try:
        result = {path: report(path) for path in args.files}
    except ValueError as error:
        harness.complain("answers.py", error)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
