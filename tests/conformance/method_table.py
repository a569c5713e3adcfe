"""The methods that every check of this folder runs on: all cards that are ready.

A new method is its `Card`. If its defaults are too long for a few digits, it adds one line here.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import foreign
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import nn

import lightning_compress.callbacks
from lightning_compress.catalog import READY, Card, cards
from lightning_compress.cli.configs import find_config

EPOCHS = 4
START_EPOCH = 2

# Slug, or slug and name of a further variant -> arguments that make it quick on 64 digits of 8x8.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "admm_nn": {"prune_epochs": 1, "retrain_epochs": 1, "quant_epochs": 1, "quant_rounds": 0, "every_n_epochs": 1},
    "admm_nn quantised": {"prune_epochs": 1, "retrain_epochs": 1, "quant_epochs": 1, "quant_rounds": 0,
                          "weight_bits": 3, "every_n_epochs": 1},
    "admm_nn filter": {"sparsity": {"*conv1": 0.5}, "structure": "filter", "prune_epochs": 2, "every_n_epochs": 1},
    "hrank": {"num_batches": 1, "rank_batch_size": 32},
    "hrank sequential": {"mode": "sequential", "num_batches": 1, "rank_batch_size": 32, "epochs_per_layer": 2,
                         "stage_layers": [2], "monitor": "val_acc"},
    # With one tenth as the only choice, every search ends with the same widths: in one and in two processes.
    "abc_pruner": {"max_preserve": 1, "food_number": 2, "max_cycle": 1, "calfitness_epoch": 1, "fitness_batches": 1,
                   "monitor": "val_acc"},
    "ssr": {"lambda_": 100.0, "steps_per_layer": 1, "finetune_steps": 1, "update_fy_step": 1},
    "ssr joint": {"lambda_": 100.0, "mode": "joint", "norm": "l20", "steps_per_layer": 6, "finetune_steps": 1,
                  "update_fy_step": 2, "include_norm": True},
    # So many channels fall at once that every layer keeps its least: two instances then narrow their layers alike.
    "white_box": {"end_epoch": 2, "start_keep": 0.05, "target_macs": 0.8},
    "white_box official": {"end_epoch": 2, "fold": "official", "scale_unused": True, "flops_rule": "with_bn",
                           "position": "after_activation", "last_layer": "random", "normalize_guide": False},
    # Masks fall by their sign at the start, not by a gradient that another batch would turn.
    "gal": {"start_epoch": 0, "search_epochs": 1, "mask_step": 2, "mask_points": "joint", "lr": 0.0001},
    "architecture_decoupling": {"num_batches": 1},
    "architecture_decoupling target": {"target_density": 0.5, "lambda_s": 0.1, "init": "kaiming", "semhash": "element",
                                       "kl_direction": "out_from_mask", "recalibrate_bn": 1, "num_batches": 1},
    "magnitude_pruning gradual": {"sparsity": 0.8, "end_epoch": 2, "recalibrate_bn": 1},
    "lottery_jackpots tuned": {"restriction": "poly4", "tune_epochs": 2},
    "lbc": {"end_epoch": 2},
    "pattern_pruning": {"library": "cheap", "connectivity": 2.0, "end_epoch": 3, "every_n_epochs": 1},
    "pattern_pruning extract": {"library_sizes": [12, 4], "extract_epochs_per_phase": 1, "end_epoch": 3,
                                "every_n_epochs": 1},
    "qat lsq": {"quantizer": "lsq", "per_channel": True, "first_last_bits": 8},
    "lts": {"warmup_epochs": 1, "ema": 0.9},
    "lts channel": {"warmup_epochs": 1, "ema": 0.9, "granularity": "channel", "min_group": 0.5},
    "knowledge_distillation": {"teacher": foreign.made().net},
    "knowledge_distillation features": {"teacher": foreign.made().net, "losses": {"target": 1.0, "hints": 1.0,
                                        "angle": 1.0, "contrast": 0.1}, "features": {
                                        "hints": {"net.blocks.?": "blocks.?"}, "angle": {"net.stem": "stem"}},
                                        "warmup_epochs": 2, "task_weight": 0.5},
    "knowledge_distillation maps": {"teacher": foreign.made().net, "losses": {"boundary": 1.0, "factors": 10.0,
                                    "information": 1.0, "noise_contrast": 0.1}, "contrast_negatives": 16,
                                    "initial_epochs": 1, "features": {t: {"net.blocks.?": "blocks.?"} for t in (
                                    "boundary", "factors", "information")}},
    "variational_distillation": {"z_dim": 4, "hidden": [8], "classifier_dim": 8},
    "variational_distillation representation": {"z_dim": 4, "hidden": [8], "classifier_dim": 8, "weight": 0.2,
                                                "kl_mode": "kl", "deploy": "representation"},
    "ffsd": {"warmup_epochs": 2, "network": {"class_path": "lightning_compress.networks.CIFARResNet",
             "init_args": {"depth": 8, "in_channels": 1, "widths": [4, 4, 8, 8]}}},
    "kcd": {"teacher": foreign.made().net, "every_n_epochs": 1, "keep_ratio": 0.85},  # as many batches, to the end
    "cross_modal_reid": {"gather": True},
    **{slug: {"n_epochs": 2, "n_epochs_decay": 2} for slug in ("pix2pix", "cycle_gan")},
    "dcd": {"n_epochs": 1, "n_epochs_decay": 1, "phase_epochs": 1, "student_ratio": 1},
    "online_distillation": {"network": {"class_path": "lightning_compress.networks.CIFARResNet",
                            "init_args": {"depth": 8, "in_channels": 1}}, "num_students": 2},
    "pcnn": {"n": 2, "end_epoch": 3, "every_n_epochs": 1},
    "pams four_bits": {"weight_bits": 4, "activation_bits": 4, "ema_epoch": 2, "init": "ema"},
    "pconv": {"connectivity": 2.0, "end_epoch": 3, "every_n_epochs": 1},
}  # fmt: skip


# Slug -> classes of callbacks that stand before it, without which it refuses to work.
COMPANIONS: dict[str, list[str]] = {"lts": ["QAT"]}
# Callbacks that a classifier is nothing for -> what makes their own recipe quick, with whose module and data they come.
FROM_RECIPE: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("wavelet_distillation", "dmad", "co_attention"), ("--data.crop_size=32",)
)
# Likewise for methods that are modules.
SMALLER = dict.fromkeys(("cycle_gan", "dcd", "crd"), ("--data.crop_size=48",))
# Methods that compute less for every image, but keep all weights, and bring some.
KEEP_WEIGHTS = ("architecture_decoupling",)
# Methods with fewer different weights in layers as wide as before.
KEEP_WIDTHS = (*KEEP_WEIGHTS, "kse")
# Methods that learn widths from images: two processes, which see other ones, end with widths of their own.
LEARN_WIDTHS = ("white_box", "dmad")


@dataclass
class Parts:
    """What one fit takes: `data` and `evaluation` are arguments of `Trainer.fit` and of `validate`."""

    module: LightningModule
    callbacks: list[Callback]
    data: dict[str, Any]
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One method in one of its variants."""

    card: Card
    variant: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.card.slug}-{self.variant}" if self.variant else self.card.slug

    @property
    def cls(self) -> type:
        module, _, name = self.card.class_path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.cls).parameters

    @property
    def compresses(self) -> bool:
        """Whether its account must show less than before."""
        return self.card.family in ("pruning", "sparsity", "quantization")

    @property
    def keeps_weights(self) -> bool:
        """Whether only the MACs are less than before."""
        return self.card.slug in KEEP_WEIGHTS

    @property
    def keeps_widths(self) -> bool:
        """Whether its layers have as many channels as before."""
        return self.card.slug in KEEP_WIDTHS

    @property
    def learns_widths(self) -> bool:
        """Whether its widths depend on the images that were seen."""
        return self.card.slug in LEARN_WIDTHS

    def parts(self, **changes: Any) -> Parts:
        """A callback goes onto a module that is not ours; a method that is a module comes as in its own recipe."""
        arguments = {**self.arguments, **changes}
        if issubclass(self.cls, Callback) and self.card.slug not in FROM_RECIPE:
            data = {"train_dataloaders": foreign.digits(), "val_dataloaders": foreign.digits(32, 64)}
            others = [getattr(lightning_compress.callbacks, name)() for name in COMPANIONS.get(self.card.slug, [])]
            callbacks = [*others, self.cls(**arguments)]
            return Parts(foreign.made(), callbacks, data, {"dataloaders": foreign.digits(32, 64)})
        if issubclass(self.cls, Callback):
            given = (f"--config={_changed_recipe(self.card, arguments)}", *FROM_RECIPE[self.card.slug])
        else:
            changed = (f"--model.init_args.{name}={value}" for name, value in arguments.items())
            given = (f"--config=recipes/{self.card.slug}/quick", *changed, *SMALLER.get(self.card.slug, ()))
        module, own, datamodule = copy.deepcopy(_from_recipe(given))
        return Parts(module, own, {"datamodule": datamodule}, {"datamodule": datamodule})

    def networks(self) -> dict[str, nn.Module]:
        """What the module's constructor has to be given beside a checkpoint, which holds no networks."""
        module = self.parts().module
        parameters = inspect.signature(type(module)).parameters
        needed = [n for n, p in parameters.items() if p.default is p.empty and n not in module.hparams]
        return {name: child for name, child in module.named_children() if name in needed}

    def fit(
        self, root: Path, *others: Callback, parts: Parts | None = None, ckpt_path: Any = None, **kwargs: Any
    ) -> Trainer:
        """Train for `EPOCHS` epochs; `others` stand after the method."""
        seed_everything(0, verbose=False)
        parts = parts or self.parts()
        kwargs = {"max_epochs": EPOCHS, "limit_train_batches": 4, "limit_val_batches": 2, **kwargs}
        trainer = foreign.make_trainer(root, *parts.callbacks, *others, **kwargs)
        with foreign.no_pictures:
            trainer.fit(parts.module, **parts.data, ckpt_path=ckpt_path)
        return trainer


