"""What the papers' pairs take on GPUs of 80 GiB, by the formulas of `train.py --plan`.

    python benchmarks/plan.py

A row per pair and length, a column per number of GPUs: the peak in GiB with --preset lgr-paper
(--method release takes less) and, where that is too much, the flags that make it fit in nine tenths
of the card; `--tokens..` is --tokens-per-micro-batch. Configs are the published ones; nothing is
downloaded. The last line printed is JSON.
"""

import sys
from pathlib import Path

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks import shapes, tables  # noqa: E402
from harness import flags, plan  # noqa: E402

GPUS, PROMPT = 80, 1024


def qwen3(layers, hidden, heads, kv_heads, head_dim, feed_forward, vocabulary):
    """The config of a Qwen3 by its sizes (shapes.Shape)."""
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=feed_forward,
        tie_word_embeddings=hidden < 4096,
    )  # fmt: skip


MODELS = {
    "1.7B": qwen3(*shapes.SHAPES["qwen3-1.7b"]),
    "4B": qwen3(36, 2560, 32, 8, 128, 9728, 151936),
    "32B": qwen3(64, 5120, 64, 8, 128, 25600, 151936),
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
PAIRS = ("1.7B", "4B"), ("1.7B", "30B-A3B"), ("7B", "32B")


def main(argv=()) -> None:
    """Print the table."""
    sizes, rows, last = {name: plan.sizes(config) for name, config in MODELS.items()}, [], {}
    for student, teacher in PAIRS:
        for tokens in (8192, 16384):
            words = f"--preset lgr-paper --student x --plan {GPUS} --max-new-tokens {tokens}"
            table = train.FLAGS, train.METHODS, train.PRESETS, words.split()
            args = flags.parse("train.py", *table)[1]
            how, cells = (sizes[student], sizes[teacher], PROMPT, args.lgr_top_k), []
            for P in plan.PROCESSES:
                peak = plan.peak(plan.peaks(args, P, *how)) / plan.GIB
                words = plan.fit(args, P, *how).replace("--tokens-per-micro-batch", "--tokens..")
                cells.append(f"{peak:.0f}; {words or 'fits'}")
                last[f"{student} from {teacher}, {tokens}, {P}"] = peak
            rows.append([f"{student} from {teacher}", tokens, *cells])
    tables.print_head("student, teacher", "tokens", *(f"{P} GPU" for P in plan.PROCESSES))
    for row in rows:
        tables.print_row(*row)
    tables.print_json(last, 1)


if __name__ == "__main__":
    main()
