"""The methods of this collection as plain data: what exists, where it comes from, what its paper reports.

One `Card` per method. The table of `lc methods`, the README, the documentation and the conformance suite read
it, so a new method is one more card. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"

READY = "ready"
PLANNED = "planned"

_CALLBACKS = "lightning_compress.callbacks"
_MODULES = "lightning_compress.modules"


@dataclass(frozen=True)
class Row:
    """One published result.

    Args:
        network: network name as the paper prints it.
        data: data set name.
        setting: what the paper varies, in its own notation (a list of rates, a variant).
        result: quantity → value: ``top1``, ``top5``, ``rank1``, ``rank10``, ``rank20`` and ``mAP`` in percent,
            ``psnr`` in dB, ``ssim``, ``fid``, ``miou`` in percent, ``compression`` (times fewer bits), ``macs`` and
            ``params`` as counts, by the paper's own convention (the method's documentation page states it).
        config: name of the packaged config that reproduces this row, "" where there is none.
    """

    network: str
    data: str
    setting: str
    result: Mapping[str, float]
    config: str = ""


@dataclass(frozen=True)
class Card:
    """One method: its class, its paper and its published results.

    Args:
        slug: stem shared by the source file, its test, its documentation page and its configs.
        class_path: full import path of the class a user names.
        family: pruning, sparsity, quantization, distillation, training, translation, ...
        title: title of the paper.
        authors: first author "et al." (all of them up to three).
        venue: where it appeared, with the year; the year alone for a preprint.
        arxiv: arXiv identifier, "" where the paper is not there.
        status: `READY` (shipped, tested) or `PLANNED`.
        also: further classes that belong to the method.
        published: rows of the paper's result tables.
    """

    slug: str
    class_path: str
    family: str
    title: str
    authors: str
    venue: str
    arxiv: str
    status: str = PLANNED
    also: tuple[str, ...] = ()
    published: tuple[Row, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The class name, as a config or `--trainer.callbacks+=` takes it."""
        return self.class_path.rpartition(".")[2]

    @property
    def configs(self) -> tuple[str, ...]:
        """Names of the packaged configs of this method: its fragment, then its recipes."""
        fragments = (f"method/{self.slug}", f"model/{self.slug}")
        return tuple(n for n in config_names() if n in fragments or n.startswith(f"recipes/{self.slug}/"))


def config_names() -> list[str]:
    """Short names of all packaged configs: "quickstart", "data/digits", "recipes/hrank/quick", ..."""
    return sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml"))


def cards(status: str | None = None) -> Iterator[Card]:
    """All cards, or those of one status, in the order of the table."""
    return (card for card in CARDS if status in (None, card.status))


def card(name: str) -> Card:
    """The card whose slug or class name is `name` (case is ignored).

    Raises:
        KeyError: when there is none.

    >>> card("hrank").venue
    'CVPR 2020'
    """
    for entry in CARDS:
        if name.lower() in (entry.slug, entry.name.lower()):
            return entry
    raise KeyError(name)


def markdown_table() -> str:
    """The table of all methods for README and documentation, ready ones first."""
    lines = ["| Method | Paper | Class | Family | Status |", "|---|---|---|---|---|"]
    for c in sorted(CARDS, key=lambda c: c.status != READY):
        paper = f"[{c.title}](https://arxiv.org/abs/{c.arxiv})"
        home = c.class_path.split(".")[1]
        classes = ", ".join(f"`{name}`" for name in (f"{home}.{c.name}", *c.also))
        lines.append(f"| {c.name} | {paper}, {c.venue} | {classes} | {c.family} | {c.status} |")
    return "\n".join(lines)


def _rows(method: str, network: str, data: str, *rows: tuple[str, float | None, float, float, str]) -> tuple[Row, ...]:
    """Rows of one network from (setting, top-1 in %, 1e6 MACs, 1e6 parameters, end of the config name)."""
    start = f"recipes/{method}/{network}_{data}_".lower().replace("-", "")
    return tuple(
        Row(
            network,
            data,
            setting,
            {
                **({} if top1 is None else {"top1": top1}),
                "macs": round(macs * 1e6),
                "params": round(params * 1e6),
            },
            start + config,
        )
        for setting, top1, macs, params, config in rows
    )


# fmt: off
_HRANK = (
    *_rows("hrank", "VGG-16", "CIFAR-10",
           ("[0.21]*7+[0.75]*5", 93.73, 131.17, 2.76, "131m"),
           ("[0.3]*7+[0.75]*5", 93.56, 104.78, 2.50, "105m"),
           ("[0.45]*7+[0.78]*5", 93.10, 66.95, 1.90, "67m"),
           ("sequential: [0.95]+[0.5]*6+[0.9]*4+[0.8]*2", 92.34, 108.61, 2.64, "sequential")),
    *_rows("hrank", "ResNet-56", "CIFAR-10",
           ("[0.]+[0.18]*29", 93.85, 90.35, 0.66, "90m"),
           ("[0.]+[0.15]*2+[0.4]*27", 93.57, 65.94, 0.48, "66m"),
           ("[0.]+[0.4]*2+[0.5]*9+[0.6]*9+[0.7]*9", 92.32, 34.78, 0.24, "35m"),
           ("sequential: [0.1]+[0.6]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1,0.4]*4",
            93.17, 62.72, 0.49, "sequential")),
    *_rows("hrank", "ResNet-110", "CIFAR-10",
           ("[0.]+[0.2]*2+[0.3]*18+[0.35]*36", 94.20, 140.54, 1.04, "141m"),
           ("[0.]+[0.4]*2+[0.5]*18+[0.65]*36", 93.23, 71.69, 0.54, "72m"),
           ("sequential: [0.1]+[0.4]*108", 94.23, 156.90, 1.04, "sequential_157m"),
           ("sequential: [0.1]+[0.6]*108", 93.36, 105.70, 0.70, "sequential_106m")),
    *_rows("hrank", "GoogLeNet", "CIFAR-10",
           ("[0.3]+[0.6]*2+[0.7]*5+[0.8]*2", 95.04, 649.19, 2.85, "649m"),
           ("[0.4]+[0.85]*2+[0.9]*5+[0.9]*2", 94.82, 395.42, 2.09, "395m"),
           ("sequential: [0.1]+[0.8]*5+[0.85]+[0.8]*3", 94.07, 450.06, 1.86, "sequential_450m"),
           ("sequential: [0.1]+[0.7]+[0.5]+[0.8]*4+[0.5]+[0.6]*2", None, 686.02, 2.74, "sequential_686m")),
    *_rows("hrank", "DenseNet-40", "CIFAR-10",
           ("growth 9", 94.51, 173.39, 0.62, "173m"),
           ("growth 7", 93.66, 113.08, 0.39, "113m"),
           ("sequential: [0.]+[0.1]*6+[0.7]*6+[0.]+[0.1]*6+[0.7]*6+[0.]+[0.1]*6+[0.7]*5+[0.]",
            94.24, 167.41, 0.66, "sequential")),
    *_rows("hrank", "ResNet-50", "ImageNet",
           ("[0.]+[0.1]*3+[0.35]*16", 75.56, 2260, 15.09, "2260m"),
           ("[0.]+[0.25]*3+[0.5]*16", 74.19, 1520, 11.05, "1520m"),
           ("[0.]+[0.25]*3+[0.5]*16, cosine", 75.83, 1520, 11.05, "1520m_cosine"),
           ("[0.]+[0.5]*3+[0.6]*16", 72.30, 950, 8.02, "950m"),
           ("sequential: [0.2]+[0.8]*23+[0.55]*19+[0.45]*10", 71.98, 1549.65, 13.77, "sequential")),
)

