"""SiMaN: the closed form of the code, percentiles, gradients, the authors' layer step by step, and the callback."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from foreign import Foreign, digits, fit, made, make_trainer, no_pictures
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_compress import binary_network, load
from lightning_compress.callbacks import PCNN, RBNN, SiMaN
from lightning_compress.callbacks.quantization.siman import (
    MagnitudeCode,
    ascending,
    clip_magnitudes,
    clip_percent,
    code_magnitudes,
    largest,
    largest_half,
    magnitude_code,
    optimal_counts,
    percentile,
    siman_param_groups,
)
from lightning_compress.catalog import card
from lightning_compress.core.profile import profile
from lightning_compress.core.quant.attach import input_quantizer, real_weight, weight_quantizer
from lightning_compress.core.quant.binary import binary_layers
from lightning_compress.core.report import Account
from lightning_compress.networks import BinaryResNet, binary_resnet18, binary_resnet18_cifar, binary_resnet20, vgg_small
from lightning_compress.ops.binary_conv2d import unpack_rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the code


def test_the_closed_form_is_the_best_of_all_codes():
    w = torch.tensor([[0.9, 0.1, 0.4, 0.7, 0.05, 0.3, 0.55, 0.2]])
    sums = w.sort(descending=True).values.cumsum(1) / torch.arange(1, 9).sqrt()
    printed = [0.9, 1.13137, 1.24130, 1.27500, 1.27456, 1.24516, 1.19059, 1.13137]
    assert sums[0].tolist() == pytest.approx(printed, abs=1e-5)
    assert optimal_counts(w).item() == 4
    code = magnitude_code(w, ones="optimal")
    assert code.int().tolist() == [[1, 0, 1, 1, 0, 0, 1, 0]]
    codes = torch.tensor([c for c in itertools.product((0.0, 1.0), repeat=8) if any(c)])
    assert codes[(codes @ w[0] / codes.sum(1).sqrt()).argmax()].bool().tolist() == code[0].tolist()


@pytest.mark.parametrize(
    ("draw", "share"),
    [
        pytest.param(lambda g: torch.empty(8, 40000).exponential_(generator=g), 1 / math.e, id="SiMaN-Laplacian"),
        pytest.param(lambda g: torch.randn(8, 40000, generator=g).abs(), 0.5405, id="SiMaN-Gaussian"),
        pytest.param(lambda g: torch.rand(8, 40000, generator=g), 2 / 3, id="SiMaN-uniform"),
    ],
)
def test_the_best_share_of_ones(draw, share):
    assert optimal_counts(draw(generator())).float().mean().item() / 40000 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("n", [4, 9, 36, 577, 578])
@pytest.mark.parametrize("ties", [False, True])
def test_half_are_ones_however_they_are_found(n, ties):
    x = torch.randn(16, n, generator=generator()).abs()
    if ties:
        x = (x * 3).round() / 3
    by_median, by_sort = largest_half(x), largest(x, n // 2)
    assert torch.equal(by_median, by_sort)
    assert (by_median.sum(1) == n // 2).all()
    above = torch.where(by_median, x, torch.inf).amin(1)
    assert (above >= torch.where(by_median, -torch.inf, x).amax(1)).all()
    if not ties:
        assert torch.equal(by_median, x > x.median(1, keepdim=True).values)


# ---- the clip


def test_percentiles_are_numpys():
    values = torch.arange(100.0)
    assert percentile(values, 15).item() == pytest.approx(14.85)
    assert percentile(values, 85).item() == pytest.approx(84.15)
    x = torch.randn(37, 11, generator=generator())
    ordered = ascending(x)
    assert torch.equal(ordered, x.flatten().sort().values)
    for percent in (0, 0.0375, 15, 33.3, 50, 99.9, 100):
        assert percentile(ordered, percent).item() == pytest.approx(np.percentile(x.numpy(), percent), abs=1e-6)


def test_clip():
    weight = torch.randn(6, 4, 3, 3, generator=generator())
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(clip_magnitudes(weight, 0.0), centred)
    clipped = clip_magnitudes(weight, 15.0)
    low, high = clipped.abs().min(), clipped.abs().max()
    assert weight.numel() == 216
    assert (clipped.abs() == low).sum() == (clipped.abs() == high).sum() == 33
    assert torch.equal(clipped.sign(), centred.sign())
    inside = (clipped.abs() > low) & (clipped.abs() < high)
    torch.testing.assert_close(clipped[inside], centred[inside])


@pytest.mark.parametrize(
    ("epoch", "epochs", "percent"), [(0, 400, 15), (200, 400, 7.5), (399, 400, 0.0375), (149, 150, 0.1), (500, 400, 0)]
)
def test_schedule(epoch, epochs, percent):
    assert clip_percent(epoch, epochs) == pytest.approx(percent)


# ---- the weight


def coded(**kwargs):
    weight = nn.Parameter(torch.randn(6, 4, 3, 3, generator=generator()))
    quantizer = MagnitudeCode(weight.detach(), **kwargs)
    quantizer.refresh(weight)
    return weight, quantizer


def test_minus_the_weight_is_the_same_weight():
    weight, quantizer = coded()
    grad = torch.randn(weight.shape, generator=generator(1))
    quantizer(weight).backward(grad)
    other = nn.Parameter(-weight.detach())
    flipped = MagnitudeCode(other.detach())
    flipped.refresh(other)
    flipped(other).backward(grad)
    assert torch.equal(quantizer.code, flipped.code)
    assert torch.equal(quantizer(weight), flipped(other))
    assert torch.equal(weight.grad, -other.grad)


@pytest.mark.parametrize("weight_code", ["pm1", "01"])
def test_gradient_is_that_of_the_magnitude(weight_code):
    weight, quantizer = coded(weight_code=weight_code)
    values, grad = quantizer(weight), torch.randn(weight.shape, generator=generator(1))
    values.backward(grad)
    plain = weight.detach().clone().requires_grad_()
    dims = (1, 2, 3)
    w2 = (plain - plain.mean(dims, keepdim=True)) / (plain.var(dims, keepdim=True) + 1e-5).sqrt()
    w2.abs().backward(grad)
    torch.testing.assert_close(weight.grad, plain.grad, atol=1e-5, rtol=1e-4)
    code = w2.detach().abs().flatten(1)
    code = (code > code.median(1, keepdim=True).values).float().view(weight.shape)
    assert torch.equal(values.detach(), code if weight_code == "01" else 2 * code - 1)


def test_the_code_is_made_when_asked_for_alone():
    """Neither a forward pass nor a look at the weight, in whatever mode, makes another network of it."""
    weight = nn.Parameter(torch.randn(6, 4, 3, 3, generator=generator()))
    quantizer = MagnitudeCode(weight.detach())
    assert torch.equal(quantizer.code, weight.detach().flatten(1) > 0)
    before = quantizer(weight).detach()
    quantizer.refresh(weight)
    assert not torch.equal(quantizer(weight), before)
    before = quantizer(weight).detach()
    weight.data.normal_(generator=generator(5))
    assert torch.equal(quantizer(weight), before)
    assert torch.equal(quantizer.eval()(weight), before)


@pytest.mark.parametrize("padding", [0, 1])
def test_both_codes_differ_by_what_all_filters_share(padding):
    signs = torch.randn(2, 8, 6, 6, generator=generator()).sign()
    code = (torch.randn(5, 8, 3, 3, generator=generator(1)) > 0).float()
    one, zero_one = F.conv2d(signs, 2 * code - 1, padding=padding), F.conv2d(signs, code, padding=padding)
    total = F.conv2d(signs, torch.ones(1, 8, 3, 3), padding=padding)
    assert torch.equal(one, 2 * zero_one - total)
    positive = (signs > 0).float()
    counted = F.conv2d(positive, code, padding=padding)
    taps = F.conv2d(torch.ones_like(signs), code, padding=padding)
    assert torch.equal(zero_one, 2 * counted - taps)


@pytest.mark.parametrize("weight_code", ["pm1", "01"])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_bits_compute_the_same(weight_code, stride):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(24, 10, 3, stride, 1, bias=False))
    code_magnitudes(network, ["0"], 1, weight_code, "half", "median", False)
    x = torch.randn(3, 24, 9, 9)
    layer = network[0]
    weight_quantizer(layer).refresh(real_weight(layer))
    packed = binary_network(network.eval())
    assert packed[0].code == weight_code
    assert torch.equal(packed(x), network(x))
    assert (unpack_rows(packed[0].packed, 216).sum(1) == 108).all()


def test_depthwise_filters_have_four_ones_of_nine():
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
    code_magnitudes(network, ["0"], 1, "pm1", "half", "median", False)
    weight_quantizer(network[0]).refresh(real_weight(network[0]))
    assert (network[0].weight.flatten(1) == 1).sum(1).tolist() == [4] * 8


# ---- the authors' layer


class Official(nn.Conv2d):
    """Clips, codes and standardises in its forward, as the published code does, with numpy's percentiles."""

    percent = 0.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(self.weight.detach().abs().flatten(1).mean(1)[:, None, None])

    def forward(self, x):
        with torch.no_grad():
            w1 = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            low = torch.tensor(np.percentile(w1.abs().numpy(), self.percent).astype(np.float32))
            high = torch.tensor(np.percentile(w1.abs().numpy(), 100 - self.percent).astype(np.float32))
            self.weight.copy_(w1.sign() * w1.abs().clamp(low, high))
        dims = (1, 2, 3)
        w2 = (self.weight - self.weight.mean(dims, keepdim=True)) / (self.weight.var(dims, keepdim=True) + 1e-5).sqrt()
        magnitude = w2.abs().flatten(1)
        code = 2 * (magnitude > magnitude.median(1, keepdim=True).values).float() - 1
        bw = (magnitude - magnitude.detach() + code).view_as(w2)
        a = (x - x.mean(dims, keepdim=True)) / (x.var(dims, keepdim=True) + 1e-5).sqrt()
        # the gradient of (2 - a) a for a >= 0 and (2 + a) a for a < 0, up to |a| = 1, is 2 - 2 |a|
        wave = torch.where(a.abs() < 1, a * (2 - a.abs()), a.sign())
        ba = wave - wave.detach() + a.detach().sign()
        return F.conv2d(ba, bw, None, self.stride, self.padding) * self.alpha


