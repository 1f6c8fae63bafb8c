"""Properties of the public names of curves."""

import math

import numpy as np
from hypothesis import strategies as st
from properties import BAD_NUMBERS, INF, NAN, any_float, finite, prop, same, seeds, strict

from diagnose import curves


def refused_or(function, arguments):
    """The result, or None after any exception; arguments stay as they are."""
    before = {k: np.copy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    try:
        with np.errstate(all="ignore"):
            out = function(**arguments)
    except (ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError):
        out = None
    assert all(same(before[k], v) for k, v in arguments.items()), "an argument was changed"
    return out


@prop("diagnose.bins", examples=200, length=st.integers(-2, 3000) | st.sampled_from([INF, NAN]),
      most=st.integers(-1, 99) | st.sampled_from([*BAD_NUMBERS, True, None, np.uint8(200)]))
def test_bins_are_of_equal_width_and_hold_every_position(length, most):
    edges = refused_or(curves.bins, {"length": length, "most": most})
    if edges is not None:
        assert edges[0] == 0 and len(set(np.diff(edges))) == 1
        assert edges[-2] < length <= edges[-1] and len(edges) - 1 <= most


@prop("diagnose.plain", "diagnose.interval", examples=150, values=st.lists(any_float, max_size=8))
def test_numbers_become_json_and_intervals_lie_within_them(values):
    record = strict(curves.plain(np.array(values, dtype=float)))
    assert record == [curves.plain(x) for x in values]
    for x, y in zip(values, record, strict=True):
        assert y is None if not math.isfinite(x) else math.isclose(x, y, rel_tol=1e-5, abs_tol=0)
    small = [x / 4 for x in values]  # a difference of the largest would be infinite
    low, high = strict(refused_or(curves.interval, {"draws_R": np.array(small, dtype=float)}))
    there = [curves.plain(x) for x in small if math.isfinite(x)]
    assert low is high is None if not there else min(there) <= low <= high <= max(there)


@st.composite
def observed(draw):
    """Arguments of `curves.curve`: up to 40 observations of up to 5 responses to 4 problems."""
    B, N = draw(st.integers(1, 5)), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(seeds))
    return {
        "value_N": rng.normal(size=N).round(2), "position_N": rng.integers(-1, 14, N),
        "row_N": rng.integers(0, B, N), "problem_B": rng.integers(0, 4, B),
        "edges_X1": np.array(draw(st.sampled_from([[0, 1], [0, 4, 8, 12], [2, 3, 11], [20, 30]]))),
        "denominator_N": draw(st.sampled_from([None, rng.integers(0, 3, N)])),
        "quartiles": draw(st.booleans()),
    }


@prop("diagnose.curve", "diagnose.Curve", examples=150, arguments=observed(), data=st.data())
def test_a_curve_counts_every_observation_inside_once(arguments, data):
    if spoil := data.draw(st.sampled_from([None, None, *sorted(set(arguments) - {"quartiles"})])):
        bad = [3, NAN, [NAN], [-1, 2], [[0, 1]], [INF] * len(arguments["value_N"])]
        arguments |= {spoil: data.draw(st.sampled_from(bad))}
    found = refused_or(curves.curve, arguments)
    if found is None:
        return
    at, edges = np.asarray(arguments["position_N"]), np.asarray(arguments["edges_X1"])
    assert found.count_X.sum() == ((at >= edges[0]) & (at < edges[-1])).sum()
    assert (found.problems_X <= found.responses_X).all()
    assert (found.responses_X <= found.count_X).all()
    centre_X = found.centre_X()
    assert (edges[:-1] <= centre_X).all() and (centre_X <= edges[1:] - 1).all()
    some_X = found.weight_PX.sum(axis=0) > 0
    inside = np.asarray(arguments["value_N"])
    record = strict(found.record())
    if not np.isfinite(inside).all():
        return
    assert (np.isfinite(found.mean_X) == some_X).all()
    assert (np.isfinite(found.se_X) == ((found.weight_PX > 0).sum(axis=0) > 1)).all()
    assert not (found.se_X < 0).any()
    if arguments["denominator_N"] is None and some_X.any():
        assert inside.min() - 1e-9 <= found.mean_X[some_X].min()
        assert found.mean_X[some_X].max() <= inside.max() + 1e-9
    assert [x is not None for x in record["mean"]] == some_X.tolist()


@prop("diagnose.mean", examples=120, values=st.lists(st.integers(-5, 5) | st.just(NAN), max_size=9),
      data=st.data(), weighted=st.booleans())
def test_a_mean_is_a_curve_of_one_bin_without_nan(values, data, weighted):
    B = len(values) + data.draw(st.sampled_from([0, 0, 0, 1]))
    problem = np.array(data.draw(st.lists(st.integers(-1 if B > 6 else 0, 3), min_size=B,
                                          max_size=B)), dtype=int)  # fmt: skip
    weight = np.array(data.draw(st.lists(st.integers(0, 2), min_size=B, max_size=B)), dtype=float)
    found = refused_or(curves.mean, {"value_B": np.array(values, dtype=float), "problem_B": problem,
                                     "denominator_B": weight if weighted else None})  # fmt: skip
    if found is None:
        assert B > len(values) or problem.min() < 0
        return
    strict(found)
    there = [b for b, v in enumerate(values) if not math.isnan(v)]
    total = sum(weight[b] if weighted else 1 for b in there)
    assert found["count"] == len(there) and found["problems"] == len({problem[b] for b in there})
    assert found["mean"] == (curves.plain(sum(values[b] for b in there) / total) if total else None)


@prop("diagnose.resample", examples=80, problems=st.integers(-1, 40), resamples=st.integers(-1, 30),
      seed=seeds)
