"""Compute only the filters that an image selects: faster for one image at a time, on a CPU.

    idx = nonzero(m);   out[:, idx] = conv(X[:, idx_in]; W[idx][:, idx_in])

Batch norms are folded into the convolutions. Weights lie in tables whose rows are kernels, so that one `take` packs
those that are needed. A selected output stays packed while nothing but convolutions will read it, else it is put in its
place among zeros. Selecting is done in NumPy: the arrays are tiny, and a call costs a third of what it costs in torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lightning_compress.callbacks.pruning.architecture_decoupling.gates import Gate, detach_gates, gates_of, silenced
from lightning_compress.callbacks.pruning.architecture_decoupling.units import Structure, trace_units
from lightning_compress.core.inference_copy import inference_copy

# Up to so many output positions, a product of matrices is faster than a convolution.
FEW = 8


class Controller:
    """Which filters of a convolution an image selects; a gate's weights as arrays.

    Attributes:
        index: the filters selected by the last image, ascending, where it came alone.
        mask: those selected by the last images, where they were several: (B, N).
    """

    def __init__(self, gate: Gate) -> None:
        one = torch.ones(1)  # a hidden unit that is always 1 carries the second bias
        self.first = F.pad(gate.reduce.weight, (0, 0, 0, 1)).t().contiguous().numpy()  # (C_in, hidden + 1)
        self.first_bias = torch.cat([gate.reduce.bias, one]).numpy()
        self.second = torch.cat([gate.expand.weight.t(), gate.expand.bias[None]]).numpy()  # (hidden + 1, N)
        self.average = np.empty(0, np.float32)
        self.index = np.empty(0, np.int64)
        self.mask = np.empty((0, 0), bool)

    def decide(self, images: Tensor, chosen: np.ndarray | None) -> None:
        """Look at images (B, C, H, W), of which C may be the `chosen` channels alone."""
        x = images.numpy()
        batch, channels, height, width = x.shape
        if self.average.size != height * width:
            self.average = np.full(height * width, 1 / (height * width), np.float32)
        x = x.reshape((channels, -1) if batch == 1 else (batch, channels, -1))
        h = x @ self.average @ (self.first if chosen is None else self.first.take(chosen, 0))
        h += self.first_bias
        np.maximum(h, 0, out=h)
        mask = h @ self.second > 0
        if batch == 1:
            (self.index,) = mask.nonzero()
        else:
            self.mask = mask


class DynamicConv(nn.Module):
    """A convolution, with its batch norm, that computes the selected filters of the selected inputs.

    With one image the output holds the selected channels alone, if `packed`. With several, all channels are computed
    and masked.

    Args:
        conv: the convolution; one group, zeros as padding.
        norm: the batch norm to fold in, or None.
        controller: selects its filters; None if it computes all.
        inputs: what wrote its input, in order: the controller of a packed output, or None, and the number of channels.
            Empty if the input is dense.
        packed: whether the output may stay packed.
        few: whether the output has at most `FEW` positions.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None,
        controller: Controller | None,
        inputs: Sequence[tuple[Controller | None, int]],
        packed: bool,
        few: bool,
    ) -> None:
        super().__init__()
        weight, bias = fold(conv, norm)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.table = weight.flatten(2).numpy()  # (N, C, kh kw), the same memory
        self.biases = bias.numpy()
        self.shape = tuple(weight.shape)
        self.geometry: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation)
        self.controller = controller
        self.inputs = tuple(inputs)
        self.packed = packed
        self.few = few and not isinstance(conv.padding, str)
        self.looks = controller is not None  # False where a `Before` does

    def chosen(self) -> np.ndarray | None:
        """The channels of the dense input that a packed input holds; None if it is dense."""
        if len(self.inputs) == 1 and self.inputs[0][0] is not None:
            return self.inputs[0][0].index
        indices, start = [], 0
        for controller, channels in self.inputs:
            index = np.arange(channels) if controller is None else controller.index
            indices.append(index + start)
            start += channels
        return np.concatenate(indices) if indices else None

    def forward(self, x: Tensor) -> Tensor:
        controller, alone = self.controller, x.shape[0] == 1
        chosen = self.chosen() if alone else None
        if controller is None:
            return self.convolve(x, self.pack(None, chosen), self.bias)
        if self.looks:
            controller.decide(x, chosen)
        if not alone:
            return self.convolve(x, self.weight, self.bias) * torch.from_numpy(controller.mask)[:, :, None, None]
        if controller.index.size:
            out = self.convolve(x, self.pack(controller.index, chosen), self.bias_of(controller.index))
        else:  # one channel of zeros stands for no channel
            controller.index = np.zeros(1, np.int64)
            out = self.convolve(x, self.pack(controller.index, chosen), self.bias[:1]).zero_()
        if self.packed:
            return out
        full = torch.zeros(1, self.shape[0], *out.shape[2:])
        full.numpy()[0, controller.index] = out.numpy()[0]
        return full

    def bias_of(self, index: np.ndarray) -> Tensor:
        """The biases of some filters."""
        return torch.from_numpy(self.biases.take(index))

    def pack(self, index: np.ndarray | None, chosen: np.ndarray | None) -> Tensor:
        """The weights of some filters and some inputs."""
        filters, channels, *size = self.shape
        if chosen is None:
            if index is None:
                return self.weight
            return torch.from_numpy(self.table.take(index, 0)).view(-1, channels, *size)
        rows = np.arange(filters) if index is None else index
        kernels = self.table.reshape(filters * channels, -1).take((rows * channels)[:, None] + chosen, 0)
        return torch.from_numpy(kernels).view(rows.size, chosen.size, *size)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.few or x.shape[0] > 1:
            return F.conv2d(x, weight, bias, *self.geometry)
        (stride, padding, dilation), kernel = self.geometry, self.shape[2:]
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
        ]
        patches = F.unfold(x, kernel, dilation, padding, stride)[0]
        return F.linear(patches.t(), weight.flatten(1), bias).t().reshape(1, -1, *sizes)

    def extra_repr(self) -> str:
        filters, channels, *size = self.shape
        return f"{channels}, {filters}, kernel_size={tuple(size)}, dynamic={self.controller is not None}"