def test_training_is_that_of_the_authors_layer(tmp_path):
    """36 steps: the same weights, up to the last digits, though the clip is not in the forward pass."""
    ours, theirs = made(), made()
    for block in theirs.net.blocks:
        for name in ("conv1", "conv2"):
            conv = getattr(block, name)
            other = Official(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)
            other.weight.data.copy_(conv.weight)
            other.alpha.data.copy_(conv.weight.detach().abs().flatten(1).mean(1)[:, None, None])
            setattr(block, name, other)

    class Percent(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            for layer in pl_module.modules():
                if isinstance(layer, Official):
                    layer.percent = 15 * (1 - trainer.current_epoch / 9)

    for module, callback in ((ours, SiMaN(zero_decay=False)), (theirs, Percent())):
        trainer = make_trainer(tmp_path, callback, max_epochs=9)
        with no_pictures:
            trainer.fit(module, digits())
        assert trainer.global_step == 36
    mine = weight_quantizer(ours.net.blocks[0].conv1)
    for block, other in zip(ours.net.blocks, theirs.net.blocks, strict=True):
        for name in ("conv1", "conv2"):
            weight = getattr(block, name).parametrizations.weight.original
            torch.testing.assert_close(weight, getattr(other, name).weight, atol=1e-3, rtol=1e-2)
    assert mine.code.any()


def test_clip_in_the_forward_pass_drifts_in_evaluation():
    weight, quantizer = coded(clip_in_forward=True)
    quantizer.percent = 15.0
    quantizer.eval()
    before = weight.detach().clone()
    quantizer(weight)
    torch.testing.assert_close(weight.detach(), clip_magnitudes(before, 15.0))
    once = weight.detach().clone()
    for _ in range(9):
        quantizer(weight)
    assert 0 < (weight - once).abs().max() < 0.2
    still, kept = coded()
    kept.percent = 15.0
    before = still.detach().clone()
    kept.eval()(still)
    assert torch.equal(still, before)


# ---- costs of the paper

BUILD = {
    ("ResNet-18", "CIFAR-10"): binary_resnet18_cifar, ("ResNet-20", "CIFAR-10"): binary_resnet20,
    ("VGG-small", "CIFAR-10"): vgg_small, ("ResNet-18", "ImageNet"): binary_resnet18,
}  # fmt: skip


@pytest.mark.parametrize("row", card("siman").published, ids=lambda r: f"SiMaN-{r.network}-{r.data}")
def test_rows_of_the_catalog(row):
    network = BUILD[row.network, row.data]()
    size = 224 if row.data == "ImageNet" else 32
    names, _ = SiMaN(exclude_downsample=(row.network, row.data) != ("ResNet-18", "CIFAR-10")).choose(network)
    layers = [x for x in profile(network, (1, 3, size, size)).layers if x.kind in ("conv", "linear")]
    assert sum(x.macs / 64 if x.name in names else x.macs for x in layers) == row.result["macs"]
    assert sum(x.params * (1 if x.name in names else 32) for x in layers) == row.result["bits"]


# ---- the callback


class Watch(Callback):
    """Notes the layer-wide share of weights at their bounds, at every batch before the forward pass."""

    def __init__(self):
        self.at_bounds, self.weights, self.percents = [], [], []

    def on_train_batch_start(self, trainer, pl_module, *args):
        layer = pl_module.net.blocks[0].conv1
        weight = layer.parametrizations.weight.original.detach()
        self.weights.append(weight.clone())
        self.percents.append(weight_quantizer(layer).percent)
        self.at_bounds.append(int((weight.abs() == weight.abs().max()).sum()))


def test_the_clip_fades_epoch_by_epoch(tmp_path):
    watch = Watch()
    fit(made(), tmp_path, SiMaN(), watch, max_epochs=3)
    assert watch.percents == [clip_percent(e, 3) for e in (0, 1, 2) for _ in range(4)]
    expected = [math.floor(0.01 * p * 863) + 1 for p in watch.percents]  # of 864 weights
    assert watch.at_bounds == expected


def test_clips_once_per_step_of_the_optimiser(tmp_path):
    watch = Watch()
    fit(made(), tmp_path, SiMaN(), watch, max_epochs=1, accumulate_grad_batches=2)
    assert torch.equal(watch.weights[0], watch.weights[1])
    assert not torch.equal(watch.weights[1], watch.weights[2])
    assert torch.equal(watch.weights[2], watch.weights[3])


class NoGradient(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            parameter.grad = torch.zeros_like(parameter)


def one_group(module, weight_decay=5e-4, lr=0.1):
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=lr, weight_decay=weight_decay)
    return module


def test_binary_weights_do_not_decay(tmp_path):
    module = one_group(made())
    before = copy.deepcopy(module)
    trainer = fit(module, tmp_path, SiMaN(clip_start=0.0), NoGradient(), max_epochs=1, limit_train_batches=1)
    for name, conv in before.named_modules():
        if isinstance(conv, nn.Conv2d) and "blocks" in name:
            layer = module.get_submodule(name)
            weight = layer.parametrizations.weight.original
            torch.testing.assert_close(weight, clip_magnitudes(conv.weight, 0.0), atol=1e-7, rtol=0)
            torch.testing.assert_close(layer.output_scale.alpha.flatten(), conv.weight.abs().mean((1, 2, 3)))
    gamma = module.net.blocks[0].bn1.weight
    torch.testing.assert_close(gamma, torch.full_like(gamma, 1 - 0.1 * 5e-4), atol=1e-7, rtol=0)
    rest, own = trainer.optimizers[0].param_groups
    assert (len(own["params"]), own["weight_decay"], rest["weight_decay"]) == (8, 0.0, 5e-4)


def test_groups_keep_their_learning_rates(tmp_path):
    module = made()

    def configure_optimizers():
        blocks = [list(block.parameters()) for block in module.net.blocks]
        held = {id(p) for block in blocks for p in block}
        rest = [p for p in module.parameters() if id(p) not in held]
        groups = [{"params": rest}, {"params": blocks[0], "lr": 0.02}, {"params": blocks[1], "lr": 0.03}]
        return torch.optim.SGD(groups, lr=0.01, weight_decay=1e-3)

    module.configure_optimizers = configure_optimizers
    trainer = fit(module, tmp_path, SiMaN(), max_epochs=1)
    groups = trainer.optimizers[0].param_groups
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups[3:]] == [(4, 0.02, 0.0), (4, 0.03, 0.0)]


