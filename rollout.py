"""Hand-written KV-cached sampling for on-policy distillation.

On-policy distillation trains the student on its own samples, so this file decides what the loss is
an expectation over.  It samples from exactly the distribution that is scored: temperature only, no
top-p, no top-k cut, nothing read from a model's `generation_config`.  Everything that the two
methods need of the student is read off the logits that sampling had in hand: the log-prob of the
sampled token, the entropy (trigger of the Lookahead Group Reward, arXiv 2605.30833) and the top-K
candidate ids (candidates of the release rule, arXiv 2605.13643, and of LGR).  No second student
pass is needed for scoring.

How it works
  slots     The KV cache is allocated once, as `batch_size` slots of `longest prompt +
            max_new_tokens` columns.  Rows are left-aligned: token t of a row lives in column t and
            has position id t, whatever the other rows' prompts look like.  No left padding.
  prefill   All prompt tokens but the last go through the backbone (no vocabulary head) under a
            causal mask.  The columns of the right padding hold rubbish until decoding overwrites
            them, and a column is only attended to after that.
  decode    One token per live row and step: write its key and value into the row's own column,
            attend to the columns up to it.
  retire    A row that ends leaves the batch at once: the last live slot moves into its place, so
            the live rows stay a prefix of the cache and a step costs what its live rows cost.
  refill    When enough slots are free and prompts are left, new prompts are prefilled into them.
  draws     Every (row, step) has its own uniform number, drawn before sampling starts; a token is
            the inverse of the cumulative distribution there.  So a row's sample depends on the
            seed and the row, not on `batch_size`, its neighbours or the order of refilling (up to
            floating-point noise of batched matrix products).

Letters: B rows (in the order of the prompts), T tokens (prompt + response), K candidates, V
vocabulary, S live slots, Q prefill columns, L attended columns.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass
class Rollout:
    """What sampling leaves behind.  Entry t describes token `ids[:, t]` given `ids[:, :t]`.

    ids_BT            int64, prompt then response, right-padded with `pad_id`
    response_mask_BT  bool, true from the first response token to the stop token, both included
    logp_BT           float32 nats, log-prob of the sampled token at the sampling temperature
                      (greedy rollouts: at temperature 1); 0 outside the response
    entropy_BT        float32 nats, entropy of the distribution the token was drawn from; 0 outside
    topk_ids_BTK      int64, the K most probable tokens there, best first; 0 outside
    truncated_B       bool, true where `max_new_tokens` ended the row, not a stop token
    """

    ids_BT: torch.Tensor
    response_mask_BT: torch.Tensor
    logp_BT: torch.Tensor
    entropy_BT: torch.Tensor
    topk_ids_BTK: torch.Tensor
    truncated_B: torch.Tensor


def sample_token(
    logits_SV: torch.Tensor, temperature: float, uniform_S: torch.Tensor | None, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token per row and read its statistics off the same logits.

    Inverse-CDF sampling: the token is the first whose cumulative probability exceeds u.  The sum
    runs in float64, so that 150,000 small terms do not move the boundaries.

    Args:
        logits_SV: logits of the next token, any float type.
        temperature: divides the logits; 0 takes the most probable token.
        uniform_S: float64 numbers in [0, 1); unused when greedy.
        top_k: number of candidates to return.

    Returns:
        token_S, logp_S (nats), entropy_S (nats), topk_ids_SK.

    >>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    >>> uniform = torch.tensor([0.49, 0.51], dtype=torch.float64)
    >>> token, logp, entropy, topk = sample_token(logits, 1.0, uniform, top_k=1)
    >>> token.tolist(), [round(x, 3) for x in logp.exp().tolist()], round(entropy[0].item(), 3)
    ([0, 1], [0.5, 0.25], 1.04)
    """
    logp_SV = torch.log_softmax(logits_SV.float() / (temperature or 1.0), dim=-1)
    prob_SV = logp_SV.exp()
    if temperature == 0:
        token_S = logits_SV.argmax(dim=-1)
    else:
        cdf_SV = prob_SV.cumsum(dim=-1, dtype=torch.float64)
        # u < 1, so u * total < total = cdf[-1], and right=True skips tokens of probability 0
        target_S1 = uniform_S[:, None] * cdf_SV[:, -1:]
        token_S = torch.searchsorted(cdf_SV, target_S1, right=True)[:, 0]
        token_S = token_S.clamp_(max=logp_SV.shape[1] - 1)  # only NaN logits get there
    entropy_S = torch.special.entr(prob_SV).sum(dim=-1)
    topk_ids_SK = logp_SV.topk(top_k, dim=-1).indices
    return token_S, logp_SV.gather(1, token_S[:, None])[:, 0], entropy_S, topk_ids_SK


