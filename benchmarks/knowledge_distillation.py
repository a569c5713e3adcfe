"""What distillation costs: a training step of ResNet-20 with ResNet-56 as the teacher, 128 CIFAR images at a time.

The callback in a Trainer against a loop written by hand with the same teacher, step by step in turns; then the same
with the teacher's outputs from the cache, which must lead to the very same losses. Then the losses on relations between
images against loops over pairs and triples of them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_compress.callbacks import KnowledgeDistillation
from lightning_compress.core.distill import losses
from lightning_compress.networks import resnet20, resnet56

IMAGES, STEPS, EPOCHS, T = 128, 4, 3, 4.0


class Student(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = resnet20()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


class ByHand(Callback):
    """After each step of the Trainer, one of a plain loop; both are timed, in all epochs but the first."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher.eval()
        self.student = Student().network
        self.optimizer = sgd(self.student)
        self.trainers: list[float] = []
        self.own: list[float] = []
        self.losses: list[float] = []
        self.begin = 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        logits = self.student(images)
        with torch.no_grad():
            expected = self.teacher(images)
        soft = F.kl_div((logits / T).log_softmax(1), (expected / T).softmax(1), reduction="batchmean")
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * T**2 * soft
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        now = time.perf_counter()
        self.step(*batch)
        if trainer.current_epoch and i:  # the first step of an epoch also ends the epoch before
            self.trainers.append(now - self.begin)
            self.own.append(time.perf_counter() - now)
        self.losses.append(float(outputs["loss"]))
        self.begin = time.perf_counter()


def fit(cache: str | None) -> ByHand:
    """Both loops; with a cache, the Trainer's has the teacher's outputs from the second epoch on."""
    torch.manual_seed(1)
    teacher = resnet56()
    batches = [(torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,))) for _ in range(STEPS)]
    by_hand = ByHand(teacher)
    kd = KnowledgeDistillation(teacher, {"logits": 0.9}, task_weight=0.1, temperature=T, cache=cache)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=EPOCHS, callbacks=[kd, by_hand], accelerator="cpu", logger=False, default_root_dir=folder,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Student(), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return by_hand


def loop_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    def gram(features: Tensor) -> Tensor:
        rows = [torch.stack([(one * other).sum() for other in features]) for one in features]
        return torch.stack([row / row.norm() for row in rows])

    return F.mse_loss(gram(student), gram(teacher))


def loop_distance(student: Tensor, teacher: Tensor) -> Tensor:
    def relative(features: Tensor) -> Tensor:
        pairs = torch.stack([(one - other + 1e-12).norm() for one in features for other in features])
        return pairs / pairs.mean()

    return F.smooth_l1_loss(relative(student), relative(teacher))


def loop_angle(student: Tensor, teacher: Tensor) -> Tensor:
    def cosines(features: Tensor) -> Tensor:
        return torch.stack(
            [F.cosine_similarity(i - j, k - j, dim=0) for j in features for i in features for k in features]
        )

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


def claims() -> Iterator[Claim]:
    with threads(1):
        plain = fit(None)
        with tempfile.TemporaryDirectory() as folder:
            cached = fit(folder)
        # the shortest of each: what else the machine does only makes steps longer
        step, by_hand = min(plain.trainers), min(plain.own)
        quick, beside = min(cached.trainers), min(cached.own)
        setting = f"ResNet-56 teaches ResNet-20, {IMAGES} images"
        detail = milliseconds(step, by_hand)
        yield Claim(f"{setting}: step / loop by hand", step / by_hand, 1.03, at_most=True, detail=detail)
        # both against the loop by hand that ran beside them
        ratio = (step / by_hand) / (quick / beside)
        detail = f"{1e3 * quick:.0f} ms where the loop by hand took {1e3 * beside:.0f}"
        yield Claim(f"{setting}: step without / with cached outputs", ratio, 1.6, detail=detail)
        apart = max(abs(a - b) for a, b in zip(plain.losses, cached.losses, strict=True))
        yield Claim("largest difference of the losses with and without cache", apart, 0.0, at_most=True)
        for name, loop, size in (
            ("similarity", loop_similarity, IMAGES),
            ("distance", loop_distance, IMAGES),
            ("angle", loop_angle, 16),
        ):
            features = torch.randn(size, 64, requires_grad=True), torch.randn(size, 64)
            function = getattr(losses, name)

            def run(loss: Any, features: Any = features) -> None:
                loss(*features).backward()

            ours, naive = best_times(3, lambda: run(function), lambda: run(loop))  # noqa: B023
            detail = milliseconds(naive, ours)
            yield Claim(f"{name} of {size} images: loop / ours, with gradients", naive / ours, 10, detail=detail)


if __name__ == "__main__":
    print(machine())
    report(claims())
