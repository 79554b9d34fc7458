"""Every op in plain tensor algebra: the "reference" backend, and the truth that tests compare against.

Each function follows its formula, one tensor operation a line, so that it can be read beside the paper. Half-precision
inputs are computed in fp32 and rounded once at the end; float64 stays float64, which is how tests get their truth.
Functions here are differentiable and take checked arguments: the public ops in ``fastgpt.ops`` do the checking.

Random numbers are defined here too (Philox 4x32-10, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
2011). Every backend reproduces these masks bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Counters per block of a mask made on the CPU. The ten rounds then run inside the L2 cache (8 bytes a counter and
# word), 10 times faster than if each of their 100 operations swept a whole attention mask through memory.
_CPU_BLOCK = 1 << 16


def philox_4x32(counter: tuple[Tensor | int, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four random 32-bit words for each 128-bit counter.

    Args:
        counter: four int64 tensors (or ints) of values below 2^32 that broadcast together, low word first.
        seed: int64, one element; its low and high 32 bits are the key.
    Returns:
        Four int64 tensors of values below 2^32.
    """
    seed = seed.reshape(())
    rounds = torch.arange(_ROUNDS, device=seed.device)
    keys0 = (seed + rounds * _KEY_STEPS[0]) & _WORD
    keys1 = ((seed >> 32) + rounds * _KEY_STEPS[1]) & _WORD
    c0, c1, c2, c3 = (torch.as_tensor(word, device=seed.device) for word in counter)
    for r in range(_ROUNDS):
        # A product of two 32-bit words wraps past int64's sign, which leaves its 64 bits right; the shift then drags
        # the sign in from above, and the mask takes it off. Low halves keep their high bits until the next mask.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) ^ c1 ^ keys0[r]) & _WORD, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ keys1[r]) & _WORD, p0
    return c0, c1 & _WORD, c2, c3 & _WORD


def dropout_threshold(p: float) -> int:
    """The 32-bit word below which an element is dropped with probability ``p``."""
    return int(p * 2**32)


def dropout_mask(shape: tuple[int, ...], p: float, seed: Tensor) -> Tensor:
    """True where an elementwise dropout keeps its element: bool, of ``shape``, on ``seed``'s device.

    Element n (in row-major order) takes word n % 4 of counter (low, high of n // 4, 0, 0).
    """
    numel = math.prod(shape)

    def block(start: int, stop: int) -> Tensor:
        n = torch.arange(start, stop, device=seed.device)
        return _keep((n & _WORD, n >> 32, 0, 0), p, seed)

    return _in_blocks((numel + 3) // 4, 1, seed.device, block).flatten()[:numel].view(shape)


def attention_dropout_mask(shape: tuple[int, ...], p: float, seed: Tensor) -> Tensor:
    """True where attention keeps a probability: bool, of ``shape`` (B, H, Tq, Tk), on ``seed``'s device.

    Element (row, key), row = (b * H + h) * Tq + query, takes word key % 4 of counter (key // 4, low, high of row, 0).
    """
    B, H, Tq, Tk = shape
    quads = (Tk + 3) // 4
    key = torch.arange(quads, device=seed.device)

    def block(start: int, stop: int) -> Tensor:
        row = torch.arange(start, stop, device=seed.device)[:, None]
        return _keep((key, row & _WORD, row >> 32, 0), p, seed)

    return _in_blocks(B * H * Tq, quads, seed.device, block).view(B, H, Tq, quads * 4)[..., :Tk]


def _keep(counter: tuple[Tensor | int, ...], p: float, seed: Tensor) -> Tensor:
    threshold = dropout_threshold(p)
    return torch.stack([word >= threshold for word in philox_4x32(counter, seed)], dim=-1)


def _in_blocks(rows: int, width: int, device: torch.device, block: Callable[[int, int], Tensor]) -> Tensor:
    """``block(0, rows)``, on a CPU in pieces of about ``_CPU_BLOCK`` counters (the compiler fuses, and needs none)."""
    if device.type != "cpu" or torch.compiler.is_compiling() or rows * width <= _CPU_BLOCK:
        return block(0, rows)
    step = max(1, _CPU_BLOCK // width)
    return torch.cat([block(start, min(start + step, rows)) for start in range(0, rows, step)])


# ---------------------------------------------------------------------------------------------------------------------
# Ops
# ---------------------------------------------------------------------------------------------------------------------


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
    """softmax(q k^T * scale) v with the whole (B, H, Tq, Tk) matrix in memory."""
    scores = (_acc(q) * scale) @ _acc(k).mT  # (B, H, Tq, Tk)
    hidden = hidden_keys(q.shape[2], k.shape[2], is_causal, seqlens_k, q.device)
    probs = _masked_softmax(scores, hidden)
    if dropout_p > 0:
        assert seed is not None
        probs = drop(probs, attention_dropout_mask(tuple(probs.shape), dropout_p, seed), dropout_p)
    return (probs @ _acc(v)).to(q.dtype)


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
    return _masked_softmax(_acc(x) * scale, hidden).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    mean = _acc(x).mean(-1, keepdim=True)
    mean = mean + (_acc(x) - mean).detach().mean(-1, keepdim=True)  # what the first sum lost to rounding
    centred = _acc(x) - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centred * rstd * _acc(weight)
    return (y if bias is None else y + _acc(bias)).to(x.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dropped = dropout(_acc(x), dropout_p, seed)
    total = dropped + _acc(residual)
    # The sum is normalised before it is rounded to the dtype that the residual stream is kept in. The view gathers the
    # norm's gradients, which nearly cancel, before they are added to the stream's.
    y = layer_norm(total.view_as(total), weight, bias, eps).to(x.dtype)
    return y, total.to(torch.promote_types(x.dtype, residual.dtype))


def gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    z = _acc(x) if bias is None else _acc(x) + _acc(bias)
    if approximate == "tanh":
        gate = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))
    else:
        gate = torch.erf(z * math.sqrt(0.5))
    return (0.5 * z * (1 + gate)).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    z = _acc(logits) - _acc(logits).detach().amax(-1, keepdim=True)
    lse = z.exp().sum(-1).log()
    counted = targets != ignore_index
    picked = z.gather(-1, torch.where(counted, targets, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, lse - picked, 0.0).sum() / counted.sum()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    return cross_entropy(_acc(x) @ _acc(weight).mT, targets, ignore_index)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if p == 0:
        return x
    assert seed is not None
    return drop(_acc(x), dropout_mask(tuple(x.shape), p, seed), p).to(x.dtype)


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
    beta1, beta2 = betas
    step, lr = step.reshape(()), lr.reshape(())
    correction1, correction2 = 1 - beta1 ** step.double(), 1 - beta2 ** step.double()
    kept = 1 - lr.double() * weight_decay
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = _acc(grad)
        # _acc gives fp32 and float64 as they are, to be changed in place; half precision is rounded back by copy_.
        first = _acc(exp_avg).mul_(beta1).add_(g, alpha=1 - beta1)
        second = _acc(exp_avg_sq).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (first / correction1).div_((second / correction2).sqrt_().add_(eps))
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)
        param.copy_(_acc(param).mul_(kept).sub_(update.mul_(lr)))


def clip_grad_norm_(grads: list[Tensor], max_norm: float) -> Tensor:
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(_acc(grad)) for grad in grads]))
    coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(coefficient)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Shared pieces
