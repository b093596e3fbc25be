"""Supports for detectors: the four-channel picture, and which objects an episode and the prototypes
are made of.
"""

import numpy as np
import pytest
import torch

from fewshot import InputError
from fewshot.data.annotations import make_record
from fewshot.data.detection import DetectionSet, open_detection
from fewshot.data.k_shot import select_shots
from fewshot.data.pipeline import Pipeline, train_loader
from fewshot.data.stream import Feed
from fewshot.data.support import NWayKShot, SupportBatch, support_image
from fewshot.data.transforms import CAFFE


@pytest.fixture(scope="module")
def glyph_set() -> DetectionSet:
    opened = open_detection("glyphs", "", part="test")
    return opened.with_records(opened.records[:80])


def test_mask_is_the_box_scaled_per_axis_and_truncated():
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)  # height 100, width 200
    support = support_image(image, np.array([50, 30, 99, 81], np.float32), size=80)
    assert support.shape == (4, 80, 80) and support.dtype == torch.uint8
    # x times 0.4: 20 to 39.6; y times 0.8: 24 to 64.8
    expected = torch.zeros(80, 80, dtype=torch.uint8)
    expected[24:64, 20:39] = 1
    assert torch.equal(support[3], expected)


def test_a_box_that_sticks_out_masks_what_is_inside():
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    mask = support_image(image, torch.tensor([-10.0, -20, 25, 70]), size=100)[3]
    assert mask[:, :50].all() and not mask[:, 50:].any()


def test_picture_is_squeezed_without_regard_to_its_ratio():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200)
    support = support_image(ramp, torch.tensor([0.0, 0, 10, 10]), size=50)
    # every 4th column of the ramp, at half-pixel centres: 1.5, 5.5, ...; rows are all alike
    assert (support[:3].float() - (4 * torch.arange(50) + 1.5)).abs().max() <= 0.5
    same = support_image(ramp[:, :, :100], torch.tensor([0.0, 0, 10, 10]), size=100)
    assert torch.equal(same[:3], ramp[:, :, :100])


def toy(*pictures: str) -> DetectionSet:
    """A picture for each word, an object for each letter; capitals are difficult."""
    records = []
    for n, letters in enumerate(pictures):
        objects = [
            ((10 * i, 0, 10 * i + 9, 9), "abc".index(c.lower()), c.isupper())
            for i, c in enumerate(letters)
        ]
        records.append(make_record(f"p{n}", "", 100, 100, objects))
    return DetectionSet("toy", "train", ["a", "b", "c"], ["c"], records, "voc")


@pytest.mark.parametrize(
    ("used", "one_per_image", "expected"),
    [
        (9, False, [[(0, 0), (0, 1), (1, 1), (2, 0), (3, 1)], [(0, 2), (2, 1)], [(1, 0), (3, 2)]]),
        (2, False, [[(0, 0), (0, 1)], [(0, 2), (2, 1)], [(1, 0), (3, 2)]]),
        (9, True, [[(0, 0), (2, 0), (3, 1)], [(4, 0)], [(1, 0)]]),
        # once a has its one, pictures lend what comes next on them
        (1, True, [[(0, 0)], [(2, 1)], [(1, 0)]]),
    ],
)
def test_which_objects_serve(used, one_per_image, expected):
    dataset = toy("aab", "ca", "ab", "Aac", "bB")
    if not one_per_image:
        dataset = dataset.with_records(dataset.records[:4])
    assert NWayKShot(dataset, 1, used=used, one_per_image=one_per_image).entries == expected


def test_difficult_objects_never_serve_and_a_class_without_any_is_named():
    with pytest.raises(InputError) as error:
        NWayKShot(toy("ab", "aC"), 1, used=30)
    assert "class c" in str(error.value) and "\n" not in str(error.value)


def test_an_episode_has_every_class_and_depends_on_seed_and_step_alone(glyph_set):
    supports = NWayKShot(glyph_set, 2, used=5, size=64)
    first = supports.draw(0, 3)
    assert first.images.shape == (40, 4, 64, 64) and first.images.dtype == torch.uint8
    assert (
        first.labels.view(20, 2).eq(first.labels[::2, None]).all()
    )  # shots of a class stand together
    assert sorted(first.labels[::2].tolist()) == list(range(20)) != first.labels[::2].tolist()
    supports.draw(0, 9)
    again = supports.draw(0, 3)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    for other in (supports.draw(1, 3), supports.draw(0, 4)):
        assert not torch.equal(first.labels, other.labels)
    for n in range(0, 40, 2):
        assert not torch.equal(first.images[n], first.images[n + 1])  # two different objects
        places = supports.entries[first.labels[n]]
        boxes = [glyph_set.records[position].boxes[i] for position, i in places]
        every = [support_image(glyph_set.image(p), box, 64) for (p, _), box in zip(places, boxes)]
        assert any(torch.equal(first.images[n], one) for one in every)


def test_every_support_is_drawn_in_the_long_run(glyph_set):
    supports = NWayKShot(
        select_shots(glyph_set.restrict(["glyph-15"]), 3, seed=0), 1, used=30, size=32
    )
    drawn = [supports.draw(0, step).images.sum().item() for step in range(40)]
    assert len(set(drawn)) == 3


def test_too_few_objects_are_repeated(glyph_set):
    supports = NWayKShot(select_shots(glyph_set, 2, seed=0), 5, used=30, size=32)
    labels, counts = supports.draw(0, 0).labels.unique(return_counts=True)
    assert labels.tolist() == list(range(20)) and (counts == 5).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_table_holds_every_support_in_order_of_classes(glyph_set, workers):
    supports = NWayKShot(select_shots(glyph_set, 2, seed=0), 1, used=30, size=32)
    batches = list(supports.table(Feed(workers=workers), CAFFE, batch_size=16))
    assert [len(b.labels) for b in batches] == [16, 16, 8]
    assert torch.cat([b.labels for b in batches]).tolist() == [
        label for label in range(20) for _ in range(2)
    ]
    position, i = supports.entries[19][1]
    last = support_image(
        supports.dataset.image(position), supports.dataset.records[position].boxes[i], 32
    )
    assert torch.equal(
        batches[-1].images[-1:],
        SupportBatch(last[None], torch.tensor([19])).normalised(CAFFE).images,
    )


def test_normalisation_leaves_the_mask(glyph_set):
    supports = NWayKShot(glyph_set, 1, used=1, size=32).draw(0, 0)
    images = supports.normalised(CAFFE).images
    assert images.dtype == torch.float32 and torch.equal(
        images[:, :3], CAFFE(supports.images[:, :3])
    )
    assert torch.equal(images[:, 3], supports.images[:, 3].float()) and set(
        images[:, 3].unique().tolist()
    ) == {0, 1}


def test_supports_ride_along_with_training_batches(glyph_set):
    supports = NWayKShot(glyph_set, 1, used=5, size=32)
    feed = Feed(seed=4, start=1, steps=3)
    loader = train_loader(glyph_set, Pipeline(), feed, CAFFE, batch_size=2, extra=supports.draw)
    for step, (batch, drawn) in enumerate(loader, 1):
        assert len(batch.ids) == 2 and torch.equal(
            drawn.images, supports.draw(4, step).normalised(CAFFE).images
        )
