"""What a vocabulary distribution says, in chunks of positions: no [B, T, V] tensor ever exists.

On-policy distillation scores every sampled token under two models whose vocabularies hold some
150,000 entries: full float32 logits of 16k tokens take 10 GB, their gradient as much again.  Here
the output head is applied to `chunk` positions at a time, every number that is wanted is read off
that piece, and the piece is thrown away.

  token_logprobs   log-prob of given tokens, or of several candidates per position, with gradient:
                   for the student.
  token_stats      log-prob of given tokens, entropy, maximum probability, top-K ids and their
                   log-probs, log-probs at given candidate ids, without gradient: for the teacher.
  token_divergence reverse KL, forward KL or generalised Jensen-Shannon divergence between student
                   and teacher, exact over the whole vocabulary, with gradient in the student:
                   the loss in place of a sampled estimate of it.

Training needs no more memory than scoring.  Where the weight of every token in the loss is known
beforehand, as in a policy gradient, the two functions with a gradient take it (`loss_weight_BT`),
return the weighted sum, and compute its gradient in the same pass over the chunks, as fused
cross-entropy kernels do: three products of head size, what full logits take too.  Where it is not
(a ratio, a renormalisation), backward computes the logits again: four.

Alignment, everywhere: `hidden[:, t-1]` predicts `ids[:, t]`.  Results are shaped like `ids` and
entry t describes token t, or the distributions that it is drawn from; entry 0, which nothing
predicts, is 0, as are positions outside `mask_BT`, for which no logits are computed.

Precision: the matrix product runs in the type of the hidden states (under autocast: in autocast's
type), everything after it in float32, or float64 for float64 input.  Natural logarithms: nats.

Vocabulary: checkpoints of one family pad their heads differently (151936 and 152064 rows for the
same tokenizer).  `vocab_size` cuts the head *before* the softmax, so that student and teacher are
normalised over the same set.

Letters: B rows, T tokens, V vocabulary, D hidden width, E the teacher's hidden width,
K candidates, N selected positions, C positions in a chunk.
"""

import math
import platform
from dataclasses import dataclass
from numbers import Integral

import torch

DIVERGENCES = ("rkl", "fkl", "jsd")
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
COLDEST = 1e-30  # logits divided by less than this overflow in float32
LARGE = 2**18  # entries of a head; below, oneDNN's preparations take longer than it saves
BUFFERS = {"logprobs": 2, "rkl": 3, "fkl": 3, "jsd": 4}  # [chunk, V] each


@dataclass
class TokenStats:
    """No gradient.  A field that was not asked for is None.

    logp_BT            log-prob of `ids_BT`, nats
    max_prob_BT        probability of the most likely token
    entropy_BT         entropy of the whole distribution, nats
    topk_ids_BTK       the K most likely tokens, best first
    topk_logp_BTK      their log-probs
    candidate_logp_BTK log-probs at the ids in `candidates_BTK`
    """

    logp_BT: torch.Tensor
    max_prob_BT: torch.Tensor
    entropy_BT: torch.Tensor | None = None
    topk_ids_BTK: torch.Tensor | None = None
    topk_logp_BTK: torch.Tensor | None = None
    candidate_logp_BTK: torch.Tensor | None = None


def _chunk_size(chunk: int | None, weight_VD: torch.Tensor) -> int:
    """Positions in a chunk.  On a CPU 256: half as many slow the matrix products by up to 5% (width
    1024), twice as many the passes over the logits by up to 15% (width 128)."""
    return chunk or (1024 if weight_VD.is_cuda else 256)


def _buffers(count: int, rows: int, weight_VD, wide: torch.dtype) -> list[torch.Tensor]:
    """Memory [rows, V] that every chunk writes again: on a CPU, the first touch of new memory takes
    as long as several passes over it."""
    return [weight_VD.new_empty(rows, len(weight_VD), dtype=wide) for _ in range(count)]


def _by_onednn(weight_VD: torch.Tensor) -> bool:
    """Whether products with this head should go to oneDNN: on a CPU, in float32, large matrices.
    PyTorch's own choice, MKL, takes longer on AMD's Zen 5.  The entry, `_linear_pointwise(x, w,
    ...)` = x @ w.T, is one that PyTorch's compiler uses; where it is missing, so be it."""
    suits = weight_VD.device.type == "cpu" and weight_VD.dtype == torch.float32
    return HAS_ONEDNN and suits and weight_VD.numel() >= LARGE


