"""Stop ids as one outcome: every leaf against distributions that are merged by hand, in float64."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model, toy_prompts
from hypothesis import given
from hypothesis import strategies as st
from runs import few_problems, make_run, read_log, sample, score
from transformers import AutoModelForCausalLM

import harness
import lgr
import logprobs
import rollout
import toy
import train
from fast import head

STOPS = [3, 7, 11]
V, D = 23, 6


def merged(logits_V):
    """Log-probs in which the first stop id has the probability of all of them."""
    p_V = logits_V.double().softmax(-1)
    total = p_V[..., STOPS].sum(-1)
    p_V[..., STOPS] = 0.0
    p_V[..., STOPS[0]] = total
    return p_V.log()


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=9), st.data())
def test_a_class_is_one_outcome(logits, data):
    """Nothing is lost, nobody else moves; whatever the ids and their order."""
    ids = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, unique=True))
    z_V = torch.tensor(logits, dtype=torch.float64)
    p_V, found_V = z_V.softmax(-1), logprobs.StopClass(ids)(z_V).softmax(-1)
    others = [v for v in range(len(logits)) if v not in ids]
    assert torch.allclose(found_V[ids[0]], p_V[ids].sum()) and (found_V[ids[1:]] == 0).all()
    assert torch.allclose(found_V[others], p_V[others])


@pytest.mark.parametrize("way", [logprobs, head], ids=["plain", "fast"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_their_gradient(way, temperature):
    """With candidates too; the gradient of all stop ids by autograd through full logits."""
    hidden_BTD, weight_VD = drawn(2, 9, D), drawn(V, D, seed=1) * 2
    ids_BT = torch.tensor([[1, 3, 2, 3, 5, 9, 3, 4, 3], [3, 5, 3, 3, 8, 2, 1, 3, 6]])
    scale_BT = drawn(2, 9, seed=2)
    found = []
    for side in ("ours", "by hand"):
        h, w = hidden_BTD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        if side == "ours":
            more = {} if way is logprobs else {"scale_BT": scale_BT}
            logp_BT = way.token_logprobs(h, w, ids_BT, temperature=temperature, chunk=4,
                                         stop_class=logprobs.StopClass(STOPS), **more)  # fmt: skip
        else:
            p_BTV = (h @ w.T / temperature).softmax(-1).roll(1, dims=1)
            stops_BT = p_BTV[..., STOPS].sum(-1)
            at_BT = p_BTV.gather(2, ids_BT[..., None])[..., 0]
            logp_BT = torch.where(ids_BT == STOPS[0], stops_BT, at_BT).log()
            logp_BT = logp_BT * (torch.arange(9) > 0)
        (scale_BT * logp_BT).sum().backward()
        found.append((logp_BT.detach(), h.grad, w.grad))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)
    assert found[1][2][STOPS].abs().min() > 0, "every stop id has a gradient"


@pytest.mark.parametrize("way", [logprobs, head], ids=["plain", "fast"])
@pytest.mark.parametrize("kind", logprobs.DIVERGENCES)
def test_divergences_and_their_gradient(way, kind):
    h, w = drawn(1, 5, D).requires_grad_(), (drawn(V, D, seed=1) * 2).requires_grad_()
    teacher, teacher_w = drawn(1, 5, D, seed=3), drawn(V, D, seed=4) * 2
    ours_BT = way.token_divergence(h, w, teacher, teacher_w, kind=kind, chunk=2,
                                   stop_class=logprobs.StopClass(STOPS))  # fmt: skip
    ours_BT.sum().backward()
    ours = ours_BT.detach(), h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    index = [v for v in range(V) if v not in STOPS]

    def outcomes(logits):  # 20 ids and the class
        p = logits.softmax(-1)
        return torch.cat([p[..., index], p[..., STOPS].sum(-1, keepdim=True)], dim=-1)

    p, q = outcomes(h @ w.T)[:, :-1], outcomes(teacher @ teacher_w.T)[:, :-1]
    m = (p + q) / 2
    right_BT = {
        "rkl": p * (p / q).log(), "fkl": q * (q / p).log(),
        "jsd": (p * (p / m).log() + q * (q / m).log()) / 2,
    }[kind].sum(-1)  # fmt: skip
    right_BT.sum().backward()
    torch.testing.assert_close(ours[0][:, 1:], right_BT, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours[1:], (h.grad, w.grad), rtol=1e-8, atol=1e-10)


def test_statistics_and_candidates():
    hidden_BTD, weight_VD = drawn(1, 6, D), drawn(V, D, seed=1) * 2
    ids_BT = torch.tensor([[1, 3, 2, 3, 5, 9]])
    candidates_BTK = torch.tensor([3, 2, 20]).expand(1, 6, 3)
    stats = logprobs.token_stats(hidden_BTD, weight_VD, ids_BT, top_k=4, chunk=2,
                                 candidates_BTK=candidates_BTK,
                                 stop_class=logprobs.StopClass(STOPS))  # fmt: skip
    right_BTV = merged(hidden_BTD @ weight_VD.T)[:, :-1]
    assert torch.allclose(stats.logp_BT[:, 1:], right_BTV.gather(2, ids_BT[:, 1:, None])[..., 0])
    assert torch.allclose(stats.max_prob_BT[:, 1:], right_BTV.amax(-1).exp())
    entropy_BT = torch.special.entr(right_BTV.exp()).sum(-1)
    assert torch.allclose(stats.entropy_BT[:, 1:], entropy_BT)
    assert torch.equal(stats.topk_ids_BTK[:, 1:], right_BTV.topk(4).indices)
    assert torch.allclose(stats.candidate_logp_BTK[:, 1:], right_BTV[..., [3, 2, 20]])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_rollouts(temperature):
    """Responses end with the first id and are scored as the class; against full forwards."""
    model = tiny_model("qwen3")
    out = rollout.generate(
        model, [[5, 6], [9, 8, 1], [2]] * 4, max_new_tokens=20, eos_ids=STOPS, pad_id=0, top_k=5,
        temperature=temperature, stop_class=logprobs.StopClass(STOPS),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ended = 0
    for row, mask_T in enumerate(out.response_mask_BT):
        ids = out.ids_BT[row, : int(mask_T.nonzero().max()) + 1]
        with torch.no_grad():
            logits_TV = model(ids[None]).logits[0]
        right_TV = merged(logits_TV / (temperature or 1))
        for t in mask_T.nonzero()[:, 0].tolist():
            assert abs(out.logp_BT[row, t] - right_TV[t - 1, ids[t]]) < 1e-4
            entropy = torch.special.entr(right_TV[t - 1].exp()).sum()
            assert abs(out.entropy_BT[row, t] - entropy) < 1e-4
            assert out.topk_ids_BTK[row, t].tolist() == right_TV[t - 1].topk(5).indices.tolist()
        assert not set(ids[mask_T[: len(ids)]].tolist()) & {7, 11}
        ended += int(ids[-1] == 3)
    assert temperature == 0 or ended > 3


def test_lookahead():
    """The teacher's confidence counts the class as one outcome; against plain forwards."""
    model = tiny_model("qwen3")
    ids_BT = torch.tensor([[4, 5, 6, 8, 9]])
    mask_BT = torch.tensor([[False, True, True, True, True]])
    group_BTK = torch.tensor([3, 20, 30]).expand(1, 5, 3)
    found_BTK = lgr.lookahead_confidence(model, ids_BT, mask_BT, mask_BT, group_BTK,
                                         stop_class=logprobs.StopClass([3, 7, 11, 40, 41, 42]))
    for t in range(1, 5):
        for k, token in enumerate([3, 20, 30]):
            with torch.no_grad():
                logits_V = model(torch.tensor([[*ids_BT[0, :t].tolist(), token]])).logits[0, -1]
            p_V = logits_V.softmax(-1)
            right = max(p_V.max(), p_V[[3, 7, 11, 40, 41, 42]].sum())
            assert abs(found_BTK[0, t, k] - right) < 1e-5


