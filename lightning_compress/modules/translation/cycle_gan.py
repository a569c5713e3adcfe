"""CycleGAN: translate between two kinds of images without pairs of examples.

Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017,
arXiv:1703.10593. G_ab makes images of kind b from those of kind a, G_ba the reverse; D_ab tells real images of kind b
from what G_ab makes, D_ba likewise. (The authors call them G_A, G_B, D_A and D_B.) With means over all elements,

    L_G = gan(D_ab(G_ab(a)), real) + gan(D_ba(G_ba(b)), real)
          + lambda_a |G_ba(G_ab(a)) - a|_1 + lambda_b |G_ab(G_ba(b)) - b|_1
          + lambda_identity (lambda_b |G_ab(b) - b|_1 + lambda_a |G_ba(a) - a|_1)
    L_D = sum over both of 1/2 [gan(D(real), real) + gan(D(pool(fake)), fake)]

Both G take their step first, then both D, which see the translations from before it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_compress.modules.translation.image_pool import ImagePool
from lightning_compress.modules.translation.losses import GANMode, full
from lightning_compress.modules.translation.system import (
    Direction,
    Images,
    TranslationGAN,
    at_least,
    papers_optimizer,
    together,
)
from lightning_compress.networks.gan_layers import init_weights


class CycleGAN(TranslationGAN):
    """Training of two generators, one for each direction, on two sets of images.

    Batches are (images a, images b), float in [-1, 1], which have nothing to do with each other. Logs ``train/gan_ab``,
    ``train/gan_ba``, ``train/cycle_a``, ``train/cycle_b``, ``train/identity_a``, ``train/identity_b`` (all with their
    weight), ``train/generators``, ``train/discriminator_ab``, ``train/discriminator_ba``, and ``val/cycle`` and
    ``test/cycle``, the mean absolute difference of an image and what comes back. `predict_step` returns translations as
    bytes, of pairs in ``fake_b`` and ``fake_a``. The Trainer neither clips nor accumulates gradients.

    Where no batch norm forbids it, the six passes through the generators are three calls, and the four through the
    discriminators' losses two.

    Args:
        generator_ab: images of kind a to images of kind b, in [-1, 1], as `ResNetGenerator`.
        discriminator_ab: images of kind b, real or made by `generator_ab`, to logits, as `PatchDiscriminator`.
        generator_ba: images of kind b to images of kind a. None: like `generator_ab`, with weights of its own.
        discriminator_ba: of images of kind a. None: like `discriminator_ab`.
        lambda_a: weight of the cycle a to b to a.
        lambda_b: weight of the cycle b to a to b.
        lambda_identity: weight of leaving an image of the right kind as it is, relative to these.
        pool_size: past translations that a discriminator may be shown instead of the latest, see `ImagePool`.
        optimizer: makes an optimiser from parameters, called for both generators and for both discriminators.
        gan_mode: ``"lsgan"`` as in the paper, or ``"vanilla"``, ``"hinge"``, ``"wgan"``, ``"wgangp"``.
        lambda_gp: weight of the gradient penalty of ``"wgangp"``.
        n_epochs: epochs at the full rate.
        n_epochs_decay: epochs after them, over which it falls to zero along a line.
        metrics: of validation and test, such as `FrechetDistance`: a list, of which each direction gets a copy, or
            ``{"ab": [...], "ba": [...]}``. Their `update` gets translations and real images of the same kind, of which
            one may be None; logged as ``val/ab/<name>`` and ``val/ba/<name>``.
        seed: of all that a step draws, and of the pools.
        input_shape: (channels, height, width) of an image, for `example_input_array`.
        channels_last: whether to compute in the channels-last memory format.

    What is stored: the pools of all processes, except in files that hold the weights alone. A run that goes on with
    another number of processes begins with empty pools where there are none for a process.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: batches are not two sets of images.

    Example::

        module = CycleGAN(ResNetGenerator(), PatchDiscriminator())
        Trainer(max_epochs=200).fit(module, UnpairedImages("data/horse2zebra"))
    """

    generator_ab: nn.Module
    generator_ba: nn.Module
    discriminator_ab: nn.Module
    discriminator_ba: nn.Module

    directions = (
        Direction("ab", "generator_ab", "discriminator_ab", "a", "b", "fake_b"),
        Direction("ba", "generator_ba", "discriminator_ba", "b", "a", "fake_a"),
    )

    def __init__(
        self,
        generator_ab: nn.Module,
        discriminator_ab: nn.Module,
        generator_ba: nn.Module | None = None,
        discriminator_ba: nn.Module | None = None,
        lambda_a: float = 10.0,
        lambda_b: float = 10.0,
        lambda_identity: float = 0.5,
        pool_size: int = 50,
        optimizer: OptimizerCallable = papers_optimizer,
        gan_mode: GANMode = "lsgan",
        lambda_gp: float = 10.0,
        n_epochs: int = 100,
        n_epochs_decay: int = 100,
        metrics: Sequence[Metric] | dict[str, Sequence[Metric]] | None = None,
        seed: int = 0,
        input_shape: tuple[int, int, int] = (3, 256, 256),
        channels_last: bool = False,
    ) -> None:
        at_least(0, lambda_a=lambda_a, lambda_b=lambda_b, lambda_identity=lambda_identity, pool_size=pool_size)
        networks = {
            "generator_ab": generator_ab,
            "generator_ba": another(generator_ab) if generator_ba is None else generator_ba,
            "discriminator_ab": discriminator_ab,
            "discriminator_ba": another(discriminator_ab) if discriminator_ba is None else discriminator_ba,
        }
        super().__init__(
            networks, optimizer, gan_mode, lambda_gp, n_epochs, n_epochs_decay, metrics, seed, input_shape,
            channels_last,
        )  # fmt: skip
        self.lambda_a = lambda_a
        self.lambda_b = lambda_b
        self.lambda_identity = lambda_identity
        self.pool_size = pool_size
        self.pools: dict[str, ImagePool] = {}
        self._pools_to_load: list[dict[str, Any]] | None = None

    def compute_fakes(self, inputs: Images) -> Images:
        """``fake_b``, ``fake_a``; what comes back from them, ``rec_a``, ``rec_b``; and ``identity_b``, ``identity_a``.

        The last are what a generator makes of images that are of the right kind already, G_ab(b) and G_ba(a).
        """
        a, b = inputs["a"], inputs["b"]
        same = self.lambda_identity > 0
        fake_b = full(self.generator_ab(a))
        fake_a, rec_a, *identity_a = map(full, together(self.generator_ba, b, fake_b, *[a] * same))
        rec_b, *identity_b = map(full, together(self.generator_ab, fake_a, *[b] * same))
        fakes = {"fake_b": fake_b, "fake_a": fake_a, "rec_a": rec_a, "rec_b": rec_b}
        if same:
            (fakes["identity_a"],), (fakes["identity_b"],) = identity_a, identity_b
        return fakes

    def generator_loss(self, inputs: Images, fakes: Images) -> Images:
        a, b = inputs["a"], inputs["b"]
        losses = {f"gan_{d.name}": self.fooling_loss(d, inputs, fakes) for d in self.directions}
        losses["cycle_a"] = self.lambda_a * F.l1_loss(fakes["rec_a"], a)
        losses["cycle_b"] = self.lambda_b * F.l1_loss(fakes["rec_b"], b)
        if self.lambda_identity > 0:
            losses["identity_b"] = self.lambda_identity * self.lambda_b * F.l1_loss(fakes["identity_b"], b)
            losses["identity_a"] = self.lambda_identity * self.lambda_a * F.l1_loss(fakes["identity_a"], a)
        return losses

    def discriminator_loss(self, inputs: Images, fakes: Images) -> Images:
        losses = {}
        for direction in self.directions:  # ab first: the pools draw from one stream
            shown = self.pools[direction.fake].query(fakes[direction.fake])
            source, real = inputs[direction.source], inputs[direction.target]
            losses[f"discriminator_{direction.name}"] = self.telling_loss(direction, source, real, shown)
        return losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = self.inputs_of(batch)
        to_generators, to_discriminators, *_ = cast(list[LightningOptimizer], self.optimizers())
        with self.seeded():
            with self.toggled_optimizer(to_generators):
                fakes = self.compute_fakes(inputs)
                loss = self.train_generators(inputs, fakes, batch, batch_idx)
            with self.toggled_optimizer(to_discriminators):
                self.train_discriminators(inputs, fakes)
        self.count(inputs)
        return loss

    def scores(self, inputs: Images, fakes: Images) -> dict[str, tuple[Tensor, int]]:
        values, count = [], 0
        for there, back in (self.directions, self.directions[::-1]):
            if there.source in inputs:
                returned = full(self.generator_of(back)(fakes[there.fake]))
                values.append(F.l1_loss(returned, inputs[there.source]) * len(returned))
                count += len(returned)
        return {"cycle": (torch.stack(values).sum() / count, count)}

    # ---- pools

    def on_fit_start(self) -> None:
        """Begin with empty pools, or with those of the run that is resumed."""
        rng = torch.Generator().manual_seed(self.seed + self.global_rank)
        self.pools = {direction.fake: ImagePool(self.pool_size, rng) for direction in self.directions}
        loaded, self._pools_to_load = self._pools_to_load, None
        if loaded is None:
            return
        if len(loaded) != self.trainer.world_size:
            rank_zero_warn(
                f"CycleGAN: the checkpoint has the pools of {len(loaded)} processes, there are "
                f"{self.trainer.world_size}; the run will not be the same as without the interruption."
            )
        if self.global_rank < len(loaded):
            state = loaded[self.global_rank]
            rng.set_state(state["rng"])
            for name, pool in self.pools.items():
                pool.load_state_dict(state[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" not in checkpoint or not self.pools:  # weights alone
            return
        state: dict[str, Any] = {name: pool.state_dict() for name, pool in self.pools.items()}
        state["rng"] = next(iter(self.pools.values())).generator.get_state()
        states = [state]
        if self.trainer.world_size > 1:  # rank 0 alone writes
            states = [{}] * self.trainer.world_size
            distributed.gather_object(state, states if self.global_rank == 0 else None)
        checkpoint["translation"]["pools"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._pools_to_load = checkpoint.get("translation", {}).get("pools")


def another(network: nn.Module) -> nn.Module:
    """A network of the same shape with fresh weights, drawn as the paper does."""
    copied = copy.deepcopy(network)
    init_weights(copied)
    return copied
