from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader
from translation import Remembering, noise, rates, small_pix2pix, trainer

from lightning_compress.datamodules import PairedImages, PairedPhotographs
from lightning_compress.metrics import FrechetDistance
from lightning_compress.modules import Pix2Pix
from lightning_compress.networks import PatchDiscriminator, PixelDiscriminator, ResNetGenerator, UNetGenerator


def reference(module: Pix2Pix, batches: Any, lr: float, mode: str) -> list[tuple[Tensor, Tensor]]:
    """The paper's loop, as one would write it down; trains the module's networks in place. Returns (L_D, L_G)."""
    generator, judge = module.generator, module.discriminator
    to_generator, to_judge = SGD(generator.parameters(), lr), SGD(judge.parameters(), lr)

    def gan(logits: Tensor, real: bool) -> Tensor:
        target = torch.full_like(logits, float(real))
        return F.mse_loss(logits, target) if mode == "lsgan" else F.binary_cross_entropy_with_logits(logits, target)

    losses = []
    for a, b in batches:
        a, b = a.double(), b.double()
        fake = generator(a)
        loss_d = (gan(judge(torch.cat([a, fake.detach()], 1)), False) + gan(judge(torch.cat([a, b], 1)), True)) / 2
        to_judge.zero_grad()
        loss_d.backward()
        to_judge.step()
        loss_g = gan(judge(torch.cat([a, fake], 1)), True) + 100 * (fake - b).abs().mean()
        to_generator.zero_grad()
        loss_g.backward()
        to_generator.step()
        losses.append((loss_d.detach(), loss_g.detach()))
    return losses


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("mode", ["lsgan", "vanilla"])
def test_it_takes_the_steps_of_the_paper(norm: Any, mode: Any) -> None:
    networks = ResNetGenerator(ngf=3, blocks=1, norm=norm), PatchDiscriminator(6, 3, norm=norm)
    module = Pix2Pix(*networks, gan_mode=mode, optimizer=lambda p: SGD(p, 0.05), input_shape=(3, 32, 32)).double()
    other = copy.deepcopy(module)
    batches = noise(6, size=32, batch_size=2)
    expected = reference(other, batches, 0.05, mode)
    remembering = Remembering("train/discriminator", "train/generators")
    trainer(remembering, max_epochs=1, precision="64-true").fit(module, batches)
    torch.testing.assert_close(torch.tensor(remembering.values, dtype=torch.float64), torch.tensor(expected).double())
    torch.testing.assert_close(module.generator.state_dict(), other.generator.state_dict())
    torch.testing.assert_close(module.discriminator.state_dict(), other.discriminator.state_dict())


def test_the_generator_is_judged_by_the_better_discriminator() -> None:
    def weights(lr_d: float, lr_g: float = 0.01) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module = small_pix2pix(optimizer=rates(lr_g, lr_d))
        trainer(max_epochs=1, max_steps=2).fit(module, noise(2))
        return module.generator.state_dict(), module.discriminator.state_dict()

    (g, d), (g_too, d_too), (g_same, d_same) = weights(0.0), weights(0.5), weights(0.5, 0.05)
    differ = [name for name in g if name.endswith("weight") and not torch.equal(g[name], g_too[name])]
    assert len(differ) == len([name for name in g if name.endswith("weight")])
    assert not torch.equal(d["model.0.weight"], d_too["model.0.weight"])
    assert all(torch.equal(d_same[name], d_too[name]) for name in d)
    assert not torch.equal(g_same["model.1.weight"], g_too["model.1.weight"])


