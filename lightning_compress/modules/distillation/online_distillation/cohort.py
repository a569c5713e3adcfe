"""Students, and the teacher that is made of their features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.core.distill.taps import Point, logits_of, observe
from lightning_compress.core.meta import evaluating
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.together import run_together


class OnlineTeacher(nn.Module):
    """The teacher's own layers: logits from the maps of all students.

    Args:
        channels: of all maps together.
        num_classes: K.
        bn_relu: whether maps go through batch norm and ReLU before they are pooled.
    """

    def __init__(self, channels: int, num_classes: int, bn_relu: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if bn_relu else nn.Identity()
        self.relu = nn.ReLU() if bn_relu else nn.Identity()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """M maps (B, c, h, w) -> (B, num_classes)."""
        return self.linear(self.relu(self.norm(torch.cat(list(maps), 1))).mean((2, 3)))


class Student(nn.Module):
    """A network that also tells its last feature maps.

    Args:
        network: images to logits.
        point: where the maps are.
    """

    def __init__(self, network: nn.Module, point: Point) -> None:
        super().__init__()
        self.network = network
        self.point = point

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> logits (B, K), maps (B, c, h, w)."""
        output, (maps,) = observe(self.network, [self.point], images)
        return cast(Tensor, logits_of(output)), maps


class Cohort(nn.Module):
    """Students, and the teacher that is made of them. As a network it is the student that is chosen.

    Args:
        students: M networks of one architecture, images to logits (B, K).
        point: where in each of them the last feature maps are.
        teacher: see :class:`OnlineTeacher`.

    Attributes:
        accuracies: (M,), those of the epoch in which a student was last chosen; zero before.
    """

    accuracies: Tensor

    def __init__(self, students: Iterable[nn.Module], point: Point, teacher: OnlineTeacher) -> None:
        super().__init__()
        for i, student in enumerate(students):
            self.add_module(f"student_{i}", student)
        self.teacher = teacher
        self.point = point
        # as numbers, not as an index: an average of weights averages them too, and stays meaningful
        self.register_buffer("accuracies", torch.zeros(len(self.students)))

    @property
    def students(self) -> list[nn.Module]:
        """All of them, in their order."""
        return [child for name, child in self.named_children() if name.startswith("student_")]

    @property
    def best(self) -> int:
        """The number of the student that is chosen; among equals, and among meta tensors, the first."""
        return 0 if self.accuracies.is_meta else int(self.accuracies.argmax())

    @property
    def deployed(self) -> str:
        """The name of what takes the place of the cohort in exports and accounts, see `inference_copy`."""
        return f"student_{self.best}"

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K) of the student that is chosen."""
        return self.students[self.best](images)

    def all_logits(self, images: Tensor, together: bool = False) -> tuple[Tensor, Tensor]:
        """The logits (M, B, K) of all students, and those of the teacher, (B, K).

        Args:
            images: (B, C, H, W).
            together: whether the students' passes are fused, see `run_together`.
        """
        students = [Student(network, self.point) for network in self.students]
        if together:
            logits, maps = run_together(students, images)
            return logits, self.teacher(maps.unbind())
        seen = [student(images) for student in students]
        return torch.stack([logits for logits, _ in seen]), self.teacher([maps for _, maps in seen])


def find_maps(network: nn.Module, feature_layer: str | None, images: Tensor, num_classes: int) -> tuple[Point, int]:
    """Where a network's last feature maps are, and how many channels they have.

    Args:
        network: images to logits.
        feature_layer: name of the module that puts them out. None: the last one, in the order in which modules finish,
            whose output is more than one pixel large; the outermost of several with the same output.
        images: (B, C, H, W), any.
        num_classes: K that the logits must have.

    Raises:
        ValueError: there is no such module, or it puts out something else; names `feature_layer`.
        MisconfigurationException: the network puts out something else than logits (B, K).
    """
    shapes: dict[str, torch.Size] = {}

    def note(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            shapes.pop(name, None)
            shapes[name] = output.shape

    handles = [m.register_forward_hook(partial(note, name)) for name, m in network.named_modules() if name]
    try:
        with evaluating(network):
            logits = logits_of(network(images))
    finally:
        for handle in handles:
            handle.remove()
    if logits is None or logits.shape[1] != num_classes:
        found = "none" if logits is None else str(logits.shape[1])
        raise MisconfigurationException(
            f"network: {type(network).__name__} must put out logits (images, {num_classes}), one for each class; "
            f"it has {found}."
        )
    if feature_layer is None:
        large = [name for name, shape in shapes.items() if shape[2:].numel() > 1] or list(shapes)
        if not large:
            raise ValueError(f"feature_layer: no module of {type(network).__name__} puts out maps (B, c, h, w).")
        feature_layer = large[-1]
    elif feature_layer not in shapes:
        hint = did_you_mean(feature_layer, shapes) or f" There is: {', '.join(list(shapes)[-6:])}."
        raise ValueError(f"feature_layer: no module {feature_layer!r} puts out maps (B, c, h, w).{hint}")
    return Point(feature_layer), shapes[feature_layer][1]
