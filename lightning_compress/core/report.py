"""The account that every method ends with: what the network cost before and after, per layer and in total.

A callback calls :func:`open_account` in ``setup("fit")``, before it changes anything, and
:func:`close_account` in ``on_fit_end``. Methods that share a Trainer share one account.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_compress.core.account import Account
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.inference_copy import inference_copy, not_deployed
from lightning_compress.core.measurement import LayerCost, LayerRow, Measurement, count, measure, time_in_turns
from lightning_compress.core.surgery.compact import compact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Account",
    "LayerCost",
    "LayerRow",
    "Measurement",
    "close_account",
    "log_figure",
    "measure",
    "open_account",
    "run_folder",
]


@dataclass
class _Open:
    """An account while its fit runs; ``dense`` is the network as it was, to be timed beside the new one."""

    before: Measurement
    dense: nn.Module | None
    example_input: Any
    bits: dict[str, int] = field(default_factory=dict)
    costs: dict[str, LayerCost] = field(default_factory=dict)
    account: Account | None = None


_accounts: WeakKeyDictionary[LightningModule, _Open] = WeakKeyDictionary()


def open_account(trainer: Trainer, pl_module: LightningModule, example_input: Any = None) -> None:
    """Measure the module before anything is changed. The first call in a fit does so, later ones do nothing.

    Only rank 0 works, and without collectives. It keeps a copy of the module in main memory until the account
    is closed, so that both networks are timed in turns, on the same device.

    Args:
        trainer: the Trainer.
        pl_module: the module, as the user made it.
        example_input: an input of its forward; looked for by :func:`find_example_input` if None.

    Raises:
        MisconfigurationException: no example input was given or found.
        ValueError: the module's forward fails on it.
    """
    opened = _accounts.get(pl_module)
    if not trainer.is_global_zero or (opened is not None and opened.account is None):
        return
    if example_input is None:
        example_input = find_example_input(trainer, pl_module)
    dense = trainer.precision_plugin.convert_module(inference_copy(pl_module))  # to bfloat16, if the fit will
    _accounts[pl_module] = _Open(count(dense, example_input), dense, example_input)


def close_account(
    trainer: Trainer,
    pl_module: LightningModule,
    *,
    notes: Iterable[str] = (),
    left_alone: Iterable[tuple[str, str]] | Mapping[str, str] = (),
    bits: Mapping[str, int] | None = None,
    costs: Mapping[str, LayerCost] | None = None,
) -> Account | None:
    """Measure what the fit made of the module; print, log and save the account.

    The first caller in a fit measures, prints and logs. Later ones add what they have to say, and the files
    are written again; if they bring bits or costs, the table is printed and logged again too. With
    ``fast_dev_run`` no file is written.

    Args:
        trainer: the Trainer.
        pl_module: the module, compressed.
        notes: sentences for the reader.
        left_alone: layers that were not compressed, and why.
        bits: bits of the weights by layer (name or glob), from a method that quantised.
        costs: layer name -> what it costs, from a method whose saving the plain form of a layer does not show.

    Returns:
        The account on rank 0; None on other ranks, and when :func:`open_account` was not called.
    """
    opened = _accounts.get(pl_module)
    if not trainer.is_global_zero or opened is None:
        return None
    # layers for which another speaks in evaluation, see `inference_copy`, have nothing to store
    silent = not_deployed(pl_module)
    own_bits = {name: b for name, b in (bits or {}).items() if name not in silent}
    opened.bits.update({name.replace("_orig_mod.", ""): b for name, b in own_bits.items()})
    opened.costs.update(costs or {})
    news = bool(bits) or bool(costs) or opened.account is None
    if news:
        opened.account = _settle(trainer, pl_module, opened)
    account = opened.account
    assert account is not None
    left_alone = left_alone.items() if isinstance(left_alone, Mapping) else left_alone
    account.notes += [note for note in notes if note not in account.notes]
    account.left_alone += [entry for entry in left_alone if entry not in account.left_alone]
    if news:
        rich.print(account)
        for logger in trainer.loggers:
            logger.log_metrics(account.metrics(), step=trainer.global_step)
            logger.save()
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        account.save(run_folder(trainer))
        for name, figure in account.figures().items():
            _to_tensorboard(trainer, f"compression/{name}", figure)
    return account


def log_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Write a picture into the run's folder as ``<name>.png``, and into TensorBoard where that is the logger.

    On rank 0, and not with ``fast_dev_run``. Slashes in the name make no folders.
    """
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name.replace('/', '_')}.png")
        _to_tensorboard(trainer, name, figure)


def _to_tensorboard(trainer: Trainer, name: str, figure: Figure) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step, close=False)


def run_folder(trainer: Trainer) -> Path:
    """``trainer.log_dir``, the folder of this run, without its broadcast: one rank alone may ask."""
    folder = getattr(trainer.logger, "log_dir", None) or getattr(trainer.logger, "save_dir", None)
    return Path(folder if isinstance(folder, str) else trainer.default_root_dir)


def _settle(trainer: Trainer, pl_module: LightningModule, opened: _Open) -> Account:
    """The account with the module as it is now; both networks are timed the first time."""
    small = compact(inference_copy(pl_module), opened.example_input)
    after = count(small, opened.example_input, bits=opened.bits, costs=opened.costs)
    if opened.account is not None:
        return replace(opened.account, after=replace(after, latency=opened.account.after.latency))
    dense, opened.dense = opened.dense, None
    assert dense is not None
    device = trainer.strategy.root_device  # the module itself has left it by the end of the fit
    times = time_in_turns([dense.to(device), small.to(device)], opened.example_input)
    return Account(replace(opened.before, latency=times[0]), replace(after, latency=times[1]))
