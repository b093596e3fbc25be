"""Prototypical calibration: against the official block's numbers, by supports right and wrong, in
runs and in use.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from naming_rule import boxes, close, golden, image, weight
from runs import QUICK, run_here
from safetensors.torch import save_file
from torch import Tensor, nn

import fewshot
from fewshot import InputError, weights
from fewshot.data import detection
from fewshot.data.annotations import make_record
from fewshot.data.detection import Detections, DetectionSet
from fewshot.data.transforms import Normalisation
from fewshot.detectors import calibrate
from fewshot.detectors.calibrate import Calibration, Regions
from fewshot.evaluation.average_precision import evaluate

AS_THEY_ARE = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


# ------------------------------------------------------------------------------------------------
# the official numbers
@pytest.fixture(scope="module")
def official(tmp_path_factory) -> tuple[Regions, dict, dict[str, Tensor]]:
    """The block's ResNet-50 with the reference's weights, from a file; its results; and the
    classes' prototypes.
    """
    expected = golden("defrcn")["pcb"]
    file = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(
        {k: torch.from_numpy(weight(f"pcb.{k}", s)) for k, s in expected["state"].items()}, file
    )
    regions = calibrate.backbone(f"resnet50={file}")
    vectors: dict[str, list[Tensor]] = {}
    for c, s in expected["support_order"]:
        vectors.setdefault(str(c), []).append(
            regions(picture(f"pcb_c{c}_s{s}", expected), box(c, s, expected))[0]
        )
    return regions, expected, {name: torch.stack(found).mean(0) for name, found in vectors.items()}


def picture(name: str, expected: dict | None = None) -> Tensor:
    return torch.from_numpy(
        image(name, *(expected["support_hw"] if expected else (256, 320)))
    ).permute(2, 0, 1)


def box(c: int, s: int, expected: dict) -> Tensor:
    return torch.from_numpy(boxes(f"pcbbox_c{c}_s{s}", 1, *expected["support_hw"], lo=32, hi=0.8))


@torch.no_grad()
def test_vectors_of_supports(official):
    regions, expected, prototypes = official
    x = regions.normalisation(picture("pcb_c0_s0", expected)[None])
    close(x, expected["support0_input"])
    close(regions.network(x), expected["support0_map"])
    mean = Regions(regions.network, regions.normalisation, stride=32)
    close(mean(picture("pcb_c0_s0", expected), box(0, 0, expected)), expected["support0_roi"])
    close(regions(picture("pcb_c0_s0", expected), box(0, 0, expected)), expected["support0_vector"])
    for c, wanted in expected["prototypes"].items():
        close(prototypes[c][None], wanted)


def test_calibrated_scores(official):
    regions, expected, prototypes = official
    query, fixed = picture("query0"), torch.tensor(golden("defrcn")["test"]["fixed_proposals"])
    vectors = regions(query, fixed)
    close(vectors, expected["query_fixed_vectors"])
    cosines = F.cosine_similarity(vectors[:, None], torch.stack(list(prototypes.values())), dim=2)
    assert torch.allclose(cosines, torch.tensor(expected["cosines_fixed"]), atol=1e-5)
    for case in expected["calibrated"]:
        included = {
            name: vector for name, vector in prototypes.items() if int(name) not in case["exclude"]
        }
        calibration = Calibration(
            regions, included, alpha=expected["alpha"], lower=case["lower"], upper=case["upper"]
        )
        before, names = torch.tensor(case["scores_before"]), [str(c) for c in case["classes"]]
        after = calibration(query, torch.tensor(expected["det_boxes"]), before, names)
        assert torch.allclose(after, torch.tensor(case["scores_after"]), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- what it does
def colours(n: int, seed: int) -> tuple[DetectionSet, list[np.ndarray]]:
    """Pictures with a square of one of three colours each, at random places, and these pictures (H,
    W, 3).
    """
    rng, records, drawn = np.random.default_rng(seed), [], []
    for i in range(n):
        x, y = (int(v) for v in rng.integers(0, 64, 2))
        pixels = np.full((96, 96, 3), 90, np.uint8) + rng.integers(0, 20, (96, 96, 3)).astype(
            np.uint8
        )
        pixels[y : y + 32, x : x + 32, i % 3] += 120
        drawn.append(pixels)
        records.append(make_record(str(i), "", 96, 96, [((x, y, x + 32, y + 32), i % 3, False)]))
    names = ["red", "green", "blue"]
    return DetectionSet("colours", "test", names, names, records, "coco"), drawn


def unsure(dataset: DetectionSet, seed: int) -> dict[str, Detections]:
    """Every object found once as each class, with random scores: a detector that places, but cannot
    tell.
    """
    rng, found = np.random.default_rng(seed), {}
    for record in dataset.records:
        scores = rng.uniform(0.1, 0.9, 3).astype(np.float32)
        found[record.id] = Detections(record.boxes.repeat(3, 0), scores, np.arange(3))
    return found


class Colour(nn.Module):
    """A map of stride 8: the mean colour of a cell, less the picture's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x - x.mean((2, 3), keepdim=True), 8)


