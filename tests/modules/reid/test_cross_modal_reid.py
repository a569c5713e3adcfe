from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_compress
from lightning_compress.datamodules import Digits, TwoViewDigits
from lightning_compress.metrics import CrossCameraRetrieval
from lightning_compress.modules import CrossModalReID
from lightning_compress.modules.reid.cross_modal_reid import LOOKS, Look, Looks
from lightning_compress.modules.reid.cross_modal_reid.branches import grey
from lightning_compress.modules.reid.cross_modal_reid.module import adam, warmed_up
from lightning_compress.networks import ReIDSmall

SMALL: dict[str, Any] = {"z_dim": 3, "hidden": (12,), "classifier_dim": 8, "num_classes": 5, "input_shape": (3, 8, 8)}


def made(**kwargs: Any) -> CrossModalReID:
    torch.manual_seed(0)
    backbone: Callable[[], nn.Module] = lambda: ReIDSmall((4, 6))  # noqa: E731
    return CrossModalReID(**{"backbone": backbone, **SMALL, **kwargs})


def batch(count: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return images, torch.arange(count) // 4, torch.arange(count) % 2 == 1


def params(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


# ---- the networks


@pytest.mark.parametrize(
    ("num_classes", "published", "used"),
    [
        pytest.param(395, 88_238_559, 82_091_559, id="SYSU-MM01, authors' code"),
        pytest.param(206, 86_931_057, 80_784_057, id="RegDB, authors' code"),
    ],
)
def test_parameters(num_classes: int, published: int, used: int) -> None:
    """The authors' three trunks carry the classifier of ImageNet, which nothing reads."""
    with torch.device("meta"):
        module = CrossModalReID(num_classes=num_classes)
    unused = 2048 * 1000 + 1000
    assert params(module) == used == published - 3 * unused
    branch = module.branches["shared"]
    if num_classes == 395:
        assert params(branch.observer, branch.classifier) == 26_370_486 - unused
        assert params(branch.bottleneck) == 3_042_367


def test_shapes_of_the_papers_outputs() -> None:
    with torch.device("meta"):
        module = CrossModalReID(num_classes=395).train()
        for branch in module.branches.values():
            branch.bottleneck.eval()  # dropout draws no number without a device
        looks = module.looks(torch.zeros(4, 3, 256, 128))
        for look in looks:
            assert [tuple(out.shape) for out in look] == [(4, 395), (4, 2048), (4, 395), (4, 512)]
        assert module.eval()(torch.zeros(4, 3, 256, 128)).shape == (4, 8192)


def test_grey() -> None:
    pixel = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(grey(pixel), torch.full((1, 3, 1, 1), 0.18149))
    assert torch.equal(grey(grey(pixel)), grey(pixel)) or torch.allclose(grey(grey(pixel)), 0.9999 * grey(pixel))


def test_each_branch_sees_what_it_shall() -> None:
    """The shared one first in grey and then in colour, and its statistics move twice."""
    module, (images, _, _) = made(), batch()
    seen: dict[str, list[Tensor]] = {name: [] for name in module.branches}
    for name, branch in module.branches.items():
        branch.observer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    looks = module.looks(images)
    in_grey = grey(images)
    for name, expected in (("infrared", [in_grey]), ("visible", [images]), ("shared", [in_grey, images])):
        assert len(seen[name]) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(seen[name], expected, strict=True))
        assert module.branches[name].observer.neck.num_batches_tracked == len(expected)
    assert looks.shared_infrared.v.shape == (20, 6)
    assert not torch.equal(looks.shared_infrared.v, looks.shared_visible.v)
    assert module.branches["visible"].observer.backbone is not module.branches["infrared"].observer.backbone


def test_the_neck_is_not_shifted() -> None:
    module = made()
    for branch in module.branches.values():
        neck = branch.observer.neck
        assert (neck.weight == 1).all()
        assert (neck.bias == 0).all()
        assert not neck.bias.requires_grad
        assert branch.classifier.weight.std() < 0.002
        assert (branch.classifier.bias == 0).all()
    held = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}


def test_images_of_one_channel_are_shown_in_three() -> None:
    module, (images, _, _) = made().eval(), batch()
    one = images[:, :1]
    assert torch.equal(module(one), module(one.expand(-1, 3, -1, -1)))


# ---- the losses


def softmax(logits: Tensor) -> list[list[float]]:
    rows = [[math.exp(x - max(row)) for x in row] for row in logits.tolist()]
    return [[x / sum(row) for x in row] for row in rows]


