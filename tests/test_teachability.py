"""Margins, sentences, the alignment of characters with tokens, segment scores.

The tokenizers are built here, one for each way of turning tokens into text: byte-level BPE,
words joined by spaces, SentencePiece pieces with byte fallback, BPE with end-of-word marks.
"""

import functools
import math
import random
import re
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import teachability
from teachability import (
    SOLE_CANDIDATE_MARGIN,
    segment_scores,
    segment_spread,
    sentence_splitter,
    teacher_margin,
    token_segments,
    token_spans,
)

torch.set_num_threads(1)
INF, NAN = math.inf, math.nan

TEXTS = [
    "First, we add 3 and 4. The sum is 7! Is it odd? Yes. The answer is \\boxed{7}.",
    "Let $x^2 = 2.5$. Then \\[ \\frac{x}{2} \\approx 0.79. \\]\n\nSo $x < 2$. Done",
    "Code:\n```python\ndef f(x):\n    return x ** 2  # ok!\n```\nIt works. 😀 Fine.",
    "你好，世界。 Chinese first. Then 🙂🙂 twice. 👩‍👩‍👧 Family! é ü ñ.",
    "  two spaces lead.  Two  spaces  follow.\n\n\nA tail without an end",
    "We use e.g. this one. See Fig. 3 and Eq. (2). Pi is 3.14. Next",
]


# --- tokenizers


@functools.cache
def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


@functools.cache
def words():
    vocabulary = ["<eos>", "So", "x", "is", "3", ".", "?", "Then", "Done", "!", "e.g."]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # decoded by joining with spaces
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@functools.cache
def sentence_piece():
    pieces = ["▁", "▁▁", "▁First", "▁The", "▁x", "▁is", "a", "e", ".", "!", "?", "你", "So", "▁7"]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    vocabulary += [(piece, -3.0) for piece in pieces]
    core = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@functools.cache
def word_ends():
    letters = sorted({c for text in TEXTS for c in text if c.isascii() and c.isprintable()})
    tokens = ["<eos>", *letters, *(f"{c}</w>" for c in letters), "So</w>", "is</w>", "3.</w>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.BPEDecoder("</w>")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


TOKENIZERS = [byte_level, words, sentence_piece, word_ends]


def samples(tokenizer, count, seed):
    """Token sequences that a student might sample: text, random ids, and text with accidents."""
    rng = random.Random(seed)
    canonical = [tokenizer(text)["input_ids"] for text in TEXTS]
    for i in range(count):
        length = rng.choice([1, 2, 3, 8, 30, 90])
        ids = [token for _ in range(3) for token in rng.choice(canonical)]
        start = rng.randrange(len(ids))
        ids = ids[start : start + length]
        if i % 3 == 0:
            ids = [rng.randrange(len(tokenizer)) for _ in range(length)]
        if i % 3 == 1:
            for _ in range(rng.randrange(4)):
                ids.insert(rng.randrange(len(ids) + 1), rng.randrange(len(tokenizer)))
        yield ids


def naive_spans(tokenizer, ids):
    """The definition of `token_spans`, with a decode of every prefix."""

    def decode(prefix):
        return tokenizer.decode(
            prefix, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    lengths = [len(decode(ids[: t + 1])) for t in range(len(ids))]
    ends = [min(lengths[t:]) for t in range(len(ids))]
    return decode(ids), [[a, b] for a, b in zip([0, *ends], ends, strict=False)]


def naive_segments(tokenizer, ids, splitter):
    text, spans = naive_spans(tokenizer, ids)
    owner, starts = {}, [start for start, _ in splitter.span_tokenize(text)]
    for i in range(len(text)):
        owner[i] = max([n for n, start in enumerate(starts) if start <= i], default=0)
    segments, current = [], 0
    for start, end in spans:
        solid = [i for i in range(start, end) if not text[i].isspace()]
        if end > start:
            current = owner[(solid or [start])[0]]
        segments.append(current)
    used = sorted(set(segments))
    return [used.index(segment) for segment in segments]


@functools.cache
def untrained():
    return sentence_splitter("untrained")[0]


def by_segment(tokenizer, ids, splitter=None):
    """[(tokens' text), ..] per segment; special tokens show as they are."""
    segment = token_segments(tokenizer, ids, splitter or untrained()).tolist()
    groups = [[] for _ in range(max(segment) + 1)]
    for token, number in zip(ids, segment, strict=True):
        groups[number].append(token)
    return [tokenizer.decode(group) for group in groups]


# --- margin


def test_margin_is_best_minus_second_best():
    logp = torch.tensor([[[-4.0, -0.25, -9.0, -1.5], [-1.0, -1.0, -2.0, -3.0]]])
    assert torch.equal(teacher_margin(logp), torch.tensor([[1.25, 0.0]]))
    assert torch.equal(
        teacher_margin(logp, kind="prob"),
        torch.tensor([[math.exp(-0.25) - math.exp(-1.5), 0.0]]),
    )


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 5, 4), (2, 3, 5, 16), (0, 7, 2)])
def test_margin_of_any_shape(shape):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    for kind in ("logprob", "prob"):
        margin = teacher_margin(logp, kind=kind)
        assert margin.shape == shape[:-1] and not margin.requires_grad
        assert (margin >= 0).all()
    sorted_logp = logp.detach().sort(dim=-1, descending=True).values
    expected = sorted_logp[..., 0] - sorted_logp[..., 1]
    torch.testing.assert_close(teacher_margin(logp), expected, rtol=0, atol=0)
    # Only differences count, and the order of the candidates does not.
    torch.testing.assert_close(teacher_margin(logits), expected)
    torch.testing.assert_close(teacher_margin(logp.flip(-1) - 1000), expected)


