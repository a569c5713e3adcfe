"""Let a Trainer load checkpoints of networks whose structure was changed."""

from __future__ import annotations

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_compress.core.surgery import attach_record, read_steps, replay_in_setup, resume_path


class RestoreCompressed(Callback):
    """Replay the recorded surgery of a checkpoint on the fresh module before its weights are loaded.

    For `fit`, `validate`, `test` and `predict` with `ckpt_path`, when the callback that changed the network is not
    in the list. The command line adds it always. Without a Trainer, call `lightning_compress.load`.

    Example::

        from lightning_compress.callbacks import RestoreCompressed
        trainer = Trainer(callbacks=[RestoreCompressed()])
        trainer.test(module, datamodule, ckpt_path="pruned.ckpt")
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        path = resume_path(trainer)
        if path is not None and get_filesystem(path).isfile(path):  # a folder is a sharded strategy's
            replay_in_setup(trainer, pl_module, read_steps(path), by=type(self).__name__)
