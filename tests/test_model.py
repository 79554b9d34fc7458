import math
from collections import Counter

import pytest
import torch

from fastgpt import GPT, Bigram, GPTConfig, dispatch, ops, use_backend
from fastgpt.benchmarks.plain import PlainGPT
from fastgpt.config import PRESETS, BigramConfig

TINY = {"block_size": 16, "vocab_size": 13, "n_layer": 3, "n_head": 2, "n_embd": 16}


def tokens(batch=2, length=16, vocab=13):
    return torch.randint(0, vocab, (batch, length)), torch.randint(0, vocab, (batch, length))


def test_parameters_carry_gpt2_names():
    names = set(GPT(GPTConfig(**TINY | {"n_layer": 1})).state_dict())
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    wanted = {f"transformer.h.0.{part}.{kind}" for part in block for kind in ("weight", "bias")}
    wanted |= {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert names == wanted | {"lm_head.weight"}
    assert not any("bias" in name for name in GPT(GPTConfig(**TINY, bias=False)).state_dict())


@pytest.mark.parametrize(
    ("preset", "positions", "count"),
    [
        ("shakespeare-cpu", False, 795_904),  # nanoGPT: 0.80M
        ("shakespeare", False, 10_646_784),  # nanoGPT: 10.65M
        ("gpt2", True, 124_439_808),
        ("gpt2-medium", True, 354_823_168),
        ("gpt2-large", True, 774_030_080),
        ("gpt2-xl", True, 1_557_611_200),
    ],
)
def test_num_params_are_the_published_ones(preset, positions, count):
    config = PRESETS[preset].model
    changes = {"vocab_size": 50257, "vocab_multiple": 1} if preset.startswith("gpt2") else {"vocab_size": 65}
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**vars(config), **changes}))
    assert model.num_params(positions=positions) == count


def test_flops_per_token_counts_the_matrix_products():
    config = GPTConfig(**TINY, vocab_multiple=8)
    # per layer: qkv 3C^2, projection C^2, MLP 8C^2; output layer V C; attention 2 products of T C, forward and backward
    weights = 3 * 12 * 16**2 + 16 * 16
    assert GPT(config).flops_per_token() == 6 * weights + 3 * 2 * 2 * 3 * 16 * 16


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            wanted = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(p.mean().item()) < 5 * wanted / math.sqrt(p.numel()), name


def test_an_untrained_model_knows_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=64))
    x, y = tokens(8, 32, 65)
    assert model(x, y)[1].item() == pytest.approx(math.log(65), abs=0.1)


def test_weight_tying_shares_one_tensor():
    tied, untied = GPT(GPTConfig(**TINY)), GPT(GPTConfig(**TINY, tie_weights=False))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert untied.num_params() - tied.num_params() == 13 * 16


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("style", ["fused", "naive"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "gelu": "none"}, {"attention": "unfused"}])
def test_equal_to_the_same_model_written_plainly(backend, style, options):
    torch.manual_seed(0)
    config = GPTConfig(**TINY, **options)
    model, plain = GPT(config), PlainGPT(config, style)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.1, std=0.3)
    plain.load_state_dict(model.state_dict())
    x, y = tokens()
    with use_backend(backend):
        _, loss = model(x, y)
        logits, _ = model(x)
    loss.backward()
    _, wanted = plain(x, y)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=2e-5)
    assert logits.shape == (2, 16, 13)
    of_plain = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, of_plain[name].grad, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_fused_and_unfused_attention_agree():
    torch.manual_seed(0)
    fused = GPT(GPTConfig(**TINY))
    unfused = GPT(GPTConfig(**TINY, attention="unfused"))
    unfused.load_state_dict(fused.state_dict())
    x, y = tokens()
    assert fused(x, y)[1].item() == pytest.approx(unfused(x, y)[1].item(), abs=1e-5)


def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY)).eval()
    x, _ = tokens()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 13
    torch.testing.assert_close(model(x)[0][:, :9], model(changed)[0][:, :9])
    assert not torch.allclose(model(x)[0][:, 9:], model(changed)[0][:, 9:])


def test_last_only_gives_the_last_logits():
    model = GPT(GPTConfig(**TINY)).eval()
    x, _ = tokens(length=7)
    torch.testing.assert_close(model(x, last_only=True)[0], model(x)[0][:, -1:])


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, dropout=0.5))
    x, y = tokens()
    assert model(x, y)[1].item() != model(x, y)[1].item()
    model.eval()
    assert model(x, y)[1].item() == model(x, y)[1].item()


@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_every_hot_operation_goes_through_the_dispatch(monkeypatch, attention):
    calls = Counter()
    dropping = Counter()

    def count(op, backend, *args, run=dispatch.run, **options):
        calls[op] += 1
        dropping[op] += any(type(arg) is float and arg == 0.1 for arg in args)
        return run(op, backend, *args, **options)

    monkeypatch.setattr(dispatch, "run", count)
    model = GPT(GPTConfig(**TINY, dropout=0.1, attention=attention))
    model(*tokens())
    wanted = {"layer_norm": 1, "add_layer_norm": 6, "gelu": 3, "linear_cross_entropy": 1, "dropout": 1}
    wanted |= {"attention_qkvpacked": 3} if attention == "fused" else {"softmax": 3, "dropout": 4}
    assert calls == wanted
    places = ("add_layer_norm", "attention_qkvpacked", "dropout")
    assert {op: n for op, n in dropping.items() if n} == {op: wanted[op] for op in places if op in wanted}


def test_padded_vocabulary_adds_rows_and_no_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, vocab_multiple=8))
    x, y = tokens()
    assert model.lm_head.weight.shape == (16, 16)
    assert model(x)[0].shape == (2, 16, 13)
    hidden = model.transformer(x).flatten(0, 1)
    wanted = ops.cross_entropy(hidden @ model.lm_head.weight.T, y.flatten())
    assert model(x, y)[1].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_bad_tokens_are_refused_in_a_sentence():
    model = GPT(GPTConfig(**TINY))
    with pytest.raises(ValueError, match="GPT: idx must have at most block_size 16 columns, got 17"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"GPT: idx must be int64 of shape \(B, T\), got torch.int64 of shape \(4,\)"):
        model(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"GPT: idx must be int64 .* got torch.float32"):
        model(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"targets must be int64 of idx's shape \(1, 4\), got .* \(1, 5\)"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"GPT: idx must be in \[0, 13\), got 13"):
        model(torch.full((1, 4), 13))


def test_targets_in_the_padding_of_the_vocabulary_are_refused():
    model = GPT(GPTConfig(**TINY, vocab_multiple=64))
    idx = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"GPT: targets must be below 13 \(vocab_size\), got 50"):
        model(idx, torch.full((1, 4), 50))
    assert torch.isfinite(model(idx, torch.tensor([[1, -100, 2, 12]]))[1])


def test_bigram_is_a_table():
    torch.manual_seed(0)
    model = Bigram(BigramConfig(vocab_size=13))
    x, y = tokens(length=5)
    logits, _ = model(x)
    torch.testing.assert_close(logits, model.token_embedding_table.weight[x])
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(model(x, y)[1], wanted)
    assert model.num_params() == 169
    assert model(x, last_only=True)[0].shape == (2, 1, 13)
