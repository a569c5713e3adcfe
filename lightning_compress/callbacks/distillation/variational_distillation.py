r"""Variational self-distillation: a bottleneck learns to keep of the features what the label needs, and nothing else.

Tian, Zhang, Lin, Qu, Xie, Ma, "Farewell to Mutual Information: Variational Distillation for Cross-Modal Person
Re-Identification", CVPR 2021, arXiv:2104.02862; here its self-distillation (VSD), which needs no second view, for any
classifier. v are the features before the last linear layer, z is what a bottleneck makes of them, each has a classifier
of its own:

    L = L_task(v) + task_weight CE( p(y|z), y ) + weight k( p(y|v), p(y|z) )

z is sufficient, I(z; y) = I(v; y), once both classifiers say the same, so the observation's teaches the
representation's. k is a divergence that no gradient crosses towards p(y|v), but z is made from v: the encoder learns
too. The functions, and the two readings of k, are in `lightning_compress.core.distill.variational`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks.distillation.knowledge_distillation.student import rehearse, shapes
from lightning_compress.callbacks.pruning.channel_pruning import refuse_later_pruning
from lightning_compress.core.batches import targets_of
from lightning_compress.core.distill.bottleneck import InformationBottleneck, check_bottleneck
from lightning_compress.core.distill.taps import CallTap, Point, logits_of
from lightning_compress.core.distill.variational import KLMode, check_mode, self_distillation
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.losses import LossTerm, add_loss_term
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.sparse.layers import weight_layers
from lightning_compress.core.surgery import attach_record, change_in_setup, replayable, resume_in_setup, undo_changes
from lightning_compress.core.units import human

Deploy = Literal["observation", "representation"]
NAME = "representation"  # of the bottleneck, below the linear layer whose input it reads


class Representation(nn.Module):
    """A bottleneck and its classifier in the place of a linear layer: (B, in_features) -> logits (B, num_classes).

    Args:
        kwargs: see `InformationBottleneck`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.bottleneck = InformationBottleneck(**kwargs)

    def forward(self, v: Tensor) -> Tensor:
        return self.bottleneck(v)[0]


@replayable
def attach_bottleneck(module: nn.Module, head: str, deploy: Deploy, sizes: dict[str, Any]) -> Any:
    """Attach a bottleneck to what a linear layer reads; names and weights of the layer stay.

    Args:
        head: name of the layer.
        deploy: which of the two classifies in evaluation, and is left over in copies for inference.
        sizes: arguments of `Representation`.
    """
    layer = module.get_submodule(head)
    representation = Representation(**sizes).to(next(layer.parameters()).device)
    layer.add_module(NAME, representation.train(layer.training))
    if deploy == "representation":
        layer.deployed = NAME  # type: ignore[assignment]
    else:
        representation.training_only = True  # type: ignore[assignment]
    layer.register_forward_pre_hook(_hear, prepend=True)  # before quantisers of the layer's own input
    layer.register_forward_hook(_represent)
    return partial(detach_bottleneck, head=head)


def detach_bottleneck(module: nn.Module, head: str) -> None:
    """Take out what :func:`attach_bottleneck` attached."""
    layer = module.get_submodule(head)
    delattr(layer, NAME)
    vars(layer).pop("deployed", None)
    hooks: tuple[dict[int, Any], ...] = (layer._forward_pre_hooks, layer._forward_hooks)
    for registry in hooks:
        for key in [key for key, hook in registry.items() if hook in (_hear, _represent)]:
            del registry[key]


def _hear(layer: nn.Module, args: tuple[Any, ...]) -> None:
    vars(layer)["heard"] = args[0]


