r"""The evidence: methods x toy worlds x seeds, every run the real `train.py`, and what came of it.

    python benchmarks/compare.py                       every table and figure of the README
    python benchmarks/compare.py --quick               two seeds of the first table's core, minutes
    python benchmarks/compare.py --only difficulty --out runs/difficulty
                                                       one experiment (names: EXPERIMENTS, below)
    python benchmarks/compare.py --worlds fork --methods opd lgr --vary lgr-gamma 0 1 2 \
        --seeds 0 1 2 --out runs/mine -- --steps 60    a comparison of your own

Every run is a process of its own in runs/compare; finished ones are not run again, so that an
interrupted comparison goes on where it stopped, and experiments share runs. Worlds whose weights
do not come with the repository are built first (`python -m toy`). Writes into results/:

    compare.json   every run, seed and evaluation
    compare.md     a table per experiment
    *.png          the figures, if matplotlib is there (figures.py)

The last line printed is JSON. Columns of the tables, all over seeds of the training run:

    accuracy       mean@4 at temperature 1 on 200 held-out problems after training ± standard error
    each seed      the same, seed by seed
    - opd          difference to `opd` of the same world, difficulty and seed: mean and 95% t
                   interval. Both saw the same prompts and the same random numbers
    - release      of the controls: the same to `release`
    supervised     share of the response tokens that were supervised, mean over training
    second task    accuracy on problems of another kind, before and after: forgetting
    fired          share of the rollouts that the rule, or std's own change point, cut short
    wording        share of moves worded so that the teacher is unsure, at the end (forks)
    repeats        share of repeated 4-grams in the last step's responses (forks): reward hacking

All runs are evaluated on the same problems with the same uniform random numbers, so the intervals
tell how much training runs differ, not how much problem sets do (for that, see the bootstrap
intervals of every evaluation in compare.json).
"""

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402
from benchmarks import figures, tables  # noqa: E402
from benchmarks.intervals import mean_and_half, plus_minus  # noqa: E402
from benchmarks.runs import Cell, build_worlds, cells, run_all, summary  # noqa: E402

CONTROLS = "prefix shuffled random std"
COARSE = " --teacher-dtype bfloat16"
GAMMAS, EPS, DTYPES = (0.1, 1, 3, 10, 40), (1e-6, 1e-4, 1e-3, 1e-2, 1e-1), ("", COARSE)
EXPERIMENTS = {
    "methods": (
        "Methods, controls and baselines",
        cells("horizon", f"opd release {CONTROLS} rkl fkl jsd lgr release+lgr", curve=True)
        + cells("varied", f"opd release {CONTROLS}", curve=True)
        + cells("fork fork-mirror", "opd lgr lgr_topk release+lgr", curve=True)
        + cells("clean", "opd release rkl fkl")
        + cells("confident off-by-one", "opd release prefix"),
    ),
    "corruption": (
        "How bad the teacher is after move 6: share of garbled sentences in its training data",
        cells("clean horizon-0.05 horizon-0.1 horizon-0.2 horizon-0.3 horizon", "opd release"),
    ),
    "difficulty": (
        "Longer problems: moves, in responses of 11 n + 17 tokens",
        cells("horizon", "opd release", moves=(3, 6, 9, 12))
        + cells("fork", "opd lgr", moves=(1, 2, 4, 6)),
    ),
    "lgr-flags": (
        "Flags of the lookahead reward",
        cells("fork", "opd")
        + cells("fork", "lgr", "", *(f"--lgr-gamma {g}" for g in (0.1, 0.3, 1.5, 3, 10)))
        + cells("fork", "lgr", *(f"--lgr-tau {tau}" for tau in (0, 0.05, 0.5)))
        + cells("fork", "lgr", "--lgr-normalize mean", "--lgr-normalize mean --lgr-gamma 4")
        + cells("fork", "lgr", "--lgr-eps 0.01")
        + cells("fork", "lgr", "--lgr-signal entropy", "--lgr-signal sampled_prob"),
    ),
    "shape": (
        "Is it the reward's shape that is hacked: group, group without division, difference",
        cells("fork", "opd")
        + cells("fork", "lgr", *(f"--lgr-gamma {g}" for g in (1, 3, 10)))
        + cells("fork", "lgr", *(f"--lgr-normalize mean --lgr-gamma {g}" for g in GAMMAS))
        + cells("fork", "lgr", *(f"--lgr-shape difference --lgr-gamma {g}" for g in GAMMAS)),
    ),
    "eps": (
        "What decides flat groups: eps and the authors' guard; teacher in float32, bfloat16",
        cells("fork", "opd", "", COARSE.strip())
        + cells("fork", "lgr", *(f"--lgr-eps {e}{d}" for d in DTYPES for e in EPS))
        + cells("fork", "lgr", *(f"--lgr-normalize guard{d}" for d in DTYPES)),
    ),
    "release-flags": (
        "Flags of the release rule",
        cells("varied", "opd")
        + cells("varied", "release", "", *(f"--margin-top-k {k}" for k in (2, 16, 32)))
        + cells("varied", "release", "--min-segments 1", "--min-segments 4")
        + cells("varied", "release", "--rescale sequence"),
    ),
    "budget": (
        "How many tokens to supervise: fixed prefixes",
        cells("varied", f"opd release {CONTROLS}")
        + cells("varied", "prefix", *(f"--prefix-tokens {n}" for n in (22, 44, 66, 99))),
    ),
    "slips": (
        "How bad the teacher is after one of two wordings: share of slips in its training data",
        cells("fork-0.1 fork-0.25 fork fork-1.0", "opd lgr")
        + cells("fork-0.1 fork-0.25 fork fork-1.0", "lgr", "--lgr-normalize mean --lgr-gamma 4"),
    ),
}
QUICK = cells("horizon", "opd release prefix random", curve=True) + cells("fork", "opd lgr")



