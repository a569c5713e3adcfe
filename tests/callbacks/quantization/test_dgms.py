"""DGMS: every number of the mathematics, sizes of the paper's networks, and the callback."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from foreign import Foreign, digits, fit, made, make_trainer, no_pictures
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import nn
from torch.nn import functional as F
from torchvision.models import mnasnet1_0, resnet18, resnet50

from lightning_compress import export, load
from lightning_compress.callbacks import DGMS, L1Norm, MagnitudePruning
from lightning_compress.callbacks.quantization.dgms import (
    MixtureQuantizer,
    assign,
    initial_mixture,
    kmeans_1d,
    round_to_int8,
    soft_weight,
)
from lightning_compress.callbacks.quantization.dgms import mixture as mixture_file
from lightning_compress.callbacks.quantization.dgms.initialisation import Start, mixture_of_clusters
from lightning_compress.callbacks.quantization.dgms.mixture import Components, responsibilities
from lightning_compress.callbacks.quantization.dgms.quantizer import attach_mixtures, mixtures_in
from lightning_compress.catalog import card
from lightning_compress.core.profile import profile
from lightning_compress.core.quant.attach import quantize_weight
from lightning_compress.core.quant.codebook import codebooks_of, load_codebooks
from lightning_compress.core.quant.layers import choose_quantized
from lightning_compress.core.report import Account
from lightning_compress.datamodules import CIFAR10
from lightning_compress.export.onnx import run_onnx
from lightning_compress.modules import ImageClassifier
from lightning_compress.networks import resnet20, resnet32, resnet56, vgg_small

T = torch.tensor
MU, PI, SIGMA = T([-0.2, 0.1, 0.3]), T([0.4, 0.2, 0.25, 0.15]), T([0.03, 0.05, 0.04, 0.08])
W = T([-0.3, -0.12, -0.02, 0.04, 0.055, 0.07, 0.12, 0.2, 0.25, 0.5])
HARD = T([-0.2, -0.2, 0, 0, 0.1, 0.1, 0.1, 0.3, 0.3, 0.3])
LEVELS = F.pad(MU, (1, 0))
KNOWN = T([-0.22, -0.18, -0.2, 0.01, 0.03, -0.01, 0.09, 0.11, 0.29, 0.31, 0.30, 0.33])


def hard(weight, mu=MU, pi=PI, sigma=SIGMA, **kwargs):
    return F.pad(mu, (1, 0))[assign(weight, mu, pi, sigma, **kwargs).long()]


def soft(weight, tau, **kwargs):
    return soft_weight(weight, MU, PI, SIGMA, T([tau]), **kwargs)


def by_the_formula(weight, mu, pi, sigma, tau):
    """The paper's equations with all K x n numbers, through plain autograd."""
    level, share = F.pad(mu, (1, 0))[:, None], (pi.abs() / pi.abs().sum())[:, None]
    width = sigma[:, None]
    density = share / (2 * math.pi * width**2).sqrt() * (-((weight - level) ** 2) / (2 * width**2)).exp()
    region = F.softmax(density / (density.sum(0) + 1e-11) / tau, dim=0)
    return (region * level).sum(0)


def started(weight, bits=2, init="kmeans", **kwargs):
    quantizer = MixtureQuantizer(bits, **kwargs)
    quantizer.start(initial_mixture(weight, 2**bits, init))
    return quantizer


# ---- soft and hard weights


def test_the_worked_example():
    assert torch.equal(hard(W), HARD)
    torch.testing.assert_close(soft(W, 0.01), HARD, atol=1e-6, rtol=0)
    warm = [-0.199955, -0.199952, 0.000010, 0.001073, 0.080635, 0.099872, 0.099992, 0.298444, 0.299953, 0.299955]
    torch.testing.assert_close(soft(W, 0.1), T(warm), atol=1e-6, rtol=0)


def test_shares_of_weights():
    for eps in (False, True):
        _, r = responsibilities(W, Components.of(MU, PI, SIGMA), eps)
        torch.testing.assert_close(r.sum(0), torch.ones(10), atol=1e-6, rtol=0)
        torch.testing.assert_close((r / 0.01).softmax(0).sum(0), torch.ones(10))
    in_double = responsibilities(W.double(), Components.of(MU.double(), PI.double(), SIGMA.double()), True)[1]
    lost = 1 - in_double.sum(0)
    assert (lost > 0).all()
    assert lost.max() < 1e-9


