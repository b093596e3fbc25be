"""MPSR, multi-scale positive sample refinement (Wu et al., 2020, https://arxiv.org/abs/2007.09384).

Few shots show few of the sizes that objects come in. So besides whole pictures a Faster R-CNN with
a feature pyramid trains on single objects, cut out and resized to several scales: its RPN is to
find all of them, its classifier to name them. Base classes train everything, then K shots of every
class train everything on.

    accelerate launch recipes/mpsr.py --shots 10
    accelerate launch recipes/mpsr.py --dataset voc --data-root data --split 1 --shots 10
    accelerate launch recipes/mpsr.py --stage finetune --shots 1 --seed 3
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import tyro

from fewshot import weights
from fewshot.backbones import fpn, trunks
from fewshot.data import detection, k_shot
from fewshot.data.object_crops import ObjectCrops
from fewshot.data.pipeline import train_loader
from fewshot.data.transforms import CAFFE_MPSR
from fewshot.detectors.build import rebuilt
from fewshot.detectors.mpsr import MPSR
from fewshot.evaluation import detect
from fewshot.training import bases, launch, stages
from fewshot.training.folders import Stage
from fewshot.training.run import Training
from fewshot.training.schedule import Passes, Schedule

METHOD = "mpsr"  # names runs and models; a copy of this recipe needs a name of its own

# steps, rate, milestones, warm-up for a global batch of 4 pictures and as many objects: as
# published, but for the embedded glyphs quick
BATCH, RATIO = 4, 1 / 3  # the share of the rate that the warm-up begins with
# fmt: off
SCHEDULE = {
    "glyphs": {
        "base": Schedule(1000, 0.01, (800,), 100),
        1: Schedule(100, 0.005, (80,), 10), 2: Schedule(150, 0.005, (120,), 10), 3: Schedule(150, 0.005, (120,), 10),
        5: Schedule(200, 0.005, (160,), 10), 10: Schedule(200, 0.005, (160,), 10),
    },
    "voc": {
        "base": Schedule(36_000, 0.005, (24_000, 32_000), 500),
        **dict.fromkeys((1, 2, 3, 5, 10), Schedule(2000, 0.005, (1300,), 500)),
    },
    "coco": {
        "base": Schedule(80_000, 0.005, (56_000, 70_000), 500),
        **dict.fromkeys((10, 30), Schedule(4000, 0.005, (2800, 3500), 500)),
    },
    "own": {"base": Passes(12, 0.005, 500, 20_000), "few": Passes(30, 0.005, 200, 2000)},
}
# fmt: on
# of VOC's pixels, which count from 1; the published models take it off all sides
VOC_OFFSET = (-1.0, -1.0, -1.0, -1.0)
# shorter side, longer side, flip (glyphs are characters: never mirrored); objects of a smaller side
# are not cut out
PICTURES = {
    "glyphs": (None, None, False, 2),
    "voc": (800, 1333, True, 2),
    "coco": (800, 1333, True, 8),
}
PICTURES |= {"own": (800, 1333, True, 2)}
# RoIs per training picture, box head's width, hidden channels of the RPN, proposals before and
# after NMS (in training after it for a process's batch together)
QUICK = {"rois": 64, "width": 256, "rpn_channels": 64} | {
    "train_proposals": (500, 400),
    "test_proposals": (500, 100),
}
PUBLISHED = {"rois": 512, "width": 1024, "rpn_channels": 256}
PUBLISHED |= {"train_proposals": (2000, 2000), "test_proposals": (1000, 1000)}
SIZES = {"glyphs": QUICK, "voc": PUBLISHED, "coco": PUBLISHED, "own": PUBLISHED | {"rois": 128}}
BACKBONE = {"glyphs": "small", "voc": "resnet101", "coco": "resnet101", "own": "resnet50"}


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
    # test
    test_images: int | None = None  # test on only so many pictures
    test_proposals: int | None = None  # proposals per picture in tests; by default the model's own
    calibrate: str | None = None  # also test scores calibrated by shots: resnet101, or NAME=FILE
    classwise: bool = False  # also print the result of every class
    # training
    base: str | None = None  # to fine-tune: coco, coco_mobile, file, run, hub id; default: in --out
    keep_base: bool = False  # insist on the base model's classes too; your data must have them
    batch_size: int | None = None  # pictures per step, over all processes; scales rate and steps
    iters: int | None = None  # steps of each stage; by default the published schedule
    lr: float | None = None  # learning rate; by default the published schedule
    group_aspect: bool = False  # batches of only wide or only tall pictures: less padding
    # model
    backbone: trunks.Name | None = None  # by default small for glyphs, else as published
    style: trunks.Style | None = None  # of a ResNet: torchvision (default); caffe by --weights FILE
    weights: str | None = None  # imagenet, a file, or none; by default imagenet, of small none
    rois: int | None = None  # RoIs per picture to train on; by default as published
    # run
    stage: Literal["all", "base", "finetune"] = "all"  # all: a base, unless there, then finetune
    out: str | None = None  # by default runs/mpsr/<dataset>-split<split>-<backbone>
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
            "test": partial(detect.test_saved, METHOD, MPSR, opened=opened),
        }
        stages.run_stages(accelerator, METHOD, args, BACKBONE[args.published], functions)


def opened(args: Args) -> detection.DetectionSplit:
    return stages.opened(args, offset=VOC_OFFSET if args.dataset == "voc" else None)


def train_base(stage: Stage, accelerator: launch.Accelerator) -> None:
    """All of the detector but the trunk's first stage, on every object of the base classes."""
    args = stage.args
    data = opened(args)
    train, test = data.train.restrict(data.base), data.test.restrict(data.base)
    trunk = fpn.begin(args.backbone, args.weights, style=args.style)
    trunk.freeze_pretrained(1)
    if args.style == "caffe":
        trunk.normalisation = CAFFE_MPSR
    model = MPSR(
        trunk,
        len(train.classes),
        **SIZES[args.published] | ({"rois": args.rois} if args.rois else {}),
    )
    fit(stage, accelerator, model, train, test, train)


