r"""Methods x toy worlds x seeds: the real `train.py`, run to run, and a table of what came out.

    python benchmarks/compare.py                     the README's first table
    python benchmarks/compare.py --worlds horizon --methods release --seeds 0 1 2 \
        --runs runs/long --out results/long -- --steps 100 --eval-every 20        its second
    python benchmarks/compare.py --worlds fork fork-mirror --methods opd lgr lgr_topk release+lgr \
        --out results/fork                                                        the forks
    python benchmarks/compare.py --worlds fork --methods lgr --vary lgr-gamma 0 0.1 0.3 1 3 10 \
        --out results/gamma                                                       one flag varied

Every run is a process of its own in runs/compare/<world>-<method>-seed<n>; finished ones are not
run again, so an interrupted comparison goes on where it stopped.  Writes results/compare.json
(every run and every evaluation) and results/compare.md (the table: mean ± standard error over
seeds; shares averaged over steps and seeds, the uncertain wording and the repetition at the end).
The last line printed is JSON.  All runs see the same held-out problems and the same uniform
numbers there.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def run(
    world: str, method: str, seed: int, variant: list[str], place: Path, extra: list[str]
) -> dict:
    """One training run, or what is left of it from an earlier call."""
    name = "-".join([method, *(word.lstrip("-") for word in variant)])
    folder = place / f"{world}-{name}-seed{seed}"
    if not (folder / "student").exists():
        command = [sys.executable, ROOT / "train.py", "--toy", world, "--method", method]
        command += ["--seed", str(seed), "--out", folder, *variant, *extra]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{folder.name}: exit {done.returncode}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "accuracy" in line]
    return {
        "world": world,
        "method": " ".join([method, *variant]),
        "seed": seed,
        "accuracy": {
            line["step"]: [line["accuracy"], line["accuracy_low"], line["accuracy_high"]]
            for line in evaluations
        },
        "uncertain_wording": evaluations[-1].get("uncertain_wording"),
        "repeated_4grams": training[-1]["repeated_4grams"],
        "kept": statistics.mean(line["kept"] for line in training),
        "fired": statistics.mean(line["fired"] for line in training),
        "bic_gain_over_6": statistics.mean(line["bic_gain_over_6"] for line in training),
        "seconds_per_step": statistics.mean(line["seconds"]["total"] for line in training),
        "seconds": sum(x["seconds"].get("total", x["seconds"].get("evaluate")) for x in lines),
        "commit": config["commit"],
    }


def mean_and_error(values: list[float]) -> str:
    """Mean +- standard error over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def table(results: list[dict]) -> str:
    """One Markdown row per world and method; a column per evaluated step, every seed at the end."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["world"], result["method"]), []).append(result)
    steps = list(results[0]["accuracy"])
    shares = {"fired": "fired", "gain > 6": "bic_gain_over_6", "kept": "kept"}
    if all(result["world"].startswith("fork") for result in results):
        shares = {"uncertain wording": "uncertain_wording", "repeated 4-grams": "repeated_4grams"}
    head = ["world", "method", *(f"step {s}" for s in steps), "each seed at the end", *shares]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (world, method), group in groups.items():
        curve = [mean_and_error([r["accuracy"][s][0] for r in group]) for s in steps]
        last = ", ".join(f"{r['accuracy'][steps[-1]][0]:.3f}" for r in group)
        seen = []
        for key in shares.values():  # a model that writes no move at all has no wording
            known = [r[key] for r in group if r[key] is not None]
            seen.append(f"{statistics.mean(known):.2f}" if known else "-")
        rows.append("| " + " | ".join([world, method, *curve, last, *seen]) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", nargs="+", default=["horizon", "clean"])
    parser.add_argument("--methods", nargs="+", default=["release", "opd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--vary", nargs="+", metavar=("FLAG", "VALUE"), help="of train.py")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "compare", metavar="STEM")
    parser.add_argument("extra", nargs="*", help="after --: more flags for every train.py")
    args = parser.parse_args()
    results = []
    flag, *values = args.vary or [""]
    variants = [[f"--{flag}", value] for value in values] or [[]]
    todo = itertools.product(args.worlds, args.methods, variants, args.seeds)
    for world, method, variant, seed in tqdm(list(todo), unit="run"):
        results.append(run(world, method, seed, variant, args.runs, args.extra))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["python benchmarks/compare.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, 1 thread per run",
        "minutes": round(sum(result["seconds"] for result in results) / 60, 1),
        "runs": results,
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))
    final = {
        f"{r['world']}/{r['method']}/{r['seed']}": list(r["accuracy"].values())[-1][0]
        for r in results
    }
    print(json.dumps(final))


if __name__ == "__main__":
    main()
