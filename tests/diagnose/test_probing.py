"""probing.py against autograd, against plain full forward passes and loops, and within memory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_model

import probing
import toy
from probing import How

ROOT = Path(__file__).resolve().parent.parent
HOW = How(stop_ids=(3, 5), pad_id=0, vocab_size=VOCABULARY - 4, candidates=12, tau=0.5,
          batch_size=3, tokens=40, progress=False)  # fmt: skip


def rows(seed=0, count=7, vocab=VOCABULARY - 4):
    """Ragged prompts and responses."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab, rng.integers(1, 6)).tolist() for _ in range(count)]
    responses = [rng.integers(0, vocab, rng.integers(1, 14)).tolist() for _ in range(count)]
    return prompts, responses


# ----------------------------------------------------------------------------------- the gradient
def gradient_of_kl(z, log_q):
    """d KL(softmax(z) || q) / dz, by autograd."""
    z = z.clone().requires_grad_()
    log_p = z.log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    return z.grad


def test_the_two_parts_are_those_of_the_gradient_of_the_reverse_kl():
    torch.manual_seed(0)
    z, y = torch.randn(5, 9, dtype=torch.float64), 2 * torch.randn(5, 9, dtype=torch.float64)
    log_q, uniform = y.log_softmax(-1), torch.zeros_like(y).log_softmax(-1)
    both, own = gradient_of_kl(z, log_q), gradient_of_kl(z, uniform)  # uniform: says nothing
    variance, teacher_part, own_part = probing.gradient_parts(z.log_softmax(-1), log_q)
    assert torch.allclose(own_part, own.norm(dim=-1), atol=1e-12)
    assert torch.allclose(teacher_part, (both - own).norm(dim=-1), atol=1e-12)
    p = z.softmax(-1)
    mean = (p * log_q).sum(-1, keepdim=True)
    assert torch.allclose(variance, (p * (log_q - mean) ** 2).sum(-1), atol=1e-12)


def test_only_differences_of_the_teacher_and_ratios_of_the_student_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    parts = probing.gradient_parts(student, teacher)
    for other in (probing.gradient_parts(student - 7, teacher),
                  probing.gradient_parts(student, teacher + 3)):  # fmt: skip
        for a, b in zip(parts, other, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_teacher_that_rules_candidates_out_leaves_numbers_finite():
    teacher = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
    for part in probing.gradient_parts(torch.zeros(2, 2), teacher):
        assert part.isfinite().all()
    assert probing.gradient_parts(torch.zeros(2, 2), teacher)[1][1] == 0  # nothing to tell apart


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 0), (3, 0)), ((), ())])
def test_gradient_parts_refuses_shapes(shapes):
    with pytest.raises(ValueError, match="student_logp_BTK, teacher_logp_BTK"):
        probing.gradient_parts(*map(torch.zeros, shapes))


def test_the_teachers_part_vanishes_as_the_teacher_grows_diffuse():
    """LGR paper, Proposition 1, on real distributions of the toy: a teacher that is blended with
    the uniform distribution has less and less to say, and in the end nothing."""
    w = toy.world("clean")
    (student, tokenizer), (teacher, _) = toy.load(w.student), toy.load(w.teacher)
    problem = toy.problems(1, moves=6, split="test")[0]
    text = toy.dial_response(problem)
    ids = torch.tensor([toy.prompt_ids(tokenizer, problem) + tokenizer(text)["input_ids"]])
    with torch.no_grad():
        own = student(input_ids=ids).logits.double().log_softmax(-1)
        q = teacher(input_ids=ids).logits.double().softmax(-1)
    shares, variances = [], []
    for blend in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0):
        blended = ((1 - blend) * q + blend / q.shape[-1]).log()
        variance, teacher_part, own_part = probing.gradient_parts(own, blended)
        shares.append((teacher_part.sum() / (teacher_part + own_part).sum()).item())
        variances.append(variance.mean().item())
    assert shares[0] > 0.5
    for series in (shares, variances):
        assert all(a > b for a, b in zip(series, series[1:], strict=False)), series
        assert series[-1] < 1e-12 < series[-2]


def test_a_uniform_teacher_read_as_a_model_has_no_part_either():
    student, teacher = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    with torch.no_grad():
        teacher.model.norm.weight.zero_()  # all logits 0
    found = probing.read(student, teacher, *rows(), dataclasses.replace(HOW, vocab_size=VOCABULARY))
    assert (found.teacher_part_F == 0).all() and (found.variance_F == 0).all()
    assert (found.margin_F == 0).all() and (found.own_part_F > 0).any()
    assert np.allclose(found.fidelity_F, 1 / VOCABULARY)


