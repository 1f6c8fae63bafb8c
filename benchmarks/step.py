r"""What a whole training step costs: ours against TRL's, and our methods beside each other.

    python benchmarks/step.py                                            CPU, one thread, minutes
    python benchmarks/step.py --vocabularies 4096 --only peer --rounds 20      one part, more rounds
    python benchmarks/step.py --device cuda --dtype bfloat16 --shape qwen3-0.6b \
        --vocabularies 151936 --prompts 64 --tokens 512
    python benchmarks/step.py --only methods -- --prompts-per-step 16    flags for train.py's steps

A step is sampling, teacher scoring, student forward and backward, clipping, the optimizer and what
a trainer does around them.  Only steps count, not set-up: CPU time of the process and its workers
(GPU: wall time after synchronising), sides taking turns in one process; the first round warms up.
min and median are over rounds, phases the least over rounds (of each, so that they need not add up
to a step); ratios are those of the minima, "paired" the median of the ratios of each round.

peer      `train.train_step` with `--method rkl` against TRL's `DistillationTrainer`, the same work:
          random Qwen3 models, equal prompts, responses of exactly --tokens tokens, one AdamW update
          per batch, the loss the mean over response tokens of the full-vocabulary reverse KL at
          temperature 1.  Before anything is timed, TRL's loss and gradient on rollouts of ours are
          compared with those of our step.  The tokenizer's end token lies one past the last row of
          both heads, so that neither side can draw it or pays for forbidding it (TRL's
          `min_new_tokens` is a pass over the logits per token).

          What makes TRL cheaper is on: no gradient checkpointing, fused AdamW, no logging, no
          progress bar, no saving, no NaN filter, no shuffling, data from this process (it is 8
          short prompts), prompts of one length, so that no padding and no mask reach attention.
          The KV cache is its default (a static one takes as long: it never compiles), and so are
          the tiles of its divergence, 4096 tokens x 32768 ids: there is no setting.  Liger and its
          own Triton kernels need a GPU.
          TRL's round runs from the end of our round to its `on_step_end`, so that data loading and
          callbacks count; its phases: sample is `_prepare_inputs` (generation and what belongs to
          it), score the teacher's backbone, update the rest, the teacher's head included.  (Ours
          runs the teacher's head in score, too, for what it logs.)

methods   the toy worlds as `train.py` runs them: `opd`, `rkl`, `release` on horizon, `opd`, `lgr`
          on fork.  The student is set back before each step, so that all methods of a world work
          on identical rollouts (checked).  "rule" is a step without its update, where `release`
          is cheaper than `opd`, because what it released is cut off; its mask over a step of opd
          is the steadiest figure of its cost.  FLOPs, by formula, are those of matrix products
          and attention in sampling, teacher trunk, leaves and update (3 forwards): every row
          alone, which no implementation avoids, and with trunk and update padded to the longest
          row, which makes opd dearer.

Memory: each side alone in a fresh process, three steps; MiB of resident memory at the end of its
set-up, and by how much its peak during the steps exceeds that (GPU: allocated memory).
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import flags as training_flags  # noqa: E402
import lgr  # noqa: E402
import preparing  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402

SHAPES = {  # student, teacher: layers, hidden, query heads, key heads, head width, feed-forward
    "small": ((4, 128, 4, 2, 32, 384), (6, 256, 4, 2, 64, 768)),  # 1.3M, 5.8M at V = 4096
    "qwen3-0.6b": ((28, 1024, 16, 8, 128, 3072), (28, 2048, 16, 8, 128, 6144)),  # teacher: 1.7B
}
WORLDS = {"horizon": ("opd", "rkl", "release"), "fork": ("opd", "lgr")}
OPTIMIZER = {"lr": 1e-5, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.98, "clip_grad": 1.0}
MEMORY_STEPS = 3


# ------------------------------------------------------------------------------- clocks and memory
def cpu_seconds() -> float:
    """CPU time of this process's threads and of its worker processes, living or dead, in s."""
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + dead.ru_utime + dead.ru_stime
    for child in multiprocessing.active_children():
        for thread in Path(f"/proc/{child.pid}/task").glob("*/schedstat"):
            total += int(thread.read_text().split()[0]) / 1e9
    return total


