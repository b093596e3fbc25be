"""Trained models in use: supports, predictions, pictures of any kind, the hub's files, exports, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_recipes import QUICK, run_here

import fewshot
from fewshot import InputError, heads, inference, run, task_heads, weights
from fewshot.data import detection
from fewshot.data.classification import open_dataset
from fewshot.data.glyphs import glyph

ROOT = Path(__file__).parents[1]
NAMES = ["house", "tree", "star"]  # of classes that no recipe trains on


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A quickly trained model of every kind that is used below."""
    folder = tmp_path_factory.mktemp("runs")
    for recipe in ("proto_net", "baseline", "meta_baseline", "matching_net"):
        run_here(recipe, f"{QUICK[recipe]} --out {folder / recipe}")
    for recipe in ("tfa", "meta_rcnn", "attention_rpn"):
        run_here(recipe, f"{QUICK[recipe]} --stage base --out {folder / recipe}")
    return {path.name: path / "base" if (path / "base").exists() else path for path in folder.iterdir()}


def pictures(n: int, first: int = 0) -> list[np.ndarray]:
    """n pictures of each of the three classes, class by class."""
    return [glyph(1000 + c, 0, i) for c in range(3) for i in range(first, first + n)]


def scenes(n: int) -> list[torch.Tensor]:
    dataset = detection.open_detection("glyphs", "", part="test")
    return [dataset.image(i) for i in range(n)]


@pytest.mark.parametrize("method", ["proto_net", "meta_baseline", "matching_net", "baseline"])
def test_classifiers_learn_classes_from_supports(method, runs):
    model = fewshot.load(runs[method])
    labels = [name for name in NAMES for _ in range(3)]
    model.support(pictures(3), labels)
    guesses = model.predict(pictures(4, first=3))
    assert model.classes == NAMES and len(guesses) == 12
    for guess in guesses:
        assert sum(guess.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert guess.probability == max(guess.probabilities.values()) == guess.probabilities[guess.name]
    # as the recipe's own test computes it, from equal features
    x = [model.extracted(model.transformed([inference.decoded(p) for p in pictures(*a)], None)) for a in ((3,), (4, 3))]
    args = model.about["args"]
    support, query = x[0][None], x[1][None]
    with torch.random.fork_rng():
        torch.manual_seed(run.mix(0, *support.shape[1:]))
        expected = {
            "proto_net": lambda: heads.prototype(support, query, 3),
            "matching_net": lambda: heads.matching(support, query, 3, args["temperature"]),
            "meta_baseline": lambda: model.head(support, query, 3),
            "baseline": lambda: task_heads.linear(support, query, 3, steps=600),
        }[method]()[0].softmax(1)
    given = torch.tensor([list(guess.probabilities.values()) for guess in guesses])
    assert torch.allclose(given, expected, atol=1e-5)
    assert model.predict(pictures(1, first=3))[0].probabilities == pytest.approx(guesses[0].probabilities, abs=1e-5)


def test_pictures_come_in_any_form(runs, tmp_path):
    model = fewshot.load(runs["proto_net"])
    model.support(pictures(2), [name for name in NAMES for _ in range(2)])
    array = pictures(1)[1]
    Image.fromarray(array).save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array]
    forms.append(torch.from_numpy(array).permute(2, 0, 1))
    one = model.predict(forms[0])
    assert isinstance(one, inference.Guess)
    assert [model.predict(form) for form in forms] == [one] * 5 and model.predict(forms)[4].name == one.name
    assert model.predict([]) == []
    dataset = open_dataset("glyphs", "", "test")  # and as the recipe's test sees them
    (x,) = model.transformed([dataset.pixels(7)], None)
    assert torch.equal(x, dataset.normalisation(dataset.pixels(7)))


