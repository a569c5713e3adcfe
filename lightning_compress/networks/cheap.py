"""Cheap convolutions: a k x k convolution becomes something spatial that costs next to nothing, and a 1x1 convolution.

Xie et al., "Training convolutional neural networks with cheap convolutions and online distillation", 2019,
arXiv:1909.13063. Of P channels to Q, stride s, on maps of H x W:

    dense      k x k convolution P -> Q, stride s                               k^2 P Q (H/s)(W/s) MACs
    shift      every channel moves by up to k//2 pixels, then 1x1, stride s     P Q (H/s)(W/s)
    dw         k x k depthwise convolution, then 1x1, stride s                  P Q (H/s)(W/s) + k^2 P H W
    group      k x k convolution in g groups, then 1x1, stride s                P Q (H/s)(W/s) + k^2 P^2 / g H W

Shifts have no parameters. With k^2 directions, channel c moves by

    dx = c mod k - k//2,   dy = floor(c / k) mod k - k//2,   out[y, x] = in[y + dy, x + dx],   0 from outside,

and the last C mod k^2 channels stay where they are.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.select import match

Kind = Literal["shift", "dw", "group"]

# ---- the shift


def shift(x: Tensor, kernel_size: int = 3) -> Tensor:
    """Move every channel by its own direction, with zeros from outside: (..., C, H, W) -> the same shape.

    Its gradient is the opposite shift. Where a graph is captured, and on a CPU in the channels-last format, it is the
    depthwise convolution of `one_hot_kernel`: one node of ONNX instead of dozens, and as fast as a copy. In the usual
    format copies of slices are faster.

    Args:
        x: feature maps.
        kernel_size: k, odd; there are k * k directions.

    >>> x = torch.arange(18.0).view(1, 9, 1, 2)  # one row: what moves up or down is gone
    >>> shift(x)[0, 3:6].tolist()
    [[[0.0, 6.0]], [[8.0, 9.0]], [[11.0, 0.0]]]
    """
    return _convolved(x, kernel_size, 1) if torch.compiler.is_compiling() else _Shift.apply(x, kernel_size)


def one_hot_kernel(channels: int, kernel_size: int = 3) -> Tensor:
    """The kernels (C, 1, k, k) of the depthwise convolution that a shift is, padded by k//2."""
    directions = kernel_size**2
    moved = channels - channels % directions
    ones = np.arange(channels) % directions
    ones[moved:] = directions // 2
    # by NumPy, so that a captured graph holds the kernels, not their making
    kernel = np.eye(directions, dtype=np.float32)[ones].reshape(channels, 1, kernel_size, kernel_size)
    return torch.tensor(kernel)


def _convolved(x: Tensor, kernel_size: int, sign: int) -> Tensor:
    """By a depthwise convolution; every direction times `sign`."""
    kernel = one_hot_kernel(x.shape[1], kernel_size).to(x)
    return F.conv2d(x, kernel.flip(2, 3) if sign < 0 else kernel, padding=kernel_size // 2, groups=x.shape[1])


def _copied(x: Tensor, kernel_size: int, sign: int) -> Tensor:
    """By copies of slices; every direction times `sign`."""
    directions, reach = kernel_size**2, kernel_size // 2
    moved = x.shape[-3] - x.shape[-3] % directions
    out = torch.zeros_like(x)
    for k in range(min(directions, moved)):
        (to_y, from_y), (to_x, from_x) = (
            _overlap(sign * (offset - reach), size)
            for offset, size in zip(divmod(k, kernel_size), x.shape[-2:], strict=True)
        )
        out[..., k:moved:directions, to_y, to_x] = x[..., k:moved:directions, from_y, from_x]
    out[..., moved:, :, :] = x[..., moved:, :, :]
    return out


def _moved(x: Tensor, kernel_size: int, sign: int) -> Tensor:
    """In the way that is faster. Not by products of meta tensors, on which costs are counted: a shift has none."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return (_convolved if last and x.is_cpu else _copied)(x, kernel_size, sign)


def _overlap(offset: int, size: int) -> tuple[slice, slice]:
    """Of ``out[i] = in[i + offset]``, 0 <= i < size: the slices of out and in where both exist."""
    start, stop = max(0, -offset), max(0, size - max(0, offset))
    return slice(start, max(start, stop)), slice(start + offset, max(start, stop) + offset)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, kernel_size: int) -> Tensor:
        return _moved(x, kernel_size, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.kernel_size = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _moved(gradient, ctx.kernel_size, -1), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, kernel_size: int) -> tuple[Tensor, int]:
        return _Shift.apply(x.movedim(in_dims[0], 1), kernel_size), 1


class Shift(nn.Module):
    """:func:`shift` as a layer.

    Args:
        kernel_size: k, odd.
    """

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return shift(x, self.kernel_size)

    def trace_channels(self, trace: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        """Tell the channel graph that no channel can go: those behind it would move in other directions."""
        trace.freeze_tensor(args[0], "moves by its index")

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


# ---- what takes the place of a convolution


def spatial(kind: Kind, channels: int, kernel_size: int = 3, groups: int = 4) -> nn.Module:
    """The part of a cheap convolution that looks at neighbours; shape and channels stay, and it has no bias.

    Args:
        kind: ``"shift"``, ``"dw"`` or ``"group"``.
        channels: of input and output.
        kernel_size: k, odd.
        groups: of ``"group"``.

    Raises:
        ValueError: an unknown kind, or groups that do not divide the channels.
    """
    check_kind(kind, groups)
    if kind == "shift":
        return Shift(kernel_size)
    count = channels if kind == "dw" else groups
    if channels % count:
        raise ValueError(f"groups: {channels} channels cannot be cut into {count} groups.")
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=count, bias=False)


def check_kind(kind: str, groups: int) -> None:
    """Raise unless there are cheap convolutions of that kind."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}.")
    if groups < 1:
        raise ValueError(f"groups: expected 1 or more, got {groups}.")