def wall_seconds(device: str) -> float:
    """Wall time, of a GPU that has finished, in s."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_peak(reset: bool = False) -> float:
    """Most MiB that this process's memory has been resident (GPU: allocated) since the reset.

    Linux's own mark of this address space: `ru_maxrss` cannot be reset, and after a fork and exec
    it still holds the parent's.
    """
    if torch.cuda.is_initialized():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def seconds(device: str) -> float:
    """What phases are told apart by: CPU time, or wall time where a GPU works."""
    return wall_seconds(device) if device == "cuda" else cpu_seconds()


class Stopwatch(train.Stopwatch):
    """`train.py`'s, which goes by wall time, and in `latest` the same by `seconds`."""

    latest: dict[str, float]

    def __init__(self, device: str):
        super().__init__(device)
        self.now, Stopwatch.latest = seconds(device), {}

    def lap(self, phase: str) -> None:
        """Charge the time since the last call to `phase`."""
        super().lap(phase)
        before, self.now = self.now, seconds(self.device)
        self.latest[phase] = self.latest.get(phase, 0.0) + self.now - before


def our_step(run: preparing.Run, step: int) -> tuple[dict, dict[str, float]]:
    """The log line of a step, and its seconds by phase."""
    return train.train_step(run, step), Stopwatch.latest


@dataclass
class Ledger:
    """Seconds per step of one side, an entry per round: CPU time, wall time, phases by name."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def round(self, steps: int, device: str):
        """Time what happens within; yields a list for each step's seconds by phase."""
        phases, cpu, wall = [], cpu_seconds(), wall_seconds(device)
        yield phases
        self.wall.append((wall_seconds(device) - wall) / steps)
        self.cpu.append((cpu_seconds() - cpu) / steps)
        names = dict.fromkeys(name for step in phases for name in step)
        self.phases.append({n: sum(step.get(n, 0.0) for step in phases) / steps for n in names})

    def seconds(self, device: str) -> list[float]:
        """What is compared: CPU time, or wall time where a GPU works."""
        return self.wall if device == "cuda" else self.cpu

    def series(self, *names: str) -> list[float]:
        """What these phases took together, round by round."""
        return [sum(step.get(name, 0.0) for name in names) for step in self.phases]

    def least(self, *names: str) -> float | None:
        """The least that they took; None where there is no such phase."""
        known = any(name in step for step in self.phases for name in names)
        return min(self.series(*names)) if known else None


def compare(one: list[float], other: list[float]) -> tuple[float, float]:
    """(ratio of the minima, median of the ratios of each round)."""
    pairs = zip(one, other, strict=True)
    return min(one) / min(other), statistics.median(a / b for a, b in pairs)


# ------------------------------------------------------------------------------ models and set-up
def write_models(folder: Path, shape: str, vocabulary: int, args) -> None:
    """A student, a teacher (random, far from uniform: a deviation of 2 to 3 in the logits) with a
    tokenizer whose end token is not among their ids, and problems of --prompt-tokens words."""
    words = {f"w{i}": i for i in range(vocabulary)} | {"<|end|>": vocabulary}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="w0", padding_side="left"
    )
    for name, sizes, seed in zip(("student", "teacher"), SHAPES[shape], (0, 1), strict=True):
        layers, hidden, heads, kv_heads, width, ff = sizes
        config = Qwen3Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ff,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_dim=width, max_position_embeddings=args.prompt_tokens + args.tokens,
            tie_word_embeddings=True, initializer_range=2.5 / hidden**0.5,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    ids_PT = torch.randint(1, vocabulary, (max(64, args.prompts), args.prompt_tokens))
    texts = [" ".join(f"w{i}" for i in ids_T) for ids_T in ids_PT.tolist()]
    lines = [json.dumps({"prompt": text}) for text in texts]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")


