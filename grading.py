"""What the teacher makes of a batch of rollouts: phases 2 and 3 of a training step.

One teacher pass per micro-batch, the trunk, and everything is read off it while it is there:

  score       log-prob of every sampled token and of the student's candidates        logprobs.py
  mask        which tokens to supervise: all, or those before the teacher's margin   teachability.py
              over the student's candidates collapses (release rule, 2605.13643),    release_rule.py
              or as many elsewhere (controls; they see the whole batch, so they act  controls.py
              when all its micro-batches are graded). Sentences depend on the text
              alone, so other processes split it while the teacher computes
  look ahead  the teacher's confidence one step after each of the student's          lgr.py
              candidates, against the trunk's KV cache (LGR, 2605.30833)

`args` is what `train.py` parses; its flags of the same names are read here.

Letters: B rows, T tokens, F tokens of all responses one behind the other, K candidates, U tokens of
a union of candidates, N segments.
"""

import contextlib
import dataclasses
import multiprocessing
import numbers
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch

import controls
import lgr
import logprobs
import release_rule
import rollout
import teachability


def micro_batches(length_B, most_rows: int = 0, most_tokens: int = 0) -> list[torch.Tensor]:
    """Rows of similar length together, so that little padding is computed.

    length_B: columns that every row needs, int64.
    most_rows, most_tokens: of a micro-batch its rows, and its rows times the longest of them; 0:
        any number. A row that is longer than most_tokens is alone.
    Returns the row numbers of each, int64 on the device of length_B: micro-batches from the longest
    rows to the shortest, and the rows of each in the order of the batch, so that a batch that fits
    into one is computed as it stands. Raises ValueError for lengths that are not 1-D, or limits
    that are not whole numbers >= 0.

    >>> [rows.tolist() for rows in micro_batches(torch.tensor([4, 9, 3, 4, 2]), most_tokens=12)]
    [[1], [0, 2, 3], [4]]
    """
    if length_B.dim() != 1:
        raise ValueError(f"length_B must be 1-D, got shape {tuple(length_B.shape)}")
    for name, most in (("most_rows", most_rows), ("most_tokens", most_tokens)):
        if not isinstance(most, numbers.Integral) or most < 0:
            raise ValueError(f"{name} must be a whole number >= 0, got {most}")
    order_B = length_B.argsort(descending=True, stable=True)
    pieces, longest = [], 0
    for row, length in zip(order_B.tolist(), length_B[order_B].tolist(), strict=True):
        rows = len(pieces[-1]) + 1 if pieces else 0  # with this one
        over = (most_rows and rows > most_rows) or (most_tokens and rows * longest > most_tokens)
        if not pieces or over:
            pieces.append([])
            longest = length
        pieces[-1].append(row)
    return [torch.tensor(sorted(piece), device=length_B.device) for piece in pieces]


def columns_up_to_last(mask_BT: torch.Tensor) -> torch.Tensor:
    """How many columns of each row reach up to its last true one, int64 [B]; 0 without one.
    Raises ValueError for a mask that is not bool [B, T].

    >>> columns_up_to_last(torch.tensor([[False, True, False], [False, False, False]]))
    tensor([2, 0])
    """
    if mask_BT.dtype != torch.bool or mask_BT.dim() != 2 or mask_BT.shape[1] == 0:
        raise ValueError(f"mask_BT must be bool [B, T], not {mask_BT.dtype} {tuple(mask_BT.shape)}")
    column_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return (mask_BT * column_T).amax(dim=1)


