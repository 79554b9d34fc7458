"""attention and attention_qkvpacked."""

from __future__ import annotations

import philox
import pytest
import torch
import torch.nn.functional as F
from error_rule import BACKENDS, DEVICE, check, check_reference, sample
from torch import Tensor

from fastgpt import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def peer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = True,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """SDPA, one sequence at a time on its valid keys, and only for the queries that see one."""
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    keep = None
    if dropout_p > 0:
        keep = philox.attention_mask((batch, heads, queries, keys), dropout_p, seed)
    outputs = []
    for b in range(batch):
        valid = keys if seqlens_k is None else int(seqlens_k[b])
        blind = min(queries, max(0, queries - valid)) if is_causal else queries if valid == 0 else 0
        sighted, its_k, its_v = q[b : b + 1, :, blind:], k[b : b + 1, :, :valid], v[b : b + 1, :, :valid]
        y = torch.zeros_like(q[b : b + 1])
        if blind < queries:
            rows = queries - blind
            visible = torch.ones(rows, valid, dtype=torch.bool, device=q.device)
            visible = visible.tril(valid - rows) if is_causal else visible
            if keep is None:
                seen = F.scaled_dot_product_attention(sighted, its_k, its_v, attn_mask=visible, scale=scale)
            else:
                scores = (sighted @ its_k.mT) * (width**-0.5 if scale is None else scale)
                probs = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
                seen = torch.where(keep[b : b + 1, :, blind:, :valid], probs, 0.0) / (1 - dropout_p) @ its_v
            y = torch.cat([y[:, :, :blind], seen], 2)
        outputs.append(y + 0 * (its_k.sum() + its_v.sum() + sighted.sum()))
    return torch.cat(outputs) if outputs else q * k.sum() * v.sum()


def peer_qkvpacked(qkv: Tensor, **options: object) -> Tensor:
    return peer(*(x.transpose(1, 2) for x in qkv.unbind(2)), **options).transpose(1, 2)


def heads(
    batch: int, heads: int, queries: int, keys: int, width: int, dtype: torch.dtype = F32, mean: float = 0.5
) -> dict[str, Tensor]:
    return {
        "q": sample(batch, heads, queries, width, dtype=dtype, mean=mean),
        "k": sample(batch, heads, keys, width, dtype=dtype, mean=mean),
        "v": sample(batch, heads, keys, width, dtype=dtype, mean=mean),
    }


