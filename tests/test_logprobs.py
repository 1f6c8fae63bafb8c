"""logprobs against full-logit float64 references, in value, gradient and memory."""

import math

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import logprobs

B, T, V, D, E, K = 3, 9, 23, 6, 5, 4
KINDS = [("rkl", 0.5), ("fkl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.8)]


def case(dtype=torch.float64, seed=0, length=T):
    """Random hidden states, head, ids, mask and candidates."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, length, D, dtype=dtype, generator=g)
    weight = torch.randn(V, D, dtype=dtype, generator=g)
    ids = torch.randint(V, (B, length), generator=g)
    mask = torch.rand(B, length, generator=g) < 0.6
    candidates = torch.randint(V, (B, length, K), generator=g)
    return hidden, weight, ids, mask, candidates


def naive(hidden, weight, vocab_size=None, temperature=1.0):
    """log softmax of full logits, moved so that entry t describes token t; entry 0 is dropped."""
    return torch.log_softmax(hidden[:, :-1] @ weight[:vocab_size].T / temperature, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_value_and_gradient_equal_full_logits(temperature, vocab_size, chunk):
    hidden, weight, ids, mask, _ = case()
    ids = ids % (vocab_size or V)
    upstream = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            logp = logprobs.token_logprobs(
                h, w, ids, mask_BT=mask, vocab_size=vocab_size, temperature=temperature, chunk=chunk
            )
        else:
            at_ids = naive(h, w, vocab_size, temperature).gather(2, ids[:, 1:, None])[..., 0]
            logp = torch.cat([at_ids.new_zeros(B, 1), at_ids * mask[:, 1:]], dim=1)
        (logp * upstream).sum().backward()
        results.append((logp.detach(), h.grad, w.grad))
    for mine, reference in zip(*results, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_candidates_value_and_gradient_equal_full_logits(temperature, vocab_size, chunk):
    """Several log-probs per position, some of the same token, each with a gradient of its own."""
    hidden, weight, ids, mask, candidates = case()
    ids, candidates = ids % (vocab_size or V), candidates % (vocab_size or V)
    candidates[..., 2] = candidates[..., 1]
    candidates[~mask] = -7  # not looked at
    upstream = torch.randn(B, T, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            logp = logprobs.token_logprobs(
                h, w, ids, candidates_BTK=candidates, mask_BT=mask, vocab_size=vocab_size,
                temperature=temperature, chunk=chunk,
            )
        else:
            full = naive(h, w, vocab_size, temperature)
            there = full.gather(2, candidates[:, 1:].clamp(min=0)) * mask[:, 1:, None]
            logp = torch.cat([there.new_zeros(B, 1, K), there], dim=1)
        (logp * upstream).sum().backward()
        results.append((logp.detach(), h.grad, w.grad))
    assert results[0][0].shape == (B, T, K)
    for mine, reference in zip(*results, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="candidates_BTK holds ids outside the vocabulary"):
        logprobs.token_logprobs(hidden, weight, ids, candidates_BTK=candidates)


def test_gradcheck():
    hidden, weight, ids, mask, _ = case()
    assert torch.autograd.gradcheck(
        lambda h, w: logprobs.token_logprobs(h, w, ids, mask_BT=mask, temperature=0.7, chunk=4),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("wants", ["hidden", "weight"])
def test_only_the_gradient_that_is_needed(wants):
    hidden, weight, ids, _, _ = case()
    (hidden if wants == "hidden" else weight).requires_grad_()
    logprobs.token_logprobs(hidden, weight, ids).sum().backward()
    assert (hidden.grad is not None) == (wants == "hidden")
    assert (weight.grad is not None) == (wants == "weight")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_statistics_equal_full_logits(temperature, vocab_size, chunk):
    hidden, weight, ids, mask, candidates = case()
    ids, candidates = ids % (vocab_size or V), candidates % (vocab_size or V)
    stats = logprobs.token_stats(
        hidden, weight, ids, top_k=K, candidates_BTK=candidates, mask_BT=mask,
        vocab_size=vocab_size, temperature=temperature, chunk=chunk,
    )
    logp = naive(hidden, weight, vocab_size, temperature)
    best = logp.topk(K, dim=-1)
    expected = {
        "logp_BT": logp.gather(2, ids[:, 1:, None])[..., 0],
        "entropy_BT": -(logp.exp() * logp).sum(-1),
        "max_prob_BT": logp.exp().amax(-1),
        "topk_ids_BTK": best.indices,
        "topk_logp_BTK": best.values,
        "candidate_logp_BTK": logp.gather(2, candidates[:, 1:]),
    }
    wanted = mask[:, 1:]
    for name, reference in expected.items():
        mine = getattr(stats, name)
        assert mine.shape[:2] == (B, T) and not mine.requires_grad
        assert torch.allclose(mine[:, 1:][wanted], reference[wanted], rtol=1e-12, atol=1e-12), name
        assert (mine[:, 1:][~wanted] == 0).all() and (mine[:, 0] == 0).all(), name


def test_what_was_not_asked_for_is_none():
    hidden, weight, ids, _, _ = case()
    stats = logprobs.token_stats(hidden, weight, ids)
    assert stats.topk_ids_BTK is None and stats.topk_logp_BTK is None
    assert stats.candidate_logp_BTK is None and stats.logp_BT is not None
    fewer = logprobs.token_stats(hidden, weight, ids, entropy=False)
    assert fewer.entropy_BT is None and stats.entropy_BT is not None
    assert torch.equal(fewer.logp_BT, stats.logp_BT)
    assert torch.equal(fewer.max_prob_BT, stats.max_prob_BT)


def test_the_default_chunk_changes_nothing_but_rounding():
    hidden, weight, ids, mask, _ = case(torch.float32, length=200)
    assert int(mask[:, 1:].sum()) > 256, "more than one chunk"
    results = []
    for chunk in (None, 37, 10**6):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        how = {"mask_BT": mask} | ({} if chunk is None else {"chunk": chunk})
        logp = logprobs.token_logprobs(h, w, ids, **how)
        logp.mean().backward()
        entropy = logprobs.token_stats(hidden, weight, ids, **how).entropy_BT
        results.append((logp.detach(), entropy, h.grad, w.grad))
    for other in results[1:]:
        for mine, reference in zip(results[0], other, strict=True):
            assert torch.allclose(mine, reference, rtol=1e-5, atol=1e-5 * float(reference.max()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_stays_near_float64(dtype, tolerance):
    hidden, weight, ids, _, _ = case(dtype)
    logp = logprobs.token_logprobs(hidden, weight, ids)
    assert logp.dtype == torch.float32
    reference = naive(hidden.double(), weight.double()).gather(2, ids[:, 1:, None])[..., 0]
    assert (logp[:, 1:] - reference).abs().max() < tolerance
    assert logprobs.token_stats(hidden, weight, ids).entropy_BT.dtype == torch.float32


def test_extreme_logits_stay_finite():
    """Probabilities that underflow to 0 add nothing to the entropy, and no nan to the gradient."""
    hidden = torch.full((1, 3, D), 100.0, requires_grad=True)
    weight = torch.linspace(-50, 50, V)[:, None].expand(V, D).contiguous()
    ids = torch.tensor([[0, 0, V - 1]])
    logp = logprobs.token_logprobs(hidden, weight, ids)
    logp.sum().backward()
    assert torch.isfinite(logp).all() and torch.isfinite(hidden.grad).all()
    assert logp[0, 2] == 0 and logp[0, 1] < -1e4
    assert (logprobs.token_stats(hidden, weight, ids).entropy_BT == 0).all()


def test_forbidden_tokens_add_nothing_to_the_entropy():
    """A logit of -inf: 0 log 0 = 0."""
    head = torch.tensor([[0.0], [0.0], [-float("inf")]])
    stats = logprobs.token_stats(torch.ones(1, 2, 1), head, torch.zeros(1, 2, dtype=torch.int64))
    assert stats.entropy_BT[0, 1] == pytest.approx(math.log(2))


def test_empty_mask_gives_zero_and_a_zero_gradient():
    """A process without a kept token must still take part in backward."""
    hidden, weight, ids, mask, _ = case()
    hidden.requires_grad_(), weight.requires_grad_()
    logp = logprobs.token_logprobs(hidden, weight, ids, mask_BT=torch.zeros_like(mask))
    logp.sum().backward()
    assert (logp == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_on_a_real_model(model):
    """Through backbone and head, as training and scoring call it."""
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        stats = logprobs.token_stats(hidden, model.get_output_embeddings().weight, ids)
        reference = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None])
    assert torch.allclose(stats.logp_BT[:, 1:], reference[..., 0], atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the largest result that any operation returns, of all and with a vocabulary axis."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                owned = x.untyped_storage().nbytes() // max(x.element_size(), 1)
                self.wide = max(getattr(self, "wide", 0), x.numel() if V in x.shape else 0)
                self.any = max(getattr(self, "any", 0), owned)
        return out


@pytest.mark.parametrize("length", [64, 512])
def test_no_tensor_grows_with_positions_times_vocabulary(length):
    """What carries a vocabulary axis holds at most chunk x V numbers (the head itself: V x D),
    forward and backward, whatever the number of positions."""
    hidden, weight, ids, mask, candidates = case(torch.float32, length=length)
    chunk = 16
    with Largest() as seen:
        h, w = hidden.requires_grad_(), weight.requires_grad_()
        logprobs.token_logprobs(h, w, ids, chunk=chunk).sum().backward()
        logprobs.token_stats(hidden, weight, ids, top_k=2, candidates_BTK=candidates, chunk=chunk)
    assert seen.wide == max(chunk * V, V * D)
    assert seen.any < B * length * V
    with Largest() as full:  # the measure sees the full logits where they exist
        naive(hidden, weight)
    assert full.wide == B * (length - 1) * V


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids_BT": torch.zeros(B, T + 1, dtype=torch.int64)}, "hidden_BTD .* ids_BT .* not fit"),
        ({"weight_VD": torch.zeros(V, D + 1)}, "does not fit hidden width 6"),
        ({"vocab_size": V + 1}, "vocab_size must be in 1..23, not 24"),
        ({"vocab_size": 0}, "vocab_size must be in 1..23, not 0"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"chunk": 0}, "chunk must be at least 1 position, not 0"),
        ({"mask_BT": torch.ones(B, T)}, "mask_BT must be a bool tensor"),
        ({"ids_BT": torch.full((B, T), V)}, "ids_BT holds 23..23 .* outside the vocabulary of 23"),
        ({"hidden_BTD": torch.zeros(B, T, D, dtype=torch.bfloat16)}, "is torch.bfloat16 but"),
        ({"top_k": V + 1}, "top_k must be in 0..23, not 24"),
        ({"candidates_BTK": torch.full((B, T, 1), V)}, "candidates_BTK holds ids outside"),
        ({"candidates_BTK": torch.zeros(B, T + 1, 1, dtype=torch.int64)}, "does not fit ids"),
    ],
)
def test_bad_arguments(change, message):
    hidden, weight, ids, _, _ = case(torch.float32)
    arguments = {"hidden_BTD": hidden, "weight_VD": weight, "ids_BT": ids} | change
    with pytest.raises(ValueError, match=message):
        logprobs.token_stats(**arguments)


def test_a_masked_padding_id_may_lie_outside_the_vocabulary():
    hidden, weight, ids, mask, _ = case(torch.float32)
    ids[~mask] = V + 7
    logprobs.token_logprobs(hidden, weight, ids, mask_BT=mask)


def test_autocast_reads_a_float32_model_in_bfloat16():
    model = tiny_model("qwen3")
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(0))
    weight = model.get_output_embeddings().weight
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        logp = logprobs.token_logprobs(hidden, weight, ids)
    logp.sum().backward()
    assert logp.dtype == torch.float32 and weight.grad.dtype == torch.float32
    exact = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    assert 0 < (logp[:, 1:] - exact).abs().max() < 0.2


# token_divergence


def pair(dtype=torch.float64, seed=0, length=T, rows=V, teacher_rows=V):
    """Student and teacher of different widths: hidden, head, teacher hidden, teacher head; mask."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, length, D), (rows, D), (B, length, E), (teacher_rows, E)]
    models = [torch.randn(shape, dtype=dtype, generator=g) for shape in shapes]
    return models, torch.rand(B, length, generator=g) < 0.6


def naive_divergence(h, w, th, tw, kind, beta=0.5, vocab_size=None, temperature=1.0):
    """By autograd through full logits, in probabilities, not log-probabilities: [B, T-1]."""
    p = torch.softmax(h[:, :-1] @ w[:vocab_size].T / temperature, dim=-1)
    q = torch.softmax(th[:, :-1] @ tw[:vocab_size].T, dim=-1).detach()
    m = beta * q + (1 - beta) * p
    return {
        "rkl": lambda: (p * (p / q).log()).sum(-1),
        "fkl": lambda: (q * (q / p).log()).sum(-1),
        "jsd": lambda: beta * (q * (q / m).log()).sum(-1)
        + (1 - beta) * (p * (p / m).log()).sum(-1),
    }[kind]()


def test_divergence_kinds():
    assert logprobs.DIVERGENCES == ("rkl", "fkl", "jsd")


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows, teacher_rows, vocab_size", [(V, V, None), (V, 19, 15), (20, V, 20)])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_divergence_value_and_gradient_equal_full_logits(
    kind, beta, temperature, rows, teacher_rows, vocab_size, chunk
):
    (*student, th, tw), mask = pair(rows=rows, teacher_rows=teacher_rows)
    upstream = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for ours in (True, False):
        h, w = (x.clone().requires_grad_() for x in student)
        if ours:
            kl = logprobs.token_divergence(
                h, w, th, tw, mask_BT=mask, kind=kind, beta=beta, vocab_size=vocab_size,
                temperature=temperature, chunk=chunk,
            )
            assert kl.dtype == torch.float64 and (kl[:, 0] == 0).all() and (kl[~mask] == 0).all()
        else:
            full = naive_divergence(h, w, th, tw, kind, beta, vocab_size, temperature)
            kl = torch.cat([full.new_zeros(B, 1), full * mask[:, 1:]], dim=1)
        (kl * upstream).sum().backward()
        results.append((kl.detach(), h.grad, w.grad))
    for mine, reference in zip(*results, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-11, atol=1e-11)


def test_divergence_by_hand_and_its_defaults():
    """p = (3/4, 1/4), q = (1/2, 1/2); reverse KL, unless said otherwise; both sides of jsd."""
    hidden = torch.ones(1, 2, 1, dtype=torch.float64)
    p, q = (torch.tensor(x, dtype=torch.float64).log()[:, None] for x in ([3, 1], [1, 1]))
    ln = math.log
    m = 0.2 * 0.5 + 0.8 * 0.75  # of the first token
    expected = {
        "rkl": 0.75 * ln(1.5) + 0.25 * ln(0.5),
        "fkl": 0.5 * ln(2 / 3) + 0.5 * ln(2),
        "jsd": 0.2 * (0.5 * ln(0.5 / m) + 0.5 * ln(0.5 / (1 - m)))
        + 0.8 * (0.75 * ln(0.75 / m) + 0.25 * ln(0.25 / (1 - m))),
    }
    for kind, value in expected.items():
        kl = logprobs.token_divergence(hidden, p, hidden, q, kind=kind, beta=0.2)
        assert kl[0].tolist() == pytest.approx([0, value], abs=1e-14)
    assert logprobs.token_divergence(hidden, p, hidden, q)[0, 1] == pytest.approx(expected["rkl"])
    default, half = (
        logprobs.token_divergence(hidden, p, hidden, q, kind="jsd", **beta)
        for beta in ({}, {"beta": 0.5})
    )
    assert torch.equal(default, half)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_gradcheck(kind, beta):
    (h, w, th, tw), mask = pair(seed=2)
    assert torch.autograd.gradcheck(
        lambda h, w: logprobs.token_divergence(
            h, w, th, tw, mask_BT=mask, kind=kind, beta=beta, temperature=0.7, chunk=4
        ),
        (h.requires_grad_(), w.requires_grad_()),
    )


@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_tied_head(kind, beta):
    """One tensor as embedding and head: its gradient is the sum of both roles'."""
    (_, w, th, tw), _ = pair()
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))
    grads = []
    for ours in (True, False):
        w = w.detach().requires_grad_()
        h = torch.tanh(w[ids])
        if ours:
            kl = logprobs.token_divergence(h, w, th, tw, kind=kind, beta=beta, chunk=7)
        else:
            kl = naive_divergence(h, w, th, tw, kind, beta)
        grads += torch.autograd.grad(kl.sum(), w)
    assert torch.allclose(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_no_gradient_reaches_the_teacher(kind, beta):
    models, _ = pair()
    h, w, th, tw = (x.requires_grad_() for x in models)
    logprobs.token_divergence(h, w, th, tw, kind=kind, beta=beta).sum().backward()
    assert th.grad is None and tw.grad is None and h.grad.any() and w.grad.any()
    # a head that both share: the student's part alone
    h, w, th, _ = (x.detach() for x in models)
    th = h.flip(0)
    shared, alone = w.clone().requires_grad_(), w.clone().requires_grad_()
    logprobs.token_divergence(h, shared, th, shared, kind=kind, beta=beta).sum().backward()
    logprobs.token_divergence(h, alone, th, w, kind=kind, beta=beta).sum().backward()
    assert alone.grad.any() and torch.equal(shared.grad, alone.grad)


@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
@pytest.mark.parametrize("wants", ["hidden", "weight"])
def test_divergence_only_the_gradient_that_is_needed(wants, kind):
    (h, w, th, tw), _ = pair()
    (h if wants == "hidden" else w).requires_grad_()
    logprobs.token_divergence(h, w, th, tw, kind=kind).sum().backward()
    assert (h.grad is not None) == (wants == "hidden")
    assert (w.grad is not None) == (wants == "weight")


@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_from_itself_is_zero_and_so_is_its_gradient(kind, beta):
    (h, w, *_), _ = pair()
    student = [x.clone().requires_grad_() for x in (h, w)]
    kl = logprobs.token_divergence(*student, h, w, kind=kind, beta=beta)
    kl.sum().backward()
    for x in (kl, *(x.grad for x in student)):
        assert x.abs().max() < 1e-14


def test_divergence_symmetries_and_limits():
    (h, w, th, tw), _ = pair()

    def both(kind, beta=0.5):
        forth = logprobs.token_divergence(h, w, th, tw, kind=kind, beta=beta)
        return forth, logprobs.token_divergence(th, tw, h, w, kind=kind, beta=beta)

    rkl, rkl_back = both("rkl")
    fkl, fkl_back = both("fkl")
    assert torch.allclose(rkl, fkl_back) and torch.allclose(fkl, rkl_back)
    assert not torch.allclose(rkl, fkl)
    assert torch.allclose(*both("jsd"))
    assert torch.allclose(both("jsd", 0.3)[0], both("jsd", 0.7)[1])
    assert not torch.allclose(*both("jsd", 0.3))
    # GKD: at its ends, jsd is a small multiple of forward and of reverse KL
    assert torch.allclose(both("jsd", 1e-9)[0] / 1e-9, fkl, rtol=1e-4)
    assert torch.allclose(both("jsd", 1 - 1e-9)[0] / 1e-9, rkl, rtol=1e-4)
    assert (both("jsd")[0] <= math.log(2)).all()


def test_a_constant_added_to_all_logits_changes_nothing():
    (h, w, th, tw), _ = pair()
    h[..., 0], th[..., 0] = 1, 1
    for kind in logprobs.DIVERGENCES:
        before = logprobs.token_divergence(h, w, th, tw, kind=kind)
        shift = torch.eye(D, dtype=w.dtype)[0] * 50, torch.eye(E, dtype=w.dtype)[0] * -70
        after = logprobs.token_divergence(h, w + shift[0], th, tw + shift[1], kind=kind)
        assert torch.allclose(before, after, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_divergence_in_lower_precision_stays_near_float64(kind, beta, dtype, tolerance):
    """Relative to the largest entry, of value and gradients."""
    (*student, th, tw), _ = pair(dtype)
    results = []
    for wide in (dtype, torch.float64):
        h, w = (x.detach().to(wide).requires_grad_() for x in student)
        teacher = th.to(wide), tw.to(wide)
        kl = logprobs.token_divergence(h, w, *teacher, kind=kind, beta=beta, chunk=7)
        kl.sum().backward()
        results.append((kl.detach(), h.grad, w.grad))
    assert [x.dtype for x in results[0]] == [torch.float32, dtype, dtype]
    for mine, reference in zip(*results, strict=True):
        assert (mine - reference).abs().max() < tolerance * reference.abs().max()


def test_divergence_of_models_in_different_types():
    """The student's type decides: a bfloat16 teacher is read as it is."""
    (h, w, th, tw), _ = pair(torch.float32)
    mixed = logprobs.token_divergence(h, w, th.bfloat16(), tw.bfloat16(), kind="jsd")
    exact = logprobs.token_divergence(h, w, th, tw, kind="jsd")
    assert mixed.dtype == torch.float32 and 0 < (mixed - exact).abs().max() < 0.05
    th, tw = th.round(), tw.round()  # logits without rounding: what follows them is float64
    for kind in logprobs.DIVERGENCES:
        wide = logprobs.token_divergence(h.double(), w.double(), th, tw, kind=kind)
        exact = naive_divergence(h.double(), w.double(), th.double(), tw.double(), kind)
        assert torch.allclose(wide[:, 1:], exact, rtol=1e-12, atol=1e-12)


def from_logits(student, teacher, kind, beta=0.5, upstream=1.0):
    """Divergence and logits' gradient for given logits of one position, float32."""
    student = torch.tensor(student)[:, None].requires_grad_()  # [V, 1], on hidden state 1
    one = torch.ones(1, 2, 1)
    teacher = torch.tensor(teacher)[:, None]
    kl = logprobs.token_divergence(one, student, one, teacher, kind=kind, beta=beta)[0, 1]
    (kl * upstream).backward()
    return kl.item(), student.grad[:, 0]


@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_where_probabilities_underflow(kind, beta):
    """Logits of +-1e4: one-hot distributions, with disjoint and with equal support."""
    kl, gradient = from_logits([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], kind, beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert kl == pytest.approx(entropy if kind == "jsd" else 2e4)
    assert gradient.tolist() == pytest.approx([1, -1, 0] if kind == "fkl" else [0, 0, 0])
    kl, gradient = from_logits([1e4, -1e4, -1e4], [1e4, 0.0, -1e4], kind, beta)
    assert kl == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_with_tokens_that_the_teacher_forbids(kind, beta):
    """-inf: q = 0.  Against that, m stays positive, and so do q's terms; rkl is infinite."""
    inf = float("inf")
    kl, gradient = from_logits([1.0, 0.5, 0.0], [0.5, -inf, 0.0], kind, beta)
    p = torch.tensor([1.0, 0.5, 0.0]).softmax(0)
    q = torch.tensor([0.5, -inf, 0.0]).softmax(0)
    m = beta * q + (1 - beta) * p
    if kind == "rkl":
        assert kl == inf and not torch.isfinite(gradient).all()
    elif kind == "fkl":
        assert kl == pytest.approx((torch.xlogy(q, q) - torch.xlogy(q, p)).sum().item())
        assert torch.allclose(gradient, p - q)
    else:
        from_q = (torch.xlogy(q, q) - torch.xlogy(q, m)).sum()
        from_p = (torch.xlogy(p, p) - torch.xlogy(p, m)).sum()
        assert kl == pytest.approx((beta * from_q + (1 - beta) * from_p).item(), abs=1e-6)
        ratio = (p / m).log()
        assert torch.allclose(gradient, (1 - beta) * p * (ratio - from_p), atol=1e-6)
    # where the student's probability underflows to 0 as well, the token counts for nothing
    kl, gradient = from_logits([1.0, -1e4, 0.0], [0.5, -inf, 0.0], kind, beta)
    reference, expected = from_logits([1.0, 0.0], [0.5, 0.0], kind, beta)
    assert kl == pytest.approx(reference, abs=1e-6)
    assert torch.allclose(gradient[[0, 2]], expected) and gradient[1] == 0
    # and where both say -inf, the value is still that of the others
    kl, _ = from_logits([1.0, -inf, 0.0], [0.5, -inf, 0.0], kind, beta)
    assert kl == pytest.approx(reference, abs=1e-6)


def test_an_infinite_position_that_the_loss_leaves_out_has_a_zero_gradient():
    """torch.where(isfinite(rkl), rkl, 0) must be enough: 0 * inf would be nan."""
    kl, gradient = from_logits([1.0, 0.5], [0.0, -float("inf")], "rkl", upstream=0.0)
    assert kl == float("inf") and (gradient == 0).all()


@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_masked_out_positions_may_hold_nan(kind):
    (h, w, th, tw), mask = pair()
    clean, dirty, dirty_teacher = h.clone(), h.clone(), th.clone()
    unread = ~torch.cat([mask[:, 1:], torch.zeros(B, 1, dtype=torch.bool)], dim=1)
    dirty[unread], dirty_teacher[unread] = float("nan"), float("nan")
    results = []
    for hidden, teacher in ((clean, th), (dirty, dirty_teacher)):
        hidden, weight = hidden.requires_grad_(), w.clone().requires_grad_()
        kl = logprobs.token_divergence(hidden, weight, teacher, tw, mask_BT=mask, kind=kind)
        kl.sum().backward()
        results.append((kl, hidden.grad, weight.grad))
    for mine, reference in zip(*results, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_divergence_with_an_empty_mask_is_zero_and_so_is_its_gradient(kind):
    (h, w, th, tw), mask = pair()
    h.requires_grad_(), w.requires_grad_()
    kl = logprobs.token_divergence(h, w, th, tw, mask_BT=torch.zeros_like(mask), kind=kind)
    kl.sum().backward()
    assert (kl == 0).all() and (h.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
@pytest.mark.parametrize("length", [64, 512])
def test_divergence_without_tensors_of_positions_times_vocabulary(length, kind):
    """As above: at most chunk x V numbers with a vocabulary axis (the heads: V x D, V x E)."""
    (h, w, th, tw), _ = pair(torch.float32, length=length)
    chunk = 16
    with Largest() as seen:
        h, w = h.requires_grad_(), w.requires_grad_()
        kl = logprobs.token_divergence(h, w, th, tw, kind=kind, temperature=0.7, chunk=chunk)
        kl.sum().backward()
    assert seen.wide == max(chunk * V, V * D, V * E)
    assert seen.any < B * length * V
    with Largest() as full:
        naive_divergence(h, w, th, tw, kind)
    assert full.wide == B * (length - 1) * V


@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_divergence_leaves_its_arguments_alone(kind):
    models, mask = pair()
    before = [x.clone() for x in (*models, mask)]
    student = [x.requires_grad_() for x in models[:2]]
    logprobs.token_divergence(*student, *models[2:], mask_BT=mask, kind=kind).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((*models, mask), before, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "tv"}, "kind must be one of rkl, fkl, jsd, not 'tv'"),
        ({"beta": 0.0}, "beta must lie between 0 and 1, both excluded, not 0.0"),
        ({"beta": 1.0}, "beta must lie between 0 and 1, both excluded, not 1.0"),
        ({"beta": float("nan")}, "beta must lie .* not nan"),
        ({"hidden_BTD": torch.zeros(B, D)}, "hidden_BTD .* teacher_hidden_BTE .* not fit"),
        ({"teacher_hidden_BTE": torch.zeros(B, T + 1, E)}, "teacher_hidden_BTE .* not fit"),
        ({"weight_VD": torch.zeros(V, D + 1)}, "^weight_VD .* does not fit hidden width 6"),
        ({"teacher_weight_VE": torch.zeros(V, D)}, "teacher_weight_VE .* fit hidden width 5"),
        ({"teacher_weight_VE": torch.zeros(V + 2, E)}, "weight_VD has 23 rows and teacher_.* 25"),
        ({"weight_VD": torch.zeros(V + 2, D)}, "weight_VD has 25 rows and teacher_.* 23"),
        ({"weight_VD": torch.zeros(V + 2, D), "vocab_size": V + 1}, "must be in 1..23, not 24"),
        ({"vocab_size": 0}, "vocab_size must be in 1..23, not 0"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"chunk": 0}, "chunk must be at least 1 position, not 0"),
        ({"mask_BT": torch.ones(B, T)}, "mask_BT must be a bool tensor"),
        ({"mask_BT": torch.ones(B, T - 1, dtype=torch.bool)}, "mask_BT must be .* shape .3, 9"),
        ({"teacher_hidden_BTE": torch.zeros(B, T, E).double()}, "teacher_hidden_BTE is .*64 but"),
        ({"hidden_BTD": torch.zeros(B, T, D).double()}, "^hidden_BTD is .*64 but weight_VD"),
    ],
)
def test_divergence_bad_arguments(change, message):
    (h, w, th, tw), _ = pair(torch.float32)
    names = ("hidden_BTD", "weight_VD", "teacher_hidden_BTE", "teacher_weight_VE")
    arguments = dict(zip(names, (h, w, th, tw), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        logprobs.token_divergence(**arguments)


@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_divergence_of_real_models_under_autocast(kind):
    """Two architectures with one vocabulary; the student in bfloat16, its gradients in float32."""
    student, teacher = tiny_model("qwen3"), tiny_model("llama", seed=1)
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(0))
    weight, teacher_weight = (x.get_output_embeddings().weight for x in (student, teacher))

    def loss():
        with torch.no_grad():
            teacher_hidden = teacher.base_model(input_ids=ids, use_cache=False)[0]
        hidden = student.base_model(input_ids=ids, use_cache=False)[0]
        return logprobs.token_divergence(hidden, weight, teacher_hidden, teacher_weight, kind=kind)

    with torch.autocast("cpu", torch.bfloat16):
        kl = loss()
    kl.sum().backward()
    assert kl.dtype == torch.float32 and weight.grad.dtype == torch.float32
    assert teacher_weight.grad is None
    mine, weight.grad = weight.grad, None
    p, q = (torch.log_softmax(x(ids).logits[:, :-1], -1) for x in (student, teacher))
    exact = loss()
    if kind == "rkl":
        assert torch.allclose(exact[:, 1:], (p.exp() * (p - q)).sum(-1), atol=1e-5)
    exact.sum().backward()
    assert 0 < (kl - exact).abs().max() < 0.05 * exact.max()
    assert (mine - weight.grad).norm() < 0.1 * weight.grad.norm()


# the weighted sum, whose gradient is computed along with it

READS = [("logprobs", 0.5), *KINDS]


def read(kind, beta, models, ids, **how):
    """token_logprobs or token_divergence on (hidden, head, teacher's hidden, teacher's head)."""
    if kind == "logprobs":
        return logprobs.token_logprobs(*models[:2], ids, **how)
    return logprobs.token_divergence(*models, kind=kind, beta=beta, **how)


def weights(seed=1):
    """Of both signs, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(B, T, dtype=torch.float64, generator=g)
    return weight * (torch.rand(B, T, generator=g) < 0.7)


@pytest.mark.parametrize("kind, beta", READS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_weighted_sum_and_its_gradient_equal_full_logits(
    kind, beta, temperature, vocab_size, masked, chunk
):
    """With an incoming gradient other than 1; and the plain mode agrees."""
    (*student, th, tw), mask = pair()
    ids, loss_weight = case()[2] % (vocab_size or V), weights()
    mask = mask if masked else None
    how = {"mask_BT": mask, "vocab_size": vocab_size, "temperature": temperature, "chunk": chunk}
    results = []
    for way in ("ours", "plain", "naive"):
        h, w = (x.clone().requires_grad_() for x in student)
        if way == "ours":
            total = read(kind, beta, (h, w, th, tw), ids, loss_weight_BT=loss_weight, **how)
            assert total.shape == () and total.dtype == torch.float64
        elif way == "plain":
            total = (read(kind, beta, (h, w, th, tw), ids, **how) * loss_weight).sum()
        else:
            if kind == "logprobs":
                full = naive(h, w, vocab_size, temperature)
                numbers = full.gather(2, ids[:, 1:, None])[..., 0]
            else:
                numbers = naive_divergence(h, w, th, tw, kind, beta, vocab_size, temperature)
            kept = loss_weight if mask is None else loss_weight * mask
            total = (numbers * kept[:, 1:]).sum()
        (-3 * total).backward()
        results.append((total.detach(), h.grad, w.grad))
    ours, plain, reference = results
    assert reference[1].abs().max() > 1e-2 and reference[2].abs().max() > 1e-2
    for a, b, c in zip(ours, plain, reference, strict=True):
        assert torch.allclose(a, c, rtol=1e-11, atol=1e-11)
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind, beta", READS)
@pytest.mark.parametrize("onednn", [True, False])
def test_large_heads_in_float32_go_to_onednn(onednn, kind, beta, monkeypatch):
    """Two ways of multiplying, the same numbers and gradients: those of float64 to 1e-5."""
    monkeypatch.setattr(logprobs, "LARGE", 0)
    monkeypatch.setattr(logprobs, "HAS_ONEDNN", onednn and logprobs.HAS_ONEDNN)
    (*student, th, tw), mask = pair()
    ids, loss_weight, results = case()[2], weights(), []
    for dtype in (torch.float64, torch.float32):
        h, w, teacher_h, teacher_w = (x.detach().to(dtype, copy=True) for x in (*student, th, tw))
        h.requires_grad_(), w.requires_grad_()
        how = {"mask_BT": mask, "chunk": 5}
        models = h, w, teacher_h, teacher_w
        total = read(kind, beta, models, ids, loss_weight_BT=loss_weight, **how)
        total.backward()
        stats = logprobs.token_stats(h, w, ids, top_k=3, **how)
        results.append((total.detach(), h.grad, w.grad, stats.logp_BT, stats.topk_logp_BTK))
    for exact, ours in zip(*results, strict=True):
        assert torch.allclose(exact, ours.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, beta", READS)
def test_weighted_sum_with_a_tied_head_and_the_students_own_tensors_as_teacher(kind, beta):
    """One tensor as embedding, head and teacher's head; the teacher's part gets no gradient."""
    (_, w, *_), _ = pair()
    ids, grads = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3)), []
    for ours in (True, False):
        w = w.detach().requires_grad_()
        h = torch.tanh(w[ids])
        models = h, w, h.flip(0), w
        if ours:
            total = read(kind, beta, models, ids, loss_weight_BT=weights(), chunk=7)
        else:
            models = h, w, h.detach().flip(0), w.detach()
            total = (read(kind, beta, models, ids) * weights()).sum()
        grads += torch.autograd.grad(total, w)
    assert grads[0].any() and torch.allclose(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind, beta", READS)
@pytest.mark.parametrize("wants", ["hidden", "weight"])
def test_weighted_sum_only_the_gradient_that_is_needed(wants, kind, beta):
    models, _ = pair()
    ids, here = case()[2], ["hidden", "weight"].index(wants)
    alone = [x.clone().requires_grad_(i == here) for i, x in enumerate(models)]
    both = [x.clone().requires_grad_(i < 2) for i, x in enumerate(models)]
    for tensors in (alone, both):
        read(kind, beta, tensors, ids, loss_weight_BT=weights()).backward()
    assert alone[1 - here].grad is None and torch.equal(alone[here].grad, both[here].grad)


@pytest.mark.parametrize("kind, beta", READS)
def test_weighted_sums_keep_their_gradients_apart_and_give_them_once(kind, beta):
    """Two sums over the same head, backward in the order of their making; then one of them again:
    its gradient is gone, and a wrong one would go unnoticed."""
    (h, w, th, tw), _ = pair()
    w.requires_grad_()
    ids, parts, sums = case()[2], [], []
    for seed in (1, 2):
        sums.append(read(kind, beta, (h, w, th, tw), ids, loss_weight_BT=weights(seed)))
    for total in sums:
        parts += torch.autograd.grad(2 * total, w, retain_graph=True)
    for seed, part in zip((1, 2), parts, strict=True):
        plain = (2 * read(kind, beta, (h, w, th, tw), ids) * weights(seed)).sum()
        assert torch.allclose(part, *torch.autograd.grad(plain, w), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="loss_weight_BT: backward can be called once"):
        sums[0].backward()


@pytest.mark.parametrize("kind, beta", READS)
def test_weights_of_the_loss_get_no_gradient(kind, beta):
    (h, w, th, tw), _ = pair()
    loss_weight = weights().requires_grad_()
    total = read(kind, beta, (h.requires_grad_(), w, th, tw), case()[2], loss_weight_BT=loss_weight)
    total.backward()
    assert loss_weight.grad is None and h.grad.any()


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, beta", READS)
def test_the_weighted_sum_computes_logits_once(kind, beta):
    """Head-size products per chunk: logits (of both models, if there are two), d hidden, d head.
    The plain mode takes the logits twice; without gradient, either mode takes them once."""
    (h, w, th, tw), _ = pair()
    h, w = h.requires_grad_(), w.requires_grad_()
    ids, logits, chunks = case()[2], 1 if kind == "logprobs" else 2, 3
    how = {"chunk": B * (T - 1) // chunks}
    loss_weight = torch.ones(B, T)
    for weighted, products in ((True, logits + 2), (False, 2 * logits + 2)):
        own = {"loss_weight_BT": loss_weight} if weighted else {}
        with Products() as seen:
            read(kind, beta, (h, w, th, tw), ids, **own, **how).sum().backward()
        assert seen.count == chunks * products
        with torch.no_grad(), Products() as seen:
            value = read(kind, beta, (h, w, th, tw), ids, **own, **how).sum()
        assert seen.count == chunks * logits and not value.requires_grad
    with torch.no_grad():
        total = read(kind, beta, (h, w, th, tw), ids, loss_weight_BT=loss_weight)
    assert torch.allclose(total, value)


@pytest.mark.parametrize("kind, beta", READS)
@pytest.mark.parametrize("length", [64, 512])
def test_weighted_sum_without_tensors_of_positions_times_vocabulary(length, kind, beta):
    """As in the plain mode: at most chunk x V numbers with a vocabulary axis (the heads: V x D)."""
    models, _ = pair(torch.float32, length=length)
    ids, chunk = torch.zeros(B, length, dtype=torch.int64), 16
    with Largest() as seen:
        models = [x.requires_grad_(i < 2) for i, x in enumerate(models)]
        read(kind, beta, models, ids, loss_weight_BT=torch.ones(B, length), chunk=chunk).backward()
    assert seen.wide == max(chunk * V, V * D, V * E)
    assert seen.any < B * length * V


@pytest.mark.parametrize("kind, beta", READS)
def test_weighted_sum_of_nothing_is_zero_and_so_is_its_gradient(kind, beta):
    """Everything masked, or every weight 0: a process without a kept token runs backward too."""
    ids, nothing = case()[2], torch.zeros(B, T)
    for how in ({"mask_BT": nothing.bool(), "loss_weight_BT": weights()},
                {"loss_weight_BT": nothing}):  # fmt: skip
        (h, w, th, tw), _ = pair()
        total = read(kind, beta, (h.requires_grad_(), w.requires_grad_(), th, tw), ids, **how)
        total.backward()
        assert total == 0 and (h.grad == 0).all() and (w.grad == 0).all()


def test_a_weight_of_zero_hides_an_infinite_divergence():
    """0 * inf would be nan, in the sum and in the gradient; with a weight, both show it."""
    hidden, teacher = torch.ones(1, 3, 1), torch.tensor([[0.0], [1.0]])
    teacher_hidden = torch.tensor([[[1.0], [float("inf")], [1.0]]])  # logits nan, inf in position 2
    forbids = torch.tensor([[0.0], [-float("inf")]])
    for models in ((teacher_hidden, teacher), (torch.tensor([[[1.0], [2.0], [1.0]]]), forbids)):
        student = torch.tensor([[1.0], [0.5]]).requires_grad_()
        weight = torch.tensor([[5.0, 0.0, 0.0]])
        if models[1] is teacher:
            weight[0, 1] = 2.0
        total = logprobs.token_divergence(hidden, student, *models, loss_weight_BT=weight)
        total.backward()
        assert torch.isfinite(total) and torch.isfinite(student.grad).all()
        assert (total > 0) == (models[1] is teacher)
        student.grad = None
        weight = torch.ones(1, 3)
        total = logprobs.token_divergence(hidden, student, *models, loss_weight_BT=weight)
        total.backward()
        assert not torch.isfinite(total)
        assert models[1] is teacher or not torch.isfinite(student.grad).any()


@pytest.mark.parametrize("kind, beta", READS)
def test_nan_in_either_model_is_not_lost(kind, beta):
    """0 log 0 is 0, and nan is not."""
    for broken in range(2 if kind == "logprobs" else 4):
        models, _ = pair()
        models[broken][..., 0, 0] = float("nan")
        values = read(kind, beta, models, case()[2])
        assert values[:, 1].isnan().all()
        total = read(kind, beta, models, case()[2], loss_weight_BT=weights())
        assert total.isnan()


@pytest.mark.parametrize("kind, beta", READS)
def test_weighted_sum_in_lower_precision(kind, beta):
    """bfloat16 models, and float32 models under autocast: as near to float64 as the plain mode."""
    models, _ = pair()
    models, ids = [x.bfloat16().double() for x in models], case()[2]
    exact = [x.clone().requires_grad_(i < 2) for i, x in enumerate(models)]
    reference = read(kind, beta, exact, ids, loss_weight_BT=weights())
    reference.backward()
    for dtype in (torch.bfloat16, torch.float32):
        low = [x.to(dtype).requires_grad_(i < 2) for i, x in enumerate(models)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            total = read(kind, beta, low, ids, loss_weight_BT=weights(), chunk=7)
        total.backward()
        assert total.dtype == torch.float32 and low[0].grad.dtype == low[1].grad.dtype == dtype
        assert 0 < (total - reference).abs() < 0.1
        for x, right in zip(low[:2], exact[:2], strict=True):
            assert (x.grad - right.grad).norm() < 0.02 * right.grad.norm()


@pytest.mark.parametrize("weighted", [True, False])
def test_the_heads_gradient_is_summed_in_float32(weighted):
    """A bfloat16 head, one position per chunk, 600 equal ones: a sum in bfloat16 would stop growing
    at 256 times its terms."""
    hidden, weight = torch.ones(1, 601, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    ids, how = torch.zeros(1, 601, dtype=torch.int64), {"chunk": 1}
    if weighted:
        how["loss_weight_BT"] = torch.ones(1, 601)
    logprobs.token_logprobs(hidden, weight, ids, **how).sum().backward()
    assert weight.grad.flatten().tolist() == [300, -300]


@pytest.mark.parametrize("change, message", [
    ({"loss_weight_BT": torch.ones(B, T + 1)}, "loss_weight_BT must .* shape .3, 9"),
    ({"loss_weight_BT": torch.ones(B, T, 1)}, "loss_weight_BT must .* shape .3, 9"),
    ({"loss_weight_BT": torch.ones(B, T, dtype=torch.bool)}, "loss_weight_BT must be a floating"),
    ({"candidates_BTK": torch.zeros(B, T, K, dtype=torch.int64)}, "not for candidates_BTK"),
])
def test_weighted_sum_bad_arguments(change, message):
    models, _ = pair()
    how = {"loss_weight_BT": weights()} | change
    for kind in ("logprobs", "rkl")[: 1 if "candidates_BTK" in change else 2]:
        with pytest.raises(ValueError, match=message):
            read(kind, 0.5, models, case()[2], **how)
