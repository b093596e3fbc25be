"""How good detections are: VOC's and COCO's AP, for base, novel and all classes from one pass of
matching.

Detections come as a dict from picture id to `Detections`, one for every picture of the set, in the
pixels of the original pictures. Results are dicts of percentages: {"AP50": {"base": .., "novel":
.., "all": ..}, ..}. A group without ground truth is left out.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from fewshot.data.detection import Detections, DetectionSet
from fewshot.data.pipeline import Batch

# detections per picture (COCO's maxDets) and proposals per picture that are looked at
PROPOSALS = (100, 300, 1000)
IOUS = tuple(percent / 100 for percent in range(50, 100, 5))  # that COCO's AP averages over
# COCO's small, medium and large: roots of areas, in pixels
SIZES = {"s": (0, 32), "m": (32, 96), "l": (96, 10_000)}


class Matches(NamedTuple):
    """Every detection of a set with the object of its own class that it covers best; n detections,
    g objects.
    """

    scores: np.ndarray  # (n,)
    labels: np.ndarray  # (n,)
    areas: np.ndarray  # (n,) square pixels
    iou: np.ndarray  # (n,) with that object, -1 when the picture has none of the class
    owner: np.ndarray  # (n,) index of that object; means nothing where iou is -1
    truth_labels: np.ndarray  # (g,)
    truth_areas: np.ndarray  # (g,) square pixels
    truth_difficult: np.ndarray  # (g,)


def evaluate(
    detections: Mapping[str, Detections], dataset: DetectionSet
) -> dict[str, dict[str, float]]:
    """The numbers that are published for this kind of set: `evaluate_coco`, or `evaluate_voc` in
    COCO's terms.

    Of the latter AP50 is the published one, and that of the classes; AP75, AP (the mean over IoU
    0.5 to 0.95), and AP50 of small, medium and large objects (AP50s, AP50m, AP50l) tell how well
    boxes fit, and what is missed.
    """
    if dataset.metric == "coco":
        return evaluate_coco(detections, dataset)
    voc = evaluate_voc(
        detections,
        dataset,
        iou_thresholds=IOUS,
        inclusive_pixels=dataset.inclusive_pixels,
        size_ranges=[*SIZES.values()],
    )
    result = {"AP50": voc["AP50"], "AP75": voc["AP75"], "AP": voc["mAP"]}
    for size, (low, high) in SIZES.items():
        result[f"AP50{size}"] = voc[f"AP50 {low}-{high}"]
    return {**result, "per_class": voc["per_class"]}


def evaluate_voc(
    detections: Mapping[str, Detections],
    dataset: DetectionSet,
    *,
    iou_thresholds: Sequence[float] = (0.5,),
    inclusive_pixels: bool = True,
    size_ranges: Sequence[tuple[float, float]] = (),
) -> dict[str, dict[str, float]]:
    """Average precision as VOC2007 defines it, in percent.

    Args:
        detections: by picture id; the set's `offset` is taken off them.
        dataset: test part, whose difficult objects count neither as found nor as missed.
        iou_thresholds: an object is found by a box that overlaps it at least so much.
        inclusive_pixels: sides are x2 - x1 + 1 instead of x2 - x1.
        size_ranges: also evaluate, at the first threshold, objects by the square root of their
            area, at least low and below high pixels.

    Returns:
        AP50 etc., over the classes that have objects; mAP, their mean, if there are several
        thresholds; AP50 48-96 etc. for size ranges; per_class, that of each class at the first
        threshold.

    Raises:
        ValueError: detections are missing for a picture, or are for pictures or classes that the
            set does not have.
    """
    matches = match(detections, dataset, inclusive_pixels)

    def per_class(iou: float, size_range: tuple[float, float] | None = None) -> dict[str, float]:
        result = {}
        for label, name in enumerate(dataset.classes):
            precision, recall, count = precision_recall(matches, label, iou, size_range)
            if count:
                result[name] = 100 * average_precision(precision, recall)
        return result

    tables = {f"AP{round(100 * iou)}": per_class(iou) for iou in iou_thresholds}
    first, of_classes = next(iter(tables.items()))
    if len(tables) > 1:
        means = {name: np.mean([table[name] for table in tables.values()]) for name in of_classes}
        tables["mAP"] = means
    for low, high in size_ranges:
        tables[f"{first} {low}-{high}"] = per_class(iou_thresholds[0], (low, high))
    return _by_group(dataset, tables) | {"per_class": of_classes}


def match(
    detections: Mapping[str, Detections], dataset: DetectionSet, inclusive_pixels: bool = True
) -> Matches:
    """Find the best object for every detection, difficult ones included: all that any threshold or
    group needs.
    """
    _check_complete(detections, dataset)
    one = int(inclusive_pixels)
    of_pictures = []
    seen = 0  # objects of the pictures before
    for record in dataset.records:
        boxes, scores, labels = (np.asarray(column) for column in detections[record.id])
        boxes = boxes.astype(np.float64).reshape(-1, 4) - dataset.offset

        # of two equal overlaps the ordinary object wins
        order = np.argsort(record.difficult, kind="stable")
        objects, names = record.boxes[order].astype(np.float64), record.labels[order]

        iou = np.where(labels[:, None] == names, _iou(boxes, objects, one), -1.0)  # (n, g)
        iou = np.pad(iou, ((0, 0), (0, 1)), constant_values=-1.0)  # there may be no object at all
        best = iou.argmax(1)

        matches = Matches(
            scores=scores,
            labels=labels,
            areas=_areas(boxes, one),
            iou=iou[np.arange(len(iou)), best],
            owner=best + seen,
            truth_labels=names,
            truth_areas=_areas(objects, one),
            truth_difficult=record.difficult[order],
        )
        of_pictures.append(matches)
        seen += len(order)
    return Matches._make(np.concatenate(column) for column in zip(*of_pictures))


def precision_recall(
    matches: Matches, label: int, iou: float, size_range: tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Precision (n,) and recall (n,) after each detection of a class, best first, and the number of
    its objects.

    The best detection of an object is right, others of it are wrong. What covers a difficult
    object, or one outside `size_range`, is neither; nor is a detection outside the range that
    covers nothing.
    """
    low, high = (0, np.inf) if size_range is None else (size_range[0] ** 2, size_range[1] ** 2)
    ignored = matches.truth_difficult | (matches.truth_areas < low) | (matches.truth_areas >= high)
    count = int(((matches.truth_labels == label) & ~ignored).sum())
    mine = np.flatnonzero(matches.labels == label)
    mine = mine[np.argsort(-matches.scores[mine], kind="stable")]

    covers = matches.iou[mine] >= iou
    wrong = ~covers & (matches.areas[mine] >= low) & (matches.areas[mine] < high)
    right = np.zeros(len(mine), bool)
    hits = np.flatnonzero(covers)
    hits = hits[~ignored[matches.owner[mine[hits]]]]
    _, first = np.unique(matches.owner[mine[hits]], return_index=True)
    wrong[hits] = True
    right[hits[first]] = True
    wrong[hits[first]] = False

    found, all_counted = np.cumsum(right), np.cumsum(right | wrong)
    return found / np.maximum(all_counted, 1), found / max(count, 1), count


