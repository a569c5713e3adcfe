"""What HRank's authors did to each of their networks: which number of a list hits which layers, where the maps of a
layer are read, and how the paper counts what is left.

Known here: the CIFAR ResNets, VGG, DenseNet and GoogLeNet of `lightning_compress.networks`, and torchvision's ResNets
of bottlenecks. Names of layers and modules are relative to the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from lightning_compress.callbacks.pruning.hrank.ranks import kept_width
from lightning_compress.core.profile import Profile
from lightning_compress.networks import CIFARVGG, CIFARDenseNet, CIFARGoogLeNet, CIFARResNet

Layout = Literal["original", "plus"]
INCEPTIONS = ("a3", "b3", "a4", "b4", "c4", "d4", "e4", "a5", "b5")


class Tap(NamedTuple):
    """Where the maps of a layer are read: the output of a module, after every addition and activation.

    Attributes:
        module: its name.
        channels: which of its channels are the layer's.
        relu: whether a ReLU must still be applied, where the network's own is shared by several layers.
    """

    module: str
    channels: slice = slice(None)
    relu: bool = False


def is_known(network: nn.Module) -> bool:
    """Whether the authors pruned a network of this kind, so that the functions below can be asked about it."""
    return isinstance(network, (CIFARResNet, CIFARVGG, CIFARDenseNet, CIFARGoogLeNet)) or _is_bottleneck(network)


def layout(network: nn.Module, version: Layout = "original") -> list[tuple[str, ...]]:
    """The layers that each number of a list of pruning ratios hits.

    ``"original"`` is the order of the paper's code, ``"plus"`` that of the authors' second one, HRankPlus.

    - CIFAR ResNet, original: every convolution in forward order. Plus: the stem, the outputs of stages 1 and 2, then
      the first convolution of every block; the outputs of stage 3 stay whole.
    - ResNet-50, original: the stem, then per stage the shortcut and the convolutions of all blocks. Plus: the stem,
      the outputs of stages 1 to 3, then the first two convolutions of every block.
    - VGG-16: every convolution; the last is never pruned, and only the original list has a number for it.
    - DenseNet-40: every convolution, transitions among them; in plus the stem's number is ignored.
    - GoogLeNet: the stem, then one number per inception. Original: its four outputs and the first 3x3 of the 5x5
      branch. Plus: the 3x3 and 5x5 branches only, of the last inception only the inside of the 5x5 branch; the
      stem's number is ignored.

    Returns:
        One tuple of layer names per number; an empty one where the number is ignored.

    Raises:
        ValueError: the network is not known, or there is no such version.

    >>> from lightning_compress.networks import resnet20
    >>> [len(layout(resnet20(), version)) for version in ("original", "plus")]
    [19, 12]
    >>> layout(resnet20(), "plus")[1]
    ('layer1.0.conv2', 'layer1.1.conv2', 'layer1.2.conv2')
    """
    if version not in ("original", "plus"):
        raise ValueError(f"layout must be 'original' or 'plus', got {version!r}.")
    plus = version == "plus"
    if isinstance(network, CIFARResNet):
        stages = _stages(network)
        mids = [(f"{block}.conv1",) for stage in stages for block in stage]
        if plus:
            return [("conv1",), *(tuple(f"{block}.conv2" for block in stage) for stage in stages[:2]), *mids]
        return [
            ("conv1",),
            *((f"{b}.{conv}",) for stage in stages for b in stage for conv in ("conv1", "conv2")),
        ]
    if _is_bottleneck(network):
        stages = _stages(network)
        if plus:
            outs = [(*(f"{block}.conv3" for block in stage), f"{stage[0]}.downsample.0") for stage in stages[:3]]
            return [("conv1",), *outs, *((f"{b}.conv1", f"{b}.conv2") for stage in stages for b in stage)]
        names = ["conv1"]
        for stage in stages:
            names += [f"{stage[0]}.downsample.0", *(f"{b}.conv{i}" for b in stage for i in (1, 2, 3))]
        return [(name,) for name in names]
    if isinstance(network, CIFARVGG):
        *pruned, _ = _convs(network)
        return [(name,) for name in pruned] + ([] if plus else [()])
    if isinstance(network, CIFARDenseNet):
        return [(name,) if i or not plus else () for i, name in enumerate(_convs(network))]
    if isinstance(network, CIFARGoogLeNet):
        inside = ("branch1x1.out", "branch3x3.out", "branch5x5.mid", "branch5x5.out", "branch_pool.out")
        if not plus:
            return [("stem.conv",), *(tuple(f"{i}.{conv}.conv" for conv in inside) for i in INCEPTIONS)]
        shrinks = [tuple(f"{i}.{conv}.conv" for conv in inside[1:4]) for i in INCEPTIONS[:-1]]
        return [(), *shrinks, (f"{INCEPTIONS[-1]}.branch5x5.mid.conv",)]
    raise _unknown(network)


def layer_ratios(network: nn.Module, ratios: Sequence[float], version: Layout = "original") -> dict[str, float]:
    """The pruning ratio of every layer that a list of the authors hits; all others stay whole.

    Args:
        network: one of the networks above.
        ratios: the list, see `layout` for its order.
        version: which code the list is for. ``"plus"`` goes with ``rounding="keep"``.

    Raises:
        ValueError: the network is not known, or the list is of another length.

    >>> from lightning_compress.networks import vgg16_cifar
    >>> layer_ratios(vgg16_cifar(), [0.5] * 12, "plus")["features.conv12"]
    0.5
    """
    order = layout(network, version)
    if len(ratios) != len(order):
        start = ", ".join(names[0] + " & ..." * (len(names) > 1) if names else "(ignored)" for names in order[:5])
        raise ValueError(
            f"pruning_ratio has {len(ratios)} numbers, but the {version!r} layout of {type(network).__name__} has "
            f"{len(order)}: {start}, ..."
        )
    by_layer = {name: ratio for names, ratio in zip(order, ratios, strict=True) for name in names}
    if isinstance(network, CIFARDenseNet) and version == "plus":
        by_layer |= _transition_ratios(network, by_layer)
    return by_layer


def _transition_ratios(network: CIFARDenseNet, by_layer: Mapping[str, float]) -> dict[str, float]:
    """A narrow transition outputs a share of what it reads, so the block in front narrows it as well."""
    convs = _convs(network)
    width = convs["conv1"].out_channels
    ratios = {}
    for block in ("1", "2"):
        for name, conv in convs.items():
            if name.startswith(f"dense{block}."):
                width += kept_width(conv.out_channels, by_layer[name])
        name = f"trans{block}.conv"
        width = kept_width(width, by_layer[name])
        # Half a channel more, or int(n * (1 - ratio)) might fall one short.
        ratios[name] = 1 - min(1.0, (width + 0.5) / convs[name].out_channels)
    return ratios


def rank_taps(network: nn.Module) -> dict[str, Tap]:
    """Where the authors read the maps of every layer that they rank, in the order of their rank arrays.

    Raises:
        ValueError: the network is not known.

    >>> from lightning_compress.networks import resnet20
    >>> rank_taps(resnet20())["layer1.0.conv2"]
    Tap(module='layer1.0.relu2', channels=slice(None, None, None), relu=False)
    """
    if isinstance(network, CIFARResNet):
        taps = {"conv1": Tap("relu")}
        for stage in _stages(network):
            for block in stage:
                taps |= {f"{block}.conv1": Tap(f"{block}.relu1"), f"{block}.conv2": Tap(f"{block}.relu2")}
        return taps
    if _is_bottleneck(network):
        taps = {"conv1": Tap("maxpool")}
        for stage in _stages(network):
            for block in stage:
                taps |= {f"{block}.conv{i}": Tap(f"{block}.bn{i}", relu=True) for i in (1, 2)}
                taps[f"{block}.conv3"] = Tap(block)
                if block == stage[0]:  # it is added to conv3's output, so both are read behind the sum
                    taps[f"{block}.downsample.0"] = Tap(block)
        return taps
    if isinstance(network, CIFARVGG):
        *pruned, _ = _convs(network)
        return {name: Tap(name.replace("conv", "relu")) for name in pruned}
    if isinstance(network, CIFARDenseNet):
        convs = _convs(network)
        readers = [*(name.removesuffix("conv") + "relu" for name in list(convs)[1:]), "relu"]
        return {
            # Each reader sees the whole concatenation, which ends with the layer in question; a stem or a
            # transition begins a new one.
            name: Tap(reader, slice(-conv.out_channels, None))
            for (name, conv), reader in zip(convs.items(), readers, strict=True)
        }
    if isinstance(network, CIFARGoogLeNet):
        convs, taps = _convs(network), {"stem.conv": Tap("stem.relu")}
        for inception in INCEPTIONS:
            # In front of a pooling the authors read its output.
            read = {"b3": "pool1", "e4": "pool2"}.get(inception, inception)
            start = 0
            for names in _branches(inception).values():
                stop = start + convs[names[0]].out_channels
                taps |= dict.fromkeys(names, Tap(read, slice(start, stop)))
                start = stop
        return taps
    raise _unknown(network)


def rank_arrays(network: nn.Module) -> dict[str, str]:
    """Stem of the file of every layer's mean ranks in the authors' folders, e.g. ``rank_conv1``.

    >>> from lightning_compress.networks import googlenet_cifar
    >>> rank_arrays(googlenet_cifar())["a3.branch5x5.mid.conv"]
    'rank_conv2_n5x5'
    """
    if not isinstance(network, CIFARGoogLeNet):
        return {name: f"rank_conv{k}" for k, name in enumerate(rank_taps(network), 1)}
    arrays = {"stem.conv": "rank_conv1"}
    for k, inception in enumerate(INCEPTIONS, 2):
        for branch, convs in _branches(inception).items():
            arrays |= dict.fromkeys(convs, f"rank_conv{k}_{branch}")
    return arrays


def out_only(
    network: nn.Module, profile: Profile, ratios: Mapping[str, float], *, fractional: bool = False
) -> tuple[int, int]:
    """MACs and parameters as the paper's code counts them: a layer that loses filters saves those, and the layers
    that read them save nothing. The network that is really left is much cheaper.

    Only convolutions and linear layers count; a linear layer's biases count as MACs, a convolution's as parameters
    alone. Two oddities are kept: DenseNet's transitions are credited with what their block loses, and GoogLeNet's
    inception c4 is counted with the ratio of d4.

    Args:
        network: the dense network.
        profile: its `lightning_compress.profile`.
        ratios: layer -> pruning ratio, as `layer_ratios` gives it for the original layout.
        fractional: count fractions of filters, and nothing but weights of convolutions: the printed VGG-16 row.

    Returns:
        MACs and parameters.

    >>> from lightning_compress import parse_ratio, profile
    >>> from lightning_compress.networks import resnet56
    >>> network, ratios = resnet56(), parse_ratio("[0.1]+[0.6]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1,0.4]*4")
    >>> out_only(network, profile(network, (1, 3, 32, 32)), layer_ratios(network, ratios))
    (62715530, 489359)
    """
    if isinstance(network, CIFARGoogLeNet):
        ratios = {name: ratios[f"d4{name[2:]}"] if name.startswith("c4.") else r for name, r in ratios.items()}
    macs = params = 0.0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            n, ratio = layer.out_channels, ratios.get(name, 0.0)
            kept = n * (1 - ratio) if fractional else kept_width(n, ratio, "prune")
            share = kept / n
            if isinstance(network, CIFARDenseNet) and name.startswith("trans"):
                share *= 1 - _lost(network, name, ratios) / layer.in_channels
            macs += profile.layer(name).macs * share
            params += layer.weight.numel() * share + (0 if layer.bias is None or fractional else kept)
        elif isinstance(layer, nn.Linear) and not fractional:
            size = sum(p.numel() for p in layer.parameters())
            macs += size
            params += size
    return round(macs), round(params)


def _lost(network: CIFARDenseNet, transition: str, ratios: Mapping[str, float]) -> int:
    """Channels removed from the layers of the block in front of ``trans<k>.conv``."""
    block = f"dense{transition[len('trans')]}."
    widths = {name: conv.out_channels for name, conv in _convs(network).items() if name.startswith(block)}
    return sum(n - kept_width(n, ratios.get(name, 0.0), "prune") for name, n in widths.items())


def _unknown(network: nn.Module) -> ValueError:
    return ValueError(
        f"{type(network).__name__} is none of the authors' networks: CIFARResNet, CIFARVGG, CIFARDenseNet, "
        "CIFARGoogLeNet, torchvision's ResNet of bottlenecks."
    )


def _is_bottleneck(network: nn.Module) -> bool:
    return isinstance(network, ResNet) and isinstance(network.layer1[0], Bottleneck)


def _stages(network: nn.Module) -> list[list[str]]:
    """Names of the blocks, stage by stage."""
    stages = {name: module for name, module in network.named_children() if name.startswith("layer")}
    return [[f"{stage}.{i}" for i, _ in module.named_children()] for stage, module in stages.items()]


def _convs(network: nn.Module) -> dict[str, nn.Conv2d]:
    """All convolutions in the order of definition, which is that of execution here."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def _branches(inception: str) -> dict[str, tuple[str, ...]]:
    """The authors' name of a branch -> the convolutions of its width, in the order of concatenation."""
    branches = {
        "n1x1": ("branch1x1.out",),
        "n3x3": ("branch3x3.out",),
        "n5x5": ("branch5x5.mid", "branch5x5.out"),
        "pool_planes": ("branch_pool.out",),
    }
    return {branch: tuple(f"{inception}.{conv}.conv" for conv in convs) for branch, convs in branches.items()}
