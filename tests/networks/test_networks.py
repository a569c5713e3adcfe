"""What all networks of the package have in common."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_compress.core.distill.taps import Point, observe
from lightning_compress.networks import (
    CIFARBottleneckResNet,
    CIFARMobileNetV2,
    CIFARShuffleNet,
    CIFARWideResNet,
    LeNet5,
    build,
    densenet40,
    googlenet_cifar,
    mobilenet_v2_cifar,
    vgg16_cifar,
)
from lightning_compress.networks.binary_resnet import BinaryResNet
from lightning_compress.networks.find import OWN
from lightning_compress.networks.mobilenet_v2_cifar import InvertedResidual
from lightning_compress.networks.vgg_small import VGGSmall

# Deep or wide twins of others; of ResNet-50 a shallow one.
TWINS = ("resnet32", "resnet44", "resnet110", "resnet32x4", "vgg13_cifar", "mobilenet_v2_half")
WIDE = ("wide_resnet16_2", "wide_resnet40_1", "wide_resnet40_2")
NAMES = [name for name in OWN if name not in (*TWINS, *WIDE, "resnet50_cifar")] + ["bottlenecks", "original", "biased"]


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    torch.manual_seed(0)
    if request.param == "bottlenecks":
        return CIFARBottleneckResNet((1, 1, 1, 2), num_classes=7)
    if request.param in ("original", "biased"):
        return CIFARWideResNet(10, 1, num_classes=7, variant=request.param)
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
    inverted = sum(isinstance(m, InvertedResidual) for m in network.modules())
    depthwise = (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1)
    shuffled = sum(1 for _ in depthwise) if isinstance(network, CIFARShuffleNet) else 0
    grouped = isinstance(network, CIFARShuffleNet) and hasattr(network.layer1[0], "conv3")
    projections = sum(name.endswith("shortcut.1") for name, _ in network.named_modules())
    # norms without an activation: at the end of an inverted residual, on shortcuts, behind a split unit's depthwise
    linear = inverted + projections + (0 if grouped else shuffled)
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
        ("wide_resnet16_2", {"variant": "fat"}, "variant must be 'original' or 'biased', got 'fat'"),
        ("resnet20", {"widths": (16, 32, 64)}, "widths must name four widths"),
        ("resnet20", {"shortcut": "conv"}, "shortcut must be 'pad' or 'projection', got 'conv'"),
    ],
)
def test_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (CIFARWideResNet, {"depth": 18}, r"depth must be 6n \+ 4 .*, got 18"),
        (CIFARWideResNet, {"width": 0}, "width must be at least 1, got 0"),
        (CIFARShuffleNet, {"version": 3}, "version must be 1 or 2, got 3"),
        (CIFARBottleneckResNet, {"blocks": (3, 4)}, r"blocks must be four numbers of at least 1, got \(3, 4\)"),
        (CIFARMobileNetV2, {"width": 0.01}, "width must be at least 1/16, got 0.01"),
        (CIFARMobileNetV2, {"strides": (1, 2)}, r"strides must name eight strides .*, got \(1, 2\)"),
    ],
)
def test_errors_of_classes(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)


# network, its arguments, {module: shape of what it returns for 3x32x32 images}
TAPS = [
    ("resnet8x4", {}, {"relu": (32, 32), "layer1": (64, 32), "layer2": (128, 16), "layer3": (256, 8)}),
    ("wide_resnet16_2", {}, {"conv1": (16, 32), "layer1": (32, 32), "layer2": (64, 16), "layer3": (128, 8)}),
    ("wide_resnet16_2", {"variant": "biased"}, {"layer1": (32, 32), "layer2": (64, 16), "relu": (128, 8)}),
    ("densenet40", {}, {"dense1": (168, 32), "dense2": (312, 16), "relu": (456, 8)}),
    ("googlenet_cifar", {}, {"b3": (480, 32), "e4": (832, 16), "b5": (1024, 8)}),
    ("vgg8_cifar", {}, {f"features.relu{i + 1}": x for i, x in enumerate([(64, 32), (128, 16), (256, 8), (512, 4)])}),
    ("vgg13_cifar", {}, {"features.relu2": (64, 32), "features.relu8": (512, 4), "features.relu10": (512, 4)}),
    ("resnet50_cifar", {}, {"layer1": (256, 32), "layer2": (512, 16), "layer3": (1024, 8), "layer4": (2048, 4)}),
    ("mobilenet_v2_half", {}, {"layers.2": (12, 16), "layers.5": (16, 8), "layers.12": (48, 4), "layers.16": (160, 2)}),
    ("shufflenet_v1", {}, {"relu": (24, 32), "layer1": (240, 16), "layer2": (480, 8), "layer3": (960, 4)}),
    ("shufflenet_v2", {}, {"relu": (24, 32), "layer1": (116, 16), "layer2": (232, 8), "layer3": (464, 4)}),
]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"), TAPS, ids=[f"{n}{'-'.join(a.values())}" for n, a, _ in TAPS]
)
def test_shapes_of_features(name, arguments, expected):
    with torch.device("meta"):
        net = build(name, **arguments).eval()
        _, seen = observe(net, [Point(module) for module in expected], torch.zeros(1, 3, 32, 32))
    assert {m: (x.shape[1], x.shape[2]) for m, x in zip(expected, seen, strict=True)} == expected


def test_where_wide_blocks_take_their_stride_and_their_shortcut():
    original, biased = (CIFARWideResNet(10, 1, variant=variant).layer2[0] for variant in ("original", "biased"))
    assert (original.conv1.stride, original.conv2.stride, original.conv1.bias) == ((2, 2), (1, 1), None)
    assert (biased.conv1.stride, biased.conv2.stride) == ((1, 1), (2, 2))
    assert biased.shortcut.bias is not None
    x = -torch.rand(1, 16, 8, 8)  # which the activation of a fresh block takes to zero
    for block, reads_activated in ((original.eval(), True), (biased.eval(), False)):
        nn.init.zeros_(block.conv2.weight)
        if block.conv2.bias is not None:
            nn.init.zeros_(block.conv2.bias)
            nn.init.zeros_(block.shortcut.bias)
        assert block(x).any().item() is not reads_activated


def test_shuffles_are_those_of_torchvision():
    """ShuffleNet V2 with torchvision's weights, layer for layer, computes what torchvision's does."""
    torch.manual_seed(0)
    own, theirs = build("shufflenet_v2").eval(), build("torchvision/shufflenet_v2_x1_0", num_classes=10).eval()
    theirs.conv1[0], theirs.maxpool = nn.Conv2d(3, 24, 1, bias=False), nn.Identity()
    # parameters in the order of definition; theirs has the branch beside before the other, as here
    with torch.no_grad():
        for ours, source in zip(own.parameters(), theirs.parameters(), strict=True):
            ours.copy_(source)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(own(images), theirs(images))
