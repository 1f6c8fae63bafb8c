"""The change point: worked cases, two independent solvers, invariances, hostile input."""

import dataclasses
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from release_rule import ChangePoint, change_point, keep_mask, release_point

NAN, INF = float("nan"), float("inf")


def brute_force(scores, min_segments=2, eps=1e-12):
    """The rule as the paper states it: every tau, two passes, plain Python. (kept, gain, b0, b1)"""
    n = len(scores)

    def rss(values):
        mean = math.fsum(values) / len(values)
        return math.fsum((v - mean) ** 2 for v in values)

    bic0 = n * math.log((rss(scores) + eps) / n) + math.log(n)
    best, bic1 = None, INF
    for tau in range(min_segments, n - min_segments + 1):
        left, right = scores[:tau], scores[tau:]
        if math.fsum(left) / tau > math.fsum(right) / (n - tau):
            bic = n * math.log((rss(left) + rss(right) + eps) / n) + 3 * math.log(n)
            if bic < bic1:
                best, bic1 = tau, bic
    if best is not None and bic1 < bic0:
        return best, bic0 - bic1, bic0, bic1
    return None, 0.0, bic0, bic1


def series(kind, rng, n):
    noise = rng.normal(size=n)
    at = int(rng.integers(1, n))
    level = (np.arange(n) < at).astype(float)
    return {
        "noise": noise,
        "drop": rng.uniform(0.5, 4) * level + 0.5 * noise,
        "clean drop": 2 * level + 1e-5 * noise,
        "rise": -3 * level + 0.5 * noise,
        "ramp down": np.linspace(2, 0, n) + 0.3 * noise,
        "ramp up": np.linspace(0, 2, n) + 0.3 * noise,
        "heavy tails": rng.standard_cauchy(size=n),
        "positive": np.log1p(rng.exponential(size=n) * (1 + 4 * level)),
        "offset": 1e5 + level + 0.5 * noise,
        "small": 1e-5 * (level + noise),
    }[kind]


KINDS = [
    "noise", "drop", "clean drop", "rise", "ramp down", "ramp up", "heavy tails", "positive",
    "offset", "small",
]  # fmt: skip


# --- exact tiny cases


def test_worked_by_hand():
    # mean 1: RSS0 = 4.04; halves with mean 2 and 0: RSS1 = 4 * 0.01 = 0.04
    point = change_point([2.1, 1.9, 0.1, -0.1])
    assert point.kept == 2
    assert point.bic0 == pytest.approx(4 * math.log(4.04 / 4) + 1 * math.log(4), rel=1e-9)
    assert point.bic1 == pytest.approx(4 * math.log(0.04 / 4) + 3 * math.log(4), rel=1e-9)
    assert point.gain == point.bic0 - point.bic1


@pytest.mark.parametrize(("spread", "accepted"), [(1.3, True), (1.45, False)])
def test_the_penalty_is_two_log_n(spread, accepted):
    """Two close cases: n log(RSS0 / RSS1) is 3.8 and 3.2, on either side of 2 log n = 3.6. With
    2 log n in place of BIC1's 3 log n both would be accepted, with 4 log n neither."""
    wobble = np.array([spread, -spread, 0.0])
    scores = np.r_[1 + wobble, -1 + wobble]  # RSS1 = 4 spread^2, RSS0 = RSS1 + 6
    evidence = 6 * math.log(1 + 6 / (4 * spread**2))
    assert 1 * math.log(6) < evidence < 3 * math.log(6)
    point = change_point(scores, min_segments=3)
    assert point.kept == (3 if accepted else None)
    assert point.gain == pytest.approx(evidence - 2 * math.log(6) if accepted else 0.0)
    assert point.bic0 - point.bic1 == pytest.approx(evidence - 2 * math.log(6))


def test_a_perfect_step_meets_the_floor():
    point = change_point([1.0] * 3 + [0.0] * 3, eps=1e-6)
    assert point.kept == 3
    assert point.bic1 == pytest.approx(6 * math.log(1e-6 / 6) + 3 * math.log(6), rel=1e-12)


