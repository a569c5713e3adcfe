"""MACs and parameters of every dense network that a paper counts, as the paper counts them.

Integers are exact. Strings are printed figures: papers round or truncate, so the last digit may be one off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_compress.core.profile import LayerProfile, Profile, profile
from lightning_compress.networks import CIFARVGG, build

UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


def agrees(value: int, expected: int | str) -> bool:
    """Whether ``value`` equals an integer, or a figure such as ``"125.49M"`` within one last digit."""
    if isinstance(expected, int):
        return value == expected
    digits, unit = expected[:-1], UNITS[expected[-1]]
    last = unit * 10 ** -len(digits.partition(".")[2])
    return abs(value - float(digits) * unit) <= last


@functools.cache
def counted(name: str, shape: tuple[int, ...], **kwargs) -> Profile:
    return profile(network(name, **dict(kwargs)), shape)


def network(name: str, **kwargs) -> nn.Module:
    """``cifar-x`` is torchvision's with a 3x3 stem of stride 1 and no max-pool."""
    if name.startswith("cifar-"):
        net = build(name.removeprefix("cifar-"), **kwargs)
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
        return net
    with torch.device("meta"):
        return build(name, **kwargs)


# ---- counting rules: each maps a profile to a number ----


def macs(p: Profile) -> int:
    return p.macs


def params(p: Profile) -> int:
    return p.params


def paper_macs(p: Profile) -> int:
    """Plus 2 per batch norm output and 1 per biased convolution output."""
    return p.paper_macs()


def bias_macs(p: Profile) -> int:
    """Plus 1 per biased convolution output, batch norm free."""
    return p.paper_macs(bn_ops=0)


def all_bias_macs(p: Profile) -> int:
    """Plus 1 per output of any biased layer."""
    return p.macs + sum(layer.outputs for layer in p.layers if layer.bias)


def old_profiler(p: Profile) -> int:
    """Plus 4 per batch norm output, 1 per biased convolution output; a linear layer costs (2 in - 1) out."""
    return p.paper_macs(bn_ops=4) + sum(x.macs - x.outputs for x in p.layers if x.kind == "linear")


def params_without_bn(p: Profile) -> int:
    return p.params - sum(layer.params for layer in p.layers if layer.kind == "batchnorm")


def channels(p: Profile) -> int:
    """Output channels of all convolutions."""
    return sum(layer.shape[0] for layer in convs(p))


def convs(p: Profile) -> list[LayerProfile]:
    return [layer for layer in p.layers if layer.kind == "conv"]


def weights(p: Profile) -> int:
    """Weights of convolutions and linear layers, without biases."""
    return conv_weights(p) + linear_weights(p)


def conv_weights(p: Profile) -> int:
    return sum(x.params - x.bias * x.shape[0] for x in convs(p))


def linear_weights(p: Profile) -> int:
    return sum(x.params - x.bias * x.shape[-1] for x in p.layers if x.kind == "linear")


def stem_free_weights(p: Profile) -> int:
    """Weights of all convolutions but the first."""
    return conv_weights(p) - convs(p)[0].params


def conv_macs(p: Profile) -> int:
    return sum(x.macs for x in convs(p))


def spatial(p: Profile) -> list[LayerProfile]:
    """Convolutions that are neither the stem nor on a shortcut."""
    return [x for x in convs(p)[1:] if "downsample" not in x.name]


def binary_weights(p: Profile) -> int:
    return sum(x.params for x in spatial(p))


def binary_macs(p: Profile) -> int:
    return sum(x.macs for x in spatial(p))


def block_linear_weights(p: Profile) -> int:
    """Weights of the linear layers inside transformer blocks."""
    return sum(x.params - x.bias * x.shape[-1] for x in p.layers if x.kind == "linear" and "blocks" in x.name)


CIFAR, IMAGENET = (1, 3, 32, 32), (1, 3, 224, 224)
VGG_LINEAR = {"classifier": "linear"}
HUNDRED = {"num_classes": 100}
PROJECTION = {"num_classes": 100, "shortcut": "projection"}
WIDE = {"widths": (32, 32, 64, 128)}
BIASED = {"num_classes": 100, "variant": "biased"}

