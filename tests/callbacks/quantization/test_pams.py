"""PAMS: every number of the arithmetic, counts of the paper's networks, the phases, the teacher, and the callback."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from foreign import Foreign, assert_same, digits, fit, made, make_trainer, no_pictures
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import load
from lightning_compress.callbacks import LBC, PAMS, L1Norm, MagnitudePruning
from lightning_compress.callbacks.quantization.pams import (
    MaxScaleWeight,
    OnGrid,
    PAMSQuantizer,
    place,
    quantize,
    structured_transfer,
)
from lightning_compress.callbacks.quantization.pams.quantizers import levels
from lightning_compress.catalog import card
from lightning_compress.core.distill.losses import attention_map
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.profile import profile
from lightning_compress.core.quant.attach import input_quantizer, quantized_layers, weight_quantizer
from lightning_compress.core.quant.integer import integer_input, integer_weight
from lightning_compress.modules import SuperResolution
from lightning_compress.networks import EDSR, RDN, edsr_baseline, rdn_b

X = [-2, -1, -0.53, 0, 0.26, 0.7, 1, 3]


def learning(bits=8, alpha=1.0):
    """A quantiser in its second phase."""
    return PAMSQuantizer(bits, alpha_init=alpha, ema_epoch=0)


def quantized(network, bits=8, block_input=False, **measuring):
    placement = place(network, quantize_block_input=block_input)
    quantize(network, **placement.arguments(), weight_bits=bits, activation_bits=bits, measuring=measuring)
    return network


def small_edsr(seed=0, **kwargs):
    torch.manual_seed(seed)
    return EDSR(**{"scale": 2, "blocks": 2, "features": 8, **kwargs})


def images(count=2, size=12):
    """Smooth, as photographs are, in 0..255."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 255)


# ---- weights


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(8, [0.9, -0.35, 0.12, -1.27, 0.6]), (4, [0.907143, -0.362857, 0.181429, -1.27, 0.544286])],
)
def test_weights(bits, expected):
    weight = torch.tensor([0.9, -0.35, 0.12, -1.27, 0.6], requires_grad=True)
    out = MaxScaleWeight(bits)(weight)
    torch.testing.assert_close(out.detach(), torch.tensor(expected), atol=1e-6 if bits == 4 else 1e-7, rtol=0)
    upstream = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    out.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_a_weight_of_zeros():
    assert not MaxScaleWeight(8)(torch.zeros(3, 2)).any()


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_integer_weights_are_the_fake_ones(bits):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = MaxScaleWeight(bits)
    whole = quantizer.integer(weight)
    assert whole.codes.dtype == torch.int16
    assert whole.codes.abs().max() == levels(bits) == 2 ** (bits - 1) - 1
    assert whole.scale.item() == pytest.approx((weight.abs().max().item() + 1e-8) / levels(bits), rel=1e-6)
    assert torch.equal(whole.scale * whole.codes, quantizer(weight))
    assert len(whole.codes.unique()) < 2**bits


# ---- activations, second phase


@pytest.mark.parametrize(
    ("bits", "expected", "slope"),
    [
        (8, [-1, -1, -0.527559, 0, 0.259843, 0.700787, 1, 1], 9.51126),
        (4, [-1, -1, -0.571429, 0, 0.285714, 0.714286, 1, 1], 9.59000),
    ],
)
def test_activations(bits, expected, slope):
    quantizer, x = learning(bits), torch.tensor(X, requires_grad=True)
    out = quantizer(x)
    torch.testing.assert_close(out.detach(), torch.tensor(expected), atol=1e-6, rtol=0)
    out.backward(torch.arange(1.0, 9.0))
    assert x.grad.tolist() == [0, 1, 3, 4, 5, 6, 3.5, 0]  # at +-alpha the two sides share
    assert quantizer.alpha.grad.item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize(("bits", "alpha"), [(8, 1.0), (4, 1.0), (8, 3.7), (2, 0.6)])