def test_min_segments_on_both_sides():
    early, late = [9.0] + [0.0] * 9, [9.0] * 9 + [0.0]
    for scores, alone in ((early, 1), (late, 9)):
        assert change_point(scores, min_segments=1).kept == alone
        assert change_point(scores, min_segments=2).kept != alone
    assert change_point([1.0, 1.0, 0.0, 0.0]).kept == 2  # n = 2 * min_segments is enough
    assert change_point([5.0, 5.0, 5.0, 1.0, 1.0, 1.0], min_segments=3).kept == 3
    short = change_point([5.0, 1.0, 1.0])
    assert (short.kept, short.bic1) == (None, INF) and math.isfinite(short.bic0)


def test_ties_go_to_the_first():
    for third in (1.0, 0.1, 1 / 3):  # the last two are not exact in binary
        scores = [2 * third, 2 * third, third, third, 0.0, 0.0]
        assert change_point(scores).kept == 2
    # c_2 = c_4 = 0.3 with equal weights, but 4 comes out larger in the last digit
    assert change_point([0.4, 0.5, 0.2, 0.4, 0.1, 0.2]).kept == 2


def test_result_is_frozen_and_plain():
    point = change_point(np.array([2.0, 2.1, 0.0, 0.1]))
    assert type(point.kept) is int
    assert all(type(x) is float for x in (point.gain, point.bic0, point.bic1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.kept = 1


# --- parity with independent solvers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("min_segments", [1, 2, 3])
def test_parity_with_brute_force(kind, min_segments):
    rng = np.random.default_rng(KINDS.index(kind))
    for n in [2, 3, 4, 5, 6, 7, 9, 12, 20, 33, 60] * 3:
        scores = series(kind, rng, n)
        kept, gain, bic0, bic1 = brute_force(scores.tolist(), min_segments)
        point = change_point(scores, min_segments=min_segments)
        assert point.kept == kept
        assert point.bic0 == pytest.approx(bic0, rel=1e-9, abs=1e-6)
        assert point.bic1 == pytest.approx(bic1, rel=1e-9, abs=1e-6)
        assert point.gain == pytest.approx(gain, rel=1e-6, abs=1e-6)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=14), st.integers(1, 3))
def test_parity_with_exact_arithmetic(scores, min_segments):
    """Small integers are full of ties and of splits without any difference in mean."""
    n, total = len(scores), sum(scores)
    between = {}  # n (RSS0 - RSS1(tau)), of the drops
    for tau in range(min_segments, n - min_segments + 1):
        c = Fraction(n * sum(scores[:tau]) - tau * total, n)
        if c > 0:
            between[tau] = c * c / (tau * (n - tau))
    best = max(between, key=between.get) if between else None  # max: the first of equals
    point = change_point([0.1 * s for s in scores], min_segments=min_segments)
    assert (point.bic1 == INF) == (best is None)
    if point.kept is not None:
        assert point.kept == best


@pytest.mark.parametrize("solver", ["Dynp", "KernelCPD"])
def test_parity_with_ruptures(solver):
    import ruptures

    rng = np.random.default_rng(5)
    compared = 0
    for _ in range(60):
        kind = KINDS[int(rng.integers(8))]
        scores = series(kind, rng, int(rng.integers(6, 50)))
        if solver == "Dynp":
            algorithm = ruptures.Dynp(model="l2", min_size=2, jump=1)
        else:
            algorithm = ruptures.KernelCPD(kernel="linear", min_size=2)
        tau = algorithm.fit(scores.reshape(-1, 1)).predict(n_bkps=1)[0]
        point = change_point(scores)
        if scores[:tau].mean() > scores[tau:].mean():
            rss1 = scores[:tau].var() * tau + scores[tau:].var() * (scores.size - tau)
            n = scores.size
            bic1 = n * math.log((rss1 + 1e-12) / n) + 3 * math.log(n)
            assert point.bic1 == pytest.approx(bic1, rel=1e-7, abs=1e-4)
            assert point.kept == (tau if bic1 < point.bic0 else None)
            compared += 1
    assert compared >= 20


