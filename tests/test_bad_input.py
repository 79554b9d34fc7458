"""What is wrong with an argument is said in one sentence: which op, what was wanted, what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import dispatch, ops

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def f(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.full(shape, 0.5, device=device).to(dtype)


def i(*values: int, dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def attention(q: Any = None, k: Any = None, v: Any = None, **options: Any) -> Any:
    """attention with good arguments but for those given; the functions below do the same for the other ops."""
    good = f(2, 3, 5, 8)
    return ops.attention(*(good if x is None else x for x in (q, k, v)), **options)


def packed(qkv: Any = None, **options: Any) -> Any:
    return ops.attention_qkvpacked(f(2, 5, 3, 3, 8) if qkv is None else qkv, **options)


def softmax(x: Any = None, **options: Any) -> Any:
    return ops.softmax(f(4, 8) if x is None else x, **options)


def layer_norm(x: Any = None, weight: Any = None, bias: Any = None, **options: Any) -> Any:
    return ops.layer_norm(f(4, 8) if x is None else x, f(8) if weight is None else weight, bias, **options)


def add_norm(x: Any = None, residual: Any = None, weight: Any = None, bias: Any = None, **options: Any) -> Any:
    good = f(4, 8), f(4, 8), f(8)
    given = [wanted if x is None else x for x, wanted in zip((x, residual, weight), good, strict=True)]
    return ops.add_layer_norm(*given, bias, **options)


def gelu(x: Any = None, bias: Any = None, **options: Any) -> Any:
    return ops.gelu(f(4, 8) if x is None else x, bias, **options)


def loss(logits: Any = None, targets: Any = None, **options: Any) -> Any:
    return ops.cross_entropy(
        f(3, 8) if logits is None else logits, i(0, 1, 7) if targets is None else targets, **options
    )


def linear_loss(x: Any = None, weight: Any = None, targets: Any = None, **options: Any) -> Any:
    good = f(3, 6), f(8, 6), i(0, 1, 7)
    given = [wanted if x is None else x for x, wanted in zip((x, weight, targets), good, strict=True)]
    return ops.linear_cross_entropy(*given, **options)


def drop(x: Any = None, p: Any = 0.5, **options: Any) -> Any:
    return ops.dropout(f(4, 8) if x is None else x, p, **options)


def adamw(**changed: Any) -> Any:
    arguments: dict[str, Any] = {name: [f(3), f(2, 2)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments.update(step=torch.ones(()), lr=f(), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    return ops.adamw_(**{**arguments, **changed})


def clip(grads: Any = None, max_norm: Any = 1.0, **options: Any) -> Any:
    return ops.clip_grad_norm_([f(3), f(2, 2)] if grads is None else grads, max_norm, **options)


ALL = {
    "attention": attention,
    "attention_qkvpacked": packed,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "add_layer_norm": add_norm,
    "gelu": gelu,
    "cross_entropy": loss,
    "linear_cross_entropy": linear_loss,
    "dropout": drop,
    "adamw_": adamw,
    "clip_grad_norm_": clip,
}

TENSOR = "must be a tensor"
FLOATS = "must be float32, bfloat16, float16 or float64"

# op: [(call, exception, what was wanted, what came)]
BAD: dict[str, list[tuple[Callable[[], Any], type[Exception], str, str]]] = {
    "attention": [
        (lambda: attention(is_causal=1), TypeError, "is_causal must be True or False", "1"),
        (lambda: attention(q=[1.0]), TypeError, f"q {TENSOR}", "list"),
        (lambda: attention(k=3), TypeError, f"k {TENSOR}", "int"),
        (lambda: attention(v="v"), TypeError, f"v {TENSOR}", "str"),
        (lambda: attention(q=f(3, 5, 8)), ValueError, "q must have 4 dimensions", r"\(3, 5, 8\)"),
        (lambda: attention(v=f(5, 8)), ValueError, "v must have 4 dimensions", r"\(5, 8\)"),
        (lambda: attention(q=f(2, 3, 5, 8).int()), ValueError, f"q {FLOATS}", "int32"),
        (lambda: attention(k=f(2, 3, 5, 8).bool()), ValueError, f"k {FLOATS}", "bool"),
        (lambda: attention(k=f(1, 3, 5, 8)), ValueError, r"k must have shape \(2, 3, 5, 8\)", r"\(1, 3, 5, 8\)"),
        (lambda: attention(k=f(2, 1, 5, 8)), ValueError, r"k must have shape \(2, 3, 5, 8\)", r"\(2, 1, 5, 8\)"),
        (lambda: attention(k=f(2, 3, 5, 7)), ValueError, r"k must have shape \(2, 3, 5, 8\)", r"\(2, 3, 5, 7\)"),
        (lambda: attention(v=f(2, 3, 6, 8)), ValueError, r"v must have shape \(2, 3, 5, 8\)", r"\(2, 3, 6, 8\)"),
        (lambda: attention(k=f(2, 3, 5, 8, dtype=BF16)), ValueError, "k must have q's dtype float32", "bfloat16"),
        (lambda: attention(v=f(2, 3, 5, 8, dtype=F64)), ValueError, "v must have k's dtype float32", "float64"),
        (lambda: attention(k=f(2, 3, 5, 8, device="meta")), ValueError, "k must be on q's device cpu", "meta"),
        (lambda: attention(v=f(2, 3, 5, 8, device="meta")), ValueError, "v must be on k's device cpu", "meta"),
        (lambda: attention(*[f(2, 3, 5, 0)] * 3), ValueError, "D must be at least 1", r"\(2, 3, 5, 0\)"),
    ],
    "attention_qkvpacked": [
        (lambda: packed((1, 2)), TypeError, f"qkv {TENSOR}", "tuple"),
        (lambda: packed(f(2, 5, 9, 8)), ValueError, "qkv must have 5 dimensions", r"\(2, 5, 9, 8\)"),
        (lambda: packed(f(2, 5, 3, 3, 8).long()), ValueError, f"qkv {FLOATS}", "int64"),
        (lambda: packed(f(2, 3, 5, 3, 8)), ValueError, r"qkv must have shape \(B, T, 3, H, D\)", r"\(2, 3, 5, 3, 8\)"),
        (lambda: packed(f(2, 5, 3, 3, 0)), ValueError, "D must be at least 1", r"\(2, 5, 3, 3, 0\)"),
    ],
    "softmax": [
        (lambda: softmax([1.0]), TypeError, f"x {TENSOR}", "list"),
        (lambda: softmax(f()), ValueError, "x must have at least one dimension", "scalar"),
        (lambda: softmax(i(1, 2)), ValueError, f"x {FLOATS}", "int64"),
        (lambda: softmax(f(8), is_causal=True), ValueError, r"x must be \(\.\.\., Tq, Tk\)", r"\(8,\)"),
        (lambda: softmax(scale="1"), TypeError, "scale must be a number", "str"),
        (lambda: softmax(scale=None), TypeError, "scale must be a number", "NoneType"),
        (lambda: softmax(scale=math.nan), ValueError, "scale must be finite", "nan"),
        (lambda: softmax(is_causal="no"), TypeError, "is_causal must be True or False", "'no'"),
    ],
    "layer_norm": [
        (lambda: layer_norm(2.0), TypeError, f"x {TENSOR}", "float"),
        (lambda: layer_norm(weight=[1.0]), TypeError, f"weight {TENSOR}", "list"),
        (lambda: layer_norm(bias=0), TypeError, f"bias {TENSOR}", "int"),
        (lambda: layer_norm(f()), ValueError, "x must have at least one dimension", "scalar"),
        (lambda: layer_norm(f(3, 0), f(0)), ValueError, "x must have a last dimension", r"\(3, 0\)"),
        (lambda: layer_norm(f(4, 8).int()), ValueError, f"x {FLOATS}", "int32"),
        (lambda: layer_norm(weight=f(8).int()), ValueError, f"weight {FLOATS}", "int32"),
        (lambda: layer_norm(weight=f(7)), ValueError, r"weight must have shape \(8,\)", r"\(7,\)"),
        (lambda: layer_norm(weight=f(1)), ValueError, r"weight must have shape \(8,\)", r"\(1,\)"),
        (lambda: layer_norm(weight=f(4, 8)), ValueError, "weight must have 1 dimensions", r"\(4, 8\)"),
        (lambda: layer_norm(bias=f(9)), ValueError, r"bias must have shape \(8,\)", r"\(9,\)"),
        (lambda: layer_norm(weight=f(8, device="meta")), ValueError, "weight must be on x's device cpu", "meta"),
        (lambda: layer_norm(bias=f(8, device="meta")), ValueError, "bias must be on weight's device cpu", "meta"),
        (lambda: layer_norm(weight=f(8, dtype=BF16)), ValueError, "weight must be float32", "bfloat16"),
        (lambda: layer_norm(weight=f(8, dtype=F64)), ValueError, "weight must be float32", "float64"),
        (lambda: layer_norm(f(4, 8, dtype=F64)), ValueError, "weight must be float64", "float32"),
        (
            lambda: layer_norm(f(4, 8, dtype=BF16), f(8, dtype=F16)),
            ValueError,
            "weight must be bfloat16 or float32",
            "float16",
        ),
        (lambda: layer_norm(bias=f(8, dtype=F16)), ValueError, "bias must have weight's dtype float32", "float16"),
        (lambda: layer_norm(eps="tiny"), TypeError, "eps must be a number", "str"),
        (lambda: layer_norm(eps=None), TypeError, "eps must be a number", "NoneType"),
        (lambda: layer_norm(eps=-1e-5), ValueError, "eps must not be negative", "-1e-05"),
        (lambda: layer_norm(eps=math.nan), ValueError, "eps must be finite", "nan"),
        (lambda: layer_norm(eps=math.inf), ValueError, "eps must be finite", "inf"),
    ],
    "add_layer_norm": [
        (lambda: add_norm("x"), TypeError, f"x {TENSOR}", "str"),
        (lambda: add_norm(residual=0.0), TypeError, f"residual {TENSOR}", "float"),
        (lambda: add_norm(weight=1), TypeError, f"weight {TENSOR}", "int"),
        (lambda: add_norm(residual=f(4, 8).int()), ValueError, f"residual {FLOATS}", "int32"),
        (lambda: add_norm(residual=f(3, 8)), ValueError, r"residual must have x's shape \(4, 8\)", r"\(3, 8\)"),
        (lambda: add_norm(residual=f(8)), ValueError, r"residual must have x's shape \(4, 8\)", r"\(8,\)"),
        (lambda: add_norm(residual=f(4, 8, device="meta")), ValueError, "residual must be on x's device cpu", "meta"),
        (lambda: add_norm(weight=f(7)), ValueError, r"weight must have shape \(8,\)", r"\(7,\)"),
        (lambda: add_norm(weight=f(8, dtype=F16)), ValueError, "weight must be float32", "float16"),
        (lambda: add_norm(bias=f(8, dtype=F64)), ValueError, "bias must have weight's dtype float32", "float64"),
        (lambda: add_norm(eps=-1.0), ValueError, "eps must not be negative", "-1.0"),
    ],
    "gelu": [
        (lambda: gelu(None or {}), TypeError, f"x {TENSOR}", "dict"),
        (lambda: gelu(f()), ValueError, "x must have at least one dimension", "scalar"),
        (lambda: gelu(i(1, 2)), ValueError, f"x {FLOATS}", "int64"),
        (lambda: gelu(bias=1.0), TypeError, f"bias {TENSOR}", "float"),
        (lambda: gelu(bias=f(4)), ValueError, r"bias must have shape \(8,\)", r"\(4,\)"),
        (lambda: gelu(bias=f(4, 8)), ValueError, "bias must have 1 dimensions", r"\(4, 8\)"),
        (lambda: gelu(bias=i(*range(8))), ValueError, f"bias {FLOATS}", "int64"),
        (lambda: gelu(bias=f(8, device="meta")), ValueError, "bias must be on x's device cpu", "meta"),
        (lambda: gelu(bias=f(8, dtype=BF16)), ValueError, "bias must be float32", "bfloat16"),
        (lambda: gelu(f(4, 8, dtype=F16), f(8, dtype=BF16)), ValueError, "bias must be float16 or float32", "bfloat16"),
        (lambda: gelu(approximate="sigmoid"), ValueError, "approximate must be 'none' or 'tanh'", "'sigmoid'"),
        (lambda: gelu(approximate=True), ValueError, "approximate must be 'none' or 'tanh'", "True"),
    ],
    "cross_entropy": [
        (lambda: loss([[1.0]]), TypeError, f"logits {TENSOR}", "list"),
        (lambda: loss(targets=[0, 1, 7]), TypeError, f"targets {TENSOR}", "list"),
        (lambda: loss(f(3, 8).long()), ValueError, f"logits {FLOATS}", "int64"),
        (lambda: loss(f(1, 3, 8)), ValueError, "logits must have 2 dimensions", r"\(1, 3, 8\)"),
        (lambda: loss(f(8)), ValueError, "logits must have 2 dimensions", r"\(8,\)"),
        (lambda: loss(targets=i(0, 1)), ValueError, r"targets must have shape \(3,\)", r"\(2,\)"),
        (lambda: loss(targets=i(0, 1, 7)[:, None]), ValueError, r"targets must have shape \(3,\)", r"\(3, 1\)"),
        (lambda: loss(targets=i(0, 1, 7, dtype=torch.int32)), ValueError, "targets must be int64", "int32"),
        (lambda: loss(targets=f(3)), ValueError, "targets must be int64", "float32"),
        (lambda: loss(targets=i(0, 1, 7, device="meta")), ValueError, "targets must be on logits's device cpu", "meta"),
        (lambda: loss(targets=i(0, 8, 7)), ValueError, r"targets must be in \[0, 8\) or ignore_index -100", "8"),
        (lambda: loss(targets=i(0, -1, 7)), ValueError, r"targets must be in \[0, 8\) or ignore_index -100", "-1"),
        (lambda: loss(targets=i(-100, -1, 9), ignore_index=-1), ValueError, "or ignore_index -1,", "-100 and 1 more"),
        (lambda: loss(ignore_index=0.0), TypeError, "ignore_index must be an int", "float"),
        (lambda: loss(ignore_index=None), TypeError, "ignore_index must be an int", "NoneType"),
    ],
    "linear_cross_entropy": [
        (lambda: linear_loss(1), TypeError, f"x {TENSOR}", "int"),
        (lambda: linear_loss(weight=[]), TypeError, f"weight {TENSOR}", "list"),
        (lambda: linear_loss(targets=0), TypeError, f"targets {TENSOR}", "int"),
        (lambda: linear_loss(f(1, 3, 6)), ValueError, "x must have 2 dimensions", r"\(1, 3, 6\)"),
        (lambda: linear_loss(weight=f(8)), ValueError, "weight must have 2 dimensions", r"\(8,\)"),
        (lambda: linear_loss(f(3, 6).int()), ValueError, f"x {FLOATS}", "int32"),
        (lambda: linear_loss(weight=f(6, 8)), ValueError, r"weight must have shape \(6, 6\)", r"\(6, 8\)"),
        (lambda: linear_loss(weight=f(8, 6, dtype=BF16)), ValueError, "weight must have x's dtype float32", "bfloat16"),
        (lambda: linear_loss(f(3, 6, dtype=F16)), ValueError, "weight must have x's dtype float16", "float32"),
        (lambda: linear_loss(weight=f(8, 6, device="meta")), ValueError, "weight must be on x's device cpu", "meta"),
        (lambda: linear_loss(targets=i(1, device="meta")), ValueError, r"targets must have shape \(3,\)", r"\(1,\)"),
        (lambda: linear_loss(targets=i(1, 2, 3, device="meta")), ValueError, "targets must be on x's device", "meta"),
        (lambda: linear_loss(targets=i(0, 1, 8)), ValueError, r"targets must be in \[0, 8\)", "8"),
        (lambda: linear_loss(targets=i(0, 1, -2)), ValueError, r"targets must be in \[0, 8\)", "-2"),
        (lambda: linear_loss(targets=i(0, 1, 2).short()), ValueError, "targets must be int64", "int16"),
        (lambda: linear_loss(ignore_index="none"), TypeError, "ignore_index must be an int", "str"),
    ],
    "dropout": [
        (lambda: drop([1.0]), TypeError, f"x {TENSOR}", "list"),
        (lambda: drop(i(1, 2)), ValueError, f"x {FLOATS}", "int64"),
        (lambda: drop(f(2).to(torch.complex64)), ValueError, f"x {FLOATS}", "complex64"),
    ],
    "adamw_": [
        (lambda: adamw(params=f(3)), TypeError, "params must be a list of tensors", "Tensor"),
        (lambda: adamw(params=(x for x in [f(3)])), TypeError, "params must be a list of tensors", "generator"),
        (lambda: adamw(params=[]), ValueError, "params must hold at least one tensor", "empty"),
        (lambda: adamw(grads=[f(3), None]), TypeError, r"grads\[1\] must be a tensor", "NoneType"),
        (lambda: adamw(grads=[f(3)]), ValueError, "grads must hold 2 tensors", "1"),
        (lambda: adamw(exp_avgs=[f(3), f(4)]), ValueError, r"exp_avgs\[1\] must have shape \(2, 2\)", r"\(4,\)"),
        (lambda: adamw(exp_avg_sqs=[f(3), f(2, 2).int()]), ValueError, rf"exp_avg_sqs\[1\] {FLOATS}", "int32"),
        (
            lambda: adamw(params=[f(3), f(2, 2, device="meta")]),
            ValueError,
            r"params\[1\] must be on device cpu",
            "meta",
        ),
        (
            lambda: adamw(grads=[f(3, device="meta"), f(2, 2, device="meta")]),
            ValueError,
            "grads must be on params' device cpu",
            "meta",
        ),
        (lambda: adamw(step=torch.zeros(())), ValueError, "step must be at least 1", "0"),
        (lambda: adamw(step=1), TypeError, "step must be an fp32 tensor of one element", "int"),
        (lambda: adamw(step=i(1)), ValueError, "step must be an fp32 tensor of one element", "int64"),
        (lambda: adamw(step=f(2)), ValueError, "step must be an fp32 tensor of one element", r"\(2,\)"),
        (lambda: adamw(lr=0.1), TypeError, "lr must be an fp32 tensor of one element", "float"),
        (lambda: adamw(lr=f(dtype=F64)), ValueError, "lr must be an fp32 tensor of one element", "float64"),
        (lambda: adamw(lr=f(device="meta")), ValueError, "lr must be an fp32 tensor of one element on cpu", "meta"),
        (lambda: adamw(betas=0.9), ValueError, r"betas must be a tuple of two numbers in \[0, 1\)", r"0\.9"),
        (lambda: adamw(betas=(0.9,)), ValueError, r"betas must be a tuple of two numbers in \[0, 1\)", r"\(0\.9,\)"),
        (
            lambda: adamw(betas=(0.9, 1.0)),
            ValueError,
            r"betas must be a tuple of two numbers in \[0, 1\)",
            r"\(0\.9, 1\.0\)",
        ),
        (
            lambda: adamw(betas=(-0.1, 0.9)),
            ValueError,
            r"betas must be a tuple of two numbers in \[0, 1\)",
            r"\(-0\.1, 0\.9\)",
        ),
        (lambda: adamw(betas=(0.9, math.nan)), ValueError, r"betas must be a tuple of two numbers in \[0, 1\)", "nan"),
        (
            lambda: adamw(betas=("a", 0.9)),
            (ValueError, TypeError),
            r"betas must be a tuple of two numbers in \[0, 1\)",
            "'a'",
        ),
        (lambda: adamw(eps="a"), TypeError, "eps must be a number", "str"),
        (lambda: adamw(eps=-1e-8), ValueError, "eps must not be negative", "-1e-08"),
        (lambda: adamw(weight_decay=-0.1), ValueError, "weight_decay must not be negative", r"-0\.1"),
        (lambda: adamw(weight_decay=math.inf), ValueError, "weight_decay must be finite", "inf"),
    ],
    "clip_grad_norm_": [
        (lambda: clip(f(3)), TypeError, "grads must be a list of tensors", "Tensor"),
        (lambda: clip([]), ValueError, "grads must hold at least one tensor", "empty"),
        (lambda: clip([f(3), 1.0]), TypeError, r"grads\[1\] must be a tensor", "float"),
        (lambda: clip([f(3), i(3)]), ValueError, rf"grads\[1\] {FLOATS}", "int64"),
        (lambda: clip([f(3), f(3, device="meta")]), ValueError, r"grads\[1\] must be on device cpu", "meta"),
        (lambda: clip(max_norm="1"), TypeError, "max_norm must be a number", "str"),
        (lambda: clip(max_norm=f()), TypeError, "max_norm must be a number", "Tensor"),
        (lambda: clip(max_norm=0), ValueError, "max_norm must be greater than 0", "0"),
        (lambda: clip(max_norm=-1.0), ValueError, "max_norm must be greater than 0", r"-1\.0"),
        (lambda: clip(max_norm=math.nan), ValueError, "max_norm must be greater than 0", "nan"),
    ],
}

for _op, _call in [("attention", attention), ("attention_qkvpacked", packed)]:
    BAD[_op] += [
        (lambda c=_call: c(scale="1"), TypeError, "scale must be a number", "str"),
        (lambda c=_call: c(scale=math.inf), ValueError, "scale must be finite", "inf"),
        (lambda c=_call: c(seqlens_k=[1, 2]), TypeError, "seqlens_k must be None or an int32 tensor", "list"),
        (lambda c=_call: c(seqlens_k=i(1, 2)), ValueError, r"seqlens_k must be int32 of shape \(2,\)", "int64"),
        (
            lambda c=_call: c(seqlens_k=i(1, 2, 3, dtype=torch.int32)),
            ValueError,
            r"seqlens_k must be int32 of shape \(2,\)",
            r"\(3,\)",
        ),
        (lambda c=_call: c(seqlens_k=i(1, 6, dtype=torch.int32)), ValueError, r"seqlens_k must be in \[0, 5\]", "6"),
        (lambda c=_call: c(seqlens_k=i(-1, 6, dtype=torch.int32)), ValueError, r"seqlens_k must be in \[0, 5\]", "-1"),
        (
            lambda c=_call: c(seqlens_k=i(1, 2, dtype=torch.int32, device="meta")),
            ValueError,
            "seqlens_k must be on the keys's device cpu",
            "meta",
        ),
    ]

for _op, _call, _p in [
    ("attention", attention, "dropout_p"),
    ("attention_qkvpacked", packed, "dropout_p"),
    ("add_layer_norm", add_norm, "dropout_p"),
    ("dropout", drop, "p"),
]:
    BAD[_op] += [
        (lambda c=_call, p=_p: c(**{p: -0.1}), ValueError, rf"{_p} must be in \[0, 1\)", r"-0\.1"),
        (lambda c=_call, p=_p: c(**{p: 1.0}), ValueError, rf"{_p} must be in \[0, 1\)", r"1\.0"),
        (lambda c=_call, p=_p: c(**{p: math.nan}), ValueError, rf"{_p} must be in \[0, 1\)", "nan"),
        (lambda c=_call, p=_p: c(**{p: "a"}), TypeError, f"{_p} must be a number", "str"),
        (lambda c=_call, p=_p: c(**{p: None}), TypeError, f"{_p} must be a number", "NoneType"),
        (lambda c=_call, p=_p: c(**{p: True}), TypeError, f"{_p} must be a number", "bool"),
        (lambda c=_call, p=_p: c(**{p: f()}), TypeError, f"{_p} must be a number", "Tensor"),
        (lambda c=_call, p=_p: c(**{p: 0.5}, seed=7), TypeError, "seed must be None or an int64 tensor", "int"),
        (lambda c=_call, p=_p: c(**{p: 0.5}, seed=f(1)), ValueError, "seed must be an int64 tensor", "float32"),
        (
            lambda c=_call, p=_p: c(**{p: 0.5}, seed=i(1, dtype=torch.int32)),
            ValueError,
            "seed must be an int64 tensor of one element",
            "int32",
        ),
        (
            lambda c=_call, p=_p: c(**{p: 0.5}, seed=i(1, 2)),
            ValueError,
            "seed must be an int64 tensor of one element",
            r"\(2,\)",
        ),
        (
            lambda c=_call, p=_p: c(**{p: 0.5}, seed=i(1, device="meta")),
            ValueError,
            "seed must be on the input's device cpu",
            "meta",
        ),
    ]

CASES = [
    pytest.param(op, *case, id=f"{op}-{number}-{re.sub('[^a-z0-9_]+', ' ', case[2].lower())[:32]} {case[3][:12]}")
    for op, cases in BAD.items()
    for number, case in enumerate(cases)
]


@pytest.mark.parametrize(("op", "call", "error", "wanted", "got"), CASES)
def test_a_bad_argument_is_refused_in_a_sentence(
    op: str, call: Callable[[], Any], error: type[Exception], wanted: str, got: str
) -> None:
    with pytest.raises(error, match=rf"^{op}: .*{wanted}.*got .*{got}"):
        call()


def test_every_op_has_bad_cases_and_the_good_ones_beside_them_pass() -> None:
    assert set(BAD) == set(ALL) == set(dispatch.OPS)
    for call in ALL.values():
        call()


@pytest.mark.parametrize("op", dispatch.OPS)
def test_an_unknown_backend_is_refused_by_every_op(op: str) -> None:
    wanted = rf"^{op}: unknown backend 'cublas'; the backends are reference, torch, triton, cpp, cuda"
    with pytest.raises(ValueError, match=wanted):
        ALL[op](backend="cublas")


@pytest.mark.parametrize("op", dispatch.OPS)
def test_a_backend_that_cannot_run_is_refused_by_every_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_table", {name: dict(entries) for name, entries in dispatch._table.items()})
    monkeypatch.setattr(dispatch, "_absent", dict(dispatch._absent))
    dispatch.mark_absent("cuda", "there is no GPU")
    with pytest.raises(ValueError, match=f"^{op}: backend 'cuda' cannot run here: there is no GPU$"):
        ALL[op](backend="cuda")


@pytest.mark.parametrize("call", [loss, linear_loss], ids=["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize(
    ("ignore_index", "targets"), [(-100, (0, -100, 7)), (-1, (-1, 0, 1)), (9, (9, 9, 0)), (3, (3, 0, 1))]
)
def test_ignore_index_is_no_target_out_of_range(
    call: Callable[..., Tensor], ignore_index: int, targets: tuple[int, ...]
) -> None:
    assert call(targets=i(*targets), ignore_index=ignore_index).isfinite()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_refused_call_changes_nothing(backend: str) -> None:
    params = [f(3), f(2, 2)]
    with pytest.raises(ValueError, match="weight_decay"):
        adamw(params=params, weight_decay=-1.0, backend=backend)
    with pytest.raises(ValueError, match="max_norm"):
        clip(params, max_norm=0.0, backend=backend)
    assert all((x == 0.5).all() for x in params)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="weight"):
        add_norm(weight=f(7), dropout_p=0.5, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
