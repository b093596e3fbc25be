"""TFA against the reference's outputs, losses and gradients, and the growing of its box head."""

import copy
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

from fewshot.backbones import fpn
from fewshot.convert.mmfewshot import detector_name
from fewshot.detectors import faster_rcnn, tfa
from fewshot.detectors.tfa import TFA

GOLDEN = golden("tfa")
TEST, TRAIN = GOLDEN["test"], GOLDEN["train"]


our_key = partial(detector_name, method="tfa")


@pytest.fixture(scope="module")
def model() -> TFA:
    trunk = fpn.fpn("resnet50", style="caffe")
    model = TFA(trunk, 20, cosine=True, rois=EVERY, train_proposals=(2000, 50))
    fill(model, GOLDEN["state"], our_key)
    model.rpn.number = EVERY
    return model.eval()


@torch.no_grad()
def test_outputs_and_detections(model):
    query = normalised("query0")[None]
    close(query, TEST["input"])
    check_levels(model.trunk.body(query), TEST["backbone"])
    features = model.trunk(query)
    check_levels(features, TEST["neck"])
    check_rpn(model.rpn, features, TEST)
    fixed = torch.tensor(TEST["fixed_proposals"])
    close(model.roi_features(features, [fixed]), TEST["roi_align"])
    logits, deltas = model.head(model.roi_vectors(features, [fixed]))
    close(logits, TEST["cls_score"])
    close(deltas.flatten(1), TEST["bbox_pred"])
    close(model.cls.weight, TEST["fc_cls_weight_after_forward"])
    check_detections(faster_rcnn.detections(logits, deltas, fixed, SIZE), TEST["det_fixed"])
    (found,) = model.detect(query, [SIZE])
    check_detections(found, TEST["det_e2e"])


def test_losses_and_gradients(model):
    images, boxes, labels = training_batch(TRAIN)
    model.train()
    rois = all_rois(TRAIN, boxes, labels, 20)
    vectors = model.roi_vectors(model.trunk(images), [r.boxes for r in rois])
    losses = model.head_losses(vectors, rois)
    check_losses(losses, TRAIN["fixed"]["losses"], "cls box")
    model.zero_grad()
    sum(losses.values()).backward()
    check_gradients(model, TRAIN["fixed"]["grad_norms"], our_key)

    losses = model(images, [SIZE] * 2, boxes, labels)
    check_losses(losses, TRAIN["e2e"]["losses"], "rpn_cls rpn_box cls box")
    model.zero_grad()
    (losses["rpn_cls"] + losses["rpn_box"]).backward()
    check_gradients(model, TRAIN["e2e"]["rpn_loss_grad_norms"], our_key)


def test_cosines_are_of_float32_under_autocast():
    torch.manual_seed(0)
    classifier, x = tfa.CosineClassifier(32, 5), torch.randn(7, 32)
    same = copy.deepcopy(classifier)  # a call changes the weight
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(x)
    assert torch.equal(logits, same(x))


def test_the_box_head_grows_by_names():
    torch.manual_seed(0)
    trunk = fpn.fpn("small")
    base, novel = TFA(trunk, 2, width=8), TFA(trunk, 1, width=8)
    base.reg.bias.data.normal_()
    novel.reg.bias.data.normal_()
    state, more = base.state_dict(), novel.state_dict()
    classes = ["cat", "dog", "bird"]  # the base classes need not come first
    for novel_state in (None, more):
        grown = tfa.grow(state, ["cat", "bird"], classes, novel_state, ["dog"])
        TFA(trunk, 3, cosine=True, width=8).load_state_dict(grown)
        assert torch.equal(grown["cls.weight"][[0, 2, 3]], state["cls.weight"])  # with background
        weight, bias = grown["reg.weight"].view(3, 4, 8), grown["reg.bias"].view(3, 4)
        assert torch.equal(weight[[0, 2]].flatten(0, 1), state["reg.weight"])
        assert torch.equal(bias[[0, 2]].flatten(), state["reg.bias"])
        if novel_state is None:
            assert 0 < grown["cls.weight"][1].abs().max() < 0.1 and bias[1].eq(0).all()
        else:
            assert torch.equal(grown["cls.weight"][1], more["cls.weight"][0])
            assert torch.equal(bias[1], more["reg.bias"])
    assert torch.equal(grown["fc1.weight"], state["fc1.weight"])
