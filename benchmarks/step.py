r"""What a whole training step costs: ours against TRL's, and our methods beside each other.

    python benchmarks/step.py                                            CPU, one thread, minutes
    python benchmarks/step.py --vocabularies 4096 --only peer --rounds 20      one part, more rounds
    python benchmarks/step.py --device cuda --dtype bfloat16 --shape qwen3-0.6b \
        --vocabularies 151936 --prompts 64 --tokens 512
    python benchmarks/step.py --only methods -- --prompts-per-step 16    flags for train.py's steps

A step is sampling, teacher scoring, student forward and backward, clipping, the optimizer and what
a trainer does around them.  Only steps count, not set-up: CPU time of the process and its workers
(GPU: wall time after synchronising), sides taking turns in one process; the first round warms up.
min and median are over rounds, phases the least over rounds (of each, so that they need not add up
to a step); ratios are those of the minima, "paired" the median of the ratios of each round.

peer      `train.train_step` with `--method rkl` against TRL's `DistillationTrainer`, the same work:
          random Qwen3 models, equal prompts, responses of exactly --tokens tokens, one AdamW update
          per batch, the loss the mean over response tokens of the full-vocabulary reverse KL at
          temperature 1.  Before anything is timed, TRL's loss and gradient on rollouts of ours are
          compared with those of our step.  The tokenizer's end token lies one past the last row of
          both heads, so that neither side can draw it or pays for forbidding it (TRL's
          `min_new_tokens` is a pass over the logits per token).  TRL's phases: sample is
          `_prepare_inputs` (generation and what belongs to it), score the teacher's backbone,
          update the rest, the teacher's head included.  (Ours runs the teacher's head in score,
          too, for what it logs.)  trl_side.py says how TRL is set up.

methods   the toy worlds as `train.py` runs them: `opd`, `rkl`, `release` on horizon, `opd`, `lgr`
          on fork.  The student is set back before each step, so that all methods of a world work
          on identical rollouts (checked).  "rule" is a step without its update, where `release`
          is cheaper than `opd`, because what it released is cut off; its mask over a step of opd
          is the steadiest figure of its cost.  FLOPs, by formula, are those of matrix products
          and attention in sampling, teacher trunk, leaves and update (3 forwards): every row
          alone, which no implementation avoids, and with trunk and update padded to the longest
          row, which makes opd dearer.

Memory: each side alone in a fresh process, three steps; MiB of resident memory at the end of its
set-up, and by how much its peak during the steps exceeds that (GPU: allocated memory).
"""

import argparse
import importlib.metadata
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, some of whose files are called as the project's

import lgr  # noqa: E402
import rollout  # noqa: E402
from benchmarks import machine, memory, our_side, shapes, tables, timing  # noqa: E402

WORLDS = {"horizon": ("opd", "rkl", "release"), "fork": ("opd", "lgr")}
BEFORE_UPDATE = ("sample", "score", "mask", "lookahead")
PHASES = (*BEFORE_UPDATE, "update")


# ---------------------------------------------------------------------------- peer: us against TRL
def time_both(folder: Path, args, steps: int) -> tuple[dict[str, timing.Ledger], dict | None]:
    """Rounds of `steps` steps, theirs then ours; the ledgers by side, and what was checked."""
    run = our_side.load(our_side.pair_flags(folder, args))
    ledgers, numbers, checked = {"ours": timing.Ledger()}, itertools.count(), None
    turns = args.rounds + 1
    bar = tqdm(total=turns * steps, leave=False, unit="step")

    def our_round():
        with ledgers["ours"].round(steps, args.device) as phases:
            for number in itertools.islice(numbers, steps):
                line, by_phase = our_side.step(run, number)
                phases.append(by_phase)
        if (line["response_tokens"], line["truncated"]) != (args.tokens, 1):
            raise ValueError(f"our rollouts are not of the wanted lengths: {line}")
        bar.update(steps)

    if args.no_trl:
        for _ in range(turns):
            our_round()
    else:
        from benchmarks import trl_side

        trainer = trl_side.make_trainer(folder, args, turns * steps)
        checked = trl_side.check_same_work(run, trainer, args)
        ledgers = {"trl": timing.Ledger()} | ledgers
        turn_taker = trl_side.TurnTaker(trainer, ledgers["trl"], our_round, steps, args.device)
        trainer.add_callback(turn_taker)
        trainer.train()
    bar.close()
    for ledger in ledgers.values():
        assert len(ledger.cpu) == turns
        for series in (ledger.cpu, ledger.wall, ledger.phases):
            del series[0]  # warm-up
    return ledgers, checked


