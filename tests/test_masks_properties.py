"""Properties of the public names of masks, and of scoring with them."""


import torch
from conftest import VOCABULARY
from hypothesis import strategies as st
from properties import (
    Letters,
    finite,
    mask_names,
    options,
    prompts_of_ids,
    prop,
    rollouts,
    seeded,
    seeds,
    splitter,
    tiny,
)
from runs import bare_run

import masks
import release_rule
import rivals
import teachability
import train

CONSTANTS = {"iw_max", "kat_tokens", "kat_share", "overlap_tokens", "overlap_floor", "tip_share"}


@st.composite
def budgets(draw):
    """Arguments of `masks.spend` for a whole batch."""
    length = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    mask_BT = torch.arange(8) < torch.tensor(length)[:, None] + 1
    mask_BT[:, 0] = False
    kept, wanted = (torch.tensor([draw(st.integers(0, n)) for n in length]) for _ in "ab")
    return {"response_mask_BT": mask_BT, "length_R": torch.tensor(length), "kept_R": kept,
            "wanted_R": wanted, "first_row": 0}  # fmt: skip


@prop("masks.first_tokens", "masks.apportion", "masks.spend", examples=150, x=budgets(),
      kind=st.sampled_from(masks.CONTROLS), share=st.floats(-0.2, 1.2), shift=st.integers(0, 2))
