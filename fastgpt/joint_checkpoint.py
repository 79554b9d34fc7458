"""A checkpoint that several processes write together, by PyTorch's distributed checkpoints (DCP).

DCP knows from the DTensors who has which rows, runs each stage of the writing on all processes or on the main one, and
has an error of any stop all of them. What it does not do here is to write: the files that it would have would be read
by way of pickle. Ours are safetensors that say which rows they hold, as DCP's own reader of such files wants it.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, cast

from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fastgpt.checkpoint import Making
from fastgpt.distributed import world


def write_jointly(making: Making) -> None:
    """Write a checkpoint of what each process has a share of; called by all of them, in a thread of its own.

    Raises:
        Exception: that of the first process that has one, in all of them.
    """
    try:
        dcp.save(dict(making.tensors), storage_writer=_Writer(making), process_group=world().beside)
    except dcp.CheckpointException as error:
        _, (reason, _) = min(error.failures.items())
        raise reason from None


class _Writer(dcp.StorageWriter):
    """DCP's stages, in the order in which it calls them."""

    def __init__(self, making: Making) -> None:
        self.making = making

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """All processes."""
        self.making.check()
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The main process: tell each which part it is, or that the checkpoint is there already."""
        is_new = self.making.begin()
        parts = [(part, len(plans)) if is_new else None for part in range(len(plans))]
        return [dataclasses.replace(plan, storage_data=part) for plan, part in zip(plans, parts, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """All processes."""
        results = []
        if plan.storage_data is not None:
            tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
            offsets = {item.index.fqn: item.tensor_data.chunk.offsets for item in plan.items if item.tensor_data}
            sums = self.making.fill(tensors, offsets, *plan.storage_data)
            results = [WriteResult(MetadataIndex(line), 0, line) for line in sums]
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The main process."""
        self.making.finish([result.storage_data for written in results for result in written])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
