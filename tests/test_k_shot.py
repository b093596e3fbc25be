"""K shots of every class: what is drawn, what lists and files hold, which mistakes in them are
named.
"""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewshot import InputError
from fewshot.data import detection, k_shot
from fewshot.data.annotations import make_record
from fewshot.data.detection import DetectionSet, objects_by_class
from fewshot.training.folders import write_json

REAL = Path(__file__).parents[1] / ".." / "shared" / "data"
needs_lists = pytest.mark.skipif(
    not (REAL / "splits" / "vocsplit").is_dir(), reason="published lists are not here"
)


def reference_shots(dataset, shots: int, seed: int = 42):
    """The shots that mmfewshot draws from a whole training part, `seed` being its global one."""
    objects = objects_by_class(dataset)
    picks = sorted(k_shot._draw_like_reference(dataset, objects, shots, seed))
    chosen = [(dataset.records[position], i) for position, i in picks]
    return k_shot._noted(k_shot._merged(dataset, chosen), shots)


def toy(counts: dict[str, int], novel=(), per_picture: int = 2) -> DetectionSet:
    """A set with so many objects of each class, dealt in turn to pictures of two; every fifth
    object is difficult.
    """
    left, objects = dict(counts), []
    while any(left.values()):
        for label, name in enumerate(counts):
            if left[name]:
                left[name] -= 1
                n = len(objects)
                objects.append(((n, n, n + 20, n + 30), label, False))
                if n % 5 == 0:
                    objects.append(((n, n, n + 9, n + 9), label, True))
    records = [
        make_record(f"p{i}", "", 200, 200, objects[i : i + per_picture])
        for i in range(0, len(objects), per_picture)
    ]
    return DetectionSet("toy", "train", list(counts), list(novel), records, "voc")


def pictures(
    classes: str, objects: dict[str, list[tuple]], folder: str = "", **about
) -> DetectionSet:
    """A set of 100 x 80 pictures by id, with (class, x1, y1, x2, y2, difficult) objects; paths are
    folder and id.
    """
    names, records = classes.split(), []
    for id, on in objects.items():
        rows = [(box, names.index(name), bool(difficult)) for name, *box, difficult in on]
        records.append(make_record(id, folder and f"{folder}/{id}", 100, 80, rows))
    return DetectionSet("ours", "train", names, [], records, "coco", **about)


def boxes_of(dataset: DetectionSet, name: str) -> set[tuple]:
    label = dataset.classes.index(name)
    return {(r.id, *box) for r in dataset.records for box in r.boxes[r.labels == label].tolist()}


def objects_of(dataset: DetectionSet) -> set[tuple]:
    return {(name, *rest) for name in dataset.classes for rest in boxes_of(dataset, name)}


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text, text
    for word in words:
        assert word in text, text


# drawn


def test_every_class_gets_k_shots_or_what_it_has():
    dataset = toy({"a": 9, "b": 7, "c": 30})
    for shots in (1, 5, 7):
        chosen = k_shot.select_shots(dataset, shots, seed=0)
        assert k_shot.counts(chosen) == [shots] * 3 and not chosen.notes
        assert not any(r.difficult.any() for r in chosen.records)
        ids = [int(r.id[1:]) for r in chosen.records]
        assert ids == sorted(set(ids))  # pictures once each, in the set's order
        assert objects_of(chosen) <= objects_of(dataset)
    assert sum(k_shot.counts(dataset)) > 46  # the set itself is left as it was
    many = k_shot.select_shots(replace(dataset, notes=["of old"]), 9, seed=0)
    assert k_shot.counts(many) == [9, 7, 9] and many.notes == [
        "of old",
        "class b has only 7 of 9 shots",
    ]
    every = k_shot.select_shots(dataset, 1000, seed=0)
    assert k_shot.counts(every) == [9, 7, 30] and len(every.notes) == 3
    assert objects_of(every) == objects_of(k_shot.select_shots(dataset, "all", seed=0))


def test_all_is_whatever_may_be_trained_on():
    dataset = toy({"a": 9, "b": 7, "c": 30})
    chosen = k_shot.choose_shots(dataset, "all", seed=0)
    assert k_shot.counts(chosen) == [9, 7, 30] and chosen.cut_to_shots and not chosen.notes
    assert not any(r.difficult.any() for r in chosen.records) and all(
        len(r.labels) for r in chosen.records
    )
    kept = k_shot.choose_shots(replace(dataset, train_difficult=True), "all", seed=0)
    assert objects_of(kept) == objects_of(dataset) > objects_of(chosen)


