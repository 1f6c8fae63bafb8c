"""Malformed input through the real commands: a part of tests/corpus.py, and that it can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


CHECK = r"""
import json, corpus
corpus.prepare()
code = corpus.main(["--short"])
import evaluate
bad, good = corpus.malformed(), list(corpus.accepted())
parts = corpus.spread(bad, 5)
evaluate_main = evaluate.main

def litter(argv):
    open("litter", "w").write("left behind")
    return evaluate_main(argv)

evaluate.main = litter
by_name = {c.name: c for c in bad}
right = by_name["toy: --steps below"]
wrong = corpus.Case("flags", "wrong culprit", "toy", right.flags, "--elsewhere")
dirty = corpus.Case("flags", "litter", "evaluate", ("--samples", "0"), "--samples")
fine = corpus.Case("flags", "no refusal", "toy", ("--help",), "")
other = corpus.Case("accepted", "other text", "evaluate", good[0].flags, "", good[0].files, True,
                    ("another text",))
print(json.dumps({
    "code": code, "malformed": len(bad), "accepted": len(good),
    "groups": sorted({c.group for c in bad}),
    "spread": [sum(c.group == g for c in parts) for g in sorted({c.group for c in bad})],
    "failures": corpus.run([right, wrong, dirty, fine, other], [right]),
}))
"""


@pytest.fixture(scope="module")
def lines():
    """Of another process, for forks of this one would inherit its threads."""
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=TESTS, text=True, capture_output=True,
                          timeout=300)  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_part_of_the_corpus(lines):
    code, counts = json.loads(lines[-1])["code"], json.loads(lines[-2])
    if code or counts["failures"]:
        pytest.fail("\n".join(lines[:-1]))
    assert counts["malformed"] >= 100 and counts["accepted"] >= 5 and counts["real_commands"] == 2


def test_the_corpus_is_large_and_its_checker_can_fail(lines):
    said = json.loads(lines[-1])
    assert said["malformed"] >= 250 and said["accepted"] >= 25
    assert said["groups"] == ["flags", "lines", "models", "out", "prompts"]
    assert said["spread"] == [5] * 5
    found = sorted(said["failures"])
    assert len(found) == 4, found
    assert "other text" in found[0] and "exit code 1" in found[0]
    assert "litter: made or changed ['litter']" in found[1]
    assert "no refusal: exit code 0; stdout has" in found[2]
    assert "wrong culprit: stderr does not name '--elsewhere'" in found[3]
