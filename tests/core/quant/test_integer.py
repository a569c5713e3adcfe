"""Quantised layers in integers: sums are exact, whatever the bits, and give what the fake-quantised layers give."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_compress.callbacks.quantization.pams.quantizers import MaxScaleWeight, PAMSQuantizer
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.quant.attach import quantize_input, quantize_weight
from lightning_compress.core.quant.integer import (
    HasIntegerInput,
    HasIntegerWeight,
    IntegerInput,
    IntegerWeight,
    integer_input,
    integer_weight,
)
from lightning_compress.core.quant.integer_reference import IntegerLayer, encode, fixed_point, requantize, to_integer
from lightning_compress.core.quant.interval import IntervalInput, IntervalWeight
from lightning_compress.core.quant.lsq import LSQInput, LSQWeight


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def interval(layer, bits, lower=-0.21, upper=1.7):
    """The layer with interval quantisers, whose input's range starts beside zero."""
    quantize_weight(layer, IntervalWeight(layer.weight, bits, per_channel=False))
    quantizer = IntervalInput(bits)
    quantizer.lower.data.fill_(lower)
    quantizer.upper.data.fill_(upper)
    quantize_input(layer, quantizer)
    return layer


def lsq(layer, bits, signed=False, per_channel=True):
    quantize_weight(layer, LSQWeight(layer.weight, bits, per_channel=per_channel))
    quantizer = LSQInput(bits, signed=signed)
    quantizer.step.data.fill_(2.1 / 2**bits)
    quantize_input(layer, quantizer)
    return layer


def pams(layer, bits):
    quantize_weight(layer, MaxScaleWeight(bits))
    quantize_input(layer, PAMSQuantizer(bits, alpha_init=1.3, ema_epoch=0))
    return layer


def in_double(layer, x):
    """The layer's output, computed in float64 from float64 values of its codes; and one unit of a sum."""
    weight, spec = integer_weight(layer), integer_input(layer)
    scale = weight.scale.double().expand(len(weight.codes)).view(-1, 1, 1)
    x_q = encode(x, spec).double() * spec.value
    return F.conv2d(x_q, weight.codes * scale[..., None], padding=layer.padding), scale * spec.value


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_lts_sums_are_the_float64_outputs_in_units(bits, kind):
    """lts: acc = round((L - 1)^2 y), exactly, and logits to 1e-5."""
    layer = nn.Conv2d(64, 9, 3, padding=1, bias=False) if kind == "conv" else nn.Linear(512, 10)
    interval(layer, bits)
    x = torch.randn(2, 64, 6, 6) if kind == "conv" else torch.randn(4, 512)
    integer = IntegerLayer(layer, integer_weight(layer), integer_input(layer))
    sums = integer.accumulate(x)
    assert sums.dtype == torch.int32
    with torch.no_grad():
        last = 2**bits - 1
        twin = copy.deepcopy(layer).double()
        twin.bias = None
        y = twin(x.double())
        assert torch.equal(sums, (last**2 * y).round().int())
        assert (sums - last**2 * y).abs().max() < 1e-6
        torch.testing.assert_close(integer(x), layer(x), atol=1e-5, rtol=1e-5)


def test_interval_weights_are_odd_and_reach_255_at_8_bits():
    codes = integer_weight(interval(nn.Linear(512, 10), 8)).codes
    assert codes.abs().max() > 127
    assert (codes % 2 == 1).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_pams_sums_of_576_products(bits):
    """pams: equal to round(fake / (s_a s_w)); in float64 within 1e-3 of it before rounding."""
    layer = pams(nn.Conv2d(64, 8, 3, padding=1), bits)
    x = torch.randn(1, 64, 8, 8)
    integer = IntegerLayer(layer, integer_weight(layer), integer_input(layer))
    sums = integer.accumulate(x)
    y, unit = in_double(layer, x)
    assert (y / unit - sums).abs().max() < 1e-3
    assert torch.equal((y / unit).round().int(), sums)
    assert sums.abs().max() > 100 * (bits / 4) ** 4
    with torch.no_grad():
        torch.testing.assert_close(integer(x), layer(x), atol=1e-5, rtol=1e-5)


def test_pams_weight_scale_has_its_epsilon():
    weight = torch.tensor([[0.9, -0.35, 0.12, -1.27, 0.6]])
    assert MaxScaleWeight(8).integer(weight).scale.item() == pytest.approx((1.27 + 1e-8) / 127)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_lsq_sums(signed, per_channel):
    layer = lsq(nn.Conv2d(32, 6, 3, padding=1), 8, signed, per_channel)
    x = torch.randn(2, 32, 6, 6)
    integer = IntegerLayer(layer, integer_weight(layer), integer_input(layer))
    y, unit = in_double(layer, x)
    assert torch.equal((y / unit).round().int(), integer.accumulate(x))


def test_geometry_of_convolutions():
    """Strides, dilations, groups and borders: a zero beyond the border is the code 0, even where 0 is not."""
    layer = interval(nn.Conv2d(8, 12, (3, 5), stride=2, padding=(1, 4), dilation=(1, 2), groups=4), 4, lower=-0.7)
    x = torch.randn(2, 8, 9, 11)
    integer = IntegerLayer(layer, integer_weight(layer), integer_input(layer))
    with torch.no_grad():
        torch.testing.assert_close(integer(x), layer(x), atol=1e-6, rtol=1e-6)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        y = self.bn(self.conv1(x)).relu()
        return self.head((y + self.conv2(y)).relu().mean((2, 3)))


