"""lgr against one plain forward pass per candidate, softmaxes in float64, hand-computed numbers."""

import contextlib
import functools
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lgr

FAMILIES = ["qwen3", "llama", "gpt2"]
LENGTHS = ((1, 5), (4, 2), (2, 6), (3, 1))  # (prompt, response) tokens per row
B, T, K = len(LENGTHS), max(map(sum, LENGTHS)), 3
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}


def case(lengths=LENGTHS, K=K, share=0.5, seed=5, high=VOCABULARY):
    """Ragged rollouts.  Triggered: a `share` of the response, its first and its last token (none at
    share 0), and a few tokens outside it, which must not count.  Half the groups hold the sampled
    token, half repeat a token; where nothing is triggered, the ids are no tokens at all."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(map(sum, lengths))
    t_T, first_B1 = torch.arange(T), torch.tensor([[p] for p, _ in lengths])
    end_B1 = torch.tensor([[p + r] for p, r in lengths])
    response_BT = (t_T >= first_B1) & (t_T < end_B1)
    trigger_BT = torch.rand(B, T, generator=g) < share
    if share:
        trigger_BT |= (t_T == first_B1) | (t_T == end_B1 - 1)
    else:
        trigger_BT = ~response_BT
    ids_BT = torch.randint(high, (B, T), generator=g)
    candidates_BTK = torch.randint(high, (B, T, K), generator=g)
    slot_BT1 = torch.randint(K, (B, T, 1), generator=g)
    holds_BT1 = torch.rand(B, T, 1, generator=g) < 0.5
    here_BTK = holds_BT1 & (torch.arange(K) == slot_BT1)
    candidates_BTK = torch.where(here_BTK, ids_BT[..., None], candidates_BTK)
    repeats_BT = torch.rand(B, T, generator=g) < 0.5
    candidates_BTK[..., -1] = torch.where(
        repeats_BT, candidates_BTK[..., 0], candidates_BTK[..., -1]
    )
    wanted_BT = trigger_BT & response_BT
    candidates_BTK[~wanted_BT] = 10**6
    return SimpleNamespace(
        ids_BT=ids_BT, response_BT=response_BT, trigger_BT=trigger_BT,
        candidates_BTK=candidates_BTK, wanted_BT=wanted_BT,
        sampled_BTK=wanted_BT[..., None] & (candidates_BTK == ids_BT[..., None]),
    )


def score(model, x, **more):
    return lgr.lookahead_confidence(
        model, x.ids_BT, x.response_BT, x.trigger_BT, x.candidates_BTK, **more
    )


def trunk(model, ids_BT, **more):
    """The pass over the rollouts that a caller has made already."""
    with torch.no_grad():
        out = model.base_model(input_ids=ids_BT, use_cache=True, **more)
    return {"cache": out.past_key_values, "hidden_BTD": out[0]}


def naive(model, x, signal="max_prob", vocab_size=None):
    """One forward pass of the whole model per candidate; nan where there is nothing to say."""
    value_BTK = torch.full(x.candidates_BTK.shape, math.nan, dtype=torch.float64)
    for b, t in x.wanted_BT.nonzero().tolist():
        following = x.ids_BT[b, t + 1 :][x.response_BT[b, t + 1 :]].tolist()
        for k, candidate in enumerate(x.candidates_BTK[b, t].tolist()):
            path = [*x.ids_BT[b, :t].tolist(), candidate]
            with torch.no_grad():
                logits_V = model(torch.tensor([path]), use_cache=False).logits[0, -1].double()
            prob_V = logits_V[:vocab_size].softmax(dim=-1)
            if signal == "max_prob":
                value_BTK[b, t, k] = prob_V.max()
            elif signal == "entropy":
                value_BTK[b, t, k] = (prob_V * prob_V.log()).sum()
            elif following:
                value_BTK[b, t, k] = prob_V[following[0]]
    return value_BTK


def assert_equal(mine, reference, tolerance=1e-5):
    assert torch.equal(mine.isnan(), reference.isnan())
    worst = (mine - reference).abs().nan_to_num().max().item()
    assert worst < tolerance, worst


def watch(model):
    """What every later forward pass of the backbone is given."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    return seen


