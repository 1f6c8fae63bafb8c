"""Properties of the public names of teachability."""

import functools
import itertools
import math
import re

import pytest
import torch
from hypothesis import strategies as st
from inputs import byte_tokenizer
from properties import (
    DTYPES,
    prop,
    refused_or,
    seeded,
    seeds,
    splitter,
    spoilt,
    spoilt_tensor,
    texts,
)
from test_teachability import TOKENIZERS, naive_segments, naive_spans, sentence_piece

import teachability


@prop("teachability.teacher_margin", examples=150, seed=seeds, shape=st.lists(st.integers(0, 4),
      max_size=3), K=st.integers(0, 6), kind=st.sampled_from(["logprob", "prob", "odds"]),
      dtype=st.sampled_from(DTYPES), constant=st.sampled_from([0.0, -5.0, 64.0]))
def test_margin_is_a_difference_of_the_two_best(seed, shape, K, kind, dtype, constant):
    logp = torch.randn(*shape, K, generator=seeded(seed)).log_softmax(-1)
    logp = (logp * 0 if dtype == torch.uint8 else logp).to(dtype)  # it has no negative numbers
    given = {"teacher_logp_BTK": logp, "kind": kind}
    margin = refused_or(teachability.teacher_margin, given, any_error=True)
    assert (margin is None) == (K < 2 or kind == "odds")
    if margin is None:
        return
    best = logp.double().sort(-1, descending=True).values
    best = best.exp() if kind == "prob" else best
    assert margin.shape == logp.shape[:-1] and bool((margin >= 0).all())
    torch.testing.assert_close(margin.double(), best[..., 0] - best[..., 1], rtol=1e-5, atol=1e-5)
    if kind == "logprob":
        moved = teachability.teacher_margin(logp.double() + constant)
        torch.testing.assert_close(moved, best[..., 0] - best[..., 1], rtol=0, atol=1e-9)



@prop("teachability.sentence_splitter", examples=150, text=texts,
      kind=st.sampled_from(["blocks", "blocks", "auto", "untrained", "nltk", "", None, 3]))
def test_sentences_cover_all_but_white_space(text, kind):
    """In order, apart, inside the text; what lies between them is blank."""
    if kind not in ("blocks", "auto", "untrained"):
        with pytest.raises(ValueError, match="kind must be"):
            teachability.sentence_splitter(kind)
        return
    end = 0
    spans = teachability.sentence_splitter(kind)[0].span_tokenize(text)
    for start, stop in [*spans, (len(text), len(text))]:
        assert end <= start <= stop and text[end:start].strip() == ""
        end = stop


@prop("teachability.token_spans", "teachability.token_segments", examples=150,
      make=st.sampled_from(TOKENIZERS), data=st.data())
def test_spans_and_segments_of_any_ids_equal_decoding_every_prefix(make, data):
    """Any ids, so half characters and special tokens anywhere; up to 30, where it is exact."""
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    text, spans_T2 = teachability.token_spans(tokenizer, ids)
    segment_T = teachability.token_segments(tokenizer, ids, splitter())
    whole, spans = naive_spans(tokenizer, ids) if ids else ("", [])
    assert text == whole and len(spans_T2) == len(segment_T) == len(ids)
    if make is not sentence_piece or "\ufffd" not in text:  # see the docstring
        assert spans_T2.tolist() == spans
        segments = naive_segments(tokenizer, ids, splitter())
        assert segment_T.tolist() == segments
    check_spans(text, spans_T2, segment_T)


