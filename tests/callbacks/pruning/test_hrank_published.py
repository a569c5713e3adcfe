"""The authors' lists on their own networks: layers, taps, rank files, and every published count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from lightning_compress import parse_ratio, profile
from lightning_compress.callbacks.pruning.hrank.published import (
    is_known,
    layer_ratios,
    layout,
    out_only,
    rank_arrays,
    rank_taps,
)
from lightning_compress.callbacks.pruning.hrank.ranks import kept_width
from lightning_compress.core.surgery import ChannelPlan, apply_cuts, channel_graph
from lightning_compress.networks import densenet40, googlenet_cifar, resnet56, resnet110, vgg16_cifar

SHAPE = {resnet50: (1, 3, 224, 224)}
DENSENET_LIST = "[0.0]+[0.1]*6+[0.7]*6+[0.0]+[0.1]*6+[0.7]*6+[0.0]+[0.1]*6+[0.7]*5+[0.0]"


def case(build, ratios, params, macs):
    return pytest.param(build, ratios, params, macs, id=f"hrank-{build.__name__}-{macs}")


@pytest.mark.parametrize(
    ("build", "ratios", "params", "macs"),
    [
        case(resnet56, "[0.1]+[0.6]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1,0.4]*4", 489_359, 62_715_530),
        case(resnet110, "[0.1]+[0.4]*108", 1_054_847, 156_884_618),
        case(resnet110, "[0.0]+[0.6]*108", 701_930, 105_652_874),
        case(resnet110, "[0.1]+[0.6]*108", 701_903, 105_625_226),
        case(densenet40, DENSENET_LIST, 664_630, 167_410_906),
        case(googlenet_cifar, "[0.1]+[0.8]*5+[0.85]+[0.8]*3", 1_858_262, 450_061_322),
        case(googlenet_cifar, "[0.1]+[0.7]+[0.5]+[0.8]*4+[0.5]+[0.6]*2", 2_740_245, 686_015_498),
        case(resnet50, "[0.2]+[0.8]*10+[0.8]*13+[0.55]*19+[0.45]*10", 13_773_764, 1_549_652_456),
        case(vgg16_cifar, "[0.95]+[0.5]*6+[0.9]*4+[0.8]*2", 4_808_145, 116_629_002),
    ],
)
def test_original_table(build, ratios, params, macs):
    network = build()
    by_layer = layer_ratios(network, parse_ratio(ratios))
    counted = out_only(network, profile(network, SHAPE.get(build, (1, 3, 32, 32))), by_layer)
    assert counted == (macs, params)


def test_vgg_row_needs_fractional_filters_and_its_13th_number():
    network = vgg16_cifar()
    ratios = parse_ratio("[0.95]+[0.5]*6+[0.9]*4+[0.8]*2")
    by_layer = {f"features.conv{i}": ratio for i, ratio in enumerate(ratios, 1)}
    counted = out_only(network, profile(network, (1, 3, 32, 32)), by_layer, fractional=True)
    assert counted == (108_616_090, 2_635_862)


@pytest.mark.parametrize(
    ("build", "ratios", "params", "macs"),
    [
        case(vgg16_cifar, "[0.21]*7+[0.75]*5", 2_766_541, "131.17M"),
        case(vgg16_cifar, "[0.3]*7+[0.75]*5", 2_505_793, "104.78M"),
        case(vgg16_cifar, "[0.45]*7+[0.78]*5", 1_901_836, "66.95M"),
        case(resnet56, "[0.0]+[0.18]*29", 660_157, "90.35M"),
        case(resnet56, "[0.0]+[0.15]*2+[0.4]*27", 485_413, "65.94M"),
        case(resnet56, "[0.0]+[0.4]*2+[0.5]*9+[0.6]*9+[0.7]*9", 240_793, "34.78M"),
        case(resnet110, "[0.0]+[0.2]*2+[0.3]*18+[0.35]*36", 1_045_951, "140.54M"),
        case(resnet110, "[0.0]+[0.4]*2+[0.5]*18+[0.65]*36", 543_742, "71.69M"),
        case(googlenet_cifar, "[0.3]+[0.6]*2+[0.7]*5+[0.8]*2", 2_857_760, "649.19M"),
        case(googlenet_cifar, "[0.4]+[0.85]*2+[0.9]*5+[0.9]*2", 2_099_266, "395.42M"),
        case(densenet40, "[0.0]+[0.2]*12+[0.0]+[0.2]*12+[0.0]+[0.2]*12", 622_924, "173.39M"),
        case(densenet40, "[0.0]+[0.4]*12+[0.0]+[0.4]*12+[0.0]+[0.4]*12", 395_908, "113.08M"),
        case(resnet50, "[0.0]+[0.1]*3+[0.35]*16", 15_091_575, "2.26B"),
        case(resnet50, "[0.0]+[0.25]*3+[0.5]*16", 11_047_336, "1.52B"),
        case(resnet50, "[0.0]+[0.5]*3+[0.6]*16", 8_017_755, "0.95B"),
    ],
)
def test_plus_table(build, ratios, params, macs):
    left = narrowed(build(), parse_ratio(ratios), SHAPE.get(build, (1, 3, 32, 32)))
    number, unit = float(macs[:-1]), {"M": 1e6, "B": 1e9}[macs[-1]]
    decimals = len(macs.partition(".")[2]) - 1
    assert left.params == params
    assert round(left.paper_macs() / unit, decimals) == number


def test_plus_counts_split_into_macs_and_batch_norm():
    left = narrowed(resnet56(), parse_ratio("[0.0]+[0.15]*2+[0.4]*27"), (1, 3, 32, 32))
    assert left.macs == 65_168_128
    assert left.paper_macs() - left.macs == 767_744
    assert left.paper_macs() == 65_935_872


def test_plus_densenet_growth_9_is_also_what_a_quarter_gives():
    assert (
        narrowed(densenet40(), parse_ratio("[0.0]+[0.25]*12+[0.0]+[0.25]*12+[0.0]+[0.25]*12"), (1, 3, 32, 32)).params
        == 622_924
    )


def narrowed(network, ratios, shape):
    """Profile of the network with the first channels of every layer that a plus list hits."""
    graph = channel_graph(network, shape)
    widths = {
        name: kept_width(graph.width(name), ratio, "keep")
        for name, ratio in layer_ratios(network, ratios, "plus").items()
    }
    apply_cuts(network, ChannelPlan({name: torch.arange(width) for name, width in widths.items()}).cuts(graph))
    return profile(network, shape)


# ---- layouts


@pytest.mark.parametrize(
    ("build", "original", "plus"),
    [
        (resnet56, 55, 30),
        (resnet110, 109, 57),
        (vgg16_cifar, 13, 12),
        (densenet40, 39, 39),
        (googlenet_cifar, 10, 10),
        (resnet50, 53, 20),
    ],
)
def test_length_of_the_lists(build, original, plus):
    network = build()
    assert is_known(network)
    assert (len(layout(network, "original")), len(layout(network, "plus"))) == (original, plus)
    named = [name for version in ("original", "plus") for names in layout(network, version) for name in names]
    assert all(isinstance(network.get_submodule(name), nn.Conv2d) for name in named)
    with pytest.raises(ValueError, match=rf"pruning_ratio has 3 numbers, but the 'plus' layout .* has {plus}"):
        layer_ratios(network, [0.1] * 3, "plus")


def test_order_of_the_resnet50_list():
    order = [name for (name,) in layout(resnet50(), "original")]
    assert order[:6] == [
        "conv1", "layer1.0.downsample.0", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "layer1.1.conv1",
    ]  # fmt: skip
    assert order[11] == "layer2.0.downsample.0"
    assert layout(resnet50(), "plus")[1] == (
        "layer1.0.conv3", "layer1.1.conv3", "layer1.2.conv3", "layer1.0.downsample.0",
    )  # fmt: skip


def test_what_stays_whole():
    assert "features.conv13" not in layer_ratios(vgg16_cifar(), [0.5] * 13)
    assert not any(name.startswith("layer3") for names in layout(resnet56(), "plus")[:3] for name in names)
    plus = layer_ratios(googlenet_cifar(), [0.5] * 10, "plus")
    assert [name for name in plus if name.startswith("b5.")] == ["b5.branch5x5.mid.conv"]
    assert "stem.conv" not in plus
    assert not any("reduce" in name for name in layer_ratios(googlenet_cifar(), [0.5] * 10))


def test_a_narrow_densenet_narrows_its_transitions():
    by_layer = layer_ratios(densenet40(), parse_ratio("[0.3]+[0.4]*12+[0.0]+[0.4]*12+[0.1]+[0.4]*12"), "plus")
    first = 24 + 12 * 7
    assert kept_width(168, by_layer["trans1.conv"], "keep") == first
    assert kept_width(312, by_layer["trans2.conv"], "keep") == int((first + 12 * 7) * 0.9)
    assert "conv1" not in by_layer


def test_googlenet_counts_c4_by_the_ratio_of_d4():
    network = googlenet_cifar()
    dense = profile(network, (1, 3, 32, 32))
    ratios = parse_ratio("[0.1]+[0.8]*5+[0.85]+[0.8]*3")
    assert layer_ratios(network, ratios)["c4.branch1x1.out.conv"] == 0.8
    ratios[5] = 0.1
    assert out_only(network, dense, layer_ratios(network, ratios)) == (450_061_322, 1_858_262)


def test_other_networks():
    for network in (resnet18(), nn.Sequential(nn.Conv2d(3, 8, 3))):
        assert not is_known(network)
        for question in (layout, rank_taps):
            with pytest.raises(ValueError, match=f"{type(network).__name__} is none of the authors' networks"):
                question(network)
    with pytest.raises(ValueError, match="layout must be 'original' or 'plus', got 'both'"):
        layout(resnet56(), "both")


# ---- taps


@pytest.mark.parametrize(
    ("build", "layers"),
    [(vgg16_cifar, 12), (resnet56, 55), (resnet50, 53), (densenet40, 39), (googlenet_cifar, 1 + 9 * 5)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_taps_read_the_activated_maps_of_every_ranked_layer(build, layers):
    torch.manual_seed(0)
    network = build().train()  # so that batch norm spreads the maps around zero
    taps = rank_taps(network)
    assert len(taps) == layers
    maps = record(
        network, {tap.module for tap in taps.values()}, torch.randn(2, 3, *SHAPE.get(build, (1, 3, 32, 32))[2:])
    )
    for name, tap in taps.items():
        read = maps[tap.module][:, tap.channels]
        read = read.relu() if tap.relu else read
        assert read.shape[1] == network.get_submodule(name).out_channels
        assert (read >= 0).all()
        assert (read > 0).any()


def test_taps_of_branches_and_concatenations():
    torch.manual_seed(0)
    network, images = googlenet_cifar().eval(), torch.randn(2, 3, 32, 32)
    taps = rank_taps(network)
    branches = ["a4.branch1x1", "a4.branch3x3", "a4.branch5x5", "a4.branch_pool"]
    maps = record(network, {"a4", *branches}, images)
    for branch in branches:
        assert torch.equal(maps["a4"][:, taps[f"{branch}.out.conv"].channels], maps[branch])
    assert taps["a4.branch5x5.mid.conv"] == taps["a4.branch5x5.out.conv"]
    assert (taps["b3.branch1x1.out.conv"].module, taps["e4.branch1x1.out.conv"].module) == ("pool1", "pool2")

    taps = rank_taps(densenet40())
    assert (taps["conv1"].module, taps["conv1"].channels) == ("dense1.0.relu", slice(-24, None))
    assert (taps["dense1.11.conv"].module, taps["dense1.11.conv"].channels) == ("trans1.relu", slice(-12, None))
    assert (taps["trans1.conv"].module, taps["trans1.conv"].channels) == ("dense2.0.relu", slice(-168, None))
    assert (taps["dense3.11.conv"].module, taps["dense3.11.conv"].channels) == ("relu", slice(-12, None))

    taps = rank_taps(resnet50())
    assert taps["conv1"].module == "maxpool"
    assert (taps["layer2.0.conv2"].module, taps["layer2.0.conv2"].relu) == ("layer2.0.bn2", True)
    assert taps["layer2.0.conv3"] == taps["layer2.0.downsample.0"]
    assert (taps["layer2.0.conv3"].module, taps["layer2.0.conv3"].relu) == ("layer2.0", False)


def record(network, modules, images):
    maps = {}
    for name in modules:
        network.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: maps.update({name: out}))
    with torch.no_grad():
        network(images)
    return maps


def test_rank_files():
    arrays = rank_arrays(resnet56())
    assert list(arrays.items())[:2] == [("conv1", "rank_conv1"), ("layer1.0.conv1", "rank_conv2")]
    assert arrays["layer3.8.conv2"] == "rank_conv55"
    assert rank_arrays(resnet50())["layer4.2.conv3"] == "rank_conv53"
    arrays = rank_arrays(googlenet_cifar())
    assert arrays["stem.conv"] == "rank_conv1"
    assert arrays["b5.branch_pool.out.conv"] == "rank_conv10_pool_planes"
    assert len(set(arrays.values())) == 37