# slug of the paper, network, its arguments, input, {rule: figure}
FIGURES: list[tuple[str, str, dict, tuple[int, ...], dict[Callable[[Profile], int], int | str]]] = [
    ("hrank", "vgg16_cifar", {}, CIFAR, {params_without_bn: "14.98M", params: 14_991_946}),
    ("hrank", "resnet56", {}, CIFAR, {macs: "125.49M", params: "0.85M"}),
    ("hrank", "resnet110", {}, CIFAR, {macs: "252.89M", params_without_bn: "1.72M"}),
    ("hrank", "googlenet_cifar", {}, CIFAR, {macs: "1.52B", params_without_bn: "6.15M"}),
    ("hrank", "densenet40", {}, CIFAR, {params_without_bn: "1.04M"}),
    ("hrank", "resnet50", {}, IMAGENET, {paper_macs: "4.11B", params: "25.55M"}),
    ("filtersketch", "resnet56", {}, CIFAR, {macs: 125_485_696, paper_macs: 126_550_656, params: 853_018}),
    ("filtersketch", "resnet110", {}, CIFAR, {macs: 252_887_680, paper_macs: 254_984_832, params: 1_727_962}),
    (
        "abcpruner",
        "vgg16_cifar",
        VGG_LINEAR,
        CIFAR,
        {macs: "313.20M", old_profiler: "314.59M", params: 14_728_266, channels: 4224},
    ),
    (
        "abcpruner",
        "resnet56",
        {},
        CIFAR,
        {macs: "125.49M", old_profiler: "127.62M", params: 853_018, channels: 2032},
    ),
    (
        "abcpruner",
        "resnet110",
        {},
        CIFAR,
        {macs: "252.89M", old_profiler: "257.08M", params: 1_727_962, channels: 4048},
    ),
    (
        "abcpruner",
        "googlenet_cifar",
        {},
        CIFAR,
        {macs: "1521.76M", old_profiler: "1534.54M", params: 6_166_250, channels: 7904},
    ),
    ("abcpruner", "resnet50", {}, IMAGENET, {old_profiler: "4135.7M"}),
    (
        "white-box",
        "vgg16_cifar",
        {"classifier": "linear", "last_pool": "max"},
        CIFAR,
        {macs: 313_201_664, paper_macs: 314_031_104, params: 14_728_266},
    ),
    ("white-box", "resnet56", {}, CIFAR, {macs: 125_485_696, paper_macs: 126_550_656, params: 853_018}),
    ("white-box", "resnet110", {}, CIFAR, {macs: 252_887_680, paper_macs: 254_984_832, params: 1_727_962}),
    (
        "white-box",
        "mobilenet_v2_cifar",
        {},
        CIFAR,
        {macs: 304_075_264, paper_macs: 312_877_568, params: 2_297_754},
    ),
    (
        "white-box",
        "resnet50",
        {},
        IMAGENET,
        {macs: 4_089_184_256, paper_macs: 4_111_412_224, params: 25_557_032},
    ),
    (
        "gal",
        "vgg16_cifar",
        {},
        CIFAR,
        {macs: 313_463_808, bias_macs: 313_740_288, params_without_bn: 14_982_474, params: 14_991_946},
    ),
    ("gal", "resnet56", {}, CIFAR, {macs: 125_485_696, params: 853_018}),
    ("gal", "resnet110", {}, CIFAR, {macs: 252_887_680, params_without_bn: 1_719_866, params: 1_727_962}),
    ("gal", "densenet40", {}, CIFAR, {macs: 282_917_328, params_without_bn: 1_040_578}),
    ("gal", "googlenet_cifar", {}, CIFAR, {macs: 1_521_756_160, params_without_bn: 6_150_442}),
    ("gal", "resnet50", {}, IMAGENET, {macs: "4.09B", params_without_bn: "25.50M"}),
    ("ssr", "lenet5", {}, (1, 1, 28, 28), {macs: 2_293_000, all_bias_macs: "2.308M", params: 431_080}),
    ("ssr", "vgg16", {}, IMAGENET, {macs: "15.47B"}),
    ("ssr", "resnet50", {}, IMAGENET, {macs: "4.09B", params: "25.55M"}),
    ("kse", "resnet56", {}, CIFAR, {macs: "125M", params: "0.85M"}),
    ("kse", "resnet50", {}, IMAGENET, {macs: "4.1B", params: "25.5M"}),
    ("architecture-decoupling", "resnet56", {}, CIFAR, {macs: 125_485_696, params: 853_018}),
    ("architecture-decoupling", "vgg19_cifar", {}, CIFAR, {macs: 398_136_320}),
    ("architecture-decoupling", "resnet18", {}, IMAGENET, {paper_macs: "1.82G"}),
    ("lottery-jackpots", "resnet32", WIDE, CIFAR, {conv_weights: 1_844_064, linear_weights: 1_280}),
    (
        "lottery-jackpots",
        "vgg19_cifar",
        {"bias": False, "last_pool": "max"},
        CIFAR,
        {conv_weights: 20_018_880},
    ),
    (
        "lottery-jackpots",
        "resnet50",
        {},
        IMAGENET,
        {conv_weights: 23_454_912, linear_weights: 2_048_000},
    ),
    (
        "lbc",
        "resnet50",
        {},
        IMAGENET,
        {macs: 4_089_184_256, params: 25_557_032, stem_free_weights: 23_445_504},
    ),
    ("lbc", "resnet18", {}, IMAGENET, {stem_free_weights: 11_157_504}),
    (
        "lbc",
        "timm/deit_small_patch16_224",
        {},
        IMAGENET,
        {params: 22_050_664, block_linear_weights: 21_233_664},
    ),
    ("pcnn", "vgg16_cifar", {}, CIFAR, {conv_weights: 14_710_464, conv_macs: 313_196_544}),
    ("pcnn", "cifar-resnet18", {}, CIFAR, {conv_weights: 10_987_200 + 172_032}),
    ("pconv", "vgg16", {}, IMAGENET, {conv_weights: 14_710_464, conv_macs: 15_346_630_656}),
    ("pconv", "resnet18", {}, IMAGENET, {conv_weights: 11_166_912}),
    ("pconv", "resnet50", {}, IMAGENET, {conv_weights: 23_454_912}),
    ("pconv", "mobilenet_v2", {}, IMAGENET, {conv_weights: 2_189_760}),
    ("admm-nn-s", "lenet5", {}, (1, 1, 28, 28), {weights: 430_500}),
    (
        "low-rank-winograd",
        "torchvision/r3d_18",
        {"num_classes": 400},
        (1, 3, 16, 112, 112),
        {params: 33_371_472},
    ),
    ("wavelet-rnn", "lenet5", {}, (1, 1, 28, 28), {params: "431k"}),
    ("rbnn", "resnet18", {}, IMAGENET, {binary_weights: 10_985_472, binary_macs: 1_676_279_808}),
    ("rbnn", "resnet34", {}, IMAGENET, {binary_weights: 21_086_208, binary_macs: 3_525_967_872}),
    ("rbnn", "resnet20", {}, CIFAR, {binary_weights: 267_264, binary_macs: "40.11M"}),
    ("rbnn", "cifar-resnet18", {"num_classes": 10}, CIFAR, {stem_free_weights: 11_157_504}),
    ("siman", "resnet18", {}, IMAGENET, {binary_weights: 10_985_472, binary_macs: "1.676G"}),
    ("dgms", "resnet18", {}, IMAGENET, {stem_free_weights: 11_157_504, linear_weights: 512_000}),
    # The quantised layers carry 88 range scalars more.
    ("lts", "resnet20", {"shortcut": "projection"}, CIFAR, {weights: 270_896, params: 272_562 - 88}),
    ("lts", "resnet20", PROJECTION, CIFAR, {weights: 276_656, params: 278_412 - 88}),
    ("kcd", "resnet20", PROJECTION, CIFAR, {macs: "40.82M", params: 278_324}),
    ("kcd", "resnet32", PROJECTION, CIFAR, {params: 472_756}),
    ("kcd", "resnet56", PROJECTION, CIFAR, {macs: "125.75M", params: 861_620}),
    ("kcd", "resnet110", PROJECTION, CIFAR, {params: 1_736_564}),
    ("kcd", "resnet8x4", HUNDRED, CIFAR, {params: 1_233_540}),
    ("kcd", "resnet32x4", HUNDRED, CIFAR, {macs: "1083.04M", params: 7_433_860}),
    ("kcd", "wide_resnet16_2", HUNDRED, CIFAR, {macs: "101.12M", params: 703_284}),
    ("kcd", "wide_resnet40_1", HUNDRED, CIFAR, {params: 569_780}),
    ("kcd", "wide_resnet40_2", HUNDRED, CIFAR, {macs: "327.61M", params: 2_255_156}),
    ("kcd", "vgg8_cifar", HUNDRED, CIFAR, {macs: "96.19M", params: 3_965_028}),
    ("kcd", "vgg13_cifar", HUNDRED, CIFAR, {macs: "284.94M", params: 9_462_180}),
    ("kcd", "resnet50_cifar", HUNDRED, CIFAR, {params: 23_705_252}),
    ("kcd", "mobilenet_v2_half", HUNDRED, CIFAR, {params: 812_836}),
    ("kcd", "shufflenet_v1", HUNDRED, CIFAR, {params: 949_258}),
    ("kcd", "shufflenet_v2", HUNDRED, CIFAR, {params: 1_355_528}),
    ("ffsd", "resnet20", PROJECTION, CIFAR, {macs: 40_818_944, params: 278_324}),
    ("ffsd", "resnet32", PROJECTION, CIFAR, {macs: 69_130_496, params: 472_756}),
    ("ffsd", "resnet56", PROJECTION, CIFAR, {macs: 125_753_600, params: 861_620}),
    ("ffsd", "wide_resnet16_2", BIASED, CIFAR, {macs: 129_430_016, params: 704_420}),
    ("ffsd", "wide_resnet40_2", BIASED, CIFAR, {macs: 355_922_432, params: 2_258_084}),
    ("ffsd", "densenet40", HUNDRED, CIFAR, {macs: 282_958_368, params: 1_100_428}),
    ("ffsd", "googlenet_cifar", HUNDRED, CIFAR, {macs: "1.522G", params: 6_258_500}),
    ("od-cheap-conv", "resnet56", {}, CIFAR, {macs: 125_485_696, params: 853_018}),
    ("supervit", "timm/deit_small_patch16_224", {}, IMAGENET, {macs: "4.599G", params: "22.05M"}),
    ("supervit", "timm/deit_small_patch16_224", {"img_size": 192}, (1, 3, 192, 192), {macs: "3.315G"}),
    ("supervit", "timm/deit_small_patch16_224", {"img_size": 160}, (1, 3, 160, 160), {macs: "2.268G"}),
    ("supervit", "timm/deit_small_patch16_224", {"img_size": 128}, (1, 3, 128, 128), {macs: "1.438G"}),
    ("mgnet", "resnet18", HUNDRED, IMAGENET, {macs: "1.8136G"}),
    ("mgnet", "resnet18", {}, (1, 3, 96, 96), {conv_macs: "0.3332G"}),
    ("mgnet", "resnet50", HUNDRED, IMAGENET, {macs: "4.0873G"}),
    ("afec", "alexnet", {"num_classes": 200}, IMAGENET, {params: 57_823_240}),
    ("hcdh", "alexnet", {"num_classes": 16}, IMAGENET, {params: 57_069_392}),
    ("hcdh", "alexnet", {"num_classes": 64}, IMAGENET, {params: 57_266_048}),
    (
        "calibrator",
        "lenet5",
        {"in_channels": 3, "input_size": 32},
        CIFAR,
        {macs: 4_306_000, params: 657_080},
    ),
    ("frequency-filters", "resnet20", {}, CIFAR, {params: 269_722}),
    ("frequency-filters", "cifar-resnet18", {"num_classes": 10}, CIFAR, {macs: "0.56G", params: "11.17M"}),
    # No paper's, but what every counter is asked for; ViT's attention hides from hooks and in fused kernels.
    ("common", "resnet18", {}, IMAGENET, {macs: 1_814_073_344}),
    ("common", "mobilenet_v2", {}, IMAGENET, {macs: 300_774_272}),
    ("common", "densenet121", {}, IMAGENET, {macs: 2_834_161_664}),
    ("common", "efficientnet_b0", {}, IMAGENET, {macs: 385_814_752}),
    ("common", "vit_b_16", {}, IMAGENET, {macs: 17_563_828_224, params: 86_567_656}),
]


