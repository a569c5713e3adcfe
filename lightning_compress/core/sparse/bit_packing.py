"""Small integers, a few bits each, in bytes; and masks, eight weights in a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def bits_for(values: int) -> int:
    """Bits that tell `values` different numbers apart, ceil(log2 values); 0 for a single one.

    >>> [bits_for(n) for n in (1, 2, 3, 16, 17)]
    [0, 1, 2, 4, 5]
    """
    return (values - 1).bit_length()


def pack_bits(values: Tensor, bits: int, *, low_first: bool = False) -> Tensor:
    """Pack integers from 0 to 2^bits - 1 into bytes: any shape, read row by row -> (ceil(count * bits / 8),) uint8.

    Every number is written with its highest bit first. A last byte of which only r bits are used holds their value,
    not moved to its upper end. With 0 bits nothing is written.

    Args:
        low_first: bytes are filled from their lowest bits on, and so are the numbers; on the CPU. With 4 bits the
            first number is the low nibble.

    Raises:
        ValueError: a number needs more bits.

    >>> pack_bits(torch.tensor([1, 2, 3]), 3)  # 00101001|1 -> 41, 1
    tensor([41,  1], dtype=torch.uint8)
    >>> pack_bits(torch.tensor([1, 2, 3]), 4, low_first=True)  # 2, 1|0, 3
    tensor([33,  3], dtype=torch.uint8)
    """
    values = values.flatten().to(torch.int64)
    low, high = (int(x) for x in values.aminmax()) if len(values) else (0, 0)
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"bits={bits} hold 0 to {(1 << bits) - 1}, got {low} to {high}.")
    digits = (values[:, None] >> _places(bits, values)).bitwise_and_(1).to(torch.uint8)
    if low_first:
        return torch.from_numpy(np.packbits(digits.flip(1).cpu().numpy(), bitorder="little"))
    digits = digits.flatten()
    used = digits.numel() % 8
    if used:
        digits = torch.cat([digits[:-used], digits.new_zeros(8 - used), digits[-used:]])
    return (digits.view(-1, 8) << _places(8, digits)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int, *, low_first: bool = False) -> Tensor:
    """What :func:`pack_bits` packed: (ceil(count * bits / 8),) uint8 -> (count,) int64.

    Raises:
        ValueError: `packed` has another length.
    """
    total = bits * count
    if packed.numel() != -(-total // 8):
        raise ValueError(f"packed: {count} numbers of {bits} bits take {-(-total // 8)} bytes, got {packed.numel()}.")
    if low_first:
        stream = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=total, bitorder="little"))
        return (stream.view(count, bits).to(torch.int64) << _places(bits, torch.tensor(0)).flip(0)).sum(1)
    digits = (packed[:, None] >> _places(8, packed)).bitwise_and_(1).flatten()
    if total % 8:
        last = total - total % 8
        digits = torch.cat([digits[:last], digits[-(total % 8) :]])
    return (digits.view(count, bits).to(torch.int64) << _places(bits, packed).to(torch.int64)).sum(1)


def pack_mask(mask: Tensor) -> Tensor:
    """Bool of any shape -> uint8 (ceil(numel / 8),) on the CPU, row-major, the first element in the highest bit.

    >>> pack_mask(torch.tensor([True, False, True]))
    tensor([160], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().bool().flatten().numpy()))


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """What :func:`pack_mask` packed, as bool of its shape.

    Raises:
        ValueError: the bytes are not those of such a mask.

    >>> unpack_mask(torch.tensor([160], dtype=torch.uint8), (3,))
    tensor([ True, False,  True])
    """
    size = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != -(-size // 8):
        raise ValueError(
            f"packed: a mask of shape {tuple(shape)} takes {-(-size // 8)} bytes of uint8, got {packed.numel()} of "
            f"{packed.dtype}."
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=size)
    return torch.from_numpy(bits.view(np.bool_)).view(*shape)


def _places(bits: int, like: Tensor) -> Tensor:
    """How far each digit is shifted, the highest first."""
    return torch.arange(bits - 1, -1, -1, dtype=like.dtype, device=like.device)
