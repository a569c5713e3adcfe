"""PatternPruning: the library that is extracted, its phases, its pictures, and the networks of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import Tensor, nn

from lightning_compress import profile
from lightning_compress.callbacks import PatternPruning
from lightning_compress.callbacks.sparsity.pattern_pruning import library_picture, shrink_library
from lightning_compress.callbacks.sparsity.pconv import find_rules
from lightning_compress.catalog import Row, card
from lightning_compress.cli.configs import find_config
from lightning_compress.core.report import Account
from lightning_compress.core.sparse.formats import decode_fkw, load_fkw
from lightning_compress.core.sparse.patterns import (
    NATURAL8,
    SCP4,
    all_patterns,
    best_patterns,
    count_votes,
    kept_count,
    kept_energy,
    library_of,
    most_frequent,
    taps_of,
)
from lightning_compress.networks import build, load_weights

SHORT: dict[str, Any] = {"connectivity": 2.0, "every_n_epochs": 1, "rho": 0.1}


def three_layers() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, width in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


# ---- reducing a library


def test_votes_of_all_layers_choose_and_the_lower_number_wins() -> None:
    library = all_patterns(4, centre=True)
    ids = {"a": torch.tensor([[5, 5, 9]]), "b": torch.tensor([[9], [2], [3]])}
    smaller, stays = shrink_library(ids, library, 3)
    assert torch.equal(smaller, library[[2, 5, 9]])  # 3 has as many votes as 2
    assert stays["a"].all()
    assert stays["b"].tolist() == [[True], [True], [False]]


def test_duals_of_dropped_shapes_are_forgotten(tmp_path: Path) -> None:
    """The others stay, and Z lies in the smaller library without an update of U."""
    seen: list[Any] = []

    class Look(PatternPruning):
        def shrink(self, trainer: Any, pl_module: Any, size: int) -> None:
            duals = {layer: own["pattern"].clone() for layer, own in self.splits.u.items()}
            ids, old = self.best_shapes(pl_module), self.libraries[""]
            super().shrink(trainer, pl_module, size)
            seen.append(
                (duals, ids, old, self.libraries[""], {n: u["pattern"].clone() for n, u in self.splits.u.items()})
            )

        def enter(self, trainer: Any, pl_module: Any, phase: Any) -> None:
            super().enter(trainer, pl_module, phase)
            if phase.name == "extraction 2":
                for layer, weight in self.weights(pl_module).items():
                    value = weight.detach() + self.splits.u[layer]["pattern"]
                    mask = (self.splits.z[layer]["pattern"] != 0).flatten(2)
                    assert (mask[:, :, None] == self.libraries[""]).all(-1).any(-1).all()
                    kept = self.splits.z[layer]["pattern"]
                    assert torch.equal(kept[kept != 0], value[kept != 0])
                assert self.splits.rho == self.rho

    method = Look(library_sizes=(6, 3), extract_epochs_per_phase=3, end_epoch=8, **SHORT)
    foreign.fit(foreign.made(), tmp_path, method, max_epochs=9)
    duals, ids, old, new, after = seen[0]
    dropped = 0
    for layer, before in duals.items():
        stayed = (old[ids[layer]][:, :, None] == new).all(-1).any(-1)
        assert torch.equal(after[layer][stayed], before[stayed])
        assert after[layer][~stayed].abs().sum() == 0
        assert before.abs().sum() > 0
        dropped += int((~stayed).sum())
    assert dropped > 0


def test_library_sizes_fall_and_shapes_settle(tmp_path: Path) -> None:
    sizes: list[int] = []
    changed: list[float] = []

    class Diary(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            method = next(c for c in trainer.callbacks if isinstance(c, PatternPruning))
            sizes.append(len(method.libraries.get("", ())))
            changed.append(float(trainer.callback_metrics.get("train/pattern_pruning/changed", 1)))

    module = foreign.made(three_layers)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)  # type: ignore
    method = PatternPruning(
        connectivity=1.0, start_epoch=2, extract_epochs_per_phase=6, end_epoch=26, every_n_epochs=1, rho=0.1
    )
    trainer = foreign.make_trainer(tmp_path, method, Diary(), max_epochs=27)
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits(1200, batch_size=64))
    assert sizes == [0] * 2 + [56] * 6 + [12] * 6 + [8] * 6 + [4] * 7
    assert max(changed[7], changed[13], changed[19], changed[25]) < 0.05
    assert changed[3] > 2 * changed[7]


# ---- in a fit


def check(module: nn.Module, library: Tensor, kernels: Any) -> None:
    """Exactly so many kernels are left in each layer, all of them in shapes of the library."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            kept = (layer.weight != 0).flatten(2)
            assert kept.any(-1).sum() == kernels(name, layer)
            shapes = kept[kept.any(-1)]
            assert (shapes[:, None] == library).all(-1).any(1).all()


