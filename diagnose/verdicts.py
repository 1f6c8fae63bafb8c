"""What the measurements mean: a verdict per item, and the method that fits.

Every verdict names its threshold and the source of it. The papers give few. Most are ours and were
chosen with the toy worlds in view, so they say where to look and prove nothing.

    good   no obstacle to plain on-policy distillation
    bad    an obstacle; release and lookahead are remedies for some
    mixed  in between
    -      not measured, or nothing to judge
"""

import shlex
from dataclasses import asdict, dataclass

from diagnose import curves

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
FIRES = 0.25  # share of responses with a significant gain at which the rule is worth having
TELLS = 0.1  # share of hesitations at which the choice matters to the teacher's confidence
WEAKENS = 0.5  # the teacher's part of the gradient at the end, over that at the beginning
SHARED = 0.9  # probability that both models give to the candidates that they share
STOPS = 0.5  # the teacher's probability of stopping where the student stops
RARE = 0.1  # share of responses that may be truncated, or that the teacher would have ended earlier
CUT_OFF = 0.95  # share of truncated responses at which nothing can be concluded


@dataclass
class Verdict:
    """One item: a grade (see above), the measurement in a sentence or two, and its threshold."""

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


def _side(low, high) -> int:
    """1 or -1 if an interval lies above or below 0, else 0; 0 where an end is None."""
    if low is None or high is None:
        return 0
    return int(low > 0) - int(high < 0)


def _sign(mean: dict) -> int:
    """The side of a mean's 95% interval, 1.96 standard errors.

    >>> _sign({"mean": 0.3, "se": 0.1}), _sign({"mean": -0.1, "se": 0.1})
    (1, 0)
    """
    if mean["mean"] is None or mean["se"] is None:
        return 0
    return _side(*(mean["mean"] + half * mean["se"] for half in (-1.96, 1.96)))


# ------------------------------------------------------------------------------------- the items
def _judge_teacher(s: dict) -> Verdict:
    """Is the teacher right where the student is not?"""
    rule = "95% interval of the difference of accuracies"
    if s["completion"] is None:
        return Verdict("teacher", "-", "The problems have no answers.", rule, OURS)
    over = s["completion"]["teacher_over_student"]
    student, teacher = (_two(s["completion"][who]["mean"]) for who in ("student", "teacher"))
    says = (
        f"From scratch the teacher gets {teacher} right, the student {student} (difference "
        f"{_two(over['mean'], True)} ± {_two(over['se'])}). Plain OPD heads for the teacher's "
        "level."
    )
    return Verdict("teacher", {1: "good", 0: "mixed", -1: "bad"}[_sign(over)], says, rule, OURS)


def _judge_completion(s: dict) -> Verdict:
    """From how far into the student's response can the teacher still do better than it?"""
    rule = "95% interval of the difference to the student's own accuracy, at each length"
    points = s["completion"]["points"] if s["completion"] else []
    if not points:
        return Verdict("completion", "-", "Not measured.", rule, LGR)
    helps = [p["tokens"] for p in points if _sign(p["over_student"]) > 0]
    if not helps:
        says = "From no prefix of the student does the teacher get more right than the student " \
               "alone."  # fmt: skip
        return Verdict("completion", "bad", says, rule, LGR)
    last = points[-1]
    says = f"From the student's first {helps[-1]} tokens the teacher still gets more right than " \
           "the student alone"  # fmt: skip
    if _sign(last["over_teacher"]) < 0:
        says += f"; from its first {last['tokens']} it gets {_two(last['accuracy']['mean'])} " \
                "right, less than from scratch"  # fmt: skip
    grade = "good" if len(helps) == len(points) else "mixed"
    return Verdict("completion", grade, says + ".", rule, LGR)


def _judge_fidelity(s: dict) -> Verdict:
    """Does the teacher's confidence fall along the student's responses, and only there?"""
    rule = f"a fall of at least {curves.FALL}, t* located (R² at least {curves.EXPLAINED}, " \
           "interval inside the fitted range)"  # fmt: skip
    fit, control = (s["fidelity"][who]["fit"] for who in ("student", "teacher"))
    if fit is None:
        return Verdict("fidelity", "-", "Too few problems or positions for a fit.", rule, LGR)
    if not fit["located"]:
        grade = "good" if (fit["fall_interval"][1] or 0) < curves.FALL else "mixed"
        says = (
            f"The teacher's confidence is {_two(s['fidelity']['student']['mean']['mean'])} on "
            f"average and falls by {_two(fit['fall'])}; there is no point t* at which it is lost."
        )
        return Verdict("fidelity", grade, says, rule, LGR)
    low, high = fit["midpoint_interval"]
    says = f"The teacher's confidence falls by {_two(fit['fall'])}, half of it by t* = " \
           f"{fit['midpoint']:.0f} tokens [{low:.0f}, {high:.0f}]. "  # fmt: skip
    if control is None:
        says += "Its own responses are too few or too short for a fit."
    elif not control["located"]:
        says += f"On its own responses it falls by {_two(control['fall'])}, without such a " \
                "point: the student's prefixes are the cause."  # fmt: skip
    else:
        says += f"On its own responses it falls by {_two(control['fall'])}, half of it by " \
                f"{control['midpoint']:.0f}: the student's prefixes "  # fmt: skip
        most = control["fall"] > fit["fall"] / 2
        says += "are not the only cause." if most else "make it worse."
    return Verdict("fidelity", "bad", says, rule, LGR)