def seqlens(*lengths: int) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("sizes", "dtype", "mean"),
    [
        ((1, 1, 1, 1, 8), F32, 0.5),
        ((2, 3, 1, 1, 64), BF16, 0.5),
        ((1, 2, 8, 8, 16), F16, 0.5),
        ((2, 1, 63, 63, 24), F32, 0.5),
        ((1, 2, 64, 64, 32), BF16, 0.5),
        ((2, 2, 65, 65, 64), F32, 1.0),
        ((1, 1, 65, 65, 80), F16, 0.5),
        ((1, 1, 257, 257, 96), BF16, 0.5),
        ((1, 2, 33, 33, 128), F32, 0.5),
        ((1, 1, 64, 64, 160), F16, 0.5),
        ((1, 1, 17, 17, 256), BF16, 0.5),
        ((1, 1, 9, 9, 13), F32, 0.5),
        ((0, 2, 8, 8, 16), F32, 0.5),
    ],
)
def test_obeys_the_error_rule(
    backend: str, is_causal: bool, sizes: tuple[int, ...], dtype: torch.dtype, mean: float
) -> None:
    check(ops.attention, backend, peer, heads(*sizes, dtype=dtype, mean=mean), is_causal=is_causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(
    ("queries", "keys", "dtype"), [(1, 65, F32), (8, 64, BF16), (63, 65, F32), (9, 3, F16), (65, 8, F32), (5, 1, BF16)]
)
def test_queries_and_keys_may_differ_in_number(
    backend: str, is_causal: bool, dropout_p: float, queries: int, keys: int, dtype: torch.dtype
) -> None:
    seed = torch.tensor([77], device=DEVICE) if dropout_p else None
    options = {"is_causal": is_causal, "dropout_p": dropout_p, "seed": seed}
    check(ops.attention, backend, peer, heads(2, 2, queries, keys, 16, dtype=dtype), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("queries", "keys", "lengths", "dtype"),
    [(9, 9, (9, 5, 1), F32), (9, 9, (0, 9, 3), F32), (4, 17, (17, 6, 0), BF16), (12, 7, (7, 6, 1), F16)],
)
def test_seqlens_k_hides_the_keys_beyond(
    backend: str,
    is_causal: bool,
    dropout_p: float,
    queries: int,
    keys: int,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    options = {"is_causal": is_causal, "dropout_p": dropout_p, "seqlens_k": seqlens(*lengths)}
    options["seed"] = torch.tensor([-3], device=DEVICE) if dropout_p else None
    check(ops.attention, backend, peer, heads(3, 2, queries, keys, 24, dtype=dtype), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("keys", "D", "dtype"), [(1, 8, F32), (7, 13, F32), (131, 24, BF16), (66, 64, F16)])
def test_one_query_reads_the_keys_of_a_cache(
    backend: str, is_causal: bool, keys: int, D: int, dtype: torch.dtype
) -> None:
    k, v = sample(3, keys, 2, 2, D, dtype=dtype).permute(2, 0, 3, 1, 4)  # as KVCache has them
    inputs = {"q": sample(3, 1, 2, D, dtype=dtype).transpose(1, 2), "k": k, "v": v}
    check(ops.attention, backend, peer, inputs, is_causal=is_causal, seqlens_k=seqlens(keys, keys // 2, 0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_keys_beyond_seqlens_k_are_never_looked_at(backend: str, is_causal: bool) -> None:
    """Scores of 1e4 there would take all the weight, and their gradients are exactly zero."""
    inputs, lengths = heads(2, 2, 5, 8, 16), seqlens(3, 8)
    inputs["k"][0, :, 3:], inputs["v"][0, :, 3:] = 1e4, -1e4
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    y = ops.attention(**inputs, is_causal=is_causal, seqlens_k=lengths, backend=backend)
    y.backward(sample(*y.shape))
    assert y.abs().max() < 10
    assert (inputs["k"].grad[0, :, 3:] == 0).all()
    assert (inputs["v"].grad[0, :, 3:] == 0).all()
    assert (inputs["v"].grad[0, :, :3] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_queries_that_see_no_key_give_exactly_zero(backend: str, dropout_p: float, dtype: torch.dtype) -> None:
    inputs = {name: x.requires_grad_() for name, x in heads(2, 2, 7, 4, 16, dtype=dtype).items()}
    y = ops.attention(**inputs, dropout_p=dropout_p, seqlens_k=seqlens(4, 0), backend=backend)
    y.backward(sample(*y.shape, dtype=dtype))
    assert (y[0, :, :3] == 0).all()
    assert (y[1] == 0).all()
    assert (y[0, :, 6] != 0).any()
    for name, x in inputs.items():
        assert x.grad.isfinite().all(), name
        assert (x.grad[1] == 0).all(), name
    assert (inputs["q"].grad[0, :, :3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_at_all_give_zero(backend: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in heads(2, 2, 3, 0, 16).items()}
    y = ops.attention(**inputs, is_causal=False, backend=backend)
    y.sum().backward()
    assert y.shape == (2, 2, 3, 16)
    assert (y == 0).all()
    assert (inputs["q"].grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_queries_at_all_give_nothing(backend: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in heads(2, 2, 0, 5, 16).items()}
    y = ops.attention(**inputs, backend=backend)
    y.sum().backward()
    assert y.shape == (2, 2, 0, 16)
    assert (inputs["v"].grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_is_aligned_at_the_bottom_right(backend: str) -> None:
    """With all scores equal, a query gives the mean of the values it sees: 0 .. keys - queries + i."""
    q, k = torch.zeros(1, 1, 3, 8, device=DEVICE), sample(1, 1, 5, 8)
    v = torch.arange(5.0, device=DEVICE).view(1, 1, 5, 1).expand(1, 1, 5, 8)
    y = ops.attention(q, k, v, backend=backend)
    torch.testing.assert_close(y[0, 0, :, 0], torch.tensor([1.0, 1.5, 2.0], device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 0.05, 0.0, -0.3])
def test_uses_scale(backend: str, scale: float) -> None:
    check(ops.attention, backend, peer, heads(2, 2, 9, 9, 16), scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reads_strided_inputs(backend: str, dropout_p: float, dtype: torch.dtype) -> None:
    packed = sample(2, 33, 3, 2, 24, dtype=dtype)
    from_packed = dict(zip("qkv", packed.transpose(1, 3).unbind(2), strict=True))
    with_gaps = {name: x[:, ::2, 3:, 4:20] for name, x in heads(2, 4, 20, 20, 24, dtype=dtype).items()}
    head_last = {name: x.permute(0, 1, 3, 2) for name, x in heads(2, 2, 16, 16, 11, dtype=dtype).items()}
    shared_k = heads(2, 3, 9, 9, 16, dtype=dtype)
    shared_k["k"] = sample(2, 1, 9, 16, dtype=dtype).expand(2, 3, 9, 16)
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    for inputs in (from_packed, with_gaps, head_last, shared_k):
        check(ops.attention, backend, peer, inputs, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_strided_seqlens(backend: str) -> None:
    for lengths in (seqlens(3, 8, 7, 1).view(2, 2)[:, 0], seqlens(5).expand(2)):
        check(ops.attention, backend, peer, heads(2, 2, 9, 9, 16), seqlens_k=lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    q = torch.full((1, 1, 4, 16), 200.0, device=DEVICE)
    y = ops.attention(q, q, sample(1, 1, 4, 16), scale=10.0, is_causal=False, backend=backend)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("sizes", "dropout_p"), [((1, 2, 1, 1, 8), 0.2), ((2, 2, 21, 21, 16), 0.2), ((1, 1, 64, 64, 32), 0.9)]
)
def test_dropout_obeys_the_error_rule(
    backend: str, dtype: torch.dtype, sizes: tuple[int, ...], dropout_p: float
) -> None:
    seed = torch.tensor([2**62 + 12345], device=DEVICE)
    check(ops.attention, backend, peer, heads(*sizes, dtype=dtype), dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "dropout_p"),
    [
        ((1, 1, 3, 1, 8), F32, 0.0),
        ((2, 63, 3, 2, 16), F32, 0.0),
        ((2, 64, 3, 2, 32), BF16, 0.0),
        ((1, 65, 3, 3, 64), F16, 0.0),
        ((2, 19, 3, 2, 24), F32, 0.3),
        ((2, 19, 3, 2, 24), BF16, 0.3),
        ((0, 8, 3, 2, 16), F32, 0.0),
    ],
)
def test_qkvpacked_obeys_the_error_rule(
    backend: str, is_causal: bool, shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float
) -> None:
    seed = torch.tensor([31], device=DEVICE) if dropout_p else None
    options = {"is_causal": is_causal, "dropout_p": dropout_p, "seed": seed}
    check(ops.attention_qkvpacked, backend, peer_qkvpacked, {"qkv": sample(*shape, dtype=dtype)}, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_qkvpacked_takes_seqlens_and_scale_and_strides(backend: str) -> None:
    qkv = sample(3, 20, 3, 2, 32)[:, 2:, :, :, ::2]
    options = {"seqlens_k": seqlens(18, 0, 5), "scale": 0.4}
    check(ops.attention_qkvpacked, backend, peer_qkvpacked, {"qkv": qkv}, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_qkvpacked_is_attention_on_the_unpacked(backend: str) -> None:
    qkv, seed = sample(2, 13, 3, 2, 16), torch.tensor([4], device=DEVICE)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    packed = ops.attention_qkvpacked(qkv, dropout_p=0.4, seed=seed, backend=backend)
    torch.testing.assert_close(
        packed.transpose(1, 2), ops.attention(q, k, v, dropout_p=0.4, seed=seed, backend=backend)
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 8), (2, 2, 17, 17, 16), (2, 2, 5, 9, 24), (2, 2, 9, 5, 24)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_is_pytorch_in_float64(is_causal: bool, sizes: tuple[int, ...], dropout_p: float) -> None:
    seed = torch.tensor([8], device=DEVICE) if dropout_p else None
    options = {"is_causal": is_causal, "dropout_p": dropout_p, "seed": seed}
    check_reference(ops.attention, peer, heads(*sizes), **options)


def test_reference_qkvpacked_is_pytorch_in_float64() -> None:
    options = {"seqlens_k": seqlens(9, 4, 0)}
    check_reference(ops.attention_qkvpacked, peer_qkvpacked, {"qkv": sample(3, 9, 3, 2, 16)}, **options)


def test_reference_passes_gradcheck() -> None:
    inputs = [x.double().requires_grad_() for x in heads(1, 2, 4, 3, 8).values()]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seed = torch.tensor([3], device=DEVICE)
        return ops.attention(q, k, v, dropout_p=0.3, seed=seed, backend="reference")

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_large_half_precision_inputs_do_not_overflow(backend: str, dropout_p: float) -> None:
    q = torch.full((1, 1, 4, 64), 40.0, dtype=torch.float16, device=DEVICE)
    y = ops.attention(q, q, torch.ones_like(q), dropout_p=dropout_p, backend=backend)
    assert y.isfinite().all()
