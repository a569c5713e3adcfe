"""Binary networks for inference: their weights as bits, in memory and in a file.

    network = binary_network(module, example_input)      # computes with bits: `ops/binary_conv2d`
    save_packed(module, "network.bits", example_input)
    network = load_packed(resnet(), "network.bits")       # the same, from a file and a network as it was built

What real weights, rotations and codes have led to is one bit per weight. A filter's bits lie in the order of its
weights (C_in / groups, kh, kw), +1 is 1, the first is the lowest bit of the first byte, and every filter begins a byte.
Each filter keeps a scale and, where the batch norm behind it is folded in, a shift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from lightning_compress._version import __version__
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.quant.attach import quantize_input
from lightning_compress.core.quant.binary import SampleStandard, binary_layers, sample_mean, unbinarize
from lightning_compress.core.quant.norm_behind import norms_behind
from lightning_compress.core.select import did_you_mean
from lightning_compress.ops.binary_conv2d import BinaryConv2d, pack_rows, unpack_rows

FORMAT = "lightning_compress.packed"
Network = TypeVar("Network", bound=nn.Module)


def binary_network(module: nn.Module, example_input: Any = None) -> nn.Module:
    """A copy of a network for inference in which every layer of one-bit weights and inputs computes with bits.

    It gives what the module gives in eval mode, up to the rounding of the scales; without `example_input` bit for bit.

    Args:
        module: a network or LightningModule that was trained with `RBNN`, `SiMaN` or another method that attaches
            ``core/quant/binary.py``. It is not changed.
        example_input: a tensor, a shape, a tuple of arguments or a dict of keyword arguments. With it, a batch norm
            that reads a binary layer and nothing else becomes that layer's scale and shift.

    Raises:
        MisconfigurationException: the module has no layer of one-bit weights.
    """
    layers, norms = _describe(module, example_input)
    clone = inference_copy(module)
    unbinarize(clone, list(layers))
    return _assemble(clone, layers, norms)


def save_packed(module: nn.Module, path: str | Path, example_input: Any = None) -> Path:
    """Write a binary network as bits: see :func:`binary_network` for what it takes, :func:`load_packed` for its use.

    Everything else, such as the first and the last layer, is stored as it is.

    Returns:
        The path.

    Raises:
        MisconfigurationException: the module has no layer of one-bit weights.
    """
    layers, norms = _describe(module, example_input)
    clone = inference_copy(module).cpu()
    unbinarize(clone, list(layers))
    packed = {f"{name}.{key}" for name in layers for key in ("weight", "bias")}
    rest = {
        key: value
        for key, value in clone.state_dict().items()
        if isinstance(value, Tensor) and key not in packed and key.rpartition(".")[0] not in norms
    }
    content = {"format": FORMAT, "version": __version__, "layers": layers, "norms": norms, "rest": rest}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def load_packed(network: Network, path: str | Path) -> Network:
    """Turn a network, as its class builds it, into the one that a file of :func:`save_packed` holds.

    Args:
        network: of the class and the arguments of the one that was saved, with any weights. It is changed in place.
        path: the file.

    Returns:
        The network, in eval mode, with `BinaryConv2d` layers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut short or is another one; it is of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file at {str(path)!r}.")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise ValueError(
            f"path: {str(path)!r} is cut short, or is no packed network ({type(error).__name__})."
        ) from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ValueError(f"path: {str(path)!r} is no packed network; `save_packed` writes them.")
    convolutions = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    for name, layer in content["layers"].items():
        there = convolutions.get(name)
        if there is None:
            raise ValueError(
                f"network: {type(network).__name__} has no convolution {name!r}.{did_you_mean(name, convolutions)}"
            )
        if tuple(there.weight.shape) != tuple(layer["shape"]):
            raise ValueError(
                f"network: {name!r} has a weight of shape {tuple(there.weight.shape)}, in the file it is "
                f"{tuple(layer['shape'])}."
            )
    network = _assemble(network, content["layers"], content["norms"]).eval()
    missing, unexpected = network.load_state_dict(content["rest"], strict=False)
    own = {f"{name}.{key}" for name in content["layers"] for key in network.get_submodule(name).state_dict()}
    missing = [key for key in missing if key not in own]
    if missing or unexpected:
        raise ValueError(
            f"network: {type(network).__name__} is not the one that was saved: the file lacks {missing[:3]}, the "
            f"network has no {unexpected[:3]}."
        )
    return network


def with_portable_bits(program: ExportedProgram) -> ExportedProgram:
    """A captured program in which common operators unpack the bits: for ONNX, whose file keeps them packed."""
    operator = torch.ops.lightning_compress.binary_conv2d.default
    if all(node.target is not operator for node in program.graph.nodes):
        return program
    return program.run_decompositions({operator: _portable_conv2d})


