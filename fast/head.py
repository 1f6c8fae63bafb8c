"""`token_logprobs` and `token_divergence` of logprobs.py, faster: same arguments, same results.

The gradient in the logits is written out, in buffers that every chunk uses again: on a CPU, the
first touch of new memory takes as long as several passes over it. And one more argument, `scale_BT`
[B, T], is what the loss multiplies every number by, up to one common factor:

    scale_BT = -weight_BT * advantage_BT
    logp_BT = token_logprobs(hidden_BTD, weight_VD, ids_BT, scale_BT=scale_BT)
    loss = processes * (scale_BT * logp_BT).sum()

With it the gradient is computed along with the numbers, as in fused cross-entropy kernels: three
products of head size, as with full logits, not four. Backward compares the gradient that arrives
with `scale_BT`: if they are proportional, it multiplies by the factor, if not, it starts again.
"""

import math

import torch

from logprobs import DIVERGENCES, _defaults, _flatten, _unflatten


def _logits(hidden_CD, head_VD, temperature, out_CV):
    """Write logits / temperature to `out_CV`, float32 or float64."""
    if hidden_CD.dtype == out_CV.dtype:
        torch.mm(hidden_CD, head_VD.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CD @ head_VD.T)
    if temperature != 1:
        out_CV.div_(temperature)


def _merge_(logits_CV, stop_class):
    """`stop_class(logits)`, in place; returns the share of every id in their outcome [C, E]."""
    ids_E = list(stop_class)
    stops_CE, logits_CV[:, ids_E] = logits_CV[:, ids_E], -math.inf
    logits_CV[:, ids_E[0]] = stops_CE.logsumexp(dim=-1)
    return stops_CE.softmax(dim=-1)


def _softmax(logits_CV, out_CV):
    """Write the probabilities to `out_CV`; returns the logits' log-sum-exp [C, 1]: logit - log p of
    any token, and for the most likely one log p is accurate, and cheap."""
    torch.softmax(logits_CV, dim=-1, out=out_CV)
    if not out_CV.is_cuda:  # a CPU's softmax adds up carelessly: see logprobs._log_softmax
        out_CV.div_(out_CV.sum(dim=-1, keepdim=True))
    return logits_CV.amax(dim=-1, keepdim=True) - out_CV.amax(dim=-1, keepdim=True).log()


def _zero_nan_(terms_CV):
    """0 log 0 = 0. A nan among the logits still shows in the value, by their log-sum-exp."""
    return terms_CV.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


# Each of the next four returns numbers [C, K] of a chunk and, if there is a scale, the gradient
# [C, V] of sum scale * numbers in the student's logits z. It overwrites all [C, V] arguments.


def _read_logprobs(logits_CV, ids_CK, scale_CK, p_CV):
    """log p_k of the tokens `ids`;  d/dz = onehot(id_k) - p."""
    logp_CK = logits_CV.gather(1, ids_CK) - _softmax(logits_CV, p_CV)
    if scale_CK is not None:
        p_CV.mul_(-scale_CK.sum(dim=1, keepdim=True)).scatter_add_(1, ids_CK, scale_CK)
    return logp_CK, p_CV


def _read_rkl(logits_CV, teacher_CV, scale_C1, p_CV):
    """KL(p || q) = sum p (log p - log q);  d/dz = p (log p - log q - KL(p || q)). There, z - y may
    stand for log p - log q (y the teacher's logits): the constant between them cancels."""
    teacher_lse_C1, lse_C1 = _softmax(teacher_CV, p_CV), _softmax(logits_CV, p_CV)
    terms_CV = _zero_nan_(torch.sub(logits_CV, teacher_CV, out=teacher_CV).mul_(p_CV))
    total_C1 = terms_CV.sum(dim=-1, keepdim=True)
    if scale_C1 is not None:
        terms_CV.addcmul_(p_CV, total_C1, value=-1).mul_(scale_C1)
    return total_C1 - lse_C1 + teacher_lse_C1, terms_CV


def _read_fkl(logits_CV, teacher_CV, scale_C1, q_CV):
    """KL(q || p) = sum q (log q - log p);  d/dz = p - q."""
    teacher_lse_C1 = _softmax(teacher_CV, q_CV)
    terms_CV = _zero_nan_(teacher_CV.sub_(logits_CV).mul_(q_CV))
    total_C1 = terms_CV.sum(dim=-1, keepdim=True)
    lse_C1 = _softmax(logits_CV, terms_CV)  # p, in the memory of the terms
    if scale_C1 is not None:
        terms_CV.sub_(q_CV).mul_(scale_C1)
    return total_C1 - teacher_lse_C1 + lse_C1, terms_CV


