"""What is done once and looked at by many checks."""

from __future__ import annotations

import pytest
import two_processes
from lightning.pytorch.callbacks import ModelCheckpoint
from method_table import CASES, Finished


@pytest.fixture(scope="session", params=CASES, ids=str)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    case, root = request.param, tmp_path_factory.mktemp(str(request.param))
    parts = case.parts()
    trainer = case.fit(root, ModelCheckpoint(root, "{epoch}", save_top_k=-1), parts=parts)
    return Finished(case, root, parts.module, parts.callbacks, trainer)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> two_processes.Results:
    return two_processes.run(tmp_path_factory.mktemp("two_processes"))