def average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """AP between 0 and 1: the best precision at any higher recall, averaged over recalls 0, 0.1,
    ... 1.
    """
    # As written in every implementation: 0.30000000000000004 and the like are part of the
    # definition.
    levels = np.arange(0, 1 + 1e-3, 0.1)
    return float(np.mean([precision[recall >= level].max(initial=0) for level in levels]))


def evaluate_coco(
    detections: Mapping[str, Detections], dataset: DetectionSet
) -> dict[str, dict[str, float]]:
    """COCO's average precision and recall by pycocotools, in percent, for base, novel and all from
    one evaluation.

    As in the few-shot papers, up to 1000 detections per picture count, but for AP (IoU 0.5 to 0.95)
    up to 100. APs, APm, APl are of small, medium and large objects; AR100, AR300, AR1000 count so
    many detections, ARs, ARm, ARl 1000.

    Raises:
        ValueError: as `evaluate_voc`.
    """
    _check_complete(detections, dataset)
    truth, found = [], []
    for i, record in enumerate(dataset.records):
        areas = _areas(record.boxes) if record.areas is None else record.areas
        crowds = record.difficult.astype(int)
        truth += _coco_objects(i, record.boxes, record.labels, area=areas, iscrowd=crowds)
        boxes, scores, labels = (np.asarray(column) for column in detections[record.id])
        found += _coco_objects(i, boxes, labels, area=_areas(boxes), score=scores)

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells how long everything took
        result = COCOeval(_coco(dataset, truth), _coco(dataset, found), "bbox")
        result.params.maxDets = list(PROPOSALS)
        result.evaluate()
        result.accumulate()

    # (10 IoUs, 101 recalls, classes, 4 sizes, 3 maxDets), -1 without truth
    precision = result.eval["precision"]
    recall = result.eval["recall"]  # (10 IoUs, classes, 4 sizes, 3 maxDets)
    values = {
        "AP": precision[..., 0, 0],
        "AP50": precision[:1, ..., 0, 2],
        "AP75": precision[5:6, ..., 0, 2],
    }
    values |= {f"AP{size}": precision[..., i, 2] for i, size in enumerate("sml", 1)}
    values |= {f"AR{number}": recall[..., 0, i] for i, number in enumerate(PROPOSALS)}
    values |= {f"AR{size}": recall[..., i, 2] for i, size in enumerate("sml", 1)}

    tables = {}
    for key, value in values.items():
        per_class = dict(zip(dataset.classes, value.reshape(-1, value.shape[-1]).T))
        present = {name: own for name, own in per_class.items() if (own > -1).any()}
        tables[key] = {name: 100 * float(own.mean()) for name, own in present.items()}
    return _by_group(dataset, tables) | {"per_class": tables["AP"]}


