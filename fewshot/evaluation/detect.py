"""Run a detector over a test set, every picture once by any number of processes, and report how
good it is.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
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
from fewshot.training import launch, stages
from fewshot.training.folders import Stage
from fewshot.training.run import Run


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
    feed = Feed(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
        workers=workers,
    )
    loader = test_loader(dataset, pipeline, feed, normalisation, batch_size=8 if same_size else 1)

    found: dict[str, Detections] = {}
    with _progress(accelerator, "detect", len(_share(accelerator, dataset))) as bar:
        for batch in loader:
            with accelerator.autocast():
                results = detector(batch.images, batch.sizes)
            found |= in_original_pixels(batch, results)
            bar.update(len(batch.ids))
    return launch.gather_by_id(accelerator, found)


def _share(accelerator: Accelerator, dataset: DetectionSet) -> range:
    """The pictures that this process tests."""
    return range(accelerator.process_index, len(dataset), accelerator.num_processes)


def _progress(accelerator: Accelerator, what: str, total: int) -> tqdm:
    hidden = not accelerator.is_main_process
    return tqdm(total=total, desc=what, unit="picture", leave=False, disable=hidden)


def test(
    run: Run,
    dataset: DetectionSet,
    train: DetectionSet | None = None,
    protocol: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Test the run's saved model on `dataset`, the test part, and `report` how good it is.

    Of the run's arguments `--test-proposals` replaces the model's own number of proposals,
    `--scramble-supports` tests also with every class given the next class's supports
    (`exchange_supports` of the detector), `--calibrate` also with scores calibrated by the shots,
    whose prototypes the model's file then keeps.

    Args:
        train: what it was trained on; if these are shots, a picture shows them.
        protocol: what else to say of how it was tested.
        options: of the detector's `detect`.
    """
    args = run.args
    detector = folded(run.best())
    kept = args.test_proposals
    if kept is not None:
        if kept < 1:
            raise InputError(f"--test-proposals {kept}: must be one or more")
        detector.rpn.test_proposals = (max(detector.rpn.test_proposals[0], kept), kept)

    find = partial(
        detect,
        run.accelerator,
        partial(detector.detect, **options),
        dataset,
        Pipeline(**run.metadata["pictures"]),
        detector.trunk.normalisation,
        workers=args.workers,
    )
    began = time.perf_counter()
    found = find()
    speed = len(dataset) / (time.perf_counter() - began)

    others = {}
    if getattr(args, "scramble_supports", False):
        detector.exchange_supports()
        others["scrambled_supports"] = find()
    if args.calibrate and run.metadata["stage"] != "base":
        calibration = _calibration(run, args.calibrate, train)
        others["calibrated"] = rescored(run.accelerator, calibration, found, dataset)

    protocol = {"test_proposals": detector.rpn.test_proposals[1], **(protocol or {})}
    report(run, found, dataset, train, protocol, others=others, speed=speed)


def test_saved(
    method: str,
    detector: type[nn.Module],
    stage: Stage,
    accelerator: Accelerator,
    opened: Callable[[Any], DetectionSplit] = stages.opened,
    test: Callable[..., None] = test,
) -> None:
    """Test the model of a stage as it is: the recipe's `detector`, made as its file says.

    `opened(args)` is the data, and `test(run, dataset)` how it is tested.
    """
    about, args = stage.metadata, stage.args
    model = rebuilt(detector, about)
    run = Run(method, args, accelerator, model, folder=stage.folder, metadata=about)
    test(run, opened(args).test.with_novel(about["novel"]).restrict(about["classes"]))


def _calibration(run: Run, choice: str, shots: DetectionSet | None) -> calibrate.Calibration:
    """By the shots that the run's model was just trained on, or else by the prototypes that its
    file has.
    """
    device = run.accelerator.device
    if shots is None:
        return calibrate.restored(run.metadata, run.folder / "model.safetensors", choice, device)
    calibration = calibrate.from_shots(choice, shots, device)
    run.save_model(calibration=calibration.describe(choice))
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
    new: dict[str, Detections] = {}
    share = _share(accelerator, dataset)
    with _progress(accelerator, "calibrate", len(share)) as bar:
        for i in share:
            record = dataset.records[i]
            boxes, scores, labels = found[record.id]
            names = [dataset.classes[label] for label in labels]
            columns = dataset.image(i), torch.from_numpy(boxes), torch.from_numpy(scores)
            scores = calibration(*(column.to(accelerator.device) for column in columns), names)
            new[record.id] = Detections(boxes, scores.cpu().numpy(), labels)
            bar.update()
    return launch.gather_by_id(accelerator, new)


