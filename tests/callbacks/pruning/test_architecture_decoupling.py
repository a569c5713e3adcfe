"""ArchitectureDecoupling: masks and losses, where gates go, what paths cost, skipping, and the callback."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import asdict

import pytest
import torch
import torchvision
from foreign import Block, Foreign, assert_same, digits, fit, made, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_compress
from lightning_compress import profile
from lightning_compress.callbacks import ArchitectureDecoupling
from lightning_compress.callbacks.pruning.architecture_decoupling import (
    class_paths,
    dynamic_copy,
    filter_kinds,
    gates_of,
    hamming,
    path,
    prune_static,
)
from lightning_compress.callbacks.pruning.architecture_decoupling.callback import _direction_of
from lightning_compress.callbacks.pruning.architecture_decoupling.dynamic import DynamicConv
from lightning_compress.callbacks.pruning.architecture_decoupling.gates import (
    NAME,
    Gate,
    attach_gates,
    detach_gates,
    silenced,
    watching,
)
from lightning_compress.callbacks.pruning.architecture_decoupling.losses import (
    divergence_loss,
    information_loss,
    sparsity_loss,
)
from lightning_compress.callbacks.pruning.architecture_decoupling.paths import (
    PathStatistics,
    expected_macs,
    masks_of,
)
from lightning_compress.callbacks.pruning.architecture_decoupling.semhash import (
    draw_binary,
    draw_noise,
    saturating_sigmoid,
    semhash,
)
from lightning_compress.callbacks.pruning.architecture_decoupling.units import trace_units
from lightning_compress.core.account import Account
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.networks import (
    googlenet_cifar,
    load_weights,
    resnet20,
    resnet56,
    vgg16_cifar,
    vgg19_cifar,
)

SMALL, LARGE = (1, 3, 32, 32), (1, 3, 224, 224)


def gated(network, shape, num_classes=10, reduction=4, mode="sample", init="zero", seed=0):
    """The network with a gate on every unit but the stem, in eval mode."""
    structure = trace_units(network, shape)
    units = {name: asdict(unit) for name, unit in structure.units.items() if name != structure.stem}
    attach_gates(network, units, num_classes, reduction, mode, init, seed)
    return network.eval()


def spread(network, images, margin=0.05):
    """Let about half of the filters be on, other ones for other images, and no logit near 0."""
    for gate in gates_of(network).values():
        nn.init.normal_(gate.reduce.weight, std=3.0)

    def shift(gate):
        def hook(module, args):
            y = F.relu(gate.reduce(args[0].mean((2, 3)))) @ gate.expand.weight.T
            ordered = y.sort(0).values
            gaps = (ordered[1:] - ordered[:-1])[len(y) // 4 : -len(y) // 4 or None]
            at = gaps.argmax(0) + len(y) // 4
            low, high = (ordered.gather(0, (at + i)[None])[0] for i in (0, 1))
            gate.expand.bias.copy_(-(low + high) / 2)

        return hook

    sources = {n: u.source for n, u in trace_silenced(network, images[:1]).units.items()}
    handles = [
        network.get_submodule(sources[name]).register_forward_pre_hook(shift(gate), prepend=True)
        for name, gate in gates_of(network).items()
    ]
    with torch.no_grad():
        network.eval()(images)
    for handle in handles:
        handle.remove()


def trace_silenced(network, example):
    with silenced(network):
        return trace_units(network, example)


# ---- masks


def test_saturating_sigmoid():
    g = torch.tensor([-2.5, -1.0, 0.0, 1.0, 2.4])
    expected = torch.tensor([0.0, 0.2227297, 0.5, 0.7772703, 1.0])
    torch.testing.assert_close(saturating_sigmoid(g), expected, atol=1e-7, rtol=0)


def test_a_binary_entry_has_the_value_of_v2_and_the_gradient_of_v1():
    y = torch.tensor([[-3.0, -1.0, 0.0, 0.3, 4.0]] * 2, requires_grad=True)
    mask = semhash(y, torch.zeros_like(y), torch.tensor([[True], [False]]))
    assert mask[0].tolist() == [0, 0, 0, 1, 1]  # strictly greater than 0
    assert torch.equal(mask[1], saturating_sigmoid(y[1]))
    mask.sum().backward()
    s = torch.sigmoid(y.detach()[0])
    slope = torch.where((s * 1.2 - 0.1 > 0) & (s * 1.2 - 0.1 < 1), 1.2 * s * (1 - s), 0.0)
    assert slope[2] == pytest.approx(0.3)
    assert slope[[0, 4]].tolist() == [0, 0]
    torch.testing.assert_close(y.grad, slope.expand(2, -1))


def test_which_entries_are_binary():
    logits = torch.zeros(4000, 16)
    generator = torch.Generator().manual_seed(0)
    sample, element = (draw_binary(logits, mode, generator) for mode in ("sample", "element"))
    assert sample.shape == (4000, 1)
    assert element.shape == (4000, 16)
    assert sample.float().mean() == pytest.approx(0.5, abs=0.03)
    assert element.float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("width", "expected"), [(16, 6.5), (32, 12.7), (64, 25.3)])
def test_the_official_draw_reaches_the_first_samples_only(width, expected):
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_binary(torch.zeros(128, width), "official", generator) for _ in range(400)])
    assert draws.sum(1).float().mean() == pytest.approx(expected, abs=0.3)
    assert not draws[:, width:].any()
    assert draw_binary(torch.zeros(8, width), "official", generator).shape == (8, 1)  # smaller than N


# ---- losses


def test_divergence_examples():
    mask, pooled = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 0], [0, 2]])
    first = divergence_loss(mask, pooled)
    assert first.item() == pytest.approx(0.0819533, abs=1e-7)
    batchmean = F.kl_div(mask.log_softmax(1), pooled.softmax(1), reduction="batchmean")
    assert batchmean.item() == pytest.approx(0.1639066, abs=1e-7)
    assert divergence_loss(mask, pooled, "out_from_mask").item() == pytest.approx(0.1084452, abs=1e-7)


def test_sparsity_examples():
    ones = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0]]).sum(1).mean()
    assert sparsity_loss(ones, 4).item() == 2.0
    assert sparsity_loss(ones, 4, 0.6).item() == pytest.approx(0.4)
    both = sparsity_loss(torch.stack([ones, ones]), torch.tensor([4, 2]), 0.6)
    assert both.item() == pytest.approx(0.4 + 0.8)


def test_information_takes_indices_and_soft_labels():
    mask, head = torch.rand(6, 5), torch.randn(3, 5)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    soft = F.one_hot(labels, 3).float()
    expected = -(mask @ head.T).log_softmax(1)[torch.arange(6), labels].mean()
    torch.testing.assert_close(information_loss(mask, head, labels), expected)
    torch.testing.assert_close(information_loss(mask, head, soft), expected)


# ---- where gates go


@pytest.mark.parametrize(
    ("network", "shape", "gates", "controllers", "heads", "macs"),
    [
        pytest.param(resnet56, SMALL, 54, 49_292, 20_160, 46_784, id="ResNet-56 CIFAR"),
        pytest.param(vgg19_cifar, SMALL, 15, 1_097_248, 54_400, 1_090_560, id="VGG-19 CIFAR"),
        pytest.param(googlenet_cifar, SMALL, 63, None, None, None, id="GoogLeNet CIFAR"),
        pytest.param(torchvision.models.resnet18, LARGE, 19, None, None, None, id="ResNet-18 ImageNet"),
        pytest.param(torchvision.models.vgg16, LARGE, 12, None, None, None, id="VGG-16 ImageNet"),
    ],
)
def test_gates_of_the_papers_networks(network, shape, gates, controllers, heads, macs):
    with torch.device("meta"):
        module = network()
    structure = trace_units(module, shape)
    names = [name for name in structure.units if name != structure.stem]
    assert len(names) == gates
    assert not structure.left_alone
    if controllers is None:
        return
    parts = [Gate(structure.units[n].in_channels, structure.units[n].out_channels, 10) for n in names]
    assert sum(p.numel() for g in parts for n, p in g.named_parameters() if "head" not in n) == controllers
    assert sum(g.head.weight.numel() for g in parts) == heads
    assert sum(g.reduce.weight.numel() + g.expand.weight.numel() for g in parts) == macs
    if network is resnet56:
        assert controllers + heads + sum(p.numel() for p in module.parameters()) == 922_470


def test_where_masks_are_applied():
    with torch.device("meta"):
        networks = [resnet20(), torchvision.models.resnet18(), googlenet_cifar(), torchvision.models.vgg16()]
    shapes = [SMALL, LARGE, SMALL, LARGE]
    resnet, imagenet, google, vgg = (trace_units(n, s).units for n, s in zip(networks, shapes, strict=True))
    assert (resnet["layer1.0.conv1"].sink, resnet["layer1.0.conv1"].at_input) == ("layer1.0.relu1", False)
    assert resnet["layer1.0.conv2"].sink == "layer1.0.bn2"  # before the sum
    # One ReLU module for both places, so that it cannot say which channels it writes; the reader can.
    assert (imagenet["layer1.0.conv1"].sink, imagenet["layer1.0.conv1"].at_input) == ("layer1.0.conv2", True)
    assert imagenet["layer2.0.downsample.0"].sink == "layer2.0.downsample.1"
    assert imagenet["layer2.0.downsample.0"].in_channels == 64  # the block's input
    assert google["a3.branch_pool.out.conv"].source == "a3.branch_pool.pool"  # sees what is pooled
    assert (vgg["features.2"].norm, vgg["features.2"].sink) == ("", "features.3")
    functional = trace_units(Foreign().net, (1, 1, 8, 8)).units
    assert (functional["blocks.0.conv1"].sink, functional["blocks.0.conv1"].at_input) == ("blocks.0.conv2", True)


class Odd(nn.Module):
    """Convolutions that cannot be gated, one that can, and one that writes the output."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.grouped, self.norm = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
        self.gate, self.free, self.functional = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.norm(self.grouped(self.twice(self.twice(self.stem(x)))))
        x = F.silu(self.functional(self.free(x * self.gate(x).sigmoid())))
        return self.out(x + x.abs()).mean((2, 3))