def _coco_objects(
    picture: int | str, boxes: np.ndarray, labels: np.ndarray, **columns: np.ndarray
) -> list[dict[str, Any]]:
    sides = np.asarray(boxes[:, 2:] - boxes[:, :2], np.float64)
    xywh = np.concatenate([boxes[:, :2], sides], 1).tolist()
    objects = []
    for i, (box, label) in enumerate(zip(xywh, np.asarray(labels).tolist())):
        values = {key: column[i].item() for key, column in columns.items()}
        objects.append(
            {"image_id": picture, "category_id": label, "bbox": box, "iscrowd": 0, **values}
        )
    return objects


def _coco(dataset: DetectionSet, objects: list[dict[str, Any]]) -> COCO:
    content = COCO()
    content.dataset = {
        "images": [{"id": i} for i in range(len(dataset))],
        "categories": [{"id": label, "name": name} for label, name in enumerate(dataset.classes)],
        # From 1: pycocotools marks what is not matched by 0.
        "annotations": [{"id": i, **item} for i, item in enumerate(objects, 1)],
    }
    content.createIndex()
    return content


def proposal_recall(
    proposals: Mapping[str, np.ndarray],
    dataset: DetectionSet,
    *,
    numbers: Sequence[int] = PROPOSALS,
    iou: float = 0.5,
    inclusive_pixels: bool = True,
) -> dict[str, dict[str, float]]:
    """The part of the objects, in percent, that the best 100, 300, ... proposals of their pictures
    cover.

    `proposals`: by picture id, xyxy boxes (n, 4 or more columns), best first. Pairs are formed from
    the best overlap down, so that one proposal covers one object. Difficult objects do not count.

    Returns:
        {"R100": {"base": .., "novel": .., "all": ..}, ..}
    """
    _check_pictures(proposals, dataset)
    ordinary = [r.select(~r.difficult) for r in dataset.records]
    names = np.array(dataset.classes)[np.concatenate([r.labels for r in ordinary])]  # (objects,)
    result = {}
    for number in numbers:
        best = []
        for record in ordinary:
            boxes = np.asarray(proposals[record.id], np.float64)[:number, :4] - dataset.offset
            overlaps = _iou(record.boxes.astype(np.float64), boxes, int(inclusive_pixels))
            best.append(_best_pairs(overlaps))
        covered = np.concatenate(best) >= iou  # (objects,)

        result[f"R{number}"] = {}
        for group, members in _groups(dataset).items():
            of_group = covered[np.isin(names, members)]
            if len(of_group):
                result[f"R{number}"][group] = 100 * float(of_group.mean())
    return result


def _best_pairs(iou: np.ndarray) -> np.ndarray:
    """Overlap (g,) of each object with the proposal it is paired with, given all overlaps (g, n); 0
    without any.
    """
    best, iou = np.zeros(len(iou)), iou.copy()
    for _ in range(min(iou.shape)):
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        best[row] = iou[row, column]
        iou[row] = -1
        iou[:, column] = -1
    return best


def confusion(
    found: Mapping[str, Detections], dataset: DetectionSet, score: float = 0.3, iou: float = 0.5
) -> np.ndarray:
    """What objects are taken for: counts (classes + 1, classes + 1), int64.

    Rows are what is there, the last one background; columns what is found, the last one nothing:
    [a, b] objects of a were found as b, [a, -1] missed, and [-1, b] times b was found where nothing
    is, or a second time.

    In each picture the detections of at least `score`, the surest first, each take the object that
    they overlap most, whatever its class, of those that they overlap by `iou` or more and that none
    has taken. Difficult objects are not counted, nor is a detection that overlaps none but such;
    with COCO's crowds the overlap is, as in its AP, the part of the detection that is within.

    Raises:
        ValueError: as `evaluate_voc`.
    """
    _check_complete(found, dataset)
    one, last = int(dataset.inclusive_pixels), len(dataset.classes)
    matrix = np.zeros((last + 1, last + 1), np.int64)
    for record in dataset.records:
        boxes, scores, labels = (np.asarray(column) for column in found[record.id])
        sure = np.argsort(-scores, kind="stable")
        sure = sure[scores[sure] >= score]
        boxes = boxes[sure].astype(np.float64).reshape(-1, 4) - dataset.offset
        objects = record.boxes.astype(np.float64)

        overlaps = _iou(boxes, objects, one)  # (n, g)
        if dataset.metric == "coco" and record.difficult.any():
            within = _shared(boxes, objects[record.difficult], one)
            overlaps[:, record.difficult] = within / np.maximum(_areas(boxes, one)[:, None], 1e-6)

        free = ~record.difficult
        for label, overlap in zip(labels[sure], overlaps):
            near = overlap >= iou
            if (free & near).any():
                taken = np.where(free & near, overlap, 0).argmax()
                matrix[record.labels[taken], label] += 1
                free[taken] = False
            elif not (record.difficult & near).any():
                matrix[last, label] += 1
        np.add.at(matrix[:, last], record.labels[free], 1)
    return matrix


