"""Meta R-CNN and FSDetView against the reference's outputs, losses and gradients, weights given by
the naming rule.
"""

from functools import partial

import pytest
import torch
from detector_goldens import (
    EVERY,
    SIZE,
    check_all_classes_at_once,
    check_gradients,
    check_query_path,
    fill,
    normalised,
    support_stack,
    training_batch,
)
from naming_rule import close, golden

from fewshot.backbones import trunks
from fewshot.convert.mmfewshot import detector_name
from fewshot.detectors import faster_rcnn
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaRCNN

DETECTORS = {"meta_rcnn": MetaRCNN, "meta_rcnn_r101_15": MetaRCNN, "fsdetview": FSDetView}


@pytest.fixture(
    scope="module",
    params=["meta_rcnn", pytest.param("meta_rcnn_r101_15", marks=pytest.mark.slow), "fsdetview"],
)
def case(request) -> tuple[MetaRCNN, dict]:
    """A detector with the reference's weights, and its results: ResNet-50 and 20 classes, or
    ResNet-101 and 15.
    """
    expected = golden(request.param)
    trunk = trunks.c4(f"resnet{expected['depth']}", meta=True, style="caffe")
    model = DETECTORS[request.param](trunk, expected["num_classes"])
    fill(model, expected["state"], named_by(model), own=["prototypes", "known"])
    return model.eval(), expected


def named_by(model: MetaRCNN) -> partial:
    """What turns the reference's names of tensors into ours."""
    return partial(
        detector_name, method="fsdetview" if isinstance(model, FSDetView) else "meta_rcnn"
    )


@torch.no_grad()
def test_query_path(case):
    model, expected = case[0], case[1]["test"]
    check_query_path(model, expected)


@torch.no_grad()
def test_support_path_and_detections(case):
    model, expected = case[0].eval(), case[1]["test"]
    stack, labels = support_stack(expected["support_order"])
    close(stack, expected["support_input"])
    close(model.trunk(stack, support=True), expected["support_backbone"][0])
    vectors = model.support_vectors(stack)
    close(vectors, expected["support_roi_feat"])
    model.set_prototypes(vectors, labels)
    for c, wanted in expected["support_class_feat"].items():
        close(model.prototypes[int(c)][None], wanted)

    query, fixed = normalised("query0")[None], torch.tensor(expected["fixed_proposals"])
    queries = model.roi_vectors(model.trunk(query), [fixed])
    for c, wanted in expected[
        "per_support_class"
    ].items():  # the head as in training, a class at a time
        aggregated = model.aggregate(queries, model.prototypes[int(c)])
        close(model.cls(aggregated), wanted["cls_score"])
        close(model.reg(aggregated), wanted["bbox_pred"])
    check_all_classes_at_once(model, expected, queries, vectors, labels)


def test_training_losses_and_gradients(case):
    model, train = case[0].train(), case[1]["train"]
    classes = model.classes
    images, truth, labels = training_batch(train)
    stack, support_labels = support_stack([(c, 0) for c in range(classes)])
    model.zero_grad()
    features = model.trunk(images)
    proposals = [torch.tensor(p) for p in train["fixed_proposals"]]
    rois = faster_rcnn.sample_rois(proposals, truth, labels, classes=classes, number=EVERY)
    counts = [[len(r.deltas), len(r.boxes) - len(r.deltas)] for r in rois]
    assert counts == train["fixed"]["samples_pos_neg"]
    queries = model.roi_vectors(features, [r.boxes for r in rois]).split(
        [len(r.boxes) for r in rois]
    )
    drawn = torch.stack([label[0] for label in labels])
    losses = model.head_losses(queries, rois, drawn, model.support_vectors(stack), support_labels)
    for ours, theirs in (("cls", "loss_cls"), ("box", "loss_bbox"), ("meta", "loss_meta_cls")):
        assert losses[ours].item() == pytest.approx(train["fixed"]["losses"][theirs], rel=1e-4)
    sum(losses.values()).backward()
    check_gradients(model, train["fixed"]["grad_norms"], named_by(model))
    norms = train["fixed"]["aggregator_bn_after"] if isinstance(model, FSDetView) else {}
    for key, value in norms.items():  # statistics of one image after the other
        close(model.get_buffer(named_by(model)(key)), value)


def test_whole_training_step(case):
    model, train = case[0].train(), case[1]["train"]
    images, truth, labels = training_batch(train)
    stack, support_labels = support_stack([(c, 0) for c in range(model.classes)])
    model.zero_grad()
    model.rois = model.rpn.number = EVERY
    model.rpn.train_proposals = (12000, 50)
    losses = model(images, [SIZE, SIZE], truth, labels, stack, support_labels)
    expected = train["e2e"]["losses"]
    for ours, theirs in (("rpn_cls", "loss_rpn_cls"), ("rpn_box", "loss_rpn_bbox")):
        assert losses[ours].item() == pytest.approx(expected[theirs][0], rel=1e-4)
    for ours, theirs in (("cls", "loss_cls"), ("box", "loss_bbox"), ("meta", "loss_meta_cls")):
        assert losses[ours].item() == pytest.approx(expected[theirs], rel=1e-4)
    (losses["rpn_cls"] + losses["rpn_box"]).backward()
    check_gradients(model, train["e2e"]["rpn_loss_grad_norms"], named_by(model))
