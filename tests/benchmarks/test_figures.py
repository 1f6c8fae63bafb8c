"""The figures say what the runs say: the numbers first, then that the pictures get written."""

import doctest
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import last_line

from benchmarks import figures, intervals, points, style

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def run(world="horizon", method="opd", seed=0, flags=(), moves=12, accuracy=(0.2, 0.4), steps=None,
        tokens=100.0):  # fmt: skip
    """One run, as in the record of benchmarks/compare.py."""
    steps = steps or [10 * i for i in range(len(accuracy))]
    return {"world": world, "method": method, "seed": seed, "flags": list(flags), "moves": moves,
            "steps": steps, "accuracy": list(accuracy), "supervised_tokens": tokens}  # fmt: skip


def close(points, expected):
    """Both lists of points agree, nan with nan."""
    assert len(points) == len(expected)
    np.testing.assert_allclose(points, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["figures", "intervals", "points", "tables", "timing"])
def test_doctests(name):
    done = doctest.testmod(importlib.import_module(f"benchmarks.{name}"),
                           optionflags=doctest.ELLIPSIS)  # fmt: skip
    assert done.failed == 0 and done.attempted > 0


# df, two-sided 95%, as printed in tables
@pytest.mark.parametrize("df, value", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262),
                                       (30, 2.042), (120, 1.980), (1000, 1.962)])  # fmt: skip
def test_t975(df, value):
    assert round(intervals.t975(df), 3) == value


def test_t975_closed_forms():
    """df 1 is Cauchy; df 2 has t = (2p - 1) sqrt(2 / (4 p (1 - p)))."""
    assert intervals.t975(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-6)
    assert intervals.t975(2) == pytest.approx(0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)), rel=1e-6)
    with pytest.raises(ValueError, match="df must be at least 1, got 0"):
        intervals.t975(0)


