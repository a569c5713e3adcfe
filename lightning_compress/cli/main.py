"""Entry point of `lc`: sends each command to its module, so that a command imports only what it needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning_compress._version import __version__
from lightning_compress.core.select import did_you_mean

COMMANDS = {
    "fit": "train a model, with compression callbacks",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "predict on the prediction data",
    "methods": "list the compression methods",
    "configs": "list the packaged configs, or print one",
    "profile": "count MACs and parameters of a network, layer by layer",
    "export": "write a trained model as ONNX or torch.export program, and check it",
    "report": "make one HTML page of finished runs",
    "schema": "print a JSON schema of the configs, for editors",
}

# By name, since importing Lightning to get at its class would take seconds.
ARGUMENT_ERRORS = ("ValueError", "FileNotFoundError", "RuntimeError", "MisconfigurationException")

HELP = """\
usage: lc COMMAND [OPTION...]

Compression methods for PyTorch Lightning.

commands:
{commands}

Start with:   lc fit --config quickstart
Options of a command:   lc COMMAND --help
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: command line without the program's name; None takes it from `sys.argv`.

    Raises:
        SystemExit: with code 2 and a message on standard error, when the command line, a config or an
            argument cannot be right.
    """
    try:
        _dispatch(sys.argv[1:] if args is None else list(args))
    except BrokenPipeError:  # `lc methods | head`: whoever read this has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # jsonargparse wraps what a class raises
            reason = reason.__cause__
        if not _is_complete(reason):
            raise
        sys.exit(fail(str(reason)))


def _dispatch(args: list[str]) -> None:
    command, rest = (args[0], args[1:]) if args else ("--help", [])
    match command:
        case "-h" | "--help":
            width = max(map(len, COMMANDS)) + 2
            commands = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
            print(HELP.format(commands=commands), end="")
        case "--version":
            print(f"lightning-compress {__version__}")
        case "methods":
            from lightning_compress.cli import methods

            methods.main(rest)
        case "configs":
            from lightning_compress.cli import configs

            configs.main(rest)
        case "profile":
            from lightning_compress.cli import profile

            profile.main(rest)
        case "export":
            from lightning_compress.cli import export

            export.main(rest)
        case "report":
            from lightning_compress.cli import report

            report.main(rest)
        case "schema":
            from lightning_compress.cli import schema

            schema.main(rest)
        case "fit" | "validate" | "test" | "predict":
            # Before torch is loaded: where other programs want the cores too, threads that wait for each other in
            # a busy loop make a step twenty times slower than threads that sleep.
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
            from lightning_compress.cli import lightning_cli

            lightning_cli.main(args)
        case _:
            sys.exit(fail(f"unknown command {command!r}.{did_you_mean(command, COMMANDS)} See lc --help."))


def _is_complete(error: BaseException) -> bool:
    """Whether the message says it all: this package itself raised the error, about something it was given."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals["__name__"] if traceback else ""
    return module.startswith("lightning_compress.") and type(error).__name__ in ARGUMENT_ERRORS


def fail(message: str) -> int:
    """Print `message` as the reason why a command cannot run; returns the exit code for that, 2."""
    print(f"lc: error: {message}", file=sys.stderr)
    return 2
