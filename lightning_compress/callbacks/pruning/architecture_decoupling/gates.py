"""Controllers, and the hooks with which they gate the output of a convolution.

    u = GAP(X),  h = ReLU(A1 u + b1),  y = A2 h + b2         A1: C_in -> floor(C_in / T), A2: -> N
    out = m[:, :, None, None] * act(BN(conv(X)))             m = 1[y > 0]; in training, the Improved SemHash of y

A gate is a part of the network's function. It lives in the module's tree below `NAME`, so that optimisers, DDP and
checkpoints see it; two hooks, which are copied, pickled and exported with the module, connect it to its convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.callbacks.pruning.architecture_decoupling.semhash import (
    SemHash,
    draw_binary,
    draw_noise,
    semhash,
)
from lightning_compress.core.surgery import replayable

NAME = "architecture_decoupling"
Init = Literal["zero", "kaiming"]
# Gets the mask (B, N) and, in training, the global average of what it masks, (B, N) in float32.
Watch = Callable[[Tensor, Tensor | None], None]


class Gate(nn.Module):
    """The controller of one convolution, and the linear prediction of the class from its mask.

    Args:
        in_channels: C_in.
        out_channels: N.
        reduction: T; the hidden layer has C_in // T units, at least one.
        num_classes: of the prediction, which only the loss uses; it is left out of exports.
        semhash: see :func:`.semhash.draw_binary`.
        init: ``"zero"`` starts with A1 = 0, so that all inputs have the same mask, with about 0.76 of its entries one;
            ``"kaiming"`` draws A1 as well. A2 and the prediction are always drawn, both biases are one.
        generator: for the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_classes: int,
        reduction: int = 4,
        semhash: SemHash = "sample",
        init: Init = "zero",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        hidden = max(1, in_channels // reduction)
        self.reduce = nn.Linear(in_channels, hidden)
        self.expand = nn.Linear(hidden, out_channels)
        self.head = nn.Linear(out_channels, num_classes, bias=False)
        self.head.training_only = True  # type: ignore[assignment]
        self.semhash: SemHash = semhash
        for layer in (self.reduce, self.expand, self.head):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.ones_(layer.bias)
        if init == "zero":
            nn.init.zeros_(self.reduce.weight)
        self.seed: int | None = None  # of the noise of this training step; None draws from torch's own generator
        self.watch: Watch | None = None
        self.silent = False
        self._mask: Tensor | None = None  # on its way from the one hook to the other

    def logits(self, x: Tensor) -> Tensor:
        """y of inputs (B, C_in, ...): (B, N), in the controller's own precision."""
        u = x.mean(tuple(range(2, x.ndim)), dtype=self.reduce.weight.dtype)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.expand(F.relu(self.reduce(u)))
        return self.expand(F.relu(self.reduce(u)))

    def forward(self, x: Tensor) -> Tensor:
        """The mask of inputs (B, C_in, ...): (B, N), binary in eval mode."""
        y = self.logits(x)
        if not self.training:
            return (y > 0).to(y.dtype)
        # A generator for every step, so that a step that is run again, after resuming or because activations were not
        # kept, draws the same.
        generator = None if self.seed is None else torch.Generator(y.device).manual_seed(self.seed)
        return semhash(y, draw_noise(y, generator), draw_binary(y, self.semhash, generator))

    def decide(self, x: Tensor) -> None:
        """Find the mask for what the convolution is about to compute."""
        self._mask = None if self.silent else self(x)

    def pass_on(self, out: Tensor) -> Tensor:
        """The convolution's output (B, N, ...), masked."""
        mask, self._mask = self._mask, None
        if mask is None:
            return out
        # Also unwatched, so that a forward pass that is run again for its gradients does the same.
        pooled = out.mean(tuple(range(2, out.ndim)), dtype=torch.float32) if self.training else None
        if self.watch is not None:
            self.watch(mask, pooled)
        return out * mask.to(out.dtype).reshape(*mask.shape, *[1] * (out.ndim - 2))


class Look:
    """Forward pre-hook: the gate decides."""

    part_of_function = True  # copies for export and measuring keep it

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.gate.decide(args[0])


class Pass:
    """Forward hook: the gate lets channels pass."""

    part_of_function = True

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return self.gate.pass_on(out)


class PassInput:
    """Forward pre-hook of the only layer that reads these channels: the same there."""

    part_of_function = True

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.gate.pass_on(args[0]), *args[1:]


@replayable
def attach_gates(
    module: nn.Module,
    units: Mapping[str, Mapping[str, Any]],
    num_classes: int,
    reduction: int,
    semhash: SemHash,
    init: Init,
    seed: int,
) -> Callable[[nn.Module], None]:
    """Put gates on convolutions. Plain data in, so that a checkpoint can ask for it again.

    Args:
        module: the network, or what holds it.
        units: convolution -> the fields of its :class:`.units.Unit`.
        num_classes, reduction, semhash, init: of every :class:`Gate`.
        seed: of the initial weights.

    Returns:
        A function that takes them off again.
    """
    if isinstance(module, nn.Sequential):
        raise ValueError("attach_gates: an nn.Sequential would run the gates as layers; give what holds it.")
    generator = torch.Generator().manual_seed(seed)
    for name, unit in units.items():
        conv = module.get_submodule(name)
        channels = unit["in_channels"], unit["out_channels"]
        gate = Gate(*channels, num_classes, reduction, semhash, init, generator)
        gate.to(next(conv.parameters())).train(conv.training)
        *parents, leaf = f"{NAME}.{name}".split(".")
        home = module
        for parent in parents:
            if parent not in home._modules:
                home.add_module(parent, nn.Module())
            home = home.get_submodule(parent)
        home.add_module(leaf, gate)
        module.get_submodule(unit["source"]).register_forward_pre_hook(Look(gate))
        sink = module.get_submodule(unit["sink"])
        if unit["at_input"]:  # before the reader's own controller looks
            sink.register_forward_pre_hook(PassInput(gate), prepend=True)
        else:
            sink.register_forward_hook(Pass(gate))
    return partial(detach_gates, names=list(units))


def detach_gates(module: nn.Module, names: list[str]) -> None:
    """Undo :func:`attach_gates`."""
    gates = [gate for name, gate in gates_of(module).items() if name in names]
    for owner in module.modules():
        for hooks in (owner._forward_pre_hooks, owner._forward_hooks):
            for key in [
                k for k, hook in hooks.items() if isinstance(hook, (Look, Pass, PassInput)) and hook.gate in gates
            ]:
                del hooks[key]
    for name in names:
        path = f"{NAME}.{name}"
        while path:  # and the empty shells around it
            path, _, leaf = path.rpartition(".")
            home = module.get_submodule(path)
            delattr(home, leaf)
            if any(True for _ in home.children()):
                break


def gates_of(module: nn.Module) -> dict[str, Gate]:
    """Convolution -> its gate, in the order in which the network defines them.

    >>> gates_of(nn.Linear(2, 2))
    {}
    """
    home = getattr(module, NAME, None)
    found = {} if home is None else {name: gate for name, gate in home.named_modules() if isinstance(gate, Gate)}
    order = [name for name, _ in module.named_modules() if name in found]
    return {name: found[name] for name in order}


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """All gates open: the network as it was without them."""
    gates = gates_of(module).values()
    for gate in gates:
        gate.silent = True
    try:
        yield
    finally:
        for gate in gates:
            gate.silent = False


@contextmanager
def watching(gates: Mapping[str, Gate], watch: Callable[[str, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Call ``watch(name, mask, pooled)`` whenever one of `gates` masks; see `Watch`."""
    try:
        for name, gate in gates.items():
            gate.watch = partial(watch, name)
        yield
    finally:
        for gate in gates.values():
            gate.watch = None
