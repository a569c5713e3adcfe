"""Values that change over the epochs: ramps for a method's quantities, and learning rates with warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_compress.core.select import did_you_mean


def constant(epoch: float, start: float, end: float, start_epoch: float, end_epoch: float) -> float:
    """Jump from ``start`` to ``end`` at ``start_epoch``; ``end_epoch`` plays no part."""
    return start if epoch < start_epoch else end


def linear(epoch: float, start: float, end: float, start_epoch: float, end_epoch: float) -> float:
    """Go from ``start`` at ``start_epoch`` to ``end`` at ``end_epoch`` in a straight line; hold outside.

    >>> [linear(epoch, 0.0, 0.8, 2, 6) for epoch in (0, 2, 4, 6, 9)]
    [0.0, 0.0, 0.4, 0.8, 0.8]
    """
    return _between(start, end, _progress(epoch, start_epoch, end_epoch))


def cosine(epoch: float, start: float, end: float, start_epoch: float, end_epoch: float) -> float:
    """Go from ``start`` to ``end`` along half a cosine wave: slow, fast, slow; hold outside."""
    return _between(start, end, (1 - cos(pi * _progress(epoch, start_epoch, end_epoch))) / 2)


def cubic(epoch: float, start: float, end: float, start_epoch: float, end_epoch: float) -> float:
    """Go from ``start`` to ``end`` fast at first, then ever slower; hold outside.

    Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
    arXiv:1710.01878, equation 1:  s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3.
    """
    return _between(start, end, 1 - (1 - _progress(epoch, start_epoch, end_epoch)) ** 3)


RAMPS: dict[str, Callable[..., float]] = {ramp.__name__: ramp for ramp in (constant, linear, cosine, cubic)}


@dataclass(frozen=True)
class Ramp:
    """A value for every epoch; call it with the epoch, which may be a fraction.

    Attributes:
        start: value up to ``start_epoch``.
        end: value from ``end_epoch`` on.
        start_epoch: where the change begins.
        end_epoch: where it is complete.
        shape: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"cubic"``, the functions of this file.

    Raises:
        ValueError: an unknown shape, or ``end_epoch`` before ``start_epoch``.

    >>> sparsity = Ramp(start=0.0, end=0.9, start_epoch=0, end_epoch=10)
    >>> [round(sparsity(epoch), 3) for epoch in (0, 5, 10)]
    [0.0, 0.787, 0.9]
    """

    start: float
    end: float
    start_epoch: float
    end_epoch: float
    shape: Literal["constant", "linear", "cosine", "cubic"] = "cubic"

    def __post_init__(self) -> None:
        if self.shape not in RAMPS:
            hint = did_you_mean(self.shape, RAMPS)
            raise ValueError(f"shape: expected one of {', '.join(RAMPS)}, got {self.shape!r}.{hint}")
        if self.end_epoch < self.start_epoch:
            raise ValueError(f"end_epoch: {self.end_epoch} is before start_epoch={self.start_epoch}.")

    def __call__(self, epoch: float) -> float:
        return RAMPS[self.shape](epoch, self.start, self.end, self.start_epoch, self.end_epoch)


class WarmupMultiStep(LambdaLR):
    """Multiply the learning rate by ``gamma`` at each milestone, after a linear warm-up.

    In step ``i`` (from 0) of epoch ``e``, with ``n`` steps per epoch and ``w`` warm-up epochs,

        factor = gamma^(milestones <= e) * min(1, s + (1 - s) (1 + i + e n) / (w n)).

    Some count ``e`` from 1 (`first_epoch`): theirs begins at 1 / w of the rate, and all comes an epoch earlier.

    The defaults are the 90-epoch ImageNet recipe of HRankPlus (arXiv:2002.10179, its later code) and
    FilterSketch (arXiv:2001.08514).

    Args:
        optimizer: its present learning rates are the full ones.
        milestones: epochs, counted from `first_epoch`.
        gamma: factor per milestone.
        warmup_epochs: 0 for none.
        steps_per_epoch: 1 when the schedule advances every epoch. When it advances every step, the optimiser
            steps in an epoch: images / (batch size * processes * accumulated batches), rounded up (5005 for
            ImageNet at 256).
        first_epoch: the number of the first epoch, 0 or 1.
        warmup_start: s, the factor that the warm-up comes from.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: list[int] | tuple[int, ...] = (30, 60, 80),
        gamma: float = 0.1,
        warmup_epochs: int = 5,
        steps_per_epoch: int = 1,
        first_epoch: int = 0,
        warmup_start: float = 0.0,
    ) -> None:
        def decay(epoch: int) -> float:
            return gamma ** sum(milestone <= epoch for milestone in milestones)

        factor = _with_warmup(decay, warmup_epochs, steps_per_epoch, warmup_start)
        super().__init__(optimizer, lambda step: factor(step + first_epoch * steps_per_epoch))


