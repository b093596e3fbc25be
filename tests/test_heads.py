"""Classification heads against the reference's outputs and plain versions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming_rule import array, close, fill, golden
from torch import Tensor

from fewshot import InputError, heads
from fewshot.convert.mmfewshot import head_name

EPISODES = {
    "vec": (128,),
    "map19": (64, 19, 19),
    "map5": (64, 5, 5),
}  # kinds of features -> their shapes
WAYS = 5


def wave(*shape: int, start: float) -> Tensor:
    """The specification's test tensor: element i, in the order of memory, is sin(start + 0.37 i)."""
    return torch.sin(start + 0.37 * torch.arange(torch.Size(shape).numel())).view(shape)


def episode(case: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Supports (1, 5 * shots, ...), queries (1, 5 * n, ...) and the queries' labels (5 * n,) of a
    golden case.
    """
    tag = case["episode"]
    shape = EPISODES[tag.split("_")[1]]
    centre = array(f"{tag}/centre", (WAYS, *shape))[:, None]

    def features(part: str, n: int) -> Tensor:
        noisy = 0.5 * centre + array(f"{tag}/{part}", (WAYS, n, *shape))
        scaled = np.maximum(noisy, 0) * np.float32(case["feature_scale"])
        return torch.from_numpy(scaled.reshape(1, WAYS * n, *shape)).requires_grad_()

    n = case["queries_per_class"]
    return (
        features("support", int(tag[-1])),
        features("query", n),
        torch.arange(WAYS).repeat_interleave(n),
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[0], labels)


def log_likelihood(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(log_probabilities[0], labels)


def relation_mse(scores: Tensor, labels: Tensor) -> Tensor:
    return heads.relation_mse(scores[0], labels)


METHODS = {  # golden method -> how to make its head, its loss
    "proto_net": (
        lambda: lambda s, q, ways: heads.prototype(s, q, ways, "euclidean"),
        cross_entropy,
    ),
    "matching_net": (lambda: heads.matching, log_likelihood),
    "meta_baseline": (heads.MetaBaseline, cross_entropy),
    "relation_net": (lambda: heads.RelationHead(64, 19), cross_entropy),
    "relation_net_mse": (lambda: heads.RelationHead(64, 19), relation_mse),
    "relation_net_5x5": (lambda: heads.RelationHead(64, 5), cross_entropy),
}


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("method", METHODS)
def test_metric_heads_equal_the_reference(method, shots):
    stored = golden("cls_metric_heads")[f"{method}_5way_{shots}shot"]
    support, query, labels = episode(stored)
    close(support[0], stored["support"], 1e-5)
    close(query[0], stored["query"], 1e-5)
    make, loss_of = METHODS[method]
    head = make()
    parameters = {}
    if isinstance(head, torch.nn.Module):
        fill(head, stored["state"], head_name, prefix="head.")
        parameters = dict(head.named_parameters())
        head.eval()
    logits = head(support, query, WAYS)
    assert loss_of(logits, labels).item() == pytest.approx(stored["eval_mode_loss"], rel=1e-5)
    probabilities = (
        logits.exp() if method == "matching_net" else logits
    )  # the reference's second softmax
    close(probabilities[0].softmax(1), stored["query_prob_eval"], 1e-5)

    if parameters:
        head.train()
    logits = head(support, query, WAYS)
    loss = loss_of(logits, labels)
    assert loss.item() == pytest.approx(stored["train_loss"], rel=1e-5)
    if "query_prob_bn_train_mode" in stored:
        close(logits[0].softmax(1), stored["query_prob_bn_train_mode"], 1e-5)
    loss.backward()
    assert support.grad.norm().item() == pytest.approx(stored["grad_norm_support"], rel=2e-3)
    assert query.grad.norm().item() == pytest.approx(stored["grad_norm_query"], rel=2e-3)
    for key, norm in stored["grad_norm_params"].items():
        if norm > 1e-5:  # less is rounding of a true 0
            assert parameters[head_name(key)].grad.norm().item() == pytest.approx(norm, rel=2e-3), (
                key
            )


CLASS_MAJOR = [1, 4, 0, 3, 2, 5]  # the specification's supports are of classes 1, 0, 2, 1, 0, 2


@pytest.mark.parametrize(
    ("head", "loss_of", "loss", "first"),
    [
        (
            lambda s, q: heads.prototype(s, q, 3, "euclidean"),
            cross_entropy,
            1.462950,
            [0.151914, 0.418330, 0.429757],
        ),
        (
            lambda s, q: heads.matching(s, q, 3),
            log_likelihood,
            45.067341,
            [0.274069, 0.451863, 0.274069],
        ),
        (lambda s, q: heads.matching(s, q, 3, temperature=5), log_likelihood, 3.076920, None),
        (
            lambda s, q: heads.MetaBaseline()(s, q, 3),
            cross_entropy,
            13.936638,
            [0, 0.385952, 0.614048],
        ),
    ],
    ids=["prototype", "matching", "matching T=5", "meta_baseline"],
)
@torch.no_grad()
def test_metric_heads_equal_the_specification(head, loss_of, loss, first):
    support, query = wave(6, 8, start=1)[CLASS_MAJOR], wave(3, 8, start=2)
    logits = head(support[None], query[None])
    assert loss_of(logits, torch.tensor([0, 2, 1])).item() == pytest.approx(loss, rel=1e-5)
    if first:
        logits = (
            logits.exp() if loss_of is log_likelihood else logits
        )  # the reference's second softmax
        assert logits[0, 0].softmax(0).tolist() == pytest.approx(first, abs=2e-6)


@torch.no_grad()
def test_relation_head_equals_the_specification():
    head = heads.RelationHead(4, 5)
    for j, parameter in enumerate(head.parameters()):
        if parameter.dim() > 1:
            parameter.copy_(wave(*parameter.shape, start=j) / parameter[0].numel() ** 0.5)
    for conv in (head.conv1, head.conv2):
        conv.bias.zero_()
    support, query = wave(6, 4, 5, 5, start=1)[CLASS_MAJOR][None], wave(3, 4, 5, 5, start=2)[None]
    target = torch.tensor([[0, 2, 1]])
    scores = head.train()(support, query, 3)
    assert F.cross_entropy(scores[0], target[0]).item() == pytest.approx(1.060543, abs=2e-6)
    assert heads.relation_mse(scores, target).item() == pytest.approx(0.223166, abs=2e-6)
    assert head.norm1.running_mean[:2].tolist() == pytest.approx([0.172691, 0.007089], abs=2e-6)
    assert head.norm1.running_var[:2].tolist() == pytest.approx([0.311142, 0.950142], abs=2e-6)
    expected = [
        [0.405866, 0.399095, 0.195039],
        [0.386362, 0.319455, 0.294183],
        [0.316844, 0.349463, 0.333693],
    ]
    assert torch.allclose(
        head.eval()(support, query, 3)[0].softmax(1), torch.tensor(expected), atol=2e-6
    )


@pytest.mark.parametrize(
    ("make", "loss", "first"),
    [
        (
            lambda: heads.CosineLinear(8, 5),
            1.486199,
            (0.310816, 0.123903, 0.240085, 0.185767, 0.139429),
        ),
        (
            lambda: heads.CosineLinear(8, 5, temperature=10),
            2.589172,
            (0.724907, 0.007297, 0.199341, 0.055286, 0.013168),
        ),
        (
            lambda: heads.NegMargin(8, 5, -0.02),
            3.611336,
            (0.957183, 0.000193, 0.035688, 0.005759, 0.001177),
        ),
        (
            lambda: heads.NegMargin(8, 5, -0.01),
            3.661189,
            (0.957183, 0.000193, 0.035688, 0.005759, 0.001177),
        ),
        (
            lambda: heads.NegMargin(8, 5, 0, 5),
            2.092206,
            (0.757613, 0.010769, 0.146289, 0.058764, 0.026565),
        ),
    ],
    ids=["cosine T=2", "cosine T=10", "margin -0.02", "margin -0.01", "margin 0 T=5"],
)
@torch.no_grad()
def test_trained_classifiers_equal_the_specification(make, loss, first):
    head, x, labels = make(), wave(4, 8, start=2), torch.tensor([0, 1, 2, 4])
    if isinstance(head, heads.CosineLinear):
        head.weight_v.copy_(wave(5, 8, start=1))
        head.weight_g.copy_(torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])[:, None])
        training = head(x)
    else:
        head.weight.copy_(wave(5, 8, start=1))
        training = head(x, labels)
    assert F.cross_entropy(training, labels).item() == pytest.approx(loss, abs=2e-6)
    assert head(x)[0].softmax(0).tolist() == pytest.approx(first, abs=2e-6)


def test_torchs_losses_are_the_references():
    """What the recipes call where the reference has losses of its own."""
    stored = golden("cls_losses")
    predicted, target = (
        torch.from_numpy(array(f"loss/{name}", (4, 3))) for name in ("pred", "target")
    )
    close(F.mse_loss(predicted, target), stored["mse_mean_1"], 1e-5)
    close(
        F.nll_loss(predicted.log_softmax(1), torch.tensor([0, 2, 1, 2])), stored["nll_mean_1"], 1e-5
    )


def tasks(
    count: int = 4, shots: int = 3, queries: int = 7, d: tuple[int, ...] = (32,)
) -> tuple[Tensor, Tensor]:
    r = torch.Generator().manual_seed(0)
    return (torch.randn(count, n, *d, generator=r) for n in (WAYS * shots, queries))


@pytest.mark.parametrize("head", [heads.prototype, heads.matching, heads.MetaBaseline()])
@torch.no_grad()
def test_a_batch_of_tasks_equals_the_tasks_one_by_one(head):
    support, query = tasks()
    batch = head(support, query, WAYS)
    assert batch.shape == (4, 7, WAYS)
    for i in range(4):
        assert torch.allclose(
            batch[i], head(support[i : i + 1], query[i : i + 1], WAYS)[0], atol=1e-5
        )


@torch.no_grad()
def test_the_scaled_distance_is_the_papers_in_another_unit():
    """|f/c - p/c|² = |f - p|² / c²: features divided by the fourth root of their number give the
    same logits.
    """
    torch.manual_seed(0)
    support, query = torch.randn(2, WAYS * 3, 81), torch.randn(2, 7, 81)
    scaled = heads.prototype(support, query, WAYS, "scaled")
    assert torch.allclose(
        scaled, heads.prototype(support / 3, query / 3, WAYS, "squared"), rtol=1e-5
    )


def test_squared_distances_in_float32_are_accurate():
    r = torch.Generator().manual_seed(0)
    common = 5 + torch.rand(
        1, 1, 1600, generator=r
    )  # what all features share, many times what tells them apart
    a, b = (common + 0.1 * torch.randn(3, n, 1600, generator=r) for n in (75, 5))
    exact = torch.cdist(
        a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    assert ((heads.squared_distances(a, b) - exact).abs() / exact).max() < 1e-5
    assert torch.allclose(
        -heads.prototype(b, a, WAYS, "euclidean"), exact.sqrt().float(), rtol=1e-5
    )


def test_prototype_has_a_gradient_where_a_query_is_a_prototype():
    for distance in ("scaled", "squared", "euclidean"):
        support = torch.randn(1, WAYS, 8, requires_grad=True)
        F.cross_entropy(
            heads.prototype(support, support, WAYS, distance)[0], torch.arange(WAYS)
        ).backward()
        assert support.grad.isfinite().all() and support.grad.abs().max() > 0


@pytest.mark.parametrize(
    "head",
    [
        lambda support, query: heads.prototype(support, query, WAYS),
        lambda support, query: heads.matching(support, query, WAYS),
        lambda support, query, head=heads.MetaBaseline(): head(support, query, WAYS),  # noqa: B008
        lambda support, query, head=heads.CosineLinear(512, 5): head(query),  # noqa: B008
        lambda support, query, head=heads.NegMargin(512, 5): head(query),  # noqa: B008
    ],
    ids=["prototype", "matching", "meta_baseline", "cosine", "neg_margin"],
)
@torch.no_grad()
def test_distances_and_cosines_stay_in_float32_under_autocast(head):
    support, query = tasks(d=(512,))
    plain = head(support, query)
    with torch.autocast("cpu", torch.bfloat16):
        assert (query @ query.mT).dtype == torch.bfloat16
        assert torch.equal(head(support, query), plain)


def test_matching_is_finite_where_a_probability_underflows():
    support = torch.eye(5)[None]
    query = (-support).requires_grad_()
    loss = F.nll_loss(heads.matching(support, query, WAYS, temperature=500.0)[0], torch.arange(5))
    loss.backward()
    assert loss.item() == pytest.approx(500 + np.log(4), rel=1e-5) and query.grad.isfinite().all()


@torch.no_grad()
def test_relation_head_equals_convolving_concatenated_pairs():
    torch.manual_seed(0)
    head = heads.RelationHead(6, 11).eval()
    head.norm1.running_mean.normal_()
    support, query = tasks(d=(6, 11, 11))
    scores = head(support, query, WAYS)
    means = support.unflatten(1, (WAYS, 3)).mean(2)
    for t, q, c in ((0, 0, 0), (1, 6, 2), (3, 4, 4)):
        x = torch.cat([query[t, q], means[t, c]])[None]
        x = F.max_pool2d(F.relu(head.norm1(head.conv1(x))), 2)
        x = F.max_pool2d(F.relu(head.norm2(head.conv2(x))), 2)
        assert torch.allclose(
            scores[t, q, c], head.fc2(F.relu(head.fc1(x.flatten(1))))[0, 0], atol=1e-6
        )


def test_initial_weights():
    head = heads.RelationHead(64, 19)
    assert head.conv2.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert head.fc1.weight.shape == (8, 576)
    assert head.fc1.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (head.fc1.bias == 1).all() and (head.fc2.bias == 1).all()
    cosine = heads.CosineLinear(1600, 64)
    assert torch.allclose(cosine.weight_g.square(), cosine.weight_v.square().sum(1, keepdim=True))
    assert cosine.weight_g.mean().item() == pytest.approx(3**-0.5, rel=0.02)
    assert (cosine.temperature, heads.CosineLinear(8, 201).temperature) == (2, 10)
    assert heads.NegMargin(400, 64).weight.abs().max().item() == pytest.approx(0.05, rel=0.01)


def test_softmax_metric_of_neg_margin():
    head, x = heads.NegMargin(4, 3, margin=-0.5, temperature=2, metric="softmax"), torch.randn(5, 4)
    product = x @ head.weight.T
    expected = 2 * (
        product - product.amin(1, keepdim=True) + 0.5 * F.one_hot(torch.tensor([0, 1, 2, 0, 1]), 3)
    )
    assert torch.allclose(head(x, torch.tensor([0, 1, 2, 0, 1])), expected, atol=1e-6)


def test_what_cannot_be():
    with pytest.raises(InputError, match="maps of 3 x 3 are too small"):
        heads.RelationHead(64, 3)
    assert heads.RelationHead(64, 4).fc1.in_features == 64
    with pytest.raises(InputError, match="no distance is called 'cosine'"):
        heads.prototype(*tasks(), WAYS, "cosine")
    with pytest.raises(InputError, match="no metric is called 'euclidean'"):
        heads.NegMargin(8, 5, metric="euclidean")
