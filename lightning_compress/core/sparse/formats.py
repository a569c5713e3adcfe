"""Storage of kernels that follow patterns: a number per kernel in place of an index per weight.

FKW, filter-kernel-weight (Niu, Ma, Lin, Wang, Qian, Lin, Wang, Ren, "PatDNN", ASPLOS 2020, arXiv:2001.00138), for
patterns and removed kernels:

    reorder (F) uint16      filter that stands at each place        offset (F + 1) int32    kernels before each place
    index (kernels) uint16  input channel; by pattern, then channel inside a filter
    stride (F, P + 1) uint16  where the kernels of each pattern begin inside the filter, last the number of its kernels
    weight (kernels, n)     the kept taps, ascending

    indices take 2 F + 4 (F + 1) + 2 kernels + 2 F (P + 1) bytes. Where blocks of K filters share their kernels,
    F counts blocks and weight is (kernels, n, K).

SPM, sparsity pattern mask (Tan et al., DAC 2020, arXiv:2002.04997), for kernels that all keep n weights: a table of V
masks, a code of ceil(log2 V) bits per kernel, and (kernels, n) weights. No pointers: kernel j begins at weight n j.

Both are lossless, keep explicit zeros, and lie in files that hold one block of bytes of exactly that size, behind a
small header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.sparse.bit_packing import pack_bits, unpack_bits
from lightning_compress.core.sparse.patterns import taps_of

_LIMIT = 2**16  # of what is stored as uint16


# ---- FKW


@dataclass(frozen=True)
class FKW:
    """One layer in filter-kernel-weight storage; the arrays are as the top of this file says, on the CPU.

    Attributes:
        shape: (C_out, C_in, kh, kw) of the weight.
        block: K, filters that share their kernels.
        library: (P, kh * kw), bool.
        weight: (kernels, n, K); rows of filters that are not there, in the last block, are zero.
    """

    shape: tuple[int, ...]
    block: int
    library: Tensor
    reorder: Tensor
    offset: Tensor
    index: Tensor
    stride: Tensor
    weight: Tensor

    @property
    def arrays(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("reorder", "offset", "index", "stride", "weight")}

    @property
    def index_bytes(self) -> int:
        """All that is not weights; the library is a part of the file's header."""
        return self.nbytes - self.weight.nbytes

    @property
    def nbytes(self) -> int:
        """Indices and weights."""
        return sum(array.nbytes for array in self.arrays.values())


def encode_fkw(weight: Tensor, mask: Tensor, library: Tensor, block: int = 1) -> FKW:
    """Pack a weight.

    Args:
        weight: (C_out, C_in, kh, kw).
        mask: what stays, same shape, bool. Every kernel is in the library or gone; a kept zero is stored.
        library: (P, kh * kw), bool.
        block: K consecutive filters whose masks are the same.

    Raises:
        ValueError: a kernel of the mask is not in the library, filters of a block differ, or a number is above 65,535.
    """
    weight, mask, library = weight.detach().cpu(), mask.cpu(), library.cpu()
    filters, channels = weight.shape[:2]
    if not share_kernels(mask, block):
        raise ValueError(f"mask: the filters of a block of {block} keep different weights.")
    mine = mask.flatten(2)[::block]  # (blocks, C_in, taps)
    kept, ids = mine.any(-1), _pattern_ids(mine, library)
    if (ids[kept] < 0).any():
        raise ValueError("mask: some kernel keeps taps that are no pattern of the library.")
    blocks, size = len(mine), len(library)
    if max(filters, channels, int(kept.sum(1).max())) >= _LIMIT:
        raise ValueError(f"weight: FKW counts to {_LIMIT - 1}, the shape is {tuple(weight.shape)}.")

    order = filter_kernel_reorder(mask, library, block)
    place = order.argsort()
    row, channel = kept.nonzero().T
    pattern = ids[row, channel]
    sequence = ((place[row] * size + pattern) * channels + channel).argsort()
    row, channel, pattern = row[sequence], channel[sequence], pattern[sequence]
    runs = torch.bincount(place[row] * size + pattern, minlength=blocks * size).view(blocks, size)
    ends = F.pad(runs.cumsum(1), (1, 0))
    kernels = _pad(weight.flatten(2), block).unflatten(0, (blocks, block))[row, :, channel]  # (kernels, K, taps)
    taps = taps_of(library)[pattern][:, None].expand(-1, block, -1)
    return FKW(
        shape=tuple(weight.shape),
        block=block,
        library=library,
        reorder=order.to(torch.uint16),
        offset=F.pad(ends[:, -1].cumsum(0), (1, 0)).to(torch.int32),
        index=channel.to(torch.uint16),
        stride=ends.flatten().to(torch.uint16),
        weight=kernels.gather(2, taps).transpose(1, 2).contiguous(),
    )


def share_kernels(mask: Tensor, block: int) -> bool:
    """Whether every `block` consecutive filters of a mask (C_out, C_in, kh, kw) keep the same weights."""
    return bool((mask == mask[::block].repeat_interleave(block, 0)[: len(mask)]).all())


