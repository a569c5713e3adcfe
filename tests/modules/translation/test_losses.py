from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.modules.translation import gan_loss, gradient_penalty


@pytest.mark.parametrize(
    ("mode", "real", "for_discriminator", "expected"),
    [
        ("lsgan", True, True, 0.49),
        ("lsgan", False, True, 0.09),
        ("lsgan", True, False, 0.49),
        ("hinge", True, True, 0.7),
        ("hinge", False, True, 1.3),
        ("hinge", True, False, -0.3),
        ("vanilla", True, True, 0.554355),
        ("vanilla", False, True, 0.854355),
        ("vanilla", True, False, 0.554355),
        ("wgan", True, True, -0.3),
        ("wgan", False, True, 0.3),
        ("wgangp", True, False, -0.3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(mode: str, real: bool, for_discriminator: bool, expected: float, dtype: torch.dtype) -> None:
    logits = torch.full((2, 1, 5, 5), 0.3).to(dtype)
    found = gan_loss(logits, real, mode, for_discriminator=for_discriminator)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, abs=1e-6 if dtype == torch.float32 else 2e-3)


def test_hinge_stops_where_the_discriminator_is_sure() -> None:
    logits = torch.tensor([-2.0, 0.0, 2.0])
    assert gan_loss(logits, True, "hinge", for_discriminator=True).item() == pytest.approx((3 + 1 + 0) / 3)
    assert gan_loss(logits, False, "hinge", for_discriminator=True).item() == pytest.approx((0 + 1 + 3) / 3)


@pytest.mark.parametrize("mode", ["lsgan", "vanilla", "hinge", "wgan", "wgangp"])
def test_a_generator_never_wants_to_be_told_from_real_images(mode: str) -> None:
    with pytest.raises(ValueError, match="real=False is a target of the discriminator"):
        gan_loss(torch.zeros(2), False, mode, for_discriminator=False)


def test_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gan_mode: expected one of lsgan, .*got 'lsgna'\. Did you mean 'lsgan'"):
        gan_loss(torch.zeros(2), True, "lsgna", for_discriminator=True)


class Linear(nn.Module):
    """<w, x> for every image, of slope |w| everywhere."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        weight = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(slope * weight / weight.norm())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 3.0])
def test_the_penalty_is_on_slopes_other_than_one(slope: float) -> None:
    network = Linear(slope)
    real, fake = torch.randn(2, 5, 3, 4, 4).unbind()
    penalty = gradient_penalty(network, real, fake)
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-6)
    penalty.backward()
    expected = 2 * (slope - 1) * math.copysign(1, slope) if slope else 0.0
    along = (network.weight.grad * network.weight).sum() / max(slope, 1e-12)
    assert along.item() == pytest.approx(expected, abs=1e-5)


def test_the_penalty_is_taken_between_the_images_and_not_of_the_generator() -> None:
    seen: list[Tensor] = []
    network = Linear(2.0)
    network.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    real, fake = torch.zeros(200, 3, 4, 4), torch.ones(200, 3, 4, 4, requires_grad=True)
    torch.manual_seed(0)
    gradient_penalty(network, real, fake).backward()
    (between,) = seen
    share = between[:, 0, 0, 0]
    assert (between == share[:, None, None, None]).all(), "one share for an image"
    assert 0 <= share.min() < 0.05
    assert 0.95 < share.max() <= 1
    assert fake.grad is None