def test_an_outlier_belongs_to_the_nearest_mean_or_as_officially_to_none():
    far = T([5.0])
    assert soft(far, 0.01).item() == hard(far).item() == pytest.approx(0.3)
    assert soft(far, 0.01, official_eps=True).item() == pytest.approx(0.05)
    assert hard(far, official_eps=True).item() == 0
    torch.testing.assert_close(soft(W, 0.01, official_eps=True), soft(W, 0.01), atol=1e-7, rtol=0)
    assert torch.equal(hard(W, official_eps=True), HARD)


def test_gradients_of_the_worked_example():
    tensors = [t.clone().requires_grad_() for t in (W, MU, PI, SIGMA, T([0.01]))]
    (soft_weight(*tensors) * torch.arange(1, 11)).sum().backward()
    weight, mu, pi, sigma, tau = (t.grad for t in tensors)
    torch.testing.assert_close(mu, T([3.0, 17.99959, 27.0]), atol=1e-4, rtol=0)
    assert weight[4].item() == pytest.approx(1.2807e-3, rel=1e-3)
    assert weight[[i for i in range(10) if i != 4]].abs().max() < 1e-16
    assert all(bool((g != 0).all()) for g in (pi, sigma, tau))
    assert sigma.abs().argmax() == 0
    assert 1e-4 < sigma[0].abs() < 1e-2


@pytest.mark.parametrize("official_eps", [False, True])
@pytest.mark.parametrize("chunk", [3, 100], ids=["in_chunks", "at_once"])
def test_gradcheck(official_eps, chunk, monkeypatch):
    monkeypatch.setattr(mixture_file, "CHUNK", chunk)
    pi, sigma = PI.double() * T([1, -2, 1, 1]), SIGMA.double() * T([1, 1, -1, 1])  # signs do not count
    tensors = [t.double().clone().requires_grad_() for t in (W, MU, pi, sigma, T([0.5]))]
    assert torch.autograd.gradcheck(lambda *args: soft_weight(*args, official_eps), tensors)