def machine_flags(args) -> list[str]:
    """Those of train.py that say where and how it computes."""
    return ["--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]


def our_run(argv: list[str]) -> preparing.Run:
    """Everything that `train.py` has in hand before its first step."""
    _, args = training_flags.parse(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    run = preparing.prepare(args, rank=0, world=1)
    preparing.load_models(run, torch.device(args.device))
    return run


def peer_flags(folder: Path, args) -> list[str]:
    """train.py's flags for the same work as `peer_trainer`."""
    flags = ["--method", "rkl", "--student", f"{folder}/student", "--teacher", f"{folder}/teacher"]
    flags += ["--problems", f"{folder}/problems.jsonl", "--prompts-per-step", f"{args.prompts}"]
    flags += ["--max-new-tokens", f"{args.tokens}", "--micro-batch", f"{args.prompts}"]
    for name, value in OPTIMIZER.items():
        flags += [f"--{name.replace('_', '-')}", f"{value}"]
    return flags + machine_flags(args)


def peer_trainer(folder: Path, args, steps: int):
    """TRL's trainer for `steps` steps; `sampling` and `scoring` hold the last one's seconds."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Trainer(DistillationTrainer):
        """Tells phases apart and checks lengths; otherwise as it comes."""

        sampling, scoring = 0.0, 0.0

        def _prepare_inputs(self, batch):
            start = seconds(args.device)
            inputs = super()._prepare_inputs(batch)
            self.sampling = seconds(args.device) - start
            want = (args.prompts, args.prompt_tokens), (args.prompts, args.tokens)
            masks = [inputs[f"{name}_mask"] for name in ("prompt", "completion")]
            if (*(tuple(m.shape) for m in masks),) != want or not all(m.all() for m in masks):
                raise ValueError(f"TRL's rollouts are not of the wanted lengths {want}")
            return inputs

        def _get_last_hidden_state(self, model, *rest, **more):
            start = seconds(args.device)
            hidden_BTD = super()._get_last_hidden_state(model, *rest, **more)
            if model is not self.accelerator.unwrap_model(self.model):
                self.scoring = seconds(args.device) - start
            return hidden_BTD

    config = DistillationConfig(
        output_dir=str(folder / "trl"), use_cpu=args.device == "cpu", max_steps=steps,
        bf16=args.dtype == "bfloat16", gradient_checkpointing=False,
        per_device_train_batch_size=args.prompts, gradient_accumulation_steps=1,
        max_completion_length=args.tokens, beta=1.0, temperature=1.0, top_p=1.0, top_k=0,
        shuffle_dataset=False, dataloader_num_workers=0, learning_rate=OPTIMIZER["lr"],
        lr_scheduler_type="constant", optim="adamw_torch_fused",
        weight_decay=OPTIMIZER["weight_decay"], adam_beta1=OPTIMIZER["beta1"],
        adam_beta2=OPTIMIZER["beta2"], max_grad_norm=OPTIMIZER["clip_grad"], report_to="none",
        save_strategy="no", logging_strategy="no", logging_nan_inf_filter=False, disable_tqdm=True,
    )  # fmt: skip
    texts = [json.loads(x)["prompt"] for x in (folder / "problems.jsonl").read_text().splitlines()]
    wanted = list(itertools.islice(itertools.cycle(texts), (steps + 1) * args.prompts))
    teacher_dtype = getattr(torch, args.dtype)
    load = transformers.AutoModelForCausalLM.from_pretrained
    trainer = Trainer(
        model=load(folder / "student", dtype=torch.float32),
        teacher_model=load(folder / "teacher", dtype=teacher_dtype).requires_grad_(False),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": wanted}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "student"),
    )
    trainer.remove_callback(transformers.PrinterCallback)  # would print a summary of the run
    return trainer


# ------------------------------------------------------------------------ the same work, to begin
@contextlib.contextmanager
def recorded(module, name: str):
    """Within, the calls of a function of `module` are noted: [(arguments, result)]."""
    function, calls = getattr(module, name), []

    def noting(*args, **kwargs):
        calls.append((args, function(*args, **kwargs)))
        return calls[-1][1]

    setattr(module, name, noting)
    try:
        yield calls
    finally:
        setattr(module, name, function)


def set_back(run: preparing.Run, weights: dict[str, torch.Tensor]) -> None:
    """The student as it was, and an optimizer that has seen nothing; no buffer is made anew."""
    run.model.load_state_dict(weights)
    for state in run.optimizer.state.values():
        for value in state.values():
            value.zero_()


def weights_of(run: preparing.Run) -> dict[str, torch.Tensor]:
    """A copy of the student's, for `set_back`."""
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}


def check_same_work(run: preparing.Run, trainer, args) -> dict[str, float]:
    """TRL's loss and gradient on rollouts of ours against those of our step, which is undone.

    Returns:
        both losses (nats) and the norm of the gradients' difference over the norm of TRL's.

    Raises:
        ValueError: they are not the same up to floating point; or lengths are not what they
            should be.
    """
    weights, clip, run.args.clip_grad = weights_of(run), run.args.clip_grad, 0.0
    with recorded(rollout, "generate") as calls:
        line = train.train_step(run, 0)
    run.args.clip_grad = clip
    ours = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    set_back(run, weights)
    ids_BT = calls[0][1].ids_BT
    P = args.prompt_tokens
    if tuple(ids_BT.shape) != (args.prompts, P + args.tokens) or line["truncated"] != 1:
        raise ValueError(f"our rollouts are not of the wanted lengths: {tuple(ids_BT.shape)}")
    parts = {"prompt": ids_BT[:, :P], "completion": ids_BT[:, P:]}
    inputs = {f"{name}_ids": ids for name, ids in parts.items()}
    inputs |= {f"{name}_mask": torch.ones_like(ids) for name, ids in parts.items()}
    with trainer.compute_loss_context_manager():
        loss, _, tokens = trainer._compute_loss(trainer.model, inputs, None)
    loss.backward()
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    if theirs.keys() != ours.keys() or int(tokens) != args.prompts * args.tokens:
        raise ValueError("the two sides do not train the same parameters on as many tokens")
    square = [((ours[n] - theirs[n]).norm() ** 2, theirs[n].norm() ** 2) for n in theirs]
    apart = (sum(a for a, _ in square) / sum(b for _, b in square)).sqrt().item()
    trainer.model.zero_grad()
    found = {"loss": line["loss"], "trl_loss": loss.item(), "gradients_apart": apart}
    tolerance = 1e-4 if args.dtype == "float32" else 0.05
    if not (abs(found["loss"] - found["trl_loss"]) < tolerance and apart < tolerance):
        raise ValueError(f"the two sides do not compute the same: {found}")
    return found


# ---------------------------------------------------------------------------- peer: us against TRL
def take_turns(folder: Path, args, steps: int) -> tuple[dict[str, Ledger], dict | None]:
    """Rounds of `steps` steps, theirs then ours; the ledgers by side, and what was checked."""
    run = our_run(peer_flags(folder, args))
    ledgers, numbers, checked = {"ours": Ledger()}, itertools.count(), None
    turns = args.rounds + 1
    bar = tqdm(total=turns * steps, leave=False, unit="step")

    def our_round():
        with ledgers["ours"].round(steps, args.device) as phases:
            for number in itertools.islice(numbers, steps):
                line, by_phase = our_step(run, number)
                phases.append(by_phase)
        if (line["response_tokens"], line["truncated"]) != (args.tokens, 1):
            raise ValueError(f"our rollouts are not of the wanted lengths: {line}")
        bar.update(steps)

    if args.no_trl:
        for _ in range(turns):
            our_round()
    else:
        trainer = peer_trainer(folder, args, turns * steps)
        checked = check_same_work(run, trainer, args)
        ledgers = {"trl": Ledger()} | ledgers
        trainer.add_callback(turn_taker(trainer, ledgers["trl"], our_round, steps, args.device))
        trainer.train()
    bar.close()
    for ledger in ledgers.values():
        assert len(ledger.cpu) == turns
        for series in (ledger.cpu, ledger.wall, ledger.phases):
            del series[0]  # warm-up
    return ledgers, checked


def turn_taker(trainer, ledger: Ledger, our_round, steps: int, device: str):
    """A callback that times TRL's rounds and lets us have ours between them."""

    class TurnTaker(transformers.TrainerCallback):
        def begin(self):
            self.timer = ledger.round(steps, device)
            self.phases = self.timer.__enter__()
            self.last = seconds(device)

        def on_train_begin(self, args, state, control, **kwargs):
            self.begin()

        def on_step_end(self, args, state, control, **kwargs):
            now = seconds(device)
            phases = {"sample": trainer.sampling, "score": trainer.scoring}
            self.phases.append(phases | {"update": now - self.last - sum(phases.values())})
            self.last = now
            if state.global_step % steps == 0:
                self.timer.__exit__(None, None, None)
                our_round()
                self.begin()

    return TurnTaker()


def peer(vocabulary: int, args) -> dict[str, float]:
    """One vocabulary: rows of the table; returns its figures for the last line."""
    names, figures = {"trl": "TRL", "ours": "ours"}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_models(folder, args.shape, vocabulary, args)
        ledgers, checked = take_turns(folder, args, args.steps_per_round)
        memory = {side: {} for side in ledgers}
        if not args.no_memory:
            memory = {side: in_a_process(peer_memory, side, folder, args) for side in ledgers}
    if checked:
        print("V={}: on the same rollouts loss {loss:.6f}, TRL's {trl_loss:.6f} nats, "
              "gradients {gradients_apart:.1e} of their norm apart".format(vocabulary, **checked))
    print_head("V side s_min s_median wall_min sample score update set_up_MiB peak_above_MiB")
    for side, ledger in ledgers.items():
        seconds = ledger.seconds(args.device)
        phases = [ledger.least(name) for name in ("sample", "score", "update")]
        print_row(
            vocabulary, names[side], min(seconds), statistics.median(seconds), min(ledger.wall),
            *phases, memory[side].get("set_up"), memory[side].get("above"),
        )  # fmt: skip
        figures[f"{side}_s_{vocabulary}"] = min(seconds)
        if memory[side]:
            figures[f"{side}_peak_MiB_{vocabulary}"] = memory[side]["above"]
    if "trl" in ledgers:
        both = [ledgers[side].seconds(args.device) for side in ("trl", "ours")]
        ratio, paired = compare(*both)
        print(f"\nV={vocabulary}: TRL / ours {ratio:.2f}, paired {paired:.2f}\n", flush=True)
        figures |= {
            f"trl_over_ours_{vocabulary}": ratio, f"trl_over_ours_paired_{vocabulary}": paired
        }  # fmt: skip
    return figures


# ------------------------------------------------------------- methods: one step, the same rollouts
def methods(world: str, names: tuple[str, ...], args) -> dict[str, float]:
    """One world, rows of the table and what they compare; returns figures for the last line."""
    flags = {m: ["--toy", world, "--method", m, *machine_flags(args), *args.flags] for m in names}
    runs = {m: our_run(flags[m]) for m in names}
    weights = {m: weights_of(run) for m, run in runs.items()}
    with recorded(rollout, "generate") as rollouts, recorded(lgr, "lookahead_confidence") as looks:
        for run in runs.values():
            train.train_step(run, 0)  # warm-up
    batch = rollouts[0][1]
    if not all(torch.equal(other.ids_BT, batch.ids_BT) for _, other in rollouts):
        raise ValueError(f"{names} did not sample the same rollouts")
    ledgers = {m: Ledger() for m in names}
    for number in tqdm(range(args.rounds * args.steps_per_round), leave=False, unit="round"):
        for m in names if number % 2 == 0 else names[::-1]:
            set_back(runs[m], weights[m])
            with ledgers[m].round(1, args.device) as phases:
                phases.append(our_step(runs[m], 0)[1])
    memory = {m: {} for m in names}
    if not args.no_memory:
        memory = {m: in_a_process(method_memory, flags[m]) for m in names}
    show_methods(world, ledgers, memory, args.device)
    figures = compare_methods(world, ledgers, args.device)
    if "lgr" in names:
        figures |= compare_flops(runs["lgr"], batch, lgr_leaves([call[0] for call in looks]))
    print(flush=True)
    return figures


BEFORE_UPDATE = ("sample", "score", "mask", "lookahead")
PHASES = (*BEFORE_UPDATE, "update")


def show_methods(world: str, ledgers: dict[str, Ledger], memory: dict, device: str) -> None:
    """The table of one world."""
    print_head("world method s_min s_median wall_min sample score mask lookahead update rule "
               "set_up_MiB peak_above_MiB")  # fmt: skip
    for m, ledger in ledgers.items():
        seconds = ledger.seconds(device)
        phases = [ledger.least(name) for name in PHASES]
        print_row(
            world, m, min(seconds), statistics.median(seconds), min(ledger.wall), *phases,
            ledger.least(*BEFORE_UPDATE), memory[m].get("set_up"), memory[m].get("above"),
        )  # fmt: skip


def compare_methods(world: str, ledgers: dict[str, Ledger], device: str) -> dict[str, float]:
    """Every method against opd: a line each, and the figures."""
    figures, base = {}, ledgers["opd"]
    for m, ledger in ledgers.items():
        figures[f"{m}_s_{world}"] = min(ledger.seconds(device))
        if m == "opd":
            continue
        ratio, paired = compare(ledger.seconds(device), base.seconds(device))
        wall, wall_paired = compare(ledger.wall, base.wall)
        rule, rule_paired = compare(ledger.series(*BEFORE_UPDATE), base.series(*BEFORE_UPDATE))
        print(f"{world}: {m} / opd {ratio:.3f}, paired {paired:.3f}; wall {wall:.3f}, paired "
              f"{wall_paired:.3f}; without the update {rule:.3f}, paired {rule_paired:.3f}",
              flush=True)  # fmt: skip
        figures |= {
            f"{m}_over_opd": ratio, f"{m}_over_opd_paired": paired, f"{m}_over_opd_wall": wall,
            f"{m}_over_opd_wall_paired": wall_paired, f"{m}_over_opd_without_update": rule,
            f"{m}_over_opd_without_update_paired": rule_paired,
        }  # fmt: skip
        if m == "release":  # the steadiest figure: opd has no such phase
            figures["release_mask_of_opd_step"] = ledger.least("mask") / min(base.series(*PHASES))
            share = figures["release_mask_of_opd_step"]
            print(f"{world}: release's phase mask takes {share:.1%} of a step of opd")
    return figures


# ------------------------------------------------------------------------------------ FLOPs by hand
def costs(model, vocab_size: int) -> tuple[float, float, float]:
    """FLOPs of a token in the backbone, of one column that it attends to, of the head's row."""
    config = model.config.get_text_config(decoder=True)
    D, width = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    matrices = D * width * (2 * heads + 2 * kv_heads) + 3 * D * config.intermediate_size
    layers = config.num_hidden_layers
    return 2 * layers * matrices, 4 * layers * heads * width, 2 * vocab_size * D


def flops(run: preparing.Run, mask_BT: torch.Tensor, padded: bool = False) -> dict[str, float]:
    """Of one step of plain OPD on these responses, by phase; every row alone, or in score and
    update as long as the longest one."""
    response_B = mask_BT.sum(dim=1)
    end_B = mask_BT.long().cumsum(dim=1).argmax(dim=1) + 1  # prompt and response
    fed_B = torch.full_like(end_B, mask_BT.shape[1]) if padded else end_B

    def forward(model, length_B):
        token, column, head = costs(model, run.vocab_size)
        own_B = token * length_B + column * length_B * (length_B + 1) / 2
        return float((own_B + head * response_B).sum())

    return {
        "sample": forward(run.model, end_B - 1),  # the last token is never fed
        "score": forward(run.teacher, fed_B),
        "update": 3 * forward(run.model, fed_B),
    }


def leaf_flops(run: preparing.Run, column_N: torch.Tensor) -> float:
    """Of leaves that branch off these columns: each attends to the trunk before it and itself."""
    token, column, head = costs(run.teacher, run.vocab_size)
    return float((token + head + column * (column_N + 1)).sum())


def compare_flops(run: preparing.Run, batch, column_N: torch.Tensor) -> dict[str, float]:
    """A step of lgr over one of opd, on these rollouts and leaves: two lines and the figures."""
    mask_BT, ahead = batch.response_mask_BT, leaf_flops(run, column_N)
    tight, padded = flops(run, mask_BT), flops(run, mask_BT, padded=True)
    figures = {
        "lgr_over_opd_flops": 1 + ahead / sum(tight.values()),
        "lgr_over_opd_flops_padded": 1 + ahead / sum(padded.values()),
    }
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in tight.items())
    print("lgr / opd by FLOPs {:.3f}, where opd's count has padding {:.3f}".format(
        *figures.values()))  # fmt: skip
    print(f"{len(mask_BT)} rollouts, {int(mask_BT.sum())} response tokens, {len(column_N)} leaves; "
          f"GFLOPs: {parts}, leaves {ahead / 1e9:.2f}")  # fmt: skip
    return figures


