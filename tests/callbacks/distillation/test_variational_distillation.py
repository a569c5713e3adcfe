"""What the bottleneck is told, which head classifies when, and that the network stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import foreign
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress
from lightning_compress.callbacks import (
    LBC,
    QAT,
    HRank,
    KnowledgeDistillation,
    MagnitudePruning,
    VariationalDistillation,
)
from lightning_compress.callbacks.distillation.variational_distillation import (
    NAME,
    attach_bottleneck,
    detach_bottleneck,
)
from lightning_compress.core.distill.variational import posterior_divergence, self_distillation
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.quant.attach import quantized_layers
from lightning_compress.core.report import Account
from lightning_compress.core.sparse.nm import is_nm
from lightning_compress.core.surgery.record import KEY as REMEDY

FEW = {"max_epochs": 1, "limit_val_batches": 0}
SMALL: dict[str, Any] = {"z_dim": 4, "hidden": [8], "classifier_dim": 8}


@pytest.fixture(autouse=True)
def no_account(request: pytest.FixtureRequest) -> Iterator[None]:
    """Counting and timing takes longer than such a fit."""
    if "account" in request.node.name or "VD, QAT" in request.node.name:
        yield
        return
    methods = (
        "distillation.variational_distillation",
        "distillation.knowledge_distillation.callback",
        "quantization.qat",
    )
    others = "sparsity.lbc", "sparsity.magnitude_pruning", "pruning.channel_pruning"
    with ExitStack() as stack:
        for method in (*methods, *others):
            stack.enter_context(patch(f"lightning_compress.callbacks.{method}.open_account"))
        yield


def logged(module: LightningModule, name: str) -> float:
    return float(module.trainer.callback_metrics[name])


def images() -> tuple[Tensor, Tensor]:
    return next(iter(foreign.digits()))


# ---- the loss


def one_step(vd: VariationalDistillation, root: Path) -> foreign.Foreign:
    module = foreign.made()
    foreign.fit(module, root, vd, limit_train_batches=1, **FEW)
    return module


def by_hand(loss: Callable[[Tensor, Tensor, Tensor], Tensor], **sizes: Any) -> foreign.Foreign:
    """The same step in a plain loop: loss(v's logits, z's logits, labels)."""
    module = foreign.made()
    sizes = {"in_features": 8, "num_classes": 10, **SMALL, **sizes}
    attach_bottleneck(module, "net.head", "observation", sizes)
    ((optimizer,), _) = module.configure_optimizers()
    x, y = images()
    said = []
    handle = module.net.head.get_submodule(NAME).register_forward_hook(lambda *call: said.append(call[-1]))
    loss(module.train()(x), said[0], y).backward()
    handle.remove()
    optimizer.step()
    return module


@pytest.mark.parametrize(("kl_mode", "weight"), [("official", 2.0), ("kl", 0.3)])
def test_a_step_is_that_of_a_plain_loop(kl_mode: str, weight: float, tmp_path: Path) -> None:
    vd = VariationalDistillation(weight=weight, kl_mode=kl_mode, temperature=1.5, task_weight=0.5, **SMALL)
    expected = by_hand(
        lambda v, z, y: (
            F.cross_entropy(v, y)
            + (0.5 * F.cross_entropy(z, y) + weight * self_distillation(z, v.detach(), 1.5, kl_mode))
        ),
        dropout=0.5,
    )
    module = one_step(vd, tmp_path)
    foreign.assert_same(module, expected)
    assert logged(module, "train/vd/task") > 0
    assert (logged(module, "train/vd/vsd") < 0) == (kl_mode == "official")
    assert 0 <= logged(module, "vd/agreement") <= 1


def test_the_encoder_learns_through_the_bottleneck_and_the_observation_from_labels_alone(tmp_path: Path) -> None:
    """Without any weight, and with much of it: v's classifier moves alike, what makes v does not."""
    plain, taught = (one_step(VariationalDistillation(weight=w, task_weight=w, **SMALL), tmp_path) for w in (0.0, 5.0))
    assert torch.equal(plain.net.head.weight, taught.net.head.weight)
    assert not torch.equal(plain.net.stem.weight, taught.net.stem.weight)
    alone = foreign.made()
    foreign.fit(alone, tmp_path, limit_train_batches=1, **FEW)
    torch.testing.assert_close(plain.net.stem.weight, alone.net.stem.weight)