# --- invariances and false alarms


@pytest.mark.parametrize("kind", ["noise", "drop", "ramp down", "heavy tails", "positive"])
def test_shift_and_scale(kind):
    """The gain depends on RSS0 / RSS1 alone, as far as eps is negligible: it moves the gain by
    about n eps / RSS1, below 1e-8 for these series at a scale of 0.1. Hence the 1e-6."""
    rng = np.random.default_rng(7)
    for n in (8, 40, 120):
        scores = series(kind, rng, n)
        point = change_point(scores)
        for shift, scale, tolerance in ((100, 1, 1e-6), (-3, 0.1, 1e-6), (0, 1e4, 1e-6)):
            moved = change_point(scale * scores + shift)
            assert moved.kept == point.kept
            assert moved.gain == pytest.approx(point.gain, rel=tolerance, abs=tolerance)
        assert change_point(1e-9 * scores).kept is None or kind == "heavy tails"  # below eps


def test_a_rise_never_fires():
    rng = np.random.default_rng(8)
    for n in (4, 10, 60):
        step = np.r_[np.zeros(n // 2), np.ones(n // 2)]
        assert change_point(step) == ChangePoint(None, 0.0, change_point(step).bic0, INF)
        assert change_point(np.sort(rng.normal(size=n))).kept is None
        assert change_point(step[::-1]).kept == n // 2


def test_false_alarms_on_noise():
    """BIC's penalty for a change is 2 log n, so a series without one fires less and less often:
    measured 13% at n = 10, 5.5% at 40, 1.8% at 200 (a penalty of 1 log n: 30%, 25%, 19%)."""
    rng = np.random.default_rng(9)
    for n, low, high in ((10, 0.10, 0.17), (40, 0.03, 0.08), (200, 0.005, 0.035)):
        fired = np.mean([change_point(x).kept is not None for x in rng.normal(size=(1500, n))])
        assert low < fired < high


def test_a_drop_in_noise_is_found():
    rng = np.random.default_rng(10)
    found = [
        change_point(np.r_[np.full(15, 2.0), np.zeros(45)] + rng.normal(size=60) * 0.5).kept
        for _ in range(200)
    ]
    assert np.mean([kept is not None and abs(kept - 15) <= 1 for kept in found]) > 0.95


# --- hostile input


@pytest.mark.parametrize(
    "scores",
    [[], [NAN] * 6, [1, 1, NAN, 0, 0], [INF, 1, 0, 0], [3, 2, 1, -INF], [1e200] * 3 + [-1e200] * 3,
     [1.7e308] * 3 + [-1.7e308] * 3],
)  # fmt: skip
def test_undefined_is_no_change_point(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point = change_point(scores)
    assert (point.kept, point.gain, point.bic1) == (None, 0.0, INF)
    assert math.isnan(point.bic0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 / 3, -1e-12, 1e308, 5e-324])
@pytest.mark.parametrize("n", [1, 4, 7, 500])
def test_constant(value, n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point = change_point([value] * n)
    assert point == ChangePoint(None, 0.0, n * math.log(1e-12 / n) + math.log(n), INF)


def test_rounding_is_no_drop():
    assert change_point([0.1 + 0.2] * 5 + [0.3] * 5).kept is None
    # One unit in the last place of 1e9 is 1.2e-7: squared and summed over 800, above eps.
    step = np.r_[np.full(400, np.nextafter(1e9, INF)), np.full(400, 1e9)]
    assert brute_force(step.tolist())[0] == 400
    assert change_point(step).kept is None
    # A true drop on the same offset is still seen, and one at 1e-12 is left to eps.
    assert change_point(1e9 + np.r_[np.ones(5), np.zeros(5)]).kept == 5
    assert change_point(1e-12 * np.r_[np.ones(5), np.zeros(5)]).kept is None
    assert change_point(1e-12 * np.r_[np.ones(5), np.zeros(5)], eps=1e-40).kept == 5


@pytest.mark.parametrize(
    "convert",
    [list, tuple, np.array, lambda x: np.array(x, dtype=np.float32), torch.tensor,
     lambda x: torch.tensor(x, requires_grad=True), lambda x: torch.tensor(x).bfloat16(),
     lambda x: np.array(x)[::1], lambda x: np.array(x, dtype=int)],
)  # fmt: skip
def test_any_series_of_numbers(convert):
    assert change_point(convert([3.0, 2.0, 3.0, 1.0, 0.0, 1.0])).kept == 3


def test_arguments_stay_as_they_were():
    scores = np.array([3.0, NAN, 2.0, 3.0, 1.0, 0.0, 1.0])
    scores.flags.writeable = False
    change_point(scores)
    release_point(scores)
    segment = np.array([-1, 0, 0, 1])
    segment.flags.writeable = False
    assert keep_mask(segment, 1).flags.writeable


@pytest.mark.parametrize("find", [change_point, release_point])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_segments": 0}, "min_segments .* 0"),
        ({"min_segments": -1}, "min_segments .* -1"),
        ({"eps": 0.0}, "eps .* 0.0"),
        ({"eps": -1e-3}, "eps .* -0.001"),
        ({"eps": NAN}, "eps .* nan"),
    ],
)
def test_bad_options(find, options, message):
    with pytest.raises(ValueError, match=message):
        find([3.0, 2.0, 1.0, 0.0], **options)


@pytest.mark.parametrize("find", [change_point, release_point])
@pytest.mark.parametrize("scores", [1.0, [[1.0, 2.0]], [[3.0], [3.0], [1.0], [1.0]], None, ["high"],
                                    [[1.0], [1.0, 2.0]], [10**400]])
def test_what_is_no_series(find, scores):
    with pytest.raises((ValueError, TypeError, IndexError, OverflowError)):
        find(scores)


def test_a_series_of_two_axes_is_named():
    with pytest.raises(ValueError, match=r"scores_N must be 1-D, got shape \(1, 2\)"):
        change_point([[1.0, 2.0]])


# --- silent segments


def test_release_point_skips_silent_segments():
    scores = [NAN, 2.1, 1.9, NAN, NAN, 0.6, NAN, 0.4, NAN]
    assert change_point(scores).kept is None
    point, bare = release_point(scores), change_point([2.1, 1.9, 0.6, 0.4])
    assert bare.kept == 2
    # Segment 5 is the first one seen after the drop; 3 and 4 are silent and stay supervised.
    assert point == dataclasses.replace(bare, kept=5)
    assert release_point([NAN, 1.0, NAN]).kept is None
    assert release_point([NAN, NAN]).bic1 == INF
    assert release_point([2.1, 1.9, INF, 0.4, 0.4]).kept is None
    assert release_point(torch.tensor(scores)).kept == 5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=20))
