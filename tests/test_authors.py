"""LGR as its authors' released script runs it, written down token by token from plain forward
passes (docs/decisions.md, 18 to 23), against `--preset lgr-script`."""

import math
import statistics

import pytest
import torch
from runs import make_run, sample, score

import lgr
import train
from harness import micro_batches

SIZE = ["--toy", "fork", "--difficulty", "2", "--prompts-per-step", "3", "--steps", "8",
        "--max-new-tokens", "40", "--eval-count", "2", "--micro-batch", "2"]  # fmt: skip


def logits_after(model, ids, vocab_size):
    return model(torch.tensor([ids])).logits[0, -1, :vocab_size].double()


def entropy_of_20(logp_V, sampled):
    """Of the top 20, renormalised; a sampled token from outside is in the place of the 20th."""
    ids = logp_V.topk(20).indices.tolist()
    ids = ids if sampled in ids else [*ids[:19], sampled]
    logp_20 = logp_V[ids].log_softmax(-1)
    return -(logp_20.exp() * logp_20).sum().item()


def loss_by_hand(run, batch, kl, gamma, normalize):
    """The authors' loss in float64: token mean per response, then the mean over responses."""
    V, per_response = run.vocab_size, []
    for row, mask_T in enumerate(batch.response_mask_BT):
        ids, per_token = batch.ids_BT[row].tolist(), []
        for t in mask_T.nonzero()[:, 0].tolist():
            student_V = logits_after(run.model, ids[:t], V).log_softmax(-1)
            with torch.no_grad():
                teacher_V = logits_after(run.teacher, ids[:t], V).log_softmax(-1)
            mine = student_V.topk(20).indices.tolist()
            union = [*mine, *(i for i in teacher_V.topk(20).indices.tolist() if i not in mine)]
            rewards = dict.fromkeys(union, 0.0)
            if entropy_of_20(student_V.detach(), ids[t]) > 0.2:
                with torch.no_grad():
                    after = [logits_after(run.teacher, [*ids[:t], c], V).softmax(-1).max().item()
                             for c in mine[:8]]  # fmt: skip
                mean, std = statistics.mean(after), statistics.stdev(after)
                if normalize == "guard" and std > 1e-8:
                    after = [mean + (c - mean) / std for c in after]
                rewards |= {i: c - mean for i, c in zip(mine[:8], after, strict=True)}
            logp_U = student_V[union].log_softmax(-1)
            gain_U = gamma * torch.tensor([rewards[i] for i in union], dtype=torch.float64)
            if kl:
                per_token.append((logp_U.exp() * (logp_U - teacher_V[union].log_softmax(-1)
                                                  - gain_U)).sum())  # fmt: skip
            else:
                per_token.append(-(logp_U.exp() * gain_U).sum())
        per_response.append(sum(per_token) / len(per_token))
    return sum(per_response) / len(per_response)


def gradient(run, loss):
    run.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in run.model.parameters()]).clone()


@pytest.mark.parametrize(
    ("step", "kl", "gamma", "normalize"),
    [(1, 1, 0.0, "mean"), (2, 0, 1.0, "mean"), (2, 0, 1.0, "guard"), (4, 1, 0.0, "mean")],
)
def test_the_script_equals_its_description(step, kl, gamma, normalize):
    run = make_run("--preset", "lgr-script", *SIZE, "--lgr-normalize", normalize)
    assert (run.args.loss_mean, run.args.lgr_alternate, run.args.lgr_gamma) == ("response", 2, 1)
    assert (run.args.lgr_top_k, run.args.union_top_k, run.args.lgr_tau) == (8, 20, 0.2)
    assert run.args.lgr_entropy_top_k == 20
    batch = sample(run)
    scores = score(run, batch)
    _, w_BT = train.weigh(run, batch, scores, step)
    assert scores.trigger_BT.any() and not scores.trigger_BT.all()
    ours = sum(train.loss_of(run, batch, scores, torch.zeros_like(w_BT), w_BT, at)
               for at in micro_batches(batch.response_mask_BT, run.args))  # fmt: skip
    theirs = loss_by_hand(run, batch, kl, gamma, normalize)
    if kl or normalize == "mean":
        assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-4, abs_tol=1e-6)
        ours_P, theirs_P = gradient(run, ours), gradient(run, theirs)
        assert (ours_P - theirs_P).norm() < 1e-3 * theirs_P.norm() and theirs_P.norm() > 1e-6
    else:  # groups that differ by rounding alone are divided by rounding: compare the clear ones
        assert math.isclose(ours.item(), theirs.item(), rel_tol=0.05, abs_tol=1e-3)


def test_guard_by_hand():
    """Divided where the unbiased deviation is above 1e-8, by it and nothing else; else centred."""
    group = torch.tensor([[0.9, 0.5, 0.4, 0.2], [0.5, 0.5, 0.5, 0.5 + 1e-9]], dtype=torch.float64)
    found = lgr.group_reward(group, normalize="guard")
    for row, numbers in enumerate(group.tolist()):
        mean, std = statistics.mean(numbers), statistics.stdev(numbers)
        wanted = [(c - mean) / (std if std > 1e-8 else 1) for c in numbers]
        assert found[row].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-15)


def test_a_difference_has_the_expected_gradient_of_the_centred_level():
    """Over the whole vocabulary: what does not depend on the candidate cancels; so dividing by the
    deviation is all that parts the paper's reward from a difference of confidence."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(12, dtype=torch.float64, generator=generator, requires_grad=True)
    confidence_V = torch.rand(12, dtype=torch.float64, generator=generator)
    before = torch.rand((), dtype=torch.float64, generator=generator)
    rewards = {
        "difference": lgr.difference_reward(confidence_V, before),
        "mean": lgr.group_reward(confidence_V, normalize="mean"),
        "std": lgr.group_reward(confidence_V),
    }
    found = {}
    for name, reward_V in rewards.items():
        # sum over tokens of p(y) r(y) grad log p(y): the policy gradient, without sampling
        logp_V = logits_V.log_softmax(-1)
        (found[name],) = torch.autograd.grad((logp_V.detach().exp() * reward_V * logp_V).sum(),
                                             logits_V)  # fmt: skip
    torch.testing.assert_close(found["difference"], found["mean"], rtol=1e-9, atol=1e-12)
    spread = confidence_V.std().item() + 1e-6
    torch.testing.assert_close(found["std"] * spread, found["mean"], rtol=1e-9, atol=1e-12)


def test_difference_in_a_step():
    """--lgr-shape difference: the teacher's confidence after the candidate minus that before it."""
    run = make_run(*SIZE, "--method", "lgr", "--lgr-shape", "difference")
    batch = sample(run)
    scores = score(run, batch)
    checked = 0
    for row, t in scores.trigger_BT.nonzero().tolist()[:12]:
        ids = batch.ids_BT[row].tolist()
        with torch.no_grad():
            before = logits_after(run.teacher, ids[:t], run.vocab_size).softmax(-1).max()
            for k, c in enumerate(batch.topk_ids_BTK[row, t, :8].tolist()):
                after = logits_after(run.teacher, [*ids[:t], c], run.vocab_size).softmax(-1).max()
                wanted = (after - before).item()
                assert scores.reward_BTK[row, t, k].item() == pytest.approx(wanted, abs=2e-5)
                checked += 1
    assert checked and not scores.reward_BTK[~scores.trigger_BT].any()
    with pytest.raises(ValueError, match="--lgr-shape difference needs --lgr-signal max_prob"):
        make_run(*SIZE, "--method", "lgr", "--lgr-shape", "difference", "--lgr-signal", "entropy")
