"""dropout, and the random numbers that every op's mask is made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import philox
import pytest
import torch
from error_rule import BACKENDS, DEVICE, check, check_reference, sample
from torch import Tensor

from fastgpt import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# philox4x32-10 of Random123's tests/kat_vectors: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x299F31D0A4093822, -0x123456789ABCDEF]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def seed_tensor(seed: int) -> Tensor:
    return torch.tensor([seed], dtype=torch.int64, device=DEVICE)


def signed(low: int, high: int) -> int:
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, result: str) -> None:
    assert philox.philox(words(counter), words(key)) == words(result)
    tensors = tuple(torch.tensor([word], device=DEVICE) for word in words(counter))
    got = reference.philox_4x32(tensors, seed_tensor(signed(*words(key))))
    assert tuple(int(word) for word in got) == words(result)


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_agrees_with_plain_integers(seed: int) -> None:
    edges = [0, 1, 2, 3, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
    counters = torch.cartesian_prod(*[torch.tensor(edges, device=DEVICE)] * 2)
    c0, c1 = counters.unbind(1)
    c2, c3 = c1.flip(0), (c0 * 7 + 5) & 0xFFFFFFFF
    got = torch.stack(reference.philox_4x32((c0, c1, c2, c3), seed_tensor(seed)), 1).tolist()
    columns = zip(*(c.tolist() for c in (c0, c1, c2, c3)), strict=True)
    assert [tuple(row) for row in got] == [philox.philox(counter, philox.key_of(seed)) for counter in columns]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5, 7), (2, 3, 11), (0,), (3, 0)])
def test_elementwise_mask_is_the_defined_one(seed: int, shape: tuple[int, ...]) -> None:
    got = reference.dropout_mask(shape, 0.4, seed_tensor(seed))
    assert got.dtype == torch.bool
    assert torch.equal(got, philox.elementwise_mask(shape, 0.4, seed_tensor(seed)))


@pytest.mark.parametrize("seed", SEEDS[-3:])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 4, 8), (3, 1, 2, 65), (0, 2, 3, 4), (1, 1, 3, 0)])
def test_attention_mask_is_the_defined_one(seed: int, shape: tuple[int, int, int, int]) -> None:
    got = reference.attention_dropout_mask(shape, 0.4, seed_tensor(seed))
    assert got.dtype == torch.bool
    assert torch.equal(got, philox.attention_mask(shape, 0.4, seed_tensor(seed)))


@pytest.fixture
def block_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[int, int], Tensor]]:
    """The function that makes a part of a mask, so that parts of masks too large for memory can be looked at."""

    def block_of(make_mask: Callable[..., Tensor], shape: tuple[int, ...], seed: int) -> Callable[[int, int], Tensor]:
        blocks = []

        def keep_the_block(rows: int, width: int, device: object, block: Callable[[int, int], Tensor]) -> Tensor:
            blocks.append(block)
            return torch.zeros(1, dtype=torch.bool).expand(rows * width * 4)

        with monkeypatch.context() as patch:
            patch.setattr(reference, "_in_blocks", keep_the_block)
            make_mask(shape, 0.5, seed_tensor(seed))
        return blocks[0]

    return block_of


def test_elementwise_counters_go_beyond_32_bits(block_of: Callable[..., Callable[[int, int], Tensor]]) -> None:
    block = block_of(reference.dropout_mask, (2**18, 2**18), 99)
    for quad in (2**30, 2**32 - 2, 2**33 + 5):
        got = block(quad, quad + 4).flatten().tolist()
        assert got == [philox.elementwise_keeps(n, 0.5, 99) for n in range(4 * quad, 4 * quad + 16)]


def test_attention_counters_go_beyond_32_bits(block_of: Callable[..., Callable[[int, int], Tensor]]) -> None:
    block = block_of(reference.attention_dropout_mask, (2**12, 2**12, 2**12, 7), 99)
    for row in (2**31, 2**32 - 2, 2**34 + 5):
        got = block(row, row + 4).flatten(1)[:, :7].tolist()
        assert got == [[philox.attention_keeps(r, key, 0.5, 99) for key in range(7)] for r in range(row, row + 4)]


@pytest.mark.parametrize("block", [1, 3, 16, 1000])
def test_masks_do_not_depend_on_the_blocks_they_are_made_in(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = seed_tensor(7)
    elementwise = reference.dropout_mask((5, 31), 0.3, seed)
    attention = reference.attention_dropout_mask((2, 3, 5, 9), 0.3, seed)
    monkeypatch.setattr(reference, "_CPU_BLOCK", block)
    assert torch.equal(reference.dropout_mask((5, 31), 0.3, seed), elementwise)
    assert torch.equal(reference.attention_dropout_mask((2, 3, 5, 9), 0.3, seed), attention)


def test_the_mask_is_right_on_both_sides_of_a_block_boundary() -> None:
    boundary = reference._CPU_BLOCK * 4
    mask = reference.dropout_mask((boundary + 13,), 0.5, seed_tensor(3))
    for n in (*range(boundary - 9, boundary + 13), boundary // 2):
        assert bool(mask[n]) == philox.elementwise_keeps(n, 0.5, 3), n
    rows = reference._CPU_BLOCK // 2 + 3
    mask = reference.attention_dropout_mask((1, 1, rows, 8), 0.5, seed_tensor(3)).view(rows, 8)
    for row in range(rows - 6, rows):
        assert mask[row].tolist() == [philox.attention_keeps(row, key, 0.5, 3) for key in range(8)], row


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_is_p(p: float) -> None:
    n = 1 << 18
    five_deviations = 5 * math.sqrt(p * (1 - p) / n)
    elementwise = reference.dropout_mask((n,), p, seed_tensor(11))
    attention = reference.attention_dropout_mask((4, 4, 128, 128), p, seed_tensor(11))
    for mask in (elementwise, attention):
        assert abs(1 - mask.double().mean().item() - p) < five_deviations
        pairs = (mask.flatten()[1:] == mask.flatten()[:-1]).double().mean().item()
        assert abs(pairs - (p * p + (1 - p) ** 2)) < 5 / math.sqrt(n)


def test_seeds_give_different_masks() -> None:
    masks = [reference.dropout_mask((64,), 0.5, seed_tensor(seed)).tolist() for seed in SEEDS]
    assert len({tuple(mask) for mask in masks}) == len(SEEDS)


def peer(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.where(philox.elementwise_mask(tuple(x.shape), p, seed), x, 0.0) / (1 - p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "dtype", "p"),
    [
        ((), F32, 0.5),
        ((1,), BF16, 0.1),
        ((4, 63), F32, 0.3),
        ((3, 5, 64), BF16, 0.1),
        ((7, 65), F16, 0.9),
        ((2, 257), F32, 1e-3),
        ((2, 3, 4, 5), F16, 0.5),
        ((3, 5, 64), F32, 0.2),
        ((3, 2052), F32, 0.2),
        ((0, 8), F32, 0.5),
    ],
)
def test_obeys_the_error_rule(backend: str, shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    check(ops.dropout, backend, peer, {"x": sample(*shape, dtype=dtype)}, p=p, seed=seed_tensor(-12345678901))


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_count_in_logical_order_whatever_the_strides(backend: str) -> None:
    for x in (sample(33, 6).t(), sample(6, 66)[:, ::2], sample(6, 1).expand(6, 33), sample(2, 5, 9).permute(2, 0, 1)):
        check(ops.dropout, backend, peer, {"x": x}, p=0.4, seed=seed_tensor(17))


@pytest.mark.parametrize("threads", [1, 2])
def test_cpp_drops_the_same_elements_on_any_number_of_threads(threads: int) -> None:
    x, seed = sample(7, 9001), seed_tensor(23)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y = ops.dropout(x, 0.2, seed=seed, backend="cpp")
    torch.set_num_threads(before)
    assert torch.equal(y != 0, reference.dropout_mask((7, 9001), 0.2, seed))


@pytest.mark.parametrize("shape", [(), (7, 63)])
def test_reference_is_pytorch_in_float64(shape: tuple[int, ...]) -> None:
    check_reference(ops.dropout, peer, {"x": sample(*shape)}, p=0.3, seed=seed_tensor(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_is_divided_by_one_minus_p(backend: str) -> None:
    y = ops.dropout(torch.ones(1000, device=DEVICE), 0.75, seed=seed_tensor(1), backend=backend)
    assert set(y.tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_p_of_zero_gives_x_itself(backend: str) -> None:
    x = sample(5)
    state = torch.get_rng_state()
    assert ops.dropout(x, 0.0, backend=backend) is x
    assert torch.equal(torch.get_rng_state(), state)


def elementwise_drops(backend: str, seed: Tensor | None) -> Tensor:
    return ops.dropout(torch.ones(9, 31, device=DEVICE), 0.5, seed=seed, backend=backend)


def norm_drops(backend: str, seed: Tensor | None) -> Tensor:
    ones = torch.ones(9, 31, device=DEVICE)
    return ops.add_layer_norm(ones, ones * 0, ones[0], dropout_p=0.5, seed=seed, backend=backend)[1]


def attention_drops(backend: str, seed: Tensor | None) -> Tensor:
    """With all scores equal and an identity for v, the output is the dropped weights."""
    q = torch.zeros(2, 2, 11, 11, device=DEVICE)
    v = torch.eye(11, device=DEVICE).expand(2, 2, 11, 11)
    return ops.attention(q, q, v, is_causal=False, dropout_p=0.5, seed=seed, backend=backend)


def packed_attention_drops(backend: str, seed: Tensor | None) -> Tensor:
    eye = torch.eye(11, device=DEVICE).view(1, 11, 1, 11).expand(2, 11, 2, 11)
    qkv = torch.stack([eye * 0, eye * 0, eye], 2)
    return ops.attention_qkvpacked(qkv, is_causal=False, dropout_p=0.5, seed=seed, backend=backend).transpose(1, 2)


DROPPERS = [elementwise_drops, norm_drops, attention_drops, packed_attention_drops]
droppers = pytest.mark.parametrize("drops", DROPPERS, ids=lambda drops: drops.__name__)


@droppers
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_drops_the_defined_elements(drops: Callable[..., Tensor], backend: str) -> None:
    got = drops(backend, seed_tensor(41)) != 0
    mask_of = philox.elementwise_mask if got.dim() == 2 else philox.attention_mask
    assert torch.equal(got, mask_of(tuple(got.shape), 0.5, seed_tensor(41)))


@droppers
def test_without_a_seed_manual_seed_repeats_the_mask_in_every_backend(drops: Callable[..., Tensor]) -> None:
    masks = []
    for backend in BACKENDS:
        torch.manual_seed(5)
        masks.append([drops(backend, None) != 0 for _ in range(3)])
    for first, *others in zip(*masks, strict=True):
        for other in others:
            assert torch.equal(first, other)
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0][1], masks[0][2])
    torch.manual_seed(6)
    assert not torch.equal(drops(BACKENDS[0], None) != 0, masks[0][0])


@droppers
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_given_leaves_the_generator_alone(drops: Callable[..., Tensor], backend: str) -> None:
    state = torch.get_rng_state()
    drops(backend, seed_tensor(1))
    assert torch.equal(torch.get_rng_state(), state)
    drops(backend, None)
    assert DEVICE.type != "cpu" or not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_passes_where_the_value_did(backend: str) -> None:
    x = torch.ones(40, device=DEVICE, requires_grad=True)
    y = ops.dropout(x, 0.5, backend=backend)
    y.backward(torch.full_like(y, 3.0))
    assert torch.equal(x.grad, y.detach() * 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_infinity_is_zero(backend: str) -> None:
    y = ops.dropout(torch.full((64,), torch.inf, device=DEVICE), 0.5, seed=seed_tensor(1), backend=backend)
    assert set(y.tolist()) == {0.0, math.inf}
