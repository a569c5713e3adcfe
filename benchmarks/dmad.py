"""What DMAD costs while it searches, and how much faster a pruned generator is.

    python benchmarks/dmad.py

The pruned generators have about 4 GMACs, as the paper's for horse2zebra, and 1.7, as papers on translation count them.
What is felt of the MACs that are saved is promised for the first as a file in ONNX Runtime. Of the narrower one nothing
is promised: such layers keep a CPU less busy, and norms and paddings are saved by the ratio of widths alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from _latency import felt
from torch import nn

from lightning_compress.callbacks.pruning.dmad.layout import layout_of
from lightning_compress.callbacks.pruning.dmad.removal import alive, attach_masks, masks_of, survivors
from lightning_compress.core.profile import profile
from lightning_compress.networks import ResNetGenerator

WIDTHS = ((32, 48, 64, *[48] * 9, 48, 32), (16, 24, 48, *[24] * 9, 32, 16))


def latency() -> Iterator[Claim]:
    pruned = {f"{w[0]}, {w[1]}, {w[2]} ...": ResNetGenerator(widths=w).eval() for w in WIDTHS}
    target = {next(iter(pruned)): 0.7}
    yield from felt("ResNet generator", ResNetGenerator().eval(), pruned, torch.zeros(1, 3, 256, 256), target)


def search() -> Iterator[Claim]:
    image = torch.rand(1, 3, 128, 128) * 2 - 1
    plain, masked = ResNetGenerator(ngf=32), ResNetGenerator(ngf=32)
    layout = layout_of(masked, "ab")
    attach_masks(masked, [(site.at, layout.channels[site.conv.writes]) for site in layout.sites], 0)

    def step(generator: nn.Module) -> None:
        generator.zero_grad()
        generator(image).square().mean().backward()

    with_masks, without = best_times(8, partial(step, masked), partial(step, plain))
    yield Claim("a step of the generator, with masks", with_masks / without, detail=milliseconds(with_masks, without))

    def closed_form() -> float:
        weights = [mask.weight.detach() for mask in masks_of(masked, layout)]
        return layout.macs(survivors(layout, alive(layout, weights, 0.0)), 256**2)

    def built() -> float:
        with torch.device("meta"):
            generator = ResNetGenerator(ngf=32)
        return profile(generator, (1, 3, 256, 256), convention="gan").cost

    own, other = best_times(5, closed_form, built)
    what = "MACs of what survives: a generator that is built and profiled against the closed form"
    yield Claim(what, other / own, detail=milliseconds(other, own))


def claims() -> Iterator[Claim]:
    with threads(1):
        yield from latency()
        yield from search()


if __name__ == "__main__":
    print(machine())
    report(claims())
