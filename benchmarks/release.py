r"""What the release rule costs: margins to keep mask, sentences, and both beside the teacher.

    python benchmarks/release.py                           one thread, rollouts of up to 16k tokens
    python benchmarks/release.py --layers 8 --width 512    a larger teacher

1. margins to keep mask, change points included: `masks.release` on the teacher's log-probs of K = 4
   candidates and on given sentences, in slices of `--tokens` as micro-batches come, for `--rows`
   rollouts of each length; CPU time of the process, best of `--repeats`. In every other row the
   margin drops somewhere. The masks of some rows are compared with another computation of the rule
   first: plain loops in float64, every change point tried.

2. splitting sentences, no teacher: `teachability.token_segments`, which remembers texts and
   decisions of other rollouts, as in a run. Measured on `--text-rows` rollouts of the longest
   length and scaled up to `--rows`; CPU time, best of `--repeats`. Texts:

     toy      solutions of toy problems and the toy's tokenizer: few words, much of it remembered
     words    sentences of 4 to 30 words out of 20,000, a few far more often than most (Zipf), one
              token each, with commas, decimals and abbreviations: little to remember

3. both in a scoring pass: `train.score` with a random Qwen3 as teacher, on `--text-rows` rollouts
   of `words` of the shortest length, with `--mask none` and with `--mask release`, its sentences
   included. In turns, best of `--repeats`, CPU time.
"""

import argparse
import math
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402
import masks  # noqa: E402
import rollout  # noqa: E402
import teachability  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from benchmarks import machine, shapes, tables  # noqa: E402

K, PROMPT = 4, 64  # candidates; tokens before the response


def make_batch(ids_BT: torch.Tensor, vocabulary: int, generator) -> rollout.Rollout:
    """Rollouts of equal length whose statistics are random."""
    B, T = ids_BT.shape
    return rollout.Rollout(
        ids_BT=ids_BT,
        response_mask_BT=(torch.arange(T) >= PROMPT).expand(B, T).clone(),
        logp_BT=-torch.rand(B, T, generator=generator),
        entropy_BT=torch.rand(B, T, generator=generator),
        topk_ids_BTK=torch.randint(vocabulary, (B, T, K), generator=generator),
        truncated_B=torch.zeros(B, dtype=torch.bool),
    )


# -------------------------------------------------------------------------- margins to keep mask
def make_margins(rows: int, length: int, generator):
    """A slice of the batch: (rollouts, log-probs of candidates [B, T, K], segments)."""
    T = PROMPT + length
    batch = make_batch(torch.zeros(rows, T, dtype=torch.int64), 2, generator)
    logits_BTK = torch.randn(rows, T, K, generator=generator)
    for row in range(0, rows, 2):
        drop = PROMPT + int(torch.randint(length, (1,), generator=generator))
        logits_BTK[row, :drop, row % K] += 1.0
    ends_BT = torch.rand(rows, length, generator=generator) < 1 / 20  # 20 tokens per sentence
    segments = [torch.cumsum(ends_T, 0) - ends_T[0].long() for ends_T in ends_BT]
    return batch, logits_BTK.log_softmax(dim=-1), segments


def keep_by_definition(logp_TK: np.ndarray, segment_T: np.ndarray) -> np.ndarray:
    """The keep mask of one response, in loops: BIC of every change point, in float64."""
    margins = [math.nan] * len(logp_TK)
    for t, logp_K in enumerate(logp_TK):
        second, first = sorted(logp_K.tolist())[-2:]
        margins[t] = float(np.float32(first) - np.float32(second))
    n = int(segment_T[-1]) + 1
    sentences = [[] for _ in range(n)]
    for margin, segment in zip(margins, segment_T.tolist(), strict=True):
        sentences[segment].append(margin)
    scores = np.array([math.log(1 + math.fsum(s) / len(s)) for s in sentences])

    def rss(values):
        return float(((values - values.mean()) ** 2).sum())

    best, kept = n * math.log((rss(scores) + 1e-12) / n) + math.log(n), n
    for tau in range(2, n - 1):
        before, after = scores[:tau], scores[tau:]
        bic = n * math.log((rss(before) + rss(after) + 1e-12) / n) + 3 * math.log(n)
        if before.mean() > after.mean() and bic < best:
            best, kept = bic, tau
    return segment_T < kept


