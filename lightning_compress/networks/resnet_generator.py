"""The residual generator of CycleGAN, plain and with separable convolutions, at any width.

Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017,
arXiv:1703.10593; after Johnson, Alahi, Fei-Fei, ECCV 2016, arXiv:1603.08155. The separable one is that of Li et al.,
"GAN Compression", CVPR 2020, arXiv:2003.08936.

Layers have the indices and names of the authors' files, so these load: ReLUs at 3, 6 and 9, blocks from 10 on, with
nine of them the transposed convolutions at 19 and 22 and the last convolution at 26.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_compress.networks.gan_layers import (
    InstanceNorm2d,
    Norm,
    check_image,
    check_norm,
    check_widths,
    init_weights,
    norm_layer,
)


class SeparableConv2d(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, with an instance norm between them.

    The norm and both biases are there whatever the norm around it is.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, groups=in_channels),
            InstanceNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class GeneratorBlock(nn.Module):
    """``x + norm(conv(relu(norm(conv(x)))))``, without a ReLU after the sum, (N, C, H, W) to the same.

    In `conv_block` a plain block has its convolutions at 1 and 5, its norms at 2 and 6, its ReLU at 3. With a dropout
    layer, which separable blocks always have, convolution and norm of the second half stand one later.

    Args:
        channels: C.
        inner: channels between the two convolutions.
        norm: ``"instance"`` or ``"batch"``.
        dropout: probability, after the ReLU.
        separable: whether the convolutions are `SeparableConv2d`.
    """

    def __init__(self, channels: int, inner: int, norm: Norm, dropout: float, separable: bool) -> None:
        super().__init__()

        def conv(c_in: int, c_out: int) -> nn.Module:
            return SeparableConv2d(c_in, c_out) if separable else nn.Conv2d(c_in, c_out, 3, bias=norm == "instance")

        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            conv(channels, inner),
            norm_layer(norm, inner),
            nn.ReLU(),
            *([nn.Dropout(dropout)] if dropout or separable else []),
            nn.ReflectionPad2d(1),
            conv(inner, channels),
            norm_layer(norm, channels),
        )

    @property
    def inner(self) -> int:
        """Channels between the two convolutions."""
        first: Any = self.conv_block[1]
        last: Any = first.conv[2] if isinstance(first, SeparableConv2d) else first
        return last.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class ResNetGenerator(nn.Module):
    """Images (N, in_channels, H, W) to images (N, out_channels, H, W) in [-1, 1]; H and W are multiples of 4.

    No activation works in place, so that what a hook sees stays as it was.

    Args:
        in_channels: of the images to translate.
        out_channels: of the translations.
        ngf: channels after the first convolution; 2 ngf and 4 ngf after the two that halve the image. 64 in the papers,
            48 to 8 for students.
        blocks: residual blocks; 9 for images of 256 pixels, 6 for 128.
        norm: ``"instance"``, or ``"batch"``.
        dropout: in the blocks; 0 in CycleGAN.
        separable: whether the blocks' convolutions are separable, as on mobile devices.
        widths: channels layer by layer, instead of `ngf`: first convolution, two that halve the image, the inside of
            each block, two that double the image. A block with 0 inside is left out, and an identity keeps its place.

    Attributes:
        widths: the same list, of the layers as they are now.

    Raises:
        ValueError: an argument out of range; in `forward`, an image of another size.

    >>> sum(p.numel() for p in ResNetGenerator(ngf=16, separable=True).parameters())
    137347
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        ngf: int = 64,
        blocks: int = 9,
        norm: Norm = "instance",
        dropout: float = 0.0,
        separable: bool = False,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_norm(norm)
        for name, value in (("ngf", ngf), ("blocks", blocks)):
            if value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability below 1, got {dropout}.")
        names = ["first", "half", "quarter", *(f"block {i + 1}" for i in range(blocks)), "back to half", "back to full"]
        default = [ngf, 2 * ngf, 4 * ngf, *[4 * ngf] * blocks, 2 * ngf, ngf]
        least = [1, 1, 1, *[0] * blocks, 1, 1]
        checked = check_widths(default if widths is None else widths, names, least)
        first, half, quarter, *inner, up_half, up_full = checked
        bias = norm == "instance"

        def down(c_in: int, c_out: int) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=bias), norm_layer(norm, c_out), nn.ReLU()]

        def up(c_in: int, c_out: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(c_in, c_out, 3, 2, 1, 1, bias=bias), norm_layer(norm, c_out), nn.ReLU()]

        self.model = nn.Sequential(
            nn.ReflectionPad2d(3),
            nn.Conv2d(in_channels, first, 7, bias=bias),
            norm_layer(norm, first),
            nn.ReLU(),
            *down(first, half),
            *down(half, quarter),
            *(GeneratorBlock(quarter, m, norm, dropout, separable) if m else nn.Identity() for m in inner),
            *up(quarter, up_half),
            *up(up_half, up_full),
            nn.ReflectionPad2d(3),
            nn.Conv2d(up_full, out_channels, 7),
            nn.Tanh(),
        )
        init_weights(self)

    @property
    def widths(self) -> tuple[int, ...]:
        outside = [layer.out_channels for layer in self.model if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
        inside = [layer.inner if isinstance(layer, GeneratorBlock) else 0 for layer in [*self.model][10:-9]]
        return (*outside[:3], *inside, *outside[3:-1])

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, 4, type(self).__name__)
        return self.model(x)


def resnet_generator_macs(
    widths: Sequence[int], size: int = 256, separable: bool = False, in_channels: int = 3, out_channels: int = 3
) -> int:
    """MACs of a `ResNetGenerator` from its widths, for an image of (in_channels, size, size), as its papers count them.

    Transposed convolutions count as in `profile(..., convention="gan")`, of which this is the closed form.

    >>> resnet_generator_macs([16, 24, 48, *[24] * 9, 32, 16])
    1700265984
    """
    first, half, quarter, *inner, up_half, up_full = widths
    pixels = size * size
    if separable:
        blocks = sum(9 * quarter + 2 * quarter * m + 9 * m for m in inner if m)
    else:
        blocks = sum(18 * quarter * m for m in inner)
    full = 49 * in_channels * first + 9 * up_half * up_full + 49 * out_channels * up_full
    halved = 9 * first * half + 9 * quarter * up_half
    return pixels * full + pixels // 4 * halved + pixels // 16 * (9 * half * quarter + blocks)
