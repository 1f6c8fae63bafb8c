import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loading import GOOD, ask, byte_tokenizer, tiny_model, write
from transformers import AutoTokenizer

import evaluate
import harness
import toy

ROOT = Path(evaluate.__file__).parent

# -------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed {\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{x}", "x"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{4 and \boxed{5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"} \boxed{a}} {", "a"),
        (r"\boxed{}", ""),
        (r"\boxed{ 12", "12"),
        (r"\\boxed{7}", "7"),
        ("It is 42.", "42"),
        ("-3.5 degrees", "-3.5"),
        ("from 10-7", "7"),
        ("x=-5", "-5"),
        ("costs $1,234,567.80!", "1,234,567.80"),
        ("a, 12,34", "34"),
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
    assert evaluate.extract_answer(text) == answer


balanced = st.recursive(
    st.text(st.characters(exclude_characters="{}\\", codec="utf-8"), max_size=8),
    lambda inner: st.builds(lambda a, b, c: f"{a}\\frac{{{b}}}{c}", inner, inner, inner),
    max_leaves=6,
)


@given(balanced, st.text(st.characters(exclude_characters="{}\\", codec="utf-8")))
def test_extract_answer_returns_what_is_in_the_box(inside, around):
    assert evaluate.extract_answer(f"{around} \\boxed{{{inside}}} {around}") == inside


@given(st.text(alphabet="\\boxed{}fb1 -/.,e"))
def test_extract_answer_takes_any_text(text):
    answer = evaluate.extract_answer(text)
    assert answer is None or answer in text


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "\\boxed{1}",
        "}",
        "{",
        "\\",
        "1",
        "1,",
        "1,111",
        "1/",
        "1.",
        "1e",
        "-",
        "\\frac{",
    ],
)
def test_extract_answer_is_linear(unit):
    """A megabyte: with quadratic work this would not end today."""
    evaluate.extract_answer(unit * (1_000_000 // len(unit)))


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
    ("__import__('os').getpid()", str(os.getpid())),
    ("1e999999999", "1e999999998"),
    ("", "1"),
    ("$", ""),
    ("(1,2)", "(2,1)"),
]


@pytest.fixture
def exact(monkeypatch):
    """As on a machine without math-verify."""
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("one, other", EQUAL)
def test_equal_answers(exact, one, other):
    assert evaluate.is_correct(one, other) and evaluate.is_correct(other, one)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different_answers(exact, one, other):
    assert not evaluate.is_correct(one, other) and not evaluate.is_correct(other, one)


def test_no_answer_is_never_right_and_references_may_be_numbers(exact):
    assert not evaluate.is_correct(None, "1") and not evaluate.is_correct("", "")
    assert evaluate.is_correct("2.0", 2) and evaluate.is_correct("0.5", 0.5)


@settings(max_examples=300)
@given(st.text(alphabet="0123456789+-./,%$ \\{}^abfrct()=") | st.text())
def test_is_correct_is_reflexive_and_never_raises(text):
    assert evaluate.is_correct(text, text) == bool(text.strip())
    normal = evaluate._normalise(text)
    evaluate._value(normal)


@given(st.integers(), st.integers(1, 10**6))
def test_fractions_and_decimals_are_compared_by_value(a, b):
    value = Fraction(a, b)
    assert (
        evaluate._value(f"{a}/{b}")
        == value
        == evaluate._value(evaluate._normalise(f"\\frac{{{a}}}{{{b}}}"))
    )
    assert evaluate._value(evaluate._normalise(f"{a:,}")) == a
    assert evaluate._value(f"{a}.25") == Fraction(f"{a}.25")


@pytest.mark.parametrize(
    "unit", ["\\text{", "\\frac{", "1,111", " ", "\\left", "{", "9", "\\boxed{1}", "1 "]
)
def test_is_correct_is_quick_on_hostile_text(exact, unit):
    for length in (evaluate.LONGEST_ANSWER, 1_000_000):
        text = unit * (length // len(unit))
        assert not evaluate.is_correct(text, "3") and not evaluate.is_correct(text, text + "}")


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
    evaluate._verify.cache_clear()
    yield
    for judge in evaluate._judges:
        judge.kill()
    evaluate._judges.clear()
    evaluate._verify.cache_clear()


def test_math_verify_is_asked_in_another_process_that_may_hang_or_die(stub):
    assert evaluate.is_correct("Abc", "aBC")
    first = evaluate._judges[0].pid
    assert not evaluate.is_correct("Abc", "abd") and evaluate._judges[0].pid == first
    for text in ("raise", "die", "hang"):
        assert not evaluate.is_correct(text, "x" + text, timeout=0.5)
    assert evaluate.is_correct("Xyz", "xyZ")  # a new process after the dead one
    assert evaluate.is_correct("q" * 900, "Q" * 900)
    assert not evaluate.is_correct("q" * 1100, "Q" * 1100)  # over the length cap


def test_a_module_of_that_name_without_a_spec_is_not_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", type(sys)("math_verify"))
    assert not evaluate.is_correct("Abc", "aBC")


def test_a_math_verify_that_does_not_import_is_only_not_equal(stub, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    assert not evaluate.is_correct("Abc", "aBC") and not evaluate._judges


# -------------------------------------------------------------------------------------- figures


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([i < c for i in range(n)], k))
                share = sum(map(any, subsets)) / len(subsets)
                assert evaluate.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    assert evaluate.pass_at_k(5000, 1, 2500) == pytest.approx(0.5)
    assert evaluate.pass_at_k(np.int64(4), np.int64(4), 4) == 1.0


@pytest.mark.parametrize(
    "bad", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1), (4, 1.0, 1)]
)
def test_pass_at_k_refuses(bad):
    with pytest.raises(ValueError):
        evaluate.pass_at_k(*bad)