@pytest.mark.parametrize("K", [2, 3, 4])
def test_margin_with_nan_and_infinity_anywhere(K):
    """Four values in K places, in every way, against sorting."""
    logp_BK = torch.cartesian_prod(*[torch.tensor([-INF, -2.0, -0.5, NAN])] * K)
    log, prob = teacher_margin(logp_BK).tolist(), teacher_margin(logp_BK, kind="prob").tolist()
    for row, logp_K in enumerate(logp_BK.tolist()):
        second, first = sorted(logp_K)[-2:]
        if any(map(math.isnan, logp_K)):
            assert math.isnan(log[row]) and math.isnan(prob[row])
            continue
        assert prob[row] == pytest.approx(math.exp(first) - math.exp(second), abs=1e-7)
        sole = SOLE_CANDIDATE_MARGIN if second == -INF else first - second
        assert log[row] == pytest.approx(0.0 if first == -INF else sole)


def test_margin_is_computed_in_float32():
    logp = torch.tensor([-0.1, -2.0]).bfloat16()
    assert teacher_margin(logp).dtype == torch.float32
    assert teacher_margin(logp).item() == (logp[0].float() - logp[1].float()).item()


def test_margin_of_impossible_candidates():
    logp = torch.tensor([[-1.0, -INF, -INF], [-INF] * 3, [-1.0, -300.0, -INF], [NAN, -1.0, -INF]])
    margin = teacher_margin(logp)
    assert margin[:3].tolist() == [pytest.approx(SOLE_CANDIDATE_MARGIN), 0.0, 299.0]
    assert margin[3].isnan()  # an error upstream stays visible
    prob = teacher_margin(logp, kind="prob")
    assert prob[:3].tolist() == pytest.approx([math.exp(-1), 0, math.exp(-1)])
    assert prob[3].isnan()


def test_margin_bad_arguments():
    with pytest.raises(ValueError, match=r"K >= 2, got \(3, 1\)"):
        teacher_margin(torch.zeros(3, 1))
    with pytest.raises(IndexError):
        teacher_margin(torch.tensor(1.0))
    with pytest.raises(ValueError, match="kind .* 'odds'"):
        teacher_margin(torch.zeros(3, 2), kind="odds")


# --- splitter


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("We use e.g. this. It works.", ["We use e.g. this.", "It works."]),
        ("See Fig. 3 and Eqs. (1). Pi is 3.14. So?", ["See Fig. 3 and Eqs. (1).",
                                                     "Pi is 3.14.", "So?"]),
        ("Dr. Wu et al. agree, i.e. We win! Yes", ["Dr. Wu et al. agree, i.e. We win!", "Yes"]),
        ("The answer is no. Stop", ["The answer is no.", "Stop"]),
        ("Then $x = 2$. The answer is \\boxed{2}.", ["Then $x = 2$.",
                                                    "The answer is \\boxed{2}."]),
        ("no end", ["no end"]),
        (" \n", []),
    ],
)  # fmt: skip
def test_untrained_splitter(text, sentences):
    splitter, name = sentence_splitter("untrained")
    assert name == "untrained-punkt"
    assert [text[a:b] for a, b in splitter.span_tokenize(text)] == sentences


