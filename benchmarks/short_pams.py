"""A trained EDSR baseline with PAMS: real, and with 8 and 4 bits, rounded only and after a short training.

    LC_DATA=~/data python benchmarks/short_super_resolution.py --scale 4 --output edsr_x4.pt
    LC_DATA=~/data python benchmarks/short_pams.py edsr_x4.pt --scale 4

The weights are fine-tuned with the loss of the paper on the photographs they were trained on, and tested on Set5: PSNR
and SSIM of the luminance. "real" has seen as many further steps, without PAMS; "rounded" has none: its
ranges are the largest values of a few batches. The paper takes 30,000 steps. Not part of `run_all.py`: it takes minutes
and promises nothing.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from _alternate import machine
from lightning.pytorch import Callback, seed_everything
from short_super_resolution import DATA, trainer

from lightning_compress.callbacks import PAMS
from lightning_compress.callbacks.quantization.pams import place, quantize
from lightning_compress.datamodules import SuperResolutionFolder
from lightning_compress.modules import SuperResolution


def trained(given: argparse.Namespace) -> SuperResolution:
    return SuperResolution(
        scale=given.scale,
        weights=str(given.weights),
        optimizer=partial(torch.optim.Adam, lr=given.lr),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=given.epochs),
        channels_last=True,
    )


def rounded(module: SuperResolution, bits: int, data: SuperResolutionFolder, batches: int = 4) -> SuperResolution:
    """Quantised without training: the largest value of an average batch is the range."""
    module = copy.deepcopy(module)
    arguments = {**place(module).arguments(), "weight_bits": bits, "activation_bits": bits}
    quantize(module, **arguments, measuring={"init": "ema", "ema_decay": 0.5})
    data.setup("fit")
    with torch.no_grad():
        for low, _ in islice(data.train_dataloader(), batches):
            module.train()(low)
    return module


def test(name: str, module: SuperResolution, data: SuperResolutionFolder) -> None:
    """Print a line."""
    (found,) = trainer().test(module, data, verbose=False)
    print(f"{name:16} Set5 x{module.scale}  {found['test/psnr']:.2f} dB / {found['test/ssim']:.4f}", flush=True)


def tuned(given: argparse.Namespace, data: SuperResolutionFolder, *callbacks: Callback) -> SuperResolution:
    """After so many epochs, of the same batches for all."""
    seed_everything(given.seed, verbose=False)
    module, start = trained(given), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(
            max_epochs=given.epochs, precision="bf16-mixed", callbacks=list(callbacks), default_root_dir=folder
        )
        run.fit(module, datamodule=data)
    logged = ", ".join(f"{name} {float(value):.4g}" for name, value in run.callback_metrics.items())
    print(f"{run.global_step} steps in {time.perf_counter() - start:.0f} s, {logged}", flush=True)
    return module


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="of a trained EDSR baseline")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batches", type=int, default=15, help="in each epoch")
    parser.add_argument("--patch-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print(machine(), vars(given))
    data = SuperResolutionFolder(
        str(DATA), train=["BSDS500-train", "T91"], val=None, scale=given.scale,
        patch_size=given.patch_size, batch_size=given.batch_size, samples_per_epoch=given.batches * given.batch_size,
    )  # fmt: skip
    before = trained(given)
    test("given", before, data)
    test("real", tuned(given, data), data)
    for bits in given.bits:
        test(f"rounded, {bits} bits", rounded(before, bits, data), data)
        test(f"PAMS, {bits} bits", tuned(given, data, PAMS(bits, bits)), data)


if __name__ == "__main__":
    main()
