"""What a vocabulary distribution says, in chunks of positions: no [B, T, V] tensor ever exists.

On-policy distillation scores every sampled token under two models whose vocabularies hold some
150,000 entries: full float32 logits of 16k tokens take 10 GB, their gradient as much again.  Here
the output head is applied to `chunk` positions at a time, every number that is wanted is read off
that piece, and the piece is thrown away.

  token_logprobs   log-prob of given tokens, or of several candidates per position, with gradient:
                   for the student.  Backward computes the logits again, chunk by chunk, so that
                   training needs no more memory than scoring.
  token_stats      log-prob of given tokens, entropy, maximum probability, top-K ids and their
                   log-probs, log-probs at given candidate ids, without gradient: for the teacher.
  token_divergence reverse KL, forward KL or generalised Jensen-Shannon divergence between student
                   and teacher, exact over the whole vocabulary, with gradient in the student:
                   the loss in place of a sampled estimate of it.

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
from collections.abc import Iterator
from dataclasses import dataclass

import torch

DIVERGENCES = ("rkl", "fkl", "jsd")


@dataclass
class TokenStats:
    """No gradient.  A field that was not asked for is None.

    logp_BT            log-prob of `ids_BT`, nats
    entropy_BT         entropy of the whole distribution, nats
    max_prob_BT        probability of its most likely token
    topk_ids_BTK       the K most likely tokens, best first
    topk_logp_BTK      their log-probs
    candidate_logp_BTK log-probs at the ids in `candidates_BTK`
    """

    logp_BT: torch.Tensor
    entropy_BT: torch.Tensor
    max_prob_BT: torch.Tensor
    topk_ids_BTK: torch.Tensor | None = None
    topk_logp_BTK: torch.Tensor | None = None
    candidate_logp_BTK: torch.Tensor | None = None


def _chunks(N: int, chunk: int) -> Iterator[slice]:
    for start in range(0, N, chunk):
        yield slice(start, min(start + chunk, N))


def _logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Logits [C, V] / temperature in at least float32, in memory that the caller may overwrite."""
    logits_CV = hidden_CD @ weight_VD.T
    logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def _chunk_logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, temperature: float, chunk: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (positions, their logits [C, V] / temperature)."""
    for rows in _chunks(len(hidden_ND), chunk):
        yield rows, _logits(hidden_ND[rows], weight_VD, temperature)


class _HeadGradient:
    """Collects the gradients of logits = hidden @ weight.T, where they are wanted, from chunks of
    the logits' gradient G: d hidden = G W, d W = G^T hidden."""

    def __init__(self, ctx, hidden_ND, weight_VD, wide):
        self.hidden_ND, self.weight_VD = hidden_ND, weight_VD
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        self.grad_hidden_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
        # one term per chunk: sum them in float32 at least
        self.grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wants_weight else None

    def add(self, rows, grad_CV):
        """The logits' gradient [C, V] at some positions."""
        grad_CV = grad_CV.to(self.weight_VD.dtype)
        if self.grad_hidden_ND is not None:
            self.grad_hidden_ND[rows] = grad_CV @ self.weight_VD
        if self.grad_weight_VD is not None:
            self.grad_weight_VD += grad_CV.T @ self.hidden_ND[rows]

    def result(self):
        """(d hidden [N, D], d weight [V, D]), None where it is not wanted."""
        if self.grad_weight_VD is None:
            return self.grad_hidden_ND, None
        return self.grad_hidden_ND, self.grad_weight_VD.to(self.weight_VD.dtype)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[ids], without keeping the logits.

    With p the softmax and g_k the incoming gradients of a position, d logp_k / d logits =
    onehot(id_k) - p, so backward needs the logits again and, from forward, their log-sum-exp.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_NK, temperature, chunk):
        """[N, D], [V, D], int64 [N, K] -> log-probs [N, K]."""
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        logp_NK = hidden_ND.new_zeros(ids_NK.shape, dtype=wide)
        lse_N = hidden_ND.new_zeros(len(hidden_ND), dtype=wide)
        for rows, logits_CV in _chunk_logits(hidden_ND, weight_VD, temperature, chunk):
            lse_N[rows] = logits_CV.logsumexp(dim=-1)
            logp_NK[rows] = logits_CV.gather(1, ids_NK[rows]) - lse_N[rows, None]
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, lse_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logp_NK

    @staticmethod
    def backward(ctx, grad_NK):
        """G = (sum_k onehot_k g_k - p sum_k g_k) / temperature."""
        hidden_ND, weight_VD, ids_NK, lse_N = ctx.saved_tensors
        head = _HeadGradient(ctx, hidden_ND, weight_VD, lse_N.dtype)
        for rows, grad_CV in _chunk_logits(hidden_ND, weight_VD, ctx.temperature, ctx.chunk):
            total_C1 = grad_NK[rows].sum(dim=1, keepdim=True)
            grad_CV.sub_(lse_N[rows, None]).exp_().mul_(-total_C1)  # -p g
            grad_CV.scatter_add_(1, ids_NK[rows], grad_NK[rows])
            head.add(rows, grad_CV.div_(ctx.temperature))
        return *head.result(), None, None, None


