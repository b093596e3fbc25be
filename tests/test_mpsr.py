"""MPSR against the reference's outputs, losses and gradients."""

from functools import partial

import pytest
import torch
from detector_goldens import (
    EVERY,
    SIZE,
    all_rois,
    check_detections,
    check_gradients,
    check_levels,
    check_losses,
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
    trunk = fpn.fpn("resnet50", style="caffe")
    model = MPSR(trunk, 20, rois=EVERY, aligned=False, train_proposals=(2000, 100))
    fill(model, GOLDEN["state"], our_key)
    model.rpn.number = EVERY
    return model.eval()


@torch.no_grad()
def test_outputs_and_detections(model):
    model.eval()
    query = normalised("query0", by=CAFFE_MPSR)[None]
    close(query, TEST["input"])
    features = model.trunk(query)
    check_levels(features, TEST["neck"])
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


@pytest.mark.slow  # the next one has all losses, and gradients of half of them
def test_losses_and_gradients(model):
    images, boxes, labels = training_batch(TRAIN, by=CAFFE_MPSR)
    model.train()
    model.zero_grad()
    stacks, crop_labels = crops(), torch.tensor(TRAIN["aux_labels"])
    check_levels(stacks, TRAIN["aux_inputs"])
    rpn_maps, roi_maps = model.crop_features(stacks)
    check_levels(rpn_maps, TRAIN["aux_rpn_feats"])
    check_levels(roi_maps, TRAIN["aux_roi_feats"])
    check_levels(model.rpn.crop_scores(rpn_maps, PUBLISHED.border), TRAIN["aux_rpn_cls"])
    close(model.classify_crops(roi_maps), TRAIN["aux_cls_score"])

    rois = all_rois(TRAIN, boxes, labels, 20)
    losses = model.head_losses(model.trunk(images), rois, roi_maps, crop_labels)
    check_losses(losses, TRAIN["fixed"]["losses"], "cls box crops")
    sum(losses.values()).backward()
    check_gradients(model, TRAIN["fixed"]["grad_norms"], our_key)


def test_whole_training_step(model):
    images, boxes, labels = training_batch(TRAIN, by=CAFFE_MPSR)
    model.train()
    model.zero_grad()
    losses = model(images, [SIZE] * 2, boxes, labels, crops(), torch.tensor(TRAIN["aux_labels"]))
    check_losses(losses, TRAIN["e2e"]["losses"], "rpn_cls rpn_crops rpn_box")
    # the order of equally good proposals differs between implementations of NMS
    check_losses(losses, TRAIN["e2e"]["losses"], "cls box crops", rel=1e-3)
    (losses["rpn_cls"] + losses["rpn_crops"] + losses["rpn_box"]).backward()
    check_gradients(model, TRAIN["e2e"]["rpn_loss_grad_norms"], our_key)
