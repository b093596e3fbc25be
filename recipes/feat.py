"""FEAT (Ye et al., 2020, https://arxiv.org/abs/1812.03664).

Attention over a task's class means adapts each to the others; a query belongs to the class whose
adapted mean is nearest. Start from a trained backbone, as published: without one it is no better
than Prototypical Networks.

    accelerate launch recipes/feat.py --init runs/baseline/glyphs-conv4-seed0
    accelerate launch recipes/feat.py
"""

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from fewshot import backbones, weights
from fewshot.data import episodes, transforms
from fewshot.data.classification import DatasetName
from fewshot.evaluation.meta_test import meta_test, report
from fewshot.heads import FewShotClassifier
from fewshot.heads.feat import FEAT
from fewshot.training import launch
from fewshot.training.folders import Stage
from fewshot.training.plan import find_stage, opened, planned
from fewshot.training.run import open_run
from fewshot.training.schedule import Passes, Schedule

METHOD = "feat"  # names runs and models; a copy of this recipe needs a name of its own


class Setting(NamedTuple):
    """What training was published with."""

    temperature: float  # divides squared distances to prototypes, which are as long as D^½
    auxiliary_temperature: float  # the same in the auxiliary loss
    balance: float  # weight of that loss
    schedule: Schedule  # of the backbone; the rate of the attention is ten times as high


# Adam, and SGD with Nesterov's momentum; rates are halved every 20 or 40 of 200 epochs of 100
# episodes
CONV4 = Schedule(20_000, 1e-4, tuple(range(2000, 20_000, 2000)), gamma=0.5)
RESNET12 = Schedule(20_000, 2e-4, tuple(range(4000, 20_000, 4000)), gamma=0.5)
PUBLISHED = {  # by backbone, or data where these have their own, and shots in training
    ("conv4", 1): Setting(64, 16, 1.0, CONV4),
    ("conv4", 5): Setting(32, 64, 0.1, CONV4),
    ("resnet12", 1): Setting(64, 64, 0.01, RESNET12),
    ("resnet12", 5): Setting(64, 32, 0.1, RESNET12),
    ("tiered_imagenet", 1): Setting(64, 64, 0.1, RESNET12._replace(milestones=CONV4.milestones)),
    ("tiered_imagenet", 5): Setting(32, 64, 0.1, RESNET12),
}


def published(backbone: str, dataset: str, shots: int) -> Setting:
    """The row of `PUBLISHED`: mini-ImageNet's for other data, ResNet-12's for other backbones, 5
    for several shots.
    """
    kind = (
        "conv4" if backbone == "conv4" else dataset if dataset == "tiered_imagenet" else "resnet12"
    )
    return PUBLISHED[kind, 1 if shots == 1 else 5]


