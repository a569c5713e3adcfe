"""The one way in which a callback adds a term to a module's loss.

Lightning has no hook that changes the loss. `add_loss_term` therefore wraps the module's ``training_step``:

    total = training_step(batch) + sum_k weight_k * term_k(outputs, batch, batch_idx)

The sum happens inside the step, so DDP, autocast, gradient accumulation and scaling treat a term as a part of
the loss. A callback calls it in ``setup`` and removes the handle in ``teardown``. A method that needs the batch while
the network runs (labels for its masks) puts :func:`around_training_step` about the same step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

TermFunction = Callable[[Any, Any, int], Tensor]
Around = Callable[[Any], AbstractContextManager[Any]]


def add_loss_term(
    pl_module: LightningModule, method: str, term: str, fn: TermFunction, weight: float = 1.0
) -> LossTerm:
    """Add ``weight * fn(outputs, batch, batch_idx)`` to the training loss of a module.

    ``fn`` gets what ``training_step`` returned (before any term was added) and the batch, runs inside the
    step (under its autocast), and returns a scalar. Its value, without the weight, is logged as
    ``train/<method>/<term>``. A step that returns None is left out of training, as without a term.

    While a term is active the module carries an attribute ``training_step``. A deep copy or pickle of it has
    none: terms belong to the run.

    Args:
        pl_module: the module to train.
        method: short name of the method, for the log.
        term: name of the term, for the log.
        fn: (outputs, batch, batch_idx) -> scalar tensor.
        weight: may be changed later, on the handle.

    Returns:
        A handle with ``weight`` and ``remove()``. Removing the last term leaves the module as it was.

    Raises:
        MisconfigurationException: the module optimises manually without `LossTermsMixin`, or its training
            step fetches its own batches.
        ValueError: a term of this name is active.
    """
    if isinstance(pl_module, LossTermsMixin):
        terms = _slot(pl_module, "loss_terms", _Terms)
    else:
        _check_step(pl_module, f"{method}/{term}")
        terms = _slot(pl_module, "training_step", _Step)
    handle = LossTerm(f"train/{method}/{term}", fn, weight, terms)
    if any(active.name == handle.name for active in terms.active):
        raise ValueError(f"term: {handle.name!r} is active already; remove its handle first.")
    terms.active.append(handle)
    return handle


def around_training_step(pl_module: LightningModule, method: str, around: Around) -> AroundStep:
    """Enter ``around(batch)``, a context manager, before every training step and leave it after the loss terms.

    Validation and prediction do not enter it.

    Args:
        pl_module: the module to train.
        method: short name of the method, for messages.
        around: batch -> context manager.

    Returns:
        A handle with ``remove()``.

    Raises:
        MisconfigurationException: the module optimises manually, or its training step fetches its own batches.
    """
    _check_step(pl_module, method)
    step = _slot(pl_module, "training_step", _Step)
    handle = AroundStep(around, step)
    step.contexts.append(handle)
    return handle


def _slot(pl_module: LightningModule, slot: str, kind: type[_TermsKind]) -> _TermsKind:
    terms = vars(pl_module).get(slot)
    if not isinstance(terms, kind):
        terms = vars(pl_module)[slot] = kind(pl_module, slot)
    return terms


class LossTermsMixin:
    """For LightningModules with manual optimisation, where only the module knows which loss is meant.

    ```python
    class GAN(LossTermsMixin, LightningModule):
        def training_step(self, batch, batch_idx):
            ...
            loss = loss + self.loss_terms(outputs, batch, batch_idx)
            self.manual_backward(loss)
    ```
    """

    def loss_terms(self, outputs: Any, batch: Any, batch_idx: int) -> Tensor | float:
        """Return the weighted sum of the terms that callbacks have added, 0 without any."""
        return 0.0


@dataclass(eq=False)
class LossTerm:
    """A term that is being added to a loss.

    Attributes:
        name: under which its value is logged.
        fn: (outputs, batch, batch_idx) -> scalar tensor.
        weight: factor in the loss.
    """

    name: str
    fn: TermFunction
    weight: float
    _terms: _Terms

    def remove(self) -> None:
        """Stop adding the term; a second call does nothing."""
        if self in self._terms.active:
            self._terms.active.remove(self)
            self._terms.restore_if_idle()


@dataclass(eq=False)
class AroundStep:
    """What is entered before every training step."""

    enter: Around
    _step: _Step

    def remove(self) -> None:
        """Enter it no more; a second call does nothing."""
        if self in self._step.contexts:
            self._step.contexts.remove(self)
            self._step.restore_if_idle()


class _Terms:
    """Stands in for a method of one module (in its ``__dict__``, where it hides the class's method)."""

    def __init__(self, module: LightningModule, slot: str) -> None:
        self.module = module
        self.slot = slot
        self.hidden = vars(module).get(slot)  # what another tool, such as torch.compile, had put there
        self.active: list[LossTerm] = []
        self.contexts: list[AroundStep] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.total(*args, **kwargs)

    def total(self, outputs: Any, batch: Any, batch_idx: int) -> Tensor | float:
        total: Tensor | float = 0.0
        for term in self.active:
            value = term.fn(outputs, batch, batch_idx)
            if value.numel() != 1:
                raise ValueError(f"{term.name}: expected a scalar, got a tensor of shape {tuple(value.shape)}.")
            self.module.log(term.name, value.detach())
            total = total + term.weight * value
        return total

    def restore_if_idle(self) -> None:
        # where another tool has wrapped the step since, this stays in between and adds nothing
        if not self.active and not self.contexts and vars(self.module).get(self.slot) is self:
            del vars(self.module)[self.slot]
            if self.hidden is not None:
                vars(self.module)[self.slot] = self.hidden

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of the module gets its own plain method here
        return getattr, (self.module, self.slot)


class _Step(_Terms):
    """Stands in for ``training_step``: calls it and adds the terms to the loss it returns."""

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # Lightning reads the arguments of the user's step from here
        return self.hidden or MethodType(type(self.module).training_step, self.module)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context.enter(batch))
            return self._step(batch, *args, **kwargs)

    def _step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = self.__wrapped__(batch, *args, **kwargs)
        if not self.active or not isinstance(outputs, Tensor | Mapping):
            return outputs
        if args:
            batch_idx = args[0]
        elif "batch_idx" in kwargs:
            batch_idx = kwargs["batch_idx"]
        else:  # Lightning does not give the index to a step without that argument
            batch_idx = self.module.trainer.fit_loop.epoch_loop.batch_idx
        total = self.total(outputs, batch, batch_idx)
        if isinstance(outputs, Tensor):
            return outputs + total
        return {**outputs, "loss": outputs["loss"] + total}


_TermsKind = TypeVar("_TermsKind", bound=_Terms)


def _check_step(pl_module: LightningModule, term: str) -> None:
    who = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{term}: {who} optimises manually, so its loss cannot be found from outside. Derive it from "
            "lightning_compress.core.losses.LossTermsMixin too, and add "
            "self.loss_terms(outputs, batch, batch_idx) to the loss in its training_step."
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise MisconfigurationException(
            f"{term}: {who}.training_step(dataloader_iter) fetches its own batches; give it the arguments "
            "(batch, batch_idx)."
        )
