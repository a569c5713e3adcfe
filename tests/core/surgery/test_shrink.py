"""Shrinking: the narrow network computes what the dense one computes with the removed channels at zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch_pruning
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress import networks
from lightning_compress.core.profile import profile
from lightning_compress.core.surgery import (
    ChannelGraph,
    ChannelPlan,
    allocate,
    apply_cuts,
    carry_optimizer,
    channel_graph,
    check_cuts,
    scaled_macs,
)

CONVNETS = ["resnet18", "resnet50", "mobilenet_v2", "vgg16", "densenet121", "googlenet", "efficientnet_b0",
            "mobilenet_v3_small", "resnext50_32x4d", "regnet_y_400mf", "shufflenet_v2_x0_5"]  # fmt: skip
OWN = ["resnet20", "resnet56", "vgg16_cifar", "densenet40", "googlenet_cifar", "lenet5"]


def random_plan(network: nn.Module, size: tuple[int, ...], ratio: float = 0.5, **kwargs):
    graph = channel_graph(network, size, **kwargs)
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(len(u), generator=generator) for n, u in graph.layers.items()}
    return graph, allocate(graph, scores, dict.fromkeys(graph.layers, ratio))


@torch.no_grad()
def zero_(network: nn.Module, cuts) -> None:
    """Set to zero what the cuts would remove: weights, biases, and the maps of shortcuts."""
    shortcuts = {n: b for n, b in network.named_buffers() if n.endswith("select")}
    tensors = {**dict(network.named_parameters()), **shortcuts}
    for cut in cuts:
        if cut.tensor in tensors:
            gone = torch.ones(cut.size, dtype=torch.bool)
            gone[cut.kept] = False
            tensors[cut.tensor].index_fill_(cut.dim, gone.nonzero()[:, 0], 0)
    for module in network.modules():
        if isinstance(module, networks.ChannelShortcut):
            module.after_surgery()


def randomise_statistics(network: nn.Module) -> None:
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)


def check_equal(network: nn.Module, size: tuple[int, ...], **kwargs) -> None:
    randomise_statistics(network.eval())
    graph, plan = random_plan(network, size, **kwargs)
    cuts = plan.cuts(graph)
    zero_(network, cuts)
    x = torch.randn(2, *size[1:])
    with torch.no_grad():
        expected = network(x)
        apply_cuts(network, cuts)
        actual = network(x)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONVNETS)
def test_torchvision_networks(name: str) -> None:
    torch.manual_seed(0)
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    check_equal(torchvision.models.get_model(name, weights=None, **kwargs), (1, 3, 64, 64))


@pytest.mark.parametrize("name", OWN)
def test_own_networks(name: str) -> None:
    torch.manual_seed(0)
    size = (1, 1, 28, 28) if name == "lenet5" else (1, 3, 32, 32)
    check_equal(networks.find.build(name), size)


@pytest.mark.parametrize(
    ("name", "include"),
    [("vit_tiny_patch16_224", ["*qkv", "*fc1"]), ("convnext_tiny", ["*fc1"])],
)
def test_transformers_lose_heads_and_hidden_units(name: str, include: list[str]) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name)
    check_equal(network, (1, 3, 224, 224), include=include, ratio=0.4)
    if name.startswith("vit"):
        assert network.blocks[0].attn.num_heads == 2
        assert network.blocks[0].mlp.fc1.out_features == 461  # 768 - floor(0.4 * 768)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_tiny"])
def test_transformers_lose_channels_of_their_residual_stream(name: str) -> None:
    network = timm.create_model(name).eval()
    graph, plan = random_plan(network, (1, 3, 224, 224))
    apply_cuts(network, plan.cuts(graph))
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert network.get_submodule("norm" if name.startswith("vit") else "head.norm").weight.numel() in (96, 384)


def test_groups_agree_with_torch_pruning() -> None:
    """An independent implementation couples the same layers of a ResNet-18."""
    network = torchvision.models.resnet18()
    theirs = torch_pruning.DependencyGraph().build_dependency(network, torch.zeros(1, 3, 64, 64))
    ours = channel_graph(network, (1, 3, 64, 64))
    for group in ours.groups:
        layer = network.get_submodule(group.layers[0])
        found = theirs.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, [0])
        written = {
            theirs._module2name[dep.target.module]
            for dep, _ in found
            if dep.handler.__name__ == "prune_out_channels" and isinstance(dep.target.module, nn.Conv2d)
        }
        assert written == set(group.layers)


def test_attributes_follow() -> None:
    network = torchvision.models.mobilenet_v2()
    graph, plan = random_plan(network, (1, 3, 64, 64))
    apply_cuts(network, plan.cuts(graph))
    depthwise = network.features[2].conv[1][0]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == depthwise.weight.shape[0] == 48
    assert network.features[2].conv[1][1].num_features == 48
    assert network.classifier[1].in_features == network.classifier[1].weight.shape[1] == 640


def test_macs_of_a_plan_are_known_before_the_cut() -> None:
    network = torchvision.models.resnet50()
    size = (1, 3, 64, 64)
    graph, plan = random_plan(network, size)
    dense = {row.name: row.macs for row in profile(network, size).layers}
    predicted = scaled_macs(dense, graph, plan.cuts(graph))
    apply_cuts(network, plan.cuts(graph))
    assert predicted == pytest.approx(profile(network, size).macs, rel=1e-9)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.Adam([{"params": [q]} for q in p], lr=0.1, amsgrad=True),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
    ],
    ids=["sgd", "adamw", "many-groups", "adafactor"],
)
def test_optimiser_state_is_sliced_like_the_parameters(build: Callable[..., torch.optim.Optimizer]) -> None:
    """Channels that get no gradient after the cut would have moved as they do without the cut."""
    torch.manual_seed(0)
    network = small()
    optimizer = build(list(network.parameters()))
    network(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    old = {n: {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
           for n, p in network.named_parameters()}  # fmt: skip
    graph = channel_graph(network, (1, 3, 4, 4))
    kept = torch.tensor([0, 2])
    carry_optimizer(optimizer, apply_cuts(network, ChannelPlan({"0": kept}).cuts(graph)))
    parameters = dict(network.named_parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in parameters.values()}
    for key, value in old["0.weight"].items():
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == 4:
            assert torch.equal(optimizer.state[parameters["0.weight"]][key], value[kept])
    for key, value in old["3.weight"].items():
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 4:
            assert torch.equal(optimizer.state[parameters["3.weight"]][key], value[:, kept])
    optimizer.zero_grad()
    network(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()


def test_tied_weights_stay_tied() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    network[2].weight = network[0].weight
    graph = channel_graph(network, (1, 4))
    apply_cuts(network, graph and ChannelPlan({}).cuts(graph))
    assert network[2].weight is network[0].weight


def test_round_to_takes_the_nearest_multiple() -> None:
    network = nn.Sequential(nn.Conv2d(3, 30, 1), nn.ReLU(), nn.Conv2d(30, 2, 1))
    graph = channel_graph(network, (1, 3, 4, 4))
    sizes = [
        len(allocate(graph, {"0": torch.arange(30.0)}, {"0": r}, round_to=8).kept.get("0", range(30)))
        for r in (0.1, 0.3, 0.5, 0.95)
    ]
    assert sizes == [24, 24, 16, 8]  # of 27, 21, 15 and 2


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"conv9": [0]}, ValueError, "names layer 'conv9', which the network does not have. Did you mean 'conv1'"),
        ({"conv1": [64]}, ValueError, r"keeps channels \[64\] of 'conv1'; allowed are 0 to 63"),
        ({"conv1": []}, ValueError, "at least one"),
        ({"fc": [0]}, MisconfigurationException, "'fc' cannot be narrowed: it is the network's output"),
        ({"conv1": [0], "layer1.0.conv2": [1]}, MisconfigurationException, "coupled"),
    ],
)
def test_impossible_plans(plan: dict, error: type[Exception], message: str) -> None:
    graph = channel_graph(torchvision.models.resnet18(), (1, 3, 64, 64))
    with pytest.raises(error, match=message):
        ChannelPlan.from_dict(plan).cuts(graph)


def test_coupled_layers_need_one_ratio() -> None:
    graph = channel_graph(torchvision.models.resnet18(), (1, 3, 64, 64))
    scores = {n: torch.ones(len(u)) for n, u in graph.layers.items()}
    with pytest.raises(MisconfigurationException, match="differs between layers whose channels are added"):
        allocate(graph, scores, {**dict.fromkeys(graph.layers, 0.5), "conv1": 0.1})


class FixedReshape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(-1, 64))


def test_a_cut_that_cannot_run_is_refused_before_anything_changes() -> None:
    network = FixedReshape()
    assert "fixes in code" in channel_graph(network, (1, 3, 4, 4)).left_alone["conv"]
    graph = ChannelGraph.trace(network, (1, 3, 4, 4))
    cuts = ChannelPlan({"conv": torch.tensor([0, 1])}).cuts(graph)
    with pytest.raises(MisconfigurationException, match=r"would fail in layer ''.*exclude"):
        check_cuts(network, cuts, (1, 3, 4, 4))
    assert network.conv.weight.shape == (4, 3, 1, 1)
    assert network.conv.out_channels == 4
    assert not network.conv.weight.is_meta
