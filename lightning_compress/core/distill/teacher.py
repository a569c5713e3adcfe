"""The frozen network that another one learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from lightning_compress.core.distill.taps import Point, input_at, observe
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.weights import put_weights, read_weights


class Teacher:
    """A copy of a network that is only looked at: in eval mode, without gradients, hooks and trainer.

    It is no `nn.Module`, and the callback that holds it is none either: so it is in no `state_dict`, no optimiser and
    no DDP wrapper of the student. A checkpoint of the student says which teacher it had.

    Args:
        network: the trained network; a copy is kept, with the values of parametrised weights.
        source: the file it is from; "" where it is from none.
        channels_last: whether :meth:`observe` computes in the channels-last memory format, faster on many devices.

    Attributes:
        network: the copy.
        source: as given.
        sha256: of the file, or of the weights where there is none.
    """

    def __init__(self, network: nn.Module, source: str = "", *, channels_last: bool = False) -> None:
        self.network = inference_copy(network).requires_grad_(False)
        self.channels_last = channels_last
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.source = source
        self.sha256 = _digest_file(source) if source else _digest_weights(self.network)

    @classmethod
    def from_file(cls, path: str | Path, like: nn.Module, prefix: str = "", *, argument: str = "teacher") -> Teacher:
        """A network like another one, with the weights in a file.

        Args:
            path: a state dict, or a Lightning checkpoint.
            like: the network whose layers it has; not changed.
            prefix: of the network's keys in a checkpoint that holds more than it, such as "network".
            argument: what the user calls the file.

        Raises:
            ValueError: the file is absent or truncated, or does not fit; names `argument`.
        """
        network = inference_copy(like)
        try:
            state = read_weights(path)
            inside = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
            put_weights(network, inside or state, f"path {str(path)!r}")
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error
        return cls(network, str(path))

    def to(self, device: torch.device | str) -> Teacher:
        """Move it, as to the student's device in `on_fit_start`."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def input_at(self, layer: str, *args: Any, **kwargs: Any) -> Tensor:
        """What one of its layers gets when it is called with these arguments; what comes later is not computed."""
        return input_at(self.network, layer, *args, **kwargs)

    def observe(self, points: Sequence[Point], *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Its output, and its features at some points, computed in inference mode.

        Inference tensors may not be kept for a backward pass, so what is returned are copies.
        """
        with torch.inference_mode():
            if self.channels_last:
                args, kwargs = tree_map_only(Tensor, _channels_last, (args, kwargs))
            seen = observe(self.network, points, *args, **kwargs)
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, seen)

    def state_dict(self, *, weights: bool = False) -> dict[str, Any]:
        """Which teacher it is, for a callback's state.

        Args:
            weights: whether the weights go along, for a teacher that cannot be made again from anything else.
        """
        state: dict[str, Any] = {"source": self.source, "sha256": self.sha256}
        return {**state, "weights": self.network.state_dict()} if weights else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weights, if the state has any; else report a teacher that is another one than before.

        Raises:
            MisconfigurationException: the weights do not fit.
        """
        if "weights" in state:
            try:
                self.network.load_state_dict(state["weights"])
            except RuntimeError as error:
                raise MisconfigurationException(f"The teacher in the checkpoint does not fit: {error}") from error
            self.sha256 = state["sha256"]
        elif self.sha256 != state["sha256"]:
            now, then = (
                f"{source or 'weights'} (SHA-256 {sha256[:12]})"
                for source, sha256 in ((self.source, self.sha256), (state["source"], state["sha256"]))
            )
            rank_zero_warn(f"The teacher is {now}, but this run began with {then}.")


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _digest_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
