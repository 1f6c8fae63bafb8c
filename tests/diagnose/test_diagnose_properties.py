"""Properties of the public names of diagnose."""

import contextlib
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from diagnoses import tiny
from hypothesis import assume
from hypothesis import strategies as st
from inputs import TEMPLATE, byte_tokenizer
from properties import TOYS, parsed, prop, seeds, small, spelling, strict, within
from runs import parse

import harness
import toy
import train
from diagnose import command, pictures, report, verdicts


# ----------------------------------------------------------------------- diagnose, report, pictures
@prop("diagnose.check_out", examples=40,
      names=st.sets(st.sampled_from(["report.json", "report.md", "thesis.txt", "config.json"])),
      there=st.booleans(), file=st.booleans())
def test_only_an_earlier_report_is_in_nobodys_way(names, there, file):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "a", "b")
        if there:
            out.parent.mkdir()
            out.write_text("") if file else out.mkdir()
        for name in names if out.is_dir() else ():
            (out / name).write_text("")
        before = sorted(Path(folder).rglob("*"))
        fine = not there or not (file or (names and "report.json" not in names))
        try:
            command.check_out(out)
            assert fine
        except ValueError as error:
            assert not fine and str(out) in str(error)
        assert sorted(Path(folder).rglob("*")) == before


def good_value(action):
    """Values that a flag takes, as words of a command line."""
    if action.nargs == 0:
        return st.just([])
    if action.choices:
        return st.sampled_from(action.choices).map(lambda x: [x])
    if limits := getattr(action.type, "limits", None):
        kind, low, high = limits
        some = {kind(low), kind(min(high, low + 1)), kind(min(high, low + 7))}
        return st.sampled_from(sorted(some)).map(lambda x: [str(x)])
    return st.sampled_from([["a"], ["x/y z"], ["é|'"], ["runs/a/student"], ["$(a)`b`"]])


ACTIONS = [a for a in command.make_parser()._actions if a.dest not in ("help", "device")]
flags_of_diagnose = st.lists(st.sampled_from(ACTIONS).flatmap(
    lambda a: good_value(a).map(lambda words: [a.option_strings[-1], *words])
) | st.sampled_from([["--top-k", "5"], ["--compare", "a", "a/student"]]), max_size=7)  # fmt: skip
words_of_diagnose = st.sampled_from(
    ["0", "-1", "nan", "1e99", "", "\0", "x", "student", "--", "--compare", "--top", "--method"]
) | st.text(max_size=3)


REPEATED = [*command.SHARED, *(row[0] for row in command.METHODS)]


def as_words(given):
    return [w for flag, x in given.items() for w in ([flag] if x is True else [flag, str(x)])]


@prop("diagnose.parse", "diagnose.make_parser", "diagnose.short", examples=200,
      chosen=flags_of_diagnose, extra=st.lists(words_of_diagnose, max_size=1),
      method=st.sampled_from(sorted(train.METHODS)))
def test_diagnose_parses_or_refuses_and_repeats_what_was_given(chosen, extra, method):
    assume(not any(word.startswith(("-h", "--h")) for word in extra))
    args = parsed(command.parse, "diagnose", [*sum(chosen, []), *extra])
    if args is None:
        assert chosen or extra
        return
    values = strict(vars(args))
    assert all(math.isfinite(v) for v in values.values() if isinstance(v, float))
    open_ones = {"student", "teacher", "problems"}
    assert {k for k, v in values.items() if v is None} <= open_ones
    assert args.top_k >= max(args.margin_top_k, args.lgr_top_k) and args.count >= 2
    assert args.problems is None or args.student and args.teacher
    names = [command.short(path) for path in args.compare]
    assert len(set(names)) == len(names) and "student" not in names and all(names)
    assert {flag: args.given[flag] for flag in args.given} == args.given
    for flag, value in args.given.items():
        assert flag in REPEATED and values[flag[2:].replace("-", "_")] == value
    wide = ["--top-k", str(args.top_k)]
    again = parsed(command.parse, "diagnose", [*as_words(args.given), *wide])
    assert again.given == args.given
    train_args = parsed(parse, "train.py", ["--method", method, *as_words(args.given)])
    if train_args is not None:
        for flag in args.given:
            name = flag[2:].replace("-", "_")
            assert getattr(train_args, name) == values[name]
    else:
        assert not args.given


@prop("diagnose.short", examples=100, parts=st.lists(st.sampled_from(
      ["a", "b c", "student", "..", "é"]), min_size=1, max_size=4))
def test_the_short_name_is_a_part_of_the_path(parts):
    path, own = "/".join(parts), [part for part in parts if part != "student"]
    assert command.short(path) == command.short(Path(path)) == (own[-1] if own else path)
    assert command.short(f"/{path}/student") == (own[-1] if own else f"/{path}/student")


