"""Distances between logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.losses.parts import in_float32


@in_float32
def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Cross-entropy with the teacher's softened probabilities, less their entropy.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    T^2 keeps the size of the gradient when T changes.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> soft_targets(z, z).item()
    0.0
    """
    return temperature**2 * _kl(F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1))


@in_float32
def target_class(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """How sure the teacher is of the right class against all others together (TCKD).

    Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679. The probability of
    all others is summed in the logarithm, so that a teacher that is sure costs no accuracy.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        labels: (B,), class indices.
    """
    own, theirs = (_binary(logits / temperature, labels) for logits in (student, teacher))
    return temperature**2 * _kl(own, theirs)


@in_float32
def non_target_classes(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """How the teacher orders the wrong classes among themselves (NCKD); shapes and source as :func:`target_class`.

    Hinton's loss is ``target_class + (1 - p_y) * non_target_classes`` of each image, with the teacher's p_y: where the
    teacher is sure, it says nothing about the others. Here they have a weight of their own.
    """
    own, theirs = (F.log_softmax(_without(logits, labels) / temperature, 1) for logits in (student, teacher))
    return temperature**2 * _kl(own, theirs)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities (B, K), averaged over images."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _binary(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (B, 2) of the labelled class and of all others."""
    of_target = logits.gather(1, labels[:, None])
    return F.log_softmax(torch.cat([of_target, _without(logits, labels).logsumexp(1, keepdim=True)], 1), 1)


def _without(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K) -> (B, K - 1), the labelled classes left out."""
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, others + (others >= labels[:, None]))
