"""Properties of the public names of measuring."""

import contextlib
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import VOCABULARY
from hypothesis import strategies as st
from properties import INF, NAN, RANGES, Letters, prop, seeds, small, splitter, strict, within

from diagnose import curves, measuring, probing

# -------------------------------------------------------------------------------------- measuring


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
        answered=answered, template={}, lookahead=lookahead, teacher="the teacher",
        options=probing.Options(stop_ids=(5, 6), pad_id=0, vocab_size=VOCABULARY, progress=False),
    )  # fmt: skip
    return job, found, responses




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


@prop("diagnose.measure_margin", "diagnose.measure_signal", examples=80, case=jobs(),
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


@prop("diagnose.measure_lookahead", "diagnose.measure_compatibility", "diagnose.answers",
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
    ended = [response[-1] in job.options.stop_ids for response in responses]
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


@prop("diagnose.measure_completion", "diagnose.handover", examples=80, case=jobs(), seed=seeds,
      parrot=st.booleans())
def test_completions_begin_with_the_student_and_a_parrot_changes_nothing(case, seed, parrot):
    """The parrot is a teacher that goes on as the student did, as sure as it was there."""
    job, found, responses = case
    rng, cut_of = np.random.default_rng(seed), {}

    def sample(model, heads, options, *, max_new_tokens, seed, desc):
        assert model is job.teacher and heads and max_new_tokens >= 1
        cut = job.args.max_new_tokens - max_new_tokens
        cut_of[desc] = cut, [b for b, r in enumerate(responses) if len(r) > cut]
        rows = cut_of[desc][1]
        assert heads == [job.prompts[b] + responses[b][:cut] for b in rows]
        if parrot:
            return [responses[b][cut:] for b in rows]
        return [rng.integers(0, VOCABULARY, rng.integers(1, max_new_tokens + 1)).tolist()
                for _ in rows]  # fmt: skip

    def mean_fidelity(teacher, heads, tails, options, desc):
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


@prop("diagnose.shift", examples=150, one=st.none() | fits(), two=st.none() | fits())
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
