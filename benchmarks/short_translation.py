"""A small Pix2Pix on facades by each method of compression, beside the dense one and the small one without a teacher.

    LC_DATA=~/data python benchmarks/short_translation.py --output runs/translation

From labels to photographs; with `--embedded`, from scikit-image's photographs to their edges. The dense system is
trained once and kept in the output folder, and so are the results of every setting and seed: a run that is stopped goes
on where it was. All small generators cost about the same MACs, see the same images in the same order and train as long,
DMAD's after a search of as long again. Distances are Fréchet's between random features, which compare runs with each
other and with nothing else; "l1" is the mean absolute difference from the target, images in [0, 1]; "fine" and "coarse"
are the errors of the finest and of the low band, see `BandErrors`. At the end, pictures.png: input, dense, every
setting, target. Not part of `run_all.py`: it takes long and promises nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rich
import torch
from _alternate import machine
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn

from lightning_compress.callbacks import DMAD, CoAttentionDistillation, WaveletDistillation
from lightning_compress.core.profile import profile
from lightning_compress.datamodules import PairedImages, PairedPhotographs
from lightning_compress.datamodules._translation import TranslationData
from lightning_compress.metrics import BandErrors, FrechetDistance
from lightning_compress.modules import CRDPix2Pix, DCDPix2Pix, Pix2Pix
from lightning_compress.modules.translation.online_teacher import OnlinePix2Pix
from lightning_compress.modules.translation.system import grid
from lightning_compress.networks import PatchDiscriminator, UNetGenerator, VGGFeatures
from lightning_compress.networks.unet_generator import unet_generator_macs

DATA = Path(os.environ.get("LC_DATA", "."))
WORSE_IF_HIGHER = ("frechet", "l1", "fine", "coarse")


@dataclass(frozen=True)
class Run:
    """What a setting is given.

    Attributes:
        budget: the arguments of the command line.
        seed: of this run.
        teacher: the dense system, trained; None while it is not.
    """

    budget: argparse.Namespace
    seed: int
    teacher: Pix2Pix | None = None

    def generator(self, **width: Any) -> UNetGenerator:
        return UNetGenerator(downs=self.budget.size.bit_length() - 1, dropout=0.0, **width)

    def system(self, kind: type[Pix2Pix] = Pix2Pix, *, dense: bool = False, **arguments: Any) -> Pix2Pix:
        """A system that is not trained yet, of small networks or of dense ones; its class may be another."""
        budget = self.budget
        ngf, ndf = (budget.ngf, budget.ndf) if dense else (budget.small_ngf, budget.small_ndf)
        seed_everything(self.seed, verbose=False)
        arguments = {
            "generator": self.generator(ngf=ngf),
            "discriminator": PatchDiscriminator(6, ndf=ndf, norm="batch"),
            "optimizer": partial(torch.optim.Adam, lr=budget.lr, betas=(0.5, 0.999)),
            "n_epochs": (budget.epochs + 1) // 2,
            "n_epochs_decay": budget.epochs // 2,
            "seed": self.seed,
            "input_shape": (3, budget.size, budget.size),
            **arguments,
        }
        return kind(**arguments)

    def fit(self, module: Pix2Pix, *callbacks: Callback) -> nn.Module:
        """Train, and return the generator."""
        seed_everything(self.seed, verbose=False)
        trainer = Trainer(
            max_epochs=self.budget.epochs, callbacks=list(callbacks), limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, devices=1,
            accelerator=self.budget.accelerator, precision=self.budget.precision,
            default_root_dir=Path(self.budget.output, "last"),
        )  # fmt: skip
        trainer.fit(module, images(self.budget, self.seed))
        return module.generator


def no_teacher(run: Run) -> nn.Module:
    return run.fit(run.system())


def wavelet(run: Run) -> nn.Module:
    assert run.teacher is not None
    return run.fit(run.system(), WaveletDistillation(run.teacher, alpha=run.budget.alpha))


def searched(run: Run) -> Pix2Pix:
    """A dense system that DMAD has cut to the small one's MACs, for twice the time that others train; it is kept."""
    path = Path(run.budget.output, f"searched_{run.seed}.pt")
    if not path.exists():
        system = run.system(dense=True)
        small = run.system().generator.widths
        share = unet_generator_macs(small) / unet_generator_macs(system.generator.widths)
        run.fit(system, DMAD(share, mask_weight_decay=run.budget.mask_weight_decay))
        torch.save({"widths": system.generator.widths, "system": system.cpu().state_dict()}, path)
    found = torch.load(path, weights_only=True)
    system = run.system(dense=True, generator=run.generator(widths=found["widths"]))
    names = system.state_dict()
    system.load_state_dict({name: value for name, value in found["system"].items() if name in names})
    return system


