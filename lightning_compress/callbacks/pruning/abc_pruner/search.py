"""Fitness by short training, and a search that loses nothing when it is killed."""

from __future__ import annotations

import copy
import logging
import os
import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_compress.callbacks.pruning.abc_pruner.colony import BeeColony, Code
from lightning_compress.core.example_input import training_loaders
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.surgery import ChannelPlan

Evaluate = Callable[[Code, int], tuple[float, ChannelPlan, dict[str, Tensor]]]


class Fitness:
    """What a metric says of a network after a few epochs of training, each network in a small Trainer of its own.

    Device, precision, accumulation and clipping are the outer Trainer's; there are no callbacks, files or bars. The
    loaders are made once. The learning rate stays at its initial value.

    Args:
        trainer: the outer Trainer, in a callback's `setup`.
        pl_module: the module that its `fit` got.
        monitor: name of a metric that validation logs; higher is better.
        epochs: length of the training; validation follows once, at its end.
        batches: training batches per epoch, if the outer Trainer takes so many; None for as many as it takes.

    Raises:
        MisconfigurationException: there is no validation data.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, monitor: str, epochs: int, batches: int | None
    ) -> None:
        self.monitor = monitor
        self._data: dict[str, Any]
        if trainer.datamodule is not None:  # type: ignore[attr-defined]
            self._data = {"datamodule": _with_one_set_of_loaders(trainer.datamodule)}  # type: ignore[attr-defined]
        else:
            validation = trainer.fit_loop.epoch_loop.val_loop._data_source
            if validation.instance is None or not validation.is_defined():
                raise MisconfigurationException(
                    f"ABCPruner(monitor={monitor!r}) judges networks by a metric of the validation data, and there is "
                    f"none: give `val_dataloaders` to `fit`."
                )
            loaders = {"train_dataloaders": training_loaders(trainer, pl_module)}
            self._data = {**loaders, "val_dataloaders": validation.dataloader()}
        self._outer = trainer
        limit = trainer.limit_train_batches
        if batches is not None:
            limit = min(batches, limit) if isinstance(limit, int) else batches
        self._length = {
            "max_epochs": epochs,
            "check_val_every_n_epoch": epochs,
            "limit_train_batches": limit,
            "limit_val_batches": trainer.limit_val_batches,
        }

    def rehearse(self, network: LightningModule) -> None:
        """One training and one validation batch, to see that it runs and logs the metric."""
        once = {"max_epochs": 1, "check_val_every_n_epoch": 1, "limit_train_batches": 1, "limit_val_batches": 1}
        self._fit(network, 0, once)

    def __call__(self, network: LightningModule, seed: int) -> float:
        """Train `network`, and return the metric.

        Raises:
            MisconfigurationException: there is no such metric.
        """
        return self._fit(network, seed, self._length)

    def _fit(self, network: LightningModule, seed: int, length: Mapping[str, Any]) -> float:
        for module in network.modules():
            if isinstance(module, Metric):  # each process trains another network
                module.distributed_available_fn = _never
                module.reset()
        network.configure_callbacks = list  # type: ignore[method-assign]
        with _silence():
            trainer = _small_trainer(self._outer, **length)
            if "datamodule" in self._data:
                self._data["datamodule"].trainer = trainer
                loaders = self._data["datamodule"].train_dataloader()
            else:
                loaders = self._data["train_dataloaders"]
            with _seeded(seed, loaders):
                trainer.fit(network, **self._data)
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise MisconfigurationException(
                f"ABCPruner(monitor={self.monitor!r}): validation logs no such metric, but {', '.join(metrics)}."
                f"{did_you_mean(self.monitor, metrics)}"
            )
        return float(metrics[self.monitor])


def _small_trainer(outer: Trainer, **length: Any) -> Trainer:
    clips = outer.gradient_clip_val is not None
    return Trainer(
        accelerator=outer.accelerator,
        strategy=SingleDeviceStrategy(outer.strategy.root_device),
        plugins=[LightningEnvironment()],  # not the cluster's, which would want its number of processes
        precision=outer.precision,
        accumulate_grad_batches=outer.accumulate_grad_batches,
        gradient_clip_val=outer.gradient_clip_val,
        gradient_clip_algorithm=outer.gradient_clip_algorithm if clips else None,
        devices=1,
        callbacks=[_ConstantRate()],
        logger=DummyLogger(),  # swallows what a module logs by hand
        default_root_dir=outer.default_root_dir,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **length,
    )


class _ConstantRate(Callback):
    """Learning rates stay as the optimisers were made with."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization:
            trainer.strategy.lr_scheduler_configs = []
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:  # a warm-up has changed the rate already
                    group["lr"] = group.get("initial_lr", group["lr"])


@contextmanager
def _seeded(seed: int, loaders: Any) -> Iterator[None]:
    """Everything random begins with `seed`, also in loaders with generators of their own; all is put back."""
    own = [loader.generator for loader in tree_leaves(loaders) if getattr(loader, "generator", None) is not None]
    states = [generator.get_state() for generator in own]
    with isolate_rng(include_cuda=torch.cuda.is_available()):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        for generator in (torch, *own):
            generator.manual_seed(seed)
        yield
    for generator, state in zip(own, states, strict=True):
        generator.set_state(state)


