"""What a quantity does along the responses: means with standard errors, and where it falls.

Paper: "Your Teacher Can't Help You Here", arXiv 2605.30833, the section on supervision fidelity,
which fits a four-parameter logistic to the mean fidelity of the teacher as a function of the
position in the student's response:

    F(t) = A / (1 + exp(eps (t - t*))) + b

    paper   here       meaning
    A       drop       how far it falls altogether
    eps     slope      how suddenly, per token (the paper gives it per 1000 tokens)
    t*      midpoint   where it has fallen half of the way, tokens
    b       floor      what is left

Tokens of one response, and responses to one problem, are alike; so errors are those of sums over
*problems*, which are the independent draws: linearised for a mean (a ratio of two sums), by the
bootstrap over problems for everything else.

Decisions where the paper is silent:
1. The fit is least squares on means of bins, weighted by their tokens, over bins in which at least
   a tenth of the responses still runs. R^2 is that of the same means and weights.
2. Given t* and eps the other two are linear, so these are solved for, and the first two searched:
   on a grid over the range that was seen, and around its best point on ever finer ones. No start
   values, no divergence. A is at least 0, t* inside the range; eps lies between 2 / range (nearly a
   straight line) and STEEPEST / width of a bin (a step).
3. Nothing within a bin can be told apart, so the interval of t* is that of the bootstrap, and half
   a bin more on either side.

Needs numpy only.  Letters: N observations, B responses, P problems, X bins, R resamples, G points
of a grid.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95  # of every interval
MOST_BINS = 24  # of a curve, unless told
RUNNING = 0.1  # a bin counts for the fit if so large a share of the responses reaches it
FALL = 0.05  # a fall of a probability that is worth the name
STEEPEST = 8.0  # slope times the width of a bin; what is steeper is a step like any other
LARGEST = 1e100  # squares of larger numbers might overflow
EXPLAINED = 0.5  # R^2 from which on a logistic is taken for a description of the curve


# ---------------------------------------------------------------------------- means with errors
@dataclass
class Curve:
    """Means of a quantity in bins of positions.

    edges_X1     bin x holds positions edges[x] <= t < edges[x + 1]
    mean_X       sum of the quantity over sum of its denominator; nan in an empty bin
    se_X         standard error over problems; nan where fewer than two problems have observations
    low_X, high_X   quartiles of the observations, where they were asked for, else nan
    count_X, responses_X, problems_X   observations, and how many responses and problems they are of
    sum_PX, weight_PX   numerator and denominator by problem, from which bootstraps are made
    """

    edges_X1: np.ndarray
    mean_X: np.ndarray
    se_X: np.ndarray
    low_X: np.ndarray
    high_X: np.ndarray
    count_X: np.ndarray
    responses_X: np.ndarray
    problems_X: np.ndarray
    sum_PX: np.ndarray
    weight_PX: np.ndarray

    def centre_X(self) -> np.ndarray:
        """The middle of every bin: of bin [0, 4), 1.5."""
        return (self.edges_X1[:-1] + self.edges_X1[1:] - 1) / 2

    def record(self) -> dict:
        """Plain data for JSON, rounded to 6 digits; None for what is undefined."""
        return {
            "from": self.edges_X1[:-1].tolist(), "to": self.edges_X1[1:].tolist(),
            "mean": plain(self.mean_X), "se": plain(self.se_X),
            "quartile_low": plain(self.low_X), "quartile_high": plain(self.high_X),
            "count": self.count_X.tolist(), "responses": self.responses_X.tolist(),
            "problems": self.problems_X.tolist(),
        }  # fmt: skip


def plain(value):
    """A number or array as JSON can say it: 6 significant digits, None for what is not finite.

    >>> plain(np.array([1 / 3, np.nan])), plain(2.0)
    ([0.333333, None], 2.0)
    """
    if isinstance(value, np.ndarray):
        return [plain(x) for x in value.tolist()]
    return float(f"{value:.6g}") if math.isfinite(value) else None


def bins(
    length: int, most: int = MOST_BINS, *, width: int | None = None, first: int = 0
) -> np.ndarray:
    """Edges of bins of equal whole width that hold positions 0..length-1: of that width, or as
    narrow as at most `most` of them allow. `first`: positions before it are a bin of their own.
    Raises ValueError unless all are whole numbers of at least 1, `first` of at least 0.

    >>> bins(10, 4), bins(10, width=5), bins(10, width=5, first=2)
    (array([ 0,  3,  6,  9, 12]), array([ 0,  5, 10]), array([ 0,  2,  7, 12]))
    """
    _check_whole("first", first, 0)
    given = {"length": length, "most": most} | ({} if width is None else {"width": width})
    for name, value in given.items():
        _check_whole(name, value, 1)
    length, most = int(length), int(most)  # of unsigned ones there is no minus
    first = min(int(first), length - 1)
    width = -(-(length - first) // most) if width is None else int(width)
    edges = first + np.arange(0, -(-(length - first) // width) + 1) * width
    return np.concatenate([[0], edges]) if first else edges


def _check_whole(name: str, value, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def curve(
    value_N, position_N, row_N, problem_B, edges_X1, *, denominator_N=None, quartiles=False
) -> Curve:
    """Mean of a quantity in every bin: sum of values over sum of denominators.

    value_N: finite numbers. position_N: where in its response each was observed, from 0 on.
    row_N: the response that each belongs to. problem_B: the problem of every response; both count
        from 0.
    edges_X1: from `bins`; what lies outside is left out.
    denominator_N: numbers >= 0; default 1, which makes it a mean of observations. A problem counts
        for the error if it has any, for problems_X if it has observations.
    Raises ValueError for shapes or numbers that do not fit.

    >>> found = curve([1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1], bins(2))
    >>> found.mean_X.tolist(), found.se_X.tolist()
    ([0.5, 0.5], [0.5, 0.5])
    """
    value_N, weight_N, position_N, row_N, problem_B, edges_X1 = _check(
        value_N, denominator_N, position_N, row_N, problem_B, edges_X1
    )
    X, B = len(edges_X1) - 1, len(problem_B)
    bin_N = np.searchsorted(edges_X1, position_N, side="right") - 1
    inside_N = (bin_N >= 0) & (bin_N < X)
    value_N, weight_N = value_N[inside_N], weight_N[inside_N]
    bin_N, row_N = bin_N[inside_N], row_N[inside_N]
    sum_BX, weight_BX, count_BX = (
        np.bincount(row_N * X + bin_N, of_N, B * X).reshape(B, X)
        for of_N in (value_N, weight_N, None)
    )
    P = int(problem_B.max()) + 1 if B else 0
    sum_PX, weight_PX, count_PX = np.zeros((P, X)), np.zeros((P, X)), np.zeros((P, X), int)
    for of_PX, of_BX in ((sum_PX, sum_BX), (weight_PX, weight_BX), (count_PX, count_BX)):
        np.add.at(of_PX, problem_B, of_BX)
    mean_X, se_X = _ratio(sum_PX, weight_PX)
    low_X, high_X = np.full(X, math.nan), np.full(X, math.nan)
    if quartiles:
        order_N = np.argsort(bin_N, kind="stable")
        ends = np.cumsum(np.bincount(bin_N, minlength=X))
        for x, part in enumerate(np.split(value_N[order_N], ends[:-1])):
            if part.size:
                low_X[x], high_X[x] = np.quantile(part, [0.25, 0.75])
    return Curve(
        edges_X1, mean_X, se_X, low_X, high_X, count_PX.sum(axis=0), (count_BX > 0).sum(axis=0),
        (count_PX > 0).sum(axis=0), sum_PX, weight_PX,
    )  # fmt: skip


def _check(value_N, denominator_N, position_N, row_N, problem_B, edges_X1):
    """The arguments of `curve` as arrays; ValueError for what does not fit together."""
    value_N = np.asarray(value_N, dtype=np.float64)
    weight_N = np.ones_like(value_N) if denominator_N is None else denominator_N
    weight_N = np.asarray(weight_N, dtype=np.float64)
    position_N, row_N, problem_B, edges_X1 = map(
        np.asarray, (position_N, row_N, problem_B, edges_X1)
    )
    shapes = [x.shape for x in (value_N, weight_N, position_N, row_N)]
    if value_N.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(
            f"value_N, denominator_N, position_N, row_N must be 1-D of one length, not {shapes}"
        )
    for name, x in (("row_N", row_N), ("problem_B", problem_B)):
        whole = x.ndim == 1 and (x.size == 0 or np.issubdtype(x.dtype, np.integer))
        if not whole or (x.size and x.min() < 0):
            raise ValueError(f"{name} must be 1-D whole numbers >= 0, got {x!r:.200}")
    if row_N.size and row_N.max() >= len(problem_B):
        raise ValueError(f"row_N holds {row_N.max()}, but problem_B has {len(problem_B)} responses")
    for name, x in (("value_N", value_N), ("position_N", position_N), ("edges_X1", edges_X1)):
        if x.size and not (np.issubdtype(x.dtype, np.number) and np.isfinite(x).all()):
            raise ValueError(f"{name} must be finite numbers")
    if edges_X1.ndim != 1 or len(edges_X1) < 2 or not (np.diff(edges_X1) > 0).all():
        raise ValueError(f"edges_X1 must be at least two growing numbers, got {edges_X1!r:.200}")
    if not (np.isfinite(weight_N).all() and (weight_N >= 0).all()):
        raise ValueError("denominator_N must be finite and >= 0")
    return value_N, weight_N, position_N, row_N.astype(int), problem_B.astype(int), edges_X1


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
    """{"mean", "se", "count", "problems"} of one number per response, as `curve` has it for a bin;
    responses whose number is nan are left out.

    >>> mean([1.0, 0.0, np.nan], [0, 1, 1])
    {'mean': 0.5, 'se': 0.5, 'count': 2, 'problems': 2}
    """
    value_B, problem_B = np.asarray(value_B, dtype=np.float64), np.asarray(problem_B)
    shapes = [np.shape(z) for z in (value_B, problem_B, denominator_B) if z is not None]
    if value_B.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"value_B, problem_B, denominator_B must be 1-D of one length: {shapes}")
    there_B = ~np.isnan(value_B)
    if denominator_B is not None:
        denominator_B = np.asarray(denominator_B)[there_B]
    row_B = np.flatnonzero(there_B)
    found = curve(
        value_B[there_B], np.zeros(len(row_B), int), row_B, problem_B, [0, 1],
        denominator_N=denominator_B,
    )  # fmt: skip
    return {"mean": plain(found.mean_X[0]), "se": plain(found.se_X[0]),
            "count": int(found.count_X[0]), "problems": int(found.problems_X[0])}  # fmt: skip


def resample(problems: int, resamples: int = 400, seed: int = 0) -> np.ndarray:
    """How often every problem is drawn in every resample, [R, P]: the same for the same arguments,
    so that two students on the same problems are compared on the same resamples. Raises ValueError
    unless both are whole numbers of at least 1, and the seed one of at least 0."""
    for name, value, low in (
        ("problems", problems, 1), ("resamples", resamples, 1), ("seed", seed, 0)
    ):  # fmt: skip
        _check_whole(name, value, low)
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
    problems: {"r", "r_interval", "slope", "slope_interval", "count", "problems"}; None where x or y
    do not vary. Raises ValueError for shapes that differ or numbers that are not finite, or too
    large to square.

    >>> found = regression([0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 5.0, 7.0], [0, 0, 1, 1])
    >>> found["r"], found["slope"]
    (1.0, 2.0)
    """
    x_N, y_N = (np.asarray(z, dtype=np.float64) for z in (x_N, y_N))
    problem_N = np.asarray(problem_N)
    if x_N.ndim != 1 or not x_N.shape == y_N.shape == problem_N.shape:
        shapes = x_N.shape, y_N.shape, problem_N.shape
        raise ValueError(f"x_N, y_N and problem_N must be 1-D and of one length, not {shapes}")
    for name, z in (("x_N", x_N), ("y_N", y_N)):
        if not (np.abs(z) < LARGEST).all():  # nor nan
            raise ValueError(f"{name} must be finite, and smaller than {LARGEST}")
    names = "r", "r_interval", "slope", "slope_interval"
    if not len(x_N):
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
    """F(t) = drop / (1 + exp(slope (t - midpoint))) + floor, and how well it fits.

    r2   1 - weighted squares left over weighted squares around the mean; 0 for a constant series
    """

    drop: float
    slope: float
    midpoint: float
    floor: float
    r2: float = math.nan

    def __call__(self, t):
        """Its value at t, a number or an array.

        >>> float(Logistic(drop=0.5, slope=0.2, midpoint=70, floor=0.4)(70))
        0.65
        """
        return self.drop * _falling(self.slope * (t - self.midpoint)) + self.floor


