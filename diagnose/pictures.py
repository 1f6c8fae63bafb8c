"""The pictures of `diagnose.py`, drawn from its report alone. Needs matplotlib, which is optional.

    margin.png      the teacher's margin by sentence and by token, and where the rule would stop
    fidelity.png    the teacher's confidence by position with the fitted logistic, and around the
                    point where the teacher goes on itself
    completion.png  right answers when the teacher goes on from a prefix of the student
    signal.png      variance over the candidates, and both parts of the gradient, by position
    compare.png     with --compare: fidelity and t* of all students

Lines are means, dark bands their 95% intervals (1.96 standard errors over problems), light bands
the middle half of what was observed.
"""

import math
from pathlib import Path

import numpy as np

import curves
import report

MISSING = "no pictures: they need matplotlib (pip install matplotlib)"
# Okabe and Ito's colours, safe for the colour-blind
BLUE, RED, GREEN, ORANGE, PINK, SKY = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9".split()
GREY = "#777777"
WHO = {"student": ("student's responses", BLUE, "-"),
       "teacher": ("teacher's own", ORANGE, (0, (5, 1.5)))}  # fmt: skip
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.5,
    "lines.markersize": 4, "figure.dpi": 130, "savefig.dpi": 130,
}  # fmt: skip
WIDTH = 8.5  # inches


def _numbers(values) -> np.ndarray:
    """Floats, nan for None.

    >>> _numbers([1, None]).tolist()
    [1.0, nan]
    """
    return np.array([math.nan if x is None else x for x in values], dtype=float)


def _middles(curve: dict) -> np.ndarray:
    """Middle of every bin of a curve in the report."""
    return (_numbers(curve["from"]) + _numbers(curve["to"]) - 1) / 2