def _portable_conv2d(
    x: Tensor, packed: Tensor, scale: Tensor, shift: Tensor | None, slope: Tensor | None, residual: Tensor | None,
    kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int, center: bool,
    zero_one: bool, hardtanh: bool,
) -> Tensor:  # fmt: skip
    """`binary_conv2d` without shifts of bits, which the ONNX exporter does not know: b_j = floor(byte / 2^j) mod 2."""
    channels = x.shape[1] // groups
    digits = torch.floor(packed.float()[:, :, None] / torch.exp2(torch.arange(8.0))).remainder(2)
    bits = digits.flatten(1)[:, : channels * kernel_size[0] * kernel_size[1]]
    weight = (bits if zero_one else 2 * bits - 1).reshape(packed.shape[0], channels, *kernel_size)
    signs = torch.where(x >= (sample_mean(x) if center else 0.0), 1.0, -1.0)
    y = F.conv2d(signs, weight, None, list(stride), list(padding), 1, groups) * scale.view(-1, 1, 1)
    if shift is not None:
        y = y + shift.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    if slope is not None:
        y = torch.where(y > 0, y, y * slope.view(-1, 1, 1))
    return y.clamp(-1, 1) if hardtanh else y


def packed_size(module: nn.Module) -> int:
    """Bytes of the bits of all `BinaryConv2d` layers of a network."""
    return sum(layer.packed.numel() for layer in module.modules() if isinstance(layer, BinaryConv2d))


@torch.no_grad()
def _describe(module: nn.Module, example_input: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every binary layer as plain data, and the norms that are folded into them."""
    clone = inference_copy(module).cpu()
    found = binary_layers(clone)
    if not found:
        raise MisconfigurationException(
            f"{type(module).__name__} has no layer of one-bit weights: train it with RBNN or SiMaN."
        )
    norms = {} if example_input is None else norms_behind(clone, list(found), example_input)
    layers = {}
    for name, layer in found.items():
        weight: Tensor = layer.weight  # of -1 and +1, or 0 and +1: the copy has its value
        scale = layer.output_scale.alpha.flatten().clone()  # type: ignore[union-attr, operator]
        shift = None if layer.bias is None else layer.bias * scale
        if name in norms:
            norm: Any = clone.get_submodule(norms[name])
            factor = (norm.running_var + norm.eps).rsqrt()
            factor = factor if norm.weight is None else factor * norm.weight
            moved = -norm.running_mean if shift is None else shift - norm.running_mean
            shift = moved * factor if norm.bias is None else moved * factor + norm.bias
            scale = scale * factor
        quantizer: Any = layer.input_quantizer
        layers[name] = {
            "packed": pack_rows(weight.flatten(1) > 0),
            "shape": tuple(weight.shape),
            "scale": scale,
            "shift": shift,
            "code": "01" if bool((weight == 0).any()) else "pm1",
            "activation_bits": quantizer.bits,
            "eps": quantizer.eps,
            "nu": quantizer.nu,
        }
    return layers, list(norms.values())


@torch.no_grad()
def _assemble(network: Network, layers: Mapping[str, Mapping[str, Any]], norms: list[str]) -> Network:
    """Put binary layers in the places of convolutions, and nothing in the places of norms."""
    for name, data in layers.items():
        layer: Any = network.get_submodule(name)
        made = _bits(layer, data) if data["activation_bits"] == 1 else _signs(layer, data)
        network.set_submodule(name, made.to(layer.weight.device).train(layer.training))
    for name in norms:
        network.set_submodule(name, nn.Identity())
    return network


def _bits(layer: Any, data: Mapping[str, Any]) -> BinaryConv2d:
    return BinaryConv2d(
        data["packed"], data["scale"], data["shift"], layer.in_channels, layer.out_channels, layer.kernel_size,
        layer.stride, layer.padding, layer.groups, center=True, code=data["code"],
    )  # fmt: skip


def _signs(layer: Any, data: Mapping[str, Any]) -> nn.Conv2d:
    """A convolution of real inputs, whose weights are signs times a scale."""
    bits = unpack_rows(data["packed"], layer.weight[0].numel()).float().view_as(layer.weight)
    made = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        groups=layer.groups, bias=data["shift"] is not None,
    )  # fmt: skip
    made.weight.copy_((bits if data["code"] == "01" else 2 * bits - 1) * data["scale"].view(-1, 1, 1, 1))
    if made.bias is not None:
        made.bias.copy_(data["shift"])
    quantize_input(made, SampleStandard(data["eps"], data["nu"]))
    return made
