r"""What a teacher said about an image, kept on disk, so that it is asked only once.

An image is known by its content, not by its place in a data set: the key is a 64-bit hash of the very tensor that the
student got, so that a wrong answer cannot be given whatever loader, shuffling, augmentation or mixing made it. With
random augmentation no tensor comes twice, and the cache is of no use; with mirrored images only, it holds both sides.

    h(x) = sum_i m(x_i) w_i  mod 2^64,   x_i the bits of the i-th number, m a mixing of bits, w_i random odd numbers

Two different images of n share a key with probability n^2 / 2^65: one in 20 million for ImageNet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as int64


def fingerprints(images: Tensor) -> Tensor:
    """Hash each image: (B, ...) of any type -> (B,), int64, on the same device.

    >>> x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    >>> a, b, c = fingerprints(x)
    >>> bool(a == b), bool(a == c)
    (False, True)
    """
    bits = images.detach().contiguous().flatten(1)
    whole = bits.shape[1] * bits.element_size() % 8 == 0  # two floats at once
    bits = bits.view(torch.int64) if whole else bits.view(_INTEGERS[bits.element_size()]).long()
    bits = (bits + 1) * _GOLDEN
    bits = (bits ^ (bits >> 32)) * _GOLDEN  # numbers of few bits differ in their highest ones alone: bring these down
    bits ^= bits >> 29
    return bits.mul_(_weights(bits.shape[1]).to(bits.device)).sum(1)


@lru_cache(maxsize=4)
def _weights(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0x7EAC)
    low, high = (torch.randint(1 << 32, (length,), generator=generator) for _ in range(2))
    return (high << 32 | low) | 1


class TeacherCache:
    """Outputs of a teacher by image; read from a folder and added to it.

    Every process keeps what it has asked for, writes it at the end of an epoch as a file of its own, and reads what
    the others have written by the start of the next. What is not there yet is computed again.

    Args:
        folder: of this teacher and these outputs; made when there is something to write.
        rank: of the process.

    Attributes:
        asked: images that were looked for.
        known: those of them that were there.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.asked = self.known = 0
        self._rows: dict[int, int] = {}
        self._outputs: list[Tensor] = []  # each (capacity, ...)
        self._fresh: list[int] = []
        self._read: set[str] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, keys: Tensor) -> list[Tensor] | None:
        """The outputs for a batch of keys (B,), each (B, ...), on the keys' device; None if one image is new."""
        rows = [self._rows.get(key) for key in keys.tolist()]
        self.asked += len(rows)
        self.known += len(rows) - rows.count(None)
        if None in rows:
            return None
        chosen = torch.tensor(rows)
        return [output[chosen].to(keys.device, non_blocking=True) for output in self._outputs]

    def put(self, keys: Tensor, outputs: Sequence[Tensor]) -> None:
        """Keep the outputs (each (B, ...)) for a batch of keys (B,), unless they are there."""
        new = {key: i for i, key in enumerate(keys.tolist()) if key not in self._rows}
        if new:
            chosen = torch.tensor(list(new.values()))
            self._append(list(new), [output.detach()[chosen.to(output.device)].cpu() for output in outputs])
            self._fresh += new

    def read(self) -> None:
        """Take in the files that have come since the last time."""
        for path in sorted(self.folder.glob("*.pt")):
            if path.name in self._read:
                continue
            self._read.add(path.name)
            try:
                part = torch.load(path, weights_only=True, mmap=True)
                keys, outputs = part["keys"].tolist(), part["outputs"]
            except Exception as error:
                raise ValueError(
                    f"cache: {str(path)!r} cannot be read ({type(error).__name__}: {error}). Remove the file; what it "
                    f"held is computed again."
                ) from error
            new = [i for i, key in enumerate(keys) if key not in self._rows]
            if new:
                self._append([keys[i] for i in new], [output[torch.tensor(new)] for output in outputs])

    def write(self) -> None:
        """Add what is new to the folder, as one file that is whole or not there."""
        if not self._fresh:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = torch.tensor([self._rows[key] for key in self._fresh])
        part = {"keys": torch.tensor(self._fresh), "outputs": [output[rows] for output in self._outputs]}
        name = f"{len(self._rows):012d}-{self.rank}-{os.getpid()}.pt"
        torch.save(part, self.folder / f"{name}.tmp")
        os.replace(self.folder / f"{name}.tmp", self.folder / name)
        self._read.add(name)
        self._fresh = []

    def _append(self, keys: list[int], outputs: list[Tensor]) -> None:
        count, more = len(self._rows), len(keys)
        if not self._outputs:
            self._outputs = [output.new_empty(0, *output.shape[1:]) for output in outputs]
        if count + more > len(self._outputs[0]):  # room for twice as much, so that each row is moved twice at most
            room = max(count + more, 2 * count)
            self._outputs = [torch.cat([o[:count], o.new_empty(room - count, *o.shape[1:])]) for o in self._outputs]
        for kept, new in zip(self._outputs, outputs, strict=True):
            kept[count : count + more] = new
        self._rows.update(zip(keys, range(count, count + more), strict=True))
