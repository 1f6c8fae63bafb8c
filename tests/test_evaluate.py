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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import evaluate
import toy

ROOT = Path(evaluate.__file__).parent
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '<think>' if enable_thinking }}{% endif %}"
)
CHAT_SPECIALS = ["<|user|>", "<|system|>", "<|assistant|>"]


def byte_tokenizer(template=TEMPLATE):
    """Every byte is a token, so every text can be spelled."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", extra_special_tokens=CHAT_SPECIALS
    )
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(tokenizer, seed=0, context=256, **changes):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3,  # padded, as real checkpoints are
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
    return Qwen3ForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    tiny_model(tokenizer, attention_dropout=0.5).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# ------------------------------------------------------------------------------------- problems


def write(path, *lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def test_load_problems_reads_the_three_forms_and_skips_blank_lines(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    path = write(
        tmp_path / "p.jsonl",
        {"problem": "one?", "answer": "1", "level": 3},
        b"  \r",
        {"prompt": "two?", "answer": 2},
        {"messages": chat, "answer": 0.5},
        b"",
    )
    problems = evaluate.load_problems(path)
    assert [p["answer"] for p in problems] == ["1", "2", "0.5"]
    assert [p["where"] for p in problems] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert problems[0]["messages"] == [{"role": "user", "content": "one?"}]
    assert problems[2]["messages"] == chat


def test_a_byte_order_mark_and_crlf_are_no_error(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem": "a \xe2\x80\xa8 b", "answer": 1}\r\n')
    assert evaluate.load_problems(path)[0]["messages"][0]["content"] == "a \u2028 b"


GOOD = {"problem": "p", "answer": "1"}
BAD = {
    "malformed": (b'{"problem": ', "malformed JSON"),
    "not utf-8": (b'{"problem": "\xff"}', "not UTF-8"),
    "deep": (b"[" * 100_000, "malformed JSON"),
    "not an object": (["p"], "expected an object"),
    "no prompt": ({"answer": "1"}, "needs one of"),
    "two prompts": (GOOD | {"prompt": "p"}, "needs one of"),
    "no answer": ({"problem": "p"}, '"answer"'),
    "null answer": (GOOD | {"answer": None}, '"answer"'),
    "bool answer": (GOOD | {"answer": True}, '"answer"'),
    "nan answer": (b'{"problem": "p", "answer": NaN}', '"answer"'),
    "list answer": (GOOD | {"answer": ["1"]}, '"answer"'),
    "blank answer": (GOOD | {"answer": " "}, '"answer"'),
    "empty problem": (GOOD | {"problem": " \n"}, "problem"),
    "number problem": (GOOD | {"problem": 3}, "problem"),
    "half a surrogate": (b'{"problem": "\\ud800", "answer": 1}', "surrogate"),
    "messages text": ({"messages": "hi", "answer": 1}, "messages"),
    "messages empty": ({"messages": [], "answer": 1}, "messages"),
    "message keys": ({"messages": [{"role": "user"}], "answer": 1}, "content"),
    "role": ({"messages": [{"role": "<|user|>", "content": "x"}], "answer": 1}, "role"),
    "assistant": ({"messages": [{"role": "assistant", "content": "x"}], "answer": 1}, "assistant"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(tmp_path, name):
    line, what = BAD[name]
    path = write(tmp_path / "p.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=what) as caught:
        evaluate.load_problems(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path, write(tmp_path / "empty.jsonl", b"\n")):
        with pytest.raises(ValueError, match=str(path)):
            evaluate.load_problems(path)


def test_answers_may_be_optional_and_records_share_the_checks():
    (problem,) = evaluate.from_records([{"problem": "p"}], "mine", require_answer=False)
    assert problem["answer"] is None and problem["where"] == "mine:1"
    for records, message in (([{"problem": "p"}], "mine:1"), ([], "mine: no problems")):
        with pytest.raises(ValueError, match=message):
            evaluate.from_records(records, "mine")
    assert evaluate.from_records(toy.problems(3, split="test"), "toy")[2]["where"] == "toy:3"


# -------------------------------------------------------------------------------------- prompts


def ask(*texts):
    return evaluate.from_records([{"problem": t, "answer": "1"} for t in texts], "p")


def test_prompts_go_through_the_template_without_a_second_bos():
    tokenizer = byte_tokenizer()
    plain, thinking = (
        evaluate.render_prompts(tokenizer, ask("1+1?"), thinking=t)[0] for t in (False, True)
    )
    assert tokenizer.decode(plain) == "<|user|>1+1?<|end|><|assistant|>"
    assert thinking == plain + tokenizer.convert_tokens_to_ids(["<think>"])
    assert type(plain) is list and type(plain[0]) is int


def test_prompts_without_a_template_are_plain():
    tokenizer = byte_tokenizer(template=None)
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    problems = evaluate.from_records([{"messages": chat, "answer": 1}], "p")
    assert tokenizer.decode(evaluate.render_prompts(tokenizer, problems)[0]) == "a\n\nb\n\n"


@pytest.mark.parametrize("text", ["a<|end|>b", "<|assistant|>", "x <|user|>"])
@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_control_tokens_inside_a_problem_are_refused(text, template):
    with pytest.raises(ValueError, match=r"^p:2: the text contains the control token '<\|"):
        evaluate.render_prompts(byte_tokenizer(template), ask("fine", text))


def test_what_the_tokenizer_cannot_spell_is_refused():
    tokenizer = toy.build_tokenizer()
    assert evaluate.render_prompts(tokenizer, ask("Where does it stop?"))
    with pytest.raises(ValueError, match="^p:1: the tokenizer has no tokens"):
        evaluate.render_prompts(tokenizer, ask("Where is the elephant?"))
    backend = Tokenizer(models.WordLevel({"stop": 0}))  # no unk: it raises
    with pytest.raises(ValueError, match="^p:1: cannot be rendered"):
        evaluate.render_prompts(PreTrainedTokenizerFast(tokenizer_object=backend), ask("x"))
    chat = [{"role": "tool", "content": "stop"}]
    with pytest.raises(ValueError, match="^p:1: the tokenizer has no tokens"):
        problems = evaluate.from_records([{"messages": chat, "answer": 1}], "p")
        evaluate.render_prompts(tokenizer, problems)


def test_templates_that_refuse_or_render_nothing_are_named():
    for template, message in (
        ("{{ raise_exception('roles must alternate') }}", "p:1: .*roles must alternate"),
        ("{% if false %}x{% endif %}", "p:1: the prompt renders to no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.render_prompts(byte_tokenizer(template), ask("hi"))


def test_toy_prompts_are_those_of_the_toy_world():
    tokenizer, problems = toy.build_tokenizer(), toy.problems(5, split="test")
    rendered = evaluate.render_prompts(tokenizer, evaluate.from_records(problems, "toy"))
    assert rendered == [toy.prompt_ids(tokenizer, p) for p in problems]


def test_check_fit_names_the_problem_that_is_too_long():
    model, problems = tiny_model(byte_tokenizer(), context=40), ask("x", "y" * 20)
    prompts = evaluate.render_prompts(byte_tokenizer(), problems)
    evaluate.check_fit(model.config, problems, prompts, 40 - len(prompts[1]))
    with pytest.raises(
        ValueError,
        match=r"p:2: prompt of 23 tokens \+ 18 new.* context of 40",
    ):
        evaluate.check_fit(model.config, problems, prompts, 18)
    with pytest.raises(ValueError, match="p:1: token id 9999"):
        evaluate.check_fit(model.config, problems, [[9999], [1]], 1)


def test_stop_ids_are_the_union_over_every_source():
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer)
    model.generation_config.eos_token_id = [3, tokenizer.eos_token_id]
    model.config.eos_token_id = 5
    assert evaluate.stop_ids(model, tokenizer) == [3, 5, tokenizer.eos_token_id]
    assert evaluate.stop_ids(model.config) == [5]
    assert evaluate.stop_ids(GPT2Config(eos_token_id=0)) == [0]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no stop token"):
        evaluate.stop_ids(tokenizer)
    with pytest.raises(ValueError, match="neither"):
        evaluate.pad_id(tokenizer)


def test_pad_id_falls_back_to_eos():
    tokenizer = byte_tokenizer()
    assert evaluate.pad_id(tokenizer) == tokenizer.eos_token_id
    assert evaluate.pad_id(toy.build_tokenizer()) == toy.build_tokenizer().pad_token_id


# --------------------------------------------------------------------------------------- models


def load(path):
    return evaluate.load_model(path, dtype=torch.float32, device="cpu")


def test_load_model_sets_dropout_to_zero_and_eval_mode(folder, tmp_path):
    model = load(folder)
    assert model.config.attention_dropout == 0 and not model.training
    assert model.dtype == torch.float32
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, attn_pdrop=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2").train()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_models_that_are_not_there_are_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_online", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in ("/nowhere/at/all", tmp_path / "empty", tmp_path / "file", "no-such/model", ""):
        for loader in (load, evaluate.load_tokenizer):
            with pytest.raises(ValueError) as caught:
                loader(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no-such/model: .* this machine is offline"):
        load("no-such/model")


def test_broken_weights_are_refused(folder, tmp_path):
    for name in ("cut", "gap", "pickled"):
        path = tmp_path / name
        model = tiny_model(byte_tokenizer())
        state = model.state_dict()
        if name == "gap":  # transformers itself would draw the missing weight at random
            state.pop("model.norm.weight")
        model.save_pretrained(path, state_dict=state)
        weights = path / "model.safetensors"
        if name == "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        if name == "pickled":
            weights.unlink()
            torch.save(state, path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=str(path)):
            load(path)


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
    settings |= dict(stop_ids=evaluate.stop_ids(model, tokenizer), vocab_size=len(tokenizer))
    settings |= dict(pad_id=evaluate.pad_id(tokenizer), generator=torch.Generator().manual_seed(1))
    prompts = evaluate.render_prompts(tokenizer, problems) if problems else []
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
        evaluate.from_records([{"problem": "a"}], "p", require_answer=False), temperature=0
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
    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: pytest.fail("read weights"))
    monkeypatch.setattr(evaluate, "_online", lambda: False)
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
