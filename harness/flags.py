"""Flags: a table in, the effective value of every flag and where it came from out.

A row of a table is (flag, default, limits or choices, help). The later overrides the earlier: the
default, `--preset`, the row of METHODS that `--method` names, the command line; what is left open
is worked out. Whatever is wrong ends with exit code 2 and one line that names the flag."""

import argparse
import os
import re
import sys

import torch

import toy
from harness.cli import BIG, MANY, MOST_THREADS, TINY, Parser, complain, number, path_name, tell

ANY, COUNT, POSITIVE = (0, BIG), (1, MANY), (TINY, BIG)  # limits: [lowest, highest]
SHARE = (1e-6, 1 - 1e-6)
SHARD = ["none", "teacher", "both"]
DTYPES = ["float32", "bfloat16"]
MACHINE = {
    "run": [
        ("--preset", None, [], "settings; toy where no --student is named"),
        ("--out", None, None, "run folder (runs/<method>-seed<seed>)"),
        ("--seed", 0, (0, 2**31), "of data order and sampling"),
        ("--resume", False, None, "go on from the last checkpoint in --out, or begin there"),
        ("--checkpoint-every", 25, ANY, "steps between checkpoints; 0: only where a run ends"),
        ("--plan", 0.0, ANY, "print the memory that it takes on GPUs of so many GiB, and leave"),
        ("--max-skipped-steps", 5, COUNT, "that are not finite, in a row, which end the run"),
        ("--timeout", 1800, COUNT, "seconds that a process waits for another"),
        ("--track", None, ["tensorboard", "wandb"], "send the lines of the log there, too"),
    ],
    "sampling": [
        ("--steps", 100, COUNT, "batches of rollouts"),
        ("--prompts-per-step", 128, COUNT, "over all processes"),
        ("--rollouts-per-prompt", 1, COUNT, "responses to each"),
        ("--max-new-tokens", 8192, (1, BIG), "longest response; on toys half above the right"),
        ("--train-tokens", None, None, "the same in training steps alone: N, a share such as 0.5, "
         "or FIRST-LAST of either, moving evenly over the run"),
        ("--stop-class", "on", ["on", "off"], "where several tokens stop, they are one outcome"),
        ("--temperature", 1.0, POSITIVE, "of sampling; the student is scored at the same one"),
    ],
    "models and data": [
        ("--student", None, None, "folder or hub name (the toy world's)"),
        ("--teacher", None, None, "folder or hub name (the toy world's)"),
        ("--problems", None, None, "JSONL to train on (the toy world's)"),
        ("--skip-bad-problems", False, None, "leave out, with a count, what cannot be used"),
        ("--toy", "varied", [*toy.WORLDS], "toy world of whatever is not given"),
        ("--difficulty", None, (1, toy.MAX_MOVES), "moves per toy problem (the world's)"),
        ("--thinking", False, None, "render prompts in thinking mode"),
        ("--splitter", "blocks", ["blocks", "auto", "pretrained", "untrained"], "of sentences: any "
         "language, or English alone, by NLTK's Punkt: pretrained (the paper's) or not"),
        ("--trust-remote-code", False, None, "run code that comes with a model"),
        ("--allow-bin", False, None, "read pickled weights where there are no safetensors"),
    ],
    "evaluation": [
        ("--eval-every", 0, ANY, "steps between evaluations; 0: only first and last"),
        ("--eval-problems", None, None, "JSONL with answers (the toy world's)"),
        ("--ood-problems", None, None, "the same of another kind, to notice forgetting"),
        ("--eval-count", 200, COUNT, "problems"),
        ("--eval-samples", 4, COUNT, "answers per problem"),
    ],
    "optimizer": [
        ("--warmup-steps", 0, ANY, "linear, updates"),
        ("--weight-decay", 0.1, ANY, "of matrices"),
        ("--beta1", 0.9, (0, 0.999999), "AdamW"),
        ("--beta2", 0.98, (0, 0.999999), "AdamW"),
        ("--lora-rank", 0, (0, 2**14), "adapters of this rank learn, no weights (peft); 0: off"),
        ("--gradient-checkpointing", False, None, "less memory, one more forward"),
    ],
    "machine": [
        ("--sample-batch", 256, COUNT, "most rollouts in flight, per process"),
        ("--micro-batch", 0, ANY, "most rows per forward pass; 0: any number"),
        ("--tokens-per-micro-batch", 32768, ANY, "most tokens per pass, padding included; 0: any"),
        ("--fast", "on", ["on", "off"], "faster versions of the same computations (fast/)"),
        ("--shard", "none", SHARD, "spread models over the processes: see harness/shard.py"),
        ("--device", None, ["cpu", "cuda"], "(cuda where there is one)"),
        ("--dtype", None, DTYPES, "of matrix products (bfloat16 on cuda, else float32)"),
        ("--teacher-dtype", None, DTYPES, "of the teacher (--dtype)"),
        ("--save-dtype", "bfloat16", DTYPES, "of the saved student"),
        ("--threads", 0, (0, MOST_THREADS), "CPU threads per process; 0: PyTorch's choice"),
    ],
}  # fmt: skip
# What a resumed run may change: but for where it ends, and rounding, nothing depends on these.
MAY_CHANGE = ("out plan preset resume shard steps checkpoint_every max_skipped_steps timeout "
              "track").split()  # fmt: skip
# What runs did that began before a flag came: they go on with it.
BEFORE = {"lora_rank": 0, "lgr_entropy_top_k": 0, "lgr_alternate": 0, "lgr_shape": "group",
          "loss_mean": "token", "stop_class": "off", "teacher_dtype": None, "train_tokens": None,
          "plan": 0.0, "shard": "none", "track": None}  # fmt: skip


