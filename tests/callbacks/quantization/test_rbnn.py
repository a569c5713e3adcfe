"""RBNN: rotations against a slow reference, the slope's schedule, what beta lets through, and the callback."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from foreign import Foreign, digits, fit, made, make_trainer, no_pictures
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_compress import load
from lightning_compress.callbacks import RBNN, HRank, L1Norm, MagnitudePruning
from lightning_compress.callbacks.quantization.rbnn import (
    RotatedSign,
    cosine,
    factor_pair,
    random_rotation,
    rotate,
    rotate_and_binarize,
    sharpness,
    update_rotations,
)
from lightning_compress.catalog import card
from lightning_compress.core.profile import profile
from lightning_compress.core.quant.attach import input_quantizer, weight_quantizer
from lightning_compress.core.quant.binary import binarize, sign, standardize
from lightning_compress.core.report import Account
from lightning_compress.networks import (
    BinaryResNet,
    binary_resnet18,
    binary_resnet18_cifar,
    binary_resnet20,
    binary_resnet34,
    vgg_small,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rotations(a, b, seed=0):
    return random_rotation(a, generator(seed)), random_rotation(b, generator(seed + 1))


# ---- the bi-rotation


def test_factor_pairs():
    pairs = {64: (8, 8), 128: (8, 16), 144: (12, 12), 256: (16, 16), 288: (16, 18), 576: (24, 24), 1152: (32, 36),
             2304: (48, 48), 4608: (64, 72), 9: (3, 3), 7: (1, 7)}  # fmt: skip
    assert {n: factor_pair(n) for n in pairs} == pairs


def test_random_rotations_are_orthogonal_and_their_own():
    r = random_rotation(48, generator())
    torch.testing.assert_close(r.T @ r, torch.eye(48), atol=1e-5, rtol=0)
    assert torch.equal(r, random_rotation(48, generator()))
    # Haar: entries of either sign alike, also on the diagonal, where QR alone has one sign
    diagonals = torch.cat([random_rotation(16, generator(s)).diagonal() for s in range(60)])
    assert abs(diagonals.mean().item()) < 0.05


def test_two_rotations_are_one_of_all_weights():
    x = torch.randn(5, 4, 6, generator=generator())
    r1, r2 = rotations(4, 6)
    whole = torch.kron(r1.T.contiguous(), r2.T.contiguous())
    torch.testing.assert_close(whole @ whole.T, torch.eye(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(x, r1, r2).flatten(1), x.flatten(1) @ whole.T, atol=1e-5, rtol=1e-5)


def by_filter(x, r1, r2, rounds):
    """The update as the paper writes it, one filter at a time, in float64."""
    x, r1, r2 = x.double(), r1.double(), r2.double()
    for _ in range(rounds):
        codes = [sign(r1.T @ w @ r2) for w in x]
        u, _, vh = torch.linalg.svd(sum(b @ r2.T @ w.T for b, w in zip(codes, x, strict=True)))
        r1 = vh.T @ u.T
        u, _, vh = torch.linalg.svd(sum(w.T @ r1 @ b for b, w in zip(codes, x, strict=True)))
        r2 = u @ vh
    return r1.float(), r2.float()


def test_update_is_that_of_the_paper():
    """Layers of different widths, two of them of one shape."""
    shapes = [(20, 6, 8), (9, 4, 4), (31, 6, 8)]
    xs = [torch.randn(*shape, generator=generator(i)) for i, shape in enumerate(shapes)]
    starts = [rotations(a, b, seed=10 * i) for i, (_, a, b) in enumerate(shapes)]
    found = update_rotations(xs, [r for r, _ in starts], [r for _, r in starts], 3)
    for x, start, rotation in zip(xs, starts, found, strict=True):
        r1, r2 = by_filter(x, *start, 3)
        torch.testing.assert_close(rotation.r1, r1, atol=1e-4, rtol=0)
        torch.testing.assert_close(rotation.r2, r2, atol=1e-4, rtol=0)
        torch.testing.assert_close(rotation.cosine, cosine(rotate(x, r1, r2)), atol=1e-4, rtol=0)


def test_objective_rises_and_matrices_stay_rotations():
    x = torch.randn(64, 24, 24, generator=generator())
    r1, r2 = rotations(24, 24)
    assert cosine(x).item() == pytest.approx(0.799, abs=2e-3)
    assert math.sqrt(2 / math.pi) == pytest.approx(0.79788, abs=1e-5)
    objectives, cosines = [rotate(x, r1, r2).abs().sum().item()], {}
    for rounds in range(1, 10):
        ((r1, r2, angle),) = update_rotations([x], [r1], [r2], 1)
        objectives.append(rotate(x, r1, r2).abs().sum().item())
        cosines[rounds] = angle.item()
        for r in (r1, r2):
            torch.testing.assert_close(r.T @ r, torch.eye(24), atol=1e-5, rtol=0)
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(objectives))
    assert [cosines[n] for n in (3, 6, 9)] == pytest.approx([0.811, 0.818, 0.822], abs=2e-3)


@pytest.mark.parametrize("n", [144, 576, 1152])
def test_close_to_half_of_the_signs_flip(n):
    a, b = factor_pair(n)
    x = torch.randn(32, a, b, generator=generator())
    flips = (sign(rotate(x, *rotations(a, b))) != sign(x)).float().mean().item()
    assert 0.4 < flips < 0.6


# ---- the slope's schedule


@pytest.mark.parametrize(
    ("epoch", "t", "k"),
    [(0, 0.01, 100), (50, 0.1, 10), (75, 0.316228, 3.162278), (100, 1, 1), (149, 9.549926, 1), (170, 10, 1)],
)
def test_schedule(epoch, t, k):
    assert sharpness(epoch, 150) == pytest.approx((k, t), rel=1e-5)


# ---- the weight


def rotated(beta, shape=(6, 4, 3, 3), **kwargs):
    weight = nn.Parameter(torch.randn(shape, generator=generator()))
    quantizer = RotatedSign(weight.detach(), **kwargs)
    nn.init.constant_(quantizer.rotate, beta)
    return weight, quantizer


def test_at_its_start_no_gradient_reaches_the_weight():
    weight, quantizer = rotated(math.pi / 2)
    quantizer(weight).backward(torch.randn(weight.shape, generator=generator(1)))
    assert (weight.grad == 0).all()
    share = abs(math.cos(torch.tensor(math.pi / 2).item()))
    assert share == pytest.approx(4.4e-8, rel=0.02)
    assert 0 < quantizer.rotate.grad.abs().max() < 100 * share


def test_weight_decay_leads_beta_away():
    beta = nn.Parameter(torch.tensor([math.pi / 2], dtype=torch.float64))
    optimizer = torch.optim.SGD([beta], lr=0.1, momentum=0.9, weight_decay=1e-4)
    beta.grad = torch.zeros_like(beta)
    for _ in range(196):
        optimizer.step()
    assert beta.item() == pytest.approx(1.541670, abs=2e-6)
    assert 1 - abs(math.sin(beta.item())) == pytest.approx(4.241e-4, rel=1e-3)


def test_halfway_half_of_the_gradient_passes():
    weight, quantizer = rotated(math.pi / 6)
    x = quantizer.matrices(weight.detach())
    expected = 0.5 * x + 0.5 * rotate(x, quantizer.r1, quantizer.r2)
    torch.testing.assert_close(quantizer.mixed(weight), expected.view(weight.shape))
    grad = torch.randn(weight.shape, generator=generator(1))
    quantizer.mixed(weight).backward(grad)
    plain = weight.detach().clone().requires_grad_()
    standardize(plain, 1e-12).backward(0.5 * grad)
    torch.testing.assert_close(weight.grad, plain.grad)
    rw = rotate(x, quantizer.r1, quantizer.r2) - x
    by_hand = math.cos(math.pi / 6) * (rw.flatten(1) * grad.flatten(1)).sum(1)
    torch.testing.assert_close(quantizer.rotate.grad.flatten(), by_hand, atol=1e-4, rtol=1e-4)


def test_without_beta_it_is_the_plain_sign():
    weight, quantizer = rotated(0.0)
    grad = torch.randn(weight.shape, generator=generator(1))
    codes = quantizer(weight)
    codes.backward(grad)
    plain = weight.detach().clone().requires_grad_()
    expected = binarize(standardize(plain, 1e-12), 1.0, 1.0)
    expected.backward(grad)
    assert torch.equal(codes, expected)
    assert torch.equal(codes, sign(weight - weight.mean((1, 2, 3), keepdim=True)))
    torch.testing.assert_close(weight.grad, plain.grad)


def test_gradient_through_the_rotation():
    weight, quantizer = rotated(math.pi / 2, through_rotation=True)
    grad = torch.randn(weight.shape, generator=generator(1))
    quantizer.mixed(weight).backward(grad)
    plain = weight.detach().clone().requires_grad_()
    back = rotate(grad.view(6, *factor_pair(36)), quantizer.r1.T, quantizer.r2.T)  # the transposed rotation
    standardize(plain, 1e-12).backward(back.view(weight.shape))
    torch.testing.assert_close(weight.grad, plain.grad, atol=1e-5, rtol=1e-4)


def test_scale_and_mean_of_a_filter_do_not_matter():
    """Nor those of a sample."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False))
    rotate_and_binarize(network, ["0"], 1, False, 0)
    layer, x = network[0], torch.randn(3, 4, 6, 6)
    before = network(x)
    layer.parametrizations.weight.original.data.mul_(7.5).add_(torch.randn(6, 1, 1, 1))
    torch.testing.assert_close(network(x), before)
    scale, shift = torch.rand(3, 1, 1, 1) + 0.5, torch.randn(3, 1, 1, 1)
    torch.testing.assert_close(network(x * scale), before)
    changed = (network(x + shift) - before) != 0  # a threshold may round to the other side
    assert changed.float().mean() < 0.01


