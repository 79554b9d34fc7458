"""Rung 7: three blocks, and residual connections.

Speaking and thinking, attention and feed-forward, make a block, and blocks stack. As they are, three of them learn
less than the one of rung 6: on its way down the gradient goes through every layer's product, and shrinks in each. Let
every layer add to what came in, x + f(x), in place of replacing it. A sum hands the gradient to both of its terms as
it is, so that a straight road leads from the loss to the embedding, and layers turn off it. A linear layer at the end
of each projects what it found onto that road; and the feed-forward layer becomes four times as wide inside, as in the
paper (Vaswani et al., 2017).
"""

import torch.nn as nn
from shared import Options, Result, climb, rung, tiny_shakespeare
from torch import Tensor

Text = rung(1).Text
loss_of = rung(2).loss_of
train = rung(2).train
validation_loss = rung(2).validation_loss
generate = rung(2).generate
C = rung(3).C
LanguageModel = rung(3).LanguageModel
MultiHead = rung(5).MultiHead
FeedForward = rung(6).FeedForward


def sublayers() -> tuple[nn.Module, nn.Module]:
    """Attention and feed-forward, each with its projection, (B, T, C) -> (B, T, C)."""
    return (
        nn.Sequential(MultiHead(4), nn.Linear(C, C)),
        nn.Sequential(FeedForward(4 * C), nn.Linear(4 * C, C)),
    )


class Block(nn.Module):
    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class BlockWithoutResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.attention(x))


def gradient_norms(block: type[Block], text: Text, n_layer: int) -> list[float]:
    """Of the loss, before training, for the weights of each of ``n_layer`` blocks, the lowest first."""
    blocks = nn.Sequential(*[block(*sublayers()) for _ in range(n_layer)])
    loss_of(LanguageModel(text.vocab_size, blocks), *text.batch("train")).backward()
    return [sum(p.grad.square().sum() for p in one.parameters()).sqrt().item() for one in blocks]


def main(options: Options) -> Result:
    text = Text(tiny_shakespeare())
    kinds = {"without residual connections": BlockWithoutResidual, "with them": Block}
    for name, block in kinds.items():
        norms = " ".join(f"{norm:.1e}" for norm in gradient_norms(block, text, n_layer=8))
        print(f"gradient norms of 8 blocks, the lowest first, {name}: {norms}")
    for name, block in kinds.items():
        model = LanguageModel(text.vocab_size, nn.Sequential(*[block(*sublayers()) for _ in range(3)]))
        train(model, text, options.steps, lr=1e-3)
        loss = validation_loss(model, text)
        print(f"three blocks {name}: loss {loss:.3f}")
    return Result(7, "three blocks with residuals", loss, 2.08, generate(model, text))


if __name__ == "__main__":
    climb(main, steps=5000)
