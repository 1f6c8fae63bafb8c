"""The training loop: its gradient against enumeration, its processes against one process, its
commands on real folders, its refusals."""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import tiny_model, write_model
from runs import ALL, bare_run, make_run, parse, read_log, run_command, sample, score, spy
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import harness
import lgr
import masks
import rollout
import teachability
import toy
import train
from harness import log

ROOT = Path(train.__file__).parent
TOY = ["--toy", "horizon", "--difficulty", "6"]
SHORT = ["--steps", "2", "--prompts-per-step", "5", "--eval-count", "4", "--eval-samples", "2"]


# ------------------------------------------------------------------------------------- the maths
def enumerate_sequences(vocabulary: int, longest: int, stop: int):
    """All responses: those that end with `stop`, and those cut at `longest` tokens."""
    for length in range(1, longest + 1):
        for ids in itertools.product(range(vocabulary), repeat=length):
            if stop not in ids[:-1] and (ids[-1] == stop or length == longest):
                yield list(ids)


@pytest.mark.parametrize("gamma, fast", [(0.0, "on"), (0.7, "on"), (0.7, "off")])
def test_expected_policy_gradient_is_that_of_the_reverse_kl_minus_the_expected_reward(gamma, fast):
    """V = 4, up to 3 tokens, all 40 responses, float64.  The expectation of the sampled estimator
    equals the gradient of sum over prefixes p(prefix) [KL(p_S(.|prefix) || p_T(.|prefix)) - gamma
    sum_v p_S(v|prefix) r(v)], with the prefix distribution held fixed: what "token-level reverse
    KL on student rollouts" means.  r is the group reward of the student's top 2, by plain forward
    passes of the teacher on one side, by the tree on the other."""
    V, longest, stop, prompt = 4, 3, 0, [2, 1]
    # GPT-2: the norms and rotations of the others pass through float32
    student, teacher = (tiny_model("gpt2", seed=s, vocab_size=V).double() for s in (1, 2))
    rows = [prompt + response for response in enumerate_sequences(V, longest, stop)]
    T = max(map(len, rows))
    ids_BT = torch.tensor([row + [3] * (T - len(row)) for row in rows])
    length_B = torch.tensor([len(row) for row in rows])[:, None]
    column_T = torch.arange(T)
    mask_BT = (column_T >= len(prompt)) & (column_T < length_B)
    with torch.no_grad():
        teacher_logp_BT = bare_run(teacher, vocab_size=V).student(ids_BT, mask_BT)
        group_BTK = student(ids_BT).logits.topk(2).indices.roll(1, dims=1)
    confidence_BTK = lgr.lookahead_confidence(teacher, ids_BT, mask_BT, mask_BT, group_BTK)
    reward_BT = lgr.sampled_reward(lgr.group_reward(confidence_BTK), group_BTK, ids_BT)
    run = bare_run(student, "--fast", fast, vocab_size=V)
    with torch.no_grad():
        logp_BT = run.student(ids_BT, mask_BT)
    probability_B = logp_BT.sum(1).exp()
    assert abs(probability_B.sum() - 1) < 1e-12
    A_BT = teacher_logp_BT - logp_BT + gamma * reward_BT
    w_BT = probability_B[:, None] * mask_BT  # the expectation, not a sample
    batch = rollout.Rollout(ids_BT, mask_BT, logp_BT, None, None, None)
    scores = train.Scores(ids_BT.shape, keep_BT=mask_BT)
    train.loss_of(run, batch, scores, A_BT, w_BT, ALL).backward()
    estimator = [p.grad.clone() for p in student.parameters()]

    student.zero_grad()
    exact = 0.0
    for length in range(longest):
        for prefix in itertools.product(range(1, V), repeat=length):
            ids = torch.tensor([prompt + list(prefix)])
            logp_TV = torch.log_softmax(student(ids).logits[0], -1)
            reward_V = torch.zeros(V, dtype=torch.float64)
            with torch.no_grad():
                log_q_V = torch.log_softmax(teacher(ids).logits[0, -1], -1)
                group = logp_TV[-1].topk(2).indices.tolist()
                ahead = [teacher(torch.cat([ids, torch.tensor([[c]])], 1)).logits for c in group]
                first, second = (logits[0, -1].softmax(-1).max() for logits in ahead)
                # of two values, the unbiased deviation is |difference| / sqrt 2
                spread = (first - second).abs() / math.sqrt(2) + 1e-6
                reward_V[group[0]] = (first - second) / 2 / spread
                reward_V[group[1]] = (second - first) / 2 / spread
            reach = sum(logp_TV[len(prompt) - 1 + i, t] for i, t in enumerate(prefix))
            reach = torch.as_tensor(reach, dtype=torch.float64).detach().exp()
            p_V = logp_TV[-1].exp()
            exact = exact + reach * (p_V * (logp_TV[-1] - log_q_V - gamma * reward_V)).sum()
    exact.backward()
    reference = [p.grad for p in student.parameters()]
    assert max(g.abs().max() for g in reference) > 1e-2
    for mine, right in zip(estimator, reference, strict=True):
        assert torch.allclose(mine, right, rtol=1e-9, atol=1e-12)


def test_ratio_form_starts_at_the_plain_gradient_and_then_clips():
    model, ids_BT = tiny_model("qwen3"), torch.tensor([[3, 5, 7, 9]])
    mask_BT = torch.tensor([[False, True, True, True]])
    A_BT, w_BT = torch.tensor([[0, 1.0, -2.0, 0.5]]), torch.tensor([[0, 0.5, 0.25, 0.25]])
    scores = train.Scores(ids_BT.shape, keep_BT=mask_BT)

    def gradient(behaviour_BT, *flags):
        run = bare_run(model, *flags, vocab_size=61)
        batch = rollout.Rollout(ids_BT, mask_BT, behaviour_BT, None, None, None)
        logp_BT = run.student(ids_BT, mask_BT).detach().requires_grad_()
        run.student = lambda *_, **__: logp_BT
        train.loss_of(run, batch, scores, A_BT, w_BT, ALL).backward()
        return logp_BT.detach(), logp_BT.grad

    logp_BT, plain_BT = gradient(None)
    assert torch.allclose(plain_BT, -w_BT * A_BT)
    two = "--updates-per-rollout", "2"
    assert torch.allclose(gradient(logp_BT, *two)[1], plain_BT)
    # moved past the bounds in the direction of the advantage: no gradient; the other way: gradient
    behaviour_BT = logp_BT - torch.tensor([[0, 0.3, -0.3, -0.3]])
    clipped_BT = gradient(behaviour_BT, *two, "--clip-low", "0.2", "--clip-high", "0.28")[1]
    assert clipped_BT[0, 1] == 0 and clipped_BT[0, 2] == 0 and clipped_BT[0, 3] != 0
    inside_BT = gradient(behaviour_BT, *two, "--clip-low", "0.9", "--clip-high", "9")[1]
    assert (inside_BT[0, 1:] != 0).all()