@pytest.fixture(scope="module")
def other_stop(tmp_path_factory):
    """The teacher of a toy world that ends by another id than its student: rows are exchanged."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    world = toy.world("clean")
    shutil.copytree(world.teacher, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    old, new = model.config.eos_token_id, 0  # <|pad|>, as in many base models
    head_VD, embedding_VD = model.get_output_embeddings(), model.get_input_embeddings()
    with torch.no_grad():
        for weight_VD in {id(m.weight): m.weight for m in (head_VD, embedding_VD)}.values():
            weight_VD[[old, new]] = weight_VD[[new, old]].clone()
    model.config.eos_token_id = model.generation_config.eos_token_id = new
    model.save_pretrained(folder)
    return world.student, folder, old, new


FLAGS = ["--method", "opd", "--difficulty", "2", "--prompts-per-step", "6", "--eval-count", "4",
         "--eval-samples", "2", "--steps", "1", "--preset", "toy"]  # fmt: skip


def test_a_teacher_that_ends_otherwise_agrees_on_ending(other_stop):
    student, teacher, old, new = other_stop
    run = make_run(*FLAGS, student=str(student), teacher=str(teacher))
    assert run.stop_ids == sorted((old, new)) and list(run.stop_class) == run.stop_ids
    batch = sample(run)
    ends_BT = torch.isin(batch.ids_BT, torch.tensor(run.stop_ids)) & batch.response_mask_BT
    assert ends_BT.any() and (batch.ids_BT[ends_BT] == run.stop_ids[0]).all()
    scores = score(run, batch)
    assert (scores.logp_BT - batch.logp_BT)[ends_BT].mean() > -1
    with torch.no_grad():
        for row, t in ends_BT.nonzero().tolist():
            p_V = run.teacher(batch.ids_BT[row : row + 1, :t]).logits[0, -1].softmax(-1)
            assert abs(scores.logp_BT[row, t] - p_V[run.stop_ids].sum().log()) < 1e-4
    apart = make_run(*FLAGS, "--stop-class", "off", student=str(student), teacher=str(teacher))
    batch = sample(apart)
    ends_BT = torch.isin(batch.ids_BT, torch.tensor(run.stop_ids)) & batch.response_mask_BT
    assert apart.stop_class is None
    assert (score(apart, batch).logp_BT - batch.logp_BT)[ends_BT].mean() < -5, "it disagrees"


def test_ids_that_the_models_do_not_share_are_no_part_of_it(monkeypatch):
    """A head has no row for them."""
    found = harness.pair.stop_ids
    monkeypatch.setattr(harness.pair, "stop_ids", lambda *models: [0, *found(*models), 10**6])
    run = make_run("--toy", "clean", *FLAGS)
    assert run.stop_ids[-1] == 10**6 and list(run.stop_class) == run.stop_ids[:-1]
    assert train.train_step(run, 0)["loss"] is not None


def test_one_stop_id_is_no_class():
    assert make_run("--toy", "clean", *FLAGS).stop_class is None


def test_the_saved_student_ends_as_it_was_trained(other_stop, tmp_path, monkeypatch):
    student, teacher, old, new = other_stop
    monkeypatch.chdir(tmp_path)
    with few_problems():
        train.main([*FLAGS, "--student", str(student), "--teacher", str(teacher), "--out", "run"])
    saved = json.loads((tmp_path / "run" / "student" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == sorted((old, new))
    model = AutoModelForCausalLM.from_pretrained("run/student")
    tokenizer = harness.load_tokenizer("run/student")
    assert harness.stop_ids(model, tokenizer) == sorted((old, new))
    problems = toy.problems(2, moves=2, split="test")
    out = rollout.generate(model, toy_prompts(tokenizer, problems), max_new_tokens=80,
                           eos_ids=harness.stop_ids(model, tokenizer), pad_id=0)
    assert not out.truncated_B.any() and read_log(tmp_path / "run")[1][-1]["truncated"] == 0