def test_bootstrap_agrees_with_the_normal_interval_of_a_binomial():
    for share, P in ((0.5, 400), (0.2, 1000)):
        values_P = np.arange(P) < share * P
        half = 1.96 * math.sqrt(share * (1 - share) / P)
        low, high = evaluate.bootstrap_interval(values_P, resamples=4000)
        assert low == pytest.approx(share - half, abs=0.1 * half)
        assert high == pytest.approx(share + half, abs=0.1 * half)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        low, high = evaluate.bootstrap_interval(rng.random(60) < 0.4, resamples=300, seed=trial)
        hits += low <= 0.4 <= high
    assert 0.89 < hits / 300 < 0.98


def test_bootstrap_edges():
    assert evaluate.bootstrap_interval([0.25]) == (0.25, 0.25)
    values_P = np.linspace(0, 1, 50)
    narrow, wide = (evaluate.bootstrap_interval(values_P, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    assert evaluate.bootstrap_interval(values_P, seed=3) == evaluate.bootstrap_interval(
        values_P, seed=3
    )
    low, high = evaluate.bootstrap_interval(np.ones(600_000) * 0.5, resamples=10)
    assert low == high == 0.5
    for bad in ([], [[1.0]], [math.nan], 3.0):
        with pytest.raises(ValueError, match="values_P"):
            evaluate.bootstrap_interval(bad)
    with pytest.raises(ValueError, match="level"):
        evaluate.bootstrap_interval([1], level=95)


def record(correct, **changes):
    base = {"text": "t", "answer": "1", "correct": correct, "truncated": False, "tokens": 10}
    return base | changes


def test_summarise_by_hand():
    records = [
        [record(True), record(False, tokens=30), record(False, answer=None), record(False)],
        [record(True), record(True), record(True, truncated=True), record(True, answer=" ")],
    ]
    summary = evaluate.summarise(records)
    assert summary["accuracy"] == pytest.approx(5 / 8)
    assert summary["pass@1"] == [summary[k] for k in ("accuracy", "accuracy_low", "accuracy_high")]
    assert summary["pass@2"][0] == pytest.approx((0.5 + 1) / 2)
    assert summary["pass@4"][0] == summary["pass_at_n"] == 1.0
    assert "pass@3" not in summary and "pass@8" not in summary
    assert (summary["samples"], summary["problems"]) == (4, 2)
    assert (summary["truncated"], summary["unparseable"]) == (1 / 8, 2 / 8)
    assert summary["mean_tokens"] == pytest.approx(100 / 8)
    json.dumps(summary)


@pytest.mark.parametrize("records", [[], [[]], [[record(True)], [record(True)] * 2]])
def test_summarise_refuses_uneven_records(records):
    with pytest.raises(ValueError, match="same number of samples"):
        evaluate.summarise(records)


# ------------------------------------------------------------------------------------- sampling


def sample(problems, **changes):
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer)
    settings = dict(samples=3, max_new_tokens=12, batch_size=2, progress=False)
    settings |= dict(stop_ids=harness.stop_ids(model, tokenizer), vocab_size=len(tokenizer))
    settings |= dict(pad_id=harness.pad_id(tokenizer), generator=torch.Generator().manual_seed(1))
    prompts = harness.render_prompts(tokenizer, problems) if problems else []
    return evaluate.sample_answers(model, tokenizer, problems, prompts, **settings | changes)


def test_sample_answers_groups_samples_by_problem_and_ignores_the_batch_size():
    problems = ask("a", "a longer one", "b")
    records = sample(problems)
    assert [len(r) for r in records] == [3, 3, 3]
    assert records == sample(problems, batch_size=64) == pickle.loads(pickle.dumps(records))
    flat = [r for rs in records for r in rs]
    assert set(flat[0]) == {"text", "answer", "correct", "truncated", "tokens"}
    assert all(1 <= r["tokens"] <= 12 and (r["tokens"] == 12 or not r["truncated"]) for r in flat)
    assert len({r["text"] for r in flat}) > 3
    evaluate.summarise(records)


def test_truncation_is_the_last_token_and_not_the_length():
    tokenizer = byte_tokenizer()
    always = sample(ask("a"), stop_ids=range(len(tokenizer)), max_new_tokens=1)[0]
    never = sample(ask("a"), stop_ids=[len(tokenizer) + 2])[0]
    assert [r["truncated"] for r in always] == [False] * 3
    assert [(r["truncated"], r["tokens"]) for r in never] == [(True, 12)] * 3


def test_greedy_samples_agree_and_missing_answers_are_not_right():
    (records,) = sample(
        harness.from_records([{"problem": "a"}], "p", require_answer=False), temperature=0
    )
    assert records == [records[0]] * 3 and not records[0]["correct"]


def test_an_empty_shard_and_bad_arguments():
    assert sample([]) == []
    for bad in (dict(samples=0), dict(batch_size=0)):
        with pytest.raises(ValueError, match="samples"):
            sample(ask("a"), **bad)


# ------------------------------------------------------------------------------------------ CLI


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=120,
    )