def test_what_is_left_alone_and_why():
    structure = trace_units(Odd(), (1, 3, 8, 8))
    assert list(structure.units) == ["stem", "free"]
    assert structure.left_alone == {
        "twice": "runs 2 times",
        "grouped": "is followed by group_norm, which mixes channels",
        "gate": "is followed by sigmoid, which makes something of a zero",
        "functional": "is followed by silu that is not a module of its own, called once",
        "out": "writes the network's output",
    }


@pytest.mark.parametrize("network", [resnet20, vgg16_cifar, googlenet_cifar])
def test_all_filters_on_is_the_network_bit_for_bit(network):
    torch.manual_seed(0)
    dense = network().eval()
    module = gated(copy.deepcopy(dense), SMALL)
    for gate in gates_of(module).values():
        nn.init.zeros_(gate.expand.weight)  # y = 1
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(module(images), dense(images))
        with silenced(module):
            assert torch.equal(module(images), dense(images))
    names = list(gates_of(module))
    detach_gates(module, names)
    assert module.state_dict().keys() == dense.state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def explicit_block(block, gate1, gate2, x, generator):
    """A block of the paper, written out: output, and (mask, pooled output) of both convolutions."""
    one = F.relu(block.bn1(block.conv1(x)))
    mask1 = semhash_of(gate1, x, next(generator))
    masked = one * mask1[:, :, None, None]
    two = block.bn2(block.conv2(masked))
    mask2 = semhash_of(gate2, masked, next(generator))
    out = F.relu(x + two * mask2[:, :, None, None])
    return out, [(mask1, one.mean((2, 3))), (mask2, two.mean((2, 3)))]


