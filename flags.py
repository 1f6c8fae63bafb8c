"""Every flag of `train.py`: presets, defaults, limits, and what makes no sense together.

`--method` picks a row of METHODS, a preset of three parts that flags override one by one.  FLAGS is
the whole command line, with the unit of everything; `parse` fills in what depends on the method and
on the kind of student.
"""

import argparse
import dataclasses
import os
from dataclasses import dataclass

import torch

import controls
import lgr
import logprobs
import toy
from harness import BIG, MANY, MOST_THREADS, TINY, Parser, number, path_name


@dataclass(frozen=True)
class Method:
    """What a `--method` name stands for; every field has a flag that overrides it.

    objective  pg: policy gradient on the sampled token; topk: reverse KL over the top tokens of
               both models; rkl, fkl, jsd: exact divergences over the whole vocabulary
    mask       none: supervise every response token; release: up to the release point; prefix,
               shuffled, random, std: as many tokens as release would, elsewhere
    lookahead  on: add the Lookahead Group Reward
    """

    objective: str = "pg"
    mask: str = "none"
    lookahead: str = "off"


OBJECTIVES = ("pg", "topk", *logprobs.DIVERGENCES)
MASKS = ("none", "release", *controls.CONTROLS)
METHODS = {
    "opd": Method(),
    "release": Method(mask="release"),
    "lgr": Method(lookahead="on"),
    "lgr_topk": Method(objective="topk", lookahead="on"),
    "release+lgr": Method(mask="release", lookahead="on"),
    "prefix": Method(mask="prefix"),
    "shuffled": Method(mask="shuffled"),
    "random": Method(mask="random"),
    "std": Method(mask="std"),
    "rkl": Method(objective="rkl"),
    "fkl": Method(objective="fkl"),
    "jsd": Method(objective="jsd"),
}

DTYPES = ["float32", "bfloat16"]
# What a resumed run may have otherwise than the run that it resumes: nothing in its lines or
# weights depends on them, except for where it ends.
MAY_CHANGE = (
    "out", "resume", "steps", "checkpoint_every", "max_skipped_steps", "timeout", "sentence_workers"
)  # fmt: skip



