"""Build a network by name, here, in torchvision or in timm, and load weights into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.core.select import did_you_mean
from lightning_compress.networks.densenet_cifar import densenet40
from lightning_compress.networks.googlenet_cifar import googlenet_cifar
from lightning_compress.networks.lenet import lenet5
from lightning_compress.networks.mobilenet_v2_cifar import mobilenet_v2_cifar
from lightning_compress.networks.resnet_cifar import resnet20, resnet32, resnet44, resnet56, resnet110
from lightning_compress.networks.vgg_cifar import vgg16_cifar, vgg19_cifar

OWN: dict[str, Callable[..., nn.Module]] = {
    function.__name__: function
    for function in (
        resnet20,
        resnet32,
        resnet44,
        resnet56,
        resnet110,
        vgg16_cifar,
        vgg19_cifar,
        densenet40,
        googlenet_cifar,
        mobilenet_v2_cifar,
        lenet5,
    )
}
# What training wrappers put in front of every key: DataParallel and DDP, LightningModules, torch.compile.
WRAPPERS = ("module.", "net.", "network.", "model.", "_orig_mod.")


def build(name: str, **kwargs) -> nn.Module:
    """Build a network from its name.

    Args:
        name: one of this package (``"resnet56"``, ``"vgg16_cifar"``, ...), or ``"torchvision/<name>"`` or
            ``"timm/<name>"``. A bare name that is not of this package is looked up in torchvision.
        kwargs: passed on to the builder, e.g. ``num_classes``. Nothing is downloaded unless they ask for it.

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
    if not library and name in OWN:
        return OWN[name](**kwargs)
    if library == "timm":
        import timm

        # timm names may carry a tag of pretrained weights after a dot.
        if not timm.is_model(bare):
            raise ValueError(f"timm has no network {bare!r}.{did_you_mean(bare, timm.list_models())}")
        return timm.create_model(bare, **kwargs)

    from torchvision import models

    if bare not in models.list_models():
        where = "torchvision has no" if library else "There is no"
        own = [] if library else list(OWN)
        raise ValueError(f"{where} network {bare!r}.{did_you_mean(bare, [*own, *models.list_models()])}")
    return models.get_model(bare, **kwargs)


def load_weights(network: nn.Module, path: str | os.PathLike) -> None:
    """Copy the weights of a file into ``network``, all of them and nothing else.

    The file is what ``torch.save`` wrote: a state dict, or a checkpoint that has one under ``"state_dict"``.
    Prefixes that all keys share because the network was wrapped when saved (``module.``, ``network.``, ...)
    are stripped. Batch norm's ``num_batches_tracked``, which old files lack, may be absent.

    Args:
        network: receives the weights in place.
        path: the file.

    Raises:
        ValueError: if the file is absent, truncated or no state dict, or if its keys or shapes are not those
            of the network.
    """
    expected, state = network.state_dict(), _read(path)
    while (prefix := _wrapper(state)) and prefix != _wrapper(expected):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    problems, hint = [], ""
    if missing := [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]:
        problems.append(f"it lacks {_some(missing)}")
    if unexpected := [key for key in state if key not in expected]:
        problems.append(f"the network has no {_some(unexpected)}")
        hint = did_you_mean(unexpected[0], missing)
    if wrong := [key for key in expected if key in state and state[key].shape != expected[key].shape]:
        shapes = f"{tuple(state[wrong[0]].shape)} in the file, {tuple(expected[wrong[0]].shape)} in the network"
        problems.append(f"shapes differ for {_some(wrong)} ({wrong[0]}: {shapes})")
    if problems:
        what = f"path {os.fspath(path)!r} does not fit {type(network).__name__}"
        raise ValueError(f"{what}: {'; '.join(problems)}.{hint}")
    network.load_state_dict(state, strict=False)


def _read(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"path {os.fspath(path)!r} does not exist.") from None
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        reason = f"{type(error).__name__}: {str(error).split('. ')[0].splitlines()[0]}" if str(error) else "empty"
        raise ValueError(
            f"path {os.fspath(path)!r} is truncated or holds more than plain weights ({reason})."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"path {os.fspath(path)!r} holds no state dict, at its top or under 'state_dict'.")
    return dict(state)


def _wrapper(keys: Iterable[str]) -> str | None:
    """The prefix of a wrapper that all ``keys`` share, if any."""
    return next((prefix for prefix in WRAPPERS if all(key.startswith(prefix) for key in keys)), None)


def _some(keys: list[str], n: int = 3) -> str:
    return ", ".join(keys[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")