def lgr_leaves(calls: list[tuple]) -> torch.Tensor:
    """The columns [N] of all leaves of some calls of `lgr.lookahead_confidence`: triggered
    positions' candidates but the sampled token, whose leaf is the trunk."""
    column_N = []
    for _, ids_BT, mask_BT, trigger_BT, candidates_BTK, *_ in calls:
        leaf_BTK = (trigger_BT & mask_BT)[..., None] & (candidates_BTK != ids_BT[..., None])
        column_N.append(leaf_BTK.nonzero()[:, 1])
    return torch.cat(column_N) if column_N else torch.zeros(0, dtype=torch.int64)


# ------------------------------------------------------------------------------------------- memory
def in_a_process(function, *args):
    """What the function returns in a fresh process, with nothing of this one's memory."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=quiet) as pool:
        return pool.submit(function, *args).result()


def peak_of(steps) -> dict[str, float]:
    """MiB at the end of the set-up, and how much more the peak is while `steps` runs."""
    set_up = resident_peak(reset=True)
    steps()
    return {"set_up": set_up, "above": resident_peak() - set_up}


def peer_memory(side: str, folder: Path, args) -> dict[str, float]:
    """One side of `peer`."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if side == "trl":
        return peak_of(peer_trainer(folder, args, MEMORY_STEPS).train)
    return method_memory(peer_flags(folder, args))