def test_the_cases_hold_what_the_tests_claim():
    x = case()
    group_BT, first_BTK = x.sampled_BTK.any(-1), x.candidates_BTK[..., :1]
    assert group_BT[x.wanted_BT].any() and not group_BT[x.wanted_BT].all()
    assert (x.candidates_BTK[..., 1:] == first_BTK)[x.wanted_BT].any()
    assert (x.sampled_BTK.sum(-1) > 1).any()
    assert (x.trigger_BT & ~x.response_BT).any() and (x.response_BT & ~x.trigger_BT).any()
    for b, (prompt, response) in enumerate(LENGTHS):
        assert x.wanted_BT[b, prompt] and x.wanted_BT[b, prompt + response - 1]


# ----------------------------------------------------------------------------- tree confidences
PRECISIONS = [
    ("sdpa", torch.float32, 1e-5),
    ("sdpa", torch.float64, 1e-10),
    ("eager", torch.float32, 1e-5),
]


@pytest.mark.parametrize(
    "family, implementation, dtype, tolerance",
    [(family, *precision) for family in FAMILIES for precision in PRECISIONS]
    # Hugging Face's eager attention of the other two runs its softmax in float32
    + [("gpt2", "eager", torch.float64, 1e-10)],
)
def test_equals_a_forward_pass_per_candidate(family, implementation, dtype, tolerance):
    model, x = tiny_model(family).to(dtype), case()
    model.config._attn_implementation = implementation
    reference = naive(model, x)
    given_trunk = trunk(model, x.ids_BT)
    explicit = trunk(model, x.ids_BT, past_key_values=DynamicCache())
    for known in ({}, given_trunk, {"cache": given_trunk["cache"]}, explicit):
        for nodes in (0, 2, 7, 10**6):
            mine = score(model, x, nodes_per_slice=nodes, **known)
            assert mine.dtype == dtype and not mine.requires_grad
            assert_equal(mine, reference, tolerance)


@pytest.mark.parametrize("nodes", [1, 5, 4096])
def test_one_candidate_and_every_position(model, nodes):
    for x in (case(K=1), case(share=1.0), case(((1, 7),), K=2, share=1.0)):
        assert_equal(score(model, x, nodes_per_slice=nodes), naive(model, x))


def test_rows_of_many_leaves(model):
    """The longest has 160, and the rows finish one after another."""
    x = case(((1, 40), (9, 25), (3, 8)), K=4, share=1.0)
    reference = naive(model, x)
    for nodes in (30, 100, 4096):
        assert_equal(score(model, x, nodes_per_slice=nodes), reference)


@pytest.mark.parametrize("signal", lgr.SIGNALS)
def test_a_response_without_a_prompt(model, signal):
    """Its first candidate has nothing before it, and the token after the last column is not the
    one in the first."""
    x = case(((0, 6), (2, 4)), share=1.0)
    assert_equal(score(model, x, signal=signal), naive(model, x, signal))


def test_nothing_triggered_runs_nothing(model):
    seen, x = watch(model), case(share=0)
    assert x.trigger_BT.any(), "triggers outside the response do not count"
    assert score(model, x).isnan().all()
    x.trigger_BT.zero_()
    assert score(model, x).isnan().all()
    x = case(((1, 1), (3, 1)))  # what follows a last token is not known
    assert score(model, x, signal="sampled_prob").isnan().all()
    assert not seen
    score(model, x)
    assert seen


@pytest.mark.parametrize("with_trunk", [False, True])
@pytest.mark.parametrize("vocab_size", [None, 20])
@pytest.mark.parametrize("signal", lgr.SIGNALS)
def test_signals_and_a_smaller_vocabulary(model, signal, vocab_size, with_trunk):
    x = case(high=vocab_size or VOCABULARY)
    known = trunk(model, x.ids_BT) if with_trunk else {}
    reference = naive(model, x, signal, vocab_size)
    for chunk in (1, 4, 1024):
        mine = score(model, x, signal=signal, vocab_size=vocab_size, chunk=chunk, **known)
        assert_equal(mine, reference)
    if signal == "sampled_prob":
        for b, (prompt, response) in enumerate(LENGTHS):
            assert mine[b, prompt + response - 1].isnan().all()
    if signal == "max_prob" and vocab_size:
        assert (reference - naive(model, x)).nan_to_num().abs().max() > 1e-2


def test_default_signal_is_the_largest_probability(model):
    x = case()
    assert torch.equal(
        score(model, x).nan_to_num(), score(model, x, signal="max_prob").nan_to_num()
    )


@functools.cache
def gpt2():
    return tiny_model("gpt2")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=4),
    K=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    nodes=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