def check_spans(text, spans_T2, segment_T):
    """Spans tile the text; segments begin at 0 and grow by 0 or 1."""
    places = [0, *spans_T2.flatten().tolist(), len(text)]
    assert places == sorted(places) and places[1::2] == places[::2][: len(places) // 2]
    steps = segment_T.diff(prepend=torch.tensor([0])).tolist()
    assert set(steps) <= {0, 1} and (not steps or steps[0] == 0)


@prop("teachability.token_spans", "teachability.token_segments", examples=150, text=texts,
      tail=st.lists(st.integers(0, 255), max_size=70))
def test_any_text_and_any_bytes_are_tiled(text, tail):
    """A token per byte; the tail of random bytes is rarely UTF-8."""
    tokenizer = byte_tokenizer()
    text = re.sub("[\ud800-\udfff]", "", text)
    ids = tokenizer(text)["input_ids"] + tail
    whole, spans_T2 = teachability.token_spans(tokenizer, ids)
    segment_T = teachability.token_segments(tokenizer, ids, splitter())
    assert whole.startswith(text) and len(spans_T2) == len(segment_T) == len(ids)
    check_spans(whole, spans_T2, segment_T)


@prop("teachability.token_spans", "teachability.token_segments", examples=100, data=st.data(),
      length=st.integers(0, 4))
def test_what_are_no_ids(data, length):
    tokenizer = byte_tokenizer()
    ids_T = spoilt_tensor(data.draw, torch.arange(60, 60 + length))
    spans = functools.partial(teachability.token_spans, tokenizer)
    segments = functools.partial(teachability.token_segments, tokenizer, splitter=splitter())
    out = refused_or(spans, {"ids_T": ids_T}, any_error=True)
    segment_T = refused_or(segments, {"ids_T": ids_T}, any_error=True)
    assert (out is None) == (segment_T is None)
    if out is not None:
        check_spans(*out, segment_T)


@st.composite
def segmented(draw):
    """Segments [0, 0, 1, ..] and as many margins."""
    steps = draw(st.lists(st.booleans(), max_size=12))
    segment = list(itertools.accumulate(map(int, steps)))
    segment = [s - segment[0] for s in segment]
    margin = draw(st.lists(st.floats(0, 1e6), min_size=len(steps), max_size=len(steps)))
    return torch.tensor(segment, dtype=torch.int64), torch.tensor(margin, dtype=torch.float64)


@prop("teachability.segment_scores", "teachability.segment_spread", examples=150, case=segmented(),
      data=st.data())
def test_scores_of_segments_equal_loops(case, data):
    segment_T, margin_T = case
    size = len(segment_T)
    include_T = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)),
                             dtype=torch.bool)  # fmt: skip
    score_N = teachability.segment_scores(margin_T, segment_T, include_T=include_T)
    spread_N = teachability.segment_spread(margin_T, segment_T)
    assert len(score_N) == len(spread_N) == len(set(segment_T.tolist()))
    for number, (score, spread) in enumerate(zip(score_N, spread_N, strict=True)):
        own = margin_T[segment_T == number].tolist()
        counted = margin_T[(segment_T == number) & include_T].tolist()
        mean = math.fsum(own) / len(own)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in own) / len(own))
        assert math.isclose(spread, math.log1p(deviation), rel_tol=1e-6, abs_tol=1e-6)
        if counted:
            right = math.log1p(math.fsum(counted) / len(counted))
            assert math.isclose(score, right, rel_tol=1e-9, abs_tol=1e-300)
        else:
            assert math.isnan(score)


@prop("teachability.segment_scores", "teachability.segment_spread", examples=200, case=segmented(),
      data=st.data(), spread=st.booleans())
def test_scores_of_bad_segments(case, data, spread):
    segment_T, series_T = case
    arguments = {"value_T" if spread else "margin_T": series_T, "segment_T": segment_T}
    function = teachability.segment_spread if spread else teachability.segment_scores
    if not spread:
        arguments["include_T"] = torch.ones(len(segment_T), dtype=torch.bool)
    name, bad = spoilt(data.draw, arguments)
    out_N = refused_or(function, bad, any_error=True)
    if out_N is not None:
        n = int(bad["segment_T"].max()) + 1 if bad["segment_T"].numel() else 0
        used = set(bad["segment_T"].flatten().tolist())
        assert out_N.shape == (n,) and out_N.dtype == torch.float64
        nan = {i for i, x in enumerate(out_N.tolist()) if math.isnan(x)}
        assert name == "include_T" or nan == set(range(n)) - used, "nan: no token of that number"
