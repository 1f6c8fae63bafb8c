"""Where does the teacher stop teaching? The release rule: one BIC change point per rollout.

Paper: "Prefix Teach, Suffix Fade", arXiv 2605.13643, the sections on change-point detection
and on the release of the suffix. A teacher is scored sentence by sentence along a student's own
response (`scores_N`, in nats: log(1 + mean teacher margin)). If the scores fall from one level
to a lower one, the response is supervised up to the fall and *released* after it.

    paper              here           meaning
    S_1 .. S_n         scores_N       one teachability score per segment (sentence)
    n                  n              number of segments
    tau, tau*          tau, kept      segments before the drop; the best tau, if accepted
    RSS0, RSS1(tau)    rss0, rss1     squared error around one mean, around two means
    BIC0, BIC1(tau)    bic0, bic1     the two models' criteria; lower is better
    q_t                keep_mask      1 while token t is supervised, 0 once released

Decisions where the paper is silent, and one algorithmic change:
1. At least `min_segments` (2) on either side of the drop. With an eps this small two segments
   alone would always "change": RSS1 = 0.
2. No change point, not an error: empty, too short, constant, NaN, inf, or squares that overflow.
3. All tau are searched at once in O(n): by RSS1(tau) = RSS0 - n c_tau^2 / (tau (n - tau)), with
   c_tau the cumulative sum of the centred scores, argmin BIC1 = argmin RSS1 = argmax
   c_tau / sqrt(tau (n - tau)) among the drops, which are the tau with c_tau > 0.
4. Rounding is not a drop: c_tau must exceed its own rounding error. Equal drops, again up to
   rounding, go to the first.
"""

import dataclasses
import math
import numbers

import numpy as np

TINY = 1e-300  # divided by any number of segments this is still above 0, and so has a logarithm


@dataclasses.dataclass(frozen=True)
class ChangePoint:
    """Outcome of the test "one level" against "one drop".

    kept: number of leading segments kept (tau*), or None when no drop is accepted.
    gain: BIC0 - BIC1 of the accepted drop, 0.0 when none. The paper calls > 6 significant.
    bic0: criterion of a single level; nan when undefined (no scores, or not finite).
    bic1: criterion of the best drop, accepted or not; inf when there is no drop to try.
    """

    kept: int | None
    gain: float
    bic0: float
    bic1: float


def change_point(scores_N, *, min_segments: int = 2, eps: float = 1e-12) -> ChangePoint:
    """Find the largest drop in the level of a series, and accept it if BIC says so.

        BIC0      = n log((RSS0      + eps) / n) + 1 log n      one mean
        BIC1(tau) = n log((RSS1(tau) + eps) / n) + 3 log n      two means and a place
        kept      = argmin BIC1(tau) over tau with mean before > mean after, if BIC1 < BIC0

    scores_N: 1-D floats (array, list or torch tensor), nats. Not modified.
    min_segments: fewest segments on either side of the drop, >= 1.
    eps: floor added to both sums of squares, at least TINY. Fits closer than sqrt(eps / n) per
        score look perfect to the rule, so a larger eps ignores small drops; 1e-12 is the paper's.
    Raises ValueError for scores that are not 1-D numbers, or a bad min_segments or eps.

    Doubling the scores (or adding to them) moves no decision, as long as RSS >> eps.

    >>> point = change_point([2.1, 1.9, 2.0, 0.6, 0.4, 0.5])
    >>> point.kept, round(point.gain, 1)
    (3, 23.1)
    >>> change_point([0.6, 0.4, 0.5, 2.1, 1.9, 2.0]).kept is None  # a rise is never released
    True
    >>> change_point([1.0, float("nan"), 0.0, 0.0])
    ChangePoint(kept=None, gain=0.0, bic0=nan, bic1=inf)
    """
    if not _is_integer(min_segments) or min_segments < 1:
        raise ValueError(f"min_segments must be an integer >= 1, got {min_segments!r}")
    if not isinstance(eps, numbers.Real) or not TINY <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= {TINY}, got {eps!r}")
    scores_N = _as_series(scores_N)
    n = scores_N.size
    undefined = ChangePoint(kept=None, gain=0.0, bic0=math.nan, bic1=math.inf)
    if n == 0:
        return undefined

    with np.errstate(over="ignore", invalid="ignore"):
        # Subtracting the first score first makes a constant series exactly zero.
        shifted_N = scores_N - scores_N[0]
        centred_N = shifted_N - shifted_N.mean()
        rss0 = float(centred_N @ centred_N)
    if not math.isfinite(rss0):  # nan or inf in the scores, or an overflow
        return undefined
    bic0 = n * math.log((rss0 + eps) / n) + 1 * math.log(n)

    tau = _largest_drop(scores_N, centred_N, min_segments)
    if tau is None:
        return ChangePoint(kept=None, gain=0.0, bic0=bic0, bic1=math.inf)

    # RSS1 afresh rather than as RSS0 - (...), which would cancel for a clean step.
    rss1 = _rss(centred_N[:tau]) + _rss(centred_N[tau:])
    bic1 = n * math.log((rss1 + eps) / n) + 3 * math.log(n)
    if bic1 < bic0:
        return ChangePoint(kept=tau, gain=bic0 - bic1, bic0=bic0, bic1=bic1)
    return ChangePoint(kept=None, gain=0.0, bic0=bic0, bic1=bic1)


