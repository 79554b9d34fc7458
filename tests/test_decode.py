"""A step of generation as one call of the cpp backend: its numbers, and when it is taken."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig, decode, extension, use_backend
from fastgpt.benchmarks.errors import absolute_error, allowed_error, largest
from fastgpt.model import MLP, KVCache, Linear

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(extension.cpp_missing() is not None, reason=str(extension.cpp_missing())),
]

Scope = AbstractContextManager[Any]
decode_step = extension.cpu.op("decode_step")


def make_model(**options: Any) -> GPT:
    """A small model whose weights are not small, so that its logits hang on every one of them."""
    torch.manual_seed(0)
    sizes = {"block_size": 24, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_multiple": 8}
    m = GPT(GPTConfig(**sizes | options))
    for p in m.parameters():
        nn.init.normal_(p, mean=0.1, std=2 * m.config.n_embd**-0.5)  # a product is about twice as large as its input
    return m.eval()


def read(m: GPT, idx: Tensor, *, prompt: int = 1) -> tuple[Tensor, KVCache]:
    """The logits that follow on the prompt and on each further token, (1, T - prompt + 1, V), and the cache."""
    cache = KVCache(idx.shape[1])
    logits = [m(idx[:, :prompt], last_only=True, cache=cache)[0]]
    logits += [m(idx[:, t : t + 1], last_only=True, cache=cache)[0] for t in range(prompt, idx.shape[1])]
    return torch.cat(logits, dim=1), cache


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the steps that are one call."""
    positions: list[int] = []
    run = decode._decode_step

    def noted(*args: Any) -> Tensor:
        positions.append(args[3])
        return run(*args)

    monkeypatch.setattr(decode, "_decode_step", noted)
    return positions


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "gelu": "none", "tie_weights": False, "attention": "unfused"},
        {"n_layer": 1, "n_head": 1, "n_embd": 1, "vocab_size": 1, "vocab_multiple": 1},
        {"n_head": 5, "n_embd": 35, "vocab_size": 67, "vocab_multiple": 1},
        {"n_layer": 3, "n_head": 3, "n_embd": 192, "vocab_size": 300, "bias": False, "vocab_multiple": 64},
    ],
)
def test_cpp_obeys_the_error_rule(options: dict[str, Any], prompt: int, taken: list[int]) -> None:
    m = make_model(**options)
    idx = torch.randint(m.config.vocab_size, (1, 24))
    with torch.no_grad():
        with use_backend("torch"):
            peer, peer_cache = read(m, idx, prompt=prompt)
        assert not taken
        with use_backend("cpp"):
            got, cache = read(m, idx, prompt=prompt)
        assert taken == list(range(0 if prompt == 1 else prompt, 24))
        with use_backend("reference"):
            true, true_cache = read(m.double(), idx, prompt=prompt)
    assert got.shape == true.shape == (1, 25 - prompt, m.config.vocab_size)
    pairs = [(got, peer, true)]
    kept = [[*c._memory.values()] for c in (cache, peer_cache, true_cache)]
    pairs += zip(*kept, strict=True)
    for x, peers, truth in pairs:
        assert absolute_error(x, truth) <= allowed_error(absolute_error(peers, truth), largest(truth), x.dtype)


