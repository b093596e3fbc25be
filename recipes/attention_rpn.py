"""Attention-RPN (Fan et al., 2020, https://arxiv.org/abs/1908.01998).

Supports of a class say what to look for: their mean scales the channels that the RPN sees, and a head of three
relations (global, local, patch) compares each RoI with them. It trains on pictures paired with a class that is there
and with one that is not. Base classes train everything, then K shots the head. No layer belongs to a class, so a new
one needs only its supports.

    accelerate launch recipes/attention_rpn.py --shots 10
    accelerate launch recipes/attention_rpn.py --dataset voc --data-root data --split 1 --shots 10
    accelerate launch recipes/attention_rpn.py --stage finetune --shots 10 --test-only --share-proposals
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from fewshot import InputError, run, trunks, weights
from fewshot.data import detection, k_shot
from fewshot.data.query_aware import QueryAware, without_small
from fewshot.detect import detect, report
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.fold import folded
from fewshot.pretrain import name_objects

# pictures of a global batch in base training and in fine-tuning, and the published schedules for them (steps, learning
# rate, milestones, warm-up), but for the embedded glyphs a quick one
BATCH = {"glyphs": (8, 8), "voc": (16, 8), "coco": (8, 4)}
SCHEDULE = {
    "glyphs": {
        "base": (500, 0.02, (400,), 50),
        1: (60, 0.01, (), 0),
        2: (80, 0.01, (), 0),
        3: (80, 0.01, (), 0),
        5: (120, 0.01, (), 0),
        10: (120, 0.01, (), 0),
    },
    "voc": {
        "base": (18_000, 0.004, (16_000,), 500),
        1: (300, 0.001, (), 0),
        2: (600, 0.001, (), 0),
        3: (900, 0.001, (), 0),
        5: (1200, 0.001, (), 0),
        10: (1500, 0.001, (), 0),
    },
    "coco": {
        "base": (120_000, 0.004, (112_000,), 1000),
        10: (3000, 0.001, (2000,), 200),
        30: (6000, 0.001, (3000, 5000), 400),
    },
}
WARMUP_RATIO = 0.1
HEAD_LR = {"glyphs": 0.5, "voc": 2.0, "coco": 2.0}  # times the rate of the others, where these train too
SHOTS = {"glyphs": 2, "voc": 10, "coco": 10}  # supports per class and picture in base training
SMALLEST = {"glyphs": 0, "voc": 1024, "coco": 1024}  # base training leaves out pictures with an object of less area
OBJECTS = 300  # steps of naming objects, if --weights says so; --iters can only shorten them
TABLE = {"glyphs": 30, "voc": 100, "coco": 10}  # supports per class that a base model is tested with
# (shorter side, one of these in training; longer side) of the pictures to search, then side and context of supports
SHORT = (440, 472, 504, 536, 568, 600)
PICTURES = {"glyphs": (None, None, 80, 4), "voc": (SHORT, 1000, 320, 16), "coco": (SHORT, 1000, 320, 16)}
# RoIs per pair in training, hidden channels of RPN and patch relation, proposals before and after NMS
SIZES = {
    "glyphs": {
        "rois": 32,
        "rpn_channels": 64,
        "relation_channels": 64,
        "train_proposals": (500, 100),
        "test_proposals": (500, 50),
        "shared_proposals": 50,
    },
    "voc": {
        "rois": 128,
        "rpn_channels": 1024,
        "relation_channels": 512,
        "train_proposals": (12000, 2000),
        "test_proposals": (6000, 100),
        "shared_proposals": 100,
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
    weights: str | None = None  # imagenet (default), a file, none, or objects: names them first (default of small)
    init: str | None = None  # start the trunk from that of a model of meta_rcnn or fsdetview, instead of --weights
    rois: int | None = None  # RoIs that the second stage trains on per picture; by default as published
    # run
    out: str | None = None  # where everything goes; by default runs/attention_rpn/<dataset>-split<split>
    seed: int = 0  # the only source of randomness
    workers: int = 2  # data-loading processes
    resume: bool = False  # go on from the last state in --out
    test_only: bool = False  # only test the model of --stage in --out
    share_proposals: bool = False  # test all classes on one set of RoIs: quicker, not quite the same
    wandb: bool = False  # log to Weights & Biases


def main(args: Args) -> None:
    accelerator = run.start(args)
    kind = args.dataset if args.dataset in SCHEDULE else "voc"
    if args.shots not in SCHEDULE[kind]:
        raise InputError(f"no schedule for {args.shots} shots of {args.dataset}: add one to SCHEDULE")
    args.out = args.out or f"runs/attention_rpn/{Path(args.dataset).stem}-split{args.split}"
    args.base = args.base or f"{args.out}/base/model.safetensors"
    if args.stage == "base" or (args.stage == "all" and not run.finished(accelerator, args.base)):
        train_and_test(args, accelerator, "base", f"{args.out}/base")
    if args.stage != "base":
        train_and_test(args, accelerator, "finetune", f"{args.out}/{args.shots}shot-seed{args.seed}")


def train_and_test(args: Args, accelerator: run.Accelerator, stage: str, out: str) -> None:
    """Base training on the base classes, or fine-tuning of the head on K shots of every class (COCO: novel ones)."""
    finetune = stage == "finetune"
    kind = args.dataset if args.dataset in SCHEDULE else "voc"  # own data train as VOC does
    short, long, support_size, context = PICTURES[kind]
    support_size = args.support_size or support_size

    # data
    where = {"root": args.data_root, "split": args.split, "novel": args.novel_classes}
    train_set = detection.open_detection(args.dataset, part="train", **where)
    test_set = detection.open_detection(args.dataset, part="test", **where)
    test_set = test_set.with_records(test_set.records[: args.test_images])
    base, novel = train_set.base, train_set.novel
    if not finetune or args.dataset == "coco":
        chosen = novel if finetune else base
        train_set, test_set = train_set.restrict(chosen), test_set.restrict(chosen)
    if finetune:
        train_set = k_shot.choose_shots(train_set, args.shots, args.seed, args.shot_lists)
    else:
        train_set = without_small(train_set, SMALLEST[kind])
    for note in train_set.notes:
        accelerator.print(note)
    pipeline = detection.Pipeline(args.short or short, args.long or long)
    # in fine-tuning one shot is to be found, the others show what to look for
    shots = min(max(args.shots - 1, 1), 10) if finetune else SHOTS[kind]
    episodes = QueryAware(train_set, pipeline, ways=2, shots=shots, size=support_size, context=context)

    # model
    if finetune:
        state, saved = weights.load_of(base, args.base)
        trunk, sizes = trunks.c4(**saved["architecture"]), saved["sizes"]
    else:
        name = args.backbone or ("small" if args.dataset == "glyphs" else "resnet50")
        source = args.weights or ("none" if args.init else "objects" if name == "small" else "imagenet")
        pretrained = source not in ("none", "objects")
        # frozen batch norm needs statistics to be frozen at
        norm = None if pretrained or not name.startswith("resnet") else "group"
        style = args.style if name.startswith("resnet") else None
        trunk = trunks.c4(name, weights=source if pretrained else "none", style=style, norm=norm)
        sizes = SIZES[kind]
        if args.init:
            weights.fill_part(trunk, args.init, "trunk.", without=("meta_conv.",))
        trunk.freeze(2 if pretrained else 0)  # 0: the stem alone; random filters serve there
        if source == "objects" and not args.test_only:
            how = {"seed": args.seed, "steps": min(args.iters or OBJECTS, OBJECTS), "workers": args.workers}
            name_objects(accelerator, trunk, train_set, pipeline, **how)
    if args.rois:
        sizes = {**sizes, "rois": args.rois}
    model = AttentionRPN(trunk, len(train_set.classes), **sizes)
    if finetune:
        weights.fill(model, state, args.base, fresh=("kernels", "maps", "known"))
        for part in (trunk.conv1, trunk.bn1, trunk.layer1, trunk.layer2, trunk.layer3):
            part.requires_grad_(False)
        if args.dataset != "coco":
            trunk.requires_grad_(False)
            model.rpn.requires_grad_(False)
    batch_size, iters, lr, milestones, warmup = run.scaled(
        accelerator, BATCH[kind][finetune], SCHEDULE[kind][args.shots if finetune else "base"], args
    )
    head = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("relation.")]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("relation.")]
    groups = [{"params": others}, {"params": head, "lr": lr * HEAD_LR[kind] if others else lr}]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9, weight_decay=1e-4)
    scheduler = run.warmup_step(optimizer, warmup=warmup, ratio=WARMUP_RATIO, milestones=milestones)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    about = {"stage": stage, "classes": train_set.classes, "base": train_set.base, "novel": train_set.novel}
    about |= {"architecture": trunk.architecture, "sizes": sizes, "support_size": support_size, "context": context}
    about |= {"normalisation": trunk.normalisation.to_dict(), "pictures": pipeline.describe()}
    record = run.Record(accelerator, "attention_rpn", args, out, model, optimizer, scheduler, about)
    if finetune:
        k_shot.save_shots(record.folder / "shots.json", train_set)

    # train
    if not args.test_only:
        loader = episodes.loader(
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
        for step, (batch, support) in record.steps(loader, iters):
            losses = model(
                batch.normalised(trunk.normalisation),
                batch.sizes.tolist(),
                batch.boxes,
                support.normalised(trunk.normalisation),
                support.boxes,
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
    most = None if finetune else TABLE[kind]
    table = episodes.table(most, args.seed, device=accelerator.device, workers=args.workers)
    with torch.no_grad(), accelerator.autocast():
        detector.set_prototypes(
            (*detector.support_features(s.normalised(trunk.normalisation), s.boxes), s.labels) for s in table
        )
    record.save_model()
    search = partial(folded(detector).detect, share=args.share_proposals)
    also = {"proposals": "shared by all classes" if args.share_proposals else "of each class"}
    found = detect(accelerator, search, test_set, pipeline, trunk.normalisation, workers=args.workers)
    report(record, found, test_set, stage=stage, trained_on=train_set.classes, args=args, also=also)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
