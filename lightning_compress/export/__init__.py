"""Turn a module into a file that runs without this library, and check that it computes the same.

``lightning_compress.export`` is this package and the function in one:

    from lightning_compress import export

    exported = export(module, "network", torch.zeros(1, 3, 32, 32))  # network.onnx or network.pt2
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.core.example_input import inputs_for
from lightning_compress.core.inference_copy import has_watchers
from lightning_compress.core.meta import evaluating
from lightning_compress.core.surgery.compact import compact
from lightning_compress.core.units import human
from lightning_compress.export.onnx import HOW_TO_GET, missing, run_onnx, save_onnx
from lightning_compress.export.program import capture, portable_copy, run_program, save_program
from lightning_compress.export.semi_structured import to_semi_structured

__all__ = ["Exported", "check_format", "export", "to_semi_structured"]

SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the file.
        format: ``"onnx"``, or ``"torch"`` for a torch.export program (``torch.export.load(path).module()``).
        bytes: its size, with the weights beside it where ONNX needs a second file.
        max_abs_difference: largest difference to the eager module over all outputs, on random input.
        dynamic_batch: whether the file takes any batch size; else that of the example input.
    """

    path: Path
    format: str
    bytes: int
    max_abs_difference: float
    dynamic_batch: bool

    def __str__(self) -> str:
        what = {"onnx": "ONNX", "torch": "torch.export"}[self.format]
        batch = "any" if self.dynamic_batch else "fixed"
        return (
            f"{self.path} ({what}, {human(self.bytes, 'B')}, {batch} batch size,"
            f" differs from eager by at most {self.max_abs_difference:.1e})"
        )


def export(
    module: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    format: str = "auto",
    atol: float = 1e-4,
    dynamic_batch: bool = True,
) -> Exported:
    """Export the forward of ``module``, run the file on random input and compare it with the eager module.

    A copy is exported, on the CPU, in eval mode, with half precision as float32, without hooks, with the
    values of parametrised weights and without channels that are zero. ``module`` may live on any device,
    attached to a trainer or not, and is not changed.

    Args:
        module: a network or a LightningModule.
        path: the file to write. Its suffix, ``.onnx`` or ``.pt2``, is appended where it is missing.
        example_input: a tensor ``(N, ...)``, a shape, a tuple of arguments or a dict of keyword arguments.
        format: ``"onnx"`` needs the extra ``export``; ``"torch"`` writes a torch.export program. ``"auto"``
            goes by the suffix of ``path``, and without one writes ONNX when the extra is installed.
        atol: largest difference allowed, times the largest output if that is above 1. 1e-4 leaves room for
            the order of float32 sums, which ONNX Runtime changes.
        dynamic_batch: leave the batch size open. A network that fixes it is exported with that of the
            example.

    Raises:
        ValueError: unknown format, or one that contradicts the suffix.
        MisconfigurationException: ``"onnx"`` without the extra.
        RuntimeError: the network cannot be captured; the file computes something else (it is removed);
            or forward hooks change what the module computes, which a file cannot hold.
    """
    path = Path(path)
    format = _choose(format, path)
    if path.suffix != SUFFIX[format]:
        path = path.with_name(path.name + SUFFIX[format])
    path.parent.mkdir(parents=True, exist_ok=True)

    eager = portable_copy(module)
    inputs = inputs_for(eager, example_input)
    if has_watchers(module):
        _check_hooks(module, eager, example_input)
    clone = compact(eager, example_input)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own internals
        program, dynamic = _capture(clone, inputs, dynamic_batch)
        save_onnx(program, path) if format == "onnx" else save_program(program, path)

    args, kwargs = _random(_resized(inputs, 3) if dynamic else inputs)
    with torch.no_grad():
        expected = [leaf for leaf in tree_leaves(eager(*args, **kwargs)) if isinstance(leaf, Tensor)]
    found = run_onnx(path, args, kwargs) if format == "onnx" else run_program(path, args, kwargs)
    difference, scale = _compare(found, expected)
    files = [file for file in (path, path.with_name(path.name + ".data")) if file.exists()]
    if not difference <= atol * scale:  # also true for nan
        for file in files:
            file.unlink()
        raise RuntimeError(
            f"The exported {type(module).__name__} differs from the eager module by {difference:.3g} on"
            f" random input; atol={atol:g} allows {atol * scale:.3g}, for outputs up to {scale:.3g}."
            f" {path} was removed."
        )
    size = sum(file.stat().st_size for file in files)
    return Exported(path, format, size, difference, dynamic)


