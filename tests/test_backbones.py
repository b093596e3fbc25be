"""Backbones against the reference's outputs and torchvision's networks."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from naming_rule import GAINS, bgr_input, boxes, close, fill, golden, image, rgb_input
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.ops import roi_align

from fewshot import InputError, backbones
from fewshot.data.transforms import CAFFE, HALF, IMAGENET
from fewshot.mmfewshot import backbone_name

# ---------------------------------------------------------------------------------------------- classification

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
    net = backbones.build(name, 84, pooled)
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
            lambda: backbones.build("conv4", 84),
            (3254.968169, 69.014345, 1.444852, 0, 0.326457),
            (1394.517315, 36.864503, 0.3542, 0, 0),
        ),
        (
            lambda: backbones.build("conv4", 84, pooled=False),
            (18447.676707, 151.758260, 0.970214, 0, 0),
            (10197.048600, 83.737406, 0, 0, 0),
        ),
        (
            lambda: backbones.build("resnet12", 84),
            (1852.142418, 52.065950, 1.432157, 1.615295, 1.266636),
            (530.682240, 21.684105, 0.061292, 0.49063, 0.120512),
        ),
        pytest.param(
            lambda: backbones.build("wrn28_10", 84, drop_rate=0.0),
            (509.353959, 14.255803, 0.407953, 0.39276, 0.399111),
            (1384.231974, 59.752834, 1.088439, 0.020357, 3.230916),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["conv4", "conv4_nopool", "resnet12", "wrn28_10"],
)
@torch.no_grad()
def test_float64_passes_equal_the_reference(net, train, evaluation):
    """Sum, 2-norm and first three values of a pass that updates the batch norms, and of one with what it left."""
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
        assert [y.sum().item(), y.norm().item(), *y.flatten()[:3].tolist()] == pytest.approx(expected, abs=2e-6)


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
    net = backbones.build(name, image_size, pooled).eval()
    assert (net.out_features, net.out_channels, net.map_size) == size
    expected = (2, size[0]) if pooled else (2, size[1], size[2], size[2])
    assert net(torch.randn(2, 3, image_size, image_size)).shape == expected
    if parameters:
        assert sum(p.numel() for p in net.parameters()) == parameters


@torch.no_grad()
def test_resnet18_is_torchvisions_with_another_stem():
    plain = torchvision.models.resnet18(num_classes=7)
    plain.conv1, plain.maxpool, plain.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    net = backbones.build("resnet18", 40)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(3, 3, 40, 40)
    assert torch.allclose(net(x), plain(x), atol=1e-5)


@pytest.mark.parametrize("name", ["conv4", "resnet12", "wrn28_10", "resnet18"])
def test_initial_weights(name):
    for module in backbones.build(name, 84).modules():
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
        backbones.build("conv5", 84)
    with pytest.raises(InputError, match="15 pixels are too small for ConvNet"):
        backbones.build("conv4", 15)
    with pytest.raises(InputError, match="15 pixels are too small for ResNet12"):
        backbones.build("resnet12", 15)
    with pytest.raises(InputError, match=r"DropBlock of 5 x 5.*not 64"):
        backbones.build("resnet12", 64, drop_rate=0.1)


def test_drop_block_drops_squares_at_the_given_rate():
    torch.manual_seed(0)
    x = torch.ones(400, 100, 10, 10)
    dropped = backbones.drop_block(x, 0.05, 5) == 0
    gamma = 0.0055556  # equation 1 for rate 0.05, squares of 5, maps of 10
    rates = dropped.float().mean((0, 1))
    assert rates[0, 0].item() == pytest.approx(gamma, rel=0.2)  # only one of the squares covers a corner
    assert rates[4, 5].item() == pytest.approx(1 - (1 - gamma) ** 25, rel=0.05)  # 25 cover a place in the middle
    assert rates[9, 4].item() == pytest.approx(1 - (1 - gamma) ** 5, rel=0.1)
    whole = -torch.nn.functional.max_pool2d(-dropped.float(), 5, stride=1)  # squares that are dropped as a whole
    covered = torch.nn.functional.max_pool2d(torch.nn.functional.pad(whole, [4] * 4), 5, stride=1)
    assert torch.equal(covered.bool(), dropped)
    assert backbones.drop_block(x, 0.05, 5).mean().item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_resnet12_drops_in_training_only_and_more_as_it_trains(monkeypatch):
    net = backbones.build("resnet12", 84, drop_rate=0.1)
    x = torch.randn(2, 3, 84, 84)
    assert torch.equal(net.eval()(x), net(x))
    rates = []
    monkeypatch.setattr(backbones, "drop_block", lambda y, rate, size: rates.append((float(rate), size)) or y)
    for seen in (0, 20_000, 60_000):
        net.train()
        for stage in net.stages:
            stage.norm1.num_batches_tracked.fill_(seen)
        net(x)
    assert rates == [pytest.approx((rate, 5)) for rate in (0, 0, 0.05, 0.05, 0.1, 0.1)]
    block = net.stages[0]
    zeros = (block(x) == 0).float().mean().item()  # plain dropout from the start
    assert zeros == pytest.approx(0.1, abs=0.02)


# ---------------------------------------------------------------------------------------------- detection


def trunk_name(key: str) -> str | None:
    """The reference's name of a detector's tensor -> the trunk's; None for the heads'."""
    if key.endswith("num_batches_tracked"):
        return None
    name = re.sub(r"^backbone\.", "", re.sub(r"^roi_head\.shared_head\.layer4", "backbone.stage4", key))
    return None if name == key else name


@pytest.fixture(scope="module")
def reference_trunk() -> backbones.C4:
    trunk = backbones.c4("resnet50", meta=True, style="caffe", norm="frozen")
    fill(trunk, golden("meta_rcnn")["state"], trunk_name, gains=GAINS)
    return trunk


@torch.no_grad()
def test_caffe_trunk_and_stage4_equal_the_reference(reference_trunk):
    stored = golden("meta_rcnn")
    picture = bgr_input(stored["mean_bgr"], image("query0", 256, 320))
    close(picture, stored["test"]["input"])
    features = reference_trunk(picture)
    close(features, stored["test"]["backbone"][0])
    rois = [torch.tensor(stored["test"]["fixed_proposals"])]
    aligned = roi_align(features, rois, reference_trunk.roi_size, 1 / reference_trunk.stride, -1, aligned=True)
    stage4 = reference_trunk.stage4(aligned)
    assert stage4.shape == (30, reference_trunk.stage4_channels, 7, 7)
    close(stage4.mean((2, 3)), stored["test"]["roi_shared_head"])
    assert reference_trunk.normalisation is CAFFE


@torch.no_grad()
def test_support_path_equals_the_reference(reference_trunk):
    stored = golden("meta_rcnn")
    supports = []
    for c, s in stored["test"]["support_order"]:
        x1, y1, x2, y2 = boxes(f"supbox_c{c}_s{s}", 1, 224, 224, lo=60, hi=0.9)[0].astype(int)
        mask = np.zeros((1, 1, 224, 224), np.float32)
        mask[..., y1:y2, x1:x2] = 1
        picture = bgr_input(stored["mean_bgr"], image(f"support_c{c}_s{s}", 224, 224))
        supports.append(torch.cat([picture, torch.from_numpy(mask)], 1))
    close(reference_trunk(torch.cat(supports), support=True), stored["test"]["support_backbone"][0])


def randomised(net: nn.Module) -> nn.Module:
    """The network in eval mode, its batch norms with statistics and affine parameters other than 0 and 1."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
    return net.eval()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()


