"""A decode step for models built like Llama, with half the operations of the library's forward.

    rollout.generate(model, prompts, ..., decode=fast.decode.decode)

A small model's forward is a chain of small operations, most of whose time is the launch.  Here the
query, key and value projections are one matrix product, so are the gate and up projections, and a
norm is one operation.  Models that do not fit keep the plain step.  The first row of every call of
`generate` is decoded both ways; if they differ, a warning says so and the plain step is used.

Letters: S live slots, D hidden width, L attended columns, V vocabulary; d is the width of a head.
"""

import math
import warnings
from types import SimpleNamespace

import torch
import torch.nn.functional as F

LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MOST_COPIED = 2**30  # parameters; the matrices of larger models are not fused, which copies them


def decode(model, cache, step):
    """The `decode` of `rollout.generate`: a `LlamaStep`, or `step` if the model does not fit."""
    return LlamaStep(model, cache, step) if fits(model) else step


def fits(model) -> bool:
    """True for the models that `LlamaStep` was written for, with nothing put in between."""
    if type(model).__name__ not in LLAMA_LIKE:
        return False
    base = model.base_model
    rope = getattr(base.rotary_emb, "rope_type", "default")
    plain = all(
        type(module) is torch.nn.Linear
        for name, module in base.layers.named_modules()
        if name.endswith("_proj")
    )
    hooked = any(is_hooked(module) for module in [*base.layers.modules(), base.norm])
    return plain and not hooked and rope in ("default", "linear", "llama3", "yarn")


def is_hooked(module) -> bool:
    """Whether something is called before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def rms_norm(x_SD, module):
    """The module's norm in one operation."""
    return F.rms_norm(x_SD, x_SD.shape[-1:], module.weight, module.variance_epsilon)


