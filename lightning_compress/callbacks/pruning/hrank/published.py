"""What HRank's authors did to each of their networks: which number of a list hits which layers, where the maps
of a layer are read, and how the paper counts what is left.

Networks known here: CIFAR ResNets, VGG, DenseNet and GoogLeNet of `lightning_compress.networks`, and torchvision's
ResNets of bottlenecks. All names are relative to the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from lightning_compress.callbacks.pruning.hrank.ranks import kept_width
from lightning_compress.core.profile import Profile
from lightning_compress.networks import CIFARVGG, CIFARDenseNet, CIFARGoogLeNet, CIFARResNet

Layout = Literal["original", "plus"]
INCEPTIONS = ("a3", "b3", "a4", "b4", "c4", "d4", "e4", "a5", "b5")
ALL = slice(None)

# network -> layout -> (pruning_ratio, parameters, MACs) of the authors' tables. "original" is counted by
# `out_only`; "plus" is every learnable parameter, and `Profile.paper_macs` of the network that is left.
PUBLISHED: dict[str, dict[Layout, list[tuple[str, int, int]]]] = {
    "resnet56": {
        "original": [("[0.1]+[0.6]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1,0.4]*4", 489_359, 62_715_530)],
        "plus": [
            ("[0.0]+[0.18]*29", 660_157, 90_350_000),
            ("[0.0]+[0.15]*2+[0.4]*27", 485_413, 65_935_872),
            ("[0.0]+[0.4]*2+[0.5]*9+[0.6]*9+[0.7]*9", 240_793, 34_780_000),
        ],
    },
}


class Tap(NamedTuple):
    """Where the maps of a layer are read.

    Attributes:
        module: name of the module whose output is taken.
        channels: which of its channels are the layer's.
        relu: whether a ReLU must still be applied, since the module's own is shared or functional.
    """

    module: str
    channels: slice = ALL
    relu: bool = False
