"""On-policy distillation in one loop: `torchrun train.py --method release`.

A teacher grades, token by token, what the student itself wrote. A step has six phases:

  1 sample   the student writes a response to each prompt                            rollout.py
  2 score    ONE teacher forward per row: log-prob of every sampled token and of     logprobs.py
             the student's top-K candidates; with lookahead, leaves off its cache    lgr.py
  3 mask     q_t, which tokens to supervise                               masks.py, rivals.py
  4 weigh    A_t = log p_T(y_t) - log p_S(y_t) + gamma r_t(y_t);  w_t = q_t / sum q
  5 update   loss = -sum_t w_t A_t log p_S(y_t), and one optimizer step
  6 log      one JSON line

The expected gradient is that of KL(p_S || p_T) at every position, given the sampled prefix, minus
gamma times the expected reward. Sums of tokens are over all processes, so that N of them repeat the
run of one. harness/ is what is not about distillation; its docstring lists the names used here.

Letters: B rows of this process, T tokens, K candidates, U tokens of a union of candidates.
"""

import math
from dataclasses import dataclass

import torch

import evaluate
import harness
import lgr
import logprobs
import masks
import rivals
import rollout
from harness import ANY, COUNT, POSITIVE, SHARE

# --method: objective, mask, lookahead. Each has a flag that overrides it.
METHODS = {
    "opd": ("pg", "none", "off"),
    "release": ("pg", "release", "off"),
    "lgr": ("pg", "none", "on"),
    "lgr_topk": ("topk", "none", "on"),
    "release+lgr": ("pg", "release", "on"),
    **{name: ("pg", name, "off") for name in (*masks.CONTROLS, *rivals.RIVALS)},
    **{name: (name, "none", "off") for name in logprobs.DIVERGENCES},
}
# --preset: flags by name; what is not named keeps its default, which is LGR's authors' setting.
PRESETS = {
    "toy": {
        "steps": 30, "prompts_per_step": 64, "lr": 1e-3, "warmup_steps": 5, "weight_decay": 0.01,
        "beta2": 0.95, "advantage_clip": 10.0, "micro_batch": 64, "tokens_per_micro_batch": 16384,
        "checkpoint_every": 10, "eval_every": 10, "save_dtype": "float32", "threads": 1,
        "dtype": "float32",
    },
    "release-paper": {"method": "release", "prompts_per_step": 1024, "max_new_tokens": 16384},
    "lgr-paper": {"method": "lgr", "max_new_tokens": 9216},
    "lgr-script": {  # what the authors' released script runs: see docs/decisions.md
        "method": "lgr_topk", "max_new_tokens": 9216, "lgr_normalize": "mean",
        "loss_mean": "response", "lgr_alternate": 2, "lgr_entropy_top_k": 20,
    },
}  # fmt: skip
# Title: flag, default, limits or choices, help with the unit. The machine's: harness/flags.py.
FLAGS = {
    "method": [
        ("--method", "release", [*METHODS], "a row of METHODS"),
        ("--objective", None, ["pg", "topk", *logprobs.DIVERGENCES], "overrides the method's"),
        ("--mask", None, [*dict.fromkeys([*masks.MASKS, *masks.CONTROLS])], "likewise"),
        ("--lookahead", None, ["on", "off"], "likewise"),
    ],
    "release rule": [
        ("--margin-top-k", 4, (2, 10**6), "student candidates that the margin looks at"),
        ("--margin", "logprob", ["logprob", "prob"], "difference of what"),
        ("--margin-min-entropy", 0.0, ANY, "average tokens of at least this student entropy, nats"),
        ("--min-segments", 2, COUNT, "sentences on either side of the change point"),
        ("--bic-eps", 1e-12, POSITIVE, "added to the residual sum of squares"),
        ("--rescale", "batch", ["batch", "sequence", "none"], "scope of the loss mass kept"),
        ("--loss-mean", "token", ["token", "response"], "of tokens, or of responses' means"),
        ("--budget", "release", ["release", "own"], "a control keeps as many, or (std) its own"),
        ("--prefix-tokens", 0, ANY, "of mask prefix: so many of every response instead; 0: off"),
    ],
    "lookahead": [
        ("--lgr-gamma", 1.0, ANY, "weight of the group reward"),
        ("--lgr-tau", 0.2, ANY, "look ahead above this student entropy, nats"),
        ("--lgr-entropy-top-k", 0, ANY, "that of so many of the likeliest tokens alone; 0: of all"),
        ("--lgr-top-k", 8, (2, 10**6), "student candidates in a group"),
        ("--lgr-signal", "max_prob", [*lgr.SIGNALS], "the teacher's confidence"),
        ("--lgr-shape", "group", ["group", "difference"], "confidence against the group or before"),
        ("--lgr-normalize", "std", ["std", "mean", "guard"], "divide by its deviation, or centre"),
        ("--lgr-eps", 1e-6, ANY, "added to that deviation"),
        ("--lgr-alternate", 0, ANY, "so many steps without reward, then with nothing else; 0: off"),
        ("--lgr-nodes", 4096, COUNT, "leaves per forward pass: bounds memory"),
        ("--union-top-k", 20, COUNT, "of objective topk: tokens from each model"),
        ("--jsd-beta", 0.5, SHARE, "of objective jsd: weight of KL(teacher || mixture)"),
    ],
    "update": [
        ("--lr", 1e-5, POSITIVE, "AdamW, constant"),
        ("--clip-grad", 1.0, ANY, "largest gradient norm; 0: off"),
        ("--advantage-clip", 0.0, ANY, "largest |log p_T - log p_S| in A_t, nats; 0: off"),
        ("--updates-per-rollout", 1, COUNT, "above 1: PPO's clipped ratio"),
        ("--clip-low", 0.2, (0, 1), "ratio at least 1 - this"),
        ("--clip-high", 0.28, ANY, "ratio at most 1 + this"),
    ],
}  # fmt: skip


