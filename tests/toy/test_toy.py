"""The toy worlds: texts, tokenizer, split, committed weights, training, command line."""

import dataclasses
import doctest
import functools
import hashlib
import importlib
import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import toy_prompts
from nltk.tokenize.punkt import PunktSentenceTokenizer

import toy
from toy import build
from toy.__main__ import main

ROOT = Path(toy.__file__).parent.parent


@pytest.fixture(scope="module")
def tokenizer():
    return build.build_tokenizer()


@functools.cache
def shipped(name):
    """(model, tokenizer) of a committed folder, loaded once."""
    return build.load(toy.ASSETS / name)


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
    for module in (toy.worlds, build):
        done = doctest.testmod(module)
        assert done.attempted and not done.failed


def test_importing_the_worlds_loads_the_standard_library_only():
    """Not PyTorch, whose import takes seconds, and not `harness`, which imports `toy`."""
    code = "import sys, toy; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {name for name in done.stdout.split() if not name.startswith("_")}
    assert loaded - set(sys.stdlib_module_names) == {"toy"}


@pytest.mark.parametrize("moves", [1, 2, 6, 12])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_agree_with_a_simulation(moves, split):
    for problem in toy.problems(40, moves=moves, split=split):
        assert problem["answer"] == simulate(problem["problem"])
        assert len(re.findall("Move", problem["problem"])) == moves
        response = toy.dial_response(problem)
        assert response.endswith(f"The dial stops at \\boxed{{{problem['answer']}}}.")


def test_a_response_may_be_half_as_long_again_as_the_right_one():
    assert [toy.response_limit(moves) for moves in (1, 6, 12)] == [42, 124, 223]  # of 28, 83, 149


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


def test_a_late_teacher_garbles_the_first_moves_and_none_of_the_others():
    """Up to move 6 seven in ten are garbled; the later ones go on from there and are right."""
    noise, rng, misread = toy.WORLDS["late"].noise, random.Random(0), 0
    for problem in toy.problems(200):
        found = moves_of(toy.dial_response(problem, rng, **noise))
        asked = re.findall(r"is (plus|minus) (\d+)", problem["problem"])
        mark = None
        for number, ((word, amount, _, source, result), told) in enumerate(
            zip(found, asked, strict=True), 1
        ):
            if number <= 6:
                misread += (word, amount) != told
            else:
                assert (word, amount) == told and source == mark
                change = int(amount) * (1 if word == "plus" else -1)
                assert int(result) == (int(source) + change) % 16
            mark = result
    assert abs(misread / 1200 - 0.7 * 0.9) < 0.04


def test_the_texts_of_the_first_worlds_stay_what_they_were():
    """The committed weights can be rebuilt only as long as these texts draw the same numbers."""
    noises = [toy.WORLDS[name].noise for name in ("horizon", "fork", "fork-mirror")]
    rng, digest = random.Random(7), hashlib.sha256()
    for noise in (*noises, build.STUDENT[1].noise, build.RECIPES["fork-student"][0][1].noise):
        for problem in toy.problems(50):
            digest.update(toy.dial_response(problem, rng, **noise).encode())
    assert digest.hexdigest()[:16] == "656c8915d14c4873"


def test_the_training_batches_of_every_model_stay_what_they_were(tokenizer):
    """For the same reason: the first batches, and some after the curriculum, of every stage."""
    digest, new = hashlib.sha256(), ("late",)  # not there yet when the digest was made
    spoilt = [w for w in toy.WORLDS.values() if w.teacher.name not in (*build.RECIPES, *new)]
    stages = {name: recipe[0] for name, recipe in build.RECIPES.items()}
    stages |= {w.teacher.name: [build.Stage(300, 3e-3, noise=w.noise)] for w in spoilt}
    for name, parts in stages.items():
        for number, stage in enumerate(parts):
            rng = random.Random(f"{name} {number}")
            for step in (0, 400, 700):
                for ids_BT in build.training_batch(tokenizer, rng, stage, step, 600):
                    digest.update(repr(ids_BT.tolist()).encode())
    assert digest.hexdigest()[:16] == "4cac5a7fbe5f2c33"


