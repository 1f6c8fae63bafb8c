"""The pictures of a diagnosis, drawn from report.json alone. Needs matplotlib, which is optional.

    margin.png      the teacher's margin by sentence and by token, and where the rule would stop
    fidelity.png    the teacher's confidence by position with the fitted logistic, and around the
                    point where the teacher goes on
    completion.png  right answers when the teacher goes on from a prefix of the student
    signal.png      variance over the candidates, and both parts of the gradient, by position
    compare.png     with --compare: fidelity and t* of all students

Lines are means, dark bands their 95% intervals (1.96 standard errors over problems), light bands
the middle half of the observations.
"""

import math
from pathlib import Path

import numpy as np

from diagnose import curves, verdicts
from diagnose.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE

MISSING = "no pictures: they need matplotlib (pip install matplotlib)"
DASHED = (0, (5, 1.5))
WRITERS = {"student": ("student's responses", BLUE, "-"),
           "teacher": ("teacher's own", ORANGE, DASHED)}  # fmt: skip
TOKEN = "token of the response"


def _numbers(values) -> np.ndarray:
    """Floats, nan for None."""
    return np.array([math.nan if x is None else x for x in values], dtype=float)


def _means(means) -> tuple[np.ndarray, np.ndarray]:
    """Of several {"mean", "se"}: the means, and half the width of their 95% intervals."""
    mean, se = (_numbers(m[k] for m in means) for k in ("mean", "se"))
    return mean, 1.96 * np.nan_to_num(se)


def _draw_curve(axes, curve: dict, colour, label=None, dashes="-", quartiles=False, first=0):
    """Mean, its interval and, if wanted, the middle half, where at least a tenth of the most
    responses run. `first`: the name of position 0."""
    responses = _numbers(curve["responses"])
    shown = responses >= curves.RUNNING * responses.max(initial=0)
    columns = {k: _numbers(v)[shown] for k, v in curve.items()}
    x = first + (columns["from"] + columns["to"] - 1) / 2
    mean, half = columns["mean"], 1.96 * np.nan_to_num(columns["se"])
    axes.plot(x, mean, color=colour, linestyle=dashes, label=label, marker="." * (len(x) < 40))
    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.35, linewidth=0)
    if quartiles:
        axes.fill_between(x, columns["quartile_low"], columns["quartile_high"], color=colour,
                          alpha=0.12, linewidth=0)  # fmt: skip