# ---------------------------------------------------------------------------------------------------------------------


def hidden_keys(
    seqlen_q: int, seqlen_k: int, is_causal: bool, seqlens_k: Tensor | None, device: torch.device
) -> Tensor | None:
    """True where a query may not see a key: (Tq, Tk), or (B, 1, Tq, Tk) with ``seqlens_k``; None if all is seen.

    Query i sees keys up to i + valid - Tq, valid being Tk or the sequence's entry of ``seqlens_k``.
    """
    if seqlens_k is None:
        if not is_causal:
            return None
        return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device).triu(1 + seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device)
    last = seqlens_k.long().view(-1, 1, 1, 1) - 1  # (B, 1, 1, 1)
    if is_causal:
        # A query of a sequence with more queries than keys may see none: its last key lies below zero.
        last = last + torch.arange(1 - seqlen_q, 1, device=device).view(-1, 1)  # (B, 1, Tq, 1)
    return (key > last).expand(-1, 1, seqlen_q, seqlen_k)


def _acc(x: Tensor) -> Tensor:
    """``x`` in the dtype sums are kept in: float64 stays, all else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """Dropout by the mask ``keep``, True where an element stays."""
    return torch.where(keep, x, 0.0) * (1 / (1 - p))


def _masked_softmax(x: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax over the last dimension; may change ``x``. Times 1 / sum: a division's gradient costs twice as much."""
    if x.shape[-1] == 0:
        return x
    if hidden is None:
        e = (x - x.detach().amax(-1, keepdim=True)).exp()
        return e * e.sum(-1, keepdim=True).reciprocal()
    x = x.masked_fill_(hidden, -math.inf)
    # A row that sees no key has no maximum (-inf - -inf is NaN) and no sum (1 / 0 is infinite): it gives 0. In every
    # other row the maximum alone adds exp(0) = 1 to the sum, so the clamp changes nothing there.
    e = (x - x.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)).exp()
    return e * e.sum(-1, keepdim=True).clamp(min=1.0).reciprocal()
