"""The README's pictures, drawn from results/compare.json.

    python benchmarks/figures.py                               results/*.png
    python benchmarks/figures.py --results FILE --out FOLDER   from and to somewhere else

    curves.png               accuracy against training steps, a panel per world
    difficulty.png           accuracy at the end against the number of moves in the problem
    budget.png               accuracy at the end against the supervised tokens of a rollout
    grades.png               accuracy at the end against how bad the teacher is
    sensitivity-<flag>.png   accuracy at the end against one flag of train.py, every seed a dot

`benchmarks/compare.py` calls `draw` when its runs are done. What is not among the runs is left out:
a line, a panel, or a figure. The last line printed is JSON: the names of the figures written.

A run is one entry of the record's "runs": a dict with world, method, flags (a list of strings),
moves, seed, steps, accuracy (one per step), supervised_tokens. A point is (x, mean over seeds,
half the width of the 95% t interval of that mean; nan for a single seed).

The upper half of this file is arithmetic on runs and needs no matplotlib; the lower half draws.
"""

import argparse
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NEEDED = "matplotlib is needed for the figures: pip install -r benchmarks/requirements.txt"

# A method looks the same in every figure: colour (Okabe and Ito's, safe for the colour-blind),
# dashes, marker. Two methods share a colour only where no panel has both.
ORANGE, SKY, GREEN, BLUE, RED, PINK = "#E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7".split()
GREY = "#777777"
LGR_MEAN = "lgr, mean, γ = 4"
LOOKS = {
    "opd": (RED, "-", "s"),
    "release": (BLUE, "-", "o"),
    "prefix": (GREEN, "-", "D"),
    "shuffled": (PINK, (0, (5, 1.5)), "^"),
    "random": (ORANGE, (0, (1, 1)), "v"),
    "std": (SKY, (0, (4, 1, 1, 1)), "x"),
    "rkl": (ORANGE, "-", "D"),
    "fkl": (PINK, (0, (5, 1.5)), "^"),
    "jsd": (SKY, (0, (4, 1, 1, 1)), "v"),
    "lgr": (GREEN, "-", "^"),
    "lgr_topk": (PINK, "-", "v"),
    "release+lgr": (SKY, (0, (2, 1)), "D"),
    LGR_MEAN: (GREEN, (0, (2, 1)), "v"),
    "untrained": (GREY, (0, (4, 3)), None),
}
CONTROLS = ["opd", "release", "prefix", "shuffled", "random", "std"]
LOOKAHEAD = ["opd", "lgr", "lgr_topk", "release+lgr"]
CURVES = [  # title, world, methods
    ("horizon", "horizon", CONTROLS),
    ("varied", "varied", CONTROLS),
    ("horizon: objectives", "horizon", ["opd", "release", "rkl", "fkl", "jsd"]),
    ("fork", "fork", LOOKAHEAD),
    ("fork-mirror", "fork-mirror", LOOKAHEAD),
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
# flag: world, method, default, unit, and whether its values are numbers
SENSITIVITY = {
    "margin-top-k": ("varied", "release", "4", "candidates", True),
    "min-segments": ("varied", "release", "2", "sentences", True),
    "rescale": ("varied", "release", "batch", "scope", False),
    "lgr-gamma": ("fork", "lgr", "1", "weight γ of the group reward", True),
    "lgr-tau": ("fork", "lgr", "0.2", "nats", True),
    "lgr-normalize": ("fork", "lgr", "std", "of a group's rewards", False),
}
COMPANIONS = {"lgr-normalize": {"--lgr-gamma": "γ", "--lgr-eps": "ε"}}  # flags varied along with it

ACCURACY = "accuracy (mean@4, held-out problems)"
BANDS = "bands: 95% t interval of the mean over seeds"
BARS = "bars: 95% t interval of the mean over seeds"


# ----------------------------------------------------------------------------------- statistics


@functools.cache
def t975(df: int) -> float:
    """The 97.5% quantile of Student's t with `df` degrees of freedom.

    With t = sqrt(df) tan a, P(|T| < t) is the integral of cos(a)^(df - 1) from 0 to a, divided by
    the same from 0 to pi/2. Summed up on a grid; right to six digits for df up to 1000.

    >>> [round(t975(df), 3) for df in (1, 2, 4, 9)]
    [12.706, 4.303, 2.776, 2.262]
    """
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}")
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (df - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])  # trapezoids
    return float(np.sqrt(df) * np.tan(np.interp(0.95 * below[-1], below, angle)))


