"""Where masks go in a generator, who reads the channels behind them, and what is left when some go.

A generator is described by its sets of channels, named as in its `widths`: every convolution writes one set and reads
one or, behind a concatenation, two. The blocks of a residual generator all write into one set, "quarter".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_compress.networks.resnet_generator import (
    GeneratorBlock,
    ResNetGenerator,
    SeparableConv2d,
    resnet_generator_macs,
)
from lightning_compress.networks.unet_generator import UNetBlock, UNetGenerator, unet_generator_macs

STREAM = "quarter"  # the channels that residual blocks add to
Kind = Literal["inner", "sampling", "stream"]


class Conv(NamedTuple):
    """A convolution: its name, that of the norm behind it ("" without), and the sets of channels it connects.

    The input and the output of the generator are no sets: `reads` is empty there, `writes` is "".
    """

    name: str
    norm: str
    reads: tuple[str, ...]
    writes: str


class Site(NamedTuple):
    """Where a mask goes.

    Attributes:
        at: name of the activation that the mask stands before, or of the Sequential that it ends.
        conv: the convolution whose output it masks.
        kind: what it is pushed by: that of a block's inside or a U-Net, of layers that change the resolution, or of the
            residual stream.
    """

    at: str
    conv: Conv
    kind: Kind


@dataclass(frozen=True)
class Layout:
    """A generator, as far as masks are concerned; names of modules are within it.

    Attributes:
        channels: set of channels -> how many, in the order of `widths`.
        convs: all convolutions; a depthwise one reads and writes the same set.
        sites: one mask each, in the order of computation.
        blocks: set of channels -> the residual block that is nothing without them. Before a norm with weights it is
            something: its bias, so it may not go.
        count: `widths` -> MACs for an image of 256x256, as the papers count them.
    """

    channels: Mapping[str, int]
    convs: tuple[Conv, ...]
    sites: tuple[Site, ...]
    blocks: Mapping[str, str]
    count: Callable[..., int]

    @property
    def residual(self) -> bool:
        """Whether several masks stand over the same channels."""
        return STREAM in self.channels

    def readers(self, channels: str) -> list[Conv]:
        """The convolutions that read a set of channels."""
        return [conv for conv in self.convs if channels in conv.reads]

    def macs(self, widths: Mapping[str, int], pixels: int) -> float:
        """MACs with so many channels in each set, for an image with so many pixels."""
        return self.count([widths[name] for name in self.channels]) * pixels / 256**2


def layout_of(generator: nn.Module, direction: str) -> Layout:
    """Describe a generator, with masks or without.

    Raises:
        MisconfigurationException: it is none that masks are known for.
    """
    if isinstance(generator, ResNetGenerator):
        return _resnet(generator)
    if isinstance(generator, UNetGenerator):
        return _unet(generator)
    raise MisconfigurationException(
        f"DMAD knows where masks go in ResNetGenerator and UNetGenerator; the generator of direction {direction!r} is "
        f"a {type(generator).__name__}."
    )


def _resnet(generator: ResNetGenerator) -> Layout:
    widths, model = generator.widths, generator.model
    blocks = range(10, 10 + len(widths) - 5)
    up = blocks.stop
    inner = {f"model.{i}": f"block {i - 9}" for i in blocks}
    names = ["first", "half", STREAM, *inner.values(), "back to half", "back to full"]

    def conv(index: int, reads: tuple[str, ...], writes: str) -> Conv:
        return Conv(f"model.{index}", f"model.{index + 1}" if writes else "", reads, writes)

    first, half, quarter = conv(1, (), "first"), conv(4, ("first",), "half"), conv(7, ("half",), STREAM)
    convs = [first, half, quarter]
    sites = [Site("model.3", first, "sampling"), Site("model.6", half, "sampling"), Site("model.9", quarter, "stream")]
    for name, channels in inner.items():
        block = generator.get_submodule(name)
        if not isinstance(block, GeneratorBlock):  # it has been removed
            continue
        for place, layer in block.conv_block.named_children():
            if not isinstance(layer, nn.Conv2d | SeparableConv2d):
                continue
            reads, writes = (STREAM, channels) if convs[-1].writes == STREAM else (channels, STREAM)
            path, norm = f"{name}.conv_block.{place}", f"{name}.conv_block.{int(place) + 1}"
            if isinstance(layer, SeparableConv2d):
                convs += [Conv(f"{path}.conv.0", f"{path}.conv.1", (reads,), reads)]
                path = f"{path}.conv.2"
            convs.append(Conv(path, norm, (reads,), writes))
            if writes == STREAM:
                sites.append(Site(f"{name}.conv_block", convs[-1], "stream"))
            else:
                sites.append(Site(f"{name}.conv_block.{int(place) + 2}", convs[-1], "inner"))
    half_up = conv(up, (STREAM,), "back to half")
    full_up = conv(up + 3, ("back to half",), "back to full")
    last: Any = model[up + 7]
    stem: Any = model[1]
    sites += [Site(f"model.{up + 2}", half_up, "sampling"), Site(f"model.{up + 5}", full_up, "sampling")]
    count = partial(
        resnet_generator_macs,
        separable=any(isinstance(layer, SeparableConv2d) for layer in generator.modules()),
        in_channels=stem.in_channels,
        out_channels=last.out_channels,
    )
    return Layout(
        dict(zip(names, widths, strict=True)),
        (*convs, half_up, full_up, conv(up + 7, ("back to full",), "")),
        tuple(sites),
        {channels: name for name, channels in inner.items() if isinstance(model[2], nn.InstanceNorm2d)},
        count,
    )


def _unet(generator: UNetGenerator) -> Layout:
    downs, widths = generator.downs, generator.widths
    names = [*(f"down {i + 1}" for i in range(downs)), *(f"up {i + 1}" for i in range(downs - 1))]
    down: list[Conv] = []
    up: list[Conv] = []
    sites_down: list[Site] = []
    sites_up: list[Site] = []
    path = "model"
    for level in range(1, downs + 1):
        block = generator.get_submodule(path)
        assert isinstance(block, UNetBlock)
        at = {type(layer): place for place, layer in block.model.named_children()}
        here, there = int(at[nn.Conv2d]), int(at[nn.ConvTranspose2d])
        k = downs - level  # up 0, 1, ... have their names from 1 on
        reads = (f"down {level}",) if level == downs else (f"down {level}", f"up {k}")
        norm_down = f"{path}.model.{here + 1}" if 1 < level < downs else ""
        norm_up = f"{path}.model.{there + 1}" if level > 1 else ""
        down.append(
            Conv(f"{path}.model.{here}", norm_down, (f"down {level - 1}",) if level > 1 else (), f"down {level}")
        )
        up.append(Conv(f"{path}.model.{there}", norm_up, reads, f"up {k + 1}" if level > 1 else ""))
        inside = f"{path}.model.{at[UNetBlock]}" if level < downs else ""
        # the activation behind the convolution is the first layer of the block inside
        sites_down.append(Site(f"{inside}.model.0" if inside else f"{path}.model.{here + 1}", down[-1], "inner"))
        if level > 1:
            sites_up.append(Site(f"{path}.model", up[-1], "inner"))
        path = inside
    outer: Any = generator.get_submodule(down[0].name)
    last: Any = generator.get_submodule(up[0].name)
    count = partial(unet_generator_macs, in_channels=outer.in_channels, out_channels=last.out_channels)
    return Layout(dict(zip(names, widths, strict=True)), (*down, *up[::-1]), (*sites_down, *sites_up[::-1]), {}, count)
