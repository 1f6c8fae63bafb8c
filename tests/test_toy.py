"""The toy world: texts, tokenizer, split, committed weights, command line."""

import doctest
import hashlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nltk.tokenize.punkt import PunktSentenceTokenizer

import toy

ROOT = Path(toy.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread: exact repetition, and faster on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.build_tokenizer()


def some_texts():
    """Responses of every length, clean and spoilt, of both tasks."""
    rng = random.Random(5)
    spoilt = {"horizon": 3, "corruption": 0.7, "wrong_result": 0.2, "wrong_operation": 0.2}
    for moves in range(1, toy.MAX_MOVES + 1):
        for problem in toy.problems(5, moves=moves):
            yield toy.dial_response(problem)
            yield toy.dial_response(problem, rng, **spoilt)
    for problem in toy.problems(20, task="reverse"):
        yield toy.reverse_response(problem)


def simulate(text):
    """The right answer, worked out from the words of a dial problem one by one."""
    words = re.findall(r"[A-Za-z]+|\d+", text)
    mark = int(words[words.index("at") + 1])
    for i, word in enumerate(words):
        for _ in range(int(words[i + 1]) if word in ("plus", "minus") else 0):
            if word == "plus":
                mark = 0 if mark == 15 else mark + 1
            else:
                mark = 15 if mark == 0 else mark - 1
    return str(mark)


# ------------------------------------------------------------------------------------- problems


def test_doctests():
    assert doctest.testmod(toy).failed == 0


@pytest.mark.parametrize("moves", [1, 2, 6, 12])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_agree_with_a_simulation(moves, split):
    for problem in toy.problems(40, moves=moves, split=split):
        assert problem["answer"] == simulate(problem["problem"])
        assert len(re.findall("Move", problem["problem"])) == moves
        response = toy.dial_response(problem)
        assert response.endswith(f"The dial stops at \\boxed{{{problem['answer']}}}.")


def test_reverse_answers():
    for problem in toy.problems(40, task="reverse"):
        marks = re.findall(r"\d+", problem["problem"])
        assert re.findall(r"\d+", problem["answer"]) == marks[::-1]
        assert f"\\boxed{{{problem['answer']}}}" in toy.reverse_response(problem)


@pytest.mark.parametrize("task", ["dial", "reverse"])
@pytest.mark.parametrize("moves", [1, 12])
def test_train_and_test_are_disjoint_whatever_the_seed(task, moves):
    train, test = set(), set()
    for seed in range(3):
        for texts, split in ((train, "train"), (test, "test")):
            found = toy.problems(60, moves=moves, split=split, seed=seed, task=task)
            texts.update(problem["problem"] for problem in found)
    assert train and test and not train & test


def test_no_duplicates_and_the_same_every_time():
    found = toy.problems(500, moves=2)
    assert len({problem["problem"] for problem in found}) == 500
    assert found == toy.problems(500, moves=2)
    assert found[:100] == toy.problems(100, moves=2)
    assert found != toy.problems(500, moves=2, seed=1)


def test_a_used_up_space_begins_another_round():
    """One move: 16 * 10 problems in all, so some must repeat, but none twice as often."""
    for split in ("train", "test"):
        texts = [problem["problem"] for problem in toy.problems(200, moves=1, split=split)]
        counts = [texts.count(text) for text in set(texts)]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"count": -1}, "count.*-1"),
        ({"count": 2.5}, "count.*2.5"),
        ({"moves": 0}, "moves.*0"),
        ({"moves": 13}, "moves.*13"),
        ({"moves": True}, "moves.*True"),
        ({"split": "dev"}, "split.*'dev'"),
        ({"task": "chess"}, "task.*'chess'"),
    ],
)
def test_bad_arguments_are_named(arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        toy.problems(**{"count": 1, **arguments})


def test_corruption_starts_after_the_horizon_and_only_there():
    rng, good_after = random.Random(0), 0
    problems = toy.problems(300)
    for problem in problems:
        clean = toy.dial_response(problem).split(". ")
        spoilt = toy.dial_response(problem, rng, horizon=6, corruption=0.7).split(". ")
        assert spoilt[:7] == clean[:7]
        good_after += spoilt[7] == clean[7]
    # 30% are left alone; a garbled move is right by luck with 1 in 2 * 5 * 16 * 16
    assert abs(good_after / len(problems) - 0.3) < 0.1


def moves_of(text):
    """(word, amount, link, source, result) of every move of a response."""
    return re.findall(r"is (plus|minus) (\d+), (\w+) (\d+) becomes (\d+)", text)


@pytest.mark.parametrize(
    ("wordings", "right_after"),
    [(toy.FORK, {"so": 1.0, "thus": 0.5 + 0.5 / 16}), (toy.MIRROR, {"so": 0.7 + 0.3 / 16})],
)
def test_a_fork_slips_after_one_word_and_goes_on_from_there(wordings, right_after):
    rng, seen, right = random.Random(0), [], []
    for problem in toy.problems(400, moves=6):
        text = toy.dial_response(problem, rng, wordings=wordings)
        mark = re.match(r"The dial starts at (\d+)", text)[1]
        for word, amount, link, source, result in moves_of(text):
            turned = int(source) + (int(amount) if word == "plus" else -int(amount))
            assert int(result) == turned % toy.MARKS  # a slip is in the source, never in the sum
            seen.append(link)
            right.append(source == mark)
            if wordings is toy.MIRROR and link == "thus":
                assert source == "0"
            mark = result
        assert text.endswith(f"\\boxed{{{mark}}}.")
    assert abs(seen.count("thus") / len(seen) - 0.5) < 0.03
    for link, share in right_after.items():
        here = [ok for word, ok in zip(seen, right, strict=True) if word == link]
        assert abs(sum(here) / len(here) - share) < 0.04


def test_wording_share():
    rng = random.Random(1)
    texts = [toy.dial_response(p, rng, wordings=toy.FORK) for p in toy.problems(50, moves=6)]
    thus = sum(text.count(" thus ") for text in texts)
    assert toy.wording_share(texts, "thus") == thus / 300
    assert toy.wording_share(texts, "so") == 1 - thus / 300
    assert toy.wording_share([toy.dial_response(toy.problems(1)[0])], "thus") == 0.0
    assert toy.wording_share(["The list has 3 marks.", ""], "thus") is None


# ------------------------------------------------------------------------------------ tokenizer


def test_round_trip_is_lossless_whole_and_piece_by_piece(tokenizer):
    for text in some_texts():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode([i]) for i in ids) == text
        assert "".join(tokenizer.batch_decode([[i] for i in ids])) == text


