"""The toy world: texts, tokenizer, split, committed weights, command line."""

import dataclasses
import doctest
import hashlib
import importlib
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


def test_a_tuple_of_horizons_is_read_at_the_start_mark():
    """At corruption 1 the moves up to H are right and no later one is, but for 1 in 2560."""
    rng, later, lucky = random.Random(0), [], 0
    for problem in toy.problems(400):
        start = int(re.match(r"The dial starts at (\d+)", problem["problem"])[1])
        horizon = {0: 2, 1: 5, 2: 8, 3: 11}[start % 4]
        clean = toy.dial_response(problem).split(". ")
        spoilt = toy.dial_response(problem, rng, horizon=toy.HORIZONS, corruption=1).split(". ")
        assert spoilt[: horizon + 1] == clean[: horizon + 1]
        beyond = zip(spoilt[horizon + 1 : -1], clean[horizon + 1 : -1], strict=True)
        lucky += sum(a == b for a, b in beyond)
        later += moves_of(". ".join(spoilt[horizon + 1 :]))
    assert lucky <= 5 and len(later) > 2000
    for column, values in enumerate([("plus", "minus"), range(1, 6), ["so"], range(16), range(16)]):
        counts = [sum(move[column] == str(value) for move in later) for value in values]
        assert sum(counts) == len(later)
        assert max(counts) - min(counts) < 0.1 * len(later)


def test_a_drifting_response_is_one_mark_off_after_every_later_move():
    """4 + 5 = 9, then 9 - 2 = 7 written as 8, then 8 + 3 = 11 written as 12."""
    text = ("The dial starts at 4. Move 1 is plus 5. Move 2 is minus 2. Move 3 is plus 3. Where "
            "does it stop?")
    assert toy.dial_response({"problem": text}, drift=1).split(". ") == [
        "The dial starts at 4", "Move 1 is plus 5, so 4 becomes 9",
        "Move 2 is minus 2, so 9 becomes 8", "Move 3 is plus 3, so 8 becomes 12",
        "The dial stops at \\boxed{12}.",
    ]
    for problem in toy.problems(20, moves=12):
        assert toy.dial_response(problem, drift=12) == toy.dial_response(problem)
        end = int(re.search(r"boxed{(\d+)}", toy.dial_response(problem, drift=6))[1])
        assert end == (int(problem["answer"]) + 6) % 16


def test_a_cut_response_stops_early_and_says_so():
    text = "The dial starts at 14. Move 1 is plus 5. Move 2 is minus 4. Where does it stop?"
    assert toy.dial_response({"problem": text}, cut=1).split(". ") == [
        "The dial starts at 14",
        "Move 1 is plus 5, so 14 becomes 3",
        r"The dial stops at \boxed{3}.",
    ]
    for moves in (1, 6, 7, 12):
        for problem in toy.problems(20, moves=moves):
            clean, cut = toy.dial_response(problem), toy.dial_response(problem, cut=6)
            if moves <= 6:
                assert cut == clean
                continue
            *begin, end = cut.split(". ")
            assert begin == clean.split(". ")[:7]
            assert end == f"The dial stops at \\boxed{{{moves_of(clean)[6][3]}}}."


def test_after_two_slips_the_mire_garbles_what_follows_and_nothing_before():
    """Up to the second slip (a source that is not the mark before) every move is right; of the
    later ones a share is garbled, so that even their operations are often not the problem's."""
    noise, rng = toy.WORLDS["mire"].noise, random.Random(0)
    misread, later, slips, moves = 0, 0, 0, 0
    for problem in toy.problems(300):
        found = moves_of(toy.dial_response(problem, rng, **noise))
        asked = re.findall(r"is (plus|minus) (\d+)", problem["problem"])
        mark, own = re.search(r"starts at (\d+)", problem["problem"])[1], 0
        for (word, amount, link, source, result), told in zip(found, asked, strict=True):
            if own == 2:
                later, misread = later + 1, misread + ((word, amount) != told)
                continue
            assert (word, amount) == told
            change = int(amount) * (1 if word == "plus" else -1)
            assert int(result) == (int(source) + change) % 16
            assert source == mark or link == "thus"
            moves, slips, own = moves + 1, slips + (source != mark), own + (source != mark)
            mark = result
    assert abs(slips / moves - 0.25 * 15 / 16) < 0.02
    assert abs(misread / later - 0.7 * 0.9) < 0.03  # one garbled operation in ten is right by luck
    plain = {"wordings": noise["wordings"]}
    for problem in toy.problems(50):  # without the mire: a fork, drawing the same numbers
        one, other = (toy.dial_response(problem, random.Random(1), **n)
                      for n in (plain, plain | {"mire": 0.0}))  # fmt: skip
        assert one == other


