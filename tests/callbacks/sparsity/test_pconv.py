"""PCONV: what is pruned in which network, every published count, and the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18, resnet50, vgg16

from lightning_compress import profile
from lightning_compress.callbacks import PCONV, L1Norm
from lightning_compress.callbacks.sparsity.pconv import Rule, find_rules, named_library, to_pattern_model
from lightning_compress.catalog import Row, card
from lightning_compress.cli.configs import find_config
from lightning_compress.core.report import Account
from lightning_compress.core.sparse.formats import decode_fkw, load_fkw
from lightning_compress.core.sparse.patterns import SCP4, kept_count, kernel_mask, library_of
from lightning_compress.networks import build, load_weights, vgg16_cifar
from lightning_compress.ops.pattern_conv2d import PatternConv2d

SHORT: dict[str, Any] = {"connectivity": 2.0, "start_epoch": 1, "end_epoch": 4, "every_n_epochs": 1, "rho": 0.03}


def rules_of(network: nn.Module, shape: tuple[int, ...], connectivity: float = 3.6, **more: Any) -> Any:
    order = [layer.name for layer in profile(network, shape).layers if layer.kind in ("conv", "linear")]
    return find_rules(network, order, connectivity, **more)


def left(network: nn.Module, shape: tuple[int, ...], connectivity: float, balance: str) -> tuple[int, int, int]:
    """Convolution weights, those that stay, and their MACs: by the closed forms."""
    rules, _ = rules_of(network, shape, connectivity)
    total = kept = macs = 0
    for layer in profile(network, shape).layers:
        if layer.kind == "conv":
            weight = network.get_submodule(layer.name).weight
            filters, channels = weight.shape[:2]
            rule = rules.get(layer.name)
            own = weight.numel()
            if rule is not None:
                count = filters * channels
                if balance == "layer":
                    kernels = kept_count(count, rule.connectivity)
                else:
                    kernels = filters * kept_count(channels, rule.connectivity)
                own = kernels * (4 if rule.patterns else 1)
            total, kept, macs = total + weight.numel(), kept + own, macs + layer.macs * own // weight.numel()
    return total, kept, macs


def on_meta(make: Any) -> nn.Module:
    with torch.device("meta"):
        return make()


# ---- counts


@pytest.mark.parametrize(
    ("make", "connectivity", "balance", "total", "kept"),
    [
        pytest.param(vgg16, 3.6, "layer", 14_710_464, 1_816_680, id="arXiv:1909.05073-VGG-16-layer"),
        pytest.param(vgg16, 3.6, "filter", 14_710_464, 1_829_120, id="arXiv:1909.05073-VGG-16-filter"),
        pytest.param(resnet18, 3.6, "layer", 11_166_912, 1_537_700, id="arXiv:1909.05073-ResNet-18"),
        pytest.param(resnet18, 2.0, "layer", 11_166_912, 2_622_656, id="arXiv:1909.05073-ResNet-18-half"),
        pytest.param(resnet50, 3.6, "layer", 23_454_912, 6_775_367, id="arXiv:1909.05073-ResNet-50"),
        pytest.param(resnet50, 2.0, "layer", 23_454_912, 9_972_928, id="arXiv:1909.05073-ResNet-50-half"),
        pytest.param(mobilenet_v2, 3.6, "layer", 2_189_760, 619_123, id="arXiv:1909.05073-MobileNet-V2"),
    ],
)
def test_weights_that_stay(make: Any, connectivity: float, balance: str, total: int, kept: int) -> None:
    assert left(on_meta(make), (1, 3, 224, 224), connectivity, balance)[:2] == (total, kept)


@pytest.mark.parametrize(
    ("balance", "macs", "factor"), [("layer", 1_922_614_176, 7.982), ("filter", 1_941_610_496, 7.904)]
)
def test_macs_of_vgg16(balance: str, macs: int, factor: float) -> None:
    """arXiv:1909.05073 at 224 x 224."""
    network = on_meta(vgg16)
    dense = sum(layer.macs for layer in profile(network, (1, 3, 224, 224)).layers if layer.kind == "conv")
    assert dense == 15_346_630_656
    assert left(network, (1, 3, 224, 224), 3.6, balance)[2] == macs
    assert dense / macs == pytest.approx(factor, abs=1e-3)


@pytest.mark.parametrize(("balance", "kept"), [("layer", 1_816_680), ("filter", 1_829_120)])
def test_masks_of_vgg16_have_these_counts(balance: Any, kept: int) -> None:
    network = vgg16_cifar()
    rules, _ = rules_of(network, (1, 3, 32, 32))
    assert len(rules) == 13
    library = library_of(SCP4)
    counted = 0
    for name, rule in rules.items():
        mask = kernel_mask(network.get_submodule(name).weight, library, rule.connectivity, balance).flatten(2)
        per_kernel = mask.sum(-1)
        counted += int(mask.sum())
        assert set(per_kernel.unique().tolist()) <= {0, 4}
        if balance == "filter":
            assert len(mask.any(-1).sum(1).unique()) == 1
    assert counted == kept


@pytest.mark.parametrize("row", card("pconv").published, ids=lambda row: f"{row.network}-{row.setting}")
def test_recipes_leave_what_their_rows_say(row: Row) -> None:
    config = yaml.safe_load(find_config(row.config).read_text())
    method, model = config["trainer"]["callbacks"][0]["init_args"], config["model"]["init_args"]
    network = on_meta(lambda: build(model["network"]))
    shape = (1, *model.get("input_shape", (3, 32, 32)))
    _, kept, macs = left(network, shape, method["connectivity"], method.get("balance", "filter"))
    assert kept == row.result["params"]
    assert macs == row.result["macs"]


# ---- which layers


def test_residual_networks() -> None:
    rules, alone = rules_of(on_meta(resnet50), (1, 3, 224, 224), pattern_block=4)
    assert rules["layer1.0.conv2"] == Rule(True, 3.6, 4)
    assert rules["layer1.0.conv1"] == Rule(False, 3.6, 1)
    assert alone["conv1"] == "7x7 kernels"
    assert alone["layer1.0.downsample.0"] == "1x1 kernels on a shortcut"
    assert alone["fc"] == "no convolution"
    rules, alone = rules_of(on_meta(resnet50), (1, 3, 224, 224), include_1x1=False, exclude=["layer1*"])
    assert {rule.patterns for rule in rules.values()} == {True}
    assert alone["layer1.0.conv2"] == "excluded"
    assert alone["layer2.0.conv1"] == "1x1 kernels"


def test_depthwise_and_first_layers_keep_their_kernels() -> None:
    rules, _ = rules_of(on_meta(mobilenet_v2), (1, 3, 224, 224), pattern_block=4)
    assert rules["features.0.0"] == Rule(True, 1.0, 4)
    assert rules["features.1.conv.0.0"] == Rule(True, 1.0, 1)
    assert rules["features.2.conv.0.0"] == Rule(False, 3.6, 1)
    rules, _ = rules_of(on_meta(vgg16), (1, 3, 224, 224), connectivity_exclude=["features.2"])
    assert (rules["features.0"].connectivity, rules["features.2"].connectivity) == (3.6, 1.0)


def test_rates_by_glob() -> None:
    network = vgg16_cifar()
    rules, _ = rules_of(network, (1, 3, 32, 32), {"*conv1?": 2.0, "*conv13": 4.0})  # type: ignore[arg-type]
    rates = {name.rpartition("conv")[2]: rule.connectivity for name, rule in rules.items()}
    assert rates == {**{str(i): 1.0 for i in range(1, 10)}, "10": 2.0, "11": 2.0, "12": 2.0, "13": 4.0}


def test_groups_and_frozen_layers_stay() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3).requires_grad_(False), nn.Conv2d(8, 8, 1)
    )
    rules, alone = rules_of(network, (1, 3, 16, 16), 1.0)
    assert list(rules) == ["0"]
    assert list(alone.values()) == ["3x3 kernels in 2 groups", "its weight is frozen", "1x1 kernels that all stay"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [("scp5", "'scp5'"), (torch.ones(2, 8), r"\(P, 9\)"), ([[0, 1], [1]], "equally many"), ([[9]], "0 to 8")],
)
def test_bad_libraries(patterns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"patterns.*{message}"):
        named_library(patterns)


def test_libraries_as_tensors_and_lists_are_one() -> None:
    tensor = library_of(SCP4)
    assert torch.equal(named_library(tensor.float()), tensor)
    keys = {PCONV(patterns=p).state_key for p in (tensor, [list(taps) for taps in SCP4])}  # type: ignore[arg-type]
    assert len(keys) == 1
    assert PCONV().state_key not in keys


# ---- the callback


def run(root: Path, module: Any = None, epochs: int = 6, **changes: Any) -> tuple[Any, PCONV]:
    method = PCONV(**{**SHORT, **changes})
    module = module or foreign.made()
    foreign.fit(module, root, method, max_epochs=epochs)
    return module, method


@pytest.mark.parametrize("block", [1, 4])
def test_a_fit_ends_with_patterns_and_balanced_kernels(block: int, tmp_path: Path) -> None:
    module, _ = run(tmp_path, pattern_block=block)
    library = library_of(SCP4)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            kept = (layer.weight != 0).flatten(2)
            kernels = kept.any(-1)
            expected = layer.in_channels if name == "net.stem" else kept_count(layer.in_channels, 2.0)
            assert (kernels.sum(1) == expected).all()
            shapes = kept[kernels]
            assert (shapes.sum(-1) == 4).all()
            assert (shapes[:, None] == library).all(-1).any(1).all()
            if block > 1:
                assert torch.equal(kept[:4], kept[:1].expand(4, -1, -1))


def test_the_packed_file_is_the_network(tmp_path: Path) -> None:
    module, method = run(tmp_path, balance="layer")
    packed = load_fkw(tmp_path / "pconv.fkw")
    assert list(packed) == method.layers
    for name, layer in packed.items():
        weight = module.get_submodule(name).weight
        assert torch.equal(decode_fkw(layer)[0], weight)
    account = Account.load(tmp_path)
    row = next(row for row in account.after.rows if row.name == "net.blocks.0.conv1")
    assert row.bytes == packed["net.blocks.0.conv1"].nbytes
    assert row.nonzeros == 4 * kept_count(12 * 8, 2.0)
    stem = next(row for row in account.after.rows if row.name == "net.stem")
    assert stem.bytes == packed["net.stem"].nbytes + 4 * 8
    size = (tmp_path / "pconv.fkw").stat().st_size
    assert any(f"pconv.fkw: 5 layers in {size:,} bytes" in note for note in account.notes)
    assert any("3x3 convolutions" in note and "all parameters" in note for note in account.notes)
    assert ("net.head", "no convolution") in [tuple(entry) for entry in account.left_alone]


@pytest.mark.parametrize("block", [1, 4])
def test_a_model_of_pattern_layers_computes_the_same(block: int, tmp_path: Path) -> None:
    """Also on a network with other convolution weights: those of the file count."""
    module, _ = run(tmp_path, pattern_block=block)
    images = next(iter(foreign.digits()))[0]
    expected = module.eval()(images)
    fresh = foreign.made()
    fresh.load_state_dict({k: torch.ones_like(v) if "conv1" in k else v for k, v in module.state_dict().items()})
    for network in (module, fresh):
        small = to_pattern_model(network, load_fkw(tmp_path / "pconv.fkw"), mode="sparse")
        assert sum(isinstance(m, PatternConv2d) for m in small.modules()) == 5
        with torch.inference_mode():
            torch.testing.assert_close(small(images), expected.detach(), atol=1e-5, rtol=1e-4)


def test_filters_that_go_after_the_hard_step(tmp_path: Path) -> None:
    """... take blocks apart; the file is still the network."""
    module = foreign.made()
    method = PCONV(pattern_block=4, **{**SHORT, "end_epoch": 2})
    foreign.fit(module, tmp_path, method, L1Norm(pruning_ratio=0.5, start_epoch=3), max_epochs=5)
    for name, layer in load_fkw(tmp_path / "pconv.fkw").items():
        assert torch.equal(decode_fkw(layer)[0], module.get_submodule(name).weight)


def test_two_callbacks_write_two_files(tmp_path: Path) -> None:
    parts = [PCONV(include=[f"net.blocks.{i}.*"], patterns=p, **SHORT) for i, p in enumerate(("scp4", "natural8"))]
    foreign.fit(foreign.made(), tmp_path, *parts, max_epochs=5)
    assert list(load_fkw(tmp_path / "pconv.fkw")) == ["net.blocks.0.conv1", "net.blocks.0.conv2"]
    assert len(load_fkw(tmp_path / "pconv_2.fkw")["net.blocks.1.conv1"].library) == 8


def test_nothing_is_pruned_before_its_time(tmp_path: Path) -> None:
    _, method = run(tmp_path, epochs=5, start_epoch=3)
    assert method.phase is not None
    assert method.phase.name == "retraining"
    account = Account.load(tmp_path)
    assert account.after.nonzeros < account.before.nonzeros
    foreign.fit(foreign.made(), tmp_path / "dry", PCONV(), fast_dev_run=True)
    assert not (tmp_path / "dry").exists()


def test_a_strong_penalty_makes_the_hard_step_small(tmp_path: Path) -> None:
    """|| W - projection || / ||W|| right before the pruning, by the strength of rho."""
    lost = []
    for rho in (1e-5, 1.0):
        method = PCONV(**{**SHORT, "connectivity": 1.0, "rho": rho, "end_epoch": 7, "every_n_epochs": 2})
        trainer = foreign.fit(foreign.made(), tmp_path, method, max_epochs=8)
        lost.append(float(trainer.callback_metrics["train/pconv/residual"]))
    assert lost[1] < 0.7 * lost[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"connectivity": 0.5}, r"connectivity=0\.5"),
        ({"connectivity": {"net.stem": 0.0}}, "connectivity"),
        ({"connectivity": {"nothing": 2.0}}, "connectivity: 'nothing'"),
        ({"connectivity_exclude": ["nothing"]}, "connectivity_exclude: 'nothing'"),
        ({"balance": "kernel"}, "balance='kernel'"),
        ({"pattern_block": 0}, "pattern_block=0"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"warmup_epochs": 3}, "warmup_epochs=3"),
        ({"start_epoch": 4}, r"end_epoch=4\) leaves no epoch"),
        ({"include": ["net.head"]}, "finds no layer"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        run(tmp_path, **arguments)


# ---- learning


def three_layers() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, width in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def test_eight_times_fewer_weights(tmp_path: Path) -> None:
    """After retraining the network knows digits that it has not seen as well as a dense one (97 % after 8 epochs)."""
    module = foreign.made(three_layers)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)  # type: ignore
    method = PCONV(connectivity=3.6, start_epoch=4, end_epoch=10, every_n_epochs=2, rho=0.03)
    trainer = foreign.make_trainer(tmp_path, method, max_epochs=14)
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits(1200, batch_size=64), foreign.digits(597, 1200, batch_size=597))
    convolutions = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]
    left = sum(int(w.count_nonzero()) for w in convolutions) / sum(w.numel() for w in convolutions)
    assert left == pytest.approx((16 * 4 + (32 * 5 + 32 * 9) * 4) / (16 * 9 + (32 * 16 + 32 * 32) * 9))
    assert trainer.callback_metrics["val_acc"] > 0.94


@pytest.mark.real_data
def test_the_public_resnet20_in_blocks_of_four() -> None:
    """Four shapes keep .565 of the energy of its kernels, and .536 if four filters share them."""
    folder = real_data("weights/resnet20-cifar10.pt")
    network = build("resnet20")
    load_weights(network, folder / "weights" / "resnet20-cifar10.pt")
    kept = [energy(network, block) for block in (1, 4)]
    assert kept[0] == pytest.approx(0.565, abs=0.002)
    assert 0.5 < kept[1] < kept[0] - 0.02


def energy(network: nn.Module, block: int) -> float:
    weights = [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d)]

    def squares(tensors: list[Tensor]) -> float:
        return float(np.sum([t.double().square().sum().item() for t in tensors]))

    return squares([w * kernel_mask(w, library_of(SCP4), block=block) for w in weights]) / squares(weights)
