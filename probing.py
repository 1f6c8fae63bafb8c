"""What student and teacher say along some responses, whoever wrote them, token by token.

The measurements under `diagnose.py`. Per micro-batch one pass of each model; of their distributions
only a handful of numbers per token survives, so memory follows the number of tokens, and never
tokens x vocabulary.

    fidelity     F(t) = max_v p_T(v | x, y_<t), the teacher's confidence       LGR, 2605.30833
    margin       teacher's preference among the student's top K candidates     release, 2605.13643
    parts        how much of the gradient the teacher has a say in             LGR, Proposition 1
    spread       how much the choice of the next token matters to the          LGR, lookahead
                 teacher's confidence after it
    overlap      how many of the likeliest tokens the two models share

The gradient of the reverse KL in the student's logits z at one position, with p the student and q
the teacher, is a sum of two parts, of which only the first knows the teacher:

    dKL/dz_v = - p_v (log q_v - E_p log q)  +  p_v (log p_v - E_p log p)

The first vanishes where log q is the same for all tokens that the student would choose, as for a
diffuse teacher; what is left pulls towards the uniform distribution and teaches nothing. That is
what the LGR paper's first proposition says of the teacher's variance over the candidates.

Letters: B rows, T tokens, F tokens of all responses one behind the other, K candidates, E stop ids,
V vocabulary.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import grading
import lgr
import logprobs
import rollout
import teachability

LOWEST = -teachability.SOLE_CANDIDATE_MARGIN  # log-prob of what the teacher rules out, nats


@dataclass(frozen=True)
class How:
    """What the passes need to know. `tokens`: most per pass, padding included; a longer response
    goes alone. `candidates`: top K tokens of either model that are looked at; `margin_top_k` and
    `group` of them, the student's, for margin (of kind `margin`) and lookahead, which acts where
    the student's entropy is above `tau` nats."""

    stop_ids: tuple[int, ...]
    pad_id: int
    vocab_size: int
    temperature: float = 1.0
    candidates: int = 16
    margin_top_k: int = 4
    group: int = 8
    tau: float = 0.2
    margin: str = "logprob"
    batch_size: int = 64
    tokens: int = 16384
    progress: bool = True


@dataclass
class Readings:
    """One number per response token, float32 [F], responses in order; B responses in all.

    row_F, position_F   its response, and where in it, from 0
    student_logp_F, teacher_logp_F   log-prob of the token, nats
    entropy_F           of the student, nats
    fidelity_F, margin_F   see above; the margin in nats, or a difference of probabilities
    overlap_F           share of the student's top K tokens that are among the teacher's
    student_mass_F, teacher_mass_F   probability that each gives to the shared ones
    variance_F, teacher_part_F, own_part_F   `gradient_parts` over the student's top K
    student_stop_F, teacher_stop_F   probability of ending the response here
    hesitates_F         1 where the student's entropy is above tau, else 0
    spread_F, pull_F    `spread_and_pull` there; nan elsewhere, and without lookahead
    """

    row_F: np.ndarray
    position_F: np.ndarray
    student_logp_F: np.ndarray
    teacher_logp_F: np.ndarray
    entropy_F: np.ndarray
    fidelity_F: np.ndarray
    margin_F: np.ndarray
    overlap_F: np.ndarray
    student_mass_F: np.ndarray
    teacher_mass_F: np.ndarray
    variance_F: np.ndarray
    teacher_part_F: np.ndarray
    own_part_F: np.ndarray
    student_stop_F: np.ndarray
    teacher_stop_F: np.ndarray
    hesitates_F: np.ndarray
    spread_F: np.ndarray
    pull_F: np.ndarray


def gradient_parts(student_logp_BTK, teacher_logp_BTK):
    """Where the gradient comes from: variance of the teacher's log-probs over the candidates, and
    the norms of both parts of the gradient of the reverse KL in the candidates' logits (see above).

    student_logp_BTK, teacher_logp_BTK: nats, K candidates on the last axis, any leading ones. The
        student's are renormalised over the candidates; with all of V there is no approximation. Of
        the teacher's only differences count; -inf counts as LOWEST.
    Returns variance, teacher's part, the student's own part, [B, T] each. The variance is weighted
    by the student's probabilities, as the gradient is: an unweighted one is decided by candidates
    that nobody draws. Raises ValueError for shapes that differ or no candidates.

    >>> student = torch.tensor([0.5, 0.5]).log()
    >>> parts = gradient_parts(student, torch.tensor([0.9, 0.1]).log())
    >>> [round(x.item(), 3) for x in parts]     # log 9 = 2.197; (2.197 / 2)^2; 0.5 * 2.197 / sqrt 2
    [1.207, 0.777, 0.0]
    """
    shapes = tuple(student_logp_BTK.shape), tuple(teacher_logp_BTK.shape)
    if shapes[0] != shapes[1] or not shapes[0] or shapes[0][-1] < 1:
        raise ValueError(f"student_logp_BTK, teacher_logp_BTK need one shape, K >= 1: {shapes}")
    own_BTK = student_logp_BTK.log_softmax(dim=-1)
    p_BTK = own_BTK.exp()
    parts = []
    for logp_BTK in (teacher_logp_BTK.clamp(min=LOWEST), own_BTK.clamp(min=LOWEST)):
        logp_BTK = logp_BTK - logp_BTK[..., :1]  # equal ones then are exactly 0
        away_BTK = logp_BTK - (p_BTK * logp_BTK).sum(dim=-1, keepdim=True)
        parts.append(p_BTK * away_BTK)
        parts.append((p_BTK * away_BTK**2).sum(dim=-1))
    teacher_BTK, variance_BT, own_BTK, _ = parts
    return variance_BT, teacher_BTK.norm(dim=-1), own_BTK.norm(dim=-1)