def spends_budget(args) -> bool:
    """Whether a control places, elsewhere, as many tokens as the release rule would keep."""
    return args.mask in masks.CONTROLS and not args.prefix_tokens and args.budget == "release"


def asks_for(args) -> set[str]:
    """What the masks in use see."""
    rules = ["release"] * spends_budget(args) + [args.mask] * (args.mask in masks.MASKS)
    return {name for rule in rules for name in masks.parameters(rule, vars(args))}


def needs(args) -> harness.Needs:
    """What the harness checks before weights load. ValueError for flags that contradict."""
    lookahead, topk = args.lookahead == "on", args.objective == "topk"
    if topk and lookahead and args.lgr_top_k > args.union_top_k:
        raise ValueError(f"--lgr-top-k {args.lgr_top_k} exceeds --union-top-k {args.union_top_k}")
    if args.objective in logprobs.DIVERGENCES and lookahead:
        raise ValueError(f"--objective {args.objective} has no place for the reward of --lookahead")
    if args.prefix_tokens and args.mask != "prefix":
        raise ValueError(f"--prefix-tokens {args.prefix_tokens} needs --mask prefix")
    if args.budget == "own" and args.mask != "std":
        raise ValueError(f"--budget own needs --mask std, not {args.mask}")
    if args.mask in rivals.OWN_ADVANTAGE and args.objective != "pg":
        raise ValueError(f"--mask {args.mask} has its own advantage: it needs --objective pg")
    if args.lgr_shape == "difference" and args.lgr_signal != "max_prob":
        raise ValueError("--lgr-shape difference needs --lgr-signal max_prob")
    asked = asks_for(args)
    used = {"margin_top_k": {"candidate_logp_BTK", "teacher_ids_BTK"} & asked,
            "lgr_top_k": lookahead, "union_top_k": topk,
            "lgr_entropy_top_k": args.lgr_entropy_top_k}  # fmt: skip
    candidates = {name: getattr(args, name) for name, is_used in used.items() if is_used}
    checks = [lgr.self_check] * lookahead
    return harness.Needs(candidates, "segments" in asked, checks, "progress" in asked)


