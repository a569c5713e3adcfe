"""PCNN: the shapes that are distilled, every closed form, the storage, and the callback."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_compress import profile
from lightning_compress.callbacks import PCNN, L1Norm
from lightning_compress.callbacks.sparsity.pcnn import SPMConv2d, compression, distil, to_spm_model
from lightning_compress.catalog import Row, card
from lightning_compress.cli.configs import find_config
from lightning_compress.core.report import Account
from lightning_compress.core.select import match
from lightning_compress.core.sparse.formats import decode_spm, encode_spm, load_spm
from lightning_compress.core.sparse.patterns import (
    all_patterns,
    kept_energy,
    kernel_mask,
    largest,
    library_of,
    project_patterns,
    taps_of,
)
from lightning_compress.networks import build
from lightning_compress.ops.pattern_conv2d import PatternConv2d

SHORT: dict[str, Any] = {"num_patterns": 8, "start_epoch": 1, "end_epoch": 4, "every_n_epochs": 1, "rho": 0.03}
WAYS = ("votes", "energy", "greedy")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- shapes


@pytest.mark.parametrize(("n", "count"), [(1, 9), (2, 36), (3, 84), (4, 126)])
def test_candidates_and_widths_of_codes(n: int, count: int) -> None:
    assert len(all_patterns(n)) == count
    weight = normal(n, 16, 16, 3, 3)
    for size in (1, 3, 8, 16, 200):
        for how in WAYS:
            library = distil(weight, n, size, how)  # type: ignore[arg-type]
            assert len(library) == min(size, count)
            mask = kernel_mask(weight, library)
            assert (mask.flatten(2).sum(-1) == n).all()
            packed = encode_spm(weight, mask)
            assert len(packed.table) <= len(library)
            assert packed.bits == math.ceil(math.log2(len(packed.table)))
            if size == 1:
                assert packed.codes.nbytes == 0


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_all_candidates_are_pruning_by_magnitude(n: int) -> None:
    weight = normal(10 + n, 12, 8, 3, 3)
    for how in WAYS:
        projected = project_patterns(weight, distil(weight, n, 126, how))  # type: ignore[arg-type]
        kept = largest(weight.abs().flatten(0, 1).flatten(1), n).view_as(weight)
        assert torch.equal(projected, weight * kept)


@pytest.mark.parametrize(("n", "share"), [(1, 0.404), (2, 0.629), (3, 0.772), (4, 0.866)])
def test_energy_of_the_largest_of_noise(n: int, share: float) -> None:
    assert kept_energy(normal(0, 1000, 100, 3, 3), all_patterns(n)) == pytest.approx(share, abs=2e-3)


def test_kept_energy_grows_with_shapes_and_weights() -> None:
    for seed in range(2):
        weight = normal(20 + seed, 40, 50, 3, 3)
        kept = torch.tensor(
            [
                [[kept_energy(weight, distil(weight, n, size, how)) for size in (1, 2, 4, 8, 16)] for n in (1, 2, 3, 4)]  # type: ignore[arg-type]
                for how in WAYS
            ]
        )
        assert (kept.diff(dim=2) >= 0).all()
        assert (kept.diff(dim=1) >= 0).all()
        votes, _, greedy = kept
        assert (greedy >= 0.99 * votes).all()
        assert (greedy[-1] > votes[-1])[1:].any()


def test_energy_of_voters_by_hand() -> None:
    """Two weak kernels outvote one strong one, whose energy is larger."""
    weight = torch.zeros(3, 1, 3, 3)
    weight.view(3, 9)[0, 7] = 5
    weight.view(3, 9)[1:, 2] = 1
    assert taps_of(distil(weight, 1, 1, "votes")).tolist() == [[2]]
    assert taps_of(distil(weight, 1, 1, "energy")).tolist() == [[7]]
    assert taps_of(distil(weight, 1, 1, "greedy")).tolist() == [[7]]
    assert taps_of(distil(weight, 1, 3, "greedy")).tolist() == [[0], [2], [7]]  # what adds nothing goes by its number


def test_greedy_adds_what_is_missing() -> None:
    """The second shape is, of all, the one that adds most to the first."""
    weight = normal(5, 20, 20, 3, 3)
    library = distil(weight, 4, 2, "greedy")
    first = distil(weight, 4, 1, "greedy")
    assert (library[:, None] == first).all(-1).any()
    candidates = all_patterns(4)
    best = max(kept_energy(weight, torch.stack([first[0], c])) for c in candidates if not torch.equal(c, first[0]))
    assert kept_energy(weight, library) == pytest.approx(best, abs=1e-9)


def test_the_example_of_one_kernel() -> None:
    kernel = torch.tensor([0.1, -0.9, 0.2, 0, 0.5, -0.4, 0.05, 0.3, 0]).view(1, 1, 3, 3)
    assert taps_of(distil(kernel, 4, 1)).tolist() == [[1, 4, 5, 7]]
    library = library_of([(0, 1, 2, 4), (1, 4, 5, 7)])
    energies = [float(project_patterns(kernel, library[i : i + 1]).square().sum()) for i in range(2)]
    assert energies == pytest.approx([1.11, 1.31])
    weight = torch.cat([kernel, torch.zeros(1, 1, 3, 3)])
    packed = encode_spm(weight, kernel_mask(weight, library))
    assert (packed.table.tolist(), packed.codes.tolist()) == ([23, 178], [1])
    assert packed.weight.tolist() == [pytest.approx([-0.9, 0.5, -0.4, 0.3]), [0, 0, 0, 0]]


# ---- counts


@pytest.mark.parametrize(
    ("n", "patterns", "fp32", "fp16", "int8"),
    [(4, 16, 2.182, 2.118, 2.0), (3, 16, 2.880, 2.769, 2.571), (2, 32, 4.174, 3.892, 3.429),
     (1, 8, 8.229, 7.579, 6.545), (1, 4, 8.471, 8.0, 7.2)],
)  # fmt: skip
def test_compression_of_arxiv_2002_04997(n: int, patterns: int, fp32: float, fp16: float, int8: float) -> None:
    for bits, rate in ((32, fp32), (16, fp16), (8, int8)):
        assert compression(n, patterns, bits) == (9 / n, pytest.approx(rate, abs=5e-4))
    assert compression(1, 8, 4)[1] == pytest.approx(5.1, abs=0.05)


@pytest.mark.parametrize(("n", "patterns"), [(4, 16), (3, 5), (2, 32), (1, 8)])
def test_files_have_the_size_of_the_formula(n: int, patterns: int) -> None:
    weight = normal(n, 33, 31, 3, 3)
    for int8, width in ((False, 32), (True, 8)):
        packed = encode_spm(weight, kernel_mask(weight, distil(weight, n, patterns)), int8=int8)
        kernels, code = 33 * 31, (patterns - 1).bit_length()
        assert packed.nbytes == math.ceil(kernels * code / 8) + kernels * n * width // 8
        rate = compression(n, patterns, width)[1]
        assert kernels * 9 * width / 8 / packed.nbytes == pytest.approx(rate, rel=1e-3)


def left(network: nn.Module, shape: tuple[int, ...], n: int | dict[str, int]) -> tuple[int, int]:
    """MACs and weights of convolutions by the closed form, where 1x1 and 7x7 stay dense."""
    macs = weights = 0
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    numbers = dict.fromkeys(names, n) if isinstance(n, int) else {}
    for glob, number in n.items() if isinstance(n, dict) else ():
        numbers.update(dict.fromkeys(match(names, [glob], "n"), number))
    for layer in profile(network, shape).layers:
        if layer.kind == "conv":
            weight = network.get_submodule(layer.name).weight.numel()
            kept = weight * numbers[layer.name] // 9 if layer.name in numbers else weight
            macs, weights = macs + layer.macs * kept // weight, weights + kept
    return macs, weights


@pytest.mark.parametrize("row", card("pcnn").published, ids=lambda row: f"{row.network}-{row.data}-{row.setting}")
def test_recipes_leave_what_their_rows_say(row: Row) -> None:
    config = yaml.safe_load(find_config(row.config).read_text())
    method, model = config["trainer"]["callbacks"][0]["init_args"], config["model"]["init_args"]
    PCNN(**method)
    with torch.device("meta"):
        network = build(model["network"])
    assert left(network, (1, *model.get("input_shape", (3, 32, 32))), method["n"]) == (
        row.result["macs"],
        row.result["params"],
    )


def test_resnet18_for_small_images() -> None:
    """arXiv:2002.04997 on CIFAR-10: 10,987,200 weights of 3x3 and 172,032 of 1x1; n=4 leaves 2.2075 times fewer."""
    with torch.device("meta"):
        network = resnet18(num_classes=10)
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    total = left(network, (1, 3, 32, 32), 9)[1]
    assert total == 10_987_200 + 172_032
    assert total / left(network, (1, 3, 32, 32), 4)[1] == pytest.approx(2.2075, abs=1e-4)


# ---- the callback


def run(root: Path, epochs: int = 6, **changes: Any) -> tuple[Any, PCNN]:
    method, module = PCNN(**{**SHORT, **changes}), foreign.made()
    foreign.fit(module, root, method, max_epochs=epochs)
    return module, method


def convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize("distill", WAYS)
def test_a_fit_ends_with_n_weights_in_few_shapes(distill: str, tmp_path: Path) -> None:
    module, method = run(tmp_path, distill=distill, n={"*": 2, "*.stem": 4})
    packed = load_spm(tmp_path / "pcnn.spm")
    assert list(packed) == list(convolutions(module)) == method.layers
    for name, layer in convolutions(module).items():
        n = 4 if name == "net.stem" else 2
        assert packed[name].n == n
        assert len(packed[name].table) <= 8
        weight, mask = decode_spm(packed[name])
        assert torch.equal(weight, layer.weight)
        assert (mask.flatten(2).sum(-1) == n).all()
        assert (mask.flatten(2)[:, :, None] == method.libraries[name]).all(-1).any(-1).all()


def test_the_account_counts_n_of_nine(tmp_path: Path) -> None:
    run(tmp_path, n=3)
    account = Account.load(tmp_path)
    packed = load_spm(tmp_path / "pcnn.spm")
    for row in account.after.rows:
        if row.kind == "conv":
            assert row.effective_macs * 9 == row.macs * 3
            bias = 8 if row.name == "net.stem" else 0
            assert row.nonzeros == (row.params - bias) // 3 + bias
            assert row.bytes == packed[row.name].nbytes + 4 * bias
    assert any("Kernels keep 3 of 9 weights, in up to 8 shapes per layer: 3.00×" in note for note in account.notes)
    assert any(note.startswith("pcnn.spm: 5 layers in ") for note in account.notes)
    assert ("net.head", "no convolution") in [tuple(entry) for entry in account.left_alone]


class Diary(Callback):
    """Non-zero weights of one layer, and the library, after the start of every epoch."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.taps: list[int] = []
        self.libraries: list[Tensor | None] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            method = next(c for c in trainer.callbacks if isinstance(c, PCNN))
            library = method.libraries.get("net.blocks.0.conv1")
            self.kept.append(int(pl_module.net.blocks[0].conv1.weight.count_nonzero()))
            self.taps.append(0 if library is None else int(library[0].sum()))
            self.libraries.append(library)


