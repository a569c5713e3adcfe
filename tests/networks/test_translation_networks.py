from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.core.profile import profile
from lightning_compress.core.weights import load_weights
from lightning_compress.networks import PatchDiscriminator, PixelDiscriminator, ResNetGenerator, UNetGenerator
from lightning_compress.networks.gan_layers import InstanceNorm2d, init_weights
from lightning_compress.networks.resnet_generator import resnet_generator_macs
from lightning_compress.networks.unet_generator import unet_generator_macs

NARROW_RESNET = [16, 24, 48, *[24] * 9, 32, 16]
NARROW_UNET = [10, 20, 30, 40, 40, 40, 40, 40, 40, 40, 40, 30, 20, 16, 8]

# network, GMACs as the papers count transposed convolutions, GMACs that are computed, parameters
GENERATORS: list[tuple[str, Callable[[], nn.Module], float, float | None, int]] = [
    ("1703.10593 ResNet-9 ngf 64", lambda: ResNetGenerator(), 56.799265, 49.551507, 11_378_179),
    ("1703.10593 ResNet-6 ngf 64", lambda: ResNetGenerator(blocks=6), 42.304, 35.056, 7_837_699),
    ("2003.08936 ResNet-9 ngf 48", lambda: ResNetGenerator(ngf=48), 32.181, 28.104, 6_404_739),
    ("2003.08936 ResNet-9 ngf 32", lambda: ResNetGenerator(ngf=32), 14.508, 12.696, 2_850_563),
    ("2203.06321 ResNet-9 ngf 24", lambda: ResNetGenerator(ngf=24), 8.276, 7.257, 1_605_699),
    ("2203.06321 ResNet-9 ngf 16", lambda: ResNetGenerator(ngf=16), 3.781, 3.328, 715_651),
    ("2212.14169 mobile ngf 64", lambda: ResNetGenerator(separable=True), 18.314, 11.067, 1_987_075),
    ("2011.08382 mobile ngf 48", lambda: ResNetGenerator(ngf=48, separable=True), 10.565, 6.488, 1_130_883),
    ("2011.08382 mobile ngf 32", lambda: ResNetGenerator(ngf=32, separable=True), 4.929, 3.117, 514_307),
    ("2212.14169 mobile ngf 16", lambda: ResNetGenerator(ngf=16, separable=True), 1.4077, 0.9547, 137_347),
    ("mobile ngf 12", lambda: ResNetGenerator(ngf=12, separable=True), 0.8576, 0.6028, 80_547),
    ("mobile ngf 8", lambda: ResNetGenerator(ngf=8, separable=True), 0.4396, 0.3264, 38_723),
    ("2011.08382 ResNet-9 by widths", lambda: ResNetGenerator(widths=NARROW_RESNET), 1.700266, None, 224_371),
    ("1611.07004 U-Net-256 ngf 64", lambda: UNetGenerator(), 18.140, 6.048, 54_413_955),
    ("2203.06321 U-Net-256 ngf 32", lambda: UNetGenerator(ngf=32), 4.648, 1.550, 13_608_259),
    ("2212.11091 U-Net-256 ngf 16", lambda: UNetGenerator(ngf=16), 1.2187, 0.4063, 3_404_451),
    ("2011.08382 U-Net-256 by widths", lambda: UNetGenerator(widths=NARROW_UNET), 0.259408896, None, 342_763),
]
DISCRIMINATORS: list[tuple[str, Callable[[], nn.Module], int, float, int]] = [
    ("1703.10593 3ch ndf 64 IN", lambda: PatchDiscriminator(3, 64), 3, 3.147, 2_764_737),
    ("1611.07004 6ch ndf 64 BN", lambda: PatchDiscriminator(6, 64, norm="batch"), 6, 3.197, 2_768_705),
    ("2003.08936 6ch ndf 128 BN", lambda: PatchDiscriminator(6, 128, norm="batch"), 6, 12.573, 11_042_433),
    ("2212.14169 6ch ndf 128 IN", lambda: PatchDiscriminator(6, 128), 6, 12.573, 11_040_641),
    ("2203.06321 3ch ndf 32 IN", lambda: PatchDiscriminator(3, 32), 3, 0.801, 694_241),
    ("2203.06321 6ch ndf 32 BN", lambda: PatchDiscriminator(6, 32, norm="batch"), 6, 0.826, 696_225),
    ("1611.07004 pixel 6ch ndf 64 BN", lambda: PixelDiscriminator(6, 64, "batch"), 6, 0.570, 9_024),
    ("1611.07004 pixel 6ch ndf 64 IN", lambda: PixelDiscriminator(6, 64), 6, 0.570, 8_897),
]


