"""`pattern_conv2d` against PyTorch's dense convolution, on the 3x3 layers of VGG-16 and ResNet-18.

Every kernel that is left keeps 4 of 9 weights in one of eight shapes: 2.25x fewer weights. With 1 of 3.6 kernels left,
8.1x fewer. K filters share shapes and kernels (`pattern_block`). The dense one is the faster of contiguous and
channels-last. Padding of the input and cropping of the output are in the time; batch 1, float32. Random weights. A
layer is called three times in its turn, so that the last calls find in the caches what they left there.

Then VGG-16 as a whole at 224x224, 8.1x fewer weights in all convolutions but the first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _alternate import Claim, best_times, geometric_mean, machine, milliseconds, report, threads
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.networks import build
from lightning_compress.ops.pattern_conv2d import PatternConv2d, non_zeros, to_pattern_layers

LAYERS = ((64, 56), (128, 28), (256, 14), (512, 14), (512, 7), (64, 224), (128, 112), (256, 56))  # channels, map
PATTERNS = ("4578", "0134", "3467", "1245", "3678", "0123", "0125", "5678")
REPEATS = 15
TARGETS = {("8.1x", 1): 3.0, ("8.1x", 8): 5.5, ("2.25x", 1): 1.0, ("2.25x", 8): 2.0}


def pruned(weight: Tensor, rate: float, block: int, seed: int = 0) -> Tensor:
    """Random patterns, and 1 of `rate` kernels of every block of filters."""
    generator = torch.Generator().manual_seed(seed)
    filters, channels = weight.shape[:2]
    patterns = torch.zeros(len(PATTERNS), 9)
    for row, taps in zip(patterns, PATTERNS, strict=True):
        row[[int(t) for t in taps]] = 1
    mask = patterns[torch.randint(len(PATTERNS), (filters // block, channels), generator=generator)]
    kept = torch.rand(filters // block, channels, generator=generator).argsort(1) < -(-channels // rate)
    mask = (mask * kept[..., None]).repeat_interleave(block, 0)
    return weight * mask.view_as(weight)


def claims() -> Iterator[Claim]:
    for count in (1, 2):
        with threads(count), torch.inference_mode():
            yield from of_layers(count)
            yield from of_vgg(count)


def of_layers(count: int) -> Iterator[Claim]:
    for what, rate in (("8.1x", 3.6), ("2.25x", 1.0)):
        for block in (1, 2, 4, 8):
            ratios = []
            for channels, size in LAYERS:
                x = torch.randn(1, channels, size, size)
                weight = pruned(torch.randn(channels, channels, 3, 3), rate, block)
                conv = PatternConv2d(non_zeros(weight, block), None, channels, channels, mode="sparse")
                assert torch.allclose(conv(x), F.conv2d(x, weight, None, 1, 1), atol=1e-3, rtol=1e-4)
                last = [t.to(memory_format=torch.channels_last) for t in (x, weight)]
                ours, plain, other = best_times(
                    REPEATS,
                    lambda conv=conv, x=x: conv(x),
                    lambda x=x, w=weight: F.conv2d(x, w, None, 1, 1),
                    lambda last=last: F.conv2d(*last, None, 1, 1),
                    calls=3,
                )
                ratios.append(min(plain, other) / ours)
            shown = ", ".join(f"{c}@{s} {r:.2f}" for (c, s), r in zip(LAYERS, ratios, strict=True))
            name = f"{count} thread{'s' * (count > 1)}: dense / pattern convolution, {what} fewer weights, K={block}"
            yield Claim(name, geometric_mean(ratios), TARGETS.get((what, block)), detail=shown)


def of_vgg(count: int) -> Iterator[Claim]:
    torch.manual_seed(0)
    dense = build("vgg16").eval()
    x = torch.randn(1, 3, 224, 224)
    for block in (1, 8):
        convs = [m for m in dense.modules() if isinstance(m, torch.nn.Conv2d)][1:]
        kept = [conv.weight.clone() for conv in convs]
        for conv in convs:
            conv.weight.copy_(pruned(conv.weight, 3.6, block))
        small = to_pattern_layers(dense, block)
        assert torch.allclose(small(x), dense(x), atol=1e-3, rtol=1e-3)
        ours, theirs = best_times(5, lambda small=small: small(x), lambda: dense(x))
        name = f"{count} thread{'s' * (count > 1)}: VGG-16 at 224x224, dense / 8.1x fewer weights, K={block}"
        yield Claim(name, theirs / ours, detail=milliseconds(ours, theirs))
        for conv, weight in zip(convs, kept, strict=True):
            conv.weight.copy_(weight)


if __name__ == "__main__":
    print(machine())
    report(claims())
