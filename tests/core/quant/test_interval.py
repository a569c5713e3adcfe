"""The interval quantiser against numbers by hand, and its own autograd function against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd import grad

from lightning_compress.core.quant import interval, lsq
from lightning_compress.core.quant.interval import SMALLEST_RANGE, IntervalInput, IntervalWeight, quantize_interval
from lightning_compress.core.quant.lsq import quantize_lsq
from lightning_compress.core.quant.observe import Moments, observe_inputs
from lightning_compress.core.quant.rounding import round_ste


def leaf(*values):
    return torch.tensor(values, requires_grad=True)


def ranged(quantizer, lower, upper):
    quantizer.lower.data.fill_(lower)
    quantizer.upper.data.fill_(upper)
    return quantizer


def test_two_bit_weights():
    weight = torch.tensor([-2, -1, -0.5, -0.2, 0.2, 0.5, 1, 2])
    expected = torch.tensor([-1, -1, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 1, 1])
    torch.testing.assert_close(quantize_interval(weight, leaf(-1.0), leaf(1.0), 2, signed=True), expected)


@pytest.mark.parametrize(
    ("w", "dw", "du", "dl"), [(-0.5, 0.952381, -0.136054, -0.816327), (0.2, 0.952381, -0.453515, -0.498866)]
)
def test_gradients_of_weights(w, dw, du, dl):
    weight, lower, upper = leaf(w), leaf(-0.8), leaf(1.3)
    quantize_interval(weight, lower, upper, 2, signed=True).sum().backward()
    for tensor, expected in ((weight, dw), (upper, du), (lower, dl)):
        assert tensor.grad.item() == pytest.approx(expected, abs=1e-6)


def test_gradients_on_and_beyond_the_bounds():
    x, lower, upper = leaf(-1.0, 0.0, 0.5, 2.0, 3.0), leaf(0.0), leaf(2.0)
    quantize_interval(x, lower, upper, 2, signed=False).sum().backward()
    assert x.grad.tolist() == [0, 0.5, 0.5, 0.5, 0]
    assert upper.grad.item() == pytest.approx(-(0 + 0.25 + 1) / 2)
    assert lower.grad.item() == pytest.approx(-(1 + 0.75 + 0) / 2)


@pytest.mark.parametrize("layout", ["plain", "channels_last", "bfloat16"])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("ranges", ["one", "per channel"])
@pytest.mark.parametrize("kind", ["weight", "input", "lsq"])
def test_the_fused_function_is_the_plain_formula(kind, ranges, bits, layout, monkeypatch):
    """... to the last bit forwards, and to the order of sums backwards."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 6, 4, 3)
    x, weights = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "bfloat16":
        x = x.bfloat16()
    size = 1 if ranges == "one" else shape[0]
    one = (0.5 + torch.rand(size, generator=generator)).view(-1, *[1] * 3 * (size > 1))
    parameters = [(-one).requires_grad_(), (one * 1.3).requires_grad_()]
    x.requires_grad_()

    def run():
        if kind == "lsq":
            step = parameters[1] * 2**-bits
            y = quantize_lsq(x, step, -(2 ** (bits - 1)), 2 ** (bits - 1), 360)
        else:
            y = quantize_interval(x, *parameters, bits, signed=kind == "weight")
        used = parameters[1:] if kind == "lsq" else parameters
        return y, grad((y * weights).sum(), [x, *used])

    y, fused = run()
    assert "Backward" in y.grad_fn.name()
    for module in (interval, lsq):
        monkeypatch.setattr(module, "fuses", lambda *tensors: False)
    expected, plain = run()
    assert torch.equal(y, expected)
    assert y.dtype == torch.float32
    for one, other in zip(fused, plain, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-2 if layout == "bfloat16" else 1e-4)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_integers(bits, per_channel):
    """Odd codes; codes of inputs begin at the lower bound."""
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = IntervalWeight(weight, bits, per_channel=per_channel)
    integer = quantizer.integer(weight)
    assert torch.equal(integer.codes * integer.scale, quantizer(weight))
    assert (integer.codes % 2 == 1).all()
    assert integer.codes.abs().max() <= 2**bits - 1
    assert len(integer.codes.unique()) == 2**bits or bits > 2
    assert integer.codes.dtype == torch.int16
    assert integer.codes.shape == weight.shape
    place, codes = quantizer.place(weight)
    assert torch.equal(2 * codes - (2**bits - 1), integer.codes.float())
    width = quantizer.upper - quantizer.lower
    torch.testing.assert_close(place, (weight - quantizer.lower) / width)
    of_input = ranged(IntervalInput(bits), -0.3, 1.7)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    i = of_input.integer()
    code = ((x - i.offset) / i.step).round().clamp(i.lowest, i.highest)
    torch.testing.assert_close(code * i.value, of_input(x), rtol=1e-6, atol=0)
    assert (i.lowest, i.highest, i.bits) == (0, 2**bits - 1, bits)


