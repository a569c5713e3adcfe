"""A network that skips what an image does not select against the dense one, one image at a time.

Controllers with random weights, their biases set so that every filter is selected by half of 32 random images: other
filters for other images, a density of 0.5 in every layer. What skips is first compared with what masks. Both networks
see the same four images in turns. Also told, without a promise: the same against the dense network with its batch norms
folded into the convolutions, which is faster than what one has after training; and what selecting costs, with all
filters selected.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torchvision.models import resnet18

from lightning_compress.callbacks.pruning.architecture_decoupling import dynamic_copy, gates_of
from lightning_compress.callbacks.pruning.architecture_decoupling.gates import attach_gates
from lightning_compress.callbacks.pruning.architecture_decoupling.paths import masks_of
from lightning_compress.callbacks.pruning.architecture_decoupling.units import trace_units
from lightning_compress.networks import googlenet_cifar, resnet56, vgg19_cifar

NETWORKS: dict[str, tuple[Any, tuple[int, ...], float | None]] = {
    "ResNet-56": (resnet56, (1, 3, 32, 32), 1.3),
    "VGG-19": (vgg19_cifar, (1, 3, 32, 32), 1.3),
    "GoogLeNet": (googlenet_cifar, (1, 3, 32, 32), None),
    "ResNet-18 ImageNet": (resnet18, (1, 3, 224, 224), None),
}
IMAGES, TIMED, REPEATS = 32, 4, 12


def half_gated(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy with gates of which each image selects about a half."""
    structure = trace_units(network, images[:1])
    units = {name: asdict(unit) for name, unit in structure.units.items() if name != structure.stem}
    gated = copy.deepcopy(network)
    attach_gates(gated, units, 10, 4, "sample", "kaiming", 0)
    handles = []
    for name, gate in gates_of(gated).items():

        def centre(module: nn.Module, args: tuple[Tensor], gate: Any = gate) -> None:
            logits = F.relu(gate.reduce(args[0].mean((2, 3)))) @ gate.expand.weight.T
            gate.expand.bias.copy_(-logits.quantile(0.5, 0))

        handles.append(gated.get_submodule(units[name]["source"]).register_forward_pre_hook(centre, prepend=True))
    gated(images)
    for handle in handles:
        handle.remove()
    return gated


def random_norms(network: nn.Module) -> None:
    """Statistics that are not those of the initialisation, which would make folding exact and features fade."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)


def run_all(network: nn.Module, images: Sequence[Tensor]) -> None:
    for image in images:
        network(image)


@torch.no_grad()
def claims() -> Iterator[Claim]:
    for name, (make, shape, target) in NETWORKS.items():
        torch.manual_seed(0)
        network = make().eval()
        random_norms(network)
        images = torch.randn(IMAGES, *shape[1:])
        gated = half_gated(network, images)
        density = statistics.mean(mask.float().mean().item() for mask in masks_of(gated, images).values())
        open_ = copy.deepcopy(gated)
        for gate in gates_of(open_).values():
            nn.init.constant_(gate.expand.bias, 1e9)
        skips, skips_nothing, folded = dynamic_copy(gated, images[:1]), dynamic_copy(open_, images[:1]), fuse(network)
        few = images[:TIMED].split(1)
        with torch.inference_mode():
            expected = gated(images)
            close = [
                (skips(image) - wanted).abs().max() <= 1e-5 * expected.abs().max()
                for image, wanted in zip(images.split(1), expected.split(1), strict=True)
            ]
            # A logit that rounds to the other side of 0 selects another filter.
            assert sum(close) >= 0.9 * IMAGES, f"{name}: skipping and masking differ"
            runs = [partial(run_all, net, few) for net in (network, skips, folded, skips_nothing)]
            for count in (1, 2):
                with threads(count):
                    dense, ours, fused, all_selected = (t / TIMED for t in best_times(REPEATS, *runs))
                where = f"{count} thread{'s' * (count > 1)}, density {density:.2f}"
                yield Claim(
                    f"{name}: dense / skipping, {where}", dense / ours, target, detail=milliseconds(dense, ours)
                )
                yield Claim(f"{name}: dense with folded norms / skipping, {where}", fused / ours)
                yield Claim(
                    f"{name}: skipping nothing / folded, {count} thread{'s' * (count > 1)}", all_selected / fused
                )


if __name__ == "__main__":
    print(machine())
    report(claims())
