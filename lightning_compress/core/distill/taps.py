"""Features on their way through a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


class InputTap:
    """Keeps what a module was last called with while gradients are recorded, until it is taken.

    Put it on after `setup`, where others copy the module, and take it off in `teardown`.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> tap = InputTap(layer)
    >>> y = layer(torch.ones(1, 2))
    >>> tap.take()
    ((tensor([[1., 1.]]),), {})
    >>> tap.take() is None
    True
    """

    def __init__(self, module: nn.Module) -> None:
        self._call: Call | None = None
        self._handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def take(self) -> Call | None:
        """The arguments of the last call, ``(args, kwargs)``; None if there was none since they were taken."""
        call, self._call = self._call, None
        return call

    def remove(self) -> None:
        """Keep nothing any more; a second call does nothing."""
        self._handle.remove()
        self._call = None

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # not by its mode: a trained network may have been left in eval
            self._call = args, kwargs


def input_at(network: nn.Module, layer: str, *args: Any, **kwargs: Any) -> Tensor:
    """Call a network up to one of its layers, and return what this one gets; the layers behind it are not computed.

    Args:
        layer: name of a submodule; its first positional argument is returned.

    Raises:
        LookupError: the network does not reach the layer.
    """

    def stop(module: nn.Module, given: tuple[Any, ...]) -> None:
        raise _Reached(given[0])

    handle = network.get_submodule(layer).register_forward_pre_hook(stop)
    try:
        network(*args, **kwargs)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise LookupError(f"{type(network).__name__} computes without its layer {layer!r}.")


class Point(NamedTuple):
    """A place in a network where features are read: what a module returns, or its first argument."""

    module: str
    input: bool = False

    def __str__(self) -> str:
        return f"the input of {self.module!r}" if self.input else repr(self.module)

    def read(self, args: Sequence[Any], output: Any) -> Any:
        return args[0] if self.input and args else output


class CallTap:
    """Keeps arguments and output of a module's last call in a training step, until they are taken.

    Unlike :class:`InputTap` it asks for the mode of the whole: a part may be frozen in eval mode.

    Args:
        module: the part.
        whole: the network that is trained.

    >>> import torch
    >>> layer = nn.Linear(2, 3).eval()
    >>> tap = CallTap(layer, nn.Sequential(layer).train())
    >>> y = layer(torch.ones(1, 2))
    >>> (args, kwargs), output = tap.take()
    >>> output is y, tap.take() is None
    (True, True)
    """

    def __init__(self, module: nn.Module, whole: nn.Module) -> None:
        self._seen: tuple[Call, Any] | None = None
        self._whole = whole
        self._handle = module.register_forward_hook(self._keep, with_kwargs=True)

    def take(self) -> tuple[Call, Any] | None:
        """((args, kwargs), output) of the last call; None if there was none since they were taken."""
        seen, self._seen = self._seen, None
        return seen

    def remove(self) -> None:
        """Keep nothing any more; a second call does nothing."""
        self._handle.remove()
        self._seen = None

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._whole.training:
            self._seen = (args, kwargs), output


def observe(network: nn.Module, points: Sequence[Point], *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    """Call a network, and read features on the way.

    Returns:
        Its output, and what is at the points (of several calls of one module, the last).

    Raises:
        LookupError: the network computes without one of the modules.
    """
    with reading(network, points) as read:
        output = network(*args, **kwargs)
    for point in points:
        if point not in read:
            raise LookupError(f"{type(network).__name__} computes without its module {point.module!r}.")
    return output, [read[point] for point in points]


@contextmanager
def reading(network: nn.Module, points: Sequence[Point]) -> Iterator[dict[Point, Any]]:
    """Fill a dict with what is at the points of a network while others call it."""
    read: dict[Point, Any] = {}

    def reader(point: Point) -> Any:
        return lambda module, given, output: read.__setitem__(point, point.read(given, output))

    handles = [network.get_submodule(p.module).register_forward_hook(reader(p)) for p in points]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def logits_of(output: Any) -> Tensor | None:
    """The logits (B, K) in what a classifier returns: a tensor, something with `logits`, or the first of several.

    >>> import torch
    >>> logits_of({"logits": torch.zeros(2, 3)}).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output[0] if isinstance(output, Sequence) and output else None)
    return output if isinstance(output, Tensor) and output.ndim == 2 else None


class _Reached(Exception):
    """Carries the input of a layer out of the network."""
