"""What the rungs of the ladders compute: each task's inputs, its truth, and how far from that a rung may be.

A file belongs to the task whose function it defines: in CUDA ``extern "C" void softmax(...)``, as ``tasks.h`` declares
it; in Python ``def softmax(x)``, or ``def layer_norm(x, weight, bias, eps)``, which takes the tensors of
``Task.inputs`` and the numbers of ``Task.constants``, and returns the tensors of ``Task.truth``, as a tuple where there
are several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import reference
from fastgpt.benchmarks.cases import Work
from fastgpt.benchmarks.errors import absolute_error, allowed_error, largest

EPS = 1e-5  # of layer norm

Sizes = dict[str, int]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One function that rungs compute, and what they are held to.

    Args:
        ladder: the folder of its rungs.
        counted: the sizes at which a rung's counters are read; even ones.
        others: sizes at which it has to be right, too; odd and tiny ones.
        timed: the sizes at which a GPU is timed.
        inputs: makes the tensors by name, in the order of the arguments. Their means are not zero.
        constants: the arguments that follow them: numbers, the same for all sizes or not.
        truth: computes the outputs by name from the inputs and constants, in the dtype of the inputs.
        peer: the same with PyTorch's own functions.
        dtypes: of the outputs.
        work: the bytes that have to move at least, and the FLOPs of matrix products.
        dtype: of the task: what the roofline's matrix product is measured in.
    """

    name: str
    ladder: str
    counted: Sizes
    others: tuple[Sizes, ...]
    timed: Sizes
    inputs: Callable[[Sizes, torch.device], Tensors]
    constants: Callable[[Sizes], tuple[float, ...]]
    truth: Callable[..., Tensors]
    peer: Callable[..., Tensors]
    work: Callable[[Sizes], Work]
    dtypes: dict[str, torch.dtype]
    dtype: str = "fp32"


@dataclass(frozen=True)
class Wrong:
    """An output that is too far from the truth, and the first element that is."""

    output: str
    element: tuple[int, ...]
    wanted: float
    got: float
    allowed: float
    count: int  # of wrong elements
    total: int

    def __str__(self) -> str:
        at = ", ".join(map(str, self.element))
        return (
            f"{self.output}[{at}] is {self.got:.9g} and should be {self.wanted:.9g}, off by at most {self.allowed:.2g} "
            f"({self.count} of {self.total} elements are wrong)"
        )


class Problem:
    """A task at one size: inputs on a device, the truth, and how far each output may be from it.

    That is the error rule: twice the error of PyTorch's own function in the same dtypes, and one rounding.
    """

    def __init__(self, task: Task, sizes: Sizes, device: torch.device) -> None:
        torch.manual_seed(0)
        self.task = task
        self.sizes = sizes
        self.device = device
        self.inputs = task.inputs(sizes, device)
        self.constants = task.constants(sizes)
        self.truth = task.truth(*(x.double() for x in self.inputs.values()), *self.constants)
        peer = task.peer(*self.inputs.values(), *self.constants)
        # Of a backward, since some true gradients are exactly zero.
        upstream = max((largest(x) for name, x in self.inputs.items() if name in ("dy", "do")), default=0.0)
        self.allowed = {
            name: allowed_error(absolute_error(peer[name], true), largest(true), task.dtypes[name], upstream)
            for name, true in self.truth.items()
        }

    def __str__(self) -> str:
        return " ".join(f"{name}={n}" for name, n in self.sizes.items())

    def judge(self, got: Tensors) -> list[Wrong]:
        """What is wrong with a rung's outputs, one for each that is too far from the truth.

        Raises:
            ValueError: an output with a wrong shape or dtype.
        """
        wrong = []
        for name, true in self.truth.items():
            mine, dtype = got[name], self.task.dtypes[name]
            if mine.shape != true.shape or mine.dtype != dtype:
                raise ValueError(
                    f"{name} is {tuple(mine.shape)} in {mine.dtype}, and should be {tuple(true.shape)} in {dtype}"
                )
            off = ~((mine.double() - true).abs() <= self.allowed[name])  # so that NaN is wrong, too
            if off.any():
                first = tuple(int(i) for i in off.nonzero()[0])
                values = true[first].item(), mine[first].item(), self.allowed[name]
                wrong.append(Wrong(name, first, *values, int(off.sum()), off.numel()))
        return wrong


