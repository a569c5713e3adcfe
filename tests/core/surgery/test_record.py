"""A module that lost channels describes itself: any checkpoint loads into it, and it loads into any fresh copy."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lightning_compress
from lightning_compress.core.surgery import (
    ChannelPlan,
    Record,
    attach_record,
    channel_graph,
    read_checkpoint,
    read_steps,
)
from lightning_compress.networks import resnet20

SHAPE = (1, 1, 8, 8)


class Residual(LightningModule):
    """A network with buffers that no state dict holds: the maps of its parameter-free shortcuts."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = resnet20(classes, in_channels=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def narrowed(
    kept: dict[str, list[int]], *more: dict[str, list[int]], module: LightningModule | None = None
) -> Residual:
    """A module after one cut, or several; each names channels as they are numbered then."""
    torch.manual_seed(len(kept))
    module = module or Residual()
    record = attach_record(module)
    for epoch, plan in enumerate((kept, *more)):
        cuts = ChannelPlan.from_dict(plan).cuts(channel_graph(module, SHAPE))
        record.cut(module, cuts, by="test", epoch=epoch)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
    return module.eval()


DENSE: dict[str, list[int]] = {}
STAGE1 = {f"net.{n}": [1, 2, 5, 9] for n in ("conv1", *(f"layer1.{i}.conv2" for i in range(3)))}
STAGE1_ALONE = {f"net.layer1.{i}.conv2": [0, 1, 5] for i in range(3)}
STAGE2 = {f"net.layer2.{i}.conv2": [0, 3, 20, 30, 31] for i in range(3)}
INSIDE = {"net.layer1.0.conv1": [3], "net.layer3.2.conv1": [0, 60]}
AGAIN = {"net.layer2.0.conv2": [0, 2], "net.layer2.1.conv2": [0, 2], "net.layer2.2.conv2": [0, 2]}
HISTORIES: dict[str, tuple[dict[str, list[int]], ...]] = {
    "dense": (DENSE,),
    "residual": (STAGE1_ALONE,),
    "inside": (INSIDE,),
    "twice": (STAGE2, AGAIN),
    "first_of_twice": (STAGE2,),
}


def same_function(one: nn.Module, other: nn.Module) -> None:
    x = torch.rand(2, *SHAPE[1:])
    with torch.no_grad():
        assert torch.equal(one.eval()(x), other.eval()(x))


@pytest.mark.parametrize("target", HISTORIES)
@pytest.mark.parametrize("source", HISTORIES)
def test_whatever_was_cut_takes_whatever_was_saved(source: str, target: str) -> None:
    saved, module = narrowed(*HISTORIES[source]), narrowed(*HISTORIES[target])
    module.load_state_dict(saved.state_dict())
    foreign.assert_same(module, saved)
    same_function(module, saved)
    assert attach_record(module).steps == attach_record(saved).steps
    for name, buffer in saved.named_buffers():  # also the maps of shortcuts, which are not in the state dict
        assert torch.equal(module.get_buffer(name), buffer), name


def test_there_and_back() -> None:
    dense, module = narrowed(DENSE), narrowed(*HISTORIES["twice"])
    twice = copy.deepcopy(module)
    for saved in (dense, twice, dense, twice):
        module.load_state_dict(saved.state_dict())
        same_function(module, saved)


def test_attributes_flags_and_memory_format_come_back() -> None:
    module = Residual().to(memory_format=torch.channels_last)
    module.net.layer2[1].conv1.requires_grad_(False)
    narrowed({"net.layer2.1.conv1": [0, 4], "net.layer2.0.conv1": [1, 2, 3]}, module=module)
    conv, reader = module.net.layer2[1].conv1, module.net.layer2[1].conv2
    assert (conv.out_channels, reader.in_channels, module.net.layer2[1].bn1.num_features) == (2, 2, 2)
    assert not conv.weight.requires_grad
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    module.load_state_dict(Residual().state_dict())
    assert (conv.out_channels, reader.in_channels, module.net.layer2[1].bn1.num_features) == (32, 32, 32)
    assert not conv.weight.requires_grad
    assert reader.weight.requires_grad


class Tied(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twin, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.twin.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu() * self.twin(x))


def test_tied_weights_stay_tied_there_and_back() -> None:
    module = Tied()
    cuts = ChannelPlan.from_dict({"first": [0, 4]}).cuts(channel_graph(module, (1, 4)))
    attach_record(module).cut(module, cuts, by="test", epoch=0)
    assert module.first.weight is module.twin.weight
    assert module.first.weight.shape == (2, 4)
    assert module.twin.bias.shape == (2,)
    module.load_state_dict(Tied().state_dict())
    assert module.first.weight is module.twin.weight
    assert module.twin.weight.shape == (6, 4)