@pytest.mark.parametrize(
    ("build", "published", "computed", "params"), [g[1:] for g in GENERATORS], ids=[g[0] for g in GENERATORS]
)
def test_generators_cost_what_the_papers_say(
    build: Callable[[], nn.Module], published: float, computed: float | None, params: int
) -> None:
    with torch.device("meta"):
        network = build()
    found = profile(network, (1, 3, 256, 256), convention="gan")
    assert found.params == params
    assert found.cost / 1e9 == pytest.approx(published, rel=1e-4)  # all digits printed
    assert computed is None or found.macs / 1e9 == pytest.approx(computed, rel=2e-4)
    if isinstance(network, UNetGenerator):
        assert found.cost == unet_generator_macs(network.widths)
    else:
        assert found.cost == resnet_generator_macs(network.widths, separable=is_separable(network))


def is_separable(network: nn.Module) -> bool:
    return any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in network.modules())


def test_a_narrow_resnet_to_the_unit() -> None:
    assert resnet_generator_macs(NARROW_RESNET) == 1_700_265_984


@pytest.mark.parametrize(
    ("build", "channels", "published", "params"), [d[1:] for d in DISCRIMINATORS], ids=[d[0] for d in DISCRIMINATORS]
)
def test_discriminators_cost_what_the_papers_say(
    build: Callable[[], nn.Module], channels: int, published: float, params: int
) -> None:
    with torch.device("meta"):
        network = build()
    found = profile(network, (1, channels, 256, 256), convention="gan")
    assert found.params == params
    assert found.cost == found.macs
    assert found.cost / 1e9 == pytest.approx(published, abs=5.1e-4)
    side = 256 if isinstance(network, PixelDiscriminator) else 30
    assert network(torch.zeros(2, channels, 256, 256, device="meta")).shape == (2, 1, side, side)


def test_generators_keep_the_size() -> None:
    with torch.device("meta"):
        for network, size in (
            (ResNetGenerator(), 256),
            (ResNetGenerator(separable=True), 100),
            (UNetGenerator(), 256),
            (UNetGenerator(), 512),
            (UNetGenerator(downs=7), 128),
        ):
            assert network(torch.zeros(1, 3, size, size)).shape == (1, 3, size, size)


@pytest.mark.parametrize(
    ("network", "size", "multiple"), [(UNetGenerator, 200, 256), (UNetGenerator, 128, 256), (ResNetGenerator, 254, 4)]
)
@pytest.mark.parametrize("training", [True, False])
def test_sizes_that_do_not_fit_are_named(network: type[nn.Module], size: int, multiple: int, training: bool) -> None:
    with torch.device("meta"):
        generator = network().train(training)
        with pytest.raises(ValueError, match=f"{network.__name__} takes .* multiples of {multiple}, got {size}x{size}"):
            generator(torch.zeros(1, 3, size, size))


