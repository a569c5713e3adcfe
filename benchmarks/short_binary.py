"""One-bit weights and activations after a short training on real data: RBNN, SiMaN, and plain signs of the weights.

    LC_DATA=~/data python benchmarks/short_binary.py --epochs 6 --batches 15 --lr 0.05

All start from the trained ResNet-20 in ``$LC_DATA/weights``, where the papers start from random weights and train for
400 epochs or more, and see the same CIFAR-10 batches in the same order, while the learning rate falls in a cosine.
RBNN's slope grows to 1 only: the paper's 10 is for the last epochs, whose learning rate is next to nothing.
Accuracies are of the first test images (`--test-batches` of 128), so half a per cent is noise. Not part of
`run_all.py`: it takes minutes and promises nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from _alternate import machine
from lightning.pytorch import Callback, LightningModule, Trainer
from short_sparse import Budget, run

from lightning_compress.callbacks import RBNN, SiMaN


class PlainSigns(RBNN):
    """RBNN without rotation: beta stays 0."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for quantizer in self._quantizers(pl_module).values():
            quantizer.rotate.data.zero_()


METHODS: dict[str, Callable[[], Callback]] = {
    "signs": lambda: PlainSigns(t_max=1.0),
    "RBNN": lambda: RBNN(t_max=1.0),
    "RBNN-through-rotation": lambda: RBNN(t_max=1.0, grad_through_rotation=True),
    "SiMaN": SiMaN,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    for name, default in vars(Budget()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args(arguments))
    budget = Budget(**{name: given[name] for name in vars(Budget())})
    print(machine(), budget)
    for name in given["methods"]:
        before, after, account = run(budget, METHODS[name](), 0)
        smaller = account.before.bytes / account.after.bytes
        print(f"{name:24} {before:.2%} -> {after:.2%}, {smaller:.1f} times fewer bytes", flush=True)


if __name__ == "__main__":
    main()