# -------------------------------------------------------------------------------------- lookahead
def test_spread_and_pull_by_hand():
    logp = torch.tensor([[[0.8, 0.1, 0.1]]]).log()
    confidence, ids = torch.tensor([[[1.0, 0.5, 0.0]]]), torch.tensor([[[4, 5, 6]]])
    mean = 0.85
    spread = (0.8 * 0.15**2 + 0.1 * 0.35**2 + 0.1 * 0.85**2) ** 0.5
    for token, pull in ((4, 1 - mean), (5, 0.5 - mean), (6, -mean), (9, 0.0)):
        found = probing.spread_and_pull(logp, confidence, ids, torch.tensor([[token]]))
        assert [x.item() for x in found] == pytest.approx([spread, pull], abs=1e-6)
    # unlikely candidates do not matter, however much their confidence differs
    logp = torch.tensor([[[1.0, 1e-9, 1e-9]]]).log()
    assert probing.spread_and_pull(logp, confidence, ids, ids[..., 0])[0].item() < 1e-3
    nan = torch.full((1, 1, 3), torch.nan)
    assert all(x.isnan() for x in probing.spread_and_pull(logp, nan, ids, ids[..., 0]))


# ---------------------------------------------------------------- against plain forward passes
@torch.no_grad()
def naive(student, teacher, prompts, responses, how):
    """What `read` returns, token by token from full logits of one row at a time."""
    V, K, out = how.vocab_size, how.candidates, []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = torch.tensor([prompt + response])
        logits = [m(input_ids=whole).logits[0, :, :V].float() for m in (student, teacher)]
        for t, token in enumerate(response):
            at = len(prompt) + t - 1
            p = (logits[0][at] / how.temperature).log_softmax(-1)
            q = logits[1][at].log_softmax(-1)
            top_p, top_q = p.topk(K), set(q.topk(K).indices.tolist())
            ids = top_p.indices.tolist()
            shared = [i for i in ids if i in top_q]
            best = sorted((q[i].item() for i in ids[: how.margin_top_k]), reverse=True)
            parts = probing.gradient_parts(p[ids], q[ids])
            entropy = -(p.exp() * p).sum().item()
            line = {
                "row_F": row, "position_F": t,
                "student_logp_F": p[token], "teacher_logp_F": q[token],
                "entropy_F": entropy, "fidelity_F": q.exp().max(), "margin_F": best[0] - best[1],
                "overlap_F": len(shared) / K, "student_mass_F": p[shared].exp().sum(),
                "teacher_mass_F": q[shared].exp().sum(), "variance_F": parts[0],
                "teacher_part_F": parts[1], "own_part_F": parts[2],
                "student_stop_F": p[list(how.stop_ids)].exp().sum(),
                "teacher_stop_F": q[list(how.stop_ids)].exp().sum(),
                "hesitates_F": float(entropy > how.tau), "spread_F": np.nan, "pull_F": np.nan,
            }  # fmt: skip
            if entropy > how.tau:
                confidence = []
                for candidate in ids[: how.group]:
                    prefix = torch.tensor([prompt + response[:t] + [candidate]])
                    after = teacher(input_ids=prefix).logits[0, -1, :V].softmax(-1)
                    confidence.append(after.max().item())
                weight = p[ids[: how.group]].softmax(-1).numpy()
                mean = (weight * confidence).sum()
                line["spread_F"] = (weight * (np.array(confidence) - mean) ** 2).sum() ** 0.5
                line["pull_F"] = 0.0
                if token in ids[: how.group]:
                    line["pull_F"] = confidence[ids.index(token)] - mean
            out.append({k: float(v) for k, v in line.items()})
    return {name: np.array([line[name] for line in out]) for name in out[0]}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_readings_equal_plain_forward_passes_row_by_row(model, temperature):
    teacher = tiny_model("qwen3", seed=5)
    how = dataclasses.replace(HOW, temperature=temperature)
    prompts, responses = rows()
    found = probing.read(model, teacher, prompts, responses, how, lookahead=True)
    expected = naive(model, teacher, prompts, responses, how)
    assert 0 < expected["hesitates_F"].mean() <= 1 and np.isfinite(expected["spread_F"]).any()
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, atol=3e-5, err_msg=name)


