"""MAML, Model-Agnostic Meta-Learning (Finn et al., 2017, https://arxiv.org/abs/1703.03400).

Weights are trained so that a few steps of gradient descent on a task's supports solve the task: the
loss is that of the queries after those steps, and its gradient goes through them.

    accelerate launch recipes/maml.py
    accelerate launch recipes/maml.py --dataset mini_imagenet --data-root data --first-order
    accelerate launch recipes/maml.py --test-only --tasks 2000 --test-steps 10
"""

from dataclasses import dataclass
from typing import get_args

import torch
import tyro

from fewshot import backbones
from fewshot.data import episodes, transforms
from fewshot.data.classification import DatasetName
from fewshot.evaluation.meta_test import meta_test_images, report
from fewshot.heads.maml import MAML
from fewshot.training import launch
from fewshot.training.folders import Stage
from fewshot.training.plan import find_stage, opened, planned
from fewshot.training.run import open_run, trainable
from fewshot.training.schedule import Passes, Schedule

METHOD = "maml"  # names runs and models; a copy of this recipe needs a name of its own

# steps and rate, then episodes per step, the inner rate and test tasks: as published, but for
# glyphs and Omniglot quick on a CPU
QUICK, PUBLISHED = (Schedule(120, 3e-3), 2, 0.05, 300), (Schedule(12_500, 1e-3), 8, 0.01, 2000)
# passes, rate, least and most steps; then likewise
OWN = (Passes(100, 1e-3, 120, 12_500), 2, 0.01, 300)
SCHEDULE = dict.fromkeys(get_args(DatasetName), PUBLISHED) | {
    "glyphs": QUICK,
    "omniglot": QUICK,
    "folder": OWN,
}


@dataclass
class Args:
    # data
    dataset: DatasetName | str = "glyphs"  # or a path: your own folder of class folders
    data_root: str = "data"  # folder that holds the data set
    novel: str | None = None  # file of own data's classes to test on, a line each, or json
    cache: bool = False  # decode the pictures once, into a memory map beside the data
    # test
    shots: tuple[int, ...] = (1, 5)  # support images per class in a test task; each is tested
    queries: int = 15  # query images per class in a test task
    test_dataset: str | None = None  # test on another data set's, or folder's, classes
    test_root: str | None = None  # folder that holds it; by default --data-root
    tasks: int | None = None  # test tasks; by default 2000, but for glyphs and Omniglot 300
    save_tasks: bool = False  # also write the accuracy of every test task to tasks.json
    test_steps: int = 5  # steps on a test task's supports
    # training
    train_shots: int = 5  # support images per class in a training episode
    train_queries: int = 16  # query images per class in a training episode
    batch_size: int | None = None  # episodes per step, over all processes; default: as published
    iters: int | None = None  # steps
    lr: float | None = None  # Adam's learning rate
    eval_every: int = 250  # steps between validations, which save; short own trainings have ten
    val_tasks: int = 100  # validation tasks
    # model
    ways: int = 5  # classes in a task, for each of which the network has an output
    backbone: str = "conv4"  # conv4, resnet12, wrn28_10, resnet18, torchvision/NAME or timm/NAME
    weights: str | None = None  # of the backbone: pretrained (default if there are), a file, none
    size: int | None = None  # side of the pictures; by default the backbone's or the data set's
    inner_steps: int = 2  # steps on a training episode's supports
    inner_lr: float | None = None  # learning rate of these steps; by default as published
    first_order: bool = False  # leave out second derivatives: faster, with an approximate gradient
    # run
    out: str | None = None  # the run's folder; by default runs/maml/<dataset>-<backbone>-seed<seed>
    seed: int = 0  # the only source of randomness
    workers: int = 2  # data-loading processes
    at_once: int | None = None  # tasks at once: fewer take less memory; by default 4, on a CPU 1
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
    episodes.check(
        train_set,
        args.ways,
        args.train_shots,
        args.train_queries,
        ("--ways", "--train-shots", "--train-queries"),
    )
    row, batch, inner_lr, tasks = SCHEDULE[train_set.name]
    each = args.ways * (args.train_shots + args.train_queries)  # pictures of an episode
    schedule, eval_every = planned(accelerator, args, row, sets, pictures=each, batch=batch)
    inner_lr, tasks = inner_lr if args.inner_lr is None else args.inner_lr, args.tasks or tasks

    # model
    model = MAML(
        backbones.of(args, train_set.size),
        args.ways,
        steps=args.inner_steps,
        lr=inner_lr,
        test_steps=args.test_steps,
        first_order=args.first_order,
        at_once=args.at_once,
    )
    optimizer = torch.optim.Adam(trainable(model), lr=schedule.lr)
    about = train_set.describe() | {"inner_lr": inner_lr}
    run = open_run(METHOD, stage, accelerator, model, optimizer, schedule, metadata=about)
    test = {"ways": args.ways, "queries": args.queries, "workers": args.workers}

    # train
    transform = transforms.train_transform(train_set)
    loader = episodes.episode_loader(
        train_set,
        args.ways,
        args.train_shots,
        args.train_queries,
        run.feed,
        transform,
        tasks=schedule.batch,
    )
    for step, episode in run.steps(loader):
        # which output of the head stands for which class is by chance, as an episode's classes come
        # in random order
        loss = run.model(
            episode.support, episode.support_labels, episode.query, episode.query_labels
        )
        accelerator.backward(loss)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.log(step, {"loss": loss}, ids=episode.indices)

        if step % eval_every == 0 or step == schedule.steps:
            result = meta_test_images(
                accelerator,
                run.model,
                val_set,
                shots=args.shots[:1],
                tasks=args.val_tasks,
                **test,
            )
            run.save(step, score=result[args.shots[0]].accuracy)

    # test
    results = meta_test_images(
        accelerator, run.best(), test_set, shots=args.shots, tasks=tasks, **test
    )
    report(run, results, args.ways, args.save_tasks)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
