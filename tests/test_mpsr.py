"""MPSR against the reference's outputs, losses and gradients."""

from functools import partial

import pytest
import torch
from detector_goldens import (
    EVERY,
    SIZE,
    check_detections,
    check_gradients,
    check_rpn,
    fill,
    normalised,
    training_batch,
)
from naming_rule import close, golden
from torch import Tensor

from fewshot.backbones import fpn
from fewshot.convert.mmfewshot import detector_name
from fewshot.data.transforms import CAFFE_MPSR
from fewshot.detectors import faster_rcnn
from fewshot.detectors.mpsr import MPSR, PUBLISHED

GOLDEN = golden("mpsr")
TEST, TRAIN = GOLDEN["test"], GOLDEN["train"]


our_key = partial(detector_name, method="mpsr")


@pytest.fixture(scope="module")
def model() -> MPSR:
    model = MPSR(
        fpn.fpn("resnet50", style="caffe"),
        20,
        rois=EVERY,
        aligned=False,
        train_proposals=(2000, 100),
    )
    fill(model, GOLDEN["state"], our_key)
    model.rpn.number = EVERY
    return model.eval()


@torch.no_grad()
def test_outputs_and_detections(model):
    model.eval()
    query = normalised("query0", by=CAFFE_MPSR)[None]
    close(query, TEST["input"])
    features = model.trunk(query)
    for ours, expected in zip(features, TEST["neck"], strict=True):
        close(ours, expected)
    check_rpn(model.rpn, features, TEST)
    fixed = torch.tensor(TEST["fixed_proposals"])
    maps = model.roi_features(features, [fixed])
    close(maps, TEST["roi_align"])
    logits, deltas = model.classify(maps), model.regress(maps)
    close(logits, TEST["cls_score"])
    close(deltas[:, 0], TEST["bbox_pred"])
    check_detections(
        faster_rcnn.detections(logits, deltas, fixed, SIZE, nms_offset=1), TEST["det_fixed"]
    )
    (found,) = model.detect(query, [SIZE])
    check_detections(found, TEST["det_e2e"])


def crops() -> list[Tensor]:
    return [
        torch.stack([normalised(f"aux{k}_{s}", s, s, by=CAFFE_MPSR) for k in range(2)])
        for s in PUBLISHED.scales
    ]


def test_losses_and_gradients(model):
    images, boxes, labels = training_batch(TRAIN, by=CAFFE_MPSR)
    model.train()
    model.zero_grad()
    stacks, crop_labels = crops(), torch.tensor(TRAIN["aux_labels"])
    for ours, expected in zip(stacks, TRAIN["aux_inputs"], strict=True):
        close(ours, expected)
    rpn_maps, roi_maps = model.crop_features(stacks)
    for ours, theirs in ((rpn_maps, "aux_rpn_feats"), (roi_maps, "aux_roi_feats")):
        for level, expected in zip(ours, TRAIN[theirs], strict=True):
            close(level, expected)
    for ours, expected in zip(
        model.rpn.crop_scores(rpn_maps, PUBLISHED.border), TRAIN["aux_rpn_cls"], strict=True
    ):
        close(ours, expected)
    close(model.classify_crops(roi_maps), TRAIN["aux_cls_score"])

    proposals = [torch.tensor(p) for p in TRAIN["fixed_proposals"]]
    rois = faster_rcnn.sample_rois(proposals, boxes, labels, classes=20, number=EVERY)
    losses = model.head_losses(model.trunk(images), rois, roi_maps, crop_labels)
    for ours, theirs in (
        ("cls", "loss_cls"),
        ("box", "loss_bbox"),
        ("crops", "loss_cls_auxiliary"),
    ):
        assert losses[ours].item() == pytest.approx(TRAIN["fixed"]["losses"][theirs], rel=1e-4)
    sum(losses.values()).backward()
    check_gradients(model, TRAIN["fixed"]["grad_norms"], our_key)


def test_whole_training_step(model):
    images, boxes, labels = training_batch(TRAIN, by=CAFFE_MPSR)
    model.train()
    model.zero_grad()
    losses = model(images, [SIZE] * 2, boxes, labels, crops(), torch.tensor(TRAIN["aux_labels"]))
    expected = {
        name: sum(v) if isinstance(v, list) else v for name, v in TRAIN["e2e"]["losses"].items()
    }
    names = {
        "rpn_cls": "loss_rpn_cls",
        "rpn_crops": "loss_rpn_cls_auxiliary",
        "rpn_box": "loss_rpn_bbox",
    }
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(expected[theirs], rel=1e-4), ours
    # the order of equally good proposals differs between implementations of NMS
    for ours, theirs in (
        ("cls", "loss_cls"),
        ("box", "loss_bbox"),
        ("crops", "loss_cls_auxiliary"),
    ):
        assert losses[ours].item() == pytest.approx(expected[theirs], rel=1e-3), ours
    sum(losses[name] for name in names).backward()
    check_gradients(model, TRAIN["e2e"]["rpn_loss_grad_norms"], our_key)