LONG = "a line of prose that is long enough to have been wrapped"
HAND_SPLIT = {  # a bar where a sentence ends
    "Chinese": "设 x = 1。|那么呢？|很好！|（见下文。）|他说：“对。”|然后走了",
    "marks in a row": "真的吗？！|是的……|我想，可以｡|对!|错?|完",
    "a quotation goes on": "“好！”，|他说。|「そう。」|と言った。",
    "dots": "其实……|不知道，1, 2, …, n 项…。|It is … so, a + … + z",
    "full-width": "答えは３．１４です．|次に５．|終わり",
    "ASCII marks between CJK": "成立.|所以 $x=1$.|因此 (a).|对!|吗?|版本 3.5 和 e.g.x 不变",
    "Hindi": "यह पहला है।| यह दूसरा है॥| क्या तीसरा? |हाँ",
    "Arabic and Urdu": "ما هذا؟| هذا كتاب. |یہ ہے۔| نعم، لا",
    "Armenian, Ethiopic, Burmese, Khmer, Tibetan": "այո։| አዎ።| ဟုတ်။| បាទ។| ཡིན།| end",
    "Thai": "วันนี้อากาศดี |ราคา ๕๐ บาท x = 3 และ |ต่าง ๆ กัน ฯลฯ\n|จบ",
    "Lao": "ສະບາຍດີ |ຂອບໃຈ",
    "Korean": "나는 갔다. |그러나 왔다",
    "lines": "x = 1\n|y = 2\r\n|Then z\r|and so on\n\n \t\n|end  \n\n",
    "wrapped prose": LONG + "\n  by its writer. |But not\n|here: " + LONG + "\n|X\n|x = 3",
    "headings": "# Plan\n|## 1. First part\n|Title\n=====\n|Text\n---\n|**Next.**\n|So",
    "bold": "**Yes.** |So *it is!* |**要点。**| __No?__ |x = *y* is 1",
    "lists": "We need\n|- one\n|  - two. |So\n|* x\n|1. One\n|2. Two. |So\n|3) x",
    "other lists": "1．第一\n|２．第二\n|三、第三\n|> 1. x\n|**2. bold.** |So\n|1.5 is\n|2024. |It",
    "in a line": "It is 1.5, e.g. this. |Step 1. |Add. |Dr. Wu agrees",
    "display": "So\n|$$\na = 1. B\n= 2\n$$\n|where \\[ \\frac{x}{2}.\n Y \\] holds. |It does",
    "environment": "Now\n|\\begin{align*}\na &= 1. \\\\\nB &= 2\n\\end{align*}\n|So",
    "never closed": "\\[ a\n|b\n\n|$$ c\n\n|Done. |So $e\n|f$",
    "code": "Code:\n|```py\ndef f(x):\n\n    return x. So\n```\n|It. |So\n|  ````\nx\n  ````\n|y",
    "code, cut off": "Code:\n|```\na\n\nb. C",
    "no fence": "```x``` is code\n|So",
    "blank": " \n\t\r\n",
    "nothing": "",
}


def test_no_group_of_a_pattern_is_possessive():
    """Python 3.11.0 to 3.11.4 matches `(?:..)++` wrongly where the group backtracks (gh-106052)."""
    for pattern in (teachability.FENCED.pattern, teachability.CUT.pattern):
        assert not re.search(r"\)[*+?]\+|\(\?>", pattern)


@pytest.mark.parametrize("name", HAND_SPLIT)
def test_blocks_against_texts_split_by_hand(name):
    splitter, what = sentence_splitter("blocks")
    assert what in ("blocks+untrained-punkt", "blocks+nltk-punkt-english")
    parts = HAND_SPLIT[name].split("|")
    text = "".join(parts)
    found = [text[a:b].strip() for a, b in splitter.span_tokenize(text)]
    assert found == [part.strip() for part in parts if part.strip()]


def test_a_table_is_one_sentence():
    text = "A table\n| a | b |\n|---|---|\n| 1. x | Y. Z |\n\nAfter"
    spans = sentence_splitter("blocks")[0].span_tokenize(text)
    assert [text[a:b] for a, b in spans] == ["A table", text[8:-7], "After"]


def test_blocks_of_english_in_one_line_are_as_punkt_has_them():
    """What the toy worlds write: nothing moves."""
    rng, blocks = random.Random(9), sentence_splitter("blocks")[0]
    words = "We use e.g. Fig. 3 and 3.14 . So? no! ( ... ) A. b.) \"it.\" i.e. Move 1. x".split(" ")
    for _ in range(300):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(40)))
        text = re.sub(r"^\d", "x", text)  # not the number of a list item
        assert list(blocks.span_tokenize(text)) == list(untrained().span_tokenize(text))


