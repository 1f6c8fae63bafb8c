"""Lookahead Group Reward (LGR): ask the teacher one token ahead, where the student hesitates.

Paper: "Your Teacher Can't Help You Here", arXiv 2605.30833. Where the student is uncertain, each of
its top-K candidates is put in the place of the sampled token, the teacher reads it, and the
candidate is rewarded by how confident the teacher then is, relative to its group:

    trigger_t   = H(p_S(. | x, y_<t)) > tau                                   `trigger`
    c_t,k       = max_v p_T(v | x, y_<t, candidate_k)                         `lookahead_confidence`
    r_t,k       = (c_t,k - mean_k c_t) / (std_k c_t + eps)                    `group_reward`
    A_t         = log p_T(y_t) - log p_S(y_t) + gamma r_t(y_t)                `sampled_reward`

Tree attention. Prompt and response are the trunk; each candidate is a leaf that branches off it:

    trunk    x1  x2  y3  y4  y5          a leaf at position t has position id t, sees the trunk
    leaves           a3  a4  a5          before t and itself, and no other leaf: what the teacher
                     b3  b4  b5          predicts there is what it would after x, y_<t, candidate

The trunk is not read again: leaves attend to the KV cache of the pass that scored the rollout, and
nothing is appended to it. The leaf of the sampled token is the trunk itself, so it costs nothing.

Letters: B rows, T tokens, K candidates, V vocabulary, D width, N leaves, U tokens of a union; in
one forward pass R rows that have leaves, Q leaves per row, L columns of the trunk; C of a chunk.
"""

import types

import torch

# The teacher's confidence [C], of its logits, their log-sum-exp and the student's next token.
# "max_prob" is the paper's, the others are our reading of two names in its ablation.
SIGNALS = {
    "max_prob": lambda z_CV, lse_C, next_C1: (z_CV.amax(dim=-1) - lse_C).exp(),
    "sampled_prob": lambda z_CV, lse_C, next_C1: (z_CV.gather(1, next_C1)[:, 0] - lse_C).exp(),
    "entropy": lambda z_CV, lse_C, _: -torch.special.entr((z_CV - lse_C[:, None]).exp()).sum(-1),
}


def trigger(entropy_BT, response_mask_BT, threshold: float = 0.2) -> torch.Tensor:
    """Where to look ahead, bool [B, T]: response tokens (bool mask) where the student's entropy, in
    nats, exceeds tau. It is exact; the authors' code takes that of the top 20 tokens.

    >>> trigger(torch.tensor([[0.9, 0.1, 0.3]]), torch.tensor([[False, True, True]])).tolist()
    [[False, False, True]]
    """
    return (entropy_BT > threshold) & response_mask_BT


# ----------------------------------------------------------------- confidence by tree attention
def _read_leaves(model, trunk, row_N, position_N, token_N) -> torch.Tensor:
    """One forward pass over leaves, sorted by row; returns their hidden states [N, D]."""
    row_R, own_N = row_N.unique(return_inverse=True)
    place_N = torch.arange(len(row_N), device=row_N.device) - torch.searchsorted(own_N, own_N)
    R, Q, reach = len(row_R), int(place_N.max()) + 1, int(position_N.max())
    ids_RQ, position_RQ = token_N.new_zeros(R, Q), token_N.new_zeros(R, Q)  # rows filled up with 0
    ids_RQ[own_N, place_N], position_RQ[own_N, place_N] = token_N, position_N
    trunk_RQL = torch.arange(reach, device=row_N.device) < position_RQ[..., None]  # before it ...
    itself_RQQ = torch.eye(Q, dtype=torch.bool, device=row_N.device).expand(R, Q, Q)  # and itself
    mask = torch.cat([trunk_RQL, itself_RQQ], dim=2)[:, None]
    if model.config._attn_implementation == "eager":  # it adds the mask: a bool would do nothing
        mask = (~mask).to(model.dtype) * torch.finfo(model.dtype).min
    rows, used = slice(None) if R == len(trunk.layers[0].keys) else row_R, []  # a view if it may be

    def update(key, value, layer_idx, *args, **kwargs):
        layer = trunk.layers[layer_idx]
        used.append(layer_idx)
        pairs = (layer.keys, key), (layer.values, value)
        return tuple(torch.cat([a[rows, :, :reach].to(b.dtype), b], dim=2) for a, b in pairs)

    # what attention layers take for a KV cache; it stores nothing, so the trunk stays as it is
    tree = types.SimpleNamespace(update=update, get_seq_length=lambda *args: 0)
    arguments = {"input_ids": ids_RQ, "position_ids": position_RQ, "past_key_values": tree}
    hidden_RQD = model.base_model(**arguments, attention_mask=mask, use_cache=True)[0]
    if len(used) != len(trunk.layers):
        raise ValueError(f"cache was used in {len(used)} of {len(trunk.layers)} layers")
    return hidden_RQD[own_N, place_N]


