"""What only the triton backend has: its dispatcher ops, its launches, its determinism and its edges.

Its results are held to the error rule in each op's own file, with those of all backends.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INTERPRETING
from error_rule import DEVICE, check, sample

import fastgpt.triton_kernels
from fastgpt import GPT, GPTConfig, dispatch, ops, use_backend
from fastgpt.optim import AdamW, gradients
from fastgpt.triton_kernels import library

F32, F16 = torch.float32, torch.float16
HERE = Path(fastgpt.triton_kernels.__file__).parent
KERNEL_FILES = sorted({*library._FILES.values(), "column_sum"})

in_the_interpreter = pytest.mark.skipif(not INTERPRETING, reason="counts launches in Triton's interpreter")


# Edges


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 65), (63, 63), (65, 65), (257, 257), (5, 63), (63, 5), (33, 97)]
)
@pytest.mark.parametrize("width", [80])
def test_attention_of_head_size_80(queries: int, keys: int, width: int) -> None:
    from test_attention import heads, peer

    check(ops.attention, "triton", peer, heads(1, 1, queries, keys, width))


@pytest.mark.parametrize("dtype", [F32, F16])
def test_attention_in_blocks_other_than_the_interpreters(dtype: torch.dtype) -> None:
    """Tiles that are not square, in both orders: a mix-up of rows and columns shows."""
    from test_attention import heads, peer

    from fastgpt.triton_kernels import launch

    names = ("attention_fwd", "attention_bwd_dkdv", "attention_bwd_dq")
    for block_m, block_n in ((16, 64), (64, 16)):
        before = dict(launch._forced)
        options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
        launch._forced.update(dict.fromkeys(names, options))
        try:
            check(
                ops.attention,
                "triton",
                peer,
                heads(1, 1, 70, 90, 24, dtype=dtype),
                dropout_p=0.2,
                seed=torch.tensor([7], device=DEVICE),
            )
        finally:
            launch._forced.clear()
            launch._forced.update(before)


def test_a_head_size_beyond_256_is_refused_in_a_sentence() -> None:
    q = sample(1, 1, 4, 257)
    with pytest.raises(ValueError, match=r"^attention: backend 'triton' cannot run here: it takes head sizes up"):
        ops.attention(q, q, q, backend="triton")
    with pytest.raises(ValueError, match=r"^attention_qkvpacked: .* head sizes up to 256, not 300$"):
        ops.attention_qkvpacked(sample(1, 4, 3, 1, 300), backend="triton")


def test_a_target_that_is_no_class_gives_nan_and_reads_nothing() -> None:
    """The public op finds it on a CPU; on a GPU nobody looks before the kernel does."""
    logits = sample(3, 9)
    for wrong in (9, -1, 2**40):
        targets = torch.tensor([1, wrong, 2], device=DEVICE)
        loss, *_ = library.op("cross_entropy_fwd")(logits, targets, -100, False)
        assert loss.isnan()


def test_rows_longer_than_a_tile_are_right() -> None:
    from test_add_layer_norm import peer as add_peer
    from test_softmax import peer as softmax_peer

    N = 65537
    check(ops.softmax, "triton", softmax_peer, {"x": sample(2, N)}, scale=0.5)
    inputs = {"x": sample(2, N), "residual": sample(2, N), "weight": sample(N), "bias": sample(N)}
    check(ops.add_layer_norm, "triton", add_peer, inputs)


def test_the_backward_of_a_loss_may_be_run_twice() -> None:
    """The first one hands out the gradient that the forward made; whoever got it may change it."""
    logits, targets = sample(5, 17).requires_grad_(), torch.randint(17, (5,), device=DEVICE)
    loss = ops.cross_entropy(logits, targets, backend="triton")
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    wanted = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (third,) = torch.autograd.grad(loss * 3, logits)
    torch.testing.assert_close(second, wanted)
    torch.testing.assert_close(third, wanted * 3)


def test_the_gradient_of_a_gradient_is_refused() -> None:
    x = sample(3, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="kernels have no second derivative"):
        torch.autograd.grad(ops.softmax(x, backend="triton").square().sum(), x, create_graph=True)


def test_a_row_of_minus_infinities_is_nan_as_in_the_reference() -> None:
    for width in (5, 40000):
        x = torch.full((2, width), -torch.inf, device=DEVICE)
        x[1, -1] = 0
        y = ops.softmax(x, backend="triton")
        assert y[0].isnan().all()
        assert y[1].sum() == 1


def test_lists_of_the_same_tensors_grouped_otherwise_do_not_share_a_table() -> None:
    a, b, c, d = (torch.full((5,), value, device=DEVICE) for value in (1.0, 2.0, 0.0, 0.0))
    ops.clip_grad_norm_([a, b, c, d], 100.0, backend="triton")
    one = torch.tensor(1.0, device=DEVICE)
    options = {"lr": one / 4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "backend": "triton"}
    ops.adamw_([a], [b], [c], [d], one, **options)
    torch.testing.assert_close(a, torch.full_like(a, 0.75))


def test_changes_in_place_are_known_to_autograd() -> None:
    x, weight = sample(3, 5).requires_grad_(), sample(5).requires_grad_()
    means = [torch.zeros(5, device=DEVICE) for _ in range(2)]
    y = (x * weight).square().sum()
    one = torch.tensor(1.0, device=DEVICE)
    options = {"lr": one, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "backend": "triton"}
    ops.adamw_([weight], [torch.ones_like(weight)], means[:1], means[1:], one, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    grad = sample(4)
    version = grad._version
    ops.clip_grad_norm_([grad], 0.1, backend="triton")
    assert grad._version > version


# Where it can run, and why not


def test_without_triton_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_table", {op: dict(entries) for op, entries in dispatch._table.items()})
    monkeypatch.setattr(dispatch, "_absent", dict(dispatch._absent))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dispatch._register_triton()
    assert {row["others"]["triton"] for row in dispatch.explain()} == {"the package triton is not installed"}


def test_an_old_gpu_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"^backend 'triton' needs .* capability 8.0 or later, Tesla T4 has 7.5$"):
        library._require_supported.__wrapped__(torch.device("cuda"))


def outside_the_interpreter(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_on_a_cpu_it_names_the_interpreter_and_is_not_loaded() -> None:
    result = outside_the_interpreter(
        "import sys, torch\nfrom fastgpt import ops\nassert 'triton' not in sys.modules\n"
        "ops.softmax(torch.ones(2), backend='triton')"
    )
    assert result.stderr.splitlines()[-1] == (
        "ValueError: softmax: backend 'triton' cannot run here: it takes cuda tensors, not cpu "
        "(with TRITON_INTERPRET=1 its interpreter runs it on cpu tensors)"
    )


def test_it_goes_by_no_other_name(tmp_path: Path) -> None:
    (tmp_path / "triton_kernels").symlink_to(HERE)
    result = outside_the_interpreter(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import triton_kernels")
    assert "ImportError: this package is fastgpt.triton_kernels" in result.stderr.splitlines()[-1]


# Each file by itself


def run_file(name: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error::UserWarning", "-m", f"fastgpt.triton_kernels.{name}"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_kernels_file_checks_itself_and_says_what_it_moves() -> None:
    first, *lines = run_file("softmax")
    assert "interpreter" in first or "bf16" in first
    assert len(lines) == 3
    assert all("error" in line and "moves" in line for line in lines)


@pytest.mark.full
@pytest.mark.parametrize("name", KERNEL_FILES)
def test_every_kernels_file_runs_by_itself(name: str) -> None:
    assert len(run_file(name)) >= 2


def test_a_file_that_is_wrong_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastgpt.triton_kernels import selfcheck

    with pytest.raises(SystemExit, match=r"^doubling is wrong: the error allowed is 1\.0e-05$"):
        selfcheck.check("doubling", lambda: torch.ones(3) * 2.001, lambda: torch.full((3,), 2.0).double(), moved=24)
    assert "error 5.0e-04 of the largest" in capsys.readouterr().out


# Training


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernel launches by name, counted where the interpreter carries them out."""
    from triton.runtime.interpreter import GridExecutor

    counts: Counter[str] = Counter()
    launch = GridExecutor.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counting)
    return counts


