"""RDN: enlarge photographs with dense blocks whose outputs are all fused at the end.

Zhang, Tian, Kong, Zhong, Fu, "Residual Dense Network for Image Super-Resolution", CVPR 2018, arXiv:1802.08797.
Layers are named as in the authors' files, so these load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.core.quant.points import QuantizationPoint
from lightning_compress.networks.upsampler import check_scale, conv3x3, upsampler


class DenseLayer(nn.Module):
    """Append ``growth`` channels, ``relu(conv(x))``, to the input.

    Args:
        in_channels: channels of the input.
        growth: channels that are added.
        point: where the layer's input is quantised; None where it already is.
    """

    def __init__(self, in_channels: int, growth: int, point: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv3x3(in_channels, growth), nn.ReLU())
        self.dense_input = point

    def forward(self, x: Tensor) -> Tensor:
        if self.dense_input is not None:
            x = self.dense_input(x)
        return torch.cat((x, self.conv(x)), 1)


class ResidualDenseBlock(nn.Module):
    """Dense layers, fused by a 1x1 convolution and added to the input, with PAMS's points (arXiv:2011.04212).

    Args:
        features: channels of input and output.
        layers: dense layers.
        growth: channels that each adds.
    """

    def __init__(self, features: int, layers: int, growth: int) -> None:
        super().__init__()
        self.block_input = QuantizationPoint(feeds=["convs.0.conv.0"])  # also what the shortcut adds
        self.convs = nn.Sequential(
            *(
                # the first has the block's
                DenseLayer(features + i * growth, growth, QuantizationPoint(feeds=["conv.0"]) if i else None)
                for i in range(layers)
            )
        )
        self.fusion_input = QuantizationPoint(feeds=["LFF"])
        self.LFF = nn.Conv2d(features + layers * growth, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_input(x)
        return self.LFF(self.fusion_input(self.convs(x))) + x


class RDN(nn.Module):
    """Images (N, channels, H, W) in 0..255 to enlarged ones, (N, channels, scale H, scale W), not clamped.

    Args:
        scale: 2, 3, 4 or 8.
        blocks: dense blocks, D in the paper.
        layers: dense layers of each, C.
        growth: channels that a dense layer adds, G.
        features: channels between blocks, G0.
        channels: of the images.

    Attributes:
        quantizable: globs on the layers that compress well: dense blocks and their fusion; the first two convolutions
            and the upsampler are left.
        feature_layer: the layer whose input holds the deep features.

    Raises:
        ValueError: a scale that is none of these.
    """

    quantizable = ("RDBs.*", "GFF.*")
    feature_layer = "UPNet"

    def __init__(
        self,
        scale: int = 4,
        blocks: int = 16,
        layers: int = 8,
        growth: int = 64,
        features: int = 64,
        channels: int = 3,
    ) -> None:
        super().__init__()
        check_scale(scale)
        self.scale = scale
        self.SFENet1 = conv3x3(channels, features)
        self.SFENet2 = conv3x3(features, features)
        self.RDBs = nn.ModuleList(ResidualDenseBlock(features, layers, growth) for _ in range(blocks))
        self.fusion_input = QuantizationPoint(feeds=["GFF.0"])
        self.GFF = nn.Sequential(nn.Conv2d(blocks * features, features, 1), conv3x3(features, features))
        self.fused = QuantizationPoint("integer", feeds=["GFF.1"])
        self.UPNet = nn.Sequential(*upsampler(scale, features), conv3x3(features, channels))

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.SFENet1(x)
        x = self.SFENet2(shallow)
        outputs = []
        for block in self.RDBs:
            x = block(x)
            outputs.append(x)
        fuse, smooth = self.GFF
        x = smooth(self.fused(fuse(self.fusion_input(torch.cat(outputs, 1)))))
        return self.UPNet(x + shallow)


def rdn_b(scale: int = 4) -> RDN:
    """The paper's D=16, C=8, G=64: 22,271,107 parameters at x4, 22,123,395 at x2. Arguments: see :class:`RDN`."""
    return RDN(scale)


def rdn_a(scale: int = 4) -> RDN:
    """The paper's D=20, C=6, G=32, a quarter of :func:`rdn_b`. Arguments: see :class:`RDN`."""
    return RDN(scale, blocks=20, layers=6, growth=32)
