"""Count what a network costs: multiply-accumulates and parameters, layer by layer, and measured latency.

A MAC is one multiply-accumulate of a convolution, a linear layer or a matrix product (attention too), for
one image. Nothing else is counted unless the ``paper`` convention asks for it. The forward runs on meta
tensors, which have shapes and no data: it takes milliseconds, no memory, and no fused kernel hides its work.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.core.select import did_you_mean

CONVENTIONS = ("macs", "flops", "paper", "gan")


@dataclass(frozen=True)
class LayerProfile:
    """What one module costs, without its children.

    Attributes:
        name: name in ``named_modules()``; ``""`` is the profiled module itself.
        type: name of its class.
        kind: ``conv``, ``linear``, ``attention``, ``matmul``, ``batchnorm``, ``norm`` or ``other``.
        macs: multiply-accumulates for one image, all calls together.
        params: elements of its parameters; a shared parameter counts where it comes first.
        outputs: elements of its output for one image, all calls together; 0 if it was not called.
        shape: shape of its last output without the batch dimension.
        bias: whether it has a bias parameter.
        zeros: products with the zeros that a transposed convolution can be thought to put between its inputs, for one
            image; nothing computes them, ``macs`` leaves them out.
    """

    name: str
    type: str
    kind: str
    macs: int = 0
    params: int = 0
    outputs: int = 0
    shape: tuple[int, ...] = ()
    bias: bool = False
    zeros: int = 0

    def cost(self, convention: str = "macs", *, bn_ops: int = 2, conv_bias: bool = True) -> int:
        """Cost in a counting convention, see :func:`profile`; the keywords adjust ``"paper"``."""
        if convention == "flops":
            return 2 * self.macs
        if convention == "gan":
            return self.macs + self.zeros
        if convention == "paper" and self.kind == "batchnorm":
            return self.macs + bn_ops * self.outputs
        if convention == "paper" and self.kind == "conv" and self.bias and conv_bias:
            return self.macs + self.outputs
        return self.macs


@dataclass(frozen=True)
class Profile:
    """What a network costs for one image, in total and by layer in the order of execution."""

    layers: tuple[LayerProfile, ...]
    convention: str = "macs"

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, whatever the convention."""
        return sum(layer.macs for layer in self.layers)

    @property
    def params(self) -> int:
        """Elements of all parameters (weights, biases, affine of norms), frozen or not, shared ones once."""
        return sum(layer.params for layer in self.layers)

    @property
    def cost(self) -> int:
        """Total in the profile's own convention."""
        return sum(layer.cost(self.convention) for layer in self.layers)

    def paper_macs(self, bn_ops: int = 2, conv_bias: bool = True) -> int:
        """MACs as counted by many pruning papers, with the cost of batch norm and biases added.

        Args:
            bn_ops: operations per output element of a batch norm; papers use 0, 2 or 4.
            conv_bias: whether to add one per output element of a convolution with bias.
        """
        return sum(layer.cost("paper", bn_ops=bn_ops, conv_bias=conv_bias) for layer in self.layers)

    def layer(self, name: str) -> LayerProfile:
        """The layer of that name.

        Raises:
            ValueError: if none has it; the nearest names are given.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(f"The profile has no layer {name!r}.{did_you_mean(name, [x.name for x in self.layers])}")

    def to_dict(self) -> dict[str, Any]:
        """Totals and layers as plain data, ready for JSON."""
        totals = {"convention": self.convention, "cost": self.cost, "macs": self.macs, "params": self.params}
        return totals | {"layers": [asdict(layer) for layer in self.layers]}

    def table(self) -> Table:
        """A table for ``rich.print``: a row per layer, totals in the footer."""
        title = {"macs": "MACs", "flops": "FLOPs", "paper": "MACs (paper)", "gan": "MACs (GAN)"}[self.convention]
        table = Table(show_footer=True)
        table.add_column("layer", "total", overflow="fold")
        table.add_column("type")
        table.add_column("output", justify="right")
        table.add_column(title, f"{self.cost:,}", justify="right")
        table.add_column("params", f"{self.params:,}", justify="right")
        for layer in self.layers:
            shape = "×".join(map(str, layer.shape))
            cost = layer.cost(self.convention)
            table.add_row(layer.name or "(root)", layer.type, shape, f"{cost:,}", f"{layer.params:,}")
        return table


def profile(module: nn.Module, example_input: Any, *, convention: str = "macs") -> Profile:
    """Count MACs and parameters of a module, for one image.

    The module's forward runs once in eval mode on the meta device and leaves the module as it was. A module
    that mixes in tensors which are neither parameters nor buffers, or that looks at values, runs on its own
    device instead. What a parametrisation computes is not counted: it is folded into the weight at export.

    Args:
        module: any module.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments, or the shape of one
            tensor such as ``(1, 3, 224, 224)``. Of the batch (first dimension of the first tensor, and of all
            tensors that share its size) one image is used.
        convention: what :attr:`Profile.cost` and the table show. ``"macs"``: multiply-accumulates of
            convolutions, linear layers and matrix products. ``"flops"``: twice that. ``"paper"``: MACs plus 2
            per output element of a batch norm plus 1 per output element of a convolution with bias. ``"gan"``: MACs,
            with a transposed convolution charged a filter for each place of its output instead of its input, as
            papers on image translation count.

    Raises:
        ValueError: if ``convention`` is none of these, or if the forward fails on ``example_input``.

    Example:
        >>> from lightning_compress.networks import resnet20
        >>> profile(resnet20(), (1, 3, 32, 32)).macs
        40551040
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}.")
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    args, kwargs = _one_image(*_arguments(module, example_input))
    with _divided_kernels():
        try:
            meta = {name: _to_meta(x) for name, x in chain(module.named_parameters(), module.named_buffers())}
            inputs = tree_map_only(Tensor, _to_meta, (args, kwargs))
            counter = _Counter(module)
            counter.run(lambda: torch.func.functional_call(module, meta, *inputs))
        except Exception:  # mixed devices or a look at values; meta kernels report these in many ways
            device = _device(module)
            args, kwargs = tree_map_only(Tensor, lambda x: x.clone().to(device), (args, kwargs))
            counter = _Counter(module)
            try:
                counter.run(lambda: module(*args, **kwargs))
            except Exception as error:
                shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                raise ValueError(
                    f"example_input does not suit {type(module).__name__}: its forward failed on shapes "
                    f"{shapes} in layer {counter.where()!r} with {type(error).__name__}: {error}"
                ) from error
    return Profile(counter.layers(), convention)