def report(
    run: Run,
    found: dict[str, Detections],
    dataset: DetectionSet,
    train: DetectionSet | None = None,
    more: Mapping[str, Any] | None = None,
    *,
    others: Mapping[str, dict[str, Detections]] | None = None,
    speed: float | None = None,
) -> None:
    """Print how good the detections are and by what protocol, and finish the run.

    Writes the result, detections.json (COCO's format for results), and as pictures the detections,
    the confusion between classes, and the shots.

    Args:
        run: whose model says what it was trained on.
        found: what `detect` gave for `dataset`, the test part.
        train: what it was trained on.
        more: to say of the protocol.
        others: detections of the same model in another way, by their names in the result:
            "scrambled_supports", every class given the next class's supports, which tells how much
            the supports matter; "calibrated", by calibrated scores.
        speed: pictures per second of the test.
    """
    args = run.args
    protocol = _protocol(run, dataset) | dict(more or {})
    result: dict[str, Any] = evaluate(found, dataset)
    said = [f"{k.replace('_', ' ')} {v}" for k, v in protocol.items() if v is not None]
    run.accelerator.print(f"protocol: {', '.join(said)}\n{table(result, args.classwise)}")

    files = {}
    if run.accelerator.is_main_process:
        from fewshot import show  # here: drawing is not needed to train

        confused = confusion(found, dataset)
        files["detections.json"] = coco_json(found, dataset)
        files["detections.png"] = show.detections(dataset, found)
        files["confusion.png"] = show.confusion(confused, dataset.classes, dataset.novel)
        if train is not None and train.cut_to_shots:
            files["shots.png"] = show.shots(train)

    ways = {"scrambled_supports": "every class given the next class's supports"}
    ways["calibrated"] = f"scores calibrated by {args.calibrate}"
    for name, detections in (others or {}).items():
        other: Mapping[str, Any] = evaluate(detections, dataset)
        run.accelerator.print(f"with {ways[name]}:\n{table(other, args.classwise)}")
        result[name] = {key: value for key, value in other.items() if key != "per_class"}

    took = {"pictures_per_second": round(speed, 3)} if speed else {}
    run.finish({**result, "protocol": protocol}, files, took)


def _protocol(run: Run, dataset: DetectionSet) -> dict[str, Any]:
    """How a model was trained, and on what it is tested."""
    about = run.metadata
    args = about["args"]
    tuned = about["stage"] != "base"
    trained_on = "base classes"
    # CD-FSOD publishes the shots, whatever the seed
    fixed = tuned and dataset.target is not None and not args["shot_lists"]

    if set(about["classes"]) <= set(dataset.novel):
        trained_on = "novel classes"
    elif tuned and set(about["classes"]) > set(dataset.novel):
        trained_on = "base and novel classes"

    if fixed:
        shots = f"from {args['shots']}_shot.json, whatever the seed"
    elif args["shot_lists"]:
        shots = f"from {args['shot_lists']}"
    else:
        shots = f"drawn by seed {args['seed']}"

    protocol = {
        "dataset": args["dataset"],
        "split": args["split"] if args["dataset"] in PUBLISHED_SPLITS else None,
        "stage": about["stage"],
        "trained_on": trained_on,
        "shots": f"{args['shots']} of each class, {shots}" if tuned else None,
        "test_pictures": len(dataset),
        "test_objects": int(sum((~r.difficult).sum() for r in dataset.records)),
        "test_time_augmentation": "none",
    }
    if fixed and run.args.test_images is None:
        protocol["benchmark"] = cd_fsod.NAME
    return protocol
