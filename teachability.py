"""How much does the teacher have to teach here? Teacher margins, averaged over sentences.

Paper: "Prefix Teach, Suffix Fade", arXiv 2605.13643, the sections on the teacher margin and on
segment scores. Among the student's own K likeliest next tokens, a teacher that still has something
to teach prefers one clearly; once it is lost on the student's prefix, it does not. Its margins,
averaged sentence by sentence, are the series in which `release_rule` looks for a drop.

    paper           here                  meaning
    C_t             (the K axis)          the student's top-K next tokens at t; the paper's K = 4
    a1, a2          first, second         the teacher's best and second best inside C_t
    M_t             margin_BT             log p_T(a1) - log p_T(a2) >= 0, nats
    segment i       segment_T == i        a sentence of the decoded response, by a splitter
    S_i             scores_N              log(1 + mean of M_t over segment i), nats

The response is never tokenized again: a student may sample token sequences that the tokenizer
would not produce, so characters are attributed to the tokens that were really sampled.

Where the paper is silent: a token belongs to the sentence of its first non-blank character (" The"
to the one that it opens), a blank token to that of its first character, a token without characters
(EOS, the rest of a character) to the token before's. A sentence without a token is no segment.
"""

import bisect
import functools
import math
import re
import types

import torch
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTokenizer

# nats, if all candidates but one have probability 0: float32's largest; inf would ruin a series
SOLE_CANDIDATE_MARGIN = -math.log(torch.finfo(torch.float32).tiny)  # 87.3
# What does not end a sentence for the untrained splitter. "no." and "sec." often do.
ABBREVIATIONS = """e.g i.e cf viz eq eqs fig figs ref refs thm vs approx resp w.r.t w.l.o.g s.t al
    dr mr mrs ms prof st"""
# In any language: nothing ends in what is FENCED (equations, code, tables, an item's number, **),
# a block ends behind a CUT: a line break, but not in wrapped prose (a long line, then a lower-case
# word); an end mark; in Thai and Lao, which have none, a space: it stands between clauses.
END, QUOTE = "。｡！？।॥؟۔։།።፧។៕။", r"\"'”’»)\]}」』】〕〉》）］｝"
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # kana, Han, Hangul
THAI = "\u0e01-\u0e2e\u0e30-\u0e45\u0e47-\u0e4e\u0e81-\u0ec4\u0ec8-\u0ece"  # no ๆ, ฯ
FENCED = re.compile(r"""(?mx)  # no possessive group: Python below 3.11.5 matches it wrongly
    (?s: \$\$ (?: (?!\$\$|\n[ \t]*+\n). )+ \$\$ | \\\[ (?: (?!\\[\[\]]|\n[ \t]*+\n). )+ \\\]
      | \\begin\{(\w++\*?)\} (?: (?!\\begin|\\end|\n[ \t]*+\n). )+ \\end\{\1\} )
  | ^[ \t]*+ ```++ [^`\n]*+$ (?: \n(?![ \t]*+```).* )* (?: \n.* )?  # closed, or to the end
  | ^[ \t]*+ \|.* (?: \n[ \t]*+\|.* )+
  | ^[ \t>*_\#-]*+ \d{1,3} [.．](?!\d) | (?<=[.!?])[*_]++(?!\w)""")
CUT = re.compile(rf"""(?x) (?:
    \n (?=[^\w\n]*+\w) (?! (?<=[^\n]{{39}}[^X\n]\n) [ \t]*+[a-z][a-z] )
  | (?: (?:[{END}]|．(?!\d)) [{END}．.!?‥…]*+ [{QUOTE}]*+ (?: [*_]++(?!\w) )? )+ [，、；：،,;:]*+
  | (?<![‥…]) (?: [‥…]++ | (?<=[{CJK}$)}}）])[.!?]++ ) [{QUOTE}]*+ (?=[{CJK}])
  | (?<=[{THAI}]) [ \t]++ (?=[{THAI}]) | (?<=[.!?])X++(?!\w) ) \s*+""")
BLOCK = 32  # tokens, of which every prefix is decoded where their texts do not add up
REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no complete character
_default_splitter = functools.cache(lambda: sentence_splitter()[0])


