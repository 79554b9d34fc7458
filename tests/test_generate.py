import pytest
import torch

from fastgpt import GPT, Bigram, GPTConfig
from fastgpt.config import BigramConfig, UserError
from fastgpt.generate import generate, sample


def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=1, n_head=2, n_embd=16, vocab_multiple=8)).eval()


def drawn(seed=0, count=20, prompt=(1, 2), **settings):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.tensor([prompt])
    return [int(t) for t in generate(model(), idx, count, generator=generator, **settings)]


def test_one_token_at_a_time_beyond_block_size():
    tokens = drawn(count=30)
    assert len(tokens) == 30
    assert all(0 <= t < 13 for t in tokens)


def test_a_seed_repeats_and_another_does_not():
    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)


def test_temperature_zero_is_the_most_probable_token():
    m = model()
    idx = torch.tensor([[3, 4]])
    (first,) = generate(m, idx, 1, temperature=0)
    assert first.item() == m(idx)[0][0, -1].argmax().item()
    assert drawn(seed=1, temperature=0) == drawn(seed=2, temperature=0)
    assert drawn(seed=1, top_k=1) == drawn(seed=2, temperature=0)


def test_tokens_depend_on_the_last_block_size_tokens_alone():
    long = tuple(range(12))
    assert drawn(temperature=0, prompt=long) == drawn(temperature=0, prompt=long[-8:])


def test_the_model_sees_as_many_tokens_as_it_can():
    m, lengths = model(), []
    m.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    list(generate(m, torch.zeros(1, 5, dtype=torch.long), 6))
    assert lengths == [5, 6, 7, 8, 8, 8]


@pytest.mark.parametrize("shape", [(1, 0), (3,)])
def test_nothing_to_continue_is_refused(shape):
    with pytest.raises(UserError, match="generate: idx must have shape"):
        next(generate(model(), torch.zeros(shape, dtype=torch.long), 1))


def frequencies(logits, **settings):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    rows = torch.tensor(logits).expand(20_000, -1)
    ids = sample(rows, **settings, generator=torch.Generator().manual_seed(0))
    return torch.bincount(ids.flatten(), minlength=len(logits)) / len(rows)


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 100}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.5263, 0.3158, 0.1579, 0]),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_the_settings_say(settings, wanted):
    got = frequencies(LOGITS, **settings)
    torch.testing.assert_close(got, torch.tensor(wanted).float(), atol=0.015, rtol=0)
    assert ((got > 0) == (torch.tensor(wanted) > 0)).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "top-k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top-p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top-p must be in \(0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        drawn(**settings)


def test_a_bigram_generates_too():
    tokens = list(generate(Bigram(BigramConfig(vocab_size=5)).eval(), torch.tensor([[1], [2]]), 7))
    assert [t.shape for t in tokens] == [(2, 1)] * 7
