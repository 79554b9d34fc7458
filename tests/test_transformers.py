"""A GPT-2 of transformers on our ops: the same loss, gradients, logits and texts as on its own."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, StaticCache
from transformers.models.bert import BertConfig, BertModel

from fastgpt import dispatch, use_backend
from fastgpt.config import UserError
from fastgpt.integrations.transformers import apply, unapply

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 61, "n_positions": 40}
SETTINGS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def pair(**settings) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """A model as it is, and one of the same weights on our ops."""
    config = GPT2Config(**{**SHAPE, **SETTINGS, **settings})
    plain, applied = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(GPT2Config(**config.to_dict())).eval()
    with torch.no_grad():
        for param in plain.parameters():
            param.add_(torch.randn_like(param), alpha=0.3 / param.shape[-1] ** 0.5)
    applied.load_state_dict(plain.state_dict())
    return plain, apply(applied)


def tokens(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (batch, length))


def assert_close(got: torch.Tensor, wanted: torch.Tensor, name: str = "") -> None:
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-8, name


def assert_same_step(plain: GPT2LMHeadModel, applied: GPT2LMHeadModel, **inputs) -> None:
    outputs = [model(**inputs) for model in (plain, applied)]
    assert_close(outputs[1].logits, outputs[0].logits, "logits")
    assert_close(outputs[1].loss, outputs[0].loss, "loss")
    for model, output in zip((plain, applied), outputs, strict=True):
        model.zero_grad()
        output.loss.backward()
    largest = max(p.grad.abs().max() for p in plain.parameters())
    for (name, p), (_, q) in zip(plain.named_parameters(), applied.named_parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["whole", "left", "right"])
def test_logits_loss_and_gradients(backend, mask):
    plain, applied = pair()
    idx = tokens()
    labels = idx if mask is None else idx.masked_fill(mask == 0, -100)
    with use_backend(backend):
        assert_same_step(plain, applied, input_ids=idx, attention_mask=mask, labels=labels)
        if mask is not None:  # whoever forgets to leave the padding out of the loss gets what transformers gives
            assert_same_step(plain, applied, input_ids=idx, attention_mask=mask, labels=idx)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
def test_activations_and_scales(activation):
    plain, applied = pair(activation_function=activation, scale_attn_by_inverse_layer_idx=True, n_inner=48)
    idx = tokens()
    assert_same_step(plain, applied, input_ids=idx, labels=idx)


def test_our_ops_run_and_the_layers_are_swapped(monkeypatch):
    _, applied = pair()
    ran = []
    run = dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda op, *args, **kwargs: (ran.append(op), run(op, *args, **kwargs))[1])
    idx = tokens()
    applied(idx, labels=idx)
    assert {op: ran.count(op) for op in set(ran)} == {"layer_norm": 5, "attention": 2, "gelu": 2, "cross_entropy": 1}


def test_the_loss_as_a_trainer_calls_it():
    plain, applied = pair()
    logits, labels = torch.randn(3, 9, 61, requires_grad=True), tokens()
    labels[0] = -100
    for settings in (
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": torch.tensor(7)},
        {"labels": labels, "num_items_in_batch": 7},
        {"labels": None, "shift_labels": labels},
        {"labels": labels, "ignore_index": 3},
        {"labels": torch.full_like(labels, -100), "num_items_in_batch": 7},
    ):
        settings = {"vocab_size": 61, **settings}
        if settings.get("ignore_index") == 3:
            settings["labels"] = labels.clamp(min=0)
        losses = [model.loss_function(logits, **settings) for model in (plain, applied)]
        assert_close(losses[1], losses[0], str(settings))
        wanted, got = (torch.autograd.grad(loss, logits)[0] for loss in losses)
        assert_close(got, wanted, str(settings))


class TestGenerate:
    @pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "left"])
    @pytest.mark.parametrize("cache", ["dynamic", "static", None])
    def test_greedy_texts(self, mask, cache):
        plain, applied = pair()
        idx = tokens()
        mask = torch.ones_like(idx) if mask is None else mask
        settings = {"use_cache": False} if cache is None else {"cache_implementation": cache}
        texts = [
            model.generate(
                idx,
                attention_mask=mask,
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=0,
                disable_compile=True,
                **settings,
            )
            for model in (plain, applied)
        ]
        assert texts[0].shape == (3, 29)
        assert torch.equal(texts[0], texts[1])

    @pytest.mark.parametrize("fixed_size", [False, True])
    def test_a_prompt_in_parts(self, fixed_size):
        """A cache that is filled several tokens at a time; one of fixed size has keys that nobody has written yet."""
        plain, applied = pair()
        idx = tokens()
        wanted = plain(idx).logits
        cache = StaticCache(applied.config, max_cache_len=20) if fixed_size else None
        for part, logits in zip(idx.split((4, 3, 2), dim=1), wanted.split((4, 3, 2), dim=1), strict=True):
            output = applied(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            assert_close(output.logits, logits)


class TestMasks:
    @pytest.mark.parametrize(
        "mask",
        [
            torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]] * 3),
            torch.cat([LEFT[:1], RIGHT[:1], LEFT[1:2]]),
        ],
        ids=["between", "both"],
    )
    def test_padding_that_is_not_on_one_side(self, mask):
        _, applied = pair()
        with pytest.raises(UserError, match="takes padding on the left or on the right"):
            applied(tokens(), attention_mask=mask)

    def test_a_mask_for_each_query(self):
        _, applied = pair()
        for mask in (torch.ones(3, 1, 9, 9, dtype=torch.bool), torch.zeros(3, 1, 9, 9)):
            with pytest.raises(UserError, match=r"takes an attention_mask of shape \(B, T\)"):
                applied(tokens(), attention_mask=mask)

    def test_packed_sequences(self):
        _, applied = pair()
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 3)
        with pytest.raises(UserError, match="packed sequences"):
            applied(tokens(), position_ids=positions, use_cache=False)


class TestApply:
    def test_twice_and_back(self, tmp_path):
        plain, applied = pair()
        idx = tokens()
        assert apply(applied) is applied
        apply(applied).save_pretrained(tmp_path)
        again = GPT2LMHeadModel.from_pretrained(tmp_path)
        assert again.config._attn_implementation == plain.config._attn_implementation
        assert applied.state_dict().keys() == plain.state_dict().keys()
        assert unapply(applied) is applied
        assert applied.config._attn_implementation == plain.config._attn_implementation
        assert [type(module) for module in applied.modules()] == [type(module) for module in plain.modules()]
        assert applied.loss_function is plain.loss_function
        assert torch.equal(applied(idx, labels=idx).loss, plain(idx, labels=idx).loss)
        unapply(applied)
        assert_same_step(plain, apply(applied), input_ids=idx, labels=idx)

    def test_a_model_without_a_head(self):
        plain, _ = pair()
        base = GPT2Model(plain.config).eval()
        idx = tokens()
        wanted = base(idx).last_hidden_state
        assert_close(apply(base)(idx).last_hidden_state, wanted)
        assert type(base.ln_f) is not nn.LayerNorm

    def test_dropout_in_training(self):
        _, applied = pair(attn_pdrop=0.5)
        idx = tokens()
        applied.train()
        assert applied(idx, labels=idx).loss != applied(idx, labels=idx).loss
        applied.eval()
        assert applied(idx, labels=idx).loss == applied(idx, labels=idx).loss

    def test_models_that_are_refused(self):
        config = GPT2Config(**{**SHAPE, **SETTINGS})
        for settings, sentence in (
            ({"activation_function": "relu"}, "activation_function must be a GELU, got 'relu'"),
            ({"add_cross_attention": True}, "cross-attention"),
        ):
            model = GPT2LMHeadModel(GPT2Config(**{**config.to_dict(), **settings}))
            with pytest.raises(UserError, match=sentence):
                apply(model)
            assert type(model.transformer.ln_f) is nn.LayerNorm
        bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
        with pytest.raises(UserError, match="model must be a GPT2LMHeadModel or GPT2Model, got BertModel"):
            apply(bert)