def test_where_ranges_start():
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight *= 0.1475964 / weight.std()
    quantizer = IntervalWeight(weight, 4)
    assert quantizer.upper.item() == pytest.approx(0.4427892, abs=1e-6)
    assert quantizer.lower.item() == pytest.approx(-0.4427892, abs=1e-6)
    several = IntervalWeight(weight, 4, per_channel=True)
    assert several.upper.shape == (8, 1, 1, 1)
    torch.testing.assert_close(several.upper.flatten(), 3 * weight.flatten(1).std(1))
    x = torch.randn(100) + 0.2
    moments = Moments()
    moments.update(x[:70])
    moments.update(x[70:].view(2, 15))
    assert moments.deviation == pytest.approx(x.std().item(), rel=1e-6)
    assert moments.mean_magnitude == pytest.approx(x.abs().mean().item(), rel=1e-6)
    of_input = IntervalInput(4)
    of_input.start(moments)
    assert of_input.upper.item() == pytest.approx(4.97669 * x.std().item(), rel=1e-5)
    assert of_input.lower.item() == x.min().item()
    assert 3 / math.sqrt(1 - 2 / math.pi) == pytest.approx(4.97669, abs=1e-5)


def test_a_layer_starts_from_what_those_before_it_quantise():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.Identity())
    net[0], net[2] = IntervalInput(2), IntervalInput(2)
    x = torch.randn(32, 4)
    seen = observe_inputs(net, {"first": net[0], "second": net[2]}, [x])
    behind = net[1](net[0](x))
    assert seen["second"].count == 128
    assert net[2].lower.item() == behind.min().item()
    assert net[2].upper.item() == pytest.approx(4.97669 * behind.std().item(), rel=1e-5)
    assert not net[0]._forward_pre_hooks


def test_ranges_that_turn_round_stay_finite():
    x = leaf(-1.0, 0.5, 2.0)
    lower, upper = leaf(1.0), leaf(0.0)
    y = quantize_interval(x, lower, upper, 4, signed=False)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, lower, upper))
    assert IntervalInput(4).integer().step > 0
    assert ranged(IntervalInput(4), 1.0, 0.0).integer().step == pytest.approx(SMALLEST_RANGE / 15)


def test_rounding_passes_the_gradient():
    x = leaf(-1.5, -0.5, 0.4, 0.5, 2.5)
    y = round_ste(x)
    y.backward(torch.arange(5.0))
    assert y.tolist() == [-2, 0, 0, 0, 2]
    assert torch.equal(x.grad, torch.arange(5.0))


def test_compiled_and_eager_agree():
    torch.compiler.reset()
    x, lower, upper = torch.randn(64, requires_grad=True), leaf(-0.7), leaf(1.1)
    step = leaf(0.2)

    def both(x, lower, upper, step):
        return quantize_interval(x, lower, upper, 3, signed=False) + quantize_lsq(x, step, -4, 3, 64)

    eager = both(x, lower, upper, step)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(x, lower, upper, step)
    torch.testing.assert_close(compiled, eager)
    found, expected = (grad(y.sum(), [x, lower, upper, step]) for y in (compiled, eager))
    torch.testing.assert_close(found, expected)
