"""How long the command line takes to answer, as a whole process.

`lc methods` and `lc configs` import no torch. `lc fit --help` imports Lightning as every LightningCLI does; what this
package adds on top is what counts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from _alternate import Claim, best_times, machine, milliseconds, report

REPEATS = 3
IMPORT = [sys.executable, "-c", "import lightning.pytorch"]
BARE = [sys.executable, "-c", "from lightning.pytorch.cli import LightningCLI; LightningCLI()", "fit", "--help"]


def lc(*args: str) -> list[str]:
    return [sys.executable, "-m", "lightning_compress", *args]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def claims() -> Iterator[Claim]:
    commands = (IMPORT, BARE, lc("methods"), lc("configs"), lc("fit", "--help"))
    for command in commands:  # compile bytecode, fill the disk's cache
        run(command)
    imported, bare, methods, configs, fit = best_times(REPEATS, *(partial(run, command) for command in commands))
    for name, seconds in (("methods", methods), ("configs", configs)):
        yield Claim(
            f"`lc {name}` / `import lightning.pytorch`",
            seconds / imported,
            0.2,
            at_most=True,
            detail=milliseconds(seconds, imported),
        )
    yield Claim(
        "`lc fit --help` / a bare LightningCLI's", fit / bare, 1.3, at_most=True, detail=milliseconds(fit, bare)
    )
    yield Claim(
        "`lc fit --help` / `import lightning.pytorch`",
        fit / imported,
        1.3,
        at_most=True,
        detail=milliseconds(fit, imported),
    )


if __name__ == "__main__":
    print(machine())
    report(claims())
