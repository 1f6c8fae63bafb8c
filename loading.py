"""What comes from outside, checked on its way in: command lines, problem files, prompts, models.

None of it is trusted. Whatever is wrong is a ValueError, or for a command line an exit with code 2,
of one line that names the file and line, flag or value. Weights are read from safetensors only and
no code that comes with a model is run, unless told. Text is never evaluated, and control tokens
inside it are refused: a problem cannot end the user's turn.
"""

import argparse
import contextlib
import errno
import itertools
import json
import math
import numbers
import os
import re
import socket
import sys
import tempfile
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# -------------------------------------------------------------------------------- command lines
BIG, TINY = 1e18, 1e-30  # "finite" and "positive"
MANY = 10**6  # prompts or samples: more would run out of memory or time before anything happens
MOST_THREADS = 1024  # beyond what the system grants, PyTorch aborts the process


def number(kind: type, low: float, high: float = BIG):
    """An argparse type: an int or float in [low, high]; nan and inf are in none."""
    what = "whole number" if kind is int else "number"

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:  # also of a whole number of thousands of digits
            raise argparse.ArgumentTypeError(f"invalid {what} value: {text!r:.60}") from None
        if not low <= value <= high:
            bounds = "positive" if low == TINY else f"at least {low}"
            if value > high:
                bounds = f"at most {high:g}" if high == BIG else f"at most {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text:.60}")
        return value

    convert.limits = kind, low, high
    return convert


def place(text: str) -> str:
    """An argparse type: the name of a file, folder or model, of which no part can be misread."""
    if not text or re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", text):
        what = "holds a control character or is not UTF-8" if text else "is empty"
        raise argparse.ArgumentTypeError(f"the name {text!r:.60} {what}")
    return text


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, printed once however many processes run."""

    def error(self, message: str):
        """Print the message on rank 0 and leave with exit code 2."""
        if os.environ.get("RANK", "0") == "0":
            complain(self.prog, message)
        sys.exit(2)


def complain(program: str, message) -> None:
    """One line on stderr, whatever the message holds: nothing in it can steer a terminal."""
    line = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"{program}: error: {line}", file=sys.stderr, flush=True)


def check_creatable(flag: str, path) -> None:
    """ValueError unless something could be created at `path`, which need not have a parent yet, or
    in the folder that is there; leaves no trace."""
    path = Path(path)
    try:
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # the whole of the name may be too long
        parents = path.absolute().parents
        folder = next(folder for folder in (path, *parents) if os.path.lexists(folder))
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except (OSError, ValueError) as error:  # NUL is a ValueError
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{flag} {str(path):.200} cannot be written: {why}") from None


# ------------------------------------------------------------------------- problems and prompts


def load_problems(path, *, require_answer=True):
    """Problems of a JSONL file: [{"messages": [..], "answer": str or None, "where": "path:line"}].

    Blank lines are skipped. ValueError naming file and line for anything else that is no problem.
    """
    problems = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                kind = "not UTF-8" if isinstance(error, UnicodeError) else "malformed JSON"
                raise ValueError(f"{path}:{number}: {kind}: {error}") from error
            problems.append(_problem(record, f"{path}:{number}", require_answer))
    if not problems:
        raise ValueError(f"{path}: no problems in this file")
    return problems


LONGEST_LINE = 2**26  # bytes; a file of any size is read line by line


def _lines(path):
    """The lines of a regular file, in bytes, without a byte order mark; ValueError naming it."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or device may never end
            kind = "is a directory" if os.path.isdir(path) else "not a regular file"
            raise ValueError(f"{path}: cannot read problems: {kind}")
        with open(path, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"{path}:{number}: longer than {LONGEST_LINE} bytes")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise ValueError(f"{path}: cannot read problems: {error.strerror or error}") from error