class TwoHeads(foreign.Foreign):
    """A module with a bottleneck of its own, trained by its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(8, 2)
        self.second = nn.Linear(2, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        handle = self.net.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        v = self.net(x)
        handle.remove()
        return self.second(self.narrow(seen[0])), v

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(F.cross_entropy(logits, batch[1]) for logits in self(batch[0]))


def two_heads() -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads()


def test_heads_that_a_module_has_are_taken_as_they_are(tmp_path: Path) -> None:
    module, expected = two_heads(), two_heads()
    foreign.fit(
        module, tmp_path, VariationalDistillation("net.head", "second", kl_mode="kl"), limit_train_batches=1, **FEW
    )
    assert module.state_dict().keys() == expected.state_dict().keys()
    ((optimizer,), _) = expected.configure_optimizers()
    x, y = images()
    z, v = expected.train()(x)
    (F.cross_entropy(z, y) + F.cross_entropy(v, y) + 2 * posterior_divergence(z, v.detach(), "kl")).backward()
    optimizer.step()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), parameter)
    assert "train/vd/task" not in module.trainer.callback_metrics


# ---- who speaks


@pytest.mark.parametrize("deploy", ["observation", "representation"])
def test_the_deployed_one_classifies_in_evaluation(deploy: str, tmp_path: Path) -> None:
    module = foreign.made()
    foreign.fit(module, tmp_path, VariationalDistillation(deploy=deploy, **SMALL), max_epochs=1)
    x, _ = images()
    head, seen = module.net.head, []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    evaluated = module.eval()(x)
    expected = head.get_submodule(NAME)(seen[0]) if deploy == "representation" else None
    assert torch.equal(evaluated, F.linear(seen[0], head.weight, head.bias) if expected is None else expected)
    small = inference_copy(module)
    torch.testing.assert_close(small(x), evaluated)
    trained = module.train()(x)
    handle.remove()
    assert torch.equal(trained, F.linear(seen[1], head.weight, head.bias))  # which the module's own loss trains

    left = {name for name, _ in small.named_parameters() if "head" in name}
    if deploy == "observation":
        assert left == {"net.head.weight", "net.head.bias"}
    else:
        assert left == {f"net.head.{NAME}.{n}" for n, _ in head.get_submodule(NAME).named_parameters()}


def test_the_account_tells_of_the_bottleneck(tmp_path: Path) -> None:
    for deploy, ratio in (("observation", "same"), ("representation", "more")):
        foreign.fit(foreign.made(), tmp_path, VariationalDistillation(deploy=deploy, **SMALL), **FEW)
        account = Account.load(tmp_path / "compression.json")
        assert account.notes == [f"A bottleneck with 338 parameters beside 'net.head'; deployed is the {deploy}."]
        assert (account.after.params == account.before.params) == (ratio == "same")


def test_a_last_batch_of_one_image(tmp_path: Path) -> None:
    module = foreign.made()
    trainer = foreign.make_trainer(tmp_path, VariationalDistillation(**SMALL), **FEW)
    trainer.fit(module, foreign.digits(17))
    assert trainer.global_step == 2
    norm = module.net.head.get_submodule(NAME).bottleneck.encoder[1]
    assert int(norm.num_batches_tracked) == 1


class OwnChoice(foreign.Foreign):
    """Trains the layers that its author knows."""

    def configure_optimizers(self) -> Any:
        head = [self.net.head.weight, self.net.head.bias]
        return torch.optim.SGD([*self.net.stem.parameters(), *self.net.blocks.parameters(), *head], lr=0.1)


def test_the_bottleneck_trains_whatever_the_author_chose(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = OwnChoice()
    foreign.fit(module, tmp_path, VariationalDistillation(**SMALL), **FEW)
    bottleneck = module.net.head.get_submodule(NAME).bottleneck
    assert bottleneck.encoder[0].bias.any()  # which starts at 0
    (group,) = module.trainer.optimizers[0].param_groups
    assert len({id(p) for p in group["params"]}) == len(group["params"])


# ---- what is learnt


class Perceptron(LightningModule):
    """(N, 64) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)
        self.example_input_array = torch.zeros(1, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize(("kl_mode", "weight"), [("official", 2.0), ("kl", 1.0)])
def test_the_representation_becomes_as_good_as_the_observation(kl_mode: str, weight: float, tmp_path: Path) -> None:
    """A bottleneck of four numbers, on digits that neither has seen."""
    loader = foreign.digits(1200, batch_size=1200)
    x, y = next(iter(loader))
    torch.manual_seed(0)
    module = Perceptron()
    vd = VariationalDistillation(
        kl_mode=kl_mode, weight=weight, z_dim=2, hidden=[24], classifier_dim=16, dropout=0.0, deploy="representation"
    )
    trainer = foreign.make_trainer(tmp_path, vd, max_epochs=10)
    generator = torch.Generator().manual_seed(0)
    trainer.fit(module, DataLoader(TensorDataset(x.flatten(1), y), 100, shuffle=True, generator=generator))
    held_x, held_y = next(iter(foreign.digits(500, 1200, batch_size=500)))
    with torch.no_grad():
        z = (module.eval()(held_x.flatten(1)).argmax(1) == held_y).float().mean().item()
        v = (module.train()(held_x.flatten(1)).argmax(1) == held_y).float().mean().item()
    assert v > 0.86
    assert z > v - 0.03
    assert logged(module, "vd/agreement") > 0.92


# ---- stopped, saved, fitted again


def test_another_bottleneck_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    module = foreign.made()
    foreign.fit(module, tmp_path, VariationalDistillation(deploy="representation", **SMALL), **FEW)
    foreign.fit(module, tmp_path, VariationalDistillation(**{**SMALL, "hidden": [6]}), **FEW)
    assert module.net.head.get_submodule(NAME).bottleneck.encoder[0].out_features == 6
    x, _ = images()
    evaluated = module.eval()(x)
    assert torch.equal(evaluated, inference_copy(module)(x))
    assert len(module.net.head._forward_hooks) == 1
    detach_bottleneck(module, "net.head")
    assert not module.net.head._forward_hooks
    assert not module.net.head._forward_pre_hooks
    assert module.state_dict().keys() - {REMEDY} == foreign.made().state_dict().keys()
    assert torch.equal(module(x), evaluated)


def test_a_run_is_resumed_with_its_own_bottleneck_alone(tmp_path: Path) -> None:
    foreign.fit(foreign.made(), tmp_path, VariationalDistillation(**SMALL), ModelCheckpoint(tmp_path), **FEW)
    path = next(tmp_path.glob("*.ckpt"))
    with pytest.raises(MisconfigurationException, match=r"the checkpoint has a bottleneck with .*'hidden': \[8\]"):
        foreign.fit(
            foreign.made(), tmp_path, VariationalDistillation(**{**SMALL, "hidden": [6]}), ckpt_path=path, max_epochs=2
        )


# ---- with other methods


def teacher() -> nn.Module:
    torch.manual_seed(7)
    return foreign.Network()


OTHERS: dict[str, Callable[[], Any]] = {
    "QAT": lambda: QAT(weight_bits=4, activation_bits=4),
    "LBC": lambda: LBC(n=2, m=4, end_epoch=1),
    "MagnitudePruning": lambda: MagnitudePruning(sparsity=0.5),
    "HRank": lambda: HRank(pruning_ratio=0.5, num_batches=1, rank_batch_size=16),
    "KD": lambda: KnowledgeDistillation(teacher(), {"logits": 1.0}),
}


@pytest.mark.parametrize(
    "order",
    ["QAT, VD", "VD, QAT", "LBC, VD", "VD, LBC", "MagnitudePruning, VD", "VD, MagnitudePruning", "HRank, VD", "VD, KD"],
)
def test_beside_others(order: str, tmp_path: Path) -> None:
    def fit(**kwargs: Any) -> foreign.Foreign:
        callbacks = [
            VariationalDistillation(deploy="representation", **SMALL) if name == "VD" else OTHERS[name]()
            for name in order.split(", ")
        ]
        module = foreign.made()
        torch.manual_seed(0)
        if not kwargs:
            callbacks.append(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
        foreign.fit(module, tmp_path, *callbacks, max_epochs=2, limit_train_batches=2, limit_val_batches=0, **kwargs)
        return module

    module = fit()
    assert "train/vd/vsd" in module.trainer.callback_metrics
    if "QAT" in order:
        assert "net.blocks.0.conv1" in quantized_layers(module)
    if "LBC" in order:
        assert is_nm(module.net.blocks[0].conv1.weight, 2, 4)
    if "HRank" in order:
        assert foreign.widths(module)["net.blocks.0.conv1"] == 6
    foreign.assert_same(fit(ckpt_path=tmp_path / "epoch=0.ckpt"), module)
    foreign.assert_same(lightning_compress.load(foreign.Foreign, tmp_path / "epoch=1.ckpt"), module)
    x, _ = images()
    torch.testing.assert_close(inference_copy(module)(x), module.eval()(x), atol=1e-5, rtol=0)


def test_pruning_comes_before(tmp_path: Path) -> None:
    vd = VariationalDistillation(**SMALL)
    with pytest.raises(MisconfigurationException, match="VariationalDistillation and HRank: the bottleneck has the wi"):
        foreign.fit(foreign.made(), tmp_path, vd, OTHERS["HRank"](), **FEW)
    # heads of the module's own are the pruning's business
    module = two_heads()
    foreign.fit(module, tmp_path, VariationalDistillation("net.head", "second"), OTHERS["HRank"](), **FEW)
    assert foreign.widths(module)["net.blocks.0.conv1"] == 6


# ---- what cannot be


class OnlyFeatures(foreign.Foreign):
    """Its heads do not speak in training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net.stem(batch[0]).square().mean()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (foreign.made, {"teacher_head": "net.hed"}, "teacher_head: Foreign has no module 'net.hed'. Did you mean 'net"),
        (
            foreign.made,
            {"teacher_head": "net.bn"},
            "teacher_head='net.bn': .* 'net.bn' is a BatchNorm2d. Name a linear",
        ),
        (foreign.made, {"student_head": "net.head"}, "student_head='net.head': name its teacher_head too"),
        (two_heads, {"teacher_head": "net.head", "student_head": "narrow"}, "'net.head' tells 10 .*'narrow' 2"),
        (
            two_heads,
            {"teacher_head": "net.blocks", "student_head": "second"},
            r"heads must return logits \(B, C\), but",
        ),
        (OnlyFeatures, {}, "the training step of OnlyFeatures does not call teacher_head='net.head'"),
    ],
)
def test_heads_that_cannot_be(module: Any, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = module()
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        foreign.fit(made, tmp_path, VariationalDistillation(**arguments, **SMALL), **FEW)
    assert not made.trainer.global_step if made._trainer else True
    assert "training_step" not in vars(made)


def test_features_must_be_vectors(tmp_path: Path) -> None:
    class Positions(foreign.Foreign):
        def forward(self, x: Tensor) -> Tensor:
            maps = self.net.blocks(F.relu(self.net.bn(self.net.stem(x))))
            return self.net.head(maps.flatten(2).mT).mean(1)

    with pytest.raises(
        MisconfigurationException, match=r"heads must return logits \(B, C\), but one returns \(1, 64, 10"
    ):
        foreign.fit(Positions(), tmp_path, VariationalDistillation(**SMALL), **FEW)


def test_one_is_enough(tmp_path: Path) -> None:
    both = VariationalDistillation(**SMALL), VariationalDistillation("net.head", "net.head")
    with pytest.raises(MisconfigurationException, match="two VariationalDistillation"):
        foreign.fit(foreign.made(), tmp_path, *both, **FEW)


def test_its_copy_is_whole(tmp_path: Path) -> None:
    module = foreign.made()
    foreign.fit(module, tmp_path, VariationalDistillation(deploy="representation", **SMALL), **FEW)
    copied, (x, _) = copy.deepcopy(module).eval(), images()
    expected = module.eval()(x)
    with torch.no_grad():
        module.net.head.get_submodule(NAME).bottleneck.classifier[-1].bias += 1
    torch.testing.assert_close(copied(x), expected)  # it asks its own bottleneck