def spread_and_pull(student_logp_BTK, confidence_BTK, candidates_BTK, ids_BT):
    """What one step of lookahead would tell: the standard deviation of the teacher's confidence
    under the student's choice among its candidates, and the confidence after the token that it took
    minus the expected one (0 if that is not among them), [B, T] each.

    In the reward of LGR every candidate counts alike, likely or not; here as much as the student
    likes it, for only choices that are made can be changed. nan where a confidence is.

    >>> logp, ids = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[7, 8]]])
    >>> [x.item() for x in spread_and_pull(logp, torch.tensor([[[1.0, 0.5]]]), ids, ids[..., 0])]
    [0.25, 0.25]
    """
    p_BTK = student_logp_BTK.softmax(dim=-1).to(confidence_BTK.dtype)
    away_BTK = confidence_BTK - (p_BTK * confidence_BTK).sum(dim=-1, keepdim=True)
    spread_BT = (p_BTK * away_BTK**2).sum(dim=-1).sqrt()
    pull_BT = lgr.sampled_reward(away_BTK, candidates_BTK, ids_BT)
    return spread_BT, torch.where(spread_BT.isnan(), torch.nan, pull_BT)


def sample(model, prompts, how: How, *, max_new_tokens: int, seed: int, desc: str) -> list:
    """One response to each prompt, ids with the stop token: a list of lists of ids. Rows draw the
    same random numbers whatever the model, so that models can be compared."""
    generator, responses = torch.Generator().manual_seed(seed), []
    with tqdm(total=len(prompts), desc=desc, unit="response", disable=not how.progress) as bar:
        for first in range(0, len(prompts), 4 * how.batch_size):  # several batches: rows refill
            part = prompts[first : first + 4 * how.batch_size]
            out = rollout.generate(
                model, part, max_new_tokens=max_new_tokens, eos_ids=how.stop_ids,
                pad_id=how.pad_id, temperature=how.temperature, top_k=1,
                batch_size=how.batch_size, generator=generator, vocab_size=how.vocab_size,
            )  # fmt: skip
            for ids_T, mask_T in zip(out.ids_BT.cpu(), out.response_mask_BT.cpu(), strict=True):
                responses.append(ids_T[mask_T].tolist())
            bar.update(len(part))
    return responses


def batches(prompts, responses, how: How, device, desc: str):
    """Rows of similar length together: yields row numbers, ids_BT, response_mask_BT."""
    length_B = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    with tqdm(total=len(prompts), desc=desc, unit="response", disable=not how.progress) as bar:
        for row_B in grading.micro_batches(length_B, most_tokens=how.tokens):
            rows = row_B.tolist()
            ids_BT = torch.full((len(rows), int(length_B[row_B].max())), how.pad_id)
            mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
            for i, row in enumerate(rows):
                ids_BT[i, : length_B[row]] = torch.tensor(prompts[row] + responses[row])
                mask_BT[i, len(prompts[row]) : length_B[row]] = True
            yield rows, ids_BT.to(device), mask_BT.to(device)
            bar.update(len(rows))