@pytest.mark.parametrize("shots", [0, -3])
def test_less_than_one_shot_is_refused(shots):
    with pytest.raises(InputError) as error:
        k_shot.choose_shots(toy({"a": 9}), shots, seed=0)
    one_line(error, f"--shots {shots}", "all")


@pytest.mark.parametrize("shots", [1, "all"])
def test_a_class_without_objects_is_named(shots):
    dataset = pictures("cat dog", {"1.jpg": [("cat", 1, 1, 30, 30, 0), ("dog", 1, 1, 30, 30, 1)]})
    with pytest.raises(InputError) as error:  # its only object is difficult
        k_shot.choose_shots(dataset, shots, seed=0)
    one_line(error, "ours", "class dog", "annotate some")


def test_shots_of_a_class_depend_on_seed_and_name_alone():
    dataset = toy({"a": 9, "b": 7, "c": 30})
    chosen = k_shot.select_shots(dataset, 3, seed=0)
    assert boxes_of(k_shot.select_shots(dataset, 3, seed=0), "c") == boxes_of(chosen, "c")
    twins = toy({"a": 30, "b": 30})
    few = k_shot.select_shots(twins, 5, seed=0)
    places = detection.objects_by_class(twins)
    a, b = (
        [
            (twins.records[p].id, *twins.records[p].boxes[i].tolist()) in boxes_of(few, name)
            for p, i in places[label]
        ]
        for label, name in enumerate("ab")
    )
    assert sum(a) == sum(b) == 5 and a != b  # classes of one size do not draw the same numbers
    draws = {frozenset(boxes_of(k_shot.select_shots(dataset, 3, seed=s), "c")) for s in range(10)}
    assert len(draws) > 5


@pytest.mark.parametrize("case", range(25))
def test_draws_are_nested_and_independent_of_other_classes(case):
    """Of sets of any make: more shots contain fewer, and a class alone is drawn as among others."""
    dice = np.random.default_rng(case)
    names = [f"class {i}" for i in range(dice.integers(2, 6))]
    dataset = toy(
        {n: int(dice.integers(1, 25)) for n in names}, per_picture=int(dice.integers(1, 5))
    )
    seed = int(dice.integers(1000))
    draws = [k_shot.select_shots(dataset, k, seed) for k in (1, 2, 3, 5, 10, 30)]
    for fewer, more in itertools.pairwise(draws):
        assert objects_of(fewer) <= objects_of(more)
    subset = [n for n in names if dice.random() < 0.5] or names[:1]
    for k, whole in ((3, draws[2]), (10, draws[4])):
        alone = k_shot.select_shots(dataset.restrict(subset[::-1]), k, seed)
        assert all(boxes_of(alone, name) == boxes_of(whole, name) for name in subset)
    assert k_shot.counts(draws[3]) == [min(5, n) for n in k_shot.counts(draws[-1])]


def test_glyphs_are_drawn_as_ever():
    """What finished runs were fine-tuned on."""
    dataset = detection.open_detection("glyphs", "", part="train", split=1)
    chosen = k_shot.select_shots(dataset, 2, seed=0)
    assert [int(r.id[7:]) for r in chosen.records][:8] == [21, 247, 257, 462, 478, 586, 631, 647]


# as the reference draws


def test_reference_draw_is_the_global_legacy_generators():
    dataset = toy({"a": 12, "b": 2, "n": 5, "m": 7}, novel=["n", "m"])
    chosen = reference_shots(dataset, 3)
    np.random.seed(
        42
    )  # as the reference does: one choice per class with too many, novel classes first
    for name, count in (("n", 5), ("m", 7), ("a", 12)):
        label = dataset.classes.index(name)
        ordinary = [r.select((r.labels == label) & ~r.difficult) for r in dataset.records]
        every = [(r.id, *box) for r in ordinary for box in r.boxes.tolist()]
        assert len(every) == count
        assert boxes_of(chosen, name) == {
            every[i] for i in np.random.choice(count, 3, replace=False)
        }
    assert len(boxes_of(chosen, "b")) == 2 and chosen.notes == ["class b has only 2 of 3 shots"]
    # a golden number: seed 42 draws number 1 of five first, which in a toy is the box that starts
    # at 2
    first = reference_shots(toy({"n": 5}, novel=["n"], per_picture=1), 1)
    assert first.records[0].boxes[0, 0] == 2


