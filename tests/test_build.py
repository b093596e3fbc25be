"""Detectors say what they are and can be made anew from it, and they can be compiled."""

import json

import pytest
import torch

from fewshot.backbones import fpn, trunks
from fewshot.data.transforms import CAFFE_MPSR
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.build import rebuilt
from fewshot.detectors.defrcn import DeFRCN
from fewshot.detectors.fsce import FSCE
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.detectors.mpsr import MPSR
from fewshot.detectors.tfa import TFA
from fewshot.detectors.vfa import VFA

SIZES = {"rois": 7, "rpn_channels": 16, "train_proposals": (50, 20), "test_proposals": (40, 10)}
PYRAMID = {**SIZES, "width": 24}
DETECTORS = {
    TFA: {**PYRAMID, "cosine": True},
    FSCE: {**PYRAMID, "cosine": True, "threshold": 0.4, "dimensions": 12},
    MPSR: {**PYRAMID, "aligned": False},
    MetaRCNN: SIZES,
    VFA: SIZES,
    DeFRCN: {**SIZES, "roi_size": 5},
    FSDetView: SIZES,
    AttentionRPN: {**SIZES, "relation_channels": 20, "shared_proposals": 9},
}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_round_trip(detector, name):
    trunk = (
        fpn.begin(name, "none")
        if "width" in DETECTORS[detector]
        else trunks.begin(name, "none", meta=True)
    )
    model = detector(trunk, 3, **DETECTORS[detector])
    trunk.normalisation = CAFFE_MPSR
    described = json.loads(json.dumps(model.describe()))
    assert (
        described["sizes"].items()
        >= {k: v for k, v in SIZES.items() if k[-1] != "s" or k == "rois"}.items()
    )
    again = rebuilt(detector, {**described, "classes": ["a", "b", "c"]})
    assert (
        json.loads(json.dumps(again.describe())) == described
        and again.trunk.normalisation == CAFFE_MPSR
    )
    again.load_state_dict(model.state_dict())
    changed = rebuilt(detector, described, 5, rois=3, rpn_channels=None)
    assert (changed.classes, changed.rois, changed.rpn.conv.out_channels) == (5, 3, 16)


@pytest.mark.parametrize("detector", [TFA, MetaRCNN])
def test_compiled_they_compute_the_same(detector):
    torch.manual_seed(0)
    trunk = fpn.begin("small") if detector is TFA else trunks.begin("small", meta=True)
    model = detector(trunk, 2, **SIZES)
    images, boxes = (
        torch.randn(2, 3, 96, 96),
        [torch.tensor([[9.0, 9, 50, 60]]), torch.tensor([[30.0, 20, 80, 70]])],
    )
    batch = images, [(96, 96), (90, 96)], boxes, [torch.tensor([0]), torch.tensor([1])]
    if detector is MetaRCNN:
        batch += torch.rand(2, 4, 96, 96), torch.arange(2)
        model.set_prototypes(torch.rand(2, 256), torch.arange(2))
    results = []
    for forward, detect in (
        (model, model.detect),
        (torch.compile(f, backend="eager") for f in (model, model.detect)),
    ):
        torch.manual_seed(1)
        losses = forward(*batch)
        model.zero_grad()
        sum(losses.values()).backward()
        found = detect(*batch[:2])
        results.append(
            [*losses.values(), *(p.grad for p in model.parameters()), *found[0], *found[1]]
        )
    assert len(results[0][-3]) and all(map(torch.equal, *results))
