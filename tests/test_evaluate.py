"""Figures, sampling and the command `evaluate.py`."""

import itertools
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import GOOD, ask, byte_tokenizer, tiny_model, write
from transformers import AutoTokenizer

import evaluate
import harness
import rollout
import toy

ROOT = Path(evaluate.__file__).parent


# --------------------------------------------------------------------------------------- figures
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
    with pytest.raises((ValueError, TypeError)):
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


@pytest.mark.parametrize("P, draws", [(7, [30]), (400_000, [2, 1])])
def test_bootstrap_takes_quantiles_of_so_many_means(P, draws):
    """Also where the indices of all resamples would not fit into memory at once."""
    rng, values_P = np.random.default_rng(5), np.arange(P) ** 2 / P
    means = [values_P[rng.integers(P, size=(R, P))].mean(axis=1) for R in draws]
    interval = evaluate.bootstrap_interval(values_P, level=0.8, resamples=sum(draws), seed=5)
    assert interval == tuple(np.quantile(np.concatenate(means), [(1 - 0.8) / 2, (1 + 0.8) / 2]))


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
    for level in (95, -1, 0, 1, math.nan):
        with pytest.raises(ValueError, match="level"):
            evaluate.bootstrap_interval([1], level=level)
    for bad in ({"resamples": 0}, {"resamples": 1.5}, {"seed": -1}):
        with pytest.raises((ValueError, TypeError)):
            evaluate.bootstrap_interval([1], **bad)


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
    assert summary["pass@2"][1:] == list(evaluate.bootstrap_interval([0.5, 1.0]))
    json.dumps(summary)


def test_pass_at_n_is_there_where_n_is_no_power_of_two():
    records = [[record(False), record(False), record(True)], [record(False)] * 3]
    summary = evaluate.summarise(records, resamples=20, level=0.5, seed=3)
    assert summary["pass_at_n"] == 0.5 and "pass@3" not in summary
    interval = evaluate.bootstrap_interval([2 / 3, 0], resamples=20, level=0.5, seed=3)
    assert summary["pass@2"] == pytest.approx([1 / 3, *interval])


def test_summarise_counts_the_uncertain_wording_of_a_toy_world():
    moves = "Move 1 is plus 5, {} 14 becomes 3. Move 2 is plus 1, thus 3"
    records = [[record(True, text=moves.format(word))] for word in ("so", "thus")]
    assert evaluate.summarise(records, uncertain="thus")["uncertain_wording"] == 0.75
    assert "uncertain_wording" not in evaluate.summarise(records)


@pytest.mark.parametrize("records", [[], [[]], [[record(True)], [record(True)] * 2]])
def test_summarise_refuses_uneven_records(records):
    with pytest.raises(ValueError, match="same number of samples"):
        evaluate.summarise(records)


# -------------------------------------------------------------------------------------- sampling
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


def test_sample_answers_tells_every_response_and_passes_decode_on(monkeypatch):
    generate, told, seen = rollout.generate, [], []

    def spy(*args, decode, **options):
        seen.append((decode, options["temperature"], options["top_k"]))
        return generate(*args, **options)

    class Bar(evaluate.SamplingBar):
        def update(self, n=1):
            told.append((n, self.postfix))

    monkeypatch.setattr(rollout, "generate", spy)
    monkeypatch.setattr(evaluate, "SamplingBar", Bar)
    plain = sample(ask("a", "b", "c"), temperature=0.7)
    assert sample(ask("a", "b", "c"), temperature=0.7, decode="a step") == plain
    assert seen == [(None, 0.7, 1)] * 2 + [("a step", 0.7, 1)] * 2
    told.clear()
    shown = sample(ask("a", "b", "c"), temperature=0.7, progress=True)
    tokens = sum(record["tokens"] for records in shown for record in records)
    assert sum(ended for ended, _ in told) == 9 and told[-1][1] == f"{tokens} tokens"
    assert len(told) >= 12, "it moves with every step, not only when responses end"


def test_a_problem_without_an_answer_has_no_right_one():
    class Says:
        def decode(self, ids, **options):
            return r"\boxed{None}"

    assert not evaluate.check_answer(Says(), [1], {"answer": None}, [1])["correct"]
    assert evaluate.check_answer(Says(), [1], {"answer": "None"}, [1])["correct"]


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
    for bad in (dict(samples=0), dict(batch_size=0), dict(batch_size=-1)):
        with pytest.raises(ValueError, match="samples"):
            sample(ask("a"), **bad)
    with pytest.raises(ValueError):
        evaluate.sample_answers(None, None, ask("a", "b"), [[1]], samples=1, max_new_tokens=1,
                                stop_ids=[1], pad_id=0)  # fmt: skip


