"""Meta R-CNN and FSDetView against the reference's outputs, losses and gradients, weights given by
the naming rule.
"""

from functools import partial

import pytest
import torch
from detector_goldens import (
    EVERY,
    SIZE,
    all_rois,
    check_all_classes_at_once,
    check_gradients,
    check_losses,
    check_query_path,
    fill,
    normalised,
    support_stack,
    training_batch,
)
from naming_rule import close, golden

from fewshot.backbones import trunks
from fewshot.convert.mmfewshot import detector_name
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaDetector, MetaRCNN

DETECTORS = {"meta_rcnn": MetaRCNN, "meta_rcnn_r101_15": MetaRCNN, "fsdetview": FSDetView}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("meta_rcnn_r101_15", "fsdetview")]


@pytest.fixture(scope="module", params=["meta_rcnn", SLOW[0], "fsdetview"])
def case(request) -> tuple[MetaDetector, dict]:
    """A detector with the reference's weights, and its results: ResNet-50 and 20 classes, or
    ResNet-101 and 15.
    """
    expected = golden(request.param)
    trunk = trunks.c4(f"resnet{expected['depth']}", meta=True, style="caffe")
    model = DETECTORS[request.param](trunk, expected["num_classes"])
    fill(model, expected["state"], named_by(model), own=["prototypes", "known"])
    return model.eval(), expected


def named_by(model: MetaDetector) -> partial:
    """What turns the reference's names of tensors into ours."""
    method = "fsdetview" if isinstance(model, FSDetView) else "meta_rcnn"
    return partial(detector_name, method=method)


@torch.no_grad()
def test_query_path(case):
    model, expected = case[0], case[1]["test"]
    check_query_path(model, expected)


@torch.no_grad()
def test_support_path_and_detections(case):
    model, expected = case[0].eval(), case[1]["test"]
    stack, labels = support_stack(expected["support_order"])
    close(stack, expected["support_input"])
    maps = []
    watch = model.trunk.register_forward_hook(lambda module, given, result: maps.append(result))
    vectors = model.support_vectors(stack)
    watch.remove()
    close(maps[0], expected["support_backbone"][0])
    close(vectors, expected["support_roi_feat"])
    model.set_prototypes(vectors, labels)
    for c, wanted in expected["support_class_feat"].items():
        close(model.prototypes[int(c)][None], wanted)

    query, fixed = normalised("query0")[None], torch.tensor(expected["fixed_proposals"])
    queries = model.roi_vectors(model.trunk(query), [fixed])
    # the head as in training, a class at a time
    for c, wanted in expected["per_support_class"].items():
        aggregated = model.aggregate(queries, model.prototypes[int(c)])
        close(model.cls(aggregated), wanted["cls_score"])
        close(model.reg(aggregated), wanted["bbox_pred"])
    check_all_classes_at_once(model, expected, queries, vectors, labels)


# the next one has all of FSDetView's losses too
@pytest.mark.parametrize("case", ["meta_rcnn", *SLOW], indirect=True, scope="module")
def test_training_losses_and_gradients(case):
    model, train = case[0].train(), case[1]["train"]
    images, truth, labels = training_batch(train)
    stack, support_labels = support_stack([(c, 0) for c in range(model.classes)])
    model.zero_grad()
    rois = all_rois(train, truth, labels, model.classes)
    queries = model.roi_vectors(model.trunk(images), [r.boxes for r in rois])
    queries = queries.split([len(r.boxes) for r in rois])
    drawn = torch.stack([label[0] for label in labels])
    losses = model.head_losses(queries, rois, drawn, model.support_vectors(stack), support_labels)
    check_losses(losses, train["fixed"]["losses"], "cls box meta")
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
    check_losses(losses, train["e2e"]["losses"], "rpn_cls rpn_box cls box meta")
    (losses["rpn_cls"] + losses["rpn_box"]).backward()
    check_gradients(model, train["e2e"]["rpn_loss_grad_norms"], named_by(model))