def test_equals_plain_autograd():
    torch.manual_seed(0)
    weight = torch.randn(400, dtype=torch.float64) * 0.2
    tensors = [t.double().clone().requires_grad_() for t in (weight, MU, PI, SIGMA, T([0.05]))]
    gradient = torch.randn_like(weight)
    found = []
    for form in (by_the_formula, lambda *args: soft_weight(*args, official_eps=True)):
        output = form(*tensors)
        found.append([output, *torch.autograd.grad(output, tensors, gradient)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_scale_and_sign_of_the_shares_do_not_count():
    args = T([0.05])
    torch.testing.assert_close(soft_weight(W, MU, -3 * PI, SIGMA, args), soft_weight(W, MU, PI, SIGMA, args))
    assert torch.equal(hard(W, pi=-3 * PI), HARD)


def test_neither_does_the_sign_of_a_width_and_none_is_narrower_than_the_floor():
    assert torch.equal(soft_weight(W, MU, PI, -SIGMA, T([0.05])), soft_weight(W, MU, PI, SIGMA, T([0.05])))
    tensors = [t.clone().requires_grad_() for t in (W, MU, PI, T([0.03, 0.0, 0.04, 1e-9]), T([0.01]))]
    output = soft_weight(*tensors)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(t.grad.isfinite().all() for t in tensors)


def test_an_empty_component_has_no_part():
    tensors = [t.clone().requires_grad_() for t in (W, MU, T([0.4, 0.2, 0.0, 0.15]), SIGMA, T([0.01]))]
    output = soft_weight(*tensors)
    output.sum().backward()
    assert 2 not in assign(*tensors[:4]).tolist()
    assert all(t.grad.isfinite().all() for t in tensors)


def test_nothing_of_size_k_by_n_is_saved():
    weight = torch.randn(64, 32, 3, 3, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        soft_weight(weight, *initial_mixture(weight, 16), T([0.01]))
    assert sum(saved) < 2.01 * weight.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixtures_are_computed_in_float32_under_autocast(dtype):
    with torch.autocast("cpu", dtype):
        output = soft(W, 0.01)
    assert output.dtype == torch.float32
    assert torch.equal(output, soft(W, 0.01))


# ---- where it starts


def test_known_clusters():
    centers = kmeans_1d(KNOWN, 4)
    torch.testing.assert_close(centers, T([-0.2, 0.01, 0.1, 0.3075], dtype=torch.float64))
    mu, pi, sigma = initial_mixture(KNOWN, 4)
    torch.testing.assert_close(mu, T([-0.2, 0.1, 0.3075]))
    torch.testing.assert_close(pi, T([0.25, 0.25, 0.166667, 0.333333]), atol=1e-6, rtol=0)
    torch.testing.assert_close(sigma, T([0.0234521, 0.02, 0.0141421, 0.0170783]), atol=1e-7, rtol=0)


def test_empirical_and_em_start_from_the_clusters():
    mu, pi, sigma = initial_mixture(KNOWN, 4, "empirical", sigma_empirical=0.02)
    torch.testing.assert_close(mu, T([-0.2, 0.1, 0.3075]))
    assert sigma.tolist() == pytest.approx([0.02] * 4)
    torch.manual_seed(0)
    means, widths, counts = T([0.0, -0.3, 0.2]), T([0.03, 0.05, 0.04]), [3000, 1000, 2000]
    drawn = torch.cat([m + s * torch.randn(n) for m, s, n in zip(means, widths, counts, strict=True)])
    mu, pi, sigma = initial_mixture(drawn, 3, "em")
    torch.testing.assert_close(mu, means[1:], atol=0.005, rtol=0)
    torch.testing.assert_close(sigma, widths, atol=0.003, rtol=0)
    torch.testing.assert_close(pi, T(counts) / 6000, atol=0.01, rtol=0)
    again = initial_mixture(drawn.repeat(30), 3, "em")  # so many that a sample is looked at
    for one, other in zip(again, (mu, pi, sigma), strict=True):
        torch.testing.assert_close(one, other, atol=0.003, rtol=0)


def lloyd(values, centers, steps=300):
    """Slow and obvious."""
    for _ in range(steps):
        labels = (values[:, None] - centers).abs().argmin(1)
        centers = torch.stack([values[labels == j].mean() for j in range(len(centers))])
    return centers


@pytest.mark.parametrize("clusters", [4, 8, 16])
def test_kmeans_equals_lloyds_iteration_from_the_same_seeds(clusters):
    torch.manual_seed(0)
    values = torch.randn(3000, dtype=torch.float64)
    seeds = values.sort().values[((torch.arange(clusters) + 0.5) / clusters * 3000).long()]
    torch.testing.assert_close(kmeans_1d(values, clusters), lloyd(values, seeds), atol=1e-5, rtol=0)


def test_kmeans_from_drawn_weights_is_reproducible_and_no_better():
    torch.manual_seed(0)
    values = torch.randn(2000)

    def spread(centers):
        return (values[:, None] - centers).abs().amin(1).square().sum()

    assert torch.equal(kmeans_1d(values, 8, seed=3), kmeans_1d(values, 8, seed=3))
    assert not torch.equal(kmeans_1d(values, 8, seed=3), kmeans_1d(values, 8, seed=4))
    assert spread(kmeans_1d(values, 8)) <= 1.01 * min(spread(kmeans_1d(values, 8, seed=s)) for s in range(4))


def test_empty_clusters_are_filled_again():
    values = torch.cat([torch.zeros(1000), T([1.0, 2.0, 3.0, 4.0, 5.0])])  # all quantiles are 0
    assert kmeans_1d(values, 4).tolist() == [0, 1.5, 3.5, 5]
    assert kmeans_1d(values, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert kmeans_1d(T([0.5, 0.5]), 4).tolist() == [0.5] * 4


def test_a_lonely_weight_has_a_width():
    start = mixture_of_clusters(T([0.0, 0.01, -0.01, 1.0]), T([0.0, 1.0], dtype=torch.float64))
    assert start.sigma.tolist() == pytest.approx([0.01, 1e-6])
    assert hard(T([0.0, 1.0]), *start).tolist() == [0, 1]


def test_few_different_values_are_a_fixed_point():
    torch.manual_seed(0)
    weight = T([-0.4, 0.0, 0.1, 0.25])[torch.randint(4, (32, 16, 3, 3))]
    quantizer = started(weight)
    torch.testing.assert_close(quantizer.hard_weight(weight), weight, atol=1e-7, rtol=0)
    torch.testing.assert_close(quantizer(weight), weight, atol=1e-6, rtol=0)


# ---- the parametrisation


def test_until_it_starts_weights_pass_through():
    quantizer, weight = MixtureQuantizer(4), torch.randn(8, 8)
    assert quantizer(weight) is weight
    assert quantizer.eval()(weight) is weight


def test_mode_decides_between_soft_and_hard():
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)
    quantizer = started(weight, bits=3, tau=0.3)
    warm, cold = quantizer(weight), quantizer.eval()(weight)
    assert len(cold.unique()) <= 8
    assert (cold == 0).any()
    assert len(warm.unique()) > 500
    assert not cold.requires_grad
    assert torch.equal(cold, quantizer.levels[quantizer.codes(weight).long()])


def test_soft_and_hard_are_near_at_a_low_temperature_only():
    torch.manual_seed(0)
    weight = torch.randn(20_000)
    gaps = []
    for tau in (0.01, 1.0):
        quantizer = started(weight, bits=4, tau=tau)
        gaps.append(float((quantizer(weight) - quantizer.hard_weight(weight)).detach().square().mean()))
    quantization = float((started(weight, bits=4).hard_weight(weight) - weight).square().mean())
    assert gaps[0] < 0.5 * quantization
    assert gaps[1] > 10 * quantization


def test_hard_weights_are_computed_once_per_change(monkeypatch):
    weight = nn.Parameter(torch.randn(32, 8))
    quantizer = started(weight).eval()
    calls = []
    monkeypatch.setattr(quantizer, "_quantise", lambda w: calls.append(1) or MixtureQuantizer._quantise(quantizer, w))
    first = quantizer(weight)
    assert quantizer(weight) is first
    with torch.no_grad():
        quantizer.mu.mul_(2)
    torch.testing.assert_close(quantizer(weight), MixtureQuantizer._quantise(quantizer, weight))
    weight.data.copy_(-weight.data)  # no version counter sees this
    torch.testing.assert_close(quantizer(weight), MixtureQuantizer._quantise(quantizer, weight))
    assert len(calls) == 3
    assert quantizer.train()._hard is None
    quantizer.eval()(weight)
    assert copy.deepcopy(quantizer)._hard is None


def test_hard_weights_of_inference_mode_serve_outside_of_it():
    layer = nn.Conv2d(3, 4, 3)
    quantize_weight(layer, started(layer.weight))
    layer.eval()
    with torch.inference_mode():
        kept = layer(torch.rand(1, 3, 5, 5))
    x = torch.rand(1, 3, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert kept.is_inference()
    assert x.grad.abs().sum() > 0


def test_a_network_in_half_precision_keeps_its_codes():
    torch.manual_seed(0)
    weight = torch.randn(32, 16, 3, 3).bfloat16().float()  # so that only the mixture is rounded
    quantizer = started(weight, bits=3).eval()
    wanted = quantizer.codes(weight)
    halved = copy.deepcopy(quantizer).bfloat16()
    assert halved(weight.bfloat16()).dtype == torch.bfloat16
    assert (halved.codes(weight.bfloat16()) == wanted).float().mean() > 0.98


def test_codes_of_eight_bits():
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3)
    network = nn.Sequential(nn.Conv2d(8, 16, 3))
    quantize_weight(network[0], started(weight, bits=4))
    quantizer = network[0].parametrizations.weight[0]
    wanted, form = quantizer.eval()(weight), quantizer.integer(weight)
    assert form.codes.shape == weight.shape
    assert (form.bits, form.scale.shape, form.codes.dtype) == (8, (), torch.int16)
    assert form.codes.abs().max() == 127
    assert ((form.codes == 0) >= (wanted == 0)).all()
    assert (form.scale * form.codes - wanted).abs().max() <= form.scale / 2 + 1e-7
    round_to_int8(network)
    exact = quantizer.integer(weight)
    torch.testing.assert_close(exact.scale * exact.codes, quantizer(weight), atol=1e-7, rtol=1e-6)


def test_int8_inference(tmp_path):
    """Weights on a grid of 255 values, activations calibrated: nearly the same logits, the same classes."""
    module = made()
    fit(module, tmp_path, DGMS(weight_bits=4), max_epochs=2)
    x = next(iter(digits(64, batch_size=64)))[0]
    with torch.no_grad():
        before = module.eval()(x)
        round_to_int8(module)
        after = module(x)
    assert (before - after).norm() < 0.05 * before.norm()
    exported = export(module, tmp_path / "int8.onnx", x, format="int8", calibration=[x])
    (found,) = run_onnx(exported.path, (x,), {})
    assert (found - after).norm() < 0.1 * after.norm()
    assert (found.argmax(1) == after.argmax(1)).float().mean() > 0.9


# ---- networks of the paper


def quantised(build):
    with torch.device("meta"):
        network = build()
    return network, choose_quantized(network, exclude_first=True, exclude_linear=True)


@pytest.mark.parametrize(
    ("build", "layers", "weights", "left"),
    [
        pytest.param(resnet18, 19, 11_157_504, {"conv1": 9_408, "fc": 512_000}, id="DGMS-ResNet-18"),
        pytest.param(resnet50, 52, 23_445_504, {"conv1": 9_408, "fc": 2_048_000}, id="DGMS-ResNet-50"),
        pytest.param(resnet20, 18, 267_264, {"conv1": 432, "linear": 640}, id="DGMS-ResNet-20"),
        pytest.param(resnet32, 30, 460_800, {"conv1": 432, "linear": 640}, id="DGMS-ResNet-32"),
        pytest.param(resnet56, 54, 847_872, {"conv1": 432, "linear": 640}, id="DGMS-ResNet-56"),
        pytest.param(
            lambda: vgg_small(activation="relu", bias=True), 5, 4_571_136, {"features.conv0": 3_456, "fc": 81_920},
            id="DGMS-VGG-small",
        ),
        pytest.param(mnasnet1_0, 51, 3_063_528, {"layers.0": 864, "classifier.1": 1_280_000}, id="DGMS-MnasNet-1.0"),
    ],
)  # fmt: skip
def test_layers_that_are_quantised(build, layers, weights, left):
    network, (names, reasons) = quantised(build)
    assert len(names) == layers
    assert sum(network.get_submodule(name).weight.numel() for name in names) == weights
    assert {name: network.get_submodule(name).weight.numel() for name in reasons} == left
    first, last = left
    assert reasons == {first: "is the first layer", last: "is linear"}


@pytest.mark.parametrize(("bits", "ratio"), [(4, 6.09), (3, 7.45), (2, 9.58)], ids="DGMS-ResNet-18-{}".format)
def test_resnet18_is_smaller(bits, ratio):
    network, (names, _) = quantised(resnet18)
    weights = sum(network.get_submodule(name).weight.numel() for name in names)
    rest = 9_408 + 513_000  # the first convolution, the classifier with its bias
    assert 32 * (weights + rest) / (bits * weights + 32 * rest) == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize("row", card("dgms").published, ids=lambda row: f"DGMS-{row.network}-{row.setting}")
def test_rows_of_the_catalog(row):
    cost = profile({"ResNet-18": resnet18}[row.network](), (1, 3, 224, 224))
    assert (cost.macs, cost.params) == (row.result["macs"], row.result["params"])


def test_resnet18_in_a_file():
    """Indices of 4 bits, and 15 values for each layer."""
    network, (names, _) = quantised(resnet18)
    shapes = [network.get_submodule(name).weight.shape for name in names]
    assert sum(math.prod(shape) // 2 for shape in shapes) == 5_578_752
    layer = nn.Conv2d(64, 64, 3)
    book = started(layer.weight, bits=4).codebook(layer.weight)
    assert book.nbytes == layer.weight.numel() // 2 + 4 * 15


# ---- the callback


class Watch(Callback):
    """Notes the mixtures after every step, and whether the weights pass through them."""

    def __init__(self):
        self.taus, self.groups = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.taus += [float(m.tau.detach()) for m in mixtures_in(pl_module).values()]
        self.groups.append([(len(g["params"]), g["lr"], g["weight_decay"]) for g in trainer.optimizers[0].param_groups])


def test_ends_with_few_values_per_layer(tmp_path):
    module, watch = made(), Watch()
    trainer = fit(module, tmp_path, DGMS(weight_bits=2), watch, max_epochs=2)
    module.eval()
    sparsity = []
    for name in ("blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"):
        layer = module.net.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        assert len(layer.weight.unique()) <= 4
        sparsity.append(layer.weight == 0)
    assert len(module.net.stem.weight.unique()) > 50
    assert len(module.net.head.weight.unique()) > 50
    zeros = float(torch.cat([s.flatten() for s in sparsity]).float().mean())
    assert float(trainer.callback_metrics["dgms/sparsity"]) == pytest.approx(zeros)
    assert 2 < float(trainer.callback_metrics["dgms/levels"]) <= 4
    account = Account.load(tmp_path)
    row = {row.name: row for row in account.after.rows}["net.blocks.0.conv1"]
    assert (row.bits, row.params) == (2, 864)
    assert row.nonzeros == int(module.net.blocks[0].conv1.weight.count_nonzero())
    assert row.bytes == codebooks_of(module)["net.blocks.0.conv1"].nbytes
    assert "with 2 bits" in account.notes[0]
    assert ("net.stem", "is the first layer") in account.left_alone


def test_mixtures_start_from_the_weights_and_then_learn(tmp_path):
    module, plain = made(), made()
    fit(module, tmp_path, DGMS(weight_bits=3, gmm_lr=1e-3), max_epochs=1, limit_train_batches=2)
    for name, mixture in mixtures_in(module).items():
        start = initial_mixture(plain.get_submodule(name).weight, 8)
        assert 0 < (mixture.mu - start.mu).abs().max() < 0.05
        assert not torch.equal(mixture.sigma, start.sigma)
        assert not torch.equal(mixture.pi, start.pi)
        assert mixture.tau != 0.01


def test_mixtures_have_a_group_of_their_own(tmp_path):
    watch = Watch()
    fit(made(), tmp_path, DGMS(gmm_lr=3e-4, gmm_weight_decay=1e-5), watch, max_epochs=2)
    *_, own = watch.groups[0]
    assert own == (16, pytest.approx(3e-4), 1e-5)
    assert watch.groups[-1][-1] == (16, pytest.approx(3e-4 * 0.81), 1e-5)
    fit(made(), tmp_path, DGMS(gmm_lr=None, gmm_weight_decay=None), watch := Watch(), max_epochs=1)
    assert watch.groups[0][-1][1] == 0.1


def test_the_temperature_stays_above_its_floor(tmp_path):
    class Push(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for mixture in mixtures_in(pl_module).values():
                mixture.tau.grad = torch.full_like(mixture.tau, 1e4)

    fit(made(), tmp_path, DGMS(), Push(), watch := Watch(), max_epochs=1)
    assert watch.taus == [pytest.approx(1e-4)] * len(watch.taus)


def test_the_temperature_may_be_fixed(tmp_path):
    fit(made(), tmp_path, DGMS(learn_tau=False), watch := Watch(), max_epochs=1)
    assert watch.taus == [pytest.approx(0.01)] * len(watch.taus)


def test_bits_by_layer(tmp_path):
    module = made()
    fit(module, tmp_path, DGMS({"*conv*": 4, "*1.conv2": 2}, exclude=["*0.conv1"]), max_epochs=1)
    assert {n: m.bits for n, m in mixtures_in(module).items()} == {
        "net.blocks.0.conv2": 4, "net.blocks.1.conv1": 4, "net.blocks.1.conv2": 2,
    }  # fmt: skip


def test_first_and_linear_layers_can_be_quantised_too(tmp_path):
    module = made()
    fit(module, tmp_path, DGMS(2, exclude_first=False, exclude_linear=False), max_epochs=1)
    assert set(mixtures_in(module)) >= {"net.stem", "net.head"}


def test_small_layers_are_left_alone(tmp_path):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 6, 3))
            self.head = nn.Linear(6, 10)

        def forward(self, x):
            return self.head(self.convs(x).mean((2, 3)))

    module = made(Small)
    fit(module, tmp_path, DGMS(weight_bits=4), max_epochs=1)
    assert list(mixtures_in(module)) == ["net.convs.2"]
    left_alone = dict(Account.load(tmp_path).left_alone)
    assert left_alone["net.convs.1"] == "has 4 weights, no more than 4 bits tell apart"


def test_the_file_holds_the_whole_network(tmp_path):
    module = made()
    fit(module, tmp_path, DGMS(weight_bits=3), max_epochs=1)
    plain = made()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    load_codebooks(plain, tmp_path / "dgms.codebooks")
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(plain.eval()(x), module.eval()(x))


def test_validation_alone_needs_no_mixture(tmp_path):
    module, trainer = made(), make_trainer(tmp_path, DGMS())
    before = module.state_dict()
    trainer.validate(module, digits(32, 64), verbose=False)
    assert before.keys() == module.state_dict().keys()


def test_a_resumed_run_keeps_its_mixtures(tmp_path, monkeypatch):
    fit(made(), tmp_path, DGMS(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=1)
    saved = load(Foreign, tmp_path / "epoch=0.ckpt")
    assert all(m.started for m in mixtures_in(saved).values())

    def refuse(*args, **kwargs):
        raise AssertionError("k-means again")

    monkeypatch.setattr("lightning_compress.callbacks.quantization.dgms.callback.initial_mixture", refuse)
    (tmp_path / "again").mkdir()
    fit(made(), tmp_path / "again", DGMS(), max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert Account.load(tmp_path / "again").left_alone == Account.load(tmp_path).left_alone


def test_evaluated_with_hard_weights_after_loading(tmp_path):
    module = made()
    fit(module, tmp_path, DGMS(weight_bits=2), ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    again, x = load(Foreign, tmp_path / "last.ckpt").eval(), torch.rand(4, 1, 8, 8)
    assert torch.equal(again(x), module.eval()(x))
    assert len(again.net.blocks[0].conv1.weight.unique()) <= 4


# ---- with others


@pytest.mark.parametrize("order", [1, -1], ids=["first", "after"])
def test_pruned_weights_stay_zero(tmp_path, order):
    module = made()
    callbacks = [MagnitudePruning(0.7, include=["net.blocks*"]), DGMS(weight_bits=2)][::order]
    fit(module, tmp_path, *callbacks, max_epochs=2)
    module.eval()
    for layer in (module.net.blocks[0].conv1, module.net.blocks[1].conv2):
        pruned = layer.parametrizations.weight.original == 0
        assert pruned.float().mean() > 0.4
        assert (layer.weight[pruned] == 0).all()


def test_after_channels_were_removed(tmp_path):
    module = made()
    fit(module, tmp_path, L1Norm(0.3, round_to=4), DGMS(weight_bits=3), max_epochs=1)
    assert module.net.blocks[0].conv1.weight.shape == (8, 8, 3, 3)
    assert len(module.eval().net.blocks[0].conv1.weight.unique()) <= 8
    load_codebooks(plain := made(), tmp_path / "dgms.codebooks")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(plain.eval()(x), module(x))


def test_an_average_of_weights_and_mixtures(tmp_path):
    module = made()
    fit(module, tmp_path, DGMS(weight_bits=2), EMAWeightAveraging(decay=0.5), max_epochs=2)
    assert all(m.started for m in mixtures_in(module).values())
    assert len(module.eval().net.blocks[0].conv1.weight.unique()) <= 4


@pytest.mark.parametrize(
    ("callbacks", "kwargs", "message"),
    [
        ([DGMS(include=["net.stem"])], {}, "finds no layer of Foreign"),
        ([DGMS(), DGMS(weight_bits=2)], {}, "DGMS finds no layer of Foreign.*quantised by MixtureQuantizer already"),
        ([DGMS()], {"precision": "bf16-true"}, "Take 'bf16-mixed'"),
        ([EMAWeightAveraging(), DGMS()], {}, "List DGMS before EMAWeightAveraging"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, callbacks, kwargs, message):
    module = made()
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, tmp_path, *callbacks, **kwargs)
    assert not module.trainer.global_step


def test_mixtures_that_no_optimiser_holds_are_named(tmp_path):
    class Chosen(Foreign):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"no optimiser holds the means of net\.blocks\.0\.conv1"):
        fit(Chosen(), tmp_path, DGMS())


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path):
    fit(made(), tmp_path, ModelCheckpoint(tmp_path, "other"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"was written by a run without DGMS"):
        fit(made(), tmp_path, DGMS(), ckpt_path=tmp_path / "other.ckpt")


def test_a_picture_of_the_values(tmp_path):
    trainer = make_trainer(tmp_path, DGMS(weight_bits=2), max_epochs=1, limit_train_batches=1)
    trainer.fit(made(), digits())
    assert (tmp_path / "dgms_values.png").exists()


# ---- what it is for


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    module = Foreign(lr=0.1)
    make = make_trainer(tmp_path_factory.mktemp("trained"), max_epochs=8)
    with no_pictures:
        make.fit(module, digits(1200, batch_size=40))
    return module.state_dict()


TEST = digits(597, 1200, batch_size=597)


def accuracy(tmp_path, state, *callbacks, epochs=0, lr=0.003):
    module = Foreign(lr=lr)
    module.load_state_dict(state)
    runner = make_trainer(tmp_path, *callbacks, max_epochs=epochs)
    torch.manual_seed(0)
    with no_pictures:
        runner.fit(module, digits(1200, batch_size=40))
    return runner.validate(module, TEST, verbose=False)[0]["val_acc"]


def without_training(state, bits, mode="eval", tau=0.01):
    module = Foreign()
    module.load_state_dict(state)
    names = ["net.blocks.0.conv1", "net.blocks.0.conv2", "net.blocks.1.conv1", "net.blocks.1.conv2"]
    attach_mixtures(module, dict.fromkeys(names, bits), tau, True, False)
    module.eval()
    for name, mixture in mixtures_in(module).items():
        mixture.start(Start(*initial_mixture(module.get_submodule(name).parametrizations.weight.original, 2**bits)))
        mixture.train(mode == "train")
    x, y = next(iter(TEST))
    with torch.no_grad():
        return float((module(x).argmax(1) == y).float().mean())


def test_four_bits_cost_nothing_and_two_bits_come_back(tmp_path, trained):
    """3,456 weights are few to share 16 values; half a point is three of 597 digits."""
    dense = accuracy(tmp_path, trained, epochs=2)
    assert dense > 0.94
    assert without_training(trained, 4) > without_training(trained, 8) - 0.03
    assert accuracy(tmp_path, trained, DGMS(4), epochs=2) > dense - 0.006
    dropped = without_training(trained, 2)
    assert dropped < 0.5
    assert accuracy(tmp_path, trained, DGMS(2), epochs=3) > dense - 0.02


def test_soft_weights_tell_what_hard_ones_will_do_at_a_low_temperature(trained):
    hard_accuracy = without_training(trained, 4)
    assert abs(without_training(trained, 4, "train", tau=0.01) - hard_accuracy) < 0.002
    assert without_training(trained, 4, "train", tau=1.0) < 0.3


@pytest.mark.real_data
def test_kmeans_alone_on_a_trained_network():
    """The public ResNet-20 on 1,024 test images of CIFAR-10."""
    files = ("cifar10.npz", "weights/resnet20-cifar10.pt")
    root = real_data(*files)
    module = ImageClassifier("resnet20", weights=str(root / files[1])).eval()
    images = CIFAR10(str(root), val_size=0, batch_size=1024, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images.setup("test")
    x, y = next(iter(images.test_dataloader()))

    @torch.no_grad()
    def correct():
        return float((module(x).argmax(1) == y).float().mean())

    accuracies = {32: correct()}
    names, _ = choose_quantized(module, exclude_first=True, exclude_linear=True)
    weights = {name: module.get_submodule(name).weight.detach() for name in names}
    for bits in (4, 2):
        undo = attach_mixtures(module, dict.fromkeys(names, bits), 0.01, True, False)
        for name, mixture in mixtures_in(module).items():
            mixture.start(initial_mixture(weights[name], 2**bits))
        accuracies[bits] = correct()
        undo(module)
    assert accuracies[32] > 0.9
    assert accuracies[4] > accuracies[32] - 0.05  # a network this small has no weights to spare
    assert accuracies[2] < accuracies[32] - 0.1
