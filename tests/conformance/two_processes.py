"""One pool of two gloo processes that trains every case once, and what it wrote."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, multiprocessing

SIZE = 2


@dataclass(frozen=True)
class Results:
    """What the processes wrote. Where one of them fails, both end, and later cases are absent."""

    folder: Path
    failure: str

    def __getitem__(self, case: Any) -> list[dict[str, Tensor]]:
        files = [self.folder / f"{case}-{rank}.pt" for rank in range(SIZE)]
        assert all(f.exists() for f in files), f"{case} did not end with two processes. {self.failure}"
        return [torch.load(f, weights_only=True) for f in files]


def run(folder: Path) -> Results:
    """Train all cases; takes as long as the slower process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failure = ""
    try:
        multiprocessing.spawn(_train, (str(port), folder), SIZE)
    except Exception as error:
        failure = str(error)
    return Results(folder, failure)


def arguments() -> Mapping[str, Any]:
    """Of a Trainer in one of the processes. What hangs fails after a minute."""
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=1))
    return {"strategy": strategy, "devices": SIZE}


def _train(rank: int, port: str, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(SIZE)}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    from method_table import CASES

    for case in CASES:
        parts = case.parts()
        case.fit(folder / str(case), parts=parts, **arguments())
        # Not the statistics of batch norms: each process has its own until the next step.
        torch.save({n: p.detach() for n, p in parts.module.named_parameters()}, folder / f"{case}-{rank}.pt")
    torch.distributed.destroy_process_group()