def measure_masks(args, length: int) -> tuple[float, float]:
    """(CPU seconds for `args.rows` responses of so many tokens, share of them that were cut)."""
    best = math.inf
    slice_rows = max(1, args.tokens // length)
    for _ in range(args.repeats):
        generator, seconds, cut = torch.Generator().manual_seed(length), 0.0, 0
        for first in range(0, args.rows, slice_rows):
            rows = min(slice_rows, args.rows - first)
            batch, logp_BTK, segments = make_margins(rows, length, generator)
            start = time.process_time()
            choice = masks.release(batch.response_mask_BT, logp_BTK, segments)
            seconds += time.process_time() - start
            cut += int(choice.released_B.sum())
            if best == math.inf and first < args.check:  # the first round checks
                for row in range(min(rows, args.check - first)):
                    keep_T = choice.keep_BT[row, PROMPT:].numpy()
                    own = logp_BTK[row, PROMPT:].numpy(), segments[row].numpy()
                    if choice.keep_BT[row, :PROMPT].any() or (
                        keep_T != keep_by_definition(*own)
                    ).any():
                        sys.exit(f"row {first + row} of {length} tokens has another mask")
        best = min(best, seconds)
    return best, cut / args.rows


# --------------------------------------------------------------------------------------- texts
class Toy:
    """Solutions of toy problems, one behind the other."""

    def __init__(self):
        self.tokenizer = harness.load_tokenizer(toy.world("varied").student)
        self.problems = iter(toy.problems(10_000))

    def ids(self, length: int) -> list[int]:
        """One response."""
        ids = []
        while len(ids) < length:
            text = toy.dial_response(next(self.problems)) + " "
            ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[:length]


class Words:
    """Sentences of made-up words, each token a word with the space before it."""

    SIZE = 20_000

    def __init__(self):
        self.rng = random.Random(0)
        letters, odd = "etaoinshrdlucmfw", [".", ",", "?", " e.g.", " 3.14", " Fig."]
        words = {}
        while len(words) < self.SIZE - len(odd):
            word = "".join(self.rng.choices(letters, k=self.rng.randint(1, 9)))
            words[f" {word.capitalize() if len(words) % 4 == 0 else word}"] = None
        self.vocabulary = [*odd, *words]
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(self.vocabulary)}, "."))
        core.decoder = decoders.Fuse()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
        self.weights = np.cumsum(1 / np.arange(10, self.SIZE + 10)).tolist()

    def ids(self, length: int) -> list[int]:
        """One response."""
        ids = []
        while len(ids) < length:
            words = self.rng.choices(
                range(self.SIZE), cum_weights=self.weights, k=self.rng.randint(4, 30)
            )
            ids += [*words, 0 if self.rng.random() < 0.9 else 2]
        return ids[:length]


