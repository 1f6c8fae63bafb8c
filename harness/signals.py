"""Signals that end a run, and what is said when it ends before its time."""

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch.distributed as dist

from harness import checkpoint
from harness.cli import complain

NONFINITE = "non-finite logits while sampling"  # what rollout.generate says


class Stop(BaseException):  # which no `except Exception` on its way up may swallow
    """A signal asked the process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        # ending when told is no failure; 130 after Ctrl-C, 129 after SIGHUP, as shells have it
        self.exit_code = 0 if number == signal.SIGTERM else 128 + number


class Stream:
    """A stream that goes nowhere once it fails: its disk is full, or its reader has gone."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


STOPS = {"SIGTERM", "SIGINT", "SIGHUP"} & {number.name for number in signal.Signals}


class Interruptions:
    """STOPS become a `Stop` wherever the program is, but wait between `hold` and `release`, where
    weights may lack their line in the log. The first counts. What was ignored stays ignored."""

    def __init__(self):
        self.number, self.held, self.before = None, False, {}
        self.streams = [Stream(sys.stdout), Stream(sys.stderr)]

    def __enter__(self):
        sys.stdout, sys.stderr = self.streams
        if threading.current_thread() is threading.main_thread():
            for number in (signal.Signals[name] for name in STOPS):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        sys.stdout, sys.stderr = (stream.stream for stream in self.streams)

    def _arrived(self, number, _frame):
        if self.number is None:
            self.number = number
            if not self.held:
                raise Stop(number)

    def hold(self, *_) -> None:
        self.held = True

    def release(self) -> None:
        """From here on they do not; one that came meanwhile, or got lost, is raised now."""
        self.held = False
        if self.number is not None:
            raise Stop(self.number)


def end_when_told(out: Path | None, stop: Stop) -> int:
    """After a signal: say how to go on; the exit code. out: None if the run has not begun."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        path = checkpoint.last_written(out) if out else None
        how = f"{path} is written, --resume goes on from there" if path else "nothing was written"
        print(f"\ntrain.py: stopped by {stop}; {how}", file=sys.stderr, flush=True)
    elif out:  # perhaps it is the only one that was told
        checkpoint.first_fault(out, f"rank {rank}: stopped by {stop}")
    return stop.exit_code


def end_with_error(out: Path | None, error: Exception) -> int:
    """After an error: the process in which it happened says so, the others name that one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    text = f"{type(error).__name__}: {error}"
    lost = isinstance(error, dist.DistError) or "/gloo/" in str(error)
    if lost:
        text = f"lost contact with another process: {error}"
    if world > 1:
        text = f"rank {rank}: {text}"
        first = checkpoint.first_fault(out, text) if out else text
        if first != text:
            text, lost = f"rank {rank} ends because of {first}", True
    if not lost and not isinstance(error, FloatingPointError | OSError) and NONFINITE not in text:
        traceback.print_exception(error)
    print(file=sys.stderr)  # below a bar
    complain("train.py", text)
    return 1