def cifar_like():
    return BinaryResNet((1, 1), (8, 16), in_channels=1, bireal=False)


@pytest.mark.parametrize(("official", "own"), [(False, 5), (True, 4)])
def test_groups_of_a_users_own_optimiser(official, own):
    network = cifar_like()
    names, _ = SiMaN(exclude_downsample=False).choose(network)
    code_magnitudes(network, names, 1, "pm1", "half", "median", False)
    rest, free = siman_param_groups(network, 5e-4, official)
    assert (rest["weight_decay"], free["weight_decay"]) == (5e-4, 0.0)
    assert len(free["params"]) == 2 * own  # weight and alpha
    assert len(rest["params"]) + len(free["params"]) == len(list(network.parameters()))


def test_the_account_and_the_checkpoint(tmp_path):
    module = made()
    fit(module, tmp_path, SiMaN(), ModelCheckpoint(tmp_path, "last"), max_epochs=2)
    rows = {row.name: row for row in Account.load(tmp_path).after.rows}
    assert (rows["net.blocks.0.conv1"].bits, rows["net.blocks.0.conv1"].bytes) == (1, 12 * 9)
    again, x = load(Foreign, tmp_path / "last.ckpt"), torch.rand(4, 1, 8, 8)
    layer = again.net.blocks[0].conv1
    assert layer.parametrizations.weight[0].code.dtype == torch.bool
    assert (layer.parametrizations.weight[0].code.sum(1) == 36).all()
    with torch.no_grad():
        assert torch.equal(again.eval()(x), module.eval()(x))


