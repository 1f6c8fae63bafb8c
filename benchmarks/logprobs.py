r"""What numbers read off a large vocabulary cost, in chunks and with full logits: time and memory.

    python benchmarks/logprobs.py                                   CPU, the head of Qwen3-0.6B
    python benchmarks/logprobs.py --device cuda --dtype bfloat16 --lengths 4096 --peaks 4096 16384

One row of T tokens, random hidden states [T, D] and head [V, D].  Three jobs:

  score   log-prob of every token, entropy, top-8; no gradient (`token_stats`)
  logp    a weighted sum of the log-probs, gradients of it in hidden states and head
  rkl     the same with KL(student || teacher) over the whole vocabulary; the teacher is as wide

and the ways to do them:

  ours      chunk by chunk; where there is a gradient, in the same pass (fast/head.py, `scale_BT`)
  plain     chunk by chunk, and backward computes the logits again (logprobs.py)
  naive     full logits [T, V], log_softmax, autograd
  compiled  naive under torch.compile, which fuses what it can; on a GPU only

Time: interleaved in one process, CPU time of one thread (or GPU time), best of `--repeats`.  Before
that every way's numbers and gradients are compared with naive's.  Memory: the peak above what the
arguments take, gradients included ([T, D] and, of the head, [V, D]): on a CPU the resident memory
of a process of its own (Linux), on a GPU what PyTorch's allocator says.  At lengths above
`--naive` only ours is measured.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose logprobs is this file

import logprobs  # noqa: E402
from benchmarks import machine, memory, tables, timing  # noqa: E402
from fast import head  # noqa: E402

JOBS = {"score": ("ours", "naive"), "logp": ("ours", "plain", "naive"),
        "rkl": ("ours", "plain", "naive")}  # fmt: skip


def naive_score(hidden_TD, head_VD, ids_T, K):
    """Log-probs [T], entropy [T], top-K log-probs [T, K] by full logits."""
    logp_TV = torch.log_softmax((hidden_TD @ head_VD.T).float(), dim=-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(dim=-1)
    return logp_TV.gather(1, ids_T[:, None])[:, 0], entropy_T, logp_TV.topk(K, dim=-1).values


def naive_logp(hidden_TD, head_VD, ids_T, weight_T):
    """The weighted sum of log-probs by full logits."""
    logp_TV = torch.log_softmax((hidden_TD @ head_VD.T).float(), dim=-1)
    return (weight_T * logp_TV.gather(1, ids_T[:, None])[:, 0]).sum()


def naive_rkl(hidden_TD, head_VD, teacher_TD, teacher_VD, weight_T):
    """The weighted sum of KL(student || teacher) by full logits."""
    log_p_TV = torch.log_softmax((hidden_TD @ head_VD.T).float(), dim=-1)
    with torch.no_grad():
        log_q_TV = torch.log_softmax((teacher_TD @ teacher_VD.T).float(), dim=-1)
    return (weight_T * (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dim=-1)).sum()


class Work:
    """The arguments at one length, and the ways to do the jobs with them."""

    def __init__(self, length: int, args):
        device, dtype = args.device, getattr(torch, args.dtype)
        torch.manual_seed(0)

        def random(*shape, scale=1.0):
            return torch.empty(shape, device=device, dtype=dtype).normal_().mul_(scale)

        V, D, self.chunk = args.vocabulary, args.width, args.chunk
        self.hidden_BTD, self.teacher_BTD = random(1, length + 1, D), random(1, length + 1, D)
        self.head_VD, self.teacher_VD = random(V, D, scale=D**-0.5), random(V, D, scale=D**-0.5)
        self.ids_BT = torch.randint(V, (1, length + 1), device=device)
        self.weight_BT = torch.randn(1, length + 1, device=device) / length
        self.hidden_BTD.requires_grad_(), self.head_VD.requires_grad_()
        self.naive = {"score": naive_score, "logp": naive_logp, "rkl": naive_rkl}

    def run(self, job: str, way: str) -> tuple[torch.Tensor, ...]:
        """What the job gives: log-probs, entropy and top-8; or sum and gradients."""
        self.hidden_BTD.grad = self.head_VD.grad = None
        if job == "score":
            with torch.no_grad():
                return self.ours_score() if way == "ours" else self.full(job)
        total = self.full(job) if way == "naive" else self.chunked(job, way)
        total.backward()
        return total.detach(), self.hidden_BTD.grad, self.head_VD.grad

    def ours_score(self):
        """By chunks."""
        stats = logprobs.token_stats(
            self.hidden_BTD, self.head_VD, self.ids_BT, top_k=8, chunk=self.chunk
        )
        return stats.logp_BT[0, 1:], stats.entropy_BT[0, 1:], stats.topk_logp_BTK[0, 1:]

    def chunked(self, job: str, way: str):
        """The weighted sum by chunks."""
        how = {"chunk": self.chunk} | ({"scale_BT": self.weight_BT} if way == "ours" else {})
        files = head if way == "ours" else logprobs
        if job == "logp":
            out = files.token_logprobs(self.hidden_BTD, self.head_VD, self.ids_BT, **how)
        else:
            out = files.token_divergence(
                self.hidden_BTD, self.head_VD, self.teacher_BTD, self.teacher_VD, **how
            )
        return (out * self.weight_BT).sum()

    def full(self, job: str):
        """With the full logits."""
        hidden_TD, weight_T = self.hidden_BTD[0, :-1], self.weight_BT[0, 1:]
        more = {
            "score": (self.ids_BT[0, 1:], 8),
            "logp": (self.ids_BT[0, 1:], weight_T),
            "rkl": (self.teacher_BTD[0, :-1], self.teacher_VD, weight_T),
        }[job]
        return self.naive[job](hidden_TD, self.head_VD, *more)

    def spend(self, job: str, way: str, _) -> None:
        """`run` for the clock; keeps nothing, so that gradients are freed before the next turn."""
        self.run(job, way)

    def differences(self, job: str, ways: tuple[str, ...]) -> dict[str, float]:
        """Largest difference of every way from naive, as a share of naive's largest number."""
        right, worst = self.run(job, "naive"), {}
        for way in ways:
            pairs = zip(self.run(job, way), right, strict=True)
            worst[way] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        return worst