def test_any_ragged_batch_equals_a_forward_pass_per_candidate(lengths, K, share, nodes, seed):
    model, x = gpt2(), case(tuple(lengths), K, share, seed)
    assert_equal(score(model, x, nodes_per_slice=nodes), naive(model, x))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_candidate_changes_its_own_value_only(model, implementation):
    """To the bit: its siblings, the same row's other positions and the other rows do not see it."""
    model.config._attn_implementation = implementation
    x = case()
    before = score(model, x).nan_to_num()
    for b, t, k in (x.wanted_BT[..., None] & ~x.sampled_BTK).nonzero().tolist():
        old = x.candidates_BTK[b, t, k].item()
        new = next(i for i in range(VOCABULARY) if i not in (old, x.ids_BT[b, t].item()))
        x.candidates_BTK[b, t, k] = new
        after = score(model, x).nan_to_num()
        x.candidates_BTK[b, t, k] = old
        assert after[b, t, k] != before[b, t, k]
        after[b, t, k] = before[b, t, k]
        assert torch.equal(after, before)


def test_later_tokens_and_padding_are_not_seen(model):
    x = case(share=1.0)
    before = score(model, x)
    for p in range(T):
        changed = SimpleNamespace(**vars(x) | {"ids_BT": x.ids_BT.clone()})
        changed.ids_BT[:, p] = (x.ids_BT[:, p] + 1) % VOCABULARY
        after = score(model, changed)
        assert_equal(after[:, : p + 1], before[:, : p + 1], 1e-6)
        later_BT = x.wanted_BT & (torch.arange(T) > p)
        assert (after != before)[later_BT].all(), "what comes after it does see it"
    padding_BT = torch.arange(T) >= torch.tensor([[p + r] for p, r in LENGTHS])
    x.ids_BT[padding_BT] = (x.ids_BT[padding_BT] + 7) % VOCABULARY
    assert_equal(score(model, x), before, 1e-6)


# --------------------------------------------------------------------------------------- the cost
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_trunks_cache_is_only_read(model, implementation):
    model.config._attn_implementation = implementation
    x = case()
    known = trunk(model, x.ids_BT)
    copies = [(layer.keys.clone(), layer.values.clone()) for layer in known["cache"].layers]
    first = score(model, x, nodes_per_slice=5, **known).nan_to_num()
    for (keys, values), layer in zip(copies, known["cache"].layers, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
    assert known["cache"].get_seq_length() == T
    assert torch.equal(first, score(model, x, nodes_per_slice=5, **known).nan_to_num())


@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 20, 10**6])
@pytest.mark.parametrize("trunk_known", ["hidden", "cache", "nothing"])
def test_every_leaf_once_in_short_slices(model, trunk_known, nodes):
    """The sampled token's leaf is the trunk's own where its hidden states are known."""
    x = case(share=0.7)
    known = {} if trunk_known == "nothing" else trunk(model, x.ids_BT)
    if trunk_known == "cache":
        del known["hidden_BTD"]
    computed_BTK = x.wanted_BT[..., None].expand_as(x.candidates_BTK)
    if trunk_known != "cache":
        computed_BTK = computed_BTK & ~x.sampled_BTK
        assert computed_BTK.sum() < x.wanted_BT.sum() * x.candidates_BTK.shape[2]
    seen = watch(model)
    score(model, x, nodes_per_slice=nodes, **known)
    if trunk_known == "nothing":
        assert seen.pop(0)["input_ids"].shape == x.ids_BT.shape
    leaves = []
    for call in seen:
        ids_RQ, position_RQ = call["input_ids"], call["position_ids"]
        (R, Q), reach = ids_RQ.shape, position_RQ.max().item()
        assert R * Q <= nodes
        assert call["attention_mask"].shape == (R, 1, Q, reach + Q)
        real_RQ = position_RQ > 0  # no prompt is empty here: position 0 fills up short rows
        leaves += zip(position_RQ[real_RQ].tolist(), ids_RQ[real_RQ].tolist(), strict=True)
    _, column_N, _ = computed_BTK.nonzero(as_tuple=True)
    tokens_N = x.candidates_BTK[computed_BTK]
    assert sorted(leaves) == sorted(zip(column_N.tolist(), tokens_N.tolist(), strict=True))
    assert nodes < 10**6 or len(seen) == 1


@pytest.mark.parametrize("nodes", [1, 3, 20, 64])
def test_padding_counts_as_nodes(model, nodes):
    """One long row among many short ones: bounding leaves alone would pad all to the longest. And
    a pass is full as long as there are leaves for it."""
    x = case(((2, 40), *[(2, 1)] * 9), K=4, share=1.0)
    whole, seen = score(model, x), watch(model)
    assert_equal(score(model, x, nodes_per_slice=nodes), whole)
    sizes = [call["input_ids"].numel() for call in seen[1:]]
    leaves = int((x.wanted_BT[..., None] & ~x.sampled_BTK).sum())
    assert max(sizes) <= nodes and leaves > 100
    assert len(sizes) <= 1.4 * leaves / nodes + 4


