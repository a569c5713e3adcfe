"""One-bit layers: signs and their slopes, standardisation, the pieces attached to a convolution."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.quant.attach import quantize_input
from lightning_compress.core.quant.binary import (
    ChannelScale,
    SampleSign,
    SampleStandard,
    binarize,
    binary_layers,
    is_downsample,
    sample_mean,
    scale_output,
    sign,
    slope,
    standardize,
    unbinarize,
    why_not_binary,
)
from lightning_compress.core.quant.norm_behind import norms_behind

POINTS = torch.tensor([-0.1, 0.0, 0.05, 0.5, 1.0, 2.0])
RBNN, SIMAN = {"eps": 1e-12, "nu": 0.0}, {"eps": 0.0, "nu": 1e-5}


def test_the_sign_of_zero_is_plus():
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-30, -1e-30])
    assert sign(x).tolist() == [-1, 1, 1, 1, -1]
    assert sign(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("k", "t", "expected"),
    [
        pytest.param(1, 1, [1.314214, 1.414214, 1.364214, 0.914214, 0.414214, 0], id="RBNN-t1"),
        pytest.param(1, 10, [4.142136, 14.142136, 9.142136, 0, 0, 0], id="RBNN-t10"),
        pytest.param(100, 0.01, [1.413214, 1.414214, 1.413714, 1.409214, 1.404214, 1.394214], id="RBNN-t0.01"),
        pytest.param(1, 2**0.5, [1.8, 2, 1.9, 1, 0, 0], id="SiMaN-activations"),
    ],
)
def test_slopes(k, t, expected):
    assert slope(POINTS, k, t).tolist() == pytest.approx(expected, abs=2e-6)
    x = POINTS.clone().requires_grad_()
    y = binarize(x, k, t)
    assert torch.equal(y, sign(POINTS))
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("guard", [RBNN, SIMAN], ids=["RBNN", "SiMaN"])
def test_standardize_and_its_gradient(guard):
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.01 + 3

    def plain(x):
        spread = x.var((1, 2, 3), keepdim=True).add(guard["nu"]).sqrt() + guard["eps"]
        return (x - x.mean((1, 2, 3), keepdim=True)) / spread

    weights = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for function in (plain, lambda x: standardize(x, **guard)):
        leaf = x.float().requires_grad_() if function is not plain else x.clone().requires_grad_()
        y = function(leaf)
        (y * weights.to(y.dtype)).sum().backward()
        grads.append((y.detach().double(), leaf.grad.double()))
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grads[1][1], grads[0][1], atol=1e-3 * float(grads[0][1].abs().max()), rtol=1e-3)


@pytest.mark.parametrize("guard", [RBNN, SIMAN], ids=["RBNN", "SiMaN"])
def test_signs_of_samples_and_their_gradient(guard):
    """... are those of standardising, then binarising, one after the other."""
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.3
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    together, apart = (x.clone().requires_grad_() for _ in range(2))
    signs = SampleSign(**guard, k=1.0, t=1.3)(together)
    (signs * weights).sum().backward()
    expected = binarize(standardize(apart, **guard), 1.0, 1.3)
    (expected * weights).sum().backward()
    assert torch.equal(signs, expected)
    torch.testing.assert_close(together.grad, apart.grad, atol=1e-5, rtol=1e-4)


def test_the_small_guard_leaves_tiny_inputs_their_gradient():
    """Streams that start at 1e-8: an eps beside the root keeps the slope's range, one of 1e-5 inside of it does not."""
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-8
    a = standardize(x, **RBNN)
    assert a.std() == pytest.approx(1, abs=1e-3)
    assert standardize(x, **SIMAN).abs().max() < 1e-4


@pytest.mark.parametrize("training", [True, False])
def test_constant_samples_have_a_sign_and_no_nan(training):
    x = torch.full((2, 3, 7, 7), 0.1).requires_grad_()
    module = SampleSign(**RBNN).train(training)
    y = module(x)
    assert (y == 1).all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    with torch.no_grad():
        assert (module(x) == 1).all()
    assert torch.equal(sample_mean(x, exact=False), sample_mean(x))


@pytest.mark.parametrize("module", [SampleSign(**RBNN), SampleStandard(**RBNN)], ids=["1", "32"])
def test_each_sample_for_itself_whatever_its_scale(module):
    x = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    scaled = x * torch.tensor([0.5, 4.0, 8.0]).view(3, 1, 1, 1)
    for run in (module.train(), module.eval()):
        torch.testing.assert_close(run(scaled), run(x))
        torch.testing.assert_close(run(x[1:2]), run(x)[1:2])


def test_half_precision_decides_in_float32():
    x = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 5).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = SampleSign(**RBNN)(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), SampleSign(**RBNN)(x.detach().float()))
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16


# ---- on a layer


def one_bit(**kwargs):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=False, **kwargs)
    quantize_input(layer, SampleSign(**RBNN))
    scale_output(layer, ChannelScale(layer.weight))
    return layer


def test_what_a_layer_computes():
    layer, x = one_bit(), torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    assert layer.output_scale.alpha.shape == (6, 1, 1)
    torch.testing.assert_close(layer.output_scale.alpha.flatten(), layer.weight.abs().mean((1, 2, 3)))
    signs = torch.where(x >= x.mean((1, 2, 3), keepdim=True), 1.0, -1.0)
    expected = F.conv2d(signs, layer.weight, padding=1) * layer.output_scale.alpha
    torch.testing.assert_close(layer(x), expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), inference_copy(layer)):
        assert torch.equal(other(x), layer.eval()(x))
    holder = nn.Sequential(layer)
    assert list(binary_layers(holder)) == ["0"]
    unbinarize(holder, ["0"])
    assert not list(binary_layers(holder))
    assert torch.equal(holder(x), F.conv2d(x, layer.weight, padding=1))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3), ""),
        (nn.Conv2d(4, 4, 3, groups=4), ""),
        (nn.Linear(4, 4), "is no Conv2d"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "pads with 'circular', not with zeros"),
        (nn.Conv2d(4, 4, 3, padding="same"), "has padding='same', not a number"),
        (nn.Conv2d(4, 4, 3, dilation=2), "is dilated"),
        (nn.Conv2d(4, 4, 1, groups=4), "has filters of one weight"),
    ],
)
def test_what_cannot_have_one_bit(layer, reason):
    assert why_not_binary(layer) == reason


def test_convolutions_of_shortcuts():
    assert is_downsample("layer2.0.downsample.0", nn.Conv2d(4, 8, 1, stride=2))
    assert is_downsample("x", nn.Conv2d(4, 8, 1, stride=2))
    assert is_downsample("a.shortcut.0", nn.Conv2d(4, 8, 1))
    assert not is_downsample("a.conv", nn.Conv2d(4, 8, 1))
    assert not is_downsample("a.shortcut.0", nn.Conv2d(4, 8, 3, stride=2))


def test_the_norms_that_take_up_a_scale():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))
            self.na, self.nb, self.nc = (nn.BatchNorm2d(2) for _ in range(3))
            self.nd = nn.BatchNorm2d(2, track_running_stats=False)

        def forward(self, x):
            x = self.na(self.a(x))
            y = self.b(x)
            x = self.nb(y) + y  # read twice
            x = self.nc(F.relu(self.c(x)))  # not by the norm alone
            return self.nd(self.d(x))

    assert norms_behind(Net(), ["a", "b", "c", "d"], (1, 2, 4, 4)) == {"a": "na"}
