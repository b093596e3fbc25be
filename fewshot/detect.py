"""Run a detector over a test set, every picture once by any number of processes, and report how good it is."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from fewshot import launch, run
from fewshot.data.detection import PUBLISHED_SPLITS, DetectionSet
from fewshot.data.pipeline import Pipeline, test_loader
from fewshot.data.stream import Feed
from fewshot.data.transforms import Normalisation
from fewshot.evaluate import Detections, coco_json, evaluate, in_original_pixels, table
from fewshot.fold import folded


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

    `detector(images, sizes)` takes normalised images (b, 3, H, W) and a list of their (height, width) and gives one
    (boxes, scores, labels) per image. Pictures of one size go eight at a time, others one by one, since padding would
    change what is detected; so the numbers do not depend on how many processes share the work.
    """
    same_size = len({(r.width, r.height) for r in dataset.records}) == 1
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    feed = Feed(rank=rank, world=world, device=accelerator.device, workers=workers)
    found: dict[str, Detections] = {}
    total = len(range(rank, len(dataset), world))
    with tqdm(total=total, desc="detect", unit="picture", leave=False, disable=not main) as bar:
        for batch in test_loader(dataset, pipeline, feed, normalisation, batch_size=8 if same_size else 1):
            with accelerator.autocast():
                results = detector(batch.images, batch.sizes)
            found |= in_original_pixels(batch, results)
            bar.update(len(batch.ids))
    return launch.gather_by_id(accelerator, found)


def test(
    record: run.Record,
    dataset: DetectionSet,
    protocol: Mapping[str, str] | None = None,
    *,
    workers: int = 0,
    classwise: bool = False,
    scramble: bool = False,
    **options: Any,
) -> None:
    """Test the run's saved model on `dataset`, the test part, and `report` how good it is.

    Args:
        protocol: what else to say of how it was tested.
        workers: data-loading processes.
        classwise: print the result of every class too.
        scramble: test also with every class given the next class's supports (`exchange_supports` of the detector).
        options: of the detector's `detect`.
    """
    detector = folded(record.best())
    pictures, normalisation = Pipeline(**record.about["pictures"]), detector.trunk.normalisation

    def look() -> dict[str, Detections]:
        search = partial(detector.detect, **options)
        return detect(record.accelerator, search, dataset, pictures, normalisation, workers=workers)

    found, scrambled = look(), None
    if scramble:
        detector.exchange_supports()
        scrambled = look()
    report(record, found, dataset, protocol, classwise=classwise, scrambled=scrambled)


def report(
    record: run.Record,
    found: dict[str, Detections],
    dataset: DetectionSet,
    more: Mapping[str, str] | None = None,
    *,
    classwise: bool = False,
    scrambled: dict[str, Detections] | None = None,
) -> None:
    """Print how good the detections are and by what protocol, and finish the run.

    Writes the result, detections.json (COCO's format for results) and detections.png.

    Args:
        record: whose model says what it was trained on.
        found: what `detect` gave for `dataset`, the test part.
        more: to say of the protocol.
        classwise: print the result of every class too.
        scrambled: the same with every class given the next class's supports: how much the supports matter.
    """
    about, args = record.about, record.about["args"]
    novel_only, both = set(about["classes"]) <= set(dataset.novel), set(about["classes"]) > set(dataset.novel)
    tuned = about["stage"] != "base"
    drawn = f"from {args['shot_lists']}" if args["shot_lists"] else f"drawn by seed {args['seed']}"
    protocol = {
        "dataset": args["dataset"],
        "split": args["split"] if args["dataset"] in PUBLISHED_SPLITS else None,
        "stage": about["stage"],
        "trained_on": "novel classes" if novel_only else "base and novel classes" if tuned and both else "base classes",
        "shots": f"{args['shots']} of each class, {drawn}" if tuned else None,
        "test_pictures": len(dataset),
        "test_time_augmentation": "none",
        **(more or {}),
    }
    result: dict[str, Any] = evaluate(found, dataset)
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in protocol.items() if value is not None)
    record.accelerator.print(f"protocol: {said}\n{table(result, classwise)}")
    files = {}
    if record.accelerator.is_main_process:
        from fewshot import show  # here: drawing is not needed to train

        files = {"detections.json": coco_json(found, dataset), "detections.png": show.detections(dataset, found)}
    if scrambled is not None:
        exchanged: Mapping[str, Any] = evaluate(scrambled, dataset)
        record.accelerator.print(f"with every class given the next class's supports:\n{table(exchanged, classwise)}")
        result["scrambled_supports"] = {key: value for key, value in exchanged.items() if key != "per_class"}
    record.finish({**result, "protocol": protocol}, files)