# published lists


def voc_like() -> DetectionSet:
    dogs = {
        f"VOC2007/00000{i}": [("dog", i, i, 50, 50, 0), ("dog", 20 + i, 1, 60, 60, 0)]
        for i in range(1, 4)
    }
    cats = {
        "VOC2007/000009": [("cat", 1, 1, 30, 30, 0)],
        "VOC2012/2008_000001": [("cat", 5, 5, 40, 40, 0)],
    }
    # difficult objects alone: never trained on, but listed
    return pictures("cat dog", dogs | cats, skipped=frozenset({"VOC2007/000008"}))


def test_published_voc_lists(tmp_path):
    dataset = voc_like()
    lists = tmp_path / "lists" / "benchmark_2shot"
    lists.mkdir(parents=True)
    dogs, cats = lists / "box_2shot_dog_train.txt", lists / "box_2shot_cat_train.txt"
    dogs.write_text("datasets/VOC2007/JPEGImages/000003.jpg\nVOC2007/JPEGImages/000001.jpg\n")
    cats.write_text("VOC2012/JPEGImages/2008_000001.jpg\n\nVOC2007/JPEGImages/000008.jpg\n")
    chosen = k_shot.choose_shots(dataset, 2, 42, tmp_path / "lists")
    # pictures by class, then line; of four dogs two as the reference draws them
    drawn = sorted(np.random.RandomState(42).choice(4, 2, replace=False))
    listed = [
        (f"VOC2007/{id}", *box)
        for id in ("000003", "000001")
        for box in dataset.records[int(id) - 1].boxes.tolist()
    ]
    assert boxes_of(chosen, "dog") == {listed[i] for i in drawn}
    assert chosen.records[0].id == "VOC2012/2008_000001"
    assert boxes_of(chosen, "cat") == {("VOC2012/2008_000001", 5, 5, 40, 40)}
    assert chosen.notes == ["class cat has only 1 of 2 shots"]
    for text, words in [
        ("VOC2007/JPEGImages/000777.jpg", ["dog_train.txt", "000777"]),
        ("VOC2007/JPEGImages/000009.jpg", ["dog_train.txt", "no dog", "000009"]),
        ("/VOC2007/JPEGImages/000001.jpg", ["dog_train.txt", "leads out"]),
        ("../VOC2007/JPEGImages/000001.jpg", ["dog_train.txt", "leads out"]),
        ("", ["dog_train.txt", "no dog"]),
    ]:
        dogs.write_text(text)
        with pytest.raises(InputError) as error:
            k_shot.read_shot_lists(dataset, tmp_path / "lists", 2)
        one_line(error, *words)
    with pytest.raises(InputError) as error:
        k_shot.choose_shots(dataset, 3, 0, tmp_path / "lists")
    one_line(error, "box_3shot_cat_train.txt", "lists", "--shot-lists", "--shots")
    (lists / "full_box_2shot_cat_trainval.json").write_text("{}")
    with pytest.raises(InputError) as error:  # which is meant?
        k_shot.choose_shots(dataset, 2, 0, tmp_path / "lists")
    one_line(error, "both", "box_2shot_cat_train.txt", "full_box_2shot_cat_trainval.json")


def test_published_coco_lists(tmp_path):
    records = {"139": [("bottle", 1, 1, 9, 9, 0)], "42": [("bottle", 1, 1, 9, 9, 0)]}
    dataset = pictures("bottle plant", records)
    for record in dataset.records:
        record.path, record.image_id = (
            f"data/coco/train2014/COCO_train2014_{int(record.id):012}.jpg",
            int(record.id),
        )
    image = {"id": 42, "file_name": "COCO_train2014_000000000042.jpg", "width": 100, "height": 80}
    for name in dataset.classes:
        box = {"id": 1, "image_id": 42, "category_id": 5, "bbox": [1, 2, 30, 40], "area": 5}
        content = {"images": [image], "annotations": [box, box | {"category_id": 6}]}
        content["categories"] = [{"id": 5, "name": name}, {"id": 6, "name": "tv"}]
        (tmp_path / f"full_box_10shot_{name}_trainval.json").write_text(json.dumps(content))
    chosen = k_shot.read_shot_lists(dataset, tmp_path, 10)
    assert (
        len(chosen) == 1
        and chosen.records[0].path == dataset.records[1].path
        and chosen.records[0].id == "42"
    )
    assert (
        chosen.records[0].labels.tolist() == [0, 1]
        and chosen.records[0].boxes.tolist() == [[1, 2, 31, 42]] * 2
    )


