from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import networks
from lightning_compress.networks import build, lenet5, load_weights
from lightning_compress.networks.find import OWN


@pytest.fixture
def net():
    return lenet5()


def differing(**changes) -> nn.Module:
    """A network with other weights, to be loaded into."""
    return lenet5(**changes)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_every_own_network_is_exported_under_its_name():
    assert all(getattr(networks, name) is function for name, function in OWN.items())


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("resnet20", "lightning_compress.networks.resnet_cifar"),
        ("resnet18", "torchvision.models.resnet"),
        ("torchvision/resnet18", "torchvision.models.resnet"),
        ("timm/resnet18", "timm.models.resnet"),
    ],
)
def test_where_names_are_looked_up(name, module):
    with torch.device("meta"):
        net = build(name, num_classes=3)
    assert type(net).__module__ == module
    assert list(net.parameters())[-1].shape == (3,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet57", "There is no network 'resnet57'. Did you mean 'resnet56'"),
        ("vgg16-cifar", "Did you mean 'vgg16_cifar'"),
        ("torchvision/resnt50", "torchvision has no network 'resnt50'. Did you mean 'resnet50'"),
        ("timm/deit_smal_patch16_224", "timm has no .* Did you mean 'deit_small_patch16_224'"),
        ("hub/resnet50", "name must be '<name>', 'torchvision/<name>' or 'timm/<name>', got 'hub/resnet50'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        build(name)


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "network.", "module.network.", "_orig_mod."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_loads_checkpoints_of_wrapped_networks(tmp_path, net, prefix, wrapped):
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "weights.pt")
    other = differing()
    assert not same(net, other)
    load_weights(other, tmp_path / "weights.pt")
    assert same(net, other)


def test_a_prefix_of_the_network_itself_stays(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = lenet5()

    net, other = Wrapped(), Wrapped()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert same(net, other)


def test_old_files_without_batch_counters_load(tmp_path):
    net = build("resnet20")
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pt")
    load_weights(net, tmp_path / "weights.pt")


def test_keys_and_shapes_must_fit(tmp_path, net):
    path = tmp_path / "weights.pt"
    state = net.state_dict()
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"shapes differ for fc2.weight, fc2.bias .*\(10, 500\) in the file, \(7, 500"):
        load_weights(differing(num_classes=7), path)
    state["fc3.bias"] = state.pop("fc2.bias")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"lacks fc2\.bias; the network has no fc3\.bias\. Did you mean 'fc2\.bias'"):
        load_weights(net, path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"lacks conv1\.weight, conv1\.bias, conv2\.weight and 5 more"):
        load_weights(net, path)


@pytest.mark.parametrize("content", [b"", b"hello, this is no checkpoint"])
def test_files_that_are_no_checkpoints(tmp_path, net, content):
    path = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match="does not exist"):
        load_weights(net, path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or holds more than plain weights"):
        load_weights(net, path)


def test_truncated_file_and_foreign_content(tmp_path, net):
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="truncated"):
        load_weights(net, path)
    torch.save({"state_dict": print}, path)
    with pytest.raises(ValueError, match="holds more than plain weights"):
        load_weights(net, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(net, path)
