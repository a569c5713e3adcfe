"""Weight gradients of some filters: those of a dense convolution, and zeros."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import grad

from lightning_compress.core.quant.live_conv import computed_filters, rest_filters, wake_filters

LAYERS = {
    "3x3": (lambda: nn.Conv2d(5, 48, 3, padding=1), (2, 5, 6, 6)),
    "strided": (lambda: nn.Conv2d(5, 48, 3, stride=2, padding=2, dilation=2, bias=False), (2, 5, 9, 9)),
    "1d": (lambda: nn.Conv1d(5, 48, 3), (2, 5, 9)),
    "3d": (lambda: nn.Conv3d(5, 48, 2), (2, 5, 3, 3, 3)),
}


def resting(total, live, seed=0):
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:live]
    return torch.ones(total, dtype=torch.bool).index_fill(0, chosen, False)


@pytest.mark.parametrize("live", [0, 10, 30])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_dense_one(name, live):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(shape, requires_grad=True)
    y = layer(x)
    weights = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    expected = grad((y * weights).sum(), wanted)
    rests = resting(48, live)
    assert rest_filters(layer, rests)
    again = layer(x)
    assert torch.equal(again, y)
    found = grad((again * weights).sum(), wanted)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if index == 1:
            computed = computed_filters(rests)
            assert set((~rests).nonzero().flatten().tolist()) <= set(computed.tolist())
            left = torch.ones(48, dtype=torch.bool).index_fill(0, computed, False)
            assert one[left].count_nonzero() == 0
            one, other = one[computed], other[computed]
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_numbers_that_run_fast():
    for total, live, count in ((64, 1, 32), (64, 33, 64), (128, 65, 96), (32, 5, 16), (32, 17, 32), (16, 1, 16)):
        assert len(computed_filters(resting(total, live))) == count
    assert len(computed_filters(resting(64, 0))) == 0


def test_what_stays_as_it_is():
    all_rest = torch.ones(64, dtype=torch.bool)
    for layer in (
        nn.Conv2d(64, 64, 3, groups=2),
        nn.Conv2d(3, 64, 3, padding="same"),
        nn.Conv2d(3, 64, 3, padding=1, padding_mode="reflect"),
        nn.Linear(3, 64),
        nn.ConvTranspose2d(3, 64, 3),
    ):
        assert not rest_filters(layer, all_rest)
    layer = nn.Conv2d(3, 64, 3)
    assert not rest_filters(layer, resting(64, 60))  # nothing to gain


def test_it_is_copied_and_taken_off():
    layer = nn.Conv2d(3, 32, 3)
    before = set(vars(layer))
    assert rest_filters(layer, torch.ones(32, dtype=torch.bool))
    x = torch.randn(1, 3, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    wake_filters(layer)
    wake_filters(layer)
    assert set(vars(layer)) == before


def test_it_runs_under_autocast():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 32, 3), torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        rest_filters(layer, resting(32, 4))
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
