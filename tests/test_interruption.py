"""A run that is told to stop loses nothing but the epoch it was in, and never leaves a damaged checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress.callbacks import L1Norm
from lightning_compress.core.surgery import read_checkpoint, read_steps

EPOCHS, START_EPOCH = 4, 2
# Where the signal comes: hook, epoch, batch. Pruning happens at the start of epoch 2.
MOMENTS: dict[str, tuple[str, int, int]] = {
    "before_pruning": ("on_train_batch_end", 1, 2),
    "first_step": ("on_train_batch_start", 0, 0),
    "while_pruning": ("on_train_epoch_start", 2, 0),
    "after_pruning": ("on_train_batch_end", 2, 1),
    "epoch_boundary": ("on_train_epoch_end", 2, 0),
    "while_saving": ("on_save_checkpoint", 2, 0),
}


class Stop(Callback):
    """Sends this process the signal that a scheduler sends before it takes the machine away."""

    def __init__(self, hook: str, epoch: int, batch: int) -> None:
        self.when = epoch, batch
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        batch = args[-1] if args and isinstance(args[-1], int) else 0
        if (trainer.current_epoch, batch) == self.when:
            os.kill(os.getpid(), signal.SIGTERM)


def run(root: Path, *others: Callback, ckpt_path: str | None = None) -> LightningModule:
    torch.set_num_threads(1)
    module = foreign.made()
    last = ModelCheckpoint(root, "{epoch}", save_last=True, save_top_k=-1)
    foreign.fit(module, root, *others, L1Norm(start_epoch=START_EPOCH), last, ckpt_path=ckpt_path, max_epochs=EPOCHS)
    return module


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per moment, of runs that were stopped then, all in one process of their own."""
    root = tmp_path_factory.mktemp("stopped")
    subprocess.run(
        [sys.executable, __file__, str(root)], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    return root


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> LightningModule:
    return run(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_last_checkpoint_is_whole_and_ends_where_the_uninterrupted_run_ends(
    moment: str, stopped: Path, uninterrupted: LightningModule
) -> None:
    root = stopped / moment
    assert (root / "ended_by").read_text() == "SIGTERMException"
    checkpoints = list(root.glob("*.ckpt"))
    for path in checkpoints:
        checkpoint = read_checkpoint(path)
        assert bool(read_steps(path)) == (checkpoint["epoch"] >= START_EPOCH)
    assert bool(checkpoints) == (moment != "first_step")
    foreign.assert_same(run(root, ckpt_path="last"), uninterrupted)


def main(root: Path) -> None:
    for moment, when in MOMENTS.items():
        (root / moment).mkdir()
        ended = "nothing"
        try:
            run(root / moment, Stop(*when))
        except SystemExit as error:
            ended = type(error).__name__
        (root / moment / "ended_by").write_text(ended)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
