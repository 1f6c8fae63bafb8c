"""Every concept file works alone: copied into an empty folder, its doctests pass there."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {  # the only packages that each may import besides the standard library
    "release_rule.py": {"numpy"},
    "answers.py": set(),
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


@pytest.mark.parametrize("name", LEAVES)
def test_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([sys.executable, "-I", "-m", "doctest", "-v", name], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "\n0 failed" in done.stdout or " passed" in done.stdout
    assert "Expecting" in done.stdout, "it must have doctests"


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
    names = "train grading evaluate diagnose probing measuring report pictures"
    for name in (f"{name}.py" for name in names.split()):
        command = [sys.executable, "-m", "doctest", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_nothing_but_tests_imports_train():
    for path in ROOT.glob("*.py"):
        assert "train" not in imports(path), path.name


def test_the_readme_lists_every_file_and_no_other():
    rows = re.findall(r"^\| `(\w+\.py)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in ROOT.glob("*.py"))
