"""FKW and SPM: lossless, as large as their formulas say, readable safely; and the lists for a kernel."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.sparse.formats import (
    FKW,
    csr_bytes,
    decode_fkw,
    decode_spm,
    encode_fkw,
    encode_spm,
    filter_kernel_reorder,
    fkw_lists,
    load_fkw,
    load_spm,
    save_fkw,
    save_spm,
)
from lightning_compress.core.sparse.patterns import (
    NATURAL8,
    SCP4,
    all_patterns,
    best_patterns,
    kernel_mask,
    library_of,
    pattern_mask,
)

SCP, NATURAL = library_of(SCP4), library_of(NATURAL8)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def masked(seed: int, shape: tuple[int, ...], rate: float = 3.6, balance: str = "filter", block: int = 1) -> tuple:
    weight = normal(seed, *shape)
    return weight, kernel_mask(weight, NATURAL, rate, balance, block)  # type: ignore[arg-type]


# ---- FKW


@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("balance", ["filter", "layer"])
def test_fkw_is_lossless(block: int, balance: str) -> None:
    weight, mask = masked(0, (13, 8, 3, 3), balance=balance, block=block)
    weight[0, mask[0].flatten(1).any(1)] = 0  # kept zeros stay
    packed = encode_fkw(weight, mask, NATURAL, block)
    again, stays = decode_fkw(packed)
    assert torch.equal(stays, mask)
    assert torch.equal(again, weight * mask)
    kernels = int(mask.flatten(2).any(-1)[::block].sum())
    blocks = len(packed.reorder)
    assert packed.index_bytes == 2 * blocks + 4 * (blocks + 1) + 2 * kernels + 2 * blocks * (8 + 1)
    assert packed.nbytes == packed.index_bytes + 4 * 4 * kernels * block


@pytest.mark.parametrize(("balance", "kernels", "size", "csr"),
                         [("layer", 72_818, 157_928, 1_167_140), ("filter", 73_216, 158_724, 1_173_508)])  # fmt: skip
def test_bytes_of_a_large_layer(balance: str, kernels: int, size: int, csr: int) -> None:
    """512 x 512 kernels, 3.6 times fewer: what PatDNN (arXiv:2001.00138) counts, against compressed rows."""
    weight, mask = masked(1, (512, 512, 3, 3), balance=balance)
    packed = encode_fkw(weight, mask, NATURAL)
    assert (len(packed.index), packed.index_bytes) == (kernels, size)
    assert csr_bytes(int(mask.sum()), 512) == csr


def test_filters_and_kernels_are_in_order() -> None:
    weight, mask = masked(2, (24, 16, 3, 3), balance="layer")
    packed = encode_fkw(weight, mask, NATURAL)
    counts = packed.offset.diff()
    assert (counts.diff() <= 0).all()  # most kernels first
    ids = best_patterns(weight, NATURAL)
    kept = mask.flatten(2).any(-1)
    for place, filter in enumerate(packed.reorder.tolist()):
        mine = packed.index[packed.offset[place] : packed.offset[place + 1]].tolist()
        assert mine == sorted(kept[filter].nonzero().flatten().tolist(), key=lambda c: (ids[filter, c], c))
        runs = packed.stride.view(24, 9)[place].tolist()
        assert runs[-1] == counts[place]
        for pattern in range(8):
            assert (ids[filter, mine[runs[pattern] : runs[pattern + 1]]] == pattern).all()


def test_filters_that_are_alike_stand_together() -> None:
    weight = normal(3, 4, 6, 3, 3)
    both = torch.cat([weight, weight])[[0, 5, 2, 7, 4, 1, 6, 3]]  # rows i and i + 4 are twins
    order = filter_kernel_reorder(kernel_mask(both, NATURAL, 2.0), NATURAL)
    assert [(a - b) % 4 for a, b in order.view(4, 2).tolist()] == [0] * 4


def test_what_fkw_cannot_store_is_refused() -> None:
    weight, mask = masked(4, (4, 4, 3, 3))
    with pytest.raises(ValueError, match="no pattern of the library"):
        encode_fkw(weight, mask, SCP)
    with pytest.raises(ValueError, match="block of 2"):
        encode_fkw(weight, mask, NATURAL, block=2)
    with pytest.raises(ValueError, match="65535"):
        encode_fkw(torch.zeros(1, 2**16, 1, 1), torch.ones(1, 2**16, 1, 1, dtype=torch.bool), torch.ones(1, 1).bool())


def test_single_weights_and_depthwise_kernels() -> None:
    point = normal(5, 6, 10, 1, 1)
    mask = kernel_mask(point, None, 2.0)
    assert torch.equal(decode_fkw(encode_fkw(point, mask, torch.ones(1, 1).bool()))[0], point * mask)
    deep, own = masked(6, (10, 1, 3, 3), rate=1.0)
    assert torch.equal(decode_fkw(encode_fkw(deep, own, NATURAL))[0], deep * own)
    assert decode_fkw(encode_fkw(deep.half(), own, NATURAL))[0].dtype == torch.float16


# ---- lists for a kernel


@pytest.mark.parametrize("block", [1, 4, 8])
def test_lists_compute_the_convolution(block: int) -> None:
    weight, mask = masked(7, (10, 6, 3, 3), rate=2.0, block=block)
    packed = encode_fkw(weight, mask, NATURAL, block)
    index, offset, values, filters = fkw_lists(packed)
    assert {array.dtype for array in (index, offset, filters)} == {torch.int32}
    assert torch.equal(filters[::block], packed.reorder.int() * block)
    images = normal(8, 2, 6, 5, 7)
    columns = F.unfold(images, 3, padding=1)  # (N, channel * 9 + tap, positions)
    out = torch.zeros(2, 10, 35)
    for number, own in enumerate(filters.view(-1, block)):
        part = slice(int(offset[number]), int(offset[number + 1]))
        assert (index[part].diff() > 0).all()
        out[:, own[own >= 0]] = (values[part].T @ columns[:, index[part]])[:, own >= 0]
    torch.testing.assert_close(out.view(2, 10, 5, 7), F.conv2d(images, weight * mask, padding=1))


# ---- SPM


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 7), st.integers(1, 40), st.integers(1, 4))
def test_spm_is_lossless(seed: int, filters: int, channels: int, patterns: int, n: int) -> None:
    weight = normal(seed, filters, channels, 3, 3)
    weight[0, 0] = 0
    library = all_patterns(n)[:patterns]
    mask = pattern_mask(best_patterns(weight, library), library)
    packed = encode_spm(weight, mask)
    again, stays = decode_spm(packed)
    assert torch.equal(stays, mask)
    assert torch.equal(again, weight * mask)
    kernels = filters * channels
    assert packed.nbytes == -(-kernels * packed.bits // 8) + 4 * kernels * n
    assert len(packed.table) <= len(library)


@pytest.mark.parametrize(("size", "bits"), [(1, 0), (2, 1), (3, 2), (5, 3), (8, 3), (17, 5), (36, 6)])
def test_width_of_a_code(size: int, bits: int) -> None:
    library = all_patterns(2)[:size]
    mask = library.view(1, size, 3, 3)
    assert encode_spm(torch.ones(1, size, 3, 3), mask).bits == bits


@pytest.mark.parametrize(
    ("codes", "values", "stream"),
    [([5, 2, 7], 8, "d501"), ([1, 2, 3, 4, 5], 8, "d158")],
)
def test_bits_of_codes(codes: list[int], values: int, stream: str) -> None:
    """arXiv:2002.04997 as specified: bit t of code j is bit j b + t of the stream, lowest bits of a byte first."""
    library = all_patterns(2)
    order = (library.int() * 2 ** torch.arange(9)).sum(1).argsort()
    table = library[order][:values]
    kernels = torch.cat([torch.tensor(codes), torch.arange(values)])  # all of them, so that the table has them
    packed = encode_spm(torch.ones(1, len(kernels), 3, 3), table[kernels].view(1, -1, 3, 3))
    assert packed.bits == 3
    head = packed.codes.tolist()
    used = 3 * len(codes)
    number = int.from_bytes(bytes(head), "little") % 2**used
    assert number == int.from_bytes(bytes.fromhex(stream), "little")


def test_the_example_of_one_kernel() -> None:
    kernel = torch.tensor([0.1, -0.9, 0.2, 0, 0.5, -0.4, 0.05, 0.3, 0]).view(1, 1, 3, 3)
    library = library_of([(0, 1, 2, 4), (1, 4, 5, 7)])
    weight = torch.cat([kernel, torch.zeros(1, 1, 3, 3)])
    mask = pattern_mask(best_patterns(weight, library), library)
    packed = encode_spm(weight, mask)
    assert packed.table.tolist() == [23, 178]
    assert packed.codes.tolist() == [1]  # code 1, then code 0 for the kernel of zeros
    assert packed.weight.tolist() == [pytest.approx([-0.9, 0.5, -0.4, 0.3]), [0, 0, 0, 0]]


def test_spm_in_eight_bits() -> None:
    weight = normal(10, 8, 8, 3, 3)
    mask = pattern_mask(best_patterns(weight, NATURAL), NATURAL)
    packed = encode_spm(weight, mask, int8=True)
    assert packed.nbytes == 64 * 3 / 8 + 64 * 4
    assert (decode_spm(packed)[0] - weight * mask).abs().max() <= packed.scale / 2 + 1e-6
    zeros = encode_spm(torch.zeros(2, 2, 3, 3), torch.ones(2, 2, 3, 3).bool(), int8=True)
    assert decode_spm(zeros)[0].abs().max() == 0


def test_what_spm_cannot_store_is_refused() -> None:
    with pytest.raises(ValueError, match="equally many"):
        encode_spm(*masked(11, (4, 8, 3, 3)))
    with pytest.raises(ValueError, match="got 25"):
        encode_spm(torch.ones(1, 1, 5, 5), torch.ones(1, 1, 5, 5).bool())


# ---- files


def test_files(tmp_path: Path) -> None:
    one, two = masked(12, (8, 8, 3, 3)), masked(13, (6, 8, 3, 3), block=2)
    layers = {"one": encode_fkw(*one, NATURAL), "two": encode_fkw(*two, NATURAL, block=2)}
    size = save_fkw(tmp_path / "some.fkw", layers)
    stored = torch.load(tmp_path / "some.fkw", weights_only=True)["data"]
    assert stored.nbytes == sum(layer.nbytes for layer in layers.values())
    assert stored.nbytes < size < stored.nbytes + 4_000
    again = load_fkw(tmp_path / "some.fkw")
    assert list(again) == ["one", "two"]
    for name, (weight, mask) in {"one": one, "two": two}.items():
        assert torch.equal(decode_fkw(again[name])[0], weight * mask)
    whole = torch.ones(4, 4, 3, 3, dtype=torch.bool)
    spm = {"a": encode_spm(normal(14, 4, 4, 3, 3), whole), "b": encode_spm(normal(15, 4, 4, 3, 3), whole, int8=True)}
    save_spm(tmp_path / "some.spm", spm)
    for name, packed in load_spm(tmp_path / "some.spm").items():
        assert torch.equal(decode_spm(packed)[0], decode_spm(spm[name])[0])


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "some.fkw"
    with pytest.raises(FileNotFoundError, match=r"some\.fkw"):
        load_fkw(path)
    save_fkw(path, {"one": encode_fkw(*masked(16, (8, 8, 3, 3)), NATURAL)})
    with pytest.raises(MisconfigurationException, match=r"as SPM .*'fkw'"):
        load_spm(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MisconfigurationException, match="cannot be read as FKW"):
        load_fkw(path)
    path.write_bytes(pickle.dumps({"format": FKW}, protocol=2))
    with pytest.raises(MisconfigurationException, match="cannot be read as FKW"):
        load_fkw(path)