def test_student_equal_to_teacher_learns_nothing():
    """PEERS' cheapest sanity check: advantage, loss and gradient are 0 (float32 noise)."""
    world = toy.world("clean")
    run = make_run(*SHORT, "--difficulty", "4", student=world.student, teacher=world.student)
    batch = sample(run, 0)
    advantage = score(run, batch).logp_BT - batch.logp_BT
    assert advantage[batch.response_mask_BT].abs().max() < 1e-4
    line = train.train_step(run, 0)
    assert abs(line["loss"]) < 1e-5 and abs(line["reverse_kl"]) < 1e-5 and line["grad_norm"] < 1e-3
    other = make_run(*SHORT, "--difficulty", "4", student=world.student, teacher=world.teacher)
    line = train.train_step(other, 0)
    assert line["reverse_kl"] > 0.01 and line["grad_norm"] > 0.01, "the check can fail"


def test_clamped_advantages_and_warm_up():
    """A clamp of 1e-6 nats leaves next to no loss; the first of 4 warm-up updates has lr / 4."""
    run = make_run(*TOY, *SHORT, "--advantage-clip", "1e-6", "--warmup-steps", "4", "--lr", "8e-4")
    assert math.isclose(run.optimizer.param_groups[0]["lr"], 2e-4)
    line = train.train_step(run, 0)
    assert abs(line["loss"]) < 1e-5 and line["reverse_kl"] > 0.01
    assert math.isclose(run.optimizer.param_groups[0]["lr"], 4e-4)


