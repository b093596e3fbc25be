"""Which steps a process makes, and that they arrive on the device, normalised, with the mistakes of
workers.
"""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot import InputError
from fewshot.data import episodes, pipeline
from fewshot.data.detection import open_detection
from fewshot.data.image_set import ImageSet
from fewshot.data.object_crops import ObjectCrops
from fewshot.data.pipeline import Pipeline
from fewshot.data.query_aware import QueryAware
from fewshot.data.stream import Feed, stream
from fewshot.data.support import NWayKShot
from fewshot.data.transforms import CAFFE, Whole

# "meta" stands for a GPU where there is none: it has shapes and types, but no numbers
DEVICES = ["cpu", "cuda" if torch.cuda.is_available() else "meta"]


def make(error: Exception | None, order: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One or two tensors of a number; order 2 raises the error."""
    if error is not None and order == 2:
        raise error
    return torch.tensor(order) if order < 3 else (torch.tensor(order), torch.tensor(-order))


def here(parts: list[torch.Tensor], device: str) -> bool:
    return all(part.device.type == device for part in parts)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_keeps_its_order(workers):
    items = list(stream(partial(make, None), [1, 4, 0, 1, 3], Feed(workers=workers)))
    assert items == [1, (4, -4), 0, 1, (3, -3)]
    assert list(stream(partial(make, None), [], Feed(workers=workers))) == []


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_mistake_in_a_worker_is_raised_here_in_its_turn(workers):
    items = stream(
        partial(make, InputError("picture.jpg: not readable")), range(5), Feed(workers=workers)
    )
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(InputError) as caught:
        next(items)
    assert type(caught.value) is InputError and str(caught.value) == "picture.jpg: not readable"


LEFT_OPEN = """
import multiprocessing, signal, sys, torch
from fewshot.data.stream import Feed, stream

def others(ready):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("ended in peace", flush=True)))
    ready.set()
    signal.pause()

def train():
    batches = stream(torch.tensor, range(99), Feed(workers=2))  # the traceback keeps it until the very end
    for batch in batches:
        raise RuntimeError("ours")

