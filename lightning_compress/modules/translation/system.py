"""What Pix2Pix and CycleGAN share: a step of two optimisers, the schedule, evaluation, and what a resumed run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsIndex, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from lightning_compress.core.images import as_bytes
from lightning_compress.core.losses import LossTermsMixin
from lightning_compress.core.optimizers import check_precision
from lightning_compress.core.schedules import linear
from lightning_compress.core.surgery import attach_record
from lightning_compress.modules._optimizers import advance_schedules
from lightning_compress.modules.translation.losses import GANMode, check_mode, full, gan_loss, gradient_penalty

Images = dict[str, Tensor]
Metrics = Sequence[Metric] | Mapping[str, Sequence[Metric]]
GeneratorLossTerm = Callable[[Images, Images], Mapping[str, Tensor]]

PICTURES = 4  # images in a picture for the logger


@dataclass(frozen=True)
class Direction:
    """One way in which images are translated.

    Attributes:
        name: ``"ab"`` or ``"ba"``.
        generator: name of the submodule that translates.
        discriminator: name of the submodule that judges its translations.
        source: key of what it translates, in `inputs`.
        target: key of real images of the other kind, in `inputs`.
        fake: key of the translations, in `fakes`.
        conditional: whether the discriminator sees the source beside the image.
    """

    name: str
    generator: str
    discriminator: str
    source: str
    target: str
    fake: str
    conditional: bool = False

    def shown(self, source: Tensor, image: Tensor) -> Tensor:
        """What the discriminator sees: ``[source, image]`` along the channels, or the image alone."""
        return torch.cat([source, image], 1) if self.conditional else image


class RunList(list):
    """A list that belongs to a run: deep copies and pickles of it are empty."""

    def __deepcopy__(self, memo: Any) -> RunList:
        return RunList()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return RunList, ()


def papers_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Adam as in both papers."""
    return Adam(parameters, lr=2e-4, betas=(0.5, 0.999))


