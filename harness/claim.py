"""Who may write a folder: one process at a time."""

import contextlib
import os
from pathlib import Path

from harness.cli import check_creatable, name_the_flag

try:
    import fcntl
except ImportError:  # Windows: there, two processes can write one run
    fcntl = None


def lock(file) -> None:
    """BlockingIOError if another process has it; the lock goes with the file or the process."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Claim:
    """One process's right to write a folder. A context manager: on leaving it is given up, and
    folders that it has made are gone if they are still empty.

    The lock is on the folder itself, so that no file is left over, and ends with the process. Where
    no folder can be locked (Windows, some network disks) only the log is.
    """

    def __init__(self, out: Path):
        self.out, self.made, self.handle = Path(out), [], None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        self._hold(None)

    def take(self) -> None:
        """Make the folder if need be, and lock it; nothing in it is looked at before. ValueError:
        another process has it, or it cannot be written."""
        if not self.out.exists():
            check_creatable("--out", self.out)
        with name_the_flag("--out", self.out):
            missing = [p for p in (self.out, *self.out.parents) if not os.path.lexists(p)]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self.made.append(folder)
            self.out.mkdir(exist_ok=True)  # an error if a file is there
        try:
            self._hold(self._lock(self.out))
        except FileNotFoundError:  # who had made it has just removed it
            return self.take()
        check_creatable("--out", self.out)
        self.check()

    def check(self) -> None:
        """ValueError if another folder has come in the place of the one that is locked."""
        with contextlib.suppress(FileNotFoundError):
            if self.handle is None or os.path.samestat(os.fstat(self.handle), os.stat(self.out)):
                return
        raise self._refusal()

    def begin(self) -> None:
        """Have the folder empty.  An earlier run in it is moved to <out>.1, <out>.2, ..."""
        self.check()
        if all(path.name.endswith(".partial") for path in self.out.iterdir()):
            return
        out = Path(os.path.abspath(self.out))  # "." has no name
        fresh, number = out.with_name(f"{out.name}.partial"), 1
        fresh.mkdir(exist_ok=True)
        handle = self._lock(fresh)  # before it has the name, so that nobody comes in between
        while os.path.lexists(out.with_name(f"{out.name}.{number}")):
            number += 1
        out.rename(out.with_name(f"{out.name}.{number}"))
        fresh.rename(out)  # also over an empty folder that came meanwhile: `check` tells its owner
        self._hold(handle)

    def _refusal(self):
        return ValueError(f"--out {self.out}: another process is writing this run")

    def _hold(self, handle) -> None:
        if self.handle is not None:
            os.close(self.handle)
        self.handle = handle

    def _lock(self, folder: Path):
        if fcntl is None:
            return None
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            lock(handle)
        except BlockingIOError:
            os.close(handle)
            raise self._refusal() from None
        except OSError:  # of a disk that locks no folders
            pass
        return handle