def _represent(layer: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
    """In training both compute, and the observation speaks, so that the module's own loss trains it."""
    v = vars(layer).pop("heard")
    if layer.training:
        representation = layer.get_submodule(NAME)
        representation.train(len(v) > 1)  # one image has no statistics of its own
        representation(v)
        return None
    return getattr(layer, NAME)(v) if hasattr(layer, "deployed") else None


_hear.part_of_function = _represent.part_of_function = True  # type: ignore[attr-defined]


class VariationalDistillation(Callback):
    """Let a classifier of the features teach a classifier behind a bottleneck, in any module whose code stays as it is.

    A module that has both heads names them, and only k is added to its loss. Otherwise a bottleneck with a classifier
    is attached to the input of the last linear layer: the module's own loss trains that layer as ever, and the
    bottleneck learns from the labels and from it.

    Args:
        teacher_head: name of the module that returns the logits of v; without `student_head` a linear layer. None: the
            last linear layer.
        student_head: name of the module that returns the logits of z. None: a bottleneck is attached.
        weight: of k; the paper's 2, which suits the official reading. The true divergence is about as many times larger
            as there are classes.
        temperature: T of both in k, without a factor T^2.
        kl_mode: ``"official"`` computes k as the released code does, ``"kl"`` as the paper states it.
        task_weight: weight of the attached classifier's cross-entropy.
        deploy: which classifies in evaluation where a bottleneck is attached, and is exported without the other:
            ``"observation"``, the module's own layer, for which the bottleneck was a help in training; or
            ``"representation"``.
        z_dim: half the length of z.
        hidden: widths on the way to z.
        classifier_dim: width of the hidden layer between z and its logits.
        dropout: in that classifier. These four have the paper's values, for 2048 features and 395 classes.

    What is stored: the bottleneck in the module's own `state_dict`, see `lightning_compress.load`.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, names that match no
            module, heads that return no logits or of other classes, features that are no vectors, and channel pruning
            that would come after the bottleneck.

    Example::

        from lightning_compress.callbacks import VariationalDistillation
        trainer = Trainer(callbacks=[VariationalDistillation(z_dim=16, hidden=[64, 32], deploy="representation")])
        trainer.fit(module, datamodule)

    Packaged config: ``method/variational_distillation``.
    """

    def __init__(
        self,
        teacher_head: str | None = None,
        student_head: str | None = None,
        *,
        weight: float = 2.0,
        temperature: float = 1.0,
        kl_mode: KLMode = "official",
        task_weight: float = 1.0,
        deploy: Deploy = "observation",
        z_dim: int = 256,
        hidden: Sequence[int] = (1000, 500),
        classifier_dim: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        for argument, value in (("weight", weight), ("task_weight", task_weight)):
            if value < 0:
                raise ValueError(f"{argument}: expected a number from 0, got {value}.")
        if temperature <= 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}.")
        check_mode("kl_mode", kl_mode, KLMode)
        check_mode("deploy", deploy, Deploy)
        check_bottleneck(z_dim, hidden, classifier_dim, dropout)
        if student_head is not None and teacher_head is None:
            raise ValueError(f"student_head={student_head!r}: name its teacher_head too.")
        self.teacher_head, self.student_head = teacher_head, student_head
        self.weight, self.temperature, self.kl_mode, self.task_weight = weight, temperature, kl_mode, task_weight
        self.deploy = deploy
        self.sizes = {"z_dim": z_dim, "hidden": list(hidden), "classifier_dim": classifier_dim, "dropout": dropout}
        self._head = ""  # of the teacher, as found
        self._taps: list[CallTap] = []
        self._terms: list[LossTerm] = []
        self._heard: tuple[Tensor, Tensor] | None = None  # logits of z and v in this step

    @property
    def state_key(self) -> str:
        return self._generate_state_key(teacher_head=self.teacher_head, student_head=self.student_head)

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        if type(pl_module).forward is not LightningModule.forward:  # the account measures calls of the whole
            open_account(trainer, pl_module)
        resumes = self.student_head is None and resume_in_setup(trainer, pl_module, by=self.state_key)
        self._head = self._find_head(pl_module)
        num_features, num_classes = self._rehearse(trainer, pl_module)
        if self.student_head is None:
            sizes = {"in_features": num_features, "num_classes": num_classes, **self.sizes}
            self._attach(trainer, pl_module, {"head": self._head, "deploy": self.deploy, "sizes": sizes}, resumes)
            self._terms.append(add_loss_term(pl_module, "vd", "task", partial(self._task, pl_module), self.task_weight))
        self._terms.append(add_loss_term(pl_module, "vd", "vsd", partial(self._vsd, pl_module), self.weight))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.student_head is None:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            held = {id(p) for group in groups for p in group["params"]}
            # a user who chooses parameters by layer does not know of these
            groups[0]["params"] += [p for p in self._representation(pl_module).parameters() if id(p) not in held]
        heads = self._head, self.student_head or f"{self._head}.{NAME}"
        self._taps = [CallTap(pl_module.get_submodule(head), pl_module) for head in heads]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._heard = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        notes = []
        if self.student_head is None:
            size = human(sum(p.numel() for p in self._representation(pl_module).parameters()))
            notes.append(f"A bottleneck with {size} parameters beside {self._head!r}; deployed is the {self.deploy}.")
        close_account(trainer, pl_module, notes=notes)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    # ---- terms

    def _vsd(self, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> Tensor:
        student, teacher = self._listen(pl_module)
        return self_distillation(student, teacher, self.temperature, self.kl_mode)

    def _task(self, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> Tensor:
        student, _ = self._listen(pl_module)
        with torch.autocast(student.device.type, enabled=False):
            return F.cross_entropy(student.float(), targets_of(batch, by="VariationalDistillation"))

    def _listen(self, pl_module: LightningModule) -> tuple[Tensor, Tensor]:
        """Logits of z and v of this batch; the step's first term asks for them."""
        outputs = [seen[1] for tap in self._taps if (seen := tap.take()) is not None]
        if len(outputs) == 2:
            teacher, student = map(self._logits, outputs)
            self._heard = student, teacher
            agree = (student.argmax(1) == teacher.argmax(1)).float().mean()
            pl_module.log(
                "vd/agreement", agree, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True,
                batch_size=len(student),
            )  # fmt: skip
        if self._heard is None:
            both = f"both teacher_head={self._head!r} and student_head={self.student_head!r}"
            heads = both if self.student_head else f"teacher_head={self._head!r}"
            raise MisconfigurationException(
                f"VariationalDistillation: the training step of {type(pl_module).__name__} does not call {heads}."
            )
        return self._heard

    # ---- before the fit

    def _find_head(self, pl_module: LightningModule) -> str:
        """The teacher's head; all names are those of modules.

        Raises:
            ValueError: they are not, or a bottleneck shall be attached to what is no linear layer.
        """
        names = [name for name, _ in pl_module.named_modules() if name]
        for argument, name in (("teacher_head", self.teacher_head), ("student_head", self.student_head)):
            if name is not None and name not in names:
                raise ValueError(
                    f"{argument}: {type(pl_module).__name__} has no module {name!r}.{did_you_mean(name, names)}"
                )
        if self.student_head is not None:
            assert self.teacher_head is not None
            return self.teacher_head
        linear = [
            name for name, layer in weight_layers(pl_module).items()
            if isinstance(layer, nn.Linear) and f".{NAME}." not in name
        ]  # fmt: skip
        head = self.teacher_head or (linear[-1] if linear else "")
        if head not in linear:
            found = f"{head!r} is a {type(pl_module.get_submodule(head)).__name__}" if head else "there is none"
            raise ValueError(
                f"teacher_head={self.teacher_head!r}: a bottleneck reads what a linear layer reads, but {found}. Name "
                f"a linear layer, or name student_head too.{did_you_mean(head, linear)}"
            )
        return head

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule) -> tuple[int, int]:
        """Run the module once on one image, so that all that cannot work is known now.

        Returns:
            Features of v (0 if no bottleneck needs them), and classes.
        """
        points = [Point(self._head, input=True), Point(self._head)]
        points += [Point(self.student_head)] if self.student_head else []
        seen = rehearse(pl_module, None, points, find_example_input(trainer, pl_module)).features
        teacher, student = self._logits(seen[points[1]]), self._logits(seen[points[-1]])
        if student.shape != teacher.shape:
            raise MisconfigurationException(
                f"VariationalDistillation: teacher_head={self._head!r} tells {teacher.shape[1]} classes apart, and "
                f"student_head={self.student_head!r} {student.shape[1]}."
            )
        return seen[points[0]].shape[-1] if self.student_head is None else 0, teacher.shape[1]

    def _logits(self, output: Any) -> Tensor:
        logits = logits_of(output)
        if logits is None:
            raise MisconfigurationException(
                f"VariationalDistillation(teacher_head={self.teacher_head!r}, student_head={self.student_head!r}): "
                f"heads must return logits (B, C), but one returns {shapes(output)}. Name other modules."
            )
        return logits

    def _attach(self, trainer: Trainer, pl_module: LightningModule, arguments: dict[str, Any], resumes: bool) -> None:
        """Attach a bottleneck, unless it is there: from a checkpoint, or from an earlier fit."""
        own = [step for step in attach_record(pl_module).steps if step["by"] == self.state_key]
        held = own[-1]["arguments"] if own else None
        if held == arguments:
            return
        if resumes:
            raise MisconfigurationException(
                f"VariationalDistillation: the checkpoint has a bottleneck with {held}, not with {arguments}. Resume "
                f"with the arguments of the run that wrote it."
            )
        undo_changes(pl_module, by=self.state_key)
        change_in_setup(trainer, pl_module, attach_bottleneck, arguments, by=self.state_key)

    def _representation(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.get_submodule(f"{self._head}.{NAME}")

    def _detach(self) -> None:
        for tap in self._taps:
            tap.remove()
        for term in self._terms:
            term.remove()
        self._taps, self._terms, self._heard = [], [], None

    def _check(self, trainer: Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(c, VariationalDistillation) for c in callbacks) > 1:
            raise MisconfigurationException("There are two VariationalDistillation in one Trainer; it takes one.")
        if self.student_head is None:
            refuse_later_pruning(trainer, self, "the bottleneck has the width of the features")
