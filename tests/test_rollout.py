"""rollout.generate against `model.generate`, full forwards and exact frequencies.

`decode`: the plain step, and the fast one that may stand in for it.
"""

import math

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_model
from inputs import many_logits

import rollout
from fast.decode import decode as fast_decode
from fast.decode import fits

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3], [3, 3], [2, 2, 2, 2], [40], [41, 8]]
EOS = [11, 12, 13]


@pytest.fixture(params=["plain", "fast"])
def decode(request):
    return fast_decode if request.param == "fast" else None


def sample(model, prompts=PROMPTS, **more):
    """`generate` with the defaults of these tests and a fresh generator of a given seed."""
    seed = more.pop("seed", 0)
    settings = {"max_new_tokens": 24, "eos_ids": EOS, "pad_id": 0} | more
    return rollout.generate(
        model, prompts, generator=torch.Generator().manual_seed(seed), **settings
    )


def response(out, row):
    """The response ids of one row."""
    return out.ids_BT[row][out.response_mask_BT[row]].tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [None, 3, 1])
def test_greedy_equals_generate_row_by_row(model, implementation, batch_size, decode):
    model.config._attn_implementation = implementation
    out = sample(model, temperature=0, batch_size=batch_size, decode=decode)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=EOS,
            pad_token_id=0,
        )[0]
        used = len(prompt) + len(response(out, row))
        assert out.ids_BT[row, :used].tolist() == expected.tolist()
        assert not out.response_mask_BT[row, : len(prompt)].any()
        assert (out.ids_BT[row, used:] == 0).all()
        assert out.truncated_B[row] == (expected[-1].item() not in EOS)
        lengths.add(used - len(prompt))
    assert len(lengths) > 1, "rows must end at different steps, or retiring is not tested"


@pytest.mark.parametrize("batch_size", [None, 3])
def test_progress_is_told_of_every_token_and_every_end(batch_size):
    """After every step; with slots that are refilled, too."""
    told = []
    out = sample(tiny_model("qwen3"), batch_size=batch_size, progress=lambda *now: told.append(now))
    lengths = out.response_mask_BT.sum(1)
    assert sum(tokens for tokens, _ in told) == lengths.sum()
    assert sum(ended for _, ended in told) == len(PROMPTS) and 24 in lengths.tolist()
    assert max(tokens for tokens, _ in told) == (batch_size or len(PROMPTS))
    if batch_size is None:  # step n draws a token of every response that is not shorter
        assert [tokens for tokens, _ in told] == [int((lengths > n).sum()) for n in range(24)]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_statistics_equal_one_full_forward(model, temperature, decode):
    out = sample(model, temperature=temperature, top_k=5, batch_size=3, decode=decode)
    for row, prompt in enumerate(PROMPTS):
        used = len(prompt) + len(response(out, row))
        with torch.no_grad():
            logits_TV = model(out.ids_BT[row : row + 1, :used]).logits[0]
        logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        for t in range(len(prompt), used):
            here = logp_TV[t - 1]
            assert abs(out.logp_BT[row, t] - here[out.ids_BT[row, t]]) < 1e-4
            assert abs(out.entropy_BT[row, t] + (here.exp() * here).sum()) < 1e-4
            best = here.topk(5)
            assert torch.allclose(here[out.topk_ids_BTK[row, t]], best.values, atol=1e-4)
        outside = ~out.response_mask_BT[row]
        assert (out.logp_BT[row][outside] == 0).all() and (out.entropy_BT[row][outside] == 0).all()


