"""The command `python -m diagnose`: its flags, what can fail without the weights, the run."""

import argparse
import contextlib
from pathlib import Path

import numpy as np
import torch
import transformers

import diagnose
import harness
import lgr
import toy
from diagnose import curves, measuring, pictures, probing, report, verdicts
from diagnose.measuring import Job
from harness import ANY, BIG, COUNT, MANY, POSITIVE

# Flags that train.py has, too: the harness's, and those of the methods (a test compares them).
SHARED = (
    "--toy --student --teacher --problems --difficulty --max-new-tokens --temperature --thinking "
    "--splitter --device --dtype --threads --trust-remote-code --allow-bin --skip-bad-problems "
    "--seed"
).split()
METHODS = [
    ("--margin-top-k", 4, (2, MANY), "student candidates that the margin looks at"),
    ("--margin", "logprob", ["logprob", "prob"], "difference of what"),
    ("--margin-min-entropy", 0.0, ANY, "average tokens of at least this student entropy, nats"),
    ("--min-segments", 2, COUNT, "sentences on either side of the change point"),
    ("--bic-eps", 1e-12, POSITIVE, "added to the residual sum of squares"),
    ("--lgr-tau", 0.2, ANY, "look ahead above this student entropy, nats"),
    ("--lgr-top-k", 8, (2, MANY), "student candidates in a group"),
]
OWN = [
    ("--out", "runs/diagnose", None, "folder for report and pictures"),
    ("--count", 64, (2, MANY), "problems; with a file, its first ones"),
    ("--samples", 4, COUNT, "responses of either model to each"),
    ("--completions", 6, (0, 1000), "lengths of the student's prefix from which the teacher goes "
     "on; 0: none"),
    ("--top-k", 16, (2, MANY), "tokens of either model in overlap and gradient"),
    ("--batch-size", 64, COUNT, "responses in flight"),
    ("--tokens-per-pass", 2048, (1, BIG), "most tokens per forward pass, padding included: bounds "
     "memory; a longer response goes alone"),
    ("--resamples", 400, (20, 100_000), "of the bootstrap over problems"),
    ("--bin-width", 0, ANY, "of the curves, tokens; 0: on the toy a move, else a "
     f"{curves.MOST_BINS}th of the longest response"),
    ("--fit-from", None, (0, BIG), "first token to which the logistic is fitted; leave out an "
     "opening that all responses share (on the toy its first move, else 0)"),
    ("--fit-to", None, (1, BIG), "the token before which that ends (on the toy the end of the last "
     "move, else the end)"),
    ("--no-figures", False, None, "write no pictures"),
]  # fmt: skip
ROWS = OWN + METHODS + [row for row in sum(harness.MACHINE.values(), []) if row[0] in SHARED]


def make_parser() -> harness.Parser:
    """The flags: ROWS, and --compare."""
    parser = harness.Parser(
        prog="python -m diagnose", description=diagnose.__doc__.splitlines()[0], allow_abbrev=False
    )
    harness.add_flags(parser, ROWS)
    parser.add_argument(
        "--compare", nargs="+", default=[], type=harness.path_name, metavar="MODEL",
        help="other students, such as trained ones, on the same problems",
    )  # fmt: skip
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what was left open worked out; exit 2 on bad flags."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    toys = {"threads": 1} if "student" not in given else {}  # one is best for small models
    args = argparse.Namespace(**harness.defaults(ROWS) | toys | given)
    if args.problems is not None and (args.student is None or args.teacher is None):
        parser.error("--problems needs --student and --teacher")
    if args.top_k < max(args.margin_top_k, args.lgr_top_k):
        parser.error(f"--top-k {args.top_k} is less than --margin-top-k or --lgr-top-k")
    names = ["student", *map(short, args.compare)]
    twice = next((name for name in names[1:] if names.count(name) > 1), None)
    if twice is not None:
        parser.error(f"--compare has more than one model called {twice!r}: rename a folder")
    flags = {flag[2:].replace("-", "_"): flag for flag in (*SHARED, *(row[0] for row in METHODS))}
    args.given = {flags[k]: given[k] for k in flags if k in given}  # the suggested command has them
    origins = {"max_new_tokens": "command line" if "max_new_tokens" in given else "default"}
    vars(args).update(harness.left_open(parser, args, origins))
    on_toy = args.problems is None
    if args.fit_from is None:
        args.fit_from = toy.OPENING_TOKENS if on_toy else 0
    if args.fit_to is None and on_toy:
        args.fit_to = toy.OPENING_TOKENS + toy.MOVE_TOKENS * args.difficulty
    if args.fit_to is not None and args.fit_to <= args.fit_from:
        parser.error(f"--fit-to {args.fit_to} is not after --fit-from {args.fit_from}")
    return args