# ------------------------------------------------------------------------------------ the tables
def label(run: dict) -> str:
    """The method with its flags, as one would type it."""
    return " ".join([run["method"], *run["flags"]])


def paired(group: list[dict], runs: list[dict], other: str) -> str:
    """Mean and 95% t interval of final accuracy minus that of the method `other`, without flags, in
    the same world, at the same difficulty and seed; "-" where there are not two such seeds."""
    world, moves = group[0]["world"], group[0]["moves"]
    base = {
        run["seed"]: run["accuracy"][-1]
        for run in runs
        if (run["world"], run["moves"], run["method"], run["flags"]) == (world, moves, other, [])
    }
    differences = [r["accuracy"][-1] - base[r["seed"]] for r in group if r["seed"] in base]
    if len(differences) < 2 or group[0]["method"] == other:
        return "-"
    mean, half = mean_and_half(differences)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def three(value: float) -> str:
    """.901, -.020, 1.000."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.9995 else text


def row(group: list[dict], runs: list[dict]) -> list[str]:
    """The cells of one row of a table; `group`: the seeds of one cell."""
    final = [run["accuracy"][-1] for run in group]
    is_control = group[0]["method"] in CONTROLS.split()
    differences = [paired(group, runs, "opd")]
    differences += [paired(group, runs, "release") if is_control else "-"]

    def average(key: str) -> str:
        known = [run[key] for run in group if run[key] is not None]
        return f"{statistics.mean(known):.2f}" if known else "-"

    ood = [run["ood"] for run in group if run["ood"]]
    second = " → ".join(three(statistics.mean(x)) for x in zip(*ood, strict=True)) or "-"
    each = " ".join(map(three, final))
    where = [group[0]["world"], str(group[0]["moves"]), label(group[0]), plus_minus(final, three)]
    signs = [average(key) for key in ("kept", "fired", "uncertain_wording")]
    repeats = average("repeated_4grams") if toy.world(group[0]["world"]).uncertain else "-"
    return [*where, each, *differences, signs[0], second, *signs[1:], repeats]


def table(runs: list[dict], wanted: list[Cell]) -> str:
    """Markdown; a row per cell that has runs. Columns without a figure are left out."""
    head = ["world", "moves", "method", "accuracy", "each seed", "- opd", "- release"]
    head += ["supervised", "second task", "fired", "wording", "repeats"]
    rows = []
    for cell in dict.fromkeys((c.world, c.method, c.flags, c.difficulty) for c in wanted):
        group = [
            r for r in runs if (r["world"], r["method"], tuple(r["flags"]), r["moves"]) == cell
        ]
        if group:
            rows.append(row(sorted(group, key=lambda r: r["seed"]), runs))
    used = [any(r[i] != "-" for r in rows) for i in range(len(head))]
    head, *rows = [[x for x, keep in zip(r, used, strict=True) if keep] for r in (head, *rows)]
    return tables.table(head, rows)


# ------------------------------------------------------------------------------------------ main
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", nargs="+", choices=[*EXPERIMENTS], help="these experiments")
    add("--quick", action="store_true", help="two seeds of a few runs, into runs/quick")
    add("--worlds", nargs="+", choices=[*toy.WORLDS], help="of a comparison of your own")
    add("--methods", nargs="+", default=["opd", "release"], help="of a comparison of your own")
    add("--vary", nargs="+", metavar=("FLAG", "VALUE"), help="of train.py, in your own comparison")
    add("--seeds", nargs="+", type=int, help="default 0 1 2 3 4")
    add("--jobs", type=int, default=min(2, os.cpu_count()), help="processes (%(default)s)")
    add("--runs", type=Path, default=ROOT / "runs" / "compare", metavar="FOLDER")
    add("--out", type=Path, metavar="FOLDER", help="default results")
    add("extra", nargs="*", help="after --: more flags for every train.py")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    if args.vary and not args.worlds:
        parser.error("--vary needs --worlds")
    part = args.worlds or args.extra or (args.only or args.seeds) and not args.quick
    if part and args.out is None:
        parser.error("part of the comparison, or your own, needs --out: results/ holds the whole")
    if args.extra and args.runs == ROOT / "runs" / "compare":
        args.runs = args.out / "runs"  # other flags, other runs
    return args


def choose(args) -> tuple[dict[str, tuple[str, list[Cell]]], list[int]]:
    """The experiments by name, each with its title and cells, and the seeds."""
    seeds = args.seeds or [0, 1, 2, 3, 4]
    if args.worlds:
        flag, *values = args.vary or [""]
        variants = [f"--{flag} {value}" for value in values]
        own = cells(" ".join(args.worlds), " ".join(args.methods), *variants, curve=True)
        return {"own": ("A comparison of your own", own)}, seeds
    if args.quick:
        args.out = args.out or ROOT / "runs" / "quick"
        return {"quick": ("A quick look", QUICK)}, args.seeds or [0, 1]
    names = args.only or EXPERIMENTS
    return {name: EXPERIMENTS[name] for name in names}, seeds


def list_runs(experiments, seeds) -> list[tuple[Cell, int]]:
    """Every run once; where experiments share one, the one that evaluates more often."""
    wanted = {}
    for _, members in experiments.values():
        for cell in members:
            for seed in seeds:
                known = wanted.get((cell.name, seed))
                if known is None or (cell.curve and not known[0].curve):
                    wanted[cell.name, seed] = (cell, seed)
    return list(wanted.values())


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then write the results."""
    args = parse(argv)
    experiments, seeds = choose(args)
    out = args.out or ROOT / "results"
    todo = list_runs(experiments, seeds)
    build_worlds(cell.world for cell, _ in todo)
    run_all(todo, args.runs, args.jobs, args.extra)
    runs = [summary(cell, seed, args.runs) for cell, seed in todo]
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["python benchmarks/compare.py", *(argv or sys.argv[1:])]),
        "machine": f"{platform.machine()}, {args.jobs} runs at a time, 1 thread each",
        "python": platform.python_version(),
        "commits": sorted({str(run["commit"]) for run in runs}),
        "minutes_in_runs": round(sum(run["seconds"] for run in runs) / 60, 1),
        "experiments": {name: title for name, (title, _) in experiments.items()},
    }
    head = json.dumps(record, indent=1)[: -len("\n}")]
    body = ",\n".join(json.dumps(run) for run in runs)  # a line each
    (out / "compare.json").write_text(f'{head},\n "runs": [\n{body}\n]}}\n')
    record["runs"] = runs
    parts = [
        f"## {title}\n\n`--only {name}`\n\n{table(runs, members)}\n"
        for name, (title, members) in experiments.items()
    ]
    (out / "compare.md").write_text("\n".join(parts))
    print("\n".join(parts))
    drawn = []
    try:
        drawn = figures.draw(record, out)
    except ImportError as error:
        print(f"no figures: {error}")
    print(f"wrote {out}/compare.json, compare.md and {len(drawn)} figures")
    last = {f"{r['world']}/{r['moves']}/{label(r)}/{r['seed']}": r["accuracy"][-1] for r in runs}
    tables.print_json(last, 5)


if __name__ == "__main__":
    main()
