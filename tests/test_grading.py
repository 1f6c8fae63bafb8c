"""Micro-batches that compute little padding, and sentences split by other processes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import grade, make_run

import grading
import preparing
import teachability
import toy
import train
from flags import parse

ROOT = Path(grading.__file__).parent


# ---------------------------------------------------------------------------------- micro-batches
@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 6), st.integers(0, 70))
def test_micro_batches_hold_every_row_once_and_keep_to_their_limits(lengths, rows, tokens):
    pieces = grading.micro_batches(torch.tensor(lengths), rows, tokens)
    held = [piece.tolist() for piece in pieces]
    assert sorted(sum(held, [])) == list(range(len(lengths)))
    longest = [max(lengths[row] for row in piece) for piece in held]
    for piece, after, length in zip(held, [*held[1:], None], longest, strict=True):
        assert piece == sorted(piece)
        assert not rows or len(piece) <= rows
        assert not tokens or len(piece) * length <= tokens or len(piece) == 1
        assert after is None or max(lengths[r] for r in after) <= min(lengths[r] for r in piece)
        # and it is full: one row more would be too many
        full = rows and len(piece) == rows or tokens and (len(piece) + 1) * length > tokens
        assert after is None or full
    if not rows and (not tokens or len(lengths) * max(lengths) <= tokens):
        assert held == [list(range(len(lengths)))], "what fits into one stays as it is"


def test_columns_up_to_last():
    mask_BT = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert grading.columns_up_to_last(mask_BT.bool()).tolist() == [4, 0, 1, 5]


def test_stack_puts_rows_back():
    """Fields of one to three axes, a nested dataclass, one that is None."""
    keep_BT = torch.rand(7, 9) < 0.5
    number_B = torch.arange(7)
    choice = grading.Supervision(keep_BT, number_B > 3, number_B.double(), number_B)
    hidden_BTD = torch.rand(7, 9, 2)
    whole = grading.Grades(torch.rand(7, 9), torch.rand(7, 9), choice, hidden_BTD=hidden_BTD)
    pieces = [torch.tensor([1, 5, 6]), torch.tensor([0]), torch.tensor([2, 3, 4])]
    parts = [grading.pick(whole, rows, 9 - i) for i, rows in enumerate(pieces)]
    back = grading.stack(parts, pieces, 9)
    for i, rows in enumerate(pieces):
        for name in ("logp_BT", "max_prob_BT", "hidden_BTD"):
            mine, right = getattr(back, name)[rows], getattr(whole, name)[rows]
            assert torch.equal(mine[:, : 9 - i], right[:, : 9 - i]) and not mine[:, 9 - i :].any()
        assert torch.equal(back.choice.keep_BT[rows, : 9 - i], keep_BT[rows, : 9 - i])
    assert torch.equal(back.choice.wanted_B, number_B) and back.union_BTU is None
    assert torch.equal(back.choice.gain_B, choice.gain_B)
    assert torch.equal(back.choice.released_B, choice.released_B)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Problems of 1 to 12 moves: prompts of 20 to 90 tokens, responses of 28 to 150."""
    path = tmp_path_factory.mktemp("ragged") / "problems.jsonl"
    problems = [toy.problems(1, moves=1 + 5 * i % 12, seed=i)[0] for i in range(24)]
    path.write_text("\n".join(json.dumps({"problem": p["problem"]}) for p in problems))
    return ["--problems", str(path), "--max-new-tokens", "223", "--prompts-per-step", "14",
            "--lr", "1e-30", "--clip-grad", "0"]


def passes(module, sizes):
    """Note the rows and columns of every forward pass of a model that is no leaf's."""
    def note(_, args, named):
        if "past_key_values" not in named:
            sizes.append(tuple(named["input_ids"].shape))

    return module.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("method", ["opd", "release", "lgr", "lgr_topk", "rkl"])