# steps and the backbone's rate, a tenth of the attention's: Conv4's as published, but for glyphs
# and Omniglot quick passes, rate, least and most steps
QUICK, OWN = Schedule(600, 1e-4), Passes(100, 1e-4, 600, 20_000)
SCHEDULE = dict.fromkeys(get_args(DatasetName), CONV4) | {
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
    ways: int = 5  # classes in a test task
    shots: tuple[int, ...] = (1, 5)  # support images per class in a test task; each is tested
    queries: int = 15  # query images per class in a test task
    test_dataset: str | None = None  # test on another data set's, or folder's, classes
    test_root: str | None = None  # folder that holds it; by default --data-root
    tasks: int = 2000  # test tasks
    save_tasks: bool = False  # also write the accuracy of every test task to tasks.json
    # training
    train_ways: int = 5  # classes in a training episode
    train_shots: int = 1  # support images per class in a training episode
    train_queries: int = 15  # query images per class in a training episode
    batch_size: int = 1  # episodes per step, over all processes
    iters: int | None = None  # steps; by default as published, own data's by their number
    lr: float | None = None  # the backbone's rate, a tenth of the attention's; by default published
    eval_every: int = 2000  # steps between validations, which save; short own trainings have ten
    val_tasks: int = 500  # validation tasks
    # model
    backbone: str = "conv4"  # conv4, resnet12, wrn28_10, resnet18, torchvision/NAME or timm/NAME
    weights: str | None = None  # of the backbone: pretrained (default if there are), a file, none
    size: int | None = None  # side of the pictures; by default the backbone's or the data set's
    freeze: bool = False  # train only what is not the backbone
    init: str | None = None  # run or model file whose backbone to start from, say a baseline
    # run
    out: str | None = None  # the run's folder; by default runs/feat/<dataset>-<backbone>-seed<seed>
    seed: int = 0  # the only source of randomness
    workers: int = 2  # data-loading processes
    resume: bool = False  # go on from the last state in --out
    overwrite: bool = False  # replace the run in --out if it is finished, or begun
    test_only: bool = False  # only test the best model in --out
    wandb: bool = False  # log to Weights & Biases


class FEATClassifier(FewShotClassifier):
    def forward(self, support: Tensor, query: Tensor, ways: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (tasks, queries, ways) of images (tasks, n, 3, H, W), then the auxiliary loss's
        logits (tasks, all, ways) and labels.
        """
        support, query = self.embed(support, query)
        return self.classify(support, query, ways), *self.head.auxiliary(support, query, ways)


def main(args: Args) -> None:
    with launch.started(METHOD, args) as accelerator:
        stage = find_stage(accelerator, METHOD, args)
        if stage is not None:  # a finished run is shown, not repeated
            train_and_test(stage, accelerator)


def train_and_test(stage: Stage, accelerator: launch.Accelerator) -> None:
    args = stage.args

    # data
    train_set, val_set, test_set = sets = opened(accelerator, args)
    ways, shots, queries = args.train_ways, args.train_shots, args.train_queries
    episodes.check(train_set, ways, shots, queries, episodes.TRAIN_FLAGS)
    setting, row = published(args.backbone, train_set.name, shots), SCHEDULE[train_set.name]
    row = setting.schedule if row is CONV4 else row
    schedule, eval_every = planned(accelerator, args, row, sets, pictures=ways * (shots + queries))

    # model
    backbone = backbones.of(args, train_set.size)
    head = FEAT(backbone.out_features, setting.temperature, setting.auxiliary_temperature)
    model = FEATClassifier(backbone, head, together=True)
    if args.init and not args.test_only:
        weights.fill_part(model.features, args.init, "features.")
    elif not args.test_only:
        accelerator.print(
            "no --init: published FEAT starts from a trained backbone, and needs it to beat ProtoNet"
        )
    groups = [
        {"params": model.features.parameters()},
        {"params": model.head.parameters(), "lr": 10 * schedule.lr},
    ]
    small, sgd = args.backbone == "conv4", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = (
        torch.optim.Adam(groups, schedule.lr)
        if small
        else torch.optim.SGD(groups, schedule.lr, **sgd)
    )
    about = train_set.describe() | {"temperature": setting.temperature}
    run = open_run(METHOD, stage, accelerator, model, optimizer, schedule, metadata=about)
    test = {"ways": args.ways, "queries": args.queries, "workers": args.workers}

    # train
    transform = transforms.train_transform(train_set)
    loader = episodes.episode_loader(
        train_set, ways, shots, queries, run.feed, transform, tasks=schedule.batch
    )
    for step, episode in run.steps(loader):
        logits, auxiliary_logits, labels = run.model(episode.support, episode.query, ways)
        loss = F.cross_entropy(logits.flatten(0, 1), episode.query_labels.flatten())
        auxiliary = F.cross_entropy(
            auxiliary_logits.flatten(0, 1), labels.repeat(len(auxiliary_logits))
        )
        accelerator.backward(loss + setting.balance * auxiliary)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.log(step, {"loss": loss, "auxiliary": auxiliary}, ids=episode.indices)

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