def main(capsys, *arguments):
    """The command in this process: importing torch takes seconds."""
    try:
        code = evaluate.main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def problems_file(tmp_path):
    return write(tmp_path / "p.jsonl", *[{"problem": f"{i}+1?", "answer": i + 1} for i in range(5)])


def test_the_command_end_to_end(folder, problems_file, tmp_path):
    out = tmp_path / "result.json"
    done = command(
        "--model",
        folder,
        "--problems",
        problems_file,
        "--count",
        4,
        "--samples",
        2,
        "--max-new-tokens",
        8,
        "--threads",
        1,
        "--out",
        out,
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])["model"]
    assert (summary["problems"], summary["samples"]) == (4, 2)
    saved = json.loads(out.read_text())
    assert saved["models"]["model"]["summary"] == summary
    assert saved["settings"]["seed"] == 0 and saved["settings"]["dtype"] == "float32"
    assert saved["versions"]["torch"] == torch.__version__
    answers = saved["models"]["model"]["problems"]
    assert [p["answer"] for p in answers] == ["1", "2", "3", "4"]
    assert [len(p["samples"]) for p in answers] == [2] * 4


def test_an_error_of_the_command_is_one_line(tmp_path):
    done = command("--problems", tmp_path / "none.jsonl", "--model", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("evaluate.py: error: ") and "none.jsonl" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_errors_name_the_culprit_before_weights_are_read(
    capsys, monkeypatch, folder, problems_file, tmp_path
):
    monkeypatch.setattr(harness, "load_model", lambda *_, **__: pytest.fail("read weights"))
    monkeypatch.setattr(harness.models, "_online", lambda: False)
    bad = write(tmp_path / "bad.jsonl", GOOD, b"{")
    control = write(tmp_path / "control.jsonl", GOOD, {"problem": "<|end|>", "answer": 1})
    (tmp_path / "there.json").write_text("mine")
    real = ["--model", folder, "--problems", problems_file]
    for arguments, what in (
        (["--model", folder, "--problems", bad], f"{bad}:2"),
        (["--model", folder, "--problems", control], f"{control}:2"),
        (["--model", tmp_path / "gone", "--problems", problems_file], "gone"),
        (["--model", "no/hub", "--problems", problems_file], "no/hub"),
        ([*real, "--out", tmp_path / "there.json"], "there.json"),
        ([*real, "--out", tmp_path / "no" / "x.json"], "x.json"),
        ([*real, "--max-new-tokens", 9999], f"{problems_file}:1"),
        ([*real, "--device", "nonsense"], "nonsense"),
        ([*real, "--dtype", "int8"], "--dtype"),
        ([*real, "--temperature", "-1"], "--temperature"),
        ([*real, "--temperature", "nan"], "--temperature"),
        ([*real, "--temperature", "inf"], "--temperature"),
        ([*real, "--temperature", 0, "--samples", 2], "--samples"),
        ([*real, "--samples", 0], "--samples"),
        ([*real, "--batch-size", "x"], "--batch-size"),
        ([*real, "--toy", "horizon"], "--toy"),
        (["--problems", problems_file], "--model"),
        (["--toy", "nowhere"], "nowhere"),
        (["--toy", "horizon", "--difficulty", 99], "99"),
        (["--samples", "many"], "--samples"),
        (["--nonsense"], "--nonsense"),
    ):
        code, out, err = main(capsys, *arguments)
        assert code == 2 and out == "", arguments
        assert err.startswith("evaluate.py: error: ") and err.count("\n") == 1, err
        assert what in err, err
    assert (tmp_path / "there.json").read_text() == "mine"


def test_defaults_of_the_toy(capsys):
    args = evaluate.parse_arguments([])
    assert (args.toy, args.count, args.difficulty, args.samples) == ("horizon", 200, 12, 4)
    assert args.max_new_tokens == 223  # 1.5 times what a right response of 12 moves needs
    assert evaluate.parse_arguments(["--temperature", "0"]).samples == 1
    for world, moves in (("fork", 6), ("fork-mirror", 2), ("clean", 12)):
        assert evaluate.parse_arguments(["--toy", world]).difficulty == moves
    assert evaluate.parse_arguments(["--toy", "fork", "--difficulty", "3"]).difficulty == 3
    real = evaluate.parse_arguments(["--model", "m", "--problems", "p"])
    assert (real.max_new_tokens, real.count, real.toy) == (4096, None, None)


def test_a_toy_world_on_the_command_line(capsys):
    world = toy.world("horizon")
    short = ["--toy", "horizon", "--count", 30, "--difficulty", 4, "--device", "cpu"]
    code, out, err = main(capsys, *short, "--samples", 2)
    assert code == 0, err
    summaries = json.loads(out.splitlines()[-1])
    assert set(summaries) == {"student", "teacher"}
    assert summaries["teacher"]["accuracy"] > 0.7
    assert 0.25 < summaries["student"]["accuracy"] < summaries["teacher"]["accuracy"]
    assert summaries["teacher"]["truncated"] == 0 and summaries["teacher"]["unparseable"] == 0
    greedy = main(capsys, *short, "--temperature", 0, "--model", world.teacher)
    assert json.loads(greedy[1].splitlines()[-1])["model"]["accuracy"] > 0.9
    assert AutoTokenizer.from_pretrained(world.student).eos_token == "<|end|>"


def test_a_fork_reports_the_share_of_the_uncertain_wording(capsys, tmp_path):
    """Both models of the world write either wording half of the time; the share is that of the
    texts that were saved."""
    out = tmp_path / "all.json"
    short = ["--toy", "fork-mirror", "--count", 40, "--samples", 2, "--device", "cpu"]
    code, printed, err = main(capsys, *short, "--out", out)
    assert code == 0, err
    summaries = json.loads(printed.splitlines()[-1])
    for name, part in json.loads(out.read_text())["models"].items():
        texts = [sample["text"] for problem in part["problems"] for sample in problem["samples"]]
        so, thus = (sum(text.count(f", {word} ") for text in texts) for word in ("so", "thus"))
        assert summaries[name]["uncertain_wording"] == pytest.approx(so / (so + thus), abs=0.02)
        assert 0.3 < so / (so + thus) < 0.7
    plain = main(capsys, "--toy", "clean", "--count", 2, "--difficulty", 2, "--device", "cpu")
    assert "uncertain_wording" not in json.loads(plain[1].splitlines()[-1])["student"]
