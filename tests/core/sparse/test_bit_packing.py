"""Bits in bytes: the layout, and that nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.core.sparse.bit_packing import bits_for, pack_bits, unpack_bits


def test_highest_bit_first_and_the_rest_as_its_value():
    assert pack_bits(torch.tensor([5, 3, 7, 1]), 3).tolist() == [0b10101111, 0b1001]  # 101 011 111 001
    assert pack_bits(torch.tensor([[1, 2], [3, 0]]), 2).tolist() == [0b01101100]  # row by row
    assert pack_bits(torch.tensor([300]), 9).tolist() == [0b10010110, 0]


@given(bits=st.integers(1, 12), data=st.data())
def test_round_trip(bits: int, data: st.DataObject):
    values = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), dtype=torch.int64)
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-bits * len(values) // 8)
    assert torch.equal(unpack_bits(packed, bits, len(values)), values)


def test_lowest_bits_first():
    """4 bits: low nibble first; 3 bits: eight numbers in three bytes; 2 bits: four in a byte."""
    assert pack_bits(torch.tensor([1, 2, 15]), 4, low_first=True).tolist() == [0x21, 0x0F]
    assert pack_bits(torch.tensor([1, 2, 3, 0]), 2, low_first=True).tolist() == [0b00111001]
    eight = torch.arange(8)
    packed = pack_bits(eight, 3, low_first=True)
    assert sum(byte << 8 * place for place, byte in enumerate(packed.tolist())) == sum(v << 3 * v for v in range(8))


@given(bits=st.integers(0, 12), data=st.data())
def test_round_trip_with_lowest_bits_first(bits: int, data: st.DataObject):
    values = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), dtype=torch.int64)
    packed = pack_bits(values, bits, low_first=True)
    assert len(packed) == -(-bits * len(values) // 8)
    assert torch.equal(unpack_bits(packed, bits, len(values), low_first=True), values)


def test_numbers_that_do_not_fill_their_bytes():
    """N * C * bits that 8 does not divide."""
    values = torch.arange(7 * 3).view(7, 3) % 5
    packed = pack_bits(values.to(torch.uint8), bits_for(5))
    assert len(packed) == 8  # ceil(63 / 8)
    assert torch.equal(unpack_bits(packed, 3, 21).view(7, 3), values)


def test_a_single_value_takes_no_byte():
    assert bits_for(1) == 0
    assert pack_bits(torch.zeros(9, 4), 0).tolist() == []
    assert unpack_bits(torch.empty(0, dtype=torch.uint8), 0, 36).tolist() == [0] * 36


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"bits=2 hold 0 to 3, got 1 to 4"):
        pack_bits(torch.tensor([1, 4]), 2)
    with pytest.raises(ValueError, match=r"packed: 3 numbers of 3 bits take 2 bytes, got 1"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 3, 3)
