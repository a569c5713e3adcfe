"""WhiteBox: the mathematics against numbers worked out by hand, the vote, the fold, and the phases of a fit."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
import torchvision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.callbacks import L1Norm, WhiteBox
from lightning_compress.callbacks.pruning.white_box import (
    attach_masks,
    channel_scores,
    class_mixture,
    column_penalty,
    global_vote,
    guide,
    mean_guide,
    official_factor,
    widths_at,
)
from lightning_compress.callbacks.pruning.white_box.callback import find_num_classes
from lightning_compress.callbacks.pruning.white_box.placement import (
    MaskHooks,
    fold_into_norms,
    fold_into_weights,
    place_masks,
    split_layers,
)
from lightning_compress.callbacks.pruning.white_box.vote import narrowed_cost
from lightning_compress.catalog import card
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.core.profile import profile
from lightning_compress.core.surgery import ChannelPlan, apply_cuts, attach_record, channel_graph, load
from lightning_compress.datamodules import CIFAR10
from lightning_compress.networks import build, load_weights, resnet20, resnet56, resnet110, vgg16_cifar

CIFAR = (1, 3, 32, 32)
INNER = ["net.blocks.0.conv1", "net.blocks.1.conv1"]


# ---- masks


def test_gradients_are_those_of_the_scaled_map() -> None:
    """dL/dx = G dL/dout, dL/dM = D^T dL/dG with dL/dG = sum over the map of dL/dout x: through the hooks, exactly."""
    conv, reader = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
    network = nn.Sequential(conv, nn.ReLU(), reader)
    x, targets = torch.randn(5, 3, 8, 8), torch.tensor([0, 3, 1, 2, 3])
    attach_masks(network, ["0"], 4)
    graph = channel_graph(network, x[:1])
    mask = conv.class_mask
    mask.data.normal_()
    mixture = class_mixture(targets, 4)
    for position in ("before_bn", "after_activation"):
        hooks = MaskHooks(network, place_masks(network, graph, ["0"], position), normalize=False)
        hooks.mixture = mixture
        network(x).square().sum().backward()
        hooks.remove()
        ours = [mask.grad, conv.weight.grad, reader.weight.grad]
        network.zero_grad()
        factor = (mixture[0] @ mask)[:, :, None, None]
        maps = reader(conv(x).mul(factor).relu() if position == "before_bn" else conv(x).relu() * factor)
        maps.square().sum().backward()
        theirs = [mask.grad, conv.weight.grad, reader.weight.grad]
        assert all(map(torch.equal, ours, theirs))
        network.zero_grad()


def test_a_guide_of_ones_has_the_moments_of_its_uniforms() -> None:
    targets = torch.randint(10, (20_000,), generator=torch.Generator().manual_seed(0))
    mixture = class_mixture(targets, 10, torch.Generator().manual_seed(1))
    drawn = guide(mixture[0], torch.ones(10, 3))
    assert drawn.mean().item() == pytest.approx(5.5, abs=0.02)
    assert drawn[:, 0].std().item() == pytest.approx(math.sqrt(9 / 12), abs=0.02)
    assert torch.allclose(guide(mixture[0], torch.ones(10, 3), normalize=True), drawn / 5.5)
    own = torch.zeros(20_000, 10, dtype=torch.bool).scatter_(1, targets[:, None], True)
    assert (mixture[0][own] == 1).all()
    assert (mixture[0][~own] < 1).all()
    assert (mixture[0][~own] >= 0).all()


def test_layers_get_draws_of_their_own_and_soft_labels_are_a_lower_bound() -> None:
    first, second = class_mixture(torch.tensor([1, 2]), 3, layers=2)
    assert not torch.equal(first, second)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    mixture = class_mixture(soft, 3)[0]
    assert (mixture >= soft).all()
    assert mixture[1, 2] == 1
    for wrong in (torch.zeros(4, 5), torch.zeros(4), torch.zeros(4, 3, dtype=torch.int64)):
        with pytest.raises(MisconfigurationException, match=r"soft labels \(B, 3\)"):
            class_mixture(wrong, 3)


def test_penalty_and_scores_of_a_small_mask() -> None:
    mask = torch.tensor([[1.0, -1.0, 0.5, 0.0], [1.0, -1.0, 0.5, 0.1]])
    assert column_penalty([mask]).item() == pytest.approx(3.00167, abs=1e-5)
    assert column_penalty([mask, mask]).item() == pytest.approx(6.00333, abs=1e-5)
    assert channel_scores(mask).tolist() == pytest.approx([2, 2, 1, 0.1])


def test_the_mean_guide_is_the_mean_of_guides() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randn(4, 6, generator=generator)
    targets = torch.arange(4).repeat(50_000)
    drawn = guide(class_mixture(targets, 4, generator)[0], mask)
    torch.testing.assert_close(drawn.mean(0), mean_guide(mask), atol=0.02, rtol=0)
    torch.testing.assert_close(official_factor(mask), mask.sum(0) / 2)
    assert mean_guide(torch.ones(10, 1)).item() == pytest.approx(5.5)
    assert mean_guide(torch.ones(10, 1), normalize=True).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("penalised", "steps", "left"), [(True, 196 * 30, 0.052364), (False, 196, 1.0)], ids=["penalty of weight 0", "none"]
)
def test_weight_decay_reaches_an_unused_mask_through_the_penalty_alone(
    penalised: bool, steps: int, left: float
) -> None:
    mask, weight = nn.Parameter(torch.ones(10, 4)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([mask, weight], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = weight.sum() * 0
        (loss + 0.0 * column_penalty([mask]) if penalised else loss).backward()
        optimizer.step()
    assert mask.detach().unique().tolist() == pytest.approx([left], abs=1e-6)
    assert channel_scores(mask).tolist() == pytest.approx([10 * left] * 4, abs=1e-4)


# ---- the vote


def test_one_threshold_for_all_layers() -> None:
    scores = {"a": torch.tensor([5, 4, 3, 2, 1, 0.5, 0.4, 0.3, 0.2, 0.1]), "b": torch.full((10,), 0.01)}
    votes = torch.cat(list(scores.values())).sort(descending=True).values
    assert widths_at(scores, votes, 0.5, 0.3) == ({"a": 10, "b": 3}, ["b"])
    assert widths_at(scores, votes, 0.25, 0.3) == ({"a": 5, "b": 3}, ["b"])
    assert widths_at(scores, votes, 0.0, 0.3) == ({"a": 3, "b": 3}, ["a", "b"])  # no vote passes
    assert widths_at(scores, votes, 0.1, 0.05) == ({"a": 2, "b": 1}, ["b"])  # one at least


def test_the_vote_stops_at_the_first_rho_that_meets_the_target() -> None:
    scores = {name: torch.rand(64, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abcd")}
    tried: list[float] = []

    def share(widths: Any) -> float:
        tried.append(sum(widths.values()) / 256)
        return tried[-1]

    before: dict[str, int] = {}
    for target in (0.95, 0.7, 0.5, 0.4, 0.31):
        tried.clear()
        vote = global_vote(scores, list(scores.values()), share, target)
        assert vote.share == tried[-1] <= target
        assert all(left > target for left in tried[:-1])
        assert all(vote.widths[name] <= width for name, width in before.items())
        before = vote.widths
        rho = 0.9
        for _ in tried[1:]:
            rho -= 0.01
        assert vote.rho == rho  # repeated subtraction, to the last bit


def test_the_vote_ends_where_no_target_can_be_met() -> None:
    vote = global_vote({"a": torch.rand(10)}, [torch.rand(10)], lambda widths: 0.9, 0.5)
    assert vote.rho <= 0
    assert vote.widths == {"a": 3}


def test_a_follower_keeps_the_share_that_the_round_before_left() -> None:
    scores = {"a": torch.arange(100.0)}
    seen: list[dict[str, int]] = []

    def share(widths: Any) -> float:
        seen.append(dict(widths))
        return widths["a"] / 100

    global_vote(scores, list(scores.values()), share, 0.85, follower=("last", 512))
    assert [w["last"] for w in seen[:3]] == [512, int(512 * 0.9), int(512 * seen[1]["a"] / 100)]


# ---- the cost of widths


def stages(network: nn.Module, widths: list[int]) -> ChannelPlan:
    names = [name for name, _ in network.named_modules() if name.startswith("layer") and name.endswith(".conv1")]
    return ChannelPlan({n: torch.arange(w) for n, w in zip(names, widths, strict=True)})


def closed_form(widths: list[int]) -> tuple[int, int, int]:
    """MACs, parameters and batch-norm term of a CIFAR ResNet of these widths inside its blocks."""
    n = len(widths) // 3
    S1, S2, S3 = (sum(widths[i * n : (i + 1) * n]) for i in range(3))
    m2, m3 = widths[n], widths[2 * n]
    macs = 442_368 + 640 + 294_912 * S1 + 147_456 * S2 - 36_864 * m2 + 73_728 * S3 - 18_432 * m3
    params = 432 + 32 + 650 + 9 * (32 * S1 + 64 * S2 - 16 * m2 + 128 * S3 - 32 * m3) + 2 * (S1 + S2 + S3 + 112 * n)
    norms = 2 * (16 * 1024 * (n + 1) + 1024 * S1 + 256 * (32 * n + S2) + 64 * (64 * n + S3))
    return macs, params, norms


@pytest.mark.parametrize(("make", "n"), [(resnet56, 9), (resnet110, 18)])
def test_costs_are_the_closed_form(make: Any, n: int) -> None:
    network = make()
    dense, graph = profile(network, CIFAR), channel_graph(network, CIFAR)
    full = [16] * n + [32] * n + [64] * n
    assert closed_form(full)[:2] == {9: (125_485_696, 853_018), 18: (252_887_680, 1_727_962)}[n]
    if n == 9:
        assert closed_form([8] * n + [16] * n + [32] * n)[:2] == (62_964_352, 428_074)
    drawn = torch.Generator().manual_seed(n)
    for widths in ([w // 2 for w in full], [int(torch.randint(1, w + 1, (), generator=drawn)) for w in full]):
        cuts = stages(network, widths).cuts(graph)
        macs, params, norms = closed_form(widths)
        assert round(narrowed_cost(dense, graph, cuts, "conv_fc")) == macs
        assert round(narrowed_cost(dense, graph, cuts, "with_bn")) == macs + norms
        narrow = copy.deepcopy(network)
        apply_cuts(narrow, cuts)
        small = profile(narrow, CIFAR)
        assert (small.macs, small.params, small.paper_macs()) == (macs, params, macs + norms)


def test_biased_convolutions_are_counted_as_their_narrow_network() -> None:
    network = vgg16_cifar(classifier="linear", last_pool="max")
    dense, graph = profile(network, CIFAR), channel_graph(network, CIFAR)
    kept = {name: torch.arange(3 + 2 * i) for i, name in enumerate(graph.layers)}
    cuts = ChannelPlan(kept).cuts(graph)
    counted = narrowed_cost(dense, graph, cuts, "with_bn")
    apply_cuts(network, cuts)
    assert round(counted) == profile(network, CIFAR).paper_macs()


# ---- where masks are, and the fold


class Flattening(nn.Module):
    """Convolutions that a linear layer reads pixel by pixel, and an activation that is not homogeneous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        return self.fc(F.avg_pool2d(F.silu(self.conv2(x)), 2).flatten(1))


