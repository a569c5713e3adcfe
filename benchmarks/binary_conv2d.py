"""`binary_conv2d` against PyTorch's float convolution, on the 3x3 layers of ResNet-18; then ResNet-18 as a whole.

One thread, batch 1, float32 inputs and outputs; the float convolution is the faster of contiguous and channels-last.
In the time of the binary ones is everything from floats to floats: the sample's mean, the signs, the packing, the sums,
the scale. Each time it is measured twice: right after a float convolution, whose weights have driven everything else
out of the caches, and once more. "Inner product alone" is the part between packed bits and sums. Code for AVX2 is
measured where that for this processor can do more, against the same float convolution, which uses AVX-512 if it can.

The binary ResNet-18 is that of RBNN: real stem, real 1x1 shortcuts, Hardtanh, a shortcut around each of 16 binary
convolutions; its batch norms, additions and Hardtanhs are fused (`fuse`). Against it stands torchvision's ResNet-18,
the faster of contiguous and channels-last, in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from _alternate import Claim, best_times, geometric_mean, machine, milliseconds, report, threads
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from lightning_compress.networks.binary_resnet import binary_resnet18
from lightning_compress.ops.binary_conv2d import BinaryConv2d, fuse, operator

LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, map
REPEATS = 40
KINDS = {16: "AVX-512 VPOPCNTDQ", 8: "AVX2", 4: "no vectors"}
TARGETS = {16: (8.0, 15.0), 8: (3.0, 4.0), 4: (None, None)}  # of the layer, of the inner product


def claims() -> Iterator[Claim]:
    with threads(1), torch.inference_mode():
        tried: list[int] = []
        for target in ("native", "avx2"):
            code = operator.compiled_code(target)
            if code is not None and code.binary_conv2d_lanes() not in tried:
                tried.append(code.binary_conv2d_lanes())
                yield from of_layers(target, tried[-1])
        yield from of_resnet()


def of_layers(target: str, lanes: int) -> Iterator[Claim]:
    code = operator.compiled_code(target)
    assert code is not None
    rows = []
    for channels, size in LAYERS:
        x = torch.randn(1, channels, size, size)
        conv = BinaryConv2d.from_signs(2.0 * torch.randint(2, (channels, channels, 3, 3)) - 1, padding=1)
        weight = conv.weight
        sizes = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
        plan = operator.Plan(code, x, conv.packed, *sizes, False)
        after = (conv.scale, None, None, None)
        binary = partial(operator.run_compiled, code, x, conv.packed, *after, *sizes, zero_one=False, hardtanh=False)
        last = [t.to(memory_format=torch.channels_last) for t in (x, weight)]
        assert torch.equal(binary(center=False), F.conv2d(torch.where(x >= 0, 1.0, -1.0), weight, None, 1, 1))
        *ours, plain, other = best_times(
            REPEATS,
            partial(binary, center=True),
            partial(binary, center=True),
            partial(binary, center=False),
            partial(code.binary_conv2d_multiply, plan.handle),
            partial(F.conv2d, x, weight, None, 1, 1),
            partial(F.conv2d, *last, None, 1, 1),
        )
        rows.append([*ours, min(plain, other)])
    whole, inner = TARGETS[lanes]
    for i, (what, goal) in enumerate(
        (
            ("from floats to floats", whole),
            ("the same once more", None),
            ("the same without the mean", None),
            ("inner product alone", inner),
        )
    ):
        shown = ", ".join(
            f"{c}@{s} {1e6 * row[i]:.0f} against {1e6 * row[-1]:.0f}" for (c, s), row in zip(LAYERS, rows, strict=True)
        )
        ratio = geometric_mean(row[-1] / row[i] for row in rows)
        yield Claim(f"{KINDS[lanes]}: float / binary convolution, {what}", ratio, goal, detail=f"{shown} us")


def binary_resnet() -> nn.Module:
    """RBNN's ResNet-18 with random signs, its batch norms not yet folded."""
    torch.manual_seed(0)
    net = binary_resnet18().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            assert module.running_mean is not None
            module.running_mean.normal_()
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            signs = torch.where(module.weight >= 0, 1.0, -1.0)
            alpha = module.weight.abs().mean((1, 2, 3))
            made = BinaryConv2d.from_signs(signs, alpha, stride=module.stride, padding=module.padding, center=True)  # type: ignore[arg-type]
            net.set_submodule(name, made)
    return net


def of_resnet() -> Iterator[Claim]:
    x = torch.randn(1, 3, 224, 224)
    net = binary_resnet()
    small = fuse(net, x)
    dense, last = resnet18().eval(), resnet18().eval().to(memory_format=torch.channels_last)
    y = net(x)
    assert (small(x) - y).abs().max() <= 1e-4 * y.abs().max()
    images = x.to(memory_format=torch.channels_last)
    ours, unfused, plain, other = best_times(
        REPEATS, lambda: small(x), lambda: net(x), lambda: dense(x), lambda: last(images)
    )
    yield Claim("ResNet-18, batch 1: float / binary, fused", min(plain, other) / ours, 4.0,
                detail=milliseconds(ours, min(plain, other)))  # fmt: skip
    yield Claim("ResNet-18, batch 1: float / binary, as it is", min(plain, other) / unfused,
                detail=milliseconds(unfused, min(plain, other)))  # fmt: skip


if __name__ == "__main__":
    print(machine())
    report(claims())
