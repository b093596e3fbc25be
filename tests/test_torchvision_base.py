"""Torchvision's detectors as base models: they detect what they did, and can be fine-tuned by TFA,
FSCE and MPSR.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection, mobilenet_v3_large
from torchvision.models.detection._utils import BoxCoder, overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

import fewshot
from fewshot import InputError, weights
from fewshot.backbones import fpn, trunks
from fewshot.convert import torchvision as torchvision_base
from fewshot.detectors import faster_rcnn, mpsr
from fewshot.detectors.build import rebuilt
from fewshot.detectors.fsce import FSCE
from fewshot.detectors.mpsr import MPSR
from fewshot.detectors.tfa import TFA, grow
from fewshot.methods import DETECTORS

MODELS = {
    "resnet50": detection.fasterrcnn_resnet50_fpn,
    "mobilenet_v3_large": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
}


@pytest.fixture
def script():
    path = Path(__file__).parents[1] / "scripts/convert_torchvision.py"
    spec = importlib.util.spec_from_file_location("convert_torchvision", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(height: int = 90, width: int = 123) -> Tensor:
    """Coloured squares, as bytes: sides that 32 does not divide, and a map of stride 32 with an odd
    number of rows.
    """
    squares = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)) * 255
    return squares.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width].byte()


@torch.no_grad()
def lively(backbone: str, classes: int) -> nn.Module:
    """A random detector of torchvision's that finds things: its norms fit the picture, its heads
    tell cells apart.

    Residual branches are weak, since a deep random network would make much of the rounding of its
    first layers.
    """
    torch.manual_seed(0)
    model = MODELS[backbone](
        weights=None, weights_backbone=None, num_classes=classes, min_size=90, max_size=123
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.weight.uniform_(0.5, 1.5).mul_(0.1 if name.endswith("bn3") else 1)
            module.bias.normal_(std=0.2)

    def spread(layer: nn.Module, x: Tensor, deviation: float) -> None:
        y = F.linear(x, layer.weight.flatten(1))
        layer.weight.mul_(deviation / y.std())
        layer.bias.copy_(-y.mean(0) * deviation / y.std())

    images, _ = model.eval().transform([picture() / 255])
    model.backbone.train()(images.tensors)
    features, rpn, roi = model.eval().backbone(images.tensors), model.rpn.head, model.roi_heads
    hidden = torch.cat([rpn.conv(level).flatten(2)[0].T for level in features.values()])
    spread(rpn.cls_logits, hidden, 2.0)
    rpn.cls_logits.bias -= (
        4  # there are proposals of low score, which only one of the two models leaves out
    )
    spread(rpn.bbox_pred, hidden, 0.03)
    x = roi.box_roi_pool(features, model.rpn(images, features)[0], images.image_sizes).flatten(1)
    for layer in (roi.box_head.fc6, roi.box_head.fc7):
        spread(layer, x, 1.0)
        x = F.relu(layer(x))
    spread(roi.box_predictor.cls_score, x, 1.5)
    spread(roi.box_predictor.bbox_pred, x, 0.2)
    return model


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    model = lively("resnet50", 91)
    silence(model, torchvision_base.categories())
    return model


@torch.no_grad()
def silence(model: nn.Module, categories: list[str]) -> None:
    """The rows that stand for no class never win, as in the trained model, and fewer objects are
    found than may be.
    """
    head = model.roi_heads.box_predictor.cls_score
    for row, name in enumerate(categories):
        if name == "N/A":
            head.weight[row], head.bias[row] = 0.0, -100.0
    while len(model([picture() / 255])[0]["labels"]) == 100:
        head.bias[0] += 1


@torch.no_grad()
def check_detections(model: nn.Module, file: Path, categories: list[str]) -> None:
    """What both find is the same one to one; in which order, rounding decides where scores are
    equal to 1e-4.
    """
    (theirs,) = model([picture() / 255])
    ours = fewshot.load(file).predict(picture(), size="keep")
    assert 20 < len(theirs["labels"]) < 100
    labels = torch.tensor([categories.index(name) for name in ours.names])
    apart = (ours.boxes[:, None] - theirs["boxes"]).abs().amax(2) + 1000.0 * (
        labels[:, None] != theirs["labels"]
    )
    distance, nearest = apart.min(0)
    assert nearest.sort().values.tolist() == list(range(len(labels)))
    assert distance.max() < 5e-4  # pixels: the largest anchors of 512 have steps of 6e-5
    assert torch.allclose(ours.scores[nearest], theirs["scores"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backbone", MODELS)
def test_what_torchvision_detects(backbone, resnet, tmp_path):
    model, categories = resnet, torchvision_base.categories(backbone)
    if backbone != "resnet50":
        model = lively(backbone, 91)
        silence(model, categories)
    state, about = torchvision_base.converted(model.state_dict(), categories)
    assert len(about["classes"]) == 80 and not {"N/A", "__background__"} & set(about["classes"])
    weights.save_state(tmp_path / "coco.safetensors", state, about)
    check_detections(model, tmp_path / "coco.safetensors", categories)


@torch.no_grad()
def test_norms_without_eps_and_names_of_old(resnet, tmp_path, monkeypatch):
    """As in torchvision's file trained on COCO: variances are small enough for the difference to be
    seen.
    """
    frozen = detection.FasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d),
        91,
        min_size=90,
        max_size=123,
    ).eval()
    state = {
        key: tensor.clone()
        for key, tensor in resnet.state_dict().items()
        if "num_batches" not in key
    }
    for key in [key for key in state if key.endswith("running_var")]:
        state[key] *= 1e-5
        state[key.replace("running_var", "weight")] *= 1e-5**0.5
    frozen.load_state_dict(state)
    overwrite_eps(frozen, 0.0)
    old = {
        re.sub(r"(fpn\..*_blocks\.\d)\.0|(rpn\.head\.conv)\.0\.0", r"\1\2", k): t
        for k, t in state.items()
    }
    assert "rpn.head.conv.weight" in old and "backbone.fpn.inner_blocks.0.weight" in old
    kind = detection.FasterRCNN_ResNet50_FPN_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **_: old)
    weights.save_state(tmp_path / "coco.safetensors", *torchvision_base.coco())
    check_detections(frozen, tmp_path / "coco.safetensors", torchvision_base.categories())

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(kind, "get_state_dict", offline)
    with pytest.raises(
        InputError, match=r"no route to host.*fetch https://.*\.pth.*convert_torchvision.py"
    ) as error:
        torchvision_base.coco()
    assert "\n" not in str(error.value)


def test_a_model_of_own_classes_by_the_script(tmp_path, script, capsys):
    model, names = lively("mobilenet_v3_large", 4), ["cup", "kettle", "teapot"]
    silence(model, names)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "mine.pth")
    script.main(
        script.Args(tmp_path / "mine.pth", tmp_path / "new" / "base.safetensors", tuple(names))
    )
    assert "3 classes: cup, kettle, teapot" in capsys.readouterr().out
    check_detections(model, tmp_path / "new" / "base.safetensors", ["__background__", *names])
    about = weights.describe_file(tmp_path / "new" / "base.safetensors")
    assert (about["stage"], about["base"], about["novel"], about["source"]) == (
        "base",
        names,
        [],
        "mine.pth",
    )

    (tmp_path / "names.txt").write_text("cup\n\nkettle\nteapot\n")
    file, out = tmp_path / "mine.pth", tmp_path / "other.safetensors"
    for options, message in (
        ({}, "does not name its 3 classes: give --names"),
        ({"names": ("a", "b")}, "mine.pth is a model of 3 classes, and 2 names do not fit"),
        ({"names": ("a", "b", "a")}, "two classes of mine.pth are called a"),
        ({"names": ("a",), "classes": tmp_path / "names.txt"}, "leave out --names or --classes"),
        ({"classes": tmp_path / "none.txt"}, "none.txt: no such file of class names"),
    ):
        with pytest.raises(InputError, match=message):
            script.main(script.Args(file, out, **options))
    state, extra = model.state_dict(), torch.zeros(3)
    for change, message in (
        ({"rpn.head.conv.0.0.weight": None}, "rpn.conv.weight is missing from mine.pth"),
        ({"roi_heads.box_predictor.bbox_pred.bias": None}, "reg.bias is missing from mine.pth"),
        (
            {"roi_heads.mask_head.0.weight": extra},
            "roi_heads.mask_head.0.weight in mine.pth is no part of",
        ),
        ({"roi_heads.box_head.fc6.bias": extra}, r"fc1.bias is \(3,\) in mine.pth"),
    ):
        changed = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(InputError, match=message) as error:
            torchvision_base.converted(changed, ["__background__", *names], "mine.pth")
        assert "\n" not in str(error.value)
    script.main(script.Args(file, classes=tmp_path / "names.txt"))
    assert fewshot.load(tmp_path / "mine.safetensors").classes == names
    torch.save({"model": model}, file)
    with pytest.raises(
        InputError, match=r"mine.pth cannot be read as weights \(it is no file of tensors alone\)"
    ):
        script.main(script.Args(file, out))
    assert not out.exists()


def test_conventions_are_torchvisions():
    rois, coder = torch.tensor([[10.0, 20, 90, 60], [0, 0, 5, 5]]), BoxCoder((10.0, 10.0, 5.0, 5.0))
    deltas = torch.tensor([[1.0, -1, -40, 3], [-40, 0, 40, 0]])
    shrink = faster_rcnn.CONVENTIONS["torchvision"].shrink
    clipped = faster_rcnn.decode(deltas, rois, faster_rcnn.ROI_STD, (400, 400), shrink)
    assert torch.allclose(clipped, coder.decode(deltas, [rois])[:, 0].clamp(0, 400), atol=1e-4)
    logits = torch.tensor([[5.0, 0], [5, 0]])
    outside = torch.tensor([[[0.0, 0, 0, 0]], [[-200.0, 0, 0, 0]]])
    for convention, number in (("mmdet", 2), ("torchvision", 1)):
        found = faster_rcnn.detections(logits, outside, rois, (100, 100), convention=convention)
        assert len(found.boxes) == number
    levels = [torch.zeros(1, 4, *shape) for shape in ((24, 40), (12, 20), (6, 10), (3, 5), (2, 3))]
    sides = tuple((side,) for side in (32, 64, 128, 256, 512))
    generator = detection.rpn.AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 5)
    (theirs,) = generator(ImageList(torch.zeros(1, 3, 96, 160), [(90, 150)]), levels)
    rpn = faster_rcnn.RPN(4, 8, strides=(4, 8, 16, 32, 64), scales=(8,), convention="torchvision")
    ours = torch.cat(rpn.anchors([tuple(level.shape[2:]) for level in levels], torch.device("cpu")))
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_mobilenet_v3_has_torchvisions_imagenet_weights(tmp_path):
    plain = mobilenet_v3_large().eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.01, 0.1)
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    trunk = trunks.c4("mobilenet_v3_large", weights=str(tmp_path / "weights.pth"))
    x = torch.randn(1, 3, 64, 96)
    features = plain.features[:13](x)
    assert features.shape == (1, trunk.out_channels, 4, 6)
    for ours, theirs in (
        (trunk(x), features),
        (trunk.stage4(features), plain.features[13:](features)),
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ------------------------------------------------------------------------------------------------------- fine-tuning
NEW = ["kettle", "teapot"]
IMAGES = torch.stack([F.pad(picture().float() / 128 - 1, (0, 5, 0, 6))] * 2)  # (2, 3, 96, 128)
BATCH = (
    IMAGES,
    [(90, 123)] * 2,
    [torch.tensor([[8.0, 8, 60, 70]])] * 2,
    [torch.tensor([0]), torch.tensor([1])],
)

SUPPORT = IMAGES[:1, :, :96, :96], torch.tensor([[8.0, 8, 60, 70]])


@pytest.fixture(scope="module")
def base(resnet):
    return torchvision_base.converted(resnet.state_dict(), torchvision_base.categories())


def train(model: nn.Module, *more) -> set[str]:
    """Two steps, whose losses are finite; the parts that had a gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    torch.manual_seed(0)
    for _ in range(2):
        optimizer.zero_grad()
        losses = model.train()(*BATCH, *more)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        optimizer.step()
    return {
        name.split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.any()
    }


