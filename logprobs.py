"""Numbers read off the vocabulary head, in chunks of positions. Faster drop-ins: `fast/head.py`.

Float32 logits [B, T, V] of 16k tokens over 150,000 take 10 GB, their gradient as much again. Here
only those of `chunk` positions exist at a time; backward computes them again.

Alignment: `hidden[:, t-1]` predicts `ids[:, t]`. Entry t of a result describes token t. Entry 0
and entries outside `mask_BT` are 0; no logits are computed for them.
Precision: the product with the head runs in the type of the hidden states (under autocast, in
autocast's type), the rest in float32, or in float64 for float64 input. Units: nats.
Letters: B rows, T tokens, V vocabulary, D hidden width, E the teacher's hidden width,
K candidates, N selected positions, M of them with a gradient, C in a chunk.
"""

from dataclasses import dataclass

import torch

DIVERGENCES = ("rkl", "fkl", "jsd")


def _defaults(like_BT, mask_BT, temperature, chunk):
    """(mask, positions in a chunk), where None stands for the default."""
    if not temperature >= 1e-30:  # a lower one makes the logits infinite
        raise ValueError(f"temperature must be positive, not {temperature}")
    mask_BT = like_BT.new_ones(like_BT.shape[:2]) if mask_BT is None else mask_BT
    return mask_BT.bool(), chunk or (1024 if like_BT.is_cuda else 256)


def _flatten(hidden_BTD, weight_VD, mask_BT, vocab_size):
    """Hidden states [N, D] at the selected positions; the head, cut and detached; both cast."""
    if vocab_size is not None and not 1 <= vocab_size <= len(weight_VD):
        raise ValueError(f"vocab_size must be in 1..{len(weight_VD)}, not {vocab_size}")
    device = hidden_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    hidden_ND, head_VD = hidden_BTD[:, :-1][mask_BT[:, 1:]], weight_VD.detach()[:vocab_size]
    return hidden_ND.to(dtype=dtype), head_VD.to(dtype=dtype)


def _unflatten(value_N, mask_BT):
    """[N, ...] of the selected positions -> [B, T, ...], 0 elsewhere."""
    out_BT = value_N.new_zeros(*mask_BT.shape, *value_N.shape[1:])
    out_BT[:, 1:][mask_BT[:, 1:]] = value_N
    return out_BT


def _logits(hidden_CD, head_VD, temperature=1.0):
    """Logits / temperature [C, V], in float32 or float64."""
    logits_CV = torch.mm(hidden_CD, head_VD.T)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV if temperature == 1 else logits_CV.div_(temperature)


def _log_softmax(logits_CV, stop_class):
    """PyTorch's; but that adds up V numbers in a row on a CPU: at V = 262,144 it loses 1e-4."""
    logp_CV = (stop_class(logits_CV) if stop_class else logits_CV).log_softmax(dim=-1)
    return logp_CV if logp_CV.is_cuda else logp_CV - logp_CV.detach().logsumexp(-1, keepdim=True)


class StopClass(tuple):
    """Stop ids. Called on logits [..., V] it makes one outcome of them, the first, so that student
    and teacher agree on ending where they end by different ids."""

    def __call__(self, logits_V):
        index_E = torch.tensor(self, device=logits_V.device)
        total_1 = logits_V[..., index_E].logsumexp(dim=-1, keepdim=True)
        return logits_V.index_fill(-1, index_E, -torch.inf).index_copy(-1, index_E[:1], total_1)


class _OverChunks(torch.autograd.Function):
    """read(logits_CV, *rows_C) -> [C, K] on `chunk` positions at a time -> [N, K]:
    torch.utils.checkpoint with the products written out, one float32 gradient of the whole head."""

    @staticmethod
    def forward(ctx, read, chunk, temperature, hidden_ND, weight_VD, head_VD, *rows):
        ctx.save_for_backward(hidden_ND, weight_VD, head_VD, *rows)
        ctx.read, ctx.chunk, ctx.temperature = read, chunk, temperature
        parts = zip(*(x.split(chunk) for x in (hidden_ND, *rows)), strict=True)
        return torch.cat([read(_logits(h_CD, head_VD, temperature), *x) for h_CD, *x in parts])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NK):
        hidden_ND, weight_VD, head_VD, *rows = ctx.saved_tensors
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        wide, learns = grad_NK.dtype, ctx.needs_input_grad[4]  # a frozen head does not
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if learns else None
        used_M = (grad_NK != 0).any(dim=1).nonzero()[:, 0]  # elsewhere, 0 * inf would be nan
        for index_C in used_M.split(ctx.chunk):
            hidden_CD = hidden_ND[index_C]
            logits_CV = _logits(hidden_CD, head_VD, ctx.temperature).requires_grad_()
            with torch.enable_grad():
                value_CK = ctx.read(logits_CV, *(x[index_C] for x in rows))
            grad_CK = grad_NK[index_C] / ctx.temperature
            grad_CV = torch.autograd.grad(value_CK, logits_CV, grad_CK)[0].to(head_VD.dtype)
            grad_hidden_ND[index_C] = grad_CV @ head_VD
            if learns:
                grad_weight_VD[: len(head_VD)].addmm_(grad_CV.T.to(wide), hidden_CD.to(wide))
        return None, None, None, grad_hidden_ND, grad_weight_VD, None, *[None] * len(rows)


