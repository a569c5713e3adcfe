"""Photographs in folders to learn super-resolution from, in the layouts of DIV2K, Set5, Set14, B100 and Urban100."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_compress.datamodules._images import absent, image_files, open_image
from lightning_compress.datamodules._pairs import Pair, Split, SuperResolutionData, as_tensor

LAYOUTS = (
    "<folder>/*.png",
    "<name>_HR/*.png with <name>_LR_bicubic/X<scale>/*x<scale>.png",
    "<folder>/HR/*.png with <folder>/LR_bicubic/X<scale>/*x<scale>.png",
    "<folder>/image_SRF_<scale>/*_HR.png with *_LR.png",
)


def find_files(folder: Path, scale: int) -> list[tuple[Path, Path | None]]:
    """The large images of a folder, sorted, each with the file of its small one if there is one; see `LAYOUTS`."""
    paired = folder / f"image_SRF_{scale}"
    if paired.is_dir():
        return [
            (high, _existing(high.with_name(f"{high.stem.removesuffix('_HR')}_LR{high.suffix}")))
            for high in image_files(paired)
            if high.stem.endswith("_HR")
        ]
    if (folder / "HR").is_dir():
        highs, lows = folder / "HR", folder / "LR_bicubic" / f"X{scale}"
    else:
        highs, lows = folder, folder.with_name(f"{folder.name.removesuffix('_HR')}_LR_bicubic") / f"X{scale}"
    return [(high, _existing(lows / f"{high.stem}x{scale}{high.suffix}")) for high in image_files(highs)]


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


class SuperResolutionFolder(SuperResolutionData):
    """Photographs in folders; the small images are read where they lie beside, else made by `bicubic`.

    A folder is one of these, below ``root``::

        DIV2K_train_HR/0001.png            DIV2K_train_LR_bicubic/X4/0001x4.png
        Set5/HR/baby.png                   Set5/LR_bicubic/X4/babyx4.png
        Set5/image_SRF_4/img_001_SRF_4_HR.png, img_001_SRF_4_LR.png
        photographs/anything.jpg

    Grey images become colour images of three equal channels. All images are held decoded, in main memory or in
    ``cache``. The defaults are those of Lim et al., arXiv:1707.02921, for x4.

    Args:
        root: folder that the others are relative to.
        train: folder of the images to train on, or several.
        val: folder of the images to validate on; None holds some of the training images out.
        test: folders of the test sets, in an order of your choice; they are reported one by one.
        scale: how much larger the large images are.
        patch_size: height and width of the large patches; a multiple of ``scale``.
        batch_size: patches per step and process.
        samples_per_epoch: patches in an epoch, over all processes.
        val_size: images to validate on: the first of ``val``, or the number that is held out.
        num_workers: loader processes.
        seed: of what is held out, order, places and augmentation.
        augment: whether to mirror and transpose the patches.
        use_lr_files: False makes small images even where there are files of them.
        cache: folder to keep decoded images in, to be mapped into memory instead of being held there: for DIV2K 7 GB,
            which processes then share and which are there at once in the next run.
    """

    def __init__(
        self,
        root: str = "data",
        train: str | Sequence[str] = "DIV2K_train_HR",
        val: str | None = "DIV2K_valid_HR",
        test: str | Sequence[str] = "Set5",
        scale: int = 4,
        patch_size: int = 192,
        batch_size: int = 16,
        samples_per_epoch: int = 16_000,
        val_size: int = 10,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool = True,
        use_lr_files: bool = True,
        cache: str | None = None,
    ) -> None:
        super().__init__(scale, patch_size, batch_size, samples_per_epoch, num_workers, seed, augment)
        if val_size < 1:
            raise ValueError(f"val_size: expected 1 or more, got {val_size}.")
        self.root = Path(root)
        self.train = [train] if isinstance(train, str) else list(train)
        self.val = val
        self.test = [test] if isinstance(test, str) else list(test)
        self.test_names = tuple(Path(folder).name for folder in self.test)
        if len(set(self.test_names)) < len(self.test):
            raise ValueError(f"test: expected folders of different names, got {', '.join(self.test)}.")
        self.val_size = val_size
        self.use_lr_files = use_lr_files
        self.cache = None if cache is None else Path(cache)

    def read(self, split: Split) -> Mapping[str, Sequence[Pair]]:
        if split == "test":
            files = {name: self._files(folder) for name, folder in zip(self.test_names, self.test, strict=True)}
        elif split == "val" and self.val is not None:
            files = {"val": self._files(self.val)[: self.val_size]}
        else:
            found = [file for folder in self.train for file in self._files(folder)]
            held_out = self._held_out(len(found)) if self.val is None else set()
            files = {split: [file for i, file in enumerate(found) if (i in held_out) == (split == "val")]}
        # decoding releases the interpreter
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return {name: list(threads.map(self._pair, pairs)) for name, pairs in files.items()}

    def _files(self, folder: str) -> list[tuple[Path, Path | None]]:
        files = find_files(self.root / folder, self.scale)
        if not files:
            raise absent(type(self).__name__, self.root / folder, LAYOUTS)
        return files

    def _held_out(self, count: int) -> set[int]:
        if self.val_size >= count:
            raise ValueError(f"val_size: {self.val_size} would leave none of {count} training images.")
        return set(np.random.default_rng(self.seed).permutation(count)[: self.val_size].tolist())

    def _pair(self, files: tuple[Path, Path | None]) -> Pair:
        high_file, low_file = files
        high = self._decoded(high_file, "high", partial(_read, high_file))
        if low_file is not None and self.use_lr_files:
            low = self._decoded(low_file, "low", partial(_read, low_file))
        else:
            low = self._decoded(high_file, f"x{self.scale}", lambda: Pair.of("", high, self.scale).low)
        height, width = (self.scale * length for length in low.shape[1:])
        if not (height <= high.shape[1] < height + self.scale and width <= high.shape[2] < width + self.scale):
            raise MisconfigurationException(
                f"scale: {low_file} has {low.shape[2]}x{low.shape[1]} pixels, which is not 1/{self.scale} of "
                f"{high_file} with {high.shape[2]}x{high.shape[1]}."
            )
        return Pair(str(high_file), low, high[:, :height, :width])

    def _decoded(self, file: Path, kind: str, decode: Callable[[], Tensor]) -> Tensor:
        """What `decode` makes of the file; with a cache, what it made of it before, mapped into memory."""
        if self.cache is None:
            return decode()
        digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
        kept = self.cache / f"{file.stem}_{kind}_{digest}.npy"
        if not kept.exists() or kept.stat().st_mtime < file.stat().st_mtime:
            self.cache.mkdir(parents=True, exist_ok=True)
            partial_file = kept.with_suffix(f".{os.getpid()}.tmp")  # other processes see a whole file or none
            with partial_file.open("wb") as stream:
                np.save(stream, decode().numpy())
            partial_file.replace(kept)
        return torch.from_numpy(np.load(kept, mmap_mode="c"))  # "c": torch warns about arrays that cannot be written


def _read(file: Path) -> Tensor:
    """(3, H, W), uint8."""
    return as_tensor(np.array(open_image(file)))  # asarray would not be writable
