"""Turn a module into a file that runs without this library, and check that it computes the same.

``lightning_compress.export`` is this package and the function in one:

    from lightning_compress import export

    exported = export(module, "network", torch.zeros(1, 3, 32, 32))  # network.onnx or network.pt2
    exported = export(module, "network", torch.zeros(1, 3, 32, 32), format="int8")  # of a quantised network
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_compress.core.example_input import inputs_for
from lightning_compress.core.inference_copy import has_watchers
from lightning_compress.core.meta import evaluating
from lightning_compress.core.surgery.compact import compact
from lightning_compress.core.units import human
from lightning_compress.export.codebook import traced_with_codebooks, write_codebooks
from lightning_compress.export.integer_trace import traced_with_integers
from lightning_compress.export.onnx import HOW_TO_GET, missing, run_onnx, to_onnx
from lightning_compress.export.program import capture, portable_copy, rounds, run_program, save_program
from lightning_compress.export.semi_structured import to_semi_structured

__all__ = ["Exported", "check_format", "export", "to_semi_structured"]

SUFFIX = {"onnx": ".onnx", "torch": ".pt2", "int8": ".onnx", "codebook": ".onnx"}

# Of the output's root mean square: what flips of codes may amount to in a network that rounds; and what no file may
# reach, as two outputs that have nothing to do with each other differ by 1.4.
_ROUNDING, _UNRELATED = 0.3, 1.0


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the file.
        format: ``"onnx"``; ``"int8"`` for ONNX with integers, ``"codebook"`` with codebooks; or ``"torch"`` for a
            torch.export program (``torch.export.load(path).module()``).
        bytes: its size, with the weights beside it where ONNX needs a second file.
        max_abs_difference: largest difference to the eager module over all outputs, on random input, or on the
            first batch of a calibration.
        dynamic_batch: whether the file takes any batch size; else that of the example input.
    """

    path: Path
    format: str
    bytes: int
    max_abs_difference: float
    dynamic_batch: bool

    def __str__(self) -> str:
        what = {"onnx": "ONNX", "torch": "torch.export", "int8": "ONNX, int8", "codebook": "ONNX, codebooks"}[
            self.format
        ]
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
    calibration: Iterable[Any] | None = None,
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
            ``"int8"`` writes ONNX in which the layers of a quantised network compute with 8-bit integers; it
            needs the extra, too. ``"codebook"`` writes ONNX in which weights of few different values are indices
            of 4 or 8 bits.
        atol: largest difference allowed, times the largest output if that is above 1. 1e-4 leaves room for
            the order of float32 sums, which ONNX Runtime changes. In a network that rounds, that order
            decides between two codes now and then, and all that follows differs: there a root mean square of
            the differences below 0.3 of the output's will do, and more in a network that makes much of a
            thousandth of its input. What calibration costs is warned of from there on.
        dynamic_batch: leave the batch size open. A network that fixes it is exported with that of the
            example.
        calibration: for ``"int8"``: batches of inputs, each like ``example_input``. With them, also what the
            network leaves in floating point beside its integer layers gets 8 bits, from the smallest to the
            largest number seen: convolutions that are added to a shortcut, inputs without a quantiser. It is
            faster, and no longer exact. The file is then compared on the first of them.

    Raises:
        ValueError: unknown format, or one that contradicts the suffix; or ``calibration`` without ``"int8"``.
        MisconfigurationException: ``"onnx"`` or ``"int8"`` without the extra; ``"int8"`` for a network in
            which nothing is quantised, ``"codebook"`` for one without codebooks.
        RuntimeError: the network cannot be captured; the file computes something else (it is removed);
            or forward hooks change what the module computes, which a file cannot hold.
    """
    path = Path(path)
    format = _choose(format, path)
    if calibration is not None and format != "int8":
        raise ValueError(f"calibration is for format='int8', got format={format!r}")
    if path.suffix != SUFFIX[format]:
        path = path.with_name(path.name + SUFFIX[format])
    path.parent.mkdir(parents=True, exist_ok=True)

    eager = portable_copy(module)
    inputs = inputs_for(eager, example_input)
    if has_watchers(module):
        _check_hooks(module, eager, example_input)
    batches = None if calibration is None else [inputs_for(eager, batch) for batch in calibration]
    if batches == []:
        raise ValueError("calibration is empty; give at least one batch, or None for a file without more 8-bit tensors")
    if format == "int8":
        clone = traced_with_integers(module, eager)
    else:
        clone = compact(eager, example_input)
        clone = traced_with_codebooks(module, clone) if format == "codebook" else clone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own internals
        program, dynamic = _capture(clone, inputs, dynamic_batch)
        if batches and not dynamic:
            batches = _cut(batches, inputs)
        if format == "torch":
            save_program(program, path)
        else:
            onnx_program = to_onnx(program)
            if format == "int8":
                _write_integers(onnx_program, batches)
            if format == "codebook":
                write_codebooks(onnx_program.model)
            onnx_program.save(path)

    args, kwargs = batches[0] if batches else _random(_resized(inputs, 3) if dynamic else inputs)
    expected = _outputs(eager, args, kwargs)
    found = run_program(path, args, kwargs) if format == "torch" else run_onnx(path, args, kwargs)
    difference, scale = _compare(found, expected)
    files = [file for file in (path, path.with_name(path.name + ".data")) if file.exists()]
    close = difference <= atol * scale  # false for nan, too
    if not close and format != "codebook" and rounds(program):
        shaken = _outputs(eager, *_shaken((args, kwargs)))
        close = _rounds_alike(found, expected, shaken, path, lossy=bool(batches))
    if not close:
        for file in files:
            file.unlink()
        raise RuntimeError(
            f"The exported {type(module).__name__} differs from the eager module by {difference:.3g} on"
            f" {'the calibration' if batches else 'random'} input; atol={atol:g} allows {atol * scale:.3g}, for"
            f" outputs up to {scale:.3g}. {path} was removed."
        )
    size = sum(file.stat().st_size for file in files)
    return Exported(path, format, size, difference, dynamic)


def check_format(format: str) -> None:
    """Raise unless files of this format can be written here; see :func:`export`."""
    if format not in ("auto", *SUFFIX):
        raise ValueError(f"format must be 'auto', 'onnx', 'torch', 'int8' or 'codebook', got {format!r}")
    if format in ("onnx", "int8", "codebook") and missing():
        raise MisconfigurationException(
            f"format={format!r} needs {', '.join(missing())}: {HOW_TO_GET}. format='torch' needs nothing more."
        )


def _choose(format: str, path: Path) -> str:
    """The format in which to write ``path``."""
    check_format(format)
    by_suffix = next((f for f, suffix in SUFFIX.items() if suffix == path.suffix), None)
    if format != "auto":
        if by_suffix is not None and path.suffix != SUFFIX[format]:
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


def _cut(batches: Sequence[Any], inputs: Any) -> list[Any]:
    """Batches as large as that of the inputs, for a network that takes no other; what is left over is dropped."""
    size = len(next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)))

    def piece(batch: Any, start: int) -> Any:
        return tree_map_only(Tensor, lambda t: t[start : start + size], batch)

    return [piece(batch, start) for batch in batches for start in range(0, len(tree_leaves(batch)[0]) - size + 1, size)]


def _random(inputs: Any) -> Any:
    """Normal noise in place of floating point inputs; others, such as token ids, keep their values."""
    generator = torch.Generator().manual_seed(0)
    return tree_map_only(
        Tensor,
        lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator) if t.is_floating_point() else t,
        inputs,
    )


def _shaken(inputs: Any) -> Any:
    """The inputs with a thousandth of noise."""
    generator = torch.Generator().manual_seed(1)
    return tree_map_only(
        Tensor,
        lambda t: t * (1 + 1e-3 * torch.randn(t.shape, generator=generator)) if t.is_floating_point() else t,
        inputs,
    )


def _outputs(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Largest difference, and the scale to judge it by: the largest finite value expected, at least 1."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf"), 1.0
    f, e = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (found, expected))
    difference = torch.where(f == e, 0.0, (f - e).abs())  # equal infinities have no difference
    return difference.max().item(), max(1.0, e.nan_to_num(0, 0, 0).abs().max().item())


def _rounds_alike(
    found: Sequence[Tensor], expected: Sequence[Tensor], shaken: Sequence[Tensor], path: Path, *, lossy: bool
) -> bool:
    """Whether a file's outputs are those of a network that rounds, but for codes that became their neighbours.

    Args:
        shaken: outputs for an input with a little noise.
        path: of the file, for a warning.
        lossy: whether it has 8 bits where the network has not; then much is only warned of.
    """
    share = _relative_rms(found, expected)
    if not share <= (_UNRELATED if lossy else _ROUNDING + 3 * _relative_rms(shaken, expected)):
        return False
    if share > _ROUNDING:
        kind, remedy = ("the calibration", ", or export without calibration") if lossy else ("random", "")
        rank_zero_warn(
            f"{path}: 8 bits tell. On {kind} input the outputs differ by {share:.0%} of their size (root mean square)."
            f" Look at the file's accuracy{remedy}."
        )
    return True


def _relative_rms(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Root mean square of the differences, as a share of that of the values; infinite for other shapes."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    f, e = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (found, expected))
    return ((f - e).norm() / e.norm()).item()


def _write_integers(onnx_program: ONNXProgram, batches: Sequence[Any] | None) -> None:
    from lightning_compress.export.integer_graph import write_integers  # imports what is in the extra

    names = [str(value.name) for value in onnx_program.model.graph.inputs]
    if batches is None:
        write_integers(onnx_program.model)
    else:
        feeds = [dict(zip(names, tree_leaves(batch), strict=True)) for batch in batches]
        write_integers(onnx_program.model, feeds)


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
