"""Parameters that appear or change after a user wrote `configure_optimizers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Every trainable parameter must be in some optimiser's group; one that is not would silently never train.

    Raises:
        MisconfigurationException: names the parameters that are missing.
    """
    known = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in pl_module.parameters()}
    strays = not known <= own
    missing = [n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in known]
    if known and missing and strays:
        raise MisconfigurationException(
            f"The optimiser holds parameters that the module no longer has, and not these: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. It was built before a callback changed the layers: build it in "
            f"`configure_optimizers`, from `self.parameters()`."
        )


def check_held(trainer: Trainer, parameters: Mapping[str, Tensor], by: str) -> None:
    """Parameters without which a method is nothing must be in some optimiser's group.

    Args:
        parameters: by the name that a message shows.
        by: the method.

    Raises:
        MisconfigurationException: names those that are not.
    """
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if missing:
        raise MisconfigurationException(
            f"{by}: no optimiser holds {', '.join(missing[:3])}{' ...' if missing[3:] else ''}. Build it in "
            f"`configure_optimizers`, from all of `self.parameters()`."
        )


def check_precision(trainer: Trainer, by: str, learns: str) -> None:
    """Refuse to learn in half precision, where small steps are lost: bfloat16 knows nothing between 1 and 1.0078.

    Args:
        by: the method.
        learns: what, in the plural.

    Raises:
        MisconfigurationException: names a precision that works.
    """
    if trainer.precision in ("16-true", "bf16-true"):
        mixed = trainer.precision.replace("true", "mixed")
        raise MisconfigurationException(
            f"{by} learns {learns}, which need float32; precision={trainer.precision!r} has none. Take {mixed!r}."
        )


def own_group(
    trainer: Trainer,
    parameters: Iterable[Tensor],
    *,
    lr: float | None = None,
    lr_factor: float = 1.0,
    weight_decay: float | None = None,
) -> None:
    """Move parameters of a callback into a group of their own, with another learning rate and weight decay.

    For `on_fit_start`, before a resumed run loads the optimisers' state. LR schedulers treat the new group as they
    treat the one it is split from. Without parameters the group is made all the same, so that a resumed run has it.

    Args:
        lr: their learning rate before any schedule (with OneCycleLR its peak), whatever that of the group they come
            from; None leaves it to `lr_factor`.
        lr_factor: what the learning rates of the group they come from are multiplied by.
        weight_decay: None leaves it.
    """
    moved = {id(p) for p in parameters}
    for optimizer in trainer.optimizers:
        groups = optimizer.param_groups
        source = next((i for i, g in enumerate(groups) if any(id(p) in moved for p in g["params"])), 0)
        options: dict[str, Any] = {k: v for k, v in groups[source].items() if k != "params"}
        if lr is not None:
            lr_factor = lr / options.get("max_lr", options.get("initial_lr", options["lr"]))
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            if key in options:
                options[key] = options[key] * lr_factor
        if weight_decay is not None:
            options["weight_decay"] = weight_decay
        own = [p for g in groups for p in g["params"] if id(p) in moved]
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
        optimizer.add_param_group({**options, "params": own})
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer:
                _one_more_group(config.scheduler, source, lr_factor)


def _one_more_group(scheduler: Any, source: int, factor: float) -> None:
    """Schedulers keep lists with one entry per group."""
    for inner in getattr(scheduler, "_schedulers", ()):
        _one_more_group(inner, source, factor)
    for key in ("base_lrs", "min_lrs", "_last_lr"):
        values = getattr(scheduler, key, None)
        if values:
            setattr(scheduler, key, [*values, values[source] * factor])
    if hasattr(scheduler, "lr_lambdas"):
        scheduler.lr_lambdas = [*scheduler.lr_lambdas, scheduler.lr_lambdas[source]]
