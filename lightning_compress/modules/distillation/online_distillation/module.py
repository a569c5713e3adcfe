"""When all this happens: the training system."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from torchmetrics import Metric

from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.together import can_run_together, faster_together
from lightning_compress.core.units import human
from lightning_compress.modules.distillation._factory import Factory, network_factory
from lightning_compress.modules.distillation.online_distillation.cohort import Cohort, OnlineTeacher, find_maps
from lightning_compress.modules.distillation.online_distillation.losses import KLReduction, online_losses
from lightning_compress.modules.image_classifier import ImageClassifier
from lightning_compress.networks.cheap import Kind, choose_convolutions, convert_to_cheap


def authors_optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
    """The authors': SGD with momentum and a rate of 0.1; weights of batch norms decay too."""
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=2e-4)


def authors_schedule(optimizer: Optimizer) -> LRScheduler:
    """The authors' for 300 epochs: a tenth of the rate from epoch 150 and from epoch 225 on, counted from 0."""
    return MultiStepLR(optimizer, [150, 225])


class OnlineDistillation(ImageClassifier):
    """Train several cheap students and the teacher made of them; the best student is deployed, as a plain network.

    Batches are (images, labels). Logs ``train/loss``, the sum of all losses; ``train/acc``, averaged over the students;
    ``train/online_distillation/teacher``, ``.../student_<i>`` (cross-entropies) and ``.../told_<i>`` (T^2 KL);
    ``val/student_<i>_acc`` and ``val/teacher_acc``; and ``val/loss``, ``val/acc``, ``test/loss``, ``test/acc`` of the
    student that is chosen. It is chosen in every validation during the fit; the authors keep the best student of the
    best epoch, as does a `ModelCheckpoint` that monitors ``val/acc``.

    Args:
        network: what makes a network with random weights, called once for each student; or a name, see
            `ImageClassifier`. In YAML ``class_path`` and ``init_args`` of a class.
        num_classes: number of classes.
        cheap: make the convolutions of these networks cheap: ``"shift"``, ``"dw"`` or ``"group"``, see
            `convert_to_cheap`. None leaves them, such as those of `CheapResNet`, which are cheap already.
        groups: of ``"group"``.
        num_students: M, at least 2.
        feature_layer: name of the module that puts out a student's last feature maps. None finds it, see `find_maps`;
            in ResNets for CIFAR it is ``layer3``.
        temperature: T.
        kl_reduction: ``"mean"`` over images and classes, as the authors; ``"batchmean"`` over images, the usual one,
            with which the term weighs as many times more as there are classes.
        detach_teacher: whether the gradient of KL ends at the teacher.
        head_bn_relu: whether the maps go through batch norm and ReLU before the teacher pools them.
        fused: whether the students' passes in training run as one, see `run_together`. None: where that is possible
            and faster, on GPUs and for small batches of small images.
        optimizer: of all parameters; the authors' is the default.
        lr_scheduler: its schedule; the authors' for 300 epochs is the default.
        lr_scheduler_interval: see `ImageClassifier`.
        input_shape: (channels, height, width) of an image.
        channels_last: whether to compute in the channels-last memory format; on a CPU much faster for small networks.

    What is stored: all students, the teacher's layers, and the students' last accuracies, which say who is chosen: the
    same on every rank, since they are summed over all ranks first.

    Raises:
        ValueError: an argument out of range, students that are equal, no feature maps.
        MisconfigurationException: the datamodule has other classes or image shapes.

    Example::

        module = OnlineDistillation("resnet56", cheap="shift")
        Trainer(max_epochs=300).fit(module, datamodule)
        network = module.best_student()

    Packaged config: ``method/online_distillation``.
    """

    def __init__(
        self,
        network: str | Factory,
        num_classes: int = 10,
        cheap: Kind | None = None,
        groups: int = 4,
        num_students: int = 4,
        feature_layer: str | None = None,
        temperature: float = 4.0,
        kl_reduction: KLReduction = "mean",
        detach_teacher: bool = False,
        head_bn_relu: bool = True,
        fused: bool | None = None,
        optimizer: OptimizerCallable = authors_optimizer,
        lr_scheduler: LRSchedulerCallable | None = authors_schedule,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        input_shape: tuple[int, int, int] = (3, 32, 32),
        channels_last: bool = False,
    ) -> None:
        for name, value, least in (("num_students", num_students, 2), ("groups", groups, 1)):
            if value < least:
                raise ValueError(f"OnlineDistillation({name}={value}): give a number of at least {least}.")
        if temperature <= 0:
            raise ValueError(f"OnlineDistillation(temperature={temperature}): give a number above 0.")
        for name, given, kind in (("cheap", cheap, Kind), ("kl_reduction", kl_reduction, KLReduction)):
            if given is not None and given not in get_args(kind):
                raise ValueError(
                    f"OnlineDistillation({name}={given!r}): give one of {', '.join(map(repr, get_args(kind)))}."
                )
        make = network_factory(network, num_classes, input_shape[0])
        students = [make() if cheap is None else convert_to_cheap(make(), cheap, groups) for _ in range(num_students)]
        _check_different(students)
        point, channels = find_maps(students[0], feature_layer, torch.zeros(1, *input_shape), num_classes)
        teacher = OnlineTeacher(num_students * channels, num_classes, head_bn_relu)
        super().__init__(
            Cohort(students, point, teacher), num_classes, optimizer, lr_scheduler, lr_scheduler_interval,
            input_shape=input_shape, channels_last=channels_last,
        )  # fmt: skip
        if "_instantiator" in self.hparams:
            self.save_hyperparameters("network")  # from the command line, which knows it as plain data
        elif isinstance(network, str):
            self.save_hyperparameters({"network": network})
        self.temperature = temperature
        self.kl_reduction = kl_reduction
        self.detach_teacher = detach_teacher
        self.fused = fused
        self.scores = Scores(num_students + 1)
        self.cheap = cheap
        self._can_fuse = False
        vars(self)["_make"] = make

    # ---- phases

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            if not _alike(self.cohort.students):
                raise MisconfigurationException(
                    "OnlineDistillation: a callback has changed some students and not others, which can then share no "
                    "teacher. Train first, and compress module.best_student() in a fit of its own."
                )
            with self._as_network(self._before()):
                open_account(self.trainer, self)

    def on_train_start(self) -> None:
        """Now hooks are in place, modules are converted and on their device."""
        possible = can_run_together(self.cohort.students)
        if self.fused and not possible:
            raise MisconfigurationException(
                "OnlineDistillation(fused=True): the students differ in shape, carry hooks, or have parametrised "
                "weights or batch norms that synchronise or count, so each needs a pass of its own. Take fused=None."
            )
        self._can_fuse = possible

    def on_fit_end(self) -> None:
        """Close the account: the network as it came against the student that is deployed."""
        if not self.cohort.accuracies.any():
            rank_zero_warn("OnlineDistillation: no student was ever validated, so the first one counts as the best.")
        student = self.best_student()
        whole, deployed = (sum(p.numel() for p in m.parameters()) for m in (self, student))
        accuracies = ", ".join(f"{100 * a:.2f}" for a in self.cohort.accuracies.tolist())
        note = (
            f"Student {self.cohort.best} of {len(self.cohort.students)} is deployed; their accuracies are {accuracies} "
            f"%. {human(whole)} parameters in training, {human(deployed)} deployed."
        )
        with self._as_network(student):
            close_account(self.trainer, self, notes=[note], left_alone=self._left_alone())

    # ---- steps

    @property
    def cohort(self) -> Cohort:
        """The students and their teacher."""
        return cast(Cohort, self.network)

    def best_student(self) -> nn.Module:
        """A copy of the student that is chosen, a plain network."""
        return copy.deepcopy(self.cohort.students[self.cohort.best])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self.labelled("train", batch)
        fused = self._can_fuse and (faster_together(images) if self.fused is None else self.fused)
        students, teacher = self._all_logits(images, fused)
        losses = online_losses(students, teacher, labels, self.temperature, self.kl_reduction, self.detach_teacher)
        loss = losses.total()
        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        log("train/loss", loss, prog_bar=True)
        log("train/online_distillation/teacher", losses.teacher)
        for i, (own, told) in enumerate(zip(losses.students, losses.told, strict=True)):
            log(f"train/online_distillation/student_{i}", own)
            log(f"train/online_distillation/told_{i}", told)
        self.train_acc.update(students.flatten(0, 1), labels.repeat(len(students)))
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = self.labelled("val", batch)
        students, teacher = self._all_logits(images)
        self.scores.update(torch.cat([students, teacher[None]]), labels)

    def on_validation_epoch_end(self) -> None:
        """Choose; whoever only validates a trained module changes nothing."""
        accuracies, losses = self.scores.compute()
        self.scores.reset()
        if self.trainer.state.fn is TrainerFn.FITTING and not self.trainer.sanity_checking:
            for cohort in (self.cohort, *self._averages()):
                cohort.accuracies.copy_(accuracies[:-1])
        best = self.cohort.best
        log = partial(self.log, sync_dist=True)
        log("val/loss", losses[best])
        log("val/acc", accuracies[best], prog_bar=True)
        for i, accuracy in enumerate(accuracies[:-1]):
            log(f"val/student_{i}_acc", accuracy)
        log("val/teacher_acc", accuracies[-1])

    def _averages(self) -> Iterator[Cohort]:
        """Averages of the weights; what was just validated is put aside by now, and would keep its last choice."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                yield cast(OnlineDistillation, callback._average_model.module).cohort

    def _all_logits(self, images: Tensor, together: bool = False) -> tuple[Tensor, Tensor]:
        if self.channels_last:
            images = images.to(memory_format=torch.channels_last)
        return self.cohort.all_logits(images, together)

    # ---- the account

    @contextmanager
    def _as_network(self, network: nn.Module) -> Iterator[None]:
        """Be a classifier with this network and nothing else."""
        cohort, self.network = self.network, network
        try:
            yield
        finally:
            self.network = cohort

    def _before(self) -> nn.Module:
        """A network as it was before it was made cheap, if it was; on the device, in the precision of the students."""
        if self.cheap is None:
            return self.best_student()
        with isolate_rng(include_cuda=False):
            return vars(self)["_make"]().to(next(self.cohort.parameters()))

    def _left_alone(self) -> dict[str, str]:
        """The convolutions that were not made cheap, and why."""
        reasons = {} if self.cheap is None else choose_convolutions(self._before())[1]
        return {f"network.{name}": reason for name, reason in reasons.items()}


class Scores(Metric):
    """Accuracy and cross-entropy of several classifiers at once, the same on all ranks.

    Args:
        count: how many classifiers.
    """

    full_state_update = False
    correct: Tensor
    loss: Tensor
    images: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(count, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros(count, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Logits (count, B, K), labels (B,)."""
        loss = F.cross_entropy(logits.float().movedim(0, 2), labels[:, None].expand(-1, len(logits)), reduction="none")
        self.correct += (logits.argmax(2) == labels).sum(1)
        self.loss += loss.double().sum(0)
        self.images += len(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Accuracies and losses, (count,) each."""
        return self.correct / self.images, (self.loss / self.images).float()


def _check_different(students: Sequence[nn.Module]) -> None:
    """The students must be of one architecture, and have weights of their own."""
    if not _alike(students):
        raise ValueError("network: the students must be of one architecture, but their parameters have other shapes.")
    for one, other in combinations([list(student.parameters()) for student in students], 2):
        if all(p is q or (not p.is_meta and torch.equal(p, q)) for p, q in zip(one, other, strict=True)):
            raise ValueError(
                "network: two students have the same weights, so they would stay the same for ever. Every call must "
                "make a network with random weights of its own, and no seed may be set in it."
            )


def _alike(students: Sequence[nn.Module]) -> bool:
    first, *others = ({name: p.shape for name, p in student.named_parameters()} for student in students)
    return all(other == first for other in others)
