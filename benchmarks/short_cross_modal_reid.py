"""CrossModalReID on digits in two views, with and without variational distillation, both readings of its divergence.

    python benchmarks/short_cross_modal_reid.py
    python benchmarks/short_cross_modal_reid.py --settings "ce + rank" "vsd + vcd (official)" --seeds 0 1 2

The same images in the same order, the same weights at the start, the same schedule. Scores are of the test images, by
the observations v of all looks, and by the representations z; accuracies are those of the last training epoch. Not part
of `run_all.py`: it takes minutes and promises nothing.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
from _alternate import machine
from lightning.pytorch import Trainer, seed_everything

from lightning_compress.datamodules import TwoViewDigits
from lightning_compress.modules import CrossModalReID

NOTHING = {"cml_weight": 0.0, "vsd_weight": 0.0, "vcd_weight": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "ce + rank": NOTHING,
    "vsd + vcd (official)": {"cml_weight": 0.0},
    "vsd + vcd (kl)": {"cml_weight": 0.0, "kl_mode": "kl"},
    "vsd + vcd (kl / 10)": {"cml_weight": 0.0, "kl_mode": "kl", "vsd_weight": 0.2, "vcd_weight": 0.2},
    "vsd (kl)": {"cml_weight": 0.0, "vcd_weight": 0.0, "kl_mode": "kl"},
    "vcd (kl)": {"cml_weight": 0.0, "vsd_weight": 0.0, "kl_mode": "kl"},
    "cml": {**NOTHING, "cml_weight": 8.0},
    "all (official)": {},
    "all (kl)": {"kl_mode": "kl"},
    "all, with vml (kl)": {"kl_mode": "kl", "vml_weight": 2.0},
}


def scores(setting: str, seed: int, budget: argparse.Namespace) -> dict[str, float]:
    seed_everything(seed, verbose=False)
    data = TwoViewDigits(
        batch_size=80, size=budget.size, seed=seed, infrared=budget.infrared, val_size=1547 - budget.images
    )  # fmt: skip
    module = CrossModalReID(
        "reid_small", num_classes=10, z_dim=budget.z_dim, hidden=(128,), classifier_dim=64,
        input_shape=data.input_shape,
        optimizer=partial(torch.optim.Adam, lr=budget.lr, weight_decay=5e-4),
        lr_scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=budget.epochs), **SETTINGS[setting],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=budget.epochs, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, data)
        found = {name: trainer.callback_metrics[f"train/acc_{name}"].item() for name in ("v", "z")}
        for name, feature in (("v", "observation"), ("z", "representation")):
            module.feature = feature
            tested = trainer.test(module, data, verbose=False)[0]
            found |= {f"{score} by {name}": tested[f"test/{score}"] for score in ("rank1", "mAP")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--z-dim", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--images", type=int, default=600, help="to train on")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--infrared", default="edges", choices=["edges", "inverted"])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    budget = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    told = ", ".join(f"{name} {value}" for name, value in vars(budget).items() if name != "settings")
    print(f"{machine()}; {told}")
    for setting in budget.settings:
        begin = time.perf_counter()
        seen = [scores(setting, seed, budget) for seed in budget.seeds]
        columns = []
        for name in ("mAP by v", "mAP by z", "rank1 by v", "rank1 by z", "v", "z"):
            values = [100 * one[name] for one in seen]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            head = name if " " in name else f"accuracy of {name}"
            columns.append(f"{head} {statistics.mean(values):.1f} ± {spread:.1f}")
        print(f"{setting:>22}  {', '.join(columns)}  {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
