"""What a run leaves on disk: put back bit for bit, whole or not at all, and never outside its
folder."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import checkpoint
from harness.log import Log
from harness.signals import Interruptions, Stop


def in_a_child(work) -> int:
    """`work()` in a forked process: its exit code, negative for a signal; 99 for an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(event: int, folder: Path) -> None:
    """From here on, SIGKILL this process at that file operation below a folder, counted from 0."""
    seen = [0]

    def hook(name, arguments):
        if name.split(".")[0] in ("open", "os", "shutil") and any(
            isinstance(a, str | os.PathLike) and str(a).startswith(str(folder)) for a in arguments
        ):
            if seen[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1

    sys.addaudithook(hook)


GROUPS = {"student": {"a": torch.arange(6.0)}, "optimizer": {"0.step": torch.tensor(3.0)}}


def content(path: Path):
    """What a checkpoint holds, in a form that can be compared."""
    found = checkpoint.read(path)
    return {k: {n: t.tolist() for n, t in v.items()} for k, v in found.groups.items()}, found.facts


# ------------------------------------------------------------------------------------ bit for bit
def training(seed=0, family="qwen3", **more):
    """A model, AdamW in two groups as `train.py` has it, a warm-up, and a function that trains."""
    model = tiny_model(family, seed=seed, **more)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 5))

    def step(count):
        for _ in range(count):
            ids_BT = torch.randint(61, (3, 9))  # from the global generator
            model(ids_BT, labels=ids_BT).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    return model, optimizer, scheduler, step


@pytest.mark.parametrize("family, tied", [("qwen3", False), ("qwen3", True), ("gpt2", True)])
@pytest.mark.parametrize("before", [0, 3])
def test_a_restored_run_goes_on_bit_for_bit(family, tied, before, tmp_path):
    """Weights, moments, warm-up and random numbers; a checkpoint before the first step, too."""
    more = {"tie_word_embeddings": tied}
    model, optimizer, scheduler, step = training(0, family, **more)
    torch.manual_seed(7)
    step(before)
    groups, facts = checkpoint.capture(model, optimizer, scheduler)
    names = {name for name, _ in model.named_parameters()}  # tied weights count once
    assert names <= set(groups["student"])
    facts["random"] = checkpoint.random_state()
    path = checkpoint.write(tmp_path, before, groups, facts)
    step(4)

    other, *objects, other_step = training(1, family, **more)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))
    found = checkpoint.read(path)
    checkpoint.restore(found, other, *objects)
    checkpoint.set_random_state(found.facts["random"])
    other_step(4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert objects[1].state_dict() == scheduler.state_dict()
    one, two = optimizer.state_dict(), objects[0].state_dict()
    assert one["param_groups"] == two["param_groups"]
    for number, state in one["state"].items():
        assert all(torch.equal(value, two["state"][number][key]) for key, value in state.items())


def test_another_student_is_refused(tmp_path):
    model, optimizer, scheduler, step = training()
    step(1)
    path = checkpoint.write(tmp_path, 1, *checkpoint.capture(model, optimizer, scheduler))
    other = training(0, vocab_size=62)
    with pytest.raises(ValueError, match="of another student: a shape"):
        checkpoint.restore(checkpoint.read(path), *other[:3])
    with pytest.raises(ValueError, match="of another student: .*weight"):
        checkpoint.restore(checkpoint.read(path), *training(0, "gpt2")[:3])


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=20, deadline=None)
def test_random_numbers_come_back_through_json(seed, halfway):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    if halfway:  # Python and numpy keep the second of two normal numbers
        random.gauss(0, 1), np.random.randn(), torch.randn(3)

    def draw():
        return (torch.rand(5).tolist(), torch.randn(17).tolist(), random.random(),
                random.gauss(0, 1), np.random.rand(), np.random.randn())  # fmt: skip

    state = json.loads(json.dumps(checkpoint.random_state()))
    first = draw()
    checkpoint.set_random_state(state)
    assert draw() == first


# --------------------------------------------------------------------------- whole, or not at all
def test_the_last_two_are_kept_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").write_text("do not touch")
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "step-00000001").symlink_to(tmp_path / "elsewhere")
    (out / "checkpoints" / "step-00000000.partial").symlink_to(tmp_path / "elsewhere")
    (out / "checkpoints" / "mine").mkdir()
    (out / "checkpoints" / "step-00000009").symlink_to(tmp_path / "elsewhere")
    for step in (2, 5, 9, 100):
        path = checkpoint.write(out, step, GROUPS, {"step": step})
        assert checkpoint.newest(out) == path and checkpoint.step_of(path) == step
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["mine", "step-00000001", "step-00000009", "step-00000100"]
    assert (tmp_path / "elsewhere" / "thesis.txt").read_text() == "do not touch"
    assert content(path)[1] == {"step": 100}


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "flipped": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    ),
    "gone": lambda file: file.unlink(),
    "link": lambda file: file.symlink_to(file.rename(file.parents[2] / "elsewhere")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["student.safetensors", "optimizer.safetensors", "facts.json", "checksums.json"]
)
def test_a_torn_checkpoint_is_passed_over_with_a_warning(name, damage, tmp_path):
    for step in (1, 2):
        checkpoint.write(tmp_path, step, GROUPS, {"step": step})
    torn = tmp_path / "checkpoints" / "step-00000002"
    DAMAGE[damage](torn / name)
    with pytest.warns(UserWarning, match=f"step-00000002 is torn .*{name}"):
        assert content(checkpoint.newest(tmp_path))[1] == {"step": 1}
    assert not torn.exists() and torn.with_name("step-00000002.torn").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 1  # said once
    checkpoint.write(tmp_path, 2, GROUPS, {"step": 2})
    assert content(checkpoint.newest(tmp_path))[1] == {"step": 2}


