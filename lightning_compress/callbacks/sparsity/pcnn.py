"""PCNN: 3x3 kernels that all keep n weights, in one of the few shapes that suit their layer, told by a short code.

Tan, Song, Ma et al., "PCNN: Pattern-based Fine-Grained Regular Pruning towards Optimizing CNN Accelerators", DAC 2020,
arXiv:2002.04997.

    F_n   all C(9, n) shapes of n taps: 9, 36, 84, 126 for n = 1 to 4
    p(j)  = argmax_{p in F_n} ||w_j o p||^2                the shape that kernel j votes for: its n largest weights
    P_n   = the V shapes with most votes, or most energy ||w_j o p||^2 of their own voters; or, greedily, V times the
            shape that raises sum_j max_{p in P_n} ||w_j o p||^2 most
    Z     = P(W + U),   P(w_j) = w_j o argmax_{p in P_n} ||w_j o p||^2        ADMM, then  W <- P(W), and retraining

Kernels of equal length need no pointers: a layer is stored as V masks, ceil(log2 V) bits per kernel and n weights per
kernel (SPM, sparsity pattern mask). With weights of b_w bits that is 9 b_w / (n b_w + ceil(log2 V)) times smaller, and
n of 9 multiplications are left, the same number for every kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks.sparsity.pattern_pruning import draw_patterns
from lightning_compress.callbacks.sparsity.pconv import find_rules, rates
from lightning_compress.core.example_input import find_example_input
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.profile import profile
from lightning_compress.core.select import match
from lightning_compress.core.sparse.admm import ADMM, Artefact, Phase, Problem
from lightning_compress.core.sparse.formats import SPM, decode_spm, encode_spm, save_spm
from lightning_compress.core.sparse.patterns import (
    all_patterns,
    best_patterns,
    count_votes,
    kernel_mask,
    most_frequent,
    pattern_energies,
    project_patterns,
)
from lightning_compress.ops.pattern_conv2d import PatternConv2d
from lightning_compress.ops.pattern_conv2d.layer import is_suitable

Distillation = Literal["votes", "energy", "greedy"]


# ---- which shapes


def distil(weight: Tensor, n: int, size: int, how: Distillation = "votes") -> Tensor:
    """Choose the shapes of a layer.

    Args:
        weight: (C_out, C_in, 3, 3).
        n: weights that every kernel keeps.
        size: V, how many shapes; all C(9, n) if there are no more.
        how: by ``"votes"``, by the ``"energy"`` of the voters, or ``"greedy"`` by the energy that the library keeps as
            a whole. Equals go to the shape that is first in lexicographic order.

    Returns:
        Library (min(V, C(9, n)), 9), in lexicographic order of the taps.
    """
    candidates = all_patterns(n)
    if how == "votes":
        return most_frequent(candidates, count_votes([weight], candidates), size)
    energies = pattern_energies(weight, candidates).flatten(1).double()  # (shapes, kernels)
    if how == "energy":
        kept, chosen = energies.max(0)
        value = torch.zeros(len(candidates), dtype=torch.float64, device=weight.device)
        return most_frequent(candidates, value.index_add_(0, chosen, kept).cpu(), size)
    covered = torch.zeros_like(energies[0])
    order = torch.zeros(len(candidates))
    for rank in range(min(size, len(candidates)), 0, -1):
        value = torch.maximum(energies, covered).sum(1).cpu().masked_fill_(order > 0, -1)
        best = int(value.max(0).indices)
        covered = torch.maximum(covered, energies[best])
        order[best] = rank
    return most_frequent(candidates, order, size)


def compression(n: int, patterns: int, bits: int = 32) -> tuple[float, float]:
    """How many times smaller a layer is: its weights alone, and with the codes of its kernels.

    >>> [round(rate, 3) for rate in compression(4, 16)]
    [2.25, 2.182]
    """
    code = (patterns - 1).bit_length()
    return 9 / n, 9 * bits / (n * bits + code)


# ---- a layer that is stored packed


class SPMConv2d(nn.Module):
    """A 3x3 convolution whose `state_dict` holds masks, codes and kept weights; unpacked when it is built and loaded.

    Args:
        packed: the weights.
        conv: the convolution that it stands for, whose stride, padding, dilation, groups and bias it takes.
    """

    table: Tensor
    codes: Tensor
    kept: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, packed: SPM, conv: nn.Conv2d) -> None:
        super().__init__()
        self.shape, self.n, self.scale = packed.shape, packed.n, packed.scale
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._around = conv._reversed_padding_repeated_twice
        self.register_buffer("table", packed.table)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("kept", packed.weight)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self.register_buffer("weight", decode_spm(packed)[0].to(conv.weight.dtype), persistent=False)
        self.register_load_state_dict_post_hook(_unpack_again)

    @property
    def packed(self) -> SPM:
        table, codes, kept = (buffer.cpu() for buffer in (self.table, self.codes, self.kept))
        return SPM(self.shape, self.n, table, codes, kept, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """What the pruned convolution computes."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._around, mode=self.padding_mode), 0
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def get_extra_state(self) -> float:
        return self.scale

    def set_extra_state(self, state: float) -> None:
        self.scale = state

    def extra_repr(self) -> str:
        filters, channels = self.shape[:2]
        return f"{channels * self.groups}, {filters}, n={self.n}, patterns={len(self.table)}, stride={self.stride}"