def peak_memory(side: str, folder: Path, args) -> dict[str, float]:
    """One side of `peer`, in a process of its own."""
    if side == "ours":
        return our_side.peak_memory(our_side.pair_flags(folder, args))
    from benchmarks import trl_side

    return trl_side.peak_memory(folder, args)


def peer(vocabulary: int, args) -> dict[str, float]:
    """One vocabulary: rows of the table; returns its figures for the last line."""
    names, figures = {"trl": "TRL", "ours": "ours"}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.write_pair(
            folder, args.shape, vocabulary, args.prompts, args.prompt_tokens, args.tokens
        )
        ledgers, checked = time_both(folder, args, args.steps_per_round)
        peaks = {side: {} for side in ledgers}
        if not args.no_memory:
            peaks = {side: memory.in_a_process(peak_memory, side, folder, args) for side in ledgers}
    if checked:
        print("V={}: on the same rollouts loss {loss:.6f}, TRL's {trl_loss:.6f} nats, "
              "gradients {gradients_apart:.1e} of their norm apart".format(vocabulary, **checked))
    head = "V side s_min s_median wall_min sample score update set_up_MiB peak_above_MiB"
    tables.print_head(*head.split())
    for side, ledger in ledgers.items():
        seconds = ledger.seconds(args.device)
        phases = [ledger.least(name) for name in ("sample", "score", "update")]
        print_row(
            vocabulary, names[side], min(seconds), statistics.median(seconds), min(ledger.wall),
            *phases, peaks[side].get("set_up"), peaks[side].get("above"),
        )  # fmt: skip
        figures[f"{side}_s_{vocabulary}"] = min(seconds)
        if peaks[side]:
            figures[f"{side}_peak_MiB_{vocabulary}"] = peaks[side]["above"]
    if "trl" in ledgers:
        both = [ledgers[side].seconds(args.device) for side in ("trl", "ours")]
        ratio, paired = timing.ratios(*both)
        print(f"\nV={vocabulary}: TRL / ours {ratio:.2f}, paired {paired:.2f}\n", flush=True)
        figures |= {
            f"trl_over_ours_{vocabulary}": ratio, f"trl_over_ours_paired_{vocabulary}": paired
        }  # fmt: skip
    return figures


# ------------------------------------------------------------- methods: one step, the same rollouts
def methods(world: str, names: tuple[str, ...], args) -> dict[str, float]:
    """One world, rows of the table and what they compare; returns figures for the last line."""
    common = ["--toy", world, *our_side.machine_flags(args), *args.flags]
    flags = {m: ["--method", m, *common] for m in names}
    runs = {m: our_side.load(flags[m]) for m in names}
    weights = {m: our_side.weights_of(run) for m, run in runs.items()}
    recorded = our_side.recorded
    with recorded(rollout, "generate") as rollouts, recorded(lgr, "lookahead_confidence") as looks:
        for run in runs.values():
            our_side.step(run, 0)  # warm-up
    batch = rollouts[0][1]
    if not all(torch.equal(other.ids_BT, batch.ids_BT) for _, other in rollouts):
        raise ValueError(f"{names} did not sample the same rollouts")
    ledgers = {m: timing.Ledger() for m in names}
    for number in tqdm(range(args.rounds * args.steps_per_round), leave=False, unit="round"):
        for m in names if number % 2 == 0 else names[::-1]:
            our_side.set_back(runs[m], weights[m])
            with ledgers[m].round(1, args.device) as phases:
                phases.append(our_side.step(runs[m], 0)[1])
    peaks = {m: {} for m in names}
    if not args.no_memory:
        peaks = {m: memory.in_a_process(our_side.peak_memory, flags[m]) for m in names}
    show_methods(world, ledgers, peaks, args.device)
    figures = compare_methods(world, ledgers, args.device)
    if "lgr" in names:
        figures |= compare_flops(runs["lgr"], batch, lgr_leaves([call[0] for call in looks]))
    print(flush=True)
    return figures


