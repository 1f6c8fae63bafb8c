"""The examples: copied beside the files that they name, and compared with loops."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

ROOT = Path(__file__).resolve().parent.parent
COPIES = {
    "trl_release": ["release_rule", "teachability", "masks", "logprobs"],
    "lookahead_reward": ["lgr", "logprobs"],
}


def copied(name, folder):
    """The example and the files that its docstring names, in a folder of their own."""
    example = ROOT / "examples" / f"{name}.py"
    for file in COPIES[name]:
        assert f"{file}.py" in example.read_text().split('"""')[1]
        shutil.copy(ROOT / f"{file}.py", folder)
    shutil.copy(example, folder)
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
def test_lookahead_reward_equals_a_loop_on_either_side_of_padding(side, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(copied("lookahead_reward", tmp_path))
    lookahead_reward = importlib.import_module("lookahead_reward").lookahead_reward
    student, teacher = tiny_model("qwen3", 1), tiny_model("llama", 2)
    rows = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 6, 12)]
    T, prompt, K, tau = 12, 3, 4, 1.5
    ids_BT, attention_BT = torch.zeros(3, T, dtype=torch.int64), torch.zeros(3, T)
    response_BT = torch.zeros(3, T)
    starts = [T - len(row) if side == "left" else 0 for row in rows]
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids_BT[b, start : start + len(row)] = row
        attention_BT[b, start : start + len(row)] = 1
        response_BT[b, start + prompt : start + len(row)] = 1
    out_BT = lookahead_reward(student, teacher, ids_BT, attention_BT, response_BT, tau=tau, top_k=K)
    looked = 0
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        for t in range(len(row)):
            p_V = student(row[None, :t]).logits[0, -1].softmax(-1) if t >= prompt else None
            if p_V is None or torch.special.entr(p_V).sum() <= tau:
                assert out_BT[b, start + t] == 0
                continue
            group, confidence = p_V.topk(K).indices.tolist(), []
            for token in group:
                path = torch.cat([row[:t], torch.tensor([token])])[None]
                confidence.append(teacher(path).logits[0, -1].softmax(-1).max().item())
            c_K = torch.tensor(confidence, dtype=torch.float64)
            reward_K = (c_K - c_K.mean()) / (c_K.std() + 1e-6)
            token = int(row[t])
            right = reward_K[group.index(token)] if token in group else 0.0
            assert abs(out_BT[b, start + t] - right) < 1e-3
            looked += token in group
    assert looked >= 1
    assert not out_BT[response_BT == 0].any()


TRL = """
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig
from trl_release import ReleaseTrainer
import release_rule, teachability

toys, problems = sys.argv[1], json.loads(sys.argv[2])
student, teacher = (AutoModelForCausalLM.from_pretrained(f"{toys}/{n}", dtype=torch.float32)
                    for n in ("student", "horizon"))
tokenizer = AutoTokenizer.from_pretrained(f"{toys}/student", padding_side="left")
seen = []

class Watched(ReleaseTrainer):
    def _compute_loss(self, model, inputs, num_items_in_batch):
        loss = super()._compute_loss(model, inputs, num_items_in_batch)
        seen.append((inputs, loss[0]))
        return loss

config = DistillationConfig(
    "out", use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=4,
    gradient_accumulation_steps=1, max_completion_length=160, max_steps=1, beta=1.0, top_k=0,
    temperature=1.0, top_p=1.0, report_to="none", save_strategy="no", disable_tqdm=True, seed=1,
    learning_rate=1e-9,
)
Watched(model=student, teacher_model=teacher, args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": problems})).train()
(inputs, loss), = seen
keep, kept, total = inputs["tool_mask"].bool() & inputs["completion_mask"].bool(), [], 0.0
for row in range(4):
    prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
    response = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
    ids = torch.cat([prompt, response])[None]
    with torch.no_grad():
        p, q = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (student, teacher))
    best = q.gather(1, p.topk(4).indices).sort(dim=1, descending=True).values
    segments = teachability.token_segments(tokenizer, response)
    scores = teachability.segment_scores(best[:, 0] - best[:, 1], segments)
    point = release_rule.change_point(scores)
    mask = torch.from_numpy(release_rule.keep_mask(segments, point.kept))
    kept.append(bool((keep[row, : len(mask)] == mask).all()))
    total += ((p.exp() * (p - q)).sum(1) * mask).sum().item()
print(json.dumps({"rows": kept, "kept": int(keep.sum()), "loss": loss.item(),
                  "all": int(inputs["completion_mask"].sum()), "right": total / int(keep.sum())}))
"""


def test_the_rule_in_trl_is_the_rule(tmp_path):
    """One step of the real trainer on the toy: its mask, and its loss, against plain forwards."""
    pytest.importorskip("trl", reason="pip install -r benchmarks/requirements.txt")
    import toy

    problems = [p["problem"] for p in toy.problems(4, moves=12)]
    chat = [[{"role": "user", "content": text}] for text in problems]
    command = [sys.executable, "-c", TRL, str(toy.ASSETS), json.dumps(chat)]
    done = subprocess.run(command, cwd=copied("trl_release", tmp_path), capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["rows"] == [True] * 4
    assert 0 < found["kept"] < found["all"], "some of it must be released for this to be a test"
    assert abs(found["loss"] - found["right"]) < 1e-3 * abs(found["right"])


@pytest.mark.parametrize("name, most", [("trl_release", 60), ("lookahead_reward", 40)])
def test_an_example_is_short(name, most):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= most