@dataclass(frozen=True)
class Latency:
    """Median time of a forward pass.

    Attributes:
        median_ms: milliseconds for the whole batch.
        device_name: the processor's own name.
        batch: images per pass.
        threads: CPU threads in use; 0 on an accelerator.
    """

    median_ms: float
    device_name: str
    batch: int
    threads: int


def measure_latency(
    module: nn.Module,
    example_input: Any,
    *,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
) -> Latency:
    """Time a module's forward pass in eval mode, on the device where it is.

    Args:
        module: any module.
        example_input: as in :func:`profile`, but its whole batch is used; moved to the module's device.
        repeats: passes that are timed one by one; their median is what is reported, so that a few disturbed
            passes do not matter. To compare two modules, call this for them in turns.
        warmup: passes before these.
        threads: CPU threads to use; the current setting by default.

    Raises:
        ValueError: if ``repeats`` or ``threads`` is less than 1, or ``warmup`` less than 0.
    """
    for argument, value, least in (
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
        ("threads", 1 if threads is None else threads, 1),
    ):
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}.")
    device = _device(module)
    args, kwargs = _arguments(module, example_input)
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
    wait = partial(torch.accelerator.synchronize, device) if device.type != "cpu" else lambda: None
    threads_before = torch.get_num_threads()
    times = []
    with ExitStack() as stack:
        stack.enter_context(_untouched(module))
        stack.enter_context(torch.inference_mode())
        if threads is not None:
            torch.set_num_threads(threads)
            stack.callback(torch.set_num_threads, threads_before)
        for _ in range(warmup + repeats):
            wait()
            start = time.perf_counter()
            module(*args, **kwargs)
            wait()
            times.append(time.perf_counter() - start)
    cpu = device.type == "cpu"
    return Latency(
        median_ms=1e3 * statistics.median(times[warmup:]),
        device_name=device_name(device),
        batch=_batch(args, kwargs),
        threads=(threads or threads_before) if cpu else 0,
    )


