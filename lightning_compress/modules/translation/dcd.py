"""DCD: compare the features of two generators by what a discriminator makes of them.

Hu, Lin, You, Chao, Ji, "Discriminator-Cooperated Feature Map Distillation for GAN Compression", CVPR 2023,
arXiv:2212.14169. Features of a student need not be its teacher's number by number: they should look alike. So the
features F_l of both, at a few layers l, are squeezed to something like an image by connectors C_l, a 1x1 convolution,
batch norm and ReLU each; the teacher's discriminator looks at it, and what comes out before its last convolution, phi,
is compared:

    L_DCD = sum_l mean |phi(C_l^T(F_l^T)) - phi(C_l^S(F_l^S))|

beside the losses of `online_teacher`. Gradients go through the discriminator, which is not trained by it, into the
student and its connectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.distill.taps import input_at
from lightning_compress.modules.translation.losses import GANMode, full
from lightning_compress.modules.translation.online_teacher import (
    Attempt,
    Imitation,
    OnlineCycleGAN,
    OnlinePix2Pix,
    shapes_at,
)
from lightning_compress.modules.translation.system import Direction, Images, at_least, together
from lightning_compress.networks.gan_layers import init_weights

# of a ResNetGenerator with nine blocks: what comes into the first block, and out of the third, sixth and ninth
LAYERS = ("model.9", "model.12", "model.15", "model.18")

_DRAWS = 100  # of a fixed connector, until every channel says something; the fifth is unlikely to be needed


def cooperated_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """L_DCD of the discriminator's features, (N, C, h, w) for each layer."""
    return torch.stack([F.l1_loss(full(s), full(t)) for s, t in zip(student, teacher, strict=True)]).sum()


def connector(channels: int, out_channels: int) -> nn.Sequential:
    """Features (N, channels, h, w) to something like an image, (N, out_channels, h, w); weights as in a generator."""
    layers = nn.Sequential(nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())
    init_weights(layers)
    return layers


@torch.no_grad()
def revive(connector: nn.Sequential, features: Tensor) -> None:
    """Draw the filters anew that give nothing but zeros on these features, until none does."""
    conv: Any = connector[0]
    for _ in range(_DRAWS):
        dead = ~(connector(features) > 0).any(3).any(2).any(0)
        if not dead.any():
            return
        conv.weight[dead] = 0.02 * torch.randn_like(conv.weight[dead])
    raise RuntimeError(f"layers: the teacher's features {tuple(features.shape)} are all zero, nothing shows in them.")


class Cooperation(Imitation):
    """Connectors, and the loss between what the discriminator makes of them.

    Args:
        weight: lambda_cd.
        layers: names of modules, in both generators.
        teacher_channels: of the teacher's features there.
        student_channels: of the student's.
        out_channels: that the discriminator takes.
        judge_layer: the discriminator's module whose input is compared.
        train_teacher: whether the teacher's connectors are trained. Else they are random, and used in eval mode.
    """

    def __init__(
        self,
        weight: float,
        layers: Sequence[str],
        teacher_channels: Sequence[int],
        student_channels: Sequence[int],
        out_channels: int,
        judge_layer: str,
        train_teacher: bool,
    ) -> None:
        super().__init__(weight, layers)
        self.of_teacher = nn.ModuleList(connector(channels, out_channels) for channels in teacher_channels)
        self.of_student = nn.ModuleList(connector(channels, out_channels) for channels in student_channels)
        self.judge_layer = judge_layer
        self.train_teacher = train_teacher
        if not train_teacher:
            self.of_teacher.requires_grad_(False)

    @classmethod
    def between(
        cls,
        teacher: nn.Module,
        student: nn.Module,
        judge: nn.Module,
        direction: Direction,
        shape: Sequence[int],
        *,
        weight: float,
        layers: Sequence[str],
        train_teacher: bool,
    ) -> Cooperation:
        """Connectors for two generators of images (C, H, W) and the teacher's discriminator.

        Raises:
            ValueError: layers that are not there, differ in size, or are too small for the discriminator.
        """
        at_least(0, lambda_cd=weight)
        if not layers:
            raise ValueError("layers: expected the names of one module or more, got none.")
        (image, *theirs), (_, *own) = (shapes_at(network, layers, shape) for network in (teacher, student))
        shown = direction.shown(torch.zeros(1, *shape), torch.zeros(1, *image)).shape[1]
        last = [name for name, layer in judge.named_modules() if isinstance(layer, nn.Conv2d)][-1]
        for layer, one, other in zip(layers, theirs, own, strict=True):
            if one[1:] != other[1:]:
                raise ValueError(f"layers: the maps of {layer!r} are {one} in the teacher, {other} in the student.")
            try:
                shapes_at(_UpTo(judge, last), (), (shown, *one[1:]))
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"layers: the discriminator fails on {layer!r}, maps {one} squeezed to {shown} channels: {error}"
                ) from error
        channels, own_channels = ([maps[0] for maps in several] for several in (theirs, own))
        return cls(weight, layers, channels, own_channels, shown, last, train_teacher)

    def prepare(self, attempt: Attempt) -> None:
        """Random connectors that show nothing of the teacher are drawn anew."""
        if not self.train_teacher:
            for squeeze, features in zip(self.of_teacher.eval(), attempt.taught_features, strict=True):
                revive(squeeze, features)  # type: ignore[arg-type]

    def forward(self, attempt: Attempt, judge: nn.Module) -> tuple[Images, Images]:
        look = partial(together, judge, call=partial(input_at, judge, self.judge_layer))
        own = _squeezed(self.of_student, attempt.made_features)
        if self.train_teacher:
            theirs = _squeezed(self.of_teacher, attempt.taught_features)
            looks = look(*theirs, *own)
            at_theirs, at_own = looks[: len(own)], looks[len(own) :]
        else:  # in a call of its own, which needs no backward pass
            with torch.no_grad():
                theirs = _squeezed(self.of_teacher.eval(), attempt.taught_features)
                at_theirs = look(*theirs)
            at_own = look(*own)
        loss = self.weight * cooperated_loss(at_own, at_theirs)
        active = torch.stack([(maps > 0).float().mean() for maps in (*theirs, *own)]).mean()
        return {"student_cooperation": loss}, {"student_connectors_active": active}