# ------------------------------------------------------------------ sentences, while others compute
class Sentences:
    """Splits responses into sentences, in processes of its own while the teacher computes.

    tokenizer, splitter: as in `teachability.token_segments`.
    workers: processes, forked here and now, so there should be no CUDA context, process group or
        model in this process yet. With 0, where systems cannot fork safely (Windows, macOS), and in
        a daemonic process, which may not have children, this process splits, with the same result.
    Workers live until `close`; if this process is killed, a second longer.
    """

    def __init__(self, tokenizer, splitter, workers: int = 0):
        self.tokenizer, self.splitter = tokenizer, splitter
        can_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        may_fork = not multiprocessing.current_process().daemon
        self.workers = workers if can_fork and may_fork else 0
        if self.workers:
            self.pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("fork"),
                _start_worker, (os.getpid(), tokenizer, splitter),
            )  # fmt: skip
            with _tokenizers_expect_a_fork():
                self.pool.submit(int).result()  # all are forked when the first task comes
            self.shutdown = weakref.finalize(self, self.pool.shutdown, cancel_futures=True)

    def begin(self, ids: list[np.ndarray]) -> Callable[[], list[torch.Tensor]]:
        """Begin to split some responses, [T] ids each, as they were sampled.

        Returns a function that waits for their segments, int64 [T] each. Without workers it is the
        one that does the work. It raises RuntimeError if a worker failed, with its message, or if
        one died.
        """
        if not self.workers:
            return lambda: [
                teachability.token_segments(self.tokenizer, ids_T, self.splitter) for ids_T in ids
            ]
        cuts = [len(ids) * worker // self.workers for worker in range(self.workers + 1)]
        parts = [ids[start:end] for start, end in zip(cuts, cuts[1:], strict=False) if start < end]
        with _say_who_died():
            jobs = [self.pool.submit(_sentence_lengths, part) for part in parts]

        def wait() -> list[torch.Tensor]:
            with _say_who_died():
                lengths = [length_N for job in jobs for length_N in job.result()]
            return [torch.repeat_interleave(torch.from_numpy(length_N)) for length_N in lengths]

        return wait

    def close(self) -> None:
        """Let the workers go; what they have not begun remains undone."""
        if self.workers:
            self.shutdown()


@contextlib.contextmanager
def _say_who_died():
    try:
        yield
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that splits sentences has died, perhaps for want of memory; "
            "--sentence-workers 0 does without"
        ) from error


_worker = {}  # what a process that splits sentences was started with


def _start_worker(parent: int, tokenizer, splitter) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which will say so
    for number in (signal.SIGTERM, signal.SIGHUP):  # not the parent's handlers
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    _worker["how"] = tokenizer, splitter

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _sentence_lengths(ids: list[np.ndarray]) -> list[np.ndarray]:
    """In a worker: how many tokens every sentence of every response has, int64 [N] each. That is
    all it takes to write the segments down, and a tenth of their size or less."""
    tokenizer, splitter = _worker["how"]
    try:
        segments = [teachability.token_segments(tokenizer, ids_T, splitter) for ids_T in ids]
    except Exception as error:  # some cannot travel between processes
        raise RuntimeError(f"splitting sentences: {type(error).__name__}: {error}") from error
    return [torch.bincount(segment_T).numpy() for segment_T in segments]


@contextlib.contextmanager
def _tokenizers_expect_a_fork():
    """The tokenizers library warns in every forked process, unless told that it need not use its
    threads there."""
    name = "TOKENIZERS_PARALLELISM"
    told = name in os.environ
    os.environ.setdefault(name, "false")
    try:
        yield
    finally:
        if not told:
            del os.environ[name]


# ----------------------------------------------------------------------------- what is supervised
@dataclass
class Supervision:
    """Which tokens to supervise, and what the rule saw.

    keep_BT     bool, response tokens that keep their supervision
    released_B  bool, true where the rule fired
    gain_B      BIC0 - BIC1 where it fired, else 0
    wanted_B    int64, tokens that it keeps of every rollout; differs from keep_BT for the control
                `std`, whose two last fields are those of its own signal
    """

    keep_BT: torch.Tensor
    released_B: torch.Tensor
    gain_B: torch.Tensor
    wanted_B: torch.Tensor | None = None


