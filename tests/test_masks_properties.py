"""Properties of the public names of masks."""

import functools
from types import SimpleNamespace

import torch
from conftest import VOCABULARY
from hypothesis import strategies as st
from properties import (
    Letters,
    finite,
    masks,
    options,
    prompts_of_ids,
    prop,
    refused_or,
    rollouts,
    same,
    seeded,
    seeds,
    small,
    splitter,
    spoilt,
    spoilt_tensor,
    tiny,
)

import controls
import grading
import release_rule
import teachability


# --------------------------------------------------------------------------------------- controls
@st.composite
def budgets(draw):
    """Arguments of `controls.spend` for a whole batch."""
    length = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    mask_BT = torch.arange(8) < torch.tensor(length)[:, None] + 1
    mask_BT[:, 0] = False
    kept, wanted = (torch.tensor([draw(st.integers(0, n)) for n in length]) for _ in "ab")
    return {"response_mask_BT": mask_BT, "length_R": torch.tensor(length), "kept_R": kept,
            "wanted_R": wanted, "first_row": 0}  # fmt: skip


@prop("controls.first_tokens", "controls.spend", examples=120, x=budgets(), data=st.data(),
      kind=st.sampled_from(controls.CONTROLS))
def test_controls_with_bad_input(x, data, kind):
    keep_BT = controls.first_tokens(x["kept_R"], x["response_mask_BT"])
    assert torch.equal(keep_BT.sum(1), x["kept_R"])
    assert torch.equal(keep_BT[:, 1:], torch.arange(7) < x["kept_R"][:, None])
    few = {"count_B": x["kept_R"], "response_mask_BT": x["response_mask_BT"]}
    name, bad = spoilt(data.draw, few)
    keep_BT = refused_or(controls.first_tokens, bad)
    assert keep_BT is None or keep_BT.dtype == torch.bool and not (
        keep_BT & ~bad["response_mask_BT"]).any()  # fmt: skip
    name, bad = spoilt(data.draw, x)
    function = functools.partial(controls.spend, kind, generator=seeded(1))
    keep_BT = refused_or(function, bad)
    if keep_BT is not None:
        assert keep_BT.shape == bad["response_mask_BT"].shape and keep_BT.dtype == torch.bool
        whole = bad["response_mask_BT"].sum() == x["length_R"].sum()  # not some of the rows
        assert not whole or keep_BT.sum() == x["kept_R"].sum()


