"""The one reader of files of tensors: nothing in them is executed, and what is not wanted is not read.

A file is safetensors: eight bytes, a JSON header of that length, the numbers. safetensors checks that the header fits
the file and maps the numbers into memory, so that names, shapes and dtypes are known before any of them is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgpt.config import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_HEADER = 1 << 24  # bytes; a tensor's entry has about 100, and safetensors would take 100 MB of them


def tensor_names(path: Path) -> set[str]:
    """The names of a file's tensors.

    Raises:
        UserError: no such file, or not a whole safetensors file.
    """
    return set(_open(path).keys())


def read_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ``like`` names, mapped from the file; others in it are not looked at.

    Args:
        path: a safetensors file.
        like: a tensor of each name's shape, on any device, which the file's must have; where it is floating, they are,
            in any of ``FLOATS``, and elsewhere they have its dtype.
    Returns:
        {name: tensor} on the CPU, in the file's precision, every number finite; the file never sees a change to one.
    Raises:
        UserError: no such file, not a whole safetensors file, a tensor that is missing, of another shape or kind, or
            one that holds a NaN or an infinity, or tensors that are larger together than the file; shapes are looked at
            before numbers.
    """
    file = _open(path)
    names = set(file.keys())
    try:
        tensors = {name: file.get_tensor(name) for name in like if name in names}  # maps them, and reads nothing
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    check_tensors(path, tensors, like)
    return tensors


def check_tensors(path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Hold what was found in ``path`` to ``like``, as ``read_tensors`` does.

    Raises:
        UserError: as there.
    """
    missing = like.keys() - tensors.keys()
    if missing:
        raise UserError(f"{path}: damaged: it lacks {min(missing)}")
    for name, wanted in like.items():
        found = tensors[name]
        if found.shape != wanted.shape:
            raise UserError(f"{path}: {name} must have shape {tuple(wanted.shape)}, got {tuple(found.shape)}")
        if found.dtype != wanted.dtype and not (found.dtype in FLOATS and wanted.dtype in FLOATS):
            raise UserError(f"{path}: {name} must be {wanted.dtype}, got {found.dtype}")
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
