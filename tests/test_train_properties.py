"""Properties of the public names of train, and of what a run is made of."""

import contextlib
import copy
import io
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from hypothesis import assume
from hypothesis import strategies as st
from properties import (
    finite,
    mask_names,
    options,
    prompts_of_ids,
    prop,
    rollouts,
    seeded,
    seeds,
    small,
    tiny,
)
from runs import bare_run, few_problems, make_run
from safetensors.torch import load_file

import harness
import toy
import train
from harness import checkpoint, log, pair, processes


@prop("harness.my_share", "harness.batch_order", "harness.row_generator", examples=80,
      count=st.integers(1, 20), world=st.integers(1, 6), first=st.integers(0, 60),
      length=st.integers(1, 30), seed=seeds, stream=st.integers(0, 2**23))
def test_shares_orders_and_generators(count, world, first, length, seed, stream):
    """Shares partition the rows; every epoch has every problem once; a process that begins at a
    row draws what one process would have drawn there."""
    shares = [harness.my_share(count, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    order = harness.batch_order(count, first, length, seed)
    assert order == harness.batch_order(count, 0, first + length, seed)[first:]
    whole = harness.batch_order(count, count * (first // count), count, seed)
    assert sorted(whole) == list(range(count))
    numbers = torch.rand(count, 3, dtype=torch.float64,
                         generator=harness.row_generator(seed, stream, 0, 3))  # fmt: skip
    row = first % count
    own = torch.rand(3, dtype=torch.float64, generator=harness.row_generator(seed, stream, row, 3))
    assert torch.equal(own, numbers[row])


@prop("train.token_weights", "harness.quarters", "harness.sum_over_ranks",
      "harness.gather_objects", examples=100, seed=seeds, B=small, T=st.integers(1, 9),
      rescale=st.sampled_from(["batch", "sequence", "none"]), mean=st.booleans())
def test_weights_keep_the_loss_mass(seed, B, T, rescale, mean):
    g = seeded(seed)
    start_B1 = torch.randint(T, (B, 1), generator=g)
    mask_BT = torch.arange(T) >= start_B1
    keep_BT = mask_BT & (torch.rand(B, T, generator=g) < 0.6)
    l_BT = mask_BT / mask_BT.sum(1, keepdim=True) if mean else mask_BT.float()
    total, kept = processes.sum_over_ranks([l_BT.sum(), (l_BT * keep_BT).sum()], "cpu")
    assert harness.gather_objects("alone") == ["alone"]
    weight_BT = train.token_weights(l_BT, keep_BT.float(), rescale, total, kept)
    assert finite(weight_BT) and bool(((weight_BT > 0) == keep_BT).all())
    mass_B = l_BT.sum(1) * keep_BT.any(1) / total
    right = {"batch": float(kept > 0), "sequence": mass_B.sum(), "none": kept / total}[rescale]
    assert math.isclose(weight_BT.sum(), right, abs_tol=1e-5)
    if rescale == "sequence":
        torch.testing.assert_close(weight_BT.sum(1), mass_B)
    quarter_BT = log.quarters(mask_BT)
    for mask_T, quarter_T in zip(mask_BT, quarter_BT, strict=True):
        inside = quarter_T[mask_T].tolist()
        assert inside == sorted(inside) and set(quarter_T[~mask_T].tolist()) <= {4}
        sizes = [inside.count(q) for q in range(4)]
        assert sum(sizes) == len(inside) and max(sizes) - min(sizes) <= 1


@prop("harness.repeated_ngrams", examples=150, ids=st.lists(st.integers(0, 3) | st.just(2**20),
      max_size=20), n=st.integers(1, 5))
def test_repeats_are_those_of_a_set(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    found = log.repeated_ngrams(torch.tensor(ids, dtype=torch.int64), n)
    assert found == (len(grams) - len(set(grams)), len(grams))


@prop("train.update", "train.loss_of", "fast.StudentLogProbs", examples=15, seed=seeds,
      prompts=prompts_of_ids, rows=st.integers(0, 3), tokens=st.integers(0, 30),
      objective=st.sampled_from(["pg", "rkl", "fkl", "jsd"]), updates=st.integers(1, 2),
      fast=st.sampled_from(["on", "off"]))
def test_an_update_does_not_depend_on_micro_batches(
    seed, prompts, rows, tokens, objective, updates, fast
):
    """The same loss and the same step as one batch, and the loss is the sum written out."""
    batch, steps = rollouts(seed, prompts), []
    chosen_BT = torch.rand(batch.ids_BT.shape, generator=seeded(seed)) < 0.7
    keep_BT, teacher = batch.response_mask_BT & chosen_BT, tiny("qwen3", 2)
    with torch.no_grad():
        hidden_BTD = teacher.base_model(batch.ids_BT)[0]
    scores = train.Scores(keep_BT.shape, keep_BT=keep_BT, hidden_BTD=hidden_BTD)
    A_BT, w_BT = torch.randn(keep_BT.shape, generator=seeded(seed)), keep_BT.float()
    for limits in ((0, 0), (rows, tokens)):
        flags = ["--micro-batch", limits[0], "--tokens-per-micro-batch", limits[1], "--objective",
                 objective, "--updates-per-rollout", updates, "--clip-grad", 0, "--lr", 1e-3,
                 "--fast", fast]  # fmt: skip
        model = copy.deepcopy(tiny("qwen3", 1))
        run = bare_run(model, *flags, vocab_size=VOCABULARY,
                       teacher_head_VE=teacher.get_output_embeddings().weight)  # fmt: skip
        assert not torch.is_autocast_enabled("cpu") and not run.autocast()._enabled
        loss, norm, finite_both = train.update(run, batch, scores, A_BT, w_BT)
        steps.append((loss, norm, model))
        assert math.isfinite(loss) and norm >= 0 and finite_both
    assert steps[1][:2] == pytest.approx(steps[0][:2], rel=1e-3, abs=1e-4)
    for a, b in zip(steps[0][2].parameters(), steps[1][2].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if objective == "pg":
        factor_BT = batch.logp_BT if updates == 1 else 1.0
        right = -(A_BT * w_BT * factor_BT).sum()
        assert math.isclose(steps[0][0], right, rel_tol=1e-3, abs_tol=1e-2)
    else:
        assert steps[0][0] > -1e-4


METHODS = st.sampled_from(sorted(train.METHODS))


@prop("train.needs", "harness.Needs", "harness.student_and_teacher", examples=40, method=METHODS,
      margin=st.integers(2, 9), world=st.sampled_from(toy.SHIPPED))
def test_needs_are_what_the_phases_read(method, margin, world):
    args = options("--method", method, "--margin-top-k", margin, "--toy", world)
    found = train.needs(args)
    by_margin = args.mask == "release" or train.spends_budget(args)
    looks = by_margin or args.mask == "overlap"
    assert found.candidates.get("margin_top_k") == (margin if looks else None)
    assert ("lgr_top_k" in found.candidates) == (args.lookahead == "on")
    assert ("union_top_k" in found.candidates) == (args.objective == "topk")
    assert found.sentences == (by_margin or args.mask == "std")
    assert bool(found.teacher_checks) == (args.lookahead == "on")
    paths = pair.student_and_teacher(args)
    assert list(paths) == ["--student", "--teacher"]
    assert paths["--teacher"] == str(toy.world(world).teacher)
    args.student = "mine"
    assert pair.student_and_teacher(args) == paths | {"--student": "mine"}


@prop("harness.check_folder", "harness.Claim", "harness.Stopwatch", examples=40,
      kinds=st.lists(st.sampled_from(["nothing", "run", "run", "foreign", "file"]), max_size=4))
def test_no_run_is_ever_overwritten(kinds):
    with tempfile.TemporaryDirectory() as folder:
        out, written = Path(folder, "runs", "a"), []
        for number, kind in enumerate(kinds):
            if kind == "file" and not out.exists():
                out.parent.mkdir(exist_ok=True)
                out.write_text("")
            held = [p.name for p in out.iterdir()] if out.is_dir() else []
            try:
                checkpoint.check_folder(out)
            except ValueError as error:
                assert out.is_file() or held and "config.json" not in held
                assert str(out) in str(error)
                return
            assert not out.is_file() and (not held or "config.json" in held)
            with contextlib.closing(harness.Claim(out)) as claim:
                claim.take()
                claim.begin()
                assert not any(out.iterdir())
            if kind in ("run", "foreign"):
                out.mkdir(parents=True, exist_ok=True)  # what stays empty goes
            if kind in ("run", "foreign"):
                text = json.dumps({"flags": {"number": number}})
                (out / ("config.json" if kind == "run" else "x")).write_text(text)
                written.append(text)
            found = [p.read_text() for p in Path(folder).rglob("*") if p.is_file()]
            assert sorted(found) == written
    watch = harness.Stopwatch("cpu")
    for name in [*kinds, "end"]:
        watch.lap(name)
    assert set(watch.seconds) == {*kinds, "end"} and min(watch.seconds.values()) >= 0


SHORT = ["--prompts-per-step", 3, "--difficulty", 1, "--max-new-tokens", 14, "--eval-count", 2,
         "--eval-samples", 2, "--steps", 1, "--min-segments", 1,
         "--splitter", "untrained", "--checkpoint-every", 1]  # fmt: skip


@prop("train.sample", "train.weigh", "train.train_step", "evaluate.on_held_out", "harness.Run",
      "harness.load_prompts", "harness.load_models", "harness.open_prompts", "harness.batch_sums",
      "harness.log_line", "harness.say_result", "harness.check_sampling",
      examples=4, method=METHODS, mask=st.none() | mask_names,
      objective=st.sampled_from([None, "pg", "topk", "rkl", "fkl", "jsd"]),
      lookahead=st.sampled_from([None, "on", "off"]),
      seed=st.integers(0, 99),
      more=st.sampled_from([[], ["--temperature", 0.7], ["--advantage-clip", 0],
                            ["--margin", "prob"], ["--rescale", "sequence"],
                            ["--updates-per-rollout", 2], ["--lgr-signal", "sampled_prob"],
                            ["--micro-batch", 1], ["--gradient-checkpointing"],
                            ["--dtype", "bfloat16"]]))
def test_any_method_takes_a_step_and_logs_finite_numbers(
    method, objective, mask, lookahead, seed, more
):
    parts = {"--objective": objective, "--mask": mask, "--lookahead": lookahead}
    chosen = [x for flag, value in parts.items() if value for x in (flag, value)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = options("--method", method, "--seed", seed, *chosen, *SHORT, *more)
            train.needs(args)
    except (SystemExit, ValueError):
        assume(False)
    flags = ["--method", method, "--seed", seed, *chosen, *SHORT, *more]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        out = Path(folder, "run")
        with contextlib.redirect_stdout(io.StringIO()) as said, few_problems():
            train.main(["--toy", "horizon", "--device", "cpu", *map(str, flags), "--out", str(out)])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        config = json.loads((out / "config.json").read_text())
        again = make_run("--toy", "horizon", "--device", "cpu", *flags)
        again.restore(checkpoint.newest(out))  # the checkpoint at the end holds everything
        saved = load_file(out / "student" / "model.safetensors")
        for name, tensor in again.model.state_dict().items():
            assert name not in saved or torch.equal(tensor, saved[name].float())
        assert again.position.step == args.steps and again.position.skipped == 0
        assert config["problems_sha256"] == again.fingerprint()
        assert toy.exists(out / "student") and f"wrote {out}" in said.getvalue()
    first, step, last = lines
    problems, mine = again.problems_of(0)
    assert len(problems) == len(mine) == args.prompts_per_step * args.rollouts_per_prompt
    assert 0 <= first["accuracy"] <= 1 and 0 <= last["accuracy"] <= 1
    assert 0 < step["kept_tokens"] <= step["response_tokens"] * args.prompts_per_step + 1e-6
    for name, value in step.items():
        assert value is None or not isinstance(value, float) or math.isfinite(value), name
    shares = ["truncated", "kept", "fired", "bic_gain_over_6"]
    assert all(0 <= step[name] <= 1 for name in shares) and step["loss"] == step["loss"]
    assert config["flags"]["seed"] == seed and config["origins"]["seed"] == "command line"
