"""A run folder, and checkpoints from which a run goes on bit for bit, whatever ended it.

    runs/release-seed0/
        config.json                every flag, what the numbers depend on, when it was resumed
        log.jsonl                  one line per step or evaluation
        log.dropped.jsonl          lines of steps that a resumed run does again
        checkpoints/step-00000020/ student, optimizer (safetensors), facts.json, checksums.json
        student/                   the result, in Hugging Face format
        faults/                    what a run that failed left to look at

Files and folders are written under another name (`.partial`), forced to the disk, then renamed:
nothing is half there under its final name. A checkpoint whose SHA-256 sums do not agree is set
aside (`.torn`), and the one before serves. What is not a tensor is JSON; nothing is unpickled. No
name comes from what is read, and links in a run folder are refused: nothing outside is touched.
"""

import base64
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import stat
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness.cli import alike, open_regular, read_json

KEPT = 2  # checkpoints: the newest, and the one before in case that is torn
INSIDE = ("config.json", "log.jsonl", "log.dropped.jsonl", "checkpoints", "student", "faults")


# ------------------------------------------------------------------------------------- the folder
def check_folder(out: Path, resume: bool = False) -> None:
    """ValueError unless `out` is a run, to be moved aside or resumed, or there is nothing yet."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file")
    paths = out.iterdir() if out.exists() else ()
    names = [path.name for path in paths if not path.name.endswith(".partial")]
    if names and not (resume and "config.json" in names):  # a broken one is told by read_config
        try:
            is_run = read_config(out) is not None
        except ValueError:  # models have a config.json, too
            is_run = False
        if not is_run:
            raise ValueError(f"--out {out} holds files that are not a run; name another folder")
    for name in INSIDE if resume else ():
        is_kind, kind = (stat.S_ISREG, "file") if "." in name else (stat.S_ISDIR, "folder")
        if (out / name).is_symlink():
            raise ValueError(f"--out {out}: {name} is a link; a run stays in its own folder")
        if (out / name).exists() and not is_kind((out / name).stat().st_mode):
            raise ValueError(f"--out {out}: {name} is not a {kind}")


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
        if alike(known["flags"], {}) and alike(known["resumed"], []):
            return config
    raise ValueError(f"{path}: is not a run's config")


def changed_flags(config: dict, flags: dict, may_change=()) -> list[str]:
    """What the flags of a run and of the command that resumes it disagree about, one text each.

    >>> changed_flags({"flags": {"lr": 0.1, "steps": 3}}, {"lr": 0.2, "steps": 9}, ("steps",))
    ['--lr 0.1, now 0.2']
    """
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
    """The error of the first process to report one; `text` if that is this one.  It stands in
    faults/first.txt, which only one process can create."""
    path = Path(out) / "faults" / "first.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path, "x") as file:
            file.write(text + "\n")
        return text
    except FileExistsError:
        return path.read_text().strip() or text
    except OSError:  # no run folder yet, or one that cannot be written
        return text


def forget_faults(out: Path) -> None:
    """A resumed run has not failed yet."""
    _remove(Path(out) / "faults" / "first.txt")


def replace_folder(out: Path, name: str, fill) -> None:
    """Have `fill(folder)` write a folder, then put it in the place of <out>/<name>. OSError: it
    cannot be written; what was there still is, and nothing half-written."""
    target, partial, old = out / name, out / f"{name}.partial", out / f"{name}.old.partial"
    with name_the_path(target, partial):
        _remove(partial)
        _remove(old)
        fill(partial)
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        if os.path.lexists(target):
            target.rename(old)
        partial.rename(target)
        _flush(out)
        _remove(old)


# -------------------------------------------------------------------------------- checkpoints
@dataclass
class Checkpoint:
    """What was read, as it was written."""

    groups: dict[str, dict[str, torch.Tensor]]
    facts: dict


def write(out: Path, step: int, groups: dict, facts: dict, keep: int = KEPT) -> Path:
    """Write a checkpoint, then delete all but the newest `keep` of them.

    step: its number; a whole checkpoint of the same step is left as it is. groups: tensors, {file
    name without suffix: {name: tensor}}. facts: whatever JSON can spell. Returns its folder.
    OSError: it cannot be written; what there was remains, and nothing half-written does.
    """
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
            _clean(folder)
            replace_folder(folder, target.name, fill)
        for old in _steps(folder)[:-keep]:
            _remove(old)
    return target


def survey(out: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, None without one; and torn ones that are newer, which are warned
    of. Reads only."""
    torn = []
    for path in reversed(_steps(Path(out) / "checkpoints")):
        if not (why := what_is_torn(path)):
            return path, torn
        torn.append(path)
        warnings.warn(f"{path} is torn ({why!a}): looking at the one before", stacklevel=2)
    return None, torn


