"""Where a model runs, in which dtype, and on which backends."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch

from fastgpt import dispatch
from fastgpt.config import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """
    Raises:
        UserError: not "auto", "cpu", "cuda" or "cuda:N", or a GPU that is not there.
    """
    if not isinstance(name, str):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not there: PyTorch sees {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a ``TrainConfig.dtype``: "auto" is bf16 on a GPU that has it, fp16 on others, fp32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def pick_backend(text: str, device: torch.device, dtype: torch.dtype) -> dispatch.use_backend:
    """The choice that ``text`` makes, over FASTGPT_BACKEND's, ready for ``with``: every op can run where it is to.

    Raises:
        UserError: an unknown op or backend, or one that cannot run here, with the reason.
    """
    try:
        choice = {**dispatch.current_choice(), **dispatch.parse_choice(text, "--backend")}
    except ValueError as error:
        raise UserError(str(error)) from error
    for op, backend in choice.items():
        if backend != dispatch.AUTO:
            reason = dispatch.reason_against(op, backend, device.type, dtype)
            if reason is not None:
                raise UserError(f"backend {backend!r} cannot run {op} here: {reason}")
    return dispatch.use_backend(**choice)


@contextlib.contextmanager
def fp32_products(*, tf32: bool) -> Iterator[None]:
    """With ``tf32``, PyTorch may round the factors of fp32 products to TF32 for so long; Triton's attention follows."""
    before = torch.backends.cuda.matmul.fp32_precision
    if tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors had on a GPU at most, or that this process had in a CPU's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024  # there it is in bytes


def device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
