"""Follow every channel of a network through one forward pass.

Each index of each dimension of each parameter gets a number, its *channel id*. While the network runs once on
meta tensors, every operator passes ids on and notes which must live and die together:

    conv    input channel c  =  weight[:, c]        output channel o  =  weight[o] = bias[o]
    add       left channel c   =  right channel c     cat               ids side by side

The pairs noted are edges of a graph; its connected components (see `graph.py`) are the units that can be removed.
An operator not known, or one that fixes a size in code, *freezes* the ids it reads and says why. Nothing here
looks at module types, except for attention, whose heads are cut whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.core.surgery import shapes  # noqa: F401  registers its rules
from lightning_compress.core.surgery.attention import ModuleRule, module_rule
from lightning_compress.core.surgery.operators import pointwise, run_fast
from lightning_compress.core.surgery.rules import RULES, Ids, along, tensors_in

PRODUCERS = (nn.modules.conv._ConvNd, nn.Linear)


class ChannelTrace(TorchDispatchMode):
    """Records channel ids while active. `tensors` are the named parameters and buffers of the network.

    Attributes:
        axes: (tensor name, dim) -> ids of that dimension, for every dimension longer than 1.
        edges: pairs of id arrays that are one channel, element by element.
        frozen: (ids, reason) that must stay.
        producers: names of conv and linear modules in the order in which they ran.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.count = 0
        self.axes: dict[tuple[str, int], Ids] = {}
        self.edges: list[tuple[Ids, Ids]] = []
        self.frozen: list[tuple[Ids, str]] = []
        self.producers: list[str] = []
        self.where = ""  # the innermost module that is running
        self.opaque = 0  # > 0 inside a module that has a rule of its own
        self._ids: dict[int, list[Ids]] = {}
        self._alive: list[Tensor] = []  # ids are kept by id(tensor), so no tensor may die
        for name, tensor in tensors.items():
            arrays = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    self.axes[name, dim] = ids = self.new(size)
                    arrays.append(along(ids, dim, tensor.ndim))
            self.put(tensor, arrays)

    # ---- what rules are written with

    def new(self, size: int) -> Ids:
        """`size` fresh ids."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def get(self, tensor: Any) -> list[Ids]:
        """All id arrays of a tensor."""
        return self._ids.get(id(tensor), []) if isinstance(tensor, Tensor) else []

    def put(self, tensor: Tensor, arrays: Sequence[Ids]) -> None:
        """Give a tensor its id arrays; one that holds a single id says nothing and is dropped."""
        self._alive.append(tensor)
        self._ids[id(tensor)] = [a for a in arrays if a.size > 1]

    def axis(self, tensor: Any, dim: int) -> Ids | None:
        """Ids along one dim, None where it has none. Ids that run along several dims at once are frozen."""
        if not isinstance(tensor, Tensor):
            return None
        dim %= tensor.ndim
        found = None
        for array in self.get(tensor):
            if array.shape[dim] > 1:
                if array.size == array.shape[dim]:
                    found = array.reshape(-1)
                else:
                    self.freeze(array, "its channels are spread over several dimensions")
        return found

    def tie(self, left: Ids | None, right: Ids | None) -> None:
        """Left and right are the same channels; if one side is not tracked its size is fixed."""
        if left is not None and right is not None:
            if left.size > 1 and right.size > 1:
                self.edges.append(tuple(np.broadcast_arrays(left, right)))  # type: ignore[arg-type]
        elif left is not None or right is not None:
            self.freeze(left if left is not None else right, "meets a tensor of fixed size")

    def freeze(self, ids: Ids | None, reason: str) -> None:
        """These ids must stay."""
        if ids is not None and ids.size:
            self.frozen.append((ids.reshape(-1), f"{reason} (in {self.where or 'the network'})"))

    def freeze_tensor(self, tensor: Any, reason: str) -> None:
        for array in self.get(tensor):
            self.freeze(array, reason)

    # ---- the mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run_fast(func, args, kwargs or {})
        if self.opaque:
            return out
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            rule(self, out, *args, **(kwargs or {}))
        elif torch.Tag.pointwise in func.tags:
            pointwise(self, out, *args, **(kwargs or {}))
        else:
            for tensor in tensors_in((args, kwargs)):
                self.freeze_tensor(tensor, f"goes through {func.overloadpacket.__name__}, which is not known")
        return out

    @contextmanager
    def follow(self, network: nn.Module) -> Iterator[None]:
        """Note which module is running, and let modules with a rule speak for their inside."""
        handles: list[Any] = []
        stack: list[str] = []

        def enter(name: str, rule: ModuleRule | None) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                stack.append(name)
                self.where = name
                if isinstance(module, PRODUCERS) and name not in self.producers:
                    self.producers.append(name)
                self.opaque += rule is not None

            return hook

        def leave(rule: ModuleRule | None) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                if rule is not None:
                    self.opaque -= 1
                    if not self.opaque:
                        rule(self, module, args, out)
                stack.pop()
                self.where = stack[-1] if stack else ""

            return hook

        try:
            for name, module in network.named_modules():
                rule = module_rule(module)
                handles.append(module.register_forward_pre_hook(enter(name, rule), prepend=True))
                handles.append(module.register_forward_hook(leave(rule), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
