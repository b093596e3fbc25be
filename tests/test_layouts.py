"""One's own data: every layout is recognised and gives the same records; what is odd is said, what
is wrong named.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from fewshot import InputError
from fewshot.data import layouts
from fewshot.data.detection import DetectionSplit, open_detection, open_split

NEU_DET = Path(__file__).parents[1] / ".." / "shared" / "data" / "neu_det"
NAMES = [
    "cup",
    "air plane",
    "bee",
]  # as numbered by the tool: neither in alphabetical order nor in that of use
Objects = list[tuple[str, float, float, float, float]]  # class, x1, y1, x2, y2
Parts = dict[str, list[str]]  # part -> names of its pictures


class Picture(NamedTuple):
    name: str
    image: Image.Image
    objects: Objects


def make_pictures(number: int = 15, seed: int = 0) -> dict[str, Picture]:
    """Small noisy pictures of several sizes and suffixes; every fifth has no object."""
    rng, found = np.random.default_rng(seed), {}
    for n in range(number):
        width, height = rng.integers(40, 90, 2)
        name = f"img {n:02d}{'.jpg' if n % 3 else '.PNG'}"
        boxes = rng.uniform((0, 0, 5, 5), (20, 20, 20, 20), (3, 4)).round(1)
        objects = [
            (NAMES[rng.integers(3)], x, y, round(x + w, 1), round(y + h, 1))
            for x, y, w, h in boxes.tolist()
        ]
        objects = objects if n % 5 else []
        pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
        found[name] = Picture(name, Image.fromarray(pixels), objects)
    return found


def save(pictures: dict[str, Picture], names: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pictures[name].image.save(folder / name)


def write_json(pictures: dict[str, Picture], names: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images, objects = [], []
    for id, name in enumerate(reversed(names), 100):
        width, height = pictures[name].image.size
        images.append({"id": id, "file_name": name, "width": width, "height": height})
        for label, x1, y1, x2, y2 in pictures[name].objects:
            item = {
                "image_id": id,
                "category_id": NAMES.index(label),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            objects.append({"id": len(objects), **item})
    categories = [{"id": n, "name": name} for n, name in enumerate(NAMES)]
    path.write_text(
        json.dumps({"images": images, "annotations": objects, "categories": categories})
    )


def write_xml(picture: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        "</bndbox></object>"
        for name, x1, y1, x2, y2 in picture.objects
    )
    width, height = picture.image.size
    path.write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height></size>{items}</annotation>"
    )


def write_txt(picture: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = picture.image.size
    path.write_text(
        "".join(
            f"{NAMES.index(name)} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}\n"
            for name, x1, y1, x2, y2 in picture.objects
        )
    )


def coco(pictures: dict[str, Picture], parts: Parts, folder: Path) -> None:
    for part, names in parts.items():
        save(pictures, names, folder / "images")
        write_json(pictures, names, folder / f"{part}.json")


def coco_annotations(pictures: dict[str, Picture], parts: Parts, folder: Path) -> None:
    for part, names in parts.items():
        save(pictures, names, folder / "images" / part)
        write_json(pictures, names, folder / "annotations" / f"instances_{part}.json")
    (folder / "annotations" / "captions_train.json").write_text("{}")


def service(pictures: dict[str, Picture], parts: Parts, folder: Path) -> None:
    for part, names in parts.items():
        place = folder / {"val": "valid"}.get(part, part)
        save(pictures, names, place)
        write_json(pictures, names, place / "_annotations.coco.json")


def voc(pictures: dict[str, Picture], parts: Parts, folder: Path) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for part, names in parts.items():
        save(pictures, names, folder / "JPEGImages")
        for name in names:
            if pictures[name].objects:
                write_xml(pictures[name], folder / "Annotations" / f"{name[:-4]}.xml")
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text(
            "".join(f"{name[:-4]}\n" for name in names)
        )


def voc_beside(pictures: dict[str, Picture], parts: Parts, folder: Path) -> None:
    for part, names in parts.items():
        save(pictures, names, folder / part)
        for name in names:
            write_xml(pictures[name], folder / part / f"{name[:-4]}.xml")


def yolo(pictures: dict[str, Picture], parts: Parts, folder: Path) -> None:
    for part, names in parts.items():
        save(pictures, names, folder / "images" / part)
        for name in names:
            if pictures[name].objects:
                write_txt(pictures[name], folder / "labels" / part / f"{name[:-4]}.txt")
    (folder / "data.yaml").write_text(
        yaml.safe_dump({"names": dict(enumerate(NAMES)), "nc": len(NAMES)})
    )


def yolo_service(pictures: dict[str, Picture], parts: Parts, folder: Path) -> None:
    for part, names in parts.items():
        save(pictures, names, folder / part / "images")
        for name in names:
            write_txt(pictures[name], folder / part / "labels" / f"{name[:-4]}.txt")
    paths = {
        part: f"../{part}/images" for part in ("train", "val", "test")
    }  # also of parts that are not there
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": NAMES, **paths}))


def yolo_lists(pictures: dict[str, Picture], parts: Parts, folder: Path) -> None:
    yolo(pictures, parts, folder)
    for part, names in parts.items():
        (folder / f"{part}.txt").write_text("".join(f"./images/{part}/{name}\n" for name in names))
    (folder / "data.yaml").write_text(
        yaml.safe_dump({"path": ".", "names": NAMES} | {p: f"{p}.txt" for p in parts})
    )


WRITERS = [coco, coco_annotations, service, voc, voc_beside, yolo, yolo_service, yolo_lists]


def write_whole(kind: str, pictures: dict[str, Picture], folder: Path) -> None:
    """Without parts: one json, or no lists, or one folder."""
    names = list(pictures)
    save(pictures, names, folder / ("JPEGImages" if kind == "voc" else "images"))
    if kind == "coco":
        write_json(pictures, names, folder / "result.json")
    for name in names:
        if kind == "voc":
            write_xml(pictures[name], folder / "Annotations" / f"{name[:-4]}.xml")
        if kind == "yolo":
            write_txt(pictures[name], folder / "labels" / f"{name[:-4]}.txt")
            (folder / "classes.txt").write_text("\n".join(NAMES))


def expect(split: DetectionSplit, pictures: dict[str, Picture], parts: Parts) -> None:
    """The split has these pictures, in order of their names, with their objects."""
    for dataset, part in ((split.train, "train"), (split.test, "test")):
        kept = [name for name in sorted(parts[part]) if pictures[name].objects or part == "test"]
        assert [record.id for record in dataset.records] == kept
        for i, record in enumerate(dataset.records):
            objects = pictures[record.id].objects
            assert [dataset.classes[label] for label in record.labels] == [
                name for name, *_ in objects
            ]
            assert np.allclose(
                record.boxes, np.array([box for _, *box in objects]).reshape(-1, 4), atol=1e-3
            )
            assert (record.width, record.height) == pictures[record.id].image.size
            assert (
                dataset.image(i).shape == (3, record.height, record.width)
                and not record.difficult.any()
            )


def divided(pictures: dict[str, Picture], *parts: str) -> Parts:
    return {part: list(pictures)[i :: len(parts)] for i, part in enumerate(parts)}


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_every_layout_gives_the_same_records(write, tmp_path):
    pictures = make_pictures()
    parts = divided(pictures, "train", "test")
    write(pictures, parts, tmp_path / "own")
    split = open_split("own", tmp_path, novel=["cup"])
    assert (
        split.train.classes == ["air plane", "bee", "cup"]
        and split.test.classes == split.train.classes
    )
    assert split.novel == ["cup"] and split.train.name == "own" and split.train.metric == "coco"
    expect(split, pictures, parts)
    kind = write.__name__.split("_")[0].replace("service", "coco")
    assert (
        f"laid out as {kind.upper()}" in split.train.notes[0]
        and "8 to train on, 7 to test on" in split.train.notes[0]
    )
    totals = {name: [0, 0] for name in NAMES}
    for i, part in enumerate(("train", "test")):
        for name, *_ in (o for picture in parts[part] for o in pictures[picture].objects):
            totals[name][i] += 1
    assert all(
        f"{name} {train} + {test}" in split.train.notes[1] for name, (train, test) in totals.items()
    )
    empty = [sum(not pictures[name].objects for name in parts[part]) for part in ("train", "test")]
    assert (
        f"{empty[0]} to train on (passed" in split.train.notes[2]
        and f"{empty[1]} to test on" in split.train.notes[2]
    )
    alone = open_detection("own", tmp_path, part="test")
    assert [r.id for r in alone.records] == [
        r.id for r in split.test.records
    ] and alone.classes == sorted(NAMES)
    # a user's own numbers, and ids where there are any
    numbers = (
        {"air plane": 1, "bee": 2, "cup": 3}
        if kind == "voc"
        else {n: i for i, n in enumerate(NAMES)}
    )
    assert split.test.category_ids == numbers
    assert all(
        isinstance(r.image_id, int) if kind == "coco" else r.image_id == r.id
        for r in split.test.records
    )


@pytest.mark.parametrize("all_of_them", [True, False], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_images_may_be_named_by_absolute_paths(kind, all_of_them, tmp_path, monkeypatch):
    """As scripts write them that collect images from several disks; the others lie in the folder."""
    monkeypatch.chdir(tmp_path)
    pictures = make_pictures()
    parts = divided(pictures, "train", "test")
    elsewhere = tmp_path / "disk" / "images"
    moved = [name for i, name in enumerate(pictures) if all_of_them or i % 4 == 0]

    writer = {"coco": coco, "yolo": yolo_lists}[kind]
    writer(pictures, parts, Path("own"))
    elsewhere.mkdir(parents=True)
    (tmp_path / "disk" / "labels").mkdir()
    for name in moved:
        (found,) = Path("own/images").rglob(name)
        found.rename(elsewhere / name)
        for label in Path("own").glob(f"labels/*/{name[:-4]}.txt"):
            label.rename(tmp_path / "disk" / "labels" / label.name)
    for part, names in parts.items():
        listing = Path("own") / (f"{part}.json" if kind == "coco" else f"{part}.txt")
        text = listing.read_text()
        for name in set(names) & set(moved):
            text = text.replace(f"./images/{part}/{name}", name)
            text = text.replace(name, str(elsewhere / name))
        listing.write_text(text)

    split = open_split("own", "")
    for dataset, part in ((split.train, "train"), (split.test, "test")):
        kept = {name for name in parts[part] if pictures[name].objects or part == "test"}
        assert {Path(record.path).name for record in dataset.records} == kept
        for i, record in enumerate(dataset.records):
            picture = pictures[Path(record.path).name]
            assert dataset.image(i).shape[1:] == (record.height, record.width)
            assert len(record.labels) == len(picture.objects)


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_val_is_tested_on_where_there_is_no_test_part(write, tmp_path):
    pictures = make_pictures()
    parts = divided(pictures, "train", "val")
    write(pictures, parts, tmp_path / "own")
    split = open_split("own", tmp_path)
    expect(split, pictures, {"train": parts["train"], "test": parts["val"]})
    assert sum("no test part: tested on val" in note for note in split.train.notes) == 1
    shutil.rmtree(tmp_path / "own")
    parts = divided(pictures, "train", "val", "test")
    write(pictures, parts, tmp_path / "own")
    split = open_split("own", tmp_path)
    expect(split, pictures, parts)
    assert sum("besides this val" in note for note in split.train.notes) == 1


def test_a_fifth_is_held_out_where_there_is_no_other_part(tmp_path):
    pictures = make_pictures(21)
    tests = {}
    for kind in ("coco", "voc", "yolo"):
        write_whole(kind, pictures, tmp_path / kind)
        split = open_split(str(tmp_path / kind), "")
        tests[kind] = [record.id for record in split.test.records]
        expect(
            split,
            pictures,
            {"train": sorted(set(pictures) - set(tests[kind])), "test": tests[kind]},
        )
        assert any(
            "no test part: a fifth of the pictures, 4," in note for note in split.train.notes
        )
    assert tests["coco"] == tests["voc"] == tests["yolo"] and len(tests["coco"]) == 4
    for write in WRITERS:
        write(pictures, {"train": list(pictures)}, tmp_path / write.__name__ / "own")
        assert [r.id for r in open_split("own", tmp_path / write.__name__).test.records] == tests[
            "coco"
        ]
    # it is a matter of names alone
    others = {
        name: replace_objects(p, p.objects[:1]) for name, p in make_pictures(21, seed=1).items()
    }
    write_whole("voc", others, tmp_path / "others")
    assert [record.id for record in open_split("others", tmp_path).test.records] == tests["coco"]


def replace_objects(picture: Picture, objects: Objects) -> Picture:
    return picture._replace(objects=objects)


def test_vocs_lists(tmp_path):
    pictures = make_pictures()
    names = list(pictures)
    parts = {"train": names[:4], "val": names[4:8], "trainval": names[:8], "test": names[8:]}
    voc(pictures, parts, tmp_path / "own")
    expect(open_split("own", tmp_path), pictures, {"train": names[:8], "test": names[8:]})
    lists = tmp_path / "own" / "ImageSets" / "Main"
    (lists / "test.txt").unlink()  # then val is tested on, and not trained on
    expect(open_split("own", tmp_path), pictures, {"train": names[:4], "test": names[4:8]})
    (lists / "train.txt").unlink()
    split = open_split("own", tmp_path)
    assert len(split.test) == 2 and {r.id for r in split.test.records} < set(names[:8])
    (lists / "trainval.txt").write_text(
        "".join(f"{name}  -1\n" for name in names[:8])
    )  # as in lists of one class
    assert [r.id for r in open_split("own", tmp_path).test.records] == [
        r.id for r in split.test.records
    ]
    (tmp_path / "own" / "JPEGImages").rename(tmp_path / "own" / "images")
    (tmp_path / "own" / "Annotations").rename(tmp_path / "own" / "annotations")
    assert len(open_split("own", tmp_path).test) == 2


def test_difficult_objects_are_like_others_but_noted(tmp_path):
    write_whole("voc", make_pictures(), tmp_path)
    path = tmp_path / "Annotations" / "img 01.xml"
    path.write_text(path.read_text().replace("</name>", "</name><difficult>1</difficult>"))
    split = open_split(str(tmp_path), "")
    assert not any(record.difficult.any() for part in split[:2] for record in part.records)
    assert any("marked difficult, taken like others: 3" in note for note in split.train.notes)


def test_a_turned_picture_in_yolo_is_measured_upright(tmp_path):
    pictures = make_pictures(5)
    write_whole("yolo", pictures, tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 50)).save(tmp_path / "images" / "img 01.jpg", exif=exif)
    (tmp_path / "labels" / "img 01.txt").write_text("0 0.5 0.5 0.2 0.1")
    split = open_split(str(tmp_path), "")
    dataset, i = next(
        (d, i) for d in split[:2] for i, r in enumerate(d.records) if r.id == "img 01.jpg"
    )
    assert dataset.image(i).shape == (3, 80, 50) and np.allclose(
        dataset.records[i].boxes, [[20, 36, 30, 44]]
    )


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (coco, "/train.json says"),
        (service, "/_annotations.coco.json says"),
        (voc, "/{}.xml says"),
        (yolo, " when the data set was opened it was"),
    ],
)
def test_a_picture_of_another_size_names_the_file_that_has_its_size(write, says, tmp_path):
    pictures = make_pictures()
    write(pictures, divided(pictures, "train", "test"), tmp_path)
    train = open_split(str(tmp_path), "").train
    record = train.records[0]
    Image.new("RGB", (33, 99)).save(record.path, "PNG")
    with pytest.raises(InputError) as error:
        train.image(0)
    before, after = str(error.value).split(
        f"{says.format(Path(record.path).stem)} {record.width} x {record.height}, "
    )
    assert (
        before.startswith(f"{record.path} is 33 x 99 pixels,") and "correct the annotation" in after
    )


def test_what_is_left_out_or_altered_is_noted(tmp_path):
    pictures = make_pictures(10)
    yolo(pictures, divided(pictures, "train", "test"), tmp_path)
    label = tmp_path / "labels" / "train" / "img 02.txt"
    label.write_text(
        "0 0.5 0.5 0.2 0.2\n2 0.1 0.2 0.9 0.2 0.5 0.8\n\n0 1.5 0.5 0.2 0.2\n1 0.5 0.5 0.001 0.2\n0 0.9 0.5 0.4 0.2\n"
    )
    content = {"names": [*NAMES, "never seen"]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    split = open_split(str(tmp_path), "")
    record = next(r for r in split.train.records if r.id == "img 02.jpg")
    width, height = record.width, record.height
    assert np.allclose(
        record.boxes[1], [0.1 * width, 0.2 * height, 0.9 * width, 0.8 * height], atol=1e-3
    )
    assert len(record.boxes) == 3 and split.train.classes == sorted(NAMES)
    notes = "\n".join(split.train.notes)
    for text in (
        "polygons, whose boxes are taken: 1",
        "boxes outside their picture, left out: 1 (first: ",
        "boxes smaller than a pixel, left out: 1 (first: ",
        "boxes that reach beyond their picture, cut off there in training: 1 (first: ",
        "classes without any object, left out: never seen",
    ):
        assert text in notes, text
    assert notes.count("img 02.jpg)") == 3


def test_pictures_too_small_to_train_on_are_counted(tmp_path):
    pictures = make_pictures(10)
    small = Picture("img 02.jpg", Image.new("RGB", (31, 60)), [("cup", 1, 1, 20, 20)])
    coco(pictures | {small.name: small}, divided(pictures, "train", "test"), tmp_path)
    train = open_split(str(tmp_path), "").train
    assert small.name not in [record.id for record in train.records] and small.name in train.skipped
    assert train.notes[-1] == "pictures with a side below 32 pixels, not trained on: 1"


def test_the_layout_chooses_between_two(tmp_path):
    pictures = make_pictures()
    parts = divided(pictures, "train", "test")
    coco(pictures, parts, tmp_path)
    yolo(pictures, parts, tmp_path)
    with pytest.raises(InputError, match="coco and as yolo at once; choose by --layout"):
        open_split(str(tmp_path), "")
    for layout in ("coco", "yolo"):
        expect(open_split(str(tmp_path), "", layout=layout), pictures, parts)
        assert layouts.recognise(tmp_path, layout).kind == layout
    for name, layout, words in (
        (tmp_path, "voc", "not laid out as voc"),
        ("glyphs", "voc", "layout of glyphs is fixed"),
    ):
        with pytest.raises(InputError, match=words):
            open_split(str(name), "", layout=layout)
    with pytest.raises(InputError, match="one file"):
        open_split(str(tmp_path / "train.json"), "", layout="yolo")
    assert len(layouts.read_own(tmp_path, "test", layout="yolo").records) == 7


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / path).read_text()
        assert old in text
        (folder / path).write_text(text.replace(old, new))

    return change


def put(path: str, text: str | dict | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if text is None:
            (folder / path).unlink()
        else:
            (folder / path).write_text(text if isinstance(text, str) else yaml.safe_dump(text))

    return change


def scale_boxes(factor: float, offset: float = 0) -> Callable[[Path], None]:
    """All boxes in another unit."""

    def change(folder: Path) -> None:
        for path in folder.glob("*.json"):
            content = json.loads(path.read_text())
            for item in content["annotations"]:
                item["bbox"] = [v * factor + offset * (i < 2) for i, v in enumerate(item["bbox"])]
            path.write_text(json.dumps(content))
        for path in folder.glob("labels/*/*.txt"):
            lines = [line.split() for line in path.read_text().splitlines()]
            path.write_text(
                "\n".join(" ".join([c, *(str(float(v) * factor) for v in vs)]) for c, *vs in lines)
            )

    return change


def shrink_xml(folder: Path) -> None:
    pictures = make_pictures()
    for picture in pictures.values():
        boxes = [(name, *(v / 100 for v in box)) for name, *box in picture.objects]
        write_xml(
            replace_objects(picture, boxes), folder / "Annotations" / f"{picture.name[:-4]}.xml"
        )


@pytest.mark.parametrize(
    ("write", "change", "words"),
    [
        (
            coco,
            lambda f: [(f / n).unlink() for n in ("train.json", "test.json")],
            ["COCO", "VOC", "YOLO", "images"],
        ),
        (coco, scale_boxes(0.01), ["train.json", "all of its", "pixels, [x, y, width, height]"]),
        (coco, scale_boxes(1, 500), ["train.json", "all of its", "pixels"]),
        (voc, shrink_xml, ["all of its", "pixels"]),
        (yolo, scale_boxes(60), ["images/train", "all of its", "fractions", "from 0 to 1"]),
        (coco, put("images/img 02.jpg", None), ["img 02.jpg", "annotated, but missing", "1 of 8"]),
        (
            voc,
            put("JPEGImages/img 02.jpg", None),
            ["Annotations/img 02.xml", "no picture 'img 02'"],
        ),
        (
            voc,
            edit("ImageSets/Main/test.txt", "img 03", "img 33"),
            ["test.txt", "no picture 'img 33'"],
        ),
        (
            voc,
            put("Annotations/img 02.xml", "<annotation/>"),
            ["img 02.xml", "not a VOC annotation with a size"],
        ),
        (voc, edit("Annotations/img 02.xml", "cup", " "), ["img 02.xml", "no class name"]),
        (
            voc,
            edit("Annotations/img 02.xml", "<bndbox>", "<box>"),
            ["img 02.xml", "not a VOC annotation"],
        ),
        (
            voc,
            edit("Annotations/img 02.xml", "bndbox>", "robndbox>"),
            ["img 02.xml", "without a whole bndbox"],
        ),
        (
            yolo,
            put("images/train/img 02.jpg", None),
            ["labels/train/img 02.txt", "no picture 'img 02'"],
        ),
        (
            yolo,
            put("images/train/img 02.png", "x"),
            ["img 02.png", "img 02.jpg", "share its annotation"],
        ),
        (yolo, put("images/train/img 02.jpg", "x"), ["img 02.jpg", "not readable"]),
        (
            yolo,
            put("labels/train/img 02.txt", "3 .5 .5 .1 .1"),
            ["img 02.txt: line 1", "class 3", "last is 2"],
        ),
        (
            yolo,
            put("labels/train/img 02.txt", "0.5 .5 .5 .1 .1"),
            ["img 02.txt: line 1", "class 0.5"],
        ),
        (
            yolo,
            put("labels/train/img 02.txt", "0 .5 .5 .1 .1\n0 .5 .5 .1"),
            ["img 02.txt: line 2", "neither"],
        ),
        (
            yolo,
            put("labels/train/img 02.txt", "0 .5 .5 .1 .1 .9"),
            ["img 02.txt: line 1", "neither"],
        ),
        (
            yolo,
            put("labels/train/img 02.txt", "cup .5 .5 .1 .1"),
            ["img 02.txt: line 1", "neither"],
        ),
        (yolo, put("labels/train/img 02.txt", "0 .5 .5 .1 nan"), ["img 02.txt: line 1", "neither"]),
        (yolo, put("labels/train/img 02.txt", "0 .5 .5 0 .1"), ["img 02.txt: line 1", "no area"]),
        (yolo, put("data.yaml", "names: ["), ["data.yaml", "not yaml"]),
        (yolo, put("data.yaml", {"nc": 3}), ["data.yaml", "no 'names'"]),
        (yolo, put("data.yaml", "names: [cup, no, bee]"), ["data.yaml", "False", "quotes"]),
        (
            yolo,
            put("data.yaml", {"names": ["cup", "cup", "bee"]}),
            ["data.yaml", "'cup' is named twice"],
        ),
        (yolo, put("data.yaml", {"names": NAMES, "nc": 4}), ["data.yaml", "nc says 4", "has 3"]),
        (
            yolo,
            put("data.yaml", {"names": NAMES, "train": "nowhere"}),
            ["data.yaml", "nowhere", "not there"],
        ),
        (
            yolo,
            put("data.yaml", {"names": NAMES, "train": "/content/images"}),
            ["data.yaml", "'/content/images'"],
        ),
        (
            yolo,
            put("data.yaml", {"names": NAMES, "train": "images/../../x"}),
            ["data.yaml", "leads out"],
        ),
        (yolo, lambda f: shutil.rmtree(f / "images"), ["data.yaml", "no folder images", "labels"]),
        (
            yolo,
            lambda f: shutil.rmtree(f / "labels"),
            ["images/train", "not one object", "8 pictures"],
        ),
        (yolo_lists, put("images/train/img 02.jpg", None), ["img 02.jpg", "listed, but missing"]),
        (
            yolo,
            put("data.yaml", {"names": ["cup", "Cup ", "bee"]}),
            ["'Cup '", "'cup'", "case or blanks"],
        ),
        (
            yolo,
            put("data.yaml", {"names": ["airplane", "air plane", "bee"]}),
            ["'air plane'", "case or blanks"],
        ),
        (coco_annotations, put("annotations/train_more.json", "{}"), None),
        (
            coco_annotations,
            put("annotations/instances_train2.json", "{}"),
            ["instances_train2.json", "more than one"],
        ),
    ],
)
def test_mistakes_are_named(write, change, words, tmp_path):
    pictures = make_pictures()
    write(pictures, divided(pictures, "train", "test"), tmp_path)
    open_split(str(tmp_path), "")
    change(tmp_path)
    if words is None:  # an odd file that does no harm
        expect(open_split(str(tmp_path), ""), pictures, divided(pictures, "train", "test"))
        return
    with pytest.raises(InputError) as error:
        open_split(str(tmp_path), "")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_yaml_may_name_train_twice_or_a_folder_elsewhere_in_the_data(tmp_path):
    pictures = make_pictures()
    parts = divided(pictures, "train", "test")
    yolo(pictures, parts, tmp_path)
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"names": NAMES, "train": "images", "val": "images"})
    )
    split = open_split(str(tmp_path), "")
    assert len(split.test) == 3 and any(
        "val is train once more" in note for note in split.train.notes
    )
    assert all(record.id.startswith(("train/", "test/")) for record in split.test.records)
    folders = {"train": [str((tmp_path / "images" / "train").resolve())], "test": "./images/test"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"names": NAMES, **folders}))
    expect(open_split(str(tmp_path), ""), pictures, parts)


def test_one_picture_cannot_be_divided(tmp_path):
    pictures = make_pictures(2)
    write_whole("voc", {name: pictures[name] for name in ["img 01.jpg"]}, tmp_path)
    with pytest.raises(InputError, match="one picture alone"):
        open_split(str(tmp_path), "")


def test_a_test_part_alone_can_be_tested_on(tmp_path):
    pictures = make_pictures()
    coco(pictures, {"test": list(pictures)}, tmp_path)
    assert len(open_detection(str(tmp_path), "", part="test")) == 15
    for open_it in (
        lambda: open_split(str(tmp_path), ""),
        lambda: layouts.read_own(tmp_path, "train"),
    ):
        with pytest.raises(InputError, match="no train part, only test"):
            open_it()


def test_a_collector_is_told_everything_and_what_is_flawed_left_out(tmp_path):
    pictures = make_pictures()
    yolo(pictures, divided(pictures, "train", "test"), tmp_path)
    put("labels/train/img 02.txt", "7 .5 .5 .1 .1\n0 .5 .5 .2 .2\nbee\n0 .5 .5 0 .2")(tmp_path)
    put("labels/train/img 99.txt", "0 .5 .5 .1 .1")(tmp_path)
    put("images/train/img 04.jpg", "not a picture")(tmp_path)
    told: list[str] = []
    split = open_split(str(tmp_path), "", fault=told.append)
    assert len(told) == 5 and len({text.split(";")[0] for text in told}) == 5
    assert len(next(r for r in split.train.records if r.id == "img 02.jpg").labels) == 1
    assert "img 04.jpg" not in [r.id for r in split.train.records] and len(split.test) == 7


def test_novel_classes(tmp_path):
    pictures = make_pictures()
    names = sorted(pictures)
    coco(pictures, {"train": names[:8], "test": names[8:]}, tmp_path)
    whole = open_split(str(tmp_path), "")
    assert whole.novel == [] and whole.base == sorted(NAMES)
    again, given = (
        whole.train.with_novel(["bee"]),
        open_split(str(tmp_path), "", novel=["bee"]).train,
    )
    assert again.classes == given.classes == ["air plane", "cup", "bee"] and again.novel == ["bee"]
    assert all(
        (a.labels == b.labels).all() and a.id == b.id
        for a, b in zip(again.records, given.records, strict=True)
    )
    assert again.with_novel(NAMES).base == [] and again.category_ids == whole.train.category_ids
    with pytest.raises(
        InputError,
        match=r"no object of a class 'wasp' to be novel; its classes are air plane, bee, cup",
    ):
        whole.train.with_novel(["wasp"])
    for name in names[8:]:
        kept = [o for o in pictures[name].objects if o[0] != "bee"]
        pictures[name] = replace_objects(pictures[name], kept)
    write_json(pictures, names[8:], tmp_path / "test.json")
    assert open_split(str(tmp_path), "", novel=["bee", "cup"])
    with pytest.raises(InputError, match="none of the 7 test pictures has a novel object"):
        open_split(str(tmp_path), "", novel=["bee"])


def test_fewer_test_pictures_are_spread_over_names(tmp_path):
    pictures = make_pictures(40)
    coco(pictures, divided(pictures, "train", "test"), tmp_path)
    ids = [record.id for record in open_split(str(tmp_path), "").test.records]
    assert [r.id for r in open_split(str(tmp_path), "", test_images=5).test.records] == ids[::4]
    assert [r.id for r in open_split(str(tmp_path), "", test_images=99).test.records] == ids


@pytest.mark.skipif(not NEU_DET.is_dir(), reason="needs NEU-DET")
def test_a_part_of_neu_det_in_every_layout(tmp_path, monkeypatch):
    split = open_split("neu_det", NEU_DET.parent, novel=["crazing", "scratches"])
    assert (len(split.train), len(split.test)) == (1350, 450) and len(split.base) == 4
    parts = [d.with_records(d.records[:: len(d) // 40]) for d in (split.train, split.test)]
    pictures, names = {}, {}
    for dataset in parts:
        names[dataset.part] = [record.id for record in dataset.records]
        for record in dataset.records:
            objects = [
                (dataset.classes[n], *box) for n, box in zip(record.labels, record.boxes.tolist())
            ]
            pictures[record.id] = Picture(record.id, Image.open(record.path), objects)
    monkeypatch.setattr(sys.modules[__name__], "NAMES", split.train.classes)
    for write in (coco, voc, yolo):
        write(pictures, names, tmp_path / write.__name__)
        own = open_split(str(tmp_path / write.__name__), "", novel=["crazing", "scratches"])
        assert own.train.classes == split.train.classes
        for dataset, same in zip(parts, own):
            assert [r.id for r in same.records] == [r.id for r in dataset.records]
            for a, b in zip(dataset.records, same.records):
                assert np.allclose(a.boxes, b.boxes, atol=1e-3) and (a.labels == b.labels).all()
