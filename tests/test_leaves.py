"""The house: leaves work alone, rooms import only what they may, files keep to their budgets."""

import ast
import doctest
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import PAGES

ROOT = Path(__file__).parent.parent
LEAVES = {  # the only packages that each may import besides the standard library
    "release_rule.py": {"numpy"},
    "answers.py": set(),
    "teachability.py": {"torch", "nltk"},
    "logprobs.py": {"torch"},
    "rollout.py": {"torch"},
    "lgr.py": {"torch"},
}
LINES = {  # at most, docstrings and blank lines included
    "README.md": 220, "train.py": 367, "rollout.py": 251, "logprobs.py": 220,
    "teachability.py": 265, "release_rule.py": 120, "lgr.py": 260, "masks.py": 220,
    "rivals.py": 110,
    "answers.py": 250, "evaluate.py": 300,
    "harness": 2200 + 210 + 510, "fast": 450, "toy": 750, "diagnose": 2000, "examples": 440,
}  # 210: plot.py and track.py, to look at a run; 510: shard.py, plan.py, lora.py  # fmt: skip
ROOMS = {"harness", "fast", "toy", "diagnose", "benchmarks", "examples"}
OURS = ROOMS | {name[:-3] for name in LINES if name.endswith(".py")}
MAY_IMPORT = {  # of ours
    "masks.py": {"release_rule", "teachability"},
    "rivals.py": {"masks"},
    "evaluate.py": {"answers", "harness", "rollout", "toy"},
    "train.py": {"evaluate", "harness", "lgr", "logprobs", "masks", "rivals", "rollout"},
    "fast": {"fast", "logprobs"},
    "harness": {"answers", "harness", "fast", "toy", "logprobs", "rollout", "teachability"},
    "toy": {"toy", "harness", "evaluate"},
    "diagnose": {"diagnose", "evaluate", "fast", "harness", "toy", "lgr", "logprobs",
                 "release_rule", "rollout", "teachability"},
    "examples": {"answers", "evaluate", "harness", "lgr", "logprobs", "masks", "rollout",
                 "teachability"},
}  # fmt: skip


def files(name):
    """The Python files of a room, or the file."""
    return sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / name]


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
import doctest, importlib, json, sys
path, found = list(sys.path), {}
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    sys.path, before = [folder, *path], set(sys.modules)
    try:
        found[name] = doctest.testmod(importlib.import_module(name))
    except Exception as error:
        found[name] = repr(error)
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", None)).startswith(folder):
            del sys.modules[module]
print(json.dumps(found))
"""


def test_each_alone_in_an_empty_folder(tmp_path):
    """Its doctests pass, in a process that knows no path of the project. masks.py needs two
    neighbours: "copy three files"; rivals.py these and masks.py."""
    argv, two = [], MAY_IMPORT["masks.py"]
    needs = {name: set() for name in LEAVES} | {"masks.py": two, "rivals.py": {"masks"} | two}
    for name, neighbours in needs.items():
        folder = tmp_path / name
        folder.mkdir()
        for file in {name} | {f"{x}.py" for x in neighbours}:
            shutil.copy(ROOT / file, folder)
        argv += [name[:-3], str(folder)]
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *argv], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 8
    for name, result in results.items():
        assert result[0] == 0 and result[1] > 0, (name, result, done.stdout[-3000:])


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_imports_only_what_it_may(name):
    assert imports(ROOT / name) - set(sys.stdlib_module_names) <= LEAVES[name]


@pytest.mark.parametrize("name", [*LEAVES, "masks.py", "rivals.py"])
def test_leaf_never_prints_parses_or_talks_to_other_processes(name):
    tree = ast.parse((ROOT / name).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "print" not in names and not {"distributed", "args"} & (attributes | names)
    assert not imports(ROOT / name) & {"argparse", "logging"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    for path in files(room):
        assert imports(path) & OURS <= MAY_IMPORT[room], path


def test_nothing_but_tests_and_benchmarks_imports_train():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if path.parent.name not in ("tests", "benchmarks"):
            assert "train" not in imports(path), path


@pytest.mark.parametrize("name", LINES)
def test_lines_are_within_the_budget(name):
    counts = {path: len(path.read_text().splitlines()) for path in files(name)}
    assert sum(counts.values()) <= LINES[name], counts
    most = LINES[name] if (ROOT / name).is_file() else 450
    assert max(counts.values()) <= most


def test_no_benchmark_is_longer_than_400_lines():
    counts = {path.name: len(path.read_text().splitlines()) for path in files("benchmarks")}
    assert {name: n for name, n in counts.items() if n > 400} == {}


@pytest.mark.parametrize("name", ["train", "evaluate", "harness", "toy", "fast"])
def test_doctests(name):
    """Of the leaves: above. Of diagnose/ and benchmarks/: beside their tests."""
    for path in files(name if (ROOT / name).is_dir() else f"{name}.py"):
        if path.stem != "__main__":
            whole = name if path.parent == ROOT else f"{name}.{path.stem}"
            module = importlib.import_module(whole.removesuffix(".__init__"))
            assert doctest.testmod(module).failed == 0, whole


def test_the_readme_lists_every_file_with_its_lines():
    rows = re.findall(r"^\| \[?`([\w./]+)`.*?\| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    wanted = {path.name for path in ROOT.glob("*.py")} | {f"{room}/" for room in ROOMS}
    assert {name for name, _ in rows} == wanted - {"benchmarks/"}
    for name, lines in rows:
        count = sum(len(path.read_text().splitlines()) for path in files(name.rstrip("/")))
        assert int(lines) == count, f"README.md: {name} has {count} lines"


def test_the_readme_is_small():
    assert len((ROOT / "README.md").read_bytes()) <= 14 * 1024


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page}: {link}"
