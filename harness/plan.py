"""`--plan GIB`: what memory a run would take on GPUs of so many GiB, before any weight is loaded.

Formulas, in bytes per process. b: 2 with --dtype (of the teacher: --teacher-dtype) bfloat16, else
4. N: parameters, of which L layers hold N_L; embeddings, head and norms the rest, N_R. P processes;
T tokens of the longest row; R rows of a step on a process; M tokens of a micro-batch; D width, I
width of the feed-forward part that a token sees, q and kv widths of queries, keys or values; V
vocabulary. A model that is spread (--shard) divides what is marked / P, and has two gathered layers
while it is read, 2 b N_L / L. Slots: rows in flight, at most --sample-batch: those of a step or, if
they are more, of an evaluation.

    student          4 N weights, 8 N moments of AdamW            / P
    copy             b N: what samples, under --shard both
    --lora-rank r    in their place b N weights, 12 r A for adapters of linear layers that have A
                     inputs and outputs, a copy b N_A of these layers, 4 r A of gradient
    teacher          b N_L / P + b N_R
    sampling         slots x T x 2 L kv b of cache, at most; logits, slots x V x (b + 20); 16384
                     tokens of prompts x b (6 D + 3 I + 2 q); in bfloat16 the copies of autocast,
                     b N; of fast/decode.py, b N_L, in bfloat16 or where N_L is below 2^30
    rows             R x T x (40 + 8 K): ids, log-probs, entropy, masks, scores, K candidates; 4 K
                     more with lookahead, 26 U with a union of U tokens from each model; hidden
                     states, D b more, for rkl, fkl, jsd
    scoring          M x b (6 D + 3 I + 2 q); with lookahead the teacher's cache, M x 2 L kv b, and
                     --lgr-nodes leaves x (b (6 D + 3 I + 2 q) + T)
    head             C x V x 12: logits of C positions, thrice; 1024 on a GPU, else 256
    gradient         4 N                                           / P
    update           M x `activations`, and their gradients in a layer; in bfloat16 autocast's
                     copies of the weights, b N

For a GPU in bfloat16, unless --device and --dtype say otherwise. Not in it: what the allocator
wastes (a tenth, say), NCCL's buffers, CUDA itself (half a GiB each).
"""

import argparse
import itertools
import math
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from fast.decode import MOST_COPIED
from harness.cli import first_line
from harness.flags import SHARD
from harness.lora import targets
from logprobs import DIVERGENCES
from rollout import PREFILL

PROCESSES = (1, 2, 4, 8)
GIB = 2**30


