"""The projections of one ADMM update of ResNet-50 against a Python loop over kernels, the shape of public code.

All layers that PCONV compresses: patterns of the 3x3 convolutions, connectivity of these and of the 1x1 convolutions,
equally many kernels in every filter. The loop takes minutes, so it runs on the first filters of each layer and its time
is multiplied by their share; what it returns for these filters must be equal. Weights are random.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from _alternate import Claim, best_times, machine, milliseconds, report
from torch import Tensor
from torchvision.models import resnet50

from lightning_compress import profile
from lightning_compress.callbacks.sparsity.pconv import find_rules, named_library
from lightning_compress.core.sparse.patterns import kept_count, project_connectivity, project_patterns

RATE, LOOP_KERNELS, REPEATS = 3.6, 1_000, 5


def loop_patterns(weight: Tensor, library: Tensor) -> Tensor:
    out = weight.clone()
    masks = library.numpy().astype(np.float32)
    for kernel in out.flatten(0, 1):
        flat = kernel.view(-1).numpy()
        flat *= masks[np.argmax([np.square(flat * mask).sum() for mask in masks])]
    return out


def loop_connectivity(weight: Tensor, rate: float) -> Tensor:
    out = weight.clone()
    for kernels in out:
        norms = [np.linalg.norm(kernel.numpy()) for kernel in kernels]
        for channel in np.argsort(norms, kind="stable")[: len(norms) - kept_count(len(norms), rate)]:
            kernels[channel] = 0
    return out


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    network = resnet50()
    names = [layer.name for layer in profile(network, (1, 3, 224, 224)).layers if layer.kind == "conv"]
    rules, _ = find_rules(network, names, RATE)
    library = named_library("natural8")
    times = {"patterns": [0.0, 0.0], "connectivity": [0.0, 0.0]}
    for name, rule in rules.items():
        weight = network.get_submodule(name).weight.detach()
        few = max(1, LOOP_KERNELS // weight.shape[1])
        share = len(weight) / len(weight[:few])
        jobs = {"connectivity": (lambda w: project_connectivity(w, RATE), lambda w: loop_connectivity(w, RATE))}
        if rule.patterns:
            jobs["patterns"] = (lambda w: project_patterns(w, library), lambda w: loop_patterns(w, library))
        for what, (ours, loop) in jobs.items():
            assert torch.equal(ours(weight)[:few], loop(weight[:few])), f"{what} of {name} differ"
            fast, slow = best_times(REPEATS, lambda: ours(weight), lambda: loop(weight[:few]))  # noqa: B023
            times[what][0] += fast
            times[what][1] += slow * share
    for what, (fast, slow) in times.items():
        yield Claim(f"ResNet-50: loop over kernels / {what}", slow / fast, detail=milliseconds(fast, slow))
    fast, slow = (sum(values) for values in zip(*times.values(), strict=True))
    yield Claim(
        "ResNet-50: loop over kernels / all projections of an update", slow / fast, 50, detail=milliseconds(fast, slow)
    )


if __name__ == "__main__":
    print(machine())
    report(claims())