def test_layers_have_the_indices_that_published_hooks_use() -> None:
    model = ResNetGenerator(ngf=4).model
    assert [i for i, layer in enumerate(model) if isinstance(layer, nn.ReLU)] == [3, 6, 9, 21, 24]
    assert [i for i, layer in enumerate(model) if isinstance(layer, nn.ConvTranspose2d)] == [19, 22]
    assert all(hasattr(model[i], "conv_block") for i in range(10, 19))
    assert isinstance(model[26], nn.Conv2d)
    kinds = [type(layer).__name__ for layer in model[10].conv_block]
    half = ["ReflectionPad2d", "Conv2d", "InstanceNorm2d"]
    assert kinds == [*half, "ReLU", *half]
    mobile = [type(layer).__name__ for layer in ResNetGenerator(ngf=4, separable=True).model[10].conv_block]
    assert mobile == [k.replace("Conv2d", "SeparableConv2d") for k in (*half, "ReLU", "Dropout", *half)]
    judge = PatchDiscriminator(ndf=4)
    assert [i for i, layer in enumerate(judge.model) if isinstance(layer, nn.LeakyReLU)] == [1, 4, 7, 10]
    assert isinstance(judge.model[11], nn.Conv2d)
    shapes = {}
    for i in (4, 10):
        judge.model[i].register_forward_hook(lambda m, x, y, i=i: shapes.update({i: y.shape[-1]}))
    judge(torch.zeros(1, 3, 256, 256))
    assert shapes == {4: 64, 10: 31}
    assert judge.model[:-1](torch.zeros(1, 3, 64, 64)).shape == (1, 32, 7, 7)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_biases_stand_where_the_norm_does_not_undo_them(norm: str) -> None:
    def biased(network: nn.Module) -> list[bool]:
        convolutions = (nn.Conv2d, nn.ConvTranspose2d)
        return [layer.bias is not None for layer in network.modules() if isinstance(layer, convolutions)]

    instance = norm == "instance"
    assert biased(ResNetGenerator(ngf=4, norm=norm)) == [instance] * 23 + [True]
    unet = UNetGenerator(ngf=4, norm=norm)
    named = {n: m.bias is not None for n, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))}
    assert sum(named.values()) == (16 if instance else 1)
    assert named["model.model.3"]
    assert biased(PatchDiscriminator(norm=norm, ndf=4)) == [True, instance, instance, instance, True]
    inside = ResNetGenerator(ngf=4, norm=norm, separable=True).model[10].conv_block[1].conv
    assert [type(layer) for layer in inside] == [nn.Conv2d, InstanceNorm2d, nn.Conv2d]
    assert inside[0].bias is not None
    assert inside[2].bias is not None


def test_dropout_of_the_unet() -> None:
    """Behind the norms of the three wide convolutions next to the innermost one."""
    names = [n for n, m in UNetGenerator(ngf=2).named_modules() if isinstance(m, nn.Dropout)]
    assert [n.count("model") for n in names] == [8, 7, 6]
    assert not any(isinstance(m, nn.Dropout) for m in UNetGenerator(ngf=2, dropout=0).modules())


