"""FilterSketch: build the filters of a narrower network from all filters of a trained one, without data.

Lin, Cao, Li, Ye, Tian, Liu, Tian, Ji, "Filter Sketch for Network Pruning", IEEE TNNLS 33(12), 2022,
arXiv:2001.08514. The sketch is made by Frequent Directions: Liberty, KDD 2013, arXiv:1206.0594.

    A in R^{n x d}   the n filters of a layer, flattened
    B in R^{l x d}   the l filters of the narrow layer, such that B^T B is close to A^T A:
                     ||A^T A - B^T B||_2 <= 2 ||A||_F^2 / l

In a chain conv1 -> conv2 -> ... every layer but the last is sketched along its filters, and every layer but the first
along its input channels; the last keeps its width. Producer and consumer are sketched apart, which breaks the pairing
of their channels: accuracy is near chance until the network has been fine-tuned.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import resnet

from lightning_compress.core.surgery import ChannelGraph
from lightning_compress.networks import resnet_cifar
from lightning_compress.networks.googlenet_cifar import Inception

# The authors' lists, as shares to remove (theirs state what stays). The list printed for ResNet-110 does not give the
# 92.84M MACs and 0.69M parameters reported for it; "published budget" is one that does.
PUBLISHED_LISTS: dict[str, dict[str, str]] = {
    "resnet56": {
        "11.43M": "[0.9]*27",
        "24.54M": "[0.8]*27",
        "35.61M": "[0.7]*27",
        "48.72M": "[0.6]*27",
        "63.78M": "[0.5]*27",
        "73.36M": "[0.4]*27",
        "87.31M": "[0.3]*27",
        "111.5M": "[0.1]*27",
        "32.47M": "[0.1]*3+[0.9]*20+[0.4]*4",
        "62.63M": "[0.3]*3+[0.6]*20+[0.1]*4",
    },
    "resnet110": {
        "published list": "[0.1]*3+[0.6]*24+[0.7]*24+[0.1]*3",
        "published budget": "[0.5]+[0.6]*18+[0.7]*31+[0.1]*4",
    },
    "googlenet_cifar": {"0.59B": "[0.75]*9"},
    "resnet50": {"0.93B": "[0.8]*16", "2.23B": "[0.4]*16", "2.64B": "[0.3]*16"},
}

# Kind of block -> the layers inside it that get narrower, all by the one number that a list has for the block.
NARROWED: dict[type[nn.Module], tuple[str, ...]] = {
    resnet_cifar.BasicBlock: ("conv1",),
    resnet.BasicBlock: ("conv1",),
    resnet.Bottleneck: ("conv1", "conv2"),
    Inception: ("branch3x3.reduce.conv", "branch5x5.reduce.conv", "branch5x5.mid.conv"),
}


def frequent_directions(A: Tensor, l: int, drop_tail: bool = True) -> Tensor:  # noqa: E741
    """Sketch the rows of a matrix: (n, d) -> (l, d) with nearly the same A^T A.

    The rows stream into a buffer of l. Whenever it is full, its squared singular values shrink by the middle one,
    which empties half of it. Nothing shrinks at the end, so the sketch may be a full buffer, or end in zeros.

    Args:
        A: the matrix, of any floating-point dtype; computed in float64.
        l: rows of the sketch, 1 to n. With l = n it is A itself; with l = 1 it is A's last row, a warning says so.
        drop_tail: stop when fewer than l // 2 rows are left, as the authors' code does; these rows are lost.

    Returns:
        The sketch, (l, d), in A's dtype. The signs of its rows mean nothing.

    Raises:
        ValueError: A is not a matrix, or l is out of range.

    >>> A = torch.tensor([[4.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 2]])
    >>> B = frequent_directions(A, 4)
    >>> (B.T @ B).diagonal()
    tensor([13.,  6.,  0.,  4.])
    """
    if A.dim() != 2:
        raise ValueError(f"A must be a matrix, got shape {tuple(A.shape)}.")
    if not 1 <= l <= len(A):
        raise ValueError(f"l must be between 1 and the {len(A)} rows of A, got {l}.")
    n, half = len(A), l // 2
    if half == 0 and n > 1:
        warnings.warn("A sketch of a single row is the last row of A and says nothing of the others.")
    rows = A.detach().double()
    buffer, i = rows[:l], l
    while i < n and not (drop_tail and n - i < half):
        # B = U diag(sigma) V^T, but from the eigenvectors U of the small B B^T: sigma' V^T = (sigma' / sigma) U^T B.
        energy, basis = torch.linalg.eigh(buffer @ buffer.T)
        energy, basis = energy.flip(0).clamp(min=0), basis.flip(1)[:, :half]
        left = (1 - energy[half] / energy[:half]).nan_to_num(0).clamp(min=0).sqrt()
        shrunk = left[:, None] * (basis.T @ buffer)
        fresh = rows[i : i + l - half]
        buffer = torch.cat([shrunk, fresh, rows.new_zeros(l - half - len(fresh), rows.shape[1])])
        i += len(fresh)
    return buffer.to(A.dtype)


def sketch_conv(
    weight: Tensor,
    l: int,  # noqa: E741
    dim: int,
    layout: Literal["flat", "permute"] = "flat",
    norm: Literal["l2"] | None = "l2",
) -> Tensor:
    """Sketch a layer's weight along its filters or its input channels.

    Args:
        weight: (n, c, kh, kw) of a convolution, or (n, c) of a linear layer.
        l: the number of filters, or channels, of the result.
        dim: 0 for filters, (n, c, ...) -> (l, c, ...); 1 for input channels, -> (n, l, ...).
        layout: what the rows are along dim 1. ``"permute"``: the input channels. ``"flat"``: the same memory cut into
            c pieces with no regard to where a channel is, as the authors' code does; the published numbers are
            of this. Along dim 0 it makes no difference.
        norm: ``"l2"`` divides the result by its Frobenius norm; the batch norm behind the layer takes the scale away.

    Raises:
        ValueError: an argument is none of the above.

    >>> [tuple(sketch_conv(torch.randn(8, 6, 3, 3), 4, dim).shape) for dim in (0, 1)]
    [(4, 6, 3, 3), (8, 4, 3, 3)]
    """
    if dim not in (0, 1) or weight.dim() < 2:
        raise ValueError(f"dim must be 0 or 1 of a weight (n, c, ...), got dim={dim} for {tuple(weight.shape)}.")
    if layout not in ("flat", "permute"):
        raise ValueError(f"layout must be 'flat' or 'permute', got {layout!r}.")
    if norm not in ("l2", None):
        raise ValueError(f"norm must be 'l2' or None, got {norm!r}.")
    n, c, *kernel = weight.shape
    if dim == 0:
        sketch = frequent_directions(weight.reshape(n, -1), l).view(l, c, *kernel)
    elif layout == "flat":
        sketch = frequent_directions(weight.reshape(c, -1), l).view(n, l, *kernel)
    else:
        sketch = frequent_directions(weight.transpose(0, 1).reshape(c, -1), l).view(l, n, *kernel).transpose(0, 1)
    if norm == "l2":
        sketch = sketch / sketch.norm().clamp(min=torch.finfo(sketch.dtype).tiny)
    return sketch.contiguous()


def sketch_width(width: int, pruning_ratio: float) -> int:
    """Filters of a sketched layer: floor((1 - p) * n + 1e-9), at least one.

    >>> [sketch_width(n, 0.9) for n in (16, 32, 64)]
    [1, 3, 6]
    """
    return max(1, math.floor((1 - pruning_ratio) * width + 1e-9))


def chains(graph: ChannelGraph) -> dict[str, str]:
    """Layers that only one other layer reads, directly or through norms and activations -> that layer.

    These are the inner layers of residual blocks, of the branches of an inception, of a VGG or a transformer's MLP. Not
    among them: layers whose channels are added, concatenated, split, or flattened with their pixels.
    """
    found = {}
    for group in graph.groups:
        name, *coupled = group.layers
        units = graph.layers[name]
        touched = {axis for axis, other in graph.axes.items() if np.isin(other, units).any()}
        # Biases and norms have one dimension and follow by themselves.
        readers = [(tensor, dim) for tensor, dim in touched if dim or (tensor, 1) in graph.axes]
        readers = [axis for axis in readers if axis != (f"{name}.weight", 0)]
        if not coupled and len(readers) == 1 and (f"{name}.weight", 0) in touched:
            tensor, dim = readers[0]
            if dim == 1 and tensor.endswith(".weight") and np.array_equal(graph.axes[tensor, dim], units):
                found[name] = tensor.removesuffix(".weight")
    return found


def block_layers(network: nn.Module) -> list[tuple[str, ...]]:
    """The layers that each number of the authors' lists narrows, block by block; empty for networks without such blocks.

    >>> block_layers(resnet.resnet50())[1]
    ('layer1.1.conv1', 'layer1.1.conv2')
    """
    return [
        tuple(f"{name}.{layer}" for layer in layers)
        for name, module in network.named_modules()
        for kind, layers in NARROWED.items()
        if isinstance(module, kind)
    ]


def block_ratios(network: nn.Module, ratios: Sequence[float], start_conv: int = 1) -> dict[str, float]:
    """The pruning ratio of every layer, from a list with one number per block.

    Args:
        network: a network of residual or inception blocks.
        ratios: the list; it begins with the block number ``start_conv``, counted from 1, and blocks before stay whole.

    Raises:
        ValueError: the list does not end with the last block.

    >>> block_ratios(resnet_cifar.resnet20(), [0.5] * 8, start_conv=2)["layer1.1.conv1"]
    0.5
    """
    blocks = block_layers(network)
    if not 1 <= start_conv <= len(blocks):
        raise ValueError(f"start_conv must be between 1 and the number of blocks, {len(blocks)}; got {start_conv}.")
    blocks = blocks[start_conv - 1 :]
    if len(ratios) != len(blocks):
        raise ValueError(
            f"pruning_ratio has {len(ratios)} numbers, but there are {len(blocks)} blocks from start_conv={start_conv} "
            f"on, of which the first narrows {', '.join(blocks[0])}."
        )
    return {name: ratio for block, ratio in zip(blocks, ratios, strict=True) for name in block}


def sketch_weights(
    weights: Mapping[str, Tensor],
    consumers: Mapping[str, str],
    widths: Mapping[str, int],
    layout: Literal["flat", "permute"] = "flat",
    norm: Literal["l2"] | None = "l2",
) -> dict[str, Tensor]:
    """Sketch the layers of `widths` along their filters, and those that read them along their input channels.

    Args:
        weights: layer -> weight.
        consumers: layer -> the layer that reads it, see `chains`.
        widths: layer -> new number of filters.

    Returns:
        Layer -> new weight, for every layer that changed.
    """
    sketched = {name: sketch_conv(weights[name], width, 0, layout, norm) for name, width in widths.items()}
    for name, width in widths.items():
        reader = consumers[name]
        sketched[reader] = sketch_conv(sketched.get(reader, weights[reader]), width, 1, layout, norm)
    return sketched
