"""TFA, frustratingly simple few-shot object detection (Wang et al., 2020, https://arxiv.org/abs/2003.06957).

A Faster R-CNN is trained on the base classes; then K shots of every class train only its last two layers, with a
classifier that compares directions, not lengths, so that classes of few examples do not pale beside the others.

    accelerate launch recipes/tfa.py --shots 10
    accelerate launch recipes/tfa.py --dataset voc --data-root data --split 1 --shots 10
    accelerate launch recipes/tfa.py --stage novel --shots 5
    accelerate launch recipes/tfa.py --stage finetune --shots 5 --novel NOVEL.safetensors
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from fewshot import InputError, fpn, run, weights
from fewshot.data import detection, k_shot
from fewshot.detect import detect, report
from fewshot.detectors.tfa import TFA, grow
from fewshot.fold import folded

# (steps, learning rate, milestones, warm-up) for a global batch of BATCH pictures: the published schedules, but for the
# embedded glyphs a quick one.
BATCH = {"glyphs": 8, "voc": 16, "coco": 16}
SCHEDULE = {
    "glyphs": {
        "base": (600, 0.02, (480,), 100),
        1: (100, 0.02, (80,), 10),
        2: (150, 0.02, (120,), 10),
        3: (150, 0.02, (120,), 10),
        5: (200, 0.02, (160,), 10),
        10: (200, 0.02, (160,), 10),
    },
    "voc": {
        "base": (18_000, 0.02, (12_000, 16_000), 100),
        1: (4000, 0.001, (3000,), 0),
        2: (8000, 0.001, (7000,), 0),
        3: (12_000, 0.001, (11_000,), 10),
        5: (20_000, 0.001, (18_000,), 10),
        10: (40_000, 0.001, (36_000,), 10),
    },
    "coco": {
        "base": (110_000, 0.02, (85_000, 100_000), 1000),
        10: (160_000, 0.001, (144_000,), 10),
        30: (240_000, 0.001, (216_000,), 10),
    },
}
SPLIT_2_LR = 0.005  # the published rate of fine-tuning on VOC's split 2
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
    stage: Literal["all", "base", "novel", "finetune"] = "all"  # all: the base model unless it is there, then fine-tune
    base: str | None = None  # base model to fine-tune; by default this recipe's own in --out
    novel: str | None = None  # start novel classes from this model of --stage novel; by default at random
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
    out: str | None = None  # where everything goes; by default runs/tfa/<dataset>-split<split>
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
    args.out = args.out or f"runs/tfa/{Path(args.dataset).stem}-split{args.split}"
    args.base = args.base or f"{args.out}/base/model.safetensors"
    if args.stage == "base" or (args.stage == "all" and not run.finished(accelerator, args.base)):
        train_and_test(args, accelerator, "base", f"{args.out}/base")
    if args.stage == "novel":
        train_and_test(args, accelerator, "novel", f"{args.out}/{args.shots}shot-seed{args.seed}-novel")
    elif args.stage != "base":
        train_and_test(args, accelerator, "finetune", f"{args.out}/{args.shots}shot-seed{args.seed}")


def train_and_test(args: Args, accelerator: run.Accelerator, stage: str, out: str) -> None:
    """Base training on the base classes, or training of the last layers on K shots of the novel or of all classes."""
    finetune = stage != "base"
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
    base, novel, everything = train_set.base, train_set.novel, train_set.classes
    if stage != "finetune":
        chosen = base if stage == "base" else novel
        train_set, test_set = train_set.restrict(chosen), test_set.restrict(chosen)
    for note in train_set.notes:
        accelerator.print(note)
    pipeline = detection.Pipeline(args.short or short, args.long or long, flip, multiple=32)

    # model
    if finetune:
        state, saved = weights.load_of(base, args.base)
        trunk, sizes = fpn.fpn(**saved["architecture"]), saved["sizes"]
    else:
        name = args.backbone or ("small" if args.dataset == "glyphs" else "resnet101")
        source = args.weights or ("none" if name == "small" else "imagenet")
        # frozen batch norm needs statistics to be frozen at
        norm = "group" if source == "none" and name.startswith("resnet") else None
        style = args.style if name.startswith("resnet") else None
        trunk, sizes = fpn.fpn(name, weights=source, style=style, norm=norm), SIZES[kind]
        trunk.freeze(0 if source == "none" else 1)  # 0: the stem alone; random filters serve there
    if args.rois:
        sizes = {**sizes, "rois": args.rois}
    model = TFA(trunk, len(train_set.classes), cosine=finetune, **sizes)
    if stage == "finetune":
        given = weights.load_of(novel, args.novel)[0] if args.novel else None
        weights.fill(model, grow(state, base, everything, given, novel), args.base)
    elif stage == "novel":
        weights.fill(model, state, args.base, fresh=("cls.", "reg."))
    if finetune:
        model.requires_grad_(False)
        model.cls.requires_grad_(True)
        model.reg.requires_grad_(True)
    batch_size, iters, lr, milestones, warmup = run.scaled(
        accelerator, BATCH[kind], SCHEDULE[kind][args.shots if finetune else "base"], args
    )
    if finetune and args.dataset == "voc" and args.split == 2 and args.lr is None:
        lr *= SPLIT_2_LR / 0.001
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=1e-4)
    scheduler = run.warmup_step(optimizer, warmup=warmup, milestones=milestones)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    about = {"stage": stage, "classes": train_set.classes, "base": train_set.base, "novel": train_set.novel}
    about |= {"architecture": trunk.architecture, "sizes": sizes, "cosine": finetune}
    about |= {"normalisation": trunk.normalisation.to_dict(), "pictures": pipeline.describe()}
    record = run.Record(accelerator, "tfa", args, out, model, optimizer, scheduler, about)
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
