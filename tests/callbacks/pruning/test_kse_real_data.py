"""KSE on the public ResNet-56: how its channels are graded, what that costs, and what accuracy it leaves."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import foreign
import pytest
import torch
from real_data import real_data
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.callbacks import KSE
from lightning_compress.core.profile import profile
from lightning_compress.core.sparse.shared_kernels import SharedKernels
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier
from lightning_compress.networks import resnet56
from lightning_compress.networks.find import load_weights

WEIGHTS = "weights/resnet56-cifar10.pt"

pytestmark = pytest.mark.real_data


@cache
def weights() -> dict[str, torch.Tensor]:
    """Of the 54 convolutions inside blocks."""
    network = resnet56()
    load_weights(network, real_data(WEIGHTS) / WEIGHTS)
    return {n: p.detach() for n, p in network.named_parameters() if n.startswith("layer") and p.ndim == 4}


def forms(**arguments) -> dict[str, SharedKernels]:
    method = KSE(**arguments)
    return {name: SharedKernels(*method.levels(weight)) for name, weight in weights().items()}


@pytest.mark.parametrize(
    ("axis", "levels", "expected"),
    [
        ("official", 4, [114, 224, 787, 843]),
        ("official", 5, [102, 86, 348, 860, 572]),
        ("official", 6, [94, 47, 197, 387, 830, 413]),
        ("paper", 4, [116, 195, 738, 919]),
        ("paper", 5, [98, 97, 312, 855, 606]),
    ],
)
def test_channels_on_each_level(axis: str, levels: int, expected: list[int]) -> None:
    counted = Counter(level for form in forms(G=levels, entropy_axis=axis).values() for level in form.levels)
    assert [counted[level] for level in range(levels)] == expected


@pytest.mark.parametrize(
    ("levels", "shift", "params", "million_macs"),
    [(4, 0, 574_054, 79.62), (4, 1, 477_088, 65.47), (5, 0, 488_032, 67.99), (5, 1, 372_445, 51.84),
     (6, 0, 421_027, 59.37), (7, 0, 368_944, 52.14)],
)  # fmt: skip
def test_size_by_the_official_axis(levels: int, shift: int, params: int, million_macs: float) -> None:
    """Code G = 6 with its index words is the 0.43M of the paper's table, at 59.4M MACs."""
    dense = profile(resnet56(), (1, 3, 32, 32))
    total, macs, words = dense.params, dense.macs, 0.0
    by_name = {layer.name: layer.macs for layer in dense.layers}
    for name, form in forms(G=levels, T=shift, entropy_axis="official").items():
        every = form.outputs * len(form.levels)
        total -= 9 * (every - form.kernels)
        macs -= by_name[name.removesuffix(".weight")] * (every - form.kernels) // every
        words += form.index_bits / 32
    print(f"G={levels} T={shift}: {total} parameters, {macs} MACs, {total + words:.0f} with indices")
    assert total == params
    assert round(macs / 1e6, 2) == million_macs
    if levels in (6, 7) and shift == 0:
        assert round(total + words) == {6: 430_232, 7: 378_250}[levels]


@cache
def images() -> list[torch.Tensor]:
    """The first 250 test images, and their labels."""
    root = real_data("cifar10.npz", WEIGHTS)
    data = CIFAR10(root, eval_batch_size=250, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    data.setup("test")
    return next(iter(data.test_dataloader()))


def accuracy(folder: Path, method: KSE) -> float:
    x, y = images()
    module = ImageClassifier("resnet56", weights=str(real_data(WEIGHTS) / WEIGHTS))
    with foreign.no_pictures:
        foreign.make_trainer(folder, method, max_epochs=0).fit(module, DataLoader(TensorDataset(x, y)))
    with torch.no_grad():
        return (module.eval()(x).argmax(1) == y).float().mean().item()


def test_accuracy_before_fine_tuning_falls_with_the_levels(tmp_path: Path) -> None:
    """Of 93.4 % that the dense network has on all images."""
    few, more, many = (accuracy(tmp_path, KSE(G=levels)) for levels in (4, 6, 8))
    print(f"G = 4, 6, 8: {few:.4f}, {more:.4f}, {many:.4f}")
    assert few > 0.8
    assert few > more + 0.1
    assert more > many + 0.2
    assert many > 0.1
