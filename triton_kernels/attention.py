"""Attention without the matrix of scores: tiles of it are made, used and dropped on chip (Dao et al., "FlashAttention",
2022; Dao, "FlashAttention-2", 2023).

Forward: a program owns BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time, keeping for each query
the largest score so far, the sum of exponentials and the weighted sum of values; when a larger score turns up, both
sums are rescaled (the online softmax). What is kept for the backward is lse, the logarithm of the sum, one fp32 a
query.

Backward: with lse every tile of probabilities can be made again. One kernel owns keys and walks over queries for dk and
dv, another owns queries and walks over keys for dq. Making the tiles twice costs 7 matrix products where 5 would do,
but no two programs ever add to the same number, so there are no atomics, and the result is the same bits each time.

What moves (forward): q and o once, k and v once for each block of queries, of which L2 serves all but the first. For T
queries and keys of D numbers: about 4 T D numbers and 4 T^2 D operations a head, half of those where it is causal.

Causal means that query i sees the keys up to i + valid - Tq. Tiles above that diagonal are never visited, tiles below
it are made without a mask, and only those that the diagonal or the last key cuts carry one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernel_ops import dense_like, has_rows_in_reach
from fastgpt.triton_kernels.launch import INTERPRETER, Blocks, blocks_for, cdiv, next_power_of_2
from fastgpt.triton_kernels.philox import keep_quads, threshold_argument

LOG2_E = 1.4426950408889634

# None of these may make a kernel compile anew: strides go with the sequence's length.
_UNSPECIALIZED = ["nheads", "seqlen_q", "seqlen_k", "threshold"]
_UNSPECIALIZED += [f"stride_{x}{d}" for x in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for d in "bhmn"]


@triton.jit
def _multiple(stride, UNIT: tl.constexpr):
    """``stride`` as the compiler sees that it is a multiple of UNIT, and memory can be read 16 bytes at a time."""
    return stride // UNIT * UNIT


@triton.jit
def _load_rows(ptr, start, offs_m, stride_m, offs_d, seqlen, HEADDIM: tl.constexpr, CHECK: tl.constexpr):
    """Rows ``start + offs_m`` of a (seqlen, HEADDIM) matrix, (rows, BLOCK_D); 0 beyond it, which CHECK says may be."""
    BLOCK_D: tl.constexpr = offs_d.shape[0]
    # One 64-bit product for the tile; within it 32 bits reach, and the same offsets serve every tile of a loop.
    ptrs = ptr + tl.cast(start, tl.int64) * stride_m + (offs_m[:, None] * stride_m + offs_d[None, :])
    if CHECK and BLOCK_D != HEADDIM:
        x = tl.load(ptrs, mask=(start + offs_m < seqlen)[:, None] & (offs_d < HEADDIM)[None, :], other=0.0)
    elif CHECK:
        x = tl.load(ptrs, mask=(start + offs_m < seqlen)[:, None], other=0.0)
    elif BLOCK_D != HEADDIM:
        x = tl.load(ptrs, mask=(offs_d < HEADDIM)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def _store_rows(ptr, x, start, offs_m, stride_m, offs_d, seqlen, HEADDIM: tl.constexpr):
    ptrs = ptr + tl.cast(start, tl.int64) * stride_m + (offs_m[:, None] * stride_m + offs_d[None, :])
    mask = (start + offs_m < seqlen)[:, None] & (offs_d < HEADDIM)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keep_tile(row, start_n, seed, threshold, BLOCK_N: tl.constexpr):
    """Which probabilities dropout keeps: (BLOCK_M, BLOCK_N) bools for the int64 rows (b * H + h) * Tq + query."""
    quads = ((start_n + tl.arange(0, BLOCK_N // 4) * 4) // 4).to(tl.uint32)
    low, high = row.to(tl.uint32)[:, None], (row >> 32).to(tl.uint32)[:, None]
    return keep_quads(quads[None, :] + tl.zeros_like(low), low, high, seed, threshold)


@triton.jit
def _seen(offs_m, offs_n, valid, shift, IS_CAUSAL: tl.constexpr):
    """Whether query m (down) sees key n (across)."""
    seen = (offs_n < valid)[None, :] & (offs_m >= 0)[:, None]
    if IS_CAUSAL:
        seen = seen & (offs_n[None, :] <= (offs_m + shift)[:, None])
    return seen


@triton.jit
def _fwd_tiles(
    acc,
    m_i,
    l_i,
    q,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    row,
    offs_m,
    offs_d,
    start,
    end,
    valid,
    shift,
    qk_scale,
    seed,
    threshold,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Go over the keys ``start`` to ``end``, whose tiles are cut by the diagonal or the last key if MASKED."""
    for start_n in tl.range(start, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, start_n, tl.arange(0, BLOCK_N), stride_kn, offs_d, valid, HEADDIM, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            s = tl.where(_seen(offs_m, offs_n, valid, shift, IS_CAUSAL), s * qk_scale, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, axis=1))
            # A query that has seen nothing yet has no maximum, and -inf - -inf is NaN.
            m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - m_used[:, None])
        else:
            m_new = tl.maximum(m_i, tl.max(s, axis=1) * qk_scale)
            m_used = m_new
            p = tl.exp2(s * qk_scale - m_used[:, None])  # one multiply-add and one exp2 an element
        alpha = tl.exp2(m_i - m_used)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        m_i = m_new
        if DROPOUT:
            p = tl.where(_keep_tile(row, start_n, seed, threshold, BLOCK_N), p, 0.0)
        v = _load_rows(v_ptr, start_n, tl.arange(0, BLOCK_N), stride_vn, offs_d, valid, HEADDIM, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_i, l_i


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_fwd_kernel(
    o_ptr,  # (B, H, Tq, D) by strides, as q, k and v are
    lse_ptr,  # (B, H, Tq), fp32
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H, Tk, D)
    v_ptr,  # (B, H, Tk, D)
    seqlens_k_ptr,  # (B,), int32: valid keys of each sequence, or None for all
    seed_ptr,  # one int64, or None where nothing is dropped
    stride_ob,
    stride_oh,
    stride_om,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    nheads,
    seqlen_q,
    seqlen_k,
    qk_scale,  # scale / ln 2, not negative
    threshold,
    keep_scale,  # 1 / (1 - dropout_p)
    NEGATE: tl.constexpr,  # the scale is negative: q is turned round instead, which is exact
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,  # elements that every stride is a multiple of
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEADDIM, padded to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    across = tl.cdiv(seqlen_q, BLOCK_M)
    # The programs of one head follow each other, so that L2 holds its keys and values; the last queries, which see the
    # most keys, go first.
    block = across - 1 - tl.program_id(0) % across
    head = (tl.program_id(0) // across).to(tl.int64)
    b, h = head // nheads, head % nheads
    valid = seqlen_k
    if seqlens_k_ptr is not None:
        valid = tl.load(seqlens_k_ptr + b)
    shift = valid - seqlen_q
    start_m = block * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    row = head * seqlen_q + offs_m
    rows = tl.arange(0, BLOCK_M)
    q = _load_rows(
        q_ptr + _multiple(b * stride_qb + h * stride_qh, UNIT),
        start_m,
        rows,
        _multiple(stride_qm, UNIT),
        offs_d,
        seqlen_q,
        HEADDIM,
        True,
    )
    if NEGATE:
        q = -q
    k_ptr += _multiple(b * stride_kb + h * stride_kh, UNIT)
    v_ptr += _multiple(b * stride_vb + h * stride_vh, UNIT)
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    # Keys before ``whole`` are seen by every query of the block, keys from ``end`` on by none.
    whole, end = valid, valid
    if IS_CAUSAL:
        whole = tl.minimum(valid, tl.maximum(start_m + shift + 1, 0))
        end = tl.minimum(valid, tl.maximum(start_m + BLOCK_M + shift, 0))
    whole = whole // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(2):
        acc, m_i, l_i = _fwd_tiles(
            acc,
            m_i,
            l_i,
            q,
            k_ptr,
            v_ptr,
            _multiple(stride_kn, UNIT),
            _multiple(stride_vn, UNIT),
            row,
            offs_m,
            offs_d,
            0 if part == 0 else whole,
            whole if part == 0 else end,
            valid,
            shift,
            qk_scale,
            seed,
            threshold,
            MASKED=part == 1,
            IS_CAUSAL=IS_CAUSAL,
            DROPOUT=DROPOUT,
            PRECISION=PRECISION,
            HEADDIM=HEADDIM,
            BLOCK_N=BLOCK_N,
        )
    # A query that sees no key gives 0, and an lse of +inf, by which the backward finds all its probabilities to be 0.
    blind = l_i == 0.0
    o = acc * (keep_scale / tl.where(blind, 1.0, l_i))[:, None]
    lse = tl.where(blind, float("inf"), (m_i + tl.log2(tl.where(blind, 1.0, l_i))) * 0.6931471805599453)
    _store_rows(
        o_ptr + _multiple(b * stride_ob + h * stride_oh, UNIT),
        o,
        start_m,
        rows,
        _multiple(stride_om, UNIT),
        offs_d,
        seqlen_q,
        HEADDIM,
    )
    tl.store(lse_ptr + row, lse, mask=offs_m < seqlen_q)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_delta_kernel(
    delta_ptr,  # (B, H, Tq), fp32
    do_ptr,  # (B, H, Tq, D)
    o_ptr,  # (B, H, Tq, D)
    stride_dob,
    stride_doh,
    stride_dom,
    stride_ob,
    stride_oh,
    stride_om,
    nheads,
    seqlen_q,
    UNIT: tl.constexpr,  # elements that every stride is a multiple of
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = sum(do * o) over D, which is sum(p * dp) over all keys: what softmax's gradient subtracts."""
    across = tl.cdiv(seqlen_q, BLOCK_M)
    head = (tl.program_id(0) // across).to(tl.int64)
    b, h = head // nheads, head % nheads
    start_m = (tl.program_id(0) % across) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    do_ptr += _multiple(b * stride_dob + h * stride_doh, UNIT)
    o_ptr += _multiple(b * stride_ob + h * stride_oh, UNIT)
    do = _load_rows(do_ptr, start_m, rows, _multiple(stride_dom, UNIT), offs_d, seqlen_q, HEADDIM, True)
    o = _load_rows(o_ptr, start_m, rows, _multiple(stride_om, UNIT), offs_d, seqlen_q, HEADDIM, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta_ptr + head * seqlen_q + start_m + rows, delta, mask=start_m + rows < seqlen_q)


@triton.jit
def _bwd_dkdv_tiles(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    stride_qm,
    stride_dom,
    first_row,
    start_n,
    offs_d,
    start,
    skipped,
    resumed,
    end,
    seqlen_q,
    valid,
    shift,
    qk_scale,
    seed,
    threshold,
    keep_scale,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Go over the queries ``start`` to ``end``, leaving out ``skipped`` of them before ``resumed``.

    MASKED where the diagonal, the last key or the last query cuts a tile.
    """
    offs_n = start_n + tl.arange(0, BLOCK_N)
    for at in tl.range(start, end - skipped, BLOCK_M):
        start_m = tl.where(at + skipped < resumed, at, at + skipped)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr, start_m, tl.arange(0, BLOCK_M), stride_qm, offs_d, seqlen_q, HEADDIM, MASKED)
        do = _load_rows(do_ptr, start_m, tl.arange(0, BLOCK_M), stride_dom, offs_d, seqlen_q, HEADDIM, MASKED)
        if MASKED:
            lse = tl.load(lse_ptr + offs_m, mask=offs_m < seqlen_q, other=float("inf"))
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < seqlen_q, other=0.0)
        else:
            lse = tl.load(lse_ptr + offs_m)
            delta = tl.load(delta_ptr + offs_m)
        # Everything is turned round, keys down and queries across, so that dk and dv accumulate as they are stored.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * qk_scale - (lse * 1.4426950408889634)[None, :])
        if MASKED:
            p = tl.where(tl.trans(_seen(offs_m, offs_n, valid, shift, IS_CAUSAL)), p, 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if DROPOUT:
            keep = tl.trans(_keep_tile(first_row + offs_m, start_n, seed, threshold, BLOCK_N))
            dv = tl.dot(tl.where(keep, p * keep_scale, 0.0).to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dkdv_kernel(
    dk_ptr,  # (B, H, Tk, D)
    dv_ptr,  # (B, H, Tk, D)
    do_ptr,  # (B, H, Tq, D)
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H, Tk, D)
    v_ptr,  # (B, H, Tk, D)
    lse_ptr,  # (B, H, Tq), fp32
    delta_ptr,  # (B, H, Tq), fp32
    seqlens_k_ptr,  # (B,), int32, or None
    seed_ptr,  # one int64, or None
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_dob,
    stride_doh,
    stride_dom,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    nheads,
    seqlen_q,
    seqlen_k,
    scale,
    qk_scale,  # scale / ln 2
    threshold,
    keep_scale,  # 1 / (1 - dropout_p)
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,  # elements that every stride is a multiple of
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    across = tl.cdiv(seqlen_k, BLOCK_N)
    # The first keys, which the most queries see, go first.
    start_n = (tl.program_id(0) % across) * BLOCK_N
    head = (tl.program_id(0) // across).to(tl.int64)
    b, h = head // nheads, head % nheads
    valid = seqlen_k
    if seqlens_k_ptr is not None:
        valid = tl.load(seqlens_k_ptr + b)
    shift = valid - seqlen_q
    rows = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    k = _load_rows(
        k_ptr + _multiple(b * stride_kb + h * stride_kh, UNIT),
        start_n,
        rows,
        _multiple(stride_kn, UNIT),
        offs_d,
        valid,
        HEADDIM,
        True,
    )
    v = _load_rows(
        v_ptr + _multiple(b * stride_vb + h * stride_vh, UNIT),
        start_n,
        rows,
        _multiple(stride_vn, UNIT),
        offs_d,
        valid,
        HEADDIM,
        True,
    )
    q_ptr += _multiple(b * stride_qb + h * stride_qh, UNIT)
    do_ptr += _multiple(b * stride_dob + h * stride_doh, UNIT)
    first_row = head * seqlen_q
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    # Queries before ``first`` see none of the block's keys; from ``whole`` to ``last`` they see all, in whole tiles.
    first, whole, last = start_n * 0, start_n * 0, seqlen_q // BLOCK_M * BLOCK_M
    if IS_CAUSAL:
        first = tl.maximum(start_n - shift, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
    whole = tl.where(start_n + BLOCK_N > valid, seqlen_q, tl.minimum(whole, seqlen_q))  # the last key cuts every tile
    first = tl.where(start_n >= valid, seqlen_q, first)
    last = tl.maximum(last, whole)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for part in tl.static_range(2):
        dk, dv = _bwd_dkdv_tiles(
            dk,
            dv,
            k,
            v,
            q_ptr,
            do_ptr,
            lse_ptr + first_row,
            delta_ptr + first_row,
            _multiple(stride_qm, UNIT),
            _multiple(stride_dom, UNIT),
            first_row,
            start_n,
            offs_d,
            first if part == 0 else whole,
            last - whole if part == 0 else 0,
            last,
            seqlen_q if part == 0 else last,
            seqlen_q,
            valid,
            shift,
            qk_scale,
            seed,
            threshold,
            keep_scale,
            MASKED=part == 0,
            IS_CAUSAL=IS_CAUSAL,
            DROPOUT=DROPOUT,
            PRECISION=PRECISION,
            HEADDIM=HEADDIM,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
        )
    dk_ptr += _multiple(b * stride_dkb + h * stride_dkh, UNIT)
    dv_ptr += _multiple(b * stride_dvb + h * stride_dvh, UNIT)
    _store_rows(dk_ptr, dk * scale, start_n, rows, _multiple(stride_dkn, UNIT), offs_d, seqlen_k, HEADDIM)
    _store_rows(dv_ptr, dv, start_n, rows, _multiple(stride_dvn, UNIT), offs_d, seqlen_k, HEADDIM)


@triton.jit
def _bwd_dq_tiles(
    dq,
    q,
    do,
    lse,
    delta,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    row,
    offs_m,
    offs_d,
    start,
    end,
    valid,
    shift,
    qk_scale,
    seed,
    threshold,
    keep_scale,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Go over the keys ``start`` to ``end``, whose tiles are cut by the diagonal or the last key if MASKED."""
    for start_n in tl.range(start, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, start_n, tl.arange(0, BLOCK_N), stride_kn, offs_d, valid, HEADDIM, MASKED)
        v = _load_rows(v_ptr, start_n, tl.arange(0, BLOCK_N), stride_vn, offs_d, valid, HEADDIM, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * qk_scale - lse[:, None])
        if MASKED:
            p = tl.where(_seen(offs_m, offs_n, valid, shift, IS_CAUSAL), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(_keep_tile(row, start_n, seed, threshold, BLOCK_N), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dq_kernel(
    dq_ptr,  # (B, H, Tq, D)
    do_ptr,  # (B, H, Tq, D)
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, H, Tk, D)
    v_ptr,  # (B, H, Tk, D)
    lse_ptr,  # (B, H, Tq), fp32
    delta_ptr,  # (B, H, Tq), fp32
    seqlens_k_ptr,  # (B,), int32, or None
    seed_ptr,  # one int64, or None
    stride_dqb,
    stride_dqh,
    stride_dqm,
    stride_dob,
    stride_doh,
    stride_dom,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    nheads,
    seqlen_q,
    seqlen_k,
    scale,
    qk_scale,  # scale / ln 2
    threshold,
    keep_scale,  # 1 / (1 - dropout_p)
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,  # elements that every stride is a multiple of
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    across = tl.cdiv(seqlen_q, BLOCK_M)
    start_m = (across - 1 - tl.program_id(0) % across) * BLOCK_M
    head = (tl.program_id(0) // across).to(tl.int64)
    b, h = head // nheads, head % nheads
    valid = seqlen_k
    if seqlens_k_ptr is not None:
        valid = tl.load(seqlens_k_ptr + b)
    shift = valid - seqlen_q
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    row = head * seqlen_q + offs_m
    rows = tl.arange(0, BLOCK_M)
    q = _load_rows(
        q_ptr + _multiple(b * stride_qb + h * stride_qh, UNIT),
        start_m,
        rows,
        _multiple(stride_qm, UNIT),
        offs_d,
        seqlen_q,
        HEADDIM,
        True,
    )
    do_ptr += _multiple(b * stride_dob + h * stride_doh, UNIT)
    do = _load_rows(do_ptr, start_m, rows, _multiple(stride_dom, UNIT), offs_d, seqlen_q, HEADDIM, True)
    lse = tl.load(lse_ptr + row, mask=offs_m < seqlen_q, other=float("inf")) * 1.4426950408889634
    delta = tl.load(delta_ptr + row, mask=offs_m < seqlen_q, other=0.0)
    k_ptr += _multiple(b * stride_kb + h * stride_kh, UNIT)
    v_ptr += _multiple(b * stride_vb + h * stride_vh, UNIT)
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    # As in the forward: keys before ``whole`` are seen by every query of the block, keys from ``end`` on by none.
    whole, end = valid, valid
    if IS_CAUSAL:
        whole = tl.minimum(valid, tl.maximum(start_m + shift + 1, 0))
        end = tl.minimum(valid, tl.maximum(start_m + BLOCK_M + shift, 0))
    whole = whole // BLOCK_N * BLOCK_N
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.static_range(2):
        dq = _bwd_dq_tiles(
            dq,
            q,
            do,
            lse,
            delta,
            k_ptr,
            v_ptr,
            _multiple(stride_kn, UNIT),
            _multiple(stride_vn, UNIT),
            row,
            offs_m,
            offs_d,
            0 if part == 0 else whole,
            whole if part == 0 else end,
            valid,
            shift,
            qk_scale,
            seed,
            threshold,
            keep_scale,
            MASKED=part == 1,
            IS_CAUSAL=IS_CAUSAL,
            DROPOUT=DROPOUT,
            PRECISION=PRECISION,
            HEADDIM=HEADDIM,
            BLOCK_N=BLOCK_N,
        )
    dq_ptr += _multiple(b * stride_dqb + h * stride_dqh, UNIT)
    _store_rows(dq_ptr, dq * scale, start_m, rows, _multiple(stride_dqm, UNIT), offs_d, seqlen_q, HEADDIM)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o, (B, H, Tq, D) in q's dtype and memory order, and lse, (B, H, Tq) in fp32."""
    o = dense_like(q)
    return o, _forward(o, q, k, v, is_causal, dropout_p, scale, seqlens_k, seed)


def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, each like its own."""
    dq, dk, dv = dense_like(q), dense_like(k), dense_like(v)
    _backward(dq, dk, dv, do, q, k, v, o, lse, is_causal, dropout_p, scale, seqlens_k, seed)
    return dq, dk, dv


def attention_qkvpacked_fwd(
    qkv: Tensor, is_causal: bool, dropout_p: float, scale: float, seqlens_k: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, T, 3, H, D) to o, (B, T, H, D), and lse, (B, H, T) in fp32: the same kernels, through strides."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    B, T, _, H, D = qkv.shape
    o = torch.empty(B, T, H, D, dtype=qkv.dtype, device=qkv.device)
    return o, _forward(o.transpose(1, 2), q, k, v, is_causal, dropout_p, scale, seqlens_k, seed)


def attention_qkvpacked_bwd(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """dqkv, (B, T, 3, H, D): the three gradients are written where they belong, and nothing is put together after."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    dq, dk, dv = (part.transpose(1, 2) for part in dqkv.unbind(2))
    do, o = do.transpose(1, 2), o.transpose(1, 2)
    _backward(dq, dk, dv, do, q, k, v, o, lse, is_causal, dropout_p, scale, seqlens_k, seed)
    return dqkv


def _forward(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """Fill ``o`` and return lse; every (B, H, T, D) tensor by its own strides."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return lse
    q, k, v = _readable(q, k, v)
    seqlens_k = None if seqlens_k is None else seqlens_k.contiguous()
    blocks = _blocks("attention_fwd", q, seed)
    _attention_fwd_kernel[(cdiv(Tq, blocks["BLOCK_M"]) * B * H,)](
        o,
        lse,
        q,
        k,
        v,
        seqlens_k,
        seed,
        *o.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        H,
        Tq,
        Tk,
        abs(scale) * LOG2_E,
        threshold_argument(dropout_p),
        1 / (1 - dropout_p),
        NEGATE=scale < 0,
        IS_CAUSAL=is_causal,
        PRECISION=_precision(q),
        UNIT=_unit(o, q, k, v),
        HEADDIM=D,
        **blocks,
    )
    return lse


def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> None:
    """Fill ``dq``, ``dk`` and ``dv``; every (B, H, T, D) tensor by its own strides."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    if B * H == 0:
        return
    do, q, k, v = _readable(do, q, k, v)
    seqlens_k = None if seqlens_k is None else seqlens_k.contiguous()
    unit = _unit(dq, dk, dv, do, q, k, v, o)
    delta = torch.empty_like(lse)
    blocks = _delta_blocks(q)
    if Tq:
        _attention_bwd_delta_kernel[(cdiv(Tq, blocks["BLOCK_M"]) * B * H,)](
            delta, do, o, *do.stride()[:3], *o.stride()[:3], H, Tq, UNIT=unit, HEADDIM=D, **blocks
        )
    inputs = (do, q, k, v, lse, delta, seqlens_k, seed)
    strides = [stride for x in (do, q, k, v) for stride in x.stride()[:3]]
    sizes = (H, Tq, Tk)
    factors = (scale, scale * LOG2_E, threshold_argument(dropout_p), 1 / (1 - dropout_p))
    options = {"IS_CAUSAL": is_causal, "PRECISION": _precision(q), "UNIT": unit, "HEADDIM": D}
    if Tk:
        blocks = _blocks("attention_bwd_dkdv", q, seed)
        _attention_bwd_dkdv_kernel[(cdiv(Tk, blocks["BLOCK_N"]) * B * H,)](
            dk, dv, *inputs, *dk.stride()[:3], *dv.stride()[:3], *strides, *sizes, *factors, **options, **blocks
        )
    if Tq:
        blocks = _blocks("attention_bwd_dq", q, seed)
        _attention_bwd_dq_kernel[(cdiv(Tq, blocks["BLOCK_M"]) * B * H,)](
            dq, *inputs, *dq.stride()[:3], *strides, *sizes, *factors, **options, **blocks
        )


def _readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors, as copies where a kernel cannot read them in place.

    The elements of a row must lie side by side, and the rows of a tile within 2^31 elements of each other.
    """
    return [x if has_rows_in_reach(x) else x.contiguous() for x in tensors]


def _unit(*tensors: Tensor) -> int:
    """The elements of 16 bytes if every stride is a multiple of them, else 1."""
    unit = 16 // tensors[0].element_size()
    return unit if all(stride % unit == 0 for x in tensors for stride in x.stride()[:3]) else 1


def _precision(x: Tensor) -> str:
    """How products of fp32 are made: exactly, or in TF32 where torch's own matrix products are."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# ---------------------------------------------------------------------------------------------------------------------
# Block shapes
# ---------------------------------------------------------------------------------------------------------------------

# BLOCK_M, BLOCK_N, num_warps, num_stages: the largest that do not spill, without dropout and with it (the ten rounds of
# Philox want registers of their own). By bytes of an element, GPU generation and padded head size; a smaller head takes
# the row of 64. Exact products of fp32 run on the CUDA cores, out of registers, and so want small tiles on every chip.
Shape = tuple[int, int, int, int]
_FP32_FWD = {64: 2 * ((64, 32, 8, 2),), 128: 2 * ((32, 16, 8, 1),), 256: 2 * ((32, 16, 8, 1),)}
_FP32_DKDV = {64: 2 * ((32, 64, 8, 2),), 128: 2 * ((16, 32, 8, 1),), 256: 2 * ((16, 32, 8, 1),)}
_BLOCKS: dict[str, dict[int, dict[int, tuple[Shape, ...]]]] = {
    "attention_fwd": {
        80: {
            64: ((128, 64, 4, 3), (128, 64, 8, 3)),
            128: ((128, 64, 8, 3), (128, 32, 8, 2)),
            256: ((64, 64, 8, 2), (64, 64, 8, 2)),
        },
        86: {
            64: ((128, 64, 4, 3), (128, 64, 8, 3)),
            128: ((128, 64, 8, 2), (128, 32, 8, 2)),
            256: ((64, 32, 8, 1), (64, 32, 8, 1)),
        },
        90: {
            64: ((128, 64, 4, 3), (128, 64, 8, 3)),
            128: ((128, 64, 8, 3), (128, 64, 8, 3)),
            256: ((128, 32, 8, 2), (64, 32, 8, 2)),
        },
        100: {
            64: ((128, 64, 8, 3), (128, 64, 8, 3)),
            128: ((128, 64, 8, 3), (128, 64, 8, 2)),
            256: ((128, 32, 8, 2), (64, 32, 8, 2)),
        },
    },
    "attention_bwd_dkdv": {
        80: {
            64: ((64, 128, 8, 2), (32, 128, 8, 2)),
            128: ((32, 128, 8, 2), (64, 64, 8, 2)),
            256: ((32, 64, 8, 2), (32, 64, 8, 1)),
        },
        86: {
            64: ((64, 128, 8, 2), (32, 128, 8, 2)),
            128: ((32, 128, 8, 2), (64, 64, 8, 2)),
            256: ((16, 64, 8, 1), (16, 64, 8, 1)),
        },
        90: {
            64: ((64, 128, 8, 2), (32, 128, 8, 2)),
            128: ((32, 128, 8, 2), (32, 64, 8, 2)),
            256: ((32, 64, 8, 2), (32, 64, 8, 2)),
        },
        100: {
            64: ((64, 128, 8, 2), (64, 128, 8, 2)),
            128: ((64, 128, 8, 2), (64, 128, 8, 2)),
            256: ((32, 64, 8, 2), (32, 64, 8, 2)),
        },
    },
    "attention_bwd_dq": {
        80: {
            64: ((128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((64, 64, 8, 2), (64, 64, 8, 2)),
            256: ((64, 64, 8, 2), (64, 32, 8, 2)),
        },
        86: {
            64: ((128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((64, 64, 8, 2), (64, 64, 8, 2)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1)),
        },
        90: {
            64: ((128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((128, 64, 8, 2), (64, 64, 8, 2)),
            256: ((64, 32, 8, 2), (64, 32, 8, 2)),
        },
        100: {
            64: ((128, 64, 8, 2), (128, 64, 8, 2)),
            128: ((128, 64, 8, 2), (128, 64, 8, 2)),
            256: ((64, 32, 8, 2), (64, 32, 8, 2)),
        },
    },
}
_FP32_BLOCKS = {"attention_fwd": _FP32_FWD, "attention_bwd_dkdv": _FP32_DKDV, "attention_bwd_dq": _FP32_FWD}


def _blocks(kernel: str, q: Tensor, seed: Tensor | None) -> Blocks:
    D = _padded(q)

    def default(generation: int) -> Blocks:
        if generation == INTERPRETER:
            shape = (32, 32, 4, 1)
        else:
            rows = _FP32_BLOCKS[kernel] if q.element_size() == 4 else _BLOCKS[kernel][generation]
            shape = rows[max(D, 64)][0 if seed is None else 1]
        return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), shape, strict=True))

    shape_class = f"D={D} {q.element_size()} bytes" + ("" if seed is None else " dropout")
    return {"BLOCK_D": D, **blocks_for(kernel, q, shape_class, default)}


def _delta_blocks(q: Tensor) -> Blocks:
    D = _padded(q)

    def default(generation: int) -> Blocks:
        return {"BLOCK_M": 32 if generation == INTERPRETER else 4096 // D, "num_warps": 4}

    return {"BLOCK_D": D, **blocks_for("attention_bwd_delta", q, f"D={D} {q.element_size()} bytes", default)}


def _padded(q: Tensor) -> int:
    """The head size as the kernels take it: a power of two, and no less than a tensor core's depth."""
    return max(16, next_power_of_2(q.shape[3]))


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, gradients, sample, start

    B, H, T, D = start(small=(1, 2, 40, 24), large=(16, 12, 1024, 64))
    q, k, v, do = (sample(B, H, T, D) for _ in range(4))
    size = q.numel() * q.element_size()
    for name, is_causal, p in (("causal", True, 0.0), ("not causal", False, 0.0), ("causal, dropout", True, 0.2)):
        options = (is_causal, p, D**-0.5, None, torch.tensor([1234], device=q.device) if p else None)
        o, lse = attention_fwd(q, k, v, *options)

        def truth(q: Tensor, k: Tensor, v: Tensor, options: tuple = options) -> Tensor:
            return reference.attention(q, k, v, *options)

        operations = 4 * B * H * T * T * D // (2 if is_causal else 1)
        check(
            f"attention_fwd, {name}",
            lambda options=options: attention_fwd(q, k, v, *options)[0],
            lambda truth=truth: truth(q.double(), k.double(), v.double()),
            moved=4 * size,
            operations=operations,
        )
        check(
            f"attention_bwd, {name}",
            lambda options=options, o=o, lse=lse: attention_bwd(do, q, k, v, o, lse, *options),
            gradients(truth, [q, k, v], [do]),
            moved=8 * size,
            operations=operations * 5 // 2,
        )