class LlamaStep:
    """One decode step: RMS norm, rotary embedding (with norms of queries and keys, as in Qwen3, or
    biases, as in Qwen2), grouped attention, gated MLP.

    The matrices are fused at the start, in the type of the products (under autocast they would be
    cast anyway).  The embedding is called as the module it is, and so is a head that is more than a
    matrix.
    """

    def __init__(self, model, cache, plain):
        base, config, device = model.base_model, model.config, model.device
        self.cache, self.plain, self.agrees = cache, plain, None
        self.name, self.embed, self.norm = type(model).__name__, base.embed_tokens, base.norm
        self.dtype = model.dtype
        if torch.is_autocast_enabled(device.type):
            self.dtype = torch.get_autocast_dtype(device.type)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = d = base.layers[0].self_attn.head_dim
        self.column_L = torch.arange(max(cache.columns, cache.slots), device=device)
        like = torch.zeros(1, dtype=model.dtype, device=device)
        cos, sin = (x_1Ld[0] for x_1Ld in base.rotary_emb(like, self.column_L[None]))
        # x -> x cos + rolled(x) sin, where rolled swaps the halves; the first half is negated
        sin = torch.cat([-sin[:, : d // 2], sin[:, d // 2 :]], dim=1)
        self.turn_L2d = torch.stack([cos, sin], dim=1)
        self.zero = torch.zeros((), dtype=self.dtype, device=device)
        self.minus_infinity = self.zero - math.inf
        copied = sum(parameter.numel() for parameter in base.layers.parameters())
        self.fuse = self.dtype != model.dtype or copied <= MOST_COPIED
        self.head = head = model.get_output_embeddings()
        if type(head) is torch.nn.Linear and not is_hooked(head) and self.dtype == model.dtype:
            weights = self.fused(head)
            self.head = lambda x_SD: multiply(x_SD, weights)
        self.layers = [self.weights_of(layer) for layer in base.layers]

    def weights_of(self, layer) -> SimpleNamespace:
        """What `hidden` needs of a layer of the model."""
        attention, mlp = layer.self_attn, layer.mlp
        qk_norm = getattr(attention, "q_norm", None)
        if qk_norm is not None:  # a row per head: one operation norms queries and keys
            q_Hd = qk_norm.weight.expand(self.heads, -1)
            k_Hd = attention.k_norm.weight.expand(self.kv_heads, -1)
            qk_norm = torch.cat([q_Hd, k_Hd]), qk_norm.variance_epsilon
        return SimpleNamespace(
            norm1=layer.input_layernorm,
            qkv=self.fused(attention.q_proj, attention.k_proj, attention.v_proj),
            qk_norm=qk_norm,
            scaling=attention.scaling,
            out=self.fused(attention.o_proj),
            norm2=layer.post_attention_layernorm,
            gate_up=self.fused(mlp.gate_proj, mlp.up_proj),
            act=mlp.act_fn,
            down=self.fused(mlp.down_proj),
        )

    def fused(self, *modules) -> list:
        """[(weight, bias)]: one matrix on top of the other, or each by itself; for `multiply`."""
        if not self.fuse:
            return [(module.weight, module.bias) for module in modules]
        weight, bias = modules[0].weight, modules[0].bias
        if len(modules) > 1:
            weight = torch.cat([module.weight for module in modules])
            bias = None if bias is None else torch.cat([module.bias for module in modules])
        bias = None if bias is None else bias.to(self.dtype)
        return [(weight.to(self.dtype), bias)]

    def __call__(self, token_S, column_S, width: int):
        """Feed one token per live slot; returns the logits [S, V] of the next one."""
        if self.agrees is None:
            self.agrees = self.compare(token_S[:1], column_S[:1], width)
        step = self.logits if self.agrees else self.plain
        return step(token_S, column_S, width)

    def compare(self, token_1, column_1, width: int) -> bool:
        """Whether the two steps agree on the first row; the plain one makes the cache's buffers."""
        theirs_1V = self.plain(token_1, column_1, width)
        ours_1V = self.logits(token_1, column_1, width)
        tolerance = 0.1 if self.dtype.itemsize == 2 else 0.01  # of the largest logit
        differ = bool((ours_1V - theirs_1V).abs().max() > tolerance * theirs_1V.abs().max())
        if differ:
            warnings.warn(
                f"{self.name}: the fast decode step gives other logits than the library's forward, "
                "which is used instead (slower)", stacklevel=6
            )  # fmt: skip
        return not differ

    def logits(self, token_S, column_S, width: int):
        """The step."""
        x_SD = self.embed(token_S)
        with torch.autocast(x_SD.device.type, enabled=False):
            x_SD = self.hidden(x_SD, column_S, width)
        return self.head(x_SD)

    def hidden(self, x_SD, column_S, width: int):
        """Embeddings [S, D] -> the last hidden states."""
        S, heads, kv_heads, d = len(x_SD), self.heads, self.kv_heads, self.head_dim
        cos_S1d, sin_S1d = self.turn_L2d[column_S].split(1, dim=1)
        beyond_SL = self.column_L[:width] > column_S[:, None]
        mask_S11L = torch.where(beyond_SL[:, None, None], self.minus_infinity, self.zero)
        for index, layer in zip(self.cache.layers, self.layers, strict=True):
            buffer = self.cache.buffer(index, width)
            flat_S = self.column_L[:S] * buffer.shape[1] + column_S  # slot, column as one index
            h = multiply(rms_norm(x_SD, layer.norm1).to(self.dtype), layer.qkv)
            qk, v = h.view(S, -1, d).split([heads + kv_heads, kv_heads], dim=1)
            qk = qk.to(x_SD.dtype)
            if layer.qk_norm is not None:
                weight_Hd, eps = layer.qk_norm
                qk = F.rms_norm(qk, (d,), None, eps) * weight_Hd
            qk = torch.addcmul(qk * cos_S1d, qk.roll(d // 2, -1), sin_S1d).to(self.dtype)
            new = torch.cat([qk[:, heads:], v], dim=2)
            buffer.flatten(0, 1).index_copy_(0, flat_S, new)
            key, value = buffer[:S, :width].transpose(1, 2).chunk(2, dim=3)  # [S, kv_heads, L, d]
            # the queries of a group share their keys: they stand where query positions would
            query = qk[:, :heads].view(S, kv_heads, -1, d)
            a = F.scaled_dot_product_attention(query, key, value, mask_S11L, scale=layer.scaling)
            x_SD = x_SD + multiply(a.reshape(S, heads * d), layer.out)
            h = multiply(rms_norm(x_SD, layer.norm2).to(self.dtype), layer.gate_up)
            gate, up = h.chunk(2, dim=1)
            x_SD = x_SD + multiply(layer.act(gate) * up, layer.down)
        return rms_norm(x_SD, self.norm)


def multiply(x_SD, weights):
    """The products with some matrices, side by side."""
    out = [F.linear(x_SD, weight, bias) for weight, bias in weights]
    return out[0] if len(out) == 1 else torch.cat(out, dim=-1)
