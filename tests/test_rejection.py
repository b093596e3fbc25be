""" "None of these": pictures of classes that no support shows are rejected, by a threshold that the
supports give.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_scripts import load as load_script
from torch import Tensor, nn

import fewshot
from fewshot import InputError, heads, methods, weights
from fewshot.data.classification import open_dataset
from fewshot.data.glyphs import glyph
from fewshot.inference import Classifier

predict = load_script("predict")
ABOUT = open_dataset("glyphs", "", "train").describe()


class Strokes(nn.Module):
    """Classifies by histograms of the strokes' directions: made by hand, so that nothing need be
    trained.
    """

    def features(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(images.mean(1, keepdim=True), 3, 1, 1)
        across, down = (
            F.pad(x[..., 2:] - x[..., :-2], (1, 1)),
            F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1)),
        )
        direction = (torch.atan2(down, across) % torch.pi / torch.pi * 6).long().clamp(max=5)
        strength = (across.square() + down.square()).sqrt()
        histogram = torch.zeros(len(x), 6, *x.shape[2:]).scatter_(1, direction, strength)
        histogram = F.adaptive_avg_pool2d(histogram, 4).flatten(1).sqrt()
        return histogram - histogram.mean(1, keepdim=True)

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return 20 * heads.cosines(query, heads.class_means(support, ways))


def strokes() -> Classifier:
    return Classifier(Strokes(), {}, {"method": "strokes", "args": {}, **ABOUT})


def pictures(classes: range, numbers: range) -> list[np.ndarray]:
    """Pictures of glyphs, class by class."""
    return [glyph(5000 + number, 0, i) for number in classes for i in numbers]


def labels(classes: range, numbers: range) -> list[str]:
    return [f"glyph {number}" for number in classes for _ in numbers]


def test_unseen_classes_are_rejected_far_more_often():
    model, share = strokes(), {"own": [], "unseen": []}
    for first in range(0, 40, 5):  # eight tasks of five classes
        mine = range(first, first + 5)
        model.support(pictures(mine, range(10)), labels(mine, range(10)), reject=0.95)
        for name, classes in (("own", mine), ("unseen", range(100, 130))):
            guesses = model.predict(pictures(classes, range(10, 22) if name == "own" else range(2)))
            assert all(guess.rejected == (guess.distance > model.threshold) for guess in guesses)
            assert {guess.name for guess in guesses} <= set(model.classes)
            share[name].append(np.mean([guess.rejected for guess in guesses]))
    assert np.mean(share["own"]) < 0.12 and np.mean(share["unseen"]) > 0.45


def test_the_threshold_is_the_quantile_of_the_supports_left_out_one_by_one():
    model, mine = strokes(), range(3)
    images, names = pictures(mine, range(4)), labels(mine, range(4))
    model.support(images, names)
    assert model.threshold is None and model.predict(images)[0][3:] == (False, None)
    features = model.extracted(
        model.transformed([torch.from_numpy(x).permute(2, 0, 1) for x in images], None)
    )
    distances = []
    for i in range(len(images)):
        others = [j for j in range(len(images)) if names[j] == names[i] and j != i]
        distances.append(1 - F.cosine_similarity(features[i], features[others].mean(0), dim=0))
    wanted = torch.stack(distances)
    assert (
        model.calibrate(0.8)
        == pytest.approx(float(wanted.quantile(0.8)), abs=1e-5)
        == model.threshold
    )
    assert model.calibrate(1.0) == pytest.approx(float(wanted.max()), abs=1e-5)
    assert model.calibrate() == pytest.approx(float(wanted.quantile(0.95)), abs=1e-5)
    guess = model.predict(images[0])
    means = torch.stack([features[4 * i : 4 * i + 4].mean(0) for i in mine])
    assert guess.distance == pytest.approx(
        float((1 - F.cosine_similarity(features[0], means)).min()), abs=1e-5
    )

    # a class of one support has no others: the rest stand for it
    model.support(images[:5], names[:5], reject=1.0)
    assert model.threshold == pytest.approx(float(wanted[:4].max()), abs=1e-5)
    for every, reject, words in [
        (4, 0.95, "one of them at least needs two supports"),
        (1, 1.5, r"reject 1\.5: give the share"),
        (1, 0.0, r"reject 0\.0: give the share"),
    ]:
        before = model.classes, model.threshold
        with pytest.raises(InputError, match=words):
            model.support(images[::every], names[::every], reject=reject)
        assert (model.classes, model.threshold) == before  # what was known stays
    model.support(images, names)
    assert model.threshold is None  # of other supports
    with pytest.raises(InputError, match="no supports yet"):
        strokes().calibrate()


METHODS = (
    "baseline neg_margin proto_net matching_net relation_net meta_baseline maml feat frn".split()
)


def saved(method: str, folder: Path) -> Path:
    """A model as its recipe saves it, untrained."""
    torch.manual_seed(0)
    args = {
        "backbone": "conv4",
        "distance": "scaled",
        "temperature": 100.0,
        "test_temperature": 5.0,
        "ways": 3,
        "test_steps": 1,
        "inner_lr": 0.1,
    }
    worked_out = {"temperature": 64.0} if method == "feat" else {}
    about = {"method": method, "args": args, **ABOUT, **worked_out}
    weights.save(folder / "model.safetensors", methods.built(about), about)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_features_rejects(method, tmp_path):
    model, mine = fewshot.load(saved(method, tmp_path)), range(3)
    images, names = pictures(mine, range(3)), labels(mine, range(3))
    if method == "maml":
        with pytest.raises(
            InputError, match=r"^maml adapts all of itself to a task: it has no features to reject"
        ):
            model.support(images, names, reject=0.95)
        return
    model.support(images, names, reject=0.95)
    guesses = model.predict([*images, np.zeros_like(images[0]), np.full_like(images[0], 255)])
    assert guesses[-2].distance > 0 and all(guess.distance >= 0 for guess in guesses)
    # supports are nearer to the means that they are part of than to those they were left out of
    assert sum(guess.rejected for guess in guesses[:-2]) <= 1
    assert model.show(images[:2]).axes[0].get_title() in ("", "none of these")


@pytest.fixture
def place(tmp_path) -> Path:
    """Supports and queries as files, and a model that is not trained."""
    mine = range(3)
    for i, (image, name) in enumerate(
        zip(pictures(mine, range(4)), labels(mine, range(4)), strict=True)
    ):
        (tmp_path / "known" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "known" / name / f"{i}.png")
    (tmp_path / "new").mkdir()
    for i, image in enumerate([*pictures(mine, range(4, 5)), np.full((32, 32, 3), 255, np.uint8)]):
        Image.fromarray(image).save(tmp_path / "new" / f"{i}.png")
    (tmp_path / "runs").mkdir()
    return tmp_path


def called(place: Path, method: str, **options) -> list[dict]:
    out = place / "out"
    model = (
        place / "runs"
        if (place / "runs" / "model.safetensors").exists()
        else saved(method, place / "runs")
    )
    args = {
        "query": (place / "new",),
        "support": place / "known",
        "out": out,
        "device": "cpu",
        **options,
    }
    predict.main(predict.Args(str(model), **args))
    return json.loads((out / "predictions.json").read_text())


def test_predictions_say_what_is_rejected(place, monkeypatch):
    shown = []
    captioned = predict.show.captioned
    monkeypatch.setattr(
        predict.show,
        "captioned",
        lambda images, text: shown.extend(text) or captioned(images, text),
    )
    results = called(place, "proto_net")
    assert [Path(result["picture"]).name for result in results] == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
    ]
    assert (
        results[3]["rejected"] and results[3]["distance"] > results[3]["threshold"]
    )  # a white sheet
    assert [text == "none of these" for text in shown] == [result["rejected"] for result in results]
    assert (place / "out" / "sheet.png").exists()
    few, many = (called(place, "proto_net", reject=share)[0]["threshold"] for share in (1.0, 0.5))
    assert few > results[0]["threshold"] > many


def test_what_cannot_be_rejected_is_said_in_one_line(place, capsys):
    assert "rejected" not in called(place, "maml")[0]
    assert "every picture is taken for one of these classes: maml adapts" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^maml adapts all of itself"):
        called(place, "maml", reject=0.9)
    (place / "runs" / "model.safetensors").unlink()
    for folder in (place / "known").iterdir():
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()
    assert "rejected" not in called(place, "proto_net")[0]
    assert "one of them at least needs two supports" in capsys.readouterr().out
    with pytest.raises(InputError, match="--reject is for classifiers and their --support"):
        called(place, "proto_net", reject=0.9, support=None)
    with pytest.raises(InputError, match="are for detectors: leave them out"):
        called(place, "proto_net", test_proposals=100)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400", "many", ""])
def test_a_box_that_is_not_a_number_is_named(tmp_path, number):
    corners = f"<xmin>1</xmin><ymin>{number}</ymin><xmax>20</xmax><ymax>30</ymax>"
    path = tmp_path / "a.xml"
    path.write_text(
        f"<annotation><object><name>cup</name><bndbox>{corners}</bndbox></object></annotation>"
    )
    with pytest.raises(InputError, match=r"a\.xml: not a VOC annotation"):
        predict.read_boxes(tmp_path, [tmp_path / "a.png"], [torch.zeros(3, 40, 40)], ["cup"])
