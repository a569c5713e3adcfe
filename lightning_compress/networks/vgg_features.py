"""What a network that knows photographs sees in an image: the feature maps by which images are compared.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, arXiv:1409.1556;
Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016,
arXiv:1603.08155.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.vgg import make_layers

from lightning_compress.core.weights import put_weights, read_weights

_TAPS = (3, 8, 15, 22)  # relu1_2, relu2_2, relu3_3, relu4_3


class VGGFeatures(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] to the maps behind relu1_2, relu2_2, relu3_3 and relu4_3 of a VGG-16.

    These have 1, 2, 4 and 8 times `width` channels, and 1/2, 1/4 and 1/8 of the image's height and width from the
    second on. Images are taken to [0, 1] and no further: the losses of image translation know no ImageNet statistics.

    Args:
        weights: file of torchvision's VGG-16, of which the classifier is not needed; nothing is downloaded. None draws
            the weights at random, for trials where no trained network is at hand: colours and textures show in such
            features, objects do not.
        width: channels of the first layer; 64 in a VGG-16, and 64 alone where there are weights.
        seed: of random weights.

    Raises:
        ValueError: the file is absent or does not fit.

    >>> [tuple(features.shape) for features in VGGFeatures(width=4)(torch.zeros(2, 3, 32, 32))]
    [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]
    """

    def __init__(self, weights: str | None = None, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width: expected 1 or more, got {width}.")
        if weights is not None and width != 64:
            raise ValueError(f"width: the weights in {weights!r} are of a VGG-16, whose width is 64, got {width}.")
        w = width
        self.features = make_layers([w, w, "M", 2 * w, 2 * w, "M", *[4 * w] * 3, "M", *[8 * w] * 3])
        if weights is None:
            generator = torch.Generator().manual_seed(seed)
            for layer in self.features:
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            return
        state = read_weights(weights)
        own = self.features.state_dict()
        within = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        put_weights(self.features, {k: v for k, v in within.items() if k in own} or state, f"weights {weights!r}")

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = (images + 1) / 2, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in _TAPS:
                maps.append(x)
        return maps
