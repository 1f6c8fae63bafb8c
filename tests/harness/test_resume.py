"""Runs that are stopped, killed, resumed, starved or fed nonsense: the real commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import write_model
from runs import read_log
from safetensors.torch import load_file

import train
from benchmarks import soak
from harness import checkpoint, pair
from harness.log import Log

ROOT = Path(train.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FLAGS = (
    "--difficulty 4 --steps 6 --prompts-per-step 6 --eval-every 3 --eval-count 4 --eval-samples 2 "
    "--checkpoint-every 2 --threads 1"
).split()
FEW = """
toy_problems = train.harness.pair.toy.problems
train.harness.pair.toy.problems = lambda count, **how: toy_problems(min(count, 64), **how)
"""  # a second less per run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    place = tmp_path_factory.mktemp("whole")
    run(cwd=place)
    return place / "run"


def run(*flags, cwd, code="", fails=False, out="run"):
    """`train.py` with FLAGS, these flags and, before it begins, some code that sees `train`."""
    return forked.run([*FLAGS, "--out", out, *flags], cwd, FEW + textwrap.dedent(code), fails)


def start_ranks(code, cwd, *flags, out="run"):
    """The same in two processes."""
    return forked.start_ranks([*FLAGS, "--out", out, *flags], cwd, FEW + textwrap.dedent(code))


def ranks(code, cwd, *flags, out="run"):
    """Both of them to their end: [(exit code, stderr)]."""
    done = forked.finish_all(start_ranks(code, cwd, *flags, out=out), 120)
    return [(one.returncode, one.stderr) for one in done]


def assert_same(run, reference):
    """Log but for its times, weights and optimizer, bit for bit."""
    assert soak.lines_of(run) == soak.lines_of(reference)
    assert soak.differences(run, reference) == []


# ------------------------------------------------------------------------------------ told to stop
def test_another_seed_is_another_run(whole, tmp_path):
    """The same seed is not: most tests below show that."""
    run("--seed", "1", "--steps", "1", cwd=tmp_path)
    assert soak.lines_of(tmp_path / "run")[1]["loss"] != soak.lines_of(whole)[1]["loss"]


STOP_AT = """
import os, signal
def stop(*_, calls=[0]):
    calls[0] += 1
    if calls[0] == {call}:
        os.kill(os.getpid(), signal.{name})
old = {where}
def new(*args, **options):
    {before}
    result = old(*args, **options)
    {after}
    return result
{where} = new
"""


@pytest.mark.parametrize(
    "where, call, name",
    [
        ("train.sample", 2, "SIGTERM"),
        ("train.evaluate.sample_answers", 2, "SIGINT"),
        ("train.score", 1, "SIGTERM"),
        ("train.update", 4, "SIGHUP"),
        ("after train.torch.optim.AdamW.step", 4, "SIGTERM"),  # ahead of the log: it waits
        ("after train.harness.log.Log.write", 5, "SIGTERM"),  # the position is not noted yet: waits
        ("train.harness.checkpoint.write", 1, "SIGINT"),  # so does it while a checkpoint is written
        # behind three checkpoints the student: too late, the run is done
        ("train.harness.checkpoint.replace_folder", 4, "SIGTERM"),
    ],
)
def test_a_signal_writes_a_checkpoint_and_resume_goes_on(where, call, name, whole, tmp_path):
    after = where.startswith("after ")
    where = where.removeprefix("after ")
    code = STOP_AT.format(where=where, call=call, name=name, before="pass" if after else "stop()",
                          after="stop()" if after else "pass")  # fmt: skip
    done = run(cwd=tmp_path, code=code, fails=name != "SIGTERM")
    assert done.returncode == {"SIGTERM": 0, "SIGINT": 130, "SIGHUP": 129}[name]
    finished = (tmp_path / "run" / "student").exists()
    assert finished == (where == "train.harness.checkpoint.replace_folder")
    last = done.stderr.replace("\r", "\n").strip().splitlines()
    assert "Traceback" not in done.stderr
    if not finished:
        assert any(f"stopped by {name}; run/checkpoints/step-" in line for line in last)
        assert "student" not in done.stdout
        done = run("--resume", cwd=tmp_path)
        assert "resuming from run/checkpoints/step-" in done.stderr
    assert_same(tmp_path / "run", whole)


def test_two_processes_stop_and_resume(tmp_path):
    """torchrun forwards the signal to both; the checkpoint holds random numbers of both."""
    more = ("--steps", "12", "--eval-every", "0", "--resume")
    with open(tmp_path / "output.txt", "w") as output:
        command = [*TORCHRUN, ROOT / "train.py", *FLAGS, *more, "--out", "run"]
        process = subprocess.Popen([str(c) for c in command], cwd=tmp_path, stderr=output,
                                   start_new_session=True)  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size > 900):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert "stopped by SIGTERM" in (tmp_path / "output.txt").read_text()
    assert not (tmp_path / "run" / "student").exists()
    path = checkpoint.newest(tmp_path / "run")
    assert len(checkpoint.read(path).facts["position"]["random"]) == 2
    for name in ("whole", "run"):
        started = forked.start_ranks([*FLAGS, *more, "--out", name], tmp_path)
        assert {one.returncode for one in forked.finish_all(started, 120)} == {0}
    assert_same(tmp_path / "run", tmp_path / "whole")


NOISY = """
import os, random
import numpy as np
import torch
import torch.distributed as dist
rank = int(os.environ.get("RANK", 0))
torch.manual_seed(rank), random.seed(rank), np.random.seed(rank)
old = train.harness.log.log_line
def log_line(*args):
    noise = [[torch.rand(()).item(), random.random(), np.random.rand()]]
    if dist.is_initialized():
        noise = [None] * 2
        mine = [torch.rand(()).item(), random.random(), np.random.rand()]
        dist.all_gather_object(noise, mine)
    return old(*args) | {"noise": noise}