@pytest.mark.parametrize("rescale", ["batch", "sequence", "none"])
def test_the_mean_over_responses_of_their_means(rescale):
    """--loss-mean response: every response weighs the same, whatever its length (LGR's authors)."""
    run = make_run(*TOY, *SHORT, "--loss-mean", "response", "--rescale", rescale)
    batch = sample(run, 0)
    scores = score(run, batch)
    lengths = batch.response_mask_BT.sum(dim=1).tolist()
    kept = [n // 2 + row for row, n in enumerate(lengths)]
    scores.keep_BT = masks.first_tokens(torch.tensor(kept), batch.response_mask_BT)
    A_BT, w_BT = train.weigh(run, batch, scores, 0)
    shares = [k / n for k, n in zip(kept, lengths, strict=True)]
    for row, (k, n) in enumerate(zip(kept, lengths, strict=True)):
        wanted = {"batch": 1 / (n * sum(shares)), "sequence": 1 / (k * len(kept)),
                  "none": 1 / (n * len(kept))}[rescale]  # fmt: skip
        used_T = w_BT[row] > 0
        assert int(used_T.sum()) == k and (w_BT[row, used_T] / wanted - 1).abs().max() < 1e-5
    assert abs(w_BT.sum().item() - (sum(shares) / len(kept) if rescale == "none" else 1)) < 1e-5


def test_reward_and_kl_take_turns():
    """--lgr-alternate 2: two steps of log p_T - log p_S alone, then two of the reward alone."""
    run = make_run("--toy", "fork", *SHORT, "--method", "lgr", "--lgr-gamma", "3")
    batch = sample(run, 0)
    scores = score(run, batch)
    gap_BT = (scores.logp_BT - batch.logp_BT) * batch.response_mask_BT
    reward_BT = lgr.sampled_reward(scores.reward_BTK, batch.topk_ids_BTK[..., :8], batch.ids_BT)
    assert gap_BT.any() and reward_BT.any()
    for alternate, kinds in enumerate(("bbbbbbbbb", "krkrkrkrk", "kkrrkkrrk", "kkkrrrkkk")):
        run.args.lgr_alternate = alternate
        for step, kind in enumerate(kinds):
            A_BT, _ = train.weigh(run, batch, scores, step)
            wanted_BT = gap_BT * (kind in "bk") + 3 * reward_BT * (kind in "br")
            torch.testing.assert_close(A_BT, wanted_BT, rtol=1e-5, atol=1e-6)
            bonus = harness.log.batch_sums(batch, scores, run.args)["bonus"]  # what the log says
            total = 3 * reward_BT[scores.trigger_BT].sum().item() * (kind in "br")
            assert math.isclose(bonus, total, rel_tol=1e-4, abs_tol=1e-3)


def teacher_logprobs(run, batch, row):
    """[T, V] by a plain forward of one unpadded row; entry t describes token t, entry 0 is 0."""
    used = int(batch.response_mask_BT[row].nonzero().max()) + 1
    with torch.no_grad():
        logits_TV = run.teacher(batch.ids_BT[row : row + 1, :used]).logits[0, :, : run.vocab_size]
    return torch.log_softmax(logits_TV, -1).roll(1, dims=0).index_fill(0, torch.tensor([0]), 0.0)


def test_a_teacher_of_its_own_type_reads_in_it():
    """--teacher-dtype: log-probs of a bfloat16 teacher beside a float32 student."""
    run = make_run(*TOY, *SHORT, "--method", "opd", "--teacher-dtype", "bfloat16")
    assert {run.teacher.dtype, run.model.dtype} == {torch.bfloat16, torch.float32}
    batch = sample(run)
    scores = score(run, batch)
    logp_BTV = run.teacher(input_ids=batch.ids_BT).logits.float().log_softmax(-1)
    plain_BT = logp_BTV[:, :-1].gather(2, batch.ids_BT[:, 1:, None])[..., 0]
    mask_BT = batch.response_mask_BT[:, 1:]
    difference_N = (scores.logp_BT[:, 1:] - plain_BT)[mask_BT]
    assert difference_N.abs().mean() < 0.02 and plain_BT[mask_BT].abs().mean() > 0.05


def test_teacher_scores_equal_a_plain_forward():
    run = make_run("--toy", "fork", *SHORT, "--method", "lgr_topk", "--union-top-k", "3",
                   "--lgr-top-k", "2", "--micro-batch", "2")
    batch = sample(run, 0)
    grades = score(run, batch)
    assert grades.union_BTU.shape[2] == 6 and batch.topk_ids_BTK.shape[2] == 3
    for row in range(5):
        here_T = batch.response_mask_BT[row].nonzero()[:, 0]
        logp_NV = teacher_logprobs(run, batch, row)[here_T]
        at_ids = logp_NV.gather(1, batch.ids_BT[row, here_T, None])[:, 0]
        assert torch.allclose(grades.logp_BT[row, here_T], at_ids, atol=1e-4)
        assert torch.allclose(grades.max_prob_BT[row, here_T], logp_NV.amax(1).exp(), atol=1e-5)
        union = grades.union_BTU[row, here_T]
        assert torch.equal(union[:, :3], batch.topk_ids_BTK[row, here_T])
        at_union = logp_NV.gather(1, union)
        assert torch.allclose(grades.union_logp_BTU[row, here_T], at_union, atol=1e-4)
        assert torch.allclose(at_union[:, 3:], logp_NV.topk(3).values, atol=1e-4)


@pytest.mark.parametrize("method", ["lgr", "release+lgr"])
def test_lookahead_happens_where_the_student_hesitates_and_supervision_is_kept(method):
    run = make_run("--toy", "fork", "--prompts-per-step", "12", "--method", method,
                   "--micro-batch", "5", "--lgr-tau", "0.3", "--lgr-nodes", "50")
    batch = sample(run, 0)
    scores = score(run, batch)
    keep_BT = scores.keep_BT
    assert torch.equal(scores.trigger_BT, (batch.entropy_BT > 0.3) & keep_BT)
    if method == "release+lgr":
        horizon = make_run("--toy", "horizon", "--prompts-per-step", "12", "--method", method)
        beyond = sample(horizon, 0)
        cut = score(horizon, beyond)
        assert (cut.keep_BT.sum(1) < beyond.response_mask_BT.sum(1)).all()
        wanted_BT = (beyond.entropy_BT > 0.2) & cut.keep_BT
        assert torch.equal(cut.trigger_BT, wanted_BT)
        assert not cut.reward_BTK[~cut.keep_BT].any()
    group_BTK = batch.topk_ids_BTK[..., :8]
    reward_BT = lgr.sampled_reward(scores.reward_BTK, group_BTK, batch.ids_BT)
    assert scores.trigger_BT.any() and reward_BT.any()
    assert not scores.reward_BTK[~scores.trigger_BT].any()
    seen = 0
    for row, t in scores.trigger_BT.nonzero().tolist()[::7]:
        group = batch.topk_ids_BTK[row, t, :8].tolist()
        confidence = []
        for token in group:
            path = torch.cat([batch.ids_BT[row, :t], torch.tensor([token])])[None]
            with torch.no_grad():
                confidence.append(run.teacher(path).logits[0, -1].softmax(-1).max())
        confidence = torch.stack(confidence).double()
        spread = confidence.std()
        assert abs(scores.spread_BT[row, t] - spread) < 1e-5
        token = int(batch.ids_BT[row, t])
        if token in group and spread > 1e-2:  # below that rounding decides
            reward = (confidence[group.index(token)] - confidence.mean()) / (spread + 1e-6)
            assert abs(reward_BT[row, t] - reward) < 1e-3
            seen += 1
    assert seen >= 3


def test_lookahead_flags_and_the_trunk_reach_their_place(monkeypatch):
    """The leaves are scored off the pass that scored the rollout: one trunk per micro-batch."""
    looked = spy(monkeypatch, lgr, "lookahead_confidence")
    rewarded = spy(monkeypatch, lgr, "group_reward")
    run = make_run("--toy", "fork", *SHORT, "--method", "lgr", "--micro-batch", "2",
                   "--lgr-signal", "entropy", "--lgr-nodes", "30", "--lgr-normalize", "mean",
                   "--lgr-eps", "0.5")
    looked.clear()
    run.vocab_size = 150
    batch = sample(run, 0)
    trunks, leaves = [], []

    def note(module, args, named):
        (leaves if "past_key_values" in named else trunks).append(named)

    hook = run.teacher.base_model.register_forward_pre_hook(note, with_kwargs=True)
    score(run, batch)
    hook.remove()
    assert len(trunks) == len(looked) == len(rewarded) == 3
    assert leaves and max(named["input_ids"].numel() for named in leaves) <= 30
    for named, _ in looked:
        assert (named["signal"], named["vocab_size"]) == ("entropy", 150)
    for named, _ in rewarded:
        assert named == {"normalize": "mean", "eps": 0.5}


def test_what_a_step_logs_about_lookahead(monkeypatch):
    """Recomputed from the tensors of the step, token by token."""
    batches, scored = spy(monkeypatch, train, "sample"), spy(monkeypatch, train, "score")
    run = make_run("--toy", "fork", "--prompts-per-step", "24", "--method", "lgr",
                   "--lgr-gamma", "0.5", "--lgr-top-k", "3")
    line = train.train_step(run, 0)
    (batch, _), scores = batches[0][1], scored[0][1]
    reward_BT = lgr.sampled_reward(scores.reward_BTK, batch.topk_ids_BTK, batch.ids_BT)
    fidelity, triggered, outside, bonus, spread = [[], [], [], []], 0, 0, [], []
    for row, mask_T in enumerate(batch.response_mask_BT):
        here = mask_T.nonzero()[:, 0].tolist()
        with torch.no_grad():
            used = batch.ids_BT[row : row + 1, : here[-1] + 1]
            best_T = run.teacher(used).logits[0].softmax(-1).amax(-1)
        for place, t in enumerate(here):
            fidelity[4 * place // len(here)].append(best_T[t - 1].item())
            if batch.entropy_BT[row, t] > 0.2:
                triggered += 1
                outside += int(batch.ids_BT[row, t]) not in batch.topk_ids_BTK[row, t].tolist()
                bonus.append(0.5 * reward_BT[row, t].item())
                spread.append(scores.spread_BT[row, t].item())
    assert outside > 0 and line["outside_group"] == outside / triggered
    assert line["triggered"] == triggered / int(batch.response_mask_BT.sum())
    assert math.isclose(line["bonus"], sum(bonus) / triggered, rel_tol=1e-4)
    assert math.isclose(line["group_std"], sum(spread) / triggered, rel_tol=1e-4)
    flat = sum(deviation < 1e-3 for deviation in spread) / triggered
    assert 0 < flat < 1 and math.isclose(line["flat_groups"], flat)
    means = torch.tensor([sum(quarter) / len(quarter) for quarter in fidelity])
    assert torch.allclose(torch.tensor(line["fidelity"]), means, atol=1e-5)
    assert (means[0] - means[1]).abs() > 1e-3, "the quarters must differ for this to be a test"


def test_a_teacher_that_fails_the_self_check_is_refused(monkeypatch):
    def fail(model):
        raise ValueError("differs")

    monkeypatch.setattr(lgr, "self_check", fail)
    make_run(*TOY, *SHORT, "--method", "release")
    with pytest.raises(ValueError, match="differs"):
        make_run(*TOY, *SHORT, "--method", "lgr")


def test_the_wording_is_reported_for_the_worlds_own_problems_only():
    run = make_run("--toy", "fork", *SHORT)
    assert 0 < evaluate.on_held_out(run, 0)["uncertain_wording"] < 1
    run.args.eval_problems = "mine.jsonl"
    assert "uncertain_wording" not in evaluate.on_held_out(run, 0)


def test_the_bonus_reaches_the_advantage_once_and_the_clip_does_not_touch_it():
    """With gamma 0 a step of lgr is a step of opd; the loss is linear in gamma."""
    losses = {}
    for method, gamma in (("opd", 0), ("lgr", 0), ("lgr", 1), ("lgr", 3)):
        run = make_run("--toy", "fork", *SHORT, "--method", method, "--lgr-gamma", str(gamma),
                       "--advantage-clip", "0.01")
        losses[method, gamma] = train.train_step(run, 0)["loss"]
    assert math.isclose(losses["opd", 0], losses["lgr", 0], rel_tol=1e-5)
    slope = losses["lgr", 1] - losses["lgr", 0]
    assert abs(slope) > 1e-3
    assert math.isclose(losses["lgr", 3] - losses["lgr", 0], 3 * slope, rel_tol=1e-3)


@pytest.mark.parametrize("mask", ["none", "release"])
def test_topk_update_equals_the_objective_written_out(mask):
    """Loss and gradient of one update against full logits, a dense union and autograd."""
    run = make_run("--toy", "fork", *SHORT, "--method", "lgr_topk", "--mask", mask, "--lr", "1e-9",
                   "--union-top-k", "5", "--lgr-top-k", "4", "--lgr-gamma", "0.6",
                   "--clip-grad", "0", "--micro-batch", "2", "--min-segments", "1")
    batch = sample(run, 0)
    scores = score(run, batch)
    keep_BT, gamma = scores.keep_BT, 0.6
    scores.gamma = gamma
    if mask == "release":  # cut one by hand, whatever the rule thinks of so short a text
        keep_BT[1, int(keep_BT[1].nonzero().min()) + 9 :] = False
        scores.reward_BTK[~keep_BT] = 0.0
    weight_BT = keep_BT / keep_BT.sum()
    loss, norm, _ = train.update(run, batch, scores, weight_BT, weight_BT)
    mine = [p.grad.clone() for p in run.model.parameters()]

    run.model.zero_grad()
    total = 0.0
    for row in range(5):
        used = int(batch.response_mask_BT[row].nonzero().max()) + 1
        student_TV = run.model(batch.ids_BT[row : row + 1, :used]).logits[0, :, : run.vocab_size]
        teacher_TV = teacher_logprobs(run, batch, row)
        for t in keep_BT[row].nonzero()[:, 0].tolist():
            own = batch.topk_ids_BTK[row, t].tolist()
            union = sorted(set(own) | set(teacher_TV[t].topk(5).indices.tolist()))
            log_s = student_TV[t - 1, union].log_softmax(-1)
            log_t = teacher_TV[t, union].log_softmax(-1)
            reward = torch.zeros(len(union))
            if scores.trigger_BT[row, t]:
                for place, token in enumerate(own[:4]):
                    reward[union.index(token)] = scores.reward_BTK[row, t, place]
            total = total + (log_s.exp() * (log_s - log_t - gamma * reward)).sum()
    (total / keep_BT.sum()).backward()
    assert math.isclose(loss, total.item() / int(keep_BT.sum()), rel_tol=1e-4, abs_tol=1e-6)
    for a, p in zip(mine, run.model.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-3, atol=1e-5 * norm)


@pytest.mark.parametrize("updates", [1, 2])
def test_update_cuts_off_what_was_released_and_changes_nothing(updates):
    """Cut columns, left-out rows and micro-batches give the gradient of one full forward."""
    run = make_run(*TOY, *SHORT, "--micro-batch", "2", "--updates-per-rollout", str(updates),
                   "--clip-grad", "0", "--lr", "1e-9")
    batch = sample(run, 0)
    B, T = batch.ids_BT.shape
    advantage = torch.randn(B, T, generator=torch.Generator().manual_seed(0))
    keep = batch.response_mask_BT.clone()
    keep[0] = False
    for row in range(1, B):
        keep[row, int(keep[row].nonzero().min()) + 7 * row :] = False
    weight = train.token_weights(
        batch.response_mask_BT.float(), keep.float(), "batch", 100, float(keep.sum())
    )
    scores = train.Scores(keep.shape, keep_BT=keep)
    loss, norm, _ = train.update(run, batch, scores, advantage, weight)
    cut = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    logp = run.student(batch.ids_BT, batch.response_mask_BT)
    factor = (logp - batch.logp_BT).exp() if updates > 1 else logp  # within the clip's bounds
    full = -(weight * advantage * factor).sum()
    full.backward()
    assert abs(loss - full.item()) < 1e-5
    for mine, right in zip(cut, run.model.parameters(), strict=True):
        assert torch.allclose(mine, right.grad, rtol=1e-3, atol=1e-5 * float(norm))


def test_release_mask_follows_the_margin():
    """A hand-made teacher: sure up to the third sentence, undecided after it."""
    run = make_run(*TOY, *SHORT)
    tokenizer, text = run.tokenizer, toy.dial_response(toy.problems(1, moves=8)[0])
    ids_T = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    T, prompt = len(ids_T), 5
    batch = rollout.Rollout(
        ids_BT=torch.cat([torch.zeros(prompt, dtype=torch.int64), ids_T])[None],
        response_mask_BT=(torch.arange(prompt + T) >= prompt)[None],
        logp_BT=torch.zeros(1, prompt + T), entropy_BT=torch.ones(1, prompt + T),
        topk_ids_BTK=torch.zeros(1, prompt + T, 4), truncated_B=torch.zeros(1, dtype=torch.bool),
    )
    third = [i for i, piece in enumerate(ids_T.tolist()) if tokenizer.decode([piece]) == "."][2] + 1
    candidates = torch.zeros(1, prompt + T, 4)
    candidates[:, : prompt + third, 0] = 5.0

    segments = [teachability.token_segments(tokenizer, ids_T, run.splitter)]

    def supervise(candidates):
        seen = {"response_mask_BT": batch.response_mask_BT, "candidate_logp_BTK": candidates,
                "segments": segments, "entropy_BT": batch.entropy_BT}
        return masks.apply(run.args.mask, seen | vars(run.args))

    choice = supervise(candidates)
    assert choice.released_B.tolist() == [True] and choice.gain_B[0] > 6
    assert choice.keep_BT[0].nonzero()[:, 0].tolist() == list(range(prompt, prompt + third))
    # the rule's flags reach it
    run.args.margin = "prob"  # uniform candidates at log-prob 5 and 0: another scale
    other = supervise(candidates - 5)
    assert other.released_B[0] and abs(other.gain_B[0] - choice.gain_B[0]) > 1e-6
    run.args.margin, run.args.margin_min_entropy = "logprob", 2.0  # no token counts: entropy is 1
    assert not supervise(candidates).released_B[0]
    run.args.margin_min_entropy, run.args.min_segments = 0.0, 4
    later = supervise(candidates)
    assert not later.released_B[0] or later.keep_BT.sum() > choice.keep_BT.sum()
    run.args.min_segments, run.args.bic_eps = 2, 1e9  # every fit looks perfect
    assert not supervise(candidates).released_B[0]
    run.args.mask = "none"
    everything = supervise(None)
    assert torch.equal(everything.keep_BT, batch.response_mask_BT)


@pytest.mark.parametrize("world", ["horizon", "clean"])
def test_the_rule_finds_the_toy_teachers_horizon(world):
    """60 student rollouts of 12 moves.  Behind a teacher that is lost after move 6 nearly all are
    released right there (7 sentences in), with a gain above 6; behind one that is never lost the
    rule still fires on some (it takes any gain above 0), but late and with small gains."""
    run = make_run("--toy", world, "--prompts-per-step", "60")
    batch = sample(run, 0)
    choice = score(run, batch)
    significant = (choice.gain_B > 6).float().mean()
    kept = choice.keep_BT.sum() / batch.response_mask_BT.sum()
    if world == "clean":
        assert significant < 0.1 and kept > 0.8
        return
    assert significant > 0.8
    at_six = 0
    for row in range(60):
        text = run.tokenizer.decode(batch.ids_BT[row][choice.keep_BT[row]])
        at_six += "Move 6" in text and "Move 7" not in text
    assert at_six > 50 and 0.4 < kept < 0.6


# ------------------------------------------------------------------------------- several processes
def crafted():
    """Four rows with 9, 2, 0 and 0 kept tokens: the second of two processes keeps nothing."""
    g = torch.Generator().manual_seed(3)
    B, T = 4, 12
    ids = torch.randint(61, (B, T), generator=g)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, 2:] = True
    keep = torch.zeros(B, T, dtype=torch.bool)
    keep[0, 2:11], keep[1, 2:4] = True, True
    batch = rollout.Rollout(ids, mask, -torch.rand(B, T, generator=g), None, None, None)
    return batch, torch.randn(B, T, generator=g), keep


def one_update(rank, world, folder):
    """Two optimizer steps on this process's share of the crafted batch; rank 0 saves what came."""
    if world > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    torch.set_num_threads(1)
    flags = ["--micro-batch", "1", "--updates-per-rollout", "2", "--lr", "0.1"]
    run = bare_run(tiny_model("qwen3"), *flags, vocab_size=61, rank=rank, world=world)
    batch, advantage, keep = crafted()
    mask = batch.response_mask_BT.float()
    weight = train.token_weights(mask, keep.float(), "batch", 40, 11)
    mine = slice(2 * rank, 2 * rank + 2) if world > 1 else slice(0, 4)
    batch = rollout.Rollout(batch.ids_BT[mine], batch.response_mask_BT[mine], batch.logp_BT[mine],
                            None, None, None)
    scores = train.Scores(keep[mine].shape, keep_BT=keep[mine])
    numbers = [train.update(run, batch, scores, advantage[mine], weight[mine]) for _ in range(2)]
    if rank == 0:
        weights = [p.detach() for p in run.student.parameters()]
        torch.save((numbers, weights), folder / f"{world}.pt")
    if world > 1:
        dist.barrier()  # destroying the group locks up, once in 30 times (gloo's destructors)


def test_two_processes_equal_one_with_uneven_counts(tmp_path):
    """Kept tokens 11 and 0: a mean of per-process means would be off by a factor of two, and a
    process that skips backward would hang the other."""
    one_update(0, 1, tmp_path)
    mp.start_processes(one_update, args=(2, tmp_path), nprocs=2, start_method="forkserver")
    (one, weights), (two, others) = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert torch.allclose(torch.tensor(one), torch.tensor(two), rtol=1e-5)
    assert abs(one[0][0] - one[1][0]) > 1e-3, "the first update must change the second loss"
    for a, b in zip(weights, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["release", "lgr_topk", "release+lgr", "random", "rkl"])
def test_two_processes_repeat_one_process(method, tmp_path):
    """Prompts, draws, masks, rewards, counts: the whole command, 5 rollouts dealt 2 and 3. One
    method by torchrun, the others in two processes without the seconds that importing takes."""
    # eps well above rounding, which decides the rewards in groups of equal confidences
    fork = ["--toy", "fork", "--difficulty", "4", "--lgr-eps", "1e-3"]
    flags = [*(fork if "lgr" in method else TOY), *SHORT, "--method", method]
    train.main([*flags, "--out", str(tmp_path / "one")])
    if method == "release":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", ROOT / "train.py"]  # fmt: skip
        run_command(*torchrun, *flags, "--out", "two", cwd=tmp_path)
    else:
        ranks = forked.start_ranks([*flags, "--out", "two"], tmp_path)
        assert [one.returncode for one in forked.finish_all(ranks)] == [0, 0]
    (one, one_eval), (two, two_eval) = (read_log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a["kept_tokens"] == b["kept_tokens"] and a["fired"] == b["fired"]
        keys = "loss reverse_kl entropy grad_norm response_tokens kept repeated_4grams".split()
        keys += ["sentences"] * ("sentences" in a)
        assert ("sentences" in a) == ("sentences" in b) == train.needs(parse(flags)).sentences
        if "lgr" in method:
            keys += ["triggered", "group_std", "bonus", "outside_group"]
            assert a["triggered"] > 0 and a["group_std"] > 0 and a["seconds"]["lookahead"] > 0
        assert torch.allclose(torch.tensor(a["fidelity"]), torch.tensor(b["fidelity"]), atol=1e-4)
        for key in keys:
            assert math.isclose(a[key], b[key], rel_tol=1e-3, abs_tol=1e-5), key
    for a, b in zip(one_eval, two_eval, strict=True):
        assert a["accuracy"] == b["accuracy"] and a["problems"] == b["problems"] == 4
        assert a["ood"] == b["ood"] and a["ood"]["problems"] == 4
        assert a.get("uncertain_wording") == b.get("uncertain_wording")
        assert ("uncertain_wording" in a) == ("lgr" in method)  # the fork world has it


@pytest.mark.parametrize("least, few", [(2, False), (4, False), (5, True)])
def test_sentences_are_counted_and_too_few_are_said_once(least, few, capsys):
    """Responses of six moves have 8 sentences, 2 x 4."""
    run = make_run(*TOY, *SHORT, "--method", "release", "--min-segments", least)
    punkt, batch = teachability.sentence_splitter("untrained")[0], sample(run)
    rows = zip(batch.ids_BT, batch.response_mask_BT, strict=True)
    rows = [ids_T[mask_T] for ids_T, mask_T in rows]
    texts = run.tokenizer.batch_decode(rows, skip_special_tokens=True)
    counts = [len(list(punkt.span_tokenize(text))) for text in texts]
    assert few == (sum(count < 2 * least for count in counts) > len(counts) / 2), counts
    capsys.readouterr()
    line, other = (train.train_step(run, step) for step in (0, 1))
    assert line["sentences"] == sum(counts) / len(counts) and other["sentences"] > 0
    said = [x for x in capsys.readouterr().err.splitlines() if "--splitter" in x]
    assert len(said) == few and (not few or said[0].startswith("train.py: step 1: most responses"))


def test_most_responses_is_more_than_half_of_those_of_all_processes(capsys):
    """By the sums: process 0 alone would have warned, or not."""
    for short, rollouts, warns in ((3, 6, False), (4, 6, True), (0, 6, False)):
        run = make_run(*TOY, *SHORT, "--method", "release")
        batch = sample(run)
        scores = score(run, batch)
        names = list(log.batch_sums(batch, scores, run.args, run.segments))
        run.sum = lambda values, names=names, totals={"short": short, "rollouts": rollouts}: [
            totals.get(name, value) for name, value in zip(names, values, strict=True)
        ]
        run.log_line(0, 0.0, 0.0, 0, batch, scores)
        assert ("--splitter" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("method", ["release", "rkl"])
def test_without_fast_a_run_is_the_same_up_to_rounding(method, tmp_path):
    """The whole command by the plain decode step and the plain head."""
    for fast in ("on", "off"):
        out = str(tmp_path / fast)
        train.main([*TOY, *SHORT, "--method", method, "--fast", fast, "--out", out])
    (on, on_eval), (off, off_eval) = (read_log(tmp_path / fast) for fast in ("on", "off"))
    for a, b in zip(on, off, strict=True):
        assert a["kept_tokens"] == b["kept_tokens"]
        for key in "loss reverse_kl entropy grad_norm response_tokens".split():
            assert math.isclose(a[key], b[key], rel_tol=1e-3, abs_tol=1e-5), key
    assert [x["accuracy"] for x in on_eval] == [x["accuracy"] for x in off_eval]


def test_lookahead_lifts_the_fork_and_sinks_its_mirror(tmp_path):
    """Ten steps, whole commands.  Nothing local tells the two wordings apart, so plain OPD keeps
    both; LGR takes the one after which the teacher is sure: right in one world, wrong in the
    other.  (Seeds, intervals and 30 steps: README.)"""
    last = {}
    for world in ("fork", "fork-mirror"):
        for method in ("opd", "lgr"):
            out = tmp_path / f"{world}-{method}"
            train.main(["--toy", world, "--method", method, "--steps", "10", "--out", str(out),
                        "--eval-every", "0", "--eval-count", "100", "--eval-samples", "2"])
            last[world, method] = read_log(out)[1][-1]
    for world in ("fork", "fork-mirror"):
        assert last[world, "opd"]["uncertain_wording"] > 0.4
        assert last[world, "lgr"]["uncertain_wording"] < 0.35
    assert last["fork", "lgr"]["accuracy"] > last["fork", "opd"]["accuracy"] + 0.1
    assert last["fork-mirror", "lgr"]["accuracy"] < last["fork-mirror", "opd"]["accuracy"] - 0.03


# ------------------------------------------------------------------------------------- the command
def test_a_run_of_the_users_own(tmp_path, monkeypatch, capsys):
    """Local folders whose heads are padded differently, a JSONL, a student without template."""
    student = write_model(tmp_path / "student", seed=1, chat_template=False)
    teacher = write_model(tmp_path / "teacher", seed=2, vocab_size=300)
    problems = tmp_path / "mine.jsonl"
    lines = [{"problem": f"What is {i} + 1? Think."} for i in range(7)]
    problems.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    monkeypatch.chdir(tmp_path)
    command = ["--student", str(student), "--teacher", str(teacher)]
    command += ["--problems", str(problems), "--prompts-per-step", "3", "--steps", "2"]
    command += ["--max-new-tokens", "30", "--gradient-checkpointing", "--updates-per-rollout", "2"]
    command += ["--rescale", "sequence"]
    train.main(command)
    folder = tmp_path / "runs" / "release-seed0"
    training, evaluations = read_log(folder)
    assert len(training) == 2 and evaluations == []
    keys = ("step loss reverse_kl entropy response_tokens truncated kept fired release_at bic_gain "
            "grad_norm seconds tokens_per_second").split()
    assert set(keys) <= set(training[0]) and set(training[0]["seconds"]) >= {"sample", "update"}
    config = json.loads((folder / "config.json").read_text())
    assert config["vocabulary"] == 259 and config["flags"]["rescale"] == "sequence"
    assert config["sentence_splitter"]
    before = AutoModelForCausalLM.from_pretrained(student)
    after = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert AutoTokenizer.from_pretrained(folder / "student").eos_token == "<|end|>"
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)

    # a second run moves the first one aside, whole
    with pytest.raises(SystemExit):  # no answers in it
        train.main([*command, "--eval-problems", str(problems)])
    train.main([*command, "--steps", "1"])
    assert len(read_log(folder)[0]) == 1
    assert len(read_log(folder.with_name("release-seed0.1"))[0]) == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders and problem files for the refusals."""
    place = tmp_path_factory.mktemp("folders")
    write_model(place / "model")
    write_model(place / "other", tokenizer_seed=7)
    write_model(place / "short", max_position_embeddings=40)
    (place / "good.jsonl").write_text('{"problem": "How many?", "answer": "3"}\n')
    (place / "bad.jsonl").write_text('{"problem": "How many?", "answer": "3"}\n{"problem": \n')
    (place / "empty.jsonl").write_text("\n")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("do not touch")
    return place


BASE = "--student model --teacher model --problems good.jsonl --max-new-tokens 20 --out new"


@pytest.mark.parametrize(
    "flags, culprit",
    [
        ("--problems nowhere.jsonl", "nowhere.jsonl"),
        ("--problems bad.jsonl", "bad.jsonl:2"),
        ("--problems empty.jsonl", "empty.jsonl"),
        ("--eval-problems nowhere.jsonl", "nowhere.jsonl"),
        ("--student nowhere/at/all", "nowhere/at/all"),
        ("--teacher other", "--teacher has another tokenizer than --student"),
        ("--method magic", "magic"),
        ("--margin cosine", "cosine"),
        ("--frobnicate 3", "--frobnicate"),
        ("--steps 0", "--steps: must be at least 1, not 0"),
        ("--steps many", "many"),
        ("--micro-batch -1", "--micro-batch: must be at least 0, not -1"),
        ("--tokens-per-micro-batch 0.5", "--tokens-per-micro-batch"),
        ("--sentence-workers 1", "--sentence-workers"),
        ("--fast maybe", "maybe"),
        ("--preset magic", "magic"),
        ("--temperature 0", "--temperature"),
        ("--lr nan", "--lr"),
        ("--margin-top-k 260", "--margin-top-k 260 exceeds the vocabulary of 259"),
        ("--margin-top-k 1", "--margin-top-k: must be at least 2, not 1"),
        ("--max-new-tokens 600", "600"),
        ("--method lgr --lgr-top-k 260", "--lgr-top-k 260 exceeds the vocabulary of 259"),
        ("--lgr-top-k 1", "--lgr-top-k: must be at least 2, not 1"),
        ("--method lgr_topk --union-top-k 260", "--union-top-k 260 exceeds the vocabulary of 259"),
        ("--method lgr_topk --lgr-top-k 9 --union-top-k 8", "--lgr-top-k 9 exceeds --union-top"),
        ("--lgr-signal loudness", "loudness"),
        ("--lgr-normalize max", "max"),
        ("--lgr-gamma -1", "--lgr-gamma"),
        ("--lgr-eps nan", "--lgr-eps"),
        ("--lgr-nodes 0", "--lgr-nodes: must be at least 1, not 0"),
        ("--lookahead maybe", "maybe"),
        ("--objective ppo", "ppo"),
        ("--method rkl --lookahead on", "--objective rkl has no place for the reward"),
        ("--method jsd --jsd-beta 1", "--jsd-beta"),
        ("--method opd --prefix-tokens 9", "--prefix-tokens 9 needs --mask prefix"),
        ("--method prefix --prefix-tokens 1.5", "--prefix-tokens"),
        ("--method random --budget own", "--budget own needs --mask std, not random"),
        ("--method shuffled --margin-top-k 260", "--margin-top-k 260 exceeds the vocabulary"),
        ("--ood-problems nowhere.jsonl", "--ood-problems nowhere.jsonl needs --eval-problems"),
        ("--eval-problems good.jsonl --ood-problems nowhere.jsonl", "nowhere.jsonl"),
        ("--eval-problems good.jsonl --ood-problems bad.jsonl", "bad.jsonl:2"),
        ("--student short --max-new-tokens 35", "good.jsonl:1"),
        ("--out full", "full"),
        ("--out good.jsonl", "good.jsonl"),
        ("--out /proc/nothing", "/proc/nothing"),
        ("--out good.jsonl/deeper", "good.jsonl/deeper"),
    ],
)
def test_bad_input_is_one_line_that_names_the_culprit(folders, flags, culprit, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    with pytest.raises(SystemExit) as left:
        train.main([*BASE.split(), *flags.split()])
    message = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2
    assert len(message) == 1 and culprit in message[0] and message[0].startswith("train.py: error:")
    assert not (folders / "new").exists() and (folders / "full" / "thesis.txt").exists()


# ------------------------------------------------------------------------------------ small pieces
def test_batches_walk_through_every_problem_once_per_epoch():
    steps = [harness.batch_order(10, step * 4, 4, seed=5) for step in range(5)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert harness.batch_order(3, 0, 8, seed=0) == sum(
        (harness.batch_order(3, 3 * e, 3, seed=0) for e in range(3)), []
    )[:8]


def test_row_generator_stands_where_one_process_would_be():
    whole = torch.rand(7, 5, dtype=torch.float64, generator=harness.row_generator(3, 1, 0, 5))
    part = torch.rand(4, 5, dtype=torch.float64, generator=harness.row_generator(3, 1, 3, 5))
    assert torch.equal(whole[3:], part)
    other = torch.rand(7, 5, dtype=torch.float64, generator=harness.row_generator(3, 2, 0, 5))
    assert not torch.equal(whole, other)


def test_shares_cover_all_rows_once():
    for count, world in ((5, 2), (7, 3), (3, 3), (24, 5)):
        shares = [list(harness.my_share(count, rank, world)) for rank in range(world)]
        assert sum(shares, []) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_vocabularies_that_share_their_beginning_are_cut(folders):
    model = AutoTokenizer.from_pretrained(folders / "model")
    more = AutoTokenizer.from_pretrained(folders / "model")
    more.add_tokens(["<think>", "</think>"])
    assert harness.common_vocabulary(model, more) == harness.common_vocabulary(more, model) == 259
    with pytest.raises(ValueError, match="256 of 259 ids differ, the first is 3"):
        harness.common_vocabulary(model, AutoTokenizer.from_pretrained(folders / "other"))


def test_a_prompt_with_a_token_of_one_tokenizer_only_is_refused(folders, tmp_path):
    """The student's tokenizer knows one token more, and a problem uses it."""
    student = write_model(tmp_path / "student", vocab_size=260)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(student)
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"problem": "plain"}\n{"problem": "now <think> hard"}\n')
    flags = ["--problems", str(problems), "--max-new-tokens", "8"]
    flags += ["--student", str(student), "--teacher", str(folders / "model")]
    with pytest.raises(ValueError, match="p.jsonl:2: the prompt holds '<think>'"):
        make_run(*flags)


def test_a_world_sets_its_difficulty_and_that_the_length():
    for world, moves in (("horizon", 12), ("fork", 6), ("fork-mirror", 2)):
        args = parse(["--toy", world])
        assert (args.difficulty, args.max_new_tokens) == (moves, toy.response_limit(moves))
    assert parse(["--toy", "fork", "--difficulty", "3"]).difficulty == 3


@pytest.mark.parametrize("method", list(train.METHODS))
def test_flags_override_the_parts_of_a_preset(method):
    own = parse(["--method", method])
    assert (own.objective, own.mask, own.lookahead) == train.METHODS[method]
    flags = ["--objective", "topk", "--mask", "release", "--lookahead", "off"]
    args = parse(["--method", method, *flags])
    assert (args.objective, args.mask, args.lookahead) == ("topk", "release", "off")


def test_candidates_needed():
    """Sampling keeps no more of the student's top tokens than the later phases look at."""
    for flags, count in (("opd", 1), ("release", 4), ("lgr", 8), ("release+lgr", 8),
                         ("lgr_topk", 20), ("release --margin-top-k 3", 3), ("shuffled", 4),
                         ("prefix --prefix-tokens 9", 1), ("std --budget own", 1), ("jsd", 1)):
        needed = train.needs(parse(["--toy", "fork", "--method", *flags.split()])).candidates
        assert max(needed.values(), default=1) == count
    run = make_run("--toy", "fork", *SHORT, "--difficulty", "1", "--method", "release+lgr")
    assert sample(run, 0).topk_ids_BTK.shape[2] == 8


def test_config_without_git(monkeypatch):
    run = make_run(*TOY, *SHORT)
    monkeypatch.setenv("PATH", "")
    assert run.describe()["commit"] is None


def test_a_head_that_is_no_plain_matrix_is_refused():
    model = tiny_model("qwen3")
    harness.check_head("--student", model, [1, 2, 3])
    head = model.lm_head
    model.lm_head = torch.nn.Sequential(head, torch.nn.Tanh())
    model.get_output_embeddings = lambda: head
    with pytest.raises(ValueError, match="--student Qwen3ForCausalLM: its logits"):
        harness.check_head("--student", model, [1, 2, 3])


def test_repeated_ngrams_equal_a_set_of_tuples():
    generator = torch.Generator().manual_seed(0)
    for length, vocabulary in ((0, 5), (3, 5), (4, 5), (50, 2), (200, 3), (40, 150_000)):
        ids_T = torch.randint(vocabulary, (length,), generator=generator)
        grams = list(zip(*(ids_T.tolist()[i:] for i in range(4)), strict=False))
        assert log.repeated_ngrams(ids_T) == (len(grams) - len(set(grams)), len(grams))
    assert log.repeated_ngrams(torch.full((20,), 151_935)) == (16, 17)


def test_quarters_are_even_and_ordered():
    mask_BT = torch.zeros(6, 12, dtype=torch.bool)
    for row, length in enumerate((1, 2, 3, 4, 7, 10)):
        mask_BT[row, 2 : 2 + length] = True
    quarter_BT = log.quarters(mask_BT)
    for row, length in enumerate((1, 2, 3, 4, 7, 10)):
        inside = quarter_BT[row, 2 : 2 + length].tolist()
        assert inside == [4 * i // length for i in range(length)] == sorted(inside)
    assert (quarter_BT[~mask_BT] == 4).all()


def test_lookahead_refuses_a_teacher_with_a_short_sliding_window(
    folders, tmp_path, monkeypatch, capsys
):
    from transformers import MistralConfig, MistralForCausalLM

    shutil.copytree(folders / "model", tmp_path / "teacher")
    config = MistralConfig(vocab_size=259, hidden_size=32, intermediate_size=48, sliding_window=16,
                           num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    MistralForCausalLM(config).save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    command = ["--student", str(folders / "model"), "--teacher", str(tmp_path / "teacher"),
               "--problems", str(folders / "good.jsonl"), "--max-new-tokens", "20", "--steps", "1",
               "--prompts-per-step", "1"]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        train.main([*command, "--method", "lgr"])
    assert left.value.code == 2
    assert "sliding window of 16" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
    train.main([*command, "--method", "opd"])  # its own forward pass is no problem
