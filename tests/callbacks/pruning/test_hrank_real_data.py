"""HRank on the public ResNet-56 and CIFAR-10: low ranks are the ones to lose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer
from real_data import real_data
from scipy.stats import spearmanr
from torch import Tensor

from lightning_compress.callbacks import HRank, RandomChannels
from lightning_compress.callbacks.pruning.hrank.callback import collect_ranks
from lightning_compress.core.surgery import ChannelGraph, channel_graph
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier

WEIGHTS = "weights/resnet56-cifar10.pt"
IMAGES = int(os.environ.get("LC_TEST_IMAGES", "500"))  # 10,000 is the whole test set

pytestmark = pytest.mark.real_data


class WrongWayRound(HRank):
    """Keeps the low ranks."""

    def scores(self, trainer: Trainer, pl_module: LightningModule, graph: ChannelGraph) -> dict[str, Tensor]:
        return {name: -ranks for name, ranks in super().scores(trainer, pl_module, graph).items()}


def setup(**kwargs) -> tuple[Trainer, ImageClassifier, CIFAR10]:
    root = real_data("cifar10.npz", WEIGHTS)
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, limit_test_batches=IMAGES // 250, **kwargs)  # fmt: skip
    data = CIFAR10(root, batch_size=128, eval_batch_size=250, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return trainer, ImageClassifier("resnet56", weights=str(root / WEIGHTS)), data


def accuracy(callback: HRank | RandomChannels, folder: Path) -> float:
    trainer, module, data = setup(callbacks=[callback], default_root_dir=folder)
    trainer.fit(module, data)
    return trainer.test(module, data, verbose=False)[0]["test/acc"]


def test_accuracy_before_fine_tuning_falls_with_the_rank_that_is_lost(tmp_path: Path) -> None:
    """0.4 of the first convolution of every block."""
    ratio = "[0.0]*3+[0.4]*27"
    inner = {"*.conv1": 0.4, "network.conv1": 0.0}
    lowest = accuracy(HRank(ratio, num_batches=1), tmp_path)
    random = sum(accuracy(RandomChannels(inner, seed=s), tmp_path) for s in range(2)) / 2
    highest = accuracy(WrongWayRound(ratio, num_batches=1), tmp_path)
    print(f"lowest {lowest:.4f} random {random:.4f} highest {highest:.4f}")
    assert lowest > random > highest


def test_ranks_hardly_depend_on_the_images() -> None:
    """Two sets of images order the filters alike: Spearman above 0.9.

    But for layers where almost every map has full rank: there is nothing to order there. With these weights they are
    the sums of blocks 6 to 8 of stage 1, whose mean ranks differ by 0.03.
    """
    trainer, module, data = setup()
    data.prepare_data()
    data.setup("fit")
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=data)
    trainer.state.fn = "fit"
    graph = channel_graph(module, module.example_input_array)
    every = list(graph.layers)
    halves = []
    for seed in (0, 1):
        data.seed = seed
        data.setup("fit")
        halves.append(collect_ranks(trainer, module, every, 6, 128))
    full = {"1": 32, "2": 16, "3": 8}
    ordered = [
        n
        for n in every
        if (halves[0].mean(n) < full.get(n.removeprefix("network.layer")[0], 32) - 0.05).float().mean() > 0.1
    ]
    assert len(ordered) >= 52
    correlations = {n: spearmanr(halves[0].mean(n), halves[1].mean(n)).statistic for n in ordered}
    print(f"lowest Spearman {min(correlations.values()):.4f} of {len(ordered)} layers out of {len(every)}")
    assert min(correlations.values()) > 0.9, min(correlations, key=lambda n: correlations[n])
