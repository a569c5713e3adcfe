"""A teacher is looked at and nothing else; what is asked of a layer is what the layer gets."""

from __future__ import annotations

import copy
import warnings

import foreign
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import parametrize

from lightning_compress.core.distill.taps import InputTap, input_at
from lightning_compress.core.distill.teacher import Teacher


class Network(nn.Module):
    """Notes which layers ran."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(4)
        self.ran: list[str] = []

    def forward(self, x, factor=1.0):
        self.ran.append("head")
        x = self.norm(self.head(x)) * factor
        x = self.tail(x)
        self.ran.append("tail")
        return x


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


X = torch.arange(6.0).view(2, 3)


def test_is_a_frozen_copy_in_eval_mode():
    own = network()
    teacher = Teacher(own)
    assert own.training
    assert all(p.requires_grad for p in own.parameters())
    assert not teacher.network.training
    assert not any(p.requires_grad for p in teacher.network.parameters())
    with torch.no_grad():
        own.head.weight.add_(1)
    torch.testing.assert_close(teacher(X), network().eval()(X))
    assert not teacher(X).requires_grad
    assert torch.equal(teacher.network.norm.running_mean, torch.zeros(4))


def test_has_the_values_of_parametrised_weights_and_no_hooks():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    own, plain = network(), network()
    parametrize.register_parametrization(own.head, "weight", Twice())
    own.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    with torch.no_grad():
        plain.head.weight.mul_(2)
    teacher = Teacher(own)
    torch.testing.assert_close(teacher(X), plain.eval()(X))
    assert type(teacher.network.head) is nn.Linear


def test_gives_the_input_of_a_layer_and_computes_no_further():
    teacher, plain = Teacher(network()), network().eval()
    torch.testing.assert_close(teacher.input_at("tail", X, factor=3.0), 3 * plain.norm(plain.head(X)))
    assert teacher.network.ran == ["head"]
    assert not teacher.network.tail._forward_pre_hooks
    teacher(X)
    assert teacher.network.ran == ["head", "head", "tail"]


def test_a_layer_that_is_not_reached():
    with pytest.raises(LookupError, match="Network computes without its layer 'unused'"):
        input_at(network(), "unused", X)


def test_a_tap_keeps_what_training_gave():
    own = network()
    tap = InputTap(own)
    with torch.no_grad():
        own(X)
    assert tap.take() is None
    own.eval()(X, factor=2.0)
    assert tap.take() == ((X,), {"factor": 2.0})
    assert tap.take() is None
    own(X)
    tap.remove()
    assert tap.take() is None
    assert not own._forward_pre_hooks


# ---- files


def test_is_read_from_a_file(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(network(1).state_dict(), path)
    like = network(0)
    teacher = Teacher.from_file(path, like)
    foreign.assert_same(teacher.network, network(1))
    foreign.assert_same(like, network(0))
    assert teacher.source == str(path)
    import hashlib

    assert teacher.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_is_read_from_a_checkpoint_that_holds_more(tmp_path):
    path = tmp_path / "module.ckpt"
    module = nn.ModuleDict({"net": network(1), "metric": nn.Linear(1, 1)})
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, path)
    foreign.assert_same(Teacher.from_file(path, network(0), prefix="net").network, network(1))
    with pytest.raises(ValueError, match=r"teacher: .*does not fit Network"):
        Teacher.from_file(path, network(0), prefix="model")


def test_a_file_that_is_not_there_or_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"teacher: path '.*none.pt' does not exist"):
        Teacher.from_file(tmp_path / "none.pt", network())
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"teacher: .*it lacks head.weight"):
        Teacher.from_file(tmp_path / "other.pt", network())
    (tmp_path / "cut.pt").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"teacher: .*truncated"):
        Teacher.from_file(tmp_path / "cut.pt", network())


# ---- a run that goes on


def test_says_which_it_is():
    one, same, other = Teacher(network(0)), Teacher(network(0)), Teacher(network(1))
    assert one.sha256 == same.sha256 != other.sha256
    assert one.state_dict() == {"source": "", "sha256": one.sha256}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(one.state_dict())
    with pytest.warns(UserWarning, match=rf"is weights \(SHA-256 {other.sha256[:12]}\), but this run began"):
        other.load_state_dict(one.state_dict())
    foreign.assert_same(other.network, network(1))


def test_takes_weights_that_a_checkpoint_holds():
    one, other = Teacher(network(0)), Teacher(network(1))
    state = copy.deepcopy(one.state_dict(weights=True))
    other.load_state_dict(state)
    foreign.assert_same(other.network, one.network)
    assert other.sha256 == one.sha256
    with pytest.raises(MisconfigurationException, match="teacher in the checkpoint does not fit"):
        Teacher(nn.Linear(2, 2)).load_state_dict(state)
