"""HRank as a callback: which channels go, when, and where their maps are read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import Foreign, assert_same, digits, fit, made, make_trainer, widths
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import densenet121, mobilenet_v2, resnet18

from lightning_compress.callbacks import HRank, L1Norm
from lightning_compress.callbacks.pruning.hrank import FeatureRanks, feature_map_rank, select_channels
from lightning_compress.callbacks.pruning.hrank.published import rank_taps
from lightning_compress.callbacks.pruning.hrank.taps import feature_maps
from lightning_compress.core.profile import profile
from lightning_compress.core.surgery import attach_record
from lightning_compress.core.surgery.compact import compact
from lightning_compress.networks import resnet20

FEW = {"num_batches": 2, "rank_batch_size": 16}  # images: the first 32 digits


def residual() -> Foreign:
    return made(partial(resnet20, in_channels=1))


def images() -> Tensor:
    return torch.cat([x for x, _ in digits(32)])


def read(network: nn.Module, taps: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
    """Outputs of the modules that `taps` name, by plain hooks; layer -> maps."""
    found: dict[str, Tensor] = {}
    handles = []
    for layer, (module, finish) in taps.items():

        def hook(m: nn.Module, a: Any, out: Tensor, layer: str = layer, finish: Any = finish) -> None:
            found.setdefault(layer, finish(out.detach().clone()))

        handles.append(network.get_submodule(module).register_forward_hook(hook))
    with torch.no_grad():
        network.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def by_hand(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Mean ranks of a CIFAR ResNet, one `matrix_rank` per map."""
    maps = read(network, {n: (t.module, lambda out: out) for n, t in rank_taps(network).items()}, x)
    return {n: torch.linalg.matrix_rank(m).double().mean(0) for n, m in maps.items()}


def kept(module: nn.Module, layer: str) -> list[int]:
    (step,) = attach_record(module).steps
    return next(c[3] for c in step["cuts"] if tuple(c[:2]) == (f"{layer}.weight", 0)).tolist()


# ---- one shot


def test_the_highest_mean_ranks_stay_with_their_weights(tmp_path: Path) -> None:
    module, callback = residual(), HRank(0.6, **FEW)
    ranks, dense = by_hand(module.net, images()), {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, tmp_path, callback, max_epochs=1, limit_train_batches=0)
    assert callback.ranks is not None
    for name, mean in ranks.items():
        assert torch.equal(callback.ranks.mean(f"net.{name}"), mean), name
    for name in ("layer1.1.conv1", "layer2.0.conv1", "layer3.2.conv1"):
        expected = select_channels(ranks[name], 0.6).tolist()
        assert kept(module, f"net.{name}") == expected
        norm = name.replace("conv", "bn")
        assert torch.equal(module.get_parameter(f"net.{norm}.weight"), dense[f"net.{norm}.weight"][expected])
    shared = ["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2"]
    assert widths(module)["net.conv1"] == 6  # int(16 * (1 - 0.6))
    together = select_channels(torch.stack([ranks[n] for n in shared[1:]]).mean(0), 0.6).tolist()
    assert {tuple(kept(module, f"net.{n}")) for n in shared[1:]} == {tuple(together)}


@pytest.mark.parametrize("rounding", ["keep", "prune"])
def test_rounding(rounding: Any, tmp_path: Path) -> None:
    module = residual()
    fit(module, tmp_path, HRank(0.6, rounding=rounding, **FEW), max_epochs=1)
    after = [widths(module)[f"net.layer{stage}.0.conv1"] for stage in (1, 2, 3)]
    assert after == ([6, 12, 25] if rounding == "keep" else [7, 13, 26])


def test_the_second_layout_of_lists(tmp_path: Path) -> None:
    """Stem, outputs of stages 1 and 2, first convolutions of the 9 blocks; the outputs of stage 3 stay whole."""
    module = residual()
    fit(module, tmp_path, HRank("[0.25]+[0.5]+[0.75]+[0.1]*3+[0.2]*3+[0.3]*3", **FEW), max_epochs=1)
    after = {n.removeprefix("net."): w for n, w in widths(module).items()}
    assert after["conv1"] == 12
    assert {after[f"layer1.{i}.conv2"] for i in range(3)} == {8}
    assert {after[f"layer2.{i}.conv2"] for i in range(3)} == {8}
    assert {after[f"layer3.{i}.conv2"] for i in range(3)} == {64}
    assert [after[f"layer{s}.0.conv1"] for s in (1, 2, 3)] == [14, 25, 44]


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_list_of_another_length(start_epoch: int, tmp_path: Path) -> None:
    message = "pruning_ratio has 19 numbers, but the 'plus' layout of CIFARResNet has 12: conv1, layer1.0.conv2"
    with pytest.raises(ValueError, match=message):
        fit(residual(), tmp_path, HRank([0.5] * 19, start_epoch=start_epoch, **FEW))


