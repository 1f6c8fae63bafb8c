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

Alignment, everywhere: `hidden[:, t-1]` predicts `ids[:, t]`.  Results are shaped like `ids` and
entry t describes token t; entry 0, which nothing predicts, is 0, as are positions outside
`mask_BT`, for which no logits are computed.

Precision: the matrix product runs in the type of the hidden states (under autocast: in autocast's
type), everything after it in float32, or float64 for float64 input.  Natural logarithms: nats.

Vocabulary: checkpoints of one family pad their heads differently (151936 and 152064 rows for the
same tokenizer).  `vocab_size` cuts the head *before* the softmax, so that student and teacher are
normalised over the same set.

Letters: B rows, T tokens, V vocabulary, D hidden width, K candidates, N selected positions,
C positions in a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


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


def _chunk_logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, temperature: float, chunk: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (positions, logits [C, V] / temperature in at least float32)."""
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, min(start + chunk, hidden_ND.shape[0]))
        logits_CV = hidden_ND[rows] @ weight_VD.T
        logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
        yield rows, logits_CV if temperature == 1.0 else logits_CV / temperature


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
        """With G = (sum_k onehot_k g_k - p sum_k g_k) / temperature: d hidden = G W, d W = G^T
        hidden."""
        hidden_ND, weight_VD, ids_NK, lse_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
        # one term per chunk: sum them in float32 at least
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=lse_N.dtype) if wants_weight else None
        for rows, grad_CV in _chunk_logits(hidden_ND, weight_VD, ctx.temperature, ctx.chunk):
            total_C1 = grad_NK[rows].sum(dim=1, keepdim=True)
            grad_CV.sub_(lse_N[rows, None]).exp_().mul_(-total_C1)  # -p g
            grad_CV.scatter_add_(1, ids_NK[rows], grad_NK[rows])
            grad_CV = (grad_CV / ctx.temperature).to(weight_VD.dtype)
            if wants_hidden:
                grad_hidden_ND[rows] = grad_CV @ weight_VD
            if wants_weight:
                grad_weight_VD += grad_CV.T @ hidden_ND[rows]
        if wants_weight:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None


def _prepare(hidden_BTD, weight_VD, ids_BT, mask_BT, vocab_size, temperature, chunk):
    """Check the arguments and flatten: the selected positions [B, T-1], hidden [N, D], ids [N]."""
    if hidden_BTD.dim() != 3 or hidden_BTD.shape[:2] != ids_BT.shape:
        raise ValueError(
            f"hidden_BTD {tuple(hidden_BTD.shape)} and ids_BT {tuple(ids_BT.shape)} do not fit: "
            "expected [B, T, D] and [B, T]"
        )
    if weight_VD.dim() != 2 or weight_VD.shape[1] != hidden_BTD.shape[2]:
        raise ValueError(
            f"weight_VD {tuple(weight_VD.shape)} does not fit hidden width {hidden_BTD.shape[2]}"
        )
    vocab_size = weight_VD.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= weight_VD.shape[0]:
        raise ValueError(f"vocab_size must be in 1..{weight_VD.shape[0]}, not {vocab_size}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, not {chunk}")
    if mask_BT is None:
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    elif mask_BT.shape != ids_BT.shape or mask_BT.dtype != torch.bool:
        raise ValueError(f"mask_BT must be a bool tensor of shape {tuple(ids_BT.shape)}")
    select_BT = mask_BT[:, 1:]
    ids_N = ids_BT[:, 1:][select_BT]
    if ids_N.numel() and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < vocab_size:
        raise ValueError(
            f"ids_BT holds {int(ids_N.min())}..{int(ids_N.max())} at selected positions, outside "
            f"the vocabulary of {vocab_size}"
        )
    hidden_ND, weight_VD = hidden_BTD[:, :-1][select_BT], weight_VD[:vocab_size]
    device = hidden_BTD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    elif hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(f"hidden_BTD is {hidden_ND.dtype} but weight_VD is {weight_VD.dtype}")
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
