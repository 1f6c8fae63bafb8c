"""Models and tokenizers, checked on their way in: a ValueError of one line names model or flag.
Weights are read from safetensors only, and no code of a model is run, unless told."""

import functools
import inspect
import os
import socket
import urllib.parse
import urllib.request

import huggingface_hub
import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

import rollout
from harness.cli import first_line, read_json
from harness.data import pad_id, stop_ids

SHARDS = {"model.safetensors.index.json": (".safetensors",),  # what an index of weights may name
          "pytorch_model.bin.index.json": (".bin", ".safetensors")}  # fmt: skip


def load_tokenizer(path, *, trust_remote_code=False):
    """The tokenizer of a local folder or hub name; a one-line ValueError naming it otherwise."""
    tokenizer = _from_pretrained(AutoTokenizer, path, trust_remote_code=trust_remote_code)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # without its files
        raise ValueError(f"{path}: cannot load Tokenizer: it has no tokens but special ones")
    for option in ("is_local", "local_files_only"):  # of this machine: not to be saved with it
        tokenizer.init_kwargs.pop(option, None)
    return tokenizer


def load_config(path, *, trust_remote_code=False):
    """The model's config with every dropout at 0: what is sampled must be what is trained."""
    config = _from_pretrained(AutoConfig, path, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(f"{path}: {config.model_type} is an encoder-decoder, not a causal LM")
    sees_all = not getattr(config, "is_decoder", False) and not getattr(config, "causal", False)
    if sees_all and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(f"{path}: {config.model_type} is an encoder, not causal: no causal LM")
    if not getattr(config.get_text_config(decoder=True), "vocab_size", 0) > 0:
        raise ValueError(f"{path}: {config.model_type} has no vocabulary: not a language model")
    for part in [config, *(getattr(config, name, None) for name in config.sub_configs)]:
        for name, value in list(vars(part).items() if part is not None else ()):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and ("dropout" in name or "layerdrop" in name or name.endswith("pdrop")):
                setattr(part, name, type(value)(0))
    check_weight_files(path, getattr(config, "transformers_weights", None))
    return config


def check_weight_files(path, named=None) -> None:
    """ValueError unless all weights (`named`: in the config) are safetensors in its folder."""
    found = [] if named is None else [("config.json", named, (".safetensors",))]
    for index, kinds in SHARDS.items():
        if file := _file(path, index):
            content = read_json(file)
            if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
                raise ValueError(f"{path}: {index} has no weight_map")
            found += [(index, name, kinds) for name in content["weight_map"].values()]
    for where, name, kinds in found:
        parts = str(name).replace("\\", "/").split("/")
        if not str(name).endswith(kinds) or not {"", ".."}.isdisjoint(parts):
            raise ValueError(f"{path}: {where} names {name!r:.60}, which is none of the "
                             f"{' or '.join(kinds)} files in the model's folder")  # fmt: skip


def check_tokens(configs: dict, tokenizer) -> None:
    """ValueError if what pads or ends responses is no token of the models: configs by path."""
    sources, sizes = [tokenizer, *configs.values()], [len(tokenizer)]
    for path, config in configs.items():
        sizes.append(config.get_text_config(decoder=True).vocab_size)
        if pad_id(tokenizer) >= sizes[-1]:
            why = f"is not among the model's {sizes[-1]} tokens"
            raise ValueError(f"{path}: pad token {pad_id(tokenizer)} {why}")
        if _file(path, "generation_config.json"):
            sources.append(_from_pretrained(GenerationConfig, path))
            sources[-1].name_or_path = str(path)
    stops, names = stop_ids(*sources), ", ".join(map(str, configs))
    if stops[0] >= min(sizes[1:]) or stops[-1] >= max(sizes):
        raise ValueError(f"{names}: stop token {stops[-1]} is not among the model's tokens")


def _file(path, name: str) -> str | None:
    """Where a file of a model is, in its folder or that of the hub's cache; None if it has none."""
    kinds, folder = ("missing_entries", "connection_errors"), os.path.expanduser(path)
    how = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    how["local_files_only"] = not os.path.isdir(folder) and not _online()
    return cached_file(folder, name, **how)


def load_model(path, *, dtype, device, trust_remote_code=False, allow_bin=False):
    """A causal LM from safetensors (or with allow_bin `.bin`), without dropout; or ValueError."""
    options, trust = {"dtype": dtype}, {"trust_remote_code": trust_remote_code}
    options |= {"use_safetensors": None if allow_bin else True, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True, "config": load_config(path, **trust)}
    try:
        model, info = _from_pretrained(AutoModelForCausalLM, path, **options, **trust)
    except ValueError as error:
        if "model.safetensors" in str(error) and not allow_bin:
            raise ValueError(f"{error}; --allow-bin reads pickled weights, too") from None
        raise
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}")
    if wrong := sorted(map(str, info["mismatched_keys"])):
        what = f"{len(wrong)} weights have another shape"
        raise ValueError(f"{path}: {what} than the config says, the first is {wrong[0]}")
    return model.to(device).eval()


