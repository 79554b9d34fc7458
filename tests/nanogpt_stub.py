"""A stand-in for a checkout of nanoGPT: what the benchmarks call of it, with a model that is not its own."""

from __future__ import annotations

from pathlib import Path

_MODEL = """\
from dataclasses import dataclass
import dataclasses, torch
from fastgpt.benchmarks.plain import PlainGPT, plain_optimizer
from fastgpt.config import GPTConfig as Shape, TrainConfig

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(PlainGPT):
    def __init__(self, config):
        super().__init__(Shape(**dataclasses.asdict(config), gelu="none"), "naive")
        print("number of parameters: 0.00M")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW: False")
        train = TrainConfig(weight_decay=weight_decay, lr=learning_rate, beta1=betas[0], beta2=betas[1])
        return plain_optimizer(self, train)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits = self(idx)[0][:, -1]
            token = logits.argmax(-1, keepdim=True) if top_k == 1 else torch.multinomial(logits.softmax(-1), 1)
            idx = torch.cat((idx, token), dim=1)
        return idx
"""


def write_checkout(folder: Path) -> Path:
    """Make ``folder``, with a model.py in it."""
    folder.mkdir()
    (folder / "model.py").write_text(_MODEL)
    return folder