def device_name(device: torch.device | str) -> str:
    """Name of a device as its maker writes it, e.g. ``"NVIDIA H200"`` or ``"AMD EPYC 9R14"``."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass
class _Row:
    """What is gathered for one module while the forward runs."""

    macs: int = 0
    zeros: int = 0
    outputs: int = 0
    shape: tuple[int, ...] = ()
    ops: set[str] = field(default_factory=set)


class _Counter(TorchDispatchMode):
    """Sees every operator below autograd and books its MACs on the module that is running."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.rows: dict[str, _Row] = {}
        self.stack: list[_Row] = []
        self.muted = 0  # depth of the parametrisations that are running

    def run(self, forward: Callable[[], Any]) -> None:
        """Run ``forward`` with the modules observed, and leave no trace on them."""
        with ExitStack() as stack:
            stack.enter_context(_untouched(self.module))
            for name, owner, module in _owners(self.module):
                module._compiled_call_impl = None
                if isinstance(module, nn.utils.parametrize.ParametrizationList):
                    stack.callback(module.register_forward_pre_hook(self._mute).remove)
                    stack.callback(module.register_forward_hook(self._unmute).remove)
                elif name == owner:
                    stack.callback(module.register_forward_pre_hook(partial(self._enter, name)).remove)
                    stack.callback(module.register_forward_hook(self._leave).remove)
            stack.enter_context(self)
            forward()

    def where(self) -> str:
        """The innermost module that is running."""
        return next((name for name, row in self.rows.items() if self.stack and row is self.stack[-1]), "")

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.stack.append(self.rows.setdefault(name, _Row()))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        row = self.stack.pop()
        tensor = next((x for x in tree_leaves(output) if isinstance(x, Tensor)), None)
        if tensor is not None:
            row.outputs += tensor.numel()
            row.shape = tuple(tensor.shape[1:])

    def _mute(self, module: nn.Module, args: Any) -> None:
        self.muted += 1

    def _unmute(self, module: nn.Module, args: Any, output: Any) -> None:
        self.muted -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        op = func.overloadpacket.__name__
        if op in _SAME_SHAPE and args[0].is_meta:
            out = _SAME_SHAPE[op](args[0])
        else:
            out = func(*args, **(kwargs or {}))
        if op in _MACS and self.stack and not self.muted:
            row = self.stack[-1]
            row.macs += _MACS[op](args, out)
            row.zeros += _inserted(args, out) if op == "convolution" else 0
            row.ops.add(op)
        return out

    def layers(self) -> tuple[LayerProfile, ...]:
        """One entry per module that computed MACs or has parameters; those never called come last."""
        members: dict[str, list[nn.Module]] = {name: [] for name in self.rows}
        for _, owner, module in _owners(self.module):
            members.setdefault(owner, []).append(module)
        layers = []
        counted: set[int] = set()
        for name, (module, *parts) in members.items():
            row = self.rows.get(name, _Row())
            own = {id(p): p.numel() for part in (module, *parts) for p in part.parameters(recurse=False)}
            if row.macs or own:
                layers.append(
                    LayerProfile(
                        name=name,
                        type=type(module).__name__,
                        kind=_kind(module, row.ops),
                        macs=row.macs,
                        params=sum(n for key, n in own.items() if key not in counted),
                        outputs=row.outputs,
                        shape=row.shape,
                        bias=isinstance(getattr(module, "bias", None), Tensor),
                        zeros=row.zeros,
                    )
                )
                counted.update(own)
        return tuple(layers)


def _convolution(args: Sequence[Any], out: Tensor) -> int:
    # Every place of the output (of the input, where transposed) costs one filter, all channels together.
    x, weight, transposed = args[0], args[1], args[6]
    places = x if transposed else out
    return places.shape[0] * math.prod(places.shape[2:]) * weight.numel()


def _inserted(args: Sequence[Any], out: Tensor) -> int:
    # A transposed convolution is a convolution over its input with zeros in between: what these would cost.
    x, weight, transposed = args[0], args[1], args[6]
    return (out[:, 0].numel() - x[:, 0].numel()) * weight.numel() if transposed else 0