def own_pictures() -> DetectionSet:
    """As one's own are known: by their path in their folder. One of a name is in two folders."""
    objects = {
        f"shelf {i}/cup.jpg": [("cup", i, 1.25, 40, 30.7, 0), ("pot", 50, i, 90, 60, 0)]
        for i in range(4)
    }
    objects["cup.jpg"] = [("cup", 3, 3, 9, 9, 0), ("cup", 1, 1, 9, 9, 1)]
    dataset = pictures("cup pot", objects, "in/x")
    return replace(dataset, classes=["cup", "tea pot"])


@pytest.mark.parametrize("layout", ["txt", "coco"])
@pytest.mark.parametrize("shots", [1, 3, 4, "all"])
@pytest.mark.parametrize("kind", ["own", "own numbered", "voc", "coco", "glyphs"])
def test_lists_are_read_as_written(tmp_path, kind, shots, layout):
    dataset = own_pictures()
    if (
        kind == "own numbered"
    ):  # as from a json of one's own, which another export numbers otherwise
        numbered = [replace(r, image_id=7 + i) for i, r in enumerate(dataset.records)]
        dataset = replace(dataset, category_ids={"cup": 3, "tea pot": 1}).with_records(numbered)
    if kind == "voc":
        dataset = voc_like()
        dataset = dataset.with_records([r.select(r.labels.argsort()[:1]) for r in dataset.records])
        for record in dataset.records:
            record.path = "data/VOCdevkit/{}/JPEGImages/{}.jpg".format(*record.id.split("/"))
    if kind == "coco":
        dataset = dataset.with_records(
            [replace(r, id=str(i), image_id=i) for i, r in enumerate(dataset.records, 138)]
        )
        for record in dataset.records:
            record.path = f"data/coco/train2014/COCO_train2014_{record.image_id:012}.jpg"
    if kind == "glyphs":
        dataset = dataset.with_records(
            [
                replace(r, id=f"glyphs/000{i}", path="", scene=i)
                for i, r in enumerate(dataset.records)
            ]
        )
    chosen = k_shot.choose_shots(dataset, shots, seed=0)
    for name, content in k_shot.lists_of(chosen, shots, layout).items():
        (tmp_path / name).write_text(content)
    if kind == "own numbered":
        dataset = dataset.with_records(
            [replace(r, image_id=50 - i) for i, r in enumerate(dataset.records)]
        )
    read = k_shot.choose_shots(dataset, shots, 5, tmp_path)
    assert objects_of(read) == objects_of(chosen) and read.notes == chosen.notes
    paths = {r.id: (r.path, r.scene) for r in dataset.records}
    assert all((r.path, r.scene) == paths[r.id] for r in read.records)


def test_lists_look_as_published(tmp_path):
    dataset = voc_like()
    for record in dataset.records:
        record.path = "data/VOCdevkit/{}/JPEGImages/{}.jpg".format(*record.id.split("/"))
    lists = k_shot.lists_of(k_shot.select_shots(dataset, "all", 0), 30, "txt")
    assert list(lists) == ["box_30shot_cat_train.txt", "box_30shot_dog_train.txt"]
    assert lists["box_30shot_cat_train.txt"] == (
        "datasets/VOC2007/JPEGImages/000009.jpg\ndatasets/VOC2012/JPEGImages/2008_000001.jpg\n"
    )
    assert lists["box_30shot_dog_train.txt"].count("\n") == 3  # pictures of two dogs are named once
    coco = json.loads(k_shot.lists_of(dataset, 7, "coco")["full_box_7shot_cat_trainval.json"])
    assert [image["file_name"] for image in coco["images"]] == ["000009.jpg", "2008_000001.jpg"]
    assert coco["annotations"][1]["bbox"] == [5, 5, 35, 35] and coco["categories"][1] == {
        "id": 2,
        "name": "dog",
    }
    for layout in ("txt", "coco"):
        with pytest.raises(InputError) as error:
            k_shot.lists_of(replace(dataset, classes=["cat", "../dog"]), 7, layout)
        one_line(error, "'../dog'", "json")