def test_blocks_of_chinese_against_a_naive_reading():
    rng, blocks = random.Random(10), sentence_splitter("blocks")[0]
    for _ in range(300):
        text = "".join(rng.choice("你好世界数学。！？，、”」") for _ in range(rng.randrange(60)))
        spans = list(blocks.span_tokenize(text))
        naive, ended, closed = [""], False, False
        for character in text:
            if ended and (character in "，、" or character in "”」" and not closed):
                pass  # belongs to what has ended; behind the comma nothing else does
            elif ended and not (character in "。！？" and not closed):
                naive.append("")
                ended = False
            naive[-1] += character
            closed = ended and character in "，、"
            ended = ended or character in "。！？"
        assert [text[a:b] for a, b in spans] == [part for part in naive if part]


HOSTILE = [
    "\n", "\r", " ", "\t", "$", "$$", "$$\n", "\\[", "\\[a\n", "\\begin{a}", "\\begin{", "\\", "`",
    "```\n", "````", "|\n", "|", "| a\n", "。", "。”", "。”，", "。*", "…", "…”", "…a", "好.)", ".",
    "!", ".*", "X", "ก ", "ก", "1.", "1.\n", "#", "- ", "> ", "．", "．1", "x\n", "\0", "\ud800",
    LONG + "\n",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_blocks_take_linear_time(piece):
    """Here, half a second at most; a quadratic search would take many. With something else behind,
    so that a search for more of the same fails at the end only."""
    text, end, begun = piece * (60_000 // len(piece)) + "，\\x", 0, time.process_time()
    for start, stop in sentence_splitter("blocks")[0].span_tokenize(text):
        assert end <= start < stop and not text[end:start].strip()
        end = stop
    assert not text[end:].strip()
    assert time.process_time() - begun < 4


def test_tokens_of_blocks():
    """A mark and the quote behind it end the sentence of the tokens that they are in."""
    tokenizer, blocks = byte_level(), sentence_splitter("blocks")[0]
    for name, text in HAND_SPLIT.items():
        ids = tokenizer(text.replace("|", ""))["input_ids"]
        if ids:
            segments = token_segments(tokenizer, ids, blocks)
            assert segments.tolist() == naive_segments(tokenizer, ids, blocks), name
    ids = tokenizer("他说：“对。”然后走了。")["input_ids"]
    assert by_segment(tokenizer, ids, blocks) == ["他说：“对。”", "然后走了。"]
    assert by_segment(tokenizer, ids) == ["他说：“对。”然后走了。"]  # one, to the untrained Punkt


def test_a_splitter_that_remembers_decides_as_one_that_does_not():
    rng = random.Random(8)
    parameters = teachability.PunktParameters()
    parameters.abbrev_types = set(teachability.ABBREVIATIONS.split())
    plain = teachability.PunktSentenceTokenizer(parameters)
    splitter = sentence_splitter("untrained")[0]
    words = "We use e.g. Fig. 3 and 3.14 . So? no! ( ... ) A. b.) \"it.\" i.e. \n Dr. x".split(" ")
    for _ in range(300):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(40)))
        assert list(splitter.span_tokenize(text)) == list(plain.span_tokenize(text))
    assert splitter.text_contains_sentbreak.cache_info().hits > 500


def test_auto_takes_the_pretrained_when_it_is_there(monkeypatch):
    pretrained = teachability.PunktSentenceTokenizer()
    monkeypatch.setattr(teachability, "PunktTokenizer", lambda language: pretrained)
    for kind in ("auto", "pretrained"):
        assert sentence_splitter(kind) == (pretrained, "nltk-punkt-english")
    assert sentence_splitter("untrained")[1] == "untrained-punkt"
    assert sentence_splitter()[1] == sentence_splitter("blocks")[1] == "blocks+nltk-punkt-english"


def test_missing_data(no_data):
    assert sentence_splitter("auto")[1] == "untrained-punkt"
    assert sentence_splitter()[1] == "blocks+untrained-punkt"
    with pytest.raises(LookupError, match="nltk.downloader punkt_tab"):
        sentence_splitter("pretrained")
    with pytest.raises(ValueError, match="kind .* 'spacy'"):
        sentence_splitter("spacy")


# --- characters of tokens


