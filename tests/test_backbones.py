"""Backbones against the reference's outputs and torchvision's networks."""

import pytest
import torch
import torchvision
from naming_rule import close, fill, golden, image, rgb_input
from torch import nn

from fewshot import InputError
from fewshot.backbones import networks
from fewshot.convert.mmfewshot import backbone_name

REFERENCE = {  # golden case -> (our name, pooled)
    "conv4": ("conv4", True),
    "conv4_nopool": ("conv4", False),
    "resnet12": ("resnet12", True),
    "resnet12_map": ("resnet12", False),
    "wrn28x10": ("wrn28_10", True),
}


@pytest.mark.parametrize("case", REFERENCE)
@torch.no_grad()
def test_outputs_and_statistics_equal_the_reference(case):
    name, pooled = REFERENCE[case]
    stored = golden("cls_backbones")[case]
    net = networks.build(name, 84, pooled)
    fill(net, stored["state"], lambda key: backbone_name(key, name), prefix="backbone.")
    pictures = rgb_input(*(image(f"cls{i}", 84, 84) for i in range(stored["eval"]["shape"][0])))
    close(net.eval()(pictures), stored["eval"], 1e-5)
    if "train" in stored:
        close(net.train()(pictures), stored["train"], 1e-5)
        buffers = dict(net.named_buffers())
        for key, values in stored["bn_after_train_forward"].items():
            close(buffers[backbone_name(key, name)], values, 1e-5)


@pytest.mark.parametrize(
    ("net", "train", "evaluation"),
    [
        (
            lambda: networks.build("conv4", 84),
            (3254.968169, 69.014345, 1.444852, 0, 0.326457),
            (1394.517315, 36.864503, 0.3542, 0, 0),
        ),
        (
            lambda: networks.build("conv4", 84, pooled=False),
            (18447.676707, 151.758260, 0.970214, 0, 0),
            (10197.048600, 83.737406, 0, 0, 0),
        ),
        (
            lambda: networks.build("resnet12", 84),
            (1852.142418, 52.065950, 1.432157, 1.615295, 1.266636),
            (530.682240, 21.684105, 0.061292, 0.49063, 0.120512),
        ),
        pytest.param(
            lambda: networks.build("wrn28_10", 84, drop_rate=0.0),
            (509.353959, 14.255803, 0.407953, 0.39276, 0.399111),
            (1384.231974, 59.752834, 1.088439, 0.020357, 3.230916),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["conv4", "conv4_nopool", "resnet12", "wrn28_10"],
)
@torch.no_grad()
def test_float64_passes_equal_the_reference(net, train, evaluation):
    """Sum, 2-norm and first three values of a pass that updates the batch norms, and of one with
    what it left.
    """
    net = net()
    r = torch.Generator().manual_seed(0)
    for parameter in net.parameters():  # in the order in which the reference draws them
        if parameter.dim() == 4:
            std = (2 / (parameter.shape[0] * parameter.shape[2] * parameter.shape[3])) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=r) * std)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.zero_()
    net.double()
    x = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(1)).double()
    for mode, expected in ((True, train), (False, evaluation)):
        y = net.train(mode)(x)
        assert [y.sum().item(), y.norm().item(), *y.flatten()[:3].tolist()] == pytest.approx(
            expected, abs=2e-6
        )


@pytest.mark.parametrize(
    ("name", "image_size", "pooled", "size", "parameters"),
    [
        ("conv4", 84, True, (1600, 64, 5), 113_088),
        ("conv4", 28, True, (64, 64, 1), 113_088),
        ("conv4", 32, True, (256, 64, 2), 113_088),
        ("conv4", 32, False, (64 * 36, 64, 6), 113_088),
        ("resnet12", 32, True, (640, 640, 1), 12_424_320),
        ("resnet12", 50, False, (640 * 9, 640, 3), 12_424_320),
        ("wrn28_10", 10, False, (640 * 9, 640, 3), 36_473_904),
        ("resnet18", 42, True, (512, 512, 1), None),
        ("resnet18", 42, False, (512 * 36, 512, 6), None),
    ],
)
@torch.no_grad()
def test_sizes(name, image_size, pooled, size, parameters):
    net = networks.build(name, image_size, pooled).eval()
    assert (net.out_features, net.out_channels, net.map_size) == size
    expected = (2, size[0]) if pooled else (2, size[1], size[2], size[2])
    assert net(torch.randn(2, 3, image_size, image_size)).shape == expected
    if parameters:
        assert sum(p.numel() for p in net.parameters()) == parameters


