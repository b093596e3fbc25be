"""What is Meta R-CNN's own: prototypes that fold into the classifier, and supports that must be
large enough.
"""

import pytest
import torch

from fewshot import InputError
from fewshot.backbones import trunks
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaDetector, MetaRCNN
from fewshot.detectors.vfa import VFA


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


class Sum(MetaDetector):
    """Aggregates otherwise than Meta R-CNN, so that its prototypes do not fold."""

    def aggregate(self, queries: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return queries + vector


@torch.no_grad()
def test_other_aggregations_take_a_pass_per_class():
    torch.manual_seed(0)
    model = Sum(trunks.c4("small", meta=True), 5).eval()
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


@pytest.mark.parametrize("parent", [MetaRCNN, FSDetView, VFA])
def test_who_tests_all_classes_at_once_is_not_derived_from_to_aggregate_otherwise(parent):
    with pytest.raises(TypeError, match=f"Other .* {parent.__name__} .* derive from MetaDetector"):
        type("Other", (parent,), {"aggregate": Sum.aggregate})
    assert issubclass(type("Named", (parent,), {"name": "x"}), parent)


def test_supports_that_are_too_small():
    model = MetaRCNN(trunks.c4("small", meta=True), 3).eval()
    assert model.support_vectors(torch.zeros(2, 4, 73, 73)).shape == (2, 256)
    with pytest.raises(InputError, match=r"supports of 72 pixels .* --support-size 80"):
        model.support_vectors(torch.zeros(2, 4, 72, 72))