def teacher_margin(teacher_logp_BTK: torch.Tensor, *, kind: str = "logprob") -> torch.Tensor:
    """M_t >= 0: how clearly the teacher prefers one of the student's K candidates.

    teacher_logp_BTK: its log-probs of the candidates, nats, any leading axes. For "logprob" only
        their differences count, so logits do as well.
    kind: "logprob" (the paper's M_t, nats), or "prob", p_T(a1) - p_T(a2).
    Returns [B, T] without a gradient, float32 or wider; nan for nan. With "logprob", for only one
    candidate above -inf SOLE_CANDIDATE_MARGIN, for none 0. ValueError: K < 2, or another kind.

    >>> teacher_margin(torch.tensor([[-3.0, -0.5, -1.5], [-2.0, -2.0, -9.0]]))
    tensor([1., 0.])
    """
    if kind not in ("logprob", "prob"):
        raise ValueError(f"kind must be 'logprob' or 'prob', got {kind!r}")
    if teacher_logp_BTK.shape[-1] < 2:
        raise ValueError(f"teacher_logp_BTK needs K >= 2, got {tuple(teacher_logp_BTK.shape)}")
    logp_BTK = teacher_logp_BTK.detach()
    logp_BTK = logp_BTK.to(torch.promote_types(logp_BTK.dtype, torch.float32))
    # topk(2), candidate by candidate: several times as fast on a CPU over so short an axis
    first, second = logp_BTK[..., 0], torch.full_like(logp_BTK[..., 0], -math.inf)
    for logp in logp_BTK[..., 1:].unbind(-1):
        second = torch.maximum(second, torch.minimum(first, logp))
        first = torch.maximum(first, logp)
    if kind == "prob":
        return first.exp() - second.exp()
    margin = torch.where(first - second == math.inf, SOLE_CANDIDATE_MARGIN, first - second)
    return torch.where(first == -math.inf, 0.0, margin)


# ------------------------------------------------------------------------------------ sentences
def sentence_splitter(kind: str = "blocks"):
    """The sentence splitter, and the name of what it is.

    kind: "pretrained" for NLTK's English Punkt (the paper's; its data is the package punkt_tab),
        "untrained" for Punkt with ABBREVIATIONS only, "auto" for the first that is there, "blocks"
        for blocks in any language, each of which "auto" splits.
    Returns (splitter, name): an object with `span_tokenize(text)`, which yields (start, end), and
    "nltk-punkt-english" or "untrained-punkt", for "blocks" behind "blocks+".
    Raises LookupError for "pretrained" without its data, ValueError for another kind.

    >>> splitter, name = sentence_splitter("untrained")
    >>> name, list(splitter.span_tokenize("By Eq. 3, i.e. this, x = 3.14. Done."))
    ('untrained-punkt', [(0, 30), (31, 36)])
    """
    if kind not in ("blocks", "auto", "pretrained", "untrained"):
        raise ValueError(f"kind must be blocks, auto, pretrained or untrained, got {kind!r}")
    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS.split())
    splitter, name = PunktSentenceTokenizer(parameters), "untrained-punkt"
    if kind != "untrained":
        try:
            splitter, name = PunktTokenizer("english"), "nltk-punkt-english"
        except LookupError:
            if kind == "pretrained":
                raise LookupError("no data; run python -m nltk.downloader punkt_tab") from None
    # Punkt decides on a full stop by the few words around it, and these come again and again
    splitter.text_contains_sentbreak = functools.lru_cache(2**14)(splitter.text_contains_sentbreak)

    def by_block(text):
        text, start = text.replace("\r\n", " \n").replace("\r", "\n"), 0
        text = FENCED.sub(lambda found: "X" * len(found[0]), text)  # to Punkt, a word
        for end in [*(cut.end() for cut in CUT.finditer(text)), len(text)]:
            yield from ((start + a, start + b) for a, b in splitter.span_tokenize(text[start:end]))
            start = end

    blocks = types.SimpleNamespace(span_tokenize=by_block), f"blocks+{name}"
    return blocks if kind == "blocks" else (splitter, name)


