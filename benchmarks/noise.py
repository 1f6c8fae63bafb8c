r"""How much of LGR's group reward is rounding, by eps and by the teacher's type.

    python benchmarks/noise.py                                     two toy worlds: a minute
    python benchmarks/noise.py --pair runs/smollm2 --prompts 8     and a real pair: minutes more

The student writes responses; the same teacher in float64, float32 and bfloat16 then looks ahead
from each token with an entropy above 0.2 nats, at the student's 8 likeliest. Columns:

    flat       share of groups whose confidences differ by less than 0.001 in float64
    of them    their share in the sum of squared rewards
    float32, bfloat16    sum of squared errors to float64's rewards over the sum of their squares:
               0 is exact, 1 as large as the reward, 2 nothing in common

Writes results/noise.{json,md}; the last line printed is JSON.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lgr  # noqa: E402
import train  # noqa: E402
from benchmarks import machine, our_side, tables  # noqa: E402
from harness.log import FLAT  # noqa: E402

SETTINGS = {
    **{f"(c - mean) / (std + {eps:g})": {"eps": eps} for eps in (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)},
    "guard: / std where above 1e-8": {"normalize": "guard"},
    "mean: not divided": {"normalize": "mean"},
}


@torch.no_grad()
def confidences(words: list[str]) -> dict[torch.dtype, torch.Tensor]:
    """{type: [groups, K]} of one batch of responses."""
    run, found = our_side.load(["--method", "lgr", "--steps", "1", *words]), {}
    batch, _ = train.sample(run, 0)
    mask_BT = batch.response_mask_BT
    trigger_BT = lgr.trigger(batch.entropy_BT, mask_BT, run.args.lgr_tau)
    candidates_BTK = batch.topk_ids_BTK[..., : run.args.lgr_top_k]
    how = {"vocab_size": run.vocab_size, "stop_class": run.stop_class}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        teacher = copy.deepcopy(run.teacher).to(dtype)
        seen = teacher, batch.ids_BT, mask_BT, trigger_BT, candidates_BTK
        found[dtype] = lgr.lookahead_confidence(*seen, **how)[trigger_BT].double()
    return found


def figures(found: dict, how: dict) -> dict[str, float]:
    """The columns for one way to make rewards of confidences.

    >>> exact = torch.tensor([[0.5, 0.1], [0.9, 0.9]])
    >>> off = torch.tensor([[0.5, 0.1], [0.9, 0.900001]])
    >>> found = {torch.float64: exact, torch.float32: exact, torch.bfloat16: off}
    >>> [round(x, 3) for x in figures(found, {"normalize": "guard"}).values()]
    [0.5, 0.0, 0.0, 1.0]
    """
    exact = found[torch.float64]
    reward, flat = lgr.group_reward(exact, **how), exact.amax(-1) - exact.amin(-1) < FLAT
    power = reward.square().sum()
    errors = {
        str(dtype).removeprefix("torch."): (lgr.group_reward(found[dtype], **how) - reward)
        for dtype in (torch.float32, torch.bfloat16)
    }
    shares = {name: (error.square().sum() / power).item() for name, error in errors.items()}
    of_them = (reward[flat].square().sum() / power).item()
    return {"flat": flat.double().mean().item(), "of them": of_them, **shares}


def parse(argv=None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--worlds", nargs="*", default=["fork", "horizon"])
    add("--pair", type=Path, metavar="FOLDER", help="of examples/smollm2/prepare.py")
    add("--prompts", type=int, default=32)
    add("--max-new-tokens", type=int, default=96, help="of --pair")
    add("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Measure, print, write."""
    args = parse(argv)
    machine.quiet()
    size = ["--prompts-per-step", str(args.prompts), "--threads", "1"]
    pairs = {world: ["--toy", world, *size] for world in args.worlds}
    if args.pair:
        words = ["--student", f"{args.pair}/student", "--teacher", f"{args.pair}/teacher"]
        words += ["--problems", f"{args.pair}/train.jsonl"]
        words += ["--max-new-tokens", str(args.max_new_tokens)]
        pairs[args.pair.name] = words + size
    record, parts = {}, []
    for name, words in pairs.items():
        found = confidences(words)
        record[name] = {how: figures(found, setting) for how, setting in SETTINGS.items()}
        rows = [[how, *(f"{x:.3g}" for x in row.values())] for how, row in record[name].items()]
        head = ["reward", *next(iter(record[name].values()))]
        parts.append(f"## {name}: {len(found[torch.float64])} groups\n\n{tables.table(head, rows)}")
        print("\n" + parts[-1], flush=True)
    said = " ".join(["python benchmarks/noise.py", *(argv or sys.argv[1:])])
    text = f"# Rounding in the group reward\n\nWritten by `{said}`, which explains the columns. "
    text += f"{machine.describe('cpu', 1)}.\n\n" + "\n\n".join(parts) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "noise.md").write_text(text)
    (args.out / "noise.json").write_text(json.dumps(record, indent=1) + "\n")
    tables.print_json({f"{name} {how}": row["bfloat16"] for name, rows in record.items()
                       for how, row in rows.items()}, 4)  # fmt: skip


if __name__ == "__main__":
    main()