MAYBE_EMPTY = {"gain", "spread", "telling", "handover", "stop_at_end"}  # means of nothing, perhaps
FIT = {"drop": 0.5, "slope": 0.1, "midpoint": 20.0, "floor": 0.2, "r2": 0.9, "fall": 0.4,
       "midpoint_interval": [1.0, 2.0], "slope_interval": [1.0, 2.0], "drop_interval": [0.0, 1.0],
       "floor_interval": [0.0, 1.0], "fall_interval": [0.0, 1.0], "located": True, "step": True,
       "seen": [0.0, 9.0], "width": 4.0}  # fmt: skip


def varied(rng, x, inside=()):
    """Plain data of the same form with other numbers, and None where the report has it."""
    if isinstance(x, bool):
        return bool(rng.integers(2))
    if isinstance(x, float):
        size = rng.random()
        return float(rng.choice([0.0, 1.0, size, size, -size, 1e5 * size, 1e-9 * size]))
    if isinstance(x, list):
        empty = inside[-1] in ("mean", "se")  # of a curve: bins without any
        return [None if empty and rng.random() < 0.1 else varied(rng, y, inside) for y in x]
    if not isinstance(x, dict):
        return x
    found = {k: varied(rng, v, (*inside, k)) for k, v in x.items()}
    if isinstance(found.get("se"), list):
        found["se"] = [y and abs(y) for y in found["se"]]
    elif isinstance(found.get("mean"), float):
        found["se"] = found["se"] and abs(found["se"])
        if rng.random() < 0.2:
            found["se"] = None
        if MAYBE_EMPTY & set(inside) and rng.random() < 0.3:
            found["mean"] = found["se"] = None
    return found


def varied_report(rng, names):
    """A report as the command might write it, with students of these names besides the first."""
    result = tiny()
    template = result["students"]["student"]
    result["students"], first = {}, None
    for name in ("student", *names):
        s = result["students"][name] = varied(rng, template)
        for who in ("student", "teacher"):
            s["fidelity"][who]["fit"] = varied(rng, FIT) if rng.random() < 0.7 else None
            if rng.random() < 0.3:
                s["margin"][who]["release_at_each"] = [None] * 32
        if rng.random() < 0.2:
            s["fidelity"]["handover"] = []
        if rng.random() < 0.3:
            s["margin"]["student"]["release_at"] |= {"median": None}
        points = s["completion"]["points"]
        s["completion"]["points"] = points * int(rng.integers(3))
        if rng.random() < 0.2:
            s["completion"] = s["compatibility"]["answers"] = s["lookahead"]["competence"] = None
        elif rng.random() < 0.2:
            s["lookahead"]["competence"] |= {"r": None, "r_interval": [None, None]}
        if rng.random() < 0.2:
            triggered = s["lookahead"]["triggered"]
            s["lookahead"] = {"why_not": "it is recurrent", "triggered": triggered}
        if rng.random() < 0.2:
            s["compatibility"]["log_probs"] |= {
                "r": None, "r_interval": [None] * 2, "slope": None, "slope_interval": [None] * 2}
        fit = s["fidelity"]["student"]["fit"]
        first = fit if name == "student" else first
        both = name != "student" and fit and first and fit["located"] and first["located"]
        s["shift"] = {"tokens": rng.normal(), "interval": [-1.0, 2.0], "width": 4.0,
                      "moved": bool(rng.integers(2))} if both else None  # fmt: skip
    same = float(rng.choice([0.0, 0.5, 1.0]))
    result["template"] = {"same": same, "why": "it has none" if same == 0 else ""}
    result["vocabulary"]["stop_ids"]["teacher"] = [[], [4], [4, 5]][rng.integers(3)]
    result["settings"]["margin"] = str(rng.choice(["logprob", "prob"]))
    s = result["students"]["student"]
    s["compatibility"]["truncated"]["mean"] = float(rng.choice([0.0, 0.5, 0.9, 1.0]))
    if s["completion"] and rng.random() < 0.1:
        s["completion"]["student"]["mean"] = s["completion"]["teacher"]["mean"] = 0.0
    return result


def cells(line):
    """Of a line of a Markdown table."""
    assert line.startswith("| ") and line.endswith(" |")
    return re.split(r"(?<!\\)\|", line)[1:-1]


names_of_students = st.lists(st.sampled_from(["a", "a|b", "opd-seed0", "é", "x" * 60, "-"]),
                             max_size=2, unique=True)  # fmt: skip


@prop("diagnose.judge", "diagnose.suggest", "diagnose.no_evidence", "diagnose.summary",
      "diagnose.markdown", "diagnose.Verdict",
      examples=100, seed=seeds, names=names_of_students, chosen=flags_of_diagnose)
