"""Read the feature maps of all layers in one pass through the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.callbacks.pruning.hrank.published import Tap

aten = torch.ops.aten
Receive = Callable[[str, Tensor], None]  # (layer, maps (N, C, H, W))

_NORMS = {aten.native_batch_norm, aten.cudnn_batch_norm, aten._native_batch_norm_legit, aten.native_group_norm,
          aten._native_batch_norm_legit_no_training, aten._batch_norm_with_update, aten.miopen_batch_norm,
          aten._batch_norm_no_update}  # fmt: skip
_SAME = {aten.clone, aten.detach, aten.alias, aten._to_copy, aten.contiguous, aten.native_dropout}
_ACTIVATIONS = {aten.relu, aten.relu_, aten.gelu, aten.silu, aten.silu_, aten.hardtanh, aten.hardtanh_,
                aten.hardswish, aten.hardswish_, aten.leaky_relu, aten.leaky_relu_, aten.elu, aten.elu_, aten.mish,
                aten.mish_, aten.sigmoid, aten.tanh, aten.hardsigmoid, aten._prelu_kernel}  # fmt: skip


@contextmanager
def feature_maps(network: nn.Module, layers: list[str], taps: Mapping[str, Tap], receive: Receive) -> Iterator[None]:
    """While active, every forward pass of `network` hands each layer's maps to `receive`.

    Layers with a tap are read there; the others where :class:`_Following` finds their activation.
    """
    modules = dict(network.named_modules())
    with ExitStack() as stack:
        for layer in layers:
            if layer in taps:
                handle = modules[taps[layer].module].register_forward_hook(_reader(layer, taps[layer], receive))
                stack.callback(handle.remove)
        others = [layer for layer in layers if layer not in taps]
        if others:
            following = _Following(receive)
            for layer in others:
                handle = modules[layer].register_forward_hook(following.begin(layer))
                stack.callback(handle.remove)
            stack.callback(network.register_forward_hook(following.end).remove)
            stack.enter_context(following)
        yield


def _reader(layer: str, tap: Tap, receive: Receive) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        maps = out[:, tap.channels]
        receive(layer, maps.relu() if tap.relu else maps)

    return hook


class _Following(TorchDispatchMode):
    """Follow the output of each convolution to the map that a reader of the paper would call its feature map.

    That is the output of the activation behind it: through its batch norm, through an addition (several layers may
    meet there and share the map), through a concatenation (a layer keeps its own slice of channels). Functional and
    shared activations are found like modules. Where something else comes first, the map is what comes before it.
    """

    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self.receive = receive
        self.waiting: dict[int, tuple[Tensor, list[tuple[str, int, int]]]] = {}

    def begin(self, layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            self._wait(out, [(layer, 0, out.shape[1])])

        return hook

    def end(self, network: nn.Module, args: Any, out: Any) -> None:
        for tensor, _ in list(self.waiting.values()):
            self._resolve(tensor, tensor)
        self.waiting.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket
        inputs = [t for t in _flat(args) if id(t) in self.waiting]
        if not inputs:
            return func(*args, **(kwargs or {}))
        passes = name in _NORMS or name in _SAME or name in (aten.add, aten.add_, aten.cat) or name in _ACTIVATIONS
        if not passes:
            for tensor in inputs:
                self._resolve(tensor, tensor)
        out = func(*args, **(kwargs or {}))
        if name in _ACTIVATIONS:
            for tensor in inputs:
                self._resolve(tensor, out)
        elif name is aten.cat:
            self._concatenate(out, args)
        elif passes:
            entries = [e for t in inputs for e in self.waiting.pop(id(t))[1]]
            self._wait(out[0] if isinstance(out, (tuple, list)) else out, entries)
        return out

    def _concatenate(self, out: Tensor, args: Any) -> None:
        dim, start, entries = (args[1] if len(args) > 1 else 0), 0, []
        for tensor in args[0]:
            for layer, a, b in self.waiting.pop(id(tensor), (tensor, []))[1]:
                if dim % out.ndim == 1:
                    entries.append((layer, a + start, b + start))
                else:
                    self.receive(layer, tensor[:, a:b])
            start += tensor.shape[dim]
        self._wait(out, entries)

    def _wait(self, tensor: Tensor, entries: list[tuple[str, int, int]]) -> None:
        if entries:
            known = self.waiting.get(id(tensor), (tensor, []))[1]
            self.waiting[id(tensor)] = (tensor, known + entries)

    def _resolve(self, tensor: Tensor, maps: Tensor) -> None:
        for layer, start, stop in self.waiting.pop(id(tensor))[1]:
            self.receive(layer, maps[:, start:stop])


def _flat(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _flat(arg)