def test_a_pass_takes_an_eighth_of_the_trunk_from_a_row():
    """Its leaves branch off neighbouring columns, or its mask would be as wide as the trunk."""
    model, x = tiny_model("qwen3"), case(((0, 640),), K=2, share=1.0)
    seen = watch(model)
    score(model, x)
    passes = [call["position_ids"][0] for call in seen[1:]]
    columns = torch.cat(passes).tolist()
    assert columns == sorted(columns) and max(map(len, passes)) == 640 // 8
    assert sum(map(len, passes)) == int((x.wanted_BT[..., None] & ~x.sampled_BTK).sum())


def test_no_more_logits_than_a_chunk(model):
    """Nothing with a vocabulary axis but the head itself exceeds chunk x V numbers."""
    x, weight_VD = case(), model.get_output_embeddings().weight
    head = weight_VD.untyped_storage().data_ptr()

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for y in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(y, torch.Tensor) and VOCABULARY in y.shape:
                    if y.untyped_storage().data_ptr() != head:
                        self.numel = max(self.numel, y.numel())
            return out

    for signal in lgr.SIGNALS:
        for chunk in (1, 4):
            with Largest() as seen:
                score(model, x, signal=signal, chunk=chunk)
            assert seen.numel == chunk * VOCABULARY
    with Largest() as seen:  # the measure sees the logits of all leaves where they exist
        score(model, x)
    assert seen.numel == (x.wanted_BT[..., None] & ~x.sampled_BTK).sum() * VOCABULARY


# -------------------------------------------------------------------------------------- refusals
def mistral(window):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()


def sliding_qwen3(window):
    more = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": window}
    return tiny_model("qwen3", **more)


@pytest.mark.parametrize("make", [mistral, sliding_qwen3])
def test_a_sliding_window_must_cover_the_trunk(make):
    x = case()
    with pytest.raises(ValueError, match=f"cache lacks some of {B} rows of {T} tokens"):
        score(make(T - 1), x)
    model = make(T + 1)
    assert_equal(score(model, x), naive(model, x))
    # as long as the trunk will do if the cache keeps every column, and does not if it drops one
    model = make(T)
    known = trunk(model, x.ids_BT, past_key_values=DynamicCache())
    assert_equal(score(model, x, **known), naive(model, x))
    with pytest.raises(ValueError, match="cache lacks some"):
        score(model, x, **trunk(model, x.ids_BT))


def flash_attention():
    model = tiny_model("qwen3")
    model.config._attn_implementation = "flash_attention_2"
    return model


def encoder_decoder():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))


def no_position_ids():
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, **sizes))


def hybrid():
    return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))


