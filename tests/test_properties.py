"""Properties of every public function: what mathematics says, and what bad input may do.

Bad input means a ValueError that names an argument, or a valid result: no other exception, no nan
that finite input does not explain, and arguments that stay as they were (`refused_or`).

A test below lists the public names of all library files and fails for one without a property test,
here (`prop`) or elsewhere (ELSEWHERE), and without a reason to have none (EXEMPT).

The random inputs are the same every time. PROPERTIES_TIMES=10 takes new ones,
ten times as many.
"""

import argparse
import ast
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_model, write_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_loading import TEMPLATE, byte_tokenizer
from test_loading import tiny_model as model_for
from test_teachability import TOKENIZERS, naive_segments, naive_spans, sentence_piece

import checkpoint
import controls
import curves
import diagnose
import evaluate
import flags
import grading
import lgr
import loading
import logprobs
import measuring
import metrics
import pictures
import preparing
import probing
import release_rule
import report
import rollout
import teachability
import toy
import train

ROOT = Path(train.__file__).parent
TIMES = int(os.environ.get("PROPERTIES_TIMES", 1))
INF, NAN = math.inf, math.nan

# Public names that other files test with random inputs: where, and by which test.
ELSEWHERE = {
    "release_rule.release_point": (
        "test_release_rule.py", "test_release_point_keeps_what_change_point_keeps"),
    "controls.apportion": (
        "test_controls.py",
        "test_apportion_meets_the_total_within_the_capacities_and_close_to_the_wishes"),
    "controls.spend": (
        "test_controls.py",
        "test_every_control_spends_the_whole_budget_however_rows_are_shared_out"),
    "grading.micro_batches": (
        "test_grading.py", "test_micro_batches_hold_every_row_once_and_keep_to_their_limits"),
    "lgr.lookahead_confidence": (
        "test_lgr.py", "test_any_ragged_batch_equals_a_forward_pass_per_candidate"),
    "lgr.group_reward": ("test_lgr.py", "test_any_group_equals_exact_arithmetic"),
    "evaluate.extract_answer": ("test_evaluate.py", "test_extract_answer_takes_any_text"),
    "evaluate.is_correct": (
        "test_evaluate.py", "test_is_correct_is_reflexive_and_never_raises"),
}  # fmt: skip

EXEMPT = {
    "records without behaviour": "release_rule.ChangePoint logprobs.TokenStats rollout.Rollout "
    "grading.Supervision grading.Lookahead toy.World toy.Stage preparing.Run flags.Method "
    "preparing.Position checkpoint.Checkpoint train.Resume probing.How measuring.Job",
    "commands, run with bad and good flags by the tests of their files": "evaluate.main "
    "evaluate.run toy.main toy.run toy.parse train.main train.train_and_save",
    "begin, resume and end the command; tests/test_resume.py kills and starves it": "train.guarded "
    "train.set_up train.load_and_begin train.begin_folder train.find_resume train.give_up "
    "train.end_when_told train.end_with_error",
    "train models for minutes, or evaluate them all": "toy.fit toy.spoil toy.build "
    "toy.build_world toy.train_models toy.table",
    "join a process group": "train.start_processes",
}

COVERED = {}  # public name -> tests of this file


