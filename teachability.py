"""How much does the teacher have to teach here? Teacher margins, averaged over sentences.

Paper: "Prefix Teach, Suffix Fade", arXiv 2605.13643, the sections on the teacher margin and on
segment scores. Among the student's own K likeliest next tokens, a teacher that still has
something to teach prefers one clearly; once it is lost on the student's prefix, it does not.
The margins of a response, averaged sentence by sentence, are the series in which
`release_rule.change_point` looks for a drop.

    paper           here                  meaning
    C_t             (the K axis)          the student's top-K next tokens at t; the paper's K = 4
    a1, a2          first, second         the teacher's best and second best inside C_t
    M_t             margin_BT             log p_T(a1) - log p_T(a2) >= 0, nats
    segment i       segment_T == i        a sentence of the decoded response, by NLTK's Punkt
    S_i             scores_N              log(1 + mean of M_t over segment i), nats

The response is never tokenized again: a student may sample token sequences that the tokenizer
would not produce, so characters are attributed to the tokens that were really sampled.

Decisions where the paper is silent:
1. A token belongs to the sentence of its first non-blank character: " The" goes with the
   sentence that it opens. A blank token goes by its first character, a token without
   characters (special tokens, so EOS) with the token before it. White space between two
   sentences belongs to the first. The tokens of one many-token character stay together.
2. A sentence in which no token begins is no segment; the numbers stay contiguous.
3. Without the data of the pretrained English Punkt, an untrained Punkt with a short list of
   abbreviations stands in. `sentence_splitter` says which one it gives.
4. kind="prob" measures the margin in probability instead of log-probability, and include_T
   narrows the mean to some tokens. Both are off by default.
"""

import functools
import io
import itertools
import math
import threading

import nltk
import torch
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTokenizer

# Margin, in nats, when the teacher rules out every candidate but one: the largest ratio of 1 to
# another probability that float32 can tell. A finite number, since one infinite score would
# make the whole series useless.
SOLE_CANDIDATE_MARGIN = -math.log(torch.finfo(torch.float32).tiny)  # 87.3

# What the untrained splitter does not take for the end of a sentence. Left out, because they end
# sentences as often as not: no., sec., etc.
ABBREVIATIONS = frozenset(
    "e.g i.e cf viz eq eqs fig figs ref refs thm vs approx resp w.r.t w.l.o.g s.t al "
    "dr mr mrs ms prof st".split()
)

DOWNLOAD_SECONDS = 60  # patience for the one-off download of Punkt's data
BLOCK = 32  # tokens decoded together where single tokens have no text of their own
REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no (complete) character
# Whether a code point is white space; the last blank one is U+3000, and the last entry here stands
# for all beyond it.
BLANK = torch.tensor([chr(code).isspace() for code in range(0x3002)])


def teacher_margin(teacher_logp_BTK: torch.Tensor, *, kind: str = "logprob") -> torch.Tensor:
    """M_t: how clearly the teacher prefers one of the student's K candidates.

        logprob   M = log p_T(a1) - log p_T(a2)     nats, >= 0 (the paper)
        prob      M = p_T(a1) - p_T(a2)             in [0, 1]

    teacher_logp_BTK: the teacher's log-probs (nats) of the candidates, last axis K >= 2, any
        leading axes. With "logprob" only differences count, so unnormalised logits do as well.
    Returns [B, T] without a gradient, float32 or wider. nan in, nan out. Of a candidate at -inf,
    "logprob" makes a margin of SOLE_CANDIDATE_MARGIN if it is the second best, and 0 if it is
    the best: a teacher that rules out all the candidates prefers none.
    Raises ValueError for a K below 2 or another kind.

    >>> teacher_margin(torch.tensor([[-3.0, -0.5, -1.5], [-2.0, -2.0, -9.0]]))
    tensor([1., 0.])
    """
    if kind not in ("logprob", "prob"):
        raise ValueError(f"kind must be 'logprob' or 'prob', got {kind!r}")
    if teacher_logp_BTK.ndim == 0 or teacher_logp_BTK.shape[-1] < 2:
        shape = tuple(teacher_logp_BTK.shape)
        raise ValueError(f"teacher_logp_BTK needs a last axis of K >= 2, got shape {shape}")
    logp_BTK = teacher_logp_BTK.detach()
    logp_BTK = logp_BTK.to(torch.promote_types(logp_BTK.dtype, torch.float32))
    # The two largest, candidate by candidate: several times as fast on a CPU as topk over so short
    # an axis.
    first, second = logp_BTK[..., 0], torch.full_like(logp_BTK[..., 0], -math.inf)
    for logp in logp_BTK[..., 1:].unbind(-1):
        second = torch.maximum(second, torch.minimum(first, logp))
        first = torch.maximum(first, logp)
    if kind == "prob":
        return first.exp() - second.exp()
    margin = first - second
    margin = torch.where(margin == math.inf, SOLE_CANDIDATE_MARGIN, margin)
    return torch.where(first == -math.inf, 0.0, margin)