def _id(row: tuple) -> str:
    slug, name, arguments, shape, _ = row
    size = f"{shape[-1]}px"
    return "-".join([slug, name.rpartition("/")[2], *(f"{k}={v}" for k, v in arguments.items()), size])


@pytest.mark.parametrize(("slug", "name", "arguments", "shape", "figures"), FIGURES, ids=map(_id, FIGURES))
def test_dense_figures(slug, name, arguments, shape, figures):
    counts = counted(name, shape, **arguments)
    wrong = {rule.__name__: rule(counts) for rule, figure in figures.items() if not agrees(rule(counts), figure)}
    assert not wrong, {rule.__name__: figure for rule, figure in figures.items()}


@pytest.mark.parametrize(
    ("early", "late", "expected_params", "expected_macs"),
    [
        (0.21, 0.75, 2_766_541, "131.17M"),
        (0.3, 0.75, 2_505_793, "104.78M"),
        (0.45, 0.78, 1_901_836, "66.95M"),
    ],
    ids=["hrank-vgg16-.21-.75", "hrank-vgg16-.3-.75", "hrank-vgg16-.45-.78"],
)
def test_paper_macs_of_narrow_vgg(early, late, expected_params, expected_macs):
    """The published rows are counted with batch norm and biases; seven layers are pruned early, five late."""
    dense = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512)
    kept = [int(n * (1 - (early if i < 7 else late))) for i, n in enumerate(dense)]
    groups = (kept[:2], kept[2:4], kept[4:7], kept[7:10], [*kept[10:], 512])
    counts = profile(CIFARVGG(groups), CIFAR)
    assert counts.params == expected_params
    assert agrees(counts.paper_macs(), expected_macs)
