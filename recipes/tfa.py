"""TFA, frustratingly simple few-shot object detection (Wang et al., 2020,
https://arxiv.org/abs/2003.06957).

A Faster R-CNN is trained on the base classes; then K shots of every class train only its last two
layers, with a classifier that compares directions, not lengths, so that classes of few examples do
not pale beside the others.

    accelerate launch recipes/tfa.py --shots 10
    accelerate launch recipes/tfa.py --dataset voc --data-root data --split 1 --shots 10
    accelerate launch recipes/tfa.py --dataset MY_PICTURES --base coco --shots 10
    accelerate launch recipes/tfa.py --stage novel --shots 5
    accelerate launch recipes/tfa.py --stage finetune --shots 5 --novel NOVEL.safetensors
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
from fewshot.detectors.tfa import TFA, grow
from fewshot.evaluation import detect
from fewshot.training import bases, launch, stages
from fewshot.training.folders import Stage
from fewshot.training.run import Training
from fewshot.training.schedule import Passes, Schedule

METHOD = "tfa"  # names runs and models; a copy of this recipe needs a name of its own

# steps, rate, milestones, warm-up for a global batch of BATCH pictures: as published, but for the
# embedded glyphs quick
BATCH = {"glyphs": 8, "voc": 16, "coco": 16, "own": 4}
# fmt: off
SCHEDULE = {
    "glyphs": {
        "base": Schedule(600, 0.02, (480,), 100),
        1: Schedule(100, 0.02, (80,), 10), 2: Schedule(150, 0.02, (120,), 10), 3: Schedule(150, 0.02, (120,), 10),
        5: Schedule(200, 0.02, (160,), 10), 10: Schedule(200, 0.02, (160,), 10),
    },
    "voc": {
        "base": Schedule(18_000, 0.02, (12_000, 16_000), 100),
        1: Schedule(4000, 0.001, (3000,)), 2: Schedule(8000, 0.001, (7000,)), 3: Schedule(12_000, 0.001, (11_000,), 10),
        5: Schedule(20_000, 0.001, (18_000,), 10), 10: Schedule(40_000, 0.001, (36_000,), 10),
        (2, 1): Schedule(4000, 0.005, (3000,)), (2, 2): Schedule(8000, 0.005, (7000,)),
        (2, 3): Schedule(12_000, 0.005, (11_000,), 10), (2, 5): Schedule(20_000, 0.005, (18_000,), 10),
        (2, 10): Schedule(40_000, 0.005, (36_000,), 10),  # of split 2
    },
    "coco": {
        "base": Schedule(110_000, 0.02, (85_000, 100_000), 1000),
        10: Schedule(160_000, 0.001, (144_000,), 10), 30: Schedule(240_000, 0.001, (216_000,), 10),
    },
    "own": {"base": Passes(12, 0.01, 500, 20_000), "few": Passes(30, 0.01, 200, 2000)},
}
# fmt: on
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
    novel: str | None = None  # model of --stage novel to start novel classes from; else at random
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
    stage: Literal["all", "base", "novel", "finetune"] = "all"  # all: base, finetune
    out: str | None = None  # by default runs/tfa/<dataset>-split<split>-<backbone>
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
            "test": partial(detect.test_saved, METHOD, TFA),
        }
        stages.run_stages(accelerator, METHOD, args, BACKBONE[args.published], functions)


def train_base(stage: Stage, accelerator: launch.Accelerator) -> None:
    """All of the detector but the trunk's first stage, on every object of the base classes."""
    args = stage.args
    data = stages.opened(args, difficult="keep")
    train, test = data.train.restrict(data.base), data.test.restrict(data.base)
    trunk = fpn.begin(args.backbone, args.weights, style=args.style)
    trunk.freeze_pretrained(1)
    model = TFA(
        trunk,
        len(train.classes),
        **SIZES[args.published] | ({"rois": args.rois} if args.rois else {}),
    )
    fit(stage, accelerator, model, train, test)


def train_novel(stage: Stage, accelerator: launch.Accelerator) -> None:
    """New last layers alone, on K objects of every novel class: they can start `finetune`, with
    --novel.
    """
    args = stage.args
    base = bases.load(args, stages.opened(args), METHOD, TFA)
    train = k_shot.choose_shots(base.data.train, args.shots, args.seed, args.shot_lists).restrict(
        base.data.novel
    )
    model = rebuilt(TFA, base.about, len(train.classes), cosine=True, rois=args.rois)
    weights.fill(model, base.state, args.base, fresh=("cls.", "reg."))
    freeze_all_but_last(model)
    fit(stage, accelerator, model, train, base.data.test.restrict(base.data.novel))


def finetune(stage: Stage, accelerator: launch.Accelerator) -> None:
    """The last layers alone, on K objects of every class, those of base classes from the base
    model.
    """
    args = stage.args
    base = bases.load(args, stages.opened(args), METHOD, TFA)
    train = k_shot.choose_shots(base.data.train, args.shots, args.seed, args.shot_lists)
    model = rebuilt(TFA, base.about, len(train.classes), cosine=True, rois=args.rois)
    novel = weights.load_of(base.data.novel, args.novel)[0] if args.novel else None
    weights.fill(
        model, grow(base.state, base.kept, train.classes, novel, base.data.novel), args.base
    )
    freeze_all_but_last(model)
    fit(stage, accelerator, model, train, base.data.test)


def freeze_all_but_last(model: TFA) -> None:
    model.requires_grad_(False)
    model.cls.requires_grad_(True)
    model.reg.requires_grad_(True)


def fit(stage, accelerator, model, train, test) -> None:
    """One stage: the loop, then the test."""
    args = stage.args
    pictures = stages.pictures(args, *PICTURES[args.published], multiple=32)
    table = SCHEDULE[args.published], BATCH[args.published]
    schedule = stages.planned(accelerator, stage, *table, train, test, pictures)
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
