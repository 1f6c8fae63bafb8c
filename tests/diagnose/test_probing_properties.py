"""Properties of the public names of probing."""

import copy
import functools
import math

import numpy as np
import torch
from conftest import VOCABULARY
from hypothesis import strategies as st
from properties import (
    INF,
    NAN,
    RANGES,
    families,
    finite,
    prompts_of_ids,
    prop,
    refused_or,
    seeded,
    seeds,
    small,
    tiny,
)

from diagnose import probing


# ---------------------------------------------------------------------------------------- probing
@prop("diagnose.gradient_parts", examples=150, seed=seeds, K=st.integers(1, 6),
      shape=st.lists(st.integers(0, 3), max_size=2), shift=st.integers(-20, 20),
      equal=st.booleans(), ruled_out=st.sampled_from([0.0, 0.3, 1.0]))
def test_gradient_parts_are_those_of_differences(seed, shape, K, shift, equal, ruled_out):
    """As defined, whatever is ruled out; the teacher's part is none iff it tells nothing apart."""
    g = seeded(seed)
    student_BTK = 2 * torch.randn(*shape, K, generator=g, dtype=torch.float64)
    student_BTK[..., 1:][torch.rand(*shape, K - 1, generator=g) < 0.2] = -INF
    teacher_BTK = torch.randint(-9, 1, (*shape, K), generator=g).double() * (not equal)
    teacher_BTK[torch.rand(*shape, K, generator=g) < ruled_out] = -INF
    arguments = {"student_logp_BTK": student_BTK, "teacher_logp_BTK": teacher_BTK}
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


@prop("diagnose.spread_and_pull", examples=100, seed=seeds, B=small, T=small, K=st.integers(1, 5),
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


def options_of(rng, **more):
    K = int(rng.integers(2, 12))
    return probing.Options(**{
        "stop_ids": (5, 6), "pad_id": int(rng.integers(2)), "vocab_size": VOCABULARY,
        "candidates": K, "margin_top_k": min(4, K), "group": min(3, K), "progress": False,
        "tau": float(rng.choice([0.0, 1.0, 9.0])), "batch_size": int(rng.integers(1, 4)),
        "tokens": int(rng.choice([1, 20, 999])),
    } | more)  # fmt: skip


@prop("diagnose.read", "diagnose.mean_fidelity", "diagnose.batches", "diagnose.Readings",
      examples=25, seed=seeds, prompts=prompts_of_ids, own=families, alike=st.booleans(),
      temperature=st.sampled_from([1.0, 0.5]), margin=st.sampled_from(["logprob", "prob"]),
      stop_ids=st.sampled_from([(5, 6), (), (3, VOCABULARY - 1)]), lookahead=st.booleans())
def test_readings_of_any_responses_lie_in_their_ranges(
    seed, prompts, own, alike, temperature, margin, stop_ids, lookahead
):
    rng = np.random.default_rng(seed)
    V = int(rng.choice([VOCABULARY, 30]))
    options = options_of(
        rng, stop_ids=stop_ids, vocab_size=V, temperature=temperature, margin=margin
    )
    responses = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in prompts]
    teacher = tiny("qwen3", 2)
    student = teacher if alike else tiny(own, 1)
    before = copy.deepcopy((prompts, responses))
    seen = []
    for rows, ids_BT, mask_BT in probing.batches(prompts, responses, options, "cpu", ""):
        seen += rows
        assert len(rows) == 1 or ids_BT.numel() <= options.tokens
        assert [x[m].tolist() for x, m in zip(ids_BT, mask_BT, strict=True)] == [
            responses[row] for row in rows]  # fmt: skip
    assert sorted(seen) == list(range(len(prompts)))
    found = probing.read(student, teacher, prompts, responses, options, lookahead=lookahead)
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
    assert ((found.hesitates_F == 1) == (found.entropy_F > np.float32(options.tau))).all()
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
    mean_B = probing.mean_fidelity(teacher, prompts, responses, options, "")
    right = [found.fidelity_F[found.row_F == b].mean() for b in range(len(prompts))]
    np.testing.assert_allclose(mean_B, right, rtol=0, atol=1e-5)


@prop("diagnose.sample", examples=20, seed=seeds, family=families, limit=st.integers(-1, 6),
      prompts=prompts_of_ids, copies=st.integers(1, 3), stop_ids=st.sampled_from([(5, 6), ()]))
def test_samples_end_and_do_not_depend_on_the_batch_size(
    seed, family, limit, prompts, copies, stop_ids
):
    options, prompts = options_of(np.random.default_rng(seed), stop_ids=stop_ids), prompts * copies
    arguments = {"prompts": prompts, "max_new_tokens": limit, "seed": seed, "desc": ""}
    draw = functools.partial(probing.sample, tiny(family, 1), options=options)
    responses = refused_or(draw, arguments)
    assert (responses is None) == (limit < 1)
    if responses is None:
        return
    assert len(responses) == len(prompts)
    for ids in responses:
        assert ids and (len(ids) == limit or ids[-1] in stop_ids)
        assert not set(ids[:-1]) & set(stop_ids) and 0 <= min(ids) <= max(ids) < VOCABULARY
    other = probing.Options(**vars(options) | {"batch_size": 99})
    assert probing.sample(tiny(family, 1), options=other, **arguments) == responses
