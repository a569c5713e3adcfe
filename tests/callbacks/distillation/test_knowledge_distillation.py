"""The teacher is asked about what the student sees, what it says is learnt, and nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import foreign
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lightning_compress
from lightning_compress.callbacks import HRank, KnowledgeDistillation, L1Norm
from lightning_compress.callbacks.distillation.knowledge_distillation.student import CONNECTORS
from lightning_compress.catalog import Row, card
from lightning_compress.cli.configs import find_config
from lightning_compress.core.distill import losses
from lightning_compress.core.inference_copy import inference_copy
from lightning_compress.core.profile import profile
from lightning_compress.core.report import Account
from lightning_compress.core.sparse.layers import weight_layers
from lightning_compress.modules import ImageClassifier
from lightning_compress.networks import CIFARResNet, DigitsKernel, build

FEW = {"max_epochs": 1, "limit_val_batches": 0}


@pytest.fixture(autouse=True)
def no_account(request: pytest.FixtureRequest) -> Iterator[None]:
    """Counting and timing the student takes longer than such a fit."""
    if "account" in request.node.name or "hints_are_learnt" in request.node.name:
        yield
        return
    with patch("lightning_compress.callbacks.distillation.knowledge_distillation.callback.open_account"):
        yield


def teacher(seed: int = 7) -> nn.Module:
    """Of the student's kind, with statistics in its batch norms."""
    torch.manual_seed(seed)
    network = foreign.Network()
    for _ in range(3):
        network(torch.rand(16, 1, 8, 8))
    return network


class Counted(nn.Module):
    """Notes how often and in which state it is called."""

    calls: list[tuple[bool, bool, torch.dtype, bool]] = []

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(x)
        contiguous = x.is_contiguous(memory_format=torch.channels_last)
        Counted.calls.append((self.training, torch.is_inference_mode_enabled(), out.dtype, contiguous))
        return out


@pytest.fixture
def counted() -> Counted:
    Counted.calls = []
    return Counted(teacher())


def logged(module: LightningModule, name: str) -> float:
    return float(module.trainer.callback_metrics[name])


# ---- the loss


def one_step(kd: KnowledgeDistillation, root: Path) -> foreign.Foreign:
    module = foreign.made()
    foreign.fit(module, root, kd, limit_train_batches=1, **FEW)
    return module


def by_hand(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> foreign.Foreign:
    """The same step in a plain loop: loss(task, student, teacher, labels)."""
    module, expert = foreign.made(), teacher().eval()
    ((optimizer,), _) = module.configure_optimizers()
    x, y = next(iter(foreign.digits()))
    logits = module.train()(x)
    with torch.no_grad():
        theirs = expert(x)
    loss(F.cross_entropy(logits, y), logits, theirs, y).backward()
    optimizer.step()
    return module


def test_a_step_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    kd = KnowledgeDistillation(teacher(), {"logits": 0.9}, task_weight=0.1, temperature=3.0)
    foreign.assert_same(
        one_step(kd, tmp_path),
        by_hand(lambda task, s, t, y: task + (-0.9 * task + 0.9 * losses.soft_targets(s, t, 3.0))),
    )


def test_terms_add_up_and_are_logged(tmp_path: Path) -> None:
    kd = KnowledgeDistillation(teacher(), {"target": 1.0, "non_target": 8.0})
    module = one_step(kd, tmp_path)
    expected = by_hand(
        lambda task, s, t, y: task + losses.target_class(s, t, y, 4.0) + 8 * losses.non_target_classes(s, t, y, 4.0)
    )
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), parameter)
    assert logged(module, "train/kd/target") > 0
    assert 0 <= logged(module, "kd/agreement") <= 1


