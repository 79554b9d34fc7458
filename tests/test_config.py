import dataclasses

import pytest

from fastgpt.config import PRESETS, BigramConfig, GPTConfig, TrainConfig, UserError


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"n_head": 5}, r"n_embd must be a multiple of n_head, got n_embd 768 and n_head 5"),
        ({"n_layer": 0}, r"n_layer must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"gelu": "fast"}, r"gelu must be 'none' or 'tanh', got 'fast'"),
        ({"n_embd": "wide"}, r"n_embd must be a whole number, got 'wide'"),
        ({"n_layer": True}, r"n_layer must be a whole number, got True"),
        ({"bias": 1}, r"bias must be true or false, got 1"),
        ({"vocab_multiple": -64}, r"vocab_multiple must be at least 1, got -64"),
        ({"dropout": 10**400}, r"dropout must be a number that a float can hold, got 0x\w{38}\.\.\.$"),
        ({"n_layer": 10**5000}, r"n_layer must be less than 2\^24, got 0x\w{38}\.\.\.$"),
        ({"n_embd": "wide" * 100}, r"n_embd must be a whole number, got 'wide.{35}\.\.\.$"),
    ],
)
def test_a_wrong_model_setting_is_named(setting, sentence):
    with pytest.raises(UserError, match=sentence):
        GPTConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"lr": 0.0}, "lr must be greater than 0"),
        ({"lr": float("nan")}, "lr must be greater than 0 and finite, got nan"),
        ({"max_iters": 0}, "max_iters must be at least 1"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"dtype": "int8"}, "dtype must be 'auto' or 'fp32' or 'bf16' or 'fp16', got 'int8'"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_a_wrong_training_setting_is_named(setting, sentence):
    with pytest.raises(UserError, match=sentence):
        TrainConfig(**setting)


def test_an_int_becomes_the_float_that_is_wanted():
    assert TrainConfig(lr=1).lr == 1.0
    assert isinstance(TrainConfig(lr=1).lr, float)


def test_the_vocabulary_is_padded_up_to_a_multiple():
    assert GPTConfig(vocab_size=50257, vocab_multiple=64).padded_vocab_size == 50304
    assert GPTConfig(vocab_size=64, vocab_multiple=64).padded_vocab_size == 64
    assert GPTConfig(vocab_size=65).padded_vocab_size == 65


def test_presets_hold_the_published_settings():
    assert set(PRESETS) == {
        "bigram", "shakespeare-cpu", "shakespeare", "finetune-shakespeare",
        "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl",
    }  # fmt: skip
    cpu, small, gpt2 = (PRESETS[name] for name in ("shakespeare-cpu", "shakespeare", "gpt2"))
    shape = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    assert [getattr(cpu.model, f) for f in shape] == [64, 4, 4, 128, 0.0, False]
    assert [getattr(small.model, f) for f in shape] == [256, 6, 6, 384, 0.2, False]
    schedule = ("batch_size", "max_iters", "lr", "min_lr", "warmup_iters", "beta2", "weight_decay", "grad_clip")
    assert [getattr(cpu.train, f) for f in schedule] == [12, 2000, 1e-3, 1e-4, 100, 0.99, 0.1, 1.0]
    assert [getattr(small.train, f) for f in schedule] == [64, 5000, 1e-3, 1e-4, 100, 0.99, 0.1, 1.0]
    assert gpt2.train.batch_size * gpt2.train.grad_accum * gpt2.model.block_size == 491_520
    sizes = [
        (p.model.n_layer, p.model.n_head, p.model.n_embd) for name, p in PRESETS.items() if name.startswith("gpt2")
    ]
    assert sizes == [(12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)]
    tuning = PRESETS["finetune-shakespeare"].train
    assert tuning.batch_size * tuning.grad_accum * 1024 == 32_768
    assert (tuning.init, tuning.max_iters, tuning.lr, tuning.min_lr, tuning.warmup_iters) == (
        "gpt2-xl",
        20,
        3e-5,
        3e-5,
        0,
    )
    bigram = PRESETS["bigram"]
    assert isinstance(bigram.model, BigramConfig)
    assert (bigram.model.block_size, bigram.train.batch_size, bigram.train.lr) == (8, 32, 1e-2)
    assert bigram.train.max_iters == 3000


def test_every_field_explains_itself():
    for config in (GPTConfig, BigramConfig, TrainConfig):
        for field in dataclasses.fields(config):
            assert field.metadata["help"], f"{config.__name__}.{field.name} has no help"
