"""What users are told: a table of faults in files and commands, each with its one line.

Every line names the file or flag, says what is wrong and what to do; the program ends with status 1
and no traceback, and in the folder is what was there before. Faults of single layouts are in
tests/test_layouts.py and tests/test_check_data.py, those of own objects in
tests/test_own_objects.py, mutated files in tests/test_hostile.py.
"""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, run_here
from safetensors.torch import save_file

from fewshot import methods, weights


class Fault(NamedTuple):
    name: str
    prepare: Callable[[Path], object]  # puts the fault into a folder, from which the command is run
    command: str  # a recipe or script and its flags, as users give them
    named: str  # the file or flag that the line names
    wrong: str  # what it says of it
    advice: str  # what it says to do


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(path)


def nothing(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


def classes(folder: Path, novel: str | None = None, pictures: int = 20) -> None:
    """A folder of pictures in class folders, of 5 classes in each part; or undivided, with a file
    of novel classes.
    """
    for part in ("train", "val", "test"):
        for n in range(5):
            for i in range(pictures):
                picture(folder / "flowers" / ("" if novel else part) / f"{part}{n}" / f"{i}.png")
    if novel:
        write(folder / "novel.txt", novel)


def spoilt(
    name: str, content: str | bytes, make: Callable[[Path], object]
) -> Callable[[Path], object]:
    """Of a sound folder, one file with other content."""
    return lambda folder: (make(folder), write(folder / name, content))


def without(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: (make(folder), (folder / name).unlink())


def changed(
    name: str, old: str, new: str, make: Callable[[Path], object]
) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        make(folder)
        text = (folder / name).read_text()
        assert old in text
        write(folder / name, text.replace(old, new))

    return prepare


def coco(folder: Path) -> None:
    """Five pictures of a cup and a jug in COCO's format."""
    for n in range(5):
        picture(folder / "things" / "images" / f"{n}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 40} for n in range(5)]
    box = {"bbox": [2, 3, 20, 30], "area": 600, "iscrowd": 0}
    objects = [
        {"id": 2 * n + c, "image_id": n, "category_id": c, **box} for n in range(5) for c in (1, 2)
    ]
    names = [{"id": 1, "name": "cup"}, {"id": 2, "name": "jug"}]
    content = {"images": images, "annotations": objects, "categories": names}
    write(folder / "things" / "train.json", json.dumps(content))


def voc(folder: Path) -> None:
    for n in range(5):
        picture(folder / "things" / "JPEGImages" / f"{n}.png")
        box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>30</xmax><ymax>35</ymax></bndbox>"
        size = "<size><width>40</width><height>40</height></size>"
        text = f"<annotation>{size}<object><name>cup</name>{box}</object></annotation>"
        write(folder / "things" / "Annotations" / f"{n}.xml", text)


def yolo(folder: Path) -> None:
    for n in range(5):
        picture(folder / "things" / "images" / f"{n}.png")
        write(folder / "things" / "labels" / f"{n}.txt", "0 0.5 0.5 0.5 0.5\n")
    write(folder / "things" / "data.yaml", "path: .\ntrain: images\nnc: 1\nnames: [cup]\n")


def supports(folder: Path) -> None:
    """A classifier's file, and class folders for it."""
    model(folder)
    for name in ("a", "b"):
        picture(folder / "known" / name / "0.png")
    picture(folder / "new" / "0.png")


def model(folder: Path) -> None:
    about = {
        "method": "proto_net",
        "args": {"backbone": "conv4", "distance": "squared"},
        "classes": ["a", "b"],
    }
    about |= {"size": 32, "stored": 32, "augment": True, "dataset": "glyphs", "temperature": 64.0}
    about |= {"normalisation": {"mean": [120.0] * 3, "std": [60.0] * 3, "bgr": False}}
    weights.save(folder / "model.safetensors", methods.built(about), about)


def run(folder: Path) -> None:
    """What a finished run of proto_net leaves, but for the model."""
    args = {"method": "proto_net", "id": "0"}
    write(folder / "out" / "args.json", json.dumps(args))
    write(
        folder / "out" / "metrics.json",
        json.dumps({"ways": 5, "shots": {"5": {"accuracy": 50.0, "ci95": 1.0}}}),
    )


def tensors(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors")


def pickled(folder: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2)}}, folder / "model.pth")


P, T = "recipes/proto_net --out out", "recipes/tfa --out out"
OWN = f"{T} --dataset things --novel-classes cup"
FLOWERS = f"{P} --dataset flowers --train-ways 5"
SHUFFLE = f"{P} --backbone torchvision/shufflenet_v2_x0_5 --weights"
PREDICT = "scripts/predict model.safetensors"
XML = "things/Annotations/1.xml"
# fmt: off
FAULTS = [
    # classifiers: data
    Fault("no folder", nothing, FLOWERS, "data set 'flowers'", "must be one of glyphs", "or a folder of class folders"),
    Fault("no train part", lambda f: (classes(f), shutil.rmtree(f / "flowers" / "train")), FLOWERS,
          "flowers/train", "no such folder", "expected one folder of pictures per class in it"),
    Fault("few classes", classes, f"{P} --dataset flowers --train-ways 6",
          "--train-ways 6", "flowers train has 5 classes", "ask for fewer, or add classes"),
    Fault("few pictures", partial(classes, pictures=3), FLOWERS,
          "class val0 of flowers val", "has 3 pictures, --shots 5 and --queries 15 take 20", "or add pictures"),
    Fault("no picture", spoilt("flowers/train/train0/0.png", "x", classes), FLOWERS,
          "flowers/train/train0/0.png", "not readable as a picture", "replace or remove it"),
    Fault("novel classes of divided data", classes, f"{FLOWERS} --novel novel.txt",
          "novel.txt", "flowers is divided already", "leave --novel out"),
    Fault("unknown novel class", partial(classes, novel="rose\n"), f"{FLOWERS} --novel novel.txt",
          "novel.txt", "no class folder 'rose'", "the classes are test0"),
    Fault("novel classes, no json", spoilt("novel.json", "{", partial(classes, novel="x")),
          f"{FLOWERS} --novel novel.json", "novel.json", "not json", "correct it, or give a .txt"),
    Fault("no CUB", nothing, f"{P} --dataset cub", "data/CUB_200_2011/images", "no cub here", "prepare_data.py cub"),
    Fault("no mini-ImageNet", nothing, f"{P} --dataset mini_imagenet",
          "data/mini_imagenet/images", "no mini_imagenet here", "prepare_data.py mini_imagenet"),
    Fault("no tiered-ImageNet", nothing, f"{P} --dataset tiered_imagenet",
          "train_labels.pkl", "no tiered_imagenet here", "prepare_data.py tiered_imagenet"),
    Fault("Omniglot is no zip", spoilt("data/images_evaluation.zip", "x", lambda f: write(
          f / "data/images_background.zip", "x")), f"{P} --dataset omniglot",
          "data/images_background.zip", "not readable", "put it there again"),
    # classifiers: models, weights and runs
    Fault("no model to begin with", nothing, f"{P} --init there.safetensors",
          "there.safetensors", "no such model file", "train it first, or correct the path"),
    Fault("text for a model", lambda f: write(f / "there.safetensors", "hello"), f"{P} --init there.safetensors",
          "there.safetensors", "not a model file of this project", "give the model.safetensors of a run"),
    Fault("tensors for a model", tensors, f"{P} --init other.safetensors",
          "other.safetensors", "it does not describe itself", "give the model.safetensors of a run"),
    Fault("no backbone of torchvision's", nothing, f"{P} --backbone torchvision/resnet19",
          "'resnet19'", "torchvision has no network", "did you mean resnet18"),
    Fault("no backbone", nothing, f"{P} --backbone conv5", "'conv5'", "no backbone is called", "choose conv4"),
    Fault("no weights", nothing, f"{SHUFFLE} w.pth", "w.pth", "no such weights file", "correct the path"),
    Fault("text for weights", lambda f: write(f / "w.pth", "x"), f"{SHUFFLE} w.pth",
          "w.pth", "cannot be read as weights", "give a .safetensors or .pth file"),
    Fault("weights of another network", pickled, f"{SHUFFLE} model.pth",
          "model.pth", "a does not belong to this model", "was it made with another backbone"),
    Fault("weights of no ViT", pickled, f"{P} --backbone torchvision/vit_b_16 --size 32 --weights model.pth",
          "model.pth",
          "no position embeddings of torchvision/vit_b_16 ('encoder.pos_embedding')", "give weights of this ViT"),
    Fault("nothing to test", nothing, f"{P} --test-only", "out/model.safetensors", "no such model file", "train it"),
    Fault("resume and overwrite", nothing, f"{P} --resume --overwrite",
          "--resume", "goes on with a run, --overwrite begins it anew", "give one of them"),
    Fault("damaged arguments", spoilt("out/args.json", "{", run), P,
          "out/args.json", "cannot be read", "--overwrite begins anew"),
    Fault("another method's run", changed("out/args.json", "proto_net", "feat", run), P,
          "out is", "a run of feat, not of proto_net", "give another --out"),
    Fault("damaged result", spoilt("out/metrics.json", "{", run), P,
          "out/metrics.json", "cannot be read", "--overwrite begins anew"),
    Fault("result of another kind", spoilt("out/metrics.json", '{"AP50": [1]}', run), P,
          "out/metrics.json", "cannot be read", "--overwrite begins anew"),
    Fault("no frozen backbone", nothing, "recipes/tim --out out",
          "--init", "give a trained model", "or else a pretrained network"),
    # detectors: data
    Fault("no objects", nothing, OWN, "'things'", "no data set", "nor a folder or json here or in data"),
    Fault("two layouts", lambda f: (coco(f), voc(f)), OWN,
          "things", "laid out as coco and as voc", "choose by --layout coco"),
    Fault("COCO's format, no json", spoilt("things/train.json", "{", coco), OWN,
          "things/train.json", "not json", "make or unpack it again"),
    Fault("COCO's format, no picture", without("things/images/1.png", coco), OWN,
          "things/images/1.png", "annotated, but missing", "or take its annotation out of things/train.json"),
    Fault("COCO's format, no area", changed("things/train.json", "[2, 3, 20, 30]", "[2, 3, 0, 30]", coco), OWN,
          "things/train.json", "box [2, 3, 0, 30] has no area", "correct it or take it out"),
    Fault("VOC's format, no xml", spoilt(XML, "<a>", voc), OWN, XML, "not a VOC annotation", "correct it"),
    Fault("YOLO's format, no yaml", spoilt("things/data.yaml", "names: [", yolo), OWN,
          "things/data.yaml", "not yaml", "correct it"),
    Fault("YOLO's format, no box", spoilt("things/labels/1.txt", "0 1 1", yolo), OWN,
          "things/labels/1.txt", "line 1 is neither 'class x y width height' nor a polygon", "take it out"),
    Fault("no object of a novel class", coco, f"{T} --dataset things --novel-classes pan",
          "things", "no object of a class 'pan' to be novel", "its classes are cup, jug"),
    Fault("no VOC", nothing, f"{T} --dataset voc", "data: no VOC2007", "there is no such folder", "(--data-root)"),
    Fault("no COCO", nothing, f"{T} --dataset coco",
          "instances_train2017.json", "there is no such folder", "(--data-root)"),
    Fault("no CD-FSOD", nothing, f"{T} --dataset artaxor",
          "data/ArTaxOr/annotations", "no data", "unpack CD-FSOD's artaxor there"),
    # detectors: flags and models, told before a base model is trained
    Fault("no shots", nothing, f"{T} --shots 0", "--shots 0", "whole number of at least 1", "or all"),
    Fault("no file of shots", nothing, f"{T} --shot-lists lists.json",
          "lists.json", "is it there?", "--shot-lists takes a shots.json or a folder"),
    Fault("no base", coco, f"{OWN} --base b.safetensors",
          "b.safetensors", "no such model file or folder", "give a run's folder"),
    Fault("nothing proposes", nothing, "recipes/prototype_detector --out out",
          "--base", "nothing proposes regions", "give --base a detector's run"),
    Fault("no network to calibrate by", nothing, f"{T} --calibrate resnet19",
          "--calibrate resnet19", "torchvision has no classifier", "resnet101 is what was published"),
    # scripts
    Fault("predict, no model", nothing, "scripts/predict out --query a.png",
          "out", "no such model file or folder", "give a run's folder"),
    Fault("predict, no queries", supports, f"{PREDICT} --support known --query old",
          "old", "no such picture or folder", "correct --query"),
    Fault("predict, no folder of supports", supports, f"{PREDICT} --support unknown --query new",
          "unknown", "no such folder of supports", "correct --support"),
    Fault("predict, an empty class", lambda f: (supports(f), (f / "known" / "c").mkdir()),
          f"{PREDICT} --support known --query new", "known/c", "holds no picture", "add some, or remove the folder"),
    Fault("predict, a class without a readable picture", spoilt("known/a/0.png", "x", supports),
          f"{PREDICT} --support known --query new", "known/a/0.png", "not readable as a picture", "replace or remove"),
    Fault("predict, a classifier without supports", supports, f"{PREDICT} --query new",
          "model.safetensors", "knows no class without --support", "give a folder of them"),
    Fault("results, none", nothing, "scripts/results runs", "runs", "no finished run", "give a folder that a recipe"),
    Fault("results, a damaged one", lambda f: write(f / "runs" / "a" / "metrics.json", "{}"), "scripts/results runs",
          "runs/a/metrics.json", "not a result with its settings", "test its run again, or leave it out"),
    Fault("no checkpoint of DeFRCN's", pickled, "scripts/convert_defrcn model.pth --of voc1",
          "model.pth", "cls_score.weight is missing", "is it DeFRCN's"),
    Fault("no checkpoint at all", lambda f: write(f / "model.pth", "x"), "scripts/convert_defrcn model.pth --of voc1",
          "model.pth", "cannot be read as weights", "give a .safetensors or .pth file"),
    Fault("no detector of torchvision's", pickled, "scripts/convert_torchvision model.pth",
          "model.pth", "a in model.pth is no part of", "give a state dict of these"),
    Fault("names in no UTF-8", lambda f: (pickled(f), write(f / "n.txt", b"\xff")),
          "scripts/convert_torchvision model.pth --classes n.txt", "n.txt", "not text in UTF-8", "save it as that"),
    Fault("no checkpoint of mmfewshot's", nothing, "scripts/convert_mmfewshot model.pth",
          "model.pth", "no such checkpoint", "correct the path"),
    Fault("no data to draw shots of", nothing, "scripts/make_shots things",
          "'things'", "no data set", "nor a folder or json here"),
]
# fmt: on


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file but the locks of a run's folder, which tell other processes that somebody looks."""
    return {
        p: p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("lock", "lock.json")
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_told_in_a_line(fault, tmp_path, monkeypatch, capsys):
    fault.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    program, *flags = fault.command.split()
    with pytest.raises(SystemExit) as ended:
        if program.startswith("recipes"):
            run_here(Path(program).name, " ".join(flags))
        else:
            monkeypatch.setattr(sys, "argv", [program, *flags])
            runpy.run_path(str(ROOT / f"{program}.py"), run_name="__main__")
    line = ended.value.code  # text: Python prints it and ends with status 1
    assert isinstance(line, str) and line.startswith("error: ") and len(line.splitlines()) == 1
    for words in (fault.named, fault.wrong, fault.advice):
        assert words in line, line
    assert "Traceback" not in capsys.readouterr().err
    assert contents(tmp_path) == before
