r"""Is `diagnose.py` right? Its advice before training against what training did, and t* after it.

    python benchmarks/verdicts.py                     both tables and the picture of the README
    python benchmarks/verdicts.py --seeds 0 --jobs 1  a part of it, into runs/verdicts

1. The advice: `diagnose.py` on every world (and on easier problems of `horizon`) for which
   results/compare.json, or the second part, knows what methods achieve, with several seeds of its
   sampling. Its regret is the accuracy of the best method that was measured, or of not training at
   all, minus that of the method that it suggests. Its thresholds were chosen with the worlds marked
   "seen" in view.
2. After training: `diagnose.py --compare` on students that opd, release, lgr and release+lgr have
   trained, five seeds each: has the curve of the teacher's confidence moved? Trains what is not in
   runs/compare.

Writes verdicts.json, verdicts.md and after.png into results/. The last line printed is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402
from benchmarks import runs as training  # noqa: E402
from benchmarks import style, tables  # noqa: E402
from benchmarks.intervals import mean_and_half, plus_minus  # noqa: E402
from diagnose import curves  # noqa: E402

SEEN = ["horizon", "clean", "varied", "confident", "off-by-one", "fork", "fork-mirror"]
CASES = [(world, toy.world(world).moves) for world in [
    *SEEN, "horizon-0.05", "horizon-0.1", "horizon-0.2", "horizon-0.3",
    "fork-0.1", "fork-0.25", "fork-1.0", "mire",
]] + [("horizon", 3), ("horizon", 6), ("horizon", 9)]  # fmt: skip
ADVICE = ["opd", "release", "lgr", "release+lgr"]  # what it may suggest
AFTER = ["horizon", "varied", "fork", "mire"]
METHODS = ["opd", "release", "lgr", "release+lgr"]


def seen(world: str, moves: int) -> bool:
    """Whether a case was looked at when the thresholds were chosen."""
    return world in SEEN and moves == toy.world(world).moves


def diagnose(world: str, moves: int, seed: int, root: Path, others=()) -> dict:
    """The report of one run of the command; not run again if it is there."""
    out = root / f"{world}-n{moves}-seed{seed}{'-after' if others else ''}"
    if not (out / "report.md").exists():
        command = [sys.executable, "-m", "diagnose", "--toy", world, "--out", str(out),
                   "--difficulty", str(moves), "--seed", str(seed), "--completions", "0",
                   "--no-figures"]  # fmt: skip
        command += ["--compare", *map(str, others)] if others else []
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads((out / "report.json").read_text())


def run_all(tasks: list[tuple], jobs: int) -> list[dict]:
    """Reports of `diagnose` with these arguments, in order."""
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(diagnose, *task) for task in tasks]
        return [future.result() for future in tqdm(running, unit="diagnosis")]


# ------------------------------------------------------------------------------------ the advice
def advice(reports: list[dict], runs: list[dict], world: str, moves: int) -> dict:
    """One line of the first table; accuracies are means over seeds of the training run."""
    of_case = [run for run in runs if (run["world"], run["moves"]) == (world, moves)]
    plain = [run for run in of_case if not run["flags"]]
    after = {
        method: statistics.mean(run["accuracy"][-1] for run in plain if run["method"] == method)
        for method in ADVICE if any(run["method"] == method for run in plain)
    }  # fmt: skip
    after["none"] = statistics.mean(run["accuracy"][0] for run in plain)
    suggested = [r["command"]["method"] or "none" for r in reports]
    students = [r["students"]["student"] for r in reports]
    return {
        "world": world, "moves": moves, "seen": seen(world, moves), "suggested": suggested,
        "teacher": [s["completion"]["teacher"]["mean"] for s in students],
        "after": {name: round(value, 4) for name, value in after.items()},
        "regret": [round(max(after.values()) - after[m], 4) if m in after else None
                   for m in suggested],
    }  # fmt: skip


def advice_table(lines: list[dict]) -> str:
    """The first table in Markdown."""
    head = ["world", "moves", "seen", "suggested (each seed)", "teacher alone", "no training",
            *ADVICE, "regret"]  # fmt: skip
    rows = []
    for line in lines:
        counts = {name: line["suggested"].count(name) for name in dict.fromkeys(line["suggested"])}
        suggested = ", ".join(f"{name} {n}/{len(line['suggested'])}" for name, n in counts.items())
        known = [x for x in line["regret"] if x is not None]
        cells = [f"{line['after'][m]:.3f}" if m in line["after"] else "-" for m in ADVICE]
        rows.append([line["world"], line["moves"], "yes" if line["seen"] else "no", suggested,
                     f"{statistics.mean(line['teacher']):.3f}", f"{line['after']['none']:.3f}",
                     *cells, f"{statistics.mean(known):.3f}" if known else "-"])  # fmt: skip
    return tables.table(head, rows)


# -------------------------------------------------------------------------------- after training
def after_lines(found: dict, world: str, seeds: list[int]) -> list[dict]:
    """Lines of the second table: the student before, and a line per method over its seeds."""
    moves = toy.world(world).moves
    lines = []
    for method in ["before", *METHODS]:
        names = ["student"] if method == "before" else \
            [f"{method}-n{moves}-seed{seed}" for seed in seeds]  # fmt: skip
        students = [found["students"][name] for name in names]
        fits = [s["fidelity"]["student"]["fit"] for s in students]
        lines.append({
            "world": world, "method": method,
            "accuracy": [s["completion"]["student"]["mean"] for s in students],
            "confidence": [s["fidelity"]["student"]["mean"]["mean"] for s in students],
            "fit": [{k: fit[k] for k in ("midpoint", "midpoint_interval", "slope", "drop", "floor",
                                         "r2", "fall", "located")} for fit in fits],
            "shift": [s["shift"] for s in students] if method != "before" else [],
            "curve": [s["fidelity"]["student"]["curve"] for s in students],
        })  # fmt: skip
    return lines


def shaped(fit: dict) -> bool:
    """Whether there is a fall that the logistic describes, be it too small to count as located."""
    return fit["fall"] > 0.01 and fit["r2"] >= curves.EXPLAINED


def after_table(lines: list[dict]) -> str:
    """The second table in Markdown."""
    head = ["world", "trained by", "accuracy", "teacher's confidence", "falls by", "t* located",
            "t* of each seed, tokens (in brackets: not located)", "moved", "slope, per token",
            "drop", "floor", "R²"]  # fmt: skip
    rows = []
    for line in lines:
        located = [fit for fit in line["fit"] if fit["located"]]
        fits = [fit for fit in line["fit"] if shaped(fit)]
        each = [f"{fit['midpoint']:.1f}" if fit["located"] else f"({fit['midpoint']:.1f})"
                for fit in fits]  # fmt: skip
        shifts = [shift for shift in line["shift"] if shift]
        rows.append([
            line["world"], line["method"],
            *map(plus_minus, (line["accuracy"], line["confidence"],
                              [fit["fall"] for fit in line["fit"]])),
            f"{len(located)}/{len(line['fit'])}", " ".join(each) or "-",
            f"{sum(shift['moved'] for shift in shifts)}/{len(shifts)}" if shifts else "-",
            *(plus_minus([fit[k] for fit in fits]) for k in ("slope", "drop", "floor", "r2")),
        ])  # fmt: skip
    return tables.table(head, rows)


def mean_curve(line: dict):
    """Positions, mean over seeds, half the width of its 95% t interval (0 for one seed), tokens:
    over the bins that every seed has, and in which a tenth of its responses runs."""
    X = min(len(curve["mean"]) for curve in line["curve"])
    mean_SX = np.array([curve["mean"][:X] for curve in line["curve"]], dtype=float)
    responses_SX = np.array([curve["responses"][:X] for curve in line["curve"]])
    count_X = np.array([curve["count"][:X] for curve in line["curve"]]).sum(axis=0)
    runs_X = (responses_SX >= curves.RUNNING * responses_SX.max(axis=1, keepdims=True)).all(axis=0)
    curve = line["curve"][0]
    middle_X = (np.array(curve["from"][:X]) + np.array(curve["to"][:X]) - 1) / 2
    mean_X, half_X = np.array([mean_and_half(values_S) for values_S in mean_SX.T]).T
    return middle_X[runs_X], mean_X[runs_X], np.nan_to_num(half_X)[runs_X], count_X[runs_X]


# lines that lie on each other still show: colour, dashes, width
LOOKS = {
    "before": ("#bbbbbb", "-", 4),
    "opd": (style.RED, "-", 1.6),
    "release": (style.BLUE, (0, (4, 3)), 1.6),
    "lgr": (style.GREEN, (0, (1.5, 2.5)), 2),
    "release+lgr": (style.SKY, (0, (6, 1, 1, 1)), 1.6),
}


def draw(lines: list[dict], out: Path) -> None:
    """after.png: F(t) before and after with the fitted logistic, and what became of t*."""
    worlds = list(dict.fromkeys(line["world"] for line in lines))
    with style.applied():
        from matplotlib.figure import Figure

        pairs = (len(worlds) + 1) // 2  # two worlds side by side, their points below their curves
        figure = Figure((8.5, 4.0 * pairs), layout="constrained")
        grid = figure.subplots(2 * pairs, 2, squeeze=False, height_ratios=[3, 2] * pairs)
        for number, world in enumerate(worlds):
            row, column = 2 * (number // 2), number % 2
            below = grid[row : row + 2, column]
            draw_world(*below, [line for line in lines if line["world"] == world])
            below[0].set(title=world, xlabel="token of the response")
            grid[row, 0].set_ylabel("teacher's confidence F(t)")
        for axes in grid[2 * pairs - 2 :, 1] if len(worlds) % 2 else ():
            axes.remove()
        style.caption(
            figure,
            "above: means over seeds, 95% t intervals; thin: logistic · "
            "below: every seed, 95% interval; hollow: a fall too small to count",
        )
        style.save(figure, out / "after.png")


def draw_world(above, below, lines: list[dict]) -> None:
    """One world: curves above; below t* of every seed or, without any, the mean confidence."""
    located = any(fit["located"] for line in lines for fit in line["fit"])
    moves = toy.world(lines[0]["world"]).moves
    last = toy.OPENING_TOKENS + toy.MOVE_TOKENS * moves
    for k, line in enumerate(lines):
        colour, dashes, width = LOOKS[line["method"]]
        t_X, mean_X, half_X, count_X = mean_curve(line)
        above.plot(t_X, mean_X, color=colour, ls=dashes, lw=width, label=line["method"])
        above.fill_between(t_X, mean_X - half_X, mean_X + half_X, color=colour, alpha=0.2, lw=0)
        if located:
            inside_X = (t_X >= toy.OPENING_TOKENS) & (t_X < last)
            t_X, mean_X, count_X = t_X[inside_X], mean_X[inside_X], count_X[inside_X]
            t = np.linspace(t_X[0], t_X[-1], 300)
            fit = curves.fit_logistic(t_X, mean_X, count_X)
            above.plot(t, fit(t), color=colour, linewidth=0.7)
        n = len(line["fit"])
        y = k + (np.arange(n) - (n - 1) / 2) * 0.12
        for height, fit in zip(y, line["fit"] if located else [], strict=False):
            x, (low, high) = fit["midpoint"], fit["midpoint_interval"]
            fill = colour if fit["located"] else "white"
            if shaped(fit):
                below.errorbar([x], [height], xerr=[[max(x - low, 0)], [max(high - x, 0)]],
                               color=colour, mfc=fill, ls="", marker="o", markersize=3.5,
                               elinewidth=0.8)  # fmt: skip
        if not located:
            below.locator_params(axis="x", nbins=4)
            below.plot(line["confidence"], y, color=colour, ls="", marker="o", markersize=3)
    panel = above.get_subplotspec()
    if panel.is_first_col() and panel.is_first_row():
        above.legend(loc="lower left")
    below.set_yticks(range(len(lines)), [line["method"] for line in lines])
    below.set_ylim(len(lines) - 0.5, -0.5)
    below.set_xlabel("t*, token of the response" if located else "mean of F; there is no t*")
    if not panel.is_first_col():
        below.tick_params(labelleft=False)


# ------------------------------------------------------------------------------------------ main
def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="of diagnosis and training")
    add("--cases", nargs="+", choices=[*toy.WORLDS], help="worlds of the first table (default all)")
    add("--after", nargs="*", choices=[*toy.WORLDS], default=AFTER, help="worlds of the second")
    add("--jobs", type=int, default=min(2, os.cpu_count()), help="processes (%(default)s)")
    add("--runs", type=Path, default=ROOT / "runs" / "compare", help="trained students")
    add("--place", type=Path, default=ROOT / "runs" / "verdicts", help="diagnoses")
    add("--out", type=Path, help="default results/, a part of it runs/verdicts/")
    args = parser.parse_args(argv)
    whole = args.seeds == [0, 1, 2, 3, 4] and not args.cases and args.after == AFTER
    args.out = args.out or (ROOT / "results" if whole else args.place)
    return args


def measure(args) -> tuple[list[dict], list[dict], list[str]]:
    """Run what is missing; lines of both tables, and the commits that the diagnoses come from."""
    cases = [case for case in CASES if not args.cases or case[0] in args.cases]
    training.build_worlds([world for world, _ in cases] + args.after)
    cells = {world: training.cells(world, " ".join(METHODS), curve=True) for world in args.after}
    todo = [(cell, seed) for world in args.after for cell in cells[world] for seed in args.seeds]
    training.run_all(todo, args.runs, args.jobs, [])
    tasks = [(*case, seed, args.place) for case in cases for seed in args.seeds]
    for world in args.after:
        students = [training.run_folder(args.runs, cell, seed) / "student"
                    for cell in cells[world] for seed in args.seeds]  # fmt: skip
        tasks.append((world, toy.world(world).moves, 0, args.place, students))
    reports = run_all(tasks, args.jobs)
    runs = json.loads((ROOT / "results" / "compare.json").read_text())["runs"]
    known = {(run["world"], run["method"], run["moves"]) for run in runs if not run["flags"]}
    runs += [training.summary(cell, seed, args.runs) for cell, seed in todo
             if (cell.world, cell.method, cell.difficulty) not in known]  # fmt: skip
    S = len(args.seeds)
    first = [advice(reports[i * S : (i + 1) * S], runs, *case) for i, case in enumerate(cases)]
    second = [line for world, r in zip(args.after, reports[len(cases) * S :], strict=True)
              for line in after_lines(r, world, args.seeds)]  # fmt: skip
    return first, second, sorted({str(r["commit"]) for r in reports})


def summarize(first: list[dict]) -> dict:
    """The line of JSON: regrets, and how often opd comes as far as its teacher."""
    figures = {}
    for name, is_seen in (("seen", True), ("unseen", False)):
        lines = [line for line in first if line["seen"] == is_seen]
        values = [r for line in lines for r in line["regret"] if r is not None]
        if values:
            mean = round(statistics.mean(values), 4)
            figures[name] = {"diagnoses": len(values), "mean_regret": mean, "worst": max(values)}
    gaps = [abs(line["after"]["opd"] - statistics.mean(line["teacher"])) for line in first]
    return figures | {"opd_within_0.1_of_the_teacher": [sum(g < 0.1 for g in gaps), len(gaps)]}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then write tables and picture."""
    args = parse(argv)
    first, second, commits = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(["python benchmarks/verdicts.py", *(argv or sys.argv[1:])]),
              "commits": commits, "advice": first, "after": second}  # fmt: skip
    (args.out / "verdicts.json").write_text(json.dumps(record, indent=1) + "\n")
    parts = ["## The advice, and what training did", advice_table(first)]
    parts += ["## After training", after_table(second)] if second else []
    text = "\n\n".join(parts) + "\n"
    (args.out / "verdicts.md").write_text(text)
    print(text)
    if second:
        try:
            draw(second, args.out)
        except ImportError as error:
            print(error)
    print(json.dumps(summarize(first)))


if __name__ == "__main__":
    main()
