"""Lottery Jackpots: every number of the mathematics, the published lists, the callback, and the file of bits."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from foreign import Foreign, digits, fit, made, make_trainer, no_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchvision.models import resnet50

from lightning_compress import load, profile
from lightning_compress.callbacks import L1Norm, LotteryJackpots, MagnitudePruning
from lightning_compress.callbacks.sparsity.lottery_jackpots import (
    JackpotMask,
    load_jackpot,
    pruned_counts,
    save_jackpot,
    swap,
)
from lightning_compress.callbacks.sparsity.lottery_jackpots.lots import RESTRICTIONS, draw_lots, lots_in
from lightning_compress.catalog import card
from lightning_compress.core.sparse.layers import weight_layers
from lightning_compress.core.sparse.select_weights import drop_lowest
from lightning_compress.networks import CIFARResNet, vgg19_cifar

WEIGHT = torch.tensor([0.1, -0.9, 0.3, -0.2, 0.8, 0.05, -0.7, 0.4, 0.6, -0.5])
MASK = torch.tensor([0, 1, 0, 0, 1, 0, 1, 0, 1, 0]).bool()
SCORES = torch.tensor([1.10, 0.80, 0.985, 1.30, 1.00, 0.97, 0.70, 1.02, 1.01, 0.95])


def bits(mask):
    return mask.int().tolist()


# ---- masks


def test_the_first_mask_is_by_magnitude():
    assert pruned_counts({"w": WEIGHT.abs()}, 0.6, "uniform") == {"w": 6}
    assert pruned_counts({"w": WEIGHT.abs()}, 0.6, "l1") == {"w": 6}
    lots = JackpotMask(WEIGHT)
    lots.start(drop_lowest(WEIGHT.abs(), 6), 0.99, 1.0)
    assert torch.equal(lots.mask, MASK)
    torch.testing.assert_close(lots.score.detach(), torch.where(MASK, 1.0, 0.99))


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (1.0, [1, 0, 0, 1, 0, 0, 0, 1, 1, 0]),
        (0.5, [1, 0, 0, 1, 1, 0, 0, 0, 1, 0]),
        (0.3, [0, 1, 0, 1, 1, 0, 0, 0, 1, 0]),
        (0.0, MASK.int().tolist()),
    ],
)
def test_swaps(rate, expected):
    assert bits(swap(SCORES, MASK, rate)) == expected


def test_a_tie_at_the_threshold_does_not_stop_the_swap():
    scores = torch.tensor([1.1, 0.8, 0.9, 1.3, 1.0, 0.9, 0.7, 1.0, 1.0, 0.95])
    assert bits(swap(scores, MASK)) == [1, 0, 0, 1, 0, 0, 0, 1, 1, 0]


def test_the_number_of_weights_never_changes():
    generator = torch.Generator().manual_seed(0)
    mask, scores = torch.rand(40, 25, generator=generator) > 0.8, torch.ones(40, 25)
    count = mask.sum()
    for step in range(1000):
        scores = scores + 0.01 * torch.randn(scores.shape, generator=generator)
        if step % 2:
            scores = scores.mul(50).round().div(50)  # tied
        mask = swap(scores, mask, rate=(step % 11) / 10)
        assert mask.sum() == count


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30),
    seed=st.integers(0, 99), rate=st.floats(0, 1),
)  # fmt: skip
def test_swaps_are_those_of_a_sorted_list(values, seed, rate):
    scores = torch.tensor(values)
    mask = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) > 0.5
    order = scores.sort(stable=True).indices.tolist()
    wanted = set(order[len(values) - int(mask.sum()) :])
    enter = [i for i in reversed(order) if i in wanted and not mask[i]]
    leave = [i for i in order if i not in wanted and mask[i]]
    assert len(enter) == len(leave)
    count = math.ceil(round(rate * len(enter), 9))
    expected = {i for i in range(len(values)) if mask[i]} - set(leave[:count]) | set(enter[:count])
    assert set(swap(scores, mask, rate).nonzero()[:, 0].tolist()) == expected


def test_without_restriction_the_highest_scores_are_in():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5000, generator=generator)
    mask = torch.rand(5000, generator=generator) > 0.9
    best = scores.topk(int(mask.sum())).indices
    assert set(swap(scores, mask).nonzero()[:, 0].tolist()) == set(best.tolist())


def test_restrictions():
    assert [RESTRICTIONS["none"](e, 30) for e in (0, 15, 29)] == [1, 1, 1]
    assert [RESTRICTIONS["poly4"](e, 30) for e in (0, 15)] == [1, 0.0625]
    assert [RESTRICTIONS["cosine"](e, 30) for e in (0, 15)] == pytest.approx([1, 0.5])


def test_gradients_reach_all_scores_and_no_weight():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, bias=False), torch.randn(2, 4, 5, 5)
    network = nn.Sequential(copy.deepcopy(conv))
    draw_lots(network, ["0"])
    lots = lots_in(network)["0"]
    lots.start(torch.rand_like(conv.weight) > 0.7, 0.99, 1.0)
    network[0].parametrizations.weight.original.requires_grad_(False)
    conv.weight.data *= lots.mask
    conv(x).square().sum().backward()
    out = network(x)
    assert torch.equal(out, conv(x))
    out.square().sum().backward()
    original = network[0].parametrizations.weight.original
    torch.testing.assert_close(lots.score.grad, conv.weight.grad * original)
    assert lots.score.grad[~lots.mask].abs().min() > 0
    assert original.grad is None


# ---- networks of the paper


def wide_resnet32():
    return CIFARResNet(32, widths=(32, 32, 64, 128))


def layers_of(network):
    return {n: m.weight for n, m in list(weight_layers(network).items())[:-1]}


@pytest.mark.parametrize(
    ("build", "layers", "weights", "kept"),
    [
        pytest.param(wide_resnet32, 31, 1_844_064, {0.9: 184_406, 0.95: 92_203}, id="LotteryJackpots-ResNet-32"),
        pytest.param(
            lambda: vgg19_cifar(last_pool="max", bias=False), 16, 20_018_880, {0.9: 2_001_887, 0.95: 1_000_944},
            id="LotteryJackpots-VGG-19",
        ),
        pytest.param(resnet50, 53, 23_454_912, {0.8: 4_690_982, 0.9: 2_345_491}, id="LotteryJackpots-ResNet-50"),
    ],
)  # fmt: skip
def test_weights_kept(build, layers, weights, kept):
    torch.manual_seed(0)
    sizes = {n: w.detach().abs() for n, w in layers_of(build()).items()}
    assert len(sizes) == layers
    assert sum(s.numel() for s in sizes.values()) == weights
    for sparsity, count in kept.items():
        assert int(weights * (1 - sparsity)) == count
        out = pruned_counts(sizes, sparsity, "l1")
        assert count <= weights - sum(out.values()) < count + 100  # equal magnitudes at the threshold stay together
        assert abs(sum(out.values()) / weights - sparsity) < 1e-5


@pytest.mark.parametrize(
    "row", card("lottery_jackpots").published, ids=lambda row: f"LotteryJackpots-{row.network}-{row.data}-{row.setting}"
)
def test_rows_of_the_catalog(row):
    classes = {"CIFAR-10": 10, "CIFAR-100": 100, "ImageNet": 1000}[row.data]
    build = {
        "VGG-19": lambda: vgg19_cifar(classes, last_pool="max", bias=False),
        "ResNet-32": lambda: CIFARResNet(32, classes, widths=(32, 32, 64, 128)),
        "ResNet-50": resnet50,
    }[row.network]
    with torch.device("meta"):
        network = build()
    masked = sum(w.numel() for w in layers_of(network).values())
    kept = int(masked * (1 - float(row.setting[:2]) / 100))
    assert sum(p.numel() for p in network.parameters()) - masked + kept == row.result["params"]


RESNET50_AT_80 = [
    6359, 2429, 12606, 6670, 8077, 6212, 12404, 5319, 7512, 17286, 5074, 15397, 52594, 21242, 29446, 13749, 35072,
    17559, 21787, 42925, 23786, 24309, 49364, 20390, 58473, 130852, 88204, 82826, 40478, 92879, 70206, 50162, 103998,
    69597, 59755, 101743, 61062, 63861, 99629, 62641, 76570, 103541, 71410, 199032, 314131, 294121, 220220, 238985,
    298187, 265006, 361242, 269102, 285501,
]  # fmt: skip


def test_the_published_list_of_resnet50():
    """Kept weights per layer of the public ResNet-50; weights of such magnitudes lead to the list again."""
    weights = layers_of(resnet50())
    assert len(RESNET50_AT_80) == len(weights) == 53
    assert sum(RESNET50_AT_80) == int(23_454_912 * (1 - 0.8)) == 4_690_982
    sizes = {
        name: torch.linspace(0, 1, w.numel()) + (0.5 - (w.numel() - kept - 0.5) / (w.numel() - 1))
        for (name, w), kept in zip(weights.items(), RESNET50_AT_80, strict=True)
    }
    counts = pruned_counts(sizes, 0.8, "l1")
    assert [sizes[n].numel() - c for n, c in counts.items()] == pytest.approx(RESNET50_AT_80, abs=3)
    shares = {n: kept / weights[n].numel() for n, kept in zip(weights, RESNET50_AT_80, strict=True)}
    assert shares["conv1"] == pytest.approx(0.676, abs=1e-3)
    last = [shares[f"layer4.{block}.conv2"] for block in range(3)]
    assert 0.10 < min(last) < max(last) < 0.135


def test_uniform_counts_are_floors():
    sizes = {"a": torch.rand(101), "b": torch.rand(55)}
    assert pruned_counts(sizes, 0.9, "uniform") == {"a": 90, "b": 49}


# ---- the callback


def masks(module):
    return {name: lots.mask.clone() for name, lots in lots_in(module).items()}


class Steps(Callback):
    """Notes the masks after every step, and whatever else is asked for."""

    def __init__(self, note=lambda trainer, pl_module: None):
        self.masks, self.notes, self.note = [], [], note

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.masks.append(masks(pl_module))
        self.notes.append(self.note(trainer, pl_module))


def test_weights_do_not_move_and_statistics_do(tmp_path):
    module = made()
    dense = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, tmp_path, LotteryJackpots(0.8), max_epochs=2)
    state = {name.replace("parametrizations.weight.original", "weight"): v for name, v in module.state_dict().items()}
    for name, value in dense.items():
        moved = not torch.equal(value, state[name])
        assert moved == ("running" in name or "num_batches" in name), name
    assert all(p.requires_grad for p in module.parameters())
    assert set(lots_in(module)) == {"net.stem", *(f"net.blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2))}
    for lots in lots_in(module).values():
        assert torch.equal(swap(lots.score, lots.mask), lots.mask)  # the highest are in


def test_the_first_step_starts_from_the_magnitude_mask(tmp_path):
    module, steps = made(), Steps()
    first = LotteryJackpots(0.8).first_masks(module, list(weight_layers(module))[:-1])
    seen = []
    module.net.stem.register_forward_pre_hook(lambda *_: seen.append(masks(module)))
    fit(module, tmp_path, LotteryJackpots(0.8), steps, max_epochs=1)
    for name, mask in first.items():
        assert torch.equal(mask, seen[0][name])
        assert all(step[name].sum() == mask.sum() for step in steps.masks)
    assert any(not torch.equal(mask, steps.masks[-1][name]) for name, mask in first.items())


def test_accumulated_batches_are_one_step(tmp_path):
    module, steps = made(), Steps()
    callback = LotteryJackpots(0.8, init_low=0.99999)
    fit(module, tmp_path, callback, steps, max_epochs=1, accumulate_grad_batches=2)
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(steps.masks)]
    assert changed == [True, False, True]


@pytest.mark.parametrize(("restriction", "swaps"), [("none", True), (lambda epoch, epochs: 0.0, False)])
def test_the_rate_restricts(tmp_path, restriction, swaps):
    module = made()
    steps = Steps()
    callback = LotteryJackpots(0.8, restriction=restriction, update_every_n_steps=2, init_low=0.99999)
    fit(module, tmp_path, callback, steps, max_epochs=1)
    first = LotteryJackpots(0.8).first_masks(made(), list(weight_layers(made()))[:-1])
    assert all(torch.equal(first[n], steps.masks[0][n]) for n in first)
    assert any(not torch.equal(first[n], steps.masks[1][n]) for n in first) == swaps


def test_options_of_the_search(tmp_path):
    module = made()
    callback = LotteryJackpots(0.8, init="random", seed=3, layerwise="uniform", freeze_bn_affine=False, init_low=0.5)
    random = callback.first_masks(module, ["net.blocks.0.conv1"])["net.blocks.0.conv1"]
    assert random.sum() == 864 - int(864 * 0.8)
    other = LotteryJackpots(0.8).first_masks(module, ["net.blocks.0.conv1"])["net.blocks.0.conv1"]
    assert not torch.equal(random, other)
    norm = module.net.bn.weight.clone()
    steps = Steps(lambda t, m: m.net.bn.weight.requires_grad and not m.net.head.weight.requires_grad)
    fit(module, tmp_path, callback, steps, max_epochs=1)
    assert all(steps.notes)
    assert not torch.equal(norm, module.net.bn.weight)


def test_tuning(tmp_path):
    rates = Steps(lambda t, m: [(g["lr"], g["weight_decay"]) for g in t.optimizers[0].param_groups])
    module = made()
    head = module.net.head.weight.clone()
    fit(module, tmp_path, LotteryJackpots(0.8, tune_epochs=2), rates, max_epochs=4)
    assert [r[0] for r in rates.notes[::4]] == [
        pytest.approx((0.1, 1e-3)), pytest.approx((0.09, 1e-3)), (0.01, 0.0), (pytest.approx(0.005), 0.0)
    ]  # fmt: skip
    assert rates.masks[8] == {}
    assert module.state_dict().keys() == made().state_dict().keys()
    assert not torch.equal(head, module.net.head.weight)
    for name, mask in rates.masks[7].items():
        weight = module.get_submodule(name).weight
        assert torch.equal(weight != 0, mask)
    assert not (tmp_path / "jackpot.pt").exists()


def test_scores_follow_removed_channels(tmp_path):
    module = made()
    fit(module, tmp_path, LotteryJackpots(0.5), L1Norm(0.5, start_epoch=1), max_epochs=2)
    lots = lots_in(module)["net.blocks.0.conv1"]
    assert lots.score.shape == lots.mask.shape == module.net.blocks[0].conv1.weight.shape == (6, 4, 3, 3)
    assert torch.equal(swap(lots.score, lots.mask), lots.mask)


def test_a_reloaded_checkpoint_computes_the_same(tmp_path):
    module = made()
    fit(module, tmp_path, LotteryJackpots(0.8), ModelCheckpoint(tmp_path, "last", save_weights_only=True), max_epochs=1)
    again, x = load(Foreign, tmp_path / "last.ckpt"), torch.rand(5, 1, 8, 8)
    assert torch.equal(module.eval()(x), again.eval()(x))


def test_the_jackpot_is_a_file_of_bits(tmp_path):
    module, dense, x = made(), made(), torch.rand(5, 1, 8, 8)
    fit(module, tmp_path, LotteryJackpots(0.8), max_epochs=2)
    expected = module.eval()(x)
    size = save_jackpot(module, tmp_path / "bits.pt", {})
    assert size == sum(-(-lots.mask.numel() // 8) for lots in lots_in(module).values()) == 9 + 4 * 108
    network = copy.deepcopy(dense.net)
    load_jackpot(dense, tmp_path / "jackpot.pt")
    assert torch.equal(dense.eval()(x), expected)
    load_jackpot(network, tmp_path / "jackpot.pt")  # the network alone, whose names are shorter
    assert torch.equal(network.eval()(x), expected)
    assert profile(network, (1, 1, 8, 8)).params == profile(made().net, (1, 1, 8, 8)).params
    with pytest.raises(ValueError, match="was found for other weights"):
        load_jackpot(network, tmp_path / "jackpot.pt")
    with pytest.raises(ValueError, match=r"masks 'net\.stem', which Linear does not have"):
        load_jackpot(nn.Linear(3, 3), tmp_path / "jackpot.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is no jackpot"):
        load_jackpot(network, tmp_path / "other.pt")


class Frozen(Foreign):
    def configure_optimizers(self):
        return torch.optim.SGD(list(self.net.head.parameters()), lr=0.1)


@pytest.mark.parametrize(
    ("module", "arguments", "others", "message"),
    [
        (Frozen, {}, [], "no optimiser holds the scores of net.stem"),
        (Foreign, {"include": ["net.head"]}, [], "finds no layer of Foreign"),
        (Foreign, {"tune_epochs": 2}, [], "leaves no epoch of max_epochs=2"),
        (Foreign, {}, [WeightAveraging()], "WeightAveraging cannot follow"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, module, arguments, others, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(), tmp_path, LotteryJackpots(**arguments), *others)


def test_norms_in_eval_mode_are_warned_of(tmp_path):
    module = made()
    module.net.bn.eval()
    with pytest.warns(UserWarning, match=r"'net\.bn' and 0 more batch norms are in eval mode"):
        fit(module, tmp_path, LotteryJackpots(), max_epochs=1)


def test_swaps_are_logged(tmp_path):
    trainer = fit(made(), tmp_path, LotteryJackpots(0.8, init_low=0.99999), max_epochs=1)
    assert trainer.callback_metrics["lottery_jackpots/swaps"] > 0


def test_scores_in_half_precision_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"precision='bf16-true' has none\. Take 'bf16-mixed'"):
        fit(made(), tmp_path, LotteryJackpots(), precision="bf16-true")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": [0.5, 0.5]}, "give one number"),
        ({"restriction": "linear"}, "or a function of"),
        ({"init_low": 2.0}, r"init_low=2.0, init_high=1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LotteryJackpots(**arguments)


def test_a_few_epochs_recover_what_magnitude_pruning_loses(tmp_path):
    """... at 90 %, without moving a weight; a random start is behind."""
    train, test = digits(1200, batch_size=40), digits(597, 1200, batch_size=597)

    def accuracy(epochs, module, *callbacks):
        runner = make_trainer(tmp_path, *callbacks, max_epochs=epochs)
        with no_pictures:
            runner.fit(module, train)
        return runner.validate(module, test, verbose=False)[0]["val_acc"]

    torch.manual_seed(0)
    dense = Foreign(lr=0.05)
    assert accuracy(6, dense) > 0.9
    one_shot = accuracy(0, copy.deepcopy(dense), MagnitudePruning(0.9, exclude=["net.head"], recalibrate_bn=8))
    learnt = accuracy(3, copy.deepcopy(dense), LotteryJackpots(0.9))
    random = accuracy(3, copy.deepcopy(dense), LotteryJackpots(0.9, init="random"))
    assert learnt > one_shot + 0.1
    assert learnt > random
