"""Diagnoses that several tests read. Each is made once in a process, and copied to be changed."""

import copy
import functools
import json
import tempfile

import toy
from diagnose import command, verdicts

SMALL = "--count 16 --samples 2 --completions 0 --no-figures --resamples 100 --threads 1".split()


def run(*argv, folder):
    """The report of one run in this process."""
    return command.run(command.parse([*map(str, argv), "--out", str(folder)]))


@functools.cache
def diagnosed(world, *more):
    """The report on one toy world."""
    with tempfile.TemporaryDirectory() as folder:
        return run("--toy", world, *SMALL, *more, folder=folder)


def tiny():
    """The report that most tests read: nothing is bad, all is measured, of two students."""
    return copy.deepcopy(diagnosed(
        "clean", "--difficulty", "6", "--completions", "1", "--compare", toy.world("clean").teacher
    ))  # fmt: skip


def changed(result, **more):
    """A copy of a report with some values of its student replaced, by path (a__b=value), and
    judged again."""
    result = copy.deepcopy(result)
    for path, value in more.items():
        *parents, last = path.split("__")
        at = result["students"]["student"]
        for parent in parents:
            at = at[parent]
        at[last] = value
    result["verdicts"], result["command"] = verdicts.judge(result)
    return result


def strict(value):
    """JSON without nan or infinity."""
    return json.loads(json.dumps(value, allow_nan=False))