def semhash_of(gate, x, seed):
    y = gate.expand(F.relu(gate.reduce(x.mean((2, 3)))))
    generator = torch.Generator().manual_seed(seed)
    return semhash(y, draw_noise(y, generator), draw_binary(y, "sample", generator))


def test_a_gated_block_is_the_papers_block():
    """Logits, losses and gradients of the hooks against the block written out."""
    torch.manual_seed(0)
    block = Block(8, 12)
    net = nn.Sequential(nn.Conv2d(1, 8, 1), copy.deepcopy(block), nn.Conv2d(8, 4, 1))
    attached = gated(Foreign(net), (1, 1, 8, 8)).train()
    gates = gates_of(attached)
    for seed, gate in enumerate(gates.values()):
        gate.seed = seed
        nn.init.normal_(gate.reduce.weight)
    other = copy.deepcopy(attached)
    detach_gates(other, list(gates))
    mirrored = [copy.deepcopy(gate) for gate in gates.values()]
    x = torch.randn(16, 1, 8, 8)
    seen = []
    with watching(gates, lambda name, mask, pooled: seen.append((mask, pooled))):
        ours = attached.net[1](attached.net[0](x))
    theirs, expected = explicit_block(other.net[1], *mirrored, other.net[0](x), iter(range(2)))
    torch.testing.assert_close(ours, theirs)
    for pair, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(pair, wanted)
    for out, masks in ((ours, seen), (theirs, expected)):
        (out.square().mean() + sum(divergence_loss(*pair) + pair[0].sum(1).mean() for pair in masks)).backward()
    for name, _ in block.named_parameters():
        torch.testing.assert_close(
            attached.net[1].get_parameter(name).grad, other.net[1].get_parameter(name).grad, atol=1e-5, rtol=1e-4
        )
    for gate, mirror in zip(gates.values(), mirrored, strict=True):
        torch.testing.assert_close(gate.reduce.weight.grad, mirror.reduce.weight.grad, atol=1e-5, rtol=1e-4)


