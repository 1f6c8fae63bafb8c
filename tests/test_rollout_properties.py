"""Properties of the public names of rollout."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import torch
from conftest import VOCABULARY
from hypothesis import assume
from hypothesis import strategies as st
from properties import (
    BAD_NUMBERS,
    INF,
    NAN,
    families,
    finite,
    prompts_of_ids,
    prop,
    seeded,
    seeds,
    small,
    tiny,
)

import rollout
from fast.decode import decode as fast_decode


@prop("rollout.sample_token", examples=200, seed=seeds, V=st.integers(1, 8), S=small,
      temperature=st.sampled_from([0, 0.3, 1.0, 2.0]), data=st.data())
def test_a_sampled_token_is_the_inverse_of_the_cumulative_distribution(
    seed, V, S, temperature, data
):
    """Never a token of probability 0, also at either end of [0, 1); statistics in float64."""
    logits_SV = torch.randn(S, V, generator=seeded(seed)) * 3
    forbidden_SV = torch.rand(S, V, generator=seeded(seed + 1)) < 0.5
    forbidden_SV[:, data.draw(st.integers(0, V - 1))] = False
    logits_SV[forbidden_SV] = -INF
    edges = st.sampled_from([0.0, math.nextafter(1.0, 0.0), 5e-324]) | st.floats(0, 0.999999)
    uniform = data.draw(st.lists(edges, min_size=S, max_size=S))
    K = data.draw(st.integers(1, V))
    uniform_S = torch.tensor(uniform, dtype=torch.float64)
    token_S, logp_S, entropy_S, topk_SK = rollout.sample_token(logits_SV, temperature, uniform_S, K)
    logp_SV = (logits_SV.double() / (temperature or 1)).log_softmax(-1)
    for s in range(S):
        token, p_V = int(token_S[s]), logp_SV[s].exp()
        assert p_V[token] > 0 and math.isclose(logp_S[s], logp_SV[s, token], abs_tol=1e-4)
        assert math.isclose(entropy_S[s], torch.special.entr(p_V).sum(), abs_tol=1e-4)
        assert torch.equal(logits_SV[s, topk_SK[s]], logits_SV[s].topk(K).values)
        assert len(set(topk_SK[s].tolist())) == K
        if temperature == 0:
            assert logits_SV[s, token] == logits_SV[s].max()
        else:
            before = p_V[:token].sum()
            assert before - 1e-6 <= uniform[s] <= before + p_V[token] + 1e-6


@prop("rollout.generate", "rollout.prefill", "rollout.decode_step", examples=30, family=families,
      prompts=prompts_of_ids, decode=st.sampled_from([None, fast_decode]), seed=seeds,
      limit=st.integers(1, 8), batch_size=st.integers(1, 5),
      temperature=st.sampled_from([0, 0.7, 1.0]), vocab_size=st.sampled_from([None, 61, 20]),
      eos=st.sets(st.integers(0, 60), max_size=25))
def test_rollouts_are_well_formed_and_scored_as_a_full_forward(
    family, prompts, decode, limit, batch_size, seed, temperature, vocab_size, eos
):
    model, V = tiny(family), vocab_size or VOCABULARY
    options = {"max_new_tokens": limit, "eos_ids": iter(eos), "pad_id": 3, "top_k": 2,
               "temperature": temperature, "vocab_size": vocab_size, "decode": decode}  # fmt: skip
    before = copy.deepcopy(prompts)
    out = rollout.generate(model, prompts, **options, generator=seeded(seed))
    assert prompts == before and len(out.ids_BT) == len(prompts)
    with torch.no_grad():
        logits_BTV = model(out.ids_BT).logits[..., :V].double() / (temperature or 1)
    logp_BTV = logits_BTV.log_softmax(-1)
    for row, prompt in enumerate(prompts):
        mask_T, ids = out.response_mask_BT[row], out.ids_BT[row].tolist()
        start, length = len(prompt), int(mask_T.sum())
        assert ids[:start] == prompt and 1 <= length <= limit
        assert mask_T.nonzero()[:, 0].tolist() == list(range(start, start + length))
        response = ids[start : start + length]
        assert set(ids[start + length :]) <= {3} and max(response) < V
        stopped = response[-1] in eos
        assert not eos & set(response[:-1]) and (stopped or length == limit)
        assert bool(out.truncated_B[row]) == (not stopped)
        for t, token in enumerate(response, start):
            assert math.isclose(out.logp_BT[row, t], logp_BTV[row, t - 1, token], abs_tol=2e-3)
            entropy = torch.special.entr(logp_BTV[row, t - 1].exp()).sum()
            assert math.isclose(out.entropy_BT[row, t], entropy, abs_tol=2e-3)
        for values_T in (out.logp_BT[row], out.entropy_BT[row], out.topk_ids_BTK[row]):
            assert not values_T[~mask_T].any()
    options["eos_ids"] = sorted(eos) * 2
    other = rollout.generate(model, prompts, **options, generator=seeded(seed),
                             batch_size=batch_size)  # fmt: skip
    assert torch.equal(other.ids_BT, out.ids_BT)


@prop("rollout.generate", examples=120, data=st.data(), prompts=prompts_of_ids)
def test_bad_input_of_generate(data, prompts):
    """An exception, or a valid result."""
    arguments = {"prompts": prompts, "max_new_tokens": 2, "eos_ids": [1], "pad_id": 0,
                 "temperature": 1.0, "top_k": 2, "batch_size": 2, "vocab_size": 50}  # fmt: skip
    name = data.draw(st.sampled_from(sorted(arguments)))
    bad = {
        "prompts": st.sampled_from([[], [[]], [[1], []], [[-1]], [[VOCABULARY]], [[2**70]], [[1.5]],
                                    [[NAN]], [[1], [2.0, 3]], [np.array([2, 3])],
                                    [torch.tensor([4])]]),
        "eos_ids": st.sampled_from([[], [-1], [10**9], 5, None, [1.5], [NAN], {2, 3}, (4,)]),
    }.get(name, st.sampled_from(BAD_NUMBERS + [None]))
    arguments[name] = data.draw(bad)
    # padding is only stored where all prompts are equally long
    assume(name != "pad_id" or len({len(prompt) for prompt in prompts}) > 1)
    before = copy.deepcopy(arguments)
    try:
        out = rollout.generate(tiny("qwen3"), **arguments)
    except Exception as error:
        assert not isinstance(error, AssertionError)
        return
    assert repr(arguments) == repr(before)
    number = arguments[name]
    if name in ("max_new_tokens", "temperature", "batch_size", "vocab_size", "top_k"):
        assert number is None or number >= 0, "not a number that means anything"
    assert finite(out.logp_BT, out.entropy_BT) and out.ids_BT.dtype == torch.int64
    assert out.ids_BT.min() >= 0 and out.ids_BT.max() < VOCABULARY
    assert out.response_mask_BT.any(dim=1).all()
    if name == "prompts":
        assert all(out.ids_BT[row, : len(p)].tolist() == list(p) for row, p in enumerate(number))


@prop("rollout.SlotCache", examples=60, slots=st.integers(1, 4), columns=st.integers(1, 6),
      seed=seeds, data=st.data(), autocast=st.booleans())
def test_a_slot_cache_holds_what_was_written(slots, columns, seed, data, autocast):
    """Against a dictionary: prompts, single columns per row, rows that end; values of another width
    than keys, and autocast's type."""
    cache, model, g = rollout.SlotCache(slots, columns), {}, seeded(seed)
    zero, dtype = torch.zeros(2, 5), torch.bfloat16 if autocast else torch.float32
    for _ in range(data.draw(st.integers(1, 5))):
        first, width = data.draw(st.integers(0, slots - 1)), data.draw(st.integers(1, columns))
        live = data.draw(st.integers(first + 1, slots))
        if data.draw(st.booleans()):
            first, at = 0, [[data.draw(st.integers(0, width - 1))] for _ in range(live)]
            cache.writes = torch.arange(live)[:, None], torch.tensor(at)
        else:
            at = [list(range(width))] * (live - first)
            cache.writes = slice(first, live), slice(0, width)
        cache.reads = slice(first, live), slice(0, width)
        key = torch.randn(live - first, 2, len(at[0]), 3, generator=g)
        value = torch.randn(live - first, 2, len(at[0]), 2, generator=g)
        for row, slot in enumerate(range(first, live)):
            for q, column in enumerate(at[row]):
                model[slot, column] = torch.cat([key[row, :, q], value[row, :, q]], -1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            keys, values = cache.update(key, value, 0)
        assert keys.dtype == values.dtype == dtype and values.shape[3] == 2
        for row, slot in enumerate(range(first, live)):
            for column in range(width):
                stored = torch.cat([keys[row, :, column], values[row, :, column]], -1)
                assert torch.equal(stored, model.get((slot, column), zero).to(dtype))
        done = data.draw(st.lists(st.booleans(), min_size=live, max_size=live))
        kept = cache.retire(torch.tensor(done), width).tolist()
        assert sorted(kept) == [slot for slot in range(live) if not done[slot]]
        assert all(new == old for new, old in enumerate(kept) if not done[new]), "needless copy"
        moved = {(new, column): model.get((old, column), zero)
                 for new, old in enumerate(kept) for column in range(width)}  # fmt: skip
        model |= moved
    assert cache.get_seq_length() == 0


@prop("rollout.attention_mask", examples=30, seed=seeds, shape=st.tuples(small, small),
      eager=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_mask_allows_the_same_in_either_form(seed, shape, eager, dtype):
    config = SimpleNamespace(_attn_implementation="eager" if eager else "sdpa")
    allowed = torch.rand(shape, generator=seeded(seed)) < 0.5
    mask = rollout.attention_mask(SimpleNamespace(config=config, dtype=dtype), allowed)
    assert mask.shape == allowed.shape and mask.dtype == (dtype if eager else torch.bool)
    assert torch.equal(mask == 0 if eager else mask, allowed) and finite(mask.float())