class Before(nn.Module):
    """A pooling whose input decides the filters of the convolution behind it."""

    def __init__(self, pooling: nn.Module, conv: DynamicConv, controller: Controller) -> None:
        super().__init__()
        self.pooling = pooling
        self.controller = controller
        self._conv = (conv,)  # a reference, no submodule
        conv.looks = False

    def forward(self, x: Tensor) -> Tensor:
        self.controller.decide(x, self._conv[0].chosen() if x.shape[0] == 1 else None)
        return self.pooling(x)


def fold(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight (N, C, kh, kw) and bias (N,) of a convolution and the batch norm behind it, if any, in eval mode."""
    if norm is None:
        bias = conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias
        return conv.weight.detach().contiguous(), bias.detach()
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, folded = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    return weight.detach().contiguous(), folded.detach()


def dynamic_copy(module: nn.Module, example_input: Any) -> nn.Module:
    """A copy that skips what an image does not select, for inference with one image at a time.

    It computes what the gated network does in eval mode, to rounding; several images at once are computed densely and
    masked. It stays on the CPU, in float32, and must not be used by two threads at once. Convolutions that cannot skip
    (one or three dimensions, groups, a norm that cannot be folded) keep their gates.

    Args:
        module: a network or LightningModule with gates.
        example_input: an input of its forward, or its shape.

    Raises:
        ValueError: the module has no gates.

    Example::

        fast = dynamic_copy(module, torch.zeros(1, 3, 32, 32))
        with torch.inference_mode():
            logits = fast(image)
    """
    clone = inference_copy(module).cpu().float().requires_grad_(False)
    gates = gates_of(clone)
    if not gates:
        raise ValueError(f"dynamic_copy: {type(module).__name__} has no gates; ArchitectureDecoupling attaches them.")
    with silenced(clone):
        structure = trace_units(clone, example_input)
    able = [name for name in structure.layers if _can_skip(clone, structure, name)]
    controllers = {name: Controller(gate) for name, gate in gates.items() if name in able}
    reads, packed = structure.reads(controllers, packing=able)
    detach_gates(clone, list(controllers))
    made = {}
    for name in able:
        inputs = [(controllers[layer] if layer in packed else None, n) for layer, n in reads.get(name, ())]
        norm = structure.folds.get(name)
        made[name] = DynamicConv(
            clone.get_submodule(name),  # type: ignore[arg-type]
            clone.get_submodule(norm) if norm else None,
            controllers.get(name),
            inputs if any(controller for controller, _ in inputs) else (),
            name in packed,
            math.prod(structure.layers[name].shape[2:]) <= FEW,
        )
    for name, conv in made.items():
        if name in controllers and structure.units[name].source != name:
            source = structure.units[name].source
            _replace(clone, source, Before(clone.get_submodule(source), conv, controllers[name]))
        _replace(clone, name, conv)
        if name in structure.folds:
            _replace(clone, structure.folds[name], nn.Identity())
    for parent in list(clone.modules()):
        if not isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            _call_plainly(parent)
    return clone


def _call_plainly(parent: nn.Module) -> None:
    """Make functions of children that do next to nothing: to call a module takes longer."""
    for name, child in list(parent.named_children()):
        if type(child) in (nn.Identity, nn.ReLU) and not child._forward_hooks and not child._forward_pre_hooks:
            delattr(parent, name)
            setattr(parent, name, _same if type(child) is nn.Identity else torch.relu)


def _same(x: Tensor) -> Tensor:
    return x


def _can_skip(clone: nn.Module, structure: Structure, name: str) -> bool:
    conv: Any = clone.get_submodule(name)
    norm: Any = clone.get_submodule(structure.folds[name]) if name in structure.folds else None
    plain = norm is None or (type(norm) is nn.BatchNorm2d and norm.track_running_stats and norm.affine)
    once = name in structure.units or structure.left_alone.get(name, "").startswith("writes")
    return type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == "zeros" and plain and once


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)
