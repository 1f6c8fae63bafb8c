"""A quantity along the responses: means with standard errors, and the logistic of its fall.

The logistic is that of "Your Teacher Can't Help You Here" (arXiv 2605.30833, the section on
supervision fidelity), there fitted to the teacher's mean fidelity by position in the response:

    F(t) = A / (1 + exp(eps (t - t*))) + b

    paper   here       meaning
    A       drop       how far it falls in all
    eps     slope      how steeply, per token (the paper: per 1000 tokens)
    t*      midpoint   where half of the fall is done, tokens
    b       floor      what is left

Tokens of one response resemble each other, and so do responses to one problem. Problems are the
independent draws, so all errors are over problems: linearised for a mean (a ratio of two sums), by
the bootstrap for everything else.

Where the paper is silent: docs/decisions.md, 27. Needs numpy only. Letters: N observations,
B responses, P problems, X bins, R resamples, G points of a grid.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of every interval
MOST_BINS = 24  # of a curve, unless a width is given
RUNNING = 0.1  # a bin counts for the fit if this share of the responses reaches it
FALL = 0.05  # the smallest fall of a probability that counts as one
STEEPEST = 8.0  # largest slope times the width of a bin; steeper falls look like steps anyway
EXPLAINED = 0.5  # the smallest R^2 at which the logistic counts as a description of the curve


# ---------------------------------------------------------------------------- means with errors
@dataclass
class Curve:
    """Means of a quantity in bins of positions."""

    edges_X1: np.ndarray  # bin x holds positions edges[x] <= t < edges[x + 1]
    mean_X: np.ndarray  # sum of the quantity over sum of its denominator; nan in an empty bin
    se_X: np.ndarray  # over problems; nan where fewer than two problems have observations
    low_X: np.ndarray  # quartiles of the observations; nan where they were not asked for
    high_X: np.ndarray
    count_X: np.ndarray  # numbers of observations, of their responses, of their problems
    responses_X: np.ndarray
    problems_X: np.ndarray
    sum_PX: np.ndarray  # numerator and denominator by problem, from which bootstraps are made
    weight_PX: np.ndarray

    def centre_X(self) -> np.ndarray:
        """The middle of every bin: of bin [0, 4), 1.5."""
        return (self.edges_X1[:-1] + self.edges_X1[1:] - 1) / 2

    def record(self) -> dict:
        """Plain data for JSON, 6 significant digits; None for what is undefined."""
        return {
            "from": self.edges_X1[:-1].tolist(), "to": self.edges_X1[1:].tolist(),
            "mean": plain(self.mean_X), "se": plain(self.se_X),
            "quartile_low": plain(self.low_X), "quartile_high": plain(self.high_X),
            "count": self.count_X.tolist(), "responses": self.responses_X.tolist(),
            "problems": self.problems_X.tolist(),
        }  # fmt: skip


def plain(value):
    """A number or array for JSON: 6 significant digits, None for what is not finite.

    >>> plain(np.array([1 / 3, np.nan])), plain(2.0)
    ([0.333333, None], 2.0)
    """
    if isinstance(value, np.ndarray):
        return [plain(x) for x in value.tolist()]
    return float(f"{value:.6g}") if math.isfinite(value) else None


def bins(length: int, most=MOST_BINS, *, width: int | None = None, first=0) -> np.ndarray:
    """Edges of bins of one whole width that hold positions 0..length-1: of width `width`, or as
    narrow as at most `most` bins allow. Positions before `first` are a bin of their own.

    >>> bins(10, 4), bins(10, width=5), bins(10, width=5, first=2)
    (array([ 0,  3,  6,  9, 12]), array([ 0,  5, 10]), array([ 0,  2,  7, 12]))
    """
    length, first = int(length), min(int(first), int(length) - 1)
    width = -(-(length - first) // int(most)) if width is None else int(width)
    if width < 1 or first < 0:
        raise ValueError(f"need width >= 1, first >= 0, got {length=}, {width=}, {first=}")
    edges = first + np.arange(0, -(-(length - first) // width) + 1) * width
    return np.concatenate([[0], edges]) if first else edges


def curve(
    value_N, position_N, row_N, problem_B, edges_X1, *, denominator_N=None, quartiles=False
) -> Curve:
    """Mean of a quantity in every bin: sum of values over sum of denominators.

    value_N: the observations. position_N: where in its response each was made. row_N: which
        response that is. problem_B: the problem of every response. All count from 0.
    edges_X1: from `bins`; observations outside are left out.
    denominator_N: numbers >= 0; default 1, which makes it a mean of observations. A problem counts
        for the error if it has any weight, for problems_X if it has observations.

    >>> c = curve([1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1], bins(2))
    >>> c.mean_X.tolist(), c.se_X.tolist()
    ([0.5, 0.5], [0.5, 0.5])
    """
    value_N, position_N = np.asarray(value_N, dtype=np.float64), np.asarray(position_N)
    edges_X1 = np.asarray(edges_X1)
    row_N, problem_B = (np.asarray(z) if len(z) else np.zeros(0, int) for z in (row_N, problem_B))
    weight_N = np.ones(len(value_N)) if denominator_N is None else np.asarray(denominator_N)
    if not (np.diff(edges_X1) > 0).all():
        raise ValueError(f"edges_X1 must grow, got {edges_X1!r:.200}")
    if not ((weight_N >= 0) & (weight_N < math.inf)).all():
        raise ValueError(f"denominator_N must be finite and >= 0, got {weight_N!r:.200}")
    if problem_B.ndim != 1 or (problem_B < 0).any():
        raise ValueError(f"problem_B must be 1-D and >= 0, got {problem_B!r:.200}")
    X, B = len(edges_X1) - 1, len(problem_B)
    bin_N = np.searchsorted(edges_X1, position_N, side="right") - 1
    inside_N = (bin_N >= 0) & (bin_N < X)
    value_N, weight_N, bin_N, row_N = (z[inside_N] for z in (value_N, weight_N, bin_N, row_N))
    P = int(problem_B.max()) + 1 if B else 0
    sum_PX, weight_PX, count_PX = np.zeros((P, X)), np.zeros((P, X)), np.zeros((P, X), int)
    for of_PX, of_N in ((sum_PX, value_N), (weight_PX, weight_N), (count_PX, None)):
        of_BX = np.bincount(row_N * X + bin_N, of_N, B * X).reshape(B, X)
        np.add.at(of_PX, problem_B, of_BX)
    mean_X, se_X = _ratio(sum_PX, weight_PX)
    low_X, high_X = np.full(X, math.nan), np.full(X, math.nan)
    if quartiles:
        ends_X = np.cumsum(np.bincount(bin_N, minlength=X))
        by_bin_N = value_N[np.argsort(bin_N, kind="stable")]
        for x, part in enumerate(np.split(by_bin_N, ends_X[:-1])):
            if part.size:
                low_X[x], high_X[x] = np.quantile(part, [0.25, 0.75])
    return Curve(
        edges_X1, mean_X, se_X, low_X, high_X, count_PX.sum(axis=0), (of_BX > 0).sum(axis=0),
        (count_PX > 0).sum(axis=0), sum_PX, weight_PX,
    )  # fmt: skip


def _ratio(sum_PX, weight_PX):
    """Sum over sum in every column, and its standard error over the rows with any weight:
    sqrt(P / (P - 1) sum_p (sum_p - mean weight_p)^2) / sum weight."""
    total_X, P_X = weight_PX.sum(axis=0), (weight_PX > 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_X = sum_PX.sum(axis=0) / total_X
        error_PX = sum_PX - mean_X * weight_PX
        se_X = np.sqrt(P_X / (P_X - 1) * (error_PX**2).sum(axis=0)) / total_X
    return mean_X, np.where(P_X > 1, se_X, math.nan)


def mean(value_B, problem_B, *, denominator_B=None) -> dict:
    """{"mean", "se", "count", "problems"} of one number per response, as in one bin of `curve`.
    Responses whose number is nan are left out. Raises ValueError for lengths that differ.

    >>> mean([1.0, 0.0, np.nan], [0, 1, 1])
    {'mean': 0.5, 'se': 0.5, 'count': 2, 'problems': 2}
    """
    value_B = np.asarray(value_B, dtype=np.float64)
    if len(value_B) != len(problem_B):
        raise ValueError(f"value_B and problem_B have lengths {len(value_B)} and {len(problem_B)}")
    known_B = ~np.isnan(value_B)
    row_N = np.flatnonzero(known_B)
    weight_N = None if denominator_B is None else np.asarray(denominator_B)[known_B]
    one = curve(value_B[row_N], 0 * row_N, row_N, problem_B, [0, 1], denominator_N=weight_N)
    return {"mean": plain(one.mean_X[0]), "se": plain(one.se_X[0]),
            "count": int(one.count_X[0]), "problems": int(one.problems_X[0])}  # fmt: skip


def resample(problems: int, resamples: int = 400, seed: int = 0) -> np.ndarray:
    """How often every problem is drawn in every resample, int64 [R, P]. The same for the same
    arguments, so two students on the same problems are compared on the same resamples."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(problems, np.full(problems, 1 / problems), size=resamples)