def arguments(**options: Any) -> list[Any]:
    """Of a call in the middle of a sequence."""
    m = make_model(**options)
    c = m.config
    weights = [w.detach() for w in m.parameters()] + ([m.lm_head.weight.detach()] if c.tie_weights else [])
    caches = [torch.randn(1, 24, 2, c.n_head, c.n_embd // c.n_head) for _ in range(c.n_layer)]
    return [torch.tensor([[3]]), weights, caches, 17, c.bias, c.gelu, 1e-5]


def test_one_two_and_three_threads_give_the_same_bits(threads: Callable[[int], None]) -> None:
    args = arguments(n_embd=320, n_head=5, vocab_size=1001, vocab_multiple=1)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(decode_step(*args))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("options", [{}, {"bias": False}])
def test_opcheck(options: dict[str, Any]) -> None:
    torch.library.opcheck(decode_step, tuple(arguments(**options)), test_utils=("test_schema", "test_faketensor"))


def test_autograd_is_told_that_the_cache_changed() -> None:
    args = arguments()
    before = [cache._version for cache in args[2]]
    decode._decode_step(*args)
    assert [cache._version for cache in args[2]] == [version + 1 for version in before]


def with_argument(at: int, change: Callable[[Any], Any]) -> list[Any]:
    args = arguments()
    args[at] = change(args[at])
    return args


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (lambda: with_argument(0, lambda idx: idx.expand(1, 2)), "idx must be one int64"),
        (lambda: with_argument(0, lambda idx: idx.int()), "idx must be one int64"),
        (lambda: with_argument(0, lambda idx: idx + 13), "there is no such token or position"),
        (lambda: with_argument(0, lambda idx: idx - 4), "there is no such token or position"),
        (lambda: with_argument(3, lambda _: 24), "there is no such token or position"),
        (lambda: with_argument(3, lambda _: -1), "there is no such token or position"),
        (lambda: with_argument(1, lambda w: w[:1]), "there are not enough weights"),
        (lambda: with_argument(1, lambda w: w[:-1]), "there are not enough weights"),
        (lambda: with_argument(1, lambda w: [*w[:2], w[2][1:], *w[3:]]), "a vector has the wrong length"),
        (lambda: with_argument(1, lambda w: [*w[:4], w[4][1:], *w[5:]]), "a matrix has the wrong shape"),
        (lambda: with_argument(1, lambda w: [*w[:-1], w[-1][:, 1:]]), "a matrix has the wrong shape"),
        (lambda: with_argument(1, lambda w: [*w[:-1], w[-1].double()]), "float32"),
        (lambda: with_argument(1, lambda w: [w[0].t().contiguous().t(), *w[1:]]), "contiguous"),
        (lambda: with_argument(2, lambda c: [c[0][:, :17], c[1]]), "a cache must be"),
        (lambda: with_argument(2, lambda c: [c[0].expand(2, -1, -1, -1, -1), c[1]]), "a cache must be"),
        (lambda: with_argument(2, lambda c: [c[0], c[1][..., 1:]]), "a cache must be"),
        (lambda: with_argument(2, lambda c: [c[0], c[1].half()]), "float32"),
        (lambda: with_argument(5, lambda _: "tan"), "approximate must be none or tanh"),
    ],
)
def test_the_kernel_keeps_inside_its_memory(args: Callable[[], list[Any]], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        decode_step(*args())


# When it is taken


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_sequence_without_gradients_is_one_call_a_step(mode: Callable[[], Scope], taken: list[int]) -> None:
    m = make_model()
    m.register_forward_hook(lambda *_: None)  # the model's own forward is called, and so is what hangs on it
    with mode(), use_backend("cpp"):
        read(m, torch.tensor([[1, 2, 3]]))
    assert taken == [0, 1, 2]


class Double(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(m: GPT) -> None:
    attn = m.transformer.h[1].attn
    attn.c_proj = Double(16, 16).eval()
    nn.init.normal_(attn.c_proj.weight)
    nn.init.normal_(attn.c_proj.bias)


def widened(m: GPT) -> None:
    mlp = m.transformer.h[1].mlp
    mlp.c_fc, mlp.c_proj = Linear(16, 80).eval(), Linear(80, 16).eval()
    for p in mlp.parameters():
        nn.init.normal_(p)


class Marked(nn.Parameter):
    """As a weight that is quantised, or a part of one on several GPUs."""


def marked(m: GPT) -> None:
    m.lm_head.weight = Marked(m.lm_head.weight.detach())


class Last(nn.Module):
    """A transformer of another kind: what it adds to an embedding depends on nothing."""

    def __init__(self, wte: nn.Module) -> None:
        super().__init__()
        self.wte = wte

    def forward(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        return self.wte(idx) + 1  # type: ignore[no-any-return]


def another(m: GPT) -> None:
    m.transformer = Last(m.transformer.wte)  # type: ignore[assignment]


def strided(m: GPT) -> None:
    weight = m.transformer.h[0].mlp.c_proj.weight
    weight.data = weight.data.t().contiguous().t()


def patched(m: GPT) -> None:
    forward = m.transformer.h[0].mlp.forward
    m.transformer.h[0].mlp.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[GPT], Any]] = {
    "forward_hook": lambda m: m.transformer.h[0].attn.register_forward_hook(lambda *_: None),
    "forward_pre_hook": lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None),
    "replaced": replaced,
    "widened": widened,
    "another": another,
    "marked": marked,
    "strided": strided,
    "patched": patched,
    "without_a_bias": lambda m: m.transformer.h[0].ln_1.register_parameter("bias", None),
    "in_bf16": lambda m: m.bfloat16(),
    "training": lambda m: m.train(),
    "partly_training": lambda m: m.transformer.h[0].train(),
    "exact_gelu": lambda m: setattr(m.transformer.h[0].mlp, "approximate", "none"),
    "parametrized": lambda m: torch.nn.utils.parametrizations.orthogonal(m.lm_head),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_not_what_its_config_makes_is_called(change: str, taken: list[int]) -> None:
    m, idx = make_model(tie_weights=False), torch.tensor([[1, 2, 3, 4]])
    CHANGES[change](m)
    tolerance = {"atol": 0.5, "rtol": 0.05} if change == "in_bf16" else {}
    with torch.no_grad(), use_backend("cpp"):
        got, _ = read(m, idx)
        torch.testing.assert_close(got, m(idx)[0], **tolerance)
    assert not taken


def test_a_model_with_another_method_is_called(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: 2 * forward(self, x))
    m, idx = make_model(), torch.tensor([[1, 2, 3]])
    with torch.no_grad(), use_backend("cpp"):
        torch.testing.assert_close(read(m, idx)[0], m(idx)[0])
    assert not taken


@pytest.mark.parametrize("name", ["transformer.ln_f", "transformer.h.1.mlp.c_fc", "transformer.h.0.ln_1"])
def test_the_order_in_which_weights_were_registered_is_nothing(name: str, taken: list[int]) -> None:
    m, idx = make_model(), torch.tensor([[1, 2, 3]])
    module = m.get_submodule(name)
    weight = module.weight
    del module.weight
    module.weight = weight  # behind the bias now, as torch's prune and parametrize leave it
    with torch.no_grad(), use_backend("cpp"):
        torch.testing.assert_close(read(m, idx)[0], m(idx)[0])
    assert taken == [0, 1, 2]


def test_what_changes_between_two_steps_counts(taken: list[int]) -> None:
    m, other, cache, seen = make_model(), make_model(), KVCache(2), []
    for p in other.parameters():
        nn.init.normal_(p)
    with torch.no_grad(), use_backend("cpp"):
        m(torch.tensor([[1]]), cache=cache)
        m.load_state_dict(other.state_dict(), assign=True)
        got, _ = m(torch.tensor([[2]]), cache=cache)
        m.transformer.h[0].mlp.register_forward_hook(lambda *_: seen.append(1))
        cache.end = 1  # the same step, by the ops
        torch.testing.assert_close(m(torch.tensor([[2]]), cache=cache)[0], got)
    assert (taken, seen) == ([0, 1], [1])


@pytest.mark.parametrize(
    ("prompt", "scope"),
    [([[1, 2], [3, 4]], nullcontext), ([[1, 2]], lambda: torch.autocast("cpu", torch.bfloat16))],
)
def test_a_cache_of_something_else_is_refused_by_the_ops(prompt: list[list[int]], scope: Callable[[], Scope]) -> None:
    m, cache = make_model(), KVCache(4)
    with torch.no_grad(), use_backend("cpp"):
        with scope():
            m(torch.tensor(prompt), cache=cache)
        with pytest.raises(ValueError, match="attention: k must have"):
            m(torch.tensor([[1]]), cache=cache)


def test_a_model_elsewhere_is_called() -> None:
    with torch.device("meta"):
        m, idx, cache = make_model(), torch.tensor([[1]]), KVCache(1)
    cache.begin(1, None)
    with torch.no_grad(), use_backend("cpp"):
        assert decode.decode_step(m, idx, cache) is None


def test_training_may_begin_in_between(taken: list[int]) -> None:
    m, cache = make_model(dropout=0.5), KVCache(3)
    with torch.no_grad(), use_backend("cpp"):
        m(torch.tensor([[1]]), cache=cache)
        m.train()
        m(torch.tensor([[2]]), cache=cache)
    assert taken == [0]


def test_hooks_on_every_module_see_every_module(taken: list[int]) -> None:
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)), torch.no_grad():
        with use_backend("cpp"):
            read(make_model(), torch.tensor([[1, 2]]))
    assert len(seen) > 20
    assert not taken


