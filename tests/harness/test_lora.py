"""--lora-rank: adapters learn, a merged model samples, and peft agrees about what it is."""

import signal
import sys

import forked
import pytest
import torch
from runs import make_run, read_log, sample
from test_plan import SIZE, planned, stored
from test_shard import FEW, FORK, assert_close, interrupted, ranks
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import toy
import train
from benchmarks import soak
from harness import checkpoint, lora

RANK = ("--lora-rank", "4", "--lr", "0.005")
TARGETS = 14  # linear layers of the toy student


def stepped(*flags):
    """A run after one step, and the batch of the next."""
    run = make_run(*FORK, *RANK, *flags)
    train.train_step(run, 0)
    run.refresh()
    return run, sample(run, 1)


@pytest.mark.parametrize("method", ["release", "lgr", "lgr_topk", "rkl"])
@pytest.mark.parametrize("fast", ["on", "off"])
def test_what_samples_is_what_trains(method, fast):
    """After a step the log-probs of sampling are those that training computes; only adapters have
    gradients, and what is not a linear layer is one tensor in both."""
    run, batch = stepped("--method", method, "--fast", fast)
    mask_BT = batch.response_mask_BT
    ours_BT = run.student(batch.ids_BT, mask_BT)
    assert torch.allclose(ours_BT[mask_BT], batch.logp_BT[mask_BT], atol=2e-5)
    trained = {name: p for name, p in run.trained.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * TARGETS and all("lora_" in name for name in trained)
    assert all(p.abs().max() > 0 for p in trained.values()), "B has left 0"
    plain = dict(run.model.named_parameters())
    assert plain["model.norm.weight"] is run.trained.model.norm.weight
    base = AutoModelForCausalLM.from_pretrained(toy.world("fork").student, dtype=torch.float32)
    moved = [name for name, p in base.named_parameters() if not torch.equal(p, plain[name])]
    assert len(moved) == TARGETS and all("_proj" in name for name in moved)


def test_the_saved_student_is_what_peft_merges(tmp_path):
    """From the checkpoint, with peft's own wrapper, on the student that the run began with."""
    from peft import LoraConfig, get_peft_model

    forked.run([*FORK, *RANK, "--method", "opd", "--save-dtype", "float32", "--out", "run"],
               tmp_path, FEW)  # fmt: skip
    held = checkpoint.read(checkpoint.newest(tmp_path / "run")).groups["student"]
    assert len(held) == 2 * TARGETS
    base = AutoModelForCausalLM.from_pretrained(toy.world("fork").student, dtype=torch.float32)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    found = theirs.load_state_dict({f"base_model.model.{k}": v for k, v in held.items()}, False)
    assert not found.unexpected_keys
    theirs = theirs.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name


@pytest.mark.parametrize("shard", ["none", "teacher"])
def test_two_processes_equal_one(shard, tmp_path):
    flags = *RANK, "--method", "release+lgr"
    forked.run([*FORK, *flags, "--out", "one"], tmp_path, FEW)
    ranks(2, tmp_path, *flags, "--shard", shard, "--out", "two")
    assert_close(tmp_path / "two", tmp_path / "one")


def test_killed_and_resumed_is_bit_for_bit(tmp_path):
    flags = (*RANK, "--method", "lgr", "--checkpoint-every", "2", "--steps", "5")
    ranks(2, tmp_path, *flags, "--out", "whole")
    interrupted(tmp_path, signal.SIGKILL, *flags)
    ranks(2, tmp_path, *flags, "--out", "run", "--resume")
    assert soak.lines_of(tmp_path / "run") == soak.lines_of(tmp_path / "whole")
    assert soak.differences(tmp_path / "run", tmp_path / "whole") == []
    command = [*FORK, *flags, "--out", "run", "--resume", "--lora-rank", "8"]
    assert "--lora-rank 4, now 8" in forked.run(command, tmp_path, FEW, fails=True).stderr


def test_in_bfloat16_weights_are_held_in_it_and_adapters_in_float32():
    """Beside the same step with all weights in float32: to the rounding of bfloat16. What is merged
    has all of what was learned, on average, also where that is a hundredth of a digit of W."""
    run, _ = stepped("--dtype", "bfloat16", "--gradient-checkpointing", "--method", "release")
    for p in run.trained.parameters():
        p.data *= 0.01 if p.requires_grad and p.shape[1] == 4 else 1  # B
    run.refresh()
    moved = wanted = nearest = 0.0
    for name in lora.targets(run.model):
        plain, layer = run.model.get_submodule(name).weight, run.trained.get_submodule(name)
        W, delta = layer.get_base_layer().weight.double(), layer.get_delta_weight("default")
        assert plain.dtype == W.bfloat16().dtype
        moved += ((plain.double() - W) * delta).sum().item()
        wanted += delta.double().square().sum().item()
        nearest += (((W.float() + delta).bfloat16().double() - W) * delta).sum().item()
    assert 0.5 * wanted < moved < 1.5 * wanted and nearest < 0.5 * wanted
    kinds = {p.dtype for p in run.trained.parameters() if p.requires_grad}
    assert kinds == {torch.float32} and run.model.dtype == torch.bfloat16
    run, batch = stepped("--dtype", "bfloat16", "--method", "release")
    exact, _ = stepped("--method", "release")
    mask_BT, found = batch.response_mask_BT, []
    for one in (run, exact):
        with one.autocast(), torch.no_grad():
            found.append(one.student(batch.ids_BT, mask_BT)[mask_BT])
    assert (found[0] - batch.logp_BT[mask_BT]).abs().mean() < 0.01
    assert (found[0] - found[1]).abs().mean() < 0.02


def test_memory_is_what_plan_says():
    run = make_run("--method", "lgr", *SIZE, *RANK)
    found, _ = planned(run)
    run.refresh()
    train.train_step(run, 0)
    both = {id(p): p for m in (run.model, run.trained) for p in m.parameters()}.values()
    states = run.optimizer.state_dict()["state"].values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    always = found["always"]["student and moments"] + found["always"]["copy that samples"]
    assert always == stored(both) + stored(moments)
    assert found["update"]["gradient"] == stored([p.grad for p in both if p.grad is not None])


TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BUILT = {
    "one weight for queries, keys and values": Phi3Config(
        **TINY, intermediate_size=24, num_key_value_heads=1, pad_token_id=0),
    "biases, tied head": Qwen2Config(**TINY, intermediate_size=24, num_key_value_heads=1,
                                     tie_word_embeddings=True),
    "transposed": GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0,
                             embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0),
}  # fmt: skip


