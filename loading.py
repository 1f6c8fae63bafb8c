"""What comes from outside, checked on its way in: command lines, problem files, prompts, models.

None of it is trusted. Whatever is wrong is a ValueError, or for a command line an exit with code 2,
of one line that names the file and line, flag or value. Weights are read from safetensors only and
no code that comes with a model is run, unless told. Text is never evaluated, and control tokens
inside it are refused: a problem cannot end the user's turn.
"""

import argparse
import json
import math
import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# -------------------------------------------------------------------------------- command lines
BIG, TINY = 1e18, 1e-30  # "finite" and "positive"


def number(kind: type, low: float, high: float = BIG):
    """An argparse type: an int or float in [low, high]; nan and inf are in none."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high:
            least = "positive" if low == TINY else f"at least {low}"
            bounds = least if high == BIG else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, printed once however many processes run."""

    def error(self, message: str):
        """Print the message on rank 0 and leave with exit code 2."""
        if os.environ.get("RANK", "0") == "0":
            line = " ".join(message.split())
            print(f"{self.prog}: error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)


# ------------------------------------------------------------------------- problems and prompts


def load_problems(path, *, require_answer=True):
    """Problems of a JSONL file: [{"messages": [..], "answer": str or None, "where": "path:line"}].

    Blank lines are skipped. ValueError naming file and line for anything else that is no problem.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot read problems: {error.strerror or error}") from error
    problems = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                kind = "not UTF-8" if isinstance(error, UnicodeError) else "malformed JSON"
                raise ValueError(f"{path}:{number}: {kind}: {error}") from error
            problems.append(_problem(record, f"{path}:{number}", require_answer))
    if not problems:
        raise ValueError(f"{path}: no problems in this file")
    return problems


def from_records(records, where, *, require_answer=True):
    """The same for objects in memory, as `toy.problems(..)` has; errors name "where:1", .. ."""
    problems = [_problem(r, f"{where}:{i}", require_answer) for i, r in enumerate(records, 1)]
    if not problems:
        raise ValueError(f"{where}: no problems")
    return problems


def _problem(record, where, require_answer):
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    given = [key for key in ("problem", "prompt", "messages") if key in record]
    if len(given) != 1:
        raise ValueError(f'{where}: needs one of "problem", "prompt", "messages"; has {given}')
    content = record[given[0]]
    messages = content if given[0] == "messages" else [{"role": "user", "content": content}]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" must be a list of at least one message')
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f'{where}: a message has "role" and "content" and nothing else')
        if not isinstance(message["role"], str) or not re.fullmatch("[a-z]+", message["role"]):
            raise ValueError(f"{where}: a role is a lower-case word, not {message['role']!r}")
        _check_text(message["content"], f'{where}: the content of "{given[0]}"')
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the last message is the assistant's: nothing to answer")
    answer = record.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if "answer" in record or require_answer:
        _check_text(answer, f'{where}: "answer"')
    return {"messages": [dict(m) for m in messages], "answer": answer, "where": where}


def _check_text(value, what):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be text and not empty, got {value!r:.60}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):  # JSON can spell these
        raise ValueError(f"{what} holds half of a surrogate pair, which is not text")


def render_prompts(tokenizer, problems, *, thinking=False):
    """Token ids of every problem's prompt, up to where the model begins to answer: list of lists.

    Through the tokenizer's chat template, with `enable_thinking=thinking` (templates that know no
    thinking ignore it). Without a template: the messages' contents joined by blank lines, another
    blank line, and the tokenizer's own special tokens, but no EOS at the end.

    Raises ValueError, naming the problem, when its text holds a control token (`<|im_end|>` inside
    a problem would end the user's turn; plain added tokens such as `<think>` pass), cannot be
    spelled by the tokenizer, is refused by the template, or renders to nothing.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    # unk tells unknown text only where it is a token of its own
    shared = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    unknown = None if tokenizer.unk_token_id in shared else tokenizer.unk_token_id
    prompts = []
    for problem in problems:
        where, texts = problem["where"], [m["content"] for m in problem["messages"]]
        try:
            # what the tokenizer makes of the bare text decides, not a list of strings
            inside = tokenizer(texts, add_special_tokens=False)["input_ids"]
            if tokenizer.chat_template is None:
                ids = tokenizer("\n\n".join(texts) + "\n\n")["input_ids"]
                ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
            else:
                text = tokenizer.apply_chat_template(
                    problem["messages"],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=thinking,
                )
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # templates and tokenizers raise what they like
            why = first_line(error)
            raise ValueError(f"{where}: cannot be rendered as a prompt: {why}") from error
        found = [i for part in inside for i in part if i in special and i != unknown]
        if found:
            token = tokenizer.convert_ids_to_tokens(found[0])
            raise ValueError(f"{where}: the text contains the control token {token!r}")
        if not ids:
            raise ValueError(f"{where}: the prompt renders to no tokens at all")
        if unknown is not None and any(unknown in part for part in [ids, *inside]):
            raise ValueError(f"{where}: the tokenizer has no tokens for some of this prompt")
        prompts.append(list(ids))
    return prompts


def check_fit(config, problems, prompts, max_new_tokens):
    """ValueError naming the first problem whose prompt + max_new_tokens exceeds the context of a
    model of that config, or whose ids exceed its vocabulary (model and tokenizer do not match)."""
    config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"{problem['where']}: prompt of {len(prompt)} tokens + {max_new_tokens} new tokens "
                f"(--max-new-tokens) exceed the model's context of {limit}"
            )
        if max(prompt) >= config.vocab_size:
            raise ValueError(
                f"{problem['where']}: token id {max(prompt)} is outside the model's vocabulary of "
                f"{config.vocab_size}: tokenizer and model do not belong together"
            )


