"""The CUDA attention kernels in the emulator: bank conflicts, skipped tiles, any address, any schedule."""

from __future__ import annotations

import pytest
import torch
from error_rule import DEVICE, check, sample
from test_attention import heads, peer, peer_qkvpacked, seqlens
from torch import Tensor

from fastgpt import emulator, extension, ops

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not emulator.requested(), reason="on a GPU there is no emulator to ask"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# A head size of each kernel that is compiled.
HEADDIMS = {F32: (64, 128, 256), BF16: (32, 64, 96, 128, 256), F16: (64,)}
CASES = [(dtype, D) for dtype, sizes in HEADDIMS.items() for D in sizes]


def run(q: Tensor, k: Tensor, v: Tensor, do: Tensor, **options: object) -> list[Tensor]:
    """o, lse, dq, dk, dv."""
    named = {"is_causal": True, "dropout_p": 0.0, "scale": 0.2, "seqlens_k": None, "seed": None} | options
    o, lse = extension.cuda.op("attention_fwd")(q, k, v, *named.values())
    return [o, lse, *extension.cuda.op("attention_bwd")(do, q, k, v, o, lse, *named.values())]


def tensors(*sizes: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and do."""
    qkv = heads(*sizes, dtype=dtype)
    return [*qkv.values(), sample(*qkv["q"].shape, dtype=dtype)]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize(("dtype", "D"), CASES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_shared_memory_has_no_bank_conflicts(dtype: torch.dtype, D: int, dropout_p: float) -> None:
    seed = torch.tensor([1], device=DEVICE) if dropout_p else None
    with emulator.schedule(count_banks=True) as module:
        module.reset_counters()
        run(*tensors(1, 1, 70, 70, D, dtype=dtype), dropout_p=dropout_p, seed=seed)
        counters = module.counters()
    assert len(counters) == 4  # the forward, delta, dk and dv, dq
    for kernel, counted in counters.items():
        assert counted.shared_accesses > 0 or "delta" in kernel
        assert counted.bank_conflicts == 0, kernel


@pytest.mark.parametrize("D", [32, 64, 128])
def test_causal_kernels_skip_what_lies_above_the_diagonal(D: int) -> None:
    products = {}
    with emulator.schedule() as module:
        for is_causal in (False, True):
            module.reset_counters()
            run(*tensors(1, 1, 384, 384, D, dtype=BF16), is_causal=is_causal)
            products[is_causal] = {kernel: counted.mma for kernel, counted in module.counters().items() if counted.mma}
    assert len(products[False]) == 3
    for kernel, full in products[False].items():
        assert 0.5 < products[True][kernel] / full < 0.6, kernel


def test_keys_beyond_seqlens_k_cost_nothing() -> None:
    products = []
    with emulator.schedule() as module:
        for lengths in (None, seqlens(0, 64)):
            module.reset_counters()
            run(*tensors(2, 1, 128, 128, 64, dtype=BF16), is_causal=False, seqlens_k=lengths)
            products.append(sum(counted.mma for counted in module.counters().values()))
    assert products[1] * 4 == products[0]


@pytest.mark.parametrize(("dtype", "D"), [*CASES, (BF16, 80), (F32, 20)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_nan_beyond_seqlens_k_is_never_seen(dtype: torch.dtype, D: int, is_causal: bool) -> None:
    lengths = seqlens(0, 3, 67)
    q, k, v, do = tensors(3, 1, 9, 70, D, dtype=dtype)
    clean = [x.clone() for x in (k, v)]
    for b, valid in enumerate(lengths.tolist()):
        k[b, :, valid:], v[b, :, valid:] = torch.nan, torch.nan
        for x in clean:
            x[b, :, valid:] = 0
    got = run(q, k, v, do, is_causal=is_causal, seqlens_k=lengths)
    wanted = run(q, *clean, do, is_causal=is_causal, seqlens_k=lengths)
    for mine, other in zip(got, wanted, strict=True):
        assert torch.equal(bits(mine), bits(other))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_queries_that_see_no_key_have_an_infinite_lse(dtype: torch.dtype) -> None:
    o, lse, *gradients = run(*tensors(2, 1, 7, 4, 16, dtype=dtype), seqlens_k=seqlens(4, 0))
    assert (lse[0, 0, :3] == torch.inf).all()
    assert lse[0, 0, 3:].isfinite().all()
    assert (lse[1] == torch.inf).all()
    assert (o[1] == 0).all()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_queries_that_see_one_key_give_it_no_gradient(dtype: torch.dtype) -> None:
    """Their weight is 1 whatever the score; in dq and dk what is left of delta's rounding would be all there is."""
    for options in ({"is_causal": True}, {"is_causal": False, "seqlens_k": seqlens(1)}):
        q, k, v, do = tensors(1, 1, 65, 65, 64, dtype=dtype)
        _, _, dq, dk, _ = run(q, k, v, do, dropout_p=0.5, seed=torch.tensor([9], device=DEVICE), **options)
        assert (dq[0, 0, 0] == 0).all()
        if not options["is_causal"]:
            assert (dq == 0).all()
            assert (dk == 0).all()


@pytest.mark.parametrize(("dtype", "D"), [(BF16, 64), (F16, 128), (BF16, 160), (F32, 64), (F32, 100), (F32, 160)])
def test_long_sequences_obey_the_error_rule(dtype: torch.dtype, D: int) -> None:
    """More than a tile of queries and keys, the last not whole, and a diagonal that begins and ends tiles by one."""
    seed = torch.tensor([6], device=DEVICE)
    check(ops.attention, "cuda", peer, heads(1, 1, 130, 131, D, dtype=dtype), dropout_p=0.2, seed=seed)
    check(ops.attention, "cuda", peer, heads(1, 2, 131, 67, D, dtype=dtype), is_causal=False, scale=-0.1)


@pytest.mark.parametrize(("dtype", "D"), [(BF16, 64), (BF16, 256), (F32, 64)])
def test_blocks_of_queries_that_see_no_key(dtype: torch.dtype, D: int) -> None:
    check(ops.attention, "cuda", peer, heads(1, 1, 270, 5, D, dtype=dtype))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("D", [1, 3, 30, 61, 100, 255])
def test_head_sizes_that_no_vector_divides(dtype: torch.dtype, D: int) -> None:
    check(ops.attention, "cuda", peer, heads(1, 2, 18, 21, D, dtype=dtype))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_odd_strides_and_addresses(dtype: torch.dtype) -> None:
    """Rows that 16-byte copies cannot take: the first element is the second of its memory, or a row is 33 long."""
    shifted = {name: sample(2 * 2 * 19 * 32 + 1, dtype=dtype)[1:].view(2, 2, 19, 32) for name in "qkv"}
    odd_rows = {name: sample(2, 2, 19, 33, dtype=dtype)[..., :32] for name in "qkv"}
    odd_heads = {name: sample(2, 2, 19 * 32 + 1, dtype=dtype)[..., 1:].unflatten(2, (19, 32)) for name in "qkv"}
    one_odd = heads(2, 2, 19, 19, 32, dtype=dtype) | {"v": shifted["v"]}
    for inputs in (shifted, odd_rows, odd_heads, one_odd):
        check(ops.attention, "cuda", peer, inputs)


@pytest.mark.parametrize(("dtype", "D"), [(BF16, 64), (BF16, 20), (BF16, 13), (F32, 12), (F32, 7)])
def test_packed_gradients_lie_in_one_buffer(dtype: torch.dtype, D: int) -> None:
    """Parts of a packed tensor with odd D start anywhere, and what is written must stay between its neighbours."""
    check(ops.attention_qkvpacked, "cuda", peer_qkvpacked, {"qkv": sample(1, 35, 3, 2, D, dtype=dtype)})


SCHEDULES = [
    (order, copies, seed)
    for order in ("in_order", "reversed", "random", "skewed")
    for copies in ("eager", "lazy")
    for seed in ((0,) if order in ("in_order", "reversed") else (1, 2, 3))
]


@pytest.fixture(scope="module", params=[(BF16, 64), (BF16, 256), (F32, 64)], ids=lambda case: f"{case[0]}-{case[1]}")
def reference_run(request: pytest.FixtureRequest) -> tuple[list[Tensor], dict[str, object], list[Tensor]]:
    dtype, D = request.param
    torch.manual_seed(0)
    inputs = tensors(1, 1, 70, 130, D, dtype=dtype)
    options = {"dropout_p": 0.1, "seed": torch.tensor([5], device=DEVICE), "seqlens_k": seqlens(127)}
    return inputs, options, run(*inputs, **options)


@pytest.mark.parametrize(("order", "copies", "seed"), SCHEDULES)
def test_the_schedule_does_not_matter(
    reference_run: tuple[list[Tensor], dict[str, object], list[Tensor]], order: str, copies: str, seed: int
) -> None:
    inputs, options, wanted = reference_run
    with emulator.schedule(order, copies, seed=seed):
        got = run(*inputs, **options)
    for mine, other in zip(got, wanted, strict=True):
        assert torch.equal(bits(mine), bits(other))


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(RuntimeError, match="at most 256"):
        run(*tensors(1, 1, 2, 2, 257, dtype=BF16))
    x = torch.empty(1, 1, 1, 8).expand(1, 1, 1 << 30, 8)
    with pytest.raises(RuntimeError, match="shorter than 2\\^30"):
        run(x[:, :, :1], x, x, x[:, :, :1])
