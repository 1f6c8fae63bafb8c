"""fast.head with `scale_BT`: the numbers and gradients of logprobs, in one pass over the chunks.

What both files promise without it is in test_logprobs.py, run over both."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logprobs import (
    READS,
    B,
    D,
    E,
    Heads,
    K,
    Largest,
    T,
    V,
    case,
    naive,
    naive_divergence,
    pair,
    read,
)
from torch.utils._python_dispatch import TorchDispatchMode

import logprobs
from fast import head

reads = pytest.mark.parametrize("kind, beta", READS)


def scales(seed=1, dtype=torch.float64):
    """Of both signs, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.randn(B, T, dtype=torch.float64, generator=g)
    return (scale * (torch.rand(B, T, generator=g) < 0.7)).to(dtype)


def learning(models):
    """Copies of (hidden, head, teacher's hidden, teacher's head); the first two want gradients."""
    return [x.detach().clone().requires_grad_(i < 2) for i, x in enumerate(models)]


class Products(TorchDispatchMode):
    """Counts matrix products that are not empty."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        product = function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        self.count += product and all(x.numel() for x in args if isinstance(x, torch.Tensor))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["token_logprobs", "token_divergence"])
def test_the_same_arguments_and_one_more(name):
    plain, fast = (inspect.signature(getattr(x, name)).parameters for x in (logprobs, head))
    assert [*fast.values()][:-1] == [*plain.values()]
    last = [*fast.values()][-1]
    assert last.name == "scale_BT" and last.default is None and last.kind == last.KEYWORD_ONLY


@reads
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_values_and_gradients_equal_full_logits(
    kind, beta, temperature, vocab_size, masked, chunk
):
    """With a common factor of -3; and the plain file agrees."""
    models, mask = pair()
    ids, scale = case()[2] % (vocab_size or V), scales()
    mask = mask if masked else None
    how = {"mask_BT": mask, "vocab_size": vocab_size, "temperature": temperature, "chunk": chunk}
    results = []
    for way in ("fast", "plain", "naive"):
        h, w, th, tw = learning(models)
        if way == "naive":
            if kind == "logprobs":
                full = naive(h, w, vocab_size, temperature)
                numbers = full.gather(2, ids[:, 1:, None])[..., 0]
            else:
                numbers = naive_divergence(h, w, th, tw, kind, beta, vocab_size, temperature)
            kept = torch.ones(B, T) if mask is None else mask
            out = torch.cat([numbers.new_zeros(B, 1), numbers * kept[:, 1:]], dim=1)
        elif way == "fast":
            out = read(head, kind, beta, (h, w, th, tw), ids, scale_BT=scale, **how)
        else:
            out = read(logprobs, kind, beta, (h, w, th, tw), ids, **how)
        (-3 * (scale * out).sum()).backward()
        results.append((out.detach(), h.grad, w.grad))
    fast, plain, reference = results
    assert fast[0].dtype == torch.float64 and fast[0].shape == (B, T)
    assert reference[1].abs().max() > 1e-2 and reference[2].abs().max() > 1e-2
    for a, b, c in zip(fast, plain, reference, strict=True):
        assert torch.allclose(a, c, rtol=1e-11, atol=1e-11)
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@reads
def test_one_pass_where_the_loss_is_the_scale_times_a_factor_and_another_where_not(kind, beta):
    """Head-size products of a chunk: logits (of both models, if there are two), d hidden, d head.
    Without scale, or with a wrong one, logits are computed again; without gradient, once."""
    models, _ = pair()
    ids, logits, chunks = case()[2], 1 if kind == "logprobs" else 2, 3
    scale, right = torch.rand(B, T, dtype=torch.float64) + 0.1, {}
    for name, wrong, products in (
        ("as it is", 1, logits + 2), ("times 2", 2, logits + 2), ("divided", 1 / 7, logits + 2),
        ("turned", -1, logits + 2), ("one differs", 1 + torch.eye(B, T).double(), 2 * logits + 4),
        ("by a rounding too many", 1 + 1e-13 * torch.eye(B, T).roll(1, 1).double(), 2 * logits + 4),
    ):  # fmt: skip
        for given_scale, expected in ((scale, products), (None, 2 * logits + 2)):
            student = learning(models)
            how = {"scale_BT": given_scale, "chunk": B * (T - 1) // chunks}
            with Products() as seen:
                out = read(head, kind, beta, student, ids, **how)
                (wrong * scale * out).sum().backward()
            assert seen.count == chunks * expected, name
            right[given_scale is None] = student
        for a, b in zip(right[False][:2], right[True][:2], strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12), name
    with torch.no_grad(), Products() as seen:
        out = read(head, kind, beta, learning(models), ids, **how | {"scale_BT": scale})
    assert seen.count == chunks * logits and not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@reads
def test_the_line_of_the_training_loop_needs_one_pass(kind, beta, dtype):
    """However it is rounded: signs, order of the factors, processes, a mean."""
    models = [x.to(dtype) for x in pair()[0]]
    g = torch.Generator().manual_seed(5)
    weight, advantage = torch.rand(B, T, generator=g), torch.randn(B, T, generator=g) * 30
    weight, advantage, ids = weight.to(dtype) / 7, advantage.to(dtype), case()[2]
    losses = [
        lambda logp: -(weight * advantage * logp).sum(),
        lambda logp: (weight * (-advantage * logp)).sum() * 3,
        lambda logp: ((advantage * logp) * weight / 7).mean(),
        lambda logp: sum((logp[b] * -weight[b] * advantage[b]).sum() for b in range(B)) / 1e10,
    ]
    logits = 1 if kind == "logprobs" else 2
    for loss in losses:
        fast, plain = learning(models), learning(models)
        with Products() as seen:
            loss(read(head, kind, beta, fast, ids, scale_BT=-weight * advantage)).backward()
        assert seen.count == logits + 2
        loss(read(logprobs, kind, beta, plain, ids)).backward()
        near = 1e-4 if dtype == torch.float32 else 1e-11
        for a, b in zip(fast[:2], plain[:2], strict=True):
            assert (a.grad - b.grad).abs().max() < near * b.grad.abs().max()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31), which=st.sampled_from(READS), chunk=st.integers(1, 30),
    loss=st.sampled_from(["times", "zeros", "one", "any", "square"]), factor=st.floats(-100, 100),
    masked=st.booleans(), single=st.booleans(),
)  # fmt: skip
def test_any_loss_has_the_gradient_of_the_plain_file(
    seed, which, chunk, loss, factor, masked, single
):
    """Proportional to the scale, or nearly, or not at all."""
    dtype, (models, mask) = torch.float32 if single else torch.float64, pair(seed=seed)
    models, scale = [x.to(dtype) for x in models], scales(seed, dtype)
    g, how = torch.Generator().manual_seed(seed), {"chunk": chunk}
    how |= {"mask_BT": mask} if masked else {}
    upstream = factor * scale
    if loss == "zeros":
        upstream = upstream * (torch.rand(B, T, generator=g) < 0.5)
    elif loss == "one":
        upstream[0, 1] += 1
    elif loss == "any":
        upstream = torch.randn(B, T, generator=g, dtype=dtype)
    results = []
    for way, more in ((head, {"scale_BT": scale}), (logprobs, {})):
        student = learning(models)
        out = read(way, *which, student, case(seed=seed)[2], **how, **more)
        (upstream * (out**2 if loss == "square" else out)).sum().backward()
        results.append((out.detach(), student[0].grad, student[1].grad))
    for fast, plain in zip(*results, strict=True):
        near = 1e-4 if single else 1e-11
        assert (fast - plain).abs().max() <= near * max(float(plain.abs().max()), 1)


def test_candidates_with_a_scale_of_their_own_or_of_their_position():
    """K log-probs per position, some of the same token."""
    hidden, weight, ids, mask, candidates = case()
    candidates[..., 2] = candidates[..., 1]
    g = torch.Generator().manual_seed(4)
    each = torch.randn(B, T, K, dtype=torch.float64, generator=g)
    each[0, 3] = 0
    for scale, upstream in ((each, each), (scales(), scales()[..., None].expand(B, T, K))):
        results = []
        for way, more in ((head, {"scale_BT": scale}), (logprobs, {})):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            with Products() as seen:
                out = way.token_logprobs(h, w, ids, candidates_BTK=candidates, mask_BT=mask, **more)
                (2 * upstream * out).sum().backward()
            if way is head:  # positions with a scale of 0 have logits of their own
                assert seen.count == 3 + 1
            results.append((out.detach(), h.grad, w.grad))
        assert results[0][0].shape == (B, T, K)
        for fast, plain in zip(*results, strict=True):
            assert torch.allclose(fast, plain, rtol=1e-12, atol=1e-12)


@reads
def test_a_tied_head_and_the_students_own_tensors_as_teacher(kind, beta):
    """One tensor as embedding, head and teacher's head; the teacher's part gets no gradient."""
    (_, w, *_), _ = pair()
    ids, grads = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3)), []
    for fast in (True, False):
        w = w.detach().requires_grad_()
        h = torch.tanh(w[ids])
        if fast:
            out = read(head, kind, beta, (h, w, h.flip(0), w), ids, scale_BT=scales(), chunk=7)
        else:
            out = read(logprobs, kind, beta, (h, w, h.detach().flip(0), w.detach()), ids)
        grads += torch.autograd.grad((scales() * out).sum(), w)
    assert grads[0].any() and torch.allclose(*grads, rtol=1e-11, atol=1e-11)


@reads
@pytest.mark.parametrize("wants", [0, 1], ids=["hidden", "weight"])
def test_only_the_gradient_that_is_needed(wants, kind, beta):
    models, ids = pair()[0], case()[2]
    alone = [x.clone().requires_grad_(i == wants) for i, x in enumerate(models)]
    counts = []
    for tensors in (alone, everything := learning(models)):
        with Products() as seen:
            (scales() * read(head, kind, beta, tensors, ids, scale_BT=scales())).sum().backward()
        counts.append(seen.count)
    assert counts[1] - counts[0] == 1
    assert alone[1 - wants].grad is None and torch.equal(alone[wants].grad, everything[wants].grad)


@reads
def test_two_losses_keep_their_gradients_apart_and_a_second_backward_is_right(kind, beta):
    """Two sums over the same head, backward in the order of their making, then both again with
    another factor: the stored gradient is gone, and is computed."""
    (h, w, th, tw), _ = pair()
    w.requires_grad_()
    ids, losses = case()[2], []
    for seed in (1, 2):
        out = read(head, kind, beta, (h, w, th, tw), ids, scale_BT=scales(seed))
        losses.append((out * scales(seed)).sum())
    for factor in (2, -5):
        for seed, loss in zip((1, 2), losses, strict=True):
            (part,) = torch.autograd.grad(factor * loss, w, retain_graph=True)
            plain = (factor * read(logprobs, kind, beta, (h, w, th, tw), ids) * scales(seed)).sum()
            assert torch.allclose(part, *torch.autograd.grad(plain, w), rtol=1e-12, atol=1e-12)
    losses[0].backward()
    kept = w.grad.clone()
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()
    assert torch.equal(w.grad, kept)


@reads
def test_the_scale_gets_no_gradient_and_is_left_alone(kind, beta):
    scale = scales().requires_grad_()
    before = scale.detach().clone()
    student = learning(pair()[0])
    out = read(head, kind, beta, student, case()[2], scale_BT=scale)
    (2 * scale.detach() * out).sum().backward()
    assert scale.grad is None and student[0].grad.any()
    assert torch.equal(scale.detach(), before)


@reads
def test_gradcheck_with_a_scale(kind, beta):
    """It asks for the gradient of one number at a time, which is never proportional."""
    (h, w, th, tw), mask = pair(seed=3, length=4, rows=7, teacher_rows=7)
    ids = case()[2][:, :4] % 7
    assert torch.autograd.gradcheck(
        lambda h, w: read(head, kind, beta, (h, w, th, tw), ids, mask_BT=mask, temperature=0.7,
                          chunk=3, scale_BT=scales()[:, :4]),
        (h.requires_grad_(), w.requires_grad_()),
    )  # fmt: skip


@reads
def test_a_second_derivative_is_refused(kind, beta):
    student = learning(pair()[0])
    out = read(head, kind, beta, student, case()[2], scale_BT=scales())
    gradient, *_ = torch.autograd.grad((scales() * out).sum(), student[0], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@reads
@pytest.mark.parametrize("length", [64, 512])
def test_no_tensor_grows_with_positions_times_vocabulary(length, kind, beta):
    """As without scale: at most chunk x V numbers with a vocabulary axis (the heads: V x D)."""
    models, _ = pair(torch.float32, length=length)
    ids, chunk, scale = torch.zeros(B, length, dtype=torch.int64), 16, torch.ones(B, length)
    scale[:, ::3] = 0
    for loss_scale in (scale, scale + 1):
        with Largest() as seen:
            out = read(head, kind, beta, learning(models), ids, scale_BT=scale, chunk=chunk)
            (loss_scale * out).sum().backward()
        assert seen.wide == max(chunk * V, V * D, V * E)
        assert seen.any < B * length * V


@reads
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("factor", [1.0, 2.0, None])
def test_one_gradient_of_the_head(kind, beta, vocab_size, factor):
    """Of all tensors of the head's size, whatever the chunks, the cut and the factor; where the
    loss is another, the stored one is given back before the next is made."""
    student = learning(pair(torch.float32)[0])
    ids, scale = case()[2] % 15, scales(dtype=torch.float32)
    how = {"vocab_size": vocab_size, "chunk": 3, "scale_BT": scale}
    with Heads((V, 15), D) as seen:
        student[1].detach()  # the argument
        out = read(head, kind, beta, student, ids, **how)
        ((scale + 1 if factor is None else factor * scale) * out).sum().backward()
    assert seen.most == 2 and student[1].grad.any()


@reads
def test_a_loss_of_nothing_is_zero_and_so_is_its_gradient(kind, beta):
    """Everything masked, or every scale 0: a process without a kept token runs backward too."""
    ids, nothing = case()[2], torch.zeros(B, T)
    for how in ({"mask_BT": nothing.bool(), "scale_BT": scales()}, {"scale_BT": nothing}):
        student = learning(pair()[0])
        out = read(head, kind, beta, student, ids, **how)
        loss = (how["scale_BT"] * out).sum()
        loss.backward()
        assert loss == 0 and (student[0].grad == 0).all() and (student[1].grad == 0).all()
        assert ("mask_BT" in how) == bool((out == 0).all())


@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
@pytest.mark.parametrize("way", [logprobs, head], ids=["plain", "fast"])
def test_a_scale_of_zero_keeps_the_value_and_gives_no_gradient(way, kind):
    """The teacher forbids token 1 at position 2, where rkl is inf; its logits are nan at 3.
    A loss that leaves both out has the gradient of position 1 alone: 0 * inf would be nan."""
    states, teacher = torch.tensor([[[0.0], [-1e38], [1e38], [0.0]]]), torch.tensor([[0.0], [1e10]])
    one, scale = torch.ones(1, 4, 1), torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    grads = []
    for mask in (scale != 0, None):
        h, w = one.clone().requires_grad_(), torch.tensor([[1.0], [0.5]], requires_grad=True)
        more = {"scale_BT": scale} if way is head else {}
        out = way.token_divergence(h, w, states, teacher, kind=kind, mask_BT=mask, **more)
        torch.where(scale != 0, scale * out, 0.0).sum().backward()
        grads += [h.grad, w.grad]
    assert out[0, 3].isnan() and out[0, 2] == float("inf") or kind != "rkl" and out[0, 2] < 1
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])
    assert grads[0][0, 0] != 0 and (grads[0][0, 1:] == 0).all() and (grads[1] != 0).all()
    for scale in (torch.ones(1, 4), torch.tensor([[0.0, 0.0, 0.0, 1.0]])):  # the loss wants them
        w.grad, more = None, {"scale_BT": scale} if way is head else {}
        out = way.token_divergence(one, w, states, teacher, kind=kind, **more)
        torch.where(scale != 0, scale * out, 0.0).sum().backward()
        assert not torch.isfinite(w.grad).any()


@reads
def test_in_lower_precision(kind, beta):
    """bfloat16 models, and float32 models under autocast: near float64, in one pass."""
    models, _ = pair()
    models, ids = [x.bfloat16().double() for x in models], case()[2]
    exact, scale = learning(models), scales()
    (scale * read(logprobs, kind, beta, exact, ids)).sum().backward()
    for dtype in (torch.bfloat16, torch.float32):
        low = learning([x.to(dtype) for x in models])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = read(head, kind, beta, low, ids, scale_BT=scale, chunk=7)
        with Products() as seen:
            (scale.float() * out).sum().backward()
        assert seen.count == 0
        assert out.dtype == torch.float32 and low[0].grad.dtype == low[1].grad.dtype == dtype
        for x, right in zip(low[:2], exact[:2], strict=True):
            assert 0 < (x.grad - right.grad).norm() < 0.02 * right.grad.norm()


def test_the_heads_gradient_is_summed_in_float32():
    """As without scale: 600 terms of 1/2 in bfloat16, 601 in float32 under autocast."""
    for dtype, count in ((torch.bfloat16, 600), (torch.float32, 601)):
        hidden, weight = torch.ones(1, count + 1, 1, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
        ids = torch.zeros(1, count + 1, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = head.token_logprobs(
                hidden, weight.requires_grad_(), ids, chunk=1, scale_BT=torch.ones(1, count + 1)
            )
        out.sum().backward()
        assert weight.grad.flatten().tolist() == [count / 2, -count / 2]


@reads
def test_what_is_not_finite_in_the_scale_is_not_lost(kind, beta):
    """An advantage of inf or nan: the gradient is not finite either, as in the plain file."""
    for bad in (float("inf"), float("nan")):
        scale, student = torch.ones(B, T, dtype=torch.float64), learning(pair()[0])
        scale[1, 4] = bad
        out = read(head, kind, beta, student, case()[2], scale_BT=scale)
        (scale * out).sum().backward()
        assert torch.isfinite(out).all() and not torch.isfinite(student[1].grad).all()
        assert torch.isfinite(student[0].grad[0]).all() and student[0].grad[0].any()


@reads
@pytest.mark.parametrize("shape", [(B, T + 1), (B, T - 1), (B, T, K), (T,), ()], ids=str)
def test_a_scale_of_another_shape_is_refused(kind, beta, shape):
    """By torch, and not broadcast in silence."""
    with pytest.raises((RuntimeError, IndexError)):
        read(head, kind, beta, learning(pair()[0]), case()[2], scale_BT=torch.ones(shape))