def check_format(format: str) -> None:
    """Raise unless files of this format can be written here; see :func:`export`."""
    if format not in ("auto", *SUFFIX):
        raise ValueError(f"format must be 'auto', 'onnx' or 'torch', got {format!r}")
    if format == "onnx" and missing():
        raise MisconfigurationException(
            f"format='onnx' needs {', '.join(missing())}: {HOW_TO_GET}. format='torch' needs nothing more."
        )


def _choose(format: str, path: Path) -> str:
    """The format in which to write ``path``."""
    check_format(format)
    by_suffix = next((f for f, suffix in SUFFIX.items() if suffix == path.suffix), None)
    if format != "auto":
        if by_suffix not in (None, format):
            raise ValueError(f"format={format!r} writes {SUFFIX[format]!r} files, got path={str(path)!r}")
        return format
    if by_suffix is None and missing():
        rank_zero_info(f"Exporting with torch.export; for ONNX: {HOW_TO_GET}")
        return "torch"
    check_format(by_suffix or "onnx")
    return by_suffix or "onnx"


def _capture(clone: nn.Module, inputs: Any, dynamic_batch: bool) -> tuple[ExportedProgram, bool]:
    """Capture with an open batch if wanted and possible, else with that of the inputs: (program, open)."""
    if dynamic_batch:
        try:
            return capture(clone, *_resized(inputs, 2), dynamic_batch=True), True
        except RuntimeError:  # a network that fixes the size of its batch
            pass
    try:
        return capture(clone, *inputs, dynamic_batch=False), False
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RuntimeError(f"torch.export cannot capture {type(clone).__name__}: {reason}") from error


def _resized(inputs: Any, batch: int) -> Any:
    """The inputs with their first sample repeated ``batch`` times."""
    return tree_map_only(Tensor, lambda t: torch.cat([t[:1]] * batch) if t.ndim else t, inputs)


def _random(inputs: Any) -> Any:
    """Normal noise in place of floating point inputs; others, such as token ids, keep their values."""
    generator = torch.Generator().manual_seed(0)
    return tree_map_only(
        Tensor,
        lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator) if t.is_floating_point() else t,
        inputs,
    )


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Largest difference, and the scale to judge it by: the largest finite value expected, at least 1."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf"), 1.0
    f, e = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (found, expected))
    difference = torch.where(f == e, 0.0, (f - e).abs())  # equal infinities have no difference
    return difference.max().item(), max(1.0, e.nan_to_num(0, 0, 0).abs().max().item())


def _check_hooks(module: nn.Module, clone: nn.Module, example_input: Any) -> None:
    """Refuse a module whose forward hooks, which the clone does not have, change its output."""
    args, kwargs = _random(inputs_for(clone, example_input))
    with evaluating(module):
        eager_args, eager_kwargs = inputs_for(module, args or kwargs)
        with_hooks = [t.cpu() for t in tree_leaves(module(*eager_args, **eager_kwargs)) if isinstance(t, Tensor)]
        without = [t for t in tree_leaves(clone(*args, **kwargs)) if isinstance(t, Tensor)]
    difference, scale = _compare(without, with_hooks)
    if not difference <= 0.05 * scale:  # coarse, since the module may compute in bfloat16
        raise RuntimeError(
            f"The forward hooks of {type(module).__name__} change its output by {difference:.3g}, and an"
            " export cannot hold hooks. Put what they compute into the module or into a parametrization."
        )


class _Callable(ModuleType):
    """Importing a subpackage binds its name in the parent, so the name `export` must serve as both."""

    def __call__(self, *args: Any, **kwargs: Any) -> Exported:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