def test_txt_lists_do_not_tell_the_objects_of_a_picture(tmp_path):
    dataset = voc_like()
    chosen = k_shot.select_shots(dataset, 1, seed=0)
    for name, content in k_shot.lists_of(chosen, 1, "txt").items():
        (tmp_path / name).write_text(content)
    [(picture, *_)] = boxes_of(chosen, "dog")
    read = [
        box
        for seed in range(9)
        for box in boxes_of(k_shot.choose_shots(dataset, 1, seed, tmp_path), "dog")
    ]
    assert {id for id, *_ in read} == {picture} and len(set(read)) == 2


def listed_everywhere(split: Path) -> tuple[DetectionSet, int]:
    """Every picture of the published 3-shot lists, with three objects of each class that lists it."""
    objects: dict[str, list[tuple]] = {}
    for path in sorted(split.glob("box_3shot_*_train.txt")):
        for year, stem in re.findall(r"(VOC20\d\d)/JPEGImages/(\S+)\.jpg", path.read_text()):
            name = path.name.split("_")[2]
            objects.setdefault(f"{year}/{stem}", []).extend(
                (name, n, 1, 40 + n, 40, 0) for n in range(3)
            )
    classes = {name: None for on in objects.values() for name, *_ in on}
    return pictures(" ".join(classes), objects), len(classes)


@needs_lists
@pytest.mark.parametrize("seed", ["", "seed1", "seed2"])
def test_real_shot_lists(seed):
    split = REAL / "splits" / "vocsplit" / seed
    dataset, classes = listed_everywhere(split)
    chosen = k_shot.read_shot_lists(dataset, split, 3)
    assert classes == 20 and not chosen.notes and k_shot.counts(chosen) == [3] * 20
    with pytest.raises(InputError) as error:
        k_shot.read_shot_lists(dataset.with_records(dataset.records[1:]), split, 3)
    one_line(error, "box_3shot_aeroplane_train.txt", "JPEGImages", "not in the training data")


# shots.json


def test_shots_survive_saving(tmp_path):
    dataset = toy({"a": 9, "b": 7, "c": 30}, novel=["c"])
    chosen = k_shot.select_shots(dataset, 5, seed=1)
    write_json(tmp_path / "shots.json", k_shot.shots_of(chosen))
    loaded = k_shot.load_shots(tmp_path / "shots.json", dataset.restrict(["c", "a", "b"]))
    assert objects_of(loaded) == objects_of(chosen) and not loaded.notes
    assert [r.id for r in loaded.records] == [r.id for r in chosen.records]
    assert (
        k_shot.files(chosen) == {"shots.json": k_shot.shots_of(chosen)}
        and k_shot.files(dataset) == {}
    )
    assert k_shot.files(loaded)  # what was read is kept too
    moved = k_shot.load_shots(
        tmp_path / "shots.json", replace(dataset, name="zoo")
    )  # the same in another folder
    assert (
        objects_of(moved) == objects_of(chosen)
        and "toy" in moved.notes[0]
        and "zoo" in moved.notes[0]
    )
    for other, words in [
        (dataset.restrict(["a", "b"]), ["shots.json", "'c'"]),
        (dataset.with_records(dataset.records[:1]), ["shots.json", "picture p"]),
        (toy({"a": 9, "b": 7, "d": 30}), ["shots.json", "toy", "'c'"]),
    ]:
        with pytest.raises(InputError) as error:
            k_shot.load_shots(tmp_path / "shots.json", other)
        one_line(error, *words)


def test_shots_are_drawn_or_given(tmp_path):
    dataset = toy({"a": 9, "b": 7, "c": 30}, novel=["c"])
    drawn = k_shot.choose_shots(dataset, 5, seed=1)
    assert objects_of(drawn) == objects_of(k_shot.select_shots(dataset, 5, seed=1))
    path = tmp_path / "shots.json"
    write_json(path, k_shot.shots_of(drawn))
    for shots in (5, "all"):  # the file counts, not the seed
        given = k_shot.choose_shots(dataset, shots, 2, path)
        assert objects_of(given) == objects_of(drawn) and not given.notes
    for shots, place, words in [
        (3, "shots.json", ["has 5 shots", "--shots 5"]),
        (10, "shots.json", ["has 5 shots", "--shots 5"]),
        (5, "none.json", ["is it there", "--shot-lists"]),
    ]:
        with pytest.raises(InputError) as error:
            k_shot.choose_shots(dataset, shots, 1, tmp_path / place)
        one_line(error, place, *words)
    with pytest.raises(InputError) as error:  # a folder has published lists
        k_shot.choose_shots(dataset, 5, 1, tmp_path)
    one_line(error, "box_5shot_a_train.txt")
    # a run's own file is of its number of shots also where no class has so many
    most = k_shot.choose_shots(dataset, 99, seed=1)
    write_json(path, k_shot.shots_of(most))
    again = k_shot.choose_shots(dataset, 99, 1, path)
    assert (
        objects_of(again) == objects_of(most) and again.notes == most.notes and len(most.notes) == 3
    )


