"""The diagnosis: measurements by hand and on worlds whose truth is known, verdicts, the command."""

import copy
import dataclasses
import doctest
import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import toy_prompts, write_model
from diagnoses import SMALL, changed, diagnosed, run, strict, tiny
from runs import make_run, parse, score

import harness
import release_rule
import toy
import train
from diagnose import command, curves, measuring, pictures, probing, report, verdicts
from toy import build

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    "name", ["command", "curves", "measuring", "pictures", "probing", "report", "verdicts"]
)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(f"diagnose.{name}")).failed == 0


# ------------------------------------------------------------------------- where the truth is known
def fidelity_of(world, moves=12, keep=lambda start: True, count=400, samples=1, closing=False):
    """The fit of the teacher's confidence on student rollouts to problems with some start marks,
    to the moves or, with `closing`, up to the end."""
    w = toy.world(world)
    (student, tokenizer), (teacher, _) = build.load(w.student), build.load(w.teacher)
    problems = [p for p in toy.problems(count, moves=moves, split="test")
                if keep(int(p["problem"].split()[4].rstrip(".")))]  # fmt: skip
    prompts = [p for p in toy_prompts(tokenizer, problems) for _ in range(samples)]
    problem_B = np.repeat(np.arange(len(problems)), samples)
    options = probing.Options(stop_ids=(tokenizer.eos_token_id,), pad_id=0, vocab_size=153, tau=1e9,
                      progress=False)  # fmt: skip
    limit = toy.response_limit(moves)
    rows = probing.sample(student, prompts, options, max_new_tokens=limit, seed=0, desc="")
    found = probing.read(student, teacher, prompts, rows, options)
    last = np.inf if closing else toy.OPENING_TOKENS + toy.MOVE_TOKENS * moves
    longest = 1 + int(found.position_F.max())
    edges = curves.bins(longest, width=toy.MOVE_TOKENS, first=toy.OPENING_TOKENS)
    curve = curves.curve(found.fidelity_F, found.position_F, found.row_F, problem_B, edges)
    return curves.fit_curve(curve, between=(toy.OPENING_TOKENS, last), resamples=100)


@pytest.mark.parametrize("number", range(4))
def test_t_star_lands_where_the_teacher_of_varied_is_lost(number):
    """Its horizon is 2, 5, 8 or 11 moves by the start mark. The response has 6 tokens and 11 per
    move; of the first move that it does not know the fourth token is the first uncertain one."""
    # a single move after the eleventh is no floor: the closing sentence helps
    fit = fidelity_of("varied", keep=lambda x: x % 4 == number, count=120, closing=number == 3)
    first = toy.OPENING_TOKENS + toy.MOVE_TOKENS * toy.HORIZONS[number]
    low, high = fit.midpoint_interval
    assert fit.located and fit.logistic.r2 > 0.7
    assert low <= first + 3 and first <= high and high - low < 3 * toy.MOVE_TOKENS, (low, high)


def test_t_star_of_horizon_and_none_in_clean():
    fit = fidelity_of("horizon", count=24)
    low, high = fit.midpoint_interval
    assert fit.located and low <= 75 and 72 <= high and high - low <= 1.2 * toy.MOVE_TOKENS
    assert not fidelity_of("clean", count=24).located


EXPECTED = {  # world: method that is suggested (and what is bad)
    "horizon": ("release", {"teacher", "fidelity", "margin", "signal"}),
    "clean": ("opd", set()),
    "confident": ("release", {"teacher", "margin"}),
}


@pytest.mark.parametrize("world", EXPECTED)
def test_the_advice_in_worlds_whose_truth_is_known(world):
    method, bad = EXPECTED[world]
    result = diagnosed(world, "--count", "32")
    grades = {v["item"]: v["grade"] for v in result["verdicts"]}
    assert result["command"]["method"] == method
    assert {item for item, grade in grades.items() if grade == "bad"} - {"completion"} == bad
    more = ["--toy", world]
    flags_given = ["--threads", "1"]
    expected = ["torchrun", "train.py", "--method", method]
    assert sorted(shlex.split(result["command"]["command"])) == sorted(
        expected + more + flags_given
    )


def test_lookahead_tells_in_the_forks_and_says_when_it_would_mislead():
    """One step ahead the branches differ in both; in the mirror the confident one is wrong."""
    fork, mirror = diagnosed("fork", "--count", "60"), diagnosed("fork-mirror", "--count", "60")
    for result, direction in ((fork, 1), (mirror, -1)):
        found = result["students"]["student"]["lookahead"]
        assert found["telling"]["mean"] > 0.3
        low, high = found["competence"]["r_interval"]
        assert min(direction * low, direction * high) > 0
    assert fork["command"]["method"] == "lgr" and mirror["command"]["method"] == "opd"
    plain = diagnosed("horizon", "--count", "32")["students"]["student"]["lookahead"]
    assert plain["triggered"]["mean"] > 0.01 and plain["telling"]["mean"] < 0.01


