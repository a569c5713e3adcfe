"""Groups of optimisers that change after a user built them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from foreign import made
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import lr_scheduler as schedulers

from lightning_compress.core.optimizers import check_held, own_group

SCHEDULES = {
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.5**epoch),
    "steps": lambda o: schedulers.MultiStepLR(o, [1, 2]),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=6),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, min_lr=1e-4),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_group_of_its_own_follows_the_schedule(schedule):
    module = made()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = schedule(optimizer)
    trainer = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=scheduler)])
    own = [module.net.stem.weight, module.net.head.weight]
    own_group(trainer, own, lr_factor=10, weight_decay=0.0)
    first, second = optimizer.param_groups
    assert [id(p) for p in second["params"]] == [id(p) for p in own]
    assert len(first["params"]) == len(list(module.parameters())) - 2
    assert (first["weight_decay"], second["weight_decay"]) == (1e-3, 0.0)
    for _ in range(4):
        optimizer.step()
        scheduler.step(*([1.0] if "Plateau" in type(scheduler).__name__ else []))
        assert second["lr"] == pytest.approx(10 * first["lr"])


def test_without_parameters_the_group_is_made_all_the_same():
    optimizer = torch.optim.SGD(made().parameters(), lr=0.1)
    own_group(SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[]), [], lr_factor=2)
    assert optimizer.param_groups[1]["params"] == []


def test_parameters_that_no_optimiser_holds_are_named():
    module = made()
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(module.net.head.parameters(), lr=0.1)])
    check_held(trainer, {"head": module.net.head.weight}, "Method")
    with pytest.raises(MisconfigurationException, match=r"Method: no optimiser holds stem, bn\. Build it"):
        check_held(trainer, {"stem": module.net.stem.weight, "bn": module.net.bn.weight}, "Method")
