"""What the teacher makes of a batch of rollouts: phases 2 and 3 of a training step.

One teacher pass per micro-batch, the trunk, and everything is read off it while it is there:

  score       log-prob of every sampled token and of the student's candidates        logprobs.py
  mask        which tokens to supervise: all, or those before the teacher's margin   teachability.py
              over the student's candidates collapses (release rule, 2605.13643),    release_rule.py
              or as many elsewhere (controls; they see the whole batch, so they act  controls.py
              when all its micro-batches are graded)
  look ahead  the teacher's confidence one step after each of the student's          lgr.py
              candidates, against the trunk's KV cache (LGR, 2605.30833)

`args` is what `train.py` parses; its flags of the same names are read here.

Letters: B rows, T tokens, K candidates, U tokens of a union of candidates, N segments.
"""

import dataclasses
from dataclasses import dataclass

import torch

import controls
import lgr
import logprobs
import release_rule
import rollout
import teachability


def micro_batches(count: int, size: int) -> list[slice]:
    """Slices of at most `size` rows."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


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


def spends_budget(args) -> bool:
    """True if `controls.spend` has to place the tokens that the release rule would supervise."""
    return args.mask in controls.CONTROLS and "margin" in signals(args)


def supervise(batch, candidate_logp_BTK, advantage_BT, tokenizer, splitter, args) -> Supervision:
    """Per rollout: sentences, a score each, a change point, the keep mask.

    candidate_logp_BTK: for the margin, the teacher's log-probs of the student's candidates.
    advantage_BT: for the spread, log p_T - log p_S of the sampled tokens, nats.
    """
    B, keep_BT = len(batch.ids_BT), batch.response_mask_BT.clone()
    released_B = torch.zeros(B, dtype=torch.bool, device=keep_BT.device)
    gain_B = torch.zeros(B, dtype=torch.float64, device=keep_BT.device)
    wanted_B = keep_BT.sum(dim=1)
    if args.mask == "prefix" and args.prefix_tokens:
        keep_BT = controls.first_tokens(wanted_B.clamp(max=args.prefix_tokens), keep_BT)
    if not signals(args):
        return Supervision(keep_BT, released_B, gain_B, wanted_B)
    mask_BT, ids_BT, value_BT = batch.response_mask_BT.cpu(), batch.ids_BT.cpu(), {}
    if "margin" in signals(args):
        value_BT["margin"] = teachability.teacher_margin(candidate_logp_BTK, kind=args.margin).cpu()
        counted_BT = batch.entropy_BT.cpu() >= args.margin_min_entropy
    if "spread" in signals(args):
        value_BT["spread"] = advantage_BT.cpu()
    for row in range(B):
        mask_T = mask_BT[row]
        segment_T = teachability.token_segments(tokenizer, ids_BT[row, mask_T], splitter)
        for signal, values_BT in value_BT.items():
            if signal == "margin":
                scores_N = teachability.segment_scores(
                    values_BT[row, mask_T], segment_T, include_T=counted_BT[row, mask_T]
                )
            else:
                scores_N = teachability.segment_spread(values_BT[row, mask_T], segment_T)
            point = release_rule.release_point(
                scores_N, min_segments=args.min_segments, eps=args.bic_eps
            )
            keep_T = torch.from_numpy(release_rule.keep_mask(segment_T, point.kept))
            if signal == signals(args)[0]:
                keep_BT[row, batch.response_mask_BT[row]] = keep_T.to(keep_BT.device)
            released_B[row], gain_B[row] = point.kept is not None, point.gain
            wanted_B[row] = int(keep_T.sum())
    return Supervision(keep_BT, released_B, gain_B, wanted_B)


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


def stack(parts: list, columns: int):
    """The inverse of `pick`: rows one below the other, filled up with zeros to `columns`."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        if first.dim() == 1:
            return torch.cat(parts)
        out = first.new_zeros(sum(map(len, parts)), columns, *first.shape[2:])
        for rows, part in zip(out.split([len(part) for part in parts]), parts, strict=True):
            rows[:, : part.shape[1]] = part
        return out
    if first is None:
        return None
    names = [f.name for f in dataclasses.fields(first)]
    return type(first)(**{n: stack([getattr(part, n) for part in parts], columns) for n in names})


@torch.no_grad()
def grade(
    teacher, batch: rollout.Rollout, args, *, tokenizer, splitter, vocab_size: int, lap
) -> Grades:
    """Grade `args.micro_batch` rollouts at a time: the teacher's KV cache of a micro-batch lives
    until its leaves are scored, and no longer.

    Args:
        teacher: a Hugging Face causal LM.
        batch: from `rollout.generate`, with as many top-K ids as the methods look at.
        tokenizer, splitter: for the release rule's sentences; splitter may be None without it.
        vocab_size: ids that student and teacher share.
        lap: called with "score", "mask", "lookahead" at the end of each, to charge its time.
    """
    parts = []
    for rows in micro_batches(len(batch.ids_BT), args.micro_batch):
        used = int(batch.response_mask_BT[rows].any(dim=0).nonzero().max()) + 1
        part = pick(batch, rows, used)
        parts.append(grade_rows(teacher, part, args, tokenizer, splitter, vocab_size, lap))
    return stack(parts, batch.ids_BT.shape[1])


def grade_rows(teacher, batch, args, tokenizer, splitter, vocab_size, lap) -> Grades:
    """`grade` for one micro-batch."""
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
    )
    lap("score")
    margins_of = stats.candidate_logp_BTK[..., : args.margin_top_k] if scored else None
    advantage_BT = stats.logp_BT - batch.logp_BT
    choice = supervise(batch, margins_of, advantage_BT, tokenizer, splitter, args)
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
