"""What the losses have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def in_float32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute a loss in float32 whatever autocast says; its squares and exponentials do not fit half precision."""

    @wraps(loss)
    def computed(student: Tensor, teacher: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            return loss(student.float(), teacher.float(), *args, **kwargs)

    return computed


def matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, C_s, ...) and (B, C_t, ...) at as many positions: the larger are averaged down."""
    size = [min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return resized(student, size), resized(teacher, size)


def resized(features: Tensor, size: list[int]) -> Tensor:
    """Averages over the positions (B, C, *size) of features (B, C, ...), as they are where they fit."""
    if list(features.shape[2:]) == size:
        return features
    pools: dict[int, Callable[..., Tensor]] = {
        1: F.adaptive_avg_pool1d,
        2: F.adaptive_avg_pool2d,
        3: F.adaptive_avg_pool3d,
    }
    return pools[len(size)](features, size)
