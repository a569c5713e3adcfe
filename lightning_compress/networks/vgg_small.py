"""VGG-small: the six convolutions on which binarisation of small images is compared."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from lightning_compress.networks.binary_resnet import Activation, activation_layer


class VGGSmall(nn.Module):
    """Six 3x3 convolutions of 128 to 512 channels, each with its norm; every second one halves the map before it.

    Lin et al., "Rotated Binary Neural Network", NeurIPS 2020, arXiv:2009.13055, and "SiMaN", arXiv:2102.07981.

    Args:
        num_classes: outputs of the last layer.
        in_channels: channels of the images, which are 32x32.
        activation: ``"hardtanh"`` (RBNN), ``"prelu"`` (SiMaN) or ``"relu"`` (DGMS, arXiv:2112.15139).
        bias: whether the convolutions have a bias, as with DGMS.

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        activation: Activation | Literal["relu"] = "hardtanh",
        bias: bool = False,
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, width in enumerate((128, 128, 256, 256, 512, 512)):
            layers[f"conv{index}"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=bias)
            if index % 2:
                layers[f"pool{index}"] = nn.MaxPool2d(2)
            layers[f"bn{index}"] = nn.BatchNorm2d(width)
            layers[f"act{index}"] = nn.ReLU() if activation == "relu" else activation_layer(activation, width)
            in_channels = width
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(512 * 4 * 4, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")  # sqrt(2 / (kh kw C_out))
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, 32, 32)``."""
        return self.fc(self.features(x).flatten(1))


def vgg_small(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    activation: Activation | Literal["relu"] = "hardtanh",
    bias: bool = False,
) -> VGGSmall:
    """4,571,136 weights to binarise and 85,386 others, 608 million MACs (32x32). See :class:`VGGSmall`."""
    return VGGSmall(num_classes, in_channels, activation, bias)
