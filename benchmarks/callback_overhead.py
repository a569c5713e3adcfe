"""What a pruning callback costs per training step once it has pruned.

The same narrow ResNet-20 is trained by a Trainer with `L1Norm`, which has nothing left to do, and by one without.
Short fits alternate; of each kind, the fastest step counts, and the median of the ratios of neighbouring fits is told.
"""

from __future__ import annotations

import copy
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from _alternate import Claim, machine, report, threads
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.callbacks import L1Norm
from lightning_compress.modules import ImageClassifier

PAIRS, STEPS, BATCH = 8, 40, 64


class Clock(Callback):
    """Seconds from the end of one training step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.ends[5:], self.ends[6:])]  # the first ones warm up


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(BATCH * STEPS, 1, 32, 32), torch.randint(10, (BATCH * STEPS,)))
    dense = ImageClassifier("resnet20", input_shape=(1, 32, 32))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stdout(io.StringIO()), threads(1):
        warnings.simplefilter("ignore")
        pruned = copy.deepcopy(dense)
        fit(pruned, data, folder, L1Norm(0.5))  # from here on the callback finds its work done
        times: tuple[list[float], list[float]] = ([], [])
        for pair in range(PAIRS):
            for kind in (0, 1) if pair % 2 else (1, 0):
                callbacks = (L1Norm(0.5),) if kind else ()
                times[kind].append(min(fit(copy.deepcopy(pruned), data, folder, *callbacks)))
    without, with_ = times
    ratios = [b / a for a, b in zip(without, with_)]
    yield Claim(
        "training step with L1Norm / without", min(with_) / min(without), 1.01, at_most=True,
        detail=f"{1e3 * min(with_):.2f} against {1e3 * min(without):.2f} ms, median of pairs {statistics.median(ratios):.4f}",
    )  # fmt: skip


def fit(module: LightningModule, data: TensorDataset, folder: str, *callbacks: Callback) -> list[float]:
    clock = Clock()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[clock, *callbacks],
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, BATCH))
    return clock.steps


if __name__ == "__main__":
    print(machine())
    report(claims())
