"""What is measured of a student and a teacher, item by item, as plain data.

`probing.py` gives one number per token, `curves.py` means with errors; this file combines them:

    margin         by sentence and by token, and where the release rule would stop
    fidelity       by position, with the logistic; and when the teacher goes on itself
    completion     right answers when the teacher goes on from the student's first t tokens
    signal         the teacher's part of the gradient
    lookahead      how the student's next choice changes the teacher's confidence
    compatibility  overlap, correlation, stopping, lengths, pass@k

Every mean is {"mean", "se", "count", "problems"}, where count is of responses. Every curve is the
same in bins, as lists, where count is of tokens (`curves.Curve`). Errors are over problems.

Letters: B responses, F tokens of all responses one after the other, N sentences of all responses.
"""

import argparse
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

import evaluate
import release_rule
import teachability
from diagnose import curves, probing

HANDOVER = 32  # tokens before and after the point where the teacher takes over
TELLING = 0.1  # standard deviation of the teacher's confidence above which a choice matters to it
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
    answered: bool  # every problem has an answer
    template: dict  # `command.compare_templates`
    options: probing.Options = None
    teacher: object = None
    teacher_rows: list = field(default_factory=list)  # the teacher's own responses, ids
    lookahead: str = ""  # why lookahead is not measured; "" if it is
    bin_width: int = 0  # of the curves, tokens; 0: not decided yet
    between: tuple = (0, float("inf"))  # the tokens to which the logistic is fitted

    def resampling(self) -> dict:
        """Arguments of the bootstrap, the same for every student."""
        return {"resamples": self.args.resamples, "seed": self.args.seed}


def answers(job: Job, responses) -> list[list[dict]] | None:
    """Records of `evaluate.check_answer` by problem; None without answers to compare with."""
    if not job.answered:
        return None
    stops, S = job.options.stop_ids, job.args.samples
    records = [
        evaluate.check_answer(job.tokenizer, ids, job.problems[p], stops)
        for ids, p in zip(responses, job.problem_B.tolist(), strict=True)
    ]
    return [records[i : i + S] for i in range(0, len(records), S)]


def _right(records) -> np.ndarray:
    """1 for a right answer, else 0, [B]."""
    return np.array([float(record["correct"]) for samples in records for record in samples])


def _sums(value_F, read, job: Job, include_F=True):
    """Sum of a number over the tokens of every response, and their count, [B] each; nan and 0
    without any token."""
    include_F = np.broadcast_to(include_F, value_F.shape)
    row_F, B = read.row_F[include_F], len(job.problem_B)
    count_B = np.bincount(row_F, minlength=B)
    return np.where(count_B > 0, np.bincount(row_F, value_F[include_F], B), np.nan), count_B


def _row_means(value_F, read, job: Job, include_F=True) -> np.ndarray:
    """Mean of a number over the tokens of every response, [B]; nan without any token."""
    sum_B, count_B = _sums(value_F, read, job, include_F)
    return sum_B / np.maximum(count_B, 1)


def _token_mean(value_F, read, job: Job, include_F=True) -> dict:
    """Mean over all tokens with its error over problems; "count" is of the responses that have any
    of these tokens."""
    sum_B, count_B = _sums(value_F, read, job, include_F)
    return curves.mean(sum_B, job.problem_B, denominator_B=count_B)


def _curve(value_F, read, job: Job, edges, **options) -> curves.Curve:
    """A number by the position of its token."""
    return curves.curve(value_F, read.position_F, read.row_F, job.problem_B, edges, **options)


def measure_margin(job: Job, read, responses, edges, desc: str) -> dict:
    """The margin along some responses, and what the release rule makes of it."""
    args = job.args
    limits = {"min_segments": args.min_segments, "eps": args.bic_eps}
    scores, gain_B, at_B = [], [], []
    ends = np.cumsum(np.bincount(read.row_F))[:-1]
    counted_F = read.entropy_F >= args.margin_min_entropy
    parts = zip(responses, np.split(read.margin_F, ends), np.split(counted_F, ends), strict=True)
    for ids, margin_T, counted_T in tqdm(parts, desc=desc, total=len(responses), unit="response"):
        segment_T = teachability.token_segments(job.tokenizer, ids, job.splitter)
        scores_N = teachability.segment_scores(margin_T, segment_T, include_T=counted_T)
        scores.append(scores_N.numpy())
        point = release_rule.release_point(scores[-1], **limits)
        gain_B.append(point.gain)
        keep_T = release_rule.keep_mask(segment_T, point.kept)
        at_B.append(keep_T.mean() if point.kept is not None else np.nan)
    gain_B, at_B = np.array(gain_B), np.array(at_B)
    fired_B = ~np.isnan(at_B)
    counts = np.array([len(scores_N) for scores_N in scores])
    score_N, sentence_N = np.concatenate(scores), np.concatenate([np.arange(n) for n in counts])
    scored_N = ~np.isnan(score_N)  # some sentences have no token that counts
    row_N = np.repeat(np.arange(len(counts)), counts)
    by_sentence = curves.curve(
        score_N[scored_N], sentence_N[scored_N], row_N[scored_N], job.problem_B,
        curves.bins(int(counts.max())), quartiles=True,
    )  # fmt: skip
    names, quartiles = ("quartile_low", "median", "quartile_high"), [None] * 3
    if fired_B.any():
        quartiles = curves.plain(np.quantile(at_B[fired_B], [0.25, 0.5, 0.75]))
    return {
        "by_sentence": by_sentence.record(),
        "by_token": _curve(read.margin_F, read, job, edges, quartiles=True).record(),
        "sentences": curves.mean(counts, job.problem_B),
        "fired": curves.mean(fired_B, job.problem_B),
        "gain_over_6": curves.mean(gain_B > SIGNIFICANT, job.problem_B),
        "gain": curves.mean(np.where(fired_B, gain_B, np.nan), job.problem_B),
        "release_at": dict(zip(names, quartiles, strict=True)),
        "release_at_each": curves.plain(at_B),
        "gain_each": curves.plain(gain_B),
    }