def rescored(
    calibration: Calibration, dataset: DetectionSet, drawn: list, found: dict
) -> dict[str, Detections]:
    new = {}
    for record, pixels in zip(dataset.records, drawn):
        b, s, labels = found[record.id]
        names = [dataset.classes[label] for label in labels]
        columns = (
            torch.from_numpy(pixels).permute(2, 0, 1),
            torch.from_numpy(b),
            torch.from_numpy(s),
        )
        new[record.id] = Detections(b, calibration(*columns, names).numpy(), labels)
    return new


@pytest.mark.parametrize("kind", ["maps", "vectors"])
def test_the_gain_comes_from_the_supports(kind, monkeypatch):
    """Right supports make a guessing detector nearly perfect; with the next class's it is worse
    than before.
    """
    network, stride = (
        (Colour(), 8)
        if kind == "maps"
        else (lambda x: x.mean((2, 3)) - x.mean((1, 2, 3))[:, None], None)
    )
    shots, shot_pictures = colours(9, seed=1)
    monkeypatch.setattr(
        calibrate, "backbone", lambda choice: Regions(network, AS_THEY_ARE, stride=stride, crop=16)
    )
    monkeypatch.setattr(
        DetectionSet, "image", lambda self, i: torch.from_numpy(shot_pictures[i]).permute(2, 0, 1)
    )
    right = calibrate.from_shots("colour", shots)
    names = list(right.prototypes)
    wrong = {name: right.prototypes[other] for name, other in zip(names, [*names[1:], names[0]])}
    test, drawn = colours(60, seed=2)
    found = unsure(test, seed=3)
    ap = {"before": evaluate(found, test)["AP50"]["all"]}
    for how, calibration in (("right", right), ("scrambled", Calibration(right.regions, wrong))):
        ap[how] = evaluate(rescored(calibration, test, drawn, found), test)["AP50"]["all"]
    assert ap["right"] > 95 and ap["before"] < 60
    assert ap["scrambled"] < ap["before"]


def test_only_classes_with_a_prototype_and_scores_in_the_range_change():
    red, green = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    regions = Regions(lambda x: x, AS_THEY_ARE, stride=1)  # the map is the picture
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    picture[0] = 200
    calibration = partial(Calibration(regions, {"red": red, "green": green, "dark": -red}), picture)
    whole = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).expand(5, 4)
    scores = torch.tensor([0.8, 0.6, 0.04, 0.5, 0.2])
    after = calibration(whole, scores, ["red", "green", "red", "unknown", "dark"])
    assert torch.allclose(after, torch.tensor([0.9, 0.3, 0.04, 0.5, -0.4]))
    assert calibration(whole[:0], scores[:0], []).shape == (0,)
    narrow = Calibration(regions, {"red": red}, alpha=0.25, lower=0.3, upper=0.5)
    assert torch.allclose(
        narrow(picture, whole[:2], torch.tensor([0.5, 0.3]), ["red", "red"]),
        torch.tensor([0.875, 0.3]),
    )


