"""The rivals' masks against their formulas in plain Python, row by row."""

import math
from types import SimpleNamespace

import pytest
import torch
from runs import make_run, parse, sample, score

import evaluate
import harness
import lgr
import masks
import rivals
import train

LENGTHS = [1, 2, 7, 40, 64, 5]
K = 4


def batch(seed=0):
    """Rows of different lengths behind prompts of different lengths, what a mask may ask for."""
    generator = torch.Generator().manual_seed(seed)
    T = 70
    mask_BT = torch.zeros(len(LENGTHS), T, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        mask_BT[row, 1 + row : 1 + row + length] = True
    shape = mask_BT.shape
    advantage_BT = torch.randn(shape, generator=generator) - 0.3
    advantage_BT[4, 20:60] *= 0.02  # the models agree
    ids_BTK = torch.rand(*shape, 9, generator=generator).argsort(dim=-1)[..., :K]
    other_BTK = torch.rand(*shape, 9, generator=generator).argsort(dim=-1)[..., :K]
    agree = torch.arange(T)[None, :, None] < 40
    seen = {
        "response_mask_BT": mask_BT, "advantage_BT": advantage_BT,
        "logp_BT": -3 * torch.rand(shape, generator=generator),
        "entropy_BT": 2 * torch.rand(shape, generator=generator), "progress": 0.0,
        "candidate_ids_BTK": ids_BTK, "teacher_ids_BTK": torch.where(agree, ids_BTK, other_BTK),
    }  # fmt: skip
    return seen


def rows(seen, *names):
    """The response of every row: lists of numbers by name."""
    for row, mask_T in enumerate(seen["response_mask_BT"]):
        yield row, *(seen[name][row, mask_T].tolist() for name in names)


def check(found_BT, wanted, seen):
    """`wanted`: a list per row, of its response; outside, nothing is supervised."""
    mask_BT = seen["response_mask_BT"]
    assert not found_BT[~mask_BT].any()
    for row, numbers in enumerate(wanted):
        ours = found_BT[row, mask_BT[row]].double()
        torch.testing.assert_close(ours, torch.tensor(numbers).double(), atol=2e-6, rtol=1e-5)


def best(scores, share):
    """Places of that share of the scores, the highest, rounded up."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return set(order[: math.ceil(share * len(scores) - 1e-9)])


def test_iw():
    seen, wanted = batch(), []
    for _, a in rows(seen, "advantage_BT"):
        total, before, weights = sum(map(abs, a)), 0.0, []
        for x in a:
            weights.append(1 + 0.5 * (1 - before / total))
            before += abs(x)
        wanted.append(weights)
    check(masks.apply("iw", seen).keep_BT, wanted, seen)
    seen["advantage_BT"][2] = 0.0  # nothing parts them
    assert (rivals.iw(seen["response_mask_BT"], seen["advantage_BT"])[2, 3:10] == 1.5).all()


@pytest.mark.parametrize("progress", [0.0, 0.33, 1 / 3, 0.9])
def test_reopold(progress):
    seen, wanted = batch() | {"progress": progress}, []
    floor = math.log(0.3 / 0.7)
    for _, a, h in rows(seen, "advantage_BT", "entropy_BT"):
        chosen = best(h, 0.2)
        wanted.append([x >= floor if progress < 1 / 3 else i in chosen for i, x in enumerate(a)])
    found = masks.apply("reopold", seen)
    check(found.keep_BT, wanted, seen)
    assert torch.equal(found.advantage_BT, seen["advantage_BT"].clamp(min=floor))


def test_kat():
    seen, wanted, stopped = batch(), [], []
    for _, a in rows(seen, "advantage_BT"):
        kl = [math.exp(x) - 1 - x for x in a]
        low, end = 0, len(kl)
        for i, x in enumerate(kl):
            low = low + 1 if x < 0.1 * sum(kl) / len(kl) else 0
            if low == 8:
                end = i + 1
                break
        wanted.append([i < end for i in range(len(kl))])
        stopped.append(end < len(kl))
    assert stopped == [False, False, False, False, True, False]
    found = rivals.kat(seen["response_mask_BT"], seen["advantage_BT"], kat_tokens=8)
    check(found.keep_BT, wanted, seen)
    assert found.released_B.tolist() == stopped
    assert rivals.kat(seen["response_mask_BT"], seen["advantage_BT"], kat_tokens=64).keep_BT.equal(
        seen["response_mask_BT"]
    )


def test_models_that_share_nothing_at_first_are_left_out_from_there():
    """0 over 0: the first window has no id in common, so the floor holds from its end on."""
    mask_BT = torch.ones(1, 12, dtype=torch.bool)
    ours, theirs = torch.zeros(1, 12, 2).long(), torch.ones(1, 12, 2).long()
    theirs[:, 8:] = 0
    found = rivals.overlap(mask_BT, ours, theirs, overlap_tokens=4)
    assert found[0].tolist() == [1.0] * 3 + [0.0] * 9


def test_a_token_that_the_teacher_rules_out_is_where_they_differ_most():
    """Not one on which they agree: log p_T is -inf there."""
    a_BT, mask_BT = torch.full((1, 20), -0.5), torch.ones(1, 20, dtype=torch.bool)
    a_BT[0, 5] = -torch.inf
    assert rivals.tip(mask_BT, a_BT, torch.zeros(1, 20), tip_share=0.05)[0].nonzero().item() == 5
    weights = rivals.iw(mask_BT, a_BT)[0]
    assert weights[5] > 1.4 and weights[6] < 1.1, "most of what parts them lies before the sixth"
    a_BT[0, :5], a_BT[0, 6:] = 0.0, 0.0
    kept = rivals.kat(mask_BT, a_BT, kat_tokens=10).keep_BT[0]
    assert kept.tolist() == [True] * 16 + [False] * 4, "ten in a row begin after it"


def test_overlap():
    seen, wanted = batch(), []
    for _, ours, theirs in rows(seen, "candidate_ids_BTK", "teacher_ids_BTK"):
        share = [len(set(x) & set(y)) / K for x, y in zip(ours, theirs, strict=True)]
        lowest, weights = math.inf, []
        for i in range(len(share)):
            if i + 1 >= 5:
                lowest = min(lowest, sum(share[i - 4 : i + 1]) / 5)
            weight = 1.0 if lowest == math.inf else min(lowest / (sum(share[:5]) / 5), 1)
            weights.append(weight if weight >= 0.6 else 0.0)
        wanted.append(weights)
    assert any(0 < x < 1 for x in wanted[3]) and wanted[4][-1] == 0 and set(wanted[2]) == {1.0}
    found = rivals.overlap(*(seen[k] for k in ("response_mask_BT", "candidate_ids_BTK",
                                              "teacher_ids_BTK")),
                          overlap_tokens=5, overlap_floor=0.6)  # fmt: skip
    check(found, wanted, seen)


def test_tip():
    seen, wanted = batch(), []
    for _, a, h in rows(seen, "advantage_BT", "entropy_BT"):
        h = [x / max(h) for x in h]
        d = [abs(x) / max(map(abs, a)) for x in a]
        chosen = best([1 - (1 - x) * (1 - y) for x, y in zip(h, d, strict=True)], 0.5)
        wanted.append([i in chosen for i in range(len(a))])
    check(masks.apply("tip", seen).keep_BT, wanted, seen)


def test_no_teacher():
    seen, wanted, advantages = batch(), [], []
    for _, logp, h in rows(seen, "logp_BT", "entropy_BT"):
        chosen = best([-x for x in logp], 0.2)
        low, high = min(h[i] for i in chosen), max(h[i] for i in chosen)
        wanted.append([i in chosen for i in range(len(h))])
        advantages.append([-0.5 - (x - low) / (2 * (high - low)) if high > low else -0.5
                           for x in h])  # fmt: skip
    found = masks.apply("no_teacher", seen)
    check(found.keep_BT, wanted, seen)
    check(found.advantage_BT * found.keep_BT,
          [[a * k for a, k in zip(*row, strict=True)]
           for row in zip(advantages, wanted, strict=True)], seen)  # fmt: skip


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_rows_alone_decide_and_bad_numbers_stay_out(name):
    """Other rows, more padding, a token that the teacher rules out: nothing else changes."""
    seen = batch()
    whole = masks.apply(name, seen)
    for row in range(len(LENGTHS)):
        alone = masks.apply(name, {k: v[row : row + 1] if torch.is_tensor(v) else v
                                   for k, v in seen.items()})  # fmt: skip
        torch.testing.assert_close(alone.keep_BT, whole.keep_BT[row : row + 1], atol=1e-6, rtol=0)
    seen["advantage_BT"][3, 10] = -math.inf
    outside = ~seen["response_mask_BT"]
    for value in (seen["advantage_BT"], seen["entropy_BT"], seen["logp_BT"]):
        value[outside] = 99.0
    found = masks.apply(name, seen)
    assert found.keep_BT.isfinite().all() and not found.keep_BT[outside].any()
    for row in (0, 1, 2, 4, 5):
        torch.testing.assert_close(found.keep_BT[row], whole.keep_BT[row], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_a_step_with_each(name):
    """Through the loop: the mask sees the batch as it is, and its advantage is the one used."""
    run = make_run("--toy", "varied", "--steps", "3", "--prompts-per-step", "5", "--method", name,
                   "--micro-batch", "2", "--difficulty", "3", "--eval-count", "4")  # fmt: skip
    rollout = sample(run)
    scores = score(run, rollout)
    mask_BT, a_BT = rollout.response_mask_BT, scores.logp_BT - rollout.logp_BT
    with torch.no_grad():
        logits_BTV = run.teacher(rollout.ids_BT).logits.roll(1, dims=1)[..., : run.vocab_size]
    seen = {"response_mask_BT": mask_BT, "logp_BT": rollout.logp_BT, "advantage_BT": a_BT,
            "entropy_BT": rollout.entropy_BT, "progress": 0.0,
            "candidate_ids_BTK": rollout.topk_ids_BTK,
            "teacher_ids_BTK": logits_BTV.topk(4, dim=-1).indices}  # fmt: skip
    wanted = masks.apply(name, seen)
    torch.testing.assert_close(scores.keep_BT.float(), wanted.keep_BT.float(), atol=1e-5, rtol=0)
    A_BT, w_BT = train.weigh(run, rollout, scores, 0)
    own_BT = a_BT if wanted.advantage_BT is None else wanted.advantage_BT
    used_BT = scores.keep_BT > 0
    torch.testing.assert_close(A_BT[used_BT], own_BT[used_BT].clamp(-10, 10), atol=1e-5, rtol=0)
    weights_BT = scores.keep_BT.float() / scores.keep_BT.float().sum()
    torch.testing.assert_close(w_BT, weights_BT)
    line = train.train_step(run, 0)
    assert line["kept_tokens"] == int(used_BT.sum()) > 0 and line["grad_norm"] > 0


def test_an_advantage_of_its_own_needs_the_policy_gradient():
    for name in rivals.OWN_ADVANTAGE:
        with pytest.raises(ValueError, match=f"--mask {name} has its own advantage"):
            train.needs(parse(["--mask", name, "--objective", "rkl"]))


# ------------------------------------------------------------- stopping to sample, and what is paid
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, [40] * 5), ("16", [16] * 5), ("0.5", [20] * 5), ("1.0", [40] * 5), (".001", [1] * 5),
        ("10-30", [10, 15, 20, 25, 30]), ("0.25-1.0", [10, 18, 25, 32, 40]),
        ("40-1", [40, 30, 20, 11, 1]),
    ],
)  # fmt: skip
def test_the_longest_response_of_a_training_step(text, wanted):
    args = SimpleNamespace(train_tokens=text, max_new_tokens=40, steps=5)
    assert [harness.train_tokens(args, step) for step in range(5)] == wanted


@pytest.mark.parametrize("text", ["0", "-3", "41", "1-41", "1.5", "x", "1-2-3", "1e3", "5 "])
def test_a_bad_length_is_refused_before_weights_load(text, capsys):
    flags = ["--toy", "varied", "--max-new-tokens", "40", f"--train-tokens={text}"]
    with pytest.raises(SystemExit) as ended:
        train.main([*flags, "--out", "/tmp/never-written"])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and f"--train-tokens {text}" in said[-1]


def test_training_is_cut_off_and_evaluation_is_not():
    """Short responses are the beginnings of some, and the evaluation's limit stays."""
    run = make_run("--toy", "varied", "--steps", "3", "--prompts-per-step", "4", "--eval-count",
                   "4", "--difficulty", "3", "--train-tokens", "7-9")  # fmt: skip
    for step, limit in enumerate((7, 8, 9)):
        rollout = sample(run, step)
        assert rollout.response_mask_BT.sum(dim=1).tolist() == [limit] * 4
        assert rollout.truncated_B.all()
    assert evaluate.on_held_out(run, 0)["mean_tokens"] > 40


@pytest.mark.parametrize("method", ["opd", "release", "lgr", "random"])
def test_tokens_that_a_step_has_cost(method, monkeypatch):
    """Counted where they are read: by the student's sampling, the teacher, the update."""
    flags = ["--toy", "fork" if method == "lgr" else "varied", "--steps", "2", "--eval-count", "4",
             "--difficulty", "6", "--prompts-per-step", "6", "--updates-per-rollout", "2"]
    run = make_run(*flags, "--method", method, "--micro-batch", "1", "--fast", "off")
    read = {"teacher": 0, "student": 0}

    def count(name):
        def hook(module, args, kwargs):
            ids = kwargs["input_ids"]
            if name == "teacher" or torch.is_grad_enabled():
                read[name] += ids.numel()
        return hook

    for name, model in (("teacher", run.teacher), ("student", run.model)):
        model.base_model.register_forward_pre_hook(count(name), with_kwargs=True)
    monkeypatch.setattr(lgr, "_slices", lambda leaf_BTK, nodes: (  # a leaf at a time: no padding
        tuple(x[None] for x in leaf) for leaf in leaf_BTK.nonzero()))  # fmt: skip
    line = train.train_step(run, 0)
    rollout = sample(run)
    assert line["tokens"]["sampled"] == int(rollout.response_mask_BT.sum())
    assert line["tokens"]["scored"] == read["teacher"]
    assert line["tokens"]["trained"] == read["student"]
    whole = int((rollout.ids_BT.shape[1] - rollout.response_mask_BT.flip(1).int().argmax(1)).sum())
    if method == "lgr":
        assert line["tokens"]["scored"] > whole
    else:
        assert line["tokens"]["scored"] == whole
    assert (line["tokens"]["trained"] < 2 * whole) or method != "release"


@pytest.mark.parametrize(
    ("flags", "fixed"),
    [
        (["--mask", "reopold"], True), (["--train-tokens", "5-9"], True),
        (["--mask", "iw"], False), (["--train-tokens", "5"], False),
    ],
)  # fmt: skip
def test_what_moves_over_a_run_ties_it_to_its_steps(flags, fixed, tmp_path):
    """Else a resumed run would not be the one that was interrupted."""

    def resumed(steps):
        return make_run("--toy", "varied", "--difficulty", "2", "--prompts-per-step", "2",
                        "--steps", steps, *flags)  # fmt: skip

    run = resumed("4")
    config = {"flags": vars(run.args), "problems_sha256": run.fingerprint()}
    assert run.find_resume(tmp_path, config)[0] is config
    if fixed:
        with pytest.raises(ValueError, match="other flags: --steps 4, now 6"):
            resumed("6").find_resume(tmp_path, config)
    else:
        assert resumed("6").find_resume(tmp_path, config)[0] is config
