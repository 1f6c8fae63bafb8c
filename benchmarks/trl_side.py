"""TRL's side of step.py: its `DistillationTrainer` for the same work, and a check that it is the
same.  Importing this needs TRL.

What makes TRL cheaper is on: no gradient checkpointing, fused AdamW, no logging, no progress bar,
no saving, no NaN filter, no shuffling, data from this process (a few short prompts), prompts of one
length, so that no padding and no mask reach attention.  Its KV cache is the default (a static one
takes as long: it never compiles), and so are the tiles of its divergence, 4096 tokens x 32768 ids:
there is no setting.  Liger and its own Triton kernels need a GPU.
"""

import itertools
import json
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

import rollout
import train
from benchmarks import machine, memory, our_side, timing
from benchmarks.our_side import OPTIMIZER


class Trainer(DistillationTrainer):
    """As it comes, but it notes the last step's seconds by phase and checks the lengths."""

    sampling, scoring = 0.0, 0.0
    lengths: tuple  # shapes of the prompts' and the responses' masks

    def _prepare_inputs(self, batch):
        device = self.accelerator.device.type
        start = timing.clock(device)
        inputs = super()._prepare_inputs(batch)
        self.sampling = timing.clock(device) - start
        masks = [inputs[f"{name}_mask"] for name in ("prompt", "completion")]
        if (*(tuple(m.shape) for m in masks),) != self.lengths or not all(m.all() for m in masks):
            raise ValueError(f"TRL's rollouts are not of the wanted lengths {self.lengths}")
        return inputs

    def _get_last_hidden_state(self, model, *rest, **more):
        device = self.accelerator.device.type
        start = timing.clock(device)
        hidden_BTD = super()._get_last_hidden_state(model, *rest, **more)
        if model is not self.accelerator.unwrap_model(self.model):
            self.scoring = timing.clock(device) - start
        return hidden_BTD


def make_trainer(folder: Path, args, steps: int) -> Trainer:
    """A trainer for `steps` steps on the models and prompts of `shapes.write_pair`."""
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
    trainer.lengths = (args.prompts, args.prompt_tokens), (args.prompts, args.tokens)
    trainer.remove_callback(transformers.PrinterCallback)  # would print a summary of the run
    return trainer


def peak_memory(folder: Path, args) -> dict[str, float]:
    """MiB of some steps: see `memory.peak_of`."""
    machine.use_threads(args.threads)
    return memory.peak_of(make_trainer(folder, args, our_side.MEMORY_STEPS).train)


def check_same_work(run, trainer: Trainer, args) -> dict[str, float]:
    """TRL's loss and gradient on rollouts of ours against those of our step, which is undone.

    Returns:
        both losses (nats) and the norm of the gradients' difference over the norm of TRL's.

    Raises:
        ValueError: they are not the same up to floating point; or lengths are not what they
            should be.
    """
    weights, clip, run.args.clip_grad = our_side.weights_of(run), run.args.clip_grad, 0.0
    with our_side.recorded(rollout, "generate") as calls:
        line = train.train_step(run, 0)
    run.args.clip_grad = clip
    ours = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    our_side.set_back(run, weights)
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
    allowed = machine.tolerance(args.dtype)
    if not (abs(found["loss"] - found["trl_loss"]) < allowed and apart < allowed):
        raise ValueError(f"the two sides do not compute the same: {found}")
    return found


class TurnTaker(transformers.TrainerCallback):
    """Times TRL's rounds of `steps` steps, and has `our_round` called between them.

    A round of TRL runs from the end of ours to its `on_step_end`, so that data loading and
    callbacks count.
    """

    def __init__(self, trainer: Trainer, ledger: timing.Ledger, our_round, steps: int, device: str):
        self.trainer, self.ledger, self.our_round = trainer, ledger, our_round
        self.steps, self.device = steps, device

    def begin(self):
        """A round starts."""
        self.timer = self.ledger.round(self.steps, self.device)
        self.phases = self.timer.__enter__()
        self.last = timing.clock(self.device)

    def on_train_begin(self, args, state, control, **kwargs):
        """The first round starts."""
        self.begin()

    def on_step_end(self, args, state, control, **kwargs):
        """Note the step's phases; after the last one of a round let us have ours."""
        now = timing.clock(self.device)
        phases = {"sample": self.trainer.sampling, "score": self.trainer.scoring}
        self.phases.append(phases | {"update": now - self.last - sum(phases.values())})
        self.last = now
        if state.global_step % self.steps == 0:
            self.timer.__exit__(None, None, None)
            self.our_round()
            self.begin()
