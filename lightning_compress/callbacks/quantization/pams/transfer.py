"""Structured knowledge transfer: the quantised network looks where the real one looks."""

from __future__ import annotations

from torch import Tensor

from lightning_compress.core.distill.losses import attention


def structured_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """SKT = mean over N H W of (A(F_student) - A(F_teacher))^2, from two tensors (N, C, H, W); C may differ.

    A is the mean over C of F^2, each sample with an L2 norm of 1, as in attention transfer
    (`core.distill.losses.attention`): 0 for features that are equal up to a factor, at most 2 / (H W).
    """
    return attention(student, teacher)
