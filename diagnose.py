r"""Can this teacher teach this student? Measured before GPU days are spent.

    python diagnose.py                                             the toy world `horizon`
    python diagnose.py --student S --teacher T --problems P.jsonl --out FOLDER
    python diagnose.py --compare runs/opd-seed0/student runs/lgr-seed0/student

Samples responses of the student and of the teacher to the same prompts, lets both models read all
of them, and writes report.json, report.md and pictures: whether plain on-policy distillation can
work, where supervision fades, which method fits, and the `train.py` command for it.

What is measured (for every student; the teacher's own responses are the control):

    margin         the teacher's margin among the student's top K, by sentence and by token; where
                   the release rule would stop                          release rule, 2605.13643
    fidelity       the teacher's confidence by position, and the four-parameter logistic; what it
                   gains when the teacher itself goes on                LGR, 2605.30833
    completion     how often the teacher gets it right from the student's first t tokens on
    signal         the teacher's part in the gradient, by position      LGR, Proposition 1
    lookahead      how much the student's next choice matters to the teacher's confidence after it,
                   and whether confident choices are right ones
    compatibility  top-K overlap, correlation of log-probs, stopping, vocabulary, template, pass@k

`probing.py` reads the models, `measuring.py` and `curves.py` do the sums, `report.py` says what it
means, `pictures.py` draws it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

import checkpoint
import curves
import evaluate
import flags
import harness
import lgr
import measuring
import pictures
import preparing
import probing
import report
import toy
from harness import MANY, number
from measuring import Job

# Rows of flags.FLAGS that mean the same here, and flags of this command alone.
SHARED = (
    "--toy --student --teacher --problems --difficulty --max-new-tokens --temperature --thinking "
    "--margin-top-k --margin --margin-min-entropy --min-segments --bic-eps --splitter --lgr-tau "
    "--lgr-top-k --device --dtype --threads --trust-remote-code --allow-bin --seed"
).split()
OWN = [
    ("--out", "runs/diagnose", "folder for report and pictures", {"metavar": "FOLDER"}),
    ("--count", 64, "problems; with a file, its first ones", {"low": 2, "high": MANY}),
    ("--samples", 4, "responses of either model to each", {"low": 1, "high": MANY}),
    ("--completions", 6, "lengths of the student's prefix from which the teacher goes on; 0: none",
     {"high": 1000}),
    ("--top-k", 16, "tokens of either model in overlap and gradient", {"low": 2}),
    ("--batch-size", 64, "responses in flight", {"low": 1}),
    ("--tokens-per-pass", 16384, "most tokens per forward pass, padding included: bounds memory; a "
     "longer response goes alone", {"low": 1}),
    ("--resamples", 400, "of the bootstrap over problems", {"low": 20, "high": 100_000}),
    ("--bin-width", 0, "of the curves, tokens (default on the toy a move, else a "
     f"{curves.MOST_BINS}th of the longest response)", {}),
    ("--fit-from", None, "first token to which the logistic is fitted: what every response begins "
     "with says nothing (default on the toy its first move, else 0)",
     {"type": number(int, 0), "metavar": "N"}),
    ("--fit-to", None, "the token before which that ends (default on the toy the end of the last "
     "move, else the end)", {"type": number(int, 1), "metavar": "N"}),
    ("--no-figures", False, "write no pictures", {}),
]  # fmt: skip


# ------------------------------------------------------------------------------------ the command
def make_parser() -> harness.Parser:
    """The flags: some of train.py's, with the same defaults, and OWN."""
    parser = harness.Parser(
        prog="diagnose.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    known = {row[0]: row for row in sum(flags.FLAGS.values(), [])}
    flags.add_flags(parser, OWN + [known[flag] for flag in SHARED])
    parser.add_argument(
        "--compare", nargs="+", default=[], type=harness.path_name, metavar="MODEL",
        help="other students, such as trained ones, on the same problems",
    )  # fmt: skip
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on student and machine filled in; exit 2 on bad flags."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.problems is not None and (args.student is None or args.teacher is None):
        parser.error("--problems needs --student and --teacher")
    if args.top_k < max(args.margin_top_k, args.lgr_top_k):
        parser.error(f"--top-k {args.top_k} is less than --margin-top-k or --lgr-top-k")
    names = [short(path) for path in args.compare]
    twice = next((name for name in names if names.count(name) > 1 or name == "student"), None)
    if twice is not None:
        parser.error(f"--compare has more than one model called {twice!r}: rename a folder")
    known = {row[0]: row[1] for row in sum(flags.FLAGS.values(), [])}
    args.given = {  # what the suggested command repeats
        flag: value for flag in SHARED
        if (value := getattr(args, flag[2:].replace("-", "_"))) != known[flag]
        and not (value is None and isinstance(known[flag], tuple))
    }  # fmt: skip
    flags.fill_in(parser, args)
    opening = toy.OPENING_TOKENS if args.problems is None else 0
    args.fit_from = opening if args.fit_from is None else args.fit_from
    if args.fit_to is None and args.problems is None:
        args.fit_to = toy.OPENING_TOKENS + toy.MOVE_TOKENS * args.difficulty
    if args.fit_to is not None and args.fit_to <= args.fit_from:
        parser.error(f"--fit-to {args.fit_to} is not after --fit-from {args.fit_from}")
    return args


def short(path) -> str:
    """What a student is called in the report: the last part of its path that is not "student".

    >>> short("runs/lgr-seed0/student"), short("Qwen/Qwen3-0.6B")
    ('lgr-seed0', 'Qwen3-0.6B')
    """
    parts = [part for part in Path(path).parts if part not in ("student", "/")]
    return parts[-1] if parts else str(path)


def check_out(out) -> None:
    """ValueError unless a report can be written there: nothing yet, or an earlier report, which
    will be moved aside."""
    out = Path(out)
    harness.check_creatable("--out", out)
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").is_file():
        raise ValueError(f"--out {out} holds files that are no diagnosis; name another folder")


def prepare(args) -> Job:
    """Everything that can fail without the weights."""
    check_out(args.out)
    paths = preparing.student_and_teacher(args)
    tokenizers, configs, vocab_size = preparing.open_pair(args)
    trust = {"trust_remote_code": args.trust_remote_code}
    for path in args.compare:
        tokenizer = harness.load_tokenizer(path, **trust)
        config = harness.load_config(path, **trust).get_text_config(decoder=True)
        try:
            shared = harness.common_vocabulary(tokenizer, tokenizers["--teacher"])
        except ValueError as error:
            raise ValueError(f"--compare {path}: {error}") from None
        vocab_size = min(vocab_size, shared, config.vocab_size)
        paths[path], configs[path] = path, config
    if args.top_k > vocab_size:
        raise ValueError(f"--top-k {args.top_k} exceeds the vocabulary of {vocab_size}")
    tokenizer = tokenizers["--student"]
    if args.problems is not None:
        problems = harness.load_problems(args.problems, require_answer=False)[: args.count]
    else:
        records = toy.problems(args.count, moves=args.difficulty, split="test")
        problems = harness.from_records(records, where="toy")
    if len(problems) < 2:
        raise ValueError(f"{args.problems}: one problem gives no errors; at least two are needed")
    prompts = harness.render_prompts(tokenizer, problems, thinking=args.thinking)
    preparing.check_prompts(tokenizer, configs, vocab_size, problems, prompts, args.max_new_tokens)
    splitter, splitter_name = preparing.open_splitter(args)
    return Job(
        args=args, paths=paths, tokenizer=tokenizer, splitter=splitter, splitter_name=splitter_name,
        problems=problems, prompts=[p for p in prompts for _ in range(args.samples)],
        problem_B=np.repeat(np.arange(len(problems)), args.samples), vocab_size=vocab_size,
        answered=all(problem["answer"] is not None for problem in problems),
        template=compare_templates(tokenizers["--teacher"], problems, prompts, args.thinking),
        configs=configs,
        bin_width=args.bin_width or (toy.MOVE_TOKENS if args.problems is None else 0),
        between=(args.fit_from, float("inf") if args.fit_to is None else args.fit_to),
    )  # fmt: skip


def compare_templates(teacher_tokenizer, problems, prompts, thinking: bool) -> dict:
    """{"same": share of the problems that the teacher's own template renders as the student's
    does, "why": an error instead}. Training gives the teacher the student's."""
    try:
        own = harness.render_prompts(teacher_tokenizer, problems, thinking=thinking)
    except ValueError as error:
        return {"same": 0.0, "why": str(error)}
    same = [ours == theirs for ours, theirs in zip(prompts, own, strict=True)]
    return {"same": sum(same) / len(same), "why": ""}


def load(job: Job, path: str):
    """A model, checked against the prompts that it will read."""
    args = job.args
    model = harness.load_model(
        path, dtype=getattr(torch, args.dtype), device=args.device,
        trust_remote_code=args.trust_remote_code, allow_bin=args.allow_bin,
    )  # fmt: skip
    harness.check_head(str(path), model, job.prompts[0][:8])
    evaluate.check_sampling(path, model, job.prompts, args.max_new_tokens)
    return model


# -------------------------------------------------------------------------------------- the run
def run(args) -> dict:
    """Measure as told, write the report, and return it."""
    if args.threads:
        torch.set_num_threads(args.threads)
    job = prepare(args)
    job.teacher = load(job, job.paths["--teacher"]).requires_grad_(False)
    student = load(job, job.paths["--student"])
    job.how = probing.How(
        stop_ids=tuple(harness.stop_ids(student, job.teacher, job.tokenizer)),
        pad_id=harness.pad_id(job.tokenizer), vocab_size=job.vocab_size,
        temperature=args.temperature, candidates=args.top_k, margin_top_k=args.margin_top_k,
        group=args.lgr_top_k, tau=args.lgr_tau, margin=args.margin, batch_size=args.batch_size,
        tokens=args.tokens_per_pass,
    )  # fmt: skip
    try:
        lgr.self_check(job.teacher)
    except ValueError as error:
        job.lookahead = harness.first_line(error)
    out = Path(args.out)
    checkpoint.make_folder(out)
    job.teacher_rows = probing.sample(
        job.teacher, job.prompts, job.how, max_new_tokens=args.max_new_tokens, seed=args.seed,
        desc="teacher answers",
    )  # fmt: skip
    result = {
        "settings": vars(args), **preparing.surroundings(args),
        "models": {flag: _shown(path) for flag, path in job.paths.items()},
        "sentence_splitter": job.splitter_name, "problems": len(job.problems),
        "vocabulary": vocabulary(job, student), "template": job.template, "students": {},
    }  # fmt: skip
    first = None
    for name, path in [("student", None), *((short(path), path) for path in args.compare)]:
        student = student if path is None else load(job, path)
        measured, fit = measuring.measure(job, student, name)
        first = fit if path is None else first
        measured["shift"] = measuring.shift(first, fit) if path is not None else None
        result["students"][name] = measured | {"path": _shown(path or job.paths["--student"])}
        result["verdicts"], result["command"] = report.judge(result)
        checkpoint.write_json(out / "report.json", result)  # what is done by now, should more fail
        del student
    drawn = [] if args.no_figures else pictures.draw(result, out)
    (out / "report.md").write_text(report.markdown(result, drawn), encoding="utf-8")
    return result


def _shown(path) -> str:
    """A path for the report: of what comes with this repository, from its top."""
    top = Path(__file__).resolve().parent
    return str(Path(path).relative_to(top) if Path(path).is_relative_to(top) else path)


def vocabulary(job: Job, student) -> dict:
    """Sizes of the vocabularies, and what ends a response for either model."""
    heads = {"student": student, "teacher": job.teacher}
    stops = {}
    for name, model in heads.items():
        try:
            stops[name] = harness.stop_ids(model)
        except ValueError:  # only the tokenizer knows one
            stops[name] = []
    rows = {name: len(model.get_output_embeddings().weight) for name, model in heads.items()}
    return {"shared": job.vocab_size, "rows": rows, "stop_ids": stops}


def main(argv=None) -> int:
    """The command; exit status 2 and one line on stderr for what the user can put right."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        result = run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        harness.complain("diagnose.py", error)
        return 2
    print(report.summary(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
