"""Try cuts on meta tensors before anything real is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.core.meta import dry_run
from lightning_compress.core.surgery.graph import ChannelGraph, Group
from lightning_compress.core.surgery.operators import run_fast
from lightning_compress.core.surgery.plan import ChannelPlan, Cut
from lightning_compress.core.surgery.shrink import Swap, apply_cuts, undo


def channel_graph(
    network: nn.Module, example_input: Any, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> ChannelGraph:
    """:meth:`ChannelGraph.trace`, and leave alone every group whose width the network fixes in code.

    Such sizes cannot be seen in one forward pass, so every group loses one unit and the network runs again.
    """
    graph = ChannelGraph.trace(network, example_input, include=include, exclude=exclude)
    if not graph.groups or _failure(network, _less(graph, graph.groups), example_input) is None:
        return graph
    fixed = [g for g in graph.groups if _failure(network, _less(graph, [g]), example_input) is not None]
    return graph.without(fixed, "has a width that the network fixes in code")


def check_cuts(network: nn.Module, cuts: Sequence[Cut], example_input: Any) -> None:
    """Raise before anything is changed when the narrowed network could not run.

    Raises:
        MisconfigurationException: names the layer that fails.
    """
    failure = _failure(network, cuts, example_input)
    if failure is not None:
        where, error = failure
        raise MisconfigurationException(
            f"The narrowed {type(network).__name__} would fail in layer {where!r}: {error}. Its width is fixed in "
            f"code; leave the layers around it out with `exclude`."
        ) from error


class _Fast(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_fast(func, args, kwargs or {})


def _less(graph: ChannelGraph, groups: Sequence[Group]) -> list[Cut]:
    """Cuts that take the last unit of every group."""
    kept = {}
    for group in groups:
        for name in group.layers:
            kept[name] = torch.from_numpy(np.flatnonzero(graph.layers[name] != group.units[-1]))
    return ChannelPlan({n: k for n, k in kept.items() if len(k)}).cuts(graph)


def _failure(network: nn.Module, cuts: Sequence[Cut], example_input: Any) -> tuple[str, Exception] | None:
    """Where and why the narrowed network fails: on meta tensors, and, as some operators need values, on real ones."""
    return _attempt(network, cuts, example_input, meta=True) and _attempt(network, cuts, example_input, meta=False)


def _attempt(network: nn.Module, cuts: Sequence[Cut], example_input: Any, meta: bool) -> tuple[str, Exception] | None:
    stack: list[str] = []
    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda m, a, o: stack.pop() and None))
    swaps: list[Swap] = []
    try:
        swaps = apply_cuts(network, cuts, pretend=meta)
        dry_run(network, example_input, lambda tensors: _Fast())
    except Exception as error:
        return (stack[-1] if stack else ""), error
    finally:
        undo(network, swaps)
        for handle in handles:
            handle.remove()
    return None