def dmad(run: Run) -> nn.Module:
    assert run.teacher is not None
    return run.fit(searched(run), CoAttentionDistillation(run.teacher, lambda_attention=10.0))


def dmad_no_teacher(run: Run) -> nn.Module:
    return run.fit(searched(run))


def beside_its_teacher(run: Run, kind: type[OnlinePix2Pix], **arguments: Any) -> nn.Module:
    """The small generator, from a dense system that is trained beside it, from scratch and as long."""
    dense, small = run.system(dense=True), run.system()
    # gram matrices are divided by the number of channels
    perceptual, style = (VGGFeatures(run.budget.vgg), 1e4) if run.budget.vgg else (VGGFeatures(width=16), 1e3)
    module = run.system(
        kind, generator=dense.generator, discriminator=dense.discriminator, student=small.generator,
        perceptual_net=perceptual, lambda_style=style, lambda_adv=1.0, **arguments,
    )  # fmt: skip
    run.fit(module)
    assert isinstance(module, OnlinePix2Pix)
    return module.student


def dcd(run: Run) -> nn.Module:
    level_two, level_three = "model.model.1", "model.model.1.model.3"
    layers = [f"{level_two}.model.2", level_two]
    if run.budget.size >= 128:  # else these maps are too small for a discriminator
        layers = [f"{level_two}.model.2", f"{level_three}.model.2", f"{level_three}.model.3", level_three]
    return beside_its_teacher(run, DCDPix2Pix, layers=layers)


def crd(run: Run) -> nn.Module:
    return beside_its_teacher(run, CRDPix2Pix)


# a method adds a function that trains with it, and returns a generator of about the small one's MACs
SETTINGS: dict[str, Callable[[Run], nn.Module]] = {
    "no teacher": no_teacher,
    "wavelet": wavelet,
    "dmad": dmad,
    "dmad, no teacher": dmad_no_teacher,
    "dcd": dcd,
    "crd": crd,
}


def images(budget: argparse.Namespace, seed: int) -> TranslationData:
    if budget.embedded:
        return PairedPhotographs(
            budget.size, budget.images or 256, "BtoA", batch_size=budget.batch, eval_batch_size=16, seed=seed
        )
    return PairedImages(
        str(DATA / "facades"), crop_size=budget.size, load_size=budget.size * 286 // 256, direction="BtoA",
        batch_size=budget.batch, eval_batch_size=16, limit_items=budget.images, num_workers=budget.workers, seed=seed,
    )  # fmt: skip


@torch.no_grad()
def scores(generator: nn.Module, budget: argparse.Namespace) -> tuple[dict[str, float], Tensor]:
    """How good its translations of the test images are, what it costs, and the first translations."""
    distance, bands, errors, first = FrechetDistance(), BandErrors(), [], None
    generator = generator.cpu().eval()
    data = images(budget, 0)
    data.setup("test")
    for labels, photographs in data.test_dataloader():
        translated = generator(labels)
        first = translated if first is None else first
        distance.update(translated, photographs)
        bands.update(translated, photographs)
        errors.append((translated - photographs).abs().mean((1, 2, 3)) / 2)
    by_band = bands.compute()
    cost = profile(generator, (1, 3, budget.size, budget.size))
    assert first is not None
    return {
        "frechet": float(distance.compute()),
        "l1": float(torch.cat(errors).mean()),
        "fine": statistics.mean(float(by_band[f"{band}_1"]) for band in ("horizontal", "vertical", "diagonal")),
        "coarse": float(by_band["low_4"]),
        "mmacs": cost.macs / 1e6,
        "kparams": cost.params / 1e3,
    }, first


