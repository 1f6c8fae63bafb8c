"""What the measurements of `diagnose.py` mean: a verdict per item, a command, a report to read.

Every verdict names its threshold and where that comes from. The papers give few; most are ours, and
were chosen with the toy worlds in view (README), so they say where to look, and prove nothing.

    good   no obstacle to plain on-policy distillation
    bad    an obstacle; release and lookahead are remedies for some
    mixed  in between
    -      not measured, or nothing to judge
"""

import shlex
import textwrap
from dataclasses import asdict, dataclass

import curves

# What the papers report. t in tokens of the response; slope per token.
PAPER_T = 1000.0  # theirs are given in thousands of tokens
PAPER_FITS = {
    "before OPD": {"drop": 0.3412, "slope": 0.2145 / PAPER_T, "midpoint": 7430.0, "floor": 0.4133},
    "after OPD": {"drop": 0.5452, "slope": 0.2608 / PAPER_T, "midpoint": 7040.0, "floor": 0.2294},
}
PAPER_R2 = 0.998
PAPER_RELEASE = {"gain_over_6": 0.79, "gain": 24.0, "median": 0.13}
PAPER_R = {"homogeneous": 0.987, "heterogeneous": 0.902}
RELEASE, LGR, OURS = "2605.13643", "2605.30833", "our choice"

# Thresholds, all ours.
FIRES = 0.25  # share of responses with a significant gain from which on the rule is worth having
TELLS = 0.1  # share of hesitations at which the choice matters to the teacher's confidence
WEAKENS = 0.5  # the teacher's part of the gradient at the end, over that at the beginning
SHARED = 0.9  # probability that both models give to the candidates that they share
STOPS = 0.5  # the teacher's probability of stopping where the student stops
RARE = 0.1  # share of responses that may be truncated, or that the teacher would have ended earlier


@dataclass
class Verdict:
    """One item: a grade (see above), what was found in a sentence or two, and by what measure."""

    item: str
    grade: str
    says: str
    threshold: str
    source: str


def _two(value, signed: bool = False) -> str:
    """A number for a sentence; "?" for none.

    >>> _two(0.12345), _two(123.4), _two(None), _two(0.5, signed=True)
    ('0.12', '123', '?', '+0.50')
    """
    if value is None:
        return "?"
    return f"{value:{'+' if signed else ''}{'.2f' if abs(value) < 10 else '.0f'}}"


def _percent(mean: dict | float | None) -> str:
    """A share for a sentence.

    >>> _percent(0.123), _percent({"mean": 1.0}), _percent(None)
    ('12%', '100%', '?')
    """
    value = mean["mean"] if isinstance(mean, dict) else mean
    return "?" if value is None else f"{value:.0%}"


def _sign(mean: dict | None) -> int:
    """1 or -1 if a mean's 95% interval (1.96 standard errors) lies above or below 0, else 0.

    >>> _sign({"mean": 0.3, "se": 0.1}), _sign({"mean": -0.1, "se": 0.1}), _sign(None)
    (1, 0, 0)
    """
    if mean is None or mean["mean"] is None or mean["se"] is None:
        return 0
    low, high = (mean["mean"] + half * mean["se"] for half in (-1.96, 1.96))
    return int(low > 0) - int(high < 0)


def _side(interval: list | None) -> int:
    """1 or -1 if an interval lies above or below 0, else 0 (also without one)."""
    if interval is None or None in interval:
        return 0
    return int(interval[0] > 0) - int(interval[1] < 0)


# ------------------------------------------------------------------------------------- the items
def _judge_teacher(s: dict) -> Verdict:
    """Is the teacher right where the student is not?"""
    rule = "95% interval of the difference of accuracies"
    if s["completion"] is None:
        return Verdict("teacher", "-", "The problems have no answers.", rule, OURS)
    over = s["completion"]["teacher_over_student"]
    ours, theirs = (_two(s["completion"][who]["mean"]) for who in ("student", "teacher"))
    says = (
        f"From scratch the teacher gets {theirs} right, the student {ours} (difference "
        f"{_two(over['mean'], True)} ± {_two(over['se'])}). Plain OPD heads for the teacher's "
        "level."
    )
    return Verdict("teacher", {1: "good", 0: "mixed", -1: "bad"}[_sign(over)], says, rule, OURS)


