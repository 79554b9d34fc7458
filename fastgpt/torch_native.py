"""Every op with PyTorch's own fused functions: the "torch" backend, and the peer in benchmarks.

Functions here are differentiable and take checked arguments, in the order of ``fastgpt.reference``. When an op drops,
the mask is the one ``fastgpt.reference`` defines, never the function's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt import reference
from fastgpt.reference import attention_dropout_mask, drop, dropout_mask, hidden_keys

# linear_cross_entropy makes its logits in blocks of rows of at most this many (256 MiB in fp32).
LOGITS_AT_ONCE = 1 << 26


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    if dropout_p > 0:
        # SDPA takes no dropout mask from outside, so dropping needs the (B, H, Tq, Tk) matrix.
        assert seed is not None
        scores = (q * scale) @ k.mT  # scaled first: the product may be beyond fp16
        hidden = hidden_keys(q.shape[2], k.shape[2], is_causal, seqlens_k, q.device)
        keep = attention_dropout_mask(tuple(scores.shape), dropout_p, seed)
        return drop(_masked_softmax(scores.float(), hidden), keep, dropout_p).to(v.dtype) @ v
    if scale <= 0:
        # SDPA's CPU kernel gives NaN then, or takes the wrong maximum.
        q, scale = q * scale, 1.0
    if seqlens_k is None and (not is_causal or q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    # SDPA's own causal mask is aligned at the top left; ours at the bottom right, as decoding with a cache needs.
    hidden = hidden_keys(q.shape[2], k.shape[2], is_causal, seqlens_k, q.device)
    assert hidden is not None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=scale)


def attention_qkvpacked(
    qkv: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    # (B, T, 3, H, D) -> three of (B, H, T, D); taken apart first, so that their gradients are put together in place
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return attention(q, k, v, is_causal, dropout_p, scale, seqlens_k, seed).transpose(1, 2)


def softmax(x: Tensor, scale: float, is_causal: bool) -> Tensor:
    hidden = hidden_keys(x.shape[-2], x.shape[-1], True, None, x.device) if is_causal else None
    # Scaled in fp32: in fp16 the product may overflow.
    return _masked_softmax(x.float() * scale if scale != 1 else x, hidden).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if weight.dtype == x.dtype:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    # PyTorch's CUDA kernel takes no half-precision x beside fp32 parameters, and its CPU kernel sums their gradients in
    # half precision (1% off at 33 rows in bf16): both go to fp32.
    bias = bias if bias is None else bias.float()
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    residual_out = dropout(x, dropout_p, seed) + residual
    return layer_norm(residual_out, weight, bias, eps).to(x.dtype), residual_out


def gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    if x.shape[0] * weight.shape[0] <= LOGITS_AT_ONCE:
        return cross_entropy(F.linear(x, weight), targets, ignore_index)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _BlockedLinearCrossEntropy.apply(x, weight, targets, ignore_index)
    total, count = _blocked_linear_cross_entropy(x, weight, targets, ignore_index, None, None)
    return total / count


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if p == 0:
        return x
    assert seed is not None
    return drop(x, dropout_mask(tuple(x.shape), p, seed), p)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    if torch.compiler.is_compiling():
        # The fused kernel cannot be traced with a tensor for its lr; the compiler fuses the plain formula instead.
        reference.adamw_(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay)
        return
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [step] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def adamw_limit(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], *_: Any
) -> str | None:
    """Why the fused kernel cannot take these lists, or None."""
    dtype = params[0].dtype
    for tensors in (params, grads, exp_avgs, exp_avg_sqs):
        for x in tensors:
            if x.dtype != dtype:
                return "PyTorch's fused AdamW needs params, grads and moments of one dtype"
            if not x.is_contiguous():
                return "PyTorch's fused AdamW reads memory as it lies, and so needs contiguous tensors"
    return None


def clip_grad_norm_(grads: list[Tensor], max_norm: float) -> Tensor:
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([grad.float() for grad in grads])))
    torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def _masked_softmax(x: Tensor, hidden: Tensor | None) -> Tensor:
    if hidden is None:
        return torch.softmax(x, dim=-1)
    # softmax of a row of -inf is NaN, and so is its gradient: a row that sees no key stays unmasked until after it.
    blind = hidden.all(-1, keepdim=True)
    x = x.masked_fill(hidden & ~blind, -torch.inf)
    return torch.softmax(x, dim=-1).masked_fill(blind, 0.0)


class _BlockedLinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients beside the loss, so that no block of logits outlives its turn and none is made twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        total, count = _blocked_linear_cross_entropy(x, weight, targets, ignore_index, dx, dweight)
        ctx.save_for_backward(dx, dweight, count)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dweight, count = ctx.saved_tensors
        factor = torch.where(count == 0, 0.0, grads[0] / count)  # as PyTorch: no target, no gradient
        # In fp32: a GPU would round the factor to the dtype of dx first.
        return (dx.float() * factor).to(dx.dtype), (dweight * factor).to(ctx.weight_dtype), None, None


def _blocked_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dx: Tensor | None, dweight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The summed loss and the number of targets counted in it; fills the sum's gradients where asked for them.

    The gradients are left undivided: 1 / count would take fp16 below its smallest normal number.
    """
    counted = targets != ignore_index
    total = torch.zeros((), device=x.device)
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    for start in range(0, x.shape[0], rows):
        block = slice(start, start + rows)
        logits = F.linear(x[block], weight).float()
        total = total + F.cross_entropy(logits, targets[block], ignore_index=ignore_index, reduction="sum")
        if dx is None or dweight is None:
            continue
        hit = torch.where(counted[block], targets[block], 0).unsqueeze(-1)
        dlogits = torch.softmax(logits, dim=-1).scatter_add(-1, hit, -torch.ones_like(hit, dtype=torch.float32))
        dlogits = dlogits.masked_fill(~counted[block].unsqueeze(-1), 0.0).to(x.dtype)
        dx[block] = dlogits @ weight
        # Shrunk by a power of two, so that a sum over all rows of the block stays within fp16.
        shrink = 2.0 ** -len(dlogits).bit_length()
        dweight += (dlogits.mT @ (x[block] * shrink)).float() / shrink
    return total, counted.sum()
