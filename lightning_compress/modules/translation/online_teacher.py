"""A small generator that learns from a large one while that one is trained: what DCD and CRD share.

The teacher's generator G_T and discriminator D_T are trained from scratch, as ever. The student G_S has no
discriminator of its own; with y_T = G_T(x), y_S = G_S(x), and maps f_k of a perceptual network (a VGG-16),

    L_S = lambda_style   sum_k mean |gram(f_k(y_S)) - gram(f_k(y_T))|
        + lambda_feature mean |f_2(y_S) - f_2(y_T)|
        + lambda_adv     gan(D_T(y_S), real)
        + what the method lets it imitate besides

D_T judges and is not trained by it. Where there are pairs, teacher and student take their steps side by side, on the
same batch. Where there are none, they take turns: P epochs of the teacher, then n_dis P of the student, which learns
from the best teacher so far; then the latest goes on.

Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016,
arXiv:1603.08155; Ren, Wu, Xiao, Yang, "Online Multi-Granularity Distillation for GAN Compression", ICCV 2021,
arXiv:2108.06908.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_compress.core.distill.taps import Point, observe, reading
from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.core.images import as_bytes
from lightning_compress.core.meta import dry_run
from lightning_compress.core.profile import profile
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.units import human
from lightning_compress.modules._optimizers import advance_schedules
from lightning_compress.modules.translation.cycle_gan import CycleGAN
from lightning_compress.modules.translation.losses import full
from lightning_compress.modules.translation.pix2pix import Pix2Pix
from lightning_compress.modules.translation.system import Direction, Images, TranslationGAN, at_least
from lightning_compress.networks.vgg_features import VGGFeatures

# ---- losses between two images


def gram(features: Tensor) -> Tensor:
    """How the channels of each image go together: (N, C, H, W) -> (N, C, C), divided by C H W; float32 at least.

    >>> gram(torch.arange(24.0).view(1, 2, 3, 4))
    tensor([[[ 21.0833,  54.0833],
             [ 54.0833, 159.0833]]])
    """
    flat = full(features).flatten(2)
    with torch.autocast(flat.device.type, enabled=False):
        return flat @ flat.mT / flat[0].numel()


def style_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of the gram matrices, summed over maps (N, C, H, W)."""
    return torch.stack([F.l1_loss(gram(s), gram(t)) for s, t in zip(student, teacher, strict=True)]).sum()


# ---- turns


def turn(epoch: int, teacher_epochs: int, phase_epochs: int, student_ratio: int) -> tuple[bool, int]:
    """Whose turn an epoch is: whether it is the student's, and the last epoch of the teacher up to it, from 0.

    The last phase ends with the teacher's last epoch, however short it is. Behind the end there is no teacher's epoch
    left: `teacher_epochs`.

    >>> [turn(epoch, 4, 2, 1) for epoch in (0, 1, 2, 3, 4)]
    [(False, 0), (False, 1), (True, 1), (True, 1), (False, 2)]
    """
    if epoch >= length(teacher_epochs, phase_epochs, student_ratio):
        return True, teacher_epochs
    phase, place = divmod(epoch, phase_epochs * (1 + student_ratio))
    begin = phase * phase_epochs
    count = min(phase_epochs, teacher_epochs - begin)
    return place >= count, begin + min(place, count - 1)


def length(teacher_epochs: int, phase_epochs: int, student_ratio: int) -> int:
    """Epochs of both: ``n + n_dis P ceil(n / P)``.

    >>> length(200, 10, 4), length(200, 6, 4)
    (1000, 1016)
    """
    return teacher_epochs + student_ratio * phase_epochs * math.ceil(teacher_epochs / phase_epochs)


# ---- what a method adds


