"""Files, prompts and models from outside: what is read, and what is refused in one line."""

import pickle
import shutil
import socket
import threading
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import nltk
import pytest
import torch
from inputs import GOOD, TEMPLATE, ask, byte_tokenizer, tiny_model, write
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import harness
import teachability
import toy
from toy import build

# ------------------------------------------------------------------------------------- problems


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
    problems = harness.load_problems(path)
    assert [p["answer"] for p in problems] == ["1", "2", "0.5"]
    assert [p["where"] for p in problems] == [f"{path}:{n}" for n in (1, 3, 4)]
    assert problems[0]["messages"] == [{"role": "user", "content": "one?"}]
    assert problems[2]["messages"] == chat


def test_a_byte_order_mark_and_crlf_are_no_error(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem": "a \xe2\x80\xa8 b", "answer": 1}\r\n')
    assert harness.load_problems(path)[0]["messages"][0]["content"] == "a \u2028 b"


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
    "role of a token": (
        {"messages": [{"role": "end", "content": "x"}, GOOD], "answer": 1}, "role"
    ),
    "key twice": (b'{"problem": "p", "problem": "q", "answer": 1}', "'problem' comes twice"),
    "assistant": ({"messages": [{"role": "assistant", "content": "x"}], "answer": 1}, "assistant"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(tmp_path, name):
    line, what = BAD[name]
    path = write(tmp_path / "p.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=what) as caught:
        harness.load_problems(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path, write(tmp_path / "empty.jsonl", b"\n")):
        with pytest.raises(ValueError, match=str(path)):
            harness.load_problems(path)


def test_answers_may_be_optional_and_records_share_the_checks():
    (problem,) = harness.from_records([{"problem": "p"}], "mine", require_answer=False)
    assert problem["answer"] is None and problem["where"] == "mine:1"
    for records, message in (([{"problem": "p"}], "mine:1"), ([], "mine: no problems")):
        with pytest.raises(ValueError, match=message):
            harness.from_records(records, "mine")
    assert harness.from_records(toy.problems(3, split="test"), "toy")[2]["where"] == "toy:3"


# -------------------------------------------------------------------------------------- prompts


def test_prompts_go_through_the_template_without_a_second_bos():
    tokenizer = byte_tokenizer()
    plain, thinking = (
        harness.render_prompts(tokenizer, ask("1+1?"), thinking=t)[0] for t in (False, True)
    )
    assert tokenizer.decode(plain) == "<|user|>1+1?<|end|><|assistant|>"
    assert thinking == plain + tokenizer.convert_tokens_to_ids(["<think>"])
    assert type(plain) is list and type(plain[0]) is int


def test_prompts_without_a_template_are_plain():
    tokenizer = byte_tokenizer(template=None)
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    problems = harness.from_records([{"messages": chat, "answer": 1}], "p")
    assert tokenizer.decode(harness.render_prompts(tokenizer, problems)[0]) == "a\n\nb\n\n"


def test_without_a_template_the_tokenizer_begins_a_prompt_and_does_not_end_it():
    """Its own BOS stays, its own EOS goes: the model would take the prompt for a finished text."""
    tokenizer = byte_tokenizer(template=None)
    bos, eos = tokenizer.convert_tokens_to_ids("<|system|>"), tokenizer.eos_token_id
    ends = [("<|system|>", bos), ("<|end|>", eos)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=ends
    )
    tokenizer.bos_token = "<|system|>"
    plain = tokenizer("2 + 2?\n\n", add_special_tokens=False)["input_ids"]
    assert tokenizer("2 + 2?\n\n")["input_ids"] == [bos, *plain, eos]
    problems = harness.from_records([{"problem": "2 + 2?"}], "p", require_answer=False)
    assert harness.render_prompts(tokenizer, problems) == [[bos, *plain]]


def test_a_line_of_any_length_is_told_from_two(tmp_path, monkeypatch):
    """As long as the limit is read, one byte more is refused by its number, not cut in two."""
    text = '{"problem": "a", "answer": "1"}'
    monkeypatch.setattr(harness.data, "LONGEST_LINE", len(text) + 1)
    path = tmp_path / "p.jsonl"
    path.write_text(f"{text}\n{text}\n{text}")
    assert len(harness.load_problems(path)) == 3
    path.write_text(f"{text}\n{text} \n{text}\n")
    with pytest.raises(ValueError, match=f"p.jsonl:2: longer than {len(text) + 1} bytes"):
        harness.load_problems(path)


@pytest.mark.parametrize("text", ["a<|end|>b", "<|assistant|>", "x <|user|>"])
@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_control_tokens_inside_a_problem_are_refused(text, template):
    with pytest.raises(ValueError, match=r"^p:2: the text contains the control token '<\|"):
        harness.render_prompts(byte_tokenizer(template), ask("fine", text))


def test_what_the_tokenizer_cannot_spell_is_refused():
    tokenizer = build.build_tokenizer()
    assert harness.render_prompts(tokenizer, ask("Where does it stop?"))
    with pytest.raises(ValueError, match="^p:1: the tokenizer has no tokens"):
        harness.render_prompts(tokenizer, ask("Where is the elephant?"))
    backend = Tokenizer(models.WordLevel({"stop": 0}))  # no unk: it raises
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    only_stop = PreTrainedTokenizerFast(tokenizer_object=backend)
    for number in (1, 1024, 1025, 1500):  # many are encoded at a time; the culprit is named
        texts = ["stop"] * (number - 1) + ["x"] + ["stop"] * 100
        with pytest.raises(ValueError, match=f"^p:{number}: cannot be rendered"):
            harness.render_prompts(only_stop, ask(*texts))
    assert harness.render_prompts(only_stop, ask(*["stop"] * 1500)) == [[0]] * 1500
    chat = [{"role": "tool", "content": "stop"}]
    with pytest.raises(ValueError, match="^p:1: the tokenizer has no tokens"):
        problems = harness.from_records([{"messages": chat, "answer": 1}], "p")
        harness.render_prompts(tokenizer, problems)


def test_templates_that_refuse_or_render_nothing_are_named():
    for template, message in (
        ("{{ raise_exception('roles must alternate') }}", "p:1: .*roles must alternate"),
        ("{% if false %}x{% endif %}", "p:1: the prompt renders to no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            harness.render_prompts(byte_tokenizer(template), ask("hi"))


def test_toy_prompts_are_those_of_the_toy_world():
    tokenizer, problems = build.build_tokenizer(), toy.problems(5, split="test")
    rendered = harness.render_prompts(tokenizer, harness.from_records(problems, "toy"))
    for ids, problem in zip(rendered, problems, strict=True):
        assert tokenizer.decode(ids) == f"<|user|>{problem['problem']}<|end|><|assistant|>"


def test_check_fit_names_the_problem_that_is_too_long():
    model, problems = tiny_model(byte_tokenizer(), context=40), ask("x", "y" * 20)
    prompts = harness.render_prompts(byte_tokenizer(), problems)
    harness.check_fit(model.config, problems, prompts, 40 - len(prompts[1]))
    with pytest.raises(
        ValueError,
        match=r"p:2: prompt of 23 tokens \+ 18 new.* context of 40",
    ):
        harness.check_fit(model.config, problems, prompts, 18)
    with pytest.raises(ValueError, match="p:1: token id 9999"):
        harness.check_fit(model.config, problems, [[9999], [1]], 1)


def test_stop_ids_are_the_union_over_every_source():
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer)
    model.generation_config.eos_token_id = [3, tokenizer.eos_token_id]
    model.config.eos_token_id = 5
    assert harness.stop_ids(model, tokenizer) == [3, 5, tokenizer.eos_token_id]
    assert harness.stop_ids(model.config) == [5]
    assert harness.stop_ids(GPT2Config(eos_token_id=0)) == [0]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no stop token"):
        harness.stop_ids(tokenizer)
    with pytest.raises(ValueError, match="neither"):
        harness.pad_id(tokenizer)


def test_pad_id_falls_back_to_eos():
    tokenizer = byte_tokenizer()
    assert harness.pad_id(tokenizer) == tokenizer.eos_token_id
    assert harness.pad_id(build.build_tokenizer()) == build.build_tokenizer().pad_token_id


def test_a_special_token_that_is_unk_is_told_from_unknown_text():
    """In a text it is a control token; where the template writes it, it is the template's."""
    tokenizer = build.build_tokenizer()
    with pytest.raises(ValueError, match=r"p:1: the text contains the control token '<\|unk\|>'"):
        harness.render_prompts(tokenizer, ask("Where does <|unk|> stop?"))
    tokenizer.chat_template = "<|unk|>{{ messages[0]['content'] }}"
    assert harness.render_prompts(tokenizer, ask("Where does it stop?"))
    with pytest.raises(ValueError, match="p:1: the tokenizer has no tokens"):
        harness.render_prompts(tokenizer, ask("Where is the elephant?"))


def test_a_template_prints_the_day_that_it_is_told():
    day = datetime(2024, 2, 3)
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}")
    (ids,), (now,) = (harness.render_prompts(tokenizer, ask("x"), day=d) for d in (day, None))
    assert tokenizer.decode(ids) == "03 Feb 2024: x"
    assert tokenizer.decode(now) == datetime.now().strftime("%d %b %Y: x")


def test_bad_problems_are_left_out_with_a_count(tmp_path):
    """A broken line, a control token, a text that is too long; the rest is as it would be alone."""
    lines = [{"problem": str(i), "answer": 1} for i in range(9)]
    lines[2], lines[4] = b"{", {"problem": "<|end|>", "answer": 1}
    lines[8] = {"problem": "y" * 99, "answer": 1}
    path, tokenizer, skipped = write(tmp_path / "p.jsonl", *lines), byte_tokenizer(), []
    config, args = tiny_model(tokenizer, context=60).config, SimpleNamespace(thinking=False)
    args.max_new_tokens = 4
    problems = harness.load_problems(path, skipped=skipped)
    how = {"configs": {"m": config}, "skipped": skipped}
    problems, prompts = harness.open_prompts(args, tokenizer, problems, **how)
    assert [p["messages"][0]["content"] for p in problems] == ["0", "1", "3", "5", "6", "7"]
    assert prompts == harness.render_prompts(tokenizer, problems)
    assert [why.split(": ")[0] for why in skipped] == [f"{path}:{n}" for n in (3, 5, 9)]
    with pytest.raises(ValueError, match="leaves no problem; p:1: "):
        harness.open_prompts(args, tokenizer, ask("<|end|>"), skipped=[])


# --------------------------------------------------------------------------------------- models


def load(path):
    return harness.load_model(path, dtype=torch.float32, device="cpu")


def test_load_model_sets_dropout_to_zero_and_eval_mode(folder, tmp_path):
    model = load(folder)
    assert model.config.attention_dropout == 0 and not model.training
    assert model.dtype == torch.float32
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, attn_pdrop=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2").train()
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_models_that_are_not_there_are_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(harness.models, "_online", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in ("/nowhere/at/all", tmp_path / "empty", tmp_path / "file", "no-such/model", ""):
        for loader in (load, harness.load_tokenizer):
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
        with pytest.raises(ValueError, match=str(path)) as caught:
            load(path)
        assert ("--allow-bin" in str(caught.value)) == (name == "pickled")


def test_pickled_weights_are_read_when_told_and_only_there(folder, tmp_path):
    """Without a word they are not; with safetensors beside them, those are read all the same."""
    model = tiny_model(byte_tokenizer(), seed=3)
    model.save_pretrained(tmp_path / "m")
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save(other, tmp_path / "m" / "pytorch_model.bin")

    def first(path):
        options = {"dtype": torch.float32, "device": "cpu", "allow_bin": True}
        return next(harness.load_model(path, **options).parameters())

    assert torch.equal(first(tmp_path / "m"), next(model.parameters()))
    (tmp_path / "m" / "model.safetensors").unlink()
    assert torch.equal(first(tmp_path / "m"), next(model.parameters()) + 1)
    hostile = tmp_path / "hostile"
    shutil.copytree(tmp_path / "m", hostile)
    with open(hostile / "pytorch_model.bin", "wb") as file:
        pickle.dump(Hostile(tmp_path / "ran"), file, protocol=2)
    with pytest.raises(ValueError, match=str(hostile)):
        first(hostile)
    assert not (tmp_path / "ran").exists()


class Hostile:
    """Unpickled without restraint, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---------------------------------------------------------------- the sentence splitter's data
def test_download_offline_is_silent_and_falls_back(no_data, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert harness.open_splitter("auto")[1] == "untrained-punkt"
    assert harness.open_splitter("blocks")[1] == "blocks+untrained-punkt"
    with pytest.raises(ValueError, match="^--splitter pretrained: .*nltk.downloader punkt_tab"):
        harness.open_splitter("pretrained")
    assert capfd.readouterr() == ("", "")


def test_download_does_not_wait_forever(monkeypatch):
    never, begun = threading.Event(), time.monotonic()
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: never.wait())
    harness.download_punkt(0.05)
    assert time.monotonic() - begun < 30
    never.set()


def test_what_is_missing_is_downloaded_once(monkeypatch):
    installed, punkt = [], teachability.PunktSentenceTokenizer()

    def load(language):
        if not installed:
            raise LookupError
        return punkt

    monkeypatch.setattr(teachability, "PunktTokenizer", load)
    monkeypatch.setattr(nltk, "download", lambda name, **kwargs: installed.append(name))
    assert harness.open_splitter("untrained")[1] == "untrained-punkt" and not installed
    for kind in ("auto", "pretrained"):
        assert harness.open_splitter(kind) == (punkt, "nltk-punkt-english")
    assert harness.open_splitter("blocks")[1] == "blocks+nltk-punkt-english"
    assert installed == ["punkt_tab"]
    installed.clear()
    assert harness.open_splitter("blocks")[1] == "blocks+nltk-punkt-english"
    assert installed == ["punkt_tab"]
