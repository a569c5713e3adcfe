"""Networks whose weights are codebooks, in ONNX: indices of few bits, looked up where a layer reads its weight.

    indices (uint4 or uint8)  ->  Cast  ->  Gather(values)  ->  Conv

Nothing is rounded, and batch norms stay beside their convolutions: folded into weights, they would give every output
channel values of its own. Engines look the weights up once, when they load the file, so that it is small and as fast as
with floating-point weights.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress.core.parametrisation import parametrise
from lightning_compress.core.quant.codebook import Codebook, codebooks_of
from lightning_compress.export.integer_trace import DOMAIN

if TYPE_CHECKING:
    from onnx_ir import Model

LOOK_UP = "LookUp"
_OPSET = 21  # the first with numbers of 4 bits


class TracedCodebook(nn.Module):
    """A weight as an operator of its values (K,) and its indices, of its shape; exists in traces only."""

    values: Tensor
    indices: Tensor

    def __init__(self, book: Codebook, weight: Tensor) -> None:
        super().__init__()
        ascending, order = book.values.sort()
        indices = order[torch.searchsorted(ascending, weight.detach().float()).clamp(max=len(order) - 1)]
        assert torch.equal(book.values[indices], weight.float())  # also where channels have gone
        self.bits = book.bits
        self.register_buffer("values", book.values)
        self.register_buffer("indices", indices.to(torch.uint8))

    def forward(self, weight: Tensor) -> Tensor:
        shape = self.indices.shape
        attributes: dict[str, Any] = {"bits": self.bits}
        operands = (self.values, self.indices)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{LOOK_UP}", operands, attributes, dtype=torch.float32, shape=shape, version=1
        )


def traced_with_codebooks(module: nn.Module, clone: nn.Module) -> nn.Module:
    """A copy of a network whose codebooks are traced as operators.

    Args:
        module: the network with its quantisers.
        clone: its ``inference_copy``, which may have lost channels of zeros; not changed.

    Raises:
        MisconfigurationException: no layer has a codebook.
    """
    books = codebooks_of(module)
    if not books:
        raise MisconfigurationException(
            f"format='codebook': no layer of {type(module).__name__} has a quantiser with a codebook, as DGMS "
            f"attaches them."
        )
    traced = copy.deepcopy(clone)
    for name, book in books.items():
        layer = traced.get_submodule(name.replace("_orig_mod.", ""))
        parametrise(layer, "weight", TracedCodebook(book, layer.weight))  # type: ignore[arg-type]
    return traced


def write_codebooks(model: Model) -> None:
    """Write the look-ups of a traced network with the operators of the ONNX standard, in place."""
    import onnx_ir as ir

    graph = model.graph
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type == LOOK_UP]:
        values, indices = node.inputs
        assert indices is not None
        assert indices.const_value is not None
        array = indices.const_value.numpy()
        if node.attributes["bits"].as_int() <= 4:
            tensor: ir.TensorProtocol = ir.Tensor(array.astype(ir.DataType.UINT4.numpy()), name=indices.name)
        else:
            tensor = ir.Tensor(array.astype(np.uint8), name=indices.name)
        indices.const_value, indices.dtype = tensor, tensor.dtype
        cast = ir.node("Cast", [indices], {"to": ir.DataType.INT32})
        gather = ir.node("Gather", [values, cast.outputs[0]], {"axis": 0})
        graph.insert_before(node, [cast, gather])
        output = gather.outputs[0]
        output.shape, output.dtype = node.outputs[0].shape, ir.DataType.FLOAT
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
        graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[""] = max(model.opset_imports.get("", _OPSET), _OPSET)
