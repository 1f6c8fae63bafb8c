"""Hand-written KV-cached sampling for on-policy distillation.

Samples come from exactly the distribution that is scored: temperature only, no top-p, no top-k cut,
nothing read from a model's `generation_config`.  Off the same logits are read: log-prob of the
sampled token, entropy (trigger of LGR, arXiv 2605.30833) and top-K ids (candidates of the release
rule, arXiv 2605.13643, and of LGR).

  slots    The KV cache is `batch_size` slots of as many columns as the longest row so far.  Token
           t of a row stands in column t and has position id t.  No left padding.
  prefill  All prompt tokens but the last go through the backbone under a causal mask.  The padding
           of a short prompt is overwritten by decoding before anything attends to it.
  decode   One token per live row: write its key and value, attend to the columns up to it.
  retire   A row that ends leaves at once; the last live slot takes its place: only live rows cost.
  refill   When a quarter of the slots is free and prompts are left, new ones are prefilled.
  draws    Step n of row b uses uniform number [b, n], drawn beforehand.  So a sample depends on the
           seed and its row, not on `batch_size` or its neighbours (up to floating-point noise).

Letters: B rows (in the order of the prompts), T tokens (prompt + response), N new tokens, K
candidates, V vocabulary, S live slots, Q prefill columns, L attended columns, E stop ids.
"""

from dataclasses import dataclass
from functools import partial

import torch

BLOCK, PREFILL = 256, 2**14  # columns by which the KV cache grows; tokens of a prefill, or one row


@dataclass
class Rollout:
    """Entry t describes token `ids[:, t]` given `ids[:, :t]`; 0 outside the response."""

    ids_BT: torch.Tensor  # int64, prompt then response, right-padded with `pad_id`
    response_mask_BT: torch.Tensor  # bool, from the first response token to the stop token
    logp_BT: torch.Tensor  # float32 nats, of the sampled token in the distribution drawn from
    entropy_BT: torch.Tensor  # float32 nats, of that distribution
    topk_ids_BTK: torch.Tensor  # int64, its K most probable tokens, best first
    truncated_B: torch.Tensor  # bool, true where `max_new_tokens` ended the row, not a stop token


def sample_token(logits_SV, temperature, uniform_S, top_k, stop_class=None, entropy_top_k=0):
    """Draw one token per row and read its statistics off the same logits.

    The token is the first whose cumulative probability exceeds the row's uniform number, a float64
    in [0, 1).  Temperature 0 takes the most probable token, with the statistics of temperature 1.
    Returns token_S, logp_S and entropy_S (nats), topk_ids_SK. Other arguments: see `generate`.

    >>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    >>> uniform = torch.tensor([0.49, 0.51], dtype=torch.float64)
    >>> token, logp, entropy, topk = sample_token(logits, 1.0, uniform, top_k=1)
    >>> token.tolist(), [round(x, 3) for x in logp.exp().tolist()], round(entropy[0].item(), 3)
    ([0, 1], [0.5, 0.25], 1.04)
    """
    logits_SV = logits_SV.float() / (temperature or 1.0)
    logits_SV = stop_class(logits_SV) if stop_class else logits_SV
    logp_SV = logits_SV.log_softmax(dim=-1)
    prob_SV = logp_SV.exp()
    total_S1 = prob_SV.sum(dim=-1, keepdim=True)  # 1, but for 1e-4 that a CPU's log_softmax loses
    if temperature == 0:
        token_S = logits_SV.argmax(dim=-1)
    else:
        cdf_SV = prob_SV.cumsum(dim=-1, dtype=torch.float64)  # 150,000 small terms
        # u < 1, so u * total < total = cdf[-1]; right=True skips tokens of probability 0
        target_S1 = uniform_S[:, None] * cdf_SV[:, -1:]
        token_S = torch.searchsorted(cdf_SV, target_S1, right=True)[:, 0]
        token_S = token_S.clamp(max=logp_SV.shape[1] - 1)  # beyond it only if logits are NaN
    logp_S1 = logp_SV.gather(1, token_S[:, None]) - total_S1.log()
    if entropy_top_k:  # of these alone; a sampled token from outside takes the last one's place
        sampled_S1, prob_SV = prob_SV.gather(1, token_S[:, None]), prob_SV.topk(entropy_top_k)[0]
        prob_SV[:, -1:].clamp_(max=sampled_S1)
        total_S1 = prob_SV.sum(dim=-1, keepdim=True)
    entropy_S1 = torch.special.entr(prob_SV).sum(dim=-1, keepdim=True) / total_S1 + total_S1.log()
    return token_S, logp_S1[:, 0], entropy_S1[:, 0], logp_SV.topk(top_k, dim=-1).indices


