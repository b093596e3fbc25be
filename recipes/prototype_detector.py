"""A detector that learns nothing from new classes: frozen features, class prototypes, any base
model's regions.

The first stage of a base model proposes regions. A network that is not trained describes them, and
their cosines to the mean of each class's supports and to clusters of the background name them, as
in DE-ViT without its trained heads (Zhang et al., 2023, https://arxiv.org/abs/2309.12969) and in
"No time to train!" (Espinosa et al., 2025, https://arxiv.org/abs/2507.02798), here with boxes for
masks. To add a class takes as long as to look at its supports.

    accelerate launch recipes/tfa.py --stage base
    accelerate launch recipes/prototype_detector.py --base runs/tfa/glyphs-split1-small/base --shots 10
    accelerate launch recipes/prototype_detector.py --dataset voc --base coco --backbone timm/vit_small_patch14_dinov2
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

import tyro

from fewshot import InputError, methods
from fewshot.data import detection, k_shot
from fewshot.data.pipeline import Pipeline, test_loader
from fewshot.data.stream import Feed
from fewshot.detectors.prototype import FrozenMaps, PrototypeDetector
from fewshot.evaluation import detect
from fewshot.training import bases, folders, launch, stages
from fewshot.training.folders import Stage
from fewshot.training.run import Run, Training

# names runs and models; a copy of this recipe needs a name of its own
METHOD = "prototype_detector"


@dataclass
class Args:
    # data
    dataset: str = "glyphs"  # glyphs, voc, coco, or a folder annotated as COCO, VOC or YOLO do
    layout: Literal["coco", "voc", "yolo"] | None = None  # where own data's folder has several
    novel_classes: tuple[str, ...] = ()  # own data's novel classes; all, if --base knows none
    data_root: str = "data"  # folder that holds the data set
    split: Literal[1, 2, 3] = 1  # which classes are novel
    shots: k_shot.Shots = 10  # supports per class: a number, or all
    shot_lists: str | None = None  # published lists' folder, or a shots.json; else drawn by --seed
    short: int | None = None  # shorter side of what --backbone sees; by default as --base does
    long: int | None = None  # longest the longer side may get
    # test
    test_images: int | None = None  # test on only so many pictures
    test_proposals: int | None = None  # regions per picture in tests; by default the base's own
    scramble_supports: bool = False  # test also with every class given the next class's supports
    calibrate: str | None = None  # also test scores calibrated by shots: resnet101, or NAME=FILE
    classwise: bool = False  # also print the result of every class
    # model
    base: str | None = None  # whose first stage proposes: coco, coco_mobile, file, run, hub id
    keep_base: bool = False  # insist on the base model's classes too; your data must have them
    backbone: str | None = None  # network to describe them: torchvision/NAME; else the base's trunk
    weights: str | None = None  # of that: pretrained (the default), a file, none
    roi_size: int | None = None  # cells per side of a region; by default 7 of the base's, else 1
    clusters: int = 10  # background prototypes: clusters of what no box covers; 0 for none
    temperature: float = 0.1  # divides cosines before the softmax over classes and background
    objectness: float = 0.25  # share w of the first stage in a score, p^(1 - w) o^w
    nms: float = 0.5  # overlap from which only the better of two regions of a class stays
    decay: float = 0.5  # how much regions lose that lie in a better one of their class; 0: nothing
    # run
    out: str | None = None  # by default runs/prototype_detector/<dataset>-split<split>-...
    seed: int = 0  # of the shots
    seeds: tuple[int, ...] = ()  # support and test with each of these: mean and interval at the end
    workers: int = 2  # data-loading processes
    resume: bool = False  # go on with interrupted --seeds: what is finished is not done again
    overwrite: bool = False  # replace runs in --out that are finished, or begun
    test_only: bool = False  # only test the model in --out
    wandb: bool = False  # log to Weights & Biases

    stage = "supports"  # there is no other


def main(args: Args) -> None:
    with launch.started(METHOD, args) as accelerator:
        if args.base is None and not (args.test_only and args.out):
            raise InputError(
                "nothing proposes regions: give --base a detector's run, say of tfa --stage base, or coco"
            )
        if args.out is None:
            split = f"split{args.split}" if args.dataset in detection.PUBLISHED_SPLITS else None
            begin = bases.label(args.base)
            args = replace(
                args, out=folders.default(METHOD, args.dataset, split, begin, args.backbone)
            )
        functions = {args.stage: learn, "test": test_saved}
        stages.run_stages(accelerator, METHOD, args, "the base's trunk", functions)


def learn(stage: Stage, accelerator: launch.Accelerator) -> None:
    """Nothing but prototypes, of K objects of every class."""
    args = stage.args

    # data
    base = bases.load(args, stages.opened(args), METHOD, None)
    train = k_shot.choose_shots(base.data.train, args.shots, args.seed, args.shot_lists)
    pictures = seen(args, Pipeline(**base.about.get("pictures", {})))
    stages.announce(accelerator, train, base.data.test, pictures)

    # model
    proposing = methods.built(base.about)
    methods.fill(proposing, base.state, args.base)
    backbone = FrozenMaps(args.backbone, args.weights or "pretrained") if args.backbone else None
    roi_size = args.roi_size if args.roi_size is not None else 1 if backbone else 7
    sizes = {"roi_size": roi_size, "clusters": args.clusters}
    scores = {name: getattr(args, name) for name in ("temperature", "objectness", "nms", "decay")}
    model = PrototypeDetector(
        proposing, base.about, len(train.classes), backbone, **sizes, **scores
    )
    about = {"stage": stage.name, "pictures": pictures.describe()}
    about |= model.describe() | train.describe()
    kept = {"folder": stage.folder, "metadata": about, "files": k_shot.files(train)}
    run = Training(METHOD, args, accelerator, model, **kept)

    # supports
    began, supports = time.perf_counter(), []
    # every process looks at all of them
    alone = Feed(device=accelerator.device, workers=args.workers)
    for batch in test_loader(train, pictures, alone, model.trunk.normalisation):
        with accelerator.autocast():
            features = model.support_features(batch.images, batch.sizes, batch.boxes)
        supports.append((*features, batch.labels[0]))
    model.add_supports(supports)
    run.save_model()
    accelerator.print(
        f"{len(train.classes)} classes learnt in {time.perf_counter() - began:.1f} seconds"
    )

    # test
    look(run, base.data.test, train)


def seen(args: Args, pictures: Pipeline) -> Pipeline:
    """The pictures as the backbone sees them, given those of the base model."""
    given = {name: getattr(args, name) for name in ("short", "long") if getattr(args, name)}
    if (given or args.weights) and args.backbone is None:
        raise InputError(
            "--short, --long and --weights are for a --backbone: leave them out, or give one"
        )
    return replace(pictures, **given, enlarge=pictures.enlarge or "short" in given)


def test_saved(stage: Stage, accelerator: launch.Accelerator) -> None:
    """The model that is there, as it is."""
    about, args = stage.metadata, stage.args
    model = methods.built(about)
    run = Run(METHOD, args, accelerator, model, folder=stage.folder, metadata=about)
    look(run, stages.opened(args).test.with_novel(about["novel"]).restrict(about["classes"]))


def look(run: Run, test: detection.DetectionSet, train=None) -> None:
    regions = run.metadata["first_stage"]["method"]
    described = run.metadata["frozen_backbone"] or "its own trunk"
    protocol = {"trained_on": f"no class: regions of {regions}, seen by {described}"}
    detect.test(run, test, train, protocol)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
