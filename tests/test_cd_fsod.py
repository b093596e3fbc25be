"""CD-FSOD's six targets in their published layout: what is read, which shots are taken, and a run
of the protocol.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import QUICK, metrics, run_here
from test_results import call, cells
from torchvision.io import write_png

import fewshot
from fewshot import InputError, weights
from fewshot.data import cd_fsod, check, detection, k_shot

CLASSES = ("sheep", "chair", "boat")  # in order of their ids, which the alphabet does not have
PICTURES = 12  # to train on
FOLDERS = [(name, folder) for name, folders in cd_fsod.FOLDERS.items() for folder in folders]


def coco(
    path: Path, objects: dict[int, list[int]], start: int = 1, names: tuple[str, ...] = CLASSES
) -> None:
    """A json of pictures {number: labels of its objects}, each object in a place of its own; ids
    begin at `start`.
    """
    images = [
        {"id": start + i, "file_name": f"{n:03d}.png", "width": 96, "height": 64}
        for i, n in enumerate(objects)
    ]
    boxes = [
        {
            "image_id": image["id"],
            "category_id": label,
            "bbox": [4 + 30 * label, 8, 24, 20],
            "iscrowd": 0,
        }
        for image, labels in zip(images, objects.values())
        for label in labels
    ]
    items = [{"id": i, "area": 480, **box} for i, box in enumerate(boxes, 1)]
    categories = [{"id": label, "name": name} for label, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": items, "categories": categories}))


def published(root: Path, folder: str, inner: bool = False) -> Path:
    """A target of three classes: every picture has an object of each; of 10 shots there are only 7
    boats.
    """
    place = root / folder
    (place / "annotations").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", PICTURES), ("test", 4)):
        pictures = place / part / (f"new_{part}" if inner else "")
        pictures.mkdir(parents=True)
        for number in range(count):
            picture = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=generator)
            write_png(picture, str(pictures / f"{number:03d}.png"))
        coco(place / "annotations" / f"{part}.json", {number: [0, 1, 2] for number in range(count)})
    for shots in (1, 5, 10):
        labels: dict[int, list[int]] = {}
        for label in range(3):
            for i in range(7 if (shots, label) == (10, 2) else shots):
                labels.setdefault((i + label) % PICTURES, []).append(label)
        coco(place / "annotations" / f"{shots}_shot.json", labels, start=500)
    return place


@pytest.mark.parametrize(("name", "folder"), FOLDERS)
def test_every_target_is_known_by_its_published_folder(name, folder, tmp_path):
    place = published(tmp_path, folder, inner=name == "dior")
    split = detection.open_split(name, tmp_path)
    assert split.train.name == name and split.train.metric == split.test.metric == "coco"
    # all classes are novel, in the json's order
    assert (
        split.train.classes == split.test.classes == split.novel == list(CLASSES)
        and split.base == []
    )
    assert (len(split.train), len(split.test)) == (PICTURES, 4)
    pictures = place / "test" / ("new_test" if name == "dior" else "")
    assert [Path(record.path) for record in split.test.records] == [
        pictures / f"{i:03d}.png" for i in range(4)
    ]
    assert split.test.image(0).shape == (3, 64, 96) and split.test.category_ids == dict(
        zip(CLASSES, range(3))
    )
    assert (
        f"{place}: laid out as CD-FSOD, pictures: {PICTURES} to train on, 4 to test on"
        in split.train.notes
    )
    notes, findings = check.examine(name, tmp_path, 10)
    assert "CD-FSOD" in notes[0] and {f.kind for f in findings} == set()


def test_shots_are_those_of_the_file_whatever_the_seed(tmp_path):
    published(tmp_path, "ArTaxOr")
    train = detection.open_detection("artaxor", tmp_path, part="train")
    one = k_shot.choose_shots(train, 1, 0)
    # the other objects of these pictures are not annotated
    assert [(record.id, record.labels.tolist()) for record in one.records] == [
        ("000.png", [0]), ("001.png", [1]), ("002.png", [2])
    ]  # fmt: skip
    assert one.records[1].boxes.tolist() == [[34, 8, 58, 28]] and one.cut_to_shots
    assert k_shot.shots_of(k_shot.choose_shots(train, 1, 7)) == k_shot.shots_of(one)
    (note,) = set(one.notes) - set(train.notes)
    assert "1_shot.json" in note and "whatever --seed" in note
    ten = k_shot.choose_shots(train, 10, 0)
    assert k_shot.counts(ten) == [10, 10, 7] and "class boat has only 7 of 10 shots" in ten.notes
    assert ten.records[0].labels.tolist() == [0] and ten.records[2].labels.tolist() == [0, 1, 2]
    # what a run keeps of its shots is read again
    path = tmp_path / "shots.json"
    path.write_text(json.dumps(k_shot.shots_of(ten)))
    assert k_shot.shots_of(k_shot.load_shots(path, train)) == k_shot.shots_of(ten)


def test_labels_are_by_name_where_files_number_the_classes_differently(tmp_path):
    place = published(tmp_path, "UODD")
    coco(place / "annotations" / "test.json", {0: [0], 1: [2]}, names=CLASSES[::-1])
    coco(place / "annotations" / "1_shot.json", {0: [0], 1: [1], 2: [2]}, names=CLASSES[::-1])
    split = detection.open_split("uodd", tmp_path)
    assert split.test.classes == list(CLASSES) and [
        r.labels.tolist() for r in split.test.records
    ] == [[2], [0]]
    assert split.test.category_ids == {
        "sheep": 2,
        "chair": 1,
        "boat": 0,
    }  # of its own file, for COCO's format
    shots = k_shot.choose_shots(split.train, 1, 0)
    assert shots.classes == list(CLASSES) and [r.labels.tolist() for r in shots.records] == [
        [2],
        [1],
        [0],
    ]


def test_flawed_boxes_are_passed_over_in_training_and_count_in_tests(tmp_path):
    place = published(tmp_path, "FISH")
    for part in ("train", "test"):
        path = place / "annotations" / f"{part}.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["bbox"][2] = 0
        path.write_text(json.dumps(content))
    split = detection.open_split("deepfish", tmp_path)
    assert [len(part.records[0].labels) for part in (split.train, split.test)] == [2, 3]


@pytest.mark.parametrize(
    ("shots", "spoil", "message"),
    [
        (
            3,
            None,
            r"DIOR/annotations/3_shot.json is missing: .* there are 1_shot.json, 5_shot.json, 10_shot.json;",
        ),
        ("all", None, "all_shot.json is missing"),
        (
            5,
            lambda a: (a / "5_shot.json").unlink(),
            "5_shot.json is missing: .* there are 1_shot.json, 10_shot.json",
        ),
        (
            5,
            lambda a: (a / "1_shot.json").rename(a / "5_shot.json"),
            "5_shot.json has 1 shots of a class, not 5",
        ),
        (
            1,
            lambda a: (a / "5_shot.json").rename(a / "1_shot.json"),
            "1_shot.json has 5 shots of a class, not 1",
        ),
        (
            1,
            lambda a: coco(a / "1_shot.json", {0: [0], 1: [1]}),
            "1_shot.json has no shot of class boat",
        ),
        (
            1,
            lambda a: coco(a / "1_shot.json", {0: [0, 1]}, names=CLASSES[:2]),
            "no category 'boat', which train.json",
        ),
        (
            1,
            lambda a: coco(a / "1_shot.json", {99: [0, 1, 2]}),
            "new_train/099.png: annotated, but missing",
        ),
        (
            1,
            lambda a: coco(a / "test.json", {0: [0]}, names=CLASSES[:2]),
            "differ in category 'boat'",
        ),
        (1, lambda a: (a / "test.json").unlink(), "test.json cannot be read: is it there?"),
        (
            1,
            lambda a: [path.unlink() for path in a.iterdir()],
            "no .*DIOR/annotations with train.json, test.json and",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named_in_a_line(shots, spoil, message, tmp_path):
    place = published(tmp_path, "DIOR", inner=True)
    if spoil:
        spoil(place / "annotations")
    with pytest.raises(InputError, match=message) as error:
        k_shot.choose_shots(detection.open_split("dior", tmp_path).train, shots, 0)
    assert "\n" not in str(error.value)


def test_classes_and_layout_are_fixed(tmp_path):
    published(tmp_path, "NEUDET")
    for choice, message in (
        ({"novel": ["boat"]}, "all 3 classes of neu_det are novel"),
        ({"layout": "coco"}, "the layout of neu_det is fixed"),
        ({"split": 2}, "neu_det has no split 2"),
    ):
        with pytest.raises(InputError, match=message):
            detection.open_split("neu_det", tmp_path, **choice)
    assert detection.open_split("neu_det", tmp_path, novel=CLASSES).novel == list(CLASSES)


def test_a_folder_of_that_name_is_ones_own_data_unless_the_published_one_is_there(tmp_path):
    own = tmp_path / "neu_det"
    for folder in ("Annotations", "JPEGImages"):
        (own / folder).mkdir(parents=True)
    for number in range(5):
        write_png(
            torch.zeros(3, 64, 64, dtype=torch.uint8), str(own / "JPEGImages" / f"{number}.png")
        )
        box = "".join(
            f"<{end}>{v}</{end}>"
            for end, v in zip(("xmin", "ymin", "xmax", "ymax"), (2, 2, 40, 50))
        )
        item = f"<object><name>crazing</name><bndbox>{box}</bndbox></object>"
        size = "<size><width>64</width><height>64</height></size>"
        (own / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{item}</annotation>")
    (tmp_path / "NEU-DET" / "annotations").mkdir(
        parents=True
    )  # without a json it is no published folder
    train = detection.open_split("neu_det", tmp_path).train
    assert (
        train.classes == ["crazing"]
        and train.target is None
        and "laid out as VOC" in train.notes[0]
    )
    assert k_shot.counts(k_shot.choose_shots(train, 3, 0)) == [
        3
    ]  # drawn, though no file of 3 shots is there
    (tmp_path / "NEU-DET" / "annotations").rmdir()
    (tmp_path / "NEU-DET").rmdir()
    place = published(tmp_path, "NEU-DET")
    train = detection.open_split("neu_det", tmp_path).train
    assert train.classes == list(CLASSES) and train.target == place


def test_a_detector_of_other_data_learns_and_is_tested_by_the_protocol(tmp_path, capsys):
    place = published(tmp_path / "data", "clipart1k")
    flags = f"--dataset clipart1k --data-root {tmp_path / 'data'} --out {tmp_path / 'out'}"
    with pytest.raises(
        SystemExit, match="clipart1k has no base classes, all are novel: give --base"
    ) as error:
        run_here("tfa", flags)
    assert "\n" not in str(error.value)
    run_here(
        "tfa", f"{QUICK['tfa']} --stage base --iters 1 --test-images 2 --out {tmp_path / 'glyphs'}"
    )
    flags += f" --base {tmp_path / 'glyphs' / 'base'} --iters 2 --rois 16 --batch-size 2"
    with pytest.raises(SystemExit, match=r"2_shot\.json is missing"):
        run_here("tfa", f"{flags} --shots 2")
    capsys.readouterr()
    run_here("tfa", f"{flags} --shots 5 --seeds 0 1")
    said = capsys.readouterr().out
    assert (
        f"shots of {place}/annotations/5_shot.json, whatever --seed" in said
        and "over 2 seeds" in said
    )
    for seed in (0, 1):
        folder = tmp_path / "out" / f"5shot-seed{seed}"
        result = metrics(folder)
        assert (
            set(result["AP"]) == {"novel", "all"} and result["AP"]["novel"] == result["AP"]["all"]
        )
        protocol = result["protocol"]
        assert protocol["benchmark"] == "CD-FSOD" and protocol["trained_on"] == "novel classes"
        assert protocol["shots"] == "5 of each class, from 5_shot.json, whatever the seed"
        assert (protocol["test_pictures"], protocol["test_objects"]) == (4, 12)
        assert weights.describe_file(folder / "model.safetensors")["classes"] == list(CLASSES)
    kept = [(tmp_path / "out" / f"5shot-seed{seed}" / "shots.json").read_bytes() for seed in (0, 1)]
    assert kept[0] == kept[1] and len(json.loads(kept[0])["pictures"]) == 7
    found = fewshot.load(tmp_path / "out" / "5shot-seed0").predict(place / "test" / "000.png")
    assert set(found.names) <= set(CLASSES) and np.isfinite(found.boxes.numpy()).all()
    # another choice of shots, or a part of the test pictures, is not the benchmark
    flags += f" --out {tmp_path / 'other'} --shots 5"
    run_here("tfa", f"{flags} --test-images 2 --seed 1")
    run_here("tfa", f"{flags} --shot-lists {tmp_path / 'out' / '5shot-seed0' / 'shots.json'}")
    assert not any(
        "benchmark" in metrics(tmp_path / "other" / f"5shot-seed{s}")["protocol"] for s in (0, 1)
    )
    capsys.readouterr()
    call(tmp_path, "--cd-fsod")
    row, *single = cells(capsys.readouterr().out)
    assert row.keys() == {"method", "shots", "clipart1k"} and (row["method"], row["shots"]) == (
        "tfa",
        "5",
    )
    assert [Path(run["run"]) for run in single] == [
        tmp_path / "out" / f"5shot-seed{seed}" for seed in (0, 1)
    ]
