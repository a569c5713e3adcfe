"""Masks that learn: parametrisations of a layer's weight, from the first step to the last.

What needs a gradient must be in the forward pass. As a ``torch.nn.utils.parametrize`` parametrisation it leaves the
layer what it is (a `Conv2d` stays one) and stacks with others: masks come first, whatever quantises weights after them.
"""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from lightning_compress.core.parametrisation import parametrise

Mask = TypeVar("Mask", bound=nn.Module)


def insert_mask(layer: nn.Module, mask: nn.Module) -> None:
    """Pass ``layer.weight`` through ``mask``, before whatever else it passes through.

    Raises:
        MisconfigurationException: the weight is put together from several tensors, as by ``weight_norm``.
    """
    if parametrize.is_parametrized(layer, "weight") and not hasattr(layer.parametrizations["weight"], "original"):  # type: ignore[index]
        raise MisconfigurationException(
            f"{type(mask).__name__} masks one tensor, but the weight of this layer is put together from several, as by "
            f"weight_norm; fold them with torch.nn.utils.parametrize.remove_parametrizations first."
        )
    parametrise(layer, "weight", mask)
    stack: Any = layer.parametrizations["weight"]  # type: ignore[index]
    stack.insert(0, stack.pop(len(stack) - 1))


def remove_mask(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Take the mask of a class off ``layer.weight``, which has all its values again; other parametrisations stay."""
    stack: Any = layer.parametrizations["weight"]  # type: ignore[index]
    del stack[[isinstance(p, kind) for p in stack].index(True)]
    if len(stack):
        return
    # Not by torch's `remove_parametrizations`: it takes the property off the class, which copies of the layer share.
    original = stack.original
    others: Any = layer.parametrizations
    if len(others) > 1:
        layer.parametrizations["weight"].append(nn.Identity())  # type: ignore[index, union-attr]
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        return
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    behind = dict(layer._parameters)
    layer._parameters.clear()
    layer.register_parameter("weight", original)  # first, as layers make it: optimisers count parameters in order
    layer._parameters.update(behind)


def masks_in(module: nn.Module, kind: type[Mask]) -> dict[str, Mask]:
    """All masks of a class: layer name -> mask."""
    found = {}
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            for mask in layer.parametrizations["weight"]:
                if isinstance(mask, kind):
                    found[name] = mask
    return found


def weight_name(layer: nn.Module, name: str) -> str:
    """The name of the parameter that is trained: ``<name>.weight``, or what is below its parametrisations."""
    below = parametrize.is_parametrized(layer, "weight")
    return f"{name}.parametrizations.weight.original" if below else f"{name}.weight"


def keep_off_the_wire(module: nn.Module, names: list[str]) -> None:
    """Keep buffers out of DDP's broadcast before every forward pass; they must be equal on all ranks by themselves.

    For `setup`, before DDP wraps the module. Masks take as many bytes as there are weights.
    """
    ignored = list(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
    new = [name for name in names if name not in ignored]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*ignored, *new])
