"""Properties of the public names of harness/plan.py."""

import functools
import math

from hypothesis import strategies as st
from properties import prop
from runs import parse
from transformers import LlamaConfig

from harness import plan


@functools.cache
def model(layers: int, width: int, heads: int):
    """Sizes of a Llama without memory."""
    return plan.sizes(LlamaConfig(
        vocab_size=97, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2,
    ))  # fmt: skip


@prop("harness.sizes", "harness.peaks", "harness.peak", "harness.fit", "harness.levers",
      "harness.table", "harness.width", "harness.activations",
      layers=st.integers(1, 3), width=st.sampled_from([8, 32]), method=st.sampled_from(
          ["opd", "release", "lgr", "lgr_topk", "rkl"]), P=st.sampled_from(plan.PROCESSES),
      shard=st.sampled_from(["none", "teacher", "both"]), longest=st.integers(1, 400),
      tokens=st.integers(1, 4096), gib=st.sampled_from([1e-4, 1e-3, 1e-2, 80.0]),
      dtype=st.sampled_from(["float32", "bfloat16"]))  # fmt: skip
def test_more_processes_and_the_flags_that_are_named_never_take_more(
    layers, width, method, P, shard, longest, tokens, gib, dtype
):
    student, teacher = model(layers, width, 4), model(layers + 1, 2 * width, 4)
    assert student.N == student.N_L + student.N_R and student.L == layers
    flags = ["--student", "x", "--method", method, "--max-new-tokens", tokens, "--shard", shard]
    args, how = parse([*flags, "--plan", gib, "--dtype", dtype]), (student, teacher, longest, 8)
    found = plan.peaks(args, P, *how)
    parts = [value for phase in found.values() for value in phase.values()]
    assert min(parts) >= 0 and math.isfinite(sum(parts))
    assert max(sum(phase.values()) for phase in found.values()) <= plan.peak(found) <= sum(parts)
    whole, share = plan.peaks(args, 1, *how), P if shard == "both" else 1
    assert found["always"]["student and moments"] * share == 12 * student.N
    assert found["update"]["gradient"] * share == 4 * student.N
    assert found["sampling"]["keys and values"] <= whole["sampling"]["keys and values"]
    assert found["always"]["teacher"] <= whole["always"]["teacher"]
    if shard == "none":
        assert plan.peak(found) <= plan.peak(whole)
    words = plan.fit(args, P, *how)
    if words != "none of these flags makes it fit":
        new = parse([*flags, "--plan", gib, "--dtype", dtype, *words.split()])
        assert plan.peak(plan.peaks(new, P, *how)) < 0.9 * gib * plan.GIB
        assert words == "" or plan.peak(found) >= 0.9 * gib * plan.GIB
    else:
        ways = [new for _, new in plan.levers(args, longest + tokens)]
        assert min(plan.peak(plan.peaks(new, P, *how)) for new in ways) >= 0.9 * gib * plan.GIB
    assert f"{P} of {gib:g} GiB: {words or 'fits'}" in plan.table(args, *how)
    layer = plan.activations(student, 4, False), plan.activations(student, 4, True)
    assert min(layer) > plan.width(student, 2) > 0 and plan.width(student, 4) == 2 * plan.width(
        student, 2)  # fmt: skip