@pytest.mark.parametrize(
    "scope",
    [
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.autograd.forward_ad.dual_level,
        lambda: use_backend("torch"),
        lambda: use_backend(attention="torch"),
    ],
)
def test_where_more_is_wanted_than_a_result_ops_run(scope: Callable[[], Scope], taken: list[int]) -> None:
    with torch.no_grad(), use_backend("cpp"), scope():
        got, _ = read(make_model(), torch.tensor([[1, 2, 3]]))
    assert not taken
    assert got.requires_grad == (scope is torch.enable_grad)


def test_several_sequences_and_targets_are_for_the_ops(taken: list[int]) -> None:
    m, idx = make_model(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad(), use_backend("cpp"):
        read(m, idx)
        cache = KVCache(4)
        m(idx[:1], lengths=torch.tensor([2]), cache=cache)
        m(idx[:1, :1], lengths=torch.tensor([3]), cache=cache)
        _, loss = m(idx[:1, :1], idx[:1, 1:2], cache=KVCache(1))
    assert loss is not None
    assert not taken


def test_a_compiler_sees_the_ops(taken: list[int]) -> None:
    m, idx = make_model(), torch.tensor([[1]])
    torch._dynamo.reset()
    with torch.no_grad(), use_backend("cpp"):
        compiled = torch.compile(lambda x: m(x, last_only=True, cache=KVCache(1))[0], backend="aot_eager")(idx)
        assert not taken
        torch.testing.assert_close(compiled, read(m, idx)[0])
    torch._dynamo.reset()