def test_network_in_integers_equals_the_fake_quantised_one():
    network = Network()
    network(torch.randn(16, 3, 8, 8))
    for layer, signed in ((network.conv1, True), (network.conv2, False), (network.head, False)):
        lsq(layer, 4, signed)
    before = copy.deepcopy(network.state_dict())
    integer = to_integer(network)
    assert [type(m).__name__ for m in (integer.conv1, integer.conv2, integer.head)] == ["IntegerLayer"] * 3
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        found, expected = integer(x), network.eval()(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_layer_with_one_quantiser_stays():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    quantize_weight(network[0], LSQWeight(network[0].weight, 4))
    lsq(network[1], 4, signed=True)
    assert isinstance(to_integer(network)[0], nn.Linear)
    with pytest.raises(MisconfigurationException, match="no layer with both quantisers in Linear"):
        to_integer(nn.Linear(3, 3))


def test_codes_are_of_the_weight_after_masks():
    layer = nn.Linear(6, 4)

    class Mask(nn.Module):
        def forward(self, weight):
            return weight * (weight > 0)

    parametrize.register_parametrization(layer, "weight", Mask())
    quantize_weight(layer, LSQWeight(layer.weight, 4))
    weight = integer_weight(layer)
    assert torch.equal(weight.codes * weight.scale, layer.weight)
    assert (weight.codes >= 0).all()
    assert torch.equal(weight.codes * weight.scale, inference_copy(layer).weight)


def test_what_has_no_integers():
    layer = nn.Linear(3, 3)
    assert integer_weight(layer) is None
    assert integer_input(layer) is None
    quantize_weight(layer, nn.Identity())
    quantize_input(layer, nn.Identity())
    assert integer_weight(layer) is None
    assert integer_input(layer) is None
    assert isinstance(LSQWeight(layer.weight, 4), HasIntegerWeight)
    assert isinstance(LSQInput(4, signed=True), HasIntegerInput)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "a Conv2d that pads with zeros, got Conv2d"),
        (nn.ConvTranspose2d(2, 2, 3), "expected a Linear or a Conv2d"),
    ],
)
def test_layers_that_have_no_reference(layer, match):
    weight = IntegerWeight(torch.ones(2, 2, 3, 3, dtype=torch.int16), torch.ones(()), 2)
    with pytest.raises(ValueError, match=match):
        IntegerLayer(layer, weight, IntegerInput(0.0, 1.0, 1.0, 0, 3, 2))


def test_sums_that_may_leave_int32_are_refused():
    weight = IntegerWeight(torch.full((1, 3), 2**15 - 1, dtype=torch.int16), torch.ones(()), 16)
    with pytest.raises(ValueError, match="a sum of its codes times inputs can reach 6,442,057,734,"):
        IntegerLayer(nn.Linear(3, 1), weight, IntegerInput(0.0, 1.0, 1.0, 0, 2**16 - 2, 16))


# ---- fixed point


def test_fixed_point_of_the_worked_example():
    """pams: alpha_in 2, max|W| 1.27, alpha_out 4, 8 bits: M = 0.005 = 1374389535 * 2^-38; 10000 -> 50."""
    s_a, s_w, s_out = 2 / 127, 1.27 / 127, 4 / 127
    mantissa, shift = fixed_point(torch.tensor(s_a * s_w / s_out, dtype=torch.float64))
    assert (mantissa.item(), shift.item()) == (1374389535, 38)
    sums = torch.tensor([[10000, -10000, 99999, 0]], dtype=torch.int32)
    assert requantize(sums, mantissa, shift, torch.tensor(0), -127, 127).tolist() == [[50, -50, 127, 0]]


@pytest.mark.parametrize("factor", [1.0, 0.75, 1 - 2**-40, 3e-6, 1e-12, -0.3, 0.0, 5.0])
def test_fixed_point_is_near(factor):
    mantissa, shift = fixed_point(torch.tensor(factor, dtype=torch.float64))
    assert mantissa.abs() < 2**31
    assert 1 <= shift <= 62
    assert mantissa * 2.0**-shift == pytest.approx(factor, rel=2**-30, abs=2**-62)


def test_a_chain_needs_no_floating_point():
    """lts: m' = clamp(round(acc M_o + B_o)), with batch norm and the next range folded, is the next layer's input."""
    bits, last = 4, 15
    layer = interval(nn.Conv2d(16, 8, 3, padding=1, bias=False), bits, 0.0, 2.0)
    behind = IntervalInput(bits)
    behind.lower.data.fill_(-0.1)
    behind.upper.data.fill_(3.0)
    norm = nn.BatchNorm2d(8)
    norm.weight.data.uniform_(-1, 2)
    norm.bias.data.normal_()
    norm.running_var.uniform_(0.1, 2)
    norm.eval()
    x = torch.randn(3, 16, 7, 7)
    sums = IntegerLayer(layer, integer_weight(layer), integer_input(layer)).accumulate(x)
    with torch.no_grad():
        expected = encode(norm(layer(x)), behind.integer())
        deviation, width = (norm.running_var.double() + norm.eps).sqrt(), behind.upper.double() - behind.lower.double()
        multiplier = norm.weight.double() / (deviation * last**2) * last / width
        offset = norm.bias.double() - norm.running_mean.double() * norm.weight.double() / deviation - behind.lower
        mantissa, shift = fixed_point(multiplier)
        bias = (offset * last / width * 2.0**shift).round().long()
        found = requantize(sums, mantissa, shift, bias, 0, last)
    assert (found - expected).abs().max() <= 1
    assert (found == expected).float().mean() > 0.999
    assert len(expected.unique()) == last + 1
