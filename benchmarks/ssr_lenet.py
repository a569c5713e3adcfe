"""SSR on LeNet-5 and MNIST as its authors run it, against uniform L1-norm pruning at the same MACs.

    LC_DATA=~/data python benchmarks/ssr_lenet.py --share 0.1 --base lenet5.pt

Trains LeNet-5 first (10 epochs; the file of ``--base`` keeps it), then both methods start from it. ``--share 1`` is the
whole recipe: for each of three layers 8000 steps of search and 12,000 of fine-tuning at batch 256; a smaller share
scales both, the steps between updates of F and Y and those after which the rate falls. The baseline prunes at once and
then trains: as SSR does in its fine-tunings alone, with the same rates (its searches come on top), and for as many
steps as SSR takes in all, the rate falling at the same shares of them. Errors are of the 10,000 test images, after the
last step. Not part of `run_all.py`: it takes minutes and promises nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from _alternate import machine
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

from lightning_compress.callbacks import SSR, L1Norm
from lightning_compress.core.profile import profile
from lightning_compress.datamodules import MNIST
from lightning_compress.modules import ImageClassifier

DATA = os.environ.get("LC_DATA", ".")
IMAGE = (1, 1, 28, 28)
SEARCH, FINETUNE, DECAY, UPDATE = 8000, 12000, 4687, 200


def fit(module: ImageClassifier, steps: int, *own: Callback) -> float:
    """Train for `steps` steps and return the error on the test images in per cent."""
    seed_everything(0, verbose=False)
    data = MNIST(DATA, batch_size=256, val_size=0, mean=(0.50196,), std=(0.50196,), eval_batch_size=1000)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=-1, max_steps=steps, limit_val_batches=0, callbacks=list(own), default_root_dir=folder,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu",
        )  # fmt: skip
        trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    return 100 * (1 - float(trainer.callback_metrics["test/acc"]))


def lenet(lr: float, schedule: partial, weights: dict | None = None) -> ImageClassifier:
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    module = ImageClassifier(
        "lenet5", input_shape=IMAGE[1:], optimizer=optimizer, lr_scheduler=schedule, lr_scheduler_interval="step"
    )
    if weights is not None:
        module.network.load_state_dict(weights)
    return module


def describe(name: str, module: ImageClassifier, error: float) -> None:
    net = module.network
    cost = profile(net, IMAGE)
    with_bias = cost.macs + sum(layer.outputs for layer in cost.layers if layer.bias)
    filters = "-".join(str(len(layer.weight)) for layer in (net.conv1, net.conv2, net.fc1))
    print(f"{name:8} {filters:10} error {error:.2f} %, {with_bias:,} MACs with biases, {cost.params:,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--base", type=Path, default=Path("lenet5.pt"))
    parser.add_argument("--lambdas", type=float, nargs=3, default=(0.4, 0.15, 0.02))
    given = parser.parse_args()
    share, lambdas = given.share, given.lambdas
    search, finetune, update = (round(share * steps) for steps in (SEARCH, FINETUNE, UPDATE))
    print(machine(), given)

    seed_everything(0, verbose=False)
    base = lenet(0.05, partial(CosineAnnealingLR, T_max=2350))
    if given.base.exists():
        base.network.load_state_dict(torch.load(given.base, weights_only=True))
        describe("base", base, fit(base, 0))
    else:
        describe("base", base, fit(base, 2350))
        torch.save(base.network.state_dict(), given.base)
    weights = copy.deepcopy(base.network.state_dict())

    dense = profile(base.network, IMAGE).macs
    names = dict(zip(("*conv1", "*conv2", "*fc1"), lambdas, strict=True))
    module = lenet(0.01, partial(StepLR, step_size=round(share * DECAY), gamma=0.1), weights)
    ssr = SSR(names, steps_per_layer=search, finetune_steps=finetune, update_fy_step=update)
    steps = 3 * (search + finetune)
    describe("SSR", module, fit(module, steps, ssr))

    left = profile(module.network, IMAGE).macs / dense
    again = partial(LambdaLR, lr_lambda=lambda step: 0.1 ** (step % finetune // round(share * DECAY)))
    once = partial(StepLR, step_size=round(steps * DECAY / FINETUNE), gamma=0.1)
    for name, schedule, length in (("L1Norm", again, 3 * finetune), ("L1Norm+", once, steps)):
        module = lenet(0.01, schedule, weights)
        describe(name, module, fit(module, length, L1Norm(target_macs=left)))


if __name__ == "__main__":
    main()
