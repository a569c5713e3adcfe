"""The embeddings of all images of a training set, as they were when they were last seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill.losses import noise_contrast


class ContrastMemory:
    """Gives each image of a batch rivals from the whole data set, whose embeddings it remembers.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699. A student's embedding
    is compared with what is remembered of the teacher's, and a teacher's with what is remembered of the student's:

        o_k = exp( <m_k, v> / T ) / Z,   Z = N mean(exp) of the first batch

    for the image itself and for K images of other classes, drawn without replacement where there are as many. Of an
    image that has not been seen yet neither class nor embedding is known: a random direction stands for it.

    Args:
        images: N, of the data set.
        dim: of the embeddings.
        negatives: K.
        temperature: T.
        momentum: what is remembered becomes ``momentum * old + (1 - momentum) * new``, with a norm of 1.

    Attributes:
        student: (N, dim), float32.
        teacher: likewise.
        classes: (N,), int64; -1 where an image was not seen.
        scale: Z of both comparisons, (2,); 0 before the first batch.
        batches: how many there were, from which the draws follow.
    """

    def __init__(
        self, images: int, dim: int, negatives: int = 16384, temperature: float = 0.07, momentum: float = 0.5
    ) -> None:
        generator = torch.Generator().manual_seed(images)
        limit = 1 / math.sqrt(dim / 3)
        both = torch.empty(2, images, dim).uniform_(-limit, limit, generator=generator)
        self.student, self.teacher = both.unbind()
        self.classes = torch.full((images,), -1)
        self.scale = torch.zeros(2)
        self.batches = 0
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum

    def to(self, device: torch.device | str) -> ContrastMemory:
        for name in ("student", "teacher", "classes", "scale"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def loss(
        self,
        student: Tensor,
        teacher: Tensor,
        rows: Tensor,
        labels: Tensor,
        *,
        rank: int = 0,
        average: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """Both comparisons, added; computed in float32.

        What is compared with is not changed by it: see :meth:`update`, for after the backward pass.

        Args:
            student: embeddings (B, dim) of any length.
            teacher: likewise.
            rows: of the images in the data set, (B,).
            labels: (B,), class indices.
            rank: of the process; each draws others.
            average: over all processes.
        """
        with torch.autocast(student.device.type, enabled=False):
            compared = torch.cat([rows[:, None], self.draw(labels, rank)], 1)
            # products with all N are cheaper than K rows for each image, if K is no small part of N
            likely = [
                (F.normalize(new.float(), dim=1) @ kept.T / self.temperature).gather(1, compared).exp()
                for new, kept in ((student, self.teacher), (teacher, self.student))
            ]
            if not self.batches:
                self.scale = average(torch.stack([x.detach().mean() for x in likely])) * len(self.classes)
            losses = [
                noise_contrast(x[:, 0], x[:, 1:], len(self.classes))
                for x in (x / z for x, z in zip(likely, self.scale, strict=True))
            ]
        self.batches += 1
        return losses[0] + losses[1]

    def draw(self, labels: Tensor, rank: int = 0) -> Tensor:
        """Images of other classes for each of a batch: (B,) -> (B, K). All at random, if there is no other class.

        For each image a part of one random order of all, from a place of its own on: a uniform draw for each, at a
        seventh of the cost of draws that have nothing to do with each other.
        """
        device, count = labels.device, len(self.classes)
        generator = torch.Generator(device).manual_seed(self.batches * 65536 + rank)
        own = self.classes == labels[:, None]
        most = int(own.sum(1).max())
        if count - most < self.negatives:
            others = (~own).float()
            others[own.all(1)] = 1
            return torch.multinomial(others, self.negatives, replacement=True, generator=generator)
        order = torch.randperm(count, generator=generator, device=device)
        start = torch.randint(count, (len(labels), 1), generator=generator, device=device)
        drawn = order[(start + torch.arange(self.negatives + most, device=device)) % count]
        rivals = self.classes[drawn] != labels[:, None]
        return drawn[rivals & (rivals.cumsum(1) <= self.negatives)].view(len(labels), self.negatives)

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, rows: Tensor, labels: Tensor) -> None:
        """Remember the embeddings of a batch; arguments as of :meth:`loss`."""
        for kept, new in ((self.student, student), (self.teacher, teacher)):
            old = kept[rows]
            kept[rows] = F.normalize(old.lerp(F.normalize(new.float(), dim=1), 1 - self.momentum), dim=1)
        self.classes[rows] = labels

    def state_dict(self) -> dict[str, Any]:
        names = ("student", "teacher", "classes", "scale", "batches")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the memory of another data set."""
        if state["student"].shape != self.student.shape:
            then, now = tuple(state["student"].shape), tuple(self.student.shape)
            raise ValueError(f"The memory in the checkpoint has the shape {then}, images and dim, and this one {now}.")
        device = self.student.device
        vars(self).update(state)
        self.to(device)
