r"""The methods on real language: the pair of `examples/smollm2/prepare.py`, trained and measured.

    python benchmarks/real.py                     every method, three seeds: five hours on 2 cores
    python benchmarks/real.py --quick             two methods, one seed, two steps: minutes
    python benchmarks/real.py --methods opd iw "opd --train-tokens 64 --steps 45" --out FOLDER
                                                  methods of your choice, with flags of train.py
    python benchmarks/real.py --human FILE        also the perplexity of solutions by people: JSONL
                                                  with "question" and "answer", as GSM8K has them
    python benchmarks/real.py --pair FOLDER       another prepared pair

Every run is the real `train.py` in runs/real; finished ones are not run again and interrupted ones
go on from their last checkpoint. Every student, and the one before training, is then measured on
the same held-out prompts with the same random numbers. Writes results/real.{json,md} and real.png.

    reverse_kl   KL(p_S || p_T), nats per token of the student's responses to open.jsonl: exact,
                 over the whole vocabulary; also by position, in quarters of the length limit
    forward_kl   KL(p_T || p_S) on the same tokens
    accuracy     mean@n on the sums of heldout.jsonl
    perplexity   of human solutions, per token of the student's tokenizer: forgetting
    tokens, truncated, repeated    length of a response to open.jsonl, share cut off by the limit,
                 share of its 4-grams that it wrote before
    fidelity     the teacher's largest probability, by quarter of the response
    rule         what the release rule does with these responses: `fired`, the share that it stops;
                 `at`, after which share of the tokens; `segment`, after which sentence; `gain`,
                 BIC0 - BIC1 of those; `clear`, the share of all with a gain above 6

Intervals are 95%, by a bootstrap over prompts (or problems, or solutions) and seeds alike.
The last line printed is JSON.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks import machine, style, tables  # noqa: E402
from benchmarks.held_out import PARTS, Ruler  # noqa: E402

METHODS = "opd release lgr release+lgr prefix shuffled random rkl".split()


# ---------------------------------------------------------------------------------------- the runs
def command(args, method: str, seed: int, out: Path) -> list[str]:
    """The command line of one run."""
    pair = args.pair
    flags = {
        "method": method.split()[0], "seed": seed,
        "student": pair / "student", "teacher": pair / "teacher",
        "problems": pair / "train.jsonl", "eval-problems": pair / "heldout.jsonl", "out": out,
        "steps": args.steps, "prompts-per-step": args.prompts_per_step, "lr": args.lr,
        "max-new-tokens": args.max_new_tokens, "eval-count": 1, "eval-samples": 1,
        "checkpoint-every": args.checkpoint_every, "threads": 1,
    }  # fmt: skip
    words = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    return [sys.executable, str(ROOT / "train.py"), "--resume", *words, *method.split()[1:]]


def train_all(args, todo: list[tuple[str, int, Path]]) -> None:
    """Run what is not finished, --jobs at a time; the bar moves with every step of any run."""
    waiting = [(command(args, *run), run[2]) for run in todo if not (run[2] / "student").exists()]
    started, running = {out: steps_of(out) for _, out in waiting}, {}
    wanted = sum(int(words[-words[::-1].index("--steps")]) for words, _ in waiting)
    bar = tqdm(total=wanted, initial=sum(started.values()), unit="step")
    while waiting or running:
        while waiting and len(running) < args.jobs:
            words, out = waiting.pop(0)
            out.parent.mkdir(parents=True, exist_ok=True)
            said = open(f"{out}.txt", "w")
            running[out] = subprocess.Popen(words, stdout=said, stderr=said), words
        for out, (process, words) in list(running.items()):
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                pass
            else:
                del running[out]
                if (out / "student").exists():  # 3 GB each, which nobody goes on from
                    shutil.rmtree(out / "checkpoints", ignore_errors=True)
                else:
                    for other, _ in running.values():
                        other.terminate()
                    sys.exit(f"{' '.join(words)}\n{Path(f'{out}.txt').read_text()[-2000:]}")
            started[out] = steps_of(out)
        bar.n = sum(started.values())
        bar.set_postfix_str(", ".join(out.name for out in running))
    bar.close()


def steps_of(out: Path) -> int:
    """Steps that a run has logged."""
    try:
        return sum('"loss"' in line for line in open(out / "log.jsonl"))
    except OSError:
        return 0


def training(out: Path) -> dict:
    """Means over the steps of a run's log; None where the method has no such number."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    lines = [line for line in lines if "loss" in line]
    names = "kept fired release_at sentences triggered flat_groups outside_group".split()
    means = {}
    for name in names:
        values = [line[name] for line in lines if line.get(name) is not None]
        means[name] = float(np.mean(values)) if values else None
    return means | {"seconds": sum(line["seconds"]["total"] for line in lines)}


