"""rollout.generate against `model.generate`, full forwards and exact frequencies."""

import math
import warnings

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rollout

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3], [3, 3], [2, 2, 2, 2], [40], [41, 8]]
EOS = [11, 12, 13]


def sample(model, prompts=PROMPTS, **more):
    """`generate` with the defaults of these tests and a fresh generator of a given seed."""
    seed = more.pop("seed", 0)
    settings = {"max_new_tokens": 24, "eos_ids": EOS, "pad_id": 0} | more
    return rollout.generate(
        model, prompts, generator=torch.Generator().manual_seed(seed), **settings
    )


def response(out, row):
    """The response ids of one row."""
    return out.ids_BT[row][out.response_mask_BT[row]].tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [None, 3, 1])
def test_greedy_equals_generate_row_by_row(model, implementation, batch_size):
    model.config._attn_implementation = implementation
    out = sample(model, temperature=0, batch_size=batch_size)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=EOS,
            pad_token_id=0,
        )[0]
        used = len(prompt) + len(response(out, row))
        assert out.ids_BT[row, :used].tolist() == expected.tolist()
        assert not out.response_mask_BT[row, : len(prompt)].any()
        assert (out.ids_BT[row, used:] == 0).all()
        assert out.truncated_B[row] == (expected[-1].item() not in EOS)
        lengths.add(used - len(prompt))
    assert len(lengths) > 1, "rows must end at different steps, or retiring is not tested"


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_statistics_equal_one_full_forward(model, temperature):
    out = sample(model, temperature=temperature, top_k=5, batch_size=3)
    for row, prompt in enumerate(PROMPTS):
        used = len(prompt) + len(response(out, row))
        with torch.no_grad():
            logits_TV = model(out.ids_BT[row : row + 1, :used]).logits[0]
        logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        for t in range(len(prompt), used):
            here = logp_TV[t - 1]
            assert abs(out.logp_BT[row, t] - here[out.ids_BT[row, t]]) < 1e-4
            assert abs(out.entropy_BT[row, t] + (here.exp() * here).sum()) < 1e-4
            best = here.topk(5)
            assert torch.allclose(here[out.topk_ids_BTK[row, t]], best.values, atol=1e-4)
        outside = ~out.response_mask_BT[row]
        assert (out.logp_BT[row][outside] == 0).all() and (out.entropy_BT[row][outside] == 0).all()


def test_response_mask_includes_the_stop_token(model):
    out = sample(model, max_new_tokens=60)
    stopped = [row for row in range(len(PROMPTS)) if not out.truncated_B[row]]
    assert stopped, "some row must stop by itself"
    for row in stopped:
        ids = response(out, row)
        assert ids[-1] in EOS and not set(ids[:-1]) & set(EOS)


def test_a_stop_token_in_the_last_place_is_no_truncation(model):
    anything = range(VOCABULARY)
    assert not sample(model, max_new_tokens=1, eos_ids=anything).truncated_B.any()
    assert sample(model, max_new_tokens=1, eos_ids=[]).truncated_B.all()