def test_tfa_fine_tunes_its_last_layers(base):
    state, about = base
    model = rebuilt(TFA, about, 82, cosine=True, rois=32)
    weights.fill(model, grow(state, about["classes"], [*about["classes"], *NEW]), "base")
    for name, part in model.named_children():
        part.requires_grad_(name in ("cls", "reg"))
    assert train(model) == {"cls", "reg"}
    alone = rebuilt(TFA, about, 2, cosine=True)  # of the new classes alone
    weights.fill(alone, state, "base", fresh=("cls.", "reg."))
    described = alone.describe()
    assert described["sizes"]["convention"] == "torchvision" and alone.rpn.conventions.rounded
    again = rebuilt(TFA, {**described, "classes": NEW})
    assert again.describe() == described and again.rpn.conventions == alone.rpn.conventions


def test_fsce_fine_tunes_all_but_the_trunk(base):
    state, about = base
    model = rebuilt(FSCE, about, 2, cosine=True, dimensions=16, rois=32)
    weights.fill(model, grow(state, [], NEW), "base", fresh=("contrast.",))
    model.trunk.freeze(len(model.trunk.stages))
    assert train(model) == {
        "trunk",
        "rpn",
        "fc1",
        "fc2",
        "cls",
        "reg",
        "contrast",
    }  # of the trunk, its pyramid
    assert not any(p.requires_grad for p in model.trunk.stages.parameters())
    assert model.describe()["sizes"]["convention"] == "torchvision"


