"""Command lines, names of files and JSON from outside, checked on their way in.

Whatever is wrong is an exit with code 2, or a ValueError, of one line that names the flag, file or
value.
"""

import argparse
import contextlib
import errno
import json
import os
import re
import stat
import sys
import tempfile
from collections import Counter
from pathlib import Path

BIG, TINY = 1e18, 1e-30  # "finite" and "positive"
MANY = 10**6  # prompts or samples: more would run out of memory or time before anything happens
MOST_THREADS = 1024  # beyond what the system grants, PyTorch aborts the process
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # Windows has none
MOST_BYTES = 2**30  # of a file that is read as a whole


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


def path_name(text: str) -> str:
    """An argparse type: the name of a file, folder or model, of which no part can be misread."""
    if not text or re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", text):
        what = "holds a control character or is not UTF-8" if text else "is empty"
        raise argparse.ArgumentTypeError(f"the name {text!r:.60} {what}")
    return text


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, printed once however many processes run."""

    def error(self, message: str):
        """Print the message on rank 0 and leave with exit code 2."""
        try:
            rank, _ = process_numbers()
        except ValueError:
            rank = 0
        if rank == 0:
            complain(self.prog.split()[-1], message)  # of `python -m NAME` the name
        sys.exit(2)


def process_numbers() -> tuple[int, int]:
    """(rank, number of processes) as torchrun says; ValueError if they make no sense."""
    found = {}
    for name, low in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text, high = os.environ.get(name, str(low)), found.get("WORLD_SIZE", MANY + 1) - 1
        if not text.isdecimal() or not low <= int(text[:9]) <= high:
            what = f"{name}={text!r:.60} in the environment"
            raise ValueError(f"{what} is not a whole number from {low} to {high}")
        found[name] = int(text)
    return found["RANK"], found["WORLD_SIZE"]


def printable(message) -> str:
    """One line, whatever the message holds: nothing in it can steer a terminal."""
    line = " ".join(str(message).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def tell(program: str, message) -> None:
    """One line on stderr."""
    print(f"{program}: {printable(message)}", file=sys.stderr, flush=True)


def complain(program: str, message) -> None:
    """One line on stderr that says what is wrong."""
    tell(program, f"error: {message}")


@contextlib.contextmanager
def name_the_flag(flag: str, path: Path):
    """Errors of writing at `path` become a ValueError that names the flag."""
    try:
        yield
    except (OSError, ValueError) as error:  # NUL is a ValueError
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{flag} {str(path):.200} cannot be written: {why}") from None


def check_creatable(flag: str, path) -> None:
    """ValueError unless something could be created at `path`, which need not have a parent yet, or
    in the folder that is there; leaves no trace."""
    path = Path(path)
    with name_the_flag(flag, path):
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # the whole of the name may be too long
        parents = path.absolute().parents
        folder = next(folder for folder in (path, *parents) if os.path.lexists(folder))
        os.rmdir(tempfile.mkdtemp(dir=folder, suffix=".partial"))


def check_new_file(flag: str, path: str) -> None:
    """ValueError unless `path` names a file that is not there, in a folder that is."""
    if os.path.lexists(path):
        raise ValueError(f"{flag} {path}: exists already; nothing is overwritten")
    check_creatable(flag, path)
    if not os.path.basename(path) or not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: needs a folder that is there and a name in it")


def write_new_file(path: str, text: str) -> None:
    """All of it or nothing, and never over a file that came meanwhile."""
    with open(path, "x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except BaseException:  # a full disk, Ctrl-C
            os.unlink(path)
            raise


def open_regular(path):
    """A regular file, to be read as bytes. OSError of anything else: a pipe may never end."""
    file = open(path, "rb", opener=lambda name, how: os.open(name, how | NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_json(path):
    """A JSON file. FileNotFoundError; ValueError, which begins with the path, of what is none."""
    try:
        with open_regular(path) as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: longer than {MOST_BYTES} bytes")
    return parse_json(data, path)


def parse_json(data: bytes, where):
    """A value of JSON; ValueError that begins with `where`. A key that comes twice is refused:
    readers disagree about which one counts."""

    def as_object(pairs):
        if len(found := dict(pairs)) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r:.60} comes twice")
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=as_object)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        kind = "not UTF-8" if isinstance(error, UnicodeError) else "malformed JSON"
        raise ValueError(f"{where}: {kind}: {error}") from error


def alike(value, example) -> bool:
    """Whether JSON is built as the example: the same keys, as many items (of an empty example any),
    the same types, and of numbers none that is negative or above BIG.

    >>> alike({"a": [2, 0.5]}, {"a": [1, 1.0]}), alike([-1], [1]), alike([True], [1])
    (True, False, False)
    """
    if isinstance(example, dict):
        return isinstance(value, dict) and (
            not example or value.keys() == example.keys()
            and all(alike(value[key], example[key]) for key in example))  # fmt: skip
    if isinstance(example, list | tuple):
        return isinstance(value, list) and (
            not example or len(value) == len(example) and all(map(alike, value, example)))
    kinds = (int, float) if type(example) is float else (type(example),)
    return type(value) in kinds and (type(value) not in (int, float) or 0 <= value <= BIG)


def first_line(error):
    """First line of a message, for errors that come as a wall of text, and the next one where it
    ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
