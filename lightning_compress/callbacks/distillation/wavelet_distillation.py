r"""Wavelet distillation: let a small generator copy only what is fine in its teacher's images.

Zhang, Chen, Tu, Wan, Xu, Ma, "Wavelet Knowledge Distillation: Towards Efficient Image-to-Image Translation", CVPR 2022,
arXiv:2203.06321. A small generator gets the coarse of an image right by itself, and an ordinary distance to the
teacher's image is mostly about that. So the low band is dropped:

    L_G = L_base + alpha sum_{j = 1..J} mean |Psi_j(T) - Psi_j(S)|

S are the student's translations, T the teacher's of the same images, Psi_j the three bands of details of level j of a
wavelet transform, L_base whatever the generators minimise without a teacher. With two directions each generator has its
teacher, and only first translations are compared, not what comes back from them. Discriminators learn as before, but
one that was made for a large generator is too strong for a small one: give it about four times fewer weights.

Transform and loss are in `lightning_compress.core.distill.wavelets`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_compress.callbacks.distillation.knowledge_distillation.student import (
    Student,
    networks,
    rehearse,
    shapes,
)
from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.core.distill.wavelets import Bands, Wavelet, WaveletLoss
from lightning_compress.core.example_input import find_example_input, inputs_for
from lightning_compress.core.losses import LossTerm, add_loss_term
from lightning_compress.core.measurement import count
from lightning_compress.core.meta import evaluating
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.units import human

ONLY = ""  # the name of a direction where a module has no names for them


class Call(NamedTuple):
    """A call of a student's network, and what it made."""

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    images: Any


