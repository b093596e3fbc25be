"""DeFRCN, decoupled Faster R-CNN (Qiao et al., 2021, https://arxiv.org/abs/2108.09017).

The RPN does not care which class an object has, the classifier cares for nothing else: so the RPN's
gradient does not reach the trunk at all, and the RoI head's only in part, in fine-tuning hardly.
Each sees the trunk's map through an affine layer of its own. Tests can calibrate scores by a
network that never saw the detector (--calibrate).

    accelerate launch recipes/defrcn.py --shots 10
    accelerate launch recipes/defrcn.py --dataset voc --data-root data --split 1 --shots 10 --calibrate resnet101
    accelerate launch recipes/defrcn.py --stage novel --shots 5

`--stage finetune` is for all classes (G-FSOD), `--stage novel` for the novel ones alone (FSOD).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro

from fewshot import weights
from fewshot.backbones import trunks
from fewshot.data import k_shot
from fewshot.data.pipeline import train_loader
from fewshot.detectors.build import rebuilt
from fewshot.detectors.defrcn import DeFRCN, grow
from fewshot.evaluation import detect
from fewshot.training import bases, launch, stages
from fewshot.training.folders import Stage
from fewshot.training.run import Training
from fewshot.training.schedule import Passes, Schedule

METHOD = "defrcn"  # names runs and models; a copy of this recipe needs a name of its own

# steps, rate, milestones, warm-up for a global batch of BATCH pictures: as published, but for the
# embedded glyphs quick
BATCH = {"glyphs": 8, "voc": 16, "coco": 16, "own": 4}
# fmt: off
SCHEDULE = {
    "glyphs": {
        "base": Schedule(1200, 0.04, (960,), 50),
        1: Schedule(200, 0.04, (160,)), 2: Schedule(300, 0.04, (240,)), 3: Schedule(300, 0.04, (240,)),
        5: Schedule(400, 0.04, (320,)), 10: Schedule(400, 0.04, (320,)),
    },
    "voc": {
        "base": Schedule(15_000, 0.02, (10_000, 13_300), 100),
        1: Schedule(1000, 0.01, (800,)), 2: Schedule(1500, 0.01, (1200,)), 3: Schedule(2000, 0.01, (1600,)),
        5: Schedule(2500, 0.01, (2000,)), 10: Schedule(4000, 0.01, (3200,)),
    },
    "coco": {
        "base": Schedule(110_000, 0.02, (85_000, 100_000), 1000),
        1: Schedule(3200, 0.01, (2560,)), 2: Schedule(4000, 0.01, (3200,)), 3: Schedule(4800, 0.01, (3840,)),
        5: Schedule(6000, 0.01, (4800,)), 10: Schedule(6000, 0.01, (4800,)), 30: Schedule(12_000, 0.01, (9600,)),
    },
    "own": {"base": Passes(12, 0.01, 500, 20_000), "few": Passes(30, 0.01, 200, 2000)},
}
NOVEL = SCHEDULE | {  # of novel classes alone
    "voc": {
        1: Schedule(800, 0.01, (640,)), 2: Schedule(1200, 0.01, (960,)), 3: Schedule(1600, 0.01, (1280,)),
        5: Schedule(2000, 0.01, (1600,)), 10: Schedule(4000, 0.01, (3200,)),
    },
    "coco": {
        1: Schedule(1000, 0.01, (800,)), 2: Schedule(1500, 0.01, (1200,)), 3: Schedule(2000, 0.01, (1600,)),
        5: Schedule(2500, 0.01, (2000,)), 10: Schedule(2500, 0.01, (2000,)), 30: Schedule(4000, 0.01, (3200,)),
    },
}
# fmt: on
# shorter side (one of these in training), longer side, flip; glyphs are characters: never mirrored
SHORT = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
PICTURES = {"glyphs": (None, None, False), "voc": (SHORT, 1333, True)}
PICTURES |= {"coco": (SHORT[5:], 1333, True), "own": (800, 1333, True)}
# RoIs per training picture, cells per side of a RoI, hidden channels of the RPN, proposals before
# and after NMS
QUICK = {
    "rois": 32,
    "roi_size": 6,
    "rpn_channels": 128,
    "train_proposals": (1000, 100),
    "test_proposals": (1000, 100),
}
PUBLISHED = {"rois": 512, "roi_size": 7, "rpn_channels": 1024}
PUBLISHED |= {"train_proposals": (12000, 2000), "test_proposals": (6000, 1000)}
SIZES = {"glyphs": QUICK, "voc": PUBLISHED, "coco": PUBLISHED, "own": PUBLISHED | {"rois": 128}}
# how much of the gradients of RPN and RoI head reaches the trunk
BASE_SCALES = {"rpn_scale": 0.0, "roi_scale": 0.75}
# the RoI head's; of the RPN's still nothing
TUNED_SCALES = {"glyphs": 0.01, "voc": 0.001, "coco": 0.01, "own": 0.01}
DROPOUT = 0.8  # of what the classifier sees, in fine-tuning
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
    base: str | None = None  # model to fine-tune: a file, a run, a hub id; by default that in --out
    keep_base: bool = False  # insist on the base model's classes too; your data must have them
    batch_size: int | None = None  # pictures per step, over all processes; scales rate and steps
    iters: int | None = None  # steps of each stage; by default the published schedule
    lr: float | None = None  # learning rate; by default the published schedule
    group_aspect: bool = True  # batches of only wide or only tall pictures, as published
    # model
    backbone: trunks.Name | None = None  # by default small for glyphs, else as published
    style: trunks.Style | None = None  # of a ResNet: torchvision (default); caffe by --weights FILE
    weights: str | None = None  # imagenet, a file, or none; by default imagenet, of small none
    rois: int | None = None  # RoIs per picture to train on; by default as published
    # run
    stage: Literal["all", "base", "novel", "finetune"] = "all"  # all: base, finetune
    out: str | None = None  # by default runs/defrcn/<dataset>-split<split>-<backbone>
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
            "novel": train_novel,
            "finetune": finetune,
            "test": partial(detect.test_saved, METHOD, DeFRCN),
        }
        stages.run_stages(accelerator, METHOD, args, BACKBONE[args.published], functions)


def train_base(stage: Stage, accelerator: launch.Accelerator) -> None:
    """All of the detector but the trunk's first stages, on every object of the base classes."""
    args = stage.args
    data = stages.opened(args, difficult="keep")
    train, test = data.train.restrict(data.base), data.test.restrict(data.base)
    trunk = trunks.begin(args.backbone, args.weights, style=args.style)
    trunk.freeze_pretrained(2)
    sizes = SIZES[args.published] | ({"rois": args.rois} if args.rois else {})
    model = DeFRCN(trunk, len(train.classes), **sizes, **BASE_SCALES)
    fit(stage, accelerator, model, train, test, SCHEDULE)