def sentence_splitter(kind: str = "auto", *, download: bool = False):
    """The sentence splitter, and the name of what it is.

    kind: "pretrained" for NLTK's English Punkt (its data is the NLTK package punkt_tab),
        "untrained" for Punkt with ABBREVIATIONS only, "auto" for the first that is there.
    download: try to fetch missing data, quietly, for at most DOWNLOAD_SECONDS.
    Returns (splitter, name): an object with `span_tokenize(text)`, which yields (start, end),
    and "nltk-punkt-english" or "untrained-punkt".
    Raises LookupError for "pretrained" without its data, ValueError for another kind.

    >>> splitter, name = sentence_splitter("untrained")
    >>> name, list(splitter.span_tokenize("By Eq. 3, i.e. this, x = 3.14. Done."))
    ('untrained-punkt', [(0, 30), (31, 36)])
    """
    if kind not in ("auto", "pretrained", "untrained"):
        raise ValueError(f"kind must be 'auto', 'pretrained' or 'untrained', got {kind!r}")
    if kind != "untrained":
        splitter = _pretrained_punkt()
        if splitter is None and download:
            _download_punkt()
            splitter = _pretrained_punkt()
        if splitter is not None:
            return _remembering(splitter), "nltk-punkt-english"
        if kind == "pretrained":
            raise LookupError(
                "the pretrained Punkt needs the NLTK data package 'punkt_tab': run "
                "`python -m nltk.downloader punkt_tab`, or ask for kind='untrained'"
            )
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return _remembering(PunktSentenceTokenizer(parameters)), "untrained-punkt"


