"""When the teacher is asked, and what the student is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.callbacks.distillation.knowledge_distillation.memories import Memories
from lightning_compress.callbacks.distillation.knowledge_distillation.student import (
    CONNECTORS,
    Heard,
    Student,
    networks,
    rehearse,
    shapes,
)
from lightning_compress.callbacks.distillation.knowledge_distillation.teachers import (
    CachedTeachers,
    Teachers,
    check_images,
    make_teacher,
)
from lightning_compress.callbacks.distillation.knowledge_distillation.terms import (
    COMPARISONS,
    INITIAL,
    LEARNT,
    OF_FEATURES,
    OF_LABELS,
    OF_LOGITS,
    TERMS,
    Pair,
    check_features,
    check_pair,
    connector,
    pairs_of,
)
from lightning_compress.callbacks.pruning.channel_pruning import refuse_later_pruning
from lightning_compress.core.batches import targets_of
from lightning_compress.core.distill.cache import TeacherCache
from lightning_compress.core.distill.connectors import Factors, connect
from lightning_compress.core.distill.losses import non_target_classes, soft_targets, target_class
from lightning_compress.core.distill.taps import Point
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.losses import LossTerm, add_loss_term
from lightning_compress.core.optimizers import own_group
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.surgery import attach_record, change_in_setup, check_epoch, resume_in_setup, undo_changes


@dataclass
class Lesson:
    """What student and teachers make of one batch."""

    student: Tensor | None  # logits
    teacher: Tensor | None
    of_student: dict[Point, Tensor]  # features
    of_teacher: dict[Point, Tensor]
    restored: Tensor | None = None  # error of what paraphrasers make of the teacher's features


class KnowledgeDistillation(Callback):
    """Add a teacher's knowledge to the training of any classifier, whose code stays as it is.

    The training step runs as always; the teacher sees what the student's network was called with, and the terms are
    added to the loss. The student's module may do anything that ends in one call of a network that returns logits.

    Args:
        teacher: a network or a LightningModule; a file: a checkpoint of an `ImageClassifier`, or of a network like the
            student; a name: ``"resnet56"``, ``"torchvision/resnet50"``, ``"timm/resnet50.a1_in1k"`` (these two come
            with their library's weights, if `teacher_weights` gives none). Or several of them: then the mean of their
            logits teaches.
        losses: weight of each term: ``logits``, ``target``, ``non_target``; ``hints``, ``attention``, ``selectivity``,
            ``flow``, ``factors``, ``boundary``, ``information``; ``similarity``, ``distance``, ``angle``,
            ``correlation``, ``probability``; ``contrast``, ``noise_contrast``. None: Hinton's, ``{"logits": 1.0}``.
        teacher_weights: file with the weights of a teacher that is a module or a name; one for each of several.
        task_weight: gamma, weight of the module's own loss; 0 trains by the teacher alone.
        temperature: T of the terms on logits. 4 is usual on CIFAR, 1 on ImageNet.
        features: for the terms on features: globs of the student's modules (names as in the LightningModule) -> globs
            of the teacher's, whose outputs are compared one by one and summed; or such a mapping for each term.
            ``boundary`` compares what these modules, activations, get. None: the input of the last linear layer of
            both, for relations and contrasts; the other terms want names.
        network: name of the module that returns the logits. None: the LightningModule itself where its training step
            calls it, else its child with most parameters.
        warmup_epochs: in how many epochs the terms' weights grow to their full value, linearly; DKD's 20.
        initial_epochs: length of a stage of its own for ``flow``, ``boundary`` and what ``factors`` paraphrases: only
            these are learnt in the first epochs, and only the others after them. 30 in the comparison of losses by
            Tian et al., arXiv:1910.10699. 0: all are learnt at once.
        contrast_dim: length of the embeddings of ``contrast``, ``noise_contrast`` and ``correlation``; CRD's 128.
        contrast_temperature: of ``contrast`` and ``noise_contrast``; CRD's 0.07.
        contrast_negatives: images of other classes that ``noise_contrast`` tells each image from; CRD's 16,384.
        contrast_momentum: how much the memory of ``noise_contrast`` keeps of an embedding; CRD's 0.5.
        connector_lr_factor: learning rate of learnt connectors, as a multiple of the student's.
        channels_last: whether teachers compute in the channels-last memory format.
        cache: folder in which the teacher's outputs are kept, so that it sees each image once. Needs training data
            without random augmentation; every output takes its room in memory and on disk.

    What is stored: connectors of the terms that learn some in the module's own `state_dict`, see
    `lightning_compress.load`, and left out of exports; source and SHA-256 of each teacher, and the memory of
    ``noise_contrast``, in the callback's state.

    With several processes each asks its own teacher about its own images; relations and contrast are those of the
    process's batch, and the memory is one for all.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, teachers that cannot be
            read or do not fit, names that match no module, features that cannot be compared; later for a cache that
            never finds an image again.

    Example::

        from lightning_compress.callbacks import KnowledgeDistillation
        trainer = Trainer(callbacks=[KnowledgeDistillation("resnet56", teacher_weights="resnet56.pt")])
        trainer.fit(module, datamodule)

    Packaged config: ``method/knowledge_distillation``.
    """

    def __init__(
        self,
        teacher: nn.Module | str | Sequence[nn.Module | str],
        losses: dict[str, float] | None = None,
        *,
        teacher_weights: str | Sequence[str | None] | None = None,
        task_weight: float = 1.0,
        temperature: float = 4.0,
        features: dict[str, str | dict[str, str]] | None = None,
        network: str | None = None,
        warmup_epochs: int = 0,
        initial_epochs: int = 0,
        contrast_dim: int = 128,
        contrast_temperature: float = 0.07,
        contrast_negatives: int = 16384,
        contrast_momentum: float = 0.5,
        connector_lr_factor: float = 1.0,
        channels_last: bool = False,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.losses = {"logits": 1.0} if losses is None else dict(losses)
        _check_losses(self.losses, task_weight)
        for argument, value in (
            ("temperature", temperature),
            ("contrast_dim", contrast_dim),
            ("contrast_temperature", contrast_temperature),
            ("contrast_negatives", contrast_negatives),
            ("connector_lr_factor", connector_lr_factor),
        ):
            if value <= 0:
                raise ValueError(f"{argument}: expected a number above 0, got {value}.")
        if not 0 <= contrast_momentum < 1:
            raise ValueError(f"contrast_momentum: expected a share from 0 to below 1, got {contrast_momentum}.")
        for argument, epochs in (("warmup_epochs", warmup_epochs), ("initial_epochs", initial_epochs)):
            if epochs < 0:
                raise ValueError(f"{argument}: expected 0 or more epochs, got {epochs}.")
        if initial_epochs and not {*INITIAL, "factors"} & set(self.losses):
            raise ValueError(
                f"initial_epochs={initial_epochs}: none of the losses {list(self.losses)} has a stage before the "
                f"others. Those that have are {', '.join(INITIAL)} and factors."
            )
        check_features(features, list(self.losses))
        self.teacher = [teacher] if isinstance(teacher, (nn.Module, str)) else list(teacher)
        self.teacher_weights = (
            [teacher_weights]
            if isinstance(teacher_weights, str)
            else list(teacher_weights or [None] * len(self.teacher))
        )
        if not self.teacher or len(self.teacher) != len(self.teacher_weights):
            raise ValueError(
                f"teacher_weights={teacher_weights!r}: there are {len(self.teacher)} teachers; give a file, or None, "
                f"for each."
            )
        of_features = [term for term in self.losses if term in OF_FEATURES]
        if len(self.teacher) > 1 and of_features:
            raise ValueError(
                f"losses: {of_features[0]!r} looks at features of one teacher, but there are {len(self.teacher)}. "
                f"Several teach by their logits: {', '.join(OF_LOGITS)}."
            )
        self.task_weight, self.temperature = task_weight, temperature
        self.features, self.network = features, network
        self.warmup_epochs, self.initial_epochs = warmup_epochs, initial_epochs
        self.contrast_dim, self.contrast_temperature = contrast_dim, contrast_temperature
        self.contrast_negatives, self.contrast_momentum = contrast_negatives, contrast_momentum
        self.connector_lr_factor = connector_lr_factor
        self.channels_last = channels_last
        self.cache = cache
        self._teachers: Teachers | None = None
        self._asked: Teachers | CachedTeachers | None = None  # during a fit
        self._note = ""
        self._pairs: dict[str, list[Pair]] = {}
        self._terms: dict[str, LossTerm] = {}
        self._student: Student | None = None
        self._lesson: Lesson | None = None
        self._memories: Memories | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(losses=sorted(self.losses), features=self.features, network=self.network)

    def state_dict(self) -> dict[str, Any]:
        if self._teachers is None:
            return {}
        memories = {"memories": self._memories.state_dict()} if self._memories else {}
        return {"teachers": [t.state_dict() for t in self._teachers.all], **memories}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._memories is not None:
            self._memories.load_state_dict(state_dict["memories"])
        then, now = state_dict["teachers"], self._teachers.all if self._teachers else []
        if now and len(then) != len(now):
            rank_zero_warn(f"There are {len(now)} teachers, but this run began with {len(then)}.")
        for teacher, state in zip(now, then, strict=False):
            teacher.load_state_dict(state)

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        self._check(trainer)
        if type(pl_module).forward is not LightningModule.forward:  # the account measures calls of the whole
            open_account(trainer, pl_module)
        resumes = self._learns and resume_in_setup(trainer, pl_module, by=self.state_key)
        self._connect(trainer, pl_module, self._rehearse(trainer, pl_module), resumes)
        assert self._teachers is not None
        self._asked = self._teachers
        if self.cache is not None:
            check_images(trainer, pl_module)
            folder = Path(self.cache) / self._teachers.identity(trainer.precision)
            self._asked = CachedTeachers(self._teachers, TeacherCache(folder, trainer.global_rank))
        if self.task_weight != 1 or self.initial_epochs:
            self._terms["task"] = add_loss_term(pl_module, "kd", "task", _own_loss, self.task_weight - 1)
        for name, weight in self.losses.items():
            self._terms[name] = add_loss_term(pl_module, "kd", name, partial(self._value, pl_module, name), weight)
        if "factors" in self.losses:  # the student has no part in it, nor has its weight
            self._terms["paraphrase"] = add_loss_term(pl_module, "kd", "paraphrase", self._restored)
        if "noise_contrast" in self.losses:
            options = self.contrast_dim, self.contrast_negatives, self.contrast_temperature, self.contrast_momentum
            self._memories = Memories(trainer, pl_module, len(self._pairs["noise_contrast"]), *options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if hasattr(pl_module, CONNECTORS):
            parameters = list(getattr(pl_module, CONNECTORS).parameters())
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            held = {id(p) for group in groups for p in group["params"]}
            # a user who chooses parameters by layer does not know of these
            groups[0]["params"] += [p for p in parameters if id(p) not in held]
            own_group(trainer, parameters, lr_factor=self.connector_lr_factor)
        assert self._teachers is not None
        for teacher in self._teachers.all:
            trainer.precision_plugin.convert_module(teacher.network)  # to bfloat16, if the student is
            teacher.to(pl_module.device)
        if self._memories is not None:
            self._memories.to(pl_module.device)
        self._student = Student(pl_module, self.network, self._points(0))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        since = trainer.current_epoch - self.initial_epochs
        warm = min(1.0, (since + 1) / max(1, self.warmup_epochs))
        for name, weight in self.losses.items():
            initial = self.initial_epochs > 0 and name in INITIAL
            self._terms[name].weight = weight * (float(since < 0) if initial else max(0.0, warm))
        if self.initial_epochs:  # a weight of 0 keeps all parameters in the graph, for DDP
            self._terms["task"].weight = -1.0 if since < 0 else self.task_weight - 1
            if "factors" in self.losses:
                self._terms["paraphrase"].weight = float(since < 0)
        if isinstance(self._asked, CachedTeachers):
            self._asked.begin_epoch()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if 0 < self.initial_epochs <= trainer.current_epoch:
            for layer in getattr(pl_module, CONNECTORS, nn.ModuleDict()).children():
                if isinstance(layer, Factors):
                    layer.spare_paraphraser()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._memories is not None:
            self._memories.keep(pl_module)
        self._lesson = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self._asked, CachedTeachers):
            self._asked.cache.write()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        close_account(trainer, pl_module, notes=[self._note])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    # ---- terms

    def _value(self, pl_module: LightningModule, name: str, outputs: Any, batch: Any, batch_idx: int) -> Tensor:
        lesson = self._learn(pl_module)
        if name in OF_FEATURES:
            return self._compare(pl_module, name, lesson, _classes(batch) if name in OF_LABELS else None)
        student: Any = lesson.student
        teacher: Any = lesson.teacher
        if name == "logits":
            return soft_targets(student, teacher, self.temperature)
        part = target_class if name == "target" else non_target_classes
        return part(student, teacher, _classes(batch), self.temperature)

    def _compare(self, pl_module: LightningModule, name: str, lesson: Lesson, labels: Tensor | None) -> Tensor:
        """A term on features, over all of its pairs."""
        connectors = getattr(pl_module, CONNECTORS, {})
        seen: list[tuple[Tensor, ...]] = []
        for index, (own, theirs) in enumerate(self._pairs[name]):
            pair, key = (lesson.of_student[own], lesson.of_teacher[theirs]), f"{name}_{index}"
            seen.append(connectors[key](*pair) if key in connectors else pair)
        if name == "noise_contrast":
            assert self._memories is not None
            assert labels is not None
            return self._memories.contrast(pl_module.trainer, seen, labels)
        if name == "factors":
            lesson.restored = torch.stack([error for _, _, error in seen]).sum()
        if name == "contrast":
            return COMPARISONS[name](seen, labels=labels, temperature=self.contrast_temperature)
        return COMPARISONS[name](seen)

    def _restored(self, outputs: Any, batch: Any, batch_idx: int) -> Tensor:
        assert self._lesson is not None
        assert self._lesson.restored is not None  # `factors` comes before it
        return self._lesson.restored

    def _learn(self, pl_module: LightningModule) -> Lesson:
        """The lesson of this step; the step's first term asks the teachers."""
        assert self._student is not None
        heard = self._student.listen()
        if heard is not None:
            self._lesson = self._ask(heard)
            student, teacher = self._lesson.student, self._lesson.teacher
            if student is not None and teacher is not None:
                agree = (student.argmax(1) == teacher.argmax(1)).float().mean()
                pl_module.log(
                    "kd/agreement", agree, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True,
                    batch_size=len(student),
                )  # fmt: skip
        if self._lesson is None:
            raise MisconfigurationException(
                f"KnowledgeDistillation(network={self.network!r}): the training step of {type(pl_module).__name__} "
                f"does not call it. Name the module that returns the logits."
            )
        return self._lesson

    def _ask(self, heard: Heard) -> Lesson:
        assert self._asked is not None
        answer = self._asked.ask(heard.args, heard.kwargs)
        logits = answer.pop(0) if self._needs_logits else None
        return Lesson(heard.logits, logits, heard.features, dict(zip(self._points(1), answer, strict=True)))

    # ---- before the fit

    @property
    def _learns(self) -> bool:
        return any(term in LEARNT for term in self.losses)

    @property
    def _needs_logits(self) -> bool:
        return any(term in OF_LOGITS for term in self.losses)

    def _points(self, side: int) -> list[Point]:
        """All places that are compared: of the student (0) or of the teacher (1)."""
        return list(dict.fromkeys(pair[side] for pairs in self._pairs.values() for pair in pairs))

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, tuple[Any, ...]]:
        """Run student and teachers once on one image, so that all that cannot work is known now.

        Returns:
            The connectors that are needed.
        """
        example = find_example_input(trainer, pl_module)
        heard = rehearse(pl_module, self.network, [], example)
        if self._needs_logits and heard.logits is None:
            raise MisconfigurationException(
                f"KnowledgeDistillation(network={self.network!r}): it returns no logits (B, K), but "
                f"{shapes(heard.output)}. Name the module that does."
            )
        if self._teachers is None:
            self._teachers = self._make_teachers(pl_module, heard)
        network = self._teachers.all[0].network
        self._pairs = {t: pairs_of(t, self.features, pl_module, network) for t in self.losses if t in OF_FEATURES}
        self._teachers.points = self._points(1)
        self._asked = self._teachers
        try:
            lesson = self._ask(rehearse(pl_module, self.network, self._points(0), example))
        except (RuntimeError, TypeError, ValueError, LookupError) as error:
            raise MisconfigurationException(
                f"teacher: {type(network).__name__} fails on what the student gets, "
                f"{shapes((heard.args, heard.kwargs))}: {error}"
            ) from error
        if lesson.teacher is not None and lesson.student is not None and lesson.teacher.shape != lesson.student.shape:
            raise MisconfigurationException(
                f"teacher: {type(network).__name__} tells {lesson.teacher.shape[1]} classes apart, and the student "
                f"{lesson.student.shape[1]}. Terms on features work all the same: {', '.join(OF_FEATURES)}."
            )
        if trainer.is_global_zero:
            self._note = self._teachers.costs(heard.args, heard.kwargs)
        return self._connectors(lesson)

    def _make_teachers(self, pl_module: LightningModule, heard: Heard) -> Teachers:
        inputs = tree_leaves((heard.args, heard.kwargs))
        images = next((x for x in inputs if isinstance(x, Tensor) and x.ndim == 4), None)
        made = [
            make_teacher(
                teacher,
                weights,
                like=networks(pl_module, self.network)[-1],
                num_classes=None if heard.logits is None else heard.logits.shape[1],
                channels=3 if images is None else images.shape[1],
                channels_last=self.channels_last,
            )
            for teacher, weights in zip(self.teacher, self.teacher_weights, strict=True)
        ]
        return Teachers(made, self._needs_logits)

    def _connectors(self, lesson: Lesson) -> dict[str, tuple[Any, ...]]:
        """Check the shapes of all pairs; what learnt terms need to bring one to the other."""
        needed = {}
        for term, pairs in self._pairs.items():
            for index, pair in enumerate(pairs):
                student, teacher = lesson.of_student[pair[0]], lesson.of_teacher[pair[1]]
                check_pair(term, pair, student, teacher)
                if learnt := connector(term, student, teacher, self.contrast_dim):
                    needed[f"{term}_{index}"] = learnt
        return needed

    def _connect(
        self, trainer: Trainer, pl_module: LightningModule, needed: dict[str, tuple[Any, ...]], resumes: bool
    ) -> None:
        """Attach what is needed, unless it is there: from a checkpoint, or from an earlier fit."""
        old = [s for s in attach_record(pl_module).steps if s.get("arguments", {}).get("name") == CONNECTORS]
        held = {key: tuple(given) for step in old for key, given in step["arguments"]["connectors"].items()}
        if held == needed:
            return
        if resumes:
            raise MisconfigurationException(
                f"KnowledgeDistillation: the checkpoint has connectors {held}, and this teacher needs {needed}. Resume "
                f"with the teacher, features and contrast_dim of the run that wrote it."
            )
        for step in old:
            undo_changes(pl_module, by=step["by"])
        if needed:
            arguments = {"name": CONNECTORS, "connectors": needed}
            change_in_setup(trainer, pl_module, connect, arguments, by=self.state_key)

    def _detach(self) -> None:
        if self._memories is not None:
            self._memories.remove()
        if self._student is not None:
            self._student.remove()
        for term in self._terms.values():
            term.remove()
        for teacher in self._teachers.all if self._teachers else ():
            teacher.to("cpu")
        self._terms = {}
        self._student = self._lesson = self._asked = None

    def _check(self, trainer: Trainer) -> None:
        check_epoch(trainer, "KnowledgeDistillation", "warmup_epochs", self.warmup_epochs)
        check_epoch(trainer, "KnowledgeDistillation", "initial_epochs", self.initial_epochs)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(c, KnowledgeDistillation) for c in callbacks) > 1:
            raise MisconfigurationException(
                "There are two KnowledgeDistillation in one Trainer. Give one of them all teachers and losses."
            )
        if self._learns:
            term = next(t for t in self.losses if t in LEARNT)
            why = f"what {term!r} learns has the width of the student's features"
            refuse_later_pruning(trainer, self, why, ", or take losses that learn nothing")


def _check_losses(losses: Mapping[str, float], task_weight: float) -> None:
    if not losses:
        raise ValueError(f"losses={dict(losses)}: give at least one of {', '.join(TERMS)}.")
    for name, weight in losses.items():
        if name not in TERMS:
            raise ValueError(f"losses: there is no {name!r}.{did_you_mean(name, TERMS) or f' Choose of {TERMS}.'}")
        if weight <= 0:
            raise ValueError(f"losses: expected a weight above 0 for {name!r}, got {weight}.")
    if task_weight < 0:
        raise ValueError(f"task_weight: expected 0 or more, got {task_weight}.")


def _own_loss(outputs: Any, batch: Any, batch_idx: int) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs["loss"]


def _classes(batch: Any) -> Tensor:
    labels = targets_of(batch, "KnowledgeDistillation")
    return labels.argmax(1) if labels.ndim > 1 else labels
