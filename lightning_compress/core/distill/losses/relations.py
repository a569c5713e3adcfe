"""Distances between what images of a batch are to each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.losses.parts import in_float32


@in_float32
def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Which images of the batch are alike; no shape but B has to agree.

    Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682.

    Args:
        student: (B, ...).
        teacher: (B, ...).
    """

    def rows(features: Tensor) -> Tensor:
        flat = features.flatten(1)
        return F.normalize(flat @ flat.T, dim=1)

    return F.mse_loss(rows(student), rows(teacher))


@in_float32
def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """How far images of the batch are from each other, in units of the mean distance.

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068; shapes as
    :func:`similarity`. The mean is over all ordered pairs, also of an image with itself, as in the authors' code.
    """

    def relative(features: Tensor) -> Tensor:
        squares = _squared_distances(_gram(features))
        # exact zeros, such as the diagonal, have no gradient, and no part in the mean
        apart = squares > 0
        lengths = torch.where(apart, squares, 1.0).sqrt() * apart
        return (lengths / (lengths.sum() / apart.sum().clamp(min=1)).clamp(min=1e-12)).float()

    return F.smooth_l1_loss(relative(student), relative(teacher))


@in_float32
def angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Which angles any three images of the batch form; source as :func:`distance`.

    The angle at j comes from inner products of images alone, <i - j, k - j> = G_ik - G_ij - G_jk + G_jj, so that
    memory is B^3 however long features are. These differences are taken in float64.
    """

    def cosines(features: Tensor) -> Tensor:
        gram = _gram(features)
        squares = _squared_distances(gram)
        apart = squares > 0
        inverse = torch.where(apart, squares, 1.0).rsqrt() * apart
        at_j = gram - gram.diagonal()[:, None]  # (j, i): G_ij - G_jj
        inner = gram[None] - at_j[:, :, None] - gram[:, None, :]  # (j, i, k)
        return (inner * inverse[:, :, None] * inverse[:, None, :]).float()

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


@in_float32
def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Where embeddings differ, they should not do so alike for neighbours in the batch.

    Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang, "Correlation Congruence for Knowledge Distillation", ICCV 2019,
    arXiv:1904.01802, in the form of the comparison of Tian et al., arXiv:1910.10699: inner products of |e_s - e_t| of
    an image and of the next, averaged over the B - 1 pairs.

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, D).

    >>> e = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> correlation(e, torch.zeros(3, 2)).item()  # (1*3 + 2*4 + 3*5 + 4*6) / 2
    25.0
    """
    apart = (student - teacher).abs()
    return (apart[:-1] * apart[1:]).sum() / max(1, len(apart) - 1)


@in_float32
def probability(student: Tensor, teacher: Tensor) -> Tensor:
    """How likely an image takes another for its neighbour: divergence of the teacher's rows from the student's.

    Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
    arXiv:1803.10837; shapes as :func:`similarity`. The mean over all B^2 pairs, as in the authors' code, hence the
    large weights (30,000) that go with it.
    """

    def rows(features: Tensor) -> Tensor:
        directions = F.normalize(features.flatten(1), dim=1, eps=1e-7)
        kernel = (directions @ directions.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)

    own, theirs = rows(student), rows(teacher)
    return (theirs * ((theirs + 1e-7) / (own + 1e-7)).log()).mean()


def _gram(features: Tensor) -> Tensor:
    """Inner products (B, B) of features about their mean, which no relation depends on, in float64."""
    flat = features.flatten(1).double()
    flat = flat - flat.mean(0)
    return flat @ flat.T


def _squared_distances(gram: Tensor) -> Tensor:
    squares = gram.diagonal()
    # rounding leaves equal images a little apart
    scale = squares.detach().mean() * 1e-12
    apart = squares[:, None] + squares[None] - 2 * gram
    return torch.where(apart > scale, apart, 0.0)
