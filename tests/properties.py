"""What the property tests share: `prop`, strategies, and what bad input may do."""

import contextlib
import copy
import functools
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from conftest import VOCABULARY, tiny_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from inputs import TEMPLATE, byte_tokenizer
from inputs import tiny_model as model_for
from runs import parse

import masks
import rivals
import rollout
import teachability
import toy
from diagnose import probing
from toy import build

ROOT = Path(__file__).resolve().parent.parent
TIMES = int(os.environ.get("PROPERTIES_TIMES", 1))
INF, NAN = math.inf, math.nan

def prop(*names, examples=50, **strategies):
    """A test with random inputs of these public names."""

    def register(test):
        how = settings(
            max_examples=examples * TIMES, deadline=None, derandomize=TIMES == 1, database=None,
            suppress_health_check=list(HealthCheck),
            # examples of minutes are not made smaller
            phases=[p for p in Phase if p != Phase.shrink or examples >= 20],
        )  # fmt: skip
        return how(given(**strategies)(test))

    return register


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


def refused_or(function, arguments, any_error=False):
    """The result, or None after a ValueError that names an argument, or after any exception if that
    will do: what torch or numpy refuse, leaves do not check again. Arguments stay as they are."""
    plain = {k: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v)
             for k, v in arguments.items()}  # fmt: skip
    try:
        out = function(**arguments)
    except Exception as error:
        named = isinstance(error, ValueError) and any(name in str(error) for name in arguments)
        assert any_error or named, f"names no argument: {error!r}"
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


any_float = st.floats() | st.sampled_from([NAN, INF, -INF, 1e308, -1e308, 5e-324, 0.0])


@functools.cache
def spelling(template):
    """A byte-level tokenizer with a chat template or without, and a model's config."""
    tokenizer = byte_tokenizer(TEMPLATE if template else None)
    return tokenizer, model_for(tokenizer).config


def strict(record):
    """The record, which JSON can say and give back."""
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    return record


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


@functools.cache
def tiny(family, seed=0, **more):
    return tiny_model(family, seed=seed, **more)


class Letters:
    """A tokenizer of 61 ids, some of which end sentences."""

    def decode(self, ids, **options):
        return "".join([". Then", " x", "!", " 3", ""][i % 5] for i in ids)


TOYS = {name: str(toy.world(name).teacher) for name in ("clean", "horizon")}


families = st.sampled_from(["qwen3", "llama", "gpt2"])


def parsed(parse, prog, argv):
    """The flags, or None after an exit with status 2 and one line."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return parse(["--device", "cpu", *argv])
        except SystemExit as error:
            assert error.code == 2 and said.getvalue().count("\n") == 1
            assert said.getvalue().startswith(f"{prog}: error: ")
            return None


texts = st.text(max_size=40) | st.lists(
    st.sampled_from(["So x is 3.", " ", "\n", "Dr. ", "e.g. ", "?", "!", "\0", "é", "e\u0301",
                     "👩‍👩‍👧", "שלום.", "\u3000", "\ud83d", "3.14", "...", "a", "\r", "。", "」",
                     "…", "ไทย ", "- ", "1. ", "**", "$$", "\\[", "\\]", "```", "|"]),
    max_size=12,
).map("".join)  # fmt: skip


@functools.cache
def toy_tokenizer():
    return build.build_tokenizer()


prompts_of_ids = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=5
)


@functools.cache
def splitter():
    return teachability.sentence_splitter("untrained")[0]


RANGES = {
    "student_logp_F": (probing.LOWEST, 0), "teacher_logp_F": (probing.LOWEST, 0),
    "entropy_F": (0, 5), "fidelity_F": (0, 1), "margin_F": (0, -probing.LOWEST),
    "overlap_F": (0, 1), "student_mass_F": (0, 1), "teacher_mass_F": (0, 1),
    "variance_F": (0, 1e4), "teacher_part_F": (0, 50), "own_part_F": (0, 50),
    "student_stop_F": (0, 1), "teacher_stop_F": (0, 1), "hesitates_F": (0, 1),
    "spread_F": (0, 0.5), "pull_F": (-1, 1),
}  # fmt: skip


def near(a, b, wide):
    tolerance = 1e-10 if wide == torch.float64 else 2e-5
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


mask_names = st.sampled_from(["none", "release", *masks.CONTROLS, *rivals.RIVALS])


def options(*argv):
    """Flags parsed, as `train.py` does."""
    return parse(["--toy", "horizon", "--device", "cpu", *argv])


def rollouts(seed, prompts, limit=12, top_k=8):
    """What a tiny student of 61 ids wrote."""
    return rollout.generate(tiny("qwen3", 1), prompts, max_new_tokens=limit, eos_ids=[5, 6],
                            pad_id=0, top_k=top_k, generator=seeded(seed))  # fmt: skip