def test_the_problems_stay_what_they_were():
    digest = hashlib.sha256()
    for count, options in ((30, {"moves": 1}), (99, {"moves": 12}), (99, {"task": "reverse"})):
        for split in ("train", "test"):  # the latter has 25 problems of one move
            for seed in (0, 1):
                found = toy.problems(count, split=split, seed=seed, **options)
                digest.update(repr(found).encode())
    assert digest.hexdigest()[:16] == "69df2fc150c8ed08"


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
    ids = toy_prompts(tokenizer, [problem])[0]
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
    assert toy.world() is toy.WORLDS["varied"]
    assert toy.world("clean").teacher.name == "clean"
    with pytest.raises(ValueError, match="'nowhere'.*horizon.*clean"):
        toy.world("nowhere")
    assert toy.SHIPPED == ("horizon", "clean", "fork", "fork-mirror", "varied", "confident")
    unsure = {name: w.uncertain for name, w in toy.WORLDS.items() if w.uncertain}
    assert unsure.pop("fork-mirror") == "so"
    assert unsure == dict.fromkeys(["fork", "mire", "fork-0.1", "fork-0.25", "fork-1.0"], "thus")


def test_graded_worlds():
    """One number differs from the world they grade, and nothing else does."""
    horizon, fork = toy.WORLDS["horizon"], toy.WORLDS["fork"]
    graded = {name: w for name, w in toy.WORLDS.items() if not w.shipped}
    assert graded.pop("off-by-one").noise == {"drift": 6}  # no grade: another kind of wrong
    del graded["mire"], graded["late"]  # nor are these
    assert len(graded) == 7
    for c in (0.05, 0.1, 0.2, 0.3):
        w = graded[f"horizon-{c}"]
        assert w.noise == horizon.noise | {"corruption": c} and f"{c:.0%}" in w.about
        assert (w.student, w.moves, w.uncertain) == (horizon.student, horizon.moves, "")
        assert w.teacher.name not in {**build.RECIPES, **build.SPOIL_STEPS}
    for slips in (0.1, 0.25, 1.0):
        w = graded[f"fork-{slips}"]
        assert w.noise == {"wordings": {"so": (0.0, None), "thus": (slips, None)}}
        assert (w.student, w.moves, w.uncertain) == (fork.student, fork.moves, "thus")
        (stage,), size, seed = build.RECIPES[w.teacher.name]
        (first,), *rest = build.RECIPES["fork"]
        assert stage == dataclasses.replace(first, noise=w.noise) and [size, seed] == rest
    assert len({w.about for w in toy.WORLDS.values()}) == len(toy.WORLDS)


def test_the_readme_lists_every_world():
    rows = re.findall(r"^\| (`.*`) \| .* \| (\d+) \| (shipped|built on demand) \|$",
                      (ROOT / "toy" / "README.md").read_text(), re.MULTILINE)  # fmt: skip
    listed = {}
    for names, moves, weights in rows:
        first, *more = re.findall("`(.+?)`", names)  # `fork-0.1`, `-0.25`: all begin alike
        for name in (first, *(first.split("-")[0] + end for end in more)):
            listed[name] = int(moves), weights == "shipped"
    assert listed == {name: (w.moves, w.shipped) for name, w in toy.WORLDS.items()}


def test_a_missing_model_names_its_command(tmp_path, monkeypatch):
    for name, world in (("horizon-0.1", "horizon-0.1"), ("fork-student", "fork")):
        assert toy.build_command(toy.ASSETS / name) == f"python -m toy --world {world}"
        command = f"python -m toy --world {world} --out {tmp_path}"
        with pytest.raises(ValueError, match=f"no model folder at .*/{name}; build") as caught:
            build.load(tmp_path / name)
        assert str(caught.value).endswith(f"; build it with: {command}")
    assert toy.build_command(toy.ASSETS / "nowhere") == "python -m toy"
    monkeypatch.chdir(ROOT)  # the same folder by another name
    assert toy.build_command("assets/toy/clean") == "python -m toy --world clean"


FORKS = ["fork", "fork-student", "fork-mirror", "fork-mirror-student"]
MODELS = ["student", "clean", "horizon", *FORKS, "varied", "confident"]


