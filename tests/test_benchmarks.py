"""The commands behind the README's tables run, and end with one line of JSON.  No times here."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

import toy

ROOT = Path(__file__).parent.parent


def load_benchmark(name):
    """A file of benchmarks/ as a module, under a name that hides none of the project's."""
    spec = importlib.util.spec_from_file_location(
        f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py"
    )
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


compare = load_benchmark("compare")
verdicts = load_benchmark("verdicts")


def last_line(*command):
    """Run a benchmark; its last line, as JSON, and all of its standard output."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_lgr():
    figures, shown = last_line("benchmarks/lgr.py", "--lengths", "48", "64", "--candidates", "3",
                               "--rates", "0.2", "--repeats", "1", "--slices", "2")
    assert set(figures) >= {"vs_naive", "vs_reprefill", "over_opd", "over_flop_limit"}
    assert all(value > 0 for value in figures.values())
    rows = [line for line in shown.splitlines() if line.startswith(("| 48 |", "| 64 |"))]
    # naive is timed at the last length only
    assert len(rows) == 2 and rows[0].endswith("| - |") and not rows[1].endswith("| - |")


def test_step():
    """Both parts; TRL's side where it is installed, after its loss and gradient were compared."""
    figures, shown = last_line("benchmarks/step.py", "--vocabularies", "64", "--prompts", "2",
                               "--prompt-tokens", "3", "--tokens", "4", "--rounds", "1",
                               "--steps-per-round", "1", "--no-memory", "--",
                               "--prompts-per-step", "2", "--difficulty", "1")
    assert all(value > 0 for value in figures.values())
    assert set(figures) >= {"ours_s_64", "opd_s_horizon", "rkl_over_opd", "release_over_opd",
                            "release_over_opd_wall", "release_over_opd_without_update",
                            "lgr_over_opd", "lgr_over_opd_flops"}
    assert "| 64 | ours |" in shown and "| fork | lgr |" in shown
    if importlib.util.find_spec("trl") is None:
        assert "our side alone" in shown and "trl_over_ours_64" not in figures
    else:
        assert "trl_over_ours_64" in figures and "on the same rollouts loss" in shown


def test_step_without_trl_and_with_memory(tmp_path, monkeypatch):
    (tmp_path / "trl.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    figures, shown = last_line("benchmarks/step.py", "--only", "peer", "--vocabularies", "64",
                               "--prompts", "2", "--prompt-tokens", "3", "--tokens", "4",
                               "--rounds", "1", "--steps-per-round", "1")
    assert set(figures) == {"ours_s_64", "ours_peak_MiB_64"} and "TRL /" not in shown
    assert "our side alone" in shown and "none here" in shown


