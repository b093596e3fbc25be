"""Detection sets: what is read from disk, which mistakes are named, which shots are drawn, what the
loaders give.
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot import InputError
from fewshot.data import detection, glyphs, pipeline
from fewshot.data.annotations import COCO_NOVEL, make_record
from fewshot.data.detection import DetectionSet, open_detection
from fewshot.data.pipeline import Pipeline
from fewshot.data.stream import Feed
from fewshot.data.transforms import CAFFE

REAL = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_real = pytest.mark.skipif(not (REAL / "VOCdevkit").is_dir(), reason="real data are not here")

SPLITS = {  # as published, written out
    1: "aeroplane bicycle boat bottle car cat chair diningtable dog horse person pottedplant sheep train tvmonitor "
    "bird bus cow motorbike sofa",
    2: "bicycle bird boat bus car cat chair diningtable dog motorbike person pottedplant sheep train tvmonitor "
    "aeroplane bottle cow horse sofa",
    3: "aeroplane bicycle bird bottle bus car chair cow diningtable dog horse person pottedplant train tvmonitor "
    "boat cat motorbike sheep sofa",
}


def write_voc(
    root: Path, year: str, listed: str, pictures: dict[str, list[tuple]], size=(100, 80)
) -> Path:
    """A VOC tree with these pictures: (class, xmin, ymin, xmax, ymax, difficult) objects by id."""
    folder = root / "VOCdevkit" / year
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for n, (id, objects) in enumerate(pictures.items()):
        Image.new("RGB", size, (n % 256, 100, 200)).save(folder / "JPEGImages" / f"{id}.jpg")
        items = "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><part><name>head</name><bndbox>"
            f"<xmin>1</xmin></bndbox></part><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
            f"<ymax>{y2}</ymax></bndbox></object>"
            for name, x1, y1, x2, y2, difficult in objects
        )
        size_xml = (
            f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        )
        (folder / "Annotations" / f"{id}.xml").write_text(
            f"<annotation>{size_xml}{items}</annotation>"
        )
    (folder / "ImageSets" / "Main" / f"{listed}.txt").write_text(
        "".join(f"{id}\n" for id in pictures)
    )
    return folder


@pytest.fixture
def voc(tmp_path):
    """Two years of training pictures and a test part, a few objects each."""
    write_voc(
        tmp_path,
        "VOC2007",
        "trainval",
        {
            "000001": [("dog", 11, "20.7", 50, 60, 0), ("cat", 1, 1, 30, 30, 1)],
            "000002": [("cow", 5, 5, 25, 25, 1)],
            "000003": [("unicorn", 5, 5, 25, 25, 0)],
            "000004": [("person", 5, 5, 5, 25, 0), ("dog", 30, 30, 90, 70, 0)],
        },
    )
    write_voc(tmp_path, "VOC2012", "trainval", {"2008_000001": [("dog", 1, 1, 20, 20, 0)]})
    write_voc(
        tmp_path,
        "VOC2007",
        "test",
        {"000005": [("dog", 11, 20, 50, 60, 0)], "000006": [("cat", 5, 5, 9, 9, 1)]},
    )
    return tmp_path


@contextmanager
def refused(*words: str):
    """An InputError of one line, which has these words."""
    with pytest.raises(InputError) as error:
        yield
    text = str(error.value)
    assert "\n" not in text, text
    for word in words:
        assert word in text, text


def test_voc_training_part(voc):
    opened = open_detection("voc", voc, part="train", split=1)
    assert [r.id for r in opened.records] == [
        "VOC2007/000001",
        "VOC2007/000004",
        "VOC2012/2008_000001",
    ]
    first, second, _ = opened.records
    # the published offset of -1, -1, 0, 0; fractions are cut off; a box from 5 to 5 is one pixel
    # wide
    assert (
        first.boxes.tolist() == [[10, 19, 50, 60], [0, 0, 30, 30]]
        and first.boxes.dtype == np.float32
    )
    assert second.boxes[0].tolist() == [4, 4, 5, 25]
    assert [opened.classes[label] for label in first.labels] == ["dog", "cat"]
    assert first.difficult.tolist() == [False, True]
    assert opened.skipped == {"VOC2007/000002", "VOC2007/000003"} and not opened.notes
    kept = open_detection("voc", voc, part="train", difficult="keep")
    assert "VOC2007/000002" in [r.id for r in kept.records] and kept.usable(first).all()
    moved = open_detection("voc", voc, part="train", offset=(-1, -1, -1, -1))
    assert moved.records[0].boxes[0].tolist() == [10, 19, 49, 59]


def test_voc_test_part_keeps_every_picture_and_raw_boxes(voc):
    opened = open_detection("voc", voc, part="test", split=2)
    assert [r.id for r in opened.records] == ["VOC2007/000005", "VOC2007/000006"]
    assert opened.records[0].boxes.tolist() == [[11, 20, 50, 60]] and opened.offset == (
        -1,
        -1,
        0,
        0,
    )
    birds = opened.restrict(["bird"])
    assert (
        len(birds) == 2
        and birds.records[0].boxes.shape == (0, 4)
        and birds.records[0].labels.shape == (0,)
    )


@pytest.mark.parametrize("split", [1, 2, 3])
def test_splits_are_the_published_ones(voc, split):
    opened = open_detection("voc", voc, part="test", split=split)
    assert opened.classes == SPLITS[split].split()
    assert opened.base == opened.classes[:15] and opened.novel == opened.classes[15:]


def test_restrict_relabels_and_drops(voc):
    opened = open_detection("voc", voc, part="train")
    only = opened.restrict(["person", "cow", "dog"])
    assert (
        only.classes == ["person", "cow", "dog"]
        and only.base == ["person", "dog"]
        and only.novel == ["cow"]
    )
    assert [r.labels.tolist() for r in only.records] == [[2], [0, 2], [2]]
    assert [r.id for r in opened.restrict(["person"]).records] == ["VOC2007/000004"]
    with refused("zebra"):
        opened.restrict(["zebra"])


def test_a_missing_year_is_noted(tmp_path):
    write_voc(tmp_path, "VOC2007", "trainval", {"000001": [("dog", 1, 1, 20, 20, 0)]})
    opened = open_detection("voc", tmp_path / "VOCdevkit", part="train")
    assert len(opened) == 1 and "VOC2012" in opened.notes[0]


XML, LIST = "Annotations/000004.xml", "ImageSets/Main/trainval.txt"
WIDTH, XMAX = "<width>100</width>", "<xmax>90</xmax>"


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (XML, None, None, ["missing", "unpack"]),
        ("JPEGImages/000004.jpg", None, None, ["1 of 5"]),
        (LIST, None, None, ["missing"]),
        (XML, "</annotation>", "", ["not a VOC annotation"]),
        (XML, WIDTH, "", ["size"]),
        (XML, XMAX, "<xmax>29</xmax>", ["dog", "[30, 30, 29, 70]"]),
        (XML, XMAX, "", ["dog", "bndbox"]),
        (XML, XMAX, "<xmax>inf</xmax>", ["dog", "bndbox"]),
        (XML, XMAX, "<xmax>nan</xmax>", ["dog", "bndbox"]),
        (XML, XMAX, "<xmax>1e300</xmax>", ["dog", "too large"]),
        (XML, WIDTH, "<width>0</width>", ["size", "0 x 80"]),
        (XML, "<annotation>", "<?xml version='1.0' encoding='x'?>", ["not a VOC"]),
        (LIST, "000004", "../../secret", ["'../../secret'", "leads out"]),
        (LIST, "000004", "/etc/secret", ["'/etc/secret'", "leads out"]),
    ],
)
def test_mistakes_in_voc_are_named(voc, file, old, new, words):
    path = voc / "VOCdevkit" / "VOC2007" / file
    if old is None:
        path.unlink()
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    with refused(path.name, *words):
        open_detection("voc", voc, part="train")


def test_lists_may_have_a_byte_order_mark_but_are_utf_8(voc):
    path = voc / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "test.txt"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert [r.id for r in open_detection("voc", voc, part="test").records] == [
        "VOC2007/000005",
        "VOC2007/000006",
    ]
    path.write_text(path.read_text(), encoding="utf-16")
    with refused("test.txt", "UTF-8"):
        open_detection("voc", voc, part="test")


def test_boxes_beyond_their_picture_are_noted(tmp_path):
    objects = [("dog", 1, 1, 100, 80, 0), ("dog", 0, 5, 20, 20, 0), ("cat", 50, 50, 120, 80, 0)]
    write_voc(tmp_path, "VOC2007", "trainval", {"000001": objects})
    write_voc(tmp_path, "VOC2012", "trainval", {"2008_000001": objects[:1]})
    opened = open_detection("voc", tmp_path, part="train")
    assert opened.records[0].boxes.tolist() == [[0, 0, 100, 80], [-1, 4, 20, 20], [49, 49, 120, 80]]
    [note] = opened.notes
    assert "beyond their picture, cut off there in training: 2 (first: " in note and note.endswith(
        "000001.jpg)"
    )


def test_wrong_choices_are_named(tmp_path):
    (tmp_path / "stuff").mkdir()
    for words, kwargs in [
        (("VOC2007", "stuff", "--data-root"), {"name": "voc"}),
        (("instances_train2017.json", "stuff"), {"name": "coco"}),
        (("split 4", "1, 2, 3"), {"name": "voc", "split": 4}),
        (("coco", "split 2"), {"name": "coco", "split": 2}),
        (("glyphs", "novel"), {"name": "glyphs", "novel": ["cat"]}),
        (("glyphs", "offset"), {"name": "glyphs", "offset": (0, 0, 0, 0)}),
        (("nonsense",), {"name": "nonsense"}),
    ]:
        with refused(*words):
            open_detection(root=tmp_path, part="train", **kwargs)
    with refused("nowhere", "no such folder"):
        open_detection("voc", tmp_path / "nowhere", part="test")


def test_an_unreadable_picture_is_named_also_from_a_worker(voc):
    opened = open_detection("voc", voc, part="test")
    Path(opened.records[1].path).write_bytes(b"not a picture")
    with refused("000006.jpg"):
        opened.image(1)
    with refused("000006.jpg"):
        list(pipeline.test_loader(opened, Pipeline(), Feed(workers=1), CAFFE))


def test_a_picture_of_another_size_than_annotated_is_named(voc):
    opened = open_detection("voc", voc, part="test")
    path = Path(opened.records[0].path)
    says = f"{path.parents[1] / 'Annotations' / path.stem}.xml says 100 x 80"
    for size in ((100, 79), (80, 100)):
        Image.new("RGB", size).save(path)
        with refused(str(path), f"{size[0]} x {size[1]} pixels", says, "correct"):
            opened.image(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 80)).save(path, exif=exif)
    with refused(str(path), "80 x 100 pixels", "100 x 80", "EXIF", "save it upright"):
        opened.image(0)
    Image.new("RGB", (80, 100)).save(path, exif=exif)  # as annotated, once it is upright
    assert opened.image(0).shape == (3, 80, 100)


def write_coco(
    path: Path, images: list[tuple], annotations: list[dict], categories: dict[int, str]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [
            {"id": i, "file_name": name, "width": w, "height": h} for i, name, w, h in images
        ],
        "annotations": [{"id": n, **a} for n, a in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }
    path.write_text(json.dumps(content))


def coco_tree(root: Path, names=("train.json", "val.json")) -> Path:
    """COCO as it is published, but small; both parts are the same."""
    # ids are neither dense nor in the order of the file
    ids = [*range(1, 8), 9, *range(16, 22), 44, 62, 63, 64, 67, 72]
    categories = {90: "toothbrush", 8: "truck", 11: "fire hydrant", **dict(zip(ids, COCO_NOVEL))}
    images = [
        (139, "COCO_val2014_000000000139.jpg", 100, 80),
        (42, "COCO_train2014_000000000042.jpg", 100, 80),
    ]
    good = {"image_id": 139, "category_id": 44, "bbox": [10, 20, 30, 40], "area": 600}
    flawed = [
        {"ignore": 1},
        {"bbox": [200, 20, 30, 40]},
        {"area": 0},
        {"bbox": [10, 20, 0.5, 40]},
    ]
    more = [
        {"category_id": 90, "bbox": [-5, 0, 20, 20]},
        {"category_id": 1, "iscrowd": 1},
        {"image_id": 42},
    ]
    for name in names:
        write_coco(
            root / "annotations" / name,
            images,
            [good, *({**good, **a} for a in flawed + more)],
            categories,
        )
    for folder, name in (("val2014", images[0][1]), ("train2014", images[1][1])):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80)).save(root / folder / name)
    return root


def test_coco(tmp_path):
    coco_tree(tmp_path / "coco")
    opened = open_detection("coco", tmp_path, part="train")
    assert len(opened.classes) == 23 and opened.novel == COCO_NOVEL and opened.metric == "coco"
    assert opened.base == [
        "truck",
        "fire hydrant",
        "toothbrush",
    ]  # in order of id, interleaved with the novel ones
    assert opened.classes.index("truck") == COCO_NOVEL.index("boat")
    record = opened.records[0]
    assert record.id == "139" and record.path.endswith("coco/val2014/COCO_val2014_000000000139.jpg")
    assert [opened.classes[i] for i in record.labels] == ["bottle", "toothbrush", "person"]
    assert record.boxes.tolist() == [[10, 20, 40, 60], [-5, 0, 15, 20], [10, 20, 40, 60]]
    assert record.difficult.tolist() == [False, False, True] and record.areas.tolist() == [
        600,
        600,
        600,
    ]
    kept = open_detection("coco", tmp_path, part="train", difficult="keep")
    assert not kept.usable(record)[2]  # crowds are never trained on
    assert opened.category_ids["truck"] == 8 and list(opened.category_ids) == opened.classes
    assert [r.image_id for r in opened.records] == [139, 42]
    notes = [
        "boxes marked ignore, left out: 1",
        "boxes outside their picture, left out: 1",
        "boxes without area, left out: 1",
        "boxes smaller than a pixel, left out: 1",
        "boxes that reach beyond their picture, cut off there in training: 1",
    ]
    first = " (first: COCO_val2014_000000000139.jpg)"
    assert [note.split(": ", 1)[1] for note in opened.notes] == [note + first for note in notes]
    # its evaluation counts flawed boxes too
    test = open_detection("coco", tmp_path, part="test")
    assert len(test.records[0].labels) == 7 and not test.notes
    (tmp_path / "coco" / "train2014" / "COCO_train2014_000000000042.jpg").unlink()
    with refused("COCO_train2014_000000000042.jpg", "1 of 2"):
        open_detection("coco", tmp_path, part="test")


def test_coco_never_mixes_its_splits(tmp_path):
    coco_tree(tmp_path, ("trainvalno5k.json", "instances_train2014.json", "instances_val2014.json"))
    with refused("5k.json"):
        open_detection("coco", tmp_path, part="test")


def test_coco_has_its_novel_classes(tmp_path):
    path = coco_tree(tmp_path) / "annotations" / "val.json"
    path.write_text(path.read_text().replace('"potted plant"', '"plant"'))
    with refused("no category 'potted plant' to be novel"):
        open_detection("coco", tmp_path, part="test")


@pytest.fixture
def own(tmp_path):
    """Pets: one's own data, whose two files number their categories differently."""
    box = {"image_id": 1, "bbox": [1, 2, 30, 40]}
    write_coco(
        *(tmp_path / "pets" / "train.json", [(1, "a.png", 64, 64)]),
        [{**box, "category_id": 1}, {**box, "category_id": 3}, {**box, "category_id": 2}],
        {1: "cat", 2: "dog", 3: "axolotl"},
    )
    write_coco(
        *(tmp_path / "pets" / "test.json", [(1, "a.png", 64, 64)]),
        [{**box, "category_id": 1}],
        {2: "cat", 1: "dog", 3: "axolotl"},
    )
    (tmp_path / "pets" / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pets" / "images" / "a.png")
    return tmp_path


def test_own_data(own):
    train, test = (
        open_detection("pets", own, part=part, novel=["cat"]) for part in ("train", "test")
    )
    assert train.classes == test.classes == ["axolotl", "dog", "cat"] and train.novel == ["cat"]
    assert train.name == "pets" and train.image(0).shape == (3, 64, 64)
    assert train.records[0].labels.tolist() == [2, 0, 1] and test.records[0].labels.tolist() == [1]
    # each part's own numbers, which a user's tools know
    assert train.category_ids == {"cat": 1, "dog": 2, "axolotl": 3}
    assert test.category_ids == {"cat": 2, "dog": 1, "axolotl": 3}
    assert train.records[0].image_id == 1 and train.records[0].id == "a.png"
    assert (
        train.notes
        == test.notes
        == [
            f"{own / 'pets'}: laid out as COCO (train.json; test.json), pictures: 1 to train on, 1 to test on",
            "objects to train on + to test on: axolotl 1 + 0, cat 1 + 0, dog 1 + 1",
        ]
    )
    single = open_detection(str(own / "pets" / "train.json"), "elsewhere", part="test")
    assert single.classes == ["axolotl", "cat", "dog"] and "one file" in single.notes[2]


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_names_and_numbers_of_own_data_are_kept(own):
    """Blanks and umlauts in names, ids of text, numbers with gaps, a byte order mark, sizes as
    floats.
    """
    (own / "pets" / "images" / "a.png").rename(own / "pets" / "images" / "größe 1.png")

    def change(content):
        content["images"][0].update(id="0012", file_name="größe 1.png", width=64.0)
        content["categories"] = [
            {"id": 70, "name": "weißer Hai"},
            {"id": 5, "name": "Bär"},
            {"id": 9, "name": "cat"},
        ]
        for annotation, category in zip(content["annotations"], (70, 5, 9)):
            annotation.update(image_id="0012", category_id=category)
        content["annotations"] = content["annotations"][:3]

    for part in ("train", "test"):
        path = own / "pets" / f"{part}.json"
        change_json(path, change)
        path.write_text(path.read_text().encode().decode("unicode_escape"), encoding="utf-8-sig")
    opened = open_detection("pets", own, part="train", novel=["weißer Hai"])
    assert opened.classes == ["Bär", "cat", "weißer Hai"] and opened.image(0).shape == (3, 64, 64)
    assert [opened.classes[i] for i in opened.records[0].labels] == ["weißer Hai", "Bär", "cat"]
    assert opened.category_ids == {"Bär": 5, "cat": 9, "weißer Hai": 70}
    assert opened.records[0].image_id == "0012" and opened.records[0].id == "größe 1.png"


def test_what_is_left_out_of_own_data_is_noted(own):
    box = {"image_id": 1, "category_id": 1}
    more = [
        {"bbox": [70, 0, 9, 9]},
        {"bbox": [0, 70, 9, 9]},
        {"bbox": [5, 5, 0.5, 9]},
        {"bbox": [5, 5, 9, 9], "ignore": 1},
        {"bbox": [-3, 5, 9, 9], "area": None},
        {"bbox": [50, 50, 14.3, 14]},  # rounding
    ]
    change_json(
        own / "pets" / "train.json", lambda c: c["annotations"].extend({**box, **m} for m in more)
    )
    opened = open_detection("pets", own, part="train")
    assert len(opened.records[0].boxes) == 5
    assert [note.split("train.json: ")[1] for note in opened.notes[2:]] == [
        "boxes outside their picture, left out: 2 (first: a.png)",
        "boxes smaller than a pixel, left out: 1 (first: a.png)",
        "boxes marked ignore, left out: 1 (first: a.png)",
        "boxes that reach beyond their picture, cut off there in training: 1 (first: a.png)",
    ]


NUMBERS = [
    "abcd",
    [1, 2, 3],
    [1, 2, "3", 4],
    [1, 2, [3], 4],
    [1, 2, 3, float("nan")],
    [1, 1e300, 3, 4],
    {},
]
BOXES, IMAGES, CLASSES = "annotations", "images", "categories"


@pytest.mark.parametrize(
    ("kind", "number", "change", "words"),
    [
        *((BOXES, 0, {"bbox": v}, ["annotation 1 of image 1", "bbox"]) for v in NUMBERS),
        *(
            (IMAGES, 0, {"width": v}, ["entry 0 of 'images'", "width"])
            for v in (0, -5, "64", None, [64], 64.5, float("inf"))
        ),
        (BOXES, 0, {"area": "big"}, ["annotation 1", "area 'big'"]),
        (BOXES, 0, {"image_id": [1]}, ["annotation 1", "image [1]"]),
        (BOXES, 0, {"category_id": {}}, ["annotation 1", "category {}"]),
        (BOXES, 0, {"bbox": [5, 5, 0, 10]}, ["annotation 1", "[5, 5, 0, 10]"]),
        (BOXES, 1, "bbox", ["annotation 2", "bbox"]),
        (BOXES, 2, {"image_id": 7}, ["annotation 3", "image 7"]),
        (IMAGES, 0, {"id": [1]}, ["entry 0 of 'images'", "'id'"]),
        (IMAGES, 0, {"file_name": 5}, ["entry 0 of 'images'", "file_name"]),
        (IMAGES, 0, {"file_name": "../a.png"}, ["entry 0 of 'images'", "leads out"]),
        (IMAGES, 0, {"file_name": "b.png"}, ["b.png"]),
        (IMAGES, 0, "width", ["width"]),
        (CLASSES, 1, {"id": "2"}, ["entry 1 of 'categories'", "'id'"]),
        (CLASSES, 1, {"id": 1}, ["category id 1", "2 times"]),
        (CLASSES, 1, {"name": None}, ["entry 1 of 'categories'", "name"]),
        (CLASSES, 1, {"name": "cat"}, ["category 'cat'", "2 times"]),
    ],
)
def test_mistakes_in_an_entry_of_own_data_are_named(own, kind, number, change, words):
    def made(content):
        if isinstance(change, dict):
            content[kind][number].update(change)
        else:
            content[kind][number].pop(change)

    change_json(own / "pets" / "train.json", made)
    with refused("train.json", *words):
        open_detection("pets", own, part="train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[IMAGES].append(c[IMAGES][0]), ["train.json", "image id '1'", "2 times"]),
        (
            lambda c: c[IMAGES].append({**c[IMAGES][0], "id": 2}),
            ["train.json", "picture 'a.png'", "2 times"],
        ),
        *(
            (
                lambda c, k=k: c[k].insert(0, "nothing"),
                ["train.json", f"entry 0 of {k!r}", "no object", "nothing"],
            )
            for k in (IMAGES, CLASSES, BOXES)
        ),
        (lambda c: c[CLASSES].append({"id": 9, "name": "emu"}), ["test.json", "emu"]),
        (lambda c: c.pop(CLASSES), ["train.json", "categories"]),
    ],
)
def test_mistakes_in_own_data_are_named(own, change, words):
    change_json(own / "pets" / "train.json", change)
    with refused(*words):
        open_detection("pets", own, part="train")


