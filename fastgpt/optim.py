"""AdamW on ``ops.adamw_``, its parameter groups, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import TrainConfig


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) that updates a whole parameter group by one call of ``ops.adamw_``.

    Args:
        params: parameters or parameter groups, each group on one device.
        lr, betas, eps, weight_decay: as in ``ops.adamw_``; ``lr`` is a float, changed through ``param_groups``, or a
            tensor as there, which a captured CUDA graph reads anew at each replay.
        backend: of ``ops.adamw_``; None asks ``fastgpt.dispatch`` at each step.

    A group counts its steps once for all its parameters, also for one whose first gradient comes later.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        backend: str | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.backend = backend

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; with ``closure``, after calling it. Returns its value."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if "step" not in group:
                group["step"] = torch.zeros((), dtype=torch.float32, device=params[0].device)
            group["step"] += 1
            lr = group["lr"]
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            ops.adamw_(
                _own_parts(params),
                _own_parts([p.grad for p in params]),
                _own_parts([state["exp_avg"] for state in states]),
                _own_parts([state["exp_avg_sq"] for state in states]),
                group["step"],
                lr=lr if isinstance(lr, Tensor) else torch.full_like(group["step"], lr),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                backend=self.backend,
            )
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, but the means stay fp32 beside parameters of half precision, and steps move with them."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, own, strict=True):
            for name, mean in state_dict["state"].get(index, {}).items():
                self.state[p][name] = mean.to(p.device, torch.float32, copy=True)
        for group in self.param_groups:
            if "step" in group:
                group["step"] = group["step"].to(group["params"][0].device)


def _own_parts(tensors: list[Any]) -> list[Tensor]:
    """Of tensors that are spread over processes (DTensors), the shards that lie in this one; others as they are."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW with weight decay on matrices and embeddings, none on biases and layer norms."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2))


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of 0-based ``step``: linear warmup to ``lr``, then a cosine down to ``min_lr``, then ``min_lr``."""
    if step < config.warmup_iters:
        return config.lr * (step + 1) / (config.warmup_iters + 1)
    end = config.lr_decay_iters or config.max_iters
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_iters) / max(1, end - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr - config.min_lr)


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients of the parameters that have one."""
    return [p.grad for p in model.parameters() if p.grad is not None]
