"""scripts/check_data.py: every fault that was planted is named, none in a clean set; and what
recipes check quickly.
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import test_layouts
from PIL import Image
from test_layouts import NAMES, Picture, coco, divided, make_pictures, voc, write_xml, yolo

from fewshot import InputError
from fewshot.data import check, detection
from fewshot.data.detection import open_split

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_data.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """The script's exit status, and what it prints."""

    def run(*flags: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, flags)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return exit.value.code, capsys.readouterr().out

    return run


def replant(folder: Path, name: str, change) -> None:
    """Change an annotation, a dict, of train.json: the first one on the picture `name`."""
    path = folder / "train.json"
    content = json.loads(path.read_text())
    id = next(image["id"] for image in content["images"] if image["file_name"] == name)
    change(next(item for item in content["annotations"] if item["image_id"] == id))
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("write", [coco, voc, yolo])
def test_nothing_is_found_in_a_clean_set(write, run, tmp_path):
    pictures = make_pictures(20)
    write(pictures, divided(pictures, "train", "test"), tmp_path)
    status, text = run(tmp_path, "--shots", 3, "--novel-classes", "cup")
    assert status == 0 and text.endswith("\n0 errors, 0 warnings\n")
    lines = text.splitlines()
    assert (
        f"laid out as {write.__name__.upper()}" in lines[0]
        and "air plane" in lines[1]
        and len(lines) == 4
    )
    split = open_split(str(tmp_path), "", novel=["cup"])
    assert check.quick(split, 3) == check.quick(split, "all") == []


def test_a_published_set_is_looked_through_too(run, monkeypatch):
    monkeypatch.setattr(detection, "GLYPH_SCENES", {"train": range(60), "test": range(3000, 3020)})
    monkeypatch.setattr(detection, "_glyph_records", detection._glyph_records.__wrapped__)
    assert run("glyphs", "--shots", "all") == (
        0,
        "glyphs: pictures: 60 to train on, 20 to test on\n0 errors, 0 warnings\n",
    )


def test_every_fault_that_was_planted_is_named(run, tmp_path, monkeypatch):
    pictures = make_pictures(30)
    rare = pictures["img 06.PNG"]
    pictures["img 06.PNG"] = rare._replace(objects=[("hen", *rare.objects[0][1:])])
    images = tmp_path / "images"
    with monkeypatch.context() as patch:
        patch.setattr(test_layouts, "NAMES", [*NAMES, "hen", "  Bee"])
        coco(pictures, divided(pictures, "train", "test"), tmp_path)
    (images / "img 02.jpg").write_bytes(b"no picture at all")
    (images / "img 04.jpg").write_bytes((images / "img 04.jpg").read_bytes()[:-300])
    Image.new("RGB", (33, 99)).save(images / "img 08.jpg")
    Image.open(images / "img 12.PNG").save(
        images / "img 13.jpg", "PNG"
    )  # the same pixels in another file
    shutil.copy(images / "img 14.jpg", images / "img 17.jpg")
    for one, other in (("img 12.PNG", "img 13.jpg"), ("img 14.jpg", "img 17.jpg")):
        for path in (tmp_path / "train.json", tmp_path / "test.json"):
            content = json.loads(path.read_text())
            for image in content["images"]:
                if image["file_name"] == other:
                    image["width"], image["height"] = pictures[one].image.size
            path.write_text(json.dumps(content))
    (images / "img 16.jpg").unlink()
    replant(tmp_path, "img 18.PNG", lambda item: item.update(bbox=[5, 5, 0, 10]))
    replant(tmp_path, "img 22.jpg", lambda item: item.update(bbox=[500, 5, 10, 10]))
    replant(tmp_path, "img 24.PNG", lambda item: item.update(bbox=[-9, 5, 30, 10]))
    replant(tmp_path, "img 26.jpg", lambda item: item.update(category_id=99))
    replant(tmp_path, "img 28.jpg", lambda item: item.update(bbox="none"))

    status, text = run(tmp_path, "--shots", 2)
    assert status == 1
    heads = [line for line in text.splitlines() if line.startswith(("error", "warning"))]
    groups = dict(head.rsplit(": ", 1) for head in heads)
    for kind, number, words in [
        (
            "error: picture that cannot be read",
            2,
            ["img 02.jpg: not readable", "img 04.jpg: not readable"],
        ),
        ("error: picture of another size than annotated", 1, ["img 08.jpg is 33 x 99 pixels"]),
        ("error: annotated, but missing (… of … pictures are)", 1, ["img 16.jpg"]),
        ("error: annotation … of image …: box … has no area", 1, ["[5, 5, 0, 10]"]),
        (
            "error: annotation … of image …: its image or category … is not listed",
            1,
            ["category 99"],
        ),
        ("error: annotation … of image …: bbox … is not … in pixels", 1, ["bbox 'none'"]),
        ("error: classes … and … differ only in case or blanks", 1, ["'  Bee'", "'bee'"]),
        (
            "warning: picture in both parts",
            2,
            ["img 12.PNG", "img 13.jpg", "img 14.jpg", "img 17.jpg"],
        ),
        (
            "warning: class with fewer objects than shots",
            1,
            ["class 'hen' has 1 objects for 2 shots"],
        ),
        (
            "warning: class without an object to test on",
            1,
            ["class 'hen' has no object in the test part"],
        ),
    ]:
        assert groups.pop(kind) == str(number), (kind, text)
        assert all(word in text for word in words), (words, text)
    assert not groups, groups
    notes = text.partition("error: ")[0]
    assert "boxes outside their picture, left out: 1 (first: img 22.jpg)" in notes
    assert "cut off there in training: 1 (first: img 24.PNG)" in notes
    assert text.endswith("8 errors, 4 warnings\n") and "; put it there" in text


