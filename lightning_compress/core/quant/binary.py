r"""Networks of one bit: what all binarisations of convolutions have in common.

A layer computes, with its weight's code B, one of the methods' parametrisations of ``layer.weight``,

    y = alpha_o * conv( sign(a), B ),    a = (x - mean x) / (r + eps),   r = sqrt(var x + nu)   over each sample

and is still a `Conv2d`: the sign of the input is a hook in front of it (:class:`SampleSign`), the scale one behind it
(:class:`ChannelScale`); see ``core/quant/attach.py``. Zeros that pad the signs count nothing. Signs have no gradient,
so the backward pass has one of the family

    d sign(x) / dx  :=  max(0, k (sqrt(2) t - t^2 |x|)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.quant.attach import real_weight, remove_quantizers

SQRT2 = math.sqrt(2)
# Names of modules that hold the 1x1 convolutions of shortcuts, in torchvision's networks and others.
SHORTCUTS = ("downsample", "shortcut")


def sign(x: Tensor) -> Tensor:
    """-1 and +1 of x's dtype; zero has the sign +1, as a bit must be one or the other.

    >>> sign(torch.tensor([-2.0, 0.0, 0.5]))
    tensor([-1.,  1.,  1.])
    """
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)  # torch.where takes ten times as long


def slope(x: Tensor, k: float, t: float) -> Tensor:
    """What stands for the derivative of the sign: max(0, k (sqrt(2) t - t^2 |x|)).

    >>> slope(torch.tensor([-0.1, 0.0, 0.05, 0.5, 1.0, 2.0]), 1.0, 1.0)
    tensor([1.3142, 1.4142, 1.3642, 0.9142, 0.4142, 0.0000])
    """
    return (k * SQRT2 * t - k * t * t * x.abs()).clamp_(min=0)


class _Sign(torch.autograd.Function):
    """The sign forward, the slope backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float, t: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.k, ctx.t = k, t
        return sign(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return grads[0] * slope(x, ctx.k, ctx.t), None, None


def binarize(x: Tensor, k: float, t: float) -> Tensor:
    """:func:`sign` of x, whose gradient passes through :func:`slope`."""
    return _Sign.apply(x, k, t) if torch.is_grad_enabled() else sign(x)


def sample_mean(x: Tensor, *, exact: bool = True) -> Tensor:
    """The mean of each x[i], (N, 1, ...), in float32.

    Args:
        exact: sum in float64, as `ops/binary_conv2d` does, so that the mean does not depend on the order of the sum. It
            takes 15 times as long as the sum in float32, which is good enough for a step of training. Either way the
            mean of equal numbers is that number.
    """
    dims = tuple(range(1, x.ndim))
    if exact:
        return x.mean(dims, keepdim=True, dtype=torch.float64).float()
    x = x.float()
    return x.mean(dims, keepdim=True).clamp(x.amin(dims, keepdim=True), x.amax(dims, keepdim=True))


def _root(centred: Tensor, nu: float) -> Tensor:
    """sqrt(var + nu) of each x[i] without its mean, (N, 1, ...), with the unbiased variance."""
    norm = torch.linalg.vector_norm(centred, dim=tuple(range(1, centred.ndim)), keepdim=True)
    return (norm.square() / _free(centred) + nu).sqrt()


def _free(x: Tensor) -> int:
    return max(x[0].numel() - 1, 1)


def _through_standard(grad: Tensor, a: Tensor, root: Tensor, eps: float) -> Tensor:
    """The gradient of x from that of a = (x - mean) / (root + eps)."""
    dims = tuple(range(1, a.ndim))
    # constant samples have no spread to go through
    share = (grad * a).sum(dims, keepdim=True) / (_free(a) * root).clamp(min=torch.finfo(a.dtype).tiny)
    return (grad - grad.mean(dims, keepdim=True)) / (root + eps) - a * share


class _Standardize(torch.autograd.Function):
    """(x - mean) / (sqrt(var + nu) + eps), which keeps x alone for the backward pass, and makes no NaN of constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, nu: float) -> Tensor:
        mean = sample_mean(x, exact=False)
        centred = x - mean
        root = _root(centred, nu)
        ctx.save_for_backward(x, mean, root)
        ctx.eps = eps
        return centred / (root + eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, root = ctx.saved_tensors
        return _through_standard(grads[0], (x - mean) / (root + ctx.eps), root, ctx.eps), None, None


class _StandardSign(torch.autograd.Function):
    """The sign of the standardised x, which its mean alone decides; the spread is for the backward pass.

    In place as far as it goes: beside small convolutions, memory that is fetched anew is what takes the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, nu: float, k: float, t: float, exact: bool) -> Tensor:
        mean = sample_mean(x, exact=exact)
        ctx.save_for_backward(x, mean)
        ctx.options = eps, nu, k, t
        return (x.float() - mean).ge_(0).mul_(2).sub_(1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        eps, nu, k, t = ctx.options
        a = (x.float() - mean).flatten(1)
        root = _root(a, nu)
        a.div_(root + eps)
        grad = a.abs().mul_(-k * t * t).add_(k * SQRT2 * t).clamp_(min=0)
        grad.mul_(grads[0].flatten(1))
        share = torch.linalg.vecdot(grad, a)[:, None] / (_free(x) * root).clamp(min=torch.finfo(a.dtype).tiny)
        grad.sub_(grad.mean(1, keepdim=True)).div_(root + eps).sub_(a.mul_(share))
        return grad.view_as(x).to(x.dtype), None, None, None, None, None


def standardize(x: Tensor, eps: float = 0.0, nu: float = 0.0) -> Tensor:
    """Each x[i] with mean 0 and spread 1: (x - mean) / (sqrt(var + nu) + eps), over all dimensions but the first.

    Args:
        x: (N, ...): images, or the filters of a weight.
        eps: what keeps a constant x[i] from a division by zero; far below the smallest spread that means something.
        nu: the same inside of the root, where it also changes x[i] of little spread.
    """
    return _Standardize.apply(x, eps, nu)


class SampleSign(nn.Module):
    """The input of a layer as signs, by a threshold that is each sample's own mean: (N, ...) -> -1 and +1.

    Args:
        eps: see :func:`standardize`; it acts on gradients alone.
        nu: likewise.
        k: of :func:`slope`.
        t: of :func:`slope`.
    """

    bits = 1

    def __init__(self, eps: float, nu: float, k: float = 1.0, t: float = 1.0) -> None:
        super().__init__()
        self.eps, self.nu, self.k, self.t = eps, nu, k, t

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                return _StandardSign.apply(x, self.eps, self.nu, self.k, self.t, not self.training)
            return sign(x.float() - sample_mean(x)).to(x.dtype)


class SampleStandard(nn.Module):
    """The input of a layer whose weights alone have one bit: each sample with mean 0 and spread 1.

    Args:
        eps: see :func:`standardize`.
        nu: likewise.
    """

    bits = 32

    def __init__(self, eps: float, nu: float) -> None:
        super().__init__()
        self.eps, self.nu = eps, nu

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return standardize(x.float(), self.eps, self.nu).to(x.dtype)


class ChannelScale(nn.Module):
    """The factor of each output channel: (N, C_out, H, W) -> alpha_o y.

    Args:
        weight: (C_out, ...); alpha starts as the mean of each filter's absolute weights.

    Attributes:
        alpha: (C_out, 1, 1), a parameter. It may become negative.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        start = weight.detach().float().abs().flatten(1).mean(1)
        self.alpha = nn.Parameter(start[:, None, None])

    def forward(self, y: Tensor) -> Tensor:
        return y * self.alpha.to(y.dtype)


class _ScaleOutput:
    """Forward hook: the layer's output through its ``output_scale``."""

    part_of_function = True  # inference copies keep it

    def __call__(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        return layer.output_scale(output)  # type: ignore[operator]


def scale_output(layer: nn.Module, scale: nn.Module) -> None:
    """Attach ``layer.output_scale``, through which the layer's output passes."""
    layer.output_scale = scale
    layer.register_forward_hook(_ScaleOutput())


def unbinarize(module: nn.Module, layers: Sequence[str]) -> None:
    """Take quantisers and scale off layers, which have their real weights again."""
    for name in layers:
        layer = module.get_submodule(name)
        remove_quantizers(layer)
        del layer.output_scale
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, _ScaleOutput):
                del layer._forward_hooks[key]


def why_not_binary(layer: nn.Module) -> str:
    """Why a layer cannot have one bit, as the end of a sentence; empty if it can."""
    if not isinstance(layer, nn.Conv2d):
        return "is no Conv2d"
    if layer.padding_mode != "zeros":
        return f"pads with {layer.padding_mode!r}, not with zeros"
    if isinstance(layer.padding, str):
        return f"has padding={layer.padding!r}, not a number"
    if layer.dilation != (1, 1):
        return "is dilated"
    if layer.weight[0].numel() < 2:
        return "has filters of one weight"
    return ""


def is_downsample(name: str, layer: nn.Module) -> bool:
    """Whether a layer is the 1x1 convolution of a shortcut: one with a stride, or one below a name of `SHORTCUTS`."""
    if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1):
        return False
    return max(layer.stride) > 1 or any(part in SHORTCUTS for part in name.split("."))


def downsamples(module: nn.Module) -> list[str]:
    """The names of all 1x1 convolutions of shortcuts; see :func:`is_downsample`."""
    return [name for name, layer in module.named_modules() if is_downsample(name, layer)]


def binary_layers(module: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Conv2d]:
    """All layers with one bit, or those of them that are named: layer name -> layer."""
    chosen = None if names is None else set(names)
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d) and hasattr(layer, "output_scale") and (chosen is None or name in chosen)
    }


def packed_bytes(layer: nn.Conv2d) -> int:
    """Of the weight at one bit, each filter in bytes of its own."""
    weight = real_weight(layer)
    return len(weight) * -(-weight[0].numel() // 8)