class KnownTexts:
    """A tokenizer's `decode` that remembers the texts of the shortest sequences.

    Most of what aligning tokens with characters asks of a tokenizer is the text of a single token,
    alone or behind another one, and the next response asks for the same ones again. Whoever has
    many responses keeps one of these and passes it to `token_segments` or `token_spans` in the
    place of the tokenizer; the results are the same. It forgets everything when it has LIMIT texts.

    >>> class Words:
    ...     def decode(self, ids, **options):
    ...         print("decode", ids)
    ...         return "".join(["It", " is"][i] for i in ids)
    >>> texts = KnownTexts(Words())
    >>> texts([0, 1]), texts([0, 1])
    decode [0, 1]
    ('It is', 'It is')
    """

    LONGEST, LIMIT = 4, 2**18  # tokens; texts: some 50 MB

    def __init__(self, tokenizer):
        self.decode = functools.partial(
            tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self.known = {}

    def __call__(self, ids: list[int]) -> str:
        """The text of `ids` without special tokens."""
        if len(ids) > self.LONGEST:
            return self.decode(ids)
        key = tuple(ids)
        if key not in self.known:
            if len(self.known) >= self.LIMIT:
                self.known.clear()
            self.known[key] = self.decode(ids)
        return self.known[key]


def token_segments(tokenizer, ids_T, splitter=None) -> torch.Tensor:
    """The sentence of every response token.

    tokenizer: has Hugging Face's `decode(ids, skip_special_tokens=, ...)`; or `KnownTexts` of one.
    ids_T: the sampled ids of one response, EOS included; list, array or tensor.
    splitter: an object with `span_tokenize(text)`, or a function text -> [(start, end), ...] in
        order; None for `sentence_splitter("auto")`, loaded once per process.
    Returns int64 [T] on the CPU: 0-based, non-decreasing, every number up to the last one used.
    Raises ValueError for ids_T that is not 1-D, or holds what cannot be an id.

    >>> class Words:
    ...     vocabulary = ["It", " is", " 3.14", ".", " So", " what", "?", ""]  # 7: EOS
    ...     def decode(self, ids, **options):
    ...         return "".join(self.vocabulary[i] for i in ids)
    >>> token_segments(Words(), [0, 1, 2, 3, 4, 5, 6, 7], sentence_splitter("untrained")[0])
    tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    text, spans_T2 = token_spans(tokenizer, ids_T)
    if splitter is None:
        splitter = _default_splitter()
    spans = getattr(splitter, "span_tokenize", splitter)(text)
    # Sentence i owns the characters from its start to the start of sentence i + 1.
    later_starts = torch.tensor([start for start, _ in spans][1:], dtype=torch.int64)
    sentence_T = torch.bucketize(_places(text, spans_T2), later_starts, right=True)
    return torch.unique_consecutive(sentence_T, return_inverse=True)[1]


def _places(text: str, spans_T2: torch.Tensor) -> torch.Tensor:
    """Where every token stands, int64 [T]: its first non-blank character; if it has none, its first
    character; if it has no character at all, where the token before it stands."""
    # native order behind a byte-order mark; the full stop is there to be found after the last token
    codes = bytearray((text + ".").encode("utf-32", "surrogatepass"))
    code_C = torch.frombuffer(codes, dtype=torch.int32)[1:]
    blank_C = BLANK[code_C.clamp(max=len(BLANK) - 1)]
    place_C = torch.arange(len(code_C)).masked_fill(blank_C, len(text))
    solid_C = place_C.flip(0).cummin(0).values.flip(0)  # the first non-blank one from here on
    start_T, end_T = spans_T2.unbind(1)
    solid_T = solid_C[start_T]
    place_T = torch.where(solid_T < end_T, solid_T, start_T)
    # Places grow with the text, so the largest so far is that of the last token with characters.
    return place_T.masked_fill(start_T == end_T, 0).cummax(0).values


def token_spans(tokenizer, ids_T) -> tuple[str, torch.Tensor]:
    """The decoded response, and the characters that every token stands for.

    Returns (text, spans_T2): text without special tokens, and int64 [T, 2] on the CPU with the
    start and end of every token in it. The spans tile the text: the first starts at 0, each
    starts where the one before ends, the last ends with the text. A character made of several
    tokens is the span of the first of them; the others, like special tokens, have no width.
    Arguments and errors as in `token_segments`.

    By definition token t ends at end_t = min over s >= t of len(decode(ids[:s+1])); the minimum
    is for decoders that show an unfinished character as several U+FFFD. Decoding every prefix
    costs O(T^2). Instead the text is put together from the texts of the distinct tokens, and
    checked; where that fails it is decoded in blocks. Either way O(T), and exact but for two
    kinds of long garbage: broken bytes under a byte-fallback decoder may share out their U+FFFD
    differently, and so may dozens of tokens in a row that all end inside a character.

    >>> class Bytes:
    ...     def decode(self, ids, **options):
    ...         return bytes(ids).decode("utf-8", errors="replace")
    >>> text, spans_T2 = token_spans(Bytes(), list("a é".encode()))
    >>> text, spans_T2.tolist()
    ('a é', [[0, 1], [1, 2], [2, 3], [3, 3]])
    """
    ids_T = torch.as_tensor(ids_T)
    if ids_T.ndim != 1 or (ids_T.numel() and ids_T.is_floating_point()):
        raise ValueError(f"ids_T must be 1-D integers, got {ids_T}")
    if ids_T.numel() == 0:
        return "", torch.zeros(0, 2, dtype=torch.int64)
    ids = ids_T.tolist()
    if not 0 <= min(ids) <= max(ids) < 2**31:  # tokenizers count in 32 bits
        raise ValueError(f"ids_T must hold token ids, got {min(ids)}..{max(ids)}")
    decode = tokenizer if isinstance(tokenizer, KnownTexts) else KnownTexts(tokenizer)
    text = decode(ids)
    anchor = _anchor(decode, ids)
    lengths = _lengths_by_piece(decode, ids, anchor, text)
    if lengths is None:  # some token's text depends on its neighbours
        lengths = _lengths_by_block(decode, ids, anchor, first=True)
    lengths[-1] = len(text)
    # From the right: no token ends after a later one, nor after the text.
    ends_T = torch.tensor(lengths, dtype=torch.int64).flip(0).cummin(0).values.flip(0)
    starts_T = torch.cat([ends_T.new_zeros(1), ends_T[:-1]])
    return text, torch.stack([starts_T, ends_T], dim=1)


def segment_scores(margin_T, segment_T, *, include_T=None) -> torch.Tensor:
    """S_i = log(1 + mean of M_t over segment i): one score per sentence, whatever its length.

    margin_T: margins of the response tokens, >= 0, from `teacher_margin`.
    segment_T: segment of the same tokens, as `token_segments` gives it.
    include_T: optional bool; average over these tokens only (such as those where the student's
        entropy is above 0.02 nats: its certain tokens are boilerplate). The others may hold
        anything. A segment without one scores nan, which `release_rule.release_point` skips.
    Returns float64 [N] on the CPU, nats. Raises ValueError for lengths that differ, segments
    that do not count 0, 0, .., 1, .., and a margin that is negative or nan.

    >>> segment_scores([3.0, 1.0, 0.0], [0, 0, 1])  # log(1 + 2), log(1 + 0)
    tensor([1.0986, 0.0000], dtype=torch.float64)
    """
    margin_T = torch.as_tensor(margin_T, dtype=torch.float64, device="cpu").detach()
    segment_T = torch.as_tensor(segment_T, dtype=torch.int64, device="cpu")
    if include_T is None:
        include_T = torch.ones_like(segment_T, dtype=torch.bool)
    include_T = torch.as_tensor(include_T, dtype=torch.bool, device="cpu")
    _check_segments(segment_T, margin_T=margin_T, include_T=include_T)
    if margin_T.numel() == 0:
        return torch.zeros(0, dtype=torch.float64)
    n, counted_T = int(segment_T[-1]) + 1, segment_T
    if not bool(include_T.all()):
        margin_T, counted_T = margin_T[include_T], segment_T[include_T]
    if not bool((margin_T >= 0).all()):
        raise ValueError(f"margin_T must be >= 0, got a minimum of {margin_T.min().item()}")

    total_N = torch.bincount(counted_T, weights=margin_T, minlength=n)
    count_N = torch.bincount(counted_T, minlength=n)
    return torch.log1p(total_N / count_N)  # 0 / 0 = nan: nothing counted


def segment_spread(value_T, segment_T) -> torch.Tensor:
    """log(1 + standard deviation of the values in a segment): another signal for the same rule.

    The release paper's ablation puts the sampled advantage A_t = log p_T(y_t) - log p_S(y_t), in
    nats, in the place of the margin. The deviation is that of the population, so that a segment of
    a single token has one: 0.

    value_T: finite floats of either sign. segment_T: as in `segment_scores`.
    Returns float64 [N] on the CPU. Raises ValueError for lengths that differ, segments that do not
    count 0, 0, .., 1, .., and a value that is not finite.

    >>> segment_spread([1.0, 3.0, 5.0], [0, 0, 1])  # log(1 + 1), log(1 + 0)
    tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    value_T = torch.as_tensor(value_T, dtype=torch.float64, device="cpu").detach()
    segment_T = torch.as_tensor(segment_T, dtype=torch.int64, device="cpu")
    _check_segments(segment_T, value_T=value_T)
    if value_T.numel() == 0:
        return torch.zeros(0, dtype=torch.float64)
    if not bool(torch.isfinite(value_T).all()):
        raise ValueError("value_T must be finite")
    count_N = torch.bincount(segment_T)
    mean_N = torch.bincount(segment_T, weights=value_T) / count_N
    square_T = (value_T - mean_N[segment_T]) ** 2
    return torch.log1p((torch.bincount(segment_T, weights=square_T) / count_N).sqrt())


def _check_segments(segment_T, **series) -> None:
    """ValueError unless all are 1-D and of one length, and segments count 0, 0, .., 1, .."""
    if segment_T.ndim != 1 or any(x.shape != segment_T.shape for x in series.values()):
        shapes = [tuple(x.shape) for x in (*series.values(), segment_T)]
        names = ", ".join([*series, "segment_T"])
        raise ValueError(f"{names} must be 1-D and of one length, got shapes {shapes}")
    steps_T = segment_T.diff()
    if segment_T.numel() and (segment_T[0] != 0 or bool(((steps_T != 0) & (steps_T != 1)).any())):
        raise ValueError(f"segment_T must start at 0 and grow by 0 or 1, got {segment_T}")


@functools.cache
def _default_splitter():
    return sentence_splitter("auto")[0]


def _remembering(splitter):
    """Punkt, which decides on every full stop from the few words around it, made to remember what
    it decided: solutions of one kind of problem put the same words there again and again."""
    if isinstance(splitter, PunktSentenceTokenizer):
        decide = functools.lru_cache(2**14)(splitter.text_contains_sentbreak)
        splitter.text_contains_sentbreak = decide
    return splitter


def _pretrained_punkt():
    try:
        return PunktTokenizer("english")
    except LookupError:  # its data is not installed
        return None


def _download_punkt() -> None:
    """Fetch punkt_tab, or give up in silence. NLTK reports errors even when asked to be quiet,
    and may wait minutes for a server: hence the buffer, and the thread left behind."""

    def fetch():
        try:
            nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO())
        except Exception:  # no network, no disk: the caller finds no data, and says so
            pass

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)


