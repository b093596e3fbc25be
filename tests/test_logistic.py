"""Logistic regression in Gram space against scikit-learn's optimum, LBFGS, and the conditions that
make an optimum.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming_rule import array, close, golden
from torch import Tensor

from fewshot import InputError
from fewshot.heads.logistic import fit_logistic, logistic

GOLDENS = golden("cls_pmf_frozen")
WAYS = 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["frozen_1shot_64", "frozen_5shot_384"])
def test_equals_scikit_learns_optimum(name, dtype):
    case = golden("cls_pmf_frozen")[name]
    tag, d, n = case["tag"], case["dim"], case["queries_per_class"]
    centres = np.float32(case["separation"]) * array(f"{tag}/centre", (WAYS, d))[:, None]
    features = [
        torch.from_numpy(
            np.maximum(centres + array(f"{tag}/{part}", (WAYS, many, d)), 0).reshape(1, -1, d)
        )
        for part, many in (("support", case["shots"]), ("query", n))
    ]
    close(features[0][0], case["support"], 1e-6)
    close(features[1][0], case["query"], 1e-6)
    support, query = (F.normalize(x.to(dtype), dim=2) for x in features)
    for C in (1.0, 10.0):
        stored = case[f"logistic_optimum_C{C:.0f}"]
        logits = logistic(support, query, WAYS, C=C)
        assert logits.dtype == dtype
        expected = torch.tensor(stored["prob"], dtype=dtype)
        assert (logits[0].softmax(1) - expected).abs().max() < 2e-7
        weight, bias = fit_logistic(support, WAYS, C=C)
        close(bias[0], stored["intercept"], 5e-6)
        assert weight.norm().item() == pytest.approx(stored["weight_norm"], rel=1e-6)


def episodes(
    ways: int, shots: int, d: int = 48, tasks: int = 6, separation: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Supports (tasks, ways * shots, d) and queries (tasks, ways * 3, d), float64, cut at 0."""
    r = torch.Generator().manual_seed(shots)
    centres = separation * torch.randn(tasks, ways, 1, d, generator=r, dtype=torch.float64)
    parts = (
        centres + torch.randn(tasks, ways, n, d, generator=r, dtype=torch.float64)
        for n in (shots, 3)
    )
    return tuple(x.relu().flatten(1, 2) for x in parts)


def by_lbfgs(support: Tensor, query: Tensor, ways: int, C: float) -> Tensor:
    """Probabilities (queries, ways) of one task by torch's LBFGS in feature space, until it stops
    by itself.
    """
    labels = torch.arange(ways).repeat_interleave(len(support) // ways)
    weight = torch.zeros(ways, support.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(ways, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [weight, bias],
        max_iter=3000,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = F.cross_entropy(
            support @ weight.T + bias, labels, reduction="sum"
        ) + weight.square().sum() / (2 * C)
        value.backward()
        return value

    lbfgs.step(loss)
    return (query @ weight.T + bias).softmax(1).detach()


@pytest.mark.parametrize("C", [1.0, 100.0])
@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (5, 5), (2, 20), (12, 2)])
def test_equals_lbfgs_in_feature_space(ways, shots, C):
    support, query = (F.normalize(x, dim=2) for x in episodes(ways, shots))
    ours = logistic(support, query, ways, C=C).softmax(2)
    plain = torch.stack([by_lbfgs(s, q, ways, C) for s, q in zip(support, query)])
    assert (ours - 1 / ways).abs().max() > 0.004
    assert (ours - plain).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [None, 1.0, 20.0])
@pytest.mark.parametrize("C", [0.01, 1.0, 1e4])
def test_is_the_optimum(C, scale):
    """Where the gradient is 0, the loss being strictly convex: w = C sum_i (y - p)_i x_i, and sum_i
    (y - p)_i = 0.
    """
    support, _ = episodes(WAYS, 5)
    support = F.normalize(support, dim=2) if scale is None else scale * support
    weight, bias = fit_logistic(support, WAYS, C=C)
    labels = torch.arange(WAYS).repeat_interleave(5)
    residual = F.one_hot(labels) - (support @ weight.mT + bias[:, None]).softmax(2)
    largest = residual.abs().max()
    assert residual.sum(1).abs().max() < 1e-5 * largest
    gradient = weight - C * residual.mT @ support
    assert gradient.abs().max() < 1e-5 * weight.abs().max()


def test_more_supports_than_features_and_repeated_ones():
    """A Gram matrix without full rank."""
    support, query = episodes(WAYS, 10, d=8)
    support = torch.cat([support, support], 2).unflatten(1, (WAYS, 10))
    support = torch.cat([support, support[:, :, :3]], 2).flatten(1, 2)
    query = torch.cat([query, query], 2)
    ours = logistic(support, query, WAYS).softmax(2)
    plain = torch.stack([by_lbfgs(s, q, WAYS, 1.0) for s, q in zip(support, query)])
    assert (ours - plain).abs().max() < 1e-6


def test_tasks_do_not_depend_on_each_other():
    support, query = episodes(WAYS, 5)
    support[3] *= 30  # a task that takes longer
    together = logistic(support, query, WAYS)
    alone = torch.cat([logistic(s[None], q[None], WAYS) for s, q in zip(support, query)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)
    order = torch.randperm(len(support), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        logistic(support[order], query[order], WAYS), together[order], rtol=0, atol=1e-9
    )


def test_stays_in_float32_and_out_of_autograd():
    support, query = (x.float() for x in episodes(WAYS, 5))
    expected = logistic(support, query, WAYS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logistic(support, query, WAYS), expected)
    assert not logistic(support.clone().requires_grad_(), query, WAYS).requires_grad


def test_what_cannot_be(monkeypatch):
    support, query = episodes(WAYS, 1, tasks=1)
    for C in (0.0, -1.0, 1e11, math.nan):
        with pytest.raises(InputError, match="a C above 0 and up to 1e10"):
            logistic(support, query, WAYS, C=C)
    assert logistic(0 * support, query, WAYS).abs().max() < 1e-12
    assert logistic(support, query, WAYS, C=1e10).isfinite().all()
    for wrong in (math.nan, math.inf):
        with pytest.raises(InputError, match="infinite or not numbers"):
            logistic(support.where(support < support.max(), wrong), query, WAYS)
    monkeypatch.setattr("fewshot.heads.logistic.STEPS", 2)
    with pytest.raises(InputError, match="no optimum in 2 steps: lower C"):
        logistic(support, query, WAYS)
