"""What a training batch holds, found without asking the user where possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

LABELS = ("target", "targets", "label", "labels", "y")


def targets_of(batch: Any, by: str) -> Tensor:
    """The labels of a batch.

    Args:
        batch: ``(x, y, ...)``, or a dict in which one of `LABELS` names them.
        by: the method that asks, for the message.

    Returns:
        Class indices (B,), or soft labels (B, K).

    Raises:
        MisconfigurationException: there are none.

    >>> import torch
    >>> targets_of((torch.zeros(2, 3), torch.tensor([4, 1])), "Doctest")
    tensor([4, 1])
    """
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
        got = f"a dict with {', '.join(map(str, batch))}"
    elif isinstance(batch, Sequence) and len(batch) > 1:
        found = batch[1]
        got = f"a {type(batch).__name__} whose second entry is a {type(found).__name__}"
    else:
        got = f"a {type(batch).__name__}"
    if not isinstance(found, Tensor) or not found.ndim:
        raise MisconfigurationException(
            f"{by} needs the labels of every training batch: (x, y), or a dict with one of {', '.join(LABELS)}. "
            f"It got {got}."
        )
    return found
