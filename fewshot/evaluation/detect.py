"""Run a detector over a test set, every picture once by any number of processes, and report how
good it is.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from fewshot import InputError
from fewshot.data import cd_fsod
from fewshot.data.detection import PUBLISHED_SPLITS, Detections, DetectionSet, DetectionSplit
from fewshot.data.pipeline import Pipeline, test_loader
from fewshot.data.stream import Feed
from fewshot.data.transforms import Normalisation
from fewshot.detectors import calibrate
from fewshot.detectors.build import folded, rebuilt
from fewshot.evaluation.average_precision import (
    coco_json,
    confusion,
    evaluate,
    in_original_pixels,
    table,
)
from fewshot.training import folders, launch, run, stages


@torch.no_grad()
def detect(
    accelerator: Accelerator,
    detector: Callable,
    dataset: DetectionSet,
    pipeline: Pipeline,
    normalisation: Normalisation,
    *,
    workers: int = 0,
) -> dict[str, Detections]:
    """Detections of every picture of `dataset` by its id, on every process.

    `detector(images, sizes)` takes normalised images (b, 3, H, W) and a list of their (height,
    width) and gives one (boxes, scores, labels) per image. Pictures of one size go eight at a time,
    others one by one, since padding would change what is detected; so the numbers do not depend on
    how many processes share the work.
    """
    same_size = len({(r.width, r.height) for r in dataset.records}) == 1
    rank, world, main = (
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.is_main_process,
    )
    feed = Feed(rank=rank, world=world, device=accelerator.device, workers=workers)
    found: dict[str, Detections] = {}
    total = len(range(rank, len(dataset), world))
    with tqdm(total=total, desc="detect", unit="picture", leave=False, disable=not main) as bar:
        for batch in test_loader(
            dataset, pipeline, feed, normalisation, batch_size=8 if same_size else 1
        ):
            with accelerator.autocast():
                results = detector(batch.images, batch.sizes)
            found |= in_original_pixels(batch, results)
            bar.update(len(batch.ids))
    return launch.gather_by_id(accelerator, found)


def test(
    record: run.Record,
    dataset: DetectionSet,
    args: Any,
    train: DetectionSet | None = None,
    protocol: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Test the run's saved model on `dataset`, the test part, and `report` how good it is.

    Args:
        args: a recipe's: `--test-proposals` replaces the model's own number of proposals,
            `--scramble-supports` tests also with every class given the next class's supports
            (`exchange_supports` of the detector), `--calibrate` also with scores calibrated by the
            shots, whose prototypes the model's file then keeps.
        train: what it was trained on; if these are shots, a picture shows them.
        protocol: what else to say of how it was tested.
        options: of the detector's `detect`.
    """
    detector = folded(record.best())
    if (kept := args.test_proposals) is not None:
        if kept < 1:
            raise InputError(f"--test-proposals {kept}: must be one or more")
        detector.rpn.test_proposals = (max(detector.rpn.test_proposals[0], kept), kept)
    pictures, normalisation = Pipeline(**record.about["pictures"]), detector.trunk.normalisation

    def look() -> dict[str, Detections]:
        search = partial(detector.detect, **options)
        return detect(
            record.accelerator, search, dataset, pictures, normalisation, workers=args.workers
        )

    began = time.perf_counter()
    found, scrambled = look(), None
    speed = len(dataset) / (time.perf_counter() - began)
    if getattr(args, "scramble_supports", False):
        detector.exchange_supports()
        scrambled = look()
    calibrated = None
    if args.calibrate and record.about["stage"] != "base":
        calibrated = rescored(
            record.accelerator, _calibration(record, args.calibrate, train), found, dataset
        )
    protocol = {"test_proposals": detector.rpn.test_proposals[1], **(protocol or {})}
    also = {"scrambled": scrambled, "calibrated": calibrated}
    report(record, found, dataset, train, protocol, classwise=args.classwise, speed=speed, **also)


def test_saved(
    method: str,
    detector: type[nn.Module],
    args: Any,
    accelerator: Accelerator,
    folder: str | Path,
    opened: Callable[[Any], DetectionSplit] = stages.opened,
    test: Callable[..., None] = test,
) -> None:
    """Test the model in `folder` as it is: the recipe's `detector`, made as its file says.

    `opened(args)` is the data, and `test(record, dataset, args)` how it is tested.
    """
    about = folders.saved(accelerator, args, folder)
    record = run.Record(
        accelerator, method, args, folder, rebuilt(detector, about), None, None, about
    )
    test(record, opened(args).test.with_novel(about["novel"]).restrict(about["classes"]), args)


