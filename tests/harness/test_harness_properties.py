"""Properties of the public names of harness."""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import nltk
import pytest
import torch
from conftest import VOCABULARY, write_model
from hypothesis import assume
from hypothesis import strategies as st
from inputs import byte_tokenizer
from properties import (
    ROOT,
    TOYS,
    Letters,
    families,
    numbers,
    parsed,
    prop,
    spelling,
    strict,
    texts,
    tiny,
)
from transformers import GPT2Config

import evaluate
import harness
import teachability
import toy
import toy.__main__
import train
from harness import flags


# ---------------------------------------------------------------------------------------- loading
@prop("harness.number", examples=150, kind=st.sampled_from([int, float]), low=numbers, high=numbers,
      text=st.text(max_size=6) | numbers.map(str) | st.integers().map(str)
      | st.sampled_from(["nan", "inf", "-inf", "1e999", "1e-999", "١", "1_0", " 3 ", "0x1"]))
def test_a_number_lies_within_its_limits_or_is_refused(kind, low, high, text):
    try:
        value = harness.number(kind, low, high)(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        assert "\n" not in str(error) or "\n" in text or isinstance(error, ValueError)
        return
    assert type(value) is kind and low <= value <= high and value == kind(text)


ROWS = sum((train.FLAGS | harness.MACHINE).values(), [])


@prop("harness.Parser", "harness.parse", "harness.make_parser", "harness.defaults",
      "harness.left_open", "harness.say", "harness.check_processes", "harness.add_flags",
      examples=150, argv=st.lists(st.sampled_from(sorted(flag for flag, *_ in ROWS))
                    | st.sampled_from(["0", "1", "-1", "2", "0.5", "nan", "1e99", "opd", "topk",
                                       "x", "", "std", "on", "own", "release", "\0", "--", "toy"])
                    | st.text(max_size=3), max_size=5))
def test_any_command_line_is_parsed_or_refused_in_one_line(argv):
    """Parsed: every number finite, every choice one of those offered, every value's origin known,
    and what is said of it names every flag that was given."""
    assume(not any(a.startswith(("-h", "--h")) for a in argv))
    tables, said = (train.FLAGS, train.METHODS, train.PRESETS), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            argv = ["--device", "cpu", *argv]
            _, args, origins = flags.parse("train.py", *tables, argv)
            flags.say("train.py", args, origins)
    except SystemExit as error:
        assert error.code == 2 and said.getvalue().count("\n") == 1
        assert said.getvalue().startswith("train.py: error: ")
        return
    values, given = vars(args), {a.split("=")[0] for a in argv if a.startswith("--") and a != "--"}
    assert set(origins) == set(values)
    assert all(math.isfinite(v) for v in values.values() if isinstance(v, (int, float)))
    for flag, default, check, _ in ROWS:
        name = flag[2:].replace("-", "_")
        if isinstance(check, list) and check and values[name] is not None:
            assert values[name] in check
        assert origins[name] != "default" or values[name] == default
        if flag in given and values[name] is not None:
            assert origins[name] == "command line" and flag[2:] in said.getvalue()


@prop("harness.path_name", "harness.complain", "harness.check_creatable", examples=100,
      text=st.text() | st.sampled_from(["", "\0", "a" * 300, "x/" * 3000, "a\nb", "\x1b[2J", "ok"]))
def test_any_name_is_a_place_or_refused_and_any_complaint_is_one_line(text):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            name = harness.path_name(text)
        except argparse.ArgumentTypeError:
            assert not text or not text.isprintable() or not text.isascii()
        else:
            assert name == text
        try:
            harness.check_creatable("--out", Path(folder) / Path("./" + text))
        except ValueError as error:
            assert str(error).startswith("--out ")
        assert os.listdir(folder) == []
        harness.complain("train.py", text)
    line = said.getvalue()
    assert line.startswith("train.py: error: ") and line[:-1].isprintable() and line[-1] == "\n"


@prop("evaluate.make_parser", "toy.make_parser", examples=100,
      argv=st.lists(st.sampled_from(["--out", "--world", "--seed", "--threads", "--toy", "--steps",
                                     "--samples", "--temperature", "--horizon", "--dtype"])
                    | st.sampled_from(["0", "1", "-1", "nan", "1e99", "fork", "x", "", "\0"])
                    | st.text(max_size=3), max_size=4))
def test_the_other_commands_parse_or_refuse_in_one_line(argv):
    assume(not any(a.startswith(("-h", "--h")) for a in argv))
    for module, name in ((evaluate, "evaluate.py"), (toy.__main__, "toy")):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                values = vars(module.make_parser().parse_args(argv))
            except SystemExit as error:
                assert error.code == 2 and said.getvalue().count("\n") == 1
                assert said.getvalue().startswith(f"{name}: error: ")
            else:
                assert all(math.isfinite(v) for v in values.values() if isinstance(v, float))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["", " ", "\ud800", "user", "assistant", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "problem", "answer"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
records = st.dictionaries(
    st.sampled_from(["problem", "prompt", "messages", "answer", "level"]), json_values, max_size=3
) | st.fixed_dictionaries({"problem": st.text(min_size=1, max_size=9), "answer": json_values}) | (
    st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "User", ""]),
         "content": json_values | st.text(min_size=1)}), max_size=3), "answer": st.just("1")})
)  # fmt: skip


