"""The networks of RBNN and SiMaN: what they count, where shortcuts and activations are, how they start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.callbacks import RBNN
from lightning_compress.core.profile import profile
from lightning_compress.networks import (
    BinaryResNet,
    binary_resnet18,
    binary_resnet18_cifar,
    binary_resnet20,
    binary_resnet34,
    build,
    vgg_small,
)

SIMAN20 = {"bireal": True, "activation": "prelu", "stem_activation": "relu", "gamma": 1.0}


@pytest.mark.parametrize(
    ("make", "size", "shortcuts", "binary", "real", "binary_macs", "real_macs"),
    [
        pytest.param(binary_resnet20, 32, False, 267_264, 1_082, 40_108_032, 443_008, id="RBNN-ResNet-20"),
        pytest.param(
            lambda: binary_resnet20(bireal=True), 32, False, 267_264, 1_082, 40_108_032, 443_008, id="RBNN-bireal"
        ),
        pytest.param(
            lambda: binary_resnet20(**SIMAN20), 32, False, 267_264, 1_082, 40_108_032, 443_008, id="SiMaN-ResNet-20"
        ),
        pytest.param(
            binary_resnet18_cifar, 32, True, 11_157_504, 6_858, 553_648_128, 1_774_592, id="RBNN-ResNet-18-CIFAR"
        ),
        pytest.param(vgg_small, 32, False, 4_571_136, 85_386, 603_979_776, 3_620_864, id="RBNN-VGG-small"),
        pytest.param(
            binary_resnet18, 224, False, 10_985_472, 694_440, 1_676_279_808, 137_793_536, id="RBNN-ResNet-18-ImageNet"
        ),
        pytest.param(
            binary_resnet34, 224, False, 21_086_208, 694_440, 3_525_967_872, 137_793_536, id="RBNN-ResNet-34-ImageNet"
        ),
    ],
)
def test_counts(make, size, shortcuts, binary, real, binary_macs, real_macs):
    network = make()
    names, _ = RBNN(exclude_downsample=not shortcuts).choose(network)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    held = {n: sum(p.numel() for p in m.parameters()) for n, m in layers.items()}
    assert sum(held[n] for n in names) == binary
    assert sum(held.values()) - binary == real
    macs = {layer.name: layer.macs for layer in profile(network, (1, 3, size, size)).layers}
    assert sum(macs[n] for n in names) == binary_macs
    assert sum(macs.values()) - binary_macs == real_macs


def test_a_shortcut_around_each_convolution_or_around_both():
    """With norms that give zero, what is left of a block is its shortcuts."""
    for bireal in (False, True):
        network = binary_resnet20(bireal=bireal).eval()
        block = network.stages[0][1]
        for norm in (block.bn1, block.bn2):
            nn.init.zeros_(norm.weight)
        x = torch.rand(2, 16, 4, 4) * 2 - 1
        assert torch.equal(block(x), x)
        nn.init.constant_(block.bn1.bias, 0.25)
        assert torch.equal(block(x), (x + 0.25).clamp(-1, 1) if bireal else x)


def activations(network: nn.Module) -> list[nn.Module]:
    kinds = (nn.Hardtanh, nn.PReLU, nn.ReLU)
    return [m for m in network.modules() if isinstance(m, kinds)]


def test_activations():
    rbnn, siman = (
        activations(binary_resnet18()),
        activations(binary_resnet18(activation="prelu", stem_activation="relu")),
    )
    assert all(isinstance(m, nn.Hardtanh) for m in rbnn)
    assert isinstance(siman[0], nn.ReLU)
    assert [m.weight.numel() for m in siman[1:]] == [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    assert all((m.weight == 0.25).all() for m in siman[1:])
    cifar = binary_resnet18_cifar()
    assert isinstance(cifar.act, nn.Identity)
    assert len(activations(cifar)) == 16
    assert [m.weight.numel() for m in activations(vgg_small(activation="prelu"))] == [128, 128, 256, 256, 512, 512]


def test_how_they_start():
    for network, gamma in (
        (binary_resnet20(), 1e-8), (binary_resnet18(), 1e-8), (binary_resnet20(**SIMAN20), 1.0), (vgg_small(), 1.0),
        (binary_resnet18_cifar(), 1.0),
    ):  # fmt: skip
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((m.weight == gamma).all() for m in norms)
    assert (binary_resnet20().bn2.weight == 1).all()
    torch.manual_seed(0)
    last = binary_resnet20().stages[2][2].conv2.weight
    assert last.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    small = vgg_small()
    assert small.features.conv5.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)
    assert small.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert (small.fc.bias == 0).all()
    kinds = [type(m).__name__ for m in list(small.features)[3:8]]
    assert kinds == ["Conv2d", "MaxPool2d", "BatchNorm2d", "Hardtanh", "Conv2d"]


@pytest.mark.parametrize("name", ["binary_resnet20", "binary_resnet18_cifar", "vgg_small"])
def test_found_by_name(name):
    network = build(name, num_classes=7, in_channels=1)
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem": "big"}, "stem='big'"), ({"stem_activation": "prelu"}, "stem_activation='prelu'"),
        ({"shortcut": "padd"}, "Did you mean 'pad'"), ({"activation": "relu"}, "activation='relu'"),
        ({"kaiming": "some"}, "kaiming='some'"), ({"widths": (1,)}, "must be as many"),
    ],
)  # fmt: skip
def test_wrong_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        BinaryResNet(**{"blocks": (1, 1), "widths": (4, 8), **arguments})