def prop(*names, examples=50, **strategies):
    """A test with random inputs of these public names."""

    def register(test):
        for name in names:
            COVERED.setdefault(name, []).append(test.__name__)
        how = settings(
            max_examples=examples * TIMES, deadline=None, derandomize=TIMES == 1, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        return how(given(**strategies)(test))

    return register


def public_names():
    """ "file.name" of every function and class without a leading underscore."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    for path in sorted(ROOT.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                yield f"{path.stem}.{node.name}"


def test_every_public_name_has_a_property_test_or_a_reason():
    names, exempt = set(public_names()), " ".join(EXEMPT.values()).split()
    assert sorted(names - {*COVERED, *ELSEWHERE, *exempt}) == [], "without a property test"
    assert sorted({*COVERED, *ELSEWHERE, *exempt} - names) == [], "gone"
    assert not {*COVERED, *ELSEWHERE} & {*exempt}, "not exempt any more"
    assert len(exempt) < len(names) / 5
    for name, (file, test) in ELSEWHERE.items():
        tree = ast.parse((ROOT / "tests" / file).read_text())
        found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == test]
        assert found and "given(" in ast.unparse(found[0].decorator_list[-1]), name


# ------------------------------------------------------------------------------------- bad input
BAD_NUMBERS = [0, 1, 3, -1, -(2**40), 2.5, 1e-300, NAN, INF, -INF]
DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32,
          torch.float64, torch.bfloat16]  # fmt: skip


def spoilt_tensor(draw, x):
    """The tensor with another shape, type or entry."""
    axis = draw(st.integers(0, x.dim() - 1)) if x.dim() else None
    entries = [-1, 2**40] if x.dtype == torch.int64 else [NAN, INF, -INF]
    how = draw(st.sampled_from(["axis", "scalar", "less", "shorter", "empty", "longer", "type",
                                "entry"]))  # fmt: skip
    if how == "type":
        return x.detach().to(draw(st.sampled_from(DTYPES)))
    if how == "entry" and x.dtype != torch.bool and x.numel():
        x = x.detach().clone()
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(entries))
        return x
    if how == "scalar" or axis is None or not x.numel():
        return x.new_zeros(())
    if how == "axis":
        return x.unsqueeze(axis)
    if how == "less":
        return x.select(axis, 0)
    if how == "longer":
        return torch.cat([x, x.narrow(axis, 0, 1)], axis)
    return x.narrow(axis, 0, 0 if how == "empty" else x.shape[axis] - 1)


def spoilt(draw, arguments, but=()):
    """(name, arguments with that one spoilt); those in `but` are left alone."""
    name = draw(st.sampled_from(sorted(set(arguments) - set(but))))
    value = arguments[name]
    if isinstance(value, torch.Tensor):
        return name, arguments | {name: spoilt_tensor(draw, value)}
    return name, arguments | {name: draw(st.sampled_from(BAD_NUMBERS))}


def same(a, b):
    """Equality in which nan equals nan, and types and shapes count."""
    if not isinstance(a, torch.Tensor):
        return repr(a) == repr(b)
    a, b = a.detach(), b.detach()
    equal_BT = (a == b) | (a != a) & (b != b)
    return a.dtype == b.dtype and a.shape == b.shape and bool(equal_BT.all())


def refused_or(function, arguments):
    """The result, or None after a ValueError that names an argument; arguments stay as they are."""
    plain = {k: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v)
             for k, v in arguments.items()}  # fmt: skip
    try:
        out = function(**arguments)
    except ValueError as error:
        assert any(name in str(error) for name in arguments), f"names no argument: {error}"
        out = None
    assert all(same(plain[k], v) for k, v in arguments.items()), "an argument was changed"
    return out


def finite(*values):
    """Whether all tensors and numbers are."""
    return all(bool(torch.isfinite(torch.as_tensor(v)).all()) for v in values if v is not None)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


seeds = st.integers(0, 2**31)
small = st.integers(1, 4)
numbers = st.floats(-100, 100, width=32)


# ------------------------------------------------------------------------------------ release_rule
def rss(values):
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values)


@prop("release_rule.change_point", examples=150, m=st.integers(1, 3), n=st.integers(0, 14),
      data=st.data())
def test_change_point_is_the_best_of_all_drops(m, n, data):
    """BIC1 is the smallest over all drops, by a loop; `kept` reaches it; gain = BIC0 - BIC1."""
    scores = data.draw(st.lists(st.floats(0, 8, width=16), min_size=n, max_size=n))
    point = release_rule.change_point(scores, min_segments=m)
    drops = {
        tau: n * math.log((rss(scores[:tau]) + rss(scores[tau:]) + 1e-12) / n) + 3 * math.log(n)
        for tau in range(m, n - m + 1)
        if math.fsum(scores[:tau]) / tau > math.fsum(scores[tau:]) / (n - tau) + 1e-9
    }
    if drops:
        assert math.isclose(point.bic1, min(drops.values()), rel_tol=1e-6, abs_tol=1e-4)
    if point.kept is None:
        assert point.gain == 0 and not (drops and min(drops.values()) < point.bic0 - 1e-4)
    else:
        assert m <= point.kept <= n - m and point.gain == point.bic0 - point.bic1 > 0
        assert math.isclose(drops[point.kept], min(drops.values()), rel_tol=1e-6, abs_tol=1e-4)


@prop("release_rule.change_point", scale=st.integers(-6, 30), shift=st.integers(-64, 64),
      scores=st.lists(st.integers(-40, 40), max_size=16))
def test_change_point_does_not_see_shift_and_scale(scale, shift, scores):
    """Exact in binary, so the decision is the same; nor does a constant series ever drop."""
    point = release_rule.change_point(scores)
    moved = release_rule.change_point([(s + shift) * 2.0**scale for s in scores])
    assume(point.kept is None or point.bic1 > -20)  # a perfect fit is judged by eps, not by scale
    if scale >= 0 and (point.kept is None) == (moved.kept is None):
        assert point.kept == moved.kept
    assert release_rule.change_point([shift * 2.0**scale] * len(scores)).kept is None
    backwards = release_rule.change_point(sorted(scores))
    assert backwards.kept is None, "what only rises is never released"


any_float = st.floats() | st.sampled_from([NAN, INF, -INF, 1e308, -1e308, 5e-324, 0.0])


@prop("release_rule.change_point", "release_rule.release_point", examples=200,
      scores=st.lists(any_float, max_size=8) | any_float
      | st.lists(st.lists(any_float, max_size=2), max_size=3) | st.lists(st.text(), max_size=2)
      | st.just([10**400]), m=st.sampled_from([1, 2, 2, *BAD_NUMBERS, True, "2"]),
      eps=st.sampled_from([1e-12, 1e-12, 5e-324, 1e308, *BAD_NUMBERS, "1"]))
def test_change_point_takes_any_numbers(scores, m, eps):
    for find in (release_rule.change_point, release_rule.release_point):
        point = refused_or(find, {"scores_N": scores, "min_segments": m, "eps": eps})
        if point is not None:
            assert point.gain >= 0 and not math.isnan(point.bic1)
            assert point.kept is None or 1 <= point.kept < len(scores)
            assert not math.isnan(point.bic0) or point.kept is None


@prop("release_rule.keep_mask", examples=150, segment=st.lists(st.integers(-1, 5), max_size=12),
      kept=st.sampled_from([None, 0, 1, 2, 3, 9, -1, 1.0, NAN, True]), ordered=st.booleans(),
      convert=st.sampled_from([list, np.array, torch.tensor, lambda x: torch.tensor(x).half(),
                               lambda x: torch.tensor(x).bfloat16(),
                               lambda x: torch.tensor(x).double().requires_grad_(),
                               lambda x: [x, *x], lambda x: np.array(x)[None]]))
def test_keep_mask_is_a_prefix_of_the_response(segment, kept, ordered, convert):
    """True exactly below `kept`; for segments in order, a beginning of the response."""
    segment = sorted(segment) if ordered else segment
    keep = refused_or(release_rule.keep_mask, {"segment_T": convert(segment), "kept": kept})
    if keep is None:
        return
    assert kept is None or type(kept) is int and kept >= 0
    limit = INF if kept is None else kept
    assert keep.dtype == bool and keep.tolist() == [0 <= s < limit for s in segment]
    inside = [k for k, s in zip(keep.tolist(), segment, strict=True) if s >= 0]
    assert not ordered or inside == sorted(inside, reverse=True)


# ----------------------------------------------------------------------------------- teachability
@prop("teachability.teacher_margin", examples=150, seed=seeds, shape=st.lists(st.integers(0, 4),
      max_size=3), K=st.integers(0, 6), kind=st.sampled_from(["logprob", "prob", "odds"]),
      dtype=st.sampled_from(DTYPES), constant=st.sampled_from([0.0, -5.0, 64.0]))
def test_margin_is_a_difference_of_the_two_best(seed, shape, K, kind, dtype, constant):
    logp = torch.randn(*shape, K, generator=seeded(seed)).log_softmax(-1)
    logp = (logp * 0 if dtype == torch.uint8 else logp).to(dtype)  # it has no negative numbers
    margin = refused_or(teachability.teacher_margin, {"teacher_logp_BTK": logp, "kind": kind})
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


@functools.cache
def splitter():
    return teachability.sentence_splitter("untrained")[0]


texts = st.text(max_size=40) | st.lists(
    st.sampled_from(["So x is 3.", " ", "\n", "Dr. ", "e.g. ", "?", "!", "\0", "é", "e\u0301",
                     "👩‍👩‍👧", "שלום.", "\u3000", "\ud83d", "3.14", "...", "a"]),
    max_size=12,
).map("".join)  # fmt: skip


@prop("teachability.sentence_splitter", examples=150, text=texts,
      kind=st.sampled_from(["auto", "untrained", "untrained", "nltk", "", None, 3]))
def test_sentences_cover_all_but_white_space(text, kind):
    """In order, apart, inside the text; what lies between them is blank."""
    if kind not in ("auto", "untrained"):
        with pytest.raises(ValueError, match="kind must be"):
            teachability.sentence_splitter(kind)
        return
    end = 0
    for start, stop in [*splitter().span_tokenize(text), (len(text), len(text))]:
        assert end <= start <= stop and text[end:start].strip() == ""
        end = stop


@prop("teachability.token_spans", "teachability.token_segments", "teachability.KnownTexts",
      examples=150, make=st.sampled_from(TOKENIZERS), data=st.data())
def test_spans_and_segments_of_any_ids_equal_decoding_every_prefix(make, data):
    """Any ids, so half characters and special tokens anywhere; up to 30, where it is exact."""
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    known = teachability.KnownTexts(tokenizer)
    text, spans_T2 = teachability.token_spans(known, ids)
    segment_T = teachability.token_segments(tokenizer, ids, splitter())
    whole, spans = naive_spans(tokenizer, ids) if ids else ("", [])
    assert text == whole == known(ids) and len(spans_T2) == len(segment_T) == len(ids)
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


@prop("teachability.token_spans", "teachability.token_segments", "teachability.KnownTexts",
      examples=100, data=st.data(), length=st.integers(0, 4))
def test_what_are_no_ids(data, length):
    tokenizer = byte_tokenizer()
    ids_T = spoilt_tensor(data.draw, torch.arange(60, 60 + length))
    out = refused_or(functools.partial(teachability.token_spans, tokenizer), {"ids_T": ids_T})
    segment_T = refused_or(
        functools.partial(teachability.token_segments, tokenizer, splitter=splitter()),
        {"ids_T": ids_T})  # fmt: skip
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
    out_N = refused_or(function, bad)
    if out_N is not None:
        assert out_N.shape == (int(bad["segment_T"].max()) + 1 if bad["segment_T"].numel() else 0,)
        assert spread or name == "include_T" or not out_N.isnan().any()


# --------------------------------------------------------------------------------------- logprobs
@st.composite
def scored(draw, teacher=False):
    """Arguments of `token_logprobs`, or of `token_divergence`, small and consistent."""
    B, T, D, E = draw(small), draw(st.integers(1, 5)), draw(small), draw(small)
    V, more = draw(st.integers(2, 7)), draw(st.integers(0, 2))
    g, wide = seeded(draw(seeds)), draw(st.sampled_from([torch.float32, torch.float64]))
    x = {
        "hidden_BTD": torch.randn(B, T, D, generator=g, dtype=wide),
        "weight_VD": torch.randn(V, D, generator=g, dtype=wide) * 2,
    }
    if teacher:
        x["teacher_hidden_BTE"] = torch.randn(B, T, E, generator=g, dtype=wide)
        x["teacher_weight_VE"] = torch.randn(V + more, E, generator=g, dtype=wide) * 2
        x["beta"] = draw(st.floats(0.01, 0.99))
    cut = st.integers(1, V) if more and teacher else st.none() | st.integers(1, V)
    x["vocab_size"] = draw(cut)
    if not teacher:
        x["ids_BT"] = torch.randint(x["vocab_size"] or V, (B, T), generator=g)
    x["mask_BT"] = torch.rand(B, T, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    x["temperature"] = draw(st.sampled_from([1.0, 0.5, 3.0]))
    x["chunk"] = draw(st.none() | st.integers(1, 9))
    return x


def logp_by_hand(hidden_BTD, weight_VD, vocab_size, temperature=1.0):
    """Log-probs [B, T, V] of every token in float64; entry t from the hidden state at t - 1."""
    logits_BTV = hidden_BTD.double() @ weight_VD.double()[:vocab_size].T
    logp_BTV = (logits_BTV / temperature).log_softmax(-1)
    return torch.cat([logp_BTV[:, :1] * 0, logp_BTV[:, :-1]], dim=1)


def near(a, b, wide):
    tolerance = 1e-10 if wide == torch.float64 else 2e-5
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def gradients(loss, *of):
    """Gradients of a scalar, 0 for what it does not depend on."""
    found = torch.autograd.grad(loss, of, allow_unused=True) if loss.requires_grad else [None] * 2
    return [torch.zeros_like(x) if g is None else g for x, g in zip(of, found, strict=True)]


@prop("logprobs.token_logprobs", "logprobs.token_stats", examples=120, x=scored(), seed=seeds,
      K=small)
def test_logprobs_equal_log_softmax_in_float64(x, seed, K):
    """Tokens, candidates, statistics; the weighted sum and its gradients those of autograd."""
    h, w, wide = x["hidden_BTD"], x["weight_VD"], x["hidden_BTD"].dtype
    V, g = x["vocab_size"] or len(w), seeded(seed)
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    logp_BTV = logp_by_hand(h64, w64, V, x["temperature"])
    wanted_BT = x["mask_BT"].index_fill(1, torch.tensor([0]), False)
    ids_BTK = torch.randint(V, (*wanted_BT.shape, K), generator=g)
    right_BT = logp_BTV.gather(2, x["ids_BT"][..., None])[..., 0] * wanted_BT
    near(logprobs.token_logprobs(**x), right_BT.detach(), wide)
    many_BTK = logp_BTV.detach().gather(2, ids_BTK) * wanted_BT[..., None]
    near(logprobs.token_logprobs(**x, candidates_BTK=ids_BTK), many_BTK, wide)

    stats = logprobs.token_stats(**x, top_k=min(K, V), candidates_BTK=ids_BTK)
    p_BTV = logp_BTV.detach().exp()
    near(stats.logp_BT, right_BT.detach(), wide)
    near(stats.candidate_logp_BTK, many_BTK, wide)
    near(stats.max_prob_BT, p_BTV.amax(-1) * wanted_BT, wide)
    near(stats.entropy_BT, torch.special.entr(p_BTV).sum(-1) * wanted_BT, wide)
    best_BTK = logp_BTV.detach().topk(min(K, V)).values * wanted_BT[..., None]
    near(stats.topk_logp_BTK, best_BTK, wide)

    weight_BT = torch.randn(wanted_BT.shape, generator=g, dtype=wide)
    h, w = h.requires_grad_(), w.requires_grad_()
    loss = logprobs.token_logprobs(**x | {"hidden_BTD": h, "weight_VD": w},
                                   loss_weight_BT=weight_BT)  # fmt: skip
    right = (weight_BT.double() * right_BT).sum()
    near(loss.detach(), right.detach(), wide)
    for mine, theirs in zip(gradients(loss, h, w), gradients(right, h64, w64), strict=True):
        near(mine, theirs, wide)


def divergence_by_hand(logp_BTV, logq_BTV, kind, beta):
    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind != "jsd":
        return kl(logp_BTV, logq_BTV) if kind == "rkl" else kl(logq_BTV, logp_BTV)
    m_BTV = (beta * logq_BTV.exp() + (1 - beta) * logp_BTV.exp()).log()
    return beta * kl(logq_BTV, m_BTV) + (1 - beta) * kl(logp_BTV, m_BTV)


@prop("logprobs.token_divergence", examples=120, x=scored(teacher=True), seed=seeds,
      kind=st.sampled_from(logprobs.DIVERGENCES))
def test_divergences_equal_their_definition(x, seed, kind):
    """Not negative, 0 from oneself, bounded (jsd), and with the gradient of autograd."""
    h, w, wide = x["hidden_BTD"], x["weight_VD"], x["hidden_BTD"].dtype
    V = x["vocab_size"] or len(w)
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    logp_BTV = logp_by_hand(h64, w64, V, x["temperature"])
    logq_BTV = logp_by_hand(x["teacher_hidden_BTE"], x["teacher_weight_VE"], V)
    wanted_BT = x["mask_BT"].index_fill(1, torch.tensor([0]), False)
    right_BT = divergence_by_hand(logp_BTV, logq_BTV, kind, x["beta"]) * wanted_BT
    out_BT = logprobs.token_divergence(**x, kind=kind)
    near(out_BT, right_BT.detach(), wide)
    assert bool((out_BT >= -2e-6).all())
    if kind == "jsd":
        most = -sum(b * math.log(b) for b in (x["beta"], 1 - x["beta"]))
        assert bool((out_BT <= most + 1e-5).all())
    own = x | {"teacher_hidden_BTE": h, "teacher_weight_VE": w, "temperature": 1.0}
    assert logprobs.token_divergence(**own, kind=kind).abs().max() < 3e-6

    weight_BT = torch.randn(wanted_BT.shape, generator=seeded(seed), dtype=wide)
    h, w = h.requires_grad_(), w.requires_grad_()
    loss = logprobs.token_divergence(**x | {"hidden_BTD": h, "weight_VD": w}, kind=kind,
                                     loss_weight_BT=weight_BT)  # fmt: skip
    right = (weight_BT.double() * right_BT).sum()
    near(loss.detach(), right.detach(), wide)
    for mine, theirs in zip(gradients(loss, h, w), gradients(right, h64, w64), strict=True):
        near(mine, theirs, wide)


@prop("logprobs.token_logprobs", "logprobs.token_stats", "logprobs.token_divergence", examples=200,
      data=st.data(), which=st.sampled_from(["logprobs", "weighted", "stats", "divergence"]))
def test_bad_input_of_the_heads(data, which):
    divergence = which == "divergence"
    x = data.draw(scored(teacher=divergence))
    shape, rows = x["hidden_BTD"].shape[:2], x["vocab_size"] or len(x["weight_VD"])
    function = getattr(logprobs, f"token_{'logprobs' if which == 'weighted' else which}")
    if which in ("weighted", "divergence"):
        x["loss_weight_BT"] = torch.ones(shape)
    if which in ("logprobs", "stats"):
        x["candidates_BTK"] = torch.zeros(*shape, 2, dtype=torch.int64)
    if which == "stats":
        x["top_k"] = data.draw(st.integers(0, rows))
    name, bad = spoilt(data.draw, x)
    out = refused_or(function, bad)
    if out is None:
        return
    first = out.logp_BT if which == "stats" else out
    shape = () if "loss_weight_BT" in x else bad["hidden_BTD"].shape[:2]
    assert first.shape[: len(shape)] == shape
    tensors = [v for v in bad.values() if isinstance(v, torch.Tensor)]
    if finite(*tensors):
        assert finite(first), "finite input, but what comes out is not"


# ---------------------------------------------------------------------------------------- rollout
@functools.cache
def tiny(family, seed=0, **more):
    return tiny_model(family, seed=seed, **more)


families = st.sampled_from(["qwen3", "llama", "gpt2"])
prompts_of_ids = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=5
)


@prop("rollout.sample_token", examples=200, seed=seeds, V=st.integers(1, 8), S=small,
      temperature=st.sampled_from([0, 0.3, 1.0, 2.0]), data=st.data())
def test_a_sampled_token_is_the_inverse_of_the_cumulative_distribution(
    seed, V, S, temperature, data
):
    """Never a token of probability 0, also at either end of [0, 1); statistics in float64."""
    logits_SV = torch.randn(S, V, generator=seeded(seed)) * 3
    forbidden_SV = torch.rand(S, V, generator=seeded(seed + 1)) < 0.5
    forbidden_SV[:, data.draw(st.integers(0, V - 1))] = False
    logits_SV[forbidden_SV] = -INF
    edges = st.sampled_from([0.0, math.nextafter(1.0, 0.0), 5e-324]) | st.floats(0, 0.999999)
    uniform = data.draw(st.lists(edges, min_size=S, max_size=S))
    K = data.draw(st.integers(1, V))
    uniform_S = torch.tensor(uniform, dtype=torch.float64)
    token_S, logp_S, entropy_S, topk_SK = rollout.sample_token(logits_SV, temperature, uniform_S, K)
    logp_SV = (logits_SV.double() / (temperature or 1)).log_softmax(-1)
    for s in range(S):
        token, p_V = int(token_S[s]), logp_SV[s].exp()
        assert p_V[token] > 0 and math.isclose(logp_S[s], logp_SV[s, token], abs_tol=1e-4)
        assert math.isclose(entropy_S[s], torch.special.entr(p_V).sum(), abs_tol=1e-4)
        assert torch.equal(logits_SV[s, topk_SK[s]], logits_SV[s].topk(K).values)
        assert len(set(topk_SK[s].tolist())) == K
        if temperature == 0:
            assert logits_SV[s, token] == logits_SV[s].max()
        else:
            before = p_V[:token].sum()
            assert before - 1e-6 <= uniform[s] <= before + p_V[token] + 1e-6


@prop("rollout.generate", "rollout.LlamaStep", examples=30, family=families, prompts=prompts_of_ids,
      limit=st.integers(1, 8), batch_size=st.integers(1, 5), seed=seeds,
      temperature=st.sampled_from([0, 0.7, 1.0]), vocab_size=st.sampled_from([None, 61, 20]),
      eos=st.sets(st.integers(0, 60), max_size=25))
def test_rollouts_are_well_formed_and_scored_as_a_full_forward(
    family, prompts, limit, batch_size, seed, temperature, vocab_size, eos
):
    model, V = tiny(family), vocab_size or VOCABULARY
    options = {"max_new_tokens": limit, "eos_ids": iter(eos), "pad_id": 3, "top_k": 2,
               "temperature": temperature, "vocab_size": vocab_size}  # fmt: skip
    before = copy.deepcopy(prompts)
    out = rollout.generate(model, prompts, **options, generator=seeded(seed))
    assert prompts == before and len(out.ids_BT) == len(prompts)
    with torch.no_grad():
        logits_BTV = model(out.ids_BT).logits[..., :V].double() / (temperature or 1)
    logp_BTV = logits_BTV.log_softmax(-1)
    for row, prompt in enumerate(prompts):
        mask_T, ids = out.response_mask_BT[row], out.ids_BT[row].tolist()
        start, length = len(prompt), int(mask_T.sum())
        assert ids[:start] == prompt and 1 <= length <= limit
        assert mask_T.nonzero()[:, 0].tolist() == list(range(start, start + length))
        response = ids[start : start + length]
        assert set(ids[start + length :]) <= {3} and max(response) < V
        stopped = response[-1] in eos
        assert not eos & set(response[:-1]) and (stopped or length == limit)
        assert bool(out.truncated_B[row]) == (not stopped)
        for t, token in enumerate(response, start):
            assert math.isclose(out.logp_BT[row, t], logp_BTV[row, t - 1, token], abs_tol=2e-3)
            entropy = torch.special.entr(logp_BTV[row, t - 1].exp()).sum()
            assert math.isclose(out.entropy_BT[row, t], entropy, abs_tol=2e-3)
        for values_T in (out.logp_BT[row], out.entropy_BT[row], out.topk_ids_BTK[row]):
            assert not values_T[~mask_T].any()
    options["eos_ids"] = sorted(eos) * 2
    other = rollout.generate(model, prompts, **options, generator=seeded(seed),
                             batch_size=batch_size)  # fmt: skip
    assert torch.equal(other.ids_BT, out.ids_BT)


@prop("rollout.generate", "rollout.check_arguments", examples=120, data=st.data(),
      prompts=prompts_of_ids)
def test_bad_input_of_generate(data, prompts):
    arguments = {"prompts": prompts, "max_new_tokens": 2, "eos_ids": [1], "pad_id": 0,
                 "temperature": 1.0, "top_k": 2, "batch_size": 2, "vocab_size": 50}  # fmt: skip
    name = data.draw(st.sampled_from(sorted(arguments)))
    bad = {
        "prompts": st.sampled_from([[], [[]], [[1], []], [[-1]], [[VOCABULARY]], [[2**70]], [[1.5]],
                                    [[NAN]], [[1], [2.0, 3]], [np.array([2, 3])],
                                    [torch.tensor([4])]]),
        "eos_ids": st.sampled_from([[], [-1], [10**9], 5, None, [1.5], [NAN], {2, 3}, (4,)]),
    }.get(name, st.sampled_from(BAD_NUMBERS + [None]))
    arguments[name] = data.draw(bad)
    assume(name not in ("max_new_tokens", "temperature", "top_k", "pad_id")
           or arguments[name] is not None)  # fmt: skip
    out = refused_or(functools.partial(rollout.generate, tiny("qwen3")), arguments)
    if out is not None:
        assert finite(out.logp_BT, out.entropy_BT) and out.ids_BT.dtype == torch.int64
        assert out.ids_BT.min() >= 0 and out.ids_BT.max() < VOCABULARY


@prop("rollout.check_model", "lgr.check_model", examples=60, longest=st.integers(1, 600),
      limit=st.integers(1, 600), window=st.none() | st.integers(1, 600), mine=st.booleans(),
      kind=st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"]),
      implementation=st.sampled_from(["sdpa", "eager", "flash_attention_2"]))
def test_models_are_refused_for_what_their_config_says(
    longest, limit, window, mine, kind, implementation
):
    model = copy.copy(tiny("qwen3"))
    model.config = copy.deepcopy(model.config)
    model.config.max_position_embeddings, model.config.sliding_window = limit, window
    model.config.layer_types = [kind, "full_attention"]
    model.config._attn_implementation = implementation
    module = rollout if mine else lgr
    too_long = mine and longest > limit
    too_wide = kind == "sliding_attention" and window is not None and longest > window
    bad = implementation not in ("sdpa", "eager") or kind == "chunked_attention"
    try:
        module.check_model(model, longest)
        assert not (too_long or too_wide or bad)
    except ValueError:
        assert too_long or too_wide or bad


@prop("rollout.SlotCache", examples=60, slots=st.integers(1, 4), columns=st.integers(1, 6),
      seed=seeds, data=st.data())
def test_a_slot_cache_holds_what_was_written(slots, columns, seed, data):
    """Against a dictionary: prefill, single columns per row, moves."""
    cache, model, g = rollout.SlotCache(slots, columns), {}, seeded(seed)
    zero = torch.zeros(2, 6)
    for _ in range(data.draw(st.integers(1, 5))):
        first, width = data.draw(st.integers(0, slots - 1)), data.draw(st.integers(1, columns))
        live = data.draw(st.integers(first + 1, slots))
        if data.draw(st.booleans()):
            first, Q = 0, 1
            at = [data.draw(st.integers(0, width - 1)) for _ in range(live)]
            cache.select(live, width, torch.tensor([s * columns + c for s, c in enumerate(at)]))
        else:
            Q = width
            cache.select(live, width, None, first)
        key = torch.randn(live - first, 2, Q, 3, generator=g)
        value = torch.randn(live - first, 2, Q, 3, generator=g)
        for row, slot in enumerate(range(first, live)):
            for q in range(Q):
                column = q if Q > 1 or cache.place_S is None else at[slot]
                model[slot, column] = torch.cat([key[row, :, q], value[row, :, q]], -1)
        keys, values = cache.update(key, value, 0)
        for row, slot in enumerate(range(first, live)):
            for column in range(width):
                stored = torch.cat([keys[row, :, column], values[row, :, column]], -1)
                assert torch.equal(stored, model.get((slot, column), zero))
        source, target = data.draw(st.permutations(range(slots)))[:1], [0]
        cache.move(torch.tensor(source), torch.tensor(target), width)
        for column in range(width):
            model[0, column] = model.get((source[0], column), zero)
    assert cache.get_seq_length() == 0


@prop("rollout.attention_mask", examples=30, seed=seeds, shape=st.tuples(small, small),
      eager=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_mask_allows_the_same_in_either_form(seed, shape, eager, dtype):
    config = SimpleNamespace(_attn_implementation="eager" if eager else "sdpa")
    allowed = torch.rand(shape, generator=seeded(seed)) < 0.5
    mask = rollout.attention_mask(SimpleNamespace(config=config, dtype=dtype), allowed)
    assert mask.shape == allowed.shape and mask.dtype == (dtype if eager else torch.bool)
    assert torch.equal(mask == 0 if eager else mask, allowed) and finite(mask.float())


@prop("rollout.product", "rollout.rms_norm", "rollout.is_hooked", examples=40, seed=seeds,
      S=small, D=st.integers(1, 9), N=st.integers(1, 9), bias=st.booleans(), pack=st.booleans(),
      large=st.booleans())
def test_products_and_norms_equal_float64(seed, S, D, N, bias, pack, large):
    g = seeded(seed)
    x_SD, weight_ND = torch.randn(S, D, generator=g), torch.randn(N, D, generator=g)
    bias_N = torch.randn(N, generator=g) if bias else None
    limit, rollout.LARGE = rollout.LARGE, 0 if large else rollout.LARGE
    try:
        out_SN = rollout.product(weight_ND, bias_N, pack=pack)(x_SD)
    finally:
        rollout.LARGE = limit
    right_SN = x_SD.double() @ weight_ND.double().T + (bias_N.double() if bias else 0)
    near(out_SN, right_SN, torch.float32)
    norm = SimpleNamespace(weight=weight_ND[0], variance_epsilon=1e-6)
    scale_S1 = (x_SD.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    near(rollout.rms_norm(x_SD, norm), x_SD * scale_S1 * weight_ND[0].double(), torch.float32)
    module = torch.nn.Linear(1, 1)
    hooks = [module.register_forward_hook(print)] if bias else []
    hooks += [module.register_forward_pre_hook(print)] if pack else []
    assert rollout.is_hooked(module) == bool(hooks)
    for hook in hooks:
        hook.remove()
    assert not rollout.is_hooked(module)


# -------------------------------------------------------------------------------------------- lgr
@prop("lgr.trigger", examples=60, seed=seeds, B=small, T=small, threshold=numbers, data=st.data())
def test_trigger_equals_a_loop(seed, B, T, threshold, data):
    x = {"entropy_BT": torch.randn(B, T, generator=seeded(seed)) * 50, "threshold": threshold,
         "response_mask_BT": torch.rand(B, T, generator=seeded(seed)) < 0.5}  # fmt: skip
    expected = [[e > threshold and m for e, m in zip(*rows, strict=True)] for rows in
                zip(x["entropy_BT"].tolist(), x["response_mask_BT"].tolist(), strict=True)]
    assert lgr.trigger(**x).tolist() == expected
    _, bad = spoilt(data.draw, x)
    out_BT = refused_or(lgr.trigger, bad)
    assert out_BT is None or out_BT.dtype == torch.bool
    assert out_BT is None or not (out_BT & ~bad["response_mask_BT"]).any()


@st.composite
def groups(draw):
    """Confidences, candidates and sampled ids of a batch; some groups nan, some ids outside."""
    B, T, K, g = draw(small), draw(small), draw(small), seeded(draw(seeds))
    confidence_BTK = torch.rand(B, T, K, generator=g, dtype=torch.float64)
    confidence_BTK[torch.rand(B, T, generator=g) < 0.3] = NAN
    candidates_BTK = torch.stack([torch.randperm(9, generator=g)[:K] for _ in range(B * T)])
    ids_BT = torch.randint(9, (B, T), generator=g)
    return confidence_BTK, candidates_BTK.view(B, T, K), ids_BT


@prop("lgr.group_reward", "lgr.sampled_reward", examples=150, case=groups(), data=st.data(),
      eps=st.sampled_from([0.0, 1e-6, 1.0]), normalize=st.sampled_from(["std", "mean"]),
      scale=st.sampled_from([1.0, 1e-30, 1e-200, 1e300]))
def test_rewards_sum_to_0_in_every_group(case, data, eps, normalize, scale):
    confidence_BTK, candidates_BTK, ids_BT = case
    confidence_BTK = confidence_BTK * scale
    how = {"normalize": normalize, "eps": eps}
    reward_BTK = lgr.group_reward(confidence_BTK, **how)
    assert finite(reward_BTK) and not reward_BTK[confidence_BTK.isnan()].any()
    largest_BT = reward_BTK.abs().amax(-1)
    assert bool((reward_BTK.sum(-1).abs() <= 1e-9 * largest_BT).all())
    order_BTK = confidence_BTK.nan_to_num().argsort(-1)
    assert bool((reward_BTK.gather(-1, order_BTK).diff(dim=-1) >= 0).all()), "the surer the better"
    reward_BT = lgr.sampled_reward(reward_BTK, candidates_BTK, ids_BT)
    for b, t in itertools.product(*map(range, ids_BT.shape)):
        table = dict(zip(candidates_BTK[b, t].tolist(), reward_BTK[b, t].tolist(), strict=True))
        assert reward_BT[b, t] == table.get(int(ids_BT[b, t]), 0.0)
    _, bad = spoilt(data.draw, {"confidence_BTK": confidence_BTK, "eps": eps})
    out_BTK = refused_or(functools.partial(lgr.group_reward, normalize=normalize), bad)
    assert out_BTK is None or finite(out_BTK) and out_BTK.shape == bad["confidence_BTK"].shape
    arguments = {"reward_BTK": reward_BTK, "candidates_BTK": candidates_BTK, "ids_BT": ids_BT}
    name, bad = spoilt(data.draw, arguments)
    out_BT = refused_or(lgr.sampled_reward, bad)
    assert out_BT is None or out_BT.shape == bad["ids_BT"].shape


@prop("lgr.union_candidates", "lgr.topk_loss", examples=150, seed=seeds, B=small, T=small, K=small,
      K2=small, data=st.data(), rewarded=st.booleans())
def test_the_union_is_a_set_and_the_loss_a_sum_over_it(seed, B, T, K, K2, data, rewarded):
    g, V = seeded(seed), 6
    student_BTV, teacher_BTV = (torch.randn(B, T, V, generator=g).double() * 3 for _ in "ab")
    ids = {"student_ids_BTK": student_BTV.topk(K).indices,
           "teacher_ids_BTK": teacher_BTV.topk(K2).indices}  # fmt: skip
    union_BTU, valid_BTU = lgr.union_candidates(**ids)
    reward_BTU = torch.randn(union_BTU.shape, generator=g).double() if rewarded else None
    x = {"student_logp_BTU": student_BTV.gather(-1, union_BTU), "valid_BTU": valid_BTU,
         "teacher_logp_BTU": teacher_BTV.gather(-1, union_BTU), "reward_BTU": reward_BTU}
    loss_BT = lgr.topk_loss(**x)
    shifted_BT = lgr.topk_loss(**x | {"student_logp_BTU": x["student_logp_BTU"] - 40})
    torch.testing.assert_close(shifted_BT, loss_BT)
    for b, t in itertools.product(range(B), range(T)):
        both = [ids[name][b, t].tolist() for name in ids]
        kept = union_BTU[b, t][valid_BTU[b, t]].tolist()
        assert sorted(kept) == sorted(set(both[0]) | set(both[1])) and kept[:K] == both[0]
        logp, logq = (z_BTV[b, t][kept].log_softmax(0) for z_BTV in (student_BTV, teacher_BTV))
        reward = reward_BTU[b, t][valid_BTU[b, t]] if rewarded else 0.0
        right = (logp.exp() * (logp - logq - reward)).sum()
        assert math.isclose(loss_BT[b, t], right, rel_tol=1e-9, abs_tol=1e-9)
        assert rewarded or loss_BT[b, t] > -1e-12
    out = refused_or(lgr.union_candidates, spoilt(data.draw, ids)[1])
    assert out is None or out[0].shape == out[1].shape
    x |= {} if rewarded else {"reward_BTU": torch.zeros(union_BTU.shape)}
    name, bad = spoilt(data.draw, x)
    out_BT = refused_or(lgr.topk_loss, bad)
    if out_BT is not None and name not in ("valid_BTU",) and finite(*bad.values()):
        assert finite(out_BT)


@prop("lgr.lookahead_confidence", examples=120, data=st.data(), B=small, T=st.integers(2, 5),
      K=small, seed=seeds, cached=st.booleans(), signal=st.sampled_from([*lgr.SIGNALS, "x"]))
def test_bad_input_of_lookahead(data, B, T, K, seed, cached, signal):
    """Confidences lie in [0, 1], or below 0 for "entropy"; nan exactly where nobody looked."""
    model, g = tiny("qwen3"), seeded(seed)
    x = {"ids_BT": torch.randint(VOCABULARY, (B, T), generator=g), "vocab_size": None,
         "response_mask_BT": torch.ones(B, T, dtype=torch.bool), "nodes_per_slice": 3,
         "trigger_BT": torch.rand(B, T, generator=g) < 0.5, "chunk": 2, "signal": signal,
         "candidates_BTK": torch.randint(VOCABULARY, (B, T, K), generator=g)}  # fmt: skip
    x["candidates_BTK"][..., 0] = x["ids_BT"]
    if cached:
        with torch.no_grad():
            trunk = model.base_model(x["ids_BT"], use_cache=True)
        x["hidden_BTD"] = trunk[0]
    _, bad = spoilt(data.draw, x, but=["signal"])
    cache = copy.deepcopy(trunk.past_key_values) if cached else None
    function = functools.partial(lgr.lookahead_confidence, model, cache=cache)
    out_BTK = refused_or(function, bad)
    assert out_BTK is None or signal != "x"
    if out_BTK is not None and finite(bad.get("hidden_BTD")):
        looked_BT = bad["trigger_BT"] & bad["response_mask_BT"]
        if signal == "sampled_prob":
            looked_BT[:, -1:] = False
        seen_BTK = looked_BT[..., None].expand(out_BTK.shape)
        assert torch.equal(~out_BTK.isnan(), seen_BTK)
        low, high = (-INF, 1e-4) if signal == "entropy" else (0, 1 + 1e-5)
        assert bool(((out_BTK >= low) & (out_BTK <= high))[seen_BTK].all())


@prop("lgr.self_check", examples=12, family=families, seed=st.integers(0, 3),
      factor=st.sampled_from([1.0, 1.0, 0.5, 3.0]))
def test_self_check_passes_a_plain_head_and_no_other(family, seed, factor):
    model = copy.deepcopy(tiny(family, seed))
    head = model.get_output_embeddings()
    if factor == 1.0:
        lgr.self_check(model)
        return
    head.register_forward_hook(lambda module, args, out: out * factor)
    with pytest.raises(ValueError, match="not supported"):
        lgr.self_check(model)


# --------------------------------------------------------------------------------------- controls
@st.composite
def budgets(draw):
    """Arguments of `controls.spend` for a whole batch."""
    length = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    mask_BT = torch.arange(8) < torch.tensor(length)[:, None] + 1
    mask_BT[:, 0] = False
    kept, wanted = (torch.tensor([draw(st.integers(0, n)) for n in length]) for _ in "ab")
    return {"response_mask_BT": mask_BT, "length_R": torch.tensor(length), "kept_R": kept,
            "wanted_R": wanted, "first_row": 0}  # fmt: skip


@prop("controls.first_tokens", "controls.spend", examples=120, x=budgets(), data=st.data(),
      kind=st.sampled_from(controls.CONTROLS))
def test_controls_with_bad_input(x, data, kind):
    keep_BT = controls.first_tokens(x["kept_R"], x["response_mask_BT"])
    assert torch.equal(keep_BT.sum(1), x["kept_R"])
    assert torch.equal(keep_BT[:, 1:], torch.arange(7) < x["kept_R"][:, None])
    few = {"count_B": x["kept_R"], "response_mask_BT": x["response_mask_BT"]}
    name, bad = spoilt(data.draw, few)
    keep_BT = refused_or(controls.first_tokens, bad)
    assert keep_BT is None or keep_BT.dtype == torch.bool and not (
        keep_BT & ~bad["response_mask_BT"]).any()  # fmt: skip
    name, bad = spoilt(data.draw, x)
    function = functools.partial(controls.spend, kind, generator=seeded(1))
    keep_BT = refused_or(function, bad)
    if keep_BT is not None:
        assert keep_BT.shape == bad["response_mask_BT"].shape and keep_BT.dtype == torch.bool
        whole = bad["response_mask_BT"].sum() == x["length_R"].sum()  # not some of the rows
        assert not whole or keep_BT.sum() == x["kept_R"].sum()


@prop("controls.apportion", examples=200, x=budgets(), data=st.data(), share=st.floats(0, 1))
def test_apportion_with_bad_input(x, data, share):
    arguments = {"wanted_R": x["wanted_R"], "capacity_R": x["length_R"],
                 "total": int(share * x["length_R"].sum())}  # fmt: skip
    _, bad = spoilt(data.draw, arguments)
    count_R = refused_or(controls.apportion, bad)
    if count_R is not None:
        assert count_R.dtype == torch.int64 and count_R.sum() == bad["total"]
        assert bool(((count_R >= 0) & (count_R <= bad["capacity_R"])).all())
    big = 2**24  # whose products do not fit into 32 bits
    narrow = controls.apportion(torch.zeros(3).int(), torch.full((3,), big).int(), 3 * big // 2)
    assert narrow.tolist() == [big // 2] * 3


# ---------------------------------------------------------------------------------------- grading
@prop("grading.columns_up_to_last", "grading.micro_batches", examples=100, B=small, T=small,
      seed=seeds, data=st.data(), rows=st.integers(0, 3), tokens=st.integers(0, 9))
def test_columns_and_micro_batches_with_bad_input(B, T, seed, data, rows, tokens):
    mask_BT = torch.rand(B, T, generator=seeded(seed)) < 0.4
    length_B = grading.columns_up_to_last(mask_BT)
    for used, mask_T in zip(length_B.tolist(), mask_BT.tolist(), strict=True):
        assert used == max((t + 1 for t, m in enumerate(mask_T) if m), default=0)
    bad_BT = spoilt_tensor(data.draw, mask_BT)
    out_B = refused_or(grading.columns_up_to_last, {"mask_BT": bad_BT})
    assert out_B is None or out_B.shape == bad_BT.shape[:1] and out_B.dtype == torch.int64
    x = {"length_B": length_B, "most_rows": rows, "most_tokens": tokens}
    _, bad = spoilt(data.draw, x)
    pieces = refused_or(grading.micro_batches, bad)
    if pieces is not None:
        held = [row for piece in pieces for row in piece.tolist()]
        assert sorted(held) == list(range(len(bad["length_B"])))


@prop("grading.pick", "grading.stack", "grading.Grades", examples=60, B=st.integers(1, 6), T=small,
      seed=seeds, rows=st.integers(0, 3), ahead=st.booleans())
def test_pick_and_stack_are_inverses(B, T, seed, rows, ahead):
    """Nested records, with fields that are None; and `keep_only` leaves nothing elsewhere."""
    g = seeded(seed)
    floats_BT, bools_BT = torch.rand(B, T, generator=g), torch.rand(B, T, generator=g) < 0.5
    choice = grading.Supervision(bools_BT, bools_BT[:, 0], floats_BT[:, 0].double())
    look = grading.Lookahead(bools_BT, floats_BT, bools_BT, floats_BT, floats_BT[..., None])
    whole = grading.Grades(floats_BT, floats_BT + 1, choice, look if ahead else None)
    pieces = grading.micro_batches(torch.randint(1, T + 1, (B,), generator=g), rows)
    parts = [grading.pick(whole, piece, T) for piece in pieces]
    again = grading.stack(parts, pieces, T)
    assert repr(again) == repr(whole)
    wider = grading.stack(parts, pieces, T + 2)
    assert wider.logp_BT.shape == (B, T + 2) and not wider.logp_BT[:, T:].any()
    keep_BT = torch.rand(B, T, generator=g) < 0.5
    again.keep_only(keep_BT)
    assert again.choice.keep_BT is keep_BT and repr(whole.choice) == repr(choice)
    if ahead:
        a, w = again.ahead, whole.ahead
        assert torch.equal(a.reward_BT, w.reward_BT.masked_fill(~keep_BT, 0))
        assert same(a.trigger_BT, w.trigger_BT & keep_BT)
        assert torch.equal(a.reward_BTK[..., 0], w.reward_BTK[..., 0] * keep_BT)


def options(*argv):
    """Flags parsed, as `train.py` does."""
    return flags.parse(["--toy", "horizon", "--device", "cpu", *map(str, argv)])[1]


masks = st.sampled_from(["none", "release", *controls.CONTROLS])


@prop("grading.signals", "grading.spends_budget", examples=60, mask=masks,
      prefix_tokens=st.integers(0, 2), budget=st.sampled_from(["release", "own"]))
def test_signals_are_what_the_mask_looks_at(mask, prefix_tokens, budget):
    args = SimpleNamespace(mask=mask, prefix_tokens=prefix_tokens, budget=budget)
    found = grading.signals(args)
    assert ("spread" in found) == (mask == "std") and set(found) <= {"margin", "spread"}
    control = mask in controls.CONTROLS
    assert grading.spends_budget(args) == (control and "margin" in found)
    assert "margin" not in found or mask == "release" or budget == "release" and not prefix_tokens
    assert not found or mask != "none"


def rollouts(seed, prompts, limit=12, top_k=8):
    """What a tiny student of 61 ids wrote."""
    return rollout.generate(tiny("qwen3", 1), prompts, max_new_tokens=limit, eos_ids=[5, 6],
                            pad_id=0, top_k=top_k, generator=seeded(seed))  # fmt: skip


class Letters:
    """A tokenizer of 61 ids, some of which end sentences."""

    def decode(self, ids, **options):
        return "".join([". Then", " x", "!", " 3", ""][i % 5] for i in ids)


def kept_by_the_rule(batch, logp_BTV, args):
    """Tokens of every response that the release rule keeps, from the leaves, row by row."""
    for row, mask_T in enumerate(batch.response_mask_BT):
        candidates_TK = batch.topk_ids_BTK[row, mask_T, : args.margin_top_k]
        margin_T = teachability.teacher_margin(logp_BTV[row, mask_T].gather(1, candidates_TK))
        segment_T = teachability.token_segments(Letters(), batch.ids_BT[row, mask_T], splitter())
        counted_T = batch.entropy_BT[row, mask_T] >= args.margin_min_entropy
        score_N = teachability.segment_scores(margin_T, segment_T, include_T=counted_T)
        point = release_rule.release_point(score_N, min_segments=args.min_segments)
        yield int(release_rule.keep_mask(segment_T, point.kept).sum())


GRADED = ["--union-top-k", 5, "--lgr-top-k", 4, "--sentence-workers", 0, "--min-segments", 1]


@prop("grading.grade", "grading.grade_rows", "grading.look_ahead", "grading.Sentences",
      "grading.supervise", examples=25, seed=seeds, prompts=prompts_of_ids,
      mask=masks | st.just("release"),
      objective=st.sampled_from(["pg", "topk", "rkl"]), rows=st.integers(0, 3), ahead=st.booleans(),
      entropy=st.sampled_from([0.0, 1.0]))
def test_grades_do_not_depend_on_micro_batches(
    seed, prompts, mask, objective, rows, ahead, entropy
):
    """And equal a plain forward; what is supervised lies in the response, and is counted right."""
    ahead = ahead and objective != "rkl"
    args = options(*GRADED, "--mask", mask, "--objective", objective, "--micro-batch", rows,
                   "--margin-min-entropy", entropy, "--lookahead", "on" if ahead else "off")
    teacher, batch = tiny("qwen3", 2), rollouts(seed, prompts)
    before = repr(batch)
    sentences = grading.Sentences(Letters(), splitter())
    how = {"sentences": sentences, "vocab_size": VOCABULARY, "lap": lambda phase: None}
    grades = grading.grade(teacher, batch, args, **how)
    args.micro_batch = args.tokens_per_micro_batch = 0
    whole = grading.grade(teacher, batch, args, **how)
    sentences.close()
    assert repr(batch) == before
    mask_BT, keep_BT = batch.response_mask_BT, grades.choice.keep_BT
    with torch.no_grad():
        logp_BTV = teacher(batch.ids_BT).logits.double().log_softmax(-1).roll(1, 1)
    right_BT = logp_BTV.gather(2, batch.ids_BT[..., None])[..., 0] * mask_BT
    for name, value in (("logp_BT", right_BT), ("max_prob_BT", logp_BTV.exp().amax(-1) * mask_BT)):
        for own in (grades, whole):
            torch.testing.assert_close(getattr(own, name).double(), value, rtol=0, atol=1e-3)
    assert torch.equal(keep_BT, whole.choice.keep_BT) and not (keep_BT & ~mask_BT).any()
    kept_B = keep_BT.sum(1)
    fired_B = kept_B < mask_BT.sum(1)
    if mask in ("none", "release"):
        assert torch.equal(fired_B, grades.choice.released_B)
        assert torch.equal(grades.choice.gain_B > 0, fired_B)
    if mask == "release":
        assert kept_B.tolist() == list(kept_by_the_rule(batch, logp_BTV, args))
    if mask != "std":
        assert torch.equal(kept_B, grades.choice.wanted_B)
    if ahead:
        look, looked_BT = grades.ahead, mask_BT if grading.spends_budget(args) else keep_BT
        assert torch.equal(look.trigger_BT, looked_BT & (batch.entropy_BT > args.lgr_tau))
        assert not look.reward_BT[~look.trigger_BT | look.outside_BT].any()
        assert finite(look.reward_BT, look.spread_BT)
    if objective == "topk":
        taught_BTU = logp_BTV.gather(2, grades.union_BTU)[mask_BT]
        torch.testing.assert_close(grades.union_logp_BTU[mask_BT].double(), taught_BTU, rtol=0,
                                   atol=1e-3)  # fmt: skip


# ---------------------------------------------------------------------------------------- loading
@prop("loading.number", examples=150, kind=st.sampled_from([int, float]), low=numbers, high=numbers,
      text=st.text(max_size=6) | numbers.map(str) | st.integers().map(str)
      | st.sampled_from(["nan", "inf", "-inf", "1e999", "1e-999", "١", "1_0", " 3 ", "0x1"]))
def test_a_number_lies_within_its_limits_or_is_refused(kind, low, high, text):
    try:
        value = loading.number(kind, low, high)(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        assert "\n" not in str(error) or "\n" in text or isinstance(error, ValueError)
        return
    assert type(value) is kind and low <= value <= high and value == kind(text)


@prop("loading.Parser", "flags.parse", "flags.make_parser", "flags.check_combination", examples=150,
      argv=st.lists(st.sampled_from(sorted(f for rows in flags.FLAGS.values() for f, *_ in rows))
                    | st.sampled_from(["0", "1", "-1", "2", "0.5", "nan", "1e99", "opd", "topk",
                                       "x", "", "std", "on", "own", "release", "\0", "--"])
                    | st.text(max_size=3), max_size=5))
def test_any_command_line_is_parsed_or_refused_in_one_line(argv):
    """Parsed: every number finite, every choice one of those offered, no default left open."""
    assume(not any(a.startswith(("-h", "--h")) for a in argv))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _, args = flags.parse(["--device", "cpu", *argv])
    except SystemExit as error:
        assert error.code == 2 and said.getvalue().count("\n") == 1
        assert said.getvalue().startswith("train.py: error: ")
        return
    values = vars(args)
    assert all(math.isfinite(v) for v in values.values() if isinstance(v, (int, float)))
    for flag, default, _, how in sum(flags.FLAGS.values(), []):
        value = values[flag[2:].replace("-", "_")]
        assert value in how.get("choices", [value]) and (value is not None or default is None)


@prop("loading.place", "loading.complain", "loading.check_creatable", examples=100,
      text=st.text() | st.sampled_from(["", "\0", "a" * 300, "x/" * 3000, "a\nb", "\x1b[2J", "ok"]))
def test_any_name_is_a_place_or_refused_and_any_complaint_is_one_line(text):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            name = loading.place(text)
        except argparse.ArgumentTypeError:
            assert not text or not text.isprintable() or not text.isascii()
        else:
            assert name == text
        try:
            loading.check_creatable("--out", Path(folder) / Path("./" + text))
        except ValueError as error:
            assert str(error).startswith("--out ")
        assert os.listdir(folder) == []
        loading.complain("train.py", text)
    line = said.getvalue()
    assert line.startswith("train.py: error: ") and line[:-1].isprintable() and line[-1] == "\n"


@prop("evaluate.make_parser", "toy.make_parser", examples=100,
      argv=st.lists(st.sampled_from(["--out", "--world", "--seed", "--threads", "--toy", "--steps",
                                     "--samples", "--temperature", "--horizon", "--dtype"])
                    | st.sampled_from(["0", "1", "-1", "nan", "1e99", "fork", "x", "", "\0"])
                    | st.text(max_size=3), max_size=4))
def test_the_other_commands_parse_or_refuse_in_one_line(argv):
    assume(not any(a.startswith(("-h", "--h")) for a in argv))
    for module in (evaluate, toy):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                values = vars(module.make_parser().parse_args(argv))
            except SystemExit as error:
                assert error.code == 2 and said.getvalue().count("\n") == 1
                assert said.getvalue().startswith(f"{module.__name__}.py: error: ")
            else:
                assert all(math.isfinite(v) for v in values.values() if isinstance(v, float))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["", " ", "\ud800", "user", "assistant", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "problem", "answer"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
records = st.dictionaries(
    st.sampled_from(["problem", "prompt", "messages", "answer", "level"]), json_values, max_size=3
) | st.fixed_dictionaries({"problem": st.text(min_size=1, max_size=9), "answer": json_values}) | (
    st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "User", ""]),
         "content": json_values | st.text(min_size=1)}), max_size=3), "answer": st.just("1")})
)  # fmt: skip


def check_problems(problems, where):
    for problem in problems:
        assert set(problem) == {"messages", "answer", "where"}
        assert problem["where"].startswith(where) and problem["messages"]
        assert problem["messages"][-1]["role"] != "assistant"
        texts = [m["content"] for m in problem["messages"]]
        assert all(text.strip() and text.encode() for text in texts)
        assert problem["answer"] is None or problem["answer"].encode()


@prop("loading.load_problems", "loading.from_records", examples=150, needed=st.booleans(),
      lines=st.lists(records | json_values | st.binary(max_size=12), max_size=4))
def test_any_file_is_problems_or_one_line_that_names_it(needed, lines):
    raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.jsonl")
        path.write_bytes(b"\n".join(raw))
        try:
            problems = loading.load_problems(path, require_answer=needed)
            assert len(problems) == sum(bool(line.strip()) for line in b"\n".join(raw).split(b"\n"))
            check_problems(problems, f"{path}:")
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    given = [x for x in lines if not isinstance(x, bytes)]
    before = repr(given)
    try:
        check_problems(loading.from_records(given, "here", require_answer=needed), "here:")
    except ValueError as error:
        assert str(error).startswith("here")
    assert repr(given) == before


@functools.cache
def spelling(template):
    """A byte-level tokenizer with a chat template or without, and a model's config."""
    tokenizer = byte_tokenizer(TEMPLATE if template else None)
    return tokenizer, model_for(tokenizer).config


@prop("loading.render_prompts", "loading.check_fit", examples=100, template=st.booleans(),
      contents=st.lists(st.text(min_size=1, max_size=9) | st.sampled_from(
          ["a<|end|>", "<|user|>", "<think>", "<|end"]), min_size=1, max_size=3),
      limit=st.integers(0, 300))
def test_prompts_spell_the_text_or_are_refused(template, contents, limit):
    """Decoded, the prompt is the rendered text; control tokens in a text are refused, and so is a
    prompt that leaves no room."""
    tokenizer, config = spelling(template)
    problem = {"messages": [{"role": "user", "content": c} for c in contents], "where": "f:1"}
    before = repr(problem)
    controlled = any(t in c for c in contents for t in ("<|end|>", "<|user|>"))
    try:
        (ids,) = loading.render_prompts(tokenizer, [problem])
    except ValueError as error:
        assert controlled and str(error).startswith("f:1: the text contains the control token")
        return
    assert not controlled and repr(problem) == before
    joined = "".join(f"<|user|>{c}<|end|>" for c in contents) + "<|assistant|>"
    text = joined if template else "\n\n".join(contents) + "\n\n"
    assert tokenizer.decode(ids) == text
    try:
        loading.check_fit(config, [problem], [ids], limit)
        assert len(ids) + limit <= config.max_position_embeddings and max(ids) < config.vocab_size
    except ValueError as error:
        assert len(ids) + limit > config.max_position_embeddings and "f:1" in str(error)


ids_of_stop = st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=3)


