"""Rung 1: a text as integers, and batches of it.

A language model sees no letters: each character becomes a number, its place in the sorted list of all characters. The
first 90% of the numbers are for training; the last 10% it never trains on, and only they show what it has learned
beyond the text itself. It reads pieces of ``block_size`` characters, several at once; each position of a piece is an
example of its own, with a context of its own length, so that the model also learns to begin with a single character.

A model that knows nothing gives every character the same probability, 1/65: a loss of ln 65 = 4.17, where we start.

After Andrej Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out", as is the whole ladder.
"""

import math

import torch
from shared import Options, Result, climb, tiny_shakespeare
from torch import Tensor


class Text:
    """A text as integers, in two splits: "train" (90%) and "val"."""

    def __init__(self, text: str) -> None:
        self.chars = sorted(set(text))
        self.vocab_size = len(self.chars)
        self._number = {char: i for i, char in enumerate(self.chars)}
        tokens = torch.tensor(self.encode(text))  # (characters,), int64
        split = int(0.9 * len(tokens))
        self.splits = {"train": tokens[:split], "val": tokens[split:]}

    def encode(self, text: str) -> list[int]:
        return [self._number[char] for char in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.chars[i] for i in tokens)

    def batch(self, split: str, batch_size: int = 32, block_size: int = 8) -> tuple[Tensor, Tensor]:
        """Pieces from anywhere in a split, x, and the same moved on by one character, y: two (B, T)."""
        tokens = self.splits[split]
        starts = torch.randint(len(tokens) - block_size, (batch_size, 1))  # (B, 1)
        places = starts + torch.arange(block_size)  # (B, T)
        return tokens[places], tokens[places + 1]


def main(options: Options) -> Result:
    text = Text(tiny_shakespeare())
    print(f"{text.vocab_size} characters: {''.join(text.chars)!r}")
    numbers = text.encode("hii there")
    print(f"'hii there' is {numbers}")
    assert text.decode(numbers) == "hii there"
    print(f"{len(text.splits['train']):,} characters to train on, {len(text.splits['val']):,} to validate")

    x, y = text.batch("train", batch_size=4)
    print(f"\nx, {tuple(x.shape)}:\n{x}\ny, the same shape:\n{y}\nThe first row holds {x.shape[1]} examples:")
    for t in range(x.shape[1]):
        print(f"  after {text.decode(x[0, : t + 1].tolist())!r} comes {text.decode([y[0, t].item()])!r}")
    assert torch.equal(x[:, 1:], y[:, :-1])  # the answer at one position is the last of the next one's context

    guess = torch.randint(text.vocab_size, (200,)).tolist()
    return Result(1, "guessing evenly", math.log(text.vocab_size), None, text.decode(guess))


if __name__ == "__main__":
    climb(main, steps=0)
