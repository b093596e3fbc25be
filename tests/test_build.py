"""Detectors say what they are and can be made anew from it, and they can be compiled."""

import json

import pytest
import torch

import fewshot
from fewshot import InputError, weights
from fewshot.backbones import fpn, trunks
from fewshot.data.transforms import CAFFE_MPSR
from fewshot.detectors import build
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.build import rebuilt
from fewshot.detectors.defrcn import DeFRCN
from fewshot.detectors.fsce import FSCE
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.detectors.mpsr import MPSR
from fewshot.detectors.prototype import PrototypeDetector
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
    about = {**described(model), "classes": ["a", "b", "c"]}
    assert (about["sizes"]["rois"], about["sizes"]["rpn_channels"]) == (7, 16)
    again = rebuilt(detector, about)
    assert described(again) == described(model) and again.trunk.normalisation == CAFFE_MPSR
    again.load_state_dict(model.state_dict())
    changed = rebuilt(detector, about, 5, rois=3, rpn_channels=None)
    assert (changed.classes, changed.rois, changed.rpn.conv.out_channels) == (5, 3, 16)


def described(model):
    """As in a file."""
    return json.loads(json.dumps(model.describe()))


def saved(folder, model, method, **more):
    """A model's file."""
    about = {"method": method, "classes": ["a", "b"], "base": [], "novel": ["a", "b"], "args": {}}
    about |= {**more, **model.describe()}
    weights.save(folder / "model.safetensors", model, about)
    return folder / "model.safetensors"


def test_large_numbers_that_can_be_trained_with_can_be_loaded(tmp_path):
    """`--roi-size 80 --short 5000`."""
    base = TFA(fpn.fpn("small", channels=16), 2, **PYRAMID)
    seen = {"short": 5000, "long": 20_000}
    about = {"method": "tfa", "classes": ["a", "b"], "pictures": seen, **base.describe()}
    model = PrototypeDetector(base, about, 2, roi_size=80)

    again = fewshot.load(saved(tmp_path, model, "prototype_detector", pictures=seen))
    assert described(again.network) == described(model) and again.network.roi_size == 80
    assert again.pipeline.resized(100, 100) == (5000, 5000)


class Scaled(MetaRCNN):
    """A fork's, with one more argument."""

    def __init__(self, trunk, classes, *, scale=1.0, **more):
        super().__init__(trunk, classes, **more)
        self.scale = scale

    def describe(self):
        return {**super().describe(), "scale": self.scale}


def dilated(name, *, dilation=1, **more):
    """A fork's trunk, with one more argument."""
    trunk = trunks.c4(name, **more)
    trunk.layer3[-1].conv2.dilation = trunk.layer3[-1].conv2.padding = (dilation, dilation)
    trunk.architecture["dilation"] = dilation
    return trunk


@pytest.mark.parametrize("detector", [Scaled, TFA])
def test_a_fork_with_one_more_argument_loads_its_own_model(detector, tmp_path, monkeypatch):
    with monkeypatch.context() as fork:
        fork.setattr(build, "c4", dilated)
        fork.setattr(fpn, "c4", dilated)
        if detector is TFA:
            model = TFA(fpn.fpn("small", dilation=2), 2, **PYRAMID)
        else:
            trunk = dilated("small", dilation=2, meta=True)
            model = Scaled(trunk, 2, scale=3.0, **SIZES)
            model.set_prototypes(torch.rand(2, 256), torch.arange(2))
        path = saved(tmp_path, model, "tfa" if detector is TFA else "my_detector")

        again = rebuilt(detector, weights.describe_file(path))
        assert described(again) == described(model) and again.trunk.architecture["dilation"] == 2
        images = torch.rand(1, 3, 64, 64)
        used = fewshot.load(path, model=None if detector is TFA else again).network
        found, expected = used.detect(images, [(64, 64)]), model.eval().detect(images, [(64, 64)])
        assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0]))

    # without what the fork changed
    with pytest.raises(InputError, match=r"model\.safetensors.*unexpected .*'dilation'") as caught:
        rebuilt(detector, weights.describe_file(path))
    assert "damaged" not in str(caught.value)


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