@torch.no_grad()
def read(
    student, teacher, prompts, responses, how: How, *, lookahead: bool = False, desc="scoring"
) -> Readings:
    """Pass over some responses with both models and keep the numbers of `Readings`.

    prompts, responses: lists of ids, one prompt per response, neither empty.
    lookahead: also score the student's candidates one step ahead, where it hesitates; ValueError if
        the teacher is a model that tree attention cannot score (`lgr.self_check`).
    """
    lengths = np.array([len(response) for response in responses])
    starts, total = np.cumsum(lengths) - lengths, int(lengths.sum())
    names = [f.name for f in dataclasses.fields(Readings)]
    found = {name: np.full(total, np.nan, dtype=np.float32) for name in names}
    found["row_F"] = np.repeat(np.arange(len(lengths)), lengths)
    found["position_F"] = np.arange(total) - np.repeat(starts, lengths)
    for rows, ids_BT, mask_BT in batches(prompts, responses, how, teacher.device, desc):
        place_N = np.concatenate([np.arange(starts[r], starts[r] + lengths[r]) for r in rows])
        for name, value_BT in _read_batch(student, teacher, ids_BT, mask_BT, how, lookahead):
            found[name][place_N] = value_BT[mask_BT].float().cpu().numpy()
    return Readings(**found)


def _read_batch(student, teacher, ids_BT, mask_BT, how: How, lookahead: bool):
    """(name, values [B, T]) of all that `read` wants of a batch."""
    known = [i for i in how.stop_ids if i < how.vocab_size]  # of the others there is no probability
    stops_E = torch.tensor(known, dtype=torch.int64, device=ids_BT.device)
    stops_BTE = stops_E.expand(*ids_BT.shape, -1)
    own = logprobs.token_stats(
        student.base_model(input_ids=ids_BT, use_cache=False)[0],
        student.get_output_embeddings().weight, ids_BT, top_k=how.candidates,
        candidates_BTK=stops_BTE, mask_BT=mask_BT, vocab_size=how.vocab_size,
        temperature=how.temperature,
    )  # fmt: skip
    trunk = teacher.base_model(input_ids=ids_BT, use_cache=lookahead)
    theirs = logprobs.token_stats(
        trunk[0], teacher.get_output_embeddings().weight, ids_BT, top_k=how.candidates,
        candidates_BTK=torch.cat([own.topk_ids_BTK, stops_BTE], dim=-1), mask_BT=mask_BT,
        vocab_size=how.vocab_size, entropy=False,
    )  # fmt: skip
    theirs_BTK, theirs_BTE = theirs.candidate_logp_BTK.split([how.candidates, len(stops_E)], dim=-1)
    yield "student_logp_F", own.logp_BT
    yield "teacher_logp_F", theirs.logp_BT.clamp(min=LOWEST)
    yield "entropy_F", own.entropy_BT
    yield "fidelity_F", theirs.max_prob_BT
    margin_BT = teachability.teacher_margin(theirs_BTK[..., : how.margin_top_k], kind=how.margin)
    yield "margin_F", margin_BT
    shared_BTK = (own.topk_ids_BTK[..., None] == theirs.topk_ids_BTK[..., None, :]).any(dim=-1)
    yield "overlap_F", shared_BTK.float().mean(dim=-1)
    yield "student_mass_F", (own.topk_logp_BTK.exp() * shared_BTK).sum(dim=-1)
    yield "teacher_mass_F", (theirs_BTK.exp() * shared_BTK).sum(dim=-1)
    names = "variance_F", "teacher_part_F", "own_part_F"
    yield from zip(names, gradient_parts(own.topk_logp_BTK, theirs_BTK), strict=True)
    yield "student_stop_F", own.candidate_logp_BTK.exp().sum(dim=-1)
    yield "teacher_stop_F", theirs_BTE.exp().sum(dim=-1)
    hesitates_BT = lgr.trigger(own.entropy_BT, mask_BT, how.tau)
    yield "hesitates_F", hesitates_BT
    if lookahead:
        group_BTK = own.topk_ids_BTK[..., : how.group]
        confidence_BTK = lgr.lookahead_confidence(
            teacher, ids_BT, mask_BT, hesitates_BT, group_BTK, cache=trunk.past_key_values,
            hidden_BTD=trunk[0], vocab_size=how.vocab_size,
        )  # fmt: skip
        own_BTK = own.topk_logp_BTK[..., : how.group]
        found = spread_and_pull(own_BTK, confidence_BTK, group_BTK, ids_BT)
        yield from zip(("spread_F", "pull_F"), found, strict=True)


@torch.no_grad()
def mean_fidelity(teacher, prompts, responses, how: How, desc: str) -> np.ndarray:
    """The teacher's mean confidence along each response, [B]."""
    mean_B = np.zeros(len(prompts))
    for rows, ids_BT, mask_BT in batches(prompts, responses, how, teacher.device, desc):
        stats = logprobs.token_stats(
            teacher.base_model(input_ids=ids_BT, use_cache=False)[0],
            teacher.get_output_embeddings().weight, ids_BT, mask_BT=mask_BT,
            vocab_size=how.vocab_size, entropy=False,
        )  # fmt: skip
        mean_B[rows] = (stats.max_prob_BT.sum(dim=1) / mask_BT.sum(dim=1)).double().cpu().numpy()
    return mean_B