@torch.no_grad()
def test_torchvision_trunk_equals_torchvisions_network(monkeypatch):
    plain = randomised(torchvision.models.resnet50())
    kind = torchvision.models.ResNet50_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **_: plain.state_dict())
    trunk = backbones.c4("resnet50", weights="imagenet")
    x = torch.randn(1, 3, 70, 96)
    y = plain.maxpool(plain.relu(plain.bn1(plain.conv1(x))))
    y = plain.layer3(plain.layer2(plain.layer1(y)))
    assert same(trunk(x), y) and y.shape == (1, trunk.out_channels, 5, 6)
    assert same(trunk.stage4(y), plain.layer4(y))
    assert trunk.normalisation is IMAGENET and not hasattr(trunk, "meta_conv")


@pytest.mark.parametrize("form", ["whole network in .pth", "half-precision features in .safetensors"])
@torch.no_grad()
def test_mobilenet_trunk_equals_torchvisions_network(form, tmp_path):
    plain = randomised(torchvision.models.mobilenet_v2())
    if form.startswith("half"):
        plain.half().float()
        path = tmp_path / "weights.safetensors"
        save_file({key: tensor.half() for key, tensor in plain.features.state_dict().items()}, path)
    else:
        path = tmp_path / "weights.pth"
        torch.save(plain.state_dict(), path)
    trunk = backbones.c4("mobilenet_v2", weights=str(path), meta=True)
    x = torch.randn(2, 3, 64, 96)
    features = plain.features[:14](x)
    assert same(trunk(x), features) and features.shape == (2, trunk.out_channels, 4, 6)
    assert same(trunk.stage4(features), plain.features[14:18](features))
    assert trunk(torch.randn(1, 4, 64, 64), support=True).shape == (1, 96, 4, 4)


