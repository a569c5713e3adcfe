"""VGG for small images: the 3x3 convolutions of VGG-8 to VGG-19 with batch norm and a small classifier.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
arXiv:1409.1556; the variants for CIFAR that papers on pruning and on distillation use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

# Widths of the groups of convolutions; a pooling layer follows each group. The two small ones have four, for their
# fourth and fifth stage see maps of one size.
VGG8 = ((64,), (128,), (256,), (512, 512))
VGG13 = ((64, 64), (128, 128), (256, 256), (512,) * 4)
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG19 = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class CIFARVGG(nn.Module):
    """Groups of 3x3 convolutions with batch norm and ReLU, each followed by a pooling that halves the map.

    Args:
        groups: widths of the convolutions, group by group.
        num_classes: outputs of the last layer.
        in_channels: channels of the images.
        classifier: ``"hidden"`` is linear, batch norm, ReLU, linear (VGG-16 of HRank and GAL); ``"linear"``
            is one linear layer (ABCPruner, White-Box, Architecture Decoupling, Lottery Jackpots).
        last_pool: pooling after the last group; ``"avg"`` averages the whole map, ``"max"`` is a fifth 2x2
            max-pool (White-Box, Lottery Jackpots). Both end at 1x1 for 32x32 images.
        bias: whether the convolutions have a bias.

    Raises:
        ValueError: if ``classifier`` or ``last_pool`` are none of the above.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]] = VGG16,
        num_classes: int = 10,
        in_channels: int = 3,
        classifier: str = "hidden",
        last_pool: str = "avg",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if classifier not in ("hidden", "linear"):
            raise ValueError(f"classifier must be 'hidden' or 'linear', got {classifier!r}.")
        if last_pool not in ("avg", "max"):
            raise ValueError(f"last_pool must be 'avg' or 'max', got {last_pool!r}.")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        number = 0
        for group, widths in enumerate(groups, 1):
            for width in widths:
                number += 1
                layers[f"conv{number}"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=bias)
                layers[f"bn{number}"] = nn.BatchNorm2d(width)
                layers[f"relu{number}"] = nn.ReLU()
                in_channels = width
            average = group == len(groups) and last_pool == "avg"
            layers[f"pool{group}"] = nn.AdaptiveAvgPool2d(1) if average else nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        head: OrderedDict[str, nn.Module] = OrderedDict()
        if classifier == "hidden":
            head["fc1"] = nn.Linear(in_channels, 512)
            head["bn1"] = nn.BatchNorm1d(512)
            head["relu1"] = nn.ReLU()
            head["fc2"] = nn.Linear(512, num_classes)
        else:
            head["fc"] = nn.Linear(in_channels, num_classes)
        self.classifier = nn.Sequential(head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, 32, 32)``."""
        return self.classifier(self.features(x).flatten(1))


def vgg8_cifar(num_classes: int = 10, in_channels: int = 3) -> CIFARVGG:
    """5 convolutions: 3,918,858 parameters, 96.1M MACs (32x32); students of the distillation papers."""
    return CIFARVGG(VGG8, num_classes, in_channels, "linear")


def vgg13_cifar(num_classes: int = 10, in_channels: int = 3) -> CIFARVGG:
    """10 convolutions: 9,416,010 parameters, 284.9M MACs (32x32); teachers of the distillation papers."""
    return CIFARVGG(VGG13, num_classes, in_channels, "linear")


def vgg16_cifar(
    num_classes: int = 10,
    in_channels: int = 3,
    classifier: str = "hidden",
    last_pool: str = "avg",
    bias: bool = True,
) -> CIFARVGG:
    """13 convolutions: 14,991,946 parameters, 313.5M MACs (32x32). Arguments: see :class:`CIFARVGG`."""
    return CIFARVGG(VGG16, num_classes, in_channels, classifier, last_pool, bias)


def vgg19_cifar(
    num_classes: int = 10,
    in_channels: int = 3,
    classifier: str = "linear",
    last_pool: str = "avg",
    bias: bool = True,
) -> CIFARVGG:
    """16 convolutions: 20,040,522 parameters, 398.1M MACs (32x32). Arguments: see :class:`CIFARVGG`."""
    return CIFARVGG(VGG19, num_classes, in_channels, classifier, last_pool, bias)
