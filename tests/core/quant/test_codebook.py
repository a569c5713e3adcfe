"""Codebooks: the layout of indices, sizes, and that nothing is lost in a file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_compress.core.quant.attach import quantize_weight
from lightning_compress.core.quant.codebook import (
    codebooks_of,
    encode_codebook,
    load_codebooks,
    read_codebooks,
    save_codebooks,
)
from lightning_compress.core.sparse.learnt_mask import insert_mask
from lightning_compress.core.surgery import Cut, attach_record

T = torch.tensor
LEVELS = T([0.0, 0.3, -0.2, 0.1])


class Nearest(nn.Module):
    """A quantiser with four values."""

    def codes(self, weight):
        return (weight[..., None] - LEVELS).abs().argmin(-1)

    def forward(self, weight):
        return LEVELS[self.codes(weight)]

    def codebook(self, weight):
        return encode_codebook(self.codes(weight), LEVELS, 2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 4)
    )


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)


def quantised():
    made = network()
    for index in (0, 3):
        quantize_weight(made[index], Nearest())
    return made


def test_zero_comes_first_and_the_others_ascend():
    book = encode_codebook(T([[0, 1], [2, 3]]), LEVELS, 2, sparse=False)
    torch.testing.assert_close(book.values, T([0.0, -0.2, 0.1, 0.3]))
    assert book.indices().tolist() == [[0, 3], [1, 2]]
    assert book.packed.tolist() == [0b10_01_11_00]
    torch.testing.assert_close(book.decode(), T([[0.0, 0.3], [-0.2, 0.1]]))


@pytest.mark.parametrize(("bits", "size"), [(2, 36), (3, 54), (4, 72)])
def test_size_is_that_of_indices_and_values(bits, size):
    codes = torch.arange(144).view(4, 4, 3, 3) % 2**bits
    levels = torch.linspace(0, 1, 2**bits)
    book = encode_codebook(codes, levels, bits, sparse=False)
    assert book.index_bytes == size
    assert book.nbytes == size + 4 * (2**bits - 1)
    assert (book.weights, book.nonzeros) == (144, 144 - 144 // 2**bits)


def test_many_zeros_take_a_bit_each():
    codes = torch.zeros(1000, dtype=torch.uint8)
    codes[::10] = 3
    levels = torch.linspace(0, 1, 16)
    book, dense = encode_codebook(codes, levels, 4), encode_codebook(codes, levels, 4, sparse=False)
    assert (book.index_bytes, dense.index_bytes) == (125 + 50, 500)
    assert torch.equal(book.indices(), dense.indices())
    assert len(encode_codebook(torch.arange(16), levels, 4).kept) == 0


@given(bits=st.integers(2, 8), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_round_trip(bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, shape, generator=generator)
    levels = torch.cat([torch.zeros(1), torch.randn(2**bits - 1, generator=generator)])
    for sparse in (None, False, True):
        assert torch.equal(encode_codebook(codes, levels, bits, sparse=sparse).decode(), levels[codes])


def test_levels_that_cannot_be():
    with pytest.raises(ValueError, match=r"at most 4 for bits=2, the first of them 0"):
        encode_codebook(T([0]), T([0.5, 1.0]), 2)
    with pytest.raises(ValueError, match=r"at most 4 for bits=2"):
        encode_codebook(T([0]), torch.zeros(5), 2)


def test_a_file_is_a_whole_network(tmp_path):
    made, plain, x = quantised().eval(), network(), torch.rand(2, 3, 8, 8)
    made[1].running_mean += 1
    size = save_codebooks(made, tmp_path / "sub" / "net.codebooks")
    assert size == (tmp_path / "sub" / "net.codebooks").stat().st_size
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    load_codebooks(plain, tmp_path / "sub" / "net.codebooks")
    assert torch.equal(plain.eval()(x), made(x))
    layers, others, cuts = read_codebooks(tmp_path / "sub" / "net.codebooks")
    assert list(layers) == ["0", "3"]
    assert "0.weight" not in others
    assert others["1.num_batches_tracked"].dtype == torch.int64
    assert cuts == []


def test_masks_come_before_the_codebook(tmp_path):
    class Half(nn.Module):
        def forward(self, weight):
            return torch.where(torch.arange(8)[:, None, None, None] < 4, weight, 0)

    made = quantised()
    insert_mask(made[0], Half())
    assert (codebooks_of(made)["0"].decode()[4:] == 0).all()
    assert torch.equal(codebooks_of(made)["0"].decode(), made[0].weight)


def test_channels_that_went_are_gone_in_the_file(tmp_path):
    kept = T([0, 1, 2, 5])
    cuts = [Cut("0.weight", 0, 8, kept), Cut("0.bias", 0, 8, kept), Cut("3.weight", 1, 8, kept)]
    cuts += [Cut(f"1.{name}", 0, 8, kept) for name in ("weight", "bias", "running_mean", "running_var")]
    narrow = Whole()
    attach_record(narrow).cut(narrow, [c._replace(tensor=f"net.{c.tensor}") for c in cuts], by="test", epoch=0)
    for index in (0, 3):
        quantize_weight(narrow.net[index], Nearest())
    save_codebooks(narrow, tmp_path / "net.codebooks")
    load_codebooks(plain := Whole(), tmp_path / "net.codebooks")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(plain.eval()(x), narrow.eval()(x))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="no layer of Sequential has a quantiser with a codebook"):
        save_codebooks(network(), tmp_path / "net.codebooks")
    with pytest.raises(FileNotFoundError, match=r"net\.codebooks"):
        load_codebooks(network(), tmp_path / "net.codebooks")
    save_codebooks(quantised(), tmp_path / "net.codebooks")
    with pytest.raises(MisconfigurationException, match="does not fit Linear"):
        load_codebooks(nn.Linear(2, 2), tmp_path / "net.codebooks")
    whole = (tmp_path / "net.codebooks").read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MisconfigurationException, match="cannot be read as codebooks"):
        load_codebooks(network(), tmp_path / "short")
    torch.save({"format": "gaps", "version": 1}, tmp_path / "other")
    with pytest.raises(MisconfigurationException, match="it holds 'gaps', version 1"):
        read_codebooks(tmp_path / "other")