# ------------------------------------------------------------------------------------ the numbers
def estimate(runs: list[dict], name: str, other: list[dict] | None = None, resamples=2000):
    """[value, low, high] of a ratio of sums over prompts, mean over seeds, minus that of `other`;
    both are drawn anew alike: prompts and seeds (a single `other` is used with every seed)."""
    if not all(name in run for run in runs):
        return None
    a_S2P = np.array([run[name] for run in runs], dtype=float)
    b_S2P = np.array([run[name] for run in other], dtype=float) if other else None
    rng, (S, _, P) = np.random.default_rng(0), a_S2P.shape

    def mean(x_S2P, seeds, prompts):
        seeds = seeds if len(x_S2P) > 1 else np.zeros(1, dtype=int)
        sums = x_S2P[seeds][:, :, prompts].sum(axis=2)
        ratio = (sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], np.nan)).mean()
        return np.exp(ratio) if name == "perplexity" else ratio

    def one(seeds, prompts):
        return mean(a_S2P, seeds, prompts) - (mean(b_S2P, seeds, prompts) if other else 0)

    draws = [one(rng.integers(S, size=S), rng.integers(P, size=P)) for _ in range(resamples)]
    value = one(np.arange(S), np.arange(P))
    if not np.isfinite(value):
        return None
    return [round(float(x), 5) for x in (value, *np.nanquantile(draws, [0.025, 0.975]))]


def say(found, digits=3, sign="") -> str:
    """A value with its interval."""
    if found is None:
        return "-"
    return f"{found[0]:{sign}.{digits}f} [{found[1]:{sign}.{digits}f}, {found[2]:{sign}.{digits}f}]"


def report(args, measured: dict, logs: dict) -> tuple[dict, str]:
    """(figures, Markdown). measured: {name: a list of what `Ruler.measure` found, per seed}."""
    names = [*measured["student"][0]]
    figures = {who: {n: estimate(runs, n) for n in names} for who, runs in measured.items()}
    methods = [m for m in args.methods if m in measured]
    for method in methods:
        for other in ("student", "opd"):
            if other in measured and other != method:
                figures[method][f"minus {other}"] = {
                    n: estimate(measured[method], n, measured[other])
                    for n in ("reverse_kl", "forward_kl", "accuracy", "perplexity", "tokens")
                    if n in names
                }
    everyone = ["teacher", "student", *methods]
    parts = [
        f"# On real language\n\nWritten by `{args.said}`, which explains the columns. "
        f"{args.where}.\n\n{args.steps} steps of {args.prompts_per_step} prompts, at most "
        f"{args.max_new_tokens} tokens, learning rate {args.lr:g}, seeds "
        f"{' '.join(map(str, args.seeds))}. 95% intervals over prompts and seeds."
    ]

    def add(title, head, row):
        rows = [row(m, figures[m]) for m in everyone if m != "teacher" or "KL" not in title]
        parts.append(f"## {title}\n\n{tables.table(head.split(', '), rows)}")

    def against(f, other, name):
        return say(f.get(f"minus {other}", {}).get(name), sign="+")

    def each(method, name):
        return " ".join(f"{estimate([run], name, resamples=1)[0]:.3f}" for run in measured[method])

    add("KL to the teacher, on held-out open prompts",
        "method, reverse KL, each seed, - before, - opd, forward KL",
        lambda m, f: [m, say(f["reverse_kl"]), each(m, "reverse_kl"),
                      against(f, "student", "reverse_kl"), against(f, "opd", "reverse_kl"),
                      say(f["forward_kl"])])  # fmt: skip
    add("Reverse KL by position, in quarters of the length limit", "method, 1, 2, 3, 4",
        lambda m, f: [m, *(say(f[f"reverse_kl_{band}"]) for band in range(4))])  # fmt: skip
    add("The task, forgetting, and the shape of responses",
        "method, accuracy, - before, - opd, perplexity, tokens, truncated, repeated",
        lambda m, f: [m, say(f["accuracy"]), against(f, "student", "accuracy"),
                      against(f, "opd", "accuracy"), say(f.get("perplexity"), 2),
                      say(f["tokens"], 1), say(f["truncated"], 2), say(f["repeated"])])  # fmt: skip
    add("What the release rule would do with these responses, and the teacher's confidence in them",
        "method, fired, gain above 6, gain where fired, at share, after sentence, sentences, "
        "fidelity by quarter",
        lambda m, f: [m, say(f["fired"], 2), say(f["clear"], 2), say(f["gain"], 1),
                      say(f["at"], 2), say(f["segment"], 1), f"{f['sentences'][0]:.1f}",
                      " ".join(f"{f[f'fidelity_{q}'][0]:.2f}" for q in range(4))])  # fmt: skip
    keys = [k for k in next(iter(logs.values()))[0]] if logs else []

    def mean(method, key):
        values = [log[key] for log in logs[method] if log[key] is not None]
        return f"{np.mean(values):.3g}" if values else None

    everyone = methods
    add("During training, mean over steps and seeds", ", ".join(["method", *keys]),
        lambda m, f: [m, *(mean(m, key) for key in keys)])  # fmt: skip
    return figures, "\n\n".join(parts) + "\n"


