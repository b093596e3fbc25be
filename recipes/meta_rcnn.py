"""Meta R-CNN (Yan et al., 2019, https://arxiv.org/abs/1909.13032).

A support picture with its box as a fourth channel becomes a vector per class; a query's RoI vectors are multiplied by
it, channel by channel, before they are classified. Base classes train everything; then K shots of every class train
only the last layers.

    accelerate launch recipes/meta_rcnn.py --shots 10
    accelerate launch recipes/meta_rcnn.py --dataset voc --data-root data --split 1 --shots 10
    accelerate launch recipes/meta_rcnn.py --stage finetune --shots 1 --seed 3
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from fewshot import InputError, run, trunks, weights
from fewshot.data import detection, k_shot
from fewshot.data.support import NWayKShot
from fewshot.detect import detect, report
from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.fold import folded

# (steps, learning rate, milestones, warm-up) for a global batch of BATCH pictures: the published schedules, but for the
# embedded glyphs a quick one.
BATCH = {"glyphs": 8, "voc": 32, "coco": 32}
SCHEDULE = {
    "glyphs": {
        "base": (600, 0.04, (480,), 50),
        1: (100, 0.04, (80,), 10),
        2: (150, 0.04, (120,), 10),
        3: (150, 0.04, (120,), 10),
        5: (200, 0.04, (160,), 10),
        10: (200, 0.04, (160,), 10),
    },
    "voc": {
        "base": (18_000, 0.005, (16_000,), 100),
        1: (100, 0.001, (), 0),
        2: (300, 0.001, (), 0),
        3: (500, 0.001, (), 0),
        5: (800, 0.001, (), 0),
        10: (1000, 0.001, (), 0),
    },
    "coco": {"base": (120_000, 0.005, (110_000,), 0), 10: (5000, 0.001, (), 0), 30: (8000, 0.001, (), 0)},
}
# (shorter side, longer side, flip) of query pictures, then the side of supports and how many a base class has at most;
# glyphs are characters: never mirrored
PICTURES = {"glyphs": (None, None, False, 80, 30), "voc": (600, 1000, True, 224, 200)}
PICTURES["coco"] = PICTURES["voc"]
# RoIs per training picture, hidden channels of the RPN, proposals before and after NMS
SIZES = {
    "glyphs": {"rois": 32, "rpn_channels": 128, "train_proposals": (1000, 100), "test_proposals": (1000, 100)},
    "voc": {"rois": 128, "rpn_channels": 512, "train_proposals": (12000, 2000), "test_proposals": (6000, 300)},
}
SIZES["coco"] = SIZES["voc"]

Backbone = Literal["small", "mobilenet_v2", "resnet18", "resnet50", "resnet101"]


@dataclass
class Args:
    # data
    dataset: str = "glyphs"  # glyphs, voc, coco, or your own in COCO's format: a folder with train.json and test.json
    novel_classes: tuple[str, ...] = ()  # which of your own data's classes are novel
    data_root: str = "data"  # folder that holds the data set
    split: Literal[1, 2, 3] = 1  # which classes are novel
    shots: Literal[1, 2, 3, 5, 10, 30] = 10  # boxes per class to fine-tune on; COCO's are 10 and 30
    shot_lists: str | None = None  # published few-shot lists' folder, or a shots.json; by default drawn by --seed
    short: int | None = None  # shorter side of the pictures; by default the published size
    long: int | None = None  # longest the longer side may get
    support_size: int | None = None  # side of the supports in pixels; by default the published size
    test_images: int | None = None  # test on only the first so many pictures
    classwise: bool = False  # also print the result of every class
    # training
    stage: Literal["all", "base", "finetune"] = "all"  # all: train the base model unless it is there, then fine-tune
    base: str | None = None  # base model to fine-tune; by default this recipe's own in --out
    batch_size: int | None = None  # pictures per step over all processes; other than published scales rate and steps
    iters: int | None = None  # steps of each stage; by default the published schedule
    lr: float | None = None  # learning rate; by default the published schedule
    group_aspect: bool = False  # batches of only wide or only tall pictures: less padding; published without
    save_every: int = 200  # steps between saves of the state
    # model
    backbone: Backbone | None = None  # by default small for glyphs, else as published
    style: Literal["torchvision", "caffe"] = "torchvision"  # of a ResNet; caffe needs --weights FILE
    weights: str | None = None  # imagenet, a file, or none; by default imagenet, but none for the small backbone
    rois: int | None = None  # RoIs that the second stage trains on per picture; by default as published
    # run
    out: str | None = None  # where everything goes; by default runs/meta_rcnn/<dataset>-split<split>
    seed: int = 0  # the only source of randomness
    workers: int = 2  # data-loading processes
    resume: bool = False  # go on from the last state in --out
    test_only: bool = False  # only test the model of --stage in --out
    wandb: bool = False  # log to Weights & Biases


def main(args: Args) -> None:
    accelerator = run.start(args)
    kind = args.dataset if args.dataset in SCHEDULE else "voc"
    if args.shots not in SCHEDULE[kind]:
        raise InputError(f"no schedule for {args.shots} shots of {args.dataset}: add one to SCHEDULE")
    args.out = args.out or f"runs/meta_rcnn/{Path(args.dataset).stem}-split{args.split}"
    args.base = args.base or f"{args.out}/base/model.safetensors"
    if args.stage == "base" or (args.stage == "all" and not run.finished(accelerator, args.base)):
        train_and_test(args, accelerator, "base", f"{args.out}/base")
    if args.stage != "base":
        train_and_test(args, accelerator, "finetune", f"{args.out}/{args.shots}shot-seed{args.seed}")


def train_and_test(args: Args, accelerator: run.Accelerator, stage: str, out: str) -> None:
    """Base training on the base classes, or fine-tuning of the last layers on K shots of every class."""
    finetune = stage == "finetune"
    kind = args.dataset if args.dataset in SCHEDULE else "voc"  # own data train as VOC does
    short, long, flip, support_size, used = PICTURES[kind]
    support_size = args.support_size or support_size

    # data
    difficult = "drop" if finetune else "keep"
    where = {"root": args.data_root, "split": args.split, "novel": args.novel_classes}
    train_set = detection.open_detection(args.dataset, part="train", difficult=difficult, **where)
    test_set = detection.open_detection(args.dataset, part="test", **where)
    test_set = test_set.with_records(test_set.records[: args.test_images])
    if finetune:
        train_set = k_shot.choose_shots(train_set, args.shots, args.seed, args.shot_lists)
    else:
        train_set, test_set = train_set.restrict(train_set.base), test_set.restrict(test_set.base)
    for note in train_set.notes:
        accelerator.print(note)
    pipeline = detection.Pipeline(args.short or short, args.long or long, flip)
    supports = NWayKShot(train_set, 1, used=30 if finetune else used, one_per_image=not finetune, size=support_size)

    # model
    if finetune:
        state, base = weights.load_of(train_set.base, args.base)
        trunk = trunks.c4(**base["architecture"])
    else:
        name = args.backbone or {"glyphs": "small", "voc": "resnet101", "coco": "resnet50"}[kind]
        source = args.weights or ("none" if name == "small" else "imagenet")
        # frozen batch norm needs statistics to be frozen at
        norm = "group" if source == "none" and name.startswith("resnet") else None
        style = args.style if name.startswith("resnet") else None
        trunk = trunks.c4(name, weights=source, meta=True, style=style, norm=norm)
        trunk.freeze(0 if source == "none" else 2)  # 0: the stem alone; random filters serve there
    sizes = SIZES[kind]
    if args.rois:
        sizes = {**sizes, "rois": args.rois}
    model = MetaRCNN(trunk, len(train_set.classes), **sizes)
    if finetune:
        weights.fill(model, state, args.base, fresh=("cls.", "reg.", "meta.", "prototypes", "known"))
        model.trunk.requires_grad_(False)
        model.rpn.requires_grad_(False)
    batch_size, iters, lr, milestones, warmup = run.scaled(
        accelerator, BATCH[kind], SCHEDULE[kind][args.shots if finetune else "base"], args
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=1e-4)
    scheduler = run.warmup_step(optimizer, warmup=warmup, milestones=milestones)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    about = {"stage": stage, "classes": train_set.classes, "base": train_set.base, "novel": train_set.novel}
    about |= {"architecture": trunk.architecture, "sizes": sizes, "support_size": support_size}
    about |= {"normalisation": trunk.normalisation.to_dict(), "pictures": pipeline.describe()}
    record = run.Record(accelerator, "meta_rcnn", args, out, model, optimizer, scheduler, about)
    if finetune:
        k_shot.save_shots(record.folder / "shots.json", train_set)

    # train
    if not args.test_only:
        loader = detection.train_loader(
            train_set,
            replace(pipeline, multiple=32) if finetune else pipeline,  # as published
            batch_size=batch_size,
            seed=args.seed,
            start=record.step,
            steps=iters,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
            workers=args.workers,
            group=args.group_aspect,
            extra=supports.draw,
        )
        model.train()
        for step, (batch, support) in record.steps(loader, iters):
            losses = model(
                batch.normalised(trunk.normalisation),
                batch.sizes.tolist(),
                batch.boxes,
                batch.labels,
                support.normalised(trunk.normalisation),
                support.labels,
            )
            accelerator.backward(sum(losses.values()))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            record.log(step, losses, ids=batch.ids)
            if step % args.save_every == 0 or step == iters:
                record.save(step)

    # test
    record.load_best()
    detector = accelerator.unwrap_model(model).eval()
    with torch.no_grad(), accelerator.autocast():
        table = supports.table(device=accelerator.device, workers=args.workers)
        vectors = [(detector.support_vectors(s.normalised(trunk.normalisation)), s.labels) for s in table]
    detector.set_prototypes(*(torch.cat(part) for part in zip(*vectors)))
    record.save_model()
    found = detect(accelerator, folded(detector).detect, test_set, pipeline, trunk.normalisation, workers=args.workers)
    report(record, found, test_set, stage=stage, trained_on=train_set.classes, args=args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
