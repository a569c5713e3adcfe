"""Rounding and clipping as fake quantisers need them: what gradients pass, and what they do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity (the "straight-through estimator").

    >>> x = torch.tensor([-0.6, 0.5, 1.5], requires_grad=True)
    >>> round_ste(x).sum().backward()
    >>> x.grad
    tensor([1., 1., 1.])
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _RoundSTE.apply(x)
    return x.round()


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def fuses(*tensors: Tensor) -> bool:
    """Whether a quantiser shall take its own autograd function: it learns, and no compiler fuses the plain formula."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not torch.compiler.is_compiling()


def pass_inside(grad: Tensor, x: Tensor, low: Tensor, high: Tensor, *, bounds: bool) -> Tensor:
    """The gradient where x lies between `low` and `high`, zero elsewhere: a new tensor of x's shape.

    Args:
        grad: of x's shape.
        x: any floating point type.
        low, high: one element, or what broadcasts to x; float32.
        bounds: whether x may also lie on the bounds.
    """
    if x.device.type == "cpu" and low.numel() == 1:  # one pass; there is no such kernel with bounds on the device
        if bounds:
            low = torch.nextafter(low, torch.full_like(low, -torch.inf))
            high = torch.nextafter(high, torch.full_like(high, torch.inf))
        return torch.ops.aten.hardtanh_backward(grad, x.to(grad.dtype), low.item(), high.item())
    inside = (x >= low) & (x <= high) if bounds else (x > low) & (x < high)
    return torch.where(inside, grad, 0.0)


def sum_as(x: Tensor, like: Tensor) -> Tensor:
    """The sum of `x` over what `like`, which broadcasts to it, has one of: in the shape of `like`."""
    return x.sum().view(like.shape) if like.numel() == 1 else x.sum_to_size(like.shape)


def dot_as(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """The sum of x * y, as in :func:`sum_as`; for one sum without a tensor for the product."""
    if like.numel() == 1 and x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype:
        return torch.dot(x.view(-1), y.view(-1)).view(like.shape)
    return sum_as(x * y, like)