@dataclass
class Scores:
    """What the teacher made of a batch of `shape` [B, T], entry t about token t, 0 where it did not
    look; None: nobody asked for it."""

    shape: tuple
    logp_BT: torch.Tensor = None  # log p_T of the sampled token, nats
    max_prob_BT: torch.Tensor = None  # the teacher's largest probability ("supervision fidelity")
    keep_BT: torch.Tensor = None  # q_t
    advantage_BT: torch.Tensor = None  # of a mask that has its own
    released_B: torch.Tensor = None  # the rule fired, with BIC0 - BIC1 = gain
    gain_B: torch.Tensor = None
    wanted_B: torch.Tensor = None  # tokens that it keeps; of std: before its own change point
    trigger_BT: torch.Tensor = None  # lookahead happened
    spread_BT: torch.Tensor = None  # standard deviation of the group's confidences
    reward_BTK: torch.Tensor = None  # group reward of every candidate
    union_BTU: torch.Tensor = None  # objective topk: both models' top tokens, which of them are not
    union_valid_BTU: torch.Tensor = None  # repeated, and the teacher's log-probs of them
    union_logp_BTU: torch.Tensor = None
    hidden_BTD: torch.Tensor = None  # objectives rkl, fkl, jsd: the teacher's last hidden states
    kl, gamma = 1.0, 0.0  # weights of log p_T - log p_S and of the reward in this step

    def put(self, at, **values):
        """Write values of the rows and columns `at`."""
        for name, value in values.items():
            if value is not None:
                if getattr(self, name) is None:
                    shape = *self.shape[: value.dim()], *value.shape[2:]
                    setattr(self, name, value.new_zeros(shape))
                getattr(self, name)[at[: value.dim()]] = value


# --------------------------------------------------------------------------------------- the phases
def sample(run, step: int):
    """1: this process's rollouts of a step, and the number of the first in the whole batch."""
    args, (prompts, first_row) = run.args, run.prompts_of(step)
    limit = harness.train_tokens(args, step)
    with run.autocast(), evaluate.SamplingBar(len(prompts), run.rank > 0, delay=2) as moved:
        batch = run.skip_overflow(rollout.generate)(
            run.model, prompts, max_new_tokens=limit, temperature=args.temperature,
            eos_ids=run.stop_ids, pad_id=run.pad_id, vocab_size=run.vocab_size, decode=run.decode,
            top_k=max(run.needs.candidates.values(), default=1), batch_size=args.sample_batch,
            generator=run.generator(step, first_row, limit), progress=moved,
            stop_class=run.stop_class, entropy_top_k=args.lgr_entropy_top_k,
        )  # fmt: skip
    run.watch.lap("sample")
    return batch, first_row


@torch.no_grad()
def score(run, batch, segments) -> Scores:
    """2 and 3, a micro-batch at a time: the KV cache of one lives until its leaves are scored."""
    args, teacher, out = run.args, run.teacher, Scores(batch.ids_BT.shape)
    lookahead, topk, budget = args.lookahead == "on", args.objective == "topk", spends_budget(args)
    asked, M = asks_for(args), args.margin_top_k
    for at in harness.micro_batches(batch.response_mask_BT, args):
        ids_BT, mask_BT, entropy_BT, logp_BT, candidates_BTK = (
            getattr(batch, name)[at]
            for name in ("ids_BT", "response_mask_BT", "entropy_BT", "logp_BT", "topk_ids_BTK")
        )
        trunk = teacher.base_model(input_ids=ids_BT, use_cache=lookahead)  # the teacher forward
        stats = logprobs.token_stats(
            trunk[0], teacher.get_output_embeddings().weight, ids_BT, entropy=False,
            top_k=max(args.union_top_k * topk, M * ("teacher_ids_BTK" in asked)),
            candidates_BTK=candidates_BTK, mask_BT=mask_BT,
            vocab_size=run.vocab_size, stop_class=run.stop_class,
        )  # fmt: skip
        out.put(at, logp_BT=stats.logp_BT, max_prob_BT=stats.max_prob_BT)
        run.watch.lap("score")

        seen = vars(args) | {
            "response_mask_BT": mask_BT, "entropy_BT": entropy_BT, "max_prob_BT": stats.max_prob_BT,
            "logp_BT": logp_BT, "advantage_BT": stats.logp_BT - logp_BT,
            "candidate_logp_BTK": stats.candidate_logp_BTK[..., :M],
            "candidate_ids_BTK": candidates_BTK[..., :M],
            "teacher_ids_BTK": stats.topk_ids_BTK[..., :M] if "teacher_ids_BTK" in asked else None,
            "segments": segments and [segments[row] for row in at[0].tolist()],
            "progress": run.position.step / args.steps,
        }  # fmt: skip
        mask = masks.apply("release" if budget else args.mask, seen)  # a control's comes later
        own = masks.apply("std", seen) if budget and args.mask == "std" else mask
        out.put(at, keep_BT=mask.keep_BT, wanted_B=(own.keep_BT > 0).sum(dim=1),
                released_B=own.released_B, gain_B=own.gain_B, advantage_BT=own.advantage_BT)
        run.watch.lap("mask")

        if lookahead:  # where a control will supervise is not known yet: look everywhere
            looked_BT = mask_BT if budget else mask.keep_BT > 0
            trigger_BT = lgr.trigger(entropy_BT, looked_BT, args.lgr_tau)  # entropy > tau
            confidence_BTK = lgr.lookahead_confidence(
                teacher, ids_BT, mask_BT, trigger_BT, candidates_BTK[..., : args.lgr_top_k],
                cache=trunk.past_key_values, hidden_BTD=trunk[0], nodes_per_slice=args.lgr_nodes,
                vocab_size=run.vocab_size, stop_class=run.stop_class, signal=args.lgr_signal,
            )  # fmt: skip
            how = {"normalize": args.lgr_normalize, "eps": args.lgr_eps}
            reward_BTK = lgr.group_reward(confidence_BTK, **how)
            if args.lgr_shape == "difference":
                reward_BTK = lgr.difference_reward(confidence_BTK, stats.max_prob_BT)
            out.put(at, trigger_BT=trigger_BT, spread_BT=confidence_BTK.std(dim=-1).nan_to_num(),
                    reward_BTK=reward_BTK)  # fmt: skip
            run.watch.lap("lookahead")
        if topk:
            both, U = (candidates_BTK, stats.topk_ids_BTK), args.union_top_k
            ids_BTU, valid_BTU = lgr.union_candidates(*(ids_BTK[..., :U] for ids_BTK in both))
            both = (stats.candidate_logp_BTK, stats.topk_logp_BTK)
            out.put(at, union_BTU=ids_BTU, union_valid_BTU=valid_BTU,
                    union_logp_BTU=torch.cat([x[..., :U] for x in both], dim=-1))  # fmt: skip
        if args.objective in logprobs.DIVERGENCES:
            out.put(at, hidden_BTD=trunk[0])
    return out


