"""Train any image network to tell classes apart."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.core.surgery import attach_record
from lightning_compress.modules._optimizers import check_interval, configured


class ImageClassifier(LightningModule):
    """Cross-entropy training of a network that maps images, (N, C, H, W), to logits, (N, num_classes).

    Batches are (images, labels). Logs ``train/loss``, ``train/acc``, ``val/loss``, ``val/acc``,
    ``test/loss`` and ``test/acc``, averaged over the epoch; `predict_step` returns probabilities.

    Args:
        network: the network, or a name for `lightning_compress.networks.find.build`, which then gets
            ``num_classes`` and, where it takes them, the channels of ``input_shape``.
        num_classes: number of classes.
        optimizer: makes the optimiser from the parameters. The default is the usual one for CIFAR.
        lr_scheduler: makes the schedule from the optimiser.
        lr_scheduler_interval: whether the schedule advances every ``"epoch"`` or every ``"step"``.
        label_smoothing: share of each target spread over all classes, in training alone.
        weights: file to load into the network, see `lightning_compress.networks.find.load_weights`.
        input_shape: (channels, height, width) of an image, for `example_input_array`.
        channels_last: whether to compute in the channels-last memory format.

    Raises:
        ValueError: an argument out of range, an unknown network, weights that do not fit.
        MisconfigurationException: the datamodule has other classes or image shapes, or batches lack labels.
    """

    # arguments that are objects or belong to one machine: checkpoints hold plain values, to load with weights_only=True
    NOT_SAVED: tuple[str, ...] = ("optimizer", "lr_scheduler", "weights")

    def __init__(
        self,
        network: nn.Module | str,
        num_classes: int = 10,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        weights: str | None = None,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        check_interval(lr_scheduler_interval)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a share in [0, 1), got {label_smoothing}.")
        self.save_hyperparameters(ignore=[*self.NOT_SAVED, *["network"] * isinstance(network, nn.Module)])
        if isinstance(network, str):
            from lightning_compress.networks.find import build_classifier

            network = build_classifier(network, num_classes, input_shape[0])
        self.network = network
        if weights is not None:
            from lightning_compress.networks.find import load_weights

            load_weights(self.network, weights)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.num_classes = num_classes
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.label_smoothing = label_smoothing
        self.input_shape = tuple(input_shape)
        self.channels_last = channels_last
        self.example_input_array = torch.zeros(1, *input_shape)
        self.train_acc, self.val_acc, self.test_acc = (
            # its own checks of labels and predictions would make the GPU wait for the CPU at each step
            MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            for _ in range(3)
        )

    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        for attribute in ("num_classes", "input_shape"):
            theirs, ours = getattr(datamodule, attribute, None), getattr(self, attribute)
            if theirs is not None and theirs != ours:
                raise MisconfigurationException(
                    f"{attribute}: {type(datamodule).__name__} has {theirs}, {type(self).__name__} got {ours}."
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let `load_from_checkpoint` open checkpoints of pruned networks: they say themselves what was cut."""
        attach_record(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, num_classes)."""
        if self.channels_last:
            images = images.to(memory_format=torch.channels_last)
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("train", batch, self.train_acc, self.label_smoothing)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step("val", batch, self.val_acc)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step("test", batch, self.test_acc)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return probabilities, (N, num_classes), for images or (images, labels)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(1)

    def _step(self, split: str, batch: Any, accuracy: MulticlassAccuracy, label_smoothing: float = 0.0) -> Tensor:
        images, labels = self.labelled(split, batch)
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        accuracy.update(logits, labels)
        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        log(f"{split}/loss", loss, prog_bar=split == "train")
        log(f"{split}/acc", accuracy, prog_bar=split != "train")
        return loss

    def labelled(self, split: str, batch: Any) -> tuple[Tensor, Tensor]:
        """The images and labels of a batch of that split, or an error that says what it is instead."""
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise MisconfigurationException(
                f"{type(self).__name__}: the {split} batches must be (images, labels), got {_describe(batch)}."
            )
        return batch[0], batch[1]

    def configure_optimizers(self) -> Any:
        return configured(self.parameters(), self.optimizer, self.lr_scheduler, self.lr_scheduler_interval, "val/loss")


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"one tensor of shape {tuple(batch.shape)}"
    size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
    return f"a {type(batch).__name__}{size}"
