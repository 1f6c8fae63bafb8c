"""A student, a teacher and their prompts: everything that can fail without the weights, then the
weights, the optimizer and its schedule."""

import functools

import torch
from torch.optim.lr_scheduler import LambdaLR

import fast.decode
import logprobs
import teachability
import toy
from fast.student import StudentLogProbs
from harness import lora
from harness.cli import BIG, tell
from harness.data import check_fit, download_punkt, from_records, load_problems
from harness.data import render_prompts, stop_ids
from harness.models import check_head, check_sampling, check_supported, check_tokens
from harness.models import common_vocabulary, load_config, load_model, load_tokenizer
from harness.shard import Shards


def student_and_teacher(args) -> dict[str, str]:
    """The two models by flag; the toy world's where the flag was left out."""
    world = toy.world(args.toy)
    for given, folder in ((args.student, world.student), (args.teacher, world.teacher)):
        if given is None:
            toy.require(folder)  # not all come with the repository
    student, teacher = args.student or world.student, args.teacher or world.teacher
    return {"--student": str(student), "--teacher": str(teacher)}


def open_pair(args) -> tuple[dict, dict, int]:
    """Tokenizers, configs by flag, how many token ids mean the same to both; or ValueError."""
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
    """`open_prompts`, with `more`, for problems of a file or the toy world: the teacher's, too."""
    if path is not None:
        how = {"require_answer": split == "test", "skipped": more.get("skipped")}
        problems = load_problems(path, **how)
    else:
        count, seed = (args.eval_count, 0) if split == "test" else (4096, args.seed)
        records = toy.problems(count, moves=args.difficulty, split=split, seed=seed, task=task)
        problems = from_records(records, where="toy")
    if split == "test":
        problems = problems[: args.eval_count]
    return open_prompts(args, tokenizer, problems, **more)


def open_prompts(args, tokenizer, problems, configs=None, vocab_size=BIG, day=None, skipped=None):
    """(problems, prompts) that all models take; or ValueErrors, for a list `skipped`."""

    def usable(some):
        try:
            prompts = render_prompts(tokenizer, some, thinking=args.thinking, day=day)
            limits = configs or {}, vocab_size, some, prompts, args.max_new_tokens
            check_prompts(tokenizer, *limits)
            return list(zip(some, prompts, strict=True))
        except ValueError as error:
            if skipped is None:
                raise
            if len(some) == 1:
                skipped.append(str(error))
                return []
        return usable(some[: len(some) // 2]) + usable(some[len(some) // 2 :])

    found = usable(problems)
    if not found:
        raise ValueError(f"--skip-bad-problems leaves no problem; {skipped[0]}")
    return tuple(map(list, zip(*found, strict=True)))


def tell_skipped(program: str, skipped) -> None:
    """What --skip-bad-problems has left out, on stderr."""
    if skipped:
        tell(program, f"--skip-bad-problems leaves out {len(skipped)}; {skipped[0]}")


def check_prompts(tokenizer, configs, vocab_size: int, problems, prompts, max_new_tokens) -> None:
    """ValueError naming the first problem that the models do not share or that does not fit."""
    for problem, prompt in zip(problems, prompts, strict=True):
        if max(prompt) >= vocab_size:
            what = f"the prompt holds {tokenizer.decode([max(prompt)])!r}, which is not among the "
            what += f"{vocab_size} tokens that --student and --teacher share"
            raise ValueError(f"{problem['where']}: {what}")
    for config in configs.values():
        check_fit(config, problems, prompts, max_new_tokens)


def open_splitter(kind: str) -> tuple[object, str]:
    """The sentence splitter and its name; missing data are downloaded, once, if that is possible.
    ValueError if the one that is wanted is not there."""
    try:
        teachability.sentence_splitter("untrained" if kind == "untrained" else "pretrained")
    except LookupError:
        download_punkt()
    try:
        return teachability.sentence_splitter(kind)
    except LookupError as error:
        raise ValueError(f"--splitter {kind}: {error}") from None


def load_models(run, device) -> None:
    """Put into `run`: the student, in float32 where AdamW moves it, teacher, optimizer, schedule;
    `run.model` samples, `run.trained` trains, `run.refresh()` brings the former to the latter."""
    args, prompts = run.args, sum(run.prompts.values(), [])
    run.shards = Shards(args.shard, device, args.dtype)
    run.refresh = run.shards.refresh
    for flag, path in student_and_teacher(args).items():
        is_student = flag == "--student"
        dtype = args.teacher_dtype or args.dtype
        if is_student:
            dtype = args.dtype if args.lora_rank else "float32"
        how = {"trust_remote_code": args.trust_remote_code, "allow_bin": args.allow_bin}
        load = functools.partial(load_model, path, dtype=getattr(torch, dtype), **how)
        model = run.shards.load(flag, lambda device, load=load: load(device=device))
        check_head(flag, model, prompts[0][:8])
        if is_student:
            check_sampling(path, model, prompts, args.max_new_tokens)
            run.model = model
            run.trained = run.shards.trained or model
            if args.lora_rank:
                run.trained, run.refresh = lora.adapt(model, args.lora_rank, args.seed)
            run.trained.train()  # dropout is 0; checkpointing works in training mode only
        else:
            run.teacher = model.requires_grad_(False)
            for check in run.needs.teacher_checks:
                check_supported(model, max(map(len, prompts)) + args.max_new_tokens)
                check(model)
    run.stop_ids = stop_ids(run.model, run.teacher, run.tokenizer)
    shared = [i for i in run.stop_ids if i < run.vocab_size and args.stop_class == "on"]
    run.stop_class = logprobs.StopClass(shared) if len(shared) > 1 else None
    if args.gradient_checkpointing:
        names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # new and old
        name = next(name for name in names if hasattr(run.trained, name))
        getattr(run.trained, name)({"use_reentrant": False})
    run.decode = fast.decode.decode if args.fast == "on" else None
    head_VE = run.teacher.get_output_embeddings().weight
    run.student = StudentLogProbs(run.trained, args, run.vocab_size, head_VE, run.stop_class)
    run.shards.finish(run.student)
    parameters = [p for p in run.student.parameters() if p.requires_grad]
    matrices, rest = ([p for p in parameters if (p.dim() >= 2) == is_2d] for is_2d in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": rest, "weight_decay": 0.0}]  # fmt: skip
    betas = args.beta1, args.beta2
    run.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=betas, fused=device.type == "cuda")
    warmup = max(args.warmup_steps, 1)
    run.scheduler = LambdaLR(run.optimizer, lambda done: min(1.0, (done + 1) / warmup))
