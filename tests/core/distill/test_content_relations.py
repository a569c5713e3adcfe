from __future__ import annotations

from typing import Any

import pytest
import torch
from image_pairs import waves
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.core.distill import content_relations
from lightning_compress.core.distill.content_relations import (
    ContentRelationLoss,
    angle_loss,
    content_relation,
    contents,
    distance_loss,
    squared_distances,
)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_relation(student: Tensor, teacher: Tensor, w_d: float = 1.0, w_a: float = 2.0) -> Tensor:
    """Of contents (n, d): all n x n differences, and all n^3 angles at once."""

    def relations(points: Tensor) -> tuple[Tensor, Tensor]:
        apart = points[None] - points[:, None]
        lengths = apart.square().sum(2).clamp(min=1e-12).sqrt() * (1 - torch.eye(len(points)))
        directions = apart / torch.linalg.vector_norm(apart + 0.0, dim=2, keepdim=True).clamp(min=1e-12)
        return lengths / lengths[lengths > 0].mean(), directions @ directions.mT

    (own, own_angles), (theirs, their_angles) = relations(student), relations(teacher)
    return w_d * F.smooth_l1_loss(own, theirs) + w_a * F.smooth_l1_loss(own_angles, their_angles)


# ---- numbers


def test_three_points() -> None:
    student = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    teacher = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])
    own, theirs = squared_distances(student), squared_distances(teacher)
    assert torch.allclose(own, torch.tensor([[[0.0, 1, 1], [1, 0, 2], [1, 2, 0]]], dtype=torch.float64))
    assert distance_loss(own, theirs).item() == pytest.approx(0.01848445, abs=1e-8)
    assert angle_loss(own, theirs).item() == pytest.approx(0.00380124, abs=1e-8)
    assert content_relation(student, teacher).item() == pytest.approx(0.02608693, abs=1e-8)


WAVES = {
    "row": (5.361879e-4, 4.464745e-3, 9.465677e-3, 9.465674e-3),
    "column": (2.454248e-3, 2.106632e-2, 4.458689e-2, 4.458688e-2),
    "patch": (2.015146e-3, 2.805026e-3, 7.625198e-3, 7.625208e-3),
}


@pytest.mark.parametrize(("slicing", "expected"), WAVES.items(), ids=WAVES)
def test_waves(slicing: Any, expected: tuple[float, float, float, float]) -> None:
    student, teacher = (contents(images, slicing) for images in waves(torch.float64))
    own, theirs = squared_distances(student), squared_distances(teacher)
    assert distance_loss(own, theirs).item() == pytest.approx(expected[0], rel=3e-7)
    assert angle_loss(own.float(), theirs.float()).item() == pytest.approx(expected[1], rel=3e-7)
    if slicing != "column":  # in float64 half a second each
        assert content_relation(student, teacher).item() == pytest.approx(expected[2], rel=3e-7)
    # and of images in float32
    student, teacher = (contents(images, slicing) for images in waves(torch.float32))
    assert content_relation(student, teacher).item() == pytest.approx(expected[3], rel=3e-7)


# ---- against the obvious form


