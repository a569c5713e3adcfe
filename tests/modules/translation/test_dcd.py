"""DCD: what connectors and discriminator make of features, whom a gradient reaches, and the steps of the paper."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD
from translation import noise, rates, small_online, trainer

from lightning_compress.core.distill.taps import Point, input_at, observe
from lightning_compress.core.profile import profile
from lightning_compress.datamodules import PairedPhotographs
from lightning_compress.modules import DCDCycleGAN, DCDPix2Pix
from lightning_compress.modules.translation import online_teacher
from lightning_compress.modules.translation.dcd import LAYERS, Cooperation, connector, revive
from lightning_compress.modules.translation.online_teacher import Attempt
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, UNetGenerator, VGGFeatures
from lightning_compress.networks.gan_layers import init_weights


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than such a fit."""
    for name in ("open_account", "close_account"):
        monkeypatch.setattr(online_teacher, name, lambda *args, **kwargs: None)


def cooperation(train_teacher: bool = True, norm: Any = "instance") -> tuple[Cooperation, PatchDiscriminator]:
    torch.manual_seed(0)
    judge = PatchDiscriminator(3, 4, layers=2, norm=norm)
    return Cooperation(2.0, ["one", "two"], [6, 6], [4, 4], 3, "model.8", train_teacher), judge


def attempt(*channels: int) -> Attempt:
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(2, 3, 64, 64)
    theirs, own = ([torch.randn(2, c, 16, 16, generator=generator) for _ in range(2)] for c in channels)
    return Attempt(image, image, image, theirs, own)


# ---- the papers' networks


def test_the_papers_networks() -> None:
    with torch.device("meta"):
        teacher, student = (ResNetGenerator(ngf=ngf, separable=True) for ngf in (64, 16))
        original = ResNetGenerator()
    costs = [profile(n, (1, 3, 256, 256), convention="gan") for n in (teacher, student, original)]
    assert [cost.params for cost in costs] == [1_987_075, 137_347, 11_378_179]
    assert [round(cost.cost / 1e9, 3) for cost in costs] == [18.314, 1.408, 56.799]
    assert costs[2].cost / costs[1].cost == pytest.approx(40.3, abs=0.1)
    assert costs[2].params / costs[1].params == pytest.approx(82.8, abs=0.1)


@pytest.mark.parametrize(("kind", "channels", "ndf"), [(DCDCycleGAN, 3, 64), (DCDPix2Pix, 6, 128)])
def test_the_papers_connectors(kind: Any, channels: int, ndf: int) -> None:
    with torch.device("meta"):
        networks = ResNetGenerator(separable=True), PatchDiscriminator(channels, ndf)
        module = kind(*networks, ResNetGenerator(ngf=16, separable=True))
        looked_at = input_at(networks[1], module.imitation.judge_layer, torch.zeros(2, channels, 64, 64))
        logits = networks[1](torch.zeros(2, channels, 64, 64))
    for connectors, width in ((module.imitation.of_teacher, 256), (module.imitation.of_student, 64)):
        assert len(connectors) == 4
        for squeeze in connectors:
            assert squeeze[0].weight.shape == (channels, width, 1, 1)
            assert sum(p.numel() for p in squeeze.parameters()) == channels * width + 2 * channels
    assert module.imitation.judge_layer == "model.11"
    assert looked_at.shape == (2, 8 * ndf, 7, 7)
    assert logits.shape == (2, 1, 6, 6)
    assert module.imitation.train_teacher == (kind is DCDPix2Pix)
    lambdas = module.lambda_style, module.lambda_feature, module.lambda_adv, module.imitation.weight
    assert lambdas == (1e4, 10, 1, 1)
    assert module.gan_mode == ("hinge" if kind is DCDPix2Pix else "lsgan")


def test_layers_of_a_unet() -> None:
    """Two convolutions on the way down and two blocks on the way up, as the packaged config names them."""
    level_three = "model.model.1.model.3"
    layers = ["model.model.1.model.2", f"{level_three}.model.3.model.2", f"{level_three}.model.3.model.3", level_three]
    with torch.device("meta"):
        teacher, student = (UNetGenerator(ngf=ngf, dropout=0) for ngf in (64, 16))
        module = DCDPix2Pix(teacher, PatchDiscriminator(6, 128, norm="batch"), student, layers=layers)
    widths = [[squeeze[0].in_channels // ngf for squeeze in connectors] for ngf, connectors in (
        (64, module.imitation.of_teacher), (16, module.imitation.of_student)
    )]  # fmt: skip
    assert widths == [[2, 8, 16, 4]] * 2


