"""Meta R-CNN against the reference's outputs, losses and gradients, weights given by the naming rule."""

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
    support_stack,
    training_batch,
)
from naming_rule import close, golden

from fewshot import InputError, trunks
from fewshot.detectors import faster_rcnn
from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.mmfewshot import detector_name

our_key = partial(detector_name, method="meta_rcnn")


@pytest.fixture(scope="module", params=["meta_rcnn", pytest.param("meta_rcnn_r101_15", marks=pytest.mark.slow)])
def case(request) -> tuple[MetaRCNN, dict]:
    """A detector with the reference's weights, and its results: ResNet-50 and 20 classes, ResNet-101 and 15."""
    expected = golden(request.param)
    trunk = trunks.c4(f"resnet{expected['depth']}", meta=True, style="caffe")
    model = MetaRCNN(trunk, expected["num_classes"])
    fill(model, expected["state"], our_key, own=["prototypes", "known"])
    return model.eval(), expected


@torch.no_grad()
def test_query_path(case):
    model, expected = case[0], case[1]["test"]
    query = normalised("query0")[None]
    close(query, expected["input"])
    features = model.trunk(query)
    close(features, expected["backbone"][0])
    check_rpn(model.rpn, [features], expected)
    fixed = torch.tensor(expected["fixed_proposals"])
    close(faster_rcnn.roi_align(features, [fixed], 14, 16), expected["roi_align"])
    close(model.roi_vectors(features, [fixed]), expected["roi_shared_head"])


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
    for c, wanted in expected["per_support_class"].items():  # the head as in training, a class at a time
        aggregated = model.aggregate(queries, model.prototypes[int(c)])
        close(model.cls(aggregated), wanted["cls_score"])
        close(model.reg(aggregated), wanted["bbox_pred"])
    logits, deltas = model.classify(queries)  # all classes at once
    assert torch.allclose(logits, torch.tensor(expected["merged_cls_score"]), atol=1e-4)
    close(deltas.flatten(1), expected["merged_bbox_pred"])
    check_detections(faster_rcnn.detections(logits, deltas, fixed, SIZE, nms=0.3), expected["det_fixed"])
    (found,) = model.detect(query, [SIZE])
    check_detections(found, expected["det_e2e"])

    some = torch.isin(labels, torch.tensor([1, 4, 7]))
    model.set_prototypes(vectors[some], labels[some])
    assert model.known.nonzero()[:, 0].tolist() == [1, 4, 7]
    logits, deltas = model.classify(queries)
    close(logits, expected["merged_cls_score_supports_only_1_4_7"])
    found = faster_rcnn.detections(logits, deltas, fixed, SIZE, nms=0.3)
    check_detections(found, expected["det_fixed_supports_only_1_4_7"])


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
    queries = model.roi_vectors(features, [r.boxes for r in rois]).split([len(r.boxes) for r in rois])
    drawn = torch.stack([label[0] for label in labels])
    losses = model.head_losses(queries, rois, drawn, model.support_vectors(stack), support_labels)
    for ours, theirs in (("cls", "loss_cls"), ("box", "loss_bbox"), ("meta", "loss_meta_cls")):
        assert losses[ours].item() == pytest.approx(train["fixed"]["losses"][theirs], rel=1e-4)
    sum(losses.values()).backward()
    check_gradients(model, train["fixed"]["grad_norms"], our_key)


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
    check_gradients(model, train["e2e"]["rpn_loss_grad_norms"], our_key)


@torch.no_grad()
def test_folded_classifier_equals_a_pass_per_class():
    torch.manual_seed(0)
    model = MetaRCNN(trunks.c4("small", meta=True), 80).eval()
    d = model.prototypes.shape[1]
    torch.nn.init.normal_(model.cls.weight)
    torch.nn.init.normal_(model.reg.weight)
    torch.nn.init.normal_(model.cls.bias)
    model.set_prototypes(torch.rand(160, d), torch.arange(160) % 80)
    queries = torch.randn(30, d)
    logits, deltas = model.classify(queries)
    passes = [model.cls(queries * p) for p in model.prototypes]
    for c in range(80):
        assert torch.allclose(logits[:, c], passes[c][:, c], atol=1e-4)
        wanted = model.reg(queries * model.prototypes[c]).view(30, 80, 4)[:, c]
        assert torch.allclose(deltas[:, c], wanted, atol=1e-4)
    assert torch.allclose(logits[:, 80], torch.stack(passes)[..., 80].mean(0), atol=1e-4)


class Sum(MetaRCNN):
    """Aggregates otherwise than Meta R-CNN, so that its prototypes do not fold."""

    def aggregate(self, queries: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return queries + vector


@torch.no_grad()
def test_other_aggregations_take_a_pass_per_class():
    torch.manual_seed(0)
    model = Sum(trunks.c4("small", meta=True), 5).eval()
    assert MetaRCNN(trunks.c4("small", meta=True), 5).folds and not model.folds
    torch.nn.init.normal_(model.cls.weight)
    torch.nn.init.normal_(model.reg.weight)
    d = model.prototypes.shape[1]
    model.set_prototypes(torch.rand(4, d), torch.tensor([0, 1, 3, 4]))
    queries = torch.randn(9, d)
    logits, deltas = model.classify(queries)
    background = []
    for c in (0, 1, 3, 4):
        seen = queries + model.prototypes[c]
        assert torch.allclose(logits[:, c], model.cls(seen)[:, c], atol=1e-5)
        assert torch.allclose(deltas[:, c], model.reg(seen).view(9, 5, 4)[:, c], atol=1e-5)
        background.append(model.cls(seen)[:, 5])
    assert torch.allclose(logits[:, 5], torch.stack(background).mean(0), atol=1e-5)
    assert logits[:, 2].eq(0).all() and deltas[:, 2].eq(0).all()


def test_supports_that_are_too_small():
    model = MetaRCNN(trunks.c4("small", meta=True), 3).eval()
    assert model.support_vectors(torch.zeros(2, 4, 73, 73)).shape == (2, 256)
    with pytest.raises(InputError, match=r"supports of 72 pixels .* --support-size 80"):
        model.support_vectors(torch.zeros(2, 4, 72, 72))
