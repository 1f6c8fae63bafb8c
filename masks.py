"""Which response tokens to supervise, and how much. Needs release_rule.py and teachability.py.

    none        all of them: plain OPD
    release     those before the drop of the teacher's margin           arXiv 2605.13643
    std         those before a drop in another signal, the spread of log p_T - log p_S (ablation)
    prefix      the first N of every response (`--prefix-tokens`)

A mask is a function that asks for what it needs by the names of its parameters:

    response_mask_BT    bool, true on response tokens
    logp_BT             the student's log-prob of the sampled token, nats
    entropy_BT          of the student's distribution, nats
    advantage_BT        log p_T - log p_S of the sampled token, nats
    max_prob_BT         the teacher's largest probability
    candidate_logp_BTK  the teacher's log-probs of the student's top K, nats
    candidate_ids_BTK, teacher_ids_BTK    the top K of student and teacher
    segments            the sentence of every response token, int64 [T] per row
    progress            share of the run's steps that are done
    any flag            by its name: margin, min_segments, ...; other keywords keep their defaults

It returns q_BT, true where a token is supervised (or a weight >= 0), or a `Mask`. For one of your
own write such a function, add it to MASKS and run `train.py --mask mine`; rivals.py has six.

Controls take apart why the release rule helps: `spend` places as many tokens as it keeps elsewhere.

    prefix     the same share of every response: early tokens, but no place found
    shuffled   the release points, permuted over the rollouts: the right places, in the wrong ones
    random     random tokens of the batch: fewer, and nothing else
    std        before its own change point, as many

Ours, where the paper is silent: the batch is that of all processes; what is missing to the budget
is shared out in proportion, what is too much likewise; a rollout not released hands on "all of it".

Letters: B rows of this process, R of all, T tokens, K candidates, N sentences, F all tokens.
"""

import inspect
import itertools
from dataclasses import dataclass

import numpy as np
import torch

import release_rule
import teachability

CONTROLS = ("prefix", "shuffled", "random", "std")  # brought to the token count of `release`
SEEN = ("response_mask_BT", "logp_BT", "entropy_BT", "advantage_BT", "max_prob_BT", "progress",
        "candidate_logp_BTK", "candidate_ids_BTK", "teacher_ids_BTK", "segments")  # fmt: skip


@dataclass
class Mask:
    """keep_BT: which tokens to supervise (q_t). released_B, gain_B: where a rule fired, and its
    BIC0 - BIC1 there, or None. advantage_BT: in the place of log p_T - log p_S, or None."""

    keep_BT: torch.Tensor
    released_B: torch.Tensor | None = None
    gain_B: torch.Tensor | None = None
    advantage_BT: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------- masks
def none(response_mask_BT):
    """Every response token."""
    return response_mask_BT


def release(
    response_mask_BT, candidate_logp_BTK, segments, entropy_BT=None, *, margin="logprob",
    margin_min_entropy=0.0, min_segments=2, bic_eps=1e-12,
) -> Mask:  # fmt: skip
    """The release rule: supervise each response up to the drop of its teacher margin, if any.

    candidate_logp_BTK: the teacher's log-probs (nats) of the student's top K; the paper's K is 4.
    segments: `teachability.token_segments` of each response, [T of that response] on the CPU.
    margin: of log-probs (the paper) or of probabilities ("prob").
    margin_min_entropy: a sentence's mean is over tokens with at least this student entropy, nats.

    >>> mask_BT = torch.tensor([[False] + [True] * 8])          # a prompt token, then 4 sentences
    >>> logp_BTK = torch.tensor([[[0., 0]] + [[0., -4]] * 2 + [[0., -4.1]] * 2 + [[0., 0]] * 4])
    >>> release(mask_BT, logp_BTK, [torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])]).keep_BT.int()
    tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.int32)
    """
    margin_BT = teachability.teacher_margin(candidate_logp_BTK, kind=margin).nan_to_num(nan=0.0)
    include_F = None
    if entropy_BT is not None and margin_min_entropy > 0:
        include_F = (entropy_BT >= margin_min_entropy)[response_mask_BT].cpu()
    segment_F, counts = join(segments)
    scores_F = margin_BT[response_mask_BT].cpu()
    scores_N = teachability.segment_scores(scores_F, segment_F, include_T=include_F)
    return up_to_the_drop(response_mask_BT, segments, scores_N.split(counts), min_segments, bic_eps)


def std(response_mask_BT, advantage_BT, segments, *, min_segments=2, bic_eps=1e-12) -> Mask:
    """The same change point in log(1 + standard deviation of log p_T - log p_S in a sentence)."""
    segment_F, counts = join(segments)
    scores_N = teachability.segment_spread(finite(advantage_BT)[response_mask_BT].cpu(), segment_F)
    return up_to_the_drop(response_mask_BT, segments, scores_N.split(counts), min_segments, bic_eps)


def prefix(response_mask_BT, *, prefix_tokens):
    """The first `prefix_tokens` tokens of every response."""
    return first_tokens(torch.full((len(response_mask_BT),), prefix_tokens), response_mask_BT)


def finite(advantage_BT, ruled_out=0.0):
    """`ruled_out` where the teacher gives a token no probability at all."""
    return advantage_BT.nan_to_num(nan=0.0, posinf=0.0, neginf=ruled_out)


MASKS = {"none": none, "release": release, "std": std, "prefix": prefix}


def parameters(name: str, flags=()) -> list[str]:
    """What the mask of that name asks for. ValueError if it needs what is neither in SEEN nor in
    `flags`.

    >>> parameters("std")
    ['response_mask_BT', 'advantage_BT', 'segments', 'min_segments', 'bic_eps']
    """
    asked = inspect.signature(MASKS[name]).parameters
    for key, parameter in asked.items():
        if parameter.default is parameter.empty and key not in SEEN and key not in flags:
            raise ValueError(f"--mask {name} asks for {key}; there are {', '.join(SEEN)} and flags")
    return list(asked)


