"""When all this happens: the training system."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.core.distill.losses import attention, soft_targets
from lightning_compress.core.losses import LossTermsMixin
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.surgery import check_epoch
from lightning_compress.core.units import human
from lightning_compress.modules._optimizers import advance_schedules, gradient_scale
from lightning_compress.modules.distillation._factory import Factory, network_factory
from lightning_compress.modules.distillation.ffsd.losses import (
    diversity,
    imposed,
    ramp_up,
    reproduced,
    shifted,
    strength,
)
from lightning_compress.modules.distillation.ffsd.maps import Seen, find_maps, see
from lightning_compress.modules.distillation.ffsd.parts import (
    Fusion,
    SelfDistillation,
    TrainingOnly,
    TransFusion,
    initialise,
)
from lightning_compress.modules.image_classifier import ImageClassifier

Init = Literal["network", "official"]


def networks_sgd(params: Iterable[Any]) -> Optimizer:
    """The authors': SGD with Nesterov's momentum and a rate of 0.1."""
    return SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)


def self_distillation_adam(params: Iterable[Any]) -> Optimizer:
    """The authors': Adam with its usual rate; the weight decay is a part of the gradient."""
    return Adam(params, lr=1e-3, weight_decay=1e-4)


def cifar_schedule(optimizer: Optimizer) -> LRScheduler:
    """The authors' for 300 epochs: a tenth of the rate from epoch 150 and from epoch 225 on, counted from 0."""
    return MultiStepLR(optimizer, [150, 225])


