"""Co-attention: its distances by hand, where features come from, where the student begins, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Foreign, assert_same, made, no_pictures
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from translation import Identity, Remembering, noise, rates, small_cycle_gan, small_pix2pix, trainer

from lightning_compress.callbacks import DMAD, CoAttentionDistillation, RestoreCompressed
from lightning_compress.callbacks.distillation.co_attention import (
    attended_layers,
    attention,
    attention_distance,
    co_attention,
)
from lightning_compress.core.report import Account
from lightning_compress.modules import CycleGAN, Pix2Pix
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, UNetGenerator


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accounts are written there, without pictures."""
    monkeypatch.chdir(tmp_path)
    with no_pictures:
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide_pix2pix(seed: int = 1, **arguments: Any) -> Pix2Pix:
    torch.manual_seed(seed)
    return Pix2Pix(**{
        "generator": ResNetGenerator(ngf=5, blocks=1), "discriminator": PatchDiscriminator(6, 3, layers=2), **arguments
    })  # fmt: skip


def wide_cycle_gan() -> CycleGAN:
    torch.manual_seed(1)
    return CycleGAN(ResNetGenerator(ngf=5, blocks=1), PatchDiscriminator(3, 3, layers=2))


# ---- the losses


def test_attention_and_its_distance() -> None:
    features = torch.tensor([[1.0, 0.0, -2.0, 0.0], [3.0, 0.0, 0.0, 4.0]]).view(1, 2, 2, 2)
    assert attention(features).flatten().tolist() == [5.0, 0.0, 2.0, 8.0]
    one = torch.tensor([[3.0, 4.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    other = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(2, 1, 1, 2)
    # (0.6 - 1)^2 + 0.8^2 = 0.8 and 1 + 1 = 2, over four entries
    assert attention_distance(one, other).item() == pytest.approx(0.7)


def test_the_distance_knows_no_scale_and_a_bound() -> None:
    p, q = random(3, 4, 6, 7).square().mean(1, keepdim=True), random(3, 1, 6, 7, seed=1).square()
    factors = torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1, 1)
    assert attention_distance(p, p * factors).item() == pytest.approx(0, abs=1e-12)
    assert attention_distance(p, q * factors).item() == pytest.approx(attention_distance(p, q).item())
    assert 0 < attention_distance(p, q) <= 2 / 42
    apart = torch.zeros(2, 1, 1, 6, 7)
    apart[0, ..., 0, 0], apart[1, ..., 1, 1] = 1, 5
    assert attention_distance(*apart).item() == pytest.approx(2 / 42)


def test_the_target_mixes_maps_of_the_size_of_the_generators() -> None:
    small, large = random(2, 1, 2, 2).square(), random(2, 1, 4, 4, seed=1).square()
    blocks = large.view(2, 1, 2, 2, 2, 2).mean((3, 5))  # of all samples, not rounded
    torch.testing.assert_close(co_attention(small, large, (0.5, 0.25)), 0.5 * small + 0.25 * blocks)
    torch.testing.assert_close(co_attention(large, large, (0.5, 0.5)), large)


@pytest.mark.parametrize(
    ("generator", "layers"),
    [
        (lambda: ResNetGenerator(ngf=2), ["model.9", "model.12", "model.15", "model.18"]),
        (lambda: ResNetGenerator(ngf=2, blocks=6), ["model.9", "model.11", "model.13", "model.15"]),
        (lambda: ResNetGenerator(ngf=2, blocks=1), ["model.9", "model.10"]),
        (lambda: ResNetGenerator(widths=[2, 2, 2, 0, 1, 1, 0, 0, 1, 1, 1, 0, 2, 2]),
         ["model.9", "model.12", "model.15", "model.18"]),
        (Identity, None),
    ],
)  # fmt: skip
def test_layers_of_a_residual_generator(generator: Any, layers: list[str] | None) -> None:
    assert attended_layers(generator()) == layers


def test_layers_of_a_unet() -> None:
    """Where the image is 4 and 16 times smaller: behind the leaky ReLU on the way down, behind the norm on that up."""
    unet = UNetGenerator(ngf=1, dropout=0.5).eval()
    seen: dict[str, Tensor] = {}
    layers = attended_layers(unet)
    assert layers is not None
    for name in layers:
        unet.get_submodule(name).register_forward_hook(lambda m, a, out, key=name: seen.__setitem__(key, out))
    unet(random(1, 3, 256, 256))
    assert [seen[name].shape[-1] for name in layers] == [64, 16, 16, 64]
    kinds = [type(unet.get_submodule(name)) for name in layers]
    assert kinds == [nn.LeakyReLU, nn.LeakyReLU, nn.BatchNorm2d, nn.BatchNorm2d]


# ---- in a step


def terms_by_hand(module: Any, teacher: Any, batch: tuple[Tensor, Tensor], detach: bool = True) -> dict[str, Tensor]:
    """The two losses of the first step, from the networks as they are, and with a graph."""
    values = {}
    for direction in module.directions:
        source = batch["ab".index(direction.source)]
        student = module.generator_of(direction)
        large = teacher.generator_of(direction).eval()
        judge = teacher.discriminator_of(direction).eval()
        theirs, ours = [large.model[:10](source)], [student.model[:10](source)]
        theirs += [large.model[10](theirs[0])]
        ours += [student.model[10](ours[0])]
        fake, image = student(source), large(source).detach()
        shown = [torch.cat([source, x], 1) if direction.conditional else x for x in (fake, image)]
        looked = judge.model[:5](shown[0])
        looked = attention(looked.detach() if detach else looked)
        loss = sum(
            attention_distance(0.5 * attention(t.detach()) + 0.5 * looked, attention(s))
            for t, s in zip(theirs, ours, strict=True)
        )
        last = len(judge.model) - 1
        distance = (judge.model[:last](shown[0]) - judge.model[:last](shown[1]).detach()).square().sum().sqrt()
        ending = f"_{direction.name}" if len(module.directions) > 1 else ""
        values[f"train/attention{ending}"] = 100 * loss
        values[f"train/judged{ending}"] = 1e-4 * distance
    return values


@pytest.mark.parametrize("small", [small_pix2pix, small_cycle_gan])
def test_the_terms_of_a_step(small: Any) -> None:
    """... from features of the real images alone, where a call holds others too."""
    module = small(optimizer=rates(0.0, 0.0))
    teacher = wide_pix2pix() if small is small_pix2pix else wide_cycle_gan()
    names = [
        f"train/{term}{e}"
        for term in ("attention", "judged")
        for e in (("",) if small is small_pix2pix else ("_ab", "_ba"))
    ]
    remembering = Remembering(*names)
    data = noise(2)
    trainer(CoAttentionDistillation(teacher), remembering, max_epochs=1).fit(module, data)
    expected = terms_by_hand(module, teacher, next(iter(data)))
    assert remembering.values[0] == pytest.approx([expected[name].item() for name in names], rel=1e-4)
    assert not module.generator_loss_terms
    assert not any(layer._forward_hooks for layer in module.modules())


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_passes_through_the_target_only_if_asked_to(detach: bool) -> None:
    data, teacher = noise(2), wide_pix2pix()
    plain, taught = (small_pix2pix(optimizer=rates(1e-3, 0.0), lambda_gan=0.0, lambda_l1=0.0) for _ in range(2))
    expected = terms_by_hand(plain, teacher, next(iter(data)), detach)
    gradients = torch.autograd.grad(
        sum(expected.values()), list(plain.generator.parameters()), allow_unused=True, materialize_grads=True
    )
    before = [p.detach().clone() for p in taught.generator.parameters()]
    trainer(CoAttentionDistillation(teacher, detach_target=detach), max_epochs=1).fit(taught, data)
    for p, old, gradient in zip(taught.generator.parameters(), before, gradients, strict=True):
        torch.testing.assert_close((old - p.detach()) / 1e-3, gradient, rtol=1e-2, atol=2e-3)


def test_a_teacher_never_changes_and_is_in_eval_unless_asked_otherwise() -> None:
    unet = UNetGenerator(ngf=2, downs=4)
    teacher = wide_pix2pix(generator=unet, discriminator=PatchDiscriminator(6, 3, layers=2, norm="batch"))
    attentions = {}
    for train in (False, True):
        module = small_pix2pix(generator=UNetGenerator(ngf=1, downs=4))
        method, remembering = CoAttentionDistillation(teacher, teacher_train=train), Remembering("train/attention")
        trainer(method, remembering, max_epochs=1).fit(module, noise(2))
        attentions[train] = remembering.values
        pair = method._pairs["ab"]
        for network, own in ((pair.generator.network, unet), (pair.discriminator.network, teacher.discriminator)):
            for (name, now), then in zip(network.named_parameters(), own.parameters(), strict=True):
                assert torch.equal(now, then), name
            assert all(layer.training is train for layer in network.modules())
    assert attentions[False] != attentions[True]


# ---- where the student begins


def searched(root: Path) -> Path:
    """A checkpoint that a search has cut."""
    saving = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
    module = small_pix2pix(generator=ResNetGenerator(ngf=6, blocks=2))
    trainer(DMAD(mask_weight_decay=0.1), saving, root=root, max_epochs=5).fit(module, noise(8))
    return root / "epoch=4.ckpt"


def test_a_student_begins_with_what_a_search_has_left(tmp_path: Path) -> None:
    """... is taught by what it was before, stopped, and resumed, also where structures are restored first."""
    dense = small_pix2pix(generator=ResNetGenerator(ngf=6, blocks=2))
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.ckpt")
    path = searched(tmp_path)
    state = torch.load(path, weights_only=True)["state_dict"]

    def run(root: Path, *, rate: float = 1e-3, **arguments: Any) -> tuple[Pix2Pix, CoAttentionDistillation]:
        module = small_pix2pix(generator=ResNetGenerator(ngf=6, blocks=2), optimizer=rates(rate, rate))
        method = CoAttentionDistillation(str(tmp_path / "dense.ckpt"), student_weights=str(path))
        saving = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
        fit = trainer(RestoreCompressed(), method, saving, root=root, max_epochs=2)
        fit.fit(module, noise(4), weights_only=True, **arguments)
        return module, method

    still, method = run(tmp_path / "still", rate=0.0)
    assert still.generator.widths[0] < 6
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            assert torch.equal(still.state_dict()[name], tensor), name
    assert method._pairs["ab"].generator.network.widths == (6, 12, 24, 24, 24, 12, 6)
    whole, _ = run(tmp_path / "whole")
    (tmp_path / "whole" / "epoch=0.ckpt").rename(tmp_path / "stopped.ckpt")
    resumed, _ = run(tmp_path / "resumed", ckpt_path=tmp_path / "stopped.ckpt")
    assert_same(resumed, whole)
    account = Account.load(tmp_path / "whole" / "compression.json")
    assert account.after.macs < account.before.macs


def test_a_second_fit_goes_on_with_the_same_student(tmp_path: Path) -> None:
    path = searched(tmp_path)
    module = small_pix2pix(generator=ResNetGenerator(ngf=6, blocks=2))
    fit = trainer(CoAttentionDistillation(wide_pix2pix(), student_weights=str(path)), root=tmp_path, max_epochs=1)
    fit.fit(module, noise(2))
    before = module.generator.model[1].weight.detach().clone()
    fit.fit_loop.max_epochs = 2
    fit.fit(module, noise(2))
    assert (module.generator.model[1].weight - before).abs().max() < 1e-3  # one step, not another beginning


def test_masks_that_are_still_there_are_no_beginning(tmp_path: Path) -> None:
    searched(tmp_path)
    method = CoAttentionDistillation(wide_pix2pix(), student_weights=str(tmp_path / "epoch=1.ckpt"))
    with pytest.raises(ValueError, match="student_weights: the masks in"):
        trainer(method, root=tmp_path).fit(small_pix2pix(generator=ResNetGenerator(ngf=6, blocks=2)), noise(2))


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": ResNetGenerator(ngf=2, blocks=1)}, "teacher: expected a translation system"),
        ({"teacher": wide_cycle_gan()}, "teacher: CycleGAN has the directions"),
        ({"teacher": wide_pix2pix(generator=UNetGenerator(ngf=1, downs=4))}, r"layers: the student's .* has no 'model"),
        ({"teacher": wide_pix2pix(discriminator=nn.Sequential(nn.Conv2d(6, 1, 3), nn.LeakyReLU()))}, "LeakyReLU"),
        ({"teacher": wide_pix2pix(generator=Identity())}, "layers=None"),
        ({"lambda_attention": 0.0, "lambda_discriminator": 0.0}, "nothing is taught"),
        ({"attention_mix": (1.0,)}, "attention_mix"),
        ({"layers": ["model.99"]}, "layers: the teacher's ResNetGenerator has no 'model.99'"),
        ({"teacher_weights": "no.ckpt"}, "teacher_weights"),
        ({"student_weights": "no.ckpt"}, "student_weights: 'no.ckpt'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(arguments: Any, message: str) -> None:
    module = small_pix2pix()
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        trainer(CoAttentionDistillation(**{"teacher": wide_pix2pix(), **arguments})).fit(module, noise(2))
    assert not module.generator_loss_terms


def test_other_modules_are_refused(tmp_path: Path) -> None:
    module = made()
    assert isinstance(module, Foreign)
    with pytest.raises(MisconfigurationException, match="teaches translation systems"):
        trainer(CoAttentionDistillation(wide_pix2pix())).fit(module, noise(2))


def test_a_search_is_a_fit_of_its_own() -> None:
    with pytest.raises(MisconfigurationException, match="follows DMAD in a fit of its own"):
        trainer(DMAD(), CoAttentionDistillation(wide_pix2pix())).fit(small_pix2pix(), noise(2))
