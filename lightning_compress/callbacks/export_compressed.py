"""Export the network at the end of a fit, as a file that was run and compared with the eager module."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.text import Text

from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.report import run_folder
from lightning_compress.export import Exported, check_format, export


class ExportCompressed(Callback):
    """Write the module's forward as ONNX or as a torch.export program into the run's folder.

    It happens in ``on_fit_end``, on rank 0, with the weights at that time. Callbacks that still change the
    module there must stand before this one in the list. The file is compared with the eager module on random
    input; the fit fails with a RuntimeError if they differ. With ``fast_dev_run`` the file is written,
    compared and removed.

    Args:
        format: ``"onnx"``, which needs the extra ``export``; ``"torch"``; or ``"auto"``: ONNX where it is
            installed.
        filename: name of the file, without a suffix.

    Attributes:
        exported: what was written: path, size and difference. None before, and on other ranks.

    Raises:
        ValueError: unknown ``format``.
        MisconfigurationException: ``"onnx"`` without its packages.

    Example::

        trainer = Trainer(callbacks=[HRank(pruning_ratio=0.5), ExportCompressed()])
    """

    def __init__(self, format: str = "auto", filename: str = "compressed") -> None:
        check_format(format)
        self.format = format
        self.filename = filename
        self.exported: Exported | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(format=self.format, filename=self.filename)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        with ExitStack() as stack:
            folder: Any = run_folder(trainer)
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                folder = stack.enter_context(TemporaryDirectory())
            path = Path(folder) / self.filename
            example_input = find_example_input(trainer, pl_module)
            self.exported = export(pl_module, path, example_input, format=self.format)
        rich.get_console().print(Text(f"exported {self.exported}"), soft_wrap=True)
