"""The public ops: what the model calls, and what every backend implements."""

from fastgpt.ops.adamw import adamw_
from fastgpt.ops.add_layer_norm import add_layer_norm
from fastgpt.ops.attention import attention, attention_qkvpacked
from fastgpt.ops.clip_grad_norm import clip_grad_norm_
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.dropout import dropout
from fastgpt.ops.gelu import gelu
from fastgpt.ops.layer_norm import layer_norm
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.softmax import softmax

__all__ = [
    "adamw_",
    "add_layer_norm",
    "attention",
    "attention_qkvpacked",
    "clip_grad_norm_",
    "cross_entropy",
    "dropout",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "softmax",
]