DOG = {"id": "1.jpg", "boxes": [[1, 2, 30, 40]], "classes": ["dog"]}
CAT = {"id": "2.jpg", "boxes": [[1, 2, 30, 40], [5, 5, 9.5, 9]], "classes": ["cat", "cat"]}


def test_a_shots_json_by_hand(tmp_path):
    dataset = pictures("cat dog", {f"{i}.jpg": [] for i in (1, 2)})
    write_json(
        tmp_path / "s.json", {"dataset": "ours", "classes": ["dog", "cat"], "pictures": [DOG, CAT]}
    )
    assert objects_of(k_shot.load_shots(tmp_path / "s.json", dataset)) == {
        ("dog", "1.jpg", 1, 2, 30, 40),
        ("cat", "2.jpg", 1, 2, 30, 40),
        ("cat", "2.jpg", 5, 5, 9.5, 9),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([], ["not a file of shots"]),
        ("shots", ["not a file of shots"]),
        ({"dataset": 3}, ["not a file of shots"]),
        ({"classes": None}, ["not a file of shots"]),
        ({"classes": [["dog"], "cat"]}, ["not a file of shots"]),
        ({"pictures": {"1.jpg": DOG}}, ["not a file of shots"]),
        ({"classes": ["dog"]}, ["'cat'"]),
        ({"pictures": [DOG, CAT, 5]}, ["entry 2", "5"]),
        ({"pictures": [DOG, CAT, None]}, ["entry 2"]),
        ({"pictures": [DOG, {"id": "2.jpg"}]}, ["entry 1", "boxes"]),
        ({"pictures": [DOG, CAT | {"id": ["2.jpg"]}]}, ["entry 1", "id"]),
        ({"pictures": [DOG, CAT | {"id": 2}]}, ["entry 1", "id"]),
        ({"pictures": [DOG, CAT | {"id": "3.jpg"}]}, ["3.jpg", "not in the train part of ours"]),
        ({"pictures": [DOG, CAT, DOG]}, ["entry 2", "1.jpg", "twice"]),
        (
            {"pictures": [DOG, CAT | {"classes": ["cat"]}]},
            ["entry 1", "2.jpg", "class for each box"],
        ),
        ({"pictures": [DOG, CAT | {"classes": "ca"}]}, ["entry 1", "classes"]),
        ({"pictures": [DOG, CAT | {"classes": [0, 1]}]}, ["entry 1", "classes"]),
        ({"pictures": [DOG, CAT | {"classes": ["cat", "cow"]}]}, ["entry 1", "'cow'"]),
        ({"pictures": [DOG, CAT | {"boxes": 5}]}, ["entry 1", "boxes"]),
        ({"pictures": [DOG | {"boxes": [], "classes": []}, CAT]}, ["entry 0", "1.jpg"]),
        ({"pictures": [DOG]}, ["no shot of class cat"]),
        *(
            ({"pictures": [DOG | {"boxes": [box]}, CAT]}, ["entry 0", "[x1, y1, x2, y2]", "1.jpg"])
            for box in (
                *(5, None, "1234", {}, [], [1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3, 4]]),
                *(
                    [1, 2, "30", 40],
                    [1, 2, None, 40],
                    [True, 2, 30, 40],
                    [1, 2, math.nan, 40],
                    [1, 2, math.inf, 40],
                ),
                *(
                    [30, 2, 1, 40],
                    [1, 2, 1, 40],
                    [100, 2, 130, 40],
                    [1, -9, 30, -2],
                    [1, 2, 10**400, 40],
                ),
            )
        ),
    ],
)
def test_mistakes_in_a_shots_json_are_named(tmp_path, change, words):
    dataset = pictures("cat dog", {f"{i}.jpg": [] for i in (1, 2)})
    content = {"dataset": "ours", "classes": ["dog", "cat"], "pictures": [DOG, CAT]}
    (tmp_path / "s.json").write_text(
        json.dumps(content | change if isinstance(change, dict) else change)
    )
    with pytest.raises(InputError) as error:
        k_shot.choose_shots(dataset, "all", 0, tmp_path / "s.json")
    one_line(error, "s.json", *words)
