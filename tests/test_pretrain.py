"""A trunk that names objects first, before a detector that compares trains on."""

import pytest
import torch
from accelerate import Accelerator

from fewshot.backbones import trunks
from fewshot.data import detection, pipeline
from fewshot.data.detection import DetectionSet
from fewshot.data.pipeline import Pipeline
from fewshot.data.stream import Feed
from fewshot.detectors import faster_rcnn
from fewshot.training import pretrain


@pytest.fixture(scope="module")
def scenes() -> DetectionSet:
    scenes = detection.open_detection("glyphs", "", part="train")
    return scenes.with_records(scenes.records[:40]).restrict(scenes.classes[:4])


def trained(scenes: DetectionSet, steps: int, seed: int = 0) -> trunks.C4:
    torch.manual_seed(5)
    trunk = trunks.c4("small")
    trunk.freeze(0)  # the stem stays as it is
    how = {"steps": steps, "lr": 0.04, "batch_size": 4, "seed": seed}
    pretrain.name_objects(Accelerator(cpu=True), trunk, scenes, Pipeline(), **how)
    return trunk


@torch.no_grad()
def nearest_mean(trunk: trunks.C4, scenes: DetectionSet) -> float:
    """How often an object's features are nearest to the mean of its class, of other objects."""
    vectors, labels = [], []
    for batch in pipeline.test_loader(
        scenes, Pipeline(), Feed(), trunk.normalisation, batch_size=50
    ):
        features = trunk(batch.images)
        vectors.append(
            trunk.stage4(faster_rcnn.roi_align(features, batch.boxes, 6, trunk.stride)).flatten(1)
        )
        labels += batch.labels
    x, y = torch.cat(vectors), torch.cat(labels)
    half = len(y) // 2
    means = torch.stack([x[:half][y[:half] == label].mean(0) for label in range(4)])
    return (torch.cdist(x[half:], means).argmin(1) == y[half:]).float().mean().item()


def test_objects_are_told_apart(scenes):
    before, after = trained(scenes, 0), trained(scenes, 40)
    assert nearest_mean(before, scenes) < 0.6 < 0.7 < nearest_mean(after, scenes)
    assert torch.equal(before.conv1.weight, after.conv1.weight)
    assert not torch.equal(before.layer1[0].conv1.weight, after.layer1[0].conv1.weight)
    assert all(p.grad is None for p in after.parameters())


def test_the_seed_is_all_that_counts(scenes):
    first, second, third = trained(scenes, 2), trained(scenes, 2), trained(scenes, 2, seed=1)
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(
        not torch.equal(a, c) for a, _, c in pairs
    )


def test_boxes_near_and_far():
    torch.manual_seed(0)
    boxes = torch.tensor([[10.0, 20, 50, 40], [90, 90, 100, 100]])
    proposals = pretrain.near_and_far(boxes, 100, 120)
    assert len(proposals) > 20 and proposals.min() >= 0
    assert (proposals[:, 2] <= 120).all() and (proposals[:, 3] <= 100).all()
    near = proposals[0:16:2]  # the objects take turns
    assert ((near - boxes[0]).abs() <= torch.tensor([40, 20, 40, 20]) / 3 + 1e-4).all()
    assert len(pretrain.near_and_far(boxes[:0], 100, 120)) > 0  # a picture without objects
