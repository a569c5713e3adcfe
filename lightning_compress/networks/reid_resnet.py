"""Networks that turn a photograph of a person into features, without a classifier: trunks of re-identification.

`ReIDResNet` is the trunk of Tian et al., "Farewell to Mutual Information: Variational Distillation for Cross-Modal
Person Re-Identification", CVPR 2021, arXiv:2104.02862: ResNet-50 (He et al., arXiv:1512.03385) whose last stage keeps
the resolution, with self-attention over channels in front of its stages 2, 3 and 4:

    E = X X^T,   A = softmax(max(E) - E),   Y = gamma A X + X,   gamma = 0 at the start,

for X the feature map of one image as a matrix (channels, pixels), the maximum taken in each row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from lightning_compress.core.weights import put_weights, read_weights


def channel_attention(energy: Tensor) -> Tensor:
    """How much every channel listens to the others: (..., C, C) inner products to rows that sum to 1.

    The channel most alike gets the smallest share: what is added is what a channel does not have itself.

    >>> channel_attention(torch.tensor([[0.0, 1000.0]])).tolist()
    [[1.0, 0.0]]
    """
    return (energy.amax(-1, keepdim=True) - energy).softmax(-1)


class ChannelAttention(nn.Module):
    """Adds to every channel of (N, C, H, W) a learnt share of the others; at the start it changes nothing.

    Inner products over thousands of pixels are too large for half precision: they are taken in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._attend(x)
        return self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        channels = x.float().flatten(2)
        mixed = channel_attention(channels @ channels.mT) @ channels
        return (self.gamma * mixed + channels).view_as(x).to(x.dtype)


class ReIDResNet(ResNet):
    """ResNet-50 from images, (N, 3, H, W), to feature maps, (N, 2048, H / 16, W / 16); 256x128 in the paper.

    Keys of the state dict are torchvision's; ``attention2`` to ``attention4`` are new, ``fc`` is not there.
    """

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])
        del self.fc, self.avgpool
        self.layer4[0].conv2.stride = self.layer4[0].downsample[0].stride = (1, 1)
        self.attention2, self.attention3, self.attention4 = (ChannelAttention() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.attention2(self.layer1(x)))
        x = self.layer3(self.attention3(x))
        return self.layer4(self.attention4(x))


class ReIDSmall(nn.Module):
    """A trunk of the same kind for small images: a 3x3 convolution for each width, all but the first with stride 2.

    Channel attention stands in front of every convolution but the first. The last one has stride 1, as above.

    Args:
        widths: outputs of the convolutions.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        last, layers = len(widths) - 1, nn.ModuleList()
        for i, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
            layers += [ChannelAttention()] * (i > 0)
            layers += [
                nn.Conv2d(before, width, 3, stride=2 if 0 < i < last else 1, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def reid_resnet50() -> ReIDResNet:
    """`ReIDResNet`: 23,508,035 parameters, 4.86 billion MACs (256x128)."""
    return ReIDResNet()


def reid_small(**kwargs) -> ReIDSmall:
    """`ReIDSmall`: 23,698 parameters. ``kwargs``: see there."""
    return ReIDSmall(**kwargs)


def load_trunk(network: nn.Module, path: str | os.PathLike) -> None:
    """Copy the weights of a classifier into a trunk; its last layer, ``fc``, is left out, attention stays as it is.

    Torchvision's weights of ResNet-50 fit `ReIDResNet`.

    Args:
        network: receives the weights in place.
        path: file with a state dict, see `lightning_compress.networks.load_weights`.

    Raises:
        ValueError: see there.
    """
    own = {key: value for key, value in network.state_dict().items() if key.endswith("gamma")}
    given = {key: value for key, value in read_weights(path).items() if not key.startswith("fc.")}
    put_weights(network, {**own, **given}, f"weights: {os.fspath(path)!r}")
