r"""Where to listen to the teacher: the papers' methods and their rivals, at equal cost.

    python benchmarks/rivals.py                                   every world, five seeds: hours
    python benchmarks/rivals.py --worlds varied --seeds 0 1 --out runs/mine      a part

Every run is the real `train.py`, in runs/rivals; finished ones are not run again. Methods differ in
what a step costs, so every run is evaluated as it goes, and compared at two points of its curve
(linear between evaluations):

    equal supervision   when it has supervised (weight above 0) as many tokens as the run of the
                        table that supervises fewest has in the end
    equal compute       when it has sampled, scored and trained as many tokens as the cheapest run
                        has in the end: response tokens drawn, tokens that the teacher read
                        (prompts, responses, leaves), tokens in updates (up to the last supervised)

Those that stop sampling early (`--train-tokens`) take more and cheaper steps. `- opd` is the
difference to plain OPD at the same point, paired by seed, with a 95% t interval. `seconds` are
those of all training steps, on a shared machine. Writes results/rivals.{json,md}, where worlds stay
that are not run again; the last line printed is JSON.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402
from benchmarks import machine, tables  # noqa: E402
from benchmarks.intervals import mean_and_half, plus_minus  # noqa: E402
from benchmarks.runs import Cell, build_worlds, run_all, run_folder  # noqa: E402

SOURCES = {  # method and flags: where it is from
    "opd": "plain OPD",
    "release": "2605.13643",
    "prefix": "control: as many tokens as `release`",
    "iw": "IW-OPD 2606.22600",
    "reopold": "REOPOLD 2603.11137",
    "kat": "KAT 2606.09471",
    "overlap": "Prune-OPD 2605.07804",
    "tip": "TIP 2604.14084",
    "no_teacher": "OPSA 2608.31046",
    "opd --train-tokens 0.1 --steps 90": "TOPD 2605.31490: 10%",
    "opd --train-tokens 64 --steps 50": "ESR 2605.27028, Prefix-OPD 2602.15260",
    "opd --train-tokens 0.1-1.0 --steps 45": "the same, a schedule",
}
LOOKAHEAD = {"lgr": "2605.30833", "lgr_topk --lgr-alternate 2 --loss-mean response "
             "--lgr-normalize mean": "its authors' script"}  # fmt: skip
WORLDS = "varied horizon clean off-by-one late fork fork-mirror mire".split()


def rows_of(world: str) -> dict[str, str]:
    """What is run in a world; lookahead where wordings differ. Where no response is longer than 64
    tokens, half of the limit takes their place."""
    rows = SOURCES | (LOOKAHEAD if toy.world(world).uncertain else {})
    short = toy.response_limit(toy.world(world).moves) <= 64
    return {(k.replace(" 64 ", " 0.5 ") if short else k): v for k, v in rows.items()}


def curve(folder: Path) -> dict:
    """A run's accuracy, and what it had cost, at every evaluation."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    supervised = compute = seconds = 0
    found = {"accuracy": [], "supervised": [], "compute": []}
    for line in lines:
        if "loss" in line:
            supervised += line["kept_tokens"]
            compute += sum(line["tokens"].values())
            seconds += line["seconds"]["total"]
        else:
            for name, value in (("accuracy", round(line["accuracy"], 5)),
                                ("supervised", supervised), ("compute", compute)):  # fmt: skip
                found[name].append(value)
    last = [line for line in lines if "loss" in line][-1]
    return found | {"seconds": round(seconds, 1), "repeated": last["repeated_4grams"]}


def at(run: dict, cost: str, budget: float) -> float:
    """Accuracy when `cost` has reached `budget`.

    >>> at({"accuracy": [0.2, 0.6, 0.8], "compute": [0, 100, 200]}, "compute", 150)
    0.7
    """
    return round(float(np.interp(budget, run[cost], run["accuracy"])), 5)


