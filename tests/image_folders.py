"""Folders of small images in the layouts of the image translation datamodules, and what comes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_compress.datamodules._translation import TranslationData


def write(file: Path, width: int, height: int = 12, value: int | None = None) -> np.ndarray:
    """Write an image of noise that its path decides, or of one value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = list(f"{file.parent.name}/{file.name}".encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    Image.fromarray(pixels).save(file)
    return pixels


def paired_folder(root: Path, counts: dict[str, int], twins: bool = False) -> Path:
    """Images of 24x12 pixels; the two halves are the same for `twins`."""
    for split, count in counts.items():
        for i in range(count):
            pixels = write(root / split / f"{i}.png", 24)
            if twins:
                pixels[:, 12:] = pixels[:, :12]
                Image.fromarray(pixels).save(root / split / f"{i}.png")
    return root


def unpaired_folder(root: Path, counts: dict[str, int]) -> Path:
    """Images of one value: the how-manieth it is, from 1 for A and from 101 for B."""
    for folder, count in counts.items():
        for i in range(count):
            write(root / folder / f"{i}.png", 14, 12, value=i + (1 if folder.endswith("A") else 101))
    return root


def stored(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().long()


def batches(data: TranslationData, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)
