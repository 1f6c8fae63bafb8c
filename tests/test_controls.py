"""The controls: exactly the release rule's number of supervised tokens, batch for batch."""

import json
import math
import statistics
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import SHORT, grade, make_run, read_log, run_command, spy

import controls
import grading
import release_rule
import teachability
import toy
import train

ROOT = Path(train.__file__).parent


# --------------------------------------------------------------------------------- the leaf alone
@st.composite
def wishes(draw):
    """(wanted, capacity, total) of up to 12 rollouts."""
    capacity = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    wanted = [draw(st.integers(0, 60)) for _ in capacity]
    return wanted, capacity, draw(st.integers(0, sum(capacity)))


@settings(deadline=None)
@given(wishes())
def test_apportion_meets_the_total_within_the_capacities_and_close_to_the_wishes(case):
    wanted, capacity, total = case
    counts = controls.apportion(torch.tensor(wanted), torch.tensor(capacity), total).tolist()
    cut = [min(pair) for pair in zip(wanted, capacity, strict=True)]
    assert sum(counts) == total
    assert all(0 <= n <= most for n, most in zip(counts, capacity, strict=True))
    missing = total - sum(cut)
    pool = [c - n for c, n in zip(capacity, cut, strict=True)] if missing >= 0 else cut
    for n, start, weight in zip(counts, cut, pool, strict=True):
        exact = Fraction(missing * weight, max(sum(pool), 1))  # proportional, to within one token
        assert abs(n - start - exact) < 1


def test_apportion_gives_what_is_left_to_the_largest_remainders():
    """10 over 4, 4, 3: exact shares 3.64, 3.64, 2.73, so the two tokens left after 3, 3, 2 go to
    the last and the first."""
    zero = torch.zeros(3, dtype=torch.int64)
    assert controls.apportion(zero, torch.tensor([4, 4, 3]), 10).tolist() == [4, 3, 3]


@pytest.mark.parametrize("wanted, capacity, total, message", [
    ([1], [1, 2], 1, "shapes"), ([[1]], [[1]], 1, "shapes"), ([-1], [3], 1, "negative"),
    ([1], [-3], 0, "negative"), ([1], [3], 4, "from 0 to 3, got 4"), ([1], [3], -1, "got -1"),
])
def test_apportion_refuses(wanted, capacity, total, message):
    with pytest.raises(ValueError, match=message):
        controls.apportion(torch.tensor(wanted), torch.tensor(capacity), total)


