"""The U-Net generator of Pix2Pix, at any depth and width.

Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017,
arXiv:1611.07004. Layers are named as in the authors' files, one block inside the other, so these load.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_compress.networks.gan_layers import Norm, check_image, check_norm, check_widths, init_weights, norm_layer


class UNetBlock(nn.Module):
    """Halve the image, let the next block work, double it again, (N, C, H, W) to (N, C + C', H, W).

    What comes in is passed on beside what was made of it: ``[skip, up]`` along the channels. The skip is taken behind
    the leaky ReLU, as in the authors' code, where this works in place; here nothing does, so that what a hook sees
    stays as it was. The outermost block has no skip: (N, C, H, W) to (N, C', H, W).

    Args:
        layers: `model`: downwards, the next block, upwards.
        outermost: whether this block is the network.
    """

    def __init__(self, layers: Sequence[nn.Module], outermost: bool = False) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)
        self.outermost = outermost

    def forward(self, x: Tensor) -> Tensor:
        if self.outermost:
            return self.model(x)
        skip, *rest = self.model
        x = skipped = skip(x)
        for layer in rest:
            x = layer(x)
        return torch.cat([skipped, x], 1)


class UNetGenerator(nn.Module):
    """Images (N, in_channels, H, W) to images (N, out_channels, H, W) in [-1, 1]; H and W are multiples of 2^downs.

    Args:
        in_channels: of the images to translate.
        out_channels: of the translations.
        ngf: channels after the first convolution, doubled three times on the way down. 64 in the paper, 32 and 16 for
            students.
        downs: how often the image is halved; 8 for 256 pixels, 7 for 128.
        norm: ``"batch"``, or ``"instance"``.
        dropout: in the blocks next to the innermost one that have all 8 ngf channels, three with eight halvings.
            0.5 in the paper, 0 in most that compress it.
        widths: channels layer by layer, instead of `ngf`: of the `downs` convolutions on the way down, then of those on
            the way up, the innermost first, one less: the last gives `out_channels`.

    Attributes:
        widths: the same list, of the layers as they are now.

    Raises:
        ValueError: an argument out of range; in `forward`, an image of another size.

    >>> sum(p.numel() for p in UNetGenerator(ngf=16).parameters())
    3404451
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        ngf: int = 64,
        downs: int = 8,
        norm: Norm = "batch",
        dropout: float = 0.5,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_norm(norm)
        for name, value, smallest in (("ngf", ngf, 1), ("downs", downs, 2)):
            if value < smallest:
                raise ValueError(f"{name}: expected {smallest} or more, got {value}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability below 1, got {dropout}.")
        names = [*(f"down {i + 1}" for i in range(downs)), *(f"up {i + 1}" for i in range(downs - 1))]
        down = [ngf * min(2**i, 8) for i in range(downs)]
        default = [*down, *down[-2::-1]]
        checked = check_widths(default if widths is None else widths, names, [1] * len(names))
        self.downs = downs
        d, u = checked[:downs], checked[downs:]
        bias = norm == "instance"

        def convs(level: int, c_up: int, c_out: int) -> tuple[nn.Module, nn.Module]:
            """The convolutions of a level, 1 for the outermost: down to its width, and up from what is there then."""
            c_in = d[level - 2] if level > 1 else in_channels
            return (
                nn.Conv2d(c_in, d[level - 1], 4, 2, 1, bias=bias),
                nn.ConvTranspose2d(c_up, c_out, 4, 2, 1, bias=bias or level == 1),
            )

        conv, conv_up = convs(downs, d[-1], u[0])
        block = UNetBlock([nn.LeakyReLU(0.2), conv, nn.ReLU(), conv_up, norm_layer(norm, u[0])])
        for level in range(downs - 1, 1, -1):
            k = downs - level  # the norm behind convolution k on the way up, counted from 0
            conv, conv_up = convs(level, d[level - 1] + u[k - 1], u[k])
            layers = [nn.LeakyReLU(0.2), conv, norm_layer(norm, d[level - 1]), block]
            layers += [nn.ReLU(), conv_up, norm_layer(norm, u[k])]
            if dropout and level > 4:
                layers.append(nn.Dropout(dropout))
            block = UNetBlock(layers)
        conv, conv_up = convs(1, d[0] + u[-1], out_channels)
        self.model = UNetBlock([conv, block, nn.ReLU(), conv_up, nn.Tanh()], outermost=True)
        init_weights(self)

    @property
    def widths(self) -> tuple[int, ...]:
        down = [layer.out_channels for layer in self.modules() if isinstance(layer, nn.Conv2d)]
        up = [layer.out_channels for layer in self.modules() if isinstance(layer, nn.ConvTranspose2d)]
        return (*down, *up[:-1])  # the blocks are one inside the other, so the way up is listed from the inside

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, 2**self.downs, type(self).__name__)
        return self.model(x)


def unet_generator_macs(widths: Sequence[int], size: int = 256, in_channels: int = 3, out_channels: int = 3) -> int:
    """MACs of a `UNetGenerator` from its widths, for an image of (in_channels, size, size), as its papers count them.

    Transposed convolutions count as in `profile(..., convention="gan")`, of which this is the closed form.

    >>> unet_generator_macs([10, 20, 30, 40, 40, 40, 40, 40, 40, 40, 40, 30, 20, 16, 8])
    259408896
    """
    downs = (len(widths) + 1) // 2
    d, u = widths[:downs], widths[downs:]
    pixels = size * size
    below = [d[-1], *(d[downs - k - 1] + u[k - 1] for k in range(1, downs - 1))]  # channels that convolution k gets
    way_down = sum(
        pixels // 4 ** (i + 1) * 16 * c_in * c_out for i, (c_in, c_out) in enumerate(pairwise((in_channels, *d)))
    )
    way_up = sum(pixels // 4 ** (downs - 1 - k) * 16 * below[k] * u[k] for k in range(downs - 1))
    return way_down + way_up + pixels * 16 * out_channels * (d[0] + u[-1])
