"""Every op inside torch.compile(fullgraph=True): the same results, the same masks, the same choice of backend."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from error_rule import BACKENDS, DEVICE, sample
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastgpt import GPT, GPTConfig, dispatch, ops, use_backend

F32 = torch.float32


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(fn: Callable[..., Any], compiler: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, backend=compiler)


@dataclasses.dataclass
class Example:
    """A call of an op: ``fn(backend, *inputs)``, the inputs that need gradients first."""

    fn: Callable[..., Any]
    inputs: list[Tensor]


def examples() -> dict[str, Example]:
    x, residual, weight, bias = sample(6, 24), sample(6, 24), sample(24), sample(24)
    q, k, v = (sample(2, 2, 9, 16) for _ in "qkv")
    targets = torch.tensor([0, 23, -100, 7, 7, 1], device=DEVICE)
    seqlens = torch.tensor([9, 4], dtype=torch.int32, device=DEVICE)

    def attention(backend: str, q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor) -> Tensor:
        return ops.attention(q, k, v, seqlens_k=seqlens, backend=backend)

    def attention_that_drops(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, dropout_p=0.4, backend=backend)

    def packed(backend: str, qkv: Tensor) -> Tensor:
        return ops.attention_qkvpacked(qkv, backend=backend)

    def packed_that_drops(backend: str, qkv: Tensor) -> Tensor:
        return ops.attention_qkvpacked(qkv, dropout_p=0.4, backend=backend)

    def softmax(backend: str, x: Tensor) -> Tensor:
        return ops.softmax(x, scale=0.3, is_causal=True, backend=backend)

    def layer_norm(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.layer_norm(x, weight, bias, backend=backend)

    def add_layer_norm(backend: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_layer_norm(*inputs, backend=backend)

    def add_layer_norm_that_drops(backend: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_layer_norm(*inputs, dropout_p=0.4, backend=backend)

    def gelu(backend: str, x: Tensor, bias: Tensor) -> Tensor:
        return ops.gelu(x, bias, approximate="tanh", backend=backend)

    def cross_entropy(backend: str, logits: Tensor, targets: Tensor) -> Tensor:
        return ops.cross_entropy(logits, targets, backend=backend)

    def linear_cross_entropy(backend: str, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, weight, targets, backend=backend)

    def dropout(backend: str, x: Tensor) -> Tensor:
        return ops.dropout(x, 0.4, backend=backend)

    norm_inputs = [x, residual, weight, bias]
    made = [
        Example(attention, [q, k, v, seqlens]),
        Example(attention_that_drops, [q, k, v]),
        Example(packed, [sample(2, 9, 3, 2, 16)]),
        Example(packed_that_drops, [sample(2, 9, 3, 2, 16)]),
        Example(softmax, [sample(2, 7, 5)]),
        Example(layer_norm, [x, weight, bias]),
        Example(add_layer_norm, norm_inputs),
        Example(add_layer_norm_that_drops, norm_inputs),
        Example(gelu, [x, bias]),
        Example(cross_entropy, [x, targets]),
        Example(linear_cross_entropy, [x, sample(24, 24) / 5, targets]),
        Example(dropout, [x]),
    ]
    return {example.fn.__name__: example for example in made}


NAMES = list(examples())
every_example = pytest.mark.parametrize("name", NAMES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def outputs_and_gradients(fn: Callable[..., Any], backend: str, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.manual_seed(3)
    outputs = fn(backend, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape) for y in outputs]
    needed = [x for x in leaves if x.is_floating_point()]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, needed, upstream))


def compare_with_eager(name: str, backend: str, compiler: str) -> None:
    example = examples()[name]
    eager = outputs_and_gradients(example.fn, backend, example.inputs)
    got = outputs_and_gradients(compiled(example.fn, compiler), backend, example.inputs)
    for mine, wanted in zip(got, eager, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@every_backend
@every_example
def test_compiled_is_eager_forward_and_backward(name: str, backend: str) -> None:
    compare_with_eager(name, backend, "aot_eager")


@pytest.mark.full
@every_backend
@every_example
def test_inductor_is_eager_forward_and_backward(name: str, backend: str) -> None:
    compare_with_eager(name, backend, "inductor")


def optimizer_step(backend: str, params: list[Tensor], grads: list[Tensor], means: list[Tensor], lr: Tensor) -> Tensor:
    norm = ops.clip_grad_norm_(grads, 0.5, backend=backend)
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "backend": backend}
    ops.adamw_(params, grads, means[:2], means[2:], torch.full_like(lr, 2.0), lr=lr, **options)
    return norm


def compare_optimizer_with_eager(backend: str, compiler: str) -> None:
    lists = [[sample(5, 3), sample(7)] for _ in "pg"]
    lists.append([torch.rand(size, device=DEVICE) for size in ((5, 3), (7,), (5, 3), (7,))])
    own = copy.deepcopy(lists)
    lr = torch.tensor(0.1, device=DEVICE)
    wanted = optimizer_step(backend, *lists, lr)
    torch.testing.assert_close(compiled(optimizer_step, compiler)(backend, *own, lr), wanted)
    torch.testing.assert_close(own, lists)


@every_backend
def test_compiled_optimizer_ops_change_their_lists_in_place(backend: str) -> None:
    compare_optimizer_with_eager(backend, "aot_eager")


@pytest.mark.full
@every_backend
def test_inductor_optimizer_ops_change_their_lists_in_place(backend: str) -> None:
    compare_optimizer_with_eager(backend, "inductor")


def dropped(x: Tensor) -> tuple[Tensor, Tensor]:
    return ops.dropout(x, 0.5), ops.dropout(x, 0.5)


def compare_masks_with_eager(compiler: str) -> None:
    x, fn = torch.ones(64, device=DEVICE, requires_grad=True), compiled(dropped, compiler)
    torch.manual_seed(11)
    wanted = [dropped(x) for _ in range(3)]
    torch.manual_seed(11)
    got = [fn(x) for _ in range(3)]
    for pair, wanted_pair in zip(got, wanted, strict=True):
        for mine, theirs in zip(pair, wanted_pair, strict=True):
            assert torch.equal(mine, theirs)
            (gradient,) = torch.autograd.grad(mine.sum(), x, retain_graph=True)
            assert torch.equal(gradient, mine.detach())
    assert len({tuple(mask.tolist()) for pair in got for mask in pair}) == 6


def test_two_draws_in_one_graph_differ_and_are_those_of_eager() -> None:
    compare_masks_with_eager("aot_eager")


@pytest.mark.full
def test_two_draws_in_one_inductor_graph_differ_and_are_those_of_eager() -> None:
    compare_masks_with_eager("inductor")


@pytest.fixture
def sevens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend's gelu gives 7, whatever comes: a graph that calls it cannot pass for one that does not."""
    table = {op: dict(entries) for op, entries in dispatch._table.items()}
    table["gelu"]["torch"] = dataclasses.replace(table["gelu"]["torch"], fn=lambda x, *_: torch.full_like(x, 7.0))
    monkeypatch.setattr(dispatch, "_table", table)


