"""VFA (Han et al., 2023, https://arxiv.org/abs/2301.13411).

As in Meta R-CNN a support picture with its box as a fourth channel becomes a vector per class. An
autoencoder makes a distribution of it, by which RoI vectors are re-weighted before they are
classified, but not before they give boxes; in training, of any class, whatever a picture shows.
Base classes train everything; then K shots of every class train the autoencoder and the last
layers. (The published numbers of COCO also contain CLIP's opinion of novel boxes.)

    accelerate launch recipes/vfa.py --shots 10
    accelerate launch recipes/vfa.py --dataset voc --data-root data --split 1 --shots 10
    accelerate launch recipes/vfa.py --stage finetune --shots 1 --seed 3
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro

from fewshot import InputError, weights
from fewshot.backbones import trunks
from fewshot.data import k_shot
from fewshot.data.pipeline import train_loader
from fewshot.data.support import NWayKShot
from fewshot.detectors.build import rebuilt
from fewshot.detectors.vfa import VFA
from fewshot.evaluation import detect
from fewshot.training import bases, launch, stages
from fewshot.training.folders import Stage
from fewshot.training.run import Training
from fewshot.training.schedule import Passes, Schedule

METHOD = "vfa"  # names runs and models; a copy of this recipe needs a name of its own

# steps, rate, milestones, warm-up for a global batch of BATCH pictures: as published, but for the
# embedded glyphs quick
BATCH = {"glyphs": 8, "voc": 32, "coco": 16, "own": 4}
# fmt: off
SCHEDULE = {
    "glyphs": {
        "base": Schedule(600, 0.04, (480,), 50),
        1: Schedule(100, 0.04, (80,), 10), 2: Schedule(150, 0.04, (120,), 10), 3: Schedule(150, 0.04, (120,), 10),
        5: Schedule(200, 0.04, (160,), 10), 10: Schedule(200, 0.04, (160,), 10),
    },
    "voc": {
        "base": Schedule(18_000, 0.02, (12_000, 16_000), 100),
        1: Schedule(400, 0.001), 2: Schedule(800, 0.001), 3: Schedule(1200, 0.001), 5: Schedule(1600, 0.001),
        10: Schedule(2000, 0.001),
    },
    "coco": {
        "base": Schedule(110_000, 0.005, (85_000, 100_000), 1000),
        10: Schedule(10_000, 0.001), 30: Schedule(20_000, 0.001),
    },
    "own": {"base": Passes(12, 0.01, 500, 20_000), "few": Passes(30, 0.01, 100, 2000)},
}
# fmt: on
BACKBONE = {"glyphs": "small", "voc": "resnet101", "coco": "resnet101", "own": "resnet50"}
# shorter side (one of these in training), longer side, flip of query pictures (glyphs are
# characters: never mirrored), then the side of supports and how many a base class has at most
SHORT = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
PICTURES = {
    "glyphs": (None, None, False, 80, 30),
    "voc": (SHORT, 1333, True, 224, 200),
    "coco": (SHORT[5:], 1333, True, 224, 200),
    "own": (800, 1333, True, 224, 200),
}
# RoIs per training picture, hidden channels of the RPN, proposals before and after NMS
QUICK = {
    "rois": 32,
    "rpn_channels": 128,
    "train_proposals": (1000, 100),
    "test_proposals": (1000, 100),
}
PUBLISHED = {
    "rois": 128,
    "rpn_channels": 512,
    "train_proposals": (12000, 2000),
    "test_proposals": (6000, 300),
}
SIZES = {"glyphs": QUICK, "voc": PUBLISHED, "coco": PUBLISHED, "own": PUBLISHED}


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
    weights: str | None = None  # imagenet, a file, or none; by default imagenet, of small none
    rois: int | None = None  # RoIs per picture to train on; by default as published
    # run
    stage: Literal["all", "base", "finetune"] = "all"  # all: a base, unless there, then finetune
    out: str | None = None  # by default runs/vfa/<dataset>-split<split>-<backbone>
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
            "test": partial(detect.test_saved, METHOD, VFA),
        }
        stages.run_stages(accelerator, METHOD, args, BACKBONE[args.published], functions)


def train_base(stage: Stage, accelerator: launch.Accelerator) -> None:
    """All of the detector but the trunk's first stages, on every object of the base classes."""
    args = stage.args
    data = stages.opened(args, difficult="keep")
    train, test = data.train.restrict(data.base), data.test.restrict(data.base)
    trunk = trunks.begin(args.backbone, args.weights, style=args.style, meta=True)
    trunk.freeze_pretrained(2)
    model = VFA(
        trunk,
        len(train.classes),
        **SIZES[args.published] | ({"rois": args.rois} if args.rois else {}),
    )
    *_, size, used = PICTURES[args.published]
    supports = NWayKShot(train, 1, used=used, one_per_image=True, size=args.support_size or size)
    fit(stage, accelerator, model, train, test, supports)