# The settings are the paper's sketch rates: the share of filters KEPT, one number per block.
_FILTER_SKETCH = (
    *_rows("filter_sketch", "ResNet-56", "CIFAR-10",
           ("[0.1]*27", 87.38, 11.43, 0.08, "11m"),
           ("[0.2]*27", 90.19, 24.54, 0.16, "25m"),
           ("[0.3]*27", 91.65, 35.61, 0.25, "36m"),
           ("[0.4]*27", 92.00, 48.72, 0.33, "49m"),
           ("[0.5]*27", 92.29, 63.78, 0.43, "64m"),
           ("[0.6]*27", 93.19, 73.36, 0.50, "73m"),
           ("[0.7]*27", 93.36, 87.31, 0.59, "87m"),
           ("[0.9]*27", 93.44, 111.5, 0.75, "112m"),
           ("[0.9]*3+[0.1]*20+[0.6]*4", 91.20, 32.47, 0.24, "32m"),
           ("[0.7]*3+[0.4]*20+[0.9]*4", 92.94, 62.63, 0.48, "63m")),
    *_rows("filter_sketch", "ResNet-110", "CIFAR-10",
           ("[0.9]*3+[0.4]*24+[0.3]*24+[0.9]*3", 93.44, 92.84, 0.69, "published_list")),
    *_rows("filter_sketch", "GoogLeNet", "CIFAR-10", ("[0.25]*9", 94.88, 590, 2.61, "590m")),
    *_rows("filter_sketch", "ResNet-50", "ImageNet",
           ("[0.2]*16", 69.43, 930, 7.18, "930m"),
           ("[0.6]*16", 74.68, 2230, 14.53, "2230m"),
           ("[0.7]*16", 75.22, 2640, 16.95, "2640m")),
)

# LeNet-5 is stated by its filters, with bias additions among the MACs; the others by the regulariser alone.
_SSR = (
    *_rows("ssr", "LeNet-5", "MNIST", ("3-11-108", None, 0.118, 0.021, "3_11_108")),
    *_rows("ssr", "VGG-16", "ImageNet", ("L2,1", 69.80, 4500, 126.7, "4500m")),
    *_rows("ssr", "ResNet-50", "ImageNet",
           ("L2,1", 72.13, 1900, 15.9, "1900m"),
           ("L2,0", 72.29, 1900, 15.5, "1900m_l20"),
           ("L2,1 stronger", 71.15, 1700, 12.2, "1700m")),
)

# Budgets: the widths are not published.
_WHITE_BOX = tuple(
    Row(network, data, setting, result, f"recipes/white_box/{config}")
    for network, data, setting, result, config in (
        ("VGG-16", "CIFAR-10", "76.4% of MACs removed", {"top1": 93.47, "macs": 73_915_593}, "vgg16_cifar10_74m"),
        ("ResNet-56", "CIFAR-10", "55.6% of MACs removed", {"top1": 93.54, "macs": 55_715_649},
         "resnet56_cifar10_56m"),
        ("ResNet-110", "CIFAR-10", "65.23% of MACs removed", {"top1": 94.12, "macs": 87_929_046},
         "resnet110_cifar10_88m"),
        ("MobileNetV2", "CIFAR-10", "29.2% of MACs removed", {"top1": 95.28, "macs": 215_285_287},
         "mobilenet_v2_cifar10_215m"),
        ("ResNet-50", "ImageNet", "45.6% of MACs removed", {"top1": 75.32, "top5": 92.43, "macs": 2_220_000_000},
         "resnet50_imagenet_2220m"),
        ("ResNet-50", "ImageNet", "63.5% of MACs removed", {"macs": 1_500_000_000}, "resnet50_imagenet_1500m"),
    )
)

# The G of the paper's table is not that of its code (documentation page); ResNet-50 is printed as ratios.
_KSE = (
    *_rows("kse", "ResNet-56", "CIFAR-10", ("G=4", 93.23, 60, 0.43, "g6"), ("G=5", 92.88, 50, 0.36, "g8")),
    *_rows("kse", "ResNet-50", "ImageNet", ("G=5", 75.51, 4089 / 3.8, 25.56 / 2.6, "g5_t1")),
)

# Parameters as printed, without those of batch norms (ResNet-56 GAL-0.6: 0.75M either way).
_GAL = (
    *_rows("gal", "VGG-16", "CIFAR-10",
           ("GAL-0.05", 92.03, 189.49, 3.36, "189m"), ("GAL-0.1", 90.73, 171.89, 2.67, "172m")),
    *_rows("gal", "ResNet-56", "CIFAR-10",
           ("GAL-0.6", 92.98, 78.30, 0.75, "78m"), ("GAL-0.8", 90.36, 49.99, 0.29, "50m")),
    *_rows("gal", "ResNet-110", "CIFAR-10", ("GAL-0.1", 92.55, 205.70, 1.65, "206m")),
    *_rows("gal", "DenseNet-40", "CIFAR-10", ("GAL-0.01", 94.29, 182.92, 0.67, "183m")),
    *_rows("gal", "ResNet-50", "ImageNet",
           ("GAL-0.5", 71.95, 2330, 21.20, "2330m"), ("GAL-0.5-joint", 71.80, 1840, 19.31, "1840m"),
           ("GAL-1", 69.88, 1580, 14.67, "1580m")),
)