def _draw_curve(
    axes, curve: dict, colour, label=None, dashes="-", quartiles=False, first=0
) -> None:
    """Mean, its interval and, if wanted, the middle half; only where a tenth of the most responses
    runs, for what comes after says little. `first`: what position 0 is called."""
    responses = _numbers(curve["responses"])
    shown = responses >= curves.RUNNING * responses.max(initial=0)
    x, mean, se = _middles(curve), _numbers(curve["mean"]), _numbers(curve["se"])
    x, mean, se = first + x[shown], mean[shown], se[shown]
    axes.plot(x, mean, color=colour, linestyle=dashes, label=label, marker="." * (len(x) < 40))
    half = 1.96 * np.nan_to_num(se)
    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.35, linewidth=0)
    if quartiles:
        low, high = (_numbers(curve[k])[shown] for k in ("quartile_low", "quartile_high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _figure_of(columns: int, height: float, caption: str, **ratios):
    """A row of panels at README width, and the caption at its bottom."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False, gridspec_kw=ratios)[0]
    figure.supxlabel(caption, fontsize=7.5, color="#555555", x=0.99, ha="right")
    return figure, list(grid)


def _sizes(result: dict, s: dict) -> str:
    """How much a picture rests on."""
    count = s["compatibility"]["tokens"]["count"]
    return f"{count} responses to {result['problems']} problems"


def _margin_picture(result: dict):
    """By sentence, by token, and the release points."""
    s = result["students"]["student"]
    caption = "lines: means with 95% intervals; light: middle half · " + _sizes(result, s)
    figure, (by_sentence, by_token, release) = _figure_of(3, 2.9, caption)
    for who, (label, colour, dashes) in WHO.items():
        m = s["margin"][who]
        _draw_curve(by_sentence, m["by_sentence"], colour, label, dashes, True, first=1)
        _draw_curve(by_token, m["by_token"], colour, label, dashes, quartiles=True)
    by_sentence.set(title="sentence scores", xlabel="sentence", ylabel="log(1 + mean margin)")
    unit = {"logprob": "margin, nats", "prob": "margin, probability"}[result["settings"]["margin"]]
    by_token.set(title="margins", xlabel="token of the response", ylabel=unit)
    for axes in (by_sentence, by_token):
        axes.set_ylim(bottom=0)
    by_sentence.xaxis.get_major_locator().set_params(integer=True)
    by_sentence.legend(loc="lower left")
    for who, (label, colour, _) in WHO.items():
        at = _numbers(s["margin"][who]["release_at_each"])
        fired = at[~np.isnan(at)]
        release.hist(
            fired, bins=np.linspace(0, 1, 21), weights=np.full(len(fired), 1 / len(at)),
            color=colour, alpha=0.5, label=f"{label}: {len(fired) / len(at):.0%} cut",
        )  # fmt: skip
    papers = report.PAPER_RELEASE["median"]
    release.axvline(papers, color=GREY, linestyle=":", linewidth=1, label="paper's median")
    release.set(title="where the rule stops", xlabel="share of the response", xlim=(0, 1),
                ylabel="share of responses")  # fmt: skip
    release.set_ylim(top=max(0.05, 1.45 * release.get_ylim()[1]))  # room for the legend
    release.legend(loc="upper left")
    return figure


def _draw_fit(axes, fit: dict | None, colour, label=None) -> None:
    """The logistic where it was fitted, and its t* with the interval where it means something."""
    if fit is None:
        return
    parameters = {k: fit[k] for k in ("drop", "slope", "midpoint", "floor")}
    t = np.linspace(*fit["seen"], 400)
    axes.plot(t, curves.Logistic(**parameters)(t), color=colour, linewidth=1, alpha=0.9)
    if fit["located"]:
        axes.axvspan(*fit["midpoint_interval"], color=colour, alpha=0.12, linewidth=0)
        axes.axvline(fit["midpoint"], color=colour, linestyle=":", linewidth=1, label=label)


def _fidelity_picture(result: dict):
    """By position with the fit, and around the handover."""
    s = result["students"]["student"]
    jumps = s["fidelity"]["handover"]
    caption = "thin: fitted logistic; dotted: t* with its 95% interval · " + _sizes(result, s)
    figure, grid = _figure_of(1 + bool(jumps), 3.0, caption)
    for who, (label, colour, dashes) in WHO.items():
        f = s["fidelity"][who]
        _draw_curve(grid[0], f["curve"], colour, label, dashes)
        fit = f["fit"]
        name = f"t* = {fit['midpoint']:.0f}" if fit and fit["located"] else None
        _draw_fit(grid[0], fit, colour, name)
    grid[0].set(title="the teacher's confidence F(t)", xlabel="token of the response",
                ylabel="mean largest probability")  # fmt: skip
    grid[0].legend(loc="best")
    if not jumps:
        return figure
    named = {"before": ("before", GREY, "s"), "student": ("after, student goes on", BLUE, "o"),
             "teacher": ("after, teacher goes on", ORANGE, "^")}  # fmt: skip
    for key, (label, colour, marker) in named.items():
        x = [j["tokens"] for j in jumps]
        mean, se = (_numbers(j[key][k] for j in jumps) for k in ("mean", "se"))
        grid[1].errorbar(x, mean, 1.96 * np.nan_to_num(se), color=colour, marker=marker,
                         linewidth=1, capsize=2, label=label)  # fmt: skip
    title = f"{jumps[0]['window']} tokens around a handover"
    grid[1].set(title=title, xlabel="tokens of the student before it")
    grid[1].set_ylim(grid[0].get_ylim())
    grid[1].legend(loc="best")
    return figure


def _completion_picture(result: dict):
    """Right answers when the teacher goes on; None without answers or lengths."""
    s = result["students"]["student"]
    c = s["completion"]
    if c is None or not c["points"]:
        return None
    caption = "bars and bands: 95% intervals · " + _sizes(result, s)
    figure, (axes,) = _figure_of(1, 2.9, caption)
    ends = {"teacher": "teacher alone", "student": "student alone"}
    for who, label in ends.items():
        colour = WHO[who][1]
        mean, half = c[who]["mean"], 1.96 * (c[who]["se"] or 0)
        axes.axhline(mean, color=colour, linestyle=(0, (5, 1.5)), linewidth=1, label=label)
        axes.axhspan(mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
    x = [0] + [p["tokens"] for p in c["points"]]
    means = [c["teacher"]] + [p["accuracy"] for p in c["points"]]
    mean, se = (_numbers(m[k] for m in means) for k in ("mean", "se"))
    axes.errorbar(x, mean, 1.96 * np.nan_to_num(se), color=GREEN, marker="o", capsize=2,
                  label="student begins, teacher goes on")  # fmt: skip
    axes.set(xlabel="tokens of the student before the teacher goes on", ylabel="right answers",
             title="can the teacher finish what the student began?", ylim=(0, 1))  # fmt: skip
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _signal_picture(result: dict):
    """Variance over the candidates, and the two parts of the gradient."""
    s = result["students"]["student"]
    figure, (variance, parts, share) = _figure_of(
        3, 2.8, "lines: means with 95% intervals · " + _sizes(result, s)
    )
    _draw_curve(variance, s["signal"]["variance"], BLUE)
    variance.set(title="variance of log p_T", ylabel="nats²")
    _draw_curve(parts, s["signal"]["teacher_part"], ORANGE, "teacher's part")
    _draw_curve(parts, s["signal"]["own_part"], GREY, "student's own", (0, (5, 1.5)))
    parts.set(title="norm of the gradient")
    parts.legend(loc="best")
    _draw_curve(share, s["signal"]["share"], ORANGE)
    share.set(title="teacher's share", ylim=(0, 1))
    for axes in (variance, parts):
        axes.set_ylim(bottom=0)
    for axes in (variance, parts, share):
        axes.set_xlabel("token of the response")
    return figure


def _compare_picture(result: dict):
    """Fidelity of all students, and their t*; None if there is only one."""
    students = result["students"]
    if len(students) < 2:
        return None
    caption = "thin: fitted logistic; bars: 95% intervals · " + _sizes(result, students["student"])
    figure, (fidelity, points) = _figure_of(
        2, 2.2 + 0.22 * len(students), caption, width_ratios=[3, 2]
    )
    palette = [BLUE, RED, GREEN, PINK, SKY, ORANGE]
    dashes = ["-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1))]
    for k, (name, s) in enumerate(students.items()):
        f, colour = s["fidelity"]["student"], palette[k % len(palette)]
        label = "before" if name == "student" else name
        _draw_curve(fidelity, f["curve"], colour, label, dashes[k % len(dashes)])
        _draw_fit(fidelity, f["fit"] | {"located": False} if f["fit"] else None, colour)
        if f["fit"] and f["fit"]["located"]:
            t, (low, high) = f["fit"]["midpoint"], f["fit"]["midpoint_interval"]
            points.errorbar([t], [k], xerr=[[max(t - low, 0)], [max(high - t, 0)]], color=colour,
                            marker="o", capsize=3)  # fmt: skip
        else:
            points.annotate("no t*", (0.5, k), xycoords=("axes fraction", "data"), color=colour,
                            ha="center", va="center")  # fmt: skip
    fidelity.set(title="the teacher's confidence along the students' responses",
                 xlabel="token of the response", ylabel="mean largest probability")  # fmt: skip
    fidelity.legend(loc="best")
    names = ["before" if name == "student" else name for name in students]
    points.set_yticks(range(len(names)), names)
    points.set(title="t*", xlabel="token of the response", ylim=(len(names) - 0.5, -0.5))
    return figure


PICTURES = {
    "margin": _margin_picture, "fidelity": _fidelity_picture, "completion": _completion_picture,
    "signal": _signal_picture, "compare": _compare_picture,
}  # fmt: skip


def draw(result: dict, out) -> list[str]:
    """Write what can be drawn into a folder; the names of the files. Without matplotlib: one line
    that says so, and none."""
    try:
        import matplotlib.style
    except ImportError:
        print(MISSING)
        return []
    written = []
    with matplotlib.style.context(["default", STYLE]):  # whatever the reader's own settings
        for name, make in PICTURES.items():
            if (figure := make(result)) is not None:
                figure.savefig(Path(out) / f"{name}.png", metadata={"Software": None})
                written.append(f"{name}.png")
    return written
