"""Random channel pruning: the baseline that every criterion has to beat.

Mittal, Bhardwaj, Khapra, Ravindran, "Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural
Networks", WACV 2018, arXiv:1801.10447: after fine-tuning it comes surprisingly close.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lightning_compress.core.surgery import ChannelGraph


class RandomChannels(ChannelPruning):
    """Prune channels at random, the same ones for the same `seed`.

    The arguments are those of :class:`~lightning_compress.callbacks.pruning.channel_pruning.ChannelPruning`.

    Example::

        from lightning_compress.callbacks import RandomChannels
        trainer = Trainer(callbacks=[RandomChannels(pruning_ratio=0.5, seed=1)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/random_channels``.
    """

    def scores(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.rand(graph.width(name), generator=generator) for name in graph.layers}
