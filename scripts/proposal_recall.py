"""How many of the objects the first stage of a detector proposes, among its best 100, 300 and 1000
boxes of a picture.

    python scripts/proposal_recall.py runs/tfa/voc-split1-resnet101/base
    accelerate launch scripts/proposal_recall.py runs/attention_rpn/glyphs-split1-small/10shot-seed0 --test-images 100

What is not proposed is never found, so this says which of the two stages to work on. Base, novel
and all classes are those of the data that the model was trained on, in their test part.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor

import fewshot
from fewshot import InputError
from fewshot.data import detection
from fewshot.evaluation import average_precision
from fewshot.evaluation.detect import detect
from fewshot.inference import Detector


@dataclass
class Args:
    model: tyro.conf.Positional[str]  # a detector's run folder, its model file, or a hub id
    data_root: str | None = None  # folder that holds the data set; by default as in training
    test_images: int | None = None  # only the first so many pictures
    iou: float = 0.5  # an object counts as proposed when a box overlaps it at least so much
    workers: int = 2  # data-loading processes


def main(args: Args) -> None:
    accelerator = Accelerator()
    model = fewshot.load(args.model, accelerator.device)
    if not isinstance(model, Detector):
        raise InputError(
            f"{args.model} is a model of {model.method}, which proposes nothing: give a detector"
        )
    trained = model.about["args"]
    if "dataset" not in trained:
        raise InputError(
            f"{args.model} does not say what it was trained on: give a model that a recipe left"
        )

    dataset = detection.open_detection(
        trained["dataset"],
        args.data_root or trained["data_root"],
        part="test",
        split=trained["split"],
        novel=() if trained["dataset"] in detection.PUBLISHED else model.about["novel"],
        layout=trained.get("layout"),
    ).restrict(model.classes)
    dataset = dataset.with_records(dataset.records[: args.test_images])
    most, rpn = average_precision.PROPOSALS[-1], model.network.rpn
    rpn.test_proposals = max(rpn.test_proposals[0], most), most

    def propose(images: Tensor, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, ...]]:
        boxes = model.network.propose(images, sizes)
        return [(b[:, :4], b[:, 4], torch.zeros_like(b[:, 4], dtype=torch.int64)) for b in boxes]

    found = detect(
        accelerator, propose, dataset, model.pipeline, model.normalisation, workers=args.workers
    )
    boxes = {id: columns.boxes for id, columns in found.items()}  # best first
    recall = average_precision.proposal_recall(
        boxes, dataset, iou=args.iou, inclusive_pixels=dataset.inclusive_pixels
    )

    accelerator.print(
        f"{Path(args.model)}: {len(dataset)} pictures, recall in percent at an overlap of {args.iou:g}"
    )
    accelerator.print(average_precision.table(recall))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
