"""What a student's network is called with, and what it makes of it, seen from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.distill.taps import CallTap, Point, logits_of
from lightning_compress.core.example_input import inputs_for
from lightning_compress.core.meta import evaluating
from lightning_compress.core.select import did_you_mean

CONNECTORS = "knowledge_distillation"  # where they are in the student's module


@dataclass
class Heard:
    """One call of the student's network."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    logits: Tensor | None
    features: dict[Point, Any]


class Student:
    """Listens to a module: to its network's calls, and at some points in it.

    Args:
        module: the LightningModule.
        network: name of the module that returns the logits; None: the LightningModule itself where it is called, else
            its largest child.
        points: where features are read; names are the LightningModule's.
        whole: listens while this is in train mode; the LightningModule itself, if None.

    Raises:
        ValueError: there is no such network.
    """

    def __init__(
        self, module: nn.Module, network: str | None, points: Sequence[Point], whole: nn.Module | None = None
    ) -> None:
        whole = whole or module
        self._networks = [CallTap(part, whole) for part in networks(module, network)]
        self._points = {point: CallTap(module.get_submodule(point.module), whole) for point in points}

    def listen(self) -> Heard | None:
        """The last call since this was asked; None if there was none.

        Raises:
            MisconfigurationException: the call did not come by one of the points.
        """
        calls = [call for tap in self._networks if (call := tap.take()) is not None]
        if not calls:
            return None
        (args, kwargs), output = next((c for c in calls if logits_of(c[1]) is not None), calls[0])
        features = {}
        for point, tap in self._points.items():
            seen = tap.take()
            if seen is None:
                raise MisconfigurationException(f"features: the student computes without its module {point.module!r}.")
            features[point] = feature(point.read(seen[0][0], seen[1]))
        return Heard(args, kwargs, output, logits_of(output), features)

    def remove(self) -> None:
        """Listen no more; a second call does nothing."""
        for tap in (*self._networks, *self._points.values()):
            tap.remove()


def rehearse(module: LightningModule, network: str | None, points: Sequence[Point], example_input: Any) -> Heard:
    """Listen to one call in eval mode, without gradients.

    Raises:
        MisconfigurationException: the module computes without the network, or without one of the points.
    """
    student = Student(module, network, points, whole=nn.Module())
    args, kwargs = inputs_for(module, example_input)
    callable_ = module if type(module).forward is not LightningModule.forward else networks(module, network)[-1]
    try:
        with isolate_rng(include_cuda=False), evaluating(module):
            callable_(*args, **kwargs)
        heard = student.listen()
    finally:
        student.remove()
    if heard is None:
        raise MisconfigurationException(
            f"network={network!r}: {type(module).__name__} computes without it. Name another module."
        )
    return heard


def networks(module: nn.Module, name: str | None) -> list[nn.Module]:
    """Modules whose call is looked for, the preferred first."""
    if name is not None:
        names = [n for n, _ in module.named_modules() if n]
        if name not in names:
            raise ValueError(f"network: {type(module).__name__} has no module {name!r}.{did_you_mean(name, names)}")
        return [module.get_submodule(name)]
    children = [child for key, child in module.named_children() if key != CONNECTORS]
    largest = max(children, key=lambda child: sum(p.numel() for p in child.parameters()), default=module)
    return [module, largest]


def feature(seen: Any) -> Any:
    """Blocks of transformers may return a tuple, whose first entry are the features."""
    return seen[0] if isinstance(seen, (tuple, list)) and seen else seen


def shapes(value: Any) -> str:
    """For messages: the shapes of the tensors in something."""
    found = [str(tuple(leaf.shape)) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return ", ".join(found) or type(value).__name__
