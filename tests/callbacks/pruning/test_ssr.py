"""SSR: the updates by hand, published sizes, masking against cutting, and the timeline of stages."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from foreign import Foreign, assert_same, digits, fit, made, make_trainer, no_pictures, widths
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from real_data import real_data
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from torchvision.models import resnet50

from lightning_compress import profile
from lightning_compress.callbacks import SSR, L1Norm
from lightning_compress.callbacks.pruning.ssr import (
    Split,
    group_rows,
    group_shrink_l21,
    group_threshold_l20,
    lambda_by_layer,
    penalty,
    penalty_gradient,
    split_rows,
    update_fy,
)
from lightning_compress.core.report import Account
from lightning_compress.core.surgery import ChannelPlan, apply_cuts, channel_graph
from lightning_compress.networks import LeNet5

W = torch.tensor([[3.0, 4.0], [0.3, 0.4], [1.0, 0.0]])
GONE = {"conv1": [0, 3, 7], "conv2": list(range(5, 30)), "fc1": list(range(0, 500, 3))}


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected), atol=1e-6, rtol=0)


# ---- the updates


def test_first_update():
    f, y = update_fy(W, torch.zeros_like(W), lambda_=1, rho=1)
    close(f, [[2.4, 3.2], [0.0, 0.0], [0.0, 0.0]])
    close(y, [[0.6, 0.8], [0.3, 0.4], [1.0, 0.0]])
    close(f - y, [[1.8, 2.4], [-0.3, -0.4], [-1.0, 0.0]])
    close(penalty(W, f, y, 1), 4.5)


def test_a_row_may_come_alive_by_its_multiplier():
    f, y = update_fy(W, torch.zeros_like(W), lambda_=1, rho=1)
    f, y = update_fy(W, y, lambda_=1, rho=1)
    close(f, [[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    close(y, [[0.6, 0.8], [0.6, 0.8], [1.0, 0.0]])
    close(penalty(W, f, y, 1), 2.125)
    f, again = update_fy(W, y, lambda_=1, rho=1)
    close(f, [[3.0, 4.0], [0.3, 0.4], [1.0, 0.0]])
    close(again, y.tolist())
    close(penalty(W, f, again, 1), 1.5)


def test_l20_keeps_what_is_strictly_longer_than_the_threshold():
    f, y = update_fy(W, torch.zeros_like(W), lambda_=0.5, rho=1, norm="l20")
    close(f, [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    close(y, [[0.0, 0.0], [0.3, 0.4], [1.0, 0.0]])


@pytest.mark.parametrize("norm", ["l21", "l20"])
@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_equals_a_loop_over_filters(norm, rho):
    generator = torch.Generator().manual_seed(0)
    w, y = torch.randn(12, 7, generator=generator), torch.randn(12, 7, generator=generator)
    f, new = update_fy(w, y, 1.5, rho, norm)
    for i in range(12):
        v = w[i] + y[i] / rho
        n = math.sqrt(float(v.square().sum()))
        if norm == "l21":
            expected = v * max(n - 1.5 / rho, 0) / (n + 1e-9)
        else:
            expected = v if n > math.sqrt(2 * 1.5 / rho) else torch.zeros_like(v)
        torch.testing.assert_close(f[i], expected)
        torch.testing.assert_close(new[i], y[i] + rho * (w[i] - expected))


@pytest.mark.parametrize("shrink", [group_shrink_l21, group_threshold_l20])
def test_rows_of_zeros_and_rows_that_sum_to_zero(shrink):
    f = shrink(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), 0.1, 1.0)
    assert f[0].tolist() == [0, 0]
    assert f[1].norm() > 1


@pytest.mark.parametrize("rho", [0.5, 1.0, 4.0])
def test_gradient_of_the_penalty(rho):
    generator = torch.Generator().manual_seed(1)
    w, f, y = (torch.randn(9, 26, generator=generator, dtype=torch.float64) for _ in range(3))
    w.requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(w, f, y, rho), w)
    assert (gradient - penalty_gradient(w, f, y, rho)).abs().max() < 1e-6
    (lagrangian,) = torch.autograd.grad((y * (w - f)).sum() + rho / 2 * (w - f).square().sum(), w)
    assert (gradient - lagrangian).abs().max() < 1e-6


def test_gradient_where_weights_equal_their_target():
    f = torch.ones(2, 3)
    assert penalty_gradient(f, f, torch.zeros(2, 3), 1).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("norm", ["l21", "l20"])
def test_without_lambda_the_copy_is_the_weight(norm):
    f, y = update_fy(W, torch.zeros_like(W), 0.0, 1.0, norm)
    close(f, W.tolist())
    close(y, torch.zeros_like(W).tolist())
    close(penalty(W, f, y, 1), 0.0)


def test_converges_to_the_soft_threshold():
    """min 1/2 ||W - A||^2 + ||W||_{2,1} has a known solution."""
    target = W[:2]
    w, y = target.clone(), torch.zeros(2, 2)
    for _ in range(60):
        f, y = update_fy(w, y, lambda_=1, rho=1)
        for _ in range(40):
            w = w - 0.1 * (w - target + penalty_gradient(w, f, y, 1))
    for tensor in (w, f):
        close(tensor, [[2.4, 3.2], [0.0, 0.0]])
    close(y, [[0.6, 0.8], [0.3, 0.4]])


def test_rows_are_filters_with_their_bias_last():
    conv, linear = nn.Conv2d(3, 4, 2), nn.Linear(6, 5)
    rows = group_rows([conv.weight, conv.bias])
    assert rows.shape == (4, 13)
    assert torch.equal(rows[2], torch.cat([conv.weight[2].flatten(), conv.bias[2:3]]))
    for tensors in ([conv.weight, conv.bias], [linear.weight], [linear.weight, linear.bias]):
        for back, tensor in zip(split_rows(group_rows(tensors), tensors), tensors, strict=True):
            assert torch.equal(back, tensor)
    half = conv.weight.bfloat16()
    assert group_rows([half]).dtype == torch.float32
    assert split_rows(group_rows([half]), [half])[0].dtype == torch.bfloat16


def test_the_majority_of_the_last_steps_decides():
    w = torch.tensor([[1.0], [2.0], [3.0]])
    alive = torch.tensor([[True, False, False], [True, False, True], [False, False, True]])

    def survivors(last):
        return Split(w, w, 1.0, alive[-last:]).survivors(w).tolist()

    assert survivors(1) == [2]
    assert survivors(3) == [0, 2]


def test_the_longest_filter_stays_where_all_are_dead():
    w = torch.tensor([[1.0], [-3.0], [2.0]])
    assert Split(w, w, 1.0, torch.zeros(1, 3, dtype=torch.bool)).survivors(w).tolist() == [1]


def test_lambda_by_layer():
    names = ["net.conv1", "net.conv2", "net.fc1"]
    assert lambda_by_layer(0.2, names) == dict.fromkeys(names, 0.2)
    assert lambda_by_layer({"*fc1": 0.02, "*conv*": 0.4, "*conv2": 0.1}, names) == {
        "net.conv1": 0.4, "net.conv2": 0.1, "net.fc1": 0.02
    }  # fmt: skip
    with pytest.raises(ValueError, match="lambda_: 'conv3'"):
        lambda_by_layer({"conv3": 0.1}, names)


# ---- sizes


def narrow_lenet(*filters):
    net = LeNet5()
    kept = {name: torch.arange(n) for name, n in zip(("conv1", "conv2", "fc1"), filters, strict=True)}
    apply_cuts(net, ChannelPlan(kept).cuts(channel_graph(net, (1, 1, 28, 28))))
    return net


@pytest.mark.parametrize(
    ("filters", "params", "macs", "with_bias"),
    [
        pytest.param((20, 50, 500), 431_080, 2_293_000, 2_308_000, id="base"),
        pytest.param((3, 11, 108), 21_120, 116_088, 118_638, id="SSR-L2,1 118K/21K"),
        pytest.param((2, 8, 77), None, None, None, id="SSR-L2,1 2-8-77"),
        pytest.param((3, 15, 175), 45_153, 158_950, 161_823, id="SSL 162K/45K"),
        pytest.param((3, 8, 82), 12_094, 92_916, 95_248, id="GSS 95K/12K"),
        pytest.param((2, 11, 134), 26_000, None, 91_000, id="SSL 91K/26K"),
        pytest.param((2, 12, 127), 27_000, None, 95_000, id="TE 95K/27K"),
        pytest.param((2, 7, 99), 13_000, None, 65_000, id="TE 65K/13K"),
        pytest.param((3, 11, 109), 21_000, None, 119_000, id="GSS 119K/21K"),
    ],
)
def test_lenet_of_the_published_tables(filters, params, macs, with_bias):
    cost = profile(narrow_lenet(*filters), (1, 1, 28, 28))
    added = sum(layer.outputs for layer in cost.layers if layer.bias)

    def agree(ours, printed):
        return printed is None or (ours == printed if printed % 1000 else abs(ours - printed) <= 600)

    assert agree(cost.params, params)
    assert agree(cost.macs, macs)
    assert agree(cost.macs + added, with_bias)


# ---- masking and cutting are the same


def masked(net, gone):
    tensors = {n: t.detach().clone() for n, t in net.named_parameters()}
    for layer, indices in gone.items():
        for tensor in (f"{layer}.weight", f"{layer}.bias"):
            if tensor in tensors:
                tensors[tensor][indices] = 0
    return {n: t.requires_grad_() for n, t in tensors.items()}


def test_masked_and_cut_lenet_have_the_same_logits_and_gradients():
    torch.manual_seed(0)
    net, x = LeNet5(), torch.randn(8, 1, 28, 28)
    tensors = masked(net, GONE)
    expected = functional_call(net, tensors, x)
    expected.square().sum().backward()
    small = copy.deepcopy(net)
    width = {"conv1": 20, "conv2": 50, "fc1": 500}
    kept = {n: torch.tensor(sorted(set(range(width[n])) - set(g))) for n, g in GONE.items()}
    cuts = ChannelPlan(kept).cuts(channel_graph(net, (1, 1, 28, 28)))
    apply_cuts(small, cuts)
    logits = small(x)
    logits.square().sum().backward()
    assert (logits - expected).abs().max() < 1e-6
    for name, parameter in small.named_parameters():
        gradient = tensors[name].grad
        for cut in cuts:
            if cut.tensor == name:
                gradient = gradient.index_select(cut.dim, cut.kept)
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)


def test_masked_and_cut_agree_behind_a_batch_norm():
    net, x = made().net.eval(), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    tensors = masked(net, {"blocks.0.conv1": [1, 4, 5], "blocks.0.bn1": [1, 4, 5]})
    expected = functional_call(net, tensors, x)
    kept = ChannelPlan({"blocks.0.conv1": torch.tensor([0, 2, 3, 6, 7, 8, 9, 10, 11])})
    apply_cuts(net, kept.cuts(channel_graph(net, (1, 1, 8, 8))))
    assert (net(x) - expected).abs().max() < 1e-6


# ---- the callback


def plain():
    """Two convolutions and a hidden layer, without norms."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 20), nn.ReLU(),
        nn.Linear(20, 10),
    )  # fmt: skip