def test_neither_the_size_of_passes_nor_lookahead_changes_the_rest():
    student, teacher = tiny_model("qwen3"), tiny_model("llama", seed=5)
    texts = rows(seed=1)
    one = probing.read(student, teacher, *texts, dataclasses.replace(HOW, tokens=10**6))
    for tokens, lookahead in ((1, False), (30, True)):
        how = dataclasses.replace(HOW, tokens=tokens)
        other = probing.read(student, teacher, *texts, how, lookahead=lookahead)
        for f in dataclasses.fields(probing.Readings):
            if f.name not in ("spread_F", "pull_F"):
                a, b = getattr(one, f.name), getattr(other, f.name)
                np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f.name)
        assert np.isnan(other.spread_F).all() == (not lookahead)


def test_stop_tokens_outside_the_shared_vocabulary_have_no_probability():
    how = dataclasses.replace(HOW, stop_ids=(VOCABULARY - 1,))
    found = probing.read(tiny_model("qwen3"), tiny_model("qwen3", seed=1), *rows(), how)
    assert (found.student_stop_F == 0).all() and (found.teacher_stop_F == 0).all()


def test_mean_fidelity_is_the_mean_of_the_readings():
    student, teacher = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    prompts, responses = rows()
    found = probing.read(student, teacher, prompts, responses, HOW)
    mean_B = probing.mean_fidelity(teacher, prompts, responses, HOW, "")
    for row, mean in enumerate(mean_B):
        assert mean == pytest.approx(found.fidelity_F[found.row_F == row].mean(), abs=1e-6)


# --------------------------------------------------------------------------------------- sampling
def test_samples_end_with_a_stop_token_or_the_limit_and_ignore_the_batch_size(model):
    prompts, _ = rows(count=14)
    options = {"max_new_tokens": 9, "seed": 4, "desc": ""}
    responses = probing.sample(model, prompts, HOW, **options)
    for ids in responses:
        assert len(ids) == 9 or ids[-1] in HOW.stop_ids
        assert not set(ids[:-1]) & set(HOW.stop_ids) and max(ids) < HOW.vocab_size
    for batch in (1, 5, 64):
        how = dataclasses.replace(HOW, batch_size=batch)
        assert probing.sample(model, prompts, how, **options) == responses
    assert probing.sample(model, prompts, HOW, **(options | {"seed": 5})) != responses


def test_samples_are_drawn_at_the_temperature():
    model, (prompts, _) = tiny_model("qwen3"), rows(count=6)
    cold = dataclasses.replace(HOW, temperature=1e-3)
    options = {"max_new_tokens": 8, "seed": 0, "desc": ""}
    greedy = probing.rollout.generate(model, prompts, max_new_tokens=8, eos_ids=HOW.stop_ids,
                                      pad_id=0, temperature=0,
                                      vocab_size=HOW.vocab_size)  # fmt: skip
    pairs = zip(greedy.ids_BT, greedy.response_mask_BT, strict=True)
    expected = [ids_T[mask_T].tolist() for ids_T, mask_T in pairs]
    assert probing.sample(model, prompts, cold, **options) == expected
    assert probing.sample(model, prompts, HOW, **options) != expected


def test_batches_hold_every_row_once_and_mark_its_response():
    prompts, responses = rows()
    seen = []
    for numbers, ids_BT, mask_BT in probing.batches(prompts, responses, HOW, "cpu", ""):
        assert len(numbers) == 1 or ids_BT.numel() <= HOW.tokens
        for i, row in enumerate(numbers):
            seen.append(row)
            n = len(prompts[row]) + len(responses[row])
            assert ids_BT[i, :n].tolist() == prompts[row] + responses[row]
            assert ids_BT[i][mask_BT[i]].tolist() == responses[row]
            assert (ids_BT[i, n:] == HOW.pad_id).all()
    assert sorted(seen) == list(range(len(prompts)))


# ----------------------------------------------------------------------------------------- memory
MEMORY = r"""
import json, resource, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from conftest import tiny_model
import probing
V, T = 32768, {tokens}
models = [tiny_model("llama", seed=s, vocab_size=V, max_position_embeddings=20000,
                     num_hidden_layers=1) for s in (0, 1)]
how = probing.How(stop_ids=(3,), pad_id=0, vocab_size=V, tau=1e9, progress=False)
ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(0)).tolist()
probing.read(*models, [[1]], [ids[:64]], how)  # what every call needs, whatever the length
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
probing.read(*models, [[1]], [ids], how)
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
"""


def test_memory_knows_no_tokens_times_vocabulary():
    """8192 tokens and 32768 words: the logits of one model alone would take 1 GiB."""
    text = MEMORY.format(root=str(ROOT), tests=str(ROOT / "tests"), tokens=8192)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) < 300  # MiB