def _object(pairs):
    """A JSON object; ValueError when a key comes twice: readers disagree about which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} comes twice")
    return found


def from_records(records, where, *, require_answer=True):
    """The same for objects in memory, as `toy.problems(..)` has; errors name "where:1", .. ."""
    problems = [_problem(r, f"{where}:{i}", require_answer) for i, r in enumerate(records, 1)]
    if not problems:
        raise ValueError(f"{where}: no problems")
    return problems


ROLES = ("system", "developer", "user", "assistant", "tool")


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
        if message["role"] not in ROLES:  # templates make a control token of it
            known, role = ", ".join(ROLES), message["role"]
            raise ValueError(f"{where}: a role is one of {known}; not {role!r:.60}")
        _check_text(message["content"], f'{where}: the content of "{given[0]}"')
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the last message is the assistant's: nothing to answer")
    answer = record.get("answer")
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if whole or (isinstance(answer, float) and math.isfinite(answer)):
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
    a problem would end the user's turn; plain added tokens such as `<think>` pass) or becomes one
    together with what the template puts beside it, cannot be spelled by the tokenizer, is refused
    by the template, or renders to nothing.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    # unk tells unknown text only where it is a token of its own
    shared = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    unknown = None if tokenizer.unk_token_id in shared else tokenizer.unk_token_id
    prompts, own = [], {}  # own: control tokens of the template itself, by the roles
    for problem in problems:
        where, texts = problem["where"], [m["content"] for m in problem["messages"]]
        try:
            # what the tokenizer makes of the bare text decides, not a list of strings
            inside = tokenizer(texts, add_special_tokens=False)["input_ids"]
            if tokenizer.chat_template is None:
                ids = tokenizer("\n\n".join(texts) + "\n\n")["input_ids"]
                ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
            else:
                ids = _through_template(tokenizer, problem["messages"], thinking)
                roles = tuple(m["role"] for m in problem["messages"])
                if roles not in own:
                    plain = [{"role": role, "content": "x"} for role in roles]
                    plain = _through_template(tokenizer, plain, thinking)
                    own[roles] = Counter(i for i in plain if i in special)
        except Exception as error:  # templates and tokenizers raise what they like
            why = first_line(error)
            raise ValueError(f"{where}: cannot be rendered as a prompt: {why}") from error
        found = [i for part in inside for i in part if i in special and i != unknown]
        if found:
            token = tokenizer.convert_ids_to_tokens(found[0])
            raise ValueError(f"{where}: the text contains the control token {token!r}")
        glued = Counter(i for i in ids if i in special and i != unknown)
        if tokenizer.chat_template is not None and (glued := glued - own[roles]):
            token = tokenizer.convert_ids_to_tokens(min(glued))
            raise ValueError(f"{where}: text and template make the control token {token!r}")
        if not ids:
            raise ValueError(f"{where}: the prompt renders to no tokens at all")
        if unknown is not None and any(unknown in part for part in [ids, *inside]):
            raise ValueError(f"{where}: the tokenizer has no tokens for some of this prompt")
        prompts.append(list(ids))
    return prompts


def _through_template(tokenizer, messages, thinking):
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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
            found.update([ids] if isinstance(ids, numbers.Integral) else ids or [])
    if not found:
        names = {getattr(source, "name_or_path", "") for source in sources} - {""}
        raise ValueError(
            f"{', '.join(sorted(names))}: no stop token: neither the models' configs nor the "
            "tokenizer has an EOS"
        )
    return sorted(found)


def pad_id(tokenizer):
    """The pad token's id, else the EOS token's (masks, not ids, tell padding); or ValueError."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    name = getattr(tokenizer, "name_or_path", "")
    raise ValueError(f"{name}: the tokenizer has neither a pad nor an EOS token")


# --------------------------------------------------------------------------------------- models


def load_tokenizer(path, *, trust_remote_code=False):
    """The tokenizer of a local folder or hub name; a one-line ValueError naming it otherwise."""
    tokenizer = _from_pretrained(AutoTokenizer, path, trust_remote_code=trust_remote_code)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # what the library makes of a folder without tokenizer files
        raise ValueError(f"{path}: cannot load Tokenizer: it has no tokens but special ones")
    for option in ("is_local", "local_files_only"):  # of this machine: not to be saved with it
        tokenizer.init_kwargs.pop(option, None)
    return tokenizer


def load_config(path, *, trust_remote_code=False):
    """The model's config with every dropout at 0: what is sampled must be what is trained."""
    config = _from_pretrained(AutoConfig, path, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(f"{path}: {config.model_type} is an encoder-decoder, not a causal LM")
    if not getattr(config.get_text_config(decoder=True), "vocab_size", 0) > 0:
        raise ValueError(f"{path}: {config.model_type} has no vocabulary: not a language model")
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
    missing or of another shape (which would otherwise be drawn at random).
    """
    options = {"trust_remote_code": trust_remote_code}
    options |= {"config": load_config(path, **options), "dtype": dtype}
    options |= {"use_safetensors": None if allow_bin else True, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}  # to name them here
    try:
        model, info = _from_pretrained(AutoModelForCausalLM, path, **options)
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
    try:
        return loader.from_pretrained(name if hint else folder, **options)
    except Exception as error:
        what = loader.__name__.removeprefix("Auto")
        raise ValueError(f"{name}: cannot load {what}: {hint}{first_line(error)}") from error


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


def first_line(error):
    """First line of a message, for errors that come as a wall of text, and the next one where it
    ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__


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
    try:
        ours = model.base_model(input_ids=ids_BT, use_cache=False)[0] @ head.weight.T
        theirs = model(input_ids=ids_BT, use_cache=False).logits
    except RuntimeError as error:  # sizes in the config that do not fit together
        raise ValueError(f"{flag} {type(model).__name__}: {first_line(error)}") from error
    if not theirs.isfinite().all():
        raise ValueError(f"{flag} {type(model).__name__}: its logits are not finite")
    if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
        raise ValueError(
            f"{flag} {type(model).__name__}: its logits are not hidden states times a matrix (a "
            "bias, a soft cap or a scale); not supported"
        )