@pytest.mark.parametrize("block", [1, 2**6, 2**17])
def test_it_is_the_naive_form_with_its_gradient(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when looked at vertex by vertex."""
    monkeypatch.setattr(content_relations, "_CPU_BLOCK", block)
    student, teacher = (rand(2, 9, 7, seed=seed, dtype=torch.float64) for seed in range(2))
    student.requires_grad_()
    weight = torch.tensor([1.0, -3.0], dtype=torch.float64)
    expected = torch.stack([naive_relation(s, t) for s, t in zip(student, teacher, strict=True)])
    (gradient,) = torch.autograd.grad(expected @ weight, student)
    found = content_relation(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found @ weight, student)[0], gradient, rtol=1e-12, atol=1e-14)


def test_in_float32_on_an_image() -> None:
    images = [image[..., 64:128, 64:128] for image in waves(torch.float32)]
    student, teacher = (contents(image, "row") for image in images)
    student.requires_grad_()
    expected = naive_relation(student[0].double(), teacher[0].double())
    (gradient,) = torch.autograd.grad(expected, student)
    found = content_relation(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    difference = (torch.autograd.grad(found.sum(), student)[0] - gradient).norm()
    assert difference < 1e-4 * gradient.norm()


def test_gradcheck() -> None:
    student, teacher = (rand(1, 5, 4, seed=seed, dtype=torch.float64) for seed in range(2))
    assert torch.autograd.gradcheck(lambda s: content_relation(s, teacher), student.requires_grad_())


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (rand(1, 3, 64, 64, seed=seed).requires_grad_() for seed in range(2))
    ContentRelationLoss()(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


# ---- what it does not depend on


def test_invariance() -> None:
    teacher = contents(rand(1, 3, 32, 32), "row")
    turn, _ = torch.linalg.qr(rand(96, 96, seed=1, dtype=torch.float64))
    assert content_relation(teacher, teacher).item() == 0
    assert content_relation(-teacher, teacher).item() <= 1e-6
    for scale, shift in ((0.2, 0.3), (7.0, -2.0)):
        assert content_relation(scale * teacher + shift, teacher).item() <= 1e-6
    assert content_relation((teacher.double() @ turn).float(), teacher).item() <= 1e-6
    assert content_relation(teacher.square(), teacher).item() > 1e-4


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_images_of_a_batch_are_on_their_own(reduction: Any) -> None:
    student, teacher = (rand(3, 3, 64, 64, seed=seed) for seed in range(2))
    loss = ContentRelationLoss(reduction=reduction)
    apart = torch.stack([loss(s[None], t[None]) for s, t in zip(student, teacher, strict=True)])
    expected = apart.sum() if reduction == "sum" else apart.mean()
    assert loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)
    order = torch.tensor([2, 0, 1])
    assert loss(student[order], teacher[order]).item() == pytest.approx(expected.item(), rel=1e-6)
    copies = loss(student[:1].expand(4, -1, -1, -1), teacher[:1].expand(4, -1, -1, -1))
    assert copies.item() == pytest.approx((4 if reduction == "sum" else 1) * apart[0].item(), rel=1e-6)


# ---- how images are cut


def test_rows_columns_and_patches() -> None:
    images = rand(2, 3, 64, 96)
    rows, columns, patches = (contents(images, slicing) for slicing in ("row", "column", "patch"))  # type: ignore[arg-type]
    assert torch.equal(rows[1, 5], images[1, :, 5, :].flatten())
    assert torch.equal(columns[1, 7], images[1, :, :, 7].flatten())
    assert (rows.shape, columns.shape) == ((2, 64, 288), (2, 96, 192))
    assert torch.equal(patches, F.unfold(images, 32, stride=32).mT)
    assert contents(torch.zeros(1, 3, 256, 256), "patch").shape == (1, 64, 3072)
    assert contents(images, "patch", patch=16).shape == (2, 24, 768)


def test_released_patches_are_the_channels_of_one_patch_of_the_first_image() -> None:
    images = rand(3, 3, 64, 64)
    found = contents(images, "patch", patch_mode="released")
    assert found.shape == (3, 3, 1024)
    assert torch.equal(found, F.unfold(images[:1], 32, stride=32).mT.view(4, 3, 1024)[:3])


def test_distances_of_rows_that_are_close_and_far_from_the_origin() -> None:
    c, i = torch.arange(3.0)[:, None, None], torch.arange(64.0)[None, :, None]
    image = (1000 * c + i).expand(3, 64, 64)[None]
    rows = squared_distances(contents(image, "row"))[0].sqrt()
    expected = (torch.arange(64.0)[:, None] - torch.arange(64.0)).abs().double() * (3 * 64) ** 0.5
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6)
    assert rows[0, 1].item() == pytest.approx(13.856406, abs=1e-6)
    # all columns are the same one
    student = (image + torch.rand(image.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = content_relation(contents(student, "column"), contents(image, "column"))
    loss.sum().backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_flat_images_say_nothing(which: str) -> None:
    flat, image = torch.full((1, 3, 32, 32), 0.7) + 1e-5 * rand(1, 3, 32, 32, seed=5), rand(1, 3, 32, 32)
    student = (image if which == "teacher" else flat).clone().requires_grad_()
    loss = ContentRelationLoss(patch=16)
    value = loss(student, image if which == "student" else flat)
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_contents_that_coincide_form_no_angle() -> None:
    points = rand(6, 4, dtype=torch.float64)
    student, teacher = points[[0, 1, 2, 3, 3, 4]][None].requires_grad_(), points[[0, 1, 2, 5, 4, 4]][None]
    found = content_relation(student, teacher, w_d=0)
    assert found.item() == pytest.approx(naive_relation(student[0], teacher[0], w_d=0).item(), rel=1e-9)
    found.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# ---- the module


def test_terms() -> None:
    student, teacher = (rand(2, 3, 64, 64, seed=seed) for seed in range(2))
    terms = ContentRelationLoss()(student, teacher), ContentRelationLoss().terms(student, teacher)
    assert list(terms[1]) == ["row", "column", "patch"]
    assert terms[0].item() == pytest.approx(sum(x.item() for x in terms[1].values()), rel=1e-6)
    only = ContentRelationLoss(w_d=0.5, w_a=0, slices=["patch"])(student, teacher)
    cut = [squared_distances(contents(images, "patch")) for images in (student, teacher)]
    assert only.item() == pytest.approx(0.5 * distance_loss(cut[0], cut[1]).sum().item(), rel=1e-6)


def test_half_precision_around_it_changes_nothing() -> None:
    student, teacher = (rand(1, 3, 32, 32, seed=seed) for seed in range(2))
    loss = ContentRelationLoss()
    expected = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), expected)
    assert loss(student.bfloat16(), teacher).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slices": ["rows"]}, r"slices: there is no slicing 'rows'. Did you mean 'row'\?"),
        ({"slices": []}, "slices: expected one or more of row, column, patch, got"),
        ({"slices": ["row", "row"]}, "slices: expected one or more of"),
        ({"patch": 0}, "patch: expected 1 or more pixels, got 0"),
        ({"w_d": -1}, "w_d, w_a: expected 0 or more, got -1 and 2.0"),
        ({"reduction": "max"}, "reduction must be 'sum' or 'mean', got 'max'"),
        ({"patch_mode": "paper"}, "patch_mode must be 'image' or 'released', got 'paper'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContentRelationLoss(**arguments)


def test_patches_have_to_fit() -> None:
    with pytest.raises(ValueError, match="patch: images of 64x80 do not divide into patches of 32x32"):
        contents(torch.zeros(1, 3, 64, 80), "patch")