@st.composite
def batches(draw):
    """(response mask [R, T], kept_R, wanted_R) of ragged rollouts behind ragged prompts."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 15)), min_size=1, max_size=8))
    mask = torch.zeros(len(sizes), 20, dtype=torch.bool)
    for row, (start, length) in enumerate(sizes):
        mask[row, start : start + length] = True
    kept = [draw(st.integers(0, length)) for _, length in sizes]
    wanted = [draw(st.integers(0, length)) for _, length in sizes]
    return mask, torch.tensor(kept), torch.tensor(wanted)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)
@given(batches(), st.sampled_from(controls.CONTROLS), st.integers(0, 3), st.integers(0, 8))
def test_every_control_spends_the_whole_budget_however_rows_are_shared_out(batch, kind, seed, cut):
    mask_BT, kept_R, wanted_R = batch
    length_R = mask_BT.sum(1)
    keep_BT = controls.spend(kind, mask_BT, length_R, kept_R, wanted_R, generator=seeded(seed))
    assert keep_BT.sum() == kept_R.sum() and keep_BT.dtype == torch.bool
    assert not (keep_BT & ~mask_BT).any()
    if kind != "random":  # an unbroken beginning of every response
        for row in range(len(mask_BT)):
            inside = keep_BT[row, mask_BT[row]].int().tolist()
            assert inside == sorted(inside, reverse=True)
    parts = [
        controls.spend(kind, part, length_R, kept_R, wanted_R, first_row=first,
                       generator=seeded(seed))
        for first, part in ((0, mask_BT[:cut]), (cut, mask_BT[cut:])) if len(part)
    ]
    assert torch.equal(torch.cat(parts), keep_BT)


def equal_lengths(R=40, length=30):
    """R responses of one length, of which the rule keeps 3 to 24 tokens, a quarter whole."""
    mask_BT = torch.ones(R, length, dtype=torch.bool)
    kept_R = torch.randint(3, 25, (R,), generator=seeded(1))
    kept_R[::4] = length
    return mask_BT, mask_BT.sum(1), kept_R


def test_prefix_is_the_same_share_everywhere():
    mask_BT, length_R, kept_R = equal_lengths()
    mask_BT[::2, 20:] = False
    length_R = mask_BT.sum(1)
    kept_R = kept_R.clamp(max=20)
    keep_BT = controls.spend("prefix", mask_BT, length_R, kept_R, None, generator=seeded())
    share = kept_R.sum() / length_R.sum()
    assert (keep_BT.sum(1) - share * length_R).abs().max() < 1


def test_shuffled_permutes_the_release_points():
    mask_BT, length_R, kept_R = equal_lengths()
    counts = [
        controls.spend("shuffled", mask_BT, length_R, kept_R, None, generator=seeded(s)).sum(1)
        for s in (0, 0, 1)
    ]
    for count_R in counts:
        assert count_R.sort().values.tolist() == kept_R.sort().values.tolist()
        assert (count_R != kept_R).float().mean() > 0.7
    assert torch.equal(counts[0], counts[1]) and not torch.equal(counts[0], counts[2])


def test_an_unreleased_rollout_passes_to_the_end_on():
    """Lengths 10 and 4: the first is kept whole, the second released after 2.  Swapped, "to the
    end" is 4 tokens and 2 stay 2, so 6 of the budget of 12 are missing: added where there is room,
    which only the first rollout has."""
    mask_BT = torch.ones(2, 10, dtype=torch.bool)
    mask_BT[1, 4:] = False
    swap = next(s for s in range(20) if torch.randperm(2, generator=seeded(s))[0] == 1)
    keep_BT = controls.spend("shuffled", mask_BT, mask_BT.sum(1), torch.tensor([10, 2]), None,
                             generator=seeded(swap))
    assert keep_BT.sum(1).tolist() == [8, 4]


def test_random_tokens_are_uniform_over_the_batch():
    """400 draws of 30 of 50 tokens: every token is drawn 240 times, give or take five deviations
    (9.8 each)."""
    mask_BT = torch.zeros(5, 16, dtype=torch.bool)
    for row, length in enumerate((2, 6, 12, 14, 16)):
        mask_BT[row, 16 - length :] = True
    kept_R = torch.tensor([1, 2, 10, 14, 3])
    drawn = sum(
        controls.spend("random", mask_BT, mask_BT.sum(1), kept_R, None, generator=seeded(s)).int()
        for s in range(400)
    )
    assert (drawn[mask_BT] - 240).abs().max() < 49 and drawn.sum() == 400 * 30


def test_std_stays_at_its_own_points_as_far_as_the_budget_allows():
    mask_BT, length_R, kept_R = equal_lengths()
    same = controls.spend("std", mask_BT, length_R, kept_R, kept_R.flip(0), generator=seeded())
    assert torch.equal(same.sum(1), kept_R.flip(0))
    nowhere = controls.spend("std", mask_BT, length_R, kept_R, length_R, generator=seeded())
    prefix = controls.spend("prefix", mask_BT, length_R, kept_R, None, generator=seeded())
    # a signal that never fires leaves a fixed share; only the odd tokens are dealt otherwise
    assert (nowhere.sum(1) - prefix.sum(1)).abs().max() <= 1


def test_spend_refuses():
    mask_BT, length_R, kept_R = equal_lengths()
    with pytest.raises(ValueError, match="kind must be one of prefix, .*, got 'best'"):
        controls.spend("best", mask_BT, length_R, kept_R, None, generator=seeded())
    with pytest.raises(ValueError, match="rows from 3 on do not have the lengths"):
        controls.spend("prefix", mask_BT, length_R, kept_R, None, first_row=3, generator=seeded())


def test_spread_equals_the_standard_library():
    values = [0.1, -3.0, 2.5, 7.0, 7.0, -1.0]
    segments = [0, 0, 0, 1, 1, 2]
    spread_N = teachability.segment_spread(values, segments)
    for number, score in enumerate(spread_N.tolist()):
        mine = [v for v, s in zip(values, segments, strict=True) if s == number]
        assert math.isclose(score, math.log1p(statistics.pstdev(mine)), abs_tol=1e-12)
    assert teachability.segment_spread([], []).shape == (0,)


# ----------------------------------------------------------------------------- in a training step
@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Problems of 3 to 12 moves, so that responses differ in length."""
    path = tmp_path_factory.mktemp("mixed") / "problems.jsonl"
    problems = [toy.problems(1, moves=3 + i % 10, seed=i)[0] for i in range(40)]
    path.write_text("\n".join(json.dumps({"problem": p["problem"]}) for p in problems))
    return ["--problems", str(path), "--max-new-tokens", "223", "--prompts-per-step", "30",
            "--micro-batch", "7"]


