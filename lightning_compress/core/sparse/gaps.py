"""Storage of sparse weights by the gaps between them: relative indices of k bits, as in compressed rows.

Each entry is a gap, the number of units skipped since the last one, 0 to 2^k - 1, and the values of a unit. After 2^k
empty units in a row an entry of zeros is stored for them. A unit is a single weight, a kernel or a column (one tap of
one input channel in all filters); filters that are empty are left out first, by a bit per filter. Values are floating
point, or codes of few bits with one step per layer. k is chosen for the smallest size; without gaps there is no index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_compress.core.sparse.bit_packing import pack_bits, pack_mask, unpack_bits, unpack_mask

Unit = Literal["weight", "kernel", "column"]
MAX_INDEX_BITS = 16


@dataclass(frozen=True)
class Gaps:
    """One layer, on the CPU.

    Attributes:
        shape: of the weight.
        unit: what an entry holds.
        entries: how many there are, with those of zeros.
        index_bits: k, 0 where nothing is skipped.
        rows: a bit per filter, 1 where it stays; no bytes where all stay.
        gaps: `entries` numbers of k bits.
        values: (entries, size of a unit) floating point, or their codes as bits.
        step: what a code is multiplied by; 0 for floating point.
        levels: M, codes are -M to M; 0 for floating point.
        zero: whether 0 is among the codes; else they take one bit less where 2 M is a power of two.
    """

    shape: tuple[int, ...]
    unit: Unit
    entries: int
    index_bits: int
    rows: Tensor
    gaps: Tensor
    values: Tensor
    step: float = 0.0
    levels: int = 0
    zero: bool = False

    @property
    def value_bits(self) -> int:
        """Bits of a value."""
        return code_bits(self.levels, self.zero) if self.levels else 8 * self.values.element_size()

    @property
    def index_bytes(self) -> int:
        return self.rows.nbytes + self.gaps.nbytes

    @property
    def nbytes(self) -> int:
        """Indices and values."""
        return self.index_bytes + self.values.nbytes


def code_bits(levels: int, zero: bool) -> int:
    """Bits for the codes -M to M, with or without 0.

    >>> code_bits(8, zero=False), code_bits(7, zero=True), code_bits(1, zero=False)
    (4, 4, 1)
    """
    return (2 * levels + zero - 1).bit_length()


def encode_gaps(
    weight: Tensor, unit: Unit = "weight", *, step: float = 0.0, levels: int = 0, index_bits: int | None = None
) -> Gaps:
    """Pack what is not zero.

    Args:
        weight: (C_out, C_in, ...) or (out, in).
        unit: what is zero together.
        step: of quantised weights, which are whole multiples of it.
        levels: M, of quantised weights; 0 stores them as they are.
        index_bits: k; the best one if None.
    """
    weight = weight.detach().cpu()
    alive = (weight != 0).flatten(1).any(1)
    units = _units(weight[alive], unit)
    kept = (units != 0).any(1)
    positions = kept.nonzero()[:, 0]
    skipped = positions.diff(prepend=positions.new_tensor([-1])) - 1
    size = units.shape[1]

    def cost(k: int) -> int:
        dummies = int((skipped >> k).sum())
        has_zero = dummies > 0 or bool((units[kept] == 0).any())
        width = code_bits(levels, has_zero) if levels else 8 * weight.element_size()
        return (len(positions) + dummies) * (k + size * width)

    if index_bits is None:
        index_bits = 0 if bool(kept.all()) else min(range(1, MAX_INDEX_BITS + 1), key=cost)
    dummies = skipped >> index_bits
    place = (dummies + 1).cumsum(0) - 1
    entries = int(place[-1]) + 1 if len(place) else 0
    gaps = torch.full((entries,), 2**index_bits - 1)
    gaps[place] = skipped & (2**index_bits - 1)
    values = units.new_zeros(entries, size)
    values[place] = units[kept]
    zero = bool((values == 0).any())
    if levels:
        codes = (values / step).round().long().flatten()
        coded = codes + levels - (0 if zero else (codes > 0).long())
        values = pack_bits(coded, code_bits(levels, zero), low_first=True)
    rows = torch.empty(0, dtype=torch.uint8) if bool(alive.all()) else pack_mask(alive)
    packed = pack_bits(gaps, index_bits, low_first=True)
    return Gaps(tuple(weight.shape), unit, entries, index_bits, rows, packed, values, step, levels, levels > 0 and zero)


def decode_gaps(packed: Gaps) -> Tensor:
    """The weight; quantised ones as code times step, in float32."""
    filters = packed.shape[0]
    alive = unpack_mask(packed.rows, (filters,)) if packed.rows.numel() else torch.ones(filters, dtype=torch.bool)
    empty = torch.zeros(int(alive.sum()), *packed.shape[1:])
    units = torch.zeros_like(_units(empty, packed.unit))
    values = packed.values
    if packed.levels:
        count = packed.entries * units.shape[1]
        codes = unpack_bits(values, packed.value_bits, count, low_first=True) - packed.levels
        values = (codes if packed.zero else codes + (codes >= 0)) * torch.tensor(packed.step)
        values = values.view(packed.entries, -1)
    gaps = unpack_bits(packed.gaps, packed.index_bits, packed.entries, low_first=True)
    places = (gaps + 1).cumsum(0) - 1
    units = units.to(values.dtype)
    units[places] = values
    weight = torch.zeros(packed.shape, dtype=units.dtype)
    weight[alive] = _from_units(units, packed.unit, empty.shape)
    return weight


def save_gaps(path: str | Path, layers: Mapping[str, Gaps]) -> int:
    """Write layers by name into one file, readable with `weights_only=True`; returns its size in bytes."""
    torch.save({"format": "gaps", "version": 1, "layers": {name: vars(layer) for name, layer in layers.items()}}, path)
    return Path(path).stat().st_size


def load_gaps(path: str | Path) -> dict[str, Gaps]:
    """Read what :func:`save_gaps` wrote.

    Raises:
        FileNotFoundError: no such file.
        MisconfigurationException: the file is none of these, or is cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file at {str(path)!r}.")
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if saved["format"] != "gaps" or saved["version"] != 1:
            raise ValueError(f"it holds {saved['format']!r}, version {saved['version']}")
        return {name: Gaps(**layer) for name, layer in saved["layers"].items()}
    except Exception as error:
        raise MisconfigurationException(
            f"{str(path)!r} cannot be read as sparse weights ({type(error).__name__}: {error})."
        ) from error


def _units(weight: Tensor, unit: Unit) -> Tensor:
    """(units, size)."""
    if unit == "weight":
        return weight.reshape(-1, 1)
    if unit == "kernel":
        return weight.reshape(weight.shape[0] * weight.shape[1], math.prod(weight.shape[2:]))
    return weight.flatten(1).T


def _from_units(units: Tensor, unit: Unit, shape: torch.Size) -> Tensor:
    return (units.T if unit == "column" else units).reshape(shape)