@pytest.mark.parametrize("library", ["extract", "cheap", "natural8", [[0, 4, 5, 8], [1, 3, 4, 7]]])
def test_joint_feasibility(library: Any, tmp_path: Path) -> None:
    method = PatternPruning(library, library_sizes=(10, 5), extract_epochs_per_phase=1, end_epoch=4, **SHORT)
    module = foreign.made()
    foreign.fit(module, tmp_path, method, max_epochs=6)
    found = method.libraries[""]
    assert len(found) == {"extract": 5, "cheap": 5, "natural8": 8}.get(str(library), 2)
    if library in ("extract", "cheap"):
        assert found[:, 4].all()
    check(module, found, lambda name, m: kept_count(m.weight[:, :, 0, 0].numel(), 1.0 if name == "net.stem" else 2.0))
    packed = load_fkw(tmp_path / "pattern_pruning.fkw")
    for name, layer in packed.items():
        assert torch.equal(layer.library, found)
        assert torch.equal(decode_fkw(layer)[0], module.get_submodule(name).weight)
    notes = Account.load(tmp_path).notes
    assert f"Library of {len(found)} shapes: {taps_of(found).tolist()}." in notes


def test_the_cheap_library_is_one_vote_of_the_weights(tmp_path: Path) -> None:
    module = foreign.made()
    weights = [m.weight.detach().clone() for m in module.modules() if isinstance(m, nn.Conv2d)]
    method = PatternPruning("cheap", n_entries=3, centre=False, library_sizes=(7,), end_epoch=1, **SHORT)
    foreign.fit(module, tmp_path, method)
    candidates = all_patterns(3)
    assert torch.equal(method.libraries[""], most_frequent(candidates, count_votes(weights, candidates), 7))


def test_a_library_for_each_layer(tmp_path: Path) -> None:
    module = foreign.made()
    method = PatternPruning(
        library_sizes=(12, 4), extract_epochs_per_phase=1, shared_library=False, end_epoch=4, **SHORT
    )
    foreign.fit(module, tmp_path, method, max_epochs=5)
    assert list(method.libraries) == method.layers
    assert {len(library) for library in method.libraries.values()} == {4}
    packed = load_fkw(tmp_path / "pattern_pruning.fkw")
    for name, layer in packed.items():
        assert torch.equal(decode_fkw(layer)[0], module.get_submodule(name).weight)
    assert "A library of 4 shapes in each layer." in Account.load(tmp_path).notes


def test_blocks_share_shapes(tmp_path: Path) -> None:
    module = foreign.made()
    method = PatternPruning("natural8", pattern_block=4, end_epoch=2, **SHORT)
    foreign.fit(module, tmp_path, method, max_epochs=3)
    kept = module.net.blocks[0].conv1.weight != 0
    for rows in kept.split(4):
        assert torch.equal(rows, rows[:1].expand_as(rows))


def test_resumed_in_every_phase_equals_uninterrupted(tmp_path: Path) -> None:
    arguments = {"library_sizes": (12, 4), "extract_epochs_per_phase": 2, "end_epoch": 6, **SHORT}
    whole = foreign.made()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    foreign.fit(whole, tmp_path, PatternPruning(**arguments), keep, max_epochs=8)
    for epoch in (0, 1, 2, 4, 6):
        again = foreign.made()
        path = tmp_path / f"epoch={epoch}.ckpt"
        foreign.fit(again, tmp_path, PatternPruning(**arguments), max_epochs=8, ckpt_path=path)
        foreign.assert_same(again, whole)


def test_pictures(tmp_path: Path) -> None:
    library = library_of(SCP4)
    picture = library_picture(library, torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert picture.shape == (3, 15)
    assert picture[0, :3].tolist() == pytest.approx([0, 0.4, 0])
    assert picture[:, 3].isnan().all()
    candidates = library_picture(all_patterns(4, centre=True), torch.ones(56))
    assert candidates.shape == (19, 47)  # five rows of twelve, the last one not full
    assert candidates.nansum() == 4 * 56
    assert torch.equal(candidates[4:7, :3].flatten().bool(), all_patterns(4, centre=True)[12])
    module = foreign.made()
    method = PatternPruning(library_sizes=(12, 4), extract_epochs_per_phase=1, end_epoch=3, **SHORT)
    trainer = foreign.make_trainer(tmp_path, method, max_epochs=4)
    trainer.fit(module, foreign.digits())
    names = {
        f"pattern_pruning_{n}{by}.png" for n in ("votes_on_56", "votes_on_12", "library") for by in ("", "_by_layer")
    }
    assert names <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"library": "natural9"}, "library='natural9'"),
        ({"n_entries": 10}, "n_entries=10"),
        ({"library_sizes": ()}, r"library_sizes=\[\]"),
        ({"include": ["net.head"], "library": "cheap", "end_epoch": 2}, "no 3x3 convolution in Foreign"),
        ({"library_sizes": (4, 8)}, r"library_sizes=\[4, 8\]"),
        ({"extract_epochs_per_phase": 0}, "extract_epochs_per_phase=0"),
        ({"extract_epochs_per_phase": 1, "end_epoch": 3}, r"end_epoch=3\) leaves no epoch"),
        ({"extract_epochs_per_phase": 2, "end_epoch": 7}, r"extract_epochs_per_phase=2\): phase 'extraction 3'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        foreign.fit(foreign.made(), tmp_path, PatternPruning(**arguments), max_epochs=4)


def test_right_after_the_hard_step_and_six_epochs_later(tmp_path: Path) -> None:
    """On digits, patterns alone: at most 20 points below the dense network, then at most 1."""
    scores: list[float] = []
    held_out = next(iter(foreign.digits(597, 1200, batch_size=597)))

    class Scores(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                pl_module.eval()
                with torch.no_grad():
                    scores.append(float((pl_module(held_out[0]).argmax(1) == held_out[1]).float().mean()))
                pl_module.train()

    module = foreign.made(three_layers)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)  # type: ignore
    method = PatternPruning("cheap", library_sizes=(8,), connectivity=1.0, start_epoch=6, end_epoch=18,
                            every_n_epochs=3, rho=0.1, rho_growth=1.0)  # fmt: skip
    trainer = foreign.make_trainer(tmp_path, method, Scores(), max_epochs=25)
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits(1200, batch_size=64))
    dense = max(scores[:7])
    assert scores[18] > dense - 0.2
    assert scores[24] > dense - 0.01


