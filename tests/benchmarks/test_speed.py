"""The commands that measure speed and memory run, compare what they measure, and end with JSON."""

import importlib.util
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import last_line
from conftest import tiny_model

from benchmarks import (
    lgr,
    logprobs,
    machine,
    memory,
    our_side,
    release,
    rollout,
    shapes,
    step,
    tables,
    timing,
)

ROOT = Path(__file__).parents[2]


def test_lgr(capsys):
    """lgr.py measures the lgr.py of the same name: the project's."""
    words = "--lengths 24 32 --candidates 3 --rates 0.2 --repeats 1 --slices 2 --shape tiny"
    figures, shown = last_line(capsys, lgr.main, *words.split())
    first = shown.splitlines()[0]
    assert first.startswith("tiny, float32, ") and f"torch {torch.__version__}" in first
    assert set(figures) == {"vs_naive", "vs_reprefill", "over_opd", "flops_over_opd",
                            "over_flop_limit"}  # fmt: skip
    assert all(value > 0 for value in figures.values())
    rows = [line for line in shown.splitlines() if line.startswith(("| 24 |", "| 32 |"))]
    # naive is timed at the last length only
    assert len(rows) == 2 and rows[0].endswith("| - |") and not rows[1].endswith("| - |")


def test_every_command_looks_for_the_project_first():
    """Else `import lgr` in a command would find the benchmark of that name."""
    commands = [path for path in (ROOT / "benchmarks").glob("*.py")
                if 'if __name__ == "__main__"' in path.read_text()]  # fmt: skip
    names = "answers compare figures lgr logprobs long noise plan real release rivals rollout"
    names = f"{names} soak step stops verdicts".split()
    assert sorted(path.stem for path in commands) == names
    project = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "harness"}
    for path in commands:
        for line in path.read_text().splitlines():
            if line.startswith("sys.path.insert(0, str(ROOT))"):
                break
            imported = re.match(r"(?:import|from) (\w+)", line)
            assert imported is None or imported[1] not in project, (path.name, line)
        else:
            raise AssertionError(f"{path.name} does not put the project first")


@pytest.mark.parametrize("difference, fails", [(0.0, False), (1.0, True)])
def test_lgr_compares_before_it_measures(monkeypatch, capsys, difference, fails):
    tree = lgr.Work.lgr
    monkeypatch.setattr(lgr.Work, "lgr", lambda work: tree(work) + difference)
    words = "--shape tiny --lengths 24 --candidates 3 --rates 0.3 --repeats 1 --slices 2 --naive"
    if fails:
        with pytest.raises(SystemExit, match="confidences differ by"):
            lgr.main(words.split())
    else:
        figures, _ = last_line(capsys, lgr.main, *words.split())
        assert figures["vs_naive"] is None and figures["over_opd"] > 0


def test_lgr_counts_flops_of_trunk_and_leaves():
    """Two triggered positions, three leaves: each attends to the columns of its slice's mask."""
    work = lgr.Work(shapes.random_model(shapes.SHAPES["tiny"], 64), 20, 2, 0.5, 4096, 2)
    work.trigger_BT[:] = False
    work.trigger_BT[0, [9, 12]] = True
    work.candidates_BTK[0, 9] = torch.tensor([3, 4])
    work.candidates_BTK[0, 12] = torch.tensor([5, 6])
    work.ids_BT[0, 9], work.ids_BT[0, 12], work.leaves = 7, 5, 3
    token, column, head = shapes.costs(work.model, 512)
    trunk, leaves = work.flops()
    assert trunk == 20 * (token + head) + column * 20 * 21 / 2
    assert leaves == 3 * (token + head) + column * 3 * (12 + 3)


STEP = ["--prompts", 2, "--prompt-tokens", 3, "--tokens", 4, "--rounds", 1,
        "--steps-per-round", 1, "--vocabularies", 64]  # fmt: skip