@prop("controls.apportion", examples=200, x=budgets(), data=st.data(), share=st.floats(0, 1))
def test_apportion_with_bad_input(x, data, share):
    arguments = {"wanted_R": x["wanted_R"], "capacity_R": x["length_R"],
                 "total": int(share * x["length_R"].sum())}  # fmt: skip
    _, bad = spoilt(data.draw, arguments)
    count_R = refused_or(controls.apportion, bad)
    if count_R is not None:
        assert count_R.dtype == torch.int64 and count_R.sum() == bad["total"]
        assert bool(((count_R >= 0) & (count_R <= bad["capacity_R"])).all())
    big = 2**24  # whose products do not fit into 32 bits
    narrow = controls.apportion(torch.zeros(3).int(), torch.full((3,), big).int(), 3 * big // 2)
    assert narrow.tolist() == [big // 2] * 3

# ---------------------------------------------------------------------------------------- grading
@prop("grading.columns_up_to_last", "grading.micro_batches", examples=100, B=small, T=small,
      seed=seeds, data=st.data(), rows=st.integers(0, 3), tokens=st.integers(0, 9))
def test_columns_and_micro_batches_with_bad_input(B, T, seed, data, rows, tokens):
    mask_BT = torch.rand(B, T, generator=seeded(seed)) < 0.4
    length_B = grading.columns_up_to_last(mask_BT)
    for used, mask_T in zip(length_B.tolist(), mask_BT.tolist(), strict=True):
        assert used == max((t + 1 for t, m in enumerate(mask_T) if m), default=0)
    bad_BT = spoilt_tensor(data.draw, mask_BT)
    out_B = refused_or(grading.columns_up_to_last, {"mask_BT": bad_BT})
    assert out_B is None or out_B.shape == bad_BT.shape[:1] and out_B.dtype == torch.int64
    x = {"length_B": length_B, "most_rows": rows, "most_tokens": tokens}
    _, bad = spoilt(data.draw, x)
    pieces = refused_or(grading.micro_batches, bad)
    if pieces is not None:
        held = [row for piece in pieces for row in piece.tolist()]
        assert sorted(held) == list(range(len(bad["length_B"])))


@prop("grading.pick", "grading.stack", "grading.Grades", examples=60, B=st.integers(1, 6), T=small,
      seed=seeds, rows=st.integers(0, 3), ahead=st.booleans())
def test_pick_and_stack_are_inverses(B, T, seed, rows, ahead):
    """Nested records, with fields that are None; and `keep_only` leaves nothing elsewhere."""
    g = seeded(seed)
    floats_BT, bools_BT = torch.rand(B, T, generator=g), torch.rand(B, T, generator=g) < 0.5
    choice = grading.Supervision(bools_BT, bools_BT[:, 0], floats_BT[:, 0].double())
    look = grading.Lookahead(bools_BT, floats_BT, bools_BT, floats_BT, floats_BT[..., None])
    whole = grading.Grades(floats_BT, floats_BT + 1, choice, look if ahead else None)
    pieces = grading.micro_batches(torch.randint(1, T + 1, (B,), generator=g), rows)
    parts = [grading.pick(whole, piece, T) for piece in pieces]
    again = grading.stack(parts, pieces, T)
    assert repr(again) == repr(whole)
    wider = grading.stack(parts, pieces, T + 2)
    assert wider.logp_BT.shape == (B, T + 2) and not wider.logp_BT[:, T:].any()
    keep_BT = torch.rand(B, T, generator=g) < 0.5
    again.keep_only(keep_BT)
    assert again.choice.keep_BT is keep_BT and repr(whole.choice) == repr(choice)
    if ahead:
        a, w = again.ahead, whole.ahead
        assert torch.equal(a.reward_BT, w.reward_BT.masked_fill(~keep_BT, 0))
        assert same(a.trigger_BT, w.trigger_BT & keep_BT)
        assert torch.equal(a.reward_BTK[..., 0], w.reward_BTK[..., 0] * keep_BT)






@prop("grading.signals", "grading.spends_budget", examples=60, mask=masks,
      prefix_tokens=st.integers(0, 2), budget=st.sampled_from(["release", "own"]))
def test_signals_are_what_the_mask_looks_at(mask, prefix_tokens, budget):
    args = SimpleNamespace(mask=mask, prefix_tokens=prefix_tokens, budget=budget)
    found = grading.signals(args)
    assert ("spread" in found) == (mask == "std") and set(found) <= {"margin", "spread"}
    control = mask in controls.CONTROLS
    assert grading.spends_budget(args) == (control and "margin" in found)
    assert "margin" not in found or mask == "release" or budget == "release" and not prefix_tokens
    assert not found or mask != "none"






def kept_by_the_rule(batch, logp_BTV, args):
    """Tokens of every response that the release rule keeps, from the leaves, row by row."""
    for row, mask_T in enumerate(batch.response_mask_BT):
        candidates_TK = batch.topk_ids_BTK[row, mask_T, : args.margin_top_k]
        margin_T = teachability.teacher_margin(logp_BTV[row, mask_T].gather(1, candidates_TK))
        segment_T = teachability.token_segments(Letters(), batch.ids_BT[row, mask_T], splitter())
        counted_T = batch.entropy_BT[row, mask_T] >= args.margin_min_entropy
        score_N = teachability.segment_scores(margin_T, segment_T, include_T=counted_T)
        point = release_rule.release_point(score_N, min_segments=args.min_segments)
        yield int(release_rule.keep_mask(segment_T, point.kept).sum())


GRADED = ["--union-top-k", 5, "--lgr-top-k", 4, "--sentence-workers", 0, "--min-segments", 1]


@prop("grading.grade", "grading.grade_rows", "grading.look_ahead", "grading.Sentences",
      "grading.supervise", examples=25, seed=seeds, prompts=prompts_of_ids,
      mask=masks | st.just("release"),
      objective=st.sampled_from(["pg", "topk", "rkl"]), rows=st.integers(0, 3), ahead=st.booleans(),
      entropy=st.sampled_from([0.0, 1.0]))
def test_grades_do_not_depend_on_micro_batches(
    seed, prompts, mask, objective, rows, ahead, entropy
):
    """And equal a plain forward; what is supervised lies in the response, and is counted right."""
    ahead = ahead and objective != "rkl"
    args = options(*GRADED, "--mask", mask, "--objective", objective, "--micro-batch", rows,
                   "--margin-min-entropy", entropy, "--lookahead", "on" if ahead else "off")
    teacher, batch = tiny("qwen3", 2), rollouts(seed, prompts)
    before = repr(batch)
    sentences = grading.Sentences(Letters(), splitter())
    how = {"sentences": sentences, "vocab_size": VOCABULARY, "lap": lambda phase: None}
    grades = grading.grade(teacher, batch, args, **how)
    args.micro_batch = args.tokens_per_micro_batch = 0
    whole = grading.grade(teacher, batch, args, **how)
    sentences.close()
    assert repr(batch) == before
    mask_BT, keep_BT = batch.response_mask_BT, grades.choice.keep_BT
    with torch.no_grad():
        logp_BTV = teacher(batch.ids_BT).logits.double().log_softmax(-1).roll(1, 1)
    right_BT = logp_BTV.gather(2, batch.ids_BT[..., None])[..., 0] * mask_BT
    for name, value in (("logp_BT", right_BT), ("max_prob_BT", logp_BTV.exp().amax(-1) * mask_BT)):
        for own in (grades, whole):
            torch.testing.assert_close(getattr(own, name).double(), value, rtol=0, atol=1e-3)
    assert torch.equal(keep_BT, whole.choice.keep_BT) and not (keep_BT & ~mask_BT).any()
    kept_B = keep_BT.sum(1)
    fired_B = kept_B < mask_BT.sum(1)
    if mask in ("none", "release"):
        assert torch.equal(fired_B, grades.choice.released_B)
        assert torch.equal(grades.choice.gain_B > 0, fired_B)
    if mask == "release":
        assert kept_B.tolist() == list(kept_by_the_rule(batch, logp_BTV, args))
    if mask != "std":
        assert torch.equal(kept_B, grades.choice.wanted_B)
    if ahead:
        look, looked_BT = grades.ahead, mask_BT if grading.spends_budget(args) else keep_BT
        assert torch.equal(look.trigger_BT, looked_BT & (batch.entropy_BT > args.lgr_tau))
        assert not look.reward_BT[~look.trigger_BT | look.outside_BT].any()
        assert finite(look.reward_BT, look.spread_BT)
    if objective == "topk":
        taught_BTU = logp_BTV.gather(2, grades.union_BTU)[mask_BT]
        torch.testing.assert_close(grades.union_logp_BTU[mask_BT].double(), taught_BTU, rtol=0,
                                   atol=1e-3)  # fmt: skip
