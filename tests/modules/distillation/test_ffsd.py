"""FFSD: its formulas by hand, its modules by their sizes, the step against the authors' sequence, the whole fit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
import torchvision
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks import L1Norm
from lightning_compress.catalog import card
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.core.distill.losses import soft_targets
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.losses import add_loss_term
from lightning_compress.core.profile import profile
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import FFSD, ImageClassifier
from lightning_compress.modules.distillation.ffsd import Fusion, SelfDistillation, TransFusion
from lightning_compress.modules.distillation.ffsd.losses import (
    distance,
    diversity,
    imposed,
    inverted,
    ramp_up,
    reproduced,
    shifted,
    strength,
)
from lightning_compress.modules.distillation.ffsd.maps import find_maps
from lightning_compress.modules.distillation.ffsd.parts import initialise
from lightning_compress.networks import CIFARResNet, CIFARWideResNet, densenet40, googlenet_cifar, resnet20

DOWN = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).view(1, 1, 2, 3)
UP = DOWN.flip(2, 3)
TINY = functools.partial(CIFARResNet, 8, 10, 1, widths=(4, 4, 8, 8))
SHAPE = (1, 12, 12)


def tiny(seed: int = 0, **arguments: Any) -> FFSD:
    torch.manual_seed(seed)
    return FFSD(**{"network": TINY, "input_shape": SHAPE, "warmup_epochs": 0, **arguments})


def batch(count: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator), torch.arange(count) % 10


# ---- formulas


def test_distance_by_hand() -> None:
    assert distance(DOWN, UP).item() == pytest.approx(0.1282051, abs=1e-7)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_distance_does_not_see_scale(scale: float) -> None:
    x, y = torch.rand(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    assert distance(scale * x, y).item() == pytest.approx(distance(x, y).item(), rel=1e-5)


def test_diversity_by_hand() -> None:
    target = inverted(UP)
    assert UP.norm().item() == pytest.approx(9.539392, abs=1e-6)
    expected = torch.tensor([[0.104828, 4.769696, 9.224908, 9.120080, 9.015251, 8.910423]])
    torch.testing.assert_close(target, expected, atol=2e-6, rtol=0)
    assert diversity(DOWN, UP).item() == pytest.approx(54.742222, abs=1e-5)


def test_diversity_is_least_on_what_the_other_does_not_attend_alone() -> None:
    """Its minimum has the shape of the target: nearly flat where the other is strong, next to nothing elsewhere."""
    generator = torch.Generator().manual_seed(3)
    other = 5 * torch.rand(1, 1, 4, 4, generator=generator)
    best = diversity(inverted(other).view_as(other), other)
    assert all(diversity(torch.rand(1, 1, 4, 4, generator=generator), other) > best for _ in range(200))
    weakest = other.flatten().argsort()[:4]
    assert (inverted(other)[0, weakest] < 0.3).all()
    assert (inverted(other)[0].sort().values[5:] > 5).all()


def test_shifted_by_hand() -> None:
    moved = shifted(UP.sqrt().repeat(1, 2, 1, 1))
    expected = torch.tensor([1.0, 23.1642, 44.2321, 43.5, 42.7361, 41.9495]).view(1, 1, 2, 3).repeat(1, 2, 1, 1)
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=0)


def test_attention_moves_by_the_formula_of_signs() -> None:
    """(n/2 - a) sign(a - threshold) + n/2, also where ties, of which ReLUs make many, are the threshold."""
    maps = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(2)).relu()
    maps[0, :, :2] = 0  # its threshold is zero
    flat = strength(maps).flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    a = flat / norm
    threshold = a.kthvalue(16 // 3, dim=1, keepdim=True).values
    torch.testing.assert_close(inverted(strength(maps)), (norm / 2 - a) * (a - threshold).sign() + norm / 2)
    assert torch.equal(inverted(strength(maps))[0, :8], (norm[0] / 2).expand(8))


def test_maps_of_zeros_are_no_nans() -> None:
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    own = torch.rand(2, 3, 4, 4, requires_grad=True)
    total = distance(zeros, own) + diversity(strength(own), strength(zeros)) + diversity(strength(zeros), strength(own))
    (total + shifted(zeros.detach()).sum()).backward()
    for gradient in (zeros.grad, own.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
    assert torch.equal(shifted(zeros.detach()), torch.zeros(2, 3, 4, 4))


def test_weights_rise_over_five_epochs() -> None:
    factors = [ramp_up(epoch) for epoch in range(1, 8)]
    assert factors == pytest.approx([0.040762, 0.165299, 0.449329, 0.818731, 1.0, 1.0, 1.0], abs=1e-6)
    assert ramp_up(1, 0) == 1


def test_mutual_term_by_hand() -> None:
    a, b = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    assert soft_targets(a, b, 2.0).item() == soft_targets(b, a, 2.0).item() == pytest.approx(1.4567014, abs=1e-6)


def test_distances_stay_in_float32() -> None:
    """Squares of 300 do not fit float16."""
    x, y = (300 * torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(s)).half() for s in range(2))
    moved = diversity(strength(x), strength(y))
    for value in (distance(x, y), moved, shifted(x), imposed([x, x], [y]), reproduced([x], [y, y])):
        assert value.dtype == torch.float32
        assert value.isfinite().all()


# ---- modules


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_modules_are_as_large_as_the_authors() -> None:
    assert params(Fusion(128, 64, 100)) == 16_228
    assert params(TransFusion(64, 128)) == 9_152
    assert params(SelfDistillation([64, 32, 16])) == 23_136


def test_shapes_of_the_modules() -> None:
    made = SelfDistillation([64, 32, 16])(torch.rand(2, 64, 8, 8))
    assert [m.shape for m in made] == [(2, 32, 16, 16), (2, 16, 32, 32)]  # of layer2, then of layer1
    fused, logits = Fusion(128, 64, 100)(torch.rand(2, 128, 8, 8))
    assert (fused.shape, logits.shape) == ((2, 64, 8, 8), (2, 100))
    assert TransFusion(64, 128)(torch.rand(2, 64, 8, 8)).shape == (2, 128, 8, 8)


def test_initial_weights_are_those_of_the_authors_code() -> None:
    torch.manual_seed(0)
    depthwise, pointwise = (Fusion(512, 256, 10).layers[i].weight for i in (0, 3))
    assert depthwise.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.05)
    assert pointwise.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    network = resnet20()
    initialise(network)
    assert network.layer3[0].conv1.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert network.linear.weight.abs().max() <= 1 / 8  # torch's own, uniform
    official, own = tiny(init="official"), tiny()
    assert not torch.equal(official.network.linear.weight, own.network.linear.weight)
    assert (official.students[0].layer1[0].bn1.weight == 1).all()


def test_a_look_in_eval_mode_changes_nothing() -> None:
    module = SelfDistillation([8, 4, 2])
    before, x = copy.deepcopy(module.state_dict()), torch.rand(4, 8, 3, 3)
    made = module.judge(x)
    assert all(m.training for m in module.modules())
    assert not any(m.requires_grad for m in made)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    torch.testing.assert_close(made, module.eval()(x))


CIFAR = (3, 32, 32)
# arXiv:2103.14473: network, its maps, (c, h), channels of self-distillation, parameters deployed, MACs, input
PUBLISHED: dict[str, tuple[Any, ...]] = {
    **{
        f"resnet{depth}": (functools.partial(CIFARResNet, depth, 100, shortcut="projection"), "layer?", (64, 8),
                           [64, 32, 16], count, macs, CIFAR)
        for depth, count, macs in (
            (20, 278_324, 40_818_944), (32, 472_756, 69_130_496), (56, 861_620, 125_753_600)
        )
    },
    **{
        f"wrn_{depth}_2": (functools.partial(CIFARWideResNet, depth, 2, 100, variant="biased"),
                           ["layer1", "layer2", "relu"], (128, 8), [128, 64, 32], count, macs, CIFAR)
        for depth, count, macs in ((16, 704_420, 129_430_016), (40, 2_258_084, 355_922_432))
    },
    "densenet40": (functools.partial(densenet40, 100), ["dense1", "dense2", "relu"], (456, 8), [456, 312, 168],
                   1_100_428, 282_958_368, CIFAR),
    "googlenet": (functools.partial(googlenet_cifar, 100), ["b3", "e4", "b5"], (1024, 8), [1024, 832, 480],
                  6_258_500, 1_521_845_248, CIFAR),
    "resnet18_imagenet": (torchvision.models.resnet18, "layer?", (512, 7), [512, 256, 128, 64],
                          11_689_512, 1_814_073_344, (3, 224, 224)),
    "resnet34_imagenet": (torchvision.models.resnet34, "layer?", (512, 7), [512, 256, 128, 64],
                          21_797_672, 3_663_761_408, (3, 224, 224)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_of_the_paper(name: str) -> None:
    make, layers, (channels, size), widths, count, macs, shape = PUBLISHED[name]
    classes = 100 if shape == CIFAR else 1000
    with torch.device("meta"):
        module = FFSD(make, classes, layers, input_shape=shape)
    deepest = module.map_shapes[-1]
    assert deepest == (channels, size, size)
    stages = module.self_distillation[0].stages
    assert [stages[0][0].in_channels, *(stage[0].out_channels for stage in stages)] == widths
    assert params(module.network) == count
    assert profile(module.network, (1, *shape)).macs == pytest.approx(macs, rel=1e-9 if name != "googlenet" else 1e-3)
    beside = 9 * channels + 2 * channels + channels * 2 * channels + 4 * channels
    assert params(module.network) + params(module.trans_fusion) == count + beside
    assert (
        beside == 9_152 or not name.startswith("resnet") or shape != CIFAR
    )  # 287,476, 481,908 and 870,772 in training


# ---- the step


def reference(module: FFSD, images: Tensor, labels: Tensor, lambdas: tuple[float, float, float]) -> dict[str, Tensor]:
    """The losses, written down once more in the order of the paper, without this package."""
    div, fus, sd = lambdas
    seen: dict[nn.Module, tuple[Tensor, list[Tensor]]] = {}
    for net in (module.network, *module.students):
        x = net.relu(net.bn1(net.conv1(images)))
        maps = []
        for layer in (net.layer1, net.layer2, net.layer3):
            x = layer(x)
            maps.append(x)
        seen[net] = net.linear(x.mean((2, 3))), maps

    def a(f: Tensor) -> Tensor:
        return f.pow(2).mean(1)

    def n(f: Tensor) -> Tensor:
        return f.flatten(1) / f.flatten(1).norm(dim=1, keepdim=True)

    def d(x: Tensor, y: Tensor) -> Tensor:
        return (n(x) - n(y)).pow(2).mean()

    def kl(target: Tensor, own: Tensor) -> Tensor:
        p, q = (F.softmax(z / 2, 1) for z in (target.detach(), own))
        return 4 * (p * (p.log() - q.log())).sum(1).mean()

    def made(net: SelfDistillation, x: Tensor) -> list[Tensor]:
        """With the statistics that training has gathered."""
        out = []
        for conv, bn, _ in net.stages:
            x = F.conv_transpose2d(x, conv.weight, stride=2, padding=1, output_padding=1)
            shape = (1, -1, 1, 1)
            x = (x - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
            x = (x * bn.weight.view(shape) + bn.bias.view(shape)).relu()
            out.append(x.detach())
        return out

    students = [seen[net] for net in module.students]
    losses = {}
    for i, (logits, maps) in enumerate(students):
        loss = F.cross_entropy(logits, labels)
        loss = loss + sum(kl(o, logits) for j, (o, _) in enumerate(students) if j != i) / (len(students) - 1)
        if i:
            other = students[i - 1][1][-1].detach()
            flat = a(other).flatten(1)
            norm = flat.norm(dim=1, keepdim=True)
            threshold = n(a(other)).kthvalue(flat.shape[1] // 3, dim=1, keepdim=True).values
            target = (norm / 2 - n(a(other))) * (n(a(other)) - threshold).sign() + norm / 2
            moved = other + ((target - n(a(other))) * norm / other.shape[1]).view(len(other), 1, *other.shape[2:])
            h = made(module.self_distillation[i - 1], moved)
            part = (n(a(maps[-1])) - target).pow(2).mean() + d(a(maps[1]), a(h[0])) + d(a(maps[0]), a(h[1]))
            loss = loss + div * part
        losses[f"student_{i}"] = loss
    z = torch.cat([maps[-1] for _, maps in students], 1).detach()
    q, fused = module.fusion(z)
    mean = sum(logits for logits, _ in students) / len(students)
    losses["fusion"] = F.cross_entropy(fused, labels) + kl(mean, fused)
    logits, maps = seen[module.network]
    h = made(module.self_distillation[-1], q)
    part = d(a(maps[-1]), a(q.detach())) + d(a(module.trans_fusion(maps[-1])), a(z))
    part = part + d(a(maps[1]), a(h[0])) + d(a(maps[0]), a(h[1]))
    losses["leader"] = F.cross_entropy(logits, labels) + kl(fused, logits) + fus * part
    total = torch.zeros(())
    for net, (_, own) in zip(module.self_distillation, [*students[1:], seen[module.network]], strict=True):
        for h_k, f_k in zip(net(own[-1].detach()), [own[1].detach(), own[0].detach()], strict=True):
            total = total + d(h_k, f_k) + d(a(h_k), a(f_k))
    losses["self_distillation"] = sd * total
    return losses


@pytest.mark.parametrize("num_students", [2, 3])
def test_losses_are_those_of_the_paper(num_students: int) -> None:
    lambdas = (1e-2, 10.0, 1000.0)  # more diversity, to see it
    module = tiny(
        num_students=num_students, lambda_diversity=lambdas[0], lambda_fusion=lambdas[1],
        lambda_self_distillation=lambdas[2],
    )  # fmt: skip
    for net in module.self_distillation:  # statistics that are not those of the start
        net(torch.randn(8, 8, 3, 3))
    other = copy.deepcopy(module)
    ours, logits = module.losses(*batch())
    theirs = reference(other, *batch(), lambdas)
    assert ours.keys() == theirs.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-6)
    assert logits.shape == (8, 10)
    mine, other_parameters = list(module.parameters()), list(other.parameters())
    torch.stack(list(ours.values())).sum().backward()
    torch.stack(list(theirs.values())).sum().backward()
    for one, two in zip(mine, other_parameters, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5 * float(two.grad.abs().max()) + 1e-7)


def owned(module: FFSD) -> dict[str, list[nn.Parameter]]:
    """What each loss trains."""
    students = {f"student_{i}": list(s.parameters()) for i, s in enumerate(module.students)}
    leader = [*module.network.parameters(), *module.trans_fusion.parameters()]
    makers = list(module.self_distillation.parameters())
    return {
        **students, "fusion": list(module.fusion.parameters()), "leader": leader, "self_distillation": makers
    }  # fmt: skip


def test_no_loss_reaches_what_another_trains() -> None:
    module = tiny(num_students=3)
    losses, _ = module.losses(*batch())
    parts = owned(module)
    for loss in losses:
        for part, parameters in parts.items():
            gradients = torch.autograd.grad(losses[loss], parameters, retain_graph=True, allow_unused=True)
            reached = [g is not None and bool(g.any()) for g in gradients]
            assert all(g is not None for g in gradients) if part == loss else not any(reached), (loss, part)
    assert sum(len(p) for p in parts.values()) == len(list(module.parameters()))


def test_one_backward_pass_is_the_authors_sequence_bit_for_bit(tmp_path: Path) -> None:
    """Theirs has a backward pass and an optimiser for each student, the fusion, the leader, and the rest of them."""
    module, data = tiny(num_students=3), [batch(8, seed) for seed in (1, 2)]
    other = copy.deepcopy(module)
    optimizers = {}
    for part, parameters in owned(other).items():
        decay = 1e-5 if part == "fusion" else 1e-4
        sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
        optimizers[part] = [sgd(parameters, weight_decay=decay)]
    optimizers["self_distillation"] = [
        torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4) for net in other.self_distillation
    ]
    for images, labels in data:
        losses, _ = other.losses(images, labels)
        for part, loss in losses.items():
            for optimizer in optimizers[part]:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers[part]:
                optimizer.step()
    trainer = foreign.make_trainer(tmp_path, max_epochs=1)
    with foreign.no_pictures:
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    foreign.assert_same(module, other)
    assert trainer.global_step == 4  # two optimisers


# ---- the fit


def fit(module: FFSD, root: Path, *callbacks: Callback, size: int = 12, **kwargs: Any) -> Trainer:
    def larger(start: int, count: int) -> torch.utils.data.DataLoader:
        images, labels = foreign.digits(count, start).dataset.tensors
        scaled = torch.utils.data.TensorDataset(F.interpolate(images, (size, size)), labels)
        return torch.utils.data.DataLoader(scaled, 16)

    trainer = foreign.make_trainer(root, *callbacks, **kwargs)
    with foreign.no_pictures:
        trainer.fit(module, larger(0, 64), larger(64, 32))
    return trainer


def test_what_is_stepped_logged_and_judged(tmp_path: Path) -> None:
    at_epochs = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            at_epochs.append([(g["lr"], g["weight_decay"]) for o in trainer.optimizers for g in o.param_groups])

    schedule = functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2])
    module = tiny(lr_scheduler=schedule, self_distillation_lr_scheduler=schedule, warmup_epochs=1)
    trainer = fit(module, tmp_path, Watch(), max_epochs=3)
    first, _, last = at_epochs
    assert first == [(0.1, 1e-4), (0.1, 1e-5), (1e-3, 1e-4)]
    assert last == [(pytest.approx(lr / 10), decay) for lr, decay in first]
    metrics = trainer.callback_metrics
    losses = [f"train/ffsd/{name}" for name in ("student_0", "student_1", "fusion", "leader", "self_distillation")]
    assert metrics["train/loss"].item() == pytest.approx(sum(metrics[name].item() for name in losses), rel=1e-5)
    images, labels = (t for t in trainer.val_dataloaders.dataset.tensors)
    module.eval()
    with torch.no_grad():
        each = [student(images) for student in module.students]
    expected = {"student_0": each[0], "student_1": each[1], "ensemble": each[0] + each[1]}  # no union of right answers
    for name, logits in expected.items():
        assert metrics[f"val/{name}_acc"].item() == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_the_leader_is_a_plain_network(tmp_path: Path) -> None:
    module = tiny()
    fit(module, tmp_path, max_epochs=1)
    module.eval()
    images, _ = batch()
    plain = TINY()
    plain.load_state_dict(module.network.state_dict())
    with torch.no_grad():
        logits = module(images)
        assert torch.equal(plain.eval()(images), logits)
        deployed = inference_copy(module)
        assert torch.equal(deployed(images), logits)
    assert {key.partition(".")[0] for key in deployed.state_dict()} == {"network"}
    assert params(deployed) == params(plain) < params(module) / 3


def test_a_term_of_a_callback_is_added(tmp_path: Path) -> None:
    class Push(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            self.term = add_loss_term(pl_module, "test", "push", lambda *_: pl_module.network.linear.bias.sum(), 100.0)

        def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            self.term.remove()

    one, two = tiny(), tiny()
    fit(one, tmp_path, Push(), max_epochs=1)
    fit(two, tmp_path, max_epochs=1)
    assert (one.network.linear.bias < two.network.linear.bias - 1).all()
    assert torch.equal(one.students[0].conv1.weight, two.students[0].conv1.weight)


def test_fp16_scales_of_both_optimisers_agree(tmp_path: Path) -> None:
    """The scale that doubles between the two steps of a batch changes nothing: powers of two are exact."""
    ends = []
    for interval in (1, 1000):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=interval)
        module = tiny()
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        fit(module, tmp_path, plugins=[precision], max_epochs=1, limit_train_batches=1)
        assert scaler.get_scale() == (8.0 if interval == 1 else 2.0)
        ends.append(module)
    foreign.assert_same(*ends)
    before, after = (m.self_distillation[0].stages[0][0].weight for m in (tiny(), ends[0]))
    assert not torch.equal(before, after)


def test_channels_last_computes_the_same() -> None:
    plain, last = tiny(), tiny(channels_last=True)
    assert last.network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for one, two in zip(plain.losses(*batch())[0].values(), last.losses(*batch())[0].values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_named_network_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    module = FFSD("resnet20", input_shape=SHAPE, warmup_epochs=0, num_students=3)
    assert module.network.conv1.in_channels == 1
    trainer = fit(module, tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = FFSD.load_from_checkpoint(tmp_path / "last.ckpt")
    foreign.assert_same(again, module)
    assert len(again.students) == 3


def test_a_class_in_a_config_is_made_anew_for_every_student() -> None:
    network = '{"class_path": "lightning_compress.networks.CIFARResNet", "init_args": {"depth": 8, "in_channels": 1}}'
    module = CompressCLI(["--model=FFSD", f"--model.network={network}", "--data=Digits"], run=False).model
    networks = [module.network, *module.students]
    assert all(isinstance(net, CIFARResNet) for net in networks)
    assert len({net.conv1.weight.sum().item() for net in networks}) == 3


def test_the_papers_results_are_in_the_catalog() -> None:
    top1 = {(row.network, row.data): row.result["top1"] for row in card("ffsd").published}
    assert top1[("ResNet-20", "CIFAR-100")] == 72.70
    assert top1[("ResNet-18", "ImageNet")] == 70.87


@pytest.mark.real_data
def test_on_real_photographs(tmp_path: Path) -> None:
    """In some seconds the leader learns, and shallow maps are made of deep ones ever better."""
    root = real_data("cifar10.npz")
    images = CIFAR10(str(root), val_size=0, augment=False).splits.train
    seen = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append([float(trainer.callback_metrics[f"train/ffsd/{n}"]) for n in ("leader", "self_distillation")])

    torch.manual_seed(0)
    rate = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    module = FFSD(
        functools.partial(CIFARResNet, 8, widths=(8, 8, 16, 32)), warmup_epochs=0, optimizer=rate, lr_scheduler=None
    )
    trainer = foreign.make_trainer(tmp_path, Watch(), max_epochs=6)
    with foreign.no_pictures:
        trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.Subset(images, range(64)), 16))
    assert all(last < 0.8 * first for first, last in zip(seen[0], seen[-1], strict=True))
    assert trainer.callback_metrics["train/acc"] > 0.4


# ---- what cannot be


class Odd(nn.Module):
    """Two convolutions and a head; `inplace` overwrites what the first returns."""

    def __init__(self, inplace: bool = False, stride: int = 2) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride, 1)
        self.act = nn.ReLU(inplace)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.act(self.one(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"network": TINY()}, "network: every student"),
        ({"network": 3}, "network: every student"),
        ({"network": "resnet2O"}, "'resnet2O'.* Did you mean .*'resnet20'"),
        ({"num_classes": 11}, "11 logits"),
        ({"input_shape": (3, 12, 12)}, r"network: CIFARResNet fails on an image of input_shape=\(3, 12, 12\)"),
        ({"feature_layers": "layer4"}, "'layer4' matches no name.* Did you mean .*'layer1'"),
        ({"feature_layers": ["layer2"]}, "two or more maps"),
        ({"feature_layers": ["layer1", "layer3"]}, r"twice as large as the next one; got layer1 \(4, 12, 12\)"),
        ({"feature_layers": ["layer2", "linear"]}, "'linear' returns no maps"),
        ({"network": Odd, "feature_layers": ["one", "two"], "input_shape": (1, 2, 2)}, "three places"),
        ({"network": functools.partial(Odd, True), "feature_layers": ["one", "two"]}, "'one' returns is overwritten"),
        ({"network": functools.partial(Odd, stride=1), "feature_layers": ["one", "two"]}, "twice as large"),
        ({"num_students": 1}, "num_students=1"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"lambda_diversity": -1.0}, r"lambda_diversity=-1\.0"),
        ({"lambda_fusion": -1.0}, r"lambda_fusion=-1\.0"),
        ({"lambda_self_distillation": -1.0}, r"lambda_self_distillation=-1\.0"),
        ({"fusion_weight_decay": -1.0}, r"fusion_weight_decay=-1\.0"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"init": "he"}, "init='he'.*'network', 'official'"),
    ],
    ids=str,
)
def test_impossible_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny(**arguments)


def test_maps_come_in_the_order_in_which_they_are_computed() -> None:
    class Backwards(Odd):
        def __init__(self) -> None:
            super().__init__()
            self.one = self._modules.pop("one")  # defined last, called first

    network = Backwards()
    names, shapes = find_maps(network, ["two", "one"], torch.zeros(1, 1, 8, 8), 10)
    assert (names, shapes) == (["one", "two"], [(4, 8, 8), (4, 4, 4)])
    assert network.training
    assert not network.one._forward_hooks


def test_a_module_that_is_not_called_is_named() -> None:
    network = Odd()
    network.spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="feature_layers: Odd computes without its module 'spare'"):
        find_maps(network, ["one", "spare"], torch.zeros(1, 1, 8, 8), 10)


def test_a_leader_that_was_pruned_does_not_fit_its_fusion(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="a callback has made the leader's maps"):
        fit(tiny(), tmp_path, L1Norm(pruning_ratio={"network.layer3*": 0.5}))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: vars(m).update(configure_optimizers=m.configure_optimizers), MisconfigurationException, "optimizer"),
        (lambda m: setattr(m, "warmup_epochs", 2), MisconfigurationException, "warmup_epochs=2"),
    ],
    ids=["--optimizer", "warmup_epochs"],
)
def test_what_the_trainer_cannot_do(
    change: Callable[[FFSD], Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    module = tiny()
    change(module)
    with pytest.raises(error, match=said):
        fit(module, tmp_path, max_epochs=2)


def test_batches_without_labels_are_named(tmp_path: Path) -> None:
    trainer = foreign.make_trainer(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"FFSD: the train batches must be \(images, labels\)"):
        trainer.fit(tiny(), torch.utils.data.DataLoader(batch(4)[0], 2))


def test_it_is_an_image_classifier() -> None:
    assert issubclass(FFSD, ImageClassifier)
