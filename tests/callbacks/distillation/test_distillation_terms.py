"""The terms on features of `KnowledgeDistillation`: what they look at, what they learn, what they remember."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import foreign
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_compress.callbacks import KCD, KnowledgeDistillation
from lightning_compress.callbacks.distillation.knowledge_distillation.student import CONNECTORS
from lightning_compress.core.distill import losses
from lightning_compress.core.distill.connectors import ConvRegressor
from lightning_compress.networks import CIFARResNet

ONE_STEP = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
STAGES = {"net.layer?": "layer?"}


@pytest.fixture(autouse=True)
def no_account() -> Iterator[None]:
    """Counting and timing the student takes longer than such a fit."""
    with patch("lightning_compress.callbacks.distillation.knowledge_distillation.callback.open_account"):
        yield


def resnet(*widths: int) -> CIFARResNet:
    return CIFARResNet(8, in_channels=1, widths=widths)


def student() -> foreign.Foreign:
    return foreign.made(lambda: resnet(4, 4, 6, 8))


def teacher(*widths: int) -> nn.Module:
    torch.manual_seed(7)
    network = resnet(*(widths or (8, 8, 12, 16)))
    for _ in range(3):
        network(torch.rand(16, 1, 8, 8))
    return network


def logged(module: LightningModule, name: str) -> float:
    return float(module.trainer.callback_metrics[f"train/kd/{name}"])


def features_of(network: nn.Module, names: list[str], *, inputs: bool = False) -> list[Tensor]:
    """What modules return, or get, for the first batch."""
    seen: list[Tensor] = []
    handles = [
        network.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(i[0] if inputs else o))
        for name in names
    ]
    x, _ = next(iter(foreign.digits()))
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "widths", "expected"),
    [
        ("selectivity", (), lambda s, t: sum(map(losses.selectivity, s, t))),
        (
            "flow",
            (4, 4, 6, 8),
            lambda s, t: sum(
                losses.flow(losses.flow_matrix(s[i], s[i + 1]), losses.flow_matrix(t[i], t[i + 1])) for i in (0, 1)
            ),
        ),
    ],
)
def test_stages_are_compared(name: str, widths: tuple, expected: Any, tmp_path: Path) -> None:
    module = student()
    kd = KnowledgeDistillation(teacher(*widths), {name: 2.0}, features=STAGES)
    foreign.fit(module, tmp_path, kd, **ONE_STEP)
    stages = ["layer1", "layer2", "layer3"]
    seen = [features_of(net, stages) for net in (student().net.train(), teacher(*widths).eval())]
    assert logged(module, name) == pytest.approx(float(expected(*seen)), rel=1e-3)


def test_boundaries_are_those_before_the_activation(tmp_path: Path) -> None:
    module = student()
    places = ["layer1.0.relu2", "layer2.0.relu2", "layer3.0.relu2"]
    kd = KnowledgeDistillation(teacher(), {"boundary": 1.0}, features={"net.layer?.0.relu2": "layer?.0.relu2"})
    values: list[Tensor] = []
    with patch.object(losses, "boundary", side_effect=lambda s, t: values.append(t) or s.sum()):
        foreign.fit(module, tmp_path, kd, **ONE_STEP)
    for seen, expected in zip(values, features_of(teacher().eval(), places, inputs=True), strict=True):
        torch.testing.assert_close(seen, expected)
        assert seen.min() < 0
    connectors = getattr(module, CONNECTORS)
    assert [connectors[f"boundary_{i}"].layer.weight.shape[:2] for i in range(3)] == [(8, 4), (12, 6), (16, 8)]
    assert all(isinstance(c, ConvRegressor) and isinstance(c.relu, nn.Identity) for c in connectors.values())


def test_later_boundaries_count_more(tmp_path: Path) -> None:
    module = student()
    kd = KnowledgeDistillation(teacher(), {"boundary": 1.0}, features={"net.layer?.0.relu2": "layer?.0.relu2"})
    with patch.object(losses, "boundary", return_value=torch.ones(())):
        foreign.fit(module, tmp_path, kd, **ONE_STEP)
    assert logged(module, "boundary") == 1 / 4 + 1 / 2 + 1


def test_terms_that_learn_bring_their_layers(tmp_path: Path) -> None:
    missing: list[list[str]] = []

    class Watch(KnowledgeDistillation):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            named = getattr(pl_module, CONNECTORS).named_parameters()
            missing.append([name for name, p in named if p.grad is None or not p.grad.isfinite().all()])

    module = student()
    terms = {"information": 1.0, "factors": 200.0, "correlation": 0.02, "probability": 3e4, "noise_contrast": 0.8}
    kd = Watch(
        teacher(), terms, features=dict.fromkeys(("information", "factors"), STAGES), contrast_dim=5,
        contrast_negatives=8,
    )  # fmt: skip
    trainer = foreign.fit(module, tmp_path, kd, ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    assert all(logged(module, term) != 0 for term in terms)
    connectors = getattr(module, CONNECTORS)
    stages = {f"{term}_{i}" for term in ("information", "factors") for i in range(3)}
    assert set(connectors) == stages | {"correlation_0", "noise_contrast_0"}
    assert connectors["correlation_0"].teacher.weight.shape == (5, 16)
    assert missing == [[]] * 4
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in connectors.parameters()} <= held


def test_what_is_paraphrased_does_not_depend_on_the_weight(tmp_path: Path) -> None:
    made = []
    for weight in (1.0, 1000.0):
        module = student()
        torch.manual_seed(1)
        kd = KnowledgeDistillation(teacher(), {"factors": weight}, features={"net.layer3": "layer3"})
        foreign.fit(module, tmp_path, kd, **ONE_STEP)
        connector = getattr(module, CONNECTORS)["factors_0"]
        assert logged(module, "paraphrase") > 0
        made.append(connector)
    foreign.assert_same(made[0].paraphraser, made[1].paraphraser)
    foreign.assert_same(made[0].restorer, made[1].restorer)
    assert not torch.equal(made[0].translator[0].weight, made[1].translator[0].weight)


def test_what_comes_first_is_learnt_alone(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Watch(KnowledgeDistillation):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            seen.append({name: term.weight for name, term in self._terms.items()})

    terms = {"logits": 3.0, "boundary": 5.0, "factors": 7.0}
    features = {"boundary": {"net.layer3.0.relu2": "layer3.0.relu2"}, "factors": {"net.layer3": "layer3"}}
    kd = Watch(teacher(), terms, features=features, initial_epochs=2, warmup_epochs=2)
    foreign.fit(student(), tmp_path, kd, max_epochs=5, limit_train_batches=1, limit_val_batches=0)
    names = ("task", "logits", "boundary", "factors", "paraphrase")
    assert [tuple(weights[name] for name in names) for weights in seen] == [
        *[(-1.0, 0.0, 5.0, 0.0, 1.0)] * 2,
        (0.0, 1.5, 0.0, 3.5, 0.0),
        *[(0.0, 3.0, 0.0, 7.0, 0.0)] * 2,
    ]


def test_a_paraphraser_that_has_learnt_stays(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watch(KnowledgeDistillation):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            seen.append({k: v.clone() for k, v in getattr(pl_module, CONNECTORS).state_dict().items()})

    kd = Watch(teacher(), {"factors": 1.0}, features={"net.layer3": "layer3"}, initial_epochs=2)
    foreign.fit(student(), tmp_path, kd, max_epochs=4, limit_val_batches=0)
    for name in seen[0]:
        _, part, _ = name.split(".", 2)
        if part != "translator":
            assert not torch.equal(seen[0][name], seen[1][name])
            assert torch.equal(seen[1][name], seen[3][name])


def test_boundaries_of_one_shape_are_compared_as_they_are(tmp_path: Path) -> None:
    module = student()
    kd = KnowledgeDistillation(
        teacher(4, 4, 6, 8), {"boundary": 1.0}, features={"net.layer3.0.relu2": "layer3.0.relu2"}
    )
    foreign.fit(module, tmp_path, kd, **ONE_STEP)
    assert not hasattr(module, CONNECTORS)
    places = ["layer3.0.relu2"]
    (own,), (theirs,) = (
        features_of(net, places, inputs=True) for net in (student().net.train(), teacher(4, 4, 6, 8).eval())
    )
    assert logged(module, "boundary") == pytest.approx(losses.boundary(own, theirs).item(), rel=1e-4)


def test_in_the_first_stage_no_label_counts(tmp_path: Path) -> None:
    made = []
    for change in (lambda y: y, lambda y: 9 - y):
        batches = [(x, change(y)) for x, y in foreign.digits()]
        module = student()
        torch.manual_seed(1)
        kd = KnowledgeDistillation(
            teacher(), {"boundary": 1.0}, features={"net.layer3.0.relu2": "layer3.0.relu2"}, initial_epochs=1
        )
        foreign.make_trainer(tmp_path, kd, **{**ONE_STEP, "max_epochs": 2, "max_steps": 1}).fit(
            module, DataLoader(batches, batch_size=None)
        )
        made.append(module)
    foreign.assert_same(*made)
    assert not torch.equal(made[0].net.conv1.weight, student().net.conv1.weight)


@pytest.mark.parametrize(
    ("term", "features", "message"),
    [
        ("information", None, "'information' compares what modules return; name them"),
        ("boundary", None, "'boundary' compares what modules get; name them"),
        ("flow", {"net.layer1": "layer1"}, "'flow' goes from one place to the next, and .* is a single one"),
        ("flow", STAGES, r"'flow' compares 'net.layer1' .* both must have as many channels"),
        ("factors", {"net.linear": "linear"}, r"'factors' compares 'net.linear' .* both must be \(B, C, H, W\)"),
        ("boundary", {"net.relu": "relu"}, "'boundary' compares the input of 'relu' before it acts, but .* overwrites"),
    ],
)
def test_what_cannot_be_compared(term: str, features: Any, message: str, tmp_path: Path) -> None:
    module, expert = student(), teacher()
    if term == "boundary":
        expert.relu.inplace = True
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        foreign.fit(module, tmp_path, KnowledgeDistillation(expert, {term: 1.0}, features=features), **ONE_STEP)
    assert not module.trainer.global_step


# ---- the memory of `noise_contrast`


def contrasting(cls: type[KnowledgeDistillation] = KnowledgeDistillation, **kwargs: Any) -> KnowledgeDistillation:
    return cls(teacher(), {"noise_contrast": 0.8}, contrast_dim=4, contrast_negatives=8, **kwargs)


def shuffled(sampler_seed: int = 0) -> DataLoader:
    data: Any = foreign.digits().dataset
    return DataLoader(data, 16, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(sampler_seed)))


def test_images_are_remembered_in_their_own_rows(tmp_path: Path) -> None:
    kd = contrasting()
    trainer = foreign.make_trainer(tmp_path, kd, max_epochs=1, limit_train_batches=3, limit_val_batches=0)
    loader = shuffled()
    source = trainer.fit_loop._data_source
    with foreign.no_pictures:
        trainer.fit(student(), loader)
    assert kd._memories is not None
    (memory,) = kd._memories.all
    labels = loader.dataset.tensors[1]
    known = memory.classes >= 0
    assert int(known.sum()) == 48
    assert torch.equal(memory.classes[known], labels[known])
    assert memory.student.shape == (64, 4)
    norms = memory.student.norm(dim=1)
    torch.testing.assert_close(norms[known], torch.ones(48))
    assert memory.batches == 3
    assert type(trainer.fit_loop._data_source) is type(source)  # the user's loader again


def test_the_student_comes_to_know_its_images_by_heart(tmp_path: Path) -> None:
    values: list[float] = []

    class Watch(KnowledgeDistillation):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            values.append(float(trainer.callback_metrics["train/kd/noise_contrast"]))

    foreign.fit(student(), tmp_path, contrasting(Watch, task_weight=0.0), max_epochs=8, limit_val_batches=0)
    assert sum(values[-4:]) < 0.9 * sum(values[:4])


def test_the_memory_is_resumed(tmp_path: Path) -> None:
    whole, part = student(), student()
    foreign.fit(whole, tmp_path, contrasting(), max_epochs=2)
    foreign.fit(part, tmp_path, contrasting(), ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again, kd = student(), contrasting()
    foreign.fit(again, tmp_path, kd, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    foreign.assert_same(again, whole)
    assert kd._memories is not None
    assert kd._memories.all[0].batches == 8


def test_a_condensed_set_keeps_its_rows(tmp_path: Path) -> None:
    kd = contrasting(KCD, keep_ratio=0.5, every_n_epochs=1)
    module = student()
    trainer = foreign.make_trainer(tmp_path, kd, max_epochs=3, limit_val_batches=0)
    with foreign.no_pictures:
        trainer.fit(module, shuffled())
    assert kd._memories is not None
    (memory,) = kd._memories.all
    assert memory.classes.tolist() == foreign.digits().dataset.tensors[1].tolist()
    assert memory.batches < 12


def test_all_processes_remember_what_one_has_seen(tmp_path: Path) -> None:
    kd = contrasting()
    foreign.fit(student(), tmp_path, kd, **ONE_STEP)
    assert kd._memories is not None
    (memory,) = kd._memories.all
    rows = torch.tensor([20, 21])
    mine = (torch.randn(2, 4), torch.randn(2, 4), rows, torch.tensor([1, 2]))
    kd._memories._new = [mine]
    # the other process has seen the next two
    gathered = SimpleNamespace(
        trainer=SimpleNamespace(world_size=2), all_gather=lambda x: torch.stack([x, x + 2 * (x is rows)])
    )
    kd._memories.keep(gathered)  # type: ignore[arg-type]
    assert memory.classes[20:24].tolist() == [1, 2, 1, 2]
    torch.testing.assert_close(memory.student[20:24].norm(dim=1), torch.ones(4))


def test_samples_without_an_index_are_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(foreign.digits().dataset)

    with pytest.raises(MisconfigurationException, match=r"KnowledgeDistillation needs to know the samples .*Stream"):
        foreign.make_trainer(tmp_path, contrasting(), **ONE_STEP).fit(student(), DataLoader(Stream(), 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contrast_negatives": 0}, "contrast_negatives: expected a number above 0, got 0"),
        ({"initial_epochs": 3}, r"initial_epochs=3: none of the losses \['noise_contrast'\] has a stage"),
        ({"contrast_momentum": 1.0}, "contrast_momentum: expected a share from 0 to below 1, got 1.0"),
    ],
)
def test_impossible_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeDistillation("resnet56", {"noise_contrast": 1.0}, **arguments)