def kept(name: str, seed: int, budget: argparse.Namespace, make: Callable[[], nn.Module]) -> dict[str, float]:
    """Scores of a generator, from the output folder where they are there."""
    stem = Path(budget.output, f"{name.replace(' ', '_')}_{seed}")
    if not stem.with_suffix(".json").exists():
        begin = time.perf_counter()
        generator = make()
        seconds = time.perf_counter() - begin
        found, first = scores(generator, budget)
        torch.save(first[:4].clone(), stem.with_suffix(".pt"))
        stem.with_suffix(".json").write_text(json.dumps({**found, "seconds": seconds}))
    found = json.loads(stem.with_suffix(".json").read_text())
    print(f"{name}, seed {seed}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    return found


def trained(budget: argparse.Namespace) -> Pix2Pix:
    """The dense system, from the output folder where it is there."""
    path = Path(budget.output, "dense.pt")
    run = Run(budget, 0)
    module = run.system(dense=True)
    if not path.exists():
        run.fit(module)
        torch.save(module.cpu().state_dict(), path)
    module.load_state_dict(torch.load(path, weights_only=True))
    return module


def pictures(budget: argparse.Namespace) -> None:
    """The first test images: input, dense, every setting with its first seed, photograph."""
    data = images(budget, 0)
    data.setup("test")
    labels, photographs = next(iter(data.test_dataloader()))
    stems = ["dense_0", *(f"{name.replace(' ', '_')}_{budget.seeds[0]}" for name in budget.settings)]
    made = [torch.load(Path(budget.output, f"{stem}.pt"), weights_only=True) for stem in stems]
    picture = grid(labels[:4], *made, photographs[:4])
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(Path(budget.output, "pictures.png"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default="runs/short_translation")
    parser.add_argument("--embedded", action="store_true", help="photographs to their edges, instead of facades")
    parser.add_argument("--size", type=int, default=128, help="of images, a power of two")
    parser.add_argument("--ngf", type=int, default=64, help="of the dense U-Net")
    parser.add_argument("--ndf", type=int, default=64, help="of its discriminator")
    parser.add_argument("--small-ngf", type=int, default=16)
    parser.add_argument("--small-ndf", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=40, help="half of them with a falling learning rate")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--images", type=int, default=None, help="of each split")
    parser.add_argument("--alpha", type=float, default=20.0, help="weight of the wavelet loss, beside 100 of the L1")
    parser.add_argument("--mask-weight-decay", type=float, default=0.1, help="of dmad")
    parser.add_argument(
        "--vgg",
        default=None,
        help="weights of a VGG-16, for dcd and crd; else narrow and random",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    budget = parser.parse_args()
    Path(budget.output).mkdir(parents=True, exist_ok=True)
    rich.get_console().quiet = True  # accounts
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    what = "photographs" if budget.embedded else "facades"
    how = f"{budget.epochs} epochs of batches of {budget.batch}, lr {budget.lr}"
    print(
        f"{machine()}; {what} {budget.size}x{budget.size}, {how}, U-Nets with ngf {budget.ngf} and {budget.small_ngf}"
    )
    dense = trained(budget)
    kept("dense", 0, budget, lambda: dense.generator)
    for name in budget.settings:
        found = [
            kept(name, seed, budget, partial(SETTINGS[name], Run(budget, seed, trained(budget))))
            for seed in budget.seeds
        ]
        summary = []
        for key in WORSE_IF_HIGHER:
            values = [scored[key] for scored in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            summary.append(f"{key} {statistics.mean(values):.4g} ± {spread:.2g}")
        print(f"{name:>24}  {', '.join(summary)}", flush=True)
    pictures(budget)


if __name__ == "__main__":
    main()
