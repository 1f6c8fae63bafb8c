"""The fast decode step against the plain one, which is the library's own forward."""

import warnings

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from test_rollout import sample
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rollout
from fast import decode as fast  # the file

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
def test_the_fast_step_is_the_models(name, most_copied, monkeypatch):
    """Rollouts by both steps: the same tokens and statistics, in float64 and with matrices fused or
    not; the fast step does run, and has nothing to warn of."""
    monkeypatch.setattr(fast, "MOST_COPIED", most_copied)
    model, calls = family(name).double(), []
    assert fast.fits(model)
    hidden = fast.LlamaStep.hidden
    monkeypatch.setattr(
        fast.LlamaStep, "hidden",
        lambda self, *args: calls.append(self.fuse) or hidden(self, *args),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = sample(model, batch_size=4, max_new_tokens=30, decode=fast.decode)
    assert len(calls) > 20 and set(calls) == {most_copied > 0}
    theirs, count = sample(model, batch_size=4, max_new_tokens=30), len(calls)
    assert len(calls) == count and torch.equal(ours.ids_BT, theirs.ids_BT)
    for field in ("logp_BT", "entropy_BT"):
        assert torch.allclose(getattr(ours, field), getattr(theirs, field), atol=1e-5)
    assert torch.equal(ours.topk_ids_BTK, theirs.topk_ids_BTK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "attention biases", "qwen2", "mistral"])
def test_both_steps_give_the_same_logits(name, dtype):
    """Token by token on the same cache: in float32, and under autocast to its precision, of the
    largest logit; one cache may be read by either step."""
    model, tolerance = family(name), {torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    errors = []

    def both(model, cache, step):
        ours = fast.decode(model, cache, step)

        def compared(*args):
            logits_SV = step(*args)
            errors.append((ours(*args) - logits_SV).abs().max() / logits_SV.abs().max())
            return logits_SV if len(errors) % 2 else ours(*args)

        return compared

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        sample(model, batch_size=4, decode=both)
    assert len(errors) > 20 and max(errors) < tolerance


def test_the_fast_step_has_about_half_the_operations():
    """As PyTorch dispatches them, for one more token of every row, norms of the keys included."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    def count(model, cache, step):
        def counted(*args):
            with Counter() as counter:
                logits_SV = step(*args)
            counts.append(counter.count)
            return logits_SV

        return counted

    last = {}
    ways = {"plain": count, "fast": lambda *args: count(*args[:2], fast.decode(*args))}
    for name, decode in ways.items():
        counts = []
        sample(family("qwen3"), eos_ids=[], max_new_tokens=3, decode=decode)
        last[name] = counts[-1]
    assert last["fast"] < 0.55 * last["plain"], last


@pytest.mark.parametrize("cast", [False, True])
def test_the_fast_step_in_bfloat16(cast):
    """Under autocast, as training on a GPU samples, and for a model of that type: its statistics
    are as near to float64's as those of the model's own forward."""
    model, exact = family("qwen3"), family("qwen3").double()
    error = {}
    for name, decode in (("fast", fast.decode), ("plain", None)):
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            warnings.simplefilter("error")
            out = sample(model if cast else family("qwen3").bfloat16(), decode=decode)
        with torch.no_grad():
            logp_BTV = torch.log_softmax(exact(out.ids_BT).logits[:, :-1], dim=-1)
        logp_BT = logp_BTV.gather(2, out.ids_BT[:, 1:, None])[..., 0]
        inside_BT = out.response_mask_BT[:, 1:]
        error[name] = (logp_BT - out.logp_BT[:, 1:])[inside_BT].abs().mean()
    assert error["fast"] < 1.5 * error["plain"] + 0.01


def test_models_that_are_not_as_expected_keep_the_plain_step():
    model = family("qwen3")
    assert fast.fits(model) and not fast.fits(tiny_model("gpt2"))
    step = object()
    assert fast.decode(tiny_model("gpt2"), None, step) is step
    for module in (model.model.layers[1].mlp, model.model.norm):
        handle = module.register_forward_hook(lambda module, x, y: 2 * y)  # an adapter, say
        assert not fast.fits(model)
        handle.remove()
    assert fast.fits(model)

    class Adapter(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.v_proj = Adapter(32, 32)
    assert not fast.fits(model)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    changing = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic))
    assert not fast.fits(changing)


def test_a_head_that_is_more_than_a_matrix_is_called():
    """A hook on it acts, as do those of the embedding."""
    model = family("qwen3").double()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.clamp(max=2.0))
    model.model.embed_tokens.register_forward_hook(lambda module, args, x: 1.1 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = sample(model, decode=fast.decode)
    theirs = sample(model)
    assert torch.equal(ours.ids_BT, theirs.ids_BT)
    assert torch.allclose(ours.logp_BT, theirs.logp_BT, atol=1e-5)


def test_weights_are_those_of_the_call():
    """The fused matrices are copies: they must not outlive a call, as training changes weights."""
    model = family("qwen3").double()
    sample(model, decode=fast.decode)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(sample(model, decode=fast.decode).ids_BT, sample(model).ids_BT)


def test_a_step_that_disagrees_with_the_model_is_not_used(model, monkeypatch):
    """Should the library change what a Llama is, rollouts stay right and the user hears of it."""
    right = sample(model)
    monkeypatch.setattr(fast, "rms_norm", lambda x, module: 1.5 * x)
    if fast.fits(model):
        with pytest.warns(UserWarning, match="gives other logits than the library's") as heard:
            out = sample(model, decode=fast.decode)
        assert heard[0].filename.endswith("test_rollout.py"), "it names the caller of generate"
    else:
        out = sample(model, decode=fast.decode)
    assert torch.equal(out.ids_BT, right.ids_BT)


def test_more_rows_than_columns():
    """Rows and columns are numbered by one tensor, which must be long enough for both."""
    model = tiny_model("qwen3")
    how = {"max_new_tokens": 3, "eos_ids": [0], "pad_id": 0, "temperature": 0}
    prompts = [[1 + n % 40, 2] for n in range(12)]
    found = rollout.generate(model, prompts, decode=fast.decode, **how)
    assert torch.equal(found.ids_BT, rollout.generate(model, prompts, **how).ids_BT)