def initialise(module: nn.Module) -> None:
    """Draw the weights of all convolutions from N(0, 2 / fan_in), as the authors do."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)


def convert_to_cheap(
    network: nn.Module, kind: Kind = "shift", groups: int = 4, exclude: Sequence[str] | None = None
) -> nn.Module:
    """Make a copy of a network in which convolutions over neighbours are cheap ones; it is to be trained anew.

    Each 3x3 and 5x5 convolution without groups becomes ``Sequential(spatial, pointwise)``: something spatial on its
    inputs, with stride 1, and a 1x1 convolution with its stride. These are drawn from N(0, 2 / fan_in); all other
    layers, 1x1 convolutions among them, are copied with their weights. Layers whose padding is not k//2 are left
    alone, as their output would have another size.

    Args:
        network: any network of `Conv2d` layers; it is not changed.
        kind: ``"shift"``, ``"dw"`` or ``"group"``.
        groups: of ``"group"``; where these do not divide the channels, the largest number below that does.
        exclude: globs of layers to leave alone. None: the first convolution.

    Raises:
        ValueError: an unknown kind, a glob that matches nothing, or nothing to convert.

    Example::

        network = convert_to_cheap(resnet56(), "shift")

    As the network of an `ImageClassifier`, in YAML::

        network:
          class_path: lightning_compress.networks.convert_to_cheap
          init_args: {network: {class_path: lightning_compress.networks.resnet56}, kind: shift}
    """
    check_kind(kind, groups)
    network = copy.deepcopy(network)
    chosen, reasons = choose_convolutions(network, exclude)
    if not chosen:
        raise ValueError(f"network: {type(network).__name__} has no convolution to make cheap: {_told(reasons)}.")
    normed = set(_before_norms(network))
    for name in chosen:
        network.set_submodule(name, _cheap(name, network.get_submodule(name), kind, groups, bias=name not in normed))
    return network


def choose_convolutions(network: nn.Module, exclude: Sequence[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """The convolutions that can be cheap, and for the others the reason why not; arguments of `convert_to_cheap`."""
    convolutions = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    left = list(convolutions)[:1] if exclude is None else match(convolutions, exclude, "exclude")
    reasons = {name: _why_not_cheap(layer) for name, layer in convolutions.items()}
    reasons |= dict.fromkeys(left, "is the first convolution" if exclude is None else "is left out by `exclude`")
    return [name for name, why in reasons.items() if not why], {name: why for name, why in reasons.items() if why}


def _why_not_cheap(layer: nn.Conv2d) -> str:
    """Empty where it can be."""
    size = layer.kernel_size[0]
    if layer.kernel_size not in ((3, 3), (5, 5)):
        return f"has a kernel of {'x'.join(map(str, layer.kernel_size))}"
    if layer.groups > 1:
        return f"has {layer.groups} groups"
    if layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return "is dilated, or not padded by zeros"
    return "" if layer.padding in ("same", (size // 2, size // 2)) else f"is not padded by {size // 2}"


def _told(reasons: dict[str, str]) -> str:
    return ", ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:4]) or "there is none"


def _cheap(name: str, layer: Any, kind: Kind, groups: int, bias: bool) -> nn.Module:
    if kind == "group":
        wanted, groups = groups, next(g for g in range(groups, 0, -1) if layer.in_channels % g == 0)
        if groups < wanted:
            rank_zero_warn(f"groups={wanted} does not divide the {layer.in_channels} channels of {name}: {groups} do.")
    bias &= layer.bias is not None
    parts = OrderedDict(
        spatial=spatial(kind, layer.in_channels, layer.kernel_size[0], groups),
        pointwise=nn.Conv2d(layer.in_channels, layer.out_channels, 1, stride=layer.stride, bias=bias),
    )
    cheap = nn.Sequential(parts).to(layer.weight)
    initialise(cheap)
    return cheap.train(layer.training)


def _before_norms(network: nn.Module) -> Iterator[str]:
    """Names of the convolutions that a batch norm follows in the order of definition: it takes up their bias."""
    previous = ""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and previous:
            yield previous
        if not list(layer.children()):
            previous = name if isinstance(layer, nn.Conv2d) else ""
