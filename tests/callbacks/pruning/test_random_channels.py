"""RandomChannels draws the same channels for the same seed, and all of them equally often."""

from __future__ import annotations

from pathlib import Path

import torch
from foreign import fit, made, widths
from lightning.pytorch import LightningModule

from lightning_compress.callbacks import RandomChannels
from lightning_compress.core.surgery import attach_record


def pruned(root: Path, *seeds: int) -> LightningModule:
    module = made()
    fit(module, root, *(RandomChannels(0.5, seed=s) for s in seeds), max_epochs=1, limit_train_batches=0)
    return module


def kept(module: LightningModule) -> list[list[int]]:
    return [c[3].tolist() for step in attach_record(module).steps for c in step["cuts"] if c[0].endswith("v1.weight")]


def test_the_seed_decides(tmp_path: Path) -> None:
    assert kept(pruned(tmp_path, 1)) == kept(pruned(tmp_path, 1)) != kept(pruned(tmp_path, 2))


def test_two_seeds_prune_one_after_the_other(tmp_path: Path) -> None:
    module = pruned(tmp_path, 1, 2)
    assert list(widths(module).values()) == [2, 3, 2, 3, 2, 10]


def test_every_channel_is_kept_about_equally_often() -> None:
    class Graph:
        layers = {"layer": None}

        def width(self, name: str) -> int:
            return 8

    counts = torch.zeros(8)
    for seed in range(400):
        scores = RandomChannels(seed=seed).scores(None, None, Graph())["layer"]  # type: ignore[arg-type]
        counts[scores.argsort()[4:]] += 1
    assert counts.min() > 160  # 200 expected, standard deviation 10
    assert counts.max() < 240