def method_memory(flags: list[str]) -> dict[str, float]:
    """Steps of `train.py` with these flags."""
    run = our_run(flags)
    return peak_of(lambda: [train.train_step(run, step) for step in range(MEMORY_STEPS)])


# --------------------------------------------------------------------------------------------- main
def print_head(names: str) -> None:
    """The first two lines of a table."""
    print("| " + " | ".join(names.split()) + " |\n" + "|---" * len(names.split()) + "|")


def print_row(*values) -> None:
    """A row: seconds to four digits, MiB (above 20) whole, - for what there is not."""
    shown = []
    for value in values:
        if isinstance(value, float):
            value = f"{value:.0f}" if value > 20 else f"{value:.4f}"
        shown.append("-" if value is None else str(value))
    print("| " + " | ".join(shown) + " |", flush=True)


def quiet() -> None:
    """No chatter of the libraries between the tables."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags; those after -- go to train.py in the part `methods`."""
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (
        argv, [])  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", choices=["peer", "methods"], help="one part")
    add("--vocabularies", type=int, nargs="+", default=[4096, 32768], help="of peer, tokens")
    add("--shape", choices=list(SHAPES), default="small", help="of peer's models")
    add("--prompts", type=int, default=8, help="of peer, per step")
    add("--prompt-tokens", type=int, default=16, help="of peer, each")
    add("--tokens", type=int, default=64, help="of peer, per response")
    add("--rounds", type=int, default=6, help="timed; one more warms up")
    add("--steps-per-round", type=int, default=2, help="(methods: as many rounds more)")
    add("--threads", type=int, default=1, help="0: PyTorch's choice")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of matrix products")
    add("--no-trl", action="store_true", help="our side alone")
    add("--no-memory", action="store_true", help="times only")
    args = parser.parse_args(argv)
    for name in ("prompts", "prompt_tokens", "tokens", "rounds", "steps_per_round"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.flags = flags
    return args


def main() -> None:
    """Print the tables, then their figures as JSON."""
    args = parse(sys.argv[1:])
    quiet()
    train.Stopwatch = Stopwatch
    torch.set_num_threads(args.threads or torch.get_num_threads())
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    args.no_trl |= args.only == "methods"
    if not args.no_trl:
        try:
            from trl import DistillationTrainer  # noqa: F401

            versions += f", trl {importlib.metadata.version('trl')}"
        except (ImportError, RuntimeError) as error:
            args.no_trl = True
            print("our side alone: no TRL with a DistillationTrainer here "
                  f"(benchmarks/requirements.txt): {error}")  # fmt: skip
    print(f"{args.dtype}, {where}, {args.threads} thread(s), {versions}")
    figures = {}
    if args.only != "methods":
        print(f"\npeer: {args.shape}, {args.prompts} prompts of {args.prompt_tokens} tokens, "
              f"{args.tokens} response tokens, {args.rounds} rounds of {args.steps_per_round} "
              "steps\n", flush=True)  # fmt: skip
        for vocabulary in args.vocabularies:
            figures |= peer(vocabulary, args)
    if args.only != "peer":
        for world, names in WORLDS.items():
            figures |= methods(world, names, args)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