# ---------------------------------------------------------------------------------------------------- its backbones
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "squeezenet1_1"]
)
@torch.no_grad()
def test_torchvisions_networks(name, tmp_path):
    """A box that is the whole picture has the network's own logits, whichever way: by its map, or
    cut out.
    """
    torch.manual_seed(0)
    net = torchvision.models.get_model(name).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    regions = calibrate.backbone(f"{name}={tmp_path / 'net.pth'}")
    picture = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    whole = torch.tensor([[0.0, 0, 224, 224], [0, 0, 112, 96]])
    vectors = regions(picture, whole)
    assert vectors.shape == (2, 1000) and not any(p.requires_grad for p in regions.parameters())
    logits = net(regions.normalisation(picture[None]))
    cosine = F.cosine_similarity(vectors, logits)
    assert cosine[0] > 0.9999 and (vectors[0] - vectors[1]).abs().max() > 1e-3 * logits.abs().max()


@torch.no_grad()
def test_weights_without_a_classifier_give_the_maps_vectors(tmp_path):
    net = torchvision.models.mobilenet_v2().eval()
    kept = {
        name: tensor for name, tensor in net.state_dict().items() if name.startswith("features.")
    }
    torch.save(kept, tmp_path / "features.pth")
    regions = calibrate.backbone(f"mobilenet_v2={tmp_path / 'features.pth'}")
    picture = torch.randint(0, 256, (3, 96, 64), dtype=torch.uint8)
    (vector,) = regions(picture, torch.tensor([[0.0, 0, 64, 96]]))
    assert torch.allclose(
        vector, net.features(regions.normalisation(picture[None])).mean((2, 3))[0], atol=1e-4
    )
    kept.pop("features.18.1.bias")
    torch.save(kept, tmp_path / "features.pth")
    with pytest.raises(InputError, match=r"features\.18\.1\.bias is missing from .*features\.pth"):
        calibrate.backbone(f"mobilenet_v2={tmp_path / 'features.pth'}")


def test_networks_of_timm_see_what_a_box_holds(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("test_vit").eval()
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    regions = calibrate.backbone(f"timm/test_vit={tmp_path / 'vit.safetensors'}")
    picture = torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8)
    vectors = regions(picture, torch.tensor([[0.0, 0, 160, 160], [0, 0, 80, 80]]))
    net.reset_classifier(0)
    with torch.no_grad():
        expected = net(regions.normalisation(picture[None]))
    torch.testing.assert_close(vectors[:1], expected, rtol=1e-3, atol=1e-3)
    assert (vectors[0] - vectors[1]).abs().max() > 0.1


def test_bad_choices_are_named(tmp_path):
    for choice, words in (
        ("resnet1001", "torchvision has no classifier 'resnet1001'"),
        ("vit_h_14", "was not trained on ImageNet alone"),
        (f"resnet18={tmp_path}/none.pth", r"none\.pth: no such weights file"),
    ):
        with pytest.raises(InputError, match=words):
            calibrate.backbone(choice)


# ---------------------------------------------------------------------------------------------------- in runs, in use
@pytest.fixture(scope="module")
def resnet18(tmp_path_factory) -> str:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    return f"resnet18={file}"


@pytest.fixture(scope="module")
def run(tmp_path_factory, resnet18) -> Path:
    """A run of a few steps, with its base model."""
    folder = tmp_path_factory.mktemp("run")
    run_here("defrcn", f"{QUICK['defrcn']} --out {folder} --calibrate {resnet18}")
    return folder


@pytest.fixture(scope="module")
def finding(run, tmp_path_factory) -> Path:
    """Its model with a random classifier, which finds something of many classes; what it keeps of
    shots is there.
    """
    state, about = weights.load(run / "1shot-seed0" / "model.safetensors")
    torch.manual_seed(0)
    nn.init.normal_(state["cls.weight"], std=0.4)
    nn.init.zeros_(state["cls.bias"])
    file = tmp_path_factory.mktemp("finding") / "model.safetensors"
    weights.save_state(file, state, about)
    return file