def short(path) -> str:
    """The name of a student in the report: the last part of its path that is not "student".

    >>> short("runs/lgr-seed0/student"), short("Qwen/Qwen3-0.6B")
    ('lgr-seed0', 'Qwen3-0.6B')
    """
    parts = [part for part in Path(path).parts if part not in ("student", "/")]
    return parts[-1] if parts else str(path)


# ---------------------------------------------------------------------------- without the weights
def check_out(out) -> None:
    """ValueError unless nothing is there yet, or an earlier report, which will be moved aside."""
    if (out := Path(out)).exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").is_file():
        raise ValueError(f"--out {out} holds files that are no diagnosis; name another folder")


def prepare(args) -> Job:
    """Everything that can fail without the weights."""
    paths = harness.student_and_teacher(args)
    tokenizers, configs, vocab_size = harness.open_pair(args)
    trust = {"trust_remote_code": args.trust_remote_code}
    for path in args.compare:
        tokenizer = harness.load_tokenizer(path, **trust)
        configs[path] = harness.load_config(path, **trust).get_text_config(decoder=True)
        try:
            shared = harness.common_vocabulary(tokenizer, tokenizers["--teacher"])
        except ValueError as error:
            raise ValueError(f"--compare {path}: {error}") from None
        vocab_size = min(vocab_size, shared, configs[path].vocab_size)
        harness.check_tokens({path: configs[path]}, tokenizer)
        paths[path] = path
    if args.top_k > vocab_size:
        raise ValueError(f"--top-k {args.top_k} exceeds the vocabulary of {vocab_size}")
    tokenizer = tokenizers["--student"]
    skipped = [] if args.skip_bad_problems else None
    if args.problems is not None:
        answers = {"require_answer": False, "skipped": skipped}
        problems = harness.load_problems(args.problems, **answers)[: args.count]
    else:
        records = toy.problems(args.count, moves=args.difficulty, split="test")
        problems = harness.from_records(records, where="toy")
    how = {"configs": configs, "vocab_size": vocab_size, "skipped": skipped}
    problems, prompts = harness.open_prompts(args, tokenizer, problems, **how)
    if len(problems) < 2:
        raise ValueError(f"{args.problems}: one problem gives no errors; at least two are needed")
    harness.tell_skipped("diagnose", skipped)
    splitter, splitter_name = harness.open_splitter(args.splitter)
    return Job(
        args=args, paths=paths, tokenizer=tokenizer, splitter=splitter, splitter_name=splitter_name,
        problems=problems, prompts=[p for p in prompts for _ in range(args.samples)],
        problem_B=np.repeat(np.arange(len(problems)), args.samples), vocab_size=vocab_size,
        answered=all(problem["answer"] is not None for problem in problems),
        template=compare_templates(tokenizers["--teacher"], problems, prompts, args.thinking),
        bin_width=args.bin_width or (toy.MOVE_TOKENS if args.problems is None else 0),
        between=(args.fit_from, float("inf") if args.fit_to is None else args.fit_to),
    )  # fmt: skip


def compare_templates(teacher_tokenizer, problems, prompts, thinking: bool) -> dict:
    """{"same": share of the problems that the teacher's own template renders as the student's
    does, "why": an error instead}. In training the teacher reads the student's."""
    try:
        rendered = harness.render_prompts(teacher_tokenizer, problems, thinking=thinking)
    except ValueError as error:
        return {"same": 0.0, "why": str(error)}
    same = [ids == teacher_ids for ids, teacher_ids in zip(prompts, rendered, strict=True)]
    return {"same": sum(same) / len(same), "why": ""}


