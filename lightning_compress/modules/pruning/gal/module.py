"""When all this happens: the training system."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed import DebugLevel, get_debug_level
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR

from lightning_compress.core import plots
from lightning_compress.core.losses import LossTermsMixin
from lightning_compress.core.meta import evaluating
from lightning_compress.core.report import close_account, log_figure, open_account
from lightning_compress.core.surgery import (
    attach_record,
    change_in_fit,
    change_in_setup,
    check_epoch,
    check_trainer,
    resume_in_setup,
    shrink_in_fit,
    undo_changes,
)
from lightning_compress.core.weights import load_weights
from lightning_compress.modules._optimizers import advance_schedules, gradient_scale
from lightning_compress.modules.image_classifier import ImageClassifier
from lightning_compress.modules.pruning.gal.adversary import (
    Regularizer,
    Variant,
    discriminator_loss,
    frozen,
    verdict,
)
from lightning_compress.modules.pruning.gal.cut import (
    CutPlan,
    cut_copy,
    fold,
    plan_cut,
    rehearse,
    remove_structures,
)
from lightning_compress.modules.pruning.gal.fista import FISTA
from lightning_compress.modules.pruning.gal.masks import MaskInit, Search, begin_search, mask_map
from lightning_compress.modules.pruning.gal.points import Point, find_points

NETWORK = "network."


def fine_tuning_optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
    """The authors': SGD with a rate of 1e-4."""
    return SGD(params, lr=1e-4, momentum=0.9, weight_decay=2e-4)


def fine_tuning_schedule(optimizer: Optimizer) -> LRScheduler:
    """The authors': a tenth of the rate every 30 epochs."""
    return StepLR(optimizer, 30)


