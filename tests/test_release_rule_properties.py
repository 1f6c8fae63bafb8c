"""Properties of the public names of release_rule."""

import math

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from properties import BAD_NUMBERS, INF, NAN, any_float, prop, refused_or

import release_rule


def rss(values):
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values)


@prop("release_rule.change_point", examples=150, m=st.integers(1, 3), n=st.integers(0, 14),
      data=st.data())
def test_change_point_is_the_best_of_all_drops(m, n, data):
    """BIC1 is the smallest over all drops, by a loop; `kept` reaches it; gain = BIC0 - BIC1."""
    scores = data.draw(st.lists(st.floats(0, 8, width=16), min_size=n, max_size=n))
    point = release_rule.change_point(scores, min_segments=m)
    drops = {
        tau: n * math.log((rss(scores[:tau]) + rss(scores[tau:]) + 1e-12) / n) + 3 * math.log(n)
        for tau in range(m, n - m + 1)
        if math.fsum(scores[:tau]) / tau > math.fsum(scores[tau:]) / (n - tau) + 1e-9
    }
    if drops:
        assert math.isclose(point.bic1, min(drops.values()), rel_tol=1e-6, abs_tol=1e-4)
    if point.kept is None:
        assert point.gain == 0 and not (drops and min(drops.values()) < point.bic0 - 1e-4)
    else:
        assert m <= point.kept <= n - m and point.gain == point.bic0 - point.bic1 > 0
        assert math.isclose(drops[point.kept], min(drops.values()), rel_tol=1e-6, abs_tol=1e-4)


@prop("release_rule.change_point", scale=st.integers(-6, 30), shift=st.integers(-64, 64),
      scores=st.lists(st.integers(-40, 40), max_size=16))
def test_change_point_does_not_see_shift_and_scale(scale, shift, scores):
    """Exact in binary, so the decision is the same; nor does a constant series ever drop."""
    point = release_rule.change_point(scores)
    moved = release_rule.change_point([(s + shift) * 2.0**scale for s in scores])
    assume(point.kept is None or point.bic1 > -20)  # a perfect fit is judged by eps, not by scale
    if scale >= 0 and (point.kept is None) == (moved.kept is None):
        assert point.kept == moved.kept
    assert release_rule.change_point([shift * 2.0**scale] * len(scores)).kept is None
    backwards = release_rule.change_point(sorted(scores))
    assert backwards.kept is None, "what only rises is never released"


@prop("release_rule.change_point", "release_rule.release_point", examples=200,
      scores=st.lists(any_float, max_size=8) | any_float
      | st.lists(st.lists(any_float, max_size=2), max_size=3) | st.lists(st.text(), max_size=2)
      | st.just([10**400]), m=st.sampled_from([1, 2, 2, *BAD_NUMBERS, True, "2"]),
      eps=st.sampled_from([1e-12, 1e-12, 5e-324, 1e308, *BAD_NUMBERS, "1"]))
def test_change_point_takes_any_numbers(scores, m, eps):
    for find in (release_rule.change_point, release_rule.release_point):
        given = {"scores_N": scores, "min_segments": m, "eps": eps}
        point = refused_or(find, given, any_error=True)
        if point is not None:
            assert point.gain >= 0 and not math.isnan(point.bic1)
            assert point.kept is None or 1 <= point.kept < len(scores)
            assert not math.isnan(point.bic0) or point.kept is None


@prop("release_rule.keep_mask", examples=150, segment=st.lists(st.integers(-1, 5), max_size=12),
      kept=st.sampled_from([None, 0, 1, 2, 3, 9, -1, 1.0, NAN, True]), ordered=st.booleans(),
      convert=st.sampled_from([list, np.array, torch.tensor, lambda x: torch.tensor(x).half(),
                               lambda x: torch.tensor(x).bfloat16(),
                               lambda x: torch.tensor(x).double().requires_grad_(),
                               lambda x: [x, *x], lambda x: np.array(x)[None]]))
def test_keep_mask_is_a_prefix_of_the_response(segment, kept, ordered, convert):
    """True exactly below `kept`; for segments in order, a beginning of the response."""
    segment = sorted(segment) if ordered else segment
    given = {"segment_T": convert(segment), "kept": kept}
    keep = refused_or(release_rule.keep_mask, given, any_error=True)
    if keep is None:
        return
    limit = INF if kept is None else kept
    assert keep.dtype == bool and keep.shape == np.shape(given["segment_T"])
    keep, segment = keep.ravel().tolist(), np.ravel(given["segment_T"]).tolist()
    assert keep == [0 <= s < limit for s in segment]
    inside = [k for k, s in zip(keep, segment, strict=True) if s >= 0]
    assert not ordered or inside == sorted(inside, reverse=True)
