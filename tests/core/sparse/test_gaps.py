"""Storage by gaps: round trips, the size of the formula, entries of zeros."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_compress.core.sparse.gaps import code_bits, decode_gaps, encode_gaps, load_gaps, save_gaps


def sparse(seed: int, *shape: int, share: float = 0.1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < share)


@pytest.mark.parametrize("index_bits", [None, 1, 3, 8])
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (20, 30), (4, 1, 5, 5)])
def test_single_weights_are_lossless(index_bits: int | None, shape: tuple[int, ...]) -> None:
    weight = sparse(0, *shape)
    packed = encode_gaps(weight, index_bits=index_bits)
    assert torch.equal(decode_gaps(packed), weight)
    assert packed.nbytes == packed.rows.nbytes + -(-packed.entries * packed.index_bits // 8) + packed.entries * 4


def test_entries_of_zeros_by_hand() -> None:
    """k = 2: after 4 zeros in a row one entry stands for these; 9 zeros before a weight are two of them and a gap 1."""
    weight = torch.zeros(1, 16)
    weight[0, 9], weight[0, 10], weight[0, 15] = 2.0, 3.0, 4.0
    packed = encode_gaps(weight, index_bits=2)
    assert packed.values.flatten().tolist() == [0, 0, 2, 3, 0, 4]
    gaps = [packed.gaps[i // 4] >> 2 * (i % 4) & 3 for i in range(6)]
    assert [int(gap) for gap in gaps] == [3, 3, 1, 0, 3, 0]
    assert torch.equal(decode_gaps(packed), weight)


@pytest.mark.parametrize("index_bits", [3, 4, 5, 6])
def test_random_zeros_take_what_the_formula_says(index_bits: int) -> None:
    """(1 / P) (b + k) / (1 - (1 - 1/P)^(2^k)), arXiv:1907.02124, with P = 10."""
    weight = sparse(1, 1000, 1000)
    rate = weight.numel() / int(weight.count_nonzero())
    packed = encode_gaps(weight, index_bits=index_bits)
    expected = (32 + index_bits) / rate / (1 - (1 - 1 / rate) ** 2**index_bits)
    assert 8 * packed.nbytes / weight.numel() == pytest.approx(expected, rel=3e-3)
    assert encode_gaps(weight).nbytes <= packed.nbytes


@pytest.mark.parametrize(("levels", "bits"), [(1, 1), (7, 4), (8, 4), (128, 8)])
def test_codes(levels: int, bits: int) -> None:
    codes = torch.randint(1, levels + 1, (30, 40), generator=torch.Generator().manual_seed(2)).float()
    codes = codes * sparse(3, 30, 40, share=1.0).sign()
    step = 0.1
    dense = encode_gaps(codes * step, step=step, levels=levels)
    assert (dense.index_bits, dense.value_bits) == (0, bits)
    assert dense.nbytes == 1200 * bits / 8
    assert torch.equal(decode_gaps(dense), codes * step)
    few = codes * step * (sparse(4, 30, 40) != 0)
    assert torch.equal(decode_gaps(encode_gaps(few, step=step, levels=levels)), few)
    assert torch.equal(decode_gaps(encode_gaps(few, step=step, levels=levels, index_bits=1)), few)  # needs zeros
    assert code_bits(levels, True) == (2 * levels).bit_length()


def test_columns_kernels_and_filters() -> None:
    weight = sparse(5, 12, 6, 3, 3, share=1.0)
    columns, kernels, filters = weight.clone(), weight.clone(), weight.clone()
    columns[:, sparse(6, 6, 3, 3, share=0.6) == 0] = 0
    kernels[sparse(7, 12, 6, share=0.5) == 0] = 0
    filters[::3] = 0
    for value, unit in ((columns, "column"), (kernels, "kernel"), (filters, "column")):
        packed = encode_gaps(value, unit)  # type: ignore[arg-type]
        assert torch.equal(decode_gaps(packed), value)
        assert packed.values.numel() == value.count_nonzero()
    assert (packed.index_bits, packed.index_bytes) == (0, 2)  # twelve bits


def test_nothing_is_left() -> None:
    packed = encode_gaps(torch.zeros(4, 4))
    assert packed.entries == 0
    assert torch.equal(decode_gaps(packed), torch.zeros(4, 4))


def test_files(tmp_path: Path) -> None:
    layers = {"a": encode_gaps(sparse(8, 20, 20)), "b": encode_gaps(torch.ones(3, 3), step=1.0, levels=1)}
    path = tmp_path / "some.gaps"
    assert save_gaps(path, layers) == path.stat().st_size
    for name, layer in load_gaps(path).items():
        assert torch.equal(decode_gaps(layer), decode_gaps(layers[name]))
    whole = path.read_bytes()
    bad: list[tuple[Any, str]] = [
        (whole[: len(whole) // 2], "cannot be read"),
        (pickle.dumps({"format": encode_gaps}, protocol=2), "cannot be read"),
    ]
    for content, message in bad:
        path.write_bytes(content)
        with pytest.raises(MisconfigurationException, match=message):
            load_gaps(path)
    with pytest.raises(FileNotFoundError, match=r"none\.gaps"):
        load_gaps(tmp_path / "none.gaps")