class GAL(LossTermsMixin, ImageClassifier):
    """Search for the blocks, branches or channels that a network can do without, cut them out, fine-tune; in one fit.

    Epochs before `start_epoch` train the network by cross-entropy, for one that comes untrained. The next
    `search_epochs` learn masks, and look at no label. At the start of the epoch after them the network is cut, and from
    then on it is a plain, smaller network, trained by cross-entropy with an optimiser and a schedule of its own.

    Batches are (images, labels), in the search images alone will do. Logs what `ImageClassifier` logs, and in the
    search ``train/gal/discriminator``, ``train/gal/adversarial``, ``train/gal/data``, ``train/gal/l1`` (of the masks,
    without lambda) and ``gal/survivors``; at the end of the search, a picture of the masks.

    Args:
        network: see `ImageClassifier`; a trained one, unless `start_epoch` leaves time to train it.
        num_classes: number of classes.
        teacher: the network to imitate: a module, or a file of weights for a copy of `network`. None: `network` itself,
            as it is when the search begins.
        mask_points: ``"block"``, ``"branch"``, ``"channel"``, ``"joint"`` (blocks and the channels in them), ``"auto"``
            (the first of these that the network has), or globs of names of blocks, branches and layers.
        lambda_: weight of the l1 norm of the masks. Larger leaves less.
        miu: weight of the distance of the logits, a mean over images and classes.
        mask_step: the masks are updated in every so many-th batch of an epoch. 200 of CIFAR's 391 batches of 128 is one
            update per epoch: with a larger global batch (several processes!) give a smaller number.
        mask_init: how masks begin, see `Search`. ``"official"`` draws them from N(0, 1), so that about half of them are
            negative, and zero after the first update.
        lr: rate of all three optimisers of the search.
        momentum: of network and discriminator in the search.
        weight_decay: likewise. Masks do not decay.
        lr_decay_step: a tenth of the rate every so many epochs of the search.
        l1_in_grad: whether the l1 norm is also part of the gradient that FISTA steps along, as in the authors' code.
        restart_on_decay: whether FISTA forgets its momentum at the first update after each decay of the rate, which the
            authors' code means to do and never does.
        discriminator_variant: ``"official"`` or ``"plain"``, see `Discriminator`.
        discriminator_regularizer: ``"adversarial"``, ``"l2"`` or ``"l1"``, see `discriminator_loss`.
        thre: structures whose mask is at most this are cut out; above 0 the cut changes the function.
        teacher_train_bn: whether the teacher's batch norms are in train mode, as in the authors' code.
        start_epoch: epoch in which the search begins.
        search_epochs: its length. None: to the end of the fit; :meth:`prune` then gives the smaller network.
        seed: of the masks and the discriminator.
        optimizer: of the epochs with cross-entropy; the authors' for fine-tuning is the default.
        lr_scheduler: likewise; it begins anew after the cut.
        lr_scheduler_interval: see `ImageClassifier`.
        label_smoothing: see `ImageClassifier`.
        weights: file to load into the network.
        input_shape: (channels, height, width) of an image.
        channels_last: whether to compute in the channels-last memory format.

    What is stored: masks, discriminator and the optimisers' state while they are needed; what was cut, in the module's
    `state_dict` (see `lightning_compress.load`); the teacher's weights only where they cannot be loaded again.

    With several processes the masks' gradients are averaged like all others, and what is cut is decided on rank 0; with
    ``TORCH_DISTRIBUTED_DEBUG=INFO`` every update of the masks is checked to be the same everywhere.
    The optimisation is manual, so the Trainer neither accumulates nor clips gradients, and `trainer.global_step` counts
    the steps of the discriminator too.

    Raises:
        ValueError: an argument out of range, or names that match nothing.
        MisconfigurationException: the network has nothing to mask, or the Trainer cannot change networks.

    Example::

        module = GAL("resnet56", weights="resnet56.pt", lambda_=0.6)
        Trainer(max_epochs=200).fit(module, datamodule)

    Packaged config: ``method/gal``.
    """

    NOT_SAVED = (*ImageClassifier.NOT_SAVED, "teacher")

    def __init__(
        self,
        network: nn.Module | str,
        num_classes: int = 10,
        teacher: nn.Module | str | None = None,
        mask_points: str | list[str] = "auto",
        lambda_: float = 0.6,
        miu: float = 1.0,
        mask_step: int = 200,
        mask_init: MaskInit = "official",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 2e-4,
        lr_decay_step: int = 30,
        l1_in_grad: bool = True,
        restart_on_decay: bool = False,
        discriminator_variant: Variant = "official",
        discriminator_regularizer: Regularizer = "adversarial",
        thre: float = 0.0,
        teacher_train_bn: bool = False,
        start_epoch: int = 0,
        search_epochs: int | None = 100,
        seed: int = 0,
        optimizer: OptimizerCallable = fine_tuning_optimizer,
        lr_scheduler: LRSchedulerCallable | None = fine_tuning_schedule,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        weights: str | None = None,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        channels_last: bool = False,
    ) -> None:
        for name, value, least in (
            ("lambda_", lambda_, 0),
            ("miu", miu, 0),
            ("mask_step", mask_step, 1),
            ("lr", lr, 0),
            ("momentum", momentum, 0),
            ("weight_decay", weight_decay, 0),
            ("lr_decay_step", lr_decay_step, 1),
            ("thre", thre, 0),
            ("start_epoch", start_epoch, 0),
            ("search_epochs", search_epochs, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"GAL({name}={value}): give a number of at least {least}.")
        for name, given, kind in (
            ("mask_init", mask_init, MaskInit),
            ("discriminator_variant", discriminator_variant, Variant),
            ("discriminator_regularizer", discriminator_regularizer, Regularizer),
        ):
            if given not in get_args(kind):
                raise ValueError(f"GAL({name}={given!r}): give one of {', '.join(map(repr, get_args(kind)))}.")
        super().__init__(
            network, num_classes, optimizer, lr_scheduler, lr_scheduler_interval, label_smoothing, weights,
            input_shape, channels_last,
        )  # fmt: skip
        self.automatic_optimization = False
        self.mask_points = mask_points
        self.lambda_ = lambda_
        self.miu = miu
        self.mask_step = mask_step
        self.mask_init = mask_init
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.lr_decay_step = lr_decay_step
        self.l1_in_grad = l1_in_grad
        self.restart_on_decay = restart_on_decay
        self.discriminator_variant = discriminator_variant
        self.discriminator_regularizer = discriminator_regularizer
        self.thre = thre
        self.teacher_train_bn = teacher_train_bn
        self.start_epoch = start_epoch
        self.search_epochs = search_epochs
        self.seed = seed
        self.search: Search | None = None
        vars(self)["_teacher_given"] = teacher if isinstance(teacher, nn.Module) else None  # past nn.Module
        self._teacher_path = teacher if isinstance(teacher, str) else None
        self._weights_path = weights
        self._notes: list[str] = []
        self._set_teacher(None)

    # ---- phases

    @property
    def phase(self) -> Literal["training", "search", "fine-tuning"]:
        """Where the fit stands: before the search, in it, or behind the cut."""
        if self.search is not None:
            return "search"
        steps = attach_record(self).steps
        return "fine-tuning" if any(step["by"] == "GAL" for step in steps) else "training"

    def setup(self, stage: str) -> None:
        super().setup(stage)
        attach_record(self)
        if stage != "fit":
            return
        self._check_epochs()
        self._check_parts()
        check_trainer(self.trainer, "GAL", in_fit=True)
        with self._plain(self.network):
            open_account(self.trainer, self)
        resume_in_setup(self.trainer, self, by="GAL", required=False)
        if self.phase == "fine-tuning":
            return
        # what cannot work is found now, not hours later when the search begins
        teacher = self.teacher or self._make_teacher()
        if self.start_epoch == 0 or self.phase == "search":
            self._set_teacher(teacher)
        if self.phase == "training":
            arguments = self._search_arguments()
            rehearse(self.network, self._images(), [Point(**point) for point in arguments["points"]])
            if self.start_epoch == 0:
                change_in_setup(self.trainer, self, begin_search, arguments, by="GAL")

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_start(self) -> None:
        batches = self.trainer.num_training_batches
        if self.phase != "fine-tuning" and batches < self.mask_step:
            rank_zero_warn(
                f"GAL(mask_step={self.mask_step}): an epoch has {batches} batches, so the masks are never updated. "
                f"Give a mask_step of at most {batches}."
            )

    def on_train_epoch_start(self) -> None:
        epoch = self.trainer.current_epoch
        if self.phase == "training" and epoch >= self.start_epoch:
            self._set_teacher(self._make_teacher())
            change_in_fit(self.trainer, begin_search, self._search_arguments(), by="GAL")
            self.trainer.strategy.setup_optimizers(self.trainer)
        if self.phase == "search" and self.search_epochs is not None and epoch >= self.start_epoch + self.search_epochs:
            self._cut()
        if self.teacher is not None:
            self.teacher.train(self.teacher_train_bn)

    def on_train_epoch_end(self) -> None:
        if self.phase == "search" or self.lr_scheduler_interval == "epoch":
            advance_schedules(self.trainer)

    def on_fit_end(self) -> None:
        """Close the account; where the fit ends in the search, with what :meth:`prune` would leave."""
        network = self.network
        if self.search is not None:
            plan = self._plan(self.search)
            self._note(self.search, plan)
            network = cut_copy(network, plan)
        with self._plain(network):
            close_account(self.trainer, self, notes=self._notes)

    @contextmanager
    def _plain(self, network: nn.Module) -> Iterator[None]:
        """Be a classifier with this network and nothing else."""
        was = self.network, self.search
        self.network, self.search = network, None
        try:
            yield
        finally:
            self.network, self.search = was

    def teardown(self, stage: str) -> None:
        if self.teacher is not None:
            self.teacher.cpu()

    # ---- steps

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, num_classes); in the search, those of the masked network."""
        if self.search is None:
            return super().forward(images)
        with self.search.masking(self.network):
            return super().forward(images)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.search is not None:
            self._search_step(self.search, batch, batch_idx)
            return
        optimizer = self.optimizers()
        loss = self._step("train", batch, self.train_acc, self.label_smoothing)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss + self.loss_terms(loss, batch, batch_idx))
        optimizer.step()  # type: ignore[union-attr]
        if self.lr_scheduler_interval == "step":
            advance_schedules(self.trainer)

    def _search_step(self, search: Search, batch: Any, batch_idx: int) -> None:
        images = batch if isinstance(batch, Tensor) else batch[0]
        assert self.teacher is not None
        to_discriminator, to_network, to_masks = cast(list[LightningOptimizer], self.optimizers())
        with torch.no_grad():
            trained = self.teacher(images).float()
        masked = self(images).float()

        loss_d = discriminator_loss(search.discriminator, trained, masked.detach(), self.discriminator_regularizer)
        to_discriminator.zero_grad()
        self.manual_backward(loss_d)
        self._average_gradients(search.discriminator)
        to_discriminator.step()

        # D is already the better one; its forward is new
        adversarial = verdict(frozen(search.discriminator, masked), True)
        data = F.mse_loss(masked, trained)
        l1 = search.flat().abs().sum()
        loss = self.miu * data + adversarial + (self.lambda_ * l1 if self.l1_in_grad else 0.0)
        to_network.zero_grad()
        to_masks.zero_grad()
        self.manual_backward(loss + self.loss_terms(loss, batch, batch_idx))
        scale = gradient_scale(self.trainer)
        to_network.step()
        if (batch_idx + 1) % self.mask_step == 0:
            self._update_masks(cast(FISTA, to_masks.optimizer), scale, first=batch_idx + 1 == self.mask_step)

        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        log("train/loss", loss, prog_bar=True)
        for name, value in (("discriminator", loss_d), ("adversarial", adversarial), ("data", data), ("l1", l1)):
            log(f"train/gal/{name}", value)
        self.log("gal/survivors", self._survivors(search).float(), prog_bar=True, batch_size=len(images))

    def _survivors(self, search: Search) -> Tensor:
        """How many entries of all masks would stay."""
        return (search.flat() > self.thre).sum()

    def _update_masks(self, fista: FISTA, scale: float, first: bool) -> None:
        """FISTA, by the gradient of this batch alone; `scale` is what fp16 training multiplied it by."""
        epoch = self.trainer.current_epoch - self.start_epoch
        decayed = first and epoch > 0 and epoch % self.lr_decay_step == 0
        gradients = [m.grad for group in fista.param_groups for m in group["params"] if m.grad is not None]
        torch._foreach_div_(gradients, scale)
        if all(bool(g.isfinite().all()) for g in gradients):
            fista.step(restart=self.restart_on_decay and decayed)
        if self.trainer.world_size > 1 and get_debug_level() is not DebugLevel.OFF:
            mine = torch.cat([m for group in fista.param_groups for m in group["params"]])
            everywhere = cast(Tensor, self.all_gather(mine))
            if not bool((everywhere == mine).all()):
                raise RuntimeError(f"GAL: the masks of rank {self.trainer.global_rank} are not those of the others.")

    def _average_gradients(self, module: nn.Module) -> None:
        """What DDP does for all other parameters: it expects one backward pass per step, of one and the same set."""
        if self.trainer.world_size > 1:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            flat = self.trainer.strategy.reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="mean")
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    # ---- optimisers

    def configure_optimizers(self) -> Any:
        """[D, W, m] in the search, in which the schedules are one; else one for the network, by cross-entropy."""
        if self.search is None:
            optimizer = self.optimizer(self.network.parameters())
            return [optimizer], [] if self.lr_scheduler is None else [self.lr_scheduler(optimizer)]
        sgd = partial(SGD, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        optimizers = [
            sgd(self.search.discriminator.parameters()),
            sgd(self.network.parameters()),
            FISTA(self.search.masks.values(), lr=self.lr, gamma=self.lambda_),
        ]
        return optimizers, [StepLR(optimizer, self.lr_decay_step) for optimizer in optimizers]

    # ---- the cut

    def prune(self) -> nn.Module:
        """A plain, smaller copy of the network as it is now: zeros are cut out, other masks folded into the weights."""
        if self.search is None:
            return copy.deepcopy(self.network)
        return cut_copy(self.network, self._plan(self.search))

    def _cut(self) -> None:
        """Make the network what :meth:`prune` returns, in the middle of the fit."""
        assert self.search is not None
        plan = self.trainer.strategy.broadcast(self._plan(self.search))
        self._note(self.search, plan)
        plan = plan.named(NETWORK)
        fold(self, plan.scales)
        undo_changes(self, by="GAL")
        change_in_fit(self.trainer, remove_structures, plan.changes, by="GAL")
        if plan.cuts:
            shrink_in_fit(self.trainer, plan.cuts, by="GAL")
        self.trainer.strategy.setup_optimizers(self.trainer)
        self._set_teacher(None)

    def _plan(self, search: Search) -> CutPlan:
        if (search.flat() < 0).any():
            rank_zero_warn("GAL: some masks are negative, as they were never updated; the cut changes the function.")
        if not self._survivors(search):
            rank_zero_warn(f"GAL(lambda_={self.lambda_}): no mask is left, the search diverged; give a smaller one.")
        return plan_cut(self.network, self._images(), search.points, search.named(), self.thre)

    def _note(self, search: Search, plan: CutPlan) -> None:
        gone = ", ".join([*plan.blocks, *plan.branches])
        note = f"{int(self._survivors(search))} of {search.size} masks survived the search."
        self._notes = [f"{note} Cut out: {gone}." if gone else note]
        rank_zero_info(f"GAL: {self._notes[0]}")
        if self.trainer.is_global_zero and plots.available():
            values, rows = mask_map(search.points, search.named())
            columns = [str(i) for i in range(values.shape[1])]
            title = "Masks at the end of the search; white ones are cut out"
            log_figure(self.trainer, "gal/masks", plots.heat_map(values, title=title, rows=rows, columns=columns))

    # ---- the teacher: frozen, and no part of the module

    @property
    def teacher(self) -> nn.Module | None:
        """The network to imitate; None when there is no search."""
        return vars(self)["_teacher"]

    def _set_teacher(self, teacher: nn.Module | None) -> None:
        vars(self)["_teacher"] = teacher  # past nn.Module: not in the state dict, not in DDP
        self._fingerprint = "" if teacher is None else fingerprint(teacher)

    def _make_teacher(self) -> nn.Module:
        given = vars(self)["_teacher_given"]
        teacher = copy.deepcopy(self.network) if given is None else given
        if self._teacher_path is not None:
            try:
                load_weights(teacher, self._teacher_path)
            except ValueError as error:
                raise ValueError(f"teacher: {error}") from error
        return teacher.requires_grad_(False).to(self.device)

    def _reloadable(self) -> bool:
        """Whether a resumed run finds the same teacher without help."""
        if self.teacher_train_bn:
            return False
        path = self._weights_path if self.start_epoch == 0 else None
        return vars(self)["_teacher_given"] is not None or (self._teacher_path or path) is not None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.teacher is not None:
            path = self._teacher_path or self._weights_path
            entry: dict[str, Any] = {"path": path, "sha256": self._fingerprint}
            if not self._reloadable():
                entry["state_dict"] = self.teacher.state_dict()
            checkpoint["gal_teacher"] = entry

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replay what was cut, and find the teacher as it was."""
        super().on_load_checkpoint(checkpoint)
        entry = checkpoint.get("gal_teacher")
        if entry is None or self.teacher is None:
            return
        if "state_dict" in entry:
            self.teacher.load_state_dict(entry["state_dict"])
            self._fingerprint = entry["sha256"]
        elif entry["sha256"] != self._fingerprint:
            rank_zero_warn(
                f"GAL: the teacher is not the one that this run began with ({entry['path'] or 'given as a module'}); "
                f"the SHA-256 of its weights was {entry['sha256'][:12]}..., and is {self._fingerprint[:12]}..."
            )

    # ---- small matters

    def _check_epochs(self) -> None:
        check_epoch(self.trainer, "GAL", "start_epoch", self.start_epoch)
        end = self.trainer.max_epochs
        if end in (None, -1) or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.search_epochs is not None and self.start_epoch + self.search_epochs >= end:
            rank_zero_warn(
                f"GAL(search_epochs={self.search_epochs}): the Trainer stops after max_epochs={end}, before the cut. "
                f"prune() gives the smaller network then."
            )

    def _check_parts(self) -> None:
        if "configure_optimizers" in vars(self):  # put there by the command line
            raise MisconfigurationException(
                "GAL makes the optimisers of its search itself: give model.optimizer and model.lr_scheduler, for the "
                "epochs with cross-entropy, and no --optimizer."
            )
        given = vars(self)["_teacher_given"]
        if given is not None:
            images = self._images()
            with evaluating(given):
                logits = given(images.to(next((p for p in given.parameters()), images)))
            if logits.shape != (len(images), self.num_classes):
                raise MisconfigurationException(
                    f"teacher: {type(given).__name__} gives {tuple(logits.shape[1:])} logits for an image, "
                    f"GAL(num_classes={self.num_classes}) needs as many as classes."
                )

    def _images(self) -> Tensor:
        """Two images of noise, on the device and in the precision of the network."""
        generator = torch.Generator().manual_seed(0)
        parameter = next(self.network.parameters())
        return torch.randn(2, *self.input_shape, generator=generator).to(parameter)

    def _search_arguments(self) -> dict[str, Any]:
        return {
            "points": [asdict(point) for point in find_points(self.network, self._images(), self.mask_points)],
            "num_classes": self.num_classes,
            "variant": self.discriminator_variant,
            "init": self.mask_init,
            "seed": self.seed,
        }


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of all weights and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
