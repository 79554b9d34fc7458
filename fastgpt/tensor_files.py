"""The one reader of files of tensors: nothing in them is executed, and what is not wanted is not read.

A file is safetensors: eight bytes, a JSON header of that length, the numbers. safetensors checks that the header fits
the file and maps the numbers into memory, so that names, shapes and dtypes are known before any of them is read.

The rows of a tensor may lie in several files. Which of them a file has, the metadata of its header says, in the way of
PyTorch's distributed checkpoints: torch.distributed.checkpoint.HuggingFaceStorageReader reads such files, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.config import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_HEADER = 1 << 24  # bytes; a tensor's entry has about 100, and safetensors would take 100 MB of them

_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # in PyTorch's own words


@dataclass(frozen=True)
class Stored:
    """The tensor ``name`` as it lies in ``path``, a file or several of a folder: nothing is read before it is copied.

    ``pieces`` are its rows in order, mapped, and before each of them the number of its first row.
    """

    path: Path
    name: str
    pieces: Sequence[tuple[int, Tensor]]

    @torch.no_grad()
    def copy_to(self, out: Tensor, first_row: int = 0) -> None:
        """Read as many rows as ``out`` has, from ``first_row`` on, into its dtype and onto its device.

        Raises:
            UserError: a NaN or an infinity among them.
        """
        for start, piece in self.pieces:
            if out.dim() == 0:
                out.copy_(piece)
                continue
            begin, end = max(first_row, start), min(first_row + len(out), start + len(piece))
            if begin < end:
                out[begin - first_row : end - first_row].copy_(piece[begin - start : end - start])
        if not is_finite(out):
            raise UserError(f"{self.path}: damaged: {self.name} holds a NaN or an infinity")


def tensor_names(path: Path) -> set[str]:
    """The names of a file's tensors.

    Raises:
        UserError: no such file, or not a whole safetensors file.
    """
    return set(_open(path).keys())


def find_tensors(paths: Sequence[Path], like: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The tensors that ``like`` names, in the files ``paths`` taken together; their numbers are not looked at.

    Args:
        paths: safetensors files of one folder; other tensors in them are not looked at.
        like: a tensor of each name's shape, on any device, which the file's must have; where it is floating, they are,
            in any of ``FLOATS``, and elsewhere they have its dtype.
    Raises:
        UserError: a file that is missing or not a whole safetensors file, a tensor that is missing or of another shape
            or kind, or one whose rows are not all there, each once.
    """
    where = paths[0] if len(paths) == 1 else paths[0].parent
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for path in paths:
        file = _open(path)
        tensors = _map(path, file, like)
        for name, first_row in _first_rows(path, file, tensors).items():
            pieces.setdefault(name, []).append((first_row, tensors[name]))
    found = {name: Stored(where, name, sorted(parts, key=lambda part: part[0])) for name, parts in pieces.items()}
    _check_shapes(where, {name: _whole(stored) for name, stored in found.items()}, like)
    return found


def save_tensors(tensors: dict[str, Tensor], path: Path, offsets: Mapping[str, Sequence[int]] | None = None) -> None:
    """Write a file, and wait for nothing.

    Args:
        offsets: where the tensors are the rows of larger ones, of each the place of its first number there.
    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    metadata = None
    if offsets is not None:
        sharding = {name: {_OFFSETS: list(offsets[name])} for name in tensors}
        metadata = {_SHARDING: json.dumps(sharding)}  # one entry: safetensors writes several in any order
    save_file(tensors, path, metadata)


def check_tensors(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Hold what was found in ``path`` to ``like``, as ``find_tensors`` does, and look at the numbers, too.

    Raises:
        UserError: a tensor that is missing or of another shape or kind, or holds a NaN or an infinity, or tensors that
            are larger together than the file.
    """
    _check_shapes(path, tensors, like)
    needed, size = sum(tensors[name].nbytes for name in like), path.stat().st_size
    if needed > size:  # a pickle may have a tensor say one number over and over
        raise UserError(f"{path}: damaged: its tensors would take {needed:,} bytes, and the file has {size:,}")
    for name in like:
        if not is_finite(tensors[name]):
            raise UserError(f"{path}: damaged: {name} holds a NaN or an infinity")


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity in it; integers have none."""
    if tensor.dtype not in FLOATS or not tensor.numel():
        return True
    bounds = tensor.aminmax()  # NaN where any number is; no second tensor of this size is made
    return bool(bounds.min.isfinite() and bounds.max.isfinite())


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    missing = like.keys() - tensors.keys()
    if missing:
        raise UserError(f"{path}: damaged: it lacks {min(missing)}")
    for name, wanted in like.items():
        found = tensors[name]
        if found.shape != wanted.shape:
            raise UserError(f"{path}: {name} must have shape {tuple(wanted.shape)}, got {tuple(found.shape)}")
        if found.dtype != wanted.dtype and not (found.dtype in FLOATS and wanted.dtype in FLOATS):
            raise UserError(f"{path}: {name} must be {wanted.dtype}, got {found.dtype}")


def _map(path: Path, file: safe_open, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the file's tensors that ``like`` names, none of which is read."""
    names = set(file.keys())
    try:
        return {name: file.get_tensor(name) for name in like if name in names}
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _whole(stored: Stored) -> Tensor:
    """A tensor without memory, of the shape and dtype that the pieces make together.

    Raises:
        UserError: they do not fit together.
    """
    pieces = [piece for _, piece in stored.pieces]
    first, row = pieces[0], 0
    if len(pieces) == 1 and stored.pieces[0][0] == 0:
        return first
    for start, piece in stored.pieces:
        if piece.dim() == 0 or piece.shape[1:] != first.shape[1:] or piece.dtype != first.dtype:
            raise UserError(f"{stored.path}: damaged: the parts of {stored.name} are not of one tensor")
        if start != row:
            raise UserError(
                f"{stored.path}: damaged: its files have row {min(start, row)} of {stored.name} twice, or not at all"
            )
        row += len(piece)
    return first.new_empty(row, *first.shape[1:], device="meta")


def _first_rows(path: Path, file: safe_open, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Of each tensor the row of the whole one that its first row is; those that have no rows are left out."""
    metadata = file.metadata() or {}
    if _SHARDING not in metadata:
        return dict.fromkeys(tensors, 0)
    try:
        sharding: Any = json.loads(metadata[_SHARDING])
        offsets = {name: sharding[name][_OFFSETS] for name in tensors}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: damaged: its header does not say which rows these are") from error
    for name, offset in offsets.items():
        shape = tensors[name].shape
        if not (
            isinstance(offset, list)
            and len(offset) == len(shape)
            and all(type(place) is int and 0 <= place < 2**62 for place in offset)
            and not any(offset[1:])
        ):
            raise UserError(f"{path}: damaged: its header does not say which rows of {name} these are")
    return {name: offset[0] if offset else 0 for name, offset in offsets.items() if 0 not in tensors[name].shape[:1]}


def _open(path: Path) -> safe_open:
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LARGEST_HEADER:
            raise UserError(f"{path}: cannot be read: not a safetensors file (its header would have {header:,} bytes)")
        return safe_open(path, "pt")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError) as error:  # PyTorch has no type of its own for a mapping that fails
        raise UserError(f"{path}: cannot be read: {error}") from error
