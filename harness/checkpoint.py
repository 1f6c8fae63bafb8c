"""A run folder (docs/runs.md), who may write it, and checkpoints, from which a run goes on bit for
bit. Files and folders are written as `.partial`, forced to the disk, then renamed. No
name comes from what is read, and links are refused: nothing outside is touched."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import warnings
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness.cli import check_creatable, open_regular, read_json
from harness.shard import DTensor, spread_like, whole

try:
    import fcntl
except ImportError:  # Windows: there, two processes can write one run
    fcntl = None

KEPT = 2  # checkpoints: the newest, and the one before in case that is torn
TAKEN = "--out {}: another process is writing this run"
INSIDE = ("config.json", "log.jsonl", "log.dropped.jsonl", "checkpoints", "student", "faults")


def lock(file) -> None:
    """BlockingIOError if another process has it; the lock goes with the file or the process."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Claim:
    """The right to write a folder: a lock on itself that ends with the process and leaves nothing.
    Where there is none (Windows, some network disks) only the log is locked."""

    def __init__(self, out: Path):
        self.out, self.made, self.handle = Path(out), [], None

    def take(self) -> None:
        """Make the folder if need be, and lock it. ValueError, OSError: that is not possible."""
        if not os.path.isdir(self.out):  # also of a name that is too long
            check_creatable("--out", self.out)
        self.made = [path for path in (self.out, *self.out.parents) if not path.exists()]
        self.out.mkdir(parents=True, exist_ok=True)
        self.handle = self._lock(self.out)
        check_creatable("--out", self.out)
        self.check()

    def check(self) -> None:
        """ValueError if another folder has come in the place of the one that is locked."""
        if self.handle and not os.path.samestat(os.fstat(self.handle), os.stat(self.out)):
            raise ValueError(TAKEN.format(self.out))

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
        except OSError as error:  # else this disk locks no folders
            if isinstance(error, BlockingIOError):
                os.close(handle)
                raise ValueError(TAKEN.format(self.out)) from None
        return handle


def check_folder(out: Path, resume: bool = False) -> None:
    """ValueError unless `out` is a run, to be moved aside or resumed, or there is nothing yet."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file")
    paths = out.iterdir() if out.exists() else ()
    names = [path.name for path in paths if not path.name.endswith(".partial")]
    if names and not (resume and "config.json" in names):  # a broken one is told by read_config
        with contextlib.suppress(ValueError):  # models have a config.json, too
            names = () if read_config(out) else names
        if names:
            raise ValueError(f"--out {out} holds files that are not a run; name another folder")
    for path in [out / name for name in INSIDE] if resume else ():
        if path.is_symlink():
            raise ValueError(f"--out {out}: {path.name} is a link; a run stays in its folder")
        if path.exists() and not (path.is_file() if path.suffix else path.is_dir()):
            raise ValueError(f"--out {out}: {path.name} is not of its kind, file or folder")


def write_json(path: Path, content: dict) -> None:
    """The whole file or, whatever happens, the one that was there before."""
    partial = path.with_name(path.name + ".partial")
    with name_the_path(path):
        _remove(partial)  # it may be a link
        with open(partial, "x") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush(path.parent)


def read_config(out: Path) -> dict | None:
    """config.json of a run that began there, None if there is none. ValueError: not a run's."""
    path = Path(out) / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        return None
    with contextlib.suppress(LookupError, RecursionError, TypeError, ValueError):
        known = {"resumed": [], "date": "1970-01-01"} | config
        json.dumps(known, indent=2)  # not too deep to be written again
        date.fromisoformat(known["date"])
        if isinstance(known["flags"], dict) and isinstance(known["resumed"], list):
            return config
    raise ValueError(f"{path}: is not a run's config")


def changed_flags(config: dict, flags: dict, may_change=()) -> list[str]:
    """Flags that a run and the command that resumes it disagree about, one text each."""
    then, now = config["flags"], json.loads(json.dumps(flags))
    names = [k for k in then | now if k not in may_change and then.get(k) != now.get(k)]
    return [f"--{k.replace('_', '-')} {then.get(k)!s:.60}, now {now.get(k)}" for k in names]


