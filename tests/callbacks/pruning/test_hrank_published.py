"""The authors' lists on their own networks: layers, taps, rank files, and every published count."""

from __future__ import annotations

import re

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
    assert narrowed(densenet40(), parse_ratio("[0.0]+[0.25]*12+[0.0]+[0.25]*12+[0.0]+[0.25]*12"), (1, 3, 32, 32)).params == 622_924


def narrowed(network, ratios, shape):
    """Profile of the network with the first channels of every layer that a plus list hits."""
    graph = channel_graph(network, shape)
    widths = {
        name: kept_width(graph.width(name), ratio, "keep")
        for name, ratio in layer_ratios(network, ratios, "plus").items()
    }
    apply_cuts(network, ChannelPlan({name: torch.arange(width) for name, width in widths.items()}).cuts(graph))
    return profile(network, shape)
