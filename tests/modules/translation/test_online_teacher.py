"""What DCD and CRD share: losses between images, whose turn it is, which teacher is learnt from, what is deployed."""

from __future__ import annotations

import copy
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import assert_same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from translation import noise, rates, small_online, trainer

import lightning_compress
from lightning_compress.cli.lightning_cli import CompressCLI
from lightning_compress.core.images import as_bytes
from lightning_compress.core.profile import profile
from lightning_compress.core.report import Account
from lightning_compress.metrics import FrechetDistance
from lightning_compress.modules import CRDCycleGAN, CRDPix2Pix, DCDCycleGAN, DCDPix2Pix
from lightning_compress.modules.translation import online_teacher
from lightning_compress.modules.translation.online_teacher import gram, length, style_loss, turn
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, VGGFeatures

PAIRED, UNPAIRED = (DCDPix2Pix, CRDPix2Pix), (DCDCycleGAN, CRDCycleGAN)
ALL = pytest.mark.parametrize("kind", [*PAIRED, *UNPAIRED])
EACH = pytest.mark.parametrize("kind", [DCDPix2Pix, CRDCycleGAN])  # the conformance checks have the other two
DATA = noise(4, 32)


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than such a fit."""
    for name in ("open_account", "close_account"):
        monkeypatch.setattr(online_teacher, name, lambda *args, **kwargs: None)


def weights(*networks: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for network in networks for p in network.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


# ---- losses


def test_gram_matrices() -> None:
    assert torch.allclose(gram(torch.ones(2, 5, 3, 4)), torch.full((2, 5, 5), 1 / 5))
    expected = torch.tensor([[21.083333, 54.083333], [54.083333, 159.083333]])
    features = torch.arange(24.0).view(1, 2, 3, 4)
    torch.testing.assert_close(gram(features)[0], expected)
    torch.testing.assert_close(gram(2 * features), 4 * gram(features))
    assert gram(features.bfloat16()).dtype == torch.float32


def test_style_is_summed_over_maps() -> None:
    one = [torch.ones(1, 2, 2, 2), torch.ones(1, 4, 1, 1)]
    other = [torch.zeros(1, 2, 2, 2), 2 * torch.ones(1, 4, 1, 1)]
    assert style_loss(one, other).item() == pytest.approx(1 / 2 + 3 / 4)


# ---- turns


def test_whose_turn_it_is() -> None:
    module = small_online(DCDCycleGAN, n_epochs=2, n_epochs_decay=2, phase_epochs=2, student_ratio=4)
    assert [module.phase(epoch)[0] for epoch in range(10)] == [*"tt", *"ssssssss"]
    assert [module.phase(epoch) for epoch in (10, 11, 12)] == ["teacher", "teacher", "student"]
    assert module.num_epochs == 20


@pytest.mark.parametrize(("phase_epochs", "total", "phases"), [(10, 1000, 20), (6, 1016, 34)])
def test_the_papers_turns(phase_epochs: int, total: int, phases: int) -> None:
    turns = [turn(epoch, 200, phase_epochs, 4) for epoch in range(total)]
    runs = [(student, len(list(run))) for student, run in groupby(turns, lambda t: t[0])]
    assert length(200, phase_epochs, 4) == total
    assert len(runs) == 2 * phases
    assert runs[:2] == [(False, phase_epochs), (True, 4 * phase_epochs)]
    assert runs[-2:] == [(False, 200 - (phases - 1) * phase_epochs), (True, 4 * phase_epochs)]
    assert sum(not student for student, _ in turns) == 200
    assert [epoch for student, epoch in turns if not student] == list(range(200))
    assert turn(total, 200, phase_epochs, 4) == turn(total + 7, 200, phase_epochs, 4) == (True, 200)


def test_the_students_rate_is_that_of_the_teachers_last_epoch() -> None:
    module = small_online(DCDCycleGAN, n_epochs=100, n_epochs_decay=100, phase_epochs=10, student_ratio=4)
    factors = [module.rate(module.teacher_epoch(epoch)) for epoch in range(1000) if module.phase(epoch) == "student"]
    assert factors[:400] == [1.0] * 400
    assert factors[400:440] == pytest.approx([0.900990] * 40, abs=1e-6)
    assert factors[-40:] == pytest.approx([1 / 101] * 40)


def test_all_rates_follow_the_teachers_epochs() -> None:
    class Rates(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

    seen: list[list[float]] = []
    module = small_online(CRDCycleGAN, n_epochs=1, n_epochs_decay=2, phase_epochs=2, student_ratio=1)
    trainer(Rates(), max_epochs=7).fit(module, noise(2, 32))
    # teacher 0 1, student 1 1, teacher 2, student 2 2
    expected = [1, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3]
    assert seen == [pytest.approx([2e-4 * factor] * 3) for factor in expected]


class Told(Metric):
    """A metric that says what it is told to, one value after the other."""

    higher_is_better = False
    name = "told"

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = list(scores)
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, fakes: Any, reals: Any = None) -> None:
        self.count += 1

    def compute(self) -> Tensor:
        return torch.tensor(self.scores.pop(0))


class Watching(Callback):
    """Weights of all generators at the start of every epoch, and at the end."""

    def __init__(self) -> None:
        self.teachers: list[list[Tensor]] = []
        self.best: list[list[Tensor]] = []
        self.students: list[list[Tensor]] = []
        self.judges: list[list[Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.teachers.append(weights(pl_module.generator_ab, pl_module.generator_ba))
        self.judges.append(weights(pl_module.discriminator_ab, pl_module.discriminator_ba))
        self.best.append(weights(pl_module.best_teacher))
        self.students.append(weights(pl_module.student, pl_module.imitation))

    on_train_end = on_train_epoch_start


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_student_learns_from_the_best_teacher_and_the_latest_goes_on(higher_is_better: bool) -> None:
    sign = -1 if higher_is_better else 1
    kind = type("Told", (Told,), {"higher_is_better": higher_is_better})
    metric = kind(*(sign * score for score in (3.0, 2.0, 5.0, 4.0, 9.0, 9.0)))
    other = Told(3.0, 2.5, 1.0, 0.9, 0.8, 0.7)  # the other direction keeps improving
    module = small_online(
        DCDCycleGAN, n_epochs=3, n_epochs_decay=0, phase_epochs=1, student_ratio=1,
        metrics={"ab": [metric], "ba": [other]},
    )  # fmt: skip
    module.student_metrics.clear()
    watching = Watching()
    trainer(watching, max_epochs=6).fit(module, noise(2, 32), noise(2, 32))
    first, second, third = (watching.teachers[epoch] for epoch in (1, 3, 5))  # after each of the teacher's epochs
    half = len(first) // 2
    assert equal(watching.best[1], first[:half])
    # the scores of the student's turns, 2 and 4, are not asked for
    assert equal(watching.best[3], first[:half])
    assert equal(watching.best[5], first[:half])
    assert module.best_score == sign * 3.0
    assert not equal(second, first)
    assert not equal(third, second)
    # turns: what is not trained stays, and the teacher goes on from its latest weights
    for epoch in (1, 3, 5):
        assert equal(watching.teachers[epoch + 1], watching.teachers[epoch])
        assert equal(watching.judges[epoch + 1], watching.judges[epoch])
        assert not equal(watching.students[epoch + 1], watching.students[epoch])
    for epoch in (2, 4):
        assert equal(watching.students[epoch + 1], watching.students[epoch])
    assert not any(p.requires_grad for p in module.best_teacher.parameters())


@pytest.mark.parametrize("metrics", [None, [FrechetDistance()]])
def test_without_a_score_it_learns_from_the_latest(metrics: Any) -> None:
    """There is no metric, or, on two images of which each process sees one, no finite score."""
    module = small_online(CRDCycleGAN, metrics=metrics)
    watching = Watching()
    trainer(watching, max_epochs=4).fit(module, noise(2, 32), noise(1, 32))
    half = len(watching.teachers[0]) // 2
    assert module.best_score is None
    for epoch in (2, 4):  # behind a turn of the student
        assert equal(watching.best[epoch], watching.teachers[epoch][:half])


# ---- steps


@ALL
def test_the_discriminators_verdict_reaches_the_student(kind: Any) -> None:
    module = small_online(kind, lambda_adv=1.0, lambda_style=0.0, lambda_feature=0.0)
    module.imitation.weight = 0.0
    gradients: list[bool] = []

    class Looking(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if any(p is q for p in optimizer.param_groups[0]["params"] for q in module.student.parameters()):
                others = [p for m in module.children() if m is not module.student for p in m.parameters()]
                gradients.append(bool(module.student.model[-2].weight.grad.any()))
                assert not any(p.grad is not None and p.grad.any() for p in others)

    def forget(*args: Any) -> None:  # those of the teacher's own step
        module.zero_grad()

    module.train_student, train_student = (lambda attempt: (forget(), train_student(attempt))[1]), module.train_student
    trainer(Looking(), max_epochs=4 if kind in UNPAIRED else 1).fit(module, noise(2, 32))
    assert gradients
    assert all(gradients)
    module.train_student = train_student


@ALL
def test_terms_without_weight_are_not_computed(kind: Any) -> None:
    module = small_online(kind, lambda_adv=1.0, lambda_style=0.0, lambda_feature=0.0, perceptual_net=None)
    module.imitation.weight = 0.0
    run = trainer(max_epochs=4 if kind in UNPAIRED else 1)
    run.fit(module, DATA)
    names = {name for name in run.callback_metrics if name.startswith("train/student")}
    assert names == {"train/student", "train/student_gan"}
    relation = {"lambda_cd": 0} if kind.__name__.startswith("DCD") else {"lambda_rel": 0}
    with pytest.raises(ValueError, match="with all weights 0 the student learns nothing"):
        small_online(kind, lambda_adv=0, lambda_style=0, lambda_feature=0, **relation)


def test_the_teacher_of_pairs_may_step_less_often() -> None:
    def steps(ratio: int) -> list[int]:
        module = small_online(CRDPix2Pix, student_ratio=ratio)
        run = trainer(max_epochs=1)
        run.fit(module, noise(8, 32))
        return [int(next(iter(optimizer.state.values()))["step"]) for optimizer in run.optimizers]

    assert steps(1) == [4, 4, 4]
    assert steps(3) == [2, 2, 4]


# ---- runs


@EACH
def test_a_resumed_run_equals_an_uninterrupted_one(kind: Any, tmp_path: Path) -> None:
    def run(root: Path, ckpt_path: Path | None = None) -> Any:
        module = small_online(kind, metrics=[FrechetDistance()])
        checkpoints = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
        torch.rand(len(str(ckpt_path)))  # the global stream is somewhere else
        trainer(checkpoints, root=root, max_epochs=4).fit(module, DATA, noise(4, 32), ckpt_path=ckpt_path)
        return module

    uninterrupted = run(tmp_path / "whole")
    for epoch in (0, 2):  # in the middle of each one's turn
        resumed = run(tmp_path / str(epoch), tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_same(resumed, uninterrupted)
        if kind in UNPAIRED:
            assert resumed.best_score == uninterrupted.best_score is not None


@EACH
def test_the_student_is_deployed(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("lightning_compress.core.plots.available", lambda: False)
    module = small_online(kind, metrics=[FrechetDistance()])
    epochs = 4 if kind in UNPAIRED else 1
    run = trainer(ModelCheckpoint(tmp_path, filename="last"), root=tmp_path, max_epochs=epochs)
    run.fit(module, DATA, noise(4, 32))
    assert {"val/student/to_teacher", "val/student/frechet_distance"} <= set(run.callback_metrics)
    assert ("val/student/l1" in run.callback_metrics) == (kind in PAIRED)
    account = Account.load(tmp_path / "compression.json")
    assert account.after.params == sum(p.numel() for p in module.student.parameters())
    assert account.after.macs == profile(module.student, (1, 3, 32, 32)).macs
    x, b = next(iter(DATA))
    exported = lightning_compress.export(module, tmp_path / "small", x, format="torch")
    assert exported.max_abs_difference < 1e-5
    module.eval()
    with torch.no_grad():
        expected = module.student(x)
    torch.testing.assert_close(torch.export.load(exported.path).module()(x), expected, atol=1e-5, rtol=0)
    assert torch.equal(module.predict_step(x, 0), as_bytes(expected))
    assert torch.equal(module.predict_step((x, b), 0)["fake_b"], as_bytes(expected))
    # no perceptual network is stored, and none is needed to look at the student
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("perceptual_net" in key for key in (*state["state_dict"], *state["hyper_parameters"]))
    fresh = small_online(kind)
    names = ("generator", "discriminator") if kind in PAIRED else ("generator_ab", "discriminator_ab")
    parts = {name: copy.deepcopy(getattr(fresh, name)) for name in (*names, "student")}
    loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt", **parts)
    assert_same(loaded, module)


def test_the_difference_from_the_teacher_is_of_the_one_learnt_from() -> None:
    module = small_online(CRDCycleGAN)
    nn.init.zeros_(module.best_teacher.model[-2].weight)  # all its images are black
    images = torch.rand(2, 3, 32, 32)
    batches = DataLoader([(images, images), (images, None), (None, images)], batch_size=None)
    found = trainer().validate(module, batches, verbose=False)[0]
    module.eval()
    with torch.no_grad():
        expected = (module.student(images) - module.best_teacher(images)).abs().mean()
    assert found["val/student/to_teacher"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_picture_shows_the_student() -> None:
    for kind in (DCDPix2Pix, DCDCycleGAN):
        module = small_online(kind)
        a, b, c, d = torch.rand(4, 1, 3, 8, 8)
        columns = module.columns(module.directions[0], {"a": a, "b": b}, {"fake_b": c, "fake_a": d, "student": d})
        assert columns["student"] is d
        assert list(columns)[:2] == ["input", "translation"]
    assert "student" not in module.columns(module.directions[1], {"b": b}, {"fake_a": d, "student": d})


# ---- what cannot be


def test_impossible_arguments_are_refused() -> None:
    for kind, name in ((DCDPix2Pix, "lambda_style"), (CRDPix2Pix, "lambda_feature"), (DCDCycleGAN, "lambda_adv")):
        with pytest.raises(ValueError, match=f"{name}: expected 0 or more, got -1"):
            small_online(kind, **{name: -1})
    for name in ("student_ratio", "phase_epochs"):
        with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
            small_online(DCDCycleGAN, **{name: 0})
    with pytest.raises(
        ValueError, match=r"student: it makes images \(1, 32, 32\) of .* the teacher makes \(3, 32, 32\)"
    ):
        small_online(CRDPix2Pix, student=ResNetGenerator(out_channels=1, ngf=2, blocks=2))
    with pytest.raises(ValueError, match="discriminator: it sees the input beside the image"):
        small_online(CRDPix2Pix, discriminator=PatchDiscriminator(3, 4, layers=1))


def test_a_perceptual_network_is_needed_to_train(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"perceptual_net=None: lambda_style=20000\.0"):
        trainer(max_epochs=1).fit(small_online(CRDPix2Pix, perceptual_net=None), DATA)
    with pytest.raises(ValueError, match=r"path '.*vgg\.pth' does not exist"):
        trainer(max_epochs=1).fit(small_online(CRDPix2Pix, perceptual_net=str(tmp_path / "vgg.pth")), DATA)
    with pytest.raises(ValueError, match="perceptual_net: ResNetGenerator must return two or more maps"):
        trainer(max_epochs=1).fit(small_online(CRDPix2Pix, perceptual_net=ResNetGenerator(ngf=2, blocks=1)), DATA)


def test_too_few_epochs_are_refused_and_more_are_warned_of() -> None:
    module = small_online(DCDCycleGAN, n_epochs=100, n_epochs_decay=100, phase_epochs=6, student_ratio=4)
    with pytest.raises(MisconfigurationException, match=r"max_epochs=200: 200 epochs of the teacher .* are 1016\."):
        trainer(max_epochs=200).fit(module, DATA)
    with pytest.warns(UserWarning, match="zero from epoch 4 on, the Trainer goes on to max_epochs=5"):
        trainer(max_epochs=5, limit_train_batches=0).fit(small_online(DCDCycleGAN), DATA)
    trainer(fast_dev_run=True, max_epochs=None).fit(module, DATA, DATA)


def test_the_perceptual_network_is_frozen_and_no_part_of_the_module() -> None:
    network = VGGFeatures(width=2)
    module = small_online(DCDPix2Pix, perceptual_net=network)
    own = {id(p) for p in module.parameters()}
    assert not any(id(p) in own for p in network.parameters())
    before = weights(network)
    trainer(max_epochs=1).fit(module, DATA)
    assert equal(weights(network), before)
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_three_optimisers_hold_what_is_trained() -> None:
    module = small_online(DCDCycleGAN, optimizer=rates(0.1, 0.2, 0.3), metrics=[FrechetDistance()])
    generators, discriminators, student = module.sides()
    parts = {
        0: (module.generator_ab, module.generator_ba), 1: (module.discriminator_ab, module.discriminator_ba),
        2: (module.student, module.imitation.of_student),
    }  # fmt: skip
    for side, given in zip((generators, discriminators, student), parts.values(), strict=True):
        assert [id(p) for p in side] == [id(p) for part in given for p in part.parameters()]
    optimizers, _ = module.configure_optimizers()
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("slug", ["dcd", "crd"])
def test_images_of_a_recipe_have_the_size_of_its_data(slug: str) -> None:
    cli = CompressCLI(["--config", f"recipes/{slug}/quick", "--trainer.logger=false"], run=False)
    assert cli.model.input_shape == cli.datamodule.input_shape == (3, 64, 64)