def test_a_token_budget_computes_less_padding_and_the_same_loss(method, ragged):
    """Against one row at a time: grades, loss and gradient to float32 rounding.  Against as many
    rows per pass in the order of the batch: fewer tokens, padding counted."""
    found, budget = {}, 500
    for name, limits in (("alone", (1, 0)), ("budget", (0, budget)), ("whole", (0, 0))):
        run = make_run("--toy", "varied", *ragged, "--method", method, "--micro-batch",
                       str(limits[0]), "--tokens-per-micro-batch", str(limits[1]))
        batch, graded, trained = train.sample(run, 0), [], []
        hooks = passes(run.teacher.base_model, graded), passes(run.model.base_model, trained)
        grades = grade(run, batch)
        if name == "alone":
            keep_BT = grades.choice.keep_BT
        advantage_BT = grades.logp_BT - batch.logp_BT
        if grades.ahead is not None:
            advantage_BT = advantage_BT + grades.ahead.reward_BT
        loss, _ = train.update(
            run.student, run.optimizer, batch, grades, advantage_BT, keep_BT / keep_BT.sum(),
            run.args, run.teacher.get_output_embeddings().weight,
        )  # fmt: skip
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        found[name] = grades, loss, gradient, graded, trained
        for hook in hooks:
            hook.remove()
    alone, alone_loss, alone_gradient, _, _ = found["alone"]
    assert alone_gradient.norm() > 1e-3
    for name in ("budget", "whole"):
        grades, loss, gradient, _, _ = found[name]
        assert torch.equal(grades.choice.keep_BT, keep_BT)
        assert torch.allclose(grades.logp_BT, alone.logp_BT, atol=1e-4)
        assert torch.allclose(grades.max_prob_BT, alone.max_prob_BT, atol=1e-5)
        assert abs(loss - alone_loss) < 1e-5 * max(1, abs(alone_loss))
        assert (gradient - alone_gradient).norm() < 1e-4 * alone_gradient.norm()
    if method == "release":
        assert alone.choice.released_B.any() and keep_BT.sum() < batch.response_mask_BT.sum()
    lengths = (grading.columns_up_to_last(mask) for mask in (batch.response_mask_BT, keep_BT))
    for length_B, sizes in zip(lengths, found["budget"][3:], strict=True):
        assert len(sizes) > 3 and all(r * c <= budget or r == 1 for r, c in sizes)
        computed = sum(r * c for r, c in sizes)
        rows = max(r for r, _ in sizes)  # the old way: so many rows, whatever their lengths
        unsorted = sum(len(x) * int(x.max()) for x in length_B.split(rows))
        assert int(length_B.sum()) <= computed < unsorted
        assert computed < 1.15 * int(length_B.sum())
    assert found["whole"][3] == [tuple(batch.ids_BT.shape)]


# -------------------------------------------------------------------------------------- sentences
class Words:
    """A tokenizer: token i is word i."""

    words = ["It", " is", " so", ".", " Then", " what", "?", "", " 3.14", " e.g."]

    def decode(self, ids, **options):
        return "".join(self.words[i] for i in ids)


def some_ids(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(len(Words.words), size=size).astype(np.int32)
            for size in rng.integers(1, 90, size=count)]