def interval(draws_R) -> list:
    """[low, high] that hold LEVEL of the draws; nan ones are left out, [None, None] without any."""
    draws_R = np.asarray(draws_R, dtype=np.float64)
    draws_R = draws_R[np.isfinite(draws_R)]
    if not draws_R.size:
        return [None, None]
    return plain(np.quantile(draws_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))


def regression(x_N, y_N, problem_N, **resampling) -> dict:
    """Pearson's r of x and y and the slope of y on x, least squares, with bootstrap intervals over
    problems (arguments of `resample`): {"r", "r_interval", "slope", "slope_interval", "count",
    "problems"}. None where x or y do not vary.

    >>> line = regression([0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 5.0, 7.0], [0, 0, 1, 1])
    >>> line["r"], line["slope"]
    (1.0, 2.0)
    """
    x_N, y_N = (np.asarray(z, dtype=np.float64) for z in (x_N, y_N))
    if not len(x_N):
        names = "r", "r_interval", "slope", "slope_interval"
        return dict.fromkeys(names) | {"count": 0, "problems": 0}
    _, problem_N = np.unique(problem_N, return_inverse=True)
    P = int(problem_N.max()) + 1
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()  # sums of squares then lose no digits
    moments = np.ones_like(x_N), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N
    moments_P6 = np.stack([np.bincount(problem_N, of_N, P) for of_N in moments], axis=1)
    draws_RP = np.concatenate([np.ones((1, P)), resample(P, **resampling)])
    n, x, y, xx, yy, xy = (draws_RP @ moments_P6).T
    xx, yy, xy = xx - x * x / n, yy - y * y / n, xy - x * y / n
    noise = 1e-12 * moments_P6.sum(axis=0)  # of sums; what varies less does not vary
    with np.errstate(divide="ignore", invalid="ignore"):
        r_R = np.where((xx > noise[3]) & (yy > noise[4]), xy / np.sqrt(xx) / np.sqrt(yy), math.nan)
        slope_R = np.where(xx > noise[3], xy / xx, math.nan)
    return {
        "r": plain(r_R[0]), "r_interval": interval(r_R[1:]),
        "slope": plain(slope_R[0]), "slope_interval": interval(slope_R[1:]),
        "count": len(x_N), "problems": P,
    }  # fmt: skip


