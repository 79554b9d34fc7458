"""Which backend runs, who decides, and what is said when none can."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_rule import BACKENDS, sample
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig, dispatch, ops, reference
from fastgpt.dispatch import Entry, Kernels, explain, use_backend
from fastgpt.optim import AdamW, gradients

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture
def ran(own_table: dict[str, dict[str, Entry]]) -> list[tuple[str, str]]:
    """(op, backend) of every call that reached a backend, in order."""
    calls: list[tuple[str, str]] = []
    for op, entries in own_table.items():
        for backend, entry in entries.items():
            entries[backend] = dataclasses.replace(entry, fn=noted(calls, op, backend, entry.fn))
    return calls


def noted(calls: list[tuple[str, str]], op: str, backend: str, fn: Callable[..., Any] | Kernels) -> Any:
    if isinstance(fn, Kernels):
        return dataclasses.replace(fn, fwd=noted(calls, op, backend, fn.fwd))

    def call(*args: Any) -> Any:
        calls.append((op, backend))
        return fn(*args)

    return call


def gelu_ran(ran: list[tuple[str, str]], backend: str | None = None, dtype: torch.dtype = F32) -> str:
    """The backend that a call of gelu reaches."""
    ops.gelu(torch.ones(2, dtype=dtype), backend=backend)
    op, name = ran.pop()
    assert op == "gelu"
    assert not ran
    return name


def softmax_ran(ran: list[tuple[str, str]]) -> str:
    ops.softmax(torch.ones(2))
    return ran.pop()[1]


# Who decides


def test_the_call_wins_over_use_backend(ran: list[tuple[str, str]]) -> None:
    with use_backend("reference"):
        assert gelu_ran(ran, "torch") == "torch"
    with use_backend("torch"):
        assert gelu_ran(ran, "reference") == "reference"


def test_use_backend_chooses_for_all_ops_or_for_some(ran: list[tuple[str, str]]) -> None:
    with use_backend("reference"):
        assert (gelu_ran(ran), softmax_ran(ran)) == ("reference", "reference")
    with use_backend(gelu="reference", softmax="torch"):
        assert (gelu_ran(ran), softmax_ran(ran)) == ("reference", "torch")
    with use_backend("torch", softmax="reference"):
        assert (gelu_ran(ran), softmax_ran(ran)) == ("torch", "reference")
    with use_backend("torch,softmax=reference"):
        assert (gelu_ran(ran), softmax_ran(ran)) == ("torch", "reference")


def test_the_innermost_use_backend_wins_and_leaves_the_others_ops_alone(ran: list[tuple[str, str]]) -> None:
    with use_backend("reference"):
        with use_backend(softmax="torch"):
            assert (gelu_ran(ran), softmax_ran(ran)) == ("reference", "torch")
            with use_backend("torch"):
                assert (gelu_ran(ran), softmax_ran(ran)) == ("torch", "torch")
            assert (gelu_ran(ran), softmax_ran(ran)) == ("reference", "torch")
        assert (gelu_ran(ran), softmax_ran(ran)) == ("reference", "reference")


def test_auto_hands_an_op_back_to_the_table(ran: list[tuple[str, str]]) -> None:
    preferred = gelu_ran(ran)
    other = "reference" if preferred != "reference" else "torch"
    with use_backend(other):
        with use_backend(gelu="auto"):
            assert (gelu_ran(ran), softmax_ran(ran)) == (preferred, other)
        assert gelu_ran(ran, "auto") == preferred
        assert gelu_ran(ran) == other


def test_the_choice_ends_with_the_block_even_after_an_exception(ran: list[tuple[str, str]]) -> None:
    before = gelu_ran(ran)
    other = "reference" if before != "reference" else "torch"

    def fail_inside() -> None:
        with use_backend(other):
            assert gelu_ran(ran) == other
            raise RuntimeError("from inside")

    with pytest.raises(RuntimeError, match="from inside"):
        fail_inside()
    assert gelu_ran(ran) == before


def test_one_use_backend_may_be_entered_again(ran: list[tuple[str, str]]) -> None:
    before = gelu_ran(ran)
    choice = use_backend("reference" if before != "reference" else "torch")
    for _ in range(2):
        with choice:
            assert gelu_ran(ran) != before
        assert gelu_ran(ran) == before


def test_one_use_backend_entered_inside_itself_still_ends(ran: list[tuple[str, str]]) -> None:
    before = gelu_ran(ran)
    choice = use_backend("reference" if before != "reference" else "torch")
    try:
        with choice, choice:
            assert gelu_ran(ran) != before
        assert gelu_ran(ran) == before
    finally:
        dispatch._state.choice = {}


def test_threads_do_not_see_each_others_choice(ran: list[tuple[str, str]]) -> None:
    both_inside = threading.Barrier(2, timeout=20)
    seen: dict[str, list[str]] = {"reference": [], "torch": []}
    lock = threading.Lock()

    def one(backend: str) -> None:
        with use_backend(backend):
            for _ in range(5):
                both_inside.wait()
                with lock:
                    seen[backend].append(gelu_ran(ran))

    with use_backend("reference"):
        threads = [threading.Thread(target=one, args=(backend,)) for backend in seen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert gelu_ran(ran) == "reference"
    assert seen == {"reference": ["reference"] * 5, "torch": ["torch"] * 5}


def test_a_new_thread_starts_without_a_choice(ran: list[tuple[str, str]]) -> None:
    preferred = gelu_ran(ran)
    seen = []
    with use_backend("reference" if preferred != "reference" else "torch"):
        thread = threading.Thread(target=lambda: seen.append(gelu_ran(ran)))
        thread.start()
        thread.join(20)
    assert seen == [preferred]


ENVIRONMENT_SCRIPT = """
import json, torch, fastgpt
from fastgpt import ops
calls = []
def noted(name, fn):
    return lambda *args: (calls.append(name), fn(*args))[1]