@prop("loading.stop_ids", "loading.pad_id", examples=80, given=st.lists(
      st.tuples(ids_of_stop, ids_of_stop, ids_of_stop), max_size=3))
def test_stop_ids_are_the_sorted_union(given):
    def has(ids):
        return SimpleNamespace(eos_token_id=ids)

    sources = [SimpleNamespace(eos_token_id=a, config=has(b), generation_config=has(c))
               for a, b, c in given]  # fmt: skip
    parts = [x for three in given for x in three if x is not None]
    union = sorted({i for x in parts for i in (x if isinstance(x, list) else [x])})
    if union:
        assert loading.stop_ids(*sources) == union
    else:
        with pytest.raises(ValueError, match="no stop token"):
            loading.stop_ids(*sources)
    for eos, pad, _ in given:
        tokenizer = SimpleNamespace(eos_token_id=eos, pad_token_id=pad)
        if eos is None and pad is None:
            with pytest.raises(ValueError, match="neither a pad nor"):
                loading.pad_id(tokenizer)
        else:
            assert loading.pad_id(tokenizer) == (eos if pad is None else pad)


@prop("loading.common_vocabulary", examples=80, sizes=st.tuples(st.integers(1, 9),
      st.integers(1, 9)), wrong=st.sets(st.integers(0, 8), max_size=2))