def _judge_release(s: dict) -> Verdict:
    """Would the release rule act?"""
    paper, m, own = PAPER_RELEASE, s["margin"]["student"], s["margin"]["teacher"]
    rule = f"a BIC gain above 6 in {FIRES:.0%} of the responses (the paper's models: " \
           f"{paper['gain_over_6']:.0%})"  # fmt: skip
    says = f"The rule would stop {_percent(m['fired'])} of the student's responses"
    if m["release_at"]["median"] is not None:
        says += f", half of these before {m['release_at']['median']:.0%} of their length; "
        says += f"{_percent(m['gain_over_6'])} with a gain above 6 (mean {_two(m['gain']['mean'])})"
    says += (
        f". Of the teacher's own: {_percent(own['fired'])}; {_percent(own['gain_over_6'])} with a "
        f"gain above 6. The paper: {paper['gain_over_6']:.0%} above 6, mean gain "
        f"{paper['gain']:.0f}, median at {paper['median']:.0%}."
    )
    grade = "bad" if m["gain_over_6"]["mean"] >= FIRES else "good"
    return Verdict("margin", grade, says, rule, RELEASE)


def _judge_signal(s: dict) -> Verdict:
    """Does the gradient still depend on the teacher at the end?"""
    rule = f"share in the last quarter over the first at least {WEAKENS}"
    quarters = s["signal"]["share_by_quarter"]["mean"]
    if None in quarters:
        return Verdict("signal", "-", "The responses are too short.", rule, OURS)
    says = "The teacher's part of the gradient, by quarter of the response: " \
           f"{', '.join(_percent(x) for x in quarters)}."  # fmt: skip
    grade = "good" if quarters[3] >= WEAKENS * quarters[0] else "bad"
    return Verdict("signal", grade, says, rule, f"{LGR}, Proposition 1; threshold ours")


def _judge_lookahead(s: dict) -> Verdict:
    """Would lookahead see differences, and would following them be right?"""
    rule = f"the choice matters at {TELLS:.0%} of the hesitations; 95% interval of its " \
           "correlation with being right"  # fmt: skip
    ahead = s["lookahead"]
    if ahead["why_not"]:
        return Verdict("lookahead", "-", f"Not measured: {ahead['why_not']}.", rule, LGR)
    says = (
        f"The student hesitates at {_percent(ahead['triggered'])} of the tokens; at "
        f"{_percent(ahead['telling'])} of these its choice moves the teacher's next confidence."
    )
    if not _tells(ahead):
        return Verdict("lookahead", "good", says + " LGR would have nothing to reward.", rule, LGR)
    if ahead["competence"] is None:
        says += " Whether confident choices are right ones is unknown without answers."
        return Verdict("lookahead", "-", says, rule, LGR)
    r, (low, high) = ahead["competence"]["r"], ahead["competence"]["r_interval"]
    side = _side(low, high)
    says += {
        1: " Responses that chose more confident branches are right more often",
        0: " Whether confident branches are the right ones cannot be told",
        -1: " Responses that chose more confident branches are WRONG more often: LGR would mislead",
    }[side] + f" (r = {_two(r)} [{_two(low)}, {_two(high)}])."
    return Verdict("lookahead", "bad" if side > 0 else "mixed", says, rule, OURS)


def _tells(ahead: dict) -> bool:
    """Whether the student's choices matter to the teacher's confidence often enough."""
    return not ahead["why_not"] and (ahead["telling"]["mean"] or 0) >= TELLS


