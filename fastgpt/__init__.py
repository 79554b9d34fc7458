"""fastgpt: a PyTorch GPT whose hot operations run on interchangeable kernels."""

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.dispatch import explain, use_backend
from fastgpt.model import GPT, Bigram

__version__ = "0.1.0"
__all__ = ["GPT", "Bigram", "GPTConfig", "__version__", "explain", "ops", "use_backend"]
