"""log.jsonl, whose keys docs/runs.md explains. Every process sums its own rows (`batch_sums`); one
line is made of the totals (`log_line`), so that no figure is a mean of means."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch

from harness.checkpoint import lock, name_the_path
from harness.cli import MOST_BYTES, open_regular, parse_json

FLAT = 1e-3  # a deviation of confidences that a 16-bit teacher cannot tell from 0
ACCURACY = ("step {step}: mean@{samples} {accuracy:.3f}, 95% interval {accuracy_low:.3f} to "
            "{accuracy_high:.3f}, {problems} problems")  # fmt: skip


def read_log(out: Path, keep: int) -> list[dict]:
    """The lines in the first `keep` bytes of log.jsonl; ValueError that names what is none."""
    path = Path(out) / "log.jsonl"
    size = path.stat().st_size if path.exists() else 0
    if not keep <= size <= keep + MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes; it had {keep} when the checkpoint was written")
    lines = []
    with open_regular(path) if keep else io.BytesIO() as file:
        for number, text in enumerate(file.read(keep).splitlines(keepends=True), 1):
            lines.append(parse_json(text, f"{path}:{number}"))
            try:
                say_result(lines[-1:], lambda said: None)
            except (AttributeError, LookupError, TypeError, ValueError):
                raise ValueError(f"{path}:{number}: not a line of a run") from None
    return lines


class Log:
    """log.jsonl: a line is in the file when `write` returns, and on the disk after `flush`. It goes
    on behind `keep` bytes; what lies beyond moves to log.dropped.jsonl."""

    def __init__(self, out: Path, keep: int = 0):
        self.path = Path(out) / "log.jsonl"
        self.lines = read_log(out, keep)
        self.file = open(self.path, "ab+")  # noqa: SIM115
        lock(self.file)
        self.file.seek(keep)
        if rest := self.file.read():
            with open(self.path.with_name("log.dropped.jsonl"), "ab") as dropped:
                dropped.write(rest)
                dropped.flush()
                os.fsync(dropped.fileno())
        self.file.truncate(keep)

    def write(self, line: dict) -> int:
        """Append an object, with null for what is not finite; returns the log's bytes."""
        text = json.dumps(_finite(line), allow_nan=False) + "\n"
        with name_the_path(self.path):
            self.file.write(text.encode())
            self.file.flush()
        return self.file.tell()

    def flush(self) -> None:
        with name_the_path(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that `write` has complained about
            self.file.close()


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def repeated_ngrams(ids_T: torch.Tensor, n: int = 4) -> tuple[int, int]:
    """How many of a response's n-grams it has written before, and how many it has.

    >>> repeated_ngrams(torch.tensor([7, 8, 7, 8, 7, 8, 7]))   # 7878 8787 7878 8787
    (2, 4)
    """
    count = len(ids_T) - n + 1
    if count < 1:
        return 0, 0
    gram_G, base = ids_T[:count], ids_T.max() + 1
    for place in range(1, n):  # number the grams one token longer: exact, and within int64
        gram_G = gram_G * base + ids_T[place : place + count]
        gram_G = gram_G.unique(return_inverse=True)[1]
    return count - len(gram_G.unique()), count


def quarters(mask_BT: torch.Tensor) -> torch.Tensor:
    """Which quarter of its response every token lies in: 0 to 3; 4 outside.

    >>> quarters(torch.tensor([[False, True, True, True, True, True, True, True, True]])).tolist()
    [[4, 0, 0, 1, 1, 2, 2, 3, 3]]
    """
    place_BT, length_B1 = mask_BT.cumsum(1) - 1, mask_BT.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask_BT, 4 * place_BT // length_B1, 4)


def _end(which_BT: torch.Tensor) -> torch.Tensor:
    """Tokens of each row up to the last of these."""
    return (which_BT * torch.arange(1, which_BT.shape[1] + 1, device=which_BT.device)).amax(dim=1)


def batch_sums(batch, scores, args, segments=None) -> dict[str, float]:
    """Numerators and denominators of this process's rows, to be added up over all processes."""
    mask_BT, keep_BT = batch.response_mask_BT, scores.keep_BT > 0
    none_B = torch.zeros_like(mask_BT[:, 0])  # of a mask without a change point
    released_B = none_B if scores.released_B is None else scores.released_B
    gain_B = none_B if scores.gain_B is None else scores.gain_B
    grams = [repeated_ngrams(ids_T[mask_BT[row]]) for row, ids_T in enumerate(batch.ids_BT)]
    kept_share_B = keep_BT.sum(1) / mask_BT.sum(1)
    read_B, trained_B = (_end(which_BT) for which_BT in (mask_BT, keep_BT))
    sums = {
        "scored": read_B.sum(), "trained": args.updates_per_rollout * trained_B.sum(),
        "reverse_kl": ((batch.logp_BT - scores.logp_BT) * mask_BT).sum(),
        "rollouts": len(mask_BT), "tokens": mask_BT.sum(), "kept_tokens": keep_BT.sum(),
        "entropy": batch.entropy_BT.sum(), "truncated": batch.truncated_B.sum(),
        "repeated": sum(repeated for repeated, _ in grams), "grams": sum(n for _, n in grams),
        "fired": released_B.sum(), "release_at": kept_share_B[released_B].sum(),
        "bic_gain": gain_B.sum(), "bic_gain_over_6": (gain_B > 6).sum(),
    }  # fmt: skip
    if segments is not None:
        counts = [len(segment_T.unique()) for segment_T in segments]
        sums |= {"sentences": sum(counts), "short": sum(n < 2 * args.min_segments for n in counts)}
    for quarter in range(4):
        here_BT = quarters(mask_BT) == quarter
        sums[f"tokens_{quarter}"] = here_BT.sum()
        sums[f"fidelity_{quarter}"] = scores.max_prob_BT[here_BT].sum()
    if args.lookahead == "on":
        sampled_BTK = batch.topk_ids_BTK[..., : args.lgr_top_k] == batch.ids_BT[..., None]
        sums["scored"] += (~sampled_BTK[scores.trigger_BT]).sum()  # the leaves
        trigger_BT = scores.trigger_BT & keep_BT  # a control decides after the lookahead
        sums["triggered"] = trigger_BT.sum()
        sums["bonus"] = scores.gamma * scores.reward_BTK[trigger_BT][sampled_BTK[trigger_BT]].sum()
        sums["group_std"] = scores.spread_BT[trigger_BT].sum()
        sums["flat"] = (scores.spread_BT[trigger_BT] < FLAT).sum()
        sums["outside"] = (~sampled_BTK[trigger_BT].any(dim=-1)).sum()
    return {name: float(value) for name, value in sums.items()}


def log_line(step, loss, norm, skipped, sums, seconds, args) -> dict:
    """One step for log.jsonl, of the sums over all processes."""
    tokens, fired, total = sums["tokens"], sums["fired"], sum(seconds.values())

    def per(name: str, count: float) -> float | None:
        return sums[name] / count if count else None

    line = {
        "step": step + 1, "loss": loss,
        "reverse_kl": sums["reverse_kl"] / tokens, "entropy": sums["entropy"] / tokens,
        "response_tokens": tokens / sums["rollouts"],
        "truncated": sums["truncated"] / sums["rollouts"],
        "repeated_4grams": per("repeated", sums["grams"]),
        "fidelity": [per(f"fidelity_{q}", sums[f"tokens_{q}"]) for q in range(4)],
        "kept": sums["kept_tokens"] / tokens, "kept_tokens": int(sums["kept_tokens"]),
        "tokens": {"sampled": int(tokens), "scored": int(sums["scored"]),
                   "trained": int(sums["trained"])},
        "fired": fired / sums["rollouts"], "release_at": per("release_at", fired),
        "bic_gain": per("bic_gain", fired),
        "bic_gain_over_6": sums["bic_gain_over_6"] / sums["rollouts"],
    }  # fmt: skip
    line |= {"sentences": sums["sentences"] / sums["rollouts"]} if "sentences" in sums else {}
    if args.lookahead == "on":
        triggered = sums["triggered"]
        line |= {
            "triggered": triggered / tokens, "group_std": per("group_std", triggered),
            "flat_groups": per("flat", triggered),
            "bonus": per("bonus", triggered),
            "outside_group": per("outside", triggered),
        }  # fmt: skip
    seconds = {name: round(value, 4) for name, value in (seconds | {"total": total}).items()}
    return line | {"grad_norm": norm, "skipped": skipped, "seconds": seconds,
                   "tokens_per_second": tokens / total}  # fmt: skip


def say_result(lines: list[dict], say=print) -> None:
    """What came of a run: first and last evaluation, and what went wrong on the way."""
    evaluations = [line for line in lines if "accuracy" in line]
    for line in evaluations[:1] + evaluations[-1:]:
        say(ACCURACY.format(**line))
    if ood := [line["ood"]["accuracy"] for line in evaluations if "ood" in line]:
        say(f"out of domain: {ood[0]:.3f} before, {ood[-1]:.3f} after")
    if skipped := sum(line.get("skipped", 0) > 0 for line in lines):
        say(f"{skipped} steps were skipped: loss or gradient was not finite")