def _logits(hidden_CD, weight_VD, temperature: float, out_CV: torch.Tensor) -> None:
    """Write logits / temperature to `out_CV`, float32 or float64."""
    if _by_onednn(weight_VD):
        out_CV.copy_(torch.ops.mkldnn._linear_pointwise(hidden_CD, weight_VD, None, "none", [], ""))
    elif hidden_CD.dtype == out_CV.dtype:
        torch.mm(hidden_CD, weight_VD.T, out=out_CV)
    else:
        out_CV.copy_(hidden_CD @ weight_VD.T)
    if temperature != 1.0:
        out_CV.div_(temperature)


def _softmax(logits_CV: torch.Tensor, out_CV: torch.Tensor) -> torch.Tensor:
    """Write the probabilities to `out_CV`; returns the logits' log-sum-exp [C, 1].

    It is logit - log p of any token: the most likely one, whose p is at least 1 / V, gives it
    without another pass of exponentials.
    """
    torch.softmax(logits_CV, dim=-1, out=out_CV)
    return logits_CV.amax(dim=-1, keepdim=True) - out_CV.amax(dim=-1, keepdim=True).log()


def _zero_nan_(terms_CV: torch.Tensor) -> torch.Tensor:
    """0 log 0 = 0.  A nan among the logits still shows in the value, by their log-sum-exp."""
    return terms_CV.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


# The next four read one number or K off every position of a chunk.  Each takes the student's
# logits z, more buffers [C, V], and `scale`, the weight of every number in the loss, or None.  It
# returns the numbers [C, K] and, if there is a scale, the gradient in z of sum scale * numbers.
# Except for the scale it overwrites what it takes.


def _read_logprobs(logits_CV, p_CV, ids_CK, scale_CK):
    """log p_k of the tokens `ids`;  d/dz = onehot(id_k) - p."""
    logp_CK = logits_CV.gather(1, ids_CK) - _softmax(logits_CV, p_CV)
    if scale_CK is None:
        return logp_CK, None
    p_CV.mul_(-scale_CK.sum(dim=1, keepdim=True))
    return logp_CK, p_CV.scatter_add_(1, ids_CK, scale_CK)


def _read_rkl(logits_CV, teacher_CV, p_CV, scale_C1):
    """KL(p || q) = sum p (log p - log q);  d/dz = p (log p - log q - KL(p || q)).

    With y the teacher's logits, log p - log q is z - y plus a number that is the same for all
    tokens, which the gradient does not see: p (z - y - sum p (z - y)).
    """
    teacher_lse_C1, lse_C1 = _softmax(teacher_CV, p_CV), _softmax(logits_CV, p_CV)
    terms_CV = _zero_nan_(torch.sub(logits_CV, teacher_CV, out=teacher_CV).mul_(p_CV))
    total_C1 = terms_CV.sum(dim=-1, keepdim=True)
    if scale_C1 is not None:
        terms_CV.addcmul_(p_CV, total_C1, value=-1).mul_(scale_C1)
    return total_C1 - lse_C1 + teacher_lse_C1, terms_CV


def _read_fkl(logits_CV, teacher_CV, q_CV, scale_C1):
    """KL(q || p) = sum q (log q - log p);  d/dz = p - q."""
    teacher_lse_C1 = _softmax(teacher_CV, q_CV)
    terms_CV = _zero_nan_(teacher_CV.sub_(logits_CV).mul_(q_CV))
    total_C1 = terms_CV.sum(dim=-1, keepdim=True)
    p_CV = terms_CV
    lse_C1 = _softmax(logits_CV, p_CV)
    if scale_C1 is not None:
        p_CV.sub_(q_CV).mul_(scale_C1)
    return total_C1 - teacher_lse_C1 + lse_C1, p_CV


