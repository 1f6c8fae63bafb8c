"""Lookahead Group Reward (LGR): ask the teacher one token ahead, where the student hesitates.

"Your Teacher Can't Help You Here", arXiv 2605.30833.  Where the student is uncertain between
tokens, the teacher may be indifferent between them too, and yet know its way after one and be lost
after another.  So at every position whose *student* entropy exceeds tau, each of the student's
top-K candidates is put in the place of the sampled token, the teacher reads it, and the candidate
is rewarded by how confident the teacher then is, relative to its group:

    trigger_t   = H(p_S(. | x, y_<t)) > tau                                   `trigger`
    c_t,k       = max_v p_T(v | x, y_<t, candidate_k)                         `lookahead_confidence`
    r_t,k       = (c_t,k - mean_k c_t) / (std_k c_t + eps)                    `group_reward`
    A_t         = log p_T(y_t) - log p_S(y_t) + gamma r_t(y_t)                `sampled_reward`

and, for the variant `lgr_topk`, the divergence over a set of tokens with the reward inside it:
`union_candidates`, `topk_loss`.

Tree attention.  Prompt and response are the trunk; each candidate is a leaf that branches off it:

    trunk    x1  x2  y3  y4  y5          a leaf at position t has position id t, sees the trunk
    leaves           a3  a4  a5          before t and itself, and no other leaf: what the teacher
                     b3  b4  b5          predicts there is what it would predict after
                     c3  c4  c5          x, y_<t, candidate

One forward pass of K tokens per triggered position replaces K passes over the whole prefix.  The
trunk is not read again for it: leaves attend to the KV cache of the very pass that scored the
rollout.  That cache is only read.  The leaf of the sampled token is the trunk itself, so it is not
computed either.

Paper to code: tau -> `threshold`, K -> last axis of `candidates_BTK`, r_conf -> `reward_BTK`.

Decisions, where the sources are silent or differ:
  1. The entropy is exact; the authors' code takes it from the top 20 tokens, renormalised.
  2. `normalize`: the paper divides by the (unbiased) standard deviation plus eps ("std"), the
     authors' script only subtracts the mean ("mean").  eps = 1e-6 [the paper gives no number].
  3. A candidate that ends the response is treated like any other, as in the authors' code.
  4. `signal`: the paper's ablation also names "sampled-p" and "entropy" and does not define them
     further.  Here "sampled_prob" is the teacher's probability of y_{t+1}, the token that the
     student wrote next, after the candidate; "entropy" is minus the teacher's entropy there.

Letters: B rows, T tokens, K candidates, V vocabulary, D hidden width, N leaves, U tokens of a
union; of a slice R rows that have leaves, Q leaves per row, L columns of its mask; C of a chunk.
"""

import inspect
import math
import platform
from numbers import Integral

import torch

SIGNALS = ("max_prob", "sampled_prob", "entropy")
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
LARGE = 2**18  # entries of a head; below, oneDNN's preparations take longer than it saves


def trigger(
    entropy_BT: torch.Tensor, response_mask_BT: torch.Tensor, threshold: float = 0.2
) -> torch.Tensor:
    """Response positions where the student hesitates: bool, entropy (nats) above `threshold`.

    Give it the student's entropy: the teacher's is what decays along the rollout (paper, section
    on the trigger).

    Raises ValueError unless the mask is bool and both have one shape.

    >>> trigger(torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([[False, True, True]])).tolist()
    [[False, False, True]]
    """
    if response_mask_BT.dtype != torch.bool or response_mask_BT.shape != entropy_BT.shape:
        raise ValueError(f"response_mask_BT must be bool of shape {tuple(entropy_BT.shape)}")
    return (entropy_BT > threshold) & response_mask_BT