def signals(args) -> tuple[str, ...]:
    """The series in which `args.mask` wants a change point: "margin" (the release rule, and the
    controls that spend its budget), "spread" (the control std)."""
    budget = args.mask in controls.CONTROLS and not args.prefix_tokens and args.budget == "release"
    margin = ("margin",) if args.mask == "release" or budget else ()
    return margin + (("spread",) if args.mask == "std" else ())


def candidates_needed(args) -> dict[str, int]:
    """How many of the student's most likely tokens the later phases look at, by flag."""
    margin = "margin" in signals(args)
    needed = {"--margin-top-k": args.margin_top_k} if margin else {}
    needed |= {"--lgr-top-k": args.lgr_top_k} if args.lookahead == "on" else {}
    return needed | ({"--union-top-k": args.union_top_k} if args.objective == "topk" else {})


def spends_budget(args) -> bool:
    """True if `controls.spend` has to place the tokens that the release rule would supervise."""
    return args.mask in controls.CONTROLS and "margin" in signals(args)


def supervise(batch, candidate_logp_BTK, advantage_BT, segments, args) -> Supervision:
    """Per rollout: a score for every sentence, a change point, the keep mask.

    candidate_logp_BTK: for the margin, the teacher's log-probs of the student's candidates.
    advantage_BT: for the spread, log p_T - log p_S of the sampled tokens, nats.
    segments: of every response, int64 [T] on the CPU; unused when there are no `signals`.
    """
    mask_BT, keep_BT = batch.response_mask_BT, batch.response_mask_BT.clone()
    B, device = len(mask_BT), mask_BT.device
    wanted_B = mask_BT.sum(dim=1)
    if args.mask == "prefix" and args.prefix_tokens:
        keep_BT = controls.first_tokens(wanted_B.clamp(max=args.prefix_tokens), keep_BT)
    if not signals(args):
        nothing_B = torch.zeros(B, dtype=torch.bool, device=device)
        return Supervision(keep_BT, nothing_B, nothing_B.double(), wanted_B)
    # One response behind the other, its sentences numbered on from those of the one before: one
    # call scores them all.
    counts = [int(segment_T[-1]) + 1 if len(segment_T) else 0 for segment_T in segments]
    first_B = np.cumsum([0, *counts[:-1]]).tolist()
    segment_F = torch.cat([x + first for x, first in zip(segments, first_B, strict=True)])
    for signal_name in signals(args):
        if signal_name == "margin":
            margin_BT = teachability.teacher_margin(candidate_logp_BTK, kind=args.margin)
            margin_BT = margin_BT.nan_to_num(nan=0.0)  # the loss will tell; no mask can be right
            counted_BT = batch.entropy_BT >= args.margin_min_entropy
            scores_N = teachability.segment_scores(
                margin_BT[mask_BT].cpu(), segment_F, include_T=counted_BT[mask_BT].cpu()
            )
        else:
            finite_F = advantage_BT[mask_BT].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            scores_N = teachability.segment_spread(finite_F.cpu(), segment_F)
        points = [
            release_rule.release_point(own_N, min_segments=args.min_segments, eps=args.bic_eps)
            for own_N in scores_N.split(counts)
        ]
        keep = [
            release_rule.keep_mask(segment_T, point.kept)
            for segment_T, point in zip(segments, points, strict=True)
        ]
        if signal_name == signals(args)[0]:
            keep_BT[mask_BT] = torch.from_numpy(np.concatenate(keep)).to(device)
    return Supervision(
        keep_BT,
        torch.tensor([point.kept is not None for point in points], device=device),
        torch.tensor([point.gain for point in points], dtype=torch.float64, device=device),
        torch.tensor([int(keep_T.sum()) for keep_T in keep], device=device),
    )


@dataclass
class Lookahead:
    """What one step of lookahead saw; 0 or false where it did not look.

    trigger_BT   bool, supervised tokens where the student hesitates
    reward_BT    group reward of the sampled token, 0 where it is not in its group
    outside_BT   bool, triggered and not in its group
    spread_BT    standard deviation of the group's confidences
    reward_BTK   reward of every candidate (kept for objective topk only)
    """

    trigger_BT: torch.Tensor
    reward_BT: torch.Tensor
    outside_BT: torch.Tensor
    spread_BT: torch.Tensor
    reward_BTK: torch.Tensor | None


