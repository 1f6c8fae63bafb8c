"""--shard: models spread over processes compute what whole ones do, and resume exactly."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from runs import parse, read_log
from safetensors.torch import load_file

import train
from benchmarks import shapes, soak
from harness import checkpoint, plan
from harness.models import load_config

FORK = ("--toy fork --difficulty 2 --steps 2 --prompts-per-step 5 --micro-batch 2 --eval-count 4 "
        "--eval-samples 2 --lgr-eps 1e-3 --lgr-nodes 50 --threads 1").split()  # fmt: skip
FEW = """
toy_problems = train.harness.pair.toy.problems
train.harness.pair.toy.problems = lambda count, **how: toy_problems(min(count, 64), **how)
"""
KEYS = ("loss reverse_kl entropy kept grad_norm triggered group_std bonus flat_groups "
        "accuracy").split()  # fmt: skip


def ranks(world, cwd, *flags, code=""):
    """A run in so many processes, to its end."""
    started = forked.start_ranks([*FORK, *map(str, flags)], cwd, FEW + code, world)
    done = forked.finish_all(started)
    assert {one.returncode for one in done} == {0}, [one.stderr[-2000:] for one in done]
    return done


def assert_close(run, reference):
    """Every number of the logs, and the weights, within float32's rounding of a few steps."""
    for a, b in zip(sum(read_log(run), []), sum(read_log(reference), []), strict=True):
        assert a.keys() == b.keys()
        for key in KEYS:
            if a.get(key) is not None:
                assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-5), key
    found, wanted = (checkpoint.read(checkpoint.newest(x)).groups for x in (run, reference))
    assert found["student"].keys() == wanted["student"].keys()
    for name, tensor in found["student"].items():
        assert torch.allclose(tensor, wanted["student"][name], atol=1e-5), name
    assert found["optimizer"].keys() == wanted["optimizer"].keys()


