"""The callback: it decides when the band closes, when a generator is small enough, and when it is cut."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.callbacks.pruning.dmad.layout import Layout, layout_of
from lightning_compress.callbacks.pruning.dmad.masks import (
    LOSSES,
    BandMask,
    BandRule,
    LossType,
    band_at,
    group_loss,
    group_weights,
    relu_loss,
)
from lightning_compress.callbacks.pruning.dmad.removal import (
    Fold,
    alive,
    attach_masks,
    freeze,
    masks_of,
    narrow_band,
    plan_removal,
    remove_blocks,
    settle,
    silence,
    survivors,
)
from lightning_compress.core.example_input import find_example_input, inputs_for
from lightning_compress.core.optimizers import check_held
from lightning_compress.core.report import close_account, open_account, run_folder
from lightning_compress.core.surgery import (
    attach_record,
    change_in_fit,
    change_in_setup,
    check_trainer,
    resume_in_setup,
    shrink_in_fit,
    undo_changes,
)
from lightning_compress.core.units import human


class DMAD(Callback):
    """Learn how wide every layer of a generator has to be, for a target of MACs, and cut it to that.

    For `Pix2Pix`, `CycleGAN` and other translation systems whose generators are `ResNetGenerator` or `UNetGenerator`.
    Every channel gets a mask, which trains beside the weights. From the epoch on after the masks of all generators have
    settled, the rest of the fit trains the small generators; best scores count from there. Then let
    `CoAttentionDistillation` teach them, in a fit of its own. The progress bar shows ``dmad/macs``, in GMACs, what is
    not dead yet.

    Args:
        target_macs: where a generator's masks settle: a share of its MACs, in (0, 1), or, from above 1 on, MACs as the
            papers count them, for an image like the example input. For two generators also one for each,
            ``{"ab": 2.5e9, "ba": 4e9}``. What the closing band leaves may be less, and more where the push is too weak.
        mask_weight_decay: lambda, the weight of the push. The paper: 0.001 for CycleGAN, 0.002 with separable blocks,
            0.01 for the U-Net, 0.006 for Pix2Pix with separable blocks.
        lambda_update_coeff: lambda_u, how hard the residual stream is pushed: 1, and with separable blocks 5 (CycleGAN)
            or 2 (Pix2Pix). With 0 its masks are pushed one by one, as those inside the blocks.
        upconv_coeff: factor of the push in layers that change the resolution: 100, and 200 for a CycleGAN with
            separable blocks.
        loss_type: what pushes these layers: ``"bound"`` to the nearer end, ``"relu"`` down, ``"uprelu"`` up. All masks
            of a U-Net, and the second layer of a separable generator of Pix2Pix, are pushed down with factor 1.
        band_rule: how the band closes: by the cube root of the share of training, or ``"double"``, the square root.
        band_updates: in how many steps.
        band_end: share of the training after which the band is closed.
        frozen_threshold: a layer of a U-Net settles alone when more than this share of it is dead.
        fold: ``"exact"``: a mask that rises to 1 when the band narrows is multiplied into the next layer.
            ``"official"`` multiplies the layer in front of the norm, as the authors: an instance norm takes the factor
            away again, and the generator jumps. Before a batch norm with weights both are one and the same.
        seed: of the first masks.

    Logs ``train/dmad``, the push with its weight, and ``dmad/macs``; with two directions ``train/dmad_ab`` and so on.
    ``widths.json`` in the run's folder says how wide each generator is, for ``ResNetGenerator(widths=...)``.

    What is stored: masks and bands in the module's `state_dict` until the cut, the removed channels and blocks
    afterwards; the count of steps and the weights of the push in the callback's. A resumed run is the same run.

    With several processes the first one decides when a generator is small enough, and what is cut.

    Raises:
        ValueError, MisconfigurationException: before the first step, for impossible arguments, a target out of reach,
            modules that are no such systems, and a training without an end.

    Example::

        from lightning_compress.callbacks import DMAD
        trainer = Trainer(max_epochs=200, callbacks=[DMAD(target_macs=4e9)])
        trainer.fit(CycleGAN(ResNetGenerator(), PatchDiscriminator()), datamodule)

    Packaged config: ``method/dmad``.
    """

    def __init__(
        self,
        target_macs: float | dict[str, float] = 0.3,
        *,
        mask_weight_decay: float = 0.001,
        lambda_update_coeff: float = 1.0,
        upconv_coeff: float = 100.0,
        loss_type: LossType = "bound",
        band_rule: BandRule = "cube",
        band_updates: int = 150,
        band_end: float = 0.75,
        frozen_threshold: float = 0.85,
        fold: Fold = "exact",
        seed: int = 0,
    ) -> None:
        super().__init__()
        targets = list(target_macs.values()) if isinstance(target_macs, Mapping) else [target_macs]
        for argument, value, allowed, holds in (
            *(
                ("target_macs", target, "a share of the MACs between 0 and 1, or a number of MACs",
                 0 < target < 1 or 1 < target < math.inf)
                for target in targets
            ),
            ("mask_weight_decay", mask_weight_decay, "0 or more", mask_weight_decay >= 0),
            ("lambda_update_coeff", lambda_update_coeff, "0 or more", lambda_update_coeff >= 0),
            ("upconv_coeff", upconv_coeff, "0 or more", upconv_coeff >= 0),
            ("band_updates", band_updates, "1 or more", band_updates >= 1),
            ("band_end", band_end, "a share above 0, up to 1", 0 < band_end <= 1),
            ("frozen_threshold", frozen_threshold, "a share above 0, up to 1", 0 < frozen_threshold <= 1),
            ("seed", seed, "0 or more", seed >= 0),
            *(
                (argument, value, " or ".join(map(repr, get_args(kind))), value in get_args(kind))
                for argument, value, kind in (
                    ("loss_type", loss_type, LossType), ("band_rule", band_rule, BandRule), ("fold", fold, Fold)
                )
            ),
        ):  # fmt: skip
            if not holds:
                raise ValueError(f"DMAD({argument}={value!r}): give {allowed}.")
        self.target_macs = target_macs
        self.mask_weight_decay = mask_weight_decay
        self.lambda_update_coeff = lambda_update_coeff
        self.upconv_coeff = upconv_coeff
        self.loss_type = loss_type
        self.band_rule = band_rule
        self.band_updates = band_updates
        self.band_end = band_end
        self.frozen_threshold = frozen_threshold
        self.fold = fold
        self.seed = seed
        self._layouts: dict[str, Layout] = {}  # by direction, while masks are there
        self._targets: dict[str, float] = {}  # MACs
        self._pixels = 0
        self._bands: dict[str, float] = {}  # those of the masks, where no device has to be asked
        self._macs: dict[str, float] = {}
        self._rho: dict[str, Tensor] = {}
        self._batches = 0
        self._added: Any = None  # what is in `generator_loss_terms`
        self._notes: list[str] = []

    # ---- the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        record = attach_record(pl_module)
        if stage != "fit":
            return
        module = self._check(trainer, pl_module)
        open_account(trainer, pl_module)
        resume_in_setup(trainer, pl_module, by="DMAD")
        layouts = {d.name: layout_of(module.generator_of(d), d.name) for d in module.directions}
        if not any(step["by"] == "DMAD" for step in record.steps):
            self._begin(trainer, module, layouts)
        if any(isinstance(layer, BandMask) for layer in module.modules()):
            self._layouts = layouts
            self._find_targets(trainer, module)
            self._added = partial(self._push, module)
            module.generator_loss_terms.append(self._added)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._layouts:
            return
        masks = [mask for name in self._layouts for mask in self._masks(pl_module, name)]
        check_held(trainer, {f"the mask of {len(m.weight)} channels": m.weight for m in masks}, "DMAD")
        if not math.isfinite(trainer.num_training_batches):
            raise MisconfigurationException(
                "DMAD: the band closes over the whole training, and the dataloader does not say how long an epoch is. "
                "Give limit_train_batches, or a dataset with a length."
            )
        for name in self._layouts:
            self._look(pl_module, name)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._layouts and not any(self._bands.values()):
            self._cut(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._layouts:
            return
        self._batches += 1
        if any(self._bands.values()):
            total = int(trainer.num_training_batches) * (trainer.max_epochs or 1)
            every = max(1, math.floor(self.band_end * total / self.band_updates + 1e-9))
            if self._batches % every == 0 or self._batches == total:
                band = band_at(self._batches, total, self.band_end, self.band_rule)
                for name in [name for name, open_band in self._bands.items() if open_band]:
                    # masks that were loaded, not resumed, may be ahead
                    self._update(trainer, pl_module, name, min(band, self._bands[name]))
        for name, macs in self._macs.items():
            pl_module.log(f"dmad/macs{self._ending(name)}", torch.tensor(macs / 1e9), prog_bar=True, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut, where the masks settled in the last epoch."""
        if not self._layouts or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if any(self._bands.values()):
            rank_zero_warn("DMAD: the training ended before the masks settled; the generators keep them.")
        else:
            self._cut(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        close_account(trainer, pl_module, notes=self._notes)
        if trainer.is_global_zero and not self._layouts and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            module: Any = pl_module
            widths = {d.name: list(module.generator_of(d).widths) for d in module.directions}
            run_folder(trainer).mkdir(parents=True, exist_ok=True)
            (run_folder(trainer) / "widths.json").write_text(json.dumps(widths), encoding="utf-8")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)
        if stage == "fit" and trainer.fast_dev_run:  # type: ignore[attr-defined]
            undo_changes(pl_module, by="DMAD")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches, "rho": dict(self._rho), "notes": list(self._notes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = state_dict["batches"]
        self._rho = dict(state_dict["rho"])
        self._notes = list(state_dict["notes"])

    # ---- the beginning

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        check_trainer(trainer, "DMAD", in_fit=True)
        if not (hasattr(pl_module, "directions") and hasattr(pl_module, "generator_loss_terms")):
            raise MisconfigurationException(
                f"DMAD prunes the generators of translation systems, such as Pix2Pix and CycleGAN; "
                f"{type(pl_module).__name__} has no `directions` and `generator_loss_terms`."
            )
        if trainer.max_epochs == -1:
            raise MisconfigurationException(
                "DMAD: the band closes over the whole training; give the Trainer max_epochs."
            )
        names = [direction.name for direction in pl_module.directions]  # type: ignore[union-attr]
        if isinstance(self.target_macs, Mapping) and set(self.target_macs) != set(names):
            raise ValueError(f"target_macs: expected one for each direction, {names}, got {sorted(self.target_macs)}.")
        return pl_module

    def _begin(self, trainer: Trainer, module: Any, layouts: Mapping[str, Layout]) -> None:
        """Attach masks to all generators."""
        places = [
            (f"{direction.generator}.{site.at}", layout.channels[site.conv.writes])
            for direction in module.directions
            for layout in (layouts[direction.name],)
            for site in layout.sites
        ]
        change_in_setup(trainer, module, attach_masks, {"places": places, "seed": self.seed}, by="DMAD")
        self._batches, self._rho, self._notes = 0, {}, []

    def _find_targets(self, trainer: Trainer, module: Any) -> None:
        """Say in MACs where each generator's masks settle.

        Raises:
            ValueError: there is no such generator.
        """
        for direction in module.directions:
            args, kwargs = inputs_for(module.generator_of(direction), find_example_input(trainer, module))
            image: Tensor = (*args, *kwargs.values())[0]
            self._pixels = image.shape[-2] * image.shape[-1]
            layout = self._layouts[direction.name]
            dense = layout.macs(layout.channels, self._pixels)
            least = layout.macs({n: 0 if n in layout.blocks else 1 for n in layout.channels}, self._pixels)
            given = self.target_macs
            target = given[direction.name] if isinstance(given, Mapping) else given
            macs = target * dense if target < 1 else target
            if not least <= macs < dense:
                raise ValueError(
                    f"target_macs={target}: the generator of direction {direction.name!r} has {human(dense)} MACs on "
                    f"images of {image.shape[-2]}x{image.shape[-1]}, and {human(least)} with one channel in each "
                    f"layer; give something between these."
                )
            self._targets[direction.name] = macs

    # ---- a step

    def _push(self, module: Any, inputs: Mapping[str, Tensor], fakes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sparsity losses of the generators whose bands are open."""
        terms = {}
        for direction in module.directions:
            if self._bands[direction.name]:
                loss = self._sparsity(module, direction)
                terms[f"dmad{self._ending(direction.name)}"] = self.mask_weight_decay * loss
        return terms

    def _sparsity(self, module: Any, direction: Any) -> Tensor:
        layout, masks = self._layouts[direction.name], self._masks(module, direction.name)
        band = masks[0].band
        separable = any(conv.reads == (conv.writes,) for conv in layout.convs)
        by_kind: dict[str, list[Tensor]] = {"inner": [], "sampling": [], "stream": []}
        for site, mask in zip(layout.sites, masks, strict=True):
            down = separable and direction.conditional and site.conv.writes == "half"
            by_kind["inner" if down else site.kind].append(mask.weight)
        loss = relu_loss(torch.cat(by_kind["inner"]), band) if by_kind["inner"] else band.new_zeros(())
        for w in by_kind["sampling"]:
            loss = loss + self.upconv_coeff * LOSSES[self.loss_type](w, band)
        if by_kind["stream"]:
            stream = torch.stack(by_kind["stream"])
            rho = self._rho.get(direction.name)
            rho = torch.ones_like(stream[0]) if rho is None else rho.to(stream)
            loss = loss + group_loss(stream, band, rho)
        return loss

    @torch.no_grad()
    def _update(self, trainer: Trainer, pl_module: LightningModule, name: str, band: float) -> None:
        """Narrow the band of one generator, or settle its masks."""
        generator, layout = self._generator(pl_module, name), self._layouts[name]
        old = self._bands[name]
        if not layout.residual:
            freeze(generator, layout, self.frozen_threshold, self.fold)
        elif self.lambda_update_coeff > 0:
            masks = zip(layout.sites, self._masks(pl_module, name), strict=True)
            stream = torch.stack([mask.weight for site, mask in masks if site.kind == "stream"])
            self._rho[name] = group_weights(stream, stream.new_tensor(old), self.lambda_update_coeff).cpu()
        self._look(pl_module, name)
        enough = trainer.strategy.broadcast(self._macs[name] <= self._targets[name])
        if enough or not band:
            settle(generator, layout, -old if enough else 0.0, self.fold)
            self._look(pl_module, name)
            self._tell(name, enough)
        else:
            narrow_band(generator, layout, band, self.fold)
            self._bands[name] = band

    def _look(self, pl_module: LightningModule, name: str) -> None:
        """Read the band of a generator, and count what is not dead by it."""
        layout, masks = self._layouts[name], self._masks(pl_module, name)
        self._bands[name] = float(masks[0].band)
        threshold = -self._bands[name] if self._bands[name] else 0.0
        lives = alive(layout, [mask.weight.detach() for mask in masks], threshold)
        self._macs[name] = layout.macs(survivors(layout, lives), self._pixels)

    def _tell(self, name: str, enough: bool) -> None:
        which = f" of direction {name}" if len(self._layouts) > 1 else ""
        layout = self._layouts[name]
        dense = layout.macs(layout.channels, self._pixels)
        note = (
            f"The masks{which} settled after {self._batches} batches, "
            f"{'as the target was met' if enough else 'when the band was closed'}: {human(self._macs[name])} of "
            f"{human(dense)} MACs, as papers on translation count them."
        )
        self._notes.append(note)
        rank_zero_info(f"DMAD: {note}")
        if self._macs[name] > self._targets[name]:
            rank_zero_warn(
                f"DMAD: the generator{which} keeps {human(self._macs[name])} MACs, more than the target of "
                f"{human(self._targets[name])}. Give a larger mask_weight_decay (it is {self.mask_weight_decay:g}), or "
                f"train longer."
            )

    # ---- the cut

    def _cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what the masks have killed, and the masks."""
        module: Any = pl_module
        zeros, blocks, cuts = {}, [], []
        for direction in module.directions:
            layout, masks = self._layouts[direction.name], self._masks(module, direction.name)
            lives = alive(layout, [mask.weight.detach() for mask in masks], 0.0)
            removal = plan_removal(module.generator_of(direction), layout, lives, direction.generator)
            zeros.update(removal.zeros)
            blocks += removal.blocks
            cuts += removal.cuts
        zeros, blocks, cuts = trainer.strategy.broadcast((zeros, blocks, cuts))
        silence(module, zeros)
        self._release(module)
        undo_changes(module, by="DMAD")
        if blocks:
            change_in_fit(trainer, remove_blocks, {"blocks": blocks}, by="DMAD")
            note = f"Blocks that do nothing any more: {', '.join(blocks)}."
            self._notes.append(note)
            rank_zero_info(f"DMAD: {note}")
        shrink_in_fit(trainer, cuts, by="DMAD")

    # ---- small matters

    def _generator(self, pl_module: LightningModule, name: str) -> nn.Module:
        module: Any = pl_module
        return next(module.generator_of(d) for d in module.directions if d.name == name)

    def _masks(self, pl_module: LightningModule, name: str) -> Sequence[BandMask]:
        return masks_of(self._generator(pl_module, name), self._layouts[name])

    def _ending(self, name: str) -> str:
        return f"_{name}" if len(self._targets) > 1 else ""

    def _release(self, pl_module: LightningModule) -> None:
        if self._added is not None:
            pl_module.generator_loss_terms.remove(self._added)  # type: ignore[operator, union-attr]
        self._added, self._layouts = None, {}
