"""2:4 weights in the form that sparse tensor cores read."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.sparse.nm import is_nm

# The tiles of the sparse kernels for half precision: rows, columns.
_TILE = (32, 64)


class PointwiseLinear(nn.Module):
    """A 1x1 convolution as a matrix product over pixels, which a 2:4 weight makes faster.

    Args:
        conv: kernel 1x1, one group, no padding; any stride.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride = conv.stride
        self.linear = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
        self.linear.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
        self.linear.register_parameter("bias", conv._parameters["bias"])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), in the channels-last memory format."""
        rows, columns = self.stride
        pixels = x[:, :, ::rows, ::columns].permute(0, 2, 3, 1)
        n, h, w, channels = pixels.shape
        out = F.linear(pixels.reshape(-1, channels), self.linear.weight, self.linear.bias)
        return out.view(n, h, w, -1).permute(0, 3, 1, 2)


def to_semi_structured(module: nn.Module, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a network whose 2:4 layers run on sparse tensor cores.

    Linear layers and 1x1 convolutions get weights of ``torch.sparse.to_sparse_semi_structured``; it stores the two
    values of each group and two bits for each of their places. Everything else is as it was, in the new dtype.

    Args:
        module: a network or a LightningModule, on a GPU that has sparse tensor cores (compute capability 8.0).
        dtype: ``torch.float16`` or ``torch.bfloat16``; the kernels take no other floating point weights.

    Returns:
        The copy, in eval mode; and layer name -> why it stayed dense.

    Raises:
        ValueError: another dtype.
        MisconfigurationException: the module is not on such a GPU, or none of its layers is 2:4 sparse.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}.")
    device = next(module.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise MisconfigurationException(
            f"to_semi_structured: {type(module).__name__} is on {str(device)!r}; 2:4 weights need a GPU with sparse "
            f"tensor cores (compute capability 8.0 or later). Move it there first."
        )
    clone = inference_copy(module).to(dtype)
    layers = {n: m for n, m in clone.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    dense = {name: reason for name, layer in layers.items() if (reason := why_dense(layer))}
    if len(dense) == len(layers):
        raise MisconfigurationException(f"to_semi_structured finds no 2:4 layer in {type(module).__name__}: {dense}")
    for name in layers.keys() - dense.keys():
        convert(clone, name)
    return clone, dense


def why_dense(layer: nn.Module) -> str | None:
    """The reason why a layer cannot run on sparse tensor cores; None if it can."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Conv2d) and (
        layer.kernel_size != (1, 1) or layer.groups > 1 or layer.padding not in ((0, 0), "valid")
    ):
        return "is no plain 1x1 convolution"
    if any(size % tile for size, tile in zip(weight.shape[:2], _TILE, strict=True)):
        return f"is {weight.shape[0]} x {weight.shape[1]}; the kernels take multiples of {_TILE[0]} x {_TILE[1]}"
    return None if is_nm(weight, 2, 4) else "is not 2:4 sparse"


def convert(network: nn.Module, name: str) -> None:
    """Give one layer of a network its compressed weight, in place."""
    layer: Any = network.get_submodule(name)
    if isinstance(layer, nn.Conv2d):
        parent, _, leaf = name.rpartition(".")
        replacement = PointwiseLinear(layer)
        network.get_submodule(parent).add_module(leaf, replacement)
        layer = replacement.linear
    layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach().contiguous()), requires_grad=False)
