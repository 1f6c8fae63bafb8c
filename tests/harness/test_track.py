"""Looking at a run: --track sends what log.jsonl has, each step once; harness.plot draws it."""

import importlib.machinery
import json
import sys
import types

import pytest

import train
from harness import plot, track

SMALL = "--prompts-per-step 4 --eval-count 2 --eval-samples 1 --difficulty 2".split()


def run(out, *flags):
    """The real command in this process; its exit code."""
    try:
        train.main([*SMALL, "--out", str(out), *map(str, flags)])
    except SystemExit as left:
        return left.code
    return 0


def lines_of(out):
    return [json.loads(text) for text in open(out / "log.jsonl")]


def install(monkeypatch, name, module_name=None, **content):
    """A package that holds `content`."""
    for each in {name, module_name or name}:
        module = types.ModuleType(each)
        module.__spec__ = importlib.machinery.ModuleSpec(each, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, each, module)


class SummaryWriter:
    """Events in a file of the folder, as TensorBoard has them."""

    def __init__(self, folder):
        folder.mkdir(exist_ok=True)
        self.file = open(folder / "events", "a")  # noqa: SIM115

    def add_scalar(self, name, value, step):
        self.file.write(json.dumps([name, value, step]) + "\n")

    def flush(self):
        self.file.flush()


def numbers_of(lines):
    return sorted([name, value, x["step"]] for x in lines for name, value in track.named(x).items())


def test_tensorboard_has_every_number_of_the_log_once_also_after_a_resume(tmp_path, monkeypatch):
    install(monkeypatch, "tensorboard", "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    out = tmp_path / "run"
    assert run(out, "--steps", 2) == 0  # without: the flag may come later
    assert not (out / "tensorboard").exists()
    for steps in (3, 4):
        assert run(out, "--steps", steps, "--track", "tensorboard", "--resume") == 0
    events = [json.loads(text) for text in open(out / "tensorboard" / "events")]
    assert sorted(events) == numbers_of(lines_of(out))
    assert ["train/fidelity/3", lines_of(out)[1]["fidelity"][3], 1] in events
    assert run(out, "--steps", 4, "--resume") == 0  # and go again


def test_wandb_is_told_the_run_it_goes_on_with(tmp_path, monkeypatch):
    runs = {}

    class Run:
        def __init__(self, id, **how):
            self.steps = runs.setdefault(id, {})
            self.how = how

        def log(self, numbers, step):
            if step >= max(self.steps, default=0):  # else it is dropped
                self.steps[step] = self.steps.get(step, {}) | numbers

    install(monkeypatch, "wandb", init=Run)
    out = tmp_path / "run"
    for steps in (2, 4):
        assert run(out, "--steps", steps, "--track", "wandb", "--resume") == 0
    (found,) = runs.values()
    wanted = {}
    for line in lines_of(out):
        wanted[line["step"]] = wanted.get(line["step"], {}) | track.named(line)
    assert found.keys() == wanted.keys()
    for step, numbers in wanted.items():  # wandb keeps the evaluation after what was the last step
        assert found[step].items() >= numbers.items()
    assert found[4] == wanted[4]


@pytest.mark.parametrize("at", ["begin", "send"])
def test_a_tracker_that_fails_is_told_once_and_changes_nothing(at, tmp_path, monkeypatch, capsys):
    class Broken(SummaryWriter):
        def __init__(self, folder):
            if at == "begin":
                raise OSError("no space left")

        def add_scalar(self, name, value, step):
            raise OSError("no space left")

    install(monkeypatch, "tensorboard", "torch.utils.tensorboard", SummaryWriter=Broken)
    assert run(tmp_path / "with", "--steps", 2, "--track", "tensorboard") == 0
    said = "--track tensorboard ends here: OSError: no space left"
    assert capsys.readouterr().err.count(said) == 1
    assert run(tmp_path / "without", "--steps", 2) == 0
    pairs = zip(lines_of(tmp_path / "with"), lines_of(tmp_path / "without"), strict=True)
    times = {"seconds", "tokens_per_second"}
    assert all({k: a[k] for k in a.keys() - times} == {k: b[k] for k in b.keys() - times}
               for a, b in pairs)  # fmt: skip


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_anything_is_made(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path / "run", "--steps", 2, "--track", kind) == 2
    said = capsys.readouterr().err
    assert said == f"train.py: error: --track {kind}: pip install {kind}\n"
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("plot") / "run"
    assert run(out, "--steps", 3) == 0
    return out


def test_the_figure_holds_the_numbers_of_the_log(finished):
    pytest.importorskip("matplotlib")
    lines = plot.read(finished)
    assert lines == lines_of(finished)
    figure = plot.draw({"a": lines, "b": lines[:-2]})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert plot.PANELS["flat_groups"] not in panels  # no lookahead, so none
    for name, rows in (("reverse_kl", lines), ("accuracy", lines)):
        a, _ = panels[plot.PANELS[name]].get_lines()
        rows = [x for x in rows if name in x]
        assert len(rows) == {"reverse_kl": 3, "accuracy": 2}[name]
        assert a.get_xdata().tolist() == [x["step"] for x in rows]
        assert a.get_ydata().tolist() == [x[name] for x in rows]
    last, first = panels[plot.PANELS["fidelity"]].get_lines()[:2]
    assert first.get_ydata().tolist() == [x["fidelity"][0] for x in lines if "fidelity" in x]
    assert last.get_ydata().tolist() == [x["fidelity"][3] for x in lines if "fidelity" in x]


def test_a_run_that_is_still_writing_is_drawn_to_its_last_whole_line(finished, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "going"
    out.mkdir()
    for name in ("config.json", "log.jsonl"):
        (out / name).write_bytes((finished / name).read_bytes())
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 4, "los')
    assert plot.main([str(out), str(finished), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(out), "--out", str(tmp_path / "a.png")]) == 2  # nothing is overwritten
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage, names",
    [(lambda out: (out / "log.jsonl").unlink(), "not the folder of a run"),
     (lambda out: (out / "log.jsonl").write_text("[1]\n"), "log.jsonl:1: not a line of a run"),
     (lambda out: (out / "log.jsonl").write_text(""), "log.jsonl: no lines yet"),
     (lambda out: (out / "config.json").write_text("{}"), "config.json: is not a run's config"),
     (lambda out: (out / "config.json").unlink(), "not the folder of a run")],
)  # fmt: skip
def test_what_is_no_run_is_named(damage, names, finished, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "log.jsonl"):
        (out / name).write_bytes((finished / name).read_bytes())
    damage(out)
    assert plot.main([str(out), "--out", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert names in said and said.count("\n") == 1 and not (tmp_path / "a.png").exists()


def test_without_matplotlib_it_says_so(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.main([str(finished), "--out", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == "plot: error: needs matplotlib: pip install matplotlib\n"
