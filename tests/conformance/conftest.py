"""What is done once and looked at by many checks."""

from __future__ import annotations

import os

import pytest
import two_processes
from filelock import FileLock  # comes with torch
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
    """Once for all workers of pytest-xdist: the first one to come trains, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_processes"
    failure = folder / "failure.txt"
    with FileLock(f"{folder}.lock"):
        if not failure.exists():
            folder.mkdir()
            failure.write_text(two_processes.run(folder).failure, encoding="utf-8")
    return two_processes.Results(folder, failure.read_text(encoding="utf-8"))
