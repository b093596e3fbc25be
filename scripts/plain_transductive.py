"""The methods of fewshot/heads/transductive.py and fewshot/heads/logistic.py as one writes them
first: for one task.

`python scripts/benchmark.py transductive` times them beside the library's, which do many tasks at
once. Each takes supports (ways * shots, D), all shots of class 0 first, and queries (m, D),
prepared as the method wants them, and gives what the library's function of its name gives by
default, (m, ways).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def labels_of(support: Tensor, ways: int) -> Tensor:
    return torch.arange(ways).repeat_interleave(len(support) // ways)


def class_means(support: Tensor, ways: int) -> Tensor:
    labels = labels_of(support, ways)
    return torch.stack([support[labels == k].mean(0) for k in range(ways)])


def simple_shot(support: Tensor, query: Tensor, ways: int) -> Tensor:
    return -torch.cdist(query, class_means(support, ways))


def rectified(support: Tensor, query: Tensor, ways: int) -> Tensor:
    """BD-CSPN's prototypes (ways, D)."""
    prototypes = class_means(support, ways)
    x = torch.cat([support, query + support.mean(0) - query.mean(0)])
    cosines = F.normalize(x) @ F.normalize(prototypes).T
    nearest, weights = cosines.argmax(1), (10 * cosines).softmax(1)
    for k in nearest.unique():
        members = nearest == k
        prototypes[k] = (weights[members, k, None] * x[members]).mean(0)
    return prototypes


def bd_cspn(support: Tensor, query: Tensor, ways: int) -> Tensor:
    return -torch.cdist(query, rectified(support, query, ways))


def laplacian_shot(support: Tensor, query: Tensor, ways: int) -> Tensor:
    lam = 0.7 if len(support) == ways else 0.3
    shifted = query + support.mean(0) - query.mean(0)
    unary = torch.cdist(shifted, rectified(support, query, ways)).square()
    # the nearest is a query itself
    near = torch.cdist(query, query).topk(3, largest=False).indices[:, 1:]
    affinity = lam * torch.zeros(len(query), len(query), dtype=query.dtype).scatter(1, near, 1.0)
    y, energy = (-unary).softmax(1), torch.tensor(torch.inf)
    for update in range(20):
        y = (affinity @ y - unary).softmax(1)
        before, energy = energy, (y * (y.clamp(min=1e-20).log() + unary - affinity @ y)).sum()
        if update > 1 and (energy - before).abs() <= 1e-6 * before.abs():
            break
    return y


def logits_by(x: Tensor, prototypes: Tensor, temperature: float = 15.0) -> Tensor:
    """-temperature / 2 |x - w|² less a sample's own part, (n, ways)."""
    return temperature * (x @ prototypes.T - prototypes.square().sum(1) / 2)


def entropy(p: Tensor, alpha: float) -> Tensor:
    return -(p * p.log()).sum(-1) if alpha == 1 else (1 - p.pow(alpha).sum(-1)) / (alpha - 1)


def tim_gd(
    support: Tensor,
    query: Tensor,
    ways: int,
    weights: tuple[float, float, float] = (0.1, 1.0, 0.1),
    alpha: float = 1.0,
) -> Tensor:
    labels, prototypes = labels_of(support, ways), class_means(support, ways).requires_grad_()
    adam = torch.optim.Adam([prototypes], lr=1e-4)
    for _ in range(1000):
        p = logits_by(query, prototypes).softmax(1)
        loss = weights[0] * F.cross_entropy(logits_by(support, prototypes), labels)
        loss = loss - weights[1] * entropy(p.mean(0), alpha) + weights[2] * entropy(p, alpha).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return logits_by(query, prototypes).softmax(1).detach()


def alpha_tim(support: Tensor, query: Tensor, ways: int) -> Tensor:
    return tim_gd(
        support, query, ways, weights=(1.0, 1.0, 1.0), alpha=2.0 if len(support) == ways else 7.0
    )


def tim_adm(support: Tensor, query: Tensor, ways: int) -> Tensor:
    on_supports, on_mean, on_each = 0.1, 1.0, 0.1
    dtype, support, query = query.dtype, support.double(), query.double()  # official too
    targets, prototypes = F.one_hot(labels_of(support, ways)).double(), class_means(support, ways)
    g, h = on_supports / (1 + on_each), len(support) / len(query)
    for _ in range(150):
        p_support, p = (logits_by(x, prototypes).softmax(1) for x in (support, query))
        q = p ** (1 + on_each)
        q = q / q.sum(0) ** (on_mean / (on_mean + 1))
        q = q / q.sum(1, keepdim=True)
        pull_support = (targets - p_support).T @ support + p_support.sum(0)[:, None] * prototypes
        pull_query = (q - p).T @ query + p.sum(0)[:, None] * prototypes
        prototypes = (g * pull_support + h * pull_query) / (g * targets.sum(0) + h * q.sum(0))[
            :, None
        ]
    return logits_by(query, prototypes).softmax(1).to(dtype)


def transport(costs: Tensor) -> Tensor:
    """Sinkhorn's plan (m, ways) from costs (m, ways), every class with as many queries."""
    plan, before = (-10 * costs).exp(), torch.zeros(len(costs))
    plan = plan / plan.sum()
    for _ in range(1000):
        sums = plan.sum(1)
        if (sums - before).abs().max() <= 1e-6:
            break
        plan = plan / sums[:, None]
        plan, before = plan * (len(plan) / plan.shape[1] / plan.sum(0)), sums
    return plan


def pt_map(support: Tensor, query: Tensor, ways: int) -> Tensor:
    x, targets = torch.cat([support, query]), F.one_hot(labels_of(support, ways))
    prototypes = class_means(support, ways)
    plan = transport(torch.cdist(query, prototypes).square())
    for _ in range(20):
        members = torch.cat([targets, plan])
        means = members.T @ x / members.sum(0)[:, None]
        prototypes = prototypes + 0.2 * (means - prototypes)
        plan = transport(torch.cdist(query, prototypes).square())
    return plan


def logistic(support: Tensor, query: Tensor, ways: int) -> Tensor:
    """By LBFGS, in float64 for it to end where it should."""
    dtype, support, query = query.dtype, support.double(), query.double()
    labels = labels_of(support, ways)
    weight = torch.zeros(ways, support.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(ways, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = (
            F.cross_entropy(support @ weight.T + bias, labels, reduction="sum")
            + weight.square().sum() / 2
        )
        value.backward()
        return value

    lbfgs.step(loss)
    return (query @ weight.T + bias).detach().to(dtype)
