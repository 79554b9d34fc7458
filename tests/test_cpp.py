"""What only the cpp backend has: its threads, and the memory that it reads and writes.

Its results are held to the error rule in each op's own file, with those of all backends; the vector functions that its
kernels share are in test_cpp_math.py, its build in test_build.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_rule import sample
from torch import Tensor

from fastgpt import GPT, GPTConfig, dispatch, extension, ops, reference, use_backend
from fastgpt.optim import AdamW, gradients

pytestmark = pytest.mark.skipif(extension.cpp_missing() is not None, reason=str(extension.cpp_missing()))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def with_gradients(fn: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def changed(fn: Callable[..., Any], *lists: list[Tensor]) -> list[Tensor]:
    own = [[x.clone() for x in tensors] for tensors in lists]
    result = fn(*own)
    return [x for tensors in own for x in tensors] + ([] if result is None else [result])


def large_calls(
    dtype: torch.dtype, place: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, Callable[[], list[Tensor]]]:
    """Every op on shapes that give three threads uneven work; ``place`` lays the inputs out in memory."""

    def x(*shape: int) -> Tensor:
        return place(sample(*shape, dtype=dtype))

    targets = torch.randint(1000, (301,))
    targets[::7] = -100
    one = torch.tensor(1.0)
    lists = [[x(700, 90), x(33), x(129, 257)] for _ in range(4)]
    lists[3] = [t.abs() for t in lists[3]]
    drop = {"dropout_p": 0.2, "seed": torch.tensor([7])}
    heads, few = [x(2, 5, 131, 24) for _ in range(3)], [x(1, 1, 700, 24) for _ in range(3)]
    one_query = [x(2, 5, 1, 24), x(2, 5, 701, 24), x(2, 5, 701, 24)]
    rows, row, logits = [x(401, 130), x(401, 130)], [x(130), x(130)], x(301, 1000)
    packed, scores, flat = x(2, 131, 3, 2, 16), x(5, 131, 131), x(50001)
    hidden, table = x(301, 16), x(1000, 16)
    calls: dict[str, Callable[[], list[Tensor]]] = {
        "attention": lambda: [
            *(y for qkv in (heads, few) for y in with_gradients(lambda *t: ops.attention(*t, **drop), *qkv)),
            *with_gradients(ops.attention, *one_query),
        ],
        "attention_qkvpacked": lambda: with_gradients(lambda t: ops.attention_qkvpacked(t, **drop), packed),
        "softmax": lambda: with_gradients(lambda t: ops.softmax(t, scale=0.3, is_causal=True), scores),
        "layer_norm": lambda: with_gradients(ops.layer_norm, rows[0], *row),
        "add_layer_norm": lambda: with_gradients(lambda *t: ops.add_layer_norm(*t, **drop), *rows, *row),
        "gelu": lambda: with_gradients(ops.gelu, rows[0], row[0]),
        "cross_entropy": lambda: with_gradients(lambda t: ops.cross_entropy(t, targets), logits),
        "linear_cross_entropy": lambda: with_gradients(lambda *t: ops.linear_cross_entropy(*t, targets), hidden, table),
        "dropout": lambda: with_gradients(lambda t: ops.dropout(t, 0.3, seed=drop["seed"]), flat),
        "adamw_": lambda: changed(
            lambda *t: ops.adamw_(*t, one, lr=one, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1), *lists
        ),
        "clip_grad_norm_": lambda: changed(lambda t: ops.clip_grad_norm_(t, 1.0), lists[0]),
    }
    return calls


# Threads


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("op", dispatch.OPS)
def test_one_two_and_three_threads_give_the_same_bits(
    op: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    run = large_calls(dtype)[op]
    results = []
    with use_backend("cpp"):
        for count in (1, 2, 3):
            threads(count)
            results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Memory


def at_an_odd_address(x: Tensor) -> Tensor:
    """A copy of ``x`` that starts one element behind an aligned address."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("op", dispatch.OPS)
def test_addresses_need_no_alignment(op: str, dtype: torch.dtype) -> None:
    results = []
    for place in (torch.clone, at_an_odd_address):
        torch.manual_seed(1)
        run = large_calls(dtype, place)[op]
        with use_backend("cpp"):
            results.append(run())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_that_are_one_row_in_memory(dtype: torch.dtype) -> None:
    """Expanded inputs overlap themselves: fine to read, and their gradients are tensors of their own."""
    row, weight = sample(1, 70, dtype=dtype), sample(70, dtype=dtype)
    for op in (
        lambda x: ops.layer_norm(x, weight, backend="cpp"),
        lambda x: ops.softmax(x, backend="cpp"),
        lambda x: ops.gelu(x, weight, backend="cpp"),
        lambda x: ops.add_layer_norm(x, x, weight, backend="cpp"),
        lambda x: ops.cross_entropy(x, torch.arange(9), backend="cpp"),
        lambda x: ops.dropout(x, 0.2, seed=torch.tensor([1]), backend="cpp"),
    ):
        expanded, copied = with_gradients(op, row.expand(9, 70)), with_gradients(op, row.repeat(9, 1))
        assert all(torch.equal(a, b) for a, b in zip(expanded, copied, strict=True))
    heads = sample(1, 1, 9, 16, dtype=dtype)
    q, copy = heads.expand(2, 3, 9, 16), heads.repeat(2, 3, 1, 1)
    expanded, copied = (with_gradients(lambda *t: ops.attention(*t, backend="cpp"), x, x, x) for x in (q, copy))
    assert all(torch.equal(a, b) for a, b in zip(expanded, copied, strict=True))