def test_token_n_of_row_b_is_drawn_by_number_b_n_of_the_generator(model, decode):
    """The inverse of the cumulative distribution of full forwards, number by number: from the
    generator that is given, or else the global one."""
    for given in (True, False):
        g = torch.Generator().manual_seed(3)
        torch.manual_seed(3)
        out = rollout.generate(
            model.double(), PROMPTS, max_new_tokens=9, eos_ids=EOS, pad_id=0, batch_size=3,
            generator=g if given else None, decode=decode,
        )  # fmt: skip
        uniform_BN = torch.rand(
            len(PROMPTS), 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        with torch.no_grad():
            prob_BTV = model(out.ids_BT).logits.softmax(-1).numpy()
        for row, prompt in enumerate(PROMPTS):
            for n, token in enumerate(response(out, row)):
                cdf_V = np.cumsum(prob_BTV[row, len(prompt) + n - 1])
                assert token == np.searchsorted(cdf_V, uniform_BN[row, n].item(), side="right")


def test_response_mask_includes_the_stop_token(model, decode):
    out = sample(model, max_new_tokens=60, decode=decode)
    stopped = [row for row in range(len(PROMPTS)) if not out.truncated_B[row]]
    assert stopped, "some row must stop by itself"
    for row in stopped:
        ids = response(out, row)
        assert ids[-1] in EOS and not set(ids[:-1]) & set(EOS)


def test_a_stop_token_in_the_last_place_is_no_truncation(model):
    anything = range(VOCABULARY)
    assert not sample(model, max_new_tokens=1, eos_ids=anything).truncated_B.any()
    assert sample(model, max_new_tokens=1, eos_ids=[]).truncated_B.all()


def test_sampled_frequencies_match_the_softmax():
    """Chi-square over 40,000 draws of one position; with the seed fixed the verdict is fixed too,
    and a right sampler fails it for one seed in a million (Wilson-Hilferty, z = 4.75)."""
    model, draws = tiny_model("qwen3", vocab_size=17), 40_000
    out = rollout.generate(
        model, [[3, 4]] * draws, max_new_tokens=1, eos_ids=[], pad_id=0, top_k=1,
        generator=torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        expected = draws * torch.softmax(model(torch.tensor([[3, 4]])).logits[0, -1], -1).double()
    counts = torch.bincount(out.ids_BT[:, 2], minlength=17).double()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = 16
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(z) < 4.75, f"chi2 {chi2:.1f} on {freedom} degrees of freedom"
    # the same statistic rejects a sampler that cuts the least likely half of the vocabulary
    cut = expected.clone()
    cut[expected.argsort()[:8]] = 0
    cut *= draws / cut.sum()
    assert ((cut - expected) ** 2 / expected).sum() > 2 * chi2 + 100


def test_same_seed_same_rollouts_other_seed_others(model):
    first, again, other = sample(model), sample(model), sample(model, seed=1)
    for mine, same in zip(vars(first).values(), vars(again).values(), strict=True):
        assert torch.equal(mine, same)
    assert response(first, 0) != response(other, 0)


def test_greedy_rollouts_draw_no_numbers(model):
    state = torch.get_rng_state()
    g = torch.Generator().manual_seed(5)
    for generator in (None, g):
        rollout.generate(
            model, PROMPTS, max_new_tokens=2, eos_ids=EOS, pad_id=0, temperature=0,
            generator=generator,
        )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(g.get_state(), torch.Generator().manual_seed(5).get_state())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_neighbours(model, temperature, decode):
    """Whatever the batch size, the order of refilling and the other rows.  In float64 the noise of
    batched matrix products is too small to flip a draw."""
    model = model.double()
    whole = sample(model, temperature=temperature, decode=decode)
    for batch_size in (1, 3):
        out = sample(model, temperature=temperature, decode=decode, batch_size=batch_size)
        assert [response(out, r) for r in range(len(PROMPTS))] == [
            response(whole, r) for r in range(len(PROMPTS))
        ]
    half = sample(model, PROMPTS[:3], temperature=temperature, decode=decode)
    assert [response(half, r) for r in range(3)] == [response(whole, r) for r in range(3)]


def test_cumulative_sum_never_draws_an_impossible_token():
    """At both ends of [0, 1): tokens of probability 0 (here ids 0, 2, 4) stay undrawn."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(2, 1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token, logp, entropy, topk = rollout.sample_token(logits, 1.0, uniform, 2)
    assert token.tolist() == [1, 3]
    assert torch.allclose(entropy, torch.tensor(2.0).log()) and sorted(topk[0].tolist()) == [1, 3]


def test_the_cumulative_sum_tells_tiny_probabilities_apart():
    """A thousand tokens of 1e-9 each at the end, far below the step of float32 at 1."""
    prob_V = torch.cat([torch.tensor([1 - 1e-6]).double(), torch.full((1000,), 1e-9).double()])
    uniform_S = 1 - torch.tensor([1e-6, 5.005e-7, 0.005e-7], dtype=torch.float64)
    token_S, *_ = rollout.sample_token(prob_V.log().expand(3, -1), 1.0, uniform_S + 1e-13, 1)
    assert (token_S - torch.tensor([1, 500, 1000])).abs().max() <= 1


def test_vocab_size_cuts_the_distribution(model):
    cut = 20
    out = sample(model, [[5, 6], [VOCABULARY - 1]], vocab_size=cut, eos_ids=[], top_k=3)
    ids = out.ids_BT[out.response_mask_BT]  # a prompt may hold what is not sampled
    assert ids.max() < cut and out.topk_ids_BTK.max() < cut
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(out.ids_BT[:1]).logits[0, :, :cut], dim=-1)
    assert abs(out.logp_BT[0, 2] - logp_TV[1, out.ids_BT[0, 2]]) < 1e-4


@pytest.fixture
def rows_seen(model, decode):
    """How many rows the model's head got, call by call, after the comparison of the fast step with
    the plain one: two calls on one row."""
    seen, skip = [], 2 if decode and fits(model) else 0

    def count(module, inputs, output):
        nonlocal skip
        if skip == 0:
            seen.append(inputs[0].shape[0])
        skip = max(skip - 1, 0)

    model.get_output_embeddings().register_forward_hook(count)
    return seen


def test_finished_rows_leave_the_batch(model, decode, rows_seen):
    """Work follows the live rows."""
    out = sample(model, max_new_tokens=40, decode=decode)
    assert sum(rows_seen) == out.response_mask_BT.sum().item()


def test_refilling_keeps_the_slots_busy(model, decode, rows_seen):
    """With 2 slots for 7 rows no step runs empty, and never more than 2 rows decode at once."""
    out = sample(model, batch_size=2, decode=decode)
    assert max(rows_seen) == 2 and sum(rows_seen) == out.response_mask_BT.sum().item()
    # all but the tail, where fewer rows than slots are left, ran full
    assert rows_seen == sorted(rows_seen, reverse=True)


def test_a_step_reads_no_more_columns_than_its_longest_row_has(model):
    """Through the hook: one token per live row and step, each in the column behind the last, and
    the width follows the rows down when the longest has ended."""
    calls = []

    def watch(model, cache, step):
        def watched(token_S, column_S, width):
            calls.append((token_S.tolist(), column_S.tolist(), width))
            return step(token_S, column_S, width)

        return watched

    out = sample(model, batch_size=2, decode=watch)
    assert all(width == max(columns) + 1 for _, columns, width in calls)
    widths = [width for *_, width in calls]
    assert any(later < width for width, later in zip(widths, widths[1:], strict=False))
    fed = sorted(pair for tokens, columns, _ in calls for pair in zip(columns, tokens, strict=True))
    inputs = [
        (t - 1, out.ids_BT[row, t - 1].item()) for row, t in out.response_mask_BT.nonzero().tolist()
    ]
    assert fed == sorted(inputs)


def test_prompts_are_read_some_at_a_time(model, monkeypatch):
    """No pass takes more rows than fit into PREFILL tokens, or one; the rollouts are the same."""
    prompts, rows = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11, 12, 13, 14]], []
    how = {"max_new_tokens": 6, "eos_ids": [0], "pad_id": 0, "temperature": 0}
    whole = rollout.generate(model, prompts, **how)
    forward = type(model.base_model).forward

    def noting(self, input_ids, **kwargs):
        rows.extend([len(input_ids)] * (input_ids.shape[1] > 1))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", noting)
    for tokens, wanted in ((2**14, [4]), (8, [2, 2]), (1, [1, 1, 1, 1])):
        monkeypatch.setattr(rollout, "PREFILL", tokens)
        rows.clear()
        some = rollout.generate(model, prompts, **how)
        assert rows == wanted and torch.equal(some.ids_BT, whole.ids_BT)


@pytest.mark.parametrize("decode", [None, fast_decode])
def test_the_cache_grows_with_the_rows_that_need_it_and_changes_nothing(decode, monkeypatch):
    """All rows but one end early: the cache holds as many columns for one row, not for all."""
    model, sizes = tiny_model("qwen3"), []

    def generate():
        def early(model, cache, step):
            inner = decode(model, cache, step) if decode else step

            def forced(token_S, column_S, width):
                logits_SV = inner(token_S, column_S, width)
                logits_SV[:, 7] = -100.0
                logits_SV[1:, 7] = torch.where(column_S[1:] > 20, 100.0, -100.0)
                sizes.append(sum(buffer.numel() for buffer in cache.layers.values()))
                return logits_SV

            return forced

        how = {"eos_ids": [7], "pad_id": 0, "decode": early, "batch_size": 6}
        draw = torch.Generator().manual_seed(0)
        return rollout.generate(model, [[1, 2, 3]] * 9, max_new_tokens=120, generator=draw, **how)

    whole, full = generate(), max(sizes)
    sizes.clear()
    monkeypatch.setattr(rollout, "BLOCK", 16)
    grown = generate()
    for name in ("ids_BT", "response_mask_BT", "topk_ids_BTK", "truncated_B"):
        assert torch.equal(getattr(whole, name), getattr(grown, name))
    assert torch.allclose(whole.logp_BT, grown.logp_BT, atol=1e-5)
    assert grown.truncated_B.sum() == 1 and whole.response_mask_BT.sum(dim=1).max() == 120
    assert max(sizes) < 0.45 * full


def test_slots_are_refilled_in_groups_of_a_quarter(monkeypatch):
    """With 8 slots a prefill waits for two free ones, except for the last prompt."""
    groups, prefill = [], rollout.prefill
    monkeypatch.setattr(
        rollout, "prefill",
        lambda model, cache, ids_SQ, first: groups.append(len(ids_SQ))
        or prefill(model, cache, ids_SQ, first=first),
    )  # fmt: skip
    sample(tiny_model("llama"), [[1, 2, 3]] * 21, batch_size=8)
    assert groups[0] == 8 and min(groups[1:-1]) >= 2 and sum(groups) == 21


def test_under_autocast_the_cache_is_in_its_type(model, decode, monkeypatch):
    """A float32 model sampled in bfloat16: the cache is half as large, and what is recorded is what
    one forward under autocast gives, to bfloat16's precision."""
    made = []

    class Watched(rollout.SlotCache):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(rollout, "SlotCache", Watched)
    with torch.autocast("cpu", torch.bfloat16):
        out = sample(model, max_new_tokens=40, decode=decode)
        logits_BTV = model(out.ids_BT).logits
    assert {buffer.dtype for buffer in made[0].layers.values()} == {torch.bfloat16}
    logp_BTV = torch.log_softmax(logits_BTV[:, :-1].float(), -1)
    logp_BT = logp_BTV.gather(2, out.ids_BT[:, 1:, None])[..., 0]
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1)
    inside_BT = out.response_mask_BT[:, 1:]
    for theirs, ours in ((logp_BT, out.logp_BT), (entropy_BT, out.entropy_BT)):
        assert (theirs - ours[:, 1:])[inside_BT].abs().mean() < 0.1
    assert not model.training


@pytest.mark.parametrize("autocast", [False, True])
def test_statistics_of_a_draw_are_float32(autocast):
    """Entropy and log-prob against float64, also under autocast and at the edge, 0 log 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 999, generator=generator)
    logits[0, :500] = -math.inf
    uniform = torch.rand(5, generator=generator, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        token, logp, entropy, _ = rollout.sample_token(logits, 0.7, uniform, 3)
    prob = torch.softmax(logits.double() / 0.7, dim=-1)
    assert torch.allclose(entropy.double(), torch.special.entr(prob).sum(-1), atol=1e-5, rtol=1e-5)
    assert torch.allclose(logp.double(), prob.gather(1, token[:, None])[:, 0].log(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_statistics_of_a_draw_from_262144_tokens(temperature, dtype):
    """float32 sums over so many tokens would lose up to 1e-3 nats."""
    logits = many_logits().to(dtype)
    uniform = torch.full((len(logits),), 0.5, dtype=torch.float64)
    token, logp, entropy, _ = rollout.sample_token(logits, temperature, uniform, 3)
    right = (logits.double() / (temperature or 1)).log_softmax(dim=-1)
    assert (entropy - torch.special.entr(right.exp()).sum(-1)).abs().max() < 3e-5
    assert (logp - right.gather(1, token[:, None])[:, 0]).abs().max() < 3e-5


def test_entropy_of_the_likeliest_tokens_and_the_sampled_one():
    """The authors' set (docs/decisions.md, 18): the sampled token is in it, whatever its rank."""
    logits_V, outside = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2, set()
    for uniform in (0.1, 0.3, 0.5, 0.7, 0.9):
        how = logits_V[None], 1.0, torch.tensor([uniform], dtype=torch.float64), 3
        token_S, logp_S, entropy_S, topk_SK = rollout.sample_token(*how, entropy_top_k=5)
        ids = logits_V.topk(5).indices.tolist()
        outside.add(token_S.item() not in ids)
        if token_S.item() not in ids:
            ids[-1] = token_S.item()
        weights = [math.exp(x) for x in logits_V[ids].tolist()]
        shares = [x / sum(weights) for x in weights]
        by_hand = -sum(x * math.log(x) for x in shares)
        assert math.isclose(entropy_S.item(), by_hand, rel_tol=1e-5)
        plain = rollout.sample_token(*how)
        assert (token_S, logp_S, topk_SK.tolist()) == (*plain[:2], plain[3].tolist())
    assert outside == {True, False}


@pytest.mark.parametrize("ends", ["well", "with an error", "with an interrupt"])
def test_training_mode_is_restored_and_dropout_does_not_act(ends):
    """Also after an error; and gradient checkpointing, on in training mode, does not act either."""
    model = tiny_model("gpt2")
    expected = sample(model)
    assert not model.training
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    if ends == "well":
        assert torch.equal(sample(model).ids_BT, expected.ids_BT)
    else:
        error = KeyboardInterrupt if ends == "with an interrupt" else RuntimeError

        def fail(model, cache, step):
            def failing(*args):
                assert not model.training
                raise error

            return failing

        with pytest.raises(error):
            sample(model, decode=fail)
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[]]}, r"prompts\[0\] is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens=0.* out of range"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1.* out of range"),
        ({"temperature": -1.0}, "temperature=-1.0.* out of range"),
        ({"temperature": math.nan}, "temperature=nan.* out of range"),
        ({"temperature": 1e-320}, "non-finite logits"),
        ({"batch_size": -1}, "batch_size=-1.* out of range"),
        ({"vocab_size": -1}, "vocab_size=-1.* out of range"),
    ],
)
def test_what_would_be_silently_wrong_is_a_value_error(change, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_model("qwen3"), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": []}, {"prompts": [[1], [VOCABULARY]]}, {"prompts": [[1], [-1]]},
        {"prompts": [[1.5]]}, {"prompts": [[1], [2.0, 3]]}, {"max_new_tokens": 2.5},
        {"top_k": -1}, {"top_k": VOCABULARY + 1}, {"vocab_size": 0}, {"eos_ids": 5},
        {"batch_size": 2.5}, {"pad_id": VOCABULARY},
    ],
    ids=str,
)  # fmt: skip
def test_other_bad_arguments_raise_what_torch_raises(change):
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)):
        sample(tiny_model("qwen3"), **change)


def test_a_model_without_a_plain_cache_is_refused(monkeypatch):
    """It would continue from its last token alone, and look as if it worked."""
    forgetful = tiny_model("qwen3")
    forward = forgetful.forward
    monkeypatch.setattr(forgetful, "forward", lambda input_ids, **_: forward(input_ids))
    with pytest.raises(ValueError, match="kept keys and values in 0 of 2 layers"):
        sample(forgetful, [[1], [2]])


def test_non_finite_logits_are_reported(decode):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="non-finite logits"):
        sample(model, decode=decode)
