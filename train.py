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

Around the steps: the command line and its presets (flags.py), models and prompts (preparing.py),
what a step says in the log (metrics.py), exact resume and signals (checkpoint.py).

In expectation over the student's samples the gradient of this loss is that of the reverse KL
KL(p_S || p_T) of every position, given the sampled prefix, minus gamma times the expected reward
(tests/test_train.py enumerates both).

Randomness is stateless: step s of seed r always uses the same prompts and the same uniform numbers
per (row, token), however many processes share the work, so `--nproc_per_node 2` repeats the run of
one process up to floating-point noise.

Letters: B rows of this process, T tokens, K candidates, U tokens of a union of candidates.
"""

import contextlib
import dataclasses
import math
import os
import random
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import controls
import evaluate
import flags
import grading
import harness
import lgr
import logprobs
import metrics
import preparing
import rollout
import toy
from preparing import Position, Run


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
    divergence, scale_BT = None, None
    if args.objective in logprobs.DIVERGENCES:
        divergence = (args.objective, args.jsd_beta, grades.hidden_BTD, teacher_head_VE)
        scale_BT = weight_BT
    elif args.objective == "pg" and args.updates_per_rollout == 1:
        scale_BT = -weight_BT * advantage_BT
    with autocast(args):
        out = student(batch.ids_BT, grades.choice.keep_BT, grades.union_BTU, divergence, scale_BT)
    if scale_BT is not None:  # 0 * inf would be nan
        return torch.where(scale_BT != 0, scale_BT * out, 0.0).sum()
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
    Unless both are finite, the weights stay as they are: both are the same in all processes, so all
    of them decide alike.  The exact divergences need the teacher's head.

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
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    return loss, norm


def autocast(args):
    """Matrix products in bfloat16 where asked for; parameters and everything else stay float32."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")


# ----------------------------------------------------------------------------------------- a step


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


def rows_of_step(run: Run, step: int) -> tuple[list[int], range]:
    """The problem of every rollout of a step, and which of the rollouts are this process's."""
    args = run.args
    count = args.prompts_per_step
    order = batch_order(len(run.prompts), step * count, count, args.seed)
    problems = [problem for problem in order for _ in range(args.rollouts_per_prompt)]
    return problems, my_share(len(problems), run.rank, run.world)


def sample(run: Run, step: int) -> rollout.Rollout:
    """Phase 1: this process's share of the step's rollouts."""
    args = run.args
    problems, mine = rows_of_step(run, step)
    with autocast(args):
        return rollout.generate(
            run.model,
            [run.prompts[problems[row]] for row in mine],
            max_new_tokens=args.max_new_tokens,
            eos_ids=run.stop_ids,
            pad_id=run.pad_id,
            temperature=args.temperature,
            top_k=max(grading.candidates_needed(args).values(), default=1),
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
    sums = {"reverse_kl": reverse_kl} | metrics.batch_sums(batch, grades)
    sums = dict(zip(sums, sum_over_ranks(list(sums.values()), mask_BT.device), strict=True))
    weight_BT = token_weights(mask_BT, keep_BT, args.rescale, sums["tokens"], sums["kept_tokens"])
    head_VE = run.teacher.get_output_embeddings().weight
    skipped = 0
    for _ in range(args.updates_per_rollout):
        loss, norm = update(
            run.student, run.optimizer, batch, grades, advantage_BT, weight_BT, args, head_VE
        )
        if math.isfinite(loss) and math.isfinite(norm):
            run.scheduler.step()
        else:
            skipped += 1
    watch.lap("update")
    if skipped and run.position.skipped + 1 >= args.max_skipped_steps:
        give_up(run, step, batch, grades, advantage_BT, weight_BT, (loss, norm))
    return metrics.log_line(step, loss, norm, skipped, sums, watch.seconds, args)


def give_up(run: Run, step: int, batch, grades, advantage_BT, weight_BT, numbers) -> None:
    """Save the batch of the last of too many skipped steps, and raise.

    Every process writes faults/step-<n>-rank<r>.safetensors with its rows.

    Raises:
        FloatingPointError: always, with the step and the rollouts that look guilty.
    """
    args, mask_BT = run.args, batch.response_mask_BT
    problems, mine = rows_of_step(run, step)
    fine_B = (grades.logp_BT.isfinite() & advantage_BT.isfinite()).all(dim=1)
    guilty = [mine[row] for row in (~fine_B).nonzero()[:, 0].tolist()]
    if run.world > 1:
        shares = [None] * run.world
        dist.all_gather_object(shares, guilty)
        guilty = sum(shares, [])
    tensors = {
        "ids_BT": batch.ids_BT, "response_mask_BT": mask_BT, "student_logp_BT": batch.logp_BT,
        "teacher_logp_BT": grades.logp_BT, "keep_BT": grades.choice.keep_BT,
        "advantage_BT": advantage_BT, "weight_BT": weight_BT,
        "rollout_B": torch.tensor(mine), "problem_B": torch.tensor([problems[row] for row in mine]),
    }  # fmt: skip
    name = f"step-{step + 1}-rank{run.rank}.safetensors"
    path = checkpoint.write_fault(Path(args.out), name, tensors)
    who = "the gradient's alone: no rollout stands out"
    if guilty:
        who = "rollouts " + ", ".join(f"{r} (problem {problems[r]})" for r in guilty[:8])
        who += f" and {len(guilty) - 8} more" * (len(guilty) > 8)
    raise FloatingPointError(
        f"step {step + 1}: loss {numbers[0]}, gradient norm {numbers[1]}, the last of "
        f"{run.position.skipped + 1} such steps in a row; {who}; the batch is in {path}"
    )


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


def start_processes(args, world: int) -> torch.device:
    """Join the process group that torchrun describes: gloo on CPU, nccl on GPU."""
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        backend, timeout = "nccl" if args.device == "cuda" else "gloo", timedelta(0, args.timeout)
        dist.init_process_group(backend, timeout=timeout)
    return device


def together(work):
    """`work()` in every process; if it fails in one, its error in all: nobody waits for one that
    has left.

    Raises:
        ValueError: `work` raised a ValueError or an OSError somewhere; with the rank, if not here.
    """
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as caught:
        error = ValueError(str(caught))
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error and str(error))
        wrong = [rank for rank, text in enumerate(errors) if text is not None]
        if wrong and error is None:
            error = ValueError(f"rank {wrong[0]}: {errors[wrong[0]]}")
    if error is not None:
        raise error
    return result


