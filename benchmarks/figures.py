"""The README's pictures, drawn from results/compare.json.

    python benchmarks/figures.py                               results/*.png
    python benchmarks/figures.py --results FILE --out FOLDER   from and to somewhere else

    first.png                the README's two panels
    curves.png               accuracy against training steps, a panel per world
    difficulty.png           accuracy at the end against the number of moves in the problem
    budget.png               accuracy at the end against the supervised tokens of a rollout
    grades.png               accuracy at the end against how bad the teacher is
    sensitivity-<flag>.png   accuracy at the end against one flag of train.py, every seed a dot

`benchmarks/compare.py` calls `draw` when its runs are done. What is not among the runs is left out:
a line, a panel, or a figure. The last line printed is JSON: the names of the figures written.
"""

import argparse
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import style  # noqa: E402
from benchmarks.intervals import mean_and_half  # noqa: E402
from benchmarks.points import (  # noqa: E402
    CONTROLS,
    SENSITIVITY,
    budget_points,
    difficulty_lines,
    grade_lines,
    select,
    sensitivity_values,
    series,
)
from benchmarks.style import DARK_GREY, GREEN, GREY, LGR_MEAN, LOOKS  # noqa: E402

LOOKAHEAD = ["opd", "lgr", "lgr_topk", "release+lgr"]
CURVES = [  # title, world, methods
    ("horizon", "horizon", CONTROLS),
    ("varied", "varied", CONTROLS),
    ("horizon: objectives", "horizon", ["opd", "release", "rkl", "fkl", "jsd"]),
    ("fork", "fork", LOOKAHEAD),
    ("fork-mirror", "fork-mirror", LOOKAHEAD),
]
FIRST = [  # of the README: title, world, methods
    ("the teacher gets lost on its way", "varied", ["opd", "prefix", "release"]),
    ("after one wording it gets lost", "fork", ["opd", "lgr"]),
]
DIFFICULTY = [("horizon", ["opd", "release"]), ("fork", ["opd", "lgr"])]
TEACHERS_HORIZON = 6  # moves that the teacher of `horizon` knows
GRADES = [  # title, x axis, {world named without its grade: grade}, {line: (method, flags)}
    (
        "horizon-c",
        "share c of garbled moves after\nmove 6 in the teacher's data",
        {"clean": 0.0, "horizon": 0.7},
        {"opd": ("opd", []), "release": ("release", [])},
    ),
    (
        "fork-s",
        'share s of slips after "thus"\nin the teacher\'s data',
        {"fork": 0.5},
        {
            "opd": ("opd", []),
            "lgr": ("lgr", []),
            LGR_MEAN: ("lgr", ["--lgr-normalize", "mean", "--lgr-gamma", "4"]),
        },
    ),
]

ACCURACY = "accuracy (mean@4, held-out problems)"
BANDS = "bands: 95% t interval of the mean over seeds"
BARS = "bars: 95% t interval of the mean over seeds"


def spread(heights: list[float], gap: float, low=0.02, high=0.98) -> list[float]:
    """Heights for labels: at least `gap` apart, in the same order, and as near as that allows.

    With i * gap subtracted from the i-th lowest, heights must not decrease: isotonic regression
    by pooling adjacent violators.

    >>> [round(y, 2) for y in spread([0.5, 0.1, 0.5], 0.1)]
    [0.45, 0.1, 0.55]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    pools: list[list[float]] = []  # members' heights, i * gap subtracted
    for rank, i in enumerate(order):
        pools.append([heights[i] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    flat = [float(np.mean(pool)) for pool in pools for _ in pool]
    top = max(low, high - (len(heights) - 1) * gap)
    placed = [0.0] * len(heights)
    for rank, i in enumerate(order):
        placed[i] = min(max(flat[rank], low), top) + rank * gap
    return placed


def panels(count: int, columns: int, width: float, height: float, caption: str):
    """A figure with `count` panels of accuracy, in inches each, and the caption at its bottom."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure((max(width * columns, 4.2), height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for k, axes in enumerate(grid.flat):
        if k >= count:
            axes.remove()
            continue
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        if k % columns:
            axes.tick_params(labelleft=False)
    if rows == 1:
        grid[0, 0].set_ylabel(ACCURACY.replace(" (", "\n("))  # as high as a low panel
    else:
        figure.supylabel(ACCURACY, fontsize=9)
    style.caption(figure, caption)
    return figure, list(grid.flat)[:count]


def draw_line(axes, points, name: str, bars: bool) -> None:
    """One method's means, with a band or with error bars."""
    x, mean, half = map(np.array, zip(*points, strict=True))
    colour, dashes, marker = LOOKS[name]
    if marker is None:
        axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=0.9, zorder=1)
    elif bars:
        axes.errorbar(x, mean, yerr=half, color=colour, linestyle=dashes, marker=marker,
                      elinewidth=1, capsize=2)  # fmt: skip
    else:
        axes.plot(x, mean, color=colour, linestyle=dashes)
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
        if len(x) == 1:
            axes.plot(x, mean, color=colour, marker=marker)


