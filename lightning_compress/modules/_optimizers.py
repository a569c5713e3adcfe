"""What `configure_optimizers` of every task returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

Interval = Literal["epoch", "step"]


def check_interval(interval: str) -> None:
    """Raise unless Lightning knows the interval."""
    if interval not in ("epoch", "step"):
        raise ValueError(f"lr_scheduler_interval: expected 'epoch' or 'step', got {interval!r}.")


def configured(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    interval: Interval,
    monitor: str,
) -> Any:
    """An optimiser, and its schedule if there is one, in the form Lightning expects.

    Args:
        parameters: what to train.
        optimizer: makes the optimiser from them.
        lr_scheduler: makes the schedule from the optimiser.
        interval: whether the schedule advances every epoch or every step.
        monitor: the metric of a schedule that waits for a plateau and names none.
    """
    built = optimizer(parameters)
    if lr_scheduler is None:
        return built
    scheduler = lr_scheduler(built)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
    if isinstance(scheduler, ReduceLROnPlateau):
        config["monitor"] = getattr(scheduler, "monitor", monitor)
    return {"optimizer": built, "lr_scheduler": config}


def advance_schedules(trainer: Trainer, monitor: str = "val/loss") -> None:
    """Under manual optimisation: one step of every schedule.

    Args:
        monitor: the metric of a schedule that waits for a plateau and names none.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.step(trainer.callback_metrics[getattr(config.scheduler, "monitor", monitor)])
        else:
            config.scheduler.step()


def gradient_scale(trainer: Trainer) -> float:
    """What gradients are multiplied by until an optimiser's step, in fp16; 1 in all other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