# ----------------------------------------------------------------------------------- the command
def main(capsys, *arguments):
    """The command in this process: exit code, stdout, stderr."""
    try:
        code = evaluate.main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def problems_file(tmp_path):
    return write(tmp_path / "p.jsonl", *[{"problem": f"{i}+1?", "answer": i + 1} for i in range(5)])


def test_the_command_end_to_end(folder, problems_file, tmp_path, capsys):
    """But for the process: corpus.py starts some of those."""
    out = tmp_path / "result.json"
    flags = f"--model {folder} --problems {problems_file} --count 4 --samples 2 --out {out}"
    flags += " --max-new-tokens 8 --threads 1 --device cpu"
    assert evaluate.main(flags.split()) == 0
    header, row, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)["model"]
    assert (summary["problems"], summary["samples"]) == (4, 2)
    names = ("accuracy", "pass_at_n", "truncated", "unparseable")
    figures = [f"{summary[name]:.3f}" for name in names] + [f"{summary['mean_tokens']:.1f}"]
    assert header.split() == "model mean@n 95% pass@n truncated unparseable tokens".split()
    interval = f"{summary['accuracy_low']:.3f}-{summary['accuracy_high']:.3f}"
    assert row.split() == ["model", figures[0], interval, *figures[1:]]
    saved = json.loads(out.read_text())
    assert saved["models"]["model"]["summary"] == summary
    assert saved["settings"]["seed"] == 0 and saved["settings"]["dtype"] == "float32"
    assert saved["versions"]["torch"] == torch.__version__ and saved["threads"] == 1
    assert saved["hardware"] and "math-verify" in saved["versions"]
    answers = saved["models"]["model"]["problems"]
    assert [p["answer"] for p in answers] == ["1", "2", "3", "4"]
    assert [len(p["samples"]) for p in answers] == [2] * 4


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
        (["--model", folder, "--problems", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--model", folder, "--problems", bad], f"{bad}:2"),
        (["--model", folder, "--problems", control], f"{control}:2"),
        (["--model", tmp_path / "gone", "--problems", problems_file], "gone"),
        (["--model", "no/hub", "--problems", problems_file], "no/hub"),
        ([*real, "--out", tmp_path / "there.json"], "there.json"),
        ([*real, "--out", tmp_path / "no" / "x.json"], "x.json"),
        ([*real, "--out", f"{tmp_path}/new/"], "new/"),
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


def test_every_flag_reaches_what_it_is_for(capsys, monkeypatch, folder, problems_file):
    seen, threads = {}, []

    def spied(function):
        def spy(*args, **options):
            seen.update(options)
            return function(*args, **options)

        return spy

    for module, name in ((harness, "load_model"), (harness.pair, "render_prompts"),
                         (evaluate, "sample_answers"), (evaluate, "summarise")):  # fmt: skip
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    flags = "--count 2 --samples 3 --max-new-tokens 4 --temperature 0.5 --batch-size 5 --seed 6 "
    flags += "--dtype bfloat16 --device cpu --thinking --trust-remote-code --allow-bin --threads 1"
    code, _, err = main(capsys, "--model", folder, "--problems", problems_file, *flags.split())
    assert code == 0, err
    expected = {"samples": 3, "max_new_tokens": 4, "temperature": 0.5, "batch_size": 5, "seed": 6,
                "dtype": torch.bfloat16, "device": "cpu", "thinking": True,
                "trust_remote_code": True, "allow_bin": True, "uncertain": "",
                "vocab_size": len(byte_tokenizer())}  # fmt: skip
    assert {name: seen[name] for name in expected} == expected
    assert seen["generator"].initial_seed() == 6 and threads == [1]
    assert len(seen["problems"]) == len(seen["prompts"]) == 2


def test_defaults_of_the_toy(capsys):
    args = evaluate.parse_arguments([])
    assert (args.toy, args.count, args.difficulty, args.samples) == ("varied", 200, 12, 4)
    assert args.max_new_tokens == 223  # 1.5 times what a right response of 12 moves needs
    assert evaluate.parse_arguments(["--temperature", "0"]).samples == 1
    for world, moves in (("fork", 6), ("fork-mirror", 2), ("clean", 12)):
        assert evaluate.parse_arguments(["--toy", world]).difficulty == moves
    assert evaluate.parse_arguments(["--toy", "fork", "--difficulty", "3"]).difficulty == 3
    real = evaluate.parse_arguments(["--model", "m", "--problems", "p"])
    assert (real.max_new_tokens, real.count, real.toy) == (4096, None, None)


def test_a_toy_world_on_the_command_line(capsys):
    world = toy.world("horizon")
    short = ["--toy", "horizon", "--count", 16, "--difficulty", 4, "--device", "cpu"]
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
    short = ["--toy", "fork-mirror", "--count", 20, "--samples", 2, "--device", "cpu"]
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
