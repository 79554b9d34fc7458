"""Philox 4x32-10 and the masks made of it in plain Python integers, written from the paper and not from the package.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, section 3.3.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

MASK = 2**32 - 1


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    (left0, right0, left1, right1), (key0, key1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * left0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * left1, 2**32)
        left0, right0, left1, right1 = high1 ^ right0 ^ key0, low1, high0 ^ right1 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & MASK, (key1 + 0xBB67AE85) & MASK
    return left0, right0, left1, right1


def key_of(seed: int) -> tuple[int, int]:
    return seed & MASK, (seed >> 32) & MASK


def elementwise_keeps(n: int, p: float, seed: int) -> bool:
    """Whether an elementwise dropout keeps element ``n`` of the row-major order."""
    quad = n // 4
    return philox((quad & MASK, quad >> 32, 0, 0), key_of(seed))[n % 4] >= int(p * 2**32)


def attention_keeps(row: int, key: int, p: float, seed: int) -> bool:
    """Whether attention keeps the probability of ``key`` in ``row`` = (b * H + h) * Tq + query."""
    return philox((key // 4, row & MASK, row >> 32, 0), key_of(seed))[key % 4] >= int(p * 2**32)


def elementwise_mask(shape: tuple[int, ...], p: float, seed: Tensor) -> Tensor:
    kept = [elementwise_keeps(n, p, int(seed)) for n in range(math.prod(shape))]
    return torch.tensor(kept, dtype=torch.bool, device=seed.device).view(shape)


def attention_mask(shape: tuple[int, int, int, int], p: float, seed: Tensor) -> Tensor:
    batch, heads, queries, keys = shape
    kept = [
        attention_keeps((b * heads + h) * queries + query, key, p, int(seed))
        for b, h, query, key in itertools.product(range(batch), range(heads), range(queries), range(keys))
    ]
    return torch.tensor(kept, dtype=torch.bool, device=seed.device).view(shape)
