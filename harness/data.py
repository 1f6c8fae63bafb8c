"""Problem files and prompts, checked on their way in.

Whatever is wrong is a ValueError of one line that names the file and line. Text is never evaluated,
and control tokens inside it are refused: a problem cannot end the user's turn.
"""

import io
import itertools
import json
import math
import numbers
import os
import re
import threading
from collections import Counter

import nltk

import answers
from harness.cli import first_line

LONGEST_LINE = 2**26  # bytes; a file of any size is read line by line
ROLES = ("system", "developer", "user", "assistant", "tool")


def load_problems(path, *, require_answer=True):
    """Problems of a JSONL file: [{"messages": [..], "answer": str or None, "where": "path:line"}].

    Keys as in public files do, too: "question" for "problem", a worked "solution" for "answer".
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
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r:.60} comes twice")
    return found


def from_records(records, where, *, require_answer=True):
    """The same for objects in memory, as `toy.problems(..)` has; errors name "where:1", .. ."""
    problems = [_problem(r, f"{where}:{i}", require_answer) for i, r in enumerate(records, 1)]
    if not problems:
        raise ValueError(f"{where}: no problems")
    return problems


def _problem(record, where, require_answer):
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    given = [key for key in ("problem", "question", "prompt", "messages") if key in record]
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
            raise ValueError(f"{where}: a role is one of {ROLES}; not {message['role']!r:.60}")
        _check_text(message["content"], f'{where}: the content of "{given[0]}"')
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the last message is the assistant's: nothing to answer")
    worked = require_answer and "solution" in record and "answer" not in record
    answer = record.get(key := "solution" if worked else "answer")
    if type(answer) is int or (type(answer) is float and math.isfinite(answer)):
        answer = str(answer)
    if key in record or require_answer:
        _check_text(answer, f'{where}: "{key}"')
        if key == "solution" or re.search(r"\\boxed|\\fbox|####", answer):  # worked out in full
            answer = answers.extract_answer(answer)
            _check_text(answer, f'{where}: the answer extracted from "{key}"')
    return {"messages": [dict(m) for m in messages], "answer": answer, "where": where}


def _check_text(value, what):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be text and not empty, got {value!r:.60}")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):  # JSON can spell these
        raise ValueError(f"{what} holds half of a surrogate pair, which is not text")


def render_prompts(tokenizer, problems, *, thinking=False):
    """Token ids of every problem's prompt, up to where the model begins to answer: list of lists.

    Through the tokenizer's chat template, with `enable_thinking=thinking`. Without a template: the
    messages' contents, a blank line after each, and the tokenizer's special tokens but an EOS.
    ValueError, naming the problem, when its text holds a control token (`<|im_end|>` would end the
    user's turn; plain added tokens such as `<think>` pass) or becomes one next to the template's,
    cannot be spelled by the tokenizer, is refused by the template, or renders to nothing.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    # unk tells unknown text only where it is a token of its own
    shared = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    unknown = None if tokenizer.unk_token_id in shared else tokenizer.unk_token_id

    def insides(chats):  # what the tokenizer makes of the bare text decides, not a list of strings
        texts = [message["content"] for messages in chats for message in messages]
        parts = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        return [[i for _ in messages for i in next(parts)] for messages in chats]

    def whole(chats):
        if tokenizer.chat_template is None:
            texts = ["".join(m["content"] + "\n\n" for m in messages) for messages in chats]
            found = tokenizer(texts)["input_ids"]
            return [x[:-1] if x and x[-1] == tokenizer.eos_token_id else x for x in found]
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        texts = tokenizer.apply_chat_template(chats, **how)
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    def glued(ids):
        return Counter(i for i in ids if i in special and i != unknown)

    chats, own = [problem["messages"] for problem in problems], {}
    wheres = [problem["where"] for problem in problems]
    inside, prompts = (_all_or_named(work, chats, wheres) for work in (insides, whole))
    for where, messages, part, ids in zip(wheres, chats, inside, prompts, strict=True):
        if found := [i for i in part if i in special and i != unknown]:
            token = tokenizer.convert_ids_to_tokens(found[0])
            raise ValueError(f"{where}: the text contains the control token {token!r}")
        roles = tuple(message["role"] for message in messages)
        if tokenizer.chat_template is not None and roles not in own:  # the template's own ones
            plain = [[{"role": role, "content": "x"} for role in roles]]
            own[roles] = glued(_all_or_named(whole, plain, [where])[0])
        if tokenizer.chat_template is not None and (more := glued(ids) - own[roles]):
            token = tokenizer.convert_ids_to_tokens(min(more))
            raise ValueError(f"{where}: text and template make the control token {token!r}")
        if not ids:
            raise ValueError(f"{where}: the prompt renders to no tokens at all")
        if unknown is not None and unknown in [*ids, *part]:
            raise ValueError(f"{where}: the tokenizer has no tokens for some of this prompt")
    return prompts


def _all_or_named(work, items, wheres, size=1024):
    """work(items), so many at a time. If that raises, a ValueError that names where the first item
    stands with which it does: templates and tokenizers raise what they like."""
    found = []
    for first in range(0, len(items), size):
        some = items[first : first + size], wheres[first : first + size]
        try:
            found += work(some[0])
        except Exception as error:
            if size > 1:
                _all_or_named(work, *some, size=1)
            why = f"cannot be rendered as a prompt: {first_line(error)}"
            raise ValueError(f"{wheres[first]}: {why}") from error
    return found


def check_fit(config, problems, prompts, max_new_tokens):
    """ValueError naming the first problem whose prompt + max_new_tokens exceeds the context of a
    model of that config, or whose ids exceed its vocabulary (model and tokenizer do not match)."""
    config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    for problem, prompt in zip(problems, prompts, strict=True):
        if len(prompt) + max_new_tokens > limit:
            why = f"prompt of {len(prompt)} tokens + {max_new_tokens} new tokens (--max-new-tokens)"
            raise ValueError(f"{problem['where']}: {why} exceed the model's context of {limit}")
        if max(prompt) >= config.vocab_size:
            why = f"token id {max(prompt)} is outside the model's vocabulary of {config.vocab_size}"
            why += ": tokenizer and model do not belong together"
            raise ValueError(f"{problem['where']}: {why}")


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
        names = sorted({getattr(source, "name_or_path", "") for source in sources} - {""})
        why = "neither the models' configs nor the tokenizer has an EOS"
        raise ValueError(f"{', '.join(names)}: no stop token: {why}")
    return sorted(found)


def pad_id(tokenizer):
    """The pad token's id, else the EOS token's (masks, not ids, tell padding); or ValueError."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    name = getattr(tokenizer, "name_or_path", "")
    raise ValueError(f"{name}: the tokenizer has neither a pad nor an EOS token")


def download_punkt(seconds=60):
    """Fetch the data of NLTK's pretrained sentence splitter, or give up in silence.

    NLTK reports errors even when asked to be quiet, and may wait minutes for a server: hence the
    buffer, and a thread that is left behind after so many seconds.
    """

    def fetch():
        try:
            nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO())
        except Exception:  # no network, no disk: the caller finds no data, and says so
            pass

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