# The numbers of the codes are not published; the configs hold ones of ours that cost the same.
_ABC_PRUNER = (
    *_rows("abc_pruner", "VGG-16", "CIFAR-10", ("ABCPruner-80%", 93.08, 82.81, 1.67, "83m")),
    *_rows("abc_pruner", "ResNet-56", "CIFAR-10", ("ABCPruner-70%", 93.23, 58.54, 0.39, "59m")),
    *_rows("abc_pruner", "ResNet-110", "CIFAR-10", ("ABCPruner-60%", 93.58, 89.87, 0.56, "90m")),
    *_rows("abc_pruner", "GoogLeNet", "CIFAR-10", ("ABCPruner-30%", 94.84, 513.19, 2.46, "513m")),
    *_rows("abc_pruner", "ResNet-18", "ImageNet", ("ABCPruner-70%", 67.28, 1005.71, 6.6, "1006m")),
    *_rows("abc_pruner", "ResNet-34", "ImageNet", ("ABCPruner-90%", 70.98, 2170.77, 10.12, "2171m")),
    *_rows("abc_pruner", "ResNet-50", "ImageNet",
           ("ABCPruner-30%", 70.29, 944.85, 7.35, "945m"),
           ("ABCPruner-70%", 73.52, 1794.45, 11.24, "1794m"),
           ("ABCPruner-80%", 73.86, 1890.6, 11.75, "1891m"),
           ("ABCPruner-100%", 74.84, 2555.55, 18.02, "2556m")),
    *_rows("abc_pruner", "ResNet-101", "ImageNet", ("ABCPruner-80%", 75.82, 3164.91, 17.72, "3165m")),
    *_rows("abc_pruner", "ResNet-152", "ImageNet", ("ABCPruner-70%", 77.12, 4309.52, 24.07, "4310m")),
)

# MACs of convolutions, and their weights, that stay, by the rules of the method. The paper prints rates (VGG-16: 8.0),
# and no accuracies that could be confirmed.
_PCONV = (
    *_rows("pconv", "VGG-16", "ImageNet", ("scp4, 3.6", None, 1922.614176, 1.816680, "8x")),
    *_rows("pconv", "ResNet-18", "ImageNet", ("scp4, 3.6", None, 344.252636, 1.537700, "7x")),
    *_rows("pconv", "ResNet-50", "ImageNet",
           ("scp4, 3.6", None, 1194.901064, 6.775367, "3x"),
           ("natural8, 2", None, 1768.603648, 9.972928, "2x")),
    *_rows("pconv", "MobileNet-V2", "ImageNet", ("scp4, 3.6", None, 88.467883, 0.619123, "4x")),
    *_rows("pconv", "VGG-16", "CIFAR-10", ("natural8, 3.6, filter balance", None, 39.624704, 1.829120, "8x")),
)

# MACs and weights of convolutions that stay, by the closed forms; the paper reports 8.4x with codes at 0.2 % loss.
_PCNN = (
    *_rows("pcnn", "VGG-16", "CIFAR-10",
           ("n=4, 16 patterns", None, 139.198464, 6.537984, "n4"),
           ("n=3, 16 patterns", None, 104.398848, 4.903488, "n3"),
           ("n=2, 32 patterns", None, 69.599232, 3.268992, "n2"),
           ("n=1, 8 patterns", None, 34.799616, 1.634496, "n1"),
           ("n=2-1-...-1, 8 patterns", None, 34.996224, 1.634688, "various")),
    *_rows("pcnn", "VGG-16", "ImageNet", ("n=4, 16 patterns", None, 6820.724736, 6.537984, "n4")),
)

# Weights that stay (without biases) by the published shares of each layer; the sources print no MACs.
_ADMM_NN = (
    Row("LeNet-5", "MNIST", "71.2x", {"top1": 99.2, "params": 6_050}, "recipes/admm_nn/lenet5_mnist_71x"),
    Row("AlexNet", "ImageNet", "21x", {"top5": 80.2, "params": 2_906_701}, "recipes/admm_nn/alexnet_imagenet_21x"),
)

_PATTERN_PRUNING = (
    *_rows("pattern_pruning", "VGG-16", "ImageNet", ("extracted 8, 3.6", None, 1922.614176, 1.816680, "8x")),
    *_rows("pattern_pruning", "ResNet-50", "ImageNet", ("voted 8, 2", None, 1768.603648, 9.972928, "2x")),
    *_rows("pattern_pruning", "MobileNet-V2", "ImageNet", ("extracted 8, 3.6", None, 88.467883, 0.619123, "4x")),
    *_rows("pattern_pruning", "VGG-16", "CIFAR-10", ("extracted 8, 3.6", None, 39.237024, 1.816680, "8x")),
)

# LSQ; MACs and parameters by our own count.
_QAT = _rows("qat", "ResNet-18", "ImageNet",
             *((f"{bits}/{bits}", top1, 1814.073344, 11.689512, f"{bits}bit")
               for bits, top1 in ((2, 67.6), (3, 70.2), (4, 71.1), (8, 71.1))))
# Accuracies of single networks could not be confirmed; MACs and parameters by our own count.
_LTS = _rows("lts", "MobileNet-V2", "ImageNet", ("2/2", None, 300.774272, 3.504872, "2bit"))

# MACs and parameters are those of the network. What is told of ResNet-18 with 3 bits (about 69.6 %) and of ResNet-50
# with 4 (about 76.3 %) could not be confirmed.
_DGMS = _rows("dgms", "ResNet-18", "ImageNet", ("4/32", 70.29, 1814.073344, 11.689512, "4bit"))

