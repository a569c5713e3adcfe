"""HRankPlus lets every layer of a residual sum choose its own channels; this reproduces what its code adds up."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.core.surgery import ChannelGraph, ChannelPlan, keep_highest
from lightning_compress.core.surgery.compact import own_norm


def unaligned_values(
    network: nn.Module, graph: ChannelGraph, plan: ChannelPlan, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values of the narrow tensors when each layer keeps its own highest scores instead of a shared choice.

    A layer that reads the sum takes the channels that the last layer before it wrote; between two choices of one
    width, channels are paired by position.

    Args:
        network: the dense network, its layers named as in `graph`.
        plan: the aligned plan; it fixes all widths.
        scores: layer -> score of every channel (C_out,).

    Returns:
        Tensor name -> value, for the weights and norms of layers in residual sums and of those that read them.
    """
    shared = [g for g in graph.groups if len(g.layers) > 1 and any(n in plan.kept for n in g.layers)]
    own = {n: keep_highest(scores[n], len(plan.kept[n])) for g in shared for n in g.layers if n in scores}
    aligned = {(cut.tensor, cut.dim): cut.kept for cut in plan.cuts(graph)}
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    values: dict[str, Tensor] = {}

    def slices(name: str, **chosen: Tensor) -> None:
        value = tensors[name].detach()
        for dim in range(value.ndim):
            kept = chosen.get(f"d{dim}", aligned.get((name, dim)))
            if kept is not None:
                value = value.index_select(dim, kept.to(value.device))
        values[name] = value

    for position, layer in enumerate(graph.order):
        inputs = graph.axes.get((f"{layer}.weight", 1))
        writers = [
            w for g in shared for w in g.layers
            if inputs is not None and w in own and np.array_equal(graph.axes[f"{w}.weight", 0], inputs)
        ]  # fmt: skip
        before = [w for w in writers if graph.order.index(w) < position]
        chosen = {"d0": own[layer]} if layer in own else {}
        if before:
            chosen["d1"] = own[max(before, key=graph.order.index)]
        if chosen:
            slices(f"{layer}.weight", **chosen)
        if layer in own:
            norm = own_norm(network, graph, layer)
            for name in [
                f"{layer}.bias",
                *(f"{norm}.{k}" for k in ("weight", "bias", "running_mean", "running_var")),
            ]:
                if name in tensors:
                    slices(name, d0=own[layer])
    for name, tensor in tensors.items():  # parameter-free shortcuts pad in the middle, whatever was kept
        if name.endswith("shortcut.select") and ((name, 0) in aligned or (name, 1) in aligned):
            rows, columns = (len(aligned.get((name, d), range(tensor.shape[d]))) for d in (0, 1))
            offset = (rows - columns) // 2
            values[name] = torch.arange(rows)[:, None] - torch.arange(columns) == offset
    return values