def test_activations_have_their_own_slope(tmp_path):
    module = made()
    fit(module, tmp_path, SiMaN(), max_epochs=1)
    quantizer = input_quantizer(module.net.blocks[0].conv1)
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, 2.0])
    from lightning_compress.core.quant.binary import slope

    assert slope(x, quantizer.k, quantizer.t).tolist() == pytest.approx([1.8, 2, 1, 0, 0], abs=1e-5)
    assert (quantizer.eps, quantizer.nu) == (0.0, 1e-5)


@pytest.mark.parametrize(
    ("others", "message"),
    [([PCNN(end_epoch=1)], "cannot be the zero that PCNN"), ([EMAWeightAveraging()], "use_buffers=False")],
)
def test_what_cannot_go_together(others, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        fit(made(), tmp_path, SiMaN(), *others)


def test_beside_rbnn_on_other_layers(tmp_path):
    module = made()
    fit(module, tmp_path, SiMaN(include=["*.0.*"]), RBNN(include=["*.1.*"]), max_epochs=1)
    kinds = {name: type(weight_quantizer(layer)).__name__ for name, layer in binary_layers(module).items()}
    assert list(kinds.values()) == ["MagnitudeCode"] * 2 + ["RotatedSign"] * 2


def trained(tmp_path, *callbacks, weight_decay=5e-4):
    seed_everything(0, verbose=False)
    module = Foreign(BinaryResNet((1,), (32,), in_channels=1, activation="prelu", stem_activation="relu"))

    def configure_optimizers():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    module.configure_optimizers = configure_optimizers
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=4)
    with no_pictures:
        trainer.fit(module, digits(600, batch_size=25), digits(390, 1400, batch_size=390))
    return trainer.callback_metrics["val_acc"].item(), module


def kurtosis(module):
    weight = module.net.stages[0][0].conv2.parametrizations.weight.original.detach()
    w = (weight - weight.mean()).flatten()
    return (w.pow(4).mean() / w.square().mean().square()).item()


class PlainSigns(Callback):
    """RBNN without rotation: the sign of the weights."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        for name, parameter in pl_module.named_parameters():
            if name.endswith("rotate"):
                parameter.data.zero_()


def test_it_learns_digits_and_its_weights_are_spread(tmp_path):
    accuracy, module = trained(tmp_path, SiMaN())
    decayed = trained(tmp_path, SiMaN(zero_decay=False), weight_decay=2e-2)[1]
    plain, _ = trained(tmp_path, RBNN(), PlainSigns())
    assert accuracy > plain - 0.1
    assert accuracy > 0.75
    assert kurtosis(module) < kurtosis(decayed)