def test_what_cannot_be_opened_is_the_one_error(run, tmp_path):
    status, text = run(tmp_path)
    assert (
        status == 1
        and "not a layout known here" in text
        and text.endswith("\n1 errors, 0 warnings\n")
    )
    pictures = make_pictures()
    coco(pictures, divided(pictures, "train", "test"), tmp_path)
    yolo(pictures, divided(pictures, "train", "test"), tmp_path)
    assert run(tmp_path)[0] == 1 and run(tmp_path, "--layout", "yolo", "--shots", 1)[0] == 0
    status, text = run(tmp_path, "--layout", "coco", "--novel-classes", "wasp")
    assert status == 1 and "'wasp'" in text


def test_faults_of_yolo_are_named(run, tmp_path):
    pictures = make_pictures(20)
    yolo(pictures, divided(pictures, "train", "test"), tmp_path)
    labels = tmp_path / "labels" / "train"
    for name, text in [
        ("img 99", "0 .5 .5 .1 .1"),
        ("img 02", "0 .5 .5 .1"),
        ("img 04", "7 .5 .5 .1 .1"),
        ("img 06", "0 .5 .5 .1 0\n1 .2 .2 .8 .2 .5 .8"),
        ("img 08", "0 30 30 20 20\n1 .5 .5 .2 .2"),
    ]:
        (labels / f"{name}.txt").write_text(text)
    (tmp_path / "images" / "train" / "img 14.jpg").write_bytes(b"no picture at all")
    status, text = run(tmp_path, "--shots", 1)
    assert status == 1 and text.endswith("\n5 errors, 0 warnings\n")
    for words in (
        "img 99.txt: no picture 'img 99' in",
        "img 02.txt: line 1 is neither",
        "img 04.txt: line 1: class 7 is not in data.yaml, whose last is 2",
        "img 06.txt: line 1: box '0 .5 .5 .1 0' has no area",
        "img 14.jpg: not readable as a picture",
        "polygons, whose boxes are taken: 1",
        "boxes outside their picture, left out: 1 (first: ",
        "pictures without objects, background: ",
    ):
        assert words in text, (words, text)


def test_many_of_a_kind_are_counted(run, tmp_path):
    pictures = make_pictures(20)
    yolo(pictures, divided(pictures, "train", "test"), tmp_path)
    for path in (tmp_path / "labels" / "train").glob("*.txt"):
        path.write_text(path.read_text() + "9 .5 .5 .1 .1\n")
    status, text = run(tmp_path)
    assert (
        status == 1 and "error: line …: class … is not in data.yaml, whose last is …: 8\n" in text
    )
    assert (
        text.count("class 9 is not") == check.SHOWN
        and f"... and {8 - check.SHOWN} more like this" in text
    )


def test_quick(tmp_path):
    pictures = make_pictures(16)
    parts = divided(pictures, "train", "test")
    voc(pictures, parts, tmp_path)
    for name in ("img 00.PNG", "img 02.jpg"):  # the same number of bytes, but another picture
        shutil.copy(tmp_path / "JPEGImages" / "img 01.jpg", tmp_path / "JPEGImages" / name)
    data = bytearray((tmp_path / "JPEGImages" / "img 00.PNG").read_bytes())
    data[-5] ^= 1
    (tmp_path / "JPEGImages" / "img 00.PNG").write_bytes(bytes(data))
    split = open_split(str(tmp_path), "")
    counts = [sum((r.labels == n).sum() for r in split.train.records) for n in range(3)]
    notes = check.quick(split, max(counts))
    assert len(notes) == 1 + sum(n < max(counts) for n in counts)
    assert sum("img 02.jpg (train)" in note and "img 01.jpg (test)" in note for note in notes) == 1
    for name, picture in pictures.items():
        if name in parts["train"] and picture.objects:
            kept = [o for o in picture.objects if o[0] != "cup"] or [("bee", 1, 1, 9, 9)]
            write_xml(
                Picture(name, picture.image, kept), tmp_path / "Annotations" / f"{name[:-4]}.xml"
            )
    with pytest.raises(InputError, match="class 'cup' has no object to train on"):
        check.quick(open_split(str(tmp_path), ""), 1)


def test_pictures_of_equal_bytes_but_other_shape_are_different(tmp_path):
    for name, shape in (("a", (40, 60)), ("b", (60, 40))):
        Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / f"{name}.png")
    pictures = {
        n: Picture(n, Image.open(tmp_path / n), [("cup", 1, 1, 30, 30)]) for n in ("a.png", "b.png")
    }
    coco(pictures, {"train": ["a.png"], "test": ["b.png"]}, tmp_path / "own")
    assert check.examine(str(tmp_path / "own"), "", 1)[1] == []
