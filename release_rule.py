"""Where does the teacher stop teaching? The release rule: one BIC change point per rollout.

Paper: "Prefix Teach, Suffix Fade", arXiv 2605.13643, the sections on change-point detection and on
the release of the suffix. A teacher is scored sentence by sentence along a student's own response.
If the scores drop from one level to a lower one, the response is supervised up to the drop and
*released* after it.

    paper              here           meaning
    S_1 .. S_n         scores_N       one score per sentence, nats (teachability.py)
    tau, tau*          tau, kept      sentences before the drop; the best tau, if accepted
    RSS0, RSS1(tau)    rss0, rss1     squared error around one mean, around two means
    q_t                keep_mask      1 while token t is supervised, 0 once released

    BIC0      = n log((RSS0      + eps) / n) + 1 log n      one mean
    BIC1(tau) = n log((RSS1(tau) + eps) / n) + 3 log n      two means and a place
    kept      = argmin BIC1(tau) over tau with mean before > mean after, if BIC1 < BIC0

Where the paper is silent: at least `min_segments` sentences on either side of the drop, since two
alone would always "change"; no change point in a series that is empty, too short, constant or not
finite; rounding is not a drop, and of drops that are equal up to rounding the first one counts.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class ChangePoint:
    kept: int | None  # leading sentences that stay supervised (tau*); None: no drop, keep all
    gain: float  # BIC0 - BIC1 of an accepted drop, else 0. The paper calls > 6 significant
    bic0: float  # nan when there are no scores, or not all are finite
    bic1: float  # of the best drop, accepted or not; inf when there is none


def change_point(scores_N, *, min_segments: int = 2, eps: float = 1e-12) -> ChangePoint:
    """The largest drop in the level of a series, if BIC accepts it. O(n).

    scores_N: 1-D numbers (list, array or torch tensor), nats. min_segments: fewest on either side.
    eps: added to both sums of squares; drops much smaller than sqrt(eps / n) are not seen.
    Raises ValueError for scores that are not 1-D, min_segments < 1, and eps <= 0.

    >>> point = change_point([2.1, 1.9, 2.0, 0.6, 0.4, 0.5])
    >>> point.kept, round(point.gain, 1)
    (3, 23.1)
    >>> change_point([0.6, 0.4, 0.5, 2.1, 1.9, 2.0]).kept is None  # a rise is never released
    True
    """
    scores_N = _float64(scores_N)
    if scores_N.ndim != 1:
        raise ValueError(f"scores_N must be 1-D, got shape {scores_N.shape}")
    if min_segments < 1 or not eps > 0:
        raise ValueError(f"min_segments must be >= 1, eps > 0, got {min_segments}, {eps}")
    n, rss0 = len(scores_N), math.nan
    if n:
        with np.errstate(over="ignore", invalid="ignore"):
            shifted_N = scores_N - scores_N[0]  # makes a constant series exactly zero
            centred_N = shifted_N - shifted_N.mean()
            rss0 = float(centred_N @ centred_N)
    if not math.isfinite(rss0):
        return ChangePoint(None, 0.0, math.nan, math.inf)
    bic0 = n * math.log((rss0 + eps) / n) + 1 * math.log(n)

    # All tau at once: with c = tau (mean of the first tau - mean of all), RSS1(tau) is
    # RSS0 - n c^2 / (tau (n - tau)), so the best drop has the largest c / sqrt(tau (n - tau)).
    taus = np.arange(min_segments, n - min_segments + 1)
    c = np.cumsum(centred_N)[taus - 1]
    rounding = n * np.finfo(np.float64).eps * (np.abs(centred_N).sum() + np.abs(scores_N).max())
    drops = np.where(c > rounding, c / np.sqrt(taus * (n - taus)), 0.0)
    largest = drops.max(initial=0.0)
    if largest == 0.0:
        return ChangePoint(None, 0.0, bic0, math.inf)
    tau = int(taus[np.argmax(drops >= largest * (1 - 1e-12))])
    rss1 = _rss(centred_N[:tau]) + _rss(centred_N[tau:])  # afresh: the formula above would cancel
    bic1 = n * math.log((rss1 + eps) / n) + 3 * math.log(n)
    if bic1 < bic0:  # the drop is accepted
        return ChangePoint(tau, bic0 - bic1, bic0, bic1)
    return ChangePoint(None, 0.0, bic0, bic1)


def release_point(scores_N, *, min_segments: int = 2, eps: float = 1e-12) -> ChangePoint:
    """`change_point` of a series in which nan marks a sentence without a token that counts.

    The drop is sought among the other sentences. `kept` counts all sentences, those marked nan
    too, before the first scored one after the drop. Arguments and errors as in `change_point`.

    >>> change_point([2.1, 1.9, 0.6, 0.4]).kept
    2
    >>> release_point([2.1, math.nan, 1.9, math.nan, 0.6, math.nan, 0.4]).kept
    4
    """
    scores_N = _float64(scores_N)
    counted = np.flatnonzero(~np.isnan(scores_N))
    point = change_point(scores_N[counted], min_segments=min_segments, eps=eps)
    kept = None if point.kept is None else int(counted[point.kept])
    return dataclasses.replace(point, kept=kept)


def keep_mask(segment_T, kept: int | None) -> np.ndarray:
    """q_t, bool [T]: which tokens stay supervised when the first `kept` sentences are kept.

    segment_T: integers, the sentence of every token from 0 on; -1 outside the response (prompt,
    padding), which is never supervised. kept: `ChangePoint.kept`; None keeps the whole response.

    >>> keep_mask([-1, 0, 0, 1, 2, 2, -1], 2).astype(int)
    array([0, 1, 1, 1, 0, 0, 0])
    """
    segment_T = np.asarray(segment_T)
    return (segment_T >= 0) & (kept is None or segment_T < kept)


def _rss(values_N) -> float:
    residual_N = values_N - values_N.mean()
    return float(residual_N @ residual_N)


def _float64(x) -> np.ndarray:
    x = x.detach().double().cpu() if hasattr(x, "detach") else x  # a torch tensor
    return np.asarray(x, dtype=np.float64)
