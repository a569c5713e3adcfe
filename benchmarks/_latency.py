"""How much of the MACs that a network saves is felt: eager, and as a file in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from _alternate import Claim, best_times, milliseconds
from torch import Tensor, nn

from lightning_compress import export
from lightning_compress.core.profile import profile
from lightning_compress.export import Exported


def in_runtime(file: Exported, x: Tensor) -> Any:
    """A call that runs a file on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.path, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})


def felt(
    name: str, dense: nn.Module, students: Mapping[str, nn.Module], x: Tensor, targets: Mapping[str, float]
) -> Iterator[Claim]:
    """The ratio of latencies over the ratio of MACs, on one thread: 1 where all that is saved is felt.

    Args:
        name: of the dense network.
        dense: in eval mode.
        students: the compressed ones by name, in eval mode.
        x: one image, (1, C, H, W).
        targets: what the files of these students must reach. Of the others, and of eager mode, it is only told.
    """
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        before = in_runtime(export(dense, Path(folder) / "dense", x, format="onnx"), x)
        for i, (what, student) in enumerate(students.items()):
            after = in_runtime(export(student, Path(folder) / str(i), x, format="onnx"), x)
            saved = profile(dense, x).macs / profile(student, x).macs
            times = best_times(3, before, after, partial(dense, x), partial(student, x))
            for how, (old, new), target in (
                ("ONNX Runtime", times[:2], targets.get(what)),
                ("eager", times[2:], None),
            ):
                faster = f"{old / new:.2f} times faster, of {saved:.1f} times fewer MACs"
                yield Claim(
                    f"{name} to {what}, {how}: {faster}", old / new / saved, target, detail=milliseconds(old, new)
                )
