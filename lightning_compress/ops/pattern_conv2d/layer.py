"""The layer: a convolution that knows whether its zeros are worth anything here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.ops.pattern_conv2d.operator import (
    NonZeros,
    dense_weight,
    non_zeros,
    pattern_conv2d,
)

Mode = Literal["auto", "sparse", "dense"]
REPEATS = 5


class PatternConv2d(nn.Module):
    """A 3x3 convolution with padding 1 and few weights, for inference.

    Args:
        weights: what is not zero.
        bias: (C_out,) or None.
        in_channels: C_in.
        out_channels: C_out.
        stride: 1 or 2.
        relu: whether max(0, .) follows.
        mode: ``"sparse"`` and ``"dense"`` force one way; ``"auto"`` measures both at the first call with images of a
            size, some passes each, and takes the faster one from then on. Under `torch.compile` and export, ``"auto"``
            is sparse.

    Raises:
        ValueError: a stride that is not 1 or 2.
    """

    taps: Tensor
    bounds: Tensor
    weight: Tensor
    filters: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weights: NonZeros,
        bias: Tensor | None,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        relu: bool = False,
        mode: Mode = "auto",
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride={stride}: choose 1 or 2.")
        if mode not in ("auto", "sparse", "dense"):
            raise ValueError(f"mode={mode!r}: choose 'auto', 'sparse' or 'dense'.")
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.relu = relu
        self.mode: Mode = mode
        self.sparse_pays: dict[tuple[int, ...], bool] = {}  # (threads, *shape of the input) -> what was measured
        self._dense: Tensor | None = None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, block: int = 1, *, relu: bool = False, mode: Mode = "auto") -> PatternConv2d:
        """Take the zeros of a convolution.

        Args:
            conv: kernel 3x3, padding 1, one group.
            block: consecutive filters whose non-zeros are stored together, as in `non_zeros`.

        Raises:
            ValueError: another kind of convolution.
        """
        if not is_suitable(conv):
            raise ValueError(f"conv: expected 3x3, stride 1 or 2, padding 1, groups 1, dilation 1, got {conv}.")
        weights = non_zeros(conv.weight, block)
        return cls(weights, conv.bias, conv.in_channels, conv.out_channels, stride=conv.stride[0], relu=relu, mode=mode)

    @property
    def weights(self) -> NonZeros:
        return NonZeros(self.taps, self.bounds, self.weight, self.filters)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride))."""
        if self.mode == "dense" or (self.mode == "auto" and not self._pays(x)):
            return self._forward_dense(x)
        return self._forward_sparse(x)

    def extra_repr(self) -> str:
        share = self.weight.numel() / (self.in_channels * self.out_channels * 9)
        return (
            f"{self.in_channels}, {self.out_channels}, stride={self.stride}, block={self.weight.shape[1]}, "
            f"weights={share:.1%}, mode={self.mode!r}"
        )

    def _forward_sparse(self, x: Tensor) -> Tensor:
        own = self._buffers  # `self.taps` and the like would take as long as a small layer's first lines
        return pattern_conv2d(
            x, own["taps"], own["bounds"], own["weight"], own["filters"], own["bias"],  # type: ignore[arg-type]
            self.out_channels, self.stride, self.relu,
        )  # fmt: skip

    def _forward_dense(self, x: Tensor) -> Tensor:
        if self._dense is None or self._dense.device != x.device or self._dense.dtype != x.dtype:
            self._dense = dense_weight(*self.weights, self.in_channels, self.out_channels).to(x)
        y = F.conv2d(x, self._dense, self.bias if self.bias is None else self.bias.to(x), self.stride, 1)
        return y.relu_() if self.relu else y

    def _pays(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return True
        key = (torch.get_num_threads(), *x.shape)
        if key not in self.sparse_pays:
            with torch.inference_mode():
                times = [_seconds(x, way) for way in (self._forward_sparse, self._forward_dense)]
            self.sparse_pays[key] = times[0] < times[1]
        if self.sparse_pays[key]:
            self._dense = None
        return self.sparse_pays[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PatternConv2d:
        self._dense = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_dense": None, "sparse_pays": {}}  # of this machine


def _seconds(x: Tensor, way: Callable[[Tensor], Tensor]) -> float:
    best = float("inf")
    for _ in range(1 + REPEATS):  # the first one also compiles
        start = time.perf_counter()
        way(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - start)
    return best


def is_suitable(module: nn.Module) -> bool:
    """Whether `PatternConv2d` can take a layer's place."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride in ((1, 1), (2, 2))
        and module.padding in ((1, 1), "same")
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
    )


def to_pattern_layers(
    network: nn.Module, block: int = 1, *, max_density: float = 0.5, mode: Mode = "auto"
) -> nn.Module:
    """A copy of a network in eval mode, with its sparse 3x3 convolutions as `PatternConv2d`.

    Args:
        network: whose pruned weights are zero.
        block: see `non_zeros`.
        max_density: convolutions with a larger share of non-zero weights stay as they are.
        mode: see `PatternConv2d`.
    """
    small = inference_copy(network)
    for name, module in list(small.named_modules()):
        if is_suitable(module) and module.weight.count_nonzero() <= max_density * module.weight.numel():
            parent, _, leaf = name.rpartition(".")
            setattr(small.get_submodule(parent), leaf, PatternConv2d.from_conv(module, block, mode=mode))
    return small
