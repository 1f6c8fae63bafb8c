"""Properties of the public names of lgr."""

import copy
import functools
import itertools
import math

import pytest
import torch
from conftest import VOCABULARY
from hypothesis import strategies as st
from properties import (
    INF,
    NAN,
    families,
    finite,
    numbers,
    prop,
    refused_or,
    seeded,
    seeds,
    small,
    spoilt,
    tiny,
)

import lgr


@prop("lgr.trigger", examples=60, seed=seeds, B=small, T=small, threshold=numbers, data=st.data())
def test_trigger_equals_a_loop(seed, B, T, threshold, data):
    x = {"entropy_BT": torch.randn(B, T, generator=seeded(seed)) * 50, "threshold": threshold,
         "response_mask_BT": torch.rand(B, T, generator=seeded(seed)) < 0.5}  # fmt: skip
    expected = [[e > threshold and m for e, m in zip(*rows, strict=True)] for rows in
                zip(x["entropy_BT"].tolist(), x["response_mask_BT"].tolist(), strict=True)]
    assert lgr.trigger(**x).tolist() == expected
    _, bad = spoilt(data.draw, x)
    out_BT = refused_or(lgr.trigger, bad, any_error=True)
    assert out_BT is None or not (out_BT.bool() & ~bad["response_mask_BT"].bool()).any()


@st.composite
def groups(draw):
    """Confidences, candidates and sampled ids of a batch; some groups nan, some ids outside."""
    B, T, K, g = draw(small), draw(small), draw(small), seeded(draw(seeds))
    confidence_BTK = torch.rand(B, T, K, generator=g, dtype=torch.float64)
    confidence_BTK[torch.rand(B, T, generator=g) < 0.3] = NAN
    candidates_BTK = torch.stack([torch.randperm(9, generator=g)[:K] for _ in range(B * T)])
    ids_BT = torch.randint(9, (B, T), generator=g)
    return confidence_BTK, candidates_BTK.view(B, T, K), ids_BT


@prop("lgr.group_reward", "lgr.sampled_reward", "lgr.difference_reward", examples=150,
      case=groups(), data=st.data(), eps=st.sampled_from([0.0, 1e-6, 1.0]),
      normalize=st.sampled_from(["std", "mean", "guard"]),
      scale=st.sampled_from([1.0, 1e-30, 1e-200, 1e300]))
def test_rewards_sum_to_0_in_every_group(case, data, eps, normalize, scale):
    confidence_BTK, candidates_BTK, ids_BT = case
    confidence_BTK = confidence_BTK * scale
    how = {"normalize": normalize, "eps": eps}
    reward_BTK = lgr.group_reward(confidence_BTK, **how)
    assert finite(reward_BTK) and not reward_BTK[confidence_BTK.isnan()].any()
    largest_BT = reward_BTK.abs().amax(-1)
    assert bool((reward_BTK.sum(-1).abs() <= 1e-9 * largest_BT).all())
    before_BT = confidence_BTK.nan_to_num().amin(-1)
    gain_BTK = lgr.difference_reward(confidence_BTK, before_BT)
    assert finite(gain_BTK) and gain_BTK.min() >= 0 and gain_BTK.shape == confidence_BTK.shape
    assert torch.equal(gain_BTK > 0, confidence_BTK > before_BT[..., None])
    order_BTK = confidence_BTK.nan_to_num().argsort(-1)
    assert bool((reward_BTK.gather(-1, order_BTK).diff(dim=-1) >= 0).all()), "the surer the better"
    reward_BT = lgr.sampled_reward(reward_BTK, candidates_BTK, ids_BT)
    for b, t in itertools.product(*map(range, ids_BT.shape)):
        table = dict(zip(candidates_BTK[b, t].tolist(), reward_BTK[b, t].tolist(), strict=True))
        assert reward_BT[b, t] == table.get(int(ids_BT[b, t]), 0.0)
    _, bad = spoilt(data.draw, {"confidence_BTK": confidence_BTK, "eps": eps})
    function = functools.partial(lgr.group_reward, normalize=normalize)
    out_BTK = refused_or(function, bad, any_error=True)
    assert out_BTK is None or finite(out_BTK) and out_BTK.shape == bad["confidence_BTK"].shape
    arguments = {"reward_BTK": reward_BTK, "candidates_BTK": candidates_BTK, "ids_BT": ids_BT}
    name, bad = spoilt(data.draw, arguments)
    out_BT = refused_or(lgr.sampled_reward, bad, any_error=True)
    assert out_BT is None or out_BT.shape == bad["ids_BT"].shape


@prop("lgr.union_candidates", "lgr.topk_loss", examples=150, seed=seeds, B=small, T=small, K=small,
      K2=small, data=st.data(), rewarded=st.booleans())