def untrained():
    return teachability.sentence_splitter("untrained")[0]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_sentences_are_the_same_wherever_they_are_split(workers, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    sentences = grading.Sentences(Words(), untrained(), workers)
    assert sentences.workers == workers and "TOKENIZERS_PARALLELISM" not in os.environ
    batches = [some_ids(count, seed=count) for count in (40, 2, 1, 0)]
    waits = [sentences.begin(ids) for ids in batches]
    for wait, ids in reversed(list(zip(waits, batches, strict=True))):  # in any order
        segments = wait()
        assert len(segments) == len(ids)
        for segment_T, ids_T in zip(segments, ids, strict=True):
            assert segment_T.dtype is torch.int64
            assert torch.equal(segment_T, teachability.token_segments(Words(), ids_T, untrained()))
    assert max(segment_T.max() for segment_T in waits[0]()) > 5
    sentences.close()
    sentences.close()


@pytest.mark.parametrize("cause", ["system", "daemon"])
def test_without_fork_the_process_splits_itself(cause, monkeypatch):
    if cause == "system":
        monkeypatch.setattr(grading.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    else:
        monkeypatch.setitem(grading.multiprocessing.current_process()._config, "daemon", True)
    sentences = grading.Sentences(Words(), untrained(), 2)
    assert sentences.workers == 0
    ids_T = some_ids(1)[0]
    expected_T = teachability.token_segments(Words(), ids_T, untrained())
    assert torch.equal(sentences.begin([ids_T])()[0], expected_T)
    sentences.close()


def test_an_error_in_a_worker_arrives_with_its_message():
    class Odd(Exception):  # cannot travel between processes
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    def split(text):
        if "?" in text:
            raise Odd("this", "that")
        return [(0, len(text))]

    sentences = grading.Sentences(Words(), split, 1)
    waits = [sentences.begin([np.array(ids)]) for ids in ([0, 6], [0, 1])]
    with pytest.raises(RuntimeError, match="splitting sentences: Odd: this and that"):
        waits[0]()
    assert waits[1]()[0].tolist() == [0, 0], "the worker goes on"
    sentences.close()


def test_a_worker_that_dies_is_an_error_and_no_wait_for_ever():
    def split(text):
        os.kill(os.getpid(), signal.SIGKILL)

    sentences = grading.Sentences(Words(), split, 2)
    wait = sentences.begin(some_ids(4))
    with pytest.raises(RuntimeError, match="a process that splits sentences has died"):
        wait()
    sentences.close()


SCRIPT = """
import os, signal, sys, time
import numpy as np
sys.path.insert(0, {root!r})
import grading, harness, teachability, toy
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin without
tokenizer = harness.load_tokenizer(toy.world("varied").student)
tokenizer(["The dial starts at 3."] * 5000)  # with the library's own threads

def split(text):
    if {busy}:
        time.sleep(600)
    return [(0, len(text))]

sentences = grading.Sentences(tokenizer, split, 2)
waits = [sentences.begin([np.array([40, 41])] * 2) for _ in range(2)]
if not {busy}:
    waits[0]()
print(*sentences.pool._processes, flush=True)
{end}
"""


def start(end, busy=False):
    """A process with two workers that says their ids and then does `end`."""
    script = textwrap.dedent(SCRIPT).format(root=str(ROOT), busy=busy, end=end)
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    process = subprocess.Popen([sys.executable, "-c", script], text=True, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2, process.stderr.read()
    return process, workers


def alive(pid):
    """Whether a process still runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(workers, seconds=20):
    limit = time.monotonic() + seconds
    while any(map(alive, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(map(alive, workers))


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("busy", [False, True])
def test_workers_do_not_outlive_a_killed_parent(busy):
    process, workers = start("time.sleep(600)", busy)
    assert all(map(alive, workers))
    process.kill()
    process.wait()
    assert gone(workers)


@needs_proc
@pytest.mark.parametrize("end", ["sentences.close()", ""])
def test_workers_leave_quietly(end):
    """Also where nobody closes; and the fork of a process that has used the threads of the
    tokenizers library draws no warning."""
    process, workers = start(end)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "") and gone(workers)


@needs_proc
def test_workers_say_nothing_on_ctrl_c():
    end = "\n".join(["try:", "    print('waiting', flush=True)", "    time.sleep(600)",
                     "except KeyboardInterrupt:", "    pass",
                     "print('interrupted', sentences.begin([np.array([40])])())",
                     "sentences.close()"])
    process, workers = start(end)
    assert process.stdout.readline() == "waiting\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of them
    shown, errors = process.communicate(timeout=60)
    assert shown.startswith("interrupted [tensor([0])]") and errors == "" and gone(workers)


def test_only_methods_that_look_at_sentences_have_workers():
    for flags, workers in ((["--method", "opd"], None), (["--method", "release"], 1),
                           (["--method", "std", "--sentence-workers", "2"], 2),
                           (["--method", "release", "--sentence-workers", "0"], 0)):
        args = parse(["--toy", "horizon", *flags])[1]
        sentences = preparing.prepare(args, 0, 1).sentences
        assert (sentences and sentences.workers) == workers