def test_mpsr_goes_on_with_trunk_rpn_and_hidden_layers(base):
    tfa_state, tfa_about = base
    state, about = mpsr.from_tfa(tfa_state, tfa_about)
    before = rebuilt(TFA, tfa_about).eval()
    before.load_state_dict(tfa_state)
    model = rebuilt(MPSR, about, 2, rois=32).eval()
    weights.fill(model, state, "base", fresh=("cls.",))
    with torch.no_grad():
        features = before.trunk(IMAGES)
        for ours, theirs in zip(model.rpn.maps(features), before.rpn.maps(features), strict=True):
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs))
        proposals = before.rpn.propose(features, BATCH[1])
        maps = model.roi_features(features, proposals)
        assert torch.equal(maps, before.roi_features(features, proposals))
        _, deltas = before.head(before.roi_vectors(features, proposals))
        assert torch.allclose(model.regress(maps)[:, 0], deltas.mean(1), atol=1e-4)
    model.trunk.freeze_pretrained(1)
    model.levels = model.levels._replace(last_border=0)
    crops = [IMAGES[:, :, :32, :32], IMAGES[:, :, :64, :64]]
    parts = {name for name, _ in model.named_children()}
    assert train(model, crops, torch.tensor([0, 1])) == parts
    described = model.describe()
    assert rebuilt(MPSR, {**described, "classes": NEW}).describe() == described
    with pytest.raises(InputError, match=r"MPSR needs a pyramid of strides.*not \(32, 32, 64\)"):
        small = {"name": "mobilenet_v3_large", "channels": 256}
        rebuilt(MPSR, {**about, "architecture": small}, 2)


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "prototype_detector"])
@torch.no_grad()
def test_tests_choose_the_number_of_proposals(name):
    detector = DETECTORS[name]
    trunk = fpn.fpn("small") if name in ("tfa", "fsce", "mpsr") else trunks.c4("small", meta=True)
    model = detector(trunk, 1, test_proposals=(500, 50)).eval()
    if name == "attention_rpn":
        model.set_prototypes([(*model.support_features(*SUPPORT), torch.tensor([0]))])
    counts = []
    for number in (None, 7):
        model.rpn.test_proposals = (500, number) if number else model.rpn.test_proposals
        counts.append([len(proposals) for proposals in model.propose(*BATCH[:2])])
    assert counts == [[50, 50], [7, 7]]
