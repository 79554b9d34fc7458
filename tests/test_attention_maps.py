"""Attention maps are those of the attention that the model performs, and their pictures show them."""

import matplotlib.image
import pytest
import torch

from fastgpt import GPT, Bigram, GPTConfig
from fastgpt.attention_maps import LABELLED_TOKENS, _hide_future, _label, attention_maps, draw_attention
from fastgpt.config import BigramConfig, UserError
from fastgpt.tokenizer import ByteTokenizer, CharTokenizer

CPU = torch.device("cpu")
SIZES = {"block_size": 70, "vocab_size": 13, "n_layer": 3, "n_head": 2, "n_embd": 16}
LETTERS = CharTokenizer("\n $abcdefghij")


def peaked(**settings):
    """A model whose attention is not nearly even, as an untrained one's is."""
    model = GPT(GPTConfig(**SIZES | settings)).eval()
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_attn.weight, std=0.5)
    return model


@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_maps_are_the_attention_that_the_model_performs(attention):
    model = peaked(attention=attention)
    idx = torch.randint(0, 13, (1, 70))
    projections, performed = [], []
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda layer, args, output: projections.append(output))
        block.attn.c_proj.register_forward_pre_hook(lambda layer, args: performed.append(args[0]))
    found = list(attention_maps(model, idx))
    assert len(found) == len(performed) == 3
    for maps, projection, y in zip(found, projections, performed, strict=True):
        assert maps.shape == (2, 70, 70)
        v = projection[0, :, 32:].reshape(70, 2, 8).transpose(0, 1)  # (H, T, D)
        torch.testing.assert_close((maps @ v).transpose(0, 1).reshape(1, 70, 16), y)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 70))
        assert not maps.triu(1).any()
        assert maps[:, 10:].amax(-1).mean() > 0.2  # even attention would give at most 0.1 here


def test_the_model_is_left_as_it_was():
    model = peaked()
    list(attention_maps(model, torch.zeros(1, 5, dtype=torch.int64)))
    with pytest.raises(ValueError, match="at most block_size 70 columns, got 71"):
        list(attention_maps(model, torch.zeros(1, 71, dtype=torch.int64)))
    assert not any(block.attn.c_attn._forward_hooks for block in model.transformer.h)


def pixels(path):
    return torch.from_numpy(matplotlib.image.imread(path)[..., :3])


def test_a_picture_for_each_head_and_one_of_all(tmp_path):
    model = peaked(n_layer=2)
    drawn = list(draw_attention(model, LETTERS, "b a\n$", tmp_path / "maps", CPU))
    names = [f"layer-{layer:02d}-head-{head:02d}.png" for layer in range(2) for head in range(2)]
    assert [path.name for path in drawn] == [*names, "all.png"]
    assert len({path.read_bytes() for path in drawn}) == 5
    chosen = list(draw_attention(model, LETTERS, "b a\n$", tmp_path / "chosen", CPU, layer=1, head=0))
    assert [path.name for path in chosen] == ["layer-01-head-00.png"]
    assert chosen[0].read_bytes() == drawn[2].read_bytes()


def test_a_long_text_is_drawn_without_its_tokens(tmp_path):
    text = "abcdefghij" * 7
    assert len(text) > LABELLED_TOKENS
    drawn = list(draw_attention(peaked(n_layer=1), LETTERS, text, tmp_path, CPU))
    assert [path.name for path in drawn] == ["layer-00-head-00.png", "layer-00-head-01.png", "all.png"]


def test_the_first_token_looks_at_itself_alone(tmp_path):
    """Of one token the map is the one probability 1, in the brightest colour, whatever the model."""
    (path,) = draw_attention(peaked(), LETTERS, "a", tmp_path, CPU, layer=2, head=1)
    brightest = torch.tensor(matplotlib.colormaps["viridis"](1.0)[:3])
    assert ((pixels(path) - brightest).abs().amax(-1) < 0.01).float().mean() > 0.1


def test_the_future_is_hidden_and_nothing_else():
    hidden = _hide_future(torch.full((2, 4, 4), 0.5), -1.0)
    assert hidden.tolist() == [[[0.5] * (i + 1) + [-1.0] * (3 - i) for i in range(4)]] * 2


def test_labels_stay_on_one_line_and_have_a_glyph():
    assert [_label(text) for text in ("a", " the", "\n", "\t", "é", "$", "語")] == [
        "a", "␣the", "\\n", "\\t", "é", "$", "\\u8a9e"
    ]  # fmt: skip
    assert _label(ByteTokenizer().decode([0xE8])) == "�"


@pytest.mark.parametrize(
    ("prompt", "choice", "sentence"),
    [
        ("", {}, "a prompt must have at least one character"),
        ("ab\udcff", {}, "a prompt must be UTF-8"),
        ("a" * 71, {}, r"the prompt has 71 tokens, and this model reads at most 70 \(block_size\)"),
        ("xyz", {}, "the vocabulary of 13 characters does not have 'xyz'"),
        ("ab", {"layer": 3}, "layer must be from 0 to 2, the last of this model, got 3"),
        ("ab", {"head": -1}, "head must be from 0 to 1, the last of this model, got -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(prompt, choice, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        list(draw_attention(peaked(), LETTERS, prompt, tmp_path / "maps", CPU, **choice))
    assert not (tmp_path / "maps").exists()


def test_a_model_without_attention_is_refused(tmp_path):
    bigram = Bigram(BigramConfig(block_size=8, vocab_size=13))
    with pytest.raises(UserError, match="only a GPT has attention to draw, and this run trained a Bigram"):
        list(draw_attention(bigram, LETTERS, "ab", tmp_path, CPU))
