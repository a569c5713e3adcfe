"""Surgery on a network that is being trained: optimisers, schedulers, DDP and score keepers follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_compress.core.surgery.plan import Cut
from lightning_compress.core.surgery.record import Change, Step, attach_record, read_steps, same_steps
from lightning_compress.core.surgery.shrink import Swap, carry_optimizer


def check_trainer(trainer: Trainer, by: str, *, in_fit: bool) -> None:
    """Refuse what a change of the structure would break: sharded strategies, and averages of the weights.

    Args:
        by: the method, as the message names it.
        in_fit: whether the change comes in the middle of the fit, where no average can follow it.

    Raises:
        MisconfigurationException: says what to do instead.
    """
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"{by} changes the network's structure, which works on one device and with DDP, "
            f"not with {type(trainer.strategy).__name__}."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if in_fit and isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise MisconfigurationException(
                f"{by} changes the network in the middle of the fit, where the average of {name} cannot follow. "
                f"Average in a second fit, when the structure is final."
            )
        if getattr(callback, "_average_model", None) is not None:
            raise MisconfigurationException(
                f"{by} changes the network's structure, but {name} has already copied the network. "
                f"List {by} before {name}."
            )


def shrink_in_setup(trainer: Trainer, pl_module: LightningModule, cuts: Sequence[Cut], *, by: str) -> None:
    """Narrow a module in a callback's `setup`: nothing is wrapped and no optimiser exists.

    Args:
        by: the method, for the record: its `state_key`.

    Raises:
        MisconfigurationException: see :func:`check_trainer`.
    """
    check_trainer(trainer, by.partition("{")[0], in_fit=False)
    attach_record(pl_module).cut(pl_module, cuts, by=by, epoch=trainer.current_epoch)


def change_in_setup(
    trainer: Trainer, pl_module: LightningModule, change: Change, arguments: Mapping[str, Any], *, by: str
) -> None:
    """Change a module in a callback's `setup` by a :func:`replayable` function; what it attaches is saved and reloaded.

    Args:
        change: ``change(module, **arguments)``.
        by: the method, for the record: its `state_key`.

    Raises:
        MisconfigurationException: see :func:`check_trainer`.
    """
    check_trainer(trainer, by.partition("{")[0], in_fit=False)
    attach_record(pl_module).change(pl_module, change, arguments, by=by, epoch=trainer.current_epoch)


def undo_changes(pl_module: LightningModule, *, by: str) -> None:
    """Take out of the module, and of its record, what one method attached for the time of a search.

    In mid-fit, call :func:`shrink_in_fit` or :func:`change_in_fit` next: they settle optimisers and DDP.
    """
    attach_record(pl_module).undo_changes(pl_module, by=by)


def shrink_in_fit(trainer: Trainer, cuts: Sequence[Cut], *, by: str) -> None:
    """Narrow the module in `on_train_epoch_start` or `on_train_batch_start`.

    Optimisers keep their groups and the kept slices of their state, LR schedulers go on, DDP is wrapped again, and
    scores of the wider network are forgotten by `ModelCheckpoint`, `EarlyStopping` and `ReduceLROnPlateau`. Call
    :func:`check_trainer` in `setup`, so that what cannot work is refused before the first step.
    """
    pl_module = trainer.lightning_module
    _settle(trainer, attach_record(pl_module).cut(pl_module, cuts, by=by, epoch=trainer.current_epoch))


def change_in_fit(trainer: Trainer, change: Change, arguments: Mapping[str, Any], *, by: str) -> None:
    """Change the module by a :func:`replayable` function where :func:`shrink_in_fit` may cut it.

    Parameters that are gone leave the optimisers' groups; none may come, as the optimisers would not know them.
    """
    pl_module = trainer.lightning_module
    attach_record(pl_module).change(pl_module, change, arguments, by=by, epoch=trainer.current_epoch)
    _settle(trainer, [])


def undo_in_fit(trainer: Trainer, *, by: str) -> None:
    """Take out what one method attached where :func:`shrink_in_fit` may cut, its parameters out of the optimisers too.

    A layer that was parametrised lists its parameters in another order. Groups that were in the module's order are
    again, so that they are those of a module that never had the attachment, as it is when such a run is resumed.
    """
    pl_module = trainer.lightning_module
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]

    def place() -> Callable[[Any], int]:
        order = {id(p): i for i, p in enumerate(pl_module.parameters())}
        return lambda p: order.get(id(p), -1)

    places = [[*map(place(), group["params"])] for group in groups]
    in_order = [group for group, at in zip(groups, places, strict=True) if at == sorted(at)]
    undo_changes(pl_module, by=by)
    _settle(trainer, [])
    for group in in_order:
        group["params"].sort(key=place())


def _settle(trainer: Trainer, swaps: Sequence[Swap]) -> None:
    """Let optimisers, DDP and score keepers follow a network that has just changed."""
    pl_module = trainer.lightning_module
    own = {id(p) for p in pl_module.parameters()} | {id(swap.new) for swap in swaps}
    for optimizer in trainer.optimizers:
        carry_optimizer(optimizer, swaps)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in own]
        for gone in [p for p in optimizer.state if id(p) not in own]:
            del optimizer.state[gone]
    for swap in swaps:
        swap.old.grad = None
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = pl_module
        trainer.strategy.configure_ddp()
    _forget_scores(trainer)


def replay_in_setup(trainer: Trainer, pl_module: LightningModule, steps: Sequence[Step], *, by: str) -> None:
    """Give the module the structure that a checkpoint records, now, so that callbacks after this one see it.

    Args:
        by: the callback's name, for the message.

    Raises:
        MisconfigurationException: see :func:`check_trainer`.
    """
    record = attach_record(pl_module)
    if not same_steps(record.steps, steps):
        check_trainer(trainer, by, in_fit=False)
        record.replay(pl_module, steps)


def resume_in_setup(trainer: Trainer, pl_module: LightningModule, *, by: str, required: bool = True) -> bool:
    """Where this `fit` resumes, give the module the structure that the checkpoint records.

    Args:
        by: the method: its `state_key`.
        required: whether the checkpoint must know the method, as one that acts in `setup` has acted in every
            checkpoint of its run.

    Returns:
        Whether it resumes.

    Raises:
        MisconfigurationException: the checkpoint is of a run without the method; and see :func:`check_trainer`.
    """
    path = resume_path(trainer)
    if path is None:
        return False
    steps = read_steps(path)
    if required and not any(step["by"] == by for step in steps):
        raise MisconfigurationException(
            f"{path!r} was written by a run without {by}, so it cannot be resumed with it; its network was changed by "
            f"{' and '.join(step['by'] for step in steps) or 'nothing'}. To compress a trained network, load its "
            f"weights into the module and start a fit of its own."
        )
    replay_in_setup(trainer, pl_module, steps, by=by.partition("{")[0])
    return True


def check_epoch(trainer: Trainer, by: str, argument: str, epoch: int) -> None:
    """An epoch in which something shall happen must come before the Trainer stops.

    Raises:
        MisconfigurationException: it does not.
    """
    endless = trainer.max_epochs in (None, -1) or trainer.fast_dev_run  # type: ignore[attr-defined]
    if epoch and not endless and epoch >= trainer.max_epochs:  # type: ignore[operator]
        raise MisconfigurationException(
            f"{by}({argument}={epoch}) never happens: the Trainer stops after max_epochs={trainer.max_epochs}."
        )


def resume_path(trainer: Trainer) -> str | None:
    """The checkpoint that this `fit` will resume from, as seen from a callback's `setup`; None for a fresh start.

    Lightning keeps it in a local variable of `Trainer._run` until after `setup`. Should that change, callers find
    None, decide anew, and the record in the checkpoint replaces their decision: slower, not wrong.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            path = frame.f_locals.get("ckpt_path")
            return str(path) if path else None
        frame = frame.f_back
    return None


def _forget_scores(trainer: Trainer) -> None:
    """Scores of the wider network would make its checkpoints the "best" for ever, or end the fine-tuning early."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.best_model_score = None
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.kth_value = torch.tensor(float("inf") if callback.mode == "min" else float("-inf"))
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(float("inf") if callback.mode == "min" else float("-inf"))
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.best = config.scheduler.mode_worse
            config.scheduler.num_bad_epochs = 0
