"""One launch over a list of tensors of any sizes: which program works on which piece of which tensor.

Tensors are cut into blocks, one program each. Tables on the device tell a program where it is: the tensor of its block,
that tensor's first block, its size and its address. All but the addresses never change in a run and are copied once.
The addresses of gradients may change at any step; a copy from the host would have a CUDA graph read, at each replay,
host memory that has long been used for something else. So they go as a kernel's arguments, in launches of their own,
and only when they have changed.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.launch import cdiv

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_ADDRESSES_A_LAUNCH = 32
_TABLES_KEPT = 64
_address_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


class Cut(NamedTuple):
    """How tensors of given sizes are cut into ``blocks`` blocks: int64 and int32 tables on the device."""

    blocks: int
    sizes: Tensor  # (tensors,), int64: elements of each
    first_blocks: Tensor  # (tensors,), int32
    tensors: Tensor  # (blocks,), int32: the tensor of each block


@triton.jit
def _write_addresses_kernel(table_ptr, tensors, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(table_ptr + i, tensors[i].to(tl.int64))


@triton.jit
def place_of(block, sizes_ptr, first_blocks_ptr, tensors_ptr, BLOCK: tl.constexpr):
    """The tensor that ``block`` is a piece of, the piece's first element there, and the tensor's size."""
    tensor = tl.load(tensors_ptr + block)
    start = (block - tl.load(first_blocks_ptr + tensor)).to(tl.int64) * BLOCK
    return tensor, start, tl.load(sizes_ptr + tensor)


@triton.jit
def pointer_at(addresses_ptr, tensor, DTYPE: tl.constexpr):
    """The tensor's address as a pointer; 16 bytes of alignment, which ``aligned`` sees to, make for wide loads."""
    address = tl.load(addresses_ptr + tensor)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@functools.cache
def cut(sizes: tuple[int, ...], block: int, device: torch.device) -> Cut:
    """Cut tensors of ``sizes`` elements into pieces of at most ``block``; copied to the device once for each list."""
    counts = [cdiv(size, block) for size in sizes]
    first_blocks = [0, *itertools.accumulate(counts[:-1])]
    which = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    return Cut(
        sum(counts),
        torch.tensor(sizes, dtype=torch.int64, device=device),
        torch.tensor(first_blocks, dtype=torch.int32, device=device),
        which.to(device),
    )


def addresses_of(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """(lists, tensors) addresses, int64, on the tensors' device; each list is of one dtype and ``aligned``."""
    device = lists[0][0].device
    on_gpu = device.type == "cuda"
    key = (
        device,
        len(lists),
        torch.cuda.current_stream(device).cuda_stream if on_gpu else None,
        *(x.data_ptr() for tensors in lists for x in tensors),
    )
    # What is captured is written at a replay, and not before: of no use to others. Nor may a graph read a table that
    # the cache will drop.
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if not capturing and key in _address_tables:
        _address_tables.move_to_end(key)
        return _address_tables[key]
    padded = cdiv(len(lists[0]), _ADDRESSES_A_LAUNCH) * _ADDRESSES_A_LAUNCH
    table = torch.empty(len(lists), padded, dtype=torch.int64, device=device)
    for row, tensors in zip(table, lists, strict=True):
        for start in range(0, padded, _ADDRESSES_A_LAUNCH):
            some = list(tensors[start : start + _ADDRESSES_A_LAUNCH])
            some += [some[-1]] * (_ADDRESSES_A_LAUNCH - len(some))
            _write_addresses_kernel[(1,)](
                row[start:], tuple(some), COUNT=_ADDRESSES_A_LAUNCH, num_warps=1, enable_fp_fusion=True
            )
    if not capturing:
        _address_tables[key] = table
        if len(_address_tables) > _TABLES_KEPT:
            _address_tables.popitem(last=False)
    return table


def aligned(x: Tensor) -> Tensor:
    """``x`` itself if it is contiguous and lies at a multiple of 16 bytes, else a copy that does."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
