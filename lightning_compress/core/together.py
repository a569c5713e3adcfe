"""Several networks of one architecture as one: each operator runs once for all of them.

    f(theta_1, x), ..., f(theta_M, x)  =  vmap(f)(stack(theta_1, ..., theta_M), x)

The arithmetic is the same, in fewer and larger calls: faster where a call costs more than its arithmetic. On a CPU
these are calls on small maps; large ones only fall out of its caches. Most operators are those of vmap. 1x1
convolutions and batch norms, of which cheap networks consist, have faster rules of their own here: maps lie as
(M, C, B, H, W), so that the former are one batched matrix product, and the latter one batch norm of M C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_compress.core.inference_copy import has_watchers

# Pixels of a batch per thread up to which one call for four networks was faster than four, forward and backward.
FEW_PIXELS = 4096


def can_run_together(networks: Sequence[nn.Module]) -> bool:
    """Whether :func:`run_together` may replace calls of the networks one by one.

    Not where their tensors have different shapes, where hooks want to see each of them, where weights are computed by
    parametrisations, or where batch norms wait for other processes or look up how often they were called.
    """
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in networks]
    return (
        all(shape == shapes[0] for shape in shapes)
        and not any(has_watchers(network) for network in networks)
        and not any(_stands_alone(module) for network in networks for module in network.modules())
    )


def _stands_alone(module: nn.Module) -> bool:
    counts = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None
    return isinstance(module, nn.SyncBatchNorm) or counts or parametrize.is_parametrized(module)


def faster_together(images: Tensor) -> bool:
    """Whether calls on such images, (B, C, H, W), are so small that :func:`run_together` pays."""
    pixels = len(images) * images.shape[2:].numel()
    return images.is_cuda or pixels <= FEW_PIXELS * torch.get_num_threads()


def run_together(networks: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Call networks of one architecture with the same arguments: their outputs, each tensor with M in front.

    Gradients reach the parameters of every network, and buffers change, as if they were called one by one, but for the
    order of floating-point sums. Dropout draws for each network on its own.

    Args:
        networks: M modules whose state dicts have the same names and shapes.

    >>> one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> run_together([one, other], torch.zeros(5, 2)).shape
    torch.Size([2, 5, 3])
    """
    parameters = _stacked([dict(network.named_parameters()) for network in networks])
    own_buffers = [dict(network.named_buffers()) for network in networks]
    buffers = _stacked(own_buffers)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
        return functional_call(networks[0], {**parameters, **buffers}, args, kwargs)

    with _Rules():
        outputs = torch.vmap(one, randomness="different")(parameters, buffers)
    if buffers:
        changed = [buffer for name in buffers for buffer in buffers[name].unbind()]
        with torch.no_grad():
            torch._foreach_copy_([own[name] for name in buffers for own in own_buffers], changed)
    return outputs


def _stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name] for own in tensors]) for name in tensors[0]}


# ---- rules: (B, C, H, W) of one network is (M, C, B, H, W) of all


class _Rules(TorchFunctionMode):
    """While active, convolutions and batch norms that have a rule here follow it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.conv2d, F.linear):
            args = tree_map_only(Tensor, _autocast, args)
        if func is torch.conv2d and _is_pointwise(*args, **kwargs):
            x, weight, _, stride, *_ = args
            return _Pointwise.apply(x, weight, stride)
        if func is F.batch_norm and args[0].ndim == 4 and all(a is not None for a in (*args, *kwargs.values())):
            return _BatchNorm.apply(*args, *kwargs.values())
        return func(*args, **kwargs)


def _autocast(tensor: Tensor) -> Tensor:
    """As autocast would, of which vmap knows nothing."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _is_pointwise(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> bool:
    """Whether it is called as `nn.Conv2d` does, and is a 1x1 convolution without bias, padding and groups."""
    if named or len(rest) != 5 or x.ndim != 4:
        return False
    bias, _, padding, _, groups = rest
    return bias is None and padding in (0, (0, 0)) and groups == 1 and weight.shape[2:] == (1, 1)


class _Rule(torch.autograd.Function):
    """A function of networks that are stacked; its gradient is that of the operators in its `vmap`."""

    @staticmethod
    def forward(*args: Any) -> Any:
        raise AssertionError("parameters are always stacked")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise AssertionError("parameters are always stacked")


class _Pointwise(_Rule):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, stride: tuple[int, int]) -> tuple[Tensor, int]:
        x = _channels_first(x, in_dims[0], info.batch_size)[..., :: stride[0], :: stride[1]]
        product = torch.bmm(weight.movedim(in_dims[1], 0).flatten(2), x.reshape(*x.shape[:2], -1))
        return product.view(len(x), -1, *x.shape[2:]).transpose(1, 2), 0


class _BatchNorm(_Rule):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        x = _channels_first(x, in_dims[0], info.batch_size)
        per_channel, others = [tensor.flatten() for tensor in rest[:4]], rest[4:]
        normed = F.batch_norm(x.reshape(1, x.shape[0] * x.shape[1], -1), *per_channel, *others)
        return normed.view(x.shape).transpose(1, 2), 0


def _channels_first(x: Tensor, dim: int | None, count: int) -> Tensor:
    """(B, C, H, W) of stacked networks as (M, C, B, H, W), a view."""
    x = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.transpose(1, 2)