def check_problems(problems, where):
    for problem in problems:
        assert set(problem) == {"messages", "answer", "where"}
        assert problem["where"].startswith(where) and problem["messages"]
        assert problem["messages"][-1]["role"] != "assistant"
        texts = [m["content"] for m in problem["messages"]]
        assert all(text.strip() and text.encode() for text in texts)
        assert problem["answer"] is None or problem["answer"].encode()


@prop("harness.load_problems", "harness.from_records", examples=150, needed=st.booleans(),
      lines=st.lists(records | json_values | st.binary(max_size=12), max_size=4))
def test_any_file_is_problems_or_one_line_that_names_it(needed, lines):
    raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.jsonl")
        path.write_bytes(b"\n".join(raw))
        try:
            problems = harness.load_problems(path, require_answer=needed)
            assert len(problems) == sum(bool(line.strip()) for line in b"\n".join(raw).split(b"\n"))
            check_problems(problems, f"{path}:")
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    given = [x for x in lines if not isinstance(x, bytes)]
    before = repr(given)
    try:
        check_problems(harness.from_records(given, "here", require_answer=needed), "here:")
    except ValueError as error:
        assert str(error).startswith("here")
    assert repr(given) == before




@prop("harness.render_prompts", "harness.check_fit", examples=100, template=st.booleans(),
      contents=st.lists(st.text(min_size=1, max_size=9) | st.sampled_from(
          ["a<|end|>", "<|user|>", "<think>", "<|end"]), min_size=1, max_size=3),
      limit=st.integers(0, 300))
def test_prompts_spell_the_text_or_are_refused(template, contents, limit):
    """Decoded, the prompt is the rendered text; control tokens in a text are refused, and so is a
    prompt that leaves no room."""
    tokenizer, config = spelling(template)
    problem = {"messages": [{"role": "user", "content": c} for c in contents], "where": "f:1"}
    before = repr(problem)
    controlled = any(t in c for c in contents for t in ("<|end|>", "<|user|>"))
    try:
        (ids,) = harness.render_prompts(tokenizer, [problem])
    except ValueError as error:
        assert controlled and str(error).startswith("f:1: the text contains the control token")
        return
    assert not controlled and repr(problem) == before
    joined = "".join(f"<|user|>{c}<|end|>" for c in contents) + "<|assistant|>"
    text = joined if template else "\n\n".join(contents) + "\n\n"
    assert tokenizer.decode(ids) == text
    try:
        harness.check_fit(config, [problem], [ids], limit)
        assert len(ids) + limit <= config.max_position_embeddings and max(ids) < config.vocab_size
    except ValueError as error:
        assert len(ids) + limit > config.max_position_embeddings and "f:1" in str(error)


