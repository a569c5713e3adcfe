"""QAT at a few bits, and LTS on top of it, after a short training on real data.

    LC_DATA=~/data python benchmarks/short_qat.py --epochs 5 --batches 16

All start from the trained network in ``$LC_DATA/weights`` and see the same CIFAR-10 batches in the same order, while
the learning rate falls in a cosine. Told are the accuracies of the network in floating point before and after as many
steps, of the quantised one before the first step and at the end, and with LTS how many weights are frozen and how many
updates were made. Accuracies are of the first test images (`--test-batches` of 128), so half a per cent is noise. Not
part of `run_all.py`: it takes minutes and promises nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from _alternate import machine
from lightning.pytorch import Callback, LightningModule, Trainer
from short_sparse import Budget, run

from lightning_compress.callbacks import LTS, QAT
from lightning_compress.core.report import close_account, open_account


class Plain(Callback):
    """Changes nothing; keeps the account that `run` reads."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            open_account(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        close_account(trainer, pl_module)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--quantizer", default="interval")
    parser.add_argument("--range-lr", type=float, default=1e-3, help="more than the paper's 1e-4, for fewer steps")
    parser.add_argument("--warmup-epochs", type=int, default=1)
    parser.add_argument("--ema", type=float, default=0.9)
    for name, default in vars(Budget()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = parser.parse_args(arguments)
    budget = Budget(**{name: getattr(given, name) for name in vars(Budget())})
    print(machine(), given)

    def line(what: str, *callbacks: Callback) -> None:
        before, after, account = run(budget, callbacks[0], 0, *callbacks[1:])
        smaller = account.before.bytes / account.after.bytes
        notes = [n for n in account.notes if n.startswith("LTS")]
        print(f"{what:24} {before:.2%} -> {after:.2%}, {smaller:.2f} times fewer bytes. {' '.join(notes)}", flush=True)

    line("floating point", Plain())
    for bits in given.bits:
        for freeze in (False, True):
            qat = QAT(bits, bits, quantizer=given.quantizer, range_lr=given.range_lr)
            lts = [LTS(warmup_epochs=given.warmup_epochs, ema=given.ema)] if freeze else []
            line(f"{bits}/{bits} {given.quantizer}{' and LTS' * freeze}", qat, *lts)


if __name__ == "__main__":
    main()
