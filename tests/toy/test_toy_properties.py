"""Properties of the public names of toy."""

import contextlib
import functools
import itertools
import random
import re
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import toy_prompts
from hypothesis import strategies as st
from properties import BAD_NUMBERS, NAN, prop, refused_or, seeds, toy_tokenizer

import answers
import toy
from toy import build

# -------------------------------------------------------------------------------------------- toy
moves = st.integers(1, toy.MAX_MOVES)


def simulate(text):
    """(start, marks after every move) of a dial problem or response."""
    start = int(re.search(r"starts at (\d+)", text)[1])
    found = re.findall(r"is (plus|minus) (\d+)", text)
    steps = [int(amount) if word == "plus" else -int(amount) for word, amount in found]
    return start, [m % toy.MARKS for m in itertools.accumulate(steps, initial=start)][1:]


@prop("toy.dial_problem", "toy.dial_response", "toy.in_test", "toy.build_tokenizer",
      "toy.response_limit", examples=80, seed=seeds, n=moves)
def test_a_dial_problem_is_answered_by_its_response(seed, n):
    problem = toy.dial_problem(random.Random(seed), n)
    before, tokenizer = dict(problem), toy_tokenizer()
    start, marks = simulate(problem["problem"])
    text = toy.dial_response(problem)
    assert problem == before and len(marks) == n and problem["answer"] == str(marks[-1])
    assert simulate(text) == (start, marks)
    written = re.findall(r"so (\d+) becomes (\d+)", text)
    assert written == [(str(a), str(b)) for a, b in zip([start, *marks], marks, strict=False)]
    assert answers.extract_answer(text) == problem["answer"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert len(ids) + 1 == 11 * n + 17 <= toy.response_limit(n)
    prompt = tokenizer.decode(toy_prompts(tokenizer, [problem])[0])
    assert prompt == f"<|user|>{problem['problem']}<|end|><|assistant|>"
    assert toy.in_test(problem) == toy.in_test(dict(problem))


@prop("toy.dial_response", "toy.fork_wordings", "toy.wording_share", examples=100, seed=seeds,
      n=moves, horizon=st.integers(0, 12) | st.just((2, 5, 8)), c=st.floats(0, 1),
      result=st.floats(0, 1), operation=st.floats(0, 1), slips=st.none() | st.floats(0, 1),
      cut=st.integers(1, 12), drift=st.integers(0, 12))
def test_a_spoilt_response_keeps_its_form(
    seed, n, horizon, c, result, operation, slips, cut, drift
):
    """Whatever the noise: the moves in order up to the cut, marks on the dial, every token known,
    and the words that the fork allows."""
    problem = toy.dial_problem(random.Random(seed), n)
    wordings = None if slips is None else toy.fork_wordings(slips)
    text = toy.dial_response(
        problem, random.Random(seed), horizon=horizon, corruption=c, wrong_result=result,
        wrong_operation=operation, wordings=wordings, cut=cut, drift=drift)  # fmt: skip
    move = r"Move (\d+) is (?:plus|minus) ([1-5]), (so|thus) (\d+) becomes (\d+)\."
    links = re.findall(move, text)
    assert [int(link[0]) for link in links] == list(range(1, min(n, cut) + 1))
    assert all(0 <= int(mark) < toy.MARKS for link in links for mark in link[3:])
    assert re.search(r"The dial stops at \\boxed\{(\d+)\}\.$", text)
    ids = toy_tokenizer()(text)["input_ids"]
    assert len(ids) == 11 * len(links) + 16 and toy_tokenizer().unk_token_id not in ids
    thus = sum(link[2] == "thus" for link in links)
    assert toy.wording_share([text], "thus") == thus / len(links) and (wordings or not thus)
    assert toy.wording_share([], "thus") is None


@prop("toy.reverse_problem", "toy.reverse_response", examples=60, seed=seeds,
      length=st.none() | st.integers(1, 6))
def test_a_list_is_reversed(seed, length):
    problem = toy.reverse_problem(random.Random(seed), length)
    marks = re.findall(r"\d+", problem["problem"])
    assert len(marks) == length or length is None and 2 <= len(marks) <= 4
    assert problem["answer"] == ", ".join(marks[::-1])
    response = toy.reverse_response(problem)
    assert answers.extract_answer(response) == problem["answer"]
    assert f"has {len(marks)} marks" in response


@prop("toy.problems", examples=80, count=st.integers(0, 20) | st.sampled_from([-1, 2.5, NAN, True]),
      n=moves | st.sampled_from(BAD_NUMBERS), split=st.sampled_from(["train", "test", "dev"]),
      task=st.sampled_from(["dial", "reverse", "x"]), seed=seeds)
def test_problems_belong_to_their_split(count, n, split, task, seed):
    x = {"count": count, "moves": n, "split": split, "task": task}
    found = refused_or(functools.partial(toy.problems, seed=seed), x)
    if found is not None:
        assert len(found) == count and found == toy.problems(**x, seed=seed)
        assert all(toy.in_test(problem) == (split == "test") for problem in found)
        assert n < 3 or len({problem["problem"] for problem in found}) == count


@prop("toy.world", "toy.fork_stages", "toy.in_order", "toy.build_command", "toy.require",
      "toy.exists", "toy.refuse_overwrite", examples=60, name=st.sampled_from(sorted(toy.WORLDS))
      | st.text("ab-.0 ", max_size=5),
      names=st.sets(st.sampled_from([*build.RECIPES, "varied", "confident"])),
      force=st.booleans(), student=st.booleans(), slips=st.floats(0, 1))
def test_worlds_and_folders(name, names, force, student, slips):
    if name not in toy.WORLDS:
        with pytest.raises(ValueError, match="unknown toy world"):
            toy.world(name)
    else:
        for folder in (toy.world(name).teacher, toy.world(name).student):
            command = toy.build_command(folder)
            assert command.startswith("python -m toy --world ") and "--out" not in command
            known = toy.world(command.split()[-1])
            assert folder in (known.teacher, known.student)
    order = build.in_order(names)
    assert sorted(order) == sorted(names)
    later = [name not in build.RECIPES for name in order]  # those that start from another
    assert later == sorted(later)
    stages = build.fork_stages(toy.fork_wordings(slips), student)
    assert [s.noise["wordings"]["thus"][0] for s in stages] == [slips] * (1 + student)
    with tempfile.TemporaryDirectory() as folder:
        there, missing = Path(folder), Path(folder, "a b")
        assert not toy.exists(missing) and not toy.exists(there)
        with pytest.raises(ValueError, match="no model folder at .* build it with: python -m toy"):
            toy.require(missing)
        Path(there, "config.json").write_text("{}")
        assert toy.exists(there) and toy.require(there) is None
        build.refuse_overwrite([missing], force)
        with contextlib.nullcontext() if force else pytest.raises(FileExistsError, match=folder):
            build.refuse_overwrite([missing, there], force)


@prop("toy.build_model", "toy.save", "toy.load", "toy.accuracy", examples=5,
      seed=st.integers(0, 99), n=st.integers(1, 3), heads=st.integers(1, 3))
def test_a_saved_model_is_loaded_in_bfloat16_steps(seed, n, heads):
    tokenizer = toy_tokenizer()
    state = torch.random.get_rng_state()
    model = build.build_model(tokenizer, hidden=16, layers=1, heads=heads, ff=16, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    plain = {name: p.detach().bfloat16().float() for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        build.save(model, build.build_tokenizer(), folder)
        back, spells = build.load(folder)
    assert all(torch.equal(plain[name], p) for name, p in back.named_parameters())
    assert spells.get_vocab() == tokenizer.get_vocab() and not back.training
    items = toy.problems(3, moves=n, seed=seed)
    share = build.accuracy(back, tokenizer, items[:1], samples=2, temperature=1.0)
    assert share in (0, 0.5, 1)


@prop("toy.training_batch", examples=40, seed=seeds, step=st.integers(0, 99), longest=moves,
      second=st.floats(0, 1), curriculum=st.booleans(), tokens=st.integers(0, 800))
def test_a_training_batch_is_full_and_has_no_test_problem(
    seed, step, longest, second, curriculum, tokens
):
    stage = build.Stage(100, 1e-3, curriculum, second, longest)
    tokenizer = toy_tokenizer()
    ids_BT, labels_BT = build.training_batch(tokenizer, random.Random(seed), stage, step, tokens)
    B, T = ids_BT.shape
    assert B == 1 or B * T <= tokens
    assert (B + 1) * T > tokens
    on_BT = labels_BT != -100
    assert torch.equal(labels_BT[on_BT], ids_BT[on_BT]) and bool(on_BT[:, -1].all())
    for ids_T, on_T in zip(ids_BT, on_BT, strict=True):
        start = int(on_T.nonzero()[0])
        assert on_T[start:].all()
        text = tokenizer.decode(ids_T[:start]).removeprefix("<|user|>")
        assert not toy.in_test({"problem": text.removesuffix("<|end|><|assistant|>")})