ids_of_stop = st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=3)


@prop("harness.stop_ids", "harness.pad_id", examples=80, given=st.lists(
      st.tuples(ids_of_stop, ids_of_stop, ids_of_stop), max_size=3))
def test_stop_ids_are_the_sorted_union(given):
    def has(ids):
        return SimpleNamespace(eos_token_id=ids)

    sources = [SimpleNamespace(eos_token_id=a, config=has(b), generation_config=has(c))
               for a, b, c in given]  # fmt: skip
    parts = [x for three in given for x in three if x is not None]
    union = sorted({i for x in parts for i in (x if isinstance(x, list) else [x])})
    if union:
        assert harness.stop_ids(*sources) == union
    else:
        with pytest.raises(ValueError, match="no stop token"):
            harness.stop_ids(*sources)
    for eos, pad, _ in given:
        tokenizer = SimpleNamespace(eos_token_id=eos, pad_token_id=pad)
        if eos is None and pad is None:
            with pytest.raises(ValueError, match="neither a pad nor"):
                harness.pad_id(tokenizer)
        else:
            assert harness.pad_id(tokenizer) == (eos if pad is None else pad)


@prop("harness.common_vocabulary", examples=80, sizes=st.tuples(st.integers(1, 9),
      st.integers(1, 9)), wrong=st.sets(st.integers(0, 8), max_size=2))
def test_the_common_vocabulary_is_the_longest_common_beginning(sizes, wrong):
    names = [[f"t{i}" for i in range(size)] for size in sizes]
    names[1] = [f"u{i}" if i in wrong else t for i, t in enumerate(names[1])]
    tokenizers = [SimpleNamespace(get_vocab=lambda n=n: {t: i for i, t in enumerate(n)})
                  for n in names]  # fmt: skip
    if any(i < min(sizes) for i in wrong):
        with pytest.raises(ValueError, match="another tokenizer"):
            harness.common_vocabulary(*tokenizers)
    else:
        assert harness.common_vocabulary(*tokenizers) == min(sizes)


@prop("harness.train_tokens", examples=150, text=st.from_regex(r"[0-9.-]{1,6}", fullmatch=True),
      longest=st.integers(1, 300), steps=st.integers(1, 40))
def test_a_step_is_at_most_as_long_as_an_evaluation(text, longest, steps):
    """From 1 to --max-new-tokens, in one direction, or refused with one line that has the text."""
    args = SimpleNamespace(train_tokens=text, max_new_tokens=longest, steps=steps)
    try:
        found = [harness.train_tokens(args, step) for step in range(steps)]
    except ValueError as error:
        assert f"--train-tokens {text}" in str(error) and "\n" not in str(error)
    else:
        assert 1 <= min(found) and max(found) <= longest and found in (sorted(found),
                                                                       sorted(found)[::-1])
    args.train_tokens = None
    assert harness.train_tokens(args, 0) == longest


@prop("harness.first_line", examples=60, text=texts)
def test_the_first_line_is_one(text):
    line = harness.first_line(ValueError(text))
    assert line and len(line.splitlines()) == 1
    assert line in text or not text.strip() and line == "ValueError"


@prop("harness.load_tokenizer", "harness.load_config", "harness.load_model", examples=40,
      path=st.text(max_size=8) | st.sampled_from(
          ["\0", "a/b", "a//b", "/", "~", "..", "/dev/null", "a\nb", str(ROOT / "tests")]),
      loader=st.sampled_from(["tokenizer", "config", "model"]))
def test_a_model_that_is_not_there_is_named(path, loader):
    load = getattr(harness, f"load_{loader}")
    more = {"dtype": torch.float32, "device": "cpu"} if loader == "model" else {}
    online, harness.models._online = harness.models._online, lambda: False
    try:
        with pytest.raises(ValueError) as caught:
            load(path, **more)
    finally:
        harness.models._online = online
    assert str(Path(path)) in str(caught.value) or repr(path) in str(caught.value) or (
        path in str(caught.value))  # fmt: skip


