"""The table of rivals: every row is a command, and points of equal cost are read off the curves."""

import json

import pytest
from runs import parse

import toy
import train
from benchmarks import rivals, runs


def test_every_row_is_a_command_and_has_a_source():
    for world in rivals.WORLDS:
        for name, source in rivals.rows_of(world).items():
            args = parse(["--toy", world, "--method", *name.split()])
            assert args.method == name.split()[0] and source
    assert set(rivals.rows_of("fork")) - set(rivals.rows_of("late")) == set(rivals.LOOKAHEAD)
    assert set(rivals.WORLDS) <= set(toy.WORLDS)


def run(tmp_path, name, accuracy, kept, cost):
    """A log of two steps, evaluated before, between and after."""
    lines = []
    for step, value in enumerate(accuracy):
        if step:
            tokens = {"sampled": cost // 4, "scored": cost // 4, "trained": cost // 2}
            lines.append({"step": step, "loss": 0.1, "kept_tokens": kept, "tokens": tokens,
                          "repeated_4grams": 0.0, "seconds": {"sample": 1.0, "total": 2.5}})
        lines.append({"step": step, "accuracy": value})
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rivals.curve(folder)


def test_accuracies_are_read_at_equal_cost(tmp_path):
    """OPD supervises 100 tokens a step for 400, the rival 50 for 200: its end is OPD's half."""
    runs = {
        "opd": [run(tmp_path, f"o{s}", (0.2, 0.4 + s / 10, 0.6), 100, 400) for s in (0, 1)],
        "release": [run(tmp_path, f"r{s}", (0.2, 0.5, 0.9), 50, 200) for s in (0, 1)],
    }
    assert runs["opd"][1] == {"accuracy": [0.2, 0.5, 0.6], "supervised": [0, 100, 200],
                              "compute": [0, 400, 800], "seconds": 5.0, "repeated": 0.0}
    text, points = rivals.world_table(runs, {"opd": "plain", "release": "a paper"})
    means = {name: [sum(x) / len(x) for x in both] for name, both in points.items()}
    assert means == {"opd": [pytest.approx(0.45)] * 2, "release": [pytest.approx(0.9)] * 2}
    matrix = rivals.summary({"varied": points})
    assert matrix.count("| `opd` | 0.45 ± ") == 2 and "| method | varied |" in matrix
    assert "Equal supervision: 100 tokens. Equal compute: 400." in text
    row = next(line for line in text.splitlines() if line.startswith("| `release`"))
    assert row.count("+0.450 [-0.185, +1.085]") == 2 and "| a paper |" in row


def test_a_run_that_is_told_to_stop_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    """A signal ends train.py with exit code 0."""
    monkeypatch.setattr(train, "main", lambda argv: None)
    monkeypatch.setattr(runs.os, "dup2", lambda *_: None)
    with pytest.raises(RuntimeError, match="told to stop"):
        runs.train_here([], tmp_path / "opd-0.1-seed0.txt")
    (tmp_path / "opd-0.1-seed0" / "student").mkdir(parents=True)
    runs.train_here([], tmp_path / "opd-0.1-seed0.txt")


def test_worlds_are_added_to_those_that_were_run_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rivals, "build_worlds", lambda worlds: None)
    monkeypatch.setattr(rivals, "run_all", lambda todo, *_: asked.extend(todo))
    for world in ("late", "varied"):
        asked = []
        for name in rivals.rows_of(world):
            cell = rivals.Cell(world, name.split()[0], tuple(name.split()[1:]), curve=True)
            for seed in (0, 1):
                folder = rivals.run_folder(tmp_path / "runs", cell, seed)
                run(folder.parent, folder.name, (0.2, 0.5, 0.6), 50, 200)
        words = ["--worlds", world, "--seeds", "0", "1", "--out", str(tmp_path)]
        rivals.main([*words, "--runs", str(tmp_path / "runs")])
        assert len(asked) == 2 * len(rivals.rows_of(world))
    page = (tmp_path / "rivals.md").read_text()
    assert "## varied: " in page and page.index("## varied") < page.index("## late")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name.split()[0] for name in last} == {"late", "varied"}
    assert set(json.loads((tmp_path / "rivals.json").read_text())["runs"]) == {"late", "varied"}
