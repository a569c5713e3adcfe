"""What the generators and discriminators of image translation share: their norms, their initial weights, their checks.

Layers and initial weights are those of Isola et al. (CVPR 2017, arXiv:1611.07004) and Zhu et al. (ICCV 2017,
arXiv:1703.10593).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.select import did_you_mean

Norm = Literal["instance", "batch"]


def check_norm(norm: str) -> None:
    """Raise unless there is such a norm."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm: expected 'instance' or 'batch', got {norm!r}.{did_you_mean(norm, get_args(Norm))}")


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm without parameters and running statistics, (N, C, H, W) to the same, for any C.

    torch's own computes the same, and warns where a pruned network gives it fewer channels than it was made for.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.instance_norm(input, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """An `InstanceNorm2d`, or an ordinary batch norm.

    The convolution in front of it has a bias under the instance norm alone, as in the authors' code. That bias
    changes nothing, and its gradient is rounding noise.
    """
    return InstanceNorm2d(channels) if norm == "instance" else nn.BatchNorm2d(channels)


def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """Draw weights as the papers do, in place.

    Convolutions and linear layers from N(0, std^2), batch norms from N(1, std^2); all biases become 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, std)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, std)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def check_widths(widths: Sequence[int], names: Sequence[str], least: Sequence[int]) -> tuple[int, ...]:
    """The widths, one for each name, or an error that says which is wrong.

    Args:
        widths: what a user gave.
        names: what each stands for.
        least: the smallest number allowed for each.
    """
    if len(widths) != len(names):
        raise ValueError(f"widths: expected {len(names)} numbers ({', '.join(names)}), got {len(widths)}.")
    for width, name, smallest in zip(widths, names, least, strict=True):
        if width < smallest:
            raise ValueError(f"widths: {name} needs {smallest} channels or more, got {width}.")
    return tuple(int(width) for width in widths)


def check_image(images: Tensor, multiple: int, network: str) -> None:
    """Raise unless height and width can be halved as often as the network does."""
    height, width = images.shape[-2:]
    if height % multiple or width % multiple or not height or not width:
        raise ValueError(f"{network} takes images whose sides are multiples of {multiple}, got {height}x{width}.")
