"""Cheap students and the teacher that is made of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import lightning_compress
from lightning_compress.callbacks import QAT
from lightning_compress.core.profile import profile
from lightning_compress.core.report import Account
from lightning_compress.datamodules import CIFAR10
from lightning_compress.modules import ImageClassifier, OnlineDistillation
from lightning_compress.modules.distillation.online_distillation.cohort import Cohort, OnlineTeacher, find_maps
from lightning_compress.modules.distillation.online_distillation.losses import online_losses
from lightning_compress.modules.distillation.online_distillation.module import Scores
from lightning_compress.networks import CheapResNet, build, cheap_resnet56

S = torch.tensor([[[0.0, 4.0], [2.0, 0.0]]])
T = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
Y = torch.tensor([0, 1])


class Tiny(nn.Module):
    """(N, 1, 8, 8) -> (N, 10)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 12, 3, padding=1, stride=2, bias=False)
        self.head = nn.Linear(12, 10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.conv(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


def made(network: Any = Tiny, num_students: int = 3, **kwargs: Any) -> OnlineDistillation:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    arguments = {"input_shape": (1, 8, 8), "optimizer": optimizer, "lr_scheduler": None, **kwargs}
    return OnlineDistillation(network, num_students=num_students, **arguments)


def fit(module: LightningModule, root: Path, *callbacks: Any, ckpt_path: Any = None, **kwargs: Any) -> Any:
    trainer = foreign.make_trainer(root, *callbacks, **kwargs)
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits(), foreign.digits(32, 64), ckpt_path=ckpt_path)
    return trainer


# ---- the loss


@pytest.mark.parametrize(("reduction", "told"), [("mean", 1.9721879), ("batchmean", 3.9443758)])
def test_the_loss_is_that_of_a_hand_computation(reduction: Any, told: float) -> None:
    losses = online_losses(S, T, Y, 4.0, reduction)
    assert losses.teacher.item() == pytest.approx(0.3556486, abs=1e-6)
    assert losses.students.tolist() == pytest.approx([3.0725389], abs=1e-6)
    assert losses.told.tolist() == pytest.approx([told], abs=1e-6)
    assert losses.total().item() == pytest.approx(0.3556486 + 3.0725389 + told, abs=1e-6)
    if reduction == "mean":
        assert losses.total().item() == pytest.approx(5.4003753, abs=1e-6)


def test_the_teacher_learns_from_what_it_tells_unless_it_is_detached() -> None:
    teacher = T.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(online_losses(S, teacher, Y).told.sum(), teacher)
    torch.testing.assert_close(gradient, torch.tensor([[0.3932, -0.3932], [-0.1250, 0.1250]]), atol=5e-5, rtol=0)
    student = S.clone().requires_grad_()
    told = online_losses(student, teacher, Y, detach_teacher=True).told.sum()
    on_teacher, on_student = torch.autograd.grad(told, (teacher, student), allow_unused=True)
    assert on_teacher is None
    assert on_student.abs().sum() > 0


def test_the_loss_is_that_of_a_loop_over_classes() -> None:
    torch.manual_seed(0)
    students, teacher, labels = torch.randn(3, 5, 7).double(), torch.randn(5, 7).double(), torch.randint(7, (5,))
    losses = online_losses(students, teacher, labels, 2.5)
    for j, student in enumerate(students):
        p, q = (teacher / 2.5).softmax(1), (student / 2.5).softmax(1)
        kl = sum(p[i, k] * (p[i, k].log() - q[i, k].log()) for i in range(5) for k in range(7)) / (5 * 7)
        ce = -sum(student[i].log_softmax(0)[labels[i]] for i in range(5)) / 5
        assert losses.told[j].item() == pytest.approx(2.5**2 * kl.item(), rel=1e-5)
        assert losses.students[j].item() == pytest.approx(ce.item(), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_usual_mean_weighs_as_many_times_more_as_there_are_classes(classes: int) -> None:
    students, teacher, labels = torch.randn(4, 6, classes), torch.randn(6, classes), torch.zeros(6, dtype=torch.long)
    mean, batchmean = (online_losses(students, teacher, labels, 4.0, r).told for r in ("mean", "batchmean"))
    torch.testing.assert_close(mean * classes, batchmean)


def test_equal_students_learn_alike() -> None:
    teacher = OnlineTeacher(12, 5)
    nn.init.constant_(teacher.linear.weight, 0.1)
    maps = torch.randn(6, 4, 3, 3)
    own = [maps.clone().requires_grad_() for _ in range(3)]
    logits = torch.stack([m.mean((2, 3)) @ torch.ones(4, 5).tril() for m in own])
    losses = online_losses(logits, teacher(own), torch.randint(5, (6,)))
    assert losses.told.tolist() == pytest.approx([losses.told[0].item()] * 3)
    first, *others = torch.autograd.grad(losses.total(), own)
    for gradient in others:
        torch.testing.assert_close(gradient, first)


# ---- the networks


def test_the_teachers_layers_cost_what_is_published() -> None:
    with torch.device("meta"):
        module = OnlineDistillation(partial(cheap_resnet56, kind="shift"))
    assert module.cohort.point.module == "layer3"
    assert sum(p.numel() for p in module.cohort.teacher.parameters()) == 3082


@pytest.mark.parametrize(("kind", "params"), [("shift", 411_506), ("dw", 482_354), ("group", 1_247_858)])
def test_training_takes_as_many_parameters_as_is_published(kind: Any, params: int) -> None:
    with torch.device("meta"):
        module = OnlineDistillation(partial(CheapResNet, kind=kind))
    assert sum(p.numel() for p in module.parameters()) == params


def test_the_teacher_is_batch_norm_relu_pooling_and_a_classifier() -> None:
    maps = [torch.randn(6, 4, 3, 3) for _ in range(2)]
    both = torch.cat(maps, 1)
    teacher = OnlineTeacher(8, 5)
    normed = (both - both.mean((0, 2, 3), True)) / (both.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(teacher(maps), teacher.linear(normed.relu().mean((2, 3))))
    plain = OnlineTeacher(8, 5, bn_relu=False)
    torch.testing.assert_close(plain(maps), plain.linear(both.mean((2, 3))))
    assert torch.equal(both, torch.cat(maps, 1)), "maps are not changed in place: the students use them too"


@pytest.mark.parametrize(
    ("name", "layer", "channels"),
    [
        ("resnet20", "layer3", 64),
        ("cheap_resnet20", "layer3", 64),
        ("vgg16_cifar", "features.relu13", 512),
        ("torchvision/resnet18", "layer4", 512),
        ("torchvision/mobilenet_v3_small", "features", 576),
    ],
)
def test_the_last_maps_are_found(name: str, layer: str, channels: int) -> None:
    with torch.device("meta"):
        network = build(name, num_classes=10)
        assert find_maps(network, None, torch.zeros(1, 3, 64, 64), 10) == ((layer, False), channels)


def test_what_gives_no_maps_or_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"feature_layer: no module 'stm' puts out maps .* Did you mean 'stem'"):
        made(feature_layer="stm")
    with pytest.raises(ValueError, match="feature_layer: no module 'head' puts out maps"):
        made(feature_layer="head")
    with pytest.raises(ValueError, match="feature_layer: no module of Sequential puts out maps"):
        made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(MisconfigurationException, match=r"network: Tiny must put out logits \(images, 7\), .* has 10"):
        made(num_classes=7)
    assert made(feature_layer="norm").cohort.teacher.linear.in_features == 18


# ---- arguments


def test_students_begin_with_weights_of_their_own() -> None:
    one, two, three = (student.stem.weight for student in made().cohort.students)
    assert not any(torch.equal(a, b) for a, b in ((one, two), (one, three), (two, three)))

    def seeded() -> nn.Module:
        torch.manual_seed(1)
        return Tiny()

    with pytest.raises(ValueError, match="network: two students have the same weights"):
        made(seeded)
    seeds = iter((1, 2, 2))
    with pytest.raises(ValueError, match="network: two students have the same weights"):
        made(lambda: (torch.manual_seed(next(seeds)), Tiny())[1])
    shared = Tiny()
    with pytest.raises(ValueError, match="network: two students have the same weights"):
        made(lambda: shared)
    with pytest.raises(ValueError, match="network: every student is to have weights of its own"):
        made(shared)
    depths = iter((8, 14, 8))
    with pytest.raises(ValueError, match="network: the students must be of one architecture"):
        made(lambda: CheapResNet(next(depths), in_channels=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_students": 1}, r"num_students=1\): give a number of at least 2"),
        ({"temperature": 0.0}, r"temperature=0.0\): give a number above 0"),
        ({"cheap": "shfit"}, r"cheap='shfit'\): give one of 'shift', 'dw', 'group'"),
        ({"kl_reduction": "sum"}, r"kl_reduction='sum'\): give one of 'mean', 'batchmean'"),
        ({"groups": 0}, r"groups=0\): give a number of at least 1"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**arguments)


# ---- the training


def test_a_step_is_one_backward_pass_of_the_sum(tmp_path: Path) -> None:
    """Against the formula, written by hand for students of a network whose maps are at hand."""
    module = made(fused=False)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    images, labels = next(iter(foreign.digits()))
    teacher, students = module.cohort.teacher, module.cohort.students
    maps = [s.conv(F.relu(s.norm(s.stem(images)))) for s in students]
    own = [s.head(z.mean((2, 3))) for s, z in zip(students, maps, strict=True)]
    t = teacher.linear(F.relu(teacher.norm(torch.cat(maps, 1))).mean((2, 3)))
    expected = F.cross_entropy(t, labels)
    for s in own:
        kl = F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="none").mean()
        expected = expected + F.cross_entropy(s, labels) + 16 * kl
    wanted = torch.autograd.grad(expected, list(module.parameters()))
    loss = module.training_step((images, labels), 0)
    torch.testing.assert_close(loss, expected)
    for found, right in zip(torch.autograd.grad(loss, list(module.parameters())), wanted, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("cheap", [None, "shift", "group"])
def test_fused_passes_train_alike(cheap: Any, tmp_path: Path) -> None:
    apart, fused = (made(fused=f, cheap=cheap, groups=2) for f in (False, True))
    for module in (apart, fused):
        fit(module, tmp_path, max_epochs=1)
    for (name, p), (_, q) in zip(apart.state_dict().items(), fused.state_dict().items(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_passes_are_fused_where_that_is_possible(tmp_path: Path) -> None:
    def used(module: OnlineDistillation) -> bool:
        seen = []
        original = Cohort.all_logits

        def spy(self: Cohort, images: Tensor, together: bool = False) -> Any:
            seen.append(together)
            return original(self, images, together)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cohort, "all_logits", spy)
            fit(module, tmp_path, fast_dev_run=True, max_epochs=None)
        assert seen[1:] == [False], "not in validation"
        return seen[0]

    assert used(made()), "16 images of 8x8 are few pixels"
    assert not used(made(fused=False))
    watched = made()
    watched.cohort.students[1].conv.register_forward_hook(lambda *_: None)
    assert not used(watched)
    watched.fused = True
    with pytest.raises(MisconfigurationException, match=r"fused=True\): the students differ in shape, carry hooks"):
        used(watched)


def test_students_that_are_no_longer_alike_are_refused(tmp_path: Path) -> None:
    class Narrow(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.cohort.student_0.conv = nn.Conv2d(6, 4, 3, padding=1)

    with pytest.raises(MisconfigurationException, match="OnlineDistillation: a callback has changed some students"):
        fit(made(), tmp_path, Narrow())


def test_the_student_that_validates_best_is_chosen_and_kept(tmp_path: Path) -> None:
    module = made(cheap="shift")
    saver = ModelCheckpoint(tmp_path, "best", monitor="val/acc", mode="max")
    trainer = fit(module, tmp_path, saver, max_epochs=3)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    own = [metrics[f"val/student_{i}_acc"] for i in range(3)]
    images, labels = (torch.cat(parts) for parts in zip(*foreign.digits(32, 64), strict=True))
    module.eval()
    with torch.no_grad():
        alone = [float((student(images).argmax(1) == labels).float().mean()) for student in module.cohort.students]
        expected = F.cross_entropy(module(images), labels)
    assert own == pytest.approx(alone)
    assert module.cohort.accuracies.tolist() == pytest.approx(own)
    assert module.cohort.best == own.index(max(own))
    assert metrics["val/acc"] == pytest.approx(max(own))
    assert metrics["val/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert {f"train/online_distillation/{n}" for n in ("teacher", "student_0", "told_2")} <= metrics.keys()
    # the best epoch's checkpoint knows its own best student
    best = lightning_compress.load(OnlineDistillation, saver.best_model_path, network=Tiny)
    assert best.cohort.accuracies.max().item() == pytest.approx(saver.best_model_score.item())
    # a weights-only average would keep the numbers meaningful: the choice is made of them
    module.cohort.accuracies.copy_(torch.tensor([0.1, 0.9, 0.5]))
    assert torch.equal(module(images), module.cohort.students[1](images))
    network = module.best_student()
    assert type(network) is Tiny
    assert network.conv.pointwise.weight is not module.cohort.students[1].conv.pointwise.weight
    assert torch.equal(network(images), module(images))


def test_only_a_fit_chooses(tmp_path: Path) -> None:
    module = made()
    trainer = foreign.make_trainer(tmp_path)
    trainer.validate(module, foreign.digits(), verbose=False)
    assert module.cohort.accuracies.tolist() == [0, 0, 0]
    assert trainer.callback_metrics["val/acc"] == trainer.callback_metrics["val/student_0_acc"]
    with pytest.warns(UserWarning, match="no student was ever validated"), foreign.no_pictures:
        foreign.make_trainer(tmp_path, fast_dev_run=True, max_epochs=None).fit(module, foreign.digits())


def test_scores_are_summed_over_batches() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 20, 5), torch.randint(5, (20,))
    scores = Scores(3)
    for part in (slice(0, 7), slice(7, 20)):
        scores.update(logits[:, part], labels[part])
    accuracies, losses = scores.compute()
    for i in range(3):
        assert accuracies[i].item() == pytest.approx((logits[i].argmax(1) == labels).float().mean().item())
        assert losses[i].item() == pytest.approx(F.cross_entropy(logits[i], labels).item(), rel=1e-6)


def test_it_costs_what_a_student_costs() -> None:
    module = made(cheap="shift", channels_last=True)
    assert profile(module, (1, 1, 8, 8)).macs == profile(module.best_student(), (1, 1, 8, 8)).macs


def test_the_account_has_the_network_before_and_the_student_after(tmp_path: Path) -> None:
    module = made(cheap="dw")
    fit(module, tmp_path, max_epochs=1)
    account = Account.load(tmp_path / "compression.json")
    assert account.before.params == sum(p.numel() for p in Tiny().parameters())
    assert account.after.params == sum(p.numel() for p in module.best_student().parameters())
    assert account.before.macs - account.after.macs == 6 * 12 * 9 * 16 - (6 * 9 * 64 + 6 * 12 * 16)
    assert any("of 3 is deployed" in note for note in account.notes)
    assert list(account.left_alone) == [("network.stem", "is the first convolution")]


def test_resumed_with_fused_passes_equals_uninterrupted(tmp_path: Path) -> None:
    whole, half = (made(fused=True, cheap="shift") for _ in range(2))
    fit(whole, tmp_path, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=2)
    fit(half, tmp_path, ModelCheckpoint(tmp_path), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    foreign.assert_same(half, whole)


def test_together_students_become_better_than_alone(tmp_path: Path) -> None:
    """... and their teacher better than each of them: 200 digits, 6 epochs, judged by 400 others."""
    torch.manual_seed(2)
    network = partial(CheapResNet, 8, 10, 1, "shift")
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=2e-4)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6)
    rest = {"optimizer": optimizer, "lr_scheduler": schedule, "input_shape": (1, 8, 8)}
    found = []
    for module in (ImageClassifier(network(), **rest), OnlineDistillation(network, **rest)):  # type: ignore[arg-type]
        train = DataLoader(foreign.digits(200).dataset, 32, shuffle=True, generator=torch.Generator().manual_seed(2))
        trainer = foreign.make_trainer(tmp_path, max_epochs=6, check_val_every_n_epoch=6)
        with foreign.no_pictures:
            trainer.fit(module, train, foreign.digits(400, 1000, 200))
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    alone, together = found
    students = [value for name, value in together.items() if name.startswith("val/student")]
    assert together["val/teacher_acc"] >= max(students) == together["val/acc"]
    assert sum(students) / len(students) > alone["val/acc"]


def test_students_are_trained_with_quantised_weights(tmp_path: Path) -> None:
    module = made(cheap="shift")
    fit(module, tmp_path, QAT(), max_epochs=1)
    assert all(hasattr(student.conv.pointwise, "parametrizations") for student in module.cohort.students)
    account = Account.load(tmp_path / "compression.json")
    assert account.after.bits < account.before.bits


def test_an_export_holds_the_best_student_alone(tmp_path: Path) -> None:
    module = made(cheap="shift", channels_last=True)
    module.cohort.accuracies.copy_(torch.tensor([0.1, 0.2, 0.9]))
    exported = lightning_compress.export(module, tmp_path / "student.pt2", torch.zeros(1, 1, 8, 8))
    program = torch.export.load(exported.path)
    student = module.best_student()
    assert sum(p.numel() for p in program.parameters()) == sum(p.numel() for p in student.parameters())
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(program.module()(images), student.eval()(images))


@pytest.mark.real_data
def test_on_real_photographs(tmp_path: Path) -> None:
    """In some seconds all students learn, the teacher too, and the network that is deployed is the best of them."""
    images = CIFAR10(str(real_data("cifar10.npz")), val_size=0, augment=False).splits.train
    torch.manual_seed(0)
    module = OnlineDistillation(
        partial(CheapResNet, 8, kind="shift"), optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        lr_scheduler=None, channels_last=True,
    )  # fmt: skip
    trainer = foreign.make_trainer(tmp_path, max_epochs=6)
    loader = DataLoader(Subset(images, range(128)), 16)
    with foreign.no_pictures:
        trainer.fit(module, loader, loader)
    seen = trainer.callback_metrics
    accuracies = [float(seen[f"val/student_{i}_acc"]) for i in range(4)]
    assert min(accuracies) > 0.2
    assert float(seen["val/teacher_acc"]) > 0.3
    x, y = next(iter(DataLoader(Subset(images, range(128)), 128)))
    with torch.no_grad():
        deployed = float((module.best_student().eval()(x).argmax(1) == y).float().mean())
    assert deployed == pytest.approx(max(accuracies), abs=1e-6)