# MACs and parameters that are not zero, by our own count; the paper prints none. Stem and classifier are dense.
_LBC = (
    *_rows("lbc", "ResNet-50", "ImageNet",
           ("2:4", 77.2, 2104.623104, 13.834280, "2of4"),
           ("1:4", 75.9, 1112.342528, 7.972904, "1of4"),
           ("2:8", 76.5, 1112.342528, 7.972904, "2of8"),
           ("1:16", 71.8, 368.132096, 3.576872, "1of16")),
    *_rows("lbc", "ResNet-18", "ImageNet", ("2:4", 71.5, 966.299648, 6.110760, "2of4")),
    *_rows("lbc", "DeiT-small", "ImageNet", ("2:4", 78.0, 2507.366400, 11.433832, "2of4")),
)

# Parameters that are not zero, by our own count; how the zeros spread over the layers depends on the trained weights.
_LOTTERY_JACKPOTS = tuple(
    Row(network, data, setting, {"top1": top1, "params": params},
        f"recipes/lottery_jackpots/{network}_{data}_{setting[:2]}".lower().replace("-", ""))
    for network, data, setting, top1, params in (
        ("VGG-19", "CIFAR-10", "90 %, 30 epochs", 93.88, 2_018_025),
        ("VGG-19", "CIFAR-10", "90 %, 160 epochs", 93.94, 2_018_025),
        ("VGG-19", "CIFAR-10", "95 %, 30 epochs", 93.49, 1_017_082),
        ("VGG-19", "CIFAR-10", "95 %, 160 epochs", 93.74, 1_017_082),
        ("VGG-19", "CIFAR-100", "90 %, 30 epochs", 72.59, 2_064_195),
        ("VGG-19", "CIFAR-100", "90 %, 160 epochs", 74.61, 2_064_195),
        ("VGG-19", "CIFAR-100", "95 %, 30 epochs", 71.76, 1_063_252),
        ("ResNet-32", "CIFAR-10", "90 %, 30 epochs", 93.70, 190_240),
        ("ResNet-32", "CIFAR-10", "90 %, 160 epochs", 94.39, 190_240),
        ("ResNet-32", "CIFAR-10", "95 %, 30 epochs", 92.90, 98_037),
        ("ResNet-32", "CIFAR-10", "95 %, 160 epochs", 93.41, 98_037),
        ("ResNet-32", "CIFAR-100", "90 %, 30 epochs", 72.22, 201_850),
        ("ResNet-32", "CIFAR-100", "90 %, 160 epochs", 73.43, 201_850),
        ("ResNet-32", "CIFAR-100", "95 %, 160 epochs", 70.31, 109_647),
        ("ResNet-50", "ImageNet", "80 %, 30 epochs", 75.19, 6_793_102),
    )
)

# PSNR in dB and SSIM of the luminance; the Set5 row of 4 bits could not be confirmed. MACs are for an output
# of 1280x720; "compression" says how many times fewer bits all parameters take. Both by our own count.
_PAMS = tuple(
    Row(network, data, setting, {**quality, "macs": macs, "params": params, "compression": compression},
        f"recipes/pams/{config}")
    for network, data, setting, quality, macs, params, compression, config in (
        ("EDSR", "Set5", "x4, 8/8", {"psnr": 32.124}, 114_230_476_800, 1_517_571, 2.398, "edsr_x4_8bit"),
        ("EDSR", "Set5", "x4, 4/4", {"psnr": 31.591, "ssim": 0.8851}, 114_230_476_800, 1_517_571, 3.127,
         "edsr_x4_4bit"),
        ("EDSR", "Set14", "x4, 8/8", {"psnr": 28.585, "ssim": 0.7811}, 114_230_476_800, 1_517_571, 2.398,
         "edsr_x4_8bit"),
        ("EDSR", "Set14", "x4, 4/4", {"psnr": 28.199, "ssim": 0.7725}, 114_230_476_800, 1_517_571, 3.127,
         "edsr_x4_4bit"),
        ("RDN", "Set14", "x4, 4/4", {"psnr": 27.536, "ssim": 0.7530}, 1_309_213_900_800, 22_271_107, 7.217,
         "rdn_x4_4bit"),
    )
)

# One bit for weights and activations. MACs: real ones, and 64 of bits as one, as the paper counts; bits: of
# convolutions and linear layers.
_RBNN = tuple(
    Row(network, data, setting, {"top1": top1, **top5, "macs": macs, "bits": bits}, f"recipes/rbnn/{config}")
    for network, data, setting, top1, top5, macs, bits, config in (
        ("ResNet-18", "CIFAR-10", "1000 epochs", 92.2, {}, 10_425_344, 11_376_960, "resnet18_cifar10"),
        ("ResNet-20", "CIFAR-10", "1000 epochs", 86.5, {}, 1_069_696, 301_888, "resnet20_cifar10"),
        ("ResNet-20", "CIFAR-10", "1000 epochs, bireal", 87.8, {}, 1_069_696, 301_888, "resnet20_bireal_cifar10"),
        ("VGG-small", "CIFAR-10", "1000 epochs", 91.3, {}, 13_058_048, 7_303_488, "vgg_small_cifar10"),
        ("ResNet-18", "ImageNet", "120 epochs", 59.55, {"top5": 81.58}, 163_985_408, 33_207_552,
         "resnet18_imagenet_120epochs"),
        ("ResNet-18", "ImageNet", "150 epochs", 59.94, {"top5": 81.89}, 163_985_408, 33_207_552, "resnet18_imagenet"),
        ("ResNet-34", "ImageNet", "150 epochs", 63.14, {"top5": 84.38}, 192_886_784, 43_308_288, "resnet34_imagenet"),
    )
)

_SIMAN = tuple(
    Row(network, data, setting, {"top1": top1, **top5, "macs": macs, "bits": bits}, f"recipes/siman/{config}")
    for network, data, setting, top1, top5, macs, bits, config in (
        ("ResNet-18", "CIFAR-10", "400 epochs", 92.5, {}, 10_425_344, 11_376_960, "resnet18_cifar10"),
        ("ResNet-20", "CIFAR-10", "400 epochs", 87.4, {}, 1_069_696, 301_888, "resnet20_cifar10"),
        ("VGG-small", "CIFAR-10", "400 epochs", 92.5, {}, 13_058_048, 7_303_488, "vgg_small_cifar10"),
        ("ResNet-18", "ImageNet", "150 epochs", 60.1, {"top5": 82.3}, 163_985_408, 33_207_552, "resnet18_imagenet"),
    )
)

