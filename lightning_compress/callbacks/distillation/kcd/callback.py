"""When the student is listened to, and when the set shrinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress.callbacks.distillation.kcd.condensation import (
    KnowledgeSet,
    entropies,
    next_size,
    partition,
    values,
)
from lightning_compress.callbacks.distillation.kcd.data import blended, check_images
from lightning_compress.callbacks.distillation.knowledge_distillation import KnowledgeDistillation
from lightning_compress.callbacks.distillation.knowledge_distillation.callback import Lesson
from lightning_compress.core.surgery import check_epoch
from lightning_compress.core.training_samples import (
    ReplacedLoader,
    check_loader,
    indexed,
    reload_training_loader,
    replace_training_loader,
    samples_of_batch,
)


class KCD(KnowledgeDistillation):
    """Distil a teacher's knowledge on a training set that shrinks to the samples that are worth it.

    Works on any module that `KnowledgeDistillation` works on, and on any training loader over a data set with indices:
    neither is changed. The loader goes on drawing in its own order, and what is no longer in the set is left out.

    Args:
        teacher: see `KnowledgeDistillation`.
        losses: weight of each term. None: the authors' alpha, ``{"logits": 0.9}``.
        keep_ratio: theta, share of the samples that is left in the end; 1 distils on all of them.
        every_n_epochs: P, length of a stage. With the authors' 40 and 240 epochs there are six.
        num_stages: S, over how many stages the set shrinks. None: as many as the fit has.
        start_epoch: the set shrinks after this epoch or a later one.
        mix: whether samples that go are blended into those that stay.
        mix_low: the least share of itself that a blended sample keeps.
        visit_exponent: how much it counts in how many epochs a sample was seen.
        visit_norm: epochs that count as one. None: `every_n_epochs`.
        task_weight: gamma, weight of the module's own loss.
        kwargs: see `KnowledgeDistillation`.

    Attributes:
        knowledge: the `KnowledgeSet` of the last fit: its `kept` are the indices of the samples that are left.

    What is stored: the indices of the set, sums of entropies and the pairs that were blended, in the callback's state;
    not the images, which are blended again from these when a run is resumed.

    With several processes the set is decided by the first and the same in all.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, a training loader whose
            samples have no indices, images that cannot be blended.

    Example::

        from lightning_compress.callbacks import KCD
        trainer = Trainer(max_epochs=240, callbacks=[KCD("resnet56", teacher_weights="resnet56.pt")])
        trainer.fit(module, datamodule)

    Packaged config: ``method/kcd``.
    """

    def __init__(
        self,
        teacher: nn.Module | str | Sequence[nn.Module | str],
        losses: dict[str, float] | None = None,
        *,
        keep_ratio: float = 0.7,
        every_n_epochs: int = 40,
        num_stages: int | None = None,
        start_epoch: int = 0,
        mix: bool = True,
        mix_low: float = 0.7,
        visit_exponent: float = 0.03,
        visit_norm: float | None = None,
        task_weight: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, {"logits": 0.9} if losses is None else losses, task_weight=task_weight, **kwargs)
        for argument, ratio, lowest in (("keep_ratio", keep_ratio, "above 0"), ("mix_low", mix_low, "from 0")):
            if not 0 <= ratio <= 1 or (argument == "keep_ratio" and not ratio):
                raise ValueError(f"{argument}: expected a share {lowest} to 1, got {ratio}.")
        for argument, epochs, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("num_stages", num_stages, 1),
            ("start_epoch", start_epoch, 0),
        ):
            if epochs is not None and epochs < least:
                raise ValueError(f"{argument}: expected {least} or more, got {epochs}.")
        if visit_exponent < 0:
            raise ValueError(f"visit_exponent: expected 0 or more, got {visit_exponent}.")
        if visit_norm is not None and visit_norm <= 0:
            raise ValueError(f"visit_norm: expected a number above 0, got {visit_norm}.")
        self.keep_ratio, self.every_n_epochs, self.num_stages = keep_ratio, every_n_epochs, num_stages
        self.start_epoch = start_epoch
        self.mix, self.mix_low = mix, mix_low
        self.visit_exponent, self.visit_norm = visit_exponent, visit_norm or every_n_epochs
        self.knowledge: KnowledgeSet | None = None
        self._heard: Tensor | None = None  # entropies of the epoch, (N,), -1 where a sample was not seen
        self._loader: ReplacedLoader | None = None

    def state_dict(self) -> dict[str, Any]:
        knowledge = {} if self.knowledge is None else {"knowledge": self.knowledge.state_dict()}
        return {**super().state_dict(), **knowledge}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "knowledge" in state_dict:
            self.knowledge = KnowledgeSet.from_state_dict(state_dict["knowledge"])

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.knowledge = self._heard = None
            self._loader = replace_training_loader(trainer, partial(self._condensed, trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.keep_ratio < 1 and any(config.interval == "step" for config in trainer.lr_scheduler_configs):
            rank_zero_warn(
                f"KCD(keep_ratio={self.keep_ratio}): epochs become shorter, so a learning rate that is scheduled by "
                f"steps does not reach its end. Let the schedule count epochs (interval='epoch')."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        assert self.knowledge is not None
        pl_module.log("kcd/kept", len(self.knowledge) / self.knowledge.count, prog_bar=True, sync_dist=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.is_last_batch:  # before a validation, after which a checkpoint may be written
            self._add_up(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._add_up(trainer)
        if trainer.current_epoch + 1 in self._ends(trainer):
            self._condense(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._note and self.knowledge is not None:
            self._note += f" {len(self.knowledge):,} of {self.knowledge.count:,} training samples are left."
        super().on_fit_end(trainer, pl_module)

    # ---- what the student shows

    def _learn(self, pl_module: LightningModule) -> Lesson:
        before = self._lesson
        lesson = super()._learn(pl_module)
        if lesson is not before:
            self._hear(pl_module.trainer, lesson.student)
        return lesson

    def _hear(self, trainer: Trainer, logits: Tensor | None) -> None:
        indices = samples_of_batch(trainer)
        if logits is None or len(logits) != len(indices):
            got = "no logits" if logits is None else f"logits {tuple(logits.shape)}"
            raise MisconfigurationException(
                f"KCD listens to the student's logits, one row for each of the {len(indices)} samples of the batch. "
                f"The module that it listens to (network={self.network!r}) returns {got}."
            )
        if self._heard is None:
            assert self.knowledge is not None
            self._heard = torch.full((self.knowledge.count,), -1.0, device=logits.device)
        self._heard[indices.to(logits.device)] = entropies(logits)

    def _add_up(self, trainer: Trainer) -> None:
        """Bring together what all processes have heard; of a sample that two have seen, the higher entropy counts."""
        if self._heard is not None:
            assert self.knowledge is not None
            self.knowledge.hear(trainer.strategy.reduce(self._heard, reduce_op="max").cpu())
            self._heard = None

    # ---- what follows from it

    def _ends(self, trainer: Trainer) -> range:
        """After which epochs, counted from one, the set shrinks."""
        first = max(1, -(-self.start_epoch // self.every_n_epochs)) * self.every_n_epochs
        last = trainer.max_epochs
        return range(first, 10**9 if last in (None, -1) else last + 1, self.every_n_epochs)

    def _condense(self, trainer: Trainer) -> None:
        known = self.knowledge
        assert known is not None
        size = next_size(len(known), known.count, self.keep_ratio, self.num_stages or len(self._ends(trainer)))
        if size == len(known):  # the end is reached: there is nothing to drop, and nothing to blend
            return
        worth = values(known.total, known.visits, self.visit_norm, self.visit_exponent)
        known.keep(trainer.strategy.broadcast(partition(worth, size, len(known))), self.mix)
        reload_training_loader(trainer)

    def _condensed(self, trainer: Trainer, given: DataLoader) -> DataLoader:
        """The user's loader over the set as it is now."""
        check_loader(given, "KCD")
        dataset = given.dataset
        count = len(dataset)  # type: ignore[arg-type]
        if self.mix and self.keep_ratio < 1:
            check_images(dataset)
        if self.knowledge is None:
            self.knowledge = KnowledgeSet.full(count)
        if self.knowledge.count != count:
            raise MisconfigurationException(
                f"KCD: the training set has {count} samples, and had {self.knowledge.count} when this run began. Train "
                f"with the same samples in the same order."
            )
        dataset = blended(dataset, self.knowledge.blends, self.mix_low)
        return indexed(trainer, given, "KCD", dataset=dataset, kept=self.knowledge.kept)

    # ---- before and after the fit

    def _check(self, trainer: Trainer) -> None:
        super()._check(trainer)
        check_epoch(trainer, "KCD", "start_epoch", self.start_epoch)
        endless = trainer.max_epochs in (None, -1)
        if endless and self.num_stages is None:
            raise MisconfigurationException(
                "KCD(num_stages=None) takes as many stages as the fit has; a Trainer without max_epochs has no end. "
                "Give num_stages."
            )
        if self.keep_ratio < 1 and not self._ends(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"KCD(every_n_epochs={self.every_n_epochs}) never shrinks the set: the Trainer stops after "
                f"max_epochs={trainer.max_epochs}."
            )
        overfit = trainer.overfit_batches  # type: ignore[attr-defined]
        if overfit:
            raise MisconfigurationException(
                f"KCD decides which samples are trained on, and so does Trainer(overfit_batches={overfit}). Use one of "
                f"them."
            )

    def _detach(self) -> None:
        if self._loader is not None:
            self._loader.remove()
        self._loader = None
        super()._detach()