train.harness.log.log_line = log_line
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_every_process_gets_its_random_numbers_back(processes, tmp_path):
    """Nothing here draws from the global generators, but a model's own code might: with numbers
    from all three of them in the log, a resumed run writes the log of a whole one."""
    for out, flags in (("whole", ()), ("run", ("--steps", "2")), ("run", ("--resume",))):
        if processes == 1:
            run(*flags, cwd=tmp_path, code=NOISY, out=out)
        else:
            assert {code for code, _ in ranks(NOISY, tmp_path, *flags, out=out)} == {0}
    assert_same(tmp_path / "run", tmp_path / "whole")
    noise = [line["noise"] for line in read_log(tmp_path / "whole")[0]]
    assert len(noise[0]) == processes and len({str(x) for x in noise}) == 6


# ------------------------------------------------------------------------------------------ resume
def test_resume_in_place_of_a_start_and_after_the_end(whole, tmp_path):
    """Nothing there: it begins. A finished run: nothing changes. More steps: as if from the start,
    and the last evaluation of the shorter run is kept beside the log."""
    run("--resume", cwd=tmp_path)
    assert_same(tmp_path / "run", whole)
    run("--resume", cwd=tmp_path)
    assert_same(tmp_path / "run", whole)
    run("--resume", "--steps", "8", cwd=tmp_path)
    run("--steps", "8", cwd=tmp_path, out="longer")
    assert_same(tmp_path / "run", tmp_path / "longer")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [entry["step"] for entry in config["resumed"]] == [6, 6]
    assert config["flags"]["steps"] == 8
    assert '"ood"' in (tmp_path / "run" / "log.dropped.jsonl").read_text()


