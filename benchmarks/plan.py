"""What the papers' pairs take on GPUs of 80 GiB, by the formulas of `train.py --plan`.

    python benchmarks/plan.py

A row per pair and length with --preset lgr-paper, then two commands of docs/real-models.md; a
column per number of GPUs: the peak in GiB and, where that is too much, the flags that make it fit
in nine tenths of the card (`--tokens..` is --tokens-per-micro-batch). Configs are the published
ones; nothing is downloaded. The last line printed is JSON.
"""

import sys
from pathlib import Path

from transformers import Qwen2Config, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks import shapes, tables  # noqa: E402
from harness import flags, plan  # noqa: E402

GPUS, PROMPT = 80, 1024


MODELS = {
    **{size: shapes.config_of(shapes.SHAPES[f"qwen3-{size.lower()}"], 40960)
       for size in ("0.6B", "1.7B", "4B", "32B")},
    "30B-A3B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, tie_word_embeddings=False,
    ),
    "7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, num_hidden_layers=28, intermediate_size=18944,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip
LGR, SPARING = "--preset lgr-paper", "--method release --gradient-checkpointing "
ROWS = [  # student, teacher, flags; the last two are commands of docs/real-models.md
    *((*pair, f"{LGR} --max-new-tokens {tokens}")
      for pair in (("1.7B", "4B"), ("1.7B", "30B-A3B"), ("7B", "32B")) for tokens in (8192, 16384)),
    ("0.6B", "1.7B", SPARING + "--prompts-per-step 8 --max-new-tokens 1024 --sample-batch 8 "
     "--tokens-per-micro-batch 4096"),
    ("1.7B", "4B", SPARING + "--prompts-per-step 128 --max-new-tokens 8192 --sample-batch 16 "
     "--tokens-per-micro-batch 16384"),
]  # fmt: skip


def main(argv=()) -> None:
    """Print the table."""
    sizes, last = {name: plan.sizes(config) for name, config in MODELS.items()}, {}
    tables.print_head("student, teacher", "tokens", *(f"{P} GPU" for P in plan.PROCESSES))
    for student, teacher, words in ROWS:
        table = train.FLAGS, train.METHODS, train.PRESETS
        words = f"--student x --plan {GPUS} {words}".split()
        args = flags.parse("train.py", *table, words)[1]
        K = max(train.needs(args).candidates.values())
        how, cells = (sizes[student], sizes[teacher], PROMPT, K), []
        for P in plan.PROCESSES:
            peak = round(plan.peak(plan.peaks(args, P, *how)) / plan.GIB, 1)  # as in the JSON
            add = plan.fit(args, P, *how).replace("--tokens-per-micro-batch", "--tokens..")
            cells.append(f"{peak:.0f}; {add or 'fits'}")
            last[f"{student} from {teacher}, {args.max_new_tokens}, {args.method}, {P}"] = peak
        name = f"{student} from {teacher}" + ", release" * (args.method == "release")
        tables.print_row(name, args.max_new_tokens, *cells)
    tables.print_json(last, 1)


if __name__ == "__main__":
    main()