# ---- costs of the paper

BUILD = {
    ("ResNet-18", "CIFAR-10"): binary_resnet18_cifar, ("ResNet-20", "CIFAR-10"): binary_resnet20,
    ("VGG-small", "CIFAR-10"): vgg_small, ("ResNet-18", "ImageNet"): binary_resnet18,
    ("ResNet-34", "ImageNet"): binary_resnet34,
}  # fmt: skip


def costs(row):
    """(bit operations / 64 + real multiply-accumulates, bits of convolutions and linear layers)."""
    network = BUILD[row.network, row.data]()
    size = 224 if row.data == "ImageNet" else 32
    names, _ = RBNN(exclude_downsample=(row.network, row.data) != ("ResNet-18", "CIFAR-10")).choose(network)
    macs = bits = 0
    for layer in profile(network, (1, 3, size, size)).layers:
        if layer.kind in ("conv", "linear"):
            one = layer.name in names
            macs += layer.macs / 64 if one else layer.macs
            bits += layer.params * (1 if one else 32)
    return macs, bits


@pytest.mark.parametrize("row", card("rbnn").published, ids=lambda r: f"RBNN-{r.network}-{r.data}-{r.setting}")
def test_rows_of_the_catalog(row):
    assert costs(row) == (row.result["macs"], row.result["bits"])