def draw(figures: dict, out: Path) -> None:
    """real.png: reverse KL, accuracy and fired, with intervals, a row per method."""
    with style.applied():
        import matplotlib.pyplot as plt

        names = [m for m in figures if m != "teacher"]
        panels = [("reverse_kl", "reverse KL, nats per token"), ("accuracy", "accuracy on sums"),
                  ("fired", "responses that the rule stops")]  # fmt: skip
        size = {"figsize": (9, 0.34 * len(names) + 1.3), "layout": "constrained"}
        figure, axes = plt.subplots(1, 3, sharey=True, **size)
        for axis, (key, title) in zip(axes, panels, strict=True):
            for i, name in enumerate(names):
                value, low, high = figures[name][key]
                colour = style.GREY if name == "student" else style.BLUE
                axis.plot([low, high], [i, i], color=colour, lw=2)
                axis.plot(value, i, "o", color=colour)
            axis.axvline(figures["student"][key][0], color=style.GREY, lw=1, ls=":")
            axis.set_xlabel(title)
        axes[0].set_yticks(range(len(names)), ["before", *names[1:]])
        axes[0].invert_yaxis()
        style.save(figure, out / "real.png")
        plt.close(figure)


# ------------------------------------------------------------------------------------------- main
def parse(argv=None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="opd and release, one seed, two steps")
    add("--pair", type=Path, default=ROOT / "runs" / "smollm2", metavar="FOLDER")
    add("--human", type=Path, metavar="FILE", help="JSONL of solutions by people")
    add("--methods", nargs="+", default=METHODS, metavar="METHOD")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=30)
    add("--prompts-per-step", type=int, default=8)
    add("--max-new-tokens", type=int, default=96)
    add("--lr", type=float, default=3e-5)
    add("--open-prompts", type=int, default=40, help="held-out ones")
    add("--samples", type=int, default=2, help="responses to each; twice as many to a sum")
    add("--solutions", type=int, default=32, help="of --human")
    add("--checkpoint-every", type=int, default=4)
    add("--jobs", type=int, default=min(2, os.cpu_count()), help="processes (%(default)s)")
    add("--runs", type=Path, default=ROOT / "runs" / "real", metavar="FOLDER")
    add("--out", type=Path, metavar="FOLDER", help="default results; with --quick, --runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.methods, args.seeds, args.steps, args.open_prompts = ["opd", "release"], [0], 2, 8
    for name in ("teacher", "student", "train.jsonl", "heldout.jsonl", "open.jsonl"):
        if not (args.pair / name).exists():
            parser.error(f"--pair {args.pair}: no {name}; python examples/smollm2/prepare.py")
    for method in args.methods:
        if method.split()[:1] not in [[name] for name in train.METHODS]:
            parser.error(f"--methods {method!r}: none of {', '.join(train.METHODS)}")
    settings = f"{args.steps}x{args.prompts_per_step}x{args.max_new_tokens}-lr{args.lr:g}"
    args.runs = args.runs / settings
    args.out = args.out or (args.runs if args.quick else ROOT / "results")
    args.said = "python benchmarks/real.py " + shlex.join(argv or sys.argv[1:])
    args.where = machine.describe("cpu", 1, f"{args.jobs} runs at a time")
    return args


@torch.no_grad()
def measure_all(args, todo) -> dict:
    """{name: [what was found, per seed]}; every measurement is kept beside its run."""
    torch.set_num_threads(args.jobs)
    places = [("teacher", args.pair / "teacher", args.runs / "teacher.json"),
              ("student", args.pair / "student", args.runs / "student.json")]  # fmt: skip
    places += [(m, out / "student", out.with_suffix(".json")) for m, _, out in todo]
    ruler, measured = None, {}
    human = args.human and args.human.name
    settings = [args.open_prompts, args.samples, args.solutions, human]
    bar = tqdm(desc="measure", total=PARTS * len(places), unit="part")
    for number, (name, path, kept) in enumerate(places, 1):
        found = json.loads(kept.read_text()) if kept.exists() else {}
        if found.get("settings") != settings:
            ruler = ruler or Ruler(args)
            model = ruler.teacher if name == "teacher" else ruler.open(path)
            found = {"settings": settings, **ruler.measure(model, bar.update)}
            kept.write_text(json.dumps(found))
        bar.update(PARTS * number - bar.n)
        measured.setdefault(name, []).append({k: v for k, v in found.items() if k != "settings"})
    bar.close()
    return measured


def main(argv=None) -> None:
    """Run what is missing, measure, then write the results."""
    args = parse(argv)
    machine.quiet()
    todo = [(m, s, args.runs / f"{m.replace(' --', '-').replace(' ', '-')}-seed{s}")
            for s in args.seeds for m in args.methods]  # fmt: skip
    train_all(args, todo)
    measured, logs = measure_all(args, todo), {}
    for method, _, out in todo:
        logs.setdefault(method, []).append(training(out))
    figures, page = report(args, measured, logs)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {"settings": settings, "figures": figures, "logs": logs}
    (args.out / "real.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "real.md").write_text(page)
    print(page)
    try:
        draw(figures, args.out)
    except ImportError as error:
        print(f"no figure: {error}")
    tables.print_json({m: figures[m]["reverse_kl"][0] for m in figures if m != "teacher"}, 4)


if __name__ == "__main__":
    main()