def finetune(stage: Stage, accelerator: launch.Accelerator) -> None:
    """The same parts, with a new last layer, on K objects of every class."""
    args = stage.args
    base = bases.load(args, opened(args), METHOD, MPSR)
    train = k_shot.choose_shots(base.data.train, args.shots, args.seed, args.shot_lists)
    model = rebuilt(MPSR, base.about, len(train.classes), rois=args.rois)
    model.trunk.freeze_pretrained(1)
    torch.nn.init.normal_(model.cls.weight, std=0.001)
    weights.fill(model, base.state, args.base, fresh=("cls.",))
    shown = balanced(train) if args.dataset == "voc" else train
    fit(stage, accelerator, model, train, base.data.test, shown)


def fit(stage, accelerator, model, train, test, shown) -> None:
    """One stage: the loop, on the pictures of `shown` and the objects of `train`, then the test."""
    args = stage.args
    *size, smallest = PICTURES[args.published]
    pictures, normalisation = stages.pictures(args, *size), model.trunk.normalisation
    schedule = stages.planned(
        accelerator, stage, SCHEDULE[args.published], BATCH, train, test, pictures
    )
    schedule = schedule._replace(ratio=RATIO)
    if args.published == "own":
        model.rpn.test_proposals = stages.fitting_proposals(pictures, train)
    groups = parameter_groups(model, schedule.lr, args.published)
    optimizer = torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, weight_decay=1e-4)
    about = (
        {"stage": stage.name, "pictures": pictures.describe()} | model.describe() | train.describe()
    )
    kept = {"folder": stage.folder, "metadata": about, "files": k_shot.files(train)}
    run = Training(METHOD, args, accelerator, model, optimizer, schedule, **kept)

    # train
    crops = ObjectCrops(
        train,
        model.levels.scales,
        schedule.batch,
        run.feed,
        flip=pictures.flip,
        smallest=smallest,
    )
    padded, options = (
        replace(pictures, multiple=32),
        {"batch_size": schedule.batch, "group": args.group_aspect},
    )
    loader = train_loader(shown, padded, run.feed, normalisation, extra=crops.draw, **options)
    for step, (batch, objects) in run.steps(loader):
        losses = run.model(
            batch.images, batch.sizes, batch.boxes, batch.labels, objects.images, objects.labels
        )
        accelerator.backward(sum(losses.values()))
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.log(step, losses, ids=batch.ids)
        if step % args.save_every == 0 or step == schedule.steps:
            run.save(step)

    # test
    detect.test(run, test, train)


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