def test_flops_of_a_step_by_torchs_counter():
    """torch counts the whole square of attention, the benchmark its causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    step, model = load_benchmark("step"), tiny_model("qwen3")
    token, column, head = step.costs(model, 61)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(10)[None])
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "attention" in str(op))
    assert sum(counts.values()) - attention == 10 * (token + head)
    assert attention in (0, 10 * 10 * column)  # not every CPU kernel is known to the counter
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


def test_release():
    """The masks of eight rows are compared with loops on the way."""
    figures, shown = last_line(
        "benchmarks/release.py", "--rows", "5", "--lengths", "90", "150", "--tokens", "400",
        "--text-rows", "2", "--workers", "0", "2", "--repeats", "1",
    )  # fmt: skip
    names = {"mask_s_90", "mask_s_150", "split_mb_per_s_toy_0", "split_mb_per_s_words_2"}
    assert set(figures) >= names | {"over_none_0", "over_none_1", "mask_share_1"}
    assert all(value > 0 for value in figures.values())
    cut = [line.split("|")[4] for line in shown.splitlines() if re.match(r"\| (90|150) \|", line)]
    assert len(cut) == 2 and shown.count("| words |") == 2


def test_rollout():
    """Greedy rollouts of both sides are compared token by token on the way."""
    figures, shown = last_line(
        "benchmarks/rollout.py", "--models", "tiny", "--batches", "1", "3", "--rows", "2", "7",
        "--tokens", "12", "--prompt-tokens", "4", "--rounds", "1",
    )  # fmt: skip
    names = {f"tiny/{lengths}/{batch}" for lengths in ("equal", "heavy") for batch in (1, 3)}
    assert set(figures) == names and all(value > 0 for value in figures.values())
    assert shown.count("| 1.000 |") == 4  # the share of equal tokens


def test_logprobs():
    figures, shown = last_line("benchmarks/logprobs.py", "--vocabulary", "700", "--width", "16",
                               "--lengths", "40", "--peaks", "48", "--naive", "47", "--repeats",
                               "1", "--chunk", "16", "--peak-threads", "1")
    ratios = {"score_ours_over_naive", "logp_ours_over_naive", "logp_plain_over_naive",
              "rkl_ours_over_naive", "rkl_plain_over_naive"}
    assert all(figures[name] > 0 for name in ratios)
    assert all(figures[f"{job}_ours_over_compiled"] is None for job in ("score", "logp", "rkl"))
    assert {name for name in figures if name.endswith("_mb")} == {
        "score_ours_48_mb", "logp_ours_48_mb", "rkl_ours_48_mb"  # naive is too long there
    }
    assert shown.count("| 40 |") == 3 and shown.count("| 48 |") == 3


def test_compare(tmp_path):
    """Two methods, two seeds; a second call finds the runs and writes the same table."""
    command = ["benchmarks/compare.py", "--worlds", "fork", "--methods", "opd", "lgr", "--seeds",
               "3", "4", "--jobs", "1", "--out", tmp_path / "new", "--", "--steps", "1",
               "--difficulty", "1", "--eval-count", "6", "--eval-samples", "1",
               "--prompts-per-step", "2"]
    figures, shown = last_line(*command)
    names = [f"fork/6/{method}/{seed}" for method in ("opd", "lgr") for seed in (3, 4)]
    assert list(figures) == names
    runs = tmp_path / "new" / "runs" / "fork"
    folders = sorted(folder.name for folder in runs.iterdir() if folder.is_dir())
    assert folders == [f"{m}-n6-seed{s}" for m in ("lgr", "opd") for s in (3, 4)]
    table = (tmp_path / "new" / "compare.md").read_text()
    assert table.count("| fork |") == 2 and "wording" in table and table.strip() in shown
    assert (tmp_path / "new" / "curves.png").exists()
    record = json.loads((tmp_path / "new" / "compare.json").read_text())
    assert [(r["method"], r["seed"]) for r in record["runs"]] == [
        ("opd", 3), ("opd", 4), ("lgr", 3), ("lgr", 4)
    ]
    for run, folder in zip(record["runs"], ("opd-n6-seed3", "opd-n6-seed4", "lgr-n6-seed3",
                                            "lgr-n6-seed4"), strict=True):
        log = [json.loads(x) for x in (runs / folder / "log.jsonl").read_text().splitlines()]
        assert run["steps"] == [0, 1] and run["accuracy"] == [log[0]["accuracy"],
                                                              log[-1]["accuracy"]]
        assert run["ood"] == [log[0]["ood"]["accuracy"], log[-1]["ood"]["accuracy"]]
        assert run["supervised_tokens"] == log[1]["kept_tokens"] / 2
    shutil.rmtree(runs / "opd-n6-seed4" / "student")  # as if it had been interrupted
    before = (runs / "opd-n6-seed3" / "log.jsonl").stat().st_mtime_ns
    assert last_line(*command)[0] == figures
    assert (runs / "opd-n6-seed3" / "log.jsonl").stat().st_mtime_ns == before
    assert (runs / "opd-n6-seed4" / "student").exists()
    assert (tmp_path / "new" / "compare.md").read_text() == table


def test_runs_of_compare_have_sentence_workers(tmp_path):
    """They are processes that are forked from a forked process, and end with their own."""
    command = ["benchmarks/compare.py", "--worlds", "horizon", "--methods", "release", "--seeds",
               "0", "--out", tmp_path, "--", "--steps", "1", "--difficulty", "1", "--eval-count",
               "2", "--eval-samples", "1", "--prompts-per-step", "2", "--sentence-workers", "2"]
    assert list(last_line(*command)[0]) == ["horizon/12/release/0"]


def test_compare_says_which_run_failed(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/compare.py", "--worlds", "fork", "--methods", "opd", "--seeds",
         "0", "--out", tmp_path, "--", "--steps", "none"], cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "compare.json").exists()
    assert "train.py --toy fork --method opd" in done.stderr
    assert "argument --steps: invalid whole number value: 'none'" in done.stderr


@pytest.mark.parametrize("flags, culprit", [
    ("--only everything", "everything"), ("--worlds nowhere --out x", "nowhere"),
    ("--worlds fork", "needs --out"), ("--vary lgr-gamma 1", "--vary needs --worlds"),
    ("--jobs 0", "--jobs must be at least 1"), ("-- --steps 1", "needs --out"),
    ("--only budget", "needs --out"), ("--seeds 0", "needs --out"),
])
def test_compare_refuses(flags, culprit, capsys):
    with pytest.raises(SystemExit) as left:
        compare.parse(flags.split())
    assert left.value.code == 2 and culprit in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------- what compare.py makes of runs
def result(method, seed, accuracy, *flags, world="clean", moves=12, **more):
    """One run as in compare.json."""
    return {"world": world, "method": method, "flags": list(flags), "moves": moves, "seed": seed,
            "accuracy": [0.25, accuracy], "ood": [1.0, 0.9], "kept": 0.5, "fired": 1.0,
            "uncertain_wording": None} | more


def test_a_row_of_the_table_by_hand():
    """Differences to opd, paired by seed: .1, .2, .3; mean .2, s .1, half width 4.303 * .1 / sqrt 3
    = .248. Another difficulty's opd, and one with flags, are somebody else's."""
    runs = [result("opd", s, a) for s, a in ((0, 0.5), (1, 0.6), (2, 0.4))]
    runs += [result("opd", s, 0.1, moves=6) for s in range(3)]
    runs += [result("opd", s, 0.2, "--lr", "1") for s in range(3)]
    runs += [result("rkl", s, a, "--lr", "2") for s, a in ((2, 0.7), (0, 0.6), (1, 0.8))]
    wanted = compare.cells("clean", "opd") + compare.cells("clean", "rkl", "--lr 2", "--lr 3")
    assert "- release" not in compare.table(runs, wanted), "no control, no such column"
    controls = runs + [result("random", s, 0.3) for s in range(3)]
    controls += [result("release", s, a) for s, a in ((0, 0.4), (1, 0.5), (2, 0.6))]
    (control,) = compare.table(controls, compare.cells("clean", "random")).splitlines()[2:]
    assert "| -0.200 [-0.448, +0.048] | -0.200 [-0.448, +0.048] |" in control
    lines = compare.table(runs, wanted).splitlines()
    assert lines[0] == ("| world | moves | method | accuracy | each seed | - opd | supervised | "
                        "second task | fired |")
    assert lines[2] == ("| clean | 12 | opd | .500 ± .058 | .500 .600 .400 | - | 0.50 | "
                        "1.000 → .900 | 1.00 |")
    assert lines[3] == ("| clean | 12 | rkl --lr 2 | .700 ± .058 | .600 .800 .700 | "
                        "+0.200 [-0.048, +0.448] | 0.50 | 1.000 → .900 | 1.00 |")
    assert len(lines) == 4, "what has no runs has no row"


def test_experiments_share_runs_and_the_one_with_a_curve_wins():
    plain, curve = compare.cells("horizon", "opd"), compare.cells("horizon", "opd", curve=True)
    other = compare.cells("horizon", "opd", "--lr 1")
    for first, second in ((plain, curve), (curve, plain)):
        chosen = {"a": ("", first), "b": ("", second), "c": ("", other)}
        todo = compare.list_runs(chosen, [0, 1, 2])
        assert [(cell.flags, seed) for cell, seed in todo] == (
            [((), s) for s in range(3)] + [(("--lr", "1"), s) for s in range(3)]
        )
        assert [cell.curve for cell, _ in todo] == [True] * 3 + [False] * 3
    everything = compare.list_runs(compare.EXPERIMENTS, [0])
    assert len({cell.name for cell, _ in everything}) == len(everything)


def test_a_run_without_a_curve_is_not_taken_for_one_with(tmp_path):
    (plain,) = compare.cells("horizon", "opd")
    (curve,) = compare.cells("horizon", "opd", curve=True)
    (tmp_path / "student").mkdir()
    for every, enough in ((0, False), (10, True)):
        config = {"flags": {"eval_every": every}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert compare.finished(tmp_path, plain) and compare.finished(tmp_path, curve) == enough
    (tmp_path / "student").rmdir()
    assert not compare.finished(tmp_path, plain)


def test_every_experiment_is_made_of_flags_that_train_takes():
    from flags import parse

    for cell, seed in compare.list_runs(compare.EXPERIMENTS | {"quick": ("", compare.QUICK)}, [7]):
        _, args = parse(compare.flags_of(cell, seed, ROOT / "x", []))
        assert (args.toy, args.method, args.seed) == (cell.world, cell.method, 7)
        assert args.difficulty == cell.difficulty
        assert args.eval_every == (10 if cell.curve else 0)


def test_the_readme_shows_rows_that_the_commands_wrote():
    """Every row of a results table in the README stands in results/*.md, digit by digit."""
    written = "\n".join(path.read_text() for path in (ROOT / "results").glob("*.md"))
    written = {line.strip() for line in written.splitlines()}
    worlds = "|".join(map(re.escape, toy.WORLDS))
    shown = [line for line in (ROOT / "README.md").read_text().splitlines()
             if re.match(rf"\| ({worlds}) \| [0-9a-z+]+ \| ", line)]
    assert len(shown) > 50
    for line in shown:
        assert line.strip() in written, line
    for name in re.findall(r"results/[\w.-]+\.(?:png|json|md)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name


def diagnosis(method, teacher=0.5):
    """What verdicts.py reads of a report."""
    completion = {"teacher": {"mean": teacher}}
    return {"command": {"method": method}, "students": {"student": {"completion": completion}}}


def test_the_regret_of_an_advice_by_hand():
    """opd .5 and .7, release .4: to suggest release costs .2, nothing .35, lgr was not measured."""
    runs = [result("opd", 0, 0.5), result("opd", 1, 0.7), result("release", 0, 0.4)]
    runs += [result("opd", 0, 0.9, "--lr", "1"), result("opd", 0, 0.9, moves=3)]
    reports = [diagnosis(method) for method in ("opd", "release", None, "lgr")]
    line = verdicts.advice(reports, runs, "clean", 12)
    assert line["after"] == {"opd": 0.6, "release": 0.4, "none": 0.25}
    assert line["suggested"] == ["opd", "release", "none", "lgr"]
    assert line["regret"] == [0.0, 0.2, 0.35, None]
    row = verdicts.advice_table([line]).splitlines()[2]
    assert row == ("| clean | 12 | yes | opd 1/4, release 1/4, none 1/4, lgr 1/4 | 0.500 | 0.250 | "
                   "0.600 | 0.400 | - | - | 0.183 |")
    assert not verdicts.seen("clean", 6) and not verdicts.seen("horizon-0.1", 12)


def test_verdicts(tmp_path):
    """One diagnosis of the real command, nothing trained; a second call runs nothing again."""
    flags = ["benchmarks/verdicts.py", "--seeds", "0", "--cases", "clean", "--after", "--place",
             tmp_path / "d", "--out", tmp_path / "new"]  # fmt: skip
    found, _ = last_line(*flags)
    assert found.pop("opd_within_0.1_of_the_teacher") == [1, 1]
    assert found == {"seen": {"diagnoses": 1, "mean_regret": 0.0, "worst": 0.0}}
    table = (tmp_path / "new" / "verdicts.md").read_text()
    assert "| clean | 12 | yes | opd 1/1 | " in table and "After training" not in table
    report = tmp_path / "d" / "clean-n12-seed0" / "report.json"
    before = report.stat().st_mtime_ns
    assert last_line(*flags)[0]["seen"] == found["seen"] and report.stat().st_mtime_ns == before


def test_the_picture_of_verdicts_is_drawn_from_what_was_written(tmp_path):
    lines = json.loads((ROOT / "results" / "verdicts.json").read_text())["after"]
    verdicts.draw(lines, tmp_path)
    assert (tmp_path / "after.png").read_bytes()[:4] == b"\x89PNG"
    table = verdicts.after_table(lines)
    assert table in (ROOT / "results" / "verdicts.md").read_text()
    for line in lines:
        t_X, mean_X, half_X, count_X = verdicts.mean_curve(line)
        assert len(t_X) == len(mean_X) >= 5 and (half_X >= 0).all() and (count_X > 0).all()
        assert len(line["fit"]) == (1 if line["method"] == "before" else 5)


def test_soak(tmp_path):
    """A short form of it, and that it would see what it looks for."""
    figures, _ = last_line("benchmarks/soak.py", "--kills", "3", "--seed", "5")
    assert figures["kills"] == 3 and figures["mismatches"] == 0 and figures["resumes"] <= 3
    assert sum(figures["where"].values()) == 3 and figures["runs"] >= 1

    soak = load_benchmark("soak")
    line = {"step": 1, "loss": 0.5, "seconds": {"total": 1.0}}
    for name in ("one", "two"):
        out = tmp_path / name
        (out / "student").mkdir(parents=True)
        (out / "student" / "model").write_bytes(b"12")
        (out / "log.jsonl").write_text(json.dumps(line) + "\n")
        soak.checkpoint.write(out, 1, {"student": {"a": torch.ones(2)}}, {})
        line["seconds"] = {"total": 2.0}
    assert soak.differences(out, tmp_path / "one") == [] == soak.broken(out)
    (out / "student" / "model").write_bytes(b"13")
    assert soak.differences(out, tmp_path / "one") == ["student/model"]
    (out / "log.jsonl").write_text(json.dumps(line | {"loss": 0.25}) + "\n")
    assert soak.differences(out, tmp_path / "one") == ["log.jsonl", "student/model"]
    soak.checkpoint.write(out, 2, {"student": {"a": torch.zeros(2)}}, {})
    found = ["log.jsonl", "student/model", "checkpoint/student.safetensors"]
    assert soak.differences(out, tmp_path / "one") == found
    (soak.checkpoint.newest(out) / "facts.json").write_text("{")
    assert soak.broken(out) == ["step-00000002: facts.json has another checksum"]
