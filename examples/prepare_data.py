r"""The papers' public data sets as JSONL for train.py and evaluate.py.

    python examples/prepare_data.py deepmath --out train.jsonl                  from the hub
    python examples/prepare_data.py gsm8k --from test.jsonl --out gsm8k.jsonl   a file or folder

--from takes JSONL, JSON and CSV, and parquet where `datasets` is installed, which is also what the
hub needs. Train on deepmath (level 6 and above, as the release paper in all likelihood) or polaris
(the LGR paper); evaluate on the rest. Nothing looks for held-out problems in the training data.
"""

import csv
import io
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import answers  # noqa: E402
import harness  # noqa: E402
from harness.cli import parse_json  # noqa: E402

SUFFIX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
SETS = {  # name on the hub, its configuration, split
    "deepmath": ("zwhe99/DeepMath-103K", None, "train"),
    "polaris": ("POLARIS-Project/Polaris-Dataset-53K", None, "train"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "aime26": ("MathArena/aime_2026", None, "train"),
    "hmmt25": ("MathArena/hmmt_feb_2025", None, "train"),
    "hmmt25-nov": ("MathArena/hmmt_nov_2025", None, "train"),
    "hmmt26": ("MathArena/hmmt_feb_2026", None, "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "gpqa-diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
PROBLEM = "problem", "question", "Problem", "Question"  # what these sets call it
ANSWER = "final_answer", "answer", "Answer", "Correct Answer", "solution"
WRONG = [f"Incorrect Answer {i}" for i in (1, 2, 3)]


def read(name: str, source: str | None):
    """(where, row) one by one, rows as dicts, of a file, a folder's files in order, or the hub."""
    if source is None:
        hub, config, split = SETS[name]
        for i, row in enumerate(load_dataset(hub, config, split=split), 1):
            yield f"{hub}:{i}", row
        return
    found = sorted(Path(source).rglob("*")) if Path(source).is_dir() else [Path(source)]
    found = [path for path in found if path.suffix in (".jsonl", ".json", ".csv", ".parquet")]
    if not found:
        raise ValueError(f"--from {source}: no .jsonl, .json, .csv or .parquet file")
    for path in found:
        text = "" if path.suffix == ".parquet" else path.read_text(encoding="utf-8-sig")
        rows = text.split("\n")
        if path.suffix == ".parquet":
            rows = load_dataset("parquet", data_files=str(path), split="train")
        elif path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(text, newline=""))
        elif path.suffix == ".json":
            rows = parse_json(text.encode(), path)
        for i, row in enumerate(rows, 1):
            where = f"{path}:{i}"
            if path.suffix == ".jsonl":
                row = parse_json(row.encode(), where) if row.strip() else None
            if row is not None and not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
            if row is not None:
                yield where, row


def load_dataset(*what, **how):
    """That of the library `datasets`; ValueError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise ValueError("pip install datasets, or give JSONL, JSON or CSV with --from") from None
    return datasets.load_dataset(*what, **how)


def convert(row: dict, where: str, args, draw, tokenizer) -> dict | str:
    """{"problem", "answer"}, or why the row is left out. ValueError for a row without them."""
    values = {}
    for what, keys in (("problem", PROBLEM), ("answer", ANSWER)):
        found = [row[key] for key in keys if row.get(key) not in (None, "", [])]
        if not found:
            raise ValueError(f"{where}: needs one of {keys}; has {list(row)}")
        values[what] = str(found[0][0] if isinstance(found[0], list) else found[0]).strip()
    if args.name == "deepmath" and float(row.get("difficulty", args.min_level)) < args.min_level:
        return f"below level {args.min_level:g}"
    if all(row.get(key) for key in WRONG):  # multiple choice
        options = [str(row[key]).strip() for key in (*WRONG, "Correct Answer")]
        order = draw.sample(range(4), 4)
        lines = [f"({letter}) {options[i]}" for letter, i in zip("ABCD", order, strict=True)]
        values["problem"] += "\n\n" + "\n".join(lines)
        values["answer"] = "ABCD"[order.index(3)]
    if "####" in values["answer"] or "\\boxed" in values["answer"]:  # worked out in full
        values["answer"] = answers.extract_answer(values["answer"])
        if not values["answer"]:
            return "with no answer in the solution"
    values["problem"] += args.suffix
    if tokenizer and len(tokenizer(values["problem"])["input_ids"]) > args.max_tokens:
        return f"longer than {args.max_tokens} tokens"
    return values


def make_parser():
    parser = harness.Parser(prog="prepare_data.py", description=__doc__.splitlines()[0])
    add, path, count = parser.add_argument, harness.path_name, harness.number(int, 0)
    add("name", choices=SETS)
    add("--from", dest="source", type=path, metavar="PATH", help="default: the hub")
    add("--out", type=path, required=True, metavar="FILE", help="must not exist")
    add("--suffix", default=SUFFIX, metavar="TEXT", help="after every problem (asks for a box)")
    add("--min-level", type=harness.number(float, 0), default=6, metavar="N", help="of deepmath")
    add("--tokenizer", type=path, metavar="PATH", help="leave out long problems by it")
    add("--max-tokens", type=count, default=2048, metavar="N", help="of those")
    add("--seed", type=count, default=0, metavar="N", help="order of the choices")
    return parser


def main(argv=None):
    """The command; exit status 2 and one line on stderr for what the user can put right."""
    args = make_parser().parse_args(argv)
    kept, left_out, draw = [], {}, random.Random(args.seed)
    try:
        harness.check_new_file("--out", args.out)
        tokenizer = harness.load_tokenizer(args.tokenizer) if args.tokenizer else None
        for where, row in read(args.name, args.source):
            item = convert(row, where, args, draw, tokenizer)
            if isinstance(item, dict):
                kept.append(item)
            else:
                left_out[item] = left_out.get(item, 0) + 1
        harness.from_records(kept, args.out)
        harness.write_new_file(args.out, "".join(json.dumps(x) + "\n" for x in kept))
    except (ValueError, OSError, ImportError) as error:
        harness.complain("prepare_data.py", error)
        return 2
    print(f"wrote {args.out}: {len(kept)} problems", *(f"{n} {why}" for why, n in left_out.items()),
          sep="; left out: ")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
