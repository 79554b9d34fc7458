"""The loss of a model on a whole text, each token once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgpt.config import UserError
from fastgpt.data import TokenizedText
from fastgpt.model import GPT, Bigram
from fastgpt.shards import Shards
from fastgpt.tokenizer import Tokenizer

_IGNORED = -100


@dataclass(frozen=True)
class TextLoss:
    """Of ``tokens`` predicted tokens: ``loss`` in nats per token, its exponential, and bits per byte of the text."""

    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


@torch.no_grad()
def text_loss(
    model: GPT | Bigram,
    text: TokenizedText,
    tokenizer: Tokenizer,
    *,
    stride: int | None = None,
    batch_size: int,
    device: torch.device,
    autocast: torch.autocast,
) -> TextLoss:
    """The loss of each token of ``text`` but the first, which nothing comes before.

    A window of block_size tokens goes over the text in steps of ``stride`` and counts what no window before it has
    counted: at a stride of block_size the windows do not overlap, and at a smaller one every token beyond the first
    window is predicted from at least block_size - stride others.

    Args:
        model: in evaluation mode, on ``device``.
        stride: 1 to the model's block_size; None is block_size.
        batch_size: windows per forward pass.
    Raises:
        UserError: a stride out of its range, or a text of fewer than two tokens.
    """
    block_size, tokens = model.config.block_size, text.tokens
    stride = block_size if stride is None else stride
    if not 1 <= stride <= block_size:
        raise UserError(f"stride must be from 1 to the model's block_size {block_size}, got {stride}")
    if len(tokens) < 2:
        raise UserError(f"{text.name}: a text must have at least 2 tokens to be evaluated, got {len(tokens)}")
    sums = []
    for x, y in _batches(tokens, block_size, stride, batch_size):
        with autocast:
            _, mean = model(x.to(device), y.to(device))
        sums.append(mean.double() * int((y != _IGNORED).sum()))
    nats = torch.stack(sums).sum().cpu()
    loss = nats / (len(tokens) - 1)
    num_bytes = text.num_bytes - len(tokenizer.to_bytes(tokens[np.arange(1)]))
    bits_per_byte = nats / math.log(2) / num_bytes
    return TextLoss(len(tokens) - 1, loss.item(), loss.exp().item(), bits_per_byte.item())


def _batches(
    tokens: np.ndarray | Shards, block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows and the tokens to be predicted, two (B, T) of int64; what was counted before is -100."""
    last = len(tokens) - 1
    starts = np.arange(0, max(last - block_size + stride, 1), stride)  # up to the first window that reaches the end
    whole = starts[starts + block_size <= last]
    groups = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    for group in [*groups, *([starts[-1:]] if len(whole) < len(starts) else [])]:
        length = min(block_size, last - int(group[0]))
        rows = torch.from_numpy(tokens[group[:, None] + np.arange(length + 1)].astype(np.int64))  # (B, T + 1)
        y = rows[:, 1:].clone()
        y[int(group[0] == 0) :, : block_size - stride] = _IGNORED  # the first window alone counts all
        yield rows[:, :-1].contiguous(), y
