"""Logistic regression on frozen features (Tian et al., 2020, https://arxiv.org/abs/2003.11539).

Nothing but a task's linear classifier is trained, to the optimum, on features of unit length.

    accelerate launch recipes/logistic.py --init runs/baseline/glyphs-conv4-seed0
    accelerate launch recipes/logistic.py --backbone torchvision/resnet18 --dataset mini_imagenet --data-root data
"""

from dataclasses import dataclass

import tyro

from fewshot import heads
from fewshot.data.classification import DatasetName
from fewshot.evaluation import frozen
from fewshot.evaluation.meta_test import meta_test, report
from fewshot.heads import FewShotClassifier
from fewshot.heads.logistic import logistic
from fewshot.training import launch
from fewshot.training.folders import Stage
from fewshot.training.run import open_run

METHOD = "logistic"  # names runs and models; a copy of this recipe needs a name of its own


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
    C: float = 1.0  # inverse strength of the penalty of weights, beside a sum over supports
    # run
    features: str = "runs/features"  # folder where features are kept, for all methods and settings
    out: str | None = None  # the run's folder; by default runs/logistic/<dataset>-<backbone>-...
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
    backbone, _, test_set, about = frozen.opened(accelerator, stage)

    # model
    # so many classifiers are trained side by side
    head = heads.TrainingFree(logistic, tasks_at_once=256, C=args.C)
    model = FewShotClassifier(backbone, head)
    run = open_run(METHOD, stage, accelerator, model, metadata=about)
    if not args.test_only:
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
