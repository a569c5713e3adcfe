"""Export the network at the end of a fit, as a file that was run and compared with the eager module."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.text import Text

from lightning_compress.core.calibration import training_inputs
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.report import run_folder
from lightning_compress.export import Exported, check_format, export

CALIBRATION_BATCH = 64


class ExportCompressed(Callback):
    """Write the module's forward as ONNX or as a torch.export program into the run's folder.

    It happens in ``on_fit_end``, on rank 0, with the weights at that time. Callbacks that still change the
    module there must stand before this one in the list. The file is compared with the eager module on random
    input; the fit fails with a RuntimeError if they differ. With ``fast_dev_run`` the file is written,
    compared and removed.

    Args:
        format: ``"onnx"``, which needs the extra ``export``; ``"torch"``; ``"auto"``: ONNX where it is
            installed; ``"int8"``: ONNX whose quantised layers compute with 8-bit integers; or ``"codebook"``: ONNX
            whose weights of few values are indices.
        filename: name of the file, without a suffix.
        num_batches: for ``"int8"``: batches of 64 training images for the ranges of what the network does not
            quantise itself beside its integer layers. 0 leaves that in floating point, and the file exact.

    Attributes:
        exported: what was written: path, size and difference. None before, and on other ranks.

    Raises:
        ValueError: unknown ``format``; ``num_batches`` below 0, or above it without ``"int8"``.
        MisconfigurationException: ``"onnx"`` or ``"int8"`` without their packages.

    Example::

        trainer = Trainer(callbacks=[HRank(pruning_ratio=0.5), ExportCompressed()])
    """

    def __init__(self, format: str = "auto", filename: str = "compressed", num_batches: int = 0) -> None:
        check_format(format)
        if num_batches < 0 or (num_batches and format != "int8"):
            raise ValueError(f"num_batches: 0, or with format='int8' more, got {num_batches} and format={format!r}")
        self.format = format
        self.filename = filename
        self.num_batches = num_batches
        self.exported: Exported | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(format=self.format, filename=self.filename, num_batches=self.num_batches)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        with ExitStack() as stack:
            folder: Any = run_folder(trainer)
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                folder = stack.enter_context(TemporaryDirectory())
            path = Path(folder) / self.filename
            example_input = find_example_input(trainer, pl_module)
            images = None
            if self.num_batches:
                count = (
                    self.num_batches * trainer.world_size * CALIBRATION_BATCH
                )  # of which this process reads its share
                images = training_inputs(trainer, pl_module, count, CALIBRATION_BATCH)
            self.exported = export(pl_module, path, example_input, format=self.format, calibration=images)
        rich.get_console().print(Text(f"exported {self.exported}"), soft_wrap=True)