# ------------------------------------------------------------------------------------------ resume
@dataclass
class Resume:
    """There is a run to go on with: from the checkpoint in `path`, or from its beginning."""

    path: Path | None


def find_resume(run: Run, out: Path) -> Resume | None:
    """What to go on with in `out`, if anything.

    Raises:
        ValueError: that run has other flags or other prompts, or is beyond --steps.
    """
    config = checkpoint.read_config(out) if run.args.resume else None
    if config is None:
        return None
    changed = checkpoint.changed_flags(config, vars(run.args), flags.MAY_CHANGE)
    if changed:
        raise ValueError(f"--resume: {out} is a run with other flags: {'; '.join(changed)}")
    if config.get("prompts_sha256") != preparing.fingerprint(run):
        raise ValueError(f"--resume: {out} is a run on other problems: their files have changed")
    path = checkpoint.newest(out)
    if path is not None and checkpoint.step_of(path) > run.args.steps:
        raise ValueError(f"--steps {run.args.steps}: {path} is of a later step")
    checkpoint.check_log(out, checkpoint.read_facts(path)["position"]["log_bytes"] if path else 0)
    return Resume(path)


def restore(run: Run, path: Path) -> None:
    """Put the checkpoint in that folder back, in this process.

    Raises:
        ValueError: it is of another student.
        OSError: it cannot be read here.
    """
    found = checkpoint.read(path)
    position = Position(**found.facts["position"])
    checkpoint.restore(found, run.model, run.optimizer, run.scheduler)
    if run.rank < len(position.random):
        checkpoint.set_random_state(position.random[run.rank])
    run.position = position


def begin_folder(run: Run, out: Path, resume: Resume | None) -> None:
    """Write the config of a new run, or into the one of an old run where it goes on.  What may make
    that differ from an uninterrupted run is said on stderr."""
    now = preparing.describe(run)
    if resume is None:
        checkpoint.make_folder(out)
        checkpoint.write_json(out / "config.json", now)
        return
    checkpoint.forget_faults(out)
    config = checkpoint.read_config(out)
    resumed = {"step": run.position.step}
    for name in ("commit", "device", "processes", "threads", "versions", "started"):
        resumed[name] = now[name]
        if config.get(name) != now[name] and name != "started":
            print(f"train.py: --resume: {name} {config.get(name)}, now {now[name]}: the run may go "
                  "on otherwise than it would have", file=sys.stderr)  # fmt: skip
    config["resumed"] = [*config.get("resumed", []), resumed]
    checkpoint.write_json(out / "config.json", config | {"flags": now["flags"]})
    where = f"from {resume.path}"
    if resume.path is None:
        where = f"{out} from the beginning, it has no whole checkpoint"
    print(f"train.py: resuming {where}", file=sys.stderr)