class SlotCache:
    """A KV cache of independent rows; attention layers call its `update`.

    One buffer per layer, [slots, columns, heads, key and value], in autocast's type where that is
    on; zeros at first, because a masked column still enters as 0 * value.  Before a forward,
    `writes` says where its keys and values go, `reads` what is attended to: (slots, columns).
    """

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, columns
        self.layers, self.writes, self.reads = {}, None, None

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Store new keys and values [S, heads, Q, head_dim]; return those to attend to."""
        new = torch.cat([key, value], dim=3).transpose(1, 2)
        if torch.is_autocast_enabled(key.device.type):  # norms of keys make them float32
            new = new.to(torch.get_autocast_dtype(key.device.type))
        buffer = self.buffer(layer_idx, self.reads[1].stop, new)
        buffer[self.writes] = new
        return buffer[self.reads].transpose(1, 2).split([key.shape[3], value.shape[3]], dim=3)

    def buffer(self, layer_idx, width: int, like=None):
        """A layer's, of at least `width` columns; slots that nobody needs go when it grows."""
        old = self.layers[layer_idx] if layer_idx in self.layers else like[:, :0]
        if old.shape[1] < width:
            columns = min(-(-width // BLOCK) * BLOCK, self.columns)
            new = old.new_zeros(self.slots, columns, *old.shape[2:])
            new[: len(old), : old.shape[1]] = old[: self.slots]
            self.layers[layer_idx] = new
        return self.layers[layer_idx]

    def retire(self, done_S, width: int):
        """Copy the last live slots over those that are done; returns the slots that are kept."""
        left = int((~done_S).sum())
        target = done_S[:left].nonzero()[:, 0]
        source = (~done_S[left:]).nonzero()[:, 0] + left
        for buffer in self.layers.values():
            buffer[target, :width] = buffer[source, :width]
        return torch.arange(left, device=done_S.device).index_copy(0, target, source)

    def get_seq_length(self, *args) -> int:
        return 0  # some models ask, but position ids are given


def attention_mask(model, allowed):
    """sdpa takes a boolean mask; eager *adds* it to the scores, where a bool would do nothing."""
    if model.config._attn_implementation == "sdpa":
        return allowed
    return (~allowed).to(model.dtype) * torch.finfo(model.dtype).min


def prefill(model, cache: SlotCache, ids_SQ, first: int) -> None:
    """Feed prompts into slots from `first` on; through the backbone, so no [S, Q, V] logits."""
    Q = ids_SQ.shape[1]
    causal_QQ = torch.ones(Q, Q, dtype=torch.bool, device=ids_SQ.device).tril()
    for part_SQ in ids_SQ.split(max(1, PREFILL // Q)):
        cache.writes = cache.reads = slice(first, first + len(part_SQ)), slice(0, Q)
        model.base_model(
            input_ids=part_SQ, attention_mask=attention_mask(model, causal_QQ[None, None]),
            position_ids=torch.arange(Q, device=ids_SQ.device).expand_as(part_SQ),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        first += len(part_SQ)


def decode_step(model, cache: SlotCache, token_S, column_S, width: int):
    """Feed one token per live slot, in its column < width; returns the logits [S, V] after it."""
    cache.writes = torch.arange(len(token_S), device=token_S.device)[:, None], column_S[:, None]
    cache.reads = slice(0, len(token_S)), slice(0, width)
    allowed_SL = torch.arange(width, device=token_S.device) <= column_S[:, None]
    logits_S1V = model(
        input_ids=token_S[:, None], attention_mask=attention_mask(model, allowed_SL[:, None, None]),
        position_ids=column_S[:, None], past_key_values=cache, use_cache=True,
    ).logits  # fmt: skip
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(cache.layers) != layers:  # it would go on from its last token alone
        raise ValueError(f"model kept keys and values in {len(cache.layers)} of {layers} layers")
    return logits_S1V[:, -1]


@torch.no_grad()
def generate(
    model, prompts, *, max_new_tokens: int, eos_ids, pad_id: int, temperature: float = 1.0,
    top_k: int = 8, batch_size: int | None = None, generator: torch.Generator | None = None,
    vocab_size: int | None = None, decode=None, progress=None, stop_class=None, entropy_top_k=0,
) -> Rollout:  # fmt: skip
    """Sample one response per prompt, in eval mode; rows come back in the order of the prompts.

    model           a Hugging Face causal LM with a plain KV cache, attention "sdpa" or "eager"
    prompts         B lists of token ids, none empty, of any lengths
    max_new_tokens  longest response in tokens, the stop token included
    eos_ids         what ends a response, any number of ids
    pad_id          fills the right end of shorter rows
    temperature     1 samples the model's own distribution; 0 is greedy
    top_k           number K of candidate ids to return per token; never restricts sampling
    batch_size      most rows in flight at once; default all
    generator       draws the B x max_new_tokens uniform numbers; default the global CPU generator
    vocab_size      sample only ids below this (checkpoints pad their heads); default all
    decode          decode(model, cache, step) returns a faster `decode_step` (fast/decode.py)
    stop_class      function of the logits that makes one outcome of `eos_ids` (logprobs.StopClass)
    entropy_top_k   entropy over so many of the likeliest tokens alone, the sampled one among them
    progress        called after every step: progress(tokens drawn, responses that ended with them)
    ValueError: an empty prompt, a number out of range, logits that are not finite, an unused cache.
    """
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"prompts[{lengths.index(0)}] is empty")
    if max_new_tokens < 1 or not temperature >= 0 or min(batch_size or 1, vocab_size or 1) < 1:
        what = f"{max_new_tokens=}, {temperature=}, {batch_size=} or {vocab_size=}"
        raise ValueError(f"{what} is out of range")
    B, longest, device = len(prompts), max(lengths), model.device
    padded = [[*prompt] + [pad_id] * (longest - len(prompt)) for prompt in prompts]
    prompt_BT = torch.tensor(padded, device=device)
    ids_BT = torch.nn.functional.pad(prompt_BT, (0, max_new_tokens), value=pad_id)
    how = {"dtype": torch.float64, "device": getattr(generator, "device", "cpu")}
    uniform_BN = torch.rand(B, max_new_tokens if temperature else 0, generator=generator, **how)
    uniform_BN, eos_E = uniform_BN.to(device), torch.tensor(sorted(set(eos_ids)), device=device)

    def draw(logits_SV, row_S, n_S):
        how = uniform_BN[row_S, n_S] if temperature else None, top_k, stop_class, entropy_top_k
        token_S, *rest = sample_token(logits_SV[:, :vocab_size], temperature, *how)
        stopped_S = torch.isin(token_S, eos_E)
        return stopped_S | (n_S + 1 == max_new_tokens), stopped_S, token_S, *rest

    cache = SlotCache(min(batch_size or B, B), longest + max_new_tokens)
    step = partial(decode_step, model, cache)
    step = decode(model, cache, step) if decode else step
    was_training = model.training
    model.eval()  # no dropout, and no gradient checkpointing, which drops the cache
    try:
        return _sample(ids_BT, lengths, model, cache, step, draw, top_k, progress)
    finally:
        model.train(was_training)


def _sample(ids_BT, lengths, model, cache: SlotCache, step, draw, top_k, progress) -> Rollout:
    """The loop: refill, decode, draw, record, retire.  `lengths`: those of the prompts."""
    B, shape, device = len(lengths), ids_BT.shape, ids_BT.device
    mask_BT, logp_BT = torch.zeros_like(ids_BT, dtype=torch.bool), torch.zeros(shape, device=device)
    entropy_BT, truncated_B = logp_BT.clone(), mask_BT.any(dim=1)
    topk_ids_BTK = ids_BT.new_zeros(*shape, top_k)
    length_B = torch.tensor(lengths, device=device)
    row_S = column_S = length_B[:0]  # of every live slot: its row, the column of the token to feed
    admitted = width = 0  # rows so far; columns in use, that of the token to feed included
    while len(row_S) or admitted < B:
        free = cache.slots - len(row_S)
        if admitted < B and free >= max(1, cache.slots // 4):  # a prefill is for several rows
            new_S = torch.arange(admitted, min(admitted + free, B), device=device)
            longest = max(lengths[admitted : admitted + free])
            if longest > 1:
                prefill(model, cache, ids_BT[new_S, : longest - 1], first=len(row_S))
            row_S = torch.cat([row_S, new_S])
            column_S = torch.cat([column_S, length_B[new_S] - 1])
            admitted, width = admitted + len(new_S), max(width, longest)
        logits_SV = step(ids_BT[row_S, column_S], column_S, width)
        column_S, width = column_S + 1, width + 1  # from here on those of the token that is drawn
        n_S, at = column_S - length_B[row_S], (row_S, column_S)
        done_S, stopped_S, token_S, *statistics = draw(logits_SV, row_S, n_S)
        ids_BT[at], mask_BT[at] = token_S, True
        logp_BT[at], entropy_BT[at], topk_ids_BTK[at] = statistics
        truncated_B[row_S] = ~stopped_S  # the last step of a row decides
        ended = int(done_S.sum())  # the one wait for a GPU per token
        if progress:
            progress(len(row_S), ended)
        if ended:
            kept_S = cache.retire(done_S, width)
            row_S, column_S = row_S[kept_S], column_S[kept_S]
            cache.slots = cache.slots if admitted < B else len(row_S)
            width = max(column_S.tolist(), default=-1) + 1

    if not logp_BT.isfinite().all():
        raise ValueError("the model returned non-finite logits while sampling")
    used = int(mask_BT.any(dim=0).nonzero().max()) + 1
    tensors = (ids_BT, mask_BT, logp_BT, entropy_BT, topk_ids_BTK)
    return Rollout(*(tensor_BT[:, :used].contiguous() for tensor_BT in tensors), truncated_B)