class TranslationGAN(LossTermsMixin, LightningModule):
    """Generators and discriminators that are trained against each other, with manual optimisation.

    A subclass names its `directions` and says in :meth:`compute_fakes`, :meth:`generator_loss` and
    :meth:`discriminator_loss` what is computed, and in `training_step` in which order.

    ``inputs`` are the images of a batch, ``{"a": (N, C, H, W), "b": ...}``; ``fakes`` what the generators made of them,
    with their graph, in float32 also under autocast. In a training step, the first call of each generator begins with
    its N real images: a forward hook finds their features in the first N samples.

    Args:
        optimizer: makes an optimiser from parameters, called for the generators and for the discriminators.
        gan_mode: ``"lsgan"``, ``"vanilla"``, ``"hinge"``, ``"wgan"`` or ``"wgangp"``.
        lambda_gp: weight of the gradient penalty of ``"wgangp"``.
        n_epochs: epochs at the full rate.
        n_epochs_decay: epochs after them, over which it falls to zero along a line.
        metrics: of validation and test, such as `FrechetDistance`: a list, of which each direction gets a copy, or one
            for each direction by its name. Their `update` gets translations and real images of the same kind, in
            [-1, 1]. Logged under their `name`, else that of their class.
        seed: of all that a step draws.
        input_shape: (channels, height, width) of an image, for `example_input_array`.
        channels_last: whether to compute in the channels-last memory format.

    Attributes:
        directions: in what ways images are translated; methods find their way by it.
        generator_loss_terms: callables (inputs, fakes) -> named scalars. These are added to the generators' loss as
            they are and logged as ``train/<name>``. A callback appends to it in `setup` and takes its own out in
            `teardown`.
        images_seen: training images so far, of all processes. `trainer.global_step` counts both optimisers' steps.
    """

    NOT_SAVED: tuple[str, ...] = ("optimizer", "metrics")

    directions: tuple[Direction, ...]

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        optimizer: OptimizerCallable,
        gan_mode: GANMode,
        lambda_gp: float,
        n_epochs: int,
        n_epochs_decay: int,
        metrics: Metrics | None,
        seed: int,
        input_shape: tuple[int, int, int],
        channels_last: bool,
    ) -> None:
        super().__init__()
        check_mode(gan_mode)
        at_least(0, lambda_gp=lambda_gp, n_epochs_decay=n_epochs_decay, seed=seed)
        at_least(1, n_epochs=n_epochs)
        self.save_hyperparameters(ignore=[*self.NOT_SAVED, *networks, "networks"])
        self.automatic_optimization = False
        for name, network in networks.items():
            self.add_module(name, network)
            if channels_last:
                network.to(memory_format=torch.channels_last)
        for direction in self.directions:  # judges are not deployed: left out of accounts and exports
            self.discriminator_of(direction).training_only = True  # type: ignore[assignment]
        self.optimizer = optimizer
        self.gan_mode = gan_mode
        self.lambda_gp = lambda_gp
        self.n_epochs = n_epochs
        self.n_epochs_decay = n_epochs_decay
        self.seed = seed
        self.input_shape = tuple(input_shape)
        self.channels_last = channels_last
        self.example_input_array = torch.zeros(1, *input_shape)
        self.metrics = self._metrics(metrics or ())
        self.generator_loss_terms: list[GeneratorLossTerm] = RunList()
        self.images_seen = 0

    def _metrics(self, given: Metrics) -> nn.ModuleDict:
        """The metrics of every direction, by their name."""
        names = [direction.name for direction in self.directions]
        if not isinstance(given, Mapping):
            if len(names) > 1 and any(getattr(metric, "needs_real", True) is False for metric in given):
                raise ValueError("metrics: statistics are of one kind of image; give {'ab': [...], 'ba': [...]}.")
            given = dict.fromkeys(names, given)
        if strange := set(given) - set(names):
            raise ValueError(f"metrics: there is no direction {', '.join(strange)}, only {', '.join(names)}.")
        metrics = nn.ModuleDict({name: nn.ModuleDict() for name in names})
        for direction, several in given.items():
            for metric in several:
                name = str(getattr(metric, "name", type(metric).__name__))
                if name in (of_direction := cast(nn.ModuleDict, metrics[direction])):
                    raise ValueError(f"metrics: there are two named {name}.")
                of_direction[name] = metric.clone()
        return metrics

    # ---- what a subclass says

    def compute_fakes(self, inputs: Images) -> Images:
        """Translate a training batch."""
        raise NotImplementedError

    def generator_loss(self, inputs: Images, fakes: Images) -> Images:
        """What the generators minimise: named scalars, with their weights."""
        raise NotImplementedError

    def discriminator_loss(self, inputs: Images, fakes: Images) -> Images:
        """What the discriminators minimise: named scalars, with their weights."""
        raise NotImplementedError

    # ---- steps

    def forward(self, images: Tensor) -> Tensor:
        """Translate images of kind a, (N, C, H, W) in [-1, 1], to kind b."""
        return self.generator_of(self.directions[0])(self._laid_out(images))

    def generator_of(self, direction: Direction) -> nn.Module:
        return getattr(self, direction.generator)

    def discriminator_of(self, direction: Direction) -> nn.Module:
        return getattr(self, direction.discriminator)

    def inputs_of(self, batch: Any, split: str = "train") -> Images:
        """The images of a batch (a, b). Where both are translated, one of the two may be None in evaluation.

        Raises:
            MisconfigurationException: it is no such pair.
        """
        pair = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else ()
        images = [image for image in pair if image is not None]
        whole = len(images) == 2 or (len(images) == 1 and split != "train" and len(self.directions) == 2)
        if not whole or not all(isinstance(image, Tensor) and image.is_floating_point() for image in images):
            got = f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else _describe(batch)
            raise MisconfigurationException(
                f"{type(self).__name__}: the {split} batches must be (images a, images b), float in [-1, 1], got {got}."
            )
        return {key: self._laid_out(image) for key, image in zip("ab", pair, strict=True) if image is not None}

    def fooling_loss(self, direction: Direction, inputs: Images, fakes: Images) -> Tensor:
        """How little a direction's translations pass for real ones, a scalar."""
        logits = self.discriminator_of(direction)(direction.shown(inputs[direction.source], fakes[direction.fake]))
        return gan_loss(logits, True, self.gan_mode, for_discriminator=False)

    def telling_loss(self, direction: Direction, source: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """How little a direction's discriminator tells real images from translations, a scalar."""
        discriminator = self.discriminator_of(direction)
        fake, real = direction.shown(source, fake.detach()), direction.shown(source, real)
        on_fake, on_real = together(discriminator, fake, real)
        loss = 0.5 * (
            gan_loss(on_fake, False, self.gan_mode, for_discriminator=True)
            + gan_loss(on_real, True, self.gan_mode, for_discriminator=True)
        )
        if self.gan_mode == "wgangp":
            loss = loss + self.lambda_gp * gradient_penalty(discriminator, real, fake)
        return loss

    def train_generators(self, inputs: Images, fakes: Images, batch: Any, batch_idx: int) -> Tensor:
        """A step of the generators, with all loss terms that were added; returns the loss."""
        losses = dict(self.generator_loss(inputs, fakes))
        for term in self.generator_loss_terms:
            for name, value in term(inputs, fakes).items():
                if name in losses:
                    raise ValueError(f"generator_loss_terms: there are two terms {name!r}.")
                losses[name] = value
        loss = torch.stack(list(losses.values())).sum()
        loss = loss + self.loss_terms(loss, batch, batch_idx)
        self.improve(cast(list[LightningOptimizer], self.optimizers())[0], loss)
        self.log_losses(losses | {"generators": loss}, len(inputs["a"]))
        return loss.detach()

    def train_discriminators(self, inputs: Images, fakes: Images) -> Tensor:
        """A step of the discriminators; returns the loss."""
        losses = self.discriminator_loss(inputs, fakes)
        loss = torch.stack(list(losses.values())).sum()
        self.improve(cast(list[LightningOptimizer], self.optimizers())[1], loss)
        self.log_losses(losses, len(inputs["a"]))
        return loss.detach()

    def improve(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        """One step of an optimiser down the gradient of a loss."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def log_losses(self, losses: Images, batch_size: int) -> None:
        for name, value in losses.items():
            self.log(
                f"train/{name}", value.detach(), prog_bar=name in ("generators", "student"), on_step=False,
                on_epoch=True, sync_dist=True, batch_size=batch_size,
            )  # fmt: skip

    def count(self, inputs: Images) -> None:
        """Count the images of a step, of all processes."""
        self.images_seen += len(inputs["a"]) * self.trainer.world_size

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Draw from a stream that depends on `seed`, the process and `images_seen` alone, as a resumed run does."""
        devices = [self.device] if self.device.type == "cuda" else []
        stream = np.random.SeedSequence((self.seed, self.images_seen, self.global_rank))
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(stream.generate_state(1, np.uint64)[0]))
            yield

    # ---- evaluation

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        inputs, fakes = self._evaluate("val", batch)
        if batch_idx == dataloader_idx == 0 and not self.trainer.sanity_checking:
            self._picture(inputs, fakes)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | Images:
        """Return translations as bytes: of images a tensor, of pairs a dict with ``fake_b`` and so on."""
        if isinstance(batch, Tensor):
            return as_bytes(self(batch))
        inputs = self.inputs_of(batch, "predict")
        given = [direction for direction in self.directions if direction.source in inputs]
        return {d.fake: as_bytes(self.generator_of(d)(inputs[d.source])) for d in given}

    def scores(self, inputs: Images, fakes: Images) -> dict[str, tuple[Tensor, int]]:
        """Further scores of an evaluated batch: a mean, and over how many images."""
        return {}

    def _evaluate(self, split: str, batch: Any) -> tuple[Images, Images]:
        inputs = self.inputs_of(batch, split)
        fakes = {}
        for direction in self.directions:
            where = f"{split}/{direction.name}" if len(self.directions) > 1 else split
            if direction.source in inputs:
                fakes[direction.fake] = full(self.generator_of(direction)(inputs[direction.source]))
            for name, metric in cast(dict[str, Metric], self.metrics[direction.name]).items():
                metric.update(fakes.get(direction.fake), inputs.get(direction.target))
                attribute = f"metrics.{direction.name}.{name}"
                self.log(f"{where}/{name}", metric, metric_attribute=attribute, on_step=False, on_epoch=True)
        for name, (value, count) in self.scores(inputs, fakes).items():
            self.log(f"{split}/{name}", value, on_epoch=True, sync_dist=True, batch_size=count, prog_bar=True)
        return inputs, fakes

    def _picture(self, inputs: Images, fakes: Images) -> None:
        for direction in self.directions if self.trainer.is_global_zero else ():
            if direction.fake in fakes:
                columns = self.columns(direction, inputs, fakes)
                for logger in self.trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        title = f"val/{direction.name}: {', '.join(columns)}"
                        logger.experiment.add_image(title, grid(*columns.values()), self.global_step)

    def columns(self, direction: Direction, inputs: Images, fakes: Images) -> Images:
        """What a picture for the logger shows side by side."""
        columns = {"input": inputs[direction.source], "translation": fakes[direction.fake]}
        return columns | ({"target": inputs[direction.target]} if direction.conditional else {})

    # ---- optimisers

    def configure_optimizers(self) -> Any:
        """One for each of the :meth:`sides`, and its schedule."""
        optimizers = [self.optimizer(side) for side in self.sides()]
        return optimizers, [LambdaLR(optimizer, self.rate) for optimizer in optimizers]

    def sides(self) -> list[list[nn.Parameter]]:
        """Parameters of the generators, and all else that callbacks attached to the module; of the discriminators."""
        judges = {id(p): p for direction in self.directions for p in self.discriminator_of(direction).parameters()}
        metrics = {id(p) for p in self.metrics.parameters()}
        others = [p for p in self.parameters() if id(p) not in judges and id(p) not in metrics]
        return [others, list(judges.values())]

    @property
    def num_epochs(self) -> int:
        """Epochs after which the learning rate is zero."""
        return self.n_epochs + self.n_epochs_decay

    def rate(self, epoch: int) -> float:
        """What the learning rate is multiplied by: 1, then a line that would reach 0 in the epoch after the last.

        ``1 - max(0, epoch + 1 - n_epochs) / (n_epochs_decay + 1)``, epochs counted from 0.
        """
        return linear(epoch + 1, 1.0, 0.0, self.n_epochs, self.n_epochs + self.n_epochs_decay + 1)

    def on_train_epoch_end(self) -> None:
        advance_schedules(self.trainer)

    # ---- the run

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if "configure_optimizers" in vars(self):  # put there by the command line
            raise MisconfigurationException(
                f"{type(self).__name__} has an optimiser for generators and one for discriminators: give "
                "model.optimizer, and no --optimizer."
            )
        check_precision(self.trainer, type(self).__name__, "in small steps")
        last, end = self.num_epochs, self.trainer.max_epochs
        if end is not None and end > last:
            rank_zero_warn(
                f"n_epochs={self.n_epochs}, n_epochs_decay={self.n_epochs_decay}: the learning rate is zero from epoch "
                f"{last} on, the Trainer goes on to max_epochs={end}."
            )
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            if strategy._ddp_kwargs.get("static_graph"):
                raise MisconfigurationException("static_graph: a step has two backward passes, of two graphs.")
            # the default reducer expects one backward pass per step, through all parameters
            strategy._ddp_kwargs["find_unused_parameters"] = True
            rank_zero_info(f"{type(self).__name__}: DDP looks for unused parameters, as each backward pass has some.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["translation"] = {"images_seen": self.images_seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting, and let `load_from_checkpoint` open checkpoints of compressed networks."""
        attach_record(self)
        self.images_seen = checkpoint.get("translation", {}).get("images_seen", 0)

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.to(memory_format=torch.channels_last) if self.channels_last else images


def together(
    network: nn.Module, *batches: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, ...]:
    """What a network makes of several batches: in one call where samples do not touch each other, else one by one.

    They touch in a batch norm in train mode.

    Args:
        call: how the network is called; None calls it as it is.
    """
    call = network if call is None else call
    touching = network.training and any(isinstance(layer, _BatchNorm) for layer in network.modules())
    if touching or len({batch.shape[1:] for batch in batches}) > 1:
        return tuple(call(batch) for batch in batches)
    return call(torch.cat(batches)).split([len(batch) for batch in batches])


def grid(*columns: Tensor) -> Tensor:
    """Batches side by side, their first images one below the other: (C, rows H, columns W), uint8."""
    rows = min(PICTURES, *(len(column) for column in columns))
    pictures = [torch.cat(list(as_bytes(column[:rows]).expand(-1, 3, -1, -1)), 1) for column in columns]
    return torch.cat(pictures, 2)


def at_least(least: float, **values: float) -> None:
    """Raise for the first of the arguments that is smaller."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}.")


def _describe(batch: Any) -> str:
    if not isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__}"
    kinds = [str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__ for x in batch]
    return f"a {type(batch).__name__} of {', '.join(kinds) or 'nothing'}"
