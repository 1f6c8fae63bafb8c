"""Six other papers' answers to where to listen to the teacher. Each is a mask of masks.py, which it
needs, and an example of one of your own; importing this file adds them to its table.

    iw          all tokens, each the less the further the models have parted before it   2606.22600
    reopold     all but the worst, later the most uncertain                              2603.11137
    kat         those before the two models have agreed for long                         2606.09471
    overlap     those before the models' top K part, ever less                           2605.07804
    tip         the uncertain, and the sure on which the models differ                   2604.14084
    no_teacher  the least likely, pushed down whatever the teacher says                  2608.31046

Formulas as far as public summaries give them; ours where marked (o). Here each response is judged
alone, where some of the papers look at the whole batch.

Letters: B rows, T tokens, K candidates.
"""

import math

import torch

from masks import MASKS, Mask, finite

FAR = -100.0  # nats: log p_T - log p_S where p_T is 0; on nothing do the models differ more

def iw(response_mask_BT, advantage_BT, *, iw_max=1.5):
    """A soft release: 1 + (iw_max - 1)(1 - F), F the share of the response's |log p_T - log p_S|
    that lies before the token."""
    drift_BT = finite(advantage_BT, FAR).abs() * response_mask_BT
    before_BT = drift_BT.cumsum(dim=1) - drift_BT
    share_BT = before_BT / drift_BT.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return response_mask_BT * (1 + (iw_max - 1) * (1 - share_BT))


def reopold(response_mask_BT, advantage_BT, entropy_BT, progress) -> Mask:
    """log p_T - log p_S is at least log(0.3 / 0.7). In the first third of the run tokens below that
    are left out; later all but the fifth of the response (o) with the highest entropy."""
    floor = math.log(0.3 / 0.7)
    keep_BT = response_mask_BT & (advantage_BT >= floor)
    if progress >= 1 / 3:
        keep_BT = highest(entropy_BT, response_mask_BT, 0.2)
    return Mask(keep_BT, advantage_BT=advantage_BT.clamp(min=floor))


def kat(response_mask_BT, advantage_BT, *, kat_tokens=32, kat_share=0.1) -> Mask:
    """Up to and with the first `kat_tokens` in a row whose KL is below `kat_share` of the mean of
    the response (o): there the models agree, nothing is left to learn. KL: exp(a) - 1 - a of the
    sampled token, a = log p_T - log p_S, whose expectation it is (o)."""
    a_BT = finite(advantage_BT, FAR).where(response_mask_BT, 0.0)
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
    """w_t = min over s <= t of o_s / o_n: o_s is the share of the top K that both models have, mean
    over the n tokens up to s, n = `overlap_tokens` (o). 0 from where w_t is below the floor."""
    both_BTK = (candidate_ids_BTK[..., :, None] == teacher_ids_BTK[..., None, :]).any(dim=-1)
    sum_BT = (both_BTK.float().mean(dim=-1) * response_mask_BT).cumsum(dim=1)
    count_BT, n = response_mask_BT.cumsum(dim=1), overlap_tokens
    mean_BT = (sum_BT - torch.nn.functional.pad(sum_BT, (n, 0))[:, : sum_BT.shape[1]]) / n
    mean_BT = mean_BT.where(response_mask_BT & (count_BT >= n), math.inf)
    first_B1 = mean_BT.where(count_BT == n, math.inf).amin(dim=1, keepdim=True)
    low_BT = mean_BT.cummin(dim=1).values  # infinite until the first window is full
    weight_BT = torch.where(low_BT.isinf(), 1.0, low_BT / first_B1.clamp(min=1e-12)).clamp(max=1)
    return response_mask_BT * weight_BT * (weight_BT >= overlap_floor)


def tip(response_mask_BT, advantage_BT, entropy_BT, *, tip_share=0.5):
    """The share of the response with the highest 1 - (1 - h)(1 - d): the entropy, and |log p_T -
    log p_S| (o), each over the largest of the response."""
    parts = (entropy_BT * response_mask_BT, finite(advantage_BT, FAR).abs() * response_mask_BT)
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


RIVALS = {"iw": iw, "reopold": reopold, "kat": kat, "overlap": overlap, "tip": tip,
          "no_teacher": no_teacher}  # fmt: skip
OWN_ADVANTAGE = ("reopold", "no_teacher")
MASKS.update(RIVALS)
