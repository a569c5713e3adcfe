"""Begin a further phase of a fit with optimisers and LR schedules as they were at its start."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from lightning.pytorch import Trainer


class FreshStart:
    """Optimisers and LR schedulers as they were before the first step. Plain data, for a callback's `state_dict`.

    Args:
        optimizers: their state dicts.
        schedulers: those of the LR schedulers.
    """

    def __init__(self, optimizers: list[dict[str, Any]], schedulers: list[dict[str, Any]]) -> None:
        self.optimizers = optimizers
        self.schedulers = schedulers

    @classmethod
    def of(cls, trainer: Trainer) -> FreshStart:
        """Take a copy of how things are now, as a rule at the start of epoch 0."""
        return cls(
            [deepcopy(o.state_dict()) for o in trainer.optimizers],
            [deepcopy(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
        )

    def restore(self, trainer: Trainer) -> None:
        """Set learning rates and other options of the groups, schedulers and the optimisers' memory back.

        Parameters may have been swapped, narrowed or taken out meanwhile, as long as the groups are the same.
        """
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        self.restore_rates(trainer)

    def restore_rates(self, trainer: Trainer) -> None:
        """Set learning rates and schedulers back, momentum stays: called again and again, it holds the schedule."""
        for optimizer, state in zip(trainer.optimizers, self.optimizers, strict=True):
            for group, initial in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({k: deepcopy(v) for k, v in initial.items() if k not in ("params", "param_names")})
        for config, state in zip(trainer.lr_scheduler_configs, self.schedulers, strict=True):
            config.scheduler.load_state_dict(deepcopy(state))

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "schedulers": self.schedulers}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> FreshStart:
        return cls(state["optimizers"], state["schedulers"])