def _judge_completion(s: dict) -> Verdict:
    """From how far into the student's response can the teacher still go on better than it?"""
    rule = "95% interval of the difference to the student's own accuracy, at each length"
    points = s["completion"]["points"] if s["completion"] else []
    if not points:
        return Verdict("completion", "-", "Not measured.", rule, LGR)
    helps = [p["tokens"] for p in points if _sign(p["over_student"]) > 0]
    lost = _sign(points[-1]["over_teacher"]) < 0
    if not helps:
        says = "From no length of the student's prefix on does the teacher get more right than " \
               "the student alone."  # fmt: skip
        return Verdict("completion", "bad", says, rule, LGR)
    at = points[-1]
    says = (
        f"From the student's first {helps[-1]} tokens on the teacher still gets more right than "
        "the student alone"
    )
    says += f"; from {at['tokens']} on, {_two(at['accuracy']['mean'])} in all." if lost else "."
    everywhere = len(helps) == len(points)
    return Verdict("completion", "good" if everywhere else "mixed", says, rule, LGR)


def _judge_fidelity(s: dict) -> Verdict:
    """Does the teacher's confidence fall along the student's responses, and only there?"""
    rule = (
        f"a fall of at least {curves.FALL}, t* located (R² at least {curves.EXPLAINED}, interval "
        "inside what was seen)"
    )
    student, teacher = s["fidelity"]["student"], s["fidelity"]["teacher"]
    fit, own = student["fit"], teacher["fit"]
    if fit is None:
        return Verdict("fidelity", "-", "Too few problems or positions for a fit.", rule, LGR)
    if not fit["located"]:
        grade = "good" if (fit["fall_interval"][1] or 0) < curves.FALL else "mixed"
        says = (
            f"The teacher's confidence is {_two(student['mean']['mean'])} on average and falls by "
            f"{_two(fit['fall'])}: no point t* where it is lost."
        )
        return Verdict("fidelity", grade, says, rule, LGR)
    low, high = fit["midpoint_interval"]
    says = f"The teacher's confidence falls by {_two(fit['fall'])}, half of it by t* = " \
           f"{fit['midpoint']:.0f} tokens [{low:.0f}, {high:.0f}]; "  # fmt: skip
    if own is None:
        says += "of its own responses too little is known."
    elif own["located"]:
        says += f"on its own responses by {_two(own['fall'])} at {own['midpoint']:.0f}, so "
        says += "it is not for the student's prefixes alone." if own["fall"] > fit["fall"] / 2 \
            else "the student's prefixes make it worse."  # fmt: skip
    else:
        says += f"on its own responses by {_two(own['fall'])} and at no such point: it is the " \
                "student's prefixes that lose it."  # fmt: skip
    return Verdict("fidelity", "bad", says, rule, LGR)


def _judge_release(s: dict) -> Verdict:
    """Would the release rule act?"""
    paper = PAPER_RELEASE
    rule = f"a BIC gain above 6 in {FIRES:.0%} of the responses (the paper's models: " \
           f"{paper['gain_over_6']:.0%})"  # fmt: skip
    m = s["margin"]["student"]
    says = f"The rule would stop {_percent(m['fired'])} of the student's responses"
    if m["release_at"]["median"] is not None:
        says += f", half of them before {m['release_at']['median']:.0%} of their length"
    says += (
        f"; {_percent(m['gain_over_6'])} with a gain above 6 (mean gain {_two(m['gain']['mean'])}; "
        f"the paper: {paper['gain_over_6']:.0%}, {paper['gain']:.0f}, median at "
        f"{paper['median']:.0%}). Of the teacher's own: "
        f"{_percent(s['margin']['teacher']['gain_over_6'])}."
    )
    grade = "bad" if m["gain_over_6"]["mean"] >= FIRES else "good"
    return Verdict("margin", grade, says, rule, RELEASE)


