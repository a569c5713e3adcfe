r"""Co-attention distillation: teach a small generator where a large one, and its judge, look.

Li, Lin, Wang, Chao, Shao, Ji, "Learning Efficient GANs for Image Translation via Differentiable Masks and co-Attention
Distillation", IEEE Transactions on Multimedia 2022, arXiv:2011.08382; the fine-tuning that follows `DMAD`. With

    A(F) = mean_c F^2                                                   attention, one map for an image
    d(P, Q) = mean (P / |P|_2 - Q / |Q|_2)^2                            over all entries, norms image by image
    M_l = mix_0 A(F_l of the teacher's G) + mix_1 A(F of the teacher's D on the student's image)

    L_G = L_base + lambda_att sum_l d(M_l, A(F_l of the student's G))
                 + lambda_D |F' of the teacher's D on the student's image - F' of it on the teacher's image|_2

F_l are features after the second halving of the image and after a third, two thirds and all of the residual blocks, or
those of a U-Net in which images are four and sixteen times smaller, on both ways. F is the discriminator's second
leaky ReLU, F' its last. All summed over both directions, where there are two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks.distillation.wavelet_distillation import make_teacher
from lightning_compress.callbacks.pruning.dmad import DMAD
from lightning_compress.callbacks.pruning.dmad.masks import BandMask
from lightning_compress.core.distill.taps import Point, observe
from lightning_compress.core.distill.teacher import Teacher
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.inference_copy import plain_copy
from lightning_compress.core.meta import evaluating
from lightning_compress.core.report import close_account, open_account
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.surgery import attach_record, check_trainer, read_checkpoint, resume_in_setup
from lightning_compress.networks.resnet_generator import ResNetGenerator
from lightning_compress.networks.unet_generator import UNetBlock, UNetGenerator


def attention(features: Tensor) -> Tensor:
    """Where features are large: (N, C, H, W) to (N, 1, H, W), the mean of their squares over channels, in float32."""
    return features.float().square().mean(1, keepdim=True)


def attention_distance(one: Tensor, other: Tensor) -> Tensor:
    """How differently two attentions are spread, (N, 1, H, W) each to a scalar; their scale says nothing.

    At most 2 / (H W), as no entry is negative.
    """
    return (F.normalize(one.flatten(1)) - F.normalize(other.flatten(1))).square().mean()


def co_attention(generator: Tensor, discriminator: Tensor, mix: Sequence[float]) -> Tensor:
    """The target: attention of the teacher's G (N, 1, H, W) and of its D, averaged over areas to the same size."""
    height, width = generator.shape[-2:]
    return mix[0] * generator + mix[1] * F.adaptive_avg_pool2d(discriminator, (height, width))


