"""Run a detector over a test set, every picture once by any number of processes, and report how good it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from fewshot import evaluate, run, show
from fewshot.data import detection
from fewshot.data.detection import DetectionSet, Pipeline
from fewshot.data.transforms import Normalisation
from fewshot.evaluate import Detections, in_original_pixels


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
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = detection.test_loader(
        dataset,
        pipeline,
        batch_size=8 if same_size else 1,
        rank=rank,
        world=world,
        device=accelerator.device,
        workers=workers,
    )
    found: dict[str, Detections] = {}
    total = len(range(rank, len(dataset), world))
    with tqdm(total=total, desc="detect", unit="picture", leave=False, disable=not accelerator.is_main_process) as bar:
        for batch in loader:
            with accelerator.autocast():
                results = detector(batch.normalised(normalisation), batch.sizes.tolist())
            found |= in_original_pixels(batch, results)
            bar.update(len(batch.ids))
    return run.gather_by_id(accelerator, found)


def report(
    record: run.Record,
    found: dict[str, Detections],
    dataset: DetectionSet,
    *,
    stage: str,
    trained_on: Sequence[str],
    args: Any,
    also: Mapping[str, str] | None = None,
) -> None:
    """Print how good the detections are and by what protocol, and finish the run.

    Writes metrics.json, detections.json (COCO's format for results) and detections.png.

    Args:
        found: what `detect` gave for `dataset`, the test part.
        stage: "base", or a stage of fine-tuning.
        trained_on: the classes of the training data.
        args: the recipe's, of which this reads dataset, split, shots, shot_lists, seed and classwise.
        also: more to say of the protocol.
    """
    protocol = {
        "dataset": args.dataset,
        "split": args.split if args.dataset in ("glyphs", "voc") else None,
        "stage": stage,
        "trained_on": "novel classes" if set(trained_on) <= set(dataset.novel) else "base classes",
        "shots": None,
        "test_pictures": len(dataset),
        "test_time_augmentation": "none",
    }
    if stage != "base":
        if set(trained_on) > set(dataset.novel):
            protocol["trained_on"] = "base and novel classes"
        drawn = f"from {args.shot_lists}" if args.shot_lists else f"drawn by seed {args.seed}"
        protocol["shots"] = f"{args.shots} of each class, {drawn}"
    protocol |= also or {}
    result = evaluate.evaluate(found, dataset)
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in protocol.items() if value is not None)
    record.accelerator.print(f"protocol: {said}\n{evaluate.table(result, args.classwise)}")
    if record.accelerator.is_main_process:
        run.write_json(record.folder / "detections.json", evaluate.coco_json(found, dataset))
    record.finish({**result, "protocol": protocol}, {"detections": show.detections(dataset, found)})
