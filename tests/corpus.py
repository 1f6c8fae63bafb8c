r"""What the four commands must refuse, and what they must take although it looks malformed.

    python tests/corpus.py              all of it: minutes on two cores
    python tests/corpus.py --short      an evenly spread part of every group
    python tests/corpus.py --real 50    so many of the cases through `python train.py ..`, too

Every malformed case is a command line in a folder of its own. What must come of it: exit code 2;
one line on stderr, "<command>: error: .." with the culprit in it; nothing on stdout; no file that
was not there before, none changed; no weights read where they are not what is wrong. An accepted
case is a problem file: its texts must come back from the rendered prompt as they went in, without
control tokens, and evaluate.py must take it.

Starting a process costs seconds, nearly all of them for imports. So each case runs in a process
that is forked from one which has imported everything, with real file descriptors and exit codes,
and some of the cases once more as a command that is started from nothing, with the same result.
"""

import argparse
import gc
import gzip
import importlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import toy  # noqa: E402

SECONDS = 60  # that a case may take; what hangs is killed
SHORT = {"malformed": 22, "accepted": 8, "real": 2}  # of every group; all; all
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # the same refusals on every machine
}


@dataclass(frozen=True, eq=False)
class Case:
    """One command line.

    command   train, evaluate, diagnose or toy
    flags     after it; "@name" stands for the folder of that model
    culprit   what the message must name
    files     to lie in its folder: contents, or a function that makes something else at a path
    weights   only the weights show what is wrong
    texts     of an accepted case: the messages of its file mine.jsonl, one after the other
    """

    group: str
    name: str
    command: str
    flags: tuple[str, ...]
    culprit: str = ""
    files: dict[str, bytes | Callable] = field(default_factory=dict)
    weights: bool = False
    texts: tuple[str, ...] = ()


GOOD = {"problem": "How many?", "answer": "3"}
BASE = {
    "train": "--student @tiny --teacher @tiny --problems good.jsonl --max-new-tokens 4 --steps 1 "
    "--prompts-per-step 1 --method opd --out new",
    "evaluate": "--model @tiny --problems good.jsonl --max-new-tokens 4 --samples 1 --out new.json",
    "diagnose": "--student @tiny --teacher @tiny --problems good.jsonl --max-new-tokens 4 "
    "--count 2 --samples 1 --completions 0 --no-figures --out new",
    "toy": "--world clean --steps 1 --out new",
}
TOY_MODELS = {
    "train": "--method opd --steps 1 --prompts-per-step 1 --max-new-tokens 4 --out new",
    "evaluate": "--model @toy --max-new-tokens 4 --samples 1 --out new.json",
    "diagnose": "--student @toy --teacher @toy --max-new-tokens 4 --count 2 --samples 1 "
    "--completions 0 --no-figures --out new",
}


def case(group, name, command, more, culprit, base=BASE, **rest):
    """A case whose flags come after those that would make the command run."""
    more = more.split() if isinstance(more, str) else more
    flags = (*base.get(command, "").split(), *more)
    return Case(group, f"{command}: {name}", command, flags, culprit, **rest)


# -------------------------------------------------------------------------------- problem lines
def raw(record) -> bytes:
    """A line of JSON, unless it is one."""
    return record if isinstance(record, bytes) else json.dumps(record).encode()


def chat(*messages, **more):
    """A record with messages given as (role, content)."""
    return {"messages": [{"role": r, "content": c} for r, c in messages], "answer": 1, **more}


BROKEN = {  # no JSON, or not of this kind
    "truncated object": b'{"problem": "a", "answer": 1',
    "truncated text": b'{"problem": "a',
    "truncated key": b'{"prob',
    "truncated after colon": b'{"problem":',
    "truncated list": b'{"messages": [{"role": "user", "content": "a"}',
    "opening brace": b"{",
    "closing brace": b"}",
    "quote": b'"',
    "trailing comma": b'{"problem": "a", "answer": 1,}',
    "trailing comma in a list": b'{"messages": [{"role": "user", "content": "a"},], "answer": 1}',
    "leading comma": b'{, "problem": "a", "answer": 1}',
    "missing comma": b'{"problem": "a" "answer": 1}',
    "missing colon": b'{"problem" "a"}',
    "equals sign": b'{"problem" = "a"}',
    "single quotes": b"{'problem': 'a', 'answer': 1}",
    "typographic quotes": "{“problem”: “a”}".encode(),
    "bare key": b'{problem: "a", "answer": 1}',
    "bare value": b'{"problem": a}',
    "python's None": b'{"problem": "a", "answer": None}',
    "python's True": b'{"problem": "a", "answer": 1, "hard": True}',
    "line comment": b'{"problem": "a", "answer": 1} // easy',
    "hash comment": b"# problems",
    "block comment": b'{"problem": "a", /* easy */ "answer": 1}',
    "two objects": b'{"problem": "a", "answer": 1}{"problem": "b", "answer": 2}',
    "two objects and a comma": b'{"problem": "a", "answer": 1}, {"problem": "b", "answer": 2}',
    "object and garbage": b'{"problem": "a", "answer": 1} x',
    "garbage and object": b'x {"problem": "a", "answer": 1}',
    "hexadecimal": b'{"problem": "a", "answer": 0x10}',
    "leading zero": b'{"problem": "a", "answer": 01}',
    "plus sign": b'{"problem": "a", "answer": +1}',
    "no digit before the point": b'{"problem": "a", "answer": .5}',
    "no digit after the point": b'{"problem": "a", "answer": 1.}',
    "thousands": b'{"problem": "a", "answer": 1,000}',
    "lower-case nan": b'{"problem": "a", "answer": nan}',
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep lists, closed": b'{"problem": "a", "x": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
    "raw tab in text": b'{"problem": "a\tb", "answer": 1}',
    "raw carriage return in text": b'{"problem": "a\rb", "answer": 1}',
    "raw NUL in text": b'{"problem": "a\0b", "answer": 1}',
    "raw escape in text": b'{"problem": "a\x1b[2Jb", "answer": 1}',
    "NUL alone": b"\0",
    "NUL behind": b'{"problem": "a", "answer": 1}\0',
    "escape of one letter": rb'{"problem": "a\x41", "answer": 1}',
    "short escape": rb'{"problem": "\u12", "answer": 1}',
    "escape that is no number": rb'{"problem": "\uZZZZ", "answer": 1}',
    "backslash at the end": b'{"problem": "a\\"}',
    "byte ff": b'{"problem": "\xff", "answer": 1}',
    "byte ff alone": b"\xff",
    "overlong NUL": b'{"problem": "\xc0\x80", "answer": 1}',
    "surrogate in UTF-8": b'{"problem": "\xed\xa0\x80", "answer": 1}',
    "beyond Unicode": b'{"problem": "\xf4\x90\x80\x80", "answer": 1}',
    "cut emoji": b'{"problem": "\xf0\x9f\x98", "answer": 1}',
    "Latin-1": '{"problem": "é", "answer": 1}'.encode("latin-1"),
    "UTF-16": '{"problem": "a", "answer": 1}'.encode("utf-16-le"),
    "UTF-16 with mark": '{"problem": "a", "answer": 1}'.encode("utf-16"),
    "UTF-32": '{"problem": "a", "answer": 1}'.encode("utf-32-be"),
    "byte order mark in the middle": b'\xef\xbb\xbf{"problem": "a", "answer": 1}',
    "no-break space before": b'\xc2\xa0{"problem": "a", "answer": 1}',
    "5000 digits": b'{"problem": "a", "answer": ' + b"9" * 5000 + b"}",
    "5000 digits, unused": b'{"problem": "a", "answer": 1, "id": ' + b"9" * 5000 + b"}",
    "a megabyte of garbage": b"\x93\x17garbage " * 100_000,
    "a megabyte of one letter": b"a" * 1_000_000,
    "a megabyte in quotes": b'"' + b"a" * 1_000_000 + b'"',
    "null": b"null",
    "true": b"true",
    "a number": b"3",
    "a text": b'"How many?"',
    "a list": b"[]",
    "an object in a list": b'[{"problem": "a", "answer": 1}]',
    "a pair": b'["How many?", "3"]',
    "NaN": b"NaN",
    "plain text": b"How many?",
    "YAML": b"problem: a",
    "XML": b"<problem>a</problem>",
    "CSV": b"problem,answer",
}

