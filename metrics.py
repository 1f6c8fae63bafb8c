"""What a training step says in the log: sums over a batch, and what is made of them.

Every process sums its own rows (`batch_sums`), the sums are added up over all processes, and one
line is written from the totals (`log_line`), so that no figure is a mean of means.  README's
glossary says what each key is.
"""

import torch


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


FLAT = 1e-3  # a deviation of confidences that a 16-bit teacher cannot tell from 0


def batch_sums(batch, grades) -> dict[str, float]:
    """Numerators and denominators of this process's rows, to be added up over all processes.

    batch: `rollout.Rollout`. grades: `grading.Grades` of it.
    """
    mask_BT, choice, ahead = batch.response_mask_BT, grades.choice, grades.ahead
    kept_share_B = choice.keep_BT.sum(1) / mask_BT.sum(1)
    rows = zip(batch.ids_BT, mask_BT, strict=True)
    grams = [repeated_ngrams(ids_T[mask_T]) for ids_T, mask_T in rows]
    sums = {
        "rollouts": len(mask_BT),
        "tokens": mask_BT.sum().item(),
        "kept_tokens": choice.keep_BT.sum().item(),
        "entropy": batch.entropy_BT.sum().item(),
        "truncated": batch.truncated_B.sum().item(),
        "repeated": sum(repeated for repeated, _ in grams),
        "grams": sum(count for _, count in grams),
        "fired": choice.released_B.sum().item(),
        "release_at": kept_share_B[choice.released_B].sum().item(),
        "bic_gain": choice.gain_B.sum().item(),
        "bic_gain_over_6": (choice.gain_B > 6).sum().item(),
    }
    quarter_BT = quarters(mask_BT)
    for quarter in range(4):
        here_BT = quarter_BT == quarter
        sums[f"tokens_{quarter}"] = here_BT.sum().item()
        sums[f"fidelity_{quarter}"] = grades.max_prob_BT[here_BT].sum().item()
    if ahead is not None:
        sums["triggered"] = ahead.trigger_BT.sum().item()
        sums["reward"] = ahead.reward_BT.sum().item()
        sums["group_std"] = ahead.spread_BT.sum().item()
        sums["flat"] = (ahead.trigger_BT & (ahead.spread_BT < FLAT)).sum().item()
        sums["outside"] = ahead.outside_BT.sum().item()
    return sums


def log_line(
    step: int, loss: float, norm: float, skipped: int, sums: dict, seconds: dict, args
) -> dict:
    """One step for log.jsonl; README's glossary says what each number is."""
    rollouts, tokens, fired = sums["rollouts"], sums["tokens"], sums["fired"]
    triggered, total = sums.get("triggered", 0), sum(seconds.values())

    def per(name: str, count: float) -> float | None:
        return sums[name] / count if count else None

    line = {
        "step": step + 1,
        "loss": loss,
        "reverse_kl": sums["reverse_kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "response_tokens": tokens / rollouts,
        "truncated": sums["truncated"] / rollouts,
        "repeated_4grams": per("repeated", sums["grams"]),
        "fidelity": [per(f"fidelity_{q}", sums[f"tokens_{q}"]) for q in range(4)],
        "kept": sums["kept_tokens"] / tokens,
        "kept_tokens": int(sums["kept_tokens"]),
        "fired": fired / rollouts,
        "release_at": per("release_at", fired),
        "bic_gain": per("bic_gain", fired),
        "bic_gain_over_6": sums["bic_gain_over_6"] / rollouts,
    }
    if args.lookahead == "on":
        line |= {
            "triggered": triggered / tokens,
            "group_std": per("group_std", triggered),
            "flat_groups": per("flat", triggered),
            "bonus": args.lgr_gamma * sums["reward"] / triggered if triggered else None,
            "outside_group": per("outside", triggered),
        }
    return line | {
        "grad_norm": norm,
        "skipped": skipped,
        "seconds": {name: round(value, 4) for name, value in (seconds | {"total": total}).items()},
        "tokens_per_second": tokens / total,
    }
