"""Micro-batches that compute little padding and change nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import make_run, sample, score

import harness
import toy
import train


def micro_batches(mask_BT, rows, tokens):
    args = SimpleNamespace(micro_batch=rows, tokens_per_micro_batch=tokens)
    return list(harness.micro_batches(mask_BT, args))


def up_to(lengths):
    """A mask whose rows end there."""
    return torch.arange(max(lengths)) == torch.tensor(lengths)[:, None] - 1


# ---------------------------------------------------------------------------------- micro-batches
@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 6), st.integers(0, 70))
def test_micro_batches_hold_every_row_once_and_keep_to_their_limits(lengths, rows, tokens):
    pieces = micro_batches(up_to(lengths), rows, tokens)
    held = [piece.tolist() for piece, _ in pieces]
    for piece, columns in pieces:
        assert columns == slice(0, max(2, max(lengths[row] for row in piece.tolist())))
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


def test_rows_without_a_column_are_left_out_but_one_pass_remains():
    mask_BT = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    (rows, columns), (others, few) = micro_batches(mask_BT, 1, 0)
    assert (rows.tolist(), columns.stop, others.tolist(), few.stop) == ([0], 4, [2], 2)
    ((row, columns),) = micro_batches(mask_BT & False, 0, 0)
    assert (row.tolist(), columns.stop) == ([0], 2)


def test_values_of_micro_batches_come_back_to_their_rows():
    """Fields of one to three axes, shorter columns filled up with 0, None for what nobody asked."""
    whole = {"logp_BT": torch.rand(7, 9), "gain_B": torch.rand(7)}
    whole["hidden_BTD"] = torch.rand(7, 9, 2)
    scores = train.Scores((7, 9))
    pieces = [([1, 5, 6], 9), ([0], 8), ([2, 3, 4], 7)]
    for rows, columns in pieces:
        at = torch.tensor(rows), slice(0, columns)
        scores.put(at, union_BTU=None, **{k: v[at[: v.dim()]] for k, v in whole.items()})
    for rows, columns in pieces:
        for name, value in whole.items():
            mine = getattr(scores, name)[rows]
            if value.dim() > 1:
                assert not mine[:, columns:].any()
                mine, value = mine[:, :columns], value[:, :columns]
            assert torch.equal(mine, value[rows])
    assert scores.union_BTU is None and scores.keep_BT is None


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
        batch, graded, trained = sample(run), [], []
        hooks = passes(run.teacher.base_model, graded), passes(run.model.base_model, trained)
        grades = score(run, batch)
        if name == "alone":
            keep_BT = grades.keep_BT
        assert torch.equal(grades.keep_BT, keep_BT)
        grades.keep_BT = keep_BT
        A_BT, w_BT = train.weigh(run, batch, grades, 0)
        loss, *_ = train.update(run, batch, grades, A_BT, w_BT)
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        found[name] = grades, loss, gradient, graded, trained
        for hook in hooks:
            hook.remove()
    alone, alone_loss, alone_gradient, _, _ = found["alone"]
    assert alone_gradient.norm() > 1e-3
    for name in ("budget", "whole"):
        grades, loss, gradient, _, _ = found[name]
        assert torch.allclose(grades.logp_BT, alone.logp_BT, atol=1e-4)
        assert torch.allclose(grades.max_prob_BT, alone.max_prob_BT, atol=1e-5)
        assert abs(loss - alone_loss) < 1e-5 * max(1, abs(alone_loss))
        assert (gradient - alone_gradient).norm() < 1e-4 * alone_gradient.norm()
    if method == "release":
        assert alone.released_B.any() and keep_BT.sum() < batch.response_mask_BT.sum()
    column_T = torch.arange(1, keep_BT.shape[1] + 1)
    lengths = ((mask * column_T).amax(1) for mask in (batch.response_mask_BT, keep_BT))
    for length_B, sizes in zip(lengths, found["budget"][3:], strict=True):
        assert len(sizes) > 3 and all(r * c <= budget or r == 1 for r, c in sizes)
        computed = sum(r * c for r, c in sizes)
        rows = max(r for r, _ in sizes)  # the old way: so many rows, whatever their lengths
        unsorted = sum(len(x) * int(x.max()) for x in length_B.split(rows))
        assert int(length_B.sum()) <= computed < unsorted
        assert computed < 1.15 * int(length_B.sum())
    assert found["whole"][3] == [tuple(batch.ids_BT.shape)]
