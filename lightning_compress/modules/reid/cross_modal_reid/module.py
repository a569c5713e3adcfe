"""When all this happens: the training system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_compress.core.distill.bottleneck import InformationBottleneck
from lightning_compress.core.distill.variational import (
    KLMode,
    check_mode,
    cross_distillation,
    mutual_learning,
    self_distillation,
    sinkhorn,
)
from lightning_compress.core.meta import dry_run
from lightning_compress.core.schedules import WarmupMultiStep
from lightning_compress.core.select import did_you_mean
from lightning_compress.core.surgery import attach_record
from lightning_compress.metrics import CrossCameraRetrieval
from lightning_compress.modules._optimizers import check_interval, configured
from lightning_compress.modules.reid.cross_modal_reid.branches import (
    LOOKS,
    Branch,
    Embedder,
    Feature,
    Looks,
    Observer,
    embed,
    grey,
)
from lightning_compress.modules.reid.cross_modal_reid.losses import Weights, classification_loss, ranking_loss
from lightning_compress.networks.find import build_trunk
from lightning_compress.networks.reid_resnet import load_trunk


def adam(params: Any) -> Optimizer:
    """The paper's optimiser."""
    return torch.optim.Adam(params, lr=2.6e-4, weight_decay=5e-4)


def warmed_up(optimizer: Optimizer) -> LRScheduler:
    """The authors' schedule: from a hundredth in ten epochs to the full rate, a tenth from the 210th epoch on."""
    return WarmupMultiStep(optimizer, milestones=(209,), gamma=0.1, warmup_epochs=10, warmup_start=0.01)