def _from_pretrained(loader, path, **options):
    name, folder, hint = str(path), os.path.expanduser(path), ""
    if not os.path.isdir(folder):
        if os.path.exists(folder) or name.count("/") > 1 or name[:1] in ("/", ".", "~", ""):
            raise ValueError(f"{name!r:.200}: no such folder")
        # without this an offline machine retries for a minute, on stderr, before it gives up
        options["local_files_only"] = not _online()
        hint = "no such local folder; on the hub: "
        if options["local_files_only"]:
            hint = "no such local folder, not in the cache, and this machine is offline: "
    elif os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise ValueError(f"{path}: a LoRA adapter, no model: merge it into its base first, with "
                         "merge_and_unload of peft and save_pretrained")  # fmt: skip
    elif odd := [x for x in os.scandir(folder) if not x.is_file() and not os.path.isdir(x)]:
        raise ValueError(f"{path}: {odd[0].name} is neither a file nor a folder")
    try:
        return loader.from_pretrained(name if hint else folder, **options)
    except Exception as error:
        what = loader.__name__.removeprefix("Auto")
        raise ValueError(f"{name}: cannot load {what}: {hint}{first_line(error)}") from error


@functools.cache
def _online():
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    url = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if urllib.request.getproxies():  # a proxy may reach what we cannot: let the hub client try
        return True
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
        return True
    except OSError:
        return False


@torch.no_grad()
def check_sampling(path, model, prompts, max_new_tokens):
    """ValueError that begins with `path` if `rollout.generate` would refuse, or not causal."""
    prompt = prompts[0][:8]
    try:
        check_supported(model, max(map(len, prompts)) + max_new_tokens)
        ids_BT = torch.tensor([prompt], device=model.device)
        alone_V, first_V = (model(input_ids=x).logits[0, 0] for x in (ids_BT[:, :1], ids_BT))
        if (alone_V - first_V).abs().max() > 0.05 * alone_V.abs().max():
            raise ValueError(f"{type(model).__name__} is not causal: tokens see later ones")
        new = min(2, max_new_tokens)  # a second token shows whether the cache is used
        how = {"eos_ids": (), "pad_id": 0, "temperature": 0, "top_k": 1}
        rollout.generate(model, [prompt], max_new_tokens=new, **how)
    except (ValueError, RuntimeError) as error:  # sizes that do not fit together are the latter
        raise ValueError(f"{path}: {first_line(error)}") from error


def check_supported(model, longest: int) -> None:
    """ValueError if sampling or tree attention would silently get wrong so many tokens."""
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder, not a causal LM")
    if (kind := model.config._attn_implementation) not in ("sdpa", "eager"):
        raise ValueError(f'{name}: attention {kind!r} takes no 4D mask; load it with "sdpa"')
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(f"{name} takes no position ids")
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ()
    if set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{name}: layers of types {sorted(set(kinds))} are not supported")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if window and sliding and longest >= window:  # the library's cache keeps window - 1 tokens
        raise ValueError(f"{name}: {longest} tokens do not fit into its sliding window of {window}")


def common_vocabulary(student_tokenizer, teacher_tokenizer) -> int:
    """Number of ids in the shorter tokenizer; ValueError unless they mean the same to both."""
    tokenizers = student_tokenizer, teacher_tokenizer
    names = [{i: token for token, i in each.get_vocab().items()} for each in tokenizers]
    size = min(max(by_id) + 1 for by_id in names)
    if wrong := [i for i in range(size) if names[0].get(i) != names[1].get(i)]:
        i = wrong[0]
        what = f"{i}, student's {names[0].get(i)!r}, teacher's {names[1].get(i)!r}"
        raise ValueError("--teacher has another tokenizer than --student: "
                         f"{len(wrong)} of {size} ids differ, the first is {what}")  # fmt: skip
    return size


@torch.no_grad()
def check_head(flag: str, model, prompt: list[int]) -> None:
    """The chunked head computes hidden @ weight.T; refuse a model whose head does more."""
    ids_BT, name = torch.tensor([prompt], device=model.device), f"{flag} {type(model).__name__}"
    try:
        ours = model.base_model(input_ids=ids_BT, use_cache=False)[0]
        ours = ours @ model.get_output_embeddings().weight.T
        theirs = model(input_ids=ids_BT, use_cache=False).logits
    except RuntimeError as error:  # sizes in the config that do not fit together
        raise ValueError(f"{name}: {first_line(error)}") from error
    if not theirs.isfinite().all():
        raise ValueError(f"{name}: its logits are not finite")
    if (theirs.amax(dim=-1) - theirs.amin(dim=-1)).max() <= 1e-4 * theirs.abs().max():
        raise ValueError(f"{name}: all tokens are equally likely; its weights are lost")
    tolerance = 0.02 if model.dtype.itemsize == 2 else 1e-3  # of the largest logit
    if (ours - theirs).abs().max() > tolerance * theirs.abs().max():
        why = "not hidden states times a matrix, but with a bias, a soft cap or a scale"
        raise ValueError(f"{name}: its logits are {why}")
