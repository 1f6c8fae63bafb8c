"""`train.py` in a process that is forked from one which has imported it and done nothing else: real
exit codes, streams and signals, without the seconds that importing takes."""

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "transformers.models.qwen3.modeling_qwen3"])
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _child(argv, cwd, code, environment, out, err):
    os.chdir(cwd)
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    import train

    exec(code, {"train": train})
    train.main(argv)


def start(argv, cwd, code="", **environment):
    """Begin a run in the folder `cwd`, after some code that sees `train`; for `finish`."""
    place = Path(tempfile.mkdtemp())
    paths = str(place / "out"), str(place / "err")
    arguments = ([*map(str, argv)], str(cwd), code, ENVIRONMENT | environment, *paths)
    process = CONTEXT.Process(target=_child, args=arguments)
    process.start()
    return process, place


def start_ranks(argv, cwd, code="", world=2):
    """A run in several processes without a launcher that would tidy up, one `start` each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    where = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(argv, cwd, code, **where, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(world)]  # fmt: skip


def finish(process, place, seconds=240):
    """Wait for a run: its `returncode`, `stdout` and `stderr`; one that hangs is killed."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return SimpleNamespace(
        returncode=process.exitcode,
        stdout=(place / "out").read_text() if (place / "out").exists() else "",
        stderr=(place / "err").read_text() if (place / "err").exists() else "",
    )


def finish_all(started, seconds=240):
    """Several, within so many seconds in all: fewer than a test may take."""
    end = time.monotonic() + seconds
    return [finish(*one, max(0, end - time.monotonic())) for one in started]


def run(argv, cwd, code="", fails=False):
    """A whole run; on an unexpected exit the end of what it printed is shown."""
    done = finish(*start(argv, cwd, code))
    if (done.returncode != 0) != fails:
        pytest.fail(f"{argv}\nexit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done