def test_classes_may_have_different_numbers_of_supports(runs):
    three, unequal = pictures(3), pictures(3)[:-2]  # the last class has one
    labels = ["a"] * 3 + ["b"] * 3 + ["c"]
    query = pictures(2, first=5)
    model = fewshot.load(runs["proto_net"])
    model.support(unequal, labels)
    means = model.extracted(model.transformed([inference.decoded(p) for p in three], None)).view(3, 3, -1)
    prototypes = torch.stack([means[0].mean(0), means[1].mean(0), means[2, 0]])
    found = model.extracted(model.transformed([inference.decoded(p) for p in query], None))
    expected = (-torch.cdist(found, prototypes).square()).softmax(1)
    given = torch.tensor([list(g.probabilities.values()) for g in model.predict(query)])
    assert torch.allclose(given, expected, atol=1e-4)
    for method in ("matching_net", "baseline"):
        model = fewshot.load(runs[method])
        model.support(unequal, labels)
        assert {guess.name for guess in model.predict(query)} <= {"a", "b", "c"}
        if method == "matching_net":
            model.support(unequal[:2] * 2 + unequal[2:], ["a"] * 5 + ["b"] * 3 + ["c"])  # a support twice is no other
            assert len(model.predict(query)) == 6


def test_detectors(runs):
    tfa = fewshot.load(runs["tfa"])
    images = scenes(2)
    found = tfa.predict(images)
    assert len(found) == 2 and all(len(f.boxes) == len(f.scores) == len(f.names) for f in found)
    with pytest.raises(InputError, match=r"tfa has no supports: fine-tune it .* recipes/tfa\.py"):
        tfa.support(images, None, ["a", "b"])
    meta = fewshot.load(runs["meta_rcnn"])
    assert meta.predict(images[0]).boxes.shape[1] == 4  # the file holds prototypes
    with pytest.raises(InputError, match="not trained for 'house' but for glyph-00"):
        meta.support(images, None, ["house", "glyph-01"])
    meta.support(images, [(10, 10, 60, 70), (0, 0, 160, 160)], ["glyph-03", "glyph-05"])
    assert meta.network.known.nonzero()[:, 0].tolist() == [3, 5]
    assert set(meta.predict(images[0]).names) <= {"glyph-03", "glyph-05"} | set(meta.classes)


def test_attention_rpn_takes_classes_that_nobody_trained(runs):
    model = fewshot.load(runs["attention_rpn"])
    images = scenes(3)
    model.support(images[:2], [(10, 10, 60, 70), (20, 20, 90, 80)], ["house", "tree"])
    found = model.predict(images, score_above=0.3)
    assert model.classes == ["house", "tree"] and {name for f in found for name in f.names} <= {"house", "tree"}
    shared = model.predict(images[0], share_proposals=True)
    assert shared.boxes.shape[1] == 4
    large = torch.nn.functional.interpolate(images[2][None].float(), scale_factor=2).to(torch.uint8)[0]
    model.pipeline = detection.Pipeline(short=160)  # resized back to what it was, boxes are those of the larger picture
    again = model.predict(large)
    assert torch.allclose(again.boxes, 2 * model.predict(images[2]).boxes, atol=3.0) or len(again.boxes) == 0
    assert model.show(images[:2]).axes and model.show(images[0]).axes


