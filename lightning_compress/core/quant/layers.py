"""The layers that can be quantised, and why others are left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_compress.core.quant.attach import input_quantizer, weight_quantizer
from lightning_compress.core.select import match
from lightning_compress.core.sparse.layers import Layer, choose_layers, weight_layers


def first_layer(layers: Mapping[str, nn.Module]) -> str | None:
    """The first convolution in the order of definition; where there is none the first layer; None without layers."""
    convolutions = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    return next(iter(convolutions or layers), None)


def last_layer(layers: Mapping[str, nn.Module]) -> str | None:
    """The last linear layer in the order of definition; where there is none the last layer; None without layers."""
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    return next(reversed(linear or list(layers)), None)


def choose_quantized(
    module: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    exclude_first: bool = False,
    exclude_last: bool = False,
    exclude_linear: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """The convolutions and linear layers to quantise, in the order in which they are defined.

    Args:
        module: the network.
        include: globs of layer names.
        exclude: globs of layer names.
        exclude_first: leave out the first convolution.
        exclude_last: leave out the last linear layer, or where there is none the last convolution.
        exclude_linear: leave out all linear layers.

    Returns:
        The names, and for every other layer the reason why it is left alone.

    Raises:
        ValueError: a glob matches no layer.
    """
    layers = weight_layers(module)
    chosen, reasons = choose_layers(layers, include, exclude)
    first, last = first_layer(layers), last_layer(layers)
    for name in chosen:
        if exclude_first and name == first:
            reasons[name] = "is the first layer"
        elif exclude_last and name == last:
            reasons[name] = "is the last layer"
        elif exclude_linear and isinstance(layers[name], nn.Linear):
            reasons[name] = "is linear"
        elif reason := _why_not(layers[name]):
            reasons[name] = reason
    return [name for name in chosen if name not in reasons], reasons


def check_bits(bits: int | Mapping[str, int] | None, lowest: int, highest: int, argument: str) -> None:
    """A number of bits, or all numbers of a mapping from globs, must be possible; None is.

    Args:
        argument: what it is called, as ``"QAT(weight_bits"``.

    Raises:
        ValueError: it is not.
    """
    for number in bits.values() if isinstance(bits, Mapping) else [bits]:
        if number is not None and not (isinstance(number, int) and lowest <= number <= highest):
            raise ValueError(f"{argument}={bits}): give whole numbers from {lowest} to {highest}.")


def bits_by_layer(bits: int | Mapping[str, int] | None, names: Sequence[str], argument: str) -> dict[str, int | None]:
    """Give every layer its bits.

    Args:
        bits: a number for all; or a mapping from globs to numbers, of which a later one wins.
        names: the layers.
        argument: for the message.

    Returns:
        One number for each name; None where no glob matches, or where `bits` is None.

    Raises:
        ValueError: a glob matches no layer.

    >>> bits_by_layer({"*": 4, "stem": 8}, ["stem", "conv"], "weight_bits")
    {'stem': 8, 'conv': 4}
    """
    if not isinstance(bits, Mapping):
        return dict.fromkeys(names, bits)
    by_layer: dict[str, int | None] = dict.fromkeys(names)
    for glob, number in bits.items():
        by_layer |= dict.fromkeys(match(names, [glob], argument), number)
    return by_layer


def _why_not(layer: Layer) -> str:
    if isinstance(layer, _ConvTransposeNd):
        return "is a transposed convolution"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "is computed inside MultiheadAttention, which passes its input by"
    for quantizer in (weight_quantizer(layer), input_quantizer(layer)):
        if quantizer is not None:
            return f"is quantised by {type(quantizer).__name__} already"
    return ""
