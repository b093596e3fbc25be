"""AP against the reference's numbers, against a plain double loop, and against pycocotools run
group by group.
"""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from naming_rule import boxes as named_boxes
from naming_rule import close, golden, jitter, stream
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fewshot.data import detection, pipeline
from fewshot.data.annotations import make_record
from fewshot.data.detection import Detections, DetectionSet
from fewshot.data.pipeline import Pipeline
from fewshot.data.stream import Feed
from fewshot.data.transforms import HALF
from fewshot.evaluation import average_precision
from fewshot.evaluation.average_precision import evaluate_coco, evaluate_voc

GOLDEN = golden("voc_ap")
CASES = [case for case in GOLDEN if isinstance(GOLDEN[case], dict) and "mean_ap" in GOLDEN[case]]


def reference_set() -> tuple[DetectionSet, dict[str, Detections]]:
    """The 20 pictures that the reference was evaluated on, and their detections."""
    records, found = [], {}
    for i in range(20):
        r = stream(f"ap_img{i}")
        ordinary, ignored = int(5 * r.uniform()), int(3 * r.uniform())
        labels = [int(3 * u) for u in r.uniform(size=ordinary)]
        labels += [int(3 * u) for u in r.uniform(size=ignored)]
        boxes = [*named_boxes(f"ap_gt{i}", ordinary, 200, 200, 20, 0.5)]
        boxes += [*named_boxes(f"ap_ig{i}", ignored, 200, 200, 20, 0.5)]
        difficult = [False] * ordinary + [True] * ignored
        records.append(make_record(str(i), "", 200, 200, list(zip(boxes, labels, difficult))))
        columns = []
        for c in range(3):
            around = np.array([box for box, label in zip(boxes, labels) if label == c]).reshape(
                -1, 4
            )
            near = (
                jitter(f"ap_det{i}_{c}", around, 2 * len(around), 200, 200, s=0.25)
                if len(around)
                else around
            )
            b = np.concatenate([near, named_boxes(f"ap_fp{i}_{c}", 2, 200, 200, 20, 0.5)])
            columns.append(
                (
                    b,
                    np.round(stream(f"ap_sc{i}_{c}").uniform(0.05, 1, len(b)), 6),
                    np.full(len(b), c),
                )
            )
        found[str(i)] = Detections(*map(np.concatenate, zip(*columns)))
    return DetectionSet("set", "test", ["a", "b", "c"], ["c"], records, "voc"), found


def test_the_reference_set_is_rebuilt():
    dataset, found = reference_set()
    for i in (0, 3):
        stored, record = GOLDEN[f"image{i}"], dataset.records[i]
        expected = stored["gt"]["bboxes"] + stored["gt"]["bboxes_ignore"]
        assert np.allclose(record.boxes, expected, atol=1e-4)
        assert record.labels.tolist() == stored["gt"]["labels"] + stored["gt"]["labels_ignore"]
        for c in range(3):
            mine = found[str(i)].labels == c
            rows = np.concatenate([found[str(i)].boxes[mine], found[str(i)].scores[mine, None]], 1)
            assert np.allclose(rows, stored["det"][c], atol=1e-4)


