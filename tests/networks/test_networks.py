"""What all networks of the package have in common."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_compress.networks import LeNet5, build, densenet40, googlenet_cifar, mobilenet_v2_cifar, vgg16_cifar
from lightning_compress.networks.binary_resnet import BinaryResNet
from lightning_compress.networks.find import OWN
from lightning_compress.networks.mobilenet_v2_cifar import InvertedResidual
from lightning_compress.networks.vgg_small import VGGSmall

NAMES = [name for name in OWN if name not in ("resnet32", "resnet44", "resnet110")]


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    torch.manual_seed(0)
    return build(request.param, num_classes=7)


@pytest.fixture
def images(network):
    channels, size = (1, 28) if isinstance(network, LeNet5) else (3, 32)
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_logits_and_gradients(network, images):
    logits = network.train()(images)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_every_relu_is_a_module_that_runs_once(network, images):
    calls = Counter()
    relus = {m: name for name, m in network.named_modules() if isinstance(m, (nn.ReLU, nn.Hardtanh, nn.PReLU))}
    handles = [m.register_forward_hook(lambda m, *_: calls.update([relus[m]])) for m in relus]
    network.eval()(images)
    for handle in handles:
        handle.remove()
    assert calls == Counter(dict.fromkeys(relus.values(), 1))
    norms = sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in network.modules())
    inverted = [m for m in network.modules() if isinstance(m, InvertedResidual)]
    linear = sum(1 + isinstance(m.shortcut, nn.Sequential) for m in inverted)
    if not isinstance(network, BinaryResNet | VGGSmall):  # which have norms that no activation follows
        assert len(relus) == (norms - linear or 3)


def test_copies_pickles_and_exports(network, images):
    network.eval()
    expected = network(images)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), expected)
    exported = torch.export.export(network, (images,)).module()
    assert torch.allclose(exported(images), expected, atol=1e-5)


def test_layer_names():
    vgg = dict(vgg16_cifar().named_modules())
    assert vgg["features.conv13"].weight.shape == (512, 512, 3, 3)
    assert isinstance(vgg["features.relu13"], nn.ReLU)
    assert vgg["classifier.fc2"].out_features == 10
    assert [n for n in dict(vgg16_cifar(classifier="linear").named_modules()) if "classifier." in n] == [
        "classifier.fc"
    ]
    dense = dict(densenet40().named_modules())
    assert [dense[f"{n}.conv"].in_channels for n in ("dense1.0", "trans1", "trans2", "dense3.11")] == [
        24,
        168,
        312,
        444,
    ]
    mobile = dict(mobilenet_v2_cifar().named_modules())
    assert [mobile[f"layers.{i}.conv2"].groups for i in range(17)] == [
        *(32, 96, 144, 144, 192, 192, 192, 384, 384, 384, 384, 576, 576, 576, 960, 960, 960)
    ]
    assert [name for name in mobile if name.endswith("shortcut.0")] == [
        f"layers.{i}.shortcut.0" for i in (0, 1, 3, 10, 16)
    ]
    google = dict(googlenet_cifar().named_modules())
    assert google["a3.branch5x5.mid.conv"].weight.shape == (32, 16, 3, 3)
    assert google["b5.branch_pool.out.conv"].weight.shape == (128, 832, 1, 1)


@pytest.mark.parametrize("last_pool", ["avg", "max"])
def test_vgg_pools_halve_the_map(last_pool):
    net = vgg16_cifar(classifier="linear", last_pool=last_pool)
    sizes = []
    handles = [
        m.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
        for name, m in net.features.named_children()
        if name.startswith("pool")
    ]
    net(torch.zeros(2, 3, 32, 32))
    assert len(handles) == 5
    assert sizes == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vgg16_cifar", {"classifier": "mlp"}, "classifier must be 'hidden' or 'linear', got 'mlp'"),
        ("vgg16_cifar", {"last_pool": "none"}, "last_pool must be 'avg' or 'max', got 'none'"),
        ("lenet5", {"input_size": 8}, "input_size must be at least 16, got 8"),
        ("resnet20", {"widths": (16, 32, 64)}, "widths must name four widths"),
        ("resnet20", {"shortcut": "conv"}, "shortcut must be 'pad' or 'projection', got 'conv'"),
    ],
)
def test_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)
