"""What all channel pruners share: how much goes, when, what is carried along, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foreign
import pytest
import torch
from foreign import Foreign, fit, made, widths
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_compress
from lightning_compress import profile
from lightning_compress.callbacks import FilterSketch, HRank, L1Norm
from lightning_compress.core.report import Account
from lightning_compress.core.surgery import attach_record, check_trainer

DENSE = {"net.stem": 8, "net.blocks.0.conv1": 12, "net.blocks.0.conv2": 8, "net.blocks.1.conv1": 12,
         "net.blocks.1.conv2": 8, "net.head": 10}  # fmt: skip


def pruned(root: Path, *args: Any, module: LightningModule | None = None, epochs: int = 1, **kwargs: Any) -> Foreign:
    module = module or made()
    fit(module, root, L1Norm(*args, **kwargs), max_epochs=epochs)
    return module


def share_of_macs(module: nn.Module) -> float:
    return profile(module, (1, 1, 8, 8)).macs / profile(made(), (1, 1, 8, 8)).macs


# ---- how much


def test_one_ratio_for_all(tmp_path: Path) -> None:
    after = widths(pruned(tmp_path, 0.5))
    assert after == {"net.stem": 4, "net.blocks.0.conv1": 6, "net.blocks.0.conv2": 4, "net.blocks.1.conv1": 6,
                     "net.blocks.1.conv2": 4, "net.head": 10}  # fmt: skip


@pytest.mark.parametrize("ratio", ["[0.25,0.5]+[0.25]+[0.75,0.25]", [0.25, 0.5, 0.25, 0.75, 0.25]])
def test_a_list_has_one_number_per_layer_in_forward_order(ratio: Any, tmp_path: Path) -> None:
    assert list(widths(pruned(tmp_path, ratio)).values()) == [6, 6, 6, 3, 6, 10]


def test_of_globs_the_later_wins_and_the_unnamed_stay(tmp_path: Path) -> None:
    after = widths(pruned(tmp_path, {"*conv1": 0.25, "net.blocks.1.*": 0.5, "*conv2": 0.0}))
    assert after == {**DENSE, "net.blocks.0.conv1": 9, "net.blocks.1.conv1": 6}


def test_include_and_exclude(tmp_path: Path) -> None:
    after = widths(pruned(tmp_path, 0.5, include=["net.blocks.*"], exclude=["*.1.conv1"]))
    assert after == {**DENSE, "net.blocks.0.conv1": 6}  # conv2 is coupled to the stem, which is not included


@pytest.mark.parametrize("target", [0.6, 0.3, 0.1])
def test_target_macs_is_reached_by_the_smallest_ratio(target: float, tmp_path: Path) -> None:
    assert share_of_macs(pruned(tmp_path, target_macs=target)) <= target
    (note,) = Account.load(tmp_path).notes
    assert note.startswith(f"target_macs={target} is reached by pruning_ratio=0.")
    less = float(note.split("=")[2].split()[0]) - 1e-3
    assert share_of_macs(pruned(tmp_path, less)) > target


def test_round_to_and_what_it_cost(tmp_path: Path) -> None:
    after = widths(pruned(tmp_path, 0.4, round_to=4))
    assert list(after.values()) == [4, 8, 4, 8, 4, 10]  # of 5 and 8
    (note,) = Account.load(tmp_path).notes
    assert note.startswith("Rounding widths to multiples of 4 moved the MACs from ")


def test_what_stays_is_listed_with_the_reason(tmp_path: Path) -> None:
    pruned(tmp_path, exclude=["net.stem"])
    left = dict(Account.load(tmp_path).left_alone)
    assert left["net.stem"].startswith("is left out by `exclude`")
    assert left["net.head"].startswith("is the network's output")


# ---- in mid-fit


class Adam(Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Snapshot(Callback):
    """The optimiser's groups and state at the start of an epoch, by parameter name."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            optimizer, names = trainer.optimizers[0], {p: n for n, p in pl_module.named_parameters()}
            self.groups = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
            self.settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            self.state = {
                names[p]: {"value": p.detach().clone()} | {k: v.clone() for k, v in state.items()}
                for p, state in optimizer.state.items()
            }