def write_checkpoint(run: Run, out: Path, log) -> None:
    """Rank 0 writes down where the run stands."""
    if run.rank == 0:
        log.flush()
        groups, facts = checkpoint.capture(run.model, run.optimizer, run.scheduler)
        facts["position"] = dataclasses.asdict(run.position)
        checkpoint.write(out, run.position.step, groups, facts)


# ------------------------------------------------------------------------------------------- a run
def all_random_states(run: Run) -> list[dict]:
    """Those of every process, by rank."""
    states = [checkpoint.random_state()]
    if run.world > 1:
        states = [None] * run.world
        dist.all_gather_object(states, checkpoint.random_state())
    return states


def train(run: Run, out: Path) -> list[dict]:
    """The loop: evaluate, step, log, now and then a checkpoint; returns the log, on rank 0.

    Whatever ends it early, rank 0 first writes a checkpoint of the last line of the log.
    """
    log = checkpoint.Log(out, run.position.log_bytes) if run.rank == 0 else None
    run.position.random = run.position.random or all_random_states(run)
    try:
        steps(run, out, log)
    except BaseException:
        if not run.interruptions.held:  # else the weights are ahead of the log
            with contextlib.suppress(Exception):  # the disk may be full, or the GPU gone
                write_checkpoint(run, out, log)
        raise
    finally:
        if log is not None:
            log.close()
    return log.lines if log is not None else []


def steps(run: Run, out: Path, log) -> None:
    """The loop itself. From the first change of a weight to the line in the log signals wait."""
    args, position, signals = run.args, run.position, run.interruptions
    hook = run.optimizer.register_step_pre_hook(signals.hold)
    bar = tqdm(total=args.steps, initial=position.step, desc=args.method, unit="step",
               disable=run.rank > 0)  # fmt: skip
    shown = {}

    def write(line: dict, names: tuple[str, ...], **moved) -> None:
        signals.hold()
        random = all_random_states(run)
        if log is not None:
            position.log_bytes = log.write(line)
            log.lines.append(line)
        vars(position).update(moved, random=random)
        signals.release()
        shown.update({name: f"{line[name]:.3f}" for name in names})
        bar.set_postfix(shown)

    with bar:
        while True:
            step = position.step
            due = step in (0, args.steps) or (args.eval_every and step % args.eval_every == 0)
            if due and run.eval_problems and not position.evaluated:
                write(evaluate_student(run, step), ("accuracy",), evaluated=True)
            if step == args.steps:
                break
            line = train_step(run, step)
            skipped = position.skipped + 1 if line["skipped"] else 0
            write(line, ("reverse_kl", "kept"), step=step + 1, evaluated=False, skipped=skipped)
            bar.update()
            every = args.checkpoint_every
            if every and ((step + 1) % every == 0 or step + 1 == args.steps):
                signals.hold()
                write_checkpoint(run, out, log)
                signals.release()
    hook.remove()


def save_student(run: Run, out: Path) -> None:
    """student/ in Hugging Face format."""

    def fill(folder: Path) -> None:
        run.model.to(getattr(torch, run.args.save_dtype)).save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)

    checkpoint.replace_folder(out, "student", fill)


def main(argv: list[str] | None = None) -> None:
    """Check everything, then load, train, save and say what came of it.

    Exits with 2 on bad input; 1 when the run fails; 0, 130 or 129 when SIGTERM, Ctrl-C or SIGHUP
    ends it."""
    parser, args = flags.parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    with checkpoint.Interruptions() as interruptions:
        code = guarded(args, parser, interruptions)
    if dist.is_initialized():  # the destructors of gloo's process group lock up, once in 30 runs
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def guarded(args, parser: harness.Parser, interruptions: checkpoint.Interruptions) -> int:
    """The command but for its first and last moments; returns the exit code."""
    out, sentences, begun = Path(args.out), None, None
    try:
        try:
            run, resume, device = set_up(args, out)
            sentences, run.interruptions = run.sentences, interruptions
            load_and_begin(run, out, resume, device)
        except ValueError as error:
            parser.error(str(error))
        begun = out  # before, an older run may lie there
        train_and_save(run, out)
        return 0
    except SystemExit as bad_input:
        return bad_input.code
    except (checkpoint.Stop, Exception) as error:
        interruptions.hold()  # what else comes is too late
        if interruptions.number is None:
            return end_with_error(begun, error)
        return end_when_told(begun, checkpoint.Stop(interruptions.number))
    finally:  # nothing is to wait for sentences that nobody wants any more
        interruptions.hold()
        if sentences is not None:
            sentences.close()