def finetune(stage: Stage, accelerator: launch.Accelerator) -> None:
    """The autoencoder and the last layers, on K objects of every class, from the base model."""
    args = stage.args
    base = bases.load(args, stages.opened(args), METHOD, VFA)
    train = k_shot.choose_shots(base.data.train, args.shots, args.seed, args.shot_lists)
    model = rebuilt(VFA, base.about, len(train.classes), rois=args.rois)
    weights.fill(
        model, base.state, args.base, fresh=("cls.", "reg.", "meta.", "prototypes", "known")
    )
    model.trunk.requires_grad_(False)
    (model.rpn.conv if args.published == "coco" else model.rpn).requires_grad_(False)
    supports = NWayKShot(train, 1, used=30, size=args.support_size or PICTURES[args.published][3])
    fit(stage, accelerator, model, train, base.data.test, supports)


def fit(stage, accelerator, model, train, test, supports) -> None:
    """One stage: the loop, then the test."""
    args = stage.args
    if len(train.classes) < 2:
        raise InputError(
            f"{train.name} has one class: VFA's batch norms need two or more; take meta_rcnn"
        )
    pictures = stages.pictures(args, *PICTURES[args.published][:3], multiple=32)
    normalisation = model.trunk.normalisation
    table = SCHEDULE[args.published], BATCH[args.published]
    schedule = stages.planned(accelerator, stage, *table, train, test, pictures)
    if args.published == "own":
        model.rpn.test_proposals = stages.fitting_proposals(
            pictures, train, most=PUBLISHED["test_proposals"][1]
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=schedule.lr, momentum=0.9, weight_decay=1e-4)
    about = {"stage": stage.name, "pictures": pictures.describe()}
    about |= model.describe() | train.describe() | supports.describe()
    kept = {"folder": stage.folder, "metadata": about, "files": k_shot.files(train)}
    run = Training(METHOD, args, accelerator, model, optimizer, schedule, **kept)

    # train
    options = {"batch_size": schedule.batch, "group": args.group_aspect}
    loader = train_loader(train, pictures, run.feed, normalisation, extra=supports.draw, **options)
    for step, (batch, support) in run.steps(loader):
        losses = run.model(
            batch.images, batch.sizes, batch.boxes, batch.labels, support.images, support.labels
        )
        accelerator.backward(sum(losses.values()))
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.log(step, losses, ids=batch.ids)
        if step % args.save_every == 0 or step == schedule.steps:
            run.save(step)

    # test
    detector = run.best()
    with torch.no_grad(), accelerator.autocast():
        table = [
            (detector.support_vectors(s.images), s.labels)
            for s in supports.table(run.feed, normalisation)
        ]
    detector.set_prototypes(*(torch.cat(part) for part in zip(*table)))
    run.save_model()
    detect.test(run, test, train)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
