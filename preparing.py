"""Everything that one process holds while it trains, and how it is put together from the flags.

`prepare` does all that can fail without the weights: tokenizers, problems, prompts, limits, the
sentence splitter.  `load_models` reads the weights and builds optimizer and schedule.  `describe`
writes down what the numbers will depend on (config.json).
"""

import argparse
import contextlib
import hashlib
import json
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import transformers

import checkpoint
import evaluate
import grading
import harness
import lgr
import teachability
import toy
from fast import head


class StudentLogProbs(torch.nn.Module):
    """The student's forward as training needs it: ids in, log-probs or divergences out, or a loss.

    DDP hooks the forward of what it wraps, so backbone and chunked head must both be in here.
    """

    def __init__(self, model, vocab_size: int, temperature: float):
        super().__init__()
        self.model, self.vocab_size, self.temperature = model, vocab_size, temperature

    def forward(self, ids_BT, mask_BT, candidates_BTK=None, divergence=None, scale_BT=None):
        """Log-probs [B, T] of the tokens, or [B, T, K] of candidates in their places, in nats at
        the sampling temperature; with `divergence`, (kind, beta, the teacher's hidden states and
        head), that divergence [B, T] from the teacher. 0 outside `mask_BT`.  `scale_BT`, what the
        loss multiplies them by, saves a pass over the head."""
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False)[0]
        head_VD = self.model.get_output_embeddings().weight
        how = {"mask_BT": mask_BT, "vocab_size": self.vocab_size, "temperature": self.temperature,
               "scale_BT": scale_BT}  # fmt: skip
        if divergence is not None:
            kind, beta, *teachers = divergence
            how |= {"kind": kind, "beta": beta}
            return head.token_divergence(hidden_BTD, head_VD, *teachers, **how)
        how["candidates_BTK"] = candidates_BTK
        return head.token_logprobs(hidden_BTD, head_VD, ids_BT, **how)


@dataclass
class Position:
    """Where a run stands between two lines of its log: what a checkpoint says beside the weights.

    step       training steps done
    evaluated  true if the evaluation before the next step is done, too
    skipped    steps in a row, up to here, whose loss or gradient was not finite
    log_bytes  length of log.jsonl
    random     random numbers of every process
    """

    step: int = 0
    evaluated: bool = False
    skipped: int = 0
    log_bytes: int = 0
    random: list[dict] = ()


@dataclass
class Run:
    """Everything that one process holds while it trains."""

    args: argparse.Namespace
    rank: int
    world: int
    tokenizer: object
    splitter: object
    splitter_name: str
    sentences: grading.Sentences | None
    vocab_size: int
    pad_id: int
    prompts: list[list[int]]
    eval_problems: list[dict]
    eval_prompts: list[list[int]]
    ood_problems: list[dict]
    ood_prompts: list[list[int]]
    stop_ids: list[int] = ()
    model: object = None  # the student, a Hugging Face model
    student: object = None  # StudentLogProbs around it, within DDP when there are several processes
    teacher: object = None
    optimizer: object = None
    scheduler: object = None
    position: Position = field(default_factory=Position)
    interruptions: checkpoint.Interruptions = field(default_factory=checkpoint.Interruptions)


def load_prompts(args, tokenizer, path: str | None, split: str, task="dial") -> tuple[list, list]:
    """Problems of a file or of the toy world, and their prompts in the student's template, which
    the teacher reads too: two templates would be two prompts."""
    if path is not None:
        problems = harness.load_problems(path, require_answer=split == "test")
    else:
        count = args.eval_count if split == "test" else 4096
        seed = 0 if split == "test" else args.seed
        problems = harness.from_records(
            toy.problems(count, moves=args.difficulty, split=split, seed=seed, task=task),
            where="toy",
        )
    if split == "test":
        problems = problems[: args.eval_count]
    return problems, harness.render_prompts(tokenizer, problems, thinking=args.thinking)


def open_pair(args) -> tuple[dict, dict, int]:
    """What can be said of student and teacher without their weights: tokenizers and configs by
    flag, and the number of token ids that mean the same to both. ValueError if theirs differ."""
    paths = student_and_teacher(args)
    tokenizers, configs = {}, {}
    for flag, path in paths.items():
        tokenizers[flag] = harness.load_tokenizer(path, trust_remote_code=args.trust_remote_code)
        config = harness.load_config(path, trust_remote_code=args.trust_remote_code)
        configs[flag] = config.get_text_config(decoder=True)
    vocab_size = min(
        harness.common_vocabulary(*tokenizers.values()), *(c.vocab_size for c in configs.values())
    )
    return tokenizers, configs, vocab_size


def check_prompts(tokenizer, configs, vocab_size: int, problems, prompts, max_new_tokens) -> None:
    """ValueError that names the first problem whose prompt holds what the models do not share, or
    does not fit them."""
    for problem, prompt in zip(problems, prompts, strict=True):
        if max(prompt) >= vocab_size:
            raise ValueError(
                f"{problem['where']}: the prompt holds {tokenizer.decode([max(prompt)])!r}, which "
                f"is not among the {vocab_size} tokens that --student and --teacher share"
            )
    for config in configs.values():
        harness.check_fit(config, problems, prompts, max_new_tokens)


