"""What is FSDetView's own: all classes at once."""

import pytest
import torch

from fewshot.backbones import trunks
from fewshot.detectors.fsdetview import FSDetView


@torch.no_grad()
def test_all_classes_at_once_equal_a_pass_per_class():
    torch.manual_seed(0)
    model = FSDetView(trunks.c4("small", meta=True), 20).eval()
    with pytest.raises(RuntimeError, match="no class has a prototype"):
        model.classify(torch.rand(1, 256))
    d = model.prototypes.shape[1]
    for module in (model.cls, model.reg, model.product.fc, model.difference.fc):
        torch.nn.init.normal_(module.weight, std=d**-0.5)
        torch.nn.init.normal_(module.bias)
    for norm in (model.product.norm, model.difference.norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model.set_prototypes(torch.rand(19, d), torch.arange(19))  # the last class has no support
    queries = torch.rand(30, d)
    logits, deltas = model.classify(queries)
    seen = [model.aggregate(queries, p) for p in model.prototypes[:19]]
    expected = torch.stack([model.cls(x)[:, c] for c, x in enumerate(seen)], 1)
    background = torch.stack([model.cls(x)[:, 20] for x in seen]).mean(0)
    expected = torch.cat([expected, torch.zeros(30, 1), background[:, None]], 1)
    assert torch.allclose(logits, expected, atol=1e-5)
    for c in range(19):
        assert torch.allclose(deltas[:, c], model.reg(seen[c]).view(30, 20, 4)[:, c], atol=1e-5)
    assert logits[:, 19].eq(0).all() and deltas[:, 19].eq(0).all()