def test_another_use_backend_compiles_anew_and_runs_it(sevens: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(lambda x: ops.gelu(x) + 1, fullgraph=True, backend=counter)
    x = torch.zeros(3)
    with use_backend("torch"):
        assert fn(x).tolist() == [8.0] * 3
    assert counter.frame_count == 1
    with use_backend("reference"):
        assert fn(x).tolist() == [1.0] * 3
    assert counter.frame_count == 2
    with use_backend("torch"):
        assert fn(x).tolist() == [8.0] * 3
    with use_backend(gelu="reference"):
        assert fn(x).tolist() == [1.0] * 3


def test_leaving_use_backend_compiles_anew(sevens: None) -> None:
    fn, x = compiled(lambda x: ops.gelu(x) + 1), torch.zeros(3)
    with use_backend("reference"):
        assert fn(x).tolist() == [1.0] * 3
    assert fn(x).tolist() == ops.gelu(x).add(1).tolist()
    with use_backend("reference"):
        assert fn(x).tolist() == [1.0] * 3


def test_use_backend_inside_a_compiled_function(sevens: None) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with use_backend("reference"):
            first = ops.gelu(x)
            with use_backend(gelu="torch"):
                second = ops.gelu(x)
            third = ops.gelu(x)
        return first, second, third

    for fn in (both, compiled(both)):
        assert [y[0].item() for y in fn(torch.zeros(3))] == [0.0, 7.0, 0.0]
        assert dispatch._state.choice == {}


def test_the_backend_of_a_call_inside_a_compiled_function(sevens: None) -> None:
    fn = compiled(lambda x: ops.gelu(x, backend="torch") - ops.gelu(x, backend="reference"))
    with use_backend("reference"):
        assert fn(torch.zeros(3)).tolist() == [7.0] * 3


@every_backend
def test_changing_shapes(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def block(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = torch.stack([x, x * 2, x * 3], 2).view(batch, length, 3, 2, width // 2)
        y = ops.attention_qkvpacked(qkv, backend=backend).reshape(x.shape)
        y, residual = ops.add_layer_norm(y, x, weight[0], backend=backend)
        y = ops.gelu(y, backend=backend) + ops.softmax(residual, backend=backend)
        return ops.linear_cross_entropy(y.flatten(0, 1), weight, targets, backend=backend)

    fn, weight = torch.compile(block, fullgraph=True, backend=counter), sample(11, 16)
    for batch, length in [(2, 5), (3, 9), (5, 31)]:
        x, targets = sample(batch, length, 16).requires_grad_(), torch.randint(11, (batch * length,), device=DEVICE)
        got, wanted = fn(x, weight, targets), block(x, weight, targets)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        pair = [torch.autograd.grad(loss, x)[0] for loss in (got, wanted)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2, "a graph of changing shapes serves them all"


@every_backend
def test_changing_shapes_draw_the_masks_of_eager(backend: str) -> None:
    fn = compiled(lambda x: ops.dropout(x, 0.5, backend=backend))
    for length in (5, 13, 64):
        x = torch.ones(3, length, device=DEVICE)
        torch.manual_seed(length)
        wanted = ops.dropout(x, 0.5, backend=backend)
        torch.manual_seed(length)
        assert torch.equal(fn(x), wanted)


def compare_gpt_with_eager(compiler: str, backend: str, n_layer: int, attention: str) -> None:
    config = GPTConfig(
        block_size=16, vocab_size=17, n_layer=n_layer, n_head=2, n_embd=16, dropout=0.2, attention=attention
    )
    model = GPT(config).to(DEVICE)
    twin = copy.deepcopy(model)
    tokens = torch.randint(17, (2, 17), device=DEVICE)
    results = []
    for gpt, run in ((model, model), (twin, compiled(twin, compiler))):
        torch.manual_seed(23)
        with use_backend(backend):
            _, loss = run(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_inductor_gpt_with_dropout_is_eager() -> None:
    compare_gpt_with_eager("inductor", "auto", n_layer=1, attention="fused")


@pytest.mark.full
@pytest.mark.parametrize(("backend", "attention"), [("reference", "unfused"), ("torch", "fused")])
def test_inductor_gpt_of_two_layers_is_eager(backend: str, attention: str) -> None:
    compare_gpt_with_eager("inductor", backend, n_layer=2, attention=attention)


@pytest.mark.parametrize(("backend", "attention"), [("reference", "unfused"), ("torch", "fused")])
def test_compiled_gpt_with_dropout_is_eager(backend: str, attention: str) -> None:
    compare_gpt_with_eager("aot_eager", backend, n_layer=1, attention=attention)


def test_draw_seed_is_a_well_formed_op() -> None:
    """Its results differ from call to call, which rules out the checks that compare two of them."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastgpt.draw_seed, (torch.empty(1, dtype=torch.int64),), test_utils=checks)
    assert torch.Tag.nondeterministic_seeded in torch.ops.fastgpt.draw_seed.default.tags


def test_draw_seed_fills_all_64_bits() -> None:
    seeds = torch.cat([torch.ops.fastgpt.draw_seed(torch.empty(1, dtype=torch.int64)) for _ in range(200)])
    for bit in range(64):
        ones = int((seeds >> bit & 1).sum())
        assert 50 < ones < 150, f"bit {bit} is set in {ones} of 200 seeds"