# ResNet-56 teaches ResNet-20, as compared by Tian et al., arXiv:1910.10699, and for DKD in its own paper; then other
# pairs of that comparison. MACs and parameters are the student's.
_KNOWLEDGE_DISTILLATION = tuple(
    Row("ResNet-20", "CIFAR-100", setting, {"top1": top1, "macs": 40_818_944, "params": 278_324},
        f"recipes/knowledge_distillation/resnet20_cifar100_{config}")
    for setting, top1, config in (
        ("logits", 70.66, "logits"),
        ("hints", 69.21, "hints"),
        ("attention", 70.55, "attention"),
        ("similarity", 69.67, "similarity"),
        ("distance, angle", 69.61, "relations"),
        ("selectivity", 69.60, "selectivity"),
        ("flow", 69.95, "flow"),
        ("factors", 69.84, "factors"),
        ("boundary", 69.47, "boundary"),
        ("information", 70.38, "information"),
        ("correlation", 69.63, "correlation"),
        ("probability", 70.34, "probability"),
        ("noise_contrast", 71.16, "contrast"),
        ("target, non_target", 71.97, "decoupled"),
    )
) + tuple(
    Row(network, "CIFAR-100", f"logits of {teacher}", {"top1": top1, "macs": macs, "params": params},
        f"recipes/knowledge_distillation/{config}_cifar100_logits")
    for network, teacher, top1, macs, params, config in (
        ("ResNet-20", "ResNet-110", 70.67, 40_818_944, 278_324, "resnet20_of_resnet110"),
        ("ResNet-32", "ResNet-110", 73.08, 69_130_496, 472_756, "resnet32_of_resnet110"),
        ("VGG-8", "ResNet-50", 73.81, 96_192_512, 3_965_028, "vgg8_of_resnet50"),
        ("MobileNetV2", "ResNet-50", 67.35, 6_523_648, 812_836, "mobilenet_v2_of_resnet50"),
        ("ShuffleNet V2", "ResNet-32x4", 74.45, 44_504_448, 1_355_528, "shufflenet_v2_of_resnet32x4"),
    )
)

# MACs of the four looks that evaluation takes at an image, and parameters in training, by our own count; the paper
# prints neither. The authors' code has three classifiers of ImageNet more, which nothing reads: 88,238,559 and
# 86,931,057.
_CROSS_MODAL_REID = (
    Row("ResNet-50", "SYSU-MM01", "all search, single shot",
        {"rank1": 60.02, "rank10": 94.18, "rank20": 98.14, "mAP": 58.80, "macs": 19_434_307_584, "params": 82_091_559},
        "recipes/cross_modal_reid/sysu_mm01"),
    Row("ResNet-50", "RegDB", "visible to thermal",
        {"rank1": 73.2, "mAP": 71.6, "macs": 19_434_307_584, "params": 80_784_057},
        "recipes/cross_modal_reid/regdb"),
)

# The tables of accuracies could not be obtained; MACs and parameters of one student are by our own count.
_ONLINE_DISTILLATION = _rows(
    "online_distillation", "ResNet-56", "CIFAR-10",
    ("Shift", None, 15.385216, 0.102106, "shift"),
    ("DW", None, 20.472448, 0.119818, "dw"),
    ("Group, g = 4", None, 50.774656, 0.311194, "group"),
)  # fmt: skip

# The leader alone, which costs what the network costs; means of three runs on CIFAR-100.
_FFSD = tuple(
    Row(network, data, "M=2", {"top1": top1, "macs": macs, "params": params}, f"recipes/ffsd/{config}")
    for network, data, top1, macs, params, config in (
        ("ResNet-20", "CIFAR-100", 72.70, 40_818_944, 278_324, "resnet20_cifar100"),
        ("ResNet-32", "CIFAR-100", 74.85, 69_130_496, 472_756, "resnet32_cifar100"),
        ("ResNet-56", "CIFAR-100", 75.80, 125_753_600, 861_620, "resnet56_cifar100"),
        ("WRN-16-2", "CIFAR-100", 75.81, 129_430_016, 704_420, "wrn162_cifar100"),
        ("DenseNet-40", "CIFAR-100", 77.39, 282_958_368, 1_100_428, "densenet40_cifar100"),
        ("ResNet-18", "ImageNet", 70.87, 1_814_073_344, 11_689_512, "resnet18_imagenet"),
    )
)

# Each row is a pair: the student's network, and its teacher and the losses but Hinton's as the setting. MACs and
# parameters are the student's.
_KCD = tuple(
    Row(network, "CIFAR-100", setting, {"top1": top1, "macs": macs, "params": params}, f"recipes/kcd/{config}")
    for network, setting, top1, macs, params, config in (
        ("WRN-16-2", "WRN-40-2", 75.70, 101_118_464, 703_284, "wide_resnet16_2_cifar100"),
        ("WRN-40-1", "WRN-40-2", 73.84, 83_286_272, 569_780, "wide_resnet40_1_cifar100"),
        ("ResNet-20", "ResNet-56", 70.75, 40_818_944, 278_324, "resnet20_cifar100"),
        ("ResNet-20", "ResNet-56, probability", 72.08, 40_818_944, 278_324, "resnet20_cifar100_probability"),
        ("ResNet-20", "ResNet-56, noise_contrast", 72.11, 40_818_944, 278_324, "resnet20_cifar100_noise_contrast"),
        ("ResNet-8x4", "ResNet-32x4", 74.05, 177_071_104, 1_233_540, "resnet8x4_cifar100"),
        ("VGG-8", "VGG-13", 73.44, 96_192_512, 3_965_028, "vgg8_cifar100"),
        ("MobileNetV2", "VGG-13", 68.61, 6_523_648, 812_836, "mobilenet_v2_cifar100"),
        ("ShuffleNet V1", "ResNet-32x4", 74.33, 38_691_456, 949_258, "shufflenet_v1_cifar100"),
        ("ShuffleNet V1", "WRN-40-2", 75.60, 38_691_456, 949_258, "shufflenet_v1_of_wide_resnet_cifar100"),
    )
)