def weigh(run, batch, scores, step: int):
    """4: advantages A_t and weights w_t, [B, T]."""
    args, q_BT, l_BT = run.args, scores.keep_BT.float(), batch.response_mask_BT.float()
    if args.loss_mean == "response":
        l_BT = l_BT / l_BT.sum(dim=1, keepdim=True)
    total, kept = run.sum([l_BT.sum(), (l_BT * q_BT).sum()])  # over all processes
    turn = step // args.lgr_alternate % 2 if args.lgr_alternate else None  # 0: no reward, 1: alone
    scores.kl, scores.gamma = float(turn != 1), args.lgr_gamma * (turn != 0)
    A_BT = scores.logp_BT - batch.logp_BT if scores.advantage_BT is None else scores.advantage_BT
    A_BT = torch.where(q_BT > 0, A_BT, 0.0)  # never 0 times infinity
    if args.advantage_clip:
        A_BT = A_BT.clamp(-args.advantage_clip, args.advantage_clip)
    if args.lookahead == "on":
        group_BTK = batch.topk_ids_BTK[..., : args.lgr_top_k]
        reward_BT = lgr.sampled_reward(scores.reward_BTK, group_BTK, batch.ids_BT)
        A_BT = scores.kl * A_BT + scores.gamma * reward_BT  # the lookahead bonus
    return A_BT, token_weights(l_BT, q_BT, args.rescale, total, kept)


def token_weights(l_BT, q_BT, rescale: str, total: float, kept: float):
    """w_t: the kept tokens get the loss mass of all, A'_t = A_t q_t sum(l) / sum(l q), over sum(l)
    (2605.13643). l: loss mask; total, kept: sum(l), sum(l q) over all processes; `rescale` is the
    scope of the factor.

    >>> l = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    >>> q = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0]])
    >>> for scope in ("batch", "sequence", "none"):
    ...     (token_weights(l, q, scope, 6, 4) * 12).int().tolist()
    [[3, 3, 0, 0], [3, 3, 0, 0]]
    [[4, 4, 0, 0], [2, 2, 0, 0]]
    [[2, 2, 0, 0], [2, 2, 0, 0]]
    """
    w_BT = l_BT * q_BT
    if rescale == "batch":
        return w_BT / (kept or 1)  # sum(l) cancels
    if rescale == "sequence":
        kept_B1 = w_BT.sum(dim=1, keepdim=True)
        w_BT = w_BT * l_BT.sum(dim=1, keepdim=True) / torch.where(kept_B1 > 0, kept_B1, 1)
    return w_BT / (total or 1)