def test_a_torn_checkpoint_costs_two_steps_and_no_more(whole, tmp_path):
    run(cwd=tmp_path)
    for file in (tmp_path / "run" / "checkpoints" / "step-00000006").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = run("--resume", cwd=tmp_path)
    assert "step-00000006 is torn" in done.stderr and "resuming from run/checkpoints/step-00000004"
    assert_same(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a run on a file of problems, and the command that wrote it."""
    place = tmp_path_factory.mktemp("begun")
    problem = {"problem": "The dial starts at 3. Move 1 is plus 2. Where does it stop?"}
    (place / "p.jsonl").write_text("\n".join([json.dumps(problem)] * 3))
    command = [*FLAGS, "--out", "run", "--problems", "p.jsonl", "--max-new-tokens", "40"]
    forked.run(command, place)
    return place, command


REFUSED = {
    "--lr 0.1": "other flags: --lr 0.001, now 0.1",
    "--method opd --seed 3": "--method release, now opd; --mask release, now none; --seed 0, now 3",
    "--steps 3": "--steps 3: run/checkpoints/step-00000006 is of a later step",
}


@pytest.mark.parametrize("flags", [*REFUSED, "problems", "config", "link", "log"])
def test_resume_refuses_in_one_line(begun, flags, tmp_path, monkeypatch, capsys):
    """Other flags, other problems, a broken folder: named before weights are loaded, and nothing
    is touched."""
    place, command = begun
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(pair, "load_models", None)  # not reached
    run, culprit = Path("run"), REFUSED.get(flags, "")
    if flags == "problems":
        Path("p.jsonl").write_text(Path("p.jsonl").read_text() + '\n{"problem": "?"}')
        culprit = "run is a run on other problems"
    elif flags == "config":
        (run / "config.json").write_text("{")
        culprit = "run/config.json: "
    elif flags == "link":
        (run / "student").rename("elsewhere")
        (run / "student").symlink_to(Path("elsewhere").absolute())
        culprit = "student is a link"
    elif flags == "log":
        (run / "log.jsonl").write_text("")
        culprit = "run/log.jsonl has 0 bytes"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as left:
        train.main([*command, "--resume", *(flags.split() if flags in REFUSED else ())])
    message = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(message) == 1 and culprit in message[0], message
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_flag_that_came_after_the_run_began_may_be_left_out(begun, tmp_path):
    """Where its default is what runs did before; else it must be given, and is named."""
    place, command = begun
    shutil.copytree(place, tmp_path / "copy")
    path = tmp_path / "copy" / "run" / "config.json"
    config = json.loads(path.read_text())
    for name in ("lora_rank", "stop_class", "steps"):
        del config["flags"][name]
    path.write_text(json.dumps(config))
    command = [*command, "--resume", "--steps", "7"]
    for flags, culprit in (
        (["--lora-rank", "4", "--stop-class", "off"], "other flags: --lora-rank 0, now 4"),
        ([], "other flags: --stop-class off, now on"),
    ):
        done = forked.run([*command, *flags], tmp_path / "copy", fails=True)
        assert culprit in done.stderr
    done = forked.run([*command, "--stop-class", "off"], tmp_path / "copy")
    assert "resuming from" in done.stderr
    assert json.loads(path.read_text())["flags"]["lora_rank"] == 0


def test_another_number_of_processes_goes_on_and_says_so(whole, tmp_path):
    """Four steps of one process, then two of two: the same samples, so nearly the same log."""
    run("--steps", "4", cwd=tmp_path)
    (code, said), (other, _) = ranks("", tmp_path, "--resume")
    assert code == other == 0 and "processes 1, now 2: the run may go on otherwise" in said
    (one, one_eval), (two, two_eval) = read_log(whole), read_log(tmp_path / "run")
    for a, b in zip(one, two, strict=True):
        assert a["kept_tokens"] == b["kept_tokens"] and abs(a["loss"] - b["loss"]) < 1e-3
    assert [x["accuracy"] for x in one_eval] == [x["accuracy"] for x in two_eval]


# ------------------------------------------------------------------------------------------ faults
NONSENSE = """
old, calls = train.score, [0]
def score(*args, **options):
    scores = old(*args, **options)
    calls[0] += 1
    if calls[0] in {steps}:
        scores.{field}[1] = {value}
    return scores
train.score = score
"""


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_step_that_is_not_finite_is_skipped_logged_and_counted(value, tmp_path):
    """The weights and the warm-up stay where they were; the run goes on."""
    code = NONSENSE.format(steps=[2, 4, 5], field="logp_BT", value=value)
    flags = ("--max-skipped-steps", "3", "--advantage-clip", "0", "--clip-grad", "0")
    done = run(*flags, cwd=tmp_path, code=code)
    assert "3 steps were skipped: loss or gradient was not finite" in done.stdout
    lines, _ = read_log(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 0, 1, 1, 0]
    assert lines[1]["loss"] is None and lines[2]["loss"] is not None
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text  # JSON has neither
    facts = checkpoint.read(checkpoint.newest(tmp_path / "run")).facts
    assert facts["position"]["skipped"] == 0 and facts["scheduler"]["last_epoch"] == 3


@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_such_steps_in_a_row_end_the_run_with_the_batch(processes, tmp_path):
    """The error names step and rollouts, the rows are saved, and a resumed run counts on."""
    code = NONSENSE.format(steps=[3, 4, 5], field="logp_BT", value="float('nan')")
    if processes == 1:
        done = run("--max-skipped-steps", "3", cwd=tmp_path, code=code, fails=True)
        results = [(done.returncode, done.stderr)]
    else:
        code = "import os\nif os.environ['RANK'] == '1':\n" + textwrap.indent(code, "    ")
        results = ranks(code, tmp_path, "--max-skipped-steps", "3")
    row = 1 if processes == 1 else 4  # the second of each process's
    for exit_code, stderr in results:
        assert exit_code == 1 and "Traceback" not in stderr, stderr
        last = stderr.strip().splitlines()[-1]
        assert f"step 5: loss nan, gradient norm nan, the last of 3 such steps in a row; rollouts "\
            f"{row} (problem " in stderr, last  # fmt: skip
    saved = load_file(tmp_path / "run" / "faults" / f"step-5-rank{processes - 1}.safetensors")
    assert saved["rollout_B"][1] == row and saved["teacher_logp_BT"][1].isnan().any()
    assert saved["ids_BT"].shape == saved["advantage_BT"].shape == saved["keep_BT"].shape
    assert not (tmp_path / "run" / "student").exists()
    facts = checkpoint.read(checkpoint.newest(tmp_path / "run")).facts
    assert facts["position"]["step"] == 4 and facts["position"]["skipped"] == 2
    if processes == 1:  # the teacher has been mended
        run("--max-skipped-steps", "3", "--resume", cwd=tmp_path)
        assert [line["skipped"] for line in read_log(tmp_path / "run")[0]] == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("signal_name", ["candidates", "spread"])
def test_a_teacher_that_breaks_down_is_skipped_too(signal_name, tmp_path):
    """The mask must not stumble over what the loss will find."""
    code = """
    old, calls = train.logprobs.token_stats, [0]
    def token_stats(*args, **options):
        stats = old(*args, **options)
        calls[0] += 1
        if calls[0] == 2:
            stats.logp_BT[0] = float("nan")
            if stats.candidate_logp_BTK is not None:
                stats.candidate_logp_BTK[0] = float("nan")
        return stats
    train.logprobs.token_stats = token_stats
    """
    method = ["--method", "release"] if signal_name == "candidates" else ["--method", "std"]
    run(*method, "--steps", "3", cwd=tmp_path, code=code)
    assert [line["skipped"] for line in read_log(tmp_path / "run")[0]] == [0, 1, 0]


def test_a_rank_that_fails_ends_the_others_with_its_error(tmp_path):
    code = """
    import os
    def update(*args, **options):
        raise MemoryError("rank 1 is out of it")
    if os.environ["RANK"] == "1":
        train.update = update
    """
    (code_0, first), (code_1, second) = ranks(code, tmp_path, "--method", "opd")
    assert code_0 == code_1 == 1
    assert "Traceback" in second and "error: rank 1: MemoryError: rank 1 is out of it" in second
    assert "rank 0 ends because of rank 1: MemoryError: rank 1 is out of it" in first
    assert "Traceback" not in first


@pytest.mark.parametrize("fate", ["os._exit(9)", "os.kill(os.getpid(), 9)", "time.sleep(600)"])
def test_a_rank_that_dies_or_hangs_ends_the_others_in_time(fate, tmp_path):
    """It can say nothing; the other notices by itself, and leaves a checkpoint. (At the first
    update of step 3; the third line of the log is not written.)"""
    code = f"""
    import os, time
    old, calls = train.update, [0]
    def update(*args, **options):
        calls[0] += 1
        if calls[0] == 3:
            {fate}
        return old(*args, **options)
    if os.environ["RANK"] == "1":
        train.update = update
    """
    flags = ("--method", "opd", "--timeout", "8", "--checkpoint-every", "0")
    first, second = start_ranks(code, tmp_path, *flags)
    done = forked.finish(*first, 120)  # a hang would be killed, and have another exit code
    forked.finish(*second, 0)
    assert done.returncode == 1 and "rank 0: lost contact with another process" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run")) == 2
    assert len(read_log(tmp_path / "run")[0]) == 2



def test_bad_input_that_only_one_rank_has_is_said_by_rank_0(tmp_path):
    code = """
    import os
    def load_models(*args):
        raise ValueError("cannot see /data/teacher")
    if os.environ["RANK"] == "1":
        train.harness.pair.load_models = load_models
    """
    (code_0, first), (code_1, second) = ranks(code, tmp_path)
    assert code_0 == code_1 == 2
    assert first.strip() == "train.py: error: rank 1: cannot see /data/teacher" and not second
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("full", ["log.jsonl", "checkpoint", "student"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(full, whole, tmp_path):
    """No space for a line of the log, the last checkpoint, the result; then there is again."""
    code = f"""
    import errno
    from pathlib import Path
    if {full!r} == "log.jsonl":
        import builtins
        old, calls = train.harness.log.Log.write, [0]
        def write(self, line):
            calls[0] += 1
            if calls[0] == 6:  # of step 4
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
            return old(self, line)
        train.harness.log.Log.write = write
    elif {full!r} == "checkpoint":
        old = train.harness.checkpoint.save_file
        def save_file(tensors, path):
            if "step-00000006" in str(path):
                Path(path).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return old(tensors, path)
        train.harness.checkpoint.save_file = save_file
    else:
        from transformers import PreTrainedModel
        def save_pretrained(self, folder, **options):
            Path(folder).mkdir()
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        PreTrainedModel.save_pretrained = save_pretrained
    """
    done = run(cwd=tmp_path, code=code, fails=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: OSError") and "No space left on device" in last
    path = {"checkpoint": "checkpoints/step-00000006"}.get(full, full)
    assert last.endswith(f"'run/{path}'")
    step = {"log.jsonl": 2, "checkpoint": 4, "student": 6}[full]
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run")) == step
    assert not (tmp_path / "run" / "student").exists()
    run("--resume", cwd=tmp_path)
    assert_same(tmp_path / "run", whole)


def test_two_processes_do_not_write_one_run(tmp_path):
    """A second start, resumed or not, is refused while the first lives, even as an orphan."""
    code = """
    import time
    def update(*args, **options):
        time.sleep(600)
    train.update = update
    """
    first, place = forked.start([*FLAGS, "--out", "run"], tmp_path, FEW + textwrap.dedent(code))
    log = tmp_path / "run" / "log.jsonl"
    try:
        while first.exitcode is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        for flags in ((), ("--resume",)):
            done = run(*flags, cwd=tmp_path, fails=True)
            assert done.returncode == 2
            assert done.stderr.strip() == (
                "train.py: error: --out run: another process is writing this run"
            )
        with pytest.raises(BlockingIOError):
            Log(tmp_path / "run")
        assert len(log.read_text().splitlines()) == 1, "a log that somebody else has is not cut"
    finally:
        first.kill()
        forked.finish(first, place)
    run("--resume", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


WAITS = """
import os, time
from pathlib import Path
old = train.harness.pair.load_models
def load_models(*args):
    Path("loading").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return old(*args)
train.harness.pair.load_models = load_models
"""


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_of_several_starts_one_writes_while_it_still_loads(flags, whole, tmp_path):
    """The others are refused at once; nothing is left over but the run."""
    first = forked.start([*FLAGS, "--out", "run", *flags], tmp_path, FEW + WAITS)
    while first[0].exitcode is None and not (tmp_path / "loading").exists():
        time.sleep(0.01)
    others = [forked.start([*FLAGS, "--out", "run", *flags], tmp_path, FEW) for _ in range(2)]
    for done in forked.finish_all(others):
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "--out run: another process is writing this run" in done.stderr
    (tmp_path / "go").touch()
    assert forked.finish(*first).returncode == 0
    assert_same(tmp_path / "run", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["go", "loading", "run"]


def test_a_refused_start_leaves_nothing_and_an_older_run_where_it_was(tmp_path, begun):
    place, command = begun
    before = sorted(place.rglob("*"))
    forked.run([*FLAGS, "--out", "a/b/c", "--problems", "none.jsonl"], tmp_path, fails=True)
    assert not list(tmp_path.iterdir())
    forked.run([*command, "--teacher", "nowhere/at/all"], place, fails=True)
    assert sorted(place.rglob("*")) == before


def edit_facts(run, change):
    """Change the facts of the last checkpoint, and its checksum with them."""
    path = checkpoint.newest(run)
    files = [path / "facts.json", path / "checksums.json"]
    facts, sums = (json.loads(file.read_text()) for file in files)
    change(facts)
    (path / "facts.json").write_text(json.dumps(facts))
    sums["facts.json"] = checkpoint._sha256(path / "facts.json")
    (path / "checksums.json").write_text(json.dumps(sums))


def edit_config(run, **values):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | values))


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


ODD = {  # what is done to a run, and what the message names
    "resumed": (lambda run: edit_config(run, resumed=3), "run/config.json"),
    "date": (lambda run: edit_config(run, date="\x1b[2J"), "run/config.json"),
    "before": (lambda run: edit_config(run, problems_sha256=None), "is a run on other problems"),
    "pipe": (lambda run: pipe(run / "log.jsonl"), "log.jsonl"),
    "dropped": (lambda run: pipe(run / "log.dropped.jsonl"), "log.dropped.jsonl"),
    "folder": (lambda run: (run / "log.dropped.jsonl").mkdir(), "log.dropped.jsonl"),
    "line": (lambda run: (run / "log.jsonl").write_bytes(
        b"\x1b" + (run / "log.jsonl").read_bytes()[1:]), "run/log.jsonl:1"),
    "step": (lambda run: edit_facts(run, lambda f: f["position"].update(step=-5)), "facts.json"),
    "steps": (lambda run: edit_facts(run, lambda f: f["position"].update(step=10**30)), "facts"),
    "key": (lambda run: edit_facts(run, lambda f: f["position"].update(x=1)), "facts.json"),
    "bytes": (lambda run: edit_facts(run, lambda f: f["position"].update(log_bytes=9)), "jsonl:1"),
    "rate": (lambda run: edit_facts(run, lambda f: f["options"][0].update(lr="x")), "facts.json"),
    "random": (lambda run: edit_facts(run, lambda f: f["position"].update(random=[3])), "step-"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_bytes_of_a_run_folder_are_not_trusted(begun, name, tmp_path):
    place, command = begun
    shutil.copytree(place, tmp_path / "copy")
    run, (change, culprit) = tmp_path / "copy" / "run", ODD[name]
    change(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = forked.run([*command, "--resume"], tmp_path / "copy", fails=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and culprit in done.stderr
    assert "\x1b" not in done.stderr
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_overflow_while_sampling_is_a_skipped_step(tmp_path):
    flags = ("--lr", "1e18", "--eval-every", "0", "--max-skipped-steps", "3")
    done = run(*flags, cwd=tmp_path, fails=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "FloatingPointError: step" in last and "rollouts 0 (problem" in last, done.stderr
    assert [line["skipped"] for line in read_log(tmp_path / "run")[0]][-2:] == [1, 1]
    (saved,) = (tmp_path / "run" / "faults").glob("step-*.safetensors")
    assert load_file(saved)["student_logp_BT"].isnan().any()


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2", "RANK": "2"},
                                         {"RANK": "x"}, {"LOCAL_RANK": "-1"}])  # fmt: skip
def test_processes_that_make_no_sense_are_one_line(environment, tmp_path):
    done = forked.finish(*forked.start(FLAGS, tmp_path, **environment))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert [*environment][-1] in done.stderr


def test_a_terminal_that_takes_nothing_ends_no_run(whole, tmp_path):
    code = "import os\nfor n in (1, 2):\n    os.dup2(os.open('/dev/full', os.O_WRONLY), n)\n"
    run(cwd=tmp_path, code=code)
    assert_same(tmp_path / "run", whole)


def test_a_run_goes_on_on_another_day_with_a_template_that_prints_it(tmp_path):
    """The prompts are those of the first day; a changed template is refused."""
    write_model(tmp_path / "m", max_position_embeddings=4096)
    template = "{{ strftime_now('%d %b') }}{{ messages[0]['content'] }}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    (tmp_path / "p.jsonl").write_text('{"problem": "a", "answer": 1}\n')
    command = "--student m --teacher m --problems p.jsonl --method opd --max-new-tokens 4 "
    command += "--steps 2 --prompts-per-step 2 --checkpoint-every 1 --out run"
    command = command.split()
    forked.run(command, tmp_path)
    edit_config(tmp_path / "run", date="2024-02-03")
    seen = """
def prompts_of(self, step, old=train.harness.Run.prompts_of):
    print(self.tokenizer.decode(old(self, step)[0][0]))
    return old(self, step)
train.harness.Run.prompts_of = prompts_of
"""
    done = forked.run([*command, "--resume", "--steps", "3"], tmp_path, seen)
    assert "03 Feb" in done.stdout
    (tmp_path / "m" / "chat_template.jinja").write_text("x" + template)
    done = forked.run([*command, "--resume", "--steps", "4"], tmp_path, fails=True)
    assert done.returncode == 2 and "files or chat template have changed" in done.stderr


def test_everything_in_a_checkpoint_is_used(whole):
    """A resumed run that lost its moments, its schedule or its position is another run: the bit for
    bit tests above would notice."""
    found = checkpoint.read(checkpoint.newest(whole))
    assert set(found.groups) == {"student", "optimizer"}
    assert set(found.facts) == {"options", "scheduler", "position"}
    moments = [k for k in found.groups["optimizer"] if k.endswith("exp_avg_sq")]
    assert len(moments) == len(found.groups["student"])
    assert all(isinstance(t, torch.Tensor) for t in found.groups["student"].values())
