from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from lightning_compress.core.profile import profile
from lightning_compress.networks import ReIDSmall, build, reid_resnet50, reid_small
from lightning_compress.networks.find import build_trunk
from lightning_compress.networks.reid_resnet import ChannelAttention, channel_attention, load_trunk


def test_the_trunk_is_torchvisions_without_its_classifier() -> None:
    with torch.device("meta"):
        trunk, whole = reid_resnet50(), resnet50()
    ours, theirs = ({k: v.shape for k, v in net.state_dict().items()} for net in (trunk, whole))
    assert ours.keys() - theirs.keys() == {f"attention{stage}.gamma" for stage in (2, 3, 4)}
    assert theirs.keys() - ours.keys() == {"fc.weight", "fc.bias"}
    assert all(ours[key] == theirs[key] for key in ours.keys() & theirs.keys())
    assert sum(p.numel() for p in trunk.parameters()) == sum(p.numel() for p in whole.parameters()) - 2_049_000 + 3


def test_the_last_stage_keeps_the_resolution() -> None:
    with torch.device("meta"):
        trunk = reid_resnet50()
        assert trunk(torch.zeros(2, 3, 256, 128)).shape == (2, 2048, 16, 8)
    strided = [n for n, m in trunk.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert strided == ["conv1", "layer2.0.conv2", "layer2.0.downsample.0", "layer3.0.conv2", "layer3.0.downsample.0"]
    # two products of C^2 H W for each attention: 256 at 64x32, 512 at 32x16, 1024 at 16x8
    cost = profile(trunk.eval(), (1, 3, 256, 128))
    assert cost.macs == 4_858_576_896
    attention = sum(layer.macs for layer in cost.layers if layer.type == "ChannelAttention")
    assert attention == 2 * sum(c * c * h * w for c, h, w in ((256, 64, 32), (512, 32, 16), (1024, 16, 8)))


def test_attention_shares_sum_to_one_and_favour_the_unlike() -> None:
    """... and are those of a loop over rows."""
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    maps = x.flatten(2)
    energy = maps @ maps.mT
    shares = channel_attention(energy)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 5))
    assert torch.equal(shares.argmin(-1), energy.argmax(-1))
    assert torch.equal(shares.argmax(-1), energy.argmin(-1))
    attention = ChannelAttention()
    attention.gamma.data.fill_(0.5)
    for image, out in zip(x, attention(x), strict=True):
        for c in range(5):
            inner = torch.stack([(image[c] * image[d]).sum() for d in range(5)])
            weights = torch.exp(-inner) / torch.exp(-inner).sum()
            expected = 0.5 * sum(w * image[d] for d, w in enumerate(weights)) + image[c]
            torch.testing.assert_close(out[c], expected)


def test_attention_changes_nothing_at_the_start() -> None:
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(ChannelAttention()(x), x)


def test_attention_is_taken_in_float32() -> None:
    """Inner products of thousands of pixels, rounded to bfloat16, would choose other channels."""
    x = torch.randn(1, 16, 64, 32, generator=torch.Generator().manual_seed(0)) + 1
    attention = ChannelAttention()
    attention.gamma.data.fill_(1.0)
    expected = attention(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=0.01)


def test_a_small_trunk() -> None:
    trunk = reid_small()
    assert trunk(torch.zeros(2, 3, 16, 16)).shape == (2, 64, 8, 8)
    assert sum(isinstance(m, ChannelAttention) for m in trunk.modules()) == 2
    assert sum(p.numel() for p in trunk.parameters()) == 23_698


def test_weights_of_a_classifier_start_a_trunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = ReIDSmall((4, 8))
    state = {k: v for k, v in given.state_dict().items() if not k.endswith("gamma")}
    torch.save({**state, "fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}, tmp_path / "classifier.pt")
    trunk = ReIDSmall((4, 8))
    load_trunk(trunk, tmp_path / "classifier.pt")
    assert all(torch.equal(trunk.state_dict()[key], value) for key, value in given.state_dict().items())
    with pytest.raises(ValueError, match=r"weights: .*does not fit ReIDSmall: shapes differ for"):
        load_trunk(ReIDSmall((4, 16)), tmp_path / "classifier.pt")


def test_trunks_by_name() -> None:
    assert build("reid_small", widths=(8, 16))(torch.zeros(1, 3, 8, 8)).shape == (1, 16, 8, 8)
    assert build_trunk("timm/resnet10t")(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    with pytest.raises(ValueError, match=r"backbone: expected 'reid_resnet50', 'reid_small' or 'timm/<name>'.*mean"):
        build_trunk("reid_resnet5")
