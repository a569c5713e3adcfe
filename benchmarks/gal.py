"""A step of GAL's search against the shape of the authors' code: three backward passes instead of one.

Both train the same network, masks and discriminator by the same losses on the same images. The authors' code goes back
through the masked network for the distance of the logits, again for the discriminator's verdict, and once more through
the masks for their l1 norm; GAL sums the three first. The gradients must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from _alternate import Claim, best_times, machine, milliseconds, report
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.modules import GAL
from lightning_compress.modules.pruning.gal.adversary import discriminator_loss, verdict
from lightning_compress.modules.pruning.gal.masks import begin_search

IMAGES, REPEATS = 32, 5
NETWORKS = ("resnet56", "vgg16_cifar")


class Alone(GAL):
    """GAL without a Trainer."""

    def __init__(self, network: str) -> None:
        super().__init__(network, mask_step=1)
        begin_search(self, **self._search_arguments())
        self._set_teacher(self._make_teacher().eval())
        self._trainer = SimpleNamespace(world_size=1, precision_plugin=None, current_epoch=0)
        steps = self.configure_optimizers()[0]
        self.stepped = [SimpleNamespace(optimizer=o, step=o.step, zero_grad=o.zero_grad) for o in steps]

    def optimizers(self) -> list[SimpleNamespace]:
        return self.stepped

    def manual_backward(self, loss: Tensor) -> None:
        loss.backward()

    def log(self, *args: object, **kwargs: object) -> None:
        pass

    def ours(self, images: Tensor) -> None:
        self._search_step(self.search, images, 0)

    def theirs(self, images: Tensor) -> None:
        to_discriminator, to_network, to_masks = self.stepped
        d = self.search.discriminator
        with torch.no_grad():
            trained = self.teacher(images)
        masked = self(images)
        to_discriminator.zero_grad()
        discriminator_loss(d, trained, masked.detach()).backward()
        to_discriminator.step()
        to_network.zero_grad()
        to_masks.zero_grad()
        (self.miu * F.mse_loss(masked, trained)).backward(retain_graph=True)
        verdict(d(masked), True).backward(retain_graph=True)
        (self.lambda_ * self.search.flat().abs().sum()).backward()
        to_network.step()
        to_masks.step()


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for n, p in module.named_parameters() if "discriminator" not in n])


def claims() -> Iterator[Claim]:
    for name in NETWORKS:
        images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        one = Alone(name)
        torch.manual_seed(0)
        other = Alone(name)
        one.ours(images)
        other.theirs(images)
        difference = (gradients(one) - gradients(other)).norm() / gradients(other).norm()
        assert difference < 1e-3, f"gradients differ by {difference:.1e}"
        ours, theirs = best_times(REPEATS, lambda m=one, x=images: m.ours(x), lambda m=other, x=images: m.theirs(x))
        what = f"{name}, batch {IMAGES}: GAL's search step / with three backward passes"
        yield Claim(what, ours / theirs, 0.75, at_most=True, detail=milliseconds(ours, theirs))


if __name__ == "__main__":
    print(machine())
    report(claims())
