"""benchmarks/cases.py: what is counted as bytes and FLOPs, which cases there are, and whose results are let through."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import dispatch, torch_native
from fastgpt.benchmarks import cases, errors
from fastgpt.benchmarks.cases import BACKWARD, BOTH, EAGER, FORWARD, STEP, Work, WrongResult
from fastgpt.benchmarks.small_calls import small_calls

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": {"fp32": 5e13, "bf16": 8e14}}


# What is counted


def test_bytes_and_flops_of_each_case() -> None:
    B, H, T, D = 2, 3, 64, 16
    size = B * H * T * D * 2
    attention = {
        FORWARD: Work(4 * size, 4 * B * H * T * T * D // 2),  # q, k, v and o; q k^T and p v, the causal half
        BACKWARD: Work(8 * size, 10 * B * H * T * T * D // 2),  # q, k, v, o, do, dq, dk, dv; five products
    }
    assert cases.attention_case(B, H, T, D, "bf16").work == attention
    assert cases.packed_attention_case(B, H, T, D, "bf16").work == attention
    assert cases.softmax_case(10, 7, "bf16").work == {FORWARD: Work(2 * 140), BACKWARD: Work(3 * 140)}
    assert cases.causal_softmax_case(1, 1, 3, "fp32").work == {
        FORWARD: Work((6 + 9) * 4),
        BACKWARD: Work((6 + 6 + 9) * 4),
    }
    assert cases.layer_norm_case(10, 7, "bf16").work == {
        FORWARD: Work((70 + 7 + 7 + 70) * 2),
        BACKWARD: Work((70 + 70 + 7 + 70 + 7 + 7) * 2),
    }
    assert cases.add_layer_norm_case(10, 7, "bf16").work == {
        FORWARD: Work((70 + 70 + 7 + 7 + 70 + 70) * 2),
        BACKWARD: Work((70 + 70 + 70 + 7 + 70 + 7 + 7) * 2),  # the gradients of x and residual are one
    }
    assert cases.add_layer_norm_case(10, 7, "bf16", dropout_p=0.2).work[BACKWARD] == Work((5 * 70 + 3 * 7) * 2)
    assert cases.add_layer_norm_case(10, 7, "bf16", stream="fp32").work == {
        FORWARD: Work((70 + 70) * 2 + (70 + 70 + 7 + 7) * 4),
        BACKWARD: Work((70 + 70) * 2 + (70 + 70 + 70 + 7 + 7 + 7) * 4),
    }
    assert cases.gelu_case(10, 7, "bf16", "tanh").work == {
        FORWARD: Work((70 + 7 + 70) * 2),
        BACKWARD: Work((70 + 70 + 7 + 70 + 7) * 2),
    }
    assert cases.gelu_case(10, 7, "fp32", "none", bias=False).work == {FORWARD: Work(140 * 4), BACKWARD: Work(210 * 4)}
    assert cases.cross_entropy_case(10, 7, "bf16").work == {BOTH: Work(70 * 2 + 10 * 8 + 70 * 2)}
    assert cases.linear_cross_entropy_case(10, 5, 7, "bf16").work == {
        BOTH: Work((50 + 35 + 50 + 35) * 2 + 10 * 8, 3 * 2 * 10 * 5 * 7)
    }
    assert cases.dropout_case(10, 7, "bf16").work == {FORWARD: Work(280), BACKWARD: Work(280)}
    assert cases.adamw_case([(3, 5), (2,)]).work == {STEP: Work(17 * (4 + 3) * 4)}
    assert cases.clip_grad_norm_case([(3, 5), (2,)]).work == {STEP: Work(17 * 3 * 4)}


def test_the_floor_is_the_time_of_the_slower_ceiling() -> None:
    assert Work(8 * 10**9).floor_ms(CEILINGS, "bf16") == pytest.approx(2.0)
    assert Work(8 * 10**9, 4 * 10**12).floor_ms(CEILINGS, "bf16") == pytest.approx(5.0)
    assert Work(8 * 10**9, 4 * 10**12).floor_ms(CEILINGS, "fp32") == pytest.approx(80.0)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("size", cases.SIZES)
def test_every_op_has_cases_in_every_dtype(size: str, device_type: str) -> None:
    dtypes = ["bf16", "fp32", "fp16"]
    found = cases.cases(size, device_type, dtypes)
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    for dtype in dtypes:
        ops = {case.op for case in found if case.dtype == dtype} | {"adamw_", "clip_grad_norm_"}
        assert ops == set(dispatch.OPS)
    for case in found:
        assert case.name == f"{case.label}, {' '.join(f'{k}={n}' for k, n in case.shape.items())}, {case.dtype}"
        parts = {cases.FORWARD, cases.BACKWARD}
        apart = case.op not in ("cross_entropy", "linear_cross_entropy", "adamw_", "clip_grad_norm_")
        assert (case.work.keys() == parts) == (apart and "in a row" not in case.label)


def test_the_cases_on_a_gpu_are_those_of_gpt2() -> None:
    found = cases.cases("full", "cuda", ["bf16"])
    for T, D in itertools.product((256, 1024, 4096), (64, 128)):
        (case,) = [case for case in found if case.label == "attention" and (case.shape["T"], case.shape["D"]) == (T, D)]
        assert case.work[FORWARD].bytes == 4 * 16384 * 768 * 2, "16k tokens of 768 numbers"
    for label, widths in (("softmax", {1024, 4096}), ("layer_norm", {768, 1600}), ("add_layer_norm", {768, 1600})):
        assert {case.shape["N"] for case in found if case.label == label} == widths
    adamw = next(case for case in found if case.op == "adamw_")
    assert adamw.work[STEP].bytes == 28 * (124_439_808 + 47 * 768), "GPT-2, its vocabulary padded to 50304"


def test_who_is_not_here_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = cases.absent_peers(CPU)
    assert set(on_cpu) == {"SDPA cuDNN", "SDPA memory-efficient", cases.FLEX, cases.FLASH_ATTN, cases.LIGER}
    gpu = torch.device("cuda")
    monkeypatch.setattr(cases, "version_of", lambda package: None)
    assert cases.absent_peers(gpu) == {
        cases.FLASH_ATTN: "the package flash-attn is not installed",
        cases.LIGER: "the package liger-kernel is not installed",
    }
    monkeypatch.setattr(cases, "version_of", lambda package: "1.0")
    assert cases.absent_peers(gpu) == {}


# What is held to the truth


def test_errors() -> None:
    true = torch.tensor([3.0, 4.0])
    assert errors.relative_error(torch.tensor([3.0, 4.5]), true) == pytest.approx(0.1)
    assert errors.absolute_error(torch.tensor([3.0, 4.5]), true) == pytest.approx(0.5)
    assert errors.relative_error(true, true) == 0
    assert errors.relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2
    nan = torch.tensor([3.0, math.nan])
    for error in (errors.relative_error, errors.absolute_error):
        assert error(torch.zeros(3), true) == math.inf
        assert error(nan, true) == math.inf
    assert errors.largest_error([true, true * 2, true], [true] * 3) == pytest.approx(1)
    for results in ([nan, true], [true, nan]):
        assert errors.largest_error(results, [true, true]) == math.inf


def test_errors_of_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_CHUNK", 3)
    true = torch.arange(1.0, 9.0)
    got = true.clone()
    got[6] += 0.5
    assert errors.absolute_error(got, true) == 0.5
    assert errors.relative_error(got, true) == pytest.approx(0.5 / math.sqrt(204))
    assert errors.largest(got) == 8


TINY = {
    case.label: case
    for case in (
        cases.attention_case(2, 1, 9, 16, "fp32"),
        cases.attention_case(2, 1, 9, 16, "fp32", dropout_p=0.2),
        cases.packed_attention_case(2, 1, 9, 16, "fp32"),
        cases.softmax_case(7, 33, "fp32"),
        cases.causal_softmax_case(1, 2, 9, "fp32"),
        cases.layer_norm_case(7, 33, "fp32"),
        cases.add_layer_norm_case(7, 33, "fp32"),
        cases.add_layer_norm_case(7, 33, "fp32", dropout_p=0.2),
        cases.gelu_case(7, 33, "fp32", "tanh"),
        cases.gelu_case(7, 33, "fp32", "none", bias=False),
        cases.cross_entropy_case(7, 33, "fp32"),
        cases.linear_cross_entropy_case(7, 16, 33, "fp32"),
        cases.dropout_case(40, 33, "fp32"),
        cases.adamw_case([(3, 5), (7,)]),
        cases.clip_grad_norm_case([(3, 5), (7,)]),
    )
}


@pytest.mark.parametrize("label", TINY)
def test_who_is_right_can_be_timed(label: str) -> None:
    case = TINY[label]
    problem = case.build(CPU)
    assert {*dispatch.BACKENDS, EAGER, cases.COMPILED} <= set(problem.names())
    for name in ("reference", "torch", EAGER):
        assert problem.check(name) < 1e-5
        for part in case.work:
            contestant = problem.contestant(name, part)
            contestant.call(contestant.prepare())


@pytest.mark.full
@pytest.mark.parametrize("label", TINY)
def test_kernels_and_compiled_peers_are_right_and_can_be_timed(label: str) -> None:
    case = TINY[label]
    problem = case.build(CPU)
    absent = {*cases.absent_peers(CPU), *dispatch._absent}
    for name in set(problem.names()) - absent - {"SDPA flash" if "p=" in label else ""}:
        assert problem.check(name) < 1e-5
        for part in case.work:
            contestant = problem.contestant(name, part)
            contestant.call(contestant.prepare())


@pytest.mark.parametrize("backend", ["cpp", EAGER])
@pytest.mark.parametrize("what", ["output", "gradient"])
@pytest.mark.parametrize("label", [label for label, case in TINY.items() if STEP not in case.work])
def test_a_wrong_result_is_refused(label: str, what: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of cpp's, and of PyTorch's own, come results that are off by one part in a hundred."""

    def spoiled(y: Tensor) -> Tensor:
        return y * 1.01 if what == "output" else y + 0.01 * (y - y.detach())

    def off(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, backend: str, **options: Any) -> Any:
            if backend != "cpp":
                return op(*args, **options, backend=backend)
            return spoil(op(*args, **options, backend="torch"))

        return call

    def spoil(outputs: Any) -> Any:
        return tuple(map(spoiled, outputs)) if isinstance(outputs, tuple) else spoiled(outputs)

    op = TINY[label].op
    monkeypatch.setattr(cases.ops, op, off(getattr(cases.ops, op)))
    problem = TINY[label].build(CPU)
    assert isinstance(problem, cases.Differentiable)
    eager = problem.peers[EAGER]
    if backend == EAGER:
        problem.peers[EAGER] = lambda *args: spoil(eager(*args))
        if problem.undropped is not None:  # peers that drop are held to the truth without
            without = problem.undropped()
            plain = without.peers[EAGER]
            without.peers[EAGER] = lambda *args: spoil(plain(*args))
            problem._known["undropped"] = without
    with pytest.raises(WrongResult, match=r"its relative error is 0\.0(1|09)"):
        problem.check(backend)
    assert problem.check("reference") < 1e-5


