"""Properties of the public names of train."""

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
    masks,
    options,
    prompts_of_ids,
    prop,
    rollouts,
    seeded,
    seeds,
    small,
    tiny,
)

import checkpoint
import flags
import grading
import metrics
import preparing
import toy
import train


# ------------------------------------------------------------------------------------------ train
@prop("train.my_share", "train.batch_order", "train.row_generator", examples=80,
      count=st.integers(1, 20), world=st.integers(1, 6), first=st.integers(0, 60),
      length=st.integers(1, 30), seed=seeds, stream=st.integers(0, 2**23))
def test_shares_orders_and_generators(count, world, first, length, seed, stream):
    """Shares partition the rows; every epoch has every problem once; a process that begins at a
    row draws what one process would have drawn there."""
    shares = [train.my_share(count, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    order = train.batch_order(count, first, length, seed)
    assert order == train.batch_order(count, 0, first + length, seed)[first:]
    whole = train.batch_order(count, count * (first // count), count, seed)
    assert sorted(whole) == list(range(count))
    numbers = torch.rand(count, 3, dtype=torch.float64,
                         generator=train.row_generator(seed, stream, 0, 3))  # fmt: skip
    row = first % count
    own = torch.rand(3, dtype=torch.float64, generator=train.row_generator(seed, stream, row, 3))
    assert torch.equal(own, numbers[row])


@prop("train.token_weights", "metrics.quarters", "train.policy_gradient_loss",
      "train.sum_over_ranks", examples=100, seed=seeds, B=small, T=st.integers(1, 9),
      rescale=st.sampled_from(["batch", "sequence", "none"]))
def test_weights_keep_the_loss_mass(seed, B, T, rescale):
    g = seeded(seed)
    start_B1 = torch.randint(T, (B, 1), generator=g)
    mask_BT = torch.arange(T) >= start_B1
    keep_BT = mask_BT & (torch.rand(B, T, generator=g) < 0.6)
    total, kept = train.sum_over_ranks([mask_BT.sum().item(), keep_BT.sum().item()], "cpu")
    weight_BT = train.token_weights(mask_BT, keep_BT, rescale, total, kept)
    assert finite(weight_BT) and bool(((weight_BT > 0) == keep_BT).all())
    mass_B = mask_BT.sum(1) * keep_BT.any(1) / total
    right = {"batch": float(kept > 0), "sequence": mass_B.sum(), "none": kept / total}[rescale]
    assert math.isclose(weight_BT.sum(), right, abs_tol=1e-5)
    if rescale == "sequence":
        torch.testing.assert_close(weight_BT.sum(1), mass_B)
    quarter_BT = metrics.quarters(mask_BT)
    for mask_T, quarter_T in zip(mask_BT, quarter_BT, strict=True):
        inside = quarter_T[mask_T].tolist()
        assert inside == sorted(inside) and set(quarter_T[~mask_T].tolist()) <= {4}
        sizes = [inside.count(q) for q in range(4)]
        assert sum(sizes) == len(inside) and max(sizes) - min(sizes) <= 1
    logp_BT, advantage_BT = (torch.randn(B, T, generator=g) for _ in "ab")
    terms_BT = weight_BT * advantage_BT
    loss = train.policy_gradient_loss(logp_BT, advantage_BT, weight_BT)
    torch.testing.assert_close(loss, -(terms_BT * logp_BT).sum())
    same_policy = train.policy_gradient_loss(logp_BT, advantage_BT, weight_BT, logp_BT)
    torch.testing.assert_close(same_policy, -terms_BT.sum())


@prop("metrics.repeated_ngrams", examples=150, ids=st.lists(st.integers(0, 3) | st.just(2**20),
      max_size=20), n=st.integers(1, 5))
def test_repeats_are_those_of_a_set(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    found = metrics.repeated_ngrams(torch.tensor(ids, dtype=torch.int64), n)
    assert found == (len(grams) - len(set(grams)), len(grams))


@prop("train.update", "train.micro_batch_loss", "preparing.StudentLogProbs", "train.autocast",
      examples=15, seed=seeds, prompts=prompts_of_ids, rows=st.integers(0, 3),
      tokens=st.integers(0, 30), objective=st.sampled_from(["pg", "rkl", "fkl", "jsd"]),
      updates=st.integers(1, 2))
def test_an_update_does_not_depend_on_micro_batches(
    seed, prompts, rows, tokens, objective, updates
):
    """The same loss and the same step as one batch, and the loss is the sum written out."""
    batch, steps = rollouts(seed, prompts), []
    chosen_BT = torch.rand(batch.ids_BT.shape, generator=seeded(seed)) < 0.7
    keep_BT = batch.response_mask_BT & chosen_BT
    choice = grading.Supervision(keep_BT, keep_BT[:, 0], batch.logp_BT[:, 0])
    teacher = tiny("qwen3", 2)
    with torch.no_grad():
        hidden_BTD = teacher.base_model(batch.ids_BT)[0]
    grades = grading.Grades(batch.logp_BT, batch.logp_BT, choice, hidden_BTD=hidden_BTD)
    advantage_BT, weight_BT = torch.randn(keep_BT.shape, generator=seeded(seed)), keep_BT.float()
    for limits in ((0, 0), (rows, tokens)):
        args = options("--micro-batch", limits[0], "--tokens-per-micro-batch", limits[1],
                       "--objective", objective, "--updates-per-rollout", updates, "--clip-grad", 0)
        assert not torch.is_autocast_enabled("cpu") and not train.autocast(args)._enabled
        model = copy.deepcopy(tiny("qwen3", 1))
        student = preparing.StudentLogProbs(model, VOCABULARY, 1.0)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
        loss, norm = train.update(student, optimizer, batch, grades, advantage_BT, weight_BT, args,
                                  teacher.get_output_embeddings().weight)  # fmt: skip
        steps.append((loss, norm, model))
        assert math.isfinite(loss) and norm >= 0
    assert steps[1][:2] == pytest.approx(steps[0][:2], rel=1e-3, abs=1e-4)
    for a, b in zip(steps[0][2].parameters(), steps[1][2].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if objective == "pg":
        factor_BT = batch.logp_BT if updates == 1 else 1.0
        right = -(advantage_BT * weight_BT * factor_BT).sum()
        assert math.isclose(steps[0][0], right, rel_tol=1e-3, abs_tol=1e-2)
    else:
        assert steps[0][0] > -1e-4


METHODS = st.sampled_from(sorted(flags.METHODS))


@prop("grading.candidates_needed", "preparing.student_and_teacher", examples=40, method=METHODS,
      topk=st.booleans(), margin=st.integers(2, 9), world=st.sampled_from(toy.SHIPPED))
def test_candidates_are_those_that_the_phases_read(method, topk, margin, world):
    args = options("--method", method, "--margin-top-k", margin, "--toy", world)
    needed = grading.candidates_needed(args)
    assert needed.get("--margin-top-k", margin) == margin
    assert ("--margin-top-k" in needed) == ("margin" in grading.signals(args))
    assert ("--lgr-top-k" in needed) == (args.lookahead == "on")
    assert ("--union-top-k" in needed) == (args.objective == "topk")
    paths = preparing.student_and_teacher(args)
    assert list(paths) == ["--student", "--teacher"]
    assert paths["--teacher"] == str(toy.world(world).teacher)
    args.student = "mine"
    assert preparing.student_and_teacher(args) == paths | {"--student": "mine"}


@prop("checkpoint.check_folder", "checkpoint.make_folder", "train.Stopwatch", examples=40,
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
            checkpoint.make_folder(out)
            assert not any(out.iterdir())
            if kind in ("run", "foreign"):
                text = json.dumps({"flags": {"number": number}})
                (out / ("config.json" if kind == "run" else "x")).write_text(text)
                written.append(text)
            found = [p.read_text() for p in Path(folder).rglob("*") if p.is_file()]
            assert sorted(found) == written
    watch = train.Stopwatch("cpu")
    for name in [*kinds, "end"]:
        watch.lap(name)
    assert set(watch.seconds) == {*kinds, "end"} and min(watch.seconds.values()) >= 0


SHORT = ["--prompts-per-step", 3, "--difficulty", 1, "--max-new-tokens", 14, "--eval-count", 2,
         "--eval-samples", 2, "--sentence-workers", 0, "--steps", 1, "--min-segments", 1,
         "--splitter", "untrained", "--checkpoint-every", 1]  # fmt: skip


@prop("preparing.prepare", "preparing.load_prompts", "preparing.load_models",
      "preparing.describe", "preparing.fingerprint", "harness.check_sampling", "train.sample",
      "train.steps", "train.rows_of_step", "train.all_random_states", "train.write_checkpoint",
      "train.restore",
      "train.train_step", "train.spend_elsewhere", "metrics.batch_sums", "metrics.log_line",
      "train.train", "train.evaluate_student", "train.answers", "train.save_student",
      examples=4, method=METHODS, objective=st.none() | st.sampled_from(flags.OBJECTIVES),
      mask=st.none() | masks, lookahead=st.sampled_from([None, "on", "off"]),
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
    except SystemExit:
        assume(False)
    run = preparing.prepare(args, 0, 1)
    preparing.load_models(run, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        log = train.train(run, Path(folder))
        lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        again = preparing.prepare(args, 0, 1)  # the checkpoint at the end holds everything
        preparing.load_models(again, torch.device("cpu"))
        train.restore(again, checkpoint.newest(Path(folder)))
        for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert again.position.step == args.steps and again.position.skipped == 0
        assert preparing.fingerprint(again) == preparing.fingerprint(run)
        train.save_student(run, Path(folder))
        assert toy.exists(Path(folder, "student"))
    for one in (run, again):
        one.sentences and one.sentences.close()
    first, step, last = lines
    problems, mine = train.rows_of_step(run, 0)
    assert len(problems) == len(mine) == args.prompts_per_step * args.rollouts_per_prompt
    assert log == lines and 0 <= last["accuracy"] <= 1
    assert 0 < step["kept_tokens"] <= step["response_tokens"] * args.prompts_per_step + 1e-6
    for name, value in step.items():
        assert value is None or not isinstance(value, float) or math.isfinite(value), name
    shares = ["truncated", "kept", "fired", "bic_gain_over_6"]
    assert all(0 <= step[name] <= 1 for name in shares) and step["loss"] == step["loss"]
    assert json.loads(json.dumps(preparing.describe(run)))["flags"]["seed"] == seed
