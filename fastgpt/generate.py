"""Sampling from a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.config import UserError
from fastgpt.model import GPT, Bigram


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """
    Raises:
        UserError: a setting out of its range.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top-p must be in (0, 1], got {top_p}")


@torch.no_grad()
def generate(
    model: GPT | Bigram,
    idx: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue ``idx`` by ``num_tokens`` tokens, one at a time; what is longer than block_size loses its beginning.

    Args:
        model: in evaluation mode.
        idx: (B, T), int64, T at least 1.
        num_tokens: how many to draw.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens.
        top_p: draw from the fewest tokens whose probabilities add up to p (Holtzman et al., 2020).
        generator: on ``idx``'s device; None is the default one.
    Yields:
        (B, 1), int64: the next token of each sequence.
    Raises:
        UserError: a setting out of its range, or nothing to continue.
    """
    check_sampling(temperature, top_k, top_p)
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise UserError(f"generate: idx must have shape (B, T), T at least 1, got {tuple(idx.shape)}")
    for _ in range(num_tokens):
        logits, _ = model(idx[:, -model.config.block_size :], last_only=True)
        token = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)  # (B, 1)
        idx = torch.cat([idx, token], dim=1)
        yield token


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of ``logits`` (B, V), as in ``generate``: (B, 1), int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # The largest logit is taken off first: divided by a small temperature, it would overflow.
    logits = logits - logits.amax(-1, keepdim=True)
    probs = ops.softmax((logits.double() / temperature).float())  # (B, V); fp32 does not hold 1e-300
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while those before it have not reached p: the first one always does.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
    return torch.multinomial(probs, 1, generator=generator)