@pytest.mark.parametrize("make", TOKENIZERS)
def test_spans_and_segments_are_those_of_every_prefix(make):
    tokenizer = make()
    inexact = 0
    for ids in samples(tokenizer, 240, seed=1):
        text, spans = token_spans(tokenizer, ids)
        expected_text, expected = naive_spans(tokenizer, ids)
        assert text == expected_text
        assert spans[0, 0] == 0 and spans[-1, 1] == len(text)
        assert torch.equal(spans[1:, 0], spans[:-1, 1]) and (spans.diff() >= 0).all()
        if spans.tolist() != expected:
            inexact += 1
            assert make is sentence_piece and "\ufffd" in text  # broken bytes, as documented
        segments = token_segments(tokenizer, ids, untrained())
        assert segments.tolist() == naive_segments(tokenizer, ids, untrained())
    assert inexact <= 15


@pytest.mark.parametrize("bytes_of", [(3, 4), (4, 3, 3), (1, 3, 4, 2), (2,), (3,), (4,)])
@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_long_runs_of_byte_tokens_are_exact(make, bytes_of):
    """Characters of one to four bytes in turn, every byte a token; also between other text, and cut
    off inside the last character."""
    tokenizer, characters = make(), {1: "~", 2: "ß", 3: "龘", 4: "🜁"}
    name = bytes_to_unicode().get if make is byte_level else "<0x{:02X}>".format
    run = "".join(characters[n] for n in bytes_of) * (250 // sum(bytes_of))
    ids = [tokenizer.convert_tokens_to_ids(name(byte)) for byte in run.encode()]
    for some in (ids, tokenizer("So x is")["input_ids"] + ids + tokenizer("So")["input_ids"]):
        text, spans = token_spans(tokenizer, some)
        assert run in text and (text, spans.tolist()) == naive_spans(tokenizer, some)
    if make is byte_level:  # byte fallback makes garbage of the whole run then
        text, spans = token_spans(tokenizer, ids[:-1])
        assert (text, spans.tolist()) == naive_spans(tokenizer, ids[:-1])


@pytest.mark.parametrize("make", TOKENIZERS)
def test_two_parts_give_the_same_text_positions(make, monkeypatch):
    """The way out for decoders whose parts do not add up, forced."""
    monkeypatch.setattr(teachability, "REPLACEMENT", "\0\0")
    tokenizer = make()
    for ids in samples(tokenizer, 60, seed=2):
        text, spans = token_spans(tokenizer, ids)
        if make is not sentence_piece or "\ufffd" not in text:
            assert (text, spans.tolist()) == naive_spans(tokenizer, ids)
        segments = token_segments(tokenizer, ids, untrained())
        assert segments.tolist() == naive_segments(tokenizer, ids, untrained())


class Noting:
    """A tokenizer that notes how many ids it is given to decode each time."""

    def __init__(self, tokenizer):
        self.tokenizer, self.sizes = tokenizer, []

    def decode(self, ids, **options):
        self.sizes.append(len(ids))
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_what_is_remembered_changes_nothing(make):
    """One tokenizer for many responses, of which each meets other neighbours, and a new one."""
    known = Noting(make())
    for ids in samples(make(), 120, seed=6):
        new = Noting(make())
        text, spans = token_spans(known, ids)
        new_text, new_spans = token_spans(new, ids)
        assert text == new_text and torch.equal(spans, new_spans)
        segments = token_segments(known, np.array(ids, dtype=np.int32), untrained())
        assert torch.equal(segments, token_segments(new, ids, untrained()))


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[2]])
def test_the_second_time_only_the_whole_is_decoded(text):
    """Every token of these texts is known by then, the parts of an emoji too."""
    tokenizer, ids = Noting(byte_level()), byte_level()(text)["input_ids"]
    token_spans(tokenizer, ids)
    assert len(tokenizer.sizes) > 10
    tokenizer.sizes.clear()
    token_spans(tokenizer, ids)
    assert tokenizer.sizes == [len(ids)]


@pytest.mark.parametrize("text", ["🙂", "é", "你好", "🙂 x 👩‍👩‍👧 y ü", ""])
def test_a_rare_character_costs_a_few_decodings(text):
    """A character of several tokens does not send the whole response down the block path."""
    tokenizer, prose = Noting(byte_level()), byte_level()(" ".join(TEXTS[:2]) * 20)["input_ids"]
    ids = [*prose, *byte_level()(text)["input_ids"], *prose]
    whole, spans = token_spans(tokenizer, ids)
    assert whole == byte_level().decode(ids) and spans[-1, 1] == len(whole)
    assert len(set(ids)) < len(tokenizer.sizes) < 3 * len(set(ids)) < len(ids) / 4
    # every prefix of the run, and the whole response once
    assert sum(tokenizer.sizes) < 2 * len(ids)