class SlotCache:
    """A preallocated KV cache of independent rows, shaped as Hugging Face attention layers expect.

    `select` names the slots and columns that the next forward call writes; the layers then call
    `update` once each.  Buffers are made at the first call of each layer: [slots, heads, columns,
    head_dim] in the layer's own type, or in autocast's, where a float32 norm would otherwise make
    the keys twice as large as attention reads them.  They start at zero, because a masked column
    still enters 0 * value.
    """

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, columns
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def select(self, first: int, last: int, column_S: torch.Tensor | None, width: int) -> None:
        """Write slots [first, last): at one column per row, or (None) at columns 0..width-1."""
        self.rows, self.column_S, self.width = slice(first, last), column_S, width

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Store the new keys and values [S, heads, Q, head_dim]; return those to attend to."""
        device = key.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            key, value = key.to(dtype), value.to(dtype)
        if layer_idx not in self.layers:
            self.layers[layer_idx] = tuple(
                x.new_zeros(self.slots, x.shape[1], self.columns, x.shape[3]) for x in (key, value)
            )
        stored = []
        for buffer, new in zip(self.layers[layer_idx], (key, value), strict=True):
            buffer = buffer[self.rows]
            if self.column_S is None:
                buffer[:, :, : self.width] = new
            else:
                slot_S = torch.arange(new.shape[0], device=new.device)
                buffer[slot_S, :, self.column_S] = new[:, :, 0]
            stored.append(buffer[:, :, : self.width])
        return stored[0], stored[1]

    def move(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        """Copy the first `width` columns of the slots `source` over the slots `target`."""
        for buffers in self.layers.values():
            for buffer in buffers:
                buffer[target, :, :width] = buffer[source, :, :width]

    def get_seq_length(self, *args) -> int:
        """Some models ask; they are given explicit position ids, so the answer is not used."""
        return 0


def attention_mask(model, allowed: torch.Tensor) -> torch.Tensor:
    """A boolean [.., Q, L] mask in the form that the model's attention takes it.

    sdpa takes booleans; eager *adds* the mask to the scores, where a boolean would silently do
    nothing of use, so it gets 0 and the most negative number.
    """
    if model.config._attn_implementation == "sdpa":
        return allowed
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device).masked_fill_(
        ~allowed, lowest
    )


def check_model(model, longest: int) -> None:
    """Refuse what this sampler would get wrong.

    Raises:
        ValueError: encoder-decoders; layers that are recurrent, chunked or local; position ids
            that are not an argument; an attention implementation that takes no 4D mask; a sliding
            window or a position limit shorter than `longest` tokens.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder, not a causal LM")
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attention implementation {implementation!r} takes no 4D mask; load the model with "
            'attn_implementation="sdpa"'
        )
    named = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = set(named or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of types {sorted(kinds)} are not supported")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no position ids")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    if window and sliding and longest > window:
        raise ValueError(
            f"longest prompt + max_new_tokens = {longest} tokens exceed the model's sliding window "
            f"of {window}"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise ValueError(
            f"longest prompt + max_new_tokens = {longest} tokens exceed the model's context of "
            f"{limit}"
        )


def check_arguments(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    batch_size: int | None,
    vocab_size: int,
    known_ids: int,
) -> None:
    """Raise ValueError, naming the argument and the value, for anything `generate` cannot do."""
    if len(prompts) == 0:
        raise ValueError("prompts is empty")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{row}] is empty: a causal LM needs at least one token")
        if min(prompt) < 0 or max(prompt) >= known_ids:
            raise ValueError(f"prompts[{row}] holds ids outside the model's {known_ids}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number >= 0, not {temperature}")
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be between 1 and the vocabulary's {vocab_size}, not {top_k}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Iterable[int],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 8,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> Rollout:
    """Sample one response per prompt.

    Args:
        model: any Hugging Face causal LM with a KV cache, attention "sdpa" or "eager".
        prompts: B lists of token ids, none empty, of any lengths.
        max_new_tokens: longest response in tokens, the stop token included.
        eos_ids: ids that end a response; may be empty.
        pad_id: fills the right end of shorter rows.
        temperature: 1 samples the model's own distribution; 0 is greedy.
        top_k: number K of candidate ids to return per position.  It never restricts sampling.
        batch_size: most rows in flight at once; default all.
        generator: source of the B x max_new_tokens uniform numbers (on its own device), row after
            row; default the global CPU generator.
        vocab_size: sample only ids below this (checkpoints pad their heads); default all.
            Prompts may hold any id that the model has.

    Returns:
        A `Rollout` on the model's device, rows in the order of the prompts.

    Raises:
        ValueError: bad arguments, a prompt that does not fit, a model that `check_model` refuses
            or that does not use the cache, or non-finite logits.
    """
    head_rows = model.get_output_embeddings().weight.shape[0]
    vocab_size = head_rows if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= head_rows:
        raise ValueError(f"vocab_size must be in 1..{head_rows}, not {vocab_size}")
    known_ids = model.get_input_embeddings().weight.shape[0]
    check_arguments(
        prompts, max_new_tokens, temperature, top_k, batch_size, vocab_size, known_ids
    )
    columns = max(len(prompt) for prompt in prompts) + max_new_tokens
    check_model(model, columns)
    was_training = model.training
    model.eval()
    try:
        sampler = _Sampler(model, prompts, max_new_tokens, columns, eos_ids, pad_id, temperature)
        sampler.draw(generator)
        return sampler.run(min(batch_size or len(prompts), len(prompts)), top_k, vocab_size)
    finally:
        model.train(was_training)