@pytest.mark.parametrize("world", ["varied", "clean"])
@pytest.mark.parametrize("kind", controls.CONTROLS)
def test_a_control_supervises_as_many_tokens_as_release_batch_for_batch(
    kind, world, mixed, monkeypatch
):
    """The same three batches, graded by both: the counts are equal every time, the places not."""
    own = {}
    for method in ("release", kind):
        updates = spy(monkeypatch, train, "token_weights")
        placed = spy(monkeypatch, train, "micro_batch_loss")
        run = make_run("--toy", world, *mixed, "--method", method, "--lr", "1e-30")
        lines = [train.train_step(run, step) for step in range(3)]
        own[method] = [line["kept_tokens"] for line in lines], updates, placed
        for line in lines:
            assert line["kept"] == line["kept_tokens"] / round(line["response_tokens"] * 30)
        monkeypatch.undo()
    assert own[kind][0] == own["release"][0]
    assert len(set(own[kind][0])) > 1, "ragged batches have ragged budgets"
    # the weights of the update itself: as many tokens, all of equal weight, elsewhere
    theirs, ours = ([result for _, result in own[m][1]] for m in ("release", kind))
    for count, a, b in zip(own[kind][0], theirs, ours, strict=True):
        assert (b > 0).sum() == (a > 0).sum() == count
        assert torch.allclose(b[b > 0], torch.tensor(1 / count))
        assert not torch.equal(a, b)


def test_std_fires_where_the_spread_of_the_advantage_drops(mixed):
    """Against a loop over sentences with the standard library's deviation."""
    run = make_run("--toy", "varied", *mixed, "--method", "std", "--budget", "own")
    batch = train.sample(run, 0)
    grades = grade(run, batch)
    fired = 0
    for row, mask_T in enumerate(batch.response_mask_BT):
        segment_T = teachability.token_segments(run.tokenizer, batch.ids_BT[row, mask_T],
                                                run.splitter)
        advantage = (grades.logp_BT - batch.logp_BT)[row, mask_T].tolist()
        scores = [
            math.log1p(statistics.pstdev(
                [a for a, s in zip(advantage, segment_T.tolist(), strict=True) if s == n]
            ))
            for n in range(int(segment_T.max()) + 1)
        ]
        point = release_rule.change_point(scores)
        wanted = len(segment_T) if point.kept is None else int((segment_T < point.kept).sum())
        assert int(grades.choice.keep_BT[row].sum()) == int(grades.choice.wanted_B[row]) == wanted
        assert bool(grades.choice.released_B[row]) == (point.kept is not None)
        fired += point.kept is not None
    assert not grading.spends_budget(run.args) and 0 < fired < 30
    # within the budget, its places are wishes and the margin's count is the law
    both = make_run("--toy", "varied", *mixed, "--method", "std")
    release = make_run("--toy", "varied", *mixed, "--method", "release")
    with_budget = grade(both, train.sample(both, 0)).choice
    assert torch.equal(with_budget.wanted_B, grades.choice.wanted_B)
    by_margin = grade(release, train.sample(release, 0)).choice
    assert torch.equal(with_budget.keep_BT, by_margin.keep_BT)


def test_prefix_tokens_supervises_so_many_of_every_response(mixed):
    run = make_run("--toy", "varied", *mixed, "--method", "prefix", "--prefix-tokens", "60")
    batch = train.sample(run, 0)
    keep_BT, length_B = grade(run, batch).choice.keep_BT, batch.response_mask_BT.sum(1)
    assert torch.equal(keep_BT.sum(1), length_B.clamp(max=60)) and length_B.min() < 60
    assert run.splitter is None, "no sentence is looked at"
    line = train.train_step(run, 0)
    assert line["fired"] == 0 and line["kept_tokens"] == int(length_B.clamp(max=60).sum())


def test_a_control_restricts_what_lookahead_saw(monkeypatch):
    """Where a control supervises is known when all is graded: the leaves of other tokens are
    scored in vain, and count for nothing."""
    graded = spy(monkeypatch, grading, "grade")
    run = make_run("--toy", "varied", "--prompts-per-step", "20", "--mask", "random",
                   "--lookahead", "on", "--objective", "topk")
    line = train.train_step(run, 0)
    ahead, keep_BT = graded[0][1].ahead, graded[0][1].choice.keep_BT
    entropy_BT = train.sample(make_run("--toy", "varied", "--prompts-per-step", "20", "--mask",
                                       "random", "--lookahead", "on"), 0).entropy_BT
    assert torch.equal(ahead.trigger_BT, (entropy_BT > 0.2) & keep_BT) and ahead.trigger_BT.any()
    for values in (ahead.reward_BT, ahead.spread_BT, ahead.outside_BT, ahead.reward_BTK):
        assert not values[~keep_BT].any()
    assert line["triggered"] == int(ahead.trigger_BT.sum()) / (20 * line["response_tokens"])


