"""LSQ against numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_compress.core.quant.lsq import SMALLEST_STEP, LSQInput, LSQWeight, first_step, limits, quantize_lsq
from lightning_compress.core.quant.observe import Moments

V = torch.tensor([-1, -0.3, 0.1, 0.24, 0.8, 1.5])


def test_limits():
    assert limits(2, signed=True) == (-2, 1)
    assert limits(8, signed=False) == (0, 255)
    assert limits(1, signed=False) == (0, 1)
    with pytest.raises(ValueError, match="bits=1 cannot hold a sign"):
        limits(1, signed=True)


def test_values_and_gradients_by_hand():
    v, step = V.clone().requires_grad_(), torch.tensor([0.5], requires_grad=True)
    y = quantize_lsq(v, step, -2, 1, 6)
    assert y.tolist() == [-1, -0.5, 0, 0, 0.5, 0.5]
    y.sum().backward()
    assert v.grad.tolist() == [0, 1, 1, 1, 0, 0]  # -1 lies on the bound, which passes nothing
    assert step.grad.item() == pytest.approx(-0.440908, abs=1e-6)
    each = []
    for i in range(6):
        step.grad = None
        quantize_lsq(V, step, -2, 1, 1)[i].backward()
        each.append(step.grad.item())
    torch.testing.assert_close(torch.tensor(each), torch.tensor([-2, -0.4, -0.2, -0.48, 1, 1]))


@pytest.mark.parametrize(("bits", "expected"), [(2, 1.313333), (3, 0.758253), (4, 0.496393)])
def test_where_the_step_starts(bits, expected):
    assert LSQWeight(V.view(1, 6), bits).step.item() == pytest.approx(expected, abs=1e-6)
    moments, of_input = Moments(), LSQInput(bits, signed=True)
    moments.update(V)
    of_input.start(moments)
    assert of_input.step.item() == pytest.approx(expected, abs=1e-6)


def test_scale_of_the_gradient():
    """Of weights by their number, of inputs by the features of one sample."""
    x = torch.rand(2, 3, 4, 4)
    of_input = LSQInput(4, signed=False)
    of_input.step.data.fill_(0.01)  # all are above
    of_input(x).sum().backward()
    above = x > 0.15
    inside = ((x / 0.01).round() - x / 0.01)[~above].sum()
    assert 1 / math.sqrt(48 * 15) == pytest.approx(0.0372678, abs=1e-7)
    assert of_input.step.grad.item() == pytest.approx(0.0372678 * (15 * above.sum() + inside).item(), rel=1e-4)
    weight = torch.randn(5, 3, 3, 3)
    weight += 0.1 * weight.sign()  # all are beyond
    for per_channel, count in ((False, 135), (True, 27)):
        quantizer = LSQWeight(weight, 3, per_channel=per_channel)
        quantizer.step.data.fill_(1e-3)
        quantizer(weight).sum().backward()
        beyond = torch.where(weight > 0, 3.0, -4.0).view(quantizer.step.numel(), -1).sum(1)
        torch.testing.assert_close(quantizer.step.grad.flatten(), beyond / math.sqrt(count * 3), rtol=1e-4, atol=1e-4)


def test_coordinates_for_freezing():
    quantizer = LSQWeight(V.view(1, 6), 2)
    quantizer.step.data.fill_(0.5)
    place, codes = quantizer.place(V)
    torch.testing.assert_close(place, torch.tensor([0, 0.466667, 0.733333, 0.826667, 1.2, 1.666667]))
    torch.testing.assert_close(codes / 3, torch.tensor([0, 1 / 3, 2 / 3, 2 / 3, 1, 1]))
    torch.testing.assert_close(
        (place - codes / 3).abs(), torch.tensor([0, 0.133333, 0.066667, 0.16, 0.2, 0.666667]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers(bits, per_channel):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = LSQWeight(weight, bits, per_channel=per_channel)
    integer = quantizer.integer(weight)
    assert integer.scale.shape == ((4,) if per_channel else ())
    torch.testing.assert_close(
        integer.codes * integer.scale.view(-1, *[1] * 3 * per_channel), quantizer(weight), rtol=0, atol=0
    )
    assert integer.codes.min() >= -(2 ** (bits - 1))
    assert integer.codes.max() <= 2 ** (bits - 1) - 1
    for signed in (False, True):
        of_input = LSQInput(bits, signed=signed)
        of_input.step.data.fill_(0.11)
        i = of_input.integer()
        x = torch.randn(1000)
        code = ((x - i.offset) / i.step).round().clamp(i.lowest, i.highest)
        torch.testing.assert_close(code * i.value, of_input(x), rtol=0, atol=0)
        assert i.highest - i.lowest == 2**bits - 1


def test_a_step_that_turns_negative_stays_positive():
    step, v = torch.tensor([-0.3], requires_grad=True), V.clone().requires_grad_()
    y = quantize_lsq(v, step, -2, 1, 6)
    y.sum().backward()
    assert y.isfinite().all()
    assert step.grad.isfinite().all()
    assert first_step(torch.tensor(0.0), 7) == SMALLEST_STEP
    of_input = LSQInput(4, signed=False)
    of_input.step.data.fill_(-1.0)
    assert of_input.integer().step == pytest.approx(SMALLEST_STEP)