def look_ahead(teacher, trunk, batch, keep_BT, vocab_size, args) -> Lookahead:
    """The Lookahead Group Reward, off the KV cache of the pass that scored the batch."""
    group_BTK = batch.topk_ids_BTK[..., : args.lgr_top_k]
    trigger_BT = lgr.trigger(batch.entropy_BT, keep_BT, args.lgr_tau)
    confidence_BTK = lgr.lookahead_confidence(
        teacher,
        batch.ids_BT,
        batch.response_mask_BT,
        trigger_BT,
        group_BTK,
        cache=trunk.past_key_values,
        hidden_BTD=trunk[0],
        signal=args.lgr_signal,
        vocab_size=vocab_size,
        nodes_per_slice=args.lgr_nodes,
    )
    reward_BTK = lgr.group_reward(confidence_BTK, normalize=args.lgr_normalize, eps=args.lgr_eps)
    in_group_BT = (group_BTK == batch.ids_BT[..., None]).any(dim=-1)
    return Lookahead(
        trigger_BT,
        lgr.sampled_reward(reward_BTK, group_BTK, batch.ids_BT),
        trigger_BT & ~in_group_BT,
        confidence_BTK.std(dim=-1).nan_to_num(),
        reward_BTK if args.objective == "topk" else None,
    )


@dataclass
class Grades:
    """What grading leaves behind.

    logp_BT           teacher's log-prob of the sampled token, nats; 0 outside the response
    max_prob_BT       its largest probability there ("supervision fidelity"); 0 outside
    choice            which tokens to supervise
    ahead             lookahead rewards, or None
    union_BTU         objective topk: top tokens of both models, else None
    union_valid_BTU   false on repeated ones
    union_logp_BTU    teacher's log-probs of them
    hidden_BTD        objectives over the whole vocabulary: the teacher's last hidden states, from
                      which its distributions are computed again, chunk by chunk; else None
    """

    logp_BT: torch.Tensor
    max_prob_BT: torch.Tensor
    choice: Supervision
    ahead: Lookahead | None = None
    union_BTU: torch.Tensor | None = None
    union_valid_BTU: torch.Tensor | None = None
    union_logp_BTU: torch.Tensor | None = None
    hidden_BTD: torch.Tensor | None = None

    def keep_only(self, keep_BT: torch.Tensor) -> None:
        """Supervise these tokens in place of those of `choice`, and forget what lookahead saw
        elsewhere."""
        self.choice.keep_BT = keep_BT
        if self.ahead is not None:
            ahead = self.ahead
            for name in ("trigger_BT", "reward_BT", "outside_BT", "spread_BT"):
                setattr(ahead, name, getattr(ahead, name) * keep_BT)
            if ahead.reward_BTK is not None:
                ahead.reward_BTK = ahead.reward_BTK * keep_BT[..., None]


def pick(data, rows, columns: int):
    """The same rows, and first columns, of every tensor in a (nested) dataclass; None stays."""
    if isinstance(data, torch.Tensor):
        return data[rows, :columns] if data.dim() > 1 else data[rows]
    if data is None:
        return None
    fields = {f.name: pick(getattr(data, f.name), rows, columns) for f in dataclasses.fields(data)}
    return type(data)(**fields)