def area(precision: np.ndarray, recall: np.ndarray) -> float:
    """The reference's other average, by which some of its precisions and recalls are stored."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return (np.diff(recall, prepend=0) * envelope).sum()


@pytest.mark.parametrize("case", CASES)
def test_voc_ap_equals_the_reference(case):
    expected, (dataset, found) = GOLDEN[case], reference_set()
    arguments = expected["args"]
    if case == "voc07_ignored_dropped":
        dataset = dataset.with_records([r.select(~r.difficult) for r in dataset.records])
    inclusive = arguments.get("use_legacy_coordinate", False)
    mean = average_precision.average_precision if arguments.get("dataset") == "voc07" else area
    ranges = [tuple(pair) for pair in arguments.get("scale_ranges", ())]
    iou = arguments["iou_thr"]
    if mean is not area:
        result = evaluate_voc(found, dataset, iou_thresholds=[iou], inclusive_pixels=inclusive)
        close(result[f"AP{round(100 * iou)}"]["all"], 100 * expected["mean_ap"], 1e-6)

    matches = average_precision.match(found, dataset, inclusive)
    for label, wanted in enumerate(expected["per_class"]):
        curves = [
            average_precision.precision_recall(matches, label, iou, size)
            for size in ranges or [None]
        ]
        precision, recall, count = zip(*curves)
        aps = [mean(p, r) for p, r in zip(precision, recall)]
        if not ranges:  # the reference stores no list for a single range
            precision, recall, count, aps = precision[0], recall[0], count[0], aps[0]
        assert (
            np.array_equal(count, wanted["num_gts"]) and np.shape(recall)[-1] == wanted["num_dets"]
        )
        close(aps, wanted["ap"], 1e-6)
        close(np.array(precision), wanted["precision"], 1e-6)
        close(np.array(recall), wanted["recall"], 1e-6)


def test_taken_and_difficult_objects():
    """A worked example: the second find of an object is wrong, one of a difficult object is
    nothing.
    """
    truth = [
        ((10, 10, 50, 50), 0, False),
        ((200, 200, 250, 260), 0, False),
        ((100, 100, 150, 150), 0, True),
    ]
    dataset = DetectionSet("x", "test", ["c"], [], [make_record("p", "", 300, 300, truth)], "voc")
    boxes = np.array([[11, 11, 50, 50], [12, 12, 51, 51], [100, 100, 150, 150]])
    found = {"p": Detections(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, int))}
    precision, recall, count = average_precision.precision_recall(
        average_precision.match(found, dataset), 0, 0.5
    )
    assert precision.tolist() == [1, 0.5, 0.5] and recall.tolist() == [0.5, 0.5, 0.5] and count == 2
    result = evaluate_voc(found, dataset)
    assert (
        result["AP50"]["all"] == pytest.approx(54.5455, abs=1e-4) and "novel" not in result["AP50"]
    )
    # of two objects in the same place, a difficult one does not hide the other
    hidden = dataset.with_records(
        [make_record("p", "", 300, 300, [(truth[0][0], 0, True), *truth[:2]])]
    )
    precision, recall, _ = average_precision.precision_recall(
        average_precision.match(found, hidden), 0, 0.5
    )
    assert precision.tolist() == [1, 0.5, 1 / 3] and recall.tolist() == [0.5, 0.5, 0.5]


def plain_ap(dataset, found, label, iou, inclusive, size_range=None) -> float | None:
    """The rule as one reads it: a detection and an object at a time, 11 points."""
    one = 1 if inclusive else 0

    def sides(box):
        return box[2] - box[0] + one, box[3] - box[1] + one

    def inside(box):
        side = np.prod(sides(box)) ** 0.5
        return size_range is None or size_range[0] <= side < size_range[1]

    def overlap(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]) + one, min(a[3], b[3]) - max(a[1], b[1]) + one
        shared = max(w, 0) * max(h, 0)
        return shared / (np.prod(sides(a)) + np.prod(sides(b)) - shared)

    pool, taken, objects = [], set(), 0
    for record in dataset.records:
        for box, name, difficult in zip(record.boxes, record.labels, record.difficult):
            objects += name == label and not difficult and inside(box)
        boxes, scores, labels = found[record.id]
        pool += [
            (-s, record, box - np.array(dataset.offset))
            for box, s, c in zip(boxes, scores, labels)
            if c == label
        ]
    if not objects:
        return None
    marks = []
    for _, record, box in sorted(pool, key=lambda entry: entry[0]):
        own = np.flatnonzero(record.labels == label)
        rivals = [(overlap(box, record.boxes[n]), not record.difficult[n], -n) for n in own]
        best, ordinary, n = max(rivals, default=(0, False, 0))
        if best < iou:
            marks += [0] if inside(box) else []
        elif ordinary and inside(record.boxes[-n]):
            marks.append((record.id, n) not in taken)
            taken.add((record.id, n))
    right = np.cumsum(marks)
    precision, recall = right / np.arange(1, len(marks) + 1), right / objects
    levels = np.arange(0, 1.05, 0.1)
    return (
        100
        * sum(
            max((p for p, r in zip(precision, recall) if r >= level), default=0) for level in levels
        )
        / 11
    )


def random_set(seed: int, pictures: int = 12) -> tuple[DetectionSet, dict[str, Detections]]:
    """Random objects of four classes, one of them rare, and detections around and beside them."""
    rng = np.random.default_rng(seed)
    records, found = [], {}
    for i in range(pictures):
        n = rng.integers(0, 6)
        corners = rng.integers(0, 60, (n, 2))
        boxes = np.concatenate([corners, corners + rng.integers(4, 40, (n, 2))], 1)
        labels = rng.choice(4, n, p=[0.45, 0.3, 0.24, 0.01])
        records.append(
            make_record(f"p{i}", "", 100, 100, list(zip(boxes, labels, rng.random(n) < 0.3)))
        )
        around = np.repeat(boxes, 3, 0) + rng.integers(-4, 5, (3 * n, 4))
        around[:, 2:] = np.maximum(around[:, 2:], around[:, :2] + 1)
        loose = rng.integers(0, 50, (4, 2))
        all_boxes = np.concatenate(
            [around, np.concatenate([loose, loose + rng.integers(5, 40, (4, 2))], 1)]
        )
        names = np.where(rng.random(3 * n) < 0.8, np.repeat(labels, 3), rng.integers(0, 4, 3 * n))
        names = np.concatenate([names, rng.integers(0, 4, 4)])
        order = rng.permutation(len(names))
        found[f"p{i}"] = Detections(
            all_boxes[order], rng.permutation(len(names)) / 100 + i / 1e4, names[order]
        )
    return DetectionSet(
        "set", "test", ["a", "b", "c", "d"], ["c", "d"], records, "voc", (-1, -1, 0, 0)
    ), found


@pytest.mark.parametrize("inclusive", [True, False])
def test_voc_ap_equals_a_plain_loop(inclusive):
    ranges = [(0, 20), (20, 200)]
    for seed in range(15):
        dataset, found = random_set(seed)
        result = evaluate_voc(
            *(found, dataset),
            iou_thresholds=(0.5, 0.7),
            inclusive_pixels=inclusive,
            size_ranges=ranges,
        )
        for key, iou, size in [
            ("AP50", 0.5, None),
            ("AP70", 0.7, None),
            *((f"AP50 {a}-{b}", 0.5, (a, b)) for a, b in ranges),
        ]:
            aps = [plain_ap(dataset, found, label, iou, inclusive, size) for label in range(4)]
            for group, members in (("base", aps[:2]), ("novel", aps[2:]), ("all", aps)):
                present = [ap for ap in members if ap is not None]
                assert (group in result[key]) == bool(present)
                if present:
                    assert result[key][group] == pytest.approx(np.mean(present), abs=1e-9)
        assert result["mAP"]["all"] == pytest.approx(
            (result["AP50"]["all"] + result["AP70"]["all"]) / 2
        )
        assert result["per_class"]["a"] == pytest.approx(
            plain_ap(dataset, found, 0, 0.5, inclusive)
        )


def test_what_is_reported_of_a_set_like_voc():
    dataset, found = random_set(0)
    result = average_precision.evaluate(found, dataset)
    assert list(result) == ["AP50", "AP75", "AP", "AP50s", "AP50m", "AP50l", "per_class"]
    aps = {
        iou: [plain_ap(dataset, found, label, iou, False) for label in range(3)]
        for iou in average_precision.IOUS
    }
    for key, wanted in (("AP50", aps[0.5]), ("AP75", aps[0.75]), ("AP", [*aps.values()])):
        assert result[key]["all"] == pytest.approx(np.mean(wanted))
    small = [plain_ap(dataset, found, label, 0.5, False, (0, 32)) for label in range(3)]
    assert (
        result["AP50s"]["all"] == pytest.approx(np.mean(small)) and result["AP50l"] == {}
    )  # none is so large
    assert result["per_class"]["b"] == pytest.approx(aps[0.5][1])


def test_order_of_pictures_and_detections_does_not_matter():
    dataset, found = random_set(3)
    shuffled = {id: Detections(*(column[::-1] for column in found[id])) for id in reversed(found)}
    assert evaluate_voc(shuffled, dataset.with_records(dataset.records[::-1])) == evaluate_voc(
        found, dataset
    )


def test_incomplete_and_foreign_detections_are_refused():
    dataset, found = random_set(0)
    for call in (evaluate_voc, evaluate_coco):
        with pytest.raises(ValueError, match=r"2 of 12 pictures .*'p1', 'p4'"):
            call({id: one for id, one in found.items() if id not in ("p1", "p4")}, dataset)
        with pytest.raises(ValueError, match="nowhere"):
            call(found | {"nowhere": found["p0"]}, dataset)
        with pytest.raises(ValueError, match=r"picture p0 .* 4 classes"):
            call(found | {"p0": found["p0"]._replace(labels=found["p0"].labels + 2)}, dataset)


def test_nothing_found_is_zero():
    dataset, found = random_set(0)
    nothing = {id: Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)) for id in found}
    assert evaluate_voc(nothing, dataset)["AP50"]["base"] == 0
    assert evaluate_coco(nothing, replace(dataset, offset=(0, 0, 0, 0)))["AP"]["base"] == 0


# COCO


@pytest.fixture(scope="module")
def coco_files(tmp_path_factory):
    """A set and crowded detections, and the same as files that pycocotools reads by itself."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    images, annotations, records, found, results = [], [], [], {}, []
    for i in range(8):
        id, objects = 100 - 7 * i, []
        for _ in range(rng.integers(1, 30)):
            x, y, w, h = (
                (rng.uniform(0, 200, 4) * [1, 1, 0.8, 0.8] + [0, 0, 2, 2])
                .astype(np.float32)
                .tolist()
            )
            label, crowd, area = (
                int(rng.integers(3)),
                bool(rng.random() < 0.1),
                w * h * rng.uniform(0.4, 1),
            )
            objects.append(((x, y, x + w, y + h), label, crowd, area))
            item = {
                "image_id": id,
                "category_id": label + 5,
                "bbox": [x, y, w, h],
                "iscrowd": int(crowd),
            }
            annotations.append(item | {"id": len(annotations) + 1, "area": area})
        records.append(make_record(str(id), "", 400, 400, objects))
        images.append({"id": id, "file_name": "", "width": 400, "height": 400})
        # far more than 100 of a class on a picture: AP stops there, AP50 does not
        copies = 900 // len(objects) + 1
        base = records[-1].boxes.repeat(copies, 0)
        boxes = base + rng.normal(0, 25, base.shape).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.where(rng.random(len(boxes)) < 0.7, records[-1].labels.repeat(copies), 1)
        found[str(id)] = Detections(boxes, rng.random(len(boxes)), labels)
        for box, score, label in zip(*found[str(id)]):
            x, y, x2, y2 = box.tolist()
            results.append(
                {
                    "image_id": id,
                    "category_id": int(label) + 5,
                    "bbox": [x, y, x2 - x, y2 - y],
                    "score": score,
                }
            )
    categories = [{"id": 5 + n, "name": name} for n, name in enumerate("abcd")]
    (folder / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    dataset = DetectionSet("set", "test", ["a", "b", "c", "d"], ["b", "d"], records, "coco")
    return dataset, found, folder / "truth.json", results


def test_coco_ap_equals_separate_evaluations(coco_files):
    dataset, found, truth, results = coco_files
    mine = average_precision.evaluate(found, dataset)
    keys = "AP AP50 AP75 APs APm APl AR100 AR300 AR1000 ARs ARm ARl".split()
    assert list(mine) == [*keys, "per_class"]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(truth))
        dt = gt.loadRes(results)
    for group, categories in (("base", [5, 7]), ("novel", [6, 8]), ("all", [5, 6, 7, 8])):
        with contextlib.redirect_stdout(io.StringIO()):
            plain = COCOeval(gt, dt, "bbox")
            plain.params.catIds, plain.params.maxDets = categories, [100, 300, 1000]
            plain.evaluate()
            plain.accumulate()
            plain.summarize()
        assert [mine[key][group] for key in keys] == pytest.approx(
            [100 * v for v in plain.stats], abs=1e-4
        )
        at_100 = plain.eval["precision"][0, ..., 0, 0]
        assert mine["AP50"][group] != pytest.approx(100 * at_100[at_100 > -1].mean(), abs=1e-4)
    assert mine["per_class"].keys() == {"a", "b", "c"}  # no d anywhere
    assert mine["AP"]["novel"] == mine["per_class"]["b"]


