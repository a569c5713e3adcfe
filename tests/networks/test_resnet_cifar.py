from __future__ import annotations

import numpy as np
import pytest
import torch
from real_data import real_data
from torch import nn

from lightning_compress.networks import ChannelShortcut, CIFARResNet, load_weights, resnet20, resnet56

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_every_stage_begins_with_a_channel_shortcut(depth):
    net = CIFARResNet(depth)
    for stage in (net.layer1, net.layer2, net.layer3):
        assert isinstance(stage[0].shortcut, ChannelShortcut)
        assert all(isinstance(block.shortcut, nn.Identity) for block in stage[1:])
    assert [len(stage) for stage in (net.layer1, net.layer2, net.layer3)] == [(depth - 2) // 6] * 3


def test_state_dict_keys_are_those_of_public_checkpoints():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = ["conv1.weight", *(f"bn1.{x}" for x in norm), "linear.weight", "linear.bias"]
    for stage in (1, 2, 3):
        for block in range(3):
            for i in (1, 2):
                expected += [f"layer{stage}.{block}.conv{i}.weight"]
                expected += [f"layer{stage}.{block}.bn{i}.{x}" for x in norm]
    assert set(resnet20().state_dict()) == set(expected)


def test_stem_and_stages_may_have_any_widths():
    net = CIFARResNet(20, widths=(12, 10, 30, 40)).eval()
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_depth_is_checked():
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 .*, got 18"):
        CIFARResNet(18)


@pytest.mark.real_data
@pytest.mark.parametrize(("build", "correct"), [(resnet20, 915), (resnet56, 926)])
def test_public_weights(build, correct):
    """On the first 1,000 test images; all 10,000 give 91.73 % and 93.39 %, as published."""
    data = real_data("cifar10.npz", f"weights/{build.__name__}-cifar10.pt")
    net = build().eval()
    load_weights(net, data / "weights" / f"{build.__name__}-cifar10.pt")
    with np.load(data / "cifar10.npz") as file:
        images, labels = file["x_test"][:1000], file["y_test"][:1000]
    x = ((torch.from_numpy(images).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        predicted = torch.cat([net(part).argmax(1) for part in x.split(250)])
    # Two images more or less are left to the order of floating-point sums.
    assert int((predicted == torch.from_numpy(labels)).sum()) == pytest.approx(correct, abs=2)
