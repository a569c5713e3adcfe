from __future__ import annotations

from math import cos, pi

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from lightning_compress.core import schedules
from lightning_compress.core.schedules import AdmmStepLR, Ramp, WarmupCosine, WarmupMultiStep


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # from 0.2 to 1.0 between epochs 2 and 6, at epochs 0, 2, 3, 4, 6, 7
        ("constant", [0.2, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.2, 0.2, 0.4, 0.6, 1.0, 1.0]),
        ("cosine", [0.2, 0.2, 0.2 + 0.8 * (1 - 0.5**0.5) / 2, 0.6, 1.0, 1.0]),
        ("cubic", [0.2, 0.2, 0.2 + 0.8 * (1 - 0.75**3), 0.9, 1.0, 1.0]),
    ],
)
def test_ramps(shape: str, expected: list[float]) -> None:
    ramp = Ramp(start=0.2, end=1.0, start_epoch=2, end_epoch=6, shape=shape)  # type: ignore[arg-type]
    assert [ramp(epoch) for epoch in (0, 2, 3, 4, 6, 7)] == pytest.approx(expected)
    assert ramp(3) == getattr(schedules, shape)(3, start=0.2, end=1.0, start_epoch=2, end_epoch=6)


@pytest.mark.parametrize("shape", ["linear", "cosine", "cubic"])
def test_ramps_end_on_their_values_to_the_last_bit_and_may_fall(shape: str) -> None:
    ramp = Ramp(start=0.7, end=0.1, start_epoch=0, end_epoch=3, shape=shape)  # type: ignore[arg-type]
    values = [ramp(epoch / 4) for epoch in range(13)]
    assert values[0] == 0.7
    assert values[-1] == 0.1
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "cubic"])
def test_a_ramp_without_length_jumps(shape: str) -> None:
    ramp = Ramp(start=0.0, end=0.5, start_epoch=3, end_epoch=3, shape=shape)  # type: ignore[arg-type]
    assert [ramp(2.9), ramp(3), ramp(3.1)] == [0.0, 0.5, 0.5]


def test_ramp_errors() -> None:
    with pytest.raises(ValueError, match=r"shape: expected one of constant, .*, got 'Cubik'. Did you mean 'cubic'"):
        Ramp(0, 1, 0, 1, shape="Cubik")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="end_epoch: 1 is before start_epoch=2"):
        Ramp(0, 1, 2, 1)


def rates(make: type[LRScheduler], steps: int, base: float = 0.1, **arguments) -> list[float]:
    """The learning rate that each of the first ``steps`` steps uses."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler = make(optimizer, **arguments)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def published(epoch: int, step: int, steps_per_epoch: int, scheduled: float) -> float:
    """As the papers' scripts write it, with 5 epochs of warm-up."""
    if epoch < 5:
        return scheduled * (1 + step + epoch * steps_per_epoch) / (5 * steps_per_epoch)
    return scheduled


@pytest.mark.parametrize("n", [1, 3])
def test_multistep_with_warmup_is_the_published_imagenet_schedule(n: int) -> None:
    expected = [
        published(e, i, n, 0.1 * 0.1 ** (e // 30 + (e >= 80)))  # every 30 epochs, and once more from 80
        for e in range(90)
        for i in range(n)
    ]
    assert rates(WarmupMultiStep, 90 * n, steps_per_epoch=n) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 3])
def test_multistep_that_counts_from_1_is_ffsds_imagenet_schedule(n: int) -> None:
    expected = [published(e, i, n, 0.1 * 0.1 ** (e // 30 + (e >= 80))) for e in range(1, 91) for i in range(n)]
    arguments = {"milestones": [30, 60, 80, 90], "steps_per_epoch": n, "first_epoch": 1}
    assert rates(WarmupMultiStep, 90 * n, **arguments) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 3])
def test_cosine_with_warmup_is_the_published_schedule(n: int) -> None:
    expected = [published(e, i, n, 0.5 * 0.1 * (1 + cos(pi * (e - 5) / (20 - 5)))) for e in range(20) for i in range(n)]
    assert rates(WarmupCosine, 20 * n, epochs=20, steps_per_epoch=n) == pytest.approx(expected)


def test_without_warmup_it_is_torchs_multistep() -> None:
    theirs = rates(torch.optim.lr_scheduler.MultiStepLR, 150, milestones=[50, 100])
    assert rates(WarmupMultiStep, 150, milestones=[50, 100], warmup_epochs=0) == pytest.approx(theirs)


def test_the_cosine_holds_its_last_rate() -> None:
    used = rates(WarmupCosine, 15, epochs=10, warmup_epochs=0)
    assert used[10:] == [used[9]] * 5
    assert used[9] == pytest.approx(0.05 * (1 + cos(pi * 0.9)))


def test_every_group_keeps_its_own_rate_and_state_loads_as_plain_values(tmp_path) -> None:
    def make() -> tuple[torch.optim.Optimizer, WarmupMultiStep]:
        groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.1)]
        optimizer = torch.optim.SGD(groups)
        return optimizer, WarmupMultiStep(optimizer, warmup_epochs=2, steps_per_epoch=2, milestones=[3])

    optimizer, scheduler = make()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    torch.save(scheduler.state_dict(), tmp_path / "state.pt")

    _, resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.step()
    optimizer.step()
    scheduler.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr() == [1.0, 0.1]


def test_schedule_errors() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="epochs: expected more than warmup_epochs=5, got 5"):
        WarmupCosine(optimizer, epochs=5)
    with pytest.raises(ValueError, match="steps_per_epoch: expected 1 or more, got 0"):
        WarmupMultiStep(optimizer, steps_per_epoch=0)
    with pytest.raises(ValueError, match="warmup_epochs: expected 0 or more, got -1"):
        WarmupMultiStep(optimizer, warmup_epochs=-1)


def test_a_warm_up_may_come_from_above_zero() -> None:
    assert rates(WarmupMultiStep, 6, 1.0, milestones=[5], warmup_epochs=4, warmup_start=0.2) == pytest.approx(
        [0.4, 0.6, 0.8, 1.0, 1.0, 0.1]
    )
    with pytest.raises(ValueError, match=r"warmup_start: expected a factor in \[0, 1\], got 1.5"):
        rates(WarmupMultiStep, 1, 1.0, warmup_start=1.5)


def test_admm_periods_restart_and_drop_by_thirds() -> None:
    """As in the pruning code of arXiv:1909.05073: T = 20, a tenth at each third of a period, then retraining."""
    period = [1e-2] * 7 + [1e-3] * 7 + [1e-4] * 6
    found = rates(AdmmStepLR, 44, 0.01, period=20, end_epoch=40, retrain=0.5, milestones=[42])
    assert found == pytest.approx(period * 2 + [5e-3] * 2 + [5e-4] * 2)


def test_admm_periods_begin_where_the_method_does() -> None:
    found = rates(AdmmStepLR, 8, 1.0, period=2, parts=2, start_epoch=3)
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 1, 0.1, 1])


@pytest.mark.parametrize("arguments", [{"period": 0}, {"parts": 0}])
def test_impossible_admm_periods(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        rates(AdmmStepLR, 1, **arguments)
