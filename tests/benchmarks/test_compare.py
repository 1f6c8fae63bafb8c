"""compare.py: the runs it asks for, and the tables it makes of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import last_line, result
from runs import parse

import toy
from benchmarks import compare
from benchmarks.runs import cells, finished, flags_of

ROOT = Path(__file__).parents[2]


def test_compare(tmp_path, capsys):
    """Two seeds; a second call runs again what is not finished and writes the same table."""
    command = ["--worlds", "fork", "--methods", "release+lgr", "--seeds", 3, 4, "--jobs", 1,
               "--out", tmp_path / "new", "--", "--steps", 1, "--difficulty", 1, "--eval-count", 2,
               "--eval-samples", 1, "--prompts-per-step", 2]  # fmt: skip
    figures, shown = last_line(capsys, compare.main, *command)
    assert list(figures) == [f"fork/6/release+lgr/{seed}" for seed in (3, 4)]
    root = tmp_path / "new" / "runs" / "fork"
    folders = [root / f"release+lgr-n6-seed{seed}" for seed in (3, 4)]
    assert sorted(path for path in root.iterdir() if path.is_dir()) == folders
    table = (tmp_path / "new" / "compare.md").read_text()
    assert table.count("| fork |") == 1 and "wording" in table and table.strip() in shown
    record = json.loads((tmp_path / "new" / "compare.json").read_text())
    assert [(r["method"], r["seed"]) for r in record["runs"]] == [("release+lgr", 3),
                                                                  ("release+lgr", 4)]
    for run, folder in zip(record["runs"], folders, strict=True):
        log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
        assert run["steps"] == [0, 1] and run["accuracy"] == [log[0]["accuracy"],
                                                              log[-1]["accuracy"]]
        assert run["ood"] == [log[0]["ood"]["accuracy"], log[-1]["ood"]["accuracy"]]
        assert run["supervised_tokens"] == log[1]["kept_tokens"] / 2
    done, interrupted = folders
    shutil.rmtree(interrupted / "student")
    before = (done / "log.jsonl").stat().st_mtime_ns
    assert last_line(capsys, compare.main, *command)[0] == figures
    assert (done / "log.jsonl").stat().st_mtime_ns == before
    assert (interrupted / "student").exists()
    assert (tmp_path / "new" / "compare.md").read_text() == table


def test_compare_says_which_run_failed(tmp_path):
    command = ["--worlds", "fork", "--methods", "opd", "--seeds", "0", "--out", str(tmp_path), "--",
               "--steps", "none"]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        compare.main(command)
    assert not (tmp_path / "compare.json").exists()
    assert "train.py --toy fork --method opd" in left.value.code
    assert "argument --steps: invalid whole number value: 'none'" in left.value.code


@pytest.mark.parametrize("flags, culprit", [
    ("--only everything", "everything"), ("--worlds nowhere --out x", "nowhere"),
    ("--worlds fork", "needs --out"), ("--vary lgr-gamma 1", "--vary needs --worlds"),
    ("--jobs 0", "--jobs must be at least 1"), ("-- --steps 1", "needs --out"),
    ("--only budget", "needs --out"), ("--seeds 0", "needs --out"),
])
def test_compare_refuses(flags, culprit, capsys):
    with pytest.raises(SystemExit) as left:
        compare.parse(flags.split())
    assert left.value.code == 2 and culprit in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------- what compare.py makes of runs
def test_a_row_of_the_table_by_hand():
    """Differences to opd, paired by seed: .1, .2, .3; mean .2, s .1, half width 4.303 * .1 / sqrt 3
    = .248. Another difficulty's opd, and one with flags, are somebody else's."""
    runs = [result("opd", s, a) for s, a in ((0, 0.5), (1, 0.6), (2, 0.4))]
    runs += [result("opd", s, 0.1, moves=6) for s in range(3)]
    runs += [result("opd", s, 0.2, "--lr", "1") for s in range(3)]
    runs += [result("rkl", s, a, "--lr", "2") for s, a in ((2, 0.7), (0, 0.6), (1, 0.8))]
    wanted = cells("clean", "opd") + cells("clean", "rkl", "--lr 2", "--lr 3")
    assert "- release" not in compare.table(runs, wanted), "no control, no such column"
    controls = runs + [result("random", s, 0.3) for s in range(3)]
    controls += [result("release", s, a) for s, a in ((0, 0.4), (1, 0.5), (2, 0.6))]
    (control,) = compare.table(controls, cells("clean", "random")).splitlines()[2:]
    assert "| -0.200 [-0.448, +0.048] | -0.200 [-0.448, +0.048] |" in control
    lines = compare.table(runs, wanted).splitlines()
    assert lines[0] == ("| world | moves | method | accuracy | each seed | - opd | supervised | "
                        "second task | fired |")
    assert lines[2] == ("| clean | 12 | opd | .500 ± .058 | .500 .600 .400 | - | 0.50 | "
                        "1.000 → .900 | 1.00 |")
    assert lines[3] == ("| clean | 12 | rkl --lr 2 | .700 ± .058 | .600 .800 .700 | "
                        "+0.200 [-0.048, +0.448] | 0.50 | 1.000 → .900 | 1.00 |")
    assert len(lines) == 4, "what has no runs has no row"


def test_experiments_share_runs_and_the_one_with_a_curve_wins():
    plain, curve = cells("horizon", "opd"), cells("horizon", "opd", curve=True)
    other = cells("horizon", "opd", "--lr 1")
    for first, second in ((plain, curve), (curve, plain)):
        chosen = {"a": ("", first), "b": ("", second), "c": ("", other)}
        todo = compare.list_runs(chosen, [0, 1, 2])
        assert [(cell.flags, seed) for cell, seed in todo] == (
            [((), s) for s in range(3)] + [(("--lr", "1"), s) for s in range(3)]
        )
        assert [cell.curve for cell, _ in todo] == [True] * 3 + [False] * 3
    everything = compare.list_runs(compare.EXPERIMENTS, [0])
    assert len({cell.name for cell, _ in everything}) == len(everything)


def test_a_run_without_a_curve_is_not_taken_for_one_with(tmp_path):
    (plain,) = cells("horizon", "opd")
    (curve,) = cells("horizon", "opd", curve=True)
    (tmp_path / "student").mkdir()
    for every, enough in ((0, False), (10, True)):
        config = {"flags": {"eval_every": every}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert finished(tmp_path, plain) and finished(tmp_path, curve) == enough
    (tmp_path / "student").rmdir()
    assert not finished(tmp_path, plain)


def test_every_experiment_is_made_of_flags_that_train_takes():
    for cell, seed in compare.list_runs(compare.EXPERIMENTS | {"quick": ("", compare.QUICK)}, [7]):
        args = parse(flags_of(cell, seed, ROOT / "x", []))
        assert (args.toy, args.method, args.seed) == (cell.world, cell.method, 7)
        assert args.difficulty == cell.difficulty
        assert args.eval_every == (10 if cell.curve else 0)


def test_the_pages_show_rows_that_the_commands_wrote():
    """Every row of a results table on a page stands in results/*.md, digit by digit, and every
    figure or record that the page names is there."""
    folders = (ROOT, ROOT / "results", ROOT / "diagnose")
    pages = [page for folder in folders if (page := folder / "README.md").exists()]
    written = [path.read_text() for path in (ROOT / "results").glob("*.md") if path not in pages]
    written = {line.strip() for line in "\n".join(written).splitlines()}
    worlds, rows = "|".join(map(re.escape, toy.WORLDS)), 0
    for page in pages:
        text = page.read_text()
        for line in text.splitlines():
            if re.match(rf"\| ({worlds}) \| [0-9a-z+]+ \| ", line):
                assert line.strip() in written, line
                rows += 1
        for name in re.findall(r"\]\(((?:\.\./)?(?:results/)?[\w.-]+\.(?:png|json|md))\)", text):
            assert (page.parent / name).exists(), (page, name)
    assert rows > 50