def _kl_(log_a_CV: torch.Tensor, log_b_CV: torch.Tensor) -> torch.Tensor:
    """KL(a || b) = sum a (log a - log b) with 0 log 0 = 0; overwrites both."""
    torch.sub(log_a_CV, log_b_CV, out=log_b_CV)
    a_CV = log_a_CV.exp_()
    return log_b_CV.mul_(a_CV).masked_fill_(a_CV == 0, 0).sum(dim=-1)


def _kl_gradient_(log_a_CV, log_b_CV, kl_C1, scale_C1) -> torch.Tensor:
    """scale a (log a - log b - KL(a || b)), in the logits of a, b held fixed; overwrites both."""
    torch.sub(log_a_CV, log_b_CV, out=log_b_CV)
    a_CV = log_a_CV.exp_()
    # 0 log 0 = 0; and a position without weight in the loss gives 0 even where its KL is inf
    zero_CV = (a_CV == 0).logical_or_(scale_C1 == 0)
    return log_b_CV.sub_(kl_C1).mul_(a_CV).mul_(scale_C1).masked_fill_(zero_CV, 0)


def _jsd_(log_p_CV, log_q_CV, beta) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 - beta) KL(p || m) + beta KL(q || m), and KL(p || m) alone; overwrites both.

    With s = (1 - beta) p / m, the share of the student in the mixture, (1 - beta) KL(p || m) =
    sum m s log s - (1 - beta) log(1 - beta): entr(s) = -s log s lies in 0..1/e, so that nothing
    overflows, and three [C, V] buffers are enough.  The same with beta q / m for the teacher.
    """
    log_p_CV += math.log(1 - beta)
    log_q_CV += math.log(beta)
    m_CV = torch.logaddexp(log_p_CV, log_q_CV)
    m_CV.clamp_(min=torch.finfo(m_CV.dtype).min)  # where both are -inf: their difference is nan
    share_p_CV, share_q_CV = log_p_CV.sub_(m_CV).exp_(), log_q_CV.sub_(m_CV).exp_()
    m_CV.exp_()
    from_p_C, from_q_C = (
        torch.special.entr(share_CV, out=share_CV).mul_(m_CV).sum(dim=-1)
        for share_CV in (share_p_CV, share_q_CV)
    )
    kl_p_C = -from_p_C / (1 - beta) - math.log(1 - beta)
    kl_q_C = -from_q_C / beta - math.log(beta)
    return (1 - beta) * kl_p_C + beta * kl_q_C, kl_p_C


class _TokenDivergence(torch.autograd.Function):
    """Divergence of p = softmax(z), z = hidden @ weight.T / temperature, and the teacher's
    q = softmax(teacher_hidden @ teacher_weight.T), without keeping either's logits.

    With m = beta q + (1 - beta) p:

        rkl  KL(p || q)                               d/dz = p (log(p/q) - KL(p || q))
        fkl  KL(q || p)                               d/dz = p - q
        jsd  beta KL(q || m) + (1 - beta) KL(p || m)  d/dz = (1 - beta) p (log(p/m) - KL(p || m))

    so that backward needs both logits again and, from forward, their log-sum-exps and `kl_N`, the
    divergence of p that is subtracted.
    """

    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, teacher_hidden_NE, teacher_weight_VE, kind, beta, temperature,
        chunk,
    ):
        """[N, D], [V, D], [N, E], [V, E] -> divergence [N]."""
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        N = len(hidden_ND)
        divergence_N, kl_N, lse_N, teacher_lse_N = (
            hidden_ND.new_zeros(N, dtype=wide) for _ in range(4)
        )
        for rows in _chunks(N, chunk):
            log_p_CV = _logits(hidden_ND[rows], weight_VD, temperature)
            lse_N[rows] = log_p_CV.logsumexp(dim=-1)
            log_p_CV -= lse_N[rows, None]
            log_q_CV = _logits(teacher_hidden_NE[rows], teacher_weight_VE, 1.0).to(wide)
            teacher_lse_N[rows] = log_q_CV.logsumexp(dim=-1)
            log_q_CV -= teacher_lse_N[rows, None]
            if kind == "rkl":
                divergence_N[rows] = kl_N[rows] = _kl_(log_p_CV, log_q_CV)
            elif kind == "fkl":
                divergence_N[rows] = _kl_(log_q_CV, log_p_CV)
            else:
                divergence_N[rows], kl_N[rows] = _jsd_(log_p_CV, log_q_CV, beta)
        ctx.save_for_backward(
            hidden_ND, weight_VD, teacher_hidden_NE, teacher_weight_VE, lse_N, teacher_lse_N, kl_N
        )
        ctx.kind, ctx.beta, ctx.temperature, ctx.chunk = kind, beta, temperature, chunk
        return divergence_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        """G = (d divergence / dz) g / temperature, for the student alone."""
        hidden_ND, weight_VD, teacher_hidden_NE, teacher_weight_VE, *scalars = ctx.saved_tensors
        lse_N, teacher_lse_N, kl_N = scalars
        head = _HeadGradient(ctx, hidden_ND, weight_VD, lse_N.dtype)
        for rows in _chunks(len(hidden_ND), ctx.chunk):
            log_p_CV = _logits(hidden_ND[rows], weight_VD, ctx.temperature)
            log_p_CV -= lse_N[rows, None]
            log_q_CV = _logits(teacher_hidden_NE[rows], teacher_weight_VE, 1.0).to(lse_N.dtype)
            log_q_CV -= teacher_lse_N[rows, None]
            scale_C1 = grad_N[rows, None] / ctx.temperature
            if ctx.kind == "fkl":
                grad_CV = log_p_CV.exp_().sub_(log_q_CV.exp_()).mul_(scale_C1)
            else:
                if ctx.kind == "jsd":  # m in the place of q
                    log_q_CV += math.log(ctx.beta)
                    torch.logaddexp(log_p_CV + math.log(1 - ctx.beta), log_q_CV, out=log_q_CV)
                    scale_C1 *= 1 - ctx.beta
                grad_CV = _kl_gradient_(log_p_CV, log_q_CV, kl_N[rows, None], scale_C1)
            head.add(rows, grad_CV)
            del log_p_CV, log_q_CV, grad_CV  # before the next ones exist
        return *head.result(), *[None] * 6


def _select(mask_BT, like_BT, temperature, chunk) -> torch.Tensor:
    """Check the arguments that concern positions: the selected ones, [B, T-1]."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if chunk < 1:
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
    if not 1 <= vocab_size <= weight_VD.shape[0]:
        raise ValueError(f"vocab_size must be in 1..{weight_VD.shape[0]}, not {vocab_size}")
    hidden_ND, weight_VD = hidden_BTD[:, :-1][select_BT], weight_VD[:vocab_size]
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
    candidates_NK = candidates_BTK[:, 1:][select_BT]
    if candidates_NK.numel() and not (candidates_NK.min() >= 0 and candidates_NK.max() < V):
        raise ValueError(f"candidates_BTK holds ids outside the vocabulary of {V}")
    return candidates_NK


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
    mask_BT: torch.Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> torch.Tensor:
    """Log-prob of every token, differentiable in `hidden_BTD` and `weight_VD`.

    Args:
        hidden_BTD: the backbone's last hidden states (after its final norm).
        weight_VD: the output head; a bias or a soft cap on the logits is not supported.
        ids_BT: int64 tokens; `hidden[:, t-1]` predicts `ids[:, t]`.
        candidates_BTK: int64, the log-probs of these tokens are wanted in place of `ids_BT`'s,
            candidates for position t in entry t.
        mask_BT: bool, the tokens that are wanted; default all.  Costs and memory follow its count.
        vocab_size: use only the first rows of the head; default all.
        temperature: divides the logits.
        chunk: positions whose logits exist at one time.

    Returns:
        logp_BT, or logp_BTK of candidates, float32 (float64 for float64 input), nats; 0 at t = 0
        and outside the mask.

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
    logp_NK = _TokenLogProbs.apply(hidden_ND, weight_VD, ids_NK, temperature, chunk)
    return _unflatten(logp_NK if candidates_BTK is not None else logp_NK[:, 0], select_BT)


@torch.no_grad()
def token_stats(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    ids_BT: torch.Tensor,
    *,
    top_k: int = 0,
    candidates_BTK: torch.Tensor | None = None,
    mask_BT: torch.Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> TokenStats:
    """Everything that scoring reads off the distributions, in one pass over the head; no gradient.

    Arguments as in `token_logprobs`, and
        top_k: also return the K most likely tokens (0: do not).
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
    if not 0 <= top_k <= V:
        raise ValueError(f"top_k must be in 0..{V}, not {top_k}")
    candidates_NK = None
    if candidates_BTK is not None:
        candidates_NK = _select_candidates(candidates_BTK, ids_BT, select_BT, V)
    N, wide = len(ids_N), torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    names = ("logp_BT", "entropy_BT", "max_prob_BT")
    read = {name: ids_N.new_zeros(N, dtype=wide) for name in names}
    if top_k:
        read["topk_ids_BTK"] = ids_N.new_zeros(N, top_k)
        read["topk_logp_BTK"] = ids_N.new_zeros(N, top_k, dtype=wide)
    if candidates_NK is not None:
        read["candidate_logp_BTK"] = ids_N.new_zeros(candidates_NK.shape, dtype=wide)
    for rows, logits_CV in _chunk_logits(hidden_ND, weight_VD, temperature, chunk):
        logp_CV = logits_CV.sub_(logits_CV.logsumexp(dim=-1, keepdim=True))
        read["logp_BT"][rows] = logp_CV.gather(1, ids_N[rows, None])[:, 0]
        read["max_prob_BT"][rows] = logp_CV.amax(dim=-1).exp()
        if top_k:
            read["topk_logp_BTK"][rows], read["topk_ids_BTK"][rows] = logp_CV.topk(top_k, dim=-1)
        if candidates_NK is not None:
            read["candidate_logp_BTK"][rows] = logp_CV.gather(1, candidates_NK[rows])
        # last: exp in place of the log-probs, which nothing reads any more; entr(p) = -p ln p
        read["entropy_BT"][rows] = torch.special.entr(logp_CV.exp_()).sum(dim=-1)
    return TokenStats(**{name: _unflatten(values_N, select_BT) for name, values_N in read.items()})