# proposals, pictures, text


def test_proposal_recall():
    truth = [((0, 0, 10, 10), 0, False), ((1, 0, 11, 10), 1, False), ((50, 50, 60, 60), 1, True)]
    pictures = [
        make_record("p", "", 99, 99, truth),
        make_record("q", "", 99, 99, [((0, 0, 9, 9), 1, False)]),
    ]
    dataset = DetectionSet("x", "test", ["a", "b"], ["b"], pictures, "coco")
    # one proposal covers both objects of p, but can be paired with one only: with a, which it
    # equals
    proposals = {
        "p": np.array([[0.0, 0, 10, 10], [70, 70, 80, 80], [1, 0, 12, 10]]),
        "q": np.zeros((0, 4)),
    }
    result = average_precision.proposal_recall(
        proposals, dataset, numbers=(1, 2, 3), inclusive_pixels=False
    )
    assert result["R1"] == result["R2"] == {"base": 100, "novel": 0, "all": pytest.approx(100 / 3)}
    assert result["R3"] == {"base": 100, "novel": 50, "all": pytest.approx(200 / 3)}
    assert (
        average_precision.proposal_recall(proposals, dataset, numbers=(3,), iou=0.95)["R3"]["novel"]
        == 0
    )
    with pytest.raises(ValueError, match="'q'"):
        average_precision.proposal_recall({"p": proposals["p"]}, dataset)


