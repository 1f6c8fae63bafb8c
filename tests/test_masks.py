"""Masks: the release rule, its controls (as many tokens, batch for batch), one of your own."""

import functools
import json
import math
import statistics
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import make_run, parse, read_log, sample, score, spy

import evaluate
import masks
import release_rule
import teachability
import toy
import train

ROOT = Path(train.__file__).parent
SHORT = ["--steps", "2", "--prompts-per-step", "5", "--eval-count", "4", "--eval-samples", "2"]


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
    counts = masks.apportion(torch.tensor(wanted), torch.tensor(capacity), total).tolist()
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
    assert masks.apportion(zero, torch.tensor([4, 4, 3]), 10).tolist() == [4, 3, 3]


@pytest.mark.parametrize("total", [4, -1])
def test_apportion_refuses_a_total_that_does_not_fit(total):
    with pytest.raises(ValueError, match=f"from 0 to 3, not {total}"):
        masks.apportion(torch.tensor([1]), torch.tensor([3]), total)


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
@given(batches(), st.sampled_from(masks.CONTROLS), st.integers(0, 3), st.integers(0, 8))
def test_every_control_spends_the_whole_budget_however_rows_are_shared_out(batch, kind, seed, cut):
    mask_BT, kept_R, wanted_R = batch
    length_R = mask_BT.sum(1)
    keep_BT = masks.spend(kind, mask_BT, length_R, kept_R, wanted_R, generator=seeded(seed))
    assert keep_BT.sum() == kept_R.sum() and keep_BT.dtype == torch.bool
    assert not (keep_BT & ~mask_BT).any()
    if kind != "random":  # an unbroken beginning of every response
        for row in range(len(mask_BT)):
            inside = keep_BT[row, mask_BT[row]].int().tolist()
            assert inside == sorted(inside, reverse=True)
    parts = [
        masks.spend(kind, part, length_R, kept_R, wanted_R, first_row=first,
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
    keep_BT = masks.spend("prefix", mask_BT, length_R, kept_R, None, generator=seeded())
    share = kept_R.sum() / length_R.sum()
    assert (keep_BT.sum(1) - share * length_R).abs().max() < 1


def test_shuffled_permutes_the_release_points():
    mask_BT, length_R, kept_R = equal_lengths()
    counts = [
        masks.spend("shuffled", mask_BT, length_R, kept_R, None, generator=seeded(s)).sum(1)
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
    keep_BT = masks.spend("shuffled", mask_BT, mask_BT.sum(1), torch.tensor([10, 2]), None,
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
        masks.spend("random", mask_BT, mask_BT.sum(1), kept_R, None, generator=seeded(s)).int()
        for s in range(400)
    )
    assert (drawn[mask_BT] - 240).abs().max() < 49 and drawn.sum() == 400 * 30


def test_std_stays_at_its_own_points_as_far_as_the_budget_allows():
    mask_BT, length_R, kept_R = equal_lengths()
    same = masks.spend("std", mask_BT, length_R, kept_R, kept_R.flip(0), generator=seeded())
    assert torch.equal(same.sum(1), kept_R.flip(0))
    nowhere = masks.spend("std", mask_BT, length_R, kept_R, length_R, generator=seeded())
    prefix = masks.spend("prefix", mask_BT, length_R, kept_R, None, generator=seeded())
    # a signal that never fires leaves a fixed share; only the odd tokens are dealt otherwise
    assert (nowhere.sum(1) - prefix.sum(1)).abs().max() <= 1


def test_spend_refuses():
    mask_BT, length_R, kept_R = equal_lengths()
    with pytest.raises(ValueError, match="kind must be one of prefix, .*, not 'best'"):
        masks.spend("best", mask_BT, length_R, kept_R, None, generator=seeded())
    with pytest.raises(ValueError, match="the lengths of the rows from 3 on"):
        masks.spend("prefix", mask_BT, length_R, kept_R, None, first_row=3, generator=seeded())


def test_spread_equals_the_standard_library():
    values = [0.1, -3.0, 2.5, 7.0, 7.0, -1.0]
    segments = [0, 0, 0, 1, 1, 2]
    spread_N = teachability.segment_spread(values, segments)
    for number, found in enumerate(spread_N.tolist()):
        mine = [v for v, s in zip(values, segments, strict=True) if s == number]
        assert math.isclose(found, math.log1p(statistics.pstdev(mine)), abs_tol=1e-12)
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


@pytest.fixture(scope="module")
def three_steps(mixed):
    """By world and method: the tokens that each of three batches kept, and the weights."""

    @functools.cache
    def made(world, method):
        with pytest.MonkeyPatch.context() as patch:
            updates = spy(patch, train, "token_weights")
            run = make_run("--toy", world, *mixed, "--method", method, "--lr", "1e-30")
            lines = [train.train_step(run, step) for step in range(3)]
        for line in lines:
            assert line["kept"] == line["kept_tokens"] / round(line["response_tokens"] * 30)
        return [line["kept_tokens"] for line in lines], [result for _, result in updates]

    return made


@pytest.mark.parametrize("world", ["varied", "clean"])
@pytest.mark.parametrize("kind", masks.CONTROLS)
def test_a_control_supervises_as_many_tokens_as_release_batch_for_batch(kind, world, three_steps):
    """The same three batches, graded by both: the counts are equal every time, the places not."""
    counts, ours = three_steps(world, kind)
    release_counts, theirs = three_steps(world, "release")
    assert counts == release_counts
    assert len(set(counts)) > 1, "ragged batches have ragged budgets"
    # the weights of the update itself: as many tokens, all of equal weight, elsewhere
    for count, a, b in zip(counts, theirs, ours, strict=True):
        assert (b > 0).sum() == (a > 0).sum() == count
        assert torch.allclose(b[b > 0], torch.tensor(1 / count))
        assert not torch.equal(a, b)


def test_std_fires_where_the_spread_of_the_advantage_drops(mixed):
    """Against a loop over sentences with the standard library's deviation."""
    run = make_run("--toy", "varied", *mixed, "--method", "std", "--budget", "own")
    batch = sample(run, 0)
    scores = score(run, batch)
    fired = 0
    for row, mask_T in enumerate(batch.response_mask_BT):
        segment_T = teachability.token_segments(run.tokenizer, batch.ids_BT[row, mask_T],
                                                run.splitter)
        advantage = (scores.logp_BT - batch.logp_BT)[row, mask_T].tolist()
        spreads = [
            math.log1p(statistics.pstdev(
                [a for a, s in zip(advantage, segment_T.tolist(), strict=True) if s == n]
            ))
            for n in range(int(segment_T.max()) + 1)
        ]
        point = release_rule.change_point(spreads)
        wanted = len(segment_T) if point.kept is None else int((segment_T < point.kept).sum())
        assert int(scores.keep_BT[row].sum()) == int(scores.wanted_B[row]) == wanted
        assert bool(scores.released_B[row]) == (point.kept is not None)
        fired += point.kept is not None
    assert not train.spends_budget(run.args) and 0 < fired < 30
    # within the budget, its places are wishes and the margin's count is the law
    both = make_run("--toy", "varied", *mixed, "--method", "std")
    release = make_run("--toy", "varied", *mixed, "--method", "release")
    with_budget = score(both, sample(both, 0))
    assert torch.equal(with_budget.wanted_B, scores.wanted_B)
    by_margin = score(release, sample(release, 0))
    assert torch.equal(with_budget.keep_BT, by_margin.keep_BT)


def test_prefix_tokens_supervises_so_many_of_every_response(mixed):
    run = make_run("--toy", "varied", *mixed, "--method", "prefix", "--prefix-tokens", "60")
    batch = sample(run, 0)
    keep_BT, length_B = score(run, batch).keep_BT, batch.response_mask_BT.sum(1)
    assert torch.equal(keep_BT.sum(1), length_B.clamp(max=60)) and length_B.min() < 60
    assert run.splitter is None, "no sentence is looked at"
    line = train.train_step(run, 0)
    assert line["fired"] == 0 and line["kept_tokens"] == int(length_B.clamp(max=60).sum())


def test_a_control_restricts_what_lookahead_saw(monkeypatch):
    """Where a control supervises is known when all is graded: the leaves of other tokens are
    scored in vain, and count for nothing."""
    scored, batches = spy(monkeypatch, train, "score"), spy(monkeypatch, train, "sample")
    run = make_run("--toy", "varied", "--prompts-per-step", "20", "--mask", "random",
                   "--lookahead", "on", "--objective", "topk")
    line = train.train_step(run, 0)
    scores, (batch, _) = scored[0][1], batches[0][1]
    looked_BT = (batch.entropy_BT > 0.2) & batch.response_mask_BT
    assert torch.equal(scores.trigger_BT, looked_BT)
    counted = int((looked_BT & scores.keep_BT).sum())
    assert 0 < counted < int(looked_BT.sum())
    assert line["triggered"] == counted / (20 * line["response_tokens"])


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
    batch = sample(run, 0)
    scores = score(run, batch)
    keep_BT = scores.keep_BT
    if "release" in more:
        keep_BT[1, int(keep_BT[1].nonzero().min()) + 9 :] = False
    weight_BT = keep_BT / keep_BT.sum()
    loss, norm, _ = train.update(run, batch, scores, weight_BT, weight_BT)
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
def test_the_second_task_is_evaluated_first_and_last(tmp_path, capsys):
    flags = ["--difficulty", "2", *SHORT, "--eval-every", "1", "--method", "opd"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    _, evaluations = read_log(tmp_path / "run")
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert ["ood" in line for line in evaluations] == [True, False, True]
    assert evaluations[0]["ood"]["problems"] == 4
    before, after = (line["ood"]["accuracy"] for line in (evaluations[0], evaluations[2]))
    assert f"out of domain: {before:.3f} before, {after:.3f} after" in shown


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
        line = evaluate.on_held_out(run, 0)
        found[name] = line["ood"]["accuracy"]
        assert line["ood"]["problems"] == 6 and line["problems"] == 6
        assert "ood" not in evaluate.on_held_out(run, 1)
    assert found["right"] > 0.9 and found["wrong"] == 0


# ------------------------------------------------------------------------------- one of your own
def test_a_mask_of_your_own_is_a_function_and_an_entry(monkeypatch):
    """It gets what it names, and nothing else; what it needs is checked before weights load."""

    def confident(response_mask_BT, max_prob_BT, *, floor=0.9):
        return response_mask_BT & (max_prob_BT > floor)

    def soft(response_mask_BT, entropy_BT):  # weights, not only a mask
        return response_mask_BT * entropy_BT

    monkeypatch.setitem(masks.MASKS, "confident", confident)
    monkeypatch.setitem(masks.MASKS, "soft", soft)
    own = {"method": [(flag, default, [*masks.MASKS] if flag == "--mask" else check, text)
                      for flag, default, check, text in train.FLAGS["method"]]}  # fmt: skip
    monkeypatch.setattr(train, "FLAGS", train.FLAGS | own)
    for name in ("confident", "soft"):
        run = make_run("--toy", "varied", *SHORT, "--mask", name)
        assert not run.needs.sentences and not run.needs.candidates
        batch = sample(run)
        scores = score(run, batch)
        mask_BT = batch.response_mask_BT
        wanted = {"confident": mask_BT & (scores.max_prob_BT > 0.9),
                  "soft": mask_BT * batch.entropy_BT}[name]  # fmt: skip
        assert torch.equal(scores.keep_BT, wanted)
        line = train.train_step(run, 0)
        assert line["kept_tokens"] == int((wanted > 0).sum()) > 0 and line["fired"] == 0
    # weights count in proportion: two optimizer steps differ
    monkeypatch.setitem(masks.MASKS, "wrong", lambda response_mask_BT, loudness: None)
    with pytest.raises(ValueError, match="--mask wrong asks for loudness"):
        masks.parameters("wrong", vars(parse([])))


def test_weights_in_place_of_a_mask_count_in_proportion():
    """A token of weight 2 counts as one that is there twice."""
    l_BT, q_BT = torch.ones(1, 4), torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    w_BT = train.token_weights(l_BT, q_BT, "batch", 4, 4)
    assert torch.allclose(w_BT, torch.tensor([[0.5, 0.25, 0.25, 0.0]]))


def test_release_alone_needs_no_args_and_equals_a_loop(monkeypatch):
    """The function to take away, on plain tensors, against the leaves row by row."""
    generator = seeded(3)
    mask_BT = torch.zeros(6, 40, dtype=torch.bool)
    for row in range(6):
        mask_BT[row, 2 + row : 38 - 2 * row] = True
    logp_BTK = -3 * torch.rand(6, 40, 4, generator=generator)
    logp_BTK[:, 20:] *= 0.01
    segments = [torch.arange(int(m_T.sum())) // 4 for m_T in mask_BT]
    out = masks.release(mask_BT, logp_BTK, segments)
    assert out.released_B.any()
    for row, segment_T in enumerate(segments):
        first, second = logp_BTK[row, mask_BT[row]].sort(dim=1, descending=True).values[:, :2].T
        margin_T = (first - second).double()
        scores = [math.log1p(margin_T[segment_T == n].mean()) for n in range(segment_T.max() + 1)]
        point = release_rule.change_point(scores)
        kept = len(segment_T) if point.kept is None else 4 * point.kept
        inside_T = out.keep_BT[row, mask_BT[row]]
        assert inside_T.sum() == kept and inside_T[:kept].all()
        assert not out.keep_BT[row, ~mask_BT[row]].any()
        assert math.isclose(out.gain_B[row], point.gain, abs_tol=1e-6)


def test_std_by_hand():
    """Two sentences of 2 tokens on either side are enough; what is not finite counts as 0; a row
    without response tokens keeps nothing and moves nobody."""
    mask_BT = torch.tensor([[False] + [True] * 8, [False] * 9])
    advantage_BT = torch.zeros(2, 9)
    advantage_BT[0, 1:5] = torch.tensor([3.0, -3.0, 3.1, -3.1])
    advantage_BT[0, 5:] = torch.tensor([0.1, -0.1, math.nan, -math.inf])
    segments = [torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor([], dtype=torch.int64)]
    found = masks.std(mask_BT, advantage_BT, segments)
    assert found.released_B.tolist() == [True, False]
    assert found.keep_BT[0].tolist() == [False] + [True] * 4 + [False] * 4
    scores = [math.log1p(s) for s in (3.0, 3.1, 0.1, 0.0)]
    assert abs(found.gain_B[0] - release_rule.change_point(scores).gain) < 1e-4
    assert not masks.std(mask_BT, advantage_BT, segments, min_segments=3).released_B.any()
    other = masks.std(mask_BT.flip(0), advantage_BT.flip(0), segments[::-1])
    assert torch.equal(other.keep_BT, found.keep_BT.flip(0))
