"""What SSR costs: its update of F and Y against a loop over filters, and a training step with it against one without.

Update: `update_fy` on all filters of a layer at once, against the same for one filter after the other; every prunable
layer of LeNet-5 and of VGG-16. Both must give the same F and Y. Step: LeNet-5 at batch 256, forward to optimiser; with
the penalty's gradient on all prunable layers (mode "joint"), and an update every 200 steps by its share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _alternate import Claim, best_times, geometric_mean, machine, milliseconds, report
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg16

from lightning_compress.callbacks.pruning.ssr import Split, group_rows, penalty_gradient, split_rows, update_fy
from lightning_compress.networks import lenet5

REPEATS, UPDATE_FY_STEP, LAMBDA, RHO = 20, 200, 0.1, 1.0


def loop(w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One filter after the other, as the equations are written."""
    f, new = torch.zeros_like(w), torch.zeros_like(y)
    for i in range(len(w)):
        v = w[i] + y[i] / RHO
        n = float(v.norm())
        f[i] = v * max(n - LAMBDA / RHO, 0) / (n + 1e-9)
        new[i] = y[i] + RHO * (w[i] - f[i])
    return f, new


def layers(network: nn.Module) -> list[nn.Module]:
    """All but the classifier, and in VGG-16 its fully connected layers."""
    found = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return found[:3] if len(found) == 4 else [m for m in found if isinstance(m, nn.Conv2d)]


@torch.no_grad()
def update_ratios(network: nn.Module) -> list[float]:
    ratios = []
    for layer in layers(network):
        w = group_rows([layer.weight, layer.bias])  # type: ignore[list-item]
        y = 0.1 * torch.randn_like(w)
        for ours, theirs in zip(update_fy(w, y, LAMBDA, RHO), loop(w, y), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        ours, theirs = best_times(REPEATS, lambda w=w, y=y: update_fy(w, y, LAMBDA, RHO), lambda w=w, y=y: loop(w, y))
        ratios.append(theirs / ours)
    return ratios


def step_times() -> list[float]:
    """Seconds of a plain step, of one with the penalty, and of an update of F and Y, all layers of LeNet-5."""
    network = lenet5()
    images, labels = torch.randn(256, 1, 28, 28), torch.randint(10, (256,))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    rows = [[layer.weight, layer.bias] for layer in layers(network)]
    with torch.no_grad():
        splits = [Split.of(group_rows(tensors), RHO) for tensors in rows]  # type: ignore[arg-type]

    def step(pull: bool) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        if pull:
            for tensors, split in zip(rows, splits, strict=True):
                with torch.no_grad():
                    gradient = penalty_gradient(group_rows(tensors), split.f, split.y, split.rho)  # type: ignore[arg-type]
                for tensor, part in zip(tensors, split_rows(gradient, tensors), strict=True):  # type: ignore[arg-type]
                    tensor.grad.add_(part)  # type: ignore[operator, union-attr]
        optimizer.step()

    @torch.no_grad()
    def update() -> None:
        for tensors, split in zip(rows, splits, strict=True):
            update_fy(group_rows(tensors), split.y, LAMBDA, RHO)  # type: ignore[arg-type]

    return best_times(REPEATS, lambda: step(False), lambda: step(True), update)


def claims() -> Iterator[Claim]:
    torch.manual_seed(0)
    for name, network in (("LeNet-5", lenet5()), ("VGG-16", vgg16())):
        ratios = update_ratios(network)
        spread = f"{len(ratios)} layers, {min(ratios):.1f} to {max(ratios):.1f}"
        what = f"{name}: loop over filters / update of F and Y, geometric mean"
        yield Claim(what, geometric_mean(ratios), detail=spread)
    plain, pulled, update = step_times()
    searched = pulled + update / UPDATE_FY_STEP
    yield Claim("LeNet-5: step of a joint search / plain step", searched / plain, detail=milliseconds(searched, plain))


if __name__ == "__main__":
    print(machine())
    report(claims())
