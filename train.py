"""On-policy distillation in one plain loop: `torchrun train.py --method release`.

A teacher grades, token by token, what the student itself wrote.  The step, in six phases:

  1 sample     the student writes a response to each prompt                        rollout.py
  2 score      one teacher pass, the trunk: log-prob of every sampled token and    grading.py
               of the student's top-K candidates                                   logprobs.py
  3 mask       which tokens to supervise: all (`opd`), or those before the         teachability.py
               teacher's margin collapses (`release`, arXiv 2605.13643), or as     release_rule.py
               many elsewhere (`prefix`, `shuffled`, `random`, `std`)              controls.py
    look ahead where the student hesitates, the teacher's confidence one step      lgr.py
               after each candidate, off the trunk's cache (`lgr`, 2605.30833)
  4 weigh      advantage A_t = log p_T(y_t) - log p_S(y_t) + gamma r_t(y_t),
               detached; weights from token counts over all processes
  5 update     loss = -sum_t weight_t A_t log p_S(y_t), or a divergence of whole    logprobs.py
               distributions (`rkl`, `fkl`, `jsd`), or over the top tokens of      lgr.py
               both (`lgr_topk`): student forward and backward
  6 log        one JSON line; now and then an evaluation                           evaluate.py

In expectation over the student's samples the gradient of this loss is that of the reverse KL
KL(p_S || p_T) of every position, given the sampled prefix, minus gamma times the expected reward
(tests/test_train.py enumerates both).

Randomness is stateless: step s of seed r always uses the same prompts and the same uniform numbers
per (row, token), however many processes share the work, so `--nproc_per_node 2` repeats the run of
one process up to floating-point noise.

Letters: B rows of this process, T tokens, K candidates, U tokens of a union of candidates.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import subprocess
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import controls
import evaluate
import flags
import grading
import lgr
import loading
import logprobs
import rollout
import teachability
import toy


# --------------------------------------------------------------------- which rows, which numbers
def my_share(count: int, rank: int, world: int) -> range:
    """The rows of `count` that process `rank` works on: contiguous, sizes differing by at most 1.

    >>> [list(my_share(5, rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(count * rank // world, count * (rank + 1) // world)


def row_generator(seed: int, stream: int, first_row: int, numbers_per_row: int) -> torch.Generator:
    """A CPU generator that stands where one process, drawing all rows in order, would reach
    `first_row`; so the samples of a row do not depend on how rows are shared out."""
    generator = torch.Generator().manual_seed((seed << 24) + stream)
    if first_row:
        torch.rand(first_row * numbers_per_row, dtype=torch.float64, generator=generator)
    return generator


def batch_order(count: int, first: int, length: int, seed: int) -> list[int]:
    """Entries first..first+length-1 of an endless sequence of shuffled epochs of `count` problems.

    >>> sorted(batch_order(3, 0, 3, seed=1)), sorted(batch_order(3, 3, 3, seed=1))
    ([0, 1, 2], [0, 1, 2])
    """
    order = []
    for epoch in range(first // count, (first + length - 1) // count + 1):
        epoch_order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(epoch_order)
        order += epoch_order
    return order[first % count :][:length]


# --------------------------------------------------------------------- phases 4 and 5: how to learn
def sum_over_ranks(values: list[float], device) -> list[float]:
    """Element-wise sum over all processes."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def token_weights(
    response_mask_BT: torch.Tensor, keep_BT: torch.Tensor, rescale: str, total: float, kept: float
) -> torch.Tensor:
    """Phase 4: q_t times the rescaling over the token count, so that loss = -sum_t w_t A_t log p_S.

    With l_t the response mask and q_t the keep mask, the release paper gives the kept tokens the
    loss mass of all: A'_t = A_t q_t sum(l) / sum(l q), averaged over sum(l) tokens.

    Args:
        rescale: the scope of both sums.  "batch": over all rollouts of all processes, w = q / kept.
            "sequence": per rollout, w = q * (its tokens / its kept tokens) / total.
            "none": w = q / total.
        total, kept: response tokens and kept tokens of the whole batch, over all processes.

    >>> l = torch.tensor([[True, True, True, True], [True, True, False, False]])
    >>> q = torch.tensor([[True, True, False, False], [True, True, False, False]])
    >>> for scope in ("batch", "sequence", "none"):
    ...     (token_weights(l, q, scope, 6, 4) * 12).int().tolist()
    [[3, 3, 0, 0], [3, 3, 0, 0]]
    [[4, 4, 0, 0], [2, 2, 0, 0]]
    [[2, 2, 0, 0], [2, 2, 0, 0]]
    """
    q_BT = keep_BT.float()
    if rescale == "batch":
        return q_BT / max(kept, 1)
    if rescale == "sequence":
        q_BT = q_BT * response_mask_BT.sum(1, keepdim=True) / q_BT.sum(1, keepdim=True).clamp(min=1)
    return q_BT / max(total, 1)


class StudentLogProbs(torch.nn.Module):
    """The student's forward as training needs it: ids in, log-probs or divergences out, or a loss.

    DDP hooks the forward of what it wraps, so backbone and chunked head must both be in here.
    """

    def __init__(self, model, vocab_size: int, temperature: float):
        super().__init__()
        self.model, self.vocab_size, self.temperature = model, vocab_size, temperature

    def forward(
        self, ids_BT, mask_BT, candidates_BTK=None, divergence=None, loss_weight_BT=None
    ):
        """Log-probs [B, T] of the tokens, or [B, T, K] of candidates in their places, in nats at
        the sampling temperature; with `divergence`, (kind, beta, the teacher's hidden states and
        head), that divergence [B, T] from the teacher. 0 outside `mask_BT`.  With `loss_weight_BT`
        their weighted sum, a scalar, at less cost."""
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False)[0]
        head_VD = self.model.get_output_embeddings().weight
        how = {"mask_BT": mask_BT, "vocab_size": self.vocab_size, "temperature": self.temperature,
               "loss_weight_BT": loss_weight_BT}  # fmt: skip
        if divergence is not None:
            kind, beta, *teachers = divergence
            return logprobs.token_divergence(
                hidden_BTD, head_VD, *teachers, kind=kind, beta=beta, **how
            )
        return logprobs.token_logprobs(
            hidden_BTD, head_VD, ids_BT, candidates_BTK=candidates_BTK, **how
        )


def policy_gradient_loss(
    logp_BT: torch.Tensor,
    advantage_BT: torch.Tensor,
    weight_BT: torch.Tensor,
    behaviour_logp_BT: torch.Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.28),
) -> torch.Tensor:
    """-sum_t w_t A_t log p_S(y_t); with `behaviour_logp_BT` PPO's clipped ratio instead (scalar).

    `micro_batch_loss` has the plain form computed where the logits are, as a weighted sum.  The
    ratio form, -sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t), is for several
    updates on the same rollouts; at r = 1 its gradient is that of the plain form.
    """
    if behaviour_logp_BT is None:
        return -(weight_BT * advantage_BT * logp_BT).sum()
    ratio_BT = (logp_BT - behaviour_logp_BT).exp()
    clipped_BT = ratio_BT.clamp(1 - clip[0], 1 + clip[1])
    return -(weight_BT * torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)).sum()


def micro_batch_loss(student, batch, grades, advantage_BT, weight_BT, args, teacher_head_VE):
    """The objective on some rows, a scalar: the policy gradient; or an exact divergence; or
    (`topk`) the reverse KL over both models' top tokens with the lookahead reward inside."""
    divergence, loss_weight_BT = None, None
    if args.objective in logprobs.DIVERGENCES:
        divergence = (args.objective, args.jsd_beta, grades.hidden_BTD, teacher_head_VE)
        loss_weight_BT = weight_BT
    elif args.objective == "pg" and args.updates_per_rollout == 1:
        loss_weight_BT = -weight_BT * advantage_BT
    with autocast(args):
        out = student(
            batch.ids_BT, grades.choice.keep_BT, grades.union_BTU, divergence, loss_weight_BT
        )
    if loss_weight_BT is not None:
        return out
    if args.objective == "topk":
        reward_BTU = None
        if grades.ahead is not None:  # the group is the first of the student's, which come first
            reward_BTU = torch.zeros_like(grades.union_logp_BTU)
            reward_BTU[..., : args.lgr_top_k] = args.lgr_gamma * grades.ahead.reward_BTK
        loss_BT = lgr.topk_loss(out, grades.union_logp_BTU, grades.union_valid_BTU, reward_BTU)
        return (weight_BT * loss_BT).sum()
    clip = (args.clip_low, args.clip_high)
    return policy_gradient_loss(out, advantage_BT, weight_BT, batch.logp_BT, clip)


def update(student, optimizer, batch, grades, advantage_BT, weight_BT, args, teacher_head_VE=None):
    """Phase 5: one optimizer step over micro-batches; returns (loss over all ranks, grad norm).
    The exact divergences need the teacher's head.

    Rows of similar length go together, and columns after the last kept token are cut off before the
    forward: attention is causal, so what was released costs nothing.  Rows without a kept token are
    left out too, but every process runs at least one backward, or DDP would wait for it for ever.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    keep_BT = grades.choice.keep_BT
    length_B = grading.columns_up_to_last(keep_BT)
    row_R = length_B.nonzero()[:, 0]
    row_R = row_R if len(row_R) else torch.zeros(1, dtype=torch.int64, device=keep_BT.device)
    limits = args.micro_batch, args.tokens_per_micro_batch
    pieces = [row_R[piece_R] for piece_R in grading.micro_batches(length_B[row_R], *limits)]
    optimizer.zero_grad(set_to_none=True)
    local_loss = 0.0
    for rows in pieces:
        used = max(int(length_B[rows].max()), 2)  # a row without a kept token still needs a pass
        last = rows is pieces[-1]
        wait = contextlib.nullcontext() if last or world == 1 else student.no_sync()
        with wait:
            own = [grading.pick(x, rows, used) for x in (batch, grades, advantage_BT, weight_BT)]
            loss = micro_batch_loss(student, *own, args, teacher_head_VE)
            (loss * world).backward()  # DDP averages over ranks; the weights already count all
        local_loss += loss.item()
    limit = args.clip_grad if args.clip_grad > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), limit).item()
    (loss,) = sum_over_ranks([local_loss], keep_BT.device)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    return loss, norm


def autocast(args):
    """Matrix products in bfloat16 where asked for; parameters and everything else stay float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


# ---------------------------------------------------------------------------------------- one run
@dataclass
class Run:
    """Everything that one process holds while it trains."""

    args: argparse.Namespace
    rank: int
    world: int
    tokenizer: object
    splitter: object
    splitter_name: str
    sentences: grading.Sentences | None
    vocab_size: int
    pad_id: int
    prompts: list[list[int]]
    eval_problems: list[dict]
    eval_prompts: list[list[int]]
    ood_problems: list[dict]
    ood_prompts: list[list[int]]
    stop_ids: list[int] = ()
    model: object = None  # the student, a Hugging Face model
    student: object = None  # StudentLogProbs around it, within DDP when there are several processes
    teacher: object = None
    optimizer: object = None
    scheduler: object = None


class Stopwatch:
    """Seconds by phase; waits for the GPU, so that a phase pays for what it launched."""

    def __init__(self, device: str):
        self.device, self.seconds, self.start = device, {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        """Charge the time since the last call to `phase`."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.start
        self.start = now


def candidates_needed(args) -> dict[str, int]:
    """How many of the student's most likely tokens the later phases look at, by flag."""
    margin = "margin" in grading.signals(args)
    needed = {"--margin-top-k": args.margin_top_k} if margin else {}
    needed |= {"--lgr-top-k": args.lgr_top_k} if args.lookahead == "on" else {}
    return needed | ({"--union-top-k": args.union_top_k} if args.objective == "topk" else {})


def sample(run: Run, step: int) -> rollout.Rollout:
    """Phase 1: this process's share of the step's rollouts."""
    args = run.args
    count = args.prompts_per_step
    order = batch_order(len(run.prompts), step * count, count, args.seed)
    rows = [run.prompts[i] for i in order for _ in range(args.rollouts_per_prompt)]
    mine = my_share(len(rows), run.rank, run.world)
    with autocast(args):
        return rollout.generate(
            run.model,
            rows[mine.start : mine.stop],
            max_new_tokens=args.max_new_tokens,
            eos_ids=run.stop_ids,
            pad_id=run.pad_id,
            temperature=args.temperature,
            top_k=max(candidates_needed(args).values(), default=1),
            batch_size=args.sample_batch,
            generator=row_generator(args.seed, step, mine.start, args.max_new_tokens),
            vocab_size=run.vocab_size,
        )


def train_step(run: Run, step: int) -> dict:
    """The six phases; returns the log line."""
    args, watch = run.args, Stopwatch(run.args.device)
    batch = sample(run, step)
    watch.lap("sample")

    grades = grading.grade(
        run.teacher,
        batch,
        args,
        sentences=run.sentences,
        vocab_size=run.vocab_size,
        lap=watch.lap,
    )

    if grading.spends_budget(args):
        grades.keep_only(spend_elsewhere(run, batch, grades.choice, step))
        watch.lap("mask")
    mask_BT, keep_BT = batch.response_mask_BT, grades.choice.keep_BT
    advantage_BT = grades.logp_BT - batch.logp_BT
    reverse_kl = -(advantage_BT * mask_BT).sum().item()
    if args.advantage_clip > 0:
        advantage_BT = advantage_BT.clamp(-args.advantage_clip, args.advantage_clip)
    if grades.ahead is not None:
        advantage_BT = advantage_BT + args.lgr_gamma * grades.ahead.reward_BT
    sums = {"reverse_kl": reverse_kl} | batch_sums(batch, grades)
    sums = dict(zip(sums, sum_over_ranks(list(sums.values()), mask_BT.device), strict=True))
    weight_BT = token_weights(mask_BT, keep_BT, args.rescale, sums["tokens"], sums["kept_tokens"])
    head_VE = run.teacher.get_output_embeddings().weight
    for _ in range(args.updates_per_rollout):
        loss, norm = update(
            run.student, run.optimizer, batch, grades, advantage_BT, weight_BT, args, head_VE
        )
        run.scheduler.step()
    watch.lap("update")
    return log_line(step, loss, norm, sums, watch.seconds, args)


def spend_elsewhere(run: Run, batch, choice: grading.Supervision, step: int) -> torch.Tensor:
    """Phase 3 for a control: the keep mask [B, T] of this process's rows, which over all processes
    holds as many tokens as the release rule's, `choice`."""
    mask_BT = batch.response_mask_BT
    count_B3 = torch.stack([mask_BT.sum(1), choice.keep_BT.sum(1), choice.wanted_B], dim=1).cpu()
    parts = [count_B3]
    if run.world > 1:
        parts = [None] * run.world
        dist.all_gather_object(parts, count_B3)
    return controls.spend(
        run.args.mask, mask_BT, *torch.cat(parts).unbind(1),
        first_row=sum(map(len, parts[: run.rank])),
        generator=row_generator(run.args.seed, CONTROL_STREAM + step, 0, 0),
    )  # fmt: skip


def repeated_ngrams(ids_T: torch.Tensor, n: int = 4) -> tuple[int, int]:
    """How many of a response's n-grams it has written before, and how many it has.

    >>> repeated_ngrams(torch.tensor([7, 8, 7, 8, 7, 8, 7]))   # 7878 8787 7878 8787
    (2, 4)
    """
    count = len(ids_T) - n + 1
    if count < 1:
        return 0, 0
    gram_G, base = ids_T[:count], ids_T.max() + 1
    for place in range(1, n):  # number the grams one token longer: exact, and within int64
        gram_G = gram_G * base + ids_T[place : place + count]
        gram_G = gram_G.unique(return_inverse=True)[1]
    return count - len(gram_G.unique()), count


def quarters(mask_BT: torch.Tensor) -> torch.Tensor:
    """Which quarter of its response every token lies in: 0 to 3; 4 outside.

    >>> quarters(torch.tensor([[False, True, True, True, True, True, True, True, True]])).tolist()
    [[4, 0, 0, 1, 1, 2, 2, 3, 3]]
    """
    place_BT, length_B1 = mask_BT.cumsum(1) - 1, mask_BT.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask_BT, 4 * place_BT // length_B1, 4)


FLAT = 1e-3  # a deviation of confidences that a 16-bit teacher cannot tell from 0


def batch_sums(batch: rollout.Rollout, grades: grading.Grades) -> dict[str, float]:
    """Numerators and denominators of this process, to be added up over all of them."""
    mask_BT, choice, ahead = batch.response_mask_BT, grades.choice, grades.ahead
    kept_share_B = choice.keep_BT.sum(1) / mask_BT.sum(1)
    rows = zip(batch.ids_BT, mask_BT, strict=True)
    grams = [repeated_ngrams(ids_T[mask_T]) for ids_T, mask_T in rows]
    sums = {
        "rollouts": len(mask_BT),
        "tokens": mask_BT.sum().item(),
        "kept_tokens": choice.keep_BT.sum().item(),
        "entropy": batch.entropy_BT.sum().item(),
        "truncated": batch.truncated_B.sum().item(),
        "repeated": sum(repeated for repeated, _ in grams),
        "grams": sum(count for _, count in grams),
        "fired": choice.released_B.sum().item(),
        "release_at": kept_share_B[choice.released_B].sum().item(),
        "bic_gain": choice.gain_B.sum().item(),
        "bic_gain_over_6": (choice.gain_B > 6).sum().item(),
    }
    quarter_BT = quarters(mask_BT)
    for quarter in range(4):
        here_BT = quarter_BT == quarter
        sums[f"tokens_{quarter}"] = here_BT.sum().item()
        sums[f"fidelity_{quarter}"] = grades.max_prob_BT[here_BT].sum().item()
    if ahead is not None:
        sums["triggered"] = ahead.trigger_BT.sum().item()
        sums["reward"] = ahead.reward_BT.sum().item()
        sums["group_std"] = ahead.spread_BT.sum().item()
        sums["flat"] = (ahead.trigger_BT & (ahead.spread_BT < FLAT)).sum().item()
        sums["outside"] = ahead.outside_BT.sum().item()
    return sums


def log_line(step: int, loss: float, norm: float, sums: dict, seconds: dict, args) -> dict:
    """One step for log.jsonl; README's glossary says what each number is."""
    rollouts, tokens, fired = sums["rollouts"], sums["tokens"], sums["fired"]
    triggered, total = sums.get("triggered", 0), sum(seconds.values())

    def per(name: str, count: float) -> float | None:
        return sums[name] / count if count else None

    line = {
        "step": step + 1,
        "loss": loss,
        "reverse_kl": sums["reverse_kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "response_tokens": tokens / rollouts,
        "truncated": sums["truncated"] / rollouts,
        "repeated_4grams": per("repeated", sums["grams"]),
        "fidelity": [per(f"fidelity_{q}", sums[f"tokens_{q}"]) for q in range(4)],
        "kept": sums["kept_tokens"] / tokens,
        "kept_tokens": int(sums["kept_tokens"]),
        "fired": fired / rollouts,
        "release_at": per("release_at", fired),
        "bic_gain": per("bic_gain", fired),
        "bic_gain_over_6": sums["bic_gain_over_6"] / rollouts,
    }
    if args.lookahead == "on":
        line |= {
            "triggered": triggered / tokens,
            "group_std": per("group_std", triggered),
            "flat_groups": per("flat", triggered),
            "bonus": args.lgr_gamma * sums["reward"] / triggered if triggered else None,
            "outside_group": per("outside", triggered),
        }
    return line | {
        "grad_norm": norm,
        "seconds": {name: round(value, 4) for name, value in (seconds | {"total": total}).items()},
        "tokens_per_second": tokens / total,
    }


def answers(run: Run, problems: list, prompts: list, stream: int) -> list[list[dict]]:
    """The student's graded answers to held-out problems, sampled by all processes together."""
    args = run.args
    mine = my_share(len(problems), run.rank, run.world)
    first_row = mine.start * args.eval_samples
    with autocast(args):
        records = evaluate.sample_answers(
            run.model,
            run.tokenizer,
            problems[mine.start : mine.stop],
            prompts[mine.start : mine.stop],
            samples=args.eval_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=1.0,
            stop_ids=run.stop_ids,
            pad_id=run.pad_id,
            batch_size=args.sample_batch,
            generator=row_generator(0, stream, first_row, args.max_new_tokens),
            vocab_size=run.vocab_size,
            progress=False,
        )
    if run.world > 1:
        shares = [None] * run.world
        dist.all_gather_object(shares, records)
        records = [record for share in shares for record in share]
    return records


def evaluate_student(run: Run, step: int) -> dict:
    """mean@n on the held-out problems; first and last on the out-of-domain ones, too.

    Every evaluation uses the same uniform numbers, so that two of them differ by the student only.
    """
    args, start = run.args, time.perf_counter()
    records = answers(run, run.eval_problems, run.eval_prompts, EVALUATION_STREAM)
    summary = evaluate.summarise(records)
    uncertain = toy.world(args.toy).uncertain
    if uncertain and args.problems is None and args.eval_problems is None:
        texts = [record["text"] for samples in records for record in samples]
        summary["uncertain_wording"] = toy.wording_share(texts, uncertain)
    if run.ood_problems and step in (0, args.steps):
        ood = evaluate.summarise(
            answers(run, run.ood_problems, run.ood_prompts, EVALUATION_STREAM + 1)
        )
        names = ("accuracy", "accuracy_low", "accuracy_high", "problems")
        summary["ood"] = {name: ood[name] for name in names}
    return {"step": step, **summary, "seconds": {"evaluate": round(time.perf_counter() - start, 4)}}


# Of `row_generator`; training steps use 0, 1, 2, ...
EVALUATION_STREAM, CONTROL_STREAM = 2**23, 2**22


# ------------------------------------------------------------------------------------------ set-up

def load_prompts(args, tokenizer, path: str | None, split: str, task="dial") -> tuple[list, list]:
    """Problems of a file or of the toy world, and their prompts in the student's template, which
    the teacher reads too: two templates would be two prompts."""
    if path is not None:
        problems = loading.load_problems(path, require_answer=split == "test")
    else:
        count = args.eval_count if split == "test" else 4096
        seed = 0 if split == "test" else args.seed
        problems = loading.from_records(
            toy.problems(count, moves=args.difficulty, split=split, seed=seed, task=task),
            where="toy",
        )
    if split == "test":
        problems = problems[: args.eval_count]
    return problems, loading.render_prompts(tokenizer, problems, thinking=args.thinking)


def prepare(args, rank: int, world: int) -> Run:
    """Everything that can fail without the weights: tokenizers, problems, prompts, limits."""
    paths = student_and_teacher(args)
    tokenizers, configs = {}, {}
    for flag, path in paths.items():
        tokenizers[flag] = loading.load_tokenizer(path, trust_remote_code=args.trust_remote_code)
        config = loading.load_config(path, trust_remote_code=args.trust_remote_code)
        configs[flag] = config.get_text_config(decoder=True)
    tokenizer = tokenizers["--student"]
    vocab_size = min(
        loading.common_vocabulary(*tokenizers.values()), *(c.vocab_size for c in configs.values())
    )
    for flag, count in candidates_needed(args).items():
        if count > vocab_size:
            raise ValueError(f"{flag} {count} exceeds the vocabulary of {vocab_size}")
    problems, prompts = load_prompts(args, tokenizer, args.problems, "train")
    eval_problems, eval_prompts = [], []
    if args.eval_problems is not None or args.problems is None:
        eval_problems, eval_prompts = load_prompts(args, tokenizer, args.eval_problems, "test")
    ood_problems, ood_prompts = [], []
    if args.ood_problems is not None or (args.problems is None and args.eval_problems is None):
        ood_problems, ood_prompts = load_prompts(
            args, tokenizer, args.ood_problems, "test", task="reverse"
        )
    all_problems = problems + eval_problems + ood_problems
    all_prompts = prompts + eval_prompts + ood_prompts
    for problem, prompt in zip(all_problems, all_prompts, strict=True):
        if max(prompt) >= vocab_size:
            raise ValueError(
                f"{problem['where']}: the prompt holds {tokenizer.decode([max(prompt)])!r}, which "
                f"is not among the {vocab_size} tokens that --student and --teacher share"
            )
    for config in configs.values():
        loading.check_fit(config, all_problems, all_prompts, args.max_new_tokens)
    splitter, splitter_name, sentences = None, None, None
    if grading.signals(args):
        try:
            splitter, splitter_name = teachability.sentence_splitter(args.splitter, download=True)
        except LookupError as error:
            raise ValueError(f"--splitter {args.splitter}: {error}") from None
        sentences = grading.Sentences(tokenizer, splitter, args.sentence_workers)
    return Run(
        args=args, rank=rank, world=world, tokenizer=tokenizer, splitter=splitter,
        splitter_name=splitter_name, sentences=sentences, vocab_size=vocab_size,
        pad_id=loading.pad_id(tokenizer), prompts=prompts, eval_problems=eval_problems,
        eval_prompts=eval_prompts, ood_problems=ood_problems, ood_prompts=ood_prompts,
    )


def student_and_teacher(args) -> dict[str, str]:
    """The two models by flag; the toy world's where the flag was left out."""
    world = toy.world(args.toy)
    for given, folder in ((args.student, world.student), (args.teacher, world.teacher)):
        if given is None:
            toy.require(folder)  # not all come with the repository
    return {
        "--student": str(args.student or world.student),
        "--teacher": str(args.teacher or world.teacher),
    }


def check_folder(out: Path) -> None:
    """ValueError unless a run could be written to `out`; leaves no trace."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file")
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise ValueError(f"--out {out} holds files that are not a run; name another folder")
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=place))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None


def make_folder(out: Path) -> None:
    """Create the run folder.  An earlier run in its place is moved to <out>.1, <out>.2, ..."""
    if out.exists() and any(out.iterdir()):
        number = 1
        while out.with_name(f"{out.name}.{number}").exists():
            number += 1
        out.rename(out.with_name(f"{out.name}.{number}"))
    out.mkdir(parents=True, exist_ok=True)


def describe(run: Run) -> dict:
    """config.json: every flag and what the numbers depended on."""
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if run.args.device == "cuda" else platform.processor()
    return {
        "flags": vars(run.args),
        "models": student_and_teacher(run.args),
        "processes": run.world,
        "vocabulary": run.vocab_size,
        "stop_ids": run.stop_ids,
        "sentence_splitter": run.splitter_name,
        "training_problems": len(run.prompts),
        "evaluation_problems": len(run.eval_problems),
        "ood_problems": len(run.ood_problems),
        "commit": commit or None,
        "device": device or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__,
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load_models(run: Run, device: torch.device) -> None:
    """Student in float32 (what AdamW needs), teacher in the type of the matrix products."""
    args = run.args
    for flag, path in student_and_teacher(args).items():
        is_student = flag == "--student"
        dtype = torch.float32 if is_student else getattr(torch, args.dtype)
        model = loading.load_model(
            path, dtype=dtype, device=device, trust_remote_code=args.trust_remote_code
        )
        loading.check_head(flag, model, run.prompts[0][:8])
        if is_student:
            run.model = model.train()  # dropout is 0; checkpointing works in training mode only
        else:
            run.teacher = model.requires_grad_(False)
            if args.lookahead == "on":
                longest = max(map(len, run.prompts)) + args.max_new_tokens
                lgr.check_model(model, longest)
                lgr.self_check(model)
    run.stop_ids = loading.stop_ids(run.model, run.teacher, run.tokenizer)
    if args.gradient_checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    student = StudentLogProbs(run.model, run.vocab_size, args.temperature)
    if run.world > 1:
        student = DistributedDataParallel(
            student, device_ids=[device.index] if device.type == "cuda" else None
        )
    run.student = student
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    run.optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=device.type == "cuda"
    )
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda done: min(1.0, (done + 1) / max(args.warmup_steps, 1))
    )



def start_processes(args, world: int) -> torch.device:
    """Join the process group that torchrun describes: gloo on CPU, nccl on GPU."""
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    return device


def train(run: Run, out: Path) -> list[dict]:
    """The loop: evaluate, step, log; returns the evaluation lines."""
    args, evaluations, shown = run.args, [], {}
    with open(out / "log.jsonl", "a") if run.rank == 0 else contextlib.nullcontext() as log:

        def write(line: dict, names: tuple[str, ...]) -> None:
            if run.rank == 0:
                log.write(json.dumps(line) + "\n")
                log.flush()
            shown.update({name: f"{line[name]:.3f}" for name in names})
            bar.set_postfix(shown)

        bar = tqdm(total=args.steps, desc=args.method, unit="step", disable=run.rank > 0)
        for step in range(args.steps + 1):
            due = step in (0, args.steps) or (args.eval_every and step % args.eval_every == 0)
            if due and run.eval_problems:
                evaluations.append(evaluate_student(run, step))
                write(evaluations[-1], ("accuracy",))
            if step < args.steps:
                write(train_step(run, step), ("reverse_kl", "kept"))
                bar.update()
        bar.close()
    return evaluations


def save_student(run: Run, out: Path) -> None:
    """student/ in Hugging Face format: written beside its place, then renamed into it."""
    target, half_written = out / "student", out / "student.partial"
    run.model.to(getattr(torch, run.args.save_dtype)).save_pretrained(half_written)
    run.tokenizer.save_pretrained(half_written)
    half_written.rename(target)


def main(argv: list[str] | None = None) -> None:
    """Check everything, then load, train, save and say what came of it."""
    parser, args = flags.parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = Path(args.out)
    try:
        if rank == 0:  # alone: another rank's probe in an empty folder would look like a file
            check_folder(out)
        run = prepare(args, rank, world)
    except ValueError as error:
        parser.error(str(error))
    try:
        train_and_save(run, out, parser)
    finally:  # also on errors: nothing is to wait for sentences that nobody wants any more
        if run.sentences is not None:
            run.sentences.close()


def train_and_save(run: Run, out: Path, parser: loading.Parser) -> None:
    """`main` from the weights on."""
    args, rank = run.args, run.rank
    try:
        load_models(run, start_processes(args, run.world))
    except ValueError as error:
        parser.error(str(error))
    if rank == 0:
        make_folder(out)
        (out / "config.json").write_text(json.dumps(describe(run), indent=2) + "\n")
    evaluations = train(run, out)
    if rank == 0:
        save_student(run, out)
        for line in evaluations[:1] + evaluations[-1:]:
            print(
                "step {step}: mean@{samples} {accuracy:.3f}, 95% interval {accuracy_low:.3f} to "
                "{accuracy_high:.3f}, {problems} problems".format(**line)
            )
        ood = [line["ood"]["accuracy"] for line in evaluations if "ood" in line]
        if ood:
            print(f"out of domain: {ood[0]:.3f} before, {ood[-1]:.3f} after")
        print(f"wrote {out}/config.json, log.jsonl, student/")
    if dist.is_initialized():
        dist.barrier()  # nobody leaves before rank 0 has saved
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
