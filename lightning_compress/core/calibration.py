"""Training batches outside the training loop: for statistics that are taken before or between epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.example_input import first_loader, training_loaders
from lightning_compress.core.meta import evaluating


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


def recalibrate_batch_norm(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, batch_size: int = 128
) -> None:
    """Bring the running statistics of batch norms in line with changed weights: forward passes in train mode.

    The statistics become the plain average over the batches. Everything else stays in eval mode and unchanged.

    Args:
        num_batches: batches of `batch_size` training images, in all processes together.
    """
    norms = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momentum = [m.momentum for m in norms]
    with on_device(trainer, pl_module), evaluating(pl_module):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for images in training_inputs(trainer, pl_module, num_batches * batch_size, batch_size):
                pl_module(images)
        finally:
            for norm, value in zip(norms, momentum, strict=True):
                norm.momentum = value


def _inputs(pl_module: LightningModule, batch: Any) -> Tensor:
    batch = pl_module._on_before_batch_transfer(batch)
    batch = pl_module._apply_batch_transfer_handler(batch, pl_module.device)
    tensor = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if tensor is None:
        raise MisconfigurationException(f"The training batch is a {type(batch).__name__} without a tensor.")
    return tensor
