"""Command lines, names of files and JSON, checked on their way in. Whatever is wrong is exit code
2, or a ValueError, and one line that names flag, file or value."""

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
        if os.environ.get("RANK", "0") == "0":
            complain(self.prog.split()[-1], message)  # of `python -m NAME` the name
        sys.exit(2)


def tell(program: str, message) -> None:
    """One line on stderr, whatever the message holds: nothing in it can steer a terminal."""
    text = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    print(f"{program}: {line}", file=sys.stderr, flush=True)


def complain(program: str, message) -> None:
    tell(f"{program}: error", message)


def check_creatable(flag: str, path) -> None:
    """ValueError unless something can be created at `path`, or in a folder there; no trace."""
    path = Path(path)
    try:
        if any(len(os.fsencode(part)) > 255 for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # the whole of the name may be too long
        folder = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        os.rmdir(tempfile.mkdtemp(dir=folder, suffix=".partial"))
    except (OSError, ValueError) as error:  # NUL is a ValueError
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{flag} {str(path):.200} cannot be written: {why}") from None


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
    """A file to be read as bytes; OSError of a pipe or a device, which may never end."""
    file = open(path, "rb", opener=lambda name, how: os.open(name, how | NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_json(path):
    """A file of JSON. FileNotFoundError; else a ValueError that begins with the path."""
    try:
        with open_regular(path) as file:
            return parse_json(file.read(MOST_BYTES), path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def parse_json(data: bytes, where):
    """JSON; ValueError that begins with `where`. Readers disagree about a key that comes twice."""

    def unique(pairs):
        if len(found := dict(pairs)) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r:.60} comes twice")
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        kind = "not UTF-8" if isinstance(error, UnicodeError) else "malformed JSON"
        raise ValueError(f"{where}: {kind}: {error}") from error


def first_line(error):
    """First line of a message that is a wall of text, and the next one if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