def draw_lines(axes, lines: dict[str, list[tuple]], bars: bool, gap: float) -> None:
    """Lines, each named at its right end; names that would overlap are moved apart.

    gap: the height of a line of text, in units of the accuracy axis.
    """
    for name, points in lines.items():
        draw_line(axes, points, name, bars)
    right = max(points[-1][0] for points in lines.values())
    heights = spread([points[-1][1] for points in lines.values()], gap)
    for (name, points), height in zip(lines.items(), heights, strict=True):
        axes.annotate(
            name, (points[-1][0], points[-1][1]), (1.13, height), annotation_clip=False,
            textcoords=axes.get_yaxis_transform(), va="center", fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": LOOKS[name][0], "linewidth": 0.9,
                        "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4 if bars else 1},
        )  # fmt: skip
    left = min(points[0][0] for points in lines.values())
    if right > left:
        pad = 0.04 * (right - left) if bars else 0
        axes.set_xlim(left - pad, right + pad)


def curves_figure(runs):
    """Accuracy against training steps: what the methods do to each other's student over time."""
    found = []
    for title, world, methods in CURVES:
        lines = {method: series(runs, world, method) for method in methods}
        lines = {method: points for method, points in lines.items() if points}
        # of the objectives nothing but opd and release: the world's first panel has them already
        repeated = any(w == world and lines.keys() <= shown.keys() for _, w, shown in found)
        if lines and not repeated:
            found.append((title, world, lines))
    if not found:
        return None
    figure, grid = panels(len(found), 3, 8.5 / 3, 2.7, BANDS)
    for k, (axes, (title, _, lines)) in enumerate(zip(grid, found, strict=True)):
        draw_lines(axes, lines, bars=False, gap=0.085)
        axes.set_title(title)
        if k + 3 >= len(found):
            axes.set_xlabel("training steps")
    return figure


def first_figure(runs):
    """The README's: where the release rule helps, and where lookahead does."""
    found = [(f"{world}: {title}", {m: series(runs, world, m) for m in methods})
             for title, world, methods in FIRST]  # fmt: skip
    if not all(points for _, lines in found for points in lines.values()):
        return None
    figure, grid = panels(2, 2, 4.0, 2.7, BANDS)
    for axes, (title, lines) in zip(grid, found, strict=True):
        draw_lines(axes, lines, bars=False, gap=0.085)
        axes.set_title(title)
        axes.set_xlabel("training steps")
    return figure


def difficulty_figure(runs):
    """Accuracy at the end against the number of moves, within and beyond the teacher's horizon."""
    found = [(world, difficulty_lines(runs, world, methods)) for world, methods in DIFFICULTY]
    found = [(world, lines) for world, lines in found
             if any(len(points) > 1 for points in lines.values())]  # fmt: skip
    if not found:
        return None
    figure, grid = panels(len(found), 2, 4.25, 3.4, BARS)
    for axes, (world, lines) in zip(grid, found, strict=True):
        draw_lines(axes, lines, bars=True, gap=0.07)
        axes.set_title(world)
        axes.set_xlabel("moves n in the problem\n(response length: 11 n + 17 tokens)")
        axes.set_xticks(sorted({x for points in lines.values() for x, *_ in points}))
        if world == "horizon":
            axes.axvline(TEACHERS_HORIZON, color=GREY, linewidth=0.8, zorder=0)
            axes.annotate("teacher's\nhorizon", (TEACHERS_HORIZON, 0), (-3, 3), ha="right",
                          textcoords="offset points", fontsize=8, color=DARK_GREY)  # fmt: skip
    return figure