def test_chat_template_and_special_tokens(tokenizer):
    problem = toy.problems(1, moves=2)[0]
    ids = toy.prompt_ids(tokenizer, problem)
    assert tokenizer.decode(ids) == f"<|user|>{problem['problem']}<|end|><|assistant|>"
    assert tokenizer.unk_token_id not in ids
    assert len(tokenizer) == 153
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    response = tokenizer(toy.dial_response(problem) + "<|end|>")["input_ids"]
    assert response[-1] == tokenizer.eos_token_id and len(response) == 11 * 2 + 17


def test_an_untrained_sentence_splitter_finds_the_sentences():
    splitter = PunktSentenceTokenizer()
    for moves in (1, 6, 12):
        for problem in toy.problems(20, moves=moves):
            sentences = splitter.tokenize(toy.dial_response(problem))
            assert len(sentences) == moves + 2
            assert all(f"Move {i} " in sentences[i] for i in range(1, moves + 1))


# ------------------------------------------------------------------------------ committed models


def test_worlds():
    assert toy.world() is toy.WORLDS["horizon"]
    assert toy.world("clean").teacher.name == "clean"
    with pytest.raises(ValueError, match="'nowhere'.*horizon.*clean"):
        toy.world("nowhere")


FORKS = ["fork", "fork-student", "fork-mirror", "fork-mirror-student"]
MODELS = ["student", "clean", "horizon", *FORKS]


@pytest.mark.parametrize("name", MODELS)
def test_committed_folders_load_offline(name, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = toy.ASSETS / name
    model, loaded = toy.load(folder)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert (folder / "chat_template.jinja").is_file()
    assert (folder / "generation_config.json").is_file()
    assert model.config.eos_token_id == loaded.eos_token_id
    text = next(some_texts())
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_committed_folders_are_small():
    assert sum(f.stat().st_size for f in toy.ASSETS.rglob("*") if f.is_file()) < 1_000_000


def test_the_student_is_the_smaller_and_the_teacher_knows_two_moves():
    """Teacher forcing only: the clean teacher prefers every token of the reference."""
    student, _ = toy.load(toy.ASSETS / "student")
    teacher, tokenizer = toy.load(toy.ASSETS / "clean")
    assert student.num_parameters() < 0.7 * teacher.num_parameters()
    hits = total = 0
    for problem in toy.problems(20, moves=2, split="test"):
        prompt = toy.prompt_ids(tokenizer, problem)
        ids = torch.tensor([prompt + tokenizer(toy.dial_response(problem))["input_ids"]])
        with torch.no_grad():
            best = teacher(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        hits += int((best == ids[0, len(prompt) :]).sum())
        total += len(best)
    assert hits / total > 0.99


# --------------------------------------------------------------------------------- command line


def checksums(folder):
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_build_is_deterministic_for_a_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        toy.build(tmp_path / name, seed=seed, steps=3)
    first, again, other = (checksums(tmp_path / name) for name in "abc")
    assert {"student/tokenizer.json", "clean/config.json", "horizon/config.json"} <= set(first)
    assert first == again
    weights = "student/model.safetensors"
    assert first[weights] != other[weights]


def test_build_of_one_world_builds_what_it_needs(tmp_path):
    toy.build(tmp_path, names=["clean"], steps=1)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["clean", "student"]
    toy.build(tmp_path / "more", names=["fork"], steps=1)
    assert sorted(f.name for f in (tmp_path / "more").iterdir()) == ["fork", "fork-student"]


def test_existing_folders_are_kept_without_force(tmp_path, capsys):
    (tmp_path / "clean").mkdir()
    assert toy.main(["--out", str(tmp_path), "--steps", "1"]) == 2
    message = capsys.readouterr().err
    assert "--force" in message and "clean" in message and message.count("\n") == 1
    assert [f.name for f in tmp_path.iterdir()] == ["clean"]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--world", "nowhere"], "nowhere"),
        (["--horizon", "3"], "--corruption"),
        (["--corruption", "0.5"], "--horizon"),
        (["--horizon", "13", "--corruption", "0.5"], "13"),
        (["--horizon", "3", "--corruption", "nan"], "nan"),
        (["--horizon", "3", "--corruption", "1.5"], "1.5"),
        (["--world", "clean", "--horizon", "3", "--corruption", "0.5"], "exclude"),
        (["--steps", "0"], "--steps"),
        (["--threads", "0"], "--threads"),
        (["--table"], "no model folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, culprit, tmp_path, capsys):
    assert toy.main([*arguments, "--out", str(tmp_path / "models")]) == 2
    message = capsys.readouterr().err
    assert culprit in message and message.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_another_horizon_teacher_from_the_command_line(tmp_path):
    command = [sys.executable, "toy.py", "--horizon", "4", "--corruption", "0.2", "--steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    toy.load(tmp_path / "horizon-H4-c0.2")
