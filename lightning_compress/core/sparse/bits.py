"""Masks as bits: eight weights in a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Bool of any shape -> uint8 (ceil(numel / 8),) on the CPU, row-major, the first element in the highest bit.

    >>> pack_bits(torch.tensor([True, False, True]))
    tensor([160], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().bool().flatten().numpy()))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """What :func:`pack_bits` packed, as bool of its shape.

    Raises:
        ValueError: the bytes are not those of such a mask.

    >>> unpack_bits(torch.tensor([160], dtype=torch.uint8), (3,))
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
