"""logprobs against full-logit float64 references, in value, gradient and memory."""

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import logprobs

B, T, V, D, K = 3, 9, 23, 6, 4


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
