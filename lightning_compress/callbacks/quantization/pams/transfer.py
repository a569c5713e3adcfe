"""Structured knowledge transfer: the quantised network looks where the real one looks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def energy_map(features: Tensor) -> Tensor:
    """Where features are strong: (N, C, H, W) -> (N, H W), mean over C of F^2, each sample with an L2 norm of 1.

    In float32: squares of features of 0..255 images overflow in half precision.
    """
    return F.normalize(features.float().square().mean(1).flatten(1), dim=1, eps=1e-12)


def structured_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """SKT = mean over N H W of (A(F_student) - A(F_teacher))^2, from two tensors (N, C, H, W); C may differ.

    0 for features that are equal up to a factor, at most 2 / (H W).
    """
    return F.mse_loss(energy_map(student), energy_map(teacher))