def test_unknown_novel_class_and_broken_json_are_named(own):
    with refused("unicorn", "pets"):
        open_detection("pets", own, part="train", novel=["unicorn"])
    for content, words in (
        (b"{", "not json"),
        (b"[" * 100000, "not json"),
        ("{}".encode("utf-16"), "UTF-8"),
    ):
        (own / "pets" / "train.json").write_bytes(content)
        with refused("train.json", words):
            open_detection("pets", own, part="train")


def test_glyph_splits_permute_labels_of_the_same_scenes():
    first, third = (open_detection("glyphs", "", part="test", split=split) for split in (1, 3))
    assert (
        len(first) == 500
        and len(first.novel) == len(third.novel) == 5
        and first.classes != third.classes
    )
    assert first.classes[15:] == first.novel and sorted(first.classes) == sorted(third.classes)
    assert not set(first.novel) & set(third.novel)
    for a, b in zip(first.records[:20], third.records[:20]):
        assert a.id == b.id and np.array_equal(a.boxes, b.boxes)
        assert [first.classes[i] for i in a.labels] == [third.classes[i] for i in b.labels]
    scene = glyphs.scene(range(20), 0, 3007, 160)  # test scenes follow the 3000 of training
    assert torch.equal(third.image(7), torch.from_numpy(scene.draw()).permute(2, 0, 1))
    assert [third.classes[i] for i in third.records[7].labels] == [
        f"glyph-{i:02d}" for i in scene.labels
    ]


