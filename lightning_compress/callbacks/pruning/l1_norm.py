"""L1-norm filter pruning: remove the filters whose weights are smallest in sum.

Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710.

    s_j = sum_{c,u,v} |W_{j,c,u,v}|,   the pruning_ratio * C_out filters with the smallest s_j go.

Where channels are added (residual networks), the layers that write them share one choice, by their mean score.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_compress.callbacks.pruning.channel_pruning import ChannelPruning


def filter_l1(weight: Tensor) -> Tensor:
    """Score each filter: (C_out, ...) -> (C_out,), sum of absolute weights, in float32.

    >>> import torch
    >>> filter_l1(torch.tensor([[[[1.0, -2.0]]], [[[0.5, 0.0]]]]))
    tensor([3.0000, 0.5000])
    """
    return weight.detach().float().abs().flatten(1).sum(1)


class L1Norm(ChannelPruning):
    """Prune channels by the L1 norm of their filters, before or during a fit.

    The arguments are those of :class:`~lightning_compress.callbacks.pruning.channel_pruning.ChannelPruning`.

    Example::

        from lightning_compress.callbacks import L1Norm
        trainer = Trainer(callbacks=[L1Norm(pruning_ratio=0.5)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/l1_norm``.
    """

    def score(self, name: str, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return filter_l1(weight.transpose(0, 1) if getattr(layer, "transposed", False) else weight)
