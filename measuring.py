"""What `diagnose.py` measures of a student and a teacher, item by item, as plain data.

`probing.py` gives one number per token, `curves.py` means with errors; here they are put together:

    margin         by sentence and by token, and where the release rule would stop
    fidelity       by position, with the logistic; and when the teacher itself goes on
    completion     right answers when the teacher goes on from the student's first t tokens
    signal         the teacher's part in the gradient
    lookahead      what the student's next choice does to the teacher's confidence
    compatibility  overlap, correlation, stopping, lengths, pass@k

Every mean is {"mean", "se", "count", "problems"}, counting responses; every curve is lists of such
by bins, counting tokens, too (`curves.Curve`). Errors are over problems, for responses to one
problem are alike.

Letters: B responses, F tokens of all responses one behind the other, N sentences of all responses.
"""

import argparse
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

import curves
import evaluate
import probing
import release_rule
import teachability

HANDOVER = 32  # tokens before and after the point where the teacher takes over
TELLING = 0.1  # standard deviation of confidence from which on a choice is said to matter
SIGNIFICANT = 6.0  # BIC gain, 2605.13643


@dataclass
class Job:
    """What all measurements share. Rows are responses: `samples` to every problem, in order."""

    args: argparse.Namespace
    paths: dict[str, str]
    tokenizer: object
    splitter: object
    splitter_name: str
    problems: list[dict]
    prompts: list[list[int]]  # of every row
    problem_B: np.ndarray
    vocab_size: int
    answered: bool
    template: dict
    configs: dict
    how: probing.How = None
    teacher: object = None
    teacher_rows: list = field(default_factory=list)  # its own responses, ids
    lookahead: str = ""  # why it is not measured, or nothing
    bin_width: int = 0  # of the curves, tokens; 0: not decided yet
    between: tuple = (0, float("inf"))  # the tokens to which the logistic is fitted

    def resampling(self) -> dict:
        """Arguments of `curves.resample`, the same for every student."""
        return {"resamples": self.args.resamples, "seed": self.args.seed}


def answers(job: Job, responses) -> list[list[dict]] | None:
    """Records of `evaluate.check_answer` by problem; None where there is nothing to check."""
    if not job.answered:
        return None
    stops, S = job.how.stop_ids, job.args.samples
    records = [
        evaluate.check_answer(job.tokenizer, ids, job.problems[p], stops)
        for ids, p in zip(responses, job.problem_B.tolist(), strict=True)
    ]
    return [records[i : i + S] for i in range(0, len(records), S)]


def _right(records) -> np.ndarray:
    """1 for a right answer, else 0, [B]."""
    return np.array([float(record["correct"]) for samples in records for record in samples])


def _per_row(value_F, row_F, rows: int, include_F=None) -> np.ndarray:
    """Mean of a number over the tokens of every response, [B]; nan without any.

    >>> _per_row(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 2]), 3).tolist()
    [2.0, nan, 5.0]
    """
    if include_F is not None:
        value_F, row_F = value_F[include_F], row_F[include_F]
    with np.errstate(invalid="ignore"):
        return np.bincount(row_F, value_F, rows) / np.bincount(row_F, minlength=rows)


def _along(job: Job, found, value_F, edges, **options) -> curves.Curve:
    """A curve of some number over the positions of its tokens."""
    return curves.curve(value_F, found.position_F, found.row_F, job.problem_B, edges, **options)


def _token_mean(job: Job, found, value_F, include_F=None) -> dict:
    """Mean over all tokens with its error over problems; its count is that of the responses that
    have any."""
    include_F = np.ones(len(value_F), bool) if include_F is None else include_F
    count_B = np.bincount(found.row_F[include_F], minlength=len(job.problem_B))
    sum_B = np.bincount(found.row_F[include_F], value_F[include_F], len(job.problem_B))
    sum_B = np.where(count_B > 0, sum_B, np.nan)
    return curves.mean(sum_B, job.problem_B, denominator_B=count_B)