# Flag, default, help with the unit, limits or choices.  Of a default in two parts the first is for
# the toy student, the second for any other: where the papers give settings, theirs.
FLAGS = {
    "what to run": [
        ("--method", "release", "preset", {"choices": list(METHODS)}),
        ("--objective", None, "overrides the preset", {"choices": [*OBJECTIVES]}),
        ("--mask", None, "overrides the preset", {"choices": [*MASKS]}),
        ("--lookahead", None, "overrides the preset", {"choices": ["on", "off"]}),
        ("--out", None, "run folder (default runs/<method>-seed<seed>)", {"metavar": "FOLDER"}),
        ("--seed", 0, "of data order and sampling", {"high": 2**31}),
        ("--steps", (30, 100), "batches of rollouts", {"low": 1}),
    ],
    "models and problems": [
        ("--toy", "horizon", "world for what the next three leave out", {"choices": [*toy.WORLDS]}),
        ("--student", None, "model folder or hub name", {"metavar": "MODEL"}),
        ("--teacher", None, "model folder or hub name", {"metavar": "MODEL"}),
        ("--problems", None, "JSONL with problem, prompt or messages", {"metavar": "FILE"}),
        ("--difficulty", None, "moves per toy problem (default what the world is made for)",
         {"type": number(int, 1, toy.MAX_MOVES), "metavar": "N"}),
        ("--trust-remote-code", False, "run code that comes with a model", {}),
        ("--allow-bin", False, "read weights from pickled .bin files where a folder has no "
         "safetensors", {}),
        ("--thinking", False, "render prompts in thinking mode", {}),
    ],
    "sampling": [
        ("--prompts-per-step", (64, 128), "prompts per step, over all processes",
         {"low": 1, "high": MANY}),
        ("--rollouts-per-prompt", 1, "responses to each", {"low": 1, "high": MANY}),
        ("--max-new-tokens", None, "longest response (default what toy problems need, else 8192)",
         {"type": number(int, 1, BIG), "metavar": "N"}),
        ("--temperature", 1.0, "of sampling; the student is scored at the same one", {"low": TINY}),
        ("--sample-batch", 256, "most rollouts in flight, per process", {"low": 1}),
    ],
    "release rule": [
        ("--margin-top-k", 4, "student candidates that the margin looks at, tokens", {"low": 2}),
        ("--margin", "logprob", "difference in what", {"choices": ["logprob", "prob"]}),
        ("--margin-min-entropy", 0.0, "average only tokens above this student entropy, nats", {}),
        ("--min-segments", 2, "sentences that each side of the change point needs", {"low": 1}),
        ("--bic-eps", 1e-12, "floor of the residual sum of squares", {"low": TINY}),
        ("--rescale", "batch", "scope in which the kept tokens get the loss mass of the whole",
         {"choices": ["batch", "sequence", "none"]}),
        ("--splitter", "auto", "NLTK's pretrained English Punkt, or an untrained one",
         {"choices": ["auto", "pretrained", "untrained"]}),
        ("--sentence-workers", (1, 4), "processes that split sentences while the teacher computes, "
         "per process; 0: none", {"high": MOST_THREADS}),
        ("--budget", "release", "of masks prefix, shuffled, random, std: as many tokens of every "
         "batch as the release rule keeps; own (std): as many as its own change point keeps",
         {"choices": ["release", "own"]}),
        ("--prefix-tokens", 0, "of mask prefix: supervise so many tokens of every response, "
         "whatever the release rule would keep; 0: off", {}),
    ],
    "lookahead": [
        ("--lgr-gamma", 1.0, "weight of the group reward", {}),
        ("--lgr-tau", 0.2, "look ahead above this student entropy, nats", {}),
        ("--lgr-top-k", 8, "student candidates in a group, tokens", {"low": 2}),
        ("--lgr-signal", "max_prob", "the teacher's confidence", {"choices": [*lgr.SIGNALS]}),
        ("--lgr-normalize", "std", "divide by the group's deviation, or only subtract its mean",
         {"choices": ["std", "mean"]}),
        ("--lgr-eps", 1e-6, "added to that deviation", {}),
        ("--lgr-nodes", 4096, "candidates per forward pass: bounds memory", {"low": 1}),
        ("--union-top-k", 20, "of objective topk: tokens from each model", {"low": 1}),
        ("--jsd-beta", 0.5, "of objective jsd: weight of KL(teacher || mixture)",
         {"low": 1e-6, "high": 1 - 1e-6}),
    ],
    "optimisation": [
        ("--lr", (1e-3, 1e-5), "AdamW, constant", {"low": TINY}),
        ("--warmup-steps", (5, 0), "linear, updates", {}),
        ("--weight-decay", (0.01, 0.1), "of matrices", {}),
        ("--beta1", 0.9, "AdamW", {"high": 0.999999}),
        ("--beta2", (0.95, 0.98), "AdamW", {"high": 0.999999}),
        ("--clip-grad", 1.0, "largest gradient norm; 0: off", {}),
        ("--advantage-clip", (10.0, 0.0), "largest |log p_T - log p_S| in A_t, nats; 0: off", {}),
        ("--updates-per-rollout", 1, "above 1: PPO's clipped ratio", {"low": 1}),
        ("--clip-low", 0.2, "ratio at least 1 - this", {"high": 1}),
        ("--clip-high", 0.28, "ratio at most 1 + this", {}),
        ("--micro-batch", (64, 0), "most rows per forward pass; 0: any number", {}),
        ("--tokens-per-micro-batch", (16384, 32768), "most tokens per forward pass, padding "
         "included: bounds memory; a longer row goes alone; 0: any number", {}),
        ("--gradient-checkpointing", False, "less memory, one more forward", {}),
    ],
    "what is kept, and when to give up": [
        ("--checkpoint-every", (10, 25), "steps between checkpoints, and one at the end; 0: only "
         "when something ends the run early", {}),
        ("--resume", False, "go on from the last checkpoint in --out, or begin there", {}),
        ("--max-skipped-steps", 5, "end the run after so many steps in a row whose loss or "
         "gradient is not finite; fewer are skipped", {"low": 1}),
        ("--timeout", 1800, "seconds that a process waits for another before it gives up",
         {"low": 1, "high": 10**6}),
    ],
    "evaluation and machine": [
        ("--eval-every", (10, 0), "steps between evaluations; 0: only first and last", {}),
        ("--eval-problems", None, "JSONL with answers; toys have theirs", {"metavar": "FILE"}),
        ("--ood-problems", None, "JSONL with answers of another kind, evaluated first and last, to "
         "notice forgetting; toys have theirs", {"metavar": "FILE"}),
        ("--eval-count", 200, "problems", {"low": 1, "high": MANY}),
        ("--eval-samples", 4, "answers per problem", {"low": 1, "high": MANY}),
        ("--device", None, "(default cuda where there is one)", {"choices": ["cpu", "cuda"]}),
        ("--dtype", None, "of matrix products (default bfloat16 for real students on cuda, else "
         "float32)", {"choices": DTYPES}),
        ("--save-dtype", ("float32", "bfloat16"), "of the saved student", {"choices": DTYPES}),
        ("--threads", (1, 0), "CPU threads per process; 0: PyTorch's choice",
         {"high": MOST_THREADS}),
    ],
}  # fmt: skip



