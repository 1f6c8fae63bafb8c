"""verdicts.py: the regret of an advice, and what is drawn from what was written."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import last_line, result

from benchmarks import verdicts
from diagnose import command as diagnose_command

ROOT = Path(__file__).parents[2]


def diagnosis(method, teacher=0.5):
    """What verdicts.py reads of a report."""
    completion = {"teacher": {"mean": teacher}}
    return {"command": {"method": method}, "students": {"student": {"completion": completion}}}


def test_the_regret_of_an_advice_by_hand():
    """opd .5 and .7, release .4: to suggest release costs .2, nothing .35, lgr was not measured."""
    runs = [result("opd", 0, 0.5), result("opd", 1, 0.7), result("release", 0, 0.4)]
    runs += [result("opd", 0, 0.9, "--lr", "1"), result("opd", 0, 0.9, moves=3)]
    reports = [diagnosis(method) for method in ("opd", "release", None, "lgr")]
    line = verdicts.advice(reports, runs, "clean", 12)
    assert line["after"] == {"opd": 0.6, "release": 0.4, "none": 0.25}
    assert line["suggested"] == ["opd", "release", "none", "lgr"]
    assert line["regret"] == [0.0, 0.2, 0.35, None]
    row = verdicts.advice_table([line]).splitlines()[2]
    assert row == ("| clean | 12 | yes | opd 1/4, release 1/4, none 1/4, lgr 1/4 | 0.500 | 0.250 | "
                   "0.600 | 0.400 | - | - | 0.183 |")
    assert not verdicts.seen("clean", 6) and not verdicts.seen("horizon-0.1", 12)


def test_verdicts(tmp_path, monkeypatch, capsys):
    """One small diagnosis, nothing trained; a second call runs nothing again."""

    def run_here(command, **_):
        commands.append(command)
        few = "--count 8 --samples 2 --resamples 20".split()
        return SimpleNamespace(returncode=diagnose_command.main([*command[3:], *few]))

    commands = []
    monkeypatch.setattr(verdicts, "subprocess", SimpleNamespace(run=run_here))
    flags = ["--seeds", 0, "--cases", "clean", "--after", "--place", tmp_path / "d",
             "--out", tmp_path / "new"]  # fmt: skip
    found, _ = last_line(capsys, verdicts.main, *flags)
    assert found.pop("opd_within_0.1_of_the_teacher") == [1, 1]
    assert found == {"seen": {"diagnoses": 1, "mean_regret": 0.0, "worst": 0.0}}
    table = (tmp_path / "new" / "verdicts.md").read_text()
    assert "| clean | 12 | yes | opd 1/1 | " in table and "After training" not in table
    assert last_line(capsys, verdicts.main, *flags)[0]["seen"] == found["seen"]
    assert [command[1:3] for command in commands] == [["-m", "diagnose"]]


def test_a_diagnosis_that_fails_ends_the_command(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=2, stderr="diagnose: error: no such world")
    monkeypatch.setattr(verdicts, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(SystemExit, match="no such world"):
        verdicts.diagnose("clean", 12, 0, tmp_path)


def test_the_picture_of_verdicts_is_drawn_from_what_was_written(tmp_path):
    lines = json.loads((ROOT / "results" / "verdicts.json").read_text())["after"]
    verdicts.draw(lines, tmp_path)
    assert (tmp_path / "after.png").read_bytes()[:4] == b"\x89PNG"
    table = verdicts.after_table(lines)
    assert table in (ROOT / "results" / "verdicts.md").read_text()
    for line in lines:
        t_X, mean_X, half_X, count_X = verdicts.mean_curve(line)
        assert len(t_X) == len(mean_X) >= 5 and (half_X >= 0).all() and (count_X > 0).all()
        assert len(line["fit"]) == (1 if line["method"] == "before" else 5)