def _read_jsd(logits_CV, teacher_CV, scale_C1, p_CV, ratio_CV, beta):
    """beta KL(q || m) + (1 - beta) KL(p || m);  d/dz = (1 - beta) p (log(p/m) - KL(p || m)).
    p / m is at most 1 / (1 - beta) and q / m at most 1 / beta, so that nothing overflows."""
    tiny = torch.finfo(p_CV.dtype).tiny  # in the place of 0, before it is divided by or its log is
    _softmax(logits_CV, p_CV)  # taken: p and q are 0 there
    _softmax(teacher_CV, q_CV := logits_CV)
    m_CV = torch.lerp(p_CV, q_CV, beta, out=teacher_CV).clamp_(min=tiny)
    kl = []
    for a_CV in (q_CV, p_CV):
        terms_CV = torch.div(a_CV, m_CV, out=ratio_CV).clamp_(min=tiny).log_().mul_(a_CV)
        kl.append(terms_CV.sum(dim=-1, keepdim=True))
    kl_q_C1, kl_p_C1 = kl
    if scale_C1 is not None:
        terms_CV.addcmul_(p_CV, kl_p_C1, value=-1).mul_((1 - beta) * scale_C1)
    return beta * kl_q_C1 + (1 - beta) * kl_p_C1, terms_CV


def _sweep(how, tensors, index_M, scale_NK=None, wants=(False, False)):
    """Numbers [M, K] at these positions, chunk by chunk, and the gradients of sum scale * numbers
    in hidden states and in the whole head, None where it is not wanted.

    how: reader, number of buffers, temperature, chunk, stop class. tensors: hidden [N, D], head
    [V, D], head cut, and for the reader ids of tokens [N, K] or the teacher's hidden [N, E]."""
    hidden_ND, weight_VD, head_VD, own_N = tensors
    read, count, temperature, chunk, stop_class = how
    wide = torch.promote_types(head_VD.dtype, torch.float32)
    grad_hidden_ND = torch.zeros_like(hidden_ND) if wants[0] else None
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants[1] else None
    shape, numbers = (min(chunk, len(index_M)), len(head_VD)), []
    buffers = [head_VD.new_empty(shape, dtype=wide) for _ in range(count)]
    for index_C in index_M.tensor_split(max(1, math.ceil(len(index_M) / chunk))):
        hidden_CD = hidden_ND[index_C]
        logits_CV, *spare = (buffer_CV[: len(index_C)] for buffer_CV in buffers)
        _logits(hidden_CD, head_VD, temperature, logits_CV)
        share_CE = _merge_(logits_CV, stop_class) if stop_class else None
        scale_CK = scale_NK[index_C] / temperature if any(wants) else None
        numbers_CK, grad_CV = read(logits_CV, own_N[index_C], scale_CK, *spare)
        if stop_class:  # every stop id's share of their outcome's gradient
            grad_CV[:, list(stop_class)] = grad_CV[:, stop_class[0], None] * share_CE
        numbers.append(numbers_CK)
        grad_CV = grad_CV.to(head_VD.dtype)
        if wants[0]:
            grad_hidden_ND[index_C] = grad_CV @ head_VD
        if wants[1] and head_VD.dtype == wide:
            grad_weight_VD[: len(head_VD)].addmm_(grad_CV.T, hidden_CD)
        elif wants[1]:
            grad_weight_VD[: len(head_VD)] += grad_CV.T @ hidden_CD
    return torch.cat(numbers), grad_hidden_ND, grad_weight_VD


def _common_factor(grad_NK, scale_NK):
    """The number f with grad = f * scale, up to rounding; None if there is none."""
    grad_NK, scale_NK, eps = grad_NK.double(), scale_NK.double(), torch.finfo(grad_NK.dtype).eps
    factor = (grad_NK * scale_NK).sum() / (scale_NK * scale_NK).sum().clamp(min=1e-300)
    near_NK = (grad_NK - factor * scale_NK).abs() <= 16 * eps * grad_NK.abs()
    return factor.item() if near_NK.all() else None


class _Numbers(torch.autograd.Function):
    """What is read [N, K]. Where the scale is not 0, forward computes the gradient too."""

    @staticmethod
    def forward(ctx, how, scale_NK, *tensors):
        ctx.how, ctx.gradients = how, None
        used_N = (scale_NK != 0).any(dim=1)
        rest_MK = _sweep(how, tensors, (~used_N).nonzero()[:, 0])[0]
        scale_NK = scale_NK.expand(-1, rest_MK.shape[1])
        ctx.save_for_backward(scale_NK, *tensors)
        numbers_NK = torch.empty_like(scale_NK)
        numbers_NK[~used_N] = rest_MK
        if used_N.any():
            index_M, wants = used_N.nonzero()[:, 0], ctx.needs_input_grad[2:4]
            numbers_NK[used_N], *ctx.gradients = _sweep(how, tensors, index_M, scale_NK, wants)
        return numbers_NK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NK):
        scale_NK, *tensors = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # a second backward computes them again
        factor = None if gradients is None else _common_factor(grad_NK, scale_NK)
        if factor is None:
            del gradients
            index_M = (grad_NK != 0).any(dim=1).nonzero()[:, 0]  # elsewhere, 0 * inf would be nan
            _, *gradients = _sweep(ctx.how, tensors, index_M, grad_NK, ctx.needs_input_grad[2:4])
        elif factor != 1:
            gradients = [None if x is None else x.mul_(factor) for x in gradients]
        return None, None, *gradients, None, None


