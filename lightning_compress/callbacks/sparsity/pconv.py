"""PCONV: kernels that keep four weights in one of a few fixed shapes, and a fraction of the kernels removed whole.

Ma, Guo, Niu, Lin, Tang, Ma, Ren, Wang, "PCONV: The Missing but Desirable Sparsity in DNN Weight Pruning for Real-time
Execution on Mobile Devices", AAAI 2020, arXiv:1909.05073; storage and reordering as in Niu et al., "PatDNN", ASPLOS
2020, arXiv:2001.00138.

    min f(W)   with every kernel w_k of a 3x3 layer in a set of patterns, and alpha kernels per filter

    Z = P_pattern(W + U),       P_pattern(w_k) = w_k o m_p,  p = argmax_p ||w_k o m_p||_2
    Y = P_connectivity(W + V),  the alpha = ceil(C_in / rate) kernels of largest norm in each filter stay
    W.grad += rho (2 W - Z - Y + U + V)

    at the end  M = kernels by the norm of the whole kernel, then the pattern of each that stays;  W <- W o M, retrain

The four shapes are the centre and three of its four neighbours, after the "enhanced Laplacian of Gaussian" filter
[0 1 0; 1 8 1; 0 1 0]. 9/4 = 2.25 times fewer weights by patterns, with a rate of 3.6 another 3.6 times: 8.1 in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.profile import profile
from lightning_compress.core.select import match
from lightning_compress.core.sparse.admm import ADMM, Artefact, Phase, Problem
from lightning_compress.core.sparse.formats import FKW, decode_fkw, encode_fkw, fkw_lists, save_fkw, share_kernels
from lightning_compress.core.sparse.patterns import (
    NATURAL8,
    SCP4,
    Balance,
    kernel_mask,
    library_of,
    project_connectivity,
    project_patterns,
    taps_of,
)
from lightning_compress.core.units import human
from lightning_compress.ops.pattern_conv2d import NonZeros, PatternConv2d
from lightning_compress.ops.pattern_conv2d.layer import is_suitable

LIBRARIES = {"scp4": SCP4, "natural8": NATURAL8}
SHORTCUTS = ("downsample", "shortcut")  # what networks call the 1x1 convolutions beside a residual block
POINT = torch.ones(1, 1, dtype=torch.bool)  # the library of a 1x1 kernel


@dataclass(frozen=True)
class Rule:
    """What is asked of one layer.

    Attributes:
        patterns: whether its kernels take shapes of the library.
        connectivity: how many times fewer kernels; 1 keeps them all.
        block: filters that decide together.
    """

    patterns: bool
    connectivity: float
    block: int


def named_library(patterns: str | Sequence[Sequence[int]] | Tensor) -> Tensor:
    """``"scp4"``, ``"natural8"``, lists of kept taps, or a 0/1 tensor (P, 9) -> library (P, 9).

    >>> len(named_library("natural8")), named_library([[0, 1, 3, 4]]).int().tolist()
    (8, [[1, 1, 0, 1, 1, 0, 0, 0, 0]])
    """
    if isinstance(patterns, str):
        if patterns not in LIBRARIES:
            raise ValueError(f"patterns: give 'scp4', 'natural8', lists of taps or a tensor (P, 9), got {patterns!r}.")
        return library_of(LIBRARIES[patterns])
    if isinstance(patterns, Tensor):
        if patterns.ndim != 2 or patterns.shape[1] != 9:
            raise ValueError(f"patterns: a tensor has shape (P, 9), got {tuple(patterns.shape)}.")
        return library_of([row.nonzero().flatten().tolist() for row in patterns])
    return library_of(patterns)


def find_rules(
    network: nn.Module,
    order: Sequence[str],
    connectivity: float | Mapping[str, float],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    connectivity_exclude: Sequence[str] | None = None,
    include_1x1: bool = True,
    pattern_block: int = 1,
) -> tuple[dict[str, Rule], dict[str, str]]:
    """Which layer takes patterns, and which loses kernels.

    3x3 convolutions take patterns; those with one group lose kernels too. 1x1 convolutions only lose kernels, but not
    on a shortcut (a part of their name says so). Depthwise 3x3 convolutions only take patterns, each filter for itself.

    Args:
        network: what the names belong to.
        order: names of its convolutions and linear layers as they run; the first convolution keeps its kernels.
        connectivity: how many times fewer kernels, for all layers or by glob; later globs win, others keep theirs.
        connectivity_exclude: globs of layers that keep their kernels; None for the first convolution.

    Returns:
        (layer -> rule, layer -> why it stays dense).

    Raises:
        ValueError: a glob that matches nothing, or a rate below 1.
    """
    layers = {name: network.get_submodule(name) for name in order}
    convs = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    included, excluded = match(layers, include, "include"), match(layers, exclude, "exclude")
    rates = dict.fromkeys(convs, 1.0)
    for glob, rate in connectivity.items() if isinstance(connectivity, Mapping) else {"*": connectivity}.items():
        rates.update(dict.fromkeys(match(convs, [glob], "connectivity"), rate) if convs else {})
    if connectivity_exclude is None:
        connectivity_exclude = list(convs)[:1]
    rates.update(dict.fromkeys(match(convs, connectivity_exclude, "connectivity_exclude"), 1.0))

    rules, left_alone = {}, {}
    for name, layer in layers.items():
        if name not in included or name in excluded:
            left_alone[name] = "not included" if name not in included else "excluded"
        elif not isinstance(layer, nn.Conv2d):
            left_alone[name] = "no convolution"
        elif not layer.weight.requires_grad:
            left_alone[name] = "its weight is frozen"
        elif layer.kernel_size == (3, 3) and layer.groups == 1:
            rules[name] = Rule(True, rates[name], pattern_block)
        elif layer.kernel_size == (3, 3) and layer.groups == layer.in_channels:
            rules[name] = Rule(True, 1.0, 1)
        elif layer.kernel_size != (1, 1) or layer.groups > 1:
            kernel = "x".join(map(str, layer.kernel_size))
            left_alone[name] = f"{kernel} kernels in {layer.groups} groups" if layer.groups > 1 else f"{kernel} kernels"
        elif not include_1x1:
            left_alone[name] = "1x1 kernels"
        elif any(word in name for word in SHORTCUTS):
            left_alone[name] = "1x1 kernels on a shortcut"
        elif rates[name] == 1:
            left_alone[name] = "1x1 kernels that all stay"
        else:
            rules[name] = Rule(False, rates[name], 1)
    return rules, left_alone


class PCONV(ADMM):
    """Bring 3x3 kernels to a few fixed shapes and remove whole kernels, by ADMM during the fit.

    From `start_epoch` to `end_epoch` weights are pulled towards shapes and numbers of kernels; at `end_epoch` they are
    pruned hard, and the fit goes on with the zeros fixed. Learning rates that restart with every period, and again for
    the retraining, are :class:`~lightning_compress.core.schedules.AdmmStepLR`.

    Args:
        patterns: ``"scp4"``, ``"natural8"``, lists of the kept taps (0 to 8, row by row), or a tensor (P, 9).
        connectivity: how many times fewer kernels stay, 3.6 as in the paper; by glob for single layers; 1 for all.
        balance: ``"filter"`` keeps equally many kernels in every filter, ``"layer"`` the strongest of the layer.
        pattern_block: consecutive filters that share patterns and kernels, for a faster convolution. 4 is a good
            choice where speed counts; 1 is the paper.
        include_1x1: whether 1x1 convolutions lose kernels (single weights) too.
        connectivity_exclude: globs of layers that keep all kernels; the first convolution if None.
        warmup_epochs: at first, epochs that project anew each time and do not accumulate.
        start_epoch: first epoch of ADMM.
        end_epoch: first epoch of retraining with fixed zeros.

    `shared` are the arguments of :class:`~lightning_compress.core.sparse.admm.ADMM`: rho, rho_growth, every_n_epochs,
    include, exclude.

    3x3 convolutions take patterns, the first one too. 1x1 convolutions on a shortcut, other kernel sizes, grouped
    convolutions and linear layers stay dense; depthwise 3x3 convolutions take patterns only. The account lists them.

    What is stored: zeros in plain weights. At the end of the fit ``pconv.fkw`` is written beside the account, which
    counts its bytes; see `lightning_compress.core.sparse.formats`.

    With several processes equal weights lead to equal projections, which is checked; the masks are rank 0's.

    Example::

        from lightning_compress.callbacks import PCONV
        trainer = Trainer(max_epochs=400, callbacks=[PCONV(end_epoch=200)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/pconv``.
    """

    NAME = "pconv"
    IDENTITY = (
        *ADMM.IDENTITY, "patterns", "connectivity", "balance", "pattern_block", "include_1x1", "connectivity_exclude",
        "warmup_epochs", "start_epoch", "end_epoch",
    )  # fmt: skip

    def __init__(
        self,
        patterns: Literal["scp4", "natural8"] | list[list[int]] | Tensor = "scp4",
        connectivity: float | dict[str, float] = 3.6,
        *,
        balance: Literal["filter", "layer"] = "filter",
        pattern_block: int = 1,
        include_1x1: bool = True,
        connectivity_exclude: Sequence[str] | None = None,
        warmup_epochs: int = 0,
        start_epoch: int = 0,
        end_epoch: int = 200,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        name = type(self).__name__
        self.shapes = named_library(patterns)
        for rate in connectivity.values() if isinstance(connectivity, dict) else [connectivity]:
            if not rate >= 1:
                raise ValueError(f"{name}(connectivity={connectivity}): give how many times fewer kernels, 1 or more.")
        if balance not in ("filter", "layer"):
            raise ValueError(f"{name}(balance={balance!r}): give 'filter' or 'layer'.")
        if pattern_block < 1:
            raise ValueError(f"{name}(pattern_block={pattern_block}): give a whole number of at least 1.")
        if start_epoch < 0 or warmup_epochs < 0:
            raise ValueError(f"{name}: start_epoch={start_epoch} and warmup_epochs={warmup_epochs} must be >= 0.")
        self.patterns = patterns if isinstance(patterns, str) else taps_of(self.shapes).tolist()
        self.connectivity = connectivity
        self.balance: Balance = balance
        self.pattern_block = pattern_block
        self.include_1x1 = include_1x1
        self.connectivity_exclude = connectivity_exclude
        self.warmup_epochs = warmup_epochs
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.rules: dict[str, Rule] = {}

    def timeline(self) -> list[Phase]:
        return [
            Phase("ADMM", self.start_epoch, True, f"start_epoch={self.start_epoch}", self.warmup_epochs),
            Phase("retraining", self.end_epoch, False, f"end_epoch={self.end_epoch}"),
        ]

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        cost = profile(pl_module, find_example_input(trainer, pl_module))
        self.rules, self.left_alone = find_rules(
            pl_module,
            [layer.name for layer in cost.layers if layer.kind in ("conv", "linear")],
            self.connectivity,
            include=self.include,
            exclude=self.exclude,
            connectivity_exclude=self.connectivity_exclude,
            include_1x1=self.include_1x1,
            pattern_block=self.pattern_block,
        )
        return list(self.rules)

    def library_for(self, layer: str) -> Tensor:
        """The patterns of a 3x3 layer."""
        return self.shapes

    def problem(self, pl_module: LightningModule, phase: Phase) -> Problem:
        constraints: dict[str, dict[str, Any]] = {}
        for layer, rule in self.rules.items():
            own = constraints.setdefault(layer, {})
            if rule.patterns:
                own["pattern"] = partial(project_patterns, library=self.library_for(layer), block=rule.block)
            if rule.connectivity > 1:
                own["connectivity"] = partial(
                    project_connectivity, rate=rule.connectivity, balance=self.balance, block=rule.block
                )
        return constraints

    def hard_masks(self, pl_module: LightningModule, phase: Phase) -> dict[str, Tensor]:
        return {
            layer: kernel_mask(
                weight,
                self.library_for(layer) if self.rules[layer].patterns else None,
                self.rules[layer].connectivity,
                self.balance,
                self.rules[layer].block,
            )
            for layer, weight in self.weights(pl_module).items()
        }

    def packed(self, pl_module: LightningModule) -> dict[str, FKW]:
        """The pruned layers in FKW storage; none before the hard pruning."""
        found = {}
        for layer, rule in self.rules.items():
            name = self.parameter_name(pl_module, layer)
            mask = self.masks.get(name)
            if mask is not None:
                weight: Any = pl_module.get_submodule(layer).weight
                library = self.library_for(layer) if rule.patterns else POINT
                block = rule.block if share_kernels(mask, rule.block) else 1  # filters may have been removed since
                found[layer] = encode_fkw(weight, mask, library, block)
        return found

    def artefact(self, trainer: Trainer, pl_module: LightningModule) -> Artefact:
        """``<name>.fkw`` in the run's folder, the bytes of its layers, and the rates."""
        packed = self.packed(pl_module)
        if not packed:
            return {}, []
        costs = {n: self.packed_cost(pl_module.get_submodule(n), fkw.nbytes) for n, fkw in packed.items()}
        notes = [rates(pl_module, list(packed))]
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self.packed_path(trainer, ".fkw")
            size, index = save_fkw(path, packed), sum(fkw.index_bytes for fkw in packed.values())
            dense = sum(math.prod(fkw.shape) * fkw.weight.element_size() for fkw in packed.values())
            notes.append(
                f"{path.name}: {len(packed)} layers in {size:,} bytes (FKW), of them {index:,} of indices; "
                f"{dense:,} when dense."
            )
        return costs, notes


def to_pattern_model(
    network: nn.Module, packed: Mapping[str, FKW], mode: Literal["auto", "sparse", "dense"] = "auto"
) -> nn.Module:
    """A copy for inference, with the packed 3x3 layers as layers that multiply only what is kept.

    Args:
        network: the network that was pruned, or a fresh one with the other parameters loaded.
        packed: layers by name, of :meth:`PCONV.packed` or `load_fkw`; their weights are these.
        mode: see `ops.pattern_conv2d.PatternConv2d`; ``"auto"`` measures for each size of images which way is faster.

    Returns:
        The copy in eval mode. Layers that the operator does not compute (1x1, depthwise) hold zeros as before.
    """
    copied = inference_copy(network)
    for name, layer in packed.items():
        conv = copied.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        if is_suitable(conv):
            size = (conv.in_channels, conv.out_channels)
            sparse = PatternConv2d(NonZeros(*fkw_lists(layer)), conv.bias, *size, stride=conv.stride[0], mode=mode)
            copied.set_submodule(name, sparse.to(conv.weight.device))
        else:
            with torch.no_grad():
                conv.weight.copy_(decode_fkw(layer)[0])
    return copied


def rates(network: nn.Module, pruned: Sequence[str]) -> str:
    """How many times fewer weights are left in the pruned 3x3 layers, in all convolutions, in the whole network."""
    weights = {name: layer.weight for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    parts: dict[str, list[Tensor]] = {
        "pruned 3x3 convolutions": [w for name, w in weights.items() if name in pruned and w.shape[2:] == (3, 3)],
        "all convolutions": list(weights.values()),
        "all parameters": list(network.parameters()),
    }
    said = []
    for what, tensors in parts.items():
        total, left = sum(t.numel() for t in tensors), sum(int(t.count_nonzero()) for t in tensors)
        if left:
            said.append(f"{human(total)} → {human(left)} ({total / left:.2f}×) of {what}")
    return f"Non-zero weights: {', '.join(said)}."
