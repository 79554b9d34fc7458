"""Rung 9: the same, larger, with dropout; and fastgpt.GPT, which is the same model.

What changes from rung 8 to GPT-2, beside the numbers: dropout, which puts some activations to zero in training so
that none can be relied on alone; GELU for ReLU; no biases; one product for queries, keys and values; and the
embedding of a token serves as its row of the output layer. Written down plainly once more, that is fastgpt.GPT: with
the weights copied across the logits are the same, before training and after it.

On a GPU this trains the preset "shakespeare", 10.65M parameters: 1.48 in the lecture, 1.47 with nanoGPT's settings,
which are the preset's. On a CPU that takes hours, so it trains "shakespeare-cpu" there, 0.80M parameters for some
minutes: nanoGPT's README has 1.88 for these settings. Then the checkpoint that was best by an estimate is judged on
the whole validation split.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from shared import Options, Result, climb, rung, tiny_shakespeare
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import load_model
from fastgpt.config import PRESETS
from fastgpt.train import Trainer

Text = rung(1).Text
validation_loss = rung(2).validation_loss
generate = rung(2).generate
LanguageModel = rung(3).LanguageModel
attend = rung(4).attend
NormBlock = rung(8).NormBlock


class Attention(nn.Module):
    """Rung 5's heads with one projection for all of them, rung 4's ``attend`` as PyTorch has it, and dropout."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.project = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.dropout = nn.Dropout(c.dropout)
        self.n_head = c.n_head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # three of (B, H, T, D)
        dropout_p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)  # (B, H, T, D)
        return self.dropout(self.project(y.transpose(1, 2).flatten(2)))  # (B, T, C)


def plain_gpt(c: GPTConfig) -> nn.Module:
    """The model of rung 8 with these sizes and changes."""
    linear, norm = partial(nn.Linear, bias=False), partial(nn.LayerNorm, c.n_embd, bias=False)
    blocks = []
    for _ in range(c.n_layer):
        inner = linear(c.n_embd, 4 * c.n_embd), nn.GELU(), linear(4 * c.n_embd, c.n_embd), nn.Dropout(c.dropout)
        blocks.append(NormBlock(norm, Attention(c), nn.Sequential(*inner)))
    body = nn.Sequential(nn.Dropout(c.dropout), *blocks, norm())
    model = LanguageModel(c.vocab_size, body, c.n_embd, c.block_size)
    model.lm_head = linear(c.n_embd, c.vocab_size)
    model.lm_head.weight = model.token_embedding.weight
    return model


def plain_weights(gpt: GPT) -> dict[str, Tensor]:
    """The weights of a fastgpt.GPT, which have GPT-2's names, by the names that ``plain_gpt`` has for them."""
    n = gpt.config.n_layer
    names = {"token_embedding": "wte", "position_embedding": "wpe", f"body.{n + 1}": "ln_f"}
    for i in range(n):
        names |= {f"body.{i + 1}.norm_{j}": f"h.{i}.ln_{j}" for j in (1, 2)}
        names |= {f"body.{i + 1}.attention.qkv": f"h.{i}.attn.c_attn"}
        names |= {f"body.{i + 1}.attention.project": f"h.{i}.attn.c_proj"}
        names |= {f"body.{i + 1}.feed_forward.{j}": f"h.{i}.mlp.{name}" for j, name in ((0, "c_fc"), (2, "c_proj"))}
    weights = {f"{ours}.weight": gpt.get_parameter(f"transformer.{theirs}.weight") for ours, theirs in names.items()}
    return {**weights, "lm_head.weight": gpt.lm_head.weight}


@torch.no_grad()
def copy_and_compare(gpt: GPT, text: Text) -> nn.Module:
    """The plain model with the weights of ``gpt``: its logits are the same."""
    plain = plain_gpt(gpt.config).eval()
    plain.load_state_dict(plain_weights(gpt))  # every weight has its place, and every place its weight
    x, _ = text.batch("val", 4, gpt.config.block_size)
    torch.testing.assert_close(plain(x), gpt.eval()(x)[0], rtol=1e-4, atol=1e-5)
    return plain


def main(options: Options) -> Result:
    q, k, v = torch.randn(3, 2, 4, 8, 16)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True), attend(q, k, v))

    text, gpu = Text(tiny_shakespeare()), torch.cuda.is_available()
    preset = PRESETS["shakespeare" if gpu else "shakespeare-cpu"]
    config = replace(preset.model, vocab_size=text.vocab_size)
    gpt = GPT(config)
    copy_and_compare(gpt, text)
    print(f"fastgpt.GPT and the plain model agree, {gpt.num_params():,} parameters")

    settings = replace(
        preset.train, max_iters=options.steps, seed=options.seed, final_eval_iters=preset.train.eval_iters
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, settings, Path(folder, "run"))
        print(trainer.describe())
        if not trainer.run_until_done():
            raise KeyboardInterrupt  # it was asked to stop, and has said so
        gpt = load_model(Path(folder, "run"))[0]
    plain = copy_and_compare(gpt, text)
    title, published = ("shakespeare", 1.47) if gpu else ("shakespeare-cpu, a shorter run for a CPU", 1.88)
    return Result(9, f"preset {title}", validation_loss(plain, text), published, generate(plain, text))


if __name__ == "__main__":
    climb(main, steps=5000 if torch.cuda.is_available() else 2000, threads=torch.get_num_threads())
