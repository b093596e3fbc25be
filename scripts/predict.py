"""A trained model on your own pictures: class folders of supports in, json and annotated pictures
out.

    python scripts/predict.py runs/proto_net/glyphs-conv4-seed0 --support known --query new --out predictions
    python scripts/predict.py runs/attention_rpn/glyphs-split1-small/base --support objects --query photo.jpg
    python scripts/predict.py runs/tfa/voc-split1/10shot-seed0 --query photos

`--support` holds a folder per class; a new class needs only its folder. For detection a support's
object is where `name.xml` beside the picture (VOC) or a json file in `--support` (COCO's format)
has a box, else the whole picture. Of several boxes of the class a prototype detector takes all, the
others the first. A classifier rejects, as none of these, what is farther from every class than 95 %
of the supports are from the others of their class: `--reject` sets that share, fewer are rejected
with a larger one.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
import tyro
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

import fewshot
from fewshot import InputError, show
from fewshot.data import annotations
from fewshot.data.pictures import SUFFIXES
from fewshot.inference import NONE, Classifier, decoded

SIDE = 480  # pixels: height of annotated pictures
# pictures that a detector is given together, of which those of one size share its forward passes
AT_ONCE = 64


@dataclass
class Args:
    model: tyro.conf.Positional[str]  # a run's folder, a model file, or a hub id
    query: tuple[Path, ...]  # pictures, or folders of pictures, to look at
    support: Path | None = None  # folder of class folders; a detector may know its classes already
    out: Path = Path("predictions")  # folder for predictions.json and pictures
    reject: float | None = None  # classifiers: share of own pictures to keep; default: 0.95
    score_above: float = 0.3  # of detections: leave out what is less sure, calibrated or not
    test_proposals: int | None = None  # detectors: places to look at; fewer are quicker
    calibrate: str | None = None  # detectors fine-tuned with it: the network, NAME or NAME=FILE
    share_proposals: bool = False  # Attention-RPN with many classes: quicker, not quite the same
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to compute


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; not those of folders in it."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read_supports(folder: Path) -> tuple[list[Path], list[Tensor], list[str]]:
    """Paths, pictures and classes of the supports in class folders.

    A picture that cannot be decoded is left out with a warning, unless its class has no other.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of supports; correct --support")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise InputError(
            f"{folder} has no class folder: put the pictures of every class into a folder of its name"
        )
    paths, pictures, labels = [], [], []
    for place in classes:
        files, failure = pictures_in(place), None
        if not files:
            raise InputError(f"{place} holds no picture: add some, or remove the folder")
        for path in files:
            try:
                pictures.append(decoded(path))
            except InputError as error:
                failure = error
                print(f"warning: left out {error}", file=sys.stderr)
                continue
            paths.append(path)
            labels.append(place.name)
        if place.name not in labels:
            raise InputError(f"no picture of class {place.name} can be read; the last: {failure}")
    return paths, pictures, labels


def read_boxes(
    folder: Path, paths: Sequence[Path], pictures: Sequence[Tensor], labels: Sequence[str]
) -> list[Tensor]:
    """Boxes (n, 4) xyxy of every support's objects: of xml or json where there is one, else the
    whole picture.
    """
    listed: dict[str, list[tuple[str, Tensor]]] = {}
    sources: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        names, records = annotations.read_coco_json(path, "refuse")
        for record in records:
            objects = [
                (names[label], torch.from_numpy(box))
                for label, box in zip(record.labels, record.boxes)
            ]
            listed.setdefault(Path(record.path).name, []).extend(objects)
            sources[Path(record.path).name] = path
    boxes = []
    for path, picture, label in zip(paths, pictures, labels):
        xml = path.with_suffix(".xml")
        objects, source = (
            (_xml_boxes(xml), xml)
            if xml.is_file()
            else (listed.get(path.name), sources.get(path.name))
        )
        mine = [box for name, box in objects or () if name == label]
        if objects and not mine:
            raise InputError(
                f"{path}: {source} has no {label} on it; correct the annotation or move the picture"
            )
        height, width = picture.shape[1:]
        for x1, y1, x2, y2 in (box.tolist() for box in mine):
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                box = f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
                raise InputError(
                    f"{source}: box {box} is not inside {path} of {width} x {height} pixels; correct it"
                )
        whole = torch.tensor([0.0, 0.0, width, height])
        boxes.append(torch.stack(mine or [whole]))
    return boxes