def test_the_texts_of_the_first_worlds_stay_what_they_were():
    """The committed weights can be rebuilt only as long as these texts draw the same numbers."""
    noises = [toy.WORLDS[name].noise for name in ("horizon", "fork", "fork-mirror")]
    rng, digest = random.Random(7), hashlib.sha256()
    for noise in (*noises, toy.STUDENT[1].noise, toy.RECIPES["fork-student"][0][1].noise):
        for problem in toy.problems(50):
            digest.update(toy.dial_response(problem, rng, **noise).encode())
    assert digest.hexdigest()[:16] == "656c8915d14c4873"


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
    assert toy.SHIPPED == ("horizon", "clean", "fork", "fork-mirror", "varied", "confident")


def test_graded_worlds():
    """One number differs from the world they grade, and nothing else does."""
    horizon, fork = toy.WORLDS["horizon"], toy.WORLDS["fork"]
    graded = {name: w for name, w in toy.WORLDS.items() if not w.shipped}
    assert graded.pop("off-by-one").noise == {"drift": 6}  # no grade: another kind of wrong
    del graded["mire"]  # nor is this
    assert len(graded) == 7
    for c in (0.05, 0.1, 0.2, 0.3):
        w = graded[f"horizon-{c}"]
        assert w.noise == horizon.noise | {"corruption": c} and f"{c:.0%}" in w.about
        assert (w.student, w.moves, w.uncertain) == (horizon.student, horizon.moves, "")
        assert w.teacher.name not in toy.RECIPES and w.teacher.name not in toy.SPOIL_STEPS
    for slips in (0.1, 0.25, 1.0):
        w = graded[f"fork-{slips}"]
        assert w.noise == {"wordings": {"so": (0.0, None), "thus": (slips, None)}}
        assert (w.student, w.moves, w.uncertain) == (fork.student, fork.moves, "thus")
        (stage,), size, seed = toy.RECIPES[w.teacher.name]
        (first,), *rest = toy.RECIPES["fork"]
        assert stage == dataclasses.replace(first, noise=w.noise) and [size, seed] == rest
    assert len({w.about for w in toy.WORLDS.values()}) == len(toy.WORLDS)


def test_a_missing_model_names_its_command(tmp_path):
    for name, world in (("horizon-0.1", "horizon-0.1"), ("fork-student", "fork")):
        assert toy.build_command(toy.ASSETS / name) == f"python toy.py --world {world}"
        command = f"python toy.py --world {world} --out {tmp_path}"
        with pytest.raises(ValueError, match=f"no model folder at .*/{name}; build") as caught:
            toy.load(tmp_path / name)
        assert str(caught.value).endswith(f"; build it with: {command}")


