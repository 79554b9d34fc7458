"""Our ops in a GPT-2 of Hugging Face's transformers: layer norm, GELU, attention and the loss.

    from fastgpt.integrations.transformers import apply
    apply(model)  # a GPT2LMHeadModel or GPT2Model; unapply(model) takes it back

Weights, names and files stay as they were. ``use_backend`` and FASTGPT_BACKEND choose the kernels, as everywhere.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import UserError
from fastgpt.extras import require
from fastgpt.pretrained import gelu_of

NAME = "fastgpt"  # of our attention among those that transformers knows
_BEFORE = "_fastgpt_before"  # the model's attribute for the attention that it had

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model) -> Model:
    """Have ``model`` run on our ops. Done twice, it is done once.

    A batch may be padded on the left or on the right (attention_mask of ones and zeros), with or without a cache. Its
    keys are then moved to the front (left), or attention runs a second time for the padding's own positions (right), so
    that every position gets what transformers' attention "sdpa" gives it.

    Args:
        model: a ``GPT2LMHeadModel`` or ``GPT2Model``, changed in place.
    Returns:
        ``model``.
    Raises:
        UserError: transformers is not installed, another model, or a setting that our ops have no counterpart for.
            Later, from the model: a mask that is not padding on one side.
    """
    transformers = require("transformers", "hf", "fastgpt.integrations.transformers")
    if not isinstance(model, (transformers.GPT2LMHeadModel, transformers.GPT2Model)):
        raise UserError(f"apply: model must be a GPT2LMHeadModel or GPT2Model, got {type(model).__name__}")
    config: Any = model.config
    gelu = gelu_of(config.activation_function)
    if gelu is None:
        raise UserError(f"apply: activation_function must be a GELU, got {config.activation_function!r}")
    if config.add_cross_attention:
        raise UserError("apply: cross-attention (add_cross_attention) has no counterpart here")
    if hasattr(model, _BEFORE):
        return model
    transformers.AttentionInterface.register(NAME, _attention)
    transformers.AttentionMaskInterface.register(NAME, _mask)
    setattr(model, _BEFORE, config._attn_implementation)
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = _LayerNorm
    for block in model.base_model.h:
        block.mlp.act = _GELU(gelu)
    if isinstance(model, transformers.GPT2LMHeadModel):
        model.loss_function = _loss
    return model


def unapply(model: Model) -> Model:
    """Give ``model`` back what it had; one that ``apply`` never saw is left as it is."""
    if not hasattr(model, _BEFORE):
        return model
    from transformers.activations import ACT2FN

    any_model: Any = model
    any_model.set_attn_implementation(getattr(model, _BEFORE))
    for module in model.modules():
        if type(module) is _LayerNorm:
            module.__class__ = nn.LayerNorm  # type: ignore[assignment]
    for block in any_model.base_model.h:
        block.mlp.act = ACT2FN[any_model.config.activation_function]
    if hasattr(model, "_loss_function"):
        del any_model._loss_function
    delattr(model, _BEFORE)
    return model


class _LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class _GELU(nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(x, approximate=self.approximate)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What ``_attention`` is to know of a batch; transformers hands it on where other attentions get their mask.

    Args:
        q_length, kv_length: Tq and Tk.
        q_offset: tokens that a cache holds already; a cache of fixed size has keys beyond them.
        mask_function: says which keys a query sees; transformers' own for causal attention, or another.
        attention_mask: (B, q_offset + Tq), true where there is a token; None is all of them.
    Returns:
        None where each query sees all keys up to its own. Else int32 of shape (B, 1, 1, n), which transformers takes
        for a mask and leaves alone: how many keys count; for padding on the left also how many keys to pass over
        before them; for padding on the right 0 there, and then how many of the keys are tokens.
    Raises:
        UserError: any other mask.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function:
        raise UserError("fastgpt's attention is causal: packed sequences and masks of another pattern need another one")
    seen = int(q_offset) + q_length
    if attention_mask is None or attention_mask.all():
        if kv_length == seen:
            return None
        return torch.full((batch_size, 1, 1, 1), seen, dtype=torch.int32, device=device)
    if attention_mask.shape != (batch_size, seen):
        raise UserError(f"attention_mask must have shape {(batch_size, seen)}, got {tuple(attention_mask.shape)}")
    tokens = attention_mask.int()
    count, steps = tokens.sum(-1), tokens.diff(dim=-1)
    if (steps >= 0).all():
        parts = [count, seen - count]
    elif (steps <= 0).all():
        parts = [torch.full_like(count, seen), torch.zeros_like(count), count]
    else:
        raise UserError("fastgpt's attention takes padding on the left or on the right of a batch, not both or between")
    return torch.stack(parts, dim=-1).int()[:, None, None]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Args:
        query: (B, H, Tq, D).
        key, value: (B, H, Tk, D).
        attention_mask: what ``_mask`` returns.
    Returns:
        (B, Tq, H, D), and None where other attentions may return their weights.
    """
    if attention_mask is None:
        y = ops.attention(query, key, value, dropout_p=dropout, scale=scaling)  # (B, H, Tq, D)
        return y.transpose(1, 2), None
    if attention_mask.dtype != torch.int32 or attention_mask.shape[:3] != (len(query), 1, 1):
        raise UserError("fastgpt's attention takes an attention_mask of shape (B, T), not one made for each query")
    lengths, *others = attention_mask[:, 0, 0].unbind(-1)  # each (B,)
    lengths = lengths.contiguous()
    if (
        len(others) == 1
    ):  # padding on the left: keys go to the front, where they end with the last query's own as before
        Tk = key.shape[2]
        order = (torch.arange(Tk, device=key.device) + others[0][:, None]) % Tk  # (B, Tk)
        key, value = (x.take_along_dim(order[:, None, :, None], 2) for x in (key, value))
    y = ops.attention(query, key, value, dropout_p=dropout, scale=scaling, seqlens_k=lengths)
    if len(others) == 2:  # padding on the right: its own positions see the tokens, and none of the padding
        tokens = others[1].contiguous()
        Tq = query.shape[2]
        position = torch.arange(Tq, device=key.device) + (lengths - Tq)[:, None]  # (B, Tq)
        padding = ops.attention(query, key, value, is_causal=False, dropout_p=dropout, scale=scaling, seqlens_k=tokens)
        y = torch.where((position < tokens[:, None])[:, None, :, None], y, padding)
    return y.transpose(1, 2), None


def _loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of transformers' models for causal language modelling, without its copy of the logits in fp32.

    Args:
        logits: (B, T, V).
        labels: (B, T), int64: the tokens themselves; each is the target of the position before it.
        num_items_in_batch: what to divide the sum by, instead of the number of targets.
        shift_labels: (B, T), the targets themselves, instead of ``labels``.
    Returns:
        A scalar in fp32.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    loss = ops.cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index=ignore_index)
    if num_items_in_batch is None:
        return loss
    count = (targets != ignore_index).sum()
    return torch.where(count > 0, loss * count, 0.0) / torch.as_tensor(num_items_in_batch, device=loss.device)
