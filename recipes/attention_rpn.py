"""Attention-RPN (Fan et al., 2020, https://arxiv.org/abs/1908.01998).

Supports of a class say what to look for: their mean scales the channels that the RPN sees, and a
head of three relations (global, local, patch) compares each RoI with them. It trains on pictures
paired with a class that is there and with one that is not. Base classes train everything, then K
shots the head. No layer belongs to a class, so a new one needs only its supports.

    accelerate launch recipes/attention_rpn.py --shots 10
    accelerate launch recipes/attention_rpn.py --dataset voc --data-root data --split 1 --shots 10
    accelerate launch recipes/attention_rpn.py --stage finetune --shots 10 --test-only --share-proposals
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro

from fewshot import weights
from fewshot.backbones import trunks
from fewshot.data import detection, k_shot
from fewshot.data.query_aware import QueryAware, without_small
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.build import rebuilt
from fewshot.evaluation import detect
from fewshot.training import bases, folders, launch, stages
from fewshot.training.folders import Stage
from fewshot.training.pretrain import name_objects
from fewshot.training.run import Run, Training
from fewshot.training.schedule import Passes, Schedule

METHOD = "attention_rpn"  # names runs and models; a copy of this recipe needs a name of its own

# steps, rate, milestones, warm-up for a global batch of BATCH pictures (base training,
# fine-tuning): as published, but for the embedded glyphs quick
BATCH = {"glyphs": (8, 8), "voc": (16, 8), "coco": (8, 4), "own": (4, 4)}
RATIO = 0.1  # the share of the rate that a warm-up begins with
# fmt: off
SCHEDULE = {
    "glyphs": {
        "base": Schedule(500, 0.02, (400,), 50),
        1: Schedule(60, 0.01), 2: Schedule(80, 0.01), 3: Schedule(80, 0.01), 5: Schedule(120, 0.01),
        10: Schedule(120, 0.01),
    },
    "voc": {
        "base": Schedule(18_000, 0.004, (16_000,), 500),
        1: Schedule(300, 0.001), 2: Schedule(600, 0.001), 3: Schedule(900, 0.001), 5: Schedule(1200, 0.001),
        10: Schedule(1500, 0.001),
    },
    "coco": {
        "base": Schedule(120_000, 0.004, (112_000,), 1000),
        10: Schedule(3000, 0.001, (2000,), 200), 30: Schedule(6000, 0.001, (3000, 5000), 400),
    },
    "own": {"base": Passes(12, 0.001, 500, 20_000), "few": Passes(20, 0.001, 100, 2000)},
}
# fmt: on
# times the rate of the others, where these train too
HEAD_LR = {"glyphs": 0.5, "voc": 2.0, "coco": 2.0, "own": 2.0}
# supports per class and picture in base training
SHOTS = {"glyphs": 2, "voc": 10, "coco": 10, "own": 5}
# base training: no pictures with an object of less area
SMALLEST = {"glyphs": 0, "voc": 1024, "coco": 1024, "own": 0}
OBJECTS = 300  # steps of naming objects, if --weights says so; --iters can only shorten them
# supports per class that a base model is tested with
TABLE = {"glyphs": 30, "voc": 100, "coco": 10, "own": 30}
# shorter side (one of these in training), longer side of the pictures to search; side and context
# of supports
SHORT = (440, 472, 504, 536, 568, 600)
PICTURES = {
    "glyphs": (None, None, 80, 4),
    "voc": (SHORT, 1000, 320, 16),
    "coco": (SHORT, 1000, 320, 16),
}
PICTURES |= {"own": (600, 1000, 320, 16)}
# RoIs per pair in training, hidden channels of RPN and patch relation, proposals before and after
# NMS
QUICK = {"rois": 32, "rpn_channels": 64, "relation_channels": 64, "shared_proposals": 50}
QUICK |= {"train_proposals": (500, 100), "test_proposals": (500, 50)}
PUBLISHED = {"rois": 128, "rpn_channels": 1024, "relation_channels": 512, "shared_proposals": 100}
PUBLISHED |= {"train_proposals": (12000, 2000), "test_proposals": (6000, 100)}
SIZES = {"glyphs": QUICK, "voc": PUBLISHED, "coco": PUBLISHED, "own": PUBLISHED}
BACKBONE = {"glyphs": "small", "voc": "resnet50", "coco": "resnet50", "own": "resnet50"}


@dataclass
class Args:
    # data
    dataset: str = "glyphs"  # glyphs, voc, coco, or a folder annotated as COCO, VOC or YOLO do
    layout: Literal["coco", "voc", "yolo"] | None = None  # where own data's folder has several
    novel_classes: tuple[str, ...] = ()  # own data's novel classes; all, if --base knows none
    data_root: str = "data"  # folder that holds the data set
    split: Literal[1, 2, 3] = 1  # which classes are novel
    shots: k_shot.Shots = 10  # boxes per class to fine-tune on: a number, or all
    shot_lists: str | None = None  # published lists' folder, or a shots.json; else drawn by --seed
    short: int | None = None  # shorter side of the pictures; by default the published size
    long: int | None = None  # longest the longer side may get
    support_size: int | None = None  # side of the supports in pixels; by default the published size
    # test
    test_images: int | None = None  # test on only so many pictures
    test_proposals: int | None = None  # proposals per picture in tests; by default the model's own
    share_proposals: bool = False  # test all classes on one set of RoIs: quicker, not the same
    scramble_supports: bool = False  # test also with every class given the next class's supports
    calibrate: str | None = None  # also test scores calibrated by shots: resnet101, or NAME=FILE
    classwise: bool = False  # also print the result of every class
    # training
    base: str | None = None  # model to fine-tune: a file, a run, a hub id; by default that in --out
    keep_base: bool = False  # insist on the base model's classes too; your data must have them
    batch_size: int | None = None  # pictures per step, over all processes; scales rate and steps
    iters: int | None = None  # steps of each stage; by default the published schedule
    lr: float | None = None  # learning rate; by default the published schedule
    group_aspect: bool = False  # batches of only wide or only tall pictures: less padding
    # model
    backbone: trunks.Name | None = None  # by default small for glyphs, else as published
    style: trunks.Style | None = None  # of a ResNet: torchvision (default); caffe by --weights FILE
    weights: str | None = None  # imagenet (default), a file, none; objects: names these first
    init: str | None = None  # run or model of meta_rcnn or fsdetview whose trunk to start from
    rois: int | None = None  # RoIs per picture to train on; by default as published
    # run
    stage: Literal["all", "base", "finetune"] = "all"  # all: a base, unless there, then finetune
    out: str | None = None  # by default runs/attention_rpn/<dataset>-split<split>-<backbone>
    seed: int = 0  # the only source of randomness
    seeds: tuple[int, ...] = ()  # fine-tune and test with each: mean and interval at the end
    workers: int = 2  # data-loading processes
    save_every: int = 200  # steps between saves of the state
    resume: bool = False  # go on from the last state in --out
    overwrite: bool = False  # replace runs in --out that are finished, or begun
    test_only: bool = False  # only test the model of --stage in --out
    wandb: bool = False  # log to Weights & Biases

    @property
    def published(self) -> str:  # whose settings are taken
        return self.dataset if self.dataset in SCHEDULE else "own"


def main(args: Args) -> None:
    with launch.started(METHOD, args) as accelerator:
        functions = {
            "base": train_base,
            "finetune": finetune,
            "test": partial(detect.test_saved, METHOD, AttentionRPN, test=look),
        }
        stages.run_stages(accelerator, METHOD, args, BACKBONE[args.published], functions)


def train_base(stage: Stage, accelerator: launch.Accelerator) -> None:
    """All of the detector but the trunk's first stages, on every object of the base classes."""
    args = stage.args
    data = stages.opened(args)
    train, test = (
        without_small(data.train.restrict(data.base), SMALLEST[args.published]),
        data.test.restrict(data.base),
    )
    named = args.weights == "objects"
    source = "none" if named or (args.init and not args.weights) else args.weights
    trunk = trunks.begin(args.backbone, source, style=args.style)
    if args.init:
        weights.fill_part(trunk, args.init, "trunk.", without=("meta_conv.",))
    named |= not (args.weights or args.init or trunk.architecture["pretrained"])
    trunk.freeze_pretrained(2)
    episodes = searching(args, train, SHOTS[args.published])
    if named and not folders.resumes(args, stage.folder):
        steps = min(args.iters or OBJECTS, OBJECTS)
        name_objects(
            accelerator,
            trunk,
            train,
            episodes.pipeline,
            seed=args.seed,
            steps=steps,
            workers=args.workers,
        )
    sizes = SIZES[args.published] | ({"rois": args.rois} if args.rois else {})
    model, batch = AttentionRPN(trunk, len(train.classes), **sizes), BATCH[args.published][0]
    fit(
        stage,
        accelerator,
        model,
        train,
        test,
        episodes,
        batch,
        TABLE[args.published],
    )


