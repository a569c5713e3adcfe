"""Small learnt layers between a student's features and its teacher's, which are trained along.

Each takes both features and returns what a loss compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.distill.losses import matched
from lightning_compress.core.surgery import replayable


class Regressor(nn.Module):
    """Bring vectors or tokens to the width of the teacher's, by a linear layer.

    Args:
        in_channels: of the student's features, (B, ..., C).
        out_channels: of the teacher's.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_channels, out_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(student), teacher


class ConvRegressor(nn.Module):
    """Bring maps to the width and the size of the teacher's, by a convolution with batch norm and ReLU.

    It is 3x3 with stride 2 where the student's maps are twice as large, 4x4, transposed, with stride 2 where they are
    half as large, and else as large as the difference of the sizes makes it: 1x1 for maps of one size. What is left of
    other differences is averaged away. So it is in the comparison of Tian et al., arXiv:1910.10699.

    Args:
        in_channels: of the student's maps.
        out_channels: of the teacher's.
        size: height and width of the student's.
        target: height and width of the teacher's.
        relu: whether the activation is there.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: Sequence[int], target: Sequence[int], relu: bool = True
    ) -> None:
        super().__init__()
        pairs = list(zip(size, target, strict=True))
        self.layer: nn.Module
        if all(own == 2 * theirs for own, theirs in pairs):
            self.layer = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        elif all(2 * own == theirs for own, theirs in pairs):
            self.layer = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)
        else:
            height, width = (max(1, 1 + own - theirs) for own, theirs in pairs)
            self.layer = nn.Conv2d(in_channels, out_channels, (height, width))
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C_s, H, W) and (B, C_t, H', W') -> both in one shape."""
        return matched(self.relu(self.norm(self.layer(student))), teacher)


class Expectation(nn.Module):
    """What to expect of the teacher's maps: a mean from three 1x1 convolutions, and a variance for each channel.

    Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv:1904.05835.

    Args:
        in_channels: of the student's maps.
        out_channels: of the teacher's.
        variance: at the start.
        least: of the variance.
    """

    def __init__(self, in_channels: int, out_channels: int, variance: float = 5.0, least: float = 1e-5) -> None:
        super().__init__()
        widths = in_channels, out_channels, out_channels
        convs = [nn.Conv2d(width, out_channels, 1, bias=False) for width in widths]
        self.mean = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        self.least = least
        # softplus(raw) + least is the variance
        self.raw = nn.Parameter(torch.full((out_channels,), math.log(math.expm1(variance - least))))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C_s, H, W) and (B, C_t, H', W') -> mean and features of one shape, variance (C_t,)."""
        student, teacher = matched(student, teacher)
        return self.mean(student), teacher, F.softplus(self.raw.float()) + self.least


class Factors(nn.Module):
    """Few channels in which both can be told: a paraphraser's of the teacher's maps, a translator's of the student's.

    The paraphraser learns to restore the teacher's maps from its factors; the student has no part in that.
    Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
    arXiv:1802.04977: three 3x3 convolutions each, with leaky ReLU, the translator's with batch norm.

    Args:
        in_channels: of the student's maps.
        out_channels: of the teacher's.
        share: factors, as a share of the teacher's channels.
    """

    def __init__(self, in_channels: int, out_channels: int, share: float = 0.5) -> None:
        super().__init__()
        count = max(1, int(share * out_channels))
        self.translator = _convs(in_channels, in_channels, count, count, norm=True)
        self.paraphraser = _convs(out_channels, out_channels, count, count)
        self.restorer = _convs(count, count, out_channels, out_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C_s, H, W) and (B, C_t, H', W') -> factors of both, and the mean squared error of what is restored."""
        factors = self.paraphraser(teacher)
        error = F.mse_loss(self.restorer(factors).float(), teacher.float())
        return self.translator(student), factors.detach(), error

    def spare_paraphraser(self) -> None:
        """Forget its gradients before a step, which then leaves it as it is, also by weight decay and momentum."""
        for parameter in (*self.paraphraser.parameters(), *self.restorer.parameters()):
            parameter.grad = None


def _convs(*widths: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        norms = [nn.BatchNorm2d(after)] * norm
        layers += [nn.Conv2d(before, after, 3, padding=1), *norms, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class Embeddings(nn.Module):
    """Bring both features to vectors of one length: positions are averaged, then a linear layer for each.

    Args:
        student_channels: of the student's features.
        teacher_channels: of the teacher's.
        dim: length of the vectors.
    """

    def __init__(self, student_channels: int, teacher_channels: int, dim: int) -> None:
        super().__init__()
        self.student = nn.Linear(student_channels, dim)
        self.teacher = nn.Linear(teacher_channels, dim)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C_s, H, W) or (B, ..., C_s), and the same of the teacher -> (B, dim) twice."""
        return self.student(pooled(student)), self.teacher(pooled(teacher))


def pooled(features: Tensor) -> Tensor:
    """Average over positions: (B, C, H, W) or (B, T, C) -> (B, C)."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.flatten(1, -2).mean(1) if features.ndim > 2 else features


def width(features: Tensor) -> int:
    """C of features (B, C, H, W) or (B, ..., C)."""
    return features.shape[1 if features.ndim == 4 else -1]


KINDS: dict[str, type[nn.Module]] = {
    "regressor": Regressor,
    "conv_regressor": ConvRegressor,
    "expectation": Expectation,
    "factors": Factors,
    "embeddings": Embeddings,
}


class Connectors(nn.ModuleDict):
    """The connectors of a module; copies of it for inference leave them out."""

    training_only = True


@replayable
def connect(module: nn.Module, name: str, connectors: Mapping[str, Sequence[Any]]) -> Any:
    """Attach connectors under ``module.<name>``.

    Args:
        name: of the attribute.
        connectors: name -> kind (of `KINDS`) and the arguments of its class.
    """
    module.add_module(name, Connectors({key: KINDS[kind](*given) for key, (kind, *given) in connectors.items()}))
    return partial(disconnect, name=name)


def disconnect(module: nn.Module, name: str) -> None:
    """Take the connectors of :func:`connect` out again."""
    delattr(module, name)
