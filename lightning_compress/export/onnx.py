"""Write a captured program as an ONNX file and run it with ONNX Runtime.

Needs the extra ``export`` (onnx, onnxscript, onnxruntime); importing this file needs none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram
from torch.utils._pytree import tree_leaves

from lightning_compress.export.packed import with_portable_bits

HOW_TO_GET = "pip install 'lightning-compress[export]'"


def missing() -> list[str]:
    """The packages of the extra that are not installed.

    >>> missing()
    []
    """
    return [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]


def to_onnx(program: ExportedProgram) -> ONNXProgram:
    """``program`` in ONNX; ``.save(path)`` writes one file, above ONNX's limit of 2 GB with weights in ``<path>.data``.

    Inputs keep the names of the forward's arguments, an open first dimension is called ``batch``, and a
    single output is called ``output``.
    """
    onnx_program = torch.onnx.export(with_portable_bits(program), dynamo=True, verbose=False)
    assert onnx_program is not None
    graph = onnx_program.model.graph
    if len(graph.outputs) == 1:
        graph.outputs[0].name = "output"
    symbol = next(
        (value.shape[0] for value in graph.inputs if value.shape and not isinstance(value.shape[0], int)),
        None,
    )
    for shape in (value.shape for value in (*graph.inputs, *graph.outputs) if value.shape is not None):
        for axis, size in enumerate(shape):
            if symbol is not None and size == symbol:
                shape[axis] = "batch"
    for node in graph:
        node.metadata_props.clear()  # where in the Python code it came from: a quarter of a small network's file
    return onnx_program


def session_of(path: Path) -> Any:
    """An `onnxruntime.InferenceSession` of a file, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Run an ONNX file in ONNX Runtime on the CPU: the tensors it puts out, in order."""
    session = session_of(path)
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    feed = {entry.name: tensor.numpy() for entry, tensor in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]
