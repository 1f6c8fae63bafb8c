"""Runs for the tests: a `harness.Run` without its folder, and the real commands."""

import contextlib
import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

import harness
import toy
import train


def parse(argv):
    """The effective flags of a command line."""
    tables = train.FLAGS, train.METHODS, train.PRESETS
    return harness.flags.parse("train.py", *tables, [str(x) for x in argv])[1]


@contextlib.contextmanager
def few_problems():
    """256 toy problems at most; the usual 4096 take a second to render."""
    problems = toy.problems
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "problems", lambda count, **how: problems(min(count, 256), **how))
        yield


def make_run(*flags, student=None, teacher=None):
    """A prepared and loaded run of one process, without its folder."""
    argv = [*flags]
    for flag, value in (("--student", student), ("--teacher", teacher)):
        argv += [flag, value] if value else []
    args = parse(argv)
    with few_problems():
        run = harness.Run(args, {}, train.needs(args), 0, 1)
    harness.pair.load_models(run, torch.device("cpu"))
    return run


def sample(run, step=0):
    """Phase 1."""
    return train.sample(run, step)[0]


def score(run, batch):
    """Phases 2 and 3, but for a control's budget."""
    return train.score(run, batch, run.sentences(batch))


def run_command(*command, cwd, fails=False):
    """Run a command in `cwd`; on an unexpected exit show the end of what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    if (done.returncode != 0) != fails:
        shown = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        pytest.fail(f"{command}\nexit {done.returncode}\n{shown}")
    return done


def read_log(folder):
    """Training lines and evaluation lines of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "accuracy" in x]


def spy(monkeypatch, module, name):
    """Let every call through, and keep (arguments by name, result)."""
    original, calls = getattr(module, name), []

    def wrapped(*args, **named):
        result = original(*args, **named)
        calls.append((named, result))
        return result

    monkeypatch.setattr(module, name, wrapped)
    return calls


def bare_run(model, *flags, vocab_size, rank=0, world=1, teacher_head_VE=None):
    """A run around any model, with SGD: no prompts, no teacher, no folder."""
    run = object.__new__(harness.Run)
    run.args, run.model, run.rank, run.world = parse(flags), model, rank, world
    run.student = harness.StudentLogProbs(model, run.args, vocab_size, teacher_head_VE)
    if world > 1:
        run.student = torch.nn.parallel.DistributedDataParallel(run.student)
    run.optimizer = torch.optim.SGD(run.student.parameters(), lr=run.args.lr)
    run.scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer, 1.0)
    run.watch, run.stop_class = harness.Stopwatch("cpu"), None
    run.shards = harness.shard.Shards("none", torch.device("cpu"), "float32")
    run.position = SimpleNamespace(step=0)
    return run


ALL = slice(None), slice(None)  # rows and columns
