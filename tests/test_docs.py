"""The pages: commands that parse, flags that exist, links that lead to a heading."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ".", "benchmarks", "diagnose", "docs", "results", "toy"  # not caches, runs, your own
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
OTHERS = {  # flags of torchrun, pip, hf, and of the libraries that a page speaks of
    "--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--local-dir", "--no-deps",
    "--help",
}  # fmt: skip
MODULES = {
    "train.py": "train", "evaluate.py": "evaluate", "-m diagnose": "diagnose.command",
    "-m toy": "toy.__main__", "-m harness.plot": "harness.plot", "tests/corpus.py": "corpus",
    "examples/prepare_data.py": "examples.prepare_data",
    "examples/smollm2/prepare.py": "examples.smollm2.prepare",
    **{f"benchmarks/{p.name}": f"benchmarks.{p.stem}" for p in ROOT.glob("benchmarks/*.py")
       if "\ndef main(" in p.read_text()},
}  # fmt: skip


class Parsed(Exception):
    """What a parser made of a command line, before the command does anything else."""


def run_parser(program, argv, monkeypatch):
    """The parser of a command; SystemExit if it refuses `argv`."""
    try:
        module = importlib.import_module(MODULES[program])
    except ImportError as error:
        pytest.skip(f"{program}: {error}")
    plain = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        plain(self, args, namespace)
        raise Parsed(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr("sys.argv", [program, *argv])
        try:
            module.main(argv)
        except Parsed as found:
            return found.args[0]
        except TypeError:  # a main without argv reads sys.argv
            with pytest.raises(Parsed) as found:
                module.main()
            return found.value.args[0]
    raise AssertionError(f"{program} parses nothing")


def commands(text):
    """(program, its arguments) of all that a page tells the reader to type."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n") + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        for part in re.split(r"&&|;", line.replace("...", "").split(" #")[0]):
            words = shlex.split(part) if part.count("'") % 2 == part.count('"') % 2 == 0 else []
            if words[:1] == ["torchrun"] and "train.py" in words:
                yield "train.py", words[words.index("train.py") + 1 :]
            elif words[:1] == ["python"]:
                program = " ".join(words[1:3]) if words[1:2] == ["-m"] else " ".join(words[1:2])
                if not re.match(r"-m (venv|pip|pytest|nltk)|-c", program):
                    yield program, words[3 if program.startswith("-m") else 2 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_parses(page, monkeypatch):
    for program, argv in commands(page.read_text()):
        assert program in MODULES, f"{page.name}: python {program}"
        if "FLAG" not in argv:
            run_parser(program, argv, monkeypatch)


def test_every_flag_exists(monkeypatch):
    minimal = {"examples/prepare_data.py": ["gsm8k", "--out", "x"], "-m harness.plot": ["x"]}
    known = set(OTHERS)
    for program in MODULES:
        try:
            parser = run_parser(program, minimal.get(program, []), monkeypatch)
        except (SystemExit, pytest.skip.Exception):
            continue
        known |= set(parser._option_string_actions)
    assert {"--method", "--samples", "--kills", "--track", "--leave-out", "--from"} <= known
    for page in PAGES:
        code = " ".join(re.findall(r"`([^`]+)`", page.read_text()))
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", code))
        assert used <= known, f"{page}: {sorted(used - known)}"


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def test_links_lead_to_headings():
    for page in PAGES:
        for path, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
            if "://" not in path:
                target = (page.parent / path).resolve() if path else page
                assert anchor in headings(target), f"{page}: {path}#{anchor}"
