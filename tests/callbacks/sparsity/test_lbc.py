"""LBC: every number of the mathematics, counts of the paper's networks, the schedule, and the callback."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import timm
import torch
from foreign import Foreign, digits, fit, made, make_trainer, no_pictures
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.models import resnet18, resnet50

from lightning_compress import load
from lightning_compress.callbacks import LBC, L1Norm, MagnitudePruning
from lightning_compress.callbacks.sparsity.lbc import (
    CombinationMask,
    by_position,
    combinations,
    compete,
    initial_score,
    layers_to_learn,
    remove_lowest,
    removed_combinations,
    union_mask,
)
from lightning_compress.catalog import card
from lightning_compress.core.profile import profile
from lightning_compress.core.sparse.learnt_mask import masks_in
from lightning_compress.core.sparse.nm import is_nm, to_groups

PATTERNS = [(2, 4), (1, 4), (1, 16), (2, 8), (4, 8)]


def mask_of(weight, n=2, m=4, **scores):
    mask = CombinationMask(weight, n, m)
    for name, value in scores.items():
        getattr(mask, name).data.copy_(torch.as_tensor(value).T)
    mask._refresh()
    return mask


# ---- combinations and scores


def test_combinations_are_in_lexicographic_order():
    assert combinations(2, 4).int().tolist() == [
        [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]
    ]  # fmt: skip


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_initial_scores_sum_to_one_and_the_network_is_dense(n, m):
    assert combinations(n, m).shape == (math.comb(m, n), m)
    assert initial_score(n, m) == {(2, 4): 1 / 3, (1, 4): 1, (1, 16): 1, (2, 8): 1 / 7, (4, 8): 1 / 35}[n, m]
    for weight in (torch.randn(8, 32), torch.randn(4, 16, 3, 3)):
        mask = CombinationMask(weight, n, m)
        assert mask.scores.shape == (math.comb(m, n), weight.numel() // m)
        torch.testing.assert_close(mask.patterns.T @ mask.scores.detach(), torch.ones(m, weight.numel() // m))
        assert torch.equal(mask(weight), weight)


def test_the_worked_example():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    mask = CombinationMask(weight, 2, 4)
    mask(weight).backward(torch.tensor([[0.1, -0.2, 0.3, -0.4]]))
    torch.testing.assert_close(mask.scores.grad, torch.tensor([[-0.3, 1.0, -1.5, 0.5, -2.0, -0.7]]).T)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.1, -0.2, 0.3, -0.4]]))
    torch.optim.SGD([mask.scores], lr=0.1).step()
    best, worst = mask.scores.argmax(), mask.scores.argmin()
    assert (mask.patterns[best].tolist(), mask.patterns[worst].tolist()) == ([0, 1, 0, 1], [1, 0, 1, 0])
    assert mask.scores[best].item() == pytest.approx(0.5333, abs=1e-4)
    assert mask.scores[worst].item() == pytest.approx(0.2333, abs=1e-4)


@pytest.mark.parametrize("shape", [(8, 12), (6, 8, 3, 3)], ids=["linear", "conv"])
def test_gradients(shape):
    """... are those of the formula, computed group by group."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight.requires_grad_()
    mask = CombinationMask(weight, 2, 4)
    mask.scores.data = torch.rand(mask.scores.shape, generator=generator)
    mask.remove(4)
    mask(weight).backward(grad)
    blocks = itertools.product(range(shape[0]), range(0, shape[1], 4), *map(range, shape[2:]))
    groups = [(o, slice(b, b + 4), *k) for o, b, *k in blocks]
    for g, at in enumerate(groups):
        worth = grad[at] * weight.detach()[at]
        for c, kept in enumerate(itertools.combinations(range(4), 2)):
            expected = sum(worth[i] for i in kept) if mask.alive[c, g] else torch.tensor(0.0)
            torch.testing.assert_close(mask.scores.grad[c, g], expected)
        union = {i for c, kept in enumerate(itertools.combinations(range(4), 2)) if mask.alive[c, g] for i in kept}
        assert {i for i in range(4) if mask.mask[at][i]} == union
    torch.testing.assert_close(weight.grad, grad * mask.mask, atol=0, rtol=0)