def newest(out: Path, found=None) -> Path | None:
    """The newest whole checkpoint; torn ones that are newer are renamed to `<name>.torn`, and what
    an interrupted `write` left is deleted. found: what `survey` said, if it has been asked."""
    _clean(Path(out) / "checkpoints")
    path, torn = found or survey(out)
    for one in torn:
        aside = one.with_name(one.name + ".torn")
        _remove(aside)
        one.rename(aside)
    return path


def last_written(out: Path) -> Path | None:
    """As `newest`, but unchecked, and so without reading it again."""
    found = _steps(Path(out) / "checkpoints")
    return found[-1] if found else None


def step_of(path: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
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
    return Checkpoint(groups, read_facts(path))


def read_facts(path: Path) -> dict:
    """Only the facts of a whole checkpoint."""
    return read_json(path / "facts.json")


# ------------------------------------------------------------------------------- what is in one
def capture(model, optimizer, scheduler=None) -> tuple[dict, dict]:
    """The (groups, facts) of a model, a torch optimizer and a scheduler, for `write`."""
    groups = {"student": _distinct(model.state_dict()), "optimizer": {}}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            groups["optimizer"][f"{number}.{name}"] = torch.as_tensor(value).contiguous()
    facts = {"options": [_options(group) for group in optimizer.param_groups]}
    if scheduler is not None:
        facts["scheduler"] = scheduler.state_dict()
    return groups, facts


def restore(checkpoint: Checkpoint, model, optimizer, scheduler=None) -> None:
    """Put back what `capture` took, into objects that were built as those were. ValueError: a
    tensor is missing, is not wanted or has another shape."""
    own, saved = model.state_dict(), checkpoint.groups["student"]
    wanted = {name: tensor.shape for name, tensor in _distinct(own).items()}
    if wanted != {name: tensor.shape for name, tensor in saved.items()}:
        odd = sorted(wanted.keys() ^ saved.keys()) or ["a shape"]
        raise ValueError(f"the checkpoint is of another student: {odd[0]}")
    for name, example in json.loads(json.dumps(capture(model, optimizer, scheduler)[1])).items():
        if not alike(checkpoint.facts.get(name), example):
            raise ValueError(f"facts.json: {name} of another optimizer")
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
    states = {}
    for name, value in checkpoint.groups["optimizer"].items():
        number, key = name.split(".", 1)
        states.setdefault(int(number), {})[key] = value
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    for number, state in states.items():
        right = {"step": torch.Size(), "exp_avg": shapes[number], "exp_avg_sq": shapes[number]}
        if {name: value.shape for name, value in state.items()} != right:
            raise ValueError(f"optimizer.safetensors: parameter {number} of another optimizer")
    structure = optimizer.state_dict()
    for group, options in zip(structure["param_groups"], checkpoint.facts["options"], strict=True):
        group |= {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    optimizer.load_state_dict({"state": states, "param_groups": structure["param_groups"]})
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint.facts["scheduler"])


def random_state() -> dict:
    """This process's random numbers, of torch (CPU and GPU), Python and numpy, for JSON."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": _text(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict) -> None:
    """Undo what was drawn since `random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, at, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), range(len(keys) + 1)[at], *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


# ------------------------------------------------------------------------------------ small pieces
def _distinct(tensors: dict) -> dict:
    """Of tied weights the first name only; safetensors stores no tensor twice."""
    first = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else name, name)
    return {name: tensors[name].detach().contiguous() for name in first.values()}


def _options(group: dict) -> dict:
    return {k: v for k, v in group.items() if isinstance(v, int | float | tuple | list | None)
            and k != "params"}  # fmt: skip


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; nothing else, and no links."""
    found = [p for p in folder.glob("step-*") if re.fullmatch("step-[0-9]{8,18}", p.name)]
    return sorted((p for p in found if not p.is_symlink()), key=step_of)


def _clean(folder: Path) -> None:
    for path in folder.glob("step-*.partial"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # of a link the link, not what it leads to
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def name_the_path(path: Path, partial: Path | None = None):
    """Errors of writing become an OSError that names the path: those of an open file name none,
    those of safetensors are no OSErrors.  What is half-written is removed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if partial is not None:
            _remove(partial)
        quoted = re.search(r"os error (\d+)", str(error))  # safetensors' errors have no errno
        number = int(quoted[1]) if quoted and int(quoted[1]) in errno.errorcode else None
        number = error.errno if isinstance(error, OSError) else number
        reason = os.strerror(number) if number else str(error)
        raise OSError(number or 0, f"cannot be written: {reason}", str(path)) from error


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
