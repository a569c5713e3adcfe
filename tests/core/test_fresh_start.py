"""A later phase begins as the first did, with whatever parameters are left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_compress.core.fresh_start import FreshStart


def trainer_with(module: nn.Module) -> Any:
    groups = [{"params": list(module.parameters())[:1], "lr": 0.5}, {"params": list(module.parameters())[1:]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=scheduler)])


def step(trainer: Any, module: nn.Module) -> None:
    trainer.optimizers[0].zero_grad()
    module(torch.ones(1, 4)).sum().backward()
    trainer.optimizers[0].step()
    trainer.lr_scheduler_configs[0].scheduler.step()


def rates(trainer: Any) -> list[float]:
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


def test_rates_memory_and_counters_go_back() -> None:
    module = nn.Linear(4, 3)
    trainer = trainer_with(module)
    start = FreshStart.of(trainer)
    step(trainer, module)
    step(trainer, module)
    assert rates(trainer) != [0.5, 0.1]
    start.restore_rates(trainer)
    assert rates(trainer) == [0.5, 0.1]
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 0
    assert trainer.optimizers[0].state  # momentum stays
    step(trainer, module)
    gone = trainer.optimizers[0].param_groups[1]["params"].pop()  # what a callback brought for the search
    start = FreshStart.from_state_dict(start.state_dict())
    start.restore(trainer)
    assert rates(trainer) == [0.5, 0.1]
    assert not trainer.optimizers[0].state
    assert all(p is not gone for group in trainer.optimizers[0].param_groups for p in group["params"])
    before = [p.detach().clone() for p in module.parameters()]
    step(trainer, module)
    assert not torch.equal(before[0], module.weight)
    assert torch.equal(before[1], module.bias)