# ---------------------------------------------------------------------------------- the logistic
@dataclass
class Logistic:
    """F(t) = drop / (1 + exp(slope (t - midpoint))) + floor, and how well it fits."""

    drop: float
    slope: float
    midpoint: float
    floor: float
    r2: float = math.nan  # 1 - weighted squares left / around the mean; 0 for a constant series

    def __call__(self, t):
        """Its value at t, a number or an array."""
        return self.drop * _falling(self.slope * (t - self.midpoint)) + self.floor


def _falling(x):
    """1 / (1 + exp(x)), without overflow."""
    return 0.5 - 0.5 * np.tanh(x / 2)


def fit_logistic(position_X, value_X, weight_X=None) -> Logistic:
    """The four-parameter logistic of least squares. Raises ValueError unless there are at least
    five growing positions, as many values whose weighted squares are finite, and weights > 0.

    >>> t = np.arange(0.0, 160.0, 4.0)
    >>> fit = fit_logistic(t, Logistic(0.5, 0.2, 70.0, 0.4)(t))
    >>> [round(x, 3) for x in dataclasses.astuple(fit)]
    [0.5, 0.2, 70.0, 0.4, 1.0]
    """
    t_X, y_X = (np.asarray(z, dtype=np.float64) for z in (position_X, value_X))
    w_X = np.ones_like(t_X) if weight_X is None else np.asarray(weight_X, dtype=np.float64)
    if len(t_X) < 5 or not t_X.shape == y_X.shape == w_X.shape:
        shapes = t_X.shape, y_X.shape, w_X.shape
        raise ValueError(f"position_X, value_X, weight_X must be of one length >= 5, not {shapes}")
    with np.errstate(over="ignore", invalid="ignore"):
        fine = (w_X > 0).all() and np.isfinite(w_X * y_X**2).all() and (np.diff(t_X) > 0).all()
    if not fine or not np.isfinite(t_X[-1] - t_X[0]):
        what = f"position_X must grow, value_X be finite, weight_X > 0: {t_X}, {y_X}, {w_X}"
        raise ValueError(what)
    return Logistic(*(float(x[0]) for x in _search(t_X, y_X[None], w_X[None])))


