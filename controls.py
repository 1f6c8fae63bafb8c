"""What the release rule has to beat: the same number of supervised tokens, in other places.

Paper: "Prefix Teach, Suffix Fade", arXiv 2605.13643, the ablations. A rule that supervises fewer
tokens might help because they are fewer, because they come first, or because it finds the right
place in every rollout. Four controls take these apart. Each supervises exactly as many response
tokens of a batch as the rule would have, to the token:

    prefix     the same share of every rollout: early tokens, but no place found
    shuffled   the rule's release points, permuted across the rollouts: the right distribution of
               places, in the wrong rollouts
    random     random tokens of the batch: fewer, and nothing else
    std        places found by the same change point in another signal, the standard deviation of
               the sampled advantage log p_T - log p_S within a sentence

Decisions where the paper is silent:
1. A batch is all rollouts of a step, on every process. Everything here is a function of the whole
   batch's counts and a seeded generator, so that each process can work out its own rows.
2. A permuted release point may lie beyond the end of its new rollout, and `std` releases where its
   own signal says so. What is then missing to the budget is added in proportion to the tokens that
   each rollout still has room for; what is too much is taken in proportion to what each kept.
3. A rollout that the rule did not release passes "to the end" on, whatever the lengths.

Letters: R rollouts of the whole batch, B of them in this process, T tokens.
"""

from numbers import Integral

import torch

CONTROLS = ("prefix", "shuffled", "random", "std")


def apportion(wanted_R, capacity_R, total: int) -> torch.Tensor:
    """Whole numbers near `wanted_R`, at most `capacity_R` each, that add up to `total`.

    wanted_R, capacity_R: int64 [R], >= 0; total: from 0 to the sum of the capacities.
    Returns int64 [R]. What is missing is shared out in proportion to the room left, what is too
    much taken back in proportion to what there is, by largest remainders (ties to the first).
    Raises ValueError for a negative or fractional number or a total that does not fit.

    >>> apportion(torch.tensor([0, 0, 0]), torch.tensor([10, 20, 30]), 31)     # proportional
    tensor([ 5, 10, 16])
    >>> apportion(torch.tensor([9, 9, 2]), torch.tensor([5, 9, 9]), 16)        # 9 > 5: cut at 5
    tensor([5, 9, 2])
    >>> apportion(torch.tensor([6, 3, 0]), torch.tensor([9, 9, 9]), 3)
    tensor([2, 1, 0])
    """
    wanted_R, capacity_R = torch.as_tensor(wanted_R), torch.as_tensor(capacity_R)
    if wanted_R.shape != capacity_R.shape or wanted_R.dim() != 1:
        shapes = tuple(wanted_R.shape), tuple(capacity_R.shape)
        raise ValueError(f"wanted_R and capacity_R must be [R], got shapes {shapes}")
    if len(wanted_R) and (wanted_R.is_floating_point() or capacity_R.is_floating_point()):
        raise ValueError("wanted_R and capacity_R must be whole numbers")
    wanted_R, capacity_R = wanted_R.long(), capacity_R.long()  # products of counts need 64 bits
    if len(wanted_R) and min(int(wanted_R.min()), int(capacity_R.min())) < 0:
        raise ValueError("wanted_R and capacity_R must not be negative")
    if not isinstance(total, Integral) or not 0 <= total <= int(capacity_R.sum()):
        raise ValueError(f"total must be from 0 to {int(capacity_R.sum())}, got {total}")
    count_R = torch.minimum(wanted_R, capacity_R)
    missing = total - int(count_R.sum())
    if missing >= 0:
        return count_R + _shares(missing, capacity_R - count_R)
    return count_R - _shares(-missing, count_R)


def _shares(amount: int, weight_R: torch.Tensor) -> torch.Tensor:
    """`amount` in proportion to `weight_R`, whole and exact; no share exceeds its weight, because
    the amount does not exceed their sum."""
    total = max(int(weight_R.sum()), 1)
    share_R, remainder_R = amount * weight_R // total, amount * weight_R % total
    left = amount - int(share_R.sum())  # fewer than there are remainders above 0
    share_R[remainder_R.argsort(descending=True, stable=True)[:left]] += 1
    return share_R


