"""Every concept file works alone: copied into an empty folder, its doctests pass there."""

import ast
import doctest
import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {  # the only packages that each may import besides the standard library
    "release_rule.py": {"numpy"},
    "teachability.py": {"torch", "nltk"},
    "logprobs.py": {"torch"},
    "rollout.py": {"torch"},
    "lgr.py": {"torch"},
    "controls.py": {"torch"},
    "metrics.py": {"torch"},
    "curves.py": {"numpy"},
    "checkpoint.py": {"torch", "numpy", "safetensors"},
}


def imports(path):
    """Top-level names of everything that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or ".").split(".")[0])
    return found


ALONE = """
import contextlib, doctest, importlib, io, json, sys, traceback
results = {}
for name, folder, module in json.loads(sys.argv[1]):
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            failed, attempted = doctest.testmod(importlib.import_module(module))
        except Exception:
            failed, attempted = 1, 0
            traceback.print_exc(file=sys.stdout)
    sys.path.remove(folder)
    sys.modules.pop(module, None)
    results[name] = failed, attempted, said.getvalue()
print(json.dumps(results))
"""


@functools.cache
def doctests_alone():
    """By leaf: doctests that failed, doctests, and what they printed. Each was copied into an empty
    folder, the only one, beside the installed packages, that its process could import from."""
    with tempfile.TemporaryDirectory() as root:
        jobs = []
        for number, name in enumerate(LEAVES):
            folder = Path(root) / str(number)
            folder.mkdir()
            shutil.copy(ROOT / name, folder)
            jobs.append((name, str(folder), Path(name).stem))
        command = [sys.executable, "-I", "-c", ALONE, json.dumps(jobs)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", LEAVES)
def test_alone_in_an_empty_folder(name):
    failed, attempted, said = doctests_alone()[name]
    assert failed == 0, said[-3000:]
    assert attempted > 0, "it must have doctests"


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_imports_only_what_it_may(name):
    assert imports(ROOT / name) - set(sys.stdlib_module_names) <= LEAVES[name]


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_never_prints_parses_or_talks_to_other_processes(name):
    tree = ast.parse((ROOT / name).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in names and "distributed" not in attributes
    assert not imports(ROOT / name) & {"argparse", "logging"}


def test_doctests_of_the_scripts():
    names = "train grading evaluate toy diagnose probing measuring report pictures"
    for name in names.split():
        assert doctest.testmod(importlib.import_module(name)).failed == 0, name


def test_nothing_but_tests_imports_train():
    for path in ROOT.glob("*.py"):
        assert "train" not in imports(path), path.name


def test_the_readme_lists_every_file_and_no_other():
    rows = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in ROOT.glob("*.py"))