ready = multiprocessing.Event()
multiprocessing.Process(target=others, args=[ready], daemon=True).start()
ready.wait()
train()
"""


def test_a_program_that_fails_in_its_loop_ends_and_its_own_children_as_it_pleases():
    ended = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 1 and ended.stderr.endswith("RuntimeError: ours\n")
    assert ended.stdout == "ended in peace\n"


def test_processes_divide_a_step():
    shares = [list(Feed(rank=rank, world=3).numbers(2, 6)) for rank in range(3)]
    assert shares == [[12, 15], [13, 16], [14, 17]] and list(Feed().numbers(2, 6)) == list(
        range(12, 18)
    )
    for world in (1, 2, 3, 6):
        Feed(steps=1, world=world).check(6, "pictures")
    Feed(world=4).check(6, "pictures")  # a test of a model has no step


@pytest.mark.parametrize(("world", "total"), [(4, 6), (4, 2), (1, 0), (1, -2)])
def test_a_step_that_cannot_be_divided_is_refused(world, total):
    with pytest.raises(InputError) as caught:
        Feed(steps=1, world=world).check(total, "pictures")
    says = f"{total} pictures a step cannot be divided among {world} processes: use a multiple"
    assert str(caught.value) == says


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match=r"^seed -1: must not be negative$"):
        Feed(seed=-1).check(6, "pictures")


def test_every_loader_checks_its_feed_at_once():
    scenes = open_detection("glyphs", "", part="test")
    dataset, whole, feed = plain(), Whole(8, CAFFE), Feed(steps=1, world=2)
    for load in (
        lambda: pipeline.train_loader(scenes, Pipeline(), feed, CAFFE, batch_size=3),
        lambda: QueryAware(scenes, Pipeline(), ways=2, shots=1, size=32, context=4).loader(
            feed, CAFFE, batch_size=3
        ),
        lambda: ObjectCrops(scenes, (24,), 3, feed, flip=False),
        lambda: episodes.episode_loader(dataset, 2, 1, 1, feed, whole, tasks=3),
        lambda: episodes.class_batch_loader(dataset, feed, whole, batch_size=3),
    ):
        with pytest.raises(InputError, match=r"^3 \w+ a step cannot be divided among 2 processes"):
            load()


def plain() -> ImageSet:
    """Six grey pictures of two classes."""
    source = partial(Image.new, "RGB", (8, 8))
    labels = np.arange(6) % 2
    return ImageSet(
        "plain",
        "train",
        ["a", "b"],
        labels,
        lambda i: source((i, i, i)),
        size=8,
        stored=8,
        normalisation=CAFFE,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_detectors_are_on_the_device_and_normalised(device):
    scenes = open_detection("glyphs", "", part="test")
    scenes = scenes.with_records(scenes.records[:60])
    feed = Feed(steps=1, device=device)
    supports = NWayKShot(scenes, 1, used=1, size=32)
    crops = ObjectCrops(scenes, (24, 48), 2, feed, flip=False)
    queries = QueryAware(scenes, Pipeline(), ways=2, shots=1, size=32, context=4)
    train = partial(pipeline.train_loader, scenes, Pipeline(), feed, CAFFE, batch_size=2)
    batch, support = next(train(extra=supports.draw))
    _, cut = next(train(extra=crops.draw))
    searched, boxed = next(queries.loader(feed, CAFFE, batch_size=2))
    tested = next(pipeline.test_loader(scenes, Pipeline(), feed, CAFFE))
    tables = next(supports.table(feed, CAFFE)), next(queries.table(1, feed, CAFFE))
    for one in (batch, searched, tested):
        assert here([one.images, one.scales, *one.boxes, *one.labels], device)
    for one in (support, boxed, *tables):
        assert here([one.images, one.labels], device)
    assert here([*cut.images, cut.labels, boxed.boxes, tables[1].boxes], device)
    pictures = [
        one.images for one in (batch, searched, tested, support, boxed, *tables)
    ] + cut.images
    assert all(images.dtype == torch.float32 for images in pictures)
    if device != "meta":
        # glyph scenes have no padding, so every number of theirs was a grey level
        alone = pipeline.collate([Pipeline().sample(scenes, 0)]).images
        assert torch.equal(tested.images.cpu(), CAFFE(alone))
        assert torch.equal(support.images.cpu(), supports.draw(0, 0).normalised(CAFFE).images)
        drawn = crops.draw(0, 0).normalised(CAFFE).images
        assert all(torch.equal(x.cpu(), y) for x, y in zip(cut.images, drawn, strict=True))
        shown = [
            queries.supports([entry for way in queries.draw(0, n)[2] for entry in way])
            for n in (0, 1)
        ]
        assert torch.equal(
            boxed.images.flatten(0, 2).cpu(), CAFFE(torch.cat([part.images for part in shown]))
        )


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_of_classifiers_are_on_the_device_and_normalised(device):
    dataset, transform, feed = plain(), Whole(8, CAFFE), Feed(steps=1, device=device)
    episode = next(episodes.episode_loader(dataset, 2, 1, 1, feed, transform, tasks=2))
    images, labels, numbers = next(
        episodes.class_batch_loader(dataset, feed, transform, batch_size=4)
    )
    listed, order = next(episodes.image_loader(dataset, [3, 1], feed, transform))
    parts = [
        episode.support,
        episode.support_labels,
        episode.query,
        episode.query_labels,
        images,
        labels,
        listed,
    ]
    assert here(parts, device) and episode.classes.device.type == "cpu" and order == [3, 1]
    assert all(x.dtype == torch.float32 for x in (episode.support, episode.query, images, listed))
    if device != "meta":
        assert torch.equal(images.cpu(), CAFFE(torch.stack([dataset.pixels(i) for i in numbers])))