def _never() -> bool:
    return False


def _with_one_set_of_loaders(datamodule: LightningDataModule) -> LightningDataModule:
    """The same data, ready, whose loaders are made at the first request and kept."""
    data: Any = copy.copy(datamodule)
    data.train_dataloader, data.val_dataloader = cache(data.train_dataloader), cache(data.val_dataloader)
    data.prepare_data = lambda: None
    data.setup = data.teardown = lambda stage: None
    return data


@contextmanager
def _silence() -> Iterator[None]:
    """Hundreds of Trainers have nothing to say."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    loggers += [logging.getLogger(f"{logger.name}.utilities.rank_zero") for logger in loggers]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass
class Found:
    """The best structure so far, with what belongs to it and to nothing else.

    Attributes:
        code: one number per layer or block.
        fitness: of the network with these weights.
        kept: layer -> kept filters.
        weights: of the narrow network after its short training.
    """

    code: list[int] = field(default_factory=list)
    fitness: float = 0.0
    kept: dict[str, list[int]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class PlanFile:
    """A search on disk: its colony and its best network, written together after every evaluation.

    Attributes:
        settings: what the search depends on, plain data; it continues only under the same.
        widths: filters of the layers that the code narrows.
        colony: state of the bees.
        found: the best network so far.
    """

    settings: dict[str, Any]
    widths: dict[str, int]
    colony: dict[str, Any]
    found: Found

    @property
    def finished(self) -> bool:
        return self.colony["phase"] == "done"

    def save(self, path: Path) -> None:
        """Write it whole or not at all: a kill in between leaves the file of the evaluation before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.part")
        torch.save(asdict(self), beside)
        os.replace(beside, path)

    @classmethod
    def load(cls, path: Path) -> PlanFile:
        """
        Raises:
            MisconfigurationException: it is no such file, or is cut short.
        """
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
            return cls(**{**content, "found": Found(**content["found"])})
        except Exception as error:
            raise MisconfigurationException(
                f"ABCPruner(plan_file={str(path)!r}) cannot be read as a search ({type(error).__name__}: {error})."
            ) from error

    def check(self, path: Path, settings: Mapping[str, Any], widths: Mapping[str, int]) -> None:
        """Refuse a file of another network, or an unfinished search under other settings.

        Raises:
            MisconfigurationException: says what differs.
        """
        differ: dict[str, tuple[Any, Any]] = {"layers": (self.widths, dict(widths))} if self.widths != widths else {}
        if not self.finished:
            differ |= {k: (self.settings.get(k), v) for k, v in settings.items() if self.settings.get(k) != v}
        if differ:
            what, (theirs, ours) = next(iter(differ.items()))
            raise MisconfigurationException(
                f"ABCPruner(plan_file={str(path)!r}) holds {'a' if self.finished else 'an unfinished'} search with "
                f"other {what}: {theirs}, here {ours}. Name another file, or remove this one to search anew."
            )


def search(
    trainer: Trainer, colony: BeeColony, evaluate: Evaluate, plan: PlanFile, path: Path | None, reuse: bool
) -> None:
    """Let the bees fly until they are done; with several processes each evaluates one code of a batch.

    All processes hold the same colony, and rank 0 writes `plan` to `path` after every batch.

    Args:
        evaluate: (code, number of the evaluation) -> fitness, filters, trained weights.
        plan: is brought up to date.
        path: None writes nothing.
        reuse: whether a code seen before keeps its fitness, instead of being trained again with other filters.
    """
    rank, size = trainer.global_rank, trainer.world_size
    show = trainer.is_global_zero and getattr(trainer.progress_bar_callback, "is_enabled", False)
    columns = (TextColumn("ABCPruner: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show, transient=True) as bar:
        task = bar.add_task("first sources", total=colony.expected)
        while codes := colony.ask(size):
            known = dict(colony.history) if reuse else {}
            mine: tuple[float, Any, Any] = float("nan"), None, None
            if rank < len(codes) and codes[rank] not in known:
                mine = evaluate(codes[rank], len(colony.history) + rank)
            fitness = [mine[0]] if size == 1 else _gathered(trainer, mine[0])
            winner = colony.tell([known.get(c, f) for c, f in zip(codes, fitness, strict=False)])
            if winner is not None:
                kept, weights = trainer.strategy.broadcast((mine[1] and mine[1].to_dict(), mine[2]), winner)
                plan.found = Found(list(colony.best_code), colony.best_fitness, kept, weights)
            plan.colony = colony.state_dict()
            if path is not None and trainer.is_global_zero:
                plan.save(path)
            cycle = min(colony.cycle + 1, colony.max_cycle)
            where = "first sources" if colony.phase == "sources" else f"cycle {cycle} of {colony.max_cycle}"
            bar.update(
                task,
                completed=len(colony.history),
                total=max(colony.expected, len(colony.history)),
                description=f"{where}, best {colony.best_fitness:.4g}",
            )


def _gathered(trainer: Trainer, value: float) -> list[float]:
    """The values of all processes, in double precision: the bees of all must decide alike."""
    here = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    return trainer.strategy.all_gather(here).reshape(-1).tolist()


def fingerprint(module: nn.Module) -> int:
    """A checksum of all parameters and buffers."""
    value = 0
    for _, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0]):
        value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value
