"""Who may write a folder: one process at a time."""

import contextlib
import os
from pathlib import Path

from harness.cli import check_creatable

try:
    import fcntl
except ImportError:  # Windows: there, two processes can write one run
    fcntl = None


def lock(file) -> None:
    """BlockingIOError if another process has it; the lock goes with the file or the process."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Claim:
    """The right to write a folder, from `take` to `close`.

    The lock is on the folder itself: it leaves no file, and ends with the process. Where folders
    cannot be locked (Windows, some network disks) only the log of a run is.
    """

    def __init__(self, out: Path):
        self.out, self.made, self.handle = Path(out), [], None

    def take(self) -> None:
        """Make the folder if need be, and lock it, before anything in it is looked at. ValueError:
        another process has it. OSError: it cannot be written."""
        if not self.out.is_dir():
            check_creatable("--out", self.out)
        self.made = [path for path in (self.out, *self.out.parents) if not path.exists()]
        self.out.mkdir(parents=True, exist_ok=True)
        self.handle = self._lock(self.out)
        check_creatable("--out", self.out)
        self.check()

    def check(self) -> None:
        """ValueError if another folder has come in the place of the one that is locked."""
        if self.handle and not os.path.samestat(os.fstat(self.handle), os.stat(self.out)):
            raise self._refusal()

    def begin(self) -> None:
        """Have an empty folder: an earlier run in it is moved to <out>.1, <out>.2, ..."""
        self.check()
        if any(path.suffix != ".partial" for path in self.out.iterdir()):
            out, number = Path(os.path.abspath(self.out)), 1  # "." has no name
            while os.path.lexists(out.with_name(f"{out.name}.{number}")):
                number += 1
            fresh, before = out.with_name(f"{out.name}.partial"), self.handle
            fresh.mkdir(exist_ok=True)
            self.handle = self._lock(fresh)  # before it gets its name
            out.rename(out.with_name(f"{out.name}.{number}"))
            fresh.rename(out)  # in the place of an empty one that came meanwhile, too: see `check`
            if before:
                os.close(before)

    def close(self) -> None:
        """Give the folder up; what was made for it and is still empty goes."""
        for path in self.made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if self.handle:
            os.close(self.handle)

    def _lock(self, folder: Path) -> int | None:
        if fcntl is None:
            return None
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            lock(handle)
        except BlockingIOError:
            os.close(handle)
            raise self._refusal() from None
        except OSError:  # this disk locks no folders
            pass
        return handle

    def _refusal(self) -> ValueError:
        return ValueError(f"--out {self.out}: another process is writing this run")
