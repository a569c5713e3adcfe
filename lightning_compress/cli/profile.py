"""`lc profile`: MACs and parameters of a network, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from torch import nn

from lightning_compress.cli.network import (
    build_network,
    described_module,
    example_of,
    network_parser,
    restored_module,
)
from lightning_compress.core.profile import measure_latency, profile


def main(args: Sequence[str]) -> None:
    """Profile a network by name or class path, or the module of a config or checkpoint."""
    parser = network_parser("profile", "Count MACs and parameters of a network, layer by layer.")
    parser.add_argument("network", nargs="?", help="resnet56, torchvision/resnet50, timm/vit_..., a class path")
    parser.add_argument("--init", nargs="*", default=[], help="its arguments, as in num_classes=100")
    parser.add_argument("--checkpoint", help="profile the network of this checkpoint")
    parser.add_argument("--convention", type=Literal["macs", "flops", "paper", "gan"], default="macs")
    parser.add_argument("--latency", action="store_true", help="measure the time of one forward as well")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(list(args))
    if given.network is not None:
        module: nn.Module | None = build_network(given.network, given.init)
    elif given.checkpoint is not None:
        module = restored_module(parser, given, given.checkpoint)
    else:
        module = described_module(parser, given)
    if module is None:
        parser.error("there is no network: give a name, as in `lc profile resnet56 --input 3,32,32`, or a checkpoint")
    example = example_of(parser, module, given.input)
    result = profile(module, example, convention=given.convention)
    latency = measure_latency(module, example) if given.latency else None
    if given.json:
        timing = {} if latency is None else {"latency": vars(latency)}
        print(json.dumps(result.to_dict() | timing, indent=1))
        return
    Console().print(result.table())
    if latency is not None:
        threads = f", threads: {latency.threads}" if latency.threads else ""
        print(f"{latency.median_ms:.2f} ms a batch of {latency.batch} ({latency.device_name}{threads})")
