"""Quantisers on a layer: one its weight passes through, one its input passes through. The layer stays what it is.

The weight's is the last of its parametrisations, so that masks act on real weights. The input's is a submodule, called
from a forward pre-hook that copies, pickles and exports keep. Attach them in functions marked `replayable`, so that a
checkpoint rebuilds them.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.core.parametrisation import parametrise
from lightning_compress.core.sparse.learnt_mask import remove_mask

INPUT = "input_quantizer"


def quantize_weight(layer: nn.Module, quantizer: nn.Module) -> None:
    """Pass ``layer.weight`` through a quantiser, after whatever else it passes through.

    Args:
        layer: a convolution or linear layer.
        quantizer: weight -> quantised weight, of one shape. It is found again by :func:`weight_quantizer`.

    Raises:
        MisconfigurationException: another quantiser is there.
    """
    _refuse_second(weight_quantizer(layer), quantizer, "weight")
    quantizer.quantizes_weight = True  # type: ignore[assignment]
    parametrise(layer, "weight", quantizer)


def quantize_input(layer: nn.Module, quantizer: nn.Module) -> None:
    """Pass the layer's first positional input through a quantiser, before the layer computes.

    Args:
        layer: a convolution or linear layer.
        quantizer: input -> quantised input; becomes the submodule ``input_quantizer``.

    Raises:
        MisconfigurationException: another quantiser is there.
    """
    _refuse_second(input_quantizer(layer), quantizer, "input")
    layer.add_module(INPUT, quantizer)
    layer.register_forward_pre_hook(_quantize_first_input)


def weight_quantizer(layer: nn.Module) -> nn.Module | None:
    """The quantiser that :func:`quantize_weight` attached; None without one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    stack: Any = layer.parametrizations["weight"]  # type: ignore[index]
    return next((step for step in stack if getattr(step, "quantizes_weight", False)), None)


def input_quantizer(layer: nn.Module) -> nn.Module | None:
    """The quantiser that :func:`quantize_input` attached; None without one."""
    return layer._modules.get(INPUT)


def quantized_layers(module: nn.Module) -> dict[str, nn.Module]:
    """All layers with a quantiser of their weight or input, by name, in the order in which they are defined."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if weight_quantizer(layer) is not None or input_quantizer(layer) is not None
    }


def real_weight(layer: nn.Module) -> Tensor:
    """What the weight's quantiser reads: the trained weight, after masks. Without a quantiser the weight itself."""
    quantizer = weight_quantizer(layer)
    if quantizer is None:
        return layer.weight  # type: ignore[return-value]
    stack: Any = layer.parametrizations["weight"]  # type: ignore[index]
    weight = stack.original
    for step in stack:
        if step is quantizer:
            break
        weight = step(weight)
    return weight


def remove_quantizers(layer: nn.Module) -> None:
    """Take both quantisers off; the layer has its real weight again. Without any nothing happens."""
    quantizer = weight_quantizer(layer)
    if quantizer is not None:
        remove_mask(layer, type(quantizer))
    if input_quantizer(layer) is not None:
        del layer._modules[INPUT]
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _quantize_first_input:
                del layer._forward_pre_hooks[key]


def _quantize_first_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer._modules[INPUT](args[0]), *args[1:])  # type: ignore[misc]


_quantize_first_input.part_of_function = True  # type: ignore[attr-defined]


def _refuse_second(there: nn.Module | None, new: nn.Module, what: str) -> None:
    if there is not None:
        raise MisconfigurationException(
            f"The {what} of this layer is quantised by {type(there).__name__} already, and cannot be by "
            f"{type(new).__name__} too. Give each method layers of its own, by `include` and `exclude`."
        )
