"""Problem files and prompts, checked on their way in: a ValueError of one line names file and line.
Text is never evaluated, and control tokens in it are refused: a problem cannot end its turn."""

import contextlib
import io
import itertools
import math
import numbers
import re
import threading
from collections import Counter

import nltk

import answers
from harness.cli import BIG, first_line, open_regular, parse_json

LONGEST_LINE = 2**26  # bytes; a file of any size is read line by line
# A template's clock that tells a fixed date, of these parts
PARTS = [f"%{c}" for c in (*"aAbBcdDeFGHIjmMpRSTuUVwWxXyYzZ", "-d", "-m", "-H", "-I")]
CLOCK = """{%- macro strftime_now(format) -%}{%- set told = namespace(text=format) -%}
    {%- for part, text in clock.items() -%}{%- set told.text = told.text.replace(part, text) -%}
    {%- endfor -%}{{ told.text }}{%- endmacro -%}"""
ROLES = ("system", "developer", "user", "assistant", "tool")


def load_problems(path, *, require_answer=True, skipped=None):
    """Problems of a JSONL file: [{"messages": [..], "answer": str or None, "where": "path:line"}].
    Keys as in public files do, too: "question" for "problem", a worked "solution" for "answer".
    Blank lines are skipped; else ValueErrors name file and line, for a list `skipped` if given."""
    problems = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                problems.append(_problem(parse_json(line, where), where, require_answer))
            except ValueError as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
    if not problems:
        raise ValueError(f"{path}: no problems in this file")
    return problems


def _lines(path):
    """The lines of a regular file, in bytes, without a byte order mark; ValueError naming it."""
    try:
        with open_regular(path) as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"{path}:{number}: longer than {LONGEST_LINE} bytes")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise ValueError(f"{path}: cannot read problems: {error.strerror or error}") from error


def from_records(records, where, *, require_answer=True):
    """The same for objects in memory, as `toy.problems(..)` has; errors name "where:1", .. ."""
    problems = [_problem(r, f"{where}:{i}", require_answer) for i, r in enumerate(records, 1)]
    if not problems:
        raise ValueError(f"{where}: no problems")
    return problems


def _problem(record, where, require_answer):
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    keys = "problem", "question", "prompt", "messages"
    if len(given := [key for key in keys if key in record]) != 1:
        raise ValueError(f"{where}: needs one of {keys}; has {given}")
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


def render_prompts(tokenizer, problems, *, thinking=False, day=None):
    """Token ids of every problem's prompt, up to where the model begins to answer: list of lists.

    Through the chat template, with `enable_thinking=thinking`, and the date `day` where it prints
    today's. Without one: the messages, a blank line after each, and special tokens but an EOS.
    ValueError, naming the problem, when its text holds a control token (`<|im_end|>` would end the
    user's turn; plain added tokens such as `<think>` pass) or becomes one next to the template's,
    cannot be spelled, is refused by the template, or renders to nothing.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    # unk tells unknown text only where it is a token of its own
    shared = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    unknown = None if tokenizer.unk_token_id in shared else tokenizer.unk_token_id
    special.discard(unknown)
    how, template = {"enable_thinking": thinking}, tokenizer.chat_template
    if day is not None and isinstance(template, str) and "strftime_now" in template:
        how |= {"chat_template": CLOCK + template, "clock": {c: day.strftime(c) for c in PARTS}}

    def insides(chats):  # what the tokenizer makes of the bare text decides, not a list of strings
        texts = [message["content"] for messages in chats for message in messages]
        parts = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        return [[i for _ in messages for i in next(parts)] for messages in chats]

    def texts_of(chats):
        if template is None:
            return ["".join(m["content"] + "\n\n" for m in messages) for messages in chats]
        options = {"tokenize": False, "add_generation_prompt": True}
        return tokenizer.apply_chat_template(chats, **options, **how)

    def whole(chats):
        found = tokenizer(texts_of(chats), add_special_tokens=template is None)["input_ids"]
        end = tokenizer.eos_token_id if template is None else None
        return [x[:-1] if x and x[-1] == end else x for x in found]

    def control(ids):
        return Counter(i for i in ids if i in special)

    chats, own = [problem["messages"] for problem in problems], {}
    wheres = [problem["where"] for problem in problems]
    inside, prompts = (_all_or_named(work, chats, wheres) for work in (insides, whole))
    for where, messages, part, ids in zip(wheres, chats, inside, prompts, strict=True):
        spelled = unknown in part and any(tokenizer.unk_token in m["content"] for m in messages)
        if found := [*control(part), *[unknown] * spelled]:
            token = tokenizer.convert_ids_to_tokens(found[0])
            raise ValueError(f"{where}: the text contains the control token {token!r}")
        roles = tuple(message["role"] for message in messages)
        if template is not None and roles not in own:  # the template's own ones
            plain = [[{"role": role, "content": "x"} for role in roles]]
            own[roles] = control(_all_or_named(whole, plain, [where])[0])
        if template is not None and (more := control(ids) - own[roles]):
            token = tokenizer.convert_ids_to_tokens(min(more))
            raise ValueError(f"{where}: text and template make the control token {token!r}")
        if not ids:
            raise ValueError(f"{where}: the prompt renders to no tokens at all")
        own_unknown = texts_of([messages])[0].count(tokenizer.unk_token) if unknown in ids else 0
        if ids.count(unknown) > own_unknown:  # more than the template spells
            raise ValueError(f"{where}: the tokenizer has no tokens for some of this prompt")
    return prompts


def _all_or_named(work, items, wheres, size=1024):
    """work(items), some at a time, or a ValueError that names the first with which it raises."""
    found = []
    for first in range(0, len(items), size):
        try:
            found += work(items[first : first + size])
        except Exception as error:  # templates and tokenizers raise what they like
            if size > 1:
                _all_or_named(work, items[first:], wheres[first:], size=1)
            why = f"cannot be rendered as a prompt: {first_line(error)}"
            raise ValueError(f"{wheres[first]}: {why}") from error
    return found


def check_fit(config, problems, prompts, max_new_tokens):
    """ValueError naming the first problem that exceeds context or vocabulary of a config."""
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
    """Sorted ids that end a response, of all the models, configs and tokenizers given: teacher and
    student may disagree about EOS. ValueError when there is none, or one is no id."""
    found, names = [], ", ".join(sorted({getattr(s, "name_or_path", "") for s in sources} - {""}))
    for source in sources:
        for part in (source, *(getattr(source, k, None) for k in ("config", "generation_config"))):
            ids = getattr(part, "eos_token_id", None)
            found += [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    for one in found:
        if isinstance(one, bool) or not isinstance(one, numbers.Integral) or not 0 <= one < BIG:
            raise ValueError(f"{names}: stop token {one!r:.60} is not the id of a token")
    if not found:
        why = "neither the models' configs nor the tokenizer has an EOS"
        raise ValueError(f"{names}: no stop token: {why}")
    return sorted({*found})


def pad_id(tokenizer):
    """The pad token's id, else the EOS token's (masks, not ids, tell padding); or ValueError."""
    pad, name = tokenizer.pad_token_id, getattr(tokenizer, "name_or_path", "")
    if pad is None and tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: the tokenizer has neither a pad nor an EOS token")
    return tokenizer.eos_token_id if pad is None else pad


def download_punkt(seconds=60):
    """Fetch NLTK's pretrained sentence splitter, or give up in silence after so many seconds."""

    def fetch():
        with contextlib.suppress(Exception):  # no network, no disk: the caller finds no data
            nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO())

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
