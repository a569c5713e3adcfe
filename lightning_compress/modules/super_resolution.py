"""Train any network to enlarge photographs."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import center_crop

from lightning_compress.core.surgery import attach_record
from lightning_compress.core.weights import load_weights
from lightning_compress.metrics import LuminancePSNR, LuminanceSSIM
from lightning_compress.modules._optimizers import check_interval, configured


class SuperResolution(LightningModule):
    """Training of a network that maps small images, (N, C, H, W), to large ones, (N, C, scale H, scale W).

    Batches are (small, large) images, float in 0..255. The loss is the mean absolute difference, not clamped. Logs
    ``train/loss``, and ``val/psnr``, ``val/ssim``, ``test/psnr``, ``test/ssim`` of the luminance (see `LuminancePSNR`),
    the mean over images; with several sets to evaluate on ``test/<name>/psnr``, by the ``test_names`` of the datamodule
    or their number. `predict_step` returns images as bytes.

    Args:
        network: the network, or a name for `lightning_compress.networks.build`, which then gets ``scale``.
        scale: how much larger the large images are.
        optimizer: makes the optimiser from the parameters. The default is that of EDSR and its successors.
        lr_scheduler: makes the schedule from the optimiser.
        lr_scheduler_interval: whether the schedule advances every ``"epoch"`` or every ``"step"``.
        border: pixels on each side that evaluation leaves out; None takes ``scale``, as papers do on Set5, Set14, B100
            and Urban100. On DIV2K they take ``scale + 6``.
        weights: file to load into the network, see `lightning_compress.networks.load_weights`.
        input_shape: (channels, height, width) of a small image, for `example_input_array`.
        channels_last: whether to compute in the channels-last memory format.

    Raises:
        ValueError: an argument out of range, an unknown network, weights that do not fit.
        MisconfigurationException: network, data and ``scale`` do not agree, or batches are no pairs.
    """

    # arguments that are objects or belong to one machine: checkpoints hold plain values, to load with weights_only=True
    NOT_SAVED: tuple[str, ...] = ("optimizer", "lr_scheduler", "weights")

    def __init__(
        self,
        network: nn.Module | str = "edsr_baseline",
        scale: int = 4,
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        border: int | None = None,
        weights: str | None = None,
        input_shape: tuple[int, int, int] = (3, 48, 48),
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        check_interval(lr_scheduler_interval)
        if scale < 2:
            raise ValueError(f"scale: expected 2 or more, got {scale}.")
        if border is not None and border < 0:
            raise ValueError(f"border: expected 0 or more pixels, or None, got {border}.")
        self.save_hyperparameters(ignore=[*self.NOT_SAVED, *["network"] * isinstance(network, nn.Module)])
        self.network = _build(network, scale) if isinstance(network, str) else network
        _check_scale(type(self.network).__name__, self.network, scale)
        if weights is not None:
            load_weights(self.network, weights)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.scale = scale
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.border = scale if border is None else border
        self.input_shape = tuple(input_shape)
        self.channels_last = channels_last
        self.example_input_array = torch.zeros(1, *input_shape)
        # a pair for each loader
        self.val_metrics, self.test_metrics = nn.ModuleList(), nn.ModuleList()

    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        _check_scale(type(datamodule).__name__, datamodule, self.scale)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let `load_from_checkpoint` open checkpoints of compressed networks: they say themselves what was changed."""
        attach_record(self)

    def forward(self, images: Tensor) -> Tensor:
        """Enlarge images, (N, C, H, W), in 0..255."""
        if self.channels_last:
            images = images.to(memory_format=torch.channels_last)
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        low, high = self._pair("train", batch)
        loss = F.l1_loss(self._enlarged(low, high), high)
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(low))
        return loss

    def on_validation_start(self) -> None:
        self._one_for_each(self.val_metrics, self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        self._one_for_each(self.test_metrics, self.trainer.test_dataloaders)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        low, enlarged, high = self._evaluate("val", batch, self.val_metrics, dataloader_idx)
        if batch_idx == dataloader_idx == 0 and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    picture = side_by_side(low, enlarged, high)
                    logger.experiment.add_image("val/small, enlarged, large", picture, self.global_step)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, self.test_metrics, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the enlarged images as bytes, for small images or (small, large)."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).round().clamp(0, 255).to(torch.uint8)

    def configure_optimizers(self) -> Any:
        return configured(
            self.parameters(), self.optimizer, self.lr_scheduler, self.lr_scheduler_interval, "train/loss"
        )

    def _pair(self, split: str, batch: Any) -> tuple[Tensor, Tensor]:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            got = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
            raise MisconfigurationException(
                f"{type(self).__name__}: the {split} batches must be (small images, large images), got {got}."
            )
        return batch[0], batch[1]

    def _enlarged(self, low: Tensor, high: Tensor) -> Tensor:
        enlarged = self(low)
        if enlarged.shape != high.shape:  # l1_loss would broadcast some of these
            raise MisconfigurationException(
                f"scale: {type(self.network).__name__} makes {tuple(enlarged.shape)} of {tuple(low.shape)}, but the "
                f"large images have {tuple(high.shape)}."
            )
        return enlarged

    def _one_for_each(self, metrics: nn.ModuleList, loaders: Any) -> None:
        """Have as many pairs of metrics as there are loaders, which are only known now."""
        count = len(loaders) if isinstance(loaders, (list, tuple)) else 1
        if len(metrics) != count:
            del metrics[:]
            metrics.extend(
                nn.ModuleDict({"psnr": LuminancePSNR(self.border), "ssim": LuminanceSSIM(self.border)})
                for _ in range(count)
            ).to(self.device)

    def _evaluate(self, split: str, batch: Any, metrics: nn.ModuleList, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Update and log the metrics of a loader; return the small, the enlarged and the large images."""
        low, high = self._pair(split, batch)
        enlarged = self._enlarged(low, high)
        names = getattr(getattr(self.trainer, "datamodule", None), f"{split}_names", range(len(metrics)))
        which = f"{split}/{names[index]}" if len(metrics) > 1 else split
        log = partial(self.log, on_step=False, on_epoch=True, batch_size=len(low), add_dataloader_idx=False)
        for name, metric in metrics[index].items():  # type: ignore[operator]
            metric.update(enlarged, high)
            log(f"{which}/{name}", metric, metric_attribute=f"{split}_metrics.{index}.{name}", prog_bar=name == "psnr")
        return low, enlarged, high


def side_by_side(low: Tensor, enlarged: Tensor, high: Tensor, size: int = 256) -> Tensor:
    """The middle of the first images, the small one with its pixels repeated: (C, up to size, up to 3 size), uint8."""
    low = F.interpolate(low[:1].float(), size=high.shape[-2:])
    middle = [min(size, n) for n in high.shape[-2:]]
    strip = torch.cat([center_crop(image[0].float(), middle) for image in (low, enlarged, high)], 2)
    return strip.round().clamp(0, 255).to(torch.uint8)


def _build(name: str, scale: int) -> nn.Module:
    from lightning_compress.core.select import did_you_mean
    from lightning_compress.networks.find import SUPER_RESOLUTION

    if name not in SUPER_RESOLUTION:
        hint = did_you_mean(name, SUPER_RESOLUTION) or f" There is: {', '.join(SUPER_RESOLUTION)}."
        raise ValueError(f"network: there is no super-resolution network {name!r}.{hint}")
    return SUPER_RESOLUTION[name](scale)


def _check_scale(name: str, other: Any, scale: int) -> None:
    """Raise if a network or datamodule has another scale."""
    theirs = getattr(other, "scale", None)
    if isinstance(theirs, int) and theirs != scale:
        raise MisconfigurationException(f"scale: {name} has {theirs}, SuperResolution got {scale}.")