def local():
    """GPT-Neo's config has no sliding window, but names its layers."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    config = {"attention_types": [[["local"], 2]], "window_size": 3, "initializer_range": 0.3}
    return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=VOCABULARY, **sizes, **config))


@pytest.mark.parametrize(
    "make, name",
    [
        (flash_attention, "Qwen3ForCausalLM"),
        (encoder_decoder, "T5ForConditionalGeneration"),
        (no_position_ids, "BloomForCausalLM"),
        (hybrid, "Lfm2ForCausalLM"),
        (local, "GPTNeoForCausalLM"),
        (lambda: mistral(4), "MistralForCausalLM"),
        (lambda: sliding_qwen3(7), "Qwen3ForCausalLM"),
    ],
)
def test_models_that_would_come_out_wrong_are_refused(make, name):
    with pytest.raises(ValueError, match=f"^{name} is not supported: "):
        lgr.self_check(make().eval())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"response_mask_BT": torch.ones(B, T)}, "must be bool"),
        ({"response_mask_BT": torch.ones(B, 1, dtype=torch.bool)}, rf"bool \[{B}, 1\]"),
        ({"trigger_BT": torch.ones(B, T).long()}, r"must be bool \[B, T\], not torch.int64"),
        ({"trigger_BT": torch.ones(B - 1, T, dtype=torch.bool)}, "must be bool"),
        ({"candidates_BTK": torch.zeros(B, T, dtype=torch.int64)}, None),
        ({"candidates_BTK": torch.zeros(B, T + 1, K).long()}, None),
        ({"candidates_BTK": torch.full((B, T, K), VOCABULARY)}, None),
        ({"candidates_BTK": torch.full((B, T, K), -1)}, None),
        ({"candidates_BTK": torch.zeros(B, T, K)}, None),
        ({"ids_BT": torch.zeros(T, dtype=torch.int64)}, None),
        (
            {"candidates_BTK": torch.zeros(B, T, K).long(), "ids_BT": torch.full((B, T), 30),
             "signal": "sampled_prob", "vocab_size": 20},
            None,
        ),
        ({"signal": "logit"}, "logit"),
        ({"chunk": 0}, None),
        ({"vocab_size": 0}, None),
    ],
)
def test_bad_arguments(change, message):
    """Most are refused by torch."""
    x = case()
    arguments = {
        "ids_BT": x.ids_BT, "response_mask_BT": x.response_BT, "trigger_BT": x.trigger_BT,
        "candidates_BTK": x.candidates_BTK,
    }
    with pytest.raises((ValueError, RuntimeError, IndexError, KeyError, TypeError), match=message):
        lgr.lookahead_confidence(gpt2(), **arguments | change)


def test_a_cache_of_another_trunk_is_refused(model):
    x = case()
    for ids_BT in (x.ids_BT[:, :-1], x.ids_BT[:-1], x.ids_BT.repeat(2, 1)):
        with pytest.raises(ValueError, match=f"cache lacks some of {B} rows of {T} tokens"):
            score(model, x, cache=trunk(model, ids_BT)["cache"])
    known = trunk(model, x.ids_BT)
    with pytest.raises(IndexError):
        score(model, x, **known | {"hidden_BTD": known["hidden_BTD"][:, :1]})
    with pytest.raises((TypeError, AttributeError)):
        score(model, x, cache=DynamicCache(config=model.config))  # nothing in it yet
    known["cache"].layers.append(known["cache"].layers[0])
    with pytest.raises(ValueError, match="cache was used in 2 of 3 layers"):
        score(model, x, **known)


def test_a_longer_cache_of_the_same_rows_will_do(model):
    """Columns beyond the trunk are not seen."""
    x = case()
    longer_BT = torch.cat([x.ids_BT, x.ids_BT[:, :2]], dim=1)
    mine = score(model, x, cache=trunk(model, longer_BT)["cache"])
    assert_equal(mine, naive(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_self_check_passes(model, implementation, dtype):
    model.config._attn_implementation = implementation
    lgr.self_check(model.to(dtype))


def break_tree(model, monkeypatch, **wrong):
    """A model that takes an argument of the tree and makes something else of it."""
    forward = model.base_model.forward

    @functools.wraps(forward)  # keeps the signature, so that only running it can tell
    def broken(input_ids=None, **arguments):
        if arguments.get("attention_mask") is not None:
            arguments |= {name: change(arguments[name]) for name, change in wrong.items()}
        return forward(input_ids=input_ids, **arguments)

    monkeypatch.setattr(model.base_model, "forward", broken)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_mask": torch.ones_like},  # all see all
        {"attention_mask": lambda mask: mask.float()},  # added to the scores, as eager does
        {"position_ids": lambda ids_RQ: torch.arange(ids_RQ.shape[1]).expand_as(ids_RQ)},
        {"position_ids": lambda ids_RQ: ids_RQ + 1},
    ],
    ids=["mask", "added", "positions", "shifted"],
)
def test_self_check_finds_what_no_config_says(model, wrong, monkeypatch):
    break_tree(model, monkeypatch, **wrong)
    with pytest.raises(ValueError, match=f"^{type(model).__name__} is not supported: tree"):
        lgr.self_check(model)


def test_self_check_finds_a_head_that_is_more_than_a_matrix():
    """Gemma 2 squashes its logits; reading hidden @ weight.T would miss that."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": VOCABULARY, "head_dim": 8, "initializer_range": 0.3}
    for cap, fails in ((None, False), (1.0, True)):
        config = Gemma2Config(**sizes, sliding_window=64, final_logit_softcapping=cap,
                              attn_logit_softcapping=None)
        model = Gemma2ForCausalLM(config).eval()
        model.config._attn_implementation = "eager"
        with pytest.raises(ValueError, match="Gemma2") if fails else contextlib.nullcontext():
            lgr.self_check(model)


