"""Rung 10: the mask makes the model, and what comes after pre-training.

Who may see whom decides what a transformer is for:

- decoder-only, our GPT: a token sees itself and its past, hence can be asked what comes next;
- encoder-only, like BERT: every token sees all of them, which is for understanding a text that is there, not for
  writing on;
- encoder-decoder, the model of the paper (Vaswani et al., 2017): an encoder reads the source, all of it; a decoder
  writes, sees its own past, and by cross-attention the whole source: queries from one text, keys and values from
  another, of another length.

The last is trained here to write strings backwards.

All that this ladder trained is *pre-training*: predict the next token of as much text as there is. It makes a model
that goes on with documents, and a question is not always followed by its answer. *Fine-tuning* goes on in the same
way, same loss, smaller learning rate, on documents as they should be, prompts and good answers; only tokens of the
answer count (targets of -100, as for the padding below; `fastgpt train --init gpt2 --data FILE` lets all count).
*Alignment* begins where there is no text to copy from: people say which of two answers is better, a reward model
learns to say so, and the language model is trained for its reward (RLHF).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from shared import Options, Result, climb
from torch import Tensor

from fastgpt import ops

C, LONGEST, START, END, IGNORED = 64, 8, 26, 27, -100  # letters are 0 to 25; targets of -100 count nowhere


class Attention(nn.Module):
    """x asks, ``source`` answers: queries from one, keys and values from the other, by fastgpt's kernels."""

    def __init__(self, is_causal: bool, n_head: int = 4) -> None:
        super().__init__()
        self.is_causal, self.n_head = is_causal, n_head
        self.query, self.key, self.value, self.project = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor, lengths: Tensor | None = None) -> Tensor:
        q, k, v = (  # (B, H, Tq, D), and two of (B, H, Tk, D)
            projection(tokens).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for projection, tokens in ((self.query, x), (self.key, source), (self.value, source))
        )
        y = ops.attention(q, k, v, is_causal=self.is_causal, seqlens_k=lengths)  # (B, H, Tq, D)
        return self.project(y.transpose(1, 2).flatten(2))  # (B, Tq, C)


class Layer(nn.Module):
    """Of the encoder, or of the decoder, which also asks the encoder's output ``memory``."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.attention = Attention(is_causal=decoder)
        self.cross = Attention(is_causal=False) if decoder else None
        self.feed_forward = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(3))

    def forward(self, x: Tensor, lengths: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, None if self.cross else lengths)  # a decoder's padding is in its future
        if self.cross:
            x = x + self.cross(self.norms[1](x), memory, lengths)
        return x + self.feed_forward(self.norms[2](x))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(END + 1, C)
        self.places = nn.Embedding(LONGEST + 1, C)
        self.encoder = nn.ModuleList(Layer(decoder=False) for _ in range(2))
        self.decoder = nn.ModuleList(Layer(decoder=True) for _ in range(2))
        self.lm_head = nn.Linear(C, END + 1)

    def forward(self, source: Tensor, lengths: Tensor, written: Tensor) -> Tensor:
        memory, x = (self.letters(idx) + self.places.weight[: idx.shape[1]] for idx in (source, written))
        for layer in self.encoder:
            memory = layer(memory, lengths)  # (B, 8, C)
        for layer in self.decoder:
            x = layer(x, lengths, memory)  # (B, 9, C)
        return self.lm_head(x)  # (B, 9, 28)


def batch(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Strings of 4 to 8 letters, (B, 8), their lengths, and backwards: what the decoder reads and writes, (B, 9)."""
    source, lengths = torch.randint(26, (size, LONGEST)), torch.randint(4, LONGEST + 1, (size, 1))
    place = torch.arange(LONGEST + 1)
    backwards = source.gather(1, (lengths - 1 - place).clamp(min=0))  # (B, 9)
    targets = backwards.masked_fill(place == lengths, END).masked_fill(place > lengths, IGNORED)
    written = torch.cat([torch.full((size, 1), START), backwards[:, :-1]], 1)
    return source, lengths[:, 0].int(), written, targets


@torch.no_grad()
def write(model: nn.Module, source: Tensor, lengths: Tensor) -> Tensor:
    """The most probable letter, nine times: (B, 9)."""
    written = torch.full((len(source), 1), START)
    for _ in range(LONGEST + 1):
        written = torch.cat([written, model(source, lengths, written)[:, -1:].argmax(-1)], 1)
    return written[:, 1:]


def mask(Tq: int, Tk: int, is_causal: bool) -> str:
    """Whom each query sees, drawn: queries of 0 weigh all alike, and the identity as values shows the weights."""
    eye = torch.eye(Tk)[None, None]
    weights = ops.attention(torch.zeros(1, 1, Tq, Tk), eye, eye, is_causal=is_causal)[0, 0]
    return "\n".join("  " + " ".join("x" if weight > 0 else "." for weight in row) for row in weights)


def spell(row: Tensor) -> str:
    return "".join(chr(ord("a") + i) for i in row.tolist() if 0 <= i < 26)


def main(options: Options) -> Result:
    print(f"decoder-only:\n{mask(4, 4, True)}\nencoder-only:\n{mask(4, 4, False)}")
    print(f"encoder-decoder, cross-attention of 3 queries to 5 keys:\n{mask(3, 5, False)}")

    model = EncoderDecoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(options.steps):
        *strings, targets = batch(64)
        loss = F.cross_entropy(model(*strings).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    *strings, targets = batch(1000)
    source, lengths, _ = strings
    output = write(model, source, lengths)
    right = ((output == targets) | (targets == IGNORED)).all(1)
    print(f"{right.float().mean():.1%} of 1000 new strings are written backwards without a fault")
    sample = "\n".join(
        f"{spell(s[:n])} -> {spell(o[:n])}" for s, n, o in zip(source[:5], lengths, output, strict=False)
    )
    with torch.no_grad():
        loss = F.cross_entropy(model(*strings).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    return Result(10, "encoder and decoder", loss.item(), None, sample, of="letters of new strings, backwards")


if __name__ == "__main__":
    climb(main, steps=400)
