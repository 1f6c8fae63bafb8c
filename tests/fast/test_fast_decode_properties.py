"""Properties of the public names of fast/decode.py."""

from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from properties import families, near, prompts_of_ids, prop, seeded, seeds, small, tiny

import rollout
from fast import decode as fast  # the file


@prop("fast.decode", "fast.LlamaStep", "fast.fits", examples=30, family=families, seed=seeds,
      prompts=prompts_of_ids, limit=st.integers(1, 8), batch_size=st.integers(1, 5))
def test_both_steps_give_the_same_logits_on_the_same_cache(
    family, seed, prompts, limit, batch_size
):
    model = tiny(family)
    used = []

    def both(model, cache, step):
        ours = fast.decode(model, cache, step)
        assert fast.fits(model) == (ours is not step) == (family != "gpt2")

        def compared(token_S, column_S, width):
            theirs_SV = step(token_S, column_S, width)
            ours_SV = ours(token_S, column_S, width)
            torch.testing.assert_close(ours_SV, theirs_SV, rtol=1e-4, atol=1e-4)
            used.append(len(token_S))
            return ours_SV

        return compared

    out = rollout.generate(model, prompts, max_new_tokens=limit, eos_ids=[3, 5], pad_id=0,
                           batch_size=batch_size, generator=seeded(seed), decode=both)  # fmt: skip
    assert sum(used) == out.response_mask_BT.sum()


@prop("fast.multiply", "fast.rms_norm", "fast.is_hooked", examples=40, seed=seeds,
      S=st.integers(1, 9), D=st.integers(1, 9), N=st.integers(1, 9), bias=st.booleans(),
      count=small, pre=st.booleans())
def test_products_and_norms_equal_float64(seed, S, D, N, bias, count, pre):
    g = seeded(seed)
    x_SD = torch.randn(S, D, generator=g)
    weights = [(torch.randn(N, D, generator=g), torch.randn(N, generator=g) if bias else None)
               for _ in range(count)]  # fmt: skip
    right = [x_SD.double() @ w.double().T + (b.double() if bias else 0) for w, b in weights]
    near(fast.multiply(x_SD, weights), torch.cat(right, dim=1), torch.float32)
    weight_D = torch.randn(D, generator=g)
    norm = SimpleNamespace(weight=weight_D, variance_epsilon=1e-6)
    scale_S1 = (x_SD.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    near(fast.rms_norm(x_SD, norm), x_SD * scale_S1 * weight_D.double(), torch.float32)
    module = torch.nn.Linear(1, 1)
    hooks = [module.register_forward_hook(print)] if bias else []
    hooks += [module.register_forward_pre_hook(print)] if pre else []
    assert fast.is_hooked(module) == bool(hooks)
    for hook in hooks:
        hook.remove()
    assert not fast.is_hooked(module)