_WAVELET_DISTILLATION = tuple(
    Row(network, data, setting, {**({"fid": fid} if fid else {}), "macs": round(gmacs * 1e9), "params": params},
        f"recipes/wavelet_distillation/{config}")
    for network, data, setting, fid, gmacs, params, config in (
        ("ResNet generator", "horse2zebra", "ngf 24, ndf 32", 77.04, 7.29, 1_610_000, "cyclegan_horse2zebra_ngf24"),
        ("ResNet generator", "horse2zebra", "ngf 16, ndf 32", None, 3.35, 720_000, "cyclegan_horse2zebra_ngf16"),
        ("U-Net", "edges2shoes", "ngf 32, ndf 32", 80.13, 1.56, 13_610_000, "pix2pix_edges2shoes_ngf32"),
        ("U-Net", "edges2shoes", "ngf 16, ndf 32", None, 0.41, 3_400_000, "pix2pix_edges2shoes_ngf16"),
    )
)

# As the papers count: a transposed convolution costs a filter for each place of its output.
_DCD, _CRD = (
    (Row("Mobile ResNet generator", "horse2zebra", "ngf 64 to 16",
         {"fid": fid, "macs": 1_408_000_000, "params": 137_000}, f"recipes/{slug}/horse2zebra"),)
    for slug, fid in (("dcd", 48.24), ("crd", 46.61))
)

# As Li et al., arXiv:2003.08936, print them: what papers that compress generators begin with.
_CYCLE_GAN, _PIX2PIX = (
    tuple(
        Row("ResNet generator", data, "ngf 64, 9 blocks", {score: value, "macs": 56_800_000_000, "params": 11_400_000},
            f"recipes/{slug}/{data}")
        for data, score, value in rows
    )
    for slug, rows in (
        ("cycle_gan", [("horse2zebra", "fid", 65.75)]),
        ("pix2pix", [("edges2shoes", "fid", 24.12), ("cityscapes", "miou", 42.06)]),
    )
)  # fmt: skip

# The shares of MACs are to 56.8 G (CycleGAN) and 18.60 G (Pix2Pix); the paper lists no widths.
_DMAD = tuple(
    Row(network, data, f"{ratio}x", {score: value, "macs": round(gmacs * 1e9), "params": params},
        f"recipes/dmad/{config}" if config else "")
    for network, data, ratio, score, value, gmacs, params, config in (
        ("CycleGAN", "horse2zebra", 14.3, "fid", 62.41, 3.97, 420_000, "cyclegan_horse2zebra"),
        ("CycleGAN, separable", "horse2zebra", 23.6, "fid", 62.96, 2.41, 280_000, "cyclegan_horse2zebra_separable"),
        ("CycleGAN", "zebra2horse", 16.2, "fid", 139.3, 3.50, 300_000, "cyclegan_horse2zebra"),
        ("CycleGAN", "summer2winter", 17.9, "fid", 78.24, 3.18, 240_000, "cyclegan_summer2winter"),
        ("Pix2Pix", "edges2shoes", 6.22, "fid", 46.95, 2.99, 2_130_000, "pix2pix_edges2shoes"),
        ("Pix2Pix, separable", "edges2shoes", 4.32, "fid", 24.08, 4.30, 540_000, "pix2pix_edges2shoes_separable"),
        ("Pix2Pix", "cityscapes", 4.70, "miou", 40.53, 3.96, 1_730_000, "pix2pix_cityscapes"),
    )
)