def test_all_torn_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    path = checkpoint.write(tmp_path, 1, GROUPS, {})
    (path / "facts.json").write_text("{}  ")
    with pytest.warns(UserWarning, match="torn"):
        assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("sums", ["[]", "null", "{}", '{"../../facts.json": "0"}', "{", "\0"])
def test_checksums_cannot_name_other_files(sums, tmp_path):
    path = checkpoint.write(tmp_path, 1, GROUPS, {})
    (path / "checksums.json").write_text(sums)
    assert checkpoint.what_is_torn(path)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Power may fail, too: every file and the folder are flushed, then renamed, then the names."""
    done, flush, rename = [], os.fsync, Path.rename

    def fsync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        flush(handle)

    def renaming(path, target):
        done.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renaming)
    checkpoint.write(tmp_path, 1, GROUPS, {})
    files = ["checksums.json", "facts.json", "optimizer.safetensors", "student.safetensors"]
    name = "step-00000001"
    assert sorted(done[:4]) == files
    assert done[4:] == [f"{name}.partial", f"{name}.partial -> {name}", "checkpoints"]
    done.clear()
    log = Log(tmp_path)
    log.write({"step": 1})
    log.flush()
    assert done == ["log.jsonl"]


def test_killed_at_every_file_operation_of_a_checkpoint(tmp_path):
    """SIGKILL at the first, second, ... operation: the newest is always whole, and old or new."""
    old, new = {"step": 2}, {"step": 3}
    reached = set()
    for event in range(1000):
        out = tmp_path / str(event)
        out.mkdir()
        for step in (1, 2):
            checkpoint.write(out, step, GROUPS, {"step": step})

        def work(event=event, out=out):
            die_at(event, out)
            checkpoint.write(out, 3, GROUPS, new)

        code = in_a_child(work)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torn is for disks; a kill tears nothing
            groups, facts = content(checkpoint.newest(out))
        assert facts in (old, new) and groups["student"]["a"] == list(range(6))
        reached.add(facts["step"])
        assert not list((out / "checkpoints").glob("*.partial")), "the next start cleans up"
        checkpoint.write(out, 3, GROUPS, new)
        assert content(checkpoint.newest(out))[1] == new
        assert len(list((out / "checkpoints").iterdir())) == 2
        shutil.rmtree(out)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and event > 10 and reached == {2, 3}


def test_killed_at_every_file_operation_of_the_result(tmp_path):
    """The student in its place is the old one, the new one or, for a moment, in no place yet: the
    run is not done then, and its next start puts it there."""
    def fill(text):
        def write(folder):
            folder.mkdir()
            (folder / "model").write_text(text)
            (folder / "config").write_text(text)
        return write

    for event in range(1000):
        out = tmp_path / str(event)
        out.mkdir()
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (out / "student.partial").symlink_to(tmp_path / "elsewhere")
        checkpoint.replace_folder(out, "student", fill("old"))
        assert not list((tmp_path / "elsewhere").iterdir())

        def work(event=event, out=out):
            die_at(event, out)
            checkpoint.replace_folder(out, "student", fill("new"))

        code = in_a_child(work)
        if (out / "student").exists():
            texts = {path.read_text() for path in (out / "student").iterdir()}
            assert len(texts) == 1 and len(list((out / "student").iterdir())) == 2
        checkpoint.replace_folder(out, "student", fill("again"))
        assert [p.name for p in out.iterdir()] == ["student"]
        assert (out / "student" / "model").read_text() == "again"
        if code == 0:
            break
    assert code == 0 and event > 5 and texts == {"new"}


@pytest.mark.parametrize("limit", [0, 50, 150, 1000])
def test_a_full_disk_leaves_the_last_checkpoint(limit, tmp_path):
    """No file may grow beyond `limit` bytes in the child: weights, facts or checksums fail."""
    groups = GROUPS | {"student": {"a": torch.arange(1000.0)}}
    checkpoint.write(tmp_path, 1, groups, {"step": 1})

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            checkpoint.write(tmp_path, 2, groups, {"step": 2})
        except OSError as error:
            text = str(error)
            assert "cannot be written: File too large" in text, text
            assert "checkpoints/step-00000002" in text, text
            os._exit(7)

    assert in_a_child(work) == 7
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert content(checkpoint.newest(tmp_path))[1] == {"step": 1}


def write_log(out):
    log = Log(out)
    try:
        for number in range(1000):
            log.write({"number": number})
    finally:
        log.close()


WRITERS = {
    "log.jsonl": write_log,
    "config.json": lambda out: checkpoint.write_json(out / "config.json", {"x": "y" * 5000}),
    "faults/a": lambda out: checkpoint.write_fault(out, "a", {"x": torch.arange(5000)}),
    "student": lambda out: checkpoint.replace_folder(
        out, "student", lambda folder: tiny_model("qwen3").save_pretrained(folder)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_whatever_does_not_fit_is_named(name, tmp_path):
    """Neither an open file nor safetensors names its path when the disk is full."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "old").write_text("result")

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            WRITERS[name](tmp_path)
        except OSError as error:
            assert str(error).endswith(f"cannot be written: File too large: '{tmp_path / name}'")
            os._exit(7)

    assert in_a_child(work) == 7
    assert (tmp_path / "student" / "old").read_text() == "result"


