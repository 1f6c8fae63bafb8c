"""Answers: what is extracted, what counts as equal, and math-verify in its own process."""

import functools
import json
import os
import random
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import answers
import harness


# ------------------------------------------------------------------------------------ extraction
@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed {\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{x}", "x"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{3} and \boxed{4", None),  # cut off: no answer
        (r"\boxed{4 and \boxed{5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"} \boxed{a}} {", "a"),
        (r"\boxed{}", ""),
        (r"\boxed{ 12", None),
        (r"\boxed{2} and \boxed{3}", r"\boxed{2} and \boxed{3}"),
        (r"\boxed{2}, no: \boxed{3}", "3"),
        (r"\boxed{2}. Then \boxed{3}", "3"),
        (r"<think>\boxed{4}</think> It is 5.", "5"),
        (r"<think>\boxed{4}</think> ", "4"),
        ("<think>4</think> Unsure.", None),
        ("5 + 7 = 12\n#### 12", "12"),
        ("#### 12\n\nQuestion: 3?", "12"),
        ("#### 3. Total\nIt is 7.", "7"),
        (r"He earns $12,\!000$.", r"12,\!000"),
        (r"It is $\frac{1+\sqrt5}{2}$.", r"\frac{1+\sqrt5}{2}"),
        (r"It is \frac{1+\sqrt5}{2}.", r"\frac{1+\sqrt5}{2}"),
        ("in [0,1).", "[0,1)"),
        ("The final answer is $(7,6)$.", "(7,6)"),
        (r"$a+b = 3+4 = 7$", "7"),
        (r"$x = \frac13 \approx 0.33$", r"\frac13"),
        ("$5 and $7, so $12", "12"),
        ("12 000", "12 000"),
        ("The result is $E$.", "E"),
        (r"\\boxed{7}", "7"),
        ("It is 42.", "42"),
        ("-3.5 degrees", "-3.5"),
        ("from 10-7", "7"),
        ("x=-5", "-5"),
        ("costs $1,234,567.80!", "1,234,567.80"),
        ("a, 12,34", "34"),
        ("1,2345", "2345"),
        ("about 6.02e23 of them", "6.02e23"),
        ("one half is 1/2", "1/2"),
        ("that is 3 / 4.", "3 / 4"),
        (r"so \frac{-1}{2}.", r"\frac{-1}{2}"),
        ("version 1.2.3", "3"),
        ("it is .5", ".5"),
        ("\u22127", "\u22127"),
        ("no number", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert answers.extract_answer(text) == answer


plain = st.text("aZ09 .,-/\n\0\u2212\u00e9\u4e00\U0001f600", max_size=8)  # no braces or backslashes
balanced = st.recursive(
    plain,
    lambda inner: st.builds(lambda a, b, c: f"{a}\\frac{{{b}}}\\}}{c}", inner, inner, inner),
    max_leaves=6,
)


@given(balanced, plain)
def test_extract_answer_returns_what_is_in_the_box(inside, around):
    assert answers.extract_answer(f"{around} \\boxed{{{inside}}} {around}") == inside


@given(st.text(alphabet="\\boxed{}fb1 -/.,e"))
def test_extract_answer_takes_any_text(text):
    answer = answers.extract_answer(text)
    assert answer is None or answer in text


UNITS = ["\\boxed{", "\\boxed{1}", "}", "{", "\\", "1", "1,", "1,111", "1/", "1.", "1e", "-"]
MORE = ["\\frac{", "$", "$$ ", "$1$", "\\(", "\\[1", "(", "(1,", "[0,", "####", "#### 1\n", "\n",
        "</think>",
        "=", "x=", "(x,y)=", "\\approx", "\\text{", "1 000", "x_1=", "^", "and "]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS + MORE)
def test_extract_answer_is_linear(unit):
    """With quadratic work this would not end today."""
    answers.extract_answer(unit * (300_000 // len(unit)))


# ------------------------------------------------------------------------------------ comparison
EQUAL = [
    ("0.5", r"\frac12"),
    ("1/2", "0.50"),
    (r"\dfrac{1}{2}", "1 / 2"),
    (r"-\tfrac{3}{4}", "-.75"),
    (r"\frac{-3}{4}", "-0.75"),
    (r"1\frac{1}{2}", "1.5"),
    ("-1 1/2", "-3/2"),
    ("1,234", "1234"),
    (r"$1{,}234.$", "1234.0"),
    (r"10\,000", "10000"),
    ("+7", "7"),
    ("7.", "7"),
    ("007", "7"),
    ("\u22127", "-7"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90°"),
    (r"\$5", "5"),
    (r"6 \times 10^{3}", "6000"),
    ("1e3", "1000"),
    (r"\text{east}", "east"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    (r"\(x + 1\)", "x+1"),
    (r"\frac{x}{y}", "x/y"),
    (r"\frac{x+1}{2}", "(x+1)/2"),
    (r"(\frac{1}{2}, 3)", "(1/2,3)"),
    (r"\boxed{3}", "3"),
    ("0, 9, 14", "0,9,14"),
    ("x  y", "x y"),
    (r"5~\text{cm}", "5 cm"),
    (r"+\sqrt{2}", r"\sqrt{2}"),
]
DIFFERENT = [
    ("1", "2"),
    ("1 1/2", "11/2"),
    (r"1\frac{1}{2}", "11/2"),
    ("1 2", "12"),
    ("1, 234", "1234"),
    ("0.333", "1/3"),
    ("0.5", "50"),
    ("5 cm", "5"),
    ("x", "X"),
    ("1/0", "2/0"),
    ("9**9**9", "1"),
    ("1e999999999", "1e999999998"),
    ("", "1"),
    ("$", ""),
    ("$", "."),
    ("(1,2)", "(2,1)"),
]


ROOT = Path(__file__).parents[1]
CASES = [json.loads(line) for line in (ROOT / "tests/answers.jsonl").read_text().splitlines()]
GSM8K = ROOT.parent / "shared/data/gsm8k_test.jsonl"


@pytest.fixture
def exact(monkeypatch):
    """As on a machine without math-verify."""
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("one, other", EQUAL)
def test_equal_answers(exact, one, other):
    assert answers.is_correct(one, other) and answers.is_correct(other, one)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different_answers(exact, one, other):
    assert not answers.is_correct(one, other) and not answers.is_correct(other, one)


def test_no_answer_is_never_right_and_references_may_be_numbers(exact):
    assert not answers.is_correct(None, "1") and not answers.is_correct("", "")
    assert answers.is_correct("2.0", 2) and answers.is_correct("0.5", 0.5)
    assert not answers.is_correct("1", 10**5000)  # Python refuses to spell it


def test_nothing_is_evaluated(exact):
    assert not answers.is_correct("__import__('os').getpid()", str(os.getpid()))


@settings(max_examples=300)
@given(st.text(alphabet="0123456789+-./,%$ \\{}^abfrct()=") | st.text())
def test_is_correct_is_reflexive_and_never_raises(text):
    assert answers.is_correct(text, text) == bool(text.strip())
    normal = answers.normalise(text)
    answers.value(normal)


@given(st.integers(), st.integers(1, 10**6))
def test_fractions_and_decimals_are_compared_by_value(a, b):
    for text in (f"{a}/{b}", answers.normalise(f"\\frac{{{a}}}{{{b}}}")):
        assert answers.value(text) == Fraction(a, b)
    assert answers.value(answers.normalise(f"{a:,}")) == a
    assert answers.value(f"{a}.25") == Fraction(f"{a}.25")


@pytest.mark.parametrize(
    "unit", ["\\text{", "\\frac{", "1,111", " ", "\\left", "{", "9", "\\boxed{1}", "1 "]
)
def test_is_correct_is_quick_on_hostile_text(exact, unit):
    for length in (answers.LONGEST_ANSWER, 1_000_000):
        text = unit * (length // len(unit))
        assert not answers.is_correct(text, "3") and not answers.is_correct(text, text + "}")


def test_labelled_cases(exact):
    """50% for 0.5 is known to math-verify only."""
    wrong = [
        case for case in CASES
        if answers.is_correct(answers.extract_answer(case["prediction"]), case["reference"])
        != case["expected"]
    ]  # fmt: skip
    assert len(CASES) >= 250 and [case["reference"] for case in wrong] == [r"50\%"]


@pytest.mark.skipif(not GSM8K.exists(), reason="the data set is not there")
def test_gsm8k(exact):
    """Every right answer counts, in one of four wordings; the next number never does."""
    ways = ("So it is ${}.", r"\boxed{{{}}}", "#### {}", "The answer is **{}** dollars.")
    for i, line in enumerate(GSM8K.read_text().splitlines()):
        solution = json.loads(line)["answer"]
        right = solution.split("####")[1].strip()
        next_one = str(int(right.replace(",", "")) + 1)
        said = [ways[i % 4].format(number) for number in (right, next_one)]
        judged = [answers.is_correct(answers.extract_answer(text), solution) for text in said]
        assert judged == [True, False], said


def test_problem_files_with_worked_solutions():
    load = functools.partial(harness.from_records, where="here")
    gsm8k = {"question": "q", "answer": "6*3=<<6*3=18>>18\n#### 18"}
    competition = {"problem": "p", "solution": r"So $x=\boxed{\frac34}$.", "level": "Level 5"}
    assert [p["answer"] for p in load([gsm8k, competition])] == ["18", r"\frac34"]
    both = competition | {"answer": "0.75"}
    assert load([both])[0]["answer"] == "0.75" and load([both])[0]["messages"][0]["content"] == "p"
    (untold,) = load([{"problem": "p", "solution": "Clear."}], require_answer=False)
    assert untold["answer"] is None
    for bad in ({"answer": "####"}, {"answer": r"\boxed{ }"}, {"answer": r"cut: \boxed{3"},
                {"solution": "It is clear."}, {"solution": ["3"]}):  # fmt: skip
        with pytest.raises(ValueError, match="^here:2: ") as caught:
            load([gsm8k, {"problem": "p"} | bad])
        assert "\n" not in str(caught.value)


def reference(rng):
    """An answer in the style of competition problems, and what it stands for: a number, or a kind
    of thing and its parts. A name, a percent sign and the order of items are left out of that."""
    a, b, c, x = rng.randint(-9, 20), rng.randint(2, 9), rng.randint(2, 20), rng.choice("xyXY")
    c += a == c
    items = ("items", frozenset({a, c}))
    return rng.choice([
        (str(a), Fraction(a)), (rf"\frac{{{a}}}{{{b}}}", Fraction(a, b)),
        (f"{x} = {a}", Fraction(a)),
        (f"{c}.{b}", Fraction(f"{c}.{b}")), (rf"{c} \times 10^{{-{b}}}", Fraction(c, 10**b)),
        (rf"{a}\%", Fraction(a)), (f"{c}^{{{b}}}", Fraction(c**b)), (rf"{a}^\circ", Fraction(a)),
        (f"({a}, {c})", items), (rf"\{{{a}, {c}\}}", items), (f"{a}, {c}", items),
        (f"[{a}, {c}]", ("closed", a, c)), (f"[{a},{c})", ("half open", a, c)),
        (rf"{c}\sqrt{{{b}}}", ("root", c, b)), (rf"{c}\pi", ("pi", c)), (x, ("letter", x)),
        (f"{c}{x}+{b}={a}", ("equation", c, x, b, a)), (f"{x}^{{{c}}}", ("power", x, c)),
        (f"{x}+{c}", ("sum", x, c)), (rf"{x} \le {a}", ("at most", x, a)),
        (f"{c}:{b}", ("to", c, b)),
        (rf"\begin{{pmatrix}} {a} \\ {c} \end{{pmatrix}}", ("column", a, c)),
        (rf"\begin{{pmatrix}} {a} & {c} \end{{pmatrix}}", ("row", a, c)),
    ])  # fmt: skip


def test_what_differs_is_never_equal(exact):
    rng = random.Random(0)
    pairs = [(reference(rng), reference(rng)) for _ in range(int(os.environ.get("PAIRS", 3000)))]
    for (one, means_one), (other, means_other) in pairs:
        assert means_one == means_other or not answers.is_correct(one, other), (one, other)
        assert answers.is_correct(one, other) == answers.is_correct(other, one), (one, other)


# ----------------------------------------------------------------------------------- math-verify
STUB = """
import os, sys, time
def parse(text):
    print("noise on stdout")
    if "hang" in text: time.sleep(10**6)
    if "die" in text: os._exit(1)
    if "raise" in text: raise RuntimeError(text)
    return [text.lower()]
def verify(gold, target):
    return gold == target
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    answers._verify.cache_clear()
    yield
    for judge in answers._judges:
        judge.kill()
    answers._judges.clear()
    answers._verify.cache_clear()


def test_math_verify_is_asked_in_another_process_that_may_hang_or_die(stub):
    assert answers.is_correct("Abc", "aBC")
    first = answers._judges[0].pid
    assert not answers.is_correct("Abc", "abd") and answers._judges[0].pid == first
    for text in ("raise", "die", "hang"):
        assert not answers.is_correct(text, "x" + text, timeout=0.5)
    assert answers.is_correct("Xyz", "xyZ")  # a new process after the dead one
    answers._judges[0].kill()
    answers._judges[0].wait()
    assert not answers.is_correct("Pqr", "pqR") and answers.is_correct("Uvw", "uvW")
    assert answers.is_correct("q" * 900, "Q" * 900)
    assert not answers.is_correct("q" * 1100, "Q" * 1100)  # over the length cap


def test_a_module_of_that_name_without_a_spec_is_not_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", type(sys)("math_verify"))
    assert not answers.is_correct("Abc", "aBC")


def test_a_math_verify_that_does_not_import_is_only_not_equal(stub, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    assert not answers.is_correct("Abc", "aBC") and not answers._judges