# --------------------------------------------------------------------------------------- rewards
def test_trigger_is_strict_and_inside_the_response():
    entropy = torch.tensor([[0.1, 0.25, 0.3, 9.0], [0.25, 0.26, 0.0, 0.5]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    fired = lgr.trigger(entropy, mask, 0.25)
    assert fired.tolist() == [[False, False, True, False], [False, True, False, True]]
    # default 0.2
    mask = torch.ones(2, dtype=torch.bool)
    assert lgr.trigger(torch.tensor([0.19, 0.21]), mask).tolist() == [False, True]


def test_group_reward_by_hand():
    """mean 0.5, deviations 0.3 -0.1 -0.2, variance (0.09 + 0.01 + 0.04) / 2 = 0.07."""
    group = torch.tensor([[[0.8, 0.4, 0.3]]], dtype=torch.float64)
    away = torch.tensor([[[0.3, -0.1, -0.2]]], dtype=torch.float64)
    assert torch.allclose(lgr.group_reward(group), away / (math.sqrt(0.07) + 1e-6), rtol=1e-12)
    tenth = lgr.group_reward(group, eps=0.1)
    assert torch.allclose(tenth, away / (math.sqrt(0.07) + 0.1), rtol=1e-12)
    assert torch.allclose(lgr.group_reward(group, normalize="mean"), away, rtol=1e-12)
    assert torch.allclose(lgr.group_reward(group, normalize="mean", eps=0.1), away, rtol=1e-12)


def random_groups(K, dtype=torch.float64):
    g = torch.Generator().manual_seed(K)
    return torch.rand(6, 5, K, dtype=dtype, generator=g)


@pytest.mark.parametrize("K", [2, 3, 8])
def test_groups_have_mean_0_and_unbiased_deviation_1(K):
    c = random_groups(K)
    reward = lgr.group_reward(c)
    deviation = ((c - c.sum(-1, keepdim=True) / K) ** 2).sum(-1).div(K - 1).sqrt()
    assert reward.sum(-1).abs().max() < 1e-6
    mine = ((reward**2).sum(-1) / (K - 1)).sqrt()
    assert ((1 - mine).abs() <= 2e-6 / deviation).all()
    assert torch.equal(reward.argsort(-1), c.argsort(-1))
    # the unit goes with eps 0 only; without a deviation it stays
    exact = lgr.group_reward(c, eps=0)
    assert torch.allclose(lgr.group_reward(5 * c + 3, eps=0), exact, rtol=1e-9, atol=1e-9)
    centred = lgr.group_reward(c, normalize="mean")
    shifted = lgr.group_reward(5 * c + 3, normalize="mean")
    assert torch.allclose(shifted, 5 * centred, rtol=1e-9, atol=1e-9)
    assert torch.allclose(lgr.group_reward(c + 3), reward, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_confidences_get_exactly_nothing(dtype, normalize, eps):
    constants = [0.0, 1.0, 0.1, 1 / 3, 0.7, 1e-30, 1 - 2**-24, -2.3, *random_groups(7)[0, 0]]
    for K in range(1, 10):
        for constant in constants:
            group = torch.full((2, K), float(constant), dtype=dtype)
            reward = lgr.group_reward(group, normalize=normalize, eps=eps)
            assert reward.dtype == dtype and (reward == 0).all()


@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_groups_with_a_nan_or_one_candidate_get_nothing(normalize, dtype):
    c = random_groups(4, torch.float64).to(dtype)
    clean = lgr.group_reward(c, normalize=normalize)
    c[0, 0, 0] = c[1, 2, 3] = math.nan
    c[2, 1] = math.nan
    reward = lgr.group_reward(c, normalize=normalize)
    for b, t in ((0, 0), (1, 2), (2, 1)):
        assert (clean[b, t] != 0).any()
        clean[b, t] = 0
    assert reward.dtype == dtype and torch.equal(reward, clean)
    alone = lgr.group_reward(c[..., :1], normalize=normalize)
    assert alone.shape == (6, 5, 1) and (alone == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalize": "max"}, "normalize must be .* not 'max'"),
        ({"normalize": None}, "normalize must be .* not None"),
        ({"eps": -1e-9}, "eps >= 0, not 'std', -1e-09"),
        ({"eps": math.nan}, "eps >= 0, not 'std', nan"),
    ],
)
def test_bad_arguments_of_the_reward(change, message):
    with pytest.raises(ValueError, match=message):
        lgr.group_reward(torch.rand(2, 3), **change)


def test_an_infinite_confidence_makes_no_group():
    groups = torch.tensor([[0.1, math.inf], [0.1, -math.inf], [math.inf, math.inf]])
    assert lgr.group_reward(groups).tolist() == [[0.0, 0.0]] * 3


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 5).flatmap(
        lambda K: st.lists(
            st.lists(st.floats(0, 1) | st.just(math.nan), min_size=K, max_size=K),
            min_size=1, max_size=4,
        )
    ),
    eps=st.sampled_from([1e-6, 1e-3, 1.0]),
)
def test_any_group_equals_exact_arithmetic(groups, eps):
    reward = lgr.group_reward(torch.tensor(groups, dtype=torch.float64), eps=eps)
    centred = lgr.group_reward(torch.tensor(groups, dtype=torch.float64), normalize="mean")
    for group, mine, away in zip(groups, reward.tolist(), centred.tolist(), strict=True):
        if len(group) == 1 or any(map(math.isnan, group)):
            assert mine == away == [0.0] * len(group)
            continue
        mean, deviation = statistics.mean(group), statistics.stdev(group)  # exact rationals inside
        expected = [(c - mean) / (deviation + eps) for c in group]
        assert mine == pytest.approx(expected, abs=1e-9)
        assert away == pytest.approx([c - mean for c in group], abs=1e-15)


