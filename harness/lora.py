"""--lora-rank R: train low-rank adapters (LoRA, arXiv 2106.09685) in place of the weights, by peft.

Every linear layer but the head learns W + 2 B A, A of R rows; B begins at 0. The weights W stay in
the type of --dtype and get no gradient and no moments: of N parameters, of which N_L in layers, the
student takes b (N + N_L) bytes, b being 2 in bfloat16, and 16 per number of the adapters, where it
took 16 N. The second b N_L is the model that samples and is saved: an ordinary one, whose layers
are W + 2 B A merged anew before every step; the rest it shares. Checkpoints hold the adapters
alone. In bfloat16, the merged weights are rounded where the trained ones are added up: log-probs of
sampling and training differ by as much as by the rounding of any weight.
"""

import copy
import importlib.util

import torch
from transformers.pytorch_utils import Conv1D

from harness.cli import first_line


def check(args) -> None:
    """ValueError unless adapters can be trained."""
    if args.lora_rank and importlib.util.find_spec("peft") is None:
        raise ValueError(f"--lora-rank {args.lora_rank}: pip install peft")
    if args.lora_rank and args.shard == "both":
        raise ValueError("--lora-rank needs --shard none or teacher: adapters are not spread")


def targets(model) -> dict:
    """The linear layers but the head, by name; experts are none where they are one tensor."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head}  # fmt: skip


def adapt(model, rank: int, seed: int):
    """(the model that trains, `merge`): of `model`, which goes on to sample. ValueError: it has no
    linear layers. merge() writes W + 2 B A into `model`; before, it is as it was."""
    shared = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    trained, names = copy.deepcopy(model, shared), list(targets(model))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            from peft import LoraConfig, inject_adapter_in_model

            how = {"r": rank, "lora_alpha": 2 * rank, "target_modules": names}
            inject_adapter_in_model(LoraConfig(**how), trained)
        except Exception as error:  # whatever this version of peft makes of that model
            what = f"--lora-rank {rank}: {type(model).__name__}"
            raise ValueError(f"{what}: {first_line(error)}") from error
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW needs it
    pairs = [(model.get_submodule(name), trained.get_submodule(name)) for name in names]
    for plain, _ in pairs:
        plain.weight = torch.nn.Parameter(plain.weight.clone(), requires_grad=False)

    @torch.no_grad()
    def merge() -> None:
        for plain, module in pairs:
            weight = module.get_base_layer().weight
            plain.weight.copy_(weight.float() + module.get_delta_weight("default"))

    return trained, merge
