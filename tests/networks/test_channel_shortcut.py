from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lightning_compress.networks import ChannelShortcut


@pytest.fixture
def x():
    return torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


def by_definition(shortcut: ChannelShortcut, x: torch.Tensor) -> torch.Tensor:
    """The map as a matrix product with ``select``, apart from the subsampling."""
    x = x[:, :, :: shortcut.stride, :: shortcut.stride]
    return torch.einsum("oi,bihw->bohw", shortcut.select.to(x.dtype), x)


@pytest.mark.parametrize(("out_channels", "first"), [(32, 8), (64, 24), (21, 2)])
def test_dense_shortcut_centres_the_channels(x, out_channels, first):
    out = ChannelShortcut(16, out_channels, stride=2)(x)
    assert out.shape == (2, out_channels, 3, 3)
    assert torch.equal(out[:, first : first + 16], x[:, :, ::2, ::2])
    assert out[:, :first].abs().sum() == out[:, first + 16 :].abs().sum() == 0


def test_dense_shortcut_crops(x):
    # Floor division: -2 in front and -1 behind.
    assert torch.equal(ChannelShortcut(16, 13)(x), x[:, 2:15])


def test_same_shape_is_the_input_itself(x):
    assert ChannelShortcut(16, 16)(x) is x


def test_state_dict_is_empty():
    assert not ChannelShortcut(16, 32, stride=2).state_dict()


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([8, 9, 12, 30], range(16)),
        (range(32), [0, 3, 4, 15]),
        ([0, 1, 2, 23], [1, 2, 15]),
        ([0, 1, 2, 3], range(16)),  # nothing is left alive
        (range(6, 28), range(16)),  # still regular
        (range(8, 24), range(16)),  # the identity
    ],
)
def test_surgery_slices_the_map(x, rows, columns):
    rows, columns = list(rows), list(columns)
    shortcut = ChannelShortcut(16, 32, stride=2)
    dense = shortcut(x.index_fill(1, torch.tensor([c for c in range(16) if c not in columns]).long(), 0))
    shortcut.select = shortcut.select[rows][:, columns]
    shortcut.after_surgery()
    assert (shortcut.out_channels, shortcut.in_channels) == (len(rows), len(columns))
    narrow = x[:, columns]
    assert torch.equal(shortcut(narrow), dense[:, rows])
    assert torch.equal(shortcut(narrow), by_definition(shortcut, narrow))
    for twin in (copy.deepcopy(shortcut), pickle.loads(pickle.dumps(shortcut))):
        assert torch.equal(twin(narrow), shortcut(narrow))
    assert torch.equal(torch.export.export(shortcut, (narrow,)).module()(narrow), shortcut(narrow))
    assert shortcut.half()(narrow.half()).dtype == torch.float16


def test_regular_maps_need_no_index():
    shortcut = ChannelShortcut(16, 32)
    shortcut.select = shortcut.select[6:28]
    shortcut.after_surgery()
    assert shortcut.offset == 2
    assert shortcut.index is None
    shortcut.select = shortcut.select[[0, 2, 5]]
    shortcut.after_surgery()
    assert shortcut.offset is None
    assert shortcut.index is not None


def test_random_maps_and_gradients(x):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        shortcut = ChannelShortcut(16, 24, stride=2)
        source = torch.randint(-1, 16, (24,), generator=generator)
        shortcut.select = source[:, None] == torch.arange(16)
        shortcut.after_surgery()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert torch.equal(shortcut(a), by_definition(shortcut, b))
        shortcut(a).square().sum().backward()
        by_definition(shortcut, b).square().sum().backward()
        assert torch.allclose(a.grad, b.grad)


def test_errors():
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        ChannelShortcut(16, 16, 0)
    shortcut = ChannelShortcut(2, 2)
    shortcut.select = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="more than one True"):
        shortcut.after_surgery()
