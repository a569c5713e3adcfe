from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.core.losses import LossTermsMixin, add_loss_term, around_training_step


class Regression(LightningModule):
    """A two-layer network whose loss may hold the term itself, for comparison."""

    def __init__(self, built_in: float = 0.0, as_dict: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.built_in, self.as_dict = built_in, as_dict

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        if self.built_in:
            loss = loss + self.built_in * weight_size(self)
        return {"loss": loss, "kept": batch_idx} if self.as_dict else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def weight_size(module: Regression) -> Tensor:
    return module.net[0].weight.square().sum()


class AddTerm(Callback):
    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.seen: list[tuple[Any, int]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.module = pl_module
        self.handle = add_loss_term(pl_module, "toy", "size", self.term, self.weight)

    def term(self, outputs: Any, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((outputs, batch_idx))
        return weight_size(self.module)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.handle.remove()


def fit(module: LightningModule, *callbacks: Callback, **arguments: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 4, generator=generator), torch.randn(24, 1, generator=generator))
    trainer = Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, **arguments},
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # Lightning leaves it to the end of the process
    return trainer


def made(**arguments: Any) -> Regression:
    seed_everything(3, verbose=False)
    return Regression(**arguments)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("as_dict", [False, True], ids=["tensor", "dict"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"strategy": "ddp"},
    ],
    ids=["plain", "accumulation", "bf16", "ddp"],
)
def test_a_term_trains_exactly_as_one_written_into_the_step(arguments: dict[str, Any], as_dict: bool) -> None:
    built_in, added, without = made(built_in=0.3, as_dict=as_dict), made(as_dict=as_dict), made()
    fit(built_in, **arguments)
    callback = AddTerm(0.3)
    trainer = fit(added, callback, **arguments)
    fit(without, **arguments)
    assert_same_weights(added, built_in)
    assert not torch.equal(added.net[0].weight, without.net[0].weight)
    assert trainer.callback_metrics["train/toy/size"] > 0
    assert [batch_idx for _, batch_idx in callback.seen] == 2 * [0, 1, 2, 3, 4, 5]
    assert isinstance(callback.seen[0][0], dict) == as_dict


def test_the_log_holds_the_value_without_its_weight() -> None:
    module = made()
    trainer = fit(module, AddTerm(1e-6), max_epochs=1, limit_train_batches=1)
    assert trainer.callback_metrics["train/toy/size"] == pytest.approx(weight_size(made()).item(), rel=1e-6)


def test_terms_stack_see_the_same_outputs_and_leave_in_any_order() -> None:
    module = made()
    plain = dict(vars(module))
    batch = torch.ones(2, 4), torch.ones(2, 1)
    loss = module.training_step(batch, 0)
    outputs = []
    module.log = lambda *_: None  # no trainer here
    one = add_loss_term(module, "a", "x", lambda out, *_: outputs.append(out) or torch.tensor(1.0), weight=2.0)
    two = add_loss_term(module, "b", "x", lambda out, *_: outputs.append(out) or torch.tensor(10.0))
    assert module.training_step(batch, 0) == loss + 12
    assert outputs == [loss, loss]
    one.weight = 3.0
    assert module.training_step(batch, batch_idx=0) == loss + 13
    one.remove()
    one.remove()
    assert module.training_step(batch, 0) == loss + 10
    two.remove()
    del module.log
    assert vars(module) == plain


def test_copies_and_pickles_carry_no_terms() -> None:
    module = made()
    batch = torch.ones(2, 4), torch.ones(2, 1)
    handle = add_loss_term(module, "toy", "x", lambda *_: torch.tensor(1.0))  # a lambda cannot be pickled
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            twin.net[2].bias += 1
        assert twin.training_step(batch, 0) == type(twin).training_step(twin, batch, 0)
        assert twin.training_step.__self__ is twin
    handle.remove()
    assert "training_step" not in vars(module)


def test_a_step_that_returns_none_stays_skipped() -> None:
    class Skipping(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    callback = AddTerm(0.3)
    fit(Skipping(), callback, max_epochs=1)
    assert [batch_idx for _, batch_idx in callback.seen] == [0, 2, 4]


def test_a_step_without_the_index_still_gives_it_to_the_term() -> None:
    class Short(Regression):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch, 0)

    callback = AddTerm(0.3)
    fit(Short(), callback, max_epochs=1)
    assert [batch_idx for _, batch_idx in callback.seen] == [0, 1, 2, 3, 4, 5]