def statistics_of(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% t interval: t975(n - 1) s / sqrt(n); nan for n = 1.

    >>> statistics_of([1.0, 3.0])                # s = sqrt(2), so s / sqrt(n) = 1
    (2.0, 12.706...)
    """
    if not len(values):
        raise ValueError("values must not be empty")
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, math.nan
    return mean, t975(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5


# ----------------------------------------------------------------------------------------- data


def settings(flags: list[str]) -> dict[str, str]:
    """Flags as a dict, so that their order does not matter.

    >>> settings(["--lgr-normalize", "mean", "--lgr-gamma", "4"])
    {'--lgr-normalize': 'mean', '--lgr-gamma': '4'}
    """
    found, name = {}, ""
    for word in flags:
        if word.startswith("--"):
            name, word = word, ""
        found[name] = f"{found.get(name, '')} {word}".strip()
    return found


def usual_moves(world: str) -> int:
    """The difficulty at which the worlds are compared: what train.py takes without --difficulty."""
    if world == "fork-mirror":
        return 2
    return 6 if world.startswith("fork") else 12


def select(runs, world, method, flags=(), moves=None) -> list[dict]:
    """The runs (seeds) of one setting; `moves` None for the world's usual difficulty."""
    return [
        run
        for run in runs
        if (run["world"], run["method"]) == (world, method)
        and settings(run["flags"]) == settings(flags)
        and run["moves"] == (moves or usual_moves(world))
    ]


def series(runs, world, method, flags=(), moves=None) -> list[tuple]:
    """Points (step, mean, half width) of one setting, at the steps where all seeds were evaluated.

    >>> run = {"world": "clean", "method": "opd", "flags": [], "moves": 12, "seed": 0}
    >>> runs = [run | {"steps": [0, 10, 30], "accuracy": [0.25, 0.5, 0.75]}]
    >>> runs += [run | {"seed": 1, "steps": [0, 30], "accuracy": [0.25, 0.75]}]
    >>> series(runs, "clean", "opd")
    [(0, 0.25, 0.0), (30, 0.75, 0.0)]
    """
    curves = [dict(zip(r["steps"], r["accuracy"], strict=True))
              for r in select(runs, world, method, flags, moves)]  # fmt: skip
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, *statistics_of([curve[step] for curve in curves])) for step in shared]


def against(runs, x_of, when: int = -1) -> list[tuple]:
    """Points (x, mean, half width) of the accuracy at the end (`when` 0: before) by `x_of(run)`.

    Runs whose `x_of` is None are left out.

    >>> runs = [{"moves": 6, "accuracy": [0.5, 0.9]}, {"moves": 2, "accuracy": [0.7, 0.8]}]
    >>> against(runs, lambda run: run["moves"], when=0)
    [(2, 0.7, nan), (6, 0.5, nan)]
    """
    groups: dict[float, list[float]] = {}
    for run in runs:
        if (x := x_of(run)) is not None:
            groups.setdefault(x, []).append(run["accuracy"][when])
    return [(x, *statistics_of(groups[x])) for x in sorted(groups)]


def difficulty_lines(runs, world, methods) -> dict[str, list[tuple]]:
    """{method or "untrained": points (moves, ...)} of a world, other flags at their defaults."""
    plain = [r for r in runs if r["world"] == world and r["method"] in methods and not r["flags"]]
    lines = {
        method: against([run for run in plain if run["method"] == method], lambda run: run["moves"])
        for method in methods
    }
    lines["untrained"] = against(plain, lambda run: run["moves"], when=0)
    return {name: points for name, points in lines.items() if points}


def grade_of(world: str, named: dict[str, float]) -> float | None:
    """How bad a world's teacher is: by name, or the number in the name; None for other worlds.

    >>> [grade_of(world, {"fork": 0.5}) for world in ("fork", "fork-0.1", "fork-mirror", "clean")]
    [0.5, 0.1, None, None]
    """
    if world in named:
        return named[world]
    family, _, number = world.rpartition("-")
    try:
        return float(number) if family in named else None
    except ValueError:
        return None


def grade_lines(runs, named, wanted) -> dict[str, list[tuple]]:
    """{line or "untrained": points (grade, ...)}, every world at its usual difficulty."""
    usual = [run for run in runs if run["moves"] == usual_moves(run["world"])]
    lines, used = {}, []
    for name, (method, flags) in wanted.items():
        same = [run for run in usual if run["method"] == method
                and settings(run["flags"]) == settings(flags)]  # fmt: skip
        lines[name] = against(same, lambda run: grade_of(run["world"], named))
        used += same
    lines["untrained"] = against(used, lambda run: grade_of(run["world"], named), when=0)
    return {name: points for name, points in lines.items() if points}


