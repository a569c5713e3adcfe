r"""What a student can learn from a teacher: distances between their logits and between their features.

Each is a pure function of the student's and the teacher's tensors, gives a scalar, and computes in float32 outside
autocast. z are logits (B, K), f are features (B, ...), T is the temperature:

    logits       T^2 KL( softmax(z_t / T) || softmax(z_s / T) )                               Hinton 2015
    target       T^2 KL( b_t || b_s ),  b = (p_y, 1 - p_y)                                    DKD 2022
    non_target   T^2 KL( softmax(z_t / T without y) || softmax(z_s / T without y) )           DKD 2022
    hints        mean (r(f_s) - f_t)^2,  r a learnt regressor                                 FitNets 2015
    attention    mean (A(f_s) - A(f_t))^2,  A = mean_C f^2 with an L2 norm of 1               AT 2017
    similarity   1/B^2 || G(f_s) - G(f_t) ||_F^2,  G = f f^T with rows of norm 1              SP 2019
    distance     Huber( |f_i - f_j| / mean )                                                  RKD 2019
    angle        Huber( cos(f_i - f_j, f_k - f_j) )                                           RKD 2019
    contrast     -log of the share that the own image has among all images of the batch       after CRD 2020
"""

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


# ---- logits


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


# ---- features


@in_float32
def hints(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features of one shape; the student's come through a learnt regressor.

    Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550,
    which sums over the features and halves.
    """
    return F.mse_loss(student, teacher)


def attention_map(features: Tensor) -> Tensor:
    """Where features are strong: (B, C, ...) -> (B, positions), mean of squares over C, each image with a norm of 1.

    >>> attention_map(torch.tensor([[[[3.0, 0.0], [0.0, 0.0]]]]))
    tensor([[1., 0., 0., 0.]])
    """
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


@in_float32
def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Look where the teacher looks, whatever the number of channels; the larger map is averaged down.

    Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928, the activation-based form
    with p = 2; the mean over positions is that of the authors' code.

    Args:
        student: (B, C_s, H, W).
        teacher: (B, C_t, H', W').
    """
    size = [min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    own, theirs = (attention_map(resized(features, size)) for features in (student, teacher))
    return F.mse_loss(own, theirs)


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
def contrast(student: Tensor, teacher: Tensor, labels: Tensor | None = None, temperature: float = 0.07) -> Tensor:
    """Each image's two embeddings belong together, and not to other images of the batch.

    After Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699. Theirs is a
    noise-contrastive estimate against 16,384 negatives from a memory of the whole data set; here it is a softmax over
    the batch (InfoNCE), which needs no memory and no index of images. As there, both sides are anchors, and images of
    the own class are no negatives.

    Args:
        student: embeddings (B, D).
        teacher: embeddings (B, D).
        labels: (B,), class indices; None: all other images are negatives.

    >>> e = torch.eye(2)
    >>> round(contrast(e, e, temperature=1.0).item(), 4)  # 2 log(1 + 1/e)
    0.6265
    """
    scores = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T / temperature
    own = torch.arange(len(scores), device=scores.device)
    if labels is not None:
        same = (labels[:, None] == labels[None]).fill_diagonal_(False)
        scores = scores.masked_fill(same, -torch.inf)
    return F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)


# ---- parts of the above


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
