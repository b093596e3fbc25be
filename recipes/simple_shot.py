"""SimpleShot (Wang et al., 2019, https://arxiv.org/abs/1911.04623).

Nothing is trained: features of a backbone less the base classes' mean, of unit length, and the
nearest class mean.

    accelerate launch recipes/simple_shot.py --init runs/baseline/glyphs-conv4-seed0
    accelerate launch recipes/simple_shot.py --backbone torchvision/resnet18 --dataset mini_imagenet --data-root data
    accelerate launch recipes/simple_shot.py --backbone timm/vit_small_patch14_dinov2.lvd142m --size 224
"""

from dataclasses import dataclass
from typing import Literal

import tyro

from fewshot import heads
from fewshot.data.classification import DatasetName
from fewshot.evaluation import frozen
from fewshot.evaluation.meta_test import meta_test, report
from fewshot.heads import FewShotClassifier, transductive
from fewshot.training import launch
from fewshot.training.folders import Stage
from fewshot.training.run import open_run

METHOD = "simple_shot"  # names runs and models; a copy of this recipe needs a name of its own


@dataclass
class Args:
    # data
    dataset: DatasetName | str = "glyphs"  # its test classes test, the training classes are base
    data_root: str = "data"  # folder that holds the data set
    novel: str | None = None  # file of own data's classes to test on, a line each, or json
    cache: bool = False  # decode the pictures once, into a memory map beside the data
    # test
    ways: int = 5  # classes in a test task
    shots: tuple[int, ...] = (1, 5)  # support images per class in a test task; each is tested
    queries: int = 15  # query images per class in a test task
    imbalance: float | None = None  # Dirichlet's alpha of queries over classes; published: 2
    test_dataset: str | None = None  # test on another data set's, or folder's, classes
    test_root: str | None = None  # folder that holds it; by default --data-root
    tasks: int = 2000  # test tasks
    save_tasks: bool = False  # also write the accuracy of every test task to tasks.json
    # model
    init: str | None = None  # run or model file whose trained backbone to take
    backbone: str | None = None  # or else a network: torchvision/NAME or timm/NAME
    weights: str | None = None  # of that: pretrained (the default), a file, none
    size: int | None = None  # side of its pictures in pixels; by default its own
    centre: bool | None = None  # take off the base classes' mean feature; by default with --init
    metric: Literal["euclidean", "cosine"] = "euclidean"  # of queries and class means
    # run
    features: str = "runs/features"  # folder where features are kept, for all methods and settings
    out: str | None = None  # the run's folder; by default runs/simple_shot/<dataset>-<backbone>-...
    seed: int = 0  # of the test tasks
    workers: int = 2  # data-loading processes
    resume: bool = False  # go on with an interrupted run: features that are there stay
    overwrite: bool = False  # replace the run in --out
    test_only: bool = False  # only test the model in --out, say with other --shots
    wandb: bool = False  # log to Weights & Biases


def main(args: Args) -> None:
    with launch.started(METHOD, args) as accelerator:
        stage = frozen.find_stage(accelerator, METHOD, args)
        if stage is not None:  # a finished run is shown, not repeated
            test(stage, accelerator)


def test(stage: Stage, accelerator: launch.Accelerator) -> None:
    args = stage.args

    # data
    backbone, base_set, test_set, about = frozen.opened(accelerator, stage)

    # model
    head = heads.TrainingFree(transductive.simple_shot, metric=args.metric)
    model = FewShotClassifier(backbone, head, centred=True)
    run = open_run(METHOD, stage, accelerator, model, metadata=about)
    if not args.test_only:
        if args.centre or (args.centre is None and args.init):
            model.mean = frozen.base_mean(accelerator, model, base_set, args)
        run.save_model()

    # test
    model = run.best()
    results = meta_test(
        accelerator,
        model,
        test_set,
        ways=args.ways,
        shots=args.shots,
        queries=args.queries,
        tasks=args.tasks,
        seed=args.seed,
        imbalance=args.imbalance,
        features=frozen.features(accelerator, model, test_set, args),
    )
    report(run, results, args.ways, args.save_tasks, setting="inductive")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