@prop("harness.check_head", examples=15, family=families, seed=st.integers(0, 3), bias=numbers,
      prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5))
def test_a_head_is_a_matrix_or_refused(family, seed, bias, prompt):
    model = copy.deepcopy(tiny(family, seed))
    harness.check_head("--student", model, prompt)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out * (1.5 + abs(bias)))
    with pytest.raises(ValueError, match="--student .* not hidden states times a matrix"):
        harness.check_head("--student", model, prompt)


@prop("harness.check_supported", examples=60, longest=st.integers(1, 600),
      window=st.none() | st.integers(1, 600),
      kind=st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"]),
      implementation=st.sampled_from(["sdpa", "eager", "flash_attention_2"]))
def test_models_are_refused_for_what_their_config_says(longest, window, kind, implementation):
    model = copy.copy(tiny("qwen3"))
    model.config = copy.deepcopy(model.config)
    model.config.sliding_window = window
    model.config.layer_types = [kind, "full_attention"]
    model.config._attn_implementation = implementation
    too_wide = kind == "sliding_attention" and window is not None and longest >= window
    bad = implementation not in ("sdpa", "eager") or kind == "chunked_attention"
    try:
        harness.check_supported(model, longest)
        assert not (too_wide or bad)
    except ValueError as error:
        assert (too_wide or bad) and str(error).startswith("Qwen3ForCausalLM")


# --------------------------------------------- what diagnose.py shares with the other commands
@prop("harness.check_prompts", examples=120, vocab=st.integers(1, 9), limit=st.integers(1, 9),
      prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), max_size=4),
      contexts=st.lists(st.integers(4, 18), max_size=2))
def test_prompts_fit_all_models_or_the_first_that_does_not_is_named(
    vocab, limit, prompts, contexts
):
    configs = {}
    for number, context in enumerate(contexts):
        configs[number] = copy.deepcopy(spelling(True)[1])
        configs[number].max_position_embeddings = context
    problems = [{"where": f"f:{i}"} for i in range(len(prompts))]
    arguments = {"tokenizer": Letters(), "configs": configs, "vocab_size": vocab,
                 "problems": problems, "prompts": prompts, "max_new_tokens": limit}  # fmt: skip
    strange = [i for i, prompt in enumerate(prompts) if max(prompt) >= vocab]
    long = [i for context in contexts for i, prompt in enumerate(prompts)
            if len(prompt) + limit > context]  # fmt: skip
    before = repr(arguments)
    if not strange and not long:
        assert harness.check_prompts(**arguments) is None
    else:
        first = (strange or long)[0]
        with pytest.raises(ValueError, match=f"^f:{first}: ") as error:
            harness.check_prompts(**arguments)
        assert ("--student and --teacher share" in str(error.value)) == bool(strange)
    assert repr(arguments) == before


@functools.cache
def foreign():
    """A model folder of another tokenizer; it goes when Python does."""
    folder = tempfile.TemporaryDirectory()
    write_model(folder.name)
    return folder


models = st.none() | st.sampled_from([*TOYS.values(), "not/there", "foreign"])


@prop("harness.open_pair", examples=25, student=models, teacher=models,
      world=st.sampled_from(toy.SHIPPED))
def test_a_pair_shares_a_vocabulary_or_is_refused(student, teacher, world):
    given = [foreign().name if x == "foreign" else x for x in (student, teacher)]
    args = SimpleNamespace(student=given[0], teacher=given[1], toy=world, trust_remote_code=False)
    before, bad = repr(args), {"not/there"} & {student, teacher}
    if bad or (student == "foreign") != (teacher == "foreign"):
        with pytest.raises(ValueError, match="not/there" if bad else "^--teacher has another"):
            harness.open_pair(args)
        return
    tokenizers, configs, vocab_size = harness.open_pair(args)
    assert repr(args) == before
    assert list(tokenizers) == list(configs) == ["--student", "--teacher"]
    assert vocab_size <= min(config.vocab_size for config in configs.values())
    names = [t.convert_ids_to_tokens(list(range(vocab_size))) for t in tokenizers.values()]
    assert names[0] == names[1]


