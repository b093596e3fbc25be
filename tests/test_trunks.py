"""Detectors' trunks against the reference, torchvision's networks, and weights in files."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from naming_rule import GAINS, bgr_input, boxes, close, fill, golden, image, rgb_input
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import ops
from torchvision.ops import roi_align

from fewshot import InputError
from fewshot.backbones import trunks
from fewshot.data.transforms import CAFFE, HALF, IMAGENET


def trunk_name(key: str) -> str | None:
    """The reference's name of a detector's tensor -> the trunk's; None for the heads'."""
    if key.endswith("num_batches_tracked"):
        return None
    name = re.sub(
        r"^backbone\.", "", re.sub(r"^roi_head\.shared_head\.layer4", "backbone.stage4", key)
    )
    return None if name == key else name


@pytest.fixture(scope="module")
def reference_trunk() -> trunks.C4:
    trunk = trunks.c4("resnet50", meta=True, style="caffe", norm="frozen")
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
    aligned = roi_align(
        features, rois, reference_trunk.roi_size, 1 / reference_trunk.stride, -1, aligned=True
    )
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
    """The network in eval mode, its batch norms with statistics and affine parameters other than 0
    and 1.
    """
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
    trunk = trunks.c4("resnet50", weights="imagenet")
    x = torch.randn(1, 3, 70, 96)
    y = plain.maxpool(plain.relu(plain.bn1(plain.conv1(x))))
    y = plain.layer3(plain.layer2(plain.layer1(y)))
    assert same(trunk(x), y) and y.shape == (1, trunk.out_channels, 5, 6)
    assert same(trunk.stage4(y), plain.layer4(y))
    assert trunk.normalisation is IMAGENET and not hasattr(trunk, "meta_conv")


@pytest.mark.parametrize(
    "form", ["whole network in .pth", "half-precision features in .safetensors"]
)
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
    trunk = trunks.c4("mobilenet_v2", weights=str(path), meta=True)
    x = torch.randn(2, 3, 64, 96)
    features = plain.features[:14](x)
    assert same(trunk(x), features) and features.shape == (2, trunk.out_channels, 4, 6)
    assert same(trunk.stage4(features), plain.features[14:18](features))
    assert trunk(torch.randn(1, 4, 64, 64), support=True).shape == (1, 96, 4, 4)


@torch.no_grad()
def test_mobilenet_reads_the_published_weights():
    path = (
        Path(__file__).parents[1]
        / ".."
        / "shared/data/weights/mobilenet_v2_imagenet_features.safetensors"
    )
    if not path.is_file():
        pytest.skip("no weights here")
    plain = torchvision.models.mobilenet_v2().features.eval()
    plain.load_state_dict(
        {key.removeprefix("features."): tensor for key, tensor in load_file(path).items()}
    )
    trunk = trunks.c4("mobilenet_v2", weights=str(path))
    x = rgb_input(image("cls0", 96, 96))
    assert same(trunk.stage4(trunk(x)), plain[:18](x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "small"])
@torch.no_grad()
def test_trunks_say_what_they_give(name):
    trunk = trunks.c4(name, meta=True)
    s = trunk.stride
    assert trunk(torch.randn(1, 3, 4 * s, 6 * s)).shape == (1, trunk.out_channels, 4, 6)
    assert trunk(torch.randn(1, 4, 4 * s, 4 * s), support=True).shape == (
        1,
        trunk.out_channels,
        4,
        4,
    )
    rois = torch.randn(2, trunk.out_channels, trunk.roi_size, trunk.roi_size)
    side = 1 if name == "small" else trunk.roi_size // 2
    assert trunk.stage4(rois).shape == (2, trunk.stage4_channels, side, side)
    again = trunks.c4(**trunk.architecture)
    again.load_state_dict(trunk.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), trunk(x))


@pytest.mark.parametrize(
    ("style", "strides"), [("torchvision", ((1, 1), (2, 2))), ("caffe", ((2, 2), (1, 1)))]
)
def test_styles_move_the_stride(style, strides):
    trunk = trunks.c4("resnet101", style=style)
    for layer in (trunk.layer2, trunk.layer3, trunk.stage4):
        assert (layer[0].conv1.stride, layer[0].conv2.stride) == strides
    assert len(trunk.layer3) == 23


def test_support_entrance_has_pytorchs_initial_weights_and_trains_when_frozen():
    trunk = trunks.c4("resnet18", meta=True, norm="group")
    bound = (4 * 49) ** -0.5  # of the uniform distribution
    assert trunk.meta_conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    trunk.freeze(2)
    trains = {name.split(".")[0] for name, p in trunk.named_parameters() if p.requires_grad}
    assert trains == {"meta_conv", "layer3", "stage4"}
    with pytest.raises(InputError, match="0 to 3 stages"):
        trunk.freeze(4)


@pytest.mark.parametrize(
    ("name", "norm"), [("resnet18", "group"), ("mobilenet_v2", "frozen"), ("small", "group")]
)
def test_trunks_without_weights_freeze_their_stem_alone(name, norm):
    trunk = trunks.begin(name, "none")
    assert trunk.architecture["norm"] == norm and not trunk.architecture["pretrained"]
    for net in (trunk, trunks.c4(**trunk.architecture)):
        net.freeze_pretrained(2)
        trains = {key.split(".")[0] for key, p in net.named_parameters() if p.requires_grad}
        assert trains == {"layer1", "layer2", "layer3", "stage4"}


def test_trunks_with_weights_know_it_when_built_again(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(
        {k.replace("stage4", "layer4"): v for k, v in trunks.c4("resnet18").state_dict().items()},
        path,
    )
    trunk = trunks.begin("resnet18", str(path), style="caffe")
    assert trunk.architecture == {
        "name": "resnet18",
        "style": "caffe",
        "norm": "frozen",
        "meta": False,
        "pretrained": True,
    }
    old = {
        key: value for key, value in trunk.architecture.items() if key != "pretrained"
    }  # of files written before
    for net in (trunk, trunks.c4(**trunk.architecture), trunks.c4(**old)):
        net.freeze_pretrained(2)
        assert {key.split(".")[0] for key, p in net.named_parameters() if p.requires_grad} == {
            "layer3",
            "stage4",
        }


def test_weights_by_default(monkeypatch):
    asked = []
    monkeypatch.setattr(trunks, "load_pretrained", lambda trunk, weights: asked.append(weights))
    for name in trunks.TRUNKS:
        assert trunks.begin(name).architecture["pretrained"] == (name != "small")
    assert asked == ["imagenet"] * 5
    with pytest.raises(InputError, match="small has no style 'torchvision'"):
        trunks.begin("small", style="torchvision")


@torch.no_grad()
def test_frozen_norm_keeps_the_type_of_its_input():
    theirs, ours = ops.FrozenBatchNorm2d(16), trunks.FrozenBatchNorm2d(16)
    for part in theirs.state_dict().values():
        part.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 5, 7)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(ours(x.bfloat16()).float(), theirs(x), rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert trunks.c4("resnet18")(torch.randn(1, 3, 64, 64)).dtype == torch.bfloat16


def test_small_trunk_can_keep_maps():
    trunk = trunks.c4("small")
    for _ in range(2):  # it does not matter who asked before
        trunk.keep_maps()
        assert trunk.stage4(torch.randn(1, 96, 6, 6)).shape == (1, trunk.stage4_channels, 3, 3)


def test_choices_that_a_trunk_does_not_have():
    for options, message in (
        ({"name": "vgg16"}, "'vgg16'.*resnet18, resnet50"),
        (
            {"name": "resnet50", "style": "tensorflow"},
            "resnet50 has no style 'tensorflow'.*torchvision or caffe",
        ),
        ({"name": "resnet50", "norm": "batch"}, "no norm 'batch'.*frozen or group"),
        ({"name": "small", "norm": "frozen"}, "small has no norm 'frozen'"),
        ({"name": "mobilenet_v2", "style": "caffe"}, "mobilenet_v2 has no style 'caffe'.*left out"),
        (
            {"name": "small", "weights": "imagenet"},
            r"no ImageNet weights for trunk small \(group\)",
        ),
        (
            {"name": "resnet50", "weights": "imagenet", "style": "caffe"},
            r"resnet50 \(caffe frozen\)",
        ),
        ({"name": "resnet18", "weights": "nowhere.pth"}, "nowhere.pth: no such weights file"),
    ):
        with pytest.raises(InputError, match=message):
            trunks.c4(**options)


def test_a_failed_download_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(InputError, match=r"resnet18.*no route to host.*give a file's path"):
        trunks.c4("resnet18", weights="imagenet")


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = {
        key: tensor.half()
        for key, tensor in torchvision.models.mobilenet_v2().features.state_dict().items()
    }
    for change, message in (
        (
            {"7.conv.0.0.weight": None},
            "layer3.7.conv.0.0.weight is missing from .*weights.safetensors",
        ),
        ({"19.weight": torch.ones(1)}, "19.weight does not belong.*weights.safetensors"),
        (
            {"0.0.weight": torch.ones(32, 4, 3, 3)},
            r"conv1.weight is \(32, 4, 3, 3\) in .*weights.safetensors",
        ),
    ):
        save_file(
            {key: tensor for key, tensor in (state | change).items() if tensor is not None}, path
        )
        with pytest.raises(InputError, match=message):
            trunks.c4("mobilenet_v2", weights=str(path))
    for name in ("weights.safetensors", "weights.pth"):
        (tmp_path / name).write_bytes(b"neither of the two")
        with pytest.raises(InputError, match=f"{name} cannot be read as weights"):
            trunks.c4("mobilenet_v2", weights=str(tmp_path / name))


def test_small_trunk_is_scaled_for_little_pictures():
    trunk = trunks.c4("small")
    assert trunk.stride == 8 and trunk.normalisation is HALF
    x = torch.randn(2, 3, 160, 160)
    trunk.stage4(trunk(x)).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in trunk.parameters())