def _search(t_X, y_RX, w_RX):
    """Least squares for R series at once: drop, slope, midpoint, floor, r2, [R] each. The best
    point of a grid, then ever smaller steps: no start values, and nothing diverges."""
    span, width = t_X[-1] - t_X[0], np.diff(t_X).min()
    flattest, steepest = math.log(2 / span), math.log(STEEPEST / width)  # nearly straight; a step
    mids, logs = np.linspace(t_X[0], t_X[-1], 97), np.linspace(flattest, steepest, 25)
    mid_G, log_G = (z.ravel() for z in np.meshgrid(mids, logs, indexing="ij"))
    rows = np.arange(len(y_RX))
    best = _squares(t_X, y_RX, w_RX, mid_G[None], log_G[None])[0].argmin(axis=1)
    mid_R, log_R = mid_G[best], log_G[best]
    reach_mid, reach_log = mids[1] - mids[0], logs[1] - logs[0]
    steps = np.arange(-3, 4) / 3
    step_mid_G, step_log_G = (z.ravel() for z in np.meshgrid(steps, steps, indexing="ij"))
    reach_R1 = np.ones((len(y_RX), 1))
    for _ in range(100):  # a pattern search: smaller steps only when no neighbour is better
        mid_RG = np.clip(mid_R[:, None] + reach_R1 * reach_mid * step_mid_G, t_X[0], t_X[-1])
        log_RG = np.clip(log_R[:, None] + reach_R1 * reach_log * step_log_G, flattest, steepest)
        squares_RG = _squares(t_X, y_RX, w_RX, mid_RG, log_RG)[0]
        best = squares_RG.argmin(axis=1)
        better = squares_RG[rows, best] < squares_RG[:, len(steps) ** 2 // 2]
        mid_R = np.where(better, mid_RG[rows, best], mid_R)
        log_R = np.where(better, log_RG[rows, best], log_R)
        reach_R1[~better] *= 0.4
        if reach_R1.max() < 1e-6:
            break
    left, around, drop, floor = _squares(t_X, y_RX, w_RX, mid_R[:, None], log_R[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        noise_R = 1e-26 * (w_RX * y_RX**2).sum(axis=1)  # what rounding leaves of a constant series
        r2_R = np.where(around[:, 0] > noise_R, 1 - left[:, 0] / around[:, 0], 0.0)
    return drop[:, 0], np.exp(log_R), mid_R, floor[:, 0], r2_R


def _squares(t_X, y_RX, w_RX, mid_RG, log_RG):
    """For each of a grid of midpoints and log slopes, [R or 1, G]: the squares that remain with the
    best drop >= 0 and floor, the squares around the mean, that drop and that floor, [R, G]."""
    u_RGX = _falling(np.exp(log_RG)[..., None] * (t_X - mid_RG[..., None]))
    W_R1 = w_RX.sum(axis=1, keepdims=True)
    wy_R1 = (w_RX * y_RX).sum(axis=1, keepdims=True)
    y0_RX = y_RX - wy_R1 / W_R1
    around_R1 = (w_RX * y0_RX**2).sum(axis=1, keepdims=True)
    if len(u_RGX) == 1:  # one grid for all: matrix products
        u_GX = u_RGX[0]
        wu_RG, wuu_RG = w_RX @ u_GX.T, w_RX @ (u_GX**2).T
        wuy_RG = (w_RX * y0_RX) @ u_GX.T
    else:
        wu_RG = np.einsum("rgx,rx->rg", u_RGX, w_RX)
        wuu_RG = np.einsum("rgx,rgx,rx->rg", u_RGX, u_RGX, w_RX)
        wuy_RG = np.einsum("rgx,rx->rg", u_RGX, w_RX * y0_RX)
    varies_RG = wuu_RG - wu_RG**2 / W_R1
    with np.errstate(divide="ignore", invalid="ignore"):
        drop_RG = np.where(varies_RG > 1e-12 * W_R1, wuy_RG / varies_RG, 0.0).clip(min=0.0)
    left_RG = around_R1 - drop_RG * (2 * wuy_RG - drop_RG * varies_RG)
    floor_RG = wy_R1 / W_R1 - drop_RG * wu_RG / W_R1
    return left_RG, np.broadcast_to(around_R1, left_RG.shape), drop_RG, floor_RG


@dataclass
class Fit:
    """The logistic of a curve with bootstrap intervals, [low, high] each."""

    logistic: Logistic
    midpoint_interval: list  # half a bin wider on either side: a bin's tokens look alike
    slope_interval: list
    drop_interval: list
    floor_interval: list
    fall: float  # from the first to the last bin that counts
    fall_interval: list
    step: bool  # the slope is the steepest that can be told apart
    located: bool  # fall surely above FALL, R^2 >= EXPLAINED, draws of t* inside `seen`
    seen: tuple[float, float]  # first and last position that count, tokens
    width: float  # of the widest bin that counts, tokens
    midpoint_R: np.ndarray  # draws, in the order of `resample`
    fall_R: np.ndarray

    def record(self) -> dict:
        """Plain data for JSON, without the draws."""
        names = [f.name for f in dataclasses.fields(self) if not f.name.endswith("_R")]
        values = {name: getattr(self, name) for name in names if name != "logistic"}
        values |= {"fall": plain(self.fall), "seen": list(map(plain, self.seen))}
        logistic = {k: plain(v) for k, v in dataclasses.asdict(self.logistic).items()}
        return logistic | values | {"width": plain(self.width)}


def fit_curve(points: Curve, *, between=(0, math.inf), **resampling) -> Fit | None:
    """Fit the logistic to a curve and to its bootstrap resamples over problems (arguments of
    `resample`). The bins that count lie between the two positions, up to the first bin that less
    than RUNNING of the responses in the fullest one reaches. None with fewer than five of them, or
    fewer than two problems in them."""
    most = points.responses_X.max(initial=0)
    counts_X = (points.responses_X >= max(2, RUNNING * most)) & (points.weight_PX.sum(axis=0) > 0)
    used_X = (points.edges_X1[:-1] >= between[0]) & (points.edges_X1[1:] <= between[1])
    used_X &= np.cumsum(used_X & ~counts_X) == 0
    P = int((points.weight_PX[:, used_X].sum(axis=1) > 0).sum())
    if P < 2 or used_X.sum() < 5:
        return None
    t_X = points.centre_X()[used_X]
    point = fit_logistic(t_X, points.mean_X[used_X], points.weight_PX[:, used_X].sum(axis=0))
    draws_RP = resample(len(points.sum_PX), **resampling)
    w_RX = draws_RP @ points.weight_PX[:, used_X]
    y_RX = draws_RP @ points.sum_PX[:, used_X]
    y_RX = np.divide(y_RX, w_RX, out=np.zeros_like(y_RX), where=w_RX > 0)
    some_R = w_RX.sum(axis=1) > 0  # not in draws without any of the problems that count
    if not some_R.any():
        return None
    drop_R, slope_R, mid_R, floor_R = fits_4R = np.full((4, len(draws_RP)), math.nan)
    fits_4R[:, some_R] = _search(t_X, y_RX[some_R], w_RX[some_R])[:4]
    width = float(np.diff(points.edges_X1)[used_X].max())
    ends = t_X[[0, -1]]
    fall_R = -np.diff(drop_R[:, None] * _falling(slope_R[:, None] * (ends - mid_R[:, None])))[:, 0]
    low, high = interval(mid_R)
    fall_interval = interval(fall_R)
    falls = fall_interval[0] > FALL and point.r2 >= EXPLAINED
    return Fit(
        logistic=point,
        midpoint_interval=[plain(low - width / 2), plain(high + width / 2)],
        slope_interval=interval(slope_R), drop_interval=interval(drop_R),
        floor_interval=interval(floor_R),
        fall=float(point(ends[0]) - point(ends[1])), fall_interval=fall_interval,
        step=bool(point.slope > 0.999 * STEEPEST / width),
        located=bool(falls and ends[0] < low and high < ends[1]),
        seen=tuple(ends.tolist()), width=width, midpoint_R=mid_R, fall_R=fall_R,
    )  # fmt: skip
