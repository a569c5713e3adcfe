"""Build a network by name, here, in torchvision or in timm, and load weights into it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_compress.core.select import did_you_mean
from lightning_compress.core.weights import load_weights as load_weights
from lightning_compress.networks.binary_resnet import (
    binary_resnet18,
    binary_resnet18_cifar,
    binary_resnet20,
    binary_resnet34,
)
from lightning_compress.networks.cheap_resnet import cheap_resnet20, cheap_resnet56
from lightning_compress.networks.densenet_cifar import densenet40
from lightning_compress.networks.edsr import edsr_baseline, edsr_large
from lightning_compress.networks.googlenet_cifar import googlenet_cifar
from lightning_compress.networks.lenet import lenet5
from lightning_compress.networks.mobilenet_v2_cifar import mobilenet_v2_cifar, mobilenet_v2_half
from lightning_compress.networks.rdn import rdn_a, rdn_b
from lightning_compress.networks.reid_resnet import reid_resnet50, reid_small
from lightning_compress.networks.resnet50_cifar import resnet50_cifar
from lightning_compress.networks.resnet_cifar import (
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from lightning_compress.networks.shufflenet_cifar import shufflenet_v1, shufflenet_v2
from lightning_compress.networks.vgg_cifar import vgg8_cifar, vgg13_cifar, vgg16_cifar, vgg19_cifar
from lightning_compress.networks.vgg_small import vgg_small
from lightning_compress.networks.wide_resnet import wide_resnet16_2, wide_resnet40_1, wide_resnet40_2

OWN: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (
        resnet20,
        resnet32,
        resnet44,
        resnet56,
        resnet110,
        resnet8x4,
        resnet32x4,
        resnet50_cifar,
        wide_resnet16_2,
        wide_resnet40_1,
        wide_resnet40_2,
        vgg8_cifar,
        vgg13_cifar,
        vgg16_cifar,
        vgg19_cifar,
        densenet40,
        googlenet_cifar,
        cheap_resnet20,
        cheap_resnet56,
        mobilenet_v2_cifar,
        mobilenet_v2_half,
        shufflenet_v1,
        shufflenet_v2,
        lenet5,
        binary_resnet20,
        binary_resnet18_cifar,
        binary_resnet18,
        binary_resnet34,
        vgg_small,
    )
}
# These enlarge images: they take `scale` instead of classes.
SUPER_RESOLUTION: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function for function in (edsr_baseline, edsr_large, rdn_a, rdn_b)
}
# These have no classifier: images to feature maps.
TRUNKS: dict[str, Callable[..., nn.Module]] = {function.__name__: function for function in (reid_resnet50, reid_small)}


def build(name: str, **kwargs) -> nn.Module:
    """Build a network from its name.

    Args:
        name: one of this package (``"resnet56"``, ``"vgg16_cifar"``, ...), or ``"torchvision/<name>"`` or
            ``"timm/<name>"``. A bare name that is not of this package is looked up in torchvision.
        kwargs: passed on to the builder, e.g. ``num_classes``, or ``scale`` of a super-resolution network.
            Nothing is downloaded unless they ask for it.

    Returns:
        The network, in train mode, with fresh weights.

    Raises:
        ValueError: if there is no network of that name; the nearest names are given.

    Example:
        >>> build("resnet20", num_classes=100).linear
        Linear(in_features=64, out_features=100, bias=True)
        >>> build("timm/deit_small_patch16_224").num_features
        384
    """
    library, _, bare = name.rpartition("/")
    if library not in ("", "torchvision", "timm"):
        raise ValueError(f"name must be '<name>', 'torchvision/<name>' or 'timm/<name>', got {name!r}.")
    shipped = {**OWN, **SUPER_RESOLUTION, **TRUNKS}
    if not library and name in shipped:
        return shipped[name](**kwargs)
    if library == "timm":
        import timm

        # timm names may carry a tag of pretrained weights after a dot.
        if not timm.is_model(bare):
            raise ValueError(f"timm has no network {bare!r}.{did_you_mean(bare, timm.list_models())}")
        return timm.create_model(bare, **kwargs)

    from torchvision import models

    if bare not in models.list_models():
        where = "torchvision has no" if library else "There is no"
        own = [] if library else list(shipped)
        raise ValueError(f"{where} network {bare!r}.{did_you_mean(bare, [*own, *models.list_models()])}")
    return models.get_model(bare, **kwargs)


def build_classifier(name: str, num_classes: int, channels: int, **kwargs) -> nn.Module:
    """Build a classifier of images with so many channels; own networks and timm's take the number.

    Args:
        name: as for :func:`build`.
        num_classes: outputs.
        channels: of the images.
        kwargs: for the builder.

    Raises:
        ValueError: there is no network of that name, or it is built for three channels; names `input_shape`.
    """
    argument = "in_channels" if name in OWN else "in_chans" if name.startswith("timm/") else None
    network = build(name, num_classes=num_classes, **({argument: channels} if argument else {}), **kwargs)
    if argument is None and channels != 3:
        raise ValueError(f"input_shape: {name!r} is built for 3 channels, got {channels}.")
    return network


def build_trunk(name: str) -> nn.Module:
    """Build a network from images of three channels to features: one of `TRUNKS`, or timm's without classifier.

    Args:
        name: as for :func:`build`.

    Raises:
        ValueError: there is none of that name; names `backbone`.
    """
    if name.startswith("timm/"):
        return build(name, num_classes=0)
    if name not in TRUNKS:
        hint = did_you_mean(name, TRUNKS)
        raise ValueError(f"backbone: expected {', '.join(map(repr, TRUNKS))} or 'timm/<name>', got {name!r}.{hint}")
    return TRUNKS[name]()
