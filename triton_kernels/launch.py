"""What all launches share: the shape of blocks, by GPU generation or as tuned, and the size of a grid."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.config import UserError
from fastgpt.files import write_atomically

# What a kernel is launched with beside its arguments: BLOCK_M and its kin, num_warps, num_stages.
Blocks = dict[str, Any]

INTERPRETER = 0

# How much of a row that is too long for registers a program takes at a time.
LONG_ROW_BLOCK = 4096


class Asked(NamedTuple):
    """What a launch asked for: the default options, and which of them its kernel takes no others of."""

    default: Blocks
    fixed: tuple[str, ...]


class StoredBlocksError(UserError, RuntimeError):
    """The tuner's file holds what this version of fastgpt cannot use."""


_forced: dict[str, Blocks] = {}
# While `recording`: the generation whose defaults count, and by kernel and shape class what was asked for.
_recording: tuple[int, dict[tuple[str, str], Asked]] | None = None


def generation(device: torch.device) -> int:
    """The row of the tables that ``device`` reads: 80, 86, 90 or 100, or INTERPRETER.

    86 stands for the chips of little shared memory (sm_86, sm_89, sm_120), 100 for the data-center Blackwells.
    """
    arch = _arch(device) if device.type == "cuda" else 0
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        arch = triton.runtime.driver.active.get_current_target().arch  # a test compiles for a GPU that is not there
    if arch == 0:
        return INTERPRETER
    if arch in (86, 89) or arch >= 120:
        return 86
    return 100 if arch >= 100 else 90 if arch >= 90 else 80


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def blocks_for(
    kernel: str, x: Tensor, shape_class: str, default: Callable[[int], Blocks], fixed: tuple[str, ...] = ()
) -> Blocks:
    """The launch options of ``kernel``: those forced by the tuner, else those it stored for this GPU, else the default.

    Args:
        kernel: its name in the tuner's table, "softmax_fwd".
        x: a tensor on the device that runs it.
        shape_class: what the choice may depend on: never a batch or row count.
        default: the options for a generation.
        fixed: those among them that are no matter of choice.
    Raises:
        StoredBlocksError: the tuner's table cannot be read, or holds options that ``kernel`` does not take.
    """
    chosen = _forced.get(kernel)
    if _recording is not None:
        asked = Asked(default(_recording[0]), fixed)
        _recording[1].setdefault((kernel, shape_class), asked)
        chosen = chosen or asked.default
    elif chosen is None:
        chosen = default(generation(x.device))
        stored = tuned_blocks(x.device).get(kernel, {}).get(shape_class) if x.is_cuda else None
        if stored is not None:
            if stored.keys() != chosen.keys() or any(stored[name] != chosen[name] for name in fixed):
                raise StoredBlocksError(
                    f"{cache_file(torch.cuda.get_device_name(x.device))} holds {listed(stored)} for {kernel}, which "
                    f"takes options like {listed(chosen)}: another version of fastgpt wrote it; remove it, or run "
                    "`fastgpt tune` again"
                )
            chosen = stored
    # Triton 3.9 wants to be told; contraction of a * b + c into one rounding is what every compiler here does.
    return {**chosen, "enable_fp_fusion": True}


def listed(blocks: Blocks) -> str:
    return ", ".join(f"{name}={value}" for name, value in blocks.items())


def row_blocks(kernel: str, rows: Tensor, longest: int, per_thread: int = 16) -> Blocks:
    """The options of a kernel that holds whole rows of N elements, or, beyond ``longest``, goes over them in pieces.

    Eight warps, and as many rows as give each thread ``per_thread`` elements: enough of them in flight to hide the
    latency of memory, and few enough that all the tensors a kernel holds a tile of find room in its registers.
    """
    N = rows.shape[1]
    width = min(next_power_of_2(N), longest) if longest >= N else LONG_ROW_BLOCK

    def default(generation: int) -> Blocks:
        tile = 2048 if generation == INTERPRETER else 256 * per_thread
        block_m = max(1, tile // width)
        warps = min(max(block_m * width // (32 * per_thread), 1), 32)
        return {"BLOCK_M": block_m, "BLOCK_N": width, "num_warps": warps}

    shape_class = f"N={width if longest >= N else 'long'} {rows.element_size()} bytes"
    return blocks_for(kernel, rows, shape_class, default, fixed=("BLOCK_N",) if longest >= N else ())


def tile_blocks(kernel: str, rows: Tensor) -> Blocks:
    """The options of an elementwise kernel over (M, N) rows: a tile of some rows and some columns."""
    width = min(next_power_of_2(rows.shape[1]), 1024)

    def default(generation: int) -> Blocks:
        tile = 2048 if generation == INTERPRETER else 4096
        block_n = max(4, min(width, tile))
        return {"BLOCK_M": max(1, tile // block_n), "BLOCK_N": block_n, "num_warps": 4}

    return blocks_for(kernel, rows, f"N={width} {rows.element_size()} bytes", default)


@contextlib.contextmanager
def forced_blocks(kernel: str, blocks: Blocks) -> Iterator[None]:
    """Launch ``kernel`` with ``blocks`` and nothing else, until the ``with`` block ends."""
    _forced[kernel] = blocks
    try:
        yield
    finally:
        del _forced[kernel]


@contextlib.contextmanager
def recording(generation: int) -> Iterator[dict[tuple[str, str], Asked]]:
    """Note by kernel and shape class what launches ask for, until the ``with`` block ends.

    They get the defaults of ``generation``, or what is forced: what the tuner stored earlier is not looked at.
    """
    global _recording
    asked: dict[tuple[str, str], Asked] = {}
    _recording = generation, asked
    try:
        yield asked
    finally:
        _recording = None


def cache_file(device_name: str) -> Path:
    """Where `fastgpt tune` keeps what it found on a GPU of that name, with this version of Triton."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-")
    return root / "fastgpt" / f"blocks_{gpu}_triton-{triton.__version__}.json"


def read_blocks(path: Path) -> dict[str, dict[str, Blocks]]:
    """{kernel: {shape class: options}} of a file that ``write_blocks`` wrote; {} where there is none.

    Raises:
        StoredBlocksError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        for classes in table.values():
            for blocks in classes.values():
                if not all(isinstance(value, int) and value > 0 for value in blocks.values()):
                    raise ValueError("a block size is not a whole number above 0")
    except (ValueError, AttributeError) as error:
        raise StoredBlocksError(
            f"{path} is not a table that `fastgpt tune` wrote ({error}): remove it, or run `fastgpt tune` again"
        ) from error
    return table


def write_blocks(path: Path, table: dict[str, dict[str, Blocks]]) -> None:
    """Write ``table`` so that a reader finds the old file or the new one, never half of it."""
    write_atomically(path, (json.dumps(table, indent=1, sort_keys=True) + "\n").encode())


@functools.cache
def tuned_blocks(device: torch.device) -> dict[str, dict[str, Blocks]]:
    """What the tuner stored for the GPU ``device``, read once."""
    return read_blocks(cache_file(torch.cuda.get_device_name(device)))


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of ``device``; 2 under the interpreter, so that a program has several tiles there too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def as_matrix(x: Tensor) -> Tensor:
    """``x`` of any shape as (M, N) rows whose elements lie side by side."""
    return as_rows(x if x.dim() else x.reshape(1))


def as_rows(x: Tensor) -> Tensor:
    """``x`` as (M, N) rows whose elements lie side by side; a view wherever its strides allow one."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