def open_splitter(args) -> tuple[object, str]:
    """The sentence splitter and its name; ValueError if the one that is wanted is not there."""
    try:
        return teachability.sentence_splitter(args.splitter, download=True)
    except LookupError as error:
        raise ValueError(f"--splitter {args.splitter}: {error}") from None


def prepare(args, rank: int, world: int) -> Run:
    """Everything that can fail without the weights: tokenizers, problems, prompts, limits."""
    tokenizers, configs, vocab_size = open_pair(args)
    tokenizer = tokenizers["--student"]
    for flag, count in grading.candidates_needed(args).items():
        if count > vocab_size:
            raise ValueError(f"{flag} {count} exceeds the vocabulary of {vocab_size}")
    problems, prompts = load_prompts(args, tokenizer, args.problems, "train")
    eval_problems, eval_prompts = [], []
    if args.eval_problems is not None or args.problems is None:
        eval_problems, eval_prompts = load_prompts(args, tokenizer, args.eval_problems, "test")
    ood_problems, ood_prompts = [], []
    if args.ood_problems is not None or (args.problems is None and args.eval_problems is None):
        ood_problems, ood_prompts = load_prompts(
            args, tokenizer, args.ood_problems, "test", task="reverse"
        )
    all_problems = problems + eval_problems + ood_problems
    all_prompts = prompts + eval_prompts + ood_prompts
    check_prompts(tokenizer, configs, vocab_size, all_problems, all_prompts, args.max_new_tokens)
    splitter, splitter_name, sentences = None, None, None
    if grading.signals(args):
        splitter, splitter_name = open_splitter(args)
        sentences = grading.Sentences(tokenizer, splitter, args.sentence_workers)
    return Run(
        args=args, rank=rank, world=world, tokenizer=tokenizer, splitter=splitter,
        splitter_name=splitter_name, sentences=sentences, vocab_size=vocab_size,
        pad_id=harness.pad_id(tokenizer), prompts=prompts, eval_problems=eval_problems,
        eval_prompts=eval_prompts, ood_problems=ood_problems, ood_prompts=ood_prompts,
    )


def student_and_teacher(args) -> dict[str, str]:
    """The two models by flag; the toy world's where the flag was left out."""
    world = toy.world(args.toy)
    for given, folder in ((args.student, world.student), (args.teacher, world.teacher)):
        if given is None:
            toy.require(folder)  # not all come with the repository
    return {
        "--student": str(args.student or world.student),
        "--teacher": str(args.teacher or world.teacher),
    }


def describe(run: Run) -> dict:
    """config.json: every flag and what the numbers depended on."""
    return {
        "flags": vars(run.args),
        "models": student_and_teacher(run.args),
        "processes": run.world,
        "vocabulary": run.vocab_size,
        "stop_ids": run.stop_ids,
        "sentence_splitter": run.splitter_name,
        "training_problems": len(run.prompts),
        "prompts_sha256": fingerprint(run),
        "evaluation_problems": len(run.eval_problems),
        "ood_problems": len(run.ood_problems),
        **surroundings(run.args),
    }


def surroundings(args) -> dict:
    """Where and when numbers come about: commit, device, threads, versions, time."""
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    return {
        "commit": commit or None,
        "device": device or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__,
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def fingerprint(run: Run) -> str:
    """SHA-256 of all prompts and answers: the same files under the same names."""
    answers = [problem["answer"] for problem in run.eval_problems + run.ood_problems]
    texts = [run.prompts, run.eval_prompts, run.ood_prompts, answers]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def load_models(run: Run, device: torch.device) -> None:
    """Student in float32 (what AdamW needs), teacher in the type of the matrix products."""
    args = run.args
    for flag, path in student_and_teacher(args).items():
        is_student = flag == "--student"
        dtype = torch.float32 if is_student else getattr(torch, args.dtype)
        model = harness.load_model(
            path, dtype=dtype, device=device, trust_remote_code=args.trust_remote_code,
            allow_bin=args.allow_bin,
        )  # fmt: skip
        harness.check_head(flag, model, run.prompts[0][:8])
        if is_student:
            every = run.prompts + run.eval_prompts + run.ood_prompts
            evaluate.check_sampling(path, model, every, args.max_new_tokens)
            run.model = model.train()  # dropout is 0; checkpointing works in training mode only
        else:
            run.teacher = model.requires_grad_(False)
            if args.lookahead == "on":
                longest = max(map(len, run.prompts)) + args.max_new_tokens
                lgr.check_model(model, longest)
                lgr.self_check(model)
    run.stop_ids = harness.stop_ids(run.model, run.teacher, run.tokenizer)
    if args.gradient_checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    run.student = StudentLogProbs(run.model, run.vocab_size, args.temperature)
    parameters = [p for p in run.student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    run.optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=device.type == "cuda"
    )
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda done: min(1.0, (done + 1) / max(args.warmup_steps, 1))
    )
