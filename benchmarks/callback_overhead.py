"""What a pruning callback costs per training step once it has pruned.

The same narrow ResNet-20 is trained by a Trainer with `L1Norm`, which has nothing left to do, and by one without, in
short fits that take turns. A callback's cost does not depend on the images, so it is measured where steps are short
and the difference shows, with batches of one, and then set against a step with 64 images of the digits' size.
"""

from __future__ import annotations

import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Any

import torch
from _alternate import Claim, machine, milliseconds, report, threads
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.callbacks import L1Norm
from lightning_compress.modules import ImageClassifier

PAIRS, STEPS, FULL_BATCH = 6, 120, 64


class Clock(Callback):
    """Notes when each training step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = ImageClassifier("resnet20", input_shape=(1, 32, 32))
    with tempfile.TemporaryDirectory() as folder, threads(1), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        fit(module, 1, 1, folder, L1Norm(0.5))  # from here on the callback finds its work done
        with_callback = without = float("inf")
        for _ in range(PAIRS):
            without = min(without, fit(copy.deepcopy(module), 1, STEPS, folder))
            last = copy.deepcopy(module)
            with_callback = min(with_callback, fit(last, 1, STEPS, folder, L1Norm(0.5)))
            assert [p.shape for p in last.parameters()] == [p.shape for p in module.parameters()]
        full = fit(copy.deepcopy(module), FULL_BATCH, STEPS // 2, folder)
    cost = with_callback - without
    yield Claim(
        "training step with L1Norm / without",
        1 + cost / full,
        1.01,
        at_most=True,
        detail=f"{1e6 * cost:+.0f} us on a step of {milliseconds(full)}",
    )


def fit(module: ImageClassifier, batch: int, steps: int, folder: str, *callbacks: Callback) -> float:
    """Train, and tell the time of the shortest step in seconds."""
    data = TensorDataset(torch.randn(batch * steps, 1, 32, 32), torch.randint(10, (batch * steps,)))
    clock = Clock()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[clock, *callbacks],
    )
    trainer.fit(module, DataLoader(data, batch))
    return min((b - a for a, b in pairwise(clock.ends)), default=float("inf"))


if __name__ == "__main__":
    print(machine())
    report(claims())