@pytest.mark.parametrize("label", ["adamw_", "clip_grad_norm_"])
@pytest.mark.parametrize("backend", ["cpp", EAGER])
def test_a_wrong_change_is_refused(label: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = TINY[label].build(CPU)
    assert isinstance(problem, cases.InPlace)
    right = problem.changes["torch"]

    def wrong() -> cases.Change:
        change = right()

        def call() -> None:
            change.call()
            change.tensors[0].mul_(1.01)

        return cases.Change(call, change.tensors)

    problem.changes["cpp"] = wrong
    problem._known[EAGER] = wrong()
    with pytest.raises(WrongResult, match=r"its relative error is 0.01|its relative error is 0.00[5-9]"):
        problem.check(backend)
    assert problem.check("torch") < 1e-5


def test_dropping_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = torch_native.drop
    problem = cases.dropout_case(40, 33, "fp32").build(CPU)
    assert problem.check("torch") < 1e-6
    monkeypatch.setattr(torch_native, "drop", lambda x, keep, p: drop(x, keep & (torch.rand_like(x) < 0.9), p))
    with pytest.raises(WrongResult, match="output 0 is off by"):
        problem.check("torch")


def test_an_eager_op_that_is_not_finite_lets_nobody_through() -> None:
    one = torch.ones(2)
    with pytest.raises(WrongResult, match="cannot be judged: output 0 of torch eager is not finite"):
        cases.held_to_the_rule([one], [one], [math.inf], ["output 0"], [0.0])
    assert cases.held_to_the_rule([one], [one], [0.0], ["output 0"], [0.0]) == 0


def test_what_writes_into_its_inputs_gets_copies() -> None:
    case = cases.softmax_case(4, 8, "fp32")
    problem = case.build(CPU)
    assert isinstance(problem, cases.Differentiable)

    class Spoiling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = torch.softmax(x, -1)
            ctx.save_for_backward(y)
            x.detach().zero_()
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return y * (dy - (dy * y).sum(-1, keepdim=True))

    spoiling = cases.dataclasses.replace(
        problem, peers={**problem.peers, "spoiling": Spoiling.apply}, spoiling=frozenset({"spoiling"})
    )
    before = problem.leaves["x"].detach().clone()
    for part in (FORWARD, BACKWARD, BOTH):
        assert spoiling.check("spoiling") < 1e-5
        contestant = spoiling.contestant("spoiling", part)
        contestant.call(contestant.prepare())
        assert torch.equal(problem.leaves["x"], before)


def test_clipping_finds_its_gradients_unclipped() -> None:
    problem = cases.clip_grad_norm_case([(64,)]).build(CPU)
    for name in ("torch", EAGER):
        problem.check(name)
        contestant = problem.contestant(name, STEP)
        for _ in range(2):
            state = contestant.prepare()
            norm = contestant.call(state)
            assert norm > 4, "the norm before"


def test_flash_attn_and_liger_are_called_as_they_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of the two packages, which have no kernels for a CPU."""
    import sys
    import types

    from torch.nn import functional as F

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal).transpose(1, 2)

    flash = types.ModuleType("flash_attn")
    flash.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    flash.flash_attn_qkvpacked_func = lambda qkv, causal: flash_attn_func(*qkv.unbind(2), causal=causal)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    for label in ("attention", "attention_qkvpacked"):
        assert TINY[label].build(CPU).check(cases.FLASH_ATTN) < 1e-5
    liger = types.SimpleNamespace(
        liger_softmax=lambda x: torch.softmax(x, -1),
        liger_layer_norm=lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
        liger_cross_entropy=lambda input, target: F.cross_entropy(input, target),
        liger_fused_linear_cross_entropy=lambda input, weight, target: F.cross_entropy(input @ weight.T, target),
    )
    monkeypatch.setattr(cases, "_liger", lambda: liger)
    for label in ("softmax", "layer_norm", "cross_entropy", "linear_cross_entropy"):
        assert TINY[label].build(CPU).check(cases.LIGER) < 1e-5


# The small calls


def test_small_calls_cover_every_op_and_repeat_themselves() -> None:
    calls = small_calls(CPU, torch.float32)
    assert {name.partition(",")[0] for name in calls} == set(dispatch.OPS)
    for name in ("softmax", "adamw_", "dropout", "cross_entropy"):
        for first, second in zip(calls[name](), calls[name](), strict=True):
            assert torch.isfinite(first).all()
            assert torch.equal(first, second), name


@pytest.mark.full
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_every_small_call_runs(backend: str) -> None:
    for name, call in small_calls(CPU, torch.float32, backend=backend).items():
        assert all(torch.isfinite(x).all() for x in call()), name