def show_methods(world: str, ledgers: dict[str, timing.Ledger], peaks: dict, device: str) -> None:
    """The table of one world."""
    tables.print_head("world", "method", "s_min", "s_median", "wall_min", *PHASES, "rule",
                      "set_up_MiB", "peak_above_MiB")  # fmt: skip
    for m, ledger in ledgers.items():
        seconds = ledger.seconds(device)
        phases = [ledger.least(name) for name in PHASES]
        print_row(
            world, m, min(seconds), statistics.median(seconds), min(ledger.wall), *phases,
            ledger.least(*BEFORE_UPDATE), peaks[m].get("set_up"), peaks[m].get("above"),
        )  # fmt: skip


def compare_methods(world: str, ledgers: dict[str, timing.Ledger], device: str) -> dict[str, float]:
    """Every method against opd: a line each, and the figures."""
    figures, base = {}, ledgers["opd"]
    for m, ledger in ledgers.items():
        figures[f"{m}_s_{world}"] = min(ledger.seconds(device))
        if m == "opd":
            continue
        ratio, paired = timing.ratios(ledger.seconds(device), base.seconds(device))
        wall, wall_paired = timing.ratios(ledger.wall, base.wall)
        parts = [side.series(*BEFORE_UPDATE) for side in (ledger, base)]
        rule, rule_paired = timing.ratios(*parts)
        print(f"{world}: {m} / opd {ratio:.3f}, paired {paired:.3f}; wall {wall:.3f}, paired "
              f"{wall_paired:.3f}; without the update {rule:.3f}, paired {rule_paired:.3f}",
              flush=True)  # fmt: skip
        figures |= {
            f"{m}_over_opd": ratio, f"{m}_over_opd_paired": paired, f"{m}_over_opd_wall": wall,
            f"{m}_over_opd_wall_paired": wall_paired, f"{m}_over_opd_without_update": rule,
            f"{m}_over_opd_without_update_paired": rule_paired,
        }  # fmt: skip
        if m == "release":  # the steadiest figure: opd has no such phase
            figures["release_mask_of_opd_step"] = ledger.least("mask") / min(base.series(*PHASES))
            share = figures["release_mask_of_opd_step"]
            print(f"{world}: release's phase mask takes {share:.1%} of a step of opd")
    return figures


# ------------------------------------------------------------------------------------ FLOPs by hand
def flops(run, mask_BT: torch.Tensor, padded: bool = False) -> dict[str, float]:
    """Of one step of plain OPD on these responses, by phase; every row alone, or in score and
    update as long as the longest one."""
    response_B = mask_BT.sum(dim=1)
    end_B = mask_BT.long().cumsum(dim=1).argmax(dim=1) + 1  # prompt and response
    fed_B = torch.full_like(end_B, mask_BT.shape[1]) if padded else end_B

    def forward(model, length_B):
        token, column, head = shapes.costs(model, run.vocab_size)
        own_B = token * length_B + column * length_B * (length_B + 1) / 2
        return float((own_B + head * response_B).sum())

    return {
        "sample": forward(run.model, end_B - 1),  # the last token is never fed
        "score": forward(run.teacher, fed_B),
        "update": 3 * forward(run.model, fed_B),
    }


def leaf_flops(run, column_N: torch.Tensor) -> float:
    """Of leaves that branch off these columns: each attends to the trunk before it and itself."""
    token, column, head = shapes.costs(run.teacher, run.vocab_size)
    return float((token + head + column * (column_N + 1)).sum())