def fails(error):
    """A function that raises this error, if any."""

    def function(*args, **kwargs):
        if error is not None:
            raise error

    return function


@prop("harness.open_splitter", "harness.surroundings", "harness.download_punkt", examples=20,
      git=st.booleans(),
      kind=st.sampled_from(["blocks", "auto", "pretrained", "untrained", "other"]),
      error=st.sampled_from([None, OSError("no network"), KeyError("x"), ValueError("bad zip")]))
def test_a_machine_without_git_or_data_is_described_and_refused_what_it_lacks(git, kind, error):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachability, "PunktTokenizer", fails(LookupError("no data")))
        patch.setattr(nltk, "download", fails(error))
        assert harness.download_punkt(seconds=5) is None
        if kind in ("blocks", "auto", "untrained"):
            found, name = harness.open_splitter(kind)
            assert name == "blocks+" * (kind == "blocks") + "untrained-punkt"
            assert list(found.span_tokenize("It is. So")) == [(0, 6), (7, 9)]
        else:
            with pytest.raises(ValueError, match="^--splitter p" if kind != "other" else "kind"):
                harness.open_splitter(kind)
        if not git:
            patch.setenv("PATH", "")
        facts = strict(harness.surroundings("cpu"))
    assert list(facts) == ["commit", "device", "threads", "versions", "started"]
    assert facts["device"] and facts["threads"] == torch.get_num_threads()
    packages = ["python", "torch", "transformers", "numpy", "math-verify", "peft"]
    assert list(facts["versions"]) == packages
    assert git or facts["commit"] is None


@prop("harness.tell", "harness.tell_skipped", "harness.open_regular", "harness.parse_json",
      "harness.read_json", examples=60, data=st.binary(max_size=9), text=st.text(max_size=9))
def test_what_is_read_is_json_of_a_regular_file_and_what_is_told_is_one_line(data, text):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        path = Path(folder, "x")
        for content in (data, json.dumps({text: [text]}).encode()):
            path.write_bytes(content)
            with harness.cli.open_regular(path) as file:
                assert file.read() == content
            try:
                assert harness.cli.read_json(path) == harness.cli.parse_json(content, "x")
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
        assert harness.cli.read_json(path) == {text: [text]}
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ValueError, match="not a regular file"):
            harness.cli.read_json(path)
        harness.tell_skipped("x.py", [])
        harness.tell_skipped("x.py", [text, text])
        harness.cli.tell("x.py", text)
    assert said.getvalue().count("\n") == 2 and "leaves out 2" in said.getvalue()
    assert said.getvalue().replace("\n", "").isprintable()


names = st.sampled_from(["a.safetensors", "b/a.safetensors", "a.bin", "../a.safetensors", "",
                         "/a.safetensors", "b//a.safetensors", 3, None])  # fmt: skip


@prop("harness.check_weight_files", "harness.check_tokens", examples=40,
      files=st.dictionaries(st.text(max_size=2), names, min_size=1, max_size=3),
      stops=st.integers(-1, 9) | st.lists(st.integers(0, 9), min_size=1) | st.just("end"))