def test_costs_the_paper_prints():
    found = {row.network: row.result for row in card("rbnn").published if row.data == "ImageNet"}
    assert found["ResNet-18"]["macs"] == pytest.approx(1.640e8, rel=5e-4)
    assert found["ResNet-34"]["macs"] == pytest.approx(1.929e8, rel=5e-4)
    assert found["ResNet-18"]["bits"] == pytest.approx(33.2e6, rel=2e-3)
    assert found["ResNet-34"]["bits"] == pytest.approx(43.3e6, rel=2e-3)


# ---- the callback


class Watch(Callback):
    """Notes rotations, slopes and the first batches' indices, step by step."""

    def __init__(self):
        self.r1, self.slopes = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        layer = pl_module.net.blocks[0].conv1
        quantizer = weight_quantizer(layer)
        self.r1.append(quantizer.r1.clone())
        self.slopes.append((quantizer.k, quantizer.t, input_quantizer(layer).k, input_quantizer(layer).t))


def test_rotations_turn_at_the_first_batch_of_their_epochs(tmp_path):
    watch = Watch()
    fit(made(), tmp_path, RBNN(rotation_update=2), watch, max_epochs=4)
    turned = [i for i in range(1, 16) if not torch.equal(watch.r1[i], watch.r1[i - 1])]
    assert turned == [8]
    start = random_rotation(watch.r1[0].shape[0], generator(0))
    assert not torch.equal(watch.r1[0], start)
    for epoch in range(4):
        k, t = sharpness(epoch, 4)
        assert watch.slopes[4 * epoch : 4 * epoch + 4] == [(k, t, 1.0, max(t, 1.0))] * 4


def test_the_account_has_bits_and_no_scales(tmp_path):
    fit(made(), tmp_path, RBNN(), max_epochs=1)
    account = Account.load(tmp_path)
    rows = {row.name: row for row in account.after.rows}
    assert rows["net.blocks.0.conv1"].bits == 1
    assert rows["net.blocks.0.conv1"].bytes == 12 * 9  # 72 bits a filter
    assert rows["net.blocks.0.conv1.output_scale"].bytes == 0  # the norm behind takes it up
    assert rows["net.head"].bits == 32
    assert account.after.macs == account.before.macs
    assert ("net.stem", "is the first layer") in account.left_alone
    assert account.notes[0] == "RBNN: 3,456 weights of one bit, in 4 convolutions."
    assert "kB on disk" in account.notes[1]


def test_a_checkpoint_is_the_network(tmp_path):
    module = made()
    fit(module, tmp_path, RBNN(), ModelCheckpoint(tmp_path, "last"), max_epochs=2)
    again, x = load(Foreign, tmp_path / "last.ckpt"), torch.rand(4, 1, 8, 8)
    assert isinstance(weight_quantizer(again.net.blocks[0].conv1), RotatedSign)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), module.eval()(x))