def _read_jsd(logits_CV, teacher_CV, p_CV, ratio_CV, scale_C1, beta):
    """beta KL(q || m) + (1 - beta) KL(p || m);  d/dz = (1 - beta) p (log(p/m) - KL(p || m)).

    p / m is at most 1 / (1 - beta) and q / m at most 1 / beta, so that nothing overflows.
    """
    tiny = torch.finfo(p_CV.dtype).tiny  # in the place of 0, before it is divided by or its log is
    torch.softmax(logits_CV, dim=-1, out=p_CV)  # taken: p and q are 0 there
    q_CV = torch.softmax(teacher_CV, dim=-1, out=logits_CV)
    m_CV = torch.lerp(p_CV, q_CV, beta, out=teacher_CV).clamp_(min=tiny)
    kl = []
    for a_CV in (q_CV, p_CV):
        terms_CV = torch.div(a_CV, m_CV, out=ratio_CV).clamp_(min=tiny).log_().mul_(a_CV)
        kl.append(terms_CV.sum(dim=-1, keepdim=True))
    kl_q_C1, kl_p_C1 = kl
    if scale_C1 is not None:
        terms_CV.addcmul_(p_CV, kl_p_C1, value=-1).mul_((1 - beta) * scale_C1)
    return beta * kl_q_C1 + (1 - beta) * kl_p_C1, terms_CV


@dataclass(frozen=True)
class _Plan:
    """What to read, "logprobs" or one of `DIVERGENCES`, and how."""

    kind: str
    temperature: float
    chunk: int
    beta: float = 0.5

    def read(self, logits_CV, spare, own_C, teacher_weight_VE, scale_CK):
        """Numbers [C, K] and gradient of one chunk; `own_C` as in `_sweep`."""
        if self.kind == "logprobs":
            return _read_logprobs(logits_CV, *spare, own_C, scale_CK)
        _logits(own_C, teacher_weight_VE, 1.0, spare[0])
        if self.kind == "jsd":
            return _read_jsd(logits_CV, *spare, scale_CK, self.beta)
        return {"rkl": _read_rkl, "fkl": _read_fkl}[self.kind](logits_CV, *spare, scale_CK)


def _sweep(plan: _Plan, hidden_ND, weight_VD, own_N, teacher_weight_VE, scale_NK, wants):
    """All positions, chunk by chunk: logits, numbers and, where it is wanted, gradient.

    Args:
        own_N: per position, the tokens' ids [N, K] or the teacher's hidden states [N, E].
        scale_NK: weights in the loss; None is 1, and positions where all are 0 are passed over:
            0 times an infinite divergence would be nan.
        wants: whether the gradients of the sum in hidden_ND and in weight_VD are.

    Returns:
        the numbers [M, K], the indices [M] of their positions, d hidden [N, D], d weight [V, D],
        each of the last two None where it is not wanted.
    """
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    if scale_NK is None:
        index_M = torch.arange(len(hidden_ND), device=hidden_ND.device)
    else:
        index_M = (scale_NK != 0).any(dim=1).nonzero()[:, 0]
    # the logits' gradient G gives d hidden = G weight, d weight = G^T hidden
    grad_hidden_ND = torch.zeros_like(hidden_ND) if wants[0] else None
    # one term per chunk: sum them in float32 at least
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants[1] else None
    rows = min(plan.chunk, len(index_M))
    buffers = _buffers(BUFFERS[plan.kind], rows, weight_VD, wide)
    numbers = []
    for index_C in index_M.tensor_split(max(1, math.ceil(len(index_M) / plan.chunk))):
        hidden_CD = hidden_ND[index_C]
        logits_CV, *spare = (buffer[: len(index_C)] for buffer in buffers)
        _logits(hidden_CD, weight_VD, plan.temperature, logits_CV)
        scale_CK = scale_NK[index_C] / plan.temperature if any(wants) else None
        numbers_CK, grad_CV = plan.read(
            logits_CV, spare, own_N[index_C], teacher_weight_VE, scale_CK
        )
        numbers.append(numbers_CK)
        if any(wants):
            grad_CV = grad_CV.to(weight_VD.dtype)
        if wants[0] and _by_onednn(weight_VD):
            grad_hidden_ND[index_C] = torch.ops.mkldnn._linear_pointwise(
                grad_CV, weight_VD.T, None, "none", [], ""
            )
        elif wants[0]:
            grad_hidden_ND[index_C] = grad_CV @ weight_VD
        if wants[1] and weight_VD.dtype == wide:
            grad_weight_VD.addmm_(grad_CV.T, hidden_CD)
        elif wants[1]:
            grad_weight_VD += grad_CV.T @ hidden_CD
    if wants[1]:
        grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
    return torch.cat(numbers), index_M, grad_hidden_ND, grad_weight_VD