def token_segments(tokenizer, ids_T, splitter=None) -> torch.Tensor:
    """The sentence of every response token.

    tokenizer: has Hugging Face's `decode(ids, skip_special_tokens=, ...)`.
    ids_T: the sampled ids of one response, EOS included; list, array or tensor.
    splitter: an object with `span_tokenize(text)`, or a function text -> [(start, end), ...] in
        order; None for `sentence_splitter()`, loaded once per process.
    Returns int64 [T] on the CPU: from 0 on, non-decreasing, without gaps.

    >>> class Words:
    ...     vocabulary = ["It", " is", " 3.14", ".", " So", " what", "?", ""]  # 7: EOS
    ...     def decode(self, ids, **options):
    ...         return "".join(self.vocabulary[i] for i in ids)
    >>> token_segments(Words(), [0, 1, 2, 3, 4, 5, 6, 7], sentence_splitter("untrained")[0])
    tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    text, spans_T2 = token_spans(tokenizer, ids_T)
    splitter = _default_splitter() if splitter is None else splitter
    sentences = list(getattr(splitter, "span_tokenize", splitter)(text))
    start_T, end_T = spans_T2.T.contiguous()
    starts, ends, begins = start_T.tolist(), end_T.tolist(), []
    for begin, _ in sentences[1:]:  # a token across it opens the sentence, if only blanks precede
        t = min(bisect.bisect_right(ends, begin), len(ends) - 1)
        before, whole = text[starts[t] : begin], text[starts[t] : ends[t]]
        begins.append(begin - len(before) if whole.strip() and not before.strip() else begin)
    sentence_T = torch.bucketize(start_T, torch.tensor(begins, dtype=torch.int64), right=True)
    sentence_T = sentence_T.masked_fill(start_T == end_T, 0).cummax(0).values
    return torch.unique_consecutive(sentence_T, return_inverse=True)[1]


# ------------------------------------------------------------------------- characters of tokens
def token_spans(tokenizer, ids_T) -> tuple[str, torch.Tensor]:
    """The decoded response, and the characters that every token stands for.

    Arguments as in `token_segments`. What a tokenizer makes of single tokens is remembered.
    Returns (text, spans_T2): text without special tokens, and int64 [T, 2] on the CPU with start
    and end of every token in it. The spans tile the text. A character of several tokens is the span
    of the first of them; the others, like special tokens, have no width.

    By definition token t ends at min over s >= t of len(decode(ids[:s+1])): O(T^2). This is O(T);
    of garbage O(T log T), and not always exact: broken bytes under byte fallback, where one makes
    all around it unreadable, and dozens of tokens in a row that all end inside a character.

    >>> class Bytes:
    ...     def decode(self, ids, **options):
    ...         return bytes(ids).decode("utf-8", errors="replace")
    >>> text, spans_T2 = token_spans(Bytes(), list("a é".encode()))
    >>> text, spans_T2.tolist()
    ('a é', [[0, 1], [1, 2], [2, 3], [3, 3]])
    """
    ids = tuple(torch.as_tensor(ids_T).tolist())
    if not ids:
        return "", torch.zeros(0, 2, dtype=torch.int64)
    read = functools.partial(_read, tokenizer, ())
    text = read(ids)
    # many decoders drop a leading space from the first token: decode others behind an anchor
    whole = ((t,) for t in ids if REPLACEMENT not in (own := read((t,))) and own.strip())
    after = functools.partial(_read, tokenizer, next(whole, ()))
    ends = [*_ends(read, after, ids, text)[:-1], len(text)]
    end_T = torch.tensor(ends).flip(0).cummin(0).values.flip(0)  # no token ends after a later one
    return text, torch.stack([torch.cat([end_T.new_zeros(1), end_T[:-1]]), end_T], dim=1)


def _read(tokenizer, anchor, ids) -> str:
    """What the tokens `ids` add to the text of those of `anchor`; special tokens add nothing."""
    return (_recall if len(ids) <= 4 else _recall.__wrapped__)(tokenizer, anchor, ids)


@functools.lru_cache(2**17)  # some 50 MB: responses are made of the same tokens again and again
def _recall(tokenizer, anchor, ids) -> str:
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode([*anchor, *ids], **how)
    return text[len(_read(tokenizer, (), anchor)) :] if anchor else text


def _ends(read, after, ids, text) -> list[int]:
    """Where every token ends in the text of `ids`: character by character, if these add up to it.
    If not, in two parts that do, or (only of garbage) nearly do; in the end, by every prefix."""
    piece, ends, characters = {token: after((token,)) for token in dict.fromkeys(ids)}, [], []
    while len(ends) < len(ids):
        t, begin, done = len(ends), after if ends else read, ends[-1] if ends else 0
        prefixes = [piece[ids[t]] if ends else read(ids[:1])]
        while REPLACEMENT in prefixes[-1] and len(prefixes) < min(4, len(ids) - t):
            prefixes.append(begin(ids[t : t + len(prefixes) + 1]))  # the next part of a character
        ends += [done + len(prefix) for prefix in prefixes]
        characters.append(prefixes[-1])
    if "".join(characters) == text:
        return ends
    if len(ids) <= BLOCK:
        return [len(read(ids[:k])) for k in range(1, len(ids) + 1)]
    for cut in range(len(ids) // 2, len(ids) // 2 + BLOCK // 2):
        left, right = read(ids[:cut]), after(ids[cut:])
        if left + right == text:
            break
    begin = max(0, len(text) - len(right))
    ends = [begin + end for end in _ends(after, after, ids[cut:], right)]
    return _ends(read, after, ids[:cut], left) + ends


# --------------------------------------------------------------------------------------- scores
def segment_scores(margin_T, segment_T, *, include_T=None) -> torch.Tensor:
    """S_i = log(1 + mean of M_t over segment i): one score per sentence, whatever its length.

    margin_T: margins of the response tokens, >= 0. segment_T: of the same tokens, numbers from 0.
    include_T: optional bool; average over these tokens only. The others may hold anything. A
        segment without one scores nan, which `release_rule.release_point` passes over.
    Returns float64 [N] on the CPU, nats. Raises ValueError for a margin that is negative or nan.

    >>> segment_scores([3.0, 1.0, 0.0], [0, 0, 1])  # log(1 + 2), log(1 + 0)
    tensor([1.0986, 0.0000], dtype=torch.float64)
    """
    margin_T = torch.as_tensor(margin_T, dtype=torch.float64, device="cpu").detach()
    segment_T = torch.as_tensor(segment_T, dtype=torch.int64, device="cpu")
    include_T = torch.as_tensor(segment_T > -1 if include_T is None else include_T).bool().cpu()
    margin_T = torch.where(include_T, margin_T, 0.0)
    if not (margin_T >= 0).all():
        raise ValueError(f"margin_T must be >= 0, got a minimum of {margin_T.min()}")
    count_N = torch.bincount(segment_T, weights=include_T).double()
    return torch.log1p(torch.bincount(segment_T, weights=margin_T) / count_N)  # 0 / 0 = nan


def segment_spread(value_T, segment_T) -> torch.Tensor:
    """log(1 + standard deviation in every segment): the ablation's signal for the same rule.

    value_T: of either sign, in the paper log p_T(y_t) - log p_S(y_t), nats. The deviation is that
    of the population: 0 for one token. Returns float64 [N] on the CPU; ValueError: not finite.

    >>> segment_spread([1.0, 3.0, 5.0], [0, 0, 1])  # log(1 + 1), log(1 + 0)
    tensor([0.6931, 0.0000], dtype=torch.float64)
    """
    value_T = torch.as_tensor(value_T, dtype=torch.float64, device="cpu").detach()
    segment_T = torch.as_tensor(segment_T, dtype=torch.int64, device="cpu")
    if not value_T.isfinite().all():
        raise ValueError(f"value_T must be finite, got {value_T[~value_T.isfinite()][0]}")
    count_N = torch.bincount(segment_T).double()
    mean_N = torch.bincount(segment_T, weights=value_T) / count_N
    square_T = (value_T - mean_N[segment_T]) ** 2
    return torch.log1p((torch.bincount(segment_T, weights=square_T) / count_N).sqrt())