@dataclass(frozen=True)
class Attempt:
    """What a student made of a batch, and what its teacher did.

    Attributes:
        source: the images that were translated, (N, C, H, W).
        taught: the teacher's translations, without a graph.
        made: the student's, with theirs; both in float32 also under autocast.
        taught_features: what the teacher's `Imitation.layers` returned, without a graph.
        made_features: what the student's returned.
    """

    source: Tensor
    taught: Tensor
    made: Tensor
    taught_features: list[Tensor] = field(default_factory=list)
    made_features: list[Tensor] = field(default_factory=list)


class Imitation(nn.Module):
    """What a student imitates of its teacher besides its images. Its parameters are trained with the student's.

    Attributes:
        weight: its lambda; with 0 it is not called.
        layers: names of modules, in both generators, whose outputs it compares.
    """

    training_only = True

    def __init__(self, weight: float, layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.weight = weight
        self.layers = tuple(layers)

    def prepare(self, attempt: Attempt) -> None:
        """Called once, before the first step. What it draws here is drawn by the first process for all."""

    def forward(self, attempt: Attempt, judge: nn.Module) -> tuple[Images, Images]:
        """Named losses with their weights, and other scalars to log; `judge` is the teacher's discriminator."""
        raise NotImplementedError


def shapes_at(network: nn.Module, layers: Sequence[str], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes (C, h, w) of what a network makes of an image (C, H, W), and of what its layers return on the way.

    Raises:
        ValueError: it has no such layer, or one that returns no maps.
    """
    names = [name for name, _ in network.named_modules()]
    for layer in layers:
        if layer not in names:
            hint = did_you_mean(layer, names)
            raise ValueError(f"layers: {type(network).__name__} has no module {layer!r}.{hint}")
    points = [Point(layer) for layer in layers]
    with reading(network, points) as read:
        _, image = dry_run(network, torch.zeros(1, *shape), lambda tensors: nullcontext())
    maps = [image, *(read.get(point) for point in points)]
    for layer, found in zip(("", *layers), maps, strict=True):
        if not isinstance(found, Tensor) or found.ndim != 4:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"layers: {layer!r} of {type(network).__name__} gives no maps (N, C, h, w), but {got}.")
    return [tuple(found.shape[1:]) for found in maps]


# ---- when it happens


class OnlineTeacher(TranslationGAN):
    """A system whose first generator has a student. The student is what is deployed; all else is left behind.

    Attributes:
        student: the small generator.
        imitation: what the method adds.
        student_metrics: the first direction's metrics, of the student.
    """

    NOT_SAVED = (*TranslationGAN.NOT_SAVED, "student", "perceptual_net")

    student: nn.Module
    imitation: Imitation
    student_metrics: nn.ModuleDict

    def add_student(
        self,
        student: nn.Module,
        imitation: Imitation,
        perceptual_net: nn.Module | str | None,
        lambda_style: float,
        lambda_feature: float,
        lambda_adv: float,
        student_ratio: int,
    ) -> None:
        """For the end of a constructor."""
        at_least(0, lambda_style=lambda_style, lambda_feature=lambda_feature, lambda_adv=lambda_adv)
        at_least(1, student_ratio=student_ratio)
        if not lambda_style + lambda_feature + lambda_adv + imitation.weight:
            raise ValueError("lambda_style, lambda_feature, lambda_adv: with all weights 0 the student learns nothing.")
        (image, *_), (own, *_) = (shapes_at(n, (), self.input_shape) for n in (self._taught_by(), student))
        if image != own:
            raise ValueError(f"student: it makes images {own} of images {self.input_shape}, the teacher makes {image}.")
        self._image_shape = image
        self.student = student
        if self.channels_last:
            student.to(memory_format=torch.channels_last)
        self.imitation = imitation
        for direction in self.directions:
            self.generator_of(direction).training_only = True  # type: ignore[assignment]
        metrics = cast(nn.ModuleDict, self.metrics[self.directions[0].name])
        self.student_metrics = nn.ModuleDict({n: cast(Metric, metric).clone() for n, metric in metrics.items()})
        self._perceptual_net = (perceptual_net,)  # no submodule
        self.lambda_style = lambda_style
        self.lambda_feature = lambda_feature
        self.lambda_adv = lambda_adv
        self.student_ratio = student_ratio
        self._perceptual: Teacher | None = None
        self._prepared = False

    def _taught_by(self) -> nn.Module:
        """The generator whose images the student imitates."""
        return self.generator_of(self.directions[0])

    # ---- steps

    def forward(self, images: Tensor) -> Tensor:
        """Translate images of kind a, (N, C, H, W) in [-1, 1], to kind b: by the student."""
        return self.student(self._laid_out(images))

    def train_student(self, attempt: Attempt) -> Tensor:
        """A step of the student; returns the loss."""
        if not self._prepared:
            self._prepare(attempt)
        losses, others = self.student_loss(attempt)
        loss = torch.stack(list(losses.values())).sum()
        self.improve(cast(list[LightningOptimizer], self.optimizers())[2], loss)
        self.log_losses(losses | others | {"student": loss}, len(attempt.source))
        return loss.detach()

    def student_loss(self, attempt: Attempt) -> tuple[Images, Images]:
        """What the student minimises, named scalars with their weights; and other scalars to log."""
        losses, others = {}, {}
        direction = self.directions[0]
        if self.lambda_style or self.lambda_feature:
            assert self._perceptual is not None
            theirs = self._perceptual(attempt.taught)
            own = self._perceptual.network(attempt.made)
            if self.lambda_style:
                losses["student_style"] = self.lambda_style * style_loss(own, theirs)
            if self.lambda_feature:
                losses["student_feature"] = self.lambda_feature * F.l1_loss(full(own[1]), full(theirs[1]))
        if self.lambda_adv:
            inputs, fakes = {direction.source: attempt.source}, {direction.fake: attempt.made}
            losses["student_gan"] = self.lambda_adv * self.fooling_loss(direction, inputs, fakes)
        if self.imitation.weight:
            imitated, others = self.imitation(attempt, self.discriminator_of(direction))
            losses |= imitated
        return losses, others

    def _prepare(self, attempt: Attempt) -> None:
        self.imitation.prepare(attempt)
        if self.trainer.world_size > 1:
            for tensor in self.imitation.state_dict().values():
                distributed.broadcast(tensor, 0)
        self._prepared = True

    # ---- evaluation

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | Images:
        """Return the student's translations as bytes: of images a tensor, of pairs a dict with ``fake_b``."""
        if isinstance(batch, Tensor):
            return as_bytes(self(batch))
        inputs = self.inputs_of(batch, "predict")
        return {"fake_b": as_bytes(self(inputs["a"]))} if "a" in inputs else {}

    def columns(self, direction: Direction, inputs: Images, fakes: Images) -> Images:
        columns = super().columns(direction, inputs, fakes)
        return columns | ({"student": fakes["student"]} if direction == self.directions[0] else {})

    def _evaluate(self, split: str, batch: Any) -> tuple[Images, Images]:
        inputs, fakes = super()._evaluate(split, batch)
        direction = self.directions[0]
        if direction.source in inputs:
            source = inputs[direction.source]
            fakes["student"] = made = full(self.student(source))
            differences = {"to_teacher": full(self._taught_by()(source))}
            if direction.conditional:
                differences["l1"] = inputs[direction.target]
            for name, other in differences.items():
                self.log(
                    f"{split}/student/{name}", F.l1_loss(made, other), on_epoch=True, sync_dist=True,
                    batch_size=len(made), prog_bar=name == "l1",
                )  # fmt: skip
        for name, metric in cast(dict[str, Metric], self.student_metrics).items():
            metric.update(fakes.get("student"), inputs.get(direction.target))
            attribute = f"student_metrics.{name}"
            self.log(f"{split}/student/{name}", metric, metric_attribute=attribute, on_step=False, on_epoch=True)
        return inputs, fakes

    # ---- the run

    def sides(self) -> list[list[nn.Parameter]]:
        """As without a student; then the student and what is trained with it."""
        student = {id(p): p for part in (self.student, self.imitation) for p in part.parameters() if p.requires_grad}
        of_metrics = {id(p) for p in self.student_metrics.parameters()}
        generators, discriminators = super().sides()
        generators = [p for p in generators if p.requires_grad and id(p) not in student and id(p) not in of_metrics]
        return [generators, discriminators, list(student.values())]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if self.lambda_style or self.lambda_feature:
            (network,) = self._perceptual_net
            if network is None:
                raise MisconfigurationException(
                    f"perceptual_net=None: lambda_style={self.lambda_style} and lambda_feature={self.lambda_feature} "
                    "compare feature maps. Give a file of torchvision's VGG-16, or a network from images in [-1, 1] to "
                    "a list of maps, such as networks.VGGFeatures."
                )
            network = VGGFeatures(network) if isinstance(network, str) else network
            self._perceptual = Teacher(network, channels_last=self.channels_last)
            perceptual = self._perceptual.network.float()
            _, maps = dry_run(perceptual, torch.zeros(1, *self._image_shape), lambda tensors: nullcontext())
            if not isinstance(maps, list | tuple) or len(maps) < 2 or any(m.ndim != 4 for m in maps):
                raise ValueError(f"perceptual_net: {type(network).__name__} must return two or more maps (N, C, h, w).")
        open_account(self.trainer, self)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._perceptual is not None:
            self._perceptual.network.to(self.device, cast(torch.dtype, self.dtype))

    def on_fit_end(self) -> None:
        teacher, student = (profile(n, (1, *self.input_shape)) for n in (self._taught_by(), self.student))
        note = (
            f"The teacher has {human(teacher.macs)} MACs and {human(teacher.params)} parameters, the student "
            f"{human(student.macs)} ({teacher.macs / student.macs:.1f} times fewer) and {human(student.params)} "
            f"({teacher.params / student.params:.1f} times fewer)."
        )
        close_account(self.trainer, self, notes=[note])

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self._perceptual = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["translation"]["prepared"] = self._prepared

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._prepared = checkpoint.get("translation", {}).get("prepared", False)


class OnlinePix2Pix(OnlineTeacher, Pix2Pix):
    """On pairs: in each step D_T, G_T and G_S, on one batch; the student is judged by the D_T that was just trained.

    G_T runs once; its own loss is taken against D_T as it was before.
    """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = self.inputs_of(batch)
        to_generator, to_discriminator, to_student = cast(list[LightningOptimizer], self.optimizers())
        points = [Point(layer) for layer in self.imitation.layers]
        teaching = batch_idx % self.student_ratio == 0
        with self.seeded():
            with reading(self.generator, points) as read, torch.set_grad_enabled(teaching):
                fakes = self.compute_fakes(inputs)
            made, own = observe(self.student, points, inputs["a"])
            theirs = [read[point].detach() for point in points]
            attempt = Attempt(inputs["a"], fakes["fake_b"].detach(), full(made), theirs, own)
            if teaching:
                # what D learns from is there already, so that G may step first, and meets D as it was
                with self.toggled_optimizer(to_generator):
                    self.train_generators(inputs, fakes, batch, batch_idx)
                with self.toggled_optimizer(to_discriminator):
                    self.train_discriminators(inputs, fakes)
            with self.toggled_optimizer(to_student):
                loss = self.train_student(attempt)
        self.count(inputs)
        return loss


class OnlineCycleGAN(OnlineTeacher, CycleGAN):
    """Without pairs: the teacher and its student take turns, see `turn`. The student translates from a to b.

    Attributes:
        best_teacher: copy of `generator_ab` with the best score in validation so far, which the student learns from.
        best_score: that score; None before.
    """

    best_teacher: nn.Module

    def take_turns(self, phase_epochs: int) -> None:
        """For a constructor, before `add_student`."""
        at_least(1, phase_epochs=phase_epochs)
        self.phase_epochs = phase_epochs
        self.best_teacher = copy.deepcopy(self.generator_ab).requires_grad_(False)
        self.best_teacher.training_only = True  # type: ignore[assignment]
        self.best_score: float | None = None

    def _taught_by(self) -> nn.Module:
        return self.best_teacher

    # ---- turns

    @property
    def num_epochs(self) -> int:
        return length(self.n_epochs + self.n_epochs_decay, self.phase_epochs, self.student_ratio)

    def phase(self, epoch: int) -> Literal["teacher", "student"]:
        """Whose turn an epoch of the Trainer is, counted from 0."""
        return "student" if self._turn(epoch)[0] else "teacher"

    def teacher_epoch(self, epoch: int) -> int:
        """The teacher's epoch that an epoch of the Trainer is, or that came before it; the learning rates go by it."""
        return self._turn(epoch)[1]

    def _turn(self, epoch: int) -> tuple[bool, int]:
        return turn(epoch, self.n_epochs + self.n_epochs_decay, self.phase_epochs, self.student_ratio)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.phase(self.current_epoch) == "teacher":
            return super().training_step(batch, batch_idx)
        inputs = self.inputs_of(batch)
        *_, to_student = cast(list[LightningOptimizer], self.optimizers())
        points = [Point(layer) for layer in self.imitation.layers]
        with self.seeded():
            with torch.no_grad():
                taught, theirs = observe(self.best_teacher.eval(), points, inputs["a"])
            with self.toggled_optimizer(to_student):
                made, own = observe(self.student, points, inputs["a"])
                loss = self.train_student(Attempt(inputs["a"], full(taught), full(made), theirs, own))
        self.count(inputs)
        return loss

    def on_train_epoch_start(self) -> None:
        """Where no teacher was ever scored, the student learns from the latest."""
        if self.best_score is None and self.phase(self.current_epoch) == "student":
            self._keep_teacher()

    def on_validation_epoch_end(self) -> None:
        """Keep the teacher where it is the best so far, by the first metric of its direction."""
        metric = next(iter(cast(dict[str, Metric], self.metrics["ab"]).values()), None)
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if metric is None or not fitting or self.phase(self.current_epoch) == "student":
            return
        score = float(metric.compute())  # of all processes
        sign = 1 if metric.higher_is_better else -1
        if not math.isnan(score) and (self.best_score is None or sign * score > sign * self.best_score):
            self.best_score = score
            self._keep_teacher()

    def on_train_epoch_end(self) -> None:
        """All learning rates follow the teacher's epochs; the student's last epoch in a turn closes one of them."""
        if self.teacher_epoch(self.current_epoch + 1) > self.teacher_epoch(self.current_epoch):
            with warnings.catch_warnings():
                # the student's optimiser has taken no step in the first turn of the teacher, and need not
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                advance_schedules(self.trainer)

    def _keep_teacher(self) -> None:
        self.best_teacher.load_state_dict(self.generator_ab.state_dict())

    # ---- the run

    def setup(self, stage: str) -> None:
        super().setup(stage)
        end = self.trainer.max_epochs if stage == "fit" else None
        short = end is not None and 0 <= end < self.num_epochs
        if short and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            teachers = self.n_epochs + self.n_epochs_decay
            raise MisconfigurationException(
                f"max_epochs={end}: {teachers} epochs of the teacher (n_epochs + n_epochs_decay), and "
                f"{self.student_ratio * self.phase_epochs} of the student (student_ratio * phase_epochs) after each "
                f"{self.phase_epochs} of them, are {self.num_epochs}."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["translation"]["best_score"] = self.best_score

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.best_score = checkpoint.get("translation", {}).get("best_score")
