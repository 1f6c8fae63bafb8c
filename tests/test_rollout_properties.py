"""Properties of the public names of rollout."""

import copy
import functools
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
    near,
    prompts_of_ids,
    prop,
    refused_or,
    seeded,
    seeds,
    small,
    tiny,
)

import rollout

# ---------------------------------------------------------------------------------------- rollout




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


@prop("rollout.generate", "rollout.LlamaStep", examples=30, family=families, prompts=prompts_of_ids,
      limit=st.integers(1, 8), batch_size=st.integers(1, 5), seed=seeds,
      temperature=st.sampled_from([0, 0.7, 1.0]), vocab_size=st.sampled_from([None, 61, 20]),
      eos=st.sets(st.integers(0, 60), max_size=25))
def test_rollouts_are_well_formed_and_scored_as_a_full_forward(
    family, prompts, limit, batch_size, seed, temperature, vocab_size, eos
):
    model, V = tiny(family), vocab_size or VOCABULARY
    options = {"max_new_tokens": limit, "eos_ids": iter(eos), "pad_id": 3, "top_k": 2,
               "temperature": temperature, "vocab_size": vocab_size}  # fmt: skip
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


@prop("rollout.generate", "rollout.check_arguments", examples=120, data=st.data(),
      prompts=prompts_of_ids)
def test_bad_input_of_generate(data, prompts):
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
    assume(name not in ("max_new_tokens", "temperature", "top_k", "pad_id")
           or arguments[name] is not None)  # fmt: skip
    out = refused_or(functools.partial(rollout.generate, tiny("qwen3")), arguments)
    if out is not None:
        assert finite(out.logp_BT, out.entropy_BT) and out.ids_BT.dtype == torch.int64
        assert out.ids_BT.min() >= 0 and out.ids_BT.max() < VOCABULARY


@prop("rollout.check_model", examples=60, longest=st.integers(1, 600),
      limit=st.integers(1, 600), window=st.none() | st.integers(1, 600),
      kind=st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"]),
      implementation=st.sampled_from(["sdpa", "eager", "flash_attention_2"]))
def test_models_are_refused_for_what_their_config_says(
    longest, limit, window, kind, implementation
):
    model = copy.copy(tiny("qwen3"))
    model.config = copy.deepcopy(model.config)
    model.config.max_position_embeddings, model.config.sliding_window = limit, window
    model.config.layer_types = [kind, "full_attention"]
    model.config._attn_implementation = implementation
    too_long = longest > limit
    too_wide = kind == "sliding_attention" and window is not None and longest > window
    bad = implementation not in ("sdpa", "eager") or kind == "chunked_attention"
    try:
        rollout.check_model(model, longest)
        assert not (too_long or too_wide or bad)
    except ValueError:
        assert too_long or too_wide or bad


@prop("rollout.SlotCache", examples=60, slots=st.integers(1, 4), columns=st.integers(1, 6),
      seed=seeds, data=st.data())
def test_a_slot_cache_holds_what_was_written(slots, columns, seed, data):
    """Against a dictionary: prefill, single columns per row, moves."""
    cache, model, g = rollout.SlotCache(slots, columns), {}, seeded(seed)
    zero = torch.zeros(2, 6)
    for _ in range(data.draw(st.integers(1, 5))):
        first, width = data.draw(st.integers(0, slots - 1)), data.draw(st.integers(1, columns))
        live = data.draw(st.integers(first + 1, slots))
        if data.draw(st.booleans()):
            first, Q = 0, 1
            at = [data.draw(st.integers(0, width - 1)) for _ in range(live)]
            cache.select(live, width, torch.tensor([s * columns + c for s, c in enumerate(at)]))
        else:
            Q = width
            cache.select(live, width, None, first)
        key = torch.randn(live - first, 2, Q, 3, generator=g)
        value = torch.randn(live - first, 2, Q, 3, generator=g)
        for row, slot in enumerate(range(first, live)):
            for q in range(Q):
                column = q if Q > 1 or cache.place_S is None else at[slot]
                model[slot, column] = torch.cat([key[row, :, q], value[row, :, q]], -1)
        keys, values = cache.update(key, value, 0)
        for row, slot in enumerate(range(first, live)):
            for column in range(width):
                stored = torch.cat([keys[row, :, column], values[row, :, column]], -1)
                assert torch.equal(stored, model.get((slot, column), zero))
        source, target = data.draw(st.permutations(range(slots)))[:1], [0]
        cache.move(torch.tensor(source), torch.tensor(target), width)
        for column in range(width):
            model[0, column] = model.get((source[0], column), zero)
    assert cache.get_seq_length() == 0


@prop("rollout.attention_mask", examples=30, seed=seeds, shape=st.tuples(small, small),
      eager=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_mask_allows_the_same_in_either_form(seed, shape, eager, dtype):
    config = SimpleNamespace(_attn_implementation="eager" if eager else "sdpa")
    allowed = torch.rand(shape, generator=seeded(seed)) < 0.5
    mask = rollout.attention_mask(SimpleNamespace(config=config, dtype=dtype), allowed)
    assert mask.shape == allowed.shape and mask.dtype == (dtype if eager else torch.bool)
    assert torch.equal(mask == 0 if eager else mask, allowed) and finite(mask.float())


@prop("rollout.product", "rollout.rms_norm", "rollout.is_hooked", examples=40, seed=seeds,
      S=small, D=st.integers(1, 9), N=st.integers(1, 9), bias=st.booleans(), pack=st.booleans(),
      large=st.booleans())
def test_products_and_norms_equal_float64(seed, S, D, N, bias, pack, large):
    g = seeded(seed)
    x_SD, weight_ND = torch.randn(S, D, generator=g), torch.randn(N, D, generator=g)
    bias_N = torch.randn(N, generator=g) if bias else None
    limit, rollout.LARGE = rollout.LARGE, 0 if large else rollout.LARGE
    try:
        out_SN = rollout.product(weight_ND, bias_N, pack=pack)(x_SD)
    finally:
        rollout.LARGE = limit
    right_SN = x_SD.double() @ weight_ND.double().T + (bias_N.double() if bias else 0)
    near(out_SN, right_SN, torch.float32)
    norm = SimpleNamespace(weight=weight_ND[0], variance_epsilon=1e-6)
    scale_S1 = (x_SD.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    near(rollout.rms_norm(x_SD, norm), x_SD * scale_S1 * weight_ND[0].double(), torch.float32)
    module = torch.nn.Linear(1, 1)
    hooks = [module.register_forward_hook(print)] if bias else []
    hooks += [module.register_forward_pre_hook(print)] if pack else []
    assert rollout.is_hooked(module) == bool(hooks)
    for hook in hooks:
        hook.remove()
    assert not rollout.is_hooked(module)