def train(backend: str, steps: int) -> list[float]:
    """Losses of the issue's tiny model: n_layer 2, n_embd 32, block 16, dropout 0.2."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=16, vocab_size=23, n_layer=2, n_head=2, n_embd=32, dropout=0.2))
    optimizer = AdamW(model.parameters(), lr=0.02)
    tokens = torch.randint(23, (2, 17)).to(DEVICE)
    model.to(DEVICE)
    losses = []
    with use_backend(backend):
        for _ in range(steps):
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            ops.clip_grad_norm_(gradients(model), 1.0)
            optimizer.step()
            losses.append(loss.item())
    return losses


@in_the_interpreter
def test_twenty_steps_of_training_are_the_references(launches: Counter[str]) -> None:
    mine = train("triton", 20)
    per_step = {name.removeprefix("_").removesuffix("_kernel"): n / 20 for name, n in sorted(launches.items())}
    print(json.dumps(per_step, indent=1))
    assert mine == pytest.approx(train("reference", 20), abs=1e-4)
    assert mine[-1] < mine[0] - 0.3
    # Each layer: attention, two norms and a GELU; the last norm makes five. Then the embedding's dropout, AdamW, the
    # norm of the gradients and their scaling, and the second stages of the sums.
    assert per_step.pop("write_addresses") > 0
    assert per_step == {
        "attention_fwd": 2,
        "attention_bwd_delta": 2,
        "attention_bwd_dkdv": 2,
        "attention_bwd_dq": 2,
        "layer_norm_fwd": 1,
        "layer_norm_bwd": 1,
        "add_layer_norm_fwd": 4,
        "add_layer_norm_bwd": 4,
        "gelu_fwd": 2,
        "gelu_bwd": 2,
        "column_sum": 7,
        "cross_entropy_fwd": 1,
        "dropout": 2,
        "adamw": 1,
        "sum_of_squares": 1,
        "clip": 1,
    }
