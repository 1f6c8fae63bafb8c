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
            attend to the columns up to it.  Models built like Llama are decoded by a step written
            by hand (`LlamaStep`), with half the operations of the library's forward; it is
            compared with that forward once per call.  All others go through their own forward.
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
import platform
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F

COLDEST = 1e-30  # logits divided by less than this, other than 0, overflow in float32


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
    scaled_SV = logits_SV if temperature in (0, 1) else logits_SV.float() / temperature
    logp_SV = torch.log_softmax(scaled_SV.float(), dim=-1)
    prob_SV = logp_SV.exp()
    if temperature == 0:
        token_S = logits_SV.argmax(dim=-1)
    else:
        cdf_SV = prob_SV.cumsum(dim=-1, dtype=torch.float64)
        # u < 1, so u * total < total = cdf[-1], and right=True skips tokens of probability 0
        target_S1 = uniform_S[:, None] * cdf_SV[:, -1:]
        token_S = torch.searchsorted(cdf_SV, target_S1, right=True)[:, 0]
        token_S = token_S.clamp_(max=logp_SV.shape[1] - 1)  # only NaN logits get there
    with torch.autocast(logits_SV.device.type, enabled=False):  # or the products would be rounded
        entropy_S = -(prob_SV[:, None] @ logp_SV[:, :, None])[:, 0, 0]
    if entropy_S.isnan().any():  # 0 * -inf, where logits are
        entropy_S = torch.special.entr(prob_SV).sum(dim=-1)
    topk_ids_SK = logp_SV.topk(top_k, dim=-1).indices
    return token_S, logp_SV.gather(1, token_S[:, None])[:, 0], entropy_S, topk_ids_SK


class SlotCache:
    """A preallocated KV cache of independent rows, shaped as Hugging Face attention layers expect.

    `select` names the slots and columns that the next forward call writes; the layers then call
    `update` once each.  A buffer per layer, made at its first call: [slots, columns, keys and
    values of all heads], so that a token is one contiguous write and a row one contiguous read; in
    the layer's own type, or in autocast's, where a float32 norm would otherwise make the keys twice
    as large as attention reads them.  Buffers start at zero, because a masked column still enters
    0 * value.
    """

    def __init__(self, slots: int, columns: int):
        self.slots, self.columns = slots, columns
        self.layers: dict[int, torch.Tensor] = {}

    def select(self, live: int, width: int, place_S: torch.Tensor | None, first: int = 0) -> None:
        """Write slots first..live-1: at columns 0..width-1, or one column per row, of which
        `place_S` is the number in the flattened buffer, slot * columns + column."""
        self.rows, self.width, self.place_S = slice(first, live), width, place_S

    def update(self, key, value, layer_idx, *args, **kwargs):
        """Store the new keys and values [S, heads, Q, head_dim]; return those to attend to."""
        heads, Q, d, e = *key.shape[1:], value.shape[3]
        new = torch.cat([key.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2)], dim=2)
        device = key.device.type
        if torch.is_autocast_enabled(device):
            new = new.to(torch.get_autocast_dtype(device))
        if layer_idx not in self.layers:
            shape = (self.slots, self.columns, heads * (d + e))
            self.layers[layer_idx] = new.new_zeros(shape)
        buffer = self.layers[layer_idx]
        if self.place_S is None:
            buffer[self.rows, :Q] = new
        else:
            buffer.flatten(0, 1).index_copy_(0, self.place_S, new[:, 0])
        stored = buffer[self.rows, : self.width]
        parts = stored.split([heads * d, heads * e], dim=2)
        return tuple(x.unflatten(2, (heads, -1)).transpose(1, 2) for x in parts)

    def move(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        """Copy the first `width` columns of the slots `source` over the slots `target`."""
        for buffer in self.layers.values():
            buffer[target, :width] = buffer[source, :width]

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
    eos_ids: Iterable[int],
    pad_id: int,
) -> None:
    """Raise ValueError, naming the argument and the value, for anything `generate` cannot do."""
    if len(prompts) == 0:
        raise ValueError("prompts is empty")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{row}] is empty: a causal LM needs at least one token")
        if min(prompt) < 0 or max(prompt) >= known_ids:
            raise ValueError(f"prompts[{row}] holds ids outside the model's {known_ids}")
        if torch.as_tensor(prompt).is_floating_point():  # would be cut to whole numbers unseen
            raise ValueError(f"prompts[{row}] holds numbers that are no ids")
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf or 0 < temperature < COLDEST:
        raise ValueError(
            f"temperature must be a finite number >= 0, not {temperature}; if not 0, at least "
            f"{COLDEST}"
        )
    if not isinstance(top_k, Integral) or not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be between 1 and the vocabulary's {vocab_size}, not {top_k}")
    if batch_size is not None and not (isinstance(batch_size, Integral) and batch_size >= 1):
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if not isinstance(eos_ids, Iterable) or not all(isinstance(i, Integral) for i in eos_ids):
        raise ValueError(f"eos_ids must hold whole numbers, not {eos_ids}")
    if not isinstance(pad_id, Integral) or not 0 <= pad_id < known_ids:  # the model reads padding
        raise ValueError(f"pad_id must be one of the model's {known_ids} ids, not {pad_id}")


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
    if not isinstance(vocab_size, Integral) or not 1 <= vocab_size <= head_rows:
        raise ValueError(f"vocab_size must be in 1..{head_rows}, not {vocab_size}")
    known_ids = model.get_input_embeddings().weight.shape[0]
    eos_ids = list(eos_ids) if isinstance(eos_ids, Iterable) else eos_ids  # it may be an iterator
    check_arguments(
        prompts, max_new_tokens, temperature, top_k, batch_size, vocab_size, known_ids, eos_ids,
        pad_id,
    )  # fmt: skip
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