def test_any_report_is_judged_and_told(seed, names, chosen):
    result = varied_report(np.random.default_rng(seed), names)
    args = parsed(command.parse, "diagnose", sum(chosen, []))
    given = result["settings"]["given"] = args.given if args else {}
    before = repr(result)
    items, advice = verdicts.judge(result)
    blind = verdicts.no_evidence(result)
    assert repr(result) == before
    strict([items, advice])
    by_item = {v["item"]: verdicts.Verdict(**v) for v in items}
    assert len(by_item) == len(items) >= 12
    assert {v["grade"] for v in items} <= set(report.MARKS)
    assert all(v["says"].endswith(".") and v["threshold"] and v["source"] for v in items)
    assert verdicts.suggest(result, by_item) == advice and set(advice) == {
        "method", "why", "command"}  # fmt: skip
    grades = {item: v.grade for item, v in by_item.items()}
    lost = "bad" in (grades["fidelity"], grades["margin"])
    s = result["students"]["student"]
    measured = not s["lookahead"]["why_not"]
    ahead = grades["lookahead"] == "bad" or grades["lookahead"] == "-" and measured
    c = s["completion"]
    never_right = bool(c) and not c["student"]["mean"] and not c["teacher"]["mean"]
    assert bool(blind) == (never_right or s["compatibility"]["truncated"]["mean"] == 1)
    if blind or grades["teacher"] == "bad" and not lost and not ahead:
        assert advice["method"] is advice["command"] is None
    else:
        method = train.METHODS[advice["method"]]
        assert method == ("pg", "release" if lost else "none", "on" if ahead else "off")
        runner, script, *words = shlex.split(advice["command"])
        assert (runner, script) == ("torchrun", "train.py")
        trained = parsed(parse, "train.py", words)
        assert trained.method == advice["method"]
        for flag, value in given.items():
            assert getattr(trained, flag[2:].replace("-", "_")) == value
    result["verdicts"], result["command"] = items, advice
    before, text = repr(result), report.summary(result)
    page = report.markdown(result, ["a.png"])
    assert repr(result) == before and page.endswith("\n") and "![a](a.png)" in page
    none = "Nothing can be concluded" if blind else "No method here fits"
    assert text.startswith("Nothing can be concluded") == bool(blind)
    for told in (text, page):
        assert not re.search(r"\b(None|nan|inf)\b", told.replace(advice["command"] or "\0", ""))
        assert (advice["command"] or none) in told
    heads = [line for line in text.split("\n") if line[:1] in report.MARKS.values()]
    told = [line for line in heads if line[2:3].strip()]
    marks = [(report.MARKS[v["grade"]], v["item"]) for v in items]
    assert [(line[0], line[2:].split()[0]) for line in told[:len(items)]] == marks
    tables = [block.split("\n") for block in page.split("\n\n") if block.startswith("| ")]
    assert len(tables) >= 3
    for lines in tables:
        assert len({len(cells(line)) for line in lines}) == 1 and set(cells(lines[1])) == {" --- "}
    assert len(tables[0]) == 2 + len(items) and len(cells(tables[1][0])) == 2 + len(names)


any_cell = st.text(max_size=8) | st.text("|\\\n\r\x85\u2028 ab", max_size=8) | st.floats()


