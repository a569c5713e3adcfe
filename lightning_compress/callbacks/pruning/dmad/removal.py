"""Masks come into a generator, settle, are taken up by its weights, and what they have killed is cut out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.dmad.layout import STREAM, Layout, Site
from lightning_compress.callbacks.pruning.dmad.masks import BandMask
from lightning_compress.core.surgery import Cut, replayable

Fold = Literal["exact", "official"]
STD = 0.2  # of the first w
TENSORS = ("weight", "bias", "running_mean", "running_var")  # of a norm, one entry a channel


# ---- masks in their places


@replayable
def attach_masks(module: nn.Module, places: Sequence[tuple[str, int]], seed: int) -> Callable[[nn.Module], None]:
    """Put a mask before each of some activations, or at the end of each of some Sequentials.

    Args:
        module: what holds the generators.
        places: name of the activation or the Sequential, and number of channels.
        seed: of the first w, which are drawn from N(0, 0.2^2).
    """
    rng = torch.Generator().manual_seed(seed)
    for at, channels in places:
        place = module.get_submodule(at)
        w = STD * torch.randn(channels, generator=rng)
        mask = BandMask(w.to(next(module.parameters()).device)).train(place.training)
        if isinstance(place, nn.Sequential):
            place.add_module("mask", mask)
        else:
            both = nn.Sequential(OrderedDict(mask=mask, activation=place)).train(place.training)
            module.set_submodule(at, both)
    return partial(detach_masks, places=places)


def detach_masks(module: nn.Module, places: Sequence[tuple[str, int]]) -> None:
    """Take masks out again."""
    for at, _ in places:
        place: Any = module.get_submodule(at)
        if hasattr(place, "activation"):
            module.set_submodule(at, place.activation)
        else:
            del place.mask


def masks_of(generator: nn.Module, layout: Layout) -> list[BandMask]:
    """The masks in a generator, in the order of the layout's sites; none where they are not attached."""
    names = [f"{site.at}.mask" for site in layout.sites]
    own = dict(generator.named_modules())
    return [own[name] for name in names if name in own]


# ---- who lives


def alive(layout: Layout, weights: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """Which channels each mask keeps, (C,) bool each, one for each site: those with w above the threshold.

    Every set of channels without which nothing would come through keeps at least one, that of the largest w; only the
    inside of a residual block may be given up.
    """
    lives = [w > threshold for w in weights]
    for channels in layout.channels:
        at = [i for i, site in enumerate(layout.sites) if site.conv.writes == channels]
        if channels not in layout.blocks and not any(bool(lives[i].any()) for i in at):
            best = max(at, key=lambda i: float(weights[i].max()))
            lives[best][weights[best].argmax()] = True
    return lives


def union(layout: Layout, lives: Sequence[Tensor]) -> dict[str, Tensor]:
    """Set of channels -> which of them any mask keeps, (C,) bool."""
    kept: dict[str, Tensor] = {}
    for site, lived in zip(layout.sites, lives, strict=True):
        channels = site.conv.writes
        kept[channels] = kept[channels] | lived if channels in kept else lived
    return kept


def survivors(layout: Layout, lives: Sequence[Tensor]) -> dict[str, int]:
    """Set of channels -> how many are left; 0 for blocks that are no more."""
    counts = {channels: int(kept.sum()) for channels, kept in union(layout, lives).items()}
    return {channels: counts.get(channels, 0) for channels in layout.channels}


# ---- masks that settle


@torch.no_grad()
def settle(generator: nn.Module, layout: Layout, threshold: float, fold: Fold) -> None:
    """Close the band: channels with w above the threshold live with m = 1, all others are dead, w is 1 or -1.

    What lives with m < 1 is folded, so that the generator makes no jump for it.
    """
    masks = masks_of(generator, layout)
    lives = alive(layout, [mask.weight for mask in masks], threshold)
    for site, mask, lived in zip(layout.sites, masks, lives, strict=True):
        _close(generator, layout, site, mask, lived, fold)
        mask.band.zero_()


@torch.no_grad()
def freeze(generator: nn.Module, layout: Layout, threshold: float, fold: Fold) -> None:
    """Settle the masks of which more than a share is dead; their band stays as it is, as it says nothing any more."""
    masks = masks_of(generator, layout)
    band = float(masks[0].band)
    lives = alive(layout, [mask.weight for mask in masks], -band)
    for site, mask, lived in zip(layout.sites, masks, lives, strict=True):
        if float((mask.weight < -band).float().mean()) > threshold:
            # as the authors: what is in the band jumps to 1
            _close(generator, layout, site, mask, lived, fold if fold == "exact" else None)


@torch.no_grad()
def narrow_band(generator: nn.Module, layout: Layout, band: float, fold: Fold) -> None:
    """Narrow the band to one that is still open, and fold the masks that leave it upwards."""
    for site, mask in zip(layout.sites, masks_of(generator, layout), strict=True):
        leaves = (mask.weight > band) & (mask.weight <= mask.band)
        fold_factor(generator, layout, site, torch.where(leaves, mask.values(), 1.0), fold)
        mask.band.fill_(band)


def _close(generator: nn.Module, layout: Layout, site: Site, mask: BandMask, lived: Tensor, fold: Fold | None) -> None:
    m = mask.values()
    if fold is not None:  # what was dead, and lives as the last of its layer, comes back as it was before
        fold_factor(generator, layout, site, torch.where(lived & (m > 0), m, 1.0), fold)
    mask.weight.copy_(torch.where(lived, 1.0, -1.0))


def fold_factor(generator: nn.Module, layout: Layout, site: Site, factor: Tensor, fold: Fold) -> None:
    """Multiply weights by what a mask does no longer multiply by, (C,).

    A norm with weights takes it, and a convolution that has no norm. Before a norm without weights a factor changes
    nothing; there `"exact"` gives it to the convolutions that read the channels, which is the same as ReLUs pass
    factors on. Where this is impossible, in the residual stream and before a depthwise convolution with a norm of its
    own, the generator jumps a little, as the authors' does everywhere.
    """
    if bool((factor == 1).all()):
        return
    norm: Any = generator.get_submodule(site.conv.norm) if site.conv.norm else None
    layer: Any = generator.get_submodule(site.conv.name)
    owner = layer if norm is None or norm.weight is None else norm
    if owner is norm or norm is None or fold == "official":
        _scale(owner.weight, 1 if isinstance(owner, nn.ConvTranspose2d) else 0, factor)
        if owner.bias is not None:
            _scale(owner.bias, 0, factor)
        return
    readers: list[tuple[Any, int]] = []
    for conv in layout.readers(site.conv.writes):
        before = conv.reads[: conv.reads.index(site.conv.writes)]
        readers.append((generator.get_submodule(conv.name), sum(layout.channels[name] for name in before)))
    if site.kind == "stream" or any(reader.groups > 1 for reader, _ in readers):
        return
    for reader, offset in readers:
        dim = 0 if isinstance(reader, nn.ConvTranspose2d) else 1
        _scale(reader.weight.narrow(dim, offset, len(factor)), dim, factor)


def _scale(tensor: Tensor, dim: int, factor: Tensor) -> None:
    tensor.mul_(factor.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.ndim)]))


