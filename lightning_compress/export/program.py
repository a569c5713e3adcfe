"""Capture a module as a torch.export program; save it as ``.pt2`` and run what was saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from lightning_compress.core.inference_copy import inference_copy

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def portable_copy(module: nn.Module) -> nn.Module:
    """An ``inference_copy`` on the CPU, with half precision as float32."""
    clone = inference_copy(module).cpu()
    return clone._apply(lambda t: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t)


def capture(module: nn.Module, args: Args, kwargs: Kwargs, *, dynamic_batch: bool) -> ExportedProgram:
    """Capture ``module``, in eval mode, on these arguments. Parameters that no operator reads are dropped
    from it.

    Args:
        module: what to capture; a copy, since parameters that are not used are removed from it.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.
        dynamic_batch: leave the first dimension of every input open, which must be 2 or more in ``args``.

    Raises:
        RuntimeError: the module cannot be captured, for one because it fixes the size of the batch.
    """
    shapes = None
    if dynamic_batch:
        shapes = ShapesCollection()
        for tensor in tree_leaves((args, dict(kwargs))):
            if isinstance(tensor, Tensor) and tensor.ndim:
                shapes[tensor] = {0: Dim.DYNAMIC}
    while True:
        with torch.no_grad():
            program = torch.export.export(module, args, dict(kwargs), dynamic_shapes=shapes, strict=False)
        if not _drop_unused(module, program):
            break
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # file names of this machine are nobody's business elsewhere
    return program


def rounds(program: ExportedProgram) -> bool:
    """Whether a program has steps: a number that changes by next to nothing may change its output by much."""
    steps = ("round", "floor", "ceil", "sign", "ge", "gt", "le", "lt", "_symbolic")
    return any(
        str(getattr(node.target, "overloadpacket", "")).rpartition(".")[2] in steps
        and any(_is_float(argument) for argument in node.all_input_nodes)
        for node in program.graph.nodes
    )


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def save_program(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def run_program(path: Path, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """Load a saved program and run it: the tensors it puts out, in order."""
    with torch.no_grad():
        output = torch.export.load(path).module()(*args, **kwargs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _drop_unused(module: nn.Module, program: ExportedProgram) -> bool:
    """Remove from ``module`` the parameters that ``program`` does not read, such as an auxiliary head."""
    read = {node.name for node in program.graph.nodes if node.users}
    unread = {
        spec.target: module.get_parameter(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER and spec.arg.name not in read
    }
    owners = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    unread = {name: p for name, p in unread.items() if owners[id(p)] == 1}  # a shared one is read under another name
    for name in unread:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, None)
    return bool(unread)