def test_saved_and_loaded_again(runs, tmp_path, monkeypatch):
    """What push_to_hub uploads, without a hub: the file, and a card with the results."""
    model = fewshot.load(runs["proto_net"])
    model.save_pretrained(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    result = json.loads((runs["proto_net"] / "metrics.json").read_text())["shots"]["5"]
    assert f"{result['accuracy']:.2f} ± {result['ci95']:.2f} %" in card and "proto_net on glyphs" in card
    again = inference.Classifier.from_pretrained(tmp_path / "m")
    assert again.method == "proto_net" and again.about == model.about
    uploaded = {}
    api = "huggingface_hub.hub_mixin.HfApi"
    monkeypatch.setattr(f"{api}.create_repo", lambda self, repo_id, **more: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(
        f"{api}.upload_folder",
        lambda self, **more: uploaded.update(
            {p.name: p.read_text(errors="ignore") for p in more["folder_path"].iterdir()}
        ),
    )
    fewshot.load(runs["tfa"]).push_to_hub("me/glyph-detector")
    assert set(uploaded) >= {"model.safetensors", "README.md"}
    assert 'fewshot.load("me/glyph-detector")' in uploaded["README.md"] and "| AP50 | base" in uploaded["README.md"]


def test_exports_equal_the_model(runs, tmp_path):
    model = fewshot.load(runs["proto_net"])
    model.support(pictures(2), [name for name in NAMES for _ in range(2)])
    images = model.transformed([inference.decoded(p) for p in pictures(2, first=4)], None)
    box_head = fewshot.load(runs["meta_rcnn"])
    vectors = torch.randn(9, box_head.network.prototypes.shape[1])
    meta = fewshot.load(runs["meta_baseline"])
    meta.support(pictures(2), [name for name in NAMES for _ in range(2)])
    cases = [
        (model.exportable(), images, [model.classify(model.extracted(images))]),
        (meta.exportable(), images, [meta.classify(meta.extracted(images))]),
        (box_head.exportable(), vectors, list(box_head.network.classify(vectors))),
    ]
    for module, example, expected in cases:
        batch = torch.export.Dim("batch", min=2, max=1000)
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "m.pt2")
        loaded = torch.export.load(tmp_path / "m.pt2").module()
        for some in (example, example[:4]):  # another batch than the example
            given = loaded(some)
            for ours, wanted in zip(given if isinstance(given, tuple) else [given], expected):
                assert torch.allclose(ours, wanted[: len(some)], atol=1e-4)
    with pytest.raises(InputError, match="tfa has no box head"):
        fewshot.load(runs["tfa"]).exportable()
    with pytest.raises(InputError, match="baseline does not classify by prototypes"):
        fewshot.load(runs["baseline"]).exportable()


def test_bad_input_is_named(runs, tmp_path, monkeypatch):
    model = fewshot.load(runs["proto_net"])
    with pytest.raises(InputError, match="no supports yet"):
        model.predict(pictures(1))
    with pytest.raises(InputError, match="no supports: give"):
        model.support([], [])
    with pytest.raises(InputError, match="3 pictures and 2 labels"):
        model.support(pictures(1), ["a", "b"])
    with pytest.raises(InputError, match="bytes in RGB"):
        model.support(np.zeros((32, 32), np.uint8)[None] * 0.5, ["a"])
    with pytest.raises(InputError, match="leave it out"):
        model.support(pictures(1), NAMES, size="large")
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(InputError, match=r"bad\.png: not a readable picture"):
        model.support([tmp_path / "bad.png"], ["a"])
    model.support(pictures(1), NAMES)
    before = model.predict(pictures(1, first=4))
    with pytest.raises(InputError):
        model.support(pictures(1), ["a", "b"])
    assert model.classes == NAMES and model.predict(pictures(1, first=4)) == before  # what was known stays
    detector = fewshot.load(runs["attention_rpn"])
    for box in ((10, 10, 200, 50), (-1, 0, 5, 5), (30, 30, 20, 40)):
        with pytest.raises(InputError, match="of support 0 is not inside its picture of 160 x 160"):
            detector.support(scenes(1), [box], ["a"])
    with pytest.raises(InputError, match="one set of proposals anyway"):
        fewshot.load(runs["tfa"]).predict(scenes(1), share_proposals=True)

    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        fewshot.load(tmp_path)
    with pytest.raises(InputError, match="no such model file"):
        fewshot.load(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"x\.safetensors: not a model file"):
        fewshot.load(tmp_path / "x.safetensors")
    weights.save(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), {"method": "mine"})
    with pytest.raises(InputError, match="a model of 'mine'"):
        fewshot.load(tmp_path / "x.safetensors")
    monkeypatch.setattr(weights, "FORMAT", 2)
    weights.save(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), {"method": "proto_net"})
    monkeypatch.setattr(weights, "FORMAT", 1)
    with pytest.raises(InputError, match="written by a newer version"):
        fewshot.load(tmp_path / "x.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"someone/something: no such local file.*works without network"):
        fewshot.load("someone/something")


def predict(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "predict.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_predict_script_classifies(runs, tmp_path):
    for i, array in enumerate(pictures(2)):
        place = tmp_path / "support" / NAMES[i // 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(place / f"{i}.png")
    (tmp_path / "new").mkdir()
    for i, array in enumerate(pictures(1, first=5)):
        Image.fromarray(array).save(tmp_path / "new" / f"{i}.png")
    (tmp_path / "support" / "tree" / "broken.jpg").write_text("no picture")
    flags = ("--support", tmp_path / "support", "--query", tmp_path / "new", "--out", tmp_path / "out")
    done = predict(runs["proto_net"], *flags)
    assert done.returncode == 0, done.stderr
    assert (
        "warning: left out" in done.stderr and "broken.jpg" in done.stderr and "house 2, star 2, tree 2" in done.stdout
    )
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(r["picture"]).name for r in results] == ["0.png", "1.png", "2.png"]
    assert all(set(r["probabilities"]) == set(NAMES) for r in results)
    assert Image.open(tmp_path / "out" / "sheet.png").width > 128

    for path in (tmp_path / "support" / "tree").glob("*.png"):
        path.unlink()
    done = predict(runs["proto_net"], *flags[:4], "--out", tmp_path / "none")
    assert done.returncode == 1 and "error: no picture of class tree can be read" in done.stderr
    (tmp_path / "support" / "tree" / "broken.jpg").unlink()
    done = predict(runs["proto_net"], *flags[:4], "--out", tmp_path / "none")
    assert done.returncode == 1 and "tree holds no picture" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()


def test_predict_script_detects(runs, tmp_path):
    images = scenes(3)
    for name, image in zip(("house", "tree"), images):
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "support" / name / f"{name}.png")
    xml = "<annotation><object><name>house</name><bndbox>{}</bndbox></object></annotation>"
    corners = "<xmin>11</xmin><ymin>21</ymin><xmax>60</xmax><ymax>80</ymax>"
    (tmp_path / "support" / "house" / "house.xml").write_text(xml.format(corners))
    listed = {"images": [{"id": 1, "file_name": "tree.png", "width": 160, "height": 160}]}
    listed |= {"categories": [{"id": 4, "name": "tree"}]}
    listed |= {"annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [5, 6, 50, 60]}]}
    (tmp_path / "support" / "boxes.json").write_text(json.dumps(listed))
    Image.fromarray(images[2].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    flags = ("--support", tmp_path / "support", "--query", tmp_path / "photo.png", "--out", tmp_path / "out")
    done = predict(runs["attention_rpn"], *flags, "--score-above", "0.06")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    model = fewshot.load(runs["attention_rpn"])
    model.support(images[:2], [(10, 20, 60, 80), (5, 6, 55, 66)], ["house", "tree"])
    expected = model.predict(images[2], score_above=0.06)
    assert [o["class"] for o in result["objects"]] == expected.names
    assert np.allclose([o["box"] for o in result["objects"]], expected.boxes.numpy().reshape(-1, 4), atol=0.01)
    assert (tmp_path / "out" / "photo.png").exists()
    done = predict(runs["attention_rpn"], "--query", tmp_path / "nowhere")
    assert done.returncode == 1 and "nowhere: no such picture or folder" in done.stderr


def test_results_are_in_the_file(runs):
    about = weights.load(runs["meta_rcnn"] / "model.safetensors")[1]
    assert about["results"]["AP50"].keys() == {"base", "all"} and "per_class" not in about["results"]
    assert about["pictures"] == {"short": None, "long": None, "multiple": 1} and about["step"] == 6
    assert load_file(runs["meta_rcnn"] / "model.safetensors")["known"].all()
