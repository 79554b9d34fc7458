"""Rung 2: the bigram, a table of 65 x 65 numbers.

Row i holds the logits of what follows character i; softmax makes them probabilities, and cross-entropy is minus the
logarithm of the one that the true next character got. The best table there is knows how often each character follows
each other one, and that is all this model will ever know: it looks at one character and forgets what came before.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from shared import Options, Result, climb, rung, tiny_shakespeare
from torch import Tensor

Text = rung(1).Text


class Bigram(nn.Module):
    block_size = 8

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)  # (B, T) -> (B, T, V): logits


def cross_entropy_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -ln p(target): logits (N, V), targets (N,)."""
    weights = logits.exp()  # (N, V)
    p = weights / weights.sum(1, keepdim=True)  # (N, V), each row sums to 1
    return -p[torch.arange(len(targets)), targets].log().mean()


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Every position of every sequence is an example: (B, T, V) logits are (B * T, V) to cross-entropy."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model: nn.Module, text: Text, steps: int, lr: float) -> None:
    """``steps`` times: draw a batch, follow the gradient of its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)  # fused: one call for all parameters
    model.train()
    for step in range(steps):
        loss = loss_of(model, *text.batch("train", block_size=model.block_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 1000 == 0:
            print(f"step {step}: loss of the batch {loss.item():.3f}")


@torch.no_grad()
def validation_loss(model: nn.Module, text: Text) -> float:
    """Over the whole validation split, cut into pieces of ``block_size``: no batch is drawn, so there is no noise."""
    model.eval()
    tokens, T = text.splits["val"], model.block_size
    pieces = (len(tokens) - 1) // T
    x, y = (tokens[i : i + pieces * T].view(pieces, T) for i in (0, 1))
    losses = [loss_of(model, *part) * len(part[0]) for part in zip(x.split(200), y.split(200), strict=True)]
    return (torch.stack(losses).sum() / pieces).item()


@torch.no_grad()
def generate(model: nn.Module, text: Text, count: int = 200) -> str:
    """Draw a character, append it, and ask again, of the last ``block_size`` characters alone."""
    model.eval()
    idx = torch.tensor([text.encode("\n")])  # (1, 1)
    for _ in range(count):
        logits = model(idx[:, -model.block_size :])[:, -1]  # (1, V): what follows the last character
        idx = torch.cat([idx, torch.multinomial(logits.softmax(1), 1)], 1)
    return text.decode(idx[0, 1:].tolist())


def main(options: Options) -> Result:
    text = Text(tiny_shakespeare())
    model = Bigram(text.vocab_size)
    x, y = text.batch("train")
    by_hand = cross_entropy_by_hand(model(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(by_hand, loss_of(model, x, y))
    # Random logits are worse than none (ln 65 = 4.17): the model is sure of things, and wrong.
    print(f"cross-entropy before training, by hand and by torch: {by_hand.item():.3f}")
    print(f"and so it writes: {generate(model, text, 60)!r}")

    train(model, text, options.steps, lr=1e-2)
    return Result(2, "the bigram", validation_loss(model, text), 2.49, generate(model, text))


if __name__ == "__main__":
    climb(main, steps=3000)
