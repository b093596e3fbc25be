"""Attention-RPN against the reference's outputs, losses and gradients, weights given by the naming
rule.
"""

from functools import partial

import numpy as np
import pytest
import torch
from detector_goldens import (
    EVERY,
    SIZE,
    all_rois,
    check_gradients,
    check_losses,
    check_proposals,
    fill,
    normalised,
    training_batch,
)
from naming_rule import boxes, close, golden
from torch import Tensor

from fewshot.backbones import trunks
from fewshot.convert.mmfewshot import detector_name
from fewshot.data.detection import Detections
from fewshot.detectors import faster_rcnn
from fewshot.detectors.attention_rpn import AttentionRPN

our_key = partial(detector_name, method="attention_rpn")


def supports(order: list) -> tuple[Tensor, Tensor]:
    """The reference's support pictures (n, 3, 320, 320) of [.., class, shot], and a box (n, 4) of
    each.
    """
    names = [f"c{c}_s{s}" for *_, c, s in order]
    places = [boxes(f"supbox_{name}", 1, 320, 320, lo=96, hi=0.9)[0] for name in names]
    pictures = [normalised(f"support_{name}", 320, 320) for name in names]
    return torch.stack(pictures), torch.tensor(np.array(places), dtype=torch.float32)


@pytest.fixture(scope="module")
def case() -> tuple[AttentionRPN, dict]:
    """A detector with the reference's weights, and its results."""
    expected = golden("attention_rpn")
    trunk = trunks.c4(f"resnet{expected['depth']}", style="caffe")
    model = AttentionRPN(trunk, expected["num_classes"])
    fill(model, expected["state"], our_key, own=["kernels", "maps", "known"])
    return model.eval(), expected


@torch.no_grad()
def test_query_path_supports_and_detections(case, monkeypatch):
    model, expected = case[0].eval(), case[1]["test"]
    query = normalised("query0")[None]
    close(query, expected["input"])
    features = model.trunk(query)
    close(features, expected["backbone"][0])
    fixed = torch.tensor(expected["fixed_proposals"])
    aligned, maps = model.roi_maps(features, [fixed])
    close(aligned, expected["roi_align"])
    close(maps, expected["roi_shared_head"])

    pictures, places = supports(expected["support_order"])
    close(pictures, expected["support_input"])
    whole, seen = model.roi_maps, []
    monkeypatch.setattr(model, "roi_maps", lambda *given: seen.append(whole(*given)) or seen[-1])
    kernels, shown = model.support_features(pictures, places)
    close(seen[0][0], expected["support_res4_roi"])
    close(shown, expected["support_res5_roi"])
    labels = torch.tensor([c for c, _ in expected["support_order"]])
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


@pytest.mark.slow  # the next one has all losses, and the RPN's gradients
def test_training_losses_and_gradients(case):
    model, train = case[0].train(), case[1]["train"]
    images, truth, _ = training_batch(train)
    close(images, train["input"])
    pictures, places = supports(train["support_order"])
    model.zero_grad()
    features, negative = model.trunk(images), [False, False, True, True]
    _, shown = model.support_features(pictures, places)
    # of 2 images, 2 ways, 3 shots
    shown = shown.unflatten(0, (2, 2, 3)).mean(2).transpose(0, 1).flatten(0, 1)
    labels = [torch.zeros(len(t), dtype=torch.int64) for t in truth]
    rois = all_rois(train, truth * 2, labels * 2, 1, fraction=0.5)
    _, queries = model.roi_maps(features[[0, 1, 0, 1]], [r.boxes for r in rois])
    losses = model.head_losses(queries, shown, rois, negative)
    check_losses(losses, train["fixed"]["losses"], "cls box")
    sum(losses.values()).backward()
    check_gradients(model, train["fixed"]["grad_norms"], our_key)


def test_whole_training_step(case):
    model, train = case[0].train(), case[1]["train"]
    images, truth, _ = training_batch(train)
    pictures, places = supports(train["support_order"])
    pictures, places = (x.unflatten(0, (2, 2, 3)) for x in (pictures, places))
    model.zero_grad()
    model.rois = model.rpn.number = EVERY
    model.rpn.train_proposals = (12000, 50)
    losses = model(images, [SIZE, SIZE], truth, pictures, places)
    check_losses(losses, train["e2e"]["losses"], "rpn_cls rpn_box cls box")
    (losses["rpn_cls"] + losses["rpn_box"]).backward()
    check_gradients(model, train["e2e"]["rpn_loss_grad_norms"], our_key)
