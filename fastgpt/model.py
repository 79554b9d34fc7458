"""GPT as GPT-2 has it, and the bigram baseline. Every hot operation goes through ``fastgpt.ops``.

Sizes in comments: B sequences, T tokens each, C = n_embd, H heads of D = C / H, V tokens in the (padded) vocabulary.
Parameters carry GPT-2's own names, so that its weights load by name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgpt import dispatch, ops
from fastgpt.config import BigramConfig, GPTConfig
from fastgpt.decode import Layout, decode_step
from fastgpt.ops.seed import seed_for


class KVCache:
    """The keys and values of the tokens that a GPT has read, so that each further token is read alone.

    ``GPT.forward`` first reads whole sequences into it, then one token of each at a time. The memory is taken once, at
    the first read, in the dtype that the keys come in: 2 * n_layer * B * capacity * C elements.

    Args:
        capacity: tokens of the longest sequence in the end.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.start = 0  # tokens of the longest sequence before those that are being read
        self.end = 0  # and with them
        self.lengths: Tensor | None = None  # (B,), int64: with them, of each sequence; None: all have ``end``
        self.layout: Layout | None = None  # of the model, from the first step on that decode_step might take
        self._memory: dict[nn.Module, Tensor] = {}  # of each layer, (B, capacity, 2, H, D)

    def begin(self, T: int, lengths: Tensor | None) -> None:
        """Make ready for T further tokens; ``lengths`` is ``GPT.forward``'s.

        Raises:
            ValueError: several tokens after the first read, or more than there is room for.
        """
        if self.end and T != 1:
            raise ValueError(f"KVCache: after the first read it takes one token at a time, got {T}")
        if self.end + T > self.capacity:
            raise ValueError(f"KVCache: {self.end + T} tokens do not fit into its capacity of {self.capacity}")
        self.start, self.end, self.lengths = self.end, self.end + T, lengths

    def memory_of(self, layer: nn.Module, like: Tensor, B: int, H: int, D: int) -> Tensor:
        """The keys and values of a layer, (B, capacity, 2, H, D), of ``like``'s dtype and device."""
        if layer not in self._memory:
            # Zeros: a shorter sequence leaves places unwritten. Hidden from its queries they weigh 0, and 0 times what
            # the memory held before could be NaN.
            self._memory[layer] = like.new_zeros(B, self.capacity, 2, H, D)
        return self._memory[layer]

    def extend(self, layer: nn.Module, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values of a layer, (B, T, 2, H, D); returns all it has, two of (B, H, Tk, D)."""
        B, _, _, H, D = kv.shape
        memory = self.memory_of(layer, kv, B, H, D)
        if self.start and self.lengths is not None:
            memory[torch.arange(B, device=kv.device), self.lengths - 1] = kv[:, 0]
        else:
            memory[:, self.start : self.end] = kv
        k, v = memory[:, : self.end].permute(2, 0, 3, 1, 4)  # two of (B, H, Tk, D)
        return k, v


class Linear(nn.Linear):
    """nn.Linear, whose weights the model that it is part of draws."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding, whose weights the model that it is part of draws."""

    def reset_parameters(self) -> None:
        pass


class LayerNorm(nn.Module):
    """Layer norm with an optional bias, and with the residual addition before it where there is one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)  # (B, T, C)

    def add(self, x: Tensor, residual: Tensor, dropout_p: float, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of dropout(x) + residual, and that sum."""
        return ops.add_layer_norm(  # two of (B, T, C)
            x, residual, self.weight, self.bias, dropout_p=dropout_p, seed=seed
        )


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.fused = config.attention == "fused"

    def forward(self, x: Tensor, cache: KVCache | None = None, seed: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        dropout_p = self.dropout if self.training else 0.0
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        if cache is not None:
            k, v = cache.extend(self, qkv[:, :, 1:])  # two of (B, H, Tk, D)
        if cache is not None and cache.start:
            q = qkv[:, :, 0].transpose(1, 2)  # (B, H, 1, D): one query, which sees every key of its sequence
            seqlens_k = None if cache.lengths is None else cache.lengths.int()  # (B,)
            y = ops.attention(q, k, v, is_causal=False, dropout_p=dropout_p, seqlens_k=seqlens_k, seed=seed)
            y = y.transpose(1, 2)  # (B, 1, H, D)
        elif self.fused:
            y = ops.attention_qkvpacked(qkv, dropout_p=dropout_p, seed=seed)  # (B, T, H, D)
        else:
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # three of (B, H, T, D)
            att = ops.softmax(q @ k.mT, scale=q.shape[-1] ** -0.5, is_causal=True)  # (B, H, T, T)
            y = (ops.dropout(att, dropout_p, seed=seed) @ v).transpose(1, 2)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = config.gelu

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.c_fc.weight)  # (B, T, 4C); the bias is added where GELU reads it anyway
        x = ops.gelu(x, self.c_fc.bias, approximate=self.approximate)  # (B, T, 4C)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """A pre-norm block that hands its last sum on unfinished, so that every addition meets the norm that follows it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.dropout = config.dropout
        self.recompute = False

    def forward(self, x: Tensor, residual: Tensor | None, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: (B, T, C), what the sublayer before adds to the residual stream; the embedding in the first block.
            residual: (B, T, C), the stream before that addition; None in the first block.
            cache: what came before x, if anything did; it takes up the keys and values of x.
        Returns:
            The MLP's output and the stream it is still to be added to, both (B, T, C).
        """
        dropout_p = self.dropout if self.training else 0.0
        draws = 2 if residual is None else 3
        # Drawn out here: when the block is computed again, the same elements must drop.
        seeds = [seed_for(dropout_p, None, x.device) for _ in range(draws)]
        if cache is not None or not (self.recompute and torch.is_grad_enabled()):
            return self._sublayers(x, residual, cache, *seeds)
        choice = dispatch.current_choice()  # a GPU's backward runs in a thread that use_backend has not reached

        def sublayers(x: Tensor, residual: Tensor | None, *seeds: Tensor | None) -> tuple[Tensor, Tensor]:
            with dispatch.use_backend(**choice):
                return self._sublayers(x, residual, None, *seeds)

        return checkpoint(sublayers, x, residual, *seeds, use_reentrant=False, preserve_rng_state=False)

    def _sublayers(
        self, x: Tensor, residual: Tensor | None, cache: KVCache | None, *seeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``forward`` with the seeds of what drops, in the order of use: ln_1's where it adds, attn's and ln_2's."""
        dropout_p = self.dropout if self.training else 0.0
        y, residual = (self.ln_1(x), x) if residual is None else self.ln_1.add(x, residual, dropout_p, seeds[0])
        y, residual = self.ln_2.add(self.attn(y, cache, seeds[-2]), residual, dropout_p, seeds[-1])
        return self.mlp(y), residual


class Transformer(nn.Module):
    """Everything of a GPT but its output layer: the embeddings, the blocks and the last norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        self.dropout = config.dropout

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        if cache is None:
            positions = self.wpe.weight[: idx.shape[1]]  # (T, C)
        elif cache.start and cache.lengths is not None:
            positions = self.wpe(cache.lengths - 1)[:, None]  # (B, 1, C)
        else:
            positions = self.wpe.weight[cache.start : cache.end]  # (T, C)
        x = self.wte(idx) + positions  # (B, T, C)
        x = ops.dropout(x, dropout_p)
        residual: Tensor | None = None
        for block in self.h:
            x, residual = block(x, residual, cache)  # two of (B, T, C)
        assert residual is not None
        return self.ln_f.add(x, residual, dropout_p)[0]  # (B, T, C)


class GPT(nn.Module):
    """A GPT-2-shaped language model (Radford et al., 2019).

    Weights are drawn from N(0, 0.02), those of the projections onto the residual stream from
    N(0, 0.02 / sqrt(2 n_layer)); biases start at 0.

    Args:
        drawn: False leaves the weights as their memory is, to someone who has others.
    """

    def __init__(self, config: GPTConfig, *, drawn: bool = True) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if drawn:
            for name, parameter in self.named_parameters():
                self.draw(name, parameter)

    def draw(self, name: str, parameter: Tensor) -> None:
        """Give the parameter of this name, whole and in place, the value that training starts from."""
        if name.endswith("c_proj.weight"):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)

    @classmethod
    def from_pretrained(cls, source: str | Path, **settings: Any) -> GPT:
        """GPT-2's weights by name ("gpt2"), or those of a folder or file: ``fastgpt.pretrained.load_pretrained``."""
        from fastgpt.pretrained import load_pretrained  # which needs this file

        return load_pretrained(source, **settings)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        last_only: bool = False,
        lengths: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        Args:
            idx: (B, T), int64, tokens; T at most ``block_size``, less what is in the cache.
            targets: (B, T), int64, the token that follows each; -100 counts nowhere.
            last_only: make logits for the last position alone, as generation needs them.
            lengths: (B,), int64, at least 1: tokens of each sequence, those in the cache included, where they differ;
                its row of idx is then padded on the right, and ``last_only`` means the last of its own tokens.
            cache: takes up what is read here. idx is what follows on its contents: after the first read, T is 1.
        Returns:
            Without targets: logits, (B, T, vocab_size) or (B, 1, vocab_size), and None.
            With targets: None (the logits never exist) and the mean loss, a scalar in fp32. The rows that pad the
            vocabulary take part in its softmax; no target names them, and training soon drives them to zero.
        Raises:
            ValueError: idx, targets or lengths of a wrong shape or dtype, T beyond ``block_size`` or what fits into the
                cache, or a token that is not in the vocabulary (looked at on a CPU, outside of torch.compile).
        """
        _check_tokens("GPT", idx, targets, lengths, self.config.vocab_size)
        T, held = idx.shape[1], 0 if cache is None else cache.end
        if held + T > self.config.block_size:
            after = f" after the {held} in the cache" if held else ""
            raise ValueError(f"GPT: idx must have at most block_size {self.config.block_size} columns, got {T}{after}")
        if cache is not None:
            cache.begin(T, lengths)
            logits = None if targets is not None else decode_step(self, idx, cache)  # (1, 1, V)
            if logits is not None:
                return logits[..., : self.config.vocab_size], None
        x = self.transformer(idx, cache)  # (B, T, C)
        if targets is not None:
            return None, ops.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        if last_only:
            x = _last(x, lengths)  # (B, 1, C)
        logits = self.lm_head(x)  # (B, T or 1, V)
        return logits[..., : self.config.vocab_size], None

    def recompute_blocks(self) -> None:
        """From now on keep only the inputs of each block, and compute it again in the backward (Chen et al., 2016).

        Gradients are the same bits, for less memory and one more forward of the blocks.
        """
        for block in self.modules():
            if isinstance(block, Block):
                block.recompute = True

    def num_params(self, *, positions: bool = True) -> int:
        """Parameters, shared ones once; ``positions=False`` leaves out wpe, as nanoGPT counts."""
        count = sum(p.numel() for p in self.parameters())
        return count if positions else count - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> int:
        """FLOPs of one token's training step, forward and backward, at a context of ``block_size``.

        6 for each weight of a matrix product (2 forward, 4 backward; embeddings are looked up, layer norms and biases
        left out), and 12 * n_layer * n_embd * block_size for q k^T and its product with v, the causal half not taken
        off (Chowdhery et al., 2022, appendix B).
        """
        c = self.config
        matrices = c.n_layer * 12 * c.n_embd**2 + c.padded_vocab_size * c.n_embd
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size


class Bigram(nn.Module):
    """The baseline of the lecture: a table of logits for the next token, looked up by the present one."""

    def __init__(self, config: BigramConfig, *, drawn: bool = True) -> None:
        super().__init__()
        self.config = config
        self.token_embedding_table = Embedding(config.vocab_size, config.vocab_size)
        if drawn:
            self.draw("token_embedding_table.weight", self.token_embedding_table.weight)

    def draw(self, name: str, parameter: Tensor) -> None:
        """As ``GPT.draw``: from N(0, 1), as nn.Embedding is."""
        nn.init.normal_(parameter)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        last_only: bool = False,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As ``GPT.forward``; any T, and no cache: a token follows on the one before it alone."""
        _check_tokens("Bigram", idx, targets, lengths, self.config.vocab_size)
        logits = self.token_embedding_table(_last(idx, lengths) if last_only else idx)  # (B, T or 1, V)
        if targets is None:
            return logits, None
        return None, ops.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def num_params(self) -> int:
        """Parameters of the table."""
        return self.token_embedding_table.weight.numel()


def _last(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last position of each row of ``x`` (B, T, ...), by ``lengths`` where the row is padded: (B, 1, ...)."""
    if lengths is None or x.shape[1] == 1:
        return x[:, -1:]
    return x[torch.arange(x.shape[0], device=x.device), lengths - 1].unsqueeze(1)


def _check_tokens(model: str, idx: Tensor, targets: Tensor | None, lengths: Tensor | None, vocab_size: int) -> None:
    """Shapes and dtypes, and on a CPU outside of torch.compile that every token is one of the vocabulary."""
    if idx.dim() != 2 or idx.dtype != torch.int64:
        raise ValueError(f"{model}: idx must be int64 of shape (B, T), got {idx.dtype} of shape {tuple(idx.shape)}")
    if targets is not None and (targets.shape != idx.shape or targets.dtype != torch.int64):
        raise ValueError(
            f"{model}: targets must be int64 of idx's shape {tuple(idx.shape)}, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    if lengths is not None and (lengths.shape != idx.shape[:1] or lengths.dtype != torch.int64):
        raise ValueError(
            f"{model}: lengths must be int64 of shape {tuple(idx.shape[:1])}, got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}"
        )
    if idx.device.type != "cpu" or torch.compiler.is_compiling() or idx.numel() == 0:
        return
    low, high = (int(bound) for bound in idx.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{model}: idx must be in [0, {vocab_size}), got {low if low < 0 else high}")
    if targets is not None and int(targets.max()) >= vocab_size:  # the loss itself looks at the rest
        raise ValueError(f"{model}: targets must be below {vocab_size} (vocab_size), got {int(targets.max())}")