@prop("diagnose.table", examples=150, rows=st.integers(1, 4).flatmap(lambda n: st.lists(
      st.lists(any_cell, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_a_table_has_a_line_per_row_and_a_cell_per_text(rows):
    before = repr(rows)
    lines = report.table(rows[0], rows[1:]).splitlines()
    assert len(lines) == 1 + len(rows) and repr(rows) == before
    for line, row in zip([lines[0], *lines[2:]], rows, strict=True):
        found = [cell[1:-1].replace("\\|", "|") for cell in cells(line)]
        assert found == [" ".join(str(x).split()) for x in row]


@prop("diagnose.draw", examples=3, seed=seeds, names=names_of_students)
def test_any_report_is_drawn(seed, names):
    pytest.importorskip("matplotlib")
    result = varied_report(np.random.default_rng(seed), names)
    before, c = repr(result), result["students"]["student"]["completion"]
    with tempfile.TemporaryDirectory() as folder:
        drawn = pictures.draw(result, folder)
        assert repr(result) == before and sorted(os.listdir(folder)) == sorted(drawn)
        assert all(Path(folder, name).read_bytes()[:4] == b"\x89PNG" for name in drawn)
        wanted = {"completion.png": bool(c and c["points"]), "compare.png": bool(names)}
        assert {name: name in drawn for name in wanted} == wanted
        assert {"margin.png", "fidelity.png", "signal.png"} <= set(drawn)
    with (tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch,
          contextlib.redirect_stdout(io.StringIO()) as said):  # fmt: skip
        patch.setitem(sys.modules, "matplotlib.style", None)
        assert pictures.draw(result, folder) == os.listdir(folder) == []
    assert said.getvalue() == pictures.MISSING + "\n"


@prop("diagnose.main", "diagnose.run", "diagnose.prepare", "diagnose.load", "diagnose.vocabulary",
      "diagnose.measure", examples=14, seed=st.integers(0, 99), count=st.integers(1, 3),
      kind=st.sampled_from(["toy", "toy", "answers", "none", "refused"]), samples=small,
      compare=st.sampled_from([[], ["--compare", TOYS["clean"], TOYS["horizon"]]]),
      more=st.lists(st.sampled_from([
          ["--bin-width", "1"], ["--margin", "prob"], ["--completions", "0"], ["--thinking"],
          ["--temperature", "0.7"], ["--max-new-tokens", "1"], ["--lgr-tau", "99"],
          ["--margin-min-entropy", "99"], ["--tokens-per-pass", "1"], ["--dtype", "bfloat16"],
          ["--top-k", "200"], ["--out", "\x7f"], ["--student", "not there"],
      ]), max_size=3))
def test_any_diagnosis_ends_with_a_report_or_one_line(seed, count, kind, samples, compare, more):
    with tempfile.TemporaryDirectory() as folder:
        out, path = Path(folder, "out"), Path(folder, "p.jsonl")
        argv = ["--out", out, "--seed", seed, "--samples", samples, "--completions", 2,
                "--resamples", 20, "--max-new-tokens", 24, "--splitter", "untrained", "--device",
                "cpu", "--no-figures", "--threads", 1, "--count", max(2, count)]  # fmt: skip
        if kind != "toy":
            keys = ["problem", "answer"] if kind == "answers" else ["problem"]
            problems = [{k: p[k] for k in keys} for p in toy.problems(count, moves=2, seed=seed)]
            problems[-1] |= {"problem": ""} if kind == "refused" else {}
            path.write_text("\n".join(map(json.dumps, problems)))
            argv += ["--problems", path, "--student", TOYS["clean"], "--teacher", TOYS["horizon"]]
        argv = [*map(str, argv), *sum(more, []), *compare]
        said, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
            try:
                status = command.main(argv)
            except SystemExit as error:
                status = error.code
        bad = {"--top-k", "--student"} & set(sum(more, [])) or "\x7f" in argv
        bad = bad or kind != "toy" and (count < 2 or kind == "refused")
        assert status == (2 if bad else 0), said.getvalue()
        if bad:
            line = said.getvalue()
            assert line.startswith("diagnose: error: ") and line.count("\n") == 1
            assert not out.exists()
            return
        assert sorted(os.listdir(out)) == ["report.json", "report.md"]
        result = json.loads((out / "report.json").read_text())
        page = (out / "report.md").read_text()
    strict(result)
    assert result["problems"] == max(2, count) and list(result["vocabulary"]["rows"]) == [
        "student", "teacher"]  # fmt: skip
    assert list(result["students"]) == ["student", "clean", "horizon"][: 3 if compare else 1]
    assert result["vocabulary"]["shared"] <= min(result["vocabulary"]["rows"].values())
    assert result["vocabulary"]["stop_ids"] == {"student": [4], "teacher": [4]}
    assert verdicts.judge(result) == (result["verdicts"], result["command"])
    assert report.summary(result) in told.getvalue() and page == report.markdown(result, [])
    for s in result["students"].values():
        within(s["fidelity"]["student"]["mean"], 0, 1)
        assert (s["completion"] is None) == (kind == "none")
        assert s["compatibility"]["tokens"]["count"] == result["problems"] * samples


@prop("diagnose.compare_templates", examples=60, template=st.sampled_from(
      [TEMPLATE, None, "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
       "{% if messages[0]['content'] | length > 3 %}x{% endif %}" + TEMPLATE, "{{"]),
      texts=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4),
      thinking=st.booleans())
def test_templates_agree_on_a_share_of_the_prompts(template, texts, thinking):
    own, teacher = spelling(True)[0], byte_tokenizer(template)
    problems = [{"messages": [{"role": "user", "content": t}], "where": "f:1"} for t in texts]
    prompts = harness.render_prompts(own, problems, thinking=thinking)
    before = repr((problems, prompts))
    found = strict(command.compare_templates(teacher, problems, prompts, thinking))
    assert repr((problems, prompts)) == before and set(found) == {"same", "why"}
    assert 0 <= found["same"] <= 1 and (not found["why"] or found["same"] == 0)
    assert "\n" not in found["why"]
    if template == TEMPLATE:
        assert found == {"same": 1.0, "why": ""}
    elif template and "length" in template:
        assert found["same"] == sum(len(t) <= 3 for t in texts) / len(texts)
    else:
        assert found["same"] == 0