def test_progressive_rounds(tmp_path: Path) -> None:
    """ADMM and retraining for 4, 2 and 1; all weights move again in the next ADMM phase; 2 is enough for the stem."""
    module, diary = foreign.made(), Diary()
    method = PCNN({"*": 1, "*.stem": 2}, 8, progressive=(4, 2, 1), start_epoch=1, end_epoch=11, every_n_epochs=1)
    assert [phase.start for phase in method.timeline()] == [1, 3, 5, 7, 9, 11]
    foreign.fit(module, tmp_path, diary, method, max_epochs=12)
    assert diary.taps == [0, 4, 4, 4, 4, 2, 2, 2, 2, 1, 1, 1]
    kernels = 12 * 8
    assert diary.kept[0] == diary.kept[1] == 9 * kernels
    assert diary.kept[3:5] == [4 * kernels] * 2
    assert diary.kept[6] > 4 * kernels  # free again
    assert diary.kept[7:9] == [2 * kernels] * 2
    assert diary.kept[11] == kernels
    assert {name: int(m.weight.count_nonzero()) for name, m in convolutions(module).items()} == {
        name: m.weight.numel() // 9 * (2 if name == "net.stem" else 1) for name, m in convolutions(module).items()
    }


def test_shapes_are_those_of_the_weights_before_admm(tmp_path: Path) -> None:
    """... and stay through updates, whose targets W + U are others."""
    module, diary = foreign.made(), Diary()
    expected = distil(module.net.blocks[0].conv1.weight, 4, 8)
    foreign.fit(module, tmp_path, diary, PCNN(**{**SHORT, "start_epoch": 0}), max_epochs=6)
    assert all(torch.equal(library, expected) for library in diary.libraries)  # type: ignore[arg-type]


