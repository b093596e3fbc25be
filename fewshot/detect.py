"""Run a detector over a test set: every picture once, by any number of processes, boxes in the pictures' own pixels."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from fewshot import run
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