# ---------------------------------------------------------------------------------------------------------------------
# The tasks
# ---------------------------------------------------------------------------------------------------------------------


def _sample(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32, mean: float = 0.5) -> Tensor:
    """Random numbers whose mean is not zero: sums of zero-mean inputs hide errors that grow with the sum."""
    return (torch.randn(shape, dtype=torch.float64) + mean).to(device, dtype)


def _softmax_inputs(sizes: Sizes, device: torch.device) -> Tensors:
    return {"x": _sample(sizes["M"], sizes["N"], device=device)}


def _rows_work(tensors: int) -> Callable[[Sizes], Work]:
    """The work of a function that moves so many fp32 tensors of (M, N); rows of N and columns of M are left out."""
    return lambda sizes: Work(4 * tensors * sizes["M"] * sizes["N"])


def _layer_norm_inputs(sizes: Sizes, device: torch.device) -> Tensors:
    M, N = sizes["M"], sizes["N"]
    return {
        "x": _sample(M, N, device=device, mean=4.0),
        "weight": _sample(N, device=device),
        "bias": _sample(N, device=device),
    }


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    return x.mean(-1), (centred.square().mean(-1) + eps).rsqrt()


def _layer_norm_truth(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensors:
    mean, rstd = _statistics(x, eps)
    return {"y": reference.layer_norm(x, weight, bias, eps), "mean": mean, "rstd": rstd}


def _layer_norm_peer(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensors:
    y, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
    return {"y": y, "mean": mean.flatten(), "rstd": rstd.flatten()}


def _layer_norm_bwd_inputs(sizes: Sizes, device: torch.device) -> Tensors:
    inputs = _layer_norm_inputs(sizes, device)
    mean, rstd = _statistics(inputs["x"].double(), EPS)
    return {
        "dy": _sample(sizes["M"], sizes["N"], device=device),
        "x": inputs["x"],
        "weight": inputs["weight"],
        "mean": mean.float(),
        "rstd": rstd.float(),
    }


def _layer_norm_bwd_truth(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensors:
    return _gradients(
        lambda x, weight, bias: reference.layer_norm(x, weight, bias, EPS),
        {"x": x, "weight": weight, "bias": torch.zeros_like(weight)},
        dy,
    )


def _layer_norm_bwd_peer(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensors:
    backward = torch.ops.aten.native_layer_norm_backward
    gradients = backward(dy, x, [x.shape[-1]], mean[:, None], rstd[:, None], weight, weight, [True, True, True])
    return dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))


def _gradients(function: Callable[..., Tensor], inputs: Tensors, upstream: Tensor) -> Tensors:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    gradients = torch.autograd.grad(function(*leaves.values()), list(leaves.values()), upstream)
    return {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def _attention_inputs(sizes: Sizes, device: torch.device) -> Tensors:
    shape = (sizes["B"], sizes["H"], sizes["T"], sizes["D"])
    return {name: _sample(*shape, device=device, dtype=torch.float16) for name in ("q", "k", "v")}


def _scale(sizes: Sizes) -> tuple[float, ...]:
    return (sizes["D"] ** -0.5,)


def _attention_truth(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q * scale) @ k.mT
    return {
        "o": reference.attention(q, k, v, True, 0.0, scale, None, None),
        "lse": scores.masked_fill(hidden, -torch.inf).logsumexp(-1),
    }


def _attention_peer(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensors:
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return {"o": o, "lse": _attention_truth(q.float(), k.float(), v.float(), scale)["lse"]}


def _attention_bwd_inputs(sizes: Sizes, device: torch.device) -> Tensors:
    qkv = _attention_inputs(sizes, device)
    result = _attention_truth(*(x.double() for x in qkv.values()), *_scale(sizes))
    shape = qkv["q"].shape
    return {
        "do": _sample(*shape, device=device, dtype=torch.float16),
        **qkv,
        "o": result["o"].half(),
        "lse": result["lse"].float(),
    }


def _attention_bwd_truth(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, True, 0.0, scale, None, None)

    return _gradients(attention, {"q": q, "k": k, "v": v}, do)


def _attention_bwd_peer(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensors:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return _gradients(attention, {"q": q, "k": k, "v": v}, do)


def _attention_work(tensors: int, products: float) -> Callable[[Sizes], Work]:
    """Moving so many fp16 tensors of (B, H, T, D), and so many causal products of 2 T^2 D / 2 FLOPs for each head."""

    def work(sizes: Sizes) -> Work:
        B, H, T, D = (sizes[name] for name in "BHTD")
        return Work(2 * tensors * B * H * T * D, int(products * B * H * T * T * D))

    return work


_ROWS: dict[str, Any] = {
    "counted": {"M": 64, "N": 1024},
    "others": ({"M": 5, "N": 1001}, {"M": 33, "N": 7}),
    "timed": {"M": 16384, "N": 4096},
    "constants": lambda sizes: (EPS,),
}
_WIDTHS = {**_ROWS, "timed": {"M": 16384, "N": 1024}}  # of models: some rungs hold a row in a warp's registers
_HEADS: dict[str, Any] = {
    "counted": {"B": 1, "H": 2, "T": 128, "D": 64},
    "others": ({"B": 1, "H": 1, "T": 65, "D": 64}, {"B": 2, "H": 1, "T": 1, "D": 64}),
    "timed": {"B": 4, "H": 8, "T": 2048, "D": 64},
    "constants": _scale,
    "dtype": "fp16",
}
F16, F32 = torch.float16, torch.float32

TASKS = {
    task.name: task
    for task in (
        Task(
            "softmax",
            "softmax",
            inputs=_softmax_inputs,
            truth=lambda x: {"y": reference.softmax(x, 1.0, False)},
            peer=lambda x: {"y": torch.softmax(x, -1)},
            work=_rows_work(2),
            dtypes={"y": F32},
            **{**_ROWS, "constants": lambda sizes: ()},
        ),
        Task(
            "layer_norm",
            "layer_norm",
            inputs=_layer_norm_inputs,
            truth=_layer_norm_truth,
            peer=_layer_norm_peer,
            work=_rows_work(2),
            dtypes={"y": F32, "mean": F32, "rstd": F32},
            **_WIDTHS,
        ),
        Task(
            "layer_norm_bwd",
            "layer_norm",
            inputs=_layer_norm_bwd_inputs,
            truth=_layer_norm_bwd_truth,
            peer=_layer_norm_bwd_peer,
            work=_rows_work(3),
            dtypes={"dx": F32, "dweight": F32, "dbias": F32},
            **{**_WIDTHS, "constants": lambda sizes: ()},
        ),
        Task(
            "attention",
            "attention",
            inputs=_attention_inputs,
            truth=_attention_truth,
            peer=_attention_peer,
            work=_attention_work(4, 2),
            dtypes={"o": F16, "lse": F32},
            **_HEADS,
        ),
        Task(
            "attention_bwd",
            "attention",
            inputs=_attention_bwd_inputs,
            truth=_attention_bwd_truth,
            peer=_attention_bwd_peer,
            work=_attention_work(8, 5),
            dtypes={"dq": F16, "dk": F16, "dv": F16},
            **_HEADS,
        ),
    )
}
LADDERS = tuple(dict.fromkeys(task.ladder for task in TASKS.values()))
