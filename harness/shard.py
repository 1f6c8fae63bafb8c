"""--shard: models spread over the processes, a layer at a time, by PyTorch's FSDP2 (`fully_shard`).

    none      both models whole in every process; DDP averages the gradients
    teacher   the teacher's layers are spread: each is gathered where it is read, then let go
    both      the student's, its gradients and moments too

Every pass of a spread model needs all processes, and they have different numbers of passes to make:
of micro-batches, of leaves. So before a pass all vote, and who has none left makes an empty one,
until nobody has any (`settle`).

Sampling would gather all layers for every token. So under `both` each process samples with a whole
copy of the student, of the type in --dtype, gathered anew before every step (`refresh`). Of P
processes and N parameters, the student takes 16 N / P bytes for weights, gradients and moments, and
2 N for the copy in bfloat16. The teacher's embeddings and head stay whole, since the head is read
outside of its forward pass.

A checkpoint is gathered and written whole, as without --shard: any number of processes goes on from
it. Under `both` that takes all processes, so whatever ends the run leaves the last periodic one.
"""

import contextlib
import copy
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from harness.processes import gather_objects, raise_on_all_ranks


def whole(tensor) -> torch.Tensor:
    """All of a tensor that may be spread; all processes must ask. One that is goes to the CPU of
    process 0, and nowhere else: a whole student with its moments is too much for a GPU."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0)


def spread_like(tensor, like) -> torch.Tensor:
    """This process's part of a whole tensor, spread as `like` is, if it is."""
    if not isinstance(like, DTensor):
        return tensor
    how = {"device_mesh": like.device_mesh, "placements": like.placements}
    return distribute_tensor(tensor.to(like.device), **how, src_data_rank=None)


def in_turn(load):
    """`load()`, one process of a machine after the other: whole models are in its memory once."""
    found, error = None, None
    turns = gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))
    for turn in range(max(turns)):
        if turn == int(os.environ.get("LOCAL_RANK", dist.get_rank())):
            try:
                found = load()
            except Exception as caught:  # the others are waiting at the barrier
                error = caught
        dist.barrier()
    raise_on_all_ranks(lambda: None, error)  # or the others would go on without it
    return found


class Shards:
    """What is spread of a run; kind: of --shard, "none" where there is one process."""

    def __init__(self, kind: str, device: torch.device, dtype: str):
        self.kind, self.device = kind if dist.is_initialized() else "none", device
        self.dtype, self.mesh, self.idle = getattr(torch, dtype), None, False
        self.teacher = self.trained = self.sampler = self.student = None
        self.policy = {}  # as under autocast: the residual stream stays float32
        if self.dtype != torch.float32:
            kept = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
            self.policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=self.dtype, **kept)}
        if self.kind != "none":
            self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def spreads(self, flag: str) -> bool:
        """Whether the model of that flag is."""
        return self.kind == "both" or (self.kind == "teacher" and flag == "--teacher")

    def load(self, flag: str, load):
        """`load(device)`: a model, on the device; of one that is spread, what checks and samples:
        the teacher itself, of the student the copy."""
        if not self.spreads(flag):
            return load(self.device)
        return in_turn(lambda: self._take(flag, load(torch.device("cpu"))))

    def _take(self, flag: str, model):
        if flag == "--teacher":
            tied = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
            self.teacher = model.requires_grad_(False)
            self._spread_layers(model)
            self._spread_rest(model.base_model, ignored_params=tied)
            return model.to(self.device)
        self.sampler = copy.deepcopy(model).to(self.device, self.dtype).requires_grad_(False)
        self.trained = model
        self._spread_layers(model, **self.policy)
        return self.sampler

    def _spread_layers(self, model, **how):
        names = getattr(model, "_no_split_modules", None) or ()
        for layer in [module for module in model.modules() if type(module).__name__ in names]:
            fully_shard(layer, mesh=self.mesh, **how)

    def _spread_rest(self, called, **how):
        fully_shard(called, mesh=self.mesh, **how)
        called.register_forward_pre_hook(self._announce, prepend=True)

    def finish(self, student) -> None:
        """Spread what is left of the student, in the module `student` that is called to train."""
        if self.kind == "both":
            self.student = student
            self._spread_rest(student, **self.policy)

    def _vote(self, mine: int) -> bool:
        votes = torch.tensor(float(mine), device=self.device)
        dist.all_reduce(votes)
        return bool(votes)

    def _announce(self, *_):
        if not self.idle:
            self._vote(1)

    def settle(self, empty=None) -> None:
        """Take part, by empty passes, in those that other processes still make: of the teacher, or
        as `empty` makes them."""
        while self.kind != "none" and self._vote(0):
            self.idle = True
            (empty or self._empty_of_teacher)()
            self.idle = False

    @torch.no_grad()
    def _empty_of_teacher(self) -> None:
        ids_BT = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        self.teacher.base_model(input_ids=ids_BT, use_cache=False)

    def _empty_of_student(self) -> None:
        ids_BT = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        mask_BT = torch.tensor([[False, True]], device=self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=bool(self.policy)):
            nothing = (self.student(ids_BT, mask_BT) * 0).sum()
        nothing.backward()

    @contextlib.contextmanager
    def gradients(self, last: bool):
        """Around a forward and backward pass of the student, which all processes make."""
        yield
        if last:
            self.settle(self._empty_of_student)

    @torch.no_grad()
    def refresh(self) -> None:
        """Have the copy that samples be the student."""
        if self.kind == "both":
            pairs = zip(self.trained.parameters(), self.sampler.parameters(), strict=True)
            for part, full in pairs:
                full.copy_(part.detach().to(full.dtype).full_tensor())