def _xml_boxes(path: Path) -> list[tuple[str, Tensor]]:
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = [
            torch.tensor([float(o.findtext(f"bndbox/{c}", "")) for c in corners]) for o in objects
        ]
        if not all(box.isfinite().all() for box in boxes):
            raise ValueError("a coordinate is not finite")
    # LookupError: of an encoding
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
        raise InputError(
            f"{path}: not a VOC annotation ({error}); correct it or take it out"
        ) from None
    offset = torch.tensor([1.0, 1.0, 0.0, 0.0])  # VOC counts pixels from 1
    return [
        (o.findtext("name", "").strip(), (box - offset).clamp(min=0))
        for o, box in zip(objects, boxes)
    ]


def queries(places: Sequence[Path]) -> list[Path]:
    """The pictures that were asked for."""
    found = []
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such picture or folder; correct --query")
        found += pictures_in(place) if place.is_dir() else [place]
    if not found:
        raise InputError(f"{', '.join(map(str, places))}: no picture there")
    return found


def _calibrate(model: Classifier) -> None:
    """Let it reject by the default share, or say why it cannot."""
    try:
        model.calibrate()
    except InputError as error:
        print(f"every picture is taken for one of these classes: {error}")


def main(args: Args) -> None:
    model = fewshot.load(args.model, args.device)
    classifies = isinstance(model, Classifier)
    if args.reject is not None and not (classifies and args.support):
        raise InputError("--reject is for classifiers and their --support: leave it out")
    if classifies and (args.share_proposals or args.calibrate or args.test_proposals is not None):
        raise InputError(
            "--share-proposals, --calibrate and --test-proposals are for detectors: leave them out"
        )
    if classifies and not args.support:
        raise InputError(
            f"{args.model} is a classifier, which knows no class without --support: give a folder of them"
        )
    paths = queries(args.query)
    if args.support:
        supports, pictures, labels = read_supports(args.support)
        if classifies:
            model.support(pictures, labels, reject=args.reject)
            if args.reject is None:
                _calibrate(model)
        else:
            boxes = read_boxes(args.support, supports, pictures, labels)
            each = [
                i
                for i, some in enumerate(boxes)
                for _ in (some if model.compares_regions else some[:1])
            ]
            boxes = torch.cat(boxes if model.compares_regions else [some[:1] for some in boxes])
            model.support([pictures[i] for i in each], boxes, [labels[i] for i in each])
        counts = ", ".join(f"{name} {labels.count(name)}" for name in dict.fromkeys(labels))
        print(f"{model.method} knows {counts}")
    if args.calibrate:
        model.calibrate(args.calibrate)
    readable, images = [], []
    for path in paths:
        try:
            images.append(decoded(path))
        except InputError as error:
            if len(paths) == 1:
                raise
            print(f"warning: left out {error}", file=sys.stderr)
            continue
        readable.append(path)
    if not images:
        raise InputError("none of the pictures can be read")
    if classifies:
        guesses = model.predict(images)  # together: MAML's norms see them all
        results = [
            {"picture": str(p), "class": g.name, "probabilities": g.probabilities}
            for p, g in zip(readable, guesses)
        ]
        if model.threshold is not None:
            for result, guess in zip(results, guesses):
                result |= {
                    "rejected": guess.rejected,
                    "distance": guess.distance,
                    "threshold": model.threshold,
                }
        captions = [
            NONE if g.rejected else f"{g.name} {100 * g.probability:.0f} %" for g in guesses
        ]
        drawings = {"sheet.png": show.captioned(images, captions)}
    else:
        results, drawings, objects_on = [], {}, []
        options = {
            name: getattr(args, name)
            for name in ("score_above", "share_proposals", "test_proposals")
        }
        with tqdm(total=len(images), unit="picture") as bar:
            for first in range(0, len(images), AT_ONCE):
                objects_on += model.predict(images[first : first + AT_ONCE], **options)
                bar.update(len(objects_on) - first)
        for number, (path, image, found) in enumerate(
            zip(readable, images, objects_on, strict=True)
        ):
            columns = zip(found.boxes.tolist(), found.scores.tolist(), found.names)
            objects = [
                {"box": [round(v, 2) for v in box], "score": score, "class": name}
                for box, score, name in columns
            ]
            results.append({"picture": str(path), "objects": objects})
            text, ink = (
                show.captions(found.names, found.scores),
                show.colors(found.names, model.about["novel"]),
            )
            name = (
                f"{path.stem}.png"
                if [p.stem for p in readable].count(path.stem) == 1
                else f"{number}-{path.stem}.png"
            )
            drawings[name] = F.to_pil_image(show.boxes_on(image, found.boxes, text, ink, SIDE))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "predictions.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, drawing in drawings.items():
        drawing.save(args.out / name)
    print(
        f"{len(results)} pictures: {args.out}/predictions.json and {', '.join(list(drawings)[:3])}"
        + (", ..." if len(drawings) > 3 else "")
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
