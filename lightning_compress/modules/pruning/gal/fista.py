"""FISTA for non-negative masks under an l1 penalty, as a torch optimiser.

Beck, Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", SIAM Journal on Imaging
Sciences 2(1), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def shrink(v: Tensor, threshold: float) -> Tensor:
    """The non-negative minimiser x of (x - v)^2 / 2 + threshold * |x|, entry by entry.

    >>> shrink(torch.tensor([0.07, -0.2, 0.04]), 0.05)
    tensor([0.0200, 0.0000, 0.0000])
    """
    return (v - threshold).clamp_min(0)


class FISTA(Optimizer):
    """Accelerated proximal gradient steps on ``f(m) + gamma * ||m||_1`` with ``m >= 0``.

    As the authors of GAL do it, the gradient of f is taken at m, the value in the model, not at the extrapolated y.

    Args:
        params: the masks. None of them may decay otherwise.
        lr: step size eta; schedulers change it.
        gamma: weight of the l1 norm, GAL's lambda.

    Raises:
        ValueError: a negative argument.

    State of a mask: ``alpha``, the momentum's sequence, and ``m_prev``, its value before the last update.
    """

    def __init__(self, params: Any, lr: float = 0.01, gamma: float = 0.6) -> None:
        for name, value in (("lr", lr), ("gamma", gamma)):
            if value < 0:
                raise ValueError(f"FISTA({name}={value}): give a number of at least 0.")
        super().__init__(params, {"lr": lr, "gamma": gamma})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, restart: bool = False) -> Any:
        """One update of every mask that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
            restart: forget the momentum, as before the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for m in group["params"]:
                if m.grad is not None:
                    self._update(m, group["lr"], group["gamma"], restart)
        return loss

    def _update(self, m: Tensor, lr: float, gamma: float, restart: bool) -> None:
        state = self.state[m]
        if restart or not state:
            y, alpha = m, 1.0
        else:
            alpha = (1 + math.sqrt(1 + 4 * state["alpha"] ** 2)) / 2
            y = m + (state["alpha"] - 1) / alpha * (m - state["m_prev"])
        state.update(alpha=alpha, m_prev=m.clone())
        m.copy_(shrink(y - lr * m.grad, lr * gamma))  # type: ignore[operator]