# ---- what goes


class Removal(NamedTuple):
    """What has to be done to a generator, with names below its own.

    Attributes:
        zeros: tensor -> which of its first entries become zero: a block does not write what other blocks keep.
        blocks: residual blocks that go.
        cuts: slices of all that stays.
    """

    zeros: dict[str, Tensor]
    blocks: list[str]
    cuts: list[Cut]


def plan_removal(generator: nn.Module, layout: Layout, lives: Sequence[Tensor], prefix: str) -> Removal:
    """What remains of a generator, whose name is `prefix`, without the channels that are dead."""
    lives = [lived.cpu() for lived in lives]
    kept = union(layout, lives)
    gone = [name for channels, name in layout.blocks.items() if channels in kept and not kept[channels].any()]
    zeros, cuts = {}, []
    for site, lived in zip(layout.sites, lives, strict=True):
        silent = kept[site.conv.writes] & ~lived
        if site.conv.writes == STREAM and silent.any():
            for name in (site.conv.name, site.conv.norm):
                zeros.update({f"{name}.{t}": silent for t in TENSORS[:2] if _has(generator, name, t)})
    for conv in layout.convs:
        if any(conv.name.startswith(f"{block}.") for block in gone):
            continue
        layer: Any = generator.get_submodule(conv.name)
        transposed, depthwise = isinstance(layer, nn.ConvTranspose2d), layer.groups > 1
        if conv.reads and not depthwise:
            cuts.append((f"{conv.name}.weight", 0 if transposed else 1, torch.cat([kept[name] for name in conv.reads])))
        if conv.writes:
            cuts.append((f"{conv.name}.weight", 1 if transposed else 0, kept[conv.writes]))
            owners = [(conv.name, "bias"), *((conv.norm, tensor) for tensor in TENSORS)]
            cuts += [(f"{owner}.{t}", 0, kept[conv.writes]) for owner, t in owners if _has(generator, owner, t)]
    return Removal(
        {f"{prefix}.{name}": silent for name, silent in zeros.items()},
        [f"{prefix}.{name}" for name in gone],
        [Cut(f"{prefix}.{n}", dim, len(k), k.nonzero()[:, 0]) for n, dim, k in cuts if not k.all()],
    )


@torch.no_grad()
def silence(module: nn.Module, zeros: Mapping[str, Tensor]) -> None:
    """Set entries of tensors to zero, in place."""
    for name, silent in zeros.items():
        tensor = module.get_parameter(name)
        tensor[silent.to(tensor.device)] = 0


@replayable
def remove_blocks(module: nn.Module, blocks: Sequence[str]) -> Callable[[nn.Module], None]:
    """Let residual blocks do nothing; an identity keeps the place of each."""
    old = {name: module.get_submodule(name) for name in blocks}
    for name in blocks:
        module.set_submodule(name, nn.Identity().train(old[name].training))
    return partial(_put_back, old=old)


def _put_back(module: nn.Module, old: Mapping[str, nn.Module]) -> None:
    for name, block in old.items():
        module.set_submodule(name, block)


def _has(generator: nn.Module, owner: str, tensor: str) -> bool:
    return bool(owner) and getattr(generator.get_submodule(owner), tensor, None) is not None