def with_statistics(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return network.eval()


class Grouped(nn.Sequential):
    """A grouped convolution, inside and at the end of a chain."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12),
            nn.ReLU(), nn.Conv2d(12, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
        )  # fmt: skip


NETWORKS = {
    "resnet20": resnet20,
    "flattening": Flattening,
    "grouped": Grouped,
    "densenet40": lambda: build("densenet40"),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
}


@torch.no_grad()
@pytest.mark.parametrize("position", ["before_bn", "after_activation"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_fold_is_exact_for_a_constant_guide(name: str, position: Any) -> None:
    """Any activation, any sign; concatenation, flattening, depthwise and grouped convolutions."""
    torch.manual_seed(0)
    network, x = with_statistics(NETWORKS[name]()), torch.randn(2, 3, 16, 16)
    graph = channel_graph(network, x[:1])
    alone, _ = split_layers(network, graph)
    places = place_masks(network, graph, alone, position)
    attach_masks(network, alone, 10)
    masks = {layer: network.get_submodule(layer).class_mask for layer in alone}
    for mask in masks.values():
        mask.normal_(1, 0.5)
    plain = network(x)
    hooks = MaskHooks(network, places, normalize=True)
    hooks.mixture = torch.full((len(places), 2, 10), 0.55)  # then each sample's guide is the mean guide
    masked = network(x)
    hooks.mixture = None
    assert torch.equal(network(x), plain)
    hooks.remove()
    for place in places:
        fold_into_weights(network, place, mean_guide(masks[place.layer], normalize=True))
    scale = masked.abs().max().item()
    assert not torch.allclose(masked, plain, atol=1e-3 * scale, rtol=0)
    torch.testing.assert_close(network(x), masked, atol=1e-5 * scale, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("position", "right"), [("after_activation", True), ("before_bn", False)])
def test_the_official_fold_is_right_behind_a_relu_and_wrong_before_the_norm(position: Any, right: bool) -> None:
    torch.manual_seed(0)
    network, x = with_statistics(resnet20()), torch.randn(4, 3, 32, 32)
    graph = channel_graph(network, CIFAR)
    alone, _ = split_layers(network, graph)
    places = place_masks(network, graph, alone, position)
    attach_masks(network, alone, 10)
    factors = {layer: torch.rand(graph.width(layer)) + 0.5 for layer in alone}
    for layer, factor in factors.items():
        network.get_submodule(layer).class_mask.copy_(factor.expand(10, -1) / 10)
    hooks = MaskHooks(network, places, normalize=False)
    hooks.mixture = torch.ones(len(places), 4, 10)
    masked = network(x)
    hooks.remove()
    for place in places:
        assert len(place.norms) == 1
        fold_into_norms(network, place.norms, factors[place.layer])
    assert torch.allclose(network(x), masked, atol=1e-5 * masked.abs().max().item(), rtol=0) == right


@pytest.mark.parametrize(
    ("make", "masked", "coupled", "before"),
    [
        (resnet56, 27, 28, 27),  # the stem and every second convolution only vote: 55 masks
        (resnet110, 54, 55, 54),
        (lambda: resnet20(shortcut="projection"), 9, 12, 9),
        (lambda: vgg16_cifar(classifier="linear", last_pool="max"), 13, 0, 0),
    ],
    ids=["resnet56", "resnet110", "resnet20 with projections", "vgg16"],
)
def test_masks_sit_where_the_paper_puts_them(make: Any, masked: int, coupled: int, before: int) -> None:
    network = make()
    graph = channel_graph(network, CIFAR)
    alone, streams = split_layers(network, graph)
    places = place_masks(network, graph, alone)
    assert (len(alone), len(streams), sum(not p.readers for p in places)) == (masked, coupled, before)


def test_an_inverted_residual_is_one_mask_behind_its_depthwise_convolution() -> None:
    network = build("mobilenet_v2_cifar")
    graph = channel_graph(network, CIFAR)
    places = {p.layer: p for p in place_masks(network, graph, split_layers(network, graph)[0])}
    assert places["layers.5.conv1"].norms == ("layers.5.bn1", "layers.5.bn2")
    assert list(places["layers.5.conv1"].readers) == ["layers.5.conv3"]
    assert sum(name.startswith("layers.") for name in places) == 17


# ---- published budgets


@pytest.mark.parametrize("row", card("white_box").published, ids=lambda row: row.config.rpartition("/")[2])
def test_recipe_masks_as_the_paper_and_meets_the_published_budget(row: Any, tmp_path: Path) -> None:
    """Widths are not published; whatever the scores are, the vote ends at the published share of MACs or just below."""
    cli = CompressCLI(["--config", row.config, f"--trainer.default_root_dir={tmp_path}"], run=False)
    method = next(c for c in cli.trainer.callbacks if isinstance(c, WhiteBox))
    network: LightningModule = cli.model
    graph = method._trace(cli.trainer, network)
    names = {place.layer for place in method._places}
    counts = (len(names), len({*names, *method._voters(network, graph)}))
    assert counts == {"VGG-16": (13, 13), "ResNet-56": (27, 55), "ResNet-110": (54, 109), "MobileNetV2": (18, 18),
                      "ResNet-50": (32, 48)}[row.network]  # fmt: skip
    drawn = torch.Generator().manual_seed(0)
    layers = [*names, *(set(method._voters(network, graph)) - names)]
    masks = {n: torch.rand(10, len(network.get_submodule(n).weight), generator=drawn) for n in layers}
    vote, plan = method._decide(cli.trainer, network, graph, masks)
    assert method.target_macs - 0.03 < vote.share <= method.target_macs
    dense = profile(network, network.example_input_array)
    macs = narrowed_cost(dense, graph, plan.cuts(graph), "conv_fc")
    assert macs / row.result["macs"] == pytest.approx(1, abs=0.06)  # the paper's own vote stops elsewhere


# ---- a fit


def masked_module(module: nn.Module) -> dict[str, Tensor]:
    return {n: m.class_mask for n, m in module.named_modules() if hasattr(m, "class_mask")}


class Watch(Callback):
    """What the network and the optimiser are when an epoch begins (after WhiteBox) and ends."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.widths: list[int] = []
        self.momentum: list[bool] = []
        self.masks: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.widths.append(foreign.widths(pl_module)[INNER[0]])
        self.momentum.append(bool(trainer.optimizers[0].state))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.masks.append({n: m.detach().clone() for n, m in masked_module(pl_module).items()})


def test_the_timeline_of_a_fit(tmp_path: Path) -> None:
    module, watch = foreign.made(), Watch()
    trainer = foreign.fit(module, tmp_path, WhiteBox(end_epoch=3, target_macs=0.6), watch, max_epochs=6)
    assert watch.rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.09, 0.081])  # held, then from the start
    assert watch.widths[:3] == [12, 12, 12]
    assert watch.widths[3] == watch.widths[5] < 12
    assert watch.momentum == [False, True, True, False, True, True]
    assert [len(masks) for masks in watch.masks] == [5, 5, 5, 0, 0, 0]  # two that act, three that only vote
    assert all(len(mask) == 10 for mask in watch.masks[0].values())  # as many classes as outputs
    assert not masked_module(module)
    assert [step["cuts"] != [] for step in attach_record(module).steps] == [True]
    assert trainer.callback_metrics["val_loss"].isfinite()