def test_detections_return_to_original_pixels():
    dataset = detection.open_detection("glyphs", "", part="test")
    dataset = dataset.with_records(dataset.records[:4])
    found = {}
    for batch in pipeline.test_loader(dataset, Pipeline(400), Feed(), HALF, batch_size=2):
        perfect = [(b, torch.ones(len(b)), names) for b, names in zip(batch.boxes, batch.labels)]
        found |= average_precision.in_original_pixels(batch, perfect)
    assert average_precision.evaluate(found, dataset)["AP50"]["all"] == 100
    for record in dataset.records:
        assert np.allclose(found[record.id].boxes, record.boxes, atol=1e-3)
    off = {id: one._replace(boxes=one.boxes * 2.5) for id, one in found.items()}
    assert average_precision.evaluate(off, dataset)["AP50"]["all"] < 50


def test_table_shows_groups_and_classes():
    result = {"AP50": {"base": 61.25, "all": 7.0}, "per_class": {"bird": 12.34}}
    lines = average_precision.table(result).splitlines()
    assert lines[0].split() == ["base", "novel", "all"] and lines[1].split() == [
        "AP50",
        "61.2",
        "-",
        "7.0",
    ]
    assert len(lines) == 2
    lines = average_precision.table(result, classwise=True).splitlines()
    assert lines[-1].split() == ["bird", "12.3"]