def k(teacher: Tensor, student: Tensor, official: bool) -> float:
    """What the authors' call to kl_div computes, or what the paper says."""
    ps, qs = ([x for row in softmax(logits) for x in row] for logits in (teacher, student))
    pairs = list(zip(ps, qs, strict=True))
    if official:
        return sum(q * (math.log(q) - p) for p, q in pairs) / len(pairs)
    return sum(p * (math.log(p) - math.log(q)) for p, q in pairs) / len(teacher)


def smoothed(logits: Tensor, labels: Tensor, eps: float) -> float:
    classes = logits.shape[1]
    total = 0.0
    for row, label in zip(softmax(logits), labels.tolist(), strict=True):
        total -= sum(((1 - eps) * (c == label) + eps / classes) * math.log(row[c]) for c in range(classes))
    return total / len(labels)


def ranked(vectors: Tensor, labels: Tensor, infrared: Tensor) -> float:
    """Anchor by anchor, as the authors loop."""
    x = F.normalize(vectors)
    total = 0.0
    for i in range(len(x)):
        d = [(x[i] - x[j]).norm().item() for j in range(len(x))]
        for across, margin, boundary in ((False, 0.9, 2.2), (True, 1.0, 2.0)):
            js = [j for j in range(len(x)) if j != i and bool(infrared[j] != infrared[i]) == across]
            positives = [max(0.0, d[j] + margin - boundary) for j in js if labels[j] == labels[i]]
            lacks = [boundary - d[j] for j in js if labels[j] != labels[i] and d[j] < boundary]
            weights = [math.exp(lack) for lack in lacks]
            total += sum(positives) / (len(positives) + 1e-5)
            total += sum(w * lack for w, lack in zip(weights, lacks, strict=True)) / (sum(weights) + 1e-5)
    return total / len(x)


@pytest.fixture(scope="module")
def looks() -> Looks:
    generator = torch.Generator().manual_seed(1)
    return Looks(*(Look(*(torch.randn(8, n, generator=generator) for n in (5, 6, 5, 4))) for _ in LOOKS))


@pytest.mark.parametrize("kl_mode", ["official", "kl"])
def test_the_sum_is_the_papers(looks: Looks, kl_mode: str) -> None:
    """1 ce + 1 rank + 8 cml + 2 vsd + 2 vcd, each written out once more."""
    module = made(kl_mode=kl_mode)
    labels, infrared = torch.arange(8) // 4, torch.arange(8) % 2 == 1
    losses = module.losses(looks, labels, infrared)
    assert list(losses) == ["ce", "rank", "cml", "vsd", "vcd"]
    i, s_i, v, s_v = looks
    official = kl_mode == "official"
    shares = {"infrared": 0.5, "visible": 0.5, "shared_infrared": 0.25, "shared_visible": 0.25}
    expected = dict.fromkeys(losses, 0.0)
    for name, share in shares.items():
        look = getattr(looks, name)
        expected["ce"] += share * (smoothed(look.v_logits, labels, 0.1) + smoothed(look.z_logits, labels, 0.1))
        expected["rank"] += share * (ranked(look.v, labels, infrared) + ranked(look.z, labels, infrared))
    expected["vsd"] = k(i.v_logits, i.z_logits, official) + k(v.v_logits, v.z_logits, official)
    expected["vcd"] = 0.5 * k(s_v.v_logits, s_i.z_logits, official) + 0.5 * k(s_i.v_logits, s_v.z_logits, official)
    for name in ("ce", "rank", "vsd", "vcd"):
        assert losses[name].item() == pytest.approx(expected[name], abs=2e-5), name
    assert 0 < losses["cml"].item() < 2
    assert tuple(module.loss_weights) == (1.0, 1.0, 8.0, 2.0, 2.0, 0.0)


def test_the_steps_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    module = made(ce_weight=0.5, rank_weight=0.25, cml_weight=4.0, vsd_weight=3.0, vcd_weight=1.0, vml_weight=2.0)
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.setdefault(name, value.detach())  # type: ignore[method-assign]
    loss = module.training_step(batch(), 0)
    parts = {n: getattr(module.loss_weights, n) * logged[f"train/{n}"] for n in module.loss_weights._fields}
    torch.testing.assert_close(loss.detach(), torch.stack(list(parts.values())).sum())
    assert logged["train/vml"] > 0
    assert 0 <= logged["train/acc_v"] <= 1
    assert 0 <= logged["train/acc_z"] <= 1