class RawBytes:
    """One token per byte, so that every character outside ASCII is several tokens."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", [*TEXTS, "你好世界" * 30 + "! 好", "🙂 🙂 " * 25, "é" * 100])
def test_one_token_per_byte(text):
    decoded, spans = token_spans(RawBytes(), list(text.encode()))
    assert decoded == text
    expected, position = [], 0
    for character in text:
        expected.append([position, position + 1])
        position += 1
        expected += [[position, position]] * (len(character.encode()) - 1)
    assert spans.tolist() == expected
    segments = token_segments(RawBytes(), list(text.encode()), untrained())
    assert segments.tolist() == naive_segments(RawBytes(), list(text.encode()), untrained())


@pytest.mark.parametrize("by_piece", [True, False])
def test_tokens_that_never_end_at_a_character(by_piece, monkeypatch):
    """Every token ends inside a character, so no block has a clean cut: documented, and bounded.
    The spans still tile the text, and what follows the run is exact if its text is known."""
    if not by_piece:
        monkeypatch.setattr(teachability, "REPLACEMENT", "\0\0")

    class Straddling:
        def decode(self, ids, **options):
            data = b"".join((b"\xe4\xb8", b"\xad\xe4\xb8", b"\xad.", b" So")[i] for i in ids)
            return data.decode("utf-8", errors="replace")

    text, spans = token_spans(Straddling(), [0, *[1] * 200, 2, 3])
    assert text == "中" * 201 + ". So" and spans[-1, 1] == len(text)
    assert torch.equal(spans[1:, 0], spans[:-1, 1]) and (spans.diff() >= 0).all()
    if by_piece:
        assert spans[-1].tolist() == [202, 205]


def test_decoders_that_look_at_their_neighbours():
    """Text that no sum of parts can give: still monotone, and exact up to one block."""

    class Shouting:  # a letter is a capital if an exclamation mark follows
        def decode(self, ids, **options):
            text = "".join("ab! "[i] for i in ids)
            return text.replace("a!", "A!").replace("b!", "B!")

    ids = [0, 1, 2, 3, 0, 0, 2]
    assert token_spans(Shouting(), ids)[1].tolist() == naive_spans(Shouting(), ids)[1]
    text, spans = token_spans(Shouting(), ids * 50)
    assert spans.tolist() == [[t, t + 1] for t in range(len(text))]


@pytest.mark.parametrize("make", [byte_level, sentence_piece, words])
def test_work_grows_linearly(make):
    """Counts ids given to decode and characters received; decoding every prefix would give
    T / 2 per token and more. Measured: up to 8 for text, up to 60 for garbage in blocks."""
    tokenizer = make()

    class Counting:
        work = 0

        def decode(self, ids, **options):
            text = tokenizer.decode(ids, **options)
            self.work += len(ids) + len(text)
            return text

    rng = random.Random(3)
    prose = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    cost = {}
    for T in (1000, 4000):
        garbage = [rng.randrange(len(tokenizer)) for _ in range(T)]
        for kind, ids in (("prose", (prose * T)[:T]), ("garbage", garbage)):
            counting = Counting()
            token_spans(counting, ids)
            cost[kind, T] = counting.work / T
    assert cost["prose", 1000] < 20 and cost["prose", 4000] < 20
    assert cost["garbage", 1000] < 150 and cost["garbage", 4000] < 150
    for kind in ("prose", "garbage"):  # 4 for a text that is cut inside a character
        assert cost[kind, 4000] < 1.3 * cost[kind, 1000] + 4


# --- sentences of tokens


@pytest.mark.parametrize("make", TOKENIZERS)
def test_every_token_is_in_exactly_one_segment(make):
    tokenizer = make()
    for ids in samples(tokenizer, 60, seed=4):
        segment = token_segments(tokenizer, ids, untrained())
        assert segment.dtype == torch.int64 and segment.shape == (len(ids),)
        assert segment[0] == 0
        assert set(segment.diff().tolist()) <= {0, 1}


def test_a_leading_space_goes_with_its_word():
    tokenizer = byte_level()
    ids = tokenizer("The sum is 7. The answer. Yes")["input_ids"]
    assert by_segment(tokenizer, ids) == ["The sum is 7.", " The answer.", " Yes"]


def test_latex_code_newlines_and_a_tail():
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    assert by_segment(tokenizer, [*tokenizer(TEXTS[1])["input_ids"], eos]) == [
        "Let $x^2 = 2.5$.",
        " Then \\[ \\frac{x}{2} \\approx 0.79.",
        " \\]\n\nSo $x < 2$.",
        " Done<eos>",
    ]
    assert by_segment(tokenizer, tokenizer(TEXTS[2])["input_ids"]) == [
        "Code:\n```python\ndef f(x):\n    return x ** 2  # ok!\n",
        "```\nIt works.",
        " 😀 Fine.",
    ]


def test_blank_tokens_stay_before_a_sentence():
    space, stop, word = 0, 1, 2

    class Three:
        def decode(self, ids, **options):
            return "".join((" \n", ".", "So")[i] for i in ids)

    ids = [space, word, stop, space, space, word, stop, space]
    assert token_segments(Three(), ids, untrained()).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert token_segments(Three(), [space, space], untrained()).tolist() == [0, 0]


def test_blanks_of_all_kinds_before_a_word():
    """All of Unicode's white space, and characters beyond it that are none."""
    blanks = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert len(blanks) == 29
    others = ["\u200b", "\u3001", "\u3002", "\U0001f642", "\ud800", "\x00"]  # one, half a pair

    class Pieces:
        def decode(self, ids, **options):
            return "".join(pieces[i] for i in ids)

    for character in blanks + others:
        pieces = ["So.", f" {character} it", character, "."]
        # the second sentence begins behind the character, which only a blank leaves to its word
        segment_T = token_segments(Pieces(), [0, 1, 2, 3], lambda text: [(0, 3), (5, 9)])
        assert segment_T.tolist() == [0, int(character in blanks), 1, 1], repr(character)


