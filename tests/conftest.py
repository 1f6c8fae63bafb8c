"""Shared by the tests: one thread (two cores, small matrices) and tiny random models."""

import signal

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

torch.set_num_threads(1)
# A background job ignores Ctrl-C, one of nohup SIGHUP, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
VOCABULARY = 61


def tiny_model(family: str, seed: int = 0, vocab_size: int = VOCABULARY, **more):
    """A random model with large weights, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common = {"vocab_size": vocab_size, "initializer_range": 0.3, **special}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
        return GPT2LMHeadModel(GPT2Config(**common, **sizes, **dropout, **more)).eval()
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**(common | sizes | {"head_dim": 8} | more))).eval()
    return LlamaForCausalLM(LlamaConfig(**(common | sizes | more))).eval()


@pytest.fixture(params=["qwen3", "llama", "gpt2"])
def model(request):
    """One tiny model per architecture that the samplers and scorers promise to support."""
    return tiny_model(request.param)


def toy_prompts(tokenizer, problems):
    """Token ids of the prompts of toy problems, as the commands render them."""
    import harness

    items = harness.from_records(problems, "toy") if problems else []
    return harness.render_prompts(tokenizer, items)


def write_model(folder, *, seed=0, vocab_size=None, chat_template=True, tokenizer_seed=0, **more):
    """A complete Hugging Face folder: a byte-level tokenizer, which takes any text, and a Qwen3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if tokenizer_seed:  # the same tokens under other ids
        alphabet = alphabet[tokenizer_seed:] + alphabet[:tokenizer_seed]
    words = {token: i for i, token in enumerate(["<|end|>", "<|pad|>", "<|user|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|user|>"],
    )
    if chat_template:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}"
        )
    model = tiny_model("qwen3", seed=seed, vocab_size=vocab_size or len(words), **more)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder that `loading` reads: any text can be spelled, and the config has dropout."""
    from inputs import byte_tokenizer, tiny_model

    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    tiny_model(tokenizer, attention_dropout=0.5).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def no_data(monkeypatch):
    """The pretrained sentence splitter is not there."""
    import teachability

    def missing(language):
        raise LookupError

    monkeypatch.setattr(teachability, "PunktTokenizer", missing)