def _calibration(
    record: run.Record, choice: str, shots: DetectionSet | None
) -> calibrate.Calibration:
    """By the shots that the run's model was just trained on, or else by the prototypes that its
    file has.
    """
    device = record.accelerator.device
    if shots is None:
        return calibrate.restored(record.about, record.folder / "model.safetensors", choice, device)
    calibration = calibrate.from_shots(choice, shots, device)
    record.save_model(calibration=calibration.describe(choice))
    return calibration


def rescored(
    accelerator: Accelerator,
    calibration: calibrate.Calibration,
    found: Mapping[str, Detections],
    dataset: DetectionSet,
) -> dict[str, Detections]:
    """`found` on the pictures of `dataset`, by id, with calibrated scores; on every process, a
    share by each.
    """
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    mine = range(rank, len(dataset), world)
    new: dict[str, Detections] = {}
    for i in tqdm(
        mine, desc="calibrate", unit="picture", leave=False, disable=not accelerator.is_main_process
    ):
        record = dataset.records[i]
        boxes, scores, labels = found[record.id]
        names = [dataset.classes[label] for label in labels]
        columns = dataset.image(i), torch.from_numpy(boxes), torch.from_numpy(scores)
        scores = calibration(*(column.to(device) for column in columns), names).cpu().numpy()
        new[record.id] = Detections(boxes, scores, labels)
    return launch.gather_by_id(accelerator, new)


def report(
    record: run.Record,
    found: dict[str, Detections],
    dataset: DetectionSet,
    train: DetectionSet | None = None,
    more: Mapping[str, Any] | None = None,
    *,
    classwise: bool = False,
    scrambled: dict[str, Detections] | None = None,
    calibrated: dict[str, Detections] | None = None,
    speed: float | None = None,
) -> None:
    """Print how good the detections are and by what protocol, and finish the run.

    Writes the result, detections.json (COCO's format for results), and as pictures the detections,
    the confusion between classes, and the shots.

    Args:
        record: whose model says what it was trained on.
        found: what `detect` gave for `dataset`, the test part.
        train: what it was trained on.
        more: to say of the protocol.
        classwise: print the result of every class too.
        scrambled: the same with every class given the next class's supports: how much the supports
            matter.
        calibrated: the same with calibrated scores.
        speed: pictures per second of the test.
    """
    about, args = record.about, record.about["args"]
    novel_only, both = (
        set(about["classes"]) <= set(dataset.novel),
        set(about["classes"]) > set(dataset.novel),
    )
    tuned = about["stage"] != "base"
    drawn = f"from {args['shot_lists']}" if args["shot_lists"] else f"drawn by seed {args['seed']}"
    fixed = tuned and dataset.target is not None and not args["shot_lists"]
    drawn = f"from {args['shots']}_shot.json, whatever the seed" if fixed else drawn
    protocol = {
        "dataset": args["dataset"],
        "split": args["split"] if args["dataset"] in PUBLISHED_SPLITS else None,
        "stage": about["stage"],
        "trained_on": "novel classes"
        if novel_only
        else "base and novel classes"
        if tuned and both
        else "base classes",
        "shots": f"{args['shots']} of each class, {drawn}" if tuned else None,
        "test_pictures": len(dataset),
        "test_objects": int(sum((~r.difficult).sum() for r in dataset.records)),
        "test_time_augmentation": "none",
        **({"benchmark": cd_fsod.NAME} if fixed and record.args.test_images is None else {}),
        **(more or {}),
    }
    result: dict[str, Any] = evaluate(found, dataset)
    said = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in protocol.items() if value is not None
    )
    record.accelerator.print(f"protocol: {said}\n{table(result, classwise)}")
    files = {}
    if record.accelerator.is_main_process:
        from fewshot import show  # here: drawing is not needed to train

        files = {
            "detections.json": coco_json(found, dataset),
            "detections.png": show.detections(dataset, found),
        }
        files["confusion.png"] = show.confusion(
            confusion(found, dataset), dataset.classes, dataset.novel
        )
        files |= (
            {"shots.png": show.shots(train)} if train is not None and train.cut_to_shots else {}
        )
    others = ("scrambled_supports", "every class given the next class's supports", scrambled)
    for name, what, also in (
        others,
        ("calibrated", f"scores calibrated by {record.args.calibrate}", calibrated),
    ):
        if also is not None:
            other: Mapping[str, Any] = evaluate(also, dataset)
            record.accelerator.print(f"with {what}:\n{table(other, classwise)}")
            result[name] = {key: value for key, value in other.items() if key != "per_class"}
    took = {"pictures_per_second": round(speed, 3)} if speed else {}
    record.finish({**result, "protocol": protocol}, files, took)