def measure_margin(job: Job, found, responses, edges, desc: str) -> dict:
    """The margin along some responses, and what the release rule makes of it."""
    args = job.args
    scores, gain_B, at_B = [], [], []
    ends = np.cumsum(np.bincount(found.row_F))[:-1]
    counted_F = found.entropy_F >= args.margin_min_entropy
    parts = zip(responses, np.split(found.margin_F, ends), np.split(counted_F, ends), strict=True)
    for ids, margin_T, counted_T in tqdm(parts, desc=desc, total=len(responses), unit="response"):
        segment_T = teachability.token_segments(job.tokenizer, ids, job.splitter)
        scores_N = teachability.segment_scores(margin_T, segment_T, include_T=counted_T)
        scores.append(scores_N.numpy())
        point = release_rule.release_point(
            scores[-1], min_segments=args.min_segments, eps=args.bic_eps
        )
        gain_B.append(point.gain)
        keep_T = release_rule.keep_mask(segment_T, point.kept)
        at_B.append(keep_T.mean() if point.kept is not None else np.nan)
    gain_B, at_B = np.array(gain_B), np.array(at_B)
    fired_B = ~np.isnan(at_B)
    counts = np.array([len(scores_N) for scores_N in scores])
    score_N, sentence_N = np.concatenate(scores), np.concatenate([np.arange(n) for n in counts])
    heard_N = ~np.isnan(score_N)  # some sentences have no token that counts
    by_sentence = curves.curve(
        score_N[heard_N], sentence_N[heard_N], np.repeat(np.arange(len(counts)), counts)[heard_N],
        job.problem_B, curves.bins(int(counts.max())), quartiles=True,
    )  # fmt: skip
    middle = [curves.plain(x) for x in np.quantile(at_B[fired_B], [0.25, 0.5, 0.75])] \
        if fired_B.any() else [None] * 3  # fmt: skip
    return {
        "by_sentence": by_sentence.record(),
        "by_token": _along(job, found, found.margin_F, edges, quartiles=True).record(),
        "sentences": curves.mean(counts, job.problem_B),
        "fired": curves.mean(fired_B, job.problem_B),
        "gain_over_6": curves.mean(gain_B > SIGNIFICANT, job.problem_B),
        "gain": curves.mean(np.where(fired_B, gain_B, np.nan), job.problem_B),
        "release_at": dict(zip(("quartile_low", "median", "quartile_high"), middle, strict=True)),
        "release_at_each": curves.plain(at_B),
        "gain_each": curves.plain(gain_B),
    }


