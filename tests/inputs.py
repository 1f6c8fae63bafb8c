"""Files, prompts, a tokenizer and a model that the loading of the harness reads."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import harness

GOOD = {"problem": "p", "answer": "1"}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '<think>' if enable_thinking }}{% endif %}"
)
CHAT_SPECIALS = ["<|user|>", "<|system|>", "<|assistant|>"]


def byte_tokenizer(template=TEMPLATE):
    """Every byte is a token, so every text can be spelled."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", extra_special_tokens=CHAT_SPECIALS
    )
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(tokenizer, seed=0, context=256, **changes):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3,  # padded, as real checkpoints are
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )
    return Qwen3ForCausalLM(config)


def many_logits(V=262144):
    """Rows [5, V] at which sums of V float32 numbers go wrong: flat, nearly flat, one token far
    above noise, as real models have them (a tail behind a power law), all far from 0."""
    g = torch.Generator().manual_seed(0)
    logits_RV = torch.stack([torch.zeros(V), *torch.randn(4, V, generator=g)])
    logits_RV[1] *= 0.01
    logits_RV[2, 7] = 20
    logits_RV[3] = logits_RV[3] / 10 - 1.1 * torch.arange(1, V + 1).log() + 12
    logits_RV[4] = 2 * logits_RV[4] + 100
    return logits_RV


def write(path, *lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def ask(*texts):
    return harness.from_records([{"problem": t, "answer": "1"} for t in texts], "p")