# ---------------------------------------------------------------------- the exact divergences
def written_out(kind, beta, student_V, teacher_V):
    """The divergence of two rows of logits, term by term."""
    log_p, log_q = student_V.log_softmax(-1), teacher_V.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "rkl":
        return (p * (log_p - log_q)).sum()
    if kind == "fkl":
        return (q * (log_q - log_p)).sum()
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (log_q - log_m)).sum() + (1 - beta) * (p * (log_p - log_m)).sum()


@pytest.mark.parametrize("kind, more", [
    ("rkl", []), ("fkl", ["--mask", "release", "--toy", "varied", "--difficulty", "6"]),
    ("jsd", ["--jsd-beta", "0.3"]), ("rkl", ["--temperature", "0.7"]),
])
def test_update_of_a_divergence_equals_it_written_out(kind, more):
    """Loss and gradient of one step's update against full logits and autograd."""
    run = make_run("--difficulty", "2", *SHORT, "--method", kind, "--lr", "1e-9", "--clip-grad",
                   "0", "--micro-batch", "2", *more)
    batch = train.sample(run, 0)
    grades = grade(run, batch)
    keep_BT = grades.choice.keep_BT
    if "release" in more:
        keep_BT[1, int(keep_BT[1].nonzero().min()) + 9 :] = False
    weight_BT = keep_BT / keep_BT.sum()
    head_VE = run.teacher.get_output_embeddings().weight
    loss, norm = train.update(run.student, run.optimizer, batch, grades, None, weight_BT, run.args,
                              head_VE)
    mine = [p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad()
    total = 0.0
    for row in range(5):
        used = int(batch.response_mask_BT[row].nonzero().max()) + 1
        ids = batch.ids_BT[row : row + 1, :used]
        with torch.no_grad():
            teacher_TV = run.teacher(ids).logits[0]
        student_TV = run.model(ids).logits[0] / run.args.temperature
        for t in keep_BT[row].nonzero()[:, 0].tolist():
            rows = student_TV[t - 1], teacher_TV[t - 1]
            total = total + written_out(kind, run.args.jsd_beta, *rows)
    (total / keep_BT.sum()).backward()
    assert math.isclose(loss, total.item() / int(keep_BT.sum()), rel_tol=1e-4, abs_tol=1e-6)
    assert norm > 1e-3
    for a, p in zip(mine, run.model.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-3, atol=1e-5 * norm)


# ------------------------------------------------------------------------------- out of domain
def test_the_second_task_is_evaluated_first_and_last(tmp_path):
    flags = ["--difficulty", "2", *SHORT, "--eval-every", "1", "--method", "opd"]
    shown = run_command(sys.executable, ROOT / "train.py", *flags, "--out", "run", cwd=tmp_path)
    _, evaluations = read_log(tmp_path / "run")
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert ["ood" in line for line in evaluations] == [True, False, True]
    assert evaluations[0]["ood"]["problems"] == 4
    before, after = (line["ood"]["accuracy"] for line in (evaluations[0], evaluations[2]))
    assert f"out of domain: {before:.3f} before, {after:.3f} after" in shown.stdout


def test_out_of_domain_problems_of_the_users_own(tmp_path):
    """The student is asked these, and not the toy's: a wrong key gives 0."""
    problems = toy.problems(6, task="reverse", split="test")
    for name, answer in (("right", None), ("wrong", "17")):
        lines = [json.dumps(p | ({"answer": answer} if answer else {})) for p in problems]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    found = {}
    for name in ("right", "wrong"):
        run = make_run("--difficulty", "2", *SHORT[:4], "--eval-count", "6", "--ood-problems",
                       str(tmp_path / f"{name}.jsonl"))
        line = train.evaluate_student(run, 0)
        found[name] = line["ood"]["accuracy"]
        assert line["ood"]["problems"] == 6 and line["problems"] == 6
        assert "ood" not in train.evaluate_student(run, 1)
    assert found["right"] > 0.9 and found["wrong"] == 0
