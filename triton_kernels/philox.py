"""Philox 4x32-10 on the device: the dropout masks that ``fastgpt.reference`` defines, bit for bit.

A counter of 128 bits and a key of 64 (the seed) give four random 32-bit words (Salmon et al., "Parallel Random Numbers:
As Easy as 1, 2, 3", 2011). A mask is a function of the seed and the element's index, so the backward makes it again
instead of reading it: no byte of it ever moves through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_4x32(c0, c1, c2, c3, seed):
    """Four uint32 words for each counter; the counter's words are uint32 and broadcast, ``seed`` is an int64 scalar."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # One widening product gives the high and the low word (a single IMAD.WIDE on a GPU).
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_quads(c0, c1, c2, seed, threshold):
    """What dropout keeps, four elements a counter: (..., n) counters give (..., 4n) bools."""
    w0, w1, w2, w3 = philox_4x32(c0, c1, c2, tl.zeros_like(c2), seed)
    threshold = threshold.to(tl.uint32, bitcast=True)
    # Bools and not words are woven together: a quarter of the bytes where that goes through shared memory.
    even = tl.interleave(w0 >= threshold, w2 >= threshold)
    odd = tl.interleave(w1 >= threshold, w3 >= threshold)
    return tl.interleave(even, odd)


@triton.jit
def keep_tile(rows, start_n, N, seed, threshold, QUADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """What elementwise dropout keeps of the columns ``start_n`` and on of the int64 ``rows``: (BLOCK_M, BLOCK_N) bools.

    Element n, in row-major order of rows of N, takes word n % 4 of counter n // 4. QUADS says that N and ``start_n``
    are multiples of 4, so that no counter straddles two rows or tiles; without it each element computes its counter
    alone.
    """
    if QUADS:
        n = (rows[:, None] * N + start_n) // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
        high = (n >> 32).to(tl.uint32)
        keep = keep_quads(n.to(tl.uint32), high, tl.zeros_like(high), seed, threshold)
    else:
        element = rows[:, None] * N + start_n + tl.arange(0, BLOCK_N)[None, :]
        n = element // 4
        high = (n >> 32).to(tl.uint32)
        zero = tl.zeros_like(high)
        w0, w1, w2, w3 = philox_4x32(n.to(tl.uint32), high, zero, zero, seed)
        word = element % 4
        mine = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        keep = mine >= threshold.to(tl.uint32, bitcast=True)
    return keep


def threshold_argument(p: float) -> int:
    """The word below which an element is dropped, as the int32 of the same bits: one type for every ``p``."""
    threshold = int(p * 2**32)
    return threshold - 2**32 if threshold >= 2**31 else threshold
