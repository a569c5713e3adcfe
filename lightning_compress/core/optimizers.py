"""Parameters that appear or change after a user wrote `configure_optimizers`."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


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