class WarmupCosine(LambdaLR):
    """Lower the learning rate along half a cosine wave, after a linear warm-up.

    With the symbols of `WarmupMultiStep` and ``E`` epochs in all,

        factor = (1 + cos(pi (e - w) / (E - w))) / 2 * min(1, (1 + i + e n) / (w n)),

    as HRankPlus (arXiv:2002.10179, its later code) and LBC write it: the wave also multiplies the warm-up;
    after it, the rate changes per epoch.

    Args:
        optimizer: its present learning rates are the full ones.
        epochs: epochs in all; later ones keep the last rate.
        warmup_epochs: 0 for none.
        steps_per_epoch: see `WarmupMultiStep`.

    Raises:
        ValueError: no epoch is left after the warm-up.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, warmup_epochs: int = 5, steps_per_epoch: int = 1) -> None:
        if epochs <= warmup_epochs:
            raise ValueError(f"epochs: expected more than warmup_epochs={warmup_epochs}, got {epochs}.")

        def wave(epoch: int) -> float:
            return (1 + cos(pi * (min(epoch, epochs - 1) - warmup_epochs) / (epochs - warmup_epochs))) / 2

        super().__init__(optimizer, _with_warmup(wave, warmup_epochs, steps_per_epoch))


class AdmmStepLR(LambdaLR):
    """Restart the learning rate in every ADMM period, with drops inside of it; then fine-tune by milestones.

        factor(e) = gamma^floor((e mod T) / (T / parts))    for start_epoch <= e < end_epoch, counted from start_epoch
                  = retrain * gamma^(milestones <= e)       from end_epoch on

    as in the ADMM pruning code of the group behind PCONV (arXiv:1909.05073) and ADMM-NN (arXiv:1907.02124): T = 20,
    thirds, gamma = 0.1.

    Args:
        optimizer: its present learning rates are the full ones.
        period: epochs between two updates, the callback's ``every_n_epochs``.
        gamma: factor of a drop.
        parts: of a period; each but the first begins with a drop.
        start_epoch: where the first period begins; the full rate before.
        end_epoch: where retraining with fixed masks begins, the callback's ``end_epoch``; None for never.
        retrain: factor for all of the retraining.
        milestones: epochs of the fit, of drops in the retraining.

    Raises:
        ValueError: `period` or `parts` below 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        period: int = 20,
        gamma: float = 0.1,
        parts: int = 3,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        retrain: float = 1.0,
        milestones: list[int] | tuple[int, ...] = (),
    ) -> None:
        if period < 1 or parts < 1:
            raise ValueError(f"period, parts: expected 1 or more, got {period} and {parts}.")

        def factor(epoch: int) -> float:
            if epoch < start_epoch:
                return 1.0
            if end_epoch is not None and epoch >= end_epoch:
                return retrain * gamma ** sum(milestone <= epoch for milestone in milestones)
            return gamma ** ((epoch - start_epoch) % period * parts // period)

        super().__init__(optimizer, factor)


def _with_warmup(
    by_epoch: Callable[[int], float], warmup_epochs: int, steps_per_epoch: int, start: float = 0.0
) -> Callable[[int], float]:
    """Multiply a factor per epoch by a linear warm-up per step; the result counts steps."""
    for argument, value, least in (
        ("warmup_epochs", warmup_epochs, 0),
        ("steps_per_epoch", steps_per_epoch, 1),
    ):
        if value < least:
            raise ValueError(f"{argument}: expected {least} or more, got {value}.")
    if not 0 <= start <= 1:
        raise ValueError(f"warmup_start: expected a factor in [0, 1], got {start}.")
    warmup_steps = warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        warm = start + (1 - start) * (step + 1) / warmup_steps if step < warmup_steps else 1.0
        return warm * by_epoch(step // steps_per_epoch)

    return factor


def _progress(epoch: float, start_epoch: float, end_epoch: float) -> float:
    """Share of the way from ``start_epoch`` to ``end_epoch``, in [0, 1]; a jump where they are equal."""
    if epoch >= end_epoch:
        return 1.0
    if epoch <= start_epoch:
        return 0.0
    return (epoch - start_epoch) / (end_epoch - start_epoch)


def _between(start: float, end: float, share: float) -> float:
    # this form gives `start` and `end` themselves, to the last bit
    return (1 - share) * start + share * end