def _judge_compatibility(s: dict) -> list[Verdict]:
    """Do the two models agree on tokens and stopping, and does the student get anything right?"""
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
        f"{_percent(c['overlap'])} of the student's likeliest tokens are among the teacher's; the "
        f"student gives these a probability of {_percent(masses[0])}, the teacher of "
        f"{_percent(masses[1])}.",
        f"both at least {SHARED:.0%}", OURS,
    )  # fmt: skip
    stop, earlier = c["stop_at_end"]["teacher"]["mean"], c["teacher_stops_earlier"]["mean"]
    agree = stop is not None and stop >= STOPS and earlier <= RARE
    stopping = Verdict(
        "stopping", "-" if stop is None else "good" if agree else "bad",
        f"Where the student stops, the teacher would with probability {_two(stop)} (the student: "
        f"{_two(c['stop_at_end']['student']['mean'])}); in {_percent(earlier)} of the responses it "
        "would have stopped earlier.",
        f"at least {STOPS}; at most {RARE:.0%}", OURS,
    )  # fmt: skip
    truncated = Verdict(
        "truncated", "good" if c["truncated"]["mean"] <= RARE else "bad",
        f"The length limit ends {_percent(c['truncated'])} of the responses (mean length "
        f"{_two(c['tokens']['mean'])} tokens).", f"at most {RARE:.0%}", OURS,
    )  # fmt: skip
    verdicts = [log_probs, overlap, stopping, truncated]
    if c["answers"] is not None:
        n, at_n = c["answers"]["samples"], c["answers"]["pass_at_n"]
        grade = "bad" if at_n == 0 else "good" if at_n >= RARE else "mixed"
        says = (
            f"On its own the student gets {_two(c['answers']['accuracy'])} right, and {_two(at_n)} "
            f"of the problems in at least one of {n} attempts."
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
        + ("." if same_stops else "; in training all of them end a response."),
        "the same stop tokens", OURS,
    )  # fmt: skip
    same = template["same"] == 1
    says = f"The teacher's own template renders {template['same']:.0%} of the prompts as the " \
           "student's does" + (f" ({template['why']})" if template["why"] else "") + (
               "." if same else "; in training the teacher reads the student's.")  # fmt: skip
    return [vocabulary, Verdict("template", "good" if same else "mixed", says, "all", OURS)]


# ------------------------------------------------------------------------------------ the advice
def judge(result: dict) -> tuple[list[dict], dict]:
    """Verdicts on the first student, and {"method", "why", "command"}: what to run, if anything."""
    s = result["students"]["student"]
    verdicts = [
        _judge_teacher(s), _judge_completion(s), _judge_fidelity(s), _judge_release(s),
        _judge_signal(s), _judge_lookahead(s), *_judge_compatibility(s), *_judge_text(result),
    ]  # fmt: skip
    return [asdict(v) for v in verdicts], suggest(result, {v.item: v for v in verdicts})


def no_evidence(result: dict) -> str | None:
    """Why no method can be suggested from these responses, and what to change; None if one can."""
    s, settings = result["students"]["student"], result["settings"]
    cut_off, c = s["compatibility"]["truncated"], s["completion"]
    longer = f"a larger --max-new-tokens (now {settings['max_new_tokens']})"
    if cut_off["mean"] >= CUT_OFF:
        return f"the length limit ends {_percent(cut_off)} of the student's responses. Try {longer}"
    if c is not None and c["student"]["mean"] == c["teacher"]["mean"] == 0:
        return (
            "no response of either model is right. Try easier problems (--problems, --difficulty), "
            f"a lower --temperature (now {settings['temperature']}) or {longer}, which ends "
            f"{_percent(cut_off)} of the student's responses"
        )
    return None


def suggest(result: dict, verdicts: dict[str, Verdict]) -> dict:
    """The method that fits: release where the teacher gets lost, lookahead where confident choices
    exist and are, if there are answers, the right ones, both, or neither. No method where there is
    no evidence, or where the teacher is confident and worse than the student."""
    if (why := no_evidence(result)) is not None:
        return {"method": None, "why": why, "command": None}
    lost = [name for name in ("fidelity", "margin") if verdicts[name].grade == "bad"]
    ahead = result["students"]["student"]["lookahead"]
    tells = _tells(ahead)
    if tells and ahead["competence"] is not None:
        tells = _side(*ahead["competence"]["r_interval"]) > 0
    if verdicts["teacher"].grade == "bad" and not lost and not tells:
        why = "the teacher is worse than the student here and nothing in its distribution shows " \
              "where: none of these methods can tell its errors from its knowledge"  # fmt: skip
        return {"method": None, "why": why, "command": None}
    method = "+".join(["release"] * bool(lost) + ["lgr"] * tells) or "opd"
    reasons = [f"the teacher gets lost along the response ({' and '.join(lost)})"] if lost else []
    reasons += ["one step of lookahead tells choices apart"] if tells else []
    words = ["torchrun", "train.py", "--method", method]
    for flag, value in result["settings"]["given"].items():
        if value is True:
            words.append(flag)
        else:  # a value that looks like a flag needs the =
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return {"method": method, "why": "; ".join(reasons) or _plain(verdicts),
            "command": shlex.join(words)}  # fmt: skip


def _plain(verdicts: dict[str, Verdict]) -> str:
    """What can be said for the plain form."""
    others = {v.item for v in verdicts.values() if v.grade == "bad"}
    others = sorted(others - {"teacher", "fidelity", "margin", "lookahead"})
    why = "nothing stands in the way of plain on-policy distillation"
    if others:
        why = f"release and lookahead do not mend what stands in the way ({', '.join(others)})"
    if verdicts["teacher"].grade == "mixed":
        why += ", though the teacher is not measurably better than the student"
    return why
