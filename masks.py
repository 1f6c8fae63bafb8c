"""Which response tokens to supervise, and how much. Needs release_rule.py and teachability.py.

    none        all of them: plain OPD
    release     those before the drop of the teacher's margin           arXiv 2605.13643
    std         those before a drop in another signal, the spread of log p_T - log p_S (ablation)
    prefix      the first N of every response (`--prefix-tokens`)
    iw          all, each the less the further models have parted before it        2606.22600
    reopold     all but the worst, later the most uncertain                        2603.11137
    kat         those before the two models have agreed for long                   2606.09471
    overlap     those before their top K part, ever less                           2605.07804
    tip         the uncertain, and the sure on which they differ                   2604.14084
    no_teacher  the least likely, pushed down whatever the teacher says            2608.31046

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
own write such a function, add it to MASKS and run `train.py --mask mine`.

Controls take apart why the release rule helps: `spend` places as many tokens as it keeps elsewhere.

    prefix     the same share of every response: early tokens, but no place found
    shuffled   the release points, permuted over the rollouts: the right places, in the wrong ones
    random     random tokens of the batch: fewer, and nothing else
    std        before its own change point: another signal

Ours, where the paper is silent: the batch is all rollouts of a step on all processes; what is
missing to the budget is added in proportion to the room left, what is too much taken back likewise;
in `shuffled`, a rollout that was not released hands on "keep everything".

Letters: B rows of this process, R of all processes, T tokens, K candidates, N sentences, F tokens
of all responses one behind the other.
"""

import inspect
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

import release_rule
import teachability

CONTROLS = ("prefix", "shuffled", "random", "std")  # brought to the token count of `release`
OWN_ADVANTAGE = ("reopold", "no_teacher")
RIVALS = ("iw", "reopold", "kat", "overlap", "tip", "no_teacher")
SEEN = ("response_mask_BT", "logp_BT", "entropy_BT", "advantage_BT", "max_prob_BT", "progress",
        "candidate_logp_BTK", "candidate_ids_BTK", "teacher_ids_BTK", "segments")  # fmt: skip


@dataclass
class Mask:
    """keep_BT: which tokens to supervise (q_t). released_B, gain_B: where a rule fired, and its
    BIC0 - BIC1 there; None for masks without a change point. advantage_BT: in the place of
    log p_T - log p_S; None: that."""

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
    value_F = finite(advantage_BT)[response_mask_BT].cpu()
    segment_F, counts = join(segments)
    scores_N = teachability.segment_spread(value_F, segment_F)
    return up_to_the_drop(response_mask_BT, segments, scores_N.split(counts), min_segments, bic_eps)


def prefix(response_mask_BT, *, prefix_tokens):
    """The first `prefix_tokens` tokens of every response."""
    return first_tokens(torch.full((len(response_mask_BT),), prefix_tokens), response_mask_BT)


# -------------------------------------------------------------------------------------- rivals
# Formulas as far as public summaries give them; ours where marked (o). No batch: rows alone decide.
def iw(response_mask_BT, advantage_BT, *, iw_max=1.5):
    """A soft release: 1 + (iw_max - 1)(1 - F), F the share of the response's |log p_T - log p_S|
    that lies before the token."""
    drift_BT = finite(advantage_BT).abs() * response_mask_BT
    before_BT = drift_BT.cumsum(dim=1) - drift_BT
    share_BT = before_BT / drift_BT.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return response_mask_BT * (1 + (iw_max - 1) * (1 - share_BT))


def reopold(response_mask_BT, advantage_BT, entropy_BT, progress) -> Mask:
    """log p_T - log p_S is at least log(0.3 / 0.7). A third of the run tokens below that are left
    out, then all but the fifth of the highest entropy, of the response (o)."""
    floor = math.log(0.3 / 0.7)
    keep_BT = response_mask_BT & (advantage_BT >= floor)
    if progress >= 1 / 3:
        keep_BT = highest(entropy_BT, response_mask_BT, 0.2)
    return Mask(keep_BT, advantage_BT=advantage_BT.clamp(min=floor))