def add_flags(group, rows) -> None:
    """Add rows of a table to a parser; a flag that is not given leaves no trace."""
    for flag, default, check, text in rows:
        options = {"default": argparse.SUPPRESS, "help": text}
        if default is False:
            options["action"] = "store_true"
        elif isinstance(check, list):
            options["choices"] = check
        elif check is None:
            options |= {"type": path_name, "metavar": "NAME"}
        else:
            kind = type(default) if default is not None else type(check[0])
            options |= {"type": number(kind, *check), "metavar": "N"}
        if default is not None and default is not False:
            options["help"] += f" (default {default})"
        group.add_argument(flag, **options)


def defaults(rows) -> dict:
    return {flag[2:].replace("-", "_"): default for flag, default, *_ in rows}


def make_parser(program, tables, presets) -> Parser:
    parser = Parser(prog=program, description=f"Every flag of {program}.", allow_abbrev=False)
    for title, rows in (tables | MACHINE).items():
        rows = [(flag, default, [*presets] if flag == "--preset" else check, text)
                for flag, default, check, text in rows]  # fmt: skip
        add_flags(parser.add_argument_group(title), rows)
    return parser


def parse(program, tables, methods, presets, argv=None):
    """(parser, namespace, {name: where its value came from}). Exits with 2 on bad flags."""
    parser = make_parser(program, tables, presets)
    given = vars(parser.parse_args(argv))
    values, origins = {}, {}

    def decide(settings, origin):
        values.update(settings)
        origins.update(dict.fromkeys(settings, origin))

    decide(defaults(sum((tables | MACHINE).values(), [])), "default")
    preset = given.get("preset") or (None if "student" in given else "toy")
    decide({"preset": preset}, "no --student" if preset == "toy" else "default")
    decide(presets.get(preset, {}), f"--preset {preset}")
    method = given.get("method", values["method"])
    parts = dict(zip(("objective", "mask", "lookahead"), methods[method], strict=True))
    decide(parts, f"--method {method}")
    decide(given, "command line")
    args = argparse.Namespace(**values)
    decide(left_open(parser, args, origins), "worked out")
    check_processes(parser, argparse.Namespace(**values))
    return parser, argparse.Namespace(**values), origins


def left_open(parser, args, origins) -> dict:
    """What toy problems and the machine decide where the user did not."""
    found = {"difficulty": toy.world(args.toy).moves} if args.difficulty is None else {}
    if args.problems is None and origins.get("max_new_tokens") == "default":
        found["max_new_tokens"] = toy.response_limit(found.get("difficulty", args.difficulty))
    there = torch.cuda.is_available() or getattr(args, "plan", 0)  # planned for, from a laptop
    if args.device is None:
        found["device"] = "cuda" if there else "cpu"
    device = found.get("device", args.device)
    if device == "cuda" and not there:
        parser.error("--device cuda: PyTorch sees no GPU here")
    if args.dtype is None:
        found["dtype"] = "bfloat16" if device == "cuda" else "float32"
    if getattr(args, "out", "") is None:
        found["out"] = f"runs/{args.method}-seed{args.seed}"
    return found


def train_tokens(args, step: int) -> int:
    """The longest response of a training step. ValueError: --train-tokens is not understood.

    >>> args = argparse.Namespace(train_tokens="0.5-96", max_new_tokens=128, steps=5)
    >>> [train_tokens(args, step) for step in range(5)]
    [64, 72, 80, 88, 96]
    """
    if args.train_tokens is None:
        return args.max_new_tokens
    parts = args.train_tokens.split("-")
    if len(parts) > 2 or not all(re.fullmatch(r"[1-9]\d{0,8}|0?\.\d{1,9}|1\.0", x) for x in parts):
        raise ValueError(f"--train-tokens {args.train_tokens}: expected 64, 0.5, 16-256 or 0.1-1.0")
    first, last = (float(x) * (args.max_new_tokens if "." in x else 1) for x in (parts * 2)[:2])
    if max(first, last) > args.max_new_tokens:
        what = f"exceeds --max-new-tokens {args.max_new_tokens}"
        raise ValueError(f"--train-tokens {args.train_tokens} {what}")
    return max(1, round(first + (last - first) * step / max(args.steps - 1, 1)))


def check_processes(parser, args) -> None:
    """Exit 2 unless what torchrun says of the processes makes sense with the flags."""
    world = 1
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text, most = os.environ.get(name, str(least)), MANY if name == "WORLD_SIZE" else world - 1
        if not text.isdecimal() or not least <= int(text[:9]) <= most:
            complain(parser.prog, f"{name}={text} in the environment is not in {least} to {most}")
            sys.exit(2)  # whatever RANK says
        world = int(text) if name == "WORLD_SIZE" else world
    if args.prompts_per_step * args.rollouts_per_prompt < world:
        parser.error(f"--prompts-per-step {args.prompts_per_step} is less than {world} processes")
    if args.lora_rank and args.shard == "both":
        parser.error(f"--lora-rank {args.lora_rank} needs --shard none or teacher, not both")
    if args.ood_problems and args.problems and not args.eval_problems:
        parser.error(f"--ood-problems {args.ood_problems} needs --eval-problems")


def say(program, args, origins) -> None:
    """The effective table in short, on stderr: what is not a default, by where it came from."""
    first = "no --student", f"--preset {args.preset}", "command line"
    for origin in dict.fromkeys((*first, *origins.values())):
        found = {k: vars(args)[k] for k in origins if origins[k] == origin != "default"}
        texts = [k.replace("_", "-") + f" {v}" * (v is not True) for k, v in found.items()
                 if v is not None]  # fmt: skip
        if texts:
            tell(program, f"{origin}: {', '.join(texts)}")