def test_special_tokens_go_with_the_token_before():
    tokenizer = byte_level()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    one, two = tokenizer("It is.")["input_ids"], tokenizer(" The sum is.")["input_ids"]
    ids = [pad, *one, pad, pad, *two[:2], pad, *two[2:], eos]
    expected = [0] * (len(one) + 3) + [1] * (len(two) + 2)
    assert token_segments(tokenizer, ids, untrained()).tolist() == expected
    assert token_segments(tokenizer, [eos], untrained()).tolist() == [0]
    assert token_spans(tokenizer, [pad, eos])[1].tolist() == [[0, 0], [0, 0]]

    class Three:  # also where the next sentence begins right there, without a space
        def decode(self, ids, **options):
            return "".join(("So.", "", "It")[i] for i in ids)

    segments = token_segments(Three(), [0, 1, 2], lambda text: [(0, 3), (3, 5)])
    assert segments.tolist() == [0, 0, 1]


def test_a_character_of_several_tokens_is_not_torn():
    """The space before an emoji shares a token with the emoji's first byte; it all opens the
    second sentence, although the first token on its own shows a space and a broken byte."""
    data = "So. 🙂 it is.".encode()
    pieces = [data[:3], data[3:5], data[5:7], data[7:8], data[8:]]

    class Pieces:
        def decode(self, ids, **options):
            return b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")

    assert token_spans(Pieces(), range(5))[1].tolist() == [[0, 3], [3, 5], [5, 5], [5, 5], [5, 12]]
    segments = token_segments(Pieces(), list(range(5)), lambda text: [(0, 3), (4, 12)])
    assert segments.tolist() == [0, 1, 1, 1, 1]


def test_a_sentence_without_a_token_is_no_segment():
    class Long:  # the first token holds one sentence and the whole of the second
        def decode(self, ids, **options):
            return "".join(("It is. It was.", " So be it.")[i] for i in ids)

    assert len(list(untrained().span_tokenize("It is. It was. So be it."))) == 3
    assert token_segments(Long(), [0, 1], untrained()).tolist() == [0, 1]


def test_splitters_and_ids_of_any_kind(monkeypatch):
    tokenizer = byte_level()
    ids = tokenizer("One. Two. Three.")["input_ids"]
    expected = token_segments(tokenizer, ids, untrained())
    assert expected[-1] == 2
    for given in (tuple(ids), np.array(ids), torch.tensor(ids), torch.tensor(ids).int()):
        assert torch.equal(token_segments(tokenizer, given, untrained()), expected)
    function = untrained().span_tokenize
    assert torch.equal(token_segments(tokenizer, ids, function), expected)
    assert token_segments(tokenizer, ids, lambda text: [(0, len(text))]).unique().tolist() == [0]

    teachability._default_splitter.cache_clear()
    calls = []
    original = teachability.sentence_splitter
    monkeypatch.setattr(
        teachability, "sentence_splitter", lambda *kind: calls.append(kind) or original(*kind)
    )
    for _ in range(3):
        assert torch.equal(token_segments(tokenizer, ids), expected)
    assert calls == [()], "once"


