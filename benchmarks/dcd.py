"""What a student's step of DCD costs: as it is done here, against forward and backward passes of one thing at a time.

The plain form is that of the authors' code shape: each of the eight feature maps goes through the connectors and the
whole discriminator on its own, the teacher's with gradients too, and both images through the perceptual network with
gradients. Same networks, same images, same gradients. Then, what is felt on a CPU of the MACs that the student saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from _latency import felt
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.distill.taps import Point, observe
from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.modules import DCDCycleGAN
from lightning_compress.modules.translation.online_teacher import Attempt
from lightning_compress.networks import PatchDiscriminator, ResNetGenerator, VGGFeatures

PIXELS = 128


def system() -> DCDCycleGAN:
    """The paper's networks, and a perceptual network of a quarter of the width, which both forms call alike."""
    torch.manual_seed(0)
    module = DCDCycleGAN(
        ResNetGenerator(separable=True), PatchDiscriminator(), ResNetGenerator(ngf=16, separable=True),
        input_shape=(3, PIXELS, PIXELS),
    )  # fmt: skip
    module._perceptual = Teacher(VGGFeatures(width=16))
    for part in (module.generator_ab, module.discriminator_ab):
        part.requires_grad_(False)
    module.imitation.of_teacher.eval()
    return module


def ours(module: DCDCycleGAN, images: Tensor) -> None:
    module.student.zero_grad()
    module.imitation.zero_grad()
    points = [Point(layer) for layer in module.imitation.layers]
    with torch.no_grad():
        taught, theirs = observe(module.best_teacher.eval(), points, images)
    made, own = observe(module.student, points, images)
    losses, _ = module.student_loss(Attempt(images, taught, made, theirs, own))
    torch.stack(list(losses.values())).sum().backward()


def one_by_one(module: DCDCycleGAN, images: Tensor, whole: nn.Module) -> None:
    module.student.zero_grad()
    module.imitation.zero_grad()
    points = [Point(layer) for layer in module.imitation.layers]
    with torch.no_grad():
        taught, theirs = observe(module.best_teacher.eval(), points, images)
    made, own = observe(module.student, points, images)
    before_last = [Point(module.imitation.judge_layer, input=True)]
    loss = (module.discriminator_ab(made) - 1).square().mean()
    for i in range(len(own)):
        _, (at_theirs,) = observe(module.discriminator_ab, before_last, module.imitation.of_teacher[i](theirs[i]))
        _, (at_own,) = observe(module.discriminator_ab, before_last, module.imitation.of_student[i](own[i]))
        loss = loss + F.l1_loss(at_own, at_theirs)
    maps = [whole(made), whole(taught.requires_grad_())]
    for one, other in zip(*maps, strict=True):
        grams = [f.flatten(2) @ f.flatten(2).mT / f[0].numel() for f in (one, other)]
        loss = loss + 1e4 * F.l1_loss(*grams)
    (loss + 10 * F.l1_loss(maps[0][1], maps[1][1])).backward()


def gradients(module: DCDCycleGAN) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.student.parameters() if p.grad is not None and p.ndim > 1])


def claims() -> Iterator[Claim]:
    with threads(1):
        module, images = system(), torch.rand(1, 3, PIXELS, PIXELS) * 2 - 1
        assert module._perceptual is not None
        fused, plain = partial(ours, module, images), partial(one_by_one, module, images, module._perceptual.network)
        fused()
        one = gradients(module)
        plain()
        other = gradients(module)
        assert (one - other).norm() < 1e-3 * other.norm()
        times = best_times(5, fused, plain)
        what = f"a student's step of DCD, {PIXELS}x{PIXELS}: ours / passes one by one"
        yield Claim(what, times[0] / times[1], 1.0, at_most=True, detail=milliseconds(*times))
    student, teacher = module.student.eval(), module.best_teacher.eval()
    with threads(1):
        yield from felt("separable ResNet generator, ngf 64", teacher, {"ngf 16": student}, images, {})


if __name__ == "__main__":
    print(machine())
    report(claims())
