"""What `noise_contrast` remembers of all training images, whichever process has seen them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_compress.core.distill.memory import ContrastMemory
from lightning_compress.core.example_input import first_loader, training_loaders
from lightning_compress.core.training_samples import (
    ReplacedLoader,
    check_loader,
    indexed,
    replace_training_loader,
    samples_of_batch,
)


class Memories:
    """One memory for each pair of places; from here on the training loader tells which images are in a batch.

    Args:
        trainer: to be fitted with, in `setup`.
        pl_module: the student's module.
        pairs: how many pairs of places are compared.
        options: see `ContrastMemory`, less the number of images.

    Raises:
        MisconfigurationException: training samples have no indices.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, pairs: int, *options: Any) -> None:
        loader: Any = first_loader(training_loaders(trainer, pl_module))
        check_loader(loader, "KnowledgeDistillation")
        self.all = [ContrastMemory(len(loader.dataset), *options) for _ in range(pairs)]
        self._new: list[tuple[Tensor, ...]] = []
        self._replaced: ReplacedLoader | None = replace_training_loader(
            trainer, lambda given: indexed(trainer, given, "KnowledgeDistillation")
        )

    def contrast(self, trainer: Trainer, embeddings: Sequence[tuple[Tensor, ...]], labels: Tensor) -> Tensor:
        """The loss of a batch: the sum over pairs of places, each (student, teacher), both (B, dim)."""
        rows = samples_of_batch(trainer).to(labels.device)
        self._new = [(student.detach(), teacher.detach(), rows, labels) for student, teacher in embeddings]
        average = partial(trainer.strategy.reduce, reduce_op="mean")
        values = [
            memory.loss(student, teacher, rows, labels, rank=trainer.global_rank, average=average)
            for memory, (student, teacher) in zip(self.all, embeddings, strict=True)
        ]
        return torch.stack(values).sum()

    def keep(self, pl_module: LightningModule) -> None:
        """Remember what all processes have seen in the step that is over."""
        for memory, new in zip(self.all, self._new, strict=False):
            memory.update(*(_of_all(pl_module, value) for value in new))
        self._new = []

    def to(self, device: torch.device) -> None:
        for memory in self.all:
            memory.to(device)

    def remove(self) -> None:
        """Let the trainer have the user's loader again; what is remembered stays."""
        if self._replaced is not None:
            self._replaced.remove()
        self._replaced = None

    def state_dict(self) -> list[dict[str, Any]]:
        return [memory.state_dict() for memory in self.all]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        for memory, state in zip(self.all, states, strict=True):
            memory.load_state_dict(state)


def _of_all(pl_module: LightningModule, value: Tensor) -> Tensor:
    """The rows of all processes, one after the other."""
    return value if pl_module.trainer.world_size == 1 else torch.cat(list(pl_module.all_gather(value)))
