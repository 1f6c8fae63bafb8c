"""`train.py`'s side of step.py: a step, its seconds by phase, and the weights set back."""

import contextlib
import unittest.mock
from pathlib import Path

import torch

import harness
import train
from benchmarks import machine, memory, timing

OPTIMIZER = {"lr": 1e-5, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.98, "clip_grad": 1.0}
MEMORY_STEPS = 3


class Stopwatch(harness.Stopwatch):
    """`train.py`'s, which goes by wall time, and in `latest` the same by `timing.clock`."""

    def restart(self) -> None:
        """Forget what was charged."""
        super().restart()
        self.now, self.latest = timing.clock(self.device), {}

    def lap(self, phase: str) -> None:
        """Charge the time since the last call to `phase`."""
        super().lap(phase)
        before, self.now = self.now, timing.clock(self.device)
        self.latest[phase] = self.latest.get(phase, 0.0) + self.now - before


def machine_flags(args) -> list[str]:
    """Flags of train.py that say where and how it computes."""
    return ["--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]


def pair_flags(folder: Path, args) -> list[str]:
    """Flags of train.py for the models and prompts in a folder of `shapes.write_pair`."""
    words = ["--method", "rkl", "--student", f"{folder}/student", "--teacher", f"{folder}/teacher"]
    words += ["--problems", f"{folder}/problems.jsonl", "--prompts-per-step", f"{args.prompts}"]
    words += ["--max-new-tokens", f"{args.tokens}", "--micro-batch", f"{args.prompts}"]
    for name, value in OPTIMIZER.items():
        words += [f"--{name.replace('_', '-')}", f"{value}"]
    return words + machine_flags(args)


def load(words: list[str]) -> harness.Run:
    """Everything that `train.py` has in hand before its first step, with these flags."""
    tables = train.FLAGS, train.METHODS, train.PRESETS
    _, args, origins = harness.flags.parse("train.py", *tables, words)
    machine.use_threads(args.threads)
    with unittest.mock.patch.object(harness.pair, "check_tokens"):  # nothing draws their end
        run = harness.Run(args, origins, train.needs(args), rank=0, world=1)
    harness.pair.load_models(run, torch.device(args.device))
    run.watch = Stopwatch(args.device)
    return run


def step(run: harness.Run, number: int) -> tuple[dict, dict[str, float]]:
    """The log line of a step, and its seconds by phase."""
    run.watch.restart()
    return train.train_step(run, number), run.watch.latest


def peak_memory(words: list[str]) -> dict[str, float]:
    """MiB of steps with these flags: see `memory.peak_of`."""
    run = load(words)
    return memory.peak_of(lambda: [train.train_step(run, n) for n in range(MEMORY_STEPS)])


def weights_of(run: harness.Run) -> dict[str, torch.Tensor]:
    """A copy of the student's, for `set_back`."""
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}


def set_back(run: harness.Run, weights: dict[str, torch.Tensor]) -> None:
    """The student as it was, and an optimizer that has seen nothing; no buffer is made anew."""
    run.model.load_state_dict(weights)
    for state in run.optimizer.state.values():
        for value in state.values():
            value.zero_()


@contextlib.contextmanager
def recorded(module, name: str):
    """Within, the calls of a function of `module` are noted: [(arguments, result)]."""
    function, calls = getattr(module, name), []

    def noting(*args, **kwargs):
        calls.append((args, function(*args, **kwargs)))
        return calls[-1][1]

    with unittest.mock.patch.object(module, name, noting):
        yield calls
