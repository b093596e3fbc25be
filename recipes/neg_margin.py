"""Negative Margin (Liu et al., 2020, https://arxiv.org/abs/2003.12060).

Cosine classifiers whose target gets a margin *below* zero in training: classes may overlap, so that
new ones find room.

    accelerate launch recipes/neg_margin.py
    accelerate launch recipes/neg_margin.py --dataset cub --data-root data --backbone resnet12
    accelerate launch recipes/neg_margin.py --margin -0.02 --iters 500
"""

from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
import tyro

from fewshot import backbones, heads
from fewshot.data import episodes, transforms
from fewshot.data.classification import DatasetName
from fewshot.evaluation.meta_test import meta_test, report
from fewshot.heads import SupervisedClassifier
from fewshot.training import launch
from fewshot.training.folders import Stage
from fewshot.training.plan import find_stage, opened, planned
from fewshot.training.run import open_run, trainable
from fewshot.training.schedule import Passes, Schedule

METHOD = "neg_margin"  # names runs and models; a copy of this recipe needs a name of its own

# steps, rate, milestones, warm-up: as published (200 epochs, tiered-ImageNet 100), but for glyphs
# and Omniglot quick
QUICK = Schedule(500, 0.05, (300, 425), 25, ratio=0.25)
PUBLISHED = Schedule(120_000, 0.05, (36_000, 72_000), 3000, ratio=0.25)
SCHEDULE = dict.fromkeys(get_args(DatasetName), PUBLISHED) | {
    "glyphs": QUICK,
    "omniglot": QUICK,
    "cub": Schedule(18_400, 0.05, (5_520, 11_040), 3000, ratio=0.25),
    "tiered_imagenet": Schedule(701_100, 0.05, (210_330, 420_660), 5000, ratio=0.25),
    "folder": Passes(100, 0.05, 500, 120_000),  # passes, rate, least and most steps
}
# else -0.005; tiered-ImageNet with another backbone than conv4: -0.01
MARGIN = {"cub": -0.01, "tiered_imagenet": -0.02}


@dataclass
class Args:
    # data
    dataset: DatasetName | str = "glyphs"  # or a path: your own folder of class folders
    data_root: str = "data"  # folder that holds the data set
    novel: str | None = None  # file of own data's classes to test on, a line each, or json
    cache: bool = False  # decode the pictures once, into a memory map beside the data
    # test
    ways: int = 5  # classes in a test task
    shots: tuple[int, ...] = (1, 5)  # support images per class in a test task; each is tested
    queries: int = 15  # query images per class in a test task
    test_dataset: str | None = None  # test on another data set's, or folder's, classes
    test_root: str | None = None  # folder that holds it; by default --data-root
    tasks: int = 2000  # test tasks
    save_tasks: bool = False  # also write the accuracy of every test task to tasks.json
    test_temperature: float = 5.0  # of a test task's logits
    # training
    batch_size: int = 64  # images per step, over all processes
    iters: int | None = None  # steps; by default as published, own data's by their number
    lr: float = 0.05  # SGD's learning rate, after the warm-up
    eval_every: int = 2000  # steps between validations, which save; short own trainings have ten
    val_tasks: int = 100  # validation tasks
    # model
    backbone: str = "conv4"  # conv4, resnet12, wrn28_10, resnet18, torchvision/NAME or timm/NAME
    weights: str | None = None  # of the backbone: pretrained (default if there are), a file, none
    size: int | None = None  # side of the pictures; by default the backbone's or the data set's
    freeze: bool = False  # train only what is not the backbone
    margin: float | None = None  # of the target's cosine in training; by default as published
    temperature: float = 10.0  # of training logits
    # run
    out: str | None = None  # by default runs/neg_margin/<dataset>-<backbone>-seed<seed>
    seed: int = 0  # the only source of randomness
    workers: int = 2  # data-loading processes
    resume: bool = False  # go on from the last state in --out
    overwrite: bool = False  # replace the run in --out if it is finished, or begun
    test_only: bool = False  # only test the best model in --out
    wandb: bool = False  # log to Weights & Biases


def main(args: Args) -> None:
    with launch.started(METHOD, args) as accelerator:
        stage = find_stage(accelerator, METHOD, args)
        if stage is not None:  # a finished run is shown, not repeated
            train_and_test(stage, accelerator)


def train_and_test(stage: Stage, accelerator: launch.Accelerator) -> None:
    args = stage.args

    # data
    train_set, val_set, test_set = sets = opened(accelerator, args)
    schedule, eval_every = planned(accelerator, args, SCHEDULE[train_set.name], sets)

    # model
    margin = MARGIN.get(train_set.name, -0.005) if args.margin is None else args.margin
    if args.margin is None and train_set.name == "tiered_imagenet" and args.backbone != "conv4":
        margin = -0.01
    backbone = backbones.of(args, train_set.size)
    classes = len(train_set.classes)
    head = heads.NegMargin(backbone.out_features, classes, margin, args.temperature)
    few_shot = heads.FineTuned("normalised", args.test_temperature)
    model = SupervisedClassifier(backbone, head, few_shot)
    optimizer = torch.optim.SGD(trainable(model), lr=schedule.lr, momentum=0.9, weight_decay=1e-4)
    run = open_run(
        METHOD, stage, accelerator, model, optimizer, schedule, metadata=train_set.describe()
    )
    test = {"ways": args.ways, "queries": args.queries, "workers": args.workers}

    # train
    transform = transforms.train_transform(train_set)
    loader = episodes.class_batch_loader(train_set, run.feed, transform, batch_size=schedule.batch)
    for step, (images, labels, indices) in run.steps(loader):
        loss = F.cross_entropy(run.model(images, labels), labels)
        accelerator.backward(loss)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.log(step, {"loss": loss}, ids=indices)

        if step % eval_every == 0 or step == schedule.steps:
            result = meta_test(
                accelerator,
                run.model,
                val_set,
                shots=args.shots[:1],
                tasks=args.val_tasks,
                **test,
            )
            run.save(step, score=result[args.shots[0]].accuracy)

    # test
    results = meta_test(
        accelerator, run.best(), test_set, shots=args.shots, tasks=args.tasks, **test
    )
    report(run, results, args.ways, args.save_tasks)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
