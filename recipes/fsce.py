"""FSCE, few-shot object detection via contrastive proposal encoding (Sun et al., 2021,
https://arxiv.org/abs/2103.05950).

Base training is TFA's. Fine-tuning on K shots of every class trains more than the last layers, on
more and looser positives, and a contrastive loss pulls RoIs of one class together so that similar
classes are told apart.

    accelerate launch recipes/fsce.py --shots 10
    accelerate launch recipes/fsce.py --contrastive off --base runs/tfa/glyphs-split1-small/base/model.safetensors
    accelerate launch recipes/fsce.py --dataset voc --data-root data --split 1 --shots 10
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro

from fewshot import weights
from fewshot.backbones import fpn, trunks
from fewshot.data import k_shot
from fewshot.data.pipeline import train_loader
from fewshot.detectors.build import rebuilt
from fewshot.detectors.fsce import FSCE
from fewshot.detectors.tfa import grow
from fewshot.evaluation import detect
from fewshot.training import bases, launch, stages
from fewshot.training.folders import Stage
from fewshot.training.run import Training
from fewshot.training.schedule import Passes, Schedule, choose

METHOD = "fsce"  # names runs and models; a copy of this recipe needs a name of its own

# steps, rate, milestones, warm-up, the factor at milestones for a global batch of BATCH pictures:
# as published, but for the embedded glyphs quick
BATCH = {"glyphs": 8, "voc": 16, "coco": 16, "own": 4}
# fmt: off
SCHEDULE = {
    "glyphs": {
        "base": Schedule(600, 0.02, (480,), 100),
        1: Schedule(100, 0.01, (80,), 10), 2: Schedule(150, 0.01, (120,), 10), 3: Schedule(150, 0.01, (120,), 10),
        5: Schedule(200, 0.01, (160,), 10), 10: Schedule(200, 0.01, (160,), 10),
    },
    "voc": {  # by split and shots
        "base": Schedule(18_000, 0.02, (12_000, 16_000), 100),
        (1, 1): Schedule(6000, 0.001, (3500,), 20), (1, 2): Schedule(7000, 0.001, (5000,), 20),
        (1, 3): Schedule(8000, 0.001, (4000, 6000), 200, 0.5), (1, 5): Schedule(9000, 0.001, (5000, 7000), 200, 0.5),
        (1, 10): Schedule(15_000, 0.001, (8000, 13_000), 200, 0.5),
        (2, 1): Schedule(3000, 0.001, (2000,), 20), (2, 2): Schedule(5000, 0.001, (3000,), 20),
        (2, 3): Schedule(9000, 0.001, (5000, 7000), 200, 0.5), (2, 5): Schedule(9000, 0.001, (5000, 7000), 100, 0.5),
        (2, 10): Schedule(12_000, 0.001, (7000, 9000), 200, 0.5),
        (3, 1): Schedule(8000, 0.001, (6000,), 20), (3, 2): Schedule(8000, 0.001, (6000,), 20),
        (3, 3): Schedule(10_000, 0.001, (6000, 8000), 200, 0.5),
        (3, 5): Schedule(12_000, 0.001, (8000, 10_000), 200, 0.3),
        (3, 10): Schedule(15_000, 0.001, (8000, 13_000), 200, 0.5),
    },
    "coco": {
        "base": Schedule(110_000, 0.02, (85_000, 100_000), 1000),
        10: Schedule(30_000, 0.001, (20_000,), 200, 0.3), 30: Schedule(40_000, 0.001, (30_000,), 200, 0.3),
    },
    "own": {"base": Passes(12, 0.01, 500, 20_000), "few": Passes(30, 0.005, 200, 2000)},
}
# fmt: on
# the contrastive loss by shots: weight, least overlap of a RoI, and the steps after each of which
# the weight is halved
CONTRAST = {
    "glyphs": dict.fromkeys((1, 2, 3, 5, 10), (0.2, 0.7, (100,))),
    "voc": {
        3: (0.2, 0.6, (3000, 6000)),
        5: (0.5, 0.7, (4000, 7000)),
        10: (0.5, 0.8, (6000, 10_000)),
    },
    "coco": {},  # published without
    "own": {},
}
# shorter side (one of these in training), longer side, flip; glyphs are characters: never mirrored
SHORT = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
PICTURES = {"glyphs": (None, None, False), "voc": (SHORT, 1333, True)}
PICTURES |= {"coco": (SHORT[5:], 1333, True), "own": (800, 1333, True)}
# RoIs per training picture, box head's width, hidden channels of the RPN, proposals before and
# after NMS
QUICK = {"rois": 64, "width": 256, "rpn_channels": 64} | {
    "train_proposals": (500, 200),
    "test_proposals": (500, 100),
}
PUBLISHED = {"rois": 512, "width": 1024, "rpn_channels": 256}
PUBLISHED |= {"train_proposals": (2000, 1000), "test_proposals": (1000, 1000)}
SIZES = {"glyphs": QUICK, "voc": PUBLISHED, "coco": PUBLISHED, "own": PUBLISHED | {"rois": 128}}
BACKBONE = {"glyphs": "small", "voc": "resnet101", "coco": "resnet101", "own": "resnet50"}
# what fine-tuning changes: half the RoIs, of twice the proposals, with looser positives
FINETUNE = {
    "glyphs": {"rois": 32, "train_proposals": (500, 400), "threshold": 0.4},
    "voc": {"rois": 256, "train_proposals": (2000, 2000), "threshold": 0.4},
    "coco": {"rois": 256, "train_proposals": (2000, 2000), "threshold": 0.5},
    "own": {"rois": 128, "train_proposals": (2000, 2000), "threshold": 0.4},
}


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
    base: str | None = None  # to fine-tune, TFA's too: coco, coco_mobile, file, run, hub id
    keep_base: bool = False  # insist on the base model's classes too; your data must have them
    contrastive: Literal["published", "on", "off"] = "published"  # by data set and shots
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
    stage: Literal["all", "base", "finetune"] = "all"  # all: base, finetune
    out: str | None = None  # by default runs/fsce/<dataset>-split<split>-<backbone>
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
            "test": partial(detect.test_saved, METHOD, FSCE),
        }
        stages.run_stages(accelerator, METHOD, args, BACKBONE[args.published], functions)


def train_base(stage: Stage, accelerator: launch.Accelerator) -> None:
    """All of TFA's detector but the trunk's first stage, on every object of the base classes."""
    args = stage.args
    data = stages.opened(args, difficult="keep")
    train, test = data.train.restrict(data.base), data.test.restrict(data.base)
    trunk = fpn.begin(args.backbone, args.weights, style=args.style)
    trunk.freeze_pretrained(1)
    sizes = SIZES[args.published] | ({"rois": args.rois} if args.rois else {})
    model = FSCE(trunk, len(train.classes), dimensions=0, **sizes)
    fit(stage, accelerator, model, train, test)


def finetune(stage: Stage, accelerator: launch.Accelerator) -> None:
    """All but the trunk (VOC's first two shots: less), on K objects of every class, with the
    contrastive loss.
    """
    args = stage.args
    base = bases.load(args, stages.opened(args), METHOD, FSCE)
    train = k_shot.choose_shots(base.data.train, args.shots, args.seed, args.shot_lists)
    contrast = CONTRAST[args.published].get(args.shots)
    wanted = args.contrastive == "on" or (args.contrastive == "published" and contrast is not None)
    contrast = contrast or (0.2, 0.6, (3000, 6000))
    changes = FINETUNE[args.published] | ({"rois": args.rois} if args.rois else {})
    dimensions = 128 if wanted else 0
    model = rebuilt(
        FSCE,
        base.about,
        len(train.classes),
        cosine=True,
        dimensions=dimensions,
        above=contrast[1],
        **changes,
    )
    weights.fill(model, grow(base.state, base.kept, train.classes), args.base, fresh=("contrast.",))
    model.trunk.freeze(len(model.trunk.stages))
    for part in (
        (model.trunk, model.rpn, model.fc1)
        if args.published == "voc" and args.shots in (1, 2)
        else ()
    ):
        part.requires_grad_(False)
    fit(stage, accelerator, model, train, base.data.test, contrast)


def fit(stage, accelerator, model, train, test, contrast=(0.0, 0.0, ())) -> None:
    """One stage: the loop, then the test."""
    args = stage.args
    pictures = stages.pictures(args, *PICTURES[args.published], multiple=32)
    batch = BATCH[args.published]
    published = choose(SCHEDULE[args.published], stage.name, args, pictures=len(train), batch=batch)
    schedule = published.scaled(args, batch)
    stages.announce(accelerator, train, test, pictures, schedule)
    if args.published == "own":
        model.rpn.test_proposals = stages.fitting_proposals(pictures, train)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=schedule.lr, momentum=0.9, weight_decay=1e-4)
    about = (
        {"stage": stage.name, "pictures": pictures.describe()} | model.describe() | train.describe()
    )
    kept = {"folder": stage.folder, "metadata": about, "files": k_shot.files(train)}
    run = Training(METHOD, args, accelerator, model, optimizer, schedule, **kept)

    # train
    strength, _, halvings = contrast
    options = {"batch_size": schedule.batch, "group": args.group_aspect}
    loader = train_loader(train, pictures, run.feed, model.trunk.normalisation, **options)
    for step, batch in run.steps(loader):
        model.strength = strength * 0.5 ** sum(
            step > h * schedule.steps / published.steps for h in halvings
        )
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