class WaveletDistillation(Callback):
    """Add the fine bands of a teacher's images to the training of a network that makes images.

    On translation systems (`Pix2Pix`, `CycleGAN`, and any module with `directions` and `generator_loss_terms` like
    theirs) the teacher sees the training images, and its translations are compared with those that the step has made:
    the student runs no second time. On modules with automatic optimisation, such as `SuperResolution`, the teacher sees
    what the student's network was called with. The loss grows with the images' range, as any L1 does: beside a loss on
    images in 0..255 the same `alpha` fits as in [-1, 1].

    Args:
        teacher: a trained network; a whole system or module that has been trained; or a file: a checkpoint, or weights,
            of a network like the student. For two directions a system, or one for each, ``{"ab": ..., "ba": ...}``.
        teacher_weights: file with the weights of a teacher that is a module. A checkpoint of a system has those of all
            directions; else one for each.
        alpha: weight of the loss. The paper does not say its own; 1 to begin with, and then so that ``train/wavelet``
            is as large as the system's distance of images, ``train/l1`` or ``train/cycle_a``, after some hundred steps.
        levels: J, how often the low band is split; 4 in the authors' code.
        wavelet: ``"haar"`` in the authors' code, or ``"db2"``, ``"db3"``, ``"db4"``.
        bands: ``"high"`` is the method. The paper's ablations: ``"low"`` compares the last low band alone, ``"both"``
            compares both.
        network: on modules with automatic optimisation, name of the module that returns the images. None: the
            LightningModule itself where its training step calls it, else its child with most parameters.

    Logs ``train/wavelet``, with its weight (``train/wavelet_ab``, ``train/wavelet_ba`` for two directions); with
    automatic optimisation ``train/wavelet/<bands>``, without it.

    What is stored: source and SHA-256 of each teacher in the callback's state; a run that goes on with another one says
    so. Nothing in the module.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, teachers that cannot be
            read or make other images than the student, more levels than the images have halvings, and modules with
            manual optimisation that are no such systems.

    Example::

        from lightning_compress.callbacks import WaveletDistillation
        trainer = Trainer(callbacks=[WaveletDistillation(UNetGenerator(), teacher_weights="dense.ckpt")])
        trainer.fit(Pix2Pix(UNetGenerator(ngf=16), PatchDiscriminator(6, ndf=32)), datamodule)

    Packaged config: ``method/wavelet_distillation``.
    """

    def __init__(
        self,
        teacher: nn.Module | str | dict[str, nn.Module | str],
        *,
        teacher_weights: str | dict[str, str] | None = None,
        alpha: float = 1.0,
        levels: int = 4,
        wavelet: Wavelet = "haar",
        bands: Bands = "high",
        network: str | None = None,
    ) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}.")
        self.loss = WaveletLoss(levels, wavelet, bands)
        self.teacher = teacher
        self.teacher_weights = teacher_weights
        self.alpha = alpha
        self.network = network
        self._teachers: dict[str, Teacher] = {}  # by direction
        self._notes: list[str] = []
        self._student: Student | None = None
        self._added: Any = None  # what is in a system's `generator_loss_terms`
        self._term: LossTerm | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(network=self.network)

    def state_dict(self) -> dict[str, Any]:
        return {"teachers": {name: teacher.state_dict() for name, teacher in self._teachers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, teacher in self._teachers.items():
            if name in state["teachers"]:
                teacher.load_state_dict(state["teachers"][name])

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, WaveletDistillation) for callback in callbacks) > 1:
            raise MisconfigurationException("There are two WaveletDistillation in one Trainer; it takes one.")
        if type(pl_module).forward is not LightningModule.forward:  # the account measures calls of the whole
            open_account(trainer, pl_module)
        if _is_system(pl_module):
            self._rehearse(trainer, self._translations(trainer, pl_module))
            self._added = partial(self._of_translations, pl_module)
            pl_module.generator_loss_terms.append(self._added)  # type: ignore[operator, union-attr]
        else:
            self._term = add_loss_term(
                pl_module, "wavelet", self.loss.bands, partial(self._of_call, pl_module), self.alpha
            )
            self._rehearse(trainer, self._call(trainer, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for teacher in self._teachers.values():
            trainer.precision_plugin.convert_module(teacher.network)  # to bfloat16, if the student is
            teacher.to(pl_module.device)
        if self._term is not None:
            self._student = Student(pl_module, self.network, [])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        close_account(trainer, pl_module, notes=self._notes)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(pl_module)

    # ---- terms

    def _of_translations(
        self, pl_module: Any, inputs: dict[str, Tensor], fakes: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """One term for each direction, from the translations that the step has made."""
        terms = {}
        for direction in pl_module.directions:
            images = self._teachers[direction.name](inputs[direction.source])
            name = f"wavelet_{direction.name}" if len(pl_module.directions) > 1 else "wavelet"
            terms[name] = self.alpha * self.loss(fakes[direction.fake], images)
        return terms

    def _of_call(self, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> Tensor:
        """The term of a step in which the student's network was called."""
        assert self._student is not None
        heard = self._student.listen()
        if heard is None:
            raise MisconfigurationException(
                f"WaveletDistillation(network={self.network!r}): the training step of {type(pl_module).__name__} does "
                f"not call it. Name the module that returns the images."
            )
        return self.loss(heard.output, self._teachers[ONLY](*heard.args, **heard.kwargs))

    # ---- before the fit

    def _translations(self, trainer: Trainer, pl_module: Any) -> dict[str, Call]:
        """A call of each direction's generator. Makes the teachers, where there are none yet."""
        if self.network is not None:
            raise ValueError(
                f"network={self.network!r}: the directions of {type(pl_module).__name__} name its generators; leave "
                f"it out."
            )
        names = [direction.name for direction in pl_module.directions]
        for argument, given in (("teacher", self.teacher), ("teacher_weights", self.teacher_weights)):
            if isinstance(given, Mapping) and set(given) != set(names):
                raise ValueError(f"{argument}: expected one for each direction, {names}, got {sorted(given)}.")
        calls = {}
        for direction in pl_module.directions:
            generator = pl_module.generator_of(direction)
            if direction.name not in self._teachers:
                self._teachers[direction.name] = self._teacher_of(direction, generator)
            args, kwargs = inputs_for(generator, find_example_input(trainer, pl_module))
            with isolate_rng(include_cuda=False), evaluating(generator), torch.no_grad():
                calls[direction.name] = Call(generator, args, kwargs, generator(*args, **kwargs))
        teachers = list(self._teachers.values())
        if len(teachers) > 1 and _same(teachers[0].network, teachers[1].network):
            raise MisconfigurationException(
                f"teacher: one and the same for {' and '.join(names)}. Give a system that has been trained, a "
                f"checkpoint of one, or a teacher for each direction."
            )
        return calls

    def _teacher_of(self, direction: Any, student: nn.Module) -> Teacher:
        """The teacher of one direction of a system."""
        teacher, weights = self.teacher, self.teacher_weights
        teacher = teacher[direction.name] if isinstance(teacher, Mapping) else teacher
        weights = weights[direction.name] if isinstance(weights, Mapping) else weights
        if isinstance(teacher, nn.Module) and _is_system(teacher):
            named = dict(teacher.named_children())
            if direction.generator not in named:
                raise ValueError(
                    f"teacher: {type(teacher).__name__} has no {direction.generator!r}, only {', '.join(named)}."
                )
            teacher = named[direction.generator]
        return make_teacher(teacher, weights, student, direction.generator)

    def _call(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Call]:
        """As :meth:`_translations`, of a module that makes one kind of image."""
        if isinstance(self.teacher, Mapping) or isinstance(self.teacher_weights, Mapping):
            raise ValueError(f"teacher: {type(pl_module).__name__} has no directions; give one teacher, no dict.")
        heard = rehearse(pl_module, self.network, [], find_example_input(trainer, pl_module))
        network = networks(pl_module, self.network)[-1]
        if not self._teachers:
            self._teachers[ONLY] = make_teacher(self.teacher, self.teacher_weights, network)
        return {ONLY: Call(network, heard.args, heard.kwargs, heard.output)}

    def _rehearse(self, trainer: Trainer, calls: dict[str, Call]) -> None:
        """Ask every teacher once, so that all that cannot work is known now."""
        self._notes = []
        for name, (network, args, kwargs, images) in calls.items():
            teacher = self._teachers[name]
            who = type(teacher.network).__name__
            if not isinstance(images, Tensor) or images.ndim != 4:
                raise MisconfigurationException(
                    f"network={self.network!r}: the student returns no images (N, C, H, W), but {shapes(images)}. Name "
                    f"the module that does."
                )
            teacher.to(images.device)
            try:
                copied = teacher(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError) as error:
                raise MisconfigurationException(
                    f"teacher: {who} fails on what the student gets, {shapes((args, kwargs))}: {error}"
                ) from error
            if not isinstance(copied, Tensor) or copied.shape != images.shape:
                raise MisconfigurationException(
                    f"teacher: {who} makes {shapes(copied)} of {shapes((args, kwargs))}, and the student "
                    f"{tuple(images.shape)}."
                )
            most = int(math.log2(min(images.shape[-2:])))
            if self.loss.levels > most:
                raise ValueError(
                    f"levels: images of {tuple(images.shape[-2:])} can be halved {most} times at most, got "
                    f"{self.loss.levels}."
                )
            if trainer.is_global_zero and not (args and kwargs):  # the count takes either
                self._notes.append(_costs(teacher, network, kwargs or args))

    def _detach(self, pl_module: LightningModule) -> None:
        if self._added is not None:
            pl_module.generator_loss_terms.remove(self._added)  # type: ignore[operator, union-attr]
        if self._term is not None:
            self._term.remove()
        if self._student is not None:
            self._student.remove()
        for teacher in self._teachers.values():
            teacher.to("cpu")
        self._added = self._term = self._student = None


def make_teacher(given: nn.Module | str, weights: str | None, like: nn.Module, inside: str = "") -> Teacher:
    """A frozen teacher.

    Args:
        given: a network, or a file with the weights of one like the student's.
        weights: a file for a teacher that is a network.
        like: the student's network.
        inside: name of the network in a checkpoint that holds more than it.

    Raises:
        ValueError: a file is absent, broken, or does not fit.
    """
    if isinstance(given, nn.Module):
        return Teacher.from_file(weights, given, inside, argument="teacher_weights") if weights else Teacher(given)
    if weights:
        raise ValueError(f"teacher_weights={weights!r}: teacher={given!r} is itself a file. Give one of the two.")
    return Teacher.from_file(given, like, inside)


def _is_system(module: Any) -> bool:
    return hasattr(module, "directions") and hasattr(module, "generator_loss_terms")


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same parameters."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=False))
    return all(p.shape == q.shape and torch.equal(p, q) for p, q in pairs)


def _costs(teacher: Teacher, student: nn.Module, inputs: Any) -> str:
    """What a teacher costs beside its student, for the account."""
    theirs, own = count(teacher.network, inputs), count(student, inputs)
    source = f" ({teacher.source})" if teacher.source else ""
    return (
        f"Teacher: {type(teacher.network).__name__}{source}, {human(theirs.macs)} MACs and {human(theirs.params)} "
        f"parameters; {theirs.macs / max(own.macs, 1):.3g} and {theirs.params / max(own.params, 1):.3g} times the "
        f"student's."
    )