def apply(name: str, seen: dict) -> Mask:
    """The mask of that name on what it asks for; `seen` may hold more."""
    asked = inspect.signature(MASKS[name]).parameters
    out = MASKS[name](**{key: seen[key] for key in asked if key in seen})
    return out if isinstance(out, Mask) else Mask(out)


def join(segments):
    """All responses as one: (segment_F, numbered on from response to response; sentences of each).

    >>> join([torch.tensor([0, 0, 1]), torch.tensor([0, 1])])
    (tensor([0, 0, 1, 2, 3]), [2, 2])
    """
    counts = [int(segment_T[-1]) + 1 if len(segment_T) else 0 for segment_T in segments]
    firsts = itertools.accumulate([0, *counts[:-1]])
    return torch.cat([s + first for s, first in zip(segments, firsts, strict=True)]), counts


def up_to_the_drop(response_mask_BT, segments, scores, min_segments, bic_eps) -> Mask:
    """Each response up to the change point of its scores [N]; all of it where there is none."""
    points = [release_rule.release_point(s, min_segments=min_segments, eps=bic_eps) for s in scores]
    keep = [release_rule.keep_mask(s, p.kept) for s, p in zip(segments, points, strict=True)]
    device, keep_BT = response_mask_BT.device, response_mask_BT.clone()
    keep_BT[response_mask_BT] = torch.from_numpy(np.concatenate(keep)).to(device)
    released_B = torch.tensor([point.kept is not None for point in points], device=device)
    gain_B = torch.tensor([point.gain for point in points], dtype=torch.float64, device=device)
    return Mask(keep_BT, released_B, gain_B)


# ------------------------------------------------------------------------------------- controls
def spend(kind, response_mask_BT, length_R, kept_R, wanted_R, *, first_row=0, generator):
    """Place the release rule's budget elsewhere: the keep mask [B, T] of this process's rows.

    response_mask_BT: rows first_row, first_row + 1, ... of the batch.
    length_R, kept_R: response tokens of every row of the batch, and how many `release` keeps.
    wanted_R: of kind "std", how many its own change point keeps.
    generator: a CPU generator in the same state on every process.
    Over all processes exactly sum(kept_R) tokens are true. ValueError for an unknown kind, or rows
    whose lengths are not those in length_R.
    """
    rows, total = slice(first_row, first_row + len(response_mask_BT)), int(kept_R.sum())
    if kind not in CONTROLS:
        raise ValueError(f"kind must be one of {', '.join(CONTROLS)}, not {kind!r}")
    if not torch.equal(response_mask_BT.sum(dim=1).cpu(), length_R[rows]):
        raise ValueError(f"length_R does not hold the lengths of the rows from {first_row} on")
    if kind == "random":
        chosen_F = torch.zeros(int(length_R.sum()), dtype=torch.bool)
        chosen_F[torch.randperm(len(chosen_F), generator=generator)[:total]] = True
        keep_BT = torch.zeros_like(response_mask_BT)
        start, count = int(length_R[:first_row].sum()), int(length_R[rows].sum())
        keep_BT[response_mask_BT] = chosen_F[start : start + count].to(keep_BT.device)
        return keep_BT
    if kind == "prefix":
        wanted_R = torch.zeros_like(length_R)  # all of it in proportion to the lengths
    elif kind == "shuffled":
        wanted_R = torch.where(kept_R < length_R, kept_R, int(length_R.max()))
        wanted_R = wanted_R[torch.randperm(len(wanted_R), generator=generator)]
    return first_tokens(apportion(wanted_R, length_R, total)[rows], response_mask_BT)


def apportion(wanted_R, capacity_R, total: int):
    """Whole numbers near `wanted_R`, at most `capacity_R` each, that add up to `total`: what is
    missing is shared out in proportion to the room left, what is too much taken back in proportion
    to what there is, by largest remainders. ValueError for a total that does not fit.

    >>> apportion(torch.tensor([0, 0, 0]), torch.tensor([10, 20, 30]), 31)
    tensor([ 5, 10, 16])
    >>> apportion(torch.tensor([9, 9, 2]), torch.tensor([5, 9, 9]), 16)        # 9 > 5: cut at 5
    tensor([5, 9, 2])
    """
    if not 0 <= total <= int(capacity_R.sum()):
        raise ValueError(f"total must be from 0 to {int(capacity_R.sum())}, not {total}")
    wanted_R, capacity_R = wanted_R.long(), capacity_R.long()  # products need 64 bits
    count_R = torch.minimum(wanted_R, capacity_R)
    missing = total - int(count_R.sum())
    weight_R = capacity_R - count_R if missing > 0 else count_R
    whole = max(int(weight_R.sum()), 1)
    share_R, remainder_R = abs(missing) * weight_R // whole, abs(missing) * weight_R % whole
    left = abs(missing) - int(share_R.sum())  # fewer than there are remainders above 0
    share_R[remainder_R.argsort(descending=True, stable=True)[:left]] += 1
    return count_R + share_R if missing > 0 else count_R - share_R


def first_tokens(count_B, response_mask_BT):
    """The first `count_B` response tokens of every row, bool [B, T].

    >>> first_tokens(torch.tensor([2, 0]), torch.tensor([[False, True, True, True]] * 2)).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
    """
    number_BT = response_mask_BT.cumsum(dim=1)
    return response_mask_BT & (number_BT <= count_B.to(number_BT.device)[:, None])