# ---- the loss


def test_it_is_zero_where_features_and_connectors_are_the_same() -> None:
    module, judge = cooperation()
    given = attempt(6, 4)
    module.of_student = copy.deepcopy(module.of_teacher)
    same = Attempt(given.source, given.taught, given.made, given.taught_features, given.taught_features)
    losses, _ = module(same, judge)
    assert losses["student_cooperation"] == 0
    losses, _ = module(
        Attempt(given.source, given.taught, given.made, given.taught_features, given.taught_features[::-1]), judge
    )
    assert losses["student_cooperation"] > 0


@pytest.mark.parametrize("train_teacher", [True, False])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_it_is_the_sum_over_layers_of_two_calls_each(train_teacher: bool, norm: Any) -> None:
    """In one call of the discriminator or in two, where no batch norm forbids it."""
    module, judge = cooperation(train_teacher, norm)
    given = attempt(6, 4)
    calls: list[int] = []
    judge.model[0].register_forward_hook(lambda m, args, output: calls.append(len(output)))
    losses, others = module(given, judge)
    assert calls == ([2] * 4 if norm == "batch" else [8] if train_teacher else [4, 4])
    expected, active = torch.zeros(()), []
    module.of_teacher.train(train_teacher)
    for i in range(2):
        theirs, own = module.of_teacher[i](given.taught_features[i]), module.of_student[i](given.made_features[i])
        expected = expected + (judge.model[:-1](theirs) - judge.model[:-1](own)).abs().mean()
        active += [theirs > 0, own > 0]
    torch.testing.assert_close(losses["student_cooperation"], 2 * expected, rtol=1e-6, atol=1e-6)
    assert others["student_connectors_active"] == torch.stack([a.float().mean() for a in active]).mean()


@pytest.mark.parametrize("train_teacher", [True, False])
def test_whom_its_gradient_reaches(train_teacher: bool) -> None:
    module, judge = cooperation(train_teacher)
    judge.requires_grad_(False)
    given = attempt(6, 4)
    for features in given.made_features:
        features.requires_grad_()
    losses, _ = module(given, judge)
    losses["student_cooperation"].backward()
    assert all(features.grad is not None and features.grad.any() for features in given.made_features)
    assert all(p.grad is None for p in judge.parameters())
    assert all(squeeze[0].weight.grad.any() for squeeze in module.of_student)
    assert all((squeeze[0].weight.grad is not None) == train_teacher for squeeze in module.of_teacher)
    assert all(p.requires_grad == train_teacher for p in module.of_teacher.parameters())


def test_it_trains_the_generator_up_to_its_last_layer() -> None:
    torch.manual_seed(0)
    teacher, student = (ResNetGenerator(ngf=ngf, separable=True).double() for ngf in (4, 2))
    judge = PatchDiscriminator(3, 4, layers=1).double().requires_grad_(False)
    module = Cooperation(1.0, LAYERS, [16] * 4, [8] * 4, 3, "model.5", False).double()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    points = [Point(layer) for layer in LAYERS]
    _, own = observe(student, points, images)
    with torch.no_grad():
        image, theirs = observe(teacher, points, images)
    module(Attempt(images, image, image, theirs, own), judge)[0]["student_cooperation"].backward()
    scale = max(p.grad.abs().max() for p in student.parameters() if p.grad is not None)
    for name, p in student.named_parameters():
        index = int(name.split(".")[1])
        if index > 18:
            assert p.grad is None, name
        elif name.endswith("weight"):
            assert p.grad.abs().max() > 1e-6 * scale, name
        elif "conv.2" not in name:  # in front of a norm: rounding
            assert p.grad.abs().max() < 1e-6 * scale, name
    assert all(p.grad is None for network in (teacher, judge) for p in network.parameters())


def test_layers_are_paired_in_the_order_given() -> None:
    """... and not in that of their names, in which 12 comes before 9."""
    seen: list[Attempt] = []

    class Watching(Cooperation):
        def forward(self, attempt: Attempt, judge: nn.Module) -> Any:
            seen.append(attempt)
            return super().forward(attempt, judge)

    layers = ["model.9", "model.10", "model.11"]
    module = small_online(DCDPix2Pix, layers=layers, optimizer=rates(0.0, 0.0, 0.0))
    module.imitation.__class__ = Watching
    data = noise(2, 32)
    a, _ = next(iter(data))
    trainer(max_epochs=1).fit(module, data)
    (given,) = seen
    with torch.no_grad():
        for i, last in enumerate((9, 10, 11)):
            torch.testing.assert_close(given.taught_features[i], module.generator.model[: last + 1](a))
            torch.testing.assert_close(given.made_features[i], module.student.model[: last + 1](a))
    assert not any(features.requires_grad for features in given.taught_features)