def test_the_common_vocabulary_is_the_longest_common_beginning(sizes, wrong):
    names = [[f"t{i}" for i in range(size)] for size in sizes]
    names[1] = [f"u{i}" if i in wrong else t for i, t in enumerate(names[1])]
    tokenizers = [SimpleNamespace(get_vocab=lambda n=n: {t: i for i, t in enumerate(n)})
                  for n in names]  # fmt: skip
    if any(i < min(sizes) for i in wrong):
        with pytest.raises(ValueError, match="another tokenizer"):
            loading.common_vocabulary(*tokenizers)
    else:
        assert loading.common_vocabulary(*tokenizers) == min(sizes)


@prop("loading.first_line", examples=60, text=texts)
def test_the_first_line_is_one(text):
    line = loading.first_line(ValueError(text))
    assert line and len(line.splitlines()) == 1
    assert line in text or not text.strip() and line == "ValueError"


@prop("loading.load_tokenizer", "loading.load_config", "loading.load_model", examples=40,
      path=st.text(max_size=8) | st.sampled_from(
          ["\0", "a/b", "a//b", "/", "~", "..", "/dev/null", "a\nb", str(ROOT / "tests")]),
      loader=st.sampled_from(["tokenizer", "config", "model"]))
def test_a_model_that_is_not_there_is_named(path, loader):
    load = getattr(loading, f"load_{loader}")
    more = {"dtype": torch.float32, "device": "cpu"} if loader == "model" else {}
    online, loading._online = loading._online, lambda: False
    try:
        with pytest.raises(ValueError) as caught:
            load(path, **more)
    finally:
        loading._online = online
    assert str(Path(path)) in str(caught.value) or repr(path) in str(caught.value) or (
        path in str(caught.value))  # fmt: skip


@prop("loading.check_head", examples=15, family=families, seed=st.integers(0, 3), bias=numbers,
      prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5))
def test_a_head_is_a_matrix_or_refused(family, seed, bias, prompt):
    model = copy.deepcopy(tiny(family, seed))
    loading.check_head("--student", model, prompt)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out * (1.5 + abs(bias)))
    with pytest.raises(ValueError, match="--student .* not supported"):
        loading.check_head("--student", model, prompt)


# --------------------------------------------------------------------------------------- evaluate
@prop("evaluate.pass_at_k", examples=150, n=st.integers(0, 8) | st.sampled_from(BAD_NUMBERS),
      correct=st.integers(0, 8), k=st.integers(0, 8) | st.sampled_from(BAD_NUMBERS))
def test_pass_at_k_counts_subsets(n, correct, k):
    value = refused_or(evaluate.pass_at_k, {"n": n, "correct": correct, "k": k})
    if value is not None:
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert math.isclose(value, sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)


@prop("evaluate.bootstrap_interval", examples=100, values=st.lists(numbers | st.sampled_from(
      [NAN, INF]), max_size=6), level=st.sampled_from([0.5, 0.9, *BAD_NUMBERS]), seed=seeds,
      resamples=st.sampled_from([1, 30, 500, 0, -1]))
def test_an_interval_lies_within_the_values(values, level, seed, resamples):
    """Ordered; wider at a higher level; the same for the same seed; shifted by a shift."""
    x = {"values_P": values, "level": level, "resamples": resamples}
    interval = refused_or(functools.partial(evaluate.bootstrap_interval, seed=seed), x)
    if interval is None:
        return
    low, high = interval
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9 and 0 < level < 1
    assert evaluate.bootstrap_interval(**x, seed=seed) == interval
    wide = evaluate.bootstrap_interval(**x | {"level": (1 + level) / 2}, seed=seed)
    assert wide[0] <= low + 1e-9 and high - 1e-9 <= wide[1]
    moved = evaluate.bootstrap_interval(**x | {"values_P": [v + 8 for v in values]}, seed=seed)
    assert moved == pytest.approx((low + 8, high + 8))


one_record = st.fixed_dictionaries({
    "correct": st.booleans(), "answer": st.sampled_from([None, "", "3"]),
    "truncated": st.booleans(), "tokens": st.integers(1, 9), "text": st.just("")})  # fmt: skip


@prop("evaluate.summarise", examples=80, records=st.integers(0, 5).flatmap(lambda n: st.lists(
      st.lists(one_record, min_size=n, max_size=n), max_size=5)), more=st.booleans())
def test_a_summary_counts(records, more):
    if more and records:
        records = [*records, records[0] + records[0][:1]]  # uneven, unless there are none at all
    uneven = len({len(samples) for samples in records}) != 1 or not records[0]
    if uneven:
        with pytest.raises(ValueError, match="same number of samples"):
            evaluate.summarise(records)
        return
    s, flat = evaluate.summarise(records, resamples=50), sum(records, [])
    assert math.isclose(s["accuracy"], sum(r["correct"] for r in flat) / len(flat), abs_tol=1e-12)
    assert 0 <= s["accuracy_low"] <= s["accuracy_high"] <= 1
    best = [any(r["correct"] for r in samples) for samples in records]
    assert s["pass_at_n"] == sum(best) / len(best)
    passes = [s[f"pass@{2**i}"][0] for i in range(s["samples"].bit_length())]
    assert passes == sorted(passes) and passes[-1] <= s["pass_at_n"] + 1e-12
    assert math.isclose(s["unparseable"], sum(not r["answer"] for r in flat) / len(flat))
    assert math.isclose(s["truncated"], sum(r["truncated"] for r in flat) / len(flat))
    assert math.isclose(s["mean_tokens"], sum(r["tokens"] for r in flat) / len(flat))


@prop("evaluate.sample_answers", examples=25, count=st.integers(0, 4), seed=seeds,
      samples=st.integers(0, 3), batch_size=st.integers(0, 4), limit=st.integers(0, 6))
def test_answers_do_not_depend_on_the_batch_size(count, seed, samples, batch_size, limit):
    tokenizer = toy.build_tokenizer()
    items = toy.problems(count, moves=1)
    prompts = [toy.prompt_ids(tokenizer, item) for item in items]
    how = {"samples": samples, "max_new_tokens": limit, "batch_size": batch_size}
    sample = functools.partial(
        evaluate.sample_answers, tiny("qwen3", vocab_size=len(tokenizer)), tokenizer, items,
        prompts, stop_ids=[4], pad_id=0, progress=False)  # fmt: skip
    out = refused_or(lambda **x: sample(generator=seeded(seed), **x), how)
    if out is None:
        assert min(samples, batch_size, limit) < 1
        return
    assert [len(records) for records in out] == [samples] * count
    for record in sum(out, []):
        assert 1 <= record["tokens"] <= limit and (record["tokens"] == limit
                                                   or not record["truncated"])  # fmt: skip
        assert record["answer"] == evaluate.extract_answer(record["text"])
    if count * samples <= 4:  # one call of `generate` either way
        again = sample(generator=seeded(seed), **how | {"batch_size": 99})
        assert [[r["text"] for r in records] for records in again] == [
            [r["text"] for r in records] for records in out]  # fmt: skip


@prop("evaluate.parse_arguments", examples=100, argv=st.lists(st.sampled_from(
      ["--toy", "fork", "--samples", "2", "0", "-1", "--temperature", "nan", "--count", "--model",
       "m", "--problems", "f", "--difficulty", "--dtype", "float16", "--seed", "1e3", "x", ""]),
      max_size=6))
def test_any_command_of_evaluate_is_parsed_or_refused_in_one_line(argv):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = evaluate.parse_arguments(["--device", "cpu", *argv])
    except SystemExit as error:
        assert error.code == 2 and said.getvalue().count("\n") == 1
        return
    assert args.samples >= 1 and args.max_new_tokens >= 1 and 0 <= args.temperature < INF
    assert bool(args.problems) != bool(args.toy) and (args.model or not args.problems)


# -------------------------------------------------------------------------------------------- toy
moves = st.integers(1, toy.MAX_MOVES)


def simulate(text):
    """(start, marks after every move) of a dial problem or response."""
    start = int(re.search(r"starts at (\d+)", text)[1])
    found = re.findall(r"is (plus|minus) (\d+)", text)
    steps = [int(amount) if word == "plus" else -int(amount) for word, amount in found]
    return start, [m % toy.MARKS for m in itertools.accumulate(steps, initial=start)][1:]


@functools.cache
def toy_tokenizer():
    return toy.build_tokenizer()


@prop("toy.dial_problem", "toy.dial_response", "toy.in_test", "toy.prompt_ids",
      "toy.build_tokenizer", "toy.response_limit", examples=80, seed=seeds, n=moves)
