"""A convolution that computes the weight gradient of some filters only.

The backward pass of a convolution costs two of its forward passes: the gradient of its input, which the layers before
it need whatever is trained here, and the gradient of its weight. The latter is a product per filter, so filters that
rest need none of it. Zeros in the weight, or a detached part of it, save nothing: the operator makes dense gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NARROW, WIDE = 16, 32  # filters: libraries are slower for 48 of 64 than for all of them


def rest_filters(layer: nn.Module, resting: Tensor) -> bool:
    """Give some filters of a convolution no weight gradient, from the next forward pass on, until the next call.

    It is the layer's own business of this run: it is in no state dict, and undone by :func:`wake_filters`.

    Args:
        layer: any module; what is no convolution, or one with groups, a padding by name or of another kind than zeros,
            stays as it is.
        resting: bool (C_out,).

    Returns:
        Whether the layer saves something now. It computes a few resting filters too, where odd numbers run slowly.
    """
    wake_filters(layer)
    if not isinstance(layer, nn.modules.conv._ConvNd) or layer.transposed or layer.groups != 1:
        return False
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    live = computed_filters(resting)
    if len(live) == len(resting):
        return False
    geometry = (layer.stride, layer.padding, layer.dilation)
    vars(layer)["_conv_forward"] = partial(convolve_live, live=live, geometry=geometry)
    return True


def wake_filters(layer: nn.Module) -> None:
    """Give all filters their gradient again."""
    vars(layer).pop("_conv_forward", None)


def computed_filters(resting: Tensor) -> Tensor:
    """Which filters to compute: all that do not rest, and as many of the others as make a number that runs fast.

    Args:
        resting: bool (C_out,).

    Returns:
        int64 indices, ascending.

    >>> resting = torch.ones(64, dtype=torch.bool).index_fill(0, torch.tensor([3, 50]), False)
    >>> len(computed_filters(resting)), len(computed_filters(torch.ones(64, dtype=torch.bool)))
    (32, 0)
    """
    live = int((~resting).count_nonzero())
    size = WIDE if len(resting) >= 2 * WIDE else NARROW
    count = min(-(-live // size) * size, len(resting))
    return resting.to(torch.uint8).argsort(stable=True)[:count].sort().values


def convolve_live(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, live: Tensor, geometry: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Convolve; in the backward pass ``weight[live]`` gets its gradient, the other filters get zeros.

    Args:
        x: (N, C_in, ...).
        weight: (C_out, C_in, ...).
        bias: (C_out,) or None; its gradient is whole.
        live: int64 indices of filters.
        geometry: stride, padding, dilation.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    return _LiveConv.apply(x, weight, bias, live, geometry)


class _LiveConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor, geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight, live)
        ctx.geometry = geometry
        with torch.autocast(x.device.type, enabled=False):
            return torch.ops.aten.convolution(x, weight, bias, *geometry, False, [0] * (x.ndim - 2), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, live = ctx.saved_tensors
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _backward(grad, x, weight, ctx.geometry, (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            for_weight = torch.zeros_like(weight)
            if len(live):
                own = grad.index_select(1, live), x, weight.index_select(0, live)
                part = _backward(*own, ctx.geometry, (False, True, False))[1]
                for_weight.index_copy_(0, live, part)
        if ctx.needs_input_grad[2]:
            for_bias = grad.transpose(0, 1).flatten(1).sum(1)
        return for_x, for_weight, for_bias, None, None


def _backward(grad: Tensor, x: Tensor, weight: Tensor, geometry: Any, wanted: tuple[bool, bool, bool]) -> Any:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, False, [0] * (x.ndim - 2), 1, list(wanted)
    )
