"""A jackpot as a file: one bit per weight, for the dense checkpoint it was found in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.callbacks.sparsity.lottery_jackpots.lots import lots_in
from lightning_compress.core.sparse.bit_packing import pack_mask, unpack_mask
from lightning_compress.core.sparse.learnt_mask import weight_name


def save_jackpot(module: nn.Module, path: str | Path, values: Mapping[str, Tensor]) -> int:
    """Write the masks of a module as bits: what makes of its dense weights the sparse network.

    Args:
        values: other tensors that changed, by their name in the `state_dict`: statistics of norms.

    Returns:
        Bytes of the bits: the sum of ceil(weights / 8) over the layers.
    """
    lots = lots_in(module)
    bits = {name: pack_mask(m.mask) for name, m in lots.items()}
    weights = {name: module.get_parameter(weight_name(module.get_submodule(name), name)) for name in lots}
    content = {
        "masks": {name: {"bits": bits[name], "shape": list(m.mask.shape)} for name, m in lots.items()},
        "values": {name: value.detach().cpu() for name, value in values.items()},
        "sha256": _sha256(weights),
    }
    torch.save(content, path)
    return sum(packed.numel() for packed in bits.values())


def load_jackpot(module: nn.Module, path: str | Path) -> None:
    """Make of the dense network the sparse one that a file of :func:`save_jackpot` describes, in place.

    Args:
        module: with the weights that the masks were found for: the LightningModule, or the network inside.
        path: the file.

    Raises:
        ValueError: the file is no jackpot, or one of another network or of other weights.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        masks, values, digest = content["masks"], content["values"], content["sha256"]
    except (KeyError, TypeError, RuntimeError, EOFError) as error:
        raise ValueError(f"path: {str(path)!r} is no jackpot ({type(error).__name__}: {error}).") from error
    layers = dict(module.named_modules())
    names = list(masks)
    inside = next((i for i in range(names[0].count(".") + 1) if all(_inside(n, i) in layers for n in names)), None)
    if inside is None:
        raise ValueError(f"path: {str(path)!r} masks {names[0]!r}, which {type(module).__name__} does not have.")
    weights: dict[str, Any] = {name: layers[_inside(name, inside)].weight for name in names}
    found = _sha256(weights)
    if found != digest:
        raise ValueError(
            f"path: {str(path)!r} was found for other weights: SHA-256 {digest[:12]}, {type(module).__name__} has "
            f"{found[:12]}. Load the dense weights that the search started from."
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(unpack_mask(masks[name]["bits"], masks[name]["shape"]).to(weight.device))
    module.load_state_dict({**module.state_dict(), **{_inside(name, inside): v for name, v in values.items()}})


def _inside(name: str, levels: int) -> str:
    """The name without its first levels: as a part of the module knows it."""
    return name.split(".", levels)[-1] if levels < name.count(".") + 1 else ""


def _sha256(weights: Mapping[str, Tensor]) -> str:
    """Of the values of weights, in the order of the mapping."""
    digest = hashlib.sha256()
    for weight in weights.values():
        digest.update(weight.detach().cpu().contiguous().float().numpy().data)
    return digest.hexdigest()