def train_novel(stage: Stage, accelerator: launch.Accelerator) -> None:
    """As `finetune`, with new last layers for the novel classes alone, on K objects of each."""
    args = stage.args
    base = bases.load(args, stages.opened(args), METHOD, DeFRCN)
    novel = base.data.novel
    train = k_shot.choose_shots(base.data.train, args.shots, args.seed, args.shot_lists).restrict(
        novel
    )
    model = decoupled(args, base, len(novel))
    weights.fill(model, base.state, args.base, fresh=("cls.", "reg."))
    fit(stage, accelerator, model, train, base.data.test.restrict(novel), NOVEL)


def finetune(stage: Stage, accelerator: launch.Accelerator) -> None:
    """All but stage 4 and the trunk's first stages, on K objects of every class, from the base
    model.
    """
    args = stage.args
    base = bases.load(args, stages.opened(args), METHOD, DeFRCN)
    train = k_shot.choose_shots(base.data.train, args.shots, args.seed, args.shot_lists)
    model = decoupled(args, base, len(train.classes))
    weights.fill(model, grow(base.state, base.kept, train.classes), args.base)
    fit(stage, accelerator, model, train, base.data.test, SCHEDULE)


def decoupled(args: Args, base: bases.Base, classes: int) -> DeFRCN:
    """The detector of fine-tuning, its weights to be filled in: hardly a gradient reaches the
    trunk.
    """
    scales = {"rpn_scale": 0.0, "roi_scale": TUNED_SCALES[args.published], "dropout": DROPOUT}
    model = rebuilt(DeFRCN, base.about, classes, rois=args.rois, **scales)
    model.trunk.freeze(2)
    model.trunk.stage4.requires_grad_(False)
    return model


def fit(stage, accelerator, model, train, test, table) -> None:
    """One stage: the loop, then the test."""
    args = stage.args
    pictures = stages.pictures(args, *PICTURES[args.published])
    table = table[args.published], BATCH[args.published]
    schedule = stages.planned(accelerator, stage, *table, train, test, pictures)
    if args.published == "own":
        model.rpn.test_proposals = stages.fitting_proposals(pictures, train)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    biases = [p for name, p in trained.items() if name.endswith("bias")]
    rest = [p for name, p in trained.items() if not name.endswith("bias")]
    decay = [{"params": rest, "weight_decay": 5e-5}, {"params": biases, "weight_decay": 1e-4}]
    optimizer = torch.optim.SGD(decay, lr=schedule.lr, momentum=0.9)
    about = (
        {"stage": stage.name, "pictures": pictures.describe()} | model.describe() | train.describe()
    )
    kept = {"folder": stage.folder, "metadata": about, "files": k_shot.files(train)}
    run = Training(METHOD, args, accelerator, model, optimizer, schedule, **kept)

    # train
    options = {"batch_size": schedule.batch, "group": args.group_aspect}
    loader = train_loader(train, pictures, run.feed, model.trunk.normalisation, **options)
    for step, batch in run.steps(loader):
        losses = run.model(batch.images, batch.sizes, batch.boxes, batch.labels)
        accelerator.backward(sum(losses.values()))
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.log(step, losses, ids=batch.ids)
        if step % args.save_every == 0 or step == schedule.steps:
            run.save(step)

    # test
    detect.test(run, test, train)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