def kat(response_mask_BT, advantage_BT, *, kat_tokens=32, kat_share=0.1) -> Mask:
    """Up to the first `kat_tokens` in a row whose KL is below `kat_share` of the response's mean
    (o): there the models agree, and nothing is left to learn. KL: exp(a) - 1 - a of the sampled
    token, a = log p_T - log p_S, whose expectation it is (o)."""
    a_BT = finite(advantage_BT).where(response_mask_BT, 0.0)
    kl_BT = a_BT.exp() - 1 - a_BT
    mean_B1 = kl_BT.sum(dim=1, keepdim=True) / response_mask_BT.sum(dim=1, keepdim=True)
    low_BT = response_mask_BT & (kl_BT < kat_share * mean_B1)
    count_BT = low_BT.cumsum(dim=1)
    run_BT = count_BT - (count_BT * ~low_BT).cummax(dim=1).values  # low ones in a row, up to here
    hit_BT = (run_BT >= kat_tokens).int()
    keep_BT = response_mask_BT & (hit_BT.cumsum(dim=1) - hit_BT == 0)
    return Mask(keep_BT, (keep_BT != response_mask_BT).any(dim=1))


def overlap(
    response_mask_BT, candidate_ids_BTK, teacher_ids_BTK, *, overlap_tokens=16, overlap_floor=0.5
):
    """The lowest so far of the share of the top K that both models have, mean over the last
    `overlap_tokens` (o), over that of the first ones (o); 0 from where that is below the floor."""
    both_BTK = (candidate_ids_BTK[..., :, None] == teacher_ids_BTK[..., None, :]).any(dim=-1)
    sum_BT = (both_BTK.float().mean(dim=-1) * response_mask_BT).cumsum(dim=1)
    count_BT, n = response_mask_BT.cumsum(dim=1), overlap_tokens
    mean_BT = (sum_BT - torch.nn.functional.pad(sum_BT, (n, 0))[:, : sum_BT.shape[1]]) / n
    mean_BT = mean_BT.where(response_mask_BT & (count_BT >= n), math.inf)
    first_B1 = mean_BT.where(count_BT == n, math.inf).amin(dim=1, keepdim=True)
    weight_BT = (mean_BT.cummin(dim=1).values / first_B1).nan_to_num(nan=1.0).clamp(max=1)
    return response_mask_BT * weight_BT * (weight_BT >= overlap_floor)


def tip(response_mask_BT, advantage_BT, entropy_BT, *, tip_share=0.5):
    """The share of the response with the highest 1 - (1 - h)(1 - d): the entropy, and |log p_T -
    log p_S| (o), each over the largest of the response."""
    parts = (entropy_BT * response_mask_BT, finite(advantage_BT).abs() * response_mask_BT)
    h_BT, d_BT = (x / x.amax(dim=1, keepdim=True).clamp(min=1e-12) for x in parts)
    return highest(1 - (1 - h_BT) * (1 - d_BT), response_mask_BT, tip_share)


def no_teacher(response_mask_BT, logp_BT, entropy_BT) -> Mask:
    """The fifth of the response (o) with the lowest log-prob, with an advantage of -1/2 to -1: the
    lower, the higher the entropy among them. No teacher."""
    keep_BT = highest(-logp_BT, response_mask_BT, 0.2)
    low_B1 = entropy_BT.where(keep_BT, math.inf).amin(dim=1, keepdim=True)
    high_B1 = entropy_BT.where(keep_BT, -math.inf).amax(dim=1, keepdim=True)
    place_BT = (entropy_BT - low_B1) / (high_B1 - low_B1).clamp(min=1e-12)
    return Mask(keep_BT, advantage_BT=-0.5 - 0.5 * place_BT)


def highest(score_BT, response_mask_BT, share):
    """True on that share of every response, rounded up, where its scores are highest.

    >>> highest(torch.tensor([[9.0, 3, 1, 2]]), torch.tensor([[False, True, True, True]]), 0.5)
    tensor([[False,  True, False,  True]])
    """
    score_BT = score_BT.where(response_mask_BT, -math.inf)
    place_BT = score_BT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return response_mask_BT & (place_BT < share * response_mask_BT.sum(dim=1, keepdim=True))


def finite(advantage_BT):
    """Where the teacher rules a token out, 0."""
    return advantage_BT.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


MASKS = {"none": none, "release": release, "std": std, "prefix": prefix, "iw": iw, "kat": kat,
         "reopold": reopold, "overlap": overlap, "tip": tip, "no_teacher": no_teacher}  # fmt: skip


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
    rows = zip(segments, points, strict=True)
    keep_F = np.concatenate([release_rule.keep_mask(s, point.kept) for s, point in rows])
    device, keep_BT = response_mask_BT.device, response_mask_BT.clone()
    keep_BT[response_mask_BT] = torch.from_numpy(keep_F).to(device)
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
    >>> apportion(torch.tensor([6, 3, 0]), torch.tensor([9, 9, 9]), 3)
    tensor([2, 1, 0])
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
