"""Draw the logs of runs, finished or not: `python -m harness.plot runs/a runs/b --out runs.png`.

Needs matplotlib. A panel per number of the log (docs/runs.md), a colour per run; what no run has is
left out. The teacher's confidence is drawn for the first (solid) and last quarter of responses."""

import os
import sys
from pathlib import Path

from harness import checkpoint, log
from harness.cli import Parser, check_new_file, complain, path_name

PANELS = {
    "accuracy": "accuracy, with 95% interval", "reverse_kl": "reverse KL, nats per token",
    "entropy": "student's entropy, nats", "kept": "share of tokens supervised",
    "fired": "share of responses stopped by the rule", "fidelity": "teacher's largest probability",
    "response_tokens": "tokens per response", "truncated": "share of responses cut off",
    "repeated_4grams": "share of 4-grams repeated", "flat_groups": "share of groups that are flat",
}  # fmt: skip


def read(out: Path) -> list[dict]:
    """The whole lines of a run's log; ValueError: it is no run, or has none yet."""
    path = out / "log.jsonl"
    if checkpoint.read_config(out) is None or not path.is_file():
        raise ValueError(f"{out}: not the folder of a run that has begun")
    if not (lines := log.read_log(out, path.read_bytes().rfind(b"\n") + 1)):
        raise ValueError(f"{path}: no lines yet")
    return lines


def draw(runs: dict[str, list[dict]]):
    """The figure, of log lines by name."""
    from matplotlib.figure import Figure

    def part(lines, name):  # evaluations have lengths, too
        key = "accuracy" if name == "accuracy" else "loss"
        return [line for line in lines if key in line and line.get(name) is not None]

    names = [name for name in PANELS if any(part(lines, name) for lines in runs.values())]
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(10.5, 2.4 * rows + 0.4 + 0.2 * len(runs)), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for name, axis in zip(names, axes, strict=False):
        axis.set_title(PANELS[name], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for number, (run, lines) in enumerate(runs.items()):
            lines, colour = part(lines, name), f"C{number}"
            steps, values = [x["step"] for x in lines], [x[name] for x in lines]
            if name == "fidelity":
                axis.plot(steps, [x[3] for x in values], "--", color=colour)
                values = [x[0] for x in values]
            if name == "accuracy":
                ends = [[x[f"accuracy_{end}"] for x in lines] for end in ("low", "high")]
                axis.fill_between(steps, *ends, color=colour, alpha=0.15, lw=0)
            axis.plot(steps, values, ".-", color=colour, label=run)
    for axis in axes[len(names) :]:
        axis.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", fontsize=8)
    return figure


def main(argv=None) -> int:
    """The command; exit status 2 and one line on stderr for what the user can put right."""
    parser = Parser(prog="python -m harness.plot", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=path_name, metavar="FOLDER")
    parser.add_argument("--out", type=path_name, default="runs.png", help="PNG; must not exist")
    args = parser.parse_args(argv)
    try:
        check_new_file("--out", args.out)
        logs = [read(Path(run)) for run in args.runs]
        folders = [os.path.abspath(run) for run in args.runs]
        top = os.path.commonpath(map(os.path.dirname, folders))
        names = [os.path.relpath(folder, top) for folder in folders]
        draw(dict(zip(names, logs, strict=True))).savefig(args.out, dpi=110)
    except ImportError:
        complain("plot", "needs matplotlib: pip install matplotlib")
        return 2
    except (ValueError, OSError) as error:
        complain("plot", error)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