class Compiled(Work):
    """`naive` under torch.compile; static shapes, since one length is measured at a time."""

    def __init__(self, length: int, args):
        super().__init__(length, args)
        self.naive = {job: torch.compile(f, dynamic=False) for job, f in self.naive.items()}


def peak_of_way(length: int, job: str, way: str, args) -> float | None:
    """MB above what the arguments take; None where the system does not tell."""
    machine.use_threads(args.peak_threads)
    work = Work(length, args)
    above = memory.peak_of(lambda: work.run(job, way)).get("above")
    return above and above * 2**20 / 1e6


def times(length: int, args) -> dict[str, dict[str, float]]:
    """Seconds by job and way at one length, after every way has been checked."""
    work, compiled, seconds = Work(length, args), None, {}
    if args.device == "cuda":
        compiled = Compiled(length, args)
    for job, names in JOBS.items():
        ways = {name: (work, name) for name in names}
        for name, error in work.differences(job, names[:-1]).items():
            if not error < machine.tolerance(args.dtype):
                sys.exit(f"T={length} {job}: {name} differs from naive by {error} of the largest")
        if compiled is not None:
            try:
                for _ in range(3):
                    compiled.run(job, "naive")
                ways["compiled"] = compiled, "naive"
            except Exception as error:  # no compiler, no memory: the others are still of interest
                print(f"compiled {job} not measured: {type(error).__name__}", flush=True)
        ways = {name: functools.partial(side.spend, job, way) for name, (side, way) in ways.items()}
        turns = timing.take_turns(ways, args.repeats, args.device)
        seconds[job] = {name: min(s for s, _ in calls) for name, calls in turns.items()}
    return seconds


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=[512], help="T to time, with naive")
    add("--peaks", type=int, nargs="*", default=[1024, 16384], help="T to measure memory at")
    add("--naive", type=int, default=1024, help="longest T for naive's memory; on a GPU raise it")
    add("--vocabulary", type=int, default=151936, help="V")
    add("--width", type=int, default=1024, help="D")
    add("--chunk", type=int, help="positions (default that of logprobs.py)")
    add("--repeats", type=int, default=2)
    machine.add_flags(parser)
    add("--peak-threads", type=int, default=2, help="where only memory is measured")
    return parser.parse_args(argv)


def show_times(args) -> dict[str, float | None]:
    """The table of times; the ratios at the last length."""
    tables.print_head(*"T job ours_s plain_s naive_s ours/naive plain/naive ours/compiled".split())
    figures = {}
    for length in args.lengths:
        for job, s in times(length, args).items():
            shown = [f"{s[way]:.3f}" if way in s else None for way in ("ours", "plain", "naive")]
            for one, other in (("ours", "naive"), ("plain", "naive"), ("ours", "compiled")):
                ratio = s[one] / s[other] if {one, other} <= s.keys() else None
                figures[f"{job}_{one}_over_{other}"] = ratio
                shown.append("not measured" if ratio is None else f"{ratio:.3f}")
            tables.print_row(length, job, *shown)
    return figures


def show_peaks(args) -> dict[str, float | None]:
    """The table of memory; its numbers."""
    tables.print_head(*"T job way peak_mb".split())
    figures = {}
    for length in args.peaks:
        for job, ways in JOBS.items():
            for way in ways if length <= args.naive else ways[:1]:
                what = length, job, way, args
                on_gpu = args.device == "cuda"
                mb = peak_of_way(*what) if on_gpu else memory.in_a_process(peak_of_way, *what)
                figures[f"{job}_{way}_{length}_mb"] = mb
                tables.print_row(length, job, way, "not measured" if mb is None else f"{mb:.0f}")
    return figures


def main(argv: list[str] | None = None) -> None:
    """Print both tables, then as JSON the ratios at the last timed length and all peaks."""
    args = parse(argv)
    machine.use_threads(args.threads)
    chunk = args.chunk or (1024 if args.device == "cuda" else 256)  # as in logprobs.py
    print(f"V={args.vocabulary}, D={args.width}, {args.dtype}, chunks of {chunk}, "
          f"{machine.describe(args.device, args.threads)}")  # fmt: skip
    figures = show_times(args)
    print()
    tables.print_json(figures | show_peaks(args), 3)


if __name__ == "__main__":
    main()