RECORDS = 64  # steps whose results are written together


class _Sampler:
    """The state of one `generate` call; slots 0..live-1 are the rows in flight."""

    def __init__(self, model, prompts, max_new_tokens, columns, eos_ids, pad_id, temperature):
        self.model, self.device = model, model.device
        self.prompts, self.columns, self.pad_id = prompts, columns, pad_id
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.eos_ids = torch.tensor(sorted(set(eos_ids)), dtype=torch.int64, device=self.device)
        self.prompt_length_B = torch.tensor([len(p) for p in prompts], device=self.device)
        self.uniform_BN = None
        self.step = LlamaStep(model, columns) if LlamaStep.fits(model) else None
        self.compared = False

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
            out.ids_BT[row, : len(prompt)] = torch.as_tensor(prompt, device=device)
        self.cache = SlotCache(slots, self.columns)
        self.slot_S = torch.arange(slots, device=device)
        # of every live slot: its row, the column of the next token to feed, and that token
        self.row_S = self.column_S = self.token_S = self.slot_S[:0]
        live, admitted, width, records = 0, 0, 0, []
        while live or admitted < len(self.prompts):
            # refilling in groups spreads the cost of a prefill over several rows
            free = slots - live
            if admitted < len(self.prompts) and (live == 0 or free >= max(1, slots // 4)):
                count = min(free, len(self.prompts) - admitted)
                width = max(width, self.admit(out.ids_BT, live, admitted, count))
                live, admitted = live + count, admitted + count
            logits_SV = self.decode(live, width)[:, :vocab_size]
            self.column_S = self.column_S + 1  # from here on the column of the sampled token
            width += 1
            step_S = self.column_S - self.prompt_length_B[self.row_S]
            uniform_S = None if self.uniform_BN is None else self.uniform_BN[self.row_S, step_S]
            sampled = sample_token(logits_SV, self.temperature, uniform_S, top_k)
            self.token_S = sampled[0]
            records.append((self.row_S, self.column_S, *sampled))
            stopped_S = (self.token_S[:, None] == self.eos_ids).any(dim=1)
            done_S = stopped_S | (step_S + 1 == self.max_new_tokens)
            if done_S.any():
                out.truncated_B[self.row_S[done_S]] = ~stopped_S[done_S]
                live = self.retire(live, done_S, width)
                width = int(self.column_S.max()) + 1 if live else 0
            if len(records) == RECORDS or not live:
                self.write(records, out)
                records = []
        if not torch.isfinite(out.logp_BT).all():
            raise ValueError("the model returned non-finite logits while sampling")
        used = int(out.response_mask_BT.any(dim=0).nonzero().max()) + 1
        for name in ("ids_BT", "response_mask_BT", "logp_BT", "entropy_BT", "topk_ids_BTK"):
            setattr(out, name, getattr(out, name)[:, :used].contiguous())
        return out

    def write(self, records: list[tuple], out: Rollout) -> None:
        """Put what some steps sampled where it belongs."""
        row_N, column_N, token_N, logp_N, entropy_N, topk_NK = (
            torch.cat(parts) for parts in zip(*records, strict=True)
        )
        at = (row_N, column_N)
        out.ids_BT[at], out.logp_BT[at], out.entropy_BT[at] = token_N, logp_N, entropy_N
        out.topk_ids_BTK[at], out.response_mask_BT[at] = topk_NK, True

    def admit(self, ids_BT: torch.Tensor, first: int, row: int, count: int) -> int:
        """Prefill prompts row..row+count-1 into slots first..first+count-1, all but their last
        tokens, which the next decode step feeds.  Returns the number of columns in use."""
        row_S = torch.arange(row, row + count, device=self.device)
        column_S = self.prompt_length_B[row_S] - 1
        self.row_S = torch.cat([self.row_S, row_S])
        self.column_S = torch.cat([self.column_S, column_S])
        self.token_S = torch.cat([self.token_S, ids_BT[row_S, column_S]])
        longest = int(column_S.max()) + 1
        if longest > 1:
            Q = longest - 1
            causal_QQ = torch.ones(Q, Q, dtype=torch.bool, device=self.device).tril_()
            self.cache.select(first + count, Q, None, first)
            self.model.base_model(  # the backbone: no head, so no [B, Q, V] logits
                input_ids=ids_BT[row : row + count, :Q],
                attention_mask=attention_mask(self.model, causal_QQ[None, None]),
                position_ids=torch.arange(Q, device=self.device).expand(count, Q),
                past_key_values=self.cache,
                use_cache=True,
            )
        return longest

    def decode(self, live: int, width: int) -> torch.Tensor:
        """Feed one token per live slot; returns the logits [S, V] of the next one."""
        if self.step is None:
            return self.forward(live, width)
        if not self.compared:
            theirs_1V = self.forward(1, width)  # also makes the cache's buffers
            self.compared = True
            self.select(1, width)
            ours_1V = self.step(self.token_S[:1], self.column_S[:1], self.cache, width)
            tolerance = 0.1 if self.step.dtype.itemsize == 2 else 0.01  # of the largest logit
            if (ours_1V - theirs_1V).abs().max() > tolerance * theirs_1V.abs().max():
                warnings.warn(
                    f"{type(self.model).__name__}: this file's decoding step gives other logits "
                    "than the library's forward, which is used instead (slower)", stacklevel=5
                )  # fmt: skip
                self.step = None
                return self.forward(live, width)
        self.select(live, width)
        return self.step(self.token_S, self.column_S, self.cache, width)

    def select(self, live: int, width: int) -> None:
        """The next call writes one token per slot and reads `width` columns."""
        place_S = self.slot_S[:live] * self.columns + self.column_S[:live]
        self.cache.select(live, width, place_S)

    def forward(self, live: int, width: int) -> torch.Tensor:
        """`decode` by the library's own forward."""
        self.select(live, width)
        column_S = self.column_S[:live]
        allowed_SL = torch.arange(width, device=self.device) <= column_S[:, None]
        logits_SV = self.model(
            input_ids=self.token_S[:live, None],
            attention_mask=attention_mask(self.model, allowed_SL[:, None, None]),
            position_ids=column_S[:, None],
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
        place = torch.arange(left, device=self.device).index_copy_(0, target, source)
        if len(target):
            self.cache.move(source, target, width - 1)  # the newest column is not written yet
        self.row_S, self.column_S = self.row_S[place], self.column_S[place]
        self.token_S = self.token_S[place]
        return left


# ----------------------------------------------------------- one step of a Llama-like model, faster
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)
LARGE = 2**19  # entries of a matrix; below, oneDNN's preparations take longer than it saves
LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class LlamaStep:
    """One decoding step of a Llama-like model, for speed: RMS norm, rotary embedding (with norms of
    queries and keys, as in Qwen3, or biases, as in Qwen2), grouped attention, gated MLP.

    A small model's forward is a chain of small operations, most of whose time is the launch; here
    are half as many.  Query, key and value projections are one matrix product, as are gate and up
    projections.  Their matrices are put together in the type of the products at the start (under
    autocast they would be cast anyway), unless that would copy too many of them.  The embedding is
    called as the module it is, and so is a head that is more than a matrix.
    """

    MOST_COPIED = 2**30  # parameters

    def __init__(self, model, columns: int):
        base, config = model.base_model, model.config
        self.embed, self.norm = base.embed_tokens, base.norm
        self.dtype, device = model.dtype, model.device
        if torch.is_autocast_enabled(device.type):
            self.dtype = torch.get_autocast_dtype(device.type)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = base.layers[0].self_attn.head_dim
        place_L = torch.arange(columns, device=device)
        cos, sin = base.rotary_emb(torch.zeros(1, dtype=model.dtype, device=device), place_L[None])
        # x -> x cos + rotated(x) sin, where rotated swaps the halves and negates the first
        sin = torch.cat([-sin[..., : self.head_dim // 2], sin[..., self.head_dim // 2 :]], dim=-1)
        self.turn_L2d, self.place_L = torch.stack([cos[0], sin[0]], dim=1), place_L
        self.zero = torch.zeros((), dtype=self.dtype, device=device)
        self.minus_infinity = self.zero - math.inf
        count = sum(p.numel() for p in base.layers.parameters())
        self.fuse = self.dtype != model.dtype or count <= self.MOST_COPIED
        self.head = head = model.get_output_embeddings()
        if type(head) is torch.nn.Linear and not is_hooked(head) and self.dtype == model.dtype:
            self.head = product(head.weight, head.bias, pack=self.fuse)
        self.layers = []
        for layer in base.layers:
            attention, mlp = layer.self_attn, layer.mlp
            norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
            if norms[0] is not None:
                counts = (self.heads, self.kv_heads)
                weights = [n.weight.expand(c, -1) for n, c in zip(norms, counts, strict=True)]
                norms = torch.cat(weights), norms[0].variance_epsilon
            self.layers.append((
                layer.input_layernorm,
                self.together(attention.q_proj, attention.k_proj, attention.v_proj),
                norms,
                attention.scaling,
                self.together(attention.o_proj),
                layer.post_attention_layernorm,
                self.together(mlp.gate_proj, mlp.up_proj),
                mlp.act_fn,
                self.together(mlp.down_proj),
            ))  # fmt: skip

    @staticmethod
    def fits(model) -> bool:
        """True for the models that this step was written for, with nothing put in between."""
        if type(model).__name__ not in LLAMA_LIKE:
            return False
        base = model.base_model
        rope = getattr(base.rotary_emb, "rope_type", "default")
        plain = all(
            type(module) is torch.nn.Linear
            for name, module in base.layers.named_modules()
            if name.endswith("_proj")
        )
        hooked = any(is_hooked(module) for module in base.layers.modules())
        return plain and not hooked and rope in ("default", "linear", "llama3", "yarn")

    def together(self, *modules) -> list:
        """[product] of the modules' matrices one below the other, or of each by itself."""
        if not self.fuse:
            return [product(m.weight, m.bias, pack=False) for m in modules]
        weight, bias = modules[0].weight, modules[0].bias
        if len(modules) > 1:
            weight = torch.cat([m.weight for m in modules])
            bias = None if bias is None else torch.cat([m.bias for m in modules])
        bias = None if bias is None else bias.to(self.dtype)
        return [product(weight.to(self.dtype), bias, pack=True)]

    @staticmethod
    def apply(x_SD: torch.Tensor, products) -> torch.Tensor:
        """The products side by side."""
        out = [product(x_SD) for product in products]
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def __call__(self, token_S, column_S, cache: SlotCache, width: int) -> torch.Tensor:
        """Feed one token per live slot; returns the logits [S, V] of the next one."""
        x_SD = self.embed(token_S)
        device, S = x_SD.device.type, len(token_S)
        with torch.autocast(device, enabled=False):
            x_SD = self.backbone(x_SD, S, column_S, cache, width)
        return self.head(x_SD)

    def backbone(self, x_SD, S, column_S, cache, width):
        """Embeddings [S, D] -> the last hidden states."""
        heads, kv_heads, d = self.heads, self.kv_heads, self.head_dim
        turned = heads + kv_heads
        cos_S1d, sin_S1d = self.turn_L2d[column_S].split(1, dim=1)
        beyond_S11L = (self.place_L[:width] > column_S[:, None])[:, None, None]
        mask_S11L = torch.where(beyond_S11L, self.minus_infinity, self.zero)
        for i, layer in enumerate(self.layers):
            norm1, qkv, norms, scaling, out, norm2, gate_up, act, down = layer
            h = self.apply(rms_norm(x_SD, norm1).to(self.dtype), qkv)
            qk, v = h.split([turned * d, kv_heads * d], dim=1)
            qk = qk.view(S, turned, d).to(x_SD.dtype)
            if norms[0] is not None:
                qk = F.rms_norm(qk, (d,), None, norms[1]) * norms[0]
            qk = torch.addcmul(qk * cos_S1d, qk.roll(d // 2, -1), sin_S1d).to(self.dtype)
            new_S = torch.cat([qk[:, heads:].flatten(1), v], dim=1)
            cache.layers[i].flatten(0, 1).index_copy_(0, cache.place_S, new_S)
            stored = cache.layers[i][:S, :width].unflatten(2, (2, kv_heads, d))
            key, value = stored.transpose(1, 3).unbind(2)  # [S, kv_heads, L, d] each
            # the queries of a group share their keys: they go in the place of query positions
            a = F.scaled_dot_product_attention(
                qk[:, :heads].view(S, kv_heads, -1, d), key, value, mask_S11L, scale=scaling
            )
            x_SD = x_SD + self.apply(a.reshape(S, heads * d), out)
            gate, up = self.apply(rms_norm(x_SD, norm2).to(self.dtype), gate_up).chunk(2, dim=1)
            x_SD = x_SD + self.apply(act(gate) * up, down)
        return rms_norm(x_SD, self.norm)


def is_hooked(module) -> bool:
    """Whether something is called before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def product(weight_ND: torch.Tensor, bias_N: torch.Tensor | None, *, pack: bool):
    """x -> x @ weight.T + bias.

    On a CPU in float32, large matrices are multiplied by oneDNN, packed beforehand if the copy may
    be made.  PyTorch's own choice, MKL, takes longer on AMD's Zen 5, above all for a few rows.  The
    entry is one that PyTorch's compiler uses; where it is missing, so be it.
    """
    suits = weight_ND.device.type == "cpu" and weight_ND.dtype == torch.float32
    if suits and weight_ND.numel() >= LARGE and HAS_ONEDNN:
        multiply = torch.ops.mkldnn._linear_pointwise
        if pack:
            weight_ND = torch.ops.mkldnn._reorder_linear_weight(weight_ND.detach())
        return lambda x_SD: multiply(x_SD, weight_ND, bias_N, "none", [], "")
    return lambda x_SD: F.linear(x_SD, weight_ND, bias_N)


def rms_norm(x_SD: torch.Tensor, module) -> torch.Tensor:
    """The module's norm in one operation."""
    return F.rms_norm(x_SD, x_SD.shape[-1:], module.weight, module.variance_epsilon)