def first_tokens(count_B: torch.Tensor, response_mask_BT: torch.Tensor) -> torch.Tensor:
    """Keep mask [B, T] of the first `count_B` response tokens of every row.
    Raises ValueError for a mask that is not bool [B, T], or counts that are not [B].

    >>> first_tokens(torch.tensor([2, 0]), torch.tensor([[False, True, True, True]] * 2)).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
    """
    if response_mask_BT.dtype != torch.bool or response_mask_BT.dim() != 2:
        raise ValueError(f"response_mask_BT must be bool [B, T], got {response_mask_BT.dtype}, "
                         f"shape {tuple(response_mask_BT.shape)}")  # fmt: skip
    if count_B.shape != response_mask_BT.shape[:1]:
        raise ValueError(f"count_B must be [B], got shape {tuple(count_B.shape)}")
    place_BT = response_mask_BT.cumsum(dim=1)
    return response_mask_BT & (place_BT <= count_B.to(place_BT.device)[:, None])


def spend(kind, response_mask_BT, length_R, kept_R, wanted_R, *, first_row=0, generator):
    """Place the release rule's budget somewhere else: the keep mask of this process's rows.

    kind: one of CONTROLS.
    response_mask_BT: bool, rows first_row .. first_row + B - 1 of the batch.
    length_R: int64, response tokens of every rollout of the batch.
    kept_R: int64, how many of them the release rule keeps; equal to length_R where it keeps all.
    wanted_R: int64, of kind "std": how many its own change point would keep; otherwise unused.
    generator: a CPU generator in the same state on every process.
    Returns a new bool [B, T]; over all processes exactly sum(kept_R) tokens are true.
    Raises ValueError for an unknown kind, rows that do not have the lengths given, or counts that
    are not int64 from 0 to these lengths.
    """
    if kind not in CONTROLS:
        raise ValueError(f"kind must be one of {', '.join(CONTROLS)}, got {kind!r}")
    counts = {"length_R": length_R, "kept_R": kept_R}
    counts |= {"wanted_R": wanted_R} if kind == "std" else {}
    for name, count_R in counts.items():
        if not isinstance(count_R, torch.Tensor) or count_R.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {count_R!r}")
        if count_R.shape != length_R.shape or count_R.dim() != 1 or bool((count_R < 0).any()):
            raise ValueError(f"{name} must be [R], as length_R is, and >= 0, got {count_R}")
    if bool((kept_R > length_R).any()):
        raise ValueError(f"kept_R must not exceed length_R, got {kept_R} of {length_R}")
    if response_mask_BT.dtype != torch.bool or response_mask_BT.dim() != 2:
        raise ValueError("response_mask_BT must be bool [B, T]")
    if not isinstance(first_row, Integral) or first_row < 0:
        raise ValueError(f"first_row must be a whole number >= 0, got {first_row}")
    rows = slice(first_row, first_row + len(response_mask_BT))
    if not torch.equal(response_mask_BT.sum(dim=1).cpu(), length_R[rows]):
        raise ValueError(f"the rows from {first_row} on do not have the lengths in length_R")
    total = int(kept_R.sum())
    if kind == "random":
        chosen_N = torch.zeros(int(length_R.sum()), dtype=torch.bool)
        chosen_N[torch.randperm(len(chosen_N), generator=generator)[:total]] = True
        start, count = int(length_R[: rows.start].sum()), int(length_R[rows].sum())
        keep_BT = torch.zeros_like(response_mask_BT)
        keep_BT[response_mask_BT] = chosen_N[start : start + count].to(keep_BT.device)
        return keep_BT
    if kind == "prefix":
        wanted_R = torch.zeros_like(length_R)  # all of it in proportion to the lengths
    elif kind == "shuffled":
        to_the_end = int(length_R.max())
        wanted_R = torch.where(kept_R < length_R, kept_R, to_the_end)
        wanted_R = wanted_R[torch.randperm(len(wanted_R), generator=generator)]
    return first_tokens(apportion(wanted_R, length_R, total)[rows], response_mask_BT)