def test_sampled_frequencies_match_the_softmax():
    """Chi-square over 40,000 draws of one position; with the seed fixed the verdict is fixed too,
    and a right sampler fails it for one seed in a million (Wilson-Hilferty, z = 4.75)."""
    model, draws = tiny_model("qwen3", vocab_size=17), 40_000
    out = rollout.generate(
        model, [[3, 4]] * draws, max_new_tokens=1, eos_ids=[], pad_id=0, top_k=1,
        generator=torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        expected = draws * torch.softmax(model(torch.tensor([[3, 4]])).logits[0, -1], -1).double()
    counts = torch.bincount(out.ids_BT[:, 2], minlength=17).double()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = 16
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < 4.75, f"chi2 {chi2:.1f} on {freedom} degrees of freedom"
    # the same statistic rejects a sampler that cuts the least likely half of the vocabulary
    cut = expected.clone()
    cut[expected.argsort()[:8]] = 0
    cut *= draws / cut.sum()
    assert ((cut - expected) ** 2 / expected).sum() > 2 * chi2 + 100


def test_same_seed_same_rollouts_other_seed_others(model):
    first, again, other = sample(model), sample(model), sample(model, seed=1)
    for mine, same in zip(vars(first).values(), vars(again).values(), strict=True):
        assert torch.equal(mine, same)
    assert response(first, 0) != response(other, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_neighbours(model, temperature):
    """Whatever the batch size, the order of refilling and the other rows.  In float64 the noise of
    batched matrix products is too small to flip a draw."""
    model = model.double()
    whole = sample(model, temperature=temperature)
    for batch_size in (1, 2, 3, 5):
        out = sample(model, temperature=temperature, batch_size=batch_size)
        assert [response(out, r) for r in range(len(PROMPTS))] == [
            response(whole, r) for r in range(len(PROMPTS))
        ]
    half = sample(model, PROMPTS[:3], temperature=temperature)
    assert [response(half, r) for r in range(3)] == [response(whole, r) for r in range(3)]


def test_cumulative_sum_never_draws_an_impossible_token():
    """At both ends of [0, 1): tokens of probability 0 (here ids 0, 2, 4) stay undrawn."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(2, 1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token, logp, entropy, topk = rollout.sample_token(logits, 1.0, uniform, 2)
    assert token.tolist() == [1, 3]
    assert torch.allclose(entropy, torch.tensor(2.0).log()) and sorted(topk[0].tolist()) == [1, 3]


def test_vocab_size_cuts_the_distribution(model):
    cut = 20
    out = sample(model, [[5, 6], [VOCABULARY - 1]], vocab_size=cut, eos_ids=[], top_k=3)
    ids = out.ids_BT[out.response_mask_BT]  # a prompt may hold what is not sampled
    assert ids.max() < cut and out.topk_ids_BTK.max() < cut
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(out.ids_BT[:1]).logits[0, :, :cut], dim=-1)
    assert abs(out.logp_BT[0, 2] - logp_TV[1, out.ids_BT[0, 2]]) < 1e-4


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
FAMILIES = {
    "attention biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama 3 positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "gelu": (LlamaConfig, LlamaForCausalLM, {"hidden_act": "gelu"}),
    "one key head": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 12}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3 with yarn": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "rope_parameters": YARN}),
    "tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": True}),
}  # fmt: skip


def family(name):
    """A random model of a family, with biases and norms that are not 0 and 1."""
    config, kind, more = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(config(**(SIZES | more))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("most_copied", [0, 2**26])
@pytest.mark.parametrize("name", FAMILIES)
def test_our_decoding_step_is_the_models(name, most_copied, monkeypatch):
    """Rollouts by LlamaStep and by the model's own forward: the same tokens and statistics, in
    float64 and with matrices put together or not; it does run, and has nothing to warn of."""
    monkeypatch.setattr(rollout.LlamaStep, "MOST_COPIED", most_copied)
    model, calls = family(name).double(), []
    assert rollout.LlamaStep.fits(model)
    backbone = rollout.LlamaStep.backbone
    monkeypatch.setattr(
        rollout.LlamaStep, "backbone",
        lambda self, *args: calls.append(self.fuse) or backbone(self, *args),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = sample(model, batch_size=4, max_new_tokens=30)
    assert len(calls) > 20 and set(calls) == {most_copied > 0}
    monkeypatch.setattr(rollout.LlamaStep, "fits", staticmethod(lambda model: False))
    theirs, count = sample(model, batch_size=4, max_new_tokens=30), len(calls)
    assert len(calls) == count and torch.equal(ours.ids_BT, theirs.ids_BT)
    for field in ("logp_BT", "entropy_BT"):
        assert torch.allclose(getattr(ours, field), getattr(theirs, field), atol=1e-5)
    assert torch.equal(ours.topk_ids_BTK, theirs.topk_ids_BTK)


@pytest.mark.parametrize("most_copied", [0, 2**30])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "biases", "tied"])
def test_large_matrices_in_float32_go_to_onednn(name, most_copied, monkeypatch):
    """Packed or as they are, with and without biases, for any number of rows: greedy rollouts are
    those of the model's own forward, statistics to 1e-4."""
    model = family(name)
    monkeypatch.setattr(rollout.LlamaStep, "fits", staticmethod(lambda model: False))
    theirs = sample(model, temperature=0)
    monkeypatch.undo()
    monkeypatch.setattr(rollout, "LARGE", 0)
    monkeypatch.setattr(rollout.LlamaStep, "MOST_COPIED", most_copied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch_size in (None, 3):
            ours = sample(model, temperature=0, batch_size=batch_size)
            assert torch.equal(ours.ids_BT, theirs.ids_BT)
            assert torch.allclose(ours.logp_BT, theirs.logp_BT, atol=1e-4)
            assert torch.allclose(ours.entropy_BT, theirs.entropy_BT, atol=1e-4)


def test_our_decoding_step_has_about_half_the_operations(monkeypatch):
    """As PyTorch dispatches them, for one more token of every row, norms of the keys included."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    model, counts = family("qwen3"), {}
    for own in (True, False):
        with monkeypatch.context() as patch:
            if not own:
                patch.setattr(rollout.LlamaStep, "fits", staticmethod(lambda model: False))
            for steps in (20, 21):  # the difference is one step
                with Counter() as counter:
                    sample(model, eos_ids=[], max_new_tokens=steps)
                counts[own, steps] = counter.count
    step = {own: counts[own, 21] - counts[own, 20] for own in (True, False)}
    with Counter() as around, torch.no_grad():
        rollout.sample_token(torch.zeros(7, VOCABULARY), 1.0, torch.rand(7).double(), 8)
    assert step[True] - around.count < 0.55 * (step[False] - around.count)


def test_our_decoding_step_in_bfloat16():
    """Under autocast, as training on a GPU samples, and for a model of that type: its statistics
    are as near to float64's as those of the model's own forward."""
    for cast in (False, True):
        model = family("qwen3")
        out = {}
        for own in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not own:
                    patch.setattr(rollout.LlamaStep, "fits", staticmethod(lambda model: False))
                with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    warnings.simplefilter("error")
                    out[own] = sample(model if cast else family("qwen3").bfloat16())
        exact, error = family("qwen3").double(), {}
        for own, rollouts in out.items():
            with torch.no_grad():
                logp_BTV = torch.log_softmax(exact(rollouts.ids_BT).logits[:, :-1], dim=-1)
            logp_BT = logp_BTV.gather(2, rollouts.ids_BT[:, 1:, None])[..., 0]
            inside_BT = rollouts.response_mask_BT[:, 1:]
            error[own] = (logp_BT - rollouts.logp_BT[:, 1:])[inside_BT].abs().mean()
        assert error[True] < 1.5 * error[False] + 0.01


def test_models_that_are_not_as_expected_go_through_their_own_forward():
    model = family("qwen3")
    assert rollout.LlamaStep.fits(model) and not rollout.LlamaStep.fits(tiny_model("gpt2"))
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, x, y: 2 * y)
    assert not rollout.LlamaStep.fits(model)  # an adapter, say
    handle.remove()

    class Adapter(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.v_proj = Adapter(32, 32)
    assert not rollout.LlamaStep.fits(model)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    changing = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic))
    assert not rollout.LlamaStep.fits(changing)


def test_a_step_that_disagrees_with_the_model_is_not_used(model, monkeypatch):
    """Should the library change what a Llama is, rollouts stay right and the user hears of it."""
    right = sample(model)
    monkeypatch.setattr(rollout, "rms_norm", lambda x, module: 1.5 * x)
    if rollout.LlamaStep.fits(model):
        with pytest.warns(UserWarning, match="gives other logits than the library's forward"):
            out = sample(model)
    else:
        out = sample(model)
    assert torch.equal(out.ids_BT, right.ids_BT)


@pytest.fixture
def rows_seen(model):
    """How many rows the model's head got, call by call, after the comparison of `LlamaStep` with
    the model's own forward: two calls on one row."""
    seen, skip = [], 2 if rollout.LlamaStep.fits(model) else 0

    def count(module, inputs, output):
        nonlocal skip
        if skip == 0:
            seen.append(inputs[0].shape[0])
        skip = max(skip - 1, 0)

    model.get_output_embeddings().register_forward_hook(count)
    return seen


def test_finished_rows_leave_the_batch(model, rows_seen):
    """Work follows the live rows."""
    out = sample(model, max_new_tokens=40)
    assert sum(rows_seen) == out.response_mask_BT.sum().item()


def test_refilling_keeps_the_slots_busy(model, rows_seen):
    """With 2 slots for 7 rows no step runs empty, and never more than 2 rows decode at once."""
    out = sample(model, batch_size=2)
    assert max(rows_seen) == 2 and sum(rows_seen) == out.response_mask_BT.sum().item()
    # all but the tail, where fewer rows than slots are left, ran full
    assert rows_seen == sorted(rows_seen, reverse=True)


def test_under_autocast_the_cache_is_in_its_type(model, monkeypatch):
    """A float32 model sampled in bfloat16: the cache is half as large, and what is recorded is what
    one forward under autocast gives, to bfloat16's precision."""
    made = []

    class Watched(rollout.SlotCache):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(rollout, "SlotCache", Watched)
    with torch.autocast("cpu", torch.bfloat16):
        out = sample(model, max_new_tokens=40)
        logits_BTV = model(out.ids_BT).logits
    assert {buffer.dtype for buffer in made[0].layers.values()} == {torch.bfloat16}
    logp_BTV = torch.log_softmax(logits_BTV[:, :-1].float(), -1)
    logp_BT = logp_BTV.gather(2, out.ids_BT[:, 1:, None])[..., 0]
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    inside_BT = out.response_mask_BT[:, 1:]
    for theirs, ours in ((logp_BT, out.logp_BT), (entropy_BT, out.entropy_BT)):
        assert (theirs - ours[:, 1:])[inside_BT].abs().mean() < 0.1
    assert not model.training


@pytest.mark.parametrize("autocast", [False, True])
def test_statistics_of_a_draw_are_float32(autocast):
    """Entropy and log-prob against float64, also under autocast and at the edge, 0 log 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 999, generator=generator)
    logits[0, :500] = -math.inf
    uniform = torch.rand(5, generator=generator, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        token, logp, entropy, _ = rollout.sample_token(logits, 0.7, uniform, 3)
    prob = torch.softmax(logits.double() / 0.7, dim=-1)
    assert torch.allclose(entropy.double(), torch.special.entr(prob).sum(-1), atol=1e-5, rtol=1e-5)
    assert torch.allclose(logp.double(), prob.gather(1, token[:, None])[:, 0].log(), atol=1e-5)


def test_training_mode_is_restored_and_dropout_does_not_act():
    model = tiny_model("gpt2").train()
    out = sample(model)
    assert model.training
    assert torch.equal(out.ids_BT, sample(model.eval()).ids_BT)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1], [VOCABULARY]]}, r"prompts\[1\] holds ids outside"),
        ({"prompts": [[1] * 490]}, "514 tokens exceed the model's context of 512"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature .* not -1.0"),
        ({"temperature": math.nan}, "temperature .* not nan"),
        ({"top_k": 0}, "top_k .* not 0"),
        ({"top_k": VOCABULARY + 1}, f"top_k .* not {VOCABULARY + 1}"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"vocab_size": VOCABULARY + 1}, f"vocab_size .* not {VOCABULARY + 1}"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_model("qwen3"), **change)


def test_models_that_would_be_sampled_wrongly_are_refused():
    sliding = {"use_sliding_window": True, "max_window_layers": 0}
    model = tiny_model("qwen3", sliding_window=16, **sliding)
    with pytest.raises(ValueError, match="sliding window of 16"):
        sample(model)
    # a window that is never reached changes nothing
    wide = tiny_model("qwen3", sliding_window=64, **sliding)
    plain = tiny_model("qwen3")
    assert torch.equal(sample(wide).ids_BT, sample(plain).ids_BT)
    plain.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no 4D mask"):
        sample(plain)


def test_local_attention_and_positions_of_its_own_are_refused():
    """GPT-Neo's windows are in no flag that others have; BLOOM reads positions off a 2D mask."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    local = {"attention_types": [[["local"], 2]], "window_size": 3}
    with pytest.raises(ValueError, match="layers of types .*'local'"):
        sample(GPTNeoForCausalLM(GPTNeoConfig(vocab_size=VOCABULARY, **sizes, **local)).eval())
    small = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position ids"):
        sample(BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, **small)).eval())


def test_a_model_without_a_plain_cache_is_refused(monkeypatch):
    """It would continue from its last token alone, and look as if it worked."""
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    recurrent = MambaForCausalLM(config).eval()
    recurrent.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="'linear_attention'"):
        sample(recurrent)
    forgetful = tiny_model("qwen3")
    forward = forgetful.forward
    monkeypatch.setattr(forgetful, "forward", lambda input_ids, **_: forward(input_ids))
    with pytest.raises(ValueError, match="kept keys and values in 0 of 2 layers"):
        sample(forgetful, [[1], [2]])


def test_non_finite_logits_are_reported():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="non-finite logits"):
        sample(model)