def _apply(how, hidden_BTD, weight_VD, own_N, mask_BT, vocab_size, scale_BT):
    """What `how` reads off the student's head [B, T, K]; `own_N` as in `_sweep`."""
    hidden_ND, head_VD = _flatten(hidden_BTD, weight_VD, mask_BT, vocab_size)
    if scale_BT is None or not torch.is_grad_enabled():
        scale_BT = torch.zeros_like(mask_BT)
    scale_BTK = scale_BT.detach() if scale_BT.dim() == 3 else scale_BT.detach()[..., None]
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    scale_NK = scale_BTK[:, 1:][mask_BT[:, 1:]].to(wide)
    return _unflatten(_Numbers.apply(how, scale_NK, hidden_ND, weight_VD, head_VD, own_N), mask_BT)


def token_logprobs(
    hidden_BTD, weight_VD, ids_BT, *, candidates_BTK=None, mask_BT=None, vocab_size=None,
    temperature=1.0, chunk=None, stop_class=None, scale_BT=None,
):  # fmt: skip
    """As in logprobs.py. With candidates, `scale_BT` may be [B, T, K], one for each.

    >>> hidden = torch.zeros(1, 3, 2)                       # uniform over V = 4
    >>> token_logprobs(hidden, torch.zeros(4, 2), torch.tensor([[0, 3, 1]])).exp().tolist()
    [[1.0, 0.25, 0.25]]
    """
    mask_BT, chunk = _defaults(ids_BT, mask_BT, temperature, chunk)
    ids_BTK = ids_BT[..., None] if candidates_BTK is None else candidates_BTK
    how = _read_logprobs, 2, temperature, chunk, stop_class
    ids_NK = ids_BTK[:, 1:][mask_BT[:, 1:]]
    logp_BTK = _apply(how, hidden_BTD, weight_VD, ids_NK, mask_BT, vocab_size, scale_BT)
    return logp_BTK[..., 0] if candidates_BTK is None else logp_BTK


def token_divergence(
    hidden_BTD, weight_VD, teacher_hidden_BTE, teacher_weight_VE, *, mask_BT=None, kind="rkl",
    beta=0.5, vocab_size=None, temperature=1.0, chunk=None, stop_class=None, scale_BT=None,
):  # fmt: skip
    """As in logprobs.py.

    >>> student, teacher = torch.tensor([[3.0], [1.0]]).log(), torch.tensor([[1.0], [1.0]]).log()
    >>> hidden = torch.ones(1, 2, 1)                        # p = (3/4, 1/4), q = (1/2, 1/2)
    >>> round(token_divergence(hidden, student, hidden, teacher)[0, 1].item(), 4)
    0.1308
    """
    if kind not in DIVERGENCES or not 0 < beta < 1:
        raise ValueError(f"kind must be in {DIVERGENCES}, beta in (0, 1), not {kind!r}, {beta}")
    if vocab_size is None and len(weight_VD) != len(teacher_weight_VE):
        raise ValueError(f"vocab_size must cut {len(weight_VD)} and {len(teacher_weight_VE)} rows")
    mask_BT, chunk = _defaults(hidden_BTD, mask_BT, temperature, chunk)
    teacher_NE, teacher_VE = _flatten(teacher_hidden_BTE, teacher_weight_VE, mask_BT, vocab_size)

    def read(logits_CV, teacher_CE, scale_C1, teacher_CV, *spare):
        _logits(teacher_CE, teacher_VE, 1.0, teacher_CV)
        if stop_class:
            _merge_(teacher_CV, stop_class)
        if kind == "jsd":
            return _read_jsd(logits_CV, teacher_CV, scale_C1, *spare, beta)
        return (_read_rkl if kind == "rkl" else _read_fkl)(logits_CV, teacher_CV, scale_C1, *spare)

    how = read, 4 if kind == "jsd" else 3, temperature, chunk, stop_class
    return _apply(how, hidden_BTD, weight_VD, teacher_NE, mask_BT, vocab_size, scale_BT)[..., 0]
