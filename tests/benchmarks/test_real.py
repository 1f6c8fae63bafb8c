"""examples/smollm2/prepare.py and benchmarks/real.py, with a tiny random model in the place of
SmolLM2."""

import json
import re

import numpy as np
import pytest
import torch
from inputs import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import answers
import train
from benchmarks import real
from examples.smollm2 import prepare
from harness import flags

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
QUICK = "--heal-prompts 16 --max-new-tokens 12 --threads 1 --leave-out 1".split()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    eos = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, **eos, **SIZES)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair") / "out"
    assert prepare.main(["--teacher", str(teacher), "--out", str(out), *QUICK]) == 0
    return out


def test_a_student_without_a_layer_computes_what_the_others_compute(teacher):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    student = prepare.leave_out(model, [1])
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    ids_BT = torch.arange(8)[None]
    how = {"input_ids": ids_BT, "use_cache": False}
    assert torch.equal(student(**how).logits, model(**how).logits)


def test_the_files_hold_right_sums_and_share_no_question():
    files = prepare.problem_files(0)
    texts = {name: {json.dumps(x.get("messages") or x["problem"]) for x in files[name]}
             for name in files}  # fmt: skip
    for a, b in (("train", "heldout"), ("train", "open"), ("heldout", "open")):
        assert not texts[a] & texts[b]
    assert files == prepare.problem_files(0) != prepare.problem_files(1)
    for problem in files["heldout"] + [x for x in files["train"] if "messages" in x]:
        a, b = map(int, re.findall(r"\d+", problem["messages"][-1]["content"]))
        worked = [m["content"] for m in problem["messages"] if m["role"] == "assistant"]
        assert int(problem["answer"]) == a + b and len(worked) == 2
        assert f"{a} + {b} = " not in " ".join(worked)
        assert answers.is_correct(answers.extract_answer(f"{a} + {b} = {a + b}."), str(a + b))


def test_healing_brings_the_student_nearer_and_repeats_itself(teacher, pair, tmp_path):
    found = json.loads((pair / "prepared.json").read_text())
    assert found["healing_kl"][1] < found["healing_kl"][0]
    assert found["teacher"]["problems"] == found["student"]["problems"] == 40
    again = tmp_path / "again"
    assert prepare.main(["--teacher", str(teacher), "--out", str(again), *QUICK]) == 0
    for name in ("student/model.safetensors", "train.jsonl", "heldout.jsonl", "open.jsonl"):
        assert (again / name).read_bytes() == (pair / name).read_bytes()
    whole, healed = (AutoModelForCausalLM.from_pretrained(x) for x in (teacher, pair / "student"))
    ids_BT = torch.randint(200, (8, 20), generator=torch.Generator().manual_seed(5))
    q_BTV, *others = (model(input_ids=ids_BT).logits.detach().log_softmax(dim=-1)
                      for model in (whole, prepare.leave_out(whole, [1]), healed))  # fmt: skip
    before, after = ((q_BTV.exp() * (q_BTV - p_BTV)).sum(dim=-1).mean() for p_BTV in others)
    assert after < before


def test_prepare_refuses_what_it_would_overwrite_and_layers_that_are_not_there(
    teacher, pair, tmp_path, capsys
):
    how = "--teacher", str(teacher)
    assert prepare.main([*how, "--out", str(pair)]) == 2
    assert "a pair is there already" in capsys.readouterr().err
    assert prepare.main([*how, "--out", str(tmp_path / "new"), "--leave-out", "3"]) == 2
    assert "--leave-out 3: the teacher has no such layer" in capsys.readouterr().err