def test_losses_of_weight_0_are_left_out(looks: Looks) -> None:
    module = made(rank_weight=0, cml_weight=0, vsd_weight=0, vcd_weight=0)
    assert list(module.losses(looks, torch.arange(8) // 4, torch.arange(8) % 2 == 1)) == ["ce"]


@pytest.mark.parametrize(("name", "branches"), [("vsd", ["infrared", "visible"]), ("vcd", ["shared"])])
def test_distillation_trains_encoders_through_z_alone(name: str, branches: list[str]) -> None:
    """The classifier of v, the teacher, gets nothing; the other branches take no part."""
    module, (images, labels, infrared) = made(), batch()
    module.losses(module.looks(images), labels, infrared)[name].backward()
    for branch in module.branches:
        graded = {n for n, p in module.branches[branch].named_parameters() if p.grad is not None and p.grad.any()}
        if branch in branches:
            assert "classifier.weight" not in graded
            assert "bottleneck.encoder.0.weight" in graded
            assert "bottleneck.classifier.0.weight" in graded
            assert "observer.backbone.layers.0.weight" in graded
        else:
            assert not graded


def test_every_trained_parameter_has_a_gradient() -> None:
    """... whatever the weights, or DDP would wait for it."""
    for arguments in ({}, {"ce_weight": 0.0, "rank_weight": 0.0, "cml_weight": 0.0}):
        module = made(**arguments)
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        module.training_step(batch(), 0).backward()
        missing = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


def test_all_processes_batches_are_one_for_rank_and_cml() -> None:
    module, (images, labels, infrared) = made(gather=True), batch()
    there = batch(seed=1)
    with torch.no_grad():
        here, other = module.looks(images), module.looks(there[0])
    together = Looks(*(Look(*map(torch.cat, zip(*pair, strict=True))) for pair in zip(here, other, strict=True)))
    theirs = iter([torch.cat([t for look in other for t in look], 1), torch.stack([there[1], there[2].long()], 1)])
    module.trainer = type("Pair", (), {"world_size": 2})()
    module.all_gather = lambda t, sync_grads: torch.stack([t, next(theirs)])  # type: ignore[method-assign]
    found = module.losses(here, labels, infrared)
    plain = made()
    alone = plain.losses(here, labels, infrared)
    expected = plain.losses(together, torch.cat([labels, there[1]]), torch.cat([infrared, there[2]]))
    for name in ("rank", "cml"):
        torch.testing.assert_close(found[name], expected[name])
        assert not torch.isclose(found[name], alone[name])
    for name in ("ce", "vsd", "vcd"):
        assert torch.equal(found[name], alone[name])


def test_the_papers_schedule() -> None:
    optimizer = adam([nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["weight_decay"] == 5e-4
    schedule, rates = warmed_up(optimizer), {}
    for epoch in range(1, 212):
        rates[epoch] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    expected = {1: 2.834e-5, 2: 5.408e-5, 9: 2.3426e-4, 10: 2.6e-4, 11: 2.6e-4, 209: 2.6e-4, 210: 2.6e-5, 211: 2.6e-5}
    assert {epoch: rates[epoch] for epoch in expected} == pytest.approx(expected)


# ---- evaluation and deployment


def test_evaluation_is_the_metric_of_the_vectors(tmp_path: Path) -> None:
    data = TwoViewDigits(size=8, val_size=60)
    module = made(num_classes=10)
    trainer = foreign.make_trainer(tmp_path)
    found = trainer.validate(module, data, verbose=False)[0]
    metric = CrossCameraRetrieval()
    module.eval()
    with torch.no_grad():
        for part, query in ((data.splits.val.query, True), (data.splits.val.gallery, False)):
            images, labels, cameras, index = zip(*part, strict=True)
            labels, cameras, index = map(torch.tensor, (labels, cameras, index))
            metric.update(module(torch.stack(images)), labels, cameras, query, index)
    expected = {f"val/{name}": value.item() for name, value in metric.compute().items()}
    assert expected.keys() == {"val/rank1", "val/rank10", "val/rank20", "val/mAP", "val/mINP"}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    vectors = torch.cat(trainer.predict(module, data)[0])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)))


def test_it_learns(tmp_path: Path) -> None:
    """A few steps bring the views together."""
    data = TwoViewDigits(size=8)
    module = made(num_classes=10, backbone=lambda: ReIDSmall((8, 16)), hidden=(32,), z_dim=8,
                  optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), lr_scheduler=None)  # fmt: skip
    trainer = foreign.make_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    before = trainer.validate(module, data, verbose=False)[0]["val/mAP"]
    trainer.fit(module, data)
    assert before < 0.25
    assert trainer.callback_metrics["val/mAP"] > 1.8 * before