def token_logprobs(
    hidden_BTD, weight_VD, ids_BT, *, candidates_BTK=None, mask_BT=None, vocab_size=None,
    temperature=1.0, chunk=None, stop_class=None,
):  # fmt: skip
    """Log-prob of every token [B, T], or of candidates [B, T, K], in nats, with gradient.

    hidden_BTD, weight_VD: the backbone's last hidden states (after its final norm) and the output
    head; a bias or a soft cap on the logits is not supported.
    ids_BT, candidates_BTK: int64; with candidates, their log-probs and not those of `ids_BT`.
    mask_BT: bool, the positions that are wanted; default all. Time and memory follow its count.
    vocab_size: first rows of the head to use, where models pad theirs differently; default all.
    temperature: divides the logits. chunk: positions at a time; default 256, on a GPU 1024.
    stop_class: a StopClass, of whose ids `ids_BT` has the first only; default None, none.
    Raises ValueError: temperature not positive, vocab_size outside the head.

    >>> hidden = torch.zeros(1, 3, 2)                       # uniform over V = 4
    >>> token_logprobs(hidden, torch.zeros(4, 2), torch.tensor([[0, 3, 1]])).exp().tolist()
    [[1.0, 0.25, 0.25]]
    """
    mask_BT, chunk = _defaults(hidden_BTD, mask_BT, temperature, chunk)
    hidden_ND, head_VD = _flatten(hidden_BTD, weight_VD, mask_BT, vocab_size)
    ids_BTK = ids_BT[..., None] if candidates_BTK is None else candidates_BTK
    ids_NK = ids_BTK[:, 1:][mask_BT[:, 1:]]

    def read(logits_CV, ids_CK):
        return _log_softmax(logits_CV, stop_class).gather(1, ids_CK)

    logp_NK = _OverChunks.apply(read, chunk, temperature, hidden_ND, weight_VD, head_VD, ids_NK)
    return _unflatten(logp_NK[:, 0] if candidates_BTK is None else logp_NK, mask_BT)


@dataclass
class TokenStats:
    """Aligned with `ids_BT`, no gradient. A field that was not asked for is None."""

    logp_BT: torch.Tensor  # log-prob of ids_BT, nats
    max_prob_BT: torch.Tensor  # probability of the most likely token
    entropy_BT: torch.Tensor | None = None  # entropy of the whole distribution, nats
    topk_ids_BTK: torch.Tensor | None = None  # the K most likely tokens, best first
    topk_logp_BTK: torch.Tensor | None = None  # their log-probs
    candidate_logp_BTK: torch.Tensor | None = None  # log-probs of candidates_BTK


