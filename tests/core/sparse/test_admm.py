"""The splitting variables by hand and by autograd, and the phases of a fit with a method made for the test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foreign
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.callbacks import L1Norm
from lightning_compress.core.sparse.admm import ADMM, Phase, Problem, Splits
from lightning_compress.core.sparse.patterns import largest


def strongest(weight: Tensor) -> Tensor:
    """Keep half of the weights."""
    flat = weight.abs().reshape(1, -1)
    return weight * largest(flat, flat.shape[1] // 2).view_as(weight)


class Half(ADMM):
    """Half of the weights go; a second round takes another quarter."""

    NAME = "half"

    def __init__(self, starts: tuple[int, ...] = (0, 3), warmup: int = 0, **shared: Any) -> None:
        super().__init__(**{"every_n_epochs": 1, **shared})
        self.starts = starts
        self.warmup = warmup

    def timeline(self) -> list[Phase]:
        return [
            Phase(f"phase {i}", start, i % 2 == 0, f"starts[{i}]={start}", self.warmup if i == 0 else 0)
            for i, start in enumerate(self.starts)
        ]

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        return [n for n, m in pl_module.named_modules() if isinstance(m, nn.Conv2d)]

    def problem(self, pl_module: LightningModule, phase: Phase) -> Problem:
        return {layer: {"half": strongest} for layer in self.layers}

    def hard_masks(self, pl_module: LightningModule, phase: Phase) -> dict[str, Tensor]:
        return {layer: strongest(weight) != 0 for layer, weight in self.weights(pl_module).items()}


class Diary(Callback):
    """What the method's variables were after the start of every epoch, and the gradients it was given."""

    def __init__(self, method: ADMM) -> None:
        self.method = method
        self.rho: list[float] = []
        self.dual: list[float] = []
        self.zeros: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        splits = self.method.splits
        self.rho.append(splits.rho if splits else 0.0)
        self.dual.append(sum(float(u.abs().sum()) for c in splits.u.values() for u in c.values()))
        self.zeros.append(zeros(pl_module))


def zeros(module: nn.Module) -> int:
    return sum(int((m.weight == 0).sum()) for m in module.modules() if isinstance(m, nn.Conv2d))


# ---- splitting variables


def test_one_update_by_hand() -> None:
    splits, problem = Splits(), {"w": {"keep 2": strongest}}
    splits.start({"w": torch.tensor([1, -0.2, 0.5, 0.05])}, problem, rho=1e-3)
    assert splits.z["w"]["keep 2"].tolist() == [1, 0, 0.5, 0]
    weight = {"w": torch.tensor([0.9, -0.1, 0.45, 0.3])}
    splits.update(weight, problem)
    assert splits.z["w"]["keep 2"].tolist() == pytest.approx([0.9, 0, 0.45, 0])
    assert splits.u["w"]["keep 2"].tolist() == pytest.approx([0, -0.1, 0, 0.3])
    assert splits.penalty(weight).item() == pytest.approx(2.0e-4)


def test_rho_after_nine_updates() -> None:
    splits, problem = Splits(), {"w": {"keep": strongest}}
    weights = {"w": torch.randn(4, 4)}
    splits.start(weights, problem, rho=1e-3)
    for _ in range(9):
        splits.update(weights, problem, growth=1.3)
    assert splits.rho == pytest.approx(1.0604e-2, rel=1e-4)


@pytest.mark.parametrize("constraints", [("one",), ("one", "two")])
def test_gradient_is_that_of_the_penalty(constraints: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(6, 5, 3, 3, generator=generator, requires_grad=True) for n in ("a", "b")}
    problem = {n: dict.fromkeys(constraints if n == "a" else ("one",), strongest) for n in weights}
    splits = Splits()
    splits.start(weights, problem, rho=0.3)
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.5 * torch.randn(weight.shape, generator=generator)
    splits.update(weights, problem, growth=1.1)
    with torch.no_grad():
        for weight in weights.values():
            weight += 0.5 * torch.randn(weight.shape, generator=generator)
    splits.penalty(weights).backward()
    expected = {name: weight.grad.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)  # of the loss
    splits.add_gradient(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad - 1, expected[name], atol=1e-6, rtol=1e-6)


def test_weights_without_a_gradient_are_left() -> None:
    weights = {"a": torch.randn(4, requires_grad=True)}
    splits = Splits()
    splits.start(weights, {"a": {"half": strongest}}, rho=1.0)
    splits.add_gradient(weights)
    assert weights["a"].grad is None


# ---- a fit


def test_updates_fall_on_the_start_of_later_periods(tmp_path: Path) -> None:
    method = Half(starts=(1, 6), every_n_epochs=2, rho=0.01, rho_growth=2.0)
    diary = Diary(method)
    foreign.fit(foreign.made(), tmp_path, method, diary, max_epochs=7)
    assert diary.rho == [0, 0.01, 0.01, 0.02, 0.02, 0.04, 0]
    assert [dual > 0 for dual in diary.dual] == [False, False, False, True, True, True, False]
    assert [count > 0 for count in diary.zeros] == [False] * 6 + [True]


def test_a_warm_up_projects_anew_and_accumulates_nothing(tmp_path: Path) -> None:
    method = Half(starts=(0, 5), warmup=2, rho=0.01, rho_growth=2.0)
    diary = Diary(method)
    foreign.fit(foreign.made(), tmp_path, method, diary, max_epochs=6)
    assert diary.rho == [0.01, 0.01, 0.01, 0.02, 0.04, 0]
    assert [dual > 0 for dual in diary.dual] == [False, False, False, True, True, False]


