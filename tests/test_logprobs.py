"""logprobs and its drop-ins fast.head against full-logit float64 references, in value, gradient and
memory. What only fast.head can do is in test_fast_head.py."""

import math

import pytest
import torch
from conftest import tiny_model
from inputs import many_logits
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import logprobs
from fast import head

B, T, V, D, E, K = 3, 9, 23, 6, 5, 4
KINDS = [("rkl", 0.5), ("fkl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.8)]
READS = [("logprobs", 0.5), *KINDS]
both = pytest.mark.parametrize("way", [logprobs, head], ids=["plain", "fast"])


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


def read(way, kind, beta, models, ids, **how):
    """token_logprobs or token_divergence on (hidden, head, teacher's hidden, teacher's head)."""
    if kind == "logprobs":
        return way.token_logprobs(*models[:2], ids, **how)
    return way.token_divergence(*models, kind=kind, beta=beta, **how)


@both
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_value_and_gradient_equal_full_logits(way, temperature, vocab_size, chunk):
    hidden, weight, ids, mask, _ = case()
    ids = ids % (vocab_size or V)
    upstream = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            logp = way.token_logprobs(
                h, w, ids, mask_BT=mask, vocab_size=vocab_size, temperature=temperature, chunk=chunk
            )
        else:
            at_ids = naive(h, w, vocab_size, temperature).gather(2, ids[:, 1:, None])[..., 0]
            logp = torch.cat([at_ids.new_zeros(B, 1), at_ids * mask[:, 1:]], dim=1)
        (logp * upstream).sum().backward()
        results.append((logp.detach(), h.grad, w.grad))
    for mine, reference in zip(*results, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_candidates_value_and_gradient_equal_full_logits(way, temperature, vocab_size, chunk):
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
            logp = way.token_logprobs(
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
    with pytest.raises(RuntimeError, match="out of bounds"):
        way.token_logprobs(hidden, weight, ids, candidates_BTK=candidates)


@both
def test_gradcheck(way):
    hidden, weight, ids, mask, _ = case()
    assert torch.autograd.gradcheck(
        lambda h, w: way.token_logprobs(h, w, ids, mask_BT=mask, temperature=0.7, chunk=4),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@both
@pytest.mark.parametrize("wants", ["hidden", "weight"])
def test_only_the_gradient_that_is_needed(way, wants):
    hidden, weight, ids, _, _ = case()
    (hidden if wants == "hidden" else weight).requires_grad_()
    way.token_logprobs(hidden, weight, ids).sum().backward()
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


@both
def test_the_default_chunk_changes_nothing_but_rounding(way):
    hidden, weight, ids, mask, _ = case(torch.float32, length=200)
    assert int(mask[:, 1:].sum()) > 256, "more than one chunk"
    results = []
    for chunk in (None, 37, 10**6):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        how = {"mask_BT": mask} | ({} if chunk is None else {"chunk": chunk})
        logp = way.token_logprobs(h, w, ids, **how)
        logp.mean().backward()
        entropy = logprobs.token_stats(hidden, weight, ids, **how).entropy_BT
        results.append((logp.detach(), entropy, h.grad, w.grad))
    for other in results[1:]:
        for mine, reference in zip(results[0], other, strict=True):
            assert torch.allclose(mine, reference, rtol=1e-5, atol=1e-5 * float(reference.max()))


@both
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision_stays_near_float64(way, dtype, tolerance):
    hidden, weight, ids, _, _ = case(dtype)
    logp = way.token_logprobs(hidden, weight, ids)
    assert logp.dtype == torch.float32
    reference = naive(hidden.double(), weight.double()).gather(2, ids[:, 1:, None])[..., 0]
    assert (logp[:, 1:] - reference).abs().max() < tolerance
    assert logprobs.token_stats(hidden, weight, ids).entropy_BT.dtype == torch.float32


@both
def test_extreme_logits_stay_finite(way):
    """Probabilities that underflow to 0 add nothing to the entropy, and no nan to the gradient."""
    hidden = torch.full((1, 3, D), 100.0, requires_grad=True)
    weight = torch.linspace(-50, 50, V)[:, None].expand(V, D).contiguous()
    ids = torch.tensor([[0, 0, V - 1]])
    logp = way.token_logprobs(hidden, weight, ids)
    logp.sum().backward()
    assert torch.isfinite(logp).all() and torch.isfinite(hidden.grad).all()
    assert logp[0, 2] == 0 and logp[0, 1] < -1e4
    assert (logprobs.token_stats(hidden, weight, ids).entropy_BT == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_262144_tokens_lose_nothing(dtype, temperature):
    """float32 sums over so many tokens would lose up to 1e-3 nats. A hidden state that is 1 in one
    place reads a row of the logits; the teacher's rows are in another order."""
    logits_RV = many_logits().to(dtype)
    hidden = torch.eye(len(logits_RV) + 1)[None, :, :-1].to(dtype)
    models = hidden, logits_RV.T.contiguous(), hidden.roll(1, 2), logits_RV.T.contiguous()
    ids, how = torch.arange(len(logits_RV) + 1)[None], {"temperature": temperature}
    exact = [x.double() for x in models]
    logp = naive(*exact[:2], **how)
    at_ids = logp.gather(2, ids[:, 1:, None])[..., 0]
    stats = logprobs.token_stats(*models[:2], ids, **how)
    assert (stats.entropy_BT[:, 1:] - torch.special.entr(logp.exp()).sum(-1)).abs().max() < 3e-5
    assert (stats.logp_BT[:, 1:] - at_ids).abs().max() < 3e-5
    divergences = {kind: naive_divergence(*exact, kind, **how) for kind in logprobs.DIVERGENCES}
    for way in (logprobs, head):
        for kind, right in {"logprobs": at_ids, **divergences}.items():
            ours = read(way, kind, 0.5, models, ids, **how)[:, 1:]
            assert ((ours - right).abs() < 3e-5 * (1 + right.abs())).all(), (way, kind)


def test_forbidden_tokens_add_nothing_to_the_entropy():
    """A logit of -inf: 0 log 0 = 0."""
    head = torch.tensor([[0.0], [0.0], [-float("inf")]])
    stats = logprobs.token_stats(torch.ones(1, 2, 1), head, torch.zeros(1, 2, dtype=torch.int64))
    assert stats.entropy_BT[0, 1] == pytest.approx(math.log(2))


@both
def test_empty_mask_gives_zero_and_a_zero_gradient(way):
    """A process without a kept token must still take part in backward."""
    hidden, weight, ids, mask, _ = case()
    hidden.requires_grad_(), weight.requires_grad_()
    logp = way.token_logprobs(hidden, weight, ids, mask_BT=torch.zeros_like(mask))
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


@both
@pytest.mark.parametrize("length", [64, 512])
def test_no_tensor_grows_with_positions_times_vocabulary(way, length):
    """What carries a vocabulary axis holds at most chunk x V numbers (the head itself: V x D),
    forward and backward, whatever the number of positions."""
    hidden, weight, ids, mask, candidates = case(torch.float32, length=length)
    chunk = 16
    with Largest() as seen:
        h, w = hidden.requires_grad_(), weight.requires_grad_()
        way.token_logprobs(h, w, ids, chunk=chunk).sum().backward()
        logprobs.token_stats(hidden, weight, ids, top_k=2, candidates_BTK=candidates, chunk=chunk)
    assert seen.wide == max(chunk * V, V * D)
    assert seen.any < B * length * V
    with Largest() as full:  # the measure sees the full logits where they exist
        naive(hidden, weight)
    assert full.wide == B * (length - 1) * V


CALLS = [(logprobs.token_logprobs, "plain"), (head.token_logprobs, "fast"),
         (logprobs.token_stats, "stats")]  # fmt: skip
calls = pytest.mark.parametrize("call", [c for c, _ in CALLS], ids=[name for _, name in CALLS])


@calls
@pytest.mark.parametrize("change, message", [
    ({"vocab_size": V + 1}, "vocab_size must be in 1..23, not 24"),
    ({"vocab_size": 0}, "vocab_size must be in 1..23, not 0"),
    ({"vocab_size": -1}, "vocab_size must be in 1..23, not -1"),
    ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
    ({"temperature": -1.0}, "temperature must be positive, not -1.0"),
    ({"temperature": 1e-300}, "temperature must be positive, not 1e-300"),
    ({"temperature": float("nan")}, "temperature must be positive, not nan"),
])  # fmt: skip
def test_what_would_be_wrong_in_silence_is_refused(call, change, message):
    hidden, weight, ids, _, _ = case(torch.float32)
    with pytest.raises(ValueError, match=message):
        call(hidden, weight, ids, **change)


@calls
@pytest.mark.parametrize("change", [
    {"ids_BT": torch.zeros(B, T + 1, dtype=torch.int64)},
    {"ids_BT": torch.zeros(B, T - 1, dtype=torch.int64)},
    {"ids_BT": torch.full((B, T), V)},
    {"ids_BT": torch.full((B, T), -1)},
    {"ids_BT": torch.zeros(B, T)},
    {"weight_VD": torch.zeros(V, D + 1)},
    {"hidden_BTD": torch.zeros(B, T, D, dtype=torch.bfloat16)},
    {"hidden_BTD": torch.zeros(B, T + 1, D)},
    {"hidden_BTD": torch.zeros(B, D)},
    {"chunk": -1},
    {"mask_BT": torch.ones(B, T + 1, dtype=torch.bool)},
    {"mask_BT": torch.ones(B, T - 1, dtype=torch.bool)},
    {"candidates_BTK": torch.full((B, T, 1), V)},
    {"candidates_BTK": torch.zeros(B, T + 1, 1, dtype=torch.int64)},
    {"candidates_BTK": torch.zeros(B, T, dtype=torch.int64)},
], ids="-".join)  # fmt: skip
def test_what_torch_refuses(call, change):
    """Any exception, but no numbers: nothing is cut, broadcast or wrapped around to fit."""
    hidden, weight, ids, _, _ = case(torch.float32)
    with pytest.raises((RuntimeError, IndexError, TypeError)):
        call(**{"hidden_BTD": hidden, "weight_VD": weight, "ids_BT": ids} | change)


@pytest.mark.parametrize("top_k", [V + 1, -1])
def test_top_k_must_fit_the_vocabulary(top_k):
    hidden, weight, ids, _, _ = case(torch.float32)
    with pytest.raises(RuntimeError):
        logprobs.token_stats(hidden, weight, ids, top_k=top_k)


@both
def test_a_mask_of_another_type_counts_where_it_is_not_0(way):
    hidden, weight, ids, mask, _ = case(torch.float32)
    right = way.token_logprobs(hidden, weight, ids, mask_BT=mask)
    for dtype in (torch.uint8, torch.int64, torch.float32):
        assert torch.equal(
            way.token_logprobs(hidden, weight, ids, mask_BT=mask.to(dtype) * 3), right
        )


@both
def test_a_masked_padding_id_may_lie_outside_the_vocabulary(way):
    hidden, weight, ids, mask, _ = case(torch.float32)
    ids[~mask] = V + 7
    way.token_logprobs(hidden, weight, ids, mask_BT=mask)


@both
def test_autocast_reads_a_float32_model_in_bfloat16(way):
    model = tiny_model("qwen3")
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(0))
    weight = model.get_output_embeddings().weight
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        logp = way.token_logprobs(hidden, weight, ids)
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


@both
@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows, teacher_rows, vocab_size", [(V, V, None), (V, 19, 15), (20, V, 20)])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_divergence_value_and_gradient_equal_full_logits(
    way, kind, beta, temperature, rows, teacher_rows, vocab_size, chunk
):
    (*student, th, tw), mask = pair(rows=rows, teacher_rows=teacher_rows)
    upstream = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for ours in (True, False):
        h, w = (x.clone().requires_grad_() for x in student)
        if ours:
            kl = way.token_divergence(
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


@both
def test_divergence_by_hand_and_its_defaults(way):
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
        kl = way.token_divergence(hidden, p, hidden, q, kind=kind, beta=0.2)
        assert kl[0].tolist() == pytest.approx([0, value], abs=1e-14)
    assert way.token_divergence(hidden, p, hidden, q)[0, 1] == pytest.approx(expected["rkl"])
    default, half = (
        way.token_divergence(hidden, p, hidden, q, kind="jsd", **beta)
        for beta in ({}, {"beta": 0.5})
    )
    assert torch.equal(default, half)


@both
@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_gradcheck(way, kind, beta):
    (h, w, th, tw), mask = pair(seed=3, length=4, rows=7, teacher_rows=7)
    assert 3 < int(mask[:, 1:].sum()) < mask[:, 1:].numel(), "two chunks, and some are masked"
    assert torch.autograd.gradcheck(
        lambda h, w: way.token_divergence(
            h, w, th, tw, mask_BT=mask, kind=kind, beta=beta, temperature=0.7, chunk=3
        ),
        (h.requires_grad_(), w.requires_grad_()),
    )


@both
@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_tied_head(way, kind, beta):
    """One tensor as embedding and head: its gradient is the sum of both roles'."""
    (_, w, th, tw), _ = pair()
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))
    grads = []
    for ours in (True, False):
        w = w.detach().requires_grad_()
        h = torch.tanh(w[ids])
        if ours:
            kl = way.token_divergence(h, w, th, tw, kind=kind, beta=beta, chunk=7)
        else:
            kl = naive_divergence(h, w, th, tw, kind, beta)
        grads += torch.autograd.grad(kl.sum(), w)
    assert torch.allclose(*grads, rtol=1e-11, atol=1e-11)


@both
@pytest.mark.parametrize("kind, beta", KINDS)
def test_no_gradient_reaches_the_teacher(way, kind, beta):
    models, _ = pair()
    h, w, th, tw = (x.requires_grad_() for x in models)
    way.token_divergence(h, w, th, tw, kind=kind, beta=beta).sum().backward()
    assert th.grad is None and tw.grad is None and h.grad.any() and w.grad.any()
    # a head that both share: the student's part alone
    h, w, th, _ = (x.detach() for x in models)
    th = h.flip(0)
    shared, alone = w.clone().requires_grad_(), w.clone().requires_grad_()
    way.token_divergence(h, shared, th, shared, kind=kind, beta=beta).sum().backward()
    way.token_divergence(h, alone, th, w, kind=kind, beta=beta).sum().backward()
    assert alone.grad.any() and torch.equal(shared.grad, alone.grad)


@both
@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
@pytest.mark.parametrize("wants", ["hidden", "weight"])
def test_divergence_only_the_gradient_that_is_needed(way, wants, kind):
    (h, w, th, tw), _ = pair()
    (h if wants == "hidden" else w).requires_grad_()
    way.token_divergence(h, w, th, tw, kind=kind).sum().backward()
    assert (h.grad is not None) == (wants == "hidden")
    assert (w.grad is not None) == (wants == "weight")


@both
@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_from_itself_is_zero_and_so_is_its_gradient(way, kind, beta):
    (h, w, *_), _ = pair()
    student = [x.clone().requires_grad_() for x in (h, w)]
    kl = way.token_divergence(*student, h, w, kind=kind, beta=beta)
    kl.sum().backward()
    for x in (kl, *(x.grad for x in student)):
        assert x.abs().max() < 1e-14


@both
def test_divergence_symmetries_and_limits(way):
    (h, w, th, tw), _ = pair()

    def both(kind, beta=0.5):
        forth = way.token_divergence(h, w, th, tw, kind=kind, beta=beta)
        return forth, way.token_divergence(th, tw, h, w, kind=kind, beta=beta)

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


@both
def test_a_constant_added_to_all_logits_changes_nothing(way):
    (h, w, th, tw), _ = pair()
    h[..., 0], th[..., 0] = 1, 1
    for kind in logprobs.DIVERGENCES:
        before = way.token_divergence(h, w, th, tw, kind=kind)
        shift = torch.eye(D, dtype=w.dtype)[0] * 50, torch.eye(E, dtype=w.dtype)[0] * -70
        after = way.token_divergence(h, w + shift[0], th, tw + shift[1], kind=kind)
        assert torch.allclose(before, after, rtol=1e-11, atol=1e-11)


@both
@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_divergence_in_lower_precision_stays_near_float64(way, kind, beta, dtype, tolerance):
    """Relative to the largest entry, of value and gradients."""
    (*student, th, tw), _ = pair(dtype)
    results = []
    for wide in (dtype, torch.float64):
        h, w = (x.detach().to(wide).requires_grad_() for x in student)
        teacher = th.to(wide), tw.to(wide)
        kl = way.token_divergence(h, w, *teacher, kind=kind, beta=beta, chunk=7)
        kl.sum().backward()
        results.append((kl.detach(), h.grad, w.grad))
    assert [x.dtype for x in results[0]] == [torch.float32, dtype, dtype]
    for mine, reference in zip(*results, strict=True):
        assert (mine - reference).abs().max() < tolerance * reference.abs().max()


@both
def test_divergence_of_models_in_different_types(way):
    """The student's type decides: a bfloat16 teacher is read as it is."""
    (h, w, th, tw), _ = pair(torch.float32)
    mixed = way.token_divergence(h, w, th.bfloat16(), tw.bfloat16(), kind="jsd")
    exact = way.token_divergence(h, w, th, tw, kind="jsd")
    assert mixed.dtype == torch.float32 and 0 < (mixed - exact).abs().max() < 0.05
    th, tw = th.round(), tw.round()  # logits without rounding: what follows them is float64
    for kind in logprobs.DIVERGENCES:
        wide = way.token_divergence(h.double(), w.double(), th, tw, kind=kind)
        exact = naive_divergence(h.double(), w.double(), th.double(), tw.double(), kind)
        assert torch.allclose(wide[:, 1:], exact, rtol=1e-12, atol=1e-12)


def from_logits(way, student, teacher, kind, beta=0.5, upstream=1.0):
    """Divergence and logits' gradient for given logits of one position, float32."""
    student = torch.tensor(student)[:, None].requires_grad_()  # [V, 1], on hidden state 1
    one = torch.ones(1, 2, 1)
    teacher = torch.tensor(teacher)[:, None]
    kl = way.token_divergence(one, student, one, teacher, kind=kind, beta=beta)[0, 1]
    (kl * upstream).backward()
    return kl.item(), student.grad[:, 0]


@both
@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_where_probabilities_underflow(way, kind, beta):
    """Logits of +-1e4: one-hot distributions, with disjoint and with equal support."""
    kl, gradient = from_logits(way, [1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], kind, beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert kl == pytest.approx(entropy if kind == "jsd" else 2e4)
    assert gradient.tolist() == pytest.approx([1, -1, 0] if kind == "fkl" else [0, 0, 0])
    kl, gradient = from_logits(way, [1e4, -1e4, -1e4], [1e4, 0.0, -1e4], kind, beta)
    assert kl == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-6


@both
@pytest.mark.parametrize("kind, beta", KINDS)
def test_divergence_with_tokens_that_the_teacher_forbids(way, kind, beta):
    """-inf: q = 0.  Against that, m stays positive, and so do q's terms; rkl is infinite."""
    inf = float("inf")
    kl, gradient = from_logits(way, [1.0, 0.5, 0.0], [0.5, -inf, 0.0], kind, beta)
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
    kl, gradient = from_logits(way, [1.0, -1e4, 0.0], [0.5, -inf, 0.0], kind, beta)
    reference, expected = from_logits(way, [1.0, 0.0], [0.5, 0.0], kind, beta)
    assert kl == pytest.approx(reference, abs=1e-6)
    assert torch.allclose(gradient[[0, 2]], expected) and gradient[1] == 0
    # and where both say -inf, the value is still that of the others
    kl, _ = from_logits(way, [1.0, -inf, 0.0], [0.5, -inf, 0.0], kind, beta)
    assert kl == pytest.approx(reference, abs=1e-6)


@both
def test_an_infinite_position_that_the_loss_leaves_out_has_a_zero_gradient(way):
    """torch.where(isfinite(rkl), rkl, 0) must be enough: 0 * inf would be nan."""
    kl, gradient = from_logits(way, [1.0, 0.5], [0.0, -float("inf")], "rkl", upstream=0.0)
    assert kl == float("inf") and (gradient == 0).all()


@both
@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_masked_out_positions_may_hold_nan(way, kind):
    (h, w, th, tw), mask = pair()
    clean, dirty, dirty_teacher = h.clone(), h.clone(), th.clone()
    unread = ~torch.cat([mask[:, 1:], torch.zeros(B, 1, dtype=torch.bool)], dim=1)
    dirty[unread], dirty_teacher[unread] = float("nan"), float("nan")
    results = []
    for hidden, teacher in ((clean, th), (dirty, dirty_teacher)):
        hidden, weight = hidden.requires_grad_(), w.clone().requires_grad_()
        kl = way.token_divergence(hidden, weight, teacher, tw, mask_BT=mask, kind=kind)
        kl.sum().backward()
        results.append((kl, hidden.grad, weight.grad))
    for mine, reference in zip(*results, strict=True):
        assert torch.equal(mine, reference)


@both
@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_divergence_with_an_empty_mask_is_zero_and_so_is_its_gradient(way, kind):
    (h, w, th, tw), mask = pair()
    h.requires_grad_(), w.requires_grad_()
    kl = way.token_divergence(h, w, th, tw, mask_BT=torch.zeros_like(mask), kind=kind)
    kl.sum().backward()
    assert (kl == 0).all() and (h.grad == 0).all() and (w.grad == 0).all()


@both
@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
@pytest.mark.parametrize("length", [64, 512])
def test_divergence_without_tensors_of_positions_times_vocabulary(way, length, kind):
    """As above: at most chunk x V numbers with a vocabulary axis (the heads: V x D, V x E)."""
    (h, w, th, tw), _ = pair(torch.float32, length=length)
    chunk = 16
    with Largest() as seen:
        h, w = h.requires_grad_(), w.requires_grad_()
        kl = way.token_divergence(h, w, th, tw, kind=kind, temperature=0.7, chunk=chunk)
        kl.sum().backward()
    assert seen.wide == max(chunk * V, V * D, V * E)
    assert seen.any < B * length * V
    with Largest() as full:
        naive_divergence(h, w, th, tw, kind)
    assert full.wide == B * (length - 1) * V


@both
@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_divergence_leaves_its_arguments_alone(way, kind):
    models, mask = pair()
    before = [x.clone() for x in (*models, mask)]
    student = [x.requires_grad_() for x in models[:2]]
    way.token_divergence(*student, *models[2:], mask_BT=mask, kind=kind).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((*models, mask), before, strict=True))


def changed(change):
    """Arguments of a divergence, some of them changed."""
    (h, w, th, tw), _ = pair(torch.float32)
    names = ("hidden_BTD", "weight_VD", "teacher_hidden_BTE", "teacher_weight_VE")
    return dict(zip(names, (h, w, th, tw), strict=True)) | change


@both
@pytest.mark.parametrize("change, message", [
    ({"kind": "tv"}, r"kind must be in \('rkl', 'fkl', 'jsd'\), .* not 'tv', 0.5"),
    ({"beta": 0.0}, r"beta in \(0, 1\), not 'rkl', 0.0"),
    ({"beta": 1.0}, r"beta in \(0, 1\), not 'rkl', 1.0"),
    ({"beta": float("nan")}, "beta in .* nan"),
    ({"teacher_weight_VE": torch.zeros(V + 2, E)}, "vocab_size must cut 23 and 25 rows"),
    ({"teacher_weight_VE": torch.zeros(1, E)}, "vocab_size must cut 23 and 1 rows"),
    ({"weight_VD": torch.zeros(V + 2, D)}, "vocab_size must cut 25 and 23 rows"),
    ({"weight_VD": torch.zeros(V + 2, D), "vocab_size": V + 1}, "must be in 1..23, not 24"),
    ({"vocab_size": 0}, "vocab_size must be in 1..23, not 0"),
    ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
])  # fmt: skip
def test_a_divergence_that_would_be_wrong_in_silence_is_refused(way, change, message):
    with pytest.raises(ValueError, match=message):
        way.token_divergence(**changed(change))


@both
@pytest.mark.parametrize("change", [
    {"hidden_BTD": torch.zeros(B, D)},
    {"hidden_BTD": torch.zeros(B, T, 1, D)},
    {"teacher_hidden_BTE": torch.zeros(B, T + 1, E)},
    {"teacher_hidden_BTE": torch.zeros(B, T, 1, E)},
    {"weight_VD": torch.zeros(V, D + 1)},
    {"teacher_weight_VE": torch.zeros(V, D)},
    {"chunk": -1},
    {"mask_BT": torch.ones(B, T - 1, dtype=torch.bool)},
    {"teacher_hidden_BTE": torch.zeros(B, T, E).double()},
    {"hidden_BTD": torch.zeros(B, T, D).double()},
], ids="-".join)  # fmt: skip
def test_divergences_that_torch_refuses(way, change):
    with pytest.raises((RuntimeError, IndexError)):
        way.token_divergence(**changed(change))


@both
@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_divergence_of_real_models_under_autocast(way, kind):
    """Two architectures with one vocabulary; the student in bfloat16, its gradients in float32."""
    student, teacher = tiny_model("qwen3"), tiny_model("llama", seed=1)
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(0))
    weight, teacher_weight = (x.get_output_embeddings().weight for x in (student, teacher))

    def loss():
        with torch.no_grad():
            teacher_hidden = teacher.base_model(input_ids=ids, use_cache=False)[0]
        hidden = student.base_model(input_ids=ids, use_cache=False)[0]
        return way.token_divergence(hidden, weight, teacher_hidden, teacher_weight, kind=kind)

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


@both
@pytest.mark.parametrize("kind, beta", READS)
def test_nan_in_either_model_is_not_lost(way, kind, beta):
    """0 log 0 is 0, and nan is not."""
    for broken in range(2 if kind == "logprobs" else 4):
        models, _ = pair()
        models[broken][..., 0, 0] = float("nan")
        assert read(way, kind, beta, models, case()[2])[:, 1].isnan().all()


def test_nan_is_not_lost_in_statistics():
    hidden, weight, ids, _, _ = case()
    hidden[:, 0, 0] = float("nan")
    stats = logprobs.token_stats(hidden, weight, ids, top_k=2)
    for name in ("logp_BT", "max_prob_BT", "entropy_BT", "topk_logp_BTK"):
        assert getattr(stats, name)[:, 1].isnan().all(), name
        assert getattr(stats, name)[:, 2].isfinite().all(), name


@both
@pytest.mark.parametrize("kind, beta", READS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
def test_gradients_in_lower_precision(way, dtype, kind, beta):
    """bfloat16 models, and float32 models under autocast: gradients near those of float64."""
    models, _ = pair()
    models, ids = [x.bfloat16().double() for x in models], case()[2]
    upstream = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = [x.clone().requires_grad_(i < 2) for i, x in enumerate(models)]
    (upstream * read(way, kind, beta, exact, ids)).sum().backward()
    low = [x.to(dtype).requires_grad_(i < 2) for i, x in enumerate(models)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        out = read(way, kind, beta, low, ids, chunk=7)
    (upstream * out).sum().backward()
    assert out.dtype == torch.float32 and low[0].grad.dtype == low[1].grad.dtype == dtype
    for x, right in zip(low[:2], exact[:2], strict=True):
        assert 0 < (x.grad - right.grad).norm() < 0.02 * right.grad.norm()


@both
def test_the_heads_gradient_is_summed_in_float32(way):
    """One position per chunk, 600 equal ones: a sum in bfloat16 would stop growing at 256 times its
    terms.  Under autocast a float32 head gets 300.5, which bfloat16 cannot say."""
    for dtype, count in ((torch.bfloat16, 600), (torch.float32, 601)):
        hidden, weight = torch.ones(1, count + 1, 1, dtype=dtype), torch.zeros(2, 1, dtype=dtype)
        ids = torch.zeros(1, count + 1, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = way.token_logprobs(hidden, weight.requires_grad_(), ids, chunk=1)
        out.sum().backward()
        assert weight.grad.flatten().tolist() == [count / 2, -count / 2]


@both
@pytest.mark.parametrize("kind, beta", READS)
def test_a_second_derivative_is_refused(way, kind, beta):
    """It would be that of a gradient without history: wrong, in silence."""
    models, _ = pair()
    models = [x.requires_grad_(i < 2) for i, x in enumerate(models)]
    value = (read(way, kind, beta, models, case()[2]) ** 2).sum()
    gradient, *_ = torch.autograd.grad(value, models[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Heads(TorchDispatchMode):
    """The most tensors of the size of the head, or of the cut head, alive at one time: those that
    an operation made; views count with what they view."""

    def __init__(self, rows, width):
        super().__init__()
        self.shapes = {tuple(sorted((n, width))) for n in rows}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and tuple(sorted(x.shape)) in self.shapes:
                self.alive[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return out


@both
@pytest.mark.parametrize("vocab_size", [None, 15])
@pytest.mark.parametrize("kind, beta", READS)
def test_one_gradient_of_the_head_whatever_the_chunks(way, kind, beta, vocab_size):
    """Eight chunks, a head that is cut or not: only the gradient itself has the head's size. Full
    logits with a cut head take two, the cut one's gradient and the whole one's."""
    models, _ = pair(torch.float32)
    models = [x.requires_grad_(i < 2) for i, x in enumerate(models)]
    ids, how = case()[2] % 15, {"vocab_size": vocab_size, "chunk": 3}
    with Heads((V, 15), D) as seen:
        models[1].detach()  # a view of the argument: the one that is there anyway
        read(way, kind, beta, models, ids, **how).sum().backward()
    assert seen.most == 2 and models[1].grad.abs().sum() > 0
    hidden, weight = models[0].detach(), models[1].detach().requires_grad_()
    with Heads((V, 15), D) as seen:
        weight.detach()
        naive(hidden, weight, 15).sum().backward()
    assert seen.most == 3


@both
def test_heads_of_autocast_are_cast_once(way):
    """Beside the gradient there are the bfloat16 copy and one product in bfloat16."""
    models, _ = pair(torch.float32)
    models = [x.requires_grad_(i < 2) for i, x in enumerate(models)]
    with Heads((V, 15), D) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            out = way.token_logprobs(*models[:2], case()[2] % 15, vocab_size=15, chunk=3)
        out.sum().backward()
    assert 3 <= seen.most <= 4
