"""FSCE, few-shot object detection via contrastive proposal encoding (Sun et al., 2021, https://arxiv.org/abs/2103.05950).

Base training is TFA's. Fine-tuning on K shots of every class trains more than the last layers, on more and looser
positives, and a contrastive loss pulls RoIs of one class together so that similar classes are told apart.

    accelerate launch recipes/fsce.py --shots 10
    accelerate launch recipes/fsce.py --shots 10 --contrastive off --base runs/tfa/glyphs-split1/base/model.safetensors
    accelerate launch recipes/fsce.py --dataset voc --data-root data --split 1 --shots 10
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from fewshot import InputError, fpn, run, weights
from fewshot.data import detection, k_shot
from fewshot.detect import detect, report
from fewshot.detectors.fsce import FSCE
from fewshot.detectors.tfa import grow
from fewshot.fold import folded

# (steps, learning rate, milestones, warm-up), then the factor at milestones, for a global batch of BATCH pictures: the
# published schedules, but for the embedded glyphs a quick one. VOC has one for each split.
BATCH = {"glyphs": 8, "voc": 16, "coco": 16}
SCHEDULE = {
    "glyphs": {
        "base": ((600, 0.02, (480,), 100), 0.1),
        1: ((100, 0.01, (80,), 10), 0.1),
        2: ((150, 0.01, (120,), 10), 0.1),
        3: ((150, 0.01, (120,), 10), 0.1),
        5: ((200, 0.01, (160,), 10), 0.1),
        10: ((200, 0.01, (160,), 10), 0.1),
    },
    "voc": {
        "base": ((18_000, 0.02, (12_000, 16_000), 100), 0.1),
        (1, 1): ((6000, 0.001, (3500,), 20), 0.1),
        (1, 2): ((7000, 0.001, (5000,), 20), 0.1),
        (1, 3): ((8000, 0.001, (4000, 6000), 200), 0.5),
        (1, 5): ((9000, 0.001, (5000, 7000), 200), 0.5),
        (1, 10): ((15_000, 0.001, (8000, 13_000), 200), 0.5),
        (2, 1): ((3000, 0.001, (2000,), 20), 0.1),
        (2, 2): ((5000, 0.001, (3000,), 20), 0.1),
        (2, 3): ((9000, 0.001, (5000, 7000), 200), 0.5),
        (2, 5): ((9000, 0.001, (5000, 7000), 100), 0.5),
        (2, 10): ((12_000, 0.001, (7000, 9000), 200), 0.5),
        (3, 1): ((8000, 0.001, (6000,), 20), 0.1),
        (3, 2): ((8000, 0.001, (6000,), 20), 0.1),
        (3, 3): ((10_000, 0.001, (6000, 8000), 200), 0.5),
        (3, 5): ((12_000, 0.001, (8000, 10_000), 200), 0.3),
        (3, 10): ((15_000, 0.001, (8000, 13_000), 200), 0.5),
    },
    "coco": {
        "base": ((110_000, 0.02, (85_000, 100_000), 1000), 0.1),
        10: ((30_000, 0.001, (20_000,), 200), 0.3),
        30: ((40_000, 0.001, (30_000,), 200), 0.3),
    },
}
# the contrastive loss by shots: weight, least overlap of a RoI, and the steps after each of which the weight is halved
CONTRAST = {
    "glyphs": dict.fromkeys((1, 2, 3, 5, 10), (0.2, 0.7, (100,))),
    "voc": {3: (0.2, 0.6, (3000, 6000)), 5: (0.5, 0.7, (4000, 7000)), 10: (0.5, 0.8, (6000, 10_000))},
    "coco": {},  # published without
}
# (shorter side, one of these in training; longer side; flip): glyphs are characters, never mirrored
SHORT = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
PICTURES = {"glyphs": (None, None, False), "voc": (SHORT, 1333, True), "coco": (SHORT[5:], 1333, True)}
# RoIs per training picture, width of the box head, hidden channels of the RPN, proposals before and after NMS
SIZES = {
    "glyphs": {
        "rois": 64,
        "width": 256,
        "rpn_channels": 64,
        "train_proposals": (500, 200),
        "test_proposals": (500, 100),
    },
    "voc": {
        "rois": 512,
        "width": 1024,
        "rpn_channels": 256,
        "train_proposals": (2000, 1000),
        "test_proposals": (1000, 1000),
    },
}
SIZES["coco"] = SIZES["voc"]
# what fine-tuning changes: half the RoIs, of twice the proposals, with looser positives
FINETUNE = {
    "glyphs": {"rois": 32, "train_proposals": (500, 400), "threshold": 0.4},
    "voc": {"rois": 256, "train_proposals": (2000, 2000), "threshold": 0.4},
    "coco": {"rois": 256, "train_proposals": (2000, 2000), "threshold": 0.5},
}
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
    test_images: int | None = None  # test on only the first so many pictures
    classwise: bool = False  # also print the result of every class
    # training
    stage: Literal["all", "base", "finetune"] = "all"  # all: the base model unless it is there, then fine-tune
    base: str | None = None  # base model to fine-tune, TFA's too; by default this recipe's own in --out
    contrastive: Literal["published", "on", "off"] = "published"  # as published for the data set and shots
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
    out: str | None = None  # where everything goes; by default runs/fsce/<dataset>-split<split>
    seed: int = 0  # the only source of randomness
    workers: int = 2  # data-loading processes
    resume: bool = False  # go on from the last state in --out
    test_only: bool = False  # only test the model of --stage in --out
    wandb: bool = False  # log to Weights & Biases


def main(args: Args) -> None:
    accelerator = run.start(args)
    if args.shots not in (10, 30) if args.dataset == "coco" else args.shots == 30:
        raise InputError(f"no schedule for {args.shots} shots of {args.dataset}: add one to SCHEDULE")
    args.out = args.out or f"runs/fsce/{Path(args.dataset).stem}-split{args.split}"
    args.base = args.base or f"{args.out}/base/model.safetensors"
    if args.stage == "base" or (args.stage == "all" and not run.finished(accelerator, args.base)):
        train_and_test(args, accelerator, "base", f"{args.out}/base")
    if args.stage != "base":
        train_and_test(args, accelerator, "finetune", f"{args.out}/{args.shots}shot-seed{args.seed}")


def train_and_test(args: Args, accelerator: run.Accelerator, stage: str, out: str) -> None:
    """Base training on the base classes, or fine-tuning on K shots of every class."""
    finetune = stage == "finetune"
    kind = args.dataset if args.dataset in SCHEDULE else "voc"  # own data train as VOC does
    short, long, flip = PICTURES[kind]

    # data
    difficult = "drop" if finetune else "keep"
    where = {"root": args.data_root, "split": args.split, "novel": args.novel_classes}
    train_set = detection.open_detection(args.dataset, part="train", difficult=difficult, **where)
    test_set = detection.open_detection(args.dataset, part="test", **where)
    test_set = test_set.with_records(test_set.records[: args.test_images])
    if finetune:
        train_set = k_shot.choose_shots(train_set, args.shots, args.seed, args.shot_lists)
    else:
        train_set, test_set = train_set.restrict(train_set.base), test_set.restrict(train_set.base)
    for note in train_set.notes:
        accelerator.print(note)
    pipeline = detection.Pipeline(args.short or short, args.long or long, flip, multiple=32)

    # model
    if finetune:
        state, saved = weights.load_of(train_set.base, args.base)
        trunk, sizes = fpn.fpn(**saved["architecture"]), saved["sizes"]
    else:
        name = args.backbone or ("small" if args.dataset == "glyphs" else "resnet101")
        source = args.weights or ("none" if name == "small" else "imagenet")
        # frozen batch norm needs statistics to be frozen at
        norm = "group" if source == "none" and name.startswith("resnet") else None
        style = args.style if name.startswith("resnet") else None
        trunk, sizes = fpn.fpn(name, weights=source, style=style, norm=norm), SIZES[kind]
        trunk.freeze(0 if source == "none" else 1)  # 0: the stem alone; random filters serve there
    key = "base" if not finetune else (args.split, args.shots) if kind == "voc" else args.shots
    schedule, gamma = SCHEDULE[kind][key]
    batch_size, iters, lr, milestones, warmup = run.scaled(accelerator, BATCH[kind], schedule, args)
    strength, above, halvings = CONTRAST[kind].get(args.shots, (0.2, 0.6, (3000, 6000)))
    contrastive = finetune and (args.contrastive == "on" or args.shots in CONTRAST[kind])
    dimensions = 128 if contrastive and args.contrastive != "off" else 0
    sizes |= FINETUNE[kind] if finetune else {}
    classes = len(train_set.classes)
    if args.rois:
        sizes = {**sizes, "rois": args.rois}
    model = FSCE(trunk, classes, dimensions=dimensions, above=above, cosine=finetune, **sizes)
    if finetune:
        state = grow(state, train_set.base, train_set.classes)
        weights.fill(model, state, args.base, fresh=("contrast.",))
        model.trunk.freeze(len(model.trunk.stages))
        if kind == "voc" and args.shots < 3:
            for part in (model.trunk, model.rpn, model.fc1):
                part.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=1e-4)
    scheduler = run.warmup_step(optimizer, warmup=warmup, milestones=milestones, gamma=gamma)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    about = {"stage": stage, "classes": train_set.classes, "base": train_set.base, "novel": train_set.novel}
    about |= {"architecture": trunk.architecture, "sizes": sizes, "cosine": finetune, "dimensions": dimensions}
    about |= {"normalisation": trunk.normalisation.to_dict(), "pictures": pipeline.describe()}
    record = run.Record(accelerator, "fsce", args, out, model, optimizer, scheduler, about)
    if finetune:
        k_shot.save_shots(record.folder / "shots.json", train_set)

    # train
    if not args.test_only:
        loader = detection.train_loader(
            train_set,
            pipeline,
            batch_size=batch_size,
            seed=args.seed,
            start=record.step,
            steps=iters,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
            workers=args.workers,
            group=args.group_aspect,
        )
        model.train()
        for step, batch in record.steps(loader, iters):
            halved = sum(step > h * iters / schedule[0] for h in halvings)
            accelerator.unwrap_model(model).strength = strength * 0.5**halved
            images = batch.normalised(trunk.normalisation)
            losses = model(images, batch.sizes.tolist(), batch.boxes, batch.labels)
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
    found = detect(accelerator, folded(detector).detect, test_set, pipeline, trunk.normalisation, workers=args.workers)
    report(record, found, test_set, stage=stage, trained_on=train_set.classes, args=args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
