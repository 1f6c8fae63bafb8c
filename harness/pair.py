"""A student, a teacher and their prompts: everything that can fail without the weights, then the
weights, the optimizer and its schedule."""


import torch
from torch.optim.lr_scheduler import LambdaLR

import fast.decode
import fast.head
import logprobs
import teachability
import toy
from harness.cli import BIG
from harness.data import check_fit, download_punkt, from_records, load_problems, refuse
from harness.data import render_prompts, stop_ids
from harness.models import check_head, check_sampling, check_supported, check_tokens
from harness.models import common_vocabulary, load_config, load_model, load_tokenizer


class StudentLogProbs(torch.nn.Module):
    """The student's forward as training needs it: ids in, log-probs or divergences out.

    DDP hooks the forward of what it wraps, so backbone and chunked head must both be in here.
    fast: whether the head is fast/head.py's, which computes the gradient in the same pass.
    """

    def __init__(self, model, args, vocab_size: int, teacher_head_VE=None):
        super().__init__()
        self.model, self.teacher_head_VE, self.fast = model, [teacher_head_VE], args.fast == "on"
        self.divergence = {"kind": args.objective, "beta": args.jsd_beta}
        self.how = {"vocab_size": vocab_size, "temperature": args.temperature}

    def forward(self, ids_BT, mask_BT, candidates_BTK=None, *, teacher=None, scale_BT=None):
        """Log-probs [B, T] of the tokens, or [B, T, K] of candidates in their places, nats at the
        sampling temperature; with `teacher`, its hidden states, the divergence [B, T] from it. 0
        outside `mask_BT`. scale_BT: what the loss will multiply the result by, if that is known."""
        hidden_BTD = self.model.base_model(input_ids=ids_BT, use_cache=False)[0]
        head_VD = self.model.get_output_embeddings().weight
        head, how = (fast.head, {"scale_BT": scale_BT}) if self.fast else (logprobs, {})
        how |= self.how | {"mask_BT": mask_BT}
        if teacher is not None:
            teacher = teacher, self.teacher_head_VE[0]  # in a list: not a module's own parameter
            return head.token_divergence(hidden_BTD, head_VD, *teacher, **self.divergence, **how)
        how["candidates_BTK"] = candidates_BTK
        return head.token_logprobs(hidden_BTD, head_VD, ids_BT, **how)


# --------------------------------------------------------------------------- before any weights
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


def open_pair(args) -> tuple[dict, dict, int]:
    """What can be said of student and teacher without their weights: tokenizers and configs by
    flag, and the number of token ids that mean the same to both. ValueError if theirs differ."""
    tokenizers, configs, by_path, trust = {}, {}, {}, {"trust_remote_code": args.trust_remote_code}
    for flag, path in student_and_teacher(args).items():
        try:
            tokenizers[flag] = load_tokenizer(path, **trust)
            by_path[path] = load_config(path, **trust)
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None
        configs[flag] = by_path[path].get_text_config(decoder=True)
    check_tokens(by_path, tokenizers["--student"])
    shared = common_vocabulary(*tokenizers.values())
    return tokenizers, configs, min(shared, *(c.vocab_size for c in configs.values()))


def load_prompts(args, tokenizer, path: str | None, split: str, task="dial", **more):
    """Problems of a file or of the toy world, and their prompts in the student's template, which
    the teacher reads too: two templates would be two prompts. more: for `open_prompts`."""
    if path is not None:
        answered = {"require_answer": split == "test"}
        problems = load_problems(path, **answered, skipped=more.get("skipped"))
    else:
        count, seed = (args.eval_count, 0) if split == "test" else (4096, args.seed)
        records = toy.problems(count, moves=args.difficulty, split=split, seed=seed, task=task)
        problems = from_records(records, where="toy")
    if split == "test":
        problems = problems[: args.eval_count]
    return open_prompts(args, tokenizer, problems, **more)


def open_prompts(args, tokenizer, problems, configs=None, vocab_size=BIG, day=None, skipped=None):
    """(problems, prompts) that all the models take; ValueError that names the first that is not.
    skipped: a list that takes these errors instead."""
    refused = None if skipped is None else {}
    prompts = render_prompts(tokenizer, problems, thinking=args.thinking, day=day, refused=refused)
    most = args.max_new_tokens
    check_prompts(tokenizer, configs or {}, vocab_size, problems, prompts, most, refused)
    if refused:
        skipped += refused.values()
        kept = [number for number in range(len(problems)) if number not in refused]
        problems, prompts = ([items[number] for number in kept] for items in (problems, prompts))
    if not problems:
        raise ValueError(f"--skip-bad-problems leaves no problem; {skipped[0]}")
    return problems, prompts


def check_prompts(tokenizer, configs, vocab_size, problems, prompts, max_new_tokens, refused=None):
    """ValueError that names the first problem whose prompt holds what the models (configs by any
    name) do not share, or does not fit them. refused: as in `render_prompts`."""
    found = {}
    for number, prompt in enumerate(prompts):
        if prompt is not None and max(prompt) >= vocab_size:
            what = f"the prompt holds {tokenizer.decode([max(prompt)])!r}, which is not among the "
            found[number] = what + f"{vocab_size} tokens that --student and --teacher share"
    refuse(problems, found, refused)
    for config in configs.values():
        check_fit(config, problems, prompts, max_new_tokens, refused)


def open_splitter(kind: str) -> tuple[object, str]:
    """The sentence splitter and its name; missing data are downloaded, once, if that is possible.
    ValueError if the one that is wanted is not there."""
    try:
        if kind != "untrained":
            teachability.sentence_splitter("pretrained")
    except LookupError:
        download_punkt()
    try:
        return teachability.sentence_splitter(kind)
    except LookupError as error:
        raise ValueError(f"--splitter {kind}: {error}") from None


# -------------------------------------------------------------------------------------- weights
def load_models(run, device) -> None:
    """Put into `run`: the student in float32 (what AdamW needs), the teacher in the type of the
    matrix products, optimizer and schedule. ValueError that names the model that cannot serve."""
    args, prompts = run.args, sum(run.prompts.values(), [])
    for flag, path in student_and_teacher(args).items():
        is_student = flag == "--student"
        dtype = torch.float32 if is_student else getattr(torch, args.dtype)
        how = {"trust_remote_code": args.trust_remote_code, "allow_bin": args.allow_bin}
        model = load_model(path, dtype=dtype, device=device, **how)
        check_head(flag, model, prompts[0][:8])
        if is_student:
            check_sampling(path, model, prompts, args.max_new_tokens)
            run.model = model.train()  # dropout is 0; checkpointing works in training mode only
        else:
            run.teacher = model.requires_grad_(False)
            for check in run.needs.teacher_checks:
                check_supported(model, max(map(len, prompts)) + args.max_new_tokens)
                check(model)
    run.stop_ids = stop_ids(run.model, run.teacher, run.tokenizer)
    if args.gradient_checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    run.decode = fast.decode.decode if args.fast == "on" else None
    head_VE = run.teacher.get_output_embeddings().weight
    run.student = StudentLogProbs(run.model, args, run.vocab_size, head_VE)
    parameters = [p for p in run.student.parameters() if p.requires_grad]
    matrices, rest = ([p for p in parameters if (p.dim() >= 2) == is_2d] for is_2d in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": rest, "weight_decay": 0.0}]  # fmt: skip
    betas = args.beta1, args.beta2
    run.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=device.type == "cuda")
    warmup = max(args.warmup_steps, 1)
    run.scheduler = LambdaLR(run.optimizer, lambda done: min(1.0, (done + 1) / warmup))