def finetune(stage: Stage, accelerator: launch.Accelerator) -> None:
    """The head alone on K objects of every class; on COCO also RPN and stage 4, and of the novel
    classes alone.
    """
    args = stage.args
    base = bases.load(args, stages.opened(args), METHOD, AttentionRPN)
    classes = base.data.novel if args.dataset == "coco" else base.data.train.classes
    train = k_shot.choose_shots(
        base.data.train.restrict(classes), args.shots, args.seed, args.shot_lists
    )
    model = rebuilt(AttentionRPN, base.about, len(train.classes), rois=args.rois)
    weights.fill(model, base.state, args.base, fresh=("kernels", "maps", "known"))
    model.trunk.freeze(3)
    torch.nn.ModuleList([] if args.dataset == "coco" else [model.trunk, model.rpn]).requires_grad_(
        False
    )
    # one shot is to be found, the others show what to look for
    shots = min(max(max(k_shot.counts(train)) - 1, 1), 10)
    episodes, batch = searching(args, train, shots), BATCH[args.published][1]
    fit(
        stage,
        accelerator,
        model,
        train,
        base.data.test.restrict(classes),
        episodes,
        batch,
        None,
    )


def searching(args: Args, train: detection.DetectionSet, shots: int) -> QueryAware:
    short, long, size, context = PICTURES[args.published]
    pictures = stages.pictures(args, short, long, flip=False)
    return QueryAware(
        train, pictures, ways=2, shots=shots, size=args.support_size or size, context=context
    )


