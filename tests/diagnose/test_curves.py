"""Curves and logistics: worked cases, scipy, invariances, coverage, hostile input."""

import copy
import dataclasses
import json
import math
import warnings

import numpy as np
import pytest

from diagnose import curves
from diagnose.curves import (
    Curve,
    Logistic,
    curve,
    fit_curve,
    fit_logistic,
    interval,
    plain,
    regression,
)
from diagnose.curves import mean as mean_of

optimize = pytest.importorskip("scipy.optimize")
stats = pytest.importorskip("scipy.stats")

NAN, INF = float("nan"), float("inf")
SLOW = Logistic(drop=0.5, slope=0.05, midpoint=80.0, floor=0.3)


def curve_of(values_BT, problem_B, most=24, edges=None, **options):
    """A curve of responses of any lengths, one value per token."""
    lengths = [len(v) for v in values_BT]
    edges = curves.bins(max(lengths), most) if edges is None else edges
    return curve(
        np.concatenate(values_BT), np.concatenate([np.arange(n) for n in lengths]),
        np.repeat(np.arange(len(lengths)), lengths), problem_B, edges, **options,
    )  # fmt: skip


def ragged(seed, P=30, B=70, length=60):
    """Arguments of `curve`: B responses of 1 to `length` tokens, alike within a problem."""
    rng = np.random.default_rng(seed)
    problem_B = rng.integers(0, P, B)
    lengths = rng.integers(1, length + 1, B)
    row_N = np.repeat(np.arange(B), lengths)
    position_N = np.concatenate([np.arange(n) for n in lengths])
    value_N = rng.normal(size=P)[problem_B[row_N]] + rng.normal(size=len(row_N))
    return value_N, position_N, row_N, problem_B, curves.bins(length, 6)


