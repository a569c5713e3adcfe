"""Magnitude pruning: which weights go, when, and that they stay away."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import Foreign, fit, made
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import nn

from lightning_compress.callbacks import L1Norm, MagnitudePruning
from lightning_compress.callbacks.sparsity.magnitude_pruning import layer_masks, magnitude, network_masks
from lightning_compress.core.report import Account
from lightning_compress.core.sparse.nm import is_nm
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier

LAYERS = [
    "net.stem",
    "net.blocks.0.conv1",
    "net.blocks.0.conv2",
    "net.blocks.1.conv1",
    "net.blocks.1.conv2",
    "net.head",
]


def zeros(module):
    return {n: (module.get_submodule(n).weight == 0).float().mean().item() for n in LAYERS}


def weights(module):
    return torch.cat([module.get_submodule(n).weight.detach().flatten() for n in LAYERS])


class Steps(Callback):
    """Notes the share of zeros after every step, and what the optimiser pushes masked weights with."""

    def __init__(self):
        self.zeros = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.zeros.append(round((weights(pl_module) == 0).float().mean().item(), 3))


def test_one_ranking_or_one_per_layer():
    sizes = {"a": torch.tensor([[0.1, 0.2], [0.3, 0.4]]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    both = network_masks(sizes, 0.5)
    assert (both["a"].tolist(), both["b"].tolist()) == ([[False] * 2] * 2, [True] * 4)
    each = layer_masks(sizes, {"a": 0.25, "b": 0.5})
    assert (each["a"].tolist(), each["b"].tolist()) == ([[False, True], [True, True]], [False, False, True, True])


def test_of_equal_weights_the_first_go():
    assert network_masks({"a": torch.ones(4), "b": torch.ones(2)}, 0.5)["a"].tolist() == [False, False, False, True]


def test_what_is_gone_ranks_below_zero():
    size = magnitude(torch.tensor([0.0, -2.0, 1.0]), torch.tensor([True, False, True]))
    assert size.tolist() == [0, -1, 1]


def test_the_smallest_weights_of_the_network_go_and_stay_away(tmp_path):
    module, steps = made(), Steps()
    before = weights(module)
    fit(module, tmp_path, MagnitudePruning(0.8), steps, max_epochs=2)
    kept = weights(module) != 0
    assert set(steps.zeros) == {0.8}
    assert before[~kept].abs().max() <= before[kept].abs().min()
    assert zeros(module)["net.blocks.0.conv1"] > zeros(module)["net.stem"] + 0.2  # its weights are larger
    assert module.net.stem.bias.count_nonzero() == 8
    account = Account.load(tmp_path)
    assert account.after.nonzeros < 0.4 * account.before.nonzeros
    assert account.after.effective_macs < account.before.effective_macs
    assert "80.0% of the weights of 6 layers are zero" in account.notes[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sparsity": 0.5, "scope": "layer"}, [0.5] * 6),
        ({"sparsity": {"*": 0.5, "net.blocks.1.*": 0.75, "net.head": 0}}, [0.5, 0.5, 0.5, 0.75, 0.75, 0]),
        ({"sparsity": "[0.0]+[0.25]*4+[0.5]"}, [0, 0.25, 0.25, 0.25, 0.25, 0.5]),
        ({"sparsity": 0.5, "scope": "layer", "include": ["*conv*"], "exclude": ["*.1.*"]}, [0, 0.5, 0.5, 0, 0, 0]),
        ({"n": 1, "m": 4}, [0, 0.75, 0.75, 0.75, 0.75, 0.75]),  # the stem reads one channel
    ],
)
def test_how_much_each_layer_loses(tmp_path, arguments, expected):
    module = made()
    fit(module, tmp_path, MagnitudePruning(**arguments), max_epochs=1)
    assert list(zeros(module).values()) == pytest.approx(expected, abs=0.01)


def test_groups_keep_their_largest_weights(tmp_path):
    module = made()
    before = module.net.blocks[0].conv2.weight.detach().clone()
    fit(module, tmp_path, MagnitudePruning(n=2, m=4), max_epochs=0)
    weight = module.net.blocks[0].conv2.weight
    assert is_nm(weight, 2, 4)
    for group, old in zip(weight[3, :, 1, 2].split(4), before[3, :, 1, 2].split(4), strict=True):
        best = old.abs().topk(2).indices
        assert set(group.nonzero()[:, 0].tolist()) == set(best.tolist())


def test_the_sparsity_rises_and_what_is_zero_stays_zero(tmp_path):
    module, steps = made(), Steps()
    fit(module, tmp_path, MagnitudePruning(0.8, start_epoch=1, end_epoch=4), steps, max_epochs=6)
    expected = [0.8 * (1 - (1 - min(max(e - 1, 0) / 3, 1)) ** 3) for e in range(6)]
    assert steps.zeros[::4] == pytest.approx(expected, abs=1e-3)
    assert all(len(set(steps.zeros[i : i + 4])) == 1 for i in range(0, 24, 4))


def test_in_mid_fit_momentum_is_forgotten(tmp_path):
    class Momentum(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                weight = pl_module.net.blocks[0].conv1.weight
                pushed = trainer.optimizers[0].state[weight]["momentum_buffer"]
                seen.append((int((pushed == 0).sum()), int((weight == 0).sum())))

    seen = []
    fit(made(), tmp_path, MagnitudePruning(0.5, start_epoch=1, scope="layer"), Momentum(), max_epochs=2)
    assert seen == [(432, 432)]


def test_statistics_can_be_estimated_anew(tmp_path):
    def mean(batches):
        module = made()
        fit(module, tmp_path, MagnitudePruning(0.9, recalibrate_bn=batches), max_epochs=0)
        return module.net.blocks[0].bn1.running_mean

    assert mean(0).count_nonzero() == 0
    assert mean(1).count_nonzero() == 12


def test_masks_follow_channels_that_are_removed(tmp_path):
    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            masks = callback._masks
            for name in LAYERS:
                weight = pl_module.get_submodule(name).weight
                assert masks[f"{name}.weight"].shape == weight.shape or trainer.current_epoch == 0
                assert (weight[~masks[f"{name}.weight"]] == 0).all()

    callback = MagnitudePruning(0.5)
    module = made()
    fit(module, tmp_path, callback, L1Norm(0.5, start_epoch=1), Watch(), max_epochs=2)
    assert module.net.blocks[0].conv1.weight.shape == (6, 4, 3, 3)
    assert 0.2 < zeros(module)["net.blocks.0.conv1"] < 0.8


def test_under_a_parametrisation(tmp_path):
    module = made()
    nn.utils.parametrize.register_parametrization(module.net.head, "weight", nn.Identity())
    nn.utils.parametrizations.weight_norm(module.net.stem)
    callback = MagnitudePruning(0.5, scope="layer")
    fit(module, tmp_path, callback, max_epochs=1)
    assert (module.net.head.weight == 0).sum() == 40
    assert callback._left_alone == {
        "net.stem": "has a weight that is put together from several tensors, as by weight_norm"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2}, r"n=2, m=None\): give both or neither"),
        ({"n": 4, "m": 4}, r"n=4, m=4\): of m weights n stay"),
        ({"n": 2, "m": 4, "end_epoch": 3}, "n:m pruning is one step"),
        ({"scope": "filter"}, "scope='filter'"),
        ({"start_epoch": 2, "end_epoch": 2}, "give a later end"),
        ({"recalibrate_bn": -1}, "recalibrate_bn=-1"),
        ({"sparsity": {"*": 1.0}}, r"sparsity: 1.0 is outside"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MagnitudePruning(**arguments)


def test_what_cannot_work_is_refused(tmp_path):
    for callbacks, message in (
        ([MagnitudePruning(start_epoch=1), EMAWeightAveraging()], "EMAWeightAveraging cannot follow"),
        ([MagnitudePruning(n=1, m=128)], "finds no layer of Foreign to prune"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            fit(made(), tmp_path, *callbacks)
    with pytest.raises(ValueError, match="sparsity: 2 entries for 6 layers"):
        fit(made(), tmp_path, MagnitudePruning([0.5, 0.5]))


def test_averages_keep_the_zeros_of_the_start(tmp_path):
    module = made()
    fit(module, tmp_path, MagnitudePruning(0.8), EMAWeightAveraging(decay=0.5), max_epochs=2)
    assert (weights(module) == 0).float().mean().item() == pytest.approx(0.8, abs=1e-3)


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path):
    fit(made(), tmp_path, ModelCheckpoint(tmp_path, "other"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="was written by a run without MagnitudePruning"):
        fit(made(), tmp_path, MagnitudePruning(), ckpt_path=tmp_path / "other.ckpt")


def test_tied_layers_are_left_alone(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.three(self.two(self.one(x.flatten(1))))

    module, callback = Foreign(Tied()), MagnitudePruning()
    dense = copy.deepcopy(module.net.one.weight)
    fit(module, tmp_path, callback, max_epochs=0)
    assert torch.equal(module.net.one.weight, dense)
    assert set(callback._left_alone.values()) == {"shares its weight with another layer"}


@pytest.mark.real_data
def test_the_public_resnet20_stands_half_of_its_weights(tmp_path):
    """... with statistics of its own; not 95 % of them, and not without these statistics."""
    weights = "weights/resnet20-cifar10.pt"
    root = real_data("cifar10.npz", weights)

    def accuracy(sparsity, batches):
        trainer = Trainer(max_epochs=0, callbacks=[MagnitudePruning(sparsity, recalibrate_bn=batches)], logger=False,
                          enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                          limit_test_batches=2, default_root_dir=tmp_path)  # fmt: skip
        data = CIFAR10(root, batch_size=128, eval_batch_size=250, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        module = ImageClassifier("resnet20", weights=str(root / weights))
        trainer.fit(module, data)
        return trainer.test(module, data, verbose=False)[0]["test/acc"]

    half, without = accuracy(0.5, 2), accuracy(0.8, 0)
    eighty = accuracy(0.8, 2)
    print(f"half {half:.3f}, 80 % {eighty:.3f}, without statistics {without:.3f}")
    assert half > 0.9
    assert eighty > without + 0.05