def make_parser() -> Parser:
    """FLAGS for argparse; defaults of two parts stay None until `fill_in` knows the student."""
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for title, flags in FLAGS.items():
        add_flags(parser.add_argument_group(title), flags)
    return parser


def add_flags(group, flags: list[tuple]) -> None:
    """Add rows that look like those of FLAGS to a parser or a group of its arguments."""
    for flag, default, text, options in flags:
        options = dict(options)
        low, high = options.pop("low", 0), options.pop("high", BIG)
        real = default[1] if isinstance(default, tuple) else default
        if real is False:
            options["action"] = "store_true"
        elif isinstance(real, int | float):
            options |= {"type": number(type(real), low, high), "metavar": "N"}
        elif "choices" not in options:
            options.setdefault("type", path_name)
        if isinstance(default, tuple):
            text += f" (default {default[0]} | with --student {default[1]})"
            default = None
        elif default is not None and default is not False:
            text += f" (default {default})"
        group.add_argument(flag, default=default, help=text, **options)


def fill_in(parser: Parser, args: argparse.Namespace) -> None:
    """What depends on the kind of student and the machine, where it was left open; exit 2 if there
    is no such machine."""
    args.difficulty = args.difficulty or toy.world(args.toy).moves
    limit = toy.response_limit(args.difficulty) if args.problems is None else 8192
    args.max_new_tokens = args.max_new_tokens or limit
    for flag, default, *_ in sum(FLAGS.values(), []):
        name = flag[2:].replace("-", "_")
        if isinstance(default, tuple) and getattr(args, name, 0) is None:
            setattr(args, name, default[args.student is not None])
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    real_on_gpu = args.device == "cuda" and args.student is not None
    args.dtype = args.dtype or ("bfloat16" if real_on_gpu else "float32")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")


def parse(argv: list[str] | None = None) -> tuple[Parser, argparse.Namespace]:
    """Parse, then fill in what the preset and the kind of student decide; exit 2 on bad flags."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, value in dataclasses.asdict(METHODS[args.method]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    fill_in(parser, args)
    args.out = args.out or f"runs/{args.method}-seed{args.seed}"
    check_combination(parser, args)
    for name in ("RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "1").isdecimal():
            parser.error(f"{name}={os.environ[name]!r} in the environment is not a whole number")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.prompts_per_step * args.rollouts_per_prompt < world:
        parser.error(f"--prompts-per-step {args.prompts_per_step} is less than {world} processes")
    return parser, args


def check_combination(parser: Parser, args: argparse.Namespace) -> None:
    """Exit 2 on flags that are fine alone and make no sense together."""
    lookahead = args.lookahead == "on"
    if args.objective == "topk" and lookahead and args.lgr_top_k > args.union_top_k:
        parser.error(
            f"--lgr-top-k {args.lgr_top_k} exceeds --union-top-k {args.union_top_k}: the union "
            "must hold the group"
        )
    if args.objective in logprobs.DIVERGENCES and lookahead:
        parser.error(
            f"--objective {args.objective} has no place for the reward of --lookahead on; "
            "pg and topk have"
        )
    if args.prefix_tokens and args.mask != "prefix":
        parser.error(f"--prefix-tokens {args.prefix_tokens} needs --mask prefix, not {args.mask}")
    if args.budget == "own" and args.mask != "std":
        parser.error(f"--budget own needs --mask std, not {args.mask}")
    if args.ood_problems and args.problems and not args.eval_problems:
        parser.error(f"--ood-problems {args.ood_problems} needs --eval-problems")