def test_gates_survive_copies_with_their_own_controllers():
    module = gated(resnet20(), SMALL)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = module(x)
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), inference_copy(module)):
            torch.testing.assert_close(copied(x), expected)
            for gate in gates_of(copied).values():
                nn.init.constant_(gate.expand.bias, -100.0)
            assert not torch.allclose(copied(x), expected)
    assert torch.equal(module(x), expected)
    assert all(gate.head is None for gate in gates_of(inference_copy(module)).values())  # only the loss needs it


# ---- controllers


def test_zero_init_selects_three_quarters_of_the_filters_for_all_images():
    generator = torch.Generator().manual_seed(0)
    gates = [Gate(64, 64, 10, generator=generator).eval() for _ in range(200)]
    images = torch.randn(4, 64, 5, 5)
    masks = torch.stack([gate(images) for gate in gates])
    assert (masks == masks[:, :1]).all()
    assert masks.mean() == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.01)  # Phi(1 / sqrt 2)
    assert not (Gate(64, 64, 10, init="kaiming").eval()(images).diff(dim=0) == 0).all()


def test_eval_is_deterministic_and_training_repeats_with_its_seed():
    torch.manual_seed(0)
    gate, x = Gate(8, 32, 10), torch.randn(6, 8, 4, 4)
    drawn = gate(x)
    assert not torch.equal(gate(x), drawn)
    gate.seed = 5
    assert torch.equal(gate(x), gate(x))
    gate.eval()
    assert torch.equal(gate(x), gate(x))
    assert set(gate(x).unique().tolist()) <= {0.0, 1.0}


def test_controllers_stay_in_float32_under_autocast():
    gate, x = Gate(8, 32, 10, init="kaiming").eval(), torch.randn(6, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x), gate(x.clone()))
        assert gate.logits(x).dtype == torch.float32
        assert gate.logits(x.bfloat16()).dtype == torch.float32


# ---- costs


@pytest.mark.parametrize(
    ("network", "density", "macs"),
    [
        pytest.param(resnet56, 0.5, 47_039_104, id="ResNet-56 at 0.5"),
        pytest.param(resnet56, 0.6, 60_180_383, id="ResNet-56 at 0.6"),
        pytest.param(resnet56, 1.0, 125_485_696, id="ResNet-56 at 1"),
        pytest.param(vgg19_cifar, 0.5, 110_299_648, id="VGG-19 at 0.5"),
        pytest.param(vgg19_cifar, 1.0, 398_136_320, id="VGG-19 at 1"),
        pytest.param(googlenet_cifar, 1.0, 1_521_756_160, id="GoogLeNet at 1"),
    ],
)
def test_expected_macs(network, density, macs):
    with torch.device("meta"):
        module = network()
    structure = trace_units(module, SMALL)
    names = [name for name in structure.units if name != structure.stem]
    dense = {layer.name: layer.macs for layer in profile(module, SMALL).layers}
    expected = expected_macs(dense, structure.reads(names)[0], dict.fromkeys(names, density))
    assert round(sum(expected.values())) == macs