@torch.no_grad()
def test_mobilenet_reads_the_published_weights():
    path = Path(__file__).parents[1] / ".." / "shared/data/weights/mobilenet_v2_imagenet_features.safetensors"
    if not path.is_file():
        pytest.skip("no weights here")
    plain = torchvision.models.mobilenet_v2().features.eval()
    plain.load_state_dict({key.removeprefix("features."): tensor for key, tensor in load_file(path).items()})
    trunk = backbones.c4("mobilenet_v2", weights=str(path))
    x = rgb_input(image("cls0", 96, 96))
    assert same(trunk.stage4(trunk(x)), plain[:18](x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "small"])
@torch.no_grad()
def test_trunks_say_what_they_give(name):
    trunk = backbones.c4(name, meta=True)
    s = trunk.stride
    assert trunk(torch.randn(1, 3, 4 * s, 6 * s)).shape == (1, trunk.out_channels, 4, 6)
    assert trunk(torch.randn(1, 4, 4 * s, 4 * s), support=True).shape == (1, trunk.out_channels, 4, 4)
    rois = torch.randn(2, trunk.out_channels, trunk.roi_size, trunk.roi_size)
    side = 1 if name == "small" else trunk.roi_size // 2
    assert trunk.stage4(rois).shape == (2, trunk.stage4_channels, side, side)
    again = backbones.c4(**trunk.architecture)
    again.load_state_dict(trunk.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), trunk(x))


@pytest.mark.parametrize(("style", "strides"), [("torchvision", ((1, 1), (2, 2))), ("caffe", ((2, 2), (1, 1)))])
def test_styles_move_the_stride(style, strides):
    trunk = backbones.c4("resnet101", style=style)
    for layer in (trunk.layer2, trunk.layer3, trunk.stage4):
        assert (layer[0].conv1.stride, layer[0].conv2.stride) == strides
    assert len(trunk.layer3) == 23


def test_support_entrance_has_pytorchs_initial_weights_and_trains_when_frozen():
    trunk = backbones.c4("resnet18", meta=True, norm="group")
    bound = (4 * 49) ** -0.5  # of the uniform distribution
    assert trunk.meta_conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    trunk.freeze(2)
    trains = {name.split(".")[0] for name, p in trunk.named_parameters() if p.requires_grad}
    assert trains == {"meta_conv", "layer3", "stage4"}
    with pytest.raises(InputError, match="0 to 3 stages"):
        trunk.freeze(4)


def test_choices_that_a_trunk_does_not_have():
    for options, message in (
        ({"name": "vgg16"}, "'vgg16'.*resnet18, resnet50"),
        ({"name": "resnet50", "style": "tensorflow"}, "resnet50 has no style 'tensorflow'.*torchvision or caffe"),
        ({"name": "resnet50", "norm": "batch"}, "no norm 'batch'.*frozen or group"),
        ({"name": "small", "norm": "frozen"}, "small has no norm 'frozen'"),
        ({"name": "mobilenet_v2", "style": "caffe"}, "mobilenet_v2 has no style 'caffe'.*left out"),
        ({"name": "small", "weights": "imagenet"}, r"no ImageNet weights for trunk small \(group\)"),
        ({"name": "resnet50", "weights": "imagenet", "style": "caffe"}, r"resnet50 \(caffe frozen\)"),
        ({"name": "resnet18", "weights": "nowhere.pth"}, "nowhere.pth: no such weights file"),
    ):
        with pytest.raises(InputError, match=message):
            backbones.c4(**options)


def test_a_failed_download_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(InputError, match=r"resnet18.*no route to host.*give a file's path"):
        backbones.c4("resnet18", weights="imagenet")


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = {key: tensor.half() for key, tensor in torchvision.models.mobilenet_v2().features.state_dict().items()}
    for change, message in (
        ({"7.conv.0.0.weight": None}, "layer3.7.conv.0.0.weight is missing from .*weights.safetensors"),
        ({"19.weight": torch.ones(1)}, "19.weight does not belong.*weights.safetensors"),
        ({"0.0.weight": torch.ones(32, 4, 3, 3)}, r"conv1.weight is \(32, 4, 3, 3\) in .*weights.safetensors"),
    ):
        save_file({key: tensor for key, tensor in (state | change).items() if tensor is not None}, path)
        with pytest.raises(InputError, match=message):
            backbones.c4("mobilenet_v2", weights=str(path))
    for name in ("weights.safetensors", "weights.pth"):
        (tmp_path / name).write_bytes(b"neither of the two")
        with pytest.raises(InputError, match=f"{name} cannot be read as weights"):
            backbones.c4("mobilenet_v2", weights=str(tmp_path / name))


def test_small_trunk_is_scaled_for_little_pictures():
    trunk = backbones.c4("small")
    assert trunk.stride == 8 and trunk.normalisation is HALF
    x = torch.randn(2, 3, 160, 160)
    trunk.stage4(trunk(x)).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in trunk.parameters())
