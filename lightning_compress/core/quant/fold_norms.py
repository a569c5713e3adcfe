"""Batch norms that go into the convolutions before them.

gamma (W * x + b - mean) / sqrt(var + eps) + beta  =  (k W) * x + k (b - mean) + beta,    k = gamma / sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.surgery import replayable


def folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a convolution that computes what `layer` and `norm` do: (C_out, ...), (C_out,)."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach()
    bias = -factor * norm.running_mean
    if layer.bias is not None:
        bias = bias + factor * layer.bias.detach()
    if norm.bias is not None:
        bias = bias + norm.bias.detach()
    return layer.weight.detach() * factor.view(-1, *[1] * (layer.weight.ndim - 1)), bias


@replayable
def fold_norms(module: nn.Module, norms: Mapping[str, str]) -> Any:
    """Put norms into layers; an identity takes the place of each, and layers without a bias get one.

    Args:
        norms: layer -> the batch norm that alone reads its output. A layer whose weight is parametrised stays as it is.
    """
    taken: dict[str, tuple[str, nn.Module, bool]] = {}
    for name, norm_name in norms.items():
        layer: Any = module.get_submodule(name)
        norm = module.get_submodule(norm_name)
        if parametrize.is_parametrized(layer, "weight"):
            continue
        weight, bias = folded(layer, norm)
        taken[name] = (norm_name, norm, layer.bias is None)
        layer.weight.data.copy_(weight)
        layer.register_parameter("bias", nn.Parameter(bias))
        module.set_submodule(norm_name, nn.Identity())
    return partial(put_norms_back, taken=taken)


def put_norms_back(module: nn.Module, taken: Mapping[str, tuple[str, nn.Module, bool]]) -> None:
    """The structure from before :func:`fold_norms`; the values of its tensors are about to be loaded."""
    for name, (norm_name, norm, without_bias) in taken.items():
        module.set_submodule(norm_name, norm)
        if without_bias:
            module.get_submodule(name).register_parameter("bias", None)
