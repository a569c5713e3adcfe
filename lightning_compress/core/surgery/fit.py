"""Surgery on a network that is being trained: optimisers, schedulers, DDP and score keepers follow."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_compress.core.surgery.plan import Cut
from lightning_compress.core.surgery.record import attach_record
from lightning_compress.core.surgery.shrink import carry_optimizer


def shrink_in_setup(trainer: Trainer, pl_module: LightningModule, cuts: Sequence[Cut], *, by: str) -> None:
    """Narrow a module in a callback's `setup`: nothing is wrapped and no optimiser exists.

    Args:
        by: the method, for the record.

    Raises:
        MisconfigurationException: the strategy has no plain module, or an average of the weights already exists.
    """
    _check(trainer, by)
    attach_record(pl_module).cut(pl_module, cuts, by=by, epoch=trainer.current_epoch)


def shrink_in_fit(trainer: Trainer, cuts: Sequence[Cut], *, by: str) -> None:
    """Narrow the module in `on_train_epoch_start`.

    Optimisers keep their groups and the kept slices of their state, LR schedulers go on, DDP is wrapped again, and
    scores of the wider network are forgotten by `ModelCheckpoint` and `EarlyStopping`.
    """
    _check(trainer, by)
    pl_module = trainer.lightning_module
    swaps = attach_record(pl_module).cut(pl_module, cuts, by=by, epoch=trainer.current_epoch)
    for optimizer in trainer.optimizers:
        carry_optimizer(optimizer, swaps)
    for swap in swaps:
        swap.old.grad = None
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = pl_module
        trainer.strategy.configure_ddp()
    _forget_scores(trainer)


def resume_path(trainer: Trainer) -> Path | None:
    """The checkpoint that this `fit` will resume from, as seen from a callback's `setup`; None for a fresh start.

    Lightning keeps it in a local variable of `Trainer._run` until after `setup`. Should that change, callers find
    None, decide anew, and the record in the checkpoint replaces their decision: slower, not wrong.
    """
    if trainer.ckpt_path:
        return Path(trainer.ckpt_path)
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            path = frame.f_locals.get("ckpt_path")
            return Path(path) if path else None
        frame = frame.f_back
    return None


def _check(trainer: Trainer, by: str) -> None:
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"{by} changes the network's structure, which works on one device and with DDP, "
            f"not with {type(trainer.strategy).__name__}."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is not None:
            late = isinstance(callback, WeightAveraging) and not trainer.optimizers
            raise MisconfigurationException(
                f"{by} changes the network's structure, but {type(callback).__name__} has already copied it. "
                + (
                    f"List {by} before it."
                    if late
                    else "Average in a second fit, after the structure is final."
                )
            )


def _forget_scores(trainer: Trainer) -> None:
    """Scores of the wider network would make its checkpoints the "best" for ever, or stop the fine-tuning early."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.best_model_score = None
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.kth_value = torch.tensor(float("inf") if callback.mode == "min" else float("-inf"))
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(float("inf") if callback.mode == "min" else float("-inf"))
