"""Rung 3: tokens learn of their past, as its average.

A token may look at those before it, never at those after it, which it has to predict. The simplest that it can learn
of them is their mean, and this rung takes it in three ways that give the same numbers: by loops, by the product with
a triangular matrix whose rows sum to 1, and with that matrix made by softmax, from zeros and -inf where a token must
not look. The third is the one to keep: in place of the zeros there can stand numbers that say whom to look at, and
how much.

A mean forgets the order of what it sees and even which character is the last: this model is worse than the bigram.
"""

import torch
import torch.nn as nn
from shared import Options, Result, climb, rung, tiny_shakespeare
from torch import Tensor

Text = rung(1).Text
train = rung(2).train
validation_loss = rung(2).validation_loss
generate = rung(2).generate

C = 32  # numbers that a token is made of


def mean_by_loops(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)  # (B, T, C)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            y[b, t] = x[b, : t + 1].mean(0)
    return y


def mean_by_product(x: Tensor) -> Tensor:
    weights = torch.tril(torch.ones(x.shape[1], x.shape[1]))  # (T, T), row t has t + 1 ones
    weights = weights / weights.sum(1, keepdim=True)
    return weights @ x  # (T, T) @ (B, T, C) -> (B, T, C)


def mean_by_softmax(x: Tensor) -> Tensor:
    T = x.shape[1]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)  # True above the diagonal
    weights = torch.zeros(T, T).masked_fill(future, -torch.inf).softmax(1)  # exp(-inf) is 0
    return weights @ x


class MeanOfPast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mean_by_softmax(x)


class LanguageModel(nn.Module):
    """What stays the same on all further rungs: embeddings below, logits above, and ``body`` in between."""

    def __init__(self, vocab_size: int, body: nn.Module, n_embd: int = C, block_size: int = 8) -> None:
        super().__init__()
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = nn.Embedding(block_size, n_embd)
        self.body = body
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx) + self.position_embedding.weight[: idx.shape[1]]  # (B, T, C)
        return self.lm_head(self.body(x))  # (B, T, V)


def main(options: Options) -> Result:
    x = torch.randn(4, 8, 2)
    for mean in (mean_by_product, mean_by_softmax):
        torch.testing.assert_close(mean(x), mean_by_loops(x))
    print(f"the weights of the softmax, a row for each token:\n{mean_by_softmax(torch.eye(4)[None])[0]}")

    text = Text(tiny_shakespeare())
    model = LanguageModel(text.vocab_size, MeanOfPast())
    train(model, text, options.steps, lr=1e-3)
    return Result(3, "the mean of the past", validation_loss(model, text), None, generate(model, text))


if __name__ == "__main__":
    climb(main, steps=5000)