class _Numbers(torch.autograd.Function):
    """What `plan` reads, [N, K].  Backward, where their weights in the loss become known, computes
    the logits again."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, own_N, teacher_weight_VE, plan):
        tensors = hidden_ND, weight_VD, own_N, teacher_weight_VE
        ctx.save_for_backward(*tensors)
        ctx.plan = plan
        return _sweep(plan, *tensors, None, (False, False))[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NK):
        wants = ctx.needs_input_grad[:2]
        _, _, *gradients = _sweep(ctx.plan, *ctx.saved_tensors, grad_NK, wants)
        return *gradients, None, None, None


class _WeightedSum(torch.autograd.Function):
    """sum scale * what `plan` reads, a scalar.  The gradients are computed along with it, while the
    logits are there; backward only multiplies them, in place, so it can be done once."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, own_N, teacher_weight_VE, plan, scale_NK, wants):
        tensors = hidden_ND, weight_VD, own_N, teacher_weight_VE
        numbers_MK, index_M, *ctx.gradients = _sweep(plan, *tensors, scale_NK, wants)
        return (numbers_MK * scale_NK[index_M]).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("loss_weight_BT: backward can be called once, or do without it")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad) for g in gradients), *[None] * 5


def _apply(plan: _Plan, tensors: tuple, scale_N, select_BT) -> torch.Tensor:
    """`plan` on the four tensors that both classes take: the numbers [B, T, K], or with `scale_N`
    their weighted sum, a scalar."""
    if scale_N is None:
        return _unflatten(_Numbers.apply(*tensors, plan), select_BT)
    wants = [torch.is_grad_enabled() and x.requires_grad for x in tensors[:2]]
    return _WeightedSum.apply(*tensors, plan, scale_N[:, None], wants)


def _select(mask_BT, like_BT, temperature, chunk) -> torch.Tensor:
    """Check the arguments that concern positions: the selected ones, [B, T-1]."""
    if not temperature >= COLDEST:
        raise ValueError(f"temperature must be positive, not {temperature}; at least {COLDEST}")
    if like_BT.shape[1] == 0:
        raise ValueError(f"hidden_BTD and ids_BT hold no tokens: {tuple(like_BT.shape)}")
    if chunk is not None and not (isinstance(chunk, Integral) and chunk >= 1):
        raise ValueError(f"chunk must be at least 1 position, not {chunk}")
    if mask_BT is None:
        mask_BT = torch.ones_like(like_BT, dtype=torch.bool)
    elif mask_BT.shape != like_BT.shape or mask_BT.dtype != torch.bool:
        raise ValueError(f"mask_BT must be a bool tensor of shape {tuple(like_BT.shape)}")
    return mask_BT[:, 1:]


def _flatten(hidden_BTD, weight_VD, select_BT, vocab_size, names=("hidden_BTD", "weight_VD")):
    """Check one model's arguments and flatten: hidden [N, D] at the selected positions and the cut
    head, both in the type of the matrix product."""
    if weight_VD.dim() != 2 or weight_VD.shape[1] != hidden_BTD.shape[2]:
        raise ValueError(
            f"{names[1]} {tuple(weight_VD.shape)} does not fit hidden width {hidden_BTD.shape[2]}"
        )
    vocab_size = weight_VD.shape[0] if vocab_size is None else vocab_size
    if not isinstance(vocab_size, Integral) or not 1 <= vocab_size <= weight_VD.shape[0]:
        raise ValueError(f"vocab_size must be in 1..{weight_VD.shape[0]}, not {vocab_size}")
    hidden_ND = hidden_BTD[:, :-1][select_BT]
    if vocab_size < len(weight_VD):  # the gradient of a slice is a copy of the whole
        weight_VD = weight_VD[:vocab_size]
    device = hidden_BTD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    elif hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(f"{names[0]} is {hidden_ND.dtype} but {names[1]} is {weight_VD.dtype}")
    return hidden_ND, weight_VD


