"""The commands behind the README's tables run, and end with one line of JSON.  No times here."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
compare = sys.modules["compare"] = importlib.util.module_from_spec(SPEC)  # dataclasses look it up
SPEC.loader.exec_module(compare)


def last_line(*command):
    """Run a benchmark; its last line, as JSON, and all of its standard output."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_lgr():
    figures, shown = last_line("benchmarks/lgr.py", "--lengths", "48", "64", "--candidates", "3",
                               "--rates", "0.2", "--repeats", "1", "--slices", "2")
    assert set(figures) >= {"vs_naive", "vs_reprefill", "over_opd", "over_flop_limit"}
    assert all(value > 0 for value in figures.values())
    rows = [line for line in shown.splitlines() if line.startswith(("| 48 |", "| 64 |"))]
    # naive is timed at the last length only
    assert len(rows) == 2 and rows[0].endswith("| - |") and not rows[1].endswith("| - |")


def test_compare(tmp_path):
    """Two methods, two seeds; a second call finds the runs and writes the same table."""
    command = ["benchmarks/compare.py", "--worlds", "fork", "--methods", "opd", "lgr", "--seeds",
               "3", "4", "--jobs", "1", "--out", tmp_path / "new", "--", "--steps", "1",
               "--difficulty", "1", "--eval-count", "6", "--eval-samples", "1",
               "--prompts-per-step", "2"]
    figures, shown = last_line(*command)
    names = [f"fork/6/{method}/{seed}" for method in ("opd", "lgr") for seed in (3, 4)]
    assert list(figures) == names
    runs = tmp_path / "new" / "runs" / "fork"
    folders = sorted(folder.name for folder in runs.iterdir() if folder.is_dir())
    assert folders == [f"{m}-n6-seed{s}" for m in ("lgr", "opd") for s in (3, 4)]
    table = (tmp_path / "new" / "compare.md").read_text()
    assert table.count("| fork |") == 2 and "wording" in table and table.strip() in shown
    assert (tmp_path / "new" / "curves.png").exists()
    record = json.loads((tmp_path / "new" / "compare.json").read_text())
    assert [(r["method"], r["seed"]) for r in record["runs"]] == [
        ("opd", 3), ("opd", 4), ("lgr", 3), ("lgr", 4)
    ]
    for run, folder in zip(record["runs"], ("opd-n6-seed3", "opd-n6-seed4", "lgr-n6-seed3",
                                            "lgr-n6-seed4"), strict=True):
        log = [json.loads(x) for x in (runs / folder / "log.jsonl").read_text().splitlines()]
        assert run["steps"] == [0, 1] and run["accuracy"] == [log[0]["accuracy"],
                                                              log[-1]["accuracy"]]
        assert run["ood"] == [log[0]["ood"]["accuracy"], log[-1]["ood"]["accuracy"]]
        assert run["supervised_tokens"] == log[1]["kept_tokens"] / 2
    shutil.rmtree(runs / "opd-n6-seed4" / "student")  # as if it had been interrupted
    before = (runs / "opd-n6-seed3" / "log.jsonl").stat().st_mtime_ns
    assert last_line(*command)[0] == figures
    assert (runs / "opd-n6-seed3" / "log.jsonl").stat().st_mtime_ns == before
    assert (runs / "opd-n6-seed4" / "student").exists()
    assert (tmp_path / "new" / "compare.md").read_text() == table


def test_compare_says_which_run_failed(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/compare.py", "--worlds", "fork", "--methods", "opd", "--seeds",
         "0", "--out", tmp_path, "--", "--steps", "none"], cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "compare.json").exists()
    assert "train.py --toy fork --method opd" in done.stderr
    assert "argument --steps: invalid whole number value: 'none'" in done.stderr


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
def result(method, seed, accuracy, *flags, world="clean", moves=12, **more):
    """One run as in compare.json."""
    return {"world": world, "method": method, "flags": list(flags), "moves": moves, "seed": seed,
            "accuracy": [0.25, accuracy], "ood": [1.0, 0.9], "kept": 0.5, "fired": 1.0,
            "uncertain_wording": None} | more


def test_a_row_of_the_table_by_hand():
    """Differences to opd, paired by seed: .1, .2, .3; mean .2, s .1, half width 4.303 * .1 / sqrt 3
    = .248. Another difficulty's opd, and one with flags, are somebody else's."""
    runs = [result("opd", s, a) for s, a in ((0, 0.5), (1, 0.6), (2, 0.4))]
    runs += [result("opd", s, 0.1, moves=6) for s in range(3)]
    runs += [result("opd", s, 0.2, "--lr", "1") for s in range(3)]
    runs += [result("rkl", s, a, "--lr", "2") for s, a in ((2, 0.7), (0, 0.6), (1, 0.8))]
    wanted = compare.cells("clean", "opd") + compare.cells("clean", "rkl", "--lr 2", "--lr 3")
    assert "- release" not in compare.table(runs, wanted), "no control, no such column"
    controls = runs + [result("random", s, 0.3) for s in range(3)]
    controls += [result("release", s, a) for s, a in ((0, 0.4), (1, 0.5), (2, 0.6))]
    (control,) = compare.table(controls, compare.cells("clean", "random")).splitlines()[2:]
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
    plain, curve = compare.cells("horizon", "opd"), compare.cells("horizon", "opd", curve=True)
    other = compare.cells("horizon", "opd", "--lr 1")
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
    (plain,) = compare.cells("horizon", "opd")
    (curve,) = compare.cells("horizon", "opd", curve=True)
    (tmp_path / "student").mkdir()
    for every, enough in ((0, False), (10, True)):
        config = {"flags": {"eval_every": every}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert compare.finished(tmp_path, plain) and compare.finished(tmp_path, curve) == enough
    (tmp_path / "student").rmdir()
    assert not compare.finished(tmp_path, plain)


def test_every_experiment_is_made_of_flags_that_train_takes():
    import train

    for cell, seed in compare.list_runs(compare.EXPERIMENTS | {"quick": ("", compare.QUICK)}, [7]):
        _, args = train.parse(compare.flags_of(cell, seed, ROOT / "x", []))
        assert (args.toy, args.method, args.seed) == (cell.world, cell.method, 7)
        assert args.difficulty == cell.difficulty
        assert args.eval_every == (10 if cell.curve else 0)


def test_the_readme_shows_rows_that_the_commands_wrote():
    """Every row of a results table in the README stands in results/*.md, digit by digit."""
    written = "\n".join(path.read_text() for path in (ROOT / "results").glob("*.md"))
    written = {line.strip() for line in written.splitlines()}
    shown = [line for line in (ROOT / "README.md").read_text().splitlines()
             if re.match(r"\| [a-z0-9.-]+ \| \d+ \| ", line) and "→" in line]
    assert len(shown) > 20
    for line in shown:
        assert line.strip() in written, line
    for name in re.findall(r"results/[\w.-]+\.(?:png|json|md)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name