def test_resumed_in_every_phase_equals_uninterrupted(tmp_path: Path) -> None:
    arguments = {**SHORT, "n": 2, "progressive": [3, 2], "start_epoch": 0, "end_epoch": 6}
    whole = foreign.made()
    foreign.fit(whole, tmp_path, PCNN(**arguments), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=7)
    for epoch in (0, 2, 4):
        again = foreign.made()
        foreign.fit(again, tmp_path, PCNN(**arguments), max_epochs=7, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        foreign.assert_same(again, whole)


def test_eight_bits_and_globs_of_numbers_of_shapes(tmp_path: Path) -> None:
    module, method = run(tmp_path, int8=True, n={"*blocks*": 1}, num_patterns={"*conv2": 4})
    packed = load_spm(tmp_path / "pcnn.spm")
    assert "net.stem" not in packed
    assert method.left_alone["net.stem"] == "no glob of n matches it"
    for name, layer in packed.items():
        assert layer.weight.dtype == torch.int8
        difference = (decode_spm(layer)[0] - module.get_submodule(name).weight).abs().max()
        assert 0 < difference <= layer.scale / 2 + 1e-6
        assert len(method.libraries[name]) == (4 if name.endswith("conv2") else 9)
    assert any("(SPM, weights rounded to 8 bits)" in note for note in Account.load(tmp_path).notes)


def test_pictures_of_layers_with_different_numbers(tmp_path: Path) -> None:
    method = PCNN({"*": 2, "*.stem": 4}, end_epoch=1)
    foreign.make_trainer(tmp_path, method, max_epochs=2).fit(foreign.made(), foreign.digits())
    assert {"pcnn_library.png", "pcnn_library_by_layer.png"} <= {path.name for path in tmp_path.iterdir()}


def test_channels_that_go_after_the_hard_step(tmp_path: Path) -> None:
    module = foreign.made()
    foreign.fit(module, tmp_path, PCNN(**{**SHORT, "end_epoch": 2}), L1Norm(0.5, start_epoch=3), max_epochs=5)
    for name, layer in load_spm(tmp_path / "pcnn.spm").items():
        assert torch.equal(decode_spm(layer)[0], module.get_submodule(name).weight)


def test_packed_models_compute_the_same(tmp_path: Path) -> None:
    module, _ = run(tmp_path, n=2)
    packed = load_spm(tmp_path / "pcnn.spm")
    images = next(iter(foreign.digits()))[0]
    expected = module.eval()(images)
    for mode, kind in (("packed", SPMConv2d), ("sparse", PatternConv2d)):
        small = to_spm_model(module, packed, mode=mode)  # type: ignore[arg-type]
        assert sum(isinstance(m, kind) for m in small.modules()) == 5
        with torch.inference_mode():
            torch.testing.assert_close(small(images), expected.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="mode='dense'"):
        to_spm_model(module, packed, mode="dense")  # type: ignore[arg-type]


@pytest.mark.parametrize("int8", [False, True])
def test_a_packed_layer_is_small_and_loads(int8: bool, tmp_path: Path) -> None:
    conv = nn.Conv2d(16, 32, 3, stride=2, padding=1, padding_mode="reflect", bias=True)
    layers = []
    for seed in range(2):
        weight = normal(seed, 32, 16, 3, 3)
        layers.append(SPMConv2d(encode_spm(weight, kernel_mask(weight, distil(weight, 2, 32)), int8=int8), conv))
    torch.save(layers[0].state_dict(), tmp_path / "layer.pt")
    stored = torch.load(tmp_path / "layer.pt", weights_only=True)
    tensors = [value for value in stored.values() if isinstance(value, Tensor)]
    assert sum(t.nbytes for t in tensors) == 512 * 5 / 8 + 512 * 2 * (1 if int8 else 4) + 32 * 2 + 32 * 4
    layers[1].load_state_dict(stored)
    x = normal(9, 2, 16, 9, 9)
    with torch.no_grad():
        conv.weight.copy_(decode_spm(layers[0].packed)[0])
    torch.testing.assert_close(layers[1](x), conv(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 10}, "n=10"),
        ({"n": {}}, r"n=\{\}"),
        ({"n": {"nothing": 2}}, "n: 'nothing'"),
        ({"num_patterns": 0}, "num_patterns=0"),
        ({"num_patterns": {"nothing": 2}}, "num_patterns: 'nothing'"),
        ({"distill": "norms"}, "distill='norms'"),
        ({"progressive": [4, 2]}, r"progressive=\[4, 2\], n=4"),
        ({"progressive": [12, 4]}, r"progressive=\[12, 4\]"),
        ({"progressive": [9, 8, 4]}, r"end_epoch=4\) leaves no epoch"),
        ({"start_epoch": -1}, "start_epoch=-1"),
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


@pytest.mark.parametrize(("n", "allowed"), [(4, 0.005), (2, 0.01)])
def test_accuracy_comes_back(n: int, allowed: float, tmp_path: Path) -> None:
    """After 12 epochs of ADMM and 6 of retraining, against the best epoch of the dense network before."""
    scores: list[float] = []

    class Scores(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            scores.append(float(trainer.callback_metrics["val_acc"]))

    module = foreign.made(three_layers)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)  # type: ignore
    method = PCNN(n, 8, start_epoch=8, end_epoch=20, every_n_epochs=3, rho=0.03)
    trainer = foreign.make_trainer(tmp_path, method, Scores(), max_epochs=26)
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits(1200, batch_size=64), foreign.digits(597, 1200, batch_size=597))
    assert max(scores[:8]) > 0.95
    assert scores[-1] >= max(scores[:8]) - allowed