def decode_fkw(packed: FKW) -> tuple[Tensor, Tensor]:
    """Weight and mask, (C_out, C_in, kh, kw), filters in their own order."""
    filters, channels = packed.shape[:2]
    blocks, size, taps = len(packed.reorder), len(packed.library), packed.library.shape[1]
    runs = packed.stride.long().view(blocks, size + 1).diff(dim=1).flatten()
    run = torch.arange(blocks * size).repeat_interleave(runs)
    row, pattern = packed.reorder.long()[run // size], run % size
    places = taps_of(packed.library)[pattern]  # (kernels, n)
    address = (row[:, None] * channels + packed.index.long()[:, None]) * taps + places
    mask = torch.zeros(blocks * channels * taps, dtype=torch.bool)
    mask[address.flatten()] = True
    weight = packed.weight.new_zeros(blocks * channels * taps, packed.block)
    weight[address.flatten()] = packed.weight.flatten(0, 1)
    weight = weight.view(blocks, channels * taps, packed.block).transpose(1, 2).flatten(0, 1)[:filters]
    mask = mask.view(blocks, 1, -1).expand(-1, packed.block, -1).flatten(0, 1)[:filters]
    return weight.reshape(packed.shape), mask.reshape(packed.shape)


def filter_kernel_reorder(mask: Tensor, library: Tensor, block: int = 1) -> Tensor:
    """The order in which filters, or blocks of them, are stored and computed: (F,), int64.

    Most kernels first; among equals those with the same patterns stand together, and of these those that read the
    same channels.
    """
    mine = mask.cpu().flatten(2)[::block]
    kept, ids = mine.any(-1), _pattern_ids(mine, library.cpu())
    counts = torch.stack([((ids == p) & kept).sum(1) for p in range(len(library))], 1)
    keys = torch.cat([kept.sum(1, keepdim=True), counts, kept.long()], 1)
    return torch.from_numpy(np.lexsort((-keys.flip(1)).T.numpy()))


def csr_bytes(nonzeros: int, rows: int, bytes_per_weight: int = 0) -> int:
    """What compressed rows take, the usual storage: an int32 column per weight and int32 row pointers.

    >>> csr_bytes(4 * 72_818, 512)
    1167140
    """
    return (4 + bytes_per_weight) * nonzeros + 4 * (rows + 1)


def fkw_lists(packed: FKW) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each block of K filters multiplies, its blocks in the order in which they are stored.

    Returns:
        * index (non-zeros,) int32: input channel * taps + tap, ascending inside a block;
        * offset (blocks + 1,) int32: where each block's list begins;
        * weight (non-zeros, K): of its filters;
        * filter (blocks * K,) int32: output channel of each row, -1 where the last block has none.

        The fields of `ops.pattern_conv2d.NonZeros`.
    """
    filters, block = packed.shape[0], packed.block
    weight, mask = decode_fkw(packed)
    order = packed.reorder.long()
    kept = mask.flatten(1)[::block][order]
    row, index = kept.nonzero().T
    rows = _pad(weight.flatten(1), block).unflatten(0, (-1, block))
    own = (order[:, None] * block + torch.arange(block)).flatten()
    return (
        index.to(torch.int32),
        F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32),
        rows[order[row], :, index],
        torch.where(own < filters, own, -1).to(torch.int32),
    )


# ---- SPM


@dataclass(frozen=True)
class SPM:
    """One layer with a code per kernel.

    Attributes:
        shape: (C_out, C_in, kh, kw) of the weight.
        n: weights of every kernel.
        table: (V,) uint16, the masks in ascending order; tap t is bit t.
        codes: uint8, row of the table for each kernel (C_out, C_in), b bits each: bit t of code j is bit j b + t
            of the stream, whose bit p is bit p mod 8 of byte p // 8.
        weight: (kernels, n), the kept taps, ascending; floating point, or int8 with a `scale`.
        scale: of int8 weights; 1 for others.
    """

    shape: tuple[int, ...]
    n: int
    table: Tensor
    codes: Tensor
    weight: Tensor
    scale: float = 1.0

    @property
    def bits(self) -> int:
        """b = ceil(log2 V), the width of a code; 0 for a single mask."""
        return (len(self.table) - 1).bit_length()

    @property
    def arrays(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("table", "codes", "weight")}

    @property
    def index_bytes(self) -> int:
        """The codes; the table is a part of the header."""
        return self.codes.nbytes

    @property
    def nbytes(self) -> int:
        """Codes and weights: ceil(kernels b / 8) + kernels n bits / 8."""
        return self.codes.nbytes + self.weight.nbytes


def encode_spm(weight: Tensor, mask: Tensor, *, int8: bool = False) -> SPM:
    """Pack a weight whose kernels all keep n taps.

    Args:
        weight: (C_out, C_in, kh, kw), of at most 16 taps.
        mask: what stays, same shape, bool; a kept zero is stored.
        int8: round the weights to 127 steps on each side, max |w| / 127 apart.

    Raises:
        ValueError: kernels that keep differently many taps, or too many taps.
    """
    weight, mask = weight.detach().cpu().flatten(2), mask.cpu().flatten(2)
    n, taps = int(mask[0, 0].sum()), mask.shape[2]
    if (mask.sum(-1) != n).any():
        raise ValueError("mask: SPM stores kernels that all keep equally many weights.")
    if taps > 16:
        raise ValueError(f"mask: SPM stores kernels of up to 16 taps, got {taps}.")
    values = (mask * 2 ** torch.arange(taps)).sum(-1)
    table, codes = values.unique(return_inverse=True)
    kernels = weight[mask].view(-1, n)
    scale = float(kernels.abs().max()) / 127 if int8 else 1.0
    if int8:
        scale = scale or 1.0  # of a layer of zeros
        kernels = (kernels.float() / scale).round().to(torch.int8)
    bits = (len(table) - 1).bit_length()
    shape = (*values.shape, *_kernel_size(taps))
    return SPM(shape, n, table.to(torch.uint16), pack_bits(codes, bits, low_first=True), kernels, scale)


def decode_spm(packed: SPM) -> tuple[Tensor, Tensor]:
    """Weight and mask, (C_out, C_in, kh, kw)."""
    filters, channels, *kernel = packed.shape
    table = packed.table.long()[:, None] >> torch.arange(kernel[0] * kernel[1]) & 1
    mask = table[unpack_bits(packed.codes, packed.bits, filters * channels, low_first=True)].bool().view(packed.shape)
    values = packed.weight * packed.scale if packed.weight.dtype == torch.int8 else packed.weight
    weight = values.new_zeros(packed.shape)
    weight[mask] = values.flatten()
    return weight, mask


# ---- files

Packed = TypeVar("Packed", FKW, SPM)


def save_fkw(path: str | Path, layers: Mapping[str, FKW]) -> int:
    """Write layers by name into one file, readable with `weights_only=True`; returns its size in bytes."""
    return _save(path, "fkw", layers)


def load_fkw(path: str | Path) -> dict[str, FKW]:
    """Read what :func:`save_fkw` wrote.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: the file is none of these, or is cut short.
    """
    return _load(path, "fkw", FKW)


def save_spm(path: str | Path, layers: Mapping[str, SPM]) -> int:
    """Write layers by name into one file, readable with `weights_only=True`; returns its size in bytes."""
    return _save(path, "spm", layers)


def load_spm(path: str | Path) -> dict[str, SPM]:
    """Read what :func:`save_spm` wrote; raises as :func:`load_fkw` does."""
    return _load(path, "spm", SPM)


def _save(path: str | Path, kind: str, layers: Mapping[str, FKW | SPM]) -> int:
    header, chunks = {}, []
    for name, layer in layers.items():
        arrays = layer.arrays
        table = arrays.pop("table", None)
        own: dict[str, Any] = {key: value for key, value in vars(layer).items() if key not in arrays}
        if table is not None:
            own["table"] = table
        own["arrays"] = [[key, str(array.dtype).partition(".")[2], list(array.shape)] for key, array in arrays.items()]
        header[name] = own
        chunks += [array.contiguous().flatten().view(torch.uint8) for array in arrays.values()]
    data = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.uint8)
    torch.save({"format": kind, "version": 1, "layers": header, "data": data}, path)
    return Path(path).stat().st_size


def _load(path: str | Path, kind: str, packed: type[Packed]) -> dict[str, Packed]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file at {str(path)!r}.")
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if saved["format"] != kind or saved["version"] != 1:
            raise ValueError(f"it holds {saved['format']!r}, version {saved['version']}")
        layers, start = {}, 0
        for name, own in saved["layers"].items():
            arrays = {}
            for key, dtype, shape in own.pop("arrays"):
                array = torch.empty(shape, dtype=getattr(torch, dtype))
                piece = saved["data"][start : start + array.nbytes]
                arrays[key] = piece.clone().view(array.dtype).view(shape)
                start += array.nbytes
            layers[name] = packed(**own, **arrays)
    except Exception as error:
        raise MisconfigurationException(
            f"{str(path)!r} cannot be read as {kind.upper()} ({type(error).__name__}: {error})."
        ) from error
    return layers


def _pattern_ids(mask: Tensor, library: Tensor) -> Tensor:
    """Number of the pattern that each kernel (..., taps) is, int64; -1 for those that are none."""
    same = (mask[..., None, :] == library).all(-1)
    return torch.where(same.any(-1), same.int().argmax(-1), -1)


def _pad(rows: Tensor, block: int) -> Tensor:
    """Fill the last block of rows with zeros."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % block, *rows.shape[1:])])


def _kernel_size(taps: int) -> tuple[int, int]:
    side = round(taps**0.5)
    return (side, side) if side * side == taps else (1, taps)
