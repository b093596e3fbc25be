"""Meta-Baseline (Chen et al., 2021, https://arxiv.org/abs/2003.04390).

A backbone that was trained to classify all training classes (recipes/baseline.py) is trained on, on episodes, with the
cosine to class means and a learnt temperature.

    accelerate launch recipes/meta_baseline.py --init runs/baseline/glyphs/model.safetensors
    accelerate launch recipes/meta_baseline.py
    accelerate launch recipes/meta_baseline.py --dataset cub --init runs/baseline/cub/model.safetensors
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from fewshot import backbones, heads, run, weights
from fewshot.data import episodes, transforms
from fewshot.data.classification import DatasetName, open_dataset
from fewshot.meta_test import meta_test, report

# episodes (ways, shots, queries), steps, learning rate, milestones and warm-up: as published, but for glyphs and
# Omniglot quick on a CPU, and at a rate that also learns without --init
QUICK, OMNIGLOT = ((10, 5, 5), 500, 0.05, (400,), 50), ((60, 1, 5), 500, 0.05, (400,), 50)
PUBLISHED = ((10, 5, 5), 100_000, 0.001, (20_000, 40_000), 3000)
SCHEDULE = {"glyphs": QUICK, "omniglot": OMNIGLOT, "cub": PUBLISHED, "mini_imagenet": PUBLISHED}
SCHEDULE |= {"cifar_fs": PUBLISHED, "fc100": PUBLISHED, "folder": PUBLISHED}
SCHEDULE |= {"tiered_imagenet": ((10, 5, 5), 100_000, 0.01, (20_000, 40_000), 3000)}


@dataclass
class Args:
    # data
    dataset: DatasetName = "glyphs"  # what to learn on
    data_root: str = "data"  # folder that holds the data set
    cache: bool = False  # decode the pictures once, into a memory map beside the data
    ways: int = 5  # classes in a test task
    shots: tuple[int, ...] = (1, 5)  # support images per class in a test task; each is tested
    queries: int = 15  # query images per class in a test task
    tasks: int = 2000  # test tasks
    save_tasks: bool = False  # also write the accuracy of every test task to tasks.json
    # training
    train_ways: int | None = None  # classes in a training episode; by default as published, like the next two
    train_shots: int | None = None  # support images per class in a training episode
    train_queries: int | None = None  # query images per class in a training episode
    batch_size: int = 1  # episodes per step, over all processes
    iters: int | None = None  # steps; by default the data set's published schedule
    lr: float | None = None  # SGD's learning rate; by default as published
    eval_every: int = 2000  # steps between validations, each of which also saves
    val_tasks: int = 500  # validation tasks
    # model
    backbone: Literal["conv4", "resnet12", "wrn28_10", "resnet18"] = "conv4"  # feature extractor
    init: str | None = None  # start from the backbone of this model file, say a trained baseline
    # run
    out: str | None = None  # where everything goes; by default runs/meta_baseline/<dataset>
    seed: int = 0  # the only source of randomness
    workers: int = 2  # data-loading processes
    resume: bool = False  # go on from the last state in --out
    test_only: bool = False  # only test the best model in --out
    wandb: bool = False  # log to Weights & Biases


class MetaBaseline(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.features, self.head = backbone, heads.MetaBaseline()

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, queries, ways) of features (tasks, n, D), the supports class by class."""
        return self.head(support, query, ways)

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """The same of images (tasks, n, 3, H, W)."""
        support, query = (self.features(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support, query))
        return self.classify(support, query, ways)


def main(args: Args) -> None:
    accelerator = run.start(args)
    (ways, shots, queries), published, lr, milestones, warmup = SCHEDULE[args.dataset]
    ways, shots = args.train_ways or ways, args.train_shots or shots
    queries, iters = args.train_queries or queries, args.iters or published
    milestones, warmup = [m * iters // published for m in milestones], warmup * iters // published
    out = args.out or f"runs/meta_baseline/{args.dataset}"

    # data
    with accelerator.local_main_process_first():  # one process fills the cache
        train_set, val_set, test_set = (
            open_dataset(args.dataset, args.data_root, split, cache=args.cache) for split in ("train", "val", "test")
        )
    episodes.check(train_set, ways, shots, queries)
    for split in (val_set, test_set):
        episodes.check(split, args.ways, max(args.shots), args.queries)

    # model
    model = MetaBaseline(backbones.build(args.backbone, train_set.size))
    if args.init:
        weights.fill_part(model.features, args.init, "features.")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr if args.lr is None else args.lr, momentum=0.9, weight_decay=1e-4
    )
    scheduler = run.warmup_step(optimizer, warmup=warmup, ratio=0.25, milestones=milestones)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    record = run.Record(accelerator, "meta_baseline", args, out, model, optimizer, scheduler, train_set.describe())
    test = {"ways": args.ways, "queries": args.queries, "workers": args.workers}

    # train
    if not args.test_only:
        loader = episodes.episode_loader(
            train_set,
            ways,
            shots,
            queries,
            tasks=args.batch_size,
            seed=args.seed,
            start=record.step,
            steps=iters,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
            transform=transforms.train_transform(train_set),
            workers=args.workers,
        )
        model.train()
        for step, episode in record.steps(loader, iters):
            logits = model(episode.support, episode.query, ways)  # (tasks, queries, ways)
            loss = F.cross_entropy(logits.flatten(0, 1), episode.query_labels.flatten())
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            record.log(step, {"loss": loss}, ids=episode.indices.tolist())

            if step % args.eval_every == 0 or step == iters:
                result = meta_test(accelerator, model, val_set, shots=args.shots[:1], tasks=args.val_tasks, **test)
                record.save(step, score=result[args.shots[0]].accuracy)

    # test
    record.load_best()
    results = meta_test(accelerator, model, test_set, shots=args.shots, tasks=args.tasks, **test)
    report(record, results, args.ways, args.save_tasks)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