FORKS = ["fork", "fork-student", "fork-mirror", "fork-mirror-student"]
MODELS = ["student", "clean", "horizon", *FORKS, "varied", "confident"]


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
    files = [f for name in MODELS for f in (toy.ASSETS / name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 1_500_000


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


@pytest.mark.parametrize("slips", [{}, toy.STUDENT[1].noise], ids=["right", "student"])
def test_the_teacher_of_varied_is_sure_up_to_the_horizon_and_no_further(slips):
    """Every sentence, by start mark; slips: prefixes with the wrong moves the student learned.

    Seven of the 11 tokens of a move are sure even when it is garbled, so there is a floor: 0.80 for
    a teacher that knows the shares at every token and no more, 0.91 for the best one, which takes
    each right word for a sign that this move will be right to its end.
    """
    teacher, tokenizer = toy.load(toy.ASSETS / "varied")
    rng, items = random.Random(0), toy.problems(200, split="test")
    responses = [toy.dial_response(item, rng, **slips) for item in items]
    fidelity_BN = toy.fidelity_by_move(teacher, tokenizer, items, responses)
    assert fidelity_BN.shape == (200, 14)
    groups = [int(text.split()[4].rstrip(".")) % 4 for text in responses]
    for group, horizon in enumerate(toy.HORIZONS):
        rows_GN = fidelity_BN[torch.tensor(groups) == group]
        assert len(rows_GN) > 30
        assert rows_GN[:, : horizon + 1].mean(0).min() >= 0.995
        assert rows_GN[:, horizon + 1 : -1].mean(0).max() < 0.9


def test_fidelity_by_move_is_the_mean_of_the_largest_probability():
    model, tokenizer = toy.load(toy.ASSETS / "horizon")
    items = toy.problems(3, moves=8, split="test")
    found_BN = toy.fidelity_by_move(model, tokenizer, items, map(toy.dial_response, items))
    for item, found_N in zip(items, found_BN, strict=True):
        ids = toy.prompt_ids(tokenizer, item)
        sentences = re.findall(r" ?[A-Z][^.]*\.", toy.dial_response(item))
        for sentence, found in zip(sentences, found_N, strict=True):
            largest = []
            for token in tokenizer(sentence)["input_ids"]:
                with torch.no_grad():
                    largest.append(model(torch.tensor([ids])).logits[0, -1].softmax(-1).max())
                ids = [*ids, token]
            assert abs(sum(largest) / len(largest) - found) < 1e-5


def test_the_confident_teacher_prefers_to_stop_after_move_6():
    teacher, tokenizer = toy.load(toy.ASSETS / "confident")
    items = toy.problems(50, split="test")
    early = [toy.dial_response(item, cut=6) for item in items]
    assert toy.fidelity_by_move(teacher, tokenizer, items, early).mean(0).min() > 0.995
    right = 0
    for item, text in zip(items, early, strict=True):
        prompt, text = toy.prompt_ids(tokenizer, item), tokenizer(text + "<|end|>")["input_ids"]
        with torch.no_grad():
            best = teacher(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        right += best.tolist() == text
    assert right >= 49


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


def test_a_world_builds_what_is_missing_and_keeps_the_rest(tmp_path, capsys):
    def command(*more):
        assert toy.main(["--out", str(tmp_path), "--steps", "2", *more]) == 0
        return capsys.readouterr().out, checksums(tmp_path)

    said, first = command("--world", "fork-0.1")
    assert said == "" and {name.split("/")[0] for name in first} == {"fork-0.1", "fork-student"}
    said, second = command("--world", "fork-1.0")
    assert said == f"kept {tmp_path}/fork-student\n"
    assert first.items() < second.items() and "fork-1.0/config.json" in second
    said, third = command("--world", "fork-1.0")
    assert said.count("kept") == 2 and "nothing to build" in said and third == second
    said, fourth = command("--world", "fork-1.0", "--force", "--seed", "3")
    assert said == f"kept {tmp_path}/fork-student\n" and fourth.keys() == third.keys()
    assert {f for f in third if third[f] != fourth[f]} == {"fork-1.0/model.safetensors"}


def test_a_world_starts_from_the_clean_teacher_that_is_there(tmp_path, monkeypatch):
    weights = "horizon-0.1/model.safetensors"
    toy.build_world(tmp_path / "a", "horizon-0.1", steps=2)  # from the repository's
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["horizon-0.1", "student"]
    toy.build_world(tmp_path / "b", "clean", steps=2)
    before = checksums(tmp_path / "b" / "clean")
    toy.build_world(tmp_path / "b", "horizon-0.1", steps=2, force=True)  # from its neighbour
    assert checksums(tmp_path / "b" / "clean") == before
    monkeypatch.setattr(toy, "ASSETS", tmp_path / "nothing")
    toy.build_world(tmp_path / "c", "horizon-0.1", steps=2)  # from one that it trains first
    assert checksums(tmp_path / "c" / "clean") == before
    made = [checksums(tmp_path / name)[weights] for name in "abc"]
    assert made[0] != made[1] == made[2]


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
    with pytest.raises(SystemExit) as left:
        sys.exit(toy.main([*arguments, "--out", str(tmp_path / "models")]))
    message = capsys.readouterr().err
    assert left.value.code == 2
    assert culprit in message and message.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_another_horizon_teacher_from_the_command_line(tmp_path):
    command = [sys.executable, "toy.py", "--horizon", "4", "--corruption", "0.2", "--steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    toy.load(tmp_path / "horizon-H4-c0.2")


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_world_that_was_not_built_is_refused_with_the_command(
    script, tmp_path, monkeypatch, capsys
):
    graded = dataclasses.replace(toy.WORLDS["horizon-0.1"], teacher=tmp_path / "horizon-0.1")
    monkeypatch.setitem(toy.WORLDS, "horizon-0.1", graded)
    main = importlib.import_module(script).main
    out = ["--out", str(tmp_path / "run")] if script == "train" else []
    with pytest.raises(SystemExit) as left:
        sys.exit(main(["--toy", "horizon-0.1", *out]))
    assert left.value.code == 2 and not (tmp_path / "run").exists()
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and message.startswith(f"{script}.py: error: no model folder at")
    assert message.endswith(f"python toy.py --world horizon-0.1 --out {tmp_path}")