def test_step(capsys):
    """Both parts; TRL's side where it is installed, after its loss and gradient were compared."""
    figures, shown = last_line(capsys, step.main, *STEP, "--no-memory", "--",
                               "--prompts-per-step", 2, "--difficulty", 1)  # fmt: skip
    assert all(value > 0 for value in figures.values())
    assert set(figures) >= {"ours_s_64", "opd_s_horizon", "rkl_over_opd", "release_over_opd",
                            "release_over_opd_wall", "release_over_opd_without_update",
                            "release_mask_of_opd_step", "lgr_over_opd", "lgr_over_opd_flops"}
    assert "| 64 | ours |" in shown and "| fork | lgr |" in shown
    if importlib.util.find_spec("trl") is None:
        assert "our side alone" in shown and "trl_over_ours_64" not in figures
    else:
        assert "trl_over_ours_64" in figures and "on the same rollouts loss" in shown


def test_step_without_trl_and_with_memory(monkeypatch, capsys):
    """The memory is that of a real process of its own."""
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "benchmarks.trl_side", raising=False)
    monkeypatch.delattr("benchmarks.trl_side", raising=False)
    figures, shown = last_line(capsys, step.main, *STEP, "--only", "peer")
    assert set(figures) == {"ours_s_64", "ours_peak_MiB_64"} and "TRL /" not in shown
    assert figures["ours_peak_MiB_64"] > 0
    assert "our side alone: no TRL" in shown


