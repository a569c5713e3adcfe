"""The layers whose weights can be made sparse, and why others are left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_compress.core.select import match
from lightning_compress.core.sparse.nm import why_not_nm

Layer = nn.modules.conv._ConvNd | nn.Linear


def weight_layers(module: nn.Module) -> dict[str, Layer]:
    """All convolutions and linear layers by name, in the order in which they are defined; shared ones once.

    Not those of modules with an attribute ``training_only`` that is true, which do not outlive the training.
    """
    aside = {part for sub in module.modules() if getattr(sub, "training_only", False) for part in sub.modules()}
    layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Layer))
    return {name: layer for name, layer in layers if layer not in aside}


def choose_layers(
    layers: Mapping[str, nn.Module], include: Sequence[str], exclude: Sequence[str], *, m: int | None = None
) -> tuple[list[str], dict[str, str]]:
    """Apply globs of layer names.

    Args:
        m: leave out what cannot be cut into groups of so many inputs.

    Returns:
        The names that are left, and for the others the reason: also for those that share their weight with another
        layer, since one mask cannot serve two layers.

    Raises:
        ValueError: a glob matches no layer.
    """
    chosen, refused = match(layers, include, "include"), match(layers, exclude, "exclude")
    owners = Counter(id(w) for layer in layers.values() for w in _weights(layer))
    reasons = {}
    for name, layer in layers.items():
        if name not in chosen:
            reasons[name] = "is not in `include`"
        elif name in refused:
            reasons[name] = "is left out by `exclude`"
        elif not _weights(layer):
            reasons[name] = "has a weight that is put together from several tensors, as by weight_norm"
        elif any(owners[id(w)] > 1 for w in _weights(layer)):
            reasons[name] = "shares its weight with another layer"
        elif m is not None and (reason := why_not_nm(layer, m)):
            reasons[name] = reason
    return [name for name in layers if name not in reasons], reasons


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """The one tensor that is the weight, or is below its parametrisations."""
    home: Any = layer.parametrizations["weight"] if parametrize.is_parametrized(layer, "weight") else layer  # type: ignore[index]
    weight = home._parameters.get("weight" if home is layer else "original")
    return [] if weight is None else [weight]
