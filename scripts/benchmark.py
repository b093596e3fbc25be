"""How fast the parts are, each beside what it must keep up with, measured in one process.

    python scripts/benchmark.py glyphs
    python scripts/benchmark.py meta-test --json meta_test.json
    python scripts/benchmark.py transductive --threads 1
    python scripts/benchmark.py train --dataset mini_imagenet --data-root data
    python scripts/benchmark.py detect --backbone resnet50 --short 480 --long 640

Every row names what is measured, ours, what it is compared with, and their ratio. Machines are
noisy: compare ratios of one run, and repeat it.
"""

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import plain_transductive
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from fewshot import backbones, heads
from fewshot.backbones import fpn, trunks
from fewshot.data import detection, episodes, transforms
from fewshot.data.classification import DatasetName, open_dataset
from fewshot.data.detection import Detections
from fewshot.data.glyphs import glyph, scene
from fewshot.data.pipeline import Batch, Pipeline, train_loader
from fewshot.data.stream import Feed
from fewshot.data.support import NWayKShot, SupportBatch
from fewshot.detectors import faster_rcnn
from fewshot.detectors.attention_rpn import AttentionRPN, MultiRelation
from fewshot.detectors.build import folded
from fewshot.detectors.fsce import FSCE
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaDetector, MetaRCNN
from fewshot.detectors.mpsr import MPSR
from fewshot.detectors.tfa import TFA
from fewshot.evaluation.meta_test import CHUNK_BYTES
from fewshot.heads import fine_tuned, logistic, transductive
from fewshot.heads.maml import MAML

LONG = 4.0  # seconds: what takes longer is timed once
WAYS, QUERIES = 5, 15  # of the tasks that are timed
# of classes' features, in standard deviations within a class: one shot is right every other time
SEPARATION = 0.25
# tasks, as in the recipes
AT_ONCE = {"logistic": 256, "pt_map": 128, "tim_gd": 64, "tim_adm": 64, "alpha_tim": 64}


@dataclass
class Row:
    """One line of the result: `ratio` is ours / plain, in `unit`s."""

    name: str
    ours: float
    plain: float | None  # None where there is nothing to compare with
    unit: str

    @property
    def ratio(self) -> float | None:
        return self.ours / self.plain if self.plain else None


