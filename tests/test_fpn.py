"""Feature pyramids on every trunk; that they equal the reference's is tested with the detectors
that have them.
"""

import pytest
import torch
import torch.nn.functional as F

from fewshot import InputError
from fewshot.backbones.fpn import begin, fpn
from fewshot.backbones.trunks import TRUNKS


@pytest.mark.parametrize("name", TRUNKS)
def test_levels_halve_and_have_the_strides_they_say(name):
    torch.manual_seed(0)
    net = fpn(name, channels=16).eval()
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 130, 197))  # sides that nothing divides
    assert len(maps) == len(net.strides) and all(m.shape[1] == net.out_channels == 16 for m in maps)
    for level, stride in zip(maps, net.strides):
        assert level.shape[-2:] == (-(-130 // stride), -(-197 // stride))
    assert begin(name, "none", channels=16).strides == net.strides
    again = fpn(**net.architecture).eval()
    again.load_state_dict(net.state_dict())
    assert again.strides == net.strides and again.anchor_scales == net.anchor_scales


@torch.no_grad()
def test_coarse_levels_are_added_to_finer_ones():
    torch.manual_seed(0)
    net = fpn("small", channels=8).eval()
    images = torch.randn(1, 3, 96, 96)
    fine, middle, coarse = (lateral(x) for lateral, x in zip(net.lateral, net.body(images)))
    middle = middle + F.interpolate(coarse, scale_factor=2)
    fine = fine + F.interpolate(middle, scale_factor=2)
    for level, merged, output in zip(net(images), (fine, middle, coarse), net.output):
        assert torch.allclose(level, output(merged), atol=1e-5)


def test_freezing():
    net = fpn("small")
    net.freeze(1)
    frozen = {
        name.split(".")[0] + name.split(".")[1] * name.startswith("stages")
        for name, p in net.named_parameters()
        if not p.requires_grad
    }
    assert frozen == {"conv1", "bn1", "stages0"}
    with pytest.raises(InputError, match="3 stages"):
        net.freeze(4)
    for pretrained in (False, True):
        net = fpn("small", pretrained=pretrained)
        net.freeze_pretrained(1)
        assert all(p.requires_grad != pretrained for p in net.stages[0].parameters())