# pictures to batches


def plain_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centres, edges repeated, no antialiasing: what OpenCV's INTER_LINEAR computes."""

    def axis(new: int, old: int):
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, old - 1), place - low

    y0, y1, fy = axis(height, image.shape[1])
    x0, x1, fx = axis(width, image.shape[2])
    fy = fy[:, None]
    top = image[:, y0][:, :, x0] * (1 - fx) + image[:, y0][:, :, x1] * fx
    low = image[:, y1][:, :, x0] * (1 - fx) + image[:, y1][:, :, x1] * fx
    return top * (1 - fy) + low * fy


@pytest.fixture(scope="module")
def scenes() -> DetectionSet:
    return open_detection("glyphs", "", part="test")


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((375, 500), (800, 1333), (800, 1067)),
        ((333, 500), (600, 1000), (600, 901)),
        ((200, 500), (600, 1000), (400, 1000)),  # the longer side is what limits
        ((500, 281), (800, 1333), (1333, 749)),
    ],
)
def test_resize_keeps_the_ratio(tmp_path, size, limits, expected):
    Image.new("RGB", size[::-1]).save(tmp_path / "a.png")
    box = (-3, 10, size[1] / 2, size[0] + 7)
    record = make_record("a", tmp_path / "a.png", *size[::-1], [(box, 0, False), (box, 0, True)])
    sample = Pipeline(*limits).sample(DetectionSet("x", "test", ["c"], [], [record], "voc"), 0)
    assert sample.image.shape == (3, *expected)
    y, x = expected[0] / size[0], expected[1] / size[1]
    assert torch.allclose(sample.scale, torch.tensor([x, y]))
    assert torch.allclose(
        sample.boxes, torch.tensor([[0, 10 * y, size[1] / 2 * x, expected[0]]]), atol=1e-3
    )


