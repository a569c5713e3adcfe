"""What makes the networks of a method that trains several of one architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

Factory = Callable[[], nn.Module]


def network_factory(network: str | Factory, num_classes: int, channels: int) -> Factory:
    """What makes one network after the other, each with weights of its own.

    Args:
        network: such a thing, or a name for `lightning_compress.networks.find.build_classifier`.
        num_classes: for a name.
        channels: of the images, for a name.

    Raises:
        ValueError: it is a network.
    """
    if isinstance(network, str):
        from lightning_compress.networks.find import build_classifier

        return partial(build_classifier, network, num_classes, channels)
    if isinstance(network, nn.Module) or not callable(network):
        raise ValueError(
            f"network: every student is to have weights of its own, so give what makes a {type(network).__name__}: a "
            f"name, a class, or a function without arguments; got the thing itself. In YAML, class_path of a class."
        )
    return network