def test_without_the_task_no_label_counts(tmp_path: Path) -> None:
    module, other = foreign.made(), foreign.made()
    for one, labels in ((module, lambda y: y), (other, lambda y: 9 - y)):
        batches = [(x, labels(y)) for x, y in foreign.digits()]
        trainer = foreign.make_trainer(tmp_path, KnowledgeDistillation(teacher(), task_weight=0.0), **FEW)
        trainer.fit(one, DataLoader(batches, batch_size=None))
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter)


def test_several_teachers_teach_their_mean(tmp_path: Path) -> None:
    two = KnowledgeDistillation([teacher(1), teacher(2)])
    module = one_step(two, tmp_path)
    x, _ = next(iter(foreign.digits()))
    with torch.no_grad():
        mean = (teacher(1).eval()(x) + teacher(2).eval()(x)) / 2
        expected = losses.soft_targets(foreign.made().train()(x), mean)
    assert logged(module, "train/kd/logits") == pytest.approx(float(expected), rel=1e-5)
    assert len(two.state_dict()["teachers"]) == 2


def test_weights_grow_in_the_warmup(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watch(KnowledgeDistillation):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            seen.append(self._terms["logits"].weight)

    foreign.fit(foreign.made(), tmp_path, Watch(teacher(), {"logits": 2.0}, warmup_epochs=4), max_epochs=6)
    assert seen == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_a_student_learns_from_the_kernel_teacher_without_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kd = KnowledgeDistillation(DigitsKernel(), task_weight=0.0)
    module = foreign.made()
    batches = DataLoader(
        [((x - 0.3053) / 0.3235, torch.zeros_like(y)) for x, y in foreign.digits(640)], batch_size=None
    )
    foreign.make_trainer(tmp_path, kd, max_epochs=4, limit_val_batches=0).fit(module, batches)
    x, y = next(iter(foreign.digits(200, 700, 200)))
    assert (module.eval()((x - 0.3053) / 0.3235).argmax(1) == y).float().mean() > 0.75


# ---- the teacher


def test_is_asked_once_a_step_in_inference_mode_and_never_for_validation(counted: Counted, tmp_path: Path) -> None:
    kd = KnowledgeDistillation(counted, {"logits": 1.0, "similarity": 1.0, "target": 1.0})
    module = foreign.made()
    counted.train()
    foreign.fit(module, tmp_path, kd, max_epochs=1, precision="bf16-mixed")
    rehearsals = len(Counted.calls) - 4
    assert rehearsals <= 2
    assert Counted.calls[-4:] == [(False, True, torch.bfloat16, True)] * 4  # one channel: both formats at once
    assert counted.training  # only a copy is used
    assert all(p.requires_grad for p in counted.parameters())


def test_has_the_precision_and_the_layout_asked_for(tmp_path: Path) -> None:
    Counted.calls = []
    images = torch.rand(8, 3, 8, 8)
    data = DataLoader([(images, torch.arange(8))] * 2, batch_size=None)
    for precision, dtype, channels_last in (("bf16-true", torch.bfloat16, True), ("64-true", torch.float64, False)):
        student, expert = (CIFARResNet(8, widths=(4, 4, 8, 8)) for _ in range(2))
        kd = KnowledgeDistillation(
            Counted(expert), {"logits": 1.0, "hints": 1.0}, features={"net.layer3": "network.layer3"},
            channels_last=channels_last,
        )  # fmt: skip
        foreign.make_trainer(tmp_path, kd, precision=precision, **FEW).fit(foreign.Foreign(student), data)
        assert Counted.calls[-1] == (False, True, dtype, channels_last)


def test_stays_out_of_the_student(tmp_path: Path) -> None:
    module = foreign.made()
    kd = KnowledgeDistillation(teacher())
    before = list(module.state_dict())
    foreign.fit(module, tmp_path, kd, ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    assert list(module.state_dict()) == before
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == before
    (state,) = saved["callbacks"][kd.state_key]["teachers"]
    assert state.keys() == {"source", "sha256"}


def test_another_teacher_is_reported_on_resume(tmp_path: Path) -> None:
    foreign.fit(
        foreign.made(), tmp_path, KnowledgeDistillation(teacher()), ModelCheckpoint(tmp_path, "last"), max_epochs=1
    )
    for seed, reported in ((7, False), (8, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            foreign.fit(
                foreign.made(), tmp_path, KnowledgeDistillation(teacher(seed)), ckpt_path=tmp_path / "last.ckpt"
            )
        assert any("The teacher is" in str(w.message) for w in caught) == reported


def test_costs_are_in_the_account(tmp_path: Path) -> None:
    foreign.fit(foreign.made(), tmp_path, KnowledgeDistillation(teacher()), max_epochs=1)
    (note,) = Account.load(tmp_path).notes
    assert note == "Teacher: Network, 226 k MACs and 3.72 k parameters."


# ---- where it comes from


def small(**kwargs: Any) -> ImageClassifier:
    torch.manual_seed(3)
    return ImageClassifier("resnet20", input_shape=(1, 8, 8), **kwargs)


def said(kd: KnowledgeDistillation, root: Path, module: LightningModule | None = None) -> Tensor:
    """What the teacher says about a few digits."""
    module = module or foreign.made()
    trainer = foreign.make_trainer(root, kd, limit_train_batches=1, **FEW)
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits())
    assert kd._teachers is not None
    x, _ = next(iter(foreign.digits()))
    return kd._teachers.ask((x,), {})[0]


def expected_of(network: nn.Module) -> Tensor:
    x, _ = next(iter(foreign.digits()))
    with torch.no_grad():
        return network.eval()(x)


def saved(module: LightningModule, path: Path, *callbacks: Any) -> str:
    trainer = foreign.make_trainer(path.parent, *callbacks, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    with foreign.no_pictures:
        trainer.fit(module, foreign.digits())
    trainer.save_checkpoint(path)
    return str(path)


def test_a_checkpoint_of_an_image_classifier(tmp_path: Path) -> None:
    module = small()
    path = saved(module, tmp_path / "teacher.ckpt")
    torch.testing.assert_close(said(KnowledgeDistillation(path), tmp_path), expected_of(module))


def test_a_checkpoint_of_a_pruned_image_classifier(tmp_path: Path) -> None:
    module = small()
    path = saved(module, tmp_path / "teacher.ckpt", L1Norm(pruning_ratio=0.5))
    torch.testing.assert_close(said(KnowledgeDistillation(path), tmp_path), expected_of(module))


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_a_checkpoint_of_another_lightning_module(pruned: bool, tmp_path: Path) -> None:
    module = foreign.made()
    path = saved(module, tmp_path / "teacher.ckpt", *[L1Norm(pruning_ratio=0.5)] * pruned)
    expected = expected_of(module)
    for kd in (
        KnowledgeDistillation(foreign.Foreign(), teacher_weights=path),
        KnowledgeDistillation(foreign.Network(), teacher_weights=path),
        KnowledgeDistillation(path),  # a network like the student
    ):
        torch.testing.assert_close(said(kd, tmp_path), expected)
        assert kd._teachers is not None
        assert kd._teachers.all[0].source == path


def test_weights_of_a_named_network(tmp_path: Path) -> None:
    module = small()
    torch.save(module.network.state_dict(), tmp_path / "weights.pt")
    kd = KnowledgeDistillation("resnet20", teacher_weights=str(tmp_path / "weights.pt"))
    torch.testing.assert_close(said(kd, tmp_path), expected_of(module))


@pytest.mark.parametrize(
    ("name", "builder", "asked"),
    [
        ("torchvision/resnet18", "torchvision.models.get_model", {"weights": "DEFAULT"}),
        ("timm/resnet18", "timm.create_model", {"pretrained": True}),
    ],
)
def test_a_librarys_network_comes_with_its_weights(name: str, builder: str, asked: dict, tmp_path: Path) -> None:
    with patch(builder, return_value=teacher()) as made:
        torch.testing.assert_close(said(KnowledgeDistillation(name), tmp_path), expected_of(teacher()))
    made.assert_called_once_with("resnet18", **asked)


def teaches_resnet20(row: Row) -> bool:
    return not row.setting.startswith("logits of")


@pytest.mark.parametrize(
    "row",
    [row for row in card("knowledge_distillation").published if teaches_resnet20(row)],
    ids=lambda row: row.setting,
)
def test_published_students_and_their_recipes(row: Row) -> None:
    """The comparison's networks (arXiv:1910.10699): 278,324 parameters learn from 861,620."""
    recipe = yaml.safe_load(find_config(row.config).read_text())
    arguments = recipe["trainer"]["callbacks"][0]["init_args"]
    sizes = []
    for given in (recipe["model"]["init_args"]["network"], arguments.pop("teacher")):
        network = CIFARResNet(**given["init_args"])
        cost = profile(network, (1, 3, 32, 32))
        sizes.append((cost.macs, cost.params))
    assert sizes == [(row.result["macs"], row.result["params"]), (125_753_600, 861_620)]
    assert set(arguments["losses"]) == set(row.setting.split(", "))
    del arguments["teacher_weights"]
    torch.manual_seed(0)
    teacher, student = (CIFARResNet(depth, 100, widths=(4, 4, 4, 8)) for depth in (56, 20))  # thin, but as deep
    kd = KnowledgeDistillation(teacher, **arguments)
    module = ImageClassifier(student, 100)
    module.trainer = foreign.make_trainer(Path(), kd, max_epochs=270)
    with patch("lightning_compress.callbacks.distillation.knowledge_distillation.callback.Memories"):
        kd.setup(module.trainer, module, "fit")
    assert set(kd._terms) - {"task", "paraphrase"} == set(arguments["losses"])
    kd.teardown(module.trainer, module, "fit")


@pytest.mark.parametrize(
    "row", [row for row in card("knowledge_distillation").published if not teaches_resnet20(row)],
    ids=lambda row: f"{row.network} {row.setting}",
)  # fmt: skip
def test_published_pairs(row: Row) -> None:
    recipe = yaml.safe_load(find_config(row.config).read_text())
    arguments = recipe["trainer"]["callbacks"][0]["init_args"]
    sizes = []
    for given in (recipe["model"]["init_args"]["network"], arguments["teacher"]):
        with torch.device("meta"):
            network = build(given, num_classes=100) if isinstance(given, str) else CIFARResNet(**given["init_args"])
        sizes.append(profile(network, (1, 3, 32, 32)))
    assert (sizes[0].macs, sizes[0].params) == (row.result["macs"], row.result["params"])
    teachers = {"ResNet-110": 1_736_564, "ResNet-50": 23_705_252, "ResNet-32x4": 7_433_860}
    assert sizes[1].params == teachers[row.setting.removeprefix("logits of ")]


# ---- any module


class Direct(foreign.Foreign):
    """Calls its network, not itself, and returns a dict."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self.net(batch["image"]), batch["label"]), "kept": 1}


class Wrapped(LightningModule):
    """No `forward`; the network returns a dict, and takes keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = {"pixels": torch.rand(1, 1, 8, 8)}
        self.tail = nn.Linear(1, 1)

        class Inner(foreign.Network):
            def forward(self, pixels: Tensor) -> Any:  # type: ignore[override]
                return {"logits": super().forward(pixels), "more": 0}

        self.body = Inner()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.body(pixels=batch[0])["logits"], batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.body.parameters(), 0.01)


class Said:
    """A container that nobody can look into."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Keywords(foreign.Network):
    def forward(self, pixels: Tensor) -> Any:  # type: ignore[override]
        return Said(super().forward(pixels))


@pytest.mark.parametrize("kind", ["direct", "wrapped"])
def test_works_on_modules_of_other_kinds(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, expert = (Direct(), teacher()) if kind == "direct" else (Wrapped(), Keywords())
    terms = {"logits": 1.0, "target": 1.0, "contrast": 1.0}
    batches: list[Any] = list(foreign.digits())
    if kind == "direct":
        batches = [{"image": x, "label": y} for x, y in batches]
    trainer = foreign.make_trainer(tmp_path, KnowledgeDistillation(expert, terms, contrast_dim=4), **FEW)
    with foreign.no_pictures:
        trainer.fit(module, DataLoader(batches, batch_size=None))
    assert logged(module, "train/kd/logits") > 0
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in getattr(module, CONNECTORS).parameters()} <= held  # though nobody told the optimiser


def test_a_part_that_is_frozen_in_eval_mode_is_heard(tmp_path: Path) -> None:
    class Frozen(foreign.Foreign):
        def on_train_epoch_start(self) -> None:
            self.net.stem.eval()
            self.net.bn.eval()

    torch.manual_seed(0)
    module = Frozen()
    kd = KnowledgeDistillation(teacher(), {"attention": 1.0}, features={"net.bn": "bn"})
    foreign.fit(module, tmp_path, kd, max_epochs=1)
    assert logged(module, "train/kd/attention") > 0


def test_the_network_can_be_named(tmp_path: Path) -> None:
    class Two(foreign.Foreign):
        """Returns features; the logits come from a part of it."""

        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Linear(100, 100)

        def forward(self, x: Tensor) -> Any:
            return {"features": self.net(x)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])["features"], batch[1])

    with pytest.raises(MisconfigurationException, match=r"network=None.*no logits"):
        foreign.fit(Two(), tmp_path, KnowledgeDistillation(teacher()), **FEW)
    foreign.fit(Two(), tmp_path, KnowledgeDistillation(teacher(), network="net"), **FEW)
    with pytest.raises(ValueError, match=r"network: Two has no module 'nett'. Did you mean 'net'"):
        foreign.fit(Two(), tmp_path, KnowledgeDistillation(teacher(), network="nett"), **FEW)
    with pytest.raises(MisconfigurationException, match=r"network='large'.*computes without it"):
        foreign.fit(Two(), tmp_path, KnowledgeDistillation(teacher(), network="large"), **FEW)


def test_a_step_that_does_not_call_the_network_is_refused(tmp_path: Path) -> None:
    class Elsewhere(foreign.Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net.head.weight.square().sum()

    with pytest.raises(MisconfigurationException, match="training step of Elsewhere does not call it"):
        foreign.fit(Elsewhere(), tmp_path, KnowledgeDistillation(teacher()), **FEW)


# ---- features and connectors


def test_hints_are_learnt_with_the_student(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expert = CIFARResNet(8, in_channels=1, widths=(8, 8, 16, 32))
    module = foreign.made()
    kd = KnowledgeDistillation(
        expert, {"hints": 10.0, "contrast": 0.1}, features={"hints": {"net.blocks.0": "layer2"}}, contrast_dim=5,
        connector_lr_factor=0.5,
    )  # fmt: skip
    trainer = foreign.fit(module, tmp_path, kd, ModelCheckpoint(tmp_path, "last"))
    connectors = getattr(module, CONNECTORS)
    assert connectors["hints_0"].layer.weight.shape[:2] == (16, 8)
    assert connectors["contrast_0"].student.weight.shape == (5, 8)
    assert connectors["contrast_0"].teacher.weight.shape == (5, 32)
    own = trainer.optimizers[0].param_groups[-1]
    assert own["lr"] == pytest.approx(0.5 * trainer.optimizers[0].param_groups[0]["lr"])
    assert {id(p) for p in own["params"]} == {id(p) for p in connectors.parameters()}
    # they go with the checkpoint, and with nothing else
    again = lightning_compress.load(foreign.Foreign, tmp_path / "last.ckpt")
    foreign.assert_same(again, module)
    assert getattr(inference_copy(module), CONNECTORS) is None
    assert not any(name.startswith(CONNECTORS) for name in weight_layers(module))
    before, after = (getattr(Account.load(tmp_path), side) for side in ("before", "after"))
    assert before.params == after.params


def test_connectors_of_an_earlier_fit_are_kept_or_replaced(tmp_path: Path) -> None:
    def kd(dim: int) -> KnowledgeDistillation:
        features = {"net.blocks.1": "blocks.1"}
        return KnowledgeDistillation(teacher(), {"contrast": 1.0, "hints": 1.0}, features=features, contrast_dim=dim)

    module = foreign.made()
    foreign.fit(module, tmp_path, kd(4), **FEW)
    learnt = getattr(module, CONNECTORS)
    foreign.fit(module, tmp_path, kd(4), **FEW)
    assert getattr(module, CONNECTORS) is learnt
    foreign.fit(module, tmp_path, kd(6), ModelCheckpoint(tmp_path, "last"), **FEW)
    assert getattr(module, CONNECTORS)["contrast_0"].student.out_features == 6
    with pytest.raises(MisconfigurationException, match="Resume with the teacher, features and contrast_dim"):
        foreign.fit(foreign.made(), tmp_path, kd(7), ckpt_path=tmp_path / "last.ckpt")
    foreign.fit(module, tmp_path, KnowledgeDistillation(teacher()), **FEW)
    assert not hasattr(module, CONNECTORS)
    assert list(module.state_dict()) == list(foreign.made().state_dict())


def test_a_regressor_that_is_trained_brings_the_hints_closer(tmp_path: Path) -> None:
    expert = CIFARResNet(8, in_channels=1, widths=(8, 8, 16, 32))
    values: list[float] = []

    class Watch(KnowledgeDistillation):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            values.append(float(trainer.callback_metrics["train/kd/hints"]))

    kd = Watch(expert, {"hints": 1.0}, features={"net.blocks.1": "layer3"}, task_weight=0.0)
    foreign.fit(foreign.made(lr=0.03), tmp_path, kd, max_epochs=8)
    assert values[-1] < 0.6 * values[0]


def test_features_are_matched_in_order_and_summed(tmp_path: Path) -> None:
    module = foreign.made()
    kd = KnowledgeDistillation(teacher(), {"attention": 1.0}, features={"net.blocks.*.bn1": "blocks.*.bn1"})
    foreign.fit(module, tmp_path, kd, limit_train_batches=1, **FEW)
    assert [str(a) + str(b) for a, b in kd._pairs["attention"]] == [
        "'net.blocks.0.bn1''blocks.0.bn1'", "'net.blocks.1.bn1''blocks.1.bn1'"
    ]  # fmt: skip
    x, _ = next(iter(foreign.digits()))
    total, student, expert = 0.0, foreign.made().net, teacher().eval()
    for block in range(2):
        seen = []
        for network in (student, expert):
            network.blocks[block].bn1.register_forward_hook(lambda m, i, o: seen.append(o))  # noqa: B023
            network(x)
            for hooked in network.modules():
                hooked._forward_hooks.clear()
        total += losses.attention(*seen).item()
    assert logged(module, "train/kd/attention") == pytest.approx(total, rel=1e-3)


def test_tokens_of_transformers(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed = nn.Linear(8, width)
            self.block = nn.TransformerEncoderLayer(width, 2, width, batch_first=True)
            self.head = nn.Linear(width, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.embed(x[:, 0])).mean(1))

    module = foreign.made(lambda: Tokens(4))
    terms = {"hints": 1.0, "contrast": 1.0, "similarity": 1.0, "angle": 1.0}
    kd = KnowledgeDistillation(Tokens(6), terms, features={"net.block": "block"}, contrast_dim=3)
    foreign.fit(module, tmp_path, kd, max_epochs=1)
    assert getattr(module, CONNECTORS)["hints_0"].layer.weight.shape == (6, 4)
    assert all(logged(module, f"train/kd/{term}") > 0 for term in terms)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"net.blok": "blocks"}, r"features: 'net.blok' matches no name. Did you mean"),
        (
            {"net.blocks.?": "blocks.0"},
            r"features: 'net.blocks.\?' matches 2 modules .* 1 of the teacher",
        ),
        (
            {"net.head": "head"},
            r"'attention' compares 'net.head' .* \(1, 10\) and \(1, 10\); both must be",
        ),
    ],
)
def test_features_that_cannot_be_compared(features: dict, message: str, tmp_path: Path) -> None:
    module = foreign.made()
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        foreign.fit(module, tmp_path, KnowledgeDistillation(teacher(), {"attention": 1.0}, features=features), **FEW)
    assert not module.trainer.global_step


# ---- what cannot work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": {"logit": 1.0}}, r"losses: there is no 'logit'. Did you mean 'logits'"),
        ({"losses": {"hints": 1.0}, "features": {"attention": {"*": "*"}}}, r"features: 'attention' is none of"),
        ({"features": {"net.stem": "stem"}}, r"features=.*none of the losses \['logits'\] looks at features"),
        ({"teacher": []}, r"there are 0 teachers"),
        ({"teacher": ["resnet20", "resnet56"], "teacher_weights": "one.pt"}, r"teacher_weights='one.pt': there are 2"),
        ({"teacher": ["resnet20", "resnet56"], "losses": {"similarity": 1.0}}, r"losses: 'similarity' .* there are 2"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeDistillation(**{"teacher": "resnet56", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "resnet56"}, r"teacher='resnet56': 'resnet56' comes without weights"),
        ({"teacher": "resnet65", "teacher_weights": "w.pt"}, r"teacher='resnet65'.*Did you mean 'resnet56'"),
        ({"teacher": "gone.ckpt"}, r"teacher: there is no file 'gone.ckpt'"),
        ({"teacher": "gone.ckpt", "teacher_weights": "w.pt"}, r"is itself a file"),
        ({"teacher": nn.Linear(8, 10)}, r"teacher: Linear returns no logits \(B, K\), but \(1, 1, 8, 10\)"),
        ({"teacher": CIFARResNet(8)}, r"teacher: CIFARResNet fails on what the student gets, \(1, 1, 8, 8\)"),
        ({"teacher": CIFARResNet(8, 100, 1)}, r"CIFARResNet tells 100 classes apart, and the student 10"),
    ],
)
def test_impossible_teachers(arguments: dict, message: str, tmp_path: Path) -> None:
    module = foreign.made()
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        foreign.fit(module, tmp_path, KnowledgeDistillation(**arguments), **FEW)
    assert not module.trainer.global_step


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    other, broken = tmp_path / "other.pt", tmp_path / "broken.pt"
    torch.save(CIFARResNet(8).state_dict(), other)
    broken.write_bytes(other.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"teacher '.*other.pt' does not fit Network: .*student's was tried"):
        foreign.fit(foreign.made(), tmp_path, KnowledgeDistillation(str(other)))
    with pytest.raises(ValueError, match=r"teacher_weights '.*other.pt' does not fit Network"):
        foreign.fit(foreign.made(), tmp_path, KnowledgeDistillation(teacher(), teacher_weights=str(other)))
    with pytest.raises(ValueError, match=r"teacher: '.*broken.pt' is truncated"):
        foreign.fit(foreign.made(), tmp_path, KnowledgeDistillation(str(broken)))


def test_other_classes_are_fine_for_features(tmp_path: Path) -> None:
    kd = KnowledgeDistillation(CIFARResNet(8, 100, 1), {"similarity": 1.0})
    module = one_step(kd, tmp_path)
    assert logged(module, "train/kd/similarity") > 0


def test_two_in_one_trainer_are_refused(tmp_path: Path) -> None:
    two = [KnowledgeDistillation(teacher()), KnowledgeDistillation(teacher(), {"similarity": 1.0})]
    with pytest.raises(MisconfigurationException, match="two KnowledgeDistillation"):
        foreign.fit(foreign.made(), tmp_path, *two)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_connectors_do_not_follow_later_pruning(start_epoch: int, tmp_path: Path) -> None:
    kd = KnowledgeDistillation(teacher(), {"hints": 1.0}, features={"net.blocks.1": "blocks.1"})
    pruner = HRank(pruning_ratio=0.5, num_batches=1, start_epoch=start_epoch)
    with pytest.raises(MisconfigurationException, match=r"'hints' learns .* Let HRank prune before"):
        foreign.fit(foreign.made(), tmp_path, *([kd, pruner] if start_epoch == 0 else [pruner, kd]))


# ---- the cache


def fitted(root: Path, cache: Path | None, loader: Any = None, **kwargs: Any) -> foreign.Foreign:
    module = foreign.made()
    kd = KnowledgeDistillation(
        Counted(teacher()), {"logits": 1.0, "similarity": 1.0}, features={"net.blocks.0": "network.blocks.0"},
        cache=None if cache is None else str(cache),
    )  # fmt: skip
    Counted.calls = []
    trainer = foreign.make_trainer(root, kd, max_epochs=3, limit_val_batches=0, **kwargs)
    torch.manual_seed(0)  # the order of images
    with foreign.no_pictures:
        trainer.fit(module, loader or DataLoader(foreign.digits().dataset, 16, shuffle=True))
    return module


def test_a_cache_changes_nothing_but_the_number_of_questions(tmp_path: Path) -> None:
    rehearsals = 2  # and one of them for the account
    plain = fitted(tmp_path, None)
    assert len(Counted.calls) == rehearsals + 3 * 4
    cached = fitted(tmp_path, tmp_path / "cache")
    assert len(Counted.calls) == rehearsals + 4
    foreign.assert_same(cached, plain)
    again = fitted(tmp_path, tmp_path / "cache")
    assert len(Counted.calls) == rehearsals  # all from the disk
    foreign.assert_same(again, plain)


def test_another_teacher_has_a_cache_of_its_own(tmp_path: Path) -> None:
    for expert in (teacher(1), teacher(2), teacher(1)):
        kd = KnowledgeDistillation(expert, cache=str(tmp_path / "cache"))
        foreign.fit(foreign.made(), tmp_path, kd, max_epochs=1)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    foreign.fit(
        foreign.made(),
        tmp_path,
        KnowledgeDistillation(teacher(1), cache=str(tmp_path / "cache")),
        precision="bf16-mixed",
    )
    assert len(list((tmp_path / "cache").iterdir())) == 3


class Noisy(Dataset):
    def __init__(self, noisy: bool) -> None:
        self.noisy = noisy
        self.images = foreign.digits().dataset

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index]
        return image + self.noisy * torch.rand(()), label


def test_random_augmentation_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="cache: Noisy gives another image each time"):
        fitted(tmp_path, tmp_path / "cache", DataLoader(Noisy(True), 16))
    fitted(tmp_path, tmp_path / "cache", DataLoader(Noisy(False), 16))


def test_random_mixing_is_refused_when_no_image_comes_again(tmp_path: Path) -> None:
    class Mixing(foreign.Foreign):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + torch.rand(()), batch[1]

    torch.manual_seed(0)
    module = Mixing()
    kd = KnowledgeDistillation(teacher(), cache=str(tmp_path / "cache"))
    with pytest.raises(MisconfigurationException, match="none of 64 images of this epoch was among the 64"):
        foreign.fit(module, tmp_path, kd)
    assert module.trainer.current_epoch == 1


def test_images_that_come_in_part_are_asked_about(tmp_path: Path) -> None:
    """Half of the images in each epoch, others every time."""
    plain = fitted(tmp_path, None, limit_train_batches=2)
    cached = fitted(tmp_path, tmp_path / "cache", limit_train_batches=2)
    foreign.assert_same(cached, plain)
