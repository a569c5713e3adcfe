"""When all this happens: gates in `setup`, losses in every training step, paths counted in validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchvision.models import VGG

from lightning_compress.callbacks.pruning.architecture_decoupling.gates import (
    NAME,
    Gate,
    Init,
    attach_gates,
    gates_of,
    silenced,
    watching,
)
from lightning_compress.callbacks.pruning.architecture_decoupling.losses import (
    KLDirection,
    divergence_loss,
    information_loss,
    sparsity_loss,
)
from lightning_compress.callbacks.pruning.architecture_decoupling.paths import PathStatistics
from lightning_compress.callbacks.pruning.architecture_decoupling.semhash import SemHash
from lightning_compress.callbacks.pruning.architecture_decoupling.units import Structure, trace_units
from lightning_compress.core import plots
from lightning_compress.core.batches import targets_of
from lightning_compress.core.calibration import recalibrate_batch_norm, training_inputs
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.losses import add_loss_term, around_training_step
from lightning_compress.core.meta import evaluating
from lightning_compress.core.optimizers import check_optimizers
from lightning_compress.core.profile import profile
from lightning_compress.core.report import LayerCost, close_account, log_figure, open_account
from lightning_compress.core.select import match
from lightning_compress.core.surgery import (
    attach_record,
    change_in_setup,
    check_trainer,
    resume_in_setup,
)
from lightning_compress.networks import CIFARVGG, CIFARResNet

BATCH = 128  # images at once, where paths are counted on training images


class ArchitectureDecoupling(Callback):
    """Let every image choose its filters: a small controller before each convolution gates what it puts out.

    Weights stay where they are and all are kept; what an image does not select need not be computed. See
    :func:`.dynamic.dynamic_copy` for a network that skips it, and :mod:`.paths` for what paths tell.

    Args:
        include: globs of the names of convolutions that get a gate.
        exclude: globs of the names of those that get none; the first convolution, which reads the image, if None.
        reduction: T; a controller's hidden layer has C_in // T units.
        lambda_k: weight of L_k, by which masks follow the responses.
        lambda_m: weight of L_m, by which masks tell the class. The defaults are the paper's for ResNet-56.
        lambda_s: weight of L_s, by which filters are few. It sums over layers and filters: wide networks need less.
        target_density: R, the share of ones that L_s leads to; 0 for as few as the other losses let it.
        semhash: which part of the training masks is binary: ``"sample"`` half of the samples, ``"element"`` half of
            the entries, ``"official"`` what the authors' code draws, see :func:`.semhash.draw_binary`.
        kl_direction: the order of L_k; None takes that of the authors' code for the network: ``"out_from_mask"`` for
            VGG and ResNet-20, else ``"mask_from_out"``. See :func:`.losses.divergence_loss`.
        num_classes: of the labels; None takes the width of the network's output.
        init: how controllers start, see :class:`.gates.Gate`. The authors' code ends with ``"kaiming"`` in the CIFAR
            ResNets and GoogLeNet, which then start near chance.
        recalibrate_bn: training batches of 128 to run at the end with binary masks, for the statistics of batch norms,
            which training gathered with soft and noisy ones. Not with averages of the weights.
        num_batches: training batches of 128 on which paths are counted at the end if validation did not just do it.
        seed: of the controllers' first weights, and of the noise. The noise of a step depends on seed, process, epoch
            and batch alone, so that a resumed run draws the same.

    The module's output must be logits, its batches must carry labels. With several processes, L_s with a target
    compares the mean over all of them; everything else is ordinary gradient averaging. Activation checkpointing needs
    ``use_reentrant=False``.

    What is stored: the controllers, and which convolutions they gate, in the module's own `state_dict`;
    `lightning_compress.load` brings both back, and the network needs no callback to run.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            convolution, or a network without any.

    Example::

        from lightning_compress.callbacks import ArchitectureDecoupling
        trainer = Trainer(callbacks=[ArchitectureDecoupling(lambda_s=2e-4)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/architecture_decoupling``.
    """

    def __init__(
        self,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
        reduction: int = 4,
        lambda_k: float = 1.0,
        lambda_m: float = 0.01,
        lambda_s: float = 1.5e-4,
        target_density: float = 0.0,
        semhash: SemHash = "sample",
        kl_direction: KLDirection | None = None,
        num_classes: int | None = None,
        init: Init = "zero",
        recalibrate_bn: int = 0,
        num_batches: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check("reduction", reduction, reduction >= 1, "a whole number of at least 1")
        for argument, value in (("lambda_k", lambda_k), ("lambda_m", lambda_m), ("lambda_s", lambda_s)):
            _check(argument, value, value >= 0, "a weight of at least 0")
        _check("target_density", target_density, 0 <= target_density <= 1, "a share from 0 to 1")
        _check("semhash", semhash, semhash in ("sample", "element", "official"), "'sample', 'element' or 'official'")
        directions = ("mask_from_out", "out_from_mask", None)
        _check("kl_direction", kl_direction, kl_direction in directions, "'mask_from_out', 'out_from_mask' or None")
        _check("num_classes", num_classes, num_classes is None or num_classes >= 2, "a whole number of at least 2")
        _check("init", init, init in ("zero", "kaiming"), "'zero' or 'kaiming'")
        _check("recalibrate_bn", recalibrate_bn, recalibrate_bn >= 0, "a number of batches, or 0")
        _check("num_batches", num_batches, num_batches >= 1, "a number of batches of at least 1")
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else exclude if exclude is None else list(exclude)
        self.reduction = reduction
        self.lambda_k = lambda_k
        self.lambda_m = lambda_m
        self.lambda_s = lambda_s
        self.target_density = target_density
        self.semhash = semhash
        self.kl_direction = kl_direction
        self.num_classes = num_classes
        self.init = init
        self.recalibrate_bn = recalibrate_bn
        self.num_batches = num_batches
        self.seed = seed
        self.statistics: PathStatistics | None = None  # of the last validation
        self._counted_at = -1  # the step after which they were taken
        self._handles: list[Any] = []
        self._seen: list[tuple[Gate, Tensor, Any]] = []  # of this step: gate, mask, pooled output
        self._masks: dict[str, list[Tensor]] = {}  # of this validation batch
        self._watching = ExitStack()
        self._left_alone: dict[str, str] = {}

    # ---- structure

    @property
    def state_key(self) -> str:
        names = ("include", "exclude", "reduction", "num_classes", "init", "seed")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        record = attach_record(pl_module)
        if stage != "fit":
            return
        if self.recalibrate_bn:
            check_trainer(trainer, "ArchitectureDecoupling(recalibrate_bn)", in_fit=True)
        open_account(trainer, pl_module)
        resume_in_setup(trainer, pl_module, by=self.state_key)
        with silenced(pl_module):
            structure = trace_units(pl_module, find_example_input(trainer, pl_module))
        self._left_alone = structure.left_alone
        if not any(step["by"] == self.state_key for step in record.steps):
            change_in_setup(trainer, pl_module, attach_gates, self._plan(pl_module, structure), by=self.state_key)
        mine = next(step for step in record.steps if step["by"] == self.state_key)["arguments"]["units"]
        if getattr(trainer.strategy, "_layer_sync", None) and any(
            unit["sink"] == unit["norm"] for unit in mine.values()
        ):
            raise MisconfigurationException(
                "ArchitectureDecoupling gates the output of batch norms, which sync_batchnorm=True replaces by others. "
                "Leave it off."
            )
        self._train_with(trainer, pl_module, {name: gates_of(pl_module)[name] for name in mine})

    def _plan(self, pl_module: LightningModule, structure: Structure) -> dict[str, Any]:
        """The arguments of `attach_gates`."""
        taken = gates_of(pl_module)
        units = {name: unit for name, unit in structure.units.items() if name not in taken}
        chosen = match(units, self.include, "include") if units else []
        refused = [structure.stem] if self.exclude is None else match(units, self.exclude, "exclude")
        units = {name: units[name] for name in chosen if name not in refused}
        if not units:
            raise MisconfigurationException(
                f"ArchitectureDecoupling finds no convolution of {type(pl_module).__name__} that it could gate: "
                f"{dict(list(structure.left_alone.items())[:4])}"
            )
        return {
            "units": {name: asdict(unit) for name, unit in units.items()},
            "num_classes": self.num_classes or _width_of_output(structure),
            "reduction": self.reduction,
            "semhash": self.semhash,
            "init": self.init,
            "seed": self.seed,
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_optimizers(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        for gate in gates_of(pl_module).values():
            gate.seed = gate.watch = None
        self._watching.close()
        self._handles, self._seen, self._masks = [], [], {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    # ---- training

    def _train_with(self, trainer: Trainer, pl_module: LightningModule, gates: Mapping[str, Gate]) -> None:
        """Add the three losses over `gates`."""
        direction = self.kl_direction or _direction_of(pl_module)

        @contextmanager
        def around(batch: Any) -> Iterator[None]:
            place = trainer.global_rank, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx
            for name, gate in gates.items():
                gate.seed = _noise_seed(self.seed, *place, name)
            with watching(gates, lambda name, mask, pooled: self._seen.append((gates[name], mask, pooled))):
                yield
            self._seen = []

        def information(outputs: Any, batch: Any, batch_idx: int) -> Tensor:
            targets = targets_of(batch, "ArchitectureDecoupling")
            return sum_(information_loss(mask, gate.head.weight, targets) for gate, mask, _ in self._seen)

        def divergence(outputs: Any, batch: Any, batch_idx: int) -> Tensor:
            return sum_(divergence_loss(mask, pooled, direction) for _, mask, pooled in self._seen)

        def sparsity(outputs: Any, batch: Any, batch_idx: int) -> Tensor:
            ones = torch.stack([mask.sum(1).mean() for _, mask, _ in self._seen])
            widths = ones.new_tensor([mask.shape[1] for _, mask, _ in self._seen])
            pl_module.log(f"train/{slug}/density", (ones.detach() / widths).mean(), prog_bar=True)
            if self.target_density and trainer.world_size > 1:  # the value of all processes, the gradient of this one
                ones = ones + (trainer.strategy.reduce(ones.detach().clone(), reduce_op="mean") - ones.detach())
            return sparsity_loss(ones, widths, self.target_density)

        def sum_(losses: Iterator[Tensor]) -> Tensor:
            if not self._seen:
                raise MisconfigurationException(
                    "ArchitectureDecoupling: the training step did not run the gated convolutions, or ran them without "
                    "the module's own hooks, as a compiled network does."
                )
            with torch.autocast(pl_module.device.type, enabled=False):
                return torch.stack(list(losses)).sum()

        slug = NAME + (f"_{self._number(trainer) + 1}" if self._number(trainer) else "")
        self._handles = [
            around_training_step(pl_module, "ArchitectureDecoupling", around),
            add_loss_term(pl_module, slug, "information", information, self.lambda_m),
            add_loss_term(pl_module, slug, "divergence", divergence, self.lambda_k),
            add_loss_term(pl_module, slug, "sparsity", sparsity, self.lambda_s),
        ]

    def _number(self, trainer: Trainer) -> int:
        """Position among the callbacks of this kind; the first one counts for all."""
        same: list[Any] = [c for c in trainer.callbacks if isinstance(c, ArchitectureDecoupling)]  # type: ignore[attr-defined]
        return same.index(self)

    # ---- counting paths

    def _counts(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking and self._number(trainer) == 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._counts(trainer):
            self._begin(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counts(trainer):
            try:
                targets = targets_of(batch, "ArchitectureDecoupling")
            except MisconfigurationException:  # of classes nothing is learnt then
                targets = None
            self._count(targets)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._counts(trainer):
            return
        statistics = self._end(trainer, pl_module)
        self._counted_at = trainer.global_step
        densities = statistics.densities
        totals = {
            "density": sum(densities.values()) / len(densities),
            "macs": sum(self._macs(trainer, pl_module, statistics).values()),
            "path_diversity": sum(statistics.diversity.values()) / len(densities),
        }
        for name, value in totals.items():
            pl_module.log(f"val/{NAME}/{name}", float(value), sync_dist=True)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                layers = {f"{NAME}/density/{name}": value for name, value in densities.items()}
                logger.log_metrics(layers, step=trainer.global_step)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the masks of all gates, and start counting."""
        gates = gates_of(pl_module)
        with silenced(pl_module):
            reads, _ = trace_units(pl_module, find_example_input(trainer, pl_module)).reads(gates)
        widths = {name: gate.expand.out_features for name, gate in gates.items()}
        self.statistics = PathStatistics(widths, reads, next(iter(gates.values())).head.out_features)
        self._masks = {name: [] for name in gates}
        self._watching.enter_context(watching(gates, lambda name, mask, _: self._masks[name].append(mask.detach())))

    def _count(self, targets: Tensor | None = None) -> None:
        """Add the masks since the last call."""
        if self.statistics is not None and all(self._masks.values()):
            self.statistics.update({name: torch.cat(masks) for name, masks in self._masks.items()}, targets)
        for masks in self._masks.values():
            masks.clear()

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> PathStatistics:
        """Watch no more; what was counted, in all processes."""
        self._watching.close()
        assert self.statistics is not None
        if trainer.world_size > 1:
            sums = self.statistics.flat().to(pl_module.device)
            self.statistics.load_flat(trainer.strategy.reduce(sums, reduce_op="sum"))
        return self.statistics

    def _macs(self, trainer: Trainer, pl_module: LightningModule, statistics: PathStatistics) -> dict[str, float]:
        """Mean MACs per image of every layer, controllers among them."""
        with silenced(pl_module):
            layers = profile(pl_module, find_example_input(trainer, pl_module)).layers
        own = {
            f"{NAME}.{name}.{part}": getattr(gate, part).weight.numel()
            for name, gate in gates_of(pl_module).items()
            for part in ("reduce", "expand")
        }
        return {**statistics.mean_macs({layer.name: layer.macs for layer in layers}), **own}

    # ---- the end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._number(trainer):
            return
        if self.recalibrate_bn:
            recalibrate_batch_norm(trainer, pl_module, self.recalibrate_bn, BATCH)
        if self.recalibrate_bn or self._counted_at != trainer.global_step:
            self._counted_at = -1
            self._begin(trainer, pl_module)
            with evaluating(pl_module):
                for images in training_inputs(trainer, pl_module, self.num_batches * BATCH, BATCH):
                    pl_module(trainer.precision_plugin.convert_input(images))
                    self._count()
            self._end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._number(trainer) or self.statistics is None:
            return
        macs = self._macs(trainer, pl_module, self.statistics)
        densities = self.statistics.densities
        where = "training" if self._counted_at < 0 else "validation"
        notes = [
            f"MACs are the mean over {int(self.statistics.images)} {where} images of what each of them needs. "
            f"{sum(densities.values()) / len(densities):.1%} of the filters are selected, none is removed.",
            "Latency is that of computing all filters and masking; dynamic_copy makes a network that skips them.",
        ]
        costs = {name: LayerCost(macs=round(macs[name])) for name in self.statistics.layers}
        close_account(trainer, pl_module, notes=notes, left_alone=self._left_alone, costs=costs)
        if trainer.is_global_zero and plots.available():
            self._draw(trainer, self.statistics)

    def _draw(self, trainer: Trainer, statistics: PathStatistics) -> None:
        shares = {
            "selected": list(statistics.densities.values()),
            "differs between two images": [
                statistics.diversity[name] / width for name, width in statistics.widths.items()
            ],
        }
        figure = plots.lines(shares, title="Path diversity", x_label="gated convolution", y_label="share of filters")
        log_figure(trainer, f"{NAME}/path_diversity", figure)
        if statistics.class_sizes.any():
            figure = plots.heat_map(
                statistics.class_frequencies,
                title="How often each class selects each filter",
                row_label="class",
                column_label="filter, layer by layer",
            )
            log_figure(trainer, f"{NAME}/class_paths", figure)


def _check(argument: str, value: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"ArchitectureDecoupling({argument}={value!r}): give {allowed}.")


def _width_of_output(structure: Structure) -> int:
    shapes = [shape for shape in structure.outputs if len(shape) == 2]
    if len(shapes) != 1:
        raise MisconfigurationException(
            f"ArchitectureDecoupling: num_classes cannot be told from outputs of shape {structure.outputs}; give it."
        )
    return shapes[0][1]


def _direction_of(module: nn.Module) -> KLDirection:
    """The order of L_k in the authors' code for a network."""
    for part in module.modules():
        if isinstance(part, (VGG, CIFARVGG)):
            return "out_from_mask"
        if isinstance(part, CIFARResNet) and len(part.layer1) + len(part.layer2) + len(part.layer3) == 9:  # ResNet-20
            return "out_from_mask"
    return "mask_from_out"


def _noise_seed(*place: int | str) -> int:
    """63 bits that are the same for the same seed, process, epoch, batch and layer."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