def budget_points(runs, world) -> tuple[list[tuple], dict[str, tuple]]:
    """(points of the fixed prefixes, {method: point}); x is the supervised tokens per rollout."""

    def point(group):
        tokens = float(np.mean([run["supervised_tokens"] for run in group]))
        return (tokens, *statistics_of([run["accuracy"][-1] for run in group]))

    lengths = {tuple(r["flags"]) for r in runs if set(settings(r["flags"])) == {"--prefix-tokens"}}
    fixed = [select(runs, world, "prefix", flags) for flags in sorted(lengths)]
    single = {method: select(runs, world, method) for method in CONTROLS}
    return (
        sorted(point(group) for group in fixed if group),
        {method: point(group) for method, group in single.items() if group},
    )


def sensitivity_values(runs, flag: str) -> dict[str, dict[int, float]]:
    """{value of the flag: {seed: accuracy at the end}}, numbers in order, words as they come.

    The default's runs have no flags. Flags varied along with this one are named in the value.
    """
    world, method, default, _, numeric = SENSITIVITY[flag]
    companions = COMPANIONS.get(flag, {})
    found: dict[str, dict[int, float]] = {default: {}}
    for run in runs:
        given = settings(run["flags"])
        others = [name for name in given if name != f"--{flag}"]
        # alone, --lgr-gamma is another figure's; --lgr-eps is this one's
        ours = f"--{flag}" in given or "--lgr-eps" in given or not given
        if (run["world"], run["method"], run["moves"]) != (world, method, usual_moves(world)):
            continue
        if ours and set(others) <= set(companions):
            value = given.get(f"--{flag}", default)
            value += "".join(f"\n{companions[name]} = {given[name]}" for name in others)
            if numeric:
                value = f"{float(value):g}"
            found.setdefault(value, {})[run["seed"]] = run["accuracy"][-1]
    present = {value: seeds for value, seeds in found.items() if seeds}
    return dict(sorted(present.items(), key=lambda item: float(item[0]))) if numeric else present


def spread(heights: list[float], gap: float, low=0.02, high=0.98) -> list[float]:
    """Heights for labels: at least `gap` apart, in the same order, and as near as that allows.

    Less i * gap, the i-th lowest must not fall below the one before: isotonic regression, by
    pooling adjacent violators.

    >>> [round(y, 2) for y in spread([0.5, 0.1, 0.5], 0.1)]
    [0.45, 0.1, 0.55]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    pools: list[list[float]] = []  # members' heights, already less i * gap
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


# -------------------------------------------------------------------------------------- drawing

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.dpi": 130,
    "savefig.dpi": 130,
}


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
    figure.supxlabel(caption, fontsize=7.5, color="#555555", x=0.99, ha="right")
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
                          textcoords="offset points", fontsize=8, color="#555555")  # fmt: skip
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
    points = [(at, *statistics_of(list(seeds.values())))
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
        level = statistics_of([run["accuracy"][-1] for run in opd])[0]
        axes.axhline(level, color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        axes.annotate("opd", (1.02, level), xycoords=axes.get_yaxis_transform(), va="center",
                      fontsize=8.5, color="#555555", annotation_clip=False)  # fmt: skip
    labels = [value + "\ndefault" * (value == default) for value in values]
    labels = [label if "\n" in label else f"{label}\n " for label in labels]  # first lines level
    axes.set_xticks(x, labels)
    axes.minorticks_off()
    axes.margins(x=0.09)
    axes.set_title(f"{world}, {method}")
    axes.set_xlabel(f"--{flag} ({unit})")
    return figure


FIGURES = {
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
    try:
        import matplotlib.style
    except ImportError:
        raise ImportError(NEEDED) from None
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.style.context(["default", STYLE]):  # whatever the reader's own settings
        for name, make in FIGURES.items():
            if (figure := make(record["runs"])) is not None:
                written.append(out / f"{name}.png")
                figure.savefig(written[-1], metadata={"Software": None})
    return written


def main() -> None:
    """Draw what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = ROOT / "results"
    parser.add_argument("--results", type=Path, default=results / "compare.json", metavar="FILE")
    parser.add_argument("--out", type=Path, default=results, metavar="FOLDER")
    args = parser.parse_args()
    if not args.results.is_file():
        sys.exit(f"no file {args.results}: python benchmarks/compare.py writes one")
    try:
        written = draw(json.loads(args.results.read_text()), args.out)
    except ImportError as error:
        sys.exit(str(error))
    print(json.dumps({"figures": [path.name for path in written]}))


if __name__ == "__main__":
    main()