def test_a_dense_module_has_a_plain_state_dict() -> None:
    module = Residual()
    keys = module.state_dict().keys()
    attach_record(module)
    assert module.state_dict().keys() == keys
    Residual().load_state_dict(module.state_dict())


def test_there_is_one_record() -> None:
    module = Residual()
    assert attach_record(module) is attach_record(module)
    assert sum(isinstance(m, Record) for m in module.modules()) == 1
    assert len(module._load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_keeps_its_own_record(copied: Any) -> None:
    module = narrowed(*HISTORIES["twice"])
    twin = copied(module)
    same_function(twin, module)
    twin.load_state_dict(Residual().state_dict())
    assert twin.net.layer2[0].conv2.out_channels == 32
    assert module.net.layer2[0].conv2.out_channels == 2
    assert len(attach_record(module).steps) == 2
    twin.load_state_dict(module.state_dict())
    same_function(twin, module)


def test_a_module_inside_another_restores_itself() -> None:
    module = narrowed(*HISTORIES["residual"])
    average = AveragedModel(narrowed(*HISTORIES["inside"]))
    average.load_state_dict(AveragedModel(module).state_dict())
    same_function(average.module, module)


def test_plain_loading_names_the_remedy() -> None:
    with pytest.raises(RuntimeError, match="load_this_with_lightning_compress_load"):
        Residual().load_state_dict(narrowed(INSIDE).state_dict())


# ---- files


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Residual, Path]:
    module = narrowed(*HISTORIES["twice"])
    path = tmp_path / "saved.ckpt"
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": {"classes": 10}}
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.0"}, path)
    return module, path


def test_load_makes_the_narrow_module(saved: tuple[Residual, Path]) -> None:
    module, path = saved
    loaded = lightning_compress.load(Residual, path)
    same_function(loaded, module)
    assert [step["by"] for step in read_steps(path)] == ["test", "test"]


def test_load_gives_arguments_that_win(saved: tuple[Residual, Path]) -> None:
    with pytest.raises(MisconfigurationException, match=r"does not fit Residual: .*\n.*net\.linear"):
        lightning_compress.load(Residual, saved[1], classes=7)


def test_load_refuses_another_network(saved: tuple[Residual, Path]) -> None:
    message = r"saved.ckpt' does not fit Foreign: .*cuts tensor '.*', which Foreign does not have"
    with pytest.raises(MisconfigurationException, match=message):
        lightning_compress.load(foreign.Foreign, saved[1])


def test_load_takes_a_dense_checkpoint_too(tmp_path: Path) -> None:
    module = Residual().eval()
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "dense.ckpt")
    same_function(lightning_compress.load(Residual, tmp_path / "dense.ckpt"), module)
    assert read_steps(tmp_path / "dense.ckpt") == []


def test_files_that_are_no_checkpoints(saved: tuple[Residual, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at '.*none.ckpt'"):
        read_checkpoint(tmp_path / "none.ckpt")
    half = tmp_path / "half.ckpt"
    half.write_bytes(saved[1].read_bytes()[: saved[1].stat().st_size // 2])
    with pytest.raises(MisconfigurationException, match=r"half.ckpt' cannot be read as a checkpoint.*cut short"):
        lightning_compress.load(Residual, half)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(MisconfigurationException, match="is no Lightning checkpoint: it has no 'state_dict'"):
        lightning_compress.load(Residual, tmp_path / "other.pt")


class Exploit:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("code in a checkpoint was run",))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Exploit()}, tmp_path / "evil.ckpt")
    with pytest.raises(MisconfigurationException, match="not safe to load"):
        read_checkpoint(tmp_path / "evil.ckpt")


# ---- changes that are no cuts
# (their functions live in the package, since a checkpoint may name no others; see also the tests of the methods)


def test_a_checkpoint_may_name_no_other_function() -> None:
    module = Residual()
    attach_record(module)
    for path in ("os.system", "lightning_compress.core.surgery.record.read_checkpoint", "lightning_compress.nothing"):
        step = {"by": "test", "epoch": 0, "cuts": [], "change": path, "arguments": {}}
        with pytest.raises(ValueError, match=path):
            attach_record(module).replay(module, [step])
    assert not attach_record(module).steps