def test_a_student_is_its_own_perfect_teacher():
    """Same model twice: nothing to learn and nothing in the way."""
    student = str(toy.world("clean").student)
    s = diagnosed("clean", "--teacher", student, "--difficulty", "6")["students"]["student"]
    c = s["compatibility"]
    assert c["overlap"]["mean"] == 1 and c["reverse_kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert c["student_mass"] == c["teacher_mass"]
    assert c["stop_at_end"]["student"] == c["stop_at_end"]["teacher"]
    assert c["log_probs"]["r"] == pytest.approx(1, abs=1e-6) == c["log_probs"]["slope"]
    parts = s["signal"]["teacher_part"]["mean"], s["signal"]["own_part"]["mean"]
    for a, b in zip(*parts, strict=True):  # they cancel
        assert (a is b is None) or a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert s["completion"]["teacher_over_student"]["mean"] == 0  # the same random numbers, too


# ------------------------------------------------------------------------------------ by hand
def readings(lengths, **given):
    """Readings of responses with these lengths; what is not given is 0."""
    total = sum(lengths)
    found = {f.name: np.zeros(total) for f in dataclasses.fields(probing.Readings)}
    found["row_F"] = np.repeat(np.arange(len(lengths)), lengths)
    found["position_F"] = np.concatenate([np.arange(n) for n in lengths])
    return probing.Readings(**(found | {k: np.array(v, dtype=float) for k, v in given.items()}))


class Letters:
    """A tokenizer of one character per token; 0 ends a response and has no text."""

    def decode(self, ids, **options):
        return "".join(chr(i) for i in ids if i)


def job(problem_B, **more):
    """What measurements share, without models."""
    args = SimpleNamespace(
        min_segments=1, bic_eps=1e-12, margin_min_entropy=0.0, resamples=50, seed=0, samples=1,
        completions=1, max_new_tokens=100,
    )  # fmt: skip
    for name in list(more):
        if hasattr(args, name):
            setattr(args, name, more.pop(name))
    splitter = SimpleNamespace(span_tokenize=spans)
    fields = dict.fromkeys(f.name for f in dataclasses.fields(measuring.Job)) | {
        "args": args, "tokenizer": Letters(), "splitter": splitter, "lookahead": "",
        "problem_B": np.array(problem_B), "prompts": [[1]] * len(problem_B),
        "options": SimpleNamespace(stop_ids=(0,)), "answered": False, "bin_width": 0,
    }  # fmt: skip
    return measuring.Job(**(fields | more))


def spans(text):
    """Sentences end at full stops."""
    starts = [0] + [i + 1 for i, c in enumerate(text) if c == "."]
    ends = [*(i - 1 for i in starts[1:]), len(text)]
    return [(a, b + 1) for a, b in zip(starts, ends, strict=True) if a < len(text)]


def ids(text):
    return [ord(c) for c in text] + [0]


def test_means_per_response_and_over_tokens():
    values, j = np.array([1.0, 3.0, 5.0, 7.0]), job([0, 0, 1, 1])
    inside, found = np.array([True, True, True, False]), readings([2, 0, 2, 0])
    assert measuring._row_means(values, found, j, inside).tolist()[::2] == [2, 5]
    assert np.isnan(measuring._row_means(values, found, j)[[1, 3]]).all()
    found = readings([2, 1, 3])
    mean = measuring._token_mean(np.array([1.0, 2, 3, 4, 5, 9]), found, job([0, 0, 1]))
    # problems: 6 over 3 tokens, 18 over 3; each is 6 away from 4 x 3
    assert mean == {"mean": 4.0, "se": pytest.approx((2 * (36 + 36)) ** 0.5 / 6, rel=1e-5),
                    "count": 3, "problems": 2}  # fmt: skip


def test_the_margin_by_sentence_and_the_release_point_by_hand():
    rows = [ids("ab.cd.ef."), ids("ab.cd."), ids("x.")]
    margin = [3.0] * 3 + [3.0] * 3 + [0.0] * 4 + [1.0] * 3 + [1.0] * 4 + [2.0] * 3
    found = readings([10, 7, 3], margin_F=margin)
    m = measuring.measure_margin(job([0, 1, 2]), found, rows, curves.bins(10, width=5), "")
    log = np.log1p
    assert m["by_sentence"]["mean"][:3] == pytest.approx(
        [(log(3) + log(1) + log(2)) / 3, (log(3) + log(1)) / 2, 0], abs=1e-5)  # fmt: skip
    assert m["by_sentence"]["responses"] == [3, 2, 1]
    assert m["fired"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert m["release_at_each"] == [0.6, None, None] and m["release_at"]["median"] == 0.6
    gain = release_rule.change_point([log(3), log(3), 0.0], min_segments=1).gain
    assert m["gain"]["mean"] == pytest.approx(gain, rel=1e-5)
    assert m["gain_over_6"]["mean"] == pytest.approx((gain > 6) / 3, abs=1e-5)
    assert m["by_token"]["mean"] == pytest.approx([(15 + 5 + 6) / 13, (3 + 2) / 7], rel=1e-5)


def test_uncertain_tokens_alone_can_count():
    entropy = [1, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    found = readings([10], margin_F=[3, 9, 9, 3, 9, 9, 9, 0, 9, 9], entropy_F=entropy)
    found.margin_F[6:] = 0  # the third sentence
    m = measuring.measure_margin(
        job([0], margin_min_entropy=0.5), found, [ids("ab.cd.ef.")], curves.bins(10), ""
    )
    assert m["by_sentence"]["mean"] == pytest.approx([np.log1p(3), np.log1p(3), 0], abs=1e-5)


def test_the_signal_is_a_ratio_of_sums():
    found = readings([4, 8], teacher_part_F=[1, 1, 0, 0] + [3] * 4 + [1] * 4,
                     own_part_F=[1, 1, 1, 1] + [1] * 8)  # fmt: skip
    s = measuring.measure_signal(job([0, 1]), found, curves.bins(8, width=4))
    quarters = s["share_by_quarter"]["mean"]
    assert quarters == pytest.approx([7 / 10, 7 / 10, 2 / 5, 2 / 5], rel=1e-5)
    assert s["share"]["mean"] == pytest.approx([14 / 22, 4 / 8], rel=1e-5)
    assert s["own_part"]["mean"] == [1, 1]


def test_lookahead_by_hand():
    nan = np.nan
    found = readings([2, 2, 2, 1], hesitates_F=[1, 0, 1, 1, 0, 1, 0],
                     spread_F=[0.3, nan, 0.05, 0.2, nan, 0.0, nan],
                     pull_F=[0.5, nan, -0.1, -0.3, nan, 0.0, nan])  # fmt: skip
    right = np.array([1.0, 0.0, 1.0, 0.0])
    x = measuring.measure_lookahead(job([0, 0, 1, 1]), found, right)
    assert x["triggered"]["mean"] == pytest.approx(4 / 7, rel=1e-5)
    assert x["telling"]["mean"] == 0.5 and x["spread"]["mean"] == pytest.approx(0.55 / 4)
    expected = np.corrcoef([0.5, -0.2, 0.0], [1, 0, 1])[0, 1]  # the fourth never hesitated
    assert x["competence"]["r"] == pytest.approx(expected, rel=1e-5)
    assert x["competence"]["count"] == 3
    blind = measuring.measure_lookahead(job([0, 0, 1, 1], lookahead="no 4D mask"), found, right)
    assert blind == {"why_not": "no 4D mask", "triggered": x["triggered"]}


def test_stopping_and_truncation_by_hand():
    rows = [[7, 0], [7, 8, 9], [7, 7, 0]]
    found = readings([2, 3, 3], teacher_stop_F=[0.1, 0.8, 0.9, 0.2, 0.3, 0.6, 0.5, 0.4],
                     student_stop_F=[0, 1, 0, 0, 0, 0, 0, 0.5])  # fmt: skip
    c = measuring.measure_compatibility(job([0, 1, 1]), found, rows, None)
    assert c["stop_at_end"]["teacher"]["mean"] == pytest.approx(0.6)  # of the two that ended
    assert c["stop_at_end"]["student"]["mean"] == 0.75
    assert c["truncated"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert c["teacher_stops_earlier"]["mean"] == pytest.approx(2 / 3, abs=1e-5)  # 0.9; 0.6, not 0.5
    assert c["tokens"]["mean"] == pytest.approx(8 / 3, rel=1e-5) and c["answers"] is None


def test_the_handover_windows_by_hand(monkeypatch):
    monkeypatch.setattr(measuring, "HANDOVER", 2)
    seen = {}

    def mean_fidelity(teacher, heads, tails, options, desc):
        seen.update(heads=heads, tails=tails)
        return np.array([0.9, 0.7])

    monkeypatch.setattr(probing, "mean_fidelity", mean_fidelity)
    fidelity = [1.0, 0.8, 0.6, 0.4, 0.2] + [0.9] * 2 + [0.3, 0.5, 0.1, 0.1]
    found = readings([5, 2, 4], fidelity_F=fidelity)
    heads, tails = [[1, 2], [3, 4]], [[5, 6, 7], [8]]
    x = measuring.handover(job([0, 1, 2]), found, np.array([0, 2]), heads, tails, 3, "")
    assert seen == {"heads": heads, "tails": [[5, 6], [8]]}
    assert x["before"]["mean"] == pytest.approx((0.7 + 0.3) / 2)  # not the one that has ended
    assert x["student"]["mean"] == pytest.approx((0.3 + 0.1) / 2)
    assert x["teacher"]["mean"] == pytest.approx(0.8)
    assert x["jump"]["mean"] == pytest.approx((0.2 + 0.4) / 2)
    assert x["over_student"]["mean"] == pytest.approx((0.6 + 0.6) / 2)
    assert x["jump"]["count"] == 2 and x["tokens"] == 3 and x["window"] == 2


def test_completions_by_hand(monkeypatch):
    """Three responses, one of which has ended before the cut: its answer stands."""
    rows = [ids("The answer is 5"), ids("The answer is 6"), ids("7")]
    problems = [{"answer": "5"}, {"answer": "5"}, {"answer": "7"}]
    asked = []

    def sample(model, prompts, options, *, max_new_tokens, seed, desc):
        asked.append((prompts, max_new_tokens))
        return [ids(" 5")] * len(prompts)

    monkeypatch.setattr(probing, "sample", sample)
    monkeypatch.setattr(measuring, "handover", lambda *given: {"tokens": given[5]})
    found = readings([len(row) for row in rows])
    j = job([0, 1, 2], problems=problems, answered=True)
    right, teachers = np.array([1.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0])
    (point,), jumps = measuring.measure_completion(j, found, rows, right, teachers)
    cut = int(np.quantile([16, 16, 2], 0.95)) // 2
    assert point["tokens"] == cut and jumps == [{"tokens": cut}]
    assert asked == [([[1] + row[:cut] for row in rows[:2]], 100 - cut)]
    assert point["running"] == pytest.approx(2 / 3)
    assert point["accuracy"]["mean"] == 1
    assert point["over_student"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert point["over_teacher"]["mean"] == pytest.approx(2 / 3, abs=1e-5)
    assert measuring.measure_completion(j, found, rows, None, None)[0] == []


def test_a_completion_is_judged_with_what_it_completes(monkeypatch):
    """The answer stands before the cut; what the teacher adds has none."""
    monkeypatch.setattr(probing, "sample", lambda model, prompts, options, **_: [ids("!")] * 2)
    monkeypatch.setattr(measuring, "handover", lambda *given: {})
    rows = [ids("It is 5, I think"), ids("It is 6, I think")]
    j = job([0, 1], problems=[{"answer": "5"}] * 2, answered=True)
    found = readings([len(row) for row in rows])
    (point,), _ = measuring.measure_completion(j, found, rows, np.zeros(2), np.zeros(2))
    assert point["tokens"] == 8 and point["accuracy"]["mean"] == 0.5


def fit_at(midpoint, spread=1.0, located=True, width=4.0):
    draws = midpoint + spread * np.linspace(-1, 1, 50)
    logistic = curves.Logistic(0.5, 0.1, midpoint, 0.4, 0.9)
    names = dict.fromkeys(f.name for f in dataclasses.fields(curves.Fit))
    more = {"logistic": logistic, "located": located, "midpoint_R": draws, "width": width}
    return curves.Fit(**(names | more))


def test_a_shift_needs_two_points_and_more_than_half_a_bin():
    assert measuring.shift(fit_at(50), None) is None
    assert measuring.shift(fit_at(50), fit_at(60, located=False)) is None
    far, near = (measuring.shift(fit_at(50), fit_at(x)) for x in (60, 51))
    assert far["tokens"] == 10 and far["interval"] == [10, 10] and far["moved"]
    assert near["tokens"] == 1 and not near["moved"]
    wide = measuring.shift(fit_at(50), fit_at(60, spread=20))
    assert wide["interval"][0] < 2 < wide["interval"][1] and not wide["moved"]
    assert measuring.shift(fit_at(60), fit_at(50))["moved"]


# ------------------------------------------------------------------------------------- verdicts
def mean(value, se=0.01):
    return {"mean": value, "se": se, "count": 100, "problems": 20}


LOST = {"margin__student__gain_over_6": mean(verdicts.FIRES)}
WORSE = {"completion__teacher_over_student": mean(-0.2)}
SOME_RIGHT = {"completion__student": mean(0.5), "compatibility__truncated": mean(0.0)}
RIGHT_NEVER = {"completion__student": mean(0.0), "completion__teacher": mean(0.0)}


def tells(low, high, telling=verdicts.TELLS):
    found = {"r": (low + high) / 2, "r_interval": [low, high]}
    return {"lookahead__telling": mean(telling), "lookahead__competence": found}


@pytest.mark.parametrize(
    ("more", "method"),
    [
        ({}, "opd"),
        ({"margin__student__gain_over_6": mean(verdicts.FIRES - 0.01)}, "opd"),
        (LOST, "release"),
        (WORSE, None),
        ({"completion__teacher_over_student": mean(-0.2, se=0.11)}, "opd"),  # cannot be told
        (WORSE | LOST, "release"),
        (tells(0.1, 0.3), "lgr"),
        (tells(-0.1, 0.3), "opd"),
        (tells(-0.3, -0.1), "opd"),
        (tells(0.1, 0.3, telling=verdicts.TELLS - 0.01), "opd"),
        (WORSE | tells(0.1, 0.3), "lgr"),
        (LOST | tells(0.1, 0.3), "release+lgr"),
        (LOST | tells(-0.3, -0.1), "release"),
        ({"lookahead": {"why_not": "no", "triggered": mean(0.1)}}, "opd"),
        (tells(0.1, 0.3) | {"lookahead__competence": None, "completion": None}, "lgr"),
    ],
)
def test_which_method_is_suggested(more, method):
    result = changed(tiny(), **more)
    assert result["command"]["method"] == method and len(result["verdicts"]) >= 12
    assert (result["command"]["command"] is None) == (method is None)
    assert ("No method here fits" in report.summary(result)) == (method is None)


def test_what_no_method_mends_is_named():
    advice = changed(tiny(), compatibility__truncated=mean(0.5))["command"]
    assert advice["method"] == "opd" and "stands in the way (truncated)" in advice["why"]
    assert "nothing stands" in tiny()["command"]["why"]


@pytest.mark.parametrize(
    ("more", "why", "change"),
    [
        ({"compatibility__truncated": mean(0.95)}, "the length limit ends 95%", "--max-new-tokens"),
        (RIGHT_NEVER, "no response of either model is right", "--problems, --difficulty"),
        (RIGHT_NEVER | LOST, "no response of either model is right", "--temperature (now 1.0)"),
        (RIGHT_NEVER | {"completion__teacher": mean(0.01)}, None, None),
        (RIGHT_NEVER | {"completion__student": mean(0.01)}, None, None),
        ({"compatibility__truncated": mean(0.94)}, None, None),
        ({"compatibility__truncated": mean(1.0), "completion": None}, "ends 100%", "now 123"),
        ({"completion": None}, None, None),
    ],
)
def test_a_diagnosis_says_first_when_it_has_nothing_to_go_by(more, why, change):
    result = changed(tiny(), **more)
    result["settings"]["max_new_tokens"] = 123
    result["verdicts"], result["command"] = verdicts.judge(result)
    text, page = report.summary(result), report.markdown(result, [])
    said = "Nothing can be concluded: "
    assert text.startswith(said) == (said in page) == (why is not None)
    assert (result["command"]["method"] is None) == (why is not None)
    assert text.count(said) == (why is not None)
    if why is not None:
        first = " ".join(text.split("\n\n")[0].split())
        assert why in first and change in first and "--max-new-tokens (now 123)" in first
        assert result["command"]["command"] is None and "Run:" not in text + page
        assert page.index(said) < page.index("| item")


def grade(item, **more):
    return next(v["grade"] for v in changed(tiny(), **more)["verdicts"] if v["item"] == item)


@pytest.mark.parametrize(
    ("item", "path", "values"),
    [
        ("overlap", "compatibility__student_mass", {0.9: "good", 0.89: "mixed"}),
        ("overlap", "compatibility__teacher_mass", {0.9: "good", 0.89: "mixed"}),
        ("truncated", "compatibility__truncated", {0.1: "good", 0.11: "bad"}),
        ("stopping", "compatibility__teacher_stops_earlier", {0.1: "good", 0.11: "bad"}),
        ("margin", "margin__student__gain_over_6", {0.24: "good", 0.25: "bad"}),
        ("teacher", "completion__teacher_over_student",
         {0.03: "good", 0.01: "mixed", -0.01: "mixed", -0.03: "bad"}),
    ],
)  # fmt: skip
def test_grades_turn_at_their_thresholds(item, path, values):
    for value, expected in values.items():
        assert grade(item, **{path: mean(value)}) == expected


def test_more_grades():
    c = "compatibility__"
    for stop, expected in ((0.5, "good"), (0.49, "bad"), (None, "-")):
        stops = {"student": mean(1.0), "teacher": mean(stop)}
        assert grade("stopping", **{c + "stop_at_end": stops}) == expected
    for r, expected in ((0.95, "good"), (0.94, "mixed"), (None, "-")):
        assert grade("log-probs", **{c + "log_probs": {"r": r, "slope": r}}) == expected
    for last, expected in ((0.36, "good"), (0.34, "bad"), (None, "-")):
        shares = {"mean": [0.7, 0.6, 0.5, last]}
        assert grade("signal", signal__share_by_quarter=shares) == expected
    assert grade("fidelity", fidelity__student__fit=None) == "-"
    assert grade("completion", completion__points=[]) == "-"
    point = {"tokens": 9, "accuracy": mean(0.5), "over_student": mean(0.1),
             "over_teacher": mean(-0.1)}  # fmt: skip
    none = point | {"over_student": mean(0.0)}
    for points, expected in (([point], "good"), ([point, none], "mixed"), ([none], "bad")):
        assert grade("completion", completion__points=points) == expected


def test_the_fidelity_verdict_tells_the_position_from_the_prefix():
    result = diagnosed("horizon", "--count", "32")
    own = copy.deepcopy(result["students"]["student"]["fidelity"]["teacher"])

    def said(of_teacher):
        verdicts_ = changed(result, fidelity__teacher=of_teacher)["verdicts"]
        return next(v["says"] for v in verdicts_ if v["item"] == "fidelity")

    assert "the student's prefixes are not the only cause" in said(own)
    own["fit"]["fall"] = 0.06
    assert "the student's prefixes make it worse" in said(own)
    own["fit"]["located"] = False
    assert "the student's prefixes are the cause" in said(own)
    assert "too few or too short for a fit" in said(own | {"fit": None})


def test_the_completion_verdict_names_the_lengths():
    point = {"tokens": 9, "accuracy": mean(0.5), "over_student": mean(0.1),
             "over_teacher": mean(0.0)}  # fmt: skip
    later = point | {"tokens": 20, "accuracy": mean(0.25), "over_teacher": mean(-0.2)}
    neither = later | {"tokens": 30, "over_student": mean(0.0)}

    def said(*points):
        found = changed(tiny(), completion__points=list(points))["verdicts"]
        return next(v["says"] for v in found if v["item"] == "completion")

    assert said(point) == ("From the student's first 9 tokens the teacher still gets more right "
                           "than the student alone.")
    assert "first 20 tokens" in said(point, later) and "from its first 20" in said(point, later)
    assert "first 9 tokens" in said(point, neither)
    assert "from its first 30 it gets 0.25 right, less than from scratch." in said(point, neither)
    assert "From no prefix" in said(neither)


def test_vocabulary_and_template_verdicts():
    result = tiny()
    assert {v["item"]: v["grade"] for v in result["verdicts"]}["vocabulary"] == "good"
    result["vocabulary"]["stop_ids"]["teacher"] = [5]
    result["template"] = {"same": 0.5, "why": ""}
    grades = {v["item"]: v["grade"] for v in verdicts.judge(result)[0]}
    assert grades["vocabulary"] == grades["template"] == "mixed"


# -------------------------------------------------------------------------------------- the text
def test_markdown_cells_hold_no_bars_and_the_summary_every_item():
    result = copy.deepcopy(diagnosed("horizon", "--count", "32"))
    result["template"]["why"] = "a | b\nc"
    result["verdicts"], result["command"] = verdicts.judge(result)
    text = report.markdown(result, ["margin.png"])
    head = next(line for line in text.splitlines() if line.startswith("| item"))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert head in rows and r"a \| b c" in text and "![margin](margin.png)" in text
    for number, line in enumerate(rows):
        below = rows[number + 1] if number + 1 < len(rows) else ""
        if below.startswith("| ---"):
            width = line.replace(r"\|", "").count("|")
        assert line.replace(r"\|", "").count("|") == width
    summary = report.summary(result)
    for v in result["verdicts"]:
        assert f"\n{report.MARKS[v['grade']]} {v['item']} " in "\n" + summary
    assert max(map(len, summary.splitlines()[:-4])) <= 100
    assert "torchrun train.py --method release" in summary


# ------------------------------------------------------------------------------------ the command
def test_the_command_writes_report_and_pictures(tmp_path, monkeypatch, capsys):
    """From another folder."""
    out, other = tmp_path / "deep" / "found", toy.world("fork").student
    argv = ["--difficulty", 2, "--count", 4, "--samples", 2, "--completions", 2, "--resamples", 20,
            "--threads", 1, "--out", out, "--compare", other]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command.main([*map(str, argv)]) == 0
    said = capsys.readouterr()
    assert "teacher answers" in said.err  # progress bars
    assert said.out.splitlines()[-1] == f"wrote {out}/report.json, report.md"
    assert "fork-student" in said.out
    names = ["compare.png", "completion.png", "fidelity.png", "margin.png", "report.json",
             "report.md", "signal.png"]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == names
    for path in out.glob("*.png"):
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20], "big") > 900
        assert f"]({path.name})" in (out / "report.md").read_text()
    result = json.loads((out / "report.json").read_text(), parse_constant=lambda x: 1 / 0)
    assert set(result["students"]) == {"student", "fork-student"}
    assert result["models"]["--teacher"] == "assets/toy/varied"  # wherever the repository lies
    for s in result["students"].values():
        for who in ("student", "teacher"):
            for curve in (s["margin"][who]["by_sentence"], s["margin"][who]["by_token"],
                          s["fidelity"][who]["curve"]):  # fmt: skip
                filled = [x is not None for x in curve["mean"]]
                assert any(filled) and [n > 0 for n in curve["count"]] == filled
                assert all(se is not None for se, n in zip(curve["se"], curve["problems"],
                                                           strict=True) if n > 1)  # fmt: skip
        assert len(s["completion"]["points"]) == len(s["fidelity"]["handover"]) == 2
    first, second = (s["fidelity"]["student"]["curve"] for s in result["students"].values())
    for curve in (first, second):  # the opening sentence, then a move in every bin
        assert curve["from"][:3] == [0, 6, 17] and curve["to"][1] == 17


def test_pictures_can_be_drawn_again_from_the_file_and_are_the_same(tmp_path):
    result = strict(diagnosed("horizon", "--count", "32"))
    names = pictures.draw(result, tmp_path)
    assert names == ["margin.png", "fidelity.png", "signal.png"]  # no completions, no others
    before = [(tmp_path / name).read_bytes() for name in names]
    assert pictures.draw(result, tmp_path) == names
    assert [(tmp_path / name).read_bytes() for name in names] == before


FEW = [*SMALL, "--difficulty", "2", "--count", "4"]


def test_without_matplotlib_there_is_a_report_and_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    argv = [x for x in FEW if x != "--no-figures"]
    assert command.main([*argv, "--out", str(tmp_path / "new")]) == 0
    assert pictures.MISSING in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]


def test_an_earlier_report_is_moved_not_overwritten(tmp_path):
    out = tmp_path / "found"
    out.mkdir()
    (out / "report.json").write_text("mine")
    run(*FEW, folder=out)
    assert (tmp_path / "found.1" / "report.json").read_text() == "mine"
    assert json.loads((out / "report.json").read_text())["problems"] == 4


def test_the_same_student_compared_with_itself_has_not_moved(tmp_path):
    other = tmp_path / "twin" / "student"
    shutil.copytree(toy.world("horizon").student, other)
    result = run(*SMALL, "--toy", "horizon", "--difficulty", "10", "--count", "8", "--compare",
                 other, folder=tmp_path / "new")  # fmt: skip
    first, twin = result["students"]["student"], result["students"]["twin"]
    assert twin["shift"] == {"tokens": 0, "interval": [0, 0], "moved": False,
                             "width": toy.MOVE_TOKENS}  # fmt: skip
    assert {k: v for k, v in first.items() if k not in ("shift", "path")} == {
        k: v for k, v in twin.items() if k not in ("shift", "path")}  # fmt: skip


def test_the_seed_and_nothing_else_decides(tmp_path):
    first, same, batch, other = (
        run(*FEW, *more, folder=tmp_path / "new")["students"]["student"]
        for more in ([], [], ["--batch-size", "3"], ["--seed", "1"])
    )
    assert first == same and first["fidelity"]["student"] == batch["fidelity"]["student"]
    assert first["fidelity"] != other["fidelity"]


@pytest.fixture
def pair(tmp_path):
    """Byte-level models of any text: a student, a teacher, and a file of problems."""
    write_model(tmp_path / "s", seed=0)
    write_model(tmp_path / "t", seed=1)
    lines = [{"problem": f"How many? {i}", "answer": i} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def flags_of(folder, *more):
    where = {"--student": "s", "--teacher": "t", "--problems": "p.jsonl", "--out": "new"}
    argv = [str(x) for flag, name in where.items() for x in (flag, folder / name)]
    return [*argv, "--max-new-tokens", "12", *SMALL, *map(str, more)]


def test_any_pair_of_models_and_a_file_of_problems(pair):
    result = command.run(command.parse(flags_of(pair, "--completions", "2")))
    strict(result)
    assert result["problems"] == 6
    assert "the length limit ends" in result["command"]["why"]  # models that know nothing
    result = changed(result, **SOME_RIGHT)
    words = shlex.split(result["command"]["command"])
    assert words[:2] == ["torchrun", "train.py"]
    args = parse(words[2:])  # it is a command that train.py takes
    assert args.student == str(pair / "s") and args.problems == str(pair / "p.jsonl")
    assert args.max_new_tokens == 12


def test_a_compared_student_may_have_a_smaller_vocabulary(pair):
    write_model(pair / "small", vocab_size=230)
    result = command.run(command.parse(flags_of(pair, "--compare", pair / "small")))
    assert result["vocabulary"]["shared"] == 230 and "small" in result["students"]


def test_the_margin_may_be_one_of_probabilities(pair):
    for kind, high in (("prob", True), ("logprob", False)):
        s = command.run(command.parse(flags_of(pair, "--margin", kind)))["students"]["student"]
        upper = max(x for x in s["margin"]["student"]["by_token"]["quartile_high"] if x is not None)
        assert (upper <= 1) == high


def test_nobody_hesitates_above_a_high_threshold(pair):
    s = command.run(command.parse(flags_of(pair, "--lgr-tau", "100")))["students"]["student"]
    assert s["lookahead"]["triggered"]["mean"] == 0
    assert s["lookahead"]["spread"] == {"mean": None, "se": None, "count": 0, "problems": 0}


def test_problems_without_answers_are_diagnosed_as_far_as_that_goes(pair):
    (pair / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "answer": 3}\n')
    result = command.run(command.parse(flags_of(pair, "--completions", "1")))
    s = result["students"]["student"]
    assert s["completion"] is None and s["compatibility"]["answers"] is None
    assert len(s["fidelity"]["handover"]) == 1
    grades = {v["item"]: v["grade"] for v in result["verdicts"]}
    assert grades["teacher"] == grades["completion"] == "-" and "student" not in grades
    ended = changed(result, compatibility__truncated=mean(0.0))
    assert "Without answers" in report.summary(ended)
    assert pictures.draw(result, pair) == ["margin.png", "fidelity.png", "signal.png"]


def test_a_teacher_that_cannot_look_ahead_is_diagnosed_all_the_same(pair, monkeypatch):
    def refuse(*_):
        raise ValueError("sliding windows\nand more")

    monkeypatch.setattr(command.lgr, "self_check", refuse)
    result = command.run(command.parse(flags_of(pair)))
    assert result["students"]["student"]["lookahead"]["why_not"] == "sliding windows"
    assert "Not measured: sliding windows" in report.summary(result).replace("\n", " ")


def test_other_templates_and_stop_tokens_of_the_teacher_are_noticed(pair):
    template = pair / "t" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "<|user|>Please: "))
    result = command.run(command.parse(flags_of(pair)))
    assert result["template"] == {"same": 0.0, "why": ""}
    template.write_text("{{ raise_exception('no system') }}")
    result = command.run(command.parse(flags_of(pair)))
    assert result["template"]["same"] == 0 and "no system" in result["template"]["why"]


BAD = {
    "--count 1": "--count",
    "--bin-width -1": "--bin-width",
    "--resamples 5": "--resamples",
    "--top-k 7": "--top-k 7",
    "--top-k 300": "--top-k 300",
    "--compare nowhere": "nowhere",
    "--compare s/student s": "'s'",
    "--compare a/student": "a/student",
    "--teacher other": "other",
    "--max-new-tokens 5000": "p.jsonl:1",
    "--frobnicate": "--frobnicate",
    "--fit-from 9 --fit-to 9": "--fit-to 9",
    "--fit-to 0": "--fit-to",
    "--out p.jsonl/new": "--out",
    "--out other": "no diagnosis",
    "--out .": "no diagnosis",
    "--problems nowhere.jsonl": "nowhere.jsonl",
    "--problems one.jsonl": "one.jsonl",
}


@pytest.mark.parametrize("more", BAD)
def test_bad_flags_are_one_line_and_leave_nothing(pair, more, monkeypatch, capsys):
    monkeypatch.chdir(pair)
    write_model(pair / "other", tokenizer_seed=3)
    (pair / "one.jsonl").write_text('{"problem": "a"}')
    loaded = []
    monkeypatch.setattr(harness, "load_model", lambda *a, **k: loaded.append(a))
    before = sorted(pair.rglob("*"))
    capsys.readouterr()  # of saving the models
    try:
        code = command.main(flags_of(Path(), *more.split()))
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(said) == 1 and BAD[more] in said[0], said
    assert sorted(pair.rglob("*")) == before and not loaded


@pytest.mark.parametrize(
    "more", ["--problems p.jsonl", "--problems p.jsonl --student s", "--compare student"]
)
def test_combinations_that_make_no_sense(more, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.parse(more.split())
    assert stopped.value.code == 2 and more.split()[0] in capsys.readouterr().err


def test_another_tokenizer_in_compare_is_named(pair, capsys):
    write_model(pair / "alien", tokenizer_seed=3)
    assert command.main(flags_of(pair, "--compare", pair / "alien")) == 2
    assert f"--compare {pair / 'alien'}" in capsys.readouterr().err


def test_what_is_done_is_written_when_a_later_student_fails(pair):
    write_model(pair / "late", seed=2)
    weights = pair / "late" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert command.main(flags_of(pair, "--compare", pair / "late")) == 2
    assert set(json.loads((pair / "new" / "report.json").read_text())["students"]) == {"student"}


def test_shared_flags_are_those_of_training():
    """One default, one meaning: a diagnosis is of the run that would be started."""
    ours, theirs = command.parse([]), parse([])
    rows = {row[0]: row for row in sum(train.FLAGS.values(), [])}
    assert all(rows[row[0]] == row for row in command.METHODS)
    for flag in [*command.SHARED, *(row[0] for row in command.METHODS)]:
        name = flag[2:].replace("-", "_")
        assert getattr(ours, name) == getattr(theirs, name), flag
    assert ours.given == {}
    given = command.parse(["--lgr-tau", "0.3", "--thinking", "--toy", "fork"]).given
    assert given == {"--lgr-tau": 0.3, "--thinking": True, "--toy": "fork"}


def test_margins_are_those_that_training_would_see():
    """The same rollouts through masks.release: same gains, same release points."""
    w = toy.world("varied")
    (student, tokenizer), (teacher, _) = build.load(w.student), build.load(w.teacher)
    problems = toy.problems(12, moves=12, split="test")
    prompts = toy_prompts(tokenizer, problems)
    args = command.parse(["--toy", "varied"])
    options = probing.Options(stop_ids=(tokenizer.eos_token_id,), pad_id=0, vocab_size=153,
                              progress=False)  # fmt: skip
    rows = probing.sample(student, prompts, options, max_new_tokens=220, seed=0, desc="")
    found = probing.read(student, teacher, prompts, rows, options)
    splitter, _ = measuring.teachability.sentence_splitter("untrained")
    j = job(np.arange(12), tokenizer=tokenizer, splitter=splitter)
    j.args = args
    ours = measuring.measure_margin(j, found, rows, curves.bins(220), "")

    run = make_run("--toy", "varied")
    run.splitter = splitter
    batch = measuring.probing.rollout.generate(
        student, prompts, max_new_tokens=220, eos_ids=options.stop_ids, pad_id=0, top_k=4,
        generator=torch.Generator().manual_seed(0), decode=run.decode,
    )  # fmt: skip
    scores = score(run, batch)
    assert ours["gain_each"] == pytest.approx(scores.gain_B.tolist(), rel=1e-3)
    share = scores.keep_BT.sum(1) / batch.response_mask_BT.sum(1)
    for at, released, kept in zip(ours["release_at_each"], scores.released_B.tolist(),
                                  share.tolist(), strict=True):  # fmt: skip
        assert (at is not None) == released and (at is None or at == pytest.approx(kept, rel=1e-5))