# ------------------------------------------------------------------------------ folder and config
def test_links_inside_a_run_are_refused(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    checkpoint.write_json(out / "config.json", {"flags": {}})
    checkpoint.check_folder(out, resume=True)
    for name in checkpoint.INSIDE[1:]:
        (out / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"{name} is a link"):
            checkpoint.check_folder(out, resume=True)
        (out / name).unlink()
    (tmp_path / "link").symlink_to(out)  # the folder itself may be one
    checkpoint.check_folder(tmp_path / "link", resume=True)


def test_a_config_is_whole_and_says_what_changed(tmp_path):
    assert checkpoint.read_config(tmp_path) is None
    checkpoint.write_json(tmp_path / "config.json", {"flags": {"lr": 0.1, "toy": "fork"}})
    config = checkpoint.read_config(tmp_path)
    assert checkpoint.changed_flags(config, {"lr": 0.1, "toy": "fork"}) == []
    assert checkpoint.changed_flags(config, {"lr": 0.2, "toy": "fork"}) == ["--lr 0.1, now 0.2"]
    assert checkpoint.changed_flags(config, {"lr": 0.2, "toy": "fork"}, ("lr",)) == []
    assert checkpoint.changed_flags(config, {"lr": 0.1}) == ["--toy fork, now None"]
    for text in ("", "{", "[]", '{"flags": 3}', "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="config.json"):
            checkpoint.read_config(tmp_path)


def test_what_an_interrupted_start_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "config.json.partial").write_text("{")
    checkpoint.check_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="not a run"):
        checkpoint.check_folder(tmp_path)


def test_a_log_goes_on_where_it_was_and_loses_nothing(tmp_path):
    log = Log(tmp_path)
    kept = log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": float("nan"), "deep": {"x": [1.0, float("-inf")]}})
    log.flush()
    log.close()
    whole = (tmp_path / "log.jsonl").read_bytes()
    assert json.loads(whole.splitlines()[1]) == {"step": 2, "loss": None, "deep": {"x": [1, None]}}
    (tmp_path / "log.jsonl").write_bytes(whole + b'{"step": 3, "lo')  # killed while writing
    log = Log(tmp_path, kept)
    assert log.lines == [{"step": 1, "loss": 0.5}]
    assert log.write({"step": 2}) == len((tmp_path / "log.jsonl").read_bytes())
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes() == whole[:kept] + b'{"step": 2}\n'
    assert (tmp_path / "log.dropped.jsonl").read_bytes() == whole[kept:] + b'{"step": 3, "lo'
    with pytest.raises(ValueError, match="log.jsonl has .* bytes; it had 10000 when"):
        Log(tmp_path, 10_000)


# -------------------------------------------------------------------------------- when to stop
@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_at_once_but_waits_while_held(number, code):
    before = signal.getsignal(number)
    signals = Interruptions()
    with pytest.raises(Stop, match=signal.Signals(number).name) as stop, signals:
        os.kill(os.getpid(), number)
        pytest.fail("it should have stopped")
    assert stop.value.exit_code == code and not isinstance(stop.value, Exception)
    assert signal.getsignal(number) == before

    signals, done = Interruptions(), []
    with pytest.raises(Stop), signals:
        signals.hold()
        os.kill(os.getpid(), number)
        done.append("held")
        os.kill(os.getpid(), signal.SIGTERM)  # not the first: ignored
        signals.release()
        done.append("not reached")
    assert done == ["held"] and signals.number == number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interruptions() as signals:
            os.kill(os.getpid(), number)
        assert signals.number is None
    finally:
        signal.signal(number, before)


def test_a_swallowed_stop_is_raised_again_at_the_next_release():
    with pytest.raises(Stop), Interruptions() as signals:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            pass  # as in a destructor
        signals.hold()
        signals.release()


def test_the_first_fault_is_everybodys(tmp_path):
    assert checkpoint.first_fault(tmp_path, "rank 1: no memory") == "rank 1: no memory"
    assert checkpoint.first_fault(tmp_path, "rank 0: lost contact") == "rank 1: no memory"
    (tmp_path / "faults" / "first.txt").unlink()
    assert checkpoint.first_fault(tmp_path, "rank 0: another") == "rank 0: another"
    assert checkpoint.first_fault(tmp_path / "no" / "run", "x") == "x"
