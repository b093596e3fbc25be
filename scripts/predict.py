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
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

import fewshot
from fewshot import InputError, show
from fewshot.data import annotations
from fewshot.data.pictures import SUFFIXES
from fewshot.inference import NONE, Classifier, Detector, decoded

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


def readable(paths: Sequence[Path]) -> tuple[list[Path], list[Tensor]]:
    """Those of these pictures that can be decoded, with a warning of the others.

    Raises:
        InputError: none can.
    """
    good, pictures, failure = [], [], None
    for path in paths:
        try:
            pictures.append(decoded(path))
            good.append(path)
        except InputError as error:
            failure = error
            if len(paths) > 1:
                print(f"warning: left out {error}", file=sys.stderr)
    if not good:
        raise failure
    return good, pictures


def read_supports(folder: Path) -> tuple[list[Path], list[Tensor], list[str]]:
    """Paths, pictures and classes of the supports in class folders."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of supports; correct --support")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise InputError(
            f"{folder} has no class folder: put the pictures of every class into a folder of its name"
        )
    paths, pictures, labels = [], [], []
    for place in classes:
        files = pictures_in(place)
        if not files:
            raise InputError(f"{place} holds no picture: add some, or remove the folder")
        try:
            files, found = readable(files)
        except InputError as error:
            raise InputError(
                f"no picture of class {place.name} can be read; the last: {error}"
            ) from None
        paths += files
        pictures += found
        labels += [place.name] * len(files)
    return paths, pictures, labels


def read_boxes(
    folder: Path, paths: Sequence[Path], pictures: Sequence[Tensor], labels: Sequence[str]
) -> list[Tensor]:
    """Boxes (n, 4) xyxy of every support's objects: of xml or json where there is one, else the
    whole picture.
    """
    listed: dict[str, tuple[list[tuple[str, Tensor]], Path]] = {}
    for path in sorted(folder.glob("*.json")):
        names, records = annotations.read_coco_json(path, "refuse")
        for record in records:
            name = Path(record.path).name
            objects = [names[label] for label in record.labels]
            before, _ = listed.get(name, ([], path))
            listed[name] = before + list(zip(objects, torch.from_numpy(record.boxes))), path

    boxes = []
    for path, picture, label in zip(paths, pictures, labels):
        xml = path.with_suffix(".xml")
        if xml.is_file():
            objects, source = _xml_boxes(xml), xml
        else:
            objects, source = listed.get(path.name, ([], None))
        mine = [box for name, box in objects if name == label]
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


def check(args: Args, classifies: bool) -> None:
    """Refuses flags that are not for this kind of model."""
    of_detectors = args.share_proposals or args.calibrate or args.test_proposals is not None
    if args.reject is not None and not (classifies and args.support):
        raise InputError("--reject is for classifiers and their --support: leave it out")
    if classifies and of_detectors:
        raise InputError(
            "--share-proposals, --calibrate and --test-proposals are for detectors: leave them out"
        )
    if classifies and not args.support:
        raise InputError(
            f"{args.model} is a classifier, which knows no class without --support: give a folder of them"
        )


def support(model: Classifier | Detector, args: Args) -> None:
    """Show the model the supports."""
    paths, pictures, labels = read_supports(args.support)
    if isinstance(model, Classifier):
        model.support(pictures, labels, reject=args.reject)
        if args.reject is None:
            try:
                model.calibrate()
            except InputError as error:
                print(f"every picture is taken for one of these classes: {error}")
    else:
        boxes = read_boxes(args.support, paths, pictures, labels)
        if not model.compares_regions:
            boxes = [some[:1] for some in boxes]
        each = [i for i, some in enumerate(boxes) for _ in some]
        model.support([pictures[i] for i in each], torch.cat(boxes), [labels[i] for i in each])
    counts = ", ".join(f"{name} {labels.count(name)}" for name in dict.fromkeys(labels))
    print(f"{model.method} knows {counts}")


Prediction = tuple[list[dict], dict[str, Image]]  # for predictions.json; drawings by file name


def classified(model: Classifier, paths: list[Path], images: list[Tensor]) -> Prediction:
    guesses = model.predict(images)  # together: MAML's norms see them all
    results, captions = [], []
    for path, guess in zip(paths, guesses):
        captions.append(NONE if guess.rejected else f"{guess.name} {100 * guess.probability:.0f} %")
        result = {"picture": str(path), "class": guess.name, "probabilities": guess.probabilities}
        if model.threshold is not None:
            result |= {"rejected": guess.rejected, "distance": guess.distance}
            result |= {"threshold": model.threshold}
        results.append(result)
    return results, {"sheet.png": show.captioned(images, captions)}


def detected(model: Detector, paths: list[Path], images: list[Tensor], args: Args) -> Prediction:
    objects_on = []
    for first in tqdm(range(0, len(images), AT_ONCE), unit=f"{AT_ONCE} pictures"):
        objects_on += model.predict(
            images[first : first + AT_ONCE],
            score_above=args.score_above,
            share_proposals=args.share_proposals,
            test_proposals=args.test_proposals,
        )

    results, drawings, stems = [], {}, [path.stem for path in paths]
    for number, (path, image, found) in enumerate(zip(paths, images, objects_on)):
        objects = [
            {"box": [round(v, 2) for v in box], "score": score, "class": name}
            for box, score, name in zip(found.boxes.tolist(), found.scores.tolist(), found.names)
        ]
        results.append({"picture": str(path), "objects": objects})

        text = show.captions(found.names, found.scores)
        ink = show.colors(found.names, model.about["novel"])
        name = path.stem if stems.count(path.stem) == 1 else f"{number}-{path.stem}"
        drawing = show.boxes_on(image, found.boxes, text, ink, SIDE)
        drawings[f"{name}.png"] = F.to_pil_image(drawing)
    return results, drawings


def main(args: Args) -> None:
    model = fewshot.load(args.model, args.device)
    classifies = isinstance(model, Classifier)
    check(args, classifies)
    paths = queries(args.query)
    if args.support:
        support(model, args)
    if args.calibrate:
        model.calibrate(args.calibrate)

    paths, images = readable(paths)
    if classifies:
        results, drawings = classified(model, paths, images)
    else:
        results, drawings = detected(model, paths, images, args)

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "predictions.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, drawing in drawings.items():
        drawing.save(args.out / name)
    shown = ", ".join(list(drawings)[:3]) + (", ..." if len(drawings) > 3 else "")
    print(f"{len(results)} pictures: {args.out}/predictions.json and {shown}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