def world_table(runs: dict[str, list[dict]], sources: dict[str, str]) -> tuple[str, dict]:
    """(Markdown, {row: accuracies by seed, at equal supervision and at equal compute})."""
    budgets = {cost: min(run[cost][-1] for group in runs.values() for run in group)
               for cost in ("supervised", "compute")}  # fmt: skip
    rows, points = [], {}
    for name, group in runs.items():
        cells, points[name] = [], []
        for cost, budget in budgets.items():
            values, base = ([at(run, cost, budget) for run in some]
                            for some in (group, runs["opd"]))  # fmt: skip
            gap = [a - b for a, b in zip(values, base, strict=True)]
            points[name].append(values)
            cells.append(plus_minus(values))
            if name == "opd" or len(gap) < 2:
                cells.append("-")
            else:
                mean, half = mean_and_half(gap)
                cells.append(f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
        end = plus_minus([run["accuracy"][-1] for run in group])
        each = " ".join(f"{run['accuracy'][-1]:.2f}" for run in group)
        used = [f"{statistics.mean(run[k][-1] for run in group) / 1e3:.0f}k"
                for k in ("supervised", "compute")]  # fmt: skip
        seconds = f"{statistics.mean(run['seconds'] for run in group):.0f}"
        rows.append([f"`{name}`", sources[name], *cells, end, each, *used, seconds])
    head = ["method", "source", "equal supervision", "- opd", "equal compute", "- opd", "at its "
            "end", "each seed", "supervised", "compute", "seconds"]  # fmt: skip
    said = "Equal supervision: {supervised:,} tokens. Equal compute: {compute:,}.\n\n"
    return said.format(**budgets) + tables.table(head, rows), points


def summary(points: dict[str, dict]) -> str:
    """Markdown: a row per method, a column per world, at equal supervision, then equal compute."""
    names, parts = list(dict.fromkeys(name for found in points.values() for name in found)), []
    for number, title in enumerate(("supervision", "compute")):
        rows = [[f"`{name}`", *(plus_minus(found[name][number], "{:.2f}".format)
                                if name in found else "-" for found in points.values())]
                for name in names]  # fmt: skip
        parts.append(f"## At equal {title}\n\n{tables.table(['method', *points], rows)}\n")
    return "\n".join(parts)


def parse(argv=None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--worlds", nargs="+", choices=[*toy.WORLDS], default=WORLDS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add("--jobs", type=int, default=min(2, os.cpu_count()), help="processes (%(default)s)")
    add("--runs", type=Path, default=ROOT / "runs" / "rivals", metavar="FOLDER")
    add("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Run what is missing, then write the tables."""
    args = parse(argv)
    cells = {
        (world, name): Cell(world, name.split()[0], tuple(name.split()[1:]), curve=True)
        for world in args.worlds
        for name in rows_of(world)
    }
    todo = [(cell, seed) for seed in args.seeds for cell in cells.values()]
    build_worlds(args.worlds)
    run_all(todo, args.runs, args.jobs, [])
    kept = args.out / "rivals.json"
    record, parts, found = json.loads(kept.read_text())["runs"] if kept.exists() else {}, [], {}
    for world in args.worlds:
        record[world] = {name: [curve(run_folder(args.runs, cells[world, name], seed))
                                for seed in args.seeds] for name in rows_of(world)}  # fmt: skip
    for world in sorted(record, key=list(toy.WORLDS).index):
        text, found[world] = world_table(record[world], rows_of(world))
        parts.append(f"## {world}: {toy.world(world).about}\n\n{text}\n")
    said = " ".join(["python benchmarks/rivals.py", *(argv or sys.argv[1:])])
    where = machine.describe("cpu", 1, f"{args.jobs} runs at a time")
    head = "# Where to listen to the teacher\n\nWritten by `python benchmarks/rivals.py`, which "
    head += f"explains the columns, last `{said}`. {where}. Mean ± standard error.\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rivals.md").write_text("\n".join([head, summary(found), *parts]))
    content = {"command": said, "machine": where, "seeds": args.seeds, "runs": record}
    (args.out / "rivals.json").write_text(json.dumps(content) + "\n")
    print("\n".join([*parts, summary(found)]))
    last = {f"{world} {name}": statistics.mean(values) for world, points in found.items()
            for name, (_, values) in points.items()}  # fmt: skip
    tables.print_json(last, 4)


if __name__ == "__main__":
    main()
