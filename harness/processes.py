"""Several processes: who works on what, sums, errors heard by all. Randomness is stateless: step s
of seed r has the same prompts and uniform numbers, however many processes share the work."""

import contextlib
import importlib.metadata
import os
import platform
import random
import subprocess
import time
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from harness.cli import first_line

# Random streams of `row_generator`; training steps use 0, 1, 2, ...
EVALUATION_STREAM, CONTROL_STREAM = 2**23, 2**22


def my_share(count: int, rank: int, world: int) -> range:
    """The rows of `count` of process `rank`: contiguous, sizes differing by at most 1."""
    return range(count * rank // world, count * (rank + 1) // world)


def row_generator(seed: int, stream: int, first_row: int, numbers_per_row: int) -> torch.Generator:
    """A CPU generator as one process that draws all rows in order would have it at `first_row`."""
    generator = torch.Generator().manual_seed((seed << 24) + stream)
    if first_row:
        torch.rand(first_row * numbers_per_row, dtype=torch.float64, generator=generator)
    return generator


def batch_order(count: int, first: int, length: int, seed: int) -> list[int]:
    """Entries first..first+length-1 of endless shuffled epochs of `count` problems."""
    order = []
    for epoch in range(first // count, (first + length - 1) // count + 1):
        epoch_order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(epoch_order)
        order += epoch_order
    return order[first % count :][:length]


def micro_batches(mask_BT, args):
    """Rows of similar length together: (rows, columns), longest first, of the columns that mask_BT
    (bool) needs, at least 2, within the limits of the flags in `args` or alone. Rows without any
    are left out, but for one if all are: every process takes part in a backward pass."""
    column_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    length_B = (mask_BT * column_T).amax(dim=1)
    order_B = length_B.argsort(descending=True, stable=True)
    lengths = [(row, n) for row, n in zip(order_B.tolist(), length_B[order_B].tolist(), strict=True)
               if n]  # fmt: skip
    most_rows, most_tokens = args.micro_batch, args.tokens_per_micro_batch
    rows, longest = [], 0
    for row, length in lengths or [(0, 2)]:
        count = len(rows) + 1  # with this one
        full = most_rows and count > most_rows or most_tokens and count * longest > most_tokens
        if rows and full:
            yield torch.tensor(sorted(rows), device=mask_BT.device), slice(0, max(longest, 2))
            rows = []
        longest = longest if rows else length
        rows.append(row)
    yield torch.tensor(sorted(rows), device=mask_BT.device), slice(0, max(longest, 2))


class Stopwatch:
    """Seconds by phase; waits for the GPU, so that a phase pays for what it launched."""

    def __init__(self, device: str):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.seconds, self.start = {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.start
        self.start = now


def start_processes(args, world: int) -> torch.device:
    """Join the process group that torchrun describes: gloo on CPU, nccl on GPU."""
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        backend, timeout = "nccl" if args.device == "cuda" else "gloo", timedelta(0, args.timeout)
        dist.init_process_group(backend, timeout=timeout)
    return device


def sum_over_ranks(values, device) -> list[float]:
    """Element-wise sum of some numbers over all processes, in float64."""
    total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather_objects(value) -> list:
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(work, error=None):
    """A ValueError in all processes if `work()` raises in one, or that has an `error`."""
    try:
        work()
    except (ValueError, OSError) as caught:
        error = caught
    errors = gather_objects(error and str(error))
    for rank, text in enumerate(errors):
        if text is not None:
            raise ValueError(str(error) if error else f"rank {rank}: {text}")


def check_device(device: str) -> None:
    """ValueError unless PyTorch can compute there."""
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, device=device).item()
    except Exception as error:  # what a missing back end raises is its own affair
        raise ValueError(f"--device {device}: {first_line(error)}") from error


def surroundings(device: str) -> dict:
    """What numbers may depend on beside the flags, and when; None for what is not there."""
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor()
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "math-verify", "peft"):
        versions[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"commit": commit or None, "device": name or platform.machine(),
            "threads": torch.get_num_threads(), "versions": versions,
            "started": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
