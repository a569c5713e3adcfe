"""Where gates go: the conv-norm-activation units of a network, found by watching one forward pass.

Every tensor of the pass gets a label, and every function call is an event that reads labels and writes one. A unit is a
convolution, the batch norm that alone reads its output, and the activation that alone reads that. The same events tell
which layers read masked channels: activations, poolings and concatenations hand zero channels on, sums do not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_compress.core.meta import dry_run

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Functions by their name in torch. Those that make zero of zero, element by element:
ACTIVATIONS = (
    "celu", "elu", "gelu", "hardshrink", "hardswish", "hardtanh", "leaky_relu", "mish", "prelu", "relu", "relu6",
    "rrelu", "selu", "silu", "softshrink", "softsign", "tanh", "tanhshrink",
)  # fmt: skip
OTHER_ACTIVATIONS = ("hardsigmoid", "log_softmax", "logsigmoid", "sigmoid", "softmax", "softmin", "softplus")
POOLINGS = [f"{kind}_pool{n}d" for kind in ("adaptive_avg", "adaptive_max", "avg", "max") for n in (1, 2, 3)]
# ... channel by channel:
CHANNELWISE = [*ACTIVATIONS, *POOLINGS, "dropout", "dropout2d", "contiguous", "alpha_dropout", "feature_dropout"]
# Those after which a channel is still a block of features:
FLATTENING = ("flatten", "mean", "reshape", "squeeze", "view")


@dataclass(frozen=True)
class Unit:
    """A convolution that can be gated.

    Attributes:
        conv, norm: names of the layers; the norm is "" where there is none.
        source: the module whose input the controller sees: the convolution, or the pooling of stride 1 before it.
        sink: the module whose output is masked; or, where `at_input`, the only one that reads it, and its input is.
        at_input: where no module of its own, called once, computes the activation.
        in_channels, out_channels: of `source`'s input and of the convolution's output.
    """

    conv: str
    norm: str
    source: str
    sink: str
    at_input: bool
    in_channels: int
    out_channels: int


@dataclass(frozen=True)
class Event:
    """One function call."""

    function: str
    module: str
    reads: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    writes: int
    shape: tuple[int, ...]
    dim: Any = None


# What a layer reads, in channel order: (name of a gated convolution or "", its channels).
Segments = tuple[tuple[str, int], ...]


@dataclass
class Structure:
    """The conv-norm-activation units of a network. Made by :func:`trace_units`.

    Attributes:
        units: convolution -> unit, in forward order.
        left_alone: convolution that cannot be gated -> why.
        folds: convolution -> the batch norm that alone reads it, and reads nothing else; for all convolutions.
        outputs: shapes of what the network puts out.
    """

    units: dict[str, Unit] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    folds: dict[str, str] = field(default_factory=dict)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    layers: dict[str, Event] = field(default_factory=dict)
    _events: list[Event] = field(default_factory=list)
    _sinks: dict[str, int] = field(default_factory=dict)
    _ends: set[int] = field(default_factory=set)

    @property
    def stem(self) -> str:
        """The first convolution, which reads the image."""
        return next((name for name, event in self.layers.items() if event.function != "linear"), "")

    def reads(
        self, gated: Iterable[str], packing: Collection[str] | None = None
    ) -> tuple[dict[str, Segments], set[str]]:
        """Follow masked channels.

        Args:
            gated: the convolutions that have gates.
            packing: the convolutions that can read packed channels; all by default.

        Returns:
            Convolution or linear layer -> what it reads, for those that read masked channels; and the gated
            convolutions whose output only such convolutions read, so that it may stay packed.
        """
        begins = {self._sinks[name]: name for name in gated}
        carried: dict[int, Segments] = {}
        found: dict[str, Segments] = {}
        spread: set[str] = set()  # read by something that needs all channels

        def unpack(labels: Iterable[int]) -> None:
            spread.update(name for label in labels for name, _ in carried.get(label, ()))

        for event in self._events:
            flows = [label for label in event.reads if label in carried]
            segments: Segments = ()
            if event.module in self.layers and event is self.layers[event.module]:
                segments, linear = carried.get(event.reads[0], ()), event.function == "linear"
                channels = sum(n for _, n in segments)
                wide = event.shapes[1][1]  # of the weight: input channels, or features
                if segments and (wide % channels == 0 if linear else wide == channels):
                    found[event.module] = segments
                if linear or wide != channels or (packing is not None and event.module not in packing):
                    unpack(flows)
                segments = ()
            elif event.function in CHANNELWISE and flows:
                segments = carried[flows[0]]
            elif event.function == "cat" and flows and event.dim == 1:
                parts = [
                    carried.get(label, (("", shape[1]),))
                    for label, shape in zip(event.reads, event.shapes, strict=True)
                ]
                segments = tuple(part for segments in parts for part in segments)
            elif event.function in FLATTENING and flows:
                unpack(flows)
                segments = carried[flows[0]] if event.shape[:1] == event.shapes[0][:1] else ()
            else:
                unpack(flows)
            if segments:
                carried[event.writes] = segments
            if event.writes in begins:
                name = begins[event.writes]
                carried[event.writes] = ((name, self.units[name].out_channels),)
        unpack(self._ends)
        return found, set(begins.values()) - spread


def trace_units(network: nn.Module, example_input: Any) -> Structure:
    """Find the units of a network in one forward pass on meta tensors. The network is left as it was.

    Args:
        network: any module; hooks that change what a layer computes must be off.
        example_input: tensor, shape, tuple of arguments or dict of keyword arguments of its forward.

    Raises:
        MisconfigurationException: the forward pass fails.
    """

    @contextmanager
    def observe(tensors: dict[str, Tensor]) -> Iterator[_Trace]:
        trace = _Trace()
        with trace.follow(network), trace:
            yield trace

    try:
        trace, out = dry_run(network, example_input, observe)
    except Exception as error:
        raise MisconfigurationException(
            f"Cannot find the convolutions of {type(network).__name__}: its forward pass fails with "
            f"{type(error).__name__}: {error}."
        ) from error
    return trace.structure(network, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)])


class _Trace(TorchFunctionMode):
    """Writes down every function call of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.calls: dict[str, int] = {}
        self.returned: dict[int, list[str]] = {}  # label -> modules that returned it, innermost first
        self.entered: dict[int, list[str]] = {}  # label -> modules that got it as their first argument
        self.stack: list[str] = []
        self._labels: dict[int, int] = {}
        self._alive: list[Tensor] = []  # labels are kept by id(tensor), so no tensor may die
        self._count = 0

    def label(self, tensor: Tensor, fresh: bool = False) -> int:
        """The label of a tensor; a fresh one after it was written to."""
        if fresh or id(tensor) not in self._labels:
            self._alive.append(tensor)
            self._labels[id(tensor)] = self._count
            self._count += 1
        return self._labels[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reads, shapes = tuple(map(self.label, inputs)), tuple(tuple(t.shape) for t in inputs)
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", "").strip("_")
        dim = kwargs.get("dim", next((a for a in args[1:] if isinstance(a, int)), 0))
        for result in results:
            label = self.label(result, fresh=True)
            module = self.stack[-1] if self.stack else ""
            self.events.append(Event(name, module, reads, shapes, label, tuple(result.shape), dim))
        return out

    @contextmanager
    def follow(self, network: nn.Module) -> Iterator[None]:
        """Note which module is running, and what it returns."""

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                self.stack.append(name)
                if args and isinstance(args[0], Tensor):
                    self.entered.setdefault(self.label(args[0]), []).append(name)

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                self.stack.pop()
                self.calls[name] = self.calls.get(name, 0) + 1
                if isinstance(out, Tensor):
                    self.returned.setdefault(self.label(out), []).append(name)

            return hook

        handles: list[Any] = []
        try:
            for name, module in network.named_modules():
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def structure(self, network: nn.Module, outputs: list[Tensor]) -> Structure:
        """What follows from the events."""
        readers: dict[int, list[Event]] = {}
        writer: dict[int, Event] = {}
        found = Structure(outputs=[tuple(t.shape) for t in outputs], _events=self.events)
        found._ends = {self.label(t) for t in outputs}
        for event in self.events:
            writer[event.writes] = event
            for label in set(event.reads):
                readers.setdefault(label, []).append(event)
            module = network.get_submodule(event.module)
            convolves = event.function.startswith("conv") and isinstance(module, CONVOLUTIONS)
            if convolves or event.function == "linear":
                found.layers.setdefault(event.module, event)

        def only_reader(label: int) -> Event | None:
            events = readers.get(label, [])
            return events[0] if len(events) == 1 and label not in found._ends else None

        def home(label: int) -> str:
            """A module that ran once and returned this."""
            return next((n for n in self.returned.get(label, []) if n and self.calls[n] == 1), "")

        last = next(reversed(found.layers), "")
        for name, event in found.layers.items():
            if event.function == "linear":
                continue
            end, norm, at_input = event.writes, "", False
            follower = only_reader(end)
            if follower and follower.function == "batch_norm":
                end, norm = follower.writes, follower.module
                if self.calls[norm] == 1:
                    found.folds[name] = norm
                follower = only_reader(end)
            sink = home(end)
            if follower and follower.function in ACTIVATIONS:
                end, sink = follower.writes, home(follower.writes)
                reader = only_reader(end)
                at = reader.module if reader else ""
                if not sink and at in self.entered.get(end, ()) and self.calls[at] == 1:
                    sink, at_input = at, True
            if self.calls.get(name) != 1:
                found.left_alone[name] = f"runs {self.calls.get(name, 0)} times"
            elif name == last:
                found.left_alone[name] = "writes the network's output"
            elif follower and follower.function.endswith("_norm"):
                found.left_alone[name] = f"is followed by {follower.function}, which mixes channels"
            elif follower and follower.function in OTHER_ACTIVATIONS:
                found.left_alone[name] = f"is followed by {follower.function}, which makes something of a zero"
            elif not sink:
                function = follower.function if follower else "something"
                found.left_alone[name] = f"is followed by {function} that is not a module of its own, called once"
            else:
                source, channels = self._source(event, writer)
                found._sinks[name] = end
                found.units[name] = Unit(name, norm, source, sink, at_input, channels, event.shape[1])
        return found

    def _source(self, event: Event, writer: dict[int, Event]) -> tuple[str, int]:
        """The module whose input the controller sees, and that input's channels."""
        before = writer.get(event.reads[0])
        if before and before.function in POOLINGS and before.shape == before.shapes[0]:
            pooling = next((n for n in self.returned.get(event.reads[0], []) if self.calls[n] == 1), "")
            if pooling and pooling == before.module:
                return pooling, before.shapes[0][1]
        return event.module, event.shapes[0][1]
