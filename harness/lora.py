"""--lora-rank R: train low-rank adapters (LoRA, arXiv 2106.09685) in place of the weights, by peft.

Every linear layer but the head learns W + 2 B A, A of R rows; B begins at 0. Experts that a model
keeps in one tensor have no adapters: there attention learns alone. W stays in the type of --dtype
and gets neither gradient nor moments. Of N parameters, of which N_A in such layers, the student
takes b (N + N_A) bytes, b being 2 in bfloat16, and 16 per number of the adapters, in place of 16 N.
The second b N_A is what samples and is saved: an ordinary model, whose layers are W + 2 B A merged
anew before every step; the rest it shares, also in that type, where without adapters norms and
embeddings stay in float32. Checkpoints hold the adapters alone: --student must stay as it was.

In bfloat16 a merge to the nearest would lose all that is below half a digit of W, that is, most of
what a run learns at first. So merged weights are rounded up or down at random, in proportion, with
the same random numbers every time.
"""

import copy
import importlib
import warnings

import torch
from transformers.pytorch_utils import Conv1D

from harness.cli import first_line


def check(args) -> None:
    """ValueError unless peft can be imported where it is asked for."""
    if args.lora_rank:
        try:
            importlib.import_module("peft")
        except Exception as error:  # it may be there and not fit the other libraries
            why = f"--lora-rank {args.lora_rank} needs peft (pip install peft): {first_line(error)}"
            raise ValueError(why) from error


def targets(model) -> dict:
    """What gets adapters, by name: linear layers but the head, and none that do more."""
    head, kinds = model.get_output_embeddings(), (torch.nn.Linear.forward, Conv1D.forward)
    return {name: module for name, module in model.named_modules()
            if type(module).forward in kinds and module is not head}  # fmt: skip


def round_in_proportion(x, seed: int):
    """float32 to a neighbour in bfloat16, the nearer the likelier: right on average.

    >>> x = torch.full((10000,), 1 + 2**-9)              # a quarter of the way from 1 to 1 + 2^-7
    >>> found = round_in_proportion(x, 0)
    >>> sorted({*found.tolist()}), round((found > 1).double().mean().item(), 1)
    ([1.0, 1.0078125], 0.2)
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    low = torch.randint(2**16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.contiguous().view(torch.int32) + low) & -(2**16)).view(torch.float32)


def _inject(model, names, rank, seed):
    """The model with adapters, in float32, on the modules of these names and on nothing else."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):  # adapters begin on the CPU
        torch.default_generator.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        with warnings.catch_warnings(action="ignore"):  # that Conv1D is transposed: it sees to that
            inject_adapter_in_model(config, model)
    found = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    if found != {*names} or not names:
        odd = sorted(found ^ {*names}) or ["it has no linear layers"]
        raise ValueError(f"peft does not adapt its linear layers alone: {odd[0]}")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW needs it
    return model


def adapt(model, rank: int, seed: int):
    """(the model that trains, `merge`): of `model`, which goes on to sample. ValueError: peft makes
    something else of it. merge() writes W + 2 B A into `model`; before, it is as it was."""
    shared, names = {id(x): x for x in [*model.parameters(), *model.buffers()]}, [*targets(model)]
    try:
        trained = _inject(copy.deepcopy(model, shared), names, rank, seed)
        ids_BT = torch.arange(2, device=model.device)[None]
        if not torch.equal(*(one(input_ids=ids_BT).logits for one in (model, trained.eval()))):
            raise ValueError("its adapters, which begin at 0, change its logits")
    except Exception as error:  # whatever this version of peft makes of this model
        what = f"--lora-rank {rank}: {type(model).__name__}"
        raise ValueError(f"{what}: {first_line(error)}") from error
    pairs = [(model.get_submodule(name), trained.get_submodule(name)) for name in names]
    for plain, _ in pairs:
        plain.weight = torch.nn.Parameter(plain.weight.clone(), requires_grad=False)

    @torch.no_grad()
    def merge() -> None:
        for number, (plain, module) in enumerate(pairs):
            merged = module.get_base_layer().weight.float() + module.get_delta_weight("default")
            if plain.weight.dtype == torch.bfloat16:
                merged = round_in_proportion(merged, number)
            plain.weight.copy_(merged)

    return trained, merge
