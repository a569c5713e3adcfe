"""Which batch norm takes up what stands behind a layer: its scale, its bias."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_compress.core.example_input import inputs_for
from lightning_compress.core.inference_copy import inference_copy


def norms_behind(module: nn.Module, layers: Sequence[str], example_input: Any) -> dict[str, str]:
    """The batch norms that read the output of a layer, and are all that reads it: layer name -> norm name.

    Found by one forward pass of a copy in eval mode. A layer that is called several times has none.

    Args:
        module: the network.
        layers: names of layers.
        example_input: a tensor, a shape, a tuple of arguments or a dict of keyword arguments.
    """
    clone = inference_copy(module)
    args, kwargs = inputs_for(clone, example_input)
    readers = _Readers()
    with ExitStack() as stack:
        for name in layers:
            hook = partial(readers.made, name)
            stack.callback(clone.get_submodule(name).register_forward_hook(hook).remove)
        for name, norm in clone.named_modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
                stack.callback(norm.register_forward_pre_hook(partial(readers.normed, name)).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(readers)
        output = clone(*args, **kwargs)
    returned = {id(leaf) for leaf in tree_leaves(output)}
    return {
        name: readers.norms[key]
        for key, name in readers.names.items()
        if key in readers.norms
        and key not in returned
        and readers.count[key] == 1
        and list(readers.names.values()).count(name) == 1
        and list(readers.norms.values()).count(readers.norms[key]) == 1
    }


class _Readers(TorchDispatchMode):
    """Counts the operators that read the outputs of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}  # id of an output -> layer
        self.norms: dict[int, str] = {}  # id of an output -> the norm that is given it
        self.count: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no id is used twice

    def made(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.names[id(output)] = name
        self.count[id(output)] = 0
        self._alive.append(output)

    def normed(self, name: str, norm: nn.Module, args: Any) -> None:
        if id(args[0]) in self.names:
            self.norms[id(args[0])] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.count:
                self.count[id(leaf)] += 1
        return func(*args, **(kwargs or {}))