def attended_layers(generator: nn.Module) -> list[str] | None:
    """Names of the layers whose attention is taught, None for generators of which they are not known."""
    if isinstance(generator, ResNetGenerator):
        blocks = len(generator.widths) - 5
        after = sorted({-(-blocks * i // 3) for i in range(4)})  # with 9 blocks: 0, 3, 6, 9
        return [f"model.{9 + i}" for i in after]
    if isinstance(generator, UNetGenerator):
        way_down, way_up, path = [], [], "model"
        for level in range(1, min(5, generator.downs) + 1):
            block = generator.get_submodule(path)
            assert isinstance(block, UNetBlock)
            at = {type(layer): place for place, layer in block.model.named_children()}
            if level in (3, 5):
                way_down.append(f"{path}.model.0")
                way_up.append(f"{path}.model.{int(at[nn.ConvTranspose2d]) + 1}")
            path = f"{path}.model.{at[UNetBlock]}" if UNetBlock in at else ""
        return [*way_down, *way_up[::-1]]
    return None


class CoAttentionDistillation(Callback):
    """Add what the generator and the discriminator of a trained system attend to, to the training of a small one.

    For `Pix2Pix`, `CycleGAN` and other translation systems. The small generators see each image once, as without this
    callback. The discriminators train as before.

    Args:
        teacher: a trained system, with the same directions; or the file of one whose networks are like the student's
            before anything was cut from them.
        teacher_weights: checkpoint of a teacher that is given as a system.
        student_weights: where the student begins: a checkpoint that `DMAD` has cut, of the same system. Its generators
            become as narrow, and weights of generators and discriminators are taken from it; optimisers and schedules
            start anew. None: the student is as it is.
        lambda_attention: lambda_att, weight of the attention; 100 in the paper for CycleGAN, 10 for Pix2Pix. 0: none.
        lambda_discriminator: lambda_D, weight of the distance between features of the teacher's D; 1e-4 in the paper.
            0: none.
        attention_mix: of the attention of the teacher's generator and of its discriminator in the target; in the paper
            one half each, and (0.5, 0.25) for Pix2Pix with separable blocks.
        layers: names, in the generators, of layers whose attention is taught. None: those of the paper, for
            `ResNetGenerator` and `UNetGenerator`.
        detach_target: whether the target is fixed. In the authors' code a gradient passes through the discriminator's
            part of it.
        teacher_train: whether the teacher is in train mode, with dropout and batch statistics, as in the authors' code.

    Logs ``train/attention`` and ``train/judged``, both with their weight; with two directions ``train/attention_ab``
    and so on.

    What is stored: source and SHA-256 of the teacher's networks in the callback's state; a run that goes on with
    another one says so. In the module what was cut from it, and nothing else.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, files that cannot be
            read or do not fit, layers that there are not, and modules that are no translation systems.

    Example::

        from lightning_compress.callbacks import CoAttentionDistillation
        trainer = Trainer(max_epochs=200, callbacks=[
            CoAttentionDistillation("dense.ckpt", student_weights="search.ckpt")])
        trainer.fit(CycleGAN(ResNetGenerator(), PatchDiscriminator()), datamodule)

    Packaged config: ``method/co_attention``.
    """

    def __init__(
        self,
        teacher: nn.Module | str,
        *,
        teacher_weights: str | None = None,
        student_weights: str | None = None,
        lambda_attention: float = 100.0,
        lambda_discriminator: float = 1e-4,
        attention_mix: tuple[float, float] = (0.5, 0.5),
        layers: list[str] | None = None,
        detach_target: bool = True,
        teacher_train: bool = False,
    ) -> None:
        super().__init__()
        for argument, value in (("lambda_attention", lambda_attention), ("lambda_discriminator", lambda_discriminator)):
            if value < 0:
                raise ValueError(f"{argument}: expected 0 or more, got {value}.")
        if not lambda_attention and not lambda_discriminator:
            raise ValueError("lambda_attention=0, lambda_discriminator=0: nothing is taught; give one of them.")
        if len(attention_mix) != 2 or min(attention_mix) < 0 or not any(attention_mix):
            raise ValueError(f"attention_mix: expected two weights, 0 or more, not both 0, got {list(attention_mix)}.")
        if not (isinstance(teacher, str) or _is_system(teacher)):
            raise ValueError(
                f"teacher: expected a translation system, such as Pix2Pix, or a file of one, got a "
                f"{type(teacher).__name__}."
            )
        self.teacher = teacher
        self.teacher_weights = teacher_weights
        self.student_weights = student_weights
        self.lambda_attention = lambda_attention
        self.lambda_discriminator = lambda_discriminator
        self.attention_mix = tuple(attention_mix)
        self.layers = layers
        self.detach_target = detach_target
        self.teacher_train = teacher_train
        self._pairs: dict[str, Pair] = {}  # by direction
        self._begun = False
        self._taps: dict[str, FirstCall] = {}
        self._added: Any = None  # what is in `generator_loss_terms`

    def state_dict(self) -> dict[str, Any]:
        return {
            "begun": self._begun,
            "teachers": {name: [t.state_dict() for t in pair.networks] for name, pair in self._pairs.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begun = state["begun"]
        for name, pair in self._pairs.items():
            for teacher, then in zip(pair.networks, state["teachers"].get(name, ()), strict=False):
                teacher.load_state_dict(then)

    # ---- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        attach_record(pl_module)
        if stage != "fit":
            return
        if not _is_system(pl_module):
            raise MisconfigurationException(
                f"CoAttentionDistillation teaches translation systems, such as Pix2Pix and CycleGAN; "
                f"{type(pl_module).__name__} has no `directions` and `generator_loss_terms`."
            )
        if any(isinstance(callback, DMAD) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "CoAttentionDistillation follows DMAD in a fit of its own, which begins with student_weights."
            )
        open_account(trainer, pl_module)
        module: Any = pl_module
        if not self._pairs:
            self._pairs = self._make_pairs(module)
        resumed = resume_in_setup(trainer, module, by="CoAttentionDistillation", required=False)
        if self.student_weights is not None and not resumed and not self._begun:
            check_trainer(trainer, "CoAttentionDistillation", in_fit=False)
            begin_with(module, self.student_weights)
        self._begun = True
        self._rehearse(module, find_example_input(trainer, module))
        self._added = partial(self._teach, module)
        module.generator_loss_terms.append(self._added)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        for direction in module.directions:
            pair = self._pairs[direction.name]
            for teacher in pair.networks:
                teacher.to(pl_module.device).network.train(self.teacher_train)
            self._taps[direction.name] = FirstCall(module.generator_of(direction), pair.layers)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        close_account(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach(pl_module)

    # ---- the terms

    def _teach(self, module: Any, inputs: Mapping[str, Tensor], fakes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = {}
        for direction in module.directions:
            source, pair = inputs[direction.source], self._pairs[direction.name]
            ours = self._taps[direction.name].take(len(source))
            image, theirs = pair.generator.observe(pair.points, source)
            judge = pair.discriminator.network
            # weights stand still, but the gradient goes through to the student's image
            _, (looked, judged) = observe(judge, pair.judged, direction.shown(source, fakes[direction.fake]))
            ending = f"_{direction.name}" if len(module.directions) > 1 else ""
            if self.lambda_attention:
                looked = attention(looked.detach() if self.detach_target else looked)
                distances = [
                    attention_distance(co_attention(attention(t), looked, self.attention_mix), attention(s))
                    for t, s in zip(theirs, ours, strict=True)
                ]
                terms[f"attention{ending}"] = self.lambda_attention * torch.stack(distances).sum()
            if self.lambda_discriminator:
                with torch.no_grad():
                    _, (wanted,) = observe(judge, pair.judged[1:], direction.shown(source, image))
                distance = torch.linalg.vector_norm(judged.float() - wanted.float())
                terms[f"judged{ending}"] = self.lambda_discriminator * distance
        return terms

    # ---- before the fit

    def _make_pairs(self, module: Any) -> dict[str, Pair]:
        names = [direction.name for direction in module.directions]
        given: Any = self.teacher
        if _is_system(given) and [direction.name for direction in given.directions] != names:
            raise MisconfigurationException(
                f"teacher: {type(given).__name__} has the directions {[d.name for d in given.directions]}, "
                f"{type(module).__name__} has {names}."
            )
        like = None if _is_system(given) else uncut(module)
        pairs = {}
        for direction in module.directions:
            networks = []
            for name in (direction.generator, direction.discriminator):
                own = given if like is None else like
                network = own.get_submodule(name)
                networks.append(
                    make_teacher(given if like is not None else network, self.teacher_weights, network, name)
                )
            generator, discriminator = networks
            layers = self.layers or attended_layers(generator.network)
            if not layers:
                raise MisconfigurationException(
                    f"CoAttentionDistillation(layers=None): it is not known which layers of a "
                    f"{type(generator.network).__name__} the paper would take; name some."
                )
            leaky = [n for n, layer in discriminator.network.named_modules() if isinstance(layer, nn.LeakyReLU)]
            if len(leaky) < 2:
                raise MisconfigurationException(
                    f"teacher: the features of a discriminator are those of its second and its last LeakyReLU; "
                    f"{type(discriminator.network).__name__} has {len(leaky)}."
                )
            pairs[direction.name] = Pair(generator, discriminator, layers, [Point(leaky[1]), Point(leaky[-1])])
        return pairs

    def _rehearse(self, module: Any, example_input: Tensor) -> None:
        """Ask the teacher once, so that all that cannot work is known now."""
        for direction in module.directions:
            pair, student = self._pairs[direction.name], module.generator_of(direction)
            for name, network in (("the teacher's", pair.generator.network), ("the student's", student)):
                own = dict(network.named_modules())
                for layer in pair.layers:
                    if layer not in own:
                        raise ValueError(
                            f"layers: {name} {type(network).__name__} has no {layer!r}.{did_you_mean(layer, own)}"
                        )
            parameter = next(student.parameters())
            source = example_input.to(parameter)
            for teacher in pair.networks:
                teacher.to(parameter.device)
            with torch.no_grad(), evaluating(student), torch.random.fork_rng([]):
                translated, ours = observe(student, pair.points, source)
                image, theirs = pair.generator.observe(pair.points, source)
                for layer, s, t in zip(pair.layers, ours, theirs, strict=True):
                    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (s, t)) or s.shape[2:] != t.shape[2:]:
                        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (s, t)]
                        raise MisconfigurationException(
                            f"layers: {layer!r} has to give features (N, C, H, W) of one size, got {shapes[0]} from "
                            f"the student and {shapes[1]} from the teacher."
                        )
                if image.shape != translated.shape:
                    raise MisconfigurationException(
                        f"teacher: it makes {tuple(image.shape)} of {tuple(source.shape)}, and the student "
                        f"{tuple(translated.shape)}."
                    )
                pair.discriminator(direction.shown(source, image))

    def _detach(self, pl_module: LightningModule) -> None:
        if self._added is not None:
            pl_module.generator_loss_terms.remove(self._added)  # type: ignore[operator, union-attr]
        for tap in self._taps.values():
            tap.remove()
        for pair in self._pairs.values():
            for teacher in pair.networks:
                teacher.to("cpu")
        self._added, self._taps = None, {}


class Pair:
    """The teachers of one direction, and where they are looked at.

    Args:
        generator: of the teacher.
        discriminator: of the teacher.
        layers: in the generators.
        judged: in the discriminator: where its attention is, and what it makes of an image.
    """

    def __init__(self, generator: Teacher, discriminator: Teacher, layers: Sequence[str], judged: list[Point]) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.layers = list(layers)
        self.points = [Point(layer) for layer in layers]
        self.judged = judged

    @property
    def networks(self) -> tuple[Teacher, Teacher]:
        return self.generator, self.discriminator


class FirstCall:
    """Keeps what some layers of a network make in its first call of a training step, until it is taken.

    Args:
        network: the network that is trained.
        layers: names of its submodules.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        self._seen: dict[str, Tensor] = {}
        self._network = network
        self._layers = layers
        self._handles = [network.get_submodule(n).register_forward_hook(partial(self._keep, n)) for n in layers]

    def take(self, count: int) -> list[Tensor]:
        """The features of the first `count` samples, layer by layer."""
        seen, self._seen = self._seen, {}
        return [seen[layer][:count] for layer in self._layers]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen = {}

    def _keep(self, layer: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._network.training and torch.is_grad_enabled():
            self._seen.setdefault(layer, output)


def begin_with(module: LightningModule, path: str) -> None:
    """Give a system the structure and the weights of a checkpoint that `DMAD` has cut.

    Raises:
        ValueError: there is no such file, it does not fit, or its search is not over.
    """
    try:
        state = read_checkpoint(path)["state_dict"]
        module.load_state_dict(state)
    except (OSError, MisconfigurationException, RuntimeError) as error:
        raise ValueError(f"student_weights: {path!r} is no checkpoint of this system: {error}") from error
    if any(isinstance(layer, BandMask) for layer in module.modules()):
        raise ValueError(
            f"student_weights: the masks in {path!r} have not been cut out yet; take a checkpoint of a later epoch."
        )


def uncut(module: LightningModule) -> nn.Module:
    """A copy of a module without what its record says; what was cut holds zeros."""
    copied = plain_copy(module)
    attach_record(copied).replay(copied, [])
    return copied


def _is_system(module: Any) -> bool:
    return hasattr(module, "directions") and hasattr(module, "generator_loss_terms")
