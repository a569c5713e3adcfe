"""Images whose losses are known to many digits."""

from __future__ import annotations

import torch
from torch import Tensor


def waves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A student's image and a teacher's, (1, 3, 256, 256)."""
    c, i, j = torch.meshgrid(*(torch.arange(n, dtype=dtype) for n in (3, 256, 256)), indexing="ij")
    teacher = torch.sin(0.05 * i + c) * torch.cos(0.03 * j - c)
    student = 0.8 * torch.sin(0.05 * i + c + 0.1) * torch.cos(0.031 * j - c) + 0.1 * torch.sin(0.2 * (i + j))
    return student[None], teacher[None]