def fit(stage, accelerator, model, train, test, episodes, batch, most) -> None:
    """One stage: the loop, then the test, with at most so many supports of a class."""
    args = stage.args
    table = SCHEDULE[args.published], batch
    schedule = stages.planned(accelerator, stage, *table, train, test, episodes.pipeline)
    normalisation, trained = (
        model.trunk.normalisation,
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
    )
    head, others = (
        [p for n, p in trained if n.startswith("relation.") == wanted] for wanted in (True, False)
    )
    groups = [
        {"params": others},
        {"params": head, "lr": schedule.lr * (HEAD_LR[args.published] if others else 1)},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, weight_decay=1e-4)
    about = {"stage": stage.name, "pictures": episodes.pipeline.describe()}
    about |= model.describe() | train.describe() | episodes.describe()
    schedule = schedule._replace(ratio=RATIO)
    kept = {"folder": stage.folder, "metadata": about, "files": k_shot.files(train)}
    run = Training(METHOD, args, accelerator, model, optimizer, schedule, **kept)

    # train
    loader = episodes.loader(
        run.feed, normalisation, batch_size=schedule.batch, group=args.group_aspect
    )
    for step, (batch, support) in run.steps(loader):
        losses = run.model(batch.images, batch.sizes, batch.boxes, support.images, support.boxes)
        accelerator.backward(sum(losses.values()))
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.log(step, losses, ids=batch.ids)
        if step % args.save_every == 0 or step == schedule.steps:
            run.save(step)

    # test
    detector, table = run.best(), episodes.table(most, run.feed, normalisation)
    with torch.no_grad(), accelerator.autocast():
        detector.set_prototypes(
            (*detector.support_features(s.images, s.boxes), s.labels) for s in table
        )
    run.save_model()
    look(run, test, train)


def look(run: Run, test: detection.DetectionSet, train=None) -> None:
    share = run.args.share_proposals
    protocol = {"proposals": "shared by all classes" if share else "of each class"}
    detect.test(run, test, train, protocol, share=share)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