def test_no_tokens():
    for empty in ([], torch.zeros(0, dtype=torch.int64), np.array([], dtype=int)):
        segment = token_segments(byte_level(), empty, untrained())
        assert segment.shape == (0,) and segment.dtype == torch.int64
        text, spans = token_spans(byte_level(), empty)
        assert text == "" and spans.shape == (0, 2)


@pytest.mark.parametrize("ids", [3, [[1, 2], [3, 4]], torch.zeros(1, 3, dtype=torch.int64), [0.5]])
def test_ids_of_the_wrong_shape(ids):
    with pytest.raises((TypeError, ValueError)):
        token_segments(byte_level(), ids, untrained())


# --- scores


def test_scores_against_a_loop():
    rng = random.Random(5)
    for _ in range(100):
        segment = [0]
        for _ in range(rng.randrange(60)):
            segment.append(segment[-1] + (rng.random() < 0.3))
        margin = torch.tensor([rng.expovariate(0.5) for _ in segment])
        include = [rng.random() < 0.6 for _ in segment]
        for counted in (None, include):
            expected = []
            for i in range(segment[-1] + 1):
                values = [
                    margin[t].double().item()
                    for t in range(len(segment))
                    if segment[t] == i and (counted is None or counted[t])
                ]
                expected.append(math.log(1 + sum(values) / len(values)) if values else NAN)
            scores = segment_scores(margin, torch.tensor(segment), include_T=counted)
            assert scores.dtype == torch.float64
            torch.testing.assert_close(
                scores, torch.tensor(expected).double(), rtol=1e-6, atol=1e-7, equal_nan=True
            )


def test_scores_worked_by_hand():
    margin, segment = [0.0, 2.0, 5.0, 7.0], [0, 0, 1, 2]
    assert segment_scores(margin, segment).tolist() == pytest.approx(
        [math.log(2), math.log(6), math.log(8)], rel=1e-15
    )
    assert torch.equal(segment_scores(margin, segment, include_T=[True] * 4),
                       segment_scores(margin, segment))
    some = segment_scores(margin, segment, include_T=[False, True, False, True])
    assert some[0].item() == pytest.approx(math.log(3)) and some[1].isnan()
    assert some[2].item() == pytest.approx(math.log(8))
    assert segment_scores(margin, segment, include_T=[False] * 4).isnan().all()
    assert segment_scores([], []).shape == (0,)
    assert segment_scores([INF, 1.0], [0, 1]).tolist() == [INF, math.log(2)]


def test_what_is_not_included_may_be_anything():
    scores = segment_scores([NAN, -3.0, 1.0], [0, 0, 0], include_T=torch.tensor([0, 0, 1]))
    assert scores.tolist() == [math.log(2)]


def test_scores_leave_their_arguments_alone():
    margin = torch.tensor([1.0, 2.0], requires_grad=True)
    segment = torch.tensor([0, 1])
    scores = segment_scores(margin, segment)
    assert not scores.requires_grad and margin.requires_grad
    assert segment.tolist() == [0, 1] and margin.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", [-0.5, NAN])
def test_a_margin_that_is_none(value):
    with pytest.raises(ValueError, match=f"margin_T must be >= 0, got a minimum of {value}"):
        segment_scores([1.0, value], [0, 0])


@pytest.mark.parametrize(
    ("margin", "segment", "include"),
    [
        ([1.0, 2.0], [0], None), ([1.0, 2.0], [0, 0], [True]), ([[1.0]], [[0]], None),
        ([1.0, 2.0], [-1, 0], None),
    ],
)  # fmt: skip
def test_scores_bad_arguments(margin, segment, include):
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        segment_scores(margin, segment, include_T=include)


def test_any_numbering_of_segments():
    """By number, in any order; a number that is not used scores nan."""
    scores = segment_scores([1.0, 3.0, 5.0], [2, 0, 2])
    assert scores.tolist() == pytest.approx([math.log(4), NAN, math.log(4)], nan_ok=True)
    assert segment_spread([1.0, 3.0, 5.0], [2, 0, 2]).tolist() == pytest.approx(
        [0.0, NAN, math.log(3)], nan_ok=True
    )


def test_spread_bad_arguments():
    for bad in (NAN, INF, -INF):
        with pytest.raises(ValueError, match="value_T must be finite"):
            segment_spread([0.0, bad], [0, 0])
    for values, segments in (([1.0], [0, 0]), ([1.0, 2.0], [-1, 0])):
        with pytest.raises((RuntimeError, IndexError)):
            segment_spread(values, segments)