def test_coco_json():
    dataset = detection.open_detection("glyphs", "", part="test")
    dataset = dataset.with_records(dataset.records[:2])
    boxes = np.array([[1.0, 2, 11, 22]])
    found = {r.id: Detections(boxes, np.array([0.5]), np.array([3])) for r in dataset.records}
    items = average_precision.coco_json(found, dataset)
    assert [i["image_id"] for i in items] == [r.id for r in dataset.records]
    assert (
        items[0]["bbox"] == [1, 2, 10, 20]
        and items[0]["category_id"] == 4
        and items[0]["score"] == 0.5
    )
    assert items[0]["category"] == dataset.classes[3]


def test_coco_json_has_the_ids_of_the_users_json(tmp_path):
    """Whoever has the json that a model was tested with gets our AP from pycocotools and
    detections.json.
    """
    rng = np.random.default_rng(0)
    for ids in ([7, 3_000_000_000, 12], ["b-1", "a/2", "007"]):
        images, objects = [], []
        for id in ids:
            name = str(id).replace("/", "_") + ".png"
            Image.new("RGB", (200, 200)).save(tmp_path / name)
            images.append({"id": id, "file_name": name, "width": 200, "height": 200})
            for _ in range(12):
                x, y, w, h = rng.uniform((0, 0, 20, 20), (100, 100, 100, 100)).round(1).tolist()
                item = {
                    "image_id": id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.1),
                }
                objects.append(
                    {"id": len(objects) + 1, "category_id": int(rng.choice([3, 17, 90])), **item}
                )
        categories = [
            {"id": 90, "name": "ant"},
            {"id": 3, "name": "cat"},
            {"id": 17, "name": "bee"},
        ]
        content = {"images": images, "annotations": objects, "categories": categories}
        (tmp_path / "own.json").write_text(json.dumps(content))
        dataset = detection.open_detection("own.json", tmp_path, part="test", novel=["bee"])
        found = {}
        for record in dataset.records:
            boxes = record.boxes.repeat(3, 0) + rng.normal(0, 8, (3 * len(record.boxes), 4)).astype(
                np.float32
            )
            labels = np.where(rng.random(len(boxes)) < 0.8, record.labels.repeat(3), 0)
            found[record.id] = Detections(boxes, rng.random(len(boxes)).astype(np.float32), labels)
        items = json.loads(json.dumps(average_precision.coco_json(found, dataset)))
        assert {i["image_id"] for i in items} == set(ids)
        assert {(i["category_id"], i["category"]) for i in items} == {
            (90, "ant"),
            (3, "cat"),
            (17, "bee"),
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(tmp_path / "own.json"))
            plain = COCOeval(truth, truth.loadRes(items), "bbox")
            plain.params.maxDets = [100, 300, 1000]
            plain.evaluate()
            plain.accumulate()
            plain.summarize()
        mine = evaluate_coco(found, dataset)
        assert (
            mine["AP"]["all"] == pytest.approx(100 * plain.stats[0], abs=1e-6)
            and mine["AP"]["all"] > 10
        )
        assert mine["AR1000"]["all"] == pytest.approx(100 * plain.stats[8], abs=1e-6)