def write_fault(out: Path, name: str, tensors: dict) -> Path:
    """Tensors of what went wrong, in faults/; returns where."""
    path = Path(out) / "faults" / name
    with name_the_path(path):
        path.parent.mkdir(exist_ok=True)
        _remove(path)  # it may be a link
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    return path


def first_fault(out: Path, text: str) -> str:
    """The error of the first process to report one, in faults/first.txt: it may be `text`."""
    path = Path(out) / "faults" / "first.txt"
    with contextlib.suppress(OSError):  # no run folder yet, or one that cannot be written
        path.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError), open(path, "x") as file:
            file.write(text + "\n")
        return path.read_text().strip() or text
    return text


def replace_folder(out: Path, name: str, fill) -> None:
    """Have `fill(folder)` write <out>/<name>. OSError: what was there still is."""
    target, partial, old = out / name, out / f"{name}.partial", out / f"{name}.old.partial"
    with name_the_path(target, partial):
        _remove(partial, old)
        fill(partial)
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        if os.path.lexists(target):
            target.rename(old)
        partial.rename(target)
        _flush(out)
        _remove(old)


class Checkpoint(NamedTuple):
    groups: dict[str, dict[str, torch.Tensor]]
    facts: dict


def write(out: Path, step: int, groups: dict, facts: dict, keep: int = KEPT) -> Path:
    """Write tensors by file and name, and facts for JSON; delete all but the newest `keep`. A whole
    checkpoint of that step is left as it is. OSError: what there was remains."""
    folder = Path(out) / "checkpoints"
    target = folder / f"step-{step:08d}"

    def fill(partial):
        partial.mkdir()
        for name, tensors in groups.items():
            save_file(tensors, partial / f"{name}.safetensors")
        (partial / "facts.json").write_text(json.dumps(facts))
        sums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / "checksums.json").write_text(json.dumps(sums, indent=1))

    with name_the_path(target):
        folder.mkdir(exist_ok=True)
        if target.is_symlink() or not target.exists() or what_is_torn(target):
            replace_folder(folder, target.name, fill)
        _remove(*_steps(folder)[:-keep])
    return target