def _judge_signal(s: dict) -> Verdict:
    """Does the gradient still know the teacher at the end?"""
    rule = f"share in the last quarter over the first at least {WEAKENS}"
    quarters = s["signal"]["share_by_quarter"]["mean"]
    if None in quarters:
        return Verdict("signal", "-", "The responses are too short.", rule, OURS)
    says = "The teacher's part of the gradient, by quarter of the response: " \
           f"{', '.join(_percent(x) for x in quarters)}."  # fmt: skip
    return Verdict("signal", "good" if quarters[3] >= WEAKENS * quarters[0] else "bad", says,
                   rule, f"{LGR}, Proposition 1; threshold ours")  # fmt: skip


def _judge_lookahead(s: dict) -> Verdict:
    """Would lookahead find anything, and would following it be right?"""
    rule = (
        f"the choice matters at {TELLS:.0%} of the hesitations; 95% interval of its correlation "
        "with being right"
    )
    found = s["lookahead"]
    if found["why_not"]:
        return Verdict("lookahead", "-", f"Not measured: {found['why_not']}.", rule, LGR)
    says = (
        f"The student hesitates at {_percent(found['triggered'])} of the tokens; at "
        f"{_percent(found['telling'])} of these its choice moves the teacher's next confidence."
    )
    if (found["telling"]["mean"] or 0) < TELLS:
        return Verdict("lookahead", "good", says + " LGR would have nothing to reward.", rule, LGR)
    if found["competence"] is None:
        says += " Whether confident choices are right ones is unknown without answers."
        return Verdict("lookahead", "-", says, rule, LGR)
    r, (low, high) = found["competence"]["r"], found["competence"]["r_interval"]
    which = _side([low, high])
    says += {
        1: " Responses that chose more confident branches are right more often",
        0: " Whether confident branches are right ones cannot be told",
        -1: " Responses that chose more confident branches are WRONG more often: LGR would mislead",
    }[which] + f" (r = {_two(r)} [{_two(low)}, {_two(high)}])."
    return Verdict("lookahead", {1: "bad", 0: "mixed", -1: "mixed"}[which], says, rule, OURS)


def _judge_compatibility(s: dict) -> list[Verdict]:
    """Do the two models speak the same language?"""
    c = s["compatibility"]
    r, slope = c["log_probs"]["r"], c["log_probs"]["slope"]
    middle = sum(PAPER_R.values()) / 2
    log_probs = Verdict(
        "log-probs", "-" if r is None else "good" if r >= middle else "mixed",
        f"Log-probs of the student's tokens correlate with r = {_two(r)} (slope {_two(slope)}; the "
        f"papers' pairs: homogeneous {PAPER_R['homogeneous']}, heterogeneous "
        f"{PAPER_R['heterogeneous']}).",
        f"r at least {middle:.3f}, half-way between those two", OURS,
    )  # fmt: skip
    masses = [c["student_mass"]["mean"], c["teacher_mass"]["mean"]]
    overlap = Verdict(
        "overlap", "good" if min(masses) >= SHARED else "mixed",
        f"Of the likeliest tokens of either model {_percent(c['overlap'])} are the same; the "
        f"student gives these {_percent(masses[0])}, the teacher {_percent(masses[1])}.",
        f"both at least {SHARED:.0%}", OURS,
    )  # fmt: skip
    stop, earlier = c["stop_at_end"]["teacher"]["mean"], c["teacher_stops_earlier"]["mean"]
    agree = stop is not None and stop >= STOPS and earlier <= RARE
    stopping = Verdict(
        "stopping", "-" if stop is None else "good" if agree else "bad",
        f"Where the student ends, the teacher would with probability {_two(stop)} (the student: "
        f"{_two(c['stop_at_end']['student']['mean'])}); in {_percent(earlier)} of the responses it "
        "would rather have ended earlier.",
        f"at least {STOPS}; at most {RARE:.0%}", OURS,
    )  # fmt: skip
    truncated = Verdict(
        "truncated", "good" if c["truncated"]["mean"] <= RARE else "bad",
        f"The length limit ends {_percent(c['truncated'])} of the responses (mean length "
        f"{_two(c['tokens']['mean'])} tokens).", f"at most {RARE:.0%}", OURS,
    )  # fmt: skip
    verdicts = [log_probs, overlap, stopping, truncated]
    if c["answers"] is not None:
        n = c["answers"]["samples"]
        accuracy, at_n = c["answers"]["accuracy"], c["answers"]["pass_at_n"]
        grade = "bad" if at_n == 0 else "good" if at_n >= RARE else "mixed"
        says = (
            f"On its own the student gets {_two(accuracy)} right, and {_two(at_n)} of the problems "
            f"in at least one of {n} attempts."
        )
        verdicts.append(Verdict("student", grade, says, f"pass@{n} at least {RARE:.0%}", OURS))
    return verdicts


