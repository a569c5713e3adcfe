"""CRD: the relations in a training, and its weights; the relations themselves: tests/core/distill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from translation import noise, small_online, trainer

from lightning_compress.core.distill.content_relations import ContentRelationLoss
from lightning_compress.core.profile import profile
from lightning_compress.datamodules import PairedPhotographs
from lightning_compress.modules import CRDCycleGAN, CRDPix2Pix
from lightning_compress.modules.translation import online_teacher
from lightning_compress.modules.translation.crd import Relations
from lightning_compress.modules.translation.losses import gan_loss
from lightning_compress.modules.translation.online_teacher import Attempt, style_loss
from lightning_compress.networks import EdgeDrawing, PatchDiscriminator, ResNetGenerator, UNetGenerator


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than such a fit."""
    for name in ("open_account", "close_account"):
        monkeypatch.setattr(online_teacher, name, lambda *args, **kwargs: None)


def attempt(count: int = 2) -> Attempt:
    source, taught, made = 2 * torch.rand(3, count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    return Attempt(source, taught, made.requires_grad_())


def losses(kind: Any, given: Attempt, **arguments: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    module = small_online(kind, **arguments)
    module.trainer = trainer(max_epochs=4)
    module.setup("fit")
    return module, module.student_loss(given)[0]


def test_the_papers_unets() -> None:
    with torch.device("meta"):
        teacher, student = (UNetGenerator(ngf=ngf, dropout=0) for ngf in (64, 16))
    assert profile(teacher, (1, 3, 256, 256)).params == 54_413_955
    cost = profile(student, (1, 3, 256, 256), convention="gan")
    assert (cost.params, round(cost.cost / 1e9, 4)) == (3_404_451, 1.2187)


@pytest.mark.parametrize(
    ("kind", "relations", "factor", "judged"), [(CRDCycleGAN, 25.0, 1, True), (CRDPix2Pix, 2.5, 2, False)]
)
def test_the_papers_weights(kind: Any, relations: float, factor: float, judged: bool) -> None:
    given = attempt()
    module, found = losses(kind, given)
    assert set(found) == {f"student_{name}" for name in ("row", "column", "patch", "style", "feature")} | (
        {"student_gan"} if judged else set()
    )
    expected = ContentRelationLoss(patch=8, reduction="sum").terms(given.made, given.taught)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"student_{name}"], relations * value)
    own, theirs = module._perceptual.network(given.made), module._perceptual(given.taught)
    torch.testing.assert_close(found["student_style"], factor * 1e4 * style_loss(own, theirs))
    torch.testing.assert_close(found["student_feature"], factor * 10 * F.l1_loss(own[1], theirs[1]))
    if judged:
        verdict = gan_loss(module.discriminator_ab(given.made), True, "lsgan", for_discriminator=False)
        torch.testing.assert_close(found["student_gan"], verdict)
    assert module.gan_mode == ("lsgan" if judged else "hinge")
    default = kind(*parts(kind))
    assert default.student_ratio == (4 if judged else 1)
    assert not judged or default.phase_epochs == 10


def parts(kind: Any) -> tuple[Any, ...]:
    fresh = small_online(kind)
    names = ("generator", "discriminator") if kind is CRDPix2Pix else ("generator_ab", "discriminator_ab")
    return *(getattr(fresh, name) for name in names), fresh.student


def test_relations_are_summed_over_a_batch() -> None:
    one = attempt(1)
    twice = Attempt(*(torch.cat([x, x]) for x in (one.source, one.taught, one.made)))
    relations = Relations(2.5, 8, "image", (3, 32, 32))
    single, both = (relations(given, torch.nn.Identity())[0] for given in (one, twice))
    for name, value in single.items():
        torch.testing.assert_close(both[name], 2 * value)
    assert relations(Attempt(one.source, one.taught, one.taught), torch.nn.Identity())[0]["student_row"] < 1e-6


def test_patches_as_in_the_authors_code_for_pairs() -> None:
    given = attempt()
    _, found = losses(CRDPix2Pix, given, patch_mode="released")
    expected = ContentRelationLoss(patch=8, patch_mode="released").terms(given.made, given.taught)
    torch.testing.assert_close(found["student_patch"], 2.5 * expected["patch"])
    assert not torch.isclose(found["student_patch"], losses(CRDPix2Pix, given)[1]["student_patch"])


def test_relations_are_learnt() -> None:
    """Of photographs and the edges in them, to less than half in a few steps."""
    torch.manual_seed(0)
    data = PairedPhotographs(crop_size=32, direction="BtoA", batch_size=8)
    data.setup("fit")
    photographs, _ = next(iter(data.train_dataloader()))
    student, taught = ResNetGenerator(ngf=8, blocks=1), EdgeDrawing()(photographs)
    relations, optimizer = Relations(1.0, 8, "image", (3, 32, 32)), torch.optim.Adam(student.parameters(), 2e-3)
    seen = []
    for _ in range(25):
        terms, _ = relations(Attempt(photographs, taught, student(photographs)), student)
        seen.append(torch.stack(list(terms.values())))
        optimizer.zero_grad()
        seen[-1].sum().backward()
        optimizer.step()
    assert (seen[-1] < 0.5 * seen[0]).all()


def test_the_student_learns_and_nobody_else_by_it() -> None:
    module = small_online(CRDPix2Pix, lambda_gan=0.0, lambda_l1=0.0, lambda_rel=1.0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(max_epochs=1).fit(module, noise(2, 32))
    changed = {name.split(".")[0] for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"student", "discriminator"}  # which learns to tell real images, and is not asked by the others


def test_impossible_arguments_are_refused() -> None:
    for name in ("lambda_rel", "perceptual_factor"):
        for kind in (CRDPix2Pix, CRDCycleGAN):
            with pytest.raises(ValueError, match=f"{name}: expected 0 or more, got -1"):
                small_online(kind, **{name: -1})
    with pytest.raises(ValueError, match="patch: images of 32x32 do not divide into patches of 5x5"):
        small_online(CRDCycleGAN, patch=5)
    with pytest.raises(ValueError, match="patch_mode must be 'image' or 'released', got 'batch'"):
        small_online(CRDPix2Pix, patch_mode="batch")
    with pytest.raises(ValueError, match="discriminator: "):
        small_online(CRDPix2Pix, discriminator=PatchDiscriminator(3, 4, layers=1))