EMPTY = {"empty": "", "space": " ", "line ends": "\r\n\t", "no-break space": "\xa0",
         "ideographic space": "\u3000", "line separator": "\u2028", "form feed": "\f"}  # fmt: skip
NO_TEXT = {"null": None, "number": 3, "float": 0.5, "true": True, "list": ["a"],
           "object": {"text": "a"}, "parts": [{"type": "text", "text": "a"}]}  # fmt: skip

CONTENT = {  # JSON, and no problem
    "empty object": {},
    "no prompt": {"answer": 1},
    "capital key": {"Problem": "a", "answer": 1},
    "key with a space": {"problem ": "a", "answer": 1},
    "another key": {"task": "a", "answer": 1},
    "problem and prompt": {"problem": "a", "prompt": "a", "answer": 1},
    "problem and messages": {"problem": "a", **chat(("user", "a"))},
    "prompt and messages": {"prompt": "a", **chat(("user", "a"))},
    "all three": {"problem": "a", "prompt": "a", **chat(("user", "a"))},
    "prompt null, problem there": {"problem": "a", "prompt": None, "answer": 1},
    "problem twice": b'{"problem": "a", "problem": "b", "answer": 1}',
    "the same problem twice": b'{"problem": "a", "problem": "a", "answer": 1}',
    "answer twice": b'{"problem": "a", "answer": 1, "answer": 2}',
    "role twice": b'{"messages": [{"role": "system", "role": "user", "content": "a"}], '
    b'"answer": 1}',
    "unused key twice": b'{"problem": "a", "answer": 1, "meta": {"id": 1, "id": 2}}',
    "key twice, once escaped": rb'{"problem": "a", "\u0070roblem": "b", "answer": 1}',
    **{f"problem {k}": {"problem": v, "answer": 1} for k, v in (NO_TEXT | EMPTY).items()},
    **{f"prompt {k}": {"prompt": v, "answer": 1} for k, v in (NO_TEXT | EMPTY).items()},
    **{f"content {k}": chat(("user", v)) for k, v in (NO_TEXT | EMPTY).items()},
    **{f"second content {k}": chat(("system", "a"), ("user", v)) for k, v in NO_TEXT.items()},
    **{
        f"answer {k}": {"problem": "a", "answer": v}
        for k, v in (NO_TEXT | EMPTY).items() if k not in ("number", "float")
    },
    "answer NaN": b'{"problem": "a", "answer": NaN}',
    "answer Infinity": b'{"problem": "a", "answer": Infinity}',
    "answer -Infinity": b'{"problem": "a", "answer": -Infinity}',
    "answer 1e999": b'{"problem": "a", "answer": 1e999}',
    "messages null": {"messages": None, "answer": 1},
    "messages text": {"messages": "a", "answer": 1},
    "messages number": {"messages": 3, "answer": 1},
    "messages object": {"messages": {"role": "user", "content": "a"}, "answer": 1},
    "messages empty": {"messages": [], "answer": 1},
    "messages of text": {"messages": ["a"], "answer": 1},
    "messages of null": {"messages": [None], "answer": 1},
    "messages of lists": {"messages": [["user", "a"]], "answer": 1},
    "messages of messages": {"messages": [[{"role": "user", "content": "a"}]], "answer": 1},
    "message empty": {"messages": [{}], "answer": 1},
    "message without role": {"messages": [{"content": "a"}], "answer": 1},
    "message without content": {"messages": [{"role": "user"}], "answer": 1},
    "message with a name": {"messages": [{"role": "user", "content": "a", "name": "b"}]},
    "message from, value": {"messages": [{"from": "human", "value": "a"}], "answer": 1},
    "second message broken": {"messages": [{"role": "user", "content": "a"}, 3], "answer": 1},
    **{f"role {k}": chat((v, "a")) for k, v in (NO_TEXT | EMPTY).items()},
    "role User": chat(("User", "a")),
    "role human": chat(("human", "a")),
    "role end, a control token in templates": chat(("end", "a"), ("user", "a")),
    "role pad, a control token in templates": chat(("pad", "a")),
    "role a control token": chat(("<|user|>", "a")),
    "role with a line end": chat(("user\n", "a")),
    "role with NUL": chat(("user\0", "a")),
    "role a megabyte": chat(("u" * 1_000_000, "a")),
    "role Cyrillic": chat(("usеr", "a")),
    "last message the assistant's": chat(("user", "a"), ("assistant", "b")),
    "only message the assistant's": chat(("assistant", "b")),
    "lone high surrogate": rb'{"problem": "a\ud83d", "answer": 1}',
    "lone low surrogate": rb'{"problem": "\ude00b", "answer": 1}',
    "surrogates the wrong way round": rb'{"problem": "\ude00\ud83d", "answer": 1}',
    "surrogate in the answer": rb'{"problem": "a", "answer": "\ud83d"}',
    "surrogate in a message": rb'{"messages": [{"role": "user", "content": "\udfff"}]}',
    "prompt longer than the context": {"problem": "a" * 5000, "answer": 1},
    "prompt of a megabyte": {"problem": "a" * 1_000_000, "answer": 1},
    "emoji longer than the context": {"problem": "\U0001f600" * 1200, "answer": 1},
}
NO_ANSWER = {
    "no answer": {"problem": "a"},
    "a solution without an answer": {"problem": "a", "solution": "none"},
    "no answer to messages": {"messages": [{"role": "user", "content": "a"}]},
    "answer under another case": {"prompt": "a", "Answer": 1},
}

WAYS = {  # where a problem file goes in
    "problems": ("train", "--problems {}"),
    "eval": ("train", "--eval-problems {}"),
    "evaluate": ("evaluate", "--problems {}"),
    "ood": ("train", "--eval-problems good.jsonl --ood-problems {}"),
    "diagnose": ("diagnose", "--problems {}"),
}


def line_cases():
    """Bad lines as the first, a middle and the last one of a file, in every place a file goes."""
    lines = [(name, raw(line), list(WAYS)) for name, line in (BROKEN | CONTENT).items()]
    lines += [(name, raw(line), list(WAYS)[1:4]) for name, line in NO_ANSWER.items()]
    for number, (name, line, ways) in enumerate(lines):
        way = ways[number % len(ways)]
        command, flags = WAYS[way]
        place = number % 3
        if line.startswith(b"\xef\xbb\xbf"):
            place = 1  # at the start of a file it is legal
        good = raw(GOOD)
        parts = [good, good]
        parts.insert(place, line)
        text = b"\n".join(parts) + b"\n" * (number % 2)
        yield case("lines", f"{way} {name}", command, flags.format("bad.jsonl"),
                   f"bad.jsonl:{place + 1}: ", files={"bad.jsonl": text})  # fmt: skip
    good, bad = raw(GOOD) + b"\n", b"{\n"
    for where, text in ((1000, good * 999 + bad + good), (4, good + b"\n \r\n" + bad)):
        for way, (command, flags) in WAYS.items():
            yield case("lines", f"{way} line {where}", command, flags.format("bad.jsonl"),
                       f"bad.jsonl:{where}: ", files={"bad.jsonl": text})  # fmt: skip


def sparse(path: Path) -> None:
    """A file of a terabyte that takes no room."""
    with open(path, "wb") as file:
        file.truncate(1 << 40)