QUICK = {"steps_per_layer": 4, "finetune_steps": 1, "update_fy_step": 2}


class Watch(Callback):
    """What every step began with; stands behind SSR."""

    def __init__(self, *names):
        self.names, self.rates, self.memory, self.states, self.widths = names, [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.memory.append(len(optimizer.state))
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items() if isinstance(v, torch.Tensor)})
        self.widths.append(widths(pl_module))


class Metrics(DummyLogger):
    """What the callback logged."""

    def __init__(self):
        super().__init__()
        self.found = []

    def log_metrics(self, metrics, step=None):
        if any(key.startswith("ssr/") for key in metrics):
            self.found.append((step, metrics))


def by_hand(net, lambda_, rho, lr, every, steps) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A search of the first convolution, with the penalty in the loss."""
    conv = net[0]
    optimizer = torch.optim.SGD(conv.parameters(), lr, momentum=0.9, weight_decay=0)
    f = y = None
    batches = list(digits())
    for t in range(steps):
        w = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1)
        if t % every == 0:
            y = torch.zeros_like(w) if y is None else y
            v = (w + y / rho).detach()
            n = v.norm(dim=1, keepdim=True)
            f = v * (n - lambda_ / rho).clamp(min=0) / n
            y = y + rho * (w.detach() - f)
        images, labels = batches[t % len(batches)]
        loss = F.cross_entropy(net(images), labels) + rho / 2 * (w - (f - y / rho)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield w.detach(), f


class PlainSGD(Foreign):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def test_a_search_is_the_one_written_by_hand(tmp_path):
    torch.manual_seed(0)
    module = PlainSGD(plain(), lr=0.05)
    net = copy.deepcopy(module.net)
    expected = list(by_hand(net, 0.3, 2.0, 0.05, 3, 10))
    ssr = SSR(0.3, rho=2.0, include=["net.0"], steps_per_layer=10, finetune_steps=2, update_fy_step=3)
    watch = Watch()
    fit(module, tmp_path, ssr, watch, max_epochs=3)
    for state, (w, _) in zip(watch.states, expected, strict=False):
        torch.testing.assert_close(state["net.0.weight"].flatten(1), w[:, :-1], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state["net.0.bias"], w[:, -1], atol=1e-6, rtol=1e-5)
    dead = expected[-1][1].norm(dim=1) == 0
    assert 0 < dead.sum() < 6
    # The step after the search begins with the filters that are left, as they were.
    torch.testing.assert_close(watch.states[10]["net.0.weight"], net[0].weight.detach()[~dead], atol=1e-6, rtol=1e-5)
    assert watch.states[10]["net.2.weight"].shape[1] == 6 - dead.sum()


def test_clipping_comes_after_the_penalty(tmp_path):
    """With all gradients clipped to almost nothing, the pull moves nothing either."""
    torch.manual_seed(0)
    module = PlainSGD(plain(), lr=0.05)
    before = module.net[0].weight.detach().clone()
    fit(module, tmp_path, SSR(0.0, include=["net.0"], **QUICK), max_epochs=2, gradient_clip_val=1e-12)
    torch.testing.assert_close(module.net[0].weight.detach(), before, atol=1e-9, rtol=0)


def test_layer_after_layer(tmp_path):
    watch, module = Watch(), made()
    fit(module, tmp_path, SSR(100.0, **QUICK), watch, max_epochs=3)
    first, second = "net.blocks.0.conv1", "net.blocks.1.conv1"
    assert [w[first] for w in watch.widths] == [12] * 4 + [1] * 8
    assert [w[second] for w in watch.widths] == [12] * 9 + [1] * 3
    moved = [{k for k in a if a[k].shape != b[k].shape or not torch.equal(a[k], b[k])}
             for a, b in zip(watch.states, watch.states[1:], strict=False)]  # fmt: skip
    # Own weights, and the statistics of the own norm; no weight decay, no momentum, no statistics elsewhere.
    own = {f"net.blocks.0.bn1.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved[0] == moved[1] == moved[2] == {f"{first}.weight", *own}
    assert moved[5] == moved[6] == {f"{second}.weight", *(k.replace("0", "1") for k in own)}
    tuned = {"net.stem.weight", "net.bn.bias", "net.bn.running_mean", "net.blocks.1.conv2.weight", "net.head.bias"}
    assert tuned <= moved[4] & moved[10]
    assert all(m.training for m in module.modules())


def test_all_at_once(tmp_path):
    watch, module = Watch(), made()
    fit(module, tmp_path, SSR(100.0, mode="joint", **QUICK), watch, max_epochs=2)
    assert [sorted(set(w.values())) for w in watch.widths] == [[8, 10, 12]] * 4 + [[1, 8, 10]] * 4
    moved = {k for k, v in watch.states[0].items() if not torch.equal(v, watch.states[1][k])}
    assert moved == set(watch.states[0])


class StepRates(PlainSGD):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_rates_stand_still_in_a_search_and_start_afresh_after_it(tmp_path):
    torch.manual_seed(0)
    watch = Watch()
    ssr = SSR(0.1, include=["net.0", "net.2"], steps_per_layer=4, finetune_steps=3, update_fy_step=2, start_epoch=1)
    fit(StepRates(plain(), lr=1.0e-1), tmp_path, ssr, watch, max_epochs=5)
    pretraining, search, tuning = [0.1, 0.1, 0.01, 0.01], [0.1] * 4, [0.1, 0.1, 0.01]
    assert watch.rates[:18] == pytest.approx([*pretraining, *search, *tuning, *search, *tuning])
    # No momentum passes from one phase to the next.
    assert watch.memory[:18] == [0, 8, 8, 8, 0, 2, 2, 2, 0, 8, 8, 0, 2, 2, 2, 0, 8, 8]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_come_every_so_many_optimiser_steps(accumulate, tmp_path):
    torch.manual_seed(0)
    log = Metrics()
    ssr = SSR(0.0, include=["net.0"], steps_per_layer=5, finetune_steps=1, update_fy_step=2)
    fit(PlainSGD(plain()), tmp_path, ssr, logger=log, max_epochs=3, accumulate_grad_batches=accumulate)
    assert [step for step, _ in log.found] == [0, 2, 4]
    assert [m["ssr/net.0/filters"] for _, m in log.found] == [6, 6, 6]
    assert log.found[0][1]["ssr/net.0/penalty"] < 1e-12


def test_rho_grows_after_each_update(tmp_path):
    log = Metrics()
    torch.manual_seed(0)
    module = PlainSGD(plain(), lr=1e-9)
    ssr = SSR(0.3, include=["net.0"], rho_growth=2.0, steps_per_layer=4, finetune_steps=1, update_fy_step=2)
    w, y = group_rows(list(module.net[0].parameters())).detach(), torch.zeros(6, 10)
    fit(module, tmp_path, ssr, logger=log, max_epochs=2)
    for rho, (_, metrics) in zip((1.0, 2.0), log.found, strict=True):
        f, y = update_fy(w, y, 0.3, rho)
        assert metrics["ssr/net.0/penalty"] == pytest.approx(float(penalty(w, f, y, rho)), rel=1e-4)


def test_where_all_filters_die_the_longest_stays_and_a_warning_says_so(tmp_path):
    torch.manual_seed(0)
    module = PlainSGD(plain(), lr=1e-6)
    longest = group_rows([module.net[0].weight, module.net[0].bias]).norm(dim=1).argmax()
    weight = module.net[0].weight[longest].detach().clone()
    with pytest.warns(UserWarning, match=r"lambda_=50 with rho=1 lets no filter of 'net.0' through"):
        fit(module, tmp_path, SSR(50.0, include=["net.0"], **QUICK), max_epochs=2)
    torch.testing.assert_close(module.net[0].weight.detach()[0], weight, atol=1e-3, rtol=0)


def test_without_lambda_nothing_goes(tmp_path):
    torch.manual_seed(0)
    module = PlainSGD(plain())
    before = widths(module)
    fit(module, tmp_path, SSR(0.0, **QUICK), max_epochs=4)
    assert widths(module) == before
    assert not any("load_this" in key for key in module.state_dict())  # a plain checkpoint
    account = Account.load(tmp_path / "compression.json")
    assert "net.0: 6 of 6 filters stay." in account.notes


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, 9 + 1), ({"include_bias": False}, 9), ({"include_norm": True}, 9 + 3)],
    ids=["bias", "no bias", "norm"],
)
def test_what_belongs_to_a_row(options, length, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    seen = []

    class Rows(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append({k: tuple(v["f"].shape) for k, v in ssr.state_dict()["splits"].items()})

    ssr = SSR(0.0, **QUICK, **options)
    module = PlainSGD(net)
    fit(module, tmp_path, ssr, Rows(), max_epochs=2, limit_train_batches=3)
    assert seen == [{"net.0": (6, length)}] * 4 + [{}] * 2


def test_gains_learn_in_a_layerwise_search_if_they_belong_to_the_rows(tmp_path):
    for include_norm in (False, True):
        watch = Watch()
        fit(made(), tmp_path, SSR(0.0, include_norm=include_norm, **QUICK), watch, max_epochs=3)
        gain = [s["net.blocks.0.bn1.weight"] for s in watch.states[:2]]
        assert torch.equal(*gain) != include_norm


def test_two_of_them_on_layers_that_read_each_other(tmp_path):
    torch.manual_seed(0)
    module = PlainSGD(plain())
    pair = [SSR(100.0, include=[name], **QUICK) for name in ("net.0", "net.2")]
    fit(module, tmp_path, *pair, max_epochs=2)
    assert [module.net[i].out_channels for i in (0, 2)] == [1, 1]


def test_reasons_for_what_is_left_alone(tmp_path):
    fit(made(), tmp_path, SSR({"*0.conv1": 0.0}, **QUICK), max_epochs=2)
    reasons = dict(Account.load(tmp_path / "compression.json").left_alone)
    assert reasons["net.stem"] == "shares its channels with net.blocks.0.conv2, net.blocks.1.conv2"
    assert reasons["net.blocks.1.conv1"] == "has no number in `lambda_`"
    assert "output" in reasons["net.head"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda conv: conv.weight.requires_grad_(False), "does not learn"),
        (lambda conv: register_parametrization(conv, "weight", nn.Identity()), "computes its weight"),
    ],
    ids=["frozen", "parametrised"],
)
def test_layers_whose_rows_cannot_be_pulled(change, reason, tmp_path):
    module = made()
    change(module.net.blocks[0].conv1)
    fit(module, tmp_path, SSR(100.0, **QUICK), max_epochs=2)
    assert dict(Account.load(tmp_path / "compression.json").left_alone)["net.blocks.0.conv1"].startswith(reason)
    assert module.net.blocks[1].conv1.out_channels == 1


def test_in_a_resnet50_the_first_two_convolutions_of_each_block(tmp_path):
    module = made(resnet50)
    module.example_input_array = torch.zeros(1, 3, 64, 64)
    ssr = SSR(0.1, include=["net.layer?.*"])
    ssr.setup(make_trainer(tmp_path, ssr), module, "fit")
    blocks = [f"net.layer{i}.{j}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)]
    assert list(ssr.state_dict()["lambdas"]) == [f"{b}.{conv}" for b in blocks for conv in ("conv1", "conv2")]
    assert ssr.state_dict()["norms"]["net.layer3.2.conv2"] == "net.layer3.2.bn2"


# ---- what is refused, and what goes wrong


def test_a_trainer_that_stops_too_early_is_refused_or_warned_about(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"needs 10 optimiser steps, but the Trainer stops after 8"):
        fit(made(), tmp_path, SSR(100.0, **QUICK), max_epochs=2)
    with pytest.raises(MisconfigurationException, match=r"needs 14 .* 9: 4 before start_epoch=1, then 2 stages"):
        fit(made(), tmp_path, SSR(100.0, **QUICK, start_epoch=1), max_epochs=-1, max_steps=9)
    module = made()
    with pytest.warns(UserWarning, match="What is not searched to the end stays whole"):
        fit(module, tmp_path, SSR(100.0, **QUICK, allow_incomplete=True), max_epochs=2)
    assert [widths(module)[f"net.blocks.{i}.conv1"] for i in (0, 1)] == [1, 12]
    notes = Account.load(tmp_path / "compression.json").notes
    assert "The fit ended before net.blocks.1.conv1 had been searched." in notes
    assert all(m.training for m in module.modules())


def test_norms_learn_again_after_an_interruption(tmp_path):
    class Broken(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            assert not pl_module.net.bn.training
            raise RuntimeError("broken")

    module = made()
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, tmp_path, SSR(100.0, **QUICK), Broken(), max_epochs=3)
    assert all(m.training for m in module.modules())


def test_a_pull_that_diverges_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"SSR\(rho=20\): rho \* learning rate reaches 2"):
        fit(made(), tmp_path, SSR(0.0, rho=20, **QUICK), fast_dev_run=True)


def test_networks_without_channels_of_their_own(tmp_path):
    with pytest.raises(MisconfigurationException, match="SSR finds no layer of Foreign whose channels are its own"):
        fit(made(), tmp_path, SSR(0.1, include=["net.stem"], **QUICK))


def test_a_layer_that_another_callback_narrows_meanwhile(tmp_path):
    with pytest.raises(RuntimeError, match=r"SSR: 'net.blocks.0.conv1' changed from \(12, 72\) to \(6, 36\)"):
        fit(made(), tmp_path, SSR(0.1, **{**QUICK, "steps_per_layer": 6}), L1Norm(0.5, start_epoch=1), max_epochs=4)


def test_numbers_for_no_layer(tmp_path):
    with pytest.raises(ValueError, match=r"lambda_=\{\}"):
        fit(made(), tmp_path, SSR({}, **QUICK))


def test_the_same_trainer_goes_on_in_the_middle_of_a_search(tmp_path):
    module = made()
    trainer = fit(module, tmp_path, SSR(100.0, **QUICK, allow_incomplete=True), max_epochs=1, limit_train_batches=2)
    assert widths(module)["net.blocks.0.conv1"] == 12
    trainer.fit_loop.max_epochs = 5
    with no_pictures:
        trainer.fit(module, digits())
    assert trainer.global_step == 10
    assert [widths(module)[f"net.blocks.{i}.conv1"] for i in (0, 1)] == [1, 1]


def test_manual_optimisation_is_refused(tmp_path):
    module = made()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="optimises manually"):
        fit(module, tmp_path, SSR(0.1, **QUICK))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(made(), tmp_path, ModelCheckpoint(tmp_path, "{epoch}"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="written by a run without SSR"):
        fit(made(), tmp_path, SSR(0.1, **QUICK), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=4)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resumed_in_the_middle_of_a_search(epoch, tmp_path):
    """F, Y, rho, the votes and the modes of the norms come back."""

    def run(*callbacks, **kwargs):
        module = made()
        options = {"steps_per_layer": 5, "finetune_steps": 1, "update_fy_step": 2, "average_last": 2}
        ssr = SSR(0.05, rho_growth=1.5, **options)
        fit(module, tmp_path, ssr, *callbacks, max_epochs=4, **kwargs)
        return module

    whole = run(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1))
    assert_same(run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), whole)
    assert all(m.training for m in whole.modules())


# ---- real data


@pytest.mark.real_data
def test_a_larger_lambda_leaves_fewer_filters_of_mnist(tmp_path):
    from lightning_compress.datamodules import MNIST

    root = real_data("MNIST/raw/train-images-idx3-ubyte")
    torch.manual_seed(0)
    data = MNIST(str(root), batch_size=32, mean=(0.50196,), std=(0.50196,))
    trained = PlainSGD(LeNet5(), lr=0.01)
    make_trainer(tmp_path, max_steps=150, limit_val_batches=0).fit(trained, data)
    left = []
    for lambda_ in (0.05, 0.2, 0.8):
        module = copy.deepcopy(trained)
        ssr = SSR(lambda_, include=["net.conv1"], steps_per_layer=100, finetune_steps=1, update_fy_step=10)
        make_trainer(tmp_path, ssr, max_steps=101, limit_val_batches=0).fit(module, data)
        left.append(module.net.conv1.out_channels)
    assert left[0] > left[1] > left[2]
