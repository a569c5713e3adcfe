"""DGMS after a short training on real data, against the network in floating point.

    LC_DATA=~/data python benchmarks/short_dgms.py --weight-bits 4 3 2 --epochs 2

Every run starts from the trained network in ``$LC_DATA/weights`` and sees the same CIFAR-10 batches for a few steps,
while the learning rate falls in a cosine. Told are the accuracy of the network as it is, and after these steps in
floating point; as k-means quantises it before the first step, and after the last one. Accuracies are of the first
test images (`--test-batches` of 128), so half a per cent is noise. Not part of `run_all.py`: it takes minutes and
promises nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml
from _alternate import machine
from lightning.pytorch import Callback, LightningModule, Trainer
from short_sparse import Budget, run

from lightning_compress.callbacks import DGMS
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
    parser.add_argument("init", nargs="*", help="arguments of DGMS, name=value in YAML")
    parser.add_argument("--weight-bits", nargs="+", type=int, default=[4], help="one run for each")
    for name, default in vars(Budget()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args(arguments))
    budget = Budget(**{name: given[name] for name in vars(Budget())})
    init: dict[str, Any] = {key: yaml.safe_load(value) for key, _, value in (p.partition("=") for p in given["init"])}
    print(machine(), budget, init)
    before, after, _ = run(budget, Plain(), 0)
    lines = [f"floating point: {before:.2%}, after {budget.epochs * budget.batches} steps {after:.2%}"]
    for bits in given["weight_bits"]:
        before, after, account = run(budget, DGMS(weight_bits=bits, **init), 0)
        smaller, zero = account.before.bytes / account.after.bytes, 1 - account.after.nonzeros / account.after.params
        lines.append(f"{bits} bits: {before:.2%}, then {after:.2%}; {smaller:.2f}x fewer bytes, {zero:.1%} zeros")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