@pytest.mark.parametrize("name", MODELS)
def test_committed_folders_load_offline(name, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = toy.ASSETS / name
    model, loaded = build.load(folder)
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
    student, _ = shipped("student")
    teacher, tokenizer = shipped("clean")
    assert student.num_parameters() < 0.7 * teacher.num_parameters()
    hits = total = 0
    for problem in toy.problems(20, moves=2, split="test"):
        (prompt,) = toy_prompts(tokenizer, [problem])
        ids = torch.tensor([prompt + tokenizer(toy.dial_response(problem))["input_ids"]])
        with torch.no_grad():
            best = teacher(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        hits += int((best == ids[0, len(prompt) :]).sum())
        total += len(best)
    assert hits / total > 0.99


@torch.no_grad()
def fidelity_by_sentence(model, tokenizer, items, responses):
    """fidelity_BN: the largest probability of the next token, max_v p(v | prefix), averaged over
    each of the N sentences of equally long responses."""
    texts = [tokenizer(text)["input_ids"] for text in responses]
    prompts = toy_prompts(tokenizer, items)
    ids_BT = torch.tensor([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    fidelity_BT = model(ids_BT).logits[:, len(prompts[0]) - 1 : -1].softmax(-1).amax(-1)
    sizes = [6, *[11] * (len(texts[0]) // 11 - 1), 10]  # 11 n + 16 tokens
    return torch.stack([sentence.mean(1) for sentence in fidelity_BT.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("slips", [{}, build.STUDENT[1].noise], ids=["right", "student"])
def test_the_teacher_of_varied_is_sure_up_to_the_horizon_and_no_further(slips):
    """Every sentence, by start mark; slips: prefixes with the wrong moves the student learned.

    Seven of the 11 tokens of a move are sure even when it is garbled, so there is a floor: 0.80 for
    a teacher that knows the shares at every token and no more, 0.91 for the best one, which takes
    each right word for a sign that this move will be right to its end.
    """
    teacher, tokenizer = shipped("varied")
    rng, items = random.Random(0), toy.problems(160, split="test")
    responses = [toy.dial_response(item, rng, **slips) for item in items]
    fidelity_BN = fidelity_by_sentence(teacher, tokenizer, items, responses)
    assert fidelity_BN.shape == (160, 14)
    groups = [int(text.split()[4].rstrip(".")) % 4 for text in responses]
    for group, horizon in enumerate(toy.HORIZONS):
        rows_GN = fidelity_BN[torch.tensor(groups) == group]
        assert len(rows_GN) > 30
        assert rows_GN[:, : horizon + 1].mean(0).min() >= 0.995
        assert rows_GN[:, horizon + 1 : -1].mean(0).max() < 0.9


def test_the_confident_teacher_prefers_to_stop_after_move_6():
    teacher, tokenizer = shipped("confident")
    items = toy.problems(50, split="test")
    early = [toy.dial_response(item, cut=6) for item in items]
    assert fidelity_by_sentence(teacher, tokenizer, items, early).mean(0).min() > 0.995
    right = 0
    for prompt, text in zip(toy_prompts(tokenizer, items), early, strict=True):
        text = tokenizer(text + "<|end|>")["input_ids"]
        with torch.no_grad():
            best = teacher(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        right += best.tolist() == text
    assert right >= 49


# ------------------------------------------------------------------------------------- training


def checksums(folder):
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture
def stages(monkeypatch):
    """No training: {name: (seed, stage)} of the stages that would have been trained."""
    told = {}

    def fit(model, tokenizer, stage, *, seed, name):
        told[name] = seed, stage
        return model

    monkeypatch.setattr(build, "fit", fit)
    return told


def test_building_is_deterministic_for_a_seed(tmp_path, monkeypatch):
    short = functools.partial(build.training_batch, tokens=400)
    monkeypatch.setattr(build, "training_batch", short)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        build.rebuild(tmp_path / name, names=["horizon"], seed=seed, steps=2)
    first, again, other = (checksums(tmp_path / name) for name in "abc")
    assert {"student/tokenizer.json", "clean/config.json", "horizon/config.json"} <= set(first)
    assert first == again
    weights = [f"{name}/model.safetensors" for name in ("student", "clean", "horizon")]
    assert len({sums[name] for sums in (first, other) for name in weights}) == 6


def test_every_model_is_trained_as_the_committed_ones_were(tmp_path, tokenizer, stages):
    build.rebuild(tmp_path, names=toy.WORLDS, seed=20)
    assert {name: (seed, stage.steps) for name, (seed, stage) in stages.items()} == {
        "student 0": (21, 3000), "student 1": (21, 200), "clean 0": (20, 1800),
        "fork 0": (20, 1800), "fork-student 0": (21, 1800), "fork-student 1": (21, 200),
        "fork-mirror 0": (20, 1800), "fork-mirror-student 0": (21, 1800),
        "fork-mirror-student 1": (21, 200), "mire-student 0": (21, 3000),
        "mire-student 1": (21, 200), "varied": (20, 1600), "off-by-one": (20, 900),
        "mire": (20, 1600), "late": (20, 300),
        **{f"fork-{slips} 0": (20, 1800) for slips in (0.1, 0.25, 1.0)},
        **{name: (20, 300) for name in ("horizon", "confident")},
        **{f"horizon-{c}": (20, 300) for c in (0.05, 0.1, 0.2, 0.3)},
    }  # fmt: skip
    for name, w in toy.WORLDS.items():
        _, stage = stages.get(w.teacher.name) or stages[f"{w.teacher.name} 0"]
        assert stage.noise == w.noise, name
        student, teacher = ((tmp_path / folder.name / "model.safetensors").stat().st_size
                            for folder in (w.student, w.teacher))  # fmt: skip
        assert student < teacher
    for name in MODELS:
        for file in ("config.json", "generation_config.json"):
            made, committed = (json.loads((folder / name / file).read_text())
                               for folder in (tmp_path, toy.ASSETS))  # fmt: skip
            same = committed.keys() & made.keys() - {"transformers_version"}
            assert {key: made[key] for key in same} == {key: committed[key] for key in same}
            assert {"initializer_range", "rope_parameters"} <= same or {"top_k", "top_p"} <= same
    for name, seed, size in (("student", 21, build.STUDENT_SIZE), ("clean", 20, {})):
        start = build.build_model(tokenizer, seed=seed, **size).bfloat16().state_dict()
        saved = build.load(tmp_path / name)[0].state_dict()
        assert all(torch.equal(start[key].float(), saved[key]) for key in saved)


def test_the_rate_rises_for_50_steps_and_falls_from_half_way(monkeypatch):
    rates, made, drawn = [], [], []

    class Recorded(torch.optim.AdamW):
        def __init__(self, parameters, *how, **more):
            made.append((how, more))
            super().__init__(parameters, *how, **more)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            assert abs(model.weight.grad.norm() - 1) < 1e-5  # clipped: it was 9
            super().step()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids, labels, use_cache):
            assert self.weight.grad is None  # none is left of the step before
            return SimpleNamespace(loss=9 * self.weight.sum())

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    def training_batch(tokenizer, rng, stage, step):
        drawn.append((step, rng.random()))
        return None, None

    monkeypatch.setattr(build, "training_batch", training_batch)
    model, rng = Model(), random.Random("teacher 0 7")  # the stream of the committed weights
    assert build.fit(model, None, build.Stage(200, 0.5), seed=7, name="teacher 0") is model
    assert drawn == [(step, rng.random()) for step in range(200)]
    assert made == [((0.5, (0.9, 0.98)), {"weight_decay": 0.01})]
    expected = [0.5 * (step + 1) / 50 for step in range(50)] + [0.5] * 50
    expected += [0.5 * (200 - step) / 100 for step in range(100, 200)]
    assert rates == pytest.approx(expected)


def test_a_world_is_built_with_what_it_needs(tmp_path, stages):
    for name, built in (("clean", ["clean", "student"]), ("fork", ["fork", "fork-student"]),
                        ("varied", ["clean", "student", "varied"])):  # fmt: skip
        build.rebuild(tmp_path / name, names=[name], steps=1)
        assert sorted(f.name for f in (tmp_path / name).iterdir()) == built
    assert {stage.steps for _, stage in stages.values()} == {1}


def test_a_world_builds_what_is_missing_and_keeps_the_rest(tmp_path, capsys, stages):
    def command(*more):
        assert main(["--out", str(tmp_path), "--steps", "2", *more]) == 0
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


def test_a_world_starts_from_the_clean_teacher_that_is_there(tmp_path, monkeypatch, stages):
    weights = "horizon-0.1/model.safetensors"
    build.build_world(tmp_path / "a", "horizon-0.1")  # from the repository's
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["horizon-0.1", "student"]
    build.build_world(tmp_path / "b", "clean")
    before = checksums(tmp_path / "b" / "clean")
    build.build_world(tmp_path / "b", "horizon-0.1", force=True)  # from its neighbour
    assert checksums(tmp_path / "b" / "clean") == before
    monkeypatch.setattr(toy, "ASSETS", tmp_path / "nothing")
    build.build_world(tmp_path / "c", "horizon-0.1")  # from one that it trains first
    assert checksums(tmp_path / "c" / "clean") == before
    made = [checksums(tmp_path / name)[weights] for name in "abc"]
    assert made[0] != made[1] == made[2]
    kept, base = (toy.worlds.ASSETS / "clean", tmp_path / "a" / "horizon-0.1")
    first, other = (build.load(folder)[0].state_dict() for folder in (kept, base))
    assert all(torch.equal(first[key], other[key]) for key in first)


# --------------------------------------------------------------------------------- command line


def test_existing_folders_are_kept_without_force(tmp_path, capsys):
    (tmp_path / "clean").mkdir()
    assert main(["--out", str(tmp_path), "--steps", "1"]) == 2
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
        sys.exit(main([*arguments, "--out", str(tmp_path / "models")]))
    message = capsys.readouterr().err
    assert left.value.code == 2
    assert culprit in message and message.count("\n") == 1
    assert not (tmp_path / "models").exists()


def test_another_horizon_teacher_from_the_command_line(tmp_path, monkeypatch, capsys, stages):
    """`python -m toy`, in this process."""
    flags = ["--horizon", "4", "--corruption", "0.2", "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["toy", *flags])
    monkeypatch.delitem(sys.modules, "toy.__main__")
    with pytest.raises(SystemExit) as left:
        runpy.run_module("toy", run_name="__main__", alter_sys=True)
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path}/horizon-H4-c0.2\n"
    noise = {"horizon": 4, "corruption": 0.2}
    assert stages == {"horizon-H4-c0.2": (0, build.Stage(2, 3e-3, noise=noise))}
    build.load(tmp_path / "horizon-H4-c0.2")


def test_the_help_names_every_world(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and said.startswith("usage: python -m toy ")
    for name, w in toy.WORLDS.items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(w.about)}$", said, re.MULTILINE)


def test_the_table_by_hand(monkeypatch):
    """Which problems, and the shares, of answers that are made up: 3 of 4 problems are answered,
    right in 3 of 4 samples."""
    asked = []

    def sample_answers(model, tokenizer, items, prompts, *, samples, temperature, **options):
        asked.append((items[0]["messages"][0]["content"], samples, temperature))
        assert len(prompts) == len(items) == 8 and options["max_new_tokens"] >= 11 * 12 + 17
        return [[{"correct": i < 6 and j < 3} for j in range(samples)] for i in range(8)]

    monkeypatch.setattr(build.evaluate, "sample_answers", sample_answers)
    names = ["student", "fork"]
    said = build.table([toy.ASSETS / name for name in names], (2, 9), count=8)
    assert said.splitlines() == [
        "mean@4 at temperature 1 / greedy, 8 held-out problems per column",
        "",
        "| model | parameters | n=2 | n=9 | reverse |",
        "|---|---|---|---|---|",
        *[f"| {name} | 62,944 | 0.562 / 0.750 | 0.562 / 0.750 | 0.562 / 0.750 |" for name in names],
    ]
    columns = [{"moves": 2}, {"moves": 9}, {"task": "reverse"}]
    texts = [toy.problems(1, split="test", **column)[0]["problem"] for column in columns]
    assert asked == [(text, *how) for text in texts for how in ((4, 1.0), (1, 0.0))] * 2


def test_the_tables_are_of_the_shipped_models(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(build, "table", lambda *part: told.append(part) or "TABLE")
    assert main(["--table"]) == 0
    assert capsys.readouterr().out == "TABLE\n\nTABLE\n"
    (dials, long), (forks, short) = told
    assert (long, short) == ((2, 6, 9, 12), (1, 2, 4, 6))
    assert {folder.name for folder in dials} == set(MODELS) - set(FORKS)
    assert {folder.name for folder in forks} == set(FORKS)


def test_the_accuracy_of_models_that_are_known():
    """The clean teacher is right; `confident` stops after move 6, so it is wrong at 12."""
    items = toy.problems(24, moves=7, split="test")
    greedy = {"samples": 1, "temperature": 0.0}
    assert build.accuracy(*shipped("clean"), items, **greedy) == 1
    right = [simulate(re.sub(r"Move 7.*?\.", "", p["problem"])) == p["answer"] for p in items]
    assert build.accuracy(*shipped("confident"), items, **greedy) == sum(right) / 24
    share = build.accuracy(*shipped("student"), items, samples=2, temperature=1.0)
    assert 0.2 < share < 0.8  # now and then


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
    assert message.endswith(f"python -m toy --world horizon-0.1 --out {tmp_path}")