def noisy(seed, truth, P=20, per=3, length=160, spread=0.1, most=24, **options):
    """A curve of `truth` with noise of tokens and of problems."""
    rng = np.random.default_rng(seed)
    shift_P = spread * rng.normal(size=P)
    values = [
        truth(np.arange(length)) + shift_P[b // per] + 0.2 * rng.normal(size=length)
        for b in range(P * per)
    ]
    return curve_of(values, np.arange(P * per) // per, most, **options)


def squares(t_X, y_X, w_X, logistic):
    return float((w_X * (y_X - logistic(t_X)) ** 2).sum())


def equal(a: Curve, b: Curve, **tolerance):
    for field in dataclasses.fields(Curve):
        x, y = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_allclose(x, y, err_msg=field.name, **tolerance)


def parameters(logistic):
    return dataclasses.astuple(logistic)[:4]


# --- exact tiny cases


def test_worked_by_hand():
    """Problem 0 has two responses, with 1, 0, 1 and 0; problem 1 has one, observed at 1, 3 and 5.
    Bin [0, 2): sums 1 of 3 and 1 of 1, mean 1/2, errors -1/2 and 1/2, so an SE of
    sqrt(2 / 1 * (1/4 + 1/4)) / 4 = 1/4. What is observed at 5 lies outside."""
    found = curve(
        [1, 0, 1, 0, 1, 1, 9], [0, 1, 2, 0, 1, 3, 5], [0, 0, 0, 1, 2, 2, 2], [0, 0, 1], [0, 2, 4]
    )
    assert found.mean_X.tolist() == [0.5, 1.0] and found.se_X.tolist() == [0.25, 0.0]
    assert found.count_X.tolist() == [4, 2] and found.responses_X.tolist() == [3, 2]
    assert found.problems_X.tolist() == [2, 2] and found.centre_X().tolist() == [0.5, 2.5]
    assert found.sum_PX.tolist() == [[1, 1], [1, 1]]
    assert found.weight_PX.tolist() == [[3, 1], [1, 1]]
    assert np.isnan(found.low_X).all() and np.isnan(found.high_X).all()


def test_a_ratio_worked_by_hand():
    """Sums 2, 1, 3 over denominators 4, 1, 5: 6 / 10, errors -0.4, 0.4, 0."""
    arguments = [2, 1, 1, 2], [0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 2, 2], [0, 1]
    found = curve(*arguments, denominator_N=[4, 1, 0, 5])
    assert found.mean_X[0] == 0.6 and found.count_X[0] == 4
    assert found.se_X[0] == pytest.approx(math.sqrt(3 / 2 * 0.32) / 10, rel=1e-12)
    assert mean_of([2, 1, 3], [0, 1, 2], denominator_B=[4, 1, 5]) == {
        "mean": 0.6, "se": 0.069282, "count": 3, "problems": 3}  # fmt: skip


def test_every_edge_belongs_to_the_bin_it_begins():
    found = curve([1.0] * 6, [-1, 0, 2, 3, 6, 7], [0] * 6, [0], [0, 3, 6])
    assert found.count_X.tolist() == [2, 1]  # 0 and 2; 3; and -1, 6, 7 lie outside
    assert found.centre_X().tolist() == [1.0, 4.0]


def test_quartiles_are_of_the_observations_of_a_bin():
    values, positions = [4, 7, 0, 2, 1, 5], [0, 9, 1, 2, 3, 4]
    found = curve(values, positions, [0] * 6, [0], [0, 4, 8, 12], quartiles=True)
    assert found.low_X.tolist() == [0.75, 5.0, 7.0]  # of 0, 1, 2, 4; of 5; of 7
    assert found.high_X.tolist() == [2.5, 5.0, 7.0]
    found = curve(values, positions, [0] * 6, [0], [0, 4, 5, 9, 10], quartiles=True)
    np.testing.assert_array_equal(found.low_X, [0.75, 5.0, NAN, 7.0])
    np.testing.assert_array_equal(found.mean_X, [1.75, 5.0, NAN, 7.0])


def test_errors_need_two_problems_in_the_same_bin():
    found = curve([1, 2, 3, 5], [0, 1, 1, 2], [0, 0, 1, 1], [0, 1], curves.bins(4))
    np.testing.assert_array_equal(found.mean_X, [1, 2.5, 5, NAN])
    np.testing.assert_array_equal(found.se_X, [NAN, 0.5, NAN, NAN])
    assert found.problems_X.tolist() == [1, 2, 1, 0]
    # A problem that is not there (number 1) is no problem: as if there were two.
    apart = curve([1, 2], [0, 0], [0, 1], [0, 2], [0, 1])
    assert apart.se_X.tolist() == [0.5] and apart.problems_X.tolist() == [2]
    assert apart.sum_PX.tolist() == [[1], [0], [2]]


@pytest.mark.parametrize(
    ("length", "most", "expected"),
    [(10, 4, [0, 3, 6, 9, 12]), (12, 4, [0, 3, 6, 9, 12]), (13, 4, [0, 4, 8, 12, 16]),
     (1, 24, [0, 1]), (3, 24, [0, 1, 2, 3]), (7, 1, [0, 7]), (9, 4, [0, 3, 6, 9]),
     (np.uint8(200), np.uint8(2), [0, 100, 200]), (np.int8(100), 3, [0, 34, 68, 102])],
)  # fmt: skip
def test_bins(length, most, expected):
    assert curves.bins(length, most).tolist() == expected


def test_plain():
    assert plain(1 / 3) == 0.333333 and plain(1234567.0) == 1234570.0 and plain(2) == 2.0
    assert [plain(x) for x in (NAN, INF, -INF, np.float64(NAN))] == [None] * 4
    assert plain(np.array([1, 2])) == [1.0, 2.0] and plain(np.array([])) == []
    assert type(plain(np.float32(0.1))) is float and plain(np.float32(0.1)) == 0.1
    assert plain(1.7976931348623157e308) < INF and plain(5e-324) > 0


def test_interval():
    assert interval(np.arange(1001.0)) == [25.0, 975.0] and curves.LEVEL == 0.95
    assert interval([NAN, *range(1001), INF, -INF]) == [25.0, 975.0]
    assert interval([]) == interval([NAN, INF]) == [None, None]
    assert interval([2.0]) == [2.0, 2.0]


def test_mean_leaves_out_nan():
    assert mean_of([1.0, NAN, 0.5, NAN], [0, 1, 2, 0]) == mean_of([1.0, 0.5], [0, 2])
    found = mean_of([1.0, NAN, 3.0, 8.0], [0, 1, 1, 0], denominator_B=[2, NAN, 2, 2])
    assert (found["mean"], found["count"], found["problems"]) == (2.0, 3, 2)
    assert mean_of([NAN], [0]) == {"mean": None, "se": None, "count": 0, "problems": 0}
    assert mean_of([], []) == mean_of([NAN, NAN], [3, 4])
    assert mean_of([NAN, 1.0, 3.0], [0, 1, 1])["problems"] == 1  # each with its own problem
    assert mean_of([2.0, 4.0], [1, 1]) == {"mean": 3.0, "se": None, "count": 2, "problems": 1}


def test_regression_worked_by_hand():
    """Squares around the means 5 and 5, products 3; of 2 x and y, 20, 5 and 6."""
    x, y, problem = [0.0, 1, 2, 3], [1.0, 0, 3, 2], [0, 0, 1, 1]
    found = regression(x, y, problem)
    assert (found["r"], found["slope"], found["count"], found["problems"]) == (0.6, 0.6, 4, 2)
    assert regression([2 * z for z in x], y, problem)["slope"] == 0.3
    assert regression(x, [-z for z in y], problem)["r"] == -0.6


def test_regression_on_what_does_not_vary():
    rest = [0.1] * 7, np.arange(7)
    found = regression(rest[0], np.arange(7.0), rest[1])
    assert found["r"] is found["slope"] is None
    assert found["r_interval"] == found["slope_interval"] == [None, None]
    found = regression(np.arange(7.0), *rest)
    assert (found["r"], found["slope"], found["slope_interval"]) == (None, 0.0, [0.0, 0.0])
    assert regression([1.0], [2.0], [0])["r"] is None
    empty = regression([], [], [])
    assert (empty.pop("count"), empty.pop("problems")) == (0, 0)
    assert set(empty.values()) == {None}


@pytest.mark.parametrize("x", [0.1, 1 / 3, 0.7, 1e5 / 7])
def test_draws_in_which_x_does_not_vary_are_left_out(x):
    """Two problems, each with one x: a draw of one of them alone has no slope, whatever rounding
    leaves of its x; every draw of both of them has r = -1 and the same slope."""
    for n in (3, 5, 7, 11):
        xs, problem = [x] * 3 + [x + 1] * n, [0] * 3 + [1] * n
        found = regression(xs, [2.1] * 3 + [1.1] * n, problem)
        assert found["slope_interval"] == [-1.0, -1.0] == found["r_interval"]
        ys = 0.1 * np.arange(3 + n)
        slopes = [ys[3:].mean() - ys[:3].mean()] * 2  # of any draw with both
        assert regression(xs, ys, problem)["slope_interval"] == pytest.approx(slopes, rel=1e-5)


def test_resample():
    found = curves.resample(7, 50, seed=3)
    assert found.shape == (50, 7) and (found.sum(axis=1) == 7).all() and found.min() == 0
    assert np.issubdtype(found.dtype, np.integer)
    assert (found == curves.resample(7, 50, seed=3)).all()
    assert (found != curves.resample(7, 50, seed=4)).any()
    many = curves.resample(5, 20000)
    np.testing.assert_allclose(many.mean(axis=0), 1, atol=0.03)
    np.testing.assert_allclose(many.var(axis=0), 0.8, atol=0.04)  # 5 * 1/5 * 4/5


def test_logistic_values():
    f = Logistic(drop=0.5, slope=0.2, midpoint=70, floor=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(f(70)) == 0.65 and f(1e9) == 0.4 and f(-1e9) == 0.9
    assert float(f(75)) == pytest.approx(0.5 / (1 + math.e) + 0.4, rel=1e-12)
    assert f(np.array([70.0, 1e9])).tolist() == [0.65, 0.4]


# --- parity with something independent


@pytest.mark.parametrize("seed", range(3))
def test_curve_equals_loops(seed):
    value_N, position_N, row_N, problem_B, edges = ragged(seed)
    weight_N = np.random.default_rng(seed).integers(0, 4, len(value_N))
    found = curve(value_N, position_N, row_N, problem_B, edges, denominator_N=weight_N,
                  quartiles=True)  # fmt: skip
    for x in range(len(edges) - 1):
        mine = [i for i, t in enumerate(position_N) if edges[x] <= t < edges[x + 1]]
        of = [problem_B[row_N[i]] for i in mine]
        total = sum(weight_N[i] for i in mine)
        average = sum(value_N[i] for i in mine) / total
        error, weight = {}, {}
        for i, p in zip(mine, of, strict=True):
            error[p] = error.get(p, 0) + value_N[i] - average * weight_N[i]
            weight[p] = weight.get(p, 0) + weight_N[i]
        P = sum(w > 0 for w in weight.values())
        se = math.sqrt(P / (P - 1) * sum(e**2 for e in error.values())) / total
        assert found.mean_X[x] == pytest.approx(average, rel=1e-9)
        assert found.se_X[x] == pytest.approx(se, rel=1e-9)
        assert found.count_X[x] == len(mine) and found.problems_X[x] == len(error)
        assert found.responses_X[x] == len({row_N[i] for i in mine})
        low, high = np.quantile(value_N[mine], [0.25, 0.75])
        assert (found.low_X[x], found.high_X[x]) == (low, high)


def test_se_of_one_number_per_problem_is_the_textbooks():
    value = np.random.default_rng(0).normal(size=9)
    found = curve(value, np.zeros(9), np.arange(9), np.arange(9), [0, 1])
    assert found.se_X[0] == pytest.approx(value.std(ddof=1) / 3, rel=1e-12)


def test_se_against_jackknife_and_bootstrap():
    """Within 5% of the jackknife and 10% of 4000 bootstrap resamples, of 60 problems with 1 to 5
    responses; without regard to problems it is too small by a third and more."""
    value_N, position_N, row_N, problem_B, edges = ragged(4, P=60, B=180)
    found = curve(value_N, position_N, row_N, problem_B, edges)
    assert found.problems_X.min() >= 20
    rng = np.random.default_rng(0)
    for x, P in enumerate(found.problems_X):
        S, W = (z[:, x][found.weight_PX[:, x] > 0] for z in (found.sum_PX, found.weight_PX))
        without = (S.sum() - S) / (W.sum() - W)
        jack = math.sqrt((P - 1) / P * ((without - without.mean()) ** 2).sum())
        assert found.se_X[x] == pytest.approx(jack, rel=0.05)
        drawn = rng.integers(0, P, (4000, P))
        assert found.se_X[x] == pytest.approx(
            (S[drawn].sum(axis=1) / W[drawn].sum(axis=1)).std(), rel=0.10)  # fmt: skip
    naive = curve(value_N, position_N, np.arange(len(row_N)), np.arange(len(row_N)), edges)
    assert (naive.se_X < 2 / 3 * found.se_X).all()


def test_regression_against_scipy_and_numpy():
    rng = np.random.default_rng(1)
    for n in (3, 10, 200):
        x = 50 + rng.normal(size=n)
        y = 3 - 0.5 * x + rng.normal(size=n)
        found, line = regression(x, y, rng.integers(0, 5, n)), stats.linregress(x, y)
        assert found["slope"] == plain(line.slope) and found["r"] == plain(line.rvalue)
        assert found["r"] == plain(np.corrcoef(x, y)[0, 1])


def test_regression_intervals_are_those_of_repeated_problems():
    """Every resample in the long way, by repeating the observations of the problems drawn."""
    rng = np.random.default_rng(2)
    problem = rng.permutation(np.repeat([3, 5, 5, 8, 11, 12], 6))
    x = 1000 + rng.normal(size=36) + problem
    y = 0.3 * x + 2 * rng.normal(size=13)[problem] + rng.normal(size=36)
    found = regression(x, y, problem, resamples=60, seed=7)
    r, slope = [], []
    for often in curves.resample(5, 60, seed=7):
        times = dict(zip((3, 5, 8, 11, 12), often, strict=True))
        again = np.repeat(np.arange(36), [times[p] for p in problem])
        r.append(np.corrcoef(x[again], y[again])[0, 1])
        slope.append(stats.linregress(x[again], y[again]).slope)
    for name, draws in (("r_interval", r), ("slope_interval", slope)):
        assert found[name] == pytest.approx(np.quantile(draws, [0.025, 0.975]), rel=1e-5)


TRUTHS = [
    Logistic(0.5, 0.05, 80, 0.3), Logistic(0.2, 0.03, 60, 0.7), Logistic(0.9, 0.2, 120, 0.0),
    Logistic(2.0, 0.1, 40, -1.0), Logistic(0.4, 0.04, 100, 0.5),
]  # fmt: skip


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("weighted", [False, True])
def test_logistic_against_scipy(truth, weighted):
    """The same minimum as curve_fit's, which starts from the truth."""
    rng = np.random.default_rng(3)
    t = np.arange(2.0, 160.0, 4.0)
    for noise in (0.0, 0.01, 0.03):
        y = truth(t) + noise * truth.drop * rng.normal(size=t.size)
        w = np.exp(2 * rng.normal(size=t.size)) if weighted else np.ones(t.size)
        theirs, _ = optimize.curve_fit(
            lambda t, a, s, m, b: a / (1 + np.exp(s * (t - m))) + b, t, y, parameters(truth),
            sigma=1 / np.sqrt(w), xtol=1e-12, ftol=1e-12,
        )  # fmt: skip
        mine = fit_logistic(t, y, w if weighted else None)
        np.testing.assert_allclose(parameters(mine), theirs, rtol=2e-5, atol=2e-5)
        assert (noise > 0) == (mine.r2 < 1 - 1e-9)


def test_weights_count_like_repeats():
    """Two observations in one bin are one of their mean with weight 2, up to a constant."""
    rng = np.random.default_rng(4)
    t = np.arange(0.0, 100.0, 5.0)
    y = SLOW(t) + 0.05 * rng.normal(size=20)
    once = fit_logistic(t, y)
    for w in (7.0, 1e-3):
        np.testing.assert_allclose(parameters(fit_logistic(t, y, np.full(20, w))),
                                   parameters(once), rtol=1e-6)  # fmt: skip
    light = np.where(np.arange(20) == 3, 1e-9, 1.0)
    spoilt = np.where(np.arange(20) == 3, 5.0, y)
    without = fit_logistic(np.delete(t, 3), np.delete(y, 3))
    np.testing.assert_allclose(parameters(fit_logistic(t, spoilt, light)), parameters(without),
                               rtol=1e-4)  # fmt: skip
    assert fit_logistic(t, spoilt).r2 < 0.5
    for heavy in range(20):  # all but alone: the others tell nothing, and rounding must not
        alone = fit_logistic(t, y, np.where(np.arange(20) == heavy, 1.0, 1e-18))
        assert alone.drop == 0 and alone.floor == pytest.approx(y[heavy], rel=1e-12)


def test_r2_is_that_of_the_means_and_weights():
    rng = np.random.default_rng(5)
    t = np.arange(0.0, 120.0, 5.0)
    for w in (np.ones(24), rng.uniform(0.1, 9, 24)):
        y = SLOW(t) + 0.1 * rng.normal(size=24)
        found = fit_logistic(t, y, w)
        around = (w * (y - np.average(y, weights=w)) ** 2).sum()
        assert found.r2 == pytest.approx(1 - squares(t, y, w, found) / around, abs=1e-9)
        assert 0 < found.r2 < 1


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -0.7, 1e9 / 3, 1e-9])
def test_r2_of_a_constant_series_is_0(value):
    """Also where rounding leaves something around the mean: without care, 1/3 has an R^2 of 30."""
    t = np.arange(0.0, 40.0, 4.0)
    rng = np.random.default_rng(0)
    for w in (None, np.arange(1.0, 11), *rng.uniform(1, 9, (30, 10))):
        found = fit_logistic(t, np.full(10, value), w)
        assert found.r2 == 0 and found.drop <= 1e-12 * abs(value)
        assert found(t) == pytest.approx(value, rel=1e-12)
    nearly = fit_logistic(t, value + 1e-9 * max(1, abs(value)) * Logistic(1, 0.4, 20, 0)(t))
    assert nearly.r2 > 0.99 and nearly.midpoint == pytest.approx(20, abs=1)


def test_many_at_once_are_as_each_alone():
    rng = np.random.default_rng(6)
    t = np.arange(0.0, 96.0, 4.0)
    y_RX = np.stack([truth(t) + 0.05 * rng.normal(size=24) for truth in TRUTHS * 3])
    w_RX = rng.uniform(0.5, 5, y_RX.shape)
    together = np.stack(curves._search(t, y_RX, w_RX), axis=1)
    alone = [dataclasses.astuple(fit_logistic(t, y, w)) for y, w in zip(y_RX, w_RX, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-9)


def brute_force(t, y, w, rng, starts=25):
    """The least squares within the bounds that scipy finds from many starts."""
    span, width = t[-1] - t[0], np.diff(t).min()
    low = [0, math.log(2 / span), t[0], -INF]
    high = [INF, math.log(8 / width), t[-1], INF]

    def residuals(p):
        return np.sqrt(w) * (Logistic(p[0], math.exp(p[1]), p[2], p[3])(t) - y)

    starts = rng.uniform(
        [0.01, low[1], low[2], y.min() - 0.2], [np.ptp(y), high[1], high[2], y.max()], (starts, 4)
    )
    scale = [0.1, 1, span / 10, 0.1]
    return min(
        2 * optimize.least_squares(residuals, p, bounds=(low, high), x_scale=scale).cost
        for p in starts
    )


@pytest.mark.parametrize(
    ("kind", "worse"),
    [("fall", 1e-6), ("early", 1e-4), ("line", 1e-6), ("rise", 1e-6), ("peak", 1e-4),
     ("two steps", 1e-3), ("sharp", 0.01), ("noise", 1e-3)],
)  # fmt: skip
def test_the_search_is_not_beaten_by_many_starts(kind, worse):
    """Squares above scipy's by no more than rounding, or a little where there are several minima or
    a valley: where the fall is sharper than a bin, t* and eps make up for each other."""
    rng = np.random.default_rng(len(kind))
    t = np.arange(24) * 8 + 3.5
    noise = rng.normal(size=24)
    y = {
        "fall": SLOW(t) + 0.05 * noise,
        "early": Logistic(0.5, 0.05, 10, 0.3)(t) + 0.02 * noise,
        "line": -t / 200 + 0.01 * noise,
        "rise": Logistic(-0.5, 0.05, 90, 0.8)(t) + 0.05 * noise,
        "peak": np.exp(-((t - 90) ** 2) / 800) + 0.01 * noise,
        "two steps": (t < 60) * 0.3 + (t < 130) * 0.5 + 0.02 * noise,
        "sharp": Logistic(0.5, 0.5, 60, 0.3)(t) + 0.02 * noise,
        "noise": noise,
    }[kind]
    w = rng.uniform(1, 10, 24)
    found = fit_logistic(t, y, w)
    left = squares(t, y, w, found)
    assert found.drop >= 0 and t[0] <= found.midpoint <= t[-1]
    assert 2 / (t[-1] - t[0]) * (1 - 1e-9) <= found.slope <= 1 + 1e-9  # 8 / width is 1
    best = brute_force(t, y, w, rng)
    assert left <= best * (1 + worse) + 1e-12
    around = (w * (y - np.average(y, weights=w)) ** 2).sum()
    assert left <= best + 0.005 * around


def test_problems_that_are_not_there_do_not_move_the_fit():
    """Numbers of problems with gaps: draws of none but missing ones are left out, not counted as
    a t* at the start of the range."""
    rng = np.random.default_rng(5)
    values = [SLOW(np.arange(160)) + 0.05 * rng.normal(size=160) for _ in range(8)]
    dense = fit_curve(curve_of(values, np.arange(8) // 2))
    gaps = fit_curve(curve_of(values, 30 * (np.arange(8) // 2)))
    assert gaps.logistic == dense.logistic and dense.located and gaps.located
    assert 0 < np.isnan(gaps.midpoint_R).sum() < 100 and not np.isnan(dense.midpoint_R).any()
    assert gaps.midpoint_interval == pytest.approx(dense.midpoint_interval, abs=2)
    sparse = curve_of(values, 30 * (np.arange(8) // 2))
    assert any(fit_curve(sparse, resamples=1, seed=seed) is None for seed in range(300))


def test_a_step_is_told_from_a_slope():
    values = [np.where(np.arange(160) < 77, 0.9, 0.4)] * 4
    assert fit_curve(curve_of(values, np.arange(4)), resamples=20).step
    assert not fit_curve(noisy(0, SLOW), resamples=20).step


def test_a_fit_between_two_positions_knows_nothing_else():
    """Spoilt ends outside do not matter; whole bins count or do not."""
    rng = np.random.default_rng(8)
    values = [SLOW(np.arange(160)) + 0.05 * rng.normal(size=160) for _ in range(8)]
    spoilt = [np.where((np.arange(160) < 6) | (np.arange(160) >= 138), 5.0, v) for v in values]
    edges = curves.bins(160, width=11, first=6)
    fits = []
    for rows in (values, spoilt):
        parts = np.concatenate(rows), np.tile(np.arange(160), 8), np.repeat(np.arange(8), 160)
        found = curve(*parts, np.arange(8) // 2, edges)
        fits.append(fit_curve(found, between=(6, 138), resamples=50))
        assert fit_curve(found, between=(60, 100)) is None  # four bins
    assert fits[0].record() == fits[1].record()
    assert fits[0].seen == (11, 132) and fits[0].width == 11
    assert abs(fits[0].logistic.midpoint - SLOW.midpoint) < 5


def test_bins_of_a_given_width():
    assert curves.bins(10, width=3).tolist() == [0, 3, 6, 9, 12]
    assert curves.bins(9, width=3).tolist() == [0, 3, 6, 9]
    assert curves.bins(2, width=50).tolist() == [0, 50]
    assert curves.bins(10, width=5, first=2).tolist() == [0, 2, 7, 12]
    assert curves.bins(10, 2, first=4).tolist() == [0, 4, 7, 10]
    assert curves.bins(3, first=50).tolist() == [0, 2, 3]  # the last position has a bin
    with pytest.raises(ValueError, match="first=-1"):
        curves.bins(10, first=-1)
    with pytest.raises(ValueError, match="width=0"):
        curves.bins(10, width=0)


def test_the_fit_of_a_curve_is_that_of_its_means_and_tokens():
    """Bins weighted by their tokens: 40 responses that end one after the other."""
    rng = np.random.default_rng(7)
    values = [SLOW(np.arange(n)) + 0.3 * rng.normal(size=n) for n in range(20, 180, 4)]
    found = curve_of(values, np.arange(40) // 2)
    fit = fit_curve(found, resamples=3)
    used = found.responses_X >= 4
    t, y, w = (z[used] for z in (found.centre_X(), found.mean_X, found.count_X))
    assert len(set(w)) > 10 and 0 < (~used).sum()
    theirs, _ = optimize.curve_fit(
        lambda t, a, s, m, b: a / (1 + np.exp(s * (t - m))) + b, t, y, parameters(SLOW),
        sigma=1 / np.sqrt(w),
    )  # fmt: skip
    np.testing.assert_allclose(parameters(fit.logistic), theirs, rtol=1e-4)
    assert fit.seen == (t[0], t[-1])
    assert fit.fall == pytest.approx(fit.logistic(t[0]) - fit.logistic(t[-1]), rel=1e-12)


def test_every_draw_is_the_fit_of_repeated_problems():
    """Draw by draw, by repeating all responses of the problems drawn."""
    rng = np.random.default_rng(8)
    problem_B = np.repeat(np.arange(8), 3)
    level_P = 0.2 * rng.normal(size=8)
    values = [
        SLOW(np.arange(n)) + level_P[p] + 0.2 * rng.normal(size=n)
        for n, p in zip(rng.integers(120, 161, 24), problem_B, strict=True)
    ]
    found = curve_of(values, problem_B)
    fit = fit_curve(found, resamples=20, seed=5)
    again = []
    for often in curves.resample(8, 20, seed=5):
        rows = np.repeat(np.arange(24), often[problem_B])
        copy_ = curve_of([values[b] for b in rows], np.arange(len(rows)), edges=found.edges_X1)
        used = (found.responses_X >= 2.4) & (copy_.count_X > 0)
        again.append(fit_logistic(found.centre_X()[used], copy_.mean_X[used], copy_.count_X[used]))
    mids = [logistic.midpoint for logistic in again]
    ends = fit.seen
    falls = [logistic(ends[0]) - logistic(ends[1]) for logistic in again]
    np.testing.assert_allclose(fit.midpoint_R, mids, rtol=1e-4)
    np.testing.assert_allclose(fit.fall_R, falls, rtol=1e-4)
    low, high = np.quantile(mids, [0.025, 0.975])
    assert fit.width == 7.0
    assert fit.midpoint_interval == pytest.approx([low - 3.5, high + 3.5], rel=1e-4)
    assert fit.fall_interval == pytest.approx(np.quantile(falls, [0.025, 0.975]), rel=1e-4)
    for name in ("slope", "drop", "floor"):
        draws = [getattr(logistic, name) for logistic in again]
        expected = np.quantile(draws, [0.025, 0.975])
        assert getattr(fit, f"{name}_interval") == pytest.approx(expected, rel=1e-3)


# --- invariances


def test_shift_and_scale_of_values():
    arguments = ragged(9)
    found = curve(*arguments, quartiles=True)
    for scale, shift in ((4.0, 0.0), (1.0, 16.0), (-2.0, 3.0)):
        moved = curve(scale * arguments[0] + shift, *arguments[1:], quartiles=True)
        np.testing.assert_allclose(moved.mean_X, scale * found.mean_X + shift, rtol=1e-9)
        np.testing.assert_allclose(moved.se_X, abs(scale) * found.se_X, rtol=1e-9)
        low, high = (found.low_X, found.high_X) if scale > 0 else (found.high_X, found.low_X)
        np.testing.assert_allclose(moved.low_X, scale * low + shift, rtol=1e-9)
        np.testing.assert_allclose(moved.high_X, scale * high + shift, rtol=1e-9)


@pytest.mark.parametrize("truth", TRUTHS)
def test_shift_and_scale_of_the_fit(truth):
    rng = np.random.default_rng(10)
    t = np.arange(0.0, 160.0, 8.0)
    y, w = truth(t) + 0.03 * truth.drop * rng.normal(size=20), rng.uniform(1, 5, 20)
    base = fit_logistic(t, y, w)
    assert base.r2 < 0.9999
    for scale, shift in ((1.0, 5.0), (3.0, 0.0), (0.01, -7.0), (1e99, 0.0), (1e-100, 0.0)):
        moved = fit_logistic(t, scale * y + shift, w)
        assert moved.drop == pytest.approx(scale * base.drop, rel=1e-5)
        assert moved.floor == pytest.approx(scale * base.floor + shift, rel=1e-5, abs=1e-5 * scale)
        assert (moved.slope, moved.midpoint, moved.r2) == pytest.approx(
            (base.slope, base.midpoint, base.r2), rel=1e-5)  # fmt: skip
    for scale, shift in ((1.0, 1000.0), (1.0, -30.0), (0.001, 0.0), (1e6, 1e7)):
        moved = fit_logistic(scale * t + shift, y, w)
        assert moved.midpoint == pytest.approx(scale * base.midpoint + shift, rel=1e-5)
        assert moved.slope == pytest.approx(base.slope / scale, rel=1e-5)
        assert (moved.drop, moved.floor, moved.r2) == pytest.approx(
            (base.drop, base.floor, base.r2), rel=1e-5, abs=1e-6)  # fmt: skip
    turned = fit_logistic(-t[::-1], -y[::-1], w[::-1])  # upside down and back to front
    assert (turned.drop, turned.slope, turned.midpoint, turned.floor) == pytest.approx(
        (base.drop, base.slope, -base.midpoint, -base.floor - base.drop), rel=1e-5, abs=1e-6
    )


def test_the_order_of_observations_does_not_count():
    value_N, position_N, row_N, problem_B, edges = ragged(11)
    rng = np.random.default_rng(0)
    weight_N = rng.uniform(0, 2, len(value_N))
    order = rng.permutation(len(value_N))
    found, moved = (
        curve(value_N[o], position_N[o], row_N[o], problem_B, edges, denominator_N=weight_N[o],
              quartiles=True)
        for o in (np.arange(len(value_N)), order)
    )  # fmt: skip
    equal(found, moved, rtol=1e-9, atol=1e-12)
    x, y, p = value_N, position_N + value_N, problem_B[row_N]
    assert regression(x, y, p, seed=2) == regression(x[order], y[order], p[order], seed=2)


def test_names_of_responses_and_problems_do_not_count():
    value_N, position_N, row_N, problem_B, edges = ragged(12)
    rng = np.random.default_rng(0)
    found = curve(value_N, position_N, row_N, problem_B, edges)
    order_B, order_P = rng.permutation(len(problem_B)), rng.permutation(problem_B.max() + 1)
    again_B = np.empty_like(problem_B)
    again_B[order_B] = order_P[problem_B]
    moved = curve(value_N, position_N, order_B[row_N], again_B, edges)
    assert not (found.sum_PX == moved.sum_PX).all()
    np.testing.assert_allclose(found.sum_PX, moved.sum_PX[order_P], rtol=1e-9, atol=1e-12)
    for part in (found, moved):
        part.sum_PX = part.weight_PX = np.zeros(0)
    equal(found, moved, rtol=1e-9)
    # Labels in the same order draw the same problems, whatever they are.
    p = problem_B[row_N]
    same = regression(value_N, position_N, p)
    assert regression(value_N, position_N, 7 * p + 3) == same
    assert regression(value_N, position_N, [f"problem {x:03d}" for x in p]) == same
    other = regression(value_N, position_N, order_P[p])
    assert (other["r"], other["slope"]) == (same["r"], same["slope"])
    assert other["r_interval"] == pytest.approx(same["r_interval"], abs=0.05)


def test_the_fit_does_not_see_the_order_of_problems_but_by_its_draws():
    rng = np.random.default_rng(13)
    values = [SLOW(np.arange(160)) + 0.3 * rng.normal() + 0.2 * rng.normal(size=160)
              for _ in range(30)]  # fmt: skip
    problem_B = np.arange(30) // 3
    one = fit_curve(curve_of(values, problem_B))
    two = fit_curve(curve_of(values, 9 - problem_B))
    np.testing.assert_allclose(parameters(one.logistic), parameters(two.logistic), rtol=1e-6)
    assert one.midpoint_interval != two.midpoint_interval
    assert one.midpoint_interval == pytest.approx(two.midpoint_interval, abs=2.0)
    assert one.record() == fit_curve(curve_of(values, problem_B)).record()
    assert one.record() != fit_curve(curve_of(values, problem_B), seed=1).record()
    more = fit_curve(curve_of(values, problem_B), resamples=7)
    assert more.midpoint_R.shape == more.fall_R.shape == (7,) and one.fall_R.shape == (400,)


# --- where it falls


def test_intervals_cover():
    """40 sets of 20 problems with 4 responses each; t* is 80, give or take 14 for every problem, so
    responses to one problem are alike. The interval holds 80 in at least 85% of the sets, even
    without the half bin on either side; with responses taken as independent, in fewer than that."""
    rng = np.random.default_rng(14)
    t = np.arange(160)
    covered, narrow, naive, widths = [], [], [], []
    for _ in range(40):
        mid_B = np.repeat(80 + 14 * rng.normal(size=20), 4)
        values = [rng.random(160) < Logistic(0.6, 0.12, m, 0.2)(t) for m in mid_B]
        fit = fit_curve(curve_of(values, np.arange(80) // 4), resamples=100)
        low, high = fit.midpoint_interval
        covered.append(low <= 80 <= high)
        narrow.append(low + fit.width / 2 <= 80 <= high - fit.width / 2)
        widths.append(high - low - fit.width)
        alone = fit_curve(curve_of(values, np.arange(80)), resamples=100)
        low, high = interval(alone.midpoint_R)
        naive.append(low <= 80 <= high)
        assert fit.located and 0.5 < fit.fall < 0.7 and fit.width == 7
    assert np.mean(covered) >= np.mean(narrow) >= 0.85 > np.mean(naive)
    assert 9 < np.median(widths) < 17  # 2 * 1.96 * 14 / sqrt(20) = 12.3


def test_intervals_of_the_other_parameters_hold_the_truth():
    """Of 20 sets at least 16 each; the means of bins are those of a slightly flatter fall."""
    held = {"slope": 0, "drop": 0, "floor": 0}
    for seed in range(20):
        fit = fit_curve(noisy(seed, SLOW, spread=0.02), resamples=100)
        for name in held:
            low, high = getattr(fit, f"{name}_interval")
            assert low < high
            held[name] += low <= getattr(SLOW, name) <= high
    assert min(held.values()) >= 16, held


@pytest.mark.parametrize("step", [40, 57, 58, 59, 60, 75, 110])
def test_a_clean_step_is_located_within_half_a_bin(step):
    values = [(np.arange(160) < step).astype(float)] * 6
    fit = fit_curve(curve_of(values, [0, 0, 1, 1, 2, 2], 40))
    assert fit.width == 4 and fit.located
    assert abs(fit.logistic.midpoint - (step - 0.5)) <= 2
    low, high = fit.midpoint_interval
    assert low <= step - 0.5 <= high and high - low == pytest.approx(4, rel=1e-4)
    assert fit.fall == pytest.approx(1, abs=5e-3) and fit.logistic.r2 > 0.99


@pytest.mark.parametrize("seed", range(4))
def test_a_flat_curve_is_not_located(seed):
    fit = fit_curve(noisy(seed, Logistic(0.0, 1.0, 0, 0.7)))
    assert not fit.located and fit.fall_interval[0] <= curves.FALL


def test_a_small_fall_is_not_located_however_sure():
    """One of 0.04 is found where it is, but not worth the name; one of 0.06 is."""
    for drop, located in ((0.04, False), (0.06, True)):
        values = [Logistic(drop, 0.2, 80, 0.3)(np.arange(160))] * 4
        fit = fit_curve(curve_of(values, [0, 0, 1, 1]))
        assert fit.logistic.midpoint == pytest.approx(80, abs=1) and fit.located is located


@pytest.mark.parametrize("curvature", [0.5, 1.0, 2.0])
def test_a_rising_curve_has_no_fall(curvature):
    values = [(np.arange(160) / 160) ** curvature] * 4
    fit = fit_curve(curve_of(values, [0, 0, 1, 1]))
    assert fit.logistic.drop == 0 and fit.fall == 0 and not fit.located
    assert fit.logistic.r2 == 0 and fit.logistic.floor == pytest.approx(np.mean(values), rel=1e-3)
    noise = fit_curve(noisy(0, Logistic(-0.5, 0.05, 80, 0.8)))
    assert not noise.located and abs(noise.fall) < curves.FALL


@pytest.mark.parametrize("midpoint", [-40, 200, 220])
def test_a_fall_outside_what_was_seen_is_not_located(midpoint):
    truth = Logistic(0.8, 0.03, midpoint, 0.1)
    found = noisy(3, truth, spread=0.01)
    fit = fit_curve(found)
    assert fit.fall_interval[0] > curves.FALL and not fit.located
    assert fit.seen[0] <= fit.logistic.midpoint <= fit.seen[1]
    inside = fit_curve(noisy(3, dataclasses.replace(truth, midpoint=80), spread=0.01))
    assert inside.located


def ending(short, long):
    """`short` responses of 100 tokens, which fall at 50, and `long` of 200, up again from 100 on,
    in bins of 10."""
    t = np.arange(200)
    whole = np.where(t < 100, Logistic(0.6, 0.2, 50, 0.2)(t), 5.0)
    values = [whole[:100]] * short + [whole] * long
    return curve_of(values, np.arange(short + long) % 3, 20), whole


@pytest.mark.parametrize(("short", "long", "counts"), [
    (27, 3, True), (28, 3, False), (18, 2, True), (19, 2, False), (5, 1, False), (5, 2, True),
])  # fmt: skip
def test_a_tail_of_few_responses_is_left_out(short, long, counts):
    """A bin counts with a tenth of the responses and with two of them at least."""
    found, whole = ending(short, long)
    fit = fit_curve(found, resamples=20)
    assert fit.width == 10 and fit.seen == (4.5, 194.5 if counts else 94.5)
    alone = fit_curve(curve_of([whole[:100]] * 4, [0, 1, 2, 2], 10), resamples=20)
    if not counts:
        assert parameters(fit.logistic) == pytest.approx(parameters(alone.logistic), rel=1e-6)
    assert fit.located is not counts


def test_what_comes_after_a_gap_is_left_out():
    found = noisy(0, SLOW, most=20)
    whole = fit_curve(found, resamples=2)
    assert whole.seen == (3.5, 155.5)
    found.responses_X[12] = 5  # of 60
    assert fit_curve(found, resamples=2).seen == (3.5, 11 * 8 + 3.5)
    found.responses_X[12], found.responses_X[4] = 6, 5
    assert fit_curve(found, resamples=2) is None


def test_too_little_to_fit():
    values = [SLOW(np.arange(160))] * 4
    assert fit_curve(curve_of(values, [0, 0, 0, 0])) is None
    assert fit_curve(curve_of(values, [0, 0, 0, 1])) is not None
    assert fit_curve(curve_of(values, [0, 0, 1, 1], 4)) is None
    assert fit_curve(curve_of(values, [0, 0, 1, 1], 5)) is not None
    # Up to where there is weight; and a problem without any is none.
    weight_N = np.tile(np.arange(160) < 84, 4)
    found = curve_of(values, [0, 0, 1, 1], denominator_N=weight_N)
    assert fit_curve(found, resamples=2).seen == (3.0, 80.0)
    weight_N = np.repeat([1.0, 0.0], 320)
    assert fit_curve(curve_of(values, [0, 0, 1, 1], denominator_N=weight_N)) is None
    assert fit_curve(curve([], [], [], [], curves.bins(50))) is None
    assert fit_curve(curve([], [], [], [0, 1], curves.bins(50))) is None


# --- records


def strict(record):
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
    return record


def test_records_are_json():
    arguments = ragged(15)
    record = strict(curve(*arguments, quartiles=True).record())
    assert list(record) == ["from", "to", "mean", "se", "quartile_low", "quartile_high", "count",
                            "responses", "problems"]  # fmt: skip
    assert {len(column) for column in record.values()} == {6}
    assert record["from"][1:] == record["to"][:-1] and None not in record["quartile_low"]
    empty = strict(curve([], [], [], [], curves.bins(3)).record())
    assert empty["mean"] == empty["se"] == empty["quartile_low"] == [None] * 3
    assert empty["count"] == empty["responses"] == empty["problems"] == [0] * 3
    strict(mean_of([1.0, NAN], [0, 1]))
    strict(regression([1.0], [2.0], [0]))
    for found in (noisy(0, SLOW), noisy(0, Logistic(0, 1, 0, 0.5))):
        fit = fit_curve(found, resamples=30)
        record = strict(fit.record())
        assert set(record) == {
            "drop", "slope", "midpoint", "floor", "r2", "midpoint_interval", "slope_interval",
            "drop_interval", "floor_interval", "fall", "fall_interval", "located", "seen", "width",
            "step",
        }  # fmt: skip
        assert record["midpoint"] == plain(fit.logistic.midpoint)
        assert record["located"] is fit.located and record["seen"] == list(fit.seen)
    fit.logistic.r2 = NAN
    assert strict(fit.record())["r2"] is None


# --- hostile input

REFUSED = ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError
GOOD = {"value_N": [1.0, 2.0], "position_N": [0, 1], "row_N": [0, 1], "problem_B": [0, 1],
        "edges_X1": [0, 1, 2], "denominator_N": [1.0, 1.0]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("value_N", [1.0]), ("value_N", [[1.0, 2.0]]), ("value_N", 1.0), ("position_N", [0]),
     ("position_N", [[0, 1]]), ("row_N", [0]), ("row_N", [0, -1]), ("row_N", [0, 2]),
     ("row_N", [0.0, 1.0]), ("problem_B", [0, -1]), ("problem_B", [0.0, 1.0]),
     ("problem_B", [[0, 1]]), ("problem_B", [0]), ("problem_B", []), ("problem_B", ["a", "b"]),
     ("edges_X1", []), ("edges_X1", 3), ("edges_X1", [0, 0]), ("edges_X1", [2, 1, 0]),
     ("edges_X1", [0, NAN]), ("edges_X1", [[0, 1]]), ("denominator_N", [1.0]),
     ("denominator_N", 1.0), ("denominator_N", [1.0, -1e-9]), ("denominator_N", [1.0, NAN]),
     ("denominator_N", [1.0, INF])],
)  # fmt: skip
def test_bad_arguments_of_curve(name, value):
    assert curve(**GOOD).mean_X.tolist() == [1.0, 2.0]
    with pytest.raises(REFUSED):
        curve(**GOOD | {name: value})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stays_visible(value):
    record = curve(**GOOD | {"value_N": [1.0, value]}).record()
    assert record["mean"] == [1.0, None] == record["mean"] and record["count"] == [1, 1]
    if value == value:  # nan is what a mean leaves out
        assert mean_of([1.0, value], [0, 1])["mean"] is None


@pytest.mark.parametrize(
    ("length", "most"), [(0, 4), (-3, 4), (9, 0), (9, -2), (9, NAN), (9, None), (INF, 4)]
)
def test_bad_arguments_of_bins(length, most):
    with pytest.raises(REFUSED):
        curves.bins(length, most)


@pytest.mark.parametrize("arguments", [
    {"value_B": [1.0, 2.0, 3.0]}, {"value_B": [1.0]}, {"value_B": 1.0},
    {"value_B": [[1.0, 2.0]]}, {"problem_B": [0, 1, 2]}, {"problem_B": [0, -1]},
    {"problem_B": [0.5, 1.0]}, {"denominator_B": [1.0]}, {"denominator_B": 2.0},
    {"denominator_B": [1.0, 2.0, 3.0]}, {"denominator_B": [1, -1]}, {"denominator_B": [1, INF]},
    {"denominator_B": [1, NAN]},
])  # fmt: skip
def test_bad_arguments_of_mean(arguments):
    with pytest.raises(REFUSED):
        mean_of(**{"value_B": [1.0, 2.0], "problem_B": [0, 1]} | arguments)


@pytest.mark.parametrize(("x", "y", "problem"), [
    ([1.0], [1.0, 2.0], [0, 1]), ([1.0, 2.0], [1.0], [0, 1]), ([1.0, 2.0], [1.0, 2.0], [0]),
    (1.0, 1.0, 0), ([[1.0]], [[1.0]], [[0]]),
])  # fmt: skip
def test_bad_arguments_of_regression(x, y, problem):
    with pytest.raises(REFUSED):
        regression(x, y, problem)


@pytest.mark.parametrize("y", [NAN, INF, -1e300])
def test_no_regression_on_what_is_not_finite_or_too_large_to_square(y):
    with np.errstate(all="ignore"):
        found = regression([1.0, 2.0, 4.0], [1.0, y, 0.0], [0, 1, 1])
    assert found["r"] is found["slope"] is None or y == -1e300 and found["r"] is None


@pytest.mark.parametrize("bad", [2.5, NAN, "3", -1])
def test_whole_numbers_of_resample(bad):
    for name in ("problems", "resamples", "seed"):
        with pytest.raises(REFUSED):
            curves.resample(**({"problems": 3} | {name: bad}))
    with pytest.raises(REFUSED):
        curves.resample(0)


def test_without_resamples_there_are_no_intervals():
    assert curves.resample(4, 0).shape == (0, 4)
    found = regression([1.0, 2.0], [1.0, 3.0], [0, 1], resamples=0)
    assert found["slope"] == 2 and found["slope_interval"] == [None, None]
    assert fit_curve(noisy(0, SLOW), resamples=0) is None


T5 = [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("t", "y", "w"), [
    (T5[:4], T5[:4], None), ([], [], None), (1.0, 1.0, None), (T5, T5[:4], None), (T5, [1.0], None),
    (T5, T5, [1.0] * 4), ([T5], [T5], None), ([0, 1, 2, 3, NAN], T5, None),
    ([0, 1, 2, 3, INF], T5, None), (T5, [0, 1, 2, 3, INF], None), (T5, [0, 1, NAN, 3, 4], None),
    (T5, T5, [1, 1, 1, 1, NAN]), (T5, T5, [1, 1, 1, 1, INF]), (T5, T5, [1, 1, 1, 1, 0]),
    (T5, T5, [1, 1, 1, 1, -1]), (T5[::-1], T5, None), ([0, 1, 1, 2, 3], T5, None),
])  # fmt: skip
def test_bad_arguments_of_fit_logistic(t, y, w):
    with pytest.raises(REFUSED):
        fit_logistic(t, y, w)


def test_arguments_stay_as_they_were():
    rng = np.random.default_rng(0)
    value_N, position_N, row_N, problem_B, edges = ragged(16)
    for array in (value_N, position_N, row_N, problem_B, edges):
        array.flags.writeable = False
    weight_N = rng.uniform(0, 1, len(value_N))
    weight_N.flags.writeable = False
    curve(value_N, position_N, row_N, problem_B, edges, denominator_N=weight_N, quartiles=True)
    regression(value_N, weight_N, row_N, resamples=3)
    interval(value_N)
    plain(value_N)
    value_B = np.where(problem_B > 3, 1.0, NAN)
    value_B.flags.writeable = False
    mean_of(value_B, problem_B, denominator_B=np.abs(value_B))
    t, y, w = np.arange(20.0), rng.normal(size=20), rng.uniform(1, 2, 20)
    for array in (t, y, w):
        array.flags.writeable = False
    fit_logistic(t, y, w)
    found = noisy(1, SLOW)
    before = copy.deepcopy(found)
    fit = fit_curve(found, resamples=3)
    record = fit.record()
    found.record()
    equal(found, before, rtol=0)
    assert fit.record() == record


def test_huge_and_tiny_numbers():
    rng = np.random.default_rng(0)
    x, y, p = rng.normal(size=30), rng.normal(size=30), np.arange(30) // 3
    y = y + x
    base = regression(x, y, p)
    for scale in (1e-100, 1e-80, 1e80, 1e99):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = regression(scale * x, scale * y, p)
            assert found == base, scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (1e300, 1e-300, 5e-324, -1e300):
            found = curve([value] * 4, [0, 0, 1, 1], [0, 1, 0, 1], [0, 1], curves.bins(2))
            assert found.mean_X.tolist() == [value, value] and found.se_X.tolist() == [0, 0]
        far = curve([1.0], [2**60], [0], [0], [0, 2**59, 2**61])
        assert far.count_X.tolist() == [0, 1]
    assert fit_logistic(1e90 * np.arange(9.0), SLOW(20 * np.arange(9.0))).midpoint == (
        pytest.approx(4e90, rel=1e-4))  # fmt: skip
    with pytest.raises(ValueError, match="value_X"):
        fit_logistic(np.arange(9.0), -1e300 * np.ones(9))


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve([], [], [], [], curves.bins(1), quartiles=True).record()
        curve([1.0], [0], [0], [3], curves.bins(2), denominator_N=[0.0], quartiles=True).record()
        mean_of([], [])
        mean_of([NAN, NAN], [0, 1])
        regression([0.1] * 3, [0.2] * 3, [0, 1, 1])
        fit_logistic(np.arange(5), np.ones(5))
        fit_logistic(np.arange(5), [1, 1, 0, 0, 0])
        # Weighed on the first problem alone from token 80 on: some draws have none of it.
        weight_N = np.r_[np.ones(160), np.where(np.arange(160) < 80, 1, 0)]
        values = [SLOW(np.arange(160))] * 2
        found = curve_of(values, [0, 1], denominator_N=weight_N)
        fit = fit_curve(found, resamples=50)
        assert np.isfinite(fit.midpoint_R).all() and np.isfinite(fit.fall_R).all()