class FFSD(LossTermsMixin, ImageClassifier):
    """Train a network without a teacher, beside students of the same architecture; only itself is deployed.

    `network` is the leader. Students, fusion and self-distillation modules are there in training alone: exports,
    accounts and predictions have the leader, a plain network of the given architecture, and nothing else.

    Batches are (images, labels). Logs what `ImageClassifier` logs, for the leader, but ``train/loss``, the sum of all
    losses; ``train/ffsd/student_<i>``, ``train/ffsd/fusion``, ``train/ffsd/leader``, ``train/ffsd/self_distillation``;
    and ``val/student_<i>_acc``, ``val/fusion_acc``, ``val/ensemble_acc`` (of the students' mean logits), likewise for
    ``test``.

    Args:
        network: what makes a network with random weights, called once for the leader and each student; or a name, see
            `ImageClassifier`. In YAML ``class_path`` and ``init_args`` of a class.
        num_classes: number of classes.
        feature_layers: names, or globs of names, of the modules whose outputs are compared, (B, C, h, w). At least two;
            each must be twice as large as the next one deeper.
        num_students: M, beside the leader.
        temperature: T, of all comparisons of logits.
        lambda_diversity: weight of what moves a student's attention away from that of the student before.
        lambda_fusion: weight of all that the leader learns from the fused maps.
        lambda_self_distillation: weight of the losses of the self-distillation modules.
        warmup_epochs: epochs in which the three lambdas rise, see `ramp_up`; 0 for none.
        init: ``"network"`` leaves the networks the weights that they are made with; ``"official"`` draws those of the
            authors' code, see `initialise`.
        optimizer: of all networks and the fusion module. It gets groups of parameters, not a list of them.
        lr_scheduler: its schedule.
        fusion_weight_decay: of the fusion module, instead of the optimiser's.
        self_distillation_optimizer: of all self-distillation modules.
        self_distillation_lr_scheduler: its schedule.
        lr_scheduler_interval: whether both schedules advance every ``"epoch"`` or every ``"step"``.
        input_shape: (channels, height, width) of an image.
        channels_last: whether to compute in the channels-last memory format.

    Attributes:
        network: the leader.
        students: the common students.
        feature_layers: names of the modules whose outputs are compared, shallow to deep.
        map_shapes: (C, h, w) of their outputs.

    What is stored: all modules and both optimisers; ``network.*`` are the leader's weights. With several processes
    everything is averaged by DDP, in one backward pass. The optimisation is manual, so the Trainer neither accumulates
    nor clips gradients, and `trainer.global_step` advances by two in each step.

    Raises:
        ValueError: an argument out of range, names that match nothing, maps that do not fit each other.
        MisconfigurationException: the datamodule has other classes or image shapes; a callback has changed the leader.

    Example::

        module = FFSD("resnet20", num_classes=100)
        Trainer(max_epochs=300).fit(module, datamodule)
        torch.save(module.network.state_dict(), "leader.pt")

    Packaged config: ``method/ffsd``.
    """

    NOT_SAVED = (*ImageClassifier.NOT_SAVED, "self_distillation_optimizer", "self_distillation_lr_scheduler")

    def __init__(
        self,
        network: str | Factory,
        num_classes: int = 10,
        feature_layers: str | list[str] = "layer?",
        num_students: int = 2,
        temperature: float = 2.0,
        lambda_diversity: float = 1e-5,
        lambda_fusion: float = 10.0,
        lambda_self_distillation: float = 1000.0,
        warmup_epochs: int = 5,
        init: Init = "network",
        optimizer: OptimizerCallable = networks_sgd,
        lr_scheduler: LRSchedulerCallable | None = cifar_schedule,
        fusion_weight_decay: float = 1e-5,
        self_distillation_optimizer: OptimizerCallable = self_distillation_adam,
        self_distillation_lr_scheduler: LRSchedulerCallable | None = cifar_schedule,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        input_shape: tuple[int, int, int] = (3, 32, 32),
        channels_last: bool = False,
    ) -> None:
        for name, value, least in (
            ("num_students", num_students, 2),
            ("lambda_diversity", lambda_diversity, 0),
            ("lambda_fusion", lambda_fusion, 0),
            ("lambda_self_distillation", lambda_self_distillation, 0),
            ("warmup_epochs", warmup_epochs, 0),
            ("fusion_weight_decay", fusion_weight_decay, 0),
        ):
            if value < least:
                raise ValueError(f"FFSD({name}={value}): give a number of at least {least}.")
        if temperature <= 0:
            raise ValueError(f"FFSD(temperature={temperature}): give a number above 0.")
        if init not in get_args(Init):
            raise ValueError(f"FFSD(init={init!r}): give one of {', '.join(map(repr, get_args(Init)))}.")
        make = network_factory(network, num_classes, input_shape[0])
        super().__init__(
            network if isinstance(network, str) else make(), num_classes, optimizer, lr_scheduler,
            lr_scheduler_interval, input_shape=input_shape,
        )  # fmt: skip
        if "_instantiator" in self.hparams:
            self.save_hyperparameters("network")  # from the command line, which knows it as plain data
        self.automatic_optimization = False
        self.students = TrainingOnly(make() for _ in range(num_students))
        if init == "official":
            for net in (self.network, *self.students):
                initialise(net)
        self.feature_layers, self.map_shapes = self._find_maps(feature_layers)
        widths = [shape[0] for shape in reversed(self.map_shapes)]
        self.fusion = Fusion(num_students * widths[0], widths[0], num_classes)
        self.trans_fusion = TransFusion(widths[0], num_students * widths[0])
        # of all students but the first, and of the leader
        self.self_distillation = TrainingOnly(SelfDistillation(widths) for _ in range(num_students))
        if channels_last:
            self.to(memory_format=torch.channels_last)
        self.channels_last = channels_last
        self.temperature = temperature
        self.lambda_diversity = lambda_diversity
        self.lambda_fusion = lambda_fusion
        self.lambda_self_distillation = lambda_self_distillation
        self.warmup_epochs = warmup_epochs
        self.fusion_weight_decay = fusion_weight_decay
        self.self_distillation_optimizer = self_distillation_optimizer
        self.self_distillation_lr_scheduler = self_distillation_lr_scheduler
        accuracy = partial(MulticlassAccuracy, num_classes, average="micro", validate_args=False)
        others = [*(f"student_{i}" for i in range(num_students)), "fusion", "ensemble"]
        self.val_accs, self.test_accs = (nn.ModuleDict({name: accuracy() for name in others}) for _ in range(2))

    # ---- phases

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        check_epoch(self.trainer, "FFSD", "warmup_epochs", self.warmup_epochs)
        if "configure_optimizers" in vars(self):  # put there by the command line
            raise MisconfigurationException(
                "FFSD makes two optimisers itself: give model.optimizer and model.self_distillation_optimizer, and no "
                "--optimizer."
            )
        self._check_leader()
        open_account(self.trainer, self)

    def on_train_epoch_end(self) -> None:
        if self.lr_scheduler_interval == "epoch":
            advance_schedules(self.trainer)

    def on_fit_end(self) -> None:
        whole, deployed = (sum(p.numel() for p in m.parameters()) for m in (self, self.network))
        note = (
            f"Trained by {len(self.students)} students beside it, fusion and self-distillation: "
            f"{human(whole)} parameters in training, {human(deployed)} deployed."
        )
        close_account(self.trainer, self, notes=[note])

    # ---- steps

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        images, labels = self.labelled("train", batch)
        losses, logits = self.losses(images, labels)
        loss = torch.stack(list(losses.values())).sum()
        # parameters of one are targets to all others, so that one backward pass is as good as one for each
        to_networks, to_self_distillation = cast(list[LightningOptimizer], self.optimizers())
        to_networks.zero_grad()
        to_self_distillation.zero_grad()
        self.manual_backward(loss + self.loss_terms(loss, batch, batch_idx))
        scale = gradient_scale(self.trainer)
        to_networks.step()
        self._rescale_gradients(gradient_scale(self.trainer) / scale)
        to_self_distillation.step()
        if self.lr_scheduler_interval == "step":
            advance_schedules(self.trainer)
        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        log("train/loss", loss, prog_bar=True)
        for name, value in losses.items():
            log(f"train/ffsd/{name}", value)
        self.train_acc.update(logits, labels)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self._judge("val", batch, self.val_accs)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self._judge("test", batch, self.test_accs)

    def losses(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of all that is trained, weighted as in the present epoch; each has parameters of its own.

        Returns:
            ``student_0``, ``student_1``, ..., ``fusion``, ``leader`` and ``self_distillation``, the sum over the
            modules of that name; and the leader's logits.
        """
        ramp = ramp_up(self.current_epoch + 1, self.warmup_epochs)
        leader, *students = self._see([self.network, *self.students], images)
        together = torch.cat([student.maps[-1].detach() for student in students], 1)
        fused, fused_logits = self.fusion(together)

        losses = {}
        for i, student in enumerate(students):
            losses[f"student_{i}"] = F.cross_entropy(student.logits, labels) + self._mutual(students, i)
            if i:
                apart = self._apart(student, students[i - 1].maps[-1].detach(), self.self_distillation[i - 1])
                losses[f"student_{i}"] += ramp * self.lambda_diversity * apart
        ensemble = torch.stack([student.logits.detach() for student in students]).mean(0)
        losses["fusion"] = F.cross_entropy(fused_logits, labels) + self._told(fused_logits, ensemble)
        led = self._led(leader, together, fused.detach())
        losses["leader"] = F.cross_entropy(leader.logits, labels) + self._told(leader.logits, fused_logits.detach())
        losses["leader"] += ramp * self.lambda_fusion * led

        # after they were used in eval mode above: this moves the statistics of their batch norms
        learning = zip(self.self_distillation, [*students[1:], leader], strict=True)
        reproduction = [reproduced(module(seen.maps[-1].detach()), seen.maps) for module, seen in learning]
        losses["self_distillation"] = ramp * self.lambda_self_distillation * torch.stack(reproduction).sum()
        return losses, leader.logits

    def _told(self, logits: Tensor, target: Tensor) -> Tensor:
        return soft_targets(logits, target, self.temperature)

    def _mutual(self, students: list[Seen], i: int) -> Tensor:
        """What student i learns from the logits of the others."""
        told = [self._told(students[i].logits, s.logits.detach()) for j, s in enumerate(students) if j != i]
        return torch.stack(told).mean()

    def _apart(self, student: Seen, other: Tensor, module: nn.Module) -> Tensor:
        """How far a student's attention is from where that of the student before is not."""
        moved = diversity(strength(student.maps[-1]), strength(other))
        return moved + imposed(student.maps, cast(SelfDistillation, module).judge(shifted(other)))

    def _led(self, leader: Seen, together: Tensor, fused: Tensor) -> Tensor:
        """What the leader learns from the students' maps, as they are and fused."""
        deepest = leader.maps[-1]
        module = cast(SelfDistillation, self.self_distillation[-1])
        whole = attention(deepest, fused) + attention(self.trans_fusion(deepest), together)
        return whole + imposed(leader.maps, module.judge(fused))

    def _see(self, networks: Iterable[nn.Module], images: Tensor) -> list[Seen]:
        if self.channels_last:
            images = images.to(memory_format=torch.channels_last)
        return [see(network, self.feature_layers, images) for network in networks]

    def _judge(self, split: str, batch: Any, accuracies: nn.ModuleDict) -> None:
        """Accuracies of all but the leader."""
        images, labels = batch
        students = self._see(self.students, images)
        logits = {f"student_{i}": student.logits for i, student in enumerate(students)}
        _, logits["fusion"] = self.fusion(torch.cat([student.maps[-1] for student in students], 1))
        logits["ensemble"] = torch.stack([student.logits for student in students]).mean(0)
        for name, accuracy in accuracies.items():
            accuracy.update(logits[name], labels)  # type: ignore[operator]
            self.log(
                f"{split}/{name}_acc", cast(Metric, accuracy), on_step=False, on_epoch=True, batch_size=len(labels),
                metric_attribute=f"{split}_accs.{name}",
            )  # fmt: skip

    # ---- optimisers

    def configure_optimizers(self) -> Any:
        """[networks, trans-fusion and fusion; self-distillation]."""
        fusion, makers = (list(m.parameters()) for m in (self.fusion, self.self_distillation))
        others = {id(p) for p in (*fusion, *makers)}
        networks = [p for p in self.parameters() if id(p) not in others]
        groups: Any = [{"params": networks}, {"params": fusion, "weight_decay": self.fusion_weight_decay}]
        optimizers = [self.optimizer(groups), self.self_distillation_optimizer(makers)]
        schedules = zip((self.lr_scheduler, self.self_distillation_lr_scheduler), optimizers, strict=True)
        return optimizers, [schedule(optimizer) for schedule, optimizer in schedules if schedule is not None]

    def _rescale_gradients(self, factor: float) -> None:
        """In fp16 the step of one optimiser may change by what the gradients of the other are divided."""
        if factor != 1:
            gradients = [p.grad for p in self.self_distillation.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)

    # ---- small matters

    def _find_maps(self, layers: str | list[str]) -> tuple[list[str], list[tuple[int, ...]]]:
        return find_maps(self.network, layers, torch.zeros(1, *self.input_shape), self.num_classes)

    def _check_leader(self) -> None:
        _, shapes = self._find_maps(self.feature_layers)
        if shapes != self.map_shapes:
            raise MisconfigurationException(
                f"FFSD: a callback has made the leader's maps {shapes}, its fusion is made for {self.map_shapes}. "
                f"Train first, and prune module.network in a fit of its own."
            )