def _judge_text(result: dict) -> list[Verdict]:
    """Vocabulary, stop tokens and template, which do not depend on what was sampled."""
    v, template = result["vocabulary"], result["template"]
    stops = v["stop_ids"]
    same_stops = set(stops["student"]) == set(stops["teacher"])
    vocabulary = Verdict(
        "vocabulary", "good" if same_stops else "mixed",
        f"{v['shared']} tokens are shared (rows of the heads: {v['rows']['student']} and "
        f"{v['rows']['teacher']}). Stop tokens: {stops['student']} and {stops['teacher']}"
        + ("." if same_stops else "; all of them end a response in training, too."),
        "the same stop tokens", OURS,
    )  # fmt: skip
    says = f"The teacher's own template renders {template['same']:.0%} of the prompts as the " \
           "student's does" + (f" ({template['why']})" if template["why"] else "") + (
               "." if template["same"] == 1 else "; training gives it the student's.")  # fmt: skip
    grade = "good" if template["same"] == 1 else "mixed"
    return [vocabulary, Verdict("template", grade, says, "all", OURS)]


def judge(result: dict) -> tuple[list[dict], dict]:
    """Verdicts on the first student, and {"method", "why", "command"}: what to run, if anything."""
    s = result["students"]["student"]
    verdicts = [
        _judge_teacher(s), _judge_completion(s), _judge_fidelity(s), _judge_release(s),
        _judge_signal(s), _judge_lookahead(s), *_judge_compatibility(s), *_judge_text(result),
    ]  # fmt: skip
    return [asdict(v) for v in verdicts], suggest(result, {v.item: v for v in verdicts})


def suggest(result: dict, verdicts: dict[str, Verdict]) -> dict:
    """The method that fits: release where the teacher gets lost, lookahead where a confident
    choice exists and is, as far as answers tell, the right one, neither where neither; nothing
    where the teacher is sure, and worse than the student."""
    s = result["students"]["student"]
    lost = [name for name in ("fidelity", "margin") if verdicts[name].grade == "bad"]
    found = s["lookahead"]
    tells = not found["why_not"] and (found["telling"]["mean"] or 0) >= TELLS
    if tells and found["competence"] is not None:
        tells = _side(found["competence"]["r_interval"]) > 0
    worse = verdicts["teacher"].grade == "bad"
    if worse and not lost and not tells:
        why = "the teacher is worse than the student here and nothing in its distribution shows " \
              "where: none of these methods can tell its errors from its knowledge"  # fmt: skip
        return {"method": None, "why": why, "command": None}
    method = {(0, 0): "opd", (1, 0): "release", (0, 1): "lgr", (1, 1): "release+lgr"}[
        (bool(lost), tells)
    ]
    why = [f"the teacher gets lost along the response ({' and '.join(lost)})"] if lost else []
    why += ["one step of lookahead tells choices apart"] if tells else []
    words = ["torchrun", "train.py", "--method", method]
    for flag, value in result["settings"]["given"].items():
        if value is True:
            words.append(flag)
        else:  # a value that looks like a flag needs the =
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    others = {v.item for v in verdicts.values() if v.grade == "bad"}
    others = sorted(others - {"teacher", "fidelity", "margin", "lookahead"})
    plain = "nothing stands in the way of the plain form"
    if others:
        names = ", ".join(others)
        plain = f"what stands in the way ({names}) is nothing that release or lookahead would mend"
    if verdicts["teacher"].grade == "mixed":
        plain += ", though the teacher is not measurably better than the student"
    why = "; ".join(why) or plain
    return {"method": method, "why": why, "command": shlex.join(words)}