class _UpTo(nn.Module):
    """What a layer of a network gets."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.network = network
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return input_at(self.network, self.layer, images)


def _squeezed(connectors: nn.ModuleList, features: Sequence[Tensor]) -> list[Tensor]:
    return [squeeze(maps) for squeeze, maps in zip(connectors, features, strict=True)]


class DCDCycleGAN(OnlineCycleGAN):
    """Train a CycleGAN, and a small generator from a to b that learns from it. The small one is deployed.

    The two take turns: `phase_epochs` epochs of the teacher, then `student_ratio` times as many of the student, which
    learns from the teacher that had the best score in validation so far (of the first metric of direction ab; without
    metrics, from the latest). The Trainer needs ``n + student_ratio * phase_epochs * ceil(n / phase_epochs)`` epochs,
    n = n_epochs + n_epochs_decay. Validate at the end of the teacher's phases: ``check_val_every_n_epoch`` a divisor of
    `phase_epochs`.

    Logs what `CycleGAN` logs, for the teacher; ``train/student_style``, ``train/student_feature``,
    ``train/student_gan``, ``train/student_cooperation`` (all with their weight), ``train/student``;
    ``train/student_connectors_active``, the share of the connectors' outputs that is not zero; and, of the student,
    ``val/student/<metric>`` and ``val/student/to_teacher``, the mean absolute difference from the teacher's images;
    likewise for ``test``.

    Args:
        generator_ab: the teacher, from a to b; see `CycleGAN`.
        discriminator_ab: judges images of kind b, the teacher's and the student's.
        student: the small generator, from a to b.
        perceptual_net: file of torchvision's VGG-16; or a network from images in [-1, 1] to a list of maps, the second
            of which the feature loss compares, such as `VGGFeatures`. A frozen copy is kept, which is in no state dict.
        lambda_style: weight of the difference of gram matrices.
        lambda_feature: weight of the difference of the second maps. The authors' launch scripts exchange these two.
        lambda_adv: weight of the discriminator's judgement of the student's images. In the authors' code it is given
            the teacher's, so that no gradient comes of it: 0.
        lambda_cd: weight of L_DCD.
        layers: names of modules, in teacher and student, whose outputs are compared. The default is for nine blocks.
        train_teacher_connector: whether the teacher's connectors are trained with the student's; here they are random.
        student_ratio: epochs of the student for each of the teacher; n_dis in the paper.
        phase_epochs: epochs of the teacher in a turn; 10 for horse2zebra, 6 for summer2winter.
        input_shape: (channels, height, width) of an image.
        system: all other arguments of `CycleGAN`.

    Attributes:
        student: the small generator.
        best_teacher: the teacher that it learns from.

    Raises:
        ValueError: an argument out of range; layers that are not there or do not fit each other.
        MisconfigurationException: in `fit`: no `perceptual_net`, or too few epochs.

    Example::

        teacher = ResNetGenerator(separable=True), PatchDiscriminator()
        student = ResNetGenerator(ngf=16, separable=True)
        module = DCDCycleGAN(*teacher, student, "vgg16.pth", metrics=[FrechetDistance()])
        Trainer(max_epochs=1000, check_val_every_n_epoch=10).fit(module, UnpairedImages("data/horse2zebra"))

    Packaged config: ``method/dcd``.
    """

    def __init__(
        self,
        generator_ab: nn.Module,
        discriminator_ab: nn.Module,
        student: nn.Module,
        perceptual_net: nn.Module | str | None = None,
        lambda_style: float = 1e4,
        lambda_feature: float = 10.0,
        lambda_adv: float = 1.0,
        lambda_cd: float = 1.0,
        layers: Sequence[str] = LAYERS,
        train_teacher_connector: bool = False,
        student_ratio: int = 4,
        phase_epochs: int = 10,
        input_shape: tuple[int, int, int] = (3, 256, 256),
        **system: Any,
    ) -> None:
        super().__init__(generator_ab, discriminator_ab, input_shape=input_shape, **system)
        self.take_turns(phase_epochs)
        cooperation = Cooperation.between(
            generator_ab, student, discriminator_ab, self.directions[0], self.input_shape, weight=lambda_cd,
            layers=layers, train_teacher=train_teacher_connector,
        )  # fmt: skip
        self.add_student(
            student, cooperation, perceptual_net, lambda_style, lambda_feature, lambda_adv, student_ratio,
        )  # fmt: skip


class DCDPix2Pix(OnlinePix2Pix):
    """Train a Pix2Pix, and a small generator that learns from it, side by side. The small one is deployed.

    In each step the teacher's generator, its discriminator and the student take a step, on the same images.

    Logs what `Pix2Pix` logs, for the teacher, and for the student what `DCDCycleGAN` does, and ``val/student/l1``, the
    mean absolute difference from the target.

    Args:
        generator: the teacher; see `Pix2Pix`.
        discriminator: judges the input beside the image, the teacher's or the student's.
        student: the small generator.
        perceptual_net: see `DCDCycleGAN`.
        lambda_style: weight of the difference of gram matrices.
        lambda_feature: weight of the difference of the second maps.
        lambda_adv: weight of the discriminator's judgement of the student's images. The authors' code for pairs never
            adds it: 0.
        lambda_cd: weight of L_DCD. The authors' code for pairs looks for the discriminator's features under a name that
            its own discriminator does not have, so that nothing comes of it: 0.
        layers: names of modules, in teacher and student, whose outputs are compared.
        train_teacher_connector: whether the teacher's connectors are trained with the student's, as here, or random.
        student_ratio: the teacher takes a step in every so manieth batch; n_dis in the paper.
        gan_mode: see `Pix2Pix`.
        input_shape: (channels, height, width) of an image.
        system: all other arguments of `Pix2Pix`.

    Raises:
        ValueError: an argument out of range; layers that are not there or do not fit each other.
        MisconfigurationException: in `fit`, no `perceptual_net`.

    Example::

        networks = ResNetGenerator(separable=True), PatchDiscriminator(6, 128), ResNetGenerator(ngf=16, separable=True)
        Trainer(max_epochs=200).fit(DCDPix2Pix(*networks, "vgg16.pth"), PairedImages("data/edges2shoes", batch_size=4))

    Packaged config: ``recipes/dcd/edges2shoes``.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        student: nn.Module,
        perceptual_net: nn.Module | str | None = None,
        lambda_style: float = 1e4,
        lambda_feature: float = 10.0,
        lambda_adv: float = 1.0,
        lambda_cd: float = 1.0,
        layers: Sequence[str] = LAYERS,
        train_teacher_connector: bool = True,
        student_ratio: int = 1,
        gan_mode: GANMode = "hinge",
        input_shape: tuple[int, int, int] = (3, 256, 256),
        **system: Any,
    ) -> None:
        super().__init__(generator, discriminator, gan_mode=gan_mode, input_shape=input_shape, **system)
        cooperation = Cooperation.between(
            generator, student, discriminator, self.directions[0], self.input_shape, weight=lambda_cd, layers=layers,
            train_teacher=train_teacher_connector,
        )  # fmt: skip
        self.add_student(
            student, cooperation, perceptual_net, lambda_style, lambda_feature, lambda_adv, student_ratio
        )  # fmt: skip