# ---- connectors


def test_random_connectors_show_something_of_every_channel() -> None:
    torch.manual_seed(0)
    features = torch.rand(1, 16, 8, 8) + 3 * torch.rand(1, 16, 1, 1)  # nearly constant: half of the filters see nothing
    squeeze = connector(16, 32).eval()
    before = squeeze[0].weight.clone()
    dead = ~(squeeze(features) > 0).any(3).any(2).any(0)
    assert 0 < dead.sum() < 32
    revive(squeeze, features)
    assert (squeeze(features) > 0).any(3).any(2).all()
    assert torch.equal(squeeze[0].weight[~dead], before[~dead])
    with pytest.raises(RuntimeError, match=r"features .* are all zero"):
        revive(squeeze, torch.zeros(1, 16, 8, 8))


def test_they_are_drawn_once_and_keep_their_statistics() -> None:
    drawn: list[int] = []

    class Watching(Cooperation):
        def prepare(self, attempt: Attempt) -> None:
            drawn.append(1)
            super().prepare(attempt)

    module = small_online(DCDCycleGAN)
    module.imitation.__class__ = Watching
    trainer(max_epochs=4).fit(module, noise(4, 32))
    assert drawn == [1]
    for squeeze in module.imitation.of_teacher:
        assert not squeeze[1].running_mean.any()
        assert torch.equal(squeeze[1].running_var, torch.ones(3))
    for squeeze in module.imitation.of_student:
        assert squeeze[1].running_mean.any()