def test_statistics_are_those_of_the_masks():
    masks = {"a": torch.tensor([[1, 0], [1, 1], [1, 1]]), "b": torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 1]])}
    statistics = PathStatistics({"a": 2, "b": 4}, {"b": (("a", 2),), "fc": (("b", 4), ("", 4))}, 2)
    statistics.update({n: m[:1] for n, m in masks.items()}, torch.tensor([0]))
    rest = PathStatistics(statistics.widths, statistics.reads, 2)
    rest.update({n: m[1:] for n, m in masks.items()}, torch.tensor([1, 1]))
    statistics.load_flat(statistics.flat() + rest.flat())
    assert statistics.densities == pytest.approx({"a": 5 / 6, "b": 7 / 12})
    costs = statistics.mean_macs({"a": 10, "b": 100, "fc": 100, "stem": 7})
    # b of each image: 2/4 * 1/2 + 2/4 + 3/4 = 1.5; fc: (2 + 4)/8 + 6/8 + 7/8 = 19/8
    assert costs == pytest.approx({"a": 10 * 5 / 6, "b": 100 * 1.5 / 3, "fc": 100 * 19 / 24, "stem": 7})
    paths = torch.cat(list(masks.values()), 1).bool()
    torch.testing.assert_close(statistics.class_frequencies, class_paths(paths, torch.tensor([0, 1, 1]), 2))
    for name, mask in masks.items():
        mean = mask.double().mean(0)
        assert statistics.diversity[name] == pytest.approx((mask - mean).abs().sum(1).mean().item())
    assert {n: k.tolist() for n, k in statistics.kinds().items()} == {"a": [1, 0], "b": [0, -1, 0, 1]}


# ---- paths


def test_paths():
    module = gated(resnet20(), SMALL, init="kaiming")
    images = torch.randn(5, 3, 32, 32)
    paths = path(module.train(), images)
    assert module.training
    assert paths.shape == (5, 2 * 3 * (16 + 32 + 64))
    assert paths.dtype == torch.bool
    slow = torch.tensor([[int((a != b).sum()) for b in paths] for a in paths])
    assert torch.equal(hamming(paths, paths), slow)
    means = class_paths(paths, torch.tensor([0, 0, 2, 2, 2]), 4)
    torch.testing.assert_close(means[2], paths[2:].float().mean(0))
    assert means[1].isnan().all()


def test_filters_that_are_never_selected_can_go():
    torch.manual_seed(0)
    module = Foreign(resnet20())
    example = torch.zeros(SMALL)
    record = lightning_compress.core.surgery.attach_record(module)
    structure = trace_units(module, example)
    units = {name: asdict(unit) for name, unit in structure.units.items() if name != structure.stem}
    arguments = {"num_classes": 10, "reduction": 4, "semhash": "sample", "init": "zero", "seed": 0}
    record.change(module, attach_gates, {"units": units, **arguments}, by="test", epoch=0)
    images = torch.randn(4, 3, 32, 32)
    kinds = filter_kinds(module, images.split(2))
    assert all((kind != 0).all() for kind in kinds.values())  # zero init: all static
    with torch.no_grad():
        expected = module.eval()(images)
        plan = prune_static(module, example, kinds)
        assert list(plan.kept) == [f"net.layer{s}.{i}.conv1" for s in (1, 2, 3) for i in range(3)]
        torch.testing.assert_close(module(images), expected, atol=1e-5, rtol=0)
    assert path(module, images).shape[1] < sum(map(len, kinds.values()))
    again = Foreign(resnet20())
    lightning_compress.core.surgery.attach_record(again)
    again.load_state_dict(module.state_dict())  # the record knows gates and cuts
    assert_same(again, module)


# ---- skipping


