"""Crops of single objects: their geometry, and that a step's crops follow from the seed alone."""

import pytest
import torch

from fewshot import InputError
from fewshot.data import detection
from fewshot.data.object_crops import ObjectCrops, cut
from fewshot.data.stream import Feed


def test_cut_shows_the_object_with_context():
    image = torch.arange(100 * 150).remainder(251).to(torch.uint8).view(1, 100, 150).repeat(3, 1, 1)
    square = cut(image, torch.tensor([40.0, 30, 110, 72]))
    assert square.shape == (3, 80, 80)  # 70 * 8 / 7
    assert torch.equal(square, image[:, 11:91, 35:115])


def test_cut_is_black_outside_the_picture():
    image = torch.full((3, 100, 150), 7, dtype=torch.uint8)
    square = cut(image, torch.tensor([10.0, 20, 110, 70]))
    assert square.shape == (3, 114, 114)  # rows -12 to 102, columns 3 to 117
    assert (
        square[:, :12].eq(0).all() and square[:, 12:112].eq(7).all() and square[:, 112:].eq(0).all()
    )
    square = cut(
        image, torch.tensor([120.0, 60, 149, 99])
    )  # side 44: rows 57 to 101, columns 112 to 156
    assert square.shape == (3, 44, 44)
    assert (
        square[:, :43, :38].eq(7).all()
        and square[:, 43:].eq(0).all()
        and square[:, :, 38:].eq(0).all()
    )


def test_steps_follow_from_the_seed():
    scenes = detection.open_detection("glyphs", "", part="train")
    scenes = scenes.with_records(scenes.records[:3])
    crops = ObjectCrops(scenes, (24, 48), 4, Feed(), flip=False)
    batch = crops.draw(0, 5)
    assert [tuple(scale.shape) for scale in batch.images] == [(4, 3, 24, 24), (4, 3, 48, 48)]
    again, other = crops.draw(0, 5), crops.draw(1, 5)
    assert all(torch.equal(a, b) for a, b in zip(batch.images, again.images))
    assert not torch.equal(batch.images[0], other.images[0])
    # every object comes once in a pass, and two processes share a step
    objects = sorted(label for record in scenes.records for label in record.labels.tolist())
    single = ObjectCrops(scenes, (24,), 1, Feed(), flip=False)
    assert sorted(single.draw(0, i).labels.item() for i in range(len(objects))) == objects
    halves = [
        ObjectCrops(scenes, (24, 48), 4, Feed(rank=r, world=2), flip=False).draw(0, 5)
        for r in range(2)
    ]
    assert torch.equal(torch.stack([h.images[1] for h in halves], 1).flatten(0, 1), batch.images[1])


def test_too_small_objects_are_named():
    scenes = detection.open_detection("glyphs", "", part="train")
    scenes = scenes.with_records(scenes.records[:1])
    with pytest.raises(InputError, match="no object of 500 pixels"):
        ObjectCrops(scenes, (24,), 4, Feed(), flip=False, smallest=500)
