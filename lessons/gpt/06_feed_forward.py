"""Rung 6: a feed-forward layer.

Attention lets tokens speak with each other, but all it gives them is a sum of values: nothing has been made of it
yet. A linear layer and a ReLU, the same at every position, let each token work by itself on what it has heard.
"""

import torch.nn as nn
from shared import Options, Result, climb, rung, tiny_shakespeare

Text = rung(1).Text
train = rung(2).train
validation_loss = rung(2).validation_loss
generate = rung(2).generate
C = rung(3).C
LanguageModel = rung(3).LanguageModel
MultiHead = rung(5).MultiHead


class FeedForward(nn.Sequential):
    """Position by position, (B, T, C) -> (B, T, width)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(C, width), nn.ReLU())


def main(options: Options) -> Result:
    text = Text(tiny_shakespeare())
    model = LanguageModel(text.vocab_size, nn.Sequential(MultiHead(4), FeedForward(C)))
    train(model, text, options.steps, lr=1e-3)
    return Result(6, "a feed-forward layer", validation_loss(model, text), 2.24, generate(model, text))


if __name__ == "__main__":
    climb(main, steps=5000)