# ----------------------------------------------------------------- confidence by tree attention
def check_model(model, longest: int) -> None:
    """Refuse a model whose tree attention would come out wrong.

    Args:
        model: a Hugging Face causal LM.
        longest: trunk tokens.

    Raises:
        ValueError: encoder-decoders; an attention implementation that takes no 4D mask; position
            ids that are not an argument; layers that are recurrent, chunked or local; a sliding
            window shorter than the trunk.
    """
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder, not a causal LM")
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attention implementation {implementation!r} takes no 4D mask, which tree attention "
            'needs; load the model with attn_implementation="sdpa"'
        )
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(f"{name} takes no position ids, which tree attention needs")
    named = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = set(named or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{name} has layers of types {sorted(kinds)}, which are not supported")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if window and sliding and longest > window:
        raise ValueError(
            f"{name}: a trunk of {longest} tokens exceeds its sliding window of {window}; every "
            "leaf would see what the model itself cannot"
        )


@torch.no_grad()
def self_check(model, *, tolerance: float | None = None) -> None:
    """Compare the tree with plain forward passes on eight tokens, once per model.

    `check_model` reads the config; this runs the model, and so finds what no config says: a mask
    or position ids that are not obeyed, a head that is more than a matrix.

    Args:
        model: a Hugging Face causal LM.
        tolerance: of the mean over positions of |ln(tree / plain)|, maximum probabilities; default
            0.01, or 0.2 for 16-bit models, whose logits are that coarse.

    Raises:
        ValueError: `check_model` refuses, or the two differ by more than `tolerance`.
    """
    V = model.get_output_embeddings().weight.shape[0]
    ids_BT = torch.arange(1, 9, device=model.device)[None] % V
    chosen_BT = torch.arange(8, device=model.device)[None] > 0
    candidates_BTK = (ids_BT[..., None] + 1) % V
    tree_T = lookahead_confidence(model, ids_BT, chosen_BT, chosen_BT, candidates_BTK)[0, :, 0]
    paths = [torch.cat([ids_BT[:, :t], candidates_BTK[:, t]], dim=1) for t in range(1, 8)]
    logits_NV = torch.cat([model(input_ids=path, use_cache=False).logits[:, -1] for path in paths])
    plain_N = logits_NV.double().softmax(dim=-1).amax(dim=-1)
    error = float((tree_T[1:].double() / plain_N).log().abs().mean())
    if tolerance is None:
        tolerance = 0.2 if torch.finfo(model.dtype).bits == 16 else 0.01
    if not error <= tolerance:
        raise ValueError(
            f"{type(model).__name__} is not supported: its maximum probabilities by tree attention "
            f"and by plain forward passes differ by a factor of {math.exp(error):.3g}"
        )


def _trunk_keys_values(cache, B: int, T: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every layer's keys and values [B, heads, T, head_dim] in a Hugging Face cache."""
    try:
        trunk = [(layer.keys, layer.values) for layer in cache.layers]
        short = [key.shape for key, _ in trunk if key.shape[0] != B or key.shape[2] < T]
    except AttributeError:
        raise ValueError(f"cache {type(cache).__name__} has layers without plain keys") from None
    if short:
        raise ValueError(
            f"cache holds keys of shape {tuple(short[0])} where the trunk has {B} rows of {T} "
            "tokens; the trunk pass must keep them all (a sliding window does not)"
        )
    return [(key[:, :, :T], value[:, :, :T]) for key, value in trunk]


class _Tree:
    """What the attention layers take for a KV cache: some rows of the trunk up to a column, then
    the leaves of the slice at hand.  Nothing is stored, so the trunk stays as it is."""

    def __init__(self, trunk, row_R: torch.Tensor, columns: int):
        self.trunk, self.row_R, self.columns, self.used = trunk, row_R, columns, 0

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Keys and values of the leaves [R, heads, Q, head_dim] -> those to attend to."""
        self.used += 1
        every = len(self.row_R) == self.trunk[layer_idx][0].shape[0]
        joined = []
        for old, new in zip(self.trunk[layer_idx], (key, value), strict=True):
            old = old[:, :, : self.columns]
            old = old if every else old[self.row_R]  # all rows: a view, not a copy
            joined.append(torch.cat([old.to(new.dtype), new], dim=2))
        return tuple(joined)

    def get_seq_length(self, *args) -> int:
        """Some models ask; they are given explicit position ids, so the answer is not used."""
        return 0


def _score_slice(model, trunk, row_N, position_N, token_N) -> torch.Tensor:
    """One forward pass over leaves, sorted by row; returns their hidden states [N, D].

    Position id t, attention to the trunk's columns before t and to itself.  The mask reaches as
    far as the last trunk column that any leaf of the slice sees.
    """
    row_R, own_N = row_N.unique(return_inverse=True)  # rows with leaves in this slice
    place_N = torch.arange(len(row_N), device=row_N.device) - torch.searchsorted(own_N, own_N)
    R, Q, device = len(row_R), int(place_N.max()) + 1, row_N.device
    ids_RQ, position_RQ = token_N.new_zeros(R, Q), token_N.new_zeros(R, Q)  # rows filled up with 0
    ids_RQ[own_N, place_N], position_RQ[own_N, place_N] = token_N, position_N

    reach = int(position_N.max())
    sees_trunk_RQL = torch.arange(reach, device=device) < position_RQ[..., None]
    sees_leaf_RQQ = torch.eye(Q, dtype=torch.bool, device=device).expand(R, Q, Q)
    mask = torch.cat([sees_trunk_RQL, sees_leaf_RQQ], dim=2)[:, None]
    if model.config._attn_implementation == "eager":  # it adds the mask: a bool would do nothing
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=device).masked_fill_(~mask, lowest)
    tree = _Tree(trunk, row_R, reach)
    hidden_RQD = model.base_model(
        input_ids=ids_RQ,
        attention_mask=mask,
        position_ids=position_RQ,
        past_key_values=tree,
        use_cache=True,
    )[0]
    if tree.used != len(trunk):
        raise ValueError(
            f"{type(model).__name__} used the trunk's cache in {tree.used} of {len(trunk)} layers"
        )
    return hidden_RQD[own_N, place_N]


def _logits(hidden_CD, weight_VD) -> torch.Tensor:
    """hidden @ weight.T; large float32 heads on an x86 CPU by oneDNN, where MKL, PyTorch's own
    choice, may take longer (as in logprobs.py: leaves and trunk should cost the same)."""
    if HAS_ONEDNN and weight_VD.device.type == "cpu" and weight_VD.dtype == torch.float32:
        if weight_VD.numel() >= LARGE:
            return torch.ops.mkldnn._linear_pointwise(hidden_CD, weight_VD, None, "none", [], "")
    return hidden_CD @ weight_VD.T


def _read_signal(hidden_ND, weight_VD, signal, next_N, chunk) -> torch.Tensor:
    """The teacher's confidence [N] after each hidden state, larger is surer, through the head in
    chunks of positions: never more than [chunk, V] logits."""
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    out_N = hidden_ND.new_empty(len(hidden_ND), dtype=wide)
    for start in range(0, len(hidden_ND), chunk):
        rows = slice(start, start + chunk)
        logits_CV = _logits(hidden_ND[rows], weight_VD).to(wide)
        lse_C = logits_CV.logsumexp(dim=-1)
        if signal == "max_prob":
            out_N[rows] = (logits_CV.amax(dim=-1) - lse_C).exp()
        elif signal == "sampled_prob":
            out_N[rows] = (logits_CV.gather(1, next_N[rows, None])[:, 0] - lse_C).exp()
        else:
            prob_CV = (logits_CV - lse_C[:, None]).exp_()
            out_N[rows] = -torch.special.entr(prob_CV).sum(dim=-1)
    return out_N


@torch.no_grad()
def lookahead_confidence(
    model,
    ids_BT: torch.Tensor,
    response_mask_BT: torch.Tensor,
    trigger_BT: torch.Tensor,
    candidates_BTK: torch.Tensor,
    *,
    cache=None,
    hidden_BTD: torch.Tensor | None = None,
    signal: str = "max_prob",
    vocab_size: int | None = None,
    nodes_per_slice: int = 4096,
    chunk: int = 1024,
) -> torch.Tensor:
    """The teacher's confidence one step after each candidate, by tree attention.

    Args:
        model: the teacher, a Hugging Face causal LM with attention "sdpa" or "eager", in eval mode.
        ids_BT: int64 rollouts, left-aligned, right-padded.
        response_mask_BT: bool, the response tokens.
        trigger_BT: bool, where to look ahead; counts inside the response only.
        candidates_BTK: int64, the group at each position; a candidate at t replaces `ids[:, t]`.
            May repeat tokens, and hold the sampled one or not.  Read where triggered only.
        cache: the KV cache of a pass of `model` over `ids_BT` (plain causal, `use_cache=True`).
            It is read, not changed.  None: this function makes that pass itself.
        hidden_BTD: the last hidden states of that same pass; with them the sampled token costs
            nothing, because its leaf is the trunk's own position.
        signal: "max_prob" (the paper's), "sampled_prob" or "entropy"; see the top of this file.
        vocab_size: use only the first rows of the head; default all.
        nodes_per_slice: most leaves in one forward pass, over all rows: bounds memory.
        chunk: leaves whose logits exist at one time.

    Returns:
        confidence_BTK, float32 (float64 for float64 models); nan where not triggered and, with
        "sampled_prob", at the last token, which nothing follows.  In [0, 1], or nats <= 0 for
        "entropy".

    Raises:
        ValueError: shapes or types that do not fit, candidates outside the vocabulary, a cache
            that lacks trunk columns, a model that `check_model` refuses.
    """
    if ids_BT.dim() != 2:
        raise ValueError(f"ids_BT must have two axes, rows and tokens, not {tuple(ids_BT.shape)}")
    B, T = ids_BT.shape
    weight_VD = _check_arguments(
        model, ids_BT, response_mask_BT, trigger_BT, candidates_BTK,
        cache, hidden_BTD, signal, vocab_size, nodes_per_slice, chunk,
    )  # fmt: skip
    check_model(model, T)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    confidence_BTK = torch.full(
        candidates_BTK.shape, torch.nan, dtype=wide, device=candidates_BTK.device
    )
    trigger_BT = trigger_BT & response_mask_BT
    next_BT = ids_BT.roll(-1, dims=1)  # the token after each; rubbish after a row's last
    if signal == "sampled_prob":
        followed_BT = response_mask_BT.roll(-1, dims=1)
        followed_BT[:, -1] = False
        trigger_BT = trigger_BT & followed_BT
        next_N = next_BT[trigger_BT]
        if ((next_N < 0) | (next_N >= len(weight_VD))).any():
            raise ValueError(f"ids_BT holds ids outside the vocabulary of {len(weight_VD)}")
    if not trigger_BT.any():
        return confidence_BTK
    if cache is None:
        trunk_pass = model.base_model(input_ids=ids_BT, use_cache=True)
        hidden_BTD, cache = trunk_pass[0], trunk_pass.past_key_values
    trunk = _trunk_keys_values(cache, B, T)

    leaf_BTK = trigger_BT[..., None].expand_as(candidates_BTK)
    if hidden_BTD is not None:  # what the trunk itself predicts after the sampled token
        is_sampled_BTK = leaf_BTK & (candidates_BTK == ids_BT[..., None])
        here_BT = is_sampled_BTK.any(dim=2)
        value_BT = confidence_BTK.new_zeros(B, T)
        value_BT[here_BT] = _read_signal(
            hidden_BTD[here_BT], weight_VD, signal, next_BT[here_BT], chunk
        )
        confidence_BTK = torch.where(is_sampled_BTK, value_BT[..., None], confidence_BTK)
        leaf_BTK = leaf_BTK & ~is_sampled_BTK

    for row_N, column_N, slot_N in _slices(leaf_BTK, nodes_per_slice):
        token_N = candidates_BTK[row_N, column_N, slot_N]
        hidden_ND = _score_slice(model, trunk, row_N, column_N, token_N)
        confidence_BTK[row_N, column_N, slot_N] = _read_signal(
            hidden_ND, weight_VD, signal, next_BT[row_N, column_N], chunk
        )
    return confidence_BTK


def _slices(leaf_BTK: torch.Tensor, nodes_per_slice: int):
    """Yield (row_N, column_N, slot_N) of the leaves, at most `nodes_per_slice` at a time, padding
    of the rows included, sorted by row, then column.

    Every row gives its next few leaves, so that a slice's leaves branch off neighbouring columns
    and its mask stays short.  A leaf pays for the columns of its Q siblings, and for trunk columns
    up to the last one's, so a slice takes at most an eighth of the trunk's length from a row.
    """
    per_row = max(64, leaf_BTK.shape[1] // 8)
    row_N, column_N, slot_N = leaf_BTK.nonzero(as_tuple=True)
    rank_N = torch.arange(len(row_N), device=row_N.device) - torch.searchsorted(row_N, row_N)
    rows = row_N.unique()
    for first in range(0, len(rows), nodes_per_slice):  # more rows than nodes: in groups
        group = rows[first : first + nodes_per_slice]
        left_N, done = torch.isin(row_N, group).nonzero()[:, 0], 0
        while len(left_N):
            each = min(per_row, nodes_per_slice // len(row_N[left_N].unique()))
            now_N = rank_N[left_N] < done + each
            chosen = left_N[now_N]
            yield row_N[chosen], column_N[chosen], slot_N[chosen]
            left_N, done = left_N[~now_N], done + each


def _check_arguments(
    model, ids_BT, response_mask_BT, trigger_BT, candidates_BTK,
    cache, hidden_BTD, signal, vocab_size, nodes_per_slice, chunk,
):  # fmt: skip
    """ValueError for what does not fit; returns the first `vocab_size` rows of the head."""
    for name, ids in (("ids_BT", ids_BT), ("candidates_BTK", candidates_BTK)):
        if ids.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, not {ids.dtype}")
    for name, mask_BT in (("response_mask_BT", response_mask_BT), ("trigger_BT", trigger_BT)):
        if mask_BT.shape != ids_BT.shape or mask_BT.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool tensor of shape {tuple(ids_BT.shape)}")
    if candidates_BTK.dim() != 3 or candidates_BTK.shape[:2] != ids_BT.shape:
        raise ValueError(
            f"candidates_BTK {tuple(candidates_BTK.shape)} does not fit "
            f"ids_BT {tuple(ids_BT.shape)}"
        )
    weight_VD = model.get_output_embeddings().weight
    hidden_shape = (*ids_BT.shape, weight_VD.shape[1])
    if hidden_BTD is not None and (cache is None or hidden_BTD.shape != hidden_shape):
        raise ValueError("hidden_BTD must come with the cache of the same pass over ids_BT")
    if hidden_BTD is not None and hidden_BTD.dtype != weight_VD.dtype:
        if not torch.is_autocast_enabled(hidden_BTD.device.type):
            raise ValueError(f"hidden_BTD is {hidden_BTD.dtype}, the head {weight_VD.dtype}")
    known = model.get_input_embeddings().weight.shape[0]
    if cache is None and ids_BT.numel() and not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < known:
        raise ValueError(f"ids_BT holds {int(ids_BT.min())}..{int(ids_BT.max())}, not ids of model")
    if signal not in SIGNALS:
        raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, not {signal!r}")
    for name, value in (("nodes_per_slice", nodes_per_slice), ("chunk", chunk)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    vocab_size = len(weight_VD) if vocab_size is None else vocab_size
    if not isinstance(vocab_size, Integral) or not 1 <= vocab_size <= len(weight_VD):
        raise ValueError(f"vocab_size must be in 1..{len(weight_VD)}, not {vocab_size}")
    used = candidates_BTK[trigger_BT & response_mask_BT]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < vocab_size:
        raise ValueError(
            f"candidates_BTK holds {int(used.min())}..{int(used.max())} at triggered positions, "
            f"outside the vocabulary of {vocab_size}"
        )
    return weight_VD[:vocab_size]


# -------------------------------------------------------------------------------------- rewards
def group_reward(
    confidence_BTK: torch.Tensor, *, normalize: str = "std", eps: float = 1e-6
) -> torch.Tensor:
    """r_k = (c_k - mean) / (std + eps) within each group: the last axis.

    Args:
        confidence_BTK: from `lookahead_confidence`; groups that hold a nan or an infinity get no
            reward.
        normalize: "std" (the paper: unbiased standard deviation) or "mean" (the authors' script:
            only subtract the mean, so that rewards keep the unit of the signal).
        eps: added to the standard deviation.  Confidences that differ by much less than eps are
            rounding noise and get little; raise it for a bfloat16 teacher.

    Returns:
        reward_BTK, of the same type; mean 0 in every group; 0 where there is no group, and where
        all candidates are equal or alone.

    Raises:
        ValueError: unknown `normalize`, negative `eps`, confidences that are no floats in groups.

    >>> [round(r, 3) for r in group_reward(torch.tensor([0.9, 0.5, 0.1, 0.1])).tolist()]
    [1.306, 0.261, -0.783, -0.783]
    >>> group_reward(torch.tensor([[0.3, 0.3, 0.3], [torch.nan, 0.3, 0.1]])).abs().sum().item()
    0.0
    """
    if normalize not in ("std", "mean"):
        raise ValueError(f'normalize must be "std" or "mean", not {normalize!r}')
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, not {eps}")
    shape = tuple(confidence_BTK.shape)
    if not confidence_BTK.is_floating_point() or not shape or shape[-1] < 1:
        raise ValueError(f"confidence_BTK must be floats [.., K >= 1], not {shape}")
    c_BTK = confidence_BTK.double()
    reward_BTK = c_BTK - c_BTK.mean(dim=-1, keepdim=True)
    if normalize == "std" and c_BTK.shape[-1] > 1:
        reward_BTK = reward_BTK / (c_BTK.std(dim=-1, keepdim=True) + eps)
    spread_BT1 = c_BTK.amax(dim=-1, keepdim=True) - c_BTK.amin(dim=-1, keepdim=True)
    # false for a nan, too; the squares of what is below 1e-150 would underflow
    is_group_BT1 = (spread_BT1 > 1e-150) & spread_BT1.isfinite()
    return torch.where(is_group_BT1, reward_BTK, 0.0).to(confidence_BTK.dtype)


def sampled_reward(
    reward_BTK: torch.Tensor, candidates_BTK: torch.Tensor, ids_BT: torch.Tensor
) -> torch.Tensor:
    """The reward [B, T] of the token that was sampled; 0 where it is not in the group.
    Raises ValueError for shapes that do not fit.

    >>> sampled_reward(torch.tensor([[[1.5, -0.5]] * 3]), torch.tensor([[[7, 8]] * 3]),
    ...                torch.tensor([[7, 8, 9]])).tolist()
    [[1.5, -0.5, 0.0]]
    """
    shapes = [tuple(x.shape) for x in (reward_BTK, candidates_BTK, ids_BT)]
    if shapes[0] != shapes[1] or shapes[0][:-1] != shapes[2] or shapes[0][-1:] in ((), (0,)):
        raise ValueError(f"reward_BTK, candidates_BTK and ids_BT do not fit: {shapes}")
    is_sampled_BTK = candidates_BTK == ids_BT[..., None]
    first_BT1 = is_sampled_BTK.int().argmax(dim=-1, keepdim=True)
    reward_BT = reward_BTK.gather(-1, first_BT1)[..., 0]
    return torch.where(is_sampled_BTK.any(dim=-1), reward_BT, 0.0)


# ----------------------------------------------------------------------------- variant lgr_topk
def union_candidates(
    student_ids_BTK: torch.Tensor, teacher_ids_BTK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' most likely tokens, side by side: ids [B, T, U] and bool [B, T, U], false on
    the teacher's where the student has the same token.  Student's first, in their order.
    Raises ValueError for shapes that do not fit.

    >>> ids, valid = union_candidates(torch.tensor([[[5, 3]]]), torch.tensor([[[3, 9]]]))
    >>> ids.tolist(), valid.tolist()
    ([[[5, 3, 3, 9]]], [[[True, True, False, True]]])
    """
    shapes = tuple(student_ids_BTK.shape), tuple(teacher_ids_BTK.shape)
    if () in shapes or shapes[0][:-1] != shapes[1][:-1]:
        raise ValueError(f"student_ids_BTK {shapes[0]} and teacher_ids_BTK {shapes[1]} do not fit")
    known_BTK = (teacher_ids_BTK[..., None] == student_ids_BTK[..., None, :]).any(dim=-1)
    valid_BTU = torch.cat([torch.ones_like(student_ids_BTK, dtype=torch.bool), ~known_BTK], dim=-1)
    return torch.cat([student_ids_BTK, teacher_ids_BTK], dim=-1), valid_BTU


def topk_loss(
    student_logp_BTU: torch.Tensor,
    teacher_logp_BTU: torch.Tensor,
    valid_BTU: torch.Tensor,
    reward_BTU: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_i p_S(i) [log p_S(i) - log p_T(i) - reward_i] over a set U of tokens, per position.

    Both models are renormalised over U: without that, moving the student's probability out of U
    would lower the sum.  The gradient passes through the weights p_S(i) too.

    Args:
        student_logp_BTU: with gradient; log-probs in nats, any constant per position may be added.
        teacher_logp_BTU: the teacher's at the same tokens.
        valid_BTU: bool, false on repeated tokens; at least one true per position.
        reward_BTU: gamma times the group reward, 0 outside the group; default none.

    Returns:
        loss_BT, in nats.

    Raises:
        ValueError: shapes that differ, log-probs that are no floats, a mask that is not bool.

    >>> logp = torch.tensor([0.5, 0.25]).log()
    >>> topk_loss(logp, logp, torch.tensor([True, True]), torch.tensor([0.3, 0.0])).item()
    -0.20000001788139343
    """
    given = [student_logp_BTU, teacher_logp_BTU, valid_BTU, reward_BTU]
    shapes = [tuple(x.shape) for x in given if x is not None]
    if len(set(shapes)) > 1 or shapes[0] == ():
        raise ValueError(f"student_logp_BTU and the others must have one shape, not {shapes}")
    if not all(x.is_floating_point() for x in given[:2]) or valid_BTU.dtype != torch.bool:
        raise ValueError("student_logp_BTU, teacher_logp_BTU must be floats, valid_BTU bool")
    student_BTU = student_logp_BTU.masked_fill(~valid_BTU, -torch.inf).log_softmax(dim=-1)
    teacher_BTU = teacher_logp_BTU.masked_fill(~valid_BTU, -torch.inf).log_softmax(dim=-1)
    gain_BTU = teacher_BTU if reward_BTU is None else teacher_BTU + reward_BTU
    # before the product: -inf - -inf would be nan, and so would its gradient
    difference_BTU = (student_BTU - gain_BTU).masked_fill(~valid_BTU, 0.0)
    return (student_BTU.exp() * difference_BTU).sum(dim=-1)