def test_release_point_keeps_what_change_point_keeps(scores):
    bare = change_point([s for s in scores if s is not None])
    point = release_point([NAN if s is None else s for s in scores])
    assert (point.kept is None) == (bare.kept is None)
    if point.kept is not None:
        assert scores[point.kept] is not None
        assert sum(s is not None for s in scores[: point.kept]) == bare.kept


# --- keep mask


def test_keep_mask():
    segment = [-1, -1, 0, 0, 1, 2, 2, -1]
    expected = {
        None: [0, 0, 1, 1, 1, 1, 1, 0], 0: [0] * 8, 1: [0, 0, 1, 1, 0, 0, 0, 0],
        2: [0, 0, 1, 1, 1, 0, 0, 0], 3: [0, 0, 1, 1, 1, 1, 1, 0], 99: [0, 0, 1, 1, 1, 1, 1, 0],
    }  # fmt: skip
    for kept, mask in expected.items():
        for convert in (list, np.array, torch.tensor, lambda x: np.array(x, dtype=np.int16)):
            result = keep_mask(convert(segment), kept)
            assert result.dtype == bool and result.tolist() == [bool(m) for m in mask]
    assert keep_mask([], 3).tolist() == [] and keep_mask([], None).dtype == bool
    assert keep_mask([0, 1], np.int64(1)).tolist() == [True, False]