def loss_of(run, batch, scores, A_BT, w_BT, at):
    """The objective on some rows and columns, a scalar: policy gradient, divergence or union."""
    args, ids_BT, keep_BT = run.args, batch.ids_BT[at], scores.keep_BT[at] > 0
    A, w = A_BT[at], w_BT[at]
    if args.objective in logprobs.DIVERGENCES:
        divergence_BT = run.student(ids_BT, keep_BT, teacher=scores.hidden_BTD[at], scale_BT=w)
        return (w * divergence_BT).sum()
    if args.objective == "topk":
        logp_BTU, reward_BTU = run.student(ids_BT, keep_BT, scores.union_BTU[at]), None
        if scores.reward_BTK is not None:  # the group comes first in the union
            reward_BTU = torch.zeros_like(logp_BTU)
            reward_BTU[..., : args.lgr_top_k] = scores.gamma * scores.reward_BTK[at]
        teacher_BTU = scores.union_logp_BTU[at] if scores.kl else logp_BTU.detach()
        valid_BTU = scores.union_valid_BTU[at]
        return (w * lgr.topk_loss(logp_BTU, teacher_BTU, valid_BTU, reward_BTU)).sum()
    if args.updates_per_rollout > 1:  # PPO's clipped ratio; at 1 its gradient is the plain one
        ratio = (run.student(ids_BT, keep_BT) - batch.logp_BT[at] * keep_BT).exp()
        clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
        return -(w * torch.minimum(ratio * A, clipped * A)).sum()
    logp = run.student(ids_BT, keep_BT, scale_BT=w * A)  # the scale saves fast/head.py a pass
    loss = -(w * A * logp).sum()
    return loss


def update(run, batch, scores, A_BT, w_BT) -> tuple[float, float, bool]:
    """5: one optimizer step; (loss over all processes, gradient norm, whether both are finite; if
    not, the weights stay, in all processes). Attention is causal, so columns after the last kept
    token are cut off: what was released costs nothing."""
    pieces, local = list(harness.micro_batches(scores.keep_BT > 0, run.args)), 0.0
    run.optimizer.zero_grad(set_to_none=True)
    for number, at in enumerate(pieces, 1):
        with run.gradients(last=number == len(pieces)):
            with run.autocast():
                loss = loss_of(run, batch, scores, A_BT, w_BT, at)
            (loss * run.world).backward()  # DDP averages over ranks; the weights already count all
        local += loss.item()
    limit = run.args.clip_grad or math.inf
    norm = torch.nn.utils.clip_grad_norm_(run.student.parameters(), limit).item()
    (loss,) = run.sum([local + run.overflow])  # NaN where sampling overflowed: a skipped step
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        run.optimizer.step()
        run.scheduler.step()
    return loss, norm, finite


def train_step(run, step: int) -> dict:
    """The six phases; returns the log line."""
    batch, first_row = sample(run, step)  # 1
    scores, mask_BT = score(run, batch, run.sentences(batch)), batch.response_mask_BT  # 2, 3
    if spends_budget(run.args):  # 3, of a control: it sees all rows of all processes
        counts_B3 = torch.stack([mask_BT.sum(1), scores.keep_BT.sum(1), scores.wanted_B], dim=1)
        scores.keep_BT = masks.spend(
            run.args.mask, mask_BT, *run.gather(counts_B3).unbind(1), first_row=first_row,
            generator=run.generator(harness.CONTROL_STREAM + step),
        )  # fmt: skip
    A_BT, w_BT = weigh(run, batch, scores, step)  # 4
    updates = [update(run, batch, scores, A_BT, w_BT) for _ in range(run.args.updates_per_rollout)]
    loss, norm, _ = updates[-1]  # 5
    run.watch.lap("update")
    if skipped := sum(not finite for *_, finite in updates):  # too many in a row end the run
        run.give_up_or_skip(step, loss, norm, batch, scores, A_BT, w_BT)
    return run.log_line(step, loss, norm, skipped, batch, scores)  # 6


def main(argv=None) -> None:
    """Exits with 2 on bad input; 1 when the run fails; 0, 130 or 129 when SIGTERM, Ctrl-C or SIGHUP
    ends it."""
    with harness.start(argv, FLAGS, METHODS, PRESETS, needs) as run:
        for step in run.steps():  # from where the run stands to --steps
            if run.evaluation_due(step):
                run.write(evaluate.on_held_out(run, step))
            if step < run.args.steps:
                run.write(train_step(run, step))


if __name__ == "__main__":
    main()
