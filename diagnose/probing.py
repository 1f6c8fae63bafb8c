"""One number per token: what student and teacher say along responses, whoever wrote them.

Each micro-batch takes one pass of either model. Of their distributions only a handful of numbers
per token is kept, so memory grows with the number of tokens, never with tokens x vocabulary.

    fidelity     F(t) = max_v p_T(v | x, y_<t), the teacher's confidence       LGR, 2605.30833
    margin       teacher's preference among the student's top K candidates     release, 2605.13643
    parts        how much of the gradient depends on the teacher               LGR, Proposition 1
    spread       how much the teacher's next confidence depends on which       LGR, lookahead
                 token the student chooses now
    overlap      how many of the likeliest tokens the two models share

The gradient of the reverse KL in the student's logits z at one position, with p the student and q
the teacher, is a sum of two parts, of which only the first depends on the teacher:

    dKL/dz_v = - p_v (log q_v - E_p log q)  +  p_v (log p_v - E_p log p)

The first part is 0 where log q is the same for all tokens that the student would choose, as for a
diffuse teacher (LGR, Proposition 1). The second pulls towards the uniform distribution.

Letters: B rows, T tokens, F tokens of all responses one after the other, K candidates, E stop ids,
V vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import evaluate
import harness
import lgr
import logprobs
import rollout
import teachability

LOWEST = -teachability.SOLE_CANDIDATE_MARGIN  # log-prob of what the teacher rules out, nats


@dataclass(frozen=True)
class Options:
    """Of sampling and of the passes."""

    stop_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    temperature: float = 1.0
    candidates: int = 16  # top K tokens of either model that are compared
    margin_top_k: int = 4  # the student's first ones, which the margin looks at
    group: int = 8  # the student's first ones, which lookahead looks at
    tau: float = 0.2  # lookahead acts where the student's entropy is above it, nats
    margin: str = "logprob"  # its kind
    batch_size: int = 64  # responses in flight
    tokens: int = 16384  # most tokens per pass, padding included; a longer response goes alone
    progress: bool = True


@dataclass
class Readings:
    """One number per response token, float32 [F], the responses in order."""

    row_F: np.ndarray  # its response
    position_F: np.ndarray  # where in it, from 0
    student_logp_F: np.ndarray  # log-prob of the token, nats
    teacher_logp_F: np.ndarray
    entropy_F: np.ndarray  # of the student, nats
    fidelity_F: np.ndarray  # the teacher's largest probability
    margin_F: np.ndarray  # nats, or a difference of probabilities
    overlap_F: np.ndarray  # share of the student's top K tokens that are among the teacher's
    student_mass_F: np.ndarray  # probability that the model gives to these shared tokens
    teacher_mass_F: np.ndarray
    variance_F: np.ndarray  # the three of `gradient_parts` over the student's top K
    teacher_part_F: np.ndarray
    own_part_F: np.ndarray
    student_stop_F: np.ndarray  # probability of ending the response here
    teacher_stop_F: np.ndarray
    hesitates_F: np.ndarray  # 1 where the student's entropy is above tau, else 0
    spread_F: np.ndarray  # `spread_and_pull` there; nan elsewhere, and without lookahead
    pull_F: np.ndarray


def gradient_parts(student_logp_BTK, teacher_logp_BTK):
    """The variance of the teacher's log-probs over the candidates, and the norms of the teacher's
    and the student's own part of the gradient in the candidates' logits (see above), [B, T] each.

    student_logp_BTK: nats, renormalised over the candidates; with K = V nothing is approximated.
    teacher_logp_BTK: nats; only differences count; -inf counts as LOWEST.
    The variance is weighted by the student's probabilities, as the gradient is; an unweighted one
    would be dominated by candidates that are never drawn.

    >>> student = torch.tensor([0.5, 0.5]).log()
    >>> parts = gradient_parts(student, torch.tensor([0.9, 0.1]).log())
    >>> [round(x.item(), 3) for x in parts]     # log 9 = 2.197; (2.197 / 2)^2; 0.5 * 2.197 / sqrt 2
    [1.207, 0.777, 0.0]
    """
    own_BTK = student_logp_BTK.log_softmax(dim=-1)
    p_BTK = own_BTK.exp()

    def centred(logp_BTK):
        logp_BTK = logp_BTK.clamp(min=LOWEST)
        logp_BTK = logp_BTK - logp_BTK[..., :1]  # equal ones become exactly 0
        return logp_BTK - (p_BTK * logp_BTK).sum(dim=-1, keepdim=True)

    teacher_BTK, own_BTK = centred(teacher_logp_BTK), centred(own_BTK)
    variance_BT = (p_BTK * teacher_BTK**2).sum(dim=-1)
    return variance_BT, (p_BTK * teacher_BTK).norm(dim=-1), (p_BTK * own_BTK).norm(dim=-1)


def spread_and_pull(student_logp_BTK, confidence_BTK, candidates_BTK, ids_BT):
    """What one step of lookahead would tell, [B, T] each: the standard deviation of the teacher's
    next confidence under the student's choice among its candidates, and the confidence after the
    token that it chose minus the expected one (0 if that token is not a candidate).

    The reward of LGR weighs all candidates alike. Here they are weighed by the student's
    probabilities, because only choices that are made can change. nan where a confidence is nan.

    >>> logp, ids = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[7, 8]]])
    >>> [x.item() for x in spread_and_pull(logp, torch.tensor([[[1.0, 0.5]]]), ids, ids[..., 0])]
    [0.25, 0.25]
    """
    p_BTK = student_logp_BTK.softmax(dim=-1).to(confidence_BTK.dtype)
    away_BTK = confidence_BTK - (p_BTK * confidence_BTK).sum(dim=-1, keepdim=True)
    spread_BT = (p_BTK * away_BTK**2).sum(dim=-1).sqrt()
    pull_BT = lgr.sampled_reward(away_BTK, candidates_BTK, ids_BT)
    return spread_BT, torch.where(spread_BT.isnan(), torch.nan, pull_BT)


def sample(model, prompts, options: Options, *, max_new_tokens: int, seed: int, desc: str) -> list:
    """One response to each prompt: a list of lists of ids, the stop token included. Rows draw the
    same random numbers whatever the model, so that models can be compared."""
    generator, responses = torch.Generator().manual_seed(seed), []
    with evaluate.SamplingBar(len(prompts), not options.progress, desc=desc) as moved:
        size = 4 * options.batch_size  # several batches per call, so that free slots are refilled
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            out = rollout.generate(
                model, part, max_new_tokens=max_new_tokens, eos_ids=options.stop_ids,
                pad_id=options.pad_id, temperature=options.temperature, top_k=1,
                batch_size=options.batch_size, generator=generator, vocab_size=options.vocab_size,
                decode=harness.fast_decode, progress=moved,
            )  # fmt: skip
            for ids_T, mask_T in zip(out.ids_BT.cpu(), out.response_mask_BT.cpu(), strict=True):
                responses.append(ids_T[mask_T].tolist())
    return responses


def batches(prompts, responses, options: Options, device, desc: str):
    """Micro-batches of rows of similar length: yields row numbers, ids_BT, response_mask_BT."""
    length_B = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    used_BT = torch.arange(int(length_B.max())) < length_B[:, None]
    limits = SimpleNamespace(micro_batch=0, tokens_per_micro_batch=options.tokens)
    with tqdm(total=len(prompts), desc=desc, unit="response", disable=not options.progress) as bar:
        for row_B, columns in harness.micro_batches(used_BT, limits):
            rows = row_B.tolist()
            ids_BT = torch.full((len(rows), columns.stop), options.pad_id)
            mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
            for i, row in enumerate(rows):
                ids_BT[i, : length_B[row]] = torch.tensor(prompts[row] + responses[row])
                mask_BT[i, len(prompts[row]) : length_B[row]] = True
            yield rows, ids_BT.to(device), mask_BT.to(device)
            bar.update(len(rows))


@torch.no_grad()
def read(
    student, teacher, prompts, responses, options: Options, *, lookahead=False, desc="scoring"
) -> Readings:
    """Pass over responses with both models and keep the numbers of `Readings`.

    prompts, responses: lists of ids, one prompt per response, neither empty.
    lookahead: also score the student's candidates one step ahead, where it hesitates; ValueError if
        tree attention cannot score the teacher (`harness.check_supported`).
    """
    lengths = np.array([len(response) for response in responses])
    starts, total = np.cumsum(lengths) - lengths, int(lengths.sum())
    values = {f.name: np.full(total, np.nan, np.float32) for f in dataclasses.fields(Readings)}
    values["row_F"] = np.repeat(np.arange(len(lengths)), lengths)
    values["position_F"] = np.arange(total) - np.repeat(starts, lengths)
    for rows, ids_BT, mask_BT in batches(prompts, responses, options, teacher.device, desc):
        index_N = np.concatenate([np.arange(starts[r], starts[r] + lengths[r]) for r in rows])
        for name, value_BT in _read_batch(student, teacher, ids_BT, mask_BT, options, lookahead):
            values[name][index_N] = value_BT[mask_BT].float().cpu().numpy()
    return Readings(**values)


def _read_batch(student, teacher, ids_BT, mask_BT, options: Options, lookahead: bool):
    """(name, values [B, T]) of all that `read` keeps of a batch."""
    # a stop token outside the shared vocabulary has no probability
    known = [i for i in options.stop_ids if i < options.vocab_size]
    stops_E = torch.tensor(known, dtype=torch.int64, device=ids_BT.device)
    stops_BTE = stops_E.expand(*ids_BT.shape, -1)
    of_student = logprobs.token_stats(
        student.base_model(input_ids=ids_BT, use_cache=False)[0],
        student.get_output_embeddings().weight, ids_BT, top_k=options.candidates,
        candidates_BTK=stops_BTE, mask_BT=mask_BT, vocab_size=options.vocab_size,
        temperature=options.temperature,
    )  # fmt: skip
    ids_BTK, logp_BTK = of_student.topk_ids_BTK, of_student.topk_logp_BTK
    trunk = teacher.base_model(input_ids=ids_BT, use_cache=lookahead)
    of_teacher = logprobs.token_stats(
        trunk[0], teacher.get_output_embeddings().weight, ids_BT, top_k=options.candidates,
        candidates_BTK=torch.cat([ids_BTK, stops_BTE], dim=-1), mask_BT=mask_BT,
        vocab_size=options.vocab_size, entropy=False,
    )  # fmt: skip
    teacher_BTK, teacher_BTE = of_teacher.candidate_logp_BTK.split(
        [options.candidates, len(stops_E)], dim=-1
    )
    yield "student_logp_F", of_student.logp_BT
    yield "teacher_logp_F", of_teacher.logp_BT.clamp(min=LOWEST)
    yield "entropy_F", of_student.entropy_BT
    yield "fidelity_F", of_teacher.max_prob_BT
    yield "margin_F", teachability.teacher_margin(
        teacher_BTK[..., : options.margin_top_k], kind=options.margin
    )
    shared_BTK = (ids_BTK[..., None] == of_teacher.topk_ids_BTK[..., None, :]).any(dim=-1)
    yield "overlap_F", shared_BTK.float().mean(dim=-1)
    yield "student_mass_F", (logp_BTK.exp() * shared_BTK).sum(dim=-1)
    yield "teacher_mass_F", (teacher_BTK.exp() * shared_BTK).sum(dim=-1)
    names = "variance_F", "teacher_part_F", "own_part_F"
    yield from zip(names, gradient_parts(logp_BTK, teacher_BTK), strict=True)
    yield "student_stop_F", of_student.candidate_logp_BTK.exp().sum(dim=-1)
    yield "teacher_stop_F", teacher_BTE.exp().sum(dim=-1)
    hesitates_BT = lgr.trigger(of_student.entropy_BT, mask_BT, options.tau)
    yield "hesitates_F", hesitates_BT
    if lookahead:
        group_BTK = ids_BTK[..., : options.group]
        confidence_BTK = lgr.lookahead_confidence(
            teacher, ids_BT, mask_BT, hesitates_BT, group_BTK, cache=trunk.past_key_values,
            hidden_BTD=trunk[0], vocab_size=options.vocab_size,
        )  # fmt: skip
        pair = spread_and_pull(logp_BTK[..., : options.group], confidence_BTK, group_BTK, ids_BT)
        yield from zip(("spread_F", "pull_F"), pair, strict=True)


@torch.no_grad()
def mean_fidelity(teacher, prompts, responses, options: Options, desc: str) -> np.ndarray:
    """The teacher's mean confidence along each response, [B]."""
    mean_B = np.zeros(len(prompts))
    for rows, ids_BT, mask_BT in batches(prompts, responses, options, teacher.device, desc):
        stats = logprobs.token_stats(
            teacher.base_model(input_ids=ids_BT, use_cache=False)[0],
            teacher.get_output_embeddings().weight, ids_BT, mask_BT=mask_BT,
            vocab_size=options.vocab_size, entropy=False,
        )  # fmt: skip
        mean_B[rows] = (stats.max_prob_BT.sum(dim=1) / mask_BT.sum(dim=1)).double().cpu().numpy()
    return mean_B
