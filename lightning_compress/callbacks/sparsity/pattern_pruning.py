"""Pattern pruning with a library that the network itself shows: which few shapes its kernels settle on.

Ma, Niu, Zhang, Liu, Lin, Li, Wen, Chen, Tang, Ma, Ren, Wang, "An Image Enhancing Pattern-based Sparsity for Real-time
Inference on Mobile Devices", ECCV 2020, arXiv:2001.07710.

    P_1 = all shapes of 4 taps that contain the centre: 56
    phase t:  ADMM with every kernel in P_t,  Z_k = (W_k + U_k) o m*(k),  m*(k) = argmax_{m in P_t} ||(W_k + U_k) o m||
    after it: h(m) = #{k : m*(k) = m} over all layers, one vote per kernel whatever its norm
              P_{t+1} = the shapes with most votes, 12, then 8, then 4
              U_k = 0 where the shape of kernel k went, then Z = P_{t+1}(W + U); other duals stay

Then the last library and the connectivity are solved for together, pruned and retrained as in
:mod:`~lightning_compress.callbacks.sparsity.pconv`, of which this is the extension.

Without a budget for that, each kernel of the trained network votes for its own best shape, once (``"cheap"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_compress.callbacks.sparsity.pconv import LIBRARIES, PCONV
from lightning_compress.core import plots
from lightning_compress.core.report import log_figure
from lightning_compress.core.sparse.admm import Artefact, Phase, Problem
from lightning_compress.core.sparse.patterns import all_patterns, best_patterns, most_frequent, taps_of

EXTRACTION = "extraction"
SHARED = ""  # the key of the one library of all layers


def shrink_library(ids: Mapping[str, Tensor], library: Tensor, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Keep the shapes that most kernels prefer.

    Args:
        ids: layer -> number of the best shape of each kernel, (C_out, C_in).
        library: (P, taps).
        size: shapes that stay; equals by the lower number.

    Returns:
        The library (size, taps), in its order, and layer -> kernels whose shape stayed, (C_out, C_in) bool.
    """
    votes = torch.bincount(torch.cat([own.flatten().cpu() for own in ids.values()]), minlength=len(library))
    smaller = most_frequent(library, votes, size)
    stays = (library[:, None] == smaller).all(-1).any(1)
    return smaller, {layer: stays.to(own.device)[own] for layer, own in ids.items()}