def _figure_of(result: dict, columns: int, height: float, caption: str, **ratios):
    """A row of panels at README width, and at the bottom the caption and the sample size."""
    from matplotlib.figure import Figure

    figure = Figure((8.5, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, gridspec_kw=ratios)[0]
    count = result["students"]["student"]["compatibility"]["tokens"]["count"]
    caption += f" · {count} responses to {result['problems']} problems"
    figure.supxlabel(caption, fontsize=7.5, color="#555555", x=0.99, ha="right")
    return figure, list(panels)


def _margin_picture(result: dict):
    """By sentence, by token, and the release points."""
    s = result["students"]["student"]
    caption = "lines: means with 95% intervals; light: middle half"
    figure, (by_sentence, by_token, release) = _figure_of(result, 3, 2.9, caption)
    for who, (label, colour, dashes) in WRITERS.items():
        m = s["margin"][who]
        _draw_curve(by_sentence, m["by_sentence"], colour, label, dashes, True, first=1)
        _draw_curve(by_token, m["by_token"], colour, label, dashes, quartiles=True)
        at = _numbers(m["release_at_each"])
        fired = at[~np.isnan(at)]
        release.hist(
            fired, bins=np.linspace(0, 1, 21), weights=np.full(len(fired), 1 / len(at)),
            color=colour, alpha=0.5, label=f"{label}: {len(fired) / len(at):.0%} cut",
        )  # fmt: skip
    by_sentence.set(title="sentence scores", xlabel="sentence", ylabel="log(1 + mean margin)")
    unit = {"logprob": "margin, nats", "prob": "margin, probability"}[result["settings"]["margin"]]
    by_token.set(title="margins", xlabel=TOKEN, ylabel=unit)
    for axes in (by_sentence, by_token):
        axes.set_ylim(bottom=0)
    by_sentence.xaxis.get_major_locator().set_params(integer=True)
    by_sentence.legend(loc="lower left")
    median = verdicts.PAPER_RELEASE["median"]
    release.axvline(median, color=GREY, linestyle=":", linewidth=1, label="paper's median")
    release.set(title="where the rule stops", xlabel="share of the response", xlim=(0, 1),
                ylabel="share of responses")  # fmt: skip
    release.set_ylim(top=max(0.05, 1.45 * release.get_ylim()[1]))  # room for the legend
    release.legend(loc="upper left")
    return figure


def _draw_fit(axes, fit: dict | None, colour, t_star=True) -> None:
    """The logistic where it was fitted, and t* with its interval if it is located."""
    if fit is None:
        return
    parameters = {k: fit[k] for k in ("drop", "slope", "midpoint", "floor")}
    t = np.linspace(*fit["seen"], 400)
    axes.plot(t, curves.Logistic(**parameters)(t), color=colour, linewidth=1, alpha=0.9)
    if t_star and fit["located"]:
        axes.axvspan(*fit["midpoint_interval"], color=colour, alpha=0.12, linewidth=0)
        axes.axvline(fit["midpoint"], color=colour, linestyle=":", linewidth=1,
                     label=f"t* = {fit['midpoint']:.0f}")  # fmt: skip


def _fidelity_picture(result: dict):
    """By position with the fit, and around the handover."""
    s = result["students"]["student"]
    jumps = s["fidelity"]["handover"]
    caption = "thin: fitted logistic; dotted: t* with its 95% interval"
    figure, (by_token, *around) = _figure_of(result, 1 + bool(jumps), 3.0, caption)
    for who, (label, colour, dashes) in WRITERS.items():
        _draw_curve(by_token, s["fidelity"][who]["curve"], colour, label, dashes)
        _draw_fit(by_token, s["fidelity"][who]["fit"], colour)
    by_token.set(title="the teacher's confidence F(t)", xlabel=TOKEN,
                 ylabel="mean largest probability")  # fmt: skip
    by_token.legend(loc="best")
    for axes in around:
        lines = {"before": ("before", GREY, "s"), "student": ("after, student goes on", BLUE, "o"),
                 "teacher": ("after, teacher goes on", ORANGE, "^")}  # fmt: skip
        for key, (label, colour, marker) in lines.items():
            mean, half = _means([j[key] for j in jumps])
            axes.errorbar([j["tokens"] for j in jumps], mean, half, color=colour, marker=marker,
                          linewidth=1, capsize=2, label=label)  # fmt: skip
        axes.set(title=f"{jumps[0]['window']} tokens around a handover",
                 xlabel="tokens of the student before it", ylim=by_token.get_ylim())  # fmt: skip
        axes.legend(loc="best")
    return figure


def _completion_picture(result: dict):
    """Right answers when the teacher goes on; None without answers or lengths."""
    c = result["students"]["student"]["completion"]
    if c is None or not c["points"]:
        return None
    figure, (axes,) = _figure_of(result, 1, 2.9, "bars and bands: 95% intervals")
    for who in ("teacher", "student"):
        colour, ((mean,), (half,)) = WRITERS[who][1], _means([c[who]])
        axes.axhline(mean, color=colour, linestyle=DASHED, linewidth=1, label=f"{who} alone")
        axes.axhspan(mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
    mean, half = _means([c["teacher"]] + [p["accuracy"] for p in c["points"]])
    axes.errorbar([0] + [p["tokens"] for p in c["points"]], mean, half, color=GREEN, marker="o",
                  capsize=2, label="student begins, teacher goes on")  # fmt: skip
    axes.set(xlabel="tokens of the student before the teacher goes on", ylabel="right answers",
             title="can the teacher finish what the student began?", ylim=(0, 1))  # fmt: skip
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _signal_picture(result: dict):
    """Variance over the candidates, and the two parts of the gradient."""
    signal = result["students"]["student"]["signal"]
    caption = "lines: means with 95% intervals"
    figure, (variance, parts, share) = _figure_of(result, 3, 2.8, caption)
    _draw_curve(variance, signal["variance"], BLUE)
    _draw_curve(parts, signal["teacher_part"], ORANGE, "teacher's part")
    _draw_curve(parts, signal["own_part"], GREY, "student's own", DASHED)
    _draw_curve(share, signal["share"], ORANGE)
    variance.set(title="variance of log p_T", ylabel="nats²", xlabel=TOKEN)
    parts.set(title="norm of the gradient", xlabel=TOKEN)
    share.set(title="teacher's share", xlabel=TOKEN, ylim=(0, 1))
    for axes, room in ((variance, 1.0), (parts, 1.35)):  # for the legend, above
        axes.set_ylim(0, room * axes.get_ylim()[1])
    parts.legend(loc="upper right")
    return figure


def _compare_picture(result: dict):
    """Fidelity of all students, and their t*; None if there is only one."""
    names = ["before", *list(result["students"])[1:]]
    if len(names) < 2:
        return None
    figure, (fidelity, points) = _figure_of(
        result, 2, 2.2 + 0.22 * len(names), "thin: fitted logistic; bars: 95% intervals",
        width_ratios=[3, 2],
    )  # fmt: skip
    palette = [BLUE, RED, GREEN, PINK, SKY, ORANGE]
    dashes = ["-", DASHED, (0, (1, 1)), (0, (4, 1, 1, 1))]
    for k, (name, s) in enumerate(zip(names, result["students"].values(), strict=True)):
        fit, colour = s["fidelity"]["student"]["fit"], palette[k % len(palette)]
        curve = s["fidelity"]["student"]["curve"]
        _draw_curve(fidelity, curve, colour, name, dashes[k % len(dashes)])
        _draw_fit(fidelity, fit, colour, t_star=False)
        if fit and fit["located"]:
            t, (low, high) = fit["midpoint"], fit["midpoint_interval"]
            points.errorbar([t], [k], xerr=[[max(t - low, 0)], [max(high - t, 0)]], color=colour,
                            marker="o", capsize=3)  # fmt: skip
        else:
            points.annotate("no t*", (0.5, k), xycoords=("axes fraction", "data"), color=colour,
                            ha="center", va="center")  # fmt: skip
    fidelity.set(title="the teacher's confidence along the students' responses", xlabel=TOKEN,
                 ylabel="mean largest probability")  # fmt: skip
    fidelity.legend(loc="best")
    points.set_yticks(range(len(names)), names)
    points.set(title="t*", xlabel=TOKEN, ylim=(len(names) - 0.5, -0.5))
    return figure


PICTURES = {
    "margin": _margin_picture, "fidelity": _fidelity_picture, "completion": _completion_picture,
    "signal": _signal_picture, "compare": _compare_picture,
}  # fmt: skip


def draw(result: dict, out) -> list[str]:
    """Write the pictures that the report has data for into a folder; returns their file names.
    Without matplotlib: one line that says so, and none."""
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
