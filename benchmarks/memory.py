"""Peaks of memory, in a process that has done nothing else."""

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks import machine


def peak_mib(reset: bool = False) -> float | None:
    """Most MiB that this process has had resident (GPU: allocated) since the last reset; with
    `reset` the peak is forgotten first, so that this is what is in use now.  None where the system
    does not tell (Linux does).

    It is Linux's mark of this address space: `ru_maxrss` cannot be reset, and after a fork and
    exec it still holds the parent's.
    """
    if torch.cuda.is_initialized():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    return None


def peak_of(work) -> dict[str, float]:
    """MiB in use before `work` runs ("set_up"), and by how much the peak during it exceeds them
    ("above"); nothing where the system does not tell."""
    before = peak_mib(reset=True)
    work()
    return {} if before is None else {"set_up": before, "above": peak_mib() - before}


def in_a_process(function, *args):
    """What the function returns in a fresh process, with nothing of this one's memory."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=machine.quiet) as pool:
        return pool.submit(function, *args).result()
