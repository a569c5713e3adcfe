"""EDSR's baseline after a short training on real photographs, against bicubic interpolation.

    LC_DATA=~/data python benchmarks/short_super_resolution.py --scale 4 --output edsr_x4.pt

Trains on the folders BSDS500-train and T91 in ``$LC_DATA/super-resolution`` with one cycle of the learning rate, in
bfloat16, and tests on Set5 and Set14: PSNR and SSIM of the luminance. The paper takes 300,000 steps on DIV2K. The file
holds the network's weights, for `SuperResolution(weights=...)`. Not part of `run_all.py`: it takes minutes and promises
nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _alternate import machine
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from lightning_compress.datamodules import SuperResolutionFolder
from lightning_compress.datamodules.bicubic import bicubic
from lightning_compress.modules import SuperResolution

DATA = Path(os.environ.get("LC_DATA", ".")) / "super-resolution"
SETS = ("Set5", "Set14")


class Bicubic(nn.Module):
    """What every network has to beat."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return bicubic(x, (x.shape[2] * self.scale, x.shape[3] * self.scale))


def trainer(**arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, **arguments,
    )  # fmt: skip


def test(name: str, module: SuperResolution, data: SuperResolutionFolder) -> None:
    """Print a line."""
    scores = trainer().test(module, data, verbose=False)
    found = {key: value for of_one_set in scores for key, value in of_one_set.items()}
    each = (f"{s} {found[f'test/{s}/psnr']:.2f} dB / {found[f'test/{s}/ssim']:.4f}" for s in SETS)
    print(f"{name:16} x{module.scale}  {',  '.join(each)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--patch-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to leave the trained weights")
    given = parser.parse_args(arguments)
    print(machine(), vars(given))
    seed_everything(given.seed, verbose=False)
    data = SuperResolutionFolder(
        str(DATA), train=["BSDS500-train", "T91"], val=None, test=SETS, scale=given.scale,
        patch_size=given.patch_size, batch_size=given.batch_size, samples_per_epoch=given.steps * given.batch_size,
    )  # fmt: skip
    module = SuperResolution(
        scale=given.scale,
        optimizer=partial(torch.optim.Adam, lr=given.lr),
        lr_scheduler=partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=given.lr, total_steps=given.steps, pct_start=0.1
        ),
        lr_scheduler_interval="step",
        channels_last=True,
    )
    test("bicubic", SuperResolution(Bicubic(given.scale), given.scale), data)
    start = time.perf_counter()
    run = trainer(max_epochs=1, precision="bf16-mixed")
    run.fit(module, data)
    seconds = time.perf_counter() - start
    print(f"{given.steps} steps in {seconds:.0f} s, training loss {run.callback_metrics['train/loss']:.2f}")
    test("EDSR baseline", module, data)
    if given.output is not None:
        torch.save({"state_dict": module.network.state_dict()}, given.output)


if __name__ == "__main__":
    main()
