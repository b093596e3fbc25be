"""How fast the parts are, each beside what it must keep up with, measured in one process.

    python scripts/benchmark.py glyphs
    python scripts/benchmark.py glyphs --json glyphs.json

Every row names what is measured, ours, what it is compared with, and their ratio. Machines are noisy: compare ratios of
one run, and repeat it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from fewshot import backbones, heads
from fewshot.data import detection, episodes, transforms
from fewshot.data.classification import open_dataset
from fewshot.data.glyphs import glyph, scene
from fewshot.data.support import NWayKShot
from fewshot.detectors.meta_rcnn import MetaRCNN


@dataclass
class Row:
    """One line of the result: `ratio` is ours / plain, in `unit`s."""

    name: str
    ours: float
    plain: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.ours / self.plain


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """The median time of `work`, after one call that is not counted."""
    work()
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeat // 2]


def glyph_rows() -> list[Row]:
    """Making a step's pictures in one loading process, beside training on them on all cores (ours / plain below 1)."""
    train_set = open_dataset("glyphs", "", "train")
    transform = transforms.train_transform(train_set)
    where = {"rank": 0, "world": 1, "device": "cpu"}
    sampling = {"tasks": 1, "seed": 0, "start": 0, "transform": transform, "workers": 0}
    shape = (train_set, 5, 5, 16)
    episode = next(episodes.episode_loader(*shape, steps=1, **sampling, **where))
    net = backbones.build("conv4", train_set.size)

    def episode_step() -> None:
        support, query = (net(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (episode.support, episode.query))
        F.cross_entropy(heads.prototype(support, query, 5)[0], episode.query_labels[0]).backward()

    scenes = detection.open_detection("glyphs", "", part="train")
    scenes = scenes.restrict(scenes.base)
    supports = NWayKShot(scenes, 1, used=200, one_per_image=True, size=80)
    feed = {"batch_size": 8, "seed": 0, "start": 0, "extra": supports.draw}
    batch, support = next(detection.train_loader(scenes, detection.Pipeline(), steps=1, **feed))
    detector = MetaRCNN(backbones.c4("small", meta=True), 15, rois=32, rpn_channels=128, train_proposals=(1000, 100))
    normal = detector.trunk.normalisation

    def detection_step() -> None:
        images, supported = batch.normalised(normal), support.normalised(normal)
        losses = detector(images, batch.sizes.tolist(), batch.boxes, batch.labels, supported, support.labels)
        sum(losses.values()).backward()

    def load_episodes() -> None:
        for _ in episodes.episode_loader(*shape, steps=3, **sampling, **where):
            continue

    def load_scenes() -> None:
        for _ in detection.train_loader(scenes, detection.Pipeline(), steps=3, **feed):
            continue

    draw = seconds(lambda: [glyph(c, 0, 1) for c in range(100)]) * 10
    plan = seconds(lambda: [scene(range(20), 0, i) for i in range(100)]) * 10
    paint = seconds(lambda: [scene(range(20), 0, i).draw() for i in range(20)]) * 50
    return [
        Row("one 32x32 glyph, of a 105-glyph episode's step", draw, seconds(episode_step) * 1e3, "ms"),
        Row("one scene's layout, of its drawing", plan, paint, "ms"),
        Row("loading an episode of 105, training on it", seconds(load_episodes) / 3, seconds(episode_step), "s"),
        Row(
            "loading 8 scenes and 15 supports, training on them", seconds(load_scenes) / 3, seconds(detection_step), "s"
        ),
    ]


BENCHMARKS = {"glyphs": glyph_rows}


@dataclass
class Args:
    what: tyro.conf.Positional[str]  # glyphs
    json: Path | None = None  # also write the rows to this file
    threads: int | None = None  # of torch; by default all cores


def main(args: Args) -> None:
    if args.what not in BENCHMARKS:
        raise SystemExit(f"no benchmark {args.what!r}: choose from {', '.join(BENCHMARKS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = BENCHMARKS[args.what]()
    print(f"{'':56}{'ours':>12}{'plain':>12}{'ratio':>9}")
    for row in rows:
        print(f"{row.name:56}{row.ours:12.4g}{row.plain:12.4g}{row.ratio:9.2f}  {row.unit}")
    if args.json:
        lines = [{**vars(row), "ratio": row.ratio} for row in rows]
        args.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
