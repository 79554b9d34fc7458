"""The checks that the ops share. Each raises one sentence that names the op, what was wanted and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)
_LIST_DTYPES = {torch.float32, *_HALVES}  # which lists may mix


def check_tensor(op: str, name: str, x: Any, rank: int | None = None, *, scalar: bool = False) -> None:
    """``x`` is a tensor of a dtype that fastgpt knows, of ``rank`` dimensions (None: at least one, or a ``scalar``)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {_name(x.dtype)}")
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(f"{op}: {name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    if rank is None and x.dim() == 0 and not scalar:
        raise ValueError(f"{op}: {name} must have at least one dimension, got a scalar")
    if rank is not None and x.dim() != rank:
        raise ValueError(f"{op}: {name} must have {rank} dimensions, got shape {tuple(x.shape)}")


def check_like(op: str, name: str, x: Any, other: Tensor, other_name: str, shape: Sequence[int]) -> None:
    """``x`` is a tensor of ``shape``, with the device and dtype of ``other``."""
    check_shape(op, name, x, other, other_name, shape)
    if x.dtype != other.dtype:
        raise ValueError(f"{op}: {name} must have {other_name}'s dtype {_name(other.dtype)}, got {_name(x.dtype)}")


def check_parameter(op: str, name: str, x: Any, other: Tensor, other_name: str, shape: Sequence[int]) -> None:
    """``x`` is a parameter of ``shape`` for ``other``: of its dtype, or fp32 beside half precision."""
    check_shape(op, name, x, other, other_name, shape)
    if x.dtype != other.dtype and not (x.dtype == torch.float32 and other.dtype in _HALVES):
        wanted = f"{_name(other.dtype)}" + (" or float32" if other.dtype in _HALVES else "")
        raise ValueError(
            f"{op}: {name} must be {wanted} beside {_name(other.dtype)} {other_name}, got {_name(x.dtype)}"
        )


def check_shape(op: str, name: str, x: Any, other: Tensor, other_name: str, shape: Sequence[int]) -> None:
    """``x`` is a floating-point tensor of ``shape`` on ``other``'s device."""
    check_tensor(op, name, x, len(shape))
    if x.shape != torch.Size(shape):
        raise ValueError(
            f"{op}: {name} must have shape {tuple(shape)} to go with {other_name} {tuple(other.shape)}, "
            f"got {tuple(x.shape)}"
        )
    check_device(op, name, x, other, other_name)


def check_device(op: str, name: str, x: Tensor, other: Tensor, other_name: str) -> None:
    if x.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other_name}'s device {other.device}, got {x.device}")


def check_norm(op: str, x: Any, weight: Any, bias: Any, eps: Any) -> None:
    """The arguments that layer_norm and add_layer_norm share."""
    check_tensor(op, "x", x)
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have a last dimension to normalise, got shape {tuple(x.shape)}")
    check_parameter(op, "weight", weight, x, "x", x.shape[-1:])
    if bias is not None:
        check_like(op, "bias", bias, weight, "weight", weight.shape)
    check_number(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")


def check_number(op: str, name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_dropout(op: str, p: Any, seed: Any, x: Tensor, p_name: str = "dropout_p") -> None:
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"{op}: {p_name} must be a number, got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"{op}: {p_name} must be in [0, 1), got {p}")
    if seed is None:
        return
    if not isinstance(seed, Tensor):
        raise TypeError(f"{op}: seed must be None or an int64 tensor of one element, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"{op}: seed must be an int64 tensor of one element, got {_name(seed.dtype)} of shape {tuple(seed.shape)}"
        )
    check_device(op, "seed", seed, x, "the input")


def check_targets(op: str, targets: Any, rows: Tensor, rows_name: str, classes: int, ignore_index: Any) -> None:
    """``targets`` holds one int64 class below ``classes``, or ``ignore_index``, for each of ``rows``.

    The values are looked at on a CPU only: on a GPU that would wait for all work queued before it, and a compiler
    that traces has none to look at.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"{op}: targets must be a tensor, got {type(targets).__name__}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{op}: targets must be int64, got {_name(targets.dtype)}")
    if targets.shape != rows.shape[:1]:
        raise ValueError(
            f"{op}: targets must have shape {tuple(rows.shape[:1])}, one for each row of {rows_name}, "
            f"got {tuple(targets.shape)}"
        )
    check_device(op, "targets", targets, rows, rows_name)
    if classes == 0:
        raise ValueError(f"{op}: there must be at least one class, got none")
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or targets.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low >= 0 and high < classes:
        return
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
    if wrong.numel():
        raise ValueError(
            f"{op}: targets must be in [0, {classes}) or ignore_index {ignore_index}, got {int(wrong[0])}"
            + (f" and {wrong.numel() - 1} more out of range" if wrong.numel() > 1 else "")
        )


def check_seqlens(op: str, seqlens_k: Any, k: Tensor, batch: int, seqlen_k: int) -> None:
    if not isinstance(seqlens_k, Tensor):
        raise TypeError(f"{op}: seqlens_k must be None or an int32 tensor, got {type(seqlens_k).__name__}")
    if seqlens_k.dtype != torch.int32 or seqlens_k.shape != (batch,):
        raise ValueError(
            f"{op}: seqlens_k must be int32 of shape ({batch},), got {_name(seqlens_k.dtype)} of shape "
            f"{tuple(seqlens_k.shape)}"
        )
    check_device(op, "seqlens_k", seqlens_k, k, "the keys")
    if seqlens_k.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(seqlens_k))
    if low < 0 or high > seqlen_k:
        raise ValueError(f"{op}: seqlens_k must be in [0, {seqlen_k}], got {low if low < 0 else high}")


def check_tensor_list(op: str, name: str, tensors: Any) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError(f"{op}: {name} must hold at least one tensor, got an empty list")
    if all(isinstance(x, Tensor) for x in tensors):
        dtypes = {x.dtype for x in tensors}
        if dtypes <= _LIST_DTYPES and len({x.device for x in tensors}) == 1:
            return  # an optimizer's lists are long: a tensor at a time only where one is wrong
    device, double = getattr(tensors[0], "device", None), getattr(tensors[0], "dtype", None) == torch.float64
    for index, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name}[{index}] must be a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise ValueError(
                f"{op}: {name}[{index}] must be float32, bfloat16, float16 or float64, got {_name(x.dtype)}"
            )
        if x.device != device:
            raise ValueError(f"{op}: {name}[{index}] must be on device {device}, got {x.device}")
        if (x.dtype == torch.float64) != double:
            raise ValueError(f"{op}: {name} must not mix float64 with other dtypes, got {_name(x.dtype)} at {index}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