FILES = {  # name: (what lies there, its name or what the message says)
    "empty": (b"", "bad.jsonl"),
    "a line end": (b"\n", "bad.jsonl"),
    "white space": (b" \t\r\n\n  \n", "bad.jsonl"),
    "a byte order mark only": (b"\xef\xbb\xbf", "bad.jsonl"),
    "a folder": (lambda path: path.mkdir(), "bad.jsonl"),
    "a pipe": (lambda path: os.mkfifo(path), "bad.jsonl"),
    "a link to a pipe": (lambda p: (os.mkfifo(p.parent / "pipe"), p.symlink_to("pipe")), "bad"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "bad.jsonl"),
    "a link to itself": (lambda path: path.symlink_to("bad.jsonl"), "bad.jsonl"),
    "a link to a folder": (lambda path: path.symlink_to(".."), "bad.jsonl"),
    "a link to /dev/zero": (lambda path: path.symlink_to("/dev/zero"), "bad.jsonl"),
    "a terabyte": (sparse, "bad.jsonl:1"),
    "binary": (bytes(range(256)) * 50, "bad.jsonl:1"),
    "compressed": (gzip.compress(raw(GOOD), mtime=0), "bad.jsonl:1"),
    "UTF-16": ('{"problem": "a", "answer": 1}\n'.encode("utf-16"), "bad.jsonl:1"),
    "UTF-16 without mark": ('{"problem": "a", "answer": 1}\n'.encode("utf-16-be"), "bad.jsonl:1"),
    "a list over lines": (json.dumps([GOOD, GOOD], indent=1).encode(), "bad.jsonl:1"),
    "an object over lines": (json.dumps(GOOD, indent=1).encode(), "bad.jsonl:1"),
    "line ends of another age": (raw(GOOD) + b"\r" + raw(GOOD), "bad.jsonl:1"),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + raw(GOOD), "bad.jsonl:1"),
    "a model's weights": (lambda p: p.write_bytes((TOY / "model.safetensors").read_bytes()), "bad"),
}
TOY = toy.ASSETS / "clean"
PATHS = ("nowhere.jsonl", "nowhere/at/all.jsonl", "good.jsonl/below", "/dev/zero", "/dev/null",
         "/dev/stdin", "/proc/self/mem", "/proc/self/task", "~nobody-of-that-name/p.jsonl", ".",
         "/", "*.jsonl", "https://example.org/p.jsonl", "file:good.jsonl", "@", "good.jsonl ",
         "GOOD.JSONL", "p\u202elnosj.jsonl", "\U0001f600.jsonl", "n" * 256,
         "n/" * 2200)  # fmt: skip
UNSPEAKABLE = {"empty name": "", "NUL": "a\0b", "line end": "a\nb", "escape": "\x1b[2J",
               "half a surrogate": "a\udcff"}  # fmt: skip