def test_confusion_by_hand():
    """Classes a, b, c: every kind of cell once."""
    truth = [
        ((0, 0, 40, 40), 0, False),
        ((100, 0, 140, 40), 1, False),
        ((200, 0, 240, 40), 2, False),
    ]
    truth += [((0, 100, 40, 140), 1, True)]
    dataset = DetectionSet(
        "x", "test", ["a", "b", "c"], ["c"], [make_record("p", "", 300, 300, truth)], "coco"
    )
    rows = [  # box, score, label
        ((2, 0, 42, 40), 0.9, 0),  # a found as a
        ((0, 0, 40, 40), 0.8, 1),  # it is taken, though this fits better: b where nothing is
        ((100, 2, 140, 42), 0.7, 2),  # b found as c
        ((100, 0, 140, 40), 0.6, 1),  # too late
        ((0, 100, 40, 140), 0.5, 0),  # on what does not count: nowhere
        ((200, 100, 240, 140), 0.4, 2),  # on nothing
        ((200, 0, 240, 40), 0.2, 2),  # not sure enough: c is missed
    ]

    def found(rows):
        return {"p": Detections(*(np.array([row[i] for row in rows]) for i in range(3)))}

    expected = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 2, 1, 0]])
    matrix = average_precision.confusion(found(rows), dataset)
    assert matrix.dtype == np.int64 and np.array_equal(matrix, expected)
    assert np.array_equal(average_precision.confusion(found(rows[::-1]), dataset), expected)
    sure = average_precision.confusion(found(rows), dataset, score=0.2)
    assert np.array_equal(sure - expected, np.array([[0] * 4, [0] * 4, [0, 0, 1, -1], [0] * 4]))
    # with IoU above 38 / 42 the first two of the shifted ones miss, and the later ones take their
    # objects
    strict = np.array([[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 2, 0]])
    assert np.array_equal(average_precision.confusion(found(rows), dataset, iou=0.95), strict)
    # rows of classes count the ordinary objects, whatever was found
    nothing = {"p": Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))}
    assert average_precision.confusion(nothing, dataset)[:, -1].tolist() == [1, 1, 1, 0]
    assert average_precision.confusion(nothing, dataset).sum() == 3
    empty = dataset.with_records([make_record("p", "", 300, 300, [])])
    assert average_precision.confusion(found(rows), empty)[-1].tolist() == [2, 2, 2, 0]
    with pytest.raises(ValueError, match="labels outside"):
        average_precision.confusion(found([((0, 0, 9, 9), 0.9, 3)]), dataset)


def test_confusion_chooses_the_object_that_is_covered_best():
    truth = [((0, 0, 40, 40), 0, False), ((10, 0, 50, 40), 1, False), ((100, 0, 300, 200), 0, True)]
    records = [make_record("p", "", 300, 300, truth)]
    dataset = DetectionSet("x", "test", ["a", "b"], [], records, "voc", offset=(1, 1, 1, 1))
    boxes = np.array([[9, 1, 49, 41], [1, 1, 41, 41], [101, 1, 201, 101]])
    found = {"p": Detections(boxes, np.array([0.9, 0.8, 0.7]), np.array([0, 0, 1]))}
    # the first, 8 beside a and 2 beside b, is b's; so a is left for the second; the third covers a
    # quarter of a crowd
    assert average_precision.confusion(found, dataset).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    coco = replace(dataset, metric="coco")  # within which everything is excused
    assert average_precision.confusion(found, coco).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_confusion_agrees_with_the_finds_of_a_perfect_detector():
    dataset, _ = reference_set()
    perfect = {r.id: Detections(r.boxes, np.ones(len(r.labels)), r.labels) for r in dataset.records}
    counts = np.bincount(
        np.concatenate([r.labels[~r.difficult] for r in dataset.records]), minlength=3
    )
    assert (
        np.array_equal(average_precision.confusion(perfect, dataset), np.diag([*counts, 0]))
        and counts.min() > 0
    )
