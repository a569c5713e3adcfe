"""`lc fit`, `validate`, `test`, `predict`: LightningCLI with this package's classes and configs at hand."""

from __future__ import annotations

import re
import warnings
from functools import partial
from inspect import signature
from pydoc import locate
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch import cli as lightning

# Short class names resolve for classes that are imported.
from lightning_compress import __version__, datamodules, modules  # noqa: F401
from lightning_compress.callbacks import RestoreCompressed
from lightning_compress.cli.configs import find_config
from lightning_compress.cli.errors import explain
from lightning_compress.cli.main import fail

FROM_DATA = ("num_classes", "input_shape", "scale")


def main(args: list[str]) -> None:
    """Run a Trainer command: `args` is the command line without the program's name, command first."""
    # Lightning 2.6 with torch 2.15 warns about Lightning itself.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    CompressCLI(args=args)


class PackagedConfig(ActionConfigFile):
    """`--config`: a path, or the short name of a packaged config."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if re.fullmatch(r"[\w./\\~:-]+", values):  # otherwise it is YAML, given in place
            try:
                values = str(find_config(values))
            except ValueError as error:
                parser.error(str(error), error)
        super().__call__(parser, namespace, values, option_string)


class CompressParser(lightning.LightningArgumentParser):
    """Parser whose errors are one line that names the nearest valid words."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(fail(explain(message)))


class CompressCLI(lightning.LightningCLI):
    """LightningCLI for every LightningModule and datamodule, with `RestoreCompressed` always there.

    Args:
        args: command line without the program's name, command first.
        run: False only builds `.model`, `.datamodule` and `.trainer` (then no command comes first).
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            # Without it a checkpoint of a pruned network does not fit the network that the config builds.
            trainer_defaults={"callbacks": RestoreCompressed()},
            seed_everything_default=0,
            parser_class=CompressParser,
            parser_kwargs={"prog": "lc"} if run else {},
            args=args,
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> lightning.LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning-compress=={__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=PackagedConfig, help="A YAML file, or the name of a packaged config."
        )
        return parser

    def parse_arguments(self, parser: lightning.LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is.

        Lightning lets the checkpoint's settings overrule it: a second stage with another learning rate would
        silently run with the old one.
        """

    def before_instantiate_classes(self) -> None:
        follow_data(self.config[self.subcommand] if self.subcommand else self.config)

    def _instantiate_trainer(self, config: Any, callbacks: list[Callback]) -> Trainer:
        """Put `RestoreCompressed` first: what copies or extends the network must see its final structure."""
        trainer = super()._instantiate_trainer(config, callbacks)
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RestoreCompressed))  # type: ignore[attr-defined]
        return trainer

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Build `--optimizer` when the Trainer asks for it, not here.

        Lightning builds it at once, before any callback's `setup`; layers that a callback replaces there
        would be trained as orphans.
        """
        optimizer = self._get(self.config_init, "optimizer")
        if not optimizer:
            return
        scheduler = self._get(self.config_init, "lr_scheduler")
        # Not a bound method: pickle would look that up on the class, and find the module's own.
        self.model.configure_optimizers = partial(_configure_optimizers, self.model, optimizer, scheduler)


def follow_data(config: Namespace) -> None:
    """Take the model's classes, input shape and scale from the data, where the config leaves their defaults."""
    model, data = config.get("model"), config.get("data")
    if not (model and data):
        return
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    datamodule = parser.instantiate_classes(parser.parse_object({"data": data})).data
    defaults = signature(locate(model.class_path)).parameters  # type: ignore[arg-type]
    for name in FROM_DATA:
        given = model.get("init_args", {}).get(name)
        if name in defaults and given == defaults[name].default and hasattr(datamodule, name):
            model.init_args[name] = getattr(datamodule, name)


def _configure_optimizers(model: LightningModule, optimizer: Any, lr_scheduler: Any) -> Any:
    """What `LightningModule.configure_optimizers` returns, from parsed settings."""
    built = lightning.instantiate_class(model.parameters(), optimizer)
    scheduler = lightning.instantiate_class(built, lr_scheduler) if lr_scheduler else None
    return CompressCLI.configure_optimizers(model, built, scheduler)