def test_without_alignment_every_layer_chooses_its_own(tmp_path: Path) -> None:
    module, aligned = residual(), residual()
    ranks, dense = by_hand(module.net, images()), {n: p.detach().clone() for n, p in module.net.named_parameters()}
    fit(module, tmp_path, HRank(0.5, align_residual=False, **FEW), max_epochs=1, limit_train_batches=0)
    fit(aligned, tmp_path, HRank(0.5, **FEW), max_epochs=1)
    assert widths(module) == widths(aligned)
    own = {n: select_channels(ranks[n], 0.5) for n in ranks}
    for block in range(3):
        name = f"layer1.{block}.conv2"
        rows = dense[f"{name}.weight"][own[name]][:, own[f"layer1.{block}.conv1"]]
        assert torch.equal(module.net.get_parameter(f"{name}.weight"), rows)
    assert len({tuple(own[f"layer1.{b}.conv2"].tolist()) for b in range(3)}) > 1
    reader = dense["layer1.1.conv1.weight"][own["layer1.1.conv1"]][:, own["layer1.0.conv2"]]
    assert torch.equal(module.net.layer1[1].conv1.weight, reader)  # reads what was written last


def test_norms_start_afresh_on_demand(tmp_path: Path) -> None:
    module = residual()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.fill_(3)
            m.weight.data.fill_(2)
    fit(module, tmp_path, HRank(0.5, reset_bn=True, **FEW), max_epochs=1, limit_train_batches=0)
    norm = module.net.layer1[0].bn1
    assert norm.running_mean.tolist() == [0.0] * 8
    assert norm.running_var.tolist() == norm.weight.tolist() == [1.0] * 8


# ---- rank files


def test_rank_files_replace_the_images(tmp_path: Path) -> None:
    callback, seen = HRank(0.5, **FEW), residual()
    fit(seen, tmp_path, callback, max_epochs=1)
    assert callback.ranks is not None
    callback.ranks.save(tmp_path / "ranks.pt")
    (tmp_path / "folder").mkdir()
    for k, name in enumerate(rank_taps(resnet20()), 1):
        np.save(tmp_path / "folder" / f"rank_conv{k}.npy", callback.ranks.mean(f"net.{name}").numpy())
    for file in ("ranks.pt", "folder"):
        module = residual()
        fit(module, tmp_path, HRank(0.5, rank_file=str(tmp_path / file)), max_epochs=1)
        assert_same(module, seen)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_rank_files_that_do_not_fit(start_epoch: int, tmp_path: Path) -> None:
    ranks, path = FeatureRanks(), tmp_path / "ranks.pt"

    def refused(error: str, file: Path = path) -> None:
        module = residual()
        with pytest.raises(ValueError, match=error):
            fit(module, tmp_path, HRank(0.5, rank_file=str(file), start_epoch=start_epoch))
        assert module.trainer.global_step == 0

    for name in rank_taps(resnet20()):
        ranks.update(f"net.{name}", torch.ones(1, 5))
    ranks.save(path)
    refused("The ranks of layer 'net.conv1' are of 5 channels, but the layer has 16: they were measured on another")
    path.write_bytes(path.read_bytes()[:1000])
    refused("ranks.pt' is damaged")
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "rank_conv1.npy", np.ones(16))
    refused("has no rank_conv2.npy, the ranks of layer 'net.layer1.0.conv1'", folder)
    with pytest.raises(ValueError, match=r"HRank\(rank_file='nowhere'\): there is no such file"):
        HRank(rank_file="nowhere")


# ---- layer by layer


class Scripted(Foreign):
    """Validation gives the scores of a script, whatever was learnt."""

    def __init__(self, scores: list[float]) -> None:
        torch.manual_seed(0)
        super().__init__(resnet20(in_channels=1))
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.scores[self.trainer.current_epoch])


class Watch(Callback):
    """Weights and the optimiser at the end of every epoch, and at the start, after HRank had its say."""

    def __init__(self) -> None:
        self.ends: list[dict[str, Tensor]] = []
        self.starts: list[dict[str, Tensor]] = []
        self.momentum: list[int] = []
        self.lr: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.starts.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        self.momentum.append(len(trainer.optimizers[0].state))
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def sequential(ratio: Any = 0.5, **changes: Any) -> HRank:
    arguments = {"epochs_per_layer": 2, "stage_layers": [1, 3], "monitor": "val_acc", **FEW, **changes}
    return HRank(ratio, mode="sequential", **arguments)