def stop_ids(*sources):
    """Sorted ids that end a response, of all the models, configs and tokenizers given.

    Teacher and student may disagree about EOS (base against chat checkpoints); a response that
    misses one of the ids runs on to the limit. ValueError when no source has any.

    >>> from types import SimpleNamespace as Has
    >>> stop_ids(Has(eos_token_id=[7, 3]), Has(eos_token_id=None), Has(eos_token_id=3))
    [3, 7]
    """
    found = set()
    for source in sources:
        for part in (source, *(getattr(source, k, None) for k in ("config", "generation_config"))):
            ids = getattr(part, "eos_token_id", None)
            found.update([ids] if isinstance(ids, int) else ids or [])
    if not found:
        raise ValueError("no stop token: neither the models' configs nor the tokenizer has an EOS")
    return sorted(found)


def pad_id(tokenizer):
    """The pad token's id, else the EOS token's (masks, not ids, tell padding); or ValueError."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("the tokenizer has neither a pad nor an EOS token")


# --------------------------------------------------------------------------------------- models


def load_tokenizer(path, *, trust_remote_code=False):
    """The tokenizer of a local folder or hub name; a one-line ValueError naming it otherwise."""
    return _from_pretrained(AutoTokenizer, path, trust_remote_code=trust_remote_code)


def load_config(path, *, trust_remote_code=False):
    """The model's config with every dropout at 0: what is sampled must be what is trained."""
    config = _from_pretrained(AutoConfig, path, trust_remote_code=trust_remote_code)
    for part in [config, *(getattr(config, name, None) for name in config.sub_configs)]:
        for name, value in list(vars(part).items() if part is not None else ()):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and ("dropout" in name or "layerdrop" in name or name.endswith("pdrop")):
                setattr(part, name, type(value)(0))
    return config


def load_model(path, *, dtype, device, trust_remote_code=False, allow_bin=False):
    """A causal LM of a local folder or hub name, from safetensors, without dropout, in eval mode.

    allow_bin: where there are none, read pickled `.bin` weights (by PyTorch's restricted reader).
    ValueError, one line that begins with `path`: nothing there, not loadable, offline, or weights
    missing (which would otherwise be drawn at random with no more than a warning).
    """
    options = {"trust_remote_code": trust_remote_code}
    options |= {"config": load_config(path, **options), "dtype": dtype}
    options |= {"use_safetensors": None if allow_bin else True, "output_loading_info": True}
    try:
        model, info = _from_pretrained(AutoModelForCausalLM, path, **options)
    except ValueError as error:
        if "model.safetensors" in str(error) and not allow_bin:
            raise ValueError(f"{error}; --allow-bin reads pickled weights, too") from None
        raise
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model.to(device).eval()


def _from_pretrained(loader, path, **options):
    name, folder, hint = str(path), Path(path).expanduser(), ""
    if not folder.is_dir():
        if folder.exists() or name.count("/") > 1 or name[:1] in ("/", ".", "~", ""):
            raise ValueError(f"{name!r}: no such folder")
        # without this an offline machine retries for a minute, on stderr, before it gives up
        options["local_files_only"] = not _online()
        hint = "no such local folder; on the hub: "
        if options["local_files_only"]:
            hint = "no such local folder, not in the cache, and this machine is offline: "
    try:
        return loader.from_pretrained(name if hint else str(folder), **options)
    except Exception as error:
        what = loader.__name__.removeprefix("Auto")
        raise ValueError(f"{name}: cannot load {what}: {hint}{first_line(error)}") from error


def _online():
    url = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if urllib.request.getproxies():  # a proxy may reach what we cannot: let the hub client try
        return True
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
        return True
    except OSError:
        return False


def first_line(error):
    """First line of a message, for errors that come as a wall of text."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# ----------------------------------------------------------------------- a student and a teacher
def common_vocabulary(student_tokenizer, teacher_tokenizer) -> int:
    """Number of leading ids that mean the same token to both.

    Raises:
        ValueError: an id below the shorter tokenizer's length stands for different tokens.
    """
    names = [
        {i: token for token, i in tokenizer.get_vocab().items()}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    ]
    size = min(max(by_id) + 1 for by_id in names)
    wrong = [i for i in range(size) if names[0].get(i) != names[1].get(i)]
    if wrong:
        i = wrong[0]
        raise ValueError(
            f"--teacher has another tokenizer than --student: {len(wrong)} of {size} ids differ, "
            f"the first is {i}, student's {names[0].get(i)!r}, teacher's {names[1].get(i)!r}"
        )
    return size


@torch.no_grad()
def check_head(flag: str, model, prompt: list[int]) -> None:
    """The chunked head computes hidden @ weight.T; refuse a model whose head does more."""
    ids_BT = torch.tensor([prompt], device=model.device)
    head = model.get_output_embeddings()
    ours = model.base_model(input_ids=ids_BT, use_cache=False)[0] @ head.weight.T
    theirs = model(input_ids=ids_BT, use_cache=False).logits
    if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
        raise ValueError(
            f"{flag} {type(model).__name__}: its logits are not hidden states times a matrix (a "
            "bias, a soft cap or a scale); not supported"
        )
