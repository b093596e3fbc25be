"""Attention-RPN against the reference's outputs, losses and gradients, weights given by the naming
rule.
"""

from functools import partial

import pytest
import torch
from detector_goldens import (
    EVERY,
    SIZE,
    check_gradients,
    check_proposals,
    fill,
    normalised,
    training_batch,
)
from naming_rule import boxes, close, golden

from fewshot.backbones import trunks
from fewshot.convert.mmfewshot import detector_name
from fewshot.data.detection import Detections
from fewshot.detectors import faster_rcnn
from fewshot.detectors.attention_rpn import AttentionRPN

our_key = partial(detector_name, method="attention_rpn")


def support(c: int, s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's support picture (3, 320, 320) of class c, shot s, and its box (4,)."""
    box = boxes(f"supbox_c{c}_s{s}", 1, 320, 320, lo=96, hi=0.9)[0]
    return normalised(f"support_c{c}_s{s}", 320, 320), torch.as_tensor(box, dtype=torch.float32)


@pytest.fixture(scope="module")
def case() -> tuple[AttentionRPN, dict]:
    """A detector with the reference's weights, and its results."""
    expected = golden("attention_rpn")
    trunk = trunks.c4(f"resnet{expected['depth']}", style="caffe")
    model = AttentionRPN(trunk, expected["num_classes"])
    fill(model, expected["state"], our_key, own=["kernels", "maps", "known"])
    return model.eval(), expected


@torch.no_grad()
def test_query_path_supports_and_detections(case):
    model, expected = case[0].eval(), case[1]["test"]
    query = normalised("query0")[None]
    close(query, expected["input"])
    features = model.trunk(query)
    close(features, expected["backbone"][0])
    fixed = torch.tensor(expected["fixed_proposals"])
    aligned, maps = model.roi_maps(features, [fixed])
    close(aligned, expected["roi_align"])
    close(maps, expected["roi_shared_head"])

    pictures, places = map(torch.stack, zip(*(support(c, s) for c, s in expected["support_order"])))
    close(pictures, expected["support_input"])
    aligned, shown = model.roi_maps(model.trunk(pictures), list(places[:, None]))
    close(aligned, expected["support_res4_roi"])
    close(shown, expected["support_res5_roi"])
    labels = torch.tensor([c for c, _ in expected["support_order"]])
    kernels, shown = model.support_features(pictures, places)
    model.set_prototypes(
        [(kernels[:3], shown[:3], labels[:3]), (kernels[3:], shown[3:], labels[3:])]
    )
    assert model.known.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]

    queries, found = model.relation.query_parts(maps), []
    for c, wanted in expected["per_support_class"].items():
        c = int(c)
        close(model.kernels[c].view(1, -1, 1, 1), wanted["res4_mean"])
        close(model.maps[c][None], wanted["res5_mean"])
        close(features * model.kernels[c].view(1, -1, 1, 1), wanted["rpn_correlation"])
        ((cls, reg),) = model.attended(features, model.kernels[c][None])
        close(cls, wanted["rpn_cls"][0])
        close(reg, wanted["rpn_reg"][0])
        (proposals,) = model.proposals(features, SIZE, torch.tensor([c]))
        check_proposals(proposals, wanted["rpn_proposals"])
        logits, deltas = model.relation(queries, model.relation.support_parts(model.maps[c][None]))
        close(logits, wanted["cls_score"])
        close(deltas, wanted["bbox_pred"])
        found.append(faster_rcnn.detections(logits, deltas[:, None], fixed, SIZE))
    check_per_class(found, expected["det_fixed"])
    (whole,) = model.detect(query, [SIZE])
    check_per_class(
        [Detections(*(column[whole.labels == c] for column in whole)) for c in range(5)],
        expected["det_e2e"],
    )


def check_per_class(found: list[Detections], expected: dict) -> None:
    """Each class's detections; of all together the best are equal."""
    assert [len(d.scores) for d in found] == expected["per_class"][: len(found)]
    scores, labels = (
        torch.cat([d.scores for d in found]),
        [i for i, d in enumerate(found) for _ in d.scores],
    )
    wanted = torch.tensor(expected["top"])
    order = scores.sort(descending=True, stable=True).indices[: len(wanted)]
    assert torch.allclose(scores[order], wanted[:, 1], atol=1e-4)
    assert [labels[i] for i in order] == wanted[:, 0].int().tolist()
    assert torch.allclose(torch.cat([d.boxes for d in found])[order], wanted[:, 2:], atol=0.05)


def training_supports(order: list) -> tuple[torch.Tensor, torch.Tensor]:
    """(2 images, 2 ways, 3 shots, ...) of the reference's [image, pos or neg, class, shot]."""
    pictures, places = map(torch.stack, zip(*(support(c, s) for _, _, c, s in order)))
    return pictures.view(2, 2, 3, *pictures.shape[1:]), places.view(2, 2, 3, 4)


def test_training_losses_and_gradients(case):
    model, train = case[0].train(), case[1]["train"]
    images, truth, _ = training_batch(train)
    close(images, train["input"])
    pictures, places = training_supports(train["support_order"])
    model.zero_grad()
    features, negative = model.trunk(images), [False, False, True, True]
    _, shown = model.support_features(pictures.flatten(0, 2), places.flatten(0, 2))
    shown = shown.unflatten(0, (2, 2, 3)).mean(2).transpose(0, 1).flatten(0, 1)
    proposals, truth = [torch.tensor(p) for p in train["fixed_proposals"]] * 2, truth * 2
    labels = [torch.zeros(len(t), dtype=torch.int64) for t in truth]
    rois = faster_rcnn.sample_rois(proposals, truth, labels, classes=1, number=EVERY, fraction=0.5)
    counts = [[len(r.deltas), len(r.boxes) - len(r.deltas)] for r in rois]
    assert counts == train["fixed"]["samples_pos_neg"]
    _, queries = model.roi_maps(features[[0, 1, 0, 1]], [r.boxes for r in rois])
    losses = model.head_losses(queries, shown, rois, negative)
    for ours, theirs in (("cls", "loss_cls"), ("box", "loss_bbox")):
        assert losses[ours].item() == pytest.approx(train["fixed"]["losses"][theirs], rel=1e-4)
    sum(losses.values()).backward()
    check_gradients(model, train["fixed"]["grad_norms"], our_key)


def test_whole_training_step(case):
    model, train = case[0].train(), case[1]["train"]
    images, truth, _ = training_batch(train)
    pictures, places = training_supports(train["support_order"])
    model.zero_grad()
    model.rois = model.rpn.number = EVERY
    model.rpn.train_proposals = (12000, 50)
    losses = model(images, [SIZE, SIZE], truth, pictures, places)
    expected = train["e2e"]["losses"]
    for ours, theirs in (("rpn_cls", "loss_rpn_cls"), ("rpn_box", "loss_rpn_bbox")):
        assert losses[ours].item() == pytest.approx(expected[theirs][0], rel=1e-4)
    for ours, theirs in (("cls", "loss_cls"), ("box", "loss_bbox")):
        assert losses[ours].item() == pytest.approx(expected[theirs], rel=1e-4)
    (losses["rpn_cls"] + losses["rpn_box"]).backward()
    check_gradients(model, train["e2e"]["rpn_loss_grad_norms"], our_key)
