"""FSCE against the reference's outputs, losses and gradients."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detector_goldens import (
    EVERY,
    SIZE,
    all_rois,
    check_detections,
    check_gradients,
    check_losses,
    fill,
    normalised,
    training_batch,
)
from naming_rule import array, close, golden

from fewshot.backbones import fpn
from fewshot.convert.mmfewshot import detector_name
from fewshot.detectors import faster_rcnn
from fewshot.detectors.fsce import FSCE, contrastive_loss

GOLDEN = golden("fsce")
TEST, TRAIN = GOLDEN["test"], GOLDEN["train"]


our_key = partial(detector_name, method="fsce")


@pytest.fixture(scope="module")
def model() -> FSCE:
    trunk = fpn.fpn("resnet50", style="caffe")
    model = FSCE(
        trunk, 20, above=0.8, cosine=True, rois=EVERY, threshold=0.4, train_proposals=(2000, 50)
    )
    fill(model, GOLDEN["state"], our_key)
    model.rpn.number, model.strength = EVERY, 0.5
    return model.eval()


@torch.no_grad()
def test_outputs_and_detections(model):
    query, fixed = normalised("query0")[None], torch.tensor(TEST["fixed_proposals"])
    vectors = model.roi_vectors(model.trunk(query), [fixed])
    logits, deltas = model.head(vectors)
    close(logits, TEST["cls_score"])
    close(deltas.flatten(1), TEST["bbox_pred"])
    close(model.encode(vectors), TEST["contrast_feat"])
    check_detections(faster_rcnn.detections(logits, deltas, fixed, SIZE), TEST["det_fixed"])
    check_detections(model.detect(query, [SIZE])[0], TEST["det_e2e"])


def test_losses_and_gradients(model):
    images, boxes, labels = training_batch(TRAIN)
    model.train()
    rois = all_rois(TRAIN, boxes, labels, 20, threshold=0.4)
    vectors = model.roi_vectors(model.trunk(images), [r.boxes for r in rois])
    losses = model.head_losses(vectors, rois)
    check_losses(losses, TRAIN["fixed"]["losses"], "cls box contrast")
    model.zero_grad()
    sum(losses.values()).backward()
    check_gradients(model, TRAIN["fixed"]["grad_norms"], our_key)
    losses = model(images, [SIZE] * 2, boxes, labels)
    check_losses(losses, TRAIN["e2e"]["losses"], "rpn_cls rpn_box cls box contrast")


SUPCON = golden("supcon")


@pytest.mark.parametrize("weighting", ["none", "linear", "exp"])
@pytest.mark.parametrize("above", [0.3, 0.5, 0.8, 1.5])
def test_contrastive_loss_equals_the_reference(weighting, above):
    raw = torch.from_numpy(array("supcon/feat", (40, 16))).requires_grad_()
    features = F.normalize(raw, dim=1)
    features.retain_grad()
    overlaps = torch.from_numpy(array("supcon/iou", (40,), "uniform"))
    close(overlaps, SUPCON["ious"])
    labels = torch.tensor(SUPCON["labels"])
    loss = 0.5 * contrastive_loss(features, labels, overlaps, above=above, weighting=weighting)
    expected = SUPCON[f"{weighting}_thr{above}"]
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=1e-9)
    norm = expected.get("feat_grad_norm", expected.get("grad_norm"))
    assert np.isclose(features.grad.norm().item(), norm, rtol=1e-4) or np.isclose(
        raw.grad.norm().item(), norm, rtol=1e-4
    )


def test_contrastive_loss_by_hand():
    features = torch.tensor([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0.6, 0.8]])
    labels, overlaps = torch.tensor([0, 0, 1, 2]), torch.tensor([0.9, 0.7, 0.85, 0])
    for above, expected in ((0.5, 0.03559398), (0.8, 0.00449704)):
        loss = contrastive_loss(features, labels, overlaps, above=above)
        assert 0.5 * loss == pytest.approx(expected, rel=1e-5)


def test_the_contrast_is_of_float32_under_autocast():
    torch.manual_seed(0)
    features = F.normalize(torch.randn(9, 16), dim=1)
    loss = partial(contrastive_loss, features, torch.arange(9) % 3, torch.rand(9) + 0.5)
    expected = loss()
    model = FSCE(fpn.fpn("small"), 3, width=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(), expected)
        unit = model.encode(torch.randn(4, 8))
    assert unit.dtype == torch.float32 and torch.allclose(unit.norm(dim=1), torch.ones(4))