def file_cases():
    """Files that hold no problems, and paths that lead to none."""
    for number, (name, (content, culprit)) in enumerate(FILES.items()):
        ways = list(WAYS)
        for way in (ways[number % 5], ways[(number + 1 + number // 5 % 4) % 5]):
            command, flags = WAYS[way]
            yield case("lines", f"{way} file {name}", command, flags.format("bad.jsonl"), culprit,
                       files={"bad.jsonl": content})  # fmt: skip
    for number, path in enumerate(PATHS):
        way = list(WAYS)[number % 5]
        command, flags = WAYS[way]
        more = [path if flag == "{}" else flag for flag in flags.split()]
        shown = "".join(c if c.isprintable() else "\\u202e" for c in path)
        yield case("lines", f"{way} path {path[:20]}", command, more, shown[:200])
    for name, path in UNSPEAKABLE.items():
        for way, (command, flags) in WAYS.items():
            more = [path if flag == "{}" else flag for flag in flags.split()]
            yield case("lines", f"{way} path {name}", command, more, more[-2])


# -------------------------------------------------------------------------------------- prompts
CONTROL = ("<|end|>", "<|user|>", "<|pad|>")
SPELLINGS = {
    "alone": "{}", "first": "{} and then?", "last": "what is {}", "in the middle": "what {} then?",
    "in a word": "wh{}at", "twice": "{}{}", "between line ends": "a\n{}\nb", "in quotes": "'{}'",
    "behind NUL": "\0{}", "behind an emoji": "\U0001f600{}", "behind a joiner": "a\u200d{}",
    "before a combining mark": "{}\u0301", "in brackets": "<{}>", "behind half of one": "<|en{}",
    "right to left": "\u202e{}\u202c",
}  # fmt: skip
NOT_IN_THE_TOY = {
    "a word": "Where is the elephant?", "an emoji": "\U0001f600", "a family": "\U0001f468\u200d"
    "\U0001f469\u200d\U0001f467", "an accent": "Whe\u0301re does it stop?", "Hebrew": "שלום",
    "Arabic": "مرحبا", "a bidi control": "Where\u202e does it stop?", "a zero width space":
    "Where\u200b does it stop?", "a zero width joiner": "Where\u200d", "a soft hyphen":
    "Wh\u00adere", "Chinese": "停在哪里", "full width": "１６", "a fraction": "½", "NUL": "Where\0",
    "a line end": "Where\ndoes it stop?", "a tab": "Where\tdoes", "two spaces": "Where  does",
    "a large number": "The dial starts at 99.", "a word in capitals": "WHERE does it stop?",
    "its unknown token": "Where does <|unk|> stop?", "its pad token": "Where does <|pad|> stop?",
    "its end token": "Where does it stop?<|end|>", "its turn token": "<|assistant|> The",
}  # fmt: skip
TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "renders to nothing": "{% if false %}x{% endif %}",
    "has a syntax error": "{% for %}",
    "never ends its loop": "{% for m in messages %}{{ m['content'] }}",
    "calls nothing": "{{ nothing() }}",
    "knows no such filter": "{{ messages | nonsense }}",
    "divides by zero": "{{ 1 // 0 }}",
    "includes a file": "{% include '/etc/passwd' %}",
    "reaches into python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "counts for ever": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "adds numbers to text": "{{ messages[0]['content'] + 1 }}",
    "wants two messages": "{{ messages[1]['content'] }}",
}


def prompt_cases():
    """Texts that would leave their turn, or cannot be spelled; templates that do not render."""
    number = 0
    for how, spelling in SPELLINGS.items():
        for token in CONTROL[: 3 if how in ("alone", "first", "last", "in the middle") else 1]:
            number += 1
            text = spelling.replace("{}", token)
            record = {"problem": text, "answer": 1}
            record = chat(("system", text), ("user", "a")) if number % 3 == 0 else record
            line = raw(record)
            line = line.replace(b"<|", rb"\u003c|") if number % 4 == 0 else line
            command = ("train", "evaluate", "diagnose")[number % 3]
            model = ("@tiny", "@plain")[number // 2 % 2]
            flag = "--model" if command == "evaluate" else "--student"
            files = {"bad.jsonl": raw(GOOD) + b"\n" + line}
            yield case("prompts", f"{token} {how}", command,
                       f"{flag} {model} --problems bad.jsonl", "bad.jsonl:2: ", files=files)
    for name, text in NOT_IN_THE_TOY.items():
        number += 1
        files = {"bad.jsonl": raw({"problem": text, "answer": 1})}
        yield case("prompts", f"toy, {name}", ("train", "evaluate")[number % 2],
                   "--problems bad.jsonl", "bad.jsonl:1: ", base=TOY_MODELS, files=files)
    yield from template_cases()


def template_cases():
    """Templates that do not render, or make control tokens of what stands beside them."""
    for name in TEMPLATES:
        model = "@template-" + name.replace(" ", "-")
        yield case("prompts", f"template {name}", "evaluate", f"--model {model}", "good.jsonl:1: ")
        yield case("prompts", f"template {name}", "train", f"--student {model}", "good.jsonl:1: ")
    glued = {
        "two messages": ("@glue", chat(("user", "<|en"), ("user", "d|>"))),
        "three messages": ("@glue", chat(("user", "<|"), ("user", "us"), ("user", "er|>"))),
        "text and template": ("@open", {"problem": "end|>", "answer": 1}),
        "text and template, more behind": ("@open", {"problem": "user|> I am", "answer": 1}),
    }
    for name, (model, record) in glued.items():
        files = {"bad.jsonl": raw({"problem": "end", "answer": 1}) + b"\n" + raw(record)}
        for command, flag in (("train", "--student"), ("evaluate", "--model")):
            yield case("prompts", f"control token out of {name}", command,
                       f"{flag} {model} --problems bad.jsonl", "bad.jsonl:2: ", files=files)
    for command in ("train", "evaluate"):
        for name, more in (("one token more than the context", "4086"), ("the context", "4096"),
                           ("more than anything", "1000000000000")):  # fmt: skip
            yield case("prompts", f"{name} to write", command, f"--max-new-tokens {more}",
                       "good.jsonl:1: ")
    yield case("prompts", "toy problems beyond the context", "train", "--max-new-tokens 500",
               "toy:1: ", base=TOY_MODELS)
    yield case("prompts", "toy problems beyond the context", "evaluate", "--max-new-tokens 500",
               "toy varied:1: ", base=TOY_MODELS)
    yield case("prompts", "toy world, short context", "evaluate", "--model @short --toy horizon",
               "toy horizon:1: ", base={})


# ---------------------------------------------------------------------------------------- flags
def numeric_values(kind, low, high):
    """What is no number of that kind between the two, by what is wrong with it."""
    least = 0.0 if 0 < low < 1e-20 else low - 1
    most = high * 10 if high >= 1e18 else high + 1
    values = {"below": f"{kind(least)}", "above": f"{kind(most)}", "far below": "-1e30",
              "nan": "nan", "NaN": "-NaN", "infinite": "inf", "minus infinite": "-inf",
              "overflowing": "1e999", "empty": "", "text": "many", "hexadecimal": "0x10",
              "comma": "1,5", "two": "1 2", "percent": "50%", "400 digits": "9" * 400,
              "5000 digits": "9" * 5000, "minus 400 digits": "-" + "9" * 400,
              "NUL": "1\0", "None": "None", "two signs": "--1"}  # fmt: skip
    if kind is int:
        values |= {"float": "1.5", "exponent": "1e1", "point": "2.", "fraction": "1/2",
                   "just below": f"{least}", "superscript": "²"}  # fmt: skip
    return values


ALWAYS = ("below", "above", "nan", "infinite", "empty", "text", "float", "400 digits")


def flag_cases(command, parser, more=1):
    """Every flag that the parser of a command has, by its kind; of what a number may not be ALWAYS
    and `more` of the rest, by turns."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    for count, action in enumerate(parser._actions):
        flag = action.option_strings[-1]
        if flag == "--help":
            continue
        values = {}
        if limits := getattr(action.type, "limits", None):
            values = numeric_values(*limits)
            always = {k: values.pop(k) for k in ALWAYS if k in values}
            rest = list(values.items())
            turn = count * more % len(rest)
            values = always | dict((rest[turn:] + rest[:turn])[:more])
        elif action.choices:
            one = list(action.choices)[0]
            values = {"wrong": "magic", "empty": "", "capitals": one.upper(), "space": one + " ",
                      "cut": one[:-1], "two": f"{one},{one}"}  # fmt: skip
        elif action.nargs == 0:
            values = {"value": "yes", "empty": ""}
        elif action.type is not None:
            values = UNSPEAKABLE
        for name, value in values.items():
            yield case("flags", f"{flag} {name}", command, [f"{flag}={value}"], flag)
        if action.nargs != 0:
            yield case("flags", f"{flag} without a value", command, [flag], flag)
        for short in (flag[:-1], flag[: len(flag) // 2 + 1]):
            if short not in known and len(short) > 2:
                yield case("flags", f"{flag} cut to {short}", command, f"{short}=1", short)


UNKNOWN = ("--frobnicate", "--STEPS=1", "-x", "extra", "—steps=1", "--max_new_tokens=4", "--=1",
           "-seed=1", "--no-thinking", "@response.txt", "extra\x1b[2J")  # fmt: skip
COMBINATIONS = {
    "train": [
        ("--method lgr_topk --lgr-top-k 9 --union-top-k 8", "--lgr-top-k 9 exceeds"),
        ("--method rkl --lookahead on", "--objective rkl"),
        ("--method fkl --lookahead on", "--objective fkl"),
        ("--method lgr --objective jsd", "--objective jsd"),
        ("--method opd --prefix-tokens 9", "--prefix-tokens 9"),
        ("--method release --prefix-tokens 9", "--prefix-tokens 9"),
        ("--method prefix --mask random --prefix-tokens 1", "--prefix-tokens 1"),
        ("--method random --budget own", "--budget own"),
        ("--method release --budget own", "--budget own"),
        ("--ood-problems good.jsonl", "--ood-problems"),
        ("--method release --margin-top-k 260", "--margin-top-k 260"),
        ("--method shuffled --margin-top-k 1000", "--margin-top-k 1000"),
        ("--method lgr --lgr-top-k 260", "--lgr-top-k 260"),
        ("--method lgr_topk --union-top-k 260", "--union-top-k 260"),
        ("--device cuda", "--device cuda"),
        ("--difficulty 13", "--difficulty"),
        ("--toy horizon --toy nowhere", "nowhere"),
        ("--seed 1 --seed -1", "--seed"),
        ("--steps 1 --steps", "--steps"),
        ("--steps 1 2", "2"),
    ],
    "evaluate": [
        ("--toy horizon", "--toy"),
        ("--difficulty 3", "--difficulty"),
        ("--temperature 0 --samples 2", "--samples"),
        ("--temperature 1e-300", "--temperature"),
        ("--temperature 5e-324", "--temperature"),
        ("--toy horizon --toy nowhere", "nowhere"),
        ("--samples 1 2", "2"),
        ("--device nonsense", "--device nonsense"),
        ("--device cuda", "--device cuda"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device cpu:x", "--device cpu:x"),
        ("--device CPU", "--device CPU"),
        ("--device meta", "--device meta"),
        ("--device xpu", "--device xpu"),
        ("--device hpu", "--device hpu"),
        ("--device mkldnn", "--device mkldnn"),
        ("--device privateuseone", "--device privateuseone"),
        ("--device=", "--device"),
    ],
    "diagnose": [
        ("--top-k 3", "--top-k 3"),
        ("--top-k 260", "--top-k 260"),
        ("--lgr-top-k 17", "--top-k 16"),
        ("--margin-top-k 17", "--top-k 16"),
        ("--compare @tiny @tiny", "'tiny'"),
        ("--compare student", "'student'"),
        ("--compare @tiny @nowhere", "@nowhere"),
        ("--compare", "--compare"),
        ("--compare @other", "--compare"),
        ("--device cuda", "--device cuda"),
        ("--difficulty 13", "--difficulty"),
        ("--toy horizon --toy nowhere", "nowhere"),
        ("--count 1 --count 0", "--count"),
        ("--samples 1 2", "2"),
    ],
    "toy": [
        ("--horizon 3 --corruption 0.5", "--world"),
        ("--corruption 0.5", "--corruption"),
        ("--world clean --world nowhere", "nowhere"),
        ("--table", "--table"),
        ("--steps 1 2", "2"),
    ],
}
ALONE = {
    "train": [("--toy off-by-one --out new --steps 1", "python -m toy --world off-by-one"),
              ("--toy nowhere", "nowhere")],
    "evaluate": [("--problems good.jsonl", "--problems"), ("--toy nowhere", "nowhere"),
                 ("--toy off-by-one", "python -m toy --world off-by-one"),
                 ("--difficulty 13", "--difficulty")],
    "diagnose": [("--problems good.jsonl", "--problems"), ("--toy nowhere", "nowhere"),
                 ("--problems good.jsonl --student @tiny", "--problems"),
                 ("--problems good.jsonl --teacher @tiny", "--problems"),
                 ("--toy off-by-one --out new", "python -m toy --world off-by-one"),
                 ("--student @tiny", "--teacher has another tokenizer")],
    "toy": [("", "--force"), ("--steps 1", "--force"), ("--horizon 3", "--corruption"),
            ("--corruption 0.5", "--horizon"), ("--table --force", "--table"),
            ("--table --world clean", "--table"), ("--table --out new", "new"),
            ("--table --horizon 3 --corruption 0.5", "--table"), ("--table --steps 1", "--table")],
}  # fmt: skip


def all_flag_cases():
    """The flags of all commands, and what makes no sense together."""
    import harness

    for command in ("train", "evaluate", "diagnose", "toy"):
        module, tables = module_of(command), ()
        if command == "train":
            module, tables = harness.flags, ("train.py", module.FLAGS, module.PRESETS)
        yield from flag_cases(command, module.make_parser(*tables))
        for word in UNKNOWN:
            yield case("flags", f"unknown {word}", command, [word], word.rstrip("\x1b[2J"))
        for more, culprit in COMBINATIONS[command]:
            yield case("flags", more, command, more, culprit)
        for more, culprit in ALONE[command]:
            built = toy.world("off-by-one").teacher
            if "off-by-one" not in more or not built.exists():  # somebody may have built it
                yield case("flags", f"alone {more}", command, more, culprit, base={})


# --------------------------------------------------------------------------------------- models
def change(name, **values):
    """A function that changes some keys of a JSON file in a model folder."""

    def apply(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return apply


def put(name, content):
    """A function that replaces a file of a model folder; without content it is deleted."""

    def apply(folder):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return apply


def weights(edit):
    """A function that applies another to the tensors of a model folder, by name."""

    def apply(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut_weights(share):
    """A function that leaves that share of the weights' bytes."""

    def apply(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])

    return apply


def pickled(folder):
    """Weights as a pickle only, which could run code."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def other_architecture(name, model=None, **sizes):
    """A function that turns a folder into one of another architecture, weights too if named."""

    def apply(folder):
        import transformers

        config = getattr(transformers, f"{name}Config")(vocab_size=259, **sizes)
        (folder / "model.safetensors").unlink()
        config.save_pretrained(folder)
        if model:
            getattr(transformers, model)(config).save_pretrained(folder)

    return apply


def index(name, shard):
    """A function that adds an index of weights which names a shard."""
    kind = "bin" if name == "pytorch_model" else "safetensors"
    return put(f"{name}.{kind}.index.json", raw({"metadata": {}, "weight_map": {"x": shard}}))


REMOTE_CODE = b'open("marker", "w").write("code that came with a model has run")\n'


def remote(auto_map, **more):
    """A function that adds code to a model folder, which leaves a file where it runs."""

    def apply(folder):
        (folder / "evil.py").write_bytes(REMOTE_CODE)
        change("config.json", auto_map=auto_map, **more)(folder)

    return apply


def remote_tokenizer(folder):
    """Code in the place of the tokenizer."""
    (folder / "evil.py").write_bytes(REMOTE_CODE)
    change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
           tokenizer_class="EvilTokenizer")(folder)  # fmt: skip


def no_tokenizer(folder):
    """Everything but the tokenizer."""
    for path in [*folder.glob("*token*"), folder / "chat_template.jinja"]:
        path.unlink()


def no_stop(folder):
    """A tokenizer without EOS and pad: nothing would end a response."""
    change("tokenizer_config.json", eos_token=None, pad_token=None)(folder)


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16}  # fmt: skip
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2}  # fmt: skip
T5 = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
INDEX = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}

MODELS = {  # name: (what is done to a good folder, what the message names beside it)
    "no-config": (put("config.json", None), ""),
    "config-empty": (put("config.json", b""), ""),
    "config-cut": (put("config.json", b'{"model_type": "qwen3", '), ""),
    "config-binary": (put("config.json", b"\xff\x00\x80"), ""),
    "config-list": (put("config.json", b"[]"), ""),
    "config-text": (put("config.json", b'"qwen3"'), ""),
    "config-object": (put("config.json", b"{}"), ""),
    "config-deep": (put("config.json", b"[" * 100_000), ""),
    "architecture-unknown": (change("config.json", model_type="frobnicator"), "frobnicator"),
    "architecture-number": (change("config.json", model_type=3), ""),
    "width-text": (change("config.json", hidden_size="big"), "hidden_size"),
    "vocabulary-text": (change("config.json", vocab_size="many"), "vocab_size"),
    "vocabulary-zero": (change("config.json", vocab_size=0), ""),
    "vocabulary-negative": (change("config.json", vocab_size=-5), ""),
    "context-text": (change("config.json", max_position_embeddings="long"), "max_position"),
    "layers-more": (change("config.json", num_hidden_layers=5), ""),
    "eos-text": (change("config.json", eos_token_id="end"), "eos_token_id"),
    "tokenizer-missing": (no_tokenizer, ""),
    "tokenizer-empty": (put("tokenizer.json", b""), ""),
    "tokenizer-object": (put("tokenizer.json", b"{}"), ""),
    "tokenizer-cut": (put("tokenizer.json", b'{"version": "1.0", "model"'), ""),
    "tokenizer-binary": (put("tokenizer.json", b"\x80\xff\x00"), ""),
    "tokenizer-config-cut": (put("tokenizer_config.json", b"{"), ""),
    "encoder-decoder-t5": (other_architecture("T5", **T5), "encoder-decoder"),
    "encoder-decoder-bart": (
        other_architecture("Bart", "BartForConditionalGeneration", **BART), "encoder-decoder"
    ),
    "images": (lambda folder: put("config.json", b'{"model_type": "vit"}')(folder), "vit"),
    "adapter": (put("adapter_config.json", b'{"base_model_name_or_path": "tiny"}'), "LoRA adapter"),
    "index-pickle": (index("model", "weights.bin"), "weights.bin"),
    "index-outside": (index("model", "../tiny/model.safetensors"), "../tiny/model.safetensors"),
    "index-absolute": (index("model", "/tmp/m.safetensors"), "/tmp/m.safetensors"),
    "index-bin-outside": (index("pytorch_model", "../weights.bin"), "../weights.bin"),
    "index-number": (index("model", 3), "model.safetensors.index.json"),
    "weights-named": (change("config.json", transformers_weights="adapter_model.bin"), "adapter"),
    "encoder": (other_architecture("Bert", "BertForMaskedLM", **BERT), "encoder"),
    "pad-outside": (change("tokenizer_config.json", pad_token="<|far|>"), "pad token"),
    "stop-text": (change("generation_config.json", eos_token_id=["end"]), "stop token"),
    "stop-negative": (change("generation_config.json", eos_token_id=-3), "stop token"),
    "stop-outside": (change("generation_config.json", eos_token_id=[0, 10**30]), "stop token"),
    "a-pipe": (lambda f: os.mkfifo(f / "pytorch_model.bin"), "pytorch_model.bin"),
    "remote-config": (
        remote({"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil"), ""
    ),
    "remote-all": (
        remote({"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M",
                "AutoTokenizer": ["evil.T", None]}, model_type="evil", architectures=["M"]), ""
    ),
}  # fmt: skip
WEIGHTS = {  # the same where it takes the weights to see it
    "weights-missing": (put("model.safetensors", None), ""),
    "weights-empty": (put("model.safetensors", b""), ""),
    "weights-cut": (cut_weights(0.9), ""),
    "weights-header-cut": (cut_weights(0.01), ""),
    "weights-garbage": (put("model.safetensors", b"\x93\x17garbage" * 1000), ""),
    "weights-huge-header": (put("model.safetensors", b"\xff" * 8 + b"{}"), ""),
    "weights-pickled": (pickled, ""),
    "weights-pickle-renamed": (put("model.safetensors", b"\x80\x04N."), ""),
    "weights-one-less": (weights(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "weights-none": (weights(lambda t: t.clear()), ""),
    "weights-renamed": (
        weights(lambda t: t.update(head=t.pop("lm_head.weight"))), "lm_head.weight"
    ),
    "weights-wrong-shape": (
        weights(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].contiguous()})),
        "lm_head.weight",
    ),
    "weights-scalar": (
        weights(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][0].clone()})),
        "model.norm.weight",
    ),
    "weights-nan": (
        weights(lambda t: [tensor.fill_(float("nan")) for tensor in t.values()]), ""
    ),
    "weights-infinite": (weights(lambda t: t["lm_head.weight"].fill_(float("inf"))), ""),
    "index-broken": (
        lambda f: (put("model.safetensors", None)(f),
                   put("model.safetensors.index.json", b"{")(f)), ""
    ),
    "index-without-shards": (
        lambda f: (put("model.safetensors", None)(f),
                   put("model.safetensors.index.json", raw(INDEX))(f)), ""
    ),
    "heads-negative": (change("config.json", num_attention_heads=-1), ""),
    "heads-zero": (change("config.json", num_attention_heads=0), ""),
    "width-other": (change("config.json", hidden_size=64), ""),
    "no-stop": (no_stop, ""),
    "heads-unequal": (other_architecture("Mistral", "MistralForCausalLM", **BERT), ""),
    "both-ways": (other_architecture("Bert", "BertForMaskedLM", initializer_range=0.5, **BERT),
                  "not causal"),
}  # fmt: skip
LOGITS = ("weights-nan", "weights-infinite", "both-ways", "heads-unequal")  # they show it
USABLE = {  # models for other groups
    "plain": put("chat_template.jinja", None),
    "glue": put("chat_template.jinja", b"{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    "open": put("chat_template.jinja", b"<|{{ messages[0]['content'] }}"),
    "short": change("config.json", max_position_embeddings=10),
    "small": change("config.json", vocab_size=100),
    "remote-tokenizer": remote_tokenizer,  # the library has one of its own for these
    "remote-known": remote({"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
    "window": other_architecture("Mistral", "MistralForCausalLM", sliding_window=8,
                                 num_key_value_heads=2, **BERT),
    "scaled": other_architecture("Cohere", "CohereForCausalLM", logit_scale=0.1, eos_token_id=1,
                                 **BERT),
}  # fmt: skip
NAMES = ("no-such/model", "gpt-of-nobody", "no/such/folder", "/nowhere", "./nowhere", "../nowhere",
         "~/nowhere/at/all", "~nobody-of-that-name/model", "/dev/null", "/dev/zero", "good.jsonl",
         "a model", "a/b?c", "-", "..", "https://example.org/model", "user/model@main", "n" * 300,
         "user/" + "n" * 300, "\U0001f600", "a\u200bb", "user/-model.git", "C:\\model")  # fmt: skip


def model_cases():
    """Folders that hold no model that could be used, and names that lead to none."""
    for number, (name, (_, culprit)) in enumerate((MODELS | WEIGHTS).items()):
        flag = ("--student", "--teacher")[number % 2]
        late = name in WEIGHTS
        culprit = culprit or f"models/{name}"
        for command, more in (("train", f"{flag} @{name}"), ("evaluate", f"--model @{name}")):
            if command == "evaluate" or name not in ("no-stop", *LOGITS):
                yield case("models", f"{name} {more}", command, more, culprit, weights=late)
        if name not in ("no-stop", *LOGITS):
            more = (flag, "--compare", flag)[number % 3] + f" @{name}"
            # what another student's weights are like is seen when its turn comes
            if not (late and more.startswith("--compare")):
                yield case("models", f"{name} {more}", "diagnose", more, culprit, weights=late)
    yield case("models", "no stop token", "train", "--student @no-stop --teacher @no-stop",
               "models/no-stop")
    for number, name in enumerate(NAMES):
        shown = "".join(c if c.isprintable() else "\\u200b" for c in name)[:190]
        flag = ("--student", "--teacher")[number % 2]
        command, more = ("evaluate", ["--model", name]) if number % 3 else ("train", [flag, name])
        yield case("models", f"name {shown}", command, [f"{more[0]}={more[1]}"], shown)
    for command, more, culprit in (
        ("train", "--teacher @other", "--teacher has another tokenizer"),
        ("train", "--student @other", "--teacher has another tokenizer"),
        ("train", "--teacher @toy", "--teacher has another tokenizer"),
        ("train", "--student @tiny --teacher @short", "good.jsonl:1: "),
        ("train", "--student @short", "good.jsonl:1: "),
        ("evaluate", "--model @short", "good.jsonl:1: "),
        ("train", "--student @small", "good.jsonl:1: "),
        ("train", "--teacher @small", "good.jsonl:1: "),
        ("evaluate", "--model @small", "good.jsonl:1: "),
    ):
        yield case("models", more, command, more, culprit)
    yield case("models", "sliding window", "train", "--student @window", "models/window",
               weights=True)
    yield case("models", "sliding window", "evaluate", "--model @window", "models/window",
               weights=True)
    yield case("models", "a head that scales", "train", "--student @scaled", "--student",
               weights=True)
    files = {"bad.jsonl": raw({"problem": "<|end|>", "answer": 1})}  # seen after the tokenizer
    for name in ("remote-tokenizer", "remote-known"):
        for command, flag in (("train", "--student"), ("evaluate", "--model")):
            yield case("models", f"{name} and a bad line", command,
                       f"{flag} @{name} --problems bad.jsonl", "bad.jsonl:1: ", files=files)
    for name in LOGITS:
        for flag in ("--student", "--teacher"):
            yield case("models", f"{name} {flag}", "train", f"{flag} @{name}", flag, weights=True)


# ------------------------------------------------------------------------------------------ --out
def folder_of(*names):
    """A function that makes a folder with empty files in it."""

    def make(path):
        path.mkdir()
        for name in names:
            (path / name).touch()

    return make


PLACES = {  # name: (--out, what lies in the way)
    "a file": ("there", {"there": b"mine"}),
    "below a file": ("there/new", {"there": b"mine"}),
    "deep below a file": ("there/a/b/new", {"there": b"mine"}),
    "a link to nothing": ("there", {"there": lambda path: path.symlink_to("nothing")}),
    "a link to itself": ("there", {"there": lambda path: path.symlink_to("there")}),
    "a link to a file": ("there", {"there": lambda path: path.symlink_to("good.jsonl")}),
    "a pipe": ("there", {"there": lambda path: os.mkfifo(path)}),
    "/proc": ("/proc/new", {}),
    "below /proc": ("/proc/self/new/er", {}),
    "/sys": ("/sys/new", {}),
    "a device": ("/dev/null", {}),
    "below a device": ("/dev/null/new", {}),
    "256 bytes": ("n" * 256, {}),
    "256 bytes below": ("new/" + "n" * 256 + "/er", {}),
    "300 bytes of emoji": ("\U0001f600" * 75, {}),
    "5000 bytes": ("n/" * 2500, {}),
}
FULL = {  # for train: folders that are no run
    "other things": folder_of("thesis.txt"),
    "a hidden file": folder_of(".thesis"),
    "a folder": lambda path: (path / "inside").mkdir(parents=True),
    "a config": folder_of("config.json"),
    "a model": lambda path: shutil.copytree(TOY, path),
}


def out_cases():
    """Places where nothing can or may be written."""
    for command in ("train", "evaluate", "diagnose", "toy"):
        for name, (out, files) in PLACES.items():
            shown = out if len(out) < 100 else "--out"
            yield case("out", name, command, ["--out", out], shown, files=files)
        for name, out in UNSPEAKABLE.items():
            yield case("out", name, command, ["--out", out], "--out")
    for name, make in FULL.items():
        for command in ("train", "diagnose"):
            yield case("out", f"folder of {name}", command, "--out there", "there",
                       files={"there": make})
    for out in (".", "..", "/", "@tiny", "@toy", "good.jsonl"):
        yield case("out", out, "train", f"--out {out}", out.lstrip("@"))
        yield case("out", out, "evaluate", f"--out {out}", out.lstrip("@"))
        yield case("out", out, "diagnose", f"--out {out}", out.lstrip("@"))
    yield case("out", "no such parent", "evaluate", "--out no/new.json", "no/new.json")
    yield case("out", "ends in a slash", "evaluate", "--out new/", "new/")
    for name, files in (
        ("a model", {"models": lambda path: shutil.copytree(TOY, path / "clean")}),
        ("an empty folder", {"models": lambda path: (path / "clean").mkdir(parents=True)}),
        ("a file", {"models": folder_of("clean")}),
    ):
        yield case("out", f"{name} in its place", "toy", "--out models --steps 1", "models/clean",
                   base={}, files=files)
    files = {"models": folder_of("clean")}
    yield case("out", "a file in its place, world", "toy", "--out models", "models/clean",
               files=files)
    yield case("out", "a file in its place, forced", "toy", "--out models --steps 1 --force",
               "models/clean", base={}, files=files)
    yield case("out", "another teacher in its place", "toy",
               "--out models --horizon 3 --corruption 0.5 --steps 1", "models/horizon-H3-c0.5",
               base={}, files={"models": folder_of("horizon-H3-c0.5")})  # fmt: skip


# ------------------------------------------------------------------------------------ legal input
LEGAL = {  # texts that a byte-level tokenizer can spell
    "an emoji": "\U0001f600",
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "a flag": "\U0001f1e9\U0001f1ea",
    "a skin tone": "\U0001f44d\U0001f3fd",
    "combining marks": "e\u0301 a\u0308\u0323",
    "a hundred combining marks": "Z" + "\u0351\u0327" * 50,
    "a combining mark alone": "\u0301",
    "Hebrew and Arabic": "שלום مرحبا 12",
    "bidi controls": "\u202eabc\u202c \u2066x\u2069 \u200f",
    "zero width": "\u200b\u200c\u200d\ufeff\u2060",
    "NUL": "a\0b",
    "all control characters": "a" + "".join(map(chr, range(1, 32))) + "\x7f\x85",
    "line and paragraph separators": "a\u2028b\u2029c",
    "white space around": "  \t a \r\n ",
    "half of a control token": "<|en",
    "a control token with a space": "<|end |>",
    "a control token with a joiner": "<|\u200dend|>",
    "a control token in full width": "＜｜end｜＞",
    "a control token in capitals": "<|END|>",
    "another model's control tokens": "<|im_end|></s>[INST]<eos>",
    "a control token, escaped twice": r"\u003c|end|\u003e",
    "the end of Unicode": "\U0010ffff\ufffe\uffff",
    "private use": "\ue000\U000f0000",
    "Chinese": "停在哪里？",
    "old italic": "\U00010300\U00010301",
    "mathematics": r"\frac{1}{2} ≠ ∑ √",
    "template code": "{{ messages }}{% raw %}{# x #}",
    "format strings": "%s {0} ${HOME} `id` $(id)",
    "replacement character": "\ufffd",
    "JSON": '{"problem": "a"}',
    "a long text": "How many? " * 200,
}
PLAIN = b'{"problem": "a", "answer": 1}'


def legal_files():
    """(name, problem file, texts of its messages) where it is the file that looks odd."""
    two = ("a", "b")
    yield "CRLF", PLAIN + b"\r\n" + PLAIN.replace(b"a", b"b", 1) + b"\r\n", None
    yield "a byte order mark", b"\xef\xbb\xbf" + PLAIN + b"\n", ("a",)
    yield "no line end at the end", PLAIN, ("a",)
    yield "blank lines", b"\n \t\r\n" + PLAIN + b"\n\n\r\n", ("a",)
    yield "the same problem twice", (PLAIN + b"\n") * 2, ("a", "a")
    yield "raw U+2028", '{"problem": "a\u2028b", "answer": 1}\n'.encode(), ("a\u2028b",)
    yield "raw U+0085 and DEL", '{"problem": "a\x85\x7f", "answer": 1}'.encode(), ("a\x85\x7f",)
    yield "a megabyte in an unused key", raw(GOOD | {"x": "y" * 1_000_000}), (GOOD["problem"],)
    yield "deep unused key", raw(GOOD | {"x": json.loads("[" * 50 + "]" * 50)}), ("How many?",)
    yield "NaN in an unused key", b'{"problem": "a", "answer": 1, "x": NaN}', ("a",)
    yield "spaces everywhere", b' \t{ "problem" : "a" , "answer" : 1 } \t', ("a",)
    yield "escaped keys", rb'{"\u0070roblem": "\u0061", "answer": 1}', ("a",)
    yield "an escaped pair", rb'{"problem": "\ud83d\ude00", "answer": 1}', ("\U0001f600",)
    for answer in ("0", "-1", "0.5", "1e-9", "1e300", "9" * 400, "-0.0", '"seven"', '"\\u0000"'):
        line = b'{"problem": "a", "answer": ' + answer.encode() + b"}"
        yield f"answer {answer[:10]}", line, ("a",)
    yield "control token in the answer", raw({"problem": "a", "answer": "<|end|>"}), ("a",)
    yield "three forms", b"\n".join(
        [PLAIN, raw({"prompt": "b", "answer": 2}), raw(chat(("system", "c"), ("user", "d")))]
    ), ("a", "b", "c", "d")
    yield "many turns", raw(chat(*[("user", "a"), ("assistant", "b")] * 9, ("user", "a"))), (
        *two * 9, "a",
    )  # fmt: skip
    yield "a control token in two messages", raw(chat(("user", "<|en"), ("user", "d|>"))), (
        "<|en", "d|>",
    )  # fmt: skip
    yield "a tool's message", raw(chat(("user", "a"), ("tool", "b"))), two


def accepted():
    """The cases that must be taken."""
    flags = "--model @tiny --problems mine.jsonl --max-new-tokens 2 --samples 1 --count 2".split()
    for name, text in LEGAL.items():
        content = raw(chat(("system", text), ("user", text)) if len(name) % 2 else
                      {"problem": text, "answer": "1"})  # fmt: skip
        texts = (text,) * (1 + len(name) % 2)
        yield Case("accepted", name, "evaluate", tuple(flags), "", {"mine.jsonl": content},
                   True, texts)  # fmt: skip
    for name, content, texts in legal_files():
        yield Case("accepted", name, "evaluate", tuple(flags), "", {"mine.jsonl": content},
                   True, texts or ("a", "b"))  # fmt: skip


def malformed():
    """The cases that must be refused, no two of them alike."""
    cases = [*line_cases(), *file_cases(), *prompt_cases(), *all_flag_cases(), *model_cases(),
             *out_cases()]  # fmt: skip
    return list({(c.command, c.flags, str(c.files)): c for c in cases}.values())


# --------------------------------------------------------------------------------------- running
def spread(cases, share):
    """At most `share` cases of every group, evenly spread over it."""
    chosen = []
    for group in dict.fromkeys(c.group for c in cases):
        members = [c for c in cases if c.group == group]
        count = min(share, len(members))
        chosen += [members[i * len(members) // count] for i in range(count)]
    return chosen


def in_child(work) -> int:
    """The wait status of a forked process that did the work; it never comes back from here."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def build_models(models: Path) -> None:
    """Every model that a case names."""
    import transformers
    from conftest import write_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write_model(models / "tiny", max_position_embeddings=4096)
    write_model(models / "other", tokenizer_seed=7)
    shutil.copytree(TOY, models / "toy")
    changes = {name: edit for name, (edit, _) in (MODELS | WEIGHTS).items()} | USABLE
    for name, template in TEMPLATES.items():
        name = "template-" + name.replace(" ", "-")
        changes[name] = put("chat_template.jinja", template.encode())
    for name, edit in changes.items():
        shutil.copytree(models / "tiny", models / name)
        edit(models / name)


def snapshot(folder: Path) -> dict:
    """Everything below a folder, by name: its kind and its bytes or, of a link, where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        what = os.readlink(path) if stat.S_ISLNK(mode) else None
        if stat.S_ISREG(mode):
            large = path.stat().st_size > 1 << 30  # the sparse one
            what = path.stat().st_size if large else path.read_bytes()
        found[str(path.relative_to(folder))] = stat.S_IFMT(mode), what
    return found


def is_file(command) -> bool:
    """Whether the command is a file; otherwise it is a package, run with `python -m`."""
    return (ROOT / f"{command}.py").exists()


def module_of(command):
    """The module with the main function of a command."""
    inside = {"diagnose": "diagnose.command", "toy": "toy.__main__"}
    return importlib.import_module(inside.get(command, command))


def no_weights(*args, **named):
    """In the place of `harness.load_model` where nothing needs the weights."""
    raise AssertionError("weights were read before a refusal that needs none")


def accept(c: Case, flags: list[str]) -> None:
    """AssertionError unless the texts come back from the prompts, without control tokens."""
    import harness

    path = flags[flags.index("--model") + 1]
    tokenizer = harness.load_tokenizer(path)
    special = set(tokenizer.all_special_ids)
    found = []
    for ids in harness.render_prompts(tokenizer, harness.load_problems("mine.jsonl")):
        part = []
        for i in ids:  # the template puts a control token before and behind every text
            if i in special:
                found += [tokenizer.decode(part)] if part else []
                part = []
            else:
                part.append(i)
        assert not part, "the template's last token is missing"
    assert tuple(found) == c.texts, f"{found} are not {c.texts}"


def child(c: Case, flags: list[str], folder: Path, real: bool) -> None:
    """Become the command: standard streams to files beside the folder, never to come back."""
    os.setsid()  # what it leaves behind can be found and ended
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, ".out"), (2, ".err")):
        file = os.open(f"{folder}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
    os.chdir(folder)
    if real:
        what = [str(ROOT / f"{c.command}.py")] if is_file(c.command) else ["-m", c.command]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, *what, *flags], environment)
    code = 1
    try:
        if c.group == "accepted":
            accept(c, flags)
        if not c.weights:
            for module in ("harness", "harness.pair"):
                importlib.import_module(module).load_model = no_weights
        code = module_of(c.command).main(flags) or 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(c: Case, folder: Path, models: Path, real: bool) -> tuple[int, dict]:
    """Fork a process for a case in a new folder: (its id, the folder's snapshot)."""
    folder.mkdir(parents=True)
    for name, content in ({"good.jsonl": (raw(GOOD) + b"\n") * 2} | c.files).items():
        content(folder / name) if callable(content) else (folder / name).write_bytes(content)
    known = {path.name for path in models.iterdir()}
    flags = [
        str(models / flag[1:]) if flag[:1] == "@" and flag[1:] in known else flag
        for flag in c.flags
    ]
    before = snapshot(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        child(c, flags, folder, real)
    return pid, before


def judge(c: Case, folder: Path, before: dict, status: int) -> tuple[list[str], str]:
    """What is wrong with what came of a case, and its stderr."""
    out, err = (Path(f"{folder}{name}").read_text(errors="replace") for name in (".out", ".err"))
    wrong, after = [], snapshot(folder)
    if os.WIFSIGNALED(status):
        wrong.append(f"ended by signal {os.WTERMSIG(status)}, 14 after {SECONDS} seconds")
    code = os.waitstatus_to_exitcode(status)
    if code != (0 if c.group == "accepted" else 2):
        wrong.append(f"exit code {code}")
    changed = [n for n in sorted(before | after) if before.get(n) != after.get(n)]
    if changed:
        wrong.append(f"made or changed {changed[:5]}")
    if c.group != "accepted":
        if out:
            wrong.append(f"stdout has {out[:200]!r}")
        if err.count("\n") != 1 or not err.endswith("\n"):
            wrong.append(f"stderr has {err.count(chr(10))} lines")
        name = f"{c.command}.py" if is_file(c.command) else c.command
        if not err.startswith(f"{name}: error: "):
            wrong.append("stderr does not begin as it should")
        if c.culprit not in err:
            wrong.append(f"stderr does not name {c.culprit!r:.100}")
        if len(err) > 2000 and not any(len(flag) > 250 for flag in c.flags):
            wrong.append(f"stderr has {len(err)} characters")
    return wrong, err


def run(cases: list[Case], real: list[Case], workers: int = 2) -> list[str]:
    """Run cases, then the `real` ones again as commands; returns what failed, as text."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread: this process forks
    place = Path(tempfile.mkdtemp(prefix="corpus-"))
    models, failures, said, running = place / "models", [], {}, {}
    models.mkdir()
    if in_child(lambda: build_models(models)):
        return ["the models could not be built"]
    before_all = snapshot(models)
    jobs = [(c, False) for c in cases] + [(c, True) for c in real]
    with tqdm(total=len(jobs), unit="case", smoothing=0) as bar:
        for number in range(len(jobs) + workers):
            if number < len(jobs):
                c, is_real = jobs[number]
                folder = place / "cases" / str(number)
                pid, before = start(c, folder, models, is_real)
                running[pid] = c, is_real, folder, before
            if not running or (number < len(jobs) and len(running) < workers):
                continue
            pid, status = os.wait()
            c, is_real, folder, before = running.pop(pid)
            try:
                os.killpg(pid, signal.SIGKILL)  # workers of its own that it left behind
            except ProcessLookupError:
                pass
            wrong, err = judge(c, folder, before, status)
            if is_real and said.get(c) not in (None, (status, err)):
                wrong.append(f"as a command of its own it differs from: {said[c]}")
            said.setdefault(c, (status, err))
            if wrong:
                command = f"{c.command} {' '.join(c.flags)}"
                kind = "real command, " if is_real else ""
                failures.append(
                    f"{c.group}, {kind}{c.name}: {'; '.join(wrong)}\n    {command!r:.600}\n"
                    f"    {err[-1500:].strip()}"
                )
            shutil.rmtree(folder)
            bar.update()
    if snapshot(models) != before_all:
        failures.append("the models' folder has changed")
    shutil.rmtree(place)
    return failures


def main(argv=None) -> int:
    """The command; exit code 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="an evenly spread part")
    parser.add_argument("--real", type=int, default=20, metavar="N",
                        help="cases that are started as commands, too (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--only", default="", metavar="PATTERN",
                        help="cases whose group and name match a regular expression")
    args = parser.parse_args(argv)
    bad, good = malformed(), list(accepted())
    if args.only:
        bad, good = ([c for c in cases if re.search(args.only, f"{c.group}, {c.name}")]
                     for cases in (bad, good))  # fmt: skip
    if args.short:
        bad, good = spread(bad, SHORT["malformed"]), spread(good, SHORT["accepted"])
        args.real = min(args.real, SHORT["real"])
    possible = [c for c in bad if not any("\0" in flag for flag in c.flags)]
    groups = len({c.group for c in possible}) or 1
    real = spread(possible, -(-args.real // groups))
    real = [real[i * len(real) // args.real] for i in range(min(args.real, len(real)))]
    failures = run(bad + good, real, args.workers)
    for failure in failures:
        print(failure)
    counts = {"malformed": len(bad), "accepted": len(good), "real_commands": len(real)}
    print(json.dumps(counts | {"failures": len(failures)}))
    return bool(failures)


def prepare() -> None:
    """The environment, then the imports that every forked process shares."""
    os.environ.update(ENVIRONMENT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    for command in ("train", "evaluate", "diagnose", "toy"):
        module_of(command)
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")  # seconds, per process
    gc.collect()
    gc.freeze()  # the collector of a forked process would copy every page that it looks at


if __name__ == "__main__":
    prepare()
    sys.exit(main())