def _slices(leaf_BTK, nodes_per_slice: int):
    """Yield (row_N, column_N, slot_N) of the leaves of one forward pass after another, sorted by
    row, then column; at most `nodes_per_slice`, padding included. All rows are padded to the
    longest and masked up to the last column, so a row gives its next few (`most`) at a time."""
    left_N3, most = leaf_BTK.nonzero(), max(64, leaf_BTK.shape[1] // 8)
    while len(left_N3):
        row_R, own_N = left_N3[:, 0].unique(return_inverse=True)
        place_N = torch.arange(len(own_N), device=own_N.device) - torch.searchsorted(own_N, own_N)
        rows = min(len(row_R), nodes_per_slice)
        now_N = (own_N < rows) & (place_N < min(most, nodes_per_slice // rows))
        yield tuple(left_N3[now_N].unbind(1))
        left_N3 = left_N3[~now_N]


def _read_signal(hidden_ND, weight_VD, signal, next_N, chunk, stop_class) -> torch.Tensor:
    """The confidence [N] after each hidden state; never more than [chunk, V] logits."""
    wide, out = torch.promote_types(weight_VD.dtype, torch.float32), []
    for hidden_CD, next_C in zip(hidden_ND.split(chunk), next_N.split(chunk), strict=True):
        logits_CV = (hidden_CD @ weight_VD.T).to(wide)
        logits_CV = stop_class(logits_CV) if stop_class else logits_CV
        out.append(SIGNALS[signal](logits_CV, logits_CV.logsumexp(dim=-1), next_C[:, None]))
    return torch.cat(out)


@torch.no_grad()
def lookahead_confidence(
    model, ids_BT, response_mask_BT, trigger_BT, candidates_BTK, *, cache=None, hidden_BTD=None,
    signal="max_prob", vocab_size=None, stop_class=None, nodes_per_slice=4096, chunk=1024,
) -> torch.Tensor:  # fmt: skip
    """The teacher's confidence one step after each candidate, by tree attention.

    model: the teacher, a Hugging Face causal LM in eval mode that passes `self_check`.
    ids_BT, candidates_BTK: int64; the rollouts, left-aligned, and what takes the place of ids_BT,
        one at a time, where response_mask_BT and trigger_BT (bool) are true.
    cache, hidden_BTD: KV cache and last hidden states of one pass of `model` over ids_BT. Without a
        cache that pass is made here; without hidden states the sampled tokens are read again.
    signal: one of SIGNALS. vocab_size: rows of the head to use. stop_class: a logprobs.StopClass.
    nodes_per_slice: most leaves in a pass, with padding. chunk: most leaves with logits at a time.
    Returns [B, T, K]: in [0, 1], or nats <= 0 for "entropy"; nan where not triggered, or nothing
    follows ("sampled_prob"). ValueError: masks that are not bool [B, T], a cache that lacks tokens.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)).eval()
    >>> ids_BT, mask_BT = torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]])
    >>> c_BTK = lookahead_confidence(model, ids_BT, mask_BT, mask_BT, ids_BT[..., None] + 4)
    >>> plain = model(torch.tensor([[1, 2, 7]])).logits[0, -1].softmax(-1).max()
    >>> torch.allclose(c_BTK[0, 2, 0], plain, atol=1e-6)
    True
    """
    for mask_BT in (response_mask_BT, trigger_BT):
        if mask_BT.dtype != torch.bool or mask_BT.shape != ids_BT.shape:
            raise ValueError(f"masks must be bool [B, T], not {mask_BT.dtype} {[*mask_BT.shape]}")
    trigger_BT, next_BT = trigger_BT & response_mask_BT, ids_BT.roll(-1, dims=1)
    if signal == "sampled_prob":  # nothing follows a row's last token
        trigger_BT = trigger_BT & torch.nn.functional.pad(response_mask_BT[:, 1:], (0, 1))
    weight_VD = model.get_output_embeddings().weight[:vocab_size]
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    confidence_BTK = torch.full(candidates_BTK.shape, torch.nan, dtype=wide, device=ids_BT.device)
    if not trigger_BT.any():
        return confidence_BTK
    if cache is None:
        trunk = model.base_model(input_ids=ids_BT, use_cache=True)
        cache, hidden_BTD = trunk.past_key_values, trunk[0]
    B, T = ids_BT.shape
    if any(len(layer.keys) != B or layer.keys.shape[2] < T for layer in cache.layers):
        raise ValueError(f"cache lacks some of {B} rows of {T} tokens (a sliding window does)")

    def keep(hidden_ND, leaf):
        how = signal, next_BT[leaf[:2]], chunk, stop_class
        confidence_BTK[leaf] = _read_signal(hidden_ND, weight_VD, *how)

    leaf_BTK = trigger_BT[..., None].expand_as(candidates_BTK)
    if hidden_BTD is not None:  # what the trunk itself predicts after the sampled token
        sampled_BTK = leaf_BTK & (candidates_BTK == ids_BT[..., None])
        leaf = sampled_BTK.nonzero(as_tuple=True)
        keep(hidden_BTD[leaf[:2]], leaf)
        leaf_BTK = leaf_BTK & ~sampled_BTK
    for leaf in _slices(leaf_BTK, max(1, nodes_per_slice)):
        keep(_read_leaves(model, cache, *leaf[:2], candidates_BTK[leaf]), leaf)
    return confidence_BTK


@torch.no_grad()
def self_check(model, *, tolerance: float | None = None) -> None:
    """Compare the tree with plain forward passes on eight tokens, once per model. This finds what
    no config says: a mask or position ids that are not obeyed, a head that is more than a matrix,
    layers without a plain cache. It cannot see a window of more than eight tokens.
    tolerance: of the mean of |ln(tree / plain)|, largest probabilities; 0.01, or 0.2 for 16 bits.
    Raises ValueError that names the model's class if they differ by more, or one fails.
    """
    name, coarse = type(model).__name__, torch.finfo(model.dtype).bits == 16
    try:
        V = len(model.get_output_embeddings().weight)
        ids_BT = torch.arange(1, 9, device=model.device)[None] % V
        other_BT, mask_BT = (ids_BT + 1) % V, torch.arange(8, device=model.device)[None] > 0
        tree_BTK = lookahead_confidence(model, ids_BT, mask_BT, mask_BT, other_BT[..., None])
        paths = [torch.cat([ids_BT[:, :t], other_BT[:, t : t + 1]], dim=1) for t in range(1, 8)]
        logits = [model(input_ids=path, use_cache=False).logits[:, -1] for path in paths]
    except Exception as error:
        raise ValueError(f"{name} is not supported: {error}") from error
    plain_T = torch.cat(logits).double().softmax(dim=-1).amax(dim=-1)
    error = (tree_BTK[0, 1:, 0].double() / plain_T).log().abs().mean()
    if not error <= ((0.2 if coarse else 0.01) if tolerance is None else tolerance):
        why = f"tree attention and plain passes differ by a factor of {error.exp():.3g}"
        raise ValueError(f"{name} is not supported: {why}")


# -------------------------------------------------------------------------------------- rewards
def group_reward(confidence_BTK, *, normalize: str = "std", eps: float = 1e-6) -> torch.Tensor:
    """r_k = (c_k - mean) / (std + eps) within each group, the last axis; of the same type.
    All 0 where candidates are equal or alone, and in a group that holds a nan or an infinity.
    normalize: "std" (the paper: the unbiased one), "mean" (the authors' script: no division) or
        "guard" (their code with its switch on: by std alone, where it is above 1e-8).
    eps: damps the rewards of groups that differ by less than it.
    Raises ValueError for another normalize, and eps < 0.

    >>> [round(r, 3) for r in group_reward(torch.tensor([0.9, 0.5, 0.1, 0.1])).tolist()]
    [1.306, 0.261, -0.783, -0.783]
    """
    if normalize not in ("std", "mean", "guard") or not eps >= 0:
        wanted = "normalize must be std, mean or guard, eps >= 0"
        raise ValueError(f"{wanted}, not {normalize!r}, {eps}")
    reward_BTK = (c_BTK := confidence_BTK.double()) - c_BTK.mean(dim=-1, keepdim=True)
    if normalize != "mean" and c_BTK.shape[-1] > 1:
        std_BT1 = c_BTK.std(dim=-1, keepdim=True)
        guarded_BT1 = std_BT1.where(std_BT1 > 1e-8, 1.0)
        reward_BTK = reward_BTK / (std_BT1 + eps if normalize == "std" else guarded_BT1)
    spread_BT1 = c_BTK.amax(dim=-1, keepdim=True) - c_BTK.amin(dim=-1, keepdim=True)
    is_group_BT1 = (spread_BT1 > 1e-150) & spread_BT1.isfinite()  # below, squares underflow
    return torch.where(is_group_BT1, reward_BTK, 0.0).to(torch.result_type(confidence_BTK, 1.0))


def difference_reward(confidence_BTK, before_BT) -> torch.Tensor:
    """c_k - c: what candidates add to the teacher's confidence before them; 0 where not triggered
    (ours). Were the group the whole vocabulary, its expected gradient would be that of "mean"."""
    return (confidence_BTK - before_BT[..., None]).nan_to_num(nan=0.0)


def sampled_reward(reward_BTK, candidates_BTK, ids_BT) -> torch.Tensor:
    """The reward [B, T] of the token that was sampled (the first, if its group holds it twice); 0
    where it is not in its group, as in the authors' code. Raises ValueError for shapes that differ.

    >>> sampled_reward(torch.tensor([[[1.5, -0.5]] * 3]), torch.tensor([[[7, 8]] * 3]),
    ...                torch.tensor([[7, 8, 9]])).tolist()
    [[1.5, -0.5, 0.0]]
    """
    if not reward_BTK.shape == candidates_BTK.shape == (*ids_BT.shape, reward_BTK.shape[-1]):
        raise ValueError(f"ids_BT {[*ids_BT.shape]} does not fit {[*candidates_BTK.shape]}")
    is_sampled_BTK = candidates_BTK == ids_BT[..., None]
    first_BT1 = is_sampled_BTK.int().argmax(dim=-1, keepdim=True)
    return torch.where(is_sampled_BTK.any(dim=-1), reward_BTK.gather(-1, first_BT1)[..., 0], 0.0)


def union_candidates(student_ids_BTK, teacher_ids_BTK) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' top tokens side by side, [B, T, U], and a bool mask of this shape: false on the
    teacher's where the student has the same token. For `topk_loss`.

    >>> ids, valid = union_candidates(torch.tensor([[[5, 3]]]), torch.tensor([[[3, 9]]]))
    >>> ids.tolist(), valid.tolist()
    ([[[5, 3, 3, 9]]], [[[True, True, False, True]]])
    """
    known_BTK = (teacher_ids_BTK[..., None] == student_ids_BTK[..., None, :]).any(dim=-1)
    valid_BTU = torch.cat([torch.ones_like(student_ids_BTK, dtype=torch.bool), ~known_BTK], dim=-1)
    return torch.cat([student_ids_BTK, teacher_ids_BTK], dim=-1), valid_BTU


def topk_loss(student_logp_BTU, teacher_logp_BTU, valid_BTU, reward_BTU=None) -> torch.Tensor:
    """sum_i p_S(i) [log p_S(i) - log p_T(i) - reward_i] over a set U of tokens, [B, T], nats.

    Both models are renormalised over U, or the student could lower the sum by leaving U. The
    gradient passes through the weights p_S(i), too (the authors' code). valid_BTU: bool, false on
    repeated tokens. reward_BTU: gamma times the group reward, 0 outside the group; or None.

    >>> logp = torch.tensor([0.5, 0.25]).log()
    >>> topk_loss(logp, logp, torch.tensor([True, True]), torch.tensor([0.3, 0.0])).item()
    -0.20000001788139343
    """
    student_BTU = student_logp_BTU.masked_fill(~valid_BTU, -torch.inf).log_softmax(dim=-1)
    teacher_BTU = teacher_logp_BTU.masked_fill(~valid_BTU, -torch.inf).log_softmax(dim=-1)
    gain_BTU = teacher_BTU if reward_BTU is None else teacher_BTU + reward_BTU
    # before the product: -inf - -inf would be nan, and so would its gradient
    difference_BTU = (student_BTU - gain_BTU).masked_fill(~valid_BTU, 0.0)
    return (student_BTU.exp() * difference_BTU).sum(dim=-1)
