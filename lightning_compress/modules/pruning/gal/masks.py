"""The masks at work: where they are kept, and how a network runs with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from lightning_compress.core.surgery import replayable
from lightning_compress.modules.pruning.gal.adversary import Discriminator, Variant
from lightning_compress.modules.pruning.gal.points import Point

MaskInit = Literal["official", "normal", "uniform", "ones"]


def multiply(x: Tensor, mask: Tensor) -> Tensor:
    """x (N, C, ...) times a mask (C,) or (1,), in the precision of x."""
    return x * mask.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))


@contextmanager
def masking(network: nn.Module, points: Sequence[Point], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """While this is active, `network` runs with `masks`: name of a point's module -> mask."""
    handles: list[Any] = []
    try:
        for point in points:
            module, mask = network.get_submodule(point.at), masks[point.at]
            if point.front:
                handles.append(module.register_forward_pre_hook(partial(_before, mask)))
            else:
                handles.append(module.register_forward_hook(partial(_behind, mask)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(mask: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (multiply(args[0], mask), *args[1:])


def _behind(mask: Tensor, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return multiply(out, mask)


class Search(nn.Module):
    """What exists as long as the search: a mask per point, and the discriminator.

    Args:
        points: where the masks multiply.
        num_classes: logits that the discriminator looks at.
        variant: of the discriminator.
        init: ``"official"`` draws from N(0, 1), inside dense blocks from U(0, 1); ``"normal"`` and ``"uniform"`` draw
            all from one of them; ``"ones"`` changes nothing of the network.
        seed: of the masks and of the discriminator.
    """

    def __init__(
        self, points: Sequence[Point], num_classes: int, variant: Variant, init: MaskInit = "official", seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.points = tuple(points)
        self.size = sum(point.size for point in points)
        draws: dict[str, Callable[..., Tensor]] = {
            "normal": partial(torch.randn, generator=generator),
            "uniform": partial(torch.rand, generator=generator),
            "ones": torch.ones,
        }
        self.masks = nn.ParameterDict()
        for point in points:
            kind = ("uniform" if point.uniform else "normal") if init == "official" else init
            self.masks[_key(point.at)] = nn.Parameter(draws[kind](point.size))
        self.discriminator = Discriminator(num_classes, variant, generator)

    def named(self) -> dict[str, Tensor]:
        """Name of a point's module -> mask, (1,) or (channels,)."""
        return {point.at: self.masks[_key(point.at)] for point in self.points}

    def flat(self) -> Tensor:
        """All masks, (size,)."""
        return torch.cat(list(self.masks.values()))

    def masking(self, network: nn.Module) -> Any:
        """Context in which `network` runs with the masks."""
        return masking(network, self.points, self.named())


def mask_map(points: Sequence[Point], masks: Mapping[str, Tensor]) -> tuple[Tensor, list[str]]:
    """Masks as a picture: (rows, columns), NaN where there is nothing or a zero, and the names of the rows.

    A row per stage with its blocks, per concatenation with its branches, and per layer with its channels, sorted.
    """
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for point in points:
        mask = masks[point.at].detach().float().cpu()
        rows[point.at if point.size > 1 else point.unit.rpartition(".")[0]].append(mask.sort(descending=True).values)
    values = pad_sequence([torch.cat(row) for row in rows.values()], batch_first=True, padding_value=torch.nan)
    return values.where(values != 0, torch.nan), list(rows)


@replayable
def begin_search(module: nn.Module, points: list[dict[str, Any]], **arguments: Any) -> Callable[[nn.Module], None]:
    """Give a module `search`: masks at these points (their fields), and a discriminator.

    DDP leaves the discriminator alone: it has a backward pass of its own in every step.
    """
    search = Search([Point(**point) for point in points], **arguments)
    module.search = search.to(next(module.parameters()).device)
    names = [f"search.discriminator.{name}" for name, _ in search.discriminator.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return end_search


def end_search(module: nn.Module) -> None:
    """Take the masks and the discriminator away."""
    module.search = None  # type: ignore[assignment]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [])


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name holds no dot
