"""The masks themselves: how classes become a guide, what the guide does to a feature map, what a column is worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Generator, Tensor, nn

from lightning_compress.core.surgery import replayable

MASK = "class_mask"  # the parameter's name on its layer


def class_mixture(targets: Tensor, num_classes: int, generator: Generator | None = None, layers: int = 1) -> Tensor:
    """Draw D for every layer: 1 for a sample's own class, uniform in [0, 1) for the others.

    Args:
        targets: class indices (B,), or soft labels (B, K), of which each entry is a lower bound.
        num_classes: K.
        generator: on the device of `targets`.
        layers: number of independent draws.

    Returns:
        (layers, B, K), float32.

    Raises:
        MisconfigurationException: the labels have another shape or type.

    >>> class_mixture(torch.tensor([2, 0]), 3)[0].diagonal(offset=2), class_mixture(torch.eye(3), 3).diagonal(0, 1, 2)
    (tensor([1.]), tensor([[1., 1., 1.]]))
    """
    soft = targets.ndim == 2 and targets.is_floating_point() and targets.shape[1] == num_classes
    if not soft and (targets.ndim != 1 or targets.is_floating_point()):
        raise MisconfigurationException(
            f"WhiteBox needs class indices (B,) or soft labels (B, {num_classes}), got {targets.dtype} of shape "
            f"{tuple(targets.shape)}."
        )
    mixture = torch.rand(layers, len(targets), num_classes, generator=generator, device=targets.device)
    if soft:
        return torch.maximum(mixture, targets.float())
    return mixture.scatter_(2, targets.long().view(1, -1, 1).expand(layers, -1, 1), 1.0)


def guide(mixture: Tensor, mask: Tensor, normalize: bool = False) -> Tensor:
    """G = D M: (B, K) and (K, C) -> (B, C), in float32 whatever autocast says.

    Args:
        normalize: divide by (K + 1) / 2, the guide's mean under a mask of ones. With a thousand classes that mean
            is 500, too much for float16. A batch norm behind the mask takes the factor away again.
    """
    with torch.autocast(mask.device.type, enabled=False):
        product = mixture.float() @ mask.float()
    return product / ((len(mask) + 1) / 2) if normalize else product


def scale_channels(x: Tensor, factor: Tensor, dim: int = 1) -> Tensor:
    """Multiply channels, along `dim` of x (B, ...), by a factor (B, C) of their own for every sample."""
    shape = [len(x) if d == 0 else x.shape[dim] if d == dim % x.ndim else 1 for d in range(x.ndim)]
    return (x * factor.view(shape)).to(x.dtype)


def column_penalty(masks: Iterable[Tensor]) -> Tensor:
    """Sum over masks (K, C) of the L2 norm of their column sums.

    >>> float(column_penalty([torch.tensor([[1.0, -1.0, 0.5, 0.0], [1.0, -1.0, 0.5, 0.1]])]))  # doctest: +ELLIPSIS
    3.0016...
    """
    return torch.stack([torch.linalg.vector_norm(mask.float().sum(0)) for mask in masks]).sum()


def channel_scores(mask: Tensor) -> Tensor:
    """s_c = |sum_k M[k, c]|: (K, C) -> (C,), for how many classes a channel works."""
    return mask.detach().float().sum(0).abs()


def mean_guide(mask: Tensor, normalize: bool = False) -> Tensor:
    """The guide's mean over draws and over classes of equal frequency: (K, C) -> (C,).

    Given the class y it is (sum_k M[k] + M[y]) / 2.
    """
    return official_factor(mask, normalize) * ((len(mask) + 1) / len(mask))


def official_factor(mask: Tensor, normalize: bool = False) -> Tensor:
    """The authors' stand-in for the mean guide, sum_k M[k] / 2: (K, C) -> (C,)."""
    half = mask.detach().float().sum(0) / 2
    return half / ((len(mask) + 1) / 2) if normalize else half


@replayable
def attach_masks(module: nn.Module, layers: Sequence[str], num_classes: int) -> partial[None]:
    """Give convolutions a parameter ``class_mask``, ones (K, C_out), that does nothing by itself.

    Raises:
        MisconfigurationException: one of them has a mask already.
    """
    for name in layers:
        layer = module.get_submodule(name)
        if hasattr(layer, MASK):
            raise MisconfigurationException(f"Layer {name!r} is masked by another WhiteBox: exclude it in one of them.")
        weight: Tensor = layer.weight  # type: ignore[assignment]
        layer.register_parameter(MASK, nn.Parameter(weight.new_ones(num_classes, len(weight))))
    return partial(_detach_masks, layers=list(layers))


def _detach_masks(module: nn.Module, layers: Sequence[str]) -> None:
    for name in layers:
        delattr(module.get_submodule(name), MASK)