def test_scores_learn_in_float32_under_autocast():
    layer = nn.Linear(8, 4)
    compete(layer_in := nn.Sequential(layer), ["0"], 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer_in(torch.randn(3, 8)).float().square().sum()
    loss.backward()
    mask = masks_in(layer_in, CombinationMask)["0"]
    assert mask.scores.grad.dtype == mask.scores.dtype == torch.float32
    assert mask.scores.grad.abs().min() > 0


# ---- who leaves


def test_union_of_survivors():
    patterns = combinations(2, 4)
    for scores, expected in (
        ([0.3, 0.1, 0, 0, 0, 0.2], [1, 1, 1, 1]),
        ([0.3, 0, 0, 0, 0, 0], [1, 1, 0, 0]),
        ([0.3, 0.1, 0, 0, 0, 0], [1, 1, 1, 0]),
    ):
        assert union_mask(torch.tensor([scores]).T != 0, patterns).int().T.tolist() == [expected]


def test_scores_that_cancel_take_no_weight_away():
    weight = torch.ones(1, 4)
    mask = mask_of(weight, scores=[[0.2, -0.2, 0, 0, 0, 0]], alive=[[True, True, False, False, False, False]])
    assert mask(weight).tolist() == [[1, 1, 1, 0]]  # the sum of the scores is 0 in the first place


def test_negative_scores_leave_first_and_nothing_comes_back():
    scores = torch.tensor([[0.4, -0.1, 0.2, 0.05, -0.3, 0.3]]).T
    alive = torch.ones(6, 1, dtype=torch.bool)

    def gone(count):
        return (~remove_lowest(scores, alive, count))[:, 0].nonzero()[:, 0].tolist()

    assert (gone(2), gone(3)) == ([1, 4], [1, 3, 4])
    assert union_mask(remove_lowest(scores, alive, 5), combinations(2, 4)).int().T.tolist() == [[1, 1, 0, 0]]
    alive = remove_lowest(scores, alive, 2)
    scores[4] = 0.9
    assert remove_lowest(scores, alive, 3).T.tolist() == [[True, False, True, False, False, True]]
    assert torch.equal(remove_lowest(scores, alive, 1), alive)  # fewer than are gone


def test_equal_scores_leave_by_index():
    alive = remove_lowest(torch.full((6, 3), 1 / 3), torch.ones(6, 3, dtype=torch.bool), 4)
    assert alive.T.tolist() == [[False] * 4 + [True] * 2] * 3


def test_density_of_the_union_of_all_survivor_sets():
    patterns, means, holes = combinations(2, 4), [], []
    for gone in range(6):
        sets = list(itertools.combinations(range(6), 6 - gone))
        alive = torch.zeros(6, len(sets), dtype=torch.bool).scatter_(0, torch.tensor(sets).T, True)
        mask = union_mask(alive, patterns).float()
        means.append(mask.mean().item())
        holes.append((int((mask.sum(0) < 4).sum()), len(sets)))
    assert means == pytest.approx([1, 1, 1, 0.95, 0.8, 0.5])
    assert holes[3:5] == [(4, 20), (12, 15)]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_one_combination_is_left_in_the_end(n, m):
    weight = torch.randn(8, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = CombinationMask(weight, n, m)
    mask.scores.data.normal_(generator=torch.Generator().manual_seed(1))
    mask.remove(math.comb(m, n) - 1)
    assert (to_groups(mask.mask, m).sum(1) == n).all()
    assert mask.density == n / m
    assert is_nm(mask(weight), n, m)


# ---- schedule


@pytest.mark.parametrize(
    ("total", "end", "exponent", "changes"),
    [
        pytest.param(6, 60, 3, {1: 5, 2: 10, 3: 16, 4: 25, 5: 60}, id="LBC-ResNet-2:4"),
        pytest.param(4, 60, 3, {1: 8, 2: 19, 3: 60}, id="LBC-ResNet-1:4"),
        pytest.param(
            16, 60, 3,
            dict(enumerate([2, 3, 5, 6, 8, 10, 12, 14, 16, 19, 22, 25, 30, 36, 60], start=1)), id="LBC-ResNet-1:16",
        ),
        pytest.param(6, 200, 4, {1: 11, 2: 24, 3: 41, 4: 67, 5: 200}, id="LBC-DeiT-2:4"),
    ],
)  # fmt: skip
def test_schedule_of_the_paper(total, end, exponent, changes):
    counts = [removed_combinations(epoch, total, 0, end, exponent) for epoch in range(end + 20)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert {count: counts.index(count) for count in sorted(set(counts)) if count} == changes


def test_schedule_holds_outside():
    assert [removed_combinations(e, 6, 3, 7) for e in (0, 3, 7, 100)] == [0, 0, 5, 5]
    assert [removed_combinations(e, 6, 3, 3) for e in (0, 2, 3)] == [0, 0, 5]  # at once


# ---- networks of the paper


def on_meta(build, **kwargs):
    with torch.device("meta"):
        return build(**kwargs)


@pytest.mark.parametrize(
    ("network", "layers", "weights", "params"),
    [
        pytest.param(lambda: on_meta(resnet50), 52, 23_445_504, 25_557_032, id="LBC-ResNet-50"),
        pytest.param(lambda: on_meta(resnet18), 19, 11_157_504, 11_689_512, id="LBC-ResNet-18"),
        pytest.param(
            lambda: timm.create_model("deit_small_patch16_224", device="meta"), 48, 21_233_664, 22_050_664,
            id="LBC-DeiT-small",
        ),
    ],
)  # fmt: skip
def test_counts(network, layers, weights, params):
    network = network()
    assert sum(p.numel() for p in network.parameters()) == params
    for n, m in ((2, 4), (1, 16)):
        names, left_alone = layers_to_learn(network, m)
        learns = copy.deepcopy(network)
        compete(learns, names, n, m)
        masks = masks_in(learns, CombinationMask).values()
        assert len(names) == len(masks) == layers
        assert sum(mask.mask.numel() for mask in masks) == weights
        assert sum(mask.scores.shape[1] for mask in masks) * m == weights
        assert set(left_alone.values()) == {"is left out by `exclude`"}


@pytest.mark.parametrize(
    ("n", "m", "kept", "scores"),
    [(2, 4, 11_722_752, 35.2), (1, 4, 5_861_376, 23.4), (2, 8, 5_861_376, 82.1), (1, 16, 1_465_344, 23.4),
     (4, 8, 11_722_752, 205.1)],
    ids=lambda value: str(value),
)  # fmt: skip
def test_resnet50_keeps(n, m, kept, scores):
    network = on_meta(resnet50)
    names, _ = layers_to_learn(network, m)
    weights = sum(network.get_submodule(name).weight.numel() for name in names)
    assert weights * n // m == kept
    assert weights // m * math.comb(m, n) / 1e6 == pytest.approx(scores, abs=0.1)


BUILD = {
    "ResNet-50": resnet50, "ResNet-18": resnet18, "DeiT-small": lambda: timm.create_model("deit_small_patch16_224")
}  # fmt: skip


@pytest.mark.parametrize("row", card("lbc").published, ids=lambda row: f"LBC-{row.network}-{row.setting}")
def test_rows_of_the_catalog(row):
    n, m = map(int, row.setting.split(":"))
    network = BUILD[row.network]()
    layers = profile(network, (1, 3, 224, 224)).layers
    names, _ = layers_to_learn(network, m)
    left = sum(p.numel() for p in network.parameters())
    left -= sum(network.get_submodule(name).weight.numel() for name in names) * (m - n) // m
    assert left == row.result["params"]
    assert sum(layer.macs * n // m if layer.name in names else layer.macs for layer in layers) == row.result["macs"]


def test_resnet50_macs():
    network = resnet50()
    costs = {layer.name: layer.macs for layer in profile(network, (1, 3, 224, 224)).layers}
    names, _ = layers_to_learn(network, 4)
    assert sum(costs.values()) == 4_089_184_256
    assert sum(macs // 2 if name in names else macs for name, macs in costs.items()) == 2_104_623_104


def test_what_cannot_be_grouped_is_left_dense():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1), nn.Conv1d(6, 4, 1), nn.Conv2d(6, 8, 1),
        nn.Linear(8, 8), nn.Linear(8, 2),
    )  # fmt: skip
    names, left_alone = layers_to_learn(network, 4)
    assert names == ["2", "5"]
    assert left_alone == {
        "0": "is left out by `exclude`", "1": "is a grouped convolution", "3": "is neither a Conv2d nor a Linear layer",
        "4": "has 6 inputs, no multiple of m=4", "6": "is left out by `exclude`",
    }  # fmt: skip


# ---- the callback


class Watch(Callback):
    """Notes the union's density and the survivors after every step."""

    def __init__(self):
        self.densities, self.alive = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        masks = masks_in(pl_module, CombinationMask)
        self.densities.append(masks["net.blocks.0.conv1"].density if masks else None)
        self.alive.append({n: m.alive.clone() for n, m in masks.items()})


def nm_layers(module, n=2, m=4):
    names = ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"]
    return [is_nm(module.net.get_submodule(name).weight, n, m) for name in names]


def test_the_union_shrinks_at_the_start_of_epochs_only(tmp_path):
    watch, callback = Watch(), LBC(end_epoch=4)
    module = made(lr=0.5)  # so fast that momentum moves dead scores far
    fit(module, tmp_path, callback, watch, max_epochs=6)
    epochs = [watch.densities[4 * e : 4 * e + 4] for e in range(6)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    assert epochs[0][0] == 1
    assert 0.5 < epochs[3][0] < epochs[1][0] <= 1
    assert epochs[4:] == [[None] * 4] * 2
    for before, after in itertools.pairwise(watch.alive[:16]):
        assert all((after[n] <= before[n]).all() for n in after)
    assert all(nm_layers(module))
    assert type(module.net.blocks[0].conv1) is nn.Conv2d


def test_in_the_end_the_module_is_plain(tmp_path):
    module, plain = made(), made()
    trainer = fit(module, tmp_path, LBC(end_epoch=1), ModelCheckpoint(tmp_path, "last"), max_epochs=2)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert len(trainer.optimizers[0].state) == len(list(module.parameters()))
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(plain.eval()(x), module.eval()(x))


def test_until_then_a_checkpoint_holds_the_scores(tmp_path):
    callback = LBC(end_epoch=3)
    fit(made(), tmp_path, callback, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=4)
    module = load(Foreign, tmp_path / "epoch=1.ckpt")
    masks = masks_in(module, CombinationMask)
    assert len(masks) == 4
    assert all(not mask.alive.all() and mask.scores.std() > 0 for mask in masks.values())
    for mask in masks.values():
        assert torch.equal(by_position(mask.mask.bool(), 4).flatten(1), union_mask(mask.alive, mask.patterns))


def test_scores_in_a_group_of_their_own(tmp_path):
    class Groups(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            *others, own = trainer.optimizers[0].param_groups
            seen.append((len(own["params"]), own["lr"], own["weight_decay"], len(others)))

    seen = []
    callback = LBC(end_epoch=2, score_lr_factor=10, score_weight_decay=0.0)
    fit(made(), tmp_path, callback, Groups(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=3)
    assert [s[0] for s in seen] == [4, 4, 0]
    assert [s[1] for s in seen] == pytest.approx([0.9, 0.81, 0.729])  # after the schedule's step
    assert {s[2:] for s in seen} == {(0.0, 2)}
    whole = made()
    fit(whole, tmp_path, LBC(end_epoch=2, score_lr_factor=10, score_weight_decay=0.0), max_epochs=4)
    for epoch in (0, 2):
        again = LBC(end_epoch=2, score_lr_factor=10, score_weight_decay=0.0)
        fit(resumed := made(), tmp_path, again, max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_before_a_quantiser_whichever_came_first():
    class Rounded(nn.Module):
        def forward(self, weight):
            return weight + ((8 * weight).round() / 8 + 1 - weight).detach()  # zero does not stay zero

    layer = nn.Linear(8, 4)
    parametrize.register_parametrization(layer, "weight", Rounded())
    network = nn.Sequential(layer)
    undo = compete(network, ["0"], 2, 4)
    masks_in(network, CombinationMask)["0"].remove(5)
    assert (layer.weight == 1).sum() >= 16  # what the mask zeroed was rounded after it
    undo(network)
    assert isinstance(layer.parametrizations["weight"][0], Rounded)
    assert len(layer.parametrizations["weight"]) == 1


def test_weight_norm_is_refused():
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))
    with pytest.raises(MisconfigurationException, match="put together from several, as by weight_norm"):
        compete(network, ["0"], 2, 4)


def test_after_channels_were_removed(tmp_path):
    module = made()
    fit(module, tmp_path, L1Norm(0.3, round_to=4), LBC(end_epoch=1), max_epochs=2)
    assert module.net.blocks[0].conv1.weight.shape == (8, 8, 3, 3)
    assert all(nm_layers(module))


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([LBC(end_epoch=1), L1Norm(0.5)], "listed before LBC"),
        ([L1Norm(0.5, start_epoch=1), LBC(end_epoch=1)], "start_epoch=0 and listed before LBC"),
        ([LBC(end_epoch=1), EMAWeightAveraging()], "EMAWeightAveraging cannot follow"),
        ([LBC(end_epoch=1, include=["net.stem"])], "finds no layer of Foreign"),
        ([LBC(start_epoch=1, end_epoch=0)], "the end is before the start"),
        ([LBC(end_epoch=2)], r"end_epoch=2\).*max_epochs=2"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, callbacks, message):
    module = made()
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, tmp_path, *callbacks)
    assert not module.trainer.global_step


def test_scores_that_no_optimiser_holds_are_named(tmp_path):
    class Chosen(Foreign):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"no optimiser holds the scores of net\.blocks\.0\.conv1"):
        fit(Chosen(), tmp_path, LBC(end_epoch=1))


def test_too_many_combinations():
    with pytest.raises(ValueError, match=r"LBC\(n=8, m=16\): there are 12,870 ways"):
        LBC(8, 16)


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path):
    fit(made(), tmp_path, ModelCheckpoint(tmp_path, "other"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"was written by a run without LBC"):
        fit(made(), tmp_path, LBC(end_epoch=1), ckpt_path=tmp_path / "other.ckpt")


class Annealed(Foreign):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def test_learns_as_well_as_dense_and_no_worse_than_one_shot(tmp_path):
    train, test = digits(1200, batch_size=40), digits(597, 1200, batch_size=597)

    def accuracy(*callbacks):
        torch.manual_seed(0)
        module = Annealed()
        runner = make_trainer(tmp_path, *callbacks, max_epochs=6)
        with no_pictures:
            runner.fit(module, train)
        return runner.validate(module, test, verbose=False)[0]["val_acc"]

    dense, learnt = accuracy(), accuracy(LBC(end_epoch=3))
    one_shot = accuracy(MagnitudePruning(n=2, m=4, exclude=["net.stem", "net.head"], start_epoch=3))
    assert learnt > dense - 0.015
    assert learnt > one_shot - 0.005  # three of 597 digits


def test_the_mask_multiplies_like_the_dense_layer():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 6, 3), torch.randn(2, 8, 5, 5)
    network = nn.Sequential(copy.deepcopy(conv))
    compete(network, ["0"], 1, 4)
    assert torch.equal(network(x), conv(x))
    masks_in(network, CombinationMask)["0"].remove(3)
    assert torch.equal(network(x), F.conv2d(x, network[0].weight, conv.bias))
    assert network[0].weight.count_nonzero() * 4 == conv.weight.numel()