@dataclass(frozen=True)
class Finished:
    """An uninterrupted fit, with a checkpoint after every epoch."""

    case: Case
    root: Path
    module: LightningModule
    callbacks: list[Callback]
    trainer: Trainer

    def checkpoint(self, epoch: int) -> Path:
        return self.root / f"epoch={epoch}.ckpt"


@cache  # a second each, and every check wants its own
def _from_recipe(given: tuple[str, ...]) -> tuple[LightningModule, list[Callback], LightningDataModule]:
    """Build module, callbacks of ours and datamodule from a command line."""
    from lightning_compress.callbacks import ExportCompressed
    from lightning_compress.cli.lightning_cli import CompressCLI

    recipe = CompressCLI([*given], run=False)
    own = [c for c in recipe.trainer.callbacks if type(c).__module__.startswith("lightning_compress")]
    own = [c for c in own if not isinstance(c, ExportCompressed)]  # longer than the fit, and checked on its own
    return recipe.model, own, recipe.datamodule


def _changed_recipe(card: Card, arguments: dict[str, Any]) -> str:
    """The quick recipe of a callback with changed arguments, in one line."""
    recipe = yaml.safe_load(find_config(f"recipes/{card.slug}/quick").read_text(encoding="utf-8"))
    entry = next(entry for entry in recipe["trainer"]["callbacks"] if entry["class_path"] == card.name)
    entry["init_args"] = {**entry.get("init_args", {}), **arguments}
    return json.dumps(recipe)


def variants(card: Card) -> Iterator[Case]:
    """As it is, in mid-fit where it can start later, and what `ARGUMENTS` adds."""
    plain = Case(card, "", ARGUMENTS.get(card.slug, {}))
    yield plain
    if "start_epoch" in plain.parameters:
        yield Case(card, "mid_fit", {**plain.arguments, "start_epoch": START_EPOCH})
    for key, arguments in ARGUMENTS.items():
        slug, _, variant = key.partition(" ")
        if slug == card.slug and variant:
            yield Case(card, variant, arguments)


METHODS = [next(variants(card)) for card in cards(READY)]
CASES = [case for card in cards(READY) for case in variants(card)]
