"""Three branches, each with a bottleneck, and what they make of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.distill.bottleneck import InformationBottleneck

Feature = Literal["observation", "representation"]
# Luminance of R, G, B, ITU-R BT.601.
LUMINANCE = (0.2989, 0.5870, 0.1140)


def grey(images: Tensor) -> Tensor:
    """Luminance in every channel: (N, 3, H, W) to the same shape.

    Images come normalised, so this is the luminance of what the network sees, not of the photograph.

    >>> grey(torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))[0, :, 0, 0]
    tensor([0.1815, 0.1815, 0.1815])
    """
    return (images * images.new_tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True).expand_as(images)


class Look(NamedTuple):
    """What one branch makes of a batch.

    Attributes:
        v_logits: (N, C), of the observation.
        v: the observation, (N, D).
        z_logits: (N, C), of the representation.
        z: the representation, (N, 2 z_dim).
    """

    v_logits: Tensor
    v: Tensor
    z_logits: Tensor
    z: Tensor


class Looks(NamedTuple):
    """What all branches make of a batch: I(grey), S(grey), V(x), S(x)."""

    infrared: Look
    shared_infrared: Look
    visible: Look
    shared_visible: Look


# Each look's branch, whether that sees the image in grey, and its share in cross-entropy and ranking loss.
LOOKS = {
    "infrared": ("infrared", True, 0.5),
    "shared_infrared": ("shared", True, 0.25),
    "visible": ("visible", False, 0.5),
    "shared_visible": ("shared", False, 0.25),
}


class Observer(nn.Module):
    """Images to the observation v, (N, D): a trunk, the mean over pixels, and a batch norm that does not shift.

    Args:
        backbone: images to feature maps (N, D, h, w), or to features (N, D).
        num_features: D.
    """

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.BatchNorm1d(num_features)
        self.neck.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.neck(features.mean((2, 3)) if features.ndim == 4 else features)


class Branch(nn.Module):
    """An observer, its classifier, and a bottleneck with a classifier of its own."""

    def __init__(self, observer: Observer, num_classes: int, bottleneck: InformationBottleneck) -> None:
        super().__init__()
        self.observer = observer
        self.classifier = nn.Linear(observer.neck.num_features, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        self.bottleneck = bottleneck

    def forward(self, images: Tensor) -> Look:
        v = self.observer(images)
        return Look(self.classifier(v), v, *self.bottleneck(v))

    def encoder(self, feature: Feature) -> nn.Module:
        """Images to v, or to z."""
        return self.observer if feature == "observation" else nn.Sequential(self.observer, self.bottleneck.encoder)


def embed(encoders: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor, looks: Sequence[str]) -> Tensor:
    """Put the vectors of some of `Looks` side by side, scaled to length 1: (N, 3, H, W) to (N, sum of widths).

    Args:
        encoders: of each branch, images to vectors.
        images: normalised; those of one channel are shown in three equal ones.
        looks: which, and in which order.
    """
    images = images.expand(-1, 3, -1, -1)
    in_grey = grey(images)
    vectors = [encoders[b](in_grey if greyed else images) for b, greyed, _ in (LOOKS[look] for look in looks)]
    return F.normalize(torch.cat(vectors, 1))


class Embedder(nn.Module):
    """Images to vectors of length 1 that are close for the same person: what is left to deploy.

    Args:
        encoders: of each branch.
        looks: see `embed`.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], looks: Sequence[str]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.looks = tuple(looks)

    def forward(self, images: Tensor) -> Tensor:
        return embed(dict(self.encoders.items()), images, self.looks)
