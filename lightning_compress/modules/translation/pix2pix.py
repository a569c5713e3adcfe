"""Pix2Pix: translate images after pairs of examples.

Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017,
arXiv:1611.07004. The generator G makes an image of kind b from one of kind a; the discriminator D sees a beside it:

    L_D = 1/2 [gan(D(a, G(a)), fake) + gan(D(a, b), real)]
    L_G = lambda_gan gan(D(a, G(a)), real) + lambda_l1 mean |G(a) - b|

D takes its step first, G is then judged by the better D; G runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_compress.modules.translation.losses import GANMode, full
from lightning_compress.modules.translation.system import (
    Direction,
    Images,
    TranslationGAN,
    at_least,
    papers_optimizer,
)


class Pix2Pix(TranslationGAN):
    """Training of a generator on pairs of images.

    Batches are (images a, images b), float in [-1, 1]. Logs ``train/gan``, ``train/l1`` (both with their weight),
    ``train/generators``, ``train/discriminator``, and ``val/l1`` and ``test/l1``, the mean absolute difference.
    `predict_step` returns translations as bytes, of pairs in ``fake_b``. The Trainer neither clips nor accumulates
    gradients; with several processes, ``Trainer(sync_batchnorm=True)`` makes one batch for the norms of theirs, which
    the paper has not.

    Args:
        generator: images of kind a to images of kind b, in [-1, 1], as `UNetGenerator` and `ResNetGenerator`.
        discriminator: both images, one behind the other along the channels, to logits; `PatchDiscriminator(6)`.
        lambda_gan: weight of the discriminator's judgement.
        lambda_l1: weight of the mean absolute difference.
        optimizer: makes an optimiser from parameters, called for the generator and for the discriminator.
        gan_mode: ``"vanilla"`` as in the paper, ``"hinge"`` in those that compress it, or ``"lsgan"``, ``"wgan"``,
            ``"wgangp"``.
        lambda_gp: weight of the gradient penalty of ``"wgangp"``.
        n_epochs: epochs at the full rate.
        n_epochs_decay: epochs after them, over which it falls to zero along a line.
        metrics: of validation and test, such as `FrechetDistance`: their `update` gets translations and
            targets. Logged as ``val/<name>`` and ``test/<name>``.
        seed: of all that a step draws, as dropout does.
        input_shape: (channels, height, width) of an image, for `example_input_array`.
        channels_last: whether to compute in the channels-last memory format.

    Raises:
        ValueError: an argument out of range, or a discriminator that sees one image alone.
        MisconfigurationException: batches are no pairs, or the generator does not make images like those of kind b.

    Example::

        module = Pix2Pix(UNetGenerator(), PatchDiscriminator(6, norm="batch"))
        Trainer(max_epochs=200).fit(module, PairedImages("data/facades", direction="BtoA"))
    """

    generator: nn.Module
    discriminator: nn.Module

    directions = (Direction("ab", "generator", "discriminator", "a", "b", "fake_b", conditional=True),)

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        lambda_gan: float = 1.0,
        lambda_l1: float = 100.0,
        optimizer: OptimizerCallable = papers_optimizer,
        gan_mode: GANMode = "vanilla",
        lambda_gp: float = 10.0,
        n_epochs: int = 100,
        n_epochs_decay: int = 100,
        metrics: Sequence[Metric] | None = None,
        seed: int = 0,
        input_shape: tuple[int, int, int] = (3, 256, 256),
        channels_last: bool = False,
    ) -> None:
        at_least(0, lambda_gan=lambda_gan, lambda_l1=lambda_l1)
        first = next((layer for layer in discriminator.modules() if isinstance(layer, nn.Conv2d)), None)
        if first is not None and first.in_channels <= input_shape[0]:
            raise ValueError(
                f"discriminator: it sees the input beside the image, more than {input_shape[0]} channels; its first "
                f"convolution takes {first.in_channels}."
            )
        networks = {"generator": generator, "discriminator": discriminator}
        super().__init__(
            networks, optimizer, gan_mode, lambda_gp, n_epochs, n_epochs_decay, metrics, seed, input_shape,
            channels_last,
        )  # fmt: skip
        self.lambda_gan = lambda_gan
        self.lambda_l1 = lambda_l1

    def compute_fakes(self, inputs: Images) -> Images:
        """``fake_b``, the translation of a."""
        fake = full(self.generator(inputs["a"]))
        if fake.shape != inputs["b"].shape:  # l1_loss would broadcast some of these
            raise MisconfigurationException(
                f"{type(self.generator).__name__} makes {tuple(fake.shape)} of {tuple(inputs['a'].shape)}, but the "
                f"images of kind b have {tuple(inputs['b'].shape)}."
            )
        return {"fake_b": fake}

    def generator_loss(self, inputs: Images, fakes: Images) -> Images:
        (direction,) = self.directions
        return {
            "gan": self.lambda_gan * self.fooling_loss(direction, inputs, fakes),
            "l1": self.lambda_l1 * F.l1_loss(fakes["fake_b"], inputs["b"]),
        }

    def discriminator_loss(self, inputs: Images, fakes: Images) -> Images:
        (direction,) = self.directions
        return {"discriminator": self.telling_loss(direction, inputs["a"], inputs["b"], fakes["fake_b"])}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = self.inputs_of(batch)
        to_generator, to_discriminator, *_ = cast(list[LightningOptimizer], self.optimizers())
        with self.seeded():
            fakes = self.compute_fakes(inputs)  # before G's parameters stand still: its graph must reach them
            with self.toggled_optimizer(to_discriminator):
                self.train_discriminators(inputs, fakes)
            with self.toggled_optimizer(to_generator):
                loss = self.train_generators(inputs, fakes, batch, batch_idx)
        self.count(inputs)
        return loss

    def scores(self, inputs: Images, fakes: Images) -> dict[str, tuple[Tensor, int]]:
        return {"l1": (F.l1_loss(fakes["fake_b"], inputs["b"]), len(inputs["b"]))}