@torch.no_grad()
def test_resnet18_is_torchvisions_with_another_stem():
    plain = torchvision.models.resnet18(num_classes=7)
    plain.conv1, plain.maxpool, plain.fc = (
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.Identity(),
        nn.Identity(),
    )
    net = networks.build("resnet18", 40)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(3, 3, 40, 40)
    assert torch.allclose(net(x), plain(x), atol=1e-5)


@pytest.mark.parametrize("name", ["conv4", "resnet12", "wrn28_10", "resnet18"])
def test_initial_weights(name):
    for module in networks.build(name, 84).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
            if module.bias is not None:
                fan_in = module.in_channels * module.kernel_size[0] ** 2
                assert 0 < module.bias.abs().max() <= fan_in**-0.5
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_what_cannot_be_built():
    with pytest.raises(InputError, match=r"'conv5'.*conv4, resnet12"):
        networks.build("conv5", 84)
    with pytest.raises(InputError, match="15 pixels are too small for ConvNet"):
        networks.build("conv4", 15)
    with pytest.raises(InputError, match="15 pixels are too small for ResNet12"):
        networks.build("resnet12", 15)
    with pytest.raises(InputError, match=r"DropBlock of 5 x 5.*not 64"):
        networks.build("resnet12", 64, drop_rate=0.1)


def test_drop_block_drops_squares_at_the_given_rate():
    torch.manual_seed(0)
    x = torch.ones(400, 100, 10, 10)
    dropped = networks.drop_block(x, 0.05, 5) == 0
    gamma = 0.0055556  # equation 1 for rate 0.05, squares of 5, maps of 10
    rates = dropped.float().mean((0, 1))
    assert rates[0, 0].item() == pytest.approx(
        gamma, rel=0.2
    )  # only one of the squares covers a corner
    assert rates[4, 5].item() == pytest.approx(
        1 - (1 - gamma) ** 25, rel=0.05
    )  # 25 cover a place in the middle
    assert rates[9, 4].item() == pytest.approx(1 - (1 - gamma) ** 5, rel=0.1)
    whole = -torch.nn.functional.max_pool2d(
        -dropped.float(), 5, stride=1
    )  # squares that are dropped as a whole
    covered = torch.nn.functional.max_pool2d(torch.nn.functional.pad(whole, [4] * 4), 5, stride=1)
    assert torch.equal(covered.bool(), dropped)
    assert networks.drop_block(x, 0.05, 5).mean().item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_resnet12_drops_in_training_only_and_more_as_it_trains(monkeypatch):
    net = networks.build("resnet12", 84, drop_rate=0.1)
    x = torch.randn(2, 3, 84, 84)
    assert torch.equal(net.eval()(x), net(x))
    rates = []
    monkeypatch.setattr(
        networks, "drop_block", lambda y, rate, size: rates.append((float(rate), size)) or y
    )
    for seen in (0, 20_000, 60_000):
        net.train()
        for stage in net.stages:
            stage.norm1.num_batches_tracked.fill_(seen)
        net(x)
    assert rates == [pytest.approx((rate, 5)) for rate in (0, 0, 0.05, 0.05, 0.1, 0.1)]
    block = net.stages[0]
    zeros = (block(x) == 0).float().mean().item()  # plain dropout from the start
    assert zeros == pytest.approx(0.1, abs=0.02)
