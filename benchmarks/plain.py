"""The peers of the whole model: the same GPT written straight in PyTorch, and the optimizer that goes with it.

Sizes in comments: B sequences, T tokens each, C = n_embd, H heads of D = C / H, V tokens in the (padded) vocabulary.
Nothing here touches ``fastgpt.ops``. Parameters carry the names of ``fastgpt.GPT``, so weights load both ways.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastgpt.config import GPTConfig, TrainConfig

Style = Literal["fused", "naive"]


class PlainGPT(nn.Module):
    """``fastgpt.GPT`` as one would write it without fastgpt. It starts from PyTorch's default weights: load others.

    Args:
        config: as for ``fastgpt.GPT``; ``attention`` is not read, ``style`` decides.
        style: "fused" calls PyTorch's own functions (layer_norm, scaled_dot_product_attention, gelu, cross_entropy);
            "naive" spells each of them out in tensor algebra. Both drop with PyTorch's dropout.
    Raises:
        ValueError: an unknown ``style``.
    """

    def __init__(self, config: GPTConfig, style: Style) -> None:
        super().__init__()
        if style not in ("fused", "naive"):
            raise ValueError(f"PlainGPT: style must be 'fused' or 'naive', got {style!r}")
        self.config = config
        self.fused = style == "fused"
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(_Block(config, self.fused) for _ in range(config.n_layer)),
                "ln_f": _LayerNorm(config, self.fused),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """
        Args:
            idx: (B, T), int64, tokens; T at most ``block_size``.
            targets: (B, T), int64, the token that follows each, in [0, V); all of them count.
        Returns:
            Without targets: logits, (B, T, vocab_size), and None. With targets: None and the mean loss, a scalar.
        """
        positions = torch.arange(idx.shape[1], device=idx.device)  # (T,)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)  # (B, T, C)
        x = self.transformer["drop"](x)
        for block in self.transformer["h"]:
            x = block(x)  # (B, T, C)
        logits = self.lm_head(self.transformer["ln_f"](x))  # (B, T, V)
        if targets is None:
            return logits[..., : self.config.vocab_size], None
        cross_entropy = F.cross_entropy if self.fused else _cross_entropy
        return None, cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def plain_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """PyTorch's AdamW as it comes on the model's device: weight decay on matrices and embeddings, none on the rest."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


class _LayerNorm(nn.Module):
    def __init__(self, config: GPTConfig, fused: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias)  # (B, T, C)
        centred = x - x.mean(-1, keepdim=True)  # (B, T, C)
        variance = centred.square().mean(-1, keepdim=True)  # (B, T, 1); Tensor.var takes twice the time
        y = centred / torch.sqrt(variance + 1e-5) * self.weight  # (B, T, C)
        return y if self.bias is None else y + self.bias


class _Attention(nn.Module):
    visible: Tensor  # (block_size, block_size), True where a query (row) sees a key (column)

    def __init__(self, config: GPTConfig, fused: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.fused = fused
        if not fused:
            visible = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
            self.register_buffer("visible", visible, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=-1)
        )
        if self.fused:
            dropout_p = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)  # (B, H, T, D)
        else:
            att = (q @ k.transpose(-2, -1)) / math.sqrt(C // self.n_head)  # (B, H, T, T)
            att = att.masked_fill(~self.visible[:T, :T], -math.inf)
            y = self.attn_dropout(_softmax(att)) @ v  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class _MLP(nn.Module):
    def __init__(self, config: GPTConfig, fused: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = config.gelu
        self.gelu = F.gelu if fused else _gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class _Block(nn.Module):
    def __init__(self, config: GPTConfig, fused: bool) -> None:
        super().__init__()
        self.ln_1 = _LayerNorm(config, fused)
        self.attn = _Attention(config, fused)
        self.ln_2 = _LayerNorm(config, fused)
        self.mlp = _MLP(config, fused)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


# The maxima below are constants that cancel, so they are detached: the peer is not to be slow where it need not be.


def _softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def _gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    shifted = logits - logits.detach().amax(-1, keepdim=True)  # (B * T, V)
    lse = shifted.exp().sum(-1).log()  # (B * T,)
    picked = shifted.gather(-1, targets[:, None]).squeeze(-1)  # (B * T,)
    return (lse - picked).mean()