def test_statistics():
    """1, 2, 3, 4, 5: mean 3, s^2 = 10 / 4, half width 2.776 sqrt(2.5 / 5)."""
    mean, half = intervals.mean_and_half([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    assert intervals.mean_and_half([0.5, 0.5, 0.5]) == (0.5, 0)
    mean, half = intervals.mean_and_half([0.7])
    assert mean == 0.7 and math.isnan(half)
    with pytest.raises(ValueError, match="values"):
        intervals.mean_and_half([])


def test_series():
    """Two seeds 0.2 apart: half width 12.706 * 0.1; only shared steps; nothing but this setting."""
    runs = [
        run(seed=0, accuracy=[0.1, 0.5, 0.6], steps=[0, 10, 30]),
        run(seed=1, accuracy=[0.3, 0.8], steps=[0, 30]),
        run(seed=0, method="release"),
        run(seed=0, world="clean"),
        run(seed=0, moves=6, accuracy=[0.9, 1.0], steps=[0, 30]),
        run(seed=0, flags=["--lgr-gamma", "4", "--lgr-normalize", "mean"], accuracy=[0.0, 0.0]),
    ]
    close(points.series(runs, "horizon", "opd"), [(0, 0.2, 1.270620), (30, 0.7, 1.270620)])
    close(points.series(runs, "horizon", "opd", moves=6), [(0, 0.9, math.nan), (30, 1, math.nan)])
    swapped = ["--lgr-normalize", "mean", "--lgr-gamma", "4"]
    assert [p[:2] for p in points.series(runs, "horizon", "opd", swapped)] == [(0, 0), (10, 0)]
    assert points.series(runs, "varied", "opd") == []


def test_difficulty_lines():
    runs = [run(moves=n, seed=s, accuracy=[1 / n, 1 - n / 20]) for n in (6, 2) for s in (0, 1)]
    runs += [run(moves=2, flags=["--lgr-tau", "1"]), run(moves=2, method="std")]
    lines = points.difficulty_lines(runs, "horizon", ["opd", "release"])
    assert list(lines) == ["opd", "untrained"]
    close(lines["opd"], [(2, 0.9, 0), (6, 0.7, 0)])
    close(lines["untrained"], [(2, 0.5, 0), (6, 1 / 6, 0)])


def test_grade_lines():
    """Graded worlds at their usual difficulty; the mirror is no grade of the fork."""
    _, _, named, wanted = figures.GRADES[1]
    mean = ["--lgr-gamma", "4", "--lgr-normalize", "mean"]
    runs = [
        run("fork", "lgr", moves=6, accuracy=[0.1, 0.6]),
        run("fork-1.0", "lgr", moves=6, accuracy=[0.1, 0.5]),
        run("fork-0.1", "lgr", moves=6, accuracy=[0.1, 0.8], flags=mean),
        run("fork", "lgr", moves=2, accuracy=[0.4, 0.9]),
        run("fork", "lgr", moves=6, accuracy=[0.1, 0.0], flags=["--lgr-gamma", "4"]),
        run("fork-mirror", "lgr", moves=2, accuracy=[0.1, 0.0]),
    ]
    lines = points.grade_lines(runs, named, wanted)
    assert list(lines) == ["lgr", figures.LGR_MEAN, "untrained"]
    close(lines["lgr"], [(0.5, 0.6, math.nan), (1, 0.5, math.nan)])
    close(lines[figures.LGR_MEAN], [(0.1, 0.8, math.nan)])
    assert [point[:2] for point in lines["untrained"]] == [(0.1, 0.1), (0.5, 0.1), (1, 0.1)]


def test_budget_points():
    """Prefixes in the order of their tokens, not of their flags' spelling."""
    runs = [run("varied", "prefix", flags=["--prefix-tokens", n], tokens=float(n), seed=s,
                accuracy=[0, 1 / int(n)]) for n in ("100", "20") for s in (0, 1)]  # fmt: skip
    runs += [run("varied", "prefix", tokens=50, accuracy=[0, 0.3]),
             run("varied", "prefix", tokens=60, accuracy=[0, 0.3], seed=1),
             run("varied", "opd", tokens=149, accuracy=[0, 0.1]),
             run("varied", "std", flags=["--budget", "own"])]  # fmt: skip
    fixed, single = points.budget_points(runs, "varied")
    close(fixed, [(20, 0.05, 0), (100, 0.01, 0)])
    assert list(single) == ["opd", "prefix"]
    close([single["prefix"]], [(55, 0.3, 0)])
    assert points.budget_points(runs, "horizon") == ([], {})


def test_sensitivity_values():
    """Numbers in order, the default in its place, no seed twice, combinations where they belong."""
    runs = [run("fork", "lgr", moves=6, seed=s, accuracy=[0, value], flags=flags)
            for s in (0, 1)
            for value, flags in [
                (0.6, []), (0.6, ["--lgr-gamma", "1.0"]), (0.2, ["--lgr-gamma", "10"]),
                (0.3, ["--lgr-gamma", "0.3"]), (0.7, ["--lgr-normalize", "mean"]),
                (0.8, ["--lgr-normalize", "mean", "--lgr-gamma", "4"]),
                (0.5, ["--lgr-eps", "0.01"])]]  # fmt: skip
    runs += [run("fork", "lgr", flags=["--lgr-gamma", "3"], moves=2)]
    found = points.sensitivity_values(runs, "lgr-gamma")
    assert list(found.items()) == [
        ("0.3", {0: 0.3, 1: 0.3}), ("1", {0: 0.6, 1: 0.6}), ("10", {0: 0.2, 1: 0.2})]  # fmt: skip
    found = points.sensitivity_values(runs, "lgr-normalize")
    assert {value: seeds[0] for value, seeds in found.items()} == {
        "std": 0.6, "mean": 0.7, "mean\nγ = 4": 0.8, "std\nε = 0.01": 0.5}  # fmt: skip
    assert points.sensitivity_values([], "rescale") == {}


@pytest.mark.parametrize("heights", [[0.0, 0.0, 0.0], [1, 0.99, 0.5, 0.98], [0.3], [0.2, 0.8]])
def test_spread(heights):
    """Apart, inside, in order, and untouched where there is room."""
    placed = figures.spread(heights, 0.1, low=0, high=1)
    assert np.diff(np.sort(placed)).min(initial=1) >= 0.1 - 1e-9
    assert min(placed) >= 0 and max(placed) <= 1 + 1e-9
    assert np.array_equal(np.argsort(placed, kind="stable"), np.argsort(heights, kind="stable"))
    if heights in ([0.3], [0.2, 0.8]):
        assert placed == pytest.approx(heights)


def test_same_defaults_as_the_code():
    """The figures name defaults and difficulties; train.py and toy decide them."""
    import toy
    from train import FLAGS, METHODS


    defaults = {flag: default for flags in FLAGS.values() for flag, default, *_ in flags}
    for flag, (world, method, default, _, numeric) in points.SENSITIVITY.items():
        expected = defaults[f"--{flag}"]
        assert (float(default) == expected) if numeric else (default == expected)
        assert world in toy.WORLDS and method in METHODS
    assert {name: points.usual_moves(name) for name in toy.WORLDS} == {
        name: world.moves for name, world in toy.WORLDS.items()}  # fmt: skip
    assert set(figures.LOOKS) - {figures.LGR_MEAN, "untrained"} <= set(METHODS)
    horizons, forks = (named for _, _, named, _ in figures.GRADES)
    for name in toy.WORLDS:
        noise = toy.WORLDS[name].noise
        if (grade := points.grade_of(name, horizons)) is not None:
            assert grade == noise.get("corruption", 0)
        if (grade := points.grade_of(name, forks)) is not None:
            assert grade == noise["wordings"]["thus"][0]


def everything(seeds=2):
    """A record with at least two points for every figure."""
    runs = []
    for s in range(seeds):
        wave = [0.2, 0.5 + 0.01 * s, 0.6 + 0.02 * s]
        for _, world, methods in figures.CURVES:
            moves = points.usual_moves(world)
            runs += [run(world, method, s, moves=moves, accuracy=wave) for method in methods]
        runs += [run(world, "opd", s, moves=4, accuracy=wave) for world in ("horizon", "fork")]
        runs += [run(world, "prefix", s, ["--prefix-tokens", "28"], accuracy=wave, tokens=28.0)
                 for world in ("horizon", "varied")]  # fmt: skip
        runs += [run("fork-0.1", "lgr", s, moves=6, accuracy=wave)]
        runs += [run("clean", "opd", s, accuracy=wave)]
        for flag, (world, method, *_, numeric) in points.SENSITIVITY.items():
            value = "8" if numeric else "other"
            runs.append(run(world, method, s, [f"--{flag}", value], points.usual_moves(world)))
    return {"runs": runs}


def is_png(path, width):
    """A PNG of that many pixels across, without a text chunk, such as a date."""
    data = path.read_bytes()
    return data.startswith(PNG) and int.from_bytes(data[16:20]) == width and b"tEXt" not in data


def test_draw(tmp_path):
    pytest.importorskip("matplotlib")
    written = figures.draw(everything(), tmp_path / "new")
    assert [path.stem for path in written] == list(figures.FIGURES)
    for path in written:
        width = {"first": 1040}.get(path.stem, 1105)
        assert is_png(path, 546 if path.stem.startswith("sensitivity") else width), path


def test_draw_twice(tmp_path):
    """The same runs give the same bytes."""
    pytest.importorskip("matplotlib")
    runs = [run(), run("fork", "lgr", moves=6, flags=["--lgr-tau", "0"])]
    first, second = (figures.draw({"runs": runs}, tmp_path / name) for name in "ab")
    assert len(first) == 2
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_draw_leaves_out_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    assert figures.draw({"runs": []}, tmp_path) == []
    assert [p.name for p in figures.draw({"runs": [run()]}, tmp_path)] == ["curves.png"]
    only = [run("fork", "lgr", moves=6, flags=["--lgr-tau", "0"])]  # nor is there a default
    assert [p.name for p in figures.draw({"runs": only}, tmp_path)] == ["sensitivity-lgr-tau.png"]
    two = [r for r in everything(seeds=1)["runs"] if r["world"] in ("fork", "varied")]
    names = {path.stem for path in figures.draw({"runs": two}, tmp_path)}
    assert names == set(figures.FIGURES) - {"grades"}


def test_drawn_numbers():
    """What matplotlib was given is what the runs say: the curve of a panel, a flag's means."""
    pytest.importorskip("matplotlib")
    runs = [run(accuracy=[0.1, 0.5]), run(seed=1, accuracy=[0.3, 0.9])]
    (axes,) = figures.curves_figure(runs).axes
    assert axes.get_ylim() == (0, 1) and axes.get_title() == "horizon"
    close(axes.lines[0].get_xydata(), [(0, 0.2), (10, 0.7)])
    runs = [run("varied", "release", accuracy=[0, 0.6]), run("varied", accuracy=[0, 0.1])]
    runs += [run("varied", "release", flags=["--margin-top-k", "16"], accuracy=[0, 0.8])]
    (axes,) = figures.sensitivity_figure(runs, "margin-top-k").axes
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert [[4, 0.6], [16, 0.8]] in drawn and [[0, 0.1], [1, 0.1]] in drawn
    ticks = [label.get_text().strip() for label in axes.get_xticklabels()]
    assert ticks == ["4\ndefault", "16"]


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "some.json").write_text(json.dumps({"runs": [run()]}))
    words = ["--results", tmp_path / "some.json", "--out", tmp_path]
    assert last_line(capsys, figures.main, *words)[0] == {"figures": ["curves.png"]}
    assert is_png(tmp_path / "curves.png", 546)
    with pytest.raises(SystemExit, match="^no file .*none.json"):
        figures.main(["--results", str(tmp_path / "none.json")])


def test_without_matplotlib(tmp_path, monkeypatch):
    """One line says what to install; importing figures, for its statistics, needs nothing."""
    for name in ("matplotlib", "matplotlib.style"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="^matplotlib is needed for the figures: pip install"):
        figures.draw({"runs": []}, tmp_path)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('hidden')\n")
    (tmp_path / "some.json").write_text('{"runs": []}')
    command = [sys.executable, "benchmarks/figures.py", "--results", tmp_path / "some.json",
               "--out", tmp_path]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120,
                          env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 1 and done.stderr == style.NEEDED + "\n" and not done.stdout
