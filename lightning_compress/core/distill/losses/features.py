"""Distances between features at one place of student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.losses.parts import in_float32, matched


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
    own, theirs = map(attention_map, matched(student, teacher))
    return F.mse_loss(own, theirs)


@in_float32
def selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    """Which patterns of places the channels answer to, as two sets of channels without any order (NST).

    Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv:1707.01219: the
    squared maximum mean discrepancy, with the kernel <a, b>^2, of the channels of each image; every channel is a map
    with a norm of 1. Larger maps are averaged down.

    Args:
        student: (B, C_s, H, W).
        teacher: (B, C_t, H', W').
    """
    own, theirs = (F.normalize(features.flatten(2), dim=2) for features in matched(student, teacher))

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.mT).square().mean()

    return kernel(own, own) + kernel(theirs, theirs) - 2 * kernel(own, theirs)


def flow_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """How the channels of two places go together: (B, C, H, W) and (B, C', H', W') -> (B, C', C), in float32.

    Products are averaged over positions; the larger maps are averaged down before.

    >>> flow_matrix(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]], [[1.0, 0.0]]]]))
    tensor([[[5.5000],
             [0.5000]]])
    """
    with torch.autocast(lower.device.type, enabled=False):
        lower, upper = (features.flatten(2) for features in matched(lower.float(), upper.float()))
        return upper @ lower.mT / lower.shape[2]


@in_float32
def flow(student: Tensor, teacher: Tensor) -> Tensor:
    """What happens to features between two places: mean squared difference of :func:`flow_matrix` of both.

    Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
    Learning", CVPR 2017 (FSP). The authors train by it alone first, and then without it.

    Args:
        student: matrices (B, C', C).
        teacher: of the same shape.
    """
    return F.mse_loss(student, teacher)


@in_float32
def factors(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean difference of the attention maps of learnt factors of the features.

    Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
    arXiv:1802.04977, as it is computed in the comparison of Tian et al., arXiv:1910.10699: the factors' squares are
    averaged over channels, and maps have a norm of 1.

    Args:
        student: what the translator makes of its features, (B, C_s, H, W).
        teacher: what the paraphraser makes of its features, (B, C_t, H', W').
    """
    own, theirs = map(attention_map, matched(student, teacher))
    return F.l1_loss(own, theirs)


@in_float32
def boundary(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Which neurons fire: those of the teacher that do should in the student with a margin, and the others should not.

    Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
    2019, arXiv:1811.03233, where the student's features come through a learnt convolution with batch norm. The authors
    train by it alone first, and then without it. The sum over an image's neurons, times 3/1000, averaged over images.

    Args:
        student: what the activations get, (B, ...).
        teacher: of the same shape.

    >>> f = torch.tensor([[0.5, 0.5, -2.0, -2.0]])
    >>> round(boundary(f, torch.tensor([[1.0, -1.0, 1.0, -1.0]])).item(), 4)  # 3/1000 (0.5^2 + 1.5^2 + 3^2 + 0)
    0.0345
    """
    fires = teacher > 0
    missing = (margin - student).clamp(min=0) * fires
    wrong = (margin + student).clamp(min=0) * ~fires
    return 3 / 1000 * (missing + wrong).square().sum() / len(student)


@in_float32
def information(student: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Surprise by the teacher's features, were they normal about what the student expects (VID).

    Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019,
    arXiv:1904.05835: minus a lower bound of the mutual information, but for constants.

    Args:
        student: expected features, from a learnt function, (B, C, H, W).
        teacher: features of that shape.
        variance: (C,), learnt and above 0.

    >>> one = torch.ones(1, 2, 1, 1)
    >>> round(information(3 * one, one, torch.tensor([1.0, 4.0])).item(), 4)  # (4 + (1 + ln 4)) / 2 / 2
    1.5966
    """
    variance = variance.float().view(-1, *[1] * (student.ndim - 2))
    return 0.5 * ((student - teacher).square() / variance + variance.log()).mean()