def split(text, splitter, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sentences of some responses, as in a run."""
    return [teachability.token_segments(text.tokenizer, ids_T, splitter) for ids_T in ids]


def measure_splitting(args, text) -> tuple[float, float]:
    """(characters per second, seconds for `args.rows` responses)."""
    length, best = max(args.lengths), (0.0, math.inf)
    splitter, _ = teachability.sentence_splitter("auto")
    for repeat in range(args.repeats + 1):
        ids = [torch.tensor(text.ids(length)) for _ in range(args.text_rows)]
        characters = sum(len(text.tokenizer.decode(ids_T)) for ids_T in ids)
        start = time.process_time()
        split(text, splitter, ids)
        seconds = time.process_time() - start
        if repeat:  # the first fills the memories
            best = max(best, (characters / seconds, seconds * args.rows / args.text_rows))
    return best


# ------------------------------------------------------------------------------- with a teacher
def measure_scoring(args, text) -> dict[str, dict[str, float]]:
    """Best CPU seconds of a scoring pass by mask: of all of it, and of its sentences."""
    length, width = min(args.lengths), args.width
    shape = shapes.Shape(args.layers, width, 4, 2, max(16, width // 4), 3 * width, Words.SIZE)
    teacher = shapes.random_model(shape, PROMPT + length, tie_word_embeddings=True)
    splitter, _ = teachability.sentence_splitter("auto")
    generator = torch.Generator().manual_seed(0)
    best = {mask: {"all": math.inf, "sentences": math.inf} for mask in ("none", "release")}
    for repeat in range(args.repeats + 1):
        ids_BT = torch.tensor([[0] * PROMPT + text.ids(length) for _ in range(args.text_rows)])
        batch = make_batch(ids_BT, Words.SIZE, generator)
        for mask in best:
            _, flags, _ = harness.flags.parse(
                "train.py", train.FLAGS, train.METHODS, train.PRESETS,
                ["--mask", mask, "--tokens-per-micro-batch", str(args.tokens)],
            )  # fmt: skip
            run = SimpleNamespace(args=flags, teacher=teacher, vocab_size=Words.SIZE,
                                  stop_class=None, needs=train.needs(flags),
                                  position=SimpleNamespace(step=0),
                                  watch=harness.Stopwatch("cpu"))  # fmt: skip
            start, segments = time.process_time(), None
            if mask == "release":
                segments = split(text, splitter, ids_BT[:, PROMPT:])
            splitting = time.process_time() - start
            train.score(run, batch, segments)
            seconds = {"all": time.process_time() - start, "sentences": splitting}
            if repeat:  # the first fills the memories
                best[mask] = {key: min(best[mask][key], seconds[key]) for key in seconds}
    return best


# ------------------------------------------------------------------------------------------ main
def show_masks(args) -> dict[str, float]:
    """Part 1."""
    print(f"\nmargins to keep mask, {args.rows} rollouts, K = {K}")
    tables.print_head(*"tokens s ns_per_token cut".split())
    figures = {}
    for length in sorted(args.lengths):
        seconds, cut = measure_masks(args, length)
        each = seconds / args.rows / length * 1e9
        tables.print_row(length, f"{seconds:.3f}", f"{each:.1f}", f"{cut:.2f}")
        figures |= {f"mask_s_{length}": seconds, f"mask_ns_per_token_{length}": each}
    return figures


def show_splitting(args, texts: dict) -> dict[str, float]:
    """Part 2."""
    print(f"\nsplitting {args.rows} x {max(args.lengths)} tokens, from {args.text_rows} rows")
    tables.print_head(*"text MB_per_s s".split())
    figures = {}
    for name, text in texts.items():
        speed, seconds = measure_splitting(args, text)
        tables.print_row(name, f"{speed / 1e6:.2f}", f"{seconds:.1f}")
        figures[f"split_mb_per_s_{name}"] = speed / 1e6
    return figures


def show_scoring(args, text) -> dict[str, float]:
    """Part 3."""
    best = measure_scoring(args, text)
    print(f"\na scoring pass over {args.text_rows} x {min(args.lengths)} tokens; the teacher has "
          f"{args.layers} layers of width {args.width}, V = {Words.SIZE}")  # fmt: skip
    tables.print_head("mask", "s", "sentences_s", "over_none")
    for name, row in best.items():
        over = row["all"] / best["none"]["all"]
        tables.print_row(name, f"{row['all']:.3f}", f"{row['sentences']:.4f}", f"{over:.3f}")
    share = best["release"]["sentences"] / best["release"]["all"]
    return {"over_none": over, "sentences_share": share}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print three tables, then their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=1024, help="rollouts of a batch")
    add("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens of a response")
    add("--tokens", type=int, default=32768, help="as train.py --tokens-per-micro-batch")
    add("--check", type=int, default=4, help="rows whose masks are computed again, per length")
    add("--text-rows", type=int, default=4, help="rollouts of parts 2 and 3")
    add("--layers", type=int, default=1, help="of the teacher of part 3")
    add("--width", type=int, default=64, help="of the teacher of part 3")
    add("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    machine.use_threads(1)
    _, splitter_name = teachability.sentence_splitter("auto")
    print(machine.describe("cpu", 1, f"{os.cpu_count()} cores", splitter_name))
    figures = show_masks(args)
    texts = {"toy": Toy(), "words": Words()}
    figures |= show_splitting(args, texts)
    figures |= show_scoring(args, texts["words"])
    tables.print_json(figures, 4)


if __name__ == "__main__":
    main()