def seconds(work: Callable[[], object], repeat: int = 3) -> float:
    """The median time of `work`, after one call that is not counted; the first time if that takes
    long.
    """

    def once() -> float:
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a GPU works on after the call returns
        return time.perf_counter() - begin

    first = once()
    return first if first > LONG else sorted(once() for _ in range(repeat))[repeat // 2]


def per_second(work: Callable[[], object], many: int = 1) -> float:
    """How many tasks or pictures a second, where `work` does `many`."""
    return many / seconds(work)


def only(methods: tuple[str, ...], known: dict) -> dict:
    """The `known` methods of these names, by default all."""
    for name in methods:
        if name not in known:
            raise SystemExit(f"no method {name!r}: choose from {', '.join(known)}")
    return {name: method for name, method in known.items() if not methods or name in methods}


def glyph_rows() -> Iterator[Row]:
    """Making a step's pictures in one loading process, beside training on them on all cores (ours /
    plain below 1).
    """
    train_set = open_dataset("glyphs", "", "train")
    transform = transforms.train_transform(train_set)

    def episodes_of(steps: int) -> Iterator[episodes.Episode]:
        return episodes.episode_loader(train_set, 5, 5, 16, Feed(steps=steps), transform, tasks=1)

    episode = next(episodes_of(1))
    net = backbones.build("conv4", train_set.size)

    def episode_step() -> None:
        pictures = (episode.support, episode.query)
        features = [net(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in pictures]
        F.cross_entropy(heads.prototype(*features, 5)[0], episode.query_labels[0]).backward()

    scenes = detection.open_detection("glyphs", "", part="train")
    scenes = scenes.restrict(scenes.base)
    supports = NWayKShot(scenes, 1, used=200, one_per_image=True, size=80)
    trunk = trunks.c4("small", meta=True)
    detector = MetaRCNN(trunk, 15, rois=32, rpn_channels=128, train_proposals=(1000, 100))

    def scenes_of(steps: int) -> Iterator[tuple[Batch, SupportBatch]]:
        feed, normal = Feed(steps=steps), detector.trunk.normalisation
        return train_loader(scenes, Pipeline(), feed, normal, batch_size=8, extra=supports.draw)

    batch, support = next(scenes_of(1))

    def detection_step() -> None:
        shown = (support.images, support.labels)
        losses = detector(batch.images, batch.sizes, batch.boxes, batch.labels, *shown)
        sum(losses.values()).backward()

    step = seconds(episode_step)
    draw = seconds(lambda: [glyph(c, 0, 1) for c in range(100)]) / 100
    yield Row("one 32x32 glyph, of a 105-glyph episode's step", draw * 1e3, step * 1e3, "ms")

    plan = seconds(lambda: [scene(range(20), 0, i) for i in range(100)]) / 100
    paint = seconds(lambda: [scene(range(20), 0, i).draw() for i in range(20)]) / 20
    yield Row("one scene's layout, of its drawing", plan * 1e3, paint * 1e3, "ms")

    load = seconds(lambda: list(episodes_of(3))) / 3
    yield Row("loading an episode of 105, training on it", load, step, "s")

    load, step = seconds(lambda: list(scenes_of(3))) / 3, seconds(detection_step)
    yield Row("loading 8 scenes and 15 supports, training on them", load, step, "s")


def tasks_at_once(width: int, shots: int) -> int:
    """Tasks whose features stay in the processor's cache, as many as meta_test takes."""
    return max(1, CHUNK_BYTES // (4 * width * WAYS * (shots + QUERIES)))


def plain_prototype(support: Tensor, query: Tensor, shots: int) -> Tensor:
    """One task as one writes it first: logits (queries, ways) of features (ways * shots, D) and
    (queries, D).
    """
    prototypes = torch.stack([support[k * shots : (k + 1) * shots].mean(0) for k in range(WAYS)])
    return -torch.cdist(query, prototypes).square()


def plain_adapted(
    model: nn.Module,
    sgd: torch.optim.SGD,
    batches: Iterable[tuple[Tensor, Tensor]],
    query: Tensor,
) -> Tensor:
    """One task as one writes it first: steps of torch.optim.SGD on a real module, then queries."""
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    with torch.no_grad():
        return model(query)


def plain_finetune(head: nn.Module, support: Tensor, query: Tensor, shots: int) -> Tensor:
    """One task's head, fine-tuned as mmfewshot does."""
    labels = torch.arange(WAYS).repeat_interleave(shots)
    sgd = torch.optim.SGD(
        head.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=1e-3
    )
    drop_last = not isinstance(head, heads.NegMargin)
    steps = 150 if shots == 1 else 600
    drawn = fine_tuned.random_batches(support[None], steps, 4, drop_last)
    return plain_adapted(head, sgd, ((support[i], labels[i]) for (i,) in drawn), query)


def meta_test_rows() -> Iterator[Row]:
    """Tasks per second from features on: all at once, beside a loop over tasks (ours / plain above
    1).
    """
    tasks = 512
    for width in (1600, 640):
        tuned = {
            "linear": (heads.FineTuned("linear"), nn.Linear, ()),
            "cosine": (heads.FineTuned("cosine", 2.0), heads.CosineLinear, (2.0,)),
            "normalised": (heads.FineTuned("normalised", 5.0), heads.NegMargin, (0.0, 5.0)),
        }
        for shots in (1, 5):
            support = (
                torch.randn(tasks, WAYS, 1, width) + torch.randn(tasks, WAYS, shots, width) / 2
            )
            support = support.flatten(1, 2).relu()
            query = torch.randn(tasks, WAYS * QUERIES, width).relu()
            what = f"{shots}-shot, {width} features"

            chunk, loop = tasks_at_once(width, shots), 20
            chunks = list(zip(support.split(chunk), query.split(chunk)))
            ours = per_second(lambda: [heads.prototype(s, q, WAYS) for s, q in chunks], tasks)
            plain = per_second(
                lambda: [plain_prototype(support[i], query[i], shots) for i in range(loop)], loop
            )
            yield Row(f"prototypes, {what}", ours, plain, "tasks/s")

            loop = 3 if shots == 1 else 1
            for name, (head, module, scale) in tuned.items():
                ours = per_second(lambda: head(support, query, WAYS), tasks)
                plain = per_second(
                    lambda: [
                        plain_finetune(module(width, WAYS, *scale), support[i], query[i], shots)
                        for i in range(loop)
                    ],
                    loop,
                )
                yield Row(f"{name}, fine-tuned, {what}", ours, plain, "tasks/s")
    yield from maml_rows()


def maml_rows() -> Iterator[Row]:
    """MAML's test on 84 x 84 pictures, where all of the network adapts to each task."""
    for shots in (1, 5):
        model = MAML(backbones.build("conv4", 84), WAYS)
        support = torch.randn(2, WAYS * shots, 3, 84, 84)
        query = torch.randn(2, WAYS * QUERIES, 3, 84, 84)
        labels = torch.arange(WAYS).repeat_interleave(shots)

        def plain() -> Tensor:
            network = copy.deepcopy(nn.Sequential(model.features, model.head))
            sgd = torch.optim.SGD(network.parameters(), lr=0.01)
            return plain_adapted(network, sgd, [(support[0], labels)] * 5, query[0])

        ours = per_second(lambda: model.predict(support, query, WAYS), 2)
        what = f"MAML, 5 steps, {shots}-shot, 84x84 pictures"
        yield Row(what, ours, per_second(plain), "tasks/s")


# supports, queries and the number of ways -> scores
Classifier = Callable[[Tensor, Tensor, int], Tensor]


def l2n(*features: Tensor, mean: Tensor | float = 0.0) -> list[Tensor]:
    """Features as the recipes prepare them: of unit length, after their mean was taken off."""
    return [transductive.unit(x - mean) for x in features]


def transductive_methods(mean: Tensor) -> dict[str, tuple[Callable, Classifier, Classifier]]:
    """What prepares features (tasks, n, D), as the recipes do; the method for many tasks; its plain
    version for one.
    """
    cl2n = partial(l2n, mean=mean)
    prepared = {
        transductive.simple_shot: cl2n,
        transductive.bd_cspn: cl2n,
        transductive.laplacian_shot: cl2n,
        transductive.tim_gd: l2n,
        transductive.tim_adm: l2n,
        transductive.alpha_tim: l2n,
        transductive.pt_map: transductive.power,
        logistic.logistic: l2n,
    }
    plain = {method: getattr(plain_transductive, method.__name__) for method in prepared}
    return {m.__name__: (prepare, m, plain[m]) for m, prepare in prepared.items()}


def features_of_classes(width: int) -> Tensor:
    """Features (20, 600, width) of as many pictures as mini-ImageNet tests on, of unit length and
    not below 0.
    """
    r = torch.Generator().manual_seed(0)
    centres = SEPARATION * torch.randn(20, 1, width, generator=r)
    return transductive.unit((centres + torch.randn(20, 600, width, generator=r)).relu())


def drawn_tasks(features: Tensor, shots: int, tasks: int) -> tuple[Tensor, Tensor]:
    """Rows of `features` (classes, pictures, D) in one: supports (tasks, ways * shots), queries
    (tasks, m).
    """
    pictures = np.arange(features[..., 0].numel()).reshape(features.shape[:2])
    drawn = [episodes.draw(pictures, WAYS, shots, QUERIES, 0, i) for i in range(tasks)]
    return tuple(torch.from_numpy(np.stack(x)).flatten(1) for x in list(zip(*drawn))[1:])


def in_chunks(
    prepare: Callable,
    method: Classifier,
    features: Tensor,
    support: Tensor,
    query: Tensor,
    chunk: int,
) -> Tensor:
    """Scores (tasks, m, ways) of tasks given as rows of features (n, D), as meta_test makes them."""
    chunks = zip(support.split(chunk), query.split(chunk))
    return torch.cat([method(*prepare(features[s], features[q]), WAYS) for s, q in chunks])


def one_by_one(
    prepare: Callable, method: Classifier, features: Tensor, support: Tensor, query: Tensor
) -> Tensor:
    """The same by a method for one task."""

    def alone(support: Tensor, query: Tensor, ways: int) -> Tensor:
        return method(support[0], query[0], ways)[None]

    return in_chunks(prepare, alone, features, support, query, chunk=1)


def transductive_rows(
    methods: tuple[str, ...], tasks: int, width: int = 640, loop: int = 20
) -> Iterator[Row]:
    """Tasks per second from pictures' features on: all `tasks`, beside a loop over the first `loop`
    of them.
    """
    features = features_of_classes(width)
    cases = only(methods, transductive_methods(features.mean((0, 1))))
    for shots in (1, 5):
        drawn = drawn_tasks(features, shots, tasks)
        every = features.flatten(0, 1), *drawn
        first = features.flatten(0, 1), *(rows[:loop] for rows in drawn)
        for name, (prepare, method, plain) in cases.items():
            chunk = AT_ONCE.get(name) or tasks_at_once(width, shots)
            fast = per_second(lambda: in_chunks(prepare, method, *every, chunk), tasks)
            slow = per_second(lambda: one_by_one(prepare, plain, *first), loop)
            yield Row(f"{name}, {shots}-shot, {tasks} tasks / loop", fast, slow, "tasks/s")


def train_rows(dataset: str, data_root: str, workers: int = 2, steps: int = 12) -> Iterator[Row]:
    """Training on pictures decoded once (ours) and decoded every time (plain), and a ProtoNet
    episode.
    """
    rates, shares = [], []
    for cache in (True, False):
        train_set = open_dataset(dataset, data_root, "train", cache=cache)
        net = backbones.build("conv4", train_set.size)
        model = nn.Sequential(net, nn.Linear(net.out_features, len(train_set.classes)))
        feed = Feed(steps=steps + 2, workers=workers)
        transform = transforms.train_transform(train_set)
        waited, ends, begin = [], [], time.perf_counter()
        for images, labels, _ in episodes.class_batch_loader(
            train_set, feed, transform, batch_size=64
        ):
            waited.append(time.perf_counter() - begin)
            F.cross_entropy(model(images), labels).backward()
            begin = time.perf_counter()
            ends.append(begin)
        whole = ends[-1] - ends[1]  # the first two steps wait for the loading processes to start
        rates.append(64 * steps / whole)
        shares.append(100 * sum(waited[2:]) / whole)
    yield Row(f"training on {dataset}, cached / decoded each time", *rates, "images/s")
    yield Row("of that time, waiting for pictures", *shares, "%")

    net = backbones.build("conv4", 84)
    support, query = torch.randn(25, 3, 84, 84), torch.randn(80, 3, 84, 84)
    labels = torch.arange(WAYS).repeat_interleave(16)

    def episode() -> None:
        features = net(support)[None], net(query)[None]
        F.cross_entropy(heads.prototype(*features, WAYS)[0], labels).backward()

    times = []
    for net.channels_last in (True, False):
        times.append(seconds(episode))
    yield Row("ProtoNet episode of 105 84x84, channels last / not", *times, "s")


@torch.no_grad()
def plain_meta_rcnn(model: MetaDetector, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The heads of Meta R-CNN and FSDetView as published: a pass per class over all RoI vectors."""
    logits = queries.new_zeros(len(queries), model.classes + 1)
    deltas = queries.new_zeros(len(queries), model.classes, 4)
    for k, prototype in enumerate(model.prototypes):
        seen = model.aggregate(queries, prototype)
        out = model.cls(seen)
        logits[:, k], deltas[:, k] = (
            out[:, k],
            model.reg(seen).view(len(queries), model.classes, 4)[:, k],
        )
        logits[:, -1] += out[:, -1] / model.classes
    return logits, deltas


def plain_relation(
    relation: MultiRelation, queries: Tensor, support: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention-RPN's head as one writes it first: both maps side by side through whole layers."""
    both = torch.cat([queries, support.expand_as(queries)], 1)
    x = F.avg_pool2d(F.relu(relation.patch[0](both)), relation.pool, stride=1)
    x = F.relu(relation.patch[2](F.relu(relation.patch[1](x)))).mean((2, 3))
    near = F.relu((relation.local(queries) * relation.local(support)).sum((2, 3)))
    far = F.relu(relation.whole[1](F.relu(relation.whole[0](both.mean((2, 3))))))
    return relation.patch_cls(x) + relation.local_cls(near) + relation.whole_cls(far), relation.reg(
        x
    )


@torch.no_grad()
def plain_attention_rpn(
    model: AttentionRPN, images: Tensor, size: tuple[int, int]
) -> list[Detections]:
    """Attention-RPN's test as published: a class after the other, from the trunk's features on."""
    features, found = model.trunk(images), []
    for kernel, shown in zip(model.kernels, model.maps):
        outputs = model.rpn.outputs(model.attended(features, kernel[None]))
        (proposals,) = model.rpn.proposals(*outputs, [size])
        _, maps = model.roi_maps(features, [proposals])
        logits, deltas = plain_relation(model.relation, maps, shown[None])
        found.append(faster_rcnn.detections(logits, deltas[:, None], proposals, size))
    return found


def detector_steps(model: nn.Module, images: Tensor, classes: int) -> dict[str, Tensor]:
    """Losses of a training step on `images`, three boxes each, with the supports or crops that the
    method trains on.
    """
    b, _, height, width = images.shape
    where = {"device": images.device}
    extent = torch.tensor([width, height], **where)
    corner = torch.rand(b, 3, 2, **where) * extent / 2
    boxes = list(torch.cat([corner, corner + extent / 3], -1))
    sizes, labels = [(height, width)] * b, [torch.randint(classes, (3,), **where) for _ in range(b)]
    if isinstance(model, AttentionRPN):  # 2 ways of 10 shots, 320 pixels
        shown = torch.tensor([32.0, 32.0, 288.0, 288.0], **where).expand(b, 2, 10, 4)
        return model(images, sizes, boxes, torch.randn(b, 2, 10, 3, 320, 320, **where), shown)
    if isinstance(model, MetaDetector):  # a support of every class
        supports = torch.randn(classes, 4, 224, 224, **where)
        return model(images, sizes, boxes, labels, supports, torch.arange(classes, **where))
    if isinstance(model, MPSR):
        crops = [torch.randn(b, 3, side, side, **where) for side in model.levels.scales]
        return model(images, sizes, boxes, labels, crops, torch.randint(classes, (b,), **where))
    return model(images, sizes, boxes, labels)


def with_prototypes(model: nn.Module) -> nn.Module:
    """The model in testing, made to know all its classes by random prototypes."""
    if isinstance(model, MetaDetector):
        labels = torch.arange(model.classes, device=model.prototypes.device)
        model.set_prototypes(torch.rand_like(model.prototypes), labels)
    elif isinstance(model, AttentionRPN):
        labels = torch.arange(model.classes, device=model.maps.device)
        model.set_prototypes(
            [(torch.rand_like(model.kernels), torch.rand_like(model.maps), labels)]
        )
    return folded(model.eval())


def detect_rows(
    backbone: str, short: int, long: int, methods: tuple[str, ...], device: str, pictures: int = 2
) -> Iterator[Row]:
    """Training and testing, pictures per second, random weights; published numbers of RoIs and
    proposals.

    A test with many classes stands beside the loop over classes where the method has one, else
    beside one class. `methods`: names, by default all.
    """
    style = {"style": "caffe"} if backbone.startswith("resnet") else {}
    levels = partial(fpn.fpn, backbone, **style)
    regions = partial(trunks.c4, backbone, **style)
    images, size = torch.randn(pictures, 3, short, long, device=device), (short, long)

    def made(build: Callable[[int], nn.Module], classes: int) -> nn.Module:
        """A detector whose first stage proposes its best anchors as they are: as many boxes
        whatever the classes.
        """
        torch.manual_seed(0)
        model = build(classes).to(device)
        nn.init.zeros_(model.rpn.reg.weight)
        return model

    make = {
        "TFA": lambda n: TFA(levels(), n, cosine=True),
        "FSCE": lambda n: FSCE(levels(), n, dimensions=128, above=0.7, cosine=True),
        "MPSR": lambda n: MPSR(levels(), n),
        "Meta R-CNN": lambda n: MetaRCNN(regions(meta=True), n),
        "FSDetView": lambda n: FSDetView(regions(meta=True), n),
        "Attention-RPN": lambda n: AttentionRPN(regions(), n),
    }
    for name, build in only(methods, make).items():
        model = made(build, 20).train()
        step = seconds(lambda: sum(detector_steps(model, images, 20).values()).backward(), repeat=1)
        what = f"{name}: training, pictures of {short} x {long}"
        yield Row(what, pictures / step, None, "pictures/s")

        one = None
        for classes in (1, 20, 80):
            model = with_prototypes(made(build, classes))
            test = per_second(lambda: model.detect(images[:1], [size]))
            one = one or test
            what, plain = f"{name}: testing {classes} classes", one
            if isinstance(model, AttentionRPN):
                plain = per_second(lambda: plain_attention_rpn(model, images[:1], size))
                what += " / loop"
            elif classes > 1:
                what += " / one class"
            yield Row(what, test, plain if classes > 1 else None, "pictures/s")
            if isinstance(model, AttentionRPN) and classes > 1:
                shared = per_second(lambda: model.detect(images[:1], [size], share=True))
                yield Row(
                    f"{name}: --share-proposals, {classes} classes / loop",
                    shared,
                    plain,
                    "pictures/s",
                )
            if isinstance(model, MetaDetector) and classes > 1:
                queries = torch.rand_like(model.prototypes[:1].expand(300, -1))
                with torch.no_grad():
                    ours = per_second(lambda: model.classify(queries))
                loop = per_second(lambda: plain_meta_rcnn(model, queries))
                yield Row(f"{name}: head alone, {classes} classes / loop", ours, loop, "pictures/s")


@dataclass
class Args:
    what: tyro.conf.Positional[str]  # glyphs, meta-test, transductive, train or detect
    dataset: DatasetName = "glyphs"  # for train: whose pictures
    data_root: str = "data"  # folder that holds the data set
    backbone: trunks.Name = "mobilenet_v2"  # for detect
    short: int = 240  # for detect: height of the pictures
    long: int = 320  # for detect: width of the pictures
    methods: tuple[str, ...] = ()  # detect, transductive: only these, e.g. "Meta R-CNN", tim_gd
    device: Literal["cpu", "cuda"] = "cpu"  # for detect: where the detectors run
    tasks: int = 2000  # for transductive: how many ours does; the loop does 20
    json: Path | None = None  # also write the rows to this file
    threads: int | None = None  # of torch; by default all cores


def main(args: Args) -> None:
    benchmarks = {
        "glyphs": glyph_rows,
        "meta-test": meta_test_rows,
        "transductive": lambda: transductive_rows(args.methods, args.tasks),
        "train": lambda: train_rows(args.dataset, args.data_root),
        "detect": lambda: detect_rows(
            args.backbone, args.short, args.long, args.methods, args.device
        ),
    }
    if args.what not in benchmarks:
        raise SystemExit(f"no benchmark {args.what!r}: choose from {', '.join(benchmarks)}")
    if args.threads:
        torch.set_num_threads(args.threads)

    rows = []
    print(f"{'':56}{'ours':>12}{'plain':>12}{'ratio':>9}", flush=True)
    for row in benchmarks[args.what]():
        beside = f"{'-':>12}{'-':>9}" if row.plain is None else f"{row.plain:12.4g}{row.ratio:9.2f}"
        print(f"{row.name:56}{row.ours:12.4g}{beside}  {row.unit}", flush=True)
        rows.append(row)
    if args.json:
        lines = [{**vars(row), "ratio": row.ratio} for row in rows]
        args.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
