"""FEAT's head against the official implementation's numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming_rule import array, close, fill, golden
from runs import load
from torch import Tensor

from fewshot import InputError
from fewshot.heads.feat import FEAT

GOLDENS = golden("cls_feat")
NAMES = {"w_qs": "query", "w_ks": "key", "w_vs": "value", "layer_norm": "norm", "fc": "fc"}


def our_name(key: str) -> str:
    _, layer, kind = key.split(".")
    return f"adapt.{NAMES[layer]}.{kind}"


def head_and_task(case: dict) -> tuple[FEAT, Tensor, Tensor]:
    """The golden's head, its supports (1, ways * shots, D) and its queries (1, ways * queries, D)."""
    tag, ways, d = case["tag"], case["ways"], case["dim"]
    centres = np.float32(case["separation"]) * array(f"{tag}/centre", (ways, d))[:, None]
    many = {"support": case["shots"], "query": case["queries_per_class"]}
    parts = [
        np.maximum(centres + array(f"{tag}/{part}", (ways, n, d)), 0).reshape(1, -1, d)
        for part, n in many.items()
    ]
    support, query = (torch.from_numpy(x).requires_grad_() for x in parts)
    close(support[0], case["support"], 1e-6)
    close(query[0], case["query"], 1e-6)
    head = FEAT(d, case["temperature"], case["temperature2"], case["distance"])
    fill(head, case["state"], our_name)
    return head, support, query


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_official_one(name):
    case = GOLDENS[name]
    head, support, query = head_and_task(case)
    head.eval()
    means = support.unflatten(1, (case["ways"], -1)).mean(2)
    close(head.adapt.attention(means)[0], case["attention"], 1e-6)
    close(head.adapt(means)[0], case["adapted"], 2e-6)
    close(head(support, query, case["ways"])[0], case["logits"], 2e-6)


@pytest.mark.parametrize("name", GOLDENS)
def test_training_losses_and_gradients_equal_the_official_ones(name):
    case, stored = GOLDENS[name], GOLDENS[name]["train_no_dropout"]
    head, support, query = head_and_task(case)
    head.adapt.dropout.p = head.adapt.attention_dropout.p = 0.0
    ways, n = case["ways"], case["shots"] + case["queries_per_class"]
    labels = torch.arange(ways).repeat_interleave(case["queries_per_class"])
    cross_entropy = F.cross_entropy(head(support, query, ways)[0], labels)
    logits, labels = head.auxiliary(support, query, ways)
    auxiliary = F.cross_entropy(logits[0], labels)
    # the official rows are instance 0 of every class, then instance 1, ...
    close(
        logits[0].unflatten(0, (ways, n)).transpose(0, 1).flatten(0, 1),
        stored["auxiliary_logits"],
        1e-5,
    )
    loss = cross_entropy + case["balance"] * auxiliary
    for value, key in ((cross_entropy, "cross_entropy"), (auxiliary, "auxiliary"), (loss, "loss")):
        assert value.item() == pytest.approx(stored[key], rel=2e-6)
    loss.backward()
    assert support.grad.norm().item() == pytest.approx(stored["grad_norm_support"], rel=1e-4)
    assert query.grad.norm().item() == pytest.approx(stored["grad_norm_query"], rel=1e-4)
    ours = dict(head.named_parameters())
    for key, norm in stored["grad_norm_params"].items():
        assert ours[our_name(key)].grad.norm().item() == pytest.approx(norm, rel=1e-4)


def test_sets_have_no_order_and_tasks_no_neighbours():
    torch.manual_seed(0)
    head = FEAT(16).eval()
    support, query = torch.randn(3, 5 * 2, 16), torch.randn(3, 7, 16)
    logits = head(support, query, 5)
    classes = torch.tensor([3, 0, 4, 1, 2])
    renamed = support.unflatten(1, (5, 2))[:, classes].flatten(1, 2)
    assert torch.allclose(head(renamed, query, 5), logits[..., classes], atol=1e-5)
    assert torch.allclose(head(support[1:2], query[1:2], 5), logits[1:2], atol=1e-5)
    assert torch.equal(head(support, query[:, 2:3], 5).argmax(2), logits[:, 2:3].argmax(2))
    # a class's prototype depends on the other classes
    assert not torch.allclose(head(support[:, :8], query, 4), logits[..., :4], atol=1e-3)


def test_starts_as_the_official_one_and_drops_out_in_training():
    torch.manual_seed(0)
    head = FEAT(400)
    for linear in (head.adapt.query, head.adapt.key, head.adapt.value):
        assert (
            linear.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
            and linear.bias is None
        )
    assert head.adapt.fc.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert head.adapt.attention_dropout.p == 0.1 and head.adapt.dropout.p == 0.5
    support, query = torch.randn(1, 5, 400), torch.randn(1, 4, 400)
    assert not torch.equal(head(support, query, 5), head(support, query, 5))
    head.eval()
    assert torch.equal(head(support, query, 5), head(support, query, 5))


def test_what_cannot_be():
    with pytest.raises(InputError, match="no distance is called 'manhattan'"):
        FEAT(8, distance="manhattan")


def test_settings_are_the_published_ones():
    recipe = load("feat")
    published, table = recipe.published, recipe.PUBLISHED
    assert published("conv4", "cub", 1)[:3] == (64, 16, 1.0)
    assert published("conv4", "tiered_imagenet", 5)[:3] == (32, 64, 0.1)
    assert published("resnet18", "glyphs", 3) is table["resnet12", 5]
    assert published("resnet12", "tiered_imagenet", 1) is table["tiered_imagenet", 1]
    for (kind, shots), setting in table.items():
        every = 2000 if kind == "conv4" or (kind, shots) == ("tiered_imagenet", 1) else 4000
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=setting.schedule.lr)
        scheduler = setting.schedule.of(optimizer)
        rates = [scheduler.lr_lambdas[0](t) for t in (0, every - 1, every, 2 * every, 19_999)]
        assert rates == [1, 1, 0.5, 0.25, 0.5 ** (20_000 // every - 1)]