def test_initial_weights_are_a_generators() -> None:
    torch.manual_seed(0)
    squeeze = connector(64, 200)
    assert squeeze[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert squeeze[1].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert squeeze[1].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert squeeze[0].bias is None
    assert not squeeze[1].bias.any()


# ---- steps


def perceptual_losses(network: VGGFeatures, own: Tensor, theirs: Tensor) -> Tensor:
    style = torch.zeros((), dtype=own.dtype)
    for s, t in zip(network(own), network(theirs), strict=True):
        grams = [torch.einsum("nchw,ndhw->ncd", f, f) / f[0].numel() for f in (s, t)]
        style = style + (grams[0] - grams[1]).abs().mean()
    return 1e4 * style + 10 * (network(own)[1] - network(theirs)[1]).abs().mean()


def cooperated(module: Any, judge: nn.Module, own: nn.Module, theirs: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for i, last in enumerate((9, 11)):
        with torch.no_grad():
            features = theirs.model[: last + 1](x)
        squeezed = module.of_teacher[i](features), module.of_student[i](own.model[: last + 1](x))
        total = total + (judge.model[:-1](squeezed[0]) - judge.model[:-1](squeezed[1])).abs().mean()
    return total


def test_with_pairs_it_takes_the_steps_of_the_paper() -> None:
    """G_T meets D_T as it was, the student meets it as it has just become; their images are those from before."""
    module = small_online(DCDPix2Pix, optimizer=rates(0.02, 0.03, 0.01), lambda_cd=3.0).double()
    perceptual = VGGFeatures(width=2).double()
    module._perceptual_net = (perceptual,)
    other = copy.deepcopy(module)
    g, d, s, c = other.generator, other.discriminator, other.student, other.imitation
    optimizers = SGD(g.parameters(), 0.02), SGD(d.parameters(), 0.03), SGD([*s.parameters(), *c.parameters()], 0.01)
    batches = noise(4, 32)
    for a, b in batches:
        a, b = a.double(), b.double()
        fake, made = g(a), s(a)
        for network in (g, d, s, c):
            network.zero_grad()
        real_logits, fake_logits = d(torch.cat([a, b], 1)), d(torch.cat([a, fake.detach()], 1))
        (((1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean()) / 2).backward()
        judged = [p.grad.clone() for p in d.parameters()]
        before, features = fake.detach(), copy.deepcopy(g)
        (-d(torch.cat([a, fake], 1)).mean() + 100 * (fake - b).abs().mean()).backward()
        for p, grad in zip(d.parameters(), judged, strict=True):
            p.grad = grad
        optimizers[0].step()
        optimizers[1].step()
        loss = perceptual_losses(perceptual, made, before) - d(torch.cat([a, made], 1)).mean()
        (loss + 3 * cooperated(c, d, s, features, a)).backward()
        optimizers[2].step()
    trainer(max_epochs=1, precision="64-true").fit(module, batches)
    for name, network in module.named_children():
        for (key, p), q in zip(network.named_parameters(), getattr(other, name).parameters(), strict=True):
            torch.testing.assert_close(p, q, msg=f"{name}.{key}", rtol=1e-9, atol=1e-9)


def test_without_pairs_it_takes_the_steps_of_the_paper() -> None:
    module = small_online(DCDCycleGAN, optimizer=rates(0.0, 0.0, 0.01), n_epochs=2, n_epochs_decay=0, phase_epochs=2)
    module = module.double()
    init_weights(module.imitation, 0.2)  # no channel is dead
    module._prepared = True
    perceptual = VGGFeatures(width=2).double()
    module._perceptual_net = (perceptual,)
    other = copy.deepcopy(module)
    g, d, s, c = other.generator_ab, other.discriminator_ab, other.student, other.imitation
    c.of_teacher.eval()
    optimizer = SGD([*s.parameters(), *c.of_student.parameters()], 0.01)
    batches = noise(4, 32)
    for a, _ in [*batches, *batches]:  # two epochs of the student
        a = a.double()
        made, theirs = s(a), g(a).detach()
        loss = perceptual_losses(perceptual, made, theirs) + ((d(made) - 1) ** 2).mean() + cooperated(c, d, s, g, a)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer(max_epochs=4, precision="64-true").fit(module, batches)
    for name in ("student", "imitation", "generator_ab", "discriminator_ab"):
        for (key, p), q in zip(
            getattr(module, name).named_parameters(), getattr(other, name).parameters(), strict=True
        ):
            torch.testing.assert_close(p, q, msg=f"{name}.{key}", rtol=1e-9, atol=1e-9)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers: ResNetGenerator has no module 'model\.99'"):
        small_online(DCDCycleGAN, layers=["model.99"])
    with pytest.raises(ValueError, match="layers: expected the names of one module or more, got none"):
        small_online(DCDCycleGAN, layers=[])
    with pytest.raises(
        ValueError, match=r"layers: the discriminator fails on 'model\.9', maps \(16, 8, 8\) squeezed to 3"
    ):
        small_online(DCDCycleGAN, discriminator_ab=PatchDiscriminator(3, 4))
    with pytest.raises(ValueError, match="lambda_cd: expected 0 or more, got -1"):
        small_online(DCDPix2Pix, lambda_cd=-1)
    with pytest.raises(ValueError, match=r"layers: the maps of 'model\.6' are \(8, 16, 16\) in the teacher, \(3, 32"):
        small_online(DCDPix2Pix, layers=["model.6"], student=Deep())
    with pytest.raises(ValueError, match=r"layers: 'model' of ResNetGenerator gives no maps|layers: 'net' of"):
        small_online(DCDPix2Pix, generator=Listing(), student=Listing(), layers=["net"])


class Deep(nn.Module):
    """Its module of that name is at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Listing(nn.Module):
    """Has a module that returns no tensor."""

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, x]

    def __init__(self) -> None:
        super().__init__()
        self.net = self.Pair()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.net(x)[0])


def test_a_student_comes_nearer_to_its_teacher() -> None:
    """On drawings of photographs, nearer by all terms than without those on images; its features follow."""

    def train(**arguments: Any) -> tuple[list[float], float]:
        seen: list[float] = []

        class Watching(Callback):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                seen.append(float(trainer.callback_metrics["train/student_cooperation"]))

        optimizer = partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))
        data = PairedPhotographs(crop_size=32, samples_per_epoch=32, direction="BtoA", batch_size=4, eval_batch_size=16)
        run = trainer(Watching(), max_epochs=4)
        run.fit(small_online(DCDPix2Pix, optimizer=optimizer, **arguments), data)
        return seen, float(run.callback_metrics["val/student/to_teacher"])

    cooperation, distance = train()
    assert cooperation[-1] < cooperation[0]
    _, alone = train(lambda_style=0.0, lambda_feature=0.0)
    assert distance < 0.9 * alone
