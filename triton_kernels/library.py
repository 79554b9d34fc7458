"""The dispatcher ops ``fastgpt_triton::...`` (``fastgpt.kernel_ops``), and the kernels' functions behind them.

This module needs torch alone. Triton, and the file of a kernel, are loaded when the first of its ops runs, so that
importing fastgpt costs nothing, and a file that is run by ``python -m`` registers nothing twice.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from fastgpt import kernel_ops

NAMESPACE = "fastgpt_triton"

# Op: the file that has its function, of the same name.
_FILES = {
    "attention_fwd": "attention",
    "attention_bwd": "attention",
    "attention_qkvpacked_fwd": "attention",
    "attention_qkvpacked_bwd": "attention",
    "softmax_fwd": "softmax",
    "softmax_bwd": "softmax",
    "layer_norm_fwd": "layer_norm",
    "layer_norm_bwd": "layer_norm",
    "add_layer_norm_fwd": "add_layer_norm",
    "add_layer_norm_bwd": "add_layer_norm",
    "gelu_fwd": "gelu",
    "gelu_bwd": "gelu",
    "cross_entropy_fwd": "cross_entropy",
    "cross_entropy_bwd": "cross_entropy",
    "scale_gradient_": "cross_entropy",
    "linear_cross_entropy_fwd": "linear_cross_entropy",
    "dropout_fwd": "dropout",
    "dropout_bwd": "dropout",
    "adamw_": "adamw",
    "clip_grad_norm_": "clip_grad_norm",
}


def interpreting() -> bool:
    """Whether Triton's interpreter is to run the kernels, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")


def missing() -> str | None:
    """Why no Triton kernel can run on this machine, whatever the tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def op(name: str) -> Callable[..., Any]:
    """The dispatcher op of that name: "layer_norm_fwd"."""
    return kernel_ops.op(NAMESPACE, name)


# These keep tables on the device from call to call, which a pool of captured graphs might take back.
_UNSAFE_IN_POOLS = ("adamw_", "clip_grad_norm_")

_library = kernel_ops.define(NAMESPACE, {name: [torch.Tag.cudagraph_unsafe] for name in _UNSAFE_IN_POOLS})


def _implement(name: str, file: str) -> None:
    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"fastgpt.triton_kernels.{file}"), name)

    def run(*args: Any) -> Any:
        x = args[0][0] if isinstance(args[0], list) else args[0]
        if not x.is_cuda:
            return function()(*args)
        # A launch goes to the current device, which need not be that of the tensors.
        with torch.cuda.device(x.device):
            _require_supported(x.device)
            return function()(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")


@functools.cache
def _require_supported(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"backend 'triton' needs a GPU of compute capability 8.0 or later, {torch.cuda.get_device_name(device)} "
            f"has {major}.{minor}"
        )


for _name, _file in _FILES.items():
    _implement(_name, _file)