def budget_figure(runs):
    """Accuracy at the end against supervised tokens: is it the number, or the place?"""
    found = [(world, *budget_points(runs, world)) for world in ("horizon", "varied")]
    found = [(world, fixed, single) for world, fixed, single in found if fixed]
    if not found:
        return None
    figure, grid = panels(len(found), 2, 4.25, 3.4, BARS)
    names = {"opd": "opd: every token", "release": "release", "prefix": "prefix, same share"}
    handles = {}
    for axes, (world, fixed, single) in zip(grid, found, strict=True):
        line = fixed + [single["opd"]] * ("opd" in single)
        x, mean, half = zip(*line, strict=True)
        handles["prefix of N tokens"] = axes.errorbar(
            x, mean, yerr=half, color=GREEN, marker=".", elinewidth=1, capsize=2, zorder=2)
        for method, (x, mean, half) in single.items():
            colour, _, marker = LOOKS[method]
            # the same budget puts these at the same place: hollow, so that all can be seen
            face = colour if method in ("opd", "release") else "none"
            handles[names.get(method, method)] = axes.errorbar(
                x, mean, yerr=half, color=colour, marker=marker, markerfacecolor=face, capsize=3,
                markersize=7, markeredgewidth=1.4, elinewidth=1.2, linestyle="none", zorder=3)
        axes.set_xlim(left=0)
        axes.set_title(world)
        axes.set_xlabel("supervised tokens per rollout")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def grades_figure(runs):
    """Accuracy at the end against how bad the teacher is."""
    found = [(title, label, grade_lines(runs, named, wanted))
             for title, label, named, wanted in GRADES]  # fmt: skip
    found = [(title, label, lines) for title, label, lines in found
             if any(len(points) > 1 for points in lines.values())]  # fmt: skip
    if not found:
        return None
    figure, grid = panels(len(found), 2, 4.25, 3.4, BARS)
    for axes, (title, label, lines) in zip(grid, found, strict=True):
        draw_lines(axes, lines, bars=True, gap=0.07)
        axes.set_title(title)
        axes.set_xlabel(label)
    return figure


def sensitivity_figure(runs, flag: str):
    """Accuracy at the end against one flag: every seed, their mean, and the level of plain OPD."""
    from matplotlib.transforms import ScaledTranslation

    world, method, default, unit, numeric = SENSITIVITY[flag]
    values = sensitivity_values(runs, flag)
    if not set(values) - {default}:
        return None
    figure, (axes,) = panels(1, 1, 4.2, 3.0, f"dots: seeds; {BARS}")
    x = [float(value) for value in values] if numeric else list(range(len(values)))
    points = [(at, *mean_and_half(list(seeds.values())))
              for at, seeds in zip(x, values.values(), strict=True)]  # fmt: skip
    colour, _, marker = LOOKS[method]
    if numeric:  # logarithmic, with room for a zero
        smallest = min((value for value in x if value > 0), default=1)
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    beside = axes.transData + ScaledTranslation(-7 / 72, 0, figure.dpi_scale_trans)
    for at, seeds in zip(x, values.values(), strict=True):
        axes.plot([at] * len(seeds), list(seeds.values()), ".", color=colour, alpha=0.6,
                  markersize=5.5, markeredgewidth=0, transform=beside)  # fmt: skip
    at, mean, half = zip(*points, strict=True)
    axes.errorbar(at, mean, yerr=half, color=colour, marker=marker, capsize=3, elinewidth=1.2,
                  linewidth=0.8, linestyle="-" if numeric else "none")  # fmt: skip
    if opd := select(runs, world, "opd"):
        level = mean_and_half([run["accuracy"][-1] for run in opd])[0]
        axes.axhline(level, color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        axes.annotate("opd", (1.02, level), xycoords=axes.get_yaxis_transform(), va="center",
                      fontsize=8.5, color=DARK_GREY, annotation_clip=False)  # fmt: skip
    labels = [value + "\ndefault" * (value == default) for value in values]
    labels = [label if "\n" in label else f"{label}\n " for label in labels]  # first lines level
    axes.set_xticks(x, labels)
    axes.minorticks_off()
    axes.margins(x=0.09)
    axes.set_title(f"{world}, {method}")
    axes.set_xlabel(f"--{flag} ({unit})")
    return figure


FIGURES = {
    "first": first_figure,
    "curves": curves_figure,
    "difficulty": difficulty_figure,
    "budget": budget_figure,
    "grades": grades_figure,
    **{f"sensitivity-{flag}": functools.partial(sensitivity_figure, flag=flag)
       for flag in SENSITIVITY},
}  # fmt: skip


def draw(record: dict, out: Path) -> list[Path]:
    """Write every figure whose runs are in the record; their paths.

    Raises ImportError without matplotlib.
    """
    out = Path(out)
    written = []
    with style.applied():
        out.mkdir(parents=True, exist_ok=True)
        for name, make in FIGURES.items():
            if (figure := make(record["runs"])) is not None:
                written.append(out / f"{name}.png")
                style.save(figure, written[-1])
    return written


def main(argv: list[str] | None = None) -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = ROOT / "results"
    parser.add_argument("--results", type=Path, default=results / "compare.json", metavar="FILE")
    parser.add_argument("--out", type=Path, default=results, metavar="FOLDER")
    args = parser.parse_args(argv)
    if not args.results.is_file():
        sys.exit(f"no file {args.results}: python benchmarks/compare.py writes one")
    try:
        written = draw(json.loads(args.results.read_text()), args.out)
    except ImportError as error:
        sys.exit(str(error))
    print(json.dumps({"figures": [path.name for path in written]}))


if __name__ == "__main__":
    main()