def _falling(x):
    """1 / (1 + exp(x)), without overflow."""
    return 0.5 - 0.5 * np.tanh(x / 2)


def fit_logistic(position_X, value_X, weight_X=None) -> Logistic:
    """The four-parameter logistic of least squares. Raises ValueError unless there are at least
    five growing, finite positions, as many finite values, and weights > 0.

    >>> t = np.arange(0.0, 160.0, 4.0)
    >>> found = fit_logistic(t, Logistic(0.5, 0.2, 70.0, 0.4)(t))
    >>> [round(x, 3) for x in dataclasses.astuple(found)]
    [0.5, 0.2, 70.0, 0.4, 1.0]
    """
    t_X, y_X = (np.asarray(z, dtype=np.float64) for z in (position_X, value_X))
    w_X = np.ones_like(t_X) if weight_X is None else np.asarray(weight_X, dtype=np.float64)
    if t_X.ndim != 1 or len(t_X) < 5 or not t_X.shape == y_X.shape == w_X.shape:
        shapes = t_X.shape, y_X.shape, w_X.shape
        raise ValueError(f"position_X, value_X, weight_X must be 1-D of one length >= 5: {shapes}")
    if not all((np.abs(z) < LARGEST).all() for z in (t_X, y_X, w_X)) or not (w_X > 0).all():
        what = f"finite, smaller than {LARGEST}, and weights positive"
        raise ValueError(f"position_X, value_X, weight_X must be {what}")
    if not (np.diff(t_X) > 0).all():
        raise ValueError(f"position_X must grow, got {t_X!r:.200}")
    return Logistic(*(float(x[0]) for x in _search(t_X, y_X[None], w_X[None])))


