"""Several processes that train one model: who does what, and what they tell each other.

torchrun starts them, PyTorch connects them (gloo between CPUs, NCCL between GPUs). A step of the optimizer takes the
same sequences on any number of processes: its ``grad_accum`` micro batches of ``batch_size`` sequences are shared out.
Each process has either the whole model ("ddp", Li et al., 2020) or a share of every tensor ("fsdp", Zhao et al., 2023).
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt import ops
from fastgpt.config import UserError

_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank among all and on its machine, and their number. Alone by default.

    ``beside`` is their group for what goes on beside training, in another thread: its talk is kept apart.

    What follows is called by all of them at the same point of the program, and does nothing in a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: dist.Store | None = None
    beside: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The ``TrainConfig.device`` of this process: of several, each takes a GPU of its own.

        Raises:
            UserError: one GPU for all of them.
        """
        if self.size == 1:
            return name
        if ":" in name:
            raise UserError(f"device {name} is one GPU, and {self.size} processes need one each: give cuda instead")
        on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
        return f"cuda:{self.local_rank}" if on_gpu else name

    def share(self, batch_size: int, grad_accum: int) -> Share:
        """This process's part of each step: whole micro batches as far as they go round, else rows of them.

        Raises:
            UserError: the sequences of a step cannot be shared out evenly.
        """
        groups = math.gcd(grad_accum, self.size)  # each takes micro batches of its own
        group, part = self.rank % groups, self.rank // groups
        parts = self.size // groups  # processes of one group, which share the rows of its micro batches
        if batch_size % parts:
            raise UserError(
                f"batch_size {batch_size} times grad_accum {grad_accum} makes {batch_size * grad_accum} sequences a "
                f"step, which {self.size} processes cannot share evenly"
            )
        rows = batch_size // parts
        return Share(range(group, grad_accum, groups), slice(part * rows, (part + 1) * rows))

    def seed(self, seed: int, step: int) -> None:
        """Seed the default generators for ``step``: processes drop differently, and resuming needs no state of them."""
        if self.size > 1:
            torch.manual_seed(int(np.random.default_rng((seed, step, self.rank)).integers(2**63)))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' ``x``, which is changed."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process. It goes by way of the CPU and does not wait for a GPU."""
        return bool(self.sum(torch.tensor(int(flag))))

    def same(self, text: str) -> str:
        """The main process's ``text``."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, device=torch.device("cpu"))
        return texts[0]

    @contextlib.contextmanager
    def local_first(self) -> Iterator[bool]:
        """The first process of each machine goes through the block before the others, which find what it left there.

        Yields:
            Whether this is the first.
        """
        if self.local_rank:
            self.any(False)
        yield not self.local_rank
        if not self.local_rank:
            self.any(False)

    def shard(self, model: nn.Module, device: torch.device) -> None:
        """Spread every parameter of ``model`` over the processes, block by block, in place (FSDP2).

        A block's weights are gathered when it runs, forward and backward, and its gradients averaged and scattered.
        A model on the meta device stays there: its shards get their memory by ``to_empty``, and nothing else ever does.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # What it says of blocks that return views holds where these are changed in place; the model changes nothing.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = init_device_mesh(device.type, (self.size,))
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else an evaluation leaves the root's weights whole

    def replicate(self, model: nn.Module, device: torch.device) -> nn.Module:
        """``model`` such that its gradients are averaged over the processes, as DDP does; a sharded one as it is."""
        if self.size == 1 or is_sharded(model):
            return model
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@dataclass(frozen=True)
class Share:
    """A process's part of a step: these of its micro batches, and of each of them these rows."""

    micro_batches: range
    rows: slice


ALONE = World()
_world = ALONE


def world() -> World:
    """What ``join`` found; a process alone before it."""
    return _world


def join() -> World:
    """Meet the other processes where torchrun has started several.

    Raises:
        UserError: WORLD_SIZE says that there are several, and the rest of what torchrun sets is not there.
    """
    global _world
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _world
    missing = [name for name in _SET_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set and {missing[0]} is not: start several processes with torchrun")
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpus = local_rank < torch.cuda.device_count()
    if on_gpus:
        torch.cuda.set_device(local_rank)
    store, rank, size = next(iter(dist.rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    _world = World(rank, size, local_rank, store, dist.new_group(backend="gloo"))
    return _world


def leave() -> None:
    """Part from the other processes: the run is done."""
    global _world
    if _world.size > 1:
        dist.destroy_process_group()
        _world = ALONE


def is_first_to_fail() -> bool:
    """Whether this process's error is the run's reason to end: later ones follow from it, or say the same."""
    if _world.store is None:  # they have not met: what fails is the command, which is the same in all
        return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
    try:
        return _world.store.add("failed", 1) == 1
    except dist.DistError:  # the machine that holds the store has gone, too, and nobody can know
        return True


def lost_a_process(error: RuntimeError) -> bool:
    """Whether ``error`` is how PyTorch tells that another process does not answer any more."""
    return _world.size > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))


def is_sharded(model: nn.Module) -> bool:
    """Whether ``World.shard`` has spread ``model``."""
    return hasattr(model, "set_requires_gradient_sync")


def gradient_sync(model: nn.Module, wanted: bool) -> AbstractContextManager[Any]:
    """Forward and backward inside it average the gradients over the processes only if ``wanted``, else they add up."""
    if isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    if is_sharded(model):
        model.set_requires_gradient_sync(wanted)  # type: ignore[operator]
    return contextlib.nullcontext()


def compiled(model: nn.Module) -> nn.Module:
    """``model`` under torch.compile as one graph; a sharded one, gathered between its blocks, as a graph of each."""
    if not is_sharded(model):
        return torch.compile(model, fullgraph=True)  # type: ignore[return-value]
    for block in _blocks(model):
        block.compile(fullgraph=True)
    return model


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process has of ``tensor``: its shard, and the number of the shard's first row in the whole.

    Of one that is not spread that is all of it, from row 0 on.
    """
    if not hasattr(tensor, "to_local"):
        return tensor, 0
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    rows = -(-len(tensor) // mesh.size())  # of each shard but the last ones, as torch.chunk cuts
    return tensor.to_local(), min(mesh.get_local_rank() * rows, len(tensor))


def on_host(tensors: Mapping[str, Tensor], copy: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """``copy`` of each tensor, which lies in host memory; of one that is spread, spread alike, each shard a copy."""
    meshes = [tensor.device_mesh for tensor in tensors.values() if hasattr(tensor, "device_mesh")]
    if not meshes:
        return {name: copy(tensor) for name, tensor in tensors.items()}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    host = init_device_mesh("cpu", (meshes[0].size(),))

    def copy_of(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return copy(tensor)
        shard, shape, stride = copy(tensor.to_local()), tensor.shape, tensor.stride()
        return DTensor.from_local(shard, host, tensor.placements, run_check=False, shape=shape, stride=stride)

    return {name: copy_of(tensor) for name, tensor in tensors.items()}


def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float) -> None:
    """``ops.clip_grad_norm_``, by the norm of the whole gradients where each process has shards of them."""
    if not hasattr(grads[0], "to_local"):
        ops.clip_grad_norm_(grads, max_norm)
        return
    shards = [grad.to_local() for grad in grads]  # type: ignore[attr-defined]
    squared = ops.clip_grad_norm_(shards, math.inf).double().square()  # in fp64, that only the end is rounded
    norm = _world.sum(squared).sqrt().float()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.transformer.h) if hasattr(model, "transformer") else []  # type: ignore[arg-type, union-attr]