def _unpack_again(module: SPMConv2d, incompatible_keys: Any) -> None:
    with torch.no_grad():
        module.weight.copy_(decode_spm(module.packed)[0])


def to_spm_model(
    network: nn.Module, packed: Mapping[str, SPM], mode: Literal["packed", "auto", "sparse"] = "packed"
) -> nn.Module:
    """A copy for inference whose pruned layers are stored packed, or multiply only what is kept.

    Args:
        network: the network that was pruned, or a fresh one with the other parameters loaded.
        packed: layers by name, of :meth:`PCNN.packed` or `load_spm`; their weights are these.
        mode: ``"packed"`` makes :class:`SPMConv2d`, whose `state_dict` is small; ``"sparse"`` and ``"auto"`` make
            `ops.pattern_conv2d.PatternConv2d`, where that operator computes such a layer.

    Returns:
        The copy in eval mode.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("packed", "auto", "sparse"):
        raise ValueError(f"mode={mode!r}: give 'packed', 'auto' or 'sparse'.")
    copied = inference_copy(network)
    for name, layer in packed.items():
        conv = copied.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        with torch.no_grad():
            conv.weight.copy_(decode_spm(layer)[0])
        if mode == "packed":
            copied.set_submodule(name, SPMConv2d(layer, conv).to(conv.weight.device))
        elif is_suitable(conv):
            copied.set_submodule(name, PatternConv2d.from_conv(conv, mode=mode))
    return copied


# ---- the callback


class PCNN(ADMM):
    """Bring 3x3 kernels to n weights each, in few shapes per layer, by ADMM during the fit.

    At `start_epoch` each layer chooses its shapes by its weights; from then to `end_epoch` kernels are pulled towards
    them; at `end_epoch` they are pruned hard, and the fit goes on with the zeros fixed.

    Args:
        n: weights that every kernel keeps, 1 to 9; by glob of layer names for single layers (later globs win), where
            layers without one stay dense. Few kernels read the image: let the first layer keep more.
        num_patterns: V, shapes in a layer, or by glob; all where no glob matches. A power of two uses every code.
        distill: what chooses them: ``"votes"``, one per kernel; ``"energy"`` of the voters; or ``"greedy"``, the energy
            that the library keeps as a whole.
        progressive: numbers for n to go down by, such as ``(4, 3, 2, 1)``; the last is `n`, or the smallest of them,
            and a layer stops at its own. The epochs from `start_epoch` to `end_epoch` are divided equally: ADMM for the
            first number, retraining, ADMM for the second with all weights free and new shapes, and so on; the last
            retraining begins at `end_epoch`.
        int8: whether ``pcnn.spm`` holds weights rounded to 8 bits; those of the module stay as they are.
        start_epoch: first epoch of ADMM.
        end_epoch: first epoch of retraining with fixed zeros.

    `shared` are the arguments of :class:`~lightning_compress.core.sparse.admm.ADMM`: rho, rho_growth, every_n_epochs,
    include, exclude.

    1x1 and other kernel sizes, convolutions in groups that are not depthwise, and linear layers stay dense; the account
    lists them.

    What is stored: zeros in plain weights. At the end of the fit ``pcnn.spm`` is written beside the account, which
    counts its bytes; see `lightning_compress.core.sparse.formats`. Pictures of all shapes, and of those of each layer,
    lie beside it.

    With several processes shapes and masks are rank 0's.

    Example::

        from lightning_compress.callbacks import PCNN
        trainer = Trainer(max_epochs=400, callbacks=[PCNN(n=4, num_patterns=16, end_epoch=200)])
        trainer.fit(module, datamodule)

    Packaged config: ``method/pcnn``.
    """

    NAME = "pcnn"
    IDENTITY = (*ADMM.IDENTITY, "n", "num_patterns", "distill", "progressive", "int8", "start_epoch", "end_epoch")

    def __init__(
        self,
        n: int | dict[str, int] = 4,
        num_patterns: int | dict[str, int] = 16,
        *,
        distill: Distillation = "votes",
        progressive: Sequence[int] | None = None,
        int8: bool = False,
        start_epoch: int = 0,
        end_epoch: int = 200,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        numbers = list(n.values()) if isinstance(n, dict) else [n]
        if not numbers or not all(1 <= number <= 9 for number in numbers):
            raise ValueError(f"PCNN(n={n}): a 3x3 kernel keeps 1 to 9 weights.")
        if min(num_patterns.values(), default=0) < 1 if isinstance(num_patterns, dict) else num_patterns < 1:
            raise ValueError(f"PCNN(num_patterns={num_patterns}): give at least 1.")
        if distill not in get_args(Distillation):
            raise ValueError(f"PCNN(distill={distill!r}): give {', '.join(map(repr, get_args(Distillation)))}.")
        steps = None if progressive is None else list(progressive)
        if steps is not None and (not steps or steps != sorted(set(steps), reverse=True) or steps[-1] != min(numbers)):
            raise ValueError(
                f"PCNN(progressive={steps}, n={n}): give numbers that fall, the last of which is {min(numbers)}."
            )
        if steps and steps[0] > 9:
            raise ValueError(f"PCNN(progressive={steps}): a 3x3 kernel keeps 1 to 9 weights.")
        if start_epoch < 0:
            raise ValueError(f"PCNN(start_epoch={start_epoch}): give 0 or a later epoch.")
        self.n = n
        self.num_patterns = num_patterns
        self.distill: Distillation = distill
        self.progressive = steps
        self.int8 = int8
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self._kept: dict[str, int] = {}  # layer -> its n
        self._sizes: dict[str, int] = {}  # layer -> its V

    def _forget(self) -> None:
        super()._forget()
        self.libraries: dict[str, Tensor] = {}

    @property
    def _rounds(self) -> list[int]:
        """What n must not fall below, round by round."""
        return self.progressive or [1]

    def timeline(self) -> list[Phase]:
        pieces, span = 2 * len(self._rounds) - 1, self.end_epoch - self.start_epoch
        phases = []
        for i in range(pieces + 1):
            name = "retraining" if i % 2 else "ADMM"
            argument = f"start_epoch={self.start_epoch}" if i == 0 else f"end_epoch={self.end_epoch}"
            name += f" with n={self._rounds[i // 2]}" if self.progressive else ""
            phases.append(Phase(name, self.start_epoch + span * i // pieces, i % 2 == 0, argument))
        return phases

    def find_layers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        cost = profile(pl_module, find_example_input(trainer, pl_module))
        order = [layer.name for layer in cost.layers if layer.kind in ("conv", "linear")]
        rules, self.left_alone = find_rules(
            pl_module, order, 1.0, include=self.include, exclude=self.exclude, include_1x1=False
        )
        self._kept = _by_layer(self.n, list(rules), "n")
        self._sizes = _by_layer(self.num_patterns, list(rules), "num_patterns")
        self.left_alone.update({layer: "no glob of n matches it" for layer in rules if layer not in self._kept})
        return list(self._kept)

    def enter(self, trainer: Trainer, pl_module: LightningModule, phase: Phase) -> None:
        if phase.admm:
            least = self._rounds[self.timeline().index(phase) // 2]
            libraries = {}
            for layer, weight in self.weights(pl_module).items():
                n = max(self._kept[layer], least)
                libraries[layer] = distil(weight, n, self._sizes.get(layer, math.comb(9, n)), self.distill)
            self.libraries = trainer.strategy.broadcast(libraries)
        super().enter(trainer, pl_module, phase)

    def problem(self, pl_module: LightningModule, phase: Phase) -> Problem:
        return {layer: {"pattern": partial(project_patterns, library=self.libraries[layer])} for layer in self.layers}

    def hard_masks(self, pl_module: LightningModule, phase: Phase) -> dict[str, Tensor]:
        return {layer: kernel_mask(weight, self.libraries[layer]) for layer, weight in self.weights(pl_module).items()}

    def own_state(self) -> dict[str, Any]:
        return {"libraries": dict(self.libraries)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.libraries = dict(state["libraries"])

    def packed(self, pl_module: LightningModule) -> dict[str, SPM]:
        """The pruned layers in SPM storage; none before the hard pruning."""
        found = {}
        for layer in self.layers:
            mask = self.masks.get(self.parameter_name(pl_module, layer))
            if mask is not None:
                weight: Any = pl_module.get_submodule(layer).weight
                found[layer] = encode_spm(weight, mask, int8=self.int8)
        return found

    def artefact(self, trainer: Trainer, pl_module: LightningModule) -> Artefact:
        """``pcnn.spm`` in the run's folder, the bytes of its layers, and the rates with and without codes."""
        packed = self.packed(pl_module)
        if not packed:
            return {}, []
        costs = {n: self.packed_cost(pl_module.get_submodule(n), spm.nbytes) for n, spm in packed.items()}
        dense = sum(math.prod(spm.shape) * spm.weight.element_size() for spm in packed.values())
        weights = sum(spm.weight.nbytes for spm in packed.values())
        index = sum(spm.index_bytes for spm in packed.values())
        notes = [
            rates(pl_module, list(packed)),
            f"Kernels keep {_spread([spm.n for spm in packed.values()])} of 9 weights, in up to "
            f"{max(len(spm.table) for spm in packed.values())} shapes per layer: {dense / weights:.2f}× fewer bytes of "
            f"weights, {dense / (weights + index):.2f}× with the codes; the ideal speed-up is the first.",
        ]
        ids = {layer: best_patterns(decode_spm(packed[layer])[0], self.libraries[layer].cpu()) for layer in packed}
        draw_patterns(trainer, f"{self.NAME}/library", ids, self.libraries)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self.packed_path(trainer, ".spm")
            size = save_spm(path, packed)
            rounded = ", weights rounded to 8 bits" if self.int8 else ""
            notes.append(
                f"{path.name}: {len(packed)} layers in {size:,} bytes (SPM{rounded}), of them {index:,} of codes."
            )
        return costs, notes


def _by_layer(value: int | Mapping[str, int], layers: Sequence[str], argument: str) -> dict[str, int]:
    """A number for each layer, or for those that a glob matches; later globs win. In the order of the layers."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(layers, value)
    found: dict[str, int] = {}
    for glob, number in value.items():
        found.update(dict.fromkeys(match(layers, [glob], argument), number))
    return {layer: found[layer] for layer in layers if layer in found}


def _spread(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
