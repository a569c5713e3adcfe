"""The images of the condensed data set: those that went are blended into those that stay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import Dataset, Subset
from torchvision.datasets import VisionDataset

from lightning_compress.callbacks.distillation.kcd.condensation import blend, shares
from lightning_compress.core.training_samples import read

Blends = Sequence[tuple[Tensor, Tensor]]


def blended(dataset: Dataset, blends: Blends, low: float) -> Dataset:
    """The data set after the blends of all stages, one after the other; the given one stays as it is.

    Where the stored bytes can be reached (`ImageArrays`, torchvision's data sets that lie in memory, and subsets of
    them) they are blended, as the authors do, before all augmentation. Else the tensors that the data set gives are.

    Args:
        dataset: with indices.
        blends: (tail, lost) of each stage.
        low: the least share of itself that a blended image keeps.
    """
    if not blends:
        return dataset
    pixels = stored_pixels(dataset, torch.arange(len(dataset)))  # type: ignore[arg-type]
    if pixels is None:
        return BlendedDataset(dataset, blends, low)
    for tail, lost in blends:
        pixels[tail] = blend(pixels[tail], pixels[lost], shares(len(tail), low))
    return with_pixels(dataset, pixels)


def stored_pixels(dataset: Any, indices: Tensor) -> Tensor | None:
    """A copy of the bytes that a data set holds of some of its images; None if they cannot be had.

    Args:
        dataset: any.
        indices: of the images, (n,).

    Returns:
        (n, ...), uint8.
    """
    if isinstance(dataset, Subset):
        chosen = torch.as_tensor(dataset.indices)
        once = len(chosen.unique()) == len(chosen)  # or a blend would change two samples
        return stored_pixels(dataset.dataset, chosen[indices]) if once else None
    if hasattr(dataset, "with_pixels"):
        return dataset.pixels(indices)
    data = getattr(dataset, "data", None)
    if isinstance(dataset, VisionDataset) and isinstance(data, (Tensor, np.ndarray)) and len(data) == len(dataset):
        data = torch.as_tensor(data)
        return data[indices] if data.dtype == torch.uint8 else None
    return None


def with_pixels(dataset: Any, pixels: Tensor) -> Dataset:
    """A data set like the given one over other bytes, (N, ...), of all its images."""
    if hasattr(dataset, "with_pixels"):
        return dataset.with_pixels(pixels)
    other = copy.copy(dataset)
    if isinstance(dataset, Subset):
        whole = stored_pixels(dataset.dataset, torch.arange(len(dataset.dataset)))  # type: ignore[arg-type]
        assert whole is not None
        whole[torch.as_tensor(dataset.indices)] = pixels
        other.dataset = with_pixels(dataset.dataset, whole)
    else:
        other.data = pixels if isinstance(dataset.data, Tensor) else pixels.numpy()
    return other


class BlendedDataset(Dataset):
    """Blends what a data set gives at each access: for images that are read from files.

    Every image is augmented by itself before it is blended. A blend of normalised images is the normalised blend.

    Args:
        base: gives samples with a tensor in them; of several, the image is the one with most dimensions.
        blends: (tail, lost) of each stage.
        low: the least share of itself that a blended image keeps.
    """

    def __init__(self, base: Dataset, blends: Blends, low: float) -> None:
        self.base = base
        self.stages = [  # what is blended -> (with what, its own share)
            dict(zip(tail.tolist(), zip(lost.tolist(), shares(len(tail), low).tolist(), strict=True), strict=True))
            for tail, lost in blends
        ]

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Samples; an index past the end means a later epoch, and stays one for all images of a blend."""
        count = len(self)
        recipes = [self.recipe(index % count, len(self.stages)) for index in indices]
        first = [index - index % count for index in indices]
        needed = [start + source for start, recipe in zip(first, recipes, strict=True) for source in recipe]
        samples = iter(read(self.base, needed))
        return [_blend_samples(list(islice(samples, len(recipe))), list(recipe.values())) for recipe in recipes]

    def recipe(self, index: int, stage: int) -> dict[int, float]:
        """What an image is made of after so many stages: samples of the data set, itself first, and their shares."""
        for earlier in reversed(range(stage)):
            if index in self.stages[earlier]:
                lost, share = self.stages[earlier][index]
                made = {i: share * s for i, s in self.recipe(index, earlier).items()}
                for i, s in self.recipe(lost, earlier).items():
                    made[i] = made.get(i, 0.0) + (1 - share) * s
                return {i: s for i, s in made.items() if s > 0}
        return {index: 1.0}


def check_images(dataset: Dataset) -> None:
    """Something that can be blended.

    Raises:
        MisconfigurationException: the data set gives no such images.
    """
    if stored_pixels(dataset, torch.tensor([0])) is not None:
        return
    with isolate_rng(include_cuda=False):
        sample = dataset[0]
    leaves, _ = tree_flatten(sample)
    place = _image(leaves)
    if place is None:
        kinds = ", ".join(str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves)
        raise MisconfigurationException(
            f"KCD(mix=True) blends images, and {type(dataset).__name__} gives none that it can blend, but {kinds}. "
            f"Let the data set give tensors of floats or bytes, or take mix=False."
        )


def _image(leaves: list[Any]) -> int | None:
    """Which part of a sample is the image: the first tensor of most dimensions, if it holds floats or bytes."""
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    place = max(tensors, key=lambda i: leaves[i].ndim, default=None)
    if place is None or not leaves[place].ndim:
        return None
    return place if leaves[place].is_floating_point() or leaves[place].dtype == torch.uint8 else None


def _blend_samples(samples: list[Any], parts: list[float]) -> Any:
    """The first sample, its image blended with those of the others."""
    if len(samples) == 1:
        return samples[0]
    leaves, spec = tree_flatten(samples[0])
    place = _image(leaves)
    assert place is not None
    images = [tree_flatten(sample)[0][place] for sample in samples]
    if any(image.shape != images[0].shape for image in images):
        sizes = ", ".join(str(tuple(image.shape)) for image in images)
        raise ValueError(
            f"KCD(mix=True) blends images of one size, and the data set gives {sizes}. Resize or crop them there, or "
            f"take mix=False."
        )
    stack = torch.stack(images).float()
    made = torch.tensor(parts).view(-1, *[1] * images[0].ndim).mul(stack).sum(0)
    leaves[place] = made.to(images[0].dtype)
    return tree_unflatten(leaves, spec)