def test_sampled_reward_by_hand():
    reward = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 8.0, 9.0], [1.5, 2.5, 3.5]]])
    candidates = torch.tensor([[[5, 6, 7], [5, 5, 6]], [[9, 8, 8], [0, 1, 2]]])
    ids = torch.tensor([[7, 5], [8, 3]])  # last, first of two, first of two, not in the group
    assert lgr.sampled_reward(reward, candidates, ids).tolist() == [[3.0, 4.0], [8.0, 0.0]]
    for few in (reward[..., :1], reward[:, :1], ids):
        with pytest.raises(ValueError, match="ids_BT .* does not fit"):
            lgr.sampled_reward(few, candidates, ids)
    one = lgr.sampled_reward(reward[..., :1].double(), candidates[..., :1], ids)
    assert one.dtype == torch.float64 and one.tolist() == [[0.0, 4.0], [0.0, 0.0]]


# -------------------------------------------------------------------------------- variant lgr_topk
def logits_of_both(seed=0, V=12, dtype=torch.float64):
    """Student and teacher [2, 5, V], near enough for their best tokens to overlap."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(2, 5, V, dtype=dtype, generator=g)
    apart = torch.randn(2, 2, 5, V, dtype=dtype, generator=g)
    return shared + apart[0], shared + apart[1]


def union_loss(student_BTV, teacher_BTV, k, reward_BTK=None):
    """As a caller puts the two together: the reward belongs to the student's tokens."""
    ids_BTU, valid_BTU = lgr.union_candidates(
        student_BTV.topk(k).indices, teacher_BTV.topk(k).indices
    )
    if reward_BTK is not None:
        reward_BTK = torch.cat([reward_BTK, torch.zeros_like(reward_BTK)], dim=-1)
    student_BTU = student_BTV.log_softmax(-1).gather(-1, ids_BTU)
    teacher_BTU = teacher_BTV.log_softmax(-1).gather(-1, ids_BTU)
    return lgr.topk_loss(student_BTU, teacher_BTU, valid_BTU, reward_BTK)


def dense_loss(student_BTV, teacher_BTV, k, reward_BTK=None):
    """The definition, position by position, with sets."""
    rows = []
    for b in range(student_BTV.shape[0]):
        for t in range(student_BTV.shape[1]):
            p_V, q_V = student_BTV[b, t].softmax(-1), teacher_BTV[b, t].softmax(-1)
            best = p_V.topk(k).indices.tolist()
            union = sorted({*best, *q_V.topk(k).indices.tolist()})
            bonus = {} if reward_BTK is None else dict(zip(best, reward_BTK[b, t], strict=True))
            p_all, q_all = sum(p_V[i] for i in union), sum(q_V[i] for i in union)
            terms = []
            for i in union:
                p, q = p_V[i] / p_all, q_V[i] / q_all
                terms.append(p * (p.log() - q.log() - bonus.get(i, 0.0)))
            rows.append(sum(terms))
    return torch.stack(rows).view(student_BTV.shape[:2])


def test_union_by_hand():
    student = torch.tensor([[[5, 3, 8], [1, 2, 3]]])
    teacher = torch.tensor([[[3, 9, 5], [4, 5, 6]]])
    ids, valid = lgr.union_candidates(student, teacher)
    assert ids.tolist() == [[[5, 3, 8, 3, 9, 5], [1, 2, 3, 4, 5, 6]]]
    assert valid.tolist() == [[[True, True, True, False, True, False], [True] * 6]]
    ids, valid = lgr.union_candidates(student[..., :2], teacher[..., :1])  # K may differ
    assert ids.tolist() == [[[5, 3, 3], [1, 2, 4]]]
    assert valid.tolist() == [[[True, True, False], [True, True, True]]]