@pytest.mark.parametrize("cls", [Foreign, Adam])
def test_the_optimiser_keeps_groups_settings_and_the_kept_slices_of_its_state(
    cls: type[Foreign], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, before, after = cls(), Snapshot(1), Snapshot(1)
    fit(module, tmp_path, before, L1Norm(start_epoch=1), after)
    assert after.groups == before.groups
    assert after.settings == before.settings
    assert after.state.keys() == before.state.keys()
    kept: dict[str, list[tuple[int, Tensor]]] = {}
    for tensor, dim, _, indices in attach_record(module).steps[0]["cuts"]:
        kept.setdefault(tensor, []).append((dim, indices))
    assert before.state.keys() - {"net.head.bias"} == {n for n in kept if "running" not in n}
    for name, state in before.state.items():
        for key, tensor in state.items():
            for dim, indices in kept.get(name, []):
                tensor = tensor.index_select(dim, indices) if tensor.ndim else tensor
            assert torch.equal(after.state[name][key], tensor), (name, key)


def test_the_schedule_goes_on(tmp_path: Path) -> None:
    module = made()
    trainer = fit(module, tmp_path, L1Norm(start_epoch=1), max_epochs=3)
    (config,) = trainer.lr_scheduler_configs
    assert config.scheduler.optimizer is trainer.optimizers[0]
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == pytest.approx([0.1 * 0.9**3] * 2)


def test_a_frozen_norm_stays_frozen(tmp_path: Path) -> None:
    module = made()
    module.net.bn.eval().requires_grad_(False)
    module.net.bn.running_mean.copy_(torch.arange(8.0))
    fit(module, tmp_path, L1Norm(start_epoch=1))
    norm = module.net.bn
    kept = next(c[3] for c in attach_record(module).steps[0]["cuts"] if c[0] == "net.bn.running_mean")
    assert norm.running_mean.tolist() == kept.tolist()
    assert not norm.training
    assert not norm.weight.requires_grad
    assert norm.weight.tolist() == [1.0] * 4


class Falling(Foreign):
    """Its score is best in the first epoch and falls from there on, whatever it learns."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", -float(self.current_epoch))


def test_the_best_checkpoint_is_one_of_the_narrow_network(tmp_path: Path) -> None:
    module, best = Falling(), ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max")
    fit(module, tmp_path, L1Norm(start_epoch=2), best, max_epochs=4)
    assert Path(best.best_model_path).name == "epoch=2.ckpt"
    assert best.best_model_score == -2
    assert widths(lightning_compress.load(Falling, best.best_model_path)) == widths(module)


def test_early_stopping_starts_afresh(tmp_path: Path) -> None:
    stop = EarlyStopping("score", mode="max", patience=2)
    trainer = fit(Falling(), tmp_path, L1Norm(start_epoch=2), stop, max_epochs=9)
    assert trainer.current_epoch == 5  # best in epoch 2, then two worse ones


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_search_for_the_learning_rate_comes_first(start_epoch: int, tmp_path: Path) -> None:
    """It trains for 20 steps, longer than four epochs, and goes back to where it began."""
    module, search = made(), LearningRateFinder(num_training_steps=20)
    fit(module, tmp_path, search, L1Norm(start_epoch=start_epoch), max_epochs=6)
    assert module.lr == search.optimal_lr.suggestion() != 0.1
    assert widths(module)["net.stem"] == 4
    plain = made(lr=module.lr)
    fit(plain, tmp_path, L1Norm(start_epoch=start_epoch), max_epochs=6)
    foreign.assert_same(module, plain)


class Resizable(LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return foreign.digits(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return foreign.digits(32, 64)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_search_for_the_batch_size_comes_first(start_epoch: int, tmp_path: Path) -> None:
    module, data = made(), Resizable()
    search = BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=2)
    trainer = foreign.make_trainer(tmp_path, search, L1Norm(start_epoch=start_epoch))
    with foreign.no_pictures:
        trainer.fit(module, data)
    assert data.batch_size == 4
    assert trainer.global_step == 2 * 64 // 4
    assert widths(module)["net.stem"] == 4


@pytest.mark.parametrize("callback", [L1Norm, HRank])
@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_compiled_submodule_is_narrowed_like_any_other(
    callback: type[L1Norm], start_epoch: int, tmp_path: Path
) -> None:
    compiled, plain = made(), made()
    compiled.net = torch.compile(compiled.net, backend="eager")
    for module in (compiled, plain):
        fit(module, tmp_path, callback(start_epoch=start_epoch))
    assert compiled.net._orig_mod.stem.out_channels == 4
    for name, tensor in plain.net.state_dict().items():
        torch.testing.assert_close(compiled.net._orig_mod.state_dict()[name], tensor)


# ---- what is refused


def refused(root: Path, callback: Callback, message: str, module: LightningModule | None = None, **kwargs: Any) -> None:
    """It is refused before the first step, and nothing has changed."""
    module = module or made()
    before = widths(module)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(module, root, callback, **kwargs)
    assert module.trainer.global_step == 0
    assert widths(module) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_ratio": 1.0}, r"pruning_ratio.*1\.0"),
        ({"pruning_ratio": {"net.*": -0.5}}, r"pruning_ratio.*-0\.5"),
        ({"pruning_ratio": "[0.5]*x"}, r"pruning_ratio.*'\[0\.5\]\*x'"),
        ({"target_macs": 50}, r"L1Norm\(target_macs=50\): give the share of MACs to keep, between 0 and 1"),
        ({"round_to": 0}, r"L1Norm\(round_to=0\): give a whole number of at least 1"),
        ({"start_epoch": -1}, r"L1Norm\(start_epoch=-1\): give 0 or a later epoch"),
    ],
)
def test_impossible_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L1Norm(**arguments)


@pytest.mark.parametrize("start_epoch", [0, 1])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_ratio": [0.5] * 3}, "pruning_ratio.*3.*5.*net.stem"),
        ({"pruning_ratio": {"net.stm": 0.5}}, "pruning_ratio.*'net.stm' matches no.*'net.stem'"),
        ({"include": ["net.block.*"]}, "include: 'net.block.*' matches no name.*"),
        ({"exclude": ["*.conv3"]}, r"exclude: '\*.conv3' matches no name"),
        ({"exclude": ["*conv*", "net.stem"]}, "L1Norm finds no layer of Foreign that it could narrow: .*exclude"),
        ({"target_macs": 0.001}, r"target_macs=0.001\) is out of reach: with one channel left.*0\.0\d\d of the MACs"),
        ({"pruning_ratio": {"net.stem": 0.5, "*conv2": 0.25}}, "differs between layers whose channels are added"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_in_setup(
    arguments: dict[str, Any], message: str, start_epoch: int, tmp_path: Path
) -> None:
    refused(tmp_path, L1Norm(start_epoch=start_epoch, **arguments), message)


def test_an_epoch_that_never_comes(tmp_path: Path) -> None:
    message = r"L1Norm\(start_epoch=2\) never happens: the Trainer stops after max_epochs=2"
    refused(tmp_path, L1Norm(start_epoch=2), message)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.wrong = nn.Sequential(nn.Conv2d(5, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.wrong(self.first(x)).mean((2, 3))


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_network_that_cannot_be_followed_names_the_layer(start_epoch: int, tmp_path: Path) -> None:
    refused(tmp_path, L1Norm(start_epoch=start_epoch), r"forward failed .* in layer 'net\.wrong\.0'", made(Broken))


def test_a_dense_checkpoint_cannot_be_resumed_by_a_run_that_prunes_first(tmp_path: Path) -> None:
    fit(made(), tmp_path, ModelCheckpoint(tmp_path, "dense"))
    message = r"dense.ckpt' was written by a run without L1Norm.*changed by nothing.*load its weights into the module"
    refused(tmp_path, L1Norm(), message, ckpt_path=tmp_path / "dense.ckpt", max_epochs=3)


def test_nor_by_one_that_prunes_otherwise(tmp_path: Path) -> None:
    fit(made(), tmp_path, L1Norm(0.25), ModelCheckpoint(tmp_path, "quarter"))
    message = r"without L1Norm{'pruning_ratio': 0.5.*changed by L1Norm{'pruning_ratio': 0.25"
    refused(tmp_path, L1Norm(0.5), message, ckpt_path=tmp_path / "quarter.ckpt", max_epochs=3)


def test_a_dense_checkpoint_can_be_resumed_by_a_run_that_prunes_later(tmp_path: Path) -> None:
    module = made()
    fit(made(), tmp_path, ModelCheckpoint(tmp_path, "dense"))
    fit(module, tmp_path, L1Norm(start_epoch=3), ckpt_path=tmp_path / "dense.ckpt", max_epochs=4)
    assert widths(module)["net.stem"] == 4


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    fit(made(), tmp_path, L1Norm(), ModelCheckpoint(tmp_path, "whole"))
    half = tmp_path / "half.ckpt"
    half.write_bytes((tmp_path / "whole.ckpt").read_bytes()[:5000])
    refused(tmp_path, L1Norm(), "half.ckpt' cannot be read as a checkpoint.*cut short", ckpt_path=half)


def test_averages_of_the_weights(tmp_path: Path) -> None:
    average = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    with pytest.raises(MisconfigurationException, match=r"L1Norm .* where the average of StochasticWeightAveraging"):
        fit(made(), tmp_path, L1Norm(start_epoch=1), average)
    with pytest.raises(MisconfigurationException, match="List L1Norm before StochasticWeightAveraging"):
        fit(made(), tmp_path, average, L1Norm())
    module = made()
    fit(module, tmp_path, L1Norm(), StochasticWeightAveraging(1e-2, swa_epoch_start=1), max_epochs=3)
    assert widths(module)["net.stem"] == 4


def test_other_strategies() -> None:
    trainer = SimpleNamespace(strategy=object(), callbacks=[])
    with pytest.raises(MisconfigurationException, match=r"L1Norm .* one device and with DDP, not with object"):
        check_trainer(trainer, "L1Norm", in_fit=False)


def test_a_network_without_pairs_has_nothing_to_sketch(tmp_path: Path) -> None:
    plain = made(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)))
    refused(tmp_path, FilterSketch(), "FilterSketch finds no layer of Foreign that a single other layer reads", plain)
