"""What KCD's bookkeeping costs of an epoch, and its blends against those of the authors' code shape.

In the steps: fits of a linear network with a linear teacher, with KCD (keep_ratio=1) and with plain distillation, take
turns; the difference of their steps does not depend on the networks. Around them, for 50,000 images of CIFAR-100 and
1.28 million of ImageNet: the order of an epoch, less what is not kept; the sums; ranking and partition; for CIFAR-100
all blends made anew as after a resume, for ImageNet the recipes of images that are read from files. All this is counted
for every epoch, as if a stage had only one, and set against an epoch that is as short as it can be: the student's own
steps, on one thread, with the teacher's outputs from a cache.
"""

from __future__ import annotations

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
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_compress.callbacks import KCD, KnowledgeDistillation
from lightning_compress.callbacks.distillation.kcd.condensation import (
    KnowledgeSet,
    blend,
    entropies,
    next_size,
    partition,
    shares,
    values,
)
from lightning_compress.callbacks.distillation.kcd.data import BlendedDataset
from lightning_compress.core.training_samples import PartSampler
from lightning_compress.networks import CIFARResNet

TURNS, STEPS, THETA, STAGES = 5, 80, 0.7, 6


class Linear(LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 64)
        self.network = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """Notes when each training step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())


def step_of(kd: KnowledgeDistillation, data: TensorDataset, batch: int, folder: str) -> float:
    """Time of the shortest step in seconds, fetching included."""
    clock = Clock()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[clock, kd],
    )  # fmt: skip
    trainer.fit(Linear(int(data.tensors[1].max()) + 1), DataLoader(data, batch))
    return min(b - a for a, b in pairwise(clock.ends))


def cost_of_step(classes: int, batch: int) -> float:
    """What a step takes longer with KCD, in seconds."""
    labels = torch.arange(batch * STEPS) % classes
    data = TensorDataset(torch.randn(batch * STEPS, 64), labels)
    teacher, plain, ours = nn.Linear(64, classes), float("inf"), float("inf")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for _ in range(TURNS):
            plain = min(plain, step_of(KnowledgeDistillation(teacher), data, batch, folder))
            ours = min(ours, step_of(KCD(teacher, keep_ratio=1.0), data, batch, folder))
    return ours - plain


def cost_of_epoch(count: int, pixels: Tensor | None) -> float:
    """What is done between epochs, in the last stage, in seconds."""
    known = KnowledgeSet.full(count)
    data = TensorDataset(torch.empty(count, 0))
    for _ in range(STAGES):
        known.hear(torch.rand(count))
        size = next_size(len(known), count, THETA, STAGES)
        known.keep(partition(values(known.total, known.visits, 40), size, len(known)), mix=True)
    heard = torch.rand(count)

    def between() -> None:
        KnowledgeSet(known.total.clone(), known.visits.clone(), known.kept).hear(heard)
        partition(values(known.total, known.visits, 40), size, size + len(known.blends[-1][0]))
        if pixels is None:
            BlendedDataset(data, known.blends, 0.7)
        else:
            images = pixels.clone()
            for tail, lost in known.blends:
                images[tail] = blend(images[tail], images[lost], shares(len(tail)))

    def ordered() -> None:
        list(PartSampler(RandomSampler(data), known.kept, count, 1, 0, "KCD"))

    own, order, plain = best_times(3, between, ordered, lambda: list(RandomSampler(data)))
    return own + max(0.0, order - plain)


def one_by_one(kept: Tensor, lost: Tensor, share: Tensor) -> Tensor:
    """Row by row, each added to what there is."""
    images = torch.empty(0, *kept.shape[1:], dtype=torch.uint8)
    for one, other, a in zip(kept, lost, share, strict=True):
        images = torch.cat([images, (a * one + (1 - a) * other).byte()[None]])
    return images


def trained(network: nn.Module, images: Tensor, classes: int) -> float:
    """Time of the student's own step, in seconds."""
    labels = torch.arange(len(images)) % classes
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return best_times(3, step)[0]


def claims() -> Iterator[Claim]:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with threads(1):
        cifar = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
        for name, network, images, batch, classes, count, pixels in (
            ("CIFAR-100, ResNet-20", CIFARResNet(20, 100), torch.randn(64, 3, 32, 32), 64, 100, 50_000, cifar),
            ("ImageNet, ResNet-18", resnet18(), torch.randn(8, 3, 224, 224), 256, 1000, 1_281_167, None),
        ):
            step = trained(network, images, classes) * batch / len(images)
            cost, between = cost_of_step(classes, batch), cost_of_epoch(count, pixels)
            steps = count / batch
            yield Claim(
                f"{name}: KCD's bookkeeping / an epoch of the student alone",
                (steps * cost + between) / (steps * step),
                0.01,
                at_most=True,
                detail=f"{1e6 * cost:+.0f} us on a step of {milliseconds(step)}, {between:.2f} s between epochs of "
                f"{steps * step:.0f} s",
            )
        kept, lost, share = cifar[:2500], cifar[2500:5000], shares(2500)
        assert (one_by_one(kept, lost, share).int() - blend(kept, lost, share).int()).abs().max() <= 1
        naive, ours = best_times(3, lambda: one_by_one(kept, lost, share), lambda: blend(kept, lost, share))
        yield Claim("blend 2,500 images: one by one / at once", naive / ours, detail=milliseconds(naive, ours))
        logits = torch.randn(256, 1000)
        slow, quick = best_times(5, lambda: torch.distributions.Categorical(logits=logits).entropy(),
                                 lambda: entropies(logits), calls=20)  # fmt: skip
        yield Claim("entropies of (256, 1000) logits: torch.distributions / ours", slow / quick,
                    detail=milliseconds(slow, quick))  # fmt: skip


if __name__ == "__main__":
    print(machine())
    report(claims())