@pytest.mark.full
def test_more_than_two_to_the_31_elements() -> None:
    rows, width = 2**21 + 5, 1024
    x = torch.zeros(rows, width, dtype=BF16)
    x[-2:] = sample(2, width, dtype=BF16)
    small, weight = x[-2:].clone(), sample(width, dtype=BF16)
    targets = torch.arange(rows) % width
    with torch.no_grad(), use_backend("cpp"):
        for op in (ops.softmax, ops.gelu, lambda t: ops.layer_norm(t, weight)):
            large = op(x)
            assert torch.equal(large[-2:], op(small))
            del large
        mask = ops.dropout(torch.ones_like(x), 0.5, seed=torch.tensor([3]))[-1]
        first = (rows - 1) * width
        assert torch.equal(mask > 0, reference_mask(first, width, torch.tensor([3])))
        loss = ops.cross_entropy(x, torch.where(torch.arange(rows) < rows - 2, -100, targets))
        torch.testing.assert_close(loss, ops.cross_entropy(small, targets[-2:]))


def reference_mask(first: int, count: int, seed: Tensor) -> Tensor:
    """The mask of elements ``first`` and on, ``first`` being a multiple of 4, of a dropout by 0.5."""
    n = torch.arange(first // 4, (first + count) // 4)
    words = reference.philox_4x32((n & 0xFFFFFFFF, n >> 32, 0, 0), seed)
    return torch.stack([word >= 2**31 for word in words], -1).flatten()


# Numbers at the edges


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e15])
def test_gradients_of_attention_with_huge_scores(scale: float) -> None:
    """Each query then sees one key: its value's gradient is the upstream one, whatever the score's last digit."""
    q, k, v = (torch.randn(3, 1, 40, 16) for _ in range(3))

    def dv(backend: str) -> Tensor:
        return with_gradients(lambda *t: ops.attention(*t, scale=scale, backend=backend), q, k, v)[3]

    torch.testing.assert_close(dv("cpp"), dv("reference"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("is_causal", [True, False])
def test_keys_beyond_seqlens_k_may_be_nan(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = (sample(2, 2, n, 24, dtype=dtype) for n in (3, 8, 8))
    lengths = torch.tensor([5, 0], dtype=torch.int32)

    def run() -> list[Tensor]:
        return with_gradients(
            lambda *t: ops.attention(*t, is_causal=is_causal, seqlens_k=lengths, backend="cpp"), q, k, v
        )

    clean = run()
    for x in (k, v):
        x[0, :, 5:] = torch.nan
        x[1] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(clean, run(), strict=True))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("width", [1, 64])
def test_rows_without_variance_leave_nothing_of_rounding(dtype: torch.dtype, width: int) -> None:
    """The sum is normalised before it is rounded to the stream; what rounding did to a constant row is no gradient."""
    x, residual = torch.full((4, width), 10.0, dtype=dtype), torch.full((4, width), 0.123, dtype=dtype)
    weight = sample(width, dtype=dtype)

    def dx(backend: str) -> Tensor:
        return with_gradients(lambda *t: ops.add_layer_norm(*t, backend=backend)[0], x, residual, weight)[1]

    want = dx("reference")
    torch.testing.assert_close(dx("cpp"), want, rtol=0.02, atol=float(want.abs().max()) * 0.02 + 1e-3)


def test_a_thread_with_a_small_stack() -> None:
    code = (
        "import threading, torch; from fastgpt import ops\n"
        "x, out = torch.randn(3, 1000).bfloat16(), []\n"
        "threading.stack_size(128 * 1024)\n"
        "def work():\n"
        "    out.append(ops.softmax(x, backend='cpp'))\n"
        "    out.append(ops.cross_entropy(x, torch.zeros(3, dtype=torch.long), backend='cpp'))\n"
        "    out.append(ops.attention(*[x.view(1, 3, 10, 100)] * 3, dropout_p=0.1, backend='cpp'))\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join(); print(len(out))"
    )
    assert run_python(code) == "3"


# Dispatch


@pytest.mark.parametrize(
    ("op", "small", "large"),
    [
        ("layer_norm", ((8, 64), (64,)), ((1024, 64), (64,))),
        ("softmax", ((8, 64), 1.0, False), ((2048, 64), 1.0, False)),
        ("softmax", (), ((8, 64), 1.0, True)),
        ("add_layer_norm", ((8, 64), (8, 64), (64,), None, 0.0), ((512, 64), (512, 64), (64,), None, 0.0)),
        ("add_layer_norm", (), ((8, 64), (8, 64), (64,), None, 0.1)),
        ("cross_entropy", ((8, 64),), ((256, 64),)),
        ("linear_cross_entropy", ((4096, 8), (65, 8)), ((512, 8), (1024, 8))),
        ("linear_cross_entropy", ((16, 8), (5000, 8)), ()),
        ("attention", ((1, 2, 2, 8), (1, 2, 300, 8), (1, 2, 300, 8), True, 0.0), ((1, 2, 9, 8),) * 3 + (True, 0.0)),
        ("attention", (), ((1, 2, 1, 8), (1, 2, 300, 8), (1, 2, 300, 8), True, 0.0)),
        ("attention", (), ((1, 2, 7, 8),) * 3 + (True, 0.0)),
        ("gelu", (), ((8, 64),)),
    ],
)
@pytest.mark.skipif(dispatch.PREFERRED["cpu"][0] != "cpp", reason="auto prefers torch to the baseline")
def test_auto_leaves_to_torch_what_torch_runs_faster(op: str, small: tuple[Any, ...], large: tuple[Any, ...]) -> None:
    def chosen(args: tuple[Any, ...]) -> dispatch.Entry:
        return dispatch.resolve(op, "auto", *(torch.empty(arg) if isinstance(arg, tuple) else arg for arg in args))

    if small:
        assert chosen(small) is dispatch._table[op]["torch"]
    if large:
        assert chosen(large) is dispatch._table[op]["cpp"]


def test_auto_leaves_what_torch_func_transforms_to_torch() -> None:
    x, weight = sample(2048, 64), sample(64)
    got = torch.func.grad(lambda t: ops.layer_norm(t, weight).square().sum())(x)
    want = torch.func.grad(lambda t: ops.layer_norm(t, weight, backend="torch").square().sum())(x)
    torch.testing.assert_close(got, want)


def test_explain_says_what_auto_leaves_to_torch() -> None:
    notes = {row["op"]: row["note"] for row in dispatch.explain() if row["backend"] == "cpp"}
    for op, (_, what) in dispatch._LEFT_TO_TORCH.items():
        assert notes.get(op, what).endswith(what)
    assert all(extension.isa() in note for note in notes.values())


# Instruction sets


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def instruction_sets() -> list[str]:
    """Those that this processor and this build have, each of which FASTGPT_CPU_ISA chooses."""
    code = "from fastgpt import extension; print(extension.cpp_missing() is None and extension.isa())"
    names = ("baseline", "avx2", "avx512", "avx512_bf16")
    chosen = {name: run_python(code, FASTGPT_CPU_ISA=name) for name in names}
    assert all(said in (name, "False") for name, said in chosen.items())
    return [name for name in names if chosen[name] == name]


def test_the_best_instruction_set_runs(instruction_sets: list[str]) -> None:
    assert "baseline" in instruction_sets
    assert extension.isa() == os.environ.get("FASTGPT_CPU_ISA", instruction_sets[-1])


def test_an_unknown_instruction_set_is_an_error_of_the_first_op() -> None:
    code = (
        "import torch; from fastgpt import ops\ntry: ops.gelu(torch.ones(2))\nexcept ValueError as error: print(error)"
    )
    said = run_python(code, FASTGPT_CPU_ISA="avx1024", FASTGPT_BACKEND="")
    assert said.startswith("FASTGPT_CPU_ISA names no instruction set")
    assert said.endswith("got 'avx1024'")


@pytest.mark.full
def test_every_instruction_set_obeys_the_error_rule(instruction_sets: list[str]) -> None:
    """All of this backend's cases, in a process for each set but the one that the tests themselves run on."""
    for name in instruction_sets:
        if name != extension.isa():
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-k", "cpp", os.path.dirname(__file__)],
                env={**os.environ, "FASTGPT_CPU_ISA": name},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{name}:\n{done.stdout[-3000:]}"


# The whole model


def train(backend: str, dtype: torch.dtype, steps: int) -> list[float]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=67, n_layer=2, n_head=2, n_embd=64, dropout=0.1))
    optimizer = AdamW(model.parameters(), lr=3e-3)
    data = torch.randint(67, (4, 33)) // 3
    losses = []
    with use_backend(backend):
        for _ in range(steps):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != F32):
                loss = model(data[:, :-1], data[:, 1:])[1]
            loss.backward()
            ops.clip_grad_norm_(gradients(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-4), (BF16, 0.05)])
def test_twenty_steps_of_training_are_the_references(dtype: torch.dtype, tolerance: float) -> None:
    mine = train("cpp", dtype, 20)
    assert mine == pytest.approx(train("reference", F32, 20), abs=tolerance)
    assert mine[-1] < mine[0] - 0.5