@pytest.mark.parametrize("side", [97, 320])
def test_resize_is_plain_bilinear(scenes, side):
    sample = Pipeline(side).sample(scenes, 0)
    expected = plain_bilinear(scenes.image(0).numpy().astype(float), side, side)
    assert np.abs(sample.image.numpy() - expected).max() <= 1  # a grey level


def test_training_draws_a_size_and_a_side(scenes):
    pipeline, still = Pipeline((100, 200, 300), 1000, flip=True), Pipeline((100, 200, 300), 1000)
    seen = set()
    for seed in range(40):
        sample = pipeline.sample(scenes, 3, np.random.default_rng(seed))
        plain = still.sample(scenes, 3, np.random.default_rng(seed))
        width = sample.image.shape[-1]
        assert width == plain.image.shape[-1]
        flipped = torch.equal(sample.image, plain.image.flip(-1))
        assert flipped or torch.equal(sample.image, plain.image)
        x1, y1, x2, y2 = plain.boxes.unbind(1)
        mirrored = torch.stack([width - x2, y1, width - x1, y2], 1)
        assert torch.equal(sample.boxes, mirrored if flipped else plain.boxes)
        seen.add((width, flipped))
    assert seen == {(side, flipped) for side in (100, 200, 300) for flipped in (False, True)}
    tested = pipeline.sample(scenes, 3)
    assert tested.image.shape == (3, 300, 300) and torch.equal(
        tested.image, Pipeline(300).sample(scenes, 3).image
    )


