"""--plan: the formulas against bytes that are counted in small runs."""

import json

import forked
import pytest
import torch
from runs import make_run, parse
from transformers import (
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import rollout
import train
from harness import plan

SIZE = ["--toy", "fork", "--difficulty", "3", "--prompts-per-step", "6", "--steps", "1",
        "--micro-batch", "0", "--tokens-per-micro-batch", "100000", "--eval-count", "1",
        "--eval-samples", "3"]  # fmt: skip


def stored(tensors) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def planned(run, P=1):
    both = [plan.sizes(run.configs[flag]) for flag in ("--student", "--teacher")]
    longest = max(map(len, sum(run.prompts.values(), [])))
    K = max(run.needs.candidates.values(), default=1)
    return plan.peaks(run.args, P, *both, longest, K), longest


def test_weights_moments_gradient_and_keys_and_values_are_what_they_take(monkeypatch):
    run, caches = make_run("--method", "lgr", *SIZE), []
    found, longest = planned(run)
    took = rollout.SlotCache.__init__

    def noted(self, *size):
        caches.append(self)
        took(self, *size)

    monkeypatch.setattr(rollout.SlotCache, "__init__", noted)
    batch, _ = train.sample(run, 0)
    scores = train.score(run, batch, run.sentences(batch))
    A_BT, w_BT = train.weigh(run, batch, scores, 0)
    train.update(run, batch, scores, A_BT, w_BT)
    student, moments = list(run.model.parameters()), run.optimizer.state_dict()["state"].values()
    m = plan.sizes(run.configs["--student"])
    assert m.N == sum(p.numel() for p in student) and 0 < m.N_L < m.N
    two = [state[name] for state in moments for name in ("exp_avg", "exp_avg_sq")]
    assert found["always"]["student and moments"] == stored(student) + stored(two)
    assert found["always"]["teacher"] == stored(run.teacher.parameters())
    assert found["update"]["gradient"] == stored([p.grad for p in student])
    buffers, T = list(caches[0].layers.values()), longest + run.args.max_new_tokens
    asked = found["sampling"]["keys and values"] / (T * 6)
    assert stored(buffers) / (len(buffers[0]) * buffers[0].shape[1]) == asked
    tensors = [x for x in [*vars(batch).values(), *vars(scores).values()]
               if isinstance(x, torch.Tensor) and x.dim() > 1]  # fmt: skip
    per_token = stored(tensors) / batch.ids_BT.numel()
    formula = found["update"]["rows"] / (6 * T)
    assert 0.75 * formula < per_token < 1.1 * formula


def test_the_teachers_cache_is_what_it_takes():
    run = make_run("--method", "lgr", *SIZE)
    found, longest = planned(run)
    ids_BT = torch.zeros(6, longest + run.args.max_new_tokens, dtype=torch.int64)
    cache = run.teacher.base_model(input_ids=ids_BT, use_cache=True).past_key_values
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert found["scoring"]["cache"] == stored(tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_backward_pass_needs_is_near_the_formula(dtype, checkpointing):
    """Bytes that autograd holds between forward and backward, weights and their copies aside."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model, held = LlamaForCausalLM(config).train(), {}
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
            held[storage.data_ptr()] = storage  # kept: an address is not used again
        return tensor

    ids_BT = torch.randint(64, (4, 128))
    half = dtype == "bfloat16"
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model.base_model(input_ids=ids_BT, use_cache=False)[0].sum()
    m = plan.sizes(config)
    wanted = plan.activations(m, 2 if half else 4, False)
    if checkpointing:  # a layer's own appear in its turn, during the backward pass
        layer = (wanted - 8 * m.D) / m.L
        wanted = plan.activations(m, 2 if half else 4, True) - layer
    got = sum(storage.nbytes() for storage in held.values()) / ids_BT.numel()
    assert 0.8 * wanted < got < 1.2 * wanted, (got, wanted)


SPREAD = """
import json, os
import torch
update = train.update
def counted(run, *args):
    out = update(run, *args)
    def own(x):
        return getattr(x, "to_local", lambda: x)()
    def total(tensors):
        return sum(own(t).numel() * t.element_size() for t in tensors)
    trained = list(run.trained.parameters())
    moments = [v for s in run.optimizer.state_dict()["state"].values() for k, v in s.items()
               if k != "step"]
    found = {"student and moments": total(trained) + total(moments),
             "copy that samples": total(run.model.parameters()),
             "teacher": total(run.teacher.parameters()), "gradient": total(p.grad for p in trained)}
    with open(f"counted-{os.environ['RANK']}.json", "w") as file:
        json.dump(found, file)
    return out
train.update = counted
"""


def test_what_is_spread_is_what_it_takes(tmp_path):
    flags = [*SIZE, "--method", "lgr", "--shard", "both"]
    started = forked.start_ranks([*flags, "--out", "run"], tmp_path, SPREAD)
    assert {one.returncode for one in forked.finish_all(started)} == {0}
    counted = [json.loads((tmp_path / f"counted-{rank}.json").read_text()) for rank in (0, 1)]
    found, _ = planned(make_run(*flags), P=2)
    parts = found["always"] | found["update"]
    for name in counted[0]:
        both = [one[name] for one in counted]
        assert sum(both) / 2 == pytest.approx(parts[name], rel=0.02), name  # rows are not cut


PAPERS = {  # kind, width, layers, inner, heads, KV heads, tied, more: billions of parameters
    "1.7b": (1.72, Qwen3Config(vocab_size=151936, hidden_size=2048, num_hidden_layers=28,
             intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
             tie_word_embeddings=True)),
    "30b-a3b": (30.5, Qwen3MoeConfig(vocab_size=151936, hidden_size=2048, num_hidden_layers=48,
                num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
                num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144,
                tie_word_embeddings=False)),
}  # fmt: skip


def test_a_pair_of_the_paper_fits_when_it_is_spread():
    """1.7B from 30B-A3B at 8k tokens: 61 GB of teacher are too much for one card of 80 beside
    the student's 28, but not beside adapters, nor where they are spread over eight."""
    sizes = []
    for billions, config in PAPERS.values():
        sizes.append(plan.sizes(config))
        assert sizes[-1].N / 1e9 == pytest.approx(billions, rel=0.01)
    flags = "--preset release-paper --student x --plan 80 --max-new-tokens 8192".split()
    lines = plan.table(parse(flags), *sizes, 512, 4).splitlines()
    verdicts = dict(line.strip().split(" of 80 GiB: ") for line in lines if " of 80 " in line)
    assert verdicts["1"].startswith("--lora-rank") and "--shard teacher" in verdicts["8"]
    for P in (1, 8):
        args = parse([*flags, *verdicts[str(P)].split()])
        assert plan.peak(plan.peaks(args, P, *sizes, 512, 4)) < 0.9 * 80 * 2**30
    args = parse([*flags[:-1], "16384", "--preset", "lgr-paper"])
    assert plan.fit(args, 1, *sizes, 512, 8) == "none of these flags makes it fit"


def test_experts_that_a_token_sees_are_counted():
    """Their width times their number, wherever a config keeps it; beside experts for all tokens."""
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    configs = {
        48: MixtralConfig(**small, intermediate_size=24, num_experts_per_tok=2,
                          num_local_experts=4, num_key_value_heads=1),
        60: DeepseekV3Config(**small, intermediate_size=99, moe_intermediate_size=20,
                             num_experts_per_tok=2, n_shared_experts=1, n_routed_experts=4,
                             n_group=1, topk_group=1, first_k_dense_replace=0),
        16: Qwen3MoeConfig(**small, moe_intermediate_size=8, num_experts_per_tok=2, num_experts=4),
        36: LlamaConfig(**small, intermediate_size=36),
    }  # fmt: skip
    for width, config in configs.items():
        assert plan.sizes(config).I == width, config.model_type


def test_an_evaluation_may_need_more_slots_than_a_step():
    run, more = make_run(*SIZE), ["--eval-count", "40", "--eval-samples", "2", "--sample-batch"]
    few = planned(run)[0]["sampling"]["logits"]  # a row per slot
    for flags, slots in (([100], 80), ([30], 30), ([100, "--problems", "x.jsonl"], 6)):
        run.args = parse([*SIZE[:-4], *more, *flags])  # the last has none to evaluate on
        assert planned(run)[0]["sampling"]["logits"] / few == pytest.approx(slots / 6)


def test_what_decoding_copies():
    """fast/decode.py fuses what is cast anyway, however large, and else what is small."""
    run = make_run(*SIZE)
    s, t = (plan.sizes(run.configs[flag]) for flag in ("--student", "--teacher"))
    for N_L, dtype, copied in ((100, "float32", 4), (2**31, "float32", 0), (2**31, "bfloat16", 2)):
        s.N_L, s.N = N_L, N_L + 99
        found = plan.peaks(parse([*SIZE, "--dtype", dtype]), 1, s, t, 9, 4)
        cast = 2 * s.N if dtype == "bfloat16" else 0
        assert found["sampling"]["copies"] - cast == copied * s.N_L


def test_flags_that_fit_are_few_and_keep_to_what_is_given():
    args = parse("--student x --plan 80 --preset lgr-paper".split())
    found = plan.levers(args, 10000)
    counts = [(new.lora_rank, len(words.split(" --")) if words else 0) for words, new in found]
    assert counts == sorted(counts) and counts[0] == (0, 0)
    assert {new.lora_rank for _, new in found} == {0, 32}
    assert not [new for _, new in found if new.lora_rank and new.shard == "both"]
    spread = parse([*"--student x --plan 80 --preset lgr-paper --shard both".split()])
    assert {new.shard for _, new in plan.levers(spread, 10000) if new.lora_rank} == {"teacher"}
    own = parse([*"--student x --plan 80 --preset lgr-paper --lora-rank 4".split()])
    assert {new.lora_rank for _, new in plan.levers(own, 10000)} == {4}


def test_it_prints_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        train.main(["--plan", "80", "--method", "lgr", "--toy", "fork"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "| **peak** |" in shown and "8 of 80 GiB: fits" in shown
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as left:
        train.main(["--plan", "80", "--problems", "missing.jsonl"])
    assert left.value.code == 2 and "missing.jsonl" in capsys.readouterr().err