def _anchor(decode, ids: list[int]) -> list[int]:
    """A token to decode others behind: many decoders drop a leading space from the first one."""
    for token in dict.fromkeys(ids):
        text = decode([token])
        if text.strip() and REPLACEMENT not in text:
            return [token]
    return []


def _after(decode, anchor: list[int], ids: list[int]) -> str:
    """What `ids` add to the text of the anchor."""
    return decode(anchor + ids)[len(decode(anchor)) if anchor else 0 :]


def _lengths_by_piece(decode, ids, anchor, text) -> list[int] | None:
    """Length of the text up to every token, from the text of every distinct token and of every
    run of parts of characters (tokens with U+FFFD); None if these do not add up to `text`."""
    piece = {token: _after(decode, anchor, [token]) for token in dict.fromkeys(ids)}
    parts = [piece[token] for token in ids]
    first = next((t for t, part in enumerate(parts) if part), None)
    if first is not None:  # nothing stands before it
        parts[first] = decode(ids[first : first + 1])
    widths = list(map(len, parts))
    broken = {token for token, part in piece.items() if REPLACEMENT in part}
    if broken:
        shown = (t for t, token in enumerate(ids) if piece[token])  # the others have no text
        for is_broken, run in itertools.groupby(shown, lambda t: ids[t] in broken):
            if is_broken:
                run = list(run)
                tokens = [ids[t] for t in run]
                whole = _after(decode, [] if run[0] == first else anchor, tokens)
                inner = _lengths_by_block(decode, tokens, anchor, run[0] == first)
                inner[-1] = len(whole)
                for t, length, before in zip(run, inner, [0, *inner], strict=False):
                    widths[t], parts[t] = length - before, ""
                parts[run[0]] = whole
    if "".join(parts) != text:
        return None
    return list(itertools.accumulate(widths))


def _lengths_by_block(decode, ids, anchor, first: bool) -> list[int]:
    """Length of the text of ids[:t+1] for every t, decoding at most BLOCK tokens at a time.

    Up to BLOCK tokens, that is decoding every prefix. Beyond, a block ends where its two sides
    give the same text apart as together, its last quarter being there to show a character that
    lies across. Should there be no such place, it ends anyway and lengths may be off by a few.
    """
    lengths, start = [], 0
    while start < len(ids):
        block = ids[start : start + BLOCK]
        prefixes = [
            _after(decode, [] if first and start == 0 else anchor, block[:k])
            for k in range(1, len(block) + 1)
        ]
        cut = len(block)
        if start + BLOCK < len(ids):
            cut = 3 * BLOCK // 4
            for k in range(cut, BLOCK // 4, -1):
                if prefixes[k - 1] + _after(decode, anchor, block[k:]) == prefixes[-1]:
                    cut = k
                    break
        done = lengths[-1] if lengths else 0
        lengths += [done + len(prefix) for prefix in prefixes[:cut]]
        start += cut
    return lengths
