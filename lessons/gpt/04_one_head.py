"""Rung 4: self-attention, one head.

The mean of rung 3 with weights that depend on what is there. Each token emits a query (what it looks for), a key
(what it can be found by) and a value (what it tells who finds it). The weight that one token gives another is the
softmax of the query times the key, and the head's output is the sum of values by these weights. Two details are
measured below:

- Queries times keys are divided by sqrt(head size). Each is a sum of head size terms, so its variance is that much
  greater than theirs, and the softmax of large numbers is all but a choice of the largest: a token would look at one
  other from the start, and the gradient would hardly reach the rest.
- The mask comes after the product and before the softmax. A key that is made 0 beforehand gets the logit 0, hence a
  weight like any other; a weight that is made 0 afterwards is missing from the sum, which is then no mean.
"""

import torch
import torch.nn as nn
from shared import Options, Result, climb, rung, tiny_shakespeare
from torch import Tensor

Text = rung(1).Text
train = rung(2).train
validation_loss = rung(2).validation_loss
generate = rung(2).generate
C = rung(3).C
LanguageModel = rung(3).LanguageModel


def future(T: int) -> Tensor:
    """(T, T), True where a query (row) must not see a key (column)."""
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, three of (..., T, D) to one."""
    logits = q @ k.mT * k.shape[-1] ** -0.5  # (..., T, T)
    weights = logits.masked_fill(future(q.shape[-2]), -torch.inf).softmax(-1)
    return weights @ v  # (..., T, D)


class Head(nn.Module):
    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(C, head_size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.query(x), self.key(x), self.value(x))  # (B, T, C) -> (B, T, D)


def show_scaling(head_size: int) -> None:
    """How large the logits of 8 keys are, and how uneven the weights, with and without the scaling."""
    q, k = torch.randn(2, 10_000, 8, head_size)  # of variance 1, as after a layer norm
    for name, scale in (("as it is", 1.0), ("scaled", head_size**-0.5)):
        logits = q @ k.mT * scale
        largest = logits.softmax(-1).amax(-1).mean()
        print(
            f"head size {head_size}, q k^T {name}: variance {logits.var():.1f}, the largest of 8 weights {largest:.2f}"
        )


@torch.no_grad()
def show_masking(head: Head) -> None:
    """The first token's weights, by where the mask is. It may see itself alone."""
    x = torch.randn(8, C)
    q, k, hidden = head.query(x)[:1], head.key(x), future(8)[:1]  # (1, D), (8, D), (1, 8)
    places = {
        "before the product": (q @ k.masked_fill(hidden.mT, 0).mT).softmax(-1),
        "before the softmax": (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1),
        "after the softmax": (q @ k.mT).softmax(-1).masked_fill(hidden, 0),
    }
    for place, weights in places.items():
        leaked = weights[hidden].sum()
        print(
            f"mask {place}: the first token gives its future {leaked:.2f}, and its weights sum to {weights.sum():.2f}"
        )


def main(options: Options) -> Result:
    for head_size in (16, 64):
        show_scaling(head_size)
    show_masking(Head(C))
    text = Text(tiny_shakespeare())
    model = LanguageModel(text.vocab_size, Head(C))
    train(model, text, options.steps, lr=1e-3)
    return Result(4, "one head of attention", validation_loss(model, text), 2.41, generate(model, text))


if __name__ == "__main__":
    climb(main, steps=5000)
