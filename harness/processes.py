"""Several processes and several rows: who works on what, sums over all, errors heard by all.

Randomness is stateless: step s of seed r always uses the same prompts and the same uniform numbers
per (row, token), however many processes share the work.
"""

import os
import random
import time
from datetime import timedelta

import torch
import torch.distributed as dist

# Random streams of `row_generator`; training steps use 0, 1, 2, ...
EVALUATION_STREAM, CONTROL_STREAM = 2**23, 2**22


def my_share(count: int, rank: int, world: int) -> range:
    """The rows of `count` that process `rank` works on: contiguous, sizes differing by at most 1.

    >>> [list(my_share(5, rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(count * rank // world, count * (rank + 1) // world)


def row_generator(seed: int, stream: int, first_row: int, numbers_per_row: int) -> torch.Generator:
    """A CPU generator that stands where one process, drawing all rows in order, would reach
    `first_row`; so the samples of a row do not depend on how rows are shared out."""
    generator = torch.Generator().manual_seed((seed << 24) + stream)
    if first_row:
        torch.rand(first_row * numbers_per_row, dtype=torch.float64, generator=generator)
    return generator


def batch_order(count: int, first: int, length: int, seed: int) -> list[int]:
    """Entries first..first+length-1 of an endless sequence of shuffled epochs of `count` problems.

    >>> sorted(batch_order(3, 0, 3, seed=1)), sorted(batch_order(3, 3, 3, seed=1))
    ([0, 1, 2], [0, 1, 2])
    """
    order = []
    for epoch in range(first // count, (first + length - 1) // count + 1):
        epoch_order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(epoch_order)
        order += epoch_order
    return order[first % count :][:length]


def micro_batches(mask_BT, args):
    """Rows of similar length together: yields (rows, columns), longest rows first, of the columns
    that mask_BT (bool) needs, at least 2. Limits are those of the flags in `args`; a row beyond
    them is alone. Rows that need none are left out, but for the first if all are: every process
    takes part in a backward pass.

    >>> from types import SimpleNamespace as Args
    >>> mask_BT = torch.arange(9) < torch.tensor([4, 9, 3, 4, 2])[:, None]
    >>> limits = Args(micro_batch=0, tokens_per_micro_batch=12)
    >>> [(rows.tolist(), columns.stop) for rows, columns in micro_batches(mask_BT, limits)]
    [([1], 9), ([0, 2, 3], 4), ([4], 2)]
    """
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
        """Charge the time since the last call to `phase`."""
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
    """`work()` in every process. If it raises a ValueError or an OSError in one (or that has an
    `error` already), a ValueError in all, with that rank, if it is another: nobody waits for one
    that has left."""
    try:
        work()
    except (ValueError, OSError) as caught:
        error = caught
    errors = gather_objects(error and str(error))
    for rank, text in enumerate(errors):
        if text is not None:
            raise ValueError(str(error) if error else f"rank {rank}: {text}")
