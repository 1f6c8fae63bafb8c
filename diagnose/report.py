"""The text of a diagnosis: what the command prints, and report.md."""

import textwrap

from diagnose import verdicts

MARKS = {"good": "+", "mixed": "~", "bad": "!", "-": " "}


def _conclusion(result: dict) -> str:
    """The method that fits and its command, or why there is none."""
    advice = result["command"]
    if verdicts.no_evidence(result) is not None:
        return f"Nothing can be concluded: {advice['why']}."
    if advice["method"] is None:
        return f"No method here fits: {advice['why']}."
    text = f"{advice['method']} fits: {advice['why']}."
    if result["students"]["student"]["completion"] is None:
        text += " (Without answers it is unknown whether the teacher is right.)"
    return f"{text}\nRun:  {advice['command']}"


def summary(result: dict) -> str:
    """What the command prints at its end. That nothing can be concluded is said first."""
    items = [(MARKS[v["grade"]], v["item"], v["says"]) for v in result["verdicts"]]
    items += [(" ", name, _moved(s)) for name, s in _others(result).items()]
    column = min(40, max(len(name) for _, name, _ in items))
    lines = [
        textwrap.fill(f"{mark} {name:{column}}  {says}", 100, subsequent_indent=" " * (column + 4))
        for mark, name, says in items
    ]
    conclusion = _conclusion(result)
    if verdicts.no_evidence(result) is None:
        lines += ["", conclusion]
    else:
        lines = [textwrap.fill(conclusion, 100, break_on_hyphens=False), "", *lines, ""]
    return "\n".join([*lines, f"wrote {result['settings']['out']}/report.json, report.md"])


def _others(result: dict) -> dict:
    """The students of --compare."""
    return {name: s for name, s in result["students"].items() if name != "student"}


def _moved(s: dict) -> str:
    """The confidence on another student's responses, and how far its t* moved."""
    mean, fit = s["fidelity"]["student"]["mean"], s["fidelity"]["student"]["fit"]
    text = f"teacher's confidence {mean['mean']:.3f} ± {mean['se'] or 0:.3f}"
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


def _pm(mean: dict | None) -> str:
    """Mean ± standard error; - for none.

    >>> _pm({"mean": 0.5, "se": 0.0123}), _pm({"mean": None, "se": None}), _pm(None)
    ('0.500 ± 0.012', '-', '-')
    """
    if mean is None or mean["mean"] is None:
        return "-"
    value = round(mean["mean"], 3) + 0.0  # no -0.000
    return f"{value:.3f}" + (f" ± {mean['se']:.3f}" if mean["se"] is not None else "")


def _fit_rows(result: dict) -> list[list]:
    """A row for every fitted curve, and the paper's."""
    s = result["students"]
    fits = {"student": s["student"]["fidelity"]["student"]["fit"],
            "the teacher's own": s["student"]["fidelity"]["teacher"]["fit"]}  # fmt: skip
    fits |= {name: other["fidelity"]["student"]["fit"] for name, other in _others(result).items()}
    names, rows = ("midpoint", "slope", "drop", "floor"), []
    for label, fit in fits.items():
        if fit is None:
            rows.append([label] + ["-"] * 6)
            continue
        cells = [f"{fit[k]:.4g} [{fit[k + '_interval'][0]:.4g}, {fit[k + '_interval'][1]:.4g}]"
                 for k in names]  # fmt: skip
        cells[1] += " (the limit: a step)" if fit["step"] else ""
        rows.append([label, *cells, f"{fit['r2']:.3f}", "yes" if fit["located"] else "no"])
    for label, fit in verdicts.PAPER_FITS.items():
        cells = [f"{fit[k]:.4g}" for k in names]
        rows.append([f"paper, {label}", *cells, verdicts.PAPER_R2, ""])
    return rows


def _rate_rows(students: dict) -> list[list]:
    """The single numbers of every student, a row each."""
    cells = {
        "accuracy": lambda s: s["completion"] and s["completion"]["student"],
        "rule fires": lambda s: s["margin"]["student"]["fired"],
        "gain above 6": lambda s: s["margin"]["student"]["gain_over_6"],
        "teacher's confidence": lambda s: s["fidelity"]["student"]["mean"],
        "hesitations": lambda s: s["lookahead"]["triggered"],
        "share at which the choice matters": lambda s: s["lookahead"].get("telling"),
        "reverse KL, nats": lambda s: s["compatibility"]["reverse_kl"],
        "truncated": lambda s: s["compatibility"]["truncated"],
        "tokens": lambda s: s["compatibility"]["tokens"],
    }
    return [[label, *(_pm(cell(s)) for s in students.values())] for label, cell in cells.items()]


def markdown(result: dict, pictures: list[str]) -> str:
    """report.md."""
    s, settings = result["students"]["student"], result["settings"]
    rows = [[v["item"], v["grade"], v["says"], v["threshold"], v["source"]]
            for v in result["verdicts"]]  # fmt: skip
    conclusion, *command = _conclusion(result).split("\nRun:  ")
    parts = [
        "# Can this teacher teach this student?",
        f"Student `{result['models']['--student']}`, teacher `{result['models']['--teacher']}`, "
        f"{result['problems']} problems, {settings['samples']} responses of each model to each, "
        f"seed {settings['seed']}. ± is one standard error, over problems.",
        f"**{conclusion}**", *(f"    {line}" for line in command),
        table(["item", "grade", "measurement", "threshold", "source"], rows),
        "good: no obstacle to plain on-policy distillation; bad: an obstacle, for which release or "
        "lookahead may be the remedy. Thresholds called ours were chosen with toy worlds in view.",
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        "## Students", table(["", *result["students"]], _rate_rows(result["students"])),
        "## Fidelity: F(t) = drop / (1 + exp(slope (t - t*))) + floor",
        table(["responses", "t*, tokens", "slope, per token", "drop", "floor", "R²", "located"],
              _fit_rows(result)),
        *(f"`{name}`: {_moved(other)}." for name, other in _others(result).items()),
    ]  # fmt: skip
    if s["completion"]:
        rows = [["0 (teacher alone)", "", _pm(s["completion"]["teacher"]), ""]]
        rows += [[p["tokens"], f"{p['running']:.2f}", _pm(p["accuracy"]), _pm(p["over_student"])]
                 for p in s["completion"]["points"]]  # fmt: skip
        rows.append(["all (student alone)", "", _pm(s["completion"]["student"]), ""])
        head = ["tokens of the student", "still running", "right", "minus student alone"]
        parts += ["## The teacher goes on from the student's prefix", table(head, rows)]
    jumps = s["fidelity"]["handover"]
    rows = [[j["tokens"], *(_pm(j[k]) for k in ("before", "teacher", "student", "over_student"))]
            for j in jumps]  # fmt: skip
    if jumps:
        head = ["tokens of the student", f"{jumps[0]['window']} tokens before",
                "as many after: teacher goes on", "after: student goes on", "difference of the two"]
        parts += ["## The teacher's confidence around that point", table(head, rows)]
    parts.append("All curves, with counts and standard errors, are in report.json.")
    return "\n\n".join(parts) + "\n"
