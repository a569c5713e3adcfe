"""Training batches outside the training loop: for statistics that are taken before or between epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.core.example_input import first_loader, training_loaders


def training_inputs(trainer: Trainer, pl_module: LightningModule, samples: int, batch_size: int) -> Iterator[Tensor]:
    """Inputs of the network from the training loader, with its augmentation and shuffling, on the module's device.

    Usable in a callback's `setup`, before Lightning's own loaders exist. With several processes each takes every
    world-size-th batch, so that together they read `samples`, rounded up. The random state is left as it was.

    Args:
        samples: how many images in all processes together; fewer if the loader has fewer.
        batch_size: how many at once; the loader's own batches are joined or split to this size.

    Yields:
        Tensors (n, ...), n <= batch_size: the first tensor of each batch.

    Raises:
        MisconfigurationException: there is no training data, or a batch holds no tensor.
    """
    share = -(-samples // trainer.world_size)
    with isolate_rng(include_cuda=torch.cuda.is_available()):
        held: list[Tensor] = []
        for index, batch in enumerate(first_loader(training_loaders(trainer, pl_module))):
            if share <= 0:
                break
            if index % trainer.world_size != trainer.global_rank:
                continue
            images = _inputs(pl_module, batch)[:share]
            share -= len(images)
            held.append(images)
            while sum(map(len, held)) >= batch_size:
                joined = torch.cat(held)
                yield joined[:batch_size]
                held = [joined[batch_size:]]
        rest = torch.cat(held) if held else torch.empty(0)
        if len(rest):
            yield rest


@contextmanager
def on_device(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The module on the strategy's device, and back where it was afterwards."""
    home = pl_module.device
    try:
        pl_module.to(trainer.strategy.root_device)
        yield
    finally:
        pl_module.to(home)


def _inputs(pl_module: LightningModule, batch: Any) -> Tensor:
    batch = pl_module._on_before_batch_transfer(batch)
    batch = pl_module._apply_batch_transfer_handler(batch, pl_module.device)
    tensor = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if tensor is None:
        raise MisconfigurationException(f"The training batch is a {type(batch).__name__} without a tensor.")
    return tensor
