"""Which feature maps are compared, and how they are read while a network computes."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_compress.core.distill.taps import Point, observe
from lightning_compress.core.meta import evaluating
from lightning_compress.core.select import match


class Seen(NamedTuple):
    """What a network made of a batch: logits (B, K), and its maps, shallow to deep."""

    logits: Tensor
    maps: list[Tensor]


def see(network: nn.Module, layers: list[str], images: Tensor) -> Seen:
    """Call a network and read what these layers return on the way."""
    return Seen(*observe(network, [Point(layer) for layer in layers], images))


def find_maps(
    network: nn.Module, layers: str | list[str], images: Tensor, num_classes: int
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Find the modules whose outputs are compared, and run the network once to see that they can be.

    Args:
        network: in whatever mode, which stays.
        layers: names or globs.
        images: an example input.
        num_classes: that the logits must have.

    Returns:
        Names in the order in which the network calls them, and the shape (C, h, w) of each output.

    Raises:
        ValueError: names match nothing, fewer than two modules, outputs that are no maps or change after they were
            seen, sizes that do not double; logits of other classes.
    """
    names = match([name for name, _ in network.named_modules() if name], layers, "feature_layers")
    versions: dict[str, int] = {}
    images = images.to(next(network.parameters(), images))  # on its device, in its precision

    def note(module: nn.Module, args: Any, output: Any, name: str) -> None:
        versions.pop(name, None)  # of several calls the last counts
        versions[name] = getattr(output, "_version", 0)

    handles = [network.get_submodule(name).register_forward_hook(partial(note, name=name)) for name in names]
    try:
        with evaluating(network):
            logits, seen = observe(network, [Point(name) for name in names], images)
    except LookupError as error:
        raise ValueError(f"feature_layers: {error}") from error
    except RuntimeError as error:
        what = f"{type(network).__name__} fails on an image of input_shape={tuple(images.shape[1:])}"
        raise ValueError(f"network: {what}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    maps = dict(zip(names, seen, strict=True))
    for name, value in maps.items():
        if not isinstance(value, Tensor) or value.ndim != 4:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"feature_layers: {name!r} returns no maps (B, C, h, w), but {got}.")
        if value._version != versions[name]:
            raise ValueError(
                f"feature_layers: what {name!r} returns is overwritten by a later module. Name that one instead, or "
                f"make it work out of place."
            )
    if not isinstance(logits, Tensor) or logits.shape[1:] != (num_classes,):
        got = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"network: it must return {num_classes} logits for an image (num_classes), got {got}.")
    order = list(versions)
    shapes = [tuple(maps[name].shape[1:]) for name in order]
    found = ", ".join(f"{name} {shape}" for name, shape in zip(order, shapes, strict=True))
    doubles = all(one[1:] == (2 * two[1], 2 * two[2]) for one, two in pairwise(shapes))
    if len(order) < 2 or not doubles:
        raise ValueError(f"feature_layers: need two or more maps, each twice as large as the next one; got {found}.")
    if shapes[-1][1] * shapes[-1][2] < 3:
        raise ValueError(f"feature_layers: the deepest map must have three places or more; got {found}.")
    return order, shapes
