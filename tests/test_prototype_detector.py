"""The detector that learns nothing: each formula against a plain version, any first stage, files,
use, bad input.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from runs import QUICK, launch, metrics, results_of_tests, run_here
from safetensors.torch import load_file, save_file
from test_calibrate import colours
from torch import Tensor, nn

import fewshot
from fewshot import InputError, methods, weights
from fewshot.backbones import fpn, trunks
from fewshot.convert import torchvision as torchvision_base
from fewshot.data import detection
from fewshot.data.detection import Detections
from fewshot.data.pipeline import Pipeline
from fewshot.data.transforms import CAFFE, IMAGENET, Normalisation
from fewshot.detectors import prototype
from fewshot.detectors.prototype import FrozenMaps, PrototypeDetector, decayed, k_means, uncovered
from fewshot.evaluation.average_precision import evaluate

METHOD = "prototype_detector"
BASES = [name for name in methods.DETECTORS if name != METHOD]
NORMALISED = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
SIZES = [(96, 128), (96, 128)]


def base(name: str = "tfa", **options) -> tuple[nn.Module, dict]:
    """An untrained detector of two classes and what its file would say."""
    torch.manual_seed(0)
    trunk = (
        fpn.fpn("small")
        if name in ("tfa", "fsce", "mpsr")
        else trunks.c4("small", meta=name != "defrcn")
    )
    model = methods.DETECTORS[name](trunk, 2, test_proposals=(300, 40), **options).eval()
    if name == "attention_rpn":
        model.set_prototypes(
            [(torch.rand(2, 96), torch.rand(2, *model.maps.shape[1:]), torch.arange(2))]
        )
    return model, {
        "method": name,
        "classes": ["a", "b"],
        "pictures": Pipeline().describe(),
        **model.describe(),
    }


def detector(name: str = "tfa", classes: int = 3, **options) -> PrototypeDetector:
    return PrototypeDetector(*base(name), classes, **options).eval()


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


# -------------------------------------------------------------------------------------------
# formulas, plainly written
@pytest.mark.parametrize("clusters", [0, 4])
@pytest.mark.parametrize("roi_size", [1, 2])
def test_scores(clusters, roi_size):
    """Softmax of cosines over classes and the best background cluster, and the first stage's score,
    share by share.
    """
    model = detector(roi_size=roi_size, clusters=clusters, temperature=0.2, objectness=0.3)
    generator = torch.Generator().manual_seed(1)
    width = model.prototypes.shape[1]
    model.prototypes.copy_(torch.rand(3, width, generator=generator))
    model.shots.copy_(torch.tensor([2.0, 0, 1]))
    model.background.copy_(torch.rand(clusters, width // roi_size**2, generator=generator))
    model.cells[:3] = 5  # the fourth is not there
    vectors, objectness = (
        torch.rand(6, width, generator=generator),
        torch.rand(6, generator=generator),
    )
    scores = model.scores(vectors, objectness)
    assert scores.shape == (6, 2)
    for vector, o, row in zip(vectors, objectness.tolist(), scores.tolist()):
        to_classes = [math.exp(cosine(vector, model.prototypes[c]) / 0.2) for c in (0, 2)]
        rest = [
            cosine(vector, torch.stack([b] * roi_size**2, 1).flatten())
            for b in model.background[:3]
        ]
        total = sum(to_classes) + (math.exp(max(rest) / 0.2) if rest else 0)
        assert row == pytest.approx([(e / total) ** 0.7 * o**0.3 for e in to_classes], rel=1e-4)


def test_decay_by_intersection_over_self():
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(30, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(30, 2, generator=generator) * 30], 1)
    vectors, labels = torch.randn(30, 3, generator=generator), torch.arange(30) % 3
    scores = torch.rand(30, generator=generator).sort(descending=True).values
    found, moved = decayed(boxes, vectors, scores, labels, 0.5).tolist(), 0
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        worst = 0.0
        for j in range(i):
            a, b, c, d = boxes[j].tolist()
            inside = (
                max(0, min(x2, c) - max(x1, a))
                * max(0, min(y2, d) - max(y1, b))
                / ((x2 - x1) * (y2 - y1))
            )
            if labels[i] == labels[j]:
                worst = max(worst, inside * max(0, cosine(vectors[i], vectors[j])))
        assert found[i] == pytest.approx(scores[i].item() * (1 - worst) ** 0.5, abs=1e-5)
        moved += worst > 0.1
    assert moved > 5
    assert torch.equal(decayed(boxes, vectors, scores, labels, 0.0), scores)
    assert decayed(boxes[:0], vectors[:0], scores[:0], labels[:0], 0.5).shape == (0,)


def test_k_means_by_cosine():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 4)) + 4 * np.eye(4)[np.arange(60) % 4]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    weight = rng.uniform(1, 3, 60)
    centres, inside = k_means(torch.tensor(points), torch.tensor(weight), 4)
    expected = points[[0, 20, 39, 59]]
    for _ in range(prototype.ROUNDS):
        nearest = [int(np.argmax([p @ c for c in expected])) for p in points]
        sums = [sum(w * p for p, w, n in zip(points, weight, nearest) if n == k) for k in range(4)]
        expected = np.array([s / np.linalg.norm(s) for s in sums])
    assert np.allclose(centres.numpy(), expected) and inside.sum().item() == pytest.approx(
        weight.sum()
    )
    assert all(
        inside[k].item() == pytest.approx(weight[np.array(nearest) == k].sum()) for k in range(4)
    )
    few, ones = k_means(torch.tensor(points[:2]), torch.ones(2), 4)
    assert np.allclose(few.numpy(), points[:2]) and ones.tolist() == [1, 1]
    same, all_of_it = k_means(torch.tensor(points[:1]).repeat(9, 1), torch.ones(9), 3)
    assert len(same) == 1 and all_of_it.tolist() == [9]  # clusters without points are left out


def test_background_is_what_no_box_covers(monkeypatch):
    stride, boxes = 8, torch.tensor([[9.0, 9, 15, 30], [40, 0, 48, 8]])
    map = torch.arange(7 * 9.0).view(1, 7, 9)
    expected = []
    for row in range(7):
        for column in range(9):
            x1, y1, x2, y2 = column * 8, row * 8, column * 8 + 8, row * 8 + 8
            touched = any(
                min(x2, c) > max(x1, a) and min(y2, d) > max(y1, b) for a, b, c, d in boxes.tolist()
            )
            if x2 <= 70 and y2 <= 50 and not touched:  # the last column and row are padded
                expected.append(float(row * 9 + column))
    found = uncovered(map, (50, 70), boxes, stride)
    assert found.flatten().tolist() == expected and len(expected) == 6 * 8 - 3 - 1
    monkeypatch.setattr(prototype, "CELLS", 5)
    some = uncovered(map, (50, 70), boxes, stride).flatten().tolist()
    assert (
        len(some) == 5
        and set(some) <= set(expected)
        and {some[0], some[-1]} == {expected[0], expected[-1]}
    )
    assert uncovered(map, (50, 70), torch.tensor([[0.0, 0, 70, 50]]), stride).shape == (0, 1)


def test_vectors_are_means_over_regions_and_prototypes_means_over_supports():
    """Boxes along the cells: RoIAlign of one bin is the mean of what they hold."""
    model = detector("meta_rcnn", roi_size=1, clusters=2)
    (map,), (stride,) = model.maps(NORMALISED), model.strides
    box = torch.tensor([[1.0, 2, 4, 6]]) * stride
    assert torch.allclose(
        model.vectors([map], [box, box])[1], map[1, :, 2:6, 1:4].mean((1, 2)), atol=1e-5
    )
    boxes = [torch.cat([box, box + stride]), box]
    vectors, free = model.support_features(NORMALISED, SIZES, boxes)
    assert len(vectors) == 3 and free.shape[1] == vectors.shape[1]
    model.add_supports([(vectors, free, torch.tensor([0, 2, 0]))])
    assert model.known.tolist() == [True, False, True]
    assert torch.allclose(model.prototypes[0], (vectors[0] + vectors[2]) / 2)
    assert torch.allclose(model.prototypes[2], vectors[1]) and not model.prototypes[1].any()
    model.add_supports(
        [(vectors[1:2], free[:4], torch.tensor([0]))]
    )  # one support more of the first class
    assert torch.allclose(
        model.prototypes[0], vectors.mean(0), atol=1e-6
    ) and model.shots.tolist() == [3, 0, 1]
    assert model.cells.sum() == len(free) + 4
    model.make_room(4, keep=True)
    assert torch.allclose(
        model.prototypes[0], vectors.mean(0), atol=1e-6
    ) and model.shots.tolist() == [3, 0, 1, 0]


@torch.no_grad()
def test_a_pyramid_gives_each_region_from_the_level_of_its_size():
    model, images = detector("tfa", roi_size=2), torch.randn(2, 3, 128, 160)
    levels = model.trunk(images)
    assert model.strides == (4, 8, 16) and len(model.maps(images)) == 3
    boxes = torch.tensor(
        [[3.0, 5, 40, 50], [2, 2, 152, 122]]
    )  # sides of 41 and 134 pixels; 112 part the levels
    found = model.vectors(model.maps(images), [boxes[:0], boxes])
    for vector, box, level, stride in zip(found, boxes, levels, model.strides):
        (cut,) = torchvision.ops.roi_align(level[1:], [box[None]], 2, 1 / stride, aligned=True)
        assert torch.allclose(vector, cut.flatten(), atol=1e-5)
    _, free = model.support_features(images, [(128, 160)] * 2, [boxes[:0], boxes])
    cells = [prototype.CELLS, prototype.CELLS, 8 * 10]  # of a picture without boxes
    assert len(free) > sum(cells) and torch.equal(free[0], levels[0][0, :, 0, 0])


def test_background_of_the_first_supports_stays_only_where_there_is_no_other():
    model = detector(roi_size=1, clusters=2)
    width = model.prototypes.shape[1]
    one, other = torch.eye(width)[:1], torch.eye(width)[1:2]
    model.add_supports([(one, one, torch.tensor([0]))])
    model.make_room(1)
    model.add_supports([(one, one[:0], torch.tensor([0]))])
    assert torch.equal(model.background[:1], one) and model.cells.tolist() == [1, 0]
    model.make_room(1)
    model.add_supports([(one, other, torch.tensor([0]))])
    assert torch.equal(model.background[:1], other) and model.cells.tolist() == [1, 0]


@torch.no_grad()
def test_a_region_has_its_likeliest_class_and_the_best_hundred_stay():
    model = detector(nms=0.5)
    model.shots.copy_(torch.tensor([1.0, 0, 1]))
    model.prototypes.copy_(
        torch.rand(model.prototypes.shape, generator=torch.Generator().manual_seed(3))
    )
    corners = torch.arange(150)[:, None] * torch.tensor([[20.0, 0]])
    proposals = torch.cat([corners, corners + 10, torch.linspace(1, 0.1, 150)[:, None]], 1)
    proposals[1, :4] = proposals[0, :4] + 1  # overlaps the first by two thirds
    vectors = model.prototypes[[0, 0, *[2] * 148]]
    boxes, scores, labels = model.named(proposals, vectors)
    assert len(boxes) == 100 and labels.tolist() == [0, *[2] * 99]
    assert torch.equal(boxes[0], proposals[0, :4]) and torch.equal(boxes[1], proposals[2, :4])
    expected = model.scores(vectors, proposals[:, 4])
    assert torch.allclose(scores, torch.cat([expected[:1, 0], expected[2:101, 1]]))
    assert [len(column) for column in model.named(proposals[:0], vectors[:0])] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------- any first stage
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_any_detector_proposes(name, tmp_path):
    """Its proposals are the base's, and the saved file, which has no second stage, gives the same
    detections.
    """
    other, about = base(name)
    expected = other.propose(NORMALISED, SIZES)
    model = PrototypeDetector(other, about, 2).eval()
    assert all(torch.equal(a, b) for a, b in zip(model.propose(NORMALISED, SIZES), expected))
    box = torch.tensor([[10.0, 10, 60, 60], [20, 20, 90, 80]])
    model.add_supports(
        [(*model.support_features(NORMALISED, SIZES, [box, box[:0]]), torch.tensor([0, 1]))]
    )
    found = model.detect(NORMALISED, SIZES)
    assert all(len(d.boxes) > 5 for d in found)
    weights.save(
        tmp_path / "m.safetensors",
        model,
        {"method": METHOD, "classes": ["x", "y"], **model.describe()},
    )
    parts = {
        key.split(".")[1]
        for key in load_file(tmp_path / "m.safetensors")
        if key.startswith("base.")
    }
    assert parts <= {"trunk", "rpn", "affine_rpn", "kernels", "maps", "known", "prototypes"}
    state, about = weights.load(tmp_path / "m.safetensors")
    again = methods.built(about)
    methods.fill(again, state, "the file")
    for one, two in zip(again.eval().detect(NORMALISED, SIZES), found):
        assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_torchvisions_coco_model_proposes(tmp_path, monkeypatch):
    """With random weights here. It knows other classes than the data, so that only these' novel
    ones are looked for.
    """
    torch.manual_seed(0)
    random = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None
    )
    given = torchvision_base.converted(
        random.state_dict(), torchvision_base.categories("mobilenet_v3_large")
    )
    monkeypatch.setattr(torchvision_base, "coco", lambda backbone: given)
    flags = f"--base coco_mobile --shots 1 --test-images 2 --test-proposals 20 --roi-size 1 --out {tmp_path}"
    run_here(METHOD, flags)
    model = fewshot.load(tmp_path / "1shot-seed0")
    assert model.classes == [f"glyph-{i}" for i in range(15, 20)] and model.pipeline.short == 320
    assert set(metrics(tmp_path / "1shot-seed0")["AP50"]) == {"novel", "all"}


@torch.no_grad()
def test_the_base_sees_pictures_of_its_own_size():
    other, about = base()
    about["pictures"] = Pipeline(48, 100, multiple=32).describe()
    picture = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    small = Pipeline(48, 100).resize(picture, 48)[0]
    assert small.shape == (3, 48, 64)
    model = PrototypeDetector(other, about, 2, roi_size=1).eval()
    resized, sizes = model._as_base_sees(model.trunk.normalisation(picture[None]), [(96, 128)])
    assert (
        resized.shape == (1, 3, 64, 64) and sizes == [(48, 64)] and not resized[..., 48:, :].any()
    )
    assert (
        resized[..., :48, :] - model.trunk.normalisation(small[None])
    ).abs().max() < 1.01 / 127.5
    given = resized[..., :48, :]
    model.pictures = Pipeline(48, 100)
    found = model.propose(model.trunk.normalisation(picture[None]), [(96, 128)])[0]
    expected = other.propose(given, [(48, 64)])[0]
    assert torch.allclose(found[:, :4], expected[:, :4] * 2) and torch.equal(
        found[:, 4], expected[:, 4]
    )


# --------------------------------------------------------------------------------------------------- frozen backbones
@pytest.mark.parametrize(
    "normalisation", [IMAGENET, CAFFE, Normalisation((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))]
)
def test_pixels_are_what_was_normalised(normalisation):
    pixels = torch.randint(0, 256, (2, 3, 5, 6))
    assert torch.allclose(normalisation.pixels(normalisation(pixels)), pixels.float(), atol=1e-3)


@torch.no_grad()
def test_a_network_of_torchvision_describes_pictures_of_any_size(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2().eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    maps = FrozenMaps("torchvision/mobilenet_v2", str(tmp_path / "net.safetensors"))
    assert (maps.stride, maps.out_channels) == (32, 1280) and not any(
        p.requires_grad for p in maps.parameters()
    )
    model = detector("defrcn", backbone=maps).train()
    assert not maps.training, "its norms stay as they are"
    picture = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8)
    (found,) = model.maps(model.trunk.normalisation(picture))
    assert torch.allclose(found, net.features(IMAGENET(picture)), atol=1e-3) and found.shape == (
        1,
        1280,
        3,
        5,
    )


@torch.no_grad()
def test_a_vit_of_timm_describes_pictures_of_any_size(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("test_vit", dynamic_img_size=True).eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    maps = FrozenMaps("timm/test_vit", str(tmp_path / "net.safetensors"))
    assert (maps.stride, maps.out_channels) == (16, 64)
    images = torch.randn(1, 3, 90, 150)
    padded = nn.functional.pad(images, (0, 10, 0, 6))
    tokens = net.norm(
        net.forward_intermediates(padded, indices=1, intermediates_only=True, output_fmt="NLC")[0]
    )
    assert torch.allclose(maps(images), tokens.transpose(1, 2).view(1, 64, 6, 10), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "torchvision/vit_b_16",
            "gives no map: choose a convolutional network, or a ViT of timm's",
        ),
        (
            "timm/mixer_s32_224",
            "takes images of one size alone: choose a convolutional network or a ViT",
        ),
        (
            "timm/inception_v4",
            "gives a map of 5 cells of 224 pixels, which do not fit: choose another",
        ),
        ("torchvision/resnet19", "torchvision has no network 'resnet19': did you mean"),
        ("resnet18", "write torchvision/NAME or timm/NAME"),
    ],
)
def test_a_backbone_without_a_map_is_named(name, words):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(InputError, match=words):
        FrozenMaps(name, "none")


# ------------------------------------------------------------------------------------- the result
# is of the supports
class Places(nn.Module):
    """A first stage that proposes the squares of `colours` and places beside them, and whose map
    are the pixels.
    """

    def __init__(self, about: list[np.ndarray]):
        super().__init__()
        self.trunk = Pixels()
        self.boxes = about

    def describe(self) -> dict:
        return {"sizes": {}}

    def propose(self, images: Tensor, sizes: list) -> list[Tensor]:
        own = torch.from_numpy(self.boxes.pop(0))
        moved = [(own + shift).clamp(0, 96) for shift in (-30, -12, 12, 30)]
        return [torch.cat([torch.cat([own, *moved]), torch.full((5, 1), 0.9)], 1)]


class Pixels(nn.Module):
    normalisation, out_channels, stride = Normalisation((128.0,) * 3, (128.0,) * 3), 3, 1

    def forward(self, images: Tensor) -> Tensor:
        return images - images.mean((2, 3), keepdim=True)


def test_scrambled_supports_destroy_the_result():
    shots, shown = colours(9, seed=1)
    test, drawn = colours(60, seed=2)
    model = PrototypeDetector(
        Places([]), {"method": "places", "classes": []}, 3, roi_size=4, clusters=3
    )
    norm = model.trunk.normalisation
    tensors = [
        [norm(torch.from_numpy(pixels).permute(2, 0, 1)[None]) for pixels in part]
        for part in (shown, drawn)
    ]
    supports = []
    for image, record in zip(tensors[0], shots.records):
        features = model.support_features(image, [(96, 96)], [torch.from_numpy(record.boxes)])
        supports.append((*features, torch.from_numpy(record.labels)))
    model.add_supports(supports)
    ap = []
    for scrambled in (False, True):
        if scrambled:
            model.exchange_supports()
        model.base.boxes = [record.boxes for record in test.records]
        found = [model.detect(image, [(96, 96)])[0] for image in tensors[1]]
        results = {
            r.id: Detections(*(column.numpy() for column in d)) for r, d in zip(test.records, found)
        }
        ap.append(evaluate(results, test)["AP50"]["all"])
    assert ap[0] > 95 and ap[1] < 10


# -------------------------------------------------------------------------------------------------
# in runs and in use
@pytest.fixture(scope="module")
def tfa(tmp_path_factory) -> Path:
    """A base model after a few steps."""
    folder = tmp_path_factory.mktemp("tfa")
    run_here("tfa", f"{QUICK['tfa']} --stage base --out {folder}")
    return folder / "base"


@pytest.fixture(scope="module")
def run(tfa, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    flags = "--shots 2 --test-images 12 --test-proposals 30 --scramble-supports"
    run_here(METHOD, f"--base {tfa} --out {folder} {flags}")
    return folder / "2shot-seed0"


def scene(number: int = 0) -> Tensor:
    return detection.open_detection("glyphs", "", part="test").image(number)


def test_a_run_and_its_file(run, tfa):
    result = metrics(run)
    assert (
        set(result["AP50"]) == set(result["scrambled_supports"]["AP50"]) == {"base", "novel", "all"}
    )
    assert result["protocol"]["shots"] == "2 of each class, drawn by seed 0"
    state, about = weights.load(run / "model.safetensors")
    assert about["method"] == METHOD and about["first_stage"]["method"] == "tfa"
    assert state["shots"].tolist() == [2] * 20 and state["cells"].sum() > 1000
    own = load_file(tfa / "model.safetensors")
    assert all(
        torch.equal(state[f"base.{k}"], v)
        for k, v in own.items()
        if k.startswith(("trunk.", "rpn."))
    )
    # the prototypes are those of the shots that the run names
    pictures = detection.open_detection("glyphs", "", part="train")
    ids, model, vectors = [r.id for r in pictures.records], fewshot.load(run), []
    for shot in json.loads((run / "shots.json").read_text())["pictures"]:
        image = model.normalisation(pictures.image(ids.index(shot["id"]))[None])
        found, _ = model.network.support_features(
            image, [(160, 160)], [torch.tensor(shot["boxes"])]
        )
        vectors += [v for v, name in zip(found, shot["classes"]) if name == "glyph-17"]
    assert len(vectors) == 2 and torch.allclose(
        sum(vectors) / 2, state["prototypes"][17], atol=1e-4
    )


def test_it_is_tested_again_from_its_file(run):
    before = (run / "model.safetensors").read_bytes()
    flags = "--shots 2 --test-images 12 --test-proposals 30 --scramble-supports --test-only"
    run_here(METHOD, f"--out {run.parent} {flags}")
    (again,) = results_of_tests(run)
    first = metrics(run)
    assert all(again[key] == first[key] for key in ("AP50", "scrambled_supports", "protocol"))
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_two_processes_learn_and_test_the_same(run, tfa, tmp_path):
    flags = (
        f"--base {tfa} --out {tmp_path} --shots 2 --test-images 12 --test-proposals 30 --workers 0"
    )
    done = launch(METHOD, flags, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(tmp_path / "2shot-seed0")["AP50"] == metrics(run)["AP50"]
    done = launch(METHOD, f"{flags} --overwrite", launcher="--mixed_precision bf16")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_class_is_added_by_support(run, tmp_path):
    """Twice, with all others known on; the model that is saved then knows them too."""
    model, image = fewshot.load(run), scene()
    before = model.network.prototypes.clone()
    model.support([image, image], [(10, 10, 60, 70), (20, 20, 90, 80)], ["house", "tree"], add=True)
    model.support(scene(1), [(30, 30, 80, 90)], "house", add=True)
    assert model.classes[:20] == [f"glyph-{i:02d}" for i in range(20)] and model.classes[20:] == [
        "house",
        "tree",
    ]
    assert torch.equal(model.network.prototypes[:20], before) and model.network.shots.tolist() == [
        2
    ] * 20 + [2, 1]
    together = fewshot.load(run)
    boxes = [(10, 10, 60, 70), (20, 20, 90, 80), (30, 30, 80, 90)]
    together.support([image, image, scene(1)], boxes, ["house", "tree", "house"], add=True)
    assert torch.allclose(model.network.prototypes, together.network.prototypes, atol=1e-5)
    found = model.predict(image, score_above=0)
    assert set(found.names) <= set(model.classes) and len(found.names) > 5
    model.save_pretrained(tmp_path / "mine")
    again = fewshot.load(tmp_path / "mine")
    assert again.classes == model.classes and again.about["novel"][-2:] == ["house", "tree"]
    assert torch.allclose(again.predict(image, score_above=0).scores, found.scores, atol=1e-6)


def test_support_replaces_what_was_known(run, monkeypatch):
    monkeypatch.setattr(prototype, "CELLS", 1000)
    model, image = fewshot.load(run), scene()
    model.support([image], [(10, 10, 60, 70)], ["house"])
    assert model.classes == ["house"] and set(model.predict(image, score_above=0).names) == {
        "house"
    }
    x = model.normalisation(image[None])
    vector, free = model.network.support_features(
        x, [(160, 160)], [torch.tensor([[10.0, 10, 60, 70]])]
    )
    assert torch.allclose(model.network.prototypes, vector) and model.network.cells.sum() == len(
        free
    )
    # objects of one picture are no background of each other
    model.support([image, image], [(10, 10, 60, 70), (80, 80, 150, 150)], ["house", "tree"])
    assert model.network.cells.sum() < len(free)
    # a picture that is the object shows no background: what is known of it stays
    model.support([image], None, ["whole"])
    assert model.network.cells.sum() > 0
    doubled = nn.functional.interpolate(image[None].float(), scale_factor=2).to(torch.uint8)[0]
    other = fewshot.load(run)
    other.pipeline = Pipeline(160)
    other.support([doubled], [(20, 20, 120, 140)], ["house"])
    assert torch.allclose(other.network.prototypes, vector, atol=0.05 * vector.abs().max().item())


def test_predict_takes_every_box_of_a_support(run, tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    import predict

    (tmp_path / "known" / "house").mkdir(parents=True)
    torchvision.io.write_png(scene(0), str(tmp_path / "known" / "house" / "a.png"))
    torchvision.io.write_png(scene(1), str(tmp_path / "photo.png"))
    boxes = [(10, 10, 60, 70), (80, 80, 150, 150)]
    corners = (
        f"<xmin>{a + 1}</xmin><ymin>{b + 1}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        for a, b, c, d in boxes
    )
    objects = "".join(f"<object><name>house</name><bndbox>{c}</bndbox></object>" for c in corners)
    (tmp_path / "known" / "house" / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    args = predict.Args(
        str(run), (tmp_path / "photo.png",), support=tmp_path / "known", out=tmp_path / "out"
    )
    args.score_above, args.device = 0.0, "cpu"
    predict.main(args)
    (picture,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    model = fewshot.load(run)
    model.support([scene(0)] * 2, boxes, ["house"] * 2)
    expected = model.predict(scene(1), score_above=0)
    assert len(expected.scores) > 5
    assert [o["score"] for o in picture["objects"]] == pytest.approx(
        expected.scores.tolist(), abs=1e-6
    )


def test_bad_input_is_named(run, tfa, tmp_path):
    model = fewshot.load(run)
    for box in ((10, 10, 200, 50), (-1, 0, 5, 5), (30, 30, 30, 40)):
        with pytest.raises(InputError, match="of support 0 is not inside its picture of 160 x 160"):
            model.support([scene()], [box], ["a"])
    with pytest.raises(InputError, match="no supports: give one or more pictures of every class"):
        model.support([], [], [])
    with pytest.raises(InputError, match="has one set of proposals anyway"):
        model.predict(scene(), share_proposals=True)
    state, about = weights.load(run / "model.safetensors")
    for name in ("prototypes", "shots"):
        state[name].zero_()
    weights.save_state(tmp_path / "none.safetensors", state, about)
    with pytest.raises(InputError, match="no supports yet: call support"):
        fewshot.load(tmp_path / "none.safetensors").predict(scene())
    with pytest.raises(RuntimeError, match="no class has a prototype yet"):
        fewshot.load(tmp_path / "none.safetensors").network.detect(NORMALISED, SIZES)
    with pytest.raises(InputError, match="tfa has no supports"):
        fewshot.load(tfa).support([scene()], None, ["a"], add=True)
    run_here("proto_net", f"{QUICK['proto_net']} --out {tmp_path / 'classifier'}")
    for flags, words in (
        ("", "nothing proposes regions: give --base a detector's run"),
        (
            f"--base {tmp_path / 'classifier'}",
            "is a model of proto_net: give a detector that proposes regions",
        ),
        (f"--base {run}", f"is a model of {METHOD}: give a detector that proposes regions"),
        (f"--base {tfa} --short 100", "are for a --backbone: leave them out, or give one"),
        (f"--base {tfa} --backbone torchvision/vit_b_16", "gives no map"),
        (f"--base {tfa} --temperature 0", "temperature is 0.0: must be from 0.001 to 1000"),
        (f"--base {tfa} --split 2", "was trained on glyph-10, which is novel here"),
        (f"--base {tfa} --shots 0", "--shots 0: give a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit, match=words):
            run_here(METHOD, f"{flags} --test-images 2 --out {tmp_path / 'run'}")