def test_flops_of_a_step_by_torchs_counter():
    """torch counts the whole square of attention, the benchmark its causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("qwen3", attn_implementation="eager")
    token, column, head = shapes.costs(model, 61)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(10)[None])
    counts = counter.get_flop_counts()["Global"]
    assert sum(counts.values()) == 10 * (token + head) + 10 * 10 * column
    run = SimpleNamespace(model=model, teacher=model, vocab_size=61)
    mask_BT = torch.tensor([[False] * 4 + [True] * 6, [False] * 3 + [True] * 3 + [False] * 4])
    parts = step.flops(run, mask_BT)
    assert parts["score"] == (10 + 6) * token + (55 + 21) * column + (6 + 3) * head
    assert parts["sample"] == (9 + 5) * token + (45 + 15) * column + (6 + 3) * head
    assert parts["update"] == 3 * parts["score"]
    padded = step.flops(run, mask_BT, padded=True)
    assert padded["score"] == 20 * token + 110 * column + 9 * head
    ids_BT = torch.tensor([[5, 6, 7]])
    everywhere_BT = torch.ones(1, 3, dtype=torch.bool)
    trigger_BT = torch.tensor([[False, True, True]])
    candidates_BTK = torch.tensor([[[0, 0], [6, 8], [8, 9]]])  # 6 was sampled: the trunk itself
    leaf_N = step.lgr_leaves([(None, ids_BT, everywhere_BT, trigger_BT, candidates_BTK)])
    assert leaf_N.tolist() == [1, 2, 2]
    assert step.leaf_flops(run, leaf_N) == 3 * (token + head) + (2 + 3 + 3) * column


def test_release(capsys):
    """The masks of eight rows are compared with loops on the way."""
    figures, shown = last_line(
        capsys, release.main, "--rows", 5, "--lengths", 90, 150, "--tokens", 400, "--text-rows", 2,
        "--repeats", 1,
    )  # fmt: skip
    names = {"mask_s_90", "mask_s_150", "split_mb_per_s_toy", "split_mb_per_s_words"}
    assert set(figures) >= names | {"over_none", "sentences_share"}
    assert all(value > 0 for value in figures.values())
    cut = [line.split("|")[4] for line in shown.splitlines() if re.match(r"\| (90|150) \|", line)]
    assert len(cut) == 2 and shown.count("| words |") == 1


def test_the_loops_keep_two_sentences_at_least():
    """A drop after the first of twelve sentences: the second is kept, too."""
    logp_TK = np.full((12, 2), math.log(0.5))
    logp_TK[0] = math.log(0.99), math.log(0.01)
    assert release.keep_by_definition(logp_TK, np.arange(12)).tolist() == [True] * 2 + [False] * 10


def test_release_compares_masks(monkeypatch):
    by_definition = release.keep_by_definition
    monkeypatch.setattr(release, "keep_by_definition", lambda *row: ~by_definition(*row))
    args = SimpleNamespace(rows=2, tokens=400, repeats=1, check=1)
    with pytest.raises(SystemExit, match="row 0 of 60 tokens has another mask"):
        release.measure_masks(args, 60)


def test_rollout(capsys):
    """Greedy rollouts of both sides are compared token by token on the way."""
    figures, shown = last_line(
        capsys, rollout.main, "--models", "tiny", "--batches", 1, 3, "--rows", 2, 7,
        "--tokens", 12, "--prompt-tokens", 4, "--rounds", 1,
    )  # fmt: skip
    names = {f"tiny/{lengths}/{batch}" for lengths in ("equal", "heavy") for batch in (1, 3)}
    assert set(figures) == names and all(value > 0 for value in figures.values())
    assert shown.count("| 1.000 |") == 4  # the share of equal tokens


def test_rollout_stops_where_the_sides_differ(monkeypatch):
    monkeypatch.setattr(rollout, "copy_speed", lambda device: 1e9)
    monkeypatch.setattr(rollout.Work, "generate", lambda work, *rest, **more: [[3]] * 2)
    words = "--models tiny --lengths equal --batches 2 --rows 2 --tokens 6 --prompt-tokens 4"
    with pytest.raises(SystemExit, match="of the greedy tokens agree"):
        rollout.main(words.split())


LOGPROBS = ["--vocabulary", 700, "--width", 16, "--lengths", 40, "--repeats", 1, "--chunk", 16,
            "--peak-threads", 1]  # fmt: skip


def test_logprobs(capsys, monkeypatch):
    monkeypatch.setattr(memory, "in_a_process", lambda function, *args: function(*args))
    figures, shown = last_line(capsys, logprobs.main, *LOGPROBS, "--peaks", 48, "--naive", 47)
    ratios = {"score_ours_over_naive", "logp_ours_over_naive", "logp_plain_over_naive",
              "rkl_ours_over_naive", "rkl_plain_over_naive"}  # fmt: skip
    assert all(figures[name] > 0 for name in ratios)
    assert all(figures[f"{job}_ours_over_compiled"] is None for job in ("score", "logp", "rkl"))
    assert {name for name in figures if name.endswith("_mb")} == {
        "score_ours_48_mb", "logp_ours_48_mb", "rkl_ours_48_mb"  # naive is too long there
    }
    assert shown.count("| 40 |") == 3 and shown.count("| 48 |") == 3


def test_logprobs_compares_before_it_measures(monkeypatch):
    naive = logprobs.naive_rkl
    monkeypatch.setattr(logprobs, "naive_rkl", lambda *args: 1.01 * naive(*args))
    with pytest.raises(SystemExit, match="T=40 rkl: ours differs from naive by"):
        logprobs.main([str(word) for word in [*LOGPROBS, "--peaks"]])


# ------------------------------------------------------------------------------ what they share
def test_turns():
    """Interleaved, every call timed by itself."""
    order = []

    def slow(number):
        order.append(("slow", number))
        return sum(range(2_000_000))

    calls = timing.take_turns({"slow": slow, "fast": lambda n: order.append(("fast", n))}, 3, "cpu")
    assert order == [(name, n) for n in range(3) for name in ("slow", "fast")]
    assert all(found == sum(range(2_000_000)) for _, found in calls["slow"])
    assert min(s for s, _ in calls["slow"]) > max(s for s, _ in calls["fast"]) >= 0


def test_a_ledger_divides_by_steps_and_sums_phases():
    ledger = timing.Ledger()
    for step_seconds in (1.0, 3.0):
        with ledger.round(2, "cpu") as phases:
            phases += [{"sample": step_seconds}, {"sample": 1.0, "update": 4.0}]
    assert ledger.series("sample", "update") == [3.0, 4.0] and ledger.least("sample") == 1.0
    assert ledger.least("mask") is None and ledger.least("mask", "update") == 2.0
    assert len(ledger.cpu) == len(ledger.wall) == 2 and ledger.seconds("cpu") is ledger.cpu


def test_ratios_by_hand():
    assert timing.ratios([2.0, 6.0, 8.0], [4.0, 1.0, 8.0]) == (2.0, 1.0)


def test_what_is_compared_is_cpu_time():
    """Sleep costs nothing; a round's seconds are those of one step."""
    ledger, start = timing.Ledger(), timing.clock("cpu")
    with ledger.round(2, "cpu"):
        time.sleep(0.3)
        burn(time.process_time() + 0.1)
    assert 0.1 < timing.clock("cpu") - start < 0.3
    assert 0.05 < ledger.cpu[0] < 0.1 and ledger.wall[0] > 0.15


