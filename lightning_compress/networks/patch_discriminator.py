"""Discriminators of Pix2Pix and CycleGAN: one judges overlapping patches, one single pixels.

Isola, Zhu, Zhou, Efros, CVPR 2017, arXiv:1611.07004; Zhu, Park, Isola, Efros, ICCV 2017, arXiv:1703.10593.
Layers have the names and indices of the authors' files, so these load.
"""

from __future__ import annotations

from torch import Tensor, nn

from lightning_compress.networks.gan_layers import Norm, check_norm, init_weights, norm_layer


class PatchDiscriminator(nn.Module):
    """PatchGAN: images (N, in_channels, H, W) to a map of logits, (N, 1, H / 8 - 2, W / 8 - 2) with three layers.

    A logit sees 70x70 pixels then. In `model`, the leaky ReLUs are at 1, 4, 7 and 10, the last convolution at 11;
    `model[:-1]` gives what compression methods compare.

    Args:
        in_channels: 3; 6 where the discriminator sees the input beside the translation, as in Pix2Pix.
        ndf: channels after the first convolution, doubled up to three times.
        layers: convolutions that halve the image.
        norm: ``"instance"`` in CycleGAN, ``"batch"`` in Pix2Pix.

    Raises:
        ValueError: an argument out of range.

    >>> sum(p.numel() for p in PatchDiscriminator(ndf=32).parameters())
    694241
    """

    def __init__(self, in_channels: int = 3, ndf: int = 64, layers: int = 3, norm: Norm = "instance") -> None:
        super().__init__()
        _check(in_channels, ndf, norm)
        if layers < 1:
            raise ValueError(f"layers: expected 1 or more, got {layers}.")
        modules: list[nn.Module] = [nn.Conv2d(in_channels, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = ndf
        for i in range(1, layers + 1):
            c_in, width = width, ndf * min(2**i, 8)
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(c_in, width, 4, stride, 1, bias=norm == "instance"),
                norm_layer(norm, width),
                nn.LeakyReLU(0.2),
            ]
        self.model = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, 1, 1))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PixelDiscriminator(nn.Module):
    """A verdict on every pixel alone: images (N, in_channels, H, W) to logits, (N, 1, H, W).

    Args:
        in_channels: see `PatchDiscriminator`.
        ndf: channels after the first convolution, doubled once.
        norm: ``"instance"`` or ``"batch"``.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, in_channels: int = 3, ndf: int = 64, norm: Norm = "instance") -> None:
        super().__init__()
        _check(in_channels, ndf, norm)
        bias = norm == "instance"
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, ndf, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=bias),
            norm_layer(norm, 2 * ndf),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * ndf, 1, 1, bias=bias),
        )
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _check(in_channels: int, ndf: int, norm: str) -> None:
    check_norm(norm)
    for name, value in (("in_channels", in_channels), ("ndf", ndf)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}.")