def test_a_run_has_results_with_and_without(run, resnet18):
    assert "calibrated" not in json.loads((run / "base" / "metrics.json").read_text())
    result = json.loads((run / "1shot-seed0" / "metrics.json").read_text())
    assert set(result["calibrated"]["AP50"]) == set(result["AP50"]) == {"base", "novel", "all"}
    assert (
        result["calibrated"]["AP50"]["base"] == result["AP50"]["base"]
    )  # base classes keep their scores
    kept = weights.describe_file(run / "1shot-seed0" / "model.safetensors")["calibration"]
    assert list(kept["prototypes"]) == [f"glyph-{i}" for i in range(15, 20)]
    shots = json.loads((run / "1shot-seed0" / "shots.json").read_text())
    regions, pictures = (
        calibrate.backbone(resnet18),
        detection.open_detection("glyphs", "", part="train"),
    )
    ids = [record.id for record in pictures.records]
    for shot in shots["pictures"]:  # of one shot a class's prototype is that shot's vector
        for name, xyxy in zip(shot["classes"], shot["boxes"]):
            if name in kept["prototypes"]:
                vector = regions(pictures.image(ids.index(shot["id"])), torch.tensor([xyxy]))[0]
                assert torch.allclose(vector, torch.tensor(kept["prototypes"][name]), atol=1e-4)


def test_a_saved_model_is_calibrated_again(run, resnet18):
    before = (run / "1shot-seed0" / "model.safetensors").read_bytes()
    run_here("defrcn", f"--test-only --shots 1 --test-images 12 --calibrate {resnet18} --out {run}")
    (path,) = [p for p in (run / "1shot-seed0").glob("test-*.json") if p.stem.count("-") == 1]
    again, first = (
        json.loads(path.read_text()),
        json.loads((run / "1shot-seed0" / "metrics.json").read_text()),
    )
    assert again["calibrated"] == first["calibrated"] and again["AP50"] == first["AP50"]
    assert (run / "1shot-seed0" / "model.safetensors").read_bytes() == before


def test_load_and_predict_calibrate(finding, resnet18):
    model = fewshot.load(finding)
    scene = detection.open_detection("glyphs", "", part="test").image(0)
    plain = model.predict(scene)
    model.calibrate()
    found = model.predict(scene, score_above=-1)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    novel = set(model.about["novel"])
    old = {
        (name, tuple(b)): s
        for name, b, s in zip(plain.names, plain.boxes.tolist(), plain.scores.tolist())
    }
    new = {
        (name, tuple(b)): s
        for name, b, s in zip(found.names, found.boxes.tolist(), found.scores.tolist())
    }
    found_names = {name for name, _ in old}
    assert old.keys() == new.keys() and found_names & novel and found_names - novel
    regions, vectors = calibrate.backbone(resnet18), model.about["calibration"]["prototypes"]
    for name, b in old:
        wanted = old[name, b]
        if name in novel:
            cosine = F.cosine_similarity(
                regions(scene, torch.tensor([b])), torch.tensor([vectors[name]])
            )
            wanted = (wanted + cosine.item()) / 2
        assert new[name, b] == pytest.approx(wanted, abs=1e-4)


def test_without_supports_or_with_another_network_it_says_so(run, resnet18, tmp_path):
    with pytest.raises(
        InputError, match="this defrcn has no supports to calibrate by: fine-tune with --calibrate"
    ):
        fewshot.load(run / "base").calibrate()
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=r"this defrcn has prototypes of resnet18=.*other\.pth is another network"
    ):
        fewshot.load(run / "1shot-seed0").calibrate(f"resnet18={tmp_path / 'other.pth'}")
    for flags, words in (
        (f"--stage base --calibrate {resnet18}", "leave it out of base training"),
        ("--calibrate resnet19", "torchvision has no classifier 'resnet19'"),
    ):
        with pytest.raises(SystemExit, match=words):
            run_here("defrcn", f"{QUICK['defrcn']} --out {tmp_path / 'run'} {flags}")


def test_predict_calibrates(finding, resnet18, tmp_path, monkeypatch):
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    import predict

    torchvision.io.write_png(
        detection.open_detection("glyphs", "", part="test").image(0), str(tmp_path / "scene.png")
    )
    scores = {}
    for name, choice in (("plain", None), ("calibrated", resnet18)):
        args = predict.Args(
            str(finding), (tmp_path / "scene.png",), out=tmp_path / name, score_above=0.05
        )
        args.calibrate, args.device = choice, "cpu"
        predict.main(args)
        (picture,) = json.loads((tmp_path / name / "predictions.json").read_text())
        scores[name] = [(o["score"], o["class"]) for o in picture["objects"]]
    assert scores["plain"] and scores["plain"] != scores["calibrated"]
    assert sorted(s for s in scores["plain"] if s[1] < "glyph-15") == sorted(
        s for s in scores["calibrated"] if s[1] < "glyph-15"
    )