@pytest.mark.parametrize("with_reward", [False, True])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_topk_loss_equals_the_definition(k, with_reward):
    student, teacher = logits_of_both()
    g = torch.Generator().manual_seed(1)
    reward = torch.randn(2, 5, k, dtype=torch.float64, generator=g) if with_reward else None
    student_ids, teacher_ids = student.topk(k).indices, teacher.topk(k).indices
    repeats = (student_ids[..., None] == teacher_ids[..., None, :]).sum()
    assert 0 < repeats and (k == 12 or repeats < 10 * k), "tokens in one list, tokens in both"
    results = []
    for loss_of in (union_loss, dense_loss):
        s = student.clone().requires_grad_()
        loss = loss_of(s, teacher, k, reward)
        (loss * torch.arange(1.0, 11).view(2, 5)).sum().backward()
        results.append((loss.detach(), s.grad))
    for mine, reference in zip(*results, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-10, atol=1e-12)
    assert torch.isfinite(results[0][1]).all()
    assert k == 1 or results[0][1].abs().max() > 1e-2


def flat_case():
    """Log-probs over U = 6 slots, two of them repeats, and a reward."""
    g = torch.Generator().manual_seed(3)
    student, teacher, reward = torch.randn(3, 4, 6, dtype=torch.float64, generator=g)
    valid = torch.tensor([True, True, False, True, True, False]).expand(4, 6)
    return student.log_softmax(-1), teacher.log_softmax(-1), valid, reward


def test_topk_loss_gradcheck():
    student, teacher, valid, reward = flat_case()
    assert torch.autograd.gradcheck(
        lambda s: lgr.topk_loss(s, teacher, valid, reward), student.requires_grad_()
    )


def test_repeated_tokens_count_for_nothing():
    """Whatever stands in their slots, and no nan in the gradient."""
    student, teacher, valid, reward = flat_case()
    expected = lgr.topk_loss(*(x[:, valid[0]] for x in (student, teacher, valid, reward)))
    for junk in (0.0, 50.0, -math.inf):
        s = student.masked_fill(~valid, junk).requires_grad_()
        loss = lgr.topk_loss(
            s, teacher.masked_fill(~valid, junk), valid, reward.masked_fill(~valid, junk)
        )
        assert torch.allclose(loss, expected, rtol=1e-12)
        loss.sum().backward()
        assert torch.isfinite(s.grad).all() and (s.grad[~valid] == 0).all()
        assert (s.grad[valid] != 0).all()


def test_equal_models_without_reward_have_no_loss():
    student, _, valid, _ = flat_case()
    student.requires_grad_()
    loss = lgr.topk_loss(student, student.detach() - 0.7, valid)
    loss.sum().backward()
    assert loss.abs().max() < 1e-12 and student.grad.abs().max() < 1e-12


def test_mass_outside_the_union_changes_nothing():
    student, teacher, valid, reward = flat_case()
    results = []
    for shift in (0.0, -5.0, 0.3):
        s = (student + shift).requires_grad_()
        loss = lgr.topk_loss(s, teacher - shift, valid, reward)
        loss.sum().backward()
        results.append((loss.detach(), s.grad))
    for loss, gradient in results[1:]:
        assert torch.allclose(loss, results[0][0], rtol=1e-12, atol=1e-12)
        assert torch.allclose(gradient, results[0][1], rtol=1e-12, atol=1e-12)
    assert results[0][1].sum(-1).abs().max() < 1e-12


def test_the_optimum_is_the_teacher_tilted_by_the_reward():
    """Gibbs: p_S = p_T exp(r) / Z minimises it, and the minimum is -log Z."""
    _, teacher, valid, reward = flat_case()
    tilted = (teacher.exp() * reward.exp()).masked_fill(~valid, 0.0)
    Z = tilted.sum(-1) / teacher.exp().masked_fill(~valid, 0.0).sum(-1)
    free = torch.zeros_like(teacher).requires_grad_()
    for _ in range(400):
        loss = lgr.topk_loss(free, teacher, valid, reward)
        (gradient,) = torch.autograd.grad(loss.sum(), free)
        free = (free - gradient).detach().requires_grad_()
    found = free.detach().masked_fill(~valid, -math.inf).softmax(-1)
    assert (found - tilted / tilted.sum(-1, keepdim=True)).abs().max() < 1e-3
    assert (loss + Z.log()).abs().max() < 1e-3
