"""Properties of the public names of checkpoint."""

import json
import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from properties import NAN, prop, seeded, seeds

from harness import checkpoint
from harness.log import Log, read_log
from harness.processes import raise_on_all_ranks
from harness.signals import STOPS, Interruptions, Stop, Stream

# ---------------------------------------------------------------------------------- a run's folder
names = st.text("abcdefgh_", min_size=1, max_size=5)
plain = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5) | st.floats(
    allow_nan=False, allow_infinity=False)
any_line = st.dictionaries(names, plain | st.lists(plain, max_size=3) | st.just(NAN), max_size=4)


@prop("harness.write_json", "harness.read_config", "harness.changed_flags", examples=60,
      flags=st.dictionaries(names, plain), other=st.dictionaries(names, plain))
def test_a_config_comes_back_and_knows_every_difference(flags, other):
    with tempfile.TemporaryDirectory() as folder:
        assert checkpoint.read_config(Path(folder)) is None
        checkpoint.write_json(Path(folder, "config.json"), {"flags": flags})
        config = checkpoint.read_config(Path(folder))
        assert config == {"flags": flags} and os.listdir(folder) == ["config.json"]
    assert checkpoint.changed_flags(config, flags) == []
    assert checkpoint.changed_flags(config, other, [*flags, *other]) == []
    differ = [k for k in {**flags, **other} if flags.get(k) != other.get(k)]
    assert len(checkpoint.changed_flags(config, other)) == len(differ)


@prop("harness.Log", "harness.read_log", "harness.lock", "harness.name_the_path", examples=60,
      lines=st.lists(any_line, max_size=5), more=st.lists(any_line, max_size=3),
      keep=st.integers(0, 5), torn=st.binary(max_size=5))
def test_a_log_is_cut_at_any_line_and_keeps_the_rest_beside_it(lines, more, keep, torn):
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "log.jsonl"), Log(Path(folder))
        sizes = [0, *[log.write(line) for line in lines]]
        log.close()
        whole = path.read_bytes()
        path.write_bytes(whole + torn)
        cut = sizes[min(keep, len(lines))]
        log = Log(Path(folder), cut)
        assert len(log.lines) == min(keep, len(lines))
        for line in more:
            log.write(line)
        log.flush()
        log.close()
        assert path.read_bytes()[:cut] == whole[:cut]
        for text in path.read_text().splitlines():
            assert isinstance(json.loads(text, parse_constant=pytest.fail), dict)
        dropped = path.with_name("log.dropped.jsonl")
        assert (dropped.read_bytes() if dropped.exists() else b"") == (whole + torn)[cut:]
        size = path.stat().st_size
        with pytest.raises(ValueError, match=f"log.jsonl has {size} bytes"):
            read_log(Path(folder), size + 1)


@prop("harness.write", "harness.newest", "harness.last_written", "harness.step_of",
      "harness.what_is_torn", "harness.read", "harness.survey", examples=60,
      steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=5, unique=True).map(sorted),
      keep=st.integers(1, 3), seed=seeds, place=st.floats(0, 1, exclude_max=True),
      name=st.sampled_from(["student.safetensors", "facts.json", "checksums.json"]))
def test_any_flipped_bit_is_noticed(steps, keep, seed, place, name):
    """The newest whole one is found, and no other: one bit of one file makes it torn."""
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            tensor = torch.rand(7, generator=seeded(step))
            path = checkpoint.write(folder, step, {"student": {"x": tensor}}, {"step": step}, keep)
            assert checkpoint.newest(folder) == checkpoint.last_written(folder) == path
        kept = sorted(map(checkpoint.step_of, Path(folder, "checkpoints").iterdir()))
        assert kept == steps[-keep:] and checkpoint.what_is_torn(path) == ""
        found = checkpoint.read(path)
        assert found.facts == {"step": steps[-1]}
        assert torch.equal(found.groups["student"]["x"], tensor)
        data = bytearray((path / name).read_bytes())
        data[int(place * len(data))] ^= 1 << seed % 8
        (path / name).write_bytes(data)
        if name == "checksums.json" and not checkpoint.what_is_torn(path):
            return  # a blank became another blank
        with pytest.warns(UserWarning, match="torn"):
            assert checkpoint.survey(folder)[1] == [path] and path.exists()
            left = checkpoint.newest(folder)
        assert (left and checkpoint.step_of(left)) == (kept[-2] if len(kept) > 1 else None)


