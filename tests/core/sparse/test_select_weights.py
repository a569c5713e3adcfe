"""Selection, groups and bits against slow and obvious references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.core.sparse.bit_packing import pack_mask, unpack_mask
from lightning_compress.core.sparse.nm import from_groups, is_nm, to_groups, top_of_groups, why_not_nm
from lightning_compress.core.sparse.select_weights import drop_lowest, drop_lowest_of_all, kth_smallest

few_values = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, math.inf]), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(values=few_values, share=st.floats(0, 1))
def test_drops_what_a_stable_sort_puts_first(values, share):
    scores, count = torch.tensor(values), round(share * len(values))
    expected = torch.ones(len(values), dtype=torch.bool)
    expected[scores.sort(stable=True).indices[:count]] = False
    assert torch.equal(drop_lowest(scores, count), expected)
    if count:
        assert kth_smallest(scores, count) == scores.sort().values[count - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_shapes(dtype):
    scores = torch.randn(30, 7, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = drop_lowest(scores.transpose(0, 1), 200)
    assert keep.shape == (7, 30, 3)
    assert keep.sum() == 430
    assert scores.transpose(0, 1)[~keep].max() <= scores.transpose(0, 1)[keep].min()


def test_one_ranking_over_several_tensors():
    scores = {"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([1.0, 1.0, 0.0])}
    keep = drop_lowest_of_all(scores, 3)
    assert (keep["a"].tolist(), keep["b"].tolist()) == ([[True, False]], [False, True, False])
    assert drop_lowest_of_all({}, 0) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drop_lowest(torch.ones(3), 4), "count: expected 0 to the number of scores, 3; got 4"),
        (lambda: kth_smallest(torch.ones(3), 0), "k: expected 1 to the number of values, 3; got 0"),
        (lambda: unpack_mask(torch.zeros(2, dtype=torch.uint8), (3,)), "takes 1 bytes of uint8, got 2"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(4, 8), (3, 8, 3, 2)])
def test_groups_and_back(shape):
    weight = torch.arange(float(math.prod(shape))).view(shape)
    groups = to_groups(weight, 4)
    assert groups.shape == (math.prod(shape) // 4, 4)
    assert torch.equal(from_groups(groups, shape), weight)
    if len(shape) == 4:  # the order of the groups: filter, row, column, block of inputs
        assert torch.equal(groups[1], weight[0, 4:8, 0, 0])
        assert torch.equal(groups[2], weight[0, 0:4, 0, 1])
        assert torch.equal(groups[-1], weight[2, 4:8, 2, 1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 3))
def test_the_top_of_each_group_stays(seed, n):
    scores = torch.randint(0, 4, (3, 8, 2, 2), generator=torch.Generator().manual_seed(seed)).float()
    keep = top_of_groups(scores, n, 4)
    assert is_nm(keep, n, 4)
    for row, kept in zip(to_groups(scores, 4), to_groups(keep, 4), strict=True):
        assert kept.nonzero()[:, 0].tolist() == sorted(sorted(range(4), key=lambda i: (row[i], i))[4 - n :])


def test_what_is_no_group():
    assert not is_nm(torch.ones(2, 6), 2, 4)
    assert not is_nm(torch.ones(2, 8), 2, 4)
    assert why_not_nm(nn.Conv2d(8, 8, 3, groups=2), 4) == "is a grouped convolution"
    assert why_not_nm(nn.Linear(8, 3), 4) is None


@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.booleans(), min_size=1, max_size=50))
def test_bits_and_back(bits):
    mask = torch.tensor(bits)
    packed = pack_mask(mask)
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)
