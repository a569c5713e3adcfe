"""Small learnt layers between a student's features and its teacher's, which are trained along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.distill.losses import resized
from lightning_compress.core.surgery import replayable


class Regressor(nn.Module):
    """Bring features to the width of the teacher's: a 1x1 convolution for maps, a linear layer for all else.

    Args:
        in_channels: of the student's features.
        out_channels: of the teacher's.
        maps: whether features are (B, C, H, W); else they are (B, ..., C).
    """

    def __init__(self, in_channels: int, out_channels: int, maps: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(in_channels, out_channels, 1) if maps else nn.Linear(in_channels, out_channels)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features in one shape; larger maps are averaged down to the smaller ones."""
        if student.ndim == 4:
            size = [min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], strict=True)]
            student, teacher = resized(student, size), resized(teacher, size)
        return self.layer(student), teacher


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


KINDS = {"regressor": Regressor, "embeddings": Embeddings}


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
