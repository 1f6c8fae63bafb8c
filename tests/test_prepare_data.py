"""The papers' data sets, each in the layout in which it is published, as files of this project."""

import csv
import json
import sys
from pathlib import Path

import pytest

import answers
import harness
from examples import prepare_data

GSM8K = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "gsm8k_test.jsonl"
BOXED = "Adding gives $2+2=4$, so the result is $\\boxed{4}$."
LAYOUTS = {  # a row as published, and the answer that it holds
    "deepmath": ({"question": "q", "final_answer": "\\dfrac{1}{2}", "difficulty": 6.5, "topic": "t",
                  "r1_solution_1": "s"}, "\\dfrac{1}{2}"),
    "polaris": ({"problem": "q", "answer": "17", "difficulty": "3/8"}, "17"),
    "aime24": ({"id": 60, "problem": "q", "solution": BOXED, "answer": "204", "url": "u",
                "year": "2024"}, "204"),
    "aime25": ({"problem": "q", "answer": "70", "id": "0"}, "70"),
    "aime26": ({"problem_idx": 1, "answer": 277, "problem": "q"}, "277"),
    "hmmt25": ({"problem_idx": 1, "answer": "9\\sqrt{23}", "problem": "q",
                "problem_type": ["Geometry"]}, "9\\sqrt{23}"),
    "math500": ({"problem": "q", "solution": BOXED, "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                 "subject": "Precalculus", "level": 2, "unique_id": "u"},
                "\\left( 3, \\frac{\\pi}{2} \\right)"),
    "minerva": ({"question": "q", "answer": "4.5e33"}, "4.5e33"),
    "gsm8k": ({"question": "q", "answer": "He has 9 * 2 = <<9*2=18>>18.\n#### 18"}, "18"),
}  # fmt: skip
GPQA = {"Question": "Which?", "Correct Answer": "the right one", "Incorrect Answer 1": "one",
        "Incorrect Answer 2": "two", "Incorrect Answer 3": "three", "Explanation": "e"}  # fmt: skip


def prepare(name, source, out, *flags):
    return prepare_data.main([name, "--from", str(source), "--out", str(out), *flags])


def write(path, *rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_a_problem_that_the_commands_take(name, kind, tmp_path):
    row, answer = LAYOUTS[name]
    source, out = write(tmp_path / f"in.{kind}", row), tmp_path / "out.jsonl"
    assert prepare(name, source, out, "--suffix", " [box]") == 0
    assert [json.loads(x) for x in open(out)] == [{"problem": "q [box]", "answer": answer}]
    (problem,) = harness.load_problems(out)
    assert answers.is_correct(problem["answer"], answer)


def test_choices_are_lettered_in_an_order_of_the_seed_and_the_answer_is_the_letter(tmp_path):
    source, letters = write(tmp_path / "gpqa.csv", *[GPQA] * 40), {}
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(letters)}-{seed}.jsonl"
        assert prepare("gpqa-diamond", source, out, "--seed", str(seed), "--suffix", "") == 0
        rows = [json.loads(x) for x in open(out)]
        for row in rows:
            assert f"({row['answer']}) the right one" in row["problem"].split("\n")
            assert sorted(x[4:] for x in row["problem"].split("\n")[2:]) == sorted(
                ["the right one", "one", "two", "three"]
            )
        letters.setdefault(seed, []).append([row["answer"] for row in rows])
    assert letters[0][0] == letters[0][1] != letters[1][0]
    assert set(letters[0][0]) == set("ABCD")


def test_the_level_filter_is_deepmath_s_and_counts(tmp_path, capsys):
    rows = [{"question": f"q{x}", "final_answer": "1", "difficulty": x} for x in (4.5, 5.5, 6, 9)]
    source = write(tmp_path / "in.jsonl", *rows)
    assert prepare("deepmath", source, tmp_path / "a.jsonl", "--suffix", "") == 0
    assert [json.loads(x)["problem"] for x in open(tmp_path / "a.jsonl")] == ["q6", "q9"]
    assert "2 problems; left out: 2 below level 6\n" in capsys.readouterr().out
    assert prepare("deepmath", source, tmp_path / "b.jsonl", "--min-level", "0") == 0
    assert len(open(tmp_path / "b.jsonl").readlines()) == 4


def test_long_problems_are_left_out_by_their_tokens(tmp_path, folder):
    rows = [{"problem": "x" * n, "answer": "1"} for n in (9, 10, 11)]  # a token per byte
    source, out = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    how = "--tokenizer", str(folder), "--max-tokens", "10", "--suffix", ""
    assert prepare("polaris", source, out, *how) == 0
    assert [len(json.loads(x)["problem"]) for x in open(out)] == [9, 10]


def test_the_suffix_asks_for_a_box_and_a_folder_is_read_in_order(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "b.jsonl", {"problem": "second", "answer": "2"})
    write(tmp_path / "set" / "a.csv", {"problem": "first", "answer": "1"})
    (tmp_path / "set" / "README.md").write_text("no data")
    assert prepare("polaris", tmp_path / "set", tmp_path / "out.jsonl") == 0
    rows = [json.loads(x)["problem"] for x in open(tmp_path / "out.jsonl")]
    assert [x.split("\n")[0] for x in rows] == ["first", "second"]
    assert all(x.endswith("within \\boxed{}.") for x in rows)


@pytest.mark.parametrize(
    "text, names",
    [('{"problem": "q"}', "in.jsonl:2: needs one of"), ('{"answer": 1}', "in.jsonl:2: needs one"),
     ("[1]", "in.jsonl:2: expected an object, got list"), ("{", "in.jsonl:2"),
     ('{"problem": "", "answer": "1"}', "in.jsonl:2: needs one of")],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line_and_nothing_is_written(text, names, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"problem": "q", "answer": "1"}\n' + text)
    assert prepare("polaris", source, tmp_path / "out.jsonl") == 2
    said = capsys.readouterr().err
    assert names in said and said.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_is_overwritten_and_a_missing_library_is_named(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "in.jsonl", {"problem": "q", "answer": "1"})
    (tmp_path / "out.jsonl").write_text("mine")
    assert prepare("polaris", source, tmp_path / "out.jsonl") == 2
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare_data.main(["aime24", "--out", str(tmp_path / "hub.jsonl")]) == 2
    assert "pip install datasets" in capsys.readouterr().err.splitlines()[-1]
    assert prepare("polaris", tmp_path / "nowhere", tmp_path / "new.jsonl") == 2


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the project")
def test_gsm8k_as_published(tmp_path):
    assert prepare("gsm8k", GSM8K, tmp_path / "out.jsonl") == 0
    rows, problems = map(list, (open(GSM8K), harness.load_problems(tmp_path / "out.jsonl")))
    assert len(problems) == len(rows) == 1319
    for row, problem in zip(rows, problems, strict=True):
        published = json.loads(row)["answer"].rpartition("#### ")[2].replace(",", "")
        assert problem["answer"].replace(",", "") == published
