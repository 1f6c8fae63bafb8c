"""--track: the lines of the log for TensorBoard or Weights & Biases, where one is installed."""

import importlib.util
import re
import shutil
from pathlib import Path

from harness import checkpoint
from harness.cli import tell


def check(kind: str | None) -> None:
    """ValueError unless it is installed."""
    if kind and importlib.util.find_spec(kind) is None:
        raise ValueError(f"--track {kind}: pip install {kind}")


def flat(line: dict, before="") -> dict:
    """The numbers of a line by name; those in lists and objects as fidelity/0, seconds/sample.

    >>> flat({"step": 1, "fidelity": [0.5, None], "seconds": {"sample": 2.0}})
    {'step': 1, 'fidelity/0': 0.5, 'seconds/sample': 2.0}
    """
    found = {}
    for key, value in line.items():
        value = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}/")
        elif isinstance(value, int | float):
            found[f"{before}{key}"] = value
    return found


def named(line: dict) -> dict:
    """The numbers of a training step or an evaluation, which share some names and steps."""
    return flat(line, "train/" if "loss" in line else "eval/")


def _begin_tensorboard(out: Path):
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(out / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(out / "tensorboard")

    def send(numbers: dict, step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


def _begin_wandb(out: Path):
    import wandb

    config, name = checkpoint.read_config(out), out.resolve().name
    same = re.sub("[^0-9A-Za-z]+", "-", f"{name}-{config['started']}")  # resumed or not
    run = wandb.init(name=name, id=same, resume="allow", dir=out, config=config["flags"])
    return lambda numbers, step: run.log(numbers, step=step)


def tracker(kind: str | None, out: Path, lines: list[dict]):
    """A function that sends a line of the log; those that are there already are sent at once. So a
    resumed run has every step once: TensorBoard's folder is made anew, and Weights & Biases drop
    steps that they have. Sending never ends a run. kind None: nothing is sent."""
    send = None if kind else lambda *_: None

    def write(line: dict) -> None:
        nonlocal send
        try:
            send = send or {"tensorboard": _begin_tensorboard, "wandb": _begin_wandb}[kind](out)
            send(named(line), line["step"])
        except Exception as error:  # no network, a full disk: whatever the library raises
            tell("train.py", f"--track {kind} ends here: {type(error).__name__}: {error}")
            send = lambda *_: None  # noqa: E731

    for line in lines:
        write(line)
    return write