def _search(t_X, y_RX, w_RX):
    """Least squares for R series at once: drop, slope, midpoint, floor, r2, [R] each."""
    span, width = t_X[-1] - t_X[0], np.diff(t_X).min()
    flattest, steepest = math.log(2 / span), math.log(STEEPEST / width)
    mids, logs = np.linspace(t_X[0], t_X[-1], 97), np.linspace(flattest, steepest, 25)
    mid_G, log_G = (z.ravel() for z in np.meshgrid(mids, logs, indexing="ij"))
    rows = np.arange(len(y_RX))
    best = _squares(t_X, y_RX, w_RX, mid_G[None], log_G[None])[0].argmin(axis=1)
    mid_R, log_R = mid_G[best], log_G[best]
    reach_mid, reach_log = mids[1] - mids[0], logs[1] - logs[0]
    steps = np.arange(-3, 4) / 3
    step_mid_G, step_log_G = (z.ravel() for z in np.meshgrid(steps, steps, indexing="ij"))
    reach_R1 = np.ones((len(y_RX), 1))
    for _ in range(100):  # a pattern search: closer in only when nothing around is better
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
    """The logistic of a curve with bootstrap intervals, [low, high] each.

    fall         by how much the fit falls from the first to the last bin that counted
    step         whether the slope is the steepest that can be told apart
    located      whether t* means anything: the fall is surely above FALL, R^2 at least EXPLAINED,
                 and the bootstrap's interval of t* (without the half bin) inside what was seen
    seen         first and last position that counted, tokens
    midpoint_R, fall_R   the draws, in the order of `resample`
    """

    logistic: Logistic
    midpoint_interval: list
    slope_interval: list
    drop_interval: list
    floor_interval: list
    fall: float
    fall_interval: list
    step: bool
    located: bool
    seen: tuple[float, float]
    width: float
    midpoint_R: np.ndarray
    fall_R: np.ndarray

    def record(self) -> dict:
        """Plain data for JSON, without the draws."""
        names = [f.name for f in dataclasses.fields(self) if not f.name.endswith("_R")]
        found = {name: getattr(self, name) for name in names if name != "logistic"}
        found |= {"fall": plain(self.fall), "seen": list(map(plain, self.seen))}
        logistic = {k: plain(v) for k, v in dataclasses.asdict(self.logistic).items()}
        return logistic | found | {"width": plain(self.width)}