def test_the_union_is_a_set_and_the_loss_a_sum_over_it(seed, B, T, K, K2, data, rewarded):
    g, V = seeded(seed), 6
    student_BTV, teacher_BTV = (torch.randn(B, T, V, generator=g).double() * 3 for _ in "ab")
    ids = {"student_ids_BTK": student_BTV.topk(K).indices,
           "teacher_ids_BTK": teacher_BTV.topk(K2).indices}  # fmt: skip
    union_BTU, valid_BTU = lgr.union_candidates(**ids)
    reward_BTU = torch.randn(union_BTU.shape, generator=g).double() if rewarded else None
    x = {"student_logp_BTU": student_BTV.gather(-1, union_BTU), "valid_BTU": valid_BTU,
         "teacher_logp_BTU": teacher_BTV.gather(-1, union_BTU), "reward_BTU": reward_BTU}
    loss_BT = lgr.topk_loss(**x)
    shifted_BT = lgr.topk_loss(**x | {"student_logp_BTU": x["student_logp_BTU"] - 40})
    torch.testing.assert_close(shifted_BT, loss_BT)
    for b, t in itertools.product(range(B), range(T)):
        both = [ids[name][b, t].tolist() for name in ids]
        kept = union_BTU[b, t][valid_BTU[b, t]].tolist()
        assert sorted(kept) == sorted(set(both[0]) | set(both[1])) and kept[:K] == both[0]
        logp, logq = (z_BTV[b, t][kept].log_softmax(0) for z_BTV in (student_BTV, teacher_BTV))
        reward = reward_BTU[b, t][valid_BTU[b, t]] if rewarded else 0.0
        right = (logp.exp() * (logp - logq - reward)).sum()
        assert math.isclose(loss_BT[b, t], right, rel_tol=1e-9, abs_tol=1e-9)
        assert rewarded or loss_BT[b, t] > -1e-12
    out = refused_or(lgr.union_candidates, spoilt(data.draw, ids)[1], any_error=True)
    assert out is None or out[0].shape == out[1].shape
    x |= {} if rewarded else {"reward_BTU": torch.zeros(union_BTU.shape)}
    name, bad = spoilt(data.draw, x)
    out_BT = refused_or(lgr.topk_loss, bad, any_error=True)
    if out_BT is not None and name not in ("valid_BTU",) and finite(*bad.values()):
        assert finite(out_BT)


@prop("lgr.lookahead_confidence", examples=120, data=st.data(), B=small, T=st.integers(2, 5),
      K=small, seed=seeds, cached=st.booleans(), signal=st.sampled_from([*lgr.SIGNALS, "x"]))
def test_bad_input_of_lookahead(data, B, T, K, seed, cached, signal):
    """Confidences lie in [0, 1], or below 0 for "entropy"; nan exactly where nobody looked."""
    model, g = tiny("qwen3"), seeded(seed)
    x = {"ids_BT": torch.randint(VOCABULARY, (B, T), generator=g), "vocab_size": None,
         "response_mask_BT": torch.ones(B, T, dtype=torch.bool), "nodes_per_slice": 3,
         "trigger_BT": torch.rand(B, T, generator=g) < 0.5, "chunk": 2, "signal": signal,
         "candidates_BTK": torch.randint(VOCABULARY, (B, T, K), generator=g)}  # fmt: skip
    x["candidates_BTK"][..., 0] = x["ids_BT"]
    if cached:
        with torch.no_grad():
            trunk = model.base_model(x["ids_BT"], use_cache=True)
        x["hidden_BTD"] = trunk[0]
    _, bad = spoilt(data.draw, x, but=["signal"])
    cache = copy.deepcopy(trunk.past_key_values) if cached else None
    function = functools.partial(lgr.lookahead_confidence, model, cache=cache)
    out_BTK = refused_or(function, bad, any_error=True)
    if out_BTK is not None and finite(bad.get("hidden_BTD")):
        looked_BT = bad["trigger_BT"] & bad["response_mask_BT"]
        if signal == "sampled_prob":
            looked_BT[:, -1:] = False
        seen_BTK = looked_BT[..., None].expand(out_BTK.shape)
        assert torch.equal(~out_BTK.isnan(), seen_BTK)
        low, high = (-INF, 1e-4) if signal == "entropy" else (0, 1 + 1e-5)
        assert bool(((out_BTK >= low) & (out_BTK <= high))[seen_BTK].all())


@prop("lgr.self_check", examples=12, family=families, seed=st.integers(0, 3),
      factor=st.sampled_from([1.0, 1.0, 0.5, 3.0]))
def test_self_check_passes_a_plain_head_and_no_other(family, seed, factor):
    model = copy.deepcopy(tiny(family, seed))
    head = model.get_output_embeddings()
    if factor == 1.0:
        lgr.self_check(model)
        return
    head.register_forward_hook(lambda module, args, out: out * factor)
    with pytest.raises(ValueError, match="not supported"):
        lgr.self_check(model)