def compare_flops(run, batch, column_N: torch.Tensor) -> dict[str, float]:
    """A step of lgr over one of opd, on these rollouts and leaves: two lines and the figures."""
    mask_BT, ahead = batch.response_mask_BT, leaf_flops(run, column_N)
    tight, padded = flops(run, mask_BT), flops(run, mask_BT, padded=True)
    figures = {
        "lgr_over_opd_flops": 1 + ahead / sum(tight.values()),
        "lgr_over_opd_flops_padded": 1 + ahead / sum(padded.values()),
    }
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in tight.items())
    print("lgr / opd by FLOPs {:.3f}, where opd's count has padding {:.3f}".format(
        *figures.values()))  # fmt: skip
    print(f"{len(mask_BT)} rollouts, {int(mask_BT.sum())} response tokens, {len(column_N)} leaves; "
          f"GFLOPs: {parts}, leaves {ahead / 1e9:.2f}")  # fmt: skip
    return figures


def lgr_leaves(calls: list[tuple]) -> torch.Tensor:
    """The columns [N] of all leaves of some calls of `lgr.lookahead_confidence`: triggered
    positions' candidates but the sampled token, whose leaf is the trunk."""
    column_N = []
    for _, ids_BT, mask_BT, trigger_BT, candidates_BTK, *_ in calls:
        leaf_BTK = (trigger_BT & mask_BT)[..., None] & (candidates_BTK != ids_BT[..., None])
        column_N.append(leaf_BTK.nonzero()[:, 1])
    return torch.cat(column_N) if column_N else torch.zeros(0, dtype=torch.int64)


# --------------------------------------------------------------------------------------------- main
def print_row(*values) -> None:
    """A row: seconds to four digits, MiB (above 20) whole."""
    shown = (f"{x:.0f}" if isinstance(x, float) and x > 20 else x for x in values)
    tables.print_row(*(f"{x:.4f}" if isinstance(x, float) else x for x in shown))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags; those after -- go to train.py in the part `methods`."""
    argv = sys.argv[1:] if argv is None else argv
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (
        argv, [])  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", choices=["peer", "methods"], help="one part")
    add("--vocabularies", type=int, nargs="+", default=[4096, 32768], help="of peer, tokens")
    add("--shape", choices=list(shapes.PAIRS), default="small", help="of peer's models")
    add("--prompts", type=int, default=8, help="of peer, per step")
    add("--prompt-tokens", type=int, default=16, help="of peer, each")
    add("--tokens", type=int, default=64, help="of peer, per response")
    add("--rounds", type=int, default=6, help="timed; one more warms up")
    add("--steps-per-round", type=int, default=2, help="(methods: as many rounds more)")
    machine.add_flags(parser)
    add("--no-trl", action="store_true", help="our side alone")
    add("--no-memory", action="store_true", help="times only")
    args = parser.parse_args(argv)
    for name in ("prompts", "prompt_tokens", "tokens", "rounds", "steps_per_round"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.flags = flags
    return args


def trl_version() -> str | None:
    """TRL's version; None, and a line that says why, where its side cannot be had."""
    try:
        from benchmarks import trl_side  # noqa: F401
    except (ImportError, RuntimeError) as error:
        print("our side alone: no TRL with a DistillationTrainer here "
              f"(benchmarks/requirements.txt): {error}")  # fmt: skip
        return None
    return importlib.metadata.version("trl")


def main(argv: list[str] | None = None) -> None:
    """Print the tables, then their figures as JSON."""
    args = parse(argv)
    machine.quiet()
    machine.use_threads(args.threads)
    where = machine.describe(args.device, args.threads)
    args.no_trl |= args.only == "methods"
    if not args.no_trl:
        version = trl_version()
        args.no_trl, where = version is None, where + (f", trl {version}" if version else "")
    print(f"{args.dtype}, {where}")
    figures = {}
    if args.only != "methods":
        print(f"\npeer: {args.shape}, {args.prompts} prompts of {args.prompt_tokens} tokens, "
              f"{args.tokens} response tokens, {args.rounds} rounds of {args.steps_per_round} "
              "steps\n", flush=True)  # fmt: skip
        for vocabulary in args.vocabularies:
            figures |= peer(vocabulary, args)
    if args.only != "peer":
        for world, names in WORLDS.items():
            figures |= methods(world, names, args)
    tables.print_json(figures, 4)


if __name__ == "__main__":
    main()