@pytest.mark.parametrize("kind", BUILT)
def test_however_a_model_is_built(kind, recwarn):
    """Merged and trained agree, and every adapter has a gradient."""
    model = AutoModelForCausalLM.from_config(BUILT[kind]).eval()
    trained, merge = lora.adapt(model, 2, 0)
    ids_BT, learning = torch.arange(12)[None], [p for p in trained.parameters() if p.requires_grad]
    assert len(learning) == 2 * len(lora.targets(model)) and not len(recwarn)
    for p in learning:
        p.data += 0.1
    merge()
    logits = trained(ids_BT).logits
    assert torch.allclose(model(ids_BT).logits, logits, atol=1e-4)
    logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in learning)


def test_a_model_of_which_peft_makes_something_else_is_refused():
    """With a dense layer beside experts it adapts those in place of the layer: not what is planned
    for, nor what is merged."""
    config = Qwen3MoeConfig(**TINY, intermediate_size=24, head_dim=8, num_key_value_heads=1,
                            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                            mlp_only_layers=[0])  # fmt: skip
    with pytest.raises(ValueError, match="2: Qwen3Moe.*: peft does not adapt its linear"):
        lora.adapt(Qwen3MoeForCausalLM(config).eval(), 2, 0)
    config = PhimoeConfig(**TINY, intermediate_size=24, num_key_value_heads=1, num_local_experts=4,
                          num_experts_per_tok=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not any("router" in name for name in lora.targets(model)), "it returns two tensors"


def test_what_is_frozen_anyway_stays_in_a_checkpoint():
    """Of a model without adapters."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    groups, _ = checkpoint.capture(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    assert groups["student"].keys() == model.state_dict().keys()


def test_experts_that_are_no_linear_layers_stay_as_they_are():
    config = Qwen3MoeConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, head_dim=8,
                            num_attention_heads=2, num_key_value_heads=1, num_experts=4,
                            num_experts_per_tok=2, moe_intermediate_size=16)  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    ids_BT = torch.arange(12)[None]
    before = model(ids_BT).logits
    trained, merge = lora.adapt(model, 2, 0)
    named = {name.split(".lora_")[0].split(".")[-1] for name, p in trained.named_parameters()
             if p.requires_grad}  # fmt: skip
    assert named == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for p in trained.parameters():
        p.data += 0.1 * p.requires_grad
    assert torch.equal(model(ids_BT).logits, before), "before merge() it is as it was"
    merge()
    assert torch.allclose(model(ids_BT).logits, trained.eval()(ids_BT).logits, atol=1e-4)
    assert not torch.allclose(model(ids_BT).logits, before, atol=1e-2)


def test_adapters_begin_alike_by_seed_and_leave_other_random_numbers_alone():
    torch.manual_seed(5)
    wanted, found = torch.rand(3), []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        run = make_run(*FORK, *RANK, "--seed", str(seed))
        found.append(next(p for p in run.trained.parameters() if p.requires_grad))
        assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_it_cannot_do_is_told_before_models_load(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for flags, missing, wanted in (
        (("--lora-rank", "4"), True, "--lora-rank 4 needs peft (pip install peft)"),
        (("--lora-rank", "4", "--shard", "both"), False, "--lora-rank 4 needs --shard none"),
        (("--lora-rank", "-1"), False, "--lora-rank"),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr("harness.pair.load_model", None)
            if missing:
                patch.setitem(sys.modules, "peft", None)
            train.main([*FORK, *flags])
        assert left.value.code == 2 and wanted in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_steps_teach(tmp_path):
    """With adapters alone the student comes nearer to its teacher."""
    flags = "--toy varied --method rkl --lora-rank 8 --lr 5e-3 --steps 8 --eval-count 1".split()
    forked.run([*flags, "--eval-samples", "1", "--out", "run"], tmp_path, FEW)
    steps, _ = read_log(tmp_path / "run")
    assert steps[-1]["reverse_kl"] < 0.8 * steps[0]["reverse_kl"]
