"""Detectors of one's own objects: other data's base models, any number of shots, several seeds,
fewer proposals.
"""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import coco_format
import numpy as np
import pytest
import torch
from runs import QUICK, metrics, results_of_tests, run_here
from safetensors.torch import load_file
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import fewshot
from fewshot import weights
from fewshot.convert import torchvision as torchvision_base
from fewshot.data import detection
from fewshot.data.pipeline import Pipeline
from fewshot.training import stages

OWN = ("jug", "kettle", "tea pot")  # what the glyphs of three novel classes are called here


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A folder in COCO's format: a dozen pictures to train on, six to test on, of objects that no
    base model knows.
    """
    folder = tmp_path_factory.mktemp("data") / "my_objects"
    for part, most in (("train", 12), ("test", 6)):
        glyphs = detection.open_detection("glyphs", "", part=part).restrict(
            [f"glyph-{i}" for i in (15, 16, 17)]
        )
        records = [record for record in glyphs.records if len(record.labels)][:most]
        coco_format.write(replace(glyphs, classes=list(OWN), novel=[], records=records), folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """A folder of base models of other data, the embedded glyphs."""
    folder = tmp_path_factory.mktemp("bases")
    for recipe in ("tfa", "meta_rcnn"):
        run_here(recipe, f"{QUICK[recipe]} --stage base --out {folder / recipe}")
    return folder


def base_of(recipe: str, bases: Path) -> Path:
    return bases / {"fsce": "tfa"}.get(recipe, recipe) / "base"


@pytest.mark.parametrize("recipe", ["tfa", "fsce", "meta_rcnn"])
def test_a_foreign_base_learns_own_objects(recipe, own, bases, tmp_path, capsys):
    flags = f"--dataset {own} --base {base_of(recipe, bases)} --iters 2 --shots 3 --rois 16"
    run_here(recipe, f"{flags} --seeds 0 1 --out {tmp_path}")
    said = capsys.readouterr().out
    assert (
        "AP50 novel: " in said
        and "over 2 seeds" in said
        and "objects of 3 classes; 2 steps" in said
    )
    for seed in (0, 1):
        folder = tmp_path / f"3shot-seed{seed}"
        assert set(metrics(folder)["AP50"]) == {"novel", "all"}
        assert weights.describe_file(folder / "model.safetensors")["classes"] == list(OWN)
        run_of = metrics(folder)["settings"]["run"]
        assert run_of["base"] == weights.digest(base_of(recipe, bases))
        assert metrics(folder)["settings"]["seed"] == seed and run_of["seconds"] > 0
    assert not (tmp_path / "base").exists()
    # alone, a seed gives what it gave among others
    run_here(recipe, f"{flags} --seed 1 --out {tmp_path / 'alone'}")
    alone, among = (metrics(f / "3shot-seed1")["AP50"] for f in (tmp_path / "alone", tmp_path))
    assert alone == among
    model = fewshot.load(tmp_path / "3shot-seed0")
    pictures = sorted((own / "images").glob("*.png"))[:3]
    together, single = model.predict(pictures), [model.predict(picture) for picture in pictures]
    for a, b in zip(together, single):
        assert a.names == b.names and torch.allclose(a.boxes, b.boxes, atol=1e-3)


@pytest.mark.parametrize("recipe", ["tfa", "fsce"])
def test_torchvisions_detector_is_a_base(recipe, own, tmp_path, monkeypatch):
    """`--base coco_mobile` with random weights in place of the download."""
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=91
    )
    base = torchvision_base.converted(model.state_dict(), torchvision_base.categories())
    monkeypatch.setattr(torchvision_base, "coco", {"mobilenet_v3_large": base}.get)
    flags = f"--dataset {own} --base coco_mobile --shots 2 --iters 1 --batch-size 2 --rois 16 --test-images 2"
    run_here(recipe, f"{flags} --out {tmp_path}")
    about = weights.describe_file(tmp_path / "2shot-seed0" / "model.safetensors")
    assert about["classes"] == list(OWN) and about["sizes"]["convention"] == "torchvision"
    assert metrics(tmp_path / "2shot-seed0")["settings"]["run"]["base"] == "coco_mobile"
    fewshot.load(tmp_path / "2shot-seed0").predict(sorted((own / "images").glob("*.png"))[0])
    for other, reason in (
        ("meta_rcnn", "with which meta_rcnn cannot go on"),
        ("mpsr", "needs a pyramid of strides"),
    ):
        with pytest.raises(SystemExit, match=reason):
            run_here(other, f"{flags} --out {tmp_path / other}")


def test_mpsr_goes_on_with_tfas_base(own, bases, tmp_path):
    flags = f"--dataset {own} --base {bases / 'tfa' / 'base'} --shots 2 --iters 1 --batch-size 2 --test-images 2"
    run_here("mpsr", f"{flags} --out {tmp_path}")
    tuned, base = (
        load_file(f / "model.safetensors")
        for f in (tmp_path / "2shot-seed0", bases / "tfa" / "base")
    )
    assert tuned.keys() >= {name for name in base if name.startswith("trunk.")}


def test_any_number_of_shots(own, bases, tmp_path, capsys):
    flags = f"--dataset {own} --base {bases / 'tfa' / 'base'} --iters 1 --out {tmp_path}"
    run_here("tfa", f"{flags} --shots all")
    every = json.loads((tmp_path / "allshot-seed0" / "shots.json").read_text())
    train = json.loads((own / "train.json").read_text())
    assert sum(len(p["boxes"]) for p in every["pictures"]) == len(train["annotations"])
    run_here("tfa", f"{flags} --shots 400")
    assert "400" in capsys.readouterr().out  # says that there are fewer
    assert (
        json.loads((tmp_path / "400shot-seed0" / "shots.json").read_text())["pictures"]
        == every["pictures"]
    )
    with pytest.raises(SystemExit, match="--shots"):
        run_here("tfa", f"{flags} --shots 0")


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("tfa", "--base {meta_rcnn}", "is a model of meta_rcnn, with which tfa cannot go on"),
        ("meta_rcnn", "--base {tfa}", "is a model of tfa, with which meta_rcnn cannot go on"),
        ("tfa", "--base {tfa} --keep-base", "of which your data have no 'glyph-00'"),
        ("tfa", "--base {tfa} --backbone resnet50", "has the trunk small, not resnet50"),
        ("tfa", "--base {tfa} --novel-classes cup", "no object of a class 'cup' to be novel"),
        ("tfa", "--base nowhere/model.safetensors", "no such model file"),
        ("tfa", "--base {tfa} --test-proposals 0", "must be one or more"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(recipe, flags, message, own, bases, tmp_path):
    places = {name: bases / name / "base" for name in ("tfa", "meta_rcnn")}
    with pytest.raises(SystemExit, match=message) as error:
        run_here(
            recipe,
            f"--dataset {own} --iters 1 --shots 1 --out {tmp_path / 'out'} {flags.format(**places)}",
        )
    assert str(error.value).count("\n") == 0
    if "proposals" not in flags:
        assert not (tmp_path / "out").exists() or not list(
            (tmp_path / "out").rglob("*.safetensors")
        )


def test_a_base_that_has_seen_the_novel_classes_is_refused(bases, tmp_path):
    flags = f"{QUICK['tfa']} --base {bases / 'tfa' / 'base'} --split 2 --out {tmp_path}"
    with pytest.raises(SystemExit, match="was trained on glyph-10, which is novel here"):
        run_here("tfa", flags)


def test_fewer_proposals_for_a_test(bases, tmp_path):
    folder = tmp_path / "model"
    subprocess.run(["cp", "-r", str(bases / "tfa" / "base"), str(folder)], check=True)
    before = (folder / "model.safetensors").read_bytes()
    for number in (5, 50):
        command = (
            f"--stage base --test-only --test-images 4 --test-proposals {number} --out {tmp_path}"
        )
        (tmp_path / "base").exists() or folder.rename(tmp_path / "base")
        run_here("tfa", command)
    numbers = {
        r["protocol"]["test_proposals"]: r["settings"]["run"]
        for r in results_of_tests(tmp_path / "base")
    }
    assert set(numbers) == {5, 50} and all(
        took["pictures_per_second"] > 0 for took in numbers.values()
    )
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    model = fewshot.load(tmp_path / "base")
    picture = np.asarray(
        detection.open_detection("glyphs", "", part="test").image(0).permute(1, 2, 0)
    )
    propose, counts = model.network.rpn.propose, []
    model.network.rpn.propose = lambda *inputs: [
        counts.append(len(found)) or found for found in propose(*inputs)
    ]
    for number in (1, 5, None):
        model.predict(picture, test_proposals=number)
    assert counts[:2] == [1, 5] and 5 < counts[2] <= 100
    assert model.network.rpn.test_proposals == (500, 100)  # the model's own number is as it was
    with pytest.raises(fewshot.InputError, match="test_proposals is 0"):
        model.predict(picture, test_proposals=0)


def test_own_pictures_are_never_enlarged_and_get_fitting_proposals():
    keeps, enlarges = Pipeline(800, 1333, enlarge=False), Pipeline(800, 1333)
    assert keeps.resized(200, 300) == (200, 300) and enlarges.resized(200, 300) == (800, 1200)
    assert keeps.resized(1600, 2000) == enlarges.resized(1600, 2000) == (800, 1000)
    assert Pipeline(**keeps.describe()) == keeps
    image = torch.zeros(3, 200, 300, dtype=torch.uint8)
    assert keeps.resize(image, 800)[0].shape == image.shape
    glyphs = detection.open_detection("glyphs", "", part="test")
    large = glyphs.with_records([replace(r, width=1333, height=800) for r in glyphs.records[:3]])
    assert stages.fitting_proposals(keeps, glyphs) == (1000, 300)
    assert stages.fitting_proposals(keeps, large) == (1000, 1000)
    half = glyphs.with_records([replace(r, width=1333, height=400) for r in glyphs.records[:3]])
    assert stages.fitting_proposals(keeps, half) == (1000, 500)