def test_weights_and_tokens_of_a_folder_are_its_own_or_refused(files, stops):
    good = {"a.safetensors", "b/a.safetensors"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors.index.json")
        path.write_text(json.dumps({"weight_map": files}))
        try:
            harness.models.check_weight_files(folder)
        except ValueError as error:
            assert str(error).startswith(folder) and not good.issuperset(files.values())
        else:
            assert good.issuperset(files.values())
        Path(folder, "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        config = GPT2Config(vocab_size=5, eos_token_id=None, bos_token_id=None)
        tokenizer = byte_tokenizer()
        tokenizer.pad_token_id, tokenizer.eos_token_id = 1, 2
        ids = [stops] if not isinstance(stops, list) else stops
        try:
            harness.check_tokens({folder: config}, tokenizer)
        except ValueError as error:
            assert folder in str(error) and any(type(i) is str or i < 0 for i in ids)
        else:
            assert all(0 <= i for i in ids)


@prop("harness.check_device", examples=40, device=st.text(max_size=8) | st.sampled_from(
      ["cpu", "CPU", "cpu:0", "cpu:x", "meta", "cuda:99", "xpu", "hpu", "mkldnn", "privateuseone"]))
def test_a_device_can_hold_a_number_or_is_refused(device):
    try:
        harness.check_device(device)
    except ValueError as error:
        assert str(error).startswith(f"--device {device}: ")
    else:
        assert torch.ones(1, device=device).item() == 1


@prop("harness.check_new_file", "harness.write_new_file", examples=60, text=st.text(max_size=9),
      name=st.sampled_from(["new.json"] * 3 + ["new/", "no/new.json", "there", "folder", "link",
                                               "a" * 300]))
def test_a_new_file_is_written_whole_and_once(name, text):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "there").write_text("mine")
        Path(folder, "folder").mkdir()
        Path(folder, "link").symlink_to("nowhere")
        before, path = sorted(os.listdir(folder)), f"{folder}/{name}"
        if name != "new.json":
            with pytest.raises(ValueError, match="^--out "):
                harness.check_new_file("--out", path)
            assert sorted(os.listdir(folder)) == before
            return
        assert harness.check_new_file("--out", path) is None
        assert sorted(os.listdir(folder)) == before
        with pytest.raises(UnicodeEncodeError):
            harness.write_new_file(path, text + "x" * 100_000 + "\ud800")
        assert sorted(os.listdir(folder)) == before
        harness.write_new_file(path, text)
        assert Path(path).read_bytes() == text.encode()
        with pytest.raises(FileExistsError):
            harness.write_new_file(path, "other")
        assert Path(path).read_bytes() == text.encode()


@st.composite
def flag_rows(draw):
    """Rows of a table of flags."""
    limits = st.sampled_from([(0, harness.BIG), (1, harness.BIG), (2, 9)])
    rows = []
    for k in range(draw(st.integers(1, 4))):
        default, check = draw(st.one_of(
            st.tuples(st.just(False), st.none()),
            st.tuples(st.integers(2, 9) | st.sampled_from([2.5, 9.0]), limits),
            st.tuples(st.none(), st.just((1, 9))),
            st.tuples(st.sampled_from([None, "b"]), st.just(["a", "b"])),
            st.tuples(st.sampled_from([None, "folder"]), st.none()),
        ))  # fmt: skip
        rows.append((f"--flag-{k}", default, check, "text"))
    return rows


@prop("harness.add_flags", "harness.defaults", examples=120, rows=flag_rows())
def test_added_flags_keep_their_limits_and_leave_no_trace_if_not_given(rows):
    before, parser = repr(rows), harness.Parser(prog="x.py", allow_abbrev=False)
    flags.add_flags(parser, rows)
    assert repr(rows) == before and all(flag in parser.format_help() for flag, *_ in rows)
    assert vars(parser.parse_args([])) == {}
    assert list(flags.defaults(rows).values()) == [default for _, default, *_ in rows]
    for flag, default, check, _ in rows:
        name = flag[2:].replace("-", "_")
        kind = type(default) if default is not None else str
        if default is False:
            good, bad = [[]], [["x"]]
        elif isinstance(check, tuple):
            kind = int if default is None else kind
            low, high = check
            good = [[str(low)], [str(kind(high))]]
            bad = [[str(low - 1)], [f"{high * 2:.0f}"], ["nan"], ["x"], []]
        elif check:
            good, bad = [["a"], ["b"]], [["c"], [""], []]
        else:
            good, bad = [["x y"]], [["\0"], [""], []]
        for words in good:
            value = vars(parser.parse_args([flag, *words]))[name]
            assert type(value) is kind and (not words or value == kind(words[0]))
        for words in bad:
            assert parsed(lambda argv: parser.parse_args(argv[2:]), "x.py", [flag, *words]) is None
