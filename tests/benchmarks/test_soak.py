"""soak.py in short, and that it would see what it looks for."""

import json

import torch

from benchmarks import soak


def test_soak(tmp_path, monkeypatch):
    """Real processes, fewer steps: one is killed while it trains, and goes on to the same end."""
    short = "--difficulty 2 --steps 8 --prompts-per-step 4 --eval-every 4 --eval-count 4"
    monkeypatch.setattr(soak, "COMMON", f"{short} --eval-samples 1")
    figures = soak.soak(1, 8, tmp_path)  # seed 8: SIGKILL, after 0.38 of the loop's time
    assert figures["kills"] == 1 and figures["mismatches"] == 0 and figures["runs"] >= 1
    assert sum(figures["where"].values()) == 1 and figures["resumes"] <= 1


def test_soak_sees_what_differs(tmp_path):
    line = {"step": 1, "loss": 0.5, "seconds": {"total": 1.0}}
    for name in ("one", "two"):
        out = tmp_path / name
        (out / "student").mkdir(parents=True)
        (out / "student" / "model").write_bytes(b"12")
        (out / "log.jsonl").write_text(json.dumps(line) + "\n")
        soak.checkpoint.write(out, 1, {"student": {"a": torch.ones(2)}}, {})
        line["seconds"] = {"total": 2.0}
    assert soak.differences(out, tmp_path / "one") == [] == soak.broken(out)
    (out / "student" / "model").write_bytes(b"13")
    assert soak.differences(out, tmp_path / "one") == ["student/model"]
    (out / "log.jsonl").write_text(json.dumps(line | {"loss": 0.25}) + "\n")
    assert soak.differences(out, tmp_path / "one") == ["log.jsonl", "student/model"]
    soak.checkpoint.write(out, 2, {"student": {"a": torch.zeros(2)}}, {})
    found = ["log.jsonl", "student/model", "checkpoint/student.safetensors"]
    assert soak.differences(out, tmp_path / "one") == found
    (soak.checkpoint.newest(out) / "facts.json").write_text("{")
    assert soak.broken(out) == ["step-00000002: facts.json has another checksum"]