def survey(out: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint or None, and newer ones that are torn. Reads only, and warns."""
    torn = []
    for path in reversed(_steps(Path(out) / "checkpoints")):
        if not (why := what_is_torn(path)):
            return path, torn
        torn.append(path)
        warnings.warn(f"{path} is torn ({why!a}): looking at the one before", stacklevel=2)
    return None, torn


def newest(out: Path, found=None) -> Path | None:
    """What `survey` finds, or has `found`; torn ones are renamed to `<name>.torn`, and what an
    interrupted `write` left is deleted."""
    _remove(*(Path(out) / "checkpoints").glob("step-*.partial"))
    path, torn = found or survey(out)
    for one in torn:
        aside = one.with_name(one.name + ".torn")
        _remove(aside)
        one.rename(aside)
    return path


def last_written(out: Path) -> Path | None:
    """As `newest`, but unchecked, and so without reading it again."""
    return next(reversed(_steps(Path(out) / "checkpoints")), None)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def what_is_torn(path: Path) -> str:
    """Which file of a checkpoint is not what was written, and how; "" if it is whole."""
    try:
        sums = read_json(path / "checksums.json")
        files = {file.name: file for file in path.iterdir()}
        odd = sums.keys() ^ (files.keys() - {"checksums.json"}) | ({"facts.json"} - sums.keys())
        if odd:
            return f"{min(odd)} is missing, in the folder or in checksums.json"
        for name, file in files.items():
            if file.is_symlink():
                return f"{name} is a link"
            if name != "checksums.json" and _sha256(file) != sums[name]:
                return f"{name} has another checksum"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"checksums.json or what it names: {type(error).__name__}: {error}"
    return ""


def read(path: Path) -> Checkpoint:
    """Read a whole checkpoint (see `newest`) into CPU memory."""
    groups = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(groups, read_json(path / "facts.json"))


def capture(model, optimizer, scheduler=None) -> tuple[dict, dict]:
    """The (groups, facts) of a model, a torch optimizer and a scheduler, for `write`."""
    groups = {"student": {}, "optimizer": {}}
    for name, tensor in _distinct(model).items():
        groups["student"][name] = whole(tensor).contiguous()
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            groups["optimizer"][f"{number}.{name}"] = whole(torch.as_tensor(value)).contiguous()
    return groups, _facts(optimizer, scheduler)


def _facts(optimizer, scheduler) -> dict:
    plain, groups_of = (int, float, tuple, type(None)), optimizer.param_groups
    facts = {"options": [{k: v for k, v in g.items() if isinstance(v, plain)} for g in groups_of]}
    if scheduler is not None:
        facts["scheduler"] = scheduler.state_dict()
    return facts


def restore(checkpoint: Checkpoint, model, optimizer, scheduler=None) -> None:
    """Put back what `capture` took, into objects that were built as those were; or ValueError."""
    own, saved = _distinct(model), checkpoint.groups["student"]
    wanted = {name: tensor.shape for name, tensor in own.items()}
    if wanted != {name: tensor.shape for name, tensor in saved.items()}:
        odd = sorted(wanted.keys() ^ saved.keys()) or ["a shape"]
        raise ValueError(f"the checkpoint is of another student: {odd[0]}")
    facts = json.loads(json.dumps(_facts(optimizer, scheduler)))
    if _kinds({name: checkpoint.facts.get(name) for name in facts}) != _kinds(facts):
        raise ValueError("facts.json: of another optimizer or schedule")
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(spread_like(tensor, own[name]))
    states, own = {}, [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in checkpoint.groups["optimizer"].items():
        number, key = name.split(".", 1)
        if value.shape != (() if key == "step" else own[int(number)].shape):
            raise ValueError(f"optimizer.safetensors: {name} has another shape")
        value = value if key == "step" else spread_like(value, own[int(number)])
        states.setdefault(int(number), {})[key] = value
    structure = optimizer.state_dict()
    for group, options in zip(structure["param_groups"], checkpoint.facts["options"], strict=True):
        group |= {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    optimizer.load_state_dict({"state": states, "param_groups": structure["param_groups"]})
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint.facts["scheduler"])


def random_state() -> dict:
    """This process's random numbers, of torch (CPU and GPU), Python and numpy, for JSON."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state().tolist(), "python": random.getstate()}
    state["numpy"] = [kind, keys.tolist(), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def set_random_state(state: dict) -> None:
    """Undo what was drawn since `random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, at, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), range(len(keys) + 1)[at], *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _distinct(model) -> dict:
    """Its state, of a model with adapters theirs; of tied weights the first name only: safetensors
    stores no tensor twice."""
    first, tensors = {}, model.state_dict(keep_vars=True)
    tensors = {name: x for name, x in tensors.items() if ".lora_" in name} or tensors
    for name, tensor in tensors.items():
        place = id(tensor) if isinstance(tensor, DTensor) else tensor.data_ptr()
        first.setdefault((place, tensor.shape) if tensor.numel() else name, name)
    return {name: tensors[name].detach() for name in first.values()}


def _kinds(value):
    """Of JSON everything but the values; whole numbers count as others."""
    if isinstance(value, dict):
        return {key: _kinds(item) for key, item in value.items()}
    is_list = isinstance(value, list)
    return [*map(_kinds, value)] if is_list else type(value) in (int, float) or value


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; nothing else, and no links."""
    found = [p for p in folder.glob("step-*") if re.fullmatch("step-[0-9]{8,18}", p.name)]
    return sorted((p for p in found if not p.is_symlink()), key=step_of)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():  # of a link the link, not what it leads to
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def name_the_path(path: Path, partial: Path | None = None):
    """Errors of writing as an OSError that names the path; what is half-written is removed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if partial is not None:
            _remove(partial)
        quoted = re.search(r"os error (\d+)", str(error))  # safetensors' errors have no errno
        number = getattr(error, "errno", None) or int(quoted[1] if quoted else 0)
        reason = os.strerror(number) if number in errno.errorcode else str(error)
        raise OSError(number, f"cannot be written: {reason}", str(path)) from error


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
