"""Random Qwen3 models by shape, and what a forward pass through one costs by formula."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


class Shape(NamedTuple):
    """Sizes of a Qwen3."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(2, 32, 4, 2, 8, 64, 512),
    "small": Shape(4, 256, 4, 2, 64, 768, 4096),
    "medium": Shape(6, 512, 8, 4, 64, 1536, 8192),
    "qwen3-0.6b": Shape(28, 1024, 16, 8, 128, 3072, 151936),
    "qwen3-1.7b": Shape(28, 2048, 16, 8, 128, 6144, 151936),
    "qwen3-4b": Shape(36, 2560, 32, 8, 128, 9728, 151936),
    "qwen3-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3-32b": Shape(64, 5120, 64, 8, 128, 25600, 151936),
}
PAIRS = {  # student, teacher
    # 1.3M and 5.8M parameters
    "small": (Shape(4, 128, 4, 2, 32, 384, 4096), Shape(6, 256, 4, 2, 64, 768, 4096)),
    "qwen3-0.6b": (SHAPES["qwen3-0.6b"], SHAPES["qwen3-1.7b"]),
}


def config_of(shape: Shape, longest: int, **config) -> Qwen3Config:
    """For texts of up to `longest` tokens; `config`: more of its settings."""
    settings = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "max_position_embeddings": longest,
        "tie_word_embeddings": shape.hidden < 4096,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return Qwen3Config(**settings | config)


def random_model(
    shape: Shape, longest: int, *, seed=0, device="cpu", dtype=torch.float32, **config
):
    """A random Qwen3, see `config_of`."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen3ForCausalLM(config_of(shape, longest, **config))
    return model.to(dtype).eval().requires_grad_(False)


def costs(model, vocab_size: int) -> tuple[float, float, float]:
    """FLOPs of a token in the backbone, of one column that it attends to, of its row in the head:
    matrix products and attention, two per multiplication and addition."""
    config = model.config.get_text_config(decoder=True)
    D, width, layers = config.hidden_size, config.head_dim, config.num_hidden_layers
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    matrices = D * width * (2 * heads + 2 * kv_heads) + 3 * D * config.intermediate_size
    return 2 * layers * matrices, 4 * layers * heads * width, 2 * vocab_size * D


def write_pair(
    folder: Path, name: str, vocabulary: int, prompts: int, prompt_tokens: int, tokens: int
) -> None:
    """Write student/, teacher/ (a pair of PAIRS; a deviation of 2 to 3 in the logits) and at least
    64 prompts of `prompt_tokens` words to problems.jsonl, for responses of `tokens`.

    The tokenizer's end token lies one past the last row of both heads: nothing can draw it.
    """
    words = {f"w{i}": i for i in range(vocabulary)} | {"<|end|>": vocabulary}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="w0", padding_side="left"
    )
    for seed, (side, shape) in enumerate(zip(("student", "teacher"), PAIRS[name], strict=True)):
        model = random_model(
            shape._replace(vocabulary=vocabulary), prompt_tokens + tokens, seed=seed,
            initializer_range=2.5 / shape.hidden**0.5,
        )  # fmt: skip
        model.save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)
    ids_PT = torch.randint(1, vocabulary, (max(64, prompts), prompt_tokens))
    texts = [" ".join(f"w{i}" for i in ids_T) for ids_T in ids_PT.tolist()]
    lines = [json.dumps({"prompt": text}) for text in texts]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")
