"""Clocks, and sides that take turns in one process, so that noise hits all of them alike."""

import contextlib
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm


def cpu_seconds() -> float:
    """CPU time of this process's threads and of its worker processes, living or dead, in s."""
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + dead.ru_utime + dead.ru_stime
    for child in multiprocessing.active_children():
        for thread in Path(f"/proc/{child.pid}/task").glob("*/schedstat"):
            total += int(thread.read_text().split()[0]) / 1e9
    return total


def wall_seconds(device: str) -> float:
    """Wall time, of a GPU that has finished, in s."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def clock(device: str) -> float:
    """What is compared: CPU time, or wall time where a GPU works, in s."""
    return wall_seconds(device) if device == "cuda" else cpu_seconds()


def take_turns(ways: dict, rounds: int, device: str) -> dict[str, list[tuple]]:
    """Call every way once per round, with the number of the round; by way, a list of (seconds,
    what it returned, which should be small, for it is kept).

    >>> sides = {"one": lambda number: 10 * number, "other": lambda number: None}
    >>> calls = take_turns(sides, 2, "cpu")
    >>> {name: [found for seconds, found in both] for name, both in calls.items()}
    {'one': [0, 10], 'other': [None, None]}
    """
    calls = {name: [] for name in ways}
    for number in tqdm(range(rounds), leave=False, unit="round"):
        for name, way in ways.items():
            start = clock(device)
            found = way(number)
            calls[name].append((clock(device) - start, found))
    return calls


def ratios(one: list[float], other: list[float]) -> tuple[float, float]:
    """(ratio of the minima, median of the ratios of each round).

    >>> ratios([2.0, 4.0, 9.0], [1.0, 4.0, 3.0])
    (2.0, 2.0)
    """
    pairs = zip(one, other, strict=True)
    return min(one) / min(other), statistics.median(a / b for a, b in pairs)


@dataclass
class Ledger:
    """Seconds per step of one side, an entry per round: CPU time, wall time, phases by name."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def round(self, steps: int, device: str):
        """Time what happens within; yields a list for each step's seconds by phase."""
        phases, cpu, wall = [], cpu_seconds(), wall_seconds(device)
        yield phases
        self.wall.append((wall_seconds(device) - wall) / steps)
        self.cpu.append((cpu_seconds() - cpu) / steps)
        names = dict.fromkeys(name for step in phases for name in step)
        self.phases.append({n: sum(step.get(n, 0.0) for step in phases) / steps for n in names})

    def seconds(self, device: str) -> list[float]:
        """What is compared: CPU time, or wall time where a GPU works."""
        return self.wall if device == "cuda" else self.cpu

    def series(self, *names: str) -> list[float]:
        """The sum of these phases, round by round."""
        return [sum(step.get(name, 0.0) for name in names) for step in self.phases]

    def least(self, *names: str) -> float | None:
        """The least of those sums; None where there is no such phase."""
        known = any(name in step for step in self.phases for name in names)
        return min(self.series(*names)) if known else None
