"""Properties of the public names of evaluate."""

import contextlib
import functools
import io
import itertools
import math

import pytest
from conftest import VOCABULARY, toy_prompts
from hypothesis import strategies as st
from properties import (
    BAD_NUMBERS,
    INF,
    NAN,
    Letters,
    numbers,
    prop,
    refused_or,
    seeded,
    seeds,
    strict,
    tiny,
    toy_tokenizer,
)

import answers
import evaluate
import toy


@prop("evaluate.pass_at_k", examples=150, n=st.integers(0, 8) | st.sampled_from(BAD_NUMBERS),
      correct=st.integers(0, 8), k=st.integers(0, 8) | st.sampled_from(BAD_NUMBERS))
def test_pass_at_k_counts_subsets(n, correct, k):
    try:
        value = evaluate.pass_at_k(n, correct, k)
    except (ValueError, TypeError):
        assert not (type(n) is type(k) is int and 0 <= correct <= n and 1 <= k <= n)
        return
    subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert math.isclose(value, sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)


@prop("evaluate.bootstrap_interval", examples=100, values=st.lists(numbers | st.sampled_from(
      [NAN, INF]), max_size=6), level=st.sampled_from([0.5, 0.9, *BAD_NUMBERS]), seed=seeds,
      resamples=st.sampled_from([1, 30, 500, 0, -1]))
def test_an_interval_lies_within_the_values(values, level, seed, resamples):
    """Ordered; wider at a higher level; the same for the same seed; shifted by a shift."""
    x = {"values_P": values, "level": level, "resamples": resamples}
    fine = values and all(map(math.isfinite, values)) and 0 < level < 1 and resamples > 0
    if not fine:
        with pytest.raises(ValueError):
            evaluate.bootstrap_interval(**x, seed=seed)
        return
    low, high = interval = evaluate.bootstrap_interval(**x, seed=seed)
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
    tokenizer = toy_tokenizer()
    items = toy.problems(count, moves=1)
    prompts = toy_prompts(tokenizer, items)
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
        assert record["answer"] == answers.extract_answer(record["text"])
    if count * samples <= 4:  # one call of `generate` either way
        again = sample(generator=seeded(seed), **how | {"batch_size": 99})
        assert [[r["text"] for r in records] for records in again] == [
            [r["text"] for r in records] for records in out]  # fmt: skip


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
    assert record["answer"] == answers.extract_answer(record["text"])
    assert record["tokens"] == len(ids) and record["truncated"] == (ids[-1] not in stops)
    assert type(record["correct"]) is bool
    assert record["correct"] == (answer is not None
                                 and answers.is_correct(record["answer"], answer))  # fmt: skip


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