CARDS: tuple[Card, ...] = (
    Card("hrank", f"{_CALLBACKS}.pruning.hrank.HRank", "pruning",
         "HRank: Filter Pruning using High-Rank Feature Map",
         "Mingbao Lin et al.", "CVPR 2020", "2002.10179", status=READY, published=_HRANK),
    Card("filter_sketch", f"{_CALLBACKS}.pruning.filter_sketch.FilterSketch", "pruning",
         "Filter Sketch for Network Pruning",
         "Mingbao Lin et al.", "IEEE TNNLS 2022", "2001.08514", status=READY, published=_FILTER_SKETCH),
    Card("l1_norm", f"{_CALLBACKS}.pruning.l1_norm.L1Norm", "pruning",
         "Pruning Filters for Efficient ConvNets",
         "Hao Li et al.", "ICLR 2017", "1608.08710", status=READY),
    Card("random_channels", f"{_CALLBACKS}.pruning.random_channels.RandomChannels", "pruning",
         "Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural Networks",
         "Deepak Mittal et al.", "WACV 2018", "1801.10447", status=READY),
    Card("abc_pruner", f"{_CALLBACKS}.pruning.abc_pruner.ABCPruner", "pruning",
         "Channel Pruning via Automatic Structure Search",
         "Mingbao Lin et al.", "IJCAI 2020", "2001.08565", status=READY, published=_ABC_PRUNER),
    Card("white_box", f"{_CALLBACKS}.pruning.white_box.WhiteBox", "pruning",
         "Carrying out CNN Channel Pruning in a White Box",
         "Yuxin Zhang et al.", "IEEE TNNLS 2023", "2104.11883", status=READY, published=_WHITE_BOX),
    Card("ssr", f"{_CALLBACKS}.pruning.ssr.SSR", "pruning",
         "Toward Compact ConvNets via Structure-Sparsity Regularized Filter Pruning",
         "Shaohui Lin et al.", "IEEE TNNLS 2020", "1901.07827", status=READY, published=_SSR),
    Card("kse", f"{_CALLBACKS}.pruning.kse.KSE", "pruning",
         "Exploiting Kernel Sparsity and Entropy for Interpretable CNN Compression",
         "Yuchao Li et al.", "CVPR 2019", "1812.04368", status=READY, published=_KSE),
    Card("architecture_decoupling", f"{_CALLBACKS}.pruning.architecture_decoupling.ArchitectureDecoupling",
         "pruning",
         "Interpretable Neural Network Decoupling",
         "Yuchao Li et al.", "ECCV 2020", "1906.01166", status=READY),
    Card("gal", f"{_MODULES}.pruning.gal.GAL", "pruning",
         "Towards Optimal Structured CNN Pruning via Generative Adversarial Learning",
         "Shaohui Lin et al.", "CVPR 2019", "1903.09291", status=READY, published=_GAL),
    Card("dmad", f"{_CALLBACKS}.pruning.dmad.DMAD", "pruning",
         "Learning Efficient GANs for Image Translation via Differentiable Masks and co-Attention "
         "Distillation",
         "Shaojie Li et al.", "IEEE TMM 2022", "2011.08382", status=READY, published=_DMAD),
    Card("magnitude_pruning", f"{_CALLBACKS}.sparsity.magnitude_pruning.MagnitudePruning", "sparsity",
         "Learning both Weights and Connections for Efficient Neural Networks",
         "Song Han et al.", "NeurIPS 2015", "1506.02626", status=READY),
    Card("lottery_jackpots", f"{_CALLBACKS}.sparsity.lottery_jackpots.LotteryJackpots", "sparsity",
         "Lottery Jackpots Exist in Pre-trained Models",
         "Yuxin Zhang et al.", "IEEE TPAMI 2023", "2104.08700", status=READY,
         published=_LOTTERY_JACKPOTS),
    Card("lbc", f"{_CALLBACKS}.sparsity.lbc.LBC", "sparsity",
         "Learning Best Combination for Efficient N:M Sparsity",
         "Yuxin Zhang et al.", "NeurIPS 2022", "2206.06662", status=READY, published=_LBC),
    Card("pcnn", f"{_CALLBACKS}.sparsity.pcnn.PCNN", "sparsity",
         "PCNN: Pattern-based Fine-Grained Regular Pruning towards Optimizing CNN Accelerators",
         "Zhanhong Tan et al.", "DAC 2020", "2002.04997", status=READY, published=_PCNN),
    Card("pconv", f"{_CALLBACKS}.sparsity.pconv.PCONV", "sparsity",
         "PCONV: The Missing but Desirable Sparsity in DNN Weight Pruning for Real-time Execution "
         "on Mobile Devices",
         "Xiaolong Ma et al.", "AAAI 2020", "1909.05073", status=READY, published=_PCONV),
    Card("pattern_pruning", f"{_CALLBACKS}.sparsity.pattern_pruning.PatternPruning", "sparsity",
         "An Image Enhancing Pattern-based Sparsity for Real-time Inference on Mobile Devices",
         "Xiaolong Ma et al.", "ECCV 2020", "2001.07710", status=READY, published=_PATTERN_PRUNING),
    Card("admm_nn", f"{_CALLBACKS}.sparsity.admm_nn.ADMMNN", "sparsity",
         "Non-Structured DNN Weight Pruning – Is It Beneficial in Any Platform?",
         "Xiaolong Ma et al.", "IEEE TNNLS 2021", "1907.02124", status=READY, published=_ADMM_NN),
    Card("low_rank_winograd", f"{_CALLBACKS}.sparsity.low_rank_winograd.LowRankWinograd", "sparsity",
         "Low-Rank Winograd Transformation for 3D Convolutional Neural Networks",
         "Ziran Qin, Mingbao Lin, Weiyao Lin", "2023", "2301.11180"),
    Card("wavelet_compression", f"{_CALLBACKS}.sparsity.wavelet_compression.WaveletCompression", "sparsity",
         "Neural network compression via learnable wavelet transforms",
         "Moritz Wolter, Shaohui Lin, Angela Yao", "ICANN 2020", "2004.09569"),
    Card("rbnn", f"{_CALLBACKS}.quantization.rbnn.RBNN", "quantization",
         "Rotated Binary Neural Network",
         "Mingbao Lin et al.", "NeurIPS 2020", "2009.13055", status=READY, published=_RBNN),
    Card("siman", f"{_CALLBACKS}.quantization.siman.SiMaN", "quantization",
         "SiMaN: Sign-to-Magnitude Network Binarization",
         "Mingbao Lin et al.", "IEEE TPAMI 2023", "2102.07981", status=READY, published=_SIMAN),
    Card("pams", f"{_CALLBACKS}.quantization.pams.PAMS", "quantization",
         "PAMS: Quantized Super-Resolution via Parameterized Max Scale",
         "Huixia Li et al.", "ECCV 2020", "2011.04212", status=READY, published=_PAMS),
    Card("dgms", f"{_CALLBACKS}.quantization.dgms.DGMS", "quantization",
         "Finding the Task-Optimal Low-Bit Sub-Distribution in Deep Neural Networks",
         "Runpei Dong et al.", "ICML 2022", "2112.15139", status=READY, published=_DGMS),
    Card("qat", f"{_CALLBACKS}.quantization.qat.QAT", "quantization",
         "Learned Step Size Quantization",
         "Steven K. Esser et al.", "ICLR 2020", "1902.08153", status=READY, published=_QAT),
    Card("lts", f"{_CALLBACKS}.quantization.lts.LTS", "quantization",
         "Exploiting the Partly Scratch-off Lottery Ticket for Quantization-Aware Training",
         "Yunshan Zhong et al.", "2022", "2211.08544", status=READY, published=_LTS),
    Card("knowledge_distillation",
         f"{_CALLBACKS}.distillation.knowledge_distillation.KnowledgeDistillation", "distillation",
         "Distilling the Knowledge in a Neural Network",
         "Geoffrey Hinton, Oriol Vinyals, Jeff Dean", "2015", "1503.02531", status=READY,
         published=_KNOWLEDGE_DISTILLATION),
    Card("kcd", f"{_CALLBACKS}.distillation.kcd.KCD", "distillation",
         "Knowledge Condensation Distillation",
         "Chenxin Li et al.", "ECCV 2022", "2207.05409", status=READY, published=_KCD),
    Card("wavelet_distillation", f"{_CALLBACKS}.distillation.wavelet_distillation.WaveletDistillation",
         "distillation",
         "Wavelet Knowledge Distillation: Towards Efficient Image-to-Image Translation",
         "Linfeng Zhang et al.", "CVPR 2022", "2203.06321", status=READY, published=_WAVELET_DISTILLATION),
    Card("co_attention", f"{_CALLBACKS}.distillation.co_attention.CoAttentionDistillation", "distillation",
         "Learning Efficient GANs for Image Translation via Differentiable Masks and co-Attention "
         "Distillation",
         "Shaojie Li et al.", "IEEE TMM 2022", "2011.08382", status=READY),
    Card("variational_distillation",
         f"{_CALLBACKS}.distillation.variational_distillation.VariationalDistillation", "distillation",
         "Farewell to Mutual Information: Variational Distillation for Cross-Modal Person "
         "Re-Identification",
         "Xudong Tian et al.", "CVPR 2021", "2104.02862", status=READY),
    Card("cross_modal_reid", f"{_MODULES}.reid.cross_modal_reid.CrossModalReID", "distillation",
         "Farewell to Mutual Information: Variational Distillation for Cross-Modal Person "
         "Re-Identification",
         "Xudong Tian et al.", "CVPR 2021", "2104.02862", status=READY, published=_CROSS_MODAL_REID),
    Card("ffsd", f"{_MODULES}.distillation.ffsd.FFSD", "distillation",
         "Distilling a Powerful Student Model via Online Knowledge Distillation",
         "Shaojie Li et al.", "IEEE TNNLS 2022", "2103.14473", status=READY, published=_FFSD),
    Card("online_distillation", f"{_MODULES}.distillation.online_distillation.OnlineDistillation",
         "distillation",
         "Training convolutional neural networks with cheap convolutions and online distillation",
         "Jiao Xie et al.", "2019", "1909.13063", status=READY, also=("convert_to_cheap",),
         published=_ONLINE_DISTILLATION),
    Card("cycle_gan", f"{_MODULES}.translation.cycle_gan.CycleGAN", "translation",
         "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks",
         "Jun-Yan Zhu et al.", "ICCV 2017", "1703.10593", status=READY, published=_CYCLE_GAN),
    Card("pix2pix", f"{_MODULES}.translation.pix2pix.Pix2Pix", "translation",
         "Image-to-Image Translation with Conditional Adversarial Networks",
         "Phillip Isola et al.", "CVPR 2017", "1611.07004", status=READY, published=_PIX2PIX),
    Card("dcd", f"{_MODULES}.translation.dcd.DCDCycleGAN", "distillation",
         "Discriminator-Cooperated Feature Map Distillation for GAN Compression",
         "Tie Hu et al.", "CVPR 2023", "2212.14169", status=READY, also=("DCDPix2Pix",), published=_DCD),
    Card("crd", f"{_MODULES}.translation.crd.CRDPix2Pix", "distillation",
         "Exploring Content Relationships for Distilling Efficient GANs",
         "Lizhou You et al.", "2022", "2212.11091", status=READY, also=("CRDCycleGAN",), published=_CRD),
    Card("hisd", f"{_MODULES}.translation.hisd.HiSD", "translation",
         "Image-to-image Translation via Hierarchical Style Disentanglement",
         "Xinyang Li et al.", "CVPR 2021", "2103.01456"),
    Card("hqss", f"{_MODULES}.shadow.hqss.HQSS", "shadow",
         "Shadow Removal by High-Quality Shadow Synthesis",
         "Yunshan Zhong et al.", "2022", "2212.04108"),
    Card("lab_net", f"{_MODULES}.shadow.lab_net.LABNet", "shadow",
         "LAB-Net: LAB Color-Space Oriented Lightweight Network for Shadow Removal",
         "Hong Yang et al.", "2022", "2208.13039"),
    Card("dlct", f"{_MODULES}.captioning.dlct.DLCT", "captioning",
         "Dual-Level Collaborative Transformer for Image Captioning",
         "Yunpeng Luo et al.", "AAAI 2021", "2101.06462"),
    Card("get", f"{_MODULES}.captioning.get.GET", "captioning",
         "Improving Image Captioning by Leveraging Intra- and Inter-layer Global Representation in "
         "Transformer Network",
         "Jiayi Ji et al.", "AAAI 2021", "2012.07061"),
    Card("supervit", f"{_MODULES}.transformers.supervit.SuperViT", "transformers",
         "Super Vision Transformer",
         "Mingbao Lin et al.", "IJCV 2023", "2205.11397"),
    Card("smmix", f"{_MODULES}.transformers.smmix.SMMix", "transformers",
         "SMMix: Self-Motivated Image Mixing for Vision Transformers",
         "Mengzhao Chen et al.", "ICCV 2023", "2212.12977"),
    Card("multi_glimpse", f"{_MODULES}.glimpse.multi_glimpse.MultiGlimpse", "glimpse",
         "Multi-Glimpse Network: A Robust and Efficient Classification Architecture based on "
         "Recurrent Downsampled Attention",
         "Sia Huat Tan, Runpei Dong, Kaisheng Ma", "BMVC 2021", "2111.02018"),
    Card("hmoh", f"{_MODULES}.hashing.hmoh.HMOH", "hashing",
         "Hadamard Matrix Guided Online Hashing",
         "Mingbao Lin et al.", "IJCV 2020", "1905.04454"),
    Card("sdoh", f"{_MODULES}.hashing.sdoh.SDOH", "hashing",
         "Supervised Online Hashing via Similarity Distribution Learning",
         "Mingbao Lin et al.", "2019", "1905.13382"),
    Card("fcoh", f"{_MODULES}.hashing.fcoh.FCOH", "hashing",
         "Fast Class-wise Updating for Online Hashing",
         "Mingbao Lin et al.", "IEEE TPAMI 2022", "2012.00318"),
    Card("hcdh", f"{_MODULES}.hashing.hcdh.HCDH", "hashing",
         "Hadamard Codebook Based Deep Hashing",
         "Shen Chen et al.", "2019", "1910.09182"),
    Card("afec", f"{_CALLBACKS}.training.afec.AFEC", "training",
         "AFEC: Active Forgetting of Negative Transfer in Continual Learning",
         "Liyuan Wang et al.", "NeurIPS 2021", "2110.12187", also=("EWC", "MAS", "SI", "RWalk")),
    Card("frequency_filters", f"{_CALLBACKS}.training.frequency_filters.FrequencyFilters", "training",
         "Exploring Frequency Domain Interpretation of Convolutional Neural Networks",
         "Zhongfan Jia, Chenglong Bao, Kaisheng Ma", "2019", "1911.12044"),
    Card("calibrator", f"{_MODULES}.adaptation.calibrator.Calibrator", "adaptation",
         "Light-weight Calibrator: A Separable Component for Unsupervised Domain Adaptation",
         "Shaokai Ye et al.", "CVPR 2020", "1911.12796"),
    Card("topk_comm", "lightning_compress.distributed.topk.TopKState", "distributed",
         "Towards Scalable Distributed Training of Deep Learning on Public Cloud Clusters",
         "Shaohuai Shi et al.", "MLSys 2021", "2010.10458",
         also=("SparseDDPStrategy", "LARS", "CachedDataset")),
)
# fmt: on