# --------------------------------------------------------------------------------------- the text
MARKS = {"good": "+", "mixed": "~", "bad": "!", "-": " "}


def _conclusion(result: dict) -> str:
    """The last word, in a sentence or two."""
    found = result["command"]
    if found["method"] is None:
        return f"No method here fits: {found['why']}."
    text = f"{found['method']} fits: {found['why']}."
    if result["students"]["student"]["completion"] is None:
        text += " (Without answers nobody knows whether the teacher is right.)"
    return f"{text}\nRun:  {found['command']}"


def summary(result: dict) -> str:
    """What the command prints at its end."""
    items = [(MARKS[v["grade"]], v["item"], v["says"]) for v in result["verdicts"]]
    items += [(" ", name, _moved(s)) for name, s in _others(result).items()]
    column = min(40, max(len(name) for _, name, _ in items))
    lines = [
        textwrap.fill(f"{mark} {name:{column}}  {says}", 100, subsequent_indent=" " * (column + 4))
        for mark, name, says in items
    ]
    out = result["settings"]["out"]
    return "\n".join([*lines, "", _conclusion(result), f"wrote {out}/report.json, report.md"])


def _others(result: dict) -> dict:
    """The students of --compare."""
    return {name: s for name, s in result["students"].items() if name != "student"}


def _moved(s: dict) -> str:
    """What became of t* and of the confidence in another student."""
    mean = s["fidelity"]["student"]["mean"]
    text = f"teacher's confidence {mean['mean']:.3f} ± {mean['se'] or 0:.3f}"
    fit = s["fidelity"]["student"]["fit"]
    if s["shift"] is None:
        return text + (", t* located only here" if fit and fit["located"] else ", no t*")
    low, high = s["shift"]["interval"]
    what = "moved" if s["shift"]["moved"] else "not moved by more than half a bin"
    return f"{text}, t* = {fit['midpoint']:.0f}: {what} ({s['shift']['tokens']:+.1f} tokens " \
           f"[{low:+.1f}, {high:+.1f}])"  # fmt: skip


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table; | and line breaks inside cells are harmless."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(str(x).replace("|", "\\|").split()) for x in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _pm(mean: dict) -> str:
    """Mean ± standard error.

    >>> _pm({"mean": 0.5, "se": 0.0123}), _pm({"mean": None, "se": None})
    ('0.500 ± 0.012', '-')
    """
    if mean["mean"] is None:
        return "-"
    value = round(mean["mean"], 3) + 0.0  # no -0.000
    return f"{value:.3f}" + (f" ± {mean['se']:.3f}" if mean["se"] is not None else "")


def _fit_rows(result: dict) -> list[list]:
    """A line for every fitted curve, and the paper's."""
    rows = []
    for name, s in result["students"].items():
        for who in ("student", "teacher") if name == "student" else ("student",):
            fit = s["fidelity"][who]["fit"]
            label = "the teacher's own" if who == "teacher" else name
            if fit is None:
                rows.append([label] + ["-"] * 6)
                continue
            spans = [f"{fit[k]:.4g} [{fit[k + '_interval'][0]:.4g}, {fit[k + '_interval'][1]:.4g}]"
                     for k in ("midpoint", "slope", "drop", "floor")]  # fmt: skip
            spans[1] += " (the limit: a step)" if fit["step"] else ""
            rows.append([label, *spans, f"{fit['r2']:.3f}", "yes" if fit["located"] else "no"])
    for name, fit in PAPER_FITS.items():
        spans = [f"{fit[k]:.4g}" for k in ("midpoint", "slope", "drop", "floor")]
        rows.append([f"paper, {name}", *spans, PAPER_R2, ""])
    return rows


