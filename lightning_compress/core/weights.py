"""Weights from a file into a network: all of them and nothing else, or a message that says what does not fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.core.select import did_you_mean

# What training wrappers put in front of every key: DataParallel and DDP, LightningModules, torch.compile.
WRAPPERS = ("module.", "net.", "network.", "model.", "_orig_mod.")


def load_weights(network: nn.Module, path: str | os.PathLike) -> None:
    """Copy the weights of a file into ``network``, all of them and nothing else.

    The file is what ``torch.save`` wrote: a state dict, or a checkpoint that has one under ``"state_dict"``.
    Prefixes that all keys share because the network was wrapped when saved (``module.``, ``network.``, ...)
    are stripped. Batch norm's ``num_batches_tracked``, which old files lack, may be absent.

    Args:
        network: receives the weights in place.
        path: the file.

    Raises:
        ValueError: if the file is absent, truncated or no state dict, or if its keys or shapes are not those
            of the network.
    """
    put_weights(network, read_weights(path), f"path {os.fspath(path)!r}")


def put_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into ``network`` as :func:`load_weights` does; ``source`` names it in messages."""
    expected = network.state_dict()
    while (prefix := _wrapper(state)) and prefix != _wrapper(expected):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    problems, hint = [], ""
    if missing := [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]:
        problems.append(f"it lacks {_some(missing)}")
    if unexpected := [key for key in state if key not in expected]:
        problems.append(f"the network has no {_some(unexpected)}")
        hint = did_you_mean(unexpected[0], missing)
    if wrong := [key for key in expected if key in state and state[key].shape != expected[key].shape]:
        shapes = f"{tuple(state[wrong[0]].shape)} in the file, {tuple(expected[wrong[0]].shape)} in the network"
        problems.append(f"shapes differ for {_some(wrong)} ({wrong[0]}: {shapes})")
    if problems:
        raise ValueError(f"{source} does not fit {type(network).__name__}: {'; '.join(problems)}.{hint}")
    network.load_state_dict(state, strict=False)


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file, at its top or under ``"state_dict"``, on the CPU.

    Raises:
        ValueError: if the file is absent, truncated, or holds more than plain weights.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"path {os.fspath(path)!r} does not exist.") from None
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        reason = f"{type(error).__name__}: {str(error).split('. ')[0].splitlines()[0]}" if str(error) else "empty"
        raise ValueError(
            f"path {os.fspath(path)!r} is truncated or holds more than plain weights ({reason})."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"path {os.fspath(path)!r} holds no state dict, at its top or under 'state_dict'.")
    return dict(state)


def _wrapper(keys: Iterable[str]) -> str | None:
    """The prefix of a wrapper that all ``keys`` share, if any."""
    return next((prefix for prefix in WRAPPERS if all(key.startswith(prefix) for key in keys)), None)


def _some(keys: list[str], n: int = 3) -> str:
    return ", ".join(keys[:n]) + (f" and {len(keys) - n} more" if len(keys) > n else "")