def test_what_another_tool_had_put_there_comes_back() -> None:
    module = made()
    theirs = lambda batch, batch_idx: torch.tensor(5.0)  # noqa: E731
    module.training_step = theirs
    module.log = lambda *_: None
    handle = add_loss_term(module, "toy", "x", lambda *_: torch.tensor(1.0))
    assert module.training_step(None, 0) == 6
    handle.remove()
    assert module.training_step is theirs


def test_a_wrapper_put_on_top_later_keeps_working() -> None:
    module = made()
    batch = torch.ones(2, 4), torch.ones(2, 1)
    handle = add_loss_term(module, "toy", "x", lambda *_: torch.tensor(1.0))
    inner = module.training_step
    module.training_step = lambda *args: inner(*args)
    handle.remove()
    assert module.training_step(batch, 0) == type(module).training_step(module, batch, 0)


def test_manual_optimisation_goes_through_the_mixin() -> None:
    class Manual(LossTermsMixin, Regression):
        def __init__(self, built_in: float = 0.0) -> None:
            super().__init__(built_in)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss + self.loss_terms(loss, batch, batch_idx))
            optimizer.step()

    def manual(built_in: float = 0.0) -> Manual:
        seed_everything(3, verbose=False)
        return Manual(built_in)

    added, built_in = manual(), manual(0.3)
    trainer = fit(added, AddTerm(0.3))
    fit(built_in)
    assert_same_weights(added, built_in)
    assert "train/toy/size" in trainer.callback_metrics
    assert "loss_terms" not in vars(added)


def test_errors_name_the_remedy() -> None:
    module = made()
    add_loss_term(module, "toy", "x", lambda *_: torch.tensor(1.0))
    with pytest.raises(ValueError, match="'train/toy/x' is active already"):
        add_loss_term(module, "toy", "x", lambda *_: torch.tensor(1.0))

    manual = made()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match=r"toy/x: Regression optimises manually.*LossTermsMixin"):
        add_loss_term(manual, "toy", "x", lambda *_: torch.tensor(1.0))

    class Fetching(Regression):
        def training_step(self, dataloader_iter: Any) -> Any: ...

    with pytest.raises(MisconfigurationException, match="fetches its own batches"):
        add_loss_term(Fetching(), "toy", "x", lambda *_: torch.tensor(1.0))


def test_a_term_must_be_a_scalar() -> None:
    module = made()
    add_loss_term(module, "toy", "x", lambda *_: torch.ones(3))
    with pytest.raises(ValueError, match=r"train/toy/x: expected a scalar, got a tensor of shape \(3,\)"):
        module.training_step((torch.ones(2, 4), torch.ones(2, 1)), 0)


# ---- around the step


class Around(Callback):
    """Notes what happens between the entry and the exit of every training step, with and without a term."""

    def __init__(self, term: bool) -> None:
        self.term = term
        self.events: list[str] = []

    @contextmanager
    def note(self, batch: Any) -> Iterator[None]:
        self.events.append(f"in {len(batch[0])}")
        yield
        self.events.append("out")

    def count(self, *_: Any) -> Tensor:
        self.events.append("term")
        return torch.tensor(0.0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.handles: list[Any] = [around_training_step(pl_module, "test", self.note)]
        if self.term:
            self.handles.append(add_loss_term(pl_module, "test", "count", self.count))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("term", [False, True])
def test_a_context_surrounds_step_and_terms(term: bool, tmp_path: Any) -> None:
    module, around = Regression(), Around(term)
    data = DataLoader(TensorDataset(torch.ones(6, 4), torch.ones(6, 1)), 4)
    trainer = Trainer(max_epochs=1, callbacks=[around], default_root_dir=tmp_path, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")  # fmt: skip
    trainer.fit(module, data)
    middle = ["term"] if term else []
    assert around.events == ["in 4", *middle, "out", "in 2", *middle, "out"]
    assert "training_step" not in vars(module)


def test_a_context_needs_a_step_that_gets_its_batch() -> None:
    module = Regression()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="optimises manually"):
        around_training_step(module, "test", Around(False).note)
