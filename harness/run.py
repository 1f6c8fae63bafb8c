"""A run from its command line to its result. Whatever ends it, where it stands is written down, and
the exit code is right."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import teachability
from harness import checkpoint, flags, log, lora, pair, plan, shard, signals, track
from harness.cli import first_line, tell
from harness.data import pad_id
from harness.processes import Stopwatch, batch_order, gather_objects, my_share, row_generator
from harness.processes import raise_on_all_ranks, start_processes, sum_over_ranks, surroundings


@dataclass
class Needs:
    """What the methods read."""

    candidates: dict[str, int] = field(default_factory=dict)  # the student's likeliest, by flag
    sentences: bool = False  # whether responses are split
    teacher_checks: list = field(default_factory=list)  # raise ValueError if it cannot serve
    progress: bool = False  # whether steps depend on how many there are


@dataclass
class Position:
    """Where a run stands between two lines of its log; a checkpoint holds it."""

    step: int = 0  # training steps done
    evaluated: bool = False  # true if the evaluation before the next step is done, too
    skipped: int = 0  # steps in a row, up to here, whose loss or gradient was not finite
    log_bytes: int = 0
    random: list[dict] = ()  # random numbers of every process

    @classmethod
    def of(cls, path: Path):
        facts = checkpoint.read_json(path / "facts.json")
        with contextlib.suppress(TypeError, LookupError):
            found = cls(**facts["position"])
            counts = found.step, found.skipped, found.log_bytes
            kinds = {type(count) for count in counts}, type(found.evaluated), min(counts) >= 0
            if kinds == ({int}, bool, True) and found.step == checkpoint.step_of(path):
                return found
        raise ValueError(f"{path}/facts.json: not the facts of that step of a run")


class Run:
    """What one process holds while it trains. problems, prompts: by "train", "eval", "ood"."""

    overflow = 0.0  # NaN in a step whose sampling overflowed

    def __init__(self, args, origins, needs, rank: int, world: int, day: str | None = None):
        """All checks that need no weights. day: which templates may print, of an earlier start."""
        self.args, self.origins, self.needs = args, origins, needs
        self.rank, self.world = rank, world
        tokenizers, self.configs, self.vocab_size = pair.open_pair(args)
        self.tokenizer = tokenizers["--student"]
        for name, count in needs.candidates.items():
            if count > self.vocab_size:
                flag = f"--{name.replace('_', '-')} {count}"
                raise ValueError(f"{flag} exceeds the vocabulary of {self.vocab_size}")
        self.load_prompts(day or date.today().isoformat())
        opened = pair.open_splitter(args.splitter) if needs.sentences else (None, None)
        self.splitter, self.splitter_name = opened
        self.pad_id, self.watch = pad_id(self.tokenizer), Stopwatch(args.device)
        self.signals, self.position, self.log, self.bar = None, Position(), None, None
        self.segments, self.warned = None, False  # of a step; that sentences are too few

    def load_prompts(self, day: str) -> None:
        """Problems and prompts, of the date `day` if the template prints one."""
        args, self.day, self.skipped = self.args, day, [] if self.args.skip_bad_problems else None
        files = {"train": (args.problems, "train", "dial")}
        if args.eval_problems is not None or args.problems is None:
            files["eval"] = args.eval_problems, "test", "dial"
        if args.ood_problems is not None or (args.problems is None and args.eval_problems is None):
            files["ood"] = args.ood_problems, "test", "reverse"
        self.problems, self.prompts = {"eval": [], "ood": []}, {"train": [], "eval": [], "ood": []}
        how = {"configs": self.configs, "vocab_size": self.vocab_size, "skipped": self.skipped,
               "day": datetime.fromisoformat(day)}  # fmt: skip
        for name, which in files.items():
            found = pair.load_prompts(args, self.tokenizer, *which, **how)
            self.problems[name], self.prompts[name] = found

    def problems_of(self, step: int) -> tuple[list[int], range]:
        """The problem of every rollout of a step, and which of the rollouts are this process's."""
        args, count = self.args, self.args.prompts_per_step
        order = batch_order(len(self.prompts["train"]), step * count, count, args.seed)
        problems = [problem for problem in order for _ in range(args.rollouts_per_prompt)]
        return problems, my_share(len(problems), self.rank, self.world)

    def prompts_of(self, step: int) -> tuple[list[list[int]], int]:
        """This process's prompts of a step, and the number of the first in the batch."""
        problems, mine = self.problems_of(step)
        return [self.prompts["train"][problems[row]] for row in mine], mine.start

    def sentences(self, batch) -> list[torch.Tensor] | None:
        """The sentence of every token of every response, if a mask asks for it."""
        if not self.needs.sentences:
            return None
        rows = zip(batch.ids_BT.cpu(), batch.response_mask_BT.cpu(), strict=True)
        self.segments = [teachability.token_segments(self.tokenizer, ids_T[mask_T], self.splitter)
                         for ids_T, mask_T in rows]  # fmt: skip
        self.watch.lap("mask")
        return self.segments

    def generator(self, stream: int, first_row=0, numbers_per_row=0) -> torch.Generator:
        """Of the uniform numbers of a stream (steps: their number) from a row on."""
        return row_generator(self.args.seed, stream, first_row, numbers_per_row)

    def skip_overflow(self, generate):
        """`generate`; where logits overflow, a token of log-prob NaN, and no weight changes."""

        def sample(model, prompts, **how):
            self.overflow = 0.0
            try:
                return generate(model, prompts, **how)
            except ValueError as error:
                if signals.NONFINITE not in str(error):
                    raise
            self.overflow, size = math.nan, (self.vocab_size,)
            how["decode"] = lambda *_: lambda ids_S, *_: ids_S.new_zeros(ids_S.shape + size)
            batch = generate(model, prompts, **how | {"max_new_tokens": 1})
            batch.logp_BT[batch.response_mask_BT] = math.nan
            return batch

        return sample

    def sum(self, values) -> list[float]:
        """Element-wise sum over all processes."""
        self.shards.settle()
        return sum_over_ranks(values, self.model.device)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in their order; on the CPU."""
        self.shards.settle()
        return torch.cat(gather_objects(rows.cpu()))

    def autocast(self):
        """Matrix products in bfloat16 where asked for; parameters and the rest stay float32."""
        wanted = self.args.dtype == "bfloat16"
        return torch.autocast(self.args.device, torch.bfloat16, enabled=wanted)

    def gradients(self, last: bool):
        if self.shards.kind == "both":
            return self.shards.gradients(last)
        return contextlib.nullcontext() if last or self.world == 1 else self.student.no_sync()

    def steps(self):
        """Step numbers up to --steps, that one included: an evaluation may be due then."""
        args, position = self.args, self.position
        hook = self.optimizer.register_step_pre_hook(self.signals.hold)
        self.bar = tqdm(total=args.steps, initial=position.step, desc=args.method, unit="step",
                        disable=self.rank > 0)  # fmt: skip
        self.shown = {}
        with self.bar:
            for step in range(position.step, args.steps + 1):
                self.watch.restart()
                self.optimizer.zero_grad()  # 4 bytes per parameter, while responses are sampled
                self.refresh()
                yield step
        hook.remove()

    def evaluation_due(self, step: int) -> bool:
        every = self.args.eval_every or self.args.steps
        due = step % every == 0 or step == self.args.steps
        return bool(due and self.problems["eval"] and not self.position.evaluated)

    def log_line(self, step: int, loss: float, norm: float, skipped: int, batch, scores) -> dict:
        sums = log.batch_sums(batch, scores, self.args, self.segments)
        sums = dict(zip(sums, self.sum(sums.values()), strict=True))
        if self.rank == 0 and not self.warned and 2 * sums.get("short", 0) > sums["rollouts"]:
            self.warned = True
            if self.bar is not None:
                self.bar.clear()
            what = "most responses have fewer sentences than the rule needs, 2 x --min-segments"
            tell("train.py", f"step {step + 1}: {what}: look at --splitter")
        return log.log_line(step, loss, norm, skipped, sums, self.watch.seconds, self.args)

    def write(self, line: dict) -> None:
        """Log a line; now and then a checkpoint. From the first change of a weight to the end of
        this, signals wait."""
        self.signals.hold()
        position, args = self.position, self.args
        if "loss" in line:
            names, bad = ("reverse_kl", "kept"), position.skipped + 1 if line["skipped"] else 0
            moved = {"step": line["step"], "evaluated": False, "skipped": bad}
        else:
            names, moved = ("accuracy",), {"evaluated": True}
        random = gather_objects(checkpoint.random_state())
        if self.log is not None:
            position.log_bytes = self.log.write(line)
            self.log.lines.append(line)
            self.track(line)
        vars(position).update(moved, random=random)
        self.shown.update({name: f"{line[name]:.3f}" for name in names})
        self.bar.set_postfix(self.shown)
        self.signals.release()
        if "loss" in line:
            self.bar.update()
            every = args.checkpoint_every
            if every and (position.step % every == 0 or position.step == args.steps):
                self.signals.hold()
                self.write_checkpoint()
                self.signals.release()
        self.watch.restart()

    def give_up_or_skip(self, step: int, loss: float, norm: float, batch, scores, A_BT, w_BT):
        """The last of --max-skipped-steps in a row ends the run, with the batch in faults/."""
        if self.position.skipped + 1 < self.args.max_skipped_steps:
            return
        problems, mine = self.problems_of(step)
        bad_B = ~(scores.logp_BT.isfinite() & A_BT.isfinite()).all(dim=1)
        guilty = sum(gather_objects([mine[row] for row in bad_B.nonzero()[:, 0].tolist()]), [])
        tensors = {
            "ids_BT": batch.ids_BT, "response_mask_BT": batch.response_mask_BT,
            "student_logp_BT": batch.logp_BT, "teacher_logp_BT": scores.logp_BT,
            "keep_BT": scores.keep_BT, "advantage_BT": A_BT, "weight_BT": w_BT,
            "rollout_B": torch.tensor(mine),
            "problem_B": torch.tensor([problems[row] for row in mine]),
        }  # fmt: skip
        name = f"step-{step + 1}-rank{self.rank}.safetensors"
        path = checkpoint.write_fault(Path(self.args.out), name, tensors)
        who = "rollouts " + ", ".join(f"{r} (problem {problems[r]})" for r in guilty[:8])
        who += f" and {len(guilty) - 8} more" * (len(guilty) > 8)
        who = who if guilty else "the gradient's alone: no rollout stands out"
        what = f"step {step + 1}: loss {loss}, gradient norm {norm}, the last of "
        what += f"{self.position.skipped + 1} such steps in a row; {who}; the batch is in {path}"
        raise FloatingPointError(what)

    def describe(self) -> dict:
        return {
            "flags": vars(self.args), "origins": self.origins,
            "models": pair.student_and_teacher(self.args), "processes": self.world,
            "vocabulary": self.vocab_size, "stop_ids": self.stop_ids,
            "sentence_splitter": self.splitter_name, "date": self.day,
            "problems_sha256": self.fingerprint(), "skipped_problems": len(self.skipped or ()),
            "training_problems": len(self.prompts["train"]),
            "evaluation_problems": len(self.prompts["eval"]),
            "ood_problems": len(self.prompts["ood"]), **surroundings(self.args.device),
        }  # fmt: skip

    def fingerprint(self) -> str:
        """SHA-256 of all problems and of the chat template, which are the same on every day."""
        kinds = [self.problems[name] for name in self.prompts]
        content = [[[one["messages"], one["answer"]] for one in problems] for problems in kinds]
        text = json.dumps([content, self.tokenizer.chat_template])
        return hashlib.sha256(text.encode()).hexdigest()

    def find_resume(self, out: Path, config: dict | None):
        """(config, checkpoint or None, torn ones) to go on from, or None; or ValueError."""
        if config is None:
            return None
        fixed = self.needs.progress or "-" in (self.args.train_tokens or "")
        may_change = [name for name in flags.MAY_CHANGE if name != "steps" or not fixed]
        config["flags"] = flags.BEFORE | config["flags"]
        if changed := checkpoint.changed_flags(config, vars(self.args), may_change):
            raise ValueError(f"--resume: {out} is a run with other flags: {'; '.join(changed)}")
        if config.get("problems_sha256") != self.fingerprint():
            what = "files or chat template have changed"
            raise ValueError(f"--resume: {out} is a run on other problems: {what}")
        found = path, _ = checkpoint.survey(out)
        if path is not None and checkpoint.step_of(path) > self.args.steps:
            raise ValueError(f"--steps {self.args.steps}: {path} is of a later step")
        log.read_log(out, Position.of(path).log_bytes if path else 0)
        return config, *found

    def restore(self, path: Path) -> None:
        """Put the checkpoint in that folder back. ValueError: it is of another student."""
        self.position = Position.of(path)

        def put_back():
            found = checkpoint.read(path)
            checkpoint.restore(found, self.trained, self.optimizer, self.scheduler)

        try:
            shard.in_turn(put_back) if self.shards.kind == "both" else put_back()
            if self.rank < len(self.position.random):
                checkpoint.set_random_state(self.position.random[self.rank])
        except Exception as error:  # whatever the libraries make of it
            raise ValueError(f"{path}: {first_line(error)}") from error

    def begin_folder(self, claim, resume) -> None:
        """Write the config: nothing in the folder is touched before."""
        now, (config, *found) = self.describe(), resume or (None, None)
        pair.tell_skipped("train.py", self.skipped)
        if config is None:
            claim.begin()
            checkpoint.write_json(claim.out / "config.json", now)
            return
        claim.check()
        path = checkpoint.newest(claim.out, found)
        (claim.out / "faults" / "first.txt").unlink(missing_ok=True)
        names = "commit", "device", "processes", "threads", "versions"
        resumed = {"step": self.position.step} | {name: now[name] for name in (*names, "started")}
        pairs = {name: (config.get(name), now[name]) for name in names}
        pairs["--shard"] = config["flags"].get("shard", "none"), self.args.shard
        for name, (then, this) in pairs.items():
            if then != this:
                what = f"--resume: {name} {then!s:.200}, now {this}"
                tell("train.py", f"{what}: the run may go on otherwise than it would have")
        changed = {"flags": now["flags"], "origins": now["origins"]}
        changed["resumed"] = [*config.get("resumed", []), resumed]
        checkpoint.write_json(claim.out / "config.json", config | changed)
        where = f"from {path}" if path else f"{claim.out} from the beginning: no whole checkpoint"
        tell("train.py", f"resuming {where}")

    def write_checkpoint(self) -> None:
        if self.rank == 0 or self.shards.kind == "both":  # that one is gathered by all
            groups, facts = checkpoint.capture(self.trained, self.optimizer, self.scheduler)
        if self.rank == 0:
            self.log.flush()
            facts["position"] = dataclasses.asdict(self.position)
            checkpoint.write(Path(self.args.out), self.position.step, groups, facts)

    def finish(self) -> None:
        """Save the student in Hugging Face format and say what came of the run."""
        self.signals.hold()
        out, model = Path(self.args.out), self.model.to(getattr(torch, self.args.save_dtype))
        self.refresh()  # in that type

        def fill(folder: Path) -> None:
            model.generation_config.eos_token_id = self.stop_ids  # it stops as it was trained
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        if self.rank == 0:
            checkpoint.replace_folder(out, "student", fill)
            log.say_result(self.log.lines)
            print(f"wrote {out}/config.json, log.jsonl, student/")
        if dist.is_initialized():
            dist.barrier()  # nobody leaves before rank 0 has saved


@contextlib.contextmanager
def start(argv, tables, methods, presets, needs):
    """Check everything, load, yield a `Run`; save the result and leave. needs: args -> `Needs`."""
    parser, args, origins = flags.parse("train.py", tables, methods, presets, argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plan:
        try:
            plan.show(Run(args, origins, needs(args), rank=0, world=1))
        except ValueError as error:
            parser.error(str(error))
        sys.exit(0)
    code, begun, run, claim = 0, None, None, checkpoint.Claim(args.out)
    with signals.Interruptions() as interruptions, contextlib.closing(claim):
        try:
            try:
                run = open_run(args, origins, needs, interruptions, claim)
            except ValueError as error:
                parser.error(str(error))
            begun = claim.out  # before, an older run may lie there
            with written_down(run):
                yield run
            run.finish()
        except SystemExit as bad_input:
            code = bad_input.code
        except (signals.Stop, Exception) as error:
            interruptions.hold()  # what else comes is too late
            if interruptions.number is None:
                code = signals.end_with_error(begun, error)
            else:
                code = signals.end_when_told(begun, signals.Stop(interruptions.number))
        finally:
            interruptions.hold()
    if dist.is_initialized():  # the destructors of gloo's process group lock up, once in 30 runs
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def open_run(args, origins, needs, interruptions, claim) -> Run:
    """What needs no weights; errors of all processes; weights, checkpoint, folder."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out, run, resume, error, config = claim.out, None, None, None, None
    try:
        wanted, _ = needs(args), flags.train_tokens(args, 0)  # the latter may be misspelled
        track.check(args.track)
        lora.check(args)
        if rank == 0:
            claim.take()
            checkpoint.check_folder(out, args.resume)
            config = checkpoint.read_config(out) if args.resume else None
        run = Run(args, origins, wanted, rank, world, config and config.get("date"))
        resume = run.find_resume(out, config) if rank == 0 else None
    except (ValueError, OSError) as caught:  # the latter of a folder that may not be looked into
        error = caught
    device = start_processes(args, world) if world > 1 or error is None else None
    raise_on_all_ranks(lambda: None, error)
    if run.day != (day := gather_objects(run.day)[0]):  # of a resumed run, or midnight has passed
        run.load_prompts(day)
    run.signals = interruptions
    raise_on_all_ranks(lambda: pair.load_models(run, device))
    resume = gather_objects(resume)[0]  # the folder is shared, but rank 0 alone looked
    if resume is not None and resume[1] is not None:
        raise_on_all_ranks(lambda: run.restore(resume[1]))
    raise_on_all_ranks(lambda: run.begin_folder(claim, resume) if rank == 0 else None)
    if rank == 0:  # bad input is one line, so not before
        flags.say("train.py", args, origins)
    if world > 1 and run.shards.kind != "both":
        devices = [device.index] if device.type == "cuda" else None
        how = {"device_ids": devices, "gradient_as_bucket_view": True}  # not two gradients
        run.student = DistributedDataParallel(run.student, **how)
    return run


@contextlib.contextmanager
def written_down(run: Run):
    """Keep the log open; whatever ends the body early, first a checkpoint is written."""
    out, position = Path(run.args.out), run.position
    run.log = log.Log(out, position.log_bytes) if run.rank == 0 else None
    run.track = track.tracker(run.args.track, out, run.log.lines if run.log else ())
    position.random = position.random or gather_objects(checkpoint.random_state())
    try:
        yield
    except BaseException:
        alone = run.shards.kind != "both"  # the others may have ended otherwise
        if alone and not run.signals.held:  # else the weights are ahead of the log
            with contextlib.suppress(Exception):  # the disk may be full, or the GPU gone
                run.write_checkpoint()
        raise
    finally:
        if run.log is not None:
            run.log.close()
