"""Where `lc profile` and `lc export` get their network from: a name, a config, a class, a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_compress.cli.configs import find_config
from lightning_compress.cli.lightning_cli import CompressParser, follow_data
from lightning_compress.core.example_input import first_loader
from lightning_compress.core.surgery import attach_record, load, read_checkpoint


class ModelOfConfig(ActionConfigFile):
    """`--config`: of the config of a run, only the model is taken, and the data that it follows."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            content = yaml.safe_load(find_config(values).read_text(encoding="utf-8")) or {}
        except ValueError as error:
            parser.error(str(error), error)
        if "model" not in content:
            parser.error(f"config {values!r} has no model; it has {', '.join(content) or 'nothing'}")
        parts = {key: content[key] for key in ("model", "data") if key in content}
        super().__call__(parser, namespace, yaml.safe_dump(parts), option_string)


def network_parser(command: str, description: str) -> CompressParser:
    """A parser with the options that say which network is meant."""
    parser = CompressParser(prog=f"lc {command}", description=description)
    parser.add_argument("-c", "--config", action=ModelOfConfig, help="take the model of this config (file or name)")
    parser.add_subclass_arguments(LightningModule, "model", required=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    parser.add_argument("--input", type=str, help="shape of one input, as in 3,224,224")
    return parser


def described_module(parser: CompressParser, given: Namespace) -> LightningModule | None:
    """The LightningModule of `--config` or `--model`, if there is one of these."""
    follow_data(given)
    return parser.instantiate_classes(given).get("model")


def calibration_batches(parser: CompressParser, given: Namespace, count: int) -> Iterator[torch.Tensor] | None:
    """The images of `count` training batches of `--data`, or of the data in `--config`; None for 0."""
    if not count:
        return None
    data = parser.instantiate_classes(given).get("data")
    if data is None:
        parser.error("--num-batches needs data: name a datamodule with --data, or a config that has one with --config")
    data.prepare_data()
    data.setup("fit")
    return (batch[0] for batch in islice(first_loader(data.train_dataloader()), count))


def restored_module(parser: CompressParser, given: Namespace, checkpoint: str) -> LightningModule:
    """The LightningModule of a checkpoint, as narrow as it was saved.

    A checkpoint that `lc fit` wrote knows its class and arguments; another one needs `--config` or `--model`.
    """
    content = read_checkpoint(checkpoint)
    module = described_module(parser, given)
    if module is not None:
        attach_record(module)
        module.load_state_dict(content["state_dict"])
        return module
    hyper_parameters = content.get("hyper_parameters", {})
    if "_class_path" not in hyper_parameters:
        parser.error(f"{checkpoint} does not say which class it is of; name it with --config or --model")
    # The initial weights are overwritten anyway, and their file may be gone.
    overrides = {"weights": None} if "weights" in hyper_parameters else {}
    return load(LightningModule, checkpoint, **overrides)


def build_network(name: str, init: list[str]) -> nn.Module:
    """A network from its name, or from a class path such as ``torchvision.models.resnet18``.

    Args:
        name: for `lightning_compress.networks.build`; with dots and without a slash, an import path.
        init: arguments as "key=value", the values in YAML.
    """
    arguments = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in init)}
    if "." in name and "/" not in name:
        parser = CompressParser(prog="lc profile")
        parser.add_subclass_arguments(nn.Module, "network")
        namespace = parser.parse_object({"network": {"class_path": name, "init_args": arguments}})
        return parser.instantiate_classes(namespace).network
    from lightning_compress.networks.find import build

    return build(name, **arguments)


def input_shape(parser: CompressParser, text: str | None) -> tuple[int, ...] | None:
    """ "3,224,224" or "3x224x224" as (1, 3, 224, 224)."""
    if text is None:
        return None
    try:
        return (1, *(int(size) for size in text.replace("x", ",").split(",")))
    except ValueError:
        parser.error(f"--input: expected sizes such as 3,224,224, got {text!r}")


def example_of(parser: CompressParser, module: nn.Module, text: str | None) -> tuple[int, ...] | torch.Tensor:
    """The input to try `module` with: `--input`, else its own `example_input_array`."""
    example = input_shape(parser, text)
    if example is None:
        example = getattr(module, "example_input_array", None)
    if example is None:
        parser.error("--input is needed: the shape of one input, as in --input 3,224,224")
    return example