class CrossModalReID(LightningModule):
    """Learn to find persons of infrared images among visible ones, or the other way round.

    Training batches are (images (N, 3, H, W), labels (N,), infrared (N,) bool), whole identities in both views, as
    `IdentityModalitySampler` draws them. Evaluation takes two loaders, queries and gallery, with (images, identities,
    cameras, indices), of which the last may be left out.

    Logs ``train/loss``, ``train/ce``, ``train/rank``, ``train/cml``, ``train/vsd``, ``train/vcd``, ``train/vml``
    (without their weights; those with weight 0 are left out), ``train/acc_v`` and ``train/acc_z``, the accuracy of the
    classifiers of v and of z; and ``val/rank1``, ``val/mAP``, ``val/mINP`` and more, see `CrossCameraRetrieval`. The
    datamodule says by which protocol; without one every image of the gallery counts. `forward` and `predict_step` give
    vectors of length 1.

    Args:
        backbone: the trunk of each of the three branches: a name (``"reid_resnet50"``, ``"reid_small"``, or
            ``"timm/<name>"``), or a function, in a config a class, that builds a network from images to feature maps
            or features.
        num_classes: identities to train on, C.
        z_dim: the representation z has twice as many features.
        hidden: widths of the bottleneck on its way to z.
        classifier_dim: width of the hidden layer of z's classifier.
        ce_weight: weight of the cross-entropies.
        rank_weight: weight of the ranking loss.
        cml_weight: weight of conventional mutual learning.
        vsd_weight: weight of variational self-distillation.
        vcd_weight: weight of variational cross-distillation.
        vml_weight: weight of variational mutual learning, which the released code leaves out.
        kl_mode: the reading of k: ``"official"`` or ``"kl"``, see `core/distill/variational.py`. The weights suit the
            first; the second is about C times larger.
        temperature: T of L_vsd.
        rank_margins: m1, m2, a1, a2 of the ranking loss.
        label_smoothing: share of each target spread over all identities.
        feature: what evaluation compares: ``"observation"``, v, or ``"representation"``, z.
        gather: whether ranking loss and L_cml see the batches of all processes as one.
        optimizer: makes the optimiser from the parameters. The default is the paper's.
        lr_scheduler: makes the schedule from the optimiser. The default is the authors'.
        lr_scheduler_interval: whether the schedule advances every ``"epoch"`` or every ``"step"``.
        weights: file of a classifier's weights to start all three trunks from, see `load_trunk`; the paper begins with
            torchvision's of ImageNet.
        input_shape: (3, height, width) of an image.

    Raises:
        ValueError: an argument out of range, an unknown trunk, weights that do not fit.
        MisconfigurationException: the datamodule has other identities or shapes, or batches are not as above.

    Example::

        module = CrossModalReID(num_classes=206, weights="resnet50.pth")
        Trainer(max_epochs=600).fit(module, RegDB("data/RegDB"))

    Packaged config: ``method/cross_modal_reid``.
    """

    # arguments that are objects or belong to one machine: checkpoints hold plain values, to load with weights_only=True
    NOT_SAVED: tuple[str, ...] = ("optimizer", "lr_scheduler", "weights")

    def __init__(
        self,
        backbone: str | Callable[[], nn.Module] = "reid_resnet50",
        num_classes: int = 10,
        z_dim: int = 256,
        hidden: Sequence[int] = (1000, 500),
        classifier_dim: int = 256,
        ce_weight: float = 1.0,
        rank_weight: float = 1.0,
        cml_weight: float = 8.0,
        vsd_weight: float = 2.0,
        vcd_weight: float = 2.0,
        vml_weight: float = 0.0,
        kl_mode: KLMode = "official",
        temperature: float = 1.0,
        rank_margins: tuple[float, float, float, float] = (0.9, 1.0, 2.2, 2.0),
        label_smoothing: float = 0.1,
        feature: Feature = "observation",
        gather: bool = False,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = warmed_up,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        weights: str | None = None,
        input_shape: tuple[int, int, int] = (3, 256, 128),
    ) -> None:
        super().__init__()
        check_interval(lr_scheduler_interval)
        check_mode("kl_mode", kl_mode, KLMode)
        check_mode("feature", feature, Feature)
        self.loss_weights = Weights(ce_weight, rank_weight, cml_weight, vsd_weight, vcd_weight, vml_weight)
        for name, weight in self.loss_weights._asdict().items():
            if weight < 0:
                raise ValueError(f"{name}_weight: expected 0 or more, got {weight}.")
        if len(input_shape) != 3 or input_shape[0] != 3:
            raise ValueError(f"input_shape: expected (3, height, width), got {tuple(input_shape)}.")
        if num_classes < 2:
            raise ValueError(f"num_classes: expected 2 or more, got {num_classes}.")
        if temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a share in [0, 1), got {label_smoothing}.")
        if len(rank_margins) != 4:
            raise ValueError(f"rank_margins: expected m1, m2, a1, a2, got {tuple(rank_margins)}.")
        if isinstance(backbone, nn.Module):
            raise ValueError(
                "backbone: each branch needs one of its own: give a name or a function that builds it (in a config, a "
                f"class), not {type(backbone).__name__}()."
            )
        self.save_hyperparameters(ignore=[*self.NOT_SAVED, *["backbone"] * (not isinstance(backbone, str))])
        if "_instantiator" in self.hparams:
            self.save_hyperparameters("backbone")  # from the command line, which knows it as plain data
        self.branches = nn.ModuleDict()
        for branch in ("infrared", "visible", "shared"):
            trunk = build_trunk(backbone) if isinstance(backbone, str) else backbone()
            if weights is not None:
                load_trunk(trunk, weights)
            num_features = dry_run(trunk, torch.zeros(1, *input_shape), lambda _: nullcontext())[1].shape[1]
            bottleneck = InformationBottleneck(num_features, num_classes, z_dim, hidden, classifier_dim)
            self.branches[branch] = Branch(Observer(trunk, num_features), num_classes, bottleneck)
        self.num_classes = num_classes
        self.kl_mode = kl_mode
        self.temperature = temperature
        self.rank_margins = tuple(rank_margins)
        self.label_smoothing = label_smoothing
        self.feature = feature
        self.gather = gather
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.input_shape = tuple(input_shape)
        self.example_input_array = torch.zeros(1, *input_shape)
        self.retrieval = CrossCameraRetrieval()

    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        for attribute in ("num_classes", "input_shape"):
            theirs, ours = getattr(datamodule, attribute, None), getattr(self, attribute)
            if theirs is not None and theirs != ours:
                raise MisconfigurationException(
                    f"{attribute}: {type(datamodule).__name__} has {theirs}, {type(self).__name__} got {ours}."
                )
        if protocol := getattr(datamodule, "retrieval", None):
            self.retrieval = protocol()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let `load_from_checkpoint` open checkpoints of compressed networks: they say themselves what was changed."""
        attach_record(self)

    def looks(self, images: Tensor) -> Looks:
        """Send images, (N, 3, H, W), through all branches; the shared one sees them twice, first in grey."""
        images = images.expand(-1, 3, -1, -1)
        in_grey = grey(images)
        return Looks(*(self.branches[b](in_grey if greyed else images) for b, greyed, _ in LOOKS.values()))

    def forward(self, images: Tensor) -> Tensor:
        """Return vectors of length 1, (N, 4 D) or, of z, (N, 8 z_dim)."""
        return embed({b: self._encoder(b) for b in self.branches}, images, tuple(LOOKS))

    def embedder(self, looks: Sequence[str] = tuple(LOOKS)) -> Embedder:
        """A copy of what deployment needs, without classifiers: a plain network from images to vectors of length 1.

        Args:
            looks: of `Looks`; ``["shared_infrared", "shared_visible"]`` needs the shared trunk alone. Queries and
                gallery have to be compared in the same looks.

        Raises:
            ValueError: no look, or an unknown one.
        """
        for look in looks:
            if look not in LOOKS:
                hint = did_you_mean(look, LOOKS) or f" There is: {', '.join(LOOKS)}."
                raise ValueError(f"looks: there is no {look!r}.{hint}")
        if not looks:
            raise ValueError(f"looks: expected some of {', '.join(LOOKS)}, got none.")
        needed = sorted({LOOKS[look][0] for look in looks})
        return Embedder({b: deepcopy(self._encoder(b)) for b in needed}, looks).eval()

    def _encoder(self, branch: str) -> nn.Module:
        return cast(Branch, self.branches[branch]).encoder(self.feature)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, infrared = self._unpack(batch, "training", "(images, labels, infrared)", {3})
        looks = self.looks(images)
        losses = self.losses(looks, labels, infrared)
        loss = torch.stack([getattr(self.loss_weights, name) * value for name, value in losses.items()]).sum()
        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(labels))
        log("train/loss", loss, prog_bar=True)
        for name, value in losses.items():
            log(f"train/{name}", value)
        for name in ("v", "z"):
            logits = torch.stack([getattr(look, f"{name}_logits") for look in looks])
            log(f"train/acc_{name}", (logits.argmax(2) == labels).float().mean())
        return loss

    def losses(self, looks: Looks, labels: Tensor, infrared: Tensor) -> dict[str, Tensor]:
        """The losses of a batch by name, without their weights, and without those whose weight is 0.

        Args:
            looks: what the branches make of it.
            labels: (N,), int64.
            infrared: (N,), bool.
        """
        everywhere, all_labels, all_infrared = self._from_everywhere(looks, labels, infrared)
        (i, s_i, v, s_v), distil = looks, partial(self_distillation, temperature=self.temperature, kl_mode=self.kl_mode)
        weights, losses = self.loss_weights, {}
        # also of weight 0: through it every parameter has a gradient, which DDP waits for
        losses["ce"] = classification_loss(looks, labels, self.label_smoothing)
        if weights.rank:
            losses["rank"] = ranking_loss(everywhere, all_labels, all_infrared, self.rank_margins)
        if weights.cml:
            losses["cml"] = sinkhorn(everywhere.infrared.v_logits.softmax(1), everywhere.visible.v_logits.softmax(1))
        if weights.vsd:
            losses["vsd"] = distil(i.z_logits, i.v_logits) + distil(v.z_logits, v.v_logits)
        if weights.vcd:
            students, teachers = (s_i.z_logits, s_v.z_logits), (s_i.v_logits, s_v.v_logits)
            losses["vcd"] = cross_distillation(students, teachers, self.kl_mode)
        if weights.vml:
            losses["vml"] = mutual_learning(s_i.z_logits, s_v.z_logits)
        return losses

    def _from_everywhere(self, looks: Looks, labels: Tensor, infrared: Tensor) -> tuple[Looks, Tensor, Tensor]:
        """The batches of all processes one after another, with gradients; all outputs go in one message."""
        if not (self.gather and self.trainer.world_size > 1):
            return looks, labels, infrared

        def together(part: Tensor) -> Tensor:
            return cast(Tensor, self.all_gather(part, sync_grads=True)).flatten(0, 1)

        outputs, layout = tree_flatten(looks)
        gathered = together(torch.cat(outputs, 1)).split([output.shape[1] for output in outputs], 1)
        all_labels, all_infrared = together(torch.stack([labels, infrared.long()], 1)).T
        return tree_unflatten(list(gathered), layout), all_labels, all_infrared.bool()

    def on_validation_start(self) -> None:
        self._check_loaders(self.trainer.val_dataloaders)

    def on_test_start(self) -> None:
        self._check_loaders(self.trainer.test_dataloaders)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("validation", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return vectors of length 1, for images or (images, ...)."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def configure_optimizers(self) -> Any:
        trained = (p for p in self.parameters() if p.requires_grad)
        return configured(trained, self.optimizer, self.lr_scheduler, self.lr_scheduler_interval, "val/mAP")

    def _unpack(self, batch: Any, which: str, expected: str, lengths: set[int]) -> Any:
        if not (isinstance(batch, (tuple, list)) and len(batch) in lengths):
            got = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
            raise MisconfigurationException(
                f"{type(self).__name__}: the {which} batches must be {expected}, got {got}."
            )
        return batch

    def _check_loaders(self, loaders: Any) -> None:
        count = len(loaders) if isinstance(loaders, (list, tuple)) else 1
        if count != 2:
            raise MisconfigurationException(
                f"{type(self).__name__}: evaluation takes two loaders, queries and gallery, got {count}."
            )

    def _evaluate(self, which: str, batch: Any, loader: int) -> None:
        expected = "(images, identities, cameras) or (images, identities, cameras, indices)"
        images, *who = self._unpack(batch, which, expected, {3, 4})
        identities, cameras, index = (*who, None)[:3]
        self.retrieval.update(self(images), identities, cameras, query=loader == 0, index=index)

    def _report(self, split: str) -> None:
        found = self.retrieval.compute()
        self.retrieval.reset()
        for name, value in found.items():
            self.log(f"{split}/{name}", value, prog_bar=name in ("rank1", "mAP"), sync_dist=True)
