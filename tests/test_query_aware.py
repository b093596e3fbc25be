"""Attention-RPN's data: supports as the reference cuts them, episodes as published, restarts to the
bit.
"""

import numpy as np
import pytest
import torch

from fewshot import InputError
from fewshot.data import detection, k_shot
from fewshot.data.pipeline import Pipeline
from fewshot.data.query_aware import QueryAware, support_crop, without_small
from fewshot.data.stream import Feed
from fewshot.data.transforms import CAFFE


@pytest.fixture(scope="module")
def dataset():
    whole = detection.open_detection("glyphs", "data", part="train")
    return whole.restrict(whole.base).with_records(whole.restrict(whole.base).records[:60])


def source(dataset, **more):
    defaults = {"ways": 2, "shots": 3, "size": 80, "context": 4}
    return QueryAware(dataset, Pipeline(), **{**defaults, **more})


@pytest.mark.parametrize(
    "box, expected",
    [
        ((10, 20, 110, 70), (25, 73, 279, 200)),
        ((350, 100, 399, 290), (185, 23, 257, 305)),
        ((0, 0, 400, 300), (0, 40, 320, 280)),
        ((200, 100, 260, 160), (55, 55, 264, 264)),
    ],
)
def test_boxes_of_supports_as_the_reference_has_them(box, expected):
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = 255
    crop, inside = support_crop(image, box, 320, 16)
    assert crop.shape == (3, 320, 320) and crop.dtype == torch.uint8
    assert inside.tolist() == list(expected)
    left, top, right, bottom = (int(v) for v in inside)
    assert (
        crop[:, top + 4 : bottom - 4, left + 4 : right - 4].eq(255).all()
    )  # the object is where the box says
    outside = crop.clone()
    outside[:, max(top - 4, 0) : bottom + 4, max(left - 4, 0) : right + 4] = 0
    assert outside.eq(0).all()


def test_episodes_search_for_what_is_there_and_for_what_is_not(dataset):
    episodes = source(dataset, ways=3)
    seen = set()
    for number in range(200):
        index, query, ways = episodes.draw(0, number)
        present = set(dataset.records[index].labels.tolist())
        labels = [{int(dataset.records[position].labels[i]) for position, i in way} for way in ways]
        assert query in present and labels[0] == {query}
        assert all(len(way) == 1 and not way & present for way in labels[1:])
        assert len(set.union(*labels)) == 3
        assert all(position != index for position, _ in ways[0])
        assert all(len(set(way)) == 3 for way in ways)
        seen.add(query)
    assert len(seen) == len(dataset.classes)
    assert episodes.draw(0, 7) == source(dataset, ways=3).draw(0, 7) != episodes.draw(1, 7)


def test_a_class_of_few_objects_shows_them_more_than_once(dataset):
    few = k_shot.select_shots(dataset, 2, 0)
    _, query, ways = source(few, shots=5).draw(0, 0)
    assert len(ways[0]) == 5 and set(ways[0]) <= set(detection.objects_by_class(few)[query])
    one = k_shot.select_shots(dataset, 1, 0)  # the only object is on the picture that is searched
    index, query, ways = source(one).draw(0, 0)
    assert {position for position, _ in ways[0]} == {index}


def test_batches(dataset):
    episodes = source(dataset)

    def load(**feed):
        return list(episodes.loader(Feed(seed=3, steps=6, **feed), CAFFE, batch_size=4))

    straight = load()
    assert len(straight) == 6
    batch, supports = straight[0]
    assert supports.images.shape == (4, 2, 3, 3, 80, 80) and supports.boxes.shape == (4, 2, 3, 4)
    for labels, boxes, query in zip(batch.labels, batch.boxes, supports.labels[:, 0, 0]):
        assert len(labels) == len(boxes) > 0 and labels.eq(query).all()
    resumed = load(start=4)
    halves = [load(rank=rank, world=2) for rank in (0, 1)]
    for step in (4, 5):
        assert torch.equal(straight[step][1].images, resumed[step - 4][1].images)
        assert torch.equal(straight[step][0].images[1::2], halves[1][step][0].images)
        assert straight[step][0].ids[::2] == halves[0][step][0].ids
    with pytest.raises(InputError, match="divided"):
        episodes.loader(Feed(steps=1, world=2), CAFFE, batch_size=3)


def test_table_has_every_class(dataset):
    every = torch.cat([part.labels for part in source(dataset).table(None, Feed(), CAFFE)])
    some = torch.cat([part.labels for part in source(dataset).table(2, Feed(), CAFFE)])
    assert every.bincount().tolist() == [
        len(entries) for entries in detection.objects_by_class(dataset)
    ]
    assert some.bincount().tolist() == [2] * len(dataset.classes)


def test_pictures_with_small_objects_can_be_left_out(dataset):
    areas = [np.prod(r.boxes[:, 2:] - r.boxes[:, :2], 1).min() for r in dataset.records]
    limit = float(np.median(areas))
    kept = without_small(dataset, limit)
    assert [r.id for r in kept.records] == [
        r.id for r, a in zip(dataset.records, areas) if a >= limit
    ]
    assert 0 < len(kept) < len(dataset)


def test_bad_input_is_named(dataset):
    with pytest.raises(InputError, match="too few"):
        source(dataset, ways=len(dataset.classes) + 1)
    lacking = dataset.with_records([r for r in dataset.records if not (r.labels == 3).any()])
    with pytest.raises(InputError, match="glyph-03"):
        source(lacking)
