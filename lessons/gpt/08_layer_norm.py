"""Rung 8: layer norm, and why not batch norm.

Both make numbers of mean 0 and variance 1, then scale and shift them by two learned vectors. Layer norm takes mean
and variance over the C numbers of one token, batch norm takes them for each of the C numbers over all tokens of the
batch. It stands before each sublayer (the paper has it after; before is how GPT-2 and all that followed do it), off
the residual road, and once more at the end.

Batch norm would train, and here is what is wrong with it, measured: the loss of a sequence depends on what else is in
the batch; a token's output depends on tokens after it, which it must not see; and since a single prompt has no batch,
it needs averages kept from training, with which the model is another one than the one that was trained.
"""

from collections.abc import Callable
from functools import partial

import torch
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
sublayers = rung(7).sublayers
Block = rung(7).Block


def layer_norm_by_hand(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)  # (B, T, 1)
    variance = x.var(-1, keepdim=True, unbiased=False)  # (B, T, 1)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


class BatchNorm(nn.BatchNorm1d):
    """PyTorch's, over B and T: it wants (B, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class NormBlock(Block):
    """A block with a norm before each sublayer; ``norm`` makes one."""

    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__(attention, feed_forward)
        self.norm_1, self.norm_2 = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


@torch.no_grad()
def show_faults(name: str, model: nn.Module, text: Text) -> None:
    """What a sequence's loss depends on beside itself, and how far the model in use is the one that was trained."""
    x, y = text.batch("val")
    in_use = loss_of(model.eval(), x, y)
    in_training = loss_of(model.train(), x, y)
    losses = []
    for _ in range(20):
        x[1:] = text.batch("val", batch_size=31)[0]
        losses.append(nn.functional.cross_entropy(model(x)[0], y[0]).item())
    before = model(x)[0, 0]
    x[0, -1] = (x[0, -1] + 1) % text.vocab_size
    moved = (model(x)[0, 0] - before).abs().max()
    print(f"{name}: a sequence's loss is {min(losses):.3f} to {max(losses):.3f}, by its neighbours in the batch")
    print(f"{name}: another last token moves the logits of the first by {moved:.4f}")
    print(f"{name}: a batch's loss is {in_training:.3f} as in training, {in_use:.3f} as in use")


def main(options: Options) -> Result:
    x, norm = torch.randn(4, 8, C), nn.LayerNorm(C)
    torch.testing.assert_close(layer_norm_by_hand(x, norm.weight, norm.bias), norm(x))

    text = Text(tiny_shakespeare())
    for name, kind, steps in (
        ("batch norm", BatchNorm, options.steps // 5),  # enough to see its faults
        ("layer norm", nn.LayerNorm, options.steps),
    ):
        norm = partial(kind, C)
        body = nn.Sequential(*[NormBlock(norm, *sublayers()) for _ in range(3)], norm())
        model = LanguageModel(text.vocab_size, body)
        train(model, text, steps, lr=1e-3)
        loss = validation_loss(model, text)
        print(f"{name}: loss {loss:.3f} after {steps} steps")
        show_faults(name, model, text)
    return Result(8, "layer norm", loss, 2.06, generate(model, text))


if __name__ == "__main__":
    climb(main, steps=5000)
