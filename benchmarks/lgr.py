r"""What one step of lookahead costs: tree attention against three other ways of getting the same.

    python benchmarks/lgr.py                                       CPU, a small model, L up to 2048
    python benchmarks/lgr.py --device cuda --dtype bfloat16 --shape qwen3-1.7b --lengths 16384

One rollout of L tokens under a random Qwen3, a share of its response triggered, K candidates of
which one is nearly always the sampled token, as on real rollouts.  Timed, interleaved in one
process, CPU time of one thread (or GPU time), best of `--repeats`:

  opd         what plain OPD scoring does: a teacher pass and its statistics through the head
  lgr         the same pass kept as the trunk, its statistics, then the leaves and their rewards:
              what `train.py --method lgr` does
  naive       one forward pass per candidate over its whole prefix, head at the last position only
  reprefill   the scheme of the paper's cost model: the candidates go in 8 slices, each one pass
              over trunk and leaves under a tree mask, nothing kept between slices, every
              candidate a leaf (the authors' code spends two nodes on each)
  plain       one causal pass, with statistics, over as many tokens as trunk and leaves have: the
              limit by FLOPs, were leaves as cheap as trunk tokens

naive is timed once per candidate for `--naive` lengths only (minutes), in portions between runs of
lgr.  Before anything is timed, the tree's confidences are compared with those of naive and
reprefill on some positions.  FLOPs are those of matrix products and attention, counted by formula:
a causal pass attends to half of its square, a leaf to the columns of its slice's mask.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose lgr and logprobs are benchmarks

import lgr  # noqa: E402
import logprobs  # noqa: E402
from benchmarks import machine, shapes, tables, timing  # noqa: E402


class Work:
    """One rollout to be scored, and the ways to do it."""

    def __init__(self, model, length: int, K: int, rate: float, nodes: int, slices: int):
        self.model, self.nodes, self.slices = model, nodes, slices
        self.weight_VD = model.get_output_embeddings().weight
        V, device = len(self.weight_VD), model.device
        generator = torch.Generator().manual_seed(1)
        self.ids_BT = torch.randint(V, (1, length), generator=generator)
        self.mask_BT = torch.arange(length)[None] >= min(64, length // 4)  # after the prompt
        response_N = self.mask_BT[0].nonzero()[:, 0]
        chosen_N = torch.randperm(len(response_N), generator=generator)
        chosen_N = response_N[chosen_N[: round(rate * len(response_N))]]
        self.trigger_BT = torch.zeros_like(self.mask_BT).index_fill_(1, chosen_N, True)
        self.candidates_BTK = torch.randint(V, (1, length, K), generator=generator)
        holds_BT = torch.rand(1, length, generator=generator) < 0.97  # the sampled token
        self.candidates_BTK[holds_BT, 0] = self.ids_BT[holds_BT]
        for name in ("ids_BT", "mask_BT", "trigger_BT", "candidates_BTK"):
            setattr(self, name, getattr(self, name).to(device))
        sampled_BTK = self.candidates_BTK == self.ids_BT[..., None]
        self.leaves = int((self.trigger_BT[..., None] & ~sampled_BTK).sum())
        self.more_BT = torch.randint(V, (1, self.leaves), generator=generator).to(device)

    def statistics(self, hidden_BTD, ids_BT):
        """What scoring reads off the trunk."""
        return logprobs.token_stats(hidden_BTD, self.weight_VD, ids_BT)

    def opd(self):
        """Plain scoring."""
        hidden_BTD = self.model.base_model(input_ids=self.ids_BT, use_cache=False)[0]
        self.statistics(hidden_BTD, self.ids_BT)

    def lgr(self):
        """Scoring with lookahead; returns the confidences."""
        trunk = self.model.base_model(input_ids=self.ids_BT, use_cache=True)
        self.statistics(trunk[0], self.ids_BT)
        confidence_BTK = lgr.lookahead_confidence(
            self.model, self.ids_BT, self.mask_BT, self.trigger_BT, self.candidates_BTK,
            cache=trunk.past_key_values, hidden_BTD=trunk[0], nodes_per_slice=self.nodes,
        )  # fmt: skip
        lgr.sampled_reward(lgr.group_reward(confidence_BTK), self.candidates_BTK, self.ids_BT)
        return confidence_BTK

    def plain(self):
        """A causal pass over as many tokens as trunk and leaves."""
        ids_BT = torch.cat([self.ids_BT, self.more_BT], dim=1)
        self.statistics(self.model.base_model(input_ids=ids_BT, use_cache=False)[0], ids_BT)

    def confidence(self, hidden_ND):
        """Maximum probability, for the two baselines below."""
        out = []
        for start in range(0, len(hidden_ND), 1024):
            logits_CV = (hidden_ND[start : start + 1024] @ self.weight_VD.T).float()
            out.append(logits_CV.softmax(dim=-1).amax(dim=-1))
        return torch.cat(out)

    def naive(self, positions: list[int]):
        """Confidences [n, K] at some positions, a pass per candidate."""
        rows = []
        for t in positions:
            for token in self.candidates_BTK[0, t]:
                path_BT = torch.cat([self.ids_BT[:, :t], token.reshape(1, 1)], dim=1)
                hidden_BTD = self.model.base_model(input_ids=path_BT, use_cache=False)[0]
                rows.append(self.confidence(hidden_BTD[0, -1:]))
        return torch.cat(rows).reshape(len(positions), -1)

    def reprefill(self):
        """Confidences [n, K] at all triggered positions, a whole tree per slice."""
        self.opd()
        column_N = self.trigger_BT[0].nonzero()[:, 0]
        T, K, device = self.ids_BT.shape[1], self.candidates_BTK.shape[2], self.ids_BT.device
        out = []
        for part_N in column_N.tensor_split(self.slices):
            position_Q = part_N.repeat_interleave(K)
            leaf_Q = self.candidates_BTK[0, part_N].flatten()
            column_L = torch.arange(T + len(leaf_Q), device=device)
            allowed_LL = column_L <= column_L[:, None]
            allowed_LL[T:] = column_L < position_Q[:, None]
            allowed_LL[T:, T:] = torch.eye(len(leaf_Q), dtype=torch.bool, device=device)
            hidden_BTD = self.model.base_model(
                input_ids=torch.cat([self.ids_BT[0], leaf_Q])[None],
                attention_mask=allowed_LL[None, None],
                position_ids=torch.cat([column_L[:T], position_Q])[None],
                use_cache=False,
            )[0]
            out.append(self.confidence(hidden_BTD[0, T:]))
        return torch.cat(out).reshape(len(column_N), K)

    def check(self) -> float:
        """Largest difference of the three on the same positions."""
        column_N = self.trigger_BT[0].nonzero()[:, 0]
        tree_NK = self.lgr()[0, column_N]
        some = range(0, len(column_N), max(1, len(column_N) // 4))
        naive_NK = self.naive(column_N[list(some)].tolist())
        differences = [tree_NK - self.reprefill(), tree_NK[list(some)] - naive_NK]
        return max(float(d.abs().max()) for d in differences)

    def flops(self) -> tuple[float, float]:
        """(plain scoring, leaves) by formula."""
        T = self.ids_BT.shape[1]
        token, column, head = shapes.costs(self.model, len(self.weight_VD))
        sampled_BTK = self.candidates_BTK == self.ids_BT[..., None]
        leaf_BTK = self.trigger_BT[..., None] & ~sampled_BTK
        columns = 0
        for _, column_N, _ in lgr._slices(leaf_BTK, self.nodes):
            columns += len(column_N) * (int(column_N.max()) + len(column_N))
        trunk = T * (token + head) + column * T * (T + 1) / 2
        return trunk, self.leaves * (token + head) + column * columns


def measure(work: Work, naive: bool, repeats: int, device: str) -> dict[str, float]:
    """Best seconds of each way, in turns; naive's are the sum of its portions, one per turn."""
    ways = {"opd": work.opd, "lgr": work.lgr, "reprefill": work.reprefill, "plain": work.plain}
    ways = {name: lambda _, way=way: way() for name, way in ways.items()}
    portions = work.trigger_BT[0].nonzero()[:, 0].tensor_split(repeats)
    if naive:
        ways["naive"] = lambda number: work.naive(portions[number].tolist())
    calls = timing.take_turns(ways, repeats, device)
    seconds = {name: [s for s, _ in pairs] for name, pairs in calls.items()}
    return {name: sum(s) if name == "naive" else min(s) for name, s in seconds.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=list(shapes.SHAPES), default="small")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens")
    add("--naive", type=int, nargs="*", help="lengths to time naive at (default: the last)")
    add("--candidates", type=int, nargs="+", default=[4, 8], help="K")
    add("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="triggered share")
    add("--nodes", type=int, default=4096, help="candidates per pass, as train.py --lgr-nodes")
    add("--slices", type=int, default=8, help="of reprefill")
    add("--repeats", type=int, default=5)
    machine.add_flags(parser)
    args = parser.parse_args(argv)
    args.naive = args.lengths[-1:] if args.naive is None else args.naive
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print the table, then as JSON the row of the last length and K, at rate 0.1 if there is."""
    args = parse(argv)
    machine.use_threads(args.threads)
    model = shapes.random_model(
        shapes.SHAPES[args.shape], 4 * max(args.lengths), device=args.device,
        dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    print(f"{args.shape}, {args.dtype}, {machine.describe(args.device, args.threads)}")
    head = "L K rate leaves opd_s lgr_s over_opd flops_over_opd over_flop_limit vs_reprefill"
    tables.print_head(*head.split(), "vs_naive")
    best_rate = 0.1 if 0.1 in args.rates else args.rates[0]
    headline = {}
    for length, K, rate in itertools.product(args.lengths, args.candidates, args.rates):
        work = Work(model, length, K, rate, args.nodes, args.slices)
        error = work.check()
        if not error < machine.tolerance(args.dtype):
            sys.exit(f"L={length} K={K} rate={rate}: confidences differ by {error}")
        last = (K, rate) == (args.candidates[-1], best_rate)
        s = measure(work, last and length in args.naive, args.repeats, args.device)
        trunk, leaves = work.flops()
        row = {
            "over_opd": s["lgr"] / s["opd"],
            "flops_over_opd": 1 + leaves / trunk,
            "over_flop_limit": s["lgr"] / s["plain"],
            "vs_reprefill": s["reprefill"] / s["lgr"],
            "vs_naive": s["naive"] / s["lgr"] if "naive" in s else None,
        }
        shown = [None if value is None else f"{value:.2f}" for value in row.values()]
        first = length, K, f"{rate:g}", work.leaves, f"{s['opd']:.3f}", f"{s['lgr']:.3f}"
        tables.print_row(*first, *shown)
        headline = row if last else headline
    keys = ("vs_naive", "vs_reprefill", "over_opd", "flops_over_opd", "over_flop_limit")
    tables.print_json({key: headline[key] for key in keys}, 3)


if __name__ == "__main__":
    main()