def _recurrent(args: Sequence[Any], out: Any) -> int:
    weights = (x for x in tree_leaves(args[1:5]) if isinstance(x, Tensor) and x.dim() == 2)
    return args[0].numel() // args[0].shape[-1] * sum(weight.numel() for weight in weights)


_MACS: dict[str, Callable[[Sequence[Any], Any], int]] = {
    "convolution": _convolution,
    "mm": lambda args, out: args[0].numel() * args[1].shape[1],
    "bmm": lambda args, out: args[0].numel() * args[1].shape[2],
    "addmm": lambda args, out: args[1].numel() * args[2].shape[1],
    "baddbmm": lambda args, out: args[1].numel() * args[2].shape[2],
    "mv": lambda args, out: args[0].numel(),
    "dot": lambda args, out: args[0].numel(),
    "mkldnn_rnn_layer": _recurrent,
    "_cudnn_rnn": _recurrent,
    # No MACs, but they tell attention from other products of matrices.
    "_softmax": lambda args, out: 0,
    "_safe_softmax": lambda args, out: 0,
}
# torch runs these on meta tensors as dozens of Python calls, which would be most of the time of a profile.
_SAME_SHAPE: dict[str, Callable[[Tensor], Any]] = {
    "native_batch_norm": lambda x: (torch.empty_like(x), x.new_empty(0), x.new_empty(0)),
    **dict.fromkeys(("relu", "hardtanh", "silu", "gelu", "hardswish", "sigmoid"), torch.empty_like),
    **dict.fromkeys(("relu_", "hardtanh_", "silu_", "hardswish_", "sigmoid_"), lambda x: x),
}
_PARAMETRISATION = re.compile(r"(?:^|\.)parametrizations(?:\.|$)")


def _owners(root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Every module with its name and the name of the one that stands for it: itself, or what it is a part of.

    Parts are parametrisations, and the children of ``nn.MultiheadAttention``, whose weights it uses itself.
    """
    attention: str | None = None
    for name, module in root.named_modules():
        if attention is not None and name.startswith(f"{attention}." if attention else ""):
            yield name, attention, module
            continue
        if isinstance(module, nn.MultiheadAttention):
            attention = name
        yield name, _PARAMETRISATION.split(name)[0], module


def _kind(module: nn.Module, ops: set[str]) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.modules.conv._ConvNd) or "convolution" in ops:
        return "conv"
    products = ops - {"_softmax", "_safe_softmax"}
    if isinstance(module, nn.MultiheadAttention) or (products and ops != products):
        return "attention"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batchnorm"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)):
        return "norm"
    return "matmul" if products else "other"


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and afterwards give all its attributes their values back.

    A forward may set attributes (caches of meta tensors would break the next one), and ``eval()`` may be
    overridden to do work.
    """
    containers = ("_parameters", "_buffers", "_modules")
    saved = [(m, m.__dict__.copy(), [m.__dict__[c].copy() for c in containers]) for m in module.modules()]
    try:
        for m, _, _ in saved:
            m.training = False
        yield
    finally:
        for m, attributes, contents in saved:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for container, content in zip(containers, contents, strict=True):
                attributes[container].clear()
                attributes[container].update(content)


@contextmanager
def _divided_kernels() -> Iterator[None]:
    """Have attention computed as matrix products, and composite operators come as their parts.

    In inference mode, or with inference tensors as inputs, they would come undivided.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _arguments(module: nn.Module, example_input: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments for forward; a shape becomes a random tensor in the module's dtype."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, (tuple, list)):
        if not all(isinstance(size, int) for size in example_input):
            return tuple(example_input), {}
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        return (torch.randn(*example_input, generator=torch.Generator().manual_seed(0)).to(dtype),), {}
    return (example_input,), {}


def _batch(args: tuple, kwargs: dict[str, Any]) -> int:
    """Size of the first dimension of the first tensor; 1 if there is none."""
    first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
    return first.shape[0] if first is not None and first.dim() else 1


def _one_image(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    batch = _batch(args, kwargs)
    return tree_map_only(Tensor, lambda x: x[:1] if x.dim() and x.shape[0] == batch else x, (args, kwargs))


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _device(module: nn.Module) -> torch.device:
    tensor = next((x for x in chain(module.parameters(), module.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device
