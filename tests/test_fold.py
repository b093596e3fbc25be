"""Folding frozen batch norms into convolutions changes no output."""

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from fewshot.backbones import trunks
from fewshot.backbones.fpn import fpn
from fewshot.detectors.build import folded
from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.detectors.tfa import TFA

SIZE = (96, 128)


def with_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Norms as after training: no statistic is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.0, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            for part in (module.bias, module.running_mean):
                part.normal_(0, 0.2, generator=generator)
    return model.eval()


def norms(model: torch.nn.Module) -> int:
    return sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
@torch.no_grad()
def test_trunks(name):
    torch.manual_seed(0)
    trunk = with_statistics(trunks.c4(name, meta=True))
    quick = folded(trunk)
    assert norms(trunk) > 10 and norms(quick) == 0
    images, supports = torch.randn(2, 3, *SIZE), torch.randn(2, 4, 64, 64)
    close(trunk(images), quick(images))
    close(trunk(supports, support=True), quick(supports, support=True))
    rois = torch.randn(3, trunk.out_channels, trunk.roi_size, trunk.roi_size)
    close(trunk.stage4(rois), quick.stage4(rois))


@torch.no_grad()
def test_detections():
    torch.manual_seed(0)
    images = torch.randn(1, 3, *SIZE)
    pyramid = with_statistics(TFA(fpn("resnet50"), 3, test_proposals=(100, 20)))
    query = with_statistics(MetaRCNN(trunks.c4("resnet18", meta=True), 3, test_proposals=(100, 20)))
    query.set_prototypes(torch.rand(3, 512), torch.arange(3))
    for model in (pyramid, query):
        quick = folded(model)
        assert norms(quick) == 0
        (before,), (after,) = model.detect(images, [SIZE]), quick.detect(images, [SIZE])
        assert len(before.scores) and torch.equal(before.labels, after.labels)
        assert torch.allclose(before.scores, after.scores, atol=1e-4)
        assert torch.allclose(before.boxes, after.boxes, atol=1e-2)


def test_what_has_no_frozen_norm_stays_as_it_is():
    trunk = trunks.c4("small")
    quick = folded(trunk)
    assert [n for n, _ in trunk.named_parameters()] == [n for n, _ in quick.named_parameters()]
    with pytest.raises(RuntimeError, match="no convolution"):
        folded(torch.nn.Sequential(torch.nn.ReLU(), FrozenBatchNorm2d(3)))