def test_masks_that_only_vote_decay_and_the_others_learn(tmp_path: Path) -> None:
    watch = Watch()
    foreign.fit(foreign.made(), tmp_path, WhiteBox(end_epoch=2, sparse_lambda=0.0), watch, max_epochs=3)
    value, velocity = 1.0, 0.0
    for _ in range(4):
        velocity = 0.9 * velocity + 1e-3 * value  # the weight decay of the group
        value -= 0.1 * velocity
    for name, mask in watch.masks[0].items():
        spread = mask.std(0).max().item()
        assert (spread > 1e-4) == (name in INNER)
        if name not in INNER:
            assert mask.unique().tolist() == pytest.approx([value], abs=1e-6)


def test_two_fits_with_a_checkpoint_between_give_the_same_network(tmp_path: Path) -> None:
    """Vote, fold and cut by hand on what the first part saved; then a fit of its own."""
    one = foreign.made()
    method = WhiteBox(end_epoch=2, target_macs=0.6)
    foreign.fit(one, tmp_path, method, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=4)
    two = load(foreign.Foreign, tmp_path / "epoch=1.ckpt")
    masks = masked_module(two)
    graph = channel_graph(two, (1, 1, 8, 8))
    dense = profile(two, (1, 1, 8, 8))
    scores = {name: channel_scores(masks[name]) for name in INNER}

    def plan(widths: Any) -> ChannelPlan:
        return ChannelPlan({n: s.topk(widths[n]).indices.sort().values for n, s in scores.items()})

    def share(widths: Any) -> float:
        return narrowed_cost(dense, graph, plan(widths).cuts(graph), "conv_fc") / dense.macs

    vote = global_vote(scores, [channel_scores(mask) for mask in masks.values()], share, 0.6)
    for name in INNER:
        two.get_submodule(name).weight.data *= mean_guide(masks[name], normalize=True)[:, None, None, None]
    twin = foreign.Foreign()
    twin.load_state_dict({k: v for k, v in two.state_dict().items() if "class_mask" not in k and "load_this" not in k})
    apply_cuts(twin, plan(vote.widths).cuts(graph))
    foreign.fit(twin, tmp_path, max_epochs=2)
    theirs = {k: v for k, v in one.state_dict().items() if isinstance(v, Tensor)}
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_run_that_draws_and_follows_a_schedule_per_step_resumes_bit_for_bit(epoch: int, tmp_path: Path) -> None:
    class Stepwise(foreign.Foreign):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def made() -> LightningModule:
        torch.manual_seed(0)
        return Stepwise()

    one, two, kinds = made(), made(), {"end_epoch": 2, "vote_layers": ["net.blocks.*"], "seed": 3}
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    foreign.fit(one, tmp_path, WhiteBox(**kinds), keep, max_epochs=4)
    foreign.fit(two, tmp_path, WhiteBox(**kinds), max_epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    foreign.assert_same(one, two)


def test_micro_batches_and_seeds_draw_anew(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Spy(WhiteBox):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(self._hooks.mixture.clone())
            super().on_train_batch_end(*args)
            assert self._hooks.mixture is None

    for seed in (0, 0, 1):
        foreign.fit(foreign.made(), tmp_path, Spy(end_epoch=2, seed=seed), max_epochs=3, limit_train_batches=2,
                    accumulate_grad_batches=2, max_steps=1)  # fmt: skip
    assert [m.shape for m in seen] == [(2, 16, 10)] * 6
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[4])


class Recomputed(foreign.Network):
    """Its blocks compute their activations again in the backward pass."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("position", ["before_bn", "after_activation"])
def test_recomputed_activations_see_the_same_mixture(reentrant: bool, position: Any, tmp_path: Path) -> None:
    masks = []
    for kind in (None, reentrant):
        module, watch = foreign.made(Recomputed), Watch()
        module.net.reentrant = kind
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 0.0  # else the second pass would count twice
        foreign.fit(module, tmp_path, WhiteBox(end_epoch=1, position=position), watch, max_epochs=2)
        masks.append(watch.masks[0])
    for name, mask in masks[0].items():
        torch.testing.assert_close(masks[1][name], mask, msg=name)
        assert (mask.std(0).max().item() > 1e-4) == (name in INNER)


def test_masks_work_in_a_compiled_network(tmp_path: Path) -> None:
    torch.compiler.reset()  # of code compiled for another module of this class, without hooks
    masks = []
    for compiled in (False, True):
        module, watch = foreign.made(), Watch()
        if compiled:
            module.net.compile(backend="eager")
        foreign.fit(module, tmp_path, WhiteBox(end_epoch=1), watch, max_epochs=2)
        masks.append(watch.masks[0])
    torch.compiler.reset()
    for name, mask in masks[0].items():
        torch.testing.assert_close(masks[1][name], mask, msg=name)


def test_outside_of_training_steps_nothing_is_masked(tmp_path: Path) -> None:
    class Check(Callback):
        def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            bare = copy.deepcopy(pl_module.net.state_dict())
            net = foreign.Network().eval()
            net.load_state_dict({k: v for k, v in bare.items() if "class_mask" not in k})
            x = torch.randn(3, 1, 8, 8)
            assert torch.equal(pl_module(x), net(x))
            seen.append(trainer.current_epoch)

    seen: list[int] = []
    foreign.fit(foreign.made(), tmp_path, WhiteBox(end_epoch=1), Check(), max_epochs=2, limit_train_batches=2,
                limit_val_batches=1, val_check_interval=1, max_steps=2)  # fmt: skip
    assert seen == [0, 0]


def test_scores_of_the_first_part_count_for_nothing(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=1)
    stop = EarlyStopping("val_loss", patience=1, mode="max")  # a loss that falls looks like no progress

    class Falsify(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.callback_metrics["val_loss"] = torch.tensor(float(trainer.current_epoch - 10))

    foreign.fit(foreign.made(), tmp_path, Falsify(), WhiteBox(end_epoch=3), stop, best, max_epochs=5)
    assert stop.stopped_epoch == 0
    assert Path(best.best_model_path).stem in ("epoch=3", "epoch=4")


def test_the_narrow_network_computes_what_the_mean_guide_did(tmp_path: Path) -> None:
    """Without a cut, the network right after the vote equals the masked one with its mean guide."""

    class Before(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                method._hooks.mixture = torch.full((2, 5, 10), 0.55)
                outputs.append(pl_module.eval()(x))
                method._hooks.mixture = None
                pl_module.train()

    class After(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                outputs.append(pl_module.eval()(x))
                pl_module.train()

    x, outputs = torch.randn(5, 1, 8, 8), []
    method = WhiteBox(end_epoch=1, target_macs=0.99, start_keep=1.0, keep_step=0.5, include_unused=False)
    method._decide = lambda *args: (global_vote({}, [torch.ones(1)], lambda w: 0.0, 0.5), ChannelPlan({}))
    foreign.fit(foreign.made(), tmp_path, Before(), method, After(), max_epochs=2)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_options_of_the_authors(tmp_path: Path) -> None:
    """Their fold touches norms alone; with scale_unused also those behind masks that only vote."""

    class Norms(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                norms.append(
                    {n: m.weight.clone() for n, m in pl_module.named_modules() if isinstance(m, nn.BatchNorm2d)}
                )

    norms: list[dict[str, Tensor]] = []
    watch = Watch()
    method = WhiteBox(end_epoch=1, fold="official", scale_unused=True, normalize_guide=False, flops_rule="with_bn")
    module = foreign.made()
    foreign.fit(module, tmp_path, Norms(), method, watch, Norms(), max_epochs=2)
    before, after = norms
    kept = {step[0]: step[3] for step in attach_record(module).steps[0]["cuts"]}
    for layer, norm in (("net.stem", "net.bn"), ("net.blocks.0.conv1", "net.blocks.0.bn1")):
        expected = before[norm] * official_factor(watch.masks[0][layer])
        torch.testing.assert_close(after[norm], expected[kept.get(f"{norm}.weight", slice(None))])
        assert after[norm].mean() > 3


def test_a_random_last_layer_does_not_vote(tmp_path: Path) -> None:
    class Chain(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(320, 10)
            )

    for last_layer, voters in (("score", ["net.0", "net.2"]), ("random", ["net.0"])):
        module = foreign.made(Chain)
        method = WhiteBox(end_epoch=1, last_layer=last_layer, target_macs=0.6)
        foreign.fit(module, tmp_path, method, max_epochs=2)
        graph = channel_graph(foreign.made(Chain), (1, 1, 8, 8))
        method._places = place_masks(module, graph, ["net.0", "net.2"])
        assert method._voters(module, graph) == voters
        assert foreign.widths(module)["net.2"] < 20


def test_heat_maps_are_drawn(tmp_path: Path) -> None:
    trainer = foreign.make_trainer(tmp_path, WhiteBox(end_epoch=1, include_unused=False), max_epochs=2)
    trainer.fit(foreign.made(), foreign.digits(32), foreign.digits(16, 64))
    drawn = sorted(p.name for p in tmp_path.glob("white_box*.png"))
    assert drawn == [f"white_box_{name}.png" for name in INNER]


def test_what_it_learns_is_worth_more_than_chance(tmp_path: Path) -> None:
    """Rows differ between classes, and the channels that score lowest are missed less than others."""

    class Freeze(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 8:
                searched.append(copy.deepcopy(pl_module.state_dict()))

    searched: list[dict[str, Any]] = []
    torch.manual_seed(0)
    method = WhiteBox(end_epoch=8, target_macs=0.6, position="after_activation")
    trainer = foreign.make_trainer(tmp_path, Freeze(), method, max_epochs=9, limit_val_batches=0)
    with foreign.no_pictures:
        trainer.fit(foreign.Foreign(lr=0.05), foreign.digits(1024, batch_size=64))
    module = foreign.Foreign()
    attach_record(module)
    module.load_state_dict(searched[0])
    masks = {name: module.get_submodule(name).class_mask.detach() for name in INNER}
    for mask in masks.values():
        rows = F.normalize(mask, dim=1)
        assert (rows @ rows.T).fill_diagonal_(0).sum().item() / 90 < 0.999
    graph = channel_graph(module, (1, 1, 8, 8))
    for place in place_masks(module, graph, INNER, "after_activation"):
        fold_into_weights(module, place, mean_guide(masks[place.layer], normalize=True))
    images, labels = next(iter(foreign.digits(512, 1024, 512)))

    @torch.no_grad()
    def loss(scores: dict[str, Tensor]) -> float:
        """Of the half that scores highest; batch norms take the batch's statistics, as in fine-tuning."""
        narrow = copy.deepcopy(module)
        apply_cuts(narrow, ChannelPlan({n: s.topk(6).indices.sort().values for n, s in scores.items()}).cuts(graph))
        return F.cross_entropy(narrow(images), labels).item()

    chance = torch.Generator().manual_seed(0)
    others = [loss({n: torch.rand(12, generator=chance) for n in INNER}) for _ in range(15)]
    highest = loss({n: channel_scores(m) for n, m in masks.items()})
    assert highest < sorted(others)[5]
    assert highest < loss({n: -channel_scores(m) for n, m in masks.items()})


@pytest.mark.real_data
@torch.no_grad()
@pytest.mark.parametrize(
    ("position", "official"), [("before_bn", False), ("after_activation", False), ("before_bn", True)]
)
def test_the_fold_keeps_what_a_trained_network_knows(position: Any, official: bool) -> None:
    """The public ResNet-56 under masks that scale its channels by 0.5 to 1.5, on test images."""
    root = real_data("cifar10.npz", "weights/resnet56-cifar10.pt")
    torch.manual_seed(0)
    network = resnet56().eval()
    load_weights(network, root / "weights" / "resnet56-cifar10.pt")
    data = CIFAR10(root, eval_batch_size=250, val_size=0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images, targets = next(iter(data.test_dataloader()))
    graph = channel_graph(network, CIFAR)
    places = place_masks(network, graph, split_layers(network, graph)[0], position)
    attach_masks(network, [place.layer for place in places], 10)
    hooks = MaskHooks(network, places, normalize=True)
    hooks.mixture = torch.full((len(places), len(images), 10), 0.55)
    for place in places:
        mask = network.get_submodule(place.layer).class_mask
        mask.copy_((torch.rand(mask.shape[1]) + 0.5).expand_as(mask))
    masked = network(images)
    hooks.remove()
    for place in places:
        factor = mean_guide(network.get_submodule(place.layer).class_mask, normalize=True)
        if official:
            fold_into_norms(network, place.norms, factor)
        else:
            fold_into_weights(network, place, factor)
    assert ((network(images) - masked).abs().max() < 1e-4 * masked.abs().max()).item() != official
    if not official:
        assert (masked.argmax(1) == network(images).argmax(1)).all()
    if (position, official) == ("before_bn", False):
        assert (masked.argmax(1) == targets).float().mean() > 0.5


# ---- guards


class Outputless:
    """A traced network without an output layer of its own."""

    order = ()
    left_alone: dict[str, str] = {}


def test_classes_are_found_or_asked_for(tmp_path: Path) -> None:
    trainer, module = foreign.make_trainer(tmp_path), foreign.made()
    graph = channel_graph(module, (1, 1, 8, 8))
    assert find_num_classes(trainer, module, graph) == 10
    module.num_classes = 7
    assert find_num_classes(trainer, module, graph) == 7
    with pytest.raises(MisconfigurationException, match="num_classes"):
        find_num_classes(trainer, foreign.made(), Outputless())  # type: ignore[arg-type]


def labels(kind: str) -> DataLoader:
    images, targets = foreign.digits().dataset.tensors
    soft = 0.9 * F.one_hot(targets, 10) + 0.01
    return DataLoader(TensorDataset(images, soft if kind == "soft" else targets * (3 if kind == "many" else 1)), 16)


def test_soft_labels_train(tmp_path: Path) -> None:
    module = foreign.made()
    trainer = foreign.make_trainer(tmp_path, WhiteBox(end_epoch=1), max_epochs=2, limit_train_batches=2)
    with foreign.no_pictures:
        trainer.fit(module, labels("soft"))
    assert trainer.global_step == 4


class Logitless(foreign.Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()


class Forgetful(foreign.Foreign):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for n, p in self.named_parameters() if not n.endswith("class_mask")], lr=0.1)


class Manual(foreign.Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "method", "data", "message"),
    [
        (Logitless, {}, labels("many"), r"num_classes=10\): the first batch has a label 27"),
        (Logitless, {}, DataLoader(torch.zeros(8, 1, 8, 8), 4), "needs the labels"),
        (foreign.Foreign, {"target_macs": 0.1}, foreign.digits(), r"target_macs=0.1\) is out of reach.*leaves 0.266"),
        (foreign.Foreign, {"exclude": ["net.blocks.*"]}, foreign.digits(), "finds no convolution"),
        (Forgetful, {}, foreign.digits(), "no optimiser holds the masks of net.blocks.0.conv1"),
        (Manual, {}, foreign.digits(), "optimises manually"),
    ],
    ids=["label too large", "no labels", "target", "nothing to mask", "optimiser", "manual optimisation"],
)
def test_what_cannot_work_is_refused(module: Any, method: Any, data: Any, message: str, tmp_path: Path) -> None:
    made = module()
    trainer = foreign.make_trainer(tmp_path, WhiteBox(end_epoch=1, **method), max_epochs=2)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(made, data)
    assert trainer.global_step == 0
    assert "training_step" not in vars(made)


