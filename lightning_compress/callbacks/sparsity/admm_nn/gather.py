"""What pruned layers become for inference: convolutions over the columns that are left, and weights from the file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.sparse.gaps import Gaps, decode_gaps


class ColumnConv2d(nn.Module):
    """A convolution as one product of matrices, with the rows of the unfolded image that its columns read.

    Args:
        conv: zero padding, one group.
    """

    columns: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.groups > 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"conv: expected one group and zero padding by numbers, got {conv}.")
        weight = conv.weight.detach().flatten(1)
        columns = (weight != 0).any(0).nonzero()[:, 0]
        self.register_buffer("columns", columns)
        self.register_buffer("weight", weight[:, columns].clone())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        """What the pruned convolution computes."""
        rows = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)[:, self.columns]
        y = self.weight @ rows
        if self.bias is not None:
            y = y + self.bias[:, None]
        geometry = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        size = [(s + 2 * int(p) - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in geometry]
        return y.unflatten(2, size)

    def extra_repr(self) -> str:
        return f"{len(self.weight)} filters of {len(self.columns)} columns, kernel_size={self.kernel_size}"


def to_stored_model(network: nn.Module, packed: Mapping[str, Gaps], *, gather_columns: bool = False) -> nn.Module:
    """A copy for inference with the weights of a file.

    Args:
        network: the network that was compressed, or a fresh one with the other parameters loaded.
        packed: layers by name, of :meth:`ADMMNN.packed` or `load_gaps`.
        gather_columns: make :class:`ColumnConv2d` of convolutions that were stored by columns.

    Returns:
        The copy in eval mode.
    """
    copied = inference_copy(network)
    for name, layer in packed.items():
        module = copied.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        with torch.no_grad():
            module.weight.copy_(decode_gaps(layer))
        if gather_columns and layer.unit == "column" and isinstance(module, nn.Conv2d):
            copied.set_submodule(name, ColumnConv2d(module))
    return copied
