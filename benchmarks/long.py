"""How a step's time and memory grow with the length of responses, phase by phase.

    python benchmarks/long.py                             1k, 4k and 16k tokens: four minutes
    python benchmarks/long.py --lengths 256 1024

One prompt, a response of exactly so many tokens, `--method lgr`, a random pair (4 and 6 layers,
1.3M and 5.8M parameters, V = 4096). Tau is set so that a tenth of the tokens is looked ahead from.
Each length has a process of its own; columns are CPU seconds, and the peak in MiB above what was in
use before the step. In brackets: as a multiple of the shortest, over that of the lengths, so that
1.00 is linear. Attention is quadratic: its share of a pass's operations is given. The last line
printed is JSON.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks import machine, memory, our_side, shapes, tables  # noqa: E402

PHASES, PROMPT, SHARE = ("sample", "score", "lookahead", "update"), 16, 0.1


def step(words: list[str]) -> dict[str, tuple[float, float]]:
    """{phase: (CPU seconds, MiB above the start)}."""
    run = our_side.load(words)
    tokens, run.args.max_new_tokens = run.args.max_new_tokens, 128
    batch, _ = train.sample(run, 0)  # for tau, and to warm up
    run.args.max_new_tokens = tokens
    entropy_N = batch.entropy_BT[batch.response_mask_BT]
    run.args.lgr_tau = torch.quantile(entropy_N, 1 - SHARE).item()
    lap, peaks = run.watch.lap, {}

    def noted(phase):
        lap(phase)
        peaks[phase] = max(peaks.get(phase, 0.0), memory.peak_mib() - before)
        memory.peak_mib(reset=True)

    run.watch.lap, before = noted, memory.peak_mib(reset=True)
    run.watch.restart()
    line = train.train_step(run, 1)
    assert 0.05 < line["triggered"] < 0.2, line["triggered"]
    return {name: (run.watch.latest[name], peaks[name]) for name in PHASES}


def attention_share(T: int) -> float:
    """Of the operations of a teacher's pass over T tokens, head included."""
    shape = shapes.PAIRS["small"][1]
    token, column, head = shapes.costs(shapes.random_model(shape, 8), shape.vocabulary)
    return column * T / 2 / (token + head + column * T / 2)


def parse(argv=None, tokens=0) -> argparse.Namespace:
    """The command line, and what `our_side.pair_flags` reads beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384])
    machine.add_flags(parser)
    return argparse.Namespace(**vars(parser.parse_args(argv)), prompts=1, tokens=tokens)


def main(argv=None) -> None:
    """Measure, print."""
    args, last, first = parse(argv), {}, None
    machine.quiet()
    tables.print_head("tokens", "attention", *(x for p in PHASES for x in (f"{p}, s", "MiB")))
    for T in args.lengths:
        with tempfile.TemporaryDirectory() as folder:
            shapes.write_pair(Path(folder), "small", 4096, 1, PROMPT, T)
            args.tokens = T
            words = our_side.pair_flags(Path(folder), args) + ["--method", "lgr"]
            found = memory.in_a_process(step, words)
        first = first or (T, found)
        cells = []
        for name in PHASES:
            for now, then in zip(found[name], first[1][name], strict=True):
                growth = now / then / (T / first[0])
                cells.append(f"{now:.3g} ({growth:.2f})" if T != first[0] else f"{now:.3g}")
            last |= {f"{name} {T} s": found[name][0], f"{name} {T} MiB": found[name][1]}
        tables.print_row(T, f"{attention_share(T):.0%}", *cells)
    tables.print_json(last, 3)


if __name__ == "__main__":
    main()