@pytest.mark.parametrize("feature", ["observation", "representation"])
def test_what_is_deployed(feature: str, tmp_path: Path) -> None:
    module, (images, _, _) = made(feature=feature), batch()
    module.looks(images)  # statistics that are not those of the start
    embedder = module.embedder()
    torch.testing.assert_close(embedder(images), module.eval()(images))
    names = [name for name, _ in embedder.named_parameters()]
    assert not any("classifier" in name for name in names)
    assert embedder(images).shape == (20, 4 * 6)  # of v and of z, 2 z_dim
    shared = module.embedder(["shared_infrared", "shared_visible"])
    width = module(images).shape[1] // 4
    parts = module(images).split(width, 1)
    torch.testing.assert_close(shared(images), F.normalize(torch.cat([parts[1], parts[3]], 1)))
    assert params(shared) == params(module.branches["shared"].encoder(feature))
    if feature == "observation":  # attention has no loop: one file for any batch
        assert lightning_compress.export(shared, tmp_path / "shared", images[:1], format="torch").dynamic_batch
    with pytest.raises(ValueError, match=r"looks: there is no 'share'. Did you mean 'shared_visible'"):
        module.embedder(["share"])
    with pytest.raises(ValueError, match="looks: expected some of"):
        module.embedder([])


def test_a_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    """By name the trunk is rebuilt; one that a function built has to be given again."""
    small = {**SMALL, "num_classes": 10, "input_shape": (3, 16, 16)}
    module = CrossModalReID("reid_small", **small, kl_mode="kl")
    trainer = foreign.make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=1, max_epochs=1)
    trainer.fit(module, TwoViewDigits(size=16))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = CrossModalReID.load_from_checkpoint(tmp_path / "saved.ckpt")
    foreign.assert_same(module, again)
    assert again.kl_mode == "kl"
    assert "backbone" not in made().hparams


def test_trunks_start_from_given_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    given = ReIDSmall((4, 6)).state_dict()
    torch.save({**given, "fc.weight": torch.zeros(3, 6)}, tmp_path / "weights.pt")
    module = made(weights=str(tmp_path / "weights.pt"))
    for branch in module.branches.values():
        state = branch.observer.backbone.state_dict()
        assert all(torch.equal(state[name], value) for name, value in given.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vsd_weight": -1.0}, "vsd_weight: expected 0 or more, got -1.0"),
        ({"kl_mode": "true"}, "kl_mode: expected 'official' or 'kl', got 'true'"),
        ({"feature": "representations"}, "feature: expected 'observation' or 'representation', got 'representations'"),
        ({"temperature": 0.0}, "temperature: expected more than 0, got 0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a share"),
        ({"num_classes": 1}, "num_classes: expected 2 or more, got 1"),
        ({"input_shape": (1, 8, 8)}, r"input_shape: expected \(3, height, width\), got \(1, 8, 8\)"),
        ({"z_dim": 0}, "z_dim: expected at least 1"),
        ({"backbone": "reid_smal"}, "backbone: expected .* got 'reid_smal'. Did you mean 'reid_small'"),
        ({"backbone": ReIDSmall((4,))}, r"backbone: each branch needs one of its own: .* not ReIDSmall\(\)"),
        ({"rank_margins": (0.9, 1.0)}, r"rank_margins: expected m1, m2, a1, a2, got \(0.9, 1.0\)"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**arguments)


def test_other_data_are_refused(tmp_path: Path) -> None:
    trainer = foreign.make_trainer(tmp_path)
    with pytest.raises(MisconfigurationException, match="num_classes: TwoViewDigits has 10, CrossModalReID got 5"):
        trainer.fit(made(), TwoViewDigits(size=8))
    with pytest.raises(MisconfigurationException, match=r"the training batches must be \(images, labels, infrared\)"):
        trainer.fit(made(num_classes=10), Digits(size=8, channels=3))
    with pytest.raises(MisconfigurationException, match="evaluation takes two loaders, queries and gallery, got 1"):
        trainer.validate(made(num_classes=10), TwoViewDigits(size=8).val_dataloader()[0])