def token_divergence(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    teacher_hidden_BTE: torch.Tensor,
    teacher_weight_VE: torch.Tensor,
    *,
    mask_BT: torch.Tensor | None = None,
    kind: str = "rkl",
    beta: float = 0.5,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> torch.Tensor:
    """Exact divergence between the student's p and the teacher's q, differentiable in the student.

        rkl  KL(p || q) = sum p (log p - log q)
        fkl  KL(q || p) = sum q (log q - log p)
        jsd  beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

    over the whole vocabulary; jsd is the generalised Jensen-Shannon divergence of GKD (arXiv
    2306.13649), in nats at most H(beta) = -beta ln beta - (1 - beta) ln(1 - beta).

    Args:
        hidden_BTD, weight_VD: the student, as in `token_logprobs`.
        teacher_hidden_BTE, teacher_weight_VE: the teacher on the same tokens.  No gradient reaches
            them, also where they are the student's own tensors.
        mask_BT: bool, the tokens that are wanted; default all.  Costs and memory follow its count.
        kind: one of `DIVERGENCES`.
        beta: the teacher's share in m, between 0 and 1; only jsd reads it.
        vocab_size: use only the first rows of both heads; default all, of which both must then
            have the same number.
        temperature: divides the student's logits; the teacher's are left as they are.
        chunk: positions whose logits exist at one time, in about three buffers of [chunk, V].

    Returns:
        divergence_BT, float32 (float64 for a float64 student); 0 at t = 0 and outside the mask.
        Float32 rounding amounts to some 1e-6 nats, also below 0.  Probabilities that underflow
        count as 0 log 0 = 0.  Where the teacher's logit is -inf for a token that the student may
        draw, rkl is inf and its gradient is not finite (unless the gradient that arrives is 0, as
        behind `torch.where`); fkl and jsd remain finite.

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
    if vocab_size is None and len(weight_VD) != len(teacher_weight_VE):
        raise ValueError(
            f"weight_VD has {len(weight_VD)} rows and teacher_weight_VE {len(teacher_weight_VE)}: "
            "vocab_size must say how many of them are tokens of both"
        )
    select_BT = _select(mask_BT, hidden_BTD[..., 0], temperature, chunk)
    student = _flatten(hidden_BTD, weight_VD, select_BT, vocab_size)
    teacher = _flatten(
        teacher_hidden_BTE.detach(), teacher_weight_VE.detach(), select_BT, vocab_size,
        ("teacher_hidden_BTE", "teacher_weight_VE"),
    )
    divergence_N = _TokenDivergence.apply(*student, *teacher, kind, beta, temperature, chunk)
    return _unflatten(divergence_N, select_BT)
