"""Rung 5: several heads side by side.

One head makes one weighted sum of the past. Four heads of a quarter of the size have as many weights and make four
sums: one may look for vowels, another for where the word began. What they find is concatenated.

They need not run one after the other. To a product of matrices a head is one more dimension to repeat itself over,
like the batch: (B, H, T, D) for (B, T, C). That is how every further rung computes them, and the loop is what it must
equal.
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
attend = rung(4).attend
Head = rung(4).Head


class MultiHead(nn.Module):
    """``n_head`` heads of size C / n_head, (B, T, C) -> (B, T, C)."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.query, self.key, self.value = (nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            for projection in (self.query, self.key, self.value)
        )
        return attend(q, k, v).transpose(1, 2).flatten(2)  # (B, T, H, D) -> (B, T, C)


@torch.no_grad()
def check_against_loop(heads: MultiHead, x: Tensor) -> None:
    """Head after head, each with its own rows of the weights, gives the same."""
    outputs = []
    for number in range(heads.n_head):
        one = Head(C // heads.n_head)
        for name in ("query", "key", "value"):
            rows = getattr(heads, name).weight.chunk(heads.n_head)[number]  # (D, C)
            getattr(one, name).weight.copy_(rows)
        outputs.append(one(x))
    torch.testing.assert_close(heads(x), torch.cat(outputs, -1))


def main(options: Options) -> Result:
    heads = MultiHead(4)
    check_against_loop(heads, torch.randn(4, 8, C))
    one, four = (sum(p.numel() for p in module.parameters()) for module in (Head(C), heads))
    print(f"one head of {C} has {one:,} weights, four of {C // 4} have {four:,}")

    text = Text(tiny_shakespeare())
    model = LanguageModel(text.vocab_size, heads)
    train(model, text, options.steps, lr=1e-3)
    return Result(5, "four heads", validation_loss(model, text), 2.28, generate(model, text))


if __name__ == "__main__":
    climb(main, steps=5000)