@torch.no_grad()
def token_stats(
    hidden_BTD, weight_VD, ids_BT, *, top_k=0, entropy=True, candidates_BTK=None, mask_BT=None,
    vocab_size=None, temperature=1.0, chunk=None, stop_class=None,
):  # fmt: skip
    """TokenStats: what scoring reads off the distributions, in one pass over the head.

    Arguments and errors as in `token_logprobs`, but the log-probs of `candidates_BTK` (for the
    release rule: the student's top K, scored by the teacher) come besides those of `ids_BT`.

    >>> stats = token_stats(torch.zeros(1, 2, 2), torch.zeros(4, 2), torch.tensor([[0, 3]]))
    >>> [round(x.flatten()[1].item(), 4) for x in (stats.entropy_BT, stats.max_prob_BT)]
    [1.3863, 0.25]
    """
    mask_BT, chunk = _defaults(hidden_BTD, mask_BT, temperature, chunk)
    hidden_ND, head_VD = _flatten(hidden_BTD, weight_VD, mask_BT, vocab_size)
    aligned = [ids_BT[..., None]] if candidates_BTK is None else [ids_BT[..., None], candidates_BTK]
    rows = hidden_ND, *(x_BTK[:, 1:][mask_BT[:, 1:]] for x_BTK in aligned)
    chunks = []
    for hidden_CD, ids_C1, *candidates in zip(*(x.split(chunk) for x in rows), strict=True):
        logp_CV = _log_softmax(_logits(hidden_CD, head_VD, temperature), stop_class)
        stats = {"logp_BT": logp_CV.gather(1, ids_C1)[:, 0], "max_prob_BT": logp_CV.amax(-1).exp()}
        for candidates_CK in candidates:
            stats["candidate_logp_BTK"] = logp_CV.gather(1, candidates_CK)
        if top_k:
            stats["topk_logp_BTK"], stats["topk_ids_BTK"] = logp_CV.topk(top_k, dim=-1)
        if entropy:
            stats["entropy_BT"] = torch.special.entr(logp_CV.exp()).sum(dim=-1)
        chunks.append(stats)
    return TokenStats(**{k: _unflatten(torch.cat([x[k] for x in chunks]), mask_BT) for k in stats})


def _kl(logp_CV, logq_CV):
    """KL(p || q) [C, 1], with 0 log 0 = 0 in value and gradient."""
    p_CV = logp_CV.exp()
    return (p_CV * torch.where(p_CV == 0, 0.0, logp_CV - logq_CV)).sum(dim=-1, keepdim=True)


def token_divergence(
    hidden_BTD, weight_VD, teacher_hidden_BTE, teacher_weight_VE, *, mask_BT=None, kind="rkl",
    beta=0.5, vocab_size=None, temperature=1.0, chunk=None, stop_class=None,
):  # fmt: skip
    """Divergence [B, T] of student p and teacher q, whole vocabulary, nats; with gradient in p.

        rkl  KL(p || q) = sum p (log p - log q)
        fkl  KL(q || p) = sum q (log q - log p)
        jsd  beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p     GKD, 2306.13649

    Other arguments and errors as in `token_logprobs`, and ValueError for an unknown kind, a beta
    outside (0, 1), heads of different size without vocab_size. `temperature` divides the student's
    logits only. Where q is 0 and p is not, rkl is inf and its gradient not finite.

    >>> student, teacher = torch.tensor([[3.0], [1.0]]).log(), torch.tensor([[1.0], [1.0]]).log()
    >>> hidden = torch.ones(1, 2, 1)                        # p = (3/4, 1/4), q = (1/2, 1/2)
    >>> kl = [token_divergence(hidden, student, hidden, teacher, kind=x) for x in DIVERGENCES]
    >>> [round(x[0, 1].item(), 4) for x in kl]
    [0.1308, 0.1438, 0.0338]
    """
    if kind not in DIVERGENCES or not 0 < beta < 1:
        raise ValueError(f"kind must be in {DIVERGENCES}, beta in (0, 1), not {kind!r}, {beta}")
    if vocab_size is None and len(weight_VD) != len(teacher_weight_VE):
        raise ValueError(f"vocab_size must cut {len(weight_VD)} and {len(teacher_weight_VE)} rows")
    mask_BT, chunk = _defaults(hidden_BTD, mask_BT, temperature, chunk)
    hidden_ND, head_VD = _flatten(hidden_BTD, weight_VD, mask_BT, vocab_size)
    teacher_NE, teacher_VE = _flatten(teacher_hidden_BTE, teacher_weight_VE, mask_BT, vocab_size)

    def read(logits_CV, teacher_CE):
        logp_CV = _log_softmax(logits_CV, stop_class)
        logq_CV = _log_softmax(_logits(teacher_CE, teacher_VE).to(logp_CV.dtype), stop_class)
        if kind != "jsd":
            return _kl(logp_CV, logq_CV) if kind == "rkl" else _kl(logq_CV, logp_CV)
        m_CV = beta * logq_CV.exp() + (1 - beta) * logp_CV.exp()
        logm_CV = m_CV.clamp(min=torch.finfo(m_CV.dtype).tiny).log()
        return beta * _kl(logq_CV, logm_CV) + (1 - beta) * _kl(logp_CV, logm_CV)

    tensors = hidden_ND, weight_VD, head_VD, teacher_NE
    return _unflatten(_OverChunks.apply(read, chunk, temperature, *tensors)[:, 0], mask_BT)
