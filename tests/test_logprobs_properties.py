"""Properties of the public names of logprobs and fast.head."""

import math
import warnings

import torch
from hypothesis import strategies as st
from properties import finite, near, prop, same, seeded, seeds, small, spoilt

import logprobs
from fast import head

ways = st.sampled_from([logprobs, head])


@st.composite
def scored(draw, teacher=False):
    """Arguments of `token_logprobs`, or of `token_divergence`, small and consistent."""
    B, T, D, E = draw(small), draw(st.integers(1, 5)), draw(small), draw(small)
    V, more = draw(st.integers(2, 7)), draw(st.integers(0, 2))
    g, wide = seeded(draw(seeds)), draw(st.sampled_from([torch.float32, torch.float64]))
    x = {
        "hidden_BTD": torch.randn(B, T, D, generator=g, dtype=wide),
        "weight_VD": torch.randn(V, D, generator=g, dtype=wide) * 2,
    }
    if teacher:
        x["teacher_hidden_BTE"] = torch.randn(B, T, E, generator=g, dtype=wide)
        x["teacher_weight_VE"] = torch.randn(V + more, E, generator=g, dtype=wide) * 2
        x["beta"] = draw(st.floats(0.01, 0.99))
    cut = st.integers(1, V) if more and teacher else st.none() | st.integers(1, V)
    x["vocab_size"] = draw(cut)
    if not teacher:
        x["ids_BT"] = torch.randint(x["vocab_size"] or V, (B, T), generator=g)
    x["mask_BT"] = torch.rand(B, T, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    x["temperature"] = draw(st.sampled_from([1.0, 0.5, 3.0]))
    x["chunk"] = draw(st.none() | st.integers(1, 9))
    return x


def logp_by_hand(hidden_BTD, weight_VD, vocab_size, temperature=1.0):
    """Log-probs [B, T, V] of every token in float64; entry t from the hidden state at t - 1."""
    logits_BTV = hidden_BTD.double() @ weight_VD.double()[:vocab_size].T
    logp_BTV = (logits_BTV / temperature).log_softmax(-1)
    return torch.cat([logp_BTV[:, :1] * 0, logp_BTV[:, :-1]], dim=1)


def gradients(loss, *of):
    """Gradients of a scalar, 0 for what it does not depend on."""
    found = torch.autograd.grad(loss, of, allow_unused=True) if loss.requires_grad else [None] * 2
    return [torch.zeros_like(x) if g is None else g for x, g in zip(of, found, strict=True)]


@prop("logprobs.token_logprobs", "logprobs.token_stats", "fast.token_logprobs", examples=160,
      x=scored(), seed=seeds, K=small, way=ways)
def test_logprobs_equal_log_softmax_in_float64(x, seed, K, way):
    """Tokens, candidates, statistics; the gradients of a weighted sum are those of autograd."""
    h, w, wide = x["hidden_BTD"], x["weight_VD"], x["hidden_BTD"].dtype
    V, g = x["vocab_size"] or len(w), seeded(seed)
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    logp_BTV = logp_by_hand(h64, w64, V, x["temperature"])
    wanted_BT = x["mask_BT"].index_fill(1, torch.tensor([0]), False)
    ids_BTK = torch.randint(V, (*wanted_BT.shape, K), generator=g)
    right_BT = logp_BTV.gather(2, x["ids_BT"][..., None])[..., 0] * wanted_BT
    near(way.token_logprobs(**x), right_BT.detach(), wide)
    many_BTK = logp_BTV.detach().gather(2, ids_BTK) * wanted_BT[..., None]
    near(way.token_logprobs(**x, candidates_BTK=ids_BTK), many_BTK, wide)

    stats = logprobs.token_stats(**x, top_k=min(K, V), candidates_BTK=ids_BTK)
    p_BTV = logp_BTV.detach().exp()
    near(stats.logp_BT, right_BT.detach(), wide)
    near(stats.candidate_logp_BTK, many_BTK, wide)
    near(stats.max_prob_BT, p_BTV.amax(-1) * wanted_BT, wide)
    near(stats.entropy_BT, torch.special.entr(p_BTV).sum(-1) * wanted_BT, wide)
    best_BTK = logp_BTV.detach().topk(min(K, V)).values * wanted_BT[..., None]
    near(stats.topk_logp_BTK, best_BTK, wide)

    weight_BT = torch.randn(wanted_BT.shape, generator=g, dtype=wide)
    h, w = h.requires_grad_(), w.requires_grad_()
    more = {"hidden_BTD": h, "weight_VD": w} | ({"scale_BT": -weight_BT} if way is head else {})
    loss = (weight_BT * way.token_logprobs(**x | more)).sum()
    right = (weight_BT.double() * right_BT).sum()
    near(loss.detach(), right.detach(), wide)
    for mine, theirs in zip(gradients(loss, h, w), gradients(right, h64, w64), strict=True):
        near(mine, theirs, wide)


def divergence_by_hand(logp_BTV, logq_BTV, kind, beta):
    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind != "jsd":
        return kl(logp_BTV, logq_BTV) if kind == "rkl" else kl(logq_BTV, logp_BTV)
    m_BTV = (beta * logq_BTV.exp() + (1 - beta) * logp_BTV.exp()).log()
    return beta * kl(logq_BTV, m_BTV) + (1 - beta) * kl(logp_BTV, m_BTV)


@prop("logprobs.token_divergence", "fast.token_divergence", examples=160, x=scored(teacher=True),
      seed=seeds, kind=st.sampled_from(logprobs.DIVERGENCES), way=ways)
def test_divergences_equal_their_definition(x, seed, kind, way):
    """Not negative, 0 from oneself, bounded (jsd), and with the gradient of autograd."""
    h, w, wide = x["hidden_BTD"], x["weight_VD"], x["hidden_BTD"].dtype
    V = x["vocab_size"] or len(w)
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    logp_BTV = logp_by_hand(h64, w64, V, x["temperature"])
    logq_BTV = logp_by_hand(x["teacher_hidden_BTE"], x["teacher_weight_VE"], V)
    wanted_BT = x["mask_BT"].index_fill(1, torch.tensor([0]), False)
    right_BT = divergence_by_hand(logp_BTV, logq_BTV, kind, x["beta"]) * wanted_BT
    out_BT = way.token_divergence(**x, kind=kind)
    near(out_BT, right_BT.detach(), wide)
    assert bool((out_BT >= -2e-6).all())
    if kind == "jsd":
        most = -sum(b * math.log(b) for b in (x["beta"], 1 - x["beta"]))
        assert bool((out_BT <= most + 1e-5).all())
    own = x | {"teacher_hidden_BTE": h, "teacher_weight_VE": w, "temperature": 1.0}
    assert way.token_divergence(**own, kind=kind).abs().max() < 3e-6

    weight_BT = torch.randn(wanted_BT.shape, generator=seeded(seed), dtype=wide)
    h, w = h.requires_grad_(), w.requires_grad_()
    more = {"hidden_BTD": h, "weight_VD": w} | ({"scale_BT": -weight_BT} if way is head else {})
    loss = (weight_BT * way.token_divergence(**x | more, kind=kind)).sum()
    right = (weight_BT.double() * right_BT).sum()
    near(loss.detach(), right.detach(), wide)
    for mine, theirs in zip(gradients(loss, h, w), gradients(right, h64, w64), strict=True):
        near(mine, theirs, wide)


def raised_or(function, arguments):
    """The result, or None after an exception; the arguments stay as they are in either case."""
    plain = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    try:
        out = function(**arguments)
    except Exception:
        out = None
    assert all(same(plain[k], v) for k, v in arguments.items()), "an argument was changed"
    return out


@prop("logprobs.token_logprobs", "logprobs.token_stats", "logprobs.token_divergence",
      "fast.token_logprobs", "fast.token_divergence", examples=400, data=st.data(), way=ways,
      which=st.sampled_from(["logprobs", "stats", "divergence"]))
def test_bad_input_of_the_heads(data, which, way):
    """An exception, or numbers of the right shape: those of full logits where there are such, and
    finite where the input is."""
    divergence = which == "divergence"
    x = data.draw(scored(teacher=divergence))
    shape, rows = x["hidden_BTD"].shape[:2], x["vocab_size"] or len(x["weight_VD"])
    way = logprobs if which == "stats" else way
    if way is head:
        x["scale_BT"] = torch.ones(shape)
    if not divergence:
        x["candidates_BTK"] = torch.zeros(*shape, 2, dtype=torch.int64)
    if which == "stats":
        x["top_k"] = data.draw(st.integers(0, rows))
    name, bad = spoilt(data.draw, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # .T of what is no matrix
        out = raised_or(getattr(way, f"token_{which}"), bad)
    if out is None:
        return
    first = out.logp_BT if which == "stats" else out
    assert first.shape[:2] == bad["mask_BT"].shape
    if not finite(*(v for v in bad.values() if isinstance(v, torch.Tensor))):
        return
    assert finite(first), "finite input, but what comes out is not"
    wanted_BT = bad["mask_BT"].bool().index_fill(1, torch.tensor([0]), False)
    if not wanted_BT.any():
        assert (first == 0).all()
        return
    logp_BTV = logp_by_hand(
        bad["hidden_BTD"], bad["weight_VD"], bad["vocab_size"], bad["temperature"]
    )
    if divergence:
        teacher = bad["teacher_hidden_BTE"], bad["teacher_weight_VE"]
        logq_BTV = logp_by_hand(*teacher, bad["vocab_size"])
        right = divergence_by_hand(logp_BTV, logq_BTV, "rkl", bad["beta"]) * wanted_BT
    else:
        ids_BTK = bad["ids_BT"][..., None] if which == "stats" else bad["candidates_BTK"]
        right = logp_BTV.gather(2, ids_BTK * wanted_BT[..., None]) * wanted_BT[..., None]
        right = right[..., 0] if which == "stats" else right
    torch.testing.assert_close(first.double(), right, rtol=2e-2, atol=2e-2)
