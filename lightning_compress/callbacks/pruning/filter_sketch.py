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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchvision.models import resnet

from lightning_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lightning_compress.core.calibration import recalibrate_batch_norm
from lightning_compress.core.ratio import parse_ratio, ratio_by_layer
from lightning_compress.core.surgery import ChannelGraph, ChannelPlan, attach_record
from lightning_compress.core.surgery.compact import own_norm
from lightning_compress.networks import resnet_cifar
from lightning_compress.networks.googlenet_cifar import Inception

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
    """The layers that each number of the authors' lists narrows, block by block; empty where there are no such blocks.

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
        ratios: the list. It begins with block number ``start_conv``, counted from 1; blocks before it stay whole.

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


class FilterSketch(ChannelPruning):
    """Replace the filters inside every block by a sketch of all of them, without data, before a fit.

    Args:
        pruning_ratio: share of the filters that the sketch saves: a number, a dict by glob, or a list with one number
            per residual or inception block (the authors state what stays: sketch_rate = 1 - pruning_ratio).
        start_conv: number (from 1) of the first block that is narrowed, where a list begins.
        weight_norm_method: ``"l2"`` divides each sketched tensor by its Frobenius norm, as the authors' commands do.
        channel_layout: ``"flat"`` is the authors' code, ``"permute"`` what the mathematics means; see `sketch_conv`.
        bn: ``"reset"`` starts the norm behind a layer that lost filters afresh, and clears the biases of sketched
            layers; ``"copy_slice"`` keeps the first entries of both.
        recalibrate_bn: training batches to run after the cut to bring batch-norm statistics in line with the new
            weights; 0 as in the authors' code, where the first hundred training steps do it.

    `shared` are the arguments of :class:`~lightning_compress.callbacks.pruning.channel_pruning.ChannelPruning`.
    Layers inside blocks are narrowed, so that what blocks exchange keeps its width; in networks without blocks, every
    layer that only one other reads.

    With several processes the sketch is made on rank 0, in float64 on the CPU, and sent to the others.

    Example::

        from lightning_compress.callbacks import FilterSketch
        trainer = Trainer(callbacks=[FilterSketch(pruning_ratio=0.4)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/filter_sketch``.
    """

    def __init__(
        self,
        pruning_ratio: float | list[float] | dict[str, float] | str = 0.5,
        *,
        start_conv: int = 1,
        weight_norm_method: Literal["l2"] | None = "l2",
        channel_layout: Literal["flat", "permute"] = "flat",
        bn: Literal["reset", "copy_slice"] = "reset",
        recalibrate_bn: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(pruning_ratio, **shared)
        if weight_norm_method not in ("l2", None):
            raise ValueError(f"FilterSketch(weight_norm_method={weight_norm_method!r}): give 'l2' or None.")
        if channel_layout not in ("flat", "permute"):
            raise ValueError(f"FilterSketch(channel_layout={channel_layout!r}): give 'flat' or 'permute'.")
        if bn not in ("reset", "copy_slice"):
            raise ValueError(f"FilterSketch(bn={bn!r}): give 'reset' or 'copy_slice'.")
        if start_conv < 1 or recalibrate_bn < 0:
            raise ValueError(
                f"FilterSketch: start_conv={start_conv} must be >= 1, recalibrate_bn={recalibrate_bn} >= 0."
            )
        self.start_conv = start_conv
        self.weight_norm_method = weight_norm_method
        self.channel_layout = channel_layout
        self.bn = bn
        self.recalibrate_bn = recalibrate_bn

    def scores(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        """A sketch keeps no filter, so the plan just names the first ones."""
        return {name: -torch.arange(graph.width(name)) for name in self.prunable(pl_module, graph)}

    def prunable(self, pl_module: LightningModule, graph: ChannelGraph) -> list[str]:
        inner = chains(graph)
        blocks = block_layers(pl_module)
        chosen = {name for block in blocks[self.start_conv - 1 :] for name in block}
        found = [name for name in graph.layers if name in inner and (name in chosen or not blocks)]
        if not found:
            raise MisconfigurationException(
                f"FilterSketch finds no layer of {type(pl_module).__name__} that a single other layer reads. Channels "
                f"that are added, concatenated or flattened cannot be sketched; HRank and L1Norm can remove them."
            )
        return found

    def ratios(self, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, float]:
        ratio = self.pruning_ratio if isinstance(self.pruning_ratio, Mapping) else parse_ratio(self.pruning_ratio)
        if isinstance(ratio, list) and block_layers(pl_module):
            named = block_ratios(pl_module, ratio, self.start_conv)
            return {name: r for name, r in named.items() if name in graph.layers}
        return ratio_by_layer(ratio, self.prunable(pl_module, graph))

    def width(self, width: int, ratio: float) -> int:
        return sketch_width(width, ratio)

    def new_values(self, pl_module: LightningModule, graph: ChannelGraph, plan: ChannelPlan) -> dict[str, Tensor]:
        consumers = chains(graph)
        layers = {*plan.kept, *(consumers[name] for name in plan.kept)}
        parameters = dict(pl_module.named_parameters())
        weights = {name: parameters[f"{name}.weight"].detach().cpu() for name in layers}
        widths = {name: len(kept) for name, kept in plan.kept.items()}
        sketched = sketch_weights(weights, consumers, widths, self.channel_layout, self.weight_norm_method)
        values = {f"{name}.weight": value for name, value in sketched.items()}
        if self.bn == "reset":
            values |= self._fresh(pl_module, graph, widths, sketched)
        return values

    def _fresh(
        self,
        pl_module: LightningModule,
        graph: ChannelGraph,
        widths: Mapping[str, int],
        sketched: Iterable[str],
    ) -> dict[str, Tensor]:
        fresh = {f"{n}.bias": torch.tensor(0.0) for n in sketched if pl_module.get_submodule(n).bias is not None}
        for name in widths:
            norm = own_norm(pl_module, graph, name)
            if norm is not None:
                start = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
                fresh |= {f"{norm}.{key}": torch.tensor(value) for key, value in start.items()}
        return fresh

    def prune(self, trainer: Trainer, pl_module: LightningModule) -> ChannelPlan:
        plan = super().prune(trainer, pl_module)
        cut = {tensor for tensor, *_ in attach_record(pl_module).steps[-1]["cuts"]}
        for name, parameter in pl_module.named_parameters():
            for optimizer in trainer.optimizers:
                if name in cut:  # the moments are of filters that are no more
                    optimizer.state.pop(parameter, None)
        if self.recalibrate_bn:
            recalibrate_batch_norm(trainer, pl_module, self.recalibrate_bn)
        return plan
