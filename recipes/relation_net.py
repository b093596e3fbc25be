"""Relation Networks (Sung et al., 2018, https://arxiv.org/abs/1711.06025).

A small network learns to compare: it scores the feature map of a query beside the mean map of each
class.

    accelerate launch recipes/relation_net.py
    accelerate launch recipes/relation_net.py --dataset mini_imagenet --data-root data --backbone resnet12
    accelerate launch recipes/relation_net.py --loss mse
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import tyro

from fewshot import backbones, heads
from fewshot.data import episodes, transforms
from fewshot.data.classification import DatasetName
from fewshot.evaluation.meta_test import meta_test, report
from fewshot.heads import FewShotClassifier
from fewshot.training import launch
from fewshot.training.folders import Stage
from fewshot.training.plan import find_stage, opened, planned
from fewshot.training.run import open_run, trainable
from fewshot.training.schedule import Passes, Schedule

METHOD = "relation_net"  # names runs and models; a copy of this recipe needs a name of its own

# steps and rate, and a training episode's ways, shots and queries: as published, but for glyphs and
# Omniglot quick
SCHEDULE = dict.fromkeys(get_args(DatasetName), Schedule(100_000, 1e-3)) | {
    "glyphs": Schedule(600, 1e-3),
    "omniglot": Schedule(500, 1e-3),
    "folder": Passes(100, 1e-3, 600, 100_000),  # passes, rate, least and most steps
}
EPISODE = dict.fromkeys(get_args(DatasetName), (5, 5, 16)) | {"omniglot": (20, 1, 5)}
LOSSES = {"ce": F.cross_entropy, "mse": heads.relation_mse}


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
    # training
    train_ways: int | None = None  # classes in a training episode; like the next two, as published
    train_shots: int | None = None  # support images per class in a training episode
    train_queries: int | None = None  # query images per class in a training episode
    batch_size: int = 1  # episodes per step, over all processes
    iters: int | None = None  # steps; by default as published, own data's by their number
    lr: float = 1e-3  # Adam's learning rate
    eval_every: int = 2000  # steps between validations, which save; short own trainings have ten
    val_tasks: int = 500  # validation tasks
    # model
    backbone: str = "conv4"  # conv4, resnet12, wrn28_10, resnet18, torchvision/NAME or timm/NAME
    weights: str | None = None  # of the backbone: pretrained (default if there are), a file, none
    size: int | None = None  # side of the pictures; by default the backbone's or the data set's
    freeze: bool = False  # train only what is not the backbone
    loss: Literal["ce", "mse"] = "ce"  # cross-entropy, as published models; mse, as the paper
    momentum: float = 0.1  # of the head's batch norms; mmfewshot's 1.0 keeps the last episode's
    # run
    out: str | None = None  # by default runs/relation_net/<dataset>-<backbone>-seed<seed>
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
    ways, shots, queries = EPISODE[train_set.name]
    ways, shots, queries = (
        args.train_ways or ways,
        args.train_shots or shots,
        args.train_queries or queries,
    )
    episodes.check(train_set, ways, shots, queries, episodes.TRAIN_FLAGS)
    schedule, eval_every = planned(
        accelerator, args, SCHEDULE[train_set.name], sets, pictures=ways * (shots + queries)
    )

    # model
    backbone = backbones.of(args, train_set.size, pooled=False)
    head = heads.RelationHead(backbone.out_channels, backbone.map_size, momentum=args.momentum)
    model = FewShotClassifier(backbone, head)
    optimizer = torch.optim.Adam(trainable(model), lr=schedule.lr)
    run = open_run(
        METHOD, stage, accelerator, model, optimizer, schedule, metadata=train_set.describe()
    )
    test = {"ways": args.ways, "queries": args.queries, "workers": args.workers}

    # train
    transform = transforms.train_transform(train_set)
    loader = episodes.episode_loader(
        train_set, ways, shots, queries, run.feed, transform, tasks=schedule.batch
    )
    for step, episode in run.steps(loader):
        scores = run.model(episode.support, episode.query, ways)  # (tasks, queries, ways)
        loss = LOSSES[args.loss](scores.flatten(0, 1), episode.query_labels.flatten())
        accelerator.backward(loss)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.log(step, {"loss": loss}, ids=episode.indices)

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