class _Sampler:
    """The state of one `generate` call; slots 0..live-1 are the rows in flight."""

    def __init__(self, model, prompts, max_new_tokens, columns, eos_ids, pad_id, temperature):
        self.model, self.device = model, model.device
        self.prompts, self.columns, self.pad_id = prompts, columns, pad_id
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.eos_ids = torch.tensor(sorted(set(eos_ids)), dtype=torch.int64, device=self.device)
        self.prompt_length_B = torch.tensor([len(p) for p in prompts], device=self.device)
        self.uniform_BN = None

    def draw(self, generator: torch.Generator | None) -> None:
        """One uniform number per (row, step), before anything depends on the model."""
        if self.temperature > 0:
            shape = (len(self.prompts), self.max_new_tokens)
            where = generator.device if generator is not None else "cpu"
            uniform_BN = torch.rand(shape, dtype=torch.float64, generator=generator, device=where)
            self.uniform_BN = uniform_BN.to(self.device)

    def run(self, slots: int, top_k: int, vocab_size: int) -> Rollout:
        """The loop: admit, decode, sample, record, retire."""
        shape, device = (len(self.prompts), self.columns), self.device
        out = Rollout(
            ids_BT=torch.full(shape, self.pad_id, device=device),
            response_mask_BT=torch.zeros(shape, dtype=torch.bool, device=device),
            logp_BT=torch.zeros(shape, device=device),
            entropy_BT=torch.zeros(shape, device=device),
            topk_ids_BTK=torch.zeros(*shape, top_k, dtype=torch.int64, device=device),
            truncated_B=torch.zeros(shape[0], dtype=torch.bool, device=device),
        )
        for row, prompt in enumerate(self.prompts):
            out.ids_BT[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self.cache = SlotCache(slots, self.columns)
        self.row_S = torch.zeros(slots, dtype=torch.int64, device=device)  # which prompt
        self.column_S = torch.zeros(slots, dtype=torch.int64, device=device)  # of the next token in
        live, admitted, width = 0, 0, 0
        while live or admitted < len(self.prompts):
            # refilling in groups spreads the cost of a prefill over several rows
            free = slots - live
            if admitted < len(self.prompts) and (live == 0 or free >= max(1, slots // 4)):
                count = min(free, len(self.prompts) - admitted)
                width = max(width, self.admit(out.ids_BT, live, admitted, count))
                live, admitted = live + count, admitted + count
            row_S, column_S = self.row_S[:live], self.column_S[:live]
            logits_SV = self.decode(out.ids_BT[row_S, column_S], column_S, width)[:, :vocab_size]
            column_S += 1  # from here on the column of the sampled token
            width += 1
            step_S = column_S - self.prompt_length_B[row_S]
            uniform_S = None if self.uniform_BN is None else self.uniform_BN[row_S, step_S]
            token_S, logp_S, entropy_S, topk_SK = sample_token(
                logits_SV, self.temperature, uniform_S, top_k
            )
            out.ids_BT[row_S, column_S] = token_S
            out.logp_BT[row_S, column_S] = logp_S
            out.entropy_BT[row_S, column_S] = entropy_S
            out.topk_ids_BTK[row_S, column_S] = topk_SK
            out.response_mask_BT[row_S, column_S] = True
            stopped_S = torch.isin(token_S, self.eos_ids)
            full_S = step_S + 1 == self.max_new_tokens
            out.truncated_B[row_S] = full_S & ~stopped_S
            done_S = stopped_S | full_S
            if done_S.any():
                live = self.retire(live, done_S, width)
                width = int(self.column_S[:live].max()) + 1 if live else 0
        if not torch.isfinite(out.logp_BT).all():
            raise ValueError("the model returned non-finite logits while sampling")
        used = int(out.response_mask_BT.any(dim=0).nonzero().max()) + 1
        for name in ("ids_BT", "response_mask_BT", "logp_BT", "entropy_BT", "topk_ids_BTK"):
            setattr(out, name, getattr(out, name)[:, :used].contiguous())
        return out

    def admit(self, ids_BT: torch.Tensor, first: int, row: int, count: int) -> int:
        """Prefill prompts row..row+count-1 into slots first..first+count-1, all but their last
        tokens, which the next decode step feeds.  Returns the number of columns in use."""
        self.row_S[first : first + count] = torch.arange(row, row + count, device=self.device)
        self.column_S[first : first + count] = self.prompt_length_B[row : row + count] - 1
        longest = int(self.prompt_length_B[row : row + count].max())
        if longest > 1:
            Q = longest - 1
            causal_QQ = torch.ones(Q, Q, dtype=torch.bool, device=self.device).tril_()
            self.cache.select(first, first + count, None, Q)
            self.model.base_model(  # the backbone: no head, so no [B, Q, V] logits
                input_ids=ids_BT[row : row + count, :Q],
                attention_mask=attention_mask(self.model, causal_QQ[None, None]),
                position_ids=torch.arange(Q, device=self.device).expand(count, Q),
                past_key_values=self.cache,
                use_cache=True,
            )
        return longest

    def decode(self, token_S: torch.Tensor, column_S: torch.Tensor, width: int) -> torch.Tensor:
        """Feed one token per live slot; returns the logits [S, V] of the next one."""
        self.cache.select(0, len(token_S), column_S, width)
        allowed_SL = torch.arange(width, device=self.device) <= column_S[:, None]
        logits_SV = self.model(
            input_ids=token_S[:, None],
            attention_mask=attention_mask(self.model, allowed_SL[:, None, None]),
            position_ids=column_S[:, None].clone(),  # the loop advances column_S in place
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        if len(self.cache.layers) != layers:
            raise ValueError(
                f"{type(self.model).__name__} kept keys and values in {len(self.cache.layers)} of "
                f"{layers} layers; only models with a plain KV cache are sampled"
            )
        return logits_SV

    def retire(self, live: int, done_S: torch.Tensor, width: int) -> int:
        """Drop finished rows by moving the last live slots into theirs; returns the live count."""
        left = live - int(done_S.sum())
        target = done_S[:left].nonzero()[:, 0]
        source = (~done_S[left:]).nonzero()[:, 0] + left
        if len(target):
            self.cache.move(source, target, width - 1)  # the newest column is not written yet
            self.row_S[target] = self.row_S[source]
            self.column_S[target] = self.column_S[source]
        return left