@pytest.mark.parametrize(
    ("network", "shape"), [(resnet20, SMALL), (vgg16_cifar, SMALL), (googlenet_cifar, SMALL), (Foreign, (1, 1, 8, 8))]
)
def test_skipping_computes_the_same(network, shape):
    torch.manual_seed(0)
    module = gated(network(), shape)
    images = torch.randn(4, *shape[1:])
    spread(module, images)
    densities = [mask.float().mean() for mask in masks_of(module, images).values()]
    assert 0.3 < sum(densities) / len(densities) < 0.7
    assert len(path(module, images).unique(dim=0)) >= 3
    fast = dynamic_copy(module, torch.zeros(shape))
    assert not gates_of(fast)
    with torch.inference_mode():
        expected = module(images)
        scale = max(1.0, expected.abs().max().item())
        for one, wanted in zip(images.split(1), expected.split(1), strict=True):
            torch.testing.assert_close(fast(one), wanted, atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(fast(images), expected, atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(copy.deepcopy(fast)(images[:1]), expected[:1], atol=1e-5 * scale, rtol=0)


def test_only_selected_filters_are_computed():
    torch.manual_seed(0)
    module = gated(resnet20(), SMALL)
    image = torch.randn(1, 3, 32, 32)
    spread(module, torch.cat([image, torch.randn(5, 3, 32, 32)]))
    masks = masks_of(module, image)
    fast = dynamic_copy(module, image)
    seen = {}
    for name, layer in fast.named_modules():
        if isinstance(layer, DynamicConv):
            layer.convolve = lambda x, weight, bias, name=name, run=layer.convolve: (
                seen.update({name: tuple(weight.shape[:2])}) or run(x, weight, bias)
            )
    with torch.inference_mode():
        fast(image)
    for stage in (1, 2, 3):
        for i in range(3):
            first, second = (int(masks[f"layer{stage}.{i}.conv{k}"].sum()) for k in (1, 2))
            assert seen[f"layer{stage}.{i}.conv1"][0] == first
            assert seen[f"layer{stage}.{i}.conv2"] == (second, first)


def test_a_layer_of_which_nothing_is_selected():
    module = gated(resnet20(), SMALL)
    for name in ("layer1.0.conv1", "layer2.1.conv2"):
        nn.init.constant_(gates_of(module)[name].expand.bias, -100.0)
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(dynamic_copy(module, SMALL)(image), module(image), atol=1e-5, rtol=0)


def test_layers_that_cannot_skip_keep_their_gates():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    module = gated(Foreign(net), (1, 1, 8, 8))
    fast = dynamic_copy(module, (1, 1, 8, 8))
    assert list(gates_of(fast)) == ["net.1"]
    image = torch.randn(1, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(fast(image), module(image), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="CIFARResNet has no gates"):
        dynamic_copy(resnet20(), SMALL)


# ---- callback


def test_default_order_of_the_divergence_is_that_of_the_authors_code():
    with torch.device("meta"):
        swapped = Foreign(vgg19_cifar()), torchvision.models.vgg11(), resnet20()
        first = resnet56(), googlenet_cifar(), torchvision.models.resnet18()
    assert {_direction_of(network) for network in swapped} == {"out_from_mask"}
    assert {_direction_of(network) for network in first} == {"mask_from_out"}


def run(tmp_path, epochs=12, lr=0.05, **kwargs):
    """Mean density of a short fit."""
    module = made(lr=lr)
    trainer = fit(module, tmp_path, ArchitectureDecoupling(**kwargs), max_epochs=epochs)
    return module, trainer.callback_metrics


def test_more_weight_on_sparsity_selects_fewer_filters(tmp_path):
    densities = [
        run(tmp_path, epochs=8, lambda_s=weight)[1][f"val/{NAME}/density"].item() for weight in (0.0, 0.05, 0.2)
    ]
    assert densities[0] > densities[1] + 0.05 > densities[2] + 0.1


def test_a_target_density_is_reached(tmp_path):
    _, metrics = run(tmp_path, epochs=20, lambda_s=0.3, target_density=0.6)
    assert metrics[f"train/{NAME}/density"].item() == pytest.approx(0.6, abs=0.06)


def test_class_heads_learn_from_masks(tmp_path):
    module, _ = run(tmp_path, epochs=20, lambda_s=0.0, lambda_m=3.0, init="kaiming")
    images, labels = digits(64, batch_size=64).dataset.tensors
    masks = masks_of(module.eval(), images)
    scores = sum(F.linear(masks[n].float(), gate.head.weight) for n, gate in gates_of(module).items())
    assert (scores.argmax(1) == labels).float().mean() > 0.3  # chance is 0.1


def first_step():
    """The module as a fit with the default seed begins with."""
    module = made()
    structure = trace_units(module, (1, 1, 8, 8))
    units = {name: asdict(unit) for name, unit in structure.units.items() if name != structure.stem}
    attach_gates(module, units, 10, 4, "sample", "zero", 0)
    return module


def test_losses_and_metrics_of_a_step(tmp_path):
    """The logged terms are those of the paper, over all gates."""
    module = made()
    seen = []

    def spy(fn, method):
        def term(*args):
            seen.append((list(method._seen), fn(*args)))
            return seen[-1][1]

        return term

    class Spy(ArchitectureDecoupling):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for handle in self._handles[1:]:
                handle.fn = spy(handle.fn, self)

    trainer = fit(module, tmp_path, Spy(target_density=0.5), limit_train_batches=1, max_epochs=1)
    (entries, information), (_, divergence), (_, sparsity) = seen
    labels = next(iter(digits()))[1]
    assert len(entries) == 4
    start = {name: gate.head.weight for name, gate in gates_of(first_step()).items()}
    wanted = sum(information_loss(mask, start[name], labels) for name, (_, mask, _) in zip(start, entries, strict=True))
    torch.testing.assert_close(information, wanted)
    torch.testing.assert_close(divergence, sum(divergence_loss(mask, pooled) for _, mask, pooled in entries))
    torch.testing.assert_close(sparsity, sum((m.sum(1).mean() - 0.5 * m.shape[1]).abs() for _, m, _ in entries))
    names = {f"train/{NAME}/{term}" for term in ("information", "divergence", "sparsity", "density")}
    assert names <= trainer.callback_metrics.keys()
    assert {f"val/{NAME}/{name}" for name in ("density", "macs", "path_diversity")} <= trainer.callback_metrics.keys()


class Checkpointed(Foreign):
    """Blocks whose activations are not kept."""

    def forward(self, x):
        x = F.relu(self.net.bn(self.net.stem(x)))
        for block in self.net.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return self.net.head(x.mean((2, 3)))


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, module = made(), Checkpointed(made().net)
    for each in (plain, module):
        fit(each, tmp_path, ArchitectureDecoupling(lambda_s=0.01), max_epochs=2)
    statistics = [n for n, _ in module.named_buffers() if "blocks" in n]  # updated twice by recomputation
    for name, tensor in plain.state_dict().items():
        if name not in statistics and isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(module.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_loaded_network_is_gated_without_the_callback(tmp_path):
    module = made()
    callbacks = ArchitectureDecoupling(init="kaiming"), ModelCheckpoint(tmp_path, "{epoch}")
    trainer = fit(module, tmp_path, *callbacks, max_epochs=1)
    loaded = lightning_compress.load(Foreign, trainer.checkpoint_callback.best_model_path)
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert len(gates_of(loaded)) == 4
    fast = dynamic_copy(loaded, images[:1])
    with torch.inference_mode():
        torch.testing.assert_close(fast(images[:1]), module(images)[:1], atol=1e-5, rtol=0)


def test_onnx_holds_a_comparison_and_products(tmp_path):
    onnx = pytest.importorskip("onnx")
    module = made()
    fit(module, tmp_path, ArchitectureDecoupling(init="kaiming"), max_epochs=1)
    exported = lightning_compress.export(module, tmp_path / "gated", torch.rand(1, 1, 8, 8), format="onnx")
    assert exported.max_abs_difference < 1e-5
    graph = onnx.load(exported.path).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Greater") == 4
    assert kinds.count("Mul") >= 4
    assert not any("head" in tensor.name and NAME in tensor.name for tensor in graph.initializer)


def test_the_account_counts_what_images_need(tmp_path):
    module = made()
    method = ArchitectureDecoupling()
    fit(module, tmp_path, method, max_epochs=2)
    account = Account.load(tmp_path / "compression.json")
    after = {row.name: row for row in account.after.rows}
    before = {row.name: row for row in account.before.rows}
    images = digits(32, 64, batch_size=32).dataset.tensors[0]
    masks = masks_of(module, images)
    first, second = (masks[f"net.blocks.0.conv{i}"].double().mean(1) for i in (1, 2))
    assert after["net.blocks.0.conv1"].macs == round(55_296 * first.mean().item())
    assert after["net.blocks.0.conv2"].macs == round(55_296 * (first * second).mean().item())
    assert after["net.stem"].macs == before["net.stem"].macs
    assert after[f"{NAME}.net.blocks.0.conv1.expand"].macs == 24
    assert not any("head" in name and NAME in name for name in after)
    assert account.after.params == account.before.params + sum(
        p.numel() for n, p in module.named_parameters() if n.startswith(NAME) and "head" not in n
    )
    assert "of the filters are selected" in account.notes[0]


def test_recalibrated_norms_have_the_statistics_of_binary_masks(tmp_path):
    images = digits(64, batch_size=64).dataset.tensors[0]

    def off(**kwargs):
        module, seen = made(lr=0.01), []
        fit(module, tmp_path, ArchitectureDecoupling(**kwargs), max_epochs=1)
        norm = module.net.blocks[1].bn2
        norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].mean((0, 2, 3))))
        with torch.no_grad():
            module.eval()(images)
        return (seen[0] - norm.running_mean).abs().max()

    assert off(recalibrate_bn=1) < 1e-3 < off()


def test_without_validation_paths_are_counted_on_training_images(tmp_path):
    module, method = made(), ArchitectureDecoupling(num_batches=1)
    make_trainer(tmp_path, method, max_epochs=1).fit(module, digits())
    assert method.statistics.images == 64
    assert "64 training images" in Account.load(tmp_path / "compression.json").notes[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reduction": 0}, "reduction=0"),
        ({"lambda_m": -1.0}, "lambda_m=-1.0"),
        ({"target_density": 2.0}, "target_density=2.0"),
        ({"semhash": "half"}, "semhash='half'"),
        ({"kl_direction": "both"}, "kl_direction='both'"),
        ({"init": "ones"}, "init='ones'"),
        ({"num_classes": 1}, "num_classes=1"),
        ({"recalibrate_bn": -1}, "recalibrate_bn=-1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ArchitectureDecoupling(**kwargs)


def test_what_cannot_be_gated_is_refused(tmp_path):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(MisconfigurationException, match="finds no convolution of Foreign"):
        fit(Foreign(linear), tmp_path, ArchitectureDecoupling())
    dense = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(MisconfigurationException, match="num_classes cannot be told from outputs of shape"):
        fit(Foreign(dense), tmp_path, ArchitectureDecoupling())


def test_norms_that_will_be_replaced_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, ArchitectureDecoupling())
    trainer.strategy._layer_sync = object()  # as sync_batchnorm=True makes with several devices
    with pytest.raises(MisconfigurationException, match="sync_batchnorm=True replaces"):
        trainer.fit(made(), digits())


@pytest.mark.real_data
def test_a_trained_network_with_open_gates_keeps_its_accuracy():
    root = real_data("weights/resnet56-cifar10.pt", "cifar10.npz")
    import numpy as np

    network = resnet56()
    load_weights(network, root / "weights" / "resnet56-cifar10.pt")
    archive = np.load(root / "cifar10.npz")
    images = torch.from_numpy(archive["x_test"][:64]).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    module = gated(network, SMALL)
    for gate in gates_of(module).values():
        nn.init.zeros_(gate.expand.weight)
    fast = dynamic_copy(module, SMALL)
    with torch.inference_mode():
        logits = module(images)
        assert (logits.argmax(1) == torch.from_numpy(archive["y_test"][:64])).float().mean() > 0.85
        torch.testing.assert_close(fast(images[:1]), logits[:1], atol=1e-3, rtol=0)