def in_original_pixels(
    batch: Batch, found: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, Detections]:
    """What a detector found on a batch, (boxes, scores, labels) of each picture in the batch's
    pixels, to evaluate.
    """
    result = {}
    for id, scale, (boxes, scores, labels) in zip(batch.ids, batch.scales, found, strict=True):
        columns = (boxes.float() / scale.to(boxes.device).repeat(2), scores.float(), labels)
        result[id] = Detections(*(column.cpu().numpy() for column in columns))
    return result


def coco_json(found: Mapping[str, Detections], dataset: DetectionSet) -> list[dict[str, Any]]:
    """Detections in COCO's format for results: boxes [x, y, width, height], with the ids that the
    set's json has.

    Of a set without, the categories count from 1 and a picture has the id of its record. Each has
    its class's name too.
    """
    own = {record.id: record.image_id for record in dataset.records}
    objects = []
    for id, (boxes, scores, labels) in found.items():
        picture = own[id]
        if picture is None:
            picture = int(id) if id.isdigit() else id
        for item in _coco_objects(picture, boxes, labels, score=scores):
            name = dataset.classes[item["category_id"]]
            category = dataset.category_ids.get(name, item["category_id"] + 1)
            objects.append({**item, "category_id": category, "category": name})
    return objects


def table(result: Mapping[str, Mapping[str, float]], classwise: bool = False) -> str:
    """A result as text: a line per number with base, novel and all, then if `classwise` the
    classes.
    """
    lines = [f"{'':16}{'base':>8}{'novel':>8}{'all':>8}"]
    for key, groups in result.items():
        if key != "per_class":
            numbers = {group: f"{value:.1f}" for group, value in groups.items()}
            cells = [numbers.get(group, "-") for group in ("base", "novel", "all")]
            lines.append(f"{key:16}" + "".join(f"{cell:>8}" for cell in cells))
    if classwise:
        lines.append("")
        lines += [f"{name:16}{value:8.1f}" for name, value in result["per_class"].items()]
    return "\n".join(lines)


def _groups(dataset: DetectionSet) -> dict[str, list[str]]:
    return {"base": dataset.base, "novel": dataset.novel, "all": dataset.classes}


def _by_group(
    dataset: DetectionSet, tables: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """The means over base, novel and all classes of each table, which has a number per class."""
    means = {}
    for key, table in tables.items():
        means[key] = {}
        for group, names in _groups(dataset).items():
            values = [table[name] for name in names if name in table]
            if values:
                means[key][group] = float(np.mean(values))
    return means


def _check_complete(detections: Mapping[str, Detections], dataset: DetectionSet) -> None:
    _check_pictures(detections, dataset)
    for id, (_, _, labels) in detections.items():
        labels = np.asarray(labels)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(dataset.classes):
            raise ValueError(
                f"detections of picture {id} have labels outside the {len(dataset.classes)} classes"
            )


def _check_pictures(found: Mapping[str, Any], dataset: DetectionSet) -> None:
    ids = [record.id for record in dataset.records]
    missing = [id for id in ids if id not in found]
    if missing:
        raise ValueError(
            f"nothing for {len(missing)} of {len(ids)} pictures of {dataset.name}: {missing[:3]} ..."
        )
    foreign = sorted(set(found) - set(ids))
    if foreign:
        raise ValueError(f"{len(foreign)} pictures are not in {dataset.name}: {foreign[:3]} ...")


def _areas(boxes: np.ndarray, one: int = 0) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0] + one) * (boxes[:, 3] - boxes[:, 1] + one)


def _shared(a: np.ndarray, b: np.ndarray, one: int) -> np.ndarray:
    """Areas (n, m) shared by xyxy boxes (n, 4) and (m, 4), whose sides are `one` longer than the
    difference of ends.
    """
    # (n, m, 2)
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    return (high - low + one).clip(0).prod(-1)


def _iou(a: np.ndarray, b: np.ndarray, one: int) -> np.ndarray:
    """Overlaps (n, m) of such boxes."""
    shared = _shared(a, b, one)
    return shared / np.maximum(_areas(a, one)[:, None] + _areas(b, one) - shared, 1e-6)