# -------------------------------------------------------------------------------------- the run
def load(job: Job, path: str):
    """A model, checked against the prompts that it will read."""
    args = job.args
    model = harness.load_model(
        path, dtype=getattr(torch, args.dtype), device=args.device,
        trust_remote_code=args.trust_remote_code, allow_bin=args.allow_bin,
    )  # fmt: skip
    harness.check_head(str(path), model, job.prompts[0][:8])
    harness.check_sampling(path, model, job.prompts, args.max_new_tokens)
    return model


def run(args) -> dict:
    """Measure as told, write the report, and return it."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with contextlib.closing(harness.Claim(args.out)) as claim:
        claim.take()
        check_out(args.out)
        return measure(args, prepare(args), claim)


def measure(args, job: Job, claim) -> dict:
    """The same, of what can fail only with the weights, and with a folder that is claimed."""
    job.teacher = load(job, job.paths["--teacher"]).requires_grad_(False)
    student = load(job, job.paths["--student"])
    job.options = probing.Options(
        stop_ids=tuple(harness.stop_ids(student, job.teacher, job.tokenizer)),
        pad_id=harness.pad_id(job.tokenizer), vocab_size=job.vocab_size,
        temperature=args.temperature, candidates=args.top_k, margin_top_k=args.margin_top_k,
        group=args.lgr_top_k, tau=args.lgr_tau, margin=args.margin, batch_size=args.batch_size,
        tokens=args.tokens_per_pass,
    )  # fmt: skip
    try:
        harness.check_supported(job.teacher, max(map(len, job.prompts)) + args.max_new_tokens)
        lgr.self_check(job.teacher)
    except ValueError as error:
        job.lookahead = harness.first_line(error)
    out = Path(args.out)
    claim.begin()
    job.teacher_rows = probing.sample(
        job.teacher, job.prompts, job.options, max_new_tokens=args.max_new_tokens, seed=args.seed,
        desc="teacher answers",
    )  # fmt: skip
    result = {
        "settings": vars(args), **harness.surroundings(args.device),
        "models": {flag: _shown(path) for flag, path in job.paths.items()},
        "sentence_splitter": job.splitter_name, "problems": len(job.problems),
        "vocabulary": vocabulary(job, student), "template": job.template, "students": {},
    }  # fmt: skip
    first_fit = None
    for name, path in [("student", None), *((short(path), path) for path in args.compare)]:
        student = student if path is None else load(job, path)
        measured, fit = measuring.measure(job, student, name)
        first_fit = fit if path is None else first_fit
        measured["shift"] = measuring.shift(first_fit, fit) if path is not None else None
        result["students"][name] = measured | {"path": _shown(path or job.paths["--student"])}
        result["verdicts"], result["command"] = verdicts.judge(result)
        harness.write_json(out / "report.json", result)  # a later student may fail
        del student
    drawn = [] if args.no_figures else pictures.draw(result, out)
    (out / "report.md").write_text(report.markdown(result, drawn), encoding="utf-8")
    return result


def _shown(path) -> str:
    """A path for the report: inside this repository relative to its top."""
    top = Path(__file__).resolve().parent.parent
    return str(Path(path).relative_to(top) if Path(path).is_relative_to(top) else path)


def vocabulary(job: Job, student) -> dict:
    """Sizes of the vocabularies, and the tokens that end a response for either model."""
    models = {"student": student, "teacher": job.teacher}
    stops = {}
    for name, model in models.items():
        try:
            stops[name] = harness.stop_ids(model)
        except ValueError:  # only the tokenizer knows one
            stops[name] = []
    rows = {name: len(model.get_output_embeddings().weight) for name, model in models.items()}
    return {"shared": job.vocab_size, "rows": rows, "stop_ids": stops}


def main(argv=None) -> int:
    """The command; exit status 2 and one line on stderr for what the user can put right."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        result = run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        harness.complain("diagnose", error)
        return 2
    print(report.summary(result))
    return 0