def sizes(config) -> SimpleNamespace:
    """The letters above of a model, counted on one without memory. ValueError: there is no code."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a model's code makes of it
        raise ValueError(f"--plan: {config.model_type}: {first_line(error)}") from error
    text, names = config.get_text_config(decoder=True), model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    linear = [module.weight for module in targets(model).values()]
    total, heads = sum(p.numel() for p in model.parameters()), text.num_attention_heads
    each = getattr(text, "head_dim", None) or text.hidden_size // heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    if experts := getattr(text, "num_experts_per_tok", None):  # those that a token sees
        experts += getattr(text, "n_shared_experts", None) or 0
        inner = (getattr(text, "moe_intermediate_size", None) or inner) * experts
    kv = each * (getattr(text, "num_key_value_heads", None) or heads)
    return SimpleNamespace(N=total, N_L=in_layers, N_R=total - in_layers, L=max(len(layers), 1),
                           N_A=sum(w.numel() for w in linear), A=sum(sum(w.shape) for w in linear),
                           D=text.hidden_size, I=inner, q=each * heads, kv=kv,
                           V=text.vocab_size)  # fmt: skip


def width(m, b: int) -> int:
    """Bytes per token of a pass without gradient, while it is in a layer."""
    return b * (6 * m.D + 3 * m.I + 2 * m.q)


def activations(m, b: int, checkpointing: bool) -> float:
    """Bytes per token of what a backward pass needs, as transformers writes layers: inputs of the
    norms before and after they are scaled, in float32, and what products and attention read."""
    layer = (26 if b == 2 else 24) * m.D + b * (5 * m.q + 4 * m.I)
    return 8 * m.D + (4 * m.D * m.L + layer if checkpointing else layer * m.L)


def peaks(args, P: int, student, teacher, longest: int, K: int) -> dict:
    """{what: bytes} of a process, by phase: {"always": .., "sampling": .., ..}."""
    b, s, t = 2 if args.dtype == "bfloat16" else 4, student, teacher
    b_T = 2 if (args.teacher_dtype or args.dtype) == "bfloat16" else 4
    both, half = args.shard == "both" and P > 1, b == 2
    lookahead, topk = args.lookahead == "on", args.objective == "topk"
    spread = P if args.shard != "none" else 1
    T = longest + args.max_new_tokens
    R = math.ceil(args.prompts_per_step * args.rollouts_per_prompt / P)
    evaluates = args.eval_problems is not None or args.problems is None
    E = math.ceil(args.eval_count / P) * args.eval_samples * evaluates
    slots, most = min(args.sample_batch, max(R, E)), args.tokens_per_micro_batch or R * T
    rows = min(args.micro_batch or R, R)
    M = min(max(most, T), rows * T)
    share, head = P if both else 1, (1024 if args.device == "cuda" else 256) * s.V * 12
    gathered = 2 * b_T * t.N_L / t.L if spread > 1 else 0
    rank, cast = args.lora_rank, b * s.N * (half and not both and not args.lora_rank)
    own = (2 * b * s.N_L / s.L + b * s.N_R) if both else cast
    trained = rank * s.A if rank else s.N
    fused = b * s.N_L if args.fast == "on" and (cast or s.N_L <= MOST_COPIED) else 0
    always = {"student and moments": 12 * trained / share + b * s.N * (rank > 0),
              "copy that samples": b * (s.N_A if rank else s.N * both),
              "teacher": b_T * (t.N_L / spread + t.N_R)}  # fmt: skip
    kept = 40 + 8 * K + 4 * args.lgr_top_k * lookahead + 26 * args.union_top_k * topk
    batch = R * T * (kept + t.D * b_T * (args.objective in DIVERGENCES))
    sampling = {"keys and values": slots * T * 2 * s.L * s.kv * b,
                "rows": T * max(R * (17 + 8 * K), 25 * min(E, 4 * slots)),
                "logits": slots * s.V * (b + 20),
                "prompts": min(slots * longest, max(PREFILL, longest)) * width(s, b),
                "copies": fused + cast}  # fmt: skip
    leaves = min(args.lgr_nodes, M * args.lgr_top_k)
    scoring = {"rows": batch, "pass": M * width(t, b_T) + gathered,
               "cache": M * 2 * t.L * t.kv * b_T * lookahead,
               "leaves": leaves * (width(t, b_T) + T) * lookahead, "head": head}  # fmt: skip
    held = activations(s, b, args.gradient_checkpointing) + width(s, b)
    update = {"rows": batch, "gradient": 4 * trained / share, "weights in use": own, "head": head,
              "activations": M * held}  # fmt: skip
    return {"always": always, "sampling": sampling, "scoring": scoring, "update": update}


def peak(found: dict) -> float:
    """The most bytes at any time."""
    phases = (sum(found[name].values()) for name in ("sampling", "scoring", "update"))
    return sum(found["always"].values()) + max(phases)


def levers(args, T: int):
    """(flags to add, what args become): none, then one, two, ... of those that change no result;
    then the same with adapters, which learn something else."""
    b, found = args.sample_batch, []
    for rank, batch, shard, checkpointing, tokens in itertools.product(
        (args.lora_rank, args.lora_rank or 32), [n for n in (b, 64, 16, 4, 1) if n <= b],
        SHARD, (args.gradient_checkpointing, True), (args.tokens_per_micro_batch, T),
    ):  # fmt: skip
        spread = "teacher" if rank and args.shard == "both" else args.shard  # at least
        if SHARD.index(shard) < SHARD.index(spread) or rank and shard == "both":
            continue
        new = {"lora_rank": rank, "sample_batch": batch, "shard": shard,
               "gradient_checkpointing": checkpointing, "tokens_per_micro_batch": tokens}
        words = [f"--{k.replace('_', '-')}" + f" {v}" * (v is not True) for k, v in new.items()
                 if v != getattr(args, k)]  # fmt: skip
        how_many = (rank != args.lora_rank, len(words), len(found))
        found.append((how_many, " ".join(words), argparse.Namespace(**vars(args) | new)))
    return [rest for _, *rest in sorted(found, key=lambda one: one[0])]


def fit(args, P: int, *how) -> str:
    """Flags that leave a tenth of --plan's GiB free, "" if none is needed; `how` as in `peaks`."""
    fits = (words for words, new in levers(args, how[2] + args.max_new_tokens)
            if peak(peaks(new, P, *how)) < 0.9 * args.plan * GIB)  # fmt: skip
    return next(fits, "none of these flags makes it fit")


def table(args, *how) -> str:
    """Markdown: GiB by phase and number of processes, and flags that make a run fit. how: student,
    teacher, tokens of the longest prompt, K."""
    found = [peaks(args, P, *how) for P in PROCESSES]

    def row(name, values):
        return f"| {name} | " + " | ".join(f"{x / GIB:.3g}" for x in values) + " |"

    lines = ["| GiB per process | " + " | ".join(f"{P} GPU" for P in PROCESSES) + " |"]
    lines.append("|---" * (len(PROCESSES) + 1) + "|")
    for phase, parts in found[0].items():
        values = {f"{phase}: {part}": [f[phase][part] for f in found] for part in parts}
        lines += [row(name, some) for name, some in values.items() if any(some)]
    lines += [row("**peak**", map(peak, found)), ""]
    lines += [f"{P} of {args.plan:g} GiB: {fit(args, P, *how) or 'fits'}  " for P in PROCESSES]
    return "\n".join(lines)


def show(run) -> None:
    """Print the table of a run whose flags, configs and prompts are there."""
    both = [sizes(run.configs[flag]) for flag in ("--student", "--teacher")]
    longest = max(map(len, sum(run.prompts.values(), [])))
    K = max(run.needs.candidates.values(), default=1)
    names = " from ".join(f"{m.N / 1e9:.2f}" for m in both)
    print(f"{names} billion parameters; prompts of up to {longest} tokens\n")
    print(table(run.args, *both, longest, K))