def fit_curve(found: Curve, *, between=(0, math.inf), **resampling) -> Fit | None:
    """Fit the logistic to a curve and to its bootstrap resamples over problems (arguments of
    `resample`). None with fewer than two problems or five bins that count: those that lie between
    the two positions, up to the first which less than RUNNING of the responses in the fullest one
    reach."""
    most = found.responses_X.max(initial=0)
    counts_X = (found.responses_X >= max(2, RUNNING * most)) & (found.weight_PX.sum(axis=0) > 0)
    used_X = (found.edges_X1[:-1] >= between[0]) & (found.edges_X1[1:] <= between[1])
    used_X &= np.cumsum(used_X & ~counts_X) == 0  # up to the first that does not count
    P = int((found.weight_PX[:, used_X].sum(axis=1) > 0).sum())
    if P < 2 or used_X.sum() < 5:
        return None
    t_X = found.centre_X()[used_X]
    point = fit_logistic(t_X, found.mean_X[used_X], found.weight_PX[:, used_X].sum(axis=0))
    draws_RP = resample(len(found.sum_PX), **resampling)
    w_RX = draws_RP @ found.weight_PX[:, used_X]
    y_RX = draws_RP @ found.sum_PX[:, used_X]
    y_RX = np.divide(y_RX, w_RX, out=np.zeros_like(y_RX), where=w_RX > 0)
    there_R = w_RX.sum(axis=1) > 0  # not in draws without any of the problems that count
    if not there_R.any():
        return None
    drop_R, slope_R, mid_R, floor_R, _ = np.full((5, len(draws_RP)), math.nan)
    for of_R, fitted in zip(
        (drop_R, slope_R, mid_R, floor_R), _search(t_X, y_RX[there_R], w_RX[there_R]), strict=False
    ):
        of_R[there_R] = fitted
    width = float(np.diff(found.edges_X1)[used_X].max())
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