# ---- networks of the paper


@pytest.mark.parametrize("row", card("pattern_pruning").published, ids=lambda row: f"{row.network}-{row.setting}")
def test_recipes_leave_what_their_rows_say(row: Row) -> None:
    config = yaml.safe_load(find_config(row.config).read_text())
    method, model = config["trainer"]["callbacks"][0]["init_args"], config["model"]["init_args"]
    with torch.device("meta"):
        network = build(model["network"])
    layers = profile(network, (1, *model.get("input_shape", (3, 32, 32)))).layers
    names = [layer.name for layer in layers if layer.kind in ("conv", "linear")]
    rules, _ = find_rules(network, names, method["connectivity"])
    kept = macs = 0
    for layer in layers:
        if layer.kind == "conv":
            weight = network.get_submodule(layer.name).weight
            rule = rules.get(layer.name)
            count = kept_count(weight[:, :, 0, 0].numel(), rule.connectivity) if rule else 0
            own = count * (4 if rule.patterns else 1) if rule else weight.numel()
            kept, macs = kept + own, macs + layer.macs * own // weight.numel()
    assert (macs, kept) == (row.result["macs"], row.result["params"])


def trained(name: str) -> list[Tensor]:
    """The 3x3 kernels of a public network."""
    folder = real_data(f"weights/{name}-cifar10.pt")
    network = build(name)
    load_weights(network, folder / "weights" / f"{name}-cifar10.pt")
    return [m.weight.detach() for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "kernels"), [("resnet20", 29_744), ("resnet56", 94_256)])
def test_votes_of_public_networks(name: str, kernels: int) -> None:
    """Without the centre rule exactly the eight shapes that public implementations print, with it corners and L's."""
    weights = trained(name)
    assert sum(w[:, :, 0, 0].numel() for w in weights) == kernels

    def voted(centre: bool) -> set[tuple[int, ...]]:
        candidates = all_patterns(4, centre=centre)
        return {tuple(t) for t in taps_of(most_frequent(candidates, count_votes(weights, candidates), 8)).tolist()}

    assert voted(False) == set(NATURAL8)
    assert voted(True) == {
        (4, 6, 7, 8), (0, 1, 2, 4), (4, 5, 7, 8), (3, 4, 6, 7), (1, 2, 4, 5), (0, 1, 3, 4), (2, 4, 5, 8), (0, 3, 4, 6)
    }  # fmt: skip


@pytest.mark.real_data
def test_kept_energy_of_the_public_resnet56() -> None:
    weights = trained("resnet56")
    whole = torch.cat([w.flatten(0, 1)[None] for w in weights], 1)  # (1, kernels, 3, 3)
    centred = all_patterns(4, centre=True)
    votes = count_votes([whole], centred)
    libraries = [all_patterns(4), centred, library_of(NATURAL8)]
    libraries += [most_frequent(centred, votes, size) for size in (12, 8, 4)] + [library_of(SCP4)]
    kept = [kept_energy(whole, library) for library in libraries]
    assert kept == pytest.approx([0.843, 0.806, 0.736, 0.748, 0.727, 0.680, 0.550], abs=6e-4)
    generator = torch.Generator().manual_seed(0)
    for candidates, own in ((all_patterns(4), kept[2]), (centred, kept[4])):
        random = [candidates[torch.randperm(len(candidates), generator=generator)[:8]] for _ in range(20)]
        assert max(kept_energy(whole, library) for library in random) < own


def test_ids_are_those_of_the_lexicographic_order() -> None:
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    assert best_patterns(weight, all_patterns(4, centre=True)).item() == 0
