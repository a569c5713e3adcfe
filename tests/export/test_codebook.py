"""ONNX with codebooks: exact, small, and refused where there is none."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from onnx import numpy_helper
from torch import nn

from lightning_compress import export
from lightning_compress.callbacks.quantization.dgms import initial_mixture
from lightning_compress.callbacks.quantization.dgms.quantizer import attach_mixtures, mixtures_in
from lightning_compress.export.onnx import run_onnx

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    for norm in (made[1], made[4], made[7]):  # something that could be folded into the weights
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return made.eval()


def quantised(bits, made=None):
    made = made or network()
    weights = {name: made.get_submodule(name).weight.detach().clone() for name in ("3", "6")}
    attach_mixtures(made, dict.fromkeys(weights, bits), 0.01, True, False)
    for name, mixture in mixtures_in(made).items():
        mixture.start(initial_mixture(weights[name], 2**bits))
    return made


def densified(path):
    """The same graph with the weights that its look-ups give."""
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    casts = {node.output[0]: constants[node.input[0]].astype(np.int32) for node in looked_up(model, "Cast")}
    for node in looked_up(model, "Gather"):
        weight = constants[node.input[0]][casts[node.input[1]]]
        model.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
    for kind in ("Cast", "Gather"):
        for node in looked_up(model, kind):
            model.graph.node.remove(node)
    onnx.save(model, path.with_name("dense.onnx"))
    return path.with_name("dense.onnx"), [t for t in model.graph.initializer if len(t.dims) == 4]


def looked_up(model, kind):
    return [node for node in model.graph.node if node.op_type == kind]


@pytest.mark.parametrize(("bits", "kind"), [(3, "UINT4"), (5, "UINT8")])
def test_equals_dense_weights_bit_for_bit(bits, kind, tmp_path):
    made = quantised(bits)
    exported = export(made, tmp_path / "book", X, format="codebook")
    assert str(exported).startswith(f"{tmp_path / 'book.onnx'} (ONNX, codebooks, ")
    assert exported.max_abs_difference < 1e-5
    stored = [t for t in onnx.load(exported.path).graph.initializer if len(t.dims) == 4]
    assert {onnx.TensorProto.DataType.Name(t.data_type) for t in stored} == {"FLOAT", kind}
    assert sum(len(t.raw_data) for t in stored if t.data_type != onnx.TensorProto.FLOAT) == (
        (16 * 32 + 32 * 8) * 9 // (2 if bits <= 4 else 1)
    )
    path, weights = densified(exported.path)
    by_shape = {tuple(t.dims): numpy_helper.to_array(t) for t in weights}
    for layer in (made[3], made[6]):
        assert np.array_equal(by_shape[tuple(layer.weight.shape)], layer.weight.detach().numpy())
    (found,), (dense,) = (run_onnx(p, (X,), {}) for p in (exported.path, path))
    assert torch.equal(found, dense)


def test_channels_of_zeros_go(tmp_path):
    plain = network()
    with torch.no_grad():
        for tensor in (plain[3].weight, plain[4].weight, plain[4].bias, plain[4].running_mean):
            tensor[:8] = 0
    exported = export(quantised(4, plain), tmp_path / "book.onnx", X, format="codebook")
    assert {tuple(t.dims) for t in onnx.load(exported.path).graph.initializer} >= {(24, 16, 3, 3), (8, 24, 3, 3)}


def test_a_network_without_codebooks_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="no layer of Sequential has a quantiser with a codebook"):
        export(network(), tmp_path / "book.onnx", X, format="codebook")
