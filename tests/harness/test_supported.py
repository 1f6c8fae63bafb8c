"""harness.check_supported: models that would be sampled, or read by tree attention, wrongly."""

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from test_rollout import PROMPTS, sample
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import harness

LONGEST = max(map(len, PROMPTS)) + 24  # of `sample`
SLIDING = {"use_sliding_window": True, "max_window_layers": 0}


def local_layers():
    """GPT-Neo's windows are in no flag that others have."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    local = {"attention_types": [[["local"], 2]], "window_size": 3}
    return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=VOCABULARY, **sizes, **local))


def own_positions():
    """BLOOM reads positions off a 2D mask."""
    return BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=16, n_layer=1, n_head=2))


def recurrent():
    config = MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config)
    model.config._attn_implementation = "sdpa"
    model.base_model.forward = lambda input_ids, position_ids: None  # as if it took them
    return model


def encoder_decoder():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=9, **sizes))


def flash_attention():
    model = tiny_model("qwen3")
    model.config._attn_implementation = "flash_attention_2"
    return model


def sliding_mistral():
    """Mistral names no layers: all of them slide."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return MistralForCausalLM(MistralConfig(vocab_size=9, sliding_window=16, **sizes, **heads))


@pytest.mark.parametrize(
    "make, message",
    [
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (flash_attention, "'flash_attention_2' takes no 4D mask"),
        (own_positions, "BloomForCausalLM takes no position ids"),
        (local_layers, "layers of types .*'local'"),
        (recurrent, "layers of types .*'linear_attention'"),
        (sliding_mistral, "31 tokens do not fit into its sliding window of 16"),
        (lambda: tiny_model("qwen3", sliding_window=16, **SLIDING), "sliding window of 16"),
    ],
    ids=["encoder-decoder", "mask", "positions", "local", "recurrent", "mistral", "qwen3"],
)
def test_models_that_would_come_out_wrong_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        harness.check_supported(make(), LONGEST)


def test_a_window_that_is_never_reached_changes_nothing():
    """The library's sliding cache keeps one token less than the window."""
    wide = tiny_model("qwen3", sliding_window=LONGEST + 1, **SLIDING)
    harness.check_supported(wide, LONGEST)
    assert torch.equal(sample(wide).ids_BT, sample(tiny_model("qwen3")).ids_BT)
    with pytest.raises(ValueError, match=f"sliding window of {LONGEST + 1}"):
        harness.check_supported(wide, LONGEST + 1)
    unused = tiny_model("qwen3", sliding_window=16, use_sliding_window=False)
    harness.check_supported(unused, LONGEST)


def test_supported_models_pass(model):
    harness.check_supported(model, model.config.max_position_embeddings)
