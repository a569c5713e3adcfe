"""What students and teacher learn from labels and from each other."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.losses import soft_targets

KLReduction = Literal["mean", "batchmean"]


class Losses(NamedTuple):
    """The parts of the loss; all weigh the same.

    Attributes:
        teacher: CE(t, y), a scalar.
        students: CE(s_j, y), (M,).
        told: T^2 KL of teacher and students, (M,).
    """

    teacher: Tensor
    students: Tensor
    told: Tensor

    def total(self) -> Tensor:
        return self.teacher + self.students.sum() + self.told.sum()


def online_losses(
    students: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    kl_reduction: KLReduction = "mean",
    detach_teacher: bool = False,
) -> Losses:
    """The loss of M students and the teacher made of them.

    Args:
        students: logits (M, B, K).
        teacher: logits (B, K).
        labels: class indices (B,).
        temperature: T.
        kl_reduction: ``"mean"`` over images and classes, as the authors; ``"batchmean"`` over images, K times as much.
        detach_teacher: whether the teacher learns from the labels alone.
    """
    target = teacher.detach() if detach_teacher else teacher
    told = torch.stack([soft_targets(student, target, temperature) for student in students])
    return Losses(
        F.cross_entropy(teacher, labels),
        torch.stack([F.cross_entropy(student, labels) for student in students]),
        told / teacher.shape[1] if kl_reduction == "mean" else told,
    )