def test_the_planned_length_is_saved(tmp_path):
    """A run that goes on for longer does not soften the slope again."""
    fit(made(), tmp_path, RBNN(), ModelCheckpoint(tmp_path, "last"), max_epochs=2)
    watch = Watch()
    fit(made(), tmp_path, RBNN(), watch, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert watch.slopes[0][1] == pytest.approx(10)
    watch = Watch()
    fit(made(), tmp_path, RBNN(max_epochs=4), watch, max_epochs=2)
    assert watch.slopes[-1][:2] == pytest.approx(sharpness(1, 4))


def test_real_activations(tmp_path):
    module = made()
    fit(module, tmp_path, RBNN(activation_bits=32), max_epochs=1)
    x = torch.rand(2, 8, 4, 4)
    layer = module.net.blocks[0].conv1.eval()
    a = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(layer(x), F.conv2d(a, layer.weight, padding=1) * layer.output_scale.alpha)


def test_which_layers(tmp_path):
    module = Foreign(BinaryResNet((1, 1), (8, 16), in_channels=1, bireal=False))
    names, reasons = RBNN().choose(module)
    assert names == [f"net.stages.{s}.0.conv{c}" for s in (0, 1) for c in (1, 2)]
    assert reasons == {
        "net.conv1": "is the first layer", "net.fc": "is the last layer",
        "net.stages.1.0.shortcut.0": "is the convolution of a shortcut (exclude_downsample)",
    }  # fmt: skip
    assert len(RBNN(exclude_downsample=False, exclude_first=False).choose(module)[0]) == 6
    assert RBNN(exclude_last=False).choose(module)[1]["net.fc"] == "is no Conv2d"
    assert len(RBNN(include=["*.0.0.*"]).choose(module)[0]) == 2


def one_group(module, weight_decay, epochs=4):
    def configure_optimizers():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)]

    module.configure_optimizers = configure_optimizers
    return module


def test_beta_without_weight_decay_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"weight_decay=0.*grad_through_rotation=True"):
        fit(one_group(made(), 0.0), tmp_path, RBNN())
    fit(one_group(made(), 0.0), tmp_path, RBNN(grad_through_rotation=True), max_epochs=1)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([MagnitudePruning(sparsity=0.5)], "cannot be the zero that MagnitudePruning"),
        ([HRank(pruning_ratio=0.5, start_epoch=1)], "Let HRank prune before"),
        ([EMAWeightAveraging()], "use_buffers=False"),
    ],
)
def test_what_cannot_go_together(others, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        fit(made(), tmp_path, RBNN(), *others)


def test_what_can_go_together(tmp_path):
    module = made()
    fit(module, tmp_path, L1Norm(pruning_ratio=0.5), RBNN(), EMAWeightAveraging(use_buffers=False), max_epochs=1)
    assert module.net.blocks[0].conv1.weight.shape[0] == 6
    assert (module.net.blocks[0].conv1.weight.abs() == 1).all()


def test_without_an_end_the_schedule_must_be_told(tmp_path):
    with pytest.raises(MisconfigurationException, match="max_epochs=-1"):
        fit(made(), tmp_path, RBNN(), max_epochs=-1, max_steps=4)
    fit(made(), tmp_path, RBNN(max_epochs=2), max_epochs=-1, max_steps=4)


class PlainSigns(Callback):
    """beta stays 0: what is trained is the sign of the weights."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        for name, parameter in pl_module.named_parameters():
            if name.endswith("rotate"):
                parameter.data.zero_()


def accuracy(tmp_path, *callbacks):
    seed_everything(0, verbose=False)
    network = BinaryResNet((1,), (32,), in_channels=1)
    module = one_group(Foreign(network), 1e-4)
    trainer = make_trainer(tmp_path, *callbacks, max_epochs=4)
    with no_pictures:
        trainer.fit(module, digits(600, batch_size=25), digits(390, 1400, batch_size=390))
    return trainer.callback_metrics["val_acc"].item()


def test_it_learns_digits(tmp_path):
    """A stem and two binary convolutions: far above chance; as good as signs without rotation if weights learn at once.

    As the authors' code has it, the weights wait for beta, which takes epochs by the hundred.
    """
    slow, fast = accuracy(tmp_path, RBNN()), accuracy(tmp_path, RBNN(grad_through_rotation=True))
    plain = accuracy(tmp_path, RBNN(), PlainSigns())
    assert slow > 0.5
    assert fast > 0.75
    assert fast > plain - 0.1