@pytest.fixture(scope="module")
def quick(pair, tmp_path_factory):
    """The command with --quick: its folder of results, and what it printed last."""
    runs, human = tmp_path_factory.mktemp("real"), pair / "human.jsonl"
    human.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "It is 2."}) + "\n")
    flags = ["--quick", "--pair", pair, "--runs", runs, "--human", human, "--max-new-tokens", 12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        real.main([str(x) for x in flags])
        real.main([str(x) for x in flags])  # nothing is left to do
    (out,) = runs.iterdir()
    return out, pair


def test_a_method_brings_flags_that_override(pair):
    args = real.parse(["--pair", str(pair), "--steps", "30"])
    words = real.command(args, "opd --train-tokens 64 --steps 45", 1, pair / "new")[2:]
    _, found, _ = flags.parse("train.py", train.FLAGS, train.METHODS, train.PRESETS, words)
    assert (found.method, found.train_tokens, found.steps, found.seed) == ("opd", "64", 45, 1)
    assert found.max_new_tokens == args.max_new_tokens == 96


def test_a_method_that_there_is_none_of_is_refused_at_once(pair, capsys):
    with pytest.raises(SystemExit) as left:
        real.parse(["--pair", str(pair), "--methods", "opd", "odp --steps 3"])
    assert left.value.code == 2 and "--methods 'odp --steps 3'" in capsys.readouterr().err


def test_quick_measures_before_and_after_and_says_so(quick):
    out, _ = quick
    found, page = json.loads((out / "real.json").read_text()), (out / "real.md").read_text()
    assert set(found["figures"]) == {"teacher", "student", "opd", "release"}
    for name in ("opd", "release"):
        value, low, high = found["figures"][name]["reverse_kl"]
        assert low <= value <= high and f"| {name} | {value:.3f} [{low:.3f}, {high:.3f}]" in page
        assert len(found["logs"][name]) == 1
    assert (out / "real.png").exists()


@torch.no_grad()
def test_what_is_measured_is_what_plain_passes_say(quick):
    out, pair = quick
    args = real.parse(["--quick", "--pair", str(pair), "--max-new-tokens", "12"])
    ruler = real.Ruler(args)
    student = ruler.open(pair / "student")
    kept = json.loads((out / "student.json").read_text())
    batch = ruler.write(student, ruler.open_prompts, 1, args.samples)
    total, count, nearest = 0.0, 0, []
    for ids_T, mask_T in zip(batch.ids_BT, batch.response_mask_BT, strict=True):
        ids_T, start = ids_T[: mask_T.nonzero()[-1] + 1], int(mask_T.nonzero()[0])
        p_TV, q_TV = (m(input_ids=ids_T[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
                      for m in (student, ruler.teacher))  # fmt: skip
        total += (p_TV.exp() * (p_TV - q_TV)).sum().item()
        count += len(p_TV)
        nearest.append(q_TV.exp().amax(dim=-1))
    sums, counts = map(sum, kept["reverse_kl"])
    assert counts == count and sums == pytest.approx(total, rel=1e-4)
    bands = [kept[f"reverse_kl_{band}"] for band in range(4)]
    assert sum(sum(band[0]) for band in bands) == pytest.approx(total, rel=1e-4)
    quarters = sum(sum(kept[f"fidelity_{q}"][0]) for q in range(4))
    assert quarters == pytest.approx(torch.cat(nearest).sum().item(), rel=1e-4)
    assert sum(kept["tokens"][0]) == count and sum(kept["tokens"][1]) == len(batch.ids_BT)


def test_intervals_cover_prompts_and_seeds():
    rng = np.random.default_rng(0)
    runs = [{"x": [(rng.normal(seed, 1, 50) * 2).tolist(), [2] * 50]} for seed in (0, 1, 2)]
    value, low, high = real.estimate(runs, "x")
    assert value == pytest.approx(np.mean([np.mean(r["x"][0]) / 2 for r in runs]), abs=1e-5)
    assert high - low > 1  # the seeds differ by 1; prompts alone would give 0.3
    _, low, high = real.estimate([runs[0]] * 3, "x")
    assert 0.4 < high - low < 0.7  # 1.96 x 2 / sqrt(50)
    assert real.estimate(runs, "x", runs)[0] == 0
    assert real.estimate(runs, "y") is None
    nll = [{"perplexity": [[20.0, 40.0], [10, 20]]}]
    assert real.estimate(nll, "perplexity")[0] == pytest.approx(np.exp(2), abs=1e-4)
