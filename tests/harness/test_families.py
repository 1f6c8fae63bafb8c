"""Every family of models that can be a student or teacher, as a tiny random model: what is sampled,
scored and looked ahead equals plain forward passes, or the model is refused by name."""

import pytest
import torch
import transformers

import fast.decode
import harness
import lgr
import logprobs
import rollout

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {  # multi-head latent attention: keys and values have different widths
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
SERVED = {
    "Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, "decoder_sparse_step": 1, **EXPERTS},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None}, "Gemma": {"head_dim": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 64}, "Phi3": {}, "Olmo": {}, "Olmo2": {},
    "Olmo3": {"sliding_window": 64}, "SmolLM3": {}, "StableLm": {}, "Starcoder2": {},
    "GptOss": {"head_dim": 8, "num_local_experts": 4}, "DeepseekV2": LATENT, "DeepseekV3": LATENT,
    "Glm4": {"head_dim": 8}, "Ernie4_5": {"head_dim": 8}, "HunYuanDenseV1": {"head_dim": 8},
    "Nemotron": {}, "GPTNeoX": {}, "Falcon": {}, "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 32},
}  # fmt: skip
NOT_A_MATRIX = "its logits are not hidden states times a matrix"
REFUSED = {  # what harness.check_sampling or harness.check_head says
    "Gemma2": ({"head_dim": 8}, NOT_A_MATRIX), "Granite": ({"logits_scaling": 2.0}, NOT_A_MATRIX),
    "Cohere": ({}, NOT_A_MATRIX), "Cohere2": ({}, NOT_A_MATRIX), "Phi": ({}, NOT_A_MATRIX),
    "Llama4": ({"head_dim": 8}, "layers of types .*'chunked_attention'"),
    "Qwen3Next": ({"head_dim": 8, **EXPERTS}, "layers of types .*'linear_attention'"),
    "Jamba": ({"num_experts": 2, "num_experts_per_tok": 1}, "layers of types .*'linear_attention'"),
    "RecurrentGemma": ({}, "layers of types .*'linear_attention'"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of types .*'conv'"),
    "Mamba": ({"state_size": 4}, "takes no position ids"),
}  # fmt: skip
PROMPTS = [[3, 5, 7, 9, 11, 2, 8], [4, 6, 1]]


def build(family, changes):
    """A random model of a family; skipped where this version of the library has none."""
    text = family + "Text" * (family in ("Gemma3", "Llama4"))
    names = f"{family}ForCausalLM", f"{text}Config"
    make, config = (getattr(transformers, name, None) for name in names)
    if make is None or config is None:
        pytest.skip(f"no {family} in transformers {transformers.__version__}")
    torch.manual_seed(0)
    model = make(config(**SIZES | changes)).eval()
    for name, parameter in model.named_parameters():
        if name == "lm_head.bias":  # a trained one is not 0
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(params=SERVED, scope="module")
def served(request):
    """(model, a batch that it wrote greedily, its logits by a plain forward pass)."""
    model = build(request.param, SERVED[request.param])
    batch = sample(model, None)
    return model, batch


def sample(model, decode):
    how = {"max_new_tokens": 8, "eos_ids": (), "pad_id": 0, "temperature": 0, "top_k": 3}
    return rollout.generate(model, PROMPTS, decode=decode, **how)


def test_they_pass_the_checks_of_loading(served):
    model, _ = served
    harness.check_sampling("p", model, PROMPTS, 8)
    harness.check_head("--student", model, PROMPTS[0])
    lgr.self_check(model)


@torch.no_grad()
def test_greedy_samples_are_those_of_forward_passes(served):
    model, batch = served
    quick = sample(model, fast.decode.decode)
    for ids_BT in (batch.ids_BT, quick.ids_BT):
        for row, prompt in enumerate(PROMPTS):
            ids = list(prompt)
            for _ in range(8):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert ids_BT[row, : len(ids)].tolist() == ids


def test_log_probs_and_their_gradients_are_those_of_a_forward_pass(served):
    model, batch = served
    ids_1T = batch.ids_BT[:1]
    hidden_1TD = model.base_model(input_ids=ids_1T, use_cache=False)[0]
    ours_1T = logprobs.token_logprobs(hidden_1TD, model.get_output_embeddings().weight, ids_1T)
    plain_1TV = model(input_ids=ids_1T, use_cache=False).logits.double().log_softmax(dim=-1)
    plain_1T = plain_1TV[:, :-1].gather(2, ids_1T[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours_1T[:, 1:].double(), plain_1T, atol=1e-5, rtol=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours, plain = (torch.autograd.grad(x.sum(), weights, allow_unused=True)
                   for x in (ours_1T, plain_1T))  # fmt: skip
    assert sum(g is not None for g in ours) > 5  # experts that no token visits have none
    largest = max(float(b.abs().max()) for b in plain if b is not None)
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5 * largest, rtol=1e-3)


@torch.no_grad()
def test_lookahead_is_that_of_one_forward_pass_per_candidate(served):
    model, batch = served
    ids_1T, mask_1T = batch.ids_BT[:1], batch.response_mask_BT[:1]
    group_1TK = batch.topk_ids_BTK[:1]
    found_1TK = lgr.lookahead_confidence(model, ids_1T, mask_1T, mask_1T, group_1TK)
    for t in mask_1T[0].nonzero()[:, 0].tolist():
        for k, candidate in enumerate(group_1TK[0, t].tolist()):
            path_1T = torch.cat([ids_1T[:, :t], torch.tensor([[candidate]])], dim=1)
            plain = model(input_ids=path_1T).logits[0, -1].double().softmax(dim=-1).max()
            assert found_1TK[0, t, k].double() == pytest.approx(plain.item(), abs=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_the_rest_are_refused_by_name(family):
    changes, message = REFUSED[family]
    model = build(family, changes)
    with pytest.raises(ValueError, match=f"{family}ForCausalLM.*{message}"):
        harness.check_sampling("p", model, PROMPTS, 8)
        harness.check_head("--student", model, PROMPTS[0])


def test_a_head_whose_weights_are_lost_is_refused():
    model = build("Llama", {"tie_word_embeddings": False})
    model.lm_head.weight.data.zero_()
    why = "--teacher LlamaForCausalLM: all tokens are equally likely"
    with pytest.raises(ValueError, match=why):
        harness.check_head("--teacher", model, PROMPTS[0])
    model.lm_head.weight.data.fill_(0.5)  # one number for all tokens
    with pytest.raises(ValueError, match=why):
        harness.check_head("--teacher", model, PROMPTS[0])
    model = build("Llama", {"initializer_range": 0.02})  # never trained, but not lost
    harness.check_head("--teacher", model, PROMPTS[0])


def hooked(dtype, change):
    """A model whose logits are not hidden states times the head, but changed after that."""
    model = build("Llama", {"tie_word_embeddings": False}).to(dtype)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: change(logits))
    return model


@pytest.mark.parametrize(
    ("dtype", "scale", "refused"),
    [
        (torch.float32, 1 + 5e-4, False), (torch.float32, 1 + 2e-3, True),
        (torch.bfloat16, 1.012, False), (torch.bfloat16, 1.04, True),  # rounds to 1 in 128
        (torch.float16, 1.012, False), (torch.float16, 1.04, True),
    ],
)  # fmt: skip
def test_a_head_may_be_off_by_what_its_type_rounds_away(dtype, scale, refused):
    model = hooked(dtype, lambda logits: logits * scale)
    if refused:
        with pytest.raises(ValueError, match=f"--student LlamaForCausalLM: {NOT_A_MATRIX}"):
            harness.check_head("--student", model, PROMPTS[0])
    else:
        harness.check_head("--student", model, PROMPTS[0])


@pytest.mark.parametrize(("spread", "refused"), [(3e-3, False), (3e-5, True)])
def test_a_head_is_lost_when_its_logits_differ_by_rounding_alone(spread, refused):
    model = build("Llama", {"tie_word_embeddings": False})
    column_D = torch.randn(SIZES["hidden_size"])  # the same for all tokens, but for `spread`
    share_V = torch.linspace(1 - spread, 1, SIZES["vocab_size"])
    model.lm_head.weight.data.copy_(share_V[:, None] * column_D)
    if refused:
        with pytest.raises(ValueError, match="all tokens are equally likely"):
            harness.check_head("--teacher", model, PROMPTS[0])
    else:
        harness.check_head("--teacher", model, PROMPTS[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_refused(bad):
    model = build("Llama", {"tie_word_embeddings": False})
    model.lm_head.weight.data[5, 3] = bad
    with pytest.raises(ValueError, match="--student LlamaForCausalLM: its logits are not finite"):
        harness.check_head("--student", model, PROMPTS[0])
