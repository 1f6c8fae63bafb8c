"""benchmarks/answers.py: counts of labelled cases, and lines that are none."""

import json

import pytest
from commands import last_line

from benchmarks import answers as command

CASES = [(r"\boxed{1}", "1", True), ("It is 2.", "3", False), (r"\boxed{4}", "5", True)]


def write(path, cases):
    keys = ("prediction", "reference", "expected")
    path.write_text("\n".join(json.dumps(dict(zip(keys, case, strict=True))) for case in cases))
    return str(path)


def test_counts_and_wrong_cases(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    path = write(tmp_path / "cases.jsonl", CASES)
    found, shown = last_line(capsys, command.main, path)
    assert found == {path: {"cases": 3, "without": 2}}
    assert f"{path}: 2 of 3 as expected, without math-verify\n" in shown
    assert r"  line 3: '4' of '\\boxed{4}' against '5': taken as different" in shown


def test_no_more_than_twenty_are_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    path = write(tmp_path / "cases.jsonl", [("1", "2", True)] * 25)
    _, shown = last_line(capsys, command.main, path)
    assert shown.count("  line ") == 20 and "  and 5 more\n" in shown


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"prediction": "1", "reference": 1, "expected": true}',
     '{"prediction": "1", "reference": "1", "expected": 1}', '{"prediction": "1"}', "[" * 100_000],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, capsys, line):
    path = tmp_path / "cases.jsonl"
    good = json.dumps({"prediction": "1", "reference": "1", "expected": True})
    path.write_text(f"{good}\n\n{line}\n")
    assert command.main([str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"answers.py: error: {path}:3: ") and shown.err.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"", b"\xff"])
def test_a_file_without_cases_is_named(tmp_path, capsys, content):
    path = tmp_path / "cases.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert command.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err
