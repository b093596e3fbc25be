"""MPSR, multi-scale positive sample refinement (Wu et al., 2020, https://arxiv.org/abs/2007.09384).

Few shots show few of the sizes that objects come in. So besides whole pictures a Faster R-CNN with a feature pyramid
trains on single objects, cut out and resized to several scales: its RPN is to find all of them, its classifier to
name them. Base classes train everything, then K shots of every class train everything on.

    accelerate launch recipes/mpsr.py --shots 10
    accelerate launch recipes/mpsr.py --dataset voc --data-root data --split 1 --shots 10
    accelerate launch recipes/mpsr.py --stage finetune --shots 1 --seed 3
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from fewshot import InputError, fpn, run, weights
from fewshot.data import detection, k_shot
from fewshot.data.object_crops import ObjectCrops
from fewshot.data.transforms import CAFFE_MPSR
from fewshot.detect import detect, report
from fewshot.detectors.mpsr import MPSR
from fewshot.fold import folded

# (steps, learning rate, milestones, warm-up) for a global batch of BATCH pictures and as many objects: the published
# schedules, but for the embedded glyphs a quick one.
BATCH = {"glyphs": 4, "voc": 4, "coco": 4}
FINETUNE = {"voc": (2000, 0.005, (1300,), 500), "coco": (4000, 0.005, (2800, 3500), 500)}
SCHEDULE = {
    "glyphs": {
        "base": (1000, 0.01, (800,), 100),
        1: (100, 0.005, (80,), 10),
        2: (150, 0.005, (120,), 10),
        3: (150, 0.005, (120,), 10),
        5: (200, 0.005, (160,), 10),
        10: (200, 0.005, (160,), 10),
    },
    "voc": {"base": (36_000, 0.005, (24_000, 32_000), 500)} | dict.fromkeys((1, 2, 3, 5, 10), FINETUNE["voc"]),
    "coco": {"base": (80_000, 0.005, (56_000, 70_000), 500)} | dict.fromkeys((10, 30), FINETUNE["coco"]),
}
WARMUP_RATIO = 1 / 3
VOC_OFFSET = (-1.0, -1.0, -1.0, -1.0)  # of VOC's pixels, which count from 1; the published models take it off all sides
# (shorter side, longer side, flip), and the sides in pixels below which objects are not cut out; glyphs are characters:
# never mirrored
PICTURES = {"glyphs": (None, None, False, 2), "voc": (800, 1333, True, 2), "coco": (800, 1333, True, 8)}
# RoIs per training picture, width of the box head, hidden channels of the RPN, proposals before and after NMS (in
# training after it for a process's batch together), and whether RoIs are cut half a pixel off, as they should be: the
# published models fine-tuned on VOC start from models that did not, and a model fine-tunes as its base was trained
SIZES = {
    "glyphs": {
        "rois": 64,
        "width": 256,
        "rpn_channels": 64,
        "train_proposals": (500, 400),
        "test_proposals": (500, 100),
        "aligned": True,
    },
    "voc": {
        "rois": 512,
        "width": 1024,
        "rpn_channels": 256,
        "train_proposals": (2000, 2000),
        "test_proposals": (1000, 1000),
        "aligned": True,
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
    out: str | None = None  # where everything goes; by default runs/mpsr/<dataset>-split<split>
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
    args.out = args.out or f"runs/mpsr/{Path(args.dataset).stem}-split{args.split}"
    args.base = args.base or f"{args.out}/base/model.safetensors"
    if args.stage == "base" or (args.stage == "all" and not run.finished(accelerator, args.base)):
        train_and_test(args, accelerator, "base", f"{args.out}/base")
    if args.stage != "base":
        train_and_test(args, accelerator, "finetune", f"{args.out}/{args.shots}shot-seed{args.seed}")


def train_and_test(args: Args, accelerator: run.Accelerator, stage: str, out: str) -> None:
    """Base training on the base classes, or fine-tuning of everything on K shots of every class."""
    finetune = stage == "finetune"
    kind = args.dataset if args.dataset in SCHEDULE else "voc"  # own data train as VOC does
    short, long, flip, smallest = PICTURES[kind]

    # data
    where = {"root": args.data_root, "split": args.split, "novel": args.novel_classes}
    where |= {"offset": VOC_OFFSET if args.dataset == "voc" else None}
    train_set = detection.open_detection(args.dataset, part="train", **where)
    test_set = detection.open_detection(args.dataset, part="test", **where)
    test_set = test_set.with_records(test_set.records[: args.test_images])
    if finetune:
        train_set = k_shot.choose_shots(train_set, args.shots, args.seed, args.shot_lists)
    else:
        train_set, test_set = train_set.restrict(train_set.base), test_set.restrict(test_set.base)
    for note in train_set.notes:
        accelerator.print(note)
    pipeline = detection.Pipeline(args.short or short, args.long or long, flip, multiple=32)
    unpadded = replace(pipeline, multiple=1)

    # model
    if finetune:
        state, base = weights.load_of(train_set.base, args.base)
        trunk, sizes = fpn.fpn(**base["architecture"]), base["sizes"]
        trunk.freeze(0 if base["architecture"]["norm"] == "group" else 1)
    else:
        name = args.backbone or ("small" if args.dataset == "glyphs" else "resnet101")
        source = args.weights or ("none" if name == "small" else "imagenet")
        # frozen batch norm needs statistics to be frozen at
        norm = "group" if source == "none" and name.startswith("resnet") else None
        style = args.style if name.startswith("resnet") else None
        trunk, sizes = fpn.fpn(name, weights=source, style=style, norm=norm), SIZES[kind]
        trunk.freeze(0 if source == "none" else 1)  # 0: the stem alone; random filters serve there
    if trunk.architecture["style"] == "caffe":
        trunk.normalisation = CAFFE_MPSR
    if args.rois:
        sizes = {**sizes, "rois": args.rois}
    model = MPSR(trunk, len(train_set.classes), **sizes)
    if finetune:
        torch.nn.init.normal_(model.cls.weight, std=0.001)
        weights.fill(model, state, args.base, fresh=("cls.",))
    batch_size, iters, lr, milestones, warmup = run.scaled(
        accelerator, BATCH[kind], SCHEDULE[kind][args.shots if finetune else "base"], args
    )
    optimizer = torch.optim.SGD(parameter_groups(model, lr, kind), lr=lr, momentum=0.9, weight_decay=1e-4)
    scheduler = run.warmup_step(optimizer, warmup=warmup, ratio=WARMUP_RATIO, milestones=milestones)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    about = {"stage": stage, "classes": train_set.classes, "base": train_set.base, "novel": train_set.novel}
    about |= {"architecture": trunk.architecture, "sizes": sizes}
    about |= {"normalisation": trunk.normalisation.to_dict(), "pictures": unpadded.describe()}
    record = run.Record(accelerator, "mpsr", args, out, model, optimizer, scheduler, about)
    if finetune:
        k_shot.save_shots(record.folder / "shots.json", train_set)

    # train
    if not args.test_only:
        mine = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        scales = accelerator.unwrap_model(model).levels.scales
        crops = ObjectCrops(train_set, scales, batch_size, flip=flip, smallest=smallest, **mine)
        loader = detection.train_loader(
            balanced(train_set) if finetune and args.dataset == "voc" else train_set,
            pipeline,
            batch_size=batch_size,
            seed=args.seed,
            start=record.step,
            steps=iters,
            device=accelerator.device,
            workers=args.workers,
            group=args.group_aspect,
            extra=crops.draw,
            **mine,
        )
        model.train()
        for step, (batch, objects) in record.steps(loader, iters):
            losses = model(
                batch.normalised(trunk.normalisation),
                batch.sizes.tolist(),
                batch.boxes,
                batch.labels,
                objects.normalised(trunk.normalisation),
                objects.labels,
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
    found = detect(accelerator, folded(detector).detect, test_set, unpadded, trunk.normalisation, workers=args.workers)
    report(record, found, test_set, stage=stage, trained_on=train_set.classes, args=args)


def parameter_groups(model: torch.nn.Module, lr: float, dataset: str) -> list[dict]:
    """What is trained; on VOC biases at twice the rate and without decay, as published."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if dataset != "voc":
        return [{"params": [p for _, p in trained]}]
    biases = [p for name, p in trained if name.endswith(".bias")]
    others = [p for name, p in trained if not name.endswith(".bias")]
    return [{"params": others}, {"params": biases, "lr": 2 * lr, "weight_decay": 0.0}]


def balanced(train_set: detection.DetectionSet) -> detection.DetectionSet:
    """VOC's few pictures repeated until both years come about equally often, as published."""
    records = []
    for year in ("VOC2007", "VOC2012"):
        mine = [record for record in train_set.records if year in str(record.path)]
        records += mine * (100 // len(mine) + 1 if 0 < len(mine) < 50 else 1)
    return train_set.with_records(records)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
