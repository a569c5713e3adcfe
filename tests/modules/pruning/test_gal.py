"""GAL: optimiser and losses by hand, networks by their tables, the cut by its exactness, then the whole fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foreign
import pytest
import torch
import torchvision
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, Bottleneck

import lightning_compress
from lightning_compress.catalog import Row, card
from lightning_compress.core.losses import add_loss_term
from lightning_compress.core.profile import profile
from lightning_compress.core.report import Account
from lightning_compress.core.surgery import attach_record
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import GAL
from lightning_compress.modules.pruning.gal import FISTA, Discriminator, Point, find_points, shrink
from lightning_compress.modules.pruning.gal.adversary import discriminator_loss, frozen, verdict
from lightning_compress.modules.pruning.gal.cut import SelectConv2d, cut_copy, plan_cut, rehearse
from lightning_compress.modules.pruning.gal.masks import Search, begin_search, mask_map, masking
from lightning_compress.networks import (
    CIFARVGG,
    CIFARDenseNet,
    CIFARResNet,
    densenet40,
    googlenet_cifar,
    resnet20,
    resnet56,
    resnet110,
    vgg16_cifar,
)
from lightning_compress.networks.googlenet_cifar import Inception

# ---- FISTA


def stepped(m: list[float], gradient: list[float], steps: int, **arguments: float) -> tuple[FISTA, list[list[float]]]:
    mask = nn.Parameter(torch.tensor(m, dtype=torch.float64))
    fista, seen = FISTA([mask], **arguments), []
    for _ in range(steps):
        mask.grad = torch.tensor(gradient, dtype=torch.float64)
        fista.step()
        seen.append(mask.tolist())
    return fista, seen


def test_fista_by_hand() -> None:
    mask = nn.Parameter(torch.tensor([1.0, 0.2], dtype=torch.float64))
    fista = FISTA([mask], lr=0.1, gamma=0.5)
    expected = [
        ((0.91, 0.14), 1.0),
        ((0.82, 0.08), 1.6180339887),
        ((0.7046421827, 0.0030947885), 2.1935270853),
    ]
    for m, alpha in expected:
        mask.grad = torch.tensor([0.4, 0.1], dtype=torch.float64)
        fista.step()
        assert mask.tolist() == pytest.approx(m, abs=1e-9)
        assert fista.state[mask]["alpha"] == pytest.approx(alpha, abs=1e-9)


@pytest.mark.parametrize(("start", "dies"), [(1.0, 23), (2.0, 35)])
def test_fista_without_a_task_kills_a_mask_on_schedule(start: float, dies: int) -> None:
    mask = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    fista = FISTA([mask], lr=0.01, gamma=0.6)
    schedule = torch.optim.lr_scheduler.StepLR(fista, 30)
    values = []
    for _ in range(100):
        mask.grad = 0.6 * mask.detach().sign()
        fista.step()
        schedule.step()
        values.append(mask.item())
    assert next(i for i, v in enumerate(values, 1) if v == 0) == dies
    assert not any(values[dies:])
    if start == 1:
        at = [values[i - 1] for i in (1, 2, 5, 10, 20)]
        assert at == pytest.approx([0.988, 0.976, 0.920025, 0.762792, 0.215035], abs=1e-6)


def test_the_proximal_step_is_the_minimiser() -> None:
    assert shrink(torch.tensor([0.07, -0.2, 0.04]), 0.05).tolist() == pytest.approx([0.02, 0, 0])
    x = torch.linspace(0, 2, 20_001, dtype=torch.float64)
    for v in (-0.3, 0.02, 0.7, 1.4):
        best = x[((x - v) ** 2 / 2 + 0.1 * x).argmin()].item()
        assert shrink(torch.tensor(v, dtype=torch.float64), 0.1).item() == pytest.approx(best, abs=1e-4)


def test_a_mask_at_zero_comes_back_when_the_loss_wants_it() -> None:
    assert stepped([0.0], [-1.0], 1, lr=0.1, gamma=0.5)[1] == [[pytest.approx(0.05)]]
    assert stepped([0.0], [-0.4], 3, lr=0.1, gamma=0.5)[1] == [[0.0]] * 3


def test_fista_restarts_resumes_and_takes_a_closure() -> None:
    fista, _ = stepped([1.0, 0.2], [0.4, 0.1], 3, lr=0.1, gamma=0.5)
    mask = fista.param_groups[0]["params"][0]
    twin = nn.Parameter(mask.detach().clone())
    again = FISTA([twin], lr=0.5, gamma=0.0)
    again.load_state_dict(copy.deepcopy(fista.state_dict()))
    for optimizer, m in ((fista, mask), (again, twin)):

        def closure(m: nn.Parameter = m) -> Tensor:
            m.grad = None
            (0.4 * m).sum().backward()
            return m.sum()

        assert optimizer.step(closure=closure).item() == pytest.approx(0.7077369712)
    assert torch.equal(mask, twin)
    assert fista.state[mask]["m_prev"].tolist() == pytest.approx([0.7046421827, 0.0030947885])
    fista.step(restart=True)
    assert fista.state[mask]["alpha"] == 1
    with pytest.raises(ValueError, match=r"gamma=-1"):
        FISTA([mask], gamma=-1)


# ---- discriminator and losses


def test_the_discriminators() -> None:
    official = Discriminator(10, generator=torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in official.parameters()) == 67_457
    weights = torch.cat([p.flatten() for n, p in official.named_parameters() if n.endswith("weight")])
    assert weights.std().item() == pytest.approx(0.01, rel=0.02)
    assert not any(p.any() for n, p in official.named_parameters() if n.endswith("bias"))
    kinds = [type(m).__name__ for m in official]
    assert kinds == ["Linear"] * 4 + ["Sigmoid"]
    assert [type(m).__name__ for m in Discriminator(10, "plain")] == ["Linear", "ReLU"] * 3 + ["Linear"]


@pytest.mark.parametrize(("output", "expected"), [(0.0, 0.693147), (0.5, 0.474077), (1.0, 0.313262)])
def test_verdicts_of_a_double_sigmoid(output: float, expected: float) -> None:
    assert verdict(torch.full((4, 1), output), True).item() == pytest.approx(expected, abs=1e-6)
    assert verdict(torch.full((4, 1), output, dtype=torch.bfloat16), True).dtype == torch.float32


def test_the_discriminators_loss_at_the_start() -> None:
    d, logits = Discriminator(10, generator=torch.Generator().manual_seed(0)), torch.randn(32, 10)
    loss = discriminator_loss(d, logits, logits).item()
    assert loss == pytest.approx(1.922231, abs=1e-4)
    bare = verdict(d(logits), True) + verdict(d(logits), False)
    squares = sum(p.square().sum() for p in d.parameters())
    absolute = sum(p.abs().sum() for p in d.parameters())
    assert discriminator_loss(d, logits, logits, "l2").item() == pytest.approx((bare + squares).item())
    assert discriminator_loss(d, logits, logits, "l1").item() == pytest.approx((bare + absolute).item())
    x = logits.clone().requires_grad_()
    verdict(frozen(d, x), True).backward()
    assert x.grad is not None
    assert x.grad.any()
    assert all(p.grad is None for p in d.parameters())


# ---- what can be masked

NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, int, int]] = {
    "resnet56": (resnet56, "block", 27, 125_485_696),
    "resnet110": (resnet110, "block", 54, 252_887_680),
    "vgg16": (vgg16_cifar, "channel", 4736, 313_463_808),
    "densenet40": (densenet40, "input", 8904, 282_917_328),
    "googlenet": (googlenet_cifar, "branch", 36, 1_521_756_160),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_and_macs_of_the_papers_networks(name: str) -> None:
    build, kind, masks, macs = NETWORKS[name]
    network = build()
    points = find_points(network, torch.randn(2, 3, 32, 32))
    assert {p.kind for p in points} == {kind}
    assert sum(p.size for p in points) == masks
    assert all(m.training for m in network.modules()), "left as it was"
    cost = profile(network, (1, 3, 32, 32))
    assert cost.macs == macs
    if name == "vgg16":
        assert cost.paper_macs(bn_ops=0) == macs + 276_480
    if name == "densenet40":
        uniform = {p.unit for p in points if p.uniform}
        assert {p.unit for p in points} - uniform == {"trans1.conv", "trans2.conv"}


def test_joint_masks_of_resnet50() -> None:
    points = find_points(torchvision.models.resnet50(), torch.randn(1, 3, 32, 32), "joint")
    per_block = [[p.kind for p in points[i : i + 4]] for i in range(0, 64, 4)]
    assert per_block == [["block", "input", "channel", "channel"]] * 16
    assert [(p.at, p.front, p.size) for p in points[:4]] == [
        ("layer1.0.bn3", False, 1),
        ("layer1.0.conv1", True, 64),
        ("layer1.0.conv2", True, 64),
        ("layer1.0.conv3", True, 64),
    ]


def test_a_module_of_the_user_and_names_of_the_user() -> None:
    images = torch.randn(2, 1, 8, 8)
    assert [p.unit for p in find_points(foreign.Network(), images)] == ["blocks.0", "blocks.1"]
    channels = find_points(foreign.Network(), images, "channel")
    assert [(p.unit, p.at, p.size) for p in channels] == [
        ("blocks.0.conv1", "blocks.0.conv2", 12),
        ("blocks.1.conv1", "blocks.1.conv2", 12),
    ]
    named = find_points(foreign.Network(), images, ["blocks.1", "*0.conv1"])
    assert {p.unit for p in named} == {"blocks.1", "blocks.0.conv1"}
    with pytest.raises(ValueError, match=r"mask_points: 'blocks.7' matches no name. Did you mean 'blocks"):
        find_points(foreign.Network(), images, "blocks.7")
    with pytest.raises(MisconfigurationException, match=r"mask_points='branch': Network has nothing of the kind"):
        find_points(foreign.Network(), images, "branch")


# ---- what the papers' rows cost

ROWS = {
    "GAL-0.6 ResNet-56": (resnet56, (6, 4, 0), 78_299_776, 750_746),
    "GAL-0.8 ResNet-56": (resnet56, (9, 0, 7), 49_988_224, 293_082),
    "GAL-0.1 ResNet-110": (resnet110, (8, 2, 0), 205_701_760, 1_653_466),
}


@pytest.mark.parametrize("row", [r for r in card("gal").published if "ResNet-" in r.network and r.data == "CIFAR-10"],
                         ids=lambda row: f"{row.setting} {row.network}")  # fmt: skip
def test_published_rows_of_blocks(row: Row) -> None:
    """The number of blocks follows from the MACs; which ones from the parameters."""
    build, blocks, macs, params = ROWS[f"{row.setting} {row.network}"]
    network = build()
    points = find_points(network, torch.randn(1, 3, 32, 32))
    gone = [f"layer{s}.{i}" for s, count in enumerate(blocks, 1) for i in range(s > 1, count + (s > 1))]
    masks = {p.at: torch.tensor([0.0 if p.unit in gone else 1.0]) for p in points}
    cost = profile(cut_copy(network, plan_cut(network, torch.randn(1, 3, 32, 32), points, masks)), (1, 3, 32, 32))
    assert (cost.macs, cost.params) == (macs, params)
    assert round(cost.macs / 1e4) == round(row.result["macs"] / 1e4)
    assert cost.params == pytest.approx(row.result["params"], abs=5_000)


# ---- the cut

CUT: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "pad": (lambda: CIFARResNet(20), 3, "block"),
    "pad joint": (lambda: CIFARResNet(14), 3, "joint"),
    "projection joint": (lambda: CIFARResNet(14, shortcut="projection"), 3, "joint"),
    "torchvision": (lambda: torchvision.models.ResNet(BasicBlock, [2, 1, 1, 1]), 3, "block"),
    "bottleneck joint": (lambda: torchvision.models.ResNet(Bottleneck, [1, 2, 1, 1]), 3, "joint"),
    "vgg": (lambda: CIFARVGG(((8, 8), (12,), (16, 8))), 3, "channel"),
    "densenet": (lambda: CIFARDenseNet(13, 4), 3, "channel"),
    "densenet torchvision": (lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=10), 3, "channel"),
    "inceptions": (lambda: inceptions(), 3, "branch"),
    "foreign": (foreign.Network, 1, "joint"),
}


def inceptions() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    return nn.Sequential(Inception(3, 4, 2, 6, 2, 3, 5), nn.MaxPool2d(2), Inception(18, 6, 2, 8, 2, 6, 4), *head)


def randomise(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 1.2)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return network


def some_dead(points: list[Point], how: str) -> dict[str, Tensor]:
    """Half of all entries, every second of the scalars; all entries of every third layer; everything."""
    masks = {}
    for i, p in enumerate(points):
        dead = torch.rand(p.size) < 0.5 if p.size > 1 else torch.tensor([i % 2 == 1])
        if how == "whole layers":
            dead |= i % 3 == 0
        masks[p.at] = torch.where(dead, 0.0, 0.05) if how != "everything" else torch.zeros(p.size)
    return masks


@pytest.mark.parametrize("how", ["half", "whole layers", "everything"])
@pytest.mark.parametrize("name", CUT)
def test_the_cut_changes_nothing(name: str, how: str) -> None:
    seed_everything(0, verbose=False)
    build, channels, which = CUT[name]
    network = randomise(build()).eval()
    x = torch.randn(4, channels, 16, 16) if name != "vgg" else torch.randn(4, 3, 8, 8)
    points = find_points(network, x, which)
    masks = some_dead(points, how)
    small = cut_copy(network, plan_cut(network, x, points, masks))
    with torch.no_grad():
        with masking(network, points, masks):
            expected = network(x)
        found = small(x)
        assert (found - network(x)).abs().max() > 1e-3, "the masks do something"
    assert (found - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*network.modules(), *small.modules()))
    before, after = profile(network, x[:1]), profile(small, x[:1])
    assert (after.macs, after.params) < (before.macs, before.params)
    if name in ("inceptions", "densenet") and how == "half":
        torch.export.export(small.eval(), (x,), strict=False)


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_first_blocks_and_whole_stages_can_go(shortcut: str) -> None:
    seed_everything(0, verbose=False)
    network, x = randomise(CIFARResNet(20, shortcut=shortcut)).eval(), torch.randn(4, 3, 16, 16)
    points = find_points(network, x)
    gone = {"layer1.0", "layer2.0", "layer2.1", "layer2.2", "layer3.0"}
    masks = {p.at: torch.tensor([0.0 if p.unit in gone else 0.05]) for p in points}
    small = cut_copy(network, plan_cut(network, x, points, masks))
    with torch.no_grad(), masking(network, points, masks):
        assert (small(x) - network(x)).abs().max() < 1e-6
    left = {n.rpartition(".")[0] for n, m in small.named_modules() if isinstance(m, nn.Conv2d)} - {""}
    kept = {f"layer{s}.{i}" for s in (1, 2, 3) for i in range(3)} - gone
    if shortcut == "projection":
        kept |= {"layer2.0.shortcut", "layer3.0.shortcut"}
    assert left == kept


def test_the_branch_that_stays_is_the_one_of_the_largest_mask() -> None:
    network, x = randomise(googlenet_cifar()).eval(), torch.randn(1, 3, 16, 16)
    points = find_points(network, x)
    masks = {p.at: torch.ones(1) for p in points} | {p.at: torch.zeros(1) for p in points if p.unit.startswith("a4.")}
    masks["a4.branch5x5"] += 0.02
    plan = plan_cut(network, x, points, masks, thre=0.05)
    assert plan.branches == ["a4.branch1x1", "a4.branch3x3", "a4.branch_pool"]
    small = cut_copy(network, plan)
    assert [n for n, _ in small.a4.named_children()] == ["branch5x5"]
    assert small.b4.branch1x1.out.conv.in_channels == 48
    assert small.linear.in_features == 1024
    masks["b5.branch3x3"] = torch.zeros(1)
    assert cut_copy(network, plan_cut(network, x, points, masks)).linear.in_features == 1024 - 384


def test_selected_inputs() -> None:
    network, x = CIFARDenseNet(10, 4), torch.randn(2, 3, 8, 8)
    points = find_points(network, x)
    masks = {p.at: torch.ones(p.size) for p in points}
    masks["dense2.0.conv"][::2] = 0
    small = cut_copy(network, plan_cut(network, x, points, masks))
    conv = small.dense2[0].conv
    assert isinstance(conv, SelectConv2d)
    assert conv.index.tolist() == list(range(1, masks["dense2.0.conv"].numel(), 2))
    assert conv.in_channels == len(conv.index) == conv.weight.shape[1]
    assert small.dense2[0].bn.num_features == len(masks["dense2.0.conv"]), "others read it, too"
    assert type(network.dense2[0].conv) is nn.Conv2d
    assert small.state_dict().keys() == network.state_dict().keys()


def test_what_cannot_be_folded_is_refused() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.conv(x)) ** 2).mean((2, 3))

    network, x = Squared(), torch.randn(2, 1, 8, 8)
    with pytest.raises(MisconfigurationException, match="mask_points: masks of Squared cannot be folded"):
        rehearse(network, x, find_points(network, x))


# ---- masks


def test_initial_masks() -> None:
    points = [Point("a", "channel", "a", 4000), Point("b", "input", "b", 4000, uniform=True)]
    for init, first, second in (("official", 0.0, 0.5), ("normal", 0.0, 0.0), ("uniform", 0.5, 0.5), ("ones", 1, 1)):
        masks = Search(points, 10, "official", init).named()  # type: ignore[arg-type]
        assert masks["a"].mean().item() == pytest.approx(first, abs=0.05)
        assert masks["b"].mean().item() == pytest.approx(second, abs=0.05)
    one, two, three = (Search(points, 10, "official", seed=s).flat() for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_a_picture_of_the_masks() -> None:
    points = [Point(f"{stage}.{i}.bn", "block", f"{stage}.{i}") for stage, n in (("a", 3), ("b", 1)) for i in range(n)]
    points += [Point("c.conv", "channel", "c", 2)]
    masks = dict(zip([p.at for p in points], map(torch.tensor, ([1.0], [0.0], [2.0], [3.0], [4.0, 5.0])), strict=True))
    values, rows = mask_map(points, masks)
    assert rows == ["a", "b", "c.conv"]
    nan = float("nan")
    expected = torch.tensor([[1, nan, 2], [3, nan, nan], [5, 4, nan]])
    torch.testing.assert_close(values, expected, equal_nan=True)


def test_masks_multiply_in_the_precision_of_the_network() -> None:
    network, x = resnet20().bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    points = find_points(network, x)
    with masking(network, points, {p.at: torch.rand(1) for p in points}):
        assert network(x).dtype == torch.bfloat16


# ---- the module

SHAPE = {"input_shape": (1, 8, 8)}


def made(seed: int = 1, **arguments: Any) -> GAL:
    torch.manual_seed(seed)
    return GAL(CIFARResNet(14, in_channels=1), **{**SHAPE, "mask_step": 1, "search_epochs": 2, **arguments})


def fit(module: GAL, root: Path, *callbacks: Any, data: Any = None, **arguments: Any) -> Trainer:
    seed_everything(0, verbose=False)
    path = arguments.pop("ckpt_path", None)
    trainer = foreign.make_trainer(root, *callbacks, **{"max_epochs": 3, **arguments})
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits() if data is None else data, foreign.digits(32, 64), ckpt_path=path)
    return trainer


def saved(root: Path) -> ModelCheckpoint:
    return ModelCheckpoint(root, "{epoch}", save_top_k=-1)


def test_a_step_is_the_authors_step(tmp_path: Path) -> None:
    """D step, then three backward passes into the same gradients, W's step, and FISTA's: written out."""
    module = made(search_epochs=None, lr=0.05, weight_decay=1e-3)
    network, teacher = copy.deepcopy(module.network), copy.deepcopy(module.network).eval()
    trainer = fit(module, tmp_path, max_epochs=2, limit_train_batches=2)
    search = Search(module.search.points, 10, "official", "official", 0)
    sgd = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    to_d = torch.optim.SGD(search.discriminator.parameters(), **sgd)
    to_w = torch.optim.SGD(network.parameters(), **sgd)
    to_m = FISTA(search.masks.values(), lr=0.05, gamma=0.6)
    for _ in range(2):
        for images, _labels in list(foreign.digits())[:2]:
            a = teacher(images).detach()
            with search.masking(network):
                b = network(images)
            h = F.binary_cross_entropy_with_logits
            d, one, zero = search.discriminator, torch.ones(16, 1), torch.zeros(16, 1)
            to_d.zero_grad()
            (h(d(a), one) + h(d(b.detach()), zero) + h(d(b.detach()), one)).backward()
            to_d.step()
            to_w.zero_grad()
            to_m.zero_grad()
            F.mse_loss(b, a).backward(retain_graph=True)
            h(d(b), one).backward(retain_graph=True)
            (0.6 * search.flat().abs().sum()).backward()
            to_w.step()
            to_m.step()
    torch.testing.assert_close(search.flat(), module.search.flat(), atol=1e-5, rtol=1e-4)
    for (name, ours), theirs in zip(module.network.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=name)
    assert trainer.optimizers[2].param_groups[0]["params"][0].min() >= 0


def test_at_the_start_a_network_with_masks_of_one_is_its_teacher(tmp_path: Path) -> None:
    module = made(mask_init="ones", lambda_=0.0, search_epochs=None, lr=0.0)
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(torch.as_tensor(value).detach())})
    module.on_train_batch_start = lambda *_: module.network.eval() and None  # type: ignore[method-assign]
    fit(module, tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    assert logged["train/gal/data"] < 1e-12
    assert logged["train/gal/discriminator"] == pytest.approx(1.922231, abs=1e-4)
    assert logged["train/gal/adversarial"] == pytest.approx(0.474077, abs=1e-4)
    assert logged["train/gal/l1"] == 6
    assert logged["gal/survivors"] == 6


def test_the_search_looks_at_no_label(tmp_path: Path) -> None:
    x, y = (torch.cat(part) for part in zip(*foreign.digits(), strict=True))
    loaders = (TensorDataset(x, y), TensorDataset(x, y.flip(0)), x)
    searched = []
    for i, data in enumerate(loaders):
        module = made(search_epochs=None)
        fit(module, tmp_path / str(i), data=DataLoader(data, 16), max_epochs=2)
        searched.append(module)
    foreign.assert_same(searched[0].network, searched[1].network)
    foreign.assert_same(searched[0], searched[2])
    assert not torch.equal(searched[0].search.flat(), made().network.linear.weight.new_zeros(6))


def test_a_larger_lambda_leaves_less(tmp_path: Path) -> None:
    left = []
    for lambda_ in (0.0, 2.0, 8.0):
        module = made(search_epochs=None, lambda_=lambda_, lr=0.02, mask_points="joint")
        fit(module, tmp_path, max_epochs=1, limit_val_batches=0)
        left.append(int((module.search.flat() > 0).sum()))
    assert left == sorted(left, reverse=True)
    assert len(set(left)) == 3, left


def test_masked_cut_and_pruned_networks_agree_in_the_fit(tmp_path: Path) -> None:
    module, x = made(mask_points="joint"), next(iter(foreign.digits()))[0]
    seen: dict[str, Tensor] = {}
    cut = module._cut

    def watched() -> None:
        pruned = module.prune().eval()
        module.eval()
        with torch.no_grad():
            seen["masked"], seen["pruned"] = module(x), pruned(x)
            module.train()
            cut()
            module.eval()
            seen["cut"] = module(x)
        module.train()

    module._cut = watched  # type: ignore[method-assign]
    trainer = fit(module, tmp_path)
    torch.testing.assert_close(seen["pruned"], seen["masked"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen["cut"], seen["pruned"], atol=0, rtol=0)
    assert module.search is None
    assert module.teacher is None
    assert len(trainer.optimizers) == 1
    account = Account.load(tmp_path)
    assert account.before.params == sum(p.numel() for p in made().parameters())
    assert account.after.params == sum(p.numel() for p in module.parameters())
    assert "masks survived the search" in account.notes[0]


def test_what_was_cut_comes_back_for_a_dense_checkpoint(tmp_path: Path) -> None:
    module, x = made(mask_points="joint", search_epochs=1), next(iter(foreign.digits()))[0]
    fit(module, tmp_path, max_epochs=2)
    dense = made(seed=7)
    assert foreign.widths(module) != foreign.widths(dense)
    module.load_state_dict(dense.state_dict())
    foreign.assert_same(module, dense)
    assert torch.equal(module.eval()(x), dense.eval()(x))
    assert module.phase == "training"


def test_a_fit_that_ends_in_the_search(tmp_path: Path) -> None:
    module = GAL("resnet20", **{**SHAPE, "mask_step": 1, "search_epochs": None})  # type: ignore[arg-type]
    fit(module, tmp_path, saved(tmp_path), max_epochs=1)
    small = module.prune()
    assert Account.load(tmp_path).after.params == sum(p.numel() for p in small.parameters())
    assert Account.load(tmp_path).before.params == 269_434
    x = torch.randn(2, 1, 8, 8)
    again = lightning_compress.load(GAL, tmp_path / "epoch=0.ckpt")
    foreign.assert_same(again, module)
    torch.testing.assert_close(again.prune().eval()(x), module.eval()(x), atol=1e-5, rtol=1e-5)
    same = lightning_compress.load(GAL, tmp_path / "epoch=0.ckpt", search_epochs=0)
    trainer = fit(same, tmp_path / "cut", max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert trainer.current_epoch == 2
    assert foreign.widths(same.network) == foreign.widths(small), "cut at once, then fine-tuned"


def test_three_phases_with_optimisers_and_schedules_of_their_own(tmp_path: Path) -> None:
    rates: list[list[float]] = []

    class Rates(foreign.Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates.append([round(o.param_groups[0]["lr"], 8) for o in trainer.optimizers])

    module = made(
        start_epoch=1,
        search_epochs=3,
        lr=0.02,
        lr_decay_step=2,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    )
    fit(module, tmp_path, Rates(), max_epochs=6, limit_train_batches=1)
    assert rates == [[0.1], [0.02] * 3, [0.02] * 3, [0.002] * 3, [0.1], [0.05]]


@pytest.mark.parametrize(
    ("interval", "schedule", "expected"),
    [
        ("step", lambda o: torch.optim.lr_scheduler.StepLR(o, 1), [0.1, 0.01, 0.001, 0.0001]),
        (
            "epoch",
            lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1),
            [0.1, 0.1, 0.01, 0.01],
        ),
    ],
    ids=["step", "plateau"],
)
def test_schedules_by_steps_and_by_a_metric(
    interval: Any, schedule: Any, expected: list[float], tmp_path: Path
) -> None:
    rates: list[float] = []

    class Rates(foreign.Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    start = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "lr_scheduler": schedule}
    module = made(start_epoch=2, search_epochs=None, lr_scheduler_interval=interval, **start)
    fit(module, tmp_path, Rates(), max_epochs=3, limit_train_batches=2)
    assert rates[:4] == pytest.approx(expected)


def test_fista_restarts_with_the_decay_if_asked(tmp_path: Path) -> None:
    for restart, expected in ((False, [1.0, 1.618, 2.194, 2.75]), (True, [1.0, 1.618, 1.0, 1.618])):
        alphas: list[float] = []

        class Alphas(foreign.Callback):
            def on_train_batch_end(self, trainer: Trainer, *args: Any, alphas: list[float] = alphas) -> None:
                fista = trainer.optimizers[2]
                alphas += [round(next(iter(fista.state.values()))["alpha"], 3)]

        module = made(search_epochs=None, lr_decay_step=1, restart_on_decay=restart)
        fit(module, tmp_path, Alphas(), max_epochs=2, limit_train_batches=2)
        assert alphas == pytest.approx(expected, abs=2e-3)


def test_masks_are_updated_in_every_mask_step_of_an_epoch(tmp_path: Path) -> None:
    flats: list[Tensor] = []

    class Flats(foreign.Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: GAL, *args: Any) -> None:
            flats.append(pl_module.search.flat().detach().clone())

    fit(made(search_epochs=None, mask_step=3), tmp_path, Flats(), max_epochs=2)
    changed = [not torch.equal(a, b) for a, b in pairwise(flats)]
    assert changed == [False, True, False, False, False, True, False]
    with pytest.warns(UserWarning, match=r"mask_step=200\): an epoch has 4 batches, so the masks are never updated"):
        fit(made(search_epochs=None, mask_step=200), tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="some masks are negative"):
        fit(made(search_epochs=1, mask_step=200), tmp_path, max_epochs=2)


def test_the_masks_do_not_decay_and_the_discriminator_is_no_part_of_ddp(tmp_path: Path) -> None:
    module = made(search_epochs=None)
    trainer = fit(module, tmp_path, max_epochs=1)
    to_d, to_w, to_m = trainer.optimizers
    assert isinstance(to_m, FISTA)
    assert {id(p) for p in to_m.param_groups[0]["params"]} == {id(p) for p in module.search.masks.values()}
    assert {id(p) for p in to_w.param_groups[0]["params"]} == {id(p) for p in module.network.parameters()}
    assert (to_w.param_groups[0]["weight_decay"], to_d.param_groups[0]["weight_decay"]) == (2e-4, 2e-4)
    names = {f"search.discriminator.{n}" for n, _ in module.search.discriminator.named_parameters()}
    assert set(module._ddp_params_and_buffers_to_ignore) == names


def test_masks_are_updated_by_the_gradient_that_was_not_scaled() -> None:
    flats = []
    for scale in (1.0, 1024.0):
        module = made()
        begin_search(module, **module._search_arguments())
        module._trainer = SimpleNamespace(world_size=1, current_epoch=0)
        fista = FISTA(module.search.masks.values(), lr=0.1, gamma=0.6)
        for mask in module.search.masks.values():
            mask.grad = torch.full((1,), -0.7 * scale)
        module._update_masks(fista, scale, first=True)
        flats.append(module.search.flat())
        module.search.masks["layer1/0/bn2"].grad.fill_(torch.inf)  # fp16 training leaves such a step out
        module._update_masks(fista, scale, first=False)
        assert torch.equal(module.search.flat(), flats[-1])
    assert torch.equal(*flats)


def test_callbacks_can_add_terms_to_its_loss(tmp_path: Path) -> None:
    module, batches = made(search_epochs=1), []
    term = add_loss_term(module, "test", "count", lambda loss, batch, i: batches.append(i) or 0 * loss)
    fit(module, tmp_path, max_epochs=2)
    term.remove()
    assert batches == [0, 1, 2, 3] * 2


# ---- the teacher


def test_the_teacher_is_frozen_and_outside(tmp_path: Path) -> None:
    module = made(search_epochs=None)
    before = copy.deepcopy(module.network)
    fit(module, tmp_path, saved(tmp_path), max_epochs=1)
    foreign.assert_same(module.teacher, before)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert not module.teacher.training
    assert not any("teacher" in key for key in module.state_dict())
    entry = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["gal_teacher"]
    assert entry["state_dict"].keys() == before.state_dict().keys(), "no file has it"

    official = made(search_epochs=None, teacher_train_bn=True)
    fit(official, tmp_path, max_epochs=1)
    assert not torch.equal(official.teacher.bn1.running_mean, before.bn1.running_mean)
    assert torch.equal(official.teacher.bn1.weight, before.bn1.weight)


def test_a_teacher_from_a_file(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(2)
    weights = CIFARResNet(14, in_channels=1)
    torch.save(weights.state_dict(), tmp_path / "teacher.pt")
    module = made(search_epochs=None, teacher=str(tmp_path / "teacher.pt"))
    fit(module, tmp_path, saved(tmp_path), max_epochs=1)
    foreign.assert_same(module.teacher, weights)
    entry = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["gal_teacher"]
    assert entry.keys() == {"path", "sha256"}
    again = made(search_epochs=None, teacher=str(tmp_path / "teacher.pt"))
    fit(again, tmp_path, max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert not any("not the one" in str(w.message) for w in recwarn)
    torch.manual_seed(3)
    torch.save(CIFARResNet(14, in_channels=1).state_dict(), tmp_path / "teacher.pt")
    with pytest.warns(UserWarning, match=r"the teacher is not the one that this run began with \(.*teacher.pt"):
        fit(made(search_epochs=None, teacher=str(tmp_path / "teacher.pt")), tmp_path, max_epochs=2,
            ckpt_path=tmp_path / "epoch=0.ckpt")  # fmt: skip


def test_a_teacher_that_is_another_network(tmp_path: Path) -> None:
    teacher = foreign.Network()
    module = made(search_epochs=1, teacher=teacher)
    fit(module, tmp_path, max_epochs=2)
    assert teacher.head.weight.grad is None
    assert "teacher" not in module.hparams
    assert not any("head" in name for name, _ in module.named_parameters())


# ---- what cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambda_": -0.1}, r"GAL\(lambda_=-0.1\)"),
        ({"miu": -1}, r"GAL\(miu=-1\)"),
        ({"mask_step": 0}, r"GAL\(mask_step=0\): give a number of at least 1"),
        ({"search_epochs": -1}, r"GAL\(search_epochs=-1\)"),
        ({"thre": -1}, r"GAL\(thre=-1\)"),
        ({"mask_init": "zeros"}, r"mask_init='zeros'\): give one of 'official', 'normal'"),
        ({"discriminator_variant": "deep"}, "discriminator_variant='deep'"),
        ({"discriminator_regularizer": "l3"}, "discriminator_regularizer='l3'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**arguments)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"teacher: CIFARResNet gives \(7,\) logits"):
        fit(made(teacher=CIFARResNet(8, 7, in_channels=1)), tmp_path)
    with pytest.raises(ValueError, match=r"nowhere\.pt' does not exist"):
        fit(made(teacher="nowhere.pt", start_epoch=1), tmp_path)
    module = made()
    module.configure_optimizers = lambda: None  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="GAL makes the optimisers of its search itself"):
        fit(module, tmp_path)


def test_fits_that_cannot_be(tmp_path: Path) -> None:
    for arguments, message in (
        ({"start_epoch": 3}, r"start_epoch=3\) never happens: the Trainer stops after max_epochs=3"),
        ({"mask_points": "branch"}, "mask_points='branch'"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            fit(made(**arguments), tmp_path)
    with pytest.warns(UserWarning, match=r"search_epochs=5\): the Trainer stops after max_epochs=1, before the cut"):
        fit(made(search_epochs=5), tmp_path, max_epochs=1)
    module = made(lambda_=1000.0, search_epochs=1)
    with pytest.warns(UserWarning, match=r"lambda_=1000.0\): no mask is left"):
        fit(module, tmp_path, max_epochs=2)
    assert module.network.linear.weight.isfinite().all()
    assert len(attach_record(module).steps) == 1


# ---- real data


@pytest.mark.real_data
def test_a_larger_lambda_leaves_fewer_blocks_of_the_public_resnet56_and_the_cut_is_exact(tmp_path: Path) -> None:
    weights = "weights/resnet56-cifar10.pt"
    root = real_data("cifar10.npz", weights)
    data = CIFAR10(root, batch_size=8, eval_batch_size=8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    left = []
    for lambda_ in (0.6, 3.0, 10.0):
        module = GAL("resnet56", weights=str(root / weights), mask_step=1, search_epochs=None, lambda_=lambda_)
        trainer = foreign.make_trainer(tmp_path, max_epochs=1, limit_train_batches=4, limit_val_batches=0)
        with foreign.no_pictures:
            trainer.fit(module, data)
        small, x = module.prune().eval(), next(iter(data.val_dataloader()))[0]
        with torch.no_grad():
            expected = module.eval()(x)
            assert (small(x) - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
        left.append(sum(type(m).__name__ == "BasicBlock" for m in small.modules()))
    assert 27 > left[0] > left[1] > left[2] > 0