@prop("harness.capture", "harness.restore", "harness.random_state",
      "harness.set_random_state", examples=40, seed=seeds, lr=st.floats(1e-6, 1),
      betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), kind=st.sampled_from(
          [torch.optim.AdamW, torch.optim.Adam]), before=st.integers(0, 3))
def test_any_optimizer_goes_on_bit_for_bit(seed, lr, betas, kind, before):
    """Through the file and back, with other settings in the objects that it is put into."""
    def build(lr, betas):
        model = torch.nn.Linear(3, 2)
        optimizer = kind(model.parameters(), lr=lr, betas=betas)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))

    def train_on(objects, steps):
        for _ in range(steps):
            objects[0](torch.randn(4, 3)).square().sum().backward()
            objects[1].step(), objects[2].step(), objects[1].zero_grad()

    torch.manual_seed(seed)
    one, two = build(lr, betas), build(0.1, (0.5, 0.5))
    train_on(one, before)
    groups, facts = checkpoint.capture(*one)
    with tempfile.TemporaryDirectory() as folder:
        facts["random"] = checkpoint.random_state()
        found = checkpoint.read(checkpoint.write(folder, before, groups, facts))
    train_on(one, 3)
    checkpoint.restore(found, *two)
    checkpoint.set_random_state(found.facts["random"])
    train_on(two, 3)
    assert torch.equal(one[0].weight, two[0].weight) and torch.equal(one[0].bias, two[0].bias)
    assert one[2].get_last_lr() == two[2].get_last_lr()


@prop("harness.Stream", examples=20, texts=st.lists(st.text("ab\n", min_size=1), min_size=1))
def test_a_stream_that_fails_ends_nothing(texts):
    with tempfile.NamedTemporaryFile("w+") as good, open("/dev/full", "w") as full:
        for text in texts:
            Stream(good).write(text)
            Stream(full).write(text)
        full.flush()  # into nothing
        assert Path(good.name).read_text() == "".join(texts)


@prop("harness.Interruptions", "harness.Stop", examples=60,
      events=st.lists(st.sampled_from(["hold", "release", *sorted(STOPS)]), max_size=8))
def test_a_stop_is_raised_once_at_the_first_moment_that_is_not_held(events):
    held, waiting, expected = False, None, None
    for number, event in enumerate(events):
        held = event == "hold" or held and event != "release"
        waiting = waiting or (event if event.startswith("SIG") else None)
        if waiting and not held:
            expected = number, waiting
            break
    reached = -1
    try:
        with Interruptions() as signals:
            for reached, event in enumerate(events):  # noqa: B007
                if event.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, event))
                else:
                    getattr(signals, event)()
    except Stop as stop:
        assert (reached, str(stop)) == expected
        assert stop.exit_code == {"SIGTERM": 0, "SIGINT": 130, "SIGHUP": 129}[str(stop)]
    else:
        assert expected is None


@prop("harness.write_fault", "harness.first_fault",
      "harness.replace_folder", "harness.raise_on_all_ranks", examples=30,
      texts=st.lists(st.text("abc: ", min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_the_first_error_is_kept_and_results_are_replaced_whole(texts):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for text in texts:
            assert checkpoint.first_fault(out, text).strip() == texts[0].strip()
            checkpoint.replace_folder(out, "student", lambda f, t=text: (
                f.mkdir(), (f / "x").write_text(t)))
            assert (out / "student" / "x").read_text() == text
        (out / "faults" / "first.txt").unlink()
        assert checkpoint.first_fault(out, "new") == "new"
        path = checkpoint.write_fault(out, "a.safetensors", {"x": torch.arange(3)[::2]})
        assert path.parent == out / "faults" and sorted(os.listdir(out)) == ["faults", "student"]

    def work():
        raise OSError(texts[0])

    raise_on_all_ranks(lambda: texts)  # alone: the same but for the error's type
    with pytest.raises(ValueError, match=re.escape(texts[0])):
        raise_on_all_ranks(work)