def test_every_resample_draws_as_many_problems_as_there_are(problems, resamples, seed):
    found = refused_or(curves.resample, {"problems": problems, "resamples": resamples,
                                         "seed": seed})  # fmt: skip
    assert (found is None) == (problems < 1 or resamples < 0)
    if found is not None:
        assert found.shape == (resamples, problems) and (found >= 0).all()
        assert (found.sum(axis=1) == problems).all()
        assert (curves.resample(problems, resamples, seed=seed) == found).all()


@prop("diagnose.regression", examples=120, n=st.integers(0, 12), seed=seeds,
      slope=st.sampled_from([0.0, 1.0, -3.0, 0.25, 1e6]), spoil=st.sampled_from([None] * 4 + [
          ("x_N", NAN), ("y_N", INF), ("y_N", [1.0]), ("problem_N", 3), ("x_N", [[1.0]])]))
def test_regression_finds_a_line_and_r_is_symmetric(n, seed, slope, spoil):
    rng = np.random.default_rng(seed)
    x, problem = rng.integers(-9, 10, n) / 4, rng.integers(0, 5, n)
    arguments = {"x_N": x, "y_N": slope * x + 7, "problem_N": problem}
    if spoil:
        arguments[spoil[0]] = spoil[1]
    found = refused_or(curves.regression, arguments)
    if found is None or spoil:
        assert spoil and (found is None or n < 2 or found["r"] is None)
        return
    strict(found)
    assert (found["count"], found["problems"]) == (n, len(set(problem.tolist())))
    varies = len(set(x.tolist())) > 1
    assert found["slope"] == (slope if varies else None)
    assert found["r"] == (np.sign(slope) if varies and slope else None)
    y = rng.normal(size=n)
    one, two = (curves.regression(*z, problem, resamples=9) for z in ((x, y), (y, x)))
    assert one["r"] == two["r"] and one["r_interval"] == two["r_interval"]
    assert one["r"] is None or -1 <= one["r"] <= 1


@prop("diagnose.Logistic", "diagnose.fit_logistic", examples=100, X=st.integers(5, 30), seed=seeds,
      noise=st.sampled_from([0.0, 0.1, 1.0]), step=st.sampled_from([0.5, 1.0, 100.0]),
      spoil=st.sampled_from([None] * 4 + ["position_X", "value_X", "weight_X"]), data=st.data())
def test_a_fit_lies_within_its_bounds_and_is_no_worse_than_the_truth(
    X, seed, noise, step, spoil, data
):
    rng = np.random.default_rng(seed)
    t, w = step * np.arange(X), rng.uniform(0.5, 2, X)
    truth = curves.Logistic(rng.uniform(0, 2), rng.uniform(0.2, 2) / step, t[X // 2], -rng.random())
    falling = truth(t)
    assert (np.diff(falling) <= 0).all() and falling[0] <= truth.drop + truth.floor
    assert math.isclose(truth(truth.midpoint), truth.drop / 2 + truth.floor, abs_tol=1e-12)
    arguments = {"position_X": t, "value_X": falling + noise * rng.normal(size=X), "weight_X": w}
    if spoil:
        bad = data.draw(st.sampled_from([*BAD_NUMBERS, w[:-1], w[None], w * NAN, w[::-1] - 9, []]))
        arguments[spoil] = bad
    found = refused_or(curves.fit_logistic, arguments)
    if found is None or spoil:
        return
    assert finite(*vars(found).values()) and found.drop >= 0 and t[0] <= found.midpoint <= t[-1]
    assert 2 / (t[-1] - t[0]) <= found.slope * (1 + 1e-9) <= 8.1 / step
    assert -1e-9 <= found.r2 <= 1 + 1e-9
    y = arguments["value_X"]
    left, best = ((w * (y - f(t)) ** 2).sum() for f in (found, truth))
    if truth.slope * (t[-1] - t[0]) >= 2:  # within the bounds, up to the last step of the search
        assert left <= best * 1.02 + 1e-6


@prop("diagnose.fit_curve", "diagnose.Fit", examples=40, P=st.integers(1, 5), X=st.integers(3, 9),
      drop=st.sampled_from([-0.5, 0.0, 0.5]), seed=seeds, noise=st.sampled_from([0.0, 0.3]))
def test_a_fit_of_a_curve_has_ordered_intervals_around_what_was_seen(P, X, drop, seed, noise):
    rng = np.random.default_rng(seed)
    T, B = 4 * X, 2 * P
    row_N, position_N = np.divmod(np.arange(B * T), T)
    value_N = curves.Logistic(drop, 0.5, 2 * X, 0.2)(position_N) + noise * rng.normal(size=B * T)
    found = curves.curve(value_N, position_N, row_N, np.arange(B) // 2, curves.bins(T, X))
    fit = curves.fit_curve(found, resamples=11, seed=seed)
    assert (fit is None) == (P < 2 or X < 5)
    if fit is None:
        return
    record = strict(fit.record())
    pairs = {name: value for name, value in record.items() if isinstance(value, list)}
    assert len(pairs) == 6 and all(low <= high for low, high in pairs.values())
    assert fit.seen == (1.5, T - 2.5) and fit.width == 4
    assert fit.midpoint_R.shape == fit.fall_R.shape == (11,)
    assert (fit.seen[0] <= fit.midpoint_R).all() and (fit.midpoint_R <= fit.seen[1]).all()
    low, high = record["midpoint_interval"]
    assert fit.seen[0] - 2 <= low <= high - 4 * (1 - 1e-4) and high <= fit.seen[1] + 2
    if not noise:
        assert fit.located == (drop > 0) and (drop > 0 or record["drop"] < 1e-12)