STAGES = ["net.conv1"], ["net.conv1", "net.layer1.0.conv1", "net.layer1.0.conv2"], None  # what is masked; None: all


def masked(callback: HRank, stage: int) -> dict[str, Tensor]:
    """Layer -> its removed channels, by the ranks that were measured in the beginning."""
    assert callback.ranks is not None
    means = {n: callback.ranks.mean(n) for n in STAGES[stage] or callback.ranks.sums}
    gone = {n: torch.ones(len(r), dtype=torch.bool) for n, r in means.items()}
    for n, r in means.items():
        gone[n][select_channels(r, 0.5, "prune")] = False
    return gone


def norm_of(layer: str) -> str:
    return layer.replace("conv", "bn")


def check_zeros(tensors: dict[str, Tensor], gone: dict[str, Tensor]) -> None:
    for layer, channels in gone.items():
        for name in (f"{layer}.weight", f"{norm_of(layer)}.weight", f"{norm_of(layer)}.bias"):
            assert tensors[name][channels].abs().max() == 0, name
            assert (tensors[name][~channels] != 0).flatten(1).any() if tensors[name].ndim > 1 else True, name


def test_removed_channels_are_zero_after_any_number_of_steps(tmp_path: Path) -> None:
    callback = sequential()

    class EveryStep(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            check_zeros(dict(pl_module.named_parameters()), masked(callback, trainer.current_epoch // 2))

    module = residual()
    trainer = fit(module, tmp_path, callback, EveryStep(), max_epochs=6)
    assert trainer.global_step == 24
    check_zeros(dict(module.named_parameters()), masked(callback, 2))
    outputs = read(module.net, {"bn1": ("layer2.1.bn1", lambda out: out)}, images())["bn1"]
    assert outputs[:, masked(callback, 2)["net.layer2.1.conv1"]].abs().max() == 0
    for name, module_ in module.net.named_modules():  # all that is left has half the channels
        if isinstance(module_, nn.Conv2d):
            assert module_.weight.flatten(1).any(1).sum() == module_.out_channels // 2, name


def test_the_masked_network_equals_the_one_without_its_zeros(tmp_path: Path) -> None:
    module = residual()
    fit(module, tmp_path, sequential(), max_epochs=6)
    small = compact(module.eval(), (1, 1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(small(images()), module(images()), atol=1e-5, rtol=1e-5)
    before, after = profile(module, (1, 1, 8, 8)), profile(small, (1, 1, 8, 8))
    assert after.macs < 0.5 * before.macs
    assert widths(small)["net.layer1.0.conv1"] == 8


def test_a_stage_hands_on_its_best_weights_and_a_fresh_optimiser(tmp_path: Path) -> None:
    watch, callback = Watch(), sequential()
    module = Scripted([0.9, 0.1, 0.2, 0.8, 0.7, 0.3])
    fit(module, tmp_path, callback, watch, max_epochs=6)
    for border, best in ((2, 0), (4, 3)):
        gone = masked(callback, border // 2)
        for name, tensor in watch.starts[border].items():
            expected = watch.ends[best][name].clone()
            for layer, channels in gone.items():
                if name.startswith((f"{layer}.", f"{norm_of(layer)}.")):
                    expected[channels] = 0
            assert torch.equal(tensor, expected), (border, name)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, watch.ends[4][name])
    assert [bool(n) for n in watch.momentum] == [False, True, False, True, False, True]
    assert watch.lr == pytest.approx([0.1, 0.09] * 3)


def test_resumed_in_the_middle_of_a_stage_and_of_an_epoch(tmp_path: Path) -> None:
    module = Scripted([0.9, 0.1, 0.2, 0.8, 0.7, 0.3])
    ends = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    steps = ModelCheckpoint(tmp_path, "{epoch}-{step}", every_n_train_steps=2, save_top_k=-1)
    fit(module, tmp_path, sequential(), ends, steps, max_epochs=6)
    for name in ("epoch=0", "epoch=2", "epoch=4"):
        fresh = Scripted(module.scores)
        fit(fresh, tmp_path, sequential(), ckpt_path=tmp_path / f"{name}.ckpt", max_epochs=6)
        assert_same(fresh, module)
    callback = sequential()

    class EveryStep(Callback):  # the rest of the epoch sees other images: only zeros can be compared
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            gone = {n: torch.ones(len(pl_module.get_parameter(f"{n}.weight")), dtype=torch.bool) for n in STAGES[1]}
            for name, kept in callback._stages.kept.items():
                if name in gone:
                    gone[name][kept] = False
            check_zeros(dict(pl_module.named_parameters()), gone)

    path = tmp_path / "epoch=2-step=10.ckpt"
    fit(Scripted(module.scores), tmp_path, callback, EveryStep(), ckpt_path=path, max_epochs=6)


def test_the_first_layout_of_lists_and_its_length(tmp_path: Path) -> None:
    module = residual()
    fit(module, tmp_path, sequential("[0.0]+[0.5,0.25]*9", stage_layers=[19], epochs_per_layer=1), max_epochs=1)
    zeros = {
        n: int((~m.weight.flatten(1).any(1)).sum()) for n, m in module.net.named_modules() if isinstance(m, nn.Conv2d)
    }
    assert (zeros["conv1"], zeros["layer1.0.conv1"], zeros["layer1.0.conv2"], zeros["layer3.2.conv2"]) == (0, 8, 4, 16)
    with pytest.raises(ValueError, match=r"pruning_ratio has 12 numbers, but the 'original' layout .* has 19"):
        fit(residual(), tmp_path, sequential([0.5] * 12), max_epochs=6)


def test_narrow_layers_and_masks_in_one_fit(tmp_path: Path) -> None:
    """Best weights of a stage keep the structure that another method gave the network before."""
    module = residual()
    callbacks = [L1Norm(0.5, include=["net.layer3.*.conv1"]), sequential(stage_layers=[19], epochs_per_layer=1)]
    fit(module, tmp_path, *callbacks, max_epochs=2)
    assert widths(module)["net.layer3.0.conv1"] == 32
    assert int((~module.net.layer3[0].conv1.weight.flatten(1).any(1)).sum()) == 16


def test_a_second_fit_starts_from_the_first_stage(tmp_path: Path) -> None:
    callback, again = sequential(stage_layers=[19], epochs_per_layer=1), residual()
    fit(residual(), tmp_path, callback, max_epochs=1)
    fit(again, tmp_path, callback, max_epochs=1)
    alone = residual()
    fit(alone, tmp_path, sequential(stage_layers=[19], epochs_per_layer=1), max_epochs=1)
    assert_same(again, alone)


@pytest.mark.parametrize(
    ("arguments", "epochs", "message"),
    [
        ({}, 5, r"needs 6 epochs: 2 for each of 3 stages, but the Trainer stops after max_epochs=5"),
        ({"stage_layers": [0]}, 6, r"HRank\(stage_layers=\[0\]\): give numbers from 1 to 19"),
        (
            {"monitor": "val_ac"},
            6,
            r"HRank\(monitor='val_ac'\): the module logs no such metric. Did you mean 'val_acc'",
        ),
    ],
)
def test_stages_that_cannot_be(arguments: dict[str, Any], epochs: int, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(residual(), tmp_path, sequential(**arguments), max_epochs=epochs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "onec"}, r"HRank\(mode='onec'\): give 'one_shot' or 'sequential'"),
        ({"rounding": "up"}, r"HRank\(rounding='up'\): give 'keep' or 'prune'"),
        ({"num_batches": 0}, r"HRank\(num_batches=0\): give a whole number of at least 1"),
        ({"mode": "sequential", "start_epoch": 2}, "takes no start_epoch, target_macs or round_to"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HRank(**arguments)


# ---- images


@pytest.mark.parametrize("batch_size", [8, 32], ids=["images_for_both", "images_for_one"])
def test_shards_of_images_add_up_to_all_of_them(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What two processes would measure: each its own images, together what one process measures."""
    shards = []
    monkeypatch.setattr(Trainer, "world_size", 2)
    for rank in (0, 1):
        monkeypatch.setattr(Trainer, "global_rank", rank)
        trainer, module, callback = make_trainer(tmp_path), made(), HRank(num_batches=4, rank_batch_size=8)
        trainer.strategy.connect(module)
        trainer.fit_loop._data_source.instance = digits(32, batch_size=batch_size)
        callback.scores(trainer, module, callback.trace(trainer, module))
        shards.append(callback.ranks)
    total = FeatureRanks()
    for shard, images_ in zip(shards, (16, 16) if batch_size == 8 else (16, 0), strict=True):
        assert shard is not None
        assert all(count == images_ for count in shard.counts.values())
        total.merge(shard)
    monkeypatch.undo()
    whole, module = HRank(num_batches=4, rank_batch_size=8), made()
    fit(module, tmp_path, whole, max_epochs=1, limit_train_batches=0)
    if batch_size == 8:
        assert whole.ranks is not None
        for layer in whole.ranks.counts:
            assert torch.equal(total.sums[layer], whole.ranks.sums[layer])


# ---- taps: maps against hooks that a person would write


def relu(x: Tensor) -> Tensor:
    return x.relu()


def same(x: Tensor) -> Tensor:
    return x


def added(x: Tensor) -> Tensor:
    return x[:, -32:].relu()


def resnet18_taps(network: nn.Module) -> dict[str, Any]:
    """One ReLU module serves twice in every block, the second time behind the sum."""
    taps = {"conv1": ("bn1", relu)}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            taps |= {f"{name}.conv1": (f"{name}.bn1", relu), f"{name}.conv2": (name, same)}
        if stage > 1:
            taps[f"layer{stage}.0.downsample.0"] = (f"layer{stage}.0", same)
    return taps


def mobilenet_taps(network: nn.Module) -> dict[str, Any]:
    """ReLU6 behind all but the last convolution of a block; behind that the sum, where there is one."""
    taps = {"features.0.0": ("features.0.2", same), "features.18.0": ("features.18.2", same)}
    for i in range(1, 18):
        convs = [n for n, m in network.features[i].named_modules() if isinstance(m, nn.Conv2d)]
        for n in convs[:-1]:
            taps[f"features.{i}.{n}"] = (f"features.{i}.{n[:-1]}2", same)
        taps[f"features.{i}.{convs[-1]}"] = (f"features.{i}", same)
    return taps


def densenet_taps(network: nn.Module) -> dict[str, Any]:
    """The ReLU in front of the first layer that reads the concatenation; of it, the channels that were added last."""
    taps: dict[str, Any] = {"features.conv0": ("features.relu0", same)}
    for b, layers in enumerate((6, 12, 24, 16), 1):
        block, transition = f"features.denseblock{b}", f"features.transition{b}"
        readers = [f"{block}.denselayer{i}.relu1" for i in range(2, layers + 1)]
        readers += [f"{transition}.relu" if b < 4 else "features.norm5"]
        for i, reader in enumerate(readers, 1):
            taps[f"{block}.denselayer{i}.conv1"] = (f"{block}.denselayer{i}.relu2", same)
            taps[f"{block}.denselayer{i}.conv2"] = (reader, added)
        if b < 4:
            taps[f"{transition}.conv"] = (f"{transition}.conv", same)  # pooled before anything else
    return taps


@pytest.mark.parametrize(
    ("build", "taps"),
    [(resnet18, resnet18_taps), (mobilenet_v2, mobilenet_taps), (densenet121, densenet_taps)],
    ids=["resnet18", "mobilenet_v2", "densenet121"],
)
def test_maps_are_found_where_a_person_would_look(build: Any, taps: Any) -> None:
    torch.manual_seed(0)
    network, x = build().eval(), torch.rand(2, 3, 64, 64)
    expected = read(network, taps(network), x)
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    assert set(expected) == set(layers)
    found: dict[str, list[Tensor]] = {}
    with (
        torch.no_grad(),
        feature_maps(network, layers, {}, lambda n, maps: found.setdefault(n, []).append(maps.clone())),
    ):
        network(x)
    for name in layers:
        (maps,) = found[name]
        assert torch.equal(maps, expected[name]), name
    assert not any(m._forward_hooks for m in network.modules())


def test_maps_of_a_functional_network(tmp_path: Path) -> None:
    """The foreign network calls F.relu: behind the norm, and behind the sum."""
    module, callback = made(), HRank(0.5, **FEW)
    net, x = module.net.eval(), images()
    with torch.no_grad():
        stem = F.relu(net.bn(net.stem(x)))
        inner = F.relu(net.blocks[0].bn1(net.blocks[0].conv1(stem)))
        outer = F.relu(stem + net.blocks[0].bn2(net.blocks[0].conv2(inner)))
    module.train()
    fit(module, tmp_path, callback, max_epochs=1)
    assert callback.ranks is not None
    for name, maps in (("stem", stem), ("blocks.0.conv1", inner), ("blocks.0.conv2", outer)):
        expected = feature_map_rank(maps).double().mean(0)
        assert torch.equal(callback.ranks.mean(f"net.{name}"), expected), name