def test_cpu_time_counts_worker_processes():
    from concurrent.futures import ProcessPoolExecutor

    start = timing.cpu_seconds()
    with ProcessPoolExecutor(1) as pool:
        spent = pool.submit(burn, 0.2).result()
        living = timing.cpu_seconds() - start
    assert spent >= 0.2 and living >= 0.2 and timing.cpu_seconds() - start >= 0.2


def burn(seconds):
    """Until this process has used so much CPU time; returns it."""
    while time.process_time() < seconds:
        pass
    return time.process_time()


def test_peak_memory_is_that_of_the_work():
    """64 MiB that are held for a moment, above what there is before; an earlier peak of 256 MiB is
    forgotten."""
    torch.ones(2**26).sum()
    peak = memory.peak_of(lambda: torch.ones(2**24).sum().item())
    assert 60 < peak["above"] < 90 and peak["set_up"] > 60


def test_random_models_differ_by_seed_alone():
    one, same, other = (shapes.random_model(shapes.SHAPES["tiny"], 8, seed=s) for s in (0, 0, 1))
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0] is one.get_output_embeddings().weight and not weights[0].requires_grad
    assert one.config.pad_token_id is None and tuple(weights[0].shape) == (512, 32)


def test_a_written_pair(tmp_path):
    """Nothing can draw the end token; the prompts have the length that was asked for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shapes.write_pair(tmp_path, "small", 50, 70, 3, 4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    lines = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert len(lines) == 70 and tokenizer.eos_token_id == 50
    assert {len(tokenizer(line["prompt"])["input_ids"]) for line in lines} == {3}
    sizes = [AutoConfig.from_pretrained(tmp_path / side) for side in ("student", "teacher")]
    assert [(c.vocab_size, c.hidden_size) for c in sizes] == [(50, 128), (50, 256)]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert 1.5 < student(torch.arange(1, 50)[None]).logits.std() < 4


def test_tables(capsys):
    tables.print_head("a", "b, c")
    tables.print_row(1, None)
    tables.print_json({"x": 0.12345, "none": None, "zero": 0.0}, 3)
    assert capsys.readouterr().out.splitlines() == [
        "| a | b, c |", "|---|---|", "| 1 | - |", '{"x": 0.123, "none": null, "zero": 0.0}'
    ]
    assert tables.table(["a"], [["b"]]) == "| a |\n| --- |\n| b |"
    assert machine.tolerance("float32") < machine.tolerance("bfloat16")


def test_a_step_set_back_is_the_same_step():
    """The student's weights and the optimizer's moments are as they were."""
    words = "--toy horizon --method opd --prompts-per-step 2 --difficulty 1 --warmup-steps 0"
    run = our_side.load(words.split())
    weights = our_side.weights_of(run)
    lines, after = [], []
    for _ in range(2):
        line, phases = our_side.step(run, 0)
        lines.append({key: line[key] for key in ("loss", "grad_norm", "reverse_kl")})
        assert phases.keys() >= {"sample", "score", "update"}
        after.append(our_side.weights_of(run))
        our_side.set_back(run, weights)
    assert lines[0] == lines[1]
    assert all(torch.equal(after[0][name], after[1][name]) for name in weights)
    assert any(not torch.equal(after[0][name], weights[name]) for name in weights)
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())
