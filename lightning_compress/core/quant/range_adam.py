"""Adam for a few parameters of an optimiser that is none.

The ranges of quantisers have gradients summed over whole layers, and want steps that do not depend on their size, while
weights train with SGD. Lightning's automatic optimisation knows one optimiser. So the ranges stay in a group of it,
where loss scaling, clipping, schedulers and `zero_grad` see them, and after its step theirs is taken back and replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.utils.hooks import RemovableHandle


class RangeAdam:
    """Steps of Adam, at the learning rate that the parameters' group has at the time.

    ::

        adam = RangeAdam()
        adam.attach(trainer, ranges)   # in on_fit_start, when they have a group of their own
        adam.detach()                  # in teardown
    """

    def __init__(self) -> None:
        self._adams: list[Adam] = []  # one for each of the trainer's optimisers that hold some
        self._handles: list[RemovableHandle] = []
        self._loaded: list[dict[str, Any]] = []

    def attach(self, trainer: Trainer, parameters: Iterable[Tensor]) -> None:
        """Take over the steps of parameters, each of which some optimiser of the trainer holds."""
        self.detach()
        wanted = {id(p) for p in parameters}
        self._adams.clear()
        for optimizer in trainer.optimizers:
            for index, group in enumerate(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in wanted]
                if own:
                    self._join(optimizer, index, own)
        for adam, state in zip(self._adams, self._loaded, strict=False):
            adam.load_state_dict(state)
        self._loaded = []

    def detach(self) -> None:
        """Take the hooks off the optimisers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain data and tensors."""
        return [adam.state_dict() for adam in self._adams] or self._loaded

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Take over a state, from the next :meth:`attach` on."""
        self._loaded = [dict(s) for s in state]

    def _join(self, optimizer: Optimizer, group: int, own: list[Tensor]) -> None:
        adam = Adam(own)
        values: list[Tensor] = []

        def before(*_: Any) -> None:  # also before the forward pass, where the step computes it: nothing moves between
            values[:] = [p.detach().clone() for p in own]

        @torch.no_grad()
        def after(*_: Any) -> None:
            torch._foreach_copy_(own, values)
            adam.param_groups[0]["lr"] = optimizer.param_groups[group]["lr"]  # resuming makes new groups
            adam.step()

        self._adams.append(adam)
        self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