def measure_signal(job: Job, read, edges) -> dict:
    """Where the gradient comes from, by position and by quarter of the response."""
    both_F = read.teacher_part_F + read.own_part_F
    lengths = np.bincount(read.row_F)
    quarter_F = np.minimum(4 * read.position_F // lengths[read.row_F], 3)
    by_quarter = curves.curve(
        read.teacher_part_F, quarter_F, read.row_F, job.problem_B, range(5), denominator_N=both_F
    )
    return {
        "variance": _curve(read.variance_F, read, job, edges).record(),
        "teacher_part": _curve(read.teacher_part_F, read, job, edges).record(),
        "own_part": _curve(read.own_part_F, read, job, edges).record(),
        "share": _curve(read.teacher_part_F, read, job, edges, denominator_N=both_F).record(),
        "share_by_quarter": by_quarter.record(),
    }


def measure_lookahead(job: Job, read, right_B) -> dict:
    """How often the student hesitates, and how its choices then change the teacher's confidence."""
    result = {"why_not": job.lookahead, "triggered": _token_mean(read.hesitates_F, read, job)}
    if job.lookahead:
        return result
    scored_F = ~np.isnan(read.spread_F)
    result |= {
        "spread": _token_mean(read.spread_F, read, job, scored_F),
        "telling": _token_mean((read.spread_F > TELLING).astype(float), read, job, scored_F),
        "competence": None,
    }
    if right_B is not None:
        pull_B = _row_means(read.pull_F, read, job, scored_F)
        some_B = ~np.isnan(pull_B)
        result["competence"] = curves.regression(
            pull_B[some_B], right_B[some_B], job.problem_B[some_B], **job.resampling()
        )
    return result


def measure_compatibility(job: Job, read, responses, records) -> dict:
    """Do the two models agree on tokens and stopping, and what does the student achieve alone?"""
    lengths = np.bincount(read.row_F)
    last_B = np.cumsum(lengths) - 1
    ended_B = np.array([ids[-1] in job.options.stop_ids for ids in responses])
    inside_F = np.ones(len(read.row_F), bool)
    inside_F[last_B] = False
    stops_F = inside_F & (read.teacher_stop_F > 0.5)
    earlier_B = np.bincount(read.row_F[stops_F], minlength=len(lengths)) > 0
    stops = {
        name: curves.mean(np.where(ended_B, stop_F[last_B], np.nan), job.problem_B)
        for name, stop_F in (("student", read.student_stop_F), ("teacher", read.teacher_stop_F))
    }
    summary = records and evaluate.summarise(records, **job.resampling())
    return {
        "overlap": _token_mean(read.overlap_F, read, job),
        "student_mass": _token_mean(read.student_mass_F, read, job),
        "teacher_mass": _token_mean(read.teacher_mass_F, read, job),
        "log_probs": curves.regression(
            read.student_logp_F, read.teacher_logp_F, job.problem_B[read.row_F],
            **job.resampling(),
        ),
        "reverse_kl": _token_mean(read.student_logp_F - read.teacher_logp_F, read, job),
        "stop_at_end": stops,
        "teacher_stops_earlier": curves.mean(earlier_B, job.problem_B),
        "truncated": curves.mean(~ended_B, job.problem_B),
        "tokens": curves.mean(lengths, job.problem_B),
        "answers": summary,
    }  # fmt: skip


def measure_completion(job: Job, read, responses, right_B, teacher_right_B) -> tuple[list, list]:
    """The teacher goes on from the student's first t tokens: how often it gets it right, and what
    becomes of its confidence. A response that has ended before t stays as it is.

    Returns the points of accuracy (none without answers) and those of confidence.
    """
    args, lengths = job.args, np.bincount(read.row_F)
    longest = int(np.quantile(lengths, 0.95))
    cuts = sorted({longest * i // (args.completions + 1) for i in range(1, args.completions + 1)})
    points, jumps = [], []
    for cut in (cut for cut in cuts if cut > 0):
        running = np.flatnonzero(lengths > cut)
        heads = [job.prompts[row] + responses[row][:cut] for row in running]
        desc, rest = f"teacher goes on after {cut}", args.max_new_tokens - cut
        tails = probing.sample(
            job.teacher, heads, job.options, max_new_tokens=rest, seed=args.seed, desc=desc
        )
        jumps.append(handover(job, read, running, heads, tails, cut, desc))
        if right_B is None:
            continue
        whole = list(responses)
        for row, tail in zip(running, tails, strict=True):
            whole[row] = responses[row][:cut] + tail
        whole_right_B = _right(answers(job, whole))
        points.append({
            "tokens": cut, "running": len(running) / len(lengths),
            "accuracy": curves.mean(whole_right_B, job.problem_B),
            "over_student": curves.mean(whole_right_B - right_B, job.problem_B),
            "over_teacher": curves.mean(whole_right_B - teacher_right_B, job.problem_B),
        })  # fmt: skip
    return points, jumps


def handover(job: Job, read, running, heads, tails, cut: int, desc: str) -> dict:
    """The teacher's mean confidence in the HANDOVER tokens before `cut`, in those that follow when
    the teacher goes on, and in those that the student wrote instead. Of the responses that reach
    `cut`: their row numbers `running`."""
    after_B = np.full(len(job.problem_B), np.nan)
    tails = [tail[:HANDOVER] for tail in tails]
    after_B[running] = probing.mean_fidelity(job.teacher, heads, tails, job.options, desc)
    before_B, student_B = (
        _row_means(read.fidelity_F, read, job,
                   (read.position_F >= first) & (read.position_F < first + HANDOVER))
        for first in (cut - HANDOVER, cut)
    )  # fmt: skip
    before_B[np.isnan(after_B)] = np.nan
    values = {"before": before_B, "teacher": after_B, "student": student_B,
              "jump": after_B - before_B, "over_student": after_B - student_B}  # fmt: skip
    means = {name: curves.mean(value_B, job.problem_B) for name, value_B in values.items()}
    return {"tokens": cut, "window": HANDOVER} | means


def measure(job: Job, student, name: str) -> tuple[dict, curves.Fit | None]:
    """All measurements of one student, as plain data, and the fit of its fidelity with its draws,
    None where nothing can be fitted."""
    args, options = job.args, job.options
    responses = probing.sample(
        student, job.prompts, options, max_new_tokens=args.max_new_tokens, seed=args.seed,
        desc=f"{name} answers",
    )  # fmt: skip
    read = probing.read(
        student, job.teacher, job.prompts, responses, options, lookahead=not job.lookahead,
        desc=f"reading {name}",
    )  # fmt: skip
    control = probing.read(
        student, job.teacher, job.prompts, job.teacher_rows, options, desc="reading teacher"
    )
    longest = 1 + int(max(read.position_F.max(), control.position_F.max()))
    edges = curves.bins(longest, width=job.bin_width or None, first=job.between[0])
    job.bin_width = int(edges[-1] - edges[-2])  # the next student's curves have the same bins
    records, right_B, teacher_right_B = answers(job, responses), None, None
    if records:
        right_B, teacher_right_B = _right(records), _right(answers(job, job.teacher_rows))
    points, jumps = measure_completion(job, read, responses, right_B, teacher_right_B)
    by_writer = {"student": (read, responses), "teacher": (control, job.teacher_rows)}
    fidelity, fits = {"handover": jumps}, {}
    for who, (readings, _) in by_writer.items():
        curve = _curve(readings.fidelity_F, readings, job, edges)
        fits[who] = curves.fit_curve(curve, between=job.between, **job.resampling())
        fit = fits[who].record() if fits[who] is not None else None
        fidelity[who] = {"curve": curve.record(), "fit": fit,
                         "mean": _token_mean(readings.fidelity_F, readings, job)}  # fmt: skip
    completion = None
    if records:
        over = curves.mean(teacher_right_B - right_B, job.problem_B)
        completion = {"points": points, "student": curves.mean(right_B, job.problem_B),
                      "teacher": curves.mean(teacher_right_B, job.problem_B),
                      "teacher_over_student": over}  # fmt: skip
    return {
        "margin": {
            who: measure_margin(job, readings, rows, edges, f"sentences of {who}")
            for who, (readings, rows) in by_writer.items()
        },
        "fidelity": fidelity,
        "completion": completion,
        "signal": measure_signal(job, read, edges),
        "lookahead": measure_lookahead(job, read, right_B),
        "compatibility": measure_compatibility(job, read, responses, records),
    }, fits["student"]


def shift(before: curves.Fit | None, after: curves.Fit | None) -> dict | None:
    """How far t* moved from one student to another, tokens; the interval of the difference on the
    same resamples of problems; and whether all of it is beyond half a bin, below which positions
    cannot be told apart. None unless both are located."""
    if before is None or after is None or not (before.located and after.located):
        return None
    width = max(before.width, after.width)
    low, high = curves.interval(after.midpoint_R - before.midpoint_R)
    if low is None:  # no resample has both
        return None
    tokens = curves.plain(after.logistic.midpoint - before.logistic.midpoint)
    moved = low > width / 2 or high < -width / 2
    return {"tokens": tokens, "interval": [low, high], "width": width, "moved": moved}
