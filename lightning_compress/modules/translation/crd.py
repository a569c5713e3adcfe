"""CRD: let the parts of a student's image lie to each other as those of its teacher's do.

You, Lin, Hu, Chao, Ji, "Exploring Content Relationships for Distilling Efficient GANs", 2022, arXiv:2212.11091. The
rows, the columns and the patches of one image are points, each way to cut it on its own; relative distances and angles
between them are compared, R in `core.distill.content_relations`:

    L_rel = R(rows) + R(columns) + R(patches)

beside the losses of `online_teacher`: without pairs ``25 L_rel + L_style + L_feature + L_adv``, with pairs
``2.5 L_rel + 2 L_style + 2 L_feature``, where L_style has its lambda of 10,000 and L_feature that of 10.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_compress.core.distill.content_relations import ContentRelationLoss, PatchMode, contents
from lightning_compress.modules.translation.losses import GANMode
from lightning_compress.modules.translation.online_teacher import Attempt, Imitation, OnlineCycleGAN, OnlinePix2Pix
from lightning_compress.modules.translation.system import Images, at_least


class Relations(Imitation):
    """The three relations between teacher's and student's images, summed over the images of a batch.

    Args:
        weight: lambda_rel.
        patch: height and width of a patch.
        patch_mode: see `contents`.
        shape: (C, H, W) of the images.

    Raises:
        ValueError: patches that do not fit the images.
    """

    def __init__(self, weight: float, patch: int, patch_mode: PatchMode, shape: tuple[int, ...]) -> None:
        at_least(0, lambda_rel=weight)
        super().__init__(weight)
        self.loss = ContentRelationLoss(patch=patch, patch_mode=patch_mode)
        contents(torch.zeros(1, *shape, device="meta"), "patch", patch, patch_mode)

    def forward(self, attempt: Attempt, judge: nn.Module) -> tuple[Images, Images]:
        terms = self.loss.terms(attempt.made, attempt.taught)
        return {f"student_{name}": self.weight * value for name, value in terms.items()}, {}


class CRDCycleGAN(OnlineCycleGAN):
    """Train a CycleGAN, and a small generator from a to b that learns from it. The small one is deployed.

    Teacher and student take turns; how many epochs that makes, when to validate, and what is logged: see `DCDCycleGAN`.
    Here ``train/student_row``, ``train/student_column`` and ``train/student_patch`` are logged, with their weight.

    Args:
        generator_ab: the teacher, from a to b; see `CycleGAN`.
        discriminator_ab: judges images of kind b, the teacher's and the student's.
        student: the small generator, from a to b.
        perceptual_net: see `DCDCycleGAN`.
        lambda_rel: weight of the relations, which are summed over a batch.
        lambda_style: weight of the difference of gram matrices.
        lambda_feature: weight of the difference of the perceptual network's second maps.
        perceptual_factor: of both.
        lambda_adv: weight of the discriminator's judgement of the student's images.
        patch: height and width of a patch, in pixels.
        student_ratio: epochs of the student for each of the teacher; n_dis in the paper.
        phase_epochs: epochs of the teacher in a turn; 10 for horse2zebra, 6 for summer2winter.
        input_shape: (channels, height, width) of an image.
        system: all other arguments of `CycleGAN`.

    Attributes:
        student: the small generator.
        best_teacher: the teacher that it learns from.

    Raises:
        ValueError: an argument out of range, or patches that do not fit the images.
        MisconfigurationException: in `fit`: no `perceptual_net`, or too few epochs.

    Example::

        teacher = ResNetGenerator(separable=True), PatchDiscriminator()
        student = ResNetGenerator(ngf=16, separable=True)
        module = CRDCycleGAN(*teacher, student, "vgg16.pth", metrics=[FrechetDistance()])
        Trainer(max_epochs=1000, check_val_every_n_epoch=10).fit(module, UnpairedImages("data/horse2zebra"))

    Packaged config: ``recipes/crd/horse2zebra``.
    """

    def __init__(
        self,
        generator_ab: nn.Module,
        discriminator_ab: nn.Module,
        student: nn.Module,
        perceptual_net: nn.Module | str | None = None,
        lambda_rel: float = 25.0,
        lambda_style: float = 1e4,
        lambda_feature: float = 10.0,
        perceptual_factor: float = 1.0,
        lambda_adv: float = 1.0,
        patch: int = 32,
        student_ratio: int = 4,
        phase_epochs: int = 10,
        input_shape: tuple[int, int, int] = (3, 256, 256),
        **system: Any,
    ) -> None:
        super().__init__(generator_ab, discriminator_ab, input_shape=input_shape, **system)
        self.take_turns(phase_epochs)
        at_least(0, lambda_style=lambda_style, lambda_feature=lambda_feature, perceptual_factor=perceptual_factor)
        self.add_student(
            student, Relations(lambda_rel, patch, "image", self.input_shape), perceptual_net,
            perceptual_factor * lambda_style, perceptual_factor * lambda_feature, lambda_adv, student_ratio,
        )  # fmt: skip


class CRDPix2Pix(OnlinePix2Pix):
    """Train a Pix2Pix, and a small generator that learns from it, side by side. The small one is deployed.

    In each step the teacher's generator, its discriminator and the student take a step, on the same images. Logs what
    `Pix2Pix` logs, for the teacher, and for the student what `CRDCycleGAN` does, and ``val/student/l1``, the mean
    absolute difference from the target.

    Args:
        generator: the teacher; see `Pix2Pix`.
        discriminator: judges the input beside the image.
        student: the small generator.
        perceptual_net: see `DCDCycleGAN`.
        lambda_rel: weight of the relations, which are summed over a batch: the authors' is for batches of 4.
        lambda_style: weight of the difference of gram matrices.
        lambda_feature: weight of the difference of the perceptual network's second maps.
        perceptual_factor: of both.
        lambda_adv: weight of the discriminator's judgement of the student's images. The paper has it; the authors' code
            for pairs, which this follows, has not.
        patch: height and width of a patch, in pixels.
        patch_mode: ``"image"`` relates the patches of each image; ``"released"`` does what the authors' code for pairs
            does, see `contents`.
        student_ratio: the teacher takes a step in every so manieth batch; n_dis in the paper.
        gan_mode: see `Pix2Pix`.
        input_shape: (channels, height, width) of an image.
        system: all other arguments of `Pix2Pix`.

    Raises:
        ValueError: an argument out of range, or patches that do not fit the images.
        MisconfigurationException: in `fit`, no `perceptual_net`.

    Example::

        networks = ResNetGenerator(separable=True), PatchDiscriminator(6, 128), ResNetGenerator(ngf=16, separable=True)
        Trainer(max_epochs=200).fit(CRDPix2Pix(*networks, "vgg16.pth"), PairedImages("data/edges2shoes", batch_size=4))

    Packaged config: ``method/crd``.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        student: nn.Module,
        perceptual_net: nn.Module | str | None = None,
        lambda_rel: float = 2.5,
        lambda_style: float = 1e4,
        lambda_feature: float = 10.0,
        perceptual_factor: float = 2.0,
        lambda_adv: float = 0.0,
        patch: int = 32,
        patch_mode: PatchMode = "image",
        student_ratio: int = 1,
        gan_mode: GANMode = "hinge",
        input_shape: tuple[int, int, int] = (3, 256, 256),
        **system: Any,
    ) -> None:
        super().__init__(generator, discriminator, gan_mode=gan_mode, input_shape=input_shape, **system)
        at_least(0, lambda_style=lambda_style, lambda_feature=lambda_feature, perceptual_factor=perceptual_factor)
        self.add_student(
            student, Relations(lambda_rel, patch, patch_mode, self.input_shape), perceptual_net,
            perceptual_factor * lambda_style, perceptual_factor * lambda_feature, lambda_adv, student_ratio,
        )  # fmt: skip