def test_a_dial_problem_is_answered_by_its_response(seed, n):
    problem = toy.dial_problem(random.Random(seed), n)
    before, tokenizer = dict(problem), toy_tokenizer()
    start, marks = simulate(problem["problem"])
    text = toy.dial_response(problem)
    assert problem == before and len(marks) == n and problem["answer"] == str(marks[-1])
    assert simulate(text) == (start, marks)
    written = re.findall(r"so (\d+) becomes (\d+)", text)
    assert written == [(str(a), str(b)) for a, b in zip([start, *marks], marks, strict=False)]
    assert evaluate.extract_answer(text) == problem["answer"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert len(ids) + 1 == 11 * n + 17 <= toy.response_limit(n)
    prompt = tokenizer.decode(toy.prompt_ids(tokenizer, problem))
    assert prompt == f"<|user|>{problem['problem']}<|end|><|assistant|>"
    assert toy.in_test(problem) == toy.in_test(dict(problem))


@prop("toy.dial_response", "toy.fork_wordings", "toy.wording_share", examples=100, seed=seeds,
      n=moves, horizon=st.integers(0, 12) | st.just((2, 5, 8)), c=st.floats(0, 1),
      result=st.floats(0, 1), operation=st.floats(0, 1), slips=st.none() | st.floats(0, 1),
      cut=st.integers(1, 12), drift=st.integers(0, 12))
def test_a_spoilt_response_keeps_its_form(
    seed, n, horizon, c, result, operation, slips, cut, drift
):
    """Whatever the noise: the moves in order up to the cut, marks on the dial, every token known,
    and the words that the fork allows."""
    problem = toy.dial_problem(random.Random(seed), n)
    wordings = None if slips is None else toy.fork_wordings(slips)
    text = toy.dial_response(
        problem, random.Random(seed), horizon=horizon, corruption=c, wrong_result=result,
        wrong_operation=operation, wordings=wordings, cut=cut, drift=drift)  # fmt: skip
    move = r"Move (\d+) is (?:plus|minus) ([1-5]), (so|thus) (\d+) becomes (\d+)\."
    links = re.findall(move, text)
    assert [int(link[0]) for link in links] == list(range(1, min(n, cut) + 1))
    assert all(0 <= int(mark) < toy.MARKS for link in links for mark in link[3:])
    assert re.search(r"The dial stops at \\boxed\{(\d+)\}\.$", text)
    ids = toy_tokenizer()(text)["input_ids"]
    assert len(ids) == 11 * len(links) + 16 and toy_tokenizer().unk_token_id not in ids
    thus = sum(link[2] == "thus" for link in links)
    assert toy.wording_share([text], "thus") == thus / len(links) and (wordings or not thus)
    assert toy.wording_share([], "thus") is None


@prop("toy.reverse_problem", "toy.reverse_response", examples=60, seed=seeds,
      length=st.none() | st.integers(1, 6))
def test_a_list_is_reversed(seed, length):
    problem = toy.reverse_problem(random.Random(seed), length)
    marks = re.findall(r"\d+", problem["problem"])
    assert len(marks) == length or length is None and 2 <= len(marks) <= 4
    assert problem["answer"] == ", ".join(marks[::-1])
    response = toy.reverse_response(problem)
    assert evaluate.extract_answer(response) == problem["answer"]
    assert f"has {len(marks)} marks" in response


@prop("toy.problems", examples=80, count=st.integers(0, 20) | st.sampled_from([-1, 2.5, NAN, True]),
      n=moves | st.sampled_from(BAD_NUMBERS), split=st.sampled_from(["train", "test", "dev"]),
      task=st.sampled_from(["dial", "reverse", "x"]), seed=seeds)
def test_problems_belong_to_their_split(count, n, split, task, seed):
    x = {"count": count, "moves": n, "split": split, "task": task}
    found = refused_or(functools.partial(toy.problems, seed=seed), x)
    if found is not None:
        assert len(found) == count and found == toy.problems(**x, seed=seed)
        assert all(toy.in_test(problem) == (split == "test") for problem in found)
        assert n < 3 or len({problem["problem"] for problem in found}) == count


@prop("toy.world", "toy.fork_stages", "toy.in_order", "toy.build_command", "toy.require",
      "toy.exists", "toy.refuse_overwrite", examples=60, name=st.sampled_from(sorted(toy.WORLDS))
      | st.text(max_size=5), names=st.sets(st.sampled_from([*toy.RECIPES, "varied", "confident"])),
      force=st.booleans(), student=st.booleans(), slips=st.floats(0, 1))
def test_worlds_and_folders(name, names, force, student, slips):
    if name not in toy.WORLDS:
        with pytest.raises(ValueError, match="unknown toy world"):
            toy.world(name)
    else:
        for folder in (toy.world(name).teacher, toy.world(name).student):
            command = toy.build_command(folder)
            assert command.startswith("python toy.py --world ") and "--out" not in command
            known = toy.world(command.split()[-1])
            assert folder in (known.teacher, known.student)
    order = toy.in_order(names)
    assert sorted(order) == sorted(names)
    later = [name not in toy.RECIPES for name in order]  # those that start from another
    assert later == sorted(later)
    stages = toy.fork_stages(toy.fork_wordings(slips), student)
    assert [s.noise["wordings"]["thus"][0] for s in stages] == [slips] * (1 + student)
    with tempfile.TemporaryDirectory() as folder:
        there, missing = Path(folder), Path(folder, "a b")
        assert not toy.exists(missing) and not toy.exists(there)
        with pytest.raises(ValueError, match="no model folder at .* build it with: python toy.py"):
            toy.require(missing)
        Path(there, "config.json").write_text("{}")
        assert toy.exists(there) and toy.require(there) is None
        toy.refuse_overwrite([missing], force)
        with contextlib.nullcontext() if force else pytest.raises(FileExistsError, match=folder):
            toy.refuse_overwrite([missing, there], force)


@prop("toy.build_model", "toy.save", "toy.load", "toy.accuracy", "toy.fidelity_by_move", examples=5,
      seed=st.integers(0, 99), n=st.integers(1, 3), heads=st.integers(1, 3))
def test_a_saved_model_is_loaded_in_bfloat16_steps(seed, n, heads):
    tokenizer = toy_tokenizer()
    state = torch.random.get_rng_state()
    model = toy.build_model(tokenizer, hidden=16, layers=1, heads=heads, ff=16, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    plain = {name: p.detach().bfloat16().float() for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        toy.save(model, toy.build_tokenizer(), folder)
        back, spells = toy.load(folder)
    assert all(torch.equal(plain[name], p) for name, p in back.named_parameters())
    assert spells.get_vocab() == tokenizer.get_vocab() and not back.training
    items = toy.problems(3, moves=n, seed=seed)
    share = toy.accuracy(back, tokenizer, items[:1], samples=2, seed=seed)
    assert share in (0, 0.5, 1)
    F_BN = toy.fidelity_by_move(back, tokenizer, items, list(map(toy.dial_response, items)))
    assert F_BN.shape == (3, n + 2) and bool(((F_BN > 1 / 200) & (F_BN <= 1)).all())


@prop("toy.training_batch", examples=40, seed=seeds, step=st.integers(0, 99), longest=moves,
      second=st.floats(0, 1), curriculum=st.booleans(), tokens=st.integers(0, 800))
def test_a_training_batch_is_full_and_has_no_test_problem(
    seed, step, longest, second, curriculum, tokens
):
    stage = toy.Stage(100, 1e-3, curriculum, second, longest)
    tokenizer = toy_tokenizer()
    ids_BT, labels_BT = toy.training_batch(tokenizer, random.Random(seed), stage, step, tokens)
    B, T = ids_BT.shape
    assert B == 1 or B * T <= tokens
    assert (B + 1) * T > tokens
    on_BT = labels_BT != -100
    assert torch.equal(labels_BT[on_BT], ids_BT[on_BT]) and bool(on_BT[:, -1].all())
    for ids_T, on_T in zip(ids_BT, on_BT, strict=True):
        start = int(on_T.nonzero()[0])
        assert on_T[start:].all()
        text = tokenizer.decode(ids_T[:start]).removeprefix("<|user|>")
        assert not toy.in_test({"problem": text.removesuffix("<|end|><|assistant|>")})


# ------------------------------------------------------------------------------------------ train
@prop("train.my_share", "train.batch_order", "train.row_generator", examples=80,
      count=st.integers(1, 20), world=st.integers(1, 6), first=st.integers(0, 60),
      length=st.integers(1, 30), seed=seeds, stream=st.integers(0, 2**23))
def test_shares_orders_and_generators(count, world, first, length, seed, stream):
    """Shares partition the rows; every epoch has every problem once; a process that begins at a
    row draws what one process would have drawn there."""
    shares = [train.my_share(count, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    order = train.batch_order(count, first, length, seed)
    assert order == train.batch_order(count, 0, first + length, seed)[first:]
    whole = train.batch_order(count, count * (first // count), count, seed)
    assert sorted(whole) == list(range(count))
    numbers = torch.rand(count, 3, dtype=torch.float64,
                         generator=train.row_generator(seed, stream, 0, 3))  # fmt: skip
    row = first % count
    own = torch.rand(3, dtype=torch.float64, generator=train.row_generator(seed, stream, row, 3))
    assert torch.equal(own, numbers[row])


@prop("train.token_weights", "metrics.quarters", "train.policy_gradient_loss",
      "train.sum_over_ranks", examples=100, seed=seeds, B=small, T=st.integers(1, 9),
      rescale=st.sampled_from(["batch", "sequence", "none"]))
def test_weights_keep_the_loss_mass(seed, B, T, rescale):
    g = seeded(seed)
    start_B1 = torch.randint(T, (B, 1), generator=g)
    mask_BT = torch.arange(T) >= start_B1
    keep_BT = mask_BT & (torch.rand(B, T, generator=g) < 0.6)
    total, kept = train.sum_over_ranks([mask_BT.sum().item(), keep_BT.sum().item()], "cpu")
    weight_BT = train.token_weights(mask_BT, keep_BT, rescale, total, kept)
    assert finite(weight_BT) and bool(((weight_BT > 0) == keep_BT).all())
    mass_B = mask_BT.sum(1) * keep_BT.any(1) / total
    right = {"batch": float(kept > 0), "sequence": mass_B.sum(), "none": kept / total}[rescale]
    assert math.isclose(weight_BT.sum(), right, abs_tol=1e-5)
    if rescale == "sequence":
        torch.testing.assert_close(weight_BT.sum(1), mass_B)
    quarter_BT = metrics.quarters(mask_BT)
    for mask_T, quarter_T in zip(mask_BT, quarter_BT, strict=True):
        inside = quarter_T[mask_T].tolist()
        assert inside == sorted(inside) and set(quarter_T[~mask_T].tolist()) <= {4}
        sizes = [inside.count(q) for q in range(4)]
        assert sum(sizes) == len(inside) and max(sizes) - min(sizes) <= 1
    logp_BT, advantage_BT = (torch.randn(B, T, generator=g) for _ in "ab")
    terms_BT = weight_BT * advantage_BT
    loss = train.policy_gradient_loss(logp_BT, advantage_BT, weight_BT)
    torch.testing.assert_close(loss, -(terms_BT * logp_BT).sum())
    same_policy = train.policy_gradient_loss(logp_BT, advantage_BT, weight_BT, logp_BT)
    torch.testing.assert_close(same_policy, -terms_BT.sum())


@prop("metrics.repeated_ngrams", examples=150, ids=st.lists(st.integers(0, 3) | st.just(2**20),
      max_size=20), n=st.integers(1, 5))
def test_repeats_are_those_of_a_set(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    found = metrics.repeated_ngrams(torch.tensor(ids, dtype=torch.int64), n)
    assert found == (len(grams) - len(set(grams)), len(grams))


@prop("train.update", "train.micro_batch_loss", "preparing.StudentLogProbs", "train.autocast",
      examples=15, seed=seeds, prompts=prompts_of_ids, rows=st.integers(0, 3),
      tokens=st.integers(0, 30), objective=st.sampled_from(["pg", "rkl", "fkl", "jsd"]),
      updates=st.integers(1, 2))
def test_an_update_does_not_depend_on_micro_batches(
    seed, prompts, rows, tokens, objective, updates
):
    """The same loss and the same step as one batch, and the loss is the sum written out."""
    batch, steps = rollouts(seed, prompts), []
    chosen_BT = torch.rand(batch.ids_BT.shape, generator=seeded(seed)) < 0.7
    keep_BT = batch.response_mask_BT & chosen_BT
    choice = grading.Supervision(keep_BT, keep_BT[:, 0], batch.logp_BT[:, 0])
    teacher = tiny("qwen3", 2)
    with torch.no_grad():
        hidden_BTD = teacher.base_model(batch.ids_BT)[0]
    grades = grading.Grades(batch.logp_BT, batch.logp_BT, choice, hidden_BTD=hidden_BTD)
    advantage_BT, weight_BT = torch.randn(keep_BT.shape, generator=seeded(seed)), keep_BT.float()
    for limits in ((0, 0), (rows, tokens)):
        args = options("--micro-batch", limits[0], "--tokens-per-micro-batch", limits[1],
                       "--objective", objective, "--updates-per-rollout", updates, "--clip-grad", 0)
        assert not torch.is_autocast_enabled("cpu") and not train.autocast(args)._enabled
        model = copy.deepcopy(tiny("qwen3", 1))
        student = preparing.StudentLogProbs(model, VOCABULARY, 1.0)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
        loss, norm = train.update(student, optimizer, batch, grades, advantage_BT, weight_BT, args,
                                  teacher.get_output_embeddings().weight)  # fmt: skip
        steps.append((loss, norm, model))
        assert math.isfinite(loss) and norm >= 0
    assert steps[1][:2] == pytest.approx(steps[0][:2], rel=1e-3, abs=1e-4)
    for a, b in zip(steps[0][2].parameters(), steps[1][2].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if objective == "pg":
        factor_BT = batch.logp_BT if updates == 1 else 1.0
        right = -(advantage_BT * weight_BT * factor_BT).sum()
        assert math.isclose(steps[0][0], right, rel_tol=1e-3, abs_tol=1e-2)
    else:
        assert steps[0][0] > -1e-4


METHODS = st.sampled_from(sorted(flags.METHODS))


@prop("grading.candidates_needed", "preparing.student_and_teacher", examples=40, method=METHODS,
      topk=st.booleans(), margin=st.integers(2, 9), world=st.sampled_from(toy.SHIPPED))
def test_candidates_are_those_that_the_phases_read(method, topk, margin, world):
    args = options("--method", method, "--margin-top-k", margin, "--toy", world)
    needed = grading.candidates_needed(args)
    assert needed.get("--margin-top-k", margin) == margin
    assert ("--margin-top-k" in needed) == ("margin" in grading.signals(args))
    assert ("--lgr-top-k" in needed) == (args.lookahead == "on")
    assert ("--union-top-k" in needed) == (args.objective == "topk")
    paths = preparing.student_and_teacher(args)
    assert list(paths) == ["--student", "--teacher"]
    assert paths["--teacher"] == str(toy.world(world).teacher)
    args.student = "mine"
    assert preparing.student_and_teacher(args) == paths | {"--student": "mine"}


@prop("checkpoint.check_folder", "checkpoint.make_folder", "train.Stopwatch", examples=40,
      kinds=st.lists(st.sampled_from(["nothing", "run", "run", "foreign", "file"]), max_size=4))
def test_no_run_is_ever_overwritten(kinds):
    with tempfile.TemporaryDirectory() as folder:
        out, written = Path(folder, "runs", "a"), []
        for number, kind in enumerate(kinds):
            if kind == "file" and not out.exists():
                out.parent.mkdir(exist_ok=True)
                out.write_text("")
            held = [p.name for p in out.iterdir()] if out.is_dir() else []
            try:
                checkpoint.check_folder(out)
            except ValueError as error:
                assert out.is_file() or held and "config.json" not in held
                assert str(out) in str(error)
                return
            assert not out.is_file() and (not held or "config.json" in held)
            checkpoint.make_folder(out)
            assert not any(out.iterdir())
            if kind in ("run", "foreign"):
                text = json.dumps({"flags": {"number": number}})
                (out / ("config.json" if kind == "run" else "x")).write_text(text)
                written.append(text)
            found = [p.read_text() for p in Path(folder).rglob("*") if p.is_file()]
            assert sorted(found) == written
    watch = train.Stopwatch("cpu")
    for name in [*kinds, "end"]:
        watch.lap(name)
    assert set(watch.seconds) == {*kinds, "end"} and min(watch.seconds.values()) >= 0


SHORT = ["--prompts-per-step", 3, "--difficulty", 1, "--max-new-tokens", 14, "--eval-count", 2,
         "--eval-samples", 2, "--sentence-workers", 0, "--steps", 1, "--min-segments", 1,
         "--splitter", "untrained", "--checkpoint-every", 1]  # fmt: skip


@prop("preparing.prepare", "preparing.load_prompts", "preparing.load_models",
      "preparing.describe", "preparing.fingerprint", "evaluate.check_sampling", "train.sample",
      "train.steps", "train.rows_of_step", "train.all_random_states", "train.write_checkpoint",
      "train.restore",
      "train.train_step", "train.spend_elsewhere", "metrics.batch_sums", "metrics.log_line",
      "train.train", "train.evaluate_student", "train.answers", "train.save_student",
      examples=4, method=METHODS, objective=st.none() | st.sampled_from(flags.OBJECTIVES),
      mask=st.none() | masks, lookahead=st.sampled_from([None, "on", "off"]),
      seed=st.integers(0, 99),
      more=st.sampled_from([[], ["--temperature", 0.7], ["--advantage-clip", 0],
                            ["--margin", "prob"], ["--rescale", "sequence"],
                            ["--updates-per-rollout", 2], ["--lgr-signal", "sampled_prob"],
                            ["--micro-batch", 1], ["--gradient-checkpointing"],
                            ["--dtype", "bfloat16"]]))
def test_any_method_takes_a_step_and_logs_finite_numbers(
    method, objective, mask, lookahead, seed, more
):
    parts = {"--objective": objective, "--mask": mask, "--lookahead": lookahead}
    chosen = [x for flag, value in parts.items() if value for x in (flag, value)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = options("--method", method, "--seed", seed, *chosen, *SHORT, *more)
    except SystemExit:
        assume(False)
    run = preparing.prepare(args, 0, 1)
    preparing.load_models(run, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        log = train.train(run, Path(folder))
        lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
        again = preparing.prepare(args, 0, 1)  # the checkpoint at the end holds everything
        preparing.load_models(again, torch.device("cpu"))
        train.restore(again, checkpoint.newest(Path(folder)))
        for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert again.position.step == args.steps and again.position.skipped == 0
        assert preparing.fingerprint(again) == preparing.fingerprint(run)
        train.save_student(run, Path(folder))
        assert toy.exists(Path(folder, "student"))
    for one in (run, again):
        one.sentences and one.sentences.close()
    first, step, last = lines
    problems, mine = train.rows_of_step(run, 0)
    assert len(problems) == len(mine) == args.prompts_per_step * args.rollouts_per_prompt
    assert log == lines and 0 <= last["accuracy"] <= 1
    assert 0 < step["kept_tokens"] <= step["response_tokens"] * args.prompts_per_step + 1e-6
    for name, value in step.items():
        assert value is None or not isinstance(value, float) or math.isfinite(value), name
    shares = ["truncated", "kept", "fired", "bic_gain_over_6"]
    assert all(0 <= step[name] <= 1 for name in shares) and step["loss"] == step["loss"]
    assert json.loads(json.dumps(preparing.describe(run)))["flags"]["seed"] == seed


# ---------------------------------------------------------------------------------- a run's folder
names = st.text("abcdefgh_", min_size=1, max_size=5)
plain = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5) | st.floats(
    allow_nan=False, allow_infinity=False)
any_line = st.dictionaries(names, plain | st.lists(plain, max_size=3) | st.just(NAN), max_size=4)


@prop("checkpoint.write_json", "checkpoint.read_config", "checkpoint.changed_flags", examples=60,
      flags=st.dictionaries(names, plain), other=st.dictionaries(names, plain))
def test_a_config_comes_back_and_knows_every_difference(flags, other):
    with tempfile.TemporaryDirectory() as folder:
        assert checkpoint.read_config(Path(folder)) is None
        checkpoint.write_json(Path(folder, "config.json"), {"flags": flags})
        config = checkpoint.read_config(Path(folder))
        assert config == {"flags": flags} and os.listdir(folder) == ["config.json"]
    assert checkpoint.changed_flags(config, flags) == []
    assert checkpoint.changed_flags(config, other, [*flags, *other]) == []
    differ = [k for k in {**flags, **other} if flags.get(k) != other.get(k)]
    assert len(checkpoint.changed_flags(config, other)) == len(differ)


@prop("checkpoint.Log", "checkpoint.check_log", examples=60, lines=st.lists(any_line, max_size=5),
      more=st.lists(any_line, max_size=3), keep=st.integers(0, 5), torn=st.binary(max_size=5))
def test_a_log_is_cut_at_any_line_and_keeps_the_rest_beside_it(lines, more, keep, torn):
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "log.jsonl"), checkpoint.Log(Path(folder))
        sizes = [0, *[log.write(line) for line in lines]]
        log.close()
        whole = path.read_bytes()
        path.write_bytes(whole + torn)
        cut = sizes[min(keep, len(lines))]
        log = checkpoint.Log(Path(folder), cut)
        assert len(log.lines) == min(keep, len(lines))
        for line in more:
            log.write(line)
        log.flush()
        log.close()
        assert path.read_bytes()[:cut] == whole[:cut]
        for text in path.read_text().splitlines():
            assert isinstance(json.loads(text, parse_constant=pytest.fail), dict)
        dropped = path.with_name("log.dropped.jsonl")
        assert (dropped.read_bytes() if dropped.exists() else b"") == (whole + torn)[cut:]
        size = path.stat().st_size
        checkpoint.check_log(Path(folder), size)
        with pytest.raises(ValueError, match=f"log.jsonl has {size} bytes"):
            checkpoint.check_log(Path(folder), size + 1)


@prop("checkpoint.write", "checkpoint.newest", "checkpoint.last_written", "checkpoint.step_of",
      "checkpoint.what_is_torn", "checkpoint.read", "checkpoint.read_facts", examples=60,
      steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=5, unique=True).map(sorted),
      keep=st.integers(1, 3), seed=seeds, place=st.floats(0, 1, exclude_max=True),
      name=st.sampled_from(["student.safetensors", "facts.json", "checksums.json"]))
def test_any_flipped_bit_is_noticed(steps, keep, seed, place, name):
    """The newest whole one is found, and no other: one bit of one file makes it torn."""
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            tensor = torch.rand(7, generator=seeded(step))
            path = checkpoint.write(folder, step, {"student": {"x": tensor}}, {"step": step}, keep)
            assert checkpoint.newest(folder) == checkpoint.last_written(folder) == path
        kept = sorted(map(checkpoint.step_of, Path(folder, "checkpoints").iterdir()))
        assert kept == steps[-keep:] and checkpoint.what_is_torn(path) == ""
        found = checkpoint.read(path)
        assert found.facts == checkpoint.read_facts(path) == {"step": steps[-1]}
        assert torch.equal(found.groups["student"]["x"], tensor)
        data = bytearray((path / name).read_bytes())
        data[int(place * len(data))] ^= 1 << seed % 8
        (path / name).write_bytes(data)
        if name == "checksums.json" and not checkpoint.what_is_torn(path):
            return  # a blank became another blank
        with pytest.warns(UserWarning, match="torn"):
            left = checkpoint.newest(folder)
        assert (left and checkpoint.step_of(left)) == (kept[-2] if len(kept) > 1 else None)


@prop("checkpoint.capture", "checkpoint.restore", "checkpoint.random_state",
      "checkpoint.set_random_state", examples=40, seed=seeds, lr=st.floats(1e-6, 1),
      betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), kind=st.sampled_from(
          [torch.optim.AdamW, torch.optim.Adam]), before=st.integers(0, 3))
def test_any_optimizer_goes_on_bit_for_bit(seed, lr, betas, kind, before):
    """Through the file and back, with other settings in the objects that it is put into."""
    def build(lr, betas):
        model = torch.nn.Linear(3, 2)
        optimizer = kind(model.parameters(), lr=lr, betas=betas)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))

    def train_on(objects, steps):
        for _ in range(steps):
            objects[0](torch.randn(4, 3)).square().sum().backward()
            objects[1].step(), objects[2].step(), objects[1].zero_grad()

    torch.manual_seed(seed)
    one, two = build(lr, betas), build(0.1, (0.5, 0.5))
    train_on(one, before)
    groups, facts = checkpoint.capture(*one)
    with tempfile.TemporaryDirectory() as folder:
        facts["random"] = checkpoint.random_state()
        found = checkpoint.read(checkpoint.write(folder, before, groups, facts))
    train_on(one, 3)
    checkpoint.restore(found, *two)
    checkpoint.set_random_state(found.facts["random"])
    train_on(two, 3)
    assert torch.equal(one[0].weight, two[0].weight) and torch.equal(one[0].bias, two[0].bias)
    assert one[2].get_last_lr() == two[2].get_last_lr()


@prop("checkpoint.Interruptions", "checkpoint.Stop", examples=60,
      events=st.lists(st.sampled_from(["hold", "release", *sorted(checkpoint.STOPS)]), max_size=8))
def test_a_stop_is_raised_once_at_the_first_moment_that_is_not_held(events):
    held, waiting, expected = False, None, None
    for number, event in enumerate(events):
        held = event == "hold" or held and event != "release"
        waiting = waiting or (event if event.startswith("SIG") else None)
        if waiting and not held:
            expected = number, waiting
            break
    reached = -1
    try:
        with checkpoint.Interruptions() as signals:
            for reached, event in enumerate(events):  # noqa: B007
                if event.startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, event))
                else:
                    getattr(signals, event)()
    except checkpoint.Stop as stop:
        assert (reached, str(stop)) == expected
        assert stop.exit_code == {"SIGTERM": 0, "SIGINT": 130, "SIGHUP": 129}[str(stop)]
    else:
        assert expected is None


@prop("checkpoint.write_fault", "checkpoint.first_fault", "checkpoint.forget_faults",
      "checkpoint.replace_folder", "train.together", examples=30,
      texts=st.lists(st.text("abc: ", min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_the_first_error_is_kept_and_results_are_replaced_whole(texts):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for text in texts:
            assert checkpoint.first_fault(out, text).strip() == texts[0].strip()
            checkpoint.replace_folder(out, "student", lambda f, t=text: (
                f.mkdir(), (f / "x").write_text(t)))
            assert (out / "student" / "x").read_text() == text
        checkpoint.forget_faults(out)
        assert checkpoint.first_fault(out, "new") == "new"
        path = checkpoint.write_fault(out, "a.safetensors", {"x": torch.arange(3)[::2]})
        assert path.parent == out / "faults" and sorted(os.listdir(out)) == ["faults", "student"]

    def work():
        raise OSError(texts[0])

    assert train.together(lambda: texts) is texts  # alone, it is the same but for the error's type
    with pytest.raises(ValueError, match=re.escape(texts[0])):
        train.together(work)


# ----------------------------------------------------------------------------------------- curves
def strict(record):
    """The record, which JSON can say and give back."""
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    return record


@prop("curves.bins", examples=200, length=st.integers(-2, 3000) | st.sampled_from(BAD_NUMBERS),
      most=st.integers(-1, 99) | st.sampled_from([*BAD_NUMBERS, True, None, "3", np.uint8(200)]))
def test_bins_are_of_equal_width_and_hold_every_position(length, most):
    edges = refused_or(curves.bins, {"length": length, "most": most})
    if edges is not None:
        assert type(length) is int and edges[0] == 0 and len(set(np.diff(edges))) == 1
        assert edges[-2] < length <= edges[-1] and len(edges) - 1 <= most


@prop("curves.plain", "curves.interval", examples=150, values=st.lists(any_float, max_size=8))
def test_numbers_become_json_and_intervals_lie_within_them(values):
    record = strict(curves.plain(np.array(values, dtype=float)))
    assert record == [curves.plain(x) for x in values]
    for x, y in zip(values, record, strict=True):
        assert y is None if not math.isfinite(x) else math.isclose(x, y, rel_tol=1e-5, abs_tol=0)
    small = [x / 4 for x in values]  # a difference of the largest would be infinite
    low, high = strict(refused_or(curves.interval, {"draws_R": np.array(small, dtype=float)}))
    there = [curves.plain(x) for x in small if math.isfinite(x)]
    assert low is high is None if not there else min(there) <= low <= high <= max(there)


@st.composite
def observed(draw):
    """Arguments of `curves.curve`: up to 40 observations of up to 5 responses to 4 problems."""
    B, N = draw(st.integers(1, 5)), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(seeds))
    return {
        "value_N": rng.normal(size=N).round(2), "position_N": rng.integers(-1, 14, N),
        "row_N": rng.integers(0, B, N), "problem_B": rng.integers(0, 4, B),
        "edges_X1": np.array(draw(st.sampled_from([[0, 1], [0, 4, 8, 12], [2, 3, 11], [20, 30]]))),
        "denominator_N": draw(st.sampled_from([None, rng.integers(0, 3, N)])),
        "quartiles": draw(st.booleans()),
    }


@prop("curves.curve", "curves.Curve", examples=150, arguments=observed(), data=st.data())
def test_a_curve_counts_every_observation_inside_once(arguments, data):
    if spoil := data.draw(st.sampled_from([None, None, *sorted(set(arguments) - {"quartiles"})])):
        bad = [3, NAN, [NAN], [-1, 2], [[0, 1]], [INF] * len(arguments["value_N"])]
        arguments |= {spoil: data.draw(st.sampled_from(bad))}
    found = refused_or(curves.curve, arguments)
    if found is None:
        return
    at, edges = np.asarray(arguments["position_N"]), np.asarray(arguments["edges_X1"])
    assert found.count_X.sum() == ((at >= edges[0]) & (at < edges[-1])).sum()
    assert (found.problems_X <= found.responses_X).all()
    assert (found.responses_X <= found.count_X).all()
    centre_X = found.centre_X()
    assert (edges[:-1] <= centre_X).all() and (centre_X <= edges[1:] - 1).all()
    some_X = found.weight_PX.sum(axis=0) > 0
    assert (np.isfinite(found.mean_X) == some_X).all()
    assert (np.isfinite(found.se_X) == ((found.weight_PX > 0).sum(axis=0) > 1)).all()
    assert not (found.se_X < 0).any()
    inside = np.asarray(arguments["value_N"])
    if arguments["denominator_N"] is None and some_X.any():
        assert inside.min() - 1e-9 <= found.mean_X[some_X].min()
        assert found.mean_X[some_X].max() <= inside.max() + 1e-9
    record = strict(found.record())
    assert [x is not None for x in record["mean"]] == some_X.tolist()


@prop("curves.mean", examples=120, values=st.lists(st.integers(-5, 5) | st.just(NAN), max_size=9),
      data=st.data(), weighted=st.booleans())
def test_a_mean_is_a_curve_of_one_bin_without_nan(values, data, weighted):
    B = len(values) + data.draw(st.sampled_from([0, 0, 0, 1]))
    problem = np.array(data.draw(st.lists(st.integers(-1 if B > 6 else 0, 3), min_size=B,
                                          max_size=B)), dtype=int)  # fmt: skip
    weight = np.array(data.draw(st.lists(st.integers(0, 2), min_size=B, max_size=B)), dtype=float)
    found = refused_or(curves.mean, {"value_B": np.array(values, dtype=float), "problem_B": problem,
                                     "denominator_B": weight if weighted else None})  # fmt: skip
    if found is None:
        assert B > len(values) or problem.min() < 0
        return
    strict(found)
    there = [b for b, v in enumerate(values) if not math.isnan(v)]
    total = sum(weight[b] if weighted else 1 for b in there)
    assert found["count"] == len(there) and found["problems"] == len({problem[b] for b in there})
    assert found["mean"] == (curves.plain(sum(values[b] for b in there) / total) if total else None)


@prop("curves.resample", examples=80, problems=st.integers(-1, 40), resamples=st.integers(-1, 30),
      seed=seeds)
def test_every_resample_draws_as_many_problems_as_there_are(problems, resamples, seed):
    found = refused_or(curves.resample, {"problems": problems, "resamples": resamples,
                                         "seed": seed})  # fmt: skip
    assert (found is None) == (problems < 1 or resamples < 1)
    if found is not None:
        assert found.shape == (resamples, problems) and found.min() >= 0
        assert (found.sum(axis=1) == problems).all()
        assert (curves.resample(problems, resamples, seed=seed) == found).all()


@prop("curves.regression", examples=120, n=st.integers(0, 12), seed=seeds,
      slope=st.sampled_from([0.0, 1.0, -3.0, 0.25, 1e6]), spoil=st.sampled_from([None] * 4 + [
          ("x_N", NAN), ("y_N", INF), ("y_N", [1.0]), ("problem_N", 3), ("x_N", [[1.0]])]))
def test_regression_finds_a_line_and_r_is_symmetric(n, seed, slope, spoil):
    rng = np.random.default_rng(seed)
    x, problem = rng.integers(-9, 10, n) / 4, rng.integers(0, 5, n)
    arguments = {"x_N": x, "y_N": slope * x + 7, "problem_N": problem}
    if spoil:
        arguments[spoil[0]] = spoil[1]
    found = refused_or(curves.regression, arguments)
    if found is None:
        assert spoil
        return
    strict(found)
    assert (found["count"], found["problems"]) == (n, len(set(problem.tolist())))
    varies = len(set(x.tolist())) > 1
    assert found["slope"] == (slope if varies else None)
    assert found["r"] == (np.sign(slope) if varies and slope else None)
    y = rng.normal(size=n)
    one, two = (curves.regression(*z, problem, resamples=9) for z in ((x, y), (y, x)))
    assert one["r"] == two["r"] and one["r_interval"] == two["r_interval"]
    assert one["r"] is None or -1 <= one["r"] <= 1


@prop("curves.Logistic", "curves.fit_logistic", examples=100, X=st.integers(5, 30), seed=seeds,
      noise=st.sampled_from([0.0, 0.1, 1.0]), step=st.sampled_from([0.5, 1.0, 100.0]),
      spoil=st.sampled_from([None] * 4 + ["position_X", "value_X", "weight_X"]), data=st.data())
def test_a_fit_lies_within_its_bounds_and_is_no_worse_than_the_truth(
    X, seed, noise, step, spoil, data
):
    rng = np.random.default_rng(seed)
    t, w = step * np.arange(X), rng.uniform(0.5, 2, X)
    truth = curves.Logistic(rng.uniform(0, 2), rng.uniform(0.2, 2) / step, t[X // 2], -rng.random())
    falling = truth(t)
    assert (np.diff(falling) <= 0).all() and falling[0] <= truth.drop + truth.floor
    assert math.isclose(truth(truth.midpoint), truth.drop / 2 + truth.floor, abs_tol=1e-12)
    arguments = {"position_X": t, "value_X": falling + noise * rng.normal(size=X), "weight_X": w}
    if spoil:
        bad = data.draw(st.sampled_from([*BAD_NUMBERS, w[:-1], w[None], w * NAN, w[::-1] - 9, []]))
        arguments[spoil] = bad
    found = refused_or(curves.fit_logistic, arguments)
    if found is None or spoil:
        return
    assert finite(*vars(found).values()) and found.drop >= 0 and t[0] <= found.midpoint <= t[-1]
    assert 2 / (t[-1] - t[0]) <= found.slope * (1 + 1e-9) <= 8.1 / step
    assert -1e-9 <= found.r2 <= 1 + 1e-9
    y = arguments["value_X"]
    left, best = ((w * (y - f(t)) ** 2).sum() for f in (found, truth))
    if truth.slope * (t[-1] - t[0]) >= 2:  # within the bounds, up to the last step of the search
        assert left <= best * 1.02 + 1e-6


@prop("curves.fit_curve", "curves.Fit", examples=40, P=st.integers(1, 5), X=st.integers(3, 9),
      drop=st.sampled_from([-0.5, 0.0, 0.5]), seed=seeds, noise=st.sampled_from([0.0, 0.3]))
def test_a_fit_of_a_curve_has_ordered_intervals_around_what_was_seen(P, X, drop, seed, noise):
    rng = np.random.default_rng(seed)
    T, B = 4 * X, 2 * P
    row_N, position_N = np.divmod(np.arange(B * T), T)
    value_N = curves.Logistic(drop, 0.5, 2 * X, 0.2)(position_N) + noise * rng.normal(size=B * T)
    found = curves.curve(value_N, position_N, row_N, np.arange(B) // 2, curves.bins(T, X))
    fit = curves.fit_curve(found, resamples=11, seed=seed)
    assert (fit is None) == (P < 2 or X < 5)
    if fit is None:
        return
    record = strict(fit.record())
    pairs = {name: value for name, value in record.items() if isinstance(value, list)}
    assert len(pairs) == 6 and all(low <= high for low, high in pairs.values())
    assert fit.seen == (1.5, T - 2.5) and fit.width == 4
    assert fit.midpoint_R.shape == fit.fall_R.shape == (11,)
    assert (fit.seen[0] <= fit.midpoint_R).all() and (fit.midpoint_R <= fit.seen[1]).all()
    low, high = record["midpoint_interval"]
    assert fit.seen[0] - 2 <= low <= high - 4 * (1 - 1e-4) and high <= fit.seen[1] + 2
    if not noise:
        assert fit.located == (drop > 0) and (drop > 0 or record["drop"] < 1e-12)


# ---------------------------------------------------------------------------------------- probing
@prop("probing.gradient_parts", examples=150, seed=seeds, K=st.integers(1, 6),
      shape=st.lists(st.integers(0, 3), max_size=2), shift=st.integers(-20, 20),
      equal=st.booleans(), ruled_out=st.sampled_from([0.0, 0.3, 1.0]), spoil=st.booleans())
def test_gradient_parts_are_those_of_differences(
    seed, shape, K, shift, equal, ruled_out, spoil
):
    """As defined, whatever is ruled out; the teacher's part is none iff it tells nothing apart."""
    g = seeded(seed)
    student_BTK = 2 * torch.randn(*shape, K, generator=g, dtype=torch.float64)
    student_BTK[..., 1:][torch.rand(*shape, K - 1, generator=g) < 0.2] = -INF
    teacher_BTK = torch.randint(-9, 1, (*shape, K), generator=g).double() * (not equal)
    teacher_BTK[torch.rand(*shape, K, generator=g) < ruled_out] = -INF
    arguments = {"student_logp_BTK": student_BTK, "teacher_logp_BTK": teacher_BTK}
    if spoil:
        refused_or(probing.gradient_parts, arguments | {"teacher_logp_BTK": teacher_BTK[..., 1:]})
        with pytest.raises(ValueError, match="teacher_logp_BTK"):
            probing.gradient_parts(*(x[..., :0] for x in arguments.values()))
    parts = refused_or(probing.gradient_parts, arguments)
    assert finite(*parts) and all((x >= 0).all() and x.shape == tuple(shape) for x in parts)
    p_BTK, own_BTK = student_BTK.softmax(-1), student_BTK.log_softmax(-1)
    away_BTK, own_away_BTK = (
        x - (p_BTK * x).sum(-1, keepdim=True)
        for x in (teacher_BTK.clamp(min=probing.LOWEST), own_BTK.clamp(min=-1e3))
    )
    right = ((p_BTK * away_BTK**2).sum(-1), (p_BTK * away_BTK).norm(dim=-1),
             (p_BTK * own_away_BTK).norm(dim=-1))  # fmt: skip
    torch.testing.assert_close(parts, right, rtol=1e-9, atol=1e-12)
    assert (parts[1] ** 2 <= parts[0] + 1e-9).all()
    heard_BTK, none_BTK = teacher_BTK.clamp(min=probing.LOWEST), p_BTK == 0
    tells_BT = heard_BTK.masked_fill(none_BTK, -INF).amax(-1) > heard_BTK.masked_fill(
        none_BTK, INF).amin(-1)  # fmt: skip
    assert torch.equal(parts[0] > 1e-16, tells_BT) and torch.equal(parts[1] > 1e-11, tells_BT)
    order = torch.randperm(K, generator=g)
    others = [(student_BTK + shift, teacher_BTK)]
    others += [(student_BTK[..., order], teacher_BTK[..., order])]
    others += [] if ruled_out else [(student_BTK, teacher_BTK + shift)]
    for other in others:
        torch.testing.assert_close(probing.gradient_parts(*other), parts, rtol=1e-9, atol=1e-11)


@prop("probing.spread_and_pull", examples=100, seed=seeds, B=small, T=small, K=st.integers(1, 5),
      lost=st.booleans(), spread=st.sampled_from([0.0, 1.0, "ends"]))
def test_the_pull_of_what_the_student_would_choose_is_0_on_average(seed, B, T, K, lost, spread):
    g = seeded(seed)
    logp_BTK = 3 * torch.randn(B, T, K, generator=g, dtype=torch.float64)
    confidence_BTK = torch.rand(B, T, K, generator=g, dtype=torch.float64)
    confidence_BTK = confidence_BTK.round() if spread == "ends" else 0.3 + confidence_BTK * spread
    confidence_BTK = confidence_BTK.clamp(max=1)
    if lost:
        confidence_BTK[0, 0] = NAN
    ids_BTK = torch.rand(B, T, 9, generator=g).argsort(-1)[..., :K]
    arguments = {"student_logp_BTK": logp_BTK, "confidence_BTK": confidence_BTK,
                 "candidates_BTK": ids_BTK}  # fmt: skip
    found = [refused_or(probing.spread_and_pull, arguments | {"ids_BT": ids_BTK[..., k]})
             for k in range(K)]  # fmt: skip
    spread_BT, pull_BTK = found[0][0], torch.stack([pull_BT for _, pull_BT in found], dim=-1)
    there_BT = ~confidence_BTK.isnan().any(-1)
    assert torch.equal(~spread_BT.isnan(), there_BT)
    assert torch.equal(~pull_BTK.isnan(), there_BT[..., None].expand(B, T, K))
    p_BTK = logp_BTK.softmax(-1)
    spread_BT, pull_BTK = spread_BT[there_BT], pull_BTK[there_BT]
    assert (0 <= spread_BT).all() and (spread_BT <= 0.5 + 1e-9).all()
    assert spread != 0 or (spread_BT < 1e-9).all()
    assert ((p_BTK[there_BT] * pull_BTK).sum(-1).abs() < 1e-9).all()
    again_BT = (p_BTK[there_BT] * pull_BTK**2).sum(-1).sqrt()
    torch.testing.assert_close(again_BT, spread_BT, rtol=0, atol=1e-9)
    _, other_BT = probing.spread_and_pull(*arguments.values(), torch.full((B, T), 9))
    assert torch.equal(other_BT.isnan(), ~there_BT) and not other_BT[there_BT].any()


def how_to_read(rng, **more):
    K = int(rng.integers(2, 12))
    return probing.How(**{
        "stop_ids": (5, 6), "pad_id": int(rng.integers(2)), "vocab_size": VOCABULARY,
        "candidates": K, "margin_top_k": min(4, K), "group": min(3, K), "progress": False,
        "tau": float(rng.choice([0.0, 1.0, 9.0])), "batch_size": int(rng.integers(1, 4)),
        "tokens": int(rng.choice([1, 20, 999])),
    } | more)  # fmt: skip


@prop("probing.read", "probing.mean_fidelity", "probing.batches", "probing.Readings", examples=25,
      seed=seeds, prompts=prompts_of_ids, own=families, alike=st.booleans(),
      temperature=st.sampled_from([1.0, 0.5]), margin=st.sampled_from(["logprob", "prob"]),
      stop_ids=st.sampled_from([(5, 6), (), (3, VOCABULARY - 1)]), lookahead=st.booleans())
def test_readings_of_any_responses_lie_in_their_ranges(
    seed, prompts, own, alike, temperature, margin, stop_ids, lookahead
):
    rng = np.random.default_rng(seed)
    V = int(rng.choice([VOCABULARY, 30]))
    how = how_to_read(rng, stop_ids=stop_ids, vocab_size=V, temperature=temperature, margin=margin)
    responses = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in prompts]
    teacher = tiny("qwen3", 2)
    student = teacher if alike else tiny(own, 1)
    before = copy.deepcopy((prompts, responses))
    seen = []
    for rows, ids_BT, mask_BT in probing.batches(prompts, responses, how, "cpu", ""):
        seen += rows
        assert len(rows) == 1 or ids_BT.numel() <= how.tokens
        assert [x[m].tolist() for x, m in zip(ids_BT, mask_BT, strict=True)] == [
            responses[row] for row in rows]  # fmt: skip
    assert sorted(seen) == list(range(len(prompts)))
    found = probing.read(student, teacher, prompts, responses, how, lookahead=lookahead, desc="")
    assert (prompts, responses) == before
    values, F = vars(found), sum(map(len, responses))
    assert {(x.shape, x.dtype.kind in "if") for x in values.values()} == {((F,), True)}
    places = [(b, t) for b, response in enumerate(responses) for t in range(len(response))]
    assert list(zip(found.row_F.tolist(), found.position_F.tolist(), strict=True)) == places
    nan_F = np.isnan(found.spread_F)
    assert (nan_F == ((found.hesitates_F == 0) | (not lookahead))).all()
    assert (nan_F == np.isnan(found.pull_F)).all()
    for name, value_F in values.items():
        low, high = RANGES.get(name, (0, INF))
        value_F = value_F[~nan_F] if name in ("spread_F", "pull_F") else value_F
        assert (value_F >= low - 1e-5).all() and (value_F <= high + 1e-5).all(), name
    assert ((found.hesitates_F == 1) == (found.entropy_F > np.float32(how.tau))).all()
    assert (found.fidelity_F + 1e-6 >= np.exp(found.teacher_logp_F)).all()
    assert (found.fidelity_F >= 1 / V - 1e-6).all()
    assert (found.entropy_F <= math.log(V) + 1e-5).all()
    assert margin == "logprob" or (found.margin_F <= 1).all()
    if not [i for i in stop_ids if i < V]:
        assert not found.student_stop_F.any() and not found.teacher_stop_F.any()
    if alike and temperature == 1:
        assert (found.overlap_F == 1).all()
        for name in ("logp", "mass", "stop"):
            a, b = values[f"student_{name}_F"], values[f"teacher_{name}_F"]
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    mean_B = probing.mean_fidelity(teacher, prompts, responses, how, "")
    right = [found.fidelity_F[found.row_F == b].mean() for b in range(len(prompts))]
    np.testing.assert_allclose(mean_B, right, rtol=0, atol=1e-5)


@prop("probing.sample", examples=20, seed=seeds, family=families, limit=st.integers(-1, 6),
      prompts=prompts_of_ids, copies=st.integers(1, 3), stop_ids=st.sampled_from([(5, 6), ()]))
def test_samples_end_and_do_not_depend_on_the_batch_size(
    seed, family, limit, prompts, copies, stop_ids
):
    how, prompts = how_to_read(np.random.default_rng(seed), stop_ids=stop_ids), prompts * copies
    arguments = {"prompts": prompts, "max_new_tokens": limit, "seed": seed, "desc": ""}
    draw = functools.partial(probing.sample, tiny(family, 1), how=how)
    responses = refused_or(draw, arguments)
    assert (responses is None) == (limit < 1)
    if responses is None:
        return
    assert len(responses) == len(prompts)
    for ids in responses:
        assert ids and (len(ids) == limit or ids[-1] in stop_ids)
        assert not set(ids[:-1]) & set(stop_ids) and 0 <= min(ids) <= max(ids) < VOCABULARY
    other = probing.How(**vars(how) | {"batch_size": 99})
    assert probing.sample(tiny(family, 1), how=other, **arguments) == responses


# -------------------------------------------------------------------------------------- measuring
RANGES = {
    "student_logp_F": (probing.LOWEST, 0), "teacher_logp_F": (probing.LOWEST, 0),
    "entropy_F": (0, 5), "fidelity_F": (0, 1), "margin_F": (0, -probing.LOWEST),
    "overlap_F": (0, 1), "student_mass_F": (0, 1), "teacher_mass_F": (0, 1),
    "variance_F": (0, 1e4), "teacher_part_F": (0, 50), "own_part_F": (0, 50),
    "student_stop_F": (0, 1), "teacher_stop_F": (0, 1), "hesitates_F": (0, 1),
    "spread_F": (0, 0.5), "pull_F": (-1, 1),
}  # fmt: skip


@st.composite
def jobs(draw):
    """A job, made-up readings of its responses, and these: of 1 to 4 problems."""
    P, S, rng = draw(st.integers(1, 4)), draw(small), np.random.default_rng(draw(seeds))
    longest, kind = draw(st.sampled_from([1, 3, 15, 90])), draw(st.sampled_from(["any", "ends"]))
    lookahead, answered = draw(st.sampled_from(["", "no such attention"])), draw(st.booleans())
    lengths = rng.integers(1, longest + 1, P * S)
    F = int(lengths.sum())
    draw_one = rng.uniform if kind == "any" else lambda low, high, n: rng.choice([low, high], n)
    values = {name: draw_one(low, high, F).astype(np.float32)
              for name, (low, high) in RANGES.items()}  # fmt: skip
    values["fidelity_F"] = np.maximum(values["fidelity_F"], np.float32(1e-3))
    values["hesitates_F"] = values["hesitates_F"].round()
    for name in ("spread_F", "pull_F"):
        values[name][(values["hesitates_F"] == 0) | bool(lookahead)] = NAN
    found = probing.Readings(
        row_F=np.repeat(np.arange(P * S), lengths), **values,
        position_F=np.concatenate([np.arange(n) for n in lengths]),
    )  # fmt: skip
    responses = [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]
    args = SimpleNamespace(
        resamples=20, seed=0, samples=S, completions=draw(st.integers(0, 4)),
        max_new_tokens=int(lengths.max()), margin_min_entropy=draw(st.sampled_from([0.0, 3.0])),
        min_segments=draw(st.integers(1, 2)), bic_eps=1e-12,
    )  # fmt: skip
    job = measuring.Job(
        args=args, paths={}, tokenizer=Letters(), splitter=splitter(), splitter_name="untrained",
        problems=[{"answer": draw(st.sampled_from(["3", "4"])) if answered else None}] * P,
        prompts=[[1, 2]] * (P * S), problem_B=np.repeat(np.arange(P), S), vocab_size=VOCABULARY,
        answered=answered, template={}, configs={}, lookahead=lookahead, teacher="the teacher",
        how=probing.How(stop_ids=(5, 6), pad_id=0, vocab_size=VOCABULARY, progress=False),
    )  # fmt: skip
    return job, found, responses


def within(found, low, high):
    """A mean or a curve whose means lie within these limits, up to the rounding."""
    low, high = low - 1e-5 * abs(low) - 1e-9, high + 1e-5 * abs(high) + 1e-9
    parts = [np.atleast_1d(np.array(found[k], dtype=object))
             for k in ("mean", "se", "count", "problems")]  # fmt: skip
    for mean, se, count, problems in zip(*parts, strict=True):
        assert mean is None or low <= mean <= high
        assert se is None or se >= 0 and problems > 1
        assert 0 <= problems <= count and (mean is None or problems)
    return found["mean"]


def right_of(job, responses):
    """Whether each is right, [B]; None without answers."""
    records = measuring.answers(job, responses)
    return records and np.array([float(r["correct"]) for rs in records for r in rs])


def quiet(measure, *arguments):
    """What a measurement returns, as JSON can say it; its arguments stay as they are."""
    before = repr(arguments)
    with contextlib.redirect_stderr(io.StringIO()):
        found = measure(*arguments)
    assert repr(arguments) == before
    return strict(found)


@prop("measuring.measure_margin", "measuring.measure_signal", examples=80, case=jobs(),
      bins=st.integers(1, 6))
def test_margin_and_signal_are_means_of_what_was_read(case, bins):
    job, found, responses = case
    edges = curves.bins(int(found.position_F.max()) + 1, bins)
    m = quiet(measuring.measure_margin, job, found, responses, edges, "")
    B, F = len(responses), len(found.row_F)
    within(m["by_token"], found.margin_F.min(), found.margin_F.max())
    within(m["by_sentence"], 0, math.log1p(found.margin_F.max()))
    assert sum(m["by_token"]["count"]) == F
    at, gain = m["release_at_each"], m["gain_each"]
    assert len(at) == len(gain) == B and [x is None for x in at] == [y == 0 for y in gain]
    fired = [x for x in at if x is not None]
    assert all(0 < x < 1 for x in fired) and min(gain) >= 0
    assert math.isclose(within(m["fired"], 0, 1), len(fired) / B, rel_tol=1e-5)
    large = sum(x > measuring.SIGNIFICANT for x in gain) / B
    assert math.isclose(within(m["gain_over_6"], 0, 1), large, rel_tol=1e-5)
    assert within(m["sentences"], 1, F) * B <= F * (1 + 1e-5) and m["gain"]["count"] == len(fired)
    quartiles = list(m["release_at"].values())
    assert quartiles == sorted(quartiles) if fired else quartiles == [None] * 3
    s = quiet(measuring.measure_signal, job, found, edges)
    for name in ("variance", "teacher_part", "own_part"):
        value_F = getattr(found, f"{name}_F")
        within(s[name], value_F.min(), value_F.max())
    for name in ("share", "share_by_quarter"):
        within(s[name], 0, 1)
        assert sum(s[name]["count"]) == F
    assert len(s["share_by_quarter"]["mean"]) == 4


@prop("measuring.measure_lookahead", "measuring.measure_compatibility", "measuring.answers",
      examples=80, case=jobs())
def test_lookahead_and_compatibility_are_means_of_what_was_read(case):
    job, found, responses = case
    records = quiet(measuring.answers, job, responses)
    assert (records is None) == (not job.answered)
    assert not records or {len(samples) for samples in records} == {job.args.samples}
    right_B = right_of(job, responses)
    s = quiet(measuring.measure_lookahead, job, found, right_B)
    hesitates = found.hesitates_F.mean()
    assert math.isclose(within(s["triggered"], 0, 1), hesitates, rel_tol=1e-5)
    assert bool(s["why_not"]) == ("spread" not in s)
    if not job.lookahead:
        for name, high in (("spread", 0.5), ("telling", 1)):
            assert (within(s[name], 0, high) is None) == (hesitates == 0)
        assert (s["competence"] is None) == (not job.answered)
        assert not s["competence"] or s["competence"]["count"] <= len(responses)
    c = quiet(measuring.measure_compatibility, job, found, responses, records)
    for name in ("overlap", "student_mass", "teacher_mass"):
        value_F = getattr(found, f"{name}_F")
        within(c[name], value_F.min(), value_F.max())
    ended = [response[-1] in job.how.stop_ids for response in responses]
    assert math.isclose(within(c["truncated"], 0, 1), 1 - np.mean(ended), rel_tol=1e-5)
    tokens = np.mean([len(response) for response in responses])
    assert math.isclose(within(c["tokens"], 1, INF), tokens, rel_tol=1e-5)
    for stop in c["stop_at_end"].values():
        assert (within(stop, 0, 1) is not None) == any(ended) and stop["count"] == sum(ended)
    within(c["teacher_stops_earlier"], 0, 1)
    kl_F = found.student_logp_F - found.teacher_logp_F
    assert math.isclose(within(c["reverse_kl"], kl_F.min(), kl_F.max()), kl_F.mean(),
                        rel_tol=1e-3, abs_tol=1e-4)  # fmt: skip
    assert (c["answers"] is None) == (not job.answered)


@prop("measuring.measure_completion", "measuring.handover", examples=80, case=jobs(), seed=seeds,
      parrot=st.booleans())
def test_completions_begin_with_the_student_and_a_parrot_changes_nothing(case, seed, parrot):
    """The parrot is a teacher that goes on as the student did, as sure as it was there."""
    job, found, responses = case
    rng, cut_of = np.random.default_rng(seed), {}

    def sample(model, heads, how, *, max_new_tokens, seed, desc):
        assert model is job.teacher and heads and max_new_tokens >= 1
        cut = job.args.max_new_tokens - max_new_tokens
        cut_of[desc] = cut, [b for b, r in enumerate(responses) if len(r) > cut]
        rows = cut_of[desc][1]
        assert heads == [job.prompts[b] + responses[b][:cut] for b in rows]
        if parrot:
            return [responses[b][cut:] for b in rows]
        return [rng.integers(0, VOCABULARY, rng.integers(1, max_new_tokens + 1)).tolist()
                for _ in rows]  # fmt: skip

    def mean_fidelity(teacher, heads, tails, how, desc):
        assert all(0 < len(tail) <= measuring.HANDOVER for tail in tails)
        cut, rows = cut_of[desc]
        if not parrot:
            return rng.uniform(0, 1, len(rows))
        inside_F = (found.position_F >= cut) & (found.position_F < cut + measuring.HANDOVER)
        return np.array([found.fidelity_F[(found.row_F == b) & inside_F].mean() for b in rows])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "sample", sample)
        patch.setattr(probing, "mean_fidelity", mean_fidelity)
        right_B = right_of(job, responses)
        teacher_B = None if right_B is None else rng.integers(0, 2, len(right_B)).astype(float)
        points, jumps = measuring.measure_completion(job, found, responses, right_B, teacher_B)
    strict([points, jumps])
    cuts = [jump["tokens"] for jump in jumps]
    assert cuts == sorted(set(cuts)) and len(cuts) <= job.args.completions
    assert all(0 < cut < max(map(len, responses)) for cut in cuts)
    for jump in jumps:
        running = sum(len(r) > jump["tokens"] for r in responses)
        for name in ("before", "teacher", "student"):
            assert within(jump[name], 0, 1) is not None and jump[name]["count"] == running
        difference = jump["teacher"]["mean"] - jump["before"]["mean"]
        assert math.isclose(within(jump["jump"], -1, 1), difference, abs_tol=1e-5)
        over = within(jump["over_student"], -1, 1)
        assert not parrot or abs(over) < 1e-6
    assert [p["tokens"] for p in points] == (cuts if job.answered else [])
    for point in points:
        accuracy = within(point["accuracy"], 0, 1)
        for name, of_B in (("over_student", right_B), ("over_teacher", teacher_B)):
            over = within(point[name], -1, 1)
            assert math.isclose(over, accuracy - of_B.mean(), abs_tol=1e-5)
        assert 0 < point["running"] <= 1
        assert not parrot or accuracy == curves.plain(right_B.mean())


@st.composite
def fits(draw):
    """A fit whose t* may lie anywhere; draws without the problems that count are nan."""
    rng, there = np.random.default_rng(draw(seeds)), draw(st.integers(1, 20))
    t = draw(st.sampled_from([0.0, 3.0, 20.0]))
    width = draw(st.sampled_from([1.0, 4.0, 4.0, 30.0]))
    midpoint_R = t + draw(st.sampled_from([0.0, 0.1, 50.0])) * rng.normal(size=20)
    midpoint_R[there:] = NAN
    return curves.Fit(
        curves.Logistic(0.5, 0.1, t, 0.2, 0.9), [t, t], [0, 1], [0, 1], [0, 1], 0.5, [0, 1],
        draw(st.booleans()), draw(st.sampled_from([True, True, True, False])), (0.0, 99.0), width,
        midpoint_R, midpoint_R,
    )  # fmt: skip


@prop("measuring.shift", examples=150, one=st.none() | fits(), two=st.none() | fits())
def test_a_shift_is_as_far_there_as_back_and_none_onto_itself(one, two):
    there, back = strict(measuring.shift(one, two)), strict(measuring.shift(two, one))
    located = [fit is not None and fit.located for fit in (one, two)]
    assert (there is None) == (back is None) == (not all(located))
    if located[0]:
        still = measuring.shift(one, one)
        assert (still["tokens"], still["interval"], still["moved"]) == (0, [0, 0], False)
    if there is None:
        return
    assert there["tokens"] == -back["tokens"] and there["moved"] == back["moved"]
    assert there["interval"] == pytest.approx([-x for x in back["interval"][::-1]], abs=1e-4)
    low, high = there["interval"]
    assert low <= high and there["width"] == max(one.width, two.width)
    assert there["moved"] == (min(abs(low), abs(high)) > there["width"] / 2 and low * high > 0)


# ----------------------------------------------------------------------- diagnose, report, pictures
@prop("diagnose.check_out", examples=40,
      names=st.sets(st.sampled_from(["report.json", "report.md", "thesis.txt", "config.json"])),
      there=st.booleans(), file=st.booleans())
def test_only_an_earlier_report_is_in_nobodys_way(names, there, file):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "a", "b")
        if there:
            out.parent.mkdir()
            out.write_text("") if file else out.mkdir()
        for name in names if out.is_dir() else ():
            (out / name).write_text("")
        before = sorted(Path(folder).rglob("*"))
        fine = not there or not (file or (names and "report.json" not in names))
        try:
            diagnose.check_out(out)
            assert fine
        except ValueError as error:
            assert not fine and str(out) in str(error)
        assert sorted(Path(folder).rglob("*")) == before


def good_value(action):
    """Values that a flag takes, as words of a command line."""
    if action.nargs == 0:
        return st.just([])
    if action.choices:
        return st.sampled_from(action.choices).map(lambda x: [x])
    if limits := getattr(action.type, "limits", None):
        kind, low, high = limits
        some = {kind(low), kind(min(high, low + 1)), kind(min(high, low + 7))}
        return st.sampled_from(sorted(some)).map(lambda x: [str(x)])
    return st.sampled_from([["a"], ["x/y z"], ["é|'"], ["runs/a/student"], ["$(a)`b`"]])


ACTIONS = [a for a in diagnose.make_parser()._actions if a.dest not in ("help", "device")]
flags_of_diagnose = st.lists(st.sampled_from(ACTIONS).flatmap(
    lambda a: good_value(a).map(lambda words: [a.option_strings[-1], *words])
) | st.sampled_from([["--top-k", "5"], ["--compare", "a", "a/student"]]), max_size=7)  # fmt: skip
words_of_diagnose = st.sampled_from(
    ["0", "-1", "nan", "1e99", "", "\0", "x", "student", "--", "--compare", "--top", "--method"]
) | st.text(max_size=3)


def parsed(parse, prog, argv):
    """The flags, or None after an exit with status 2 and one line."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return parse(["--device", "cpu", *argv])
        except SystemExit as error:
            assert error.code == 2 and said.getvalue().count("\n") == 1
            assert said.getvalue().startswith(f"{prog}: error: ")
            return None


def as_words(given):
    return [w for flag, x in given.items() for w in ([flag] if x is True else [flag, str(x)])]


@prop("diagnose.parse", "diagnose.make_parser", "diagnose.short", examples=200,
      chosen=flags_of_diagnose, extra=st.lists(words_of_diagnose, max_size=1),
      method=st.sampled_from(sorted(flags.METHODS)))
def test_diagnose_parses_or_refuses_and_repeats_what_was_given(chosen, extra, method):
    assume(not any(word.startswith(("-h", "--h")) for word in extra))
    args = parsed(diagnose.parse, "diagnose.py", [*sum(chosen, []), *extra])
    if args is None:
        assert chosen or extra
        return
    values = strict(vars(args))
    assert all(math.isfinite(v) for v in values.values() if isinstance(v, float))
    open_ones = {"student", "teacher", "problems"}
    assert {k for k, v in values.items() if v is None} <= open_ones
    assert args.top_k >= max(args.margin_top_k, args.lgr_top_k) and args.count >= 2
    assert args.problems is None or args.student and args.teacher
    names = [diagnose.short(path) for path in args.compare]
    assert len(set(names)) == len(names) and "student" not in names and all(names)
    assert {flag: args.given[flag] for flag in args.given} == args.given
    for flag, value in args.given.items():
        assert flag in diagnose.SHARED and values[flag[2:].replace("-", "_")] == value
    wide = ["--top-k", str(args.top_k)]
    again = parsed(diagnose.parse, "diagnose.py", [*as_words(args.given), *wide])
    assert again.given == args.given
    train_args = parsed(
        flags.parse, "train.py", ["--method", method, *as_words(args.given)])
    if train_args is not None:
        for flag in args.given:
            name = flag[2:].replace("-", "_")
            assert getattr(train_args[1], name) == values[name]
    else:
        assert flags.METHODS[method].objective == "topk" and args.lgr_top_k > 20


@prop("diagnose.short", examples=100, parts=st.lists(st.sampled_from(
      ["a", "b c", "student", "..", "é"]), min_size=1, max_size=4))
def test_the_short_name_is_a_part_of_the_path(parts):
    path, own = "/".join(parts), [part for part in parts if part != "student"]
    assert diagnose.short(path) == diagnose.short(Path(path)) == (own[-1] if own else path)
    assert diagnose.short(f"/{path}/student") == (own[-1] if own else f"/{path}/student")


TOYS = {name: str(toy.world(name).teacher) for name in ("clean", "horizon")}


@functools.cache
def diagnosed():
    """A real report of two students, of few responses."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        argv = (f"--out {folder} --count 3 --samples 2 --completions 1 --max-new-tokens 40 "
                "--resamples 20 --bin-width 4 --splitter untrained --device cpu --no-figures")
        return strict(diagnose.run(diagnose.parse([*argv.split(), "--compare", TOYS["clean"]])))


MAYBE_EMPTY = {"gain", "spread", "telling", "handover", "stop_at_end"}  # means of nothing, perhaps
FIT = {"drop": 0.5, "slope": 0.1, "midpoint": 20.0, "floor": 0.2, "r2": 0.9, "fall": 0.4,
       "midpoint_interval": [1.0, 2.0], "slope_interval": [1.0, 2.0], "drop_interval": [0.0, 1.0],
       "floor_interval": [0.0, 1.0], "fall_interval": [0.0, 1.0], "located": True, "step": True,
       "seen": [0.0, 9.0], "width": 4.0}  # fmt: skip


def varied(rng, x, inside=()):
    """Plain data of the same form with other numbers, and None where the report has it."""
    if isinstance(x, bool):
        return bool(rng.integers(2))
    if isinstance(x, float):
        size = rng.random()
        return float(rng.choice([0.0, 1.0, size, size, -size, 1e5 * size, 1e-9 * size]))
    if isinstance(x, list):
        empty = inside[-1] in ("mean", "se")  # of a curve: bins without any
        return [None if empty and rng.random() < 0.1 else varied(rng, y, inside) for y in x]
    if not isinstance(x, dict):
        return x
    found = {k: varied(rng, v, (*inside, k)) for k, v in x.items()}
    if isinstance(found.get("se"), list):
        found["se"] = [y and abs(y) for y in found["se"]]
    elif isinstance(found.get("mean"), float):
        found["se"] = found["se"] and abs(found["se"])
        if rng.random() < 0.2:
            found["se"] = None
        if MAYBE_EMPTY & set(inside) and rng.random() < 0.3:
            found["mean"] = found["se"] = None
    return found


def varied_report(rng, names):
    """A report as `diagnose.py` might write it, with students of these names besides the first."""
    result = copy.deepcopy(diagnosed())
    template = result["students"]["student"]
    result["students"], first = {}, None
    for name in ("student", *names):
        s = result["students"][name] = varied(rng, template)
        for who in ("student", "teacher"):
            s["fidelity"][who]["fit"] = varied(rng, FIT) if rng.random() < 0.7 else None
            if rng.random() < 0.3:
                s["margin"][who]["release_at_each"] = [None] * 6
        if rng.random() < 0.2:
            s["fidelity"]["handover"] = []
        if rng.random() < 0.3:
            s["margin"]["student"]["release_at"] |= {"median": None}
        points = s["completion"]["points"]
        s["completion"]["points"] = points * int(rng.integers(3))
        if rng.random() < 0.2:
            s["completion"] = s["compatibility"]["answers"] = s["lookahead"]["competence"] = None
        elif rng.random() < 0.2:
            s["lookahead"]["competence"] |= {"r": None, "r_interval": [None, None]}
        if rng.random() < 0.2:
            triggered = s["lookahead"]["triggered"]
            s["lookahead"] = {"why_not": "it is recurrent", "triggered": triggered}
        if rng.random() < 0.2:
            s["compatibility"]["log_probs"] |= {
                "r": None, "r_interval": [None] * 2, "slope": None, "slope_interval": [None] * 2}
        fit = s["fidelity"]["student"]["fit"]
        first = fit if name == "student" else first
        both = name != "student" and fit and first and fit["located"] and first["located"]
        s["shift"] = {"tokens": rng.normal(), "interval": [-1.0, 2.0], "width": 4.0,
                      "moved": bool(rng.integers(2))} if both else None  # fmt: skip
    same = float(rng.choice([0.0, 0.5, 1.0]))
    result["template"] = {"same": same, "why": "it has none" if same == 0 else ""}
    result["vocabulary"]["stop_ids"]["teacher"] = [[], [4], [4, 5]][rng.integers(3)]
    result["settings"]["margin"] = str(rng.choice(["logprob", "prob"]))
    return result


def cells(line):
    """Of a line of a Markdown table."""
    assert line.startswith("| ") and line.endswith(" |")
    return re.split(r"(?<!\\)\|", line)[1:-1]


names_of_students = st.lists(st.sampled_from(["a", "a|b", "opd-seed0", "é", "x" * 60, "-"]),
                             max_size=2, unique=True)  # fmt: skip


@prop("report.judge", "report.suggest", "report.summary", "report.markdown", "report.Verdict",
      examples=120, seed=seeds, names=names_of_students, chosen=flags_of_diagnose)
def test_any_report_is_judged_and_told(seed, names, chosen):
    result = varied_report(np.random.default_rng(seed), names)
    args = parsed(diagnose.parse, "diagnose.py", sum(chosen, []))
    given = result["settings"]["given"] = args.given if args else {}
    before = repr(result)
    verdicts, command = report.judge(result)
    assert repr(result) == before
    strict([verdicts, command])
    by_item = {v["item"]: report.Verdict(**v) for v in verdicts}
    assert len(by_item) == len(verdicts) >= 12
    assert {v["grade"] for v in verdicts} <= set(report.MARKS)
    assert all(v["says"].endswith(".") and v["threshold"] and v["source"] for v in verdicts)
    assert report.suggest(result, by_item) == command and set(command) == {
        "method", "why", "command"}  # fmt: skip
    grades = {item: v.grade for item, v in by_item.items()}
    lost = "bad" in (grades["fidelity"], grades["margin"])
    measured = not result["students"]["student"]["lookahead"]["why_not"]
    ahead = grades["lookahead"] == "bad" or grades["lookahead"] == "-" and measured
    if grades["teacher"] == "bad" and not lost and not ahead:
        assert command["method"] is command["command"] is None
    else:
        method = flags.METHODS[command["method"]]
        assert method == flags.Method("pg", "release" if lost else "none", "on" if ahead else "off")
        runner, script, *words = shlex.split(command["command"])
        assert (runner, script) == ("torchrun", "train.py")
        _, trained = parsed(flags.parse, "train.py", words)
        assert trained.method == command["method"]
        for flag, value in given.items():
            assert getattr(trained, flag[2:].replace("-", "_")) == value
    result["verdicts"], result["command"] = verdicts, command
    before, text = repr(result), report.summary(result)
    page = report.markdown(result, ["a.png"])
    assert repr(result) == before and page.endswith("\n") and "![a](a.png)" in page
    for told in (text, page):
        assert not re.search(r"\b(None|nan|inf)\b", told.replace(command["command"] or "\0", ""))
        assert (command["command"] or "No method here fits") in told
    heads = [line for line in text.split("\n") if line[:1] in report.MARKS.values()]
    told = [line for line in heads if line[2:3].strip()]
    marks = [(report.MARKS[v["grade"]], v["item"]) for v in verdicts]
    assert [(line[0], line[2:].split()[0]) for line in told[:len(verdicts)]] == marks
    tables = [block.split("\n") for block in page.split("\n\n") if block.startswith("| ")]
    assert len(tables) >= 3
    for lines in tables:
        assert len({len(cells(line)) for line in lines}) == 1 and set(cells(lines[1])) == {" --- "}
    assert len(tables[0]) == 2 + len(verdicts) and len(cells(tables[1][0])) == 2 + len(names)


any_cell = st.text(max_size=8) | st.text("|\\\n\r\x85\u2028 ab", max_size=8) | st.floats()


@prop("report.table", examples=150, rows=st.integers(1, 4).flatmap(lambda n: st.lists(
      st.lists(any_cell, min_size=n, max_size=n), min_size=1, max_size=4)))
def test_a_table_has_a_line_per_row_and_a_cell_per_text(rows):
    before = repr(rows)
    lines = report.table(rows[0], rows[1:]).splitlines()
    assert len(lines) == 1 + len(rows) and repr(rows) == before
    for line, row in zip([lines[0], *lines[2:]], rows, strict=True):
        found = [cell[1:-1].replace("\\|", "|") for cell in cells(line)]
        assert found == [" ".join(str(x).split()) for x in row]


@prop("pictures.draw", examples=3, seed=seeds, names=names_of_students)
def test_any_report_is_drawn(seed, names):
    pytest.importorskip("matplotlib")
    result = varied_report(np.random.default_rng(seed), names)
    before, c = repr(result), result["students"]["student"]["completion"]
    with tempfile.TemporaryDirectory() as folder:
        drawn = pictures.draw(result, folder)
        assert repr(result) == before and sorted(os.listdir(folder)) == sorted(drawn)
        assert all(Path(folder, name).read_bytes()[:4] == b"\x89PNG" for name in drawn)
        wanted = {"completion.png": bool(c and c["points"]), "compare.png": bool(names)}
        assert {name: name in drawn for name in wanted} == wanted
        assert {"margin.png", "fidelity.png", "signal.png"} <= set(drawn)
    with (tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch,
          contextlib.redirect_stdout(io.StringIO()) as said):  # fmt: skip
        patch.setitem(sys.modules, "matplotlib.style", None)
        assert pictures.draw(result, folder) == os.listdir(folder) == []
    assert said.getvalue() == pictures.MISSING + "\n"


@prop("diagnose.main", "diagnose.run", "diagnose.prepare", "diagnose.load", "diagnose.vocabulary",
      "measuring.measure", examples=14, seed=st.integers(0, 99), count=st.integers(1, 3),
      kind=st.sampled_from(["toy", "toy", "answers", "none", "refused"]), samples=small,
      compare=st.sampled_from([[], ["--compare", TOYS["clean"], TOYS["horizon"]]]),
      more=st.lists(st.sampled_from([
          ["--bin-width", "1"], ["--margin", "prob"], ["--completions", "0"], ["--thinking"],
          ["--temperature", "0.7"], ["--max-new-tokens", "1"], ["--lgr-tau", "99"],
          ["--margin-min-entropy", "99"], ["--tokens-per-pass", "1"], ["--dtype", "bfloat16"],
          ["--top-k", "200"], ["--out", "\x7f"], ["--student", "not there"],
      ]), max_size=3))
def test_any_diagnosis_ends_with_a_report_or_one_line(seed, count, kind, samples, compare, more):
    with tempfile.TemporaryDirectory() as folder:
        out, path = Path(folder, "out"), Path(folder, "p.jsonl")
        argv = ["--out", out, "--seed", seed, "--samples", samples, "--completions", 2,
                "--resamples", 20, "--max-new-tokens", 24, "--splitter", "untrained", "--device",
                "cpu", "--no-figures", "--threads", 1, "--count", max(2, count)]  # fmt: skip
        if kind != "toy":
            keys = ["problem", "answer"] if kind == "answers" else ["problem"]
            problems = [{k: p[k] for k in keys} for p in toy.problems(count, moves=2, seed=seed)]
            problems[-1] |= {"problem": ""} if kind == "refused" else {}
            path.write_text("\n".join(map(json.dumps, problems)))
            argv += ["--problems", path, "--student", TOYS["clean"], "--teacher", TOYS["horizon"]]
        argv = [*map(str, argv), *sum(more, []), *compare]
        said, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
            try:
                status = diagnose.main(argv)
            except SystemExit as error:
                status = error.code
        bad = {"--top-k", "--student"} & set(sum(more, [])) or "\x7f" in argv
        bad = bad or kind != "toy" and (count < 2 or kind == "refused")
        assert status == (2 if bad else 0), said.getvalue()
        if bad:
            line = said.getvalue()
            assert line.startswith("diagnose.py: error: ") and line.count("\n") == 1
            assert not out.exists()
            return
        assert sorted(os.listdir(out)) == ["report.json", "report.md"]
        result = json.loads((out / "report.json").read_text())
        page = (out / "report.md").read_text()
    strict(result)
    assert result["problems"] == max(2, count) and list(result["vocabulary"]["rows"]) == [
        "student", "teacher"]  # fmt: skip
    assert list(result["students"]) == ["student", "clean", "horizon"][: 3 if compare else 1]
    assert result["vocabulary"]["shared"] <= min(result["vocabulary"]["rows"].values())
    assert result["vocabulary"]["stop_ids"] == {"student": [4], "teacher": [4]}
    assert report.judge(result) == (result["verdicts"], result["command"])
    assert report.summary(result) in told.getvalue() and page == report.markdown(result, [])
    for s in result["students"].values():
        within(s["fidelity"]["student"]["mean"], 0, 1)
        assert (s["completion"] is None) == (kind == "none")
        assert s["compatibility"]["tokens"]["count"] == result["problems"] * samples


@prop("diagnose.compare_templates", examples=60, template=st.sampled_from(
      [TEMPLATE, None, "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
       "{% if messages[0]['content'] | length > 3 %}x{% endif %}" + TEMPLATE, "{{"]),
      texts=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4),
      thinking=st.booleans())
def test_templates_agree_on_a_share_of_the_prompts(template, texts, thinking):
    own, teacher = spelling(True)[0], byte_tokenizer(template)
    problems = [{"messages": [{"role": "user", "content": t}], "where": "f:1"} for t in texts]
    prompts = loading.render_prompts(own, problems, thinking=thinking)
    before = repr((problems, prompts))
    found = strict(diagnose.compare_templates(teacher, problems, prompts, thinking))
    assert repr((problems, prompts)) == before and set(found) == {"same", "why"}
    assert 0 <= found["same"] <= 1 and (not found["why"] or found["same"] == 0)
    assert "\n" not in found["why"]
    if template == TEMPLATE:
        assert found == {"same": 1.0, "why": ""}
    elif template and "length" in template:
        assert found["same"] == sum(len(t) <= 3 for t in texts) / len(texts)
    else:
        assert found["same"] == 0


# --------------------------------------------- what diagnose.py shares with the other commands
@prop("preparing.check_prompts", examples=120, vocab=st.integers(1, 9), limit=st.integers(1, 9),
      prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), max_size=4),
      contexts=st.lists(st.integers(4, 18), max_size=2))
def test_prompts_fit_all_models_or_the_first_that_does_not_is_named(
    vocab, limit, prompts, contexts
):
    configs = {}
    for number, context in enumerate(contexts):
        configs[number] = copy.deepcopy(spelling(True)[1])
        configs[number].max_position_embeddings = context
    problems = [{"where": f"f:{i}"} for i in range(len(prompts))]
    arguments = {"tokenizer": Letters(), "configs": configs, "vocab_size": vocab,
                 "problems": problems, "prompts": prompts, "max_new_tokens": limit}  # fmt: skip
    strange = [i for i, prompt in enumerate(prompts) if max(prompt) >= vocab]
    long = [i for context in contexts for i, prompt in enumerate(prompts)
            if len(prompt) + limit > context]  # fmt: skip
    before = repr(arguments)
    if not strange and not long:
        assert preparing.check_prompts(**arguments) is None
    else:
        first = (strange or long)[0]
        with pytest.raises(ValueError, match=f"^f:{first}: ") as error:
            preparing.check_prompts(**arguments)
        assert ("--student and --teacher share" in str(error.value)) == bool(strange)
    assert repr(arguments) == before


@functools.cache
def foreign():
    """A model folder of another tokenizer; it goes when Python does."""
    folder = tempfile.TemporaryDirectory()
    write_model(folder.name)
    return folder


models = st.none() | st.sampled_from([*TOYS.values(), "not/there", "foreign"])


@prop("preparing.open_pair", examples=25, student=models, teacher=models,
      world=st.sampled_from(toy.SHIPPED))
def test_a_pair_shares_a_vocabulary_or_is_refused(student, teacher, world):
    given = [foreign().name if x == "foreign" else x for x in (student, teacher)]
    args = SimpleNamespace(student=given[0], teacher=given[1], toy=world, trust_remote_code=False)
    before, bad = repr(args), {"not/there"} & {student, teacher}
    if bad or (student == "foreign") != (teacher == "foreign"):
        with pytest.raises(ValueError, match="not/there" if bad else "^--teacher has another"):
            preparing.open_pair(args)
        return
    tokenizers, configs, vocab_size = preparing.open_pair(args)
    assert repr(args) == before
    assert list(tokenizers) == list(configs) == ["--student", "--teacher"]
    assert vocab_size <= min(config.vocab_size for config in configs.values())
    names = [t.convert_ids_to_tokens(list(range(vocab_size))) for t in tokenizers.values()]
    assert names[0] == names[1]


@prop("preparing.open_splitter", "preparing.surroundings", examples=12, git=st.booleans(),
      kind=st.sampled_from(["auto", "pretrained", "untrained", "other"]))
def test_a_machine_without_git_or_data_is_described_and_refused_what_it_lacks(git, kind):
    args = SimpleNamespace(splitter=kind, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachability, "_pretrained_punkt", lambda: None)
        patch.setattr(teachability, "_download_punkt", lambda: None)
        if kind in ("auto", "untrained"):
            found, name = preparing.open_splitter(args)
            assert name == "untrained-punkt"
            assert list(found.span_tokenize("It is. So")) == [(0, 6), (7, 9)]
        else:
            with pytest.raises(ValueError, match="^--splitter p" if kind != "other" else "kind"):
                preparing.open_splitter(args)
        if not git:
            patch.setenv("PATH", "")
        facts = strict(preparing.surroundings(args))
    assert list(facts) == ["commit", "device", "threads", "versions", "started"]
    assert facts["device"] and facts["threads"] == torch.get_num_threads()
    assert git or facts["commit"] is None


@st.composite
def flag_rows(draw):
    """Rows as FLAGS has them."""
    numbers = st.tuples(st.just({}) | st.just({"low": 1}) | st.just({"low": 2, "high": 9}))
    rows = []
    for k in range(draw(st.integers(1, 4))):
        default, options = draw(st.one_of(
            st.tuples(st.just(False), st.just({})),
            st.tuples(st.integers(2, 9) | st.tuples(st.integers(2, 9), st.integers(2, 9)),
                      numbers.map(lambda x: x[0])),
            st.tuples(st.sampled_from([2.5, 9.0, (2.5, 3.5)]), numbers.map(lambda x: x[0])),
            st.tuples(st.sampled_from([None, "b", ("a", "b")]), st.just({"choices": ["a", "b"]})),
            st.tuples(st.sampled_from([None, "folder"]), st.just({"metavar": "FOLDER"})),
        ))  # fmt: skip
        rows.append((f"--flag-{k}", default, "text", options))
    return rows


@prop("flags.add_flags", examples=120, rows=flag_rows())
def test_added_flags_have_their_defaults_and_limits(rows):
    before, parser = repr(rows), loading.Parser(prog="x.py", allow_abbrev=False)
    flags.add_flags(parser, rows)
    assert repr(rows) == before and all(flag in parser.format_help() for flag, *_ in rows)
    nothing = vars(parser.parse_args([]))
    for flag, default, _, options in rows:
        name = flag[2:].replace("-", "_")
        both = isinstance(default, tuple)
        assert nothing[name] == (None if both else default)
        real = default[1] if both else default
        low, high = options.get("low", 0), options.get("high", loading.BIG)
        if real is False:
            good, bad = [[]], [["x"]]
        elif isinstance(real, int | float):
            good = [[str(real)], [str(low)], [str(type(real)(high))]]
            bad = [[str(low - 1)], [f"{high * 2:.0f}"], ["nan"], ["x"], []]
        elif "choices" in options:
            good, bad = [["a"], ["b"]], [["c"], [""], []]
        else:
            good, bad = [["x y"]], [["\0"], [""], []]
        for words in good:
            value = vars(parser.parse_args([flag, *words]))[name]
            assert type(value) is (type(real) if real is not None else str)
            assert not words or value == type(value)(words[0])
        for words in bad:
            assert parsed(lambda argv: parser.parse_args(argv[2:]), "x.py", [flag, *words]) is None


@prop("flags.fill_in", examples=60, data=st.data(), world=st.sampled_from(toy.SHIPPED),
      student=st.sampled_from([None, "mine"]), problems=st.sampled_from([None, "p.jsonl"]))
def test_what_is_filled_in_depends_on_the_student_and_overrides_nothing(
    data, world, student, problems
):
    parser, rows = flags.make_parser(), sum(flags.FLAGS.values(), [])
    both = {flag[2:].replace("-", "_"): x for flag, x, *_ in rows if isinstance(x, tuple)}
    given = {name: x[1] for name, x in both.items() if data.draw(st.booleans())}
    given |= data.draw(st.sampled_from([{}, {"difficulty": 2}, {"max_new_tokens": 5}]))
    absent = data.draw(st.sampled_from([None, *both]))  # as of a command with fewer flags
    args = parser.parse_args(["--device", "cpu", "--toy", world])
    vars(args).update(given | {"student": student, "problems": problems})
    vars(args).pop(absent, None)
    before = dict(vars(args))
    assert flags.fill_in(parser, args) is None
    after = vars(args)
    assert set(after) == set(before)
    assert all(v == after[name] for name, v in before.items() if v is not None)
    for name in set(both) - {absent}:
        assert after[name] == given.get(name, both[name][student is not None])
    assert after["difficulty"] and after["max_new_tokens"] and after["dtype"] == "float32"


@prop("evaluate.check_answer", examples=100, ids=st.lists(st.integers(0, VOCABULARY - 1),
      min_size=1, max_size=9), answer=st.sampled_from([None, "3", "4", ""]),
      stops=st.lists(st.integers(0, VOCABULARY - 1), max_size=3), toys=st.booleans())
def test_any_response_is_checked(ids, answer, stops, toys):
    tokenizer = toy_tokenizer() if toys else Letters()
    before, problem = repr((ids, stops)), {"answer": answer}
    record = strict(evaluate.check_answer(tokenizer, ids, problem, stops))
    assert repr((ids, stops)) == before and problem == {"answer": answer}
    assert list(record) == ["text", "answer", "correct", "truncated", "tokens"]
    assert record["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert record["answer"] == evaluate.extract_answer(record["text"])
    assert record["tokens"] == len(ids) and record["truncated"] == (ids[-1] not in stops)
    assert type(record["correct"]) is bool
    assert record["correct"] == (answer is not None
                                 and evaluate.is_correct(record["answer"], answer))  # fmt: skip