def test_budgets_are_met_or_refused(x, kind, share, shift):
    length_R, total = x["length_R"], int(share * x["length_R"].sum())
    keep_BT = masks.first_tokens(x["kept_R"], x["response_mask_BT"])
    assert torch.equal(keep_BT.sum(1), x["kept_R"])
    assert torch.equal(keep_BT[:, 1:], torch.arange(7) < x["kept_R"][:, None])
    try:
        count_R = masks.apportion(x["wanted_R"], length_R, total)
        assert count_R.sum() == total and bool(((count_R >= 0) & (count_R <= length_R)).all())
    except ValueError as error:
        assert "total" in str(error) and not 0 <= total <= length_R.sum()
    try:  # rows of another place in the batch
        keep_BT = masks.spend(kind, **x | {"first_row": shift}, generator=seeded(1))
        assert keep_BT.dtype == torch.bool and not (keep_BT & ~x["response_mask_BT"]).any()
        assert keep_BT.sum() == x["kept_R"].sum()
    except ValueError as error:
        assert shift and "length_R" in str(error)
    big = 2**24  # whose products do not fit into 32 bits
    narrow = masks.apportion(torch.zeros(3).int(), torch.full((3,), big).int(), 3 * big // 2)
    assert narrow.tolist() == [big // 2] * 3


@prop("masks.none", "masks.release", "masks.std", "masks.prefix", "masks.up_to_the_drop",
      "masks.join", "masks.apply", "masks.parameters", "masks.Mask", examples=60, x=budgets(),
      seed=seeds, name=st.sampled_from(sorted({*masks.MASKS} - {*rivals.RIVALS})),
      tokens=st.integers(0, 9))
def test_a_mask_is_a_beginning_of_every_response(x, seed, name, tokens):
    g = torch.Generator().manual_seed(seed)
    mask_BT = x["response_mask_BT"]
    segments = [torch.arange(int(n)) // 2 for n in x["length_R"]]
    segment_F, counts = masks.join(segments)
    assert len(segment_F) == mask_BT.sum() and segment_F[-1] + 1 == sum(counts)
    seen = {"response_mask_BT": mask_BT, "segments": segments, "prefix_tokens": tokens,
            "candidate_logp_BTK": -torch.rand(*mask_BT.shape, 3, generator=g),
            "advantage_BT": torch.randn(mask_BT.shape, generator=g), "min_segments": 1}
    assert set(masks.parameters(name, seen)) <= {*masks.SEEN, *seen, "margin", "bic_eps",
                                                 "margin_min_entropy"}  # fmt: skip
    out = masks.apply(name, seen)
    assert out.keep_BT.dtype == torch.bool and not (out.keep_BT & ~mask_BT).any()
    for row, mask_T in enumerate(mask_BT):
        inside = out.keep_BT[row, mask_T].int().tolist()
        assert inside == sorted(inside, reverse=True)
        if out.released_B is not None:
            assert bool(out.released_B[row]) == (sum(inside) < len(inside))
            assert (out.gain_B[row] > 0) == out.released_B[row]


@prop("rivals.iw", "rivals.reopold", "rivals.kat", "rivals.overlap", "rivals.tip",
      "rivals.no_teacher", "rivals.highest", "masks.finite", examples=120, x=budgets(), seed=seeds,
      name=st.sampled_from([*rivals.RIVALS]), progress=st.floats(0, 1),
      bad=st.sampled_from([0.0, -torch.inf]), share=st.floats(0.01, 1))
def test_a_rival_weighs_tokens_of_the_response_alone(x, seed, name, progress, bad, share):
    """Weights are finite, from 0 to 1.5, 0 outside; other rows and the padding change nothing."""
    g, mask_BT = torch.Generator().manual_seed(seed), x["response_mask_BT"]
    shape = mask_BT.shape
    seen = {name: torch.randn(shape, generator=g) for name in ("advantage_BT", "entropy_BT",
                                                              "logp_BT")}  # fmt: skip
    seen["entropy_BT"] = seen["entropy_BT"].abs()
    seen["advantage_BT"][0, 1] += bad
    ids = (torch.rand(*shape, 6, generator=g).argsort(-1)[..., :3] for _ in "ab")
    seen |= dict(zip(("candidate_ids_BTK", "teacher_ids_BTK"), ids, strict=True))
    seen |= {"response_mask_BT": mask_BT, "progress": progress}
    assert set(masks.parameters(name)) <= {*masks.SEEN, *CONSTANTS}
    out = masks.apply(name, seen)
    assert (out.advantage_BT is not None) == (name in rivals.OWN_ADVANTAGE)
    weight_BT = out.keep_BT.float()
    assert finite(weight_BT) and weight_BT.min() >= 0 and weight_BT.max() <= 1.5
    assert not weight_BT[~mask_BT].any()
    for row in range(len(mask_BT)):
        alone = {k: v[row : row + 1, : x["length_R"][row] + 1] if torch.is_tensor(v) else v
                 for k, v in seen.items()}  # fmt: skip
        one_1T = masks.apply(name, alone).keep_BT.float()
        rest_T = weight_BT[row, one_1T.shape[1] :]
        torch.testing.assert_close(one_1T[0], weight_BT[row, : one_1T.shape[1]])
        assert not rest_T.any()
    chosen_BT = rivals.highest(seen["logp_BT"], mask_BT, share)
    counts_B = (share * x["length_R"]).ceil()
    assert torch.equal(chosen_BT.sum(1).float(), counts_B)
    assert finite(masks.finite(seen["advantage_BT"]))


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


GRADED = ["--union-top-k", 5, "--lgr-top-k", 4, "--min-segments", 1]


@prop("train.score", "train.Scores", "train.spends_budget", "train.asks_for", examples=25,
      seed=seeds, prompts=prompts_of_ids, mask=mask_names | st.just("release"),
      objective=st.sampled_from(["pg", "topk", "rkl"]), rows=st.integers(0, 3), ahead=st.booleans(),
      entropy=st.sampled_from([0.0, 1.0]))
def test_scores_do_not_depend_on_micro_batches(
    seed, prompts, mask, objective, rows, ahead, entropy
):
    """And equal a plain forward; what is supervised lies in the response, and is counted right."""
    ahead = ahead and objective != "rkl"
    flags = [*GRADED, "--mask", mask, "--objective", objective, "--micro-batch", rows,
             "--margin-min-entropy", entropy, "--lookahead", "on" if ahead else "off"]
    args = options(*flags)
    if mask in rivals.OWN_ADVANTAGE and objective != "pg":
        return
    run = bare_run(tiny("qwen3", 1), *flags, vocab_size=VOCABULARY)
    run.teacher, run.vocab_size, run.needs = tiny("qwen3", 2), VOCABULARY, train.needs(args)
    run.tokenizer, run.splitter = Letters(), splitter()
    batch = rollouts(seed, prompts)
    before = repr(batch)
    scores = train.score(run, batch, run.sentences(batch))
    run.args.micro_batch = run.args.tokens_per_micro_batch = 0
    whole = train.score(run, batch, run.sentences(batch))
    assert repr(batch) == before
    mask_BT, keep_BT = batch.response_mask_BT, scores.keep_BT
    with torch.no_grad():
        logp_BTV = run.teacher(batch.ids_BT).logits.double().log_softmax(-1).roll(1, 1)
    right_BT = logp_BTV.gather(2, batch.ids_BT[..., None])[..., 0] * mask_BT
    for name, value in (("logp_BT", right_BT), ("max_prob_BT", logp_BTV.exp().amax(-1) * mask_BT)):
        for own in (scores, whole):
            torch.testing.assert_close(getattr(own, name).double(), value, rtol=0, atol=1e-3)
    torch.testing.assert_close(keep_BT, whole.keep_BT, rtol=0, atol=1e-4)
    assert not keep_BT[~mask_BT].any()
    assert train.asks_for(args) <= {*masks.SEEN, *vars(args), *CONSTANTS}
    keep_BT = keep_BT > 0
    kept_B = keep_BT.sum(1)
    fired_B = kept_B < mask_BT.sum(1)
    if mask == "release":
        assert torch.equal(fired_B, scores.released_B)
        assert torch.equal(scores.gain_B > 0, fired_B)
        assert kept_B.tolist() == list(kept_by_the_rule(batch, logp_BTV, args))
    if mask == "none":
        assert scores.released_B is None and not fired_B.any()
    if mask != "std":
        assert torch.equal(kept_B, scores.wanted_B)
    if ahead:
        looked_BT = mask_BT if train.spends_budget(args) else keep_BT
        assert torch.equal(scores.trigger_BT, looked_BT & (batch.entropy_BT > args.lgr_tau))
        assert not scores.reward_BTK[~scores.trigger_BT].any()
        assert finite(scores.reward_BTK, scores.spread_BT)
    if objective == "topk":
        taught_BTU = logp_BTV.gather(2, scores.union_BTU)[mask_BT]
        torch.testing.assert_close(scores.union_logp_BTU[mask_BT].double(), taught_BTU, rtol=0,
                                   atol=1e-3)  # fmt: skip