def measure_signal(job: Job, found, edges) -> dict:
    """Where the gradient comes from, by position and by quarter of the response."""
    whole_F = found.teacher_part_F + found.own_part_F
    lengths = np.bincount(found.row_F)
    quarter_F = np.minimum(4 * found.position_F // lengths[found.row_F], 3)
    by_quarter = curves.curve(
        found.teacher_part_F, quarter_F, found.row_F, job.problem_B, np.arange(5),
        denominator_N=whole_F,
    )  # fmt: skip
    return {
        "variance": _along(job, found, found.variance_F, edges).record(),
        "teacher_part": _along(job, found, found.teacher_part_F, edges).record(),
        "own_part": _along(job, found, found.own_part_F, edges).record(),
        "share": _along(job, found, found.teacher_part_F, edges, denominator_N=whole_F).record(),
        "share_by_quarter": by_quarter.record(),
    }


def measure_lookahead(job: Job, found, right_B) -> dict:
    """How often the student hesitates, and what its choices then do to the teacher."""
    there_F = ~np.isnan(found.spread_F)
    result = {"why_not": job.lookahead, "triggered": _token_mean(job, found, found.hesitates_F)}
    if job.lookahead:
        return result
    pull_B = _per_row(found.pull_F, found.row_F, len(job.problem_B), there_F)
    result |= {
        "spread": _token_mean(job, found, found.spread_F, there_F),
        "telling": _token_mean(job, found, (found.spread_F > TELLING).astype(float), there_F),
        "competence": None,
    }
    if right_B is not None:
        there_B = ~np.isnan(pull_B)
        result["competence"] = curves.regression(
            pull_B[there_B], right_B[there_B], job.problem_B[there_B], **job.resampling()
        )
    return result


def measure_compatibility(job: Job, found, responses, records) -> dict:
    """Do the two speak the same language, and does the student get anywhere on its own?"""
    lengths = np.bincount(found.row_F)
    last_B = np.cumsum(lengths) - 1
    ended_B = np.array([ids[-1] in job.how.stop_ids for ids in responses])
    inside_F = np.ones(len(found.row_F), bool)
    inside_F[last_B] = False
    earlier_B = np.bincount(found.row_F[inside_F & (found.teacher_stop_F > 0.5)],
                            minlength=len(lengths)) > 0  # fmt: skip
    stops = {
        name: curves.mean(np.where(ended_B, stop_F[last_B], np.nan), job.problem_B)
        for name, stop_F in (("student", found.student_stop_F), ("teacher", found.teacher_stop_F))
    }
    summary = None
    if records is not None:
        summary = evaluate.summarise(records, resamples=job.args.resamples, seed=job.args.seed)
    return {
        "overlap": _token_mean(job, found, found.overlap_F),
        "student_mass": _token_mean(job, found, found.student_mass_F),
        "teacher_mass": _token_mean(job, found, found.teacher_mass_F),
        "log_probs": curves.regression(
            found.student_logp_F, found.teacher_logp_F, job.problem_B[found.row_F],
            **job.resampling(),
        ),
        "reverse_kl": _token_mean(job, found, found.student_logp_F - found.teacher_logp_F),
        "stop_at_end": stops,
        "teacher_stops_earlier": curves.mean(earlier_B, job.problem_B),
        "truncated": curves.mean(~ended_B, job.problem_B),
        "tokens": curves.mean(lengths, job.problem_B),
        "answers": summary,
    }  # fmt: skip


def measure_completion(job: Job, found, responses, right_B, teacher_right_B) -> tuple[list, list]:
    """The teacher goes on from the student's first t tokens: how often it gets it right, and what
    becomes of its confidence. A response that has ended before t stands as it is.

    Returns the points of accuracy (none where there are no answers) and those of confidence.
    """
    args, lengths = job.args, np.bincount(found.row_F)
    longest = int(np.quantile(lengths, 0.95))
    cuts = sorted({longest * i // (args.completions + 1) for i in range(1, args.completions + 1)})
    points, jumps = [], []
    for cut in (cut for cut in cuts if cut > 0):
        going = np.flatnonzero(lengths > cut)
        heads = [job.prompts[row] + responses[row][:cut] for row in going]
        desc, room = f"teacher goes on after {cut}", args.max_new_tokens - cut
        tails = probing.sample(
            job.teacher, heads, job.how, max_new_tokens=room, seed=args.seed, desc=desc
        )
        jumps.append(handover(job, found, going, heads, tails, cut, desc))
        if right_B is None:
            continue
        whole = list(responses)
        for row, tail in zip(going, tails, strict=True):
            whole[row] = responses[row][:cut] + tail
        right_now_B = _right(answers(job, whole))
        points.append({
            "tokens": cut, "running": len(going) / len(lengths),
            "accuracy": curves.mean(right_now_B, job.problem_B),
            "over_student": curves.mean(right_now_B - right_B, job.problem_B),
            "over_teacher": curves.mean(right_now_B - teacher_right_B, job.problem_B),
        })  # fmt: skip
    return points, jumps


def handover(job: Job, found, going, heads, tails, cut: int, desc: str) -> dict:
    """The teacher's mean confidence in the HANDOVER tokens before `cut`, in those that follow when
    it goes on itself, and in those that the student wrote there."""
    rows = len(job.problem_B)
    after_B = np.full(rows, np.nan)
    tails = [tail[:HANDOVER] for tail in tails]
    after_B[going] = probing.mean_fidelity(job.teacher, heads, tails, job.how, desc)
    before_F = (found.position_F >= cut - HANDOVER) & (found.position_F < cut)
    own_F = (found.position_F >= cut) & (found.position_F < cut + HANDOVER)
    before_B, own_B = (
        _per_row(found.fidelity_F, found.row_F, rows, inside_F) for inside_F in (before_F, own_F)
    )
    before_B[np.isnan(after_B)] = np.nan  # ended by then
    named = {"before": before_B, "teacher": after_B, "student": own_B,
             "jump": after_B - before_B, "over_student": after_B - own_B}  # fmt: skip
    means = {name: curves.mean(value_B, job.problem_B) for name, value_B in named.items()}
    return {"tokens": cut, "window": HANDOVER} | means


def measure(job: Job, student, name: str) -> tuple[dict, curves.Fit | None]:
    """All measurements of one student, as plain data, and the fit of its fidelity with its draws,
    None where there is nothing to fit."""
    args, how = job.args, job.how
    limit = args.max_new_tokens
    responses = probing.sample(
        student, job.prompts, how, max_new_tokens=limit, seed=args.seed, desc=f"{name} answers"
    )
    found = probing.read(
        student, job.teacher, job.prompts, responses, how, lookahead=not job.lookahead,
        desc=f"reading {name}",
    )  # fmt: skip
    control = probing.read(
        student, job.teacher, job.prompts, job.teacher_rows, how, desc="reading teacher"
    )
    longest = 1 + int(max(found.position_F.max(), control.position_F.max()))
    edges = curves.bins(longest, width=job.bin_width or None, first=job.between[0])
    job.bin_width = int(edges[-1] - edges[-2])  # the next student's curves have the same bins
    records, teachers = answers(job, responses), answers(job, job.teacher_rows)
    right_B = _right(records) if records else None
    teacher_right_B = _right(teachers) if records else None
    points, jumps = measure_completion(job, found, responses, right_B, teacher_right_B)
    by_who = {"student": (found, responses), "teacher": (control, job.teacher_rows)}
    fidelity, fits = {"handover": jumps}, {}
    for who, (readings, _) in by_who.items():
        curve = _along(job, readings, readings.fidelity_F, edges)
        fits[who] = curves.fit_curve(curve, between=job.between, **job.resampling())
        fit = fits[who].record() if fits[who] is not None else None
        fidelity[who] = {"curve": curve.record(), "fit": fit,
                         "mean": _token_mean(job, readings, readings.fidelity_F)}  # fmt: skip
    completion = None
    if records:
        over = curves.mean(teacher_right_B - right_B, job.problem_B)
        completion = {"points": points, "student": curves.mean(right_B, job.problem_B),
                      "teacher": curves.mean(teacher_right_B, job.problem_B),
                      "teacher_over_student": over}  # fmt: skip
    return {
        "margin": {
            who: measure_margin(job, readings, rows, edges, f"sentences of {who}")
            for who, (readings, rows) in by_who.items()
        },
        "fidelity": fidelity,
        "completion": completion,
        "signal": measure_signal(job, found, edges),
        "lookahead": measure_lookahead(job, found, right_B),
        "compatibility": measure_compatibility(job, found, responses, records),
    }, fits["student"]


def shift(before: curves.Fit | None, after: curves.Fit | None) -> dict | None:
    """How far t* moved from one student to another, tokens, with the interval of the difference on
    the same resamples of problems, and whether that is surely more than half a bin, below which
    nothing can be told apart; None unless both are located."""
    if before is None or after is None or not (before.located and after.located):
        return None
    width = max(before.width, after.width)
    low, high = curves.interval(after.midpoint_R - before.midpoint_R)
    if low is None:  # no resample has both
        return None
    tokens = curves.plain(after.logistic.midpoint - before.logistic.midpoint)
    moved = low > width / 2 or high < -width / 2
    return {"tokens": tokens, "interval": [low, high], "width": width, "moved": moved}