def reference_unet(x: Tensor, state: dict[str, Tensor], downs: int) -> Tensor:
    """The U-Net as the authors wrote it, with activations in place, in train mode and without dropout."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(x, None, None, state[f"{name}.weight"], state[f"{name}.bias"], training=True)

    def level(x: Tensor, prefix: str, depth: int) -> Tensor:
        y = F.conv2d(F.leaky_relu_(x, 0.2), state[f"{prefix}.1.weight"], stride=2, padding=1)
        if depth == downs:
            up = F.conv_transpose2d(F.relu_(y), state[f"{prefix}.3.weight"], stride=2, padding=1)
            return torch.cat([x, norm(up, f"{prefix}.4")], 1)
        y = level(norm(y, f"{prefix}.2"), f"{prefix}.3.model", depth + 1)
        up = F.conv_transpose2d(F.relu_(y), state[f"{prefix}.5.weight"], stride=2, padding=1)
        return torch.cat([x, norm(up, f"{prefix}.6")], 1)

    y = level(F.conv2d(x, state["model.model.0.weight"], stride=2, padding=1), "model.model.1.model", 2)
    last = "model.model.3"
    return F.conv_transpose2d(F.relu_(y), state[f"{last}.weight"], state[f"{last}.bias"], stride=2, padding=1).tanh()


def test_the_unet_computes_what_the_published_one_does() -> None:
    network = UNetGenerator(ngf=4, downs=5, dropout=0)
    for p in network.parameters():
        nn.init.normal_(p, 0.3, 0.3)
    images = torch.randn(2, 3, 64, 64)
    expected = reference_unet(images, {k: v.detach() for k, v in network.state_dict().items()}, 5)
    torch.testing.assert_close(network(images), expected)


def test_files_of_the_authors_load(tmp_path) -> None:
    network = ResNetGenerator(ngf=4)
    names = network.state_dict()
    assert "model.10.conv_block.5.weight" in names
    assert "model.10.conv_block.1.conv.2.weight" in ResNetGenerator(ngf=4, separable=True).state_dict()
    assert "model.model.1.model.3.model.5.weight" in UNetGenerator(ngf=4).state_dict()
    torch.save({name: value + 1 for name, value in names.items()}, tmp_path / "latest_net_G.pth")
    load_weights(network, tmp_path / "latest_net_G.pth")
    for name, value in network.state_dict().items():
        assert torch.equal(value, names[name])  # in place


def test_initial_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(UNetGenerator(ngf=16), nn.Linear(100, 100), PatchDiscriminator(ndf=32))
    init_weights(network)
    convolutions = torch.cat([p.detach().flatten() for n, p in network.named_parameters() if p.ndim > 1])
    norms = torch.cat([m.weight.detach() for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert convolutions.mean().abs() < 1e-4
    assert convolutions.std() == pytest.approx(0.02, rel=0.01)
    assert norms.mean() == pytest.approx(1, abs=0.003)
    assert norms.std() == pytest.approx(0.02, rel=0.1)
    assert all((p == 0).all() for n, p in network.named_parameters() if n.endswith("bias"))


def test_instance_norms_take_any_number_of_channels(recwarn: pytest.WarningsRecorder) -> None:
    norm, x = InstanceNorm2d(8), torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(norm(x), nn.InstanceNorm2d(5)(x))
    assert not recwarn
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        norm(x[..., :1, :1])


def test_a_block_without_channels_is_left_out() -> None:
    torch.manual_seed(0)
    widths = [4, 6, 8, 5, 0, 7, 6, 4]
    network = ResNetGenerator(blocks=3, widths=widths)
    assert isinstance(network.model[11], nn.Identity)
    assert network.model[10].conv_block[1].out_channels == 5
    found = profile(network, (1, 3, 64, 64), convention="gan")
    assert found.cost == resnet_generator_macs(widths, 64)
    mobile = ResNetGenerator(blocks=3, widths=widths, separable=True)
    assert profile(mobile, (1, 3, 64, 64), convention="gan").cost == resnet_generator_macs(widths, 64, separable=True)


def test_hooks_keep_what_they_saw() -> None:
    """No activation works in place."""
    networks = (ResNetGenerator(ngf=2, blocks=1), UNetGenerator(ngf=2, downs=5), PatchDiscriminator(ndf=2))
    for network in networks:
        seen: list[tuple[Tensor, Tensor]] = []
        for layer in network.modules():
            layer.register_forward_hook(lambda m, x, y, seen=seen: seen.append((y, y.clone())))
        network(torch.randn(1, 3, 32, 32))
        assert seen
        assert all(torch.equal(*pair) for pair in seen)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNetGenerator(norm="intsance"), "norm: .* Did you mean 'instance'"),
        (lambda: ResNetGenerator(ngf=0), "ngf: expected 1 or more, got 0"),
        (lambda: ResNetGenerator(dropout=1.0), "dropout: .* got 1.0"),
        (lambda: ResNetGenerator(widths=[8] * 13), r"widths: expected 14 numbers \(first, half, .*got 13"),
        (lambda: ResNetGenerator(widths=[8, 0, *[8] * 12]), "widths: half needs 1 channels or more, got 0"),
        (lambda: UNetGenerator(downs=1), "downs: expected 2 or more, got 1"),
        (lambda: UNetGenerator(widths=[8] * 14), r"widths: expected 15 numbers \(down 1, .*got 14"),
        (lambda: UNetGenerator(widths=[*[8] * 14, 0]), "widths: up 7 needs 1"),
        (lambda: PatchDiscriminator(layers=0), "layers: expected 1"),
        (lambda: PatchDiscriminator(0), "in_channels: expected 1"),
        (lambda: PixelDiscriminator(3, ndf=0), "ndf: expected 1"),
    ],
)
def test_impossible_networks_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