def library_picture(library: Tensor, shares: Tensor, across: int = 12) -> Tensor:
    """The shapes beside and below each other: each kept tap as the share of kernels, the space between them NaN.

    Args:
        library: (P, 9).
        shares: (P,).
        across: shapes in a row.
    """
    across = min(across, len(library))
    tiles = torch.full((-(-len(library) // across) * across, 4, 4), torch.nan)
    tiles[: len(library), :3, :3] = torch.where(library, shares[:, None], 0.0).view(-1, 3, 3)
    return tiles.unflatten(0, (-1, across)).transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]


def draw_patterns(trainer: Trainer, name: str, ids: Mapping[str, Tensor], libraries: Mapping[str, Tensor]) -> None:
    """Pictures of the shapes, and of how often each layer has them, ``<name>.png`` and ``<name>_by_layer.png``.

    Args:
        name: of the pictures.
        ids: layer -> number of each kernel's shape in the layer's library.
        libraries: one for each layer, or one for all of them.
    """
    if not (trainer.is_global_zero and plots.available()):
        return
    every = libraries.get(SHARED)
    if every is None:  # all that occur, in lexicographic order
        every = torch.cat(list(libraries.values())).int().unique(dim=0).flip(0).bool()
    votes = torch.zeros(len(ids), len(every))
    for row, (layer, own) in zip(votes, ids.items(), strict=True):
        library = libraries.get(SHARED, libraries.get(layer))
        assert library is not None
        places = (library[:, None] == every).all(-1).int().argmax(1)
        row[places] = torch.bincount(own.flatten().cpu(), minlength=len(library)).float()
    columns = ["".join(map(str, row.nonzero()[:, 0].tolist())) for row in every]
    picture = library_picture(every, votes.sum(0) / votes.sum())
    no_rows, no_columns = ([""] * size for size in picture.shape)
    shapes = plots.heat_map(picture, title="Patterns, by their share of the kernels", rows=no_rows, columns=no_columns)
    shares = votes / votes.sum(1, keepdim=True)
    layers = plots.heat_map(
        shares, title="Share of each pattern by layer", column_label="taps kept", rows=list(ids), columns=columns
    )
    log_figure(trainer, name, shapes)
    log_figure(trainer, f"{name}_by_layer", layers)


class PatternPruning(PCONV):
    """Find the few shapes that kernels settle on, bring all to these, and remove whole kernels, by ADMM in the fit.

    With ``library="extract"`` the fit begins with one ADMM phase for each entry of `library_sizes`, of
    `extract_epochs_per_phase` epochs; then follow the joint phase, which ends at `end_epoch`, and the retraining.

    Args:
        library: ``"extract"``; ``"cheap"``, one vote on the weights at `start_epoch`; ``"natural8"`` or ``"scp4"``; or
            lists of the kept taps, or a tensor (P, 9).
        n_entries: weights that a kernel keeps, for extracted libraries.
        centre: whether only shapes with the centre are candidates: 56 with 4 entries, else 126.
        library_sizes: shapes that are left after each extraction phase; the last number is that of the final library.
        extract_epochs_per_phase: epochs of ADMM before each reduction.
        shared_library: one library for all layers, as in the paper, or one for each.
        balance: as in :class:`~lightning_compress.callbacks.sparsity.pconv.PCONV`, but by the layer, as in the paper.
        start_epoch: first epoch of all this.
        end_epoch: first epoch of retraining with fixed zeros.

    `shared` are the further arguments of :class:`~lightning_compress.callbacks.sparsity.pconv.PCONV` and
    :class:`~lightning_compress.core.sparse.admm.ADMM`: connectivity, pattern_block, include_1x1, connectivity_exclude,
    warmup_epochs, rho, rho_growth, every_n_epochs, include, exclude.

    The log tells which share of kernels changed its shape at each update (``train/pattern_pruning/changed``). Pictures
    of every library and of the shapes of each layer lie beside the account, with ``pattern_pruning.fkw``.

    With several processes libraries and masks are rank 0's.

    Example::

        from lightning_compress.callbacks import PatternPruning
        trainer = Trainer(max_epochs=500, callbacks=[PatternPruning(library_sizes=(12, 8), end_epoch=320)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/pattern_pruning``.
    """

    NAME = "pattern_pruning"
    IDENTITY = (
        *(name for name in PCONV.IDENTITY if name != "patterns"),
        "library", "n_entries", "centre", "library_sizes", "extract_epochs_per_phase", "shared_library",
    )  # fmt: skip

    def __init__(
        self,
        library: Literal["extract", "cheap", "natural8", "scp4"] | list[list[int]] | Tensor = "extract",
        *,
        n_entries: int = 4,
        centre: bool = True,
        library_sizes: Sequence[int] = (12, 8, 4),
        extract_epochs_per_phase: int = 60,
        shared_library: bool = True,
        balance: Literal["filter", "layer"] = "layer",
        start_epoch: int = 0,
        end_epoch: int = 380,
        **shared: Any,
    ) -> None:
        voted = isinstance(library, str) and library in ("extract", "cheap")
        if isinstance(library, str) and not voted and library not in LIBRARIES:
            raise ValueError(
                f"PatternPruning(library={library!r}): give 'extract', 'cheap', 'natural8', 'scp4', lists of taps or "
                f"a tensor (P, 9)."
            )
        super().__init__(
            patterns="scp4" if voted else library,  # type: ignore[arg-type]
            balance=balance,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            **shared,
        )
        if not 1 <= n_entries <= 9:
            raise ValueError(f"PatternPruning(n_entries={n_entries}): a 3x3 kernel keeps 1 to 9 weights.")
        sizes = list(library_sizes)
        if not sizes or min(sizes) < 1 or sizes != sorted(sizes, reverse=True):
            raise ValueError(f"PatternPruning(library_sizes={sizes}): give numbers of at least 1 that do not grow.")
        if extract_epochs_per_phase < 1:
            raise ValueError(f"PatternPruning(extract_epochs_per_phase={extract_epochs_per_phase}): give at least 1.")
        self.library = library if isinstance(library, str) else self.patterns
        self.n_entries = n_entries
        self.centre = centre
        self.library_sizes = sizes
        self.extract_epochs_per_phase = extract_epochs_per_phase
        self.shared_library = shared_library

    def _forget(self) -> None:
        super()._forget()
        self.libraries: dict[str, Tensor] = {}  # by layer, or one for all of them

    def timeline(self) -> list[Phase]:
        joint, *retraining = super().timeline()
        if self.library != "extract":
            return [joint, *retraining]
        length = f"extract_epochs_per_phase={self.extract_epochs_per_phase}"
        starts = [self.start_epoch + i * self.extract_epochs_per_phase for i in range(len(self.library_sizes) + 1)]
        phases = [Phase(f"{EXTRACTION} {i}", start, True, length) for i, start in enumerate(starts[:-1], 1)]
        phases[0] = replace(joint, name=phases[0].name)  # begins at start_epoch, with the warm-up
        return [*phases, Phase(joint.name, starts[-1], True, length), *retraining]

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        layers = super().find_layers(trainer, pl_module)
        if not any(rule.patterns for rule in self.rules.values()):
            raise MisconfigurationException(
                f"PatternPruning finds no 3x3 convolution in {type(pl_module).__name__} whose kernels could vote: "
                f"{dict(list(self.left_alone.items())[:4])}"
            )
        return layers

    def library_for(self, layer: str) -> Tensor:
        return self.libraries[SHARED if SHARED in self.libraries else layer]

    def problem(self, pl_module: LightningModule, phase: Phase) -> Problem:
        constraints = super().problem(pl_module, phase)
        if not phase.name.startswith(EXTRACTION):
            return constraints
        return {layer: {"pattern": own["pattern"]} for layer, own in constraints.items() if "pattern" in own}

    def enter(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        if phase.admm and not self.libraries:
            self.libraries = self.first_libraries()
            if self.library == "cheap":
                self.shrink(trainer, pl_module, self.library_sizes[-1])
        elif phase.admm and self.library == "extract":
            before = self.timeline().index(phase) - 1
            self.shrink(trainer, pl_module, self.library_sizes[before])
            if phase.name.startswith(EXTRACTION):  # goes on with the duals
                self.splits.rho = self.rho
                self.splits.refresh(self.weights(pl_module), self.problem(pl_module, phase))
                return
        super().enter(trainer, pl_module, phase)

    def first_libraries(self) -> dict[str, Tensor]:
        """The library that was given, or all candidates."""
        layers = [SHARED] if self.shared_library else [layer for layer, rule in self.rules.items() if rule.patterns]
        voted = self.library in ("extract", "cheap")
        return dict.fromkeys(layers, all_patterns(self.n_entries, centre=self.centre) if voted else self.shapes)

    def shrink(self, trainer: Trainer, pl_module: LightningModule, size: int) -> None:
        """Let the kernels vote, W + U each, and forget the duals of those whose shape goes."""
        chosen = self.best_shapes(pl_module)
        smaller = {}
        for key, library in self.libraries.items():
            own = chosen if key == SHARED else {key: chosen[key]}
            smaller[key], stays = shrink_library(own, library, size)
            for layer, kernels in stays.items():
                if layer in self.splits.u:
                    self.splits.u[layer]["pattern"].mul_(kernels[:, :, None, None])
        size_before = len(next(iter(self.libraries.values())))
        draw_patterns(trainer, f"{self.NAME}/votes_on_{size_before}", chosen, self.libraries)
        self.libraries = trainer.strategy.broadcast(smaller)

    def best_shapes(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Layer -> number of the shape that keeps most of W + U, for each kernel (C_out, C_in)."""
        found = {}
        for layer, weight in self.weights(pl_module).items():
            if self.rules[layer].patterns:
                value = weight.detach()
                if layer in self.splits.u:
                    value = value + self.splits.u[layer]["pattern"]
                found[layer] = best_patterns(value, self.library_for(layer), self.rules[layer].block)
        return found

    def update(self, pl_module: LightningModule, phase: Phase) -> None:
        def shapes() -> list[Tensor]:
            return [
                best_patterns(own["pattern"], self.library_for(layer), self.rules[layer].block).flatten()
                for layer, own in self.splits.z.items()
                if "pattern" in own
            ]

        before = shapes()
        super().update(pl_module, phase)
        changed = torch.cat([(old != new).float() for old, new in zip(before, shapes(), strict=True)])
        pl_module.log(f"train/{self.NAME}/changed", changed.mean())

    def own_state(self) -> dict[str, Any]:
        return {"libraries": dict(self.libraries)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.libraries = dict(state["libraries"])

    def artefact(self, trainer: Trainer, pl_module: LightningModule) -> Artefact:
        costs, notes = super().artefact(trainer, pl_module)
        names = {layer: self.parameter_name(pl_module, layer) for layer, rule in self.rules.items() if rule.patterns}
        kept = {layer: self.masks[name].flatten(2).cpu() for layer, name in names.items() if name in self.masks}
        if kept:
            masks = {layer: mask[mask.any(-1)] for layer, mask in kept.items()}
            ids = {
                layer: (mask[:, None] == self.library_for(layer)).all(-1).int().argmax(1)
                for layer, mask in masks.items()
            }
            draw_patterns(trainer, f"{self.NAME}/library", ids, self.libraries)
            library = next(iter(self.libraries.values()))
            notes.append(
                f"Library of {len(library)} shapes: {taps_of(library).tolist()}."
                if self.shared_library
                else f"A library of {len(library)} shapes in each layer."
            )
        return costs, notes