def stack(parts: list, pieces: list[torch.Tensor], columns: int):
    """The inverse of `pick` over micro-batches: every row back in its place, filled up with zeros
    to `columns`."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        shape = (columns, *first.shape[2:]) if first.dim() > 1 else ()
        out = first.new_zeros(sum(map(len, pieces)), *shape)
        for rows, part in zip(pieces, parts, strict=True):
            if part.dim() > 1:
                out[rows, : part.shape[1]] = part
            else:
                out[rows] = part
        return out
    if first is None:
        return None
    names = [f.name for f in dataclasses.fields(first)]
    return type(first)(
        **{n: stack([getattr(part, n) for part in parts], pieces, columns) for n in names}
    )


@torch.no_grad()
def grade(
    teacher, batch: rollout.Rollout, args, *, sentences: Sentences | None, vocab_size: int, lap
) -> Grades:
    """Grade a micro-batch at a time: the teacher's KV cache of one lives until its leaves are
    scored, and no longer.

    Args:
        teacher: a Hugging Face causal LM.
        batch: from `rollout.generate`, with as many top-K ids as the methods look at.
        sentences: splits the responses for the release rule; may be None where `signals` is empty.
        vocab_size: ids that student and teacher share.
        lap: called with "score", "mask", "lookahead" at the end of each, to charge its time.
    """
    mask_BT = batch.response_mask_BT
    length_B = columns_up_to_last(mask_BT)
    pieces = micro_batches(length_B, args.micro_batch, args.tokens_per_micro_batch)
    waits = [None] * len(pieces)
    if signals(args):  # hand all of them over before the teacher begins
        ids_F = batch.ids_BT[mask_BT].int().cpu().numpy()
        ids = np.split(ids_F, mask_BT.sum(dim=1).cumsum(dim=0).tolist()[:-1])
        waits = [sentences.begin([ids[row] for row in rows.tolist()]) for rows in pieces]
        lap("mask")
    parts = []
    for rows, wait in zip(pieces, waits, strict=True):
        part = pick(batch, rows, int(length_B[rows].max()))
        parts.append(grade_rows(teacher, part, args, wait, vocab_size, lap))
    return stack(parts, pieces, batch.ids_BT.shape[1])


def grade_rows(teacher, batch, args, wait, vocab_size, lap) -> Grades:
    """`grade` for one micro-batch; `wait` gives the segments of its responses."""
    topk, lookahead = args.objective == "topk", args.lookahead == "on"
    margin = "margin" in signals(args)
    scored = max(args.margin_top_k * margin, args.union_top_k * topk)
    # rows are padded on the right, so causal attention alone keeps padding out
    trunk = teacher.base_model(input_ids=batch.ids_BT, use_cache=lookahead)
    stats = logprobs.token_stats(
        trunk[0],
        teacher.get_output_embeddings().weight,
        batch.ids_BT,
        top_k=args.union_top_k if topk else 0,
        candidates_BTK=batch.topk_ids_BTK[..., :scored] if scored else None,
        mask_BT=batch.response_mask_BT,
        vocab_size=vocab_size,
        entropy=False,
    )
    lap("score")
    margins_of = stats.candidate_logp_BTK[..., : args.margin_top_k] if scored else None
    advantage_BT = stats.logp_BT - batch.logp_BT
    segments = wait() if wait is not None else None
    choice = supervise(batch, margins_of, advantage_BT, segments, args)
    lap("mask")
    grades = Grades(stats.logp_BT, stats.max_prob_BT, choice)
    if args.objective in logprobs.DIVERGENCES:
        grades.hidden_BTD = trunk[0]
    if lookahead:  # where a control will supervise is not known yet: look everywhere
        looked_BT = batch.response_mask_BT if spends_budget(args) else choice.keep_BT
        grades.ahead = look_ahead(teacher, trunk, batch, looked_BT, vocab_size, args)
        lap("lookahead")
    if topk:
        students_BTK = batch.topk_ids_BTK[..., : args.union_top_k]
        grades.union_BTU, grades.union_valid_BTU = lgr.union_candidates(
            students_BTK, stats.topk_ids_BTK
        )
        own_BTK = stats.candidate_logp_BTK[..., : args.union_top_k]
        grades.union_logp_BTU = torch.cat([own_BTK, stats.topk_logp_BTK], dim=-1)
    return grades
