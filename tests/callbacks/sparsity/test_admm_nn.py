"""ADMMNN: counts, projections and levels by number, the comparison of storage, and the stages of a fit."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.callbacks import ADMMNN, L1Norm
from lightning_compress.callbacks.sparsity.admm_nn.gather import ColumnConv2d, to_stored_model
from lightning_compress.callbacks.sparsity.admm_nn.projections import (
    closest_to_levels,
    find_step,
    level_codes,
    level_count,
    project_levels,
    project_units,
    prune_mask,
    removed,
    unit_norms,
)
from lightning_compress.callbacks.sparsity.admm_nn.storage import Stored, compression_report
from lightning_compress.cli.configs import find_config
from lightning_compress.core.ratio import ratio_by_layer
from lightning_compress.core.report import Account
from lightning_compress.core.sparse.gaps import decode_gaps, load_gaps
from lightning_compress.networks import lenet5

SHORT: dict[str, Any] = {"sparsity": 0.5, "prune_epochs": 2, "retrain_epochs": 1, "every_n_epochs": 1, "rho": 0.03}
QUANT: dict[str, Any] = {**SHORT, "weight_bits": 3, "quant_epochs": 2, "quant_rounds": 2, "partial_epochs": 1}
LENET5 = {"conv1": 500, "conv2": 25_000, "fc1": 400_000, "fc2": 5_000}
ALEXNET = [(34_848, 0.81), (307_200, 0.20), (884_736, 0.19), (663_552, 0.20), (442_368, 0.20), (37_748_736, 0.028),
           (16_777_216, 0.059), (4_096_000, 0.093)]  # fmt: skip


def noise() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=1000))


# ---- pruning


def test_weights_of_lenet5_in_arxiv_1804_03294() -> None:
    config = yaml.safe_load(find_config("recipes/admm_nn/lenet5_mnist_71x").read_text())
    rates = config["trainer"]["callbacks"][0]["init_args"]["sparsity"]
    layers = {f"network.{name}": m.weight.numel() for name, m in lenet5().named_modules() if hasattr(m, "weight")}
    assert list(layers.values()) == list(LENET5.values())
    by_layer = ratio_by_layer(rates, list(layers), "sparsity")
    kept = sum(size - removed(by_layer[name], size) for name, size in layers.items())
    assert (sum(layers.values()), kept) == (430_500, 6_050)
    assert 430_500 / kept == pytest.approx(71.16, abs=0.005)


def test_weights_of_alexnet_in_arxiv_1804_03294() -> None:
    kept = [size - removed(1 - share, size) for size, share in ALEXNET]
    assert kept == [28_227, 61_440, 168_100, 132_711, 88_474, 1_056_965, 989_856, 380_928]
    total = sum(size for size, _ in ALEXNET)
    assert (total, sum(kept)) == (60_954_656, 2_906_701)
    assert total / sum(kept) == pytest.approx(20.97, abs=0.005)


@pytest.mark.parametrize(("units", "rate", "zeros"), [(24, 0.66, 15), (50, 0.25, 12)])
def test_the_rule_of_counts(units: int, rate: float, zeros: int) -> None:
    assert removed(rate, units) == zeros
    assert int((prune_mask(torch.randn(units), "irregular", rate) == 0).sum()) == zeros


def test_the_largest_stay_in_values_and_mask() -> None:
    weight = torch.tensor([0.9, -0.8, 0.05, -0.04, 0.3, -0.2, 0.1, 0.6, -0.5, 0.02])
    assert weight[prune_mask(weight, "irregular", 0.5)].tolist() == pytest.approx([0.9, -0.8, 0.3, 0.6, -0.5])
    five = torch.tensor([1.0, 2, 3, 4, 5])
    mask = prune_mask(five, "irregular", 0.5)
    assert five[mask].tolist() == [3, 4, 5]
    assert torch.equal(project_units(five, "irregular", 0.5) != 0, mask)
    assert prune_mask(torch.ones(4), "irregular", 0.5).tolist() == [False, False, True, True]


@pytest.mark.parametrize(("kind", "units"), [("irregular", 480), ("filter", 8), ("column", 60), ("kernel", 40)])
def test_units_of_a_convolution(kind: Any, units: int) -> None:
    weight = torch.randn(8, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    norms = unit_norms(weight, kind)
    assert norms.numel() == units
    assert float(norms.square().sum()) == pytest.approx(float(weight.square().sum()), rel=1e-5)
    projected = project_units(weight, kind, 0.4)
    assert int((unit_norms(projected, kind) == 0).sum()) == removed(0.4, units)
    lost = norms.flatten().sort().values[: removed(0.4, units)]  # nearest: the weakest units go
    assert float((weight - projected).square().sum()) == pytest.approx(float(lost.square().sum()), rel=1e-4)


# ---- levels


def test_binary_levels_of_noise() -> None:
    weight = noise()
    step = find_step(weight, 1, "binary")
    assert step == pytest.approx(0.777205, abs=1e-6)
    assert float((weight - project_levels(weight, step, 1, "binary")).square().mean()) == pytest.approx(
        0.352305, abs=1e-6
    )


@pytest.mark.parametrize(
    ("count", "step", "error"),
    [(2, 0.632151, 157.5237), (4, 0.456320, 58.68090), (7, 0.334820, 23.19335), (31, 0.115479, 1.518034)],
)
def test_uniform_levels_of_noise(count: int, step: float, error: float) -> None:
    weight = noise()
    found = find_step(weight, count)
    assert found == pytest.approx(step, abs=1e-6)
    assert float((weight - project_levels(weight, found, count)).square().sum()) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(
    ("count", "step", "error"),
    [(2, 1.75474, 1292.44), (4, 0.877370, 200.483), (7, 0.501354, 46.753), (31, 0.115473, 1.518036)],
)
def test_the_released_scan(count: int, step: float, error: float) -> None:
    weight = noise()
    found = find_step(weight, count, search="scan")
    assert found == pytest.approx(step, rel=1e-5)
    assert float((weight - project_levels(weight, found, count)).square().sum()) == pytest.approx(error, rel=2e-5)


def test_zeros_have_no_part_in_the_step() -> None:
    weight = noise()
    sparse = torch.where(weight.abs() > 1.37, weight, 0.0)
    assert find_step(sparse, 7) == find_step(sparse[sparse != 0], 7)
    assert torch.equal(project_levels(sparse, 0.3, 7) == 0, sparse == 0)
    assert find_step(torch.zeros(5), 4) == 1.0


def test_ternary_step_is_the_best_of_all_thresholds() -> None:
    weight = noise()
    step = find_step(weight, 1, "ternary")
    errors = []
    for t in weight.abs():
        kept = weight.abs() >= t
        alpha = weight[kept].abs().mean()
        errors.append(float((weight - torch.where(kept, weight.sign() * alpha, 0.0)).square().sum()))
    projected = project_levels(weight, step, 1, "ternary")
    assert float((weight - projected).square().sum()) == pytest.approx(min(errors))
    assert len(projected.unique()) == 3


def test_levels_by_hand() -> None:
    """Between two levels the upper one; never zero, but for zeros and ternary ones."""
    weight = torch.tensor([0.2, -0.2, 1.5, -1.5, 2.4, -9.0, 0.0, 0.5, -0.5])
    assert level_codes(weight, 1.0, 4).tolist() == [1, -1, 2, -1, 2, -4, 0, 1, -1]
    assert level_codes(weight, 1.0, 1, "ternary").tolist() == [0, 0, 1, -1, 1, -1, 0, 1, 0]
    assert [level_count(8), level_count(7, shared_zero=True), level_count(6, shared_zero=True)] == [128, 63, 31]
    assert [level_count(4, shared_zero=True), level_count(5), level_count(3)] == [7, 16, 4]


@pytest.mark.parametrize(("share", "least"), [(0.3, (0.3, 0.51, 0.657, 0.7599)), (0.2, (0.2, 0.36, 0.488, 0.5904))])
def test_partial_snapping(share: float, least: tuple[float, ...]) -> None:
    """At least 1 - (1 - share)^n after n rounds, the closest of each level first."""
    weight = noise()
    codes = level_codes(weight, 0.45632, 4)
    distance = (weight - 0.45632 * codes).abs()
    free = torch.ones(1000, dtype=torch.bool)
    for bound in least:
        marked = closest_to_levels(codes[free], distance[free], share)
        for code in codes.unique():
            own = codes[free] == code
            assert int(marked[own].sum()) == int(np.ceil(share * int(own.sum()) - 1e-9))
            if marked[own].any() and not marked[own].all():
                assert distance[free][own & marked].max() <= distance[free][own & ~marked].min()
        free[free.nonzero()[:, 0][marked]] = False
        assert bound <= 1 - float(free.double().mean()) < bound + 0.02


# ---- storage


def test_the_comparison() -> None:
    """P = 10, b = 4: 5-bit gaps, .932 bits per weight; structured pruning breaks even at 4.29."""
    layers = {"conv": Stored(1000, 100, 4, 125, True), "fc": Stored(1000, 500, 8, 1000, False)}
    report = compression_report(layers)
    assert list(report) == ["conv", "fc", "all convolutions", "all layers"]
    row = report["conv"]
    assert (row["rate"], row["index_bits"]) == (10, 5)
    assert row["bits_per_weight"] == pytest.approx(0.932, abs=5e-4)
    assert row["break_even"] == pytest.approx(4.29, abs=5e-3)
    assert row["speedup"] == pytest.approx(10 / 2.7)
    assert (row["compression"], row["without_index"], row["stored_bits_per_weight"]) == (32, 80, 1)
    assert report["all layers"]["bits"] == pytest.approx((100 * 4 + 500 * 8) / 600)
    dense = compression_report({"a": Stored(80, 80, 1, 10, False)})["a"]
    assert (dense["index_bits"], dense["bits_per_weight"], dense["break_even"], dense["speedup"]) == (0, 1, 1, 1)


# ---- in a fit


def run(root: Path, epochs: int = 8, module: Any = None, *others: Callback, **arguments: Any) -> tuple[Any, ADMMNN]:
    method, module = ADMMNN(**arguments), module or foreign.made()
    foreign.fit(module, root, method, *others, max_epochs=epochs)
    return module, method


def weights(module: nn.Module) -> dict[str, Tensor]:
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return {name: layer.weight.detach() for name, layer in layers.items()}


def check_stored(module: nn.Module, path: Path) -> None:
    """The file is the network, bit for bit, and computes the same."""
    packed = load_gaps(path)
    for name, layer in packed.items():
        assert torch.equal(decode_gaps(layer), weights(module)[name]), name
    fresh = foreign.made()
    fresh.load_state_dict({k: torch.ones_like(v) if "conv1" in k else v for k, v in module.state_dict().items()})
    images = next(iter(foreign.digits()))[0]
    with torch.no_grad():
        torch.testing.assert_close(to_stored_model(fresh, packed)(images), module.eval()(images), atol=1e-6, rtol=1e-5)


def test_every_layer_loses_its_share(tmp_path: Path) -> None:
    module, _ = run(tmp_path, 4, **{**SHORT, "sparsity": {"*": 0.75, "*stem": 0.2, "*conv2": 0.0}})
    for name, weight in weights(module).items():
        rate = 0.2 if name.endswith("stem") else 0.0 if name.endswith("conv2") else 0.75
        assert int((weight == 0).sum()) == removed(rate, weight.numel())
    check_stored(module, tmp_path / "admm_nn.gaps")
    account = Account.load(tmp_path)
    assert any(note.startswith("All convolutions: ") and "structured pruning stores" in note for note in account.notes)
    report = json.loads((tmp_path / "admm_nn_storage.json").read_text())
    assert report["net.head"]["kept"] == 20
    assert "net.blocks.0.conv2" not in report


def test_progressive_rounds_keep_their_zeros(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    rho: list[float] = []

    class Diary(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(pl_module.net.blocks[0].conv1.weight.detach() != 0)
            rho.append(method.splits.rho)

    method = ADMMNN(**{**SHORT, "sparsity": [0.5, 0.75, 0.9]})
    foreign.fit(foreign.made(), tmp_path, method, Diary(), max_epochs=9)
    kept = [int(mask.sum()) for mask in seen]
    total = 12 * 8 * 9
    assert kept == [total] * 2 + [total // 2] * 3 + [total // 4] * 3 + [total - removed(0.9, total)]
    assert all((later <= earlier).all() for earlier, later in pairwise(seen))
    assert rho[0] == rho[3] == rho[6] == 0.03
    assert rho[1] == pytest.approx(0.039)


@pytest.mark.parametrize("structure", ["filter", "bn_filter", "column", "kernel", "structured"])
def test_structures(structure: Any, tmp_path: Path) -> None:
    arguments = {**SHORT, "sparsity": {"*conv1": 0.5}, "structure": structure}
    module, method = run(tmp_path, 7 if structure == "structured" else 4, **arguments)
    weight = weights(module)["net.blocks.0.conv1"]
    kinds = {"filter": ["filter"], "bn_filter": ["filter"], "structured": ["filter", "column"]}.get(
        structure, [structure]
    )
    for kind in kinds:
        norms = unit_norms(weight, kind)
        assert int((norms == 0).sum()) == norms.numel() // 2
    account = Account.load(tmp_path)
    if "filter" in kinds:
        assert account.after.macs < account.before.macs  # physically smaller
        alive = unit_norms(weight, "filter").flatten() != 0
        assert torch.equal(module.net.blocks[0].bn1.weight != 0, alive)
        assert torch.equal(module.net.blocks[0].bn1.bias != 0, alive)
    assert method.left_alone["net.head"] == f"structure={structure!r} is not for it"
    check_stored(module, tmp_path / "admm_nn.gaps")
    packed = load_gaps(tmp_path / "admm_nn.gaps")
    assert packed["net.blocks.0.conv1"].values.numel() == weight.count_nonzero()
    if structure == "column":
        small = to_stored_model(module, packed, gather_columns=True)
        assert sum(isinstance(m, ColumnConv2d) for m in small.modules()) == 2
        images = next(iter(foreign.digits()))[0]
        with torch.no_grad():
            torch.testing.assert_close(small(images), module.eval()(images), atol=1e-5, rtol=1e-4)


def test_a_convolution_by_columns() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, (3, 2), stride=2, padding=1, dilation=(1, 2))
    with torch.no_grad():
        conv.weight.mul_(prune_mask(conv.weight, "column", 0.7))
    x = torch.randn(2, 6, 11, 9)
    by_columns = ColumnConv2d(conv)
    assert by_columns.weight.shape == (10, 36 - removed(0.7, 36))
    torch.testing.assert_close(by_columns(x), conv(x))
    with pytest.raises(ValueError, match="one group"):
        ColumnConv2d(nn.Conv2d(4, 4, 3, groups=2))


@pytest.mark.parametrize(
    ("changes", "levels"),
    [({}, 4), ({"shared_zero": True}, 3), ({"weight_bits": None, "levels": "binary"}, 1),
     ({"weight_bits": None, "levels": "ternary"}, 1), ({"step_search": "scan"}, 4)],
)  # fmt: skip
def test_quantised_weights_have_their_levels(changes: dict[str, Any], levels: int, tmp_path: Path) -> None:
    """... from the final phase on, through steps with momentum and weight decay; zeros are those of the masks."""
    module, method = run(tmp_path, 9, **{**QUANT, **changes})
    assert method.is_quantised
    for name, weight in weights(module).items():
        zeros = int((weight == 0).sum())
        assert zeros == removed(0.5, weight.numel()) or (
            zeros > weight.numel() // 2 and changes.get("levels") == "ternary"
        )
        codes = weight / method.steps[name]
        torch.testing.assert_close(codes, codes.round(), atol=1e-5, rtol=0)
        assert codes.abs().max() <= levels + 1e-5
        mask = method.masks[f"{name}.weight"]
        assert (weight[~mask] == 0).all()
    check_stored(module, tmp_path / "admm_nn.gaps")
    rows = {row.name: row for row in Account.load(tmp_path).after.rows}
    assert rows["net.blocks.0.conv1"].bits == {"binary": 1, "ternary": 2}.get(changes.get("levels", ""), 3)
    packed = load_gaps(tmp_path / "admm_nn.gaps")
    assert rows["net.blocks.0.conv1"].bytes == packed["net.blocks.0.conv1"].nbytes


def test_partial_rounds_hold_what_is_snapped(tmp_path: Path) -> None:
    """Shares rise as promised; a snapped weight never moves again, the others do; the step stays."""
    seen: list[tuple[Tensor, Tensor, float]] = []

    class Diary(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if method.held:
                name = "net.blocks.0.conv1"
                weight = pl_module.net.blocks[0].conv1.weight.detach().clone()
                seen.append((method.held[name].clone(), weight, method.steps[name]))

    method = ADMMNN(None, weight_bits=4, quant_epochs=2, quant_rounds=3, partial_epochs=2, every_n_epochs=1, rho=0.03)
    foreign.fit(foreign.made(), tmp_path, method, Diary(), max_epochs=10, gradient_clip_val=1.0)
    shares = [float(held.float().mean()) for held, _, _ in seen]
    assert shares[0] == shares[1] >= 0.3
    assert shares[2] >= 0.51
    assert shares[4] >= 0.657
    assert shares[6] == shares[7] == 1
    for (held, weight, step), (later, other, same) in pairwise(seen):
        assert torch.equal(weight[held], other[held])
        assert step == same
        if not later.all():
            assert (weight != other)[~later].float().mean() > 0.5


def test_resumed_in_every_stage_equals_uninterrupted(tmp_path: Path) -> None:
    whole = foreign.made()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    foreign.fit(whole, tmp_path, ADMMNN(**QUANT), keep, max_epochs=8)
    for epoch in (0, 2, 3, 5, 6):
        again = foreign.made()
        foreign.fit(again, tmp_path, ADMMNN(**QUANT), max_epochs=8, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        foreign.assert_same(again, whole)


def test_channels_that_go_while_weights_are_held(tmp_path: Path) -> None:
    arguments = {"sparsity": None, "weight_bits": 4, "quant_epochs": 1, "quant_rounds": 2, "partial_epochs": 2}
    module, method = run(tmp_path, 6, None, L1Norm(0.5, start_epoch=2), **arguments)
    assert foreign.widths(module)["net.blocks.0.conv1"] == 6
    for name, weight in weights(module).items():
        codes = weight / method.steps[name]
        torch.testing.assert_close(codes, codes.round(), atol=1e-5, rtol=0)
        assert method.held[name].shape == weight.shape
        assert torch.equal(decode_gaps(load_gaps(tmp_path / "admm_nn.gaps")[name]), weight)


def test_learning_rates_restart(tmp_path: Path) -> None:
    found: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                found.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = foreign.made()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    arguments = {"start_epoch": 1, "prune_epochs": 6, "retrain_epochs": 4, "every_n_epochs": 3, "weight_bits": 4,
                 "quant_epochs": 3, "quant_rounds": 1, "partial_epochs": 1, "lr_restart": True}  # fmt: skip
    run(tmp_path, 16, module, Rates(), **arguments)
    period = [0.1, 0.01, 0.001]
    assert found == pytest.approx([0.1, *period, *period, 0.1, 0.1, 0.1, 0.01, *period, 0.01, 0.01])
    with pytest.raises(MisconfigurationException, match="lr_restart=True"):
        run(tmp_path, 4, **{**SHORT, "lr_restart": True})


def test_a_strength_of_its_own_for_levels(tmp_path: Path) -> None:
    seen: list[float] = []

    class Diary(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(method.splits.rho)

    method = ADMMNN(**{**QUANT, "quant_rho": 0.5})
    foreign.fit(foreign.made(), tmp_path, method, Diary(), max_epochs=8)
    assert seen[:2] == [0.03, pytest.approx(0.039)]
    assert seen[3:5] == [0.5, pytest.approx(0.65)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": None}, "sparsity=None, weight_bits=None"),
        ({"sparsity": [0.5, 1.5]}, r"sparsity: 1\.5"),
        ({"sparsity": [0.9, 0.5], "prune_epochs": 1}, "'net.stem' would get weights back"),
        ({"structure": "rows"}, "structure='rows'"),
        ({"levels": "octal"}, "levels='octal'"),
        ({"weight_bits": 1}, "weight_bits=1.*2 to 16"),
        ({"weight_bits": 4, "levels": "binary"}, "levels='binary' take 1 bits"),
        (
            {"weight_bits": {"nothing": 4}, "prune_epochs": 1, "quant_epochs": 1, "quant_rounds": 0},
            "weight_bits: 'nothing'",
        ),
        ({"partial_fraction": 0.0}, r"partial_fraction=0\.0"),
        ({"retrain_epochs": 9, "weight_bits": 4}, r"retrain_epochs=9\): phase 'quantisation'"),
        ({"include": ["net.head"], "structure": "filter"}, "finds no layer"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        run(tmp_path, 4, **{**SHORT, **arguments})


# ---- learning


def three_layers() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, width in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def test_weights_reach_their_sets_and_accuracy_stays(tmp_path: Path) -> None:
    """rho .06 x 1.3, eight periods: residual at most .04; then half of the weights cost half a point."""
    scores: list[float] = []
    residuals: list[float] = []

    class Diary(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            residuals.append(float(trainer.callback_metrics.get("train/admm_nn/residual", 1)))

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            scores.append(float(trainer.callback_metrics["val_acc"]))

    module = foreign.made(three_layers)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)  # type: ignore
    method = ADMMNN(0.5, start_epoch=6, prune_epochs=24, every_n_epochs=3, rho=0.06)
    trainer = foreign.make_trainer(tmp_path, method, Diary(), max_epochs=34)
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits(1200, batch_size=64), foreign.digits(597, 1200, batch_size=597))
    assert residuals[29] <= 0.04
    assert scores[30] >= max(scores[:6]) - 0.005  # right after the first epoch with zeros