def _prepare(hidden_BTD, weight_VD, ids_BT, mask_BT, vocab_size, temperature, chunk):
    """Check the arguments and flatten: the selected positions [B, T-1], hidden [N, D], ids [N]."""
    if hidden_BTD.dim() != 3 or hidden_BTD.shape[:2] != ids_BT.shape:
        raise ValueError(
            f"hidden_BTD {tuple(hidden_BTD.shape)} and ids_BT {tuple(ids_BT.shape)} do not fit: "
            "expected [B, T, D] and [B, T]"
        )
    if ids_BT.dtype != torch.int64:
        raise ValueError(f"ids_BT must be int64, not {ids_BT.dtype}")
    select_BT = _select(mask_BT, ids_BT, temperature, chunk)
    hidden_ND, weight_VD = _flatten(hidden_BTD, weight_VD, select_BT, vocab_size)
    ids_N = ids_BT[:, 1:][select_BT]
    if ids_N.numel() and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < len(weight_VD):
        raise ValueError(
            f"ids_BT holds {int(ids_N.min())}..{int(ids_N.max())} at selected positions, outside "
            f"the vocabulary of {len(weight_VD)}"
        )
    return select_BT, hidden_ND, weight_VD, ids_N


def _select_candidates(candidates_BTK, ids_BT, select_BT, V) -> torch.Tensor:
    """Check candidates and flatten them to [N, K]."""
    if candidates_BTK.dim() != 3 or candidates_BTK.shape[:2] != ids_BT.shape:
        raise ValueError(
            f"candidates_BTK {tuple(candidates_BTK.shape)} does not fit "
            f"ids_BT {tuple(ids_BT.shape)}"
        )
    if candidates_BTK.dtype != torch.int64:
        raise ValueError(f"candidates_BTK must be int64, not {candidates_BTK.dtype}")
    candidates_NK = candidates_BTK[:, 1:][select_BT]
    if candidates_NK.numel() and not (candidates_NK.min() >= 0 and candidates_NK.max() < V):
        raise ValueError(f"candidates_BTK holds ids outside the vocabulary of {V}")
    return candidates_NK


def _select_weight(loss_weight_BT, select_BT, hidden_ND) -> torch.Tensor | None:
    """Check the weights in the loss and flatten them to [N], in the type of the numbers."""
    if loss_weight_BT is None:
        return None
    shape = len(select_BT), select_BT.shape[1] + 1
    if loss_weight_BT.shape != shape or not loss_weight_BT.is_floating_point():
        raise ValueError(f"loss_weight_BT must be a floating-point tensor of shape {shape}")
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    return loss_weight_BT.detach()[:, 1:][select_BT].to(wide)


def _unflatten(values_N: torch.Tensor, select_BT: torch.Tensor) -> torch.Tensor:
    """[N, ...] at the selected positions of [B, T-1] -> [B, T, ...], zero elsewhere."""
    B, T = select_BT.shape[0], select_BT.shape[1] + 1
    out = values_N.new_zeros(B, T, *values_N.shape[1:])
    row, column = select_BT.nonzero(as_tuple=True)
    return out.index_put((row, column + 1), values_N)