def set_up(args, out: Path) -> tuple[Run, Resume | None, torch.device]:
    """Every check that needs no weights; then the processes meet, and hear of each other's errors.
    Rank 0 knows what to go on with."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run, resume, error = None, None, None
    try:
        if rank == 0:  # alone: another rank's probe in an empty folder would look like a file
            harness.check_creatable("--out", out)
            checkpoint.check_folder(out, args.resume)
        run = preparing.prepare(args, rank, world)
        resume = find_resume(run, out) if rank == 0 else None
    except (ValueError, OSError) as caught:  # the latter of a folder that may not be looked into
        error = caught
    device = start_processes(args, world) if world > 1 or error is None else None

    def raise_it():
        if error is not None:
            raise error

    together(raise_it)
    return run, resume, device


def load_and_begin(run: Run, out: Path, resume: Resume | None, device: torch.device) -> None:
    """Weights, the checkpoint to go on from, the run folder."""
    together(lambda: preparing.load_models(run, device))
    if run.world > 1:  # the folder is shared, but one process alone looked into it
        objects = [resume]
        dist.broadcast_object_list(objects, device=device)
        resume = objects[0]
    if resume is not None and resume.path is not None:
        together(lambda: restore(run, resume.path))
    together(lambda: begin_folder(run, out, resume) if run.rank == 0 else None)
    if run.world > 1:
        run.student = DistributedDataParallel(
            run.student, device_ids=[device.index] if device.type == "cuda" else None
        )


def train_and_save(run: Run, out: Path) -> None:
    """The run itself, and what came of it."""
    lines = train(run, out)
    run.interruptions.hold()
    if run.rank == 0:
        save_student(run, out)
        evaluations = [line for line in lines if "accuracy" in line]
        for line in evaluations[:1] + evaluations[-1:]:
            print(
                "step {step}: mean@{samples} {accuracy:.3f}, 95% interval {accuracy_low:.3f} to "
                "{accuracy_high:.3f}, {problems} problems".format(**line)
            )
        ood = [line["ood"]["accuracy"] for line in evaluations if "ood" in line]
        if ood:
            print(f"out of domain: {ood[0]:.3f} before, {ood[-1]:.3f} after")
        skipped = sum(line.get("skipped", 0) > 0 for line in lines)
        if skipped:
            print(f"{skipped} steps were skipped: loss or gradient was not finite")
        print(f"wrote {out}/config.json, log.jsonl, student/")
    if dist.is_initialized():
        dist.barrier()  # nobody leaves before rank 0 has saved


# --------------------------------------------------------------------------------- ends before time
def end_when_told(out: Path | None, stop: checkpoint.Stop) -> int:
    """After SIGTERM, Ctrl-C or SIGHUP: say how to go on; returns the exit code. out: None if the
    run has not begun."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        path = checkpoint.last_written(out) if out else None
        how = f"{path} is written, --resume goes on from there" if path else "nothing was written"
        print(f"\ntrain.py: stopped by {stop}; {how}", file=sys.stderr, flush=True)
    elif out:  # perhaps it is the only one that was told
        checkpoint.first_fault(out, f"rank {rank}: stopped by {stop}")
    return stop.exit_code


def end_with_error(out: Path | None, error: Exception) -> int:
    """After an error: the process in which it happened says so, on stderr and for the others in
    faults/; the others, which only lost contact, name that one.  Returns the exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    text = f"{type(error).__name__}: {error}"
    lost = isinstance(error, dist.DistError) or "/gloo/" in str(error)
    if lost:
        text = f"lost contact with another process: {error}"
    if world > 1:
        text = f"rank {rank}: {text}"
        first = checkpoint.first_fault(out, text) if out else text
        if first != text:
            text, lost = f"rank {rank} ends because of {first}", True
    if not lost and not isinstance(error, FloatingPointError | OSError):
        traceback.print_exception(error)
    print(f"\ntrain.py: error: {text}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    main()