def release_point(scores_N, *, min_segments: int = 2, eps: float = 1e-12) -> ChangePoint:
    """`change_point` on a series in which nan marks a segment without a single counted token.

    Those segments say nothing, so the change point is found among the others, and `kept` is put
    back into the numbering of `scores_N`. The release starts at the first *counted* segment
    after the drop: silent segments in between stay supervised, for nothing was seen to drop
    there. Without nan this is `change_point`; arguments and errors are its own.

    >>> nan = float("nan")
    >>> change_point([2.1, 1.9, 0.6, 0.4]).kept
    2
    >>> release_point([2.1, nan, 1.9, nan, 0.6, nan, 0.4]).kept
    4
    """
    scores_N = _as_series(scores_N)
    counted = np.flatnonzero(~np.isnan(scores_N))
    point = change_point(scores_N[counted], min_segments=min_segments, eps=eps)
    if point.kept is None:
        return point
    return dataclasses.replace(point, kept=int(counted[point.kept]))


def keep_mask(segment_T, kept: int | None) -> np.ndarray:
    """q_t: which tokens stay supervised when the first `kept` segments are kept.

    segment_T: 1-D integers, the segment number of every token from 0 on; -1 marks a token
        outside the response (prompt, padding), which is never supervised.
    kept: `ChangePoint.kept`; None keeps the whole response.
    Returns a new bool array [T]. Raises ValueError for a segment_T that is not 1-D integers
    >= -1, or a kept that is neither None nor an integer >= 0.

    >>> keep_mask([-1, 0, 0, 1, 2, 2, -1], 2).astype(int)
    array([0, 1, 1, 1, 0, 0, 0])
    >>> keep_mask([-1, 0, 0, 1, 2, 2, -1], None).astype(int)
    array([0, 1, 1, 1, 1, 1, 0])
    """
    if kept is not None and (not _is_integer(kept) or kept < 0):
        raise ValueError(f"kept must be None or an integer >= 0, got {kept!r}")
    try:
        segment_T = np.asarray(segment_T)
    except (TypeError, ValueError, RuntimeError) as error:  # a ragged list; a tensor with gradient
        raise ValueError(f"segment_T must be 1-D integers, got {segment_T!r}") from error
    if segment_T.ndim != 1:
        raise ValueError(f"segment_T must be 1-D, got shape {segment_T.shape}")
    if segment_T.size == 0:
        return np.zeros(0, dtype=bool)
    if not np.issubdtype(segment_T.dtype, np.integer) or segment_T.min() < -1:
        raise ValueError(f"segment_T must hold integers >= -1, got {segment_T!r}")
    if kept is None:
        return segment_T >= 0
    return (segment_T >= 0) & (segment_T < kept)


def _largest_drop(scores_N, centred_N, min_segments: int) -> int | None:
    """argmin RSS1(tau) over min_segments <= tau <= n - min_segments with mean before > after."""
    n = centred_N.size
    tau = np.arange(min_segments, n - min_segments + 1)
    if tau.size == 0:
        return None
    # c_tau = tau (mean of the first tau - mean of all): positive exactly for a drop.
    c = np.cumsum(centred_N)[tau - 1]
    # What a running sum of n terms can be off by, plus the last digit of the scores themselves.
    magnitude = np.abs(centred_N).sum() + np.abs(scores_N).max()
    rounding = n * np.finfo(np.float64).eps * magnitude
    drop = np.where(c > rounding, c / np.sqrt(tau * (n - tau)), 0.0)
    largest = drop.max()
    if largest == 0.0:
        return None
    return int(tau[np.argmax(drop >= largest * (1 - 1e-12))])


def _rss(values_N) -> float:
    residual_N = values_N - values_N.mean()
    return float(residual_N @ residual_N)


def _as_series(scores_N) -> np.ndarray:
    if hasattr(scores_N, "detach"):  # a torch tensor: may carry a gradient, or be bfloat16
        scores_N = scores_N.detach().cpu().double()
    try:
        series_N = np.asarray(scores_N, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"scores_N must be a 1-D array of floats, got {scores_N!r}") from error
    if series_N.ndim != 1:
        raise ValueError(f"scores_N must be 1-D, got shape {series_N.shape}")
    return series_N


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
