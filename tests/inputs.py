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


def write(path, *lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def ask(*texts):
    return harness.from_records([{"problem": t, "answer": "1"} for t in texts], "p")
