from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_compress.networks import VGGFeatures


def test_it_is_the_front_of_torchvisions_vgg(tmp_path: Path) -> None:
    with torch.device("meta"):
        reference = torchvision.models.vgg16().features[:23]
    reference = reference.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    state = {
        f"features.{k}": 0.05 * torch.randn(v.shape, generator=generator) for k, v in reference.state_dict().items()
    }
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.pth")
    reference.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    network = VGGFeatures(str(tmp_path / "vgg.pth"))
    images = 2 * torch.rand(1, 3, 16, 16, generator=generator) - 1
    x, expected = (images + 1) / 2, []
    for first, last in ((0, 4), (4, 9), (9, 16), (16, 23)):
        x = reference[first:last](x)
        expected.append(x.clone())
    found = network(images)
    assert [tuple(maps.shape[1:]) for maps in found] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_random_weights_do_not_depend_on_the_global_stream() -> None:
    def weights(seed: int) -> Tensor:
        torch.rand(3)
        return torch.cat([p.flatten() for p in VGGFeatures(width=2, seed=seed).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_impossible_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path '.*none.pth' does not exist"):
        VGGFeatures(str(tmp_path / "none.pth"))
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth' does not fit Sequential: it lacks 0.weight"):
        VGGFeatures(str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"width: .* is 64, got 32"):
        VGGFeatures(str(tmp_path / "other.pth"), width=32)
    with pytest.raises(ValueError, match="width: expected 1 or more, got 0"):
        VGGFeatures(width=0)
