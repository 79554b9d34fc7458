"""Each token of a text once, from the context that its window gives it."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT, GPTConfig
from fastgpt.config import BigramConfig, UserError
from fastgpt.data import TokenizedText
from fastgpt.model import Bigram
from fastgpt.perplexity import text_loss
from fastgpt.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcde\u2713")
CONFIG = GPTConfig(block_size=8, vocab_size=6, n_layer=1, n_head=2, n_embd=16)


def model():
    torch.manual_seed(3)
    made = GPT(CONFIG).eval()
    torch.nn.init.normal_(made.transformer.wte.weight)  # or all tokens are about as probable
    return made


def text(length):
    ids = np.random.default_rng(length).integers(0, 6, length)
    return TokenizedText("some text", ids, len(TOKENIZER.to_bytes(ids)))


def evaluate(model, of, stride=None, batch_size=3):
    device = torch.device("cpu")
    return text_loss(
        model, of, TOKENIZER, stride=stride, batch_size=batch_size, device=device, autocast=contextlib.nullcontext()
    )


def one_by_one(model, tokens, stride):
    """The loss of each token from the context that the first window to reach it has."""
    tokens, losses = torch.from_numpy(tokens), []
    for target in range(1, len(tokens)):
        window = max(0, math.ceil((target - 8) / stride))
        logits, _ = model(tokens[None, window * stride : target])
        losses.append(F.cross_entropy(logits[0, -1].double(), tokens[target]).item())
    return sum(losses)


@pytest.mark.parametrize("stride", [8, 5, 1])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 18, 40, 43])
def test_each_token_counts_once_and_sees_its_window(length, stride):
    of = text(length)
    found = evaluate(model(), of, stride)
    nats = one_by_one(model(), of.tokens, stride)
    assert found.tokens == length - 1
    assert found.loss == pytest.approx(nats / (length - 1), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    counted = len(TOKENIZER.to_bytes(of.tokens[1:]))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / counted, rel=1e-5)


def test_the_batch_size_changes_nothing():
    losses = [evaluate(model(), text(100), 3, batch_size).loss for batch_size in (1, 4, 100)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_bigram_gives_the_same_at_any_stride():
    bigram = Bigram(BigramConfig(block_size=8, vocab_size=6)).eval()
    assert evaluate(bigram, text(50)).loss == pytest.approx(evaluate(bigram, text(50), 2).loss, rel=1e-6)


@pytest.mark.parametrize(
    ("length", "stride", "sentence"),
    [
        (20, 9, "stride must be from 1 to the model's block_size 8, got 9"),
        (20, 0, "stride must be from 1"),
        (1, 8, "some text: a text must have at least 2 tokens to be evaluated, got 1"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(length, stride, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(model(), text(length), stride)
