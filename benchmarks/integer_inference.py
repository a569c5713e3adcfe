"""Files of 8-bit integers against float32 ones and the eager network: ONNX Runtime, one image, one thread.

ResNet-18 has LSQ quantisers of 8 bits on all layers, with a step for each output channel of a weight. It is exported
twice: the exact file computes as the fake-quantised network does, and convolutions that end in a residual sum are in
floating point there; in the calibrated one their outputs have 8 bits, too. What is told beside it: 4 bits, DGMS
(weights alone are learnt, activations are calibrated), MobileNetV2, and EDSR with PAMS, enlarging 64 x 64 pixels.

Weights and images are random; speed does not depend on them. Eager is the faster of both memory formats.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from _alternate import Claim, best_times, machine, milliseconds, report, threads
from _latency import in_runtime
from torch import Tensor, nn

from lightning_compress import export
from lightning_compress.callbacks.quantization.dgms.initialisation import initial_mixture
from lightning_compress.callbacks.quantization.dgms.quantizer import MixtureQuantizer
from lightning_compress.callbacks.quantization.pams import place, quantize
from lightning_compress.core.quant.attach import quantize_input, quantize_weight
from lightning_compress.core.quant.layers import choose_quantized
from lightning_compress.core.quant.lsq import LSQInput, LSQWeight
from lightning_compress.core.quant.observe import observe_inputs
from lightning_compress.networks import edsr_baseline

REPEATS = 30


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 224, 224)
    resnet, mobilenet = (
        settled(build(), x) for build in (torchvision.models.resnet18, torchvision.models.mobilenet_v2)
    )
    yield from compare("ResNet-18, LSQ 8 bits", resnet, lsq(resnet, x, 8), x, promised=True)
    yield from compare("ResNet-18, LSQ 4 bits", resnet, lsq(resnet, x, 4), x)
    yield from compare("ResNet-18, DGMS 4 bits", resnet, dgms(resnet), x)
    yield from compare("MobileNetV2, LSQ 8 bits", mobilenet, lsq(mobilenet, x, 8), x)
    photographs = 255 * torch.rand(4, 3, 64, 64)
    edsr = edsr_baseline(2).eval()
    yield from compare("EDSR x2, PAMS 8 bits", edsr, pams(edsr, photographs), photographs)


def compare(what: str, plain: nn.Module, quantized: nn.Module, x: Tensor, promised: bool = False) -> Iterator[Claim]:
    """Times and bytes of files of a quantised network, against those of the one it was made of."""
    with tempfile.TemporaryDirectory() as folder, threads(1), torch.inference_mode():
        floats = export(plain, Path(folder) / "float32", x[:1], format="onnx")
        files = {
            "exact": export(quantized, Path(folder) / "exact", x[:1], format="int8"),
            "calibrated": export(quantized, Path(folder) / "calibrated", x[:1], format="int8", calibration=[x]),
        }
        last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        runs = [
            partial(plain, x[:1]),
            partial(last, x[:1].to(memory_format=torch.channels_last)),
            *(in_runtime(file, x[:1]) for file in (floats, *files.values())),
        ]
        best_times(3, *runs)  # warm up
        contiguous, channels_last, runtime, *times = best_times(REPEATS, *runs)
        eager = min(contiguous, channels_last)
        for (kind, file), seconds in zip(files.items(), times, strict=True):
            target = 1.4 if promised and kind == "calibrated" else None
            yield Claim(f"{what}, {kind}, against eager", eager / seconds, target, detail=milliseconds(eager, seconds))
            detail = milliseconds(runtime, seconds)
            yield Claim(f"{what}, {kind}, against a float32 file", runtime / seconds, detail=detail)
            detail = f"{floats.bytes / 1e6:.2f} against {file.bytes / 1e6:.2f} MB"
            yield Claim(f"{what}, {kind}: bytes", floats.bytes / file.bytes, 3.8 if promised else None, detail=detail)


def settled(network: nn.Module, x: Tensor) -> nn.Module:
    """The network in eval mode, with batch norms that have seen images."""
    with torch.no_grad():
        network.train()(x)
    return network.eval()


def lsq(network: nn.Module, x: Tensor, bits: int) -> nn.Module:
    """A copy with LSQ on all layers."""
    quantized: Any = copy.deepcopy(network)
    layers = {name: quantized.get_submodule(name) for name in choose_quantized(quantized)[0]}
    seen = observe_inputs(quantized, layers, [x])
    for name, layer in layers.items():
        quantize_weight(layer, LSQWeight(layer.weight, bits, per_channel=True))
        quantize_input(layer, LSQInput(bits, signed=seen[name].minimum < 0))
    observe_inputs(quantized, {name: layer.input_quantizer for name, layer in layers.items()}, [x])
    return quantized


def dgms(network: nn.Module) -> nn.Module:
    """A copy with mixtures of 16 on all convolutions but the first."""
    quantized: Any = copy.deepcopy(network)
    for name in choose_quantized(quantized, exclude_first=True, exclude_linear=True)[0]:
        layer = quantized.get_submodule(name)
        mixture = MixtureQuantizer(4)
        mixture.start(initial_mixture(layer.weight.detach().flatten(), 16))
        quantize_weight(layer, mixture)
    return quantized.eval()


def pams(network: nn.Module, x: Tensor) -> nn.Module:
    """A copy with PAMS, every quantised convolution of which gets codes."""
    quantized = copy.deepcopy(network)
    placement = place(quantized, quantize_block_input=True)
    quantize(quantized, **placement.arguments(), weight_bits=8, activation_bits=8, measuring={})
    with torch.no_grad():
        quantized.train()(x)
    return quantized.eval()


if __name__ == "__main__":
    print(machine())
    report(claims())