def test_padding_is_zero_after_normalisation(voc):
    write_voc(voc, "VOC2007", "test", {"000005": [("dog", 11, 20, 50, 60, 0)]}, size=(60, 130))
    (voc / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_text("000005\n000006\n")
    opened = open_detection("voc", voc, part="test")
    batch = next(pipeline.test_loader(opened, Pipeline(multiple=32), Feed(), CAFFE, batch_size=2))
    assert batch.images.shape == (2, 3, 160, 128) and batch.images.dtype == torch.float32
    assert batch.sizes == [(130, 60), (80, 100)] and batch.scales.eq(1).all()
    before = pipeline.collate([Pipeline().sample(opened, i) for i in (0, 1)], 32)
    assert before.images.shape == batch.images.shape and before.images.dtype == torch.uint8
    assert torch.equal(before.normalised(CAFFE).images, batch.images)
    for image, index in zip(batch.images, (0, 1)):
        alone = CAFFE(opened.image(index))
        height, width = alone.shape[-2:]
        assert torch.equal(image[:, :height, :width], alone)
        image[:, :height, :width] = 0
        assert not image.any()


def stream_of(dataset, extra=None, **feed):
    feed = Feed(**{"seed": 5, "steps": 6} | feed)
    return list(
        pipeline.train_loader(
            dataset, Pipeline((40, 60, 80), flip=True), feed, CAFFE, batch_size=4, extra=extra
        )
    )


def same(a: pipeline.Batch, b: pipeline.Batch) -> bool:
    tensors = [a.images, *a.boxes, *a.labels, a.scales], [b.images, *b.boxes, *b.labels, b.scales]
    return a.ids == b.ids and a.sizes == b.sizes and all(map(torch.equal, *tensors))


def test_training_stream_resumes_and_is_split_among_processes(scenes):
    scenes = scenes.with_records(scenes.records[:9])
    straight = stream_of(scenes)
    assert len(straight) == 6
    assert all(map(same, straight[4:], stream_of(scenes, start=4)))
    assert all(map(same, straight, stream_of(scenes, workers=2)))
    assert not same(straight[0], stream_of(scenes, seed=6)[0])
    halves = [stream_of(scenes, rank=rank, world=2) for rank in (0, 1)]
    for whole, even, odd in zip(straight, *halves):
        assert whole.ids[0::2] == even.ids and whole.ids[1::2] == odd.ids
        assert torch.equal(whole.scales[0::2], even.scales) and torch.equal(
            whole.boxes[1], odd.boxes[0]
        )
    ids = [id for batch in straight for id in batch.ids]
    every = sorted(r.id for r in scenes.records)
    assert (
        sorted(ids[:9]) == sorted(ids[9:18]) == every and ids[:9] != ids[9:18]
    )  # an epoch is a permutation
    with refused("4", "3 processes"):
        stream_of(scenes, world=3)
    with refused("glyphs", "no picture"):
        stream_of(scenes.with_records([]))


def test_loaders_draw_nothing_from_the_global_streams(scenes):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    stream_of(scenes, steps=2)
    list(pipeline.test_loader(scenes.with_records(scenes.records[:3]), Pipeline(), Feed(), CAFFE))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(
        before[1], np.random.get_state()[1]
    )


class Extra(NamedTuple):
    """Stands for a support batch that records what it was asked for."""

    seed: int
    step: int
    normalisation: object = None

    def normalised(self, normalisation):
        return self._replace(normalisation=normalisation)


@pytest.mark.parametrize("workers", [0, 1])
def test_extras_come_with_their_step(scenes, workers):
    pairs = stream_of(scenes, start=2, steps=4, extra=Extra, workers=workers)
    assert [extra for _, extra in pairs] == [(5, 2, CAFFE), (5, 3, CAFFE)]
    assert all(
        same(batch, alone) for (batch, _), alone in zip(pairs, stream_of(scenes, start=2, steps=4))
    )


def test_testing_covers_every_picture_once(scenes):
    scenes = scenes.with_records(scenes.records[:7])

    def tested(rank, world):
        feed = Feed(rank=rank, world=world)
        return [b.ids for b in pipeline.test_loader(scenes, Pipeline(), feed, CAFFE, batch_size=2)]

    parts = [tested(rank, 3) for rank in range(3)]
    ids = [r.id for r in scenes.records]
    assert parts == [[[ids[0], ids[3]], [ids[6]]], [[ids[1], ids[4]]], [[ids[2], ids[5]]]]
    assert tested(7, 8) == []


# real data


@needs_real
def test_real_voc():
    train, test = (open_detection("voc", REAL, part=part) for part in ("train", "test"))
    assert (len(train), len(test)) == (384, 372) and "VOC2012" in train.notes[0]
    records = train.records + test.records
    assert (
        sum(len(r.labels) for r in records) == 1994
        and sum(r.difficult.sum() for r in records) == 340
    )
    for opened, least in ((train, 22), (test, 18)):
        assert (
            np.bincount(np.concatenate([r.labels for r in opened.records]), minlength=20).min()
            == least
        )
    first = train.records[0]
    assert first.id == "VOC2007/2007_000027" and first.boxes.tolist() == [[173, 100, 349, 351]]
    for index in range(0, 384, 60):
        record, image = train.records[index], train.image(index)
        assert image.shape == (3, record.height, record.width) and image.dtype == torch.uint8
    base = train.restrict(train.base)
    assert base.classes == train.base and len(base) < 384
    ordinary = [(r.labels < 15) & ~r.difficult for r in train.records]
    assert sum((~r.difficult).sum() for r in base.records) == sum(map(np.sum, ordinary))


def test_batches_grouped_by_aspect_ratio():
    """Every batch is of one kind, every picture comes once in an epoch but those that fill a batch
    up.
    """
    wide = bytes(i % 3 != 0 for i in range(50))  # 33 wide ones, 17 tall ones
    shuffle = pipeline.Shuffle(50, wide, 4)
    epoch = (9 + 5) * 4
    for first in (0, epoch):
        order = [shuffle.picture(0, i) for i in range(first, first + epoch)]
        assert all(len({wide[i] for i in order[b : b + 4]}) == 1 for b in range(0, epoch, 4))
        counts = np.bincount(order, minlength=50)
        assert counts.min() == 1 and counts.sum() == epoch and counts.max() == 2
    assert (
        [shuffle.picture(0, i) for i in range(epoch)]
        != order
        != [shuffle.picture(1, i) for i in range(epoch)]
    )
    kinds = [wide[shuffle.picture(0, b)] for b in range(0, epoch, 4)]
    assert kinds != sorted(kinds)  # both kinds in turn
    plain = pipeline.Shuffle(50)
    assert sorted(plain.picture(0, i) for i in range(50)) == list(range(50))


def test_a_loader_groups_when_asked():
    whole = detection.open_detection("glyphs", "", part="train")
    records = [replace(r, width=160 + 20 * (i % 2)) for i, r in enumerate(whole.records[:12])]
    records = [replace(r, height=170) for r in records]
    some = whole.with_records(records)
    tall = {r.id for r in records if r.width < r.height}
    for group in (True, False):
        loader = pipeline.train_loader(
            some, Pipeline(), Feed(steps=8), CAFFE, batch_size=3, group=group
        )
        mixed = [len({id in tall for id in batch.ids}) == 2 for batch in loader]
        assert any(mixed) != group