def _rate_rows(result: dict) -> list[list]:
    """Figures of every student that are single numbers, a line each."""
    cells = {
        "accuracy": lambda s: _pm(s["completion"]["student"]) if s["completion"] else "-",
        "rule fires": lambda s: _pm(s["margin"]["student"]["fired"]),
        "gain above 6": lambda s: _pm(s["margin"]["student"]["gain_over_6"]),
        "teacher's confidence": lambda s: _pm(s["fidelity"]["student"]["mean"]),
        "hesitations": lambda s: _pm(s["lookahead"]["triggered"]),
        "of which telling": lambda s: _pm(s["lookahead"].get("telling", {"mean": None})),
        "reverse KL, nats": lambda s: _pm(s["compatibility"]["reverse_kl"]),
        "truncated": lambda s: _pm(s["compatibility"]["truncated"]),
        "tokens": lambda s: _pm(s["compatibility"]["tokens"]),
    }
    names = list(result["students"])
    return [["", *names]] + [
        [label, *(cell(result["students"][name]) for name in names)]
        for label, cell in cells.items()
    ]


def markdown(result: dict, pictures: list[str]) -> str:
    """report.md."""
    s, settings = result["students"]["student"], result["settings"]
    verdicts = [[v["item"], v["grade"], v["says"], v["threshold"], v["source"]]
                for v in result["verdicts"]]  # fmt: skip
    parts = [
        "# Can this teacher teach this student?",
        f"Student `{result['models']['--student']}`, teacher `{result['models']['--teacher']}`, "
        f"{result['problems']} problems, {settings['samples']} responses of each model to each, "
        f"seed {settings['seed']}. ± is one standard error, over problems.",
        "**" + _conclusion(result).replace("\nRun:  ", "**\n\n    ") +
        ("" if result["command"]["command"] else "**"),
        table(["item", "grade", "what was found", "threshold", "source"], verdicts),
        "good: no obstacle to plain on-policy distillation; bad: one, for which release or "
        "lookahead may be the remedy. Thresholds called ours were chosen with toy worlds in view.",
    ]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    head, *rows = _rate_rows(result)
    parts += ["## Students", table(head, rows)]
    parts += [
        "## Fidelity: F(t) = drop / (1 + exp(slope (t - t*))) + floor",
        table(["responses", "t*, tokens", "slope, per token", "drop", "floor", "R²", "located"],
              _fit_rows(result)),
    ]  # fmt: skip
    for name, other in _others(result).items():
        parts.append(f"`{name}`: {_moved(other)}.")
    if s["completion"]:
        ends = [["0 (teacher alone)", "", _pm(s["completion"]["teacher"]), ""]]
        rows = [[p["tokens"], f"{p['running']:.2f}", _pm(p["accuracy"]), _pm(p["over_student"])]
                for p in s["completion"]["points"]]  # fmt: skip
        ends.append(["all (student alone)", "", _pm(s["completion"]["student"]), ""])
        parts += ["## The teacher goes on from the student's prefix", table(
            ["tokens of the student", "still running", "right", "minus student alone"],
            [ends[0], *rows, ends[1]])]  # fmt: skip
    rows = [[j["tokens"], *(_pm(j[k]) for k in ("before", "teacher", "student", "over_student"))]
            for j in s["fidelity"]["handover"]]  # fmt: skip
    if rows:
        parts += ["## Its confidence around that point", table(
            ["tokens of the student", f"{s['fidelity']['handover'][0]['window']} tokens before",
             "as many after: teacher goes on",
             "after: student goes on", "difference of the two"], rows)]  # fmt: skip
    parts.append("All curves, with counts and standard errors, are in report.json.")
    return "\n\n".join(parts) + "\n"