def test_weights_come_near_their_targets(tmp_path: Path) -> None:
    distances = []
    for rho in (1e-6, 0.3):
        method = Half(starts=(0, 7), rho=rho, rho_growth=1.0, every_n_epochs=2)
        trainer = foreign.fit(foreign.made(), tmp_path, method, max_epochs=8)
        distances.append(float(trainer.callback_metrics["train/half/residual"]))
        assert 0 < trainer.callback_metrics["train/half/net.stem/half"] < 1
    assert distances[1] < 0.5 * distances[0]


def test_zeros_stay_until_they_are_lifted(tmp_path: Path) -> None:
    """Prune, lift in a second ADMM phase, prune again; momentum and weight decay would move them."""
    diary = Diary(method := Half(starts=(0, 1, 3, 4), rho=0.01))
    module = foreign.made()
    foreign.fit(module, tmp_path, method, diary, max_epochs=6)
    half = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d)) // 2
    assert diary.zeros == [0, half, half, half, half, half]
    assert zeros(module) == half
    assert not method.splits


@pytest.mark.parametrize("clip", [None, 0.1])
def test_masked_gradients_do_not_count_in_clipping(clip: float | None, tmp_path: Path) -> None:
    seen = []

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if trainer.current_epoch == 1:
                weight = pl_module.net.blocks[0].conv1.weight
                seen.append(bool((weight.grad[weight == 0] == 0).all()))

    foreign.fit(foreign.made(), tmp_path, Half(starts=(0, 1)), Norms(), gradient_clip_val=clip)
    assert seen == [clip is not None] * 4


def test_resumed_in_the_middle_equals_uninterrupted(tmp_path: Path) -> None:
    whole = foreign.made()
    foreign.fit(
        whole, tmp_path, Half((1, 4), rho=0.1), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=6
    )
    for epoch in (0, 2, 4):
        again = foreign.made()
        foreign.fit(again, tmp_path, Half((1, 4), rho=0.1), max_epochs=6, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        foreign.assert_same(again, whole)


@pytest.mark.parametrize("when", [2, 4], ids=["pulled", "pruned"])
@pytest.mark.parametrize("first", ["Half", "L1Norm"])
def test_follows_channels_that_go(when: int, first: str, tmp_path: Path) -> None:
    callbacks = [Half((0, 3), rho=0.1), L1Norm(pruning_ratio=0.5, start_epoch=when)]
    module = foreign.made()
    foreign.fit(module, tmp_path, *(callbacks if first == "Half" else callbacks[::-1]), max_epochs=6)
    assert foreign.widths(module)["net.blocks.0.conv1"] == 6
    assert zeros(module) > 0.3 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


def test_resumed_around_a_cut_equals_uninterrupted(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [Half((0, 3), rho=0.1), L1Norm(pruning_ratio=0.5, start_epoch=2)]

    whole = foreign.made()
    foreign.fit(whole, tmp_path, *callbacks(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=5)
    for epoch in (1, 2, 3):
        again = foreign.made()
        foreign.fit(again, tmp_path, *callbacks(), max_epochs=5, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        foreign.assert_same(again, whole)


def test_ranks_that_drift_apart_are_stopped(tmp_path: Path) -> None:
    method = Half((0, 1))
    method.layers = ["w"]
    method.splits.start({"w": torch.randn(6)}, {"w": {"half": strongest}}, rho=1.0)
    trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=SimpleNamespace(broadcast=lambda mine: [0, *mine]))
    with pytest.raises(RuntimeError, match="rank 1 has other projections"):
        method._check_ranks(trainer)  # type: ignore[arg-type]
    trainer.strategy.broadcast = lambda mine: mine
    method._check_ranks(trainer)  # type: ignore[arg-type]


def test_a_callback_serves_a_second_module(tmp_path: Path) -> None:
    method = Half()
    one, two = foreign.made(), foreign.made()
    foreign.fit(one, tmp_path, method, max_epochs=4)
    foreign.fit(two, tmp_path, method, max_epochs=4)
    foreign.assert_same(one, two)


def test_other_parameters_and_other_optimisers(tmp_path: Path) -> None:
    """Adam, whose second moments the switch clears too, and weights that a parametrisation makes."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x

    module = foreign.made()
    nn.utils.parametrize.register_parametrization(module.net.stem, "weight", Scaled())
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=1e-2)  # type: ignore[method-assign]
    trainer = foreign.fit(module, tmp_path, Half((0, 2), rho=0.1), max_epochs=3)
    original = module.net.stem.parametrizations.weight.original
    assert (original == 0).sum() == (module.net.stem.weight == 0).sum() == 36
    state = trainer.optimizers[0].state[module.net.blocks[0].conv1.weight]
    assert state["exp_avg_sq"].count_nonzero() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, r"rho=0\.0"),
        ({"rho_growth": 0.9}, r"rho_growth=0\.9"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"starts": (0, 9)}, r"starts\[1\]=9\).*never happens.*max_epochs=2"),
        ({"starts": (1, 1)}, r"starts\[1\]=1\) leaves no epoch"),
        ({"warmup": 3, "starts": (0, 1)}, "warmup_epochs=3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    module = foreign.made()
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        foreign.fit(module, tmp_path, Half(**{"starts": (0, 1), **arguments}))


def test_a_network_without_such_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Half finds no layer"):
        foreign.fit(foreign.made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), tmp_path, Half((0, 1)))