def test_gradients_are_those_of_max_and_min(bits, alpha):
    """... and a rounding that lets gradients through, by autograd."""
    x = torch.linspace(-2 * alpha, 2 * alpha, 203, requires_grad=True)
    upstream = torch.randn(203, generator=torch.Generator().manual_seed(0))
    a, q = torch.tensor([alpha], requires_grad=True), levels(bits)
    clipped = torch.maximum(torch.minimum(x, a), -a)
    u = clipped * q / a
    ((u + (u.round() - u).detach()) * a / q).backward(upstream)
    quantizer, y = learning(bits, alpha), x.detach().clone().requires_grad_()
    quantizer(y).backward(upstream)
    torch.testing.assert_close(y.grad, x.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(quantizer.alpha.grad, a.grad, atol=1e-4, rtol=1e-4)


def test_slope_of_one_element():
    quantizer = learning()
    quantizer(torch.tensor([-0.53])).backward()
    assert quantizer.alpha.grad.item() == pytest.approx(0.31 / 127, abs=1e-6)


def test_a_range_of_nothing_divides_by_no_zero():
    for alpha in (0.0, -1.0):
        quantizer = learning()
        nn.init.constant_(quantizer.alpha, alpha)
        out = quantizer(torch.tensor([-1.0, 0.0, 2.0]))
        assert out.tolist() == pytest.approx([-1e-6, 0, 1e-6])
        out.sum().backward()
        assert quantizer.alpha.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32(dtype):
    x = torch.linspace(-1.3, 1.3, 57).to(dtype).requires_grad_()
    quantizer = learning()
    out = quantizer(x)
    assert torch.equal(out, learning()(x.detach().float()).to(dtype))
    out.sum().backward()
    assert x.grad.dtype == dtype
    assert quantizer.alpha.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_inputs_are_the_fake_ones(bits):
    quantizer, x = learning(bits, 2.3), torch.linspace(-3, 3, 501)
    grid = quantizer.integer()
    codes = ((x - grid.offset) / grid.step).round().clamp(grid.lowest, grid.highest)
    assert (grid.lowest, grid.highest, grid.bits) == (-levels(bits), levels(bits), bits)
    torch.testing.assert_close(grid.value * codes, quantizer(x).detach(), atol=1e-6, rtol=0)


def test_requantisation_of_the_worked_example():
    weight = MaxScaleWeight(8).integer(torch.tensor([1.27, 0.1]))
    inside, out = learning(alpha=2.0).integer(), learning(alpha=4.0).integer()
    steps = (inside.step, weight.scale.item(), out.step)
    assert steps == pytest.approx((0.0157480, 0.01, 0.0314961), abs=1e-7)
    ratio = inside.step * weight.scale.item() / out.step
    assert ratio == pytest.approx(0.005, rel=1e-6)
    assert round(10_000 * ratio) == 50 == (10_000 * 1_374_389_535 + (1 << 37)) >> 38


# ---- activations, first phase


def test_the_first_phase_measures_and_does_not_clip():
    quantizer = PAMSQuantizer(8)
    x = torch.zeros(2, 3, 4, 4)
    x[0, 1, 2, 3], x[1, 0, 0, 0] = -3.0, 1.0
    out = quantizer(x)
    assert quantizer.alpha.tolist() == quantizer.max_val.tolist() == [2]  # the mean of the samples' maxima
    assert out.abs().amax((1, 2, 3)).tolist() == pytest.approx([3, 1], abs=0.01)  # 3 is code 190
    quantizer(torch.full((2, 1), 5.0))
    assert quantizer.alpha.tolist() == [5]  # replaced, not averaged


def test_gradients_of_the_first_phase():
    quantizer, x = PAMSQuantizer(8), torch.tensor([[-2.0, 0.3], [1.0, 0.5]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    quantizer(x).backward(upstream)
    u = x.detach() * 127 / 1.5
    assert torch.equal(x.grad, upstream)
    torch.testing.assert_close(quantizer.alpha.grad, ((u.round() - u) * upstream).sum().view(1) / 127)
    assert not quantizer.max_val.requires_grad


@pytest.mark.parametrize(("init", "expected"), [("last", [1, 2, 2.3, 2.57]), ("ema", [1, 1.1, 1.39, 1.751])])
def test_averages(init, expected):
    quantizer = PAMSQuantizer(8, ema_epoch=2, ema_decay=0.9, init=init)
    found = []
    for epoch, value in ((1, 1.0), (1, 2.0), (2, 4.0 + (init == "last")), (2, 5.0)):
        quantizer.begin(epoch)
        quantizer(torch.full((2, 1), value))
        found.append(quantizer.alpha.item())
        with torch.no_grad():
            quantizer.alpha.add_(0.5)  # a step of the optimiser: it does not reach the average
    assert found == pytest.approx(expected)


def test_the_phases():
    quantizer, large = PAMSQuantizer(8), torch.full((2, 1), 7.0)
    quantizer.eval()
    assert torch.equal(quantizer(large), large)  # before any measurement
    quantizer.train()
    quantizer(torch.full((2, 1), 2.0))
    quantizer.eval()
    assert quantizer(large).tolist() == [[2], [2]]  # clips, in the first epoch too
    quantizer.train()
    quantizer.begin(2)
    assert quantizer(large).tolist() == [[2], [2]]
    assert (quantizer.alpha.tolist(), quantizer.max_val.tolist()) == ([2], [2])
    quantizer.begin(1)  # of a second fit: what was learnt stays
    quantizer(large)
    assert quantizer.alpha.tolist() == [2]


def test_a_range_that_is_given_is_never_measured():
    quantizer = PAMSQuantizer(8, alpha_init=3.0, ema_epoch=0)
    assert quantizer(torch.full((2, 1), 7.0)).tolist() == [[3], [3]]
    assert not quantizer.measures


def test_state_comes_back():
    quantizer, other = PAMSQuantizer(8), PAMSQuantizer(8)
    quantizer(torch.full((2, 1), 2.0))
    quantizer.begin(2)
    state = quantizer.state_dict()
    other.load_state_dict({**state, "alpha": torch.tensor(2.5), "max_val": torch.tensor(2.0)})  # as the authors'
    assert other.alpha.shape == other.max_val.shape == (1,)
    assert other.train()(torch.full((2, 1), 9.0)).tolist() == [[2.5], [2.5]]
    with pytest.raises(ValueError, match="never measured"):
        PAMSQuantizer(8).integer()


# ---- knowledge transfer


def test_transfer_compares_where_features_are_strong():
    torch.manual_seed(0)
    f, g = torch.randn(3, 5, 4, 6), torch.randn(3, 7, 4, 6)
    assert attention_map(f).shape == (3, 24)
    torch.testing.assert_close(attention_map(f).norm(dim=1), torch.ones(3))
    for factor in (0.1, -3.0, 100.0):
        assert structured_transfer(f, factor * f).item() < 1e-12
    assert structured_transfer(f, f) == 0
    assert 0 < structured_transfer(f, g) <= 2 / 24
    maps = [(t.double() ** 2).mean(1).flatten(1) for t in (f, g)]
    one, two = (m / m.norm(dim=1, keepdim=True) for m in maps)
    assert structured_transfer(f, g).item() == pytest.approx(((one - two) ** 2).mean().item(), rel=1e-5)


def test_the_transfer_of_features_that_share_no_place_is_largest():
    left, right = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    left[..., 0, 0], right[..., 1, 1] = 3, 5
    assert structured_transfer(left, right).item() == pytest.approx(2 / 4)


def test_the_transfer_does_not_overflow_in_half_precision():
    features = torch.full((1, 4, 3, 3), 300.0, dtype=torch.float16)
    assert structured_transfer(features, features.roll(1)).isfinite()
    assert attention_map(torch.zeros(1, 2, 3, 3)).isfinite().all()


# ---- the networks of the paper


def bits_ratio(network, bits):
    weights = sum(network.get_submodule(name).weight.numel() for name in place(network).weights)
    total = sum(p.numel() for p in network.parameters())
    return 32 * total / (32 * (total - weights) + bits * weights)


@pytest.mark.parametrize(
    ("build", "scale", "params", "weights", "convs", "alphas", "ratios"),
    [
        pytest.param(edsr_baseline, 4, 1_517_571, 1_179_648, 32, 48, (2.398, 3.127), id="PAMS-EDSR-x4"),
        pytest.param(edsr_baseline, 2, 1_369_859, 1_179_648, 32, 48, (2.824, 4.057), id="PAMS-EDSR-x2"),
        # 161 in the authors' code, 16 of which are never used
        pytest.param(rdn_b, 4, 22_271_107, 21_925_888, 146, 145, (3.822, 7.217), id="PAMS-RDN-x4"),
        pytest.param(rdn_b, 2, 22_123_395, 21_925_888, 146, 145, (3.896, 7.529), id="PAMS-RDN-x2"),
    ],
)
def test_counts(build, scale, params, weights, convs, alphas, ratios):
    with torch.device("meta"):
        network = build(scale)
    assert sum(p.numel() for p in network.parameters()) == params
    assert tuple(round(bits_ratio(network, bits), 3) for bits in (8, 4)) == ratios
    quantized(network)
    layers = quantized_layers(network)
    chosen = [layer for layer in layers.values() if weight_quantizer(layer) is not None]
    assert len(chosen) == convs
    assert sum(layer.weight.numel() for layer in chosen) == weights
    assert sum(isinstance(m, PAMSQuantizer) for m in network.modules()) == alphas
    assert sum(name.endswith("alpha") for name, _ in network.named_parameters()) == alphas


@pytest.mark.parametrize(
    ("network", "real"),
    [(EDSR(2, blocks=2, features=4), 2), (RDN(2, blocks=2, layers=3, growth=4, features=4), 1)],
    ids=["EDSR", "RDN"],
)
def test_for_integers_every_quantised_layer_gets_codes(network, real):
    for block_input in (False, True):
        layers = quantized_layers(quantized(copy.deepcopy(network), block_input=block_input)).values()
        assert all(weight_quantizer(layer) is not None for layer in layers)
        assert sum(input_quantizer(layer) is None for layer in layers) == (0 if block_input else real)


@pytest.mark.parametrize(
    ("build", "scale", "macs", "quantised"),
    [
        pytest.param(edsr_baseline, 4, 114.23, 67.95, id="PAMS-EDSR-x4"),
        pytest.param(edsr_baseline, 2, 316.25, 271.79, id="PAMS-EDSR-x2"),
    ],
)
def test_macs(build, scale, macs, quantised):
    network = build(scale)
    costs = {row.name: row.macs for row in profile(network, (1, 3, 720 // scale, 1280 // scale)).layers}
    assert round(sum(costs.values()) / 1e9, 2) == macs
    assert round(sum(costs[name] for name in place(network).weights) / 1e9, 2) == quantised


@pytest.mark.parametrize("row", card("pams").published, ids=lambda row: f"PAMS-{row.network}-{row.data}-{row.setting}")
def test_rows_of_the_catalog(row):
    scale, bits = int(row.setting[1]), int(row.setting.split("/")[-1])
    network = {"EDSR": edsr_baseline, "RDN": rdn_b}[row.network](scale)
    cost = profile(network, (1, 3, 720 // scale, 1280 // scale))
    assert (cost.macs, cost.params) == (row.result["macs"], row.result["params"])
    assert round(bits_ratio(network, bits), 3) == row.result["compression"]
    assert row.config.endswith(f"x{scale}_{bits}bit")


def test_where_quantisers_sit():
    network = EDSR(2, blocks=2, features=8)
    parity, integer = place(network), place(network, quantize_block_input=True)
    assert parity.weights == integer.weights == [f"body.{i}.body.{j}" for i in (0, 1) for j in (0, 2)]
    assert parity.inputs == []
    assert parity.points[:3] == ["body.0.shortcut", "body.0.hidden", "body.0.residual"]
    assert integer.points[:3] == ["body.0.block_input", "body.0.hidden", "body.0.residual"]
    assert parity.left_alone == dict.fromkeys(
        ["head.0", "body.2", "tail.0.0", "tail.1"], "is left real by its network"
    )  # fmt: skip
    second = place(network, include=["body.1.*"])
    assert second.weights == ["body.1.body.0", "body.1.body.2"]
    assert second.points == ["body.1.shortcut", "body.1.hidden", "body.1.residual"]
    everything = place(network, exclude=["head.*"])
    assert everything.inputs == ["body.2", "tail.0.0", "tail.1"]  # no points there
    assert len(everything.weights) == 7


def test_where_quantisers_sit_in_rdn():
    network = RDN(2, blocks=2, layers=3, growth=4, features=4)
    placement = place(network)
    assert len(placement.weights) == 2 * 4 + 2
    assert placement.points == [
        *(f"RDBs.{i}.{name}" for i in (0, 1)
          for name in ("block_input", "convs.1.dense_input", "convs.2.dense_input", "fusion_input")),
        "fusion_input",
    ]  # fmt: skip
    assert place(network, include=["RDBs.0.*"]).points == placement.points[:4]
    assert "fused" in place(network, quantize_block_input=True).points


def test_any_other_network():
    placement = place(Foreign())
    names = [f"net.blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    assert (placement.weights, placement.inputs, placement.points) == (names, names, [])
    assert placement.left_alone == {"net.stem": "is the first layer", "net.head": "is the last layer"}


# ---- quantised networks


def test_with_many_bits_nothing_changes():
    """... and no key of a real network has another name in the quantised one."""
    for seed in range(3):
        network, x = small_edsr(seed), 96 + images() / 8  # outputs are around 112, the colour that is added
        student = quantized(copy.deepcopy(network), bits=16)
        plain = {n.replace("parametrizations.weight.original", "weight") for n in student.state_dict()}
        assert network.state_dict().keys() <= plain
        with torch.no_grad():
            expected = network(x)
            assert (student.train()(x) - expected).abs().max() < 1e-3
        assert expected.abs().max() > 100


def test_what_a_block_computes():
    network = quantized(small_edsr(blocks=1), alpha_init=2.0, ema_epoch=0)
    block, x = network.body[0], torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))

    def q(t):
        return (t.clamp(-2, 2) * 127 / 2).round() * 2 / 127

    conv1, _, conv2 = block.body
    inner = q(F.relu(F.conv2d(x, conv1.weight, conv1.bias, padding=1)))  # conv1 reads what is not quantised
    expected = q(F.conv2d(inner, conv2.weight, conv2.bias, padding=1)) + q(x)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=0)
    whole = quantized(small_edsr(blocks=1), block_input=True, alpha_init=2.0, ema_epoch=0).body[0]
    inner = q(F.relu(F.conv2d(q(x), conv1.weight, conv1.bias, padding=1)))
    expected = q(F.conv2d(inner, conv2.weight, conv2.bias, padding=1)) + q(x)
    torch.testing.assert_close(whole(x), expected, atol=1e-5, rtol=0)


def test_quantisers_come_off_again():
    network, x = small_edsr(), images()
    before, names = network(x), [n for n, _ in network.named_parameters()]
    text = str(network)
    undo = quantize(
        network, **place(network).arguments(), weight_bits=4, activation_bits=4, measuring={"alpha_init": 2.0}
    )
    network(x)
    assert (network.eval()(x) - before).abs().max() > 1
    undo(network.train())
    assert torch.equal(network(x), before)
    assert str(network) == text
    assert [n for n, _ in network.named_parameters()] == names


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), inference_copy])
def test_copies_know_their_own_ranges(duplicate):
    network, x = quantized(small_edsr(), block_input=True), images()
    network(x)
    other = duplicate(network).eval()
    torch.testing.assert_close(other(x), network.eval()(x))
    for layer in quantized_layers(other).values():
        assert isinstance(layer.input_quantizer, OnGrid)
    nn.init.constant_(other.body[0].hidden.alpha, 0.5)
    assert integer_input(other.body[0].body[2]).step == pytest.approx(0.5 / 127)
    assert integer_input(network.body[0].body[2]).step != pytest.approx(0.5 / 127)


@pytest.mark.parametrize("channels", [4, 64])
def test_accumulators_are_integers(channels):
    """36 and 576 taps: the fake-quantised convolution, in float64, is scale times a sum of integers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 5, 3, padding=1), nn.Conv2d(5, 1, 1))
    quantize(network, ["1"], ["1"], [], 8, 8, {})
    layer, x = network[1], torch.randn(2, channels, 9, 9) * 3
    layer(x)
    layer.eval()
    weight, grid = integer_weight(layer), integer_input(layer)
    codes = (x / grid.step).round().clamp(grid.lowest, grid.highest)
    accumulator = F.conv2d(codes.double(), weight.codes.double(), padding=1)
    assert accumulator.abs().max() < channels * 9 * 127**2 < 2**31
    with torch.no_grad():
        x_q, w_q = layer.input_quantizer(x).double(), layer.weight.double()
        fake = F.conv2d(x_q, w_q, padding=1) / (grid.value * weight.scale.double())
    assert (fake - accumulator).abs().max() < 0.5
    exact = F.conv2d(codes.double() * grid.value, weight.codes * weight.scale.double(), padding=1)
    assert (exact / (grid.value * weight.scale.double()) - accumulator).abs().max() < 1e-3
    out = accumulator * grid.value * weight.scale.double() + layer.bias.double().view(-1, 1, 1)
    torch.testing.assert_close(layer(x), out.float(), atol=1e-3, rtol=1e-4)


# ---- the callback


class Watch(Callback):
    """Notes what every step did to a range, and the phase."""

    def __init__(self):
        self.alphas, self.measured, self.rates, self.terms = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        quantizer = next(m for m in pl_module.modules() if isinstance(m, PAMSQuantizer))
        self.alphas.append(quantizer.alpha.item())
        self.measured.append(quantizer.max_val.item())
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.terms.append(trainer.callback_metrics.get("train/pams/skt"))


def quantizers_of(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, PAMSQuantizer)}


def test_measures_for_an_epoch_and_learns_then(tmp_path):
    watch, module = Watch(), made()
    fit(module, tmp_path, PAMS(), watch, max_epochs=3)
    first, then = watch.measured[:4], watch.measured[4:]
    assert len(set(first)) == 4
    assert set(then) == {first[-1]}  # never written again
    assert all(a == pytest.approx(m, abs=0.05) and a != m for a, m in zip(watch.alphas, first, strict=False))
    assert len(set(watch.alphas[4:])) == 8
    assert [rates[-1] for rates in watch.rates[::4]] == pytest.approx([0.01, 0.009, 0.0081])
    assert [rates[0] for rates in watch.rates[::4]] == pytest.approx([0.1, 0.09, 0.081])
    assert len(quantizers_of(module)) == 4
    assert {int(q.epoch) for q in quantizers_of(module).values()} == {3}
    assert type(inference_copy(module).net.blocks[0].conv1) is nn.Conv2d


def test_ranges_have_no_weight_decay(tmp_path):
    trainer = fit(made(), tmp_path, PAMS(alpha_lr=0.5), max_epochs=1)
    *others, own = trainer.optimizers[0].param_groups
    assert (len(own["params"]), own["weight_decay"], own["initial_lr"]) == (4, 0.0, 0.5)
    assert sum(len(group["params"]) for group in others) == 18


@pytest.mark.parametrize("step", [2, 7])
def test_resumes_in_the_middle_of_an_epoch(step, tmp_path):
    """... of measuring, and of learning."""
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = made(), made()
    x, y = next(iter(digits()))
    batches = DataLoader(TensorDataset(x.repeat(4, 1, 1, 1), y.repeat(4)), 16)  # equal ones: a loader begins anew

    def run(module, *callbacks, **kwargs):
        with no_pictures:
            make_trainer(tmp_path, *callbacks, max_epochs=3).fit(module, batches, **kwargs)

    run(whole, PAMS(), every)
    run(resumed, PAMS(), watch := Watch(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_same(whole, resumed)
    assert len(watch.alphas) == 12 - step
    if step > 4:
        assert len(set(watch.measured)) == 1


def test_evaluates_with_real_activations_before_training(tmp_path):
    module, real = made(), made()
    x = digits()
    trainer = make_trainer(tmp_path, PAMS(16, 8), max_epochs=1, num_sanity_val_steps=1)
    seen = []

    class Look(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
            if trainer.sanity_checking:
                seen.append((pl_module(batch[0]), real.eval()(batch[0])))

    trainer.callbacks.append(Look())
    with no_pictures:
        trainer.fit(module, x, digits(16, 64))
    torch.testing.assert_close(*seen[0], atol=1e-3, rtol=0)


def test_a_module_that_was_trained_learns_on(tmp_path):
    fit(made(), tmp_path, PAMS(), ModelCheckpoint(tmp_path, "one"), max_epochs=2)
    module, watch = load(Foreign, tmp_path / "one.ckpt"), Watch()
    before = quantizers_of(module)["net.blocks.0.conv1.input_quantizer"].max_val.item()
    fit(module, tmp_path, PAMS(), watch, max_epochs=1)
    assert set(watch.measured) == {before}


def test_processes_average_what_they_measured():
    module, callback = made(), PAMS()
    trainer = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: (tensor + 3) / 2), current_epoch=0,
    )  # fmt: skip
    arguments = {**place(module).arguments(), "weight_bits": 8, "activation_bits": 8, "measuring": {}}
    callback_module = quantize_recorded(module, arguments, callback.state_key)
    module.train()(next(iter(digits()))[0])
    before = [q.alpha.item() for q in quantizers_of(callback_module).values()]
    callback.on_before_optimizer_step(trainer, module, None)
    after = [q.alpha.item() for q in quantizers_of(module).values()]
    assert after == pytest.approx([(a + 3) / 2 for a in before])
    assert [q.max_val.item() for q in quantizers_of(module).values()] == after
    for quantizer in quantizers_of(module).values():
        quantizer.begin(2)
    callback.on_before_optimizer_step(trainer, module, None)
    assert [q.alpha.item() for q in quantizers_of(module).values()] == after


def quantize_recorded(module, arguments, key):
    from lightning_compress.core.surgery import attach_record

    attach_record(module).change(module, quantize, arguments, by=key, epoch=0)
    return module


def test_compiled_is_eager(tmp_path):
    torch.compiler.reset()
    found = []
    for wrap in (lambda net: net, lambda net: torch.compile(net, backend="eager")):
        module = made(lambda: nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(3)), nn.Flatten(), nn.Linear(4, 10)))
        module.net = wrap(module.net)
        fit(module, tmp_path, PAMS())
        found.append(list(module.parameters()))
    assert all(map(torch.equal, *found))


# ---- the teacher


def pairs(count=16, low=8, scale=2):
    high = F.interpolate(images(count, low), scale_factor=scale, mode="bicubic").clamp(0, 255)
    return DataLoader(TensorDataset(images(count, low), high), 4)


def enlarger(seed=0, **kwargs):
    return SuperResolution(small_edsr(seed), scale=2, input_shape=(3, 8, 8), **kwargs)


def enlarge(module, root, *callbacks, epochs=2, **kwargs):
    trainer = make_trainer(root, *callbacks, max_epochs=epochs)
    with no_pictures:
        trainer.fit(module, pairs(), **kwargs)
    return trainer


def test_the_loss_is_the_tasks_and_the_transfer(tmp_path):
    """... of the input of the tail, as computed by hand; and the teacher is the network as it was."""
    module, plain, found = enlarger(), small_edsr(), []

    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = copy.deepcopy(pl_module.network)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            network, (low, high) = self.before, batch
            student = network.body(h := network.head(network.sub_mean(low))) + h
            teacher = plain.body(h := plain.head(plain.sub_mean(low))) + h
            expected = F.l1_loss(network.add_mean(network.tail(student)), high)
            expected = expected + 50 * structured_transfer(student, teacher)
            found.append((outputs["loss"].item(), expected.item()))

    enlarge(module, tmp_path, PAMS(4, 4, w_at=50.0), First(), epochs=2)
    assert [one for one, _ in found] == pytest.approx([two for _, two in found], rel=1e-5)
    assert "train/pams/skt" in module.trainer.callback_metrics
    assert not any("teacher" in name for name in module.state_dict())


@pytest.mark.parametrize("kind", ["network", "module", "weights", "checkpoint"])
def test_the_network_starts_as_its_teacher(kind, tmp_path):
    other = enlarger(1)
    path = str(tmp_path / "teacher.pt")
    if kind == "weights":
        torch.save(other.network.state_dict(), path)
    elif kind == "checkpoint":
        enlarge(other, tmp_path, ModelCheckpoint(tmp_path, "teacher"), epochs=1)
        path = str(tmp_path / "teacher.ckpt")
    teacher = {"network": other.network, "module": other}.get(kind, path)
    for start, same in ((True, True), (False, False)):
        module = enlarger(0, optimizer=lambda p: torch.optim.SGD(p, lr=1e-30))
        callback = PAMS(16, 16, teacher=teacher, init_from_teacher=start)
        enlarge(module, tmp_path, callback, epochs=1)
        weights = module.network.body[0].body[0].parametrizations.weight.original
        assert torch.equal(weights, other.network.body[0].body[0].weight) == same
        skt = module.trainer.callback_metrics["train/pams/skt"]
        assert (skt < 1e-8) == same
        assert callback.state_dict()["teacher"].keys() == {"source", "sha256"}
        assert callback.state_dict()["teacher"]["source"] == (path if kind in ("weights", "checkpoint") else "")
        assert all(p.requires_grad for p in other.parameters())


def test_a_network_that_is_its_own_teacher_keeps_it(tmp_path):
    """... through a checkpoint, which has no other place to take it from."""
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, resumed = enlarger(), enlarger(7)
    enlarge(whole, tmp_path, PAMS(4, 4), every, epochs=3)
    enlarge(resumed, tmp_path, callback := PAMS(4, 4), epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(whole, resumed)
    teacher = callback.state_dict()["teacher"]["weights"]
    assert all(torch.equal(value, teacher[name]) for name, value in small_edsr().state_dict().items())


def test_another_teacher_than_before_is_reported(tmp_path):
    keep = ModelCheckpoint(tmp_path, "one")
    enlarge(enlarger(), tmp_path, PAMS(teacher=small_edsr(1)), keep, epochs=1)
    with pytest.warns(UserWarning, match="The teacher is weights .* but this run began with"):
        enlarge(enlarger(), tmp_path, PAMS(teacher=small_edsr(2)), ckpt_path=tmp_path / "one.ckpt")
    enlarge(enlarger(), tmp_path, PAMS(), ModelCheckpoint(tmp_path, "own"), epochs=1)
    callback = PAMS(teacher=small_edsr(1))
    with pytest.warns(UserWarning, match="The teacher is weights"):
        enlarge(enlarger(), tmp_path, callback, ckpt_path=tmp_path / "own.ckpt")
    assert_same(callback._teacher.network, small_edsr(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The teacher")
        enlarge(enlarger(), tmp_path, PAMS(teacher=small_edsr(1)), ckpt_path=tmp_path / "one.ckpt")


def test_a_wider_teacher(tmp_path):
    teacher = small_edsr(features=16)
    with pytest.raises(MisconfigurationException, match="init_from_teacher=False"):
        enlarge(enlarger(), tmp_path, PAMS(teacher=teacher))
    module = enlarger()
    enlarge(module, tmp_path, PAMS(teacher=teacher, init_from_teacher=False))
    assert module.trainer.callback_metrics["train/pams/skt"] > 0


def test_ranges_are_drawn(tmp_path):
    make_trainer(tmp_path, PAMS(w_at=0.0), max_epochs=1).fit(enlarger(), pairs(4))
    assert (tmp_path / "pams_ranges.png").exists()


def test_a_layer_without_a_place_for_activations(tmp_path):
    network = RDN(2, blocks=1, layers=2, growth=4, features=4)
    module = SuperResolution(network, scale=2, input_shape=(3, 8, 8))
    enlarge(module, tmp_path, PAMS(include=["network.GFF.1"], w_at=0.0))
    assert not quantizers_of(module)
    assert isinstance(weight_quantizer(network.GFF[1]), MaxScaleWeight)


def test_a_network_that_was_left_in_eval_mode(tmp_path):
    module = enlarger()
    module.network.eval()
    trainer = enlarge(module, tmp_path, PAMS())
    assert "train/pams/skt" in trainer.callback_metrics
    assert all(quantizer.max_val > 0 for quantizer in quantizers_of(module).values())


def test_without_transfer_there_is_no_teacher(tmp_path):
    callback = PAMS(w_at=0.0, teacher="nowhere.pt")
    trainer = enlarge(enlarger(), tmp_path, callback, epochs=1)
    assert callback.state_dict() == {}
    assert "train/pams/skt" not in trainer.callback_metrics


class NoFeatures(Foreign):
    """Its loss does not come from a call of the network."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net.head(batch[0].mean((1, 2, 3), keepdim=True).flatten(1).repeat(1, 8)), batch[1])


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (made, [PAMS(teacher="no/such.ckpt")], r"teacher: path 'no/such.ckpt' does not exist"),
        (made, [PAMS(teacher=nn.Linear(1, 1))], r"teacher: Linear has no module 'blocks.1.conv2'"),
        (made, [PAMS(feature_layer="net.head")], r"feature_layer 'head' must be \(N, C, H, W\)"),
        (made, [PAMS(feature_layer="net.hed")], r"no module 'net.hed'. Did you mean 'net.head'"),
        (made, [PAMS(include=["net.stem"])], "finds no layer of Foreign"),
        (NoFeatures, [PAMS()], "computes without 'net.blocks.1.conv2'"),
        (lambda: made(lambda: nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(3)))), [PAMS()],
         r"feature_layer=None\): Foreign has no convolution"),
        (made, [PAMS(), L1Norm(0.5)], "listed before PAMS"),
        (made, [L1Norm(0.5, start_epoch=1), PAMS()], "start_epoch=0 and listed before PAMS"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(module, callbacks, message, tmp_path):
    module = module()
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(module, tmp_path, *callbacks)
    assert not module.trainer.global_step


def test_a_fit_that_ends_with_the_measurement_is_reported(tmp_path):
    with pytest.warns(UserWarning, match=r"PAMS\(ema_epoch=2\): ranges are measured until the fit ends"):
        fit(made(), tmp_path, PAMS(ema_epoch=2), max_epochs=2)


def test_half_precision_weights_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="'bf16-mixed'"):
        fit(made(), tmp_path, PAMS(), precision="bf16-true")


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path):
    fit(made(), tmp_path, ModelCheckpoint(tmp_path, "other"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="was written by a run without PAMS"):
        fit(made(), tmp_path, PAMS(), ckpt_path=tmp_path / "other.ckpt")


# ---- with others


@pytest.mark.parametrize("first", [True, False])
def test_with_masks(first, tmp_path):
    """What is masked is zero, and stays it when it is rounded."""
    masks, own = MagnitudePruning(0.5), PAMS(4, 4)
    module = made()
    fit(module, tmp_path, *((masks, own) if first else (own, masks)), max_epochs=2)
    weight = module.net.blocks[0].conv1.weight
    assert 0.3 < (weight == 0).float().mean() < 1
    assert isinstance(weight_quantizer(module.net.blocks[0].conv1), MaxScaleWeight)


@pytest.mark.parametrize("first", [True, False])
def test_with_learnt_masks(first, tmp_path):
    callbacks = [LBC(end_epoch=1), PAMS()]
    module = made()
    fit(module, tmp_path, *(callbacks if first else reversed(callbacks)), max_epochs=2)
    weight = module.net.blocks[0].conv1.weight
    assert (weight.detach().unflatten(1, (-1, 4)) == 0).float().mean() >= 0.5


def test_after_channels_were_removed(tmp_path):
    module = made()
    fit(module, tmp_path, L1Norm(0.3, round_to=4), PAMS(), max_epochs=2)
    assert module.net.blocks[0].conv1.weight.shape == (8, 8, 3, 3)
    assert len(quantizers_of(module)) == 4


# ---- does it work


def psnr(network, low, high):
    with torch.no_grad():
        return float(10 * torch.log10(255**2 / F.mse_loss(network.eval()(low).clamp(0, 255), high)))


@pytest.mark.slow
def test_eight_bits_are_as_good_as_real_and_four_better_than_untrained(tmp_path):
    from lightning_compress.datamodules import Photographs

    data = Photographs(scale=2, patch_size=48, batch_size=16, samples_per_epoch=3200)
    data.setup("fit")
    pair = data.pairs("val")["val"][0]
    low, high = pair.low.float()[None], pair.high.float()[None]

    def train(module, *callbacks, epochs):
        runner = make_trainer(tmp_path, *callbacks, max_epochs=epochs, limit_val_batches=0)
        with no_pictures:
            runner.fit(module, datamodule=data)
        return psnr(module.network, low, high)

    torch.manual_seed(0)
    real = SuperResolution(EDSR(2, blocks=4, features=16), 2, lambda p: torch.optim.Adam(p, lr=1e-3),
                           input_shape=(3, 24, 24))  # fmt: skip
    whole = train(real, epochs=5)
    found = {}
    for bits in (8, 4):
        module = SuperResolution(copy.deepcopy(real.network), 2, lambda p: torch.optim.Adam(p, lr=1e-4),
                                 input_shape=(3, 24, 24))  # fmt: skip
        data.samples_per_epoch = 1600
        found[bits] = train(module, PAMS(bits, bits), epochs=2)
    untrained = quantized(copy.deepcopy(real.network), bits=4)
    for _ in range(4):
        untrained.train()(next(iter(data.train_dataloader()))[0])
    assert found[8] > whole - 0.1
    assert found[4] > whole - 1
    assert found[4] > psnr(untrained, low, high)