def token_logprobs(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    ids_BT: torch.Tensor,
    *,
    candidates_BTK: torch.Tensor | None = None,
    loss_weight_BT: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Log-prob of every token, or a weighted sum of them, differentiable in `hidden_BTD` and
    `weight_VD`.

    Args:
        hidden_BTD: the backbone's last hidden states (after its final norm).
        weight_VD: the output head; a bias or a soft cap on the logits is not supported.
        ids_BT: int64 tokens; `hidden[:, t-1]` predicts `ids[:, t]`.
        candidates_BTK: int64, the log-probs of these tokens are wanted in place of `ids_BT`'s,
            candidates for position t in entry t.
        loss_weight_BT: the weight of every token in the loss, where it is known by now; not with
            candidates.  It gets no gradient; where it is 0, nothing is computed.
        mask_BT: bool, the tokens that are wanted; default all.  Costs and memory follow its count.
        vocab_size: use only the first rows of the head; default all.
        temperature: divides the logits.
        chunk: positions whose logits exist at one time; default 256, on a GPU 1024.

    Returns:
        logp_BT, or logp_BTK of candidates, float32 (float64 for float64 input), nats; 0 at t = 0
        and outside the mask.  With `loss_weight_BT` the scalar sum(loss_weight_BT * logp_BT): its
        gradient is computed from the same logits, and backward can be called once.

    Raises:
        ValueError: shapes or types that do not fit, a selected id outside the vocabulary.

    >>> hidden = torch.zeros(1, 3, 2)                       # uniform over V = 4
    >>> token_logprobs(hidden, torch.zeros(4, 2), torch.tensor([[0, 3, 1]])).exp().tolist()
    [[1.0, 0.25, 0.25]]
    """
    select_BT, hidden_ND, weight_VD, ids_N = _prepare(
        hidden_BTD, weight_VD, ids_BT, mask_BT, vocab_size, temperature, chunk
    )
    ids_NK = ids_N[:, None]
    if candidates_BTK is not None:
        ids_NK = _select_candidates(candidates_BTK, ids_BT, select_BT, len(weight_VD))
        if loss_weight_BT is not None:
            raise ValueError("loss_weight_BT is for the tokens of ids_BT, not for candidates_BTK")
    scale_N = _select_weight(loss_weight_BT, select_BT, hidden_ND)
    plan = _Plan("logprobs", temperature, _chunk_size(chunk, weight_VD))
    out = _apply(plan, (hidden_ND, weight_VD, ids_NK, None), scale_N, select_BT)
    return out if scale_N is not None or candidates_BTK is not None else out[..., 0]


@torch.no_grad()
def token_stats(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    ids_BT: torch.Tensor,
    *,
    top_k: int = 0,
    entropy: bool = True,
    candidates_BTK: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> TokenStats:
    """Everything that scoring reads off the distributions, in one pass over the head; no gradient.

    Arguments as in `token_logprobs`, and
        top_k: also return the K most likely tokens (0: do not).
        entropy: whether to compute it; where nobody reads it, two passes over the logits are saved.
        candidates_BTK: int64, also return the log-probs of these tokens, candidates for position t
            in entry t (for the release rule: the student's top-K, scored by the teacher).

    Returns:
        `TokenStats`, every field aligned with `ids_BT` and 0 outside the mask.

    Raises:
        ValueError: as `token_logprobs`; `top_k` or a selected candidate outside the vocabulary.

    >>> stats = token_stats(torch.zeros(1, 2, 2), torch.zeros(4, 2), torch.tensor([[0, 3]]))
    >>> [round(x.flatten()[1].item(), 4) for x in (stats.entropy_BT, stats.max_prob_BT)]
    [1.3863, 0.25]
    """
    select_BT, hidden_ND, weight_VD, ids_N = _prepare(
        hidden_BTD, weight_VD, ids_BT, mask_BT, vocab_size, temperature, chunk
    )
    V = weight_VD.shape[0]
    if not isinstance(top_k, Integral) or not 0 <= top_k <= V:
        raise ValueError(f"top_k must be in 0..{V}, not {top_k}")
    candidates_NK = None
    if candidates_BTK is not None:
        candidates_NK = _select_candidates(candidates_BTK, ids_BT, select_BT, V)
    N, wide = len(ids_N), torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    names = ("logp_BT", "max_prob_BT", *(["entropy_BT"] if entropy else []))
    read = {name: ids_N.new_zeros(N, dtype=wide) for name in names}
    if top_k:
        read["topk_ids_BTK"] = ids_N.new_zeros(N, top_k)
        read["topk_logp_BTK"] = ids_N.new_zeros(N, top_k, dtype=wide)
    if candidates_NK is not None:
        read["candidate_logp_BTK"] = ids_N.new_zeros(candidates_NK.shape, dtype=wide)
    chunk = _chunk_size(chunk, weight_VD)
    buffers = _buffers(2, min(chunk, N), weight_VD, wide)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        logits_CV, p_CV = (buffer[: rows.stop - start] for buffer in buffers)
        _logits(hidden_ND[rows], weight_VD, temperature, logits_CV)
        lse_C1 = _softmax(logits_CV, p_CV)
        read["logp_BT"][rows] = (logits_CV.gather(1, ids_N[rows, None]) - lse_C1)[:, 0]
        read["max_prob_BT"][rows] = p_CV.amax(dim=-1)
        if top_k:
            values_CK, read["topk_ids_BTK"][rows] = logits_CV.topk(top_k, dim=-1)
            read["topk_logp_BTK"][rows] = values_CK - lse_C1
        if candidates_NK is not None:
            read["candidate_logp_BTK"][rows] = logits_CV.gather(1, candidates_NK[rows]) - lse_C1
        if entropy:  # lse - sum p logit, with 0 log 0 = 0
            mean_C = _zero_nan_(logits_CV.mul_(p_CV)).sum(dim=-1)
            read["entropy_BT"][rows] = lse_C1[:, 0] - mean_C
    return TokenStats(**{name: _unflatten(values_N, select_BT) for name, values_N in read.items()})


def token_divergence(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    teacher_hidden_BTE: torch.Tensor,
    teacher_weight_VE: torch.Tensor,
    *,
    loss_weight_BT: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
    kind: str = "rkl",
    beta: float = 0.5,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Exact divergence between the student's p and the teacher's q, or a weighted sum of it over
    the tokens, differentiable in the student.

        rkl  KL(p || q) = sum p (log p - log q)
        fkl  KL(q || p) = sum q (log q - log p)
        jsd  beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

    over the whole vocabulary; jsd is the generalised Jensen-Shannon divergence of GKD (arXiv
    2306.13649), in nats at most H(beta) = -beta ln beta - (1 - beta) ln(1 - beta).

    Args:
        hidden_BTD, weight_VD: the student, as in `token_logprobs`.
        teacher_hidden_BTE, teacher_weight_VE: the teacher on the same tokens.  No gradient reaches
            them, also where they are the student's own tensors.
        loss_weight_BT: as in `token_logprobs`.
        mask_BT: bool, the tokens that are wanted; default all.  Costs and memory follow its count.
        kind: one of `DIVERGENCES`.
        beta: the teacher's share in m, between 0 and 1; only jsd reads it.
        vocab_size: use only the first rows of both heads; default all, of which both must then
            have the same number.
        temperature: divides the student's logits; the teacher's are left as they are.
        chunk: as in `token_logprobs`; there are three buffers of [chunk, V], for jsd four.

    Returns:
        divergence_BT, float32 (float64 for a float64 student); 0 at t = 0 and outside the mask.
        With `loss_weight_BT` the scalar sum(loss_weight_BT * divergence_BT), as `token_logprobs`.
        Float32 rounding amounts to some 1e-6 nats, also below 0.  Probabilities that underflow
        count as 0 log 0 = 0.  Where the teacher's logit is -inf for a token that the student may
        draw, rkl is inf and its gradient is not finite (unless the position's weight is 0, or the
        gradient that arrives, as behind `torch.where`); fkl and jsd remain finite.

    Raises:
        ValueError: shapes or types that do not fit, an unknown kind, beta outside (0, 1), heads
            with different numbers of rows and no `vocab_size`.

    >>> student, teacher = torch.tensor([[3.0], [1.0]]).log(), torch.tensor([[1.0], [1.0]]).log()
    >>> hidden = torch.ones(1, 2, 1)                        # p = (3/4, 1/4), q = (1/2, 1/2)
    >>> for kind in DIVERGENCES:
    ...     kl_BT = token_divergence(hidden, student, hidden, teacher, kind=kind)
    ...     [round(x, 4) for x in kl_BT[0].tolist()]
    [0.0, 0.1308]
    [0.0, 0.1438]
    [0.0, 0.0338]
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"kind must be one of {', '.join(DIVERGENCES)}, not {kind!r}")
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, both excluded, not {beta}")
    shape, teacher_shape = tuple(hidden_BTD.shape), tuple(teacher_hidden_BTE.shape)
    if len(shape) != 3 or len(teacher_shape) != 3 or shape[:2] != teacher_shape[:2]:
        raise ValueError(
            f"hidden_BTD {shape} and teacher_hidden_BTE {teacher_shape} do not fit: "
            "expected [B, T, D] and [B, T, E]"
        )
    select_BT = _select(mask_BT, hidden_BTD.new_empty(shape[:2]), temperature, chunk)
    student = _flatten(hidden_BTD, weight_VD, select_BT, vocab_size)
    teacher = _flatten(
        teacher_hidden_BTE.detach(), teacher_weight_VE.detach(), select_BT, vocab_size,
        ("teacher_hidden_BTE", "teacher_weight_VE"),
    )
    if len(student[1]) != len(teacher[1]):
        raise ValueError(
            f"weight_VD has {len(weight_VD)} rows and teacher_weight_VE {len(teacher_weight_VE)}: "
            "vocab_size must say how many of them are tokens of both"
        )
    tensors = *student, *teacher
    scale_N = _select_weight(loss_weight_BT, select_BT, student[0])
    plan = _Plan(kind, temperature, _chunk_size(chunk, student[1]), beta)
    out = _apply(plan, tensors, scale_N, select_BT)
    return out if scale_N is not None else out[..., 0]
