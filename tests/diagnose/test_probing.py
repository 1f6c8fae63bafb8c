"""probing.py against autograd, against plain full forward passes and loops, and within memory."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_model, toy_prompts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toy
from diagnose import probing
from diagnose.probing import Options
from toy import build

OPTIONS = Options(stop_ids=(3, 5), pad_id=0, vocab_size=VOCABULARY - 4, candidates=12, tau=0.5,
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


def test_the_teachers_part_vanishes_as_the_teacher_grows_diffuse():
    """LGR paper, Proposition 1, on real distributions of the toy: a teacher that is blended with
    the uniform distribution has less and less to say, and in the end nothing."""
    w = toy.world("clean")
    (student, tokenizer), (teacher, _) = build.load(w.student), build.load(w.teacher)
    problem = toy.problems(1, moves=6, split="test")[0]
    prompt, text = toy_prompts(tokenizer, [problem])[0], toy.dial_response(problem)
    ids = torch.tensor([prompt + tokenizer(text)["input_ids"]])
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
    options = dataclasses.replace(OPTIONS, vocab_size=VOCABULARY)
    found = probing.read(student, teacher, *rows(), options)
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
def naive(student, teacher, prompts, responses, options):
    """What `read` returns, token by token from full logits of one row at a time."""
    V, K, out = options.vocab_size, options.candidates, []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = torch.tensor([prompt + response])
        logits = [m(input_ids=whole).logits[0, :, :V].float() for m in (student, teacher)]
        for t, token in enumerate(response):
            at = len(prompt) + t - 1
            p = (logits[0][at] / options.temperature).log_softmax(-1)
            q = logits[1][at].log_softmax(-1)
            top_p, top_q = p.topk(K), set(q.topk(K).indices.tolist())
            ids = top_p.indices.tolist()
            shared = [i for i in ids if i in top_q]
            best = sorted((q[i].item() for i in ids[: options.margin_top_k]), reverse=True)
            parts = probing.gradient_parts(p[ids], q[ids])
            entropy = -(p.exp() * p).sum().item()
            line = {
                "row_F": row, "position_F": t,
                "student_logp_F": p[token], "teacher_logp_F": q[token],
                "entropy_F": entropy, "fidelity_F": q.exp().max(), "margin_F": best[0] - best[1],
                "overlap_F": len(shared) / K, "student_mass_F": p[shared].exp().sum(),
                "teacher_mass_F": q[shared].exp().sum(), "variance_F": parts[0],
                "teacher_part_F": parts[1], "own_part_F": parts[2],
                "student_stop_F": p[list(options.stop_ids)].exp().sum(),
                "teacher_stop_F": q[list(options.stop_ids)].exp().sum(),
                "hesitates_F": float(entropy > options.tau), "spread_F": np.nan, "pull_F": np.nan,
            }  # fmt: skip
            if entropy > options.tau:
                confidence = []
                for candidate in ids[: options.group]:
                    prefix = torch.tensor([prompt + response[:t] + [candidate]])
                    after = teacher(input_ids=prefix).logits[0, -1, :V].softmax(-1)
                    confidence.append(after.max().item())
                weight = p[ids[: options.group]].softmax(-1).numpy()
                mean = (weight * confidence).sum()
                line["spread_F"] = (weight * (np.array(confidence) - mean) ** 2).sum() ** 0.5
                line["pull_F"] = 0.0
                if token in ids[: options.group]:
                    line["pull_F"] = confidence[ids.index(token)] - mean
            out.append({k: float(v) for k, v in line.items()})
    return {name: np.array([line[name] for line in out]) for name in out[0]}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_readings_equal_plain_forward_passes_row_by_row(model, temperature):
    teacher = tiny_model("qwen3", seed=5)
    options = dataclasses.replace(OPTIONS, temperature=temperature)
    prompts, responses = rows()
    found = probing.read(model, teacher, prompts, responses, options, lookahead=True)
    expected = naive(model, teacher, prompts, responses, options)
    assert 0 < expected["hesitates_F"].mean() <= 1 and np.isfinite(expected["spread_F"]).any()
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, atol=3e-5, err_msg=name)


def test_neither_the_size_of_passes_nor_lookahead_changes_the_rest():
    student, teacher = tiny_model("qwen3"), tiny_model("llama", seed=5)
    texts = rows(seed=1)
    one = probing.read(student, teacher, *texts, dataclasses.replace(OPTIONS, tokens=10**6))
    for tokens, lookahead in ((1, False), (30, True)):
        options = dataclasses.replace(OPTIONS, tokens=tokens)
        other = probing.read(student, teacher, *texts, options, lookahead=lookahead)
        for f in dataclasses.fields(probing.Readings):
            if f.name not in ("spread_F", "pull_F"):
                a, b = getattr(one, f.name), getattr(other, f.name)
                np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f.name)
        assert np.isnan(other.spread_F).all() == (not lookahead)


def test_stop_tokens_outside_the_shared_vocabulary_have_no_probability():
    options = dataclasses.replace(OPTIONS, stop_ids=(VOCABULARY - 1,))
    found = probing.read(tiny_model("qwen3"), tiny_model("qwen3", seed=1), *rows(), options)
    assert (found.student_stop_F == 0).all() and (found.teacher_stop_F == 0).all()


def test_mean_fidelity_is_the_mean_of_the_readings():
    student, teacher = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    prompts, responses = rows()
    found = probing.read(student, teacher, prompts, responses, OPTIONS)
    mean_B = probing.mean_fidelity(teacher, prompts, responses, OPTIONS, "")
    for row, mean in enumerate(mean_B):
        assert mean == pytest.approx(found.fidelity_F[found.row_F == row].mean(), abs=1e-6)


# --------------------------------------------------------------------------------------- sampling
def test_samples_end_with_a_stop_token_or_the_limit_and_ignore_the_batch_size(model):
    prompts, _ = rows(count=14)
    limits = {"max_new_tokens": 9, "seed": 4, "desc": ""}
    responses = probing.sample(model, prompts, OPTIONS, **limits)
    for ids in responses:
        assert len(ids) == 9 or ids[-1] in OPTIONS.stop_ids
        assert not set(ids[:-1]) & set(OPTIONS.stop_ids) and max(ids) < OPTIONS.vocab_size
    for batch in (1, 5, 64):
        options = dataclasses.replace(OPTIONS, batch_size=batch)
        assert probing.sample(model, prompts, options, **limits) == responses
    assert probing.sample(model, prompts, OPTIONS, **(limits | {"seed": 5})) != responses


def test_samples_are_drawn_at_the_temperature():
    model, (prompts, _) = tiny_model("qwen3"), rows(count=6)
    cold = dataclasses.replace(OPTIONS, temperature=1e-3)
    limits = {"max_new_tokens": 8, "seed": 0, "desc": ""}
    greedy = probing.rollout.generate(model, prompts, max_new_tokens=8, eos_ids=OPTIONS.stop_ids,
                                      pad_id=0, temperature=0,
                                      vocab_size=OPTIONS.vocab_size)  # fmt: skip
    pairs = zip(greedy.ids_BT, greedy.response_mask_BT, strict=True)
    expected = [ids_T[mask_T].tolist() for ids_T, mask_T in pairs]
    assert probing.sample(model, prompts, cold, **limits) == expected
    assert probing.sample(model, prompts, OPTIONS, **limits) != expected


def test_batches_hold_every_row_once_and_mark_its_response():
    prompts, responses = rows()
    seen = []
    for numbers, ids_BT, mask_BT in probing.batches(prompts, responses, OPTIONS, "cpu", ""):
        assert len(numbers) == 1 or ids_BT.numel() <= OPTIONS.tokens
        for i, row in enumerate(numbers):
            seen.append(row)
            n = len(prompts[row]) + len(responses[row])
            assert ids_BT[i, :n].tolist() == prompts[row] + responses[row]
            assert ids_BT[i][mask_BT[i]].tolist() == responses[row]
            assert (ids_BT[i, n:] == OPTIONS.pad_id).all()
    assert sorted(seen) == list(range(len(prompts)))


# ----------------------------------------------------------------------------------------- memory
class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors made under it that live now, and their highest number."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def count(self, storage):
        key, size = id(storage), storage.nbytes()
        if key not in self.storages:
            self.now += size
            self.storages[key] = weakref.ref(storage, lambda _: self.forget(key, size))

    def forget(self, key, size):
        del self.storages[key]
        self.now -= size


def test_memory_knows_no_tokens_times_vocabulary():
    """A token more takes less than a twentieth of the logits of one model at it."""
    V, peaks = 8192, []
    student, teacher = (
        tiny_model("llama", seed, vocab_size=V, max_position_embeddings=2048, num_hidden_layers=1)
        for seed in (0, 1)
    )
    options = Options(stop_ids=(3,), pad_id=0, vocab_size=V, tau=1e9, progress=False)
    for T in (600, 1800):  # both are more than one chunk of the head
        ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(0)).tolist()
        with LiveBytes() as live:
            probing.read(student, teacher, [[1]], [ids], options)
        peaks.append(live.peak)
    assert 0 < peaks[1] - peaks[0] < 1200 * 4 * V / 20
