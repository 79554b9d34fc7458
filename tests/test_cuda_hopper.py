"""attention_fwd_sm90.cu, the forward of attention in Hopper's own instructions: in the emulator, or on a Hopper GPU."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import INTERPRETING
from error_rule import DEVICE, check, sample
from test_attention import heads, peer, peer_qkvpacked, seqlens
from torch import Tensor

from fastgpt import emulator, extension, ops

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KERNEL = "attention_fwd_sm90_kernel"
IS_HOPPER = INTERPRETING or torch.cuda.get_device_capability() == (9, 0)

pytestmark = pytest.mark.usefixtures("poisoned", "asked_for")
only_on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="the kernel needs a GPU of compute capability 9.0")
only_emulated = pytest.mark.skipif(not INTERPRETING, reason="on a GPU there is no emulator to ask")


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT_HOPPER_ATTENTION", "1")


def forward(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """o and lse."""
    named = {"is_causal": True, "dropout_p": 0.0, "scale": 0.2, "seqlens_k": None, "seed": None} | options
    return extension.cuda.op("attention_fwd")(q, k, v, *named.values())


@only_on_hopper
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2, 1, 64, 64, 64), BF16),
        ((1, 2, 65, 129, 40), F16),  # beyond the head size, TMA's zeros
        ((1, 1, 193, 130, 128), BF16),
        ((1, 1, 66, 5, 72), F16),
        ((1, 1, 400, 400, 64), BF16),  # more tiles than there are places for
    ],
)
def test_obeys_the_error_rule(sizes: tuple[int, ...], dtype: torch.dtype, is_causal: bool) -> None:
    check(ops.attention, "cuda", peer, heads(*sizes, dtype=dtype), is_causal=is_causal)


@only_on_hopper
@pytest.mark.parametrize(("sizes", "dtype"), [((1, 2, 130, 140, 64), F16), ((1, 1, 64, 70, 128), BF16)])
def test_dropout_draws_the_references_mask(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    seed = torch.tensor([6], device=DEVICE)
    check(ops.attention, "cuda", peer, heads(*sizes, dtype=dtype), dropout_p=0.2, seed=seed)


@only_on_hopper
@pytest.mark.parametrize("D", [64, 128])
def test_the_statistics_are_the_other_kernels(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the backward, which is the same: queries that see no key among them."""
    inputs = heads(2, 2, 260, 140, D, dtype=BF16)
    _, mine = forward(**inputs)
    monkeypatch.setenv("FASTGPT_HOPPER_ATTENTION", "0")
    _, other = forward(**inputs)
    assert (mine[..., :120] == torch.inf).all()
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@only_on_hopper
def test_any_strides() -> None:
    check(ops.attention_qkvpacked, "cuda", peer_qkvpacked, {"qkv": sample(2, 70, 3, 2, 64, dtype=BF16)})
    apart = {name: sample(64, 2, 3, 72, dtype=F16)[..., :64].permute(1, 2, 0, 3) for name in "qkv"}
    check(ops.attention, "cuda", peer, apart)
    one = {name: sample(1, 64, 1, 64, dtype=F16).transpose(1, 2) for name in "qkv"}  # of one head there is no next
    check(ops.attention, "cuda", peer, one)
    check(ops.attention, "cuda", peer, heads(1, 1, 64, 1, 64, dtype=BF16))


@only_on_hopper
def test_runs_on_a_thread_that_has_called_nothing_of_cuda() -> None:
    inputs, results = heads(1, 1, 64, 64, 64, dtype=BF16), []
    results += forward(**inputs)  # the memory that the thread is given is there already
    thread = threading.Thread(target=lambda: results.extend(forward(**inputs)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@only_emulated
def test_it_does_what_it_can_and_leaves_the_rest() -> None:
    def kernel_of(inputs: dict[str, Tensor], **options: object) -> str:
        with emulator.schedule() as module:
            module.reset_counters()
            forward(**inputs, **options)
            (kernel,) = module.counters()
        return kernel

    for D in (40, 64, 96, 128):
        assert KERNEL in kernel_of(heads(1, 1, 64, 64, D, dtype=BF16))
    shifted = {name: sample(64 * 64 + 1, dtype=BF16)[1:].view(1, 1, 64, 64) for name in "qkv"}
    shared = heads(1, 1, 64, 64, 64, dtype=BF16) | {
        name: sample(1, 1, 64, 64, dtype=BF16).expand(1, 2, 64, 64) for name in "qkv"
    }
    for inputs, options in (
        (heads(1, 1, 64, 64, 32, dtype=BF16), {}),
        (heads(1, 1, 64, 64, 136, dtype=BF16), {}),
        (heads(1, 1, 63, 64, 64, dtype=BF16), {}),
        (heads(1, 1, 64, 64, 64, dtype=F32), {}),
        (heads(1, 1, 64, 64, 64, dtype=BF16), {"seqlens_k": seqlens(5)}),
        (heads(1, 1, 64, 64, 64, dtype=BF16), {"scale": -0.1}),
        (heads(1, 1, 64, 64, 64, dtype=BF16), {"scale": 0.0}),
        (heads(1, 1, 64, 0, 64, dtype=BF16), {}),
        (shifted, {}),
        (shared, {}),
    ):
        assert KERNEL not in kernel_of(inputs, **options)


@only_emulated
@pytest.mark.parametrize("D", [64, 128])
def test_shared_memory_has_no_bank_conflicts(D: int) -> None:
    with emulator.schedule(count_banks=True) as module:
        module.reset_counters()
        forward(**heads(1, 1, 70, 70, D, dtype=BF16))
        (counted,) = module.counters().values()
    assert counted.shared_accesses > 0
    assert counted.bank_conflicts == 0


@only_emulated
def test_what_lies_above_the_diagonal_is_skipped() -> None:
    products = []
    for is_causal in (False, True):
        with emulator.schedule() as module:
            module.reset_counters()
            forward(**heads(1, 1, 768, 768, 64, dtype=BF16), is_causal=is_causal)
            (counted,) = module.counters().values()
        products.append(counted.mma)
    # Of 12 x 6 products of 64 queries and 128 keys those on and below the diagonal: 2 * (1 + 2 + ... + 6).
    assert products[1] * 72 == products[0] * 42


@only_emulated
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("order", "copies", "seed"),
    [("reversed", "lazy", 0), ("random", "eager", 1), ("skewed", "lazy", 2), ("skewed", "eager", 3)],
)
def test_the_schedule_does_not_matter(D: int, is_causal: bool, order: str, copies: str, seed: int) -> None:
    inputs = heads(1, 1, 200, 520, D, dtype=BF16)
    wanted = forward(**inputs, is_causal=is_causal)
    with emulator.schedule(order, copies, seed):
        got = forward(**inputs, is_causal=is_causal)
    for mine, other in zip(got, wanted, strict=True):
        assert torch.equal(mine, other)


def test_what_is_asked_for_in_other_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT_HOPPER_ATTENTION", "yes")
    with pytest.raises(RuntimeError, match="FASTGPT_HOPPER_ATTENTION must be 0 or 1, got 'yes'"):
        forward(**heads(1, 1, 64, 64, 64, dtype=BF16))


@pytest.mark.skipif(IS_HOPPER, reason="this GPU has what the kernel needs")
def test_other_gpus_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"needs a GPU of compute capability 9\.0, and this is one of \d+\.\d"):
        forward(**heads(1, 1, 64, 64, 64, dtype=BF16))
