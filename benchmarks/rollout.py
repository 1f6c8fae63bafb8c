r"""Sampling: `rollout.generate` against `model.generate`, on the same prompts to the same lengths.

    python benchmarks/rollout.py                                   CPU, the toy student: minutes
    python benchmarks/rollout.py --models qwen3-0.6b --batches 1 8 --rows 2 16 --caches dynamic \
        --rounds 2                                                 CPU, a real shape: ten minutes
    python benchmarks/rollout.py --models qwen3-0.6b --device cuda --dtype bfloat16 --tokens 1024

Models: the toy student with its real problems; random weights of Qwen3-0.6B's shape.

Lengths: `equal`, all rows as long as the longest; `heavy`, log-normal with a median of 15% of the
longest (sigma 0.9, cut at 100%), the way reasoning rollouts are: a few rows go on long after the
rest.  The toy's responses get their lengths from the number of moves in the problem and end by the
student's own stop token.  Random weights never stop by themselves, so there the head is made to
count down: after the token n comes n - 1, whatever the logits are, which are computed all the same,
and 0 stops; both sides see the same head.

Sides, interleaved in one process, best of `--rounds`, CPU time (GPU: wall time) of

  ours      rollout.generate with `batch` slots that are refilled, and with what training reads off
            it: log-probs, entropies, top-4 ids
  generate  model.generate on left-padded batches of `batch` rows, one after the other, tokens only:
            `dynamic` cache (default) or `static`, which on a GPU compiles the forward pass; ratios
            are against the faster one

Before anything is timed greedy rollouts of both sides are compared token by token.  Timed is
sampling at temperature 1, in tokens per second, for the two draw other tokens.  `bandwidth`: the
bytes that decoding has to read (weights once per step, keys and values up to each row's own
length) per second, over the measured speed of copying.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose rollout is this file

import harness  # noqa: E402
import rollout  # noqa: E402
import toy  # noqa: E402
from benchmarks import machine, shapes, tables, timing  # noqa: E402


class Countdown(torch.nn.Module):
    """A head after which the token n is followed by n - 1, whatever its logits are."""

    def __init__(self, head):
        super().__init__()
        self.head, self.last_B = head, None
        self.weight = head.weight  # where rollout.generate looks up the size of the vocabulary

    def forward(self, hidden_BTD):
        """Logits, with all but those of the next number far below."""
        logits_BTV = self.head(hidden_BTD)
        next_B = (self.last_B - 1).clamp(min=0)
        last_BV = logits_BTV.view(len(next_B), -1, logits_BTV.shape[-1])[:, -1]
        last_BV.scatter_add_(1, next_B[:, None], last_BV.new_full((len(next_B), 1), 1e4))
        return logits_BTV


def build(shape: str, device: str, dtype: torch.dtype, longest: int):
    """A random model of that shape that counts down."""
    model = shapes.random_model(shapes.SHAPES[shape], 2 * longest, device=device, dtype=dtype)
    head = Countdown(model.lm_head)
    model.lm_head = head

    def remember(module, args):
        head.last_B = args[0].reshape(len(args[0]), -1)[:, -1]

    model.model.embed_tokens.register_forward_pre_hook(remember)
    return model


def draw_lengths(kind: str, rows: int, longest: int) -> list[int]:
    """Response lengths in tokens."""
    if kind == "equal":
        return [longest] * rows
    generator = torch.Generator().manual_seed(0)
    z_B = torch.randn(rows, generator=generator)
    return (0.15 * longest * (0.9 * z_B).exp()).round().clamp(2, longest).int().tolist()


class Work:
    """A model, prompts that make it write to given lengths, and two ways of sampling."""

    def __init__(self, name, kind, rows, longest, prompt_tokens, device, dtype):
        self.kind = kind
        if name == "toy":
            folder = str(toy.world("horizon").student)
            self.model = harness.load_model(folder, dtype=dtype, device=torch.device(device))
            tokenizer = harness.load_tokenizer(folder)
            longest = 11 * toy.MAX_MOVES + 17
            self.limit = toy.response_limit(toy.MAX_MOVES)
            records = []
            for row, length in enumerate(draw_lengths(kind, rows, longest)):
                moves = min(max(round((length - 17) / 11), 1), toy.MAX_MOVES)
                records += toy.problems(1, moves=moves, split="test", seed=row)
            problems = harness.from_records(records, where="toy")
            self.prompts = harness.render_prompts(tokenizer, problems)
            self.eos, self.pad = [tokenizer.eos_token_id], tokenizer.pad_token_id
        else:
            self.model = build(name, device, dtype, longest + prompt_tokens)
            self.limit, self.eos, self.pad = longest + 1, [0], 1
            generator = torch.Generator().manual_seed(1)
            self.prompts = []
            for length in draw_lengths(kind, rows, longest):
                size = torch.randint(prompt_tokens // 2, prompt_tokens, (1,), generator=generator)
                prompt = torch.randint(2, 500, size.tolist(), generator=generator).tolist()
                self.prompts.append(prompt + [length])  # length more tokens: length - 1, ..., 0

    def ours(self, batch: int, greedy: bool, seed: int = 0) -> list[list[int]]:
        """Responses by `rollout.generate`."""
        out = rollout.generate(
            self.model, self.prompts, max_new_tokens=self.limit, eos_ids=self.eos, pad_id=self.pad,
            temperature=0.0 if greedy else 1.0, top_k=4, batch_size=batch,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        rows = zip(out.ids_BT.tolist(), out.response_mask_BT.tolist(), strict=True)
        return [[i for i, inside in zip(*row, strict=True) if inside] for row in rows]

    def generate(self, batch: int, greedy: bool, cache: str, seed: int = 0) -> list[list[int]]:
        """Responses by `model.generate`."""
        torch.manual_seed(seed)
        responses, device = [], self.model.device
        how = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        if cache == "static":
            how["cache_implementation"] = "static"
        for start in range(0, len(self.prompts), batch):
            prompts = self.prompts[start : start + batch]
            longest = max(map(len, prompts))
            ids_BT = torch.full((len(prompts), longest), self.pad)
            mask_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
            for row, prompt in enumerate(prompts):
                ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask_BT[row, longest - len(prompt) :] = 1
            out_BT = self.model.generate(
                ids_BT.to(device), attention_mask=mask_BT.to(device), max_new_tokens=self.limit,
                eos_token_id=self.eos, pad_token_id=self.pad, **how,
            )  # fmt: skip
            for ids in out_BT[:, longest:].tolist():
                ends = [t for t, token in enumerate(ids) if token in self.eos]
                responses.append(ids[: ends[0] + 1] if ends else ids)
        return responses

    def check(self, batch: int, caches: list[str]) -> tuple[float, int, float]:
        """Compare greedy rollouts; returns (share of equal tokens, tokens of all responses, bytes
        that decoding must read).

        Batched matrix products round differently, and a greedy choice between two tokens that are
        nearly as probable may fall either way; from there on the texts differ.
        """
        steps = []
        hook = self.model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: steps.append(len(output))
        )
        ours = self.ours(batch, greedy=True)
        hook.remove()
        same, total = 0, 0
        for cache in caches:
            for mine, theirs in zip(ours, self.generate(batch, True, cache), strict=True):
                total += max(len(mine), len(theirs))
                same += next(
                    (t for t, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
                    min(len(mine), len(theirs)),
                )
        config = self.model.config
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        columns = sum(
            len(r) * len(p) + len(r) * (len(r) - 1) // 2
            for p, r in zip(self.prompts, ours, strict=True)
        )
        bytes_read = len(steps) * weights + columns * token * self.model.dtype.itemsize
        return same / total, sum(map(len, ours)), bytes_read


def copy_speed(device: str) -> float:
    """Bytes per second read and written by copying a large buffer; best of 5."""
    source = torch.zeros(2**30 if device == "cuda" else 2**27, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        start = timing.clock(device)
        target.copy_(source)
        seconds = timing.clock(device) - start
        best = max(best, 2 * source.numel() * source.element_size() / seconds)
    return best


def measure(work: Work, batch: int, caches: list[str], rounds: int, device: str) -> dict:
    """Best tokens per second of each side at temperature 1, in turns."""

    def count(responses: list[list[int]]) -> int:
        return sum(map(len, responses))

    ways = {"ours": lambda number: count(work.ours(batch, greedy=False, seed=number))}
    for cache in caches:
        ways[cache] = lambda number, cache=cache: count(
            work.generate(batch, False, cache, seed=number)
        )
    turns = timing.take_turns(ways, rounds, device)
    return {name: max(n / seconds for seconds, n in calls) for name, calls in turns.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", default=["toy"], choices=["toy", *shapes.SHAPES])
    add("--lengths", nargs="+", default=["equal", "heavy"], choices=["equal", "heavy"])
    add("--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="rows in flight")
    add("--rows", type=int, nargs="+", help="rollouts for each batch (default 4 times, 8 to 512)")
    add("--tokens", type=int, default=48, help="longest response of random weights")
    add("--prompt-tokens", type=int, default=32, help="longest prompt of random weights")
    add("--caches", nargs="+", default=["dynamic", "static"], choices=["dynamic", "static"])
    add("--rounds", type=int, default=3)
    machine.add_flags(parser)
    args = parser.parse_args(argv)
    if args.rows and len(args.rows) != len(args.batches):
        parser.error(f"--rows has {len(args.rows)} numbers, --batches {len(args.batches)}")
    args.rows = args.rows or [min(max(4 * batch, 8), 512) for batch in args.batches]
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print the table, then its ratios as JSON."""
    args = parse(argv)
    machine.use_threads(args.threads)
    machine.quiet()
    speed, dtype = copy_speed(args.device), getattr(torch, args.dtype)
    where = machine.describe(args.device, args.threads, f"copying {speed / 1e9:.1f} GB/s")
    print(f"{args.dtype}, {where}")
    head = "model lengths batch rows mean_tokens same ours_tok/s bandwidth"
    tables.print_head(*head.split(), *(f"{cache}_tok/s" for cache in args.caches), "ratio")
    ratios, sizes = {}, list(zip(args.batches, args.rows, strict=True))
    for name, kind, (batch, rows) in itertools.product(args.models, args.lengths, sizes):
        work = Work(name, kind, rows, args.tokens, args.prompt_tokens, args.device, dtype)
        same, tokens, bytes_read = work.check(batch, args.caches)
        if same < 0.9:
            sys.exit(f"{name} {kind} {batch}: only {same:.3f} of the greedy tokens agree")
        best = measure(work, batch, args.caches, args.rounds, args.device)
        share = bytes_read / tokens * best["ours"] / speed
        others = [best[cache] for cache in args.caches]
        ratios[f"{name}/{kind}/{batch}"] = ratio = best["ours"] / max(others)
        tables.print_row(
            name, kind, batch, rows, f"{tokens / rows:.0f}", f"{same:.3f}", f"{best['ours']:.0f}",
            f"{share:.2f}", *(f"{other:.0f}" for other in others), f"{ratio:.2f}",
        )  # fmt: skip
    tables.print_json(ratios, 2)


if __name__ == "__main__":
    main()