def test_two_that_mask_the_same_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="is masked by another WhiteBox"):
        foreign.fit(foreign.made(), tmp_path, WhiteBox(end_epoch=1), WhiteBox(end_epoch=1, seed=1))


def test_another_cut_of_a_masked_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="list it before WhiteBox"):
        foreign.fit(foreign.made(), tmp_path, WhiteBox(end_epoch=1), L1Norm(0.5))
    module = foreign.made()
    foreign.fit(module, tmp_path, L1Norm(0.2), WhiteBox(end_epoch=1))
    assert foreign.widths(module)[INNER[0]] < 10


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    foreign.fit(foreign.made(), tmp_path, ModelCheckpoint(tmp_path, "{epoch}"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="written by a run without WhiteBox"):
        foreign.fit(foreign.made(), tmp_path, WhiteBox(end_epoch=2), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=3)


def test_a_collapse_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"nearly wiped out 2 of 2 layers.*smaller sparse_lambda \(it is 0.5\)"):
        foreign.fit(foreign.made(), tmp_path, WhiteBox(end_epoch=1, sparse_lambda=0.5, start_keep=0.02))


@pytest.mark.parametrize("normalize", [True, False])
def test_an_overflow_of_float16_is_told(normalize: bool, tmp_path: Path) -> None:
    method = WhiteBox(1000, end_epoch=1, normalize_guide=normalize)
    trainer, module = foreign.make_trainer(tmp_path, method), foreign.made()
    trainer.strategy.connect(module)
    trainer.fit_loop._data_source.instance = foreign.digits()
    trainer.strategy.precision_plugin.precision = "16-mixed"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        method.setup(trainer, module, "fit")
    assert any("overflows float16" in str(w.message) for w in told) != normalize


def test_a_thousand_classes_fit_into_half_precision() -> None:
    mixture, x = class_mixture(torch.arange(4), 1000), torch.full((4, 2, 1, 1), 200.0, dtype=torch.float16)
    mask = torch.ones(1000, 2)
    for normalize in (False, True):
        scaled = x * guide(mixture[0], mask, normalize)[:, :, None, None].half()
        assert scaled.isfinite().all() == normalize
    with torch.autocast("cpu", torch.bfloat16):
        assert guide(mixture[0], mask).dtype == torch.float32


def test_masks_of_a_trial_run_do_not_stay(tmp_path: Path) -> None:
    module = foreign.made()
    foreign.fit(module, tmp_path, WhiteBox(end_epoch=1), fast_dev_run=True, max_epochs=None)
    assert not masked_module(module)
    foreign.fit(module, tmp_path, WhiteBox(end_epoch=1, target_macs=0.6))
    assert foreign.widths(module)[INNER[0]] < 12