table = fastgpt.dispatch._table
for op in table:
    for name, entry in list(table[op].items()):
        object.__setattr__(entry, "fn", noted(name, entry.fn))
x = torch.ones(3)
ops.gelu(x)
ops.softmax(x)
with fastgpt.use_backend("torch"):
    ops.gelu(x)
with fastgpt.use_backend(softmax="reference"):
    ops.gelu(x)
    ops.softmax(x)
ops.gelu(x, backend="torch")
print(json.dumps([calls, {row["op"]: [row["backend"], row["why"]] for row in fastgpt.explain()}]))
"""


def run_python(script: str, backend: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTGPT_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)


def test_the_environment_decides_where_nothing_nearer_does() -> None:
    result = run_python(ENVIRONMENT_SCRIPT, "reference, softmax=torch")
    assert result.returncode == 0, result.stderr
    calls, rows = json.loads(result.stdout)
    assert calls == ["reference", "torch", "torch", "reference", "reference", "torch"]
    assert rows["gelu"] == ["reference", "chosen by FASTGPT_BACKEND"]
    assert rows["softmax"] == ["torch", "chosen by FASTGPT_BACKEND"]


def test_a_broken_environment_lets_fastgpt_be_imported_and_stops_the_first_op() -> None:
    script = "import torch, fastgpt; print('imported', flush=True); fastgpt.ops.gelu(torch.ones(2))"
    result = run_python(script, "cublas")
    assert result.stdout.strip() == "imported"
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: FASTGPT_BACKEND: unknown backend 'cublas'; the backends are reference, torch")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cublas", r"FASTGPT_BACKEND: unknown backend 'cublas'"),
        ("layernorm=torch", r"FASTGPT_BACKEND: unknown op 'layernorm'; the ops are attention, "),
        ("gelu=", r"FASTGPT_BACKEND: unknown backend ''"),
        ("triton", r"backend 'triton' cannot run here: because of this test"),
    ],
)
def test_every_op_repeats_what_is_wrong_with_the_environment(
    text: str, problem: str, monkeypatch: pytest.MonkeyPatch, own_table: dict[str, dict[str, Entry]]
) -> None:
    dispatch.mark_absent("triton", "because of this test")
    monkeypatch.setenv("FASTGPT_BACKEND", text)
    monkeypatch.setattr(dispatch, "_environment", dispatch._choice_from_environment())
    for _ in range(2):
        with pytest.raises(ValueError, match=problem):
            ops.gelu(torch.ones(2))
    assert torch.equal(ops.gelu(torch.zeros(2), backend="reference"), torch.zeros(2))


@pytest.mark.parametrize("text", ["", " ", ",", "auto"])
def test_an_empty_environment_is_no_choice(
    text: str, monkeypatch: pytest.MonkeyPatch, ran: list[tuple[str, str]]
) -> None:
    preferred = gelu_ran(ran, "auto")
    monkeypatch.setenv("FASTGPT_BACKEND", text)
    monkeypatch.setattr(dispatch, "_environment", dispatch._choice_from_environment())
    assert gelu_ran(ran) == preferred


# What cannot run, and why


@pytest.mark.parametrize(
    ("choose", "problem"),
    [
        (lambda: use_backend("cublas"), r"^use_backend: unknown backend 'cublas'; the backends are reference, torch, "),
        (lambda: use_backend(gelu="cublas"), r"^use_backend: unknown backend 'cublas'"),
        (lambda: use_backend(layernorm="torch"), r"^use_backend: unknown op 'layernorm'; the ops are attention, "),
        (lambda: ops.gelu(torch.ones(2), backend="cublas"), r"^gelu: unknown backend 'cublas'; the backends are "),
        (lambda: ops.gelu(torch.ones(2), backend=""), r"^gelu: unknown backend ''"),
        (lambda: dispatch.register("cublas", "gelu", Entry(abs)), r"^register: unknown backend 'cublas'"),
        (lambda: dispatch.register("auto", "gelu", Entry(abs)), r"^register: unknown backend 'auto'"),
        (lambda: dispatch.register("torch", "layernorm", Entry(abs)), r"unknown op 'layernorm'; the ops are "),
        (lambda: dispatch.mark_absent("cublas", ""), r"^mark_absent: unknown backend 'cublas'"),
    ],
)
def test_unknown_names_are_refused(choose: Callable[[], object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        choose()


def test_absent_backends_are_refused_with_their_reason(own_table: dict[str, dict[str, Entry]]) -> None:
    dispatch.mark_absent("cuda", "because of this test")
    for backend, reason in dispatch._absent.items():
        refusal = re.escape(f": backend {backend!r} cannot run here: {reason}")
        with pytest.raises(ValueError, match=f"^gelu{refusal}$"):
            ops.gelu(torch.ones(2), backend=backend)
        with pytest.raises(ValueError, match=f"^use_backend{refusal}$"):
            use_backend(gelu=backend)


@pytest.mark.parametrize("backend", ["triton", "cpp", "cuda"])
def test_a_backend_marked_absent_is_gone_from_every_op(backend: str, own_table: dict[str, dict[str, Entry]]) -> None:
    dispatch.register(backend, "gelu", Entry(reference.gelu))
    assert torch.equal(ops.gelu(torch.zeros(2), backend=backend), torch.zeros(2))
    dispatch.mark_absent(backend, "its compiler is missing")
    with pytest.raises(ValueError, match=f"^gelu: backend '{backend}' cannot run here: its compiler is missing$"):
        ops.gelu(torch.zeros(2), backend=backend)
    assert all(row["others"][backend] == "its compiler is missing" for row in explain())


def test_a_backend_that_lacks_one_op_says_so(own_table: dict[str, dict[str, Entry]]) -> None:
    dispatch.mark_absent("triton", "")
    dispatch.register("triton", "gelu", Entry(reference.gelu))
    with pytest.raises(
        ValueError, match=r"^softmax: backend 'triton' cannot run here: the triton backend has no softmax$"
    ):
        ops.softmax(torch.ones(2), backend="triton")


def test_a_limit_sees_the_arguments_and_keeps_auto_away(
    own_table: dict[str, dict[str, Entry]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_most_4(x: Tensor, *_: object) -> str | None:
        return None if x.shape[-1] <= 4 else f"rows of at most 4 elements, not {x.shape[-1]}"

    dispatch.register("triton", "gelu", Entry(lambda x, *_: x * 0 + 5, limit=at_most_4))
    monkeypatch.setattr(dispatch, "PREFERRED", {"cpu": ("triton", "reference")})
    assert ops.gelu(torch.zeros(4)).tolist() == [5.0] * 4
    assert ops.gelu(torch.zeros(5)).tolist() == [0.0] * 5
    with pytest.raises(
        ValueError, match=r"^gelu: backend 'triton' cannot run here: rows of at most 4 elements, not 5$"
    ):
        ops.gelu(torch.zeros(5), backend="triton")


def test_an_entry_for_other_devices_or_dtypes_says_which(own_table: dict[str, dict[str, Entry]]) -> None:
    dispatch.register("cuda", "gelu", Entry(reference.gelu, device_types=("cuda",)))
    with pytest.raises(ValueError, match=r"^gelu: backend 'cuda' cannot run here: it takes cuda tensors, not cpu$"):
        ops.gelu(torch.ones(2), backend="cuda")
    dispatch.register("cpp", "gelu", Entry(reference.gelu, dtypes=(F32,)))
    with pytest.raises(ValueError, match=r"^gelu: backend 'cpp' cannot run here: it takes float32, not bfloat16$"):
        ops.gelu(torch.ones(2, dtype=BF16), backend="cpp")


def test_a_device_that_no_backend_takes_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"^gelu: no backend takes float32 tensors on device 'meta' here$"):
        ops.gelu(torch.ones(2, device="meta"))


def test_float64_goes_to_the_reference_and_torch_refuses_it(ran: list[tuple[str, str]]) -> None:
    assert gelu_ran(ran, dtype=F64) == "reference"
    wanted = r"^gelu: backend 'torch' cannot run here: it takes float32, bfloat16 or float16, not float64$"
    with pytest.raises(ValueError, match=wanted):
        gelu_ran(ran, "torch", dtype=F64)
    with use_backend("torch"), pytest.raises(ValueError, match=wanted):
        gelu_ran(ran, dtype=F64)
    assert not ran


def test_explain_has_a_row_for_each_op_and_a_reason_for_each_backend() -> None:
    for dtype in (F32, F64):
        rows = explain("cpu", dtype)
        assert [row["op"] for row in rows] == list(dispatch.OPS)
        for row in rows:
            assert {row["backend"], *row["others"]} == set(dispatch.BACKENDS)
            assert row["backend"] not in row["others"]
            assert all(reason for reason in row["others"].values())
            assert row["why"]


def test_explain_tells_what_runs(ran: list[tuple[str, str]]) -> None:
    row = {row["op"]: row for row in explain()}["gelu"]
    assert gelu_ran(ran) == row["backend"]
    with use_backend(gelu="reference"):
        row = {row["op"]: row for row in explain()}["gelu"]
        assert gelu_ran(ran) == row["backend"] == "reference"
        assert row["why"] == "chosen by use_backend"
        assert row["others"]["torch"] == "it can run, but reference was chosen"
    row = {row["op"]: row for row in explain("cpu", F64)}["gelu"]
    assert row["backend"] == "reference"
    assert row["others"]["torch"] == "it takes float32, bfloat16 or float16, not float64"


def test_explain_says_where_nothing_can_run() -> None:
    with use_backend("torch"):
        row = explain("cpu", F64)[0]
    assert row["backend"] is None
    assert set(row["others"]) == set(dispatch.BACKENDS)
    assert explain("mps")[0]["backend"] is None
    assert explain("mps")[0]["others"]["torch"] == "it takes cpu or cuda tensors, not mps"


def test_explain_warns_of_the_op_that_is_not_deterministic() -> None:
    with use_backend("torch"):
        rows = {row["op"]: row["note"] for row in explain("cuda")}
    assert "not deterministic" in rows["attention"]
    assert "not deterministic" in rows["attention_qkvpacked"]


# A backend of one's own


def test_a_registered_backend_trains_the_model_unchanged(own_table: dict[str, dict[str, Entry]]) -> None:
    calls: list[tuple[str, str]] = []
    for op in dispatch.OPS:
        dispatch.register("triton", op, Entry(noted(calls, op, "toy", getattr(reference, op))))

    def train() -> list[float]:
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, dropout=0.1))
        optimizer = AdamW(model.parameters(), lr=0.02)
        tokens = torch.randint(11, (4, 9))
        losses = []
        for _ in range(6):
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            ops.clip_grad_norm_(gradients(model), 1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    with use_backend("triton"):
        toy = train()
    unfused = {"attention", "softmax", "cross_entropy"}
    assert {op for op, _ in calls} == set(dispatch.OPS) - unfused
    with use_backend("reference"):
        assert train() == toy
    assert toy[-1] < toy[0] - 0.1


# Autocast


def fp32_inputs() -> dict[str, Callable[[str], Any]]:
    x, residual, weight, bias = sample(5, 16), sample(5, 16), sample(16), sample(16)
    targets, seed = torch.tensor([0, 3, 15, 7, 7]), torch.tensor([8])
    options: dict[str, Any] = {"dropout_p": 0.3, "seed": seed}
    return {
        "softmax": lambda backend: ops.softmax(x, scale=0.3, is_causal=True, backend=backend),
        "layer_norm": lambda backend: ops.layer_norm(x, weight, bias, backend=backend),
        "add_layer_norm": lambda backend: ops.add_layer_norm(x, residual, weight, bias, **options, backend=backend),
        "gelu": lambda backend: ops.gelu(x, bias, backend=backend),
        "cross_entropy": lambda backend: ops.cross_entropy(x, targets, backend=backend),
        "dropout": lambda backend: ops.dropout(x, 0.3, seed=seed, backend=backend),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_ops_in_the_dtypes_they_were_given(backend: str) -> None:
    for name, call in fp32_inputs().items():
        plain = call(backend)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = call(backend)
        torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0, msg=name)


def matmul_ops(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """The ops that multiply matrices, and inputs that are bfloat16 numbers held in ``dtype``."""
    targets, seed = torch.tensor([0, 3, 15, -100, 7]), torch.tensor([8])

    def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return ops.attention(q, k, v, backend=backend)

    def dropped(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return ops.attention(q, k, v, dropout_p=0.3, seed=seed, backend=backend)

    def packed(qkv: Tensor, backend: str) -> Tensor:
        return ops.attention_qkvpacked(qkv, backend=backend)

    def loss(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        return ops.linear_cross_entropy(x, weight, targets, backend=backend)

    shapes = {attention: [(2, 2, 9, 16)] * 3, dropped: [(2, 2, 9, 16)] * 3, packed: [(2, 9, 3, 2, 16)]}
    shapes[loss] = [(5, 24), (16, 24)]
    return {
        fn.__name__: (fn, [sample(*s, dtype=BF16).to(dtype).requires_grad_() for s in inputs])
        for fn, inputs in shapes.items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["attention", "dropped", "packed", "loss"])
def test_autocast_casts_the_operands_of_matrix_products(backend: str, name: str) -> None:
    """Under autocast an op on fp32 does what it does on the same numbers in bfloat16, as F.linear and SDPA do."""
    torch.manual_seed(1)
    fn, wide = matmul_ops(F32)[name]
    half = [x.detach().bfloat16().requires_grad_() for x in wide]
    expected = fn(*half, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = fn(*wide, backend=backend)
    assert got.dtype == expected.dtype == (F32 if name == "loss" else BF16)
    assert torch.equal(got, expected)
    upstream = sample(*got.shape, dtype=got.dtype)
    got.backward(upstream)
    expected.backward(upstream)
    for x, x_half in zip(wide, half, strict=True):
        assert x.grad.dtype == F32
        assert torch.equal(x.grad, x_half.grad.float())


@pytest.mark.parametrize("name", ["attention", "dropped", "packed", "loss"])
def test_the_reference_keeps_fp32_accuracy_under_autocast(name: str) -> None:
    """Its own matrix products are not cast down: the result is the float64 one, rounded once."""
    torch.manual_seed(1)
    fn, wide = matmul_ops(F64)[name]
    with torch.autocast("cpu", torch.bfloat16):
        got = fn(*(x.detach().float() for x in wide), backend="reference")
    true = fn(*wide, backend="reference")
    assert true.dtype == F64
    allowed = torch.finfo(got.dtype).eps / 2 + 2**-21
    assert (got.double() - true).abs().max() <= allowed * true.abs().max()


def test_autocast_leaves_float64_alone() -> None:
    fn, wide = matmul_ops(F64)["attention"]
    with torch.autocast("cpu", torch.bfloat16):
        assert fn(*wide, backend="auto").dtype == F64


@pytest.mark.parametrize(("backend", "dtype"), [(backend, BF16) for backend in BACKENDS])
def test_the_model_runs_under_autocast(backend: str, dtype: torch.dtype) -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16))
    tokens = torch.randint(11, (2, 9))
    exact = model(tokens[:, :-1], tokens[:, 1:])[1].item()
    with fastgpt.use_backend(backend), torch.autocast("cpu", dtype):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(exact, abs=0.02)
    assert all(p.grad.dtype == F32 and p.grad.isfinite().all() for p in model.parameters())