@pytest.mark.parametrize(
    ("world", "shard", "method"),
    [(2, "both", "opd"), (2, "both", "release"), (4, "both", "lgr"), (2, "both", "lgr_topk"),
     (2, "both", "rkl"), (2, "teacher", "lgr")],
)  # fmt: skip
def test_spread_models_give_the_numbers_of_one_process(world, shard, method, tmp_path):
    """Five rows on two or four processes: they make different numbers of passes, of micro-batches
    and of leaves."""
    flags = "--method", method
    forked.run([*FORK, *flags, "--out", "one"], tmp_path, FEW)
    ranks(world, tmp_path, *flags, "--shard", shard, "--out", "spread")
    assert_close(tmp_path / "spread", tmp_path / "one")
    saved = [load_file(tmp_path / x / "student" / "model.safetensors") for x in ("spread", "one")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert torch.allclose(tensor, saved[1][name], atol=1e-5), name


FIRST = """
import os
mine = int(os.environ.get("RANK", 0)) == 0
def first(response_mask_BT, logp_BT):
    return response_mask_BT & mine
train.masks.MASKS["none"] = first
"""


def test_a_process_that_keeps_no_token_takes_part(tmp_path):
    for shard in ("none", "both"):
        ranks(2, tmp_path, "--method", "opd", "--shard", shard, "--out", shard, code=FIRST)
    steps, _ = read_log(tmp_path / "both")
    assert 0 < steps[0]["kept"] < 1
    assert_close(tmp_path / "both", tmp_path / "none")


def wait_for(log, steps, alive, seconds=120):
    """Until so many steps are in the log; an error where a process ends before, or none comes."""
    end = time.monotonic() + seconds
    while not (log.exists() and log.read_text().count('"loss"') >= steps):
        assert all(is_alive() for is_alive in alive), f"ended before step {steps}"
        assert time.monotonic() < end, f"no step {steps} in {seconds} seconds"
        time.sleep(0.01)


def interrupted(cwd, number, *flags):
    """A run in two processes that get this signal after three steps, to its end."""
    started = forked.start_ranks([*FORK, *flags, "--out", "run"], cwd, FEW)
    wait_for(cwd / "run" / "log.jsonl", 3, [process.is_alive for process, _ in started])
    for process, _ in started:
        os.kill(process.pid, number)
    return forked.finish_all(started, 60)


FINE = """
import os
update = train.update
def noted(run, *args):
    out = update(run, *args)
    grads = [getattr(p.grad, "to_local", lambda p=p: p.grad)() for p in run.student.parameters()]
    fine = sum(int((g != g.bfloat16().float()).sum()) for g in grads)
    with open(f"fine-{os.environ['RANK']}", "w") as file:
        file.write(str(fine / sum(g.numel() for g in grads)))
    return out
train.update = noted
"""


def test_bfloat16_and_checkpointing_of_activations(tmp_path):
    """The copy that samples is in bfloat16, whole students are float32 under autocast: the same to
    that rounding. Gradients are summed up in float32: most have more digits than bfloat16 holds."""
    flags = ("--method", "lgr", "--dtype", "bfloat16", "--gradient-checkpointing", "--steps", "1",
             "--save-dtype", "float32")  # fmt: skip
    for shard in ("none", "both"):
        more = "--clip-grad", "0", "--micro-batch", "0", "--shard", shard, "--out", shard
        ranks(2, tmp_path, *flags, *more, code=FINE)
        assert min(float((tmp_path / f"fine-{rank}").read_text()) for rank in (0, 1)) > 0.3
        path = tmp_path / shard
        held = checkpoint.read(checkpoint.newest(path)).groups["student"]
        saved = load_file(path / "student" / "model.safetensors")
        assert all(torch.equal(tensor, held[name]) for name, tensor in saved.items())
    (a, _), (b, _) = (read_log(tmp_path / name) for name in ("none", "both"))
    for key in ("entropy", "grad_norm", "response_tokens"):
        assert math.isclose(a[0][key], b[0][key], rel_tol=0.1), key


def test_killed_and_resumed_is_bit_for_bit_and_any_number_goes_on(tmp_path):
    """Both processes die between two checkpoints. What the gathered checkpoint holds serves other
    numbers of processes, and whole models."""
    flags = ("--method", "lgr", "--shard", "both", "--checkpoint-every", "2", "--steps", "5")
    ranks(2, tmp_path, *flags, "--out", "whole")
    interrupted(tmp_path, signal.SIGKILL, *flags)
    done = ranks(2, tmp_path, *flags, "--out", "run", "--resume")
    assert "resuming from" in done[0].stderr
    assert soak.lines_of(tmp_path / "run") == soak.lines_of(tmp_path / "whole")
    assert soak.differences(tmp_path / "run", tmp_path / "whole") == []
    more = "--shard", "none", "--resume", "--steps", "6", "--out", "run"
    alone = forked.run([*FORK, *flags, *more], tmp_path, FEW)
    assert "--resume: --shard both, now none: the run may go on otherwise" in alone.stderr
    ranks(4, tmp_path, *flags, "--resume", "--steps", "6", "--out", "whole")
    assert_close(tmp_path / "run", tmp_path / "whole")


def test_a_signal_ends_a_spread_run_in_time_and_its_checkpoint_stays(tmp_path):
    flags = ("--method", "opd", "--shard", "both", "--checkpoint-every", "2", "--steps", "50")
    done = interrupted(tmp_path, signal.SIGTERM, *flags)
    assert {one.returncode for one in done} == {0}, [one.stderr[-1500:] for one in done]
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run")) % 2 == 0


GATHERED = """
import json, os
capture = train.harness.checkpoint.capture
def noted(*objects):
    out = capture(*objects)
    tensors = [tensor for group in out[0].values() for tensor in group.values()]
    found = sum(t.numel() for t in tensors if t.dim()), {str(t.device) for t in tensors}
    with open(f"gathered-{os.environ['RANK']}.json", "w") as file:
        json.dump([found[0], sorted(found[1])], file)
    return out
train.harness.checkpoint.capture = noted
"""


def test_a_checkpoint_is_gathered_on_the_cpu_of_one_process(tmp_path):
    """A student with its moments takes 12 bytes per parameter: no GPU need hold that."""
    ranks(2, tmp_path, "--method", "opd", "--shard", "both", "--out", "run", code=GATHERED)
    one, two = (json.loads((tmp_path / f"gathered-{rank}.json").read_text()) for rank in (0, 1))
    held = checkpoint.read(checkpoint.newest(tmp_path / "run")).groups
    total = sum(t.numel() for group in held.values() for t in group.values() if t.dim())
    assert one == [total, ["cpu"]] and two[0] == 0


BROKEN = """
import os
load_model = train.harness.pair.load_model
def load(path, **how):
    if os.environ["RANK"] == "1":
        raise ValueError(f"{path}: torn")
    return load_model(path, **how)
train.harness.pair.load_model = load
"""


def test_a_model_that_one_process_cannot_load_ends_all_in_one_line(tmp_path):
    flags = [*FORK, "--shard", "both", "--timeout", "30", "--out", "run"]
    started = forked.start_ranks(flags, tmp_path, FEW + BROKEN)
    done = forked.finish_all(started, 60)
    assert [one.returncode for one in done] == [2, 2]
    assert "rank 1: " in done[0].stderr and ": torn" in done[0].stderr
    assert not (tmp_path / "run").exists()


LONG = """
import json, os
from benchmarks import memory
step = train.train_step
def measured(run, number):
    before = memory.peak_mib(reset=True)
    out = step(run, number)
    with open(f"peak-{os.environ['RANK']}.json", "w") as file:
        json.dump(memory.peak_mib() - before, file)
    return out
train.train_step = measured
train.harness.pair.check_tokens = lambda *_: None  # the pair's end is no token: nothing draws it
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_a_step_of_long_responses_stays_within_the_plan(tmp_path):
    """1024 tokens here, 16384 by hand: the same bound. lgr, both models spread over two processes:
    no process takes more, above what it holds between steps, than a quarter more than --plan says,
    and 32 MiB."""
    T = int(os.environ.get("LONG_TOKENS", 1024))
    shapes.write_pair(tmp_path, "small", 4096, 2, 16, T)
    flags = ["--student", "student", "--teacher", "teacher", "--problems", "problems.jsonl",
             "--method", "lgr", "--max-new-tokens", T, "--prompts-per-step", 2, "--steps", 1,
             "--lgr-tau", 5.7, "--shard", "both", "--threads", 1, "--out", "run"]  # fmt: skip
    flags = [str(x) for x in flags]
    started = forked.start_ranks(flags, tmp_path, LONG)
    done = forked.finish_all(started, 1800)
    assert {one.returncode for one in done} == {0}, [one.stderr[-2000:] for one in done]
    (line,), _ = read_log(tmp_path / "run")
    assert line["response_tokens"] == T and line["triggered"] > 0.05
    sizes = [plan.sizes(load_config(tmp_path / name)) for name in ("student", "teacher")]
    found = plan.peaks(parse(flags), 2, *sizes, 16, 8)
    bound = 1.25 * (plan.peak(found) - sum(found["always"].values())) / 2**20 + 32
    peaks = [json.loads((tmp_path / f"peak-{rank}.json").read_text()) for rank in (0, 1)]
    print(f"peaks {peaks} MiB, bound {bound:.0f}")
    assert 0 < max(peaks) < bound


def test_two_nodes_and_one_that_dies(tmp_path):
    """Two torchrun agents on loopback, a process each. One is killed with its process: the other
    ends too, and the same commands with --resume go on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def agents(*more):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                   "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port,
                   "--monitor_interval", "0.1"]  # fmt: skip
        script = [train.__file__, *FORK, "--method", "opd", "--shard", "both", "--out", "run",
                  "--checkpoint-every", "1", "--timeout", "20", "--resume", *more]  # fmt: skip
        environment = os.environ | forked.ENVIRONMENT
        return [subprocess.Popen([*map(str, command), "--node_rank", str(node), *map(str, script)],
                                 cwd=tmp_path, env=environment, start_new_session=True,
                                 stderr=subprocess.PIPE, text=True)
                for node in (0, 1)]  # fmt: skip

    one, two = agents("--steps", "500")
    wait_for(tmp_path / "run" / "log.jsonl", 2, [lambda: one.poll() is two.poll() is None])
    workers = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split()
    for pid in (two.pid, *map(int, workers)):  # workers lead sessions of their own
        os.kill(pid, signal.SIGKILL)
    two.communicate()
    assert one.wait(60) != 0
    one.communicate()
    step = checkpoint.step_of(checkpoint.newest(tmp_path / "run"))
    for agent in agents("--steps", str(step + 1)):
        _, error = agent.communicate(timeout=120)
        assert agent.returncode == 0, error[-3000:]
    assert (tmp_path / "run" / "student").exists()