@pytest.mark.parametrize("mode", ["lsgan", "hinge", "wgan", "wgangp"])
def test_gradients_reach_one_side_alone(mode: Any) -> None:
    """While D steps, G has no gradient, and the reverse."""
    seen: dict[str, list[bool]] = {"generator": [], "discriminator": []}

    class Watching(Pix2Pix):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for side in seen:
                seen[side].append(any(p.grad is not None and p.grad.any() for p in getattr(self, side).parameters()))
            self.zero_grad()

    module = small_pix2pix(Watching, gan_mode=mode)
    trainer(max_epochs=1).fit(module, noise(4))
    assert seen == {"generator": [False, True] * 2, "discriminator": [True, False] * 2}
    assert all(p.requires_grad for p in module.parameters())


def test_it_learns_to_draw_photographs() -> None:
    torch.manual_seed(0)
    data = PairedPhotographs(32, samples_per_epoch=120, direction="BtoA", batch_size=4, eval_batch_size=64)
    module = Pix2Pix(
        UNetGenerator(ngf=8, downs=5, dropout=0),
        PatchDiscriminator(6, 8, layers=2, norm="batch"),
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.5, 0.999)),
        metrics=[FrechetDistance()],
        input_shape=(3, 32, 32),
    )
    run = trainer(max_epochs=1)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    drawings = torch.cat([drawing for _, drawing in data.train_dataloader()])
    guess = torch.cat([(drawing - drawings.mean(0)).abs().mean((1, 2, 3)) for _, drawing in data.val_dataloader()])
    after = run.callback_metrics
    assert after["val/l1"] < 0.6 * before["val/l1"]
    assert after["val/l1"] < guess.mean()
    assert after["val/frechet_distance"] < 0.2 * before["val/frechet_distance"]


@pytest.mark.real_data
def test_it_learns_to_build_facades() -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"crop_size": 64, "load_size": 72, "limit_items": 48}
    data = PairedImages(
        str(real_data("facades") / "facades"), **size, direction="BtoA", batch_size=4, eval_batch_size=16
    )
    module = Pix2Pix(
        UNetGenerator(ngf=8, downs=6, dropout=0),
        PatchDiscriminator(6, 8, norm="batch"),
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3, betas=(0.5, 0.999)),
        metrics=[FrechetDistance()],
        input_shape=(3, 64, 64),
    )
    run = trainer(max_epochs=3)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    assert run.callback_metrics["val/l1"] < 0.95 * before["val/l1"]
    assert run.callback_metrics["val/frechet_distance"] < 0.5 * before["val/frechet_distance"]


def test_scores_are_the_mean_over_images() -> None:
    module = small_pix2pix()
    pairs = list(noise(5, batch_size=1))
    loader = DataLoader([(a[0], b[0]) for a, b in pairs], batch_size=2)
    run = trainer()
    found = run.validate(module, loader, verbose=False)[0] | run.test(module, loader, verbose=False)[0]
    module.eval()
    with torch.no_grad():
        expected = sum((module(a) - b).abs().mean().item() for a, b in pairs) / 5
    assert found == {"val/l1": pytest.approx(expected, rel=1e-5), "test/l1": pytest.approx(expected, rel=1e-5)}


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"discriminator: .* more than 3 channels; its first convolution takes 3"):
        Pix2Pix(ResNetGenerator(ngf=2), PatchDiscriminator(3, 2))
    with pytest.raises(ValueError, match="lambda_l1: expected 0 or more, got -1"):
        Pix2Pix(ResNetGenerator(ngf=2), PatchDiscriminator(6, 2), lambda_l1=-1)
    module = small_pix2pix(generator=nn.Conv2d(3, 1, 1), discriminator=PixelDiscriminator(6, 2))
    with pytest.raises(MisconfigurationException, match=r"Conv2d makes \(2, 1, 16, 16\) of \(2, 3, 16, 16\), but the"):
        trainer().fit(module, noise(2))
    one_sided = DataLoader([[torch.zeros(3, 16, 16), None]], collate_fn=lambda batch: batch[0])
    with pytest.raises(MisconfigurationException, match=r"val batches must be .*got a list of float32, NoneType"):
        trainer().validate(small_pix2pix(), one_sided, verbose=False)
