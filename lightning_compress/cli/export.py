"""`lc export`: a checkpoint as ONNX, with integers or without, or torch.export program, checked against the module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_compress.cli.network import calibration_batches, example_of, network_parser, restored_module
from lightning_compress.export import export


def main(args: Sequence[str]) -> None:
    """Export the network of a checkpoint; print the file, its size and its difference to the eager module."""
    parser = network_parser("export", "Write a trained model as ONNX or torch.export program, and check it.")
    parser.add_argument("checkpoint", help="checkpoint of a fit; one from `lc fit` needs no further options")
    parser.add_argument("-o", "--output", help="file to write (default: beside the checkpoint)")
    parser.add_argument("--format", type=Literal["auto", "onnx", "torch", "int8", "codebook"], default="auto")
    parser.add_argument("--num-batches", type=int, default=0, help="training batches of --data to calibrate int8 with")
    parser.add_argument("--atol", type=float, default=1e-4, help="largest difference to the eager module")
    given = parser.parse_args(list(args))
    module = restored_module(parser, given, given.checkpoint)
    example = example_of(parser, module, given.input)
    path = given.output or Path(given.checkpoint).with_suffix("")
    batches = calibration_batches(parser, given, given.num_batches)
    print(export(module, path, example, format=given.format, atol=given.atol, calibration=batches))
