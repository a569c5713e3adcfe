"""Fits that many checks look at, each done once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import two_processes
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from method_table import CASES, Case


@dataclass(frozen=True)
class Finished:
    """An uninterrupted fit, with a checkpoint after every epoch."""

    case: Case
    root: Path
    module: LightningModule
    callbacks: list[Callback]
    trainer: Trainer

    def checkpoint(self, epoch: int) -> Path:
        return self.root / f"epoch={epoch}.ckpt"


@pytest.fixture(scope="session", params=CASES, ids=str)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    case: Case = request.param
    root = tmp_path_factory.mktemp(str(case))
    parts = case.parts()
    trainer = case.fit(root, ModelCheckpoint(root, "{epoch}", save_top_k=-1), parts=parts)
    return Finished(case, root, parts.module, parts.callbacks, trainer)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> two_processes.Results:
    return two_processes.run(tmp_path_factory.mktemp("two_processes"))
